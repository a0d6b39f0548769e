"""Weight formats: how the numbers of a part of a bundle are stored. Names and sizes only; fast to import.

A part keeps the dtype of the source, or is stored in one of ggml's block formats: 32 weights along `hidden` share one
float16 scale. `block_kernels.py` converts; docs/weight_formats.md says what every byte means.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from neuralink_cli.errors import OptionError, UnsupportedError

ROLES = ("gate", "up", "down")

# The weights stay as they are.
SOURCE = "source"

# Dtypes of the source that can be converted: those whose values are float32 values.
CONVERTIBLE_DTYPES = ("F32", "F16", "BF16")

# Those of codes that are numbers together with scales, see `checkpoint/scaled_tensors.py`.
SCALED_DTYPES = ("F8_E4M3", "I8")

# How the scale of a block is found: as ggml's reference does, or as the candidate with the least squared error.
NEAREST = "nearest"
SEARCH = "search"
ROUNDINGS = (NEAREST, SEARCH)

BLOCK_WEIGHTS = 32

# The format of dense weights beside rounded FFN weights, unless another is asked for: attention at 8 bits costs little
# memory, and less quality than anything else that is rounded.
DENSE_BESIDE_ROUNDED = "q8_0"


@dataclass(frozen=True)
class BlockFormat:
    """A format of blocks: `block_weights` consecutive weights of a neuron take `block_bytes` bytes."""

    name: str
    block_weights: int
    block_bytes: int

    def row_bytes(self, hidden: int) -> int:
        """Bytes of the `hidden` weights of one neuron; `hidden` is a multiple of `block_weights`."""
        return hidden // self.block_weights * self.block_bytes


Q8_0 = BlockFormat("q8_0", BLOCK_WEIGHTS, 34)
Q4_0 = BlockFormat("q4_0", BLOCK_WEIGHTS, 18)
IQ4_NL = BlockFormat("iq4_nl", BLOCK_WEIGHTS, 18)
# Only for weights that are MXFP4 in the source: they keep their codes and scales.
MXFP4 = BlockFormat("mxfp4", BLOCK_WEIGHTS, 17)

# Those that any weights can be rounded to, and all.
ROUNDING_FORMATS: Mapping[str, BlockFormat] = MappingProxyType({each.name: each for each in (Q8_0, Q4_0, IQ4_NL)})
BLOCK_FORMATS: Mapping[str, BlockFormat] = MappingProxyType({**ROUNDING_FORMATS, MXFP4.name: MXFP4})
FORMAT_NAMES = (SOURCE, *BLOCK_FORMATS)
DENSE_FORMAT_NAMES = (SOURCE, *ROUNDING_FORMATS)


def part_bytes(name: str, hidden: int, element_bytes: int) -> int:
    """Bytes of one neuron's `hidden` weights in the format `name`; `element_bytes` are those of the source's dtype."""
    return hidden * element_bytes if name == SOURCE else BLOCK_FORMATS[name].row_bytes(hidden)


def parse_weight_formats(text: str, option: str) -> dict[str, str]:
    """The name of the format of each role, from `FORMAT` or from `ROLE=FORMAT,ROLE=FORMAT`.

    Roles that a list does not name keep the source's dtype: whoever names some wants the others as they are.

    Args:
        option: The option that the text comes from, for errors.

    Raises:
        OptionError: Unknown format or role, a role that is named twice, or an empty part.
    """
    if "=" not in text and "," not in text:
        return dict.fromkeys(ROLES, parse_weight_format(text, option))
    formats = dict.fromkeys(ROLES, SOURCE)
    named = set()
    for part in text.split(","):
        role, equals, name = (word.strip() for word in part.partition("="))
        if not equals:
            raise OptionError(f"{part.strip()!r} is not ROLE=FORMAT", where=option, fix=_EXAMPLES)
        if role not in ROLES:
            raise OptionError(f"unknown role {role!r}", where=option, fix=f"choose from {', '.join(ROLES)}")
        if role in named:
            raise OptionError(f"{role} is named twice", where=option, fix="name each role once")
        named.add(role)
        formats[role] = parse_weight_format(name, option)
    return formats


def require_roles(formats: Mapping[str, str], present: Iterable[str], option: str) -> None:
    """Check that a model has all the roles that are to be rounded.

    Args:
        formats: From `parse_weight_formats`.
        present: The roles of the model's parts.

    Raises:
        OptionError: It has not.
    """
    found = set(present)
    missing = [role for role in ROLES if role not in found and formats[role] != SOURCE]
    # One format for all roles is not meant for those that are not there.
    if missing and len({formats[role] for role in ROLES}) > 1:
        raise OptionError(f"the model's blocks have no {missing[0]}", where=option, fix="leave it out")


_EXAMPLES = "write one format for all roles, as q4_0, or a list, as gate=q8_0,up=q4_0,down=q4_0"


def parse_weight_format(text: str, option: str) -> str:
    """The name of a format.

    Raises:
        OptionError: There is none of this name.
    """
    name = text.strip()
    if name not in FORMAT_NAMES:
        raise OptionError(f"unknown weight format {name!r}", where=option, fix=f"choose from {', '.join(FORMAT_NAMES)}")
    return name


def parse_dense_format(text: str, option: str) -> str:
    """The name of a format for matrices outside the blocks: `source`, or one that they are rounded to.

    Raises:
        OptionError: There is none of this name.
    """
    name = text.strip()
    if name not in DENSE_FORMAT_NAMES:
        raise OptionError(
            f"{name!r} is not a format to round to", where=option, fix=f"choose from {', '.join(DENSE_FORMAT_NAMES)}"
        )
    return name


def require_convertible(name: str, block: str, hidden: int, dtype: str, *, scaled: bool = False) -> None:
    """Check that rows of `hidden` weights of `dtype` can be stored in the format `name`.

    Args:
        block: Id of the FFN block, for errors.
        scaled: Whether the weights have scales.

    Raises:
        UnsupportedError: They have scales and would stay as they are; the format has blocks that do not fill rows of
            this length; or the dtype is not one of `CONVERTIBLE_DTYPES`, nor of `SCALED_DTYPES` with scales.
    """
    if name == SOURCE and scaled:
        raise UnsupportedError(
            f"its weights are quantised ({dtype} with scales): they can be rounded to a weight format, not left so",
            where=block,
            fix=f"use --weights and --dense-weights with {', '.join(ROUNDING_FORMATS)}",
        )
    if name == SOURCE:
        return
    if dtype not in CONVERTIBLE_DTYPES and not (scaled and dtype in SCALED_DTYPES):
        raise UnsupportedError(
            f"weights of dtype {dtype} cannot be stored as {name}, only those of {', '.join(CONVERTIBLE_DTYPES)}",
            where=block,
            fix=f"use the weight format {SOURCE}, or convert the checkpoint first",
        )
    weights = BLOCK_FORMATS[name].block_weights
    if hidden % weights:
        raise UnsupportedError(
            f"a row has {hidden:,} weights, which is not a multiple of {weights}, the weights of a {name} block",
            where=block,
            fix=f"use the weight format {SOURCE} for this model",
        )


def require_carried(block: str, role: str, neuron_axis: int, hidden: int, start: int, *, floats: bool) -> None:
    """Check that weights of a part can be carried through as mxfp4: whole blocks of a neuron, with their scales.

    Args:
        block: Id of the FFN block, for errors.
        start: Where its first neuron starts in the source, in weights.
        floats: Whether they are MXFP4 in the source.

    Raises:
        UnsupportedError: They cannot.
    """
    others = f"use another format for {role}, as {role}=q8_0"
    if not floats:
        raise UnsupportedError(
            f"the {role} weights are not MXFP4, and other weights are never rounded to {MXFP4.name}",
            where=block,
            fix=others,
        )
    if neuron_axis != 0 or hidden % BLOCK_WEIGHTS or start % BLOCK_WEIGHTS:
        raise UnsupportedError(
            f"blocks of the {role} weights run across neurons, so a neuron has no scales of its own to keep in "
            f"{MXFP4.name}",
            where=block,
            fix=others,
        )


# Every role as it is in the source.
AS_IN_SOURCE: Mapping[str, str] = MappingProxyType(dict.fromkeys(ROLES, SOURCE))
