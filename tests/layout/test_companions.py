"""The files beside the weights: copied, checked against the checkpoint, and only they come back."""

from __future__ import annotations

import hashlib
import json
import shutil
import stat
import tracemalloc
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from neuralink_cli.checkpoint.checkpoint import Checkpoint
from neuralink_cli.checkpoint.companions import COPIES, HIDDEN, LeftOut
from neuralink_cli.errors import InputError, OutputError, VerificationError
from neuralink_cli.files.durable import copy_file
from neuralink_cli.layout import companions
from neuralink_cli.layout.companions import remark_on_left_out
from neuralink_cli.layout.open_layout import open_layout
from neuralink_cli.rewriting import companion_comparison
from neuralink_cli.rewriting.restore import restore_layout
from neuralink_cli.rewriting.verify import layout_bytes, verify_full
from tests.checkpoints import files_of, write_checkpoint, write_random_placement
from tests.damage import FLASH, KINDS, edit, flip
from tests.faults import flushed
from tests.hub import write_cached
from tests.layouts import LayoutFactory, Made, relayout, verify

Usage = namedtuple("Usage", "total used free")


@pytest.mark.parametrize("kind", KINDS)
def test_a_changed_or_missing_file_is_found_at_once(
    layouts: LayoutFactory, copy_of: Callable[[Made], Path], tmp_path: Path, kind: str
) -> None:
    made = getattr(layouts, kind)("opt")
    copy = copy_of(made)
    with open_layout(copy) as layout:
        names = [file["name"] for file in layout.companions]
    assert "config.json" in names
    for name in names:
        if name == "config.json" and kind == "permuted":
            continue  # Another config may not even open as a checkpoint: that is found earlier.
        content = (copy / name).read_bytes()
        (copy / name).write_bytes(bytes([content[0] ^ 1]) + content[1:])
        with pytest.raises(VerificationError, match=f"{name}: was changed"):
            verify(made.model, copy, quick=True)
        with open_layout(copy) as layout, pytest.raises(VerificationError, match="was changed"):
            restore_layout(layout, tmp_path / "restored")
        (copy / name).unlink()
        with pytest.raises((VerificationError, InputError), match=f"{name}: is missing"):
            verify(made.model, copy, quick=True)
        (copy / name).write_bytes(content)
    assert verify(made.model, copy, quick=True).mode == "quick"
    assert not (tmp_path / "restored").exists()


def test_files_that_came_later_are_not_restored(
    layouts: LayoutFactory, copy_of: Callable[[Made], Path], tmp_path: Path
) -> None:
    copy = copy_of(layouts.bundled("opt"))
    (copy / "notes.txt").write_text("mine")
    with open_layout(copy) as layout:
        restore_layout(layout, tmp_path / "restored")
    assert not (tmp_path / "restored" / "notes.txt").exists()


# What a folder may hold beside the weights; the content is the name.
ALONG = (
    "additional_chat_templates/tool_use.jinja",
    "1_Pooling/config.json",
    "2_Dense/model.safetensors",
    "2_Dense/deeper/config.json",
    "3_Dense/pytorch_model.bin",
    "colbert_linear.pt",
    "value_head.safetensors",
    "imgs/logo.png",
    "original/params.json",
    "original/README.md",
    "with space/\u00e4\u4e16\u754c.txt",
    "a\nb/c\td.txt",
)
LEFT_OUT = ("pytorch_model.bin", "onnx/model.onnx", "onnx/config.json", "x.gguf", "original/consolidated.00.pth",
            ".gitattributes", "...", ".git/HEAD", "optimizer.pt")  # fmt: skip


@pytest.fixture
def full(tmp_path: Path) -> Path:
    """A checkpoint with every kind of file beside the weights."""
    return write_beside(write_checkpoint(tmp_path / "model", "bert", shards=2), *ALONG, *LEFT_OUT)


def write_beside(model: Path, *names: str) -> Path:
    for name in names:
        (model / name).parent.mkdir(exist_ok=True, parents=True)
        (model / name).write_bytes(name.encode())
    return model


def laid_out(model: Path, output: Path, **options: Any) -> Path:
    """A layout of a checkpoint, of a random order."""
    relayout(model, write_random_placement(model, output.with_suffix(".placement")), output, **options)
    return output


def restored(layout: Path) -> Path:
    output = layout.with_suffix(".restored")
    with open_layout(layout) as opened:
        restore_layout(opened, output)
    return output


@pytest.mark.parametrize("kind", KINDS)
def test_all_but_what_is_left_out_goes_along_and_comes_back(tmp_path: Path, full: Path, kind: str) -> None:
    layout = laid_out(full, tmp_path / "layout", layout=kind)
    for name in ALONG:
        assert (layout / name).read_bytes() == name.encode()
    assert not any((layout / name).exists() for name in LEFT_OUT)
    assert verify(full, layout).mode == "full"
    assert files_of(restored(layout)) == {n: content for n, content in files_of(full).items() if n not in LEFT_OUT}


@pytest.mark.parametrize("kind", KINDS)
def test_everything_goes_along_if_asked(tmp_path: Path, full: Path, kind: str) -> None:
    layout = laid_out(full, tmp_path / "layout", layout=kind, all_files=True)
    assert verify(full, layout).mode == "full"
    assert files_of(restored(layout)) == files_of(full)
    # A copy of the weights, which nobody fetches to compare it.
    (full / "onnx/model.onnx").unlink()
    assert verify(full, layout).mode == "full"
    (full / "pytorch_model.bin").write_bytes(b"other content")
    with pytest.raises(VerificationError, match=r"pytorch_model\.bin differs from that in"):
        verify(full, layout)


@pytest.mark.parametrize("kind", KINDS)
def test_folders_are_on_the_device_too(tmp_path: Path, full: Path, kind: str) -> None:
    with flushed() as forgotten:
        layout = laid_out(full, tmp_path / "layout", layout=kind, all_files=True)
        assert forgotten(layout) == []
        assert forgotten(restored(layout)) == []


@pytest.mark.parametrize("kind", KINDS)
def test_links_become_files(tmp_path: Path, kind: str) -> None:
    """A hub cache has every file as a link."""
    model = write_beside(write_checkpoint(tmp_path / "original"), *ALONG)
    snapshot = write_cached(tmp_path / "cache", "model", "org/name", files_of(model))
    layout = laid_out(snapshot, tmp_path / "layout", layout=kind)
    assert not any(path.is_symlink() for path in layout.rglob("*"))
    assert files_of(restored(layout)) == files_of(model)
    assert verify(model, layout).mode == "full"


@pytest.mark.parametrize("kind", KINDS)
def test_permissions_are_kept(tmp_path: Path, kind: str) -> None:
    model = write_beside(write_checkpoint(tmp_path / "model"), "convert.sh", "tools/run", "sealed.txt")
    modes = {"convert.sh": 0o755, "tools/run": 0o700, "sealed.txt": 0o444, "config.json": 0o640}
    for name, mode in modes.items():
        (model / name).chmod(mode)
    (model / "convert.sh").chmod(0o4755)  # Whose rights a program runs with is for its owner to say.
    layout = laid_out(model, tmp_path / "layout", layout=kind)
    for folder in (layout, restored(layout)):
        assert {name: stat.S_IMODE((folder / name).stat().st_mode) for name in modes} == modes
    # They are no part of what is compared: neither git nor the hub keeps all of them.
    (model / "tools/run").chmod(0o600)
    assert verify(model, layout).mode == "full"


OWN = ("neuralink/placement.safetensors", "neuralink/original/README.md", "Neuralink/x", "model.permuted.json",
       "model.flash.safetensors/x", "readme.md", ".neuralink-journal")  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_files_with_names_that_a_layout_uses_itself_come_back(tmp_path: Path, kind: str) -> None:
    model = write_beside(write_checkpoint(tmp_path / "model"), *OWN)
    layout = laid_out(model, tmp_path / "layout", layout=kind, all_files=True)
    for name in OWN:
        assert (layout / "neuralink/original" / name).read_bytes() == name.encode()
    assert verify(model, layout).mode == "full"
    assert files_of(restored(layout)) == files_of(model)


@pytest.mark.parametrize("kind", KINDS)
def test_a_layout_of_a_permuted_layout_gives_that_back(
    tmp_path: Path, layouts: LayoutFactory, copy_of: Callable[[Made], Path], kind: str
) -> None:
    first = copy_of(layouts.permuted("llama", shards=2))
    second = laid_out(first, tmp_path / "layout", layout=kind)
    assert verify(first, second).mode == "full"
    back = restored(second)
    assert files_of(back) == files_of(first)
    assert verify(layouts.checkpoint("llama", shards=2)[0], back).mode == "full"


@pytest.mark.parametrize("name", ["back\\slash.txt", "no utf-8 \udcff.txt", "folder \udcfe/x"])
def test_a_name_that_no_index_can_hold_is_refused_before_anything_is_written(tmp_path: Path, name: str) -> None:
    model = write_checkpoint(tmp_path / "model")
    (model / name).parent.mkdir(exist_ok=True)
    (model / name).write_bytes(b"x")
    with pytest.raises(InputError, match="has a name that a layout cannot keep"):
        laid_out(model, tmp_path / "layout")
    assert not (tmp_path / "layout").exists()


def test_layouts_of_the_same_input_are_the_same(tmp_path: Path, full: Path) -> None:
    """Whatever order the system lists names in, and whatever lies there that is left out."""
    shutil.copytree(full, tmp_path / "again")
    (full / ".git/HEAD").write_text("another")
    placement = write_random_placement(full, tmp_path / "placement")
    for kind in KINDS:
        relayout(full, placement, tmp_path / f"{kind}-a", layout=kind)
        relayout(tmp_path / "again", placement, tmp_path / f"{kind}-b", layout=kind)
        assert files_of(tmp_path / f"{kind}-a") == files_of(tmp_path / f"{kind}-b")


def test_large_files_take_no_memory_and_count_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = write_checkpoint(tmp_path / "model")
    placement = write_random_placement(model, tmp_path / "placement")
    relayout(model, placement, tmp_path / "warm")
    size = 40 << 20
    with (model / "head.pt").open("wb") as file:
        file.truncate(size)
    plan = relayout(model, placement, tmp_path / "layout")
    assert plan.companion_bytes > size
    tracemalloc.start()
    try:
        verify(model, tmp_path / "layout")
        restored(tmp_path / "layout")
        relayout(model, placement, tmp_path / "layout", overwrite=True)
        assert tracemalloc.get_traced_memory()[1] < size // 2
    finally:
        tracemalloc.stop()
    shutil.rmtree(tmp_path / "layout.restored")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**9, 0, size))
    with pytest.raises(OutputError, match="bytes of disk"):
        relayout(model, placement, tmp_path / "other")
    with pytest.raises(OutputError, match="bytes of disk"):
        restored(tmp_path / "layout")


def test_what_is_copied_is_what_the_index_describes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a file that changes under the run, the digest is that of the copy."""
    model = write_checkpoint(tmp_path / "model")
    placement = write_random_placement(model, tmp_path / "placement")

    def changing(source: Path, target: Path, *arguments: Any) -> tuple[int, str]:
        copied = copy_file(source, target, *arguments)
        source.write_bytes(source.read_bytes() + b" ")
        return copied

    monkeypatch.setattr(companions, "copy_file", changing)
    relayout(model, placement, tmp_path / "layout")
    monkeypatch.undo()
    assert restored(tmp_path / "layout").is_dir()
    with pytest.raises(VerificationError, match=r"config\.json differs from that in"):
        verify(model, tmp_path / "layout")


# What the checkpoint has by the time of the comparison, and words of the message.
CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a value of the config": (
        lambda model: edit_config(model, rope_parameters={"rope_theta": 500000.0, "rope_type": "default"}),
        "config.json differs from that in {model}: rope_parameters.rope_theta is 10000.0 in the layout, 500000.0 in "
        "the checkpoint",
    ),
    "a type of a value": (
        lambda model: edit_config(model, hidden_size=20.0),
        "hidden_size is 20 in the layout, 20.0 in the checkpoint",
    ),
    "a key more": (
        lambda model: edit_config(model, sparsity_threshold=0.5),
        "sparsity_threshold is absent in the layout, 0.5 in the checkpoint",
    ),
    "another architecture": (
        lambda model: edit_config(model, model_type="other"),
        'model_type is "opt" in the layout, "other" in the checkpoint',
    ),
    "white space": (
        lambda model: (model / "config.json").write_text((model / "config.json").read_text() + "\n"),
        "config.json differs from that in {model}",
    ),
    "text of the same length": (
        lambda model: (model / "tokenizer.json").write_bytes(b'{"version": "1.1"}\r\n'),
        'tokenizer.json differs from that in {model}: version is "1.0" in the layout, "1.1" in the checkpoint',
    ),
    "no JSON any more": (
        lambda model: (model / "tokenizer.json").write_bytes(b"{"), "tokenizer.json differs from that in {model}"
    ),
    "the card": (
        lambda model: (model / "README.md").write_text("# Another"), "README.md differs from that in {model}"
    ),
    "no card": (lambda model: (model / "README.md").unlink(), "holds README.md, which is not in {model}"),
    "a file of a module": (
        lambda model: (model / "1_Pooling/config.json").write_text("[]"), "1_Pooling/config.json differs from"
    ),
    "a large file": (
        lambda model: (model / "head.pt").write_bytes(bytes(range(100, 200))), "head.pt differs from that in {model}"
    ),
    "a file less": (lambda model: (model / "head.pt").unlink(), "holds head.pt, which is not in {model}"),
    "a file more": (
        lambda model: (model / "1_Pooling/new.txt").write_text("x"),
        "has no 1_Pooling/new.txt, which is in {model}; if it was not added since, run `relayout` again",
    ),
}  # fmt: skip


def edit_config(model: Path, **changes: object) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, **changes}))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Path]]:
    """A checkpoint with a few files beside the weights, and its layouts."""
    folder = tmp_path_factory.mktemp("plain")
    rope = {"rope_theta": 10000.0, "rope_type": "default"}
    model = write_beside(write_checkpoint(folder / "model", config={"rope_parameters": rope}), "1_Pooling/config.json")
    (model / "head.pt").write_bytes(bytes(range(100)))
    return model, {kind: laid_out(model, folder / kind, layout=kind) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CHANGES)
def test_verify_compares_with_the_files_of_the_checkpoint(
    tmp_path: Path, plain: tuple[Path, dict[str, Path]], name: str, kind: str
) -> None:
    original, made = plain
    model = Path(shutil.copytree(original, tmp_path / "model"))
    assert verify(model, made[kind], quick=True).mode == "quick"
    change, complaint = CHANGES[name]
    change(model)
    for quick in (True, False):
        with pytest.raises(VerificationError) as caught:
            verify(model, made[kind], quick=quick)
        assert str(caught.value).startswith(f"{made[kind]}: ")
        assert complaint.format(model=model) in str(caught.value)


def test_a_quick_check_reads_no_large_files(
    tmp_path: Path, plain: tuple[Path, dict[str, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """That is the deal, as with weights; their size is looked at."""
    monkeypatch.setattr(companion_comparison, "QUICK_BYTES", 99)
    original, made = plain
    model, layout = (Path(shutil.copytree(path, tmp_path / path.name)) for path in (original, made["bundled"]))
    seen: list[int] = []
    with Checkpoint(model) as checkpoint, open_layout(layout) as opened:
        verify_full(opened, checkpoint, seen.append)
        assert sum(seen) == layout_bytes(opened)
        assert layout_bytes(opened) >= (layout / FLASH).stat().st_size - 16_384 + 100
    for path in (model / "head.pt", layout / "head.pt"):
        flip(path, 50)
        assert verify(model, layout, quick=True).mode == "quick"
        with pytest.raises(VerificationError, match=r"head\.pt"):
            verify(model, layout)
        flip(path, 50)
    assert verify(model, layout).mode == "full"
    (layout / "head.pt").write_bytes(bytes(99))
    with pytest.raises(VerificationError, match=r"head\.pt: was changed"):
        verify(model, layout, quick=True)


def test_an_earlier_layout_of_fewer_files_comes_back_as_it_is(tmp_path: Path, full: Path) -> None:
    """Before version 0.1.0, subfolders and files with endings of weights did not get into a layout."""
    layout = laid_out(full, tmp_path / "layout")
    edit(layout, "bundled", lambda index: index.update(
        companions=[file for file in index["companions"] if "/" not in file["name"] and ".pt" not in file["name"]]
    ))  # fmt: skip
    assert {"config.json", "README.md"} < set(files_of(restored(layout)))
    with pytest.raises(VerificationError, match=r"has no .*, which is in .*run `relayout` again"):
        verify(full, layout)


HOSTILE = ("../x", "/etc/passwd", "a/../../x", "a//b", "", "a/", ".", "..", "a/..", "back\\slash", "a\n/../x", "nul\0")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", HOSTILE)
def test_an_index_names_no_file_outside_of_the_layout(
    layouts: LayoutFactory, copy_of: Callable[[Made], Path], kind: str, name: str
) -> None:
    copy = copy_of(layouts.of_kind(kind))
    edit(copy, kind, lambda index: index["companions"][0].update(name=name))
    with pytest.raises(InputError, match="does not match"):
        open_layout(copy)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "config.json/x"])
def test_two_files_of_an_index_cannot_be_restored_as_one(
    tmp_path: Path, layouts: LayoutFactory, copy_of: Callable[[Made], Path], kind: str, name: str
) -> None:
    copy = copy_of(layouts.of_kind(kind))
    path = copy / "neuralink/original" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"")
    added = {"name": f"neuralink/original/{name}", "bytes": 0, "sha256": hashlib.sha256(b"").hexdigest()}
    edit(copy, kind, lambda index: index["companions"].append(added))
    with open_layout(copy) as layout, pytest.raises(VerificationError, match="keeps two files of the source as"):
        restore_layout(layout, tmp_path / "restored")
    assert not (tmp_path / "restored").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_an_index_names_no_file_twice(layouts: LayoutFactory, copy_of: Callable[[Made], Path], kind: str) -> None:
    copy = copy_of(layouts.of_kind(kind))
    edit(copy, kind, lambda index: index["companions"].append(index["companions"][0]))
    with pytest.raises(InputError, match="lists a file twice"):
        open_layout(copy)


def test_a_remark_says_what_is_left_out() -> None:
    files = [
        LeftOut("pytorch_model.bin", 2_000_000_000, COPIES), LeftOut(".git/x\n", 5, HIDDEN),
        LeftOut("a.gguf", 3_000_000_000, COPIES), LeftOut("b.onnx", 0, COPIES), LeftOut("c.onnx", 0, COPIES),
    ]  # fmt: skip
    assert remark_on_left_out(files) == (
        "left out: 5 files, 5.0 GB (a.gguf, pytorch_model.bin, .git/x and 2 more): other copies of the weights, hidden "
        "files and caches; --all-files takes everything along"
    )
    assert len(remark_on_left_out([LeftOut("x" * 4000, 1, HIDDEN)])) < 250
    assert remark_on_left_out(files[1:2]).startswith("left out: 1 file, 5 B (.git/x): hidden files and caches; ")
