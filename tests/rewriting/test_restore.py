from __future__ import annotations

import json
import shutil
import struct
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from neuralink_cli.architectures.choice import BUILT_IN
from neuralink_cli.architectures.coverage import Coverage
from neuralink_cli.errors import InputError, OutputError, VerificationError
from neuralink_cli.evaluation.forward_check import ForwardOptions, prepare_forward
from neuralink_cli.layout.open_layout import open_layout
from neuralink_cli.rewriting import unbundling
from neuralink_cli.rewriting.restore import (
    RestoreSummary,
    loadable,
    loadable_bytes,
    restore,
    restore_bytes,
    restore_layout,
)
from tests.checkpoints import (
    ELEMENT_BYTES,
    FAMILIES,
    HIDDEN,
    LAYERS,
    NEURONS,
    files_of,
    tensors_of,
    write_checkpoint,
    write_random_placement,
)
from tests.damage import FLASH, KINDS, PLACEMENT, edit, flip, start_of
from tests.faults import faults
from tests.layouts import LayoutFactory, Made, relayout

Usage = namedtuple("Usage", "total used free")


def restored(layout: Path, output: Path, **options: Any) -> RestoreSummary:
    with open_layout(layout) as opened:
        return restore_layout(opened, output, **options)


CASES: list[tuple[str, dict[str, Any]]] = [
    *((family, {"shards": shards}) for family in FAMILIES for shards in (1, 3)),
    *(("llama", {"dtype": dtype, "shards": 2}) for dtype in ("F16", "BF16", "F8_E4M3", "F64")),
    ("opt", {"readme": None}),
    ("opt", {"readme": b""}),
    ("opt", {"readme": b"no newline at the end, \xff\xfe not UTF-8\r\n\0"}),
    ("opt", {"bias": False}),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("family", "options"), CASES)
def test_every_file_is_as_it_was(
    tmp_path: Path, layouts: LayoutFactory, kind: str, family: str, options: dict[str, Any]
) -> None:
    made = layouts.of_kind(kind, family, **options)
    summary = restored(made.layout, tmp_path / "model")
    expected = files_of(made.model)
    assert files_of(tmp_path / "model") == expected
    weights = [name for name in expected if name.endswith(".safetensors")]
    size = sum(len(expected[name]) for name in weights)
    tensors = len(tensors_of(family, bias=options.get("bias")))
    assert (summary.files, summary.tensors, summary.bytes) == (tuple(weights), tensors, size)
    # Every FFN is in a block.
    matrices = LAYERS * (3 if family == "llama" else 2)
    covered = matrices * NEURONS * HIDDEN * ELEMENT_BYTES[options.get("dtype", "F32")]
    assert summary.coverage == Coverage(covered, covered, ())


@pytest.mark.parametrize(("resident", "alignment"), [("gate", 4096), ("none", 1), ("gate", 65_536)])
def test_every_bundled_layout_gives_the_same(
    tmp_path: Path, layouts: LayoutFactory, resident: str, alignment: int
) -> None:
    for family in FAMILIES:
        made = layouts.bundled(family, resident=resident, alignment=alignment)
        restored(made.layout, tmp_path / family)
        assert files_of(tmp_path / family) == files_of(made.model)


@pytest.mark.parametrize("kind", KINDS)
def test_an_unusual_header_comes_back_as_it_was(tmp_path: Path, kind: str) -> None:
    """Padded, its tensors in neither data nor name order, with metadata, escapes and white space."""
    model = write_checkpoint(tmp_path / "model")
    path = model / "model.safetensors"
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    header["__metadata__"] = {"z": "\u00e4", "a": ""}
    shuffled = [list(header.items())[k] for k in np.random.default_rng(0).permutation(len(header))]
    text = (
        json.dumps(dict(shuffled), indent=1).replace("model.norm", "\\u006dodel.norm").encode() + b"\n \t" + b" " * 99
    )
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])
    placement = write_random_placement(model, tmp_path / "placement")
    relayout(model, placement, tmp_path / "layout", layout=kind)
    restored(tmp_path / "layout", tmp_path / "restored")
    assert files_of(tmp_path / "restored") == files_of(model)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_of_other_programs_and_hidden_files_stay_behind(tmp_path: Path, kind: str) -> None:
    model = write_checkpoint(tmp_path / "model")
    kept = files_of(model)
    placement = write_random_placement(model, tmp_path / "placement")
    for name in ("pytorch_model.bin", "model.gguf", "tf_model.h5", ".gitattributes", "pytorch_model.bin.index.json"):
        (model / name).write_bytes(b"x")
    (model / "onnx").mkdir()
    (model / "onnx" / "config.json").write_bytes(b"{}")
    (model / "merges.txt").write_bytes(b"a b\r\n")
    relayout(model, placement, tmp_path / "layout", layout=kind)
    restored(tmp_path / "layout", tmp_path / "restored")
    assert files_of(tmp_path / "restored") == {**kept, "merges.txt": b"a b\r\n"}


def test_an_existing_output_is_kept(tmp_path: Path, layouts: LayoutFactory) -> None:
    made = layouts.bundled()
    output = tmp_path / "model"
    output.mkdir()
    (output / "precious").write_bytes(b"x")
    with pytest.raises(OutputError, match="already exists"):
        restored(made.layout, output)
    with pytest.raises(OutputError, match="so it is not deleted"):
        restored(made.layout, output, overwrite=True)
    assert files_of(tmp_path) == {"model/precious": b"x"}


@pytest.mark.parametrize("kind", KINDS)
def test_overwrites_only_the_same_model(tmp_path: Path, layouts: LayoutFactory, kind: str) -> None:
    made = layouts.of_kind(kind)
    output = tmp_path / "model"
    write_checkpoint(output, seed=9)
    before = files_of(output)
    with pytest.raises(OutputError, match="so it is not deleted"):
        restored(made.layout, output, overwrite=True)
    assert files_of(output) == before
    shutil.rmtree(output)
    write_checkpoint(output, shards=4)
    restored(made.layout, output, overwrite=True)
    assert files_of(output) == files_of(made.model)


@pytest.mark.parametrize("kind", KINDS)
def test_a_layout_is_not_restored_over_itself(
    layouts: LayoutFactory, copy_of: Callable[[Made], Path], kind: str
) -> None:
    copy = copy_of(layouts.of_kind(kind))
    before = files_of(copy)
    with pytest.raises(OutputError, match="so it is not deleted"):
        restored(copy, copy, overwrite=True)
    assert files_of(copy) == before


@pytest.mark.parametrize("kind", KINDS)
def test_space_is_checked_before(
    tmp_path: Path, layouts: LayoutFactory, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    made = layouts.of_kind(kind)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**9, 0, 10_000))
    with pytest.raises(OutputError, match="bytes of disk, 10,000 are free"):
        restored(made.layout, tmp_path / "model")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("kind", KINDS)
def test_progress_adds_up(tmp_path: Path, layouts: LayoutFactory, kind: str) -> None:
    seen: list[int] = []
    with open_layout(layouts.of_kind(kind).layout) as layout:
        restore_layout(layout, tmp_path / "model", progress=seen.append)
        assert sum(seen) == restore_bytes(layout)


def swap_slots(path: Path, tensor: str) -> None:
    content = bytearray(path.read_bytes())
    at = start_of(path, tensor)
    content[at : at + 4], content[at + 4 : at + 8] = content[at + 4 : at + 8], content[at : at + 4]
    path.write_bytes(content)


DAMAGES: list[tuple[str, Callable[[Path], object]]] = [
    ("bundled", lambda d: flip(d / FLASH, start_of(d / FLASH, "layers.0.bundles") + 1000)),
    ("bundled", lambda d: flip(d / FLASH, start_of(d / FLASH, "model.embed_tokens.weight") + 30_000)),
    ("bundled", lambda d: swap_slots(d / FLASH, "layers.1.order")),
    ("permuted", lambda d: flip(d / "model.safetensors", start_of(d / "model.safetensors", "mask"))),
    ("permuted", lambda d: swap_slots(d / PLACEMENT, "layers.1.order")),
    ("permuted", lambda d: edit(d, "permuted", lambda index: index["blocks"].pop())),
]


@pytest.mark.parametrize(("kind", "damage"), DAMAGES)
def test_a_damaged_layout_gives_no_checkpoint(
    tmp_path: Path,
    layouts: LayoutFactory,
    copy_of: Callable[[Made], Path],
    kind: str,
    damage: Callable[[Path], object],
) -> None:
    copy = copy_of(layouts.of_kind(kind))
    damage(copy)
    with pytest.raises((InputError, VerificationError)):
        restored(copy, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_kept_file_that_is_missing_is_named(
    tmp_path: Path, layouts: LayoutFactory, copy_of: Callable[[Made], Path]
) -> None:
    copy = copy_of(layouts.permuted())
    (copy / "neuralink/original/README.md").unlink()
    with pytest.raises(InputError, match=r"neuralink/original/README.md: is missing"):
        restored(copy, tmp_path / "model")


@pytest.mark.parametrize("kind", KINDS)
def test_every_failure_leaves_nothing_or_everything(tmp_path: Path, layouts: LayoutFactory, kind: str) -> None:
    made = layouts.of_kind(kind, shards=2)
    output = tmp_path / "model"
    expected = files_of(made.model)
    operations = 0
    for _ in faults(lambda: restored(made.layout, output)):
        operations += 1
        assert [path.name for path in tmp_path.iterdir()] in ([], ["model"])
        assert not output.exists() or files_of(output) == expected
        shutil.rmtree(output, ignore_errors=True)
    assert operations > 15
    assert files_of(output) == expected


def test_loadable_is_the_checkpoint_for_a_while(tmp_path: Path, layouts: LayoutFactory) -> None:
    made = layouts.bundled()
    layout = tmp_path / "layout"
    shutil.copytree(made.layout, layout)
    with loadable(layout) as directory:
        assert files_of(directory) == files_of(made.model)
    assert [path.name for path in tmp_path.iterdir()] == ["layout"]
    with pytest.raises(RuntimeError), loadable(layout):
        raise RuntimeError
    assert [path.name for path in tmp_path.iterdir()] == ["layout"]
    permuted = layouts.permuted().layout
    with loadable(permuted) as directory:
        assert directory == permuted


def test_what_is_restored_is_looked_at_once_more(
    tmp_path: Path, layouts: LayoutFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Should the code that makes the tensors ever be wrong, no wrong checkpoint appears."""
    made = layouts.bundled()

    monkeypatch.setattr(unbundling, "scatter_part", lambda *_: None)
    with pytest.raises(VerificationError, match="restores to a checkpoint with fingerprint"):
        restored(made.layout, tmp_path / "model")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("kind", KINDS)
def test_a_disk_a_byte_too_small_for_all_files_is_told_before_any_is_written(
    tmp_path: Path, layouts: LayoutFactory, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    made = layouts.of_kind(kind, "llama", shards=2)
    pages = sum(-(-path.stat().st_size // 4096) * 4096 for path in made.model.rglob("*") if path.is_file())
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=pages - 1))
    with pytest.raises(OutputError, match=f"needs {pages:,} bytes of disk, {pages - 1:,} are free"):
        restore(made.layout, tmp_path / "out")
    assert not any(tmp_path.iterdir())
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=pages))
    restore(made.layout, tmp_path / "out")


def test_a_layout_as_a_checkpoint_takes_what_is_announced(tmp_path: Path, layouts: LayoutFactory) -> None:
    made = layouts.bundled("llama", shards=2)
    with open_layout(made.layout) as opened:
        needed = loadable_bytes(opened)
    with loadable(made.layout) as directory:
        assert needed == sum(-(-path.stat().st_size // 4096) * 4096 for path in directory.rglob("*") if path.is_file())
    with open_layout(layouts.permuted("llama", shards=2).layout) as opened:
        assert loadable_bytes(opened) == 0


def test_comparing_outputs_needs_room_for_the_checkpoint(
    layouts: LayoutFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = layouts.bundled("llama", shards=2)
    with open_layout(made.layout) as opened:
        needed = loadable_bytes(opened)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=needed - 1))
    with pytest.raises(OutputError, match=f"needs {needed:,} bytes of disk"):
        prepare_forward(made.model, made.layout, ForwardOptions(text=None), BUILT_IN)
