"""A Dask cluster on this machine: a scheduler in this process, and workers in processes of their own.

Workers are started as programs in a session of their own, so that Ctrl-C reaches this process only, and write to a log,
not to the terminal. One that ends is replaced. They end when the scheduler does, however this process ends.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from neuralink_cli.errors import WorkerError

# A block whose worker ended this many times more than once is tried alone, see `dask_tasks`.
_ALLOWED_FAILURES = 1
# Workers that end before they are connected: something is wrong with all of them.
_FAILED_STARTS = 3
_START_SECONDS = 120
_LOG = "workers.log"
_WORKER = "from distributed.cli.dask_worker import main; main()"
_ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")


@contextlib.contextmanager
def local_workers(count: int) -> Iterator[str]:
    """The address of a scheduler with `count` workers of one thread each.

    Raises:
        WorkerError: They do not start.
    """
    import dask
    from distributed import LocalCluster

    with (
        tempfile.TemporaryDirectory(prefix="neuralink-", ignore_cleanup_errors=True) as folder,
        dask.config.set({"distributed.scheduler.allowed-failures": _ALLOWED_FAILURES, "temporary-directory": folder}),
    ):
        cluster = LocalCluster(
            n_workers=0,
            processes=False,
            protocol="tcp://",
            host="127.0.0.1",
            dashboard_address="127.0.0.1:0",
            silence_logs=False,
        )
        processes = _Processes(cluster.scheduler_address, Path(folder), count)
        try:
            processes.start()
            processes.wait_for(cluster.scheduler)
            yield cluster.scheduler_address
        finally:
            processes.stop()
            with contextlib.suppress(Exception):
                cluster.close(timeout=5)


class _Processes:
    """Keeps workers running: a thread replaces those that end."""

    def __init__(self, address: str, folder: Path, count: int) -> None:
        self._address, self._folder, self._count = address, folder, count
        self._running: list[subprocess.Popen[bytes]] = []
        self._ended = 0
        self._stop = threading.Event()
        self._watching = threading.Thread(target=self._replace, daemon=True)

    def start(self) -> None:
        """Start all of them."""
        for _ in range(self._count):
            self._running.append(self._launch())
        self._watching.start()

    def wait_for(self, scheduler: Any) -> None:
        """Wait until all have connected.

        Raises:
            WorkerError: Some end again and again, or none comes.
        """
        for _ in range(_START_SECONDS * 20):
            if len(scheduler.workers) >= self._count:
                return
            if self._ended >= _FAILED_STARTS:
                raise WorkerError(f"workers of --workers end as soon as they start: {self._last_line()}")
            self._stop.wait(0.05)
        raise WorkerError(f"workers of --workers do not start within {_START_SECONDS} s: {self._last_line()}")

    def stop(self) -> None:
        """End all of them at once."""
        self._stop.set()
        if self._watching.ident is not None:
            self._watching.join()
        for process in self._running:
            process.kill()
        for process in self._running:
            process.wait()

    def _replace(self) -> None:
        while not self._stop.wait(0.2):
            for index, process in enumerate(self._running):
                if process.poll() is not None:
                    self._ended += 1
                    self._running[index] = self._launch()

    def _launch(self) -> subprocess.Popen[bytes]:
        # The same modules as here, wherever they come from.
        path = os.pathsep.join(os.path.abspath(entry) for entry in sys.path)  # noqa: PTH100
        options = ["--nthreads", "1", "--no-nanny", "--no-dashboard", "--memory-limit", "0", "--death-timeout", "60"]
        # Imported before a worker registers, since importing it blocks what answers the scheduler.
        options += ["--preload", "neuralink_cli.clustering.dask_worker"]
        with (self._folder / _LOG).open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-c", _WORKER, self._address, *options, "--local-directory", str(self._folder)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self._folder,
                env={**os.environ, **_ONE_THREAD, "PYTHONPATH": path},
                start_new_session=True,
            )

    def _last_line(self) -> str:
        lines = (self._folder / _LOG).read_text(encoding="utf-8", errors="replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "they say nothing")
