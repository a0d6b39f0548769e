"""Orders that users bring: from files, and from installed packages."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pytest
from safetensors.numpy import save_file

from neuralink_cli.activations.trace import Trace
from neuralink_cli.clustering.cluster import ClusterOptions, cluster
from neuralink_cli.devices.device import builtin_devices
from neuralink_cli.errors import InputError, NeuralinkError, OptionError
from neuralink_cli.ordering import own_orders
from neuralink_cli.ordering.own_orders import load_order, read_orders
from neuralink_cli.placement.placement import Placement, PlacementHeader
from tests.traces import write_clustered_trace

NEURONS = 60
UFS = builtin_devices()["ufs4.0"]


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    write_clustered_trace(tmp_path / "t", neurons=NEURONS)
    return tmp_path / "t"


def permutations(seed: int, blocks: int = 3) -> dict[str, npt.NDArray[np.int64]]:
    rng = np.random.default_rng(seed)
    return {f"layers.{k}": rng.permutation(NEURONS) for k in range(blocks)}


def save_orders(file: Path, orders: Mapping[str, npt.NDArray[Any]]) -> None:
    if file.suffix == ".npz":
        # As untyped: numpy 2.0 takes every name for that of an array.
        cast(Any, np.savez)(file, **orders)
    else:
        save_file(dict(orders), file)


def by_cluster(bits: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
    """The order of a researcher: neurons with the same bits, nearly, side by side."""
    return np.lexsort(bits.T)


def run(trace: Path, output: Path, **options: object) -> PlacementHeader:
    return cluster(trace, output, ClusterOptions(UFS, effort="fast", **options)).header  # type: ignore[arg-type]


@pytest.mark.parametrize("suffix", ["npz", "safetensors"])
@pytest.mark.parametrize("pinned", [0.0, 0.1])
def test_an_order_from_a_file_is_compared_and_can_be_stored(
    trace: Path, tmp_path: Path, suffix: str, pinned: float
) -> None:
    # What `cluster` finds itself, so that no block is better off with its original order.
    run(trace, tmp_path / "ours", pin_hot=pinned)
    with Placement(tmp_path / "ours") as ours:
        orders = {name: block.order.copy() for name, block in ours.blocks.items()}
        gains = {gain.order: gain.gain for gain in ours.info.gains if gain.source is None}
    file = tmp_path / f"orders.{suffix}"
    save_orders(file, orders)
    header = run(trace, tmp_path / "theirs", order="imported", order_from=file, pin_hot=pinned)
    assert {block.order for block in header.blocks} == {"imported"}
    assert header.parameters["own_orders"] == {"imported": file.name}
    found = {gain.order: gain.gain for gain in header.gains if gain.source is None}
    assert found["imported"] == found["stored"] == gains["stored"]
    with Placement(tmp_path / "theirs") as theirs:
        for name, order in orders.items():
            assert theirs.blocks[name].order.tolist() == order.tolist()


def test_a_poor_order_is_compared_but_not_stored(trace: Path, tmp_path: Path) -> None:
    save_orders(tmp_path / "o.npz", permutations(1))
    header = run(trace, tmp_path / "p", order_from=tmp_path / "o.npz")
    gains = {gain.order: gain.gain.value for gain in header.gains if gain.source is None}
    assert gains["imported"] < 1.05 < gains["stored"]
    assert "imported" not in {block.order for block in header.blocks}


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda orders: orders.pop("layers.1"), "lacks the order of layers.1"),
        (lambda orders: orders.update(other=np.arange(3)), "beside those of the trace, the order of other"),
        (lambda orders: orders.update({"layers.0": np.zeros(NEURONS, np.int64)}), "'layers.0' is not a permutation"),
        (lambda orders: orders.update({"layers.0": np.arange(NEURONS - 1)}), "is not a permutation of 0 to 59"),
        (
            lambda orders: orders.update({"layers.0": np.arange(float(NEURONS))}),
            "is not a permutation|but orders are integers",
        ),
    ],
)
@pytest.mark.parametrize("suffix", ["npz", "safetensors"])
def test_what_is_no_order_of_these_blocks_is_refused(
    trace: Path, tmp_path: Path, change: object, complaint: str, suffix: str
) -> None:
    orders = permutations(2)
    change(orders)  # type: ignore[operator]
    file = tmp_path / f"o.{suffix}"
    save_orders(file, orders)
    with Trace(trace) as opened, pytest.raises(InputError, match=complaint):
        read_orders(file, opened.info.blocks)


def test_files_that_are_something_else(trace: Path, tmp_path: Path) -> None:
    (tmp_path / "o.npz").write_bytes(b"no zip at all")
    save_orders(tmp_path / "objects.npz", {"layers.0": np.array([{}], dtype=object)})
    with Trace(trace) as opened:
        for name in ("o.npz", "objects.npz", "absent.npz", "absent.safetensors"):
            with pytest.raises(InputError):
                read_orders(tmp_path / name, opened.info.blocks)


def install(monkeypatch: pytest.MonkeyPatch, **functions: str) -> None:
    points = EntryPoints(EntryPoint(name, value, own_orders.GROUP) for name, value in functions.items())
    monkeypatch.setattr(own_orders, "entry_points", lambda group: points.select(group=group))


def test_a_package_adds_a_named_order(trace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, **{"by-cluster": f"{__name__}:by_cluster", "refined": "nowhere:nothing"})
    monkeypatch.setattr(EntryPoint, "load", lambda _self: by_cluster)
    header = run(trace, tmp_path / "p", order="by-cluster", pin_hot=0.1)
    assert {block.order for block in header.blocks} <= {"by-cluster", "original"}
    assert all("by-cluster" in part.orders for block in header.blocks for part in block.held_out)
    # A built-in name is not taken over.
    assert set(own_orders.installed_orders()) == {"by-cluster"}


def test_a_package_that_fails_is_named(trace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, broken="nowhere_at_all:nothing", mine="somewhere:function")
    with pytest.raises(InputError, match="order 'broken' of nowhere_at_all:nothing cannot be loaded: ModuleNotFound"):
        load_order("broken")
    with pytest.raises(OptionError, match=r"'else' is not one of original, .*refined, imported, broken, mine"):
        load_order("else")
    for function, complaint in (
        (lambda bits: bits[0], "is not a permutation of 0 to 59"),
        (lambda bits: 1 // 0, "fails for block 'layers.[0-2]': ZeroDivisionError"),
        (7, "is not a function"),
    ):
        monkeypatch.setattr(EntryPoint, "load", lambda _self, function=function: function)
        with pytest.raises(NeuralinkError, match=complaint):
            run(trace, tmp_path / "p", order="mine")
    assert not (tmp_path / "p").exists()
