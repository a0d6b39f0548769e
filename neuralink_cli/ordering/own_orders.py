"""Orders that users bring: permutations in a file, and named orders of installed packages."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from neuralink_cli.activations.trace import TraceBlock
from neuralink_cli.arrays import Neurons, Order
from neuralink_cli.errors import InputError, OptionError, advising
from neuralink_cli.files.input_file import require_reachable
from neuralink_cli.files.tensor_file import TensorFile
from neuralink_cli.placement.bits import Bits
from neuralink_cli.placement.placement import ORDER_NAMES, STORED

GROUP = "neuralink.orders"
"""Entry points of this group are functions from bit vectors, uint64 `[n, words]`, to a permutation of 0 to n - 1."""

IMPORTED = "imported"
"""The name of an order from a file."""

# Makes the order of some neurons of a block from their bit vectors: `order[slot]` is a row of them.
OrderMaker = Callable[[Bits], Neurons]

_DTYPES = {"I32": "<i4", "I64": "<i8", "U32": "<u4", "U16": "<u2", "U64": "<u8"}


@dataclass(frozen=True)
class OwnOrder:
    """An order that a user brings.

    Attributes:
        name: As `--order` takes it.
        origin: Where it comes from, for the placement: the name of a file, or a package with its version.
        permutations: From a file: int32 `[n]` by block id, `order[slot] = neuron`.
        function: Of a package.
    """

    name: str
    origin: str
    permutations: Mapping[str, Order] | None = None
    function: Callable[[Bits], Any] | None = None

    def maker(self, block: TraceBlock, neurons: Neurons) -> OrderMaker:
        """What orders some neurons of a block, ascending: int32, those that are not pinned.

        Raises:
            InputError: When called: the function fails, or what it returns is no permutation.
        """
        if self.permutations is not None:
            whole = self.permutations[block.id]
            kept = whole[np.isin(whole, neurons)]
            return lambda _bits: np.searchsorted(neurons, kept).astype(np.int32)

        def call(bits: Bits) -> Neurons:
            assert self.function is not None
            try:
                found = self.function(bits.copy())
            except Exception as error:
                raise InputError(
                    f"order {self.name!r} of {self.origin} fails for block {block.id!r}: "
                    f"{type(error).__name__}: {error}"
                ) from error
            return _permutation(found, bits.shape[0], f"order {self.name!r} of {self.origin}, block {block.id!r},")

        return call


def read_orders(path: Path, blocks: Sequence[TraceBlock]) -> OwnOrder:
    """Read the permutations of all blocks of a trace from a safetensors or `.npz` file: integers `[n]` by block id.

    Raises:
        InputError: The file cannot be read, lacks a block or has others, or one of them is no permutation.
    """
    with advising("pass a permutation of the neurons of every block, as docs/ordering.md describes"):
        require_reachable(path)
        arrays = _read_npz(path) if path.suffix == ".npz" else _read_safetensors(path)
        wanted = {block.id for block in blocks}
        for names, what in ((wanted - set(arrays), "lacks"), (set(arrays) - wanted, "has, beside those of the trace,")):
            if names:
                shown = ", ".join(sorted(names)[:3]) + (" and more" if len(names) > 3 else "")
                raise InputError(f"{what} the order of {shown}", where=path)
        found = {block.id: _permutation(arrays[block.id], block.neurons, f"{path}: {block.id!r}") for block in blocks}
    return OwnOrder(IMPORTED, path.name, permutations=found)


def _read_npz(path: Path) -> Mapping[str, npt.NDArray[Any]]:
    try:
        with np.load(path, allow_pickle=False) as opened:
            return {name: opened[name] for name in opened.files}
    except (OSError, ValueError, zipfile.BadZipFile, EOFError) as error:
        raise InputError(f"is not an .npz file of arrays ({error})", where=path) from None


def _read_safetensors(path: Path) -> Mapping[str, npt.NDArray[Any]]:
    found = {}
    with TensorFile(path) as opened:
        for entry in opened.header.entries:
            if entry.dtype not in _DTYPES:
                raise InputError(f"tensor {entry.name!r} has dtype {entry.dtype}, but orders are integers", where=path)
            found[entry.name] = opened.read(entry.name).view(_DTYPES[entry.dtype]).reshape(entry.shape)
    return found


def _permutation(found: Any, neurons: int, what: str) -> Order:
    order = np.asarray(found)
    integers = order.dtype.kind in "iu"
    if not integers or order.shape != (neurons,) or not np.array_equal(np.sort(order), np.arange(neurons)):
        raise InputError(f"{what} is not a permutation of 0 to {neurons - 1}: {order.dtype} {list(order.shape)}")
    return order.astype(np.int32)


def installed_orders() -> Mapping[str, EntryPoint]:
    """The named orders of installed packages that do not take the name of one that is built in."""
    return {
        point.name: point
        for point in sorted(entry_points(group=GROUP), key=lambda point: (point.name, point.value))
        if point.name not in (*ORDER_NAMES, STORED, IMPORTED)
    }


def load_order(name: str) -> OwnOrder:
    """A named order of an installed package.

    Raises:
        OptionError: No package has one of that name.
        InputError: The package cannot be imported.
    """
    installed = installed_orders()
    if name not in installed:
        known = ", ".join([*ORDER_NAMES, IMPORTED, *installed])
        raise OptionError(
            f"order {name!r} is not one of {known}", fix=f"packages add orders as entry points of {GROUP}"
        )
    point = installed[name]
    origin = f"{point.dist.name} {point.dist.version}" if point.dist is not None else point.value
    try:
        function = point.load()
    except Exception as error:
        raise InputError(f"order {name!r} of {origin} cannot be loaded: {type(error).__name__}: {error}") from error
    if not callable(function):
        raise InputError(f"order {name!r} of {origin} is not a function")
    return OwnOrder(name, origin, function=function)
