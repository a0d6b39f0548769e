"""Reads the JSON output of fio: bandwidth of random reads by size."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neuralink_cli.errors import InputError


@dataclass(frozen=True)
class FioReads:
    """Bandwidth (bytes per second) of reads by size (bytes), at one queue depth."""

    queue_depth: int
    rates: tuple[tuple[int, float], ...]


def is_fio_output(document: Mapping[str, Any]) -> bool:
    """Whether a JSON document is fio's (`--output-format=json`)."""
    return "fio version" in document and "jobs" in document


def parse_fio(document: Mapping[str, Any], where: Path) -> FioReads:
    """The read rates of a fio run: one job (or group of equal jobs) per read size.

    If sizes were measured at several queue depths, the deepest with at least two sizes is used.

    Raises:
        InputError: Fewer than two read sizes, or a job without figures.
    """
    rates: dict[int, dict[int, float]] = defaultdict(lambda: defaultdict(float))
    jobs = document["jobs"]
    if not isinstance(jobs, list):
        raise InputError("has no list of jobs", where=where)
    for job in jobs:
        depth, size, rate = _parse_job(job, document, where)
        if rate > 0:
            rates[depth][size] += rate
    usable = [depth for depth, sizes in rates.items() if len(sizes) >= 2]
    if not usable:
        raise InputError(
            "has fewer than two read sizes at one queue depth",
            where=where,
            fix="run fio with one randread job per size, e.g. bs=4k, 16k, 64k, 256k, 1m",
        )
    depth = max(usable)
    return FioReads(depth, tuple(sorted(rates[depth].items())))


def _parse_job(job: Any, document: Mapping[str, Any], where: Path) -> tuple[int, int, float]:
    try:
        options = {**document.get("global options", {}), **job.get("job options", {})}
        read = job["read"]
        reads, total = int(read["total_ios"]), int(read["io_bytes"])
        rate = float(read["bw_bytes"]) if "bw_bytes" in read else 1024 * float(read["bw"])
        depth = int(options.get("iodepth", 1)) * int(options.get("numjobs", 1))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"a job of this fio output lacks read figures ({error})", where=where) from None
    if reads <= 0 or total <= 0 or depth <= 0:
        return max(depth, 1), 0, 0.0
    return depth, round(total / reads), rate
