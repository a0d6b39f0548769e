"""`neuralink profile` from outside: what it says about bad data, and what is left when it is stopped."""

from __future__ import annotations

import contextlib
import json
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import Neuralink
from tests.processes import Command
from tests.tiny_models import TEXT, build_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model(tmp_path_factory.mktemp("opt") / "model", "opt")


def write(name: str, content: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        path = folder / name
        path.write_text(content)
        return path

    return make


# A dataset, the exit code, and words of the message.
DATASETS: dict[str, tuple[Callable[[Path], Path], int, str]] = {
    "missing": (lambda folder: folder / "absent.txt", 3, "absent.txt"),
    "empty text": (write("empty.txt", ""), 3, "empty.txt: "),
    "blank text": (write("blank.txt", "\n  \n\n"), 3, "blank.txt: "),
    "empty rows": (write("empty.jsonl", ""), 3, "empty.jsonl: "),
    "no text column": (write("other.jsonl", json.dumps({"body": "words"}) + "\n"), 3, "'text'"),
    "text is a number": (write("number.jsonl", json.dumps({"text": 7}) + "\n"), 3, "number.jsonl: "),
    "rows are no JSON": (write("broken.jsonl", "{'text': 'x'}\n"), 3, "broken.jsonl: "),
    "unknown kind": (write("data.xyz", "words"), 4, "data.xyz: is not one of the calibration data types .txt, "),
}


@pytest.mark.parametrize("name", DATASETS)
def test_bad_datasets(neuralink: Neuralink, tmp_path: Path, outputs: Path, model: Path, name: str) -> None:
    make, code, complaint = DATASETS[name]
    outcome = neuralink("profile", model, "--dataset", make(tmp_path), "-o", outputs / "trace", "-q")
    assert (outcome.code, complaint in outcome.error) == (code, True), outcome
    assert not any(outputs.iterdir())


def test_a_trace_can_be_had_as_a_table_or_as_json(neuralink: Neuralink, tmp_path: Path, model: Path) -> None:
    text = write("text.txt", TEXT)(tmp_path)
    shown = neuralink("profile", model, "--dataset", text, "-o", tmp_path / "a", "-q")
    assert (shown.code, shown.stderr) == (0, "")
    assert [line.split()[0] for line in shown.stdout.splitlines()[:3]] == ["block", "layers.0", "layers.1"]
    assert shown.stdout.splitlines()[-1].startswith(f"{tmp_path / 'a'}: ")
    parsed = json.loads(neuralink("profile", model, "--dataset", text, "-o", tmp_path / "b", "-q", "--json").stdout)
    assert parsed["output"] == str(tmp_path / "b")
    assert [block["id"] for block in parsed["blocks"]] == ["layers.0", "layers.1"]
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_dataset_whose_name_is_no_text(neuralink: Neuralink, tmp_path: Path, model: Path) -> None:
    """Bytes that are not UTF-8 in a file name come through every stage, cards and tables included."""
    text = write("caf\udce9.txt", TEXT)(tmp_path)
    trace, placement, layout = tmp_path / "trace", tmp_path / "placement", tmp_path / "layout"
    for command in (
        ("profile", model, "--dataset", text, "-o", trace),
        ("cluster", trace, "-o", placement),
        ("relayout", model, "--placement", placement, "-o", layout),
        ("verify", model, layout),
    ):
        outcome = neuralink(*command, "-q", "--json")
        assert (outcome.code, outcome.stderr) == (0, "")
    assert "caf\ufffd.txt (" in (layout / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_run_that_is_stopped_leaves_nothing(
    tmp_path: Path, outputs: Path, model: Path, number: signal.Signals, code: int
) -> None:
    text = write("long.txt", TEXT * 500)(tmp_path)
    process = Command(
        "profile", model, "--dataset", text, "--num-samples", 0, "--max-tokens", 0, "-o", outputs / "trace"
    )
    try:
        # Until there is something to clear up: the spool, a file without a name in the folder of the output.
        while not any(target.startswith(str(outputs)) for target in open_files(process)):
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
        process.send_signal(number)
        stdout, stderr = process.communicate()
    finally:
        process.kill()
        process.wait()
    assert (process.returncode, stdout) == (code, "")
    assert stderr.splitlines()[-1].endswith("nothing unfinished was left behind")
    assert "Traceback" not in stderr
    assert not any(outputs.iterdir())


def open_files(process: Command) -> list[str]:
    found = []
    for link in Path(f"/proc/{process.pid}/fd").glob("*"):
        # It may be closed meanwhile.
        with contextlib.suppress(OSError):
            found.append(str(link.readlink()))
    return found
