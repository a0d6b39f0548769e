"""`neuralink probe`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from neuralink_cli.cli.options import PATH, Number, WholeNumber, overwrite_option, reporting_options
from neuralink_cli.cli.output import print_json, print_table, print_text, progress_bar, remark
from neuralink_cli.errors import OptionError
from neuralink_cli.sizes import human_bytes

if TYPE_CHECKING:
    from neuralink_cli.storage.probe import Probe, Profile


_SIZES = (4, 8, 16, 32, 64, 128, 256, 512, 1024)
_QUEUE_DEPTHS = (1, 8, 32)


@click.command(
    "probe",
    epilog="""\b
Examples:
  neuralink probe /mnt/flash -o flash.device.json
  neuralink probe . --queue-depth 32 --size 4 --size 64 --size 1024
  neuralink probe --from-fio phone.json -o phone.device.json
""",
)
@click.argument("directory", metavar="[DIR]", type=PATH, required=False)
@click.option("-o", "--output", type=PATH, metavar="PROFILE", help="Device profile to write, for `--device`.")
@click.option("--from-fio", type=PATH, metavar="FILE", help="Measure nothing; take the figures from fio's JSON output.")
@click.option("--name", metavar="NAME", help="Name in the profile; by default the output's.")
@click.option(
    "--queue-depth",
    "queue_depths",
    type=WholeNumber(1, 1024),
    multiple=True,
    default=_QUEUE_DEPTHS,
    show_default=True,
    help="Reads in flight; may be repeated. The profile uses the largest.",
)
@click.option(
    "--size",
    "sizes",
    type=WholeNumber(4, 1 << 16),
    multiple=True,
    default=_SIZES,
    show_default=True,
    metavar="KIB",
    help="KiB per read, a multiple of 4; may be repeated.",
)
@click.option(
    "--file-bytes",
    type=WholeNumber(1 << 20),
    default=1 << 30,
    show_default=True,
    metavar="BYTES",
    help="Size of the temporary file. Larger is more accurate: a small file fits in the storage's own cache.",
)
@click.option(
    "--seconds",
    type=Number(0, 60, min_open=True),
    default=0.3,
    show_default=True,
    help="Seconds to measure each size and queue depth.",
)
@click.option(
    "--sustained",
    type=Number(0, 3600),
    default=0,
    show_default=True,
    metavar="SECONDS",
    help="Read this long without a pause, to learn how fast a hot device is (`--device PROFILE:hot`).",
)
@overwrite_option
@reporting_options
def command(
    directory: Path | None,
    output: Path | None,
    from_fio: Path | None,
    name: str | None,
    queue_depths: Sequence[int],
    sizes: Sequence[int],
    file_bytes: int,
    seconds: float,
    sustained: float,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Measure the storage under a directory.

    Writes a temporary file to DIR, times random reads of it past the page cache, and makes a device profile from
    them. With `--from-fio` the figures come from another device, such as a phone:

    \b
    fio --name=r4 --bs=4k --rw=randread --direct=1 --iodepth=32
        --ioengine=libaio --size=1G --runtime=5 --time_based
        --name=r64 --stonewall --bs=64k ... --output-format=json
    """
    from neuralink_cli.files.replacing import require_text_output
    from neuralink_cli.storage.probe import PROFILE_FORMAT, fio_profile, probe_profile, probe_storage, write_profile

    if (directory is None) == (from_fio is None):
        raise OptionError("pass either a directory to measure or --from-fio")
    if any(size % 4 for size in sizes) or len(set(sizes)) < 2:
        raise OptionError("pass at least two different --size, multiples of 4 KiB")
    if file_bytes < 2 * 1024 * max(sizes):
        raise OptionError(f"a file of {file_bytes:,} bytes is too small for random reads of {max(sizes)} KiB")
    if output is not None:
        require_text_output(output, overwrite, inputs=(from_fio,), json_format=PROFILE_FORMAT)
    name = name or (output.name.split(".")[0] if output is not None else "") or "probe"
    probe = None
    if directory is not None:
        sizes, queue_depths = sorted(set(sizes)), sorted(set(queue_depths))
        with progress_bar("probe", len(sizes) * len(queue_depths), "point") as advance:
            probe = probe_storage(
                directory,
                sizes=[1024 * size for size in sizes],
                queue_depths=queue_depths,
                file_bytes=file_bytes,
                seconds=seconds,
                sustained=sustained,
                progress=advance,
            )
        profile = probe_profile(probe, name)
    else:
        assert from_fio is not None
        profile = fio_profile(from_fio, name)
    if output is not None:
        write_profile(output, profile, overwrite=overwrite)
    if probe is not None and probe.in_memory:
        remark(f"{directory} is on a {probe.file_system}, which lies in memory: this is not a storage device")
    if profile.pooled:
        listed = ", ".join(human_bytes(size) for size in profile.pooled)
        remark(f"larger reads took less time than smaller ones; averaged in the profile: {listed}")
    if as_json:
        print_json(_summary(probe, profile, output))
        return
    _print(probe, profile, output)


def _summary(probe: Probe | None, profile: Profile, output: Path | None) -> dict[str, object]:
    return {
        "output": None if output is None else str(output),
        "direct": None if probe is None else probe.direct,
        "file_system": None if probe is None else probe.file_system,
        "in_memory": None if probe is None else probe.in_memory,
        "file_bytes": None if probe is None else probe.file_bytes,
        "points": [
            {
                "bytes": point.bytes,
                "queue_depth": point.queue_depth,
                "reads": point.reads,
                "reads_per_second": point.reads_per_second,
                "bytes_per_second": point.bytes_per_second,
            }
            for point in (probe.points if probe is not None else ())
        ],
        "pooled": list(profile.pooled),
        "operation_seconds": profile.device.operation_seconds,
        "bytes_per_second": profile.device.bytes_per_second,
        "latency_seconds": profile.device.latency_seconds,
        "fill_seconds": [rate.fill_seconds for rate in profile.device.reads],
        "page_bytes": profile.device.page_bytes,
        "hot_rate": profile.device.hot_rate,
        "profile": profile.document,
    }


def _print(probe: Probe | None, profile: Profile, output: Path | None) -> None:
    header = ["read", "in flight", "reads/s", "MB/s"]
    if probe is None:
        depth = profile.device.queue_depth
        figures = [(rate.bytes, depth, rate.bytes_per_second) for rate in profile.device.reads]
    else:
        figures = [(point.bytes, point.queue_depth, point.bytes_per_second) for point in probe.points]
    rows = [
        [f"{size / 1024:g} KiB", str(depth), f"{rate / size:,.0f}", f"{rate / 1e6:,.1f}"]
        for size, depth, rate in figures
    ]
    print_table(header, rows)
    device = profile.device
    how = "of memory, not of a storage device" if probe is not None and probe.in_memory else ""
    how = how if probe is None or probe.direct or how else "through the page cache, so not the storage's own"
    click.echo(
        f"{output or profile.document['name']}: about {1e6 * device.operation_seconds:.1f} us a read and "
        f"{human_bytes(round(device.bytes_per_second))}/s at queue depth {device.queue_depth}"
    )
    if how:
        print_text(how)
    if probe is not None:
        hot = "" if device.hot_rate is None else f"; {device.hot_rate:.0%} of the speed is left when hot"
        longest = max((rate.fill_seconds for rate in device.reads), default=0.0)
        wait = (
            f"{1e6 * device.latency_seconds:.0f} us more for each wait, up to {1e6 * longest:,.0f} us to fill the queue"
        )
        print_text(f"{wait}, reads rounded out to {device.page_bytes:,} bytes{hot}")
