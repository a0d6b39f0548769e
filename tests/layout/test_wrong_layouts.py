"""Layouts whose index, or whose content under fitting digests, is wrong: whoever made them."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from neuralink_cli.errors import InputError, NeuralinkError, VerificationError
from tests.checkpoints import NEURONS, decode, tensors_of
from tests.damage import FLASH, INDEX, KINDS, edit, leaves, put, rewrite_flash, seal
from tests.layouts import LayoutFactory, Made, relayout, verify


@pytest.mark.parametrize("kind", KINDS)
def test_any_edited_number_of_the_index_is_found_at_once(
    layouts: LayoutFactory, copy_of: Callable[[Made], Path], kind: str
) -> None:
    """The gain and the thresholds too, which nothing else could tell."""
    made = getattr(layouts, kind)("opt")
    copy = copy_of(made)
    path = copy / INDEX[kind]
    text = path.read_text()
    document = json.loads(text)
    numbers = [(way, value) for way, value in leaves(document) if isinstance(value, (int, float))]
    assert len(numbers) > 30
    for way, value in numbers:
        put(document, way, value + 1)
        path.write_text(json.dumps(document))
        with pytest.raises((InputError, VerificationError)):
            verify(made.model, copy, quick=True)
        put(document, way, value)
    path.write_text(text)
    assert verify(made.model, copy, quick=True).mode == "quick"


# Numbers that nothing else in the layout says, so that an index sealed again may state what it likes.
FREE = ("gain", "provenance", "calibration", "threshold", "pinned", "collapse_gap", "up_values")


@pytest.mark.parametrize(("family", "resident"), [("opt", "none"), ("opt", "gate"), ("gpt_oss", "gate")])
def test_quick_finds_contradictions_even_in_a_sealed_index(
    layouts: LayoutFactory, copy_of: Callable[[Made], Path], family: str, resident: str
) -> None:
    made = layouts.bundled(family, resident=resident)
    copy = copy_of(made)
    path = copy / INDEX["bundled"]
    document = json.loads(path.read_text())
    numbers = [(way, value) for way, value in leaves(document) if isinstance(value, (int, float))]
    bound = [(way, value) for way, value in numbers if not set(way) & set(FREE)]
    assert len(bound) > 40
    missed = []
    for way, value in bound:
        for other in (1 - value if way[-1] == "neuron_axis" else value + 1, value * 2 + 4096):
            put(document, way, other)
            seal(path, document)
            try:
                verify(made.model, copy, quick=True)
            except (InputError, VerificationError):
                continue
            finally:
                put(document, way, value)
            # The axis of a vector says nothing.
            if not (
                way[-1] == "neuron_axis" and document["blocks"][way[1]][way[2]][way[3]].get("kind", "").endswith("bias")
            ):
                missed.append((way, other))
    # An alignment of 4,096 holds for any that divides it, so these are the only changes that remain true.
    assert missed == []


@pytest.mark.parametrize(("kind", "family"), [*((kind, "opt") for kind in KINDS), ("permuted", "gpt_oss")])
def test_no_index_breaks_verification(
    layouts: LayoutFactory, copy_of: Callable[[Made], Path], kind: str, family: str
) -> None:
    """Whatever a well-formed, sealed index says: it passes, or there is an expected error."""
    made = getattr(layouts, kind)(family)
    copy = copy_of(made)
    path = copy / INDEX[kind]
    document = json.loads(path.read_text())
    every = list(leaves(document))
    names = sorted({value for way, value in every if isinstance(value, str) and way[0] == "blocks"})
    tensors = sorted(tensors_of(family))
    random = np.random.default_rng(0)
    outcomes = {"passed": 0, "found": 0}
    for way, value in every:
        if isinstance(value, str):
            others: list[Any] = [str(random.choice(names)), str(random.choice(tensors)), "F4", "F64", "mask", ""]
        else:
            others = [0, 1, value + 1, 2**31, 2**63, 10**30]
        # Two of them each: all would take a minute on a slow machine.
        for k in random.choice(len(others), 2, replace=False):
            put(document, way, others[k])
            seal(path, document)
            try:
                verify(made.model, copy)
                outcomes["passed"] += 1
            except NeuralinkError:
                outcomes["found"] += 1
            finally:
                put(document, way, value)
    assert outcomes["found"] > (160 if kind == "bundled" else 30)


# Layouts that are not damaged but wrong: whoever wrote them, with fitting digests.


def without(name: str) -> Callable[[dict[str, Any]], Any]:
    return lambda tensors: tensors.pop(name)


def with_data(name: str, change: Callable[[bytes], bytes], shape: tuple[int, ...]) -> Callable[[dict[str, Any]], Any]:
    def apply(tensors: dict[str, Any]) -> None:
        old = tensors[name]
        tensors[name] = type(old)(old.dtype, shape, change(old.data))

    return apply


def with_dtype(name: str, dtype: str, shape: tuple[int, ...]) -> Callable[[dict[str, Any]], Any]:
    return lambda tensors: tensors.update({name: type(tensors[name])(dtype, shape, tensors[name].data)})


def swap_orders(tensors: dict[str, Any]) -> None:
    tensors["layers.0.order"], tensors["layers.1.order"] = tensors["layers.1.order"], tensors["layers.0.order"]


MISTAKES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "a tensor less": (without("scalar"), "'scalar'"),
    "a tensor too short": (with_data("mask", lambda data: data[:10], (2, 5)), "'mask'"),
    "a tensor too long": (with_data("mask", lambda data: data + bytes(5), (4, 5)), "'mask'"),
    "a tensor of no bytes": (with_data("mask", lambda _: b"", (0, 5)), "'mask'"),
    "another shape": (with_dtype("mask", "U8", (5, 3)), "'mask'"),
    "another dtype": (with_dtype("scalar", "I32", ()), "'scalar'"),
    "other bytes": (with_data("mask", lambda data: bytes(15), (3, 5)), "tensor 'mask' differs from the source at byte"),
    "orders of each other": (swap_orders, "differs from the source at byte"),
    "frequency too short": (
        with_data("layers.0.frequency", lambda data: data[:-4], (NEURONS - 1,)), "layers.0.frequency"
    ),
    "frequency of another dtype": (with_dtype("layers.0.frequency", "I32", (NEURONS,)), "layers.0.frequency"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_wrong_layout_is_found_though_its_digests_fit(
    layouts: LayoutFactory, copy_of: Callable[[Made], Path], name: str
) -> None:
    change, complaint = MISTAKES[name]
    made = layouts.bundled()
    copy = copy_of(made)
    tensors: dict[str, Any] = decode(copy / FLASH)
    rewrite_flash(copy, tensors)
    assert verify(made.model, copy).mode == "full"
    change(tensors)
    rewrite_flash(copy, tensors)
    with pytest.raises((InputError, VerificationError), match=complaint):
        verify(made.model, copy)


def test_a_permuted_layout_whose_neurons_are_in_no_such_order_is_found(
    tmp_path: Path, layouts: LayoutFactory, copy_of: Callable[[Made], Path]
) -> None:
    made = layouts.permuted()
    copy = copy_of(made)
    (copy / "model.safetensors").write_bytes((made.model / "model.safetensors").read_bytes())
    digest = hashlib.sha256((copy / "model.safetensors").read_bytes()).hexdigest()
    edit(copy, "permuted", lambda index: index["files"][0].update(sha256=digest))
    with pytest.raises(VerificationError, match=r"differs from the source at byte \d+: layers.0, neuron \d+, slot \d+"):
        verify(made.model, copy)


@pytest.mark.parametrize("kind", KINDS)
def test_a_digest_that_does_not_fit_is_found(
    layouts: LayoutFactory, copy_of: Callable[[Made], Path], kind: str
) -> None:
    made = layouts.of_kind(kind)
    copy = copy_of(made)

    def change(index: dict[str, Any]) -> None:
        (index["file"] if kind == "bundled" else index["files"][0]).update(sha256="0" * 64)

    edit(copy, kind, change)
    with pytest.raises(VerificationError, match=r"model\S*safetensors: SHA-256 is [0-9a-f]{64}, the index says 0000"):
        verify(made.model, copy)


def test_two_layouts_of_one_model_do_not_share_files(tmp_path: Path, layouts: LayoutFactory) -> None:
    """An index beside the flash file of another run, of the same size."""
    model, placement = layouts.checkpoint()
    made = layouts.bundled()
    relayout(model, placement, tmp_path / "out", resident="gate")
    shutil.copyfile(made.layout / INDEX["bundled"], tmp_path / "out" / INDEX["bundled"])
    with pytest.raises((InputError, VerificationError)):
        verify(model, tmp_path / "out", quick=True)
