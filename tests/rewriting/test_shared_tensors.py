"""Layouts of checkpoints whose tensors hold several parts or blocks: fused rows, fused columns, stacks of experts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from neuralink_cli.architectures.architecture import Architecture, parse_architecture
from neuralink_cli.architectures.find_blocks import find_blocks
from neuralink_cli.architectures.regions import stretches
from neuralink_cli.checkpoint.checkpoint import Checkpoint
from neuralink_cli.errors import InputError, NeuralinkError, UnsupportedError, VerificationError
from neuralink_cli.layout import gathering
from neuralink_cli.layout.open_layout import open_layout
from neuralink_cli.layout.plan import RelayoutOptions
from neuralink_cli.placement.placement import Placement
from neuralink_cli.rewriting import comparison, permuting, unbundling
from neuralink_cli.rewriting.planning import plan_relayout
from neuralink_cli.rewriting.relayout import write_layout
from neuralink_cli.rewriting.restore import restore_layout
from neuralink_cli.storage.reader import FlashReader
from neuralink_cli.streaming import pipeline
from tests.checkpoints import RawTensor, decode, files_of, random_tensor, write_checkpoint, write_random_placement
from tests.damage import leaves, put, seal
from tests.layouts import verify

NEURONS, HIDDEN, EXPERTS = 13, 20, 3
EXPERT = "layers.${layer}.experts.${expert}"


def fused(axis: int, *, experts: bool, bias: bool) -> tuple[Architecture, dict[str, RawTensor]]:
    """Gate and up one after the other along the neurons' axis, of one block or of all experts; and other tensors."""
    random = np.random.default_rng(axis)
    stack = (EXPERTS,) if experts else ()
    both, down = [(2 * NEURONS, HIDDEN), (HIDDEN, NEURONS)] if axis == 0 else [(HIDDEN, 2 * NEURONS), (NEURONS, HIDDEN)]
    tensors = {"embed": random_tensor(random, "BF16", 5, HIDDEN)}
    for layer in range(2):
        tensors[f"layers.{layer}.both"] = random_tensor(random, "BF16", *stack, *both)
        tensors[f"layers.{layer}.down"] = random_tensor(random, "BF16", *stack, *down)
        if bias:
            tensors[f"layers.{layer}.both_bias"] = random_tensor(random, "BF16", *stack, 2 * NEURONS)
            tensors[f"layers.{layer}.down_bias"] = random_tensor(random, "BF16", *stack, HIDDEN)

    def part(k: int) -> dict[str, Any]:
        return {
            "weight": "layers.${layer}.both",
            "neuron_axis": axis,
            "bias": "layers.${layer}.both_bias",
            "share": {"part": k, "of": 2},
        }

    block: dict[str, Any] = {
        "id": EXPERT if experts else "layers.${layer}",
        "gate": part(1),
        "up": part(2),
        "down": {"weight": "layers.${layer}.down", "neuron_axis": 1 - axis, "bias": "layers.${layer}.down_bias"},
    }
    if experts:
        block["experts"] = {"count": ["experts"], "module": "layers.${layer}.mlp"}
    document = {
        "name": "fused", "model_types": ["opt"], "task": "causal-lm", "prefixes": [""], "layers": ["num_hidden_layers"],
        "activation": {"default": "silu"}, "blocks": [block],
    }  # fmt: skip
    return parse_architecture(document, "fused"), tensors


SHAPES = {
    f"{'experts' if experts else 'dense'}-axis{axis}{'-bias' if bias else ''}": (axis, experts, bias)
    for axis in (0, 1)
    for experts in (False, True)
    for bias in (False, True)
}


@pytest.fixture(params=SHAPES)
def made(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Architecture, Path, Path]:
    """An architecture, a checkpoint of it and a placement."""
    axis, experts, bias = SHAPES[request.param]
    architecture, tensors = fused(axis, experts=experts, bias=bias)
    model = write_checkpoint(tmp_path / "model", tensors=tensors, shards=2)
    with Checkpoint(model) as checkpoint:
        blocks = find_blocks(checkpoint, architecture)
    placement = write_random_placement(model, tmp_path / "placement", blocks=blocks)
    return architecture, model, placement


def lay_out(made: tuple[Architecture, Path, Path], output: Path, **options: Any) -> Path:
    architecture, model, placement = made
    with Checkpoint(model) as checkpoint, Placement(placement) as opened:
        blocks = find_blocks(checkpoint, architecture)
        plan = plan_relayout(checkpoint, blocks, opened, RelayoutOptions(**options))
        write_layout(plan, checkpoint, opened, output)
    return output


def elements(tensor: RawTensor) -> np.ndarray[Any, np.dtype[np.uint16]]:
    return np.frombuffer(tensor.data, dtype=np.uint16).reshape(tensor.shape)


def matrices_of(model: Path, block_id: str) -> dict[str, np.ndarray[Any, np.dtype[np.uint16]]]:
    """Gate, up and down of a block as `[neurons, hidden]`, by plain slicing; and the biases of gate and up."""
    tensors: dict[str, RawTensor] = {}
    for path in model.glob("*.safetensors"):
        tensors |= decode(path)
    _, layer, *expert = block_id.replace(".experts", "").split(".")
    names = [f"layers.{layer}.{name}" for name in ("both", "down", "both_bias")]
    both, down, bias = (elements(tensors[name]) if name in tensors else None for name in names)
    assert both is not None
    assert down is not None
    if expert:
        both, down = both[int(expert[0])], down[int(expert[0])]
        bias = None if bias is None else bias[int(expert[0])]
    if both.shape[0] == HIDDEN:
        both, down = both.T, down.T
    found = {"gate": both[:NEURONS], "up": both[NEURONS:], "down": down.T}
    if bias is not None:
        found |= {"gate.bias": bias[:NEURONS], "up.bias": bias[NEURONS:]}
    return found


@pytest.fixture(params=["whole", "three lines"])
def some_lines_at_a_time(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """As large tensors are moved; where only the whole will do, it still comes whole."""
    if request.param == "three lines":
        for module in (gathering, comparison, permuting, unbundling):
            monkeypatch.setattr(
                module,
                "stretches",
                lambda lines, pitch, most, multiple=1: stretches(
                    lines, pitch, 3 * pitch if most == pipeline.PIECE else most, multiple
                ),
            )


@pytest.mark.usefixtures("some_lines_at_a_time")
@pytest.mark.parametrize("resident", ["none", "gate"])
def test_bundles_hold_every_part_and_the_source_comes_back(
    made: tuple[Architecture, Path, Path], tmp_path: Path, resident: str
) -> None:
    _, model, placement = made
    layout = lay_out(made, tmp_path / "flash", resident=resident)
    with Placement(placement) as opened, FlashReader(layout) as reader:
        assert [block.id for block in reader.blocks] == [block.id for block in opened.info.blocks]
        for block in reader.blocks:
            expected = matrices_of(model, block.id)
            order = opened.blocks[block.id].order
            roles = ["gate", "up", "down"] if resident == "none" else ["up", "down"]
            bundles = reader.read_bundles(block, np.arange(NEURONS, dtype=np.int32)).bundles.view(np.uint16)
            assert np.array_equal(bundles, np.concatenate([expected[role][order] for role in roles], axis=1))
            kept = reader.resident(block)
            if resident == "gate":
                assert np.array_equal(
                    kept["gate", "rows"].view(np.uint16).reshape(NEURONS, HIDDEN), expected["gate"][order]
                )
            for role in ("gate", "up"):
                if f"{role}.bias" in expected:
                    assert np.array_equal(kept[role, "bias"].view(np.uint16), expected[f"{role}.bias"][order])
    assert verify(model, layout).tensors == len(decode_all(model))
    with open_layout(layout) as opened_layout:
        restore_layout(opened_layout, tmp_path / "restored")
    assert files_of(tmp_path / "restored") == files_of(model)


def decode_all(model: Path) -> dict[str, RawTensor]:
    return {name: tensor for path in model.glob("*.safetensors") for name, tensor in decode(path).items()}


@pytest.mark.usefixtures("some_lines_at_a_time")
def test_a_permuted_layout_moves_every_part_within_its_tensor(
    made: tuple[Architecture, Path, Path], tmp_path: Path
) -> None:
    _, model, placement = made
    layout = lay_out(made, tmp_path / "permuted", layout="permuted")
    with Placement(placement) as opened:
        for block in opened.info.blocks:
            before, after = matrices_of(model, block.id), matrices_of(layout, block.id)
            for role, matrix in before.items():
                assert np.array_equal(after[role], matrix[opened.blocks[block.id].order])
    assert verify(model, layout).mode == "full"
    with open_layout(layout) as opened_layout:
        restore_layout(opened_layout, tmp_path / "restored")
    assert files_of(tmp_path / "restored") == files_of(model)


@pytest.mark.parametrize("kind", ["bundled", "permuted"])
def test_a_flipped_bit_is_named_with_its_neuron(
    made: tuple[Architecture, Path, Path], tmp_path: Path, kind: str
) -> None:
    _, model, placement = made
    layout = lay_out(made, tmp_path / "layout", layout=kind)
    with Checkpoint(model) as checkpoint:
        place = checkpoint.place("layers.1.both")
        position = place.file.header.data_start + place.entry.stop - 1
        path = place.file.path
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)
    with Checkpoint(model) as checkpoint, Placement(placement) as opened:
        # The last byte of the tensor is in its sample: the fingerprint tells the models apart.
        assert checkpoint.fingerprint != opened.info.model["fingerprint"]
        last = opened.info.blocks[-1]
        slot = int(np.flatnonzero(opened.blocks[last.id].order == NEURONS - 1)[0])
        from neuralink_cli.rewriting.comparison import neuron_at

        with open_layout(layout) as opened_layout:
            said = neuron_at(opened_layout, "layers.1.both", place.entry.nbytes - 1)
    assert said == f": {last.id}, neuron {NEURONS - 1}, slot {slot}"


@pytest.mark.parametrize("kind", ["bundled", "permuted"])
def test_every_number_about_a_region_is_checked(
    made: tuple[Architecture, Path, Path], tmp_path: Path, kind: str
) -> None:
    _, model, _ = made
    layout = lay_out(made, tmp_path / "layout", layout=kind, resident="gate" if kind == "bundled" else "none")
    path = layout / ("model.flash.json" if kind == "bundled" else "model.permuted.json")
    document = json.loads(path.read_text())
    keys = ("source_start", "source_pitch", "start", "pitch", "lines", "line_bytes", "expert")
    numbers = [(way, value) for way, value in leaves(document) if way[-1] in keys and isinstance(value, int)]
    assert len(numbers) > 10
    for position, (way, value) in enumerate(numbers):
        if way[-1] == "expert" and not any(k["kind"] == "output_bias" for k in document["blocks"][way[1]]["resident"]):
            # A number for the runtime, which nothing else in the layout says.
            continue
        # One change each, in turn: neighbouring blocks of a kind get the others.
        put(document, way, (value + 1, value + 2 * HIDDEN, 10**15)[position % 3])
        seal(path, document)
        with pytest.raises((InputError, VerificationError)):
            verify(model, layout, quick=True)
        put(document, way, value)
    seal(path, document)
    verify(model, layout, quick=True)


def resized(name: str, *shape: int) -> Callable[[dict[str, RawTensor]], object]:
    return lambda tensors: tensors.update({name: random_tensor(np.random.default_rng(0), "BF16", *shape)})


WRONG: dict[str, tuple[Callable[[dict[str, RawTensor]], object], type[NeuralinkError], str]] = {
    "odd number of rows": (
        resized("layers.0.both", EXPERTS, 2 * NEURONS + 1, HIDDEN), InputError, "does not split into 2 equal parts",
    ),
    "no stack": (resized("layers.0.both", 2 * NEURONS, HIDDEN), InputError, "has 0 experts"),
    "fewer experts in the other tensor": (
        resized("layers.1.down", EXPERTS - 1, HIDDEN, NEURONS), UnsupportedError, "its parts",
    ),
    "more experts in the other tensor": (
        resized("layers.1.down", EXPERTS + 1, HIDDEN, NEURONS), UnsupportedError, "its parts do not fill it",
    ),
    "other neurons": (resized("layers.1.down", EXPERTS, HIDDEN, NEURONS + 1), InputError, "does not fit"),
    "bias of another size": (resized("layers.1.both_bias", EXPERTS, 2 * NEURONS + 1), InputError, "has shape"),
    "bias of fewer experts": (resized("layers.1.both_bias", EXPERTS - 1, 2 * NEURONS), InputError, "for each expert"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_refuses(tmp_path: Path, name: str) -> None:
    change, kind, complaint = WRONG[name]
    architecture, tensors = fused(0, experts=True, bias=True)
    change(tensors)
    model = write_checkpoint(tmp_path / "model", tensors=tensors)
    with Checkpoint(model) as checkpoint, pytest.raises(kind, match=complaint):
        find_blocks(checkpoint, architecture)


def test_an_expert_too_few_or_too_many_against_the_config_is_refused(tmp_path: Path) -> None:
    architecture, tensors = fused(0, experts=True, bias=False)
    for count in (EXPERTS - 1, EXPERTS + 1):
        model = write_checkpoint(tmp_path / str(count), tensors=tensors, config={"experts": count})
        with (
            Checkpoint(model) as checkpoint,
            pytest.raises(InputError, match=f"has 3 experts, but config.json says {count}"),
        ):
            find_blocks(checkpoint, architecture)
