"""How much memory may be taken: what the machine has left, and what the control groups above this process allow.

A container, a service or a batch job is killed when it goes beyond the limit of its own control group or of any above
it, however much the machine has left. Version 1 and version 2 of the interface keep the same figures in other files.
"""

from __future__ import annotations

import contextlib
import logging
import resource
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from neuralink_cli.sizes import human_bytes

logger = logging.getLogger(__name__)

_GROUPS_OF_PROCESS = Path("/proc/self/cgroup")
_MOUNT = Path("/sys/fs/cgroup")
_STATUS = Path("/proc/self/status")


@dataclass(frozen=True)
class _Files:
    """Where a version keeps limits, the use, and the part of it that the page cache would give back at once."""

    limits: tuple[str, ...]
    used: str
    reclaimable: str


_VERSION_1 = _Files(("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_inactive_file")
_VERSION_2 = _Files(("memory.max", "memory.high"), "memory.current", "inactive_file")


def available_memory() -> int:
    """Bytes of memory available without swapping, within the limits of all control groups of this process."""
    import psutil

    return max(min([int(psutil.virtual_memory().available), *allowed_by_groups()]), 0)


def remark_if_short(needed: int) -> None:
    """Log a warning before a run that may take more memory than it is allowed: the system ends it without a word.

    Args:
        needed: The most memory that this process will have resident, in bytes, with what it has now.
    """
    import psutil

    taken = psutil.Process().memory_info()
    free = available_memory()
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY:
        # Of addresses, which are never fewer than what is resident.
        free = max(min(free, limit - taken.vms), 0)
    if needed - taken.rss > free:
        logger.warning(
            "may need %s more memory, of which %s are free here: if it runs out, the system ends it",
            human_bytes(needed - taken.rss),
            human_bytes(free),
        )


def resident_bytes() -> int:
    """The most memory that this process has had resident so far, in bytes."""
    with contextlib.suppress(OSError, ValueError, StopIteration):
        # What `getrusage` says of a process starts with the memory of the one that started it.
        lines = _STATUS.read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def with_margin(needed: int) -> int:
    """A sum of bytes as it is announced: a little more, for what no sum knows of, as threads and unused memory."""
    return round(1.06 * needed)


def allowed_by_groups(groups: Path = _GROUPS_OF_PROCESS, mount: Path = _MOUNT) -> Iterator[int]:
    """Bytes that each limited control group of this process leaves, from its own up to the root.

    Args:
        groups: Lists the groups of the process, as `/proc/self/cgroup`.
        mount: Where the groups are mounted.
    """
    try:
        lines = groups.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            roots, files = [mount, mount / "unified"], _VERSION_2
        elif "memory" in controllers.split(","):
            roots, files = [mount / "memory", mount / controllers], _VERSION_1
        else:
            continue
        for root in dict.fromkeys(roots):
            yield from _allowed_above(root, path, files)


def _allowed_above(root: Path, path: str, files: _Files) -> Iterator[int]:
    """What the groups from `path` up to the root of a hierarchy leave.

    A container may see the path that its group has outside while only its own group is mounted, as the root.
    """
    folder = root / path.strip("/")
    for group in (folder, *folder.parents):
        if not group.is_relative_to(root):
            return
        for limit in files.limits:
            with contextlib.suppress(OSError, ValueError, KeyError):
                allowed = int((group / limit).read_text())
                stated = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
                yield allowed - int((group / files.used).read_text()) + int(stated.get(files.reclaimable, 0))
