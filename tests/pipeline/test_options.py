"""What a build can be told, and what it is told by names and files."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from neuralink_cli.calibration.identity import identify_dataset
from neuralink_cli.calibration.options import CalibrationOptions
from neuralink_cli.clustering.dask_cluster import DaskOptions
from neuralink_cli.devices.device import find_device
from neuralink_cli.errors import InputError, OptionError
from neuralink_cli.evaluation.forward_check import ForwardOptions
from neuralink_cli.layout.plan import RelayoutOptions
from neuralink_cli.pipeline.build_file import parse_build
from neuralink_cli.pipeline.inputs import ModelInput, cluster_inputs, forward_inputs, relayout_inputs
from neuralink_cli.pipeline.options import BuildDevice, BuildOptions, build_device

PROFILE = Path(__file__).parents[2] / "neuralink_cli/devices/profiles/ufs3.1.json"
DATA = CalibrationOptions(("text.txt",))


@pytest.mark.parametrize("name", ["", ".", "..", ".hidden", "a/b", "a\n", "summary.json", "Trace.safetensors", "a."])
def test_a_device_needs_the_name_of_a_folder(name: str) -> None:
    with pytest.raises(OptionError, match="cannot be the name of a device's folder"):
        BuildDevice(name, find_device("nvme"))


def test_devices_are_named_after_their_profiles(tmp_path: Path) -> None:
    assert build_device("ufs4.0").name == "ufs4.0"
    assert build_device("oneplus-15r:hot").name == "oneplus-15r-hot"
    path = Path(shutil.copy(PROFILE, tmp_path / "my phone.json"))
    assert build_device(str(path)).name == "my-phone"
    assert build_device(str(path), "theirs").name == "theirs"


def test_one_device_is_a_list_of_one(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^file: \[device\] is one table of a list: write \[\[device\]\]$"):
        with_tables(tmp_path, device={"device": "nvme"})


def test_no_two_devices_share_a_folder() -> None:
    with pytest.raises(OptionError, match="two devices have the name 'nvme'"):
        BuildOptions(DATA, (build_device("nvme"), BuildDevice("NVMe", find_device("ufs4.0"))))
    with pytest.raises(OptionError, match="no device"):
        BuildOptions(DATA, ())


def test_paths_of_a_build_file_are_relative_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "there"
    folder.mkdir()
    for name in ("model", "text.txt"):
        (folder / name).touch()
    shutil.copy(PROFILE, folder / "phone.json")
    # By chance there is one here, which is not meant.
    (tmp_path / "other.txt").touch()
    monkeypatch.chdir(tmp_path)
    document = {
        "output": "out",
        "model": {"path": "model"},
        "profile": {"dataset": ["text.txt", "other.txt", "org/name:config@main"], "num-samples": 0},
        "device": [{"device": "phone.json"}, {"device": "ufs4.0", "dram": "10%"}],
    }
    request = parse_build(document, "file", folder)
    assert request.model == str(folder / "model")
    assert request.output == folder / "out"
    assert request.options.data.datasets == (
        str(folder / "text.txt"),
        str(folder / "other.txt"),
        "org/name:config@main",
    )
    assert (request.options.data.num_samples, request.options.data.max_tokens) == (None, 131072)
    assert [device.name for device in request.options.devices] == ["phone", "ufs4.0"]
    assert [request.options.dram_of(device).fraction for device in request.options.devices] == [0.05, 0.1]


def test_recall_is_measured_on_the_text_that_the_file_names(tmp_path: Path) -> None:
    document = {
        "model": {"path": "./model"},
        "profile": {"dataset": ["./text.txt"]},
        "relayout": {"weights": "q4_0", "recall-text": "held-out.txt", "recall-tokens": 64},
        "device": [{"device": "nvme"}],
    }
    options = parse_build(document, "file", tmp_path).options
    assert (options.recall_text, options.recall_tokens) == (tmp_path / "held-out.txt", 64)
    assert options.relayout == RelayoutOptions(weights="q4_0")
    # Another text is another layout; none leaves the layouts of earlier lock files as they are.
    model = ModelInput(tmp_path, tmp_path, None, "", "", "")
    text, found = tmp_path / "held-out.txt", []
    for content in ("The river rises.", "The river falls."):
        text.write_text(content)
        found.append(relayout_inputs(model, options))
    assert found[0]["recall"] != found[1]["recall"]
    assert "recall" not in relayout_inputs(model, replace(options, recall_text=None))


def with_tables(folder: Path, **tables: Any) -> BuildOptions:
    """The options of a build file with some tables; the model and its text are `folder / "model"` and "text.txt"."""
    document = {"model": {"path": "./model"}, "profile": {"dataset": ["./text.txt"]}, "device": [{"device": "nvme"}]}
    return parse_build({**document, **tables}, "file", folder).options


def test_models_are_run_on_the_text_that_the_file_names(tmp_path: Path) -> None:
    table = {"forward": True, "text": "held-out.txt", "forward-tokens": 256, "max-kl": 0.02}
    options = with_tables(tmp_path, verify=table, relayout={"weights": "q4_0"})
    assert options.forward == ForwardOptions(tmp_path / "held-out.txt", tokens=256, max_kl=0.02)
    assert with_tables(tmp_path, verify={**table, "forward": False}).forward is None
    with pytest.raises(InputError, match="at verify: 'forward' is a required property"):
        with_tables(tmp_path, verify={"text": "held-out.txt"})
    with pytest.raises(OptionError, match="for layouts with rounded weights"):
        with_tables(tmp_path, verify=table)
    # Another text is another comparison, but it may lie elsewhere.
    model = ModelInput(tmp_path, tmp_path, None, "", "", "")
    found = []
    for place, content in (("held-out.txt", "Up."), ("held-out.txt", "Down."), ("moved.txt", "Down.")):
        (tmp_path / place).write_text(content)
        of_place = with_tables(tmp_path, verify={**table, "text": place}, relayout={"weights": "q4_0"})
        found.append(forward_inputs(model, of_place))
    assert found[0] != found[1] == found[2]


def test_only_bundles_are_really_read(tmp_path: Path) -> None:
    assert with_tables(tmp_path, bench={"real": True}).real
    with pytest.raises(OptionError, match="a permuted layout has no bundles"):
        with_tables(tmp_path, bench={"real": True}, relayout={"layout": "permuted"})


def test_who_orders_the_blocks_decides_nothing(tmp_path: Path) -> None:
    alone = with_tables(tmp_path)
    for table, expected in (
        ({"workers": 2}, DaskOptions(workers=2)),
        ({"scheduler": "tcp://10.0.0.1:8786", "send-trace": True}, DaskOptions("tcp://10.0.0.1:8786", send_trace=True)),
        ({"scheduler": "scheduler.json"}, DaskOptions(str(tmp_path / "scheduler.json"))),
    ):
        options = with_tables(tmp_path, cluster=table)
        assert options.cluster.dask == expected
        (tmp_path / "scheduler.json").write_text('{"address": "tcp://10.0.0.1:8786"}')
        assert cluster_inputs(options, options.devices[0]) == cluster_inputs(alone, alone.devices[0])
    with pytest.raises(InputError, match=r"none\.json: cannot be opened"):
        cluster_inputs(with_tables(tmp_path, cluster={"scheduler": "none.json"}), alone.devices[0])
    with pytest.raises(OptionError, match="needs `scheduler` or `workers`"):
        with_tables(tmp_path, cluster={"send-trace": True})
    with pytest.raises(OptionError, match="exactly one"):
        with_tables(tmp_path, cluster={"scheduler": "tcp://x:1", "workers": 2})


def test_a_dataset_is_its_bytes_and_its_name(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.txt").write_text("same")
    assert identify_dataset(str(tmp_path / "one/a.txt")) == identify_dataset(str(tmp_path / "two/a.txt"))
    before = identify_dataset(str(tmp_path / "one"))
    (tmp_path / "one/a.txt").rename(tmp_path / "one/b.txt")
    assert identify_dataset(str(tmp_path / "one")) != before
    with pytest.raises(InputError, match="no such file"):
        identify_dataset(str(tmp_path / "none.txt"))
    with pytest.raises(InputError, match="no such file"):
        identify_dataset("none.txt")


def test_a_path_that_is_not_there_stays_a_path() -> None:
    """It must not be looked for on the hub."""
    document = {"model": {"path": "./gone"}, "profile": {"dataset": ["x"]}, "device": [{"device": "nvme"}]}
    assert parse_build(document, "the command line", Path()).model == "./gone"
