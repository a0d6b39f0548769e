"""Device models: what a read costs on a storage device, as a function of its size.

Profiles are JSON files (`profiles/*.json`, or a user's file). The JSON output of fio also works as a profile.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from neuralink_cli.devices.fio import is_fio_output, parse_fio, read_measurements
from neuralink_cli.errors import InputError, OptionError, advising
from neuralink_cli.files.input_file import require_reachable, require_regular
from neuralink_cli.files.json_text import parse_object
from neuralink_cli.files.schema import Schema, check_document

DEVICE_SCHEMA = Schema("device", __package__, "device.schema.json")
# The built-in profile that stands for a phone where none is named.
DEFAULT_DEVICE = "ufs4.0"
_FOLDER = "profiles"
_HOT = ":hot"
_WANTED = "pass a device profile, the JSON output of fio, or a built-in name like ufs4.0"


@dataclass(frozen=True)
class ReadRate:
    """Bandwidth measured for random reads of one size.

    Attributes:
        fill_seconds: What a batch of such reads takes beyond their time and the latency, if it is long enough to fill
            the queue: while the queue fills and empties, reads take longer. 0 if not known.
    """

    bytes: int
    bytes_per_second: float
    fill_seconds: float = 0.0

    @property
    def seconds(self) -> float:
        """Device time that one such read takes while the queue is kept full."""
        return self.bytes / self.bytes_per_second


@dataclass(frozen=True)
class DeviceModel:
    """A read of s bytes costs `operation_seconds + s / bytes_per_second`, or the time in `reads` if measured.

    Attributes:
        reads: Times measured by size, of reads of whole pages.
        page_bytes: The device serves whole pages, so a read moves every page that it touches.
        latency_seconds: How long a runtime waits for the last read each time it needs bundles, beyond the cost of the
            reads. 0 if not known.
        hot_rate: The share of its speed that a device keeps when it is hot; None if not known.
    """

    name: str
    queue_depth: int
    operation_seconds: float
    bytes_per_second: float
    reads: tuple[ReadRate, ...] = ()
    page_bytes: int = 4096
    latency_seconds: float = 0.0
    hot_rate: float | None = None

    def read_seconds(self, sizes: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """Seconds that reads of whole pages take, by size in bytes: interpolated between measured sizes, linear beyond.

        For reads of bundles, which start and end inside pages, see `bundle_read_seconds`.
        """
        size = np.asarray(sizes, dtype=np.float64)
        if not self.reads:
            return self.operation_seconds + size / self.bytes_per_second
        known = np.array([rate.bytes for rate in self.reads], dtype=np.float64)
        seconds = np.array([rate.seconds for rate in self.reads])
        beyond = np.maximum(size - known[-1], 0) / self.bytes_per_second
        cost: npt.NDArray[np.float64] = np.interp(size, known, seconds) + beyond
        return cost

    def fill_seconds(self, sizes: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """Seconds that a batch of reads takes because the queue has to fill, by the size in bytes of its reads.

        Interpolated between measured sizes, and as for the nearest beyond. A batch of fewer reads than the queue has
        places takes as large a share of it as it fills.
        """
        size = np.asarray(sizes, dtype=np.float64)
        if not self.reads:
            return np.zeros_like(size)
        filled: npt.NDArray[np.float64] = np.interp(
            size, [rate.bytes for rate in self.reads], [rate.fill_seconds for rate in self.reads]
        )
        return filled

    def rounding_bytes(self, bundle_bytes: float) -> float:
        """Bytes that a read of bundles moves beyond their own, on average over all slots that it may start at.

        Bundles lie one after the other from the start of a page on. With g the greatest common divisor of bundle and
        page, a read starts anywhere on multiples of g, and touches `page_bytes - g` bytes more than it asks for.
        """
        return self.page_bytes - math.gcd(round(bundle_bytes), self.page_bytes)

    def bundle_read_seconds(self, counts: npt.ArrayLike, bundle_bytes: float) -> npt.NDArray[np.float64]:
        """Seconds that reads of these numbers of neighbouring bundles take, rounded out to pages."""
        return self.read_seconds(np.asarray(counts) * float(bundle_bytes) + self.rounding_bytes(bundle_bytes))

    def operation_in_bundles(self, bundle_bytes: float) -> float:
        """The cost of a read operation in bundles: G = a / b with b the time one bundle's bytes take.

        The bytes that a read moves because it is rounded out to pages are part of its cost a.
        """
        return (self.operation_seconds * self.bytes_per_second + self.rounding_bytes(bundle_bytes)) / bundle_bytes

    def hot(self) -> DeviceModel:
        """The device when it is hot: every read takes longer by `hot_rate`.

        Raises:
            OptionError: `hot_rate` is not known.
        """
        if self.hot_rate is None:
            raise OptionError(
                f"the profile of {self.name} does not say how fast it is when hot",
                fix="measure it with `neuralink probe --sustained 60`, or add `hot_rate` to the profile",
            )
        return replace(
            self,
            name=self.name + _HOT,
            operation_seconds=self.operation_seconds / self.hot_rate,
            bytes_per_second=self.bytes_per_second * self.hot_rate,
            reads=tuple(
                ReadRate(rate.bytes, rate.bytes_per_second * self.hot_rate, rate.fill_seconds / self.hot_rate)
                for rate in self.reads
            ),
            latency_seconds=self.latency_seconds / self.hot_rate,
            hot_rate=None,
        )


def find_device(name: str) -> DeviceModel:
    """A built-in profile by name, or a profile or fio output by path; either with `:hot` for the device when hot.

    A profile from a file is named after the file as well if a built-in one has its name.

    Raises:
        OptionError: Neither a built-in name nor a file, or `:hot` for a profile without `hot_rate`.
        InputError: The file is malformed or its values cannot be right.
    """
    if name.endswith(_HOT) and not Path(name).exists():
        return find_device(name.removesuffix(_HOT)).hot()
    known = builtin_devices()
    if name in known:
        return known[name]
    path = Path(name)
    require_reachable(path)
    if path.exists():
        with advising(_WANTED):
            require_regular(path)
    if not path.is_file():
        raise OptionError(
            f"device {name!r} is neither a file nor built in (built in: {', '.join(known)})",
            fix="measure it with `neuralink probe`, or pass the JSON output of fio",
        )
    with advising(_WANTED):
        document = read_measurements(path)
        if is_fio_output(document):
            measured = parse_fio(document, path)
            reads = [ReadRate(size, rate) for size, rate in measured.rates]
            return _from_reads(path.name, measured.queue_depth, reads, path)
        device = parse_device(document, path)
    return replace(device, name=f"{device.name} ({path.name})") if device.name in known else device


def builtin_devices() -> dict[str, DeviceModel]:
    """All profiles that come with the package, by name."""
    folder = resources.files(__package__).joinpath(_FOLDER)
    documents = {
        source.name: parse_object(source.read_bytes(), source.name)
        for source in folder.iterdir()
        if source.name.endswith(".json")
    }
    models = [parse_device(document, name) for name, document in sorted(documents.items())]
    return {model.name: model for model in models}


def parse_device(document: Mapping[str, Any], where: str | Path) -> DeviceModel:
    """Check a device profile and turn it into a `DeviceModel`.

    Raises:
        InputError: It does not match the schema, or its values cannot be right.
    """
    check_document(dict(document), DEVICE_SCHEMA, where)
    reads = _read_rates(document)
    if "operation_seconds" in document:
        _check_reads(reads, where)
        operation, bandwidth = float(document["operation_seconds"]), float(document["bytes_per_second"])
        fitted = DeviceModel(document["name"], document["queue_depth"], operation, bandwidth, tuple(reads))
    else:
        fitted = _from_reads(document["name"], document["queue_depth"], reads, where)
    hot_rate = document.get("hot_rate")
    return replace(
        fitted,
        page_bytes=document.get("page_bytes", fitted.page_bytes),
        latency_seconds=float(document.get("latency_seconds", 0.0)),
        hot_rate=None if hot_rate is None else float(hot_rate),
    )


def device_record(device: DeviceModel) -> dict[str, Any]:
    """Everything about a device model that decides a cost, as JSON: what a placement says of the device it is for."""
    return {
        "name": device.name,
        "queue_depth": device.queue_depth,
        "operation_seconds": device.operation_seconds,
        "bytes_per_second": device.bytes_per_second,
        "page_bytes": device.page_bytes,
        "latency_seconds": device.latency_seconds,
        "reads": [read_record(rate) for rate in device.reads],
    }


def read_record(rate: ReadRate) -> dict[str, Any]:
    """An item of `reads` in a profile or a record."""
    record: dict[str, Any] = {"bytes": rate.bytes, "bytes_per_second": rate.bytes_per_second}
    return record | {"fill_seconds": rate.fill_seconds} if rate.fill_seconds else record


def recorded_device(record: Mapping[str, Any], where: str | Path) -> DeviceModel:
    """The device model of a `device_record`; one without pages was made when a read counted only its own bytes.

    Raises:
        InputError: Its values cannot be right.
    """
    reads = tuple(_read_rates(record))
    _check_reads(reads, where)
    return DeviceModel(
        name=record["name"],
        queue_depth=record["queue_depth"],
        operation_seconds=float(record["operation_seconds"]),
        bytes_per_second=float(record["bytes_per_second"]),
        reads=reads,
        page_bytes=record.get("page_bytes", 1),
        latency_seconds=float(record.get("latency_seconds", 0.0)),
    )


def stated_device(parameters: Mapping[str, Any], where: str | Path) -> DeviceModel | None:
    """The device that an order was made for, as the parameters of its file state it; None if they do not.

    Raises:
        InputError: As `recorded_device`.
    """
    record = parameters.get("device")
    return None if record is None else recorded_device(record, where)


def default_device() -> DeviceModel:
    """The device where none is named."""
    return builtin_devices()[DEFAULT_DEVICE]


def _read_rates(document: Mapping[str, Any]) -> list[ReadRate]:
    return [
        ReadRate(rate["bytes"], float(rate["bytes_per_second"]), float(rate.get("fill_seconds", 0.0)))
        for rate in document.get("reads", ())
    ]


def _from_reads(name: str, queue_depth: int, reads: Sequence[ReadRate], where: str | Path) -> DeviceModel:
    """A model fitted to reads: the line a + s / w that is closest in relative terms, so that small reads count."""
    _check_reads(reads, where)
    sizes = np.array([rate.bytes for rate in reads], dtype=np.float64)
    seconds = np.array([rate.seconds for rate in reads])
    terms = np.stack([1 / seconds, sizes / seconds], axis=1)
    operation, per_byte = np.linalg.lstsq(terms, np.ones(len(reads)), rcond=None)[0]
    if not (operation > 0 and per_byte > 0):
        raise InputError("no positive cost per read and per byte fits its reads", where=where)
    return DeviceModel(name, queue_depth, float(operation), float(1 / per_byte), tuple(reads))


def _check_reads(reads: Sequence[ReadRate], where: str | Path) -> None:
    for smaller, larger in itertools.pairwise(reads):
        if larger.bytes <= smaller.bytes:
            raise InputError(f"reads are not sorted by ascending size (at {larger.bytes} bytes)", where=where)
        if larger.seconds < smaller.seconds:
            raise InputError(
                f"a read of {larger.bytes} bytes takes less time than a read of {smaller.bytes}, which cannot be right",
                where=where,
                fix="measure again",
            )
