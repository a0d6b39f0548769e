"""Blocks ordered on a Dask cluster: the bytes of one machine, whatever happens to workers, and errors with causes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import dask
import numpy as np
import pytest
from distributed import Client, LocalCluster
from distributed.diagnostics.plugin import WorkerPlugin
from safetensors.numpy import save_file

from neuralink_cli.activations.trace import Trace
from neuralink_cli.clustering import dask_cluster, dask_tasks
from neuralink_cli.clustering.cluster import ClusterOptions, cluster
from neuralink_cli.clustering.dask_cluster import DaskOptions
from neuralink_cli.clustering.dask_tasks import GROUP_BLOCKS, GROUP_WORK, take_group
from neuralink_cli.clustering.dask_worker import require_same_software
from neuralink_cli.devices.device import builtin_devices
from neuralink_cli.errors import (
    InputError,
    MismatchError,
    MissingDependencyError,
    NeuralinkError,
    OptionError,
    WorkerError,
)
from neuralink_cli.progress import no_progress
from tests.traces import write_clustered_trace, write_routed_trace

LINKED = ClusterOptions(device=builtin_devices()["ufs4.0"], order="linked", jobs=1)


class Deaths(WorkerPlugin):  # type: ignore[misc]
    """Ends a worker, as the kernel does when memory runs out, as it begins to order a block.

    Args:
        block: Id of the block.
        once: A file that says that it has happened, if it is to happen once.
    """

    name = "deaths"

    def __init__(self, block: str, once: Path | None = None) -> None:
        self.block, self.once = block, once

    def setup(self, worker: Any) -> None:
        from neuralink_cli.clustering import dask_worker

        order_block: Any = getattr(dask_worker, "order_block")  # noqa: B009

        def order_or_end(rows: Any, block: Any, *others: Any) -> Any:
            if block.id == self.block and not (self.once is not None and self.once.exists()):
                if self.once is not None:
                    self.once.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return order_block(rows, block, *others)

        self.before = order_block
        setattr(dask_worker, "order_block", order_or_end)  # noqa: B010

    def teardown(self, worker: Any) -> None:
        from neuralink_cli.clustering import dask_worker

        setattr(dask_worker, "order_block", self.before)  # noqa: B010


WORKER = "neuralink_cli.clustering.dask_worker"


@pytest.fixture(scope="module")
def scheduler() -> Iterator[str]:
    """Two processes, with what Dask starts again when one ends."""
    with (
        dask.config.set(
            {
                "distributed.scheduler.allowed-failures": 0,
                # A cluster on this machine gives up a process that does not start again within some seconds.
                "distributed.deploy.lost-worker-timeout": "600s",
                # Processes are forked from one that has imported what they need: several end here.
                "distributed.worker.multiprocessing-method": "forkserver",
                "distributed.worker.multiprocessing.initialize": WORKER,
            }
        ),
        LocalCluster(
            # What workers need is imported before they register: importing it later blocks them for seconds.
            preload=[WORKER],
            n_workers=2,
            threads_per_worker=1,
            host="127.0.0.1",
            dashboard_address="127.0.0.1:0",
            silence_logs=50,
            memory_limit=0,
        ) as started,
    ):
        yield started.scheduler_address


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("trace") / "t.safetensors"
    write_clustered_trace(path, blocks=5)
    return path


@pytest.fixture(scope="module")
def alone(trace: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The placement that threads of one process make."""
    return placed(trace, tmp_path_factory.mktemp("alone") / "p")


def placed(trace: Path, output: Path, dask: DaskOptions | None = None, **options: Any) -> bytes:
    cluster(trace, output, replace(LINKED, dask=dask, **options), progress=no_progress)
    return output.read_bytes()


def with_plugin(scheduler: str, plugin: WorkerPlugin) -> Client:
    client = Client(scheduler, set_as_default=False)
    client.register_plugin(plugin)
    return client


def test_a_worker_that_ends_in_mid_run_changes_nothing(
    scheduler: str, trace: Path, alone: bytes, tmp_path: Path
) -> None:
    with with_plugin(scheduler, Deaths("layers.2", tmp_path / "ended")) as client:
        assert placed(trace, tmp_path / "p", DaskOptions(scheduler)) == alone
        assert (tmp_path / "ended").exists()
        client.unregister_worker_plugin("deaths")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ended", "p"]


def test_a_block_that_ends_every_worker_is_named(
    scheduler: str, trace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though it is in a group with others, which end their workers as well."""
    monkeypatch.setattr(dask_tasks, "GROUPS_LEFT", 0.5)
    with with_plugin(scheduler, Deaths("layers.3")) as client:
        with pytest.raises(WorkerError, match=r"^.*block 'layers.3' ended every worker that ordered it") as found:
            placed(trace, tmp_path / "p", DaskOptions(scheduler))
        client.unregister_worker_plugin("deaths")
    assert found.value.where == str(trace)
    assert not list(tmp_path.iterdir())


def test_a_scheduler_that_ends_in_mid_run_ends_the_run(
    trace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No worker is needed for that: the first block is under way as soon as it is handed in."""
    file = tmp_path / "scheduler.json"
    code = "from distributed.cli.dask_scheduler import main; main()"
    options = ["--host", "127.0.0.1", "--port", "0", "--no-dashboard", "--scheduler-file", str(file)]
    process = subprocess.Popen([sys.executable, "-c", code, *options], stderr=subprocess.DEVNULL)
    submit: Any = getattr(dask_tasks._Tasks, "_submit")  # noqa: B009

    def submit_and_end(tasks: Any, places: Any) -> None:
        submit(tasks, places)
        process.kill()
        process.wait()

    monkeypatch.setattr(dask_tasks._Tasks, "_submit", submit_and_end)
    try:
        while not file.exists() and process.poll() is None:
            time.sleep(0.05)
        with pytest.raises(WorkerError, match=r"^the connection to the Dask scheduler is lost; see why it ended"):
            placed(trace, tmp_path / "p", DaskOptions(str(file)))
    finally:
        process.kill()
        process.wait()
    assert [path.name for path in tmp_path.iterdir()] == ["scheduler.json"]


@pytest.mark.parametrize("send", [False, True])
def test_experts_give_the_same_bytes_read_or_sent(scheduler: str, tmp_path: Path, send: bool) -> None:
    trace = write_routed_trace(tmp_path / "t", experts=3)
    expected = placed(trace, tmp_path / "alone", fewest_tokens=1, pin_hot=0.1)
    options = DaskOptions(scheduler, send_trace=send)
    assert placed(trace, tmp_path / "p", options, fewest_tokens=1, pin_hot=0.1) == expected


def test_a_sent_trace_gives_the_same_bytes_and_need_not_be_seen(
    scheduler: str, trace: Path, alone: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dask_tasks, "_seen_by_workers", lambda _path: tmp_path / "nowhere")
    assert placed(trace, tmp_path / "p", DaskOptions(scheduler, send_trace=True)) == alone
    with pytest.raises(InputError, match=r"nowhere: a worker on .* cannot read it .*--send-trace"):
        placed(trace, tmp_path / "q", DaskOptions(scheduler))


def test_a_worker_that_sees_another_file_is_told(
    scheduler: str, trace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_clustered_trace(tmp_path / "other", blocks=5, source="other")
    (tmp_path / "text").write_text("no trace" * 100)
    for name in ("other", "text"):
        path = tmp_path / name
        monkeypatch.setattr(dask_tasks, "_seen_by_workers", lambda _path, path=path: path)
        with pytest.raises(NeuralinkError, match=f"{name}: a worker on .*--send-trace"):
            placed(trace, tmp_path / "p", DaskOptions(scheduler))


def test_a_worker_whose_copy_is_damaged_is_told(
    scheduler: str, trace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The header of the copy still states the digest of what was checked here."""
    data = bytearray(trace.read_bytes())
    with Trace(trace) as opened:
        data[opened.header.offset_of(opened.entry("layers.3.fired"))] ^= 1
    (tmp_path / "copy").write_bytes(data)
    monkeypatch.setattr(dask_tasks, "_seen_by_workers", lambda _path: tmp_path / "copy")
    with pytest.raises(MismatchError, match=r"copy: a worker on .* reads other bytes of block 'layers\.3' there"):
        placed(trace, tmp_path / "p", DaskOptions(scheduler))


def test_an_imported_order_goes_along(scheduler: str, trace: Path, tmp_path: Path) -> None:
    with Trace(trace) as opened:
        orders = {block.id: np.arange(block.neurons)[::-1].copy() for block in opened.info.blocks}
    save_file(orders, tmp_path / "orders.safetensors")
    chosen: dict[str, Any] = {"order": "imported", "order_from": tmp_path / "orders.safetensors"}
    assert placed(trace, tmp_path / "p", DaskOptions(scheduler), **chosen) == placed(trace, tmp_path / "q", **chosen)


def test_versions_that_differ_are_refused(
    scheduler: str, trace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = {"Python": "3.11", "neuralink": "9.9", "numpy": "2.0.0", "numba": "0.60.0"}
    for name, theirs in [("Python", "3.10"), ("neuralink", "1.0"), ("numpy", "2.1.0"), ("numba", "0.61.0")]:
        with pytest.raises(MismatchError, match=f"there: has {name} {theirs}, but {ours[name]} is installed here"):
            require_same_software(ours, {**ours, name: theirs}, "there")
    with pytest.raises(MismatchError, match=r"there: does not have neuralink; 9\.9 is installed here"):
        require_same_software(ours, {**ours, "neuralink": None}, "there")
    # Those that are there at the start, and one that joins later.
    from neuralink_cli.clustering import dask_worker

    actual = dask_worker.software()
    monkeypatch.setattr(dask_worker, "software", lambda: {**actual, "numba": "0.1"})
    with pytest.raises(MismatchError, match=f"^scheduler {scheduler}: has numba {actual['numba']}, but 0.1 is"):
        placed(trace, tmp_path / "p", DaskOptions(scheduler))
    monkeypatch.setattr(dask_worker, "software", lambda: actual)
    monkeypatch.setattr(dask_tasks, "software", lambda: {**actual, "numba": "0.1"})
    with pytest.raises(MismatchError, match=f"^worker on .*: has numba {actual['numba']}, but 0.1 is installed"):
        placed(trace, tmp_path / "p", DaskOptions(scheduler))


def test_an_interruption_cancels_what_is_under_way(
    scheduler: str, trace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("neuralink_cli.clustering.ordered_spool.OrderedSpool.put", interrupted)
    with pytest.raises(KeyboardInterrupt):
        placed(trace, tmp_path / "p", DaskOptions(scheduler))
    assert not list(tmp_path.iterdir())
    with Client(scheduler, set_as_default=False) as client:
        assert not client.run_on_scheduler(lambda dask_scheduler: list(dask_scheduler.tasks))


def test_where_no_scheduler_answers_that_is_said(trace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dask_cluster, "_CONNECT_SECONDS", 1)
    (tmp_path / "s.json").write_text('{"address": "tcp://127.0.0.1:9"}')
    (tmp_path / "empty.json").write_text("{}")
    for name in ("tcp://127.0.0.1:9", str(tmp_path / "s.json")):
        with pytest.raises(WorkerError, match=r"no Dask scheduler answers at tcp://127\.0\.0\.1:9"):
            placed(trace, tmp_path / "p", DaskOptions(name))
    with pytest.raises(InputError, match=r"empty\.json: is not the file of a Dask scheduler"):
        placed(trace, tmp_path / "p", DaskOptions(str(tmp_path / "empty.json")))
    with pytest.raises(InputError, match=r"none\.json"):
        placed(trace, tmp_path / "p", DaskOptions(str(tmp_path / "none.json")))
    with pytest.raises(OptionError, match="is not an address of Dask"):
        placed(trace, tmp_path / "p", DaskOptions("carrier-pigeon://x"))


def test_a_cluster_is_either_there_or_started() -> None:
    with pytest.raises(OptionError, match="exactly one"):
        DaskOptions()
    with pytest.raises(OptionError, match="exactly one"):
        DaskOptions("tcp://x:1", 2)
    with pytest.raises(OptionError, match="at least 1"):
        DaskOptions(workers=0)


def test_without_the_extra_the_command_says_what_to_install(
    trace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'neuralink-cli\[dask\]'"):
        placed(trace, tmp_path / "p", DaskOptions(workers=1))


def test_small_blocks_share_a_task_and_large_ones_do_not(trace: Path) -> None:
    with Trace(trace) as opened:
        (block, *_) = opened.info.blocks
    large = replace(block, neurons=11008)
    rare = replace(large, neurons=2048, routed=64)
    tokens = 1 << 20
    assert large.neurons**2 * (tokens // 64) > GROUP_WORK > 500 * rare.neurons**2
    blocks = [large, *[rare] * 500, large, large]
    groups = [range(0)]
    while groups[-1].stop < len(blocks):
        groups.append(take_group(blocks, groups[-1].stop, tokens, 2))
    assert [place for group in groups for place in group] == list(range(len(blocks)))
    assert groups[1] == range(1)
    assert groups[-2:] == [range(501, 502), range(502, 503)]
    sizes = [len(group) for group in groups[2:-2]]
    assert sizes[0] == 502 // 8
    assert sizes == sorted(sizes, reverse=True)
    assert take_group([rare] * 10_000, 0, tokens, 2) == range(GROUP_BLOCKS)
    # Of few blocks every thread gets some.
    assert take_group([rare] * 6, 0, tokens, 2) == range(1)
