"""The sidecar indexes: `model.flash.json` of a bundled layout, `model.permuted.json` of a permuted one."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from neuralink_cli import __version__
from neuralink_cli.architectures.blocks import MovedPiece, UpValues
from neuralink_cli.architectures.regions import Region
from neuralink_cli.checkpoint.file_names import FLASH_INDEX, PERMUTED_INDEX
from neuralink_cli.checkpoint.origin import Origin
from neuralink_cli.errors import InputError, VerificationError
from neuralink_cli.files.durable import write_file
from neuralink_cli.files.json_text import canonical, fields_of, parse_object, read_object, readable
from neuralink_cli.files.schema import Schema, check_document
from neuralink_cli.layout.names import FLASH_FILE, PERMUTED_PLACEMENT
from neuralink_cli.layout.plan import (
    BundledPlan,
    BundlePart,
    DenseTensor,
    FlashBlock,
    ResidentTensor,
    SourceFile,
    TensorRange,
)
from neuralink_cli.layout.recall import MeasuredRecall, parse_recall
from neuralink_cli.placement.gain import source_gains, total_gain
from neuralink_cli.placement.placement import STORED, Placement
from neuralink_cli.weight_formats.formats import NEAREST, SOURCE

FLASH_SCHEMA = Schema("flash index", __package__, "flash_index.schema.json")
PERMUTED_SCHEMA = Schema("permuted index", __package__, "permuted_index.schema.json")
FORMAT_VERSION = 1
DIGEST_KEY = "document_sha256"
# A block in the index of a permuted layout, beside its regions.
_BLOCK_TEXT = 200


@dataclass(frozen=True)
class FlashIndex:
    """A parsed and checked `model.flash.json`; `document` is all of it."""

    alignment: int
    resident: str
    file_bytes: int
    file_sha256: str
    fingerprint: str
    blocks: tuple[FlashBlock, ...]
    sources: tuple[SourceFile, ...]
    dense: tuple[DenseTensor, ...]
    digests: Mapping[str, str]
    document: Mapping[str, Any]

    @property
    def rounding(self) -> str:
        """How the scales of rounded weights were found."""
        return str(self.document.get("rounding", NEAREST))

    @property
    def gate_recall(self) -> MeasuredRecall | None:
        """What rounding the rows that decide firing does, as it was measured before the layout was written."""
        stated = self.document.get("gate_recall")
        return None if stated is None else parse_recall(stated)


def flash_document(
    plan: BundledPlan,
    placement: Placement,
    sha256: str,
    digests: Mapping[str, str],
    companions: Sequence[Mapping[str, Any]],
    origin: Origin | None,
    recall: MeasuredRecall | None = None,
) -> dict[str, Any]:
    """The index of a bundled layout; `companions` from `copy_files`, `origin` of the checkpoint.

    Blocks and dense tensors are as in the plan: `index_text` spells them, one by one.
    """
    return {
        "format": "neuralink-flash",
        "version": FORMAT_VERSION,
        "tool": f"neuralink {__version__}",
        "layout": "bundled",
        "resident": plan.resident,
        "alignment": plan.alignment,
        "file": {"name": FLASH_FILE, "bytes": plan.file_bytes, "sha256": sha256},
        **_common(placement, origin),
        "blocks": list(plan.blocks),
        **({} if plan.exact else {"rounding": plan.rounding}),
        **({"dense": list(plan.dense)} if plan.dense else {}),
        **({} if recall is None else {"gate_recall": recall.as_document()}),
        "sources": [asdict(source) for source in plan.sources],
        "digests": dict(digests),
        "companions": sorted(companions, key=lambda file: str(file["name"])),
    }


def permuted_document(
    moved: Mapping[str, Sequence[MovedPiece]],
    placement: Placement,
    files: Sequence[Mapping[str, Any]],
    verbatim: Sequence[str],
    companions: Sequence[Mapping[str, Any]],
    origin: Origin | None,
) -> dict[str, Any]:
    """The index of a permuted layout.

    Args:
        moved: From `moved_pieces`.
        files: Weight files, and `companions` the other files, with size and SHA-256.
    """
    regions: dict[str, list[Region]] = {}
    for pieces in moved.values():
        for piece in pieces:
            regions.setdefault(piece.block, []).append(piece.region)
    return {
        "format": "neuralink-permuted",
        "version": FORMAT_VERSION,
        "tool": f"neuralink {__version__}",
        "layout": "permuted",
        "files": list(files),
        "placement": PERMUTED_PLACEMENT,
        **_common(placement, origin),
        "blocks": [
            {
                "id": block.id,
                "neurons": block.neurons,
                "activation": block.activation,
                "threshold": block.threshold,
                "regions": regions[block.id],
            }
            for block in placement.info.blocks
        ],
        "verbatim": list(verbatim),
        "companions": sorted(companions, key=lambda file: str(file["name"])),
    }


def write_index(path: Path, schema: Schema, document: Mapping[str, Any]) -> None:
    """Write an index, the last file of a layout, with its own digest in it, flushed to the device."""
    text = index_text(document)
    # Of thousands of blocks it takes much memory, as does what the text is parsed into.
    del document
    # What is written here can be read by the next stage.
    check_document(parse_object(text, path), schema, path)
    write_file(path, text.encode())


def index_text(document: Mapping[str, Any]) -> str:
    """An index as it is written, with its own digest in it."""
    return readable({**document, DIGEST_KEY: _digest(document)}, _as_json)


def flash_index_bytes(plan: BundledPlan) -> int:
    """Roughly the bytes of the index of a bundled layout: what it says of blocks, with the digests of their tensors."""
    # All say the same in other numbers; the last one has the longest offsets.
    last = plan.blocks[-1]
    digests = {place.tensor: 64 * "0" for place in (last.order, last.frequency)}
    return len(readable({"blocks": [last], "digests": digests}, _as_json)) * len(plan.blocks)


def permuted_index_bytes(moved: Mapping[str, Sequence[MovedPiece]], blocks: int) -> int:
    """Roughly the bytes of the index of a permuted layout: what it says of so many blocks, and of what is moved."""
    *_, pieces = moved.values()
    region = len(readable({"blocks": [{"regions": [pieces[-1].region]}]}, _as_json))
    return _BLOCK_TEXT * blocks + region * sum(map(len, moved.values()))


def read_flash_index(directory: Path) -> FlashIndex:
    """Read and check the index of a bundled layout.

    Raises:
        InputError: The index is missing, malformed, or of another version.
        VerificationError: The index was changed after it was written.
    """
    document = _read(directory / FLASH_INDEX, "neuralink-flash", FLASH_SCHEMA)
    _check_recall(document, directory / FLASH_INDEX)
    return FlashIndex(
        alignment=document["alignment"],
        resident=document["resident"],
        file_bytes=document["file"]["bytes"],
        file_sha256=document["file"]["sha256"],
        fingerprint=document["model"]["fingerprint"],
        blocks=tuple(_parse_block(block) for block in document["blocks"]),
        sources=tuple(
            SourceFile(**{**source, "stored": _parse_range(source["stored"])}) for source in document["sources"]
        ),
        dense=tuple(
            DenseTensor(**{**tensor, "place": _parse_range(tensor["place"])}) for tensor in document.get("dense", ())
        ),
        digests=document["digests"],
        document=document,
    )


def read_permuted_index(directory: Path) -> dict[str, Any]:
    """Read and check the index of a permuted layout.

    Raises:
        InputError: The index is missing, malformed, or of another version.
        VerificationError: The index was changed after it was written.
    """
    return _read(directory / PERMUTED_INDEX, "neuralink-permuted", PERMUTED_SCHEMA)


def is_layout(directory: Path) -> bool:
    """Whether a directory is a layout that this tool wrote."""
    return (directory / FLASH_INDEX).is_file() or (directory / PERMUTED_INDEX).is_file()


def _common(placement: Placement, origin: Origin | None) -> dict[str, Any]:
    info = placement.info
    return {
        "model": dict(info.model),
        "origin": None if origin is None else asdict(origin),
        "signal": info.signal,
        "calibration": info.calibration,
        "provenance": {
            "placement_sha256": placement.content_sha256,
            "trace_sha256": info.trace["content_sha256"],
            "sources": info.trace["sources"],
            "parameters": dict(info.parameters),
        },
        "gain": {
            "held_out": total_gain(info).as_document(),
            "by_source": [gain.as_document() for gain in source_gains(info)],
            "stored": [asdict(gain) for gain in info.gains if gain.order == STORED],
        },
    }


def _read(path: Path, form: str, schema: Schema) -> dict[str, Any]:
    document = read_object(path)
    if document.get("format") != form or document.get("version") != FORMAT_VERSION:
        raise InputError(
            f"has format {document.get('format')!r} version {document.get('version')!r}, "
            f"this tool reads {form!r} version {FORMAT_VERSION}",
            where=path,
        )
    check_document(document, schema, path)
    if len({block["id"] for block in document["blocks"]}) != len(document["blocks"]):
        raise InputError("lists a block twice", where=path)
    companions = [file["name"] for file in document["companions"]]
    if len(set(companions)) != len(companions):
        raise InputError("lists a file twice", where=path)
    if document[DIGEST_KEY] != _digest({key: value for key, value in document.items() if key != DIGEST_KEY}):
        raise VerificationError(f"was changed after it was written: it does not match its {DIGEST_KEY}", where=path)
    return document


def _check_recall(document: Mapping[str, Any], path: Path) -> None:
    if "gate_recall" in document:
        stated = document["gate_recall"]["blocks"]
        named = {block["id"] for block in stated}
        if len(named) != len(stated) or not named <= {block["id"] for block in document["blocks"]}:
            raise InputError("states the recall of a block twice, or of a block that is not there", where=path)
        experts = {block["id"] for block in document["blocks"] if block["expert"] is not None}
        if {block["id"] for block in stated if "routed" in block} != named & experts:
            raise InputError(
                "states the recall of an expert without its tokens, or of another block with some", where=path
            )


def _digest(document: Mapping[str, Any]) -> str:
    return hashlib.sha256(canonical(document, _as_json).encode()).hexdigest()


def _as_json(record: Any) -> dict[str, Any]:
    """A record for the index; weights that are as in the source need no format, those by themselves no lanes."""
    document = fields_of(record)
    if isinstance(record, (BundlePart, ResidentTensor)):
        if record.weights == SOURCE:
            del document["weights"]
        if record.source_lanes == 1:
            del document["source_lane"], document["source_lanes"]
    elif isinstance(record, Region) and record.lanes == 1:
        del document["lane"], document["lanes"]
    elif isinstance(record, FlashBlock) and record.up_values is None:
        del document["up_values"]
    return document


def _parse_range(spec: Mapping[str, Any]) -> TensorRange:
    return TensorRange(**{**spec, "shape": tuple(spec["shape"])})


def _parse_block(spec: Mapping[str, Any]) -> FlashBlock:
    parsed = {
        "bundles": _parse_range(spec["bundles"]),
        "parts": tuple(BundlePart(**part) for part in spec["parts"]),
        "resident": tuple(
            ResidentTensor(**{**resident, "place": _parse_range(resident["place"])}) for resident in spec["resident"]
        ),
        "order": _parse_range(spec["order"]),
        "frequency": _parse_range(spec["frequency"]),
        "up_values": UpValues(**spec["up_values"]) if "up_values" in spec else None,
    }
    return FlashBlock(**{**spec, **parsed})
