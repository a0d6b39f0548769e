"""Weights that are numbers only together with a scale: found by what lies beside them, whatever the config says.

A quantised checkpoint whose config does not say so would be loaded, its scales left out, and run as another model.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

from neuralink_cli.architectures.blocks import FFNBlock
from neuralink_cli.checkpoint.checkpoint import Checkpoint
from neuralink_cli.checkpoint.scaled_tensors import WAY_OUT
from neuralink_cli.errors import UnsupportedError

# What the last step of a name is called wherever weights are quantised, and nowhere else.
_QUANTISED = re.compile(
    r"(weight|input|output|act)_(global_)?scales?(_inv|_2)?|weight_zero_point|weight_packed|SCB|weight_format"
    r"|qweight|qzeros|scales|g_idx|absmax|quant_map|quant_state\b.*|\w+_(scale_inv|scales)|\w+_proj_(blocks|scale)"
)
# Beside an FFN weight these words are enough.
_BESIDE = re.compile(r"scale|zero_?point|absmax|qzeros|quant|(^|[._])SCB$")
_FLOATS = frozenset({"F64", "F32", "F16", "BF16"})


def refuse_scales(checkpoint: Checkpoint) -> None:
    """Check the names of all tensors for those of quantised weights that are not understood.

    Raises:
        UnsupportedError: There is one.
    """
    known = checkpoint.scales | checkpoint.scaled.keys()
    found = [name for name in checkpoint.tensors if _is_scale(name) and name not in known]
    if found:
        raise _refusal(checkpoint, found, "which belongs to quantised weights")


def refuse_scaled_blocks(checkpoint: Checkpoint, blocks: Sequence[FFNBlock]) -> None:
    """Check that the FFN weights are numbers by themselves: floating point of 16 bits or more, without a scale.

    Those whose scales are understood are none, but can be rounded.

    Raises:
        UnsupportedError: They are not.
    """
    weights = {part.weight: part for block in blocks for part in block.parts}
    for part in weights.values():
        if part.dtype not in _FLOATS and part.weight not in checkpoint.scaled:
            raise UnsupportedError(
                f"FFN weight {part.weight!r} is {part.dtype}, a dtype of quantised weights, which need scales",
                where=checkpoint.directory,
                fix=WAY_OUT,
            )
    stems = {name.removesuffix(".weight") for name in weights}
    known = weights.keys() | checkpoint.scales
    found = [name for name in checkpoint.tensors if name not in known and _is_beside(name, stems)]
    if found:
        raise _refusal(checkpoint, found, "which looks like the scale of an FFN weight")


def _is_scale(name: str) -> bool:
    steps = name.split(".")
    # Of several steps, as `weight.quant_state.bitsandbytes__nf4` and `weight.absmax`; the first names the model.
    return any(_QUANTISED.fullmatch(".".join(steps[k:])) for k in range(max(len(steps) - 2, 1), len(steps)))


def _is_beside(name: str, stems: set[str]) -> bool:
    return any(stem in stems and _BESIDE.search(rest) for stem, rest in _splits(name))


def _splits(name: str) -> Iterator[tuple[str, str]]:
    """The ways to see a name as that of a weight and an ending."""
    return ((name[: found.start()], name[found.end() :]) for found in re.finditer(r"[._]", name))


def _refusal(checkpoint: Checkpoint, found: Iterable[str], what: str) -> UnsupportedError:
    first, *others = sorted(found)
    more = f" and {len(others):,} more" if others else ""
    # The key of MLX, which transformers does not look at.
    said = checkpoint.scaled or checkpoint.config.get("quantization")
    how = "in a way that is not understood" if said else "though config.json does not say so"
    return UnsupportedError(
        f"is quantised, {how}: it has tensor {first!r}{more}, {what}",
        where=checkpoint.directory,
        fix=WAY_OUT,
    )
