from __future__ import annotations

import shutil
from collections import namedtuple
from pathlib import Path

import pytest

from neuralink_cli.architectures.choice import choose_architecture
from neuralink_cli.architectures.find_blocks import find_blocks
from neuralink_cli.checkpoint.checkpoint import Checkpoint
from neuralink_cli.checkpoint.file_names import FLASH_INDEX, PERMUTED_INDEX
from neuralink_cli.checkpoint.model_description import describe
from neuralink_cli.errors import OutputError
from neuralink_cli.files.header import Header
from neuralink_cli.layout.open_layout import open_layout
from neuralink_cli.layout.plan import RelayoutOptions
from neuralink_cli.placement.placement import Placement
from neuralink_cli.rewriting.held_memory import held_while_comparing, held_while_restoring, record_bytes
from neuralink_cli.rewriting.planning import plan_relayout
from neuralink_cli.rewriting.relayout import estimate_relayout
from neuralink_cli.rewriting.restore import estimate_restore
from neuralink_cli.rewriting.unbundling import tensor_sections
from neuralink_cli.rewriting.verify import estimate_verify
from neuralink_cli.streaming import estimate, pipeline
from neuralink_cli.streaming.estimate import Estimate
from tests.damage import KINDS
from tests.layouts import LayoutFactory, Made, relayout

Usage = namedtuple("Usage", "total used free")


def size_of(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.glob("*.safetensors"))


def of_relayout(made: Made, output: Path) -> Estimate:
    with Checkpoint(made.model) as checkpoint, Placement(made.placement) as placement:
        blocks = find_blocks(checkpoint, choose_architecture(describe(checkpoint)))
        plan = plan_relayout(checkpoint, blocks, placement, RelayoutOptions())
        return estimate_relayout(plan, checkpoint, output)


def test_bytes_and_memory_are_those_of_the_run(
    tmp_path: Path, layouts: LayoutFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = layouts.bundled("llama", shards=2)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**9, 0, 123_456_789))
    # The config and the tokenizer; the card is part of the weights' file.
    beside = sum((made.layout / name).stat().st_size for name in ("config.json", "tokenizer.json"))
    expected = of_relayout(made, tmp_path / "out")
    assert (expected.bytes_read, expected.bytes_written) == (
        size_of(made.model) + beside,
        size_of(made.layout) + beside,
    )
    assert expected.free_bytes == 123_456_789
    assert expected.memory_bytes > 37 * 3 * 20 * 4 + 20_000_000
    with Checkpoint(made.model) as checkpoint, open_layout(made.layout) as layout:
        verified = estimate_verify(layout, checkpoint)
        assert verified.bytes_read == size_of(made.model) + size_of(made.layout) + 2 * beside
        assert verified.bytes_written == 0
        assert verified.free_bytes is None
        restored = estimate_restore(layout, tmp_path / "model")
        assert restored.bytes_read == 2 * size_of(made.layout) + beside
        assert restored.bytes_written == size_of(made.model) + beside


@pytest.mark.parametrize("kind", KINDS)
def test_a_short_run_is_not_sampled(tmp_path: Path, layouts: LayoutFactory, kind: str) -> None:
    made = layouts.of_kind(kind)
    with Checkpoint(made.model) as checkpoint, open_layout(made.layout) as layout:
        assert estimate_verify(layout, checkpoint).seconds is None
        assert estimate_restore(layout, tmp_path / "out").seconds is None


def test_a_sample_leaves_nothing_behind(
    tmp_path: Path, layouts: LayoutFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(estimate, "_WORTH_SAMPLING", 1)
    monkeypatch.setattr(pipeline, "PIECE", 4096)
    made = layouts.bundled("llama", shards=2)
    # A clock that goes a second further each time it is looked at.
    ticks = iter(range(10**6))
    monkeypatch.setattr("time.perf_counter", lambda: float(next(ticks)))
    monkeypatch.setattr(estimate, "_MOST_SECONDS", 10**6)
    expected = of_relayout(made, tmp_path / "out")
    assert expected.seconds is not None
    assert expected.seconds > 0
    assert not any(tmp_path.iterdir())
    with Checkpoint(made.model) as checkpoint, open_layout(made.layout) as layout:
        assert estimate_verify(layout, checkpoint).seconds is not None


def test_what_an_earlier_run_left_counts_as_free(
    tmp_path: Path, layouts: LayoutFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = layouts.bundled("llama", shards=2)
    needed = size_of(made.layout) + (4 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**9, 0, needed - 100_000))
    with pytest.raises(OutputError, match="bytes of disk"):
        relayout(made.model, made.placement, tmp_path / "out")
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "x").write_bytes(bytes(200_000))
    assert of_relayout(made, tmp_path / "out").free_bytes == needed + 100_000
    relayout(made.model, made.placement, tmp_path / "out")


def rebuilt_bytes(header: Header) -> int:
    """What is kept of the tensors of a file while it is rebuilt."""
    return 1024 * len(header.entries)


def test_memory_is_what_waits_on_each_side_and_what_is_held(
    tmp_path: Path, layouts: LayoutFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = layouts.bundled("llama", shards=2)
    monkeypatch.setattr(estimate, "program_bytes", lambda: 0)
    monkeypatch.setattr(pipeline, "AHEAD", 5000)
    monkeypatch.setattr(pipeline, "BEHIND", 3000)
    monkeypatch.setattr(pipeline, "PIECE", 1000)
    with Checkpoint(made.model) as checkpoint, open_layout(made.layout) as layout:
        # Both sides are read ahead.
        held = held_while_comparing(layout, checkpoint) + record_bytes(2)
        assert estimate_verify(layout, checkpoint).memory_bytes == round(1.06 * (2 * 5000 + held))
        headers = layout.source_headers.values()
        held = max(held_while_restoring(layout, header) + rebuilt_bytes(header) for header in headers)
        assert estimate_restore(layout, tmp_path / "out").memory_bytes == round(1.06 * (5000 + 3000 + held))
        # No more than there is.
        monkeypatch.setattr(pipeline, "AHEAD", 1 << 30)
        held = held_while_comparing(layout, checkpoint) + record_bytes(2)
        both = size_of(made.model) + size_of(made.layout)
        assert estimate_verify(layout, checkpoint).memory_bytes == round(1.06 * (both + held))
        # For a file of the source at a time, of which there are two; the layout is checked before.
        most = size_of(made.layout)
        for header in layout.source_headers.values():
            sections = tuple(tensor_sections(layout, header.entries))
            read = sum(each.size for section in sections for each in section.reads)
            assert read < size_of(made.layout)
            most = max(most, read + 3000 + held_while_restoring(layout, header) + rebuilt_bytes(header))
        assert estimate_restore(layout, tmp_path / "out").memory_bytes == round(1.06 * most)
    held = 37 * 3 * 20 * 4 + record_bytes(2)
    assert of_relayout(made, tmp_path / "out").memory_bytes == round(1.06 * (size_of(made.model) + 3000 + held))


def test_a_sample_is_no_part_of_what_programs_take(
    tmp_path: Path, layouts: LayoutFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = 1000

    def sampled(*_: object) -> float:
        nonlocal taken
        taken = 10**9
        return 1.0

    made = layouts.bundled("llama", shards=2)
    monkeypatch.setattr(estimate, "_WORTH_SAMPLING", 1)
    monkeypatch.setattr(estimate, "_seconds", sampled)
    monkeypatch.setattr(estimate, "resident_bytes", lambda: taken)
    assert of_relayout(made, tmp_path / "out").memory_bytes < 10**9
    assert taken == 10**9


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_layout_says_of_itself_is_planned_as_large_as_it_is(layouts: LayoutFactory, kind: str) -> None:
    """Of thousands of experts it is no small part of what the disk must have room for."""
    made = layouts.of_kind(kind, "llama", layers=40)
    with Checkpoint(made.model) as checkpoint, Placement(made.placement) as placement:
        blocks = find_blocks(checkpoint, choose_architecture(describe(checkpoint)))
        plan = plan_relayout(checkpoint, blocks, placement, RelayoutOptions(layout=kind))
        index = made.layout / {"bundled": FLASH_INDEX, "permuted": PERMUTED_INDEX}[kind]
        beside = placement.size if kind == "permuted" else 0
    # The rest says the same for any number of blocks.
    assert 0.9 * (index.stat().st_size - 8000) < plan.own_bytes - beside < 1.2 * index.stat().st_size
