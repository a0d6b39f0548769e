"""The reader against fio on the same list of random reads: direct I/O, the same queue depth, taken in turns.

python benchmarks/reader_vs_fio.py --folder /mnt/disk --gigabytes 8 --depth 32

Needs fio (`apt-get install fio`) and free space for one file, which is deleted at the end. fio replays the list with
each of its engines, and in the column "own list" as many reads at offsets of its own, which spares it the replay.
The ratio is to the fastest of them in the same round; of all figures the median of the rounds is shown. Reads are on
multiples of 4 KiB. "of disk" is the share of our bytes that the system says came from the device.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from neuralink_cli.files.bulk_io import aligned_buffer
from neuralink_cli.storage.direct_io import ScatteredFile

Integers = npt.NDArray[np.int64]
ENGINES = ("libaio", "io_uring", "psync", "own list")
_UNIT = 4096
_CHUNK = 1 << 24
# Memory that the reads go to, over and over.
_BUFFER_BYTES = 1 << 26


def write_file(path: Path, size: int, seed: int) -> None:
    """A file of random bytes, on the device and not in the page cache."""
    chunk = np.random.default_rng(seed).integers(0, 256, _CHUNK, dtype=np.uint8)
    with path.open("wb", buffering=0) as handle:
        for start in range(0, size, _CHUNK):
            chunk[:8] = np.frombuffer(start.to_bytes(8, "little"), dtype=np.uint8)
            handle.write(chunk.data)
        os.fsync(handle.fileno())
        os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def write_list(path: Path, file: Path, offsets: Integers, size: int) -> None:
    """The reads in the form that fio replays."""
    reads = "".join(f"{file} read {offset} {size}\n" for offset in offsets.tolist())
    path.write_text(f"fio version 2 iolog\n{file} add\n{file} open\n{reads}{file} close\n")


def fio_rate(folder: Path, file: Path, offsets: Integers, size: int, depth: int, engine: str) -> float | None:
    """Bytes per second of fio; None if it lacks the engine. The engine "own list" is psync with offsets of fio's."""
    jobs = [offsets[k::depth] for k in range(depth)] if engine in ("psync", "own list") else [offsets]
    command = ["fio", "--output-format=json", "--direct=1", "--rw=randread", f"--bs={size}", "--group_reporting=1"]
    command += [f"--ioengine={engine if engine != 'own list' else 'psync'}", f"--iodepth={depth // len(jobs)}"]
    command += ["--thread=1", "--norandommap=1", "--randrepeat=0"]
    for k, part in enumerate(jobs):
        if engine == "own list":
            command += [f"--name=job{k}", f"--filename={file}", f"--io_size={len(part) * size}"]
        else:
            write_list(folder / f"reads.{k}", file, part, size)
            command += [f"--name=job{k}", f"--read_iolog={folder / f'reads.{k}'}"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        return None
    (job,) = json.loads(result.stdout[result.stdout.index("{") :])["jobs"]
    read = job["read"]
    assert read["total_ios"] == len(offsets), "fio did not read the whole list"
    return float(read["io_bytes"] / (read["runtime"] / 1000))


def bytes_from_device() -> int:
    """What this process has fetched from storage, by the kernel's account."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["read_bytes"])


def our_rate(file: ScatteredFile, offsets: Integers, size: int, request: int) -> float:
    """Bytes per second of the reader, the list in requests of so many reads, the next begun when one is done."""
    buffer = aligned_buffer(_BUFFER_BYTES)
    places = np.arange(len(offsets), dtype=np.int64) % (_BUFFER_BYTES // size) * size
    sizes = np.full(len(offsets), size, dtype=np.int64)
    seconds = sum(
        file.read(offsets[k : k + request], sizes[k : k + request], buffer, places[k : k + request])
        for k in range(0, len(offsets), request)
    )
    return len(offsets) * size / seconds


class WithThreads(ScatteredFile):
    """The reader as it is where the system has no asynchronous I/O."""

    def __init__(self, path: Path, queue_depth: int) -> None:
        super().__init__(path, direct=True, queue_depth=queue_depth)
        self._asynchronous = False


def compare(file: Path, folder: Path, size: int, options: argparse.Namespace) -> list[str]:
    """One row of the table."""
    random = np.random.default_rng(options.seed + size)
    reads = max(int(options.megabytes * 1e6 / (size + 32768)), 4 * options.depth)
    rates: dict[str, list[float]] = {}
    fetched = 0
    with (
        ScatteredFile(file, direct=True, queue_depth=options.depth) as ours,
        WithThreads(file, options.depth) as threads,
    ):
        for turn in range(options.rounds):
            offsets = random.integers(0, (file.stat().st_size - size) // _UNIT, reads) * _UNIT
            contenders: list[tuple[str, Callable[[], float | None]]] = [
                *(
                    (engine, partial(fio_rate, folder, file, offsets, size, options.depth, engine))
                    for engine in ENGINES
                ),
                ("ours", partial(our_rate, ours, offsets, size, reads)),
                ("requests", partial(our_rate, ours, offsets, size, options.request)),
                ("threads", partial(our_rate, threads, offsets, size, reads)),
            ]
            # Whoever reads a list first may warm a cache that the machine cannot see: take turns at it.
            for k in range(len(contenders)):
                name, measure = contenders[(k + turn) % len(contenders)]
                before = bytes_from_device()
                rate = measure()
                if rate is not None:
                    rates.setdefault(name, []).append(rate)
                fetched += bytes_from_device() - before if name == "ours" else 0
    from_device = fetched / (options.rounds * reads * size)
    best = np.max([rates[engine] for engine in ENGINES if engine in rates], axis=0)

    def megabytes(name: str) -> str:
        return f"{np.median(rates[name]) / 1e6:.0f}" if name in rates else "-"

    def ratio(name: str) -> str:
        return f"{np.median(np.array(rates[name]) / best):.2f}"

    return [
        f"{size // 1024} KiB",
        f"{reads}",
        *(megabytes(name) for name in (*ENGINES, "ours")),
        ratio("ours"),
        megabytes("requests"),
        ratio("requests"),
        megabytes("threads"),
        ratio("threads"),
        f"{from_device:.0%}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(), help="where to write the file; decides what is measured")
    parser.add_argument("--gigabytes", type=float, default=4.0, help="size of the file")
    parser.add_argument("--depth", type=int, default=32, help="reads in flight")
    parser.add_argument("--sizes", type=int, nargs="+", default=[4, 16, 64, 256, 1024], help="KiB of a read")
    parser.add_argument(
        "--megabytes", type=float, default=1000, help="how much to read: MB, each read counted 32 KiB more"
    )
    parser.add_argument("--request", type=int, default=256, help="reads of a request, in the column `in requests`")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if shutil.which("fio") is None:
        sys.exit("fio is not installed: there is nothing to compare with")

    header = ["read", "reads", *(f"fio {engine}" for engine in ENGINES), "ours", "ratio", "in requests", "ratio"]
    header += ["with threads", "ratio", "of disk"]
    widths = [max(len(title), 7) for title in header]
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        file = folder / "reads.bin"
        write_file(file, int(options.gigabytes * 1e9) // _CHUNK * _CHUNK, options.seed)
        print(
            f"MB/s, {options.depth} reads in flight, {options.gigabytes:g} GB file, median of {options.rounds} rounds\n"
        )
        print("  ".join(title.rjust(width) for title, width in zip(header, widths, strict=True)))
        for size in options.sizes:
            row = compare(file, folder, size * 1024, options)
            print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)), flush=True)


if __name__ == "__main__":
    main()
