"""What a bench replays: layouts (or placements without one), and the held-out tokens of a trace of the same model."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from neuralink_cli.activations.trace import Trace
from neuralink_cli.arrays import Order
from neuralink_cli.devices.device import DeviceModel, builtin_devices
from neuralink_cli.errors import MismatchError, OptionError
from neuralink_cli.files.input_file import require_reachable
from neuralink_cli.layout.bundled_layout import BundledLayout
from neuralink_cli.layout.open_layout import open_layout
from neuralink_cli.placement.gain import total_gain
from neuralink_cli.placement.held_out import Range, split_tokens
from neuralink_cli.placement.placement import Placement

_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class ContenderBlock:
    """One block of a contender.

    Attributes:
        threshold: A neuron fires if its signal is beyond this.
        stride: Bytes of a bundle.
        parts: Stretches that a bundle consists of.
        pinned: Slots from 0 on that are kept in DRAM.
        order: int32 `[n]`, `order[slot] = neuron`.
        frequency: float32 `[n]`, by slot, how often a neuron fired for the tokens that made the order.
        offset: Where the bundles start in the flash file, in bytes; None if there is no such file.
    """

    id: str
    neurons: int
    threshold: float
    stride: int
    parts: int
    pinned: int
    order: Order
    frequency: npt.NDArray[np.float32]
    offset: int | None


@dataclass(frozen=True, eq=False)
class Contender:
    """A layout, or a placement, whose reads are to be measured.

    Attributes:
        path: Directory of the layout, or the placement file.
        order: Name of its order.
        bundled: Whether `path` is a bundled layout, which can be read for real.
        parameters: Those of `cluster`.
    """

    path: Path
    order: str
    fingerprint: str
    signal: str
    bundled: bool
    parameters: Mapping[str, Any]
    blocks: tuple[ContenderBlock, ...]


def read_contender(path: Path, trace: Trace) -> Contender:
    """Read what a bench needs to know of a layout or placement.

    Raises:
        InputError: It is neither, or malformed.
        VerificationError: Files of the layout do not fit each other.
        MismatchError: It is of another model than the trace.
    """
    require_reachable(path)
    if path.exists() and not path.is_dir():
        with Placement(path) as placement:
            contender = _from_placement(path, placement, trace)
    else:
        with open_layout(path) as layout:
            if layout.kind == "permuted":
                contender = _from_placement(path, layout.placement, trace)
            else:
                contender = _from_bundled(path, layout)
    _check_same_model(contender, trace)
    return contender


def _from_bundled(path: Path, layout: BundledLayout) -> Contender:
    document = layout.index.document
    blocks = tuple(
        ContenderBlock(
            id=block.id,
            neurons=block.neurons,
            threshold=block.threshold,
            stride=block.stride,
            parts=len(block.parts),
            pinned=block.pinned,
            order=layout.order(block.id),
            frequency=layout.file.read(block.frequency.tensor).view("<f4"),
            offset=block.bundles.offset,
        )
        for block in layout.index.blocks
    )
    return Contender(
        path=path,
        order=str(document["gain"].get("held_out", {}).get("chosen", "stored")),
        fingerprint=layout.fingerprint,
        signal=document["signal"],
        bundled=True,
        parameters=document["provenance"].get("parameters", {}),
        blocks=blocks,
    )


def _from_placement(path: Path, placement: Placement, trace: Trace) -> Contender:
    info = placement.info
    all_parts = {block.id: len(block.part_bytes) for block in trace.info.blocks}
    kept = int(info.parameters.get("resident") == "gate")
    blocks = tuple(
        ContenderBlock(
            id=block.id,
            neurons=block.neurons,
            threshold=block.threshold,
            stride=block.bundle_bytes,
            parts=max(all_parts.get(block.id, 1) - kept, 1),
            pinned=block.pinned,
            order=placement.blocks[block.id].order,
            frequency=placement.blocks[block.id].frequency,
            offset=None,
        )
        for block in info.blocks
    )
    order = total_gain(info).chosen
    return Contender(path, order, info.model["fingerprint"], info.signal, False, info.parameters, blocks)


def _check_same_model(contender: Contender, trace: Trace) -> None:
    traced = trace.info
    if contender.fingerprint != traced.model["fingerprint"]:
        raise MismatchError(
            f"is of the model {contender.fingerprint}, the trace {trace.path} of {traced.model['fingerprint']}",
            where=contender.path,
            fix="pass a trace of the same checkpoint",
        )
    if contender.signal != traced.signal:
        raise MismatchError(
            f"its neurons fire by the {contender.signal!r} signal, those of {trace.path} by {traced.signal!r}",
            where=contender.path,
        )
    found = [(block.id, block.neurons) for block in contender.blocks]
    if found != [(block.id, block.neurons) for block in traced.blocks]:
        raise MismatchError(f"its blocks are not those of the trace {trace.path}", where=contender.path)
    if [block.threshold for block in contender.blocks] != [block.threshold for block in traced.blocks]:
        _LOGGER.info("%s: other thresholds than in the trace, whose neurons fire less or more often", contender.path)


@dataclass(frozen=True)
class TokenRange:
    """Tokens `start` to `stop` of a trace, all of one source."""

    source: str
    start: int
    stop: int

    @property
    def tokens(self) -> int:
        """How many."""
        return self.stop - self.start


def choose_tokens(
    trace: Trace, contenders: Sequence[Contender], held_out: float | None, most: int | None
) -> tuple[TokenRange, ...]:
    """The tokens to replay: those that the orders did not see.

    Args:
        held_out: Share of each source's tokens; by default the smallest share that the contenders were made with.
        most: Take no more tokens than this, from the start of each source's, in proportion.

    Raises:
        OptionError: Nothing was held out.
    """
    if held_out is None:
        held_out = min(float(contender.parameters.get("held_out", 0.0)) for contender in contenders)
    ranges: tuple[Range, ...] = trace.source_ranges()
    if held_out < 1:
        ranges = split_tokens(ranges, trace.source_sequence_lengths(), held_out).held_out
    total = sum(stop - start for start, stop in ranges)
    if total == 0:
        raise OptionError(
            f"no token of {trace.path} is held out from the order", fix="pass --held-out 0.2, or --all-tokens"
        )
    share = min(1.0, most / total) if most is not None else 1.0
    return tuple(
        TokenRange(source.name, start, start + -(-int((stop - start) * share * 1e6) // 10**6))
        for source, (start, stop) in zip(trace.info.sources, ranges, strict=True)
        if stop > start
    )


def device_made_for(contender: Contender) -> DeviceModel:
    """The device model that a contender was made for; UFS 4.0 if it does not say."""
    known = builtin_devices()
    stated = contender.parameters.get("device")
    if not isinstance(stated, Mapping):
        return known["ufs4.0"]
    name = str(stated["name"])
    if name in known:
        return known[name]
    operation, rate = float(stated["operation_seconds"]), float(stated["bytes_per_second"])
    return DeviceModel(name, int(stated["queue_depth"]), operation, rate)
