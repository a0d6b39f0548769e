"""What a trace, placement or layout says about itself, in the same words for all of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from neuralink_cli.activations.trace import Trace
from neuralink_cli.devices.ratio import Ratio
from neuralink_cli.files.header import LENGTH_BYTES, TensorEntry, parse_header
from neuralink_cli.files.stage_file import StageFile
from neuralink_cli.files.tensor_file import TensorFile
from neuralink_cli.inspection.kinds import BUNDLED_LAYOUT, PERMUTED_LAYOUT, PLACEMENT, TRACE, Found
from neuralink_cli.layout.index import FlashIndex, read_flash_index, read_permuted_index
from neuralink_cli.layout.names import BUNDLED, FLASH_FILE, PERMUTED
from neuralink_cli.layout.plan import BundlePart, FlashBlock, ResidentTensor, SourceFile
from neuralink_cli.placement.gain import block_gains, total_gain
from neuralink_cli.placement.placement import (
    ORIGINAL,
    PLACEMENT_SCHEMA,
    STORED,
    MeasuredGain,
    PlacementHeader,
    parse_placement,
)
from neuralink_cli.weight_formats.formats import MXFP4, SOURCE, parse_weight_formats


@dataclass(frozen=True, slots=True)
class BlockFacts:
    """One block.

    Attributes:
        hidden: None where the file does not say it.
        bundle_bytes: Bytes of a bundle, or of a neuron's weights in a trace; None in a permuted layout.
        pinned: Neurons kept in DRAM; None in a trace.
        order: Name of the stored order; None where the file does not say it.
        gain: What the order gained in this block when it was made; None where the file does not say it.
    """

    id: str
    neurons: int
    hidden: int | None
    activation: str
    threshold: float
    bundle_bytes: int | None
    pinned: int | None = None
    order: str | None = None
    gain: float | None = None


@dataclass(frozen=True)
class Facts:
    """What a trace, placement or layout says about itself.

    Attributes:
        kind: One of the names of `kinds`.
        bytes: Of the file, or of all files that the index of a layout lists.
        model: `fingerprint`, `model_type`, `architecture` and, if the model came with code, `code`.
        origin: The hub model as `id` and `revision`; None for a local one.
        data: The datasets, each with `name`, `revision`, `sha256` and `tokens`.
        options: Of the stages that made it, without the device.
        device: The device model that the order was made for; None for a trace.
        formats: How the weights of each role are stored, for layouts and placements; those outside the blocks as
            `dense`.
        gains: What the stored order gained on held-out tokens; empty if that was not measured.
        read_bytes: What reading a token costs in the stored order without a cache, as the bytes that the device reads
            in the same time; None if that was not measured for bundles of this size.
        dram_bytes: What a runtime keeps in memory of a bundled layout, as stored: `dense` weights outside the blocks,
            `resident` rows and biases, `pinned` bundles. Empty for other kinds.
        digests: SHA-256 digests that it states, by what they are of.
    """

    path: Path
    kind: str
    tool: str
    bytes: int
    model: Mapping[str, str]
    origin: Mapping[str, str] | None
    signal: str
    calibration: Mapping[str, Any] | None
    coverage: Mapping[str, int] | None
    data: tuple[Mapping[str, Any], ...]
    options: Mapping[str, Any]
    device: Mapping[str, Any] | None
    formats: Mapping[str, str]
    blocks: tuple[BlockFacts, ...]
    gains: tuple[MeasuredGain, ...]
    read_bytes: float | None
    dram_bytes: Mapping[str, int]
    digests: Mapping[str, str]

    @property
    def gain(self) -> MeasuredGain | None:
        """What the stored order gained on all held-out tokens; None if that was not measured."""
        return next((gain for gain in self.gains if gain.source is None), None)

    @property
    def flash_bytes(self) -> int | None:
        """Bytes of all bundles; None where the file does not say how large one is."""
        sizes = [None if block.bundle_bytes is None else block.neurons * block.bundle_bytes for block in self.blocks]
        return None if None in sizes else sum(size for size in sizes if size is not None)


def read_facts(found: Found) -> Facts:
    """Read what a trace, placement or layout says about itself; of the data only headers and index are read.

    Raises:
        InputError: It is damaged or malformed.
        VerificationError: The index of a layout was changed after it was written.
    """
    return _READERS[found.kind](found.path)


def _of_trace(path: Path) -> Facts:
    with Trace(path) as trace:
        info = trace.info
        sources = [asdict(source) for source in info.sources]
        return Facts(
            kind=TRACE,
            bytes=trace.size,
            data=tuple(
                {
                    "name": source["name"],
                    "revision": source["parameters"].get("revision"),
                    **{key: source[key] for key in ("sha256", "tokens", "sequences", "total_sequences")},
                }
                for source in sources
            ),
            options=_common_options([source["parameters"] for source in sources]),
            device=None,
            formats={},
            blocks=tuple(
                BlockFacts(
                    block.id,
                    block.neurons,
                    block.hidden,
                    block.activation,
                    block.threshold,
                    sum(block.part_bytes.values()),
                )
                for block in info.blocks
            ),
            gains=(),
            read_bytes=None,
            dram_bytes={},
            digests={"content": trace.content_sha256},
            **_common(path, trace.document),
        )


def _common_options(parameters: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The options of all datasets: a value that they share, or a list with that of each."""
    names = dict.fromkeys(name for each in parameters for name in each if name != "revision")
    values = {name: [each.get(name) for each in parameters] for name in names}
    return {name: found[0] if all(value == found[0] for value in found) else found for name, found in values.items()}


def _of_placement(path: Path) -> Facts:
    with StageFile(path, PLACEMENT_SCHEMA) as file:
        info = parse_placement(file.document)
        parameters = dict(info.parameters)
        return Facts(
            kind=PLACEMENT,
            bytes=file.size,
            data=tuple(info.trace["sources"]),
            options=_without_device(parameters),
            device=parameters.get("device"),
            formats=_asked_formats(parameters),
            blocks=_placed_blocks(info),
            gains=tuple(gain for gain in info.gains if gain.order == STORED),
            read_bytes=_read_bytes(total_gain(info).as_document(), info.gains),
            dram_bytes={},
            digests={"content": file.content_sha256, "trace": info.trace["content_sha256"]},
            **_common(path, file.document),
        )


def _placed_blocks(info: PlacementHeader) -> tuple[BlockFacts, ...]:
    gained = {gain.name: gain.orders for gain in block_gains(info)}
    return tuple(
        BlockFacts(
            id=block.id,
            neurons=block.neurons,
            hidden=None,
            activation=block.activation,
            threshold=block.threshold,
            bundle_bytes=block.bundle_bytes,
            pinned=block.pinned,
            order=block.order,
            gain=gained[block.id][block.order].gain if block.order in gained[block.id] else None,
        )
        for block in info.blocks
    )


def _of_bundled(directory: Path) -> Facts:
    index = read_flash_index(directory)
    with TensorFile(directory / FLASH_FILE) as file:
        dram_bytes = _dram_bytes(index, file)
    document = index.document
    return Facts(
        kind=BUNDLED_LAYOUT,
        bytes=index.file_bytes + sum(companion["bytes"] for companion in document["companions"]),
        options={
            **_without_device(document["provenance"]["parameters"]),
            "layout": BUNDLED,
            "resident": index.resident,
            "alignment": index.alignment,
            **({"rounding": index.rounding} if "rounding" in document else {}),
        },
        formats=_stored_formats(index),
        blocks=tuple(
            BlockFacts(
                block.id, block.neurons, block.hidden, block.activation, block.threshold, block.stride, block.pinned
            )
            for block in index.blocks
        ),
        dram_bytes=dram_bytes,
        **_of_layout(document, {"file": index.file_sha256}, measured_so=_made_for_these_bundles(index)),
        **_common(directory, document),
    )


def _of_permuted(directory: Path) -> Facts:
    document = read_permuted_index(directory)
    with StageFile(directory / document["placement"], PLACEMENT_SCHEMA) as placement:
        info = parse_placement(placement.document)
    return Facts(
        kind=PERMUTED_LAYOUT,
        bytes=sum(file["bytes"] for file in (*document["files"], *document["companions"])),
        options={**_without_device(document["provenance"]["parameters"]), "layout": PERMUTED},
        # An ordinary checkpoint, whatever bundles the order was made for.
        formats={"all": SOURCE},
        # Neurons lie in the tensors of the source, so there are no bundles.
        blocks=tuple(replace(block, bundle_bytes=None) for block in _placed_blocks(info)),
        dram_bytes={},
        **_of_layout(document, {file["name"]: file["sha256"] for file in document["files"]}, measured_so=True),
        **_common(directory, document),
    )


_READERS: Mapping[str, Callable[[Path], Facts]] = {
    TRACE: _of_trace,
    PLACEMENT: _of_placement,
    BUNDLED_LAYOUT: _of_bundled,
    PERMUTED_LAYOUT: _of_permuted,
}


def _common(path: Path, document: Mapping[str, Any]) -> dict[str, Any]:
    """What documents of all kinds say in the same place."""
    return {
        "path": path,
        "tool": document["tool"],
        "model": document["model"],
        "origin": document["origin"],
        "signal": document["signal"],
        "calibration": document["calibration"],
        "coverage": document.get("coverage"),
    }


def _of_layout(document: Mapping[str, Any], files: Mapping[str, str], *, measured_so: bool) -> dict[str, Any]:
    """What the indexes of both kinds of layout say in the same place.

    Args:
        files: The digests of weight files.
        measured_so: Whether the order was measured for the bundles that the layout has.
    """
    provenance = document["provenance"]
    gains = tuple(_parse_gain(gain) for gain in document["gain"].get("stored", ()))
    stated = {"placement": provenance["placement_sha256"], "trace": provenance.get("trace_sha256")}
    return {
        "data": tuple(provenance.get("sources", ())),
        "device": provenance["parameters"].get("device"),
        "gains": gains,
        "read_bytes": _read_bytes(document["gain"].get("held_out", {}), gains) if measured_so else None,
        "digests": {**files, "index": document["document_sha256"], **{k: v for k, v in stated.items() if v}},
    }


def _parse_gain(gain: Mapping[str, Any]) -> MeasuredGain:
    return MeasuredGain(gain["source"], gain["order"], Ratio(**gain["gain"]), Ratio(**gain["gain_over_naive"]))


def _read_bytes(held_out: Mapping[str, Any], gains: Sequence[MeasuredGain]) -> float | None:
    """What the stored order costs, from the cost of the original one and its gain over that."""
    original = held_out.get("orders", {}).get(ORIGINAL)
    gain = next((gain.gain for gain in gains if gain.source is None and gain.order == STORED), None)
    return None if original is None or gain is None else float(original["bytes_per_token"]) / gain.value


def _made_for_these_bundles(index: FlashIndex) -> bool:
    """Whether the order was made for bundles of the size that the layout has, as far as options tell."""
    asked = index.document["provenance"]["parameters"]
    formats = parse_weight_formats(asked.get("weights", SOURCE), "weights")
    parts = [part for block in index.blocks for part in block.parts]
    # What is MXFP4 in the source stays so.
    same = all(part.weights in (formats[part.role], MXFP4.name) for part in parts)
    return same and asked.get("bundle_bytes") is None and asked.get("resident", "none") == index.resident


def _without_device(parameters: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in parameters.items() if name != "device"}


def _asked_formats(parameters: Mapping[str, Any]) -> dict[str, str]:
    """The formats that the order was made for."""
    formats = parse_weight_formats(parameters.get("weights", SOURCE), "weights")
    return {"all": formats["up"]} if len(set(formats.values())) == 1 else formats


def _stored_formats(index: FlashIndex) -> dict[str, str]:
    """The formats in a bundled layout, by role; several are joined by a slash."""
    found: dict[str, Counter[str]] = {}
    for block in index.blocks:
        kept: list[BundlePart | ResidentTensor] = [*block.parts, *(r for r in block.resident if r.kind == "rows")]
        for part in kept:
            name = block.dtype if part.weights == SOURCE else part.weights
            found.setdefault(part.role, Counter())[name] += 1
    for tensor in index.dense:
        found.setdefault("dense", Counter())[tensor.weights] += 1
    return {role: "/".join(name for name, _ in counts.most_common()) for role, counts in found.items()}


def _dram_bytes(index: FlashIndex, file: TensorFile) -> dict[str, int]:
    names = {name for source in index.sources if source.kind == "weights" for name in _tensor_names(source, file)}
    return kept_in_dram(index.blocks, file.header.entries, names)


def kept_in_dram(blocks: Sequence[FlashBlock], entries: Sequence[TensorEntry], names: Set[str]) -> dict[str, int]:
    """What a runtime keeps in memory of a bundled layout, as `Facts.dram_bytes`.

    Args:
        entries: The tensors of its file.
        names: Those of the source. The file holds more than weights: orders, frequencies, padding.
    """
    resident = {kept.place.tensor: kept.place.bytes for block in blocks for kept in block.resident}
    in_no_block = names - resident.keys()
    dense = [entry for entry in entries if entry.name in in_no_block]
    return {
        "dense": sum(entry.nbytes for entry in dense),
        "resident": sum(resident.values()),
        "pinned": sum(block.pinned * block.stride for block in blocks),
    }


def _tensor_names(source: SourceFile, file: TensorFile) -> list[str]:
    """The tensors of a weight file of the source, from its header, which the layout keeps."""
    prelude = file.read(source.stored.tensor).tobytes()
    header = parse_header(prelude[LENGTH_BYTES:], source.bytes - len(prelude), f"{file.path}: {source.stored.tensor}")
    return [entry.name for entry in header.entries]
