"""Device models: what a read costs on a storage device, as a function of its size.

Profiles are JSON files (`profiles/*.json`, or a user's file). The JSON output of fio also works as a profile.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from neuralink_cli.devices.fio import is_fio_output, parse_fio, read_measurements
from neuralink_cli.errors import InputError, OptionError
from neuralink_cli.files.input_file import require_reachable, require_regular
from neuralink_cli.files.json_text import parse_object
from neuralink_cli.files.schema import Schema, check_document

DEVICE_SCHEMA = Schema("device", __package__, "device.schema.json")
_FOLDER = "profiles"


@dataclass(frozen=True)
class ReadRate:
    """Bandwidth measured for random reads of one size."""

    bytes: int
    bytes_per_second: float

    @property
    def seconds(self) -> float:
        """Device time that one such read takes while the queue is kept full."""
        return self.bytes / self.bytes_per_second


@dataclass(frozen=True)
class DeviceModel:
    """A read of s bytes costs `operation_seconds + s / bytes_per_second`, or the time in `reads` if measured."""

    name: str
    queue_depth: int
    operation_seconds: float
    bytes_per_second: float
    reads: tuple[ReadRate, ...] = ()

    def read_seconds(self, sizes: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """Seconds that reads of these sizes (bytes) take: interpolated between measured sizes, linear beyond them."""
        size = np.asarray(sizes, dtype=np.float64)
        if not self.reads:
            return self.operation_seconds + size / self.bytes_per_second
        known = np.array([rate.bytes for rate in self.reads], dtype=np.float64)
        seconds = np.array([rate.seconds for rate in self.reads])
        beyond = np.maximum(size - known[-1], 0) / self.bytes_per_second
        cost: npt.NDArray[np.float64] = np.interp(size, known, seconds) + beyond
        return cost

    def operation_in_bundles(self, bundle_bytes: int) -> float:
        """The cost of a read operation in bundles: G = a / b with b the time one bundle's bytes take."""
        return self.operation_seconds * self.bytes_per_second / bundle_bytes


def find_device(name: str) -> DeviceModel:
    """A built-in profile by name, or a profile or fio output by path.

    Raises:
        OptionError: Neither a built-in name nor a file.
        InputError: The file is malformed or its values cannot be right.
    """
    known = builtin_devices()
    if name in known:
        return known[name]
    path = Path(name)
    require_reachable(path)
    if path.exists():
        require_regular(path)
    if not path.is_file():
        raise OptionError(
            f"device {name!r} is neither a file nor built in (built in: {', '.join(known)})",
            fix="measure it with `neuralink probe`, or pass the JSON output of fio",
        )
    document = read_measurements(path)
    if is_fio_output(document):
        measured = parse_fio(document, path)
        reads = [ReadRate(size, rate) for size, rate in measured.rates]
        return _from_reads(path.name, measured.queue_depth, reads, path)
    return parse_device(document, path)


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
    reads = [ReadRate(**rate) for rate in document.get("reads", ())]
    if "operation_seconds" not in document:
        return _from_reads(document["name"], document["queue_depth"], reads, where)
    _check_reads(reads, where)
    return DeviceModel(
        name=document["name"],
        queue_depth=document["queue_depth"],
        operation_seconds=float(document["operation_seconds"]),
        bytes_per_second=float(document["bytes_per_second"]),
        reads=tuple(reads),
    )


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
