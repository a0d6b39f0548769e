"""Connects to a Dask cluster, or starts one on this machine, and checks that its workers run the same software."""

from __future__ import annotations

import contextlib
import logging
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neuralink_cli.errors import InputError, MissingDependencyError, OptionError, WorkerError, advising, first_line
from neuralink_cli.files.input_file import read_input
from neuralink_cli.files.json_text import parse_object

logger = logging.getLogger(__name__)

# A scheduler that is there answers in less.
_CONNECT_SECONDS = 20
# Libraries that write to the log of this process.
_NOISY = ("distributed", "dask", "tornado", "asyncio", "bokeh")

# Whether nobody else in this process had imported Dask.
_state = {"ours": False}


@dataclass(frozen=True)
class DaskOptions:
    """Workers of Dask that order blocks: those of a scheduler, or some that are started on this machine.

    Attributes:
        scheduler: Address of a scheduler, such as tcp://10.0.0.1:8786, or the JSON file that it writes.
        workers: Processes to start on this machine.
        send_trace: Send each block's rows to its worker, for workers that do not see the file.
    """

    scheduler: str | None = None
    workers: int | None = None
    send_trace: bool = False

    def __post_init__(self) -> None:
        if (self.scheduler is None) == (self.workers is None):
            raise OptionError("pass exactly one of --scheduler and --workers")
        if self.workers is not None and self.workers < 1:
            raise OptionError(f"--workers {self.workers} is not at least 1")


def require_dask() -> None:
    """Check that Dask can be imported.

    Raises:
        MissingDependencyError: It cannot.
    """
    _state["ours"] = _state["ours"] or "distributed" not in sys.modules
    try:
        import distributed  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError(
            f"ordering on a cluster needs the Python package distributed ({error})",
            fix="pip install 'neuralink-cli[dask]'",
        ) from None


@contextlib.contextmanager
def connected(options: DaskOptions) -> Iterator[Any]:
    """A `distributed.Client` of the cluster, all of whose workers run the software that runs here.

    Workers that were started for it end with the block.

    Raises:
        MissingDependencyError: Dask is not installed.
        InputError: The file of the scheduler cannot be read.
        WorkerError: No scheduler answers, or no worker starts.
        MismatchError: Versions differ.
    """
    require_dask()
    with _quiet(), contextlib.ExitStack() as stack:
        if options.workers is not None:
            from neuralink_cli.clustering.dask_local import local_workers

            address = stack.enter_context(local_workers(options.workers))
        else:
            found = scheduler_address(options)
            assert found is not None
            address = found
        client = _client(address)
        stack.callback(_close, client)
        _require_same_software(client, address)
        yield client


def scheduler_address(options: DaskOptions) -> str | None:
    """The address of the scheduler; None if one is going to be started.

    Raises:
        InputError: Its file cannot be read, or is none.
    """
    if options.scheduler is None or "://" in options.scheduler:
        return options.scheduler
    path = Path(options.scheduler)
    with advising("pass an address like tcp://HOST:8786, or the file that `dask scheduler --scheduler-file` wrote"):
        address = parse_object(read_input(path), path).get("address")
        if not isinstance(address, str):
            raise InputError("is not the file of a Dask scheduler (it has no address)", where=path)
    return address


def _client(address: str) -> Any:
    from distributed import Client

    try:
        return Client(address, timeout=_CONNECT_SECONDS, set_as_default=False)
    except (OSError, TimeoutError) as error:
        # Dask retries until the time is up, and names the last failure only in the cause.
        raise WorkerError(
            f"no Dask scheduler answers at {address} ({first_line(error)})",
            fix="is it running, and is that its address?",
        ) from None
    except (ValueError, TypeError, ImportError) as error:
        raise OptionError(f"--scheduler {address!r} is not an address of Dask ({first_line(error)})") from None


def _close(client: Any) -> None:
    with contextlib.suppress(Exception):
        client.close(timeout=5)


def _require_same_software(client: Any, address: str) -> None:
    """Compare the versions of the scheduler, which unpacks tasks, and of all workers there are.

    A worker that joins later compares them itself, see `order_on_worker`.
    """
    from neuralink_cli.clustering.dask_worker import require_same_software, software

    ours = software()
    found = client.get_versions(packages=["neuralink_cli", "numpy", "numba"])
    places = {f"scheduler {address}": found["scheduler"]}
    places |= {f"worker {name}": versions for name, versions in found["workers"].items()}
    for where, versions in places.items():
        packages = dict(versions["packages"])
        theirs = {
            "Python": ".".join(str(packages.get("python")).split(".")[:2]),
            "neuralink": packages.get("neuralink_cli"),
            "numpy": packages.get("numpy"),
            "numba": packages.get("numba"),
        }
        require_same_software(ours, theirs, where)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Within the block what Dask logs and warns of is at most told to those who asked for more (`--verbose`)."""
    names = [name for name in logging.root.manager.loggerDict if name.partition(".")[0] in _NOISY]
    changed = [logging.getLogger(name) for name in {*names, *_NOISY}]
    before = [(noisy, noisy.handlers[:], noisy.propagate) for noisy in changed]
    for noisy in changed:
        noisy.handlers[:] = [_Forward()]
        noisy.propagate = False
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"distributed(\..*)?|dask(\..*)?")
        try:
            yield
        finally:
            # A program that uses Dask itself gets its log back. On the command line it would tell of the closing.
            if not _state["ours"]:
                for noisy, handlers, propagate in before:
                    noisy.handlers[:] = handlers
                    noisy.propagate = propagate


class _Forward(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(Exception):
            logger.debug("%s: %s", record.name, record.getMessage())
