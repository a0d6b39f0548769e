"""`neuralink build` from the command line: what is made, what runs again and why, and whose files are left alone."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from neuralink_cli.cli.entry import run
from neuralink_cli.errors import VerificationError
from neuralink_cli.files.durable import locked_directory
from neuralink_cli.files.json_text import canonical
from neuralink_cli.pipeline import build as pipeline_build
from neuralink_cli.streaming.journal import Journal
from tests.checkpoints import files_of
from tests.cli.conftest import Neuralink
from tests.conftest import ModelFactory
from tests.hub import COMMIT, write_cached
from tests.processes import run_command
from tests.tiny_models import TEXT

ROOT = Path(__file__).parents[2]
DEVICES = ("ufs4.0", "ufs3.1", "nvme")
STAGES = 1 + 3 * len(DEVICES) + len(DEVICES) + 1
reads_toml = pytest.mark.skipif(
    not (find_spec("tomllib") or find_spec("tomli")), reason="no reader of TOML before Python 3.11"
)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "river.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="module")
def arguments(model: ModelFactory, text: Path) -> list[str]:
    devices = [argument for name in DEVICES for argument in ("--device", name)]
    return ["build", str(model("opt")), "--dataset", str(text), "--max-seq-length", "16", "--effort", "fast", *devices]


@pytest.fixture(scope="module")
def built(arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed build of the fleet. Do not write into it."""
    output = tmp_path_factory.mktemp("built") / "fleet"
    assert run([*arguments, "-o", str(output), "-q"]) == 0
    return output


@pytest.fixture
def fleet(built: Path, tmp_path: Path) -> Path:
    """A copy of the undisturbed build."""
    return Path(shutil.copytree(built, tmp_path / "fleet"))


def content(folder: Path) -> dict[str, bytes]:
    """All files of a folder, hidden ones too."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def stamps(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def lock_of(folder: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((folder / "neuralink.lock.json").read_text())
    return document


def stages_run(stderr: str) -> list[str]:
    """The stages that the lines on stderr say were run."""
    return re.findall(r"^neuralink: \[\d+/\d+\] (.*): done in ", stderr, re.MULTILINE)


def test_makes_verifies_and_measures_a_layout_for_every_device(
    neuralink: Neuralink, arguments: list[str], fleet: Path, model: ModelFactory
) -> None:
    outcome = neuralink(*arguments, "-o", fleet, "--json")
    assert outcome.code == 0
    document = json.loads(outcome.stdout)
    assert len(document["stages"]) == STAGES
    assert [(cell["device"], cell["made_for"]) for cell in document["cells"]] == [
        (device, made_for) for device in DEVICES for made_for in sorted(DEVICES, key=lambda name: name != device)
    ]
    for device in DEVICES:
        of_device = [cell for cell in document["cells"] if cell["device"] == device]
        assert max(cell["ratio_to_best"] for cell in of_device) == 1
        best = min(cell["io_mean"] for cell in of_device)
        assert all(cell["ratio_to_best"] == best / cell["io_mean"] for cell in of_device)
        rows = json.loads((fleet / device / "bench.json").read_text())["rows"]
        gains = {row["way"]["layout"]: row["gain"] for row in rows if row["way"]["collapse"]}
        assert {cell["made_for"]: cell["gain"] for cell in of_device} == {name: gains[name] for name in DEVICES}
        assert json.loads((fleet / device / "verify.json").read_text())["mode"] == "full"
        assert neuralink("verify", model("opt"), fleet / device / "layout", "-q").code == 0
    assert sorted(path.name for path in fleet.iterdir()) == sorted(
        [*DEVICES, "neuralink.lock.json", "summary.json", "trace.safetensors"]
    )


def test_the_lock_file_lists_every_file_with_its_digest(built: Path) -> None:
    document = lock_of(built)
    assert (built / "neuralink.lock.json").read_text() == canonical(document) + "\n"
    listed = {name: file["sha256"] for stage in document["stages"] for name, file in stage["files"].items()}
    found = {name: hashlib.sha256(data).hexdigest() for name, data in content(built).items()}
    del found["neuralink.lock.json"]
    assert listed == found
    assert {"torch", "transformers"} <= set(document["stages"][0]["versions"])
    assert str(built) not in json.dumps(document)


def test_nothing_runs_again_when_nothing_has_changed(neuralink: Neuralink, arguments: list[str], fleet: Path) -> None:
    before = stamps(fleet)
    outcome = neuralink(*arguments, "-o", fleet)
    assert outcome.code == 0
    assert outcome.stderr.count(": up to date\n") == STAGES
    assert f"0 of {STAGES} stages were run" in outcome.stdout
    after = stamps(fleet)
    del before["neuralink.lock.json"], after["neuralink.lock.json"]
    assert after == before


def test_data_that_lies_elsewhere_is_the_same_data(
    neuralink: Neuralink, arguments: list[str], fleet: Path, text: Path, tmp_path: Path
) -> None:
    shutil.copy(text, tmp_path)
    moved = [argument.replace(str(text), str(tmp_path / text.name)) for argument in arguments]
    assert stages_run(neuralink(*moved, "-o", fleet).stderr) == []


def kill_after(owner: object, name: str, calls: int, *arguments: object) -> str:
    """Run in a process that is killed when a function of a module or class was called so often; what it had said."""

    def prepare() -> None:
        original, count = getattr(owner, name), 0

        def killing(*of_call: Any, **options: Any) -> Any:
            nonlocal count
            count += 1
            result = original(*of_call, **options)
            if count == calls:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        setattr(owner, name, killing)

    process = run_command(*arguments, prepare=prepare)
    assert process.returncode == -signal.SIGKILL, process.stderr
    return process.stderr


def test_a_killed_build_goes_on_to_the_same_bytes(
    neuralink: Neuralink, arguments: list[str], built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "fleet"
    # Ctrl-C just before the first order.
    with monkeypatch.context() as patch:
        patch.setattr("neuralink_cli.clustering.cluster.cluster", interrupt)
        outcome = neuralink(*arguments, "-o", output)
        assert outcome.code == 130
        assert outcome.stderr.endswith("interrupted; what was done is kept; run the same command again to continue\n")
        assert stages_run(outcome.stderr) == ["profile"]
    # At the boundary after the first layout: the entries of the order and of the layout have been written.
    kill_after(pipeline_build, "write_lock", 2, *arguments, "-o", output)
    made = [stage["output"] for stage in lock_of(output)["stages"] if stage["digest"]]
    assert made == ["trace.safetensors", "ufs4.0/placement.safetensors", "ufs4.0/layout"]
    # In the midst of the second layout.
    kill_after(Journal, "add", 2, *arguments, "-o", output)
    assert (output / "ufs3.1/.layout.partial").is_dir()
    assert not (output / "ufs3.1/layout").exists()
    # After an output has taken its place, and before the lock file says so.
    said = kill_after(pipeline_build, "digest_files", 1, *arguments, "-o", output)
    assert "neuralink: resuming from what an earlier run has written\n" in said
    assert (output / "ufs3.1/layout").is_dir()
    outcome = neuralink(*arguments, "-o", output)
    assert outcome.code == 0
    assert stages_run(outcome.stderr)[0] == "relayout ufs3.1"
    assert content(output) == content(built)


def interrupt(*_arguments: object, **_options: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("changed", "again"),
    [
        (("--dram", "20%"), [*(f"bench {name}" for name in DEVICES), "summary"]),
        # The order is the same for both sizes of bundles, or not: what must not run is the profile.
        (
            ("--resident", "gate"),
            [f"{stage} {name}" for name in DEVICES for stage in ("cluster", "relayout", "verify")],
        ),
    ],
)
def test_a_changed_option_runs_again_what_depends_on_it(
    neuralink: Neuralink, arguments: list[str], fleet: Path, changed: tuple[str, ...], again: list[str]
) -> None:
    trace = (fleet / "trace.safetensors").stat().st_mtime_ns
    planned = neuralink(*arguments, "-o", fleet, *changed, "--dry-run", "--json")
    sure = [each for each in json.loads(planned.stdout)["stages"] if each["runs"] and each["certain"]]
    assert {f"{each['stage']} {each['device']}" for each in sure} <= {*again, "summary None"}
    outcome = neuralink(*arguments, "-o", fleet, *changed)
    assert outcome.code == 0
    assert stages_run(outcome.stderr)[: len(again)] == again
    assert (fleet / "trace.safetensors").stat().st_mtime_ns == trace
    assert stages_run(neuralink(*arguments, "-o", fleet, *changed).stderr) == []


def test_other_data_runs_everything_again(
    neuralink: Neuralink, arguments: list[str], fleet: Path, text: Path, tmp_path: Path
) -> None:
    (tmp_path / text.name).write_text(TEXT + "One more line, and the mill goes round.\n")
    moved = [argument.replace(str(text), str(tmp_path / text.name)) for argument in arguments]
    planned = json.loads(neuralink(*moved, "-o", fleet, "--dry-run", "--json").stdout)["stages"]
    assert [each["certain"] for each in planned] == [True] + [False] * (STAGES - 1)
    assert all(each["runs"] for each in planned)
    assert "datasets[0].sha256" in planned[0]["why"]


def damage_weights(fleet: Path) -> None:
    path = fleet / "ufs3.1/layout/model.flash.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("harm", "again"),
    [
        (damage_weights, "relayout ufs3.1"),
        (lambda fleet: (fleet / "ufs3.1/layout/model.flash.json").unlink(), "relayout ufs3.1"),
        (lambda fleet: (fleet / "nvme/bench.json").unlink(), "bench nvme"),
        (lambda fleet: (fleet / "ufs4.0/placement.safetensors").write_bytes(b"cut"), "cluster ufs4.0"),
    ],
)
def test_what_is_damaged_or_missing_is_made_again(
    neuralink: Neuralink, arguments: list[str], fleet: Path, built: Path, harm: Any, again: str
) -> None:
    harm(fleet)
    outcome = neuralink(*arguments, "-o", fleet, "--locked")
    assert outcome.code == 0
    assert stages_run(outcome.stderr) == [again]
    assert content(fleet) == content(built)


def test_a_layout_that_does_not_verify_is_made_again(
    neuralink: Neuralink, arguments: list[str], fleet: Path, built: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (fleet / "nvme/verify.json").unlink()
    with monkeypatch.context() as patch:
        patch.setattr("neuralink_cli.rewriting.verify.verify", refuse)
        assert neuralink(*arguments, "-o", fleet).code == 1
    outcome = neuralink(*arguments, "-o", fleet)
    assert outcome.code == 0
    assert stages_run(outcome.stderr) == ["relayout nvme", "verify nvme"]
    assert content(fleet) == content(built)


def refuse(*_arguments: object, **_options: object) -> None:
    raise VerificationError("tensor 'x' differs", where="layout")


def test_a_lock_file_alone_is_enough_to_build_the_same(
    neuralink: Neuralink, arguments: list[str], built: Path, tmp_path: Path
) -> None:
    output = tmp_path / "fleet"
    output.mkdir()
    shutil.copy(built / "neuralink.lock.json", output)
    assert neuralink(*arguments, "-o", output, "--locked", "-q").code == 0
    assert content(output) == content(built)


def test_locked_refuses_other_options_before_anything_runs(
    neuralink: Neuralink, arguments: list[str], fleet: Path, built: Path, tmp_path: Path
) -> None:
    outcome = neuralink(*arguments, "-o", fleet, "--locked", "--pin-hot", "0.02")
    assert outcome.code == 5
    assert "cluster ufs4.0 is not made from what the lock file says: options.pin_hot: 0.0 -> 0.02" in outcome.error
    more = neuralink(*arguments, "--device", "oneplus-15r", "-o", fleet, "--locked")
    assert (more.code, "does not say what cluster oneplus-15r makes" in more.error) == (5, True)
    fewer = neuralink(*arguments[:-2], "-o", fleet, "--locked")
    assert (fewer.code, "lists nvme/placement.safetensors, which is not built any more" in fewer.error) == (5, True)
    assert content(fleet) == content(built)
    assert "nothing is locked" in neuralink(*arguments, "-o", tmp_path / "new", "--locked").error


def test_locked_refuses_what_comes_out_different(neuralink: Neuralink, arguments: list[str], fleet: Path) -> None:
    path = fleet / "neuralink.lock.json"
    document = lock_of(fleet)
    bench = next(stage for stage in document["stages"] if stage["output"] == "nvme/bench.json")
    bench["files"]["nvme/bench.json"]["sha256"] = "0" * 64
    bench["versions"]["numpy"] = "1.0"
    path.write_text(canonical(document))
    outcome = neuralink(*arguments, "-o", fleet, "--locked")
    assert outcome.code == 5
    said = outcome.stderr.splitlines()[-1]
    assert "bench nvme came out different from the lock file: nvme/bench.json; other versions: numpy: 1.0 -> " in said
    assert path.read_text() == canonical(document)


def test_a_lock_file_that_cannot_be_read_is_told_with_a_way_out(
    neuralink: Neuralink, arguments: list[str], outputs: Path
) -> None:
    path = outputs / "neuralink.lock.json"
    for text, complaint in (
        (
            '{"format": "neuralink-lock", "version": 2}',
            "has version 2, but this tool reads 1; use the neuralink that wrote it, or choose another output",
        ),
        ("[]", "not a JSON object; put the lock file back as it was, or choose another output"),
    ):
        path.write_text(text)
        outcome = neuralink(*arguments, "-o", outputs)
        assert (outcome.code, outcome.error) == (3, f"{path}: {complaint}")


def test_a_folder_that_is_no_build_is_left_alone(
    neuralink: Neuralink, arguments: list[str], outputs: Path, fleet: Path
) -> None:
    (outputs / "trace.safetensors").write_bytes(b"mine")
    outcome = neuralink(*arguments, "-o", outputs)
    assert outcome.code == 6
    assert (
        outcome.error
        == f"{outputs}: is not empty and not a build: it has no neuralink.lock.json; choose another output"
    )
    assert content(outputs) == {"trace.safetensors": b"mine"}


@pytest.mark.parametrize("name", ["oneplus-15r/bench.json", "nvme/layout/notes.txt", "oneplus-15r"])
def test_files_in_a_build_that_it_did_not_write_are_left_alone(
    neuralink: Neuralink, arguments: list[str], fleet: Path, name: str
) -> None:
    path = fleet / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"mine")
    before = content(fleet)
    outcome = neuralink(*arguments, "--device", "oneplus-15r", "--pin-hot", "0.02", "-o", fleet)
    assert outcome.code == 6
    assert outcome.error.startswith(f"{path}: is not ")
    assert content(fleet) == before


def test_two_builds_do_not_write_into_one_folder(neuralink: Neuralink, arguments: list[str], fleet: Path) -> None:
    with locked_directory(fleet):
        outcome = neuralink(*arguments, "-o", fleet, "--pin-hot", "0.02")
    assert (outcome.code, outcome.error) == (6, f"{fleet}: another run is writing this output; wait for it to end")


def test_a_build_in_the_folder_of_the_model_is_refused(
    neuralink: Neuralink, arguments: list[str], model: ModelFactory
) -> None:
    outcome = neuralink(*arguments, "-o", model("opt") / "fleet")
    assert (outcome.code, outcome.error.rpartition(": ")[2]) == (
        6,
        "is in the folder of the model; choose another output",
    )


def test_fail_below_asks_for_the_gain_of_every_layout_on_its_own_device(
    neuralink: Neuralink, arguments: list[str], fleet: Path
) -> None:
    assert neuralink(*arguments, "-o", fleet, "-q", "--fail-below", "0.1").code == 0
    outcome = neuralink(*arguments, "-o", fleet, "-q", "--fail-below", "100")
    assert outcome.code == 1
    assert outcome.stderr.startswith("neuralink: error: ufs4.0: gain ")
    assert "made for" in outcome.stdout


def test_a_dry_run_writes_nothing(neuralink: Neuralink, arguments: list[str], tmp_path: Path) -> None:
    outcome = neuralink(*arguments, "-o", tmp_path / "fleet", "--dry-run")
    assert outcome.code == 0
    assert f"{STAGES} of {STAGES} stages would run" in outcome.stdout
    assert list(tmp_path.iterdir()) == []


def write_file(folder: Path, model: Path, text: Path, more: str = "") -> Path:
    path = folder / "neuralink.toml"
    path.write_text(
        f'output = "fleet"\n[model]\npath = "{model}"\n[profile]\ndataset = ["{text.name}"]\nmax-seq-length = 16\n'
        f'[cluster]\neffort = "fast"\n[[device]]\ndevice = "ufs4.0"\n{more}'
    )
    shutil.copy(text, folder)
    return path


@reads_toml
def test_a_build_file_says_what_the_command_line_says(
    neuralink: Neuralink, fleet: Path, model: ModelFactory, text: Path, tmp_path: Path
) -> None:
    path = write_file(tmp_path, model("opt"), text, '[[device]]\ndevice = "ufs3.1"\n[[device]]\ndevice = "nvme"\n')
    outcome = neuralink("build", "-f", path)
    assert (outcome.code, stages_run(outcome.stderr)) == (0, [])
    assert neuralink("build", "-f", path, "--locked", "-q").code == 0


@reads_toml
def test_layouts_are_run_and_really_read_if_the_file_says_so(
    neuralink: Neuralink, fleet: Path, model: ModelFactory, text: Path, tmp_path: Path
) -> None:
    path = write_file(tmp_path, model("opt"), text, "[bench]\nreal = true\n[verify]\nforward = true\n")
    assert neuralink("build", "-f", path).error == "`forward` needs text to run on; add `text` to [verify]"
    path.write_text(path.read_text() + f'text = "{text.name}"\n')
    planned = json.loads(neuralink("build", "-f", path, "--dry-run", "--json").stdout)["stages"]
    running = {each["stage"]: each for each in planned if each["runs"]}
    # There are fewer layouts to compare than before.
    assert set(running) == {"forward", "bench", "real", "summary"}
    weights = (model("opt") / "model.safetensors").stat().st_size
    assert running["forward"]["memory_bytes"] > weights
    assert running["forward"]["disk_bytes"] == weights
    said = neuralink("build", "-f", path)
    assert (said.code, stages_run(said.stderr)[:3]) == (0, ["forward ufs4.0", "bench ufs4.0", "real ufs4.0"])
    assert "ufs4.0: really read from the storage of this machine, " in said.stdout
    assert "ufs4.0: outputs agree on " in said.stdout
    assert json.loads((fleet / "ufs4.0/forward.json").read_text())["same_argmax"] == 1
    assert json.loads((fleet / "ufs4.0/real.json").read_text())["real"] is True
    document = json.loads(neuralink("build", "-f", path, "--locked", "--json").stdout)
    assert [stage["why"] for stage in document["stages"]] == [None] * 8
    assert document["real"]["ufs4.0"]["io_mean"] > 0
    # What is measured anew is not what it was, which is no failure; what a model computes is the same.
    for name in ("real", "forward"):
        (fleet / f"ufs4.0/{name}.json").unlink()
    said = neuralink("build", "-f", path, "--locked")
    assert (said.code, stages_run(said.stderr)) == (0, ["forward ufs4.0", "real ufs4.0"])


@reads_toml
@pytest.mark.parametrize(
    ("more", "complaint"),
    [
        ('[[device]]\ndevise = "nvme"\n', "unknown key 'devise' in [device]; did you mean 'device'?"),
        ("[clutser]\n", "unknown key 'clutser'; did you mean 'cluster'?"),
        ("[relayout]\nall_files = true\n", "unknown key 'all_files' in [relayout]; did you mean 'all-files'?"),
        ("[bench]\neffort = 'max'\n", "unknown key 'effort' in [bench]; it belongs in [cluster]"),
        ("[bench]\nzzz = 1\n", "unknown key 'zzz' in [bench]; known are dram, real, fail-below"),
        ("[bench]\nfail-below = nan\n", "not valid TOML (nan is not a finite number)"),
        ("[bench]\nfail-below = '1'\n", "not a valid build file: at bench.fail-below: '1' is not of type 'number'"),
        ("[bench\n", "not valid TOML ("),
        ('[bench]\ndram = "x"\n', "'x' is not a valid size; write it like 20%"),
    ],
)
def test_a_build_file_is_checked_strictly(
    neuralink: Neuralink, model: ModelFactory, text: Path, tmp_path: Path, more: str, complaint: str
) -> None:
    path = write_file(tmp_path, model("opt"), text, more)
    outcome = neuralink("build", "-f", path)
    assert outcome.code == (2 if "size" in complaint else 3)
    assert outcome.error.startswith(f"{path}: {complaint}")
    assert not (tmp_path / "fleet").exists()


@reads_toml
def test_a_build_file_and_options_of_stages_exclude_each_other(
    neuralink: Neuralink, model: ModelFactory, text: Path, tmp_path: Path
) -> None:
    path = write_file(tmp_path, model("opt"), text)
    outcome = neuralink("build", model("opt"), "-f", path, "--device", "nvme", "--pin-hot", "0")
    assert outcome.code == 2
    assert outcome.error == f"-f takes the place of MODEL, --device, --pin-hot; set it in {path}, or do without -f"
    assert neuralink("build", "-f", path, "-o", tmp_path / "other").code == 2


def test_models_and_data_of_the_hub_are_held_to_their_commits(
    neuralink: Neuralink, hub_cache: Path, model: ModelFactory, tmp_path: Path
) -> None:
    write_cached(hub_cache, "model", "org/tiny", files_of(model("opt")), ref="v1")
    rows = "".join(json.dumps({"text": line}) + "\n" for line in TEXT.splitlines())
    write_cached(hub_cache, "dataset", "org/text", {"train.jsonl": rows.encode()}, commit="d" * 40)
    output = tmp_path / "fleet"
    arguments = ("build", "org/tiny", "--revision", "v1", "--dataset", "org/text", "--max-seq-length", "16")
    assert neuralink(*arguments, "--effort", "fast", "-o", output, "-q").code == 0
    made_from = lock_of(output)["stages"][0]["made_from"]
    assert made_from["datasets"] == [{"name": "org/text", "revision": "d" * 40}]
    assert made_from["model"]["origin"] == {"id": "org/tiny", "revision": COMMIT}
    index = json.loads((output / "ufs4.0/layout/model.flash.json").read_text())
    assert index["origin"] == made_from["model"]["origin"]
    assert neuralink(*arguments, "--effort", "fast", "-o", output, "--locked", "-q").code == 0


@pytest.mark.parametrize(
    ("changed", "complaint"),
    [
        (("build", "-o", "x", "--dataset", "d"), "MODEL is missing"),
        (("build", "m", "-o", "x"), "--dataset is missing"),
        (("build", "m", "--dataset", "d"), "no folder to build in"),
        (
            ("build", "m", "--dataset", "d", "-o", "x", "--device", "none"),
            "device 'none' is neither a file nor built in",
        ),
        (("build", "m", "--dataset", "d", "-o", "x", "--pin-hot", "0.2"), "--dram 0.05 of the bundles has no room"),
    ],
)
def test_options_that_make_no_sense_are_exit_code_2(
    neuralink: Neuralink, changed: tuple[str, ...], complaint: str
) -> None:
    outcome = neuralink(*changed)
    assert outcome.code == 2
    assert outcome.error.startswith(complaint)


@pytest.fixture
def example(tmp_path: Path) -> Path:
    """examples/neuralink.toml with a fraction of the data."""
    text = (ROOT / "examples/neuralink.toml").read_text()
    text = text.replace('"../example-fleet"', f'"{tmp_path}/fleet"').replace(
        '"tiny-relu"', f'"{ROOT}/examples/tiny-relu"'
    )
    text = text.replace('"text/calibration.txt"', f'"{ROOT}/examples/text/calibration.txt"')
    text = text.replace("num-samples = 0 ", "max-tokens = 1024 \nmax-seq-length = 64 ").replace("1.05", "1.01")
    text = text.replace('effort = "fast"', 'effort = "fast"\norder = "linked"')
    path = tmp_path / "neuralink.toml"
    path.write_text(text)
    return path


@reads_toml
def test_the_example_builds(neuralink: Neuralink, example: Path) -> None:
    outcome = neuralink("build", "-f", example, "-q")
    assert (outcome.code, outcome.stderr) == (0, "")
    assert "made for" in outcome.stdout
    assert [line.split()[0] for line in outcome.stdout.splitlines() if " gain " in line][1:] == [
        "ufs4.0:",
        "older-phones:",
        "nvme:",
    ]
    assert max(map(len, outcome.stdout.splitlines()[1:-1])) <= 100
