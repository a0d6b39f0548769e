"""How to run a layout, and whether it can be run. Needs no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from neuralink_cli.devices.device import DeviceModel
from neuralink_cli.errors import OptionError, UnsupportedError
from neuralink_cli.files.header import DTYPE_BITS, TensorEntry
from neuralink_cli.layout.bundled_layout import BundledLayout
from neuralink_cli.layout.open_layout import Layout
from neuralink_cli.layout.plan import BundlePart, FlashBlock, ResidentTensor
from neuralink_cli.models.execution import RUN_DTYPES
from neuralink_cli.storage.budget import DramBudget
from neuralink_cli.storage.policies import DEFAULT_POLICY
from neuralink_cli.weight_formats.formats import SOURCE

# Dtypes of weights that need no scales to compute with.
_WEIGHTS = ("F64", "F32", "F16", "BF16")
# What weights of a dtype are computed in if nothing else is asked for; nothing is computed in float64.
_OWN_DTYPE = {"F64": "float32", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True)
class RunSettings:
    """How to fetch the weights of a layout and compute with them.

    Attributes:
        dram: DRAM for cached bundles; the resident rows and all weights outside FFN blocks come on top.
        cache: One of `neuralink_cli.storage.policies.POLICY_NAMES`.
        device: Storage that reads are planned for; None for the device that the placement was made for.
        direct: Whether reads go past the page cache; None: if the file system supports it.
        queue_depth: Reads kept in flight.
        dtype: Precision to compute in, one of `RUN_DTYPES`; "auto" is that of the dense weights, see `compute_dtype`.
        working_bytes: The most that fetching and decoding neurons may take; more firing neurons are computed in turns.
        ignore_remote_code: Run the built-in class although the model comes with code of its own.

    Raises:
        OptionError: A dtype that is not in `RUN_DTYPES`.
    """

    dram: DramBudget
    cache: str = DEFAULT_POLICY
    device: DeviceModel | None = None
    direct: bool | None = None
    queue_depth: int = 32
    dtype: str = "float32"
    working_bytes: int = 256 << 20
    ignore_remote_code: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in RUN_DTYPES:
            raise OptionError(f"dtype {self.dtype!r} is not one of {', '.join(RUN_DTYPES)}")


@dataclass(frozen=True)
class GenerationOptions:
    """How to continue a prompt: the likeliest token each time, or, at a temperature above 0, drawn from a seed.

    Attributes:
        top_k: Draw only from this many of the likeliest tokens; 0 for all.
        top_p: Draw only from the likeliest tokens that together have this probability; 1 for all.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    seed: int = 0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if self.temperature == 0 and (self.top_k or self.top_p < 1):
            raise OptionError(
                "without a temperature the likeliest token is taken, and nothing is drawn",
                fix="pass --temperature 1 as well, or leave out --top-k and --top-p",
            )


def require_runnable(layout: Layout) -> BundledLayout:
    """Check that a layout can run: what it keeps in DRAM tells which neurons fire.

    Raises:
        UnsupportedError: The layout is permuted, fires by the input of the down projection, or has 8-bit weights.
        OptionError: The layout keeps no rows in DRAM.
    """
    where: Path = layout.directory
    if layout.kind != "bundled":
        raise UnsupportedError(
            "is a permuted layout, an ordinary checkpoint that keeps nothing in flash",
            where=where,
            fix="load it with transformers, or make a bundled layout with `neuralink relayout --resident gate`",
        )
    if layout.index.document["signal"] != "gate":
        raise UnsupportedError(
            "fires by the input of the down projection (signal 'intermediate'), which is known only after all up rows "
            "have been read",
            where=where,
            fix="profile with --signal gate, then cluster and relayout again",
        )
    if layout.index.resident != "gate":
        raise OptionError(
            "keeps no rows in DRAM that would tell which neurons fire",
            where=where,
            fix="write it again with `neuralink relayout --resident gate`",
        )
    for block in layout.index.blocks:
        if block.dtype not in _WEIGHTS and any(part.weights == SOURCE for part in _weights_of(block)):
            raise UnsupportedError(
                f"{block.id} has weights of dtype {block.dtype}, which need scales that the layout does not have "
                f"(supported: {', '.join(_WEIGHTS)})",
                where=where,
            )
    return layout


def _weights_of(block: FlashBlock) -> Iterator[BundlePart | ResidentTensor]:
    """The parts of a block that are matrices."""
    yield from block.parts
    yield from (kept for kept in block.resident if kept.kind == "rows")


def dense_entries(layout: BundledLayout) -> Iterator[TensorEntry]:
    """The tensors of the source that are not part of a block, as its headers state them."""
    of_blocks = {kept.source for block in layout.index.blocks for kept in block.resident} | layout.made_slabs.keys()
    of_blocks |= layout.scales
    for entries in layout.source_entries.values():
        yield from (entry for entry in entries if entry.name not in of_blocks)


def compute_dtype(dtype: str, layout: BundledLayout) -> str:
    """Resolve "auto": the dtype that most of the dense weights have, or of the FFN weights if there are no others."""
    if dtype != "auto":
        return dtype
    weights: Counter[str] = Counter()
    for entry in dense_entries(layout):
        if entry.dtype in _OWN_DTYPE:
            weights[_OWN_DTYPE[entry.dtype]] += entry.nbytes * 8 // DTYPE_BITS[entry.dtype]
    most = weights.most_common(1)
    return most[0][0] if most else _OWN_DTYPE.get(layout.index.blocks[0].dtype, "float32")


def is_exact(layout: BundledLayout) -> bool:
    """Whether leaving out neurons that do not fire changes nothing: no threshold was calibrated."""
    return layout.index.document["calibration"] is None
