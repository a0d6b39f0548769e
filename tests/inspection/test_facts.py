from __future__ import annotations

from collections.abc import Set as AbstractSet
from pathlib import Path

import pytest

from neuralink_cli.activations.trace import Trace
from neuralink_cli.checkpoint.checkpoint import Checkpoint
from neuralink_cli.inspection.checkpoint_facts import read_checkpoint
from neuralink_cli.inspection.facts import kept_in_dram, read_facts
from neuralink_cli.inspection.inspect import inspect
from neuralink_cli.inspection.kinds import recognise
from neuralink_cli.layout.open_layout import open_layout
from neuralink_cli.placement.placement import STORED, Placement
from neuralink_cli.placement.planned_size import placement_bytes
from tests.checkpoints import blocks_of, write_random_trace
from tests.layouts import LayoutFactory


@pytest.mark.parametrize("family", ["opt", "llama"])
def test_a_checkpoint_is_counted_tensor_by_tensor(layouts: LayoutFactory, family: str) -> None:
    model, _ = layouts.checkpoint(family)
    facts = read_checkpoint(model)
    with Checkpoint(model) as checkpoint:
        sizes = {name: place.entry.nbytes for name, place in checkpoint.tensors.items()}
        blocks = blocks_of(checkpoint)
    of_blocks = {part.weight for block in blocks for part in block.parts}
    assert facts.bytes == sum(sizes.values()) == sum(facts.dtypes.values())
    assert facts.covered_bytes == facts.ffn_bytes == sum(sizes[name] for name in of_blocks)
    assert facts.ffn_share == facts.covered_bytes / facts.bytes
    assert sum(group.count for group in facts.blocks) == len(blocks)
    assert facts.problem is None
    assert facts.runs
    # OPT has a ReLU, which needs no threshold.
    assert facts.needs_ratio == any(block.activation != "relu" for block in blocks)


@pytest.mark.parametrize("resident", ["none", "gate"])
def test_what_a_layout_keeps_in_dram_is_all_but_its_bundles(layouts: LayoutFactory, resident: str) -> None:
    made = layouts.bundled("opt", resident=resident)
    facts = read_facts(recognise(made.layout))
    with Checkpoint(made.model) as checkpoint:
        total = checkpoint.total_bytes
        blocks = blocks_of(checkpoint)
    assert facts.flash_bytes is not None
    # Every weight of the source is in flash or in DRAM; bundles that are pinned are in both.
    assert facts.flash_bytes + facts.dram_bytes["dense"] + facts.dram_bytes["resident"] == total
    kept = 1 if resident == "gate" else 2
    element = blocks[0].parts[0].element_bytes
    assert facts.flash_bytes == sum(block.neurons * block.hidden * element * kept for block in blocks)
    with Placement(made.placement) as placement:
        pinned = [block.pinned for block in placement.info.blocks]
        assert [block.pinned for block in facts.blocks] == pinned
        assert facts.digests["placement"] == placement.content_sha256
        assert facts.model == placement.info.model
        stored = [gain for gain in placement.info.gains if gain.order == STORED]
    assert list(facts.gains) == stored
    strides = [block.bundle_bytes or 0 for block in facts.blocks]
    assert facts.dram_bytes["pinned"] == sum(a * b for a, b in zip(pinned, strides, strict=True))


class Counted(frozenset[str]):
    """Names of which it is known how often others were taken away from them all."""

    times = 0

    def __sub__(self, other: AbstractSet[object]) -> frozenset[str]:
        Counted.times += 1
        return super().__sub__(other)


def test_the_names_of_a_source_are_gone_through_once(layouts: LayoutFactory) -> None:
    """And not for every tensor: a model with thousands of experts has tens of thousands."""
    made = layouts.bundled("opt", resident="gate")
    with Checkpoint(made.model) as checkpoint, open_layout(made.layout) as layout:
        assert layout.kind == "bundled"
        names = Counted(checkpoint.tensors)
        kept = kept_in_dram(layout.index.blocks, layout.file.header.entries, names)
    assert kept == read_facts(recognise(made.layout)).dram_bytes
    assert Counted.times == 1


def test_a_trace_names_its_data_and_what_ordering_it_takes(layouts: LayoutFactory, tmp_path: Path) -> None:
    model, _ = layouts.checkpoint()
    found = inspect(write_random_trace(model, tmp_path / "trace"), check=True)
    document = found.as_document()
    assert [(source["name"], source["tokens"]) for source in document["data"]] == [("text.txt", 600)]
    assert document["options"] == {"batch_size": 8}
    assert document["checked"] == ["content digest"]
    with Trace(tmp_path / "trace") as trace:
        assert document["digests"] == {"content": trace.content_sha256}
        neurons = sum(block.neurons for block in trace.info.blocks)
        needed = {need.what: need.bytes for need in found.needs}["disk for the placement"]
        assert needed == placement_bytes(trace) > 12 * neurons
