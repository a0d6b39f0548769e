"""`neuralink inspect` from the command line."""

from __future__ import annotations

import hashlib
import json
import shlex
import shutil
from pathlib import Path

import click
import pytest

from neuralink_cli.cli.commands import cli
from neuralink_cli.files.json_text import canonical, parse_object
from tests.checkpoints import write_checkpoint, write_random_trace
from tests.cli.conftest import Neuralink
from tests.layouts import LayoutFactory, relayout

ROOT = Path(__file__).parents[2]


def parses(command: str) -> None:
    """The command line names a subcommand and options that exist."""
    program, name, *arguments = shlex.split(command.replace("\\\n", " "))
    assert program == "neuralink"
    # As on the command line: a command remembers the spellings of --help from the first context that it is in.
    parent = click.Context(cli, **cli.context_settings)
    subcommand = cli.get_command(parent, name)
    assert subcommand is not None
    subcommand.make_context(name, arguments, parent=parent)


def pasted(stdout: str) -> list[str]:
    """The commands at the end of the output."""
    lines = stdout.split("\nnext\n")[1].replace(" \\\n", " ").splitlines()
    return [line.strip() for line in lines if not line.strip().startswith("#")]


@pytest.fixture(scope="module")
def artefacts(layouts: LayoutFactory, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One of every kind."""
    folder = tmp_path_factory.mktemp("artefacts")
    bundled, permuted = layouts.bundled(resident="gate"), layouts.permuted()
    device = folder / "phone.json"
    profile = {"format": "neuralink-device", "version": 1, "name": "phone", "queue_depth": 8}
    device.write_text(json.dumps({**profile, "operation_seconds": 1e-5, "bytes_per_second": 1e9, "hot_rate": 0.5}))
    fio = folder / "fio.json"
    jobs = [
        {"jobname": f"r{size}", "groupid": k, "job options": {"rw": "randread", "direct": "1", "iodepth": "8"},
         "read": {"total_ios": 100, "io_bytes": 100 * size, "bw_bytes": 10**8 * (k + 1)}}
        for k, size in enumerate((4096, 65536))
    ]  # fmt: skip
    fio.write_text("fio: a note\n" + json.dumps({"fio version": "fio-3.36", "jobs": jobs}))
    return {
        "checkpoint": bundled.model,
        "trace": write_random_trace(bundled.model, folder / "a model.trace.safetensors"),
        "placement": bundled.placement,
        "bundled layout": bundled.layout,
        "permuted layout": permuted.layout,
        "device profile": device,
        "fio output": fio,
        "architecture": ROOT / "neuralink_cli/architectures/descriptions/opt.json",
    }


KINDS = (
    "checkpoint", "trace", "placement", "bundled layout", "permuted layout", "device profile", "fio output",
    "architecture",
)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_told_on_80_columns_with_commands_to_paste(
    neuralink: Neuralink, artefacts: dict[str, Path], kind: str
) -> None:
    outcome = neuralink("inspect", artefacts[kind], "-q")
    assert (outcome.code, outcome.stderr) == (0, "")
    assert outcome.stdout.split(maxsplit=1)[1].startswith(kind)
    # What cannot be cut, such as a path, is not.
    wide = [line.strip(" \\") for line in outcome.stdout.splitlines() if len(line) > 80]
    assert [line for line in wide if max(map(len, shlex.split(line))) < 50] == []
    commands = pasted(outcome.stdout)
    document = json.loads(neuralink("inspect", artefacts[kind], "--json", "-q").stdout)
    assert document["kind"] == kind
    assert document["path"] == str(artefacts[kind])
    assert document["checked"] is None
    assert [shlex.split(step["command"]) for step in document["next"]] == [shlex.split(each) for each in commands]
    for command in commands:
        parses(command)


@pytest.mark.parametrize("kind", KINDS)
def test_check_compares_digests(neuralink: Neuralink, artefacts: dict[str, Path], kind: str) -> None:
    outcome = neuralink("inspect", artefacts[kind], "--check", "--json", "-q")
    assert outcome.code == 0
    assert json.loads(outcome.stdout)["checked"]


def test_a_checkpoint_names_its_fingerprint_when_checked(neuralink: Neuralink, artefacts: dict[str, Path]) -> None:
    checked = json.loads(neuralink("inspect", artefacts["checkpoint"], "--check", "--json").stdout)["checked"]
    trace = json.loads(neuralink("inspect", artefacts["trace"], "--json").stdout)
    assert trace["model"]["fingerprint"] in checked[0]


def test_only_check_sees_a_flipped_bit_in_the_data(
    neuralink: Neuralink, artefacts: dict[str, Path], tmp_path: Path
) -> None:
    for kind, code, place in (("trace", 3, "content"), ("placement", 3, "content"), ("bundled layout", 1, "SHA-256")):
        copy = tmp_path / artefacts[kind].name
        if artefacts[kind].is_dir():
            shutil.copytree(artefacts[kind], copy)
        else:
            shutil.copy(artefacts[kind], copy)
        weights = copy / "model.flash.safetensors" if copy.is_dir() else copy
        data = bytearray(weights.read_bytes())
        data[-1] ^= 1
        weights.write_bytes(data)
        assert neuralink("inspect", copy, "-q").code == 0, kind
        failed = neuralink("inspect", copy, "--check", "-q")
        assert failed.code == code, kind
        assert place in failed.error or "permutation" in failed.error


def test_check_sees_a_changed_file_beside_the_weights(
    neuralink: Neuralink, artefacts: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(artefacts["bundled layout"], tmp_path / "flash")
    config = tmp_path / "flash/config.json"
    config.write_text(config.read_text().replace(" ", "  ", 1))
    failed = neuralink("inspect", tmp_path / "flash", "--check", "-q")
    assert failed.code == 1
    assert "config.json: was changed" in failed.error


def test_says_how_fast_storage_must_be(neuralink: Neuralink, artefacts: dict[str, Path], tmp_path: Path) -> None:
    model, trace, placement = artefacts["checkpoint"], artefacts["trace"], tmp_path / "placement"
    assert neuralink("cluster", trace, "-o", placement, "--resident", "gate", "--order", "linked", "-q").code == 0
    flash, other = tmp_path / "flash", tmp_path / "other"
    relayout(model, placement, flash, resident="gate")
    relayout(model, placement, other)
    found = [
        json.loads(neuralink("inspect", path, "--tokens-per-second", 100, "--json").stdout)["reading"]
        for path in (placement, flash)
    ]
    assert found[0] == found[1]
    assert sorted(found[0]) == [
        "device", "io_seconds", "most_tokens_per_second", "speed_needed", "tokens_per_second",
    ]  # fmt: skip
    assert found[0]["speed_needed"] == 100 * found[0]["io_seconds"]
    # As the bench replays it, but for pages: reads there begin where the stored neurons are.
    arguments = ("bench", placement, "--trace", trace, "--cache", "none", "--json", "-q")
    row = json.loads(neuralink(*arguments).stdout)["rows"][-1]
    assert found[0]["io_seconds"] == pytest.approx(row["figures"]["io_mean"], rel=0.1)
    words = " ".join(neuralink("inspect", flash, "--tokens-per-second", 100).stdout.split())
    assert "ms a token on ufs4.0, without a cache: at most" in words
    assert "times as fast as ufs4.0 for 100 tokens/s without a cache" in words
    # Of the bundles of this layout nothing was measured.
    assert json.loads(neuralink("inspect", other, "--json").stdout)["reading"] is None
    assert "bundles of another size" in " ".join(neuralink("inspect", other).stdout.split())
    refused = neuralink("inspect", trace, "--tokens-per-second", 100, "-q")
    assert refused.code == 2
    assert "--tokens-per-second is for placements and layouts" in refused.error


def test_what_is_none_of_these_is_named(neuralink: Neuralink, artefacts: dict[str, Path], tmp_path: Path) -> None:
    def fails(path: Path, message: str) -> None:
        outcome = neuralink("inspect", path, "-q")
        assert outcome.code == 3
        assert message in outcome.error

    fails(tmp_path / "absent", "absent: ")
    fails(tmp_path, "is an empty directory")
    (tmp_path / "notes.txt").write_text("hello")
    fails(tmp_path, "is a directory with notes.txt: neither a checkpoint")
    fails(tmp_path / "notes.txt", "is a file of 5 bytes, neither safetensors nor JSON")
    (tmp_path / "empty").touch()
    fails(tmp_path / "empty", "is empty")
    (tmp_path / "odd.json").write_text('{"spam": 1, "eggs": 2}')
    fails(tmp_path / "odd.json", "is JSON with 'spam', 'eggs'")
    fails(artefacts["bundled layout"] / "model.flash.json", "is the index of a layout; pass the directory")
    fails(artefacts["checkpoint"] / "config.json", "is the config of a checkpoint; pass the directory")
    fails(artefacts["checkpoint"] / "model.safetensors", "tensors that neuralink did not write")
    (tmp_path / "cut.safetensors").write_bytes(b"\x00" * 5)
    fails(tmp_path / "cut.safetensors", "too short for a safetensors file")
    (tmp_path / "huge.json").write_text("{" + " " * (1 << 24) + "}")
    fails(tmp_path / "huge.json", "too large")


def test_a_checkpoint_that_no_stage_takes_says_why(neuralink: Neuralink, tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "model", "opt")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "model_type": "perceptron"}))
    outcome = neuralink("inspect", model, "-q")
    assert outcome.code == 0
    assert "stages      none: architecture 'perceptron' is not known" in outcome.stdout
    assert [shlex.split(command)[1:] for command in pasted(outcome.stdout)] == [
        ["architectures", "--infer", str(model)]
    ]


def test_the_index_of_a_layout_is_checked_before_it_is_shown(
    neuralink: Neuralink, artefacts: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(artefacts["permuted layout"], tmp_path / "permuted")
    index = tmp_path / "permuted/model.permuted.json"
    document = parse_object(index.read_text(), index)
    del document["document_sha256"]
    document["gain"]["stored"] = [{"source": None, "order": "stored", "gain": "much", "gain_over_naive": {}}]
    digest = hashlib.sha256(canonical(document).encode()).hexdigest()
    index.write_text(json.dumps({**document, "document_sha256": digest}))
    outcome = neuralink("inspect", tmp_path / "permuted", "-q")
    assert outcome.code == 3
    assert "gain" in outcome.error
