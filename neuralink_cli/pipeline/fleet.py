"""What a layout made for one class of devices loses on another, from the figures of every layout on every device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from neuralink_cli.bench.bench import BenchReport
from neuralink_cli.devices.ratio import Ratio
from neuralink_cli.errors import VerificationError
from neuralink_cli.files.json_text import read_object
from neuralink_cli.storage.policies import NO_CACHE


@dataclass(frozen=True)
class FleetCell:
    """A layout replayed on a device, read with access collapse and with the cache there is, on held-out tokens.

    Attributes:
        made_for: The device that the layout was made for.
        device: The device that it is replayed on.
        gain: The mean I/O time of the original order, read the same way, over its own.
        gain_over_naive: That of the original order without access collapse over its own.
        io_mean: Its mean I/O time per token in seconds.
        ratio_to_best: The I/O time of the best layout for the device over its own: 1 for that layout.
    """

    made_for: str
    device: str
    gain: Ratio
    gain_over_naive: Ratio
    io_mean: float
    ratio_to_best: float


@dataclass(frozen=True)
class RealReads:
    """What reading a layout takes on the storage that it lies on, with collapse and with the cache there is.

    Attributes:
        tokens: Held-out tokens that were read.
        gain: As of a `FleetCell`.
        gain_over_naive: As of a `FleetCell`.
        io_mean: The mean time of a token's reads in seconds.
        direct: Whether all reads went past the page cache.
    """

    tokens: int
    gain: Ratio
    gain_over_naive: Ratio
    io_mean: float
    direct: bool


def bench_document(report: BenchReport, layouts: Mapping[str, Path]) -> dict[str, Any]:
    """A report as JSON, with the names of devices in place of the paths of the layouts made for them."""
    names = {str(path): name for name, path in layouts.items()}
    document = report.as_document()
    for row in document["rows"]:
        row["way"]["layout"] = names.get(row["way"]["layout"])
    return {**document, "trace": Path(report.trace).name}


def summary_document(benches: Mapping[str, Path]) -> dict[str, Any]:
    """The summary of a build as JSON.

    Args:
        benches: For every device the file with the figures of all layouts on it.
    """
    cells, tokens = [], 0
    for device, path in benches.items():
        document = read_object(path)
        tokens = sum(part["stop"] - part["start"] for part in document["tokens"])
        cells += [asdict(cell) for cell in _cells(device, document["rows"])]
    return {"format": "neuralink-summary", "version": 1, "devices": list(benches), "tokens": tokens, "layouts": cells}


def _cells(device: str, rows: list[dict[str, Any]]) -> list[FleetCell]:
    stored = _stored(rows)
    times = [row["figures"]["io_mean"] for row in stored]
    return [
        FleetCell(
            made_for=row["way"]["layout"],
            device=device,
            gain=Ratio(**row["gain"]),
            gain_over_naive=Ratio(**row["gain_over_naive"]),
            io_mean=time,
            ratio_to_best=min(times) / time if time else 1.0,
        )
        for row, time in zip(stored, times, strict=True)
    ]


def _stored(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of layouts, read with access collapse and with the cache there is."""
    cached = any(row["way"]["cache"] != NO_CACHE for row in rows)
    return [
        row
        for row in rows
        if row["way"]["layout"] is not None and row["way"]["collapse"] and (row["way"]["cache"] != NO_CACHE) == cached
    ]


def read_real(path: Path) -> RealReads:
    """What a file with the figures of real reads of one layout says."""
    document = read_object(path)
    (row,) = _stored(document["rows"])
    return RealReads(
        tokens=sum(part["stop"] - part["start"] for part in document["tokens"]),
        gain=Ratio(**row["gain"]),
        gain_over_naive=Ratio(**row["gain_over_naive"]),
        io_mean=row["figures"]["io_mean"],
        direct=document["direct"],
    )


def read_summary(path: Path) -> tuple[int, tuple[FleetCell, ...]]:
    """The held-out tokens that were replayed, and all cells, of a summary."""
    document = read_object(path)
    cells = [
        FleetCell(**{**cell, **{name: Ratio(**cell[name]) for name in ("gain", "gain_over_naive")}})
        for cell in document["layouts"]
    ]
    return document["tokens"], tuple(cells)


def check_gains(cells: tuple[FleetCell, ...], least: float) -> None:
    """Require a gain of every layout on the device that it was made for; the lower end of the interval counts.

    Raises:
        VerificationError: A layout gains less.
    """
    for cell in cells:
        if cell.made_for == cell.device and cell.gain.low < least:
            raise VerificationError(
                f"gain {cell.gain} is not reliably {least:g}: its interval starts lower", where=cell.device
            )
