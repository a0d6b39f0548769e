"""Bundles read by slot are the bytes of the checkpoint, whatever is asked for, however it is planned."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from neuralink_cli.devices.device import builtin_devices
from neuralink_cli.errors import InputError, VerificationError
from neuralink_cli.layout.names import FLASH_FILE
from neuralink_cli.layout.plan import FlashBlock
from neuralink_cli.placement.placement import Placement
from neuralink_cli.storage.read_planning import ReadPlan, plan_with_gap
from neuralink_cli.storage.reader import BundleReads, FlashReader
from tests.checkpoints import HIDDEN, NEURONS, decode
from tests.layouts import LayoutFactory, Made

CopyOf = Callable[[Made], Path]
PARTS = {"opt": ("fc1", "fc2"), "llama": ("gate_proj", "up_proj", "down_proj"), "gpt2": ("c_fc", "c_proj")}


def expected_bundles(made: Made, family: str, layer: int, itemsize: int, resident: str) -> np.ndarray:
    """Bundles by neuron, put together from the checkpoint in another way."""
    tensors = decode(made.model / "model.safetensors")
    neurons = []
    for part in PARTS[family][resident == "gate" :]:
        (name,) = [n for n in tensors if f".{layer}." in n and n.endswith(f"{part}.weight")]
        raw = np.frombuffer(tensors[name].data, dtype=np.uint8).reshape(*tensors[name].shape, itemsize)
        by_neuron = raw if tensors[name].shape[0] == NEURONS else raw.swapaxes(0, 1)
        neurons.append(by_neuron.reshape(NEURONS, HIDDEN * itemsize))
    return np.concatenate(neurons, axis=1)


def check(got: BundleReads, expected: np.ndarray, asked: list[int], order: np.ndarray, stride: int) -> None:
    assert got.bundles.shape == (len(got.slots), stride)
    assert np.array_equal(got.bundles, expected[order[got.slots]])
    assert got.slots[got.wanted].tolist() == asked
    assert (np.diff(got.slots) > 0).all()
    assert got.bytes_useful == len(asked) * stride
    assert got.bytes_read >= len(got.slots) * stride
    assert got.seconds >= 0


@pytest.mark.parametrize("direct", [None, False])
@pytest.mark.parametrize("resident", ["none", "gate"])
@pytest.mark.parametrize(("family", "dtype", "itemsize"), [("opt", "F32", 4), ("llama", "BF16", 2), ("gpt2", "U8", 1)])
def test_bundles_are_the_checkpoints(
    layouts: LayoutFactory, family: str, dtype: str, itemsize: int, resident: str, direct: bool | None
) -> None:
    made = layouts.bundled(family, dtype=dtype, resident=resident)
    with FlashReader(made.layout, direct=direct) as reader, Placement(made.placement) as placement:
        assert direct is None or not reader.direct
        for layer, block in enumerate(reader.blocks):
            expected = expected_bundles(made, family, layer, itemsize, resident)
            order = placement.blocks[block.id].order
            assert np.array_equal(reader.order(block), order)
            assert np.array_equal(reader.frequency(block), placement.blocks[block.id].frequency)
            for asked in (
                [],
                [0],
                [NEURONS - 1],
                [0, 1, 2, 9, 30, 36],
                list(range(NEURONS)),
                list(range(0, NEURONS, 7)),
            ):
                check(reader.read_bundles(block, asked), expected, asked, order, block.stride)
                check(reader.read_bundles(block, asked, plan_with_gap(asked, 0)), expected, asked, order, block.stride)


@given(
    asked=st.sets(st.integers(0, NEURONS - 1)).map(sorted), gap=st.integers(0, 6), direct=st.sampled_from([None, False])
)
def test_any_slots_with_any_gap(layouts: LayoutFactory, asked: list[int], gap: int, direct: bool | None) -> None:
    made = layouts.bundled("opt")
    with FlashReader(made.layout, direct=direct) as reader:
        block = reader.blocks[1]
        plan = plan_with_gap(asked, gap)
        got = reader.read_bundles(block, np.array(asked, dtype=np.int64), plan)
        check(got, expected_bundles(made, "opt", 1, 4, "none"), asked, reader.order(block), block.stride)
        assert got.reads == plan.reads
        assert len(got.slots) == plan.rows


def test_resident_tensors_are_the_checkpoints(layouts: LayoutFactory) -> None:
    made = layouts.bundled("opt", resident="gate")
    tensors = decode(made.model / "model.safetensors")
    stem = "model.decoder.layers.0."
    with FlashReader(made.layout) as reader:
        block = reader.block("layers.0")
        order = reader.order(block)
        kept = reader.resident(block)
    assert set(kept) == {("up", "rows"), ("up", "bias"), ("down", "output_bias")}
    rows = np.frombuffer(tensors[f"{stem}fc1.weight"].data, dtype=np.float32).reshape(NEURONS, HIDDEN)
    assert kept["up", "rows"].tobytes() == rows[order].tobytes()
    bias = np.frombuffer(tensors[f"{stem}fc1.bias"].data, dtype=np.float32)
    assert kept["up", "bias"].tobytes() == bias[order].tobytes()
    assert kept["down", "output_bias"].tobytes() == tensors[f"{stem}fc2.bias"].data


def test_a_layout_without_resident_rows_has_the_biases(layouts: LayoutFactory) -> None:
    with FlashReader(layouts.bundled("opt").layout) as reader:
        assert set(reader.resident(reader.blocks[0])) == {("up", "bias"), ("down", "output_bias")}
    with FlashReader(layouts.bundled("llama").layout) as reader:
        assert reader.resident(reader.blocks[0]) == {}


def test_plans_follow_the_block_or_the_device(layouts: LayoutFactory) -> None:
    made = layouts.bundled("opt")
    asked = [0, 5, 11, 12, 30]
    with FlashReader(made.layout) as reader:
        block = reader.blocks[0]
        assert block.collapse_gap == 4
        assert reader.plan(block, asked).first.tolist() == [0, 11, 30]
        assert reader.read_bundles(block, asked).reads == 3
    # Bundles of 160 bytes: no gap in sight is worth another operation.
    with FlashReader(made.layout, device=builtin_devices()["ufs4.0"]) as reader:
        assert reader.plan(block, asked).first.tolist() == [0]
        got = reader.read_bundles(block, asked)
        assert (got.reads, got.slots.tolist()) == (1, list(range(31)))


def test_bundles_of_whole_blocks_are_not_widened_nor_copied(layouts: LayoutFactory) -> None:
    made = layouts.bundled("opt", hidden=512)
    with FlashReader(made.layout) as reader:
        block = reader.blocks[0]
        assert block.stride == 4096
        got = reader.read_bundles(block, [1, 2, 30])
        assert got.bytes_read == 3 * 4096
        assert not got.bundles.flags.owndata
        assert got.bundles.ctypes.data % 4096 == 0


def test_many_threads_may_read_at_once(layouts: LayoutFactory) -> None:
    made = layouts.bundled("opt")
    expected = [expected_bundles(made, "opt", layer, 4, "none") for layer in (0, 1)]
    with FlashReader(made.layout, queue_depth=4) as reader:

        def work(seed: int) -> None:
            random = np.random.default_rng(seed)
            for _ in range(20):
                layer = int(random.integers(2))
                block = reader.blocks[layer]
                asked = np.flatnonzero(random.random(NEURONS) < 0.4).tolist()
                check(reader.read_bundles(block, asked), expected[layer], asked, reader.order(block), block.stride)

        with ThreadPoolExecutor(8) as pool:
            for done in [pool.submit(work, seed) for seed in range(16)]:
                done.result()


def test_ranges_come_one_after_the_other(layouts: LayoutFactory) -> None:
    made = layouts.bundled("opt")
    content = (made.layout / FLASH_FILE).read_bytes()
    random = np.random.default_rng(0)
    offsets = random.integers(0, len(content) - 3000, 60)
    sizes = random.integers(1, 3000, 60)
    sizes[7] = 1
    offsets[-1] = len(content) - sizes[-1]
    expected = b"".join(content[o : o + s] for o, s in zip(offsets, sizes, strict=True))
    for direct in (None, False):
        with FlashReader(made.layout, direct=direct) as reader:
            assert reader.read_ranges(offsets, sizes).data.tobytes() == expected
            buffer = reader.range_buffer(sizes)
            for _ in range(2):
                got = reader.read_ranges(offsets, sizes, buffer)
                assert got.data.tobytes() == expected
                assert np.shares_memory(got.data, buffer)
            assert got.bytes_read >= len(expected)
            with pytest.raises(ValueError, match="too small"):
                reader.read_ranges(offsets, sizes, buffer[:100])
            assert reader.read_ranges(offsets[:0], sizes[:0]).data.size == 0


@pytest.mark.parametrize(
    ("offsets", "sizes"), [([-1], [5]), ([10**9], [1]), ([0], [10**9]), ([0], [0]), ([0, 1], [1]), ([[0]], [[1]])]
)
def test_ranges_outside_the_file_are_refused(layouts: LayoutFactory, offsets: list[int], sizes: list[int]) -> None:
    with FlashReader(layouts.bundled("opt").layout) as reader, pytest.raises(ValueError, match=r"outside|same length"):
        reader.read_ranges(np.array(offsets), np.array(sizes))


@pytest.mark.parametrize("slots", [[NEURONS], [3, 2], [3, 3], [-1], [[1]]])
def test_slots_that_are_not_there_are_refused(layouts: LayoutFactory, slots: list[int]) -> None:
    with FlashReader(layouts.bundled("opt").layout) as reader, pytest.raises(ValueError, match="slot"):
        reader.read_bundles(reader.blocks[0], slots)


def test_slots_may_be_the_beginning_of_a_longer_array(layouts: LayoutFactory) -> None:
    made = layouts.bundled("opt")
    slots = np.array([1, 2, 3, 4], dtype=np.int32)
    with FlashReader(made.layout) as reader:
        block = reader.blocks[0]
        got = reader.read_bundles(block, slots[:2], plan_with_gap(slots, 0))
        check(got, expected_bundles(made, "opt", 0, 4, "none"), [1, 2], reader.order(block), block.stride)


@pytest.mark.parametrize(
    ("first", "count"),
    [([0], [2]), ([], []), ([0, 3], [4, 3]), ([3, 0], [3, 2]), ([0], [NEURONS + 1]), ([-1], [8]), ([0, 3], [8, 0])],
)
def test_plans_that_do_not_fit_are_refused(layouts: LayoutFactory, first: list[int], count: list[int]) -> None:
    plan = ReadPlan(np.array(first, dtype=np.int32), np.array(count, dtype=np.int32))
    with FlashReader(layouts.bundled("opt").layout) as reader, pytest.raises(ValueError, match="plan"):
        reader.read_bundles(reader.blocks[0], [0, 4], plan)


def block_of(reader: FlashReader) -> FlashBlock:
    return reader.blocks[0]


def test_an_unknown_block_is_refused(layouts: LayoutFactory) -> None:
    with FlashReader(layouts.bundled("opt").layout) as reader, pytest.raises(KeyError, match=r"layers\.9"):
        reader.block("layers.9")


def test_a_truncated_file_is_refused(layouts: LayoutFactory, copy_of: CopyOf) -> None:
    layout = copy_of(layouts.bundled("opt"))
    os.truncate(layout / FLASH_FILE, (layout / FLASH_FILE).stat().st_size - 100)
    with pytest.raises(InputError, match=FLASH_FILE):
        FlashReader(layout)


def test_an_index_of_another_layout_is_refused(layouts: LayoutFactory, copy_of: CopyOf) -> None:
    layout = copy_of(layouts.bundled("opt"))
    shutil.copy(layouts.bundled("llama").layout / FLASH_FILE, layout / FLASH_FILE)
    with pytest.raises(VerificationError, match=FLASH_FILE):
        FlashReader(layout)


def test_a_file_cut_while_it_is_read_is_an_error(layouts: LayoutFactory, copy_of: CopyOf) -> None:
    layout = copy_of(layouts.bundled("opt"))
    with FlashReader(layout) as reader:
        os.truncate(layout / FLASH_FILE, reader.blocks[1].bundles.offset)
        with pytest.raises(InputError, match="ended while it was being read"):
            reader.read_bundles(reader.blocks[1], [0, 20])


def test_what_is_no_layout_is_refused(layouts: LayoutFactory, tmp_path: Path) -> None:
    for directory in (tmp_path, tmp_path / "missing", layouts.permuted("opt").layout):
        with pytest.raises(InputError):
            FlashReader(directory)


def test_closing_twice_is_harmless(layouts: LayoutFactory) -> None:
    reader = FlashReader(layouts.bundled("opt").layout)
    reader.close()
    reader.close()
    with pytest.raises(ValueError, match="closed"):
        reader.read_bundles(block_of(reader), [1])
