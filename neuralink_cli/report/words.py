"""What a report says in words: its summary, and the captions of its figures. Plain text; the page escapes it."""

from __future__ import annotations

from neuralink_cli.bench.bench import BenchRow
from neuralink_cli.devices.ratio import Ratio
from neuralink_cli.placement.placement import MIXED, ORIGINAL
from neuralink_cli.report.figures import strongest_pair
from neuralink_cli.report.measurements import Measurements
from neuralink_cli.sizes import human_bytes
from neuralink_cli.storage.policies import NO_CACHE


def summary(measured: Measurements, model: str) -> list[str]:
    """What is gained, over what, on which device, in how much DRAM, measured on what: one text per paragraph."""
    stored, original, naive = measured.stored, measured.original, measured.naive
    before, after = duration(original.figures.io_mean), duration(stored.figures.io_mean)
    device = measured.device.name
    sources = ", ".join(part.name for part in stored.by_source)
    return [
        f"{_result(stored.gain)} The FFN neurons of the model {model} are stored in {order_name(stored.way.name)}. A "
        f"token then takes {after} of reading in the mean, instead of {before} in the checkpoint's order; both are "
        f"read in the same way, with gaps read across where that is cheaper, {_in_dram(measured)}. "
        f"The times are modelled, for the device {device}.",
        f"Over naive reading, the gain is {stored.gain_over_naive}. Naive reading is the checkpoint's order with the "
        f"same DRAM, where every run of neurons that fire is a read of its own: {duration(naive.figures.io_mean)} a "
        f"token. This is what the order and reading across gaps are worth together.",
        f"Measured on {_tokens(measured)} of {sources} that made no order. In parentheses are 95 % intervals, "
        f"from a bootstrap over sequences. At a token, {stored.figures.active:,.1f} of {measured.neurons:,} neurons "
        "fire.",
    ]


def _result(gain: Ratio) -> str:
    if gain.low > 1:
        return f"Reading is {gain} times as fast."
    if gain.high < 1:
        return f"Reading is slower than in the checkpoint's order: the gain is {gain}, below 1."
    return f"No gain can be told from chance: it is {gain}."


def order_name(name: str) -> str:
    """What to call a stored order within a sentence."""
    if name == ORIGINAL:
        return "their original order"
    return "orders that differ from block to block" if name == MIXED else f"the order {name!r}"


def dram_text(row: BenchRow) -> str:
    """How much DRAM a row has."""
    if row.way.cache == NO_CACHE:
        return "with no cache in DRAM"
    return f"with {human_bytes(row.dram_bytes)} of DRAM (cache {row.way.cache}, room for {row.capacity:,} neurons)"


def _tokens(measured: Measurements) -> str:
    if measured.tokens == measured.held_out:
        return f"{measured.tokens:,} tokens"
    return f"{measured.tokens:,} of the {measured.held_out:,} tokens"


def _in_dram(measured: Measurements) -> str:
    """How much DRAM there is, and how much of the FFN it holds."""
    row = measured.stored
    if row.way.cache == NO_CACHE:
        return dram_text(row)
    share = 100 * row.capacity / measured.neurons
    return f"{dram_text(row)}, which is {share:.3g} % of all"


def duration(seconds: float) -> str:
    """A time of reading, with three digits."""
    return f"{1e3 * seconds:.3g} ms" if seconds >= 1e-3 else f"{1e6 * seconds:.3g} µs"


def figure_texts(measured: Measurements) -> dict[str, tuple[str, str]]:
    """Title and caption of every figure, by its name."""
    pictures, curve = measured.pictures, measured.curve
    cells = "" if pictures.slots_per_cell == 1 else f" A cell stands for {pictures.slots_per_cell} slots."
    block = f"block {pictures.block}, whose gain is the median"
    sample = f"{curve.tokens:,} of the {measured.held_out:,} held-out tokens"
    layers = "" if all(layer.blocks == 1 for layer in measured.layers) else " Experts of a layer are taken together."
    return {
        "fires-original": (
            "Which neurons fire: original order",
            f"Rows are {pictures.raster_tokens} held-out tokens, columns the slots of {block}.{cells} Dots that "
            "are scattered take many short reads.",
        ),
        "fires-stored": (
            "Which neurons fire: stored order",
            "The same tokens and neurons. Where those that fire together lie side by side or close to each other, one "
            "read gets them.",
        ),
        "together-original": (
            "Which neurons fire together: original order",
            f"How often two neurons of {block}, fire at the same token, for how often each of them fires: 1 if always "
            f"together. Means over neighbouring slots and {pictures.pair_tokens:,} held-out tokens. The strongest "
            f"colour of the two pictures stands for {strongest_pair(pictures):.2f}.",
        ),
        "together-stored": (
            "Which neurons fire together: stored order",
            "Along the diagonal are neighbours. Squares on it are groups of neurons that fire together.",
        ),
        "dram": (
            "I/O time over DRAM",
            f"Mean reading time of a token on {measured.device.name}, and the share of the neurons that fire which are "
            f"found in DRAM. Gaps are read across, except in naive reading. Replayed are {sample}, from an empty "
            "cache for every point.",
        ),
        "run-lengths": (
            "Run lengths",
            "Of the neurons that fire, the share in runs of at least so many slots that all fire. No gap is read "
            f"across, and nothing is in DRAM. Counted over all blocks and {sample}.",
        ),
        "gain-by-layer": (
            "Gain by layer",
            f"Reading time of each layer, divided by that in stored order, {dram_text(measured.stored)}.{layers}",
        ),
        "gain-by-dataset": (
            "Gain by dataset",
            "Gain over the original order on the held-out tokens of each dataset, with 95 % intervals.",
        ),
        "active-by-layer": (
            "Active share by layer",
            f"Share of the neurons of a layer that fire, in the mean over the tokens that it runs on.{layers}",
        ),
    }
