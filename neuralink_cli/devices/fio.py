"""Reads the JSON output of fio: bandwidth of random direct reads by size."""

from __future__ import annotations

import logging
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from neuralink_cli.errors import InputError
from neuralink_cli.files.input_file import read_input
from neuralink_cli.files.json_text import parse_object
from neuralink_cli.files.schema import Schema, check_document

FIO_SCHEMA = Schema("fio output", __package__, "fio.schema.json")
_LOGGER = logging.getLogger(__name__)
# Engines that have one read in flight per job, whatever iodepth is asked for.
_SYNCHRONOUS = frozenset(("sync", "psync", "vsync", "pvsync", "pvsync2", "mmap"))
_LIMITS = ("rate", "rate_iops", "rate_min", "rate_iops_min", "thinktime")
# Lines that fio prints before its JSON.
_NOTES = re.compile(rb"\A(?:(?:note|fio|warning)[^\n]*\n|\s*\n)*", re.IGNORECASE)
_LARGEST_READ = 1 << 40
_LEAST_RATE = 1000.0
_MOST_DEPTH = 1 << 16
# Percent of the reads that were alone in flight: then there was no queue, whatever the options say.
_ALONE = 99.0


@dataclass(frozen=True)
class FioReads:
    """Bandwidth (bytes per second) of reads by size (bytes), at one queue depth."""

    queue_depth: int
    rates: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class _Job:
    """What a job read: `rate` bytes per second in reads of `size` bytes, `depth` of them in flight."""

    name: str
    size: int
    depth: int
    rate: float


def read_measurements(path: Path) -> dict[str, Any]:
    """A device profile or fio's output, which may have notes of fio's before its JSON.

    Raises:
        InputError: It cannot be read, or is no JSON object.
    """
    return parse_object(_NOTES.sub(b"", read_input(path), count=1), path)


def is_fio_output(document: Mapping[str, Any]) -> bool:
    """Whether a JSON document is fio's (`--output-format=json`)."""
    return "fio version" in document


def parse_fio(document: Mapping[str, Any], where: Path) -> FioReads:
    """The read rates of a fio run: a job (or several equal ones at the same time) per read size.

    Only random direct reads count. Other jobs are left out with a remark. Of jobs that repeat a measurement the mean is
    taken. If sizes were measured at several queue depths, the deepest one that has at least two sizes is taken.

    Raises:
        InputError: Fewer than two read sizes, a job that failed, or jobs of several sizes that ran at the same time.
    """
    if "client_stats" in document:
        raise InputError("is of fio's client and server mode", where=where, fix="run fio on the device itself")
    check_document(dict(document), FIO_SCHEMA, where)
    groups: dict[int, list[tuple[Mapping[str, Any], Mapping[str, Any]]]] = defaultdict(list)
    for number, job in enumerate(document["jobs"]):
        options = {**document.get("global options", {}), **job.get("job options", {})}
        # Without a number of its own a job is taken for one that ran alone.
        groups[job.get("groupid", -1 - number)].append((job, options))
    rates: dict[int, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    left_out: list[str] = []
    for jobs in groups.values():
        measured = _parse_group(jobs, left_out, where)
        if measured is not None:
            rates[measured.depth][measured.size].append(measured.rate)
    if left_out:
        _LOGGER.warning("%s: left out of the reads: %s", where, ", ".join(left_out))
    usable = [depth for depth, sizes in rates.items() if len(sizes) >= 2]
    if not usable:
        raise InputError(
            "needs random direct reads of at least two sizes at the same queue depth"
            + (f" (left out: {', '.join(left_out)})" if left_out else ""),
            where=where,
            fix="run fio with one job per size, rw=randread, direct=1, ioengine=libaio, e.g. bs=4k, 16k, 64k, 256k, 1m",
        )
    depth = max(usable)
    return FioReads(depth, tuple(sorted((size, fmean(found)) for size, found in rates[depth].items())))


def _parse_group(
    jobs: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]], left_out: list[str], where: Path
) -> _Job | None:
    """The jobs of a group ran at the same time: together they are one measurement, if all are what is wanted."""
    copies = Counter(_name(job) for job, _ in jobs)
    parsed = []
    for job, options in jobs:
        if job.get("error", 0) != 0:
            raise InputError(f"job {_name(job)!r} failed (error {job['error']})", where=where, fix="run it again")
        reason = _unwanted(options)
        if reason is not None:
            left_out.append(f"{_name(job)} ({reason})")
        parsed.append((reason, _parse_job(job, options, copies[_name(job)], where)))
    reads = [job for reason, job in parsed if reason is None and job is not None]
    if not reads:
        return None
    others = [job for reason, job in parsed if reason is not None and job is not None and job.rate > 0]
    if len({job.size for job in reads}) > 1 or others:
        raise InputError(
            f"jobs {', '.join(sorted(copies))} ran at the same time, so none has the device to itself",
            where=where,
            fix="put stonewall into every job but the first",
        )
    return _Job(reads[0].name, reads[0].size, sum(job.depth for job in reads), sum(job.rate for job in reads))


def _parse_job(job: Mapping[str, Any], options: Mapping[str, Any], copies: int, where: Path) -> _Job | None:
    """A job's figures; None if it read nothing."""
    read = job["read"]
    reads, total = read["total_ios"], read["io_bytes"]
    rate = float(read["bw_bytes"]) if "bw_bytes" in read else 1024 * float(read["bw"])
    if not reads or not total or not rate:
        return None
    size = round(total / reads)
    # Copies that are reported one by one count one by one.
    depth = _number(options, "iodepth", where) * (_number(options, "numjobs", where) if copies == 1 else 1)
    alone = job.get("iodepth_level", {}).get("1", 0.0) >= _ALONE
    if options.get("ioengine", "psync") in _SYNCHRONOUS or alone:
        depth = depth // _number(options, "iodepth", where)
    if not 1 <= size <= _LARGEST_READ or rate < _LEAST_RATE or depth > _MOST_DEPTH:
        raise InputError(
            f"job {_name(job)!r} makes no sense: {size:,} bytes a read, {rate:g} bytes per second, {depth} in flight",
            where=where,
        )
    return _Job(_name(job), size, depth, rate)


def _unwanted(options: Mapping[str, Any]) -> str | None:
    """Why a job's reads are no random direct ones at full speed; None if they are."""
    kind = str(options.get("rw", options.get("readwrite", "read"))).partition(":")[0]
    if kind != "randread":
        return f"rw={kind}"
    direct = str(options.get("direct", "0" if str(options.get("buffered", "1")) == "1" else "1"))
    if direct not in ("1", "true", "None", ""):
        return "through the page cache, direct=0"
    limit = next((name for name in _LIMITS if name in options), None)
    return None if limit is None else f"slowed down by {limit}"


def _number(options: Mapping[str, Any], name: str, where: Path) -> int:
    text = str(options.get(name, "1"))
    if not re.fullmatch(r"[1-9][0-9]{0,5}", text):
        raise InputError(f"has a job with {name}={text[:20]}, which is not a number from 1 to 999999", where=where)
    return int(text)


def _name(job: Mapping[str, Any]) -> str:
    return str(job.get("jobname", "without a name"))
