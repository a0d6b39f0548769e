from __future__ import annotations

import json
import logging
from math import prod
from pathlib import Path

import numpy as np
import pytest

from neuralink_cli.checkpoint.checkpoint import Checkpoint
from neuralink_cli.clustering.cluster import ClusterOptions, cluster
from neuralink_cli.devices.cost import collapse_gap
from neuralink_cli.devices.device import DeviceModel
from neuralink_cli.errors import MismatchError, NeuralinkError, OptionError, UnsupportedError
from neuralink_cli.files.header import parse_header
from neuralink_cli.layout.bundled_layout import BundledLayout
from neuralink_cli.layout.plan import BundledPlan, RelayoutOptions
from neuralink_cli.placement.placement import PlacementBlock
from neuralink_cli.rewriting.planning import plan_bundled
from tests.checkpoints import (
    ELEMENT_BYTES,
    HIDDEN,
    NEURONS,
    RawTensor,
    blocks_of,
    random_tensor,
    tensors_of,
    write_checkpoint,
    write_random_placement,
    write_random_trace,
)
from tests.layouts import LayoutFactory, relayout

BYTES = {**ELEMENT_BYTES, "I32": 4}


def plan_of(model: Path, *, resident: str = "none", alignment: int = 4096) -> BundledPlan:
    with Checkpoint(model) as checkpoint:
        blocks = blocks_of(checkpoint)
        placed = {
            block.id: PlacementBlock(
                block.id, block.neurons, "relu", 0.5, 400, "linked", 3, block.bundle_bytes, 2.5, 2, ()
            )
            for block in blocks
        }
        return plan_bundled(checkpoint, blocks, placed, resident=resident, alignment=alignment)


@pytest.mark.parametrize("alignment", [1, 8, 512, 4096, 65_536])
@pytest.mark.parametrize("dtype", ["F8_E4M3", "BF16", "F32", "F64"])
@pytest.mark.parametrize("family", ["opt", "llama"])
def test_bundles_start_on_multiples_of_the_alignment(
    layouts: LayoutFactory, family: str, dtype: str, alignment: int
) -> None:
    plan = plan_of(layouts.checkpoint(family, dtype=dtype)[0], alignment=alignment)
    assert plan.header.data_start % max(alignment, 8) == 0
    parts = 3 if family == "llama" else 2
    for block in plan.blocks:
        assert block.bundles.offset % alignment == 0
        assert block.stride == parts * HIDDEN * ELEMENT_BYTES[dtype]
        assert block.bundles.bytes == NEURONS * block.stride
        assert [part.offset for part in block.parts] == [k * HIDDEN * ELEMENT_BYTES[dtype] for k in range(parts)]
    # Without a hole between them that is larger than it must be.
    first, second = (block.bundles for block in plan.blocks)
    assert first.offset == plan.header.data_start
    assert second.offset == -(-(first.offset + first.bytes) // alignment) * alignment
    assert plan.file_bytes == plan.header.data_start + plan.header.data_bytes


@pytest.mark.parametrize("alignment", [1, 8, 4096])
@pytest.mark.parametrize("dtype", ["F8_E4M3", "BF16", "F32", "F64"])
@pytest.mark.parametrize("resident", ["none", "gate"])
def test_the_other_tensors_are_naturally_aligned(
    layouts: LayoutFactory, resident: str, dtype: str, alignment: int
) -> None:
    plan = plan_of(layouts.checkpoint("opt", dtype=dtype)[0], resident=resident, alignment=alignment)
    for entry in plan.header.entries:
        if not entry.name.endswith(".bundles"):
            assert (plan.header.data_start + entry.start) % BYTES[entry.dtype] == 0, entry


def test_the_header_is_valid_and_holds_every_tensor_once(layouts: LayoutFactory) -> None:
    model, _ = layouts.checkpoint("llama", shards=2)
    plan = plan_of(model, resident="gate")
    assert parse_header(plan.header.raw, plan.header.data_bytes, "x").entries == plan.header.entries
    names = {entry.name for entry in plan.header.entries}
    moved = {name for name in tensors_of("llama") if ".mlp." in name}
    kept = set(tensors_of("llama")) - moved
    made = {f"layers.{layer}.{what}" for layer in range(2) for what in ("bundles", "order", "frequency", "gate")}
    files = {f"model-0000{k}-of-00002.safetensors" for k in (1, 2)} | {"model.safetensors.index.json", "README.md"}
    padding = {name for name in names if name.startswith("padding.")}
    assert names == kept | made | {f"source.{name}" for name in files} | padding | {"ordering_sequences"}
    for entry in plan.header.entries:
        assert entry.nbytes == prod(entry.shape) * BYTES[entry.dtype]


def test_what_is_resident(layouts: LayoutFactory) -> None:
    bundled = {"opt": ["down"], "llama": ["up", "down"], "gpt2": ["down"]}
    for family, roles in bundled.items():
        model, _ = layouts.checkpoint(family)
        for block in plan_of(model, resident="gate").blocks:
            assert [part.role for part in block.parts] == roles
            rows = [tensor for tensor in block.resident if tensor.kind == "rows"]
            assert [tensor.role for tensor in rows] == ["gate" if family == "llama" else "up"]
            assert rows[0].place.shape == (NEURONS, HIDDEN)
        for block in plan_of(model).blocks:
            assert [tensor.kind for tensor in block.resident] == ([] if family == "llama" else ["bias", "output_bias"])


def test_thresholds_pinned_slots_and_gaps_are_those_of_the_placement(layouts: LayoutFactory) -> None:
    for block in plan_of(layouts.checkpoint()[0]).blocks:
        assert (block.threshold, block.pinned, block.collapse_gap) == (0.5, 3, 2)


def test_parts_of_several_dtypes_make_no_bundle(tmp_path: Path) -> None:
    name = "model.decoder.layers.1.fc2.weight"
    tensors = tensors_of("opt")
    tensors[name] = random_tensor(np.random.default_rng(0), "BF16", *tensors[name].shape)
    model = write_checkpoint(tmp_path / "model", tensors=tensors)
    with pytest.raises(
        UnsupportedError, match=r"parts of layers.1 differ in dtype \(.*fc1.weight F32, .*fc2.weight BF16"
    ):
        plan_of(model)
    # As an ordinary checkpoint it can be written all the same.
    placement = write_random_placement(model, tmp_path / "placement")
    relayout(model, placement, tmp_path / "permuted", layout="permuted")


@pytest.mark.parametrize(
    "name", ["layers.0.bundles", "layers.1.order", "layers.0.frequency", "layers.0.up.bias", "source.README.md"]
)
def test_a_source_that_uses_a_name_of_the_layout_is_refused(tmp_path: Path, name: str) -> None:
    tensors = {**tensors_of("opt"), name: random_tensor(np.random.default_rng(0), "U8", 3)}
    with pytest.raises(UnsupportedError, match=f"cannot be laid out: tensor '{name}' is written twice"):
        plan_of(write_checkpoint(tmp_path / "model", tensors=tensors))


def test_a_source_may_have_tensors_called_padding(tmp_path: Path) -> None:
    tensors = {**tensors_of("opt"), "padding.weight": random_tensor(np.random.default_rng(0), "U8", 3)}
    assert "padding.weight" in {
        e.name for e in plan_of(write_checkpoint(tmp_path / "m", tensors=tensors)).header.entries
    }


WRONG_OPTIONS: list[tuple[RelayoutOptions, str]] = [
    *((RelayoutOptions(alignment=n), f"--alignment {n} is not a power of two up to 16777216") for n in
      (0, -4096, 3, 4095, 12288, 1 << 25)),
    (RelayoutOptions(layout="permuted", resident="gate"), "--resident needs --layout bundled"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "complaint"), WRONG_OPTIONS)
def test_refuses_options(tmp_path: Path, layouts: LayoutFactory, options: RelayoutOptions, complaint: str) -> None:
    model, placement = layouts.checkpoint()
    with pytest.raises(OptionError, match=complaint):
        relayout(model, placement, tmp_path / "out", **vars(options))
    assert not any(tmp_path.iterdir())


def test_refuses_the_placement_of_another_model(tmp_path: Path, layouts: LayoutFactory) -> None:
    model, _ = layouts.checkpoint("opt")
    other, placement = layouts.checkpoint("opt", seed=7)
    with pytest.raises(MismatchError) as caught:
        relayout(model, placement, tmp_path / "out")
    with Checkpoint(model) as checkpoint, Checkpoint(other) as another:
        fingerprints = another.fingerprint[:12], checkpoint.fingerprint[:12]
    assert str(caught.value) == (
        f"{placement}: was made for the model with fingerprint {fingerprints[0]}, but {model} has {fingerprints[1]}; "
        "profile and cluster this checkpoint"
    )
    assert not any(tmp_path.iterdir())


def test_refuses_a_placement_of_other_blocks(tmp_path: Path) -> None:
    """Of the same tensors, but a config that says that there are fewer layers."""
    model = write_checkpoint(tmp_path / "model")
    placement = write_random_placement(model, tmp_path / "placement")
    (model / "config.json").write_text('{"model_type": "opt", "num_hidden_layers": 1}')
    with pytest.raises(MismatchError, match=r"placement: does not fit the checkpoint's blocks \(first at layers.1\)"):
        relayout(model, placement, tmp_path / "out")


def test_refuses_a_placement_for_another_activation(tmp_path: Path) -> None:
    """Its thresholds say nothing of a model whose config, which no fingerprint covers, was changed since."""
    model = write_checkpoint(tmp_path / "model", "llama")
    placement = write_random_placement(model, tmp_path / "placement")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "hidden_act": "relu"}))
    for layout in ("bundled", "permuted"):
        with pytest.raises(
            MismatchError, match=r"was made for activation 'silu' in layers\.0, which is 'relu' by now; profile and"
        ):
            relayout(model, placement, tmp_path / "out", layout=layout)


def test_every_refusal_is_an_expected_one(tmp_path: Path) -> None:
    """Biases and blocks of odd dtypes: either they are laid out or refused for a reason."""
    for dtype, size in (("F4", 36 // 2), ("F6_E3M2", 36 * 6 // 8), ("BOOL", 36), ("C64", 36 * 8), ("F8_E8M0", 36)):
        tensors = tensors_of("opt", neurons=36)
        for layer in range(2):
            tensors[f"model.decoder.layers.{layer}.fc1.bias"] = RawTensor(dtype, (36,), bytes(size))
        model = write_checkpoint(tmp_path / dtype, tensors=tensors)
        try:
            plan = plan_of(model)
        except NeuralinkError as error:
            assert dtype.startswith(("F4", "F6"))
            assert "not whole bytes" in str(error)
        else:
            assert {t.place.dtype for block in plan.blocks for t in block.resident if t.kind == "bias"} == {dtype}


def test_plans_do_not_depend_on_the_order_of_the_source(tmp_path: Path) -> None:
    tensors = tensors_of("opt")
    one = plan_of(write_checkpoint(tmp_path / "a", tensors=tensors))
    two = plan_of(write_checkpoint(tmp_path / "b", tensors=dict(reversed(tensors.items()))))
    # Only the stored header of the source differs.
    assert one.blocks == two.blocks
    assert [entry.name for entry in one.header.entries] == [entry.name for entry in two.header.entries]


@pytest.mark.parametrize("resident", ["none", "gate"])
def test_the_gap_is_for_the_bundles_that_are_written(
    layouts: LayoutFactory, tmp_path: Path, caplog: pytest.LogCaptureFixture, resident: str
) -> None:
    """Whatever bundles the order was made for; that they differ is told."""
    caplog.set_level(logging.INFO, "neuralink_cli")
    model, _ = layouts.checkpoint("llama")
    device = DeviceModel("coarse", 8, 1e-5, 1e9, page_bytes=1)
    trace = write_random_trace(model, tmp_path / "trace")
    cluster(trace, tmp_path / "placement", ClusterOptions(device, effort="fast"))
    plan = relayout(model, tmp_path / "placement", tmp_path / "layout", resident=resident)
    assert plan.bundled is not None
    for block in plan.bundled.blocks:
        assert block.stride == (2 if resident == "gate" else 3) * HIDDEN * 4
        assert block.collapse_gap == collapse_gap(1e-5 * 1e9 / block.stride)
    told = "the order was made for bundles of" in caplog.text
    assert told == (resident == "gate")
    assert ("`cluster --resident gate` makes it for them" in caplog.text) == told
    with BundledLayout(tmp_path / "layout") as layout:
        assert [b.collapse_gap for b in layout.index.blocks] == [b.collapse_gap for b in plan.bundled.blocks]
