"""Checkpoints with another's names, without their head, or on a disk that cannot be written, through all stages."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

from neuralink_cli.cli.exit_codes import INPUT, OUTPUT
from neuralink_cli.models.hf_packages import quiet_transformers
from tests.cli.conftest import Neuralink
from tests.conftest import ModelFactory
from tests.processes import run_command

WEIGHTS = "model.safetensors"


def renamed(model: Path, target: Path, rename: Callable[[str], str]) -> Path:
    """A copy with other names of tensors."""
    shutil.copytree(model, target)
    tensors = {rename(name): tensor for name, tensor in load_file(target / WEIGHTS).items()}
    save_file(tensors, target / WEIGHTS, {"format": "pt"})
    return target


@pytest.mark.parametrize(
    ("family", "wrapper"),
    [
        ("llama", "module."),
        ("opt", "_orig_mod."),
        ("llama", "base_model.model."),
        ("gpt2", "module._orig_mod."),
        ("bert", "module."),
    ],
)
def test_names_of_a_wrapper_are_refused_with_what_to_do(
    neuralink: Neuralink, model: ModelFactory, text_file: Path, outputs: Path, tmp_path: Path, family: str, wrapper: str
) -> None:
    """transformers would not find these weights and run on random numbers."""
    wrapped = renamed(model(family), tmp_path / "wrapped", lambda name: wrapper + name)
    result = neuralink("profile", wrapped, "--dataset", text_file, "-o", outputs / "trace", "-q")
    assert result.code == INPUT
    assert f"its name there starts with {wrapper!r}" in result.error
    assert result.error.endswith(
        f"save the model inside the wrapper with save_pretrained, or rename the tensors without {wrapper!r}"
    )
    assert not list(outputs.iterdir())
    # The advice works.
    bare = renamed(wrapped, tmp_path / "bare", lambda name: name.removeprefix(wrapper))
    ratio = ("--active-ratio", "0.3")
    assert neuralink("profile", bare, "--dataset", text_file, "-o", outputs / "trace", "-q", *ratio).code == 0


@pytest.mark.parametrize(
    ("at", "step"), [("mlp.", "_checkpoint_wrapped_module."), ("layers.0.", "_fsdp_wrapped_module.")]
)
def test_names_of_a_wrapper_of_single_modules_too(
    neuralink: Neuralink, model: ModelFactory, text_file: Path, outputs: Path, tmp_path: Path, at: str, step: str
) -> None:
    wrapped = renamed(model("llama"), tmp_path / "wrapped", lambda name: name.replace(at, at + step))
    result = neuralink("profile", wrapped, "--dataset", text_file, "-o", outputs / "trace", "-q")
    assert result.code == INPUT
    called = "model.layers.0.mlp.up_proj.weight".replace(at, at + step)
    assert f"it is called {called!r} there, as a wrapper (FSDP, torch.compile, checkpointing) leaves it" in result.error
    assert "or rename the tensors without such steps" in result.error


@pytest.fixture
def without_head(model: ModelFactory, tmp_path: Path) -> Iterator[Callable[[str, str], Path]]:
    def build(family: str, class_name: str) -> Path:
        import transformers

        folder = tmp_path / "base"
        with quiet_transformers():
            getattr(transformers, class_name).from_pretrained(model(family)).save_pretrained(folder)
        for path in model(family).iterdir():
            if not (folder / path.name).exists():
                shutil.copy(path, folder)
        return folder

    yield build


@pytest.mark.parametrize(
    ("family", "class_name", "first"),
    [
        ("bert", "BertModel", "encoder.layer.0."),
        ("llama", "LlamaModel", "layers.0."),
        ("opt", "OPTModel", "decoder.layers.0."),
        ("t5", "T5Model", "encoder.block.0."),
    ],
)
@pytest.mark.parametrize("layout", ["bundled", "permuted"])
def test_models_saved_without_their_head_go_through_all_stages(
    neuralink: Neuralink,
    without_head: Callable[[str, str], Path],
    text_file: Path,
    tmp_path: Path,
    family: str,
    class_name: str,
    first: str,
    layout: str,
) -> None:
    base = without_head(family, class_name)
    assert any(name.startswith(first) for name in load_file(base / WEIGHTS))
    assert not any("lm_head" in name or "cls." in name for name in load_file(base / WEIGHTS))
    trace, placement, output, back = (tmp_path / name for name in ("trace", "placement", "layout", "back"))
    for stage in (
        ("profile", base, "--dataset", text_file, "-o", trace, "--active-ratio", "0.3"),
        ("cluster", trace, "-o", placement, "--effort", "fast"),
        ("relayout", base, "--placement", placement, "-o", output, "--layout", layout),
        ("verify", base, output, "--forward", "--text", text_file),
        ("restore", output, "-o", back),
    ):
        result = neuralink(*stage, "-q")
        assert (result.code, result.stderr) == (0, ""), stage[0]
    for path in base.iterdir():
        assert (back / path.name).read_bytes() == path.read_bytes()


def test_a_tensor_in_two_shards_is_refused_even_if_the_bytes_are_the_same(
    neuralink: Neuralink, model: ModelFactory, text_file: Path, outputs: Path, tmp_path: Path
) -> None:
    sharded = Path(shutil.copytree(model("llama", shards=True), tmp_path / "sharded"))
    first, second = sorted(sharded.glob("model-*.safetensors"))[:2]
    tensors = load_file(first)
    name = next(iter(tensors))
    save_file({**load_file(second), name: tensors[name]}, second, {"format": "pt"})
    result = neuralink("profile", sharded, "--dataset", text_file, "-o", outputs / "trace", "-q")
    assert result.code == INPUT
    assert result.error == (
        f"{second}: tensor {name!r} is also in {first.name}; "
        "keep it in one of the two, the one that the index names: load the model and save it again"
    )


# As <sched.h> has it: mounts that only this process sees. Python has it from 3.12 on.
CLONE_NEWNS = 0x00020000
CANNOT_MOUNT, CAN_WRITE = 99, 98


def nobody_may_write(folder: Path) -> None:
    """In this process: root sees the folder mounted read-only, for others its files are so."""
    if os.geteuid() != 0:
        for path in (folder, *folder.rglob("*")):
            path.chmod(path.stat().st_mode & ~0o222)
    elif ctypes.CDLL(None).unshare(CLONE_NEWNS) != 0 or any(
        subprocess.run(["mount", *options], capture_output=True, check=False).returncode != 0
        for options in (["--make-rprivate", "/"], ["--bind", folder, folder], ["-o", "remount,bind,ro", folder])
    ):
        os._exit(CANNOT_MOUNT)
    try:
        (folder / "x").touch()
    except OSError:
        return
    os._exit(CAN_WRITE)


def test_a_model_on_a_disk_that_cannot_be_written(model: ModelFactory, text_file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "read-only"
    source = Path(shutil.copytree(model("opt"), folder / "model"))
    trace, placement, layout, back = (tmp_path / name for name in ("trace", "placement", "layout", "back"))
    profile = ("profile", source, "--dataset", text_file, "--active-ratio", "0.3", "-o")
    relayout = ("relayout", source, "--placement", placement, "-o")
    good = [
        (*profile, trace),
        ("cluster", trace, "-o", placement),
        (*relayout, layout),
        ("verify", source, layout),
        ("restore", layout, "-o", back),
    ]
    bad = [
        (*profile, folder / "x"),
        ("cluster", trace, "-o", folder / "x"),
        (*relayout, folder / "x"),
        (*relayout, folder / "x", "--layout", "permuted"),
        ("restore", layout, "-o", folder / "x"),
        ("bench", placement, "--trace", trace, "--csv", folder / "x"),
    ]
    closed = partial(nobody_may_write, folder)
    for command in good:
        done = run_command(*command, "-q", prepare=closed)
        if os.geteuid() == 0 and done.returncode == CANNOT_MOUNT:
            pytest.skip("root may write anywhere, and nothing can be mounted here")
        assert (done.returncode, done.stderr) == (0, ""), command
    for command in bad:
        refused = run_command(*command, "-q", prepare=closed)
        assert refused.returncode == OUTPUT, refused.stderr
        (refusal,) = refused.stderr.splitlines()
        assert refusal.startswith(f"neuralink: error: {folder}")
        assert "written (" in refusal
    if os.geteuid() != 0:
        for path in (folder, *folder.rglob("*")):
            path.chmod(path.stat().st_mode | 0o200)
    assert sorted(path.name for path in folder.iterdir()) == ["model"]
    assert (back / WEIGHTS).read_bytes() == (source / WEIGHTS).read_bytes()
