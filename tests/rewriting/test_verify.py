"""Verification finds every damage, and says where it is."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from neuralink_cli.checkpoint.checkpoint import Checkpoint
from neuralink_cli.errors import InputError, MismatchError, NeuralinkError, VerificationError
from neuralink_cli.layout.open_layout import open_layout
from neuralink_cli.rewriting.verify import layout_bytes, verify_full
from tests.checkpoints import FAMILIES, HIDDEN, NEURONS, decode, encode, write_checkpoint
from tests.damage import FLASH, INDEX, KINDS, PLACEMENT, edit, flip, positions_in, start_of
from tests.layouts import LayoutFactory, Made, verify

Damage = Callable[[Path], object]


# What passes


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("family", "options"),
    [
        *((family, {}) for family in FAMILIES),
        ("llama", {"dtype": "BF16", "shards": 3}),
        ("gpt2", {"dtype": "F8_E4M3"}),
        ("bert", {"dtype": "F64", "readme": None}),
    ],
)
def test_every_layout_passes(layouts: LayoutFactory, kind: str, family: str, options: dict[str, Any]) -> None:
    made = layouts.of_kind(kind, family, **options)
    quick = verify(made.model, made.layout, quick=True)
    assert (quick.layout, quick.mode, quick.tensors, quick.bytes) == (kind, "quick", 0, 0)
    full = verify(made.model, made.layout)
    with Checkpoint(made.model) as checkpoint:
        assert (full.layout, full.mode) == (kind, "full")
        assert (full.tensors, full.bytes) == (len(checkpoint.tensors), checkpoint.total_bytes)
    assert set(quick.checks) < set(full.checks)


@pytest.mark.parametrize("resident", ["none", "gate"])
@pytest.mark.parametrize("alignment", [1, 512])
def test_every_bundled_layout_passes(layouts: LayoutFactory, resident: str, alignment: int) -> None:
    made = layouts.bundled("llama", resident=resident, alignment=alignment)
    assert verify(made.model, made.layout).mode == "full"


@pytest.mark.parametrize("kind", KINDS)
def test_another_sharding_of_the_same_model_passes(tmp_path: Path, layouts: LayoutFactory, kind: str) -> None:
    made = layouts.of_kind(kind, shards=3)
    assert verify(write_checkpoint(tmp_path / "model", shards=2), made.layout).mode == "full"


@pytest.mark.parametrize("kind", KINDS)
def test_progress_adds_up_to_the_bytes_of_the_layout(layouts: LayoutFactory, kind: str) -> None:
    made = layouts.of_kind(kind)
    seen: list[int] = []
    with Checkpoint(made.model) as checkpoint, open_layout(made.layout) as layout:
        verify_full(layout, checkpoint, seen.append)
        assert sum(seen) == layout_bytes(layout)


@pytest.mark.parametrize("kind", KINDS)
def test_quick_reads_no_weights(layouts: LayoutFactory, copy_of: Callable[[Made], Path], kind: str) -> None:
    """A flipped weight passes: that is the deal."""
    made = layouts.of_kind(kind)
    copy = copy_of(made)
    path, tensor = weight_of(copy, kind)
    flip(path, start_of(path, tensor) + 5)
    assert verify(made.model, copy, quick=True).mode == "quick"
    with pytest.raises(VerificationError):
        verify(made.model, copy)


def weight_of(directory: Path, kind: str) -> tuple[Path, str]:
    """A file and a tensor with weights of blocks in it."""
    if kind == "bundled":
        return directory / FLASH, "layers.0.bundles"
    return directory / "model.safetensors", "model.decoder.layers.0.fc1.weight"


# Single bits


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("bundled", {"resident": "gate"}),
        ("bundled", {"family": "llama", "dtype": "BF16", "shards": 2}),
        ("permuted", {"shards": 2}),
        ("permuted", {"family": "gpt2"}),
    ],
)
def test_every_flipped_bit_is_found(
    layouts: LayoutFactory, copy_of: Callable[[Made], Path], kind: str, options: dict[str, Any]
) -> None:
    made = getattr(layouts, kind)(**options)
    copy = copy_of(made)
    random = np.random.default_rng(0)
    files = [path for path in copy.rglob("*") if path.suffix == ".safetensors" or path.name == INDEX[kind]]
    assert len(files) == (2 if kind == "bundled" else 3 + bool(options.get("shards")))
    flips = 0
    for path in files:
        for byte in positions_in(path, random):
            bit = int(random.integers(8))
            flip(path, byte, bit)
            with pytest.raises(NeuralinkError) as caught:
                verify(made.model, copy)
            assert isinstance(caught.value, (InputError, VerificationError, MismatchError)), (path, byte, bit)
            flip(path, byte, bit)
            flips += 1
    assert flips > 70
    assert verify(made.model, copy).mode == "full"


def place_of(family: str, role: str, element_bytes: int, neuron: int, column: int) -> tuple[str, int]:
    """The source tensor that holds a weight of layer 1, and the byte where it starts there."""
    stem = {"opt": "model.decoder.layers.1.", "gpt2": "transformer.h.1.mlp."}[family]
    name = {"opt": {"up": "fc1", "down": "fc2"}, "gpt2": {"up": "c_fc", "down": "c_proj"}}[family][role]
    by_row = (family == "opt") == (role == "up")
    element = neuron * HIDDEN + column if by_row else column * NEURONS + neuron
    return f"{stem}{name}.weight", element * element_bytes


@pytest.mark.parametrize("role", ["up", "down"])
@pytest.mark.parametrize("family", ["opt", "gpt2"])
def test_a_flipped_weight_of_a_bundle_is_named(
    layouts: LayoutFactory, copy_of: Callable[[Made], Path], family: str, role: str
) -> None:
    made = layouts.bundled(family, dtype="BF16")
    copy = copy_of(made)
    index = json.loads((copy / INDEX["bundled"]).read_text())
    block = index["blocks"][1]
    order = np.frombuffer(decode(copy / FLASH)["layers.1.order"].data, dtype="<i4")
    part = next(part for part in block["parts"] if part["role"] == role)
    for slot, column, byte in ((0, 0, 0), (17, 7, 1), (NEURONS - 1, HIDDEN - 1, 1)):
        at = block["bundles"]["offset"] + slot * block["stride"] + part["offset"] + 2 * column + byte
        flip(copy / FLASH, at, 3)
        tensor, start = place_of(family, role, 2, int(order[slot]), column)
        with pytest.raises(VerificationError) as caught:
            verify(made.model, copy)
        assert str(caught.value) == (
            f"{copy}: tensor '{tensor}' differs from the source at byte {start + byte}: "
            f"layers.1, neuron {order[slot]}, slot {slot}"
        )
        flip(copy / FLASH, at, 3)


@pytest.mark.parametrize("family", ["opt", "gpt2"])
def test_a_flipped_resident_weight_is_named(
    layouts: LayoutFactory, copy_of: Callable[[Made], Path], family: str
) -> None:
    made = layouts.bundled(family, dtype="BF16", resident="gate")
    copy = copy_of(made)
    order = np.frombuffer(decode(copy / FLASH)["layers.1.order"].data, dtype="<i4")
    flip(copy / FLASH, start_of(copy / FLASH, "layers.1.up") + (9 * HIDDEN + 4) * 2)
    tensor, start = place_of(family, "up", 2, int(order[9]), 4)
    with pytest.raises(VerificationError) as caught:
        verify(made.model, copy)
    assert str(caught.value).endswith(
        f"tensor '{tensor}' differs from the source at byte {start}: layers.1, neuron {order[9]}, slot 9"
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_flipped_bias_is_named(layouts: LayoutFactory, copy_of: Callable[[Made], Path], kind: str) -> None:
    made = layouts.of_kind(kind)
    copy = copy_of(made)
    bias = "model.decoder.layers.1.fc1.bias"
    path, tensor = (copy / FLASH, "layers.1.up.bias") if kind == "bundled" else (copy / "model.safetensors", bias)
    placement = layouts.bundled().layout / FLASH
    order = np.frombuffer(decode(placement)["layers.1.order"].data, dtype="<i4")
    flip(path, start_of(path, tensor) + 4 * 30 + 2)
    with pytest.raises(VerificationError) as caught:
        verify(made.model, copy)
    assert str(caught.value).endswith(
        f"tensor '{bias}' differs from the source at byte {4 * order[30] + 2}: layers.1, neuron {order[30]}, slot 30"
    )


@pytest.mark.parametrize("role", ["up", "down"])
@pytest.mark.parametrize("family", ["opt", "gpt2"])
def test_a_flipped_weight_of_a_permuted_layout_is_named(
    layouts: LayoutFactory, copy_of: Callable[[Made], Path], family: str, role: str
) -> None:
    made = layouts.permuted(family)
    copy = copy_of(made)
    order = np.frombuffer(decode(copy / PLACEMENT)["layers.1.order"].data, dtype="<i4")
    tensor, at = place_of(family, role, 4, 21, 3)
    flip(copy / "model.safetensors", start_of(copy / "model.safetensors", tensor) + at)
    _, start = place_of(family, role, 4, int(order[21]), 3)
    with pytest.raises(VerificationError) as caught:
        verify(made.model, copy)
    assert str(caught.value).endswith(
        f"tensor '{tensor}' differs from the source at byte {start}: layers.1, neuron {order[21]}, slot 21"
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tensor", ["model.embed_tokens.weight", "position_ids", "scalar"])
def test_a_flipped_byte_of_another_tensor_is_named(
    layouts: LayoutFactory, copy_of: Callable[[Made], Path], kind: str, tensor: str
) -> None:
    made = layouts.of_kind(kind)
    copy = copy_of(made)
    path = copy / (FLASH if kind == "bundled" else "model.safetensors")
    flip(path, start_of(path, tensor) + 3)
    with pytest.raises(VerificationError) as caught:
        verify(made.model, copy)
    assert str(caught.value) == f"{copy}: tensor '{tensor}' differs from the source at byte 3"


def test_padding_that_is_not_zero_is_named(layouts: LayoutFactory, copy_of: Callable[[Made], Path]) -> None:
    made = layouts.bundled()
    copy = copy_of(made)
    flip(copy / FLASH, start_of(copy / FLASH, "padding.1"))
    with pytest.raises(VerificationError, match=r"padding\.1 is not zero"):
        verify(made.model, copy)


# Larger damage, which needs no reading of weights


def swap_first_two(path: Path, tensor: str) -> None:
    content = bytearray(path.read_bytes())
    at = start_of(path, tensor)
    content[at : at + 4], content[at + 4 : at + 8] = content[at + 4 : at + 8], content[at : at + 4]
    path.write_bytes(content)


def duplicate_entry(path: Path, tensor: str) -> None:
    content = bytearray(path.read_bytes())
    at = start_of(path, tensor)
    content[at : at + 4] = content[at + 4 : at + 8]
    path.write_bytes(content)


def append(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def cut(path: Path, count: int = 1) -> None:
    os.truncate(path, path.stat().st_size - count)


def replace_by_unsorted(path: Path) -> None:
    """A layout of the same source whose tensors lie in another order: sizes agree, ranges do not."""
    tensors = decode(path)
    path.write_bytes(encode(dict(reversed(tensors.items()))).ljust(path.stat().st_size, b"\0"))


BUNDLED_DAMAGES: dict[str, tuple[Damage, str]] = {
    "two slots swapped": (
        lambda d: swap_first_two(d / FLASH, "layers.1.order"), "'layers.1.order' does not match its digest"
    ),
    "a neuron twice": (lambda d: duplicate_entry(d / FLASH, "layers.1.order"), "layers.1.order is not a permutation"),
    "a frequency changed": (lambda d: flip(d / FLASH, start_of(d / FLASH, "layers.0.frequency")), "does not match its"),
    "a kept header changed": (
        lambda d: flip(d / FLASH, start_of(d / FLASH, "source.model.safetensors") + 12), "not valid JSON|digest|must"
    ),
    "a byte more": (lambda d: append(d / FLASH), "longer than its header says"),
    "a byte less": (lambda d: cut(d / FLASH), "truncated"),
    "half of it": (lambda d: cut(d / FLASH, (d / FLASH).stat().st_size // 2), "truncated"),
    "nothing": (lambda d: (d / FLASH).write_bytes(b""), r"too short for a safetensors file \(0 bytes\)"),
    "no file": (lambda d: (d / FLASH).unlink(), "cannot be opened"),
    "another file": (lambda d: replace_by_unsorted(d / FLASH), "longer than its header says"),
    "index is cut": (lambda d: cut(d / "model.flash.json", 3), "not valid JSON"),
    "index is empty": (lambda d: (d / "model.flash.json").write_text("{}"), "has format None version None"),
    "no index": (lambda d: (d / "model.flash.json").unlink(), "has neither model.flash.json nor model.permuted.json"),
    "a newer index": (lambda d: edit(d, "bundled", lambda i: i.update(version=2)), "'neuralink-flash' version 2, this"),
    "an index of another kind": (
        lambda d: edit(d, "bundled", lambda i: i.update(format="x")), "has format 'x' version 1, this tool reads"
    ),
    "an unknown key": (lambda d: edit(d, "bundled", lambda i: i.update(colour="blue")), "'colour' was unexpected"),
    "a file elsewhere": (
        lambda d: edit(d, "bundled", lambda i: i["sources"][0].update(name="../x.safetensors")), "does not match"
    ),
    "a hidden file": (lambda d: edit(d, "bundled", lambda i: i["sources"][0].update(name=".x")), "does not match"),
}  # fmt: skip
PERMUTED_DAMAGES: dict[str, tuple[Damage, str]] = {
    "two slots swapped": (lambda d: swap_first_two(d / PLACEMENT, "layers.1.order"), "does not match its digest"),
    "a neuron twice": (lambda d: duplicate_entry(d / PLACEMENT, "layers.1.order"), "does not match its digest"),
    "a byte more": (lambda d: append(d / "model.safetensors"), "longer than its header says"),
    "a byte less": (lambda d: cut(d / "model.safetensors"), "truncated"),
    "no file": (lambda d: (d / "model.safetensors").unlink(), "has neither model.safetensors nor"),
    "no placement": (lambda d: (d / PLACEMENT).unlink(), "cannot be opened"),
    "index is cut": (lambda d: cut(d / "model.permuted.json", 3), "not valid JSON"),
    "no config": (lambda d: (d / "config.json").unlink(), "has no config.json"),
    "a placement elsewhere": (
        lambda d: edit(d, "permuted", lambda i: i.update(placement="../placement.safetensors")), "was expected"
    ),
}  # fmt: skip
DAMAGES = [("bundled", name) for name in BUNDLED_DAMAGES] + [("permuted", name) for name in PERMUTED_DAMAGES]


@pytest.mark.parametrize(("kind", "name"), DAMAGES)
def test_quick_finds(layouts: LayoutFactory, copy_of: Callable[[Made], Path], kind: str, name: str) -> None:
    damage, complaint = (BUNDLED_DAMAGES if kind == "bundled" else PERMUTED_DAMAGES)[name]
    made = layouts.of_kind(kind)
    copy = copy_of(made)
    damage(copy)
    with pytest.raises((InputError, VerificationError), match=complaint):
        verify(made.model, copy, quick=True)


def test_the_placement_of_another_layout_is_found(layouts: LayoutFactory, copy_of: Callable[[Made], Path]) -> None:
    copy = copy_of(layouts.permuted())
    _, other = layouts.checkpoint("opt", seed=7)
    shutil.copyfile(other, copy / PLACEMENT)
    with pytest.raises(VerificationError, match="the placement beside it is not the one the layout was made with"):
        verify(layouts.checkpoint()[0], copy, quick=True)


@pytest.mark.parametrize("kind", KINDS)
def test_a_layout_of_another_model_is_told_so(layouts: LayoutFactory, kind: str) -> None:
    made = layouts.of_kind(kind)
    other, _ = layouts.checkpoint("opt", seed=7)
    for quick in (True, False):
        with pytest.raises(MismatchError, match=f"was made from the model with fingerprint .* but {other} has"):
            verify(other, made.layout, quick=quick)


def test_what_is_no_layout_is_told_so(tmp_path: Path, layouts: LayoutFactory) -> None:
    model, _ = layouts.checkpoint()
    with pytest.raises(InputError, match="no such directory; pass the directory that `relayout` wrote"):
        verify(model, tmp_path / "absent")
    with pytest.raises(InputError, match="so it is not a layout"):
        verify(model, model)
