"""Runs a build: the stages whose inputs, options or outputs are not as the lock file says, and no others."""

from __future__ import annotations

import gc
import logging
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from neuralink_cli.errors import MismatchError, OutputError, VerificationError
from neuralink_cli.files.durable import leftover_bytes, locked_directory
from neuralink_cli.files.json_text import read_object
from neuralink_cli.pipeline.fleet import FleetCell, RealReads, read_real, read_summary
from neuralink_cli.pipeline.inputs import ModelInput, read_model
from neuralink_cli.pipeline.lock import Lock, LockEntry, differences, read_lock, write_lock
from neuralink_cli.pipeline.needs import forward_needs, layout_needs
from neuralink_cli.pipeline.options import LOCK_FILE, SUMMARY_FILE, BuildOptions
from neuralink_cli.pipeline.outputs import content_digest, damage, digest_files, require_own
from neuralink_cli.pipeline.stages import Stage, build_stages
from neuralink_cli.progress import Progress, no_progress
from neuralink_cli.sizes import human_seconds

logger = logging.getLogger(__name__)

# What a run killed at its very start leaves behind.
_LEFTOVERS = frozenset((f".{LOCK_FILE}.partial",))
_SHOWN_DIFFERENCES = 3
NOT_MADE = "not made yet"


@dataclass(frozen=True)
class BuiltStage:
    """A stage of a finished build.

    Attributes:
        why: Why it was run; None if its output was up to date.
    """

    stage: str
    device: str | None
    output: str
    digest: str
    why: str | None


@dataclass(frozen=True)
class BuildSummary:
    """What a build made.

    Attributes:
        stages: All stages, also those that had nothing to do.
        tokens: Held-out tokens that the layouts were replayed on.
        cells: Every layout on every device.
        forward: For every device whose layout was run, how far it is from the model, as `verify --forward --json` says.
        real: For every device whose layout was read from the local disk, what that took.
    """

    output: str
    stages: tuple[BuiltStage, ...]
    tokens: int
    cells: tuple[FleetCell, ...]
    forward: Mapping[str, Mapping[str, Any]]
    real: Mapping[str, RealReads]


@dataclass(frozen=True)
class PlannedStage:
    """What a build would do about a stage.

    Attributes:
        why: Why it would run; None if its output is up to date.
        certain: False if it runs only should an earlier stage come out different.
    """

    stage: Stage
    why: str | None
    certain: bool = True


def build(
    model: str | Path,
    output: Path,
    options: BuildOptions,
    *,
    locked: bool = False,
    progress: Progress = no_progress,
) -> BuildSummary:
    """Record a trace of a model and make, verify and measure a layout for every class of devices.

    A stage runs only if what it is made from (its inputs by digest, its options, the version of neuralink) or what it
    made is not as the lock file of the build says. A stopped build resumes where it stopped.

    Args:
        model: A checkpoint directory; a string may also be a hub id, see `find_model`.
        output: Absent, empty, or an earlier build.
        locked: Write no lock file, and refuse whatever would come out, or came out, different from it.

    Raises:
        OutputError: `output` is not a build, holds what this build did not write, or is being written by another run.
        MismatchError: `locked`, and something differs.
        VerificationError: A layout does not hold the model.
        OptionError, InputError, UnsupportedError, MissingDependencyError: As the stages.
    """
    _require_build(output)
    source = read_model(model, options)
    _require_apart(output, source)
    stages = build_stages(source, output, options)
    if not output.exists():
        output.mkdir()
    with locked_directory(output):
        lock = _claimed(output, stages, locked=locked)
        _require_room(output, source, options, stages, lock)
        built = tuple(_run_all(output, stages, lock, locked=locked, progress=progress))
        if not locked:
            # Without the entries of devices that are not built any more.
            _tell_of_dropped(output, stages, lock)
            write_lock(output / LOCK_FILE, {stage.output: lock[stage.output] for stage in stages})
    tokens, cells = read_summary(output / SUMMARY_FILE)
    made = {name: [stage for stage in stages if stage.name == name] for name in ("forward", "real")}
    return BuildSummary(
        str(output),
        built,
        tokens,
        cells,
        {str(stage.device): read_object(output / stage.output) for stage in made["forward"]},
        {str(stage.device): read_real(output / stage.output) for stage in made["real"]},
    )


def plan_build(
    source: ModelInput, output: Path, options: BuildOptions, *, locked: bool = False, progress: Progress = no_progress
) -> tuple[PlannedStage, ...]:
    """What `build` would do. Reads all outputs that there are, to find damage; writes nothing.

    Raises:
        As `build` before its first stage.
    """
    _require_build(output)
    _require_apart(output, source)
    stages = build_stages(source, output, options)
    lock = read_lock(output / LOCK_FILE) or {}
    if locked:
        _require_locked(output, stages, lock)
    require_own(output, stages, lock)
    planned: list[PlannedStage] = []
    digests: dict[str, str] = {}
    # The titles of the stages that run, by what they make.
    unsure: dict[str, str] = {}
    for stage in stages:
        entry = lock.get(stage.output)
        before = [unsure[name] for name in stage.after if name in unsure]
        if entry is not None and entry.digest is not None:
            digests[stage.output] = entry.digest
        known = all(name in digests for name in stage.after)
        why = _why(stage, entry, digests, output, progress) if known else NOT_MADE
        if why is None and before:
            planned.append(PlannedStage(stage, f"if {before[0]} comes out different", certain=False))
        else:
            planned.append(PlannedStage(stage, why))
        if planned[-1].why is not None:
            unsure[stage.output] = stage.title
    return tuple(planned)


def _require_build(output: Path) -> None:
    """Check that a directory is absent, empty or a build."""
    if output.is_dir():
        if any(child.name not in _LEFTOVERS for child in output.iterdir()) and not (output / LOCK_FILE).is_file():
            raise OutputError(
                f"is not empty and not a build: it has no {LOCK_FILE}", where=output, fix="choose another output"
            )
    elif os.path.lexists(output):
        raise OutputError("is not a directory", where=output, fix="choose another output")
    elif not output.absolute().parent.is_dir():
        raise OutputError("its folder does not exist", where=output, fix=f"create {output.absolute().parent} first")


def _require_apart(output: Path, source: ModelInput) -> None:
    """What lies in the folder of a model is part of it."""
    if output.resolve().is_relative_to(source.directory.resolve()):
        raise OutputError("is in the folder of the model", where=output, fix="choose another output")


def _claimed(output: Path, stages: tuple[Stage, ...], *, locked: bool) -> Lock:
    """The lock, with an entry for every stage: from then on what the stages write is the build's."""
    path = output / LOCK_FILE
    lock = read_lock(path) or {}
    if locked:
        _require_locked(output, stages, lock)
    require_own(output, stages, lock)
    if locked:
        return lock
    claimed = dict(lock)
    for stage in stages:
        claimed.setdefault(stage.output, LockEntry(stage.name, stage.device, stage.output, None, {}, None, {}))
    if claimed != lock:
        write_lock(path, claimed)
    return claimed


def _require_locked(output: Path, stages: tuple[Stage, ...], lock: Lock) -> None:
    """Check, before anything runs, that the lock was made from the same.

    Raises:
        MismatchError: There is no whole lock, or the message says what differs from it.
    """
    path = output / LOCK_FILE
    digests = {name: entry.digest for name, entry in lock.items() if entry.digest is not None}
    outputs = {stage.output for stage in stages}
    absent = next((stage for stage in stages if stage.output not in digests), None)
    if absent is not None:
        raise MismatchError(
            f"does not say what {absent.title} makes" if lock else "is not there, so nothing is locked",
            where=path,
            fix="build once without --locked",
        )
    other = next((entry for name, entry in lock.items() if name not in outputs), None)
    if other is not None:
        raise MismatchError(
            f"lists {other.output}, which is not built any more", where=path, fix="build once without --locked"
        )
    for stage in stages:
        found = list(differences(lock[stage.output].made_from, stage.made_from(digests)))
        if found:
            raise MismatchError(
                f"{stage.title} is not made from what the lock file says: {_listed(found)}",
                where=path,
                fix="build without --locked to accept it",
            )


def _require_room(
    output: Path, source: ModelInput, options: BuildOptions, stages: tuple[Stage, ...], lock: Lock
) -> None:
    """Check before the first stage, which may take hours, that all layouts that are not there can be made, and fit."""
    layouts = [stage for stage in stages if stage.name == "relayout"]
    unmade = [stage for stage in layouts if not _is_made_from(lock[stage.output], stage.inputs)]
    if unmade:
        needed = layout_needs(source, options, output).bytes_written
        absent = [output / stage.output for stage in unmade if not lock[stage.output].files]
        left = sum(needed - min(leftover_bytes(path), needed) for path in absent)
        if options.forward is not None:
            left += forward_needs(source, options).disk_bytes
        free = shutil.disk_usage(output).free
        if free < left:
            raise OutputError(
                f"its layouts need {left:,} bytes of disk, {free:,} are free", where=output, fix="free some space"
            )


def _is_made_from(entry: LockEntry, inputs: Mapping[str, Any]) -> bool:
    """Whether an output has been made from some inputs, whatever the outputs of earlier stages were."""
    return entry.made_from is not None and all(entry.made_from.get(key) == value for key, value in inputs.items())


def _run_all(
    output: Path, stages: tuple[Stage, ...], lock: Lock, *, locked: bool, progress: Progress
) -> Iterator[BuiltStage]:
    digests: dict[str, str] = {}
    for number, stage in enumerate(stages, start=1):
        title = f"[{number}/{len(stages)}] {stage.title}"
        entry = lock[stage.output]
        why = _why(stage, entry, digests, output, progress)
        if why is None:
            logger.info("%s: up to date", title)
        else:
            logger.info("%s: %s", title, why)
            started = time.monotonic()
            try:
                made = _make(stage, digests, output, progress)
            except VerificationError:
                if stage.name == "verify" and not locked:
                    _make_again(output, stage, lock)
                raise
            if locked:
                _require_same(output, stage, entry, made)
            else:
                lock[stage.output] = made
                write_lock(output / LOCK_FILE, lock)
            entry = made
            logger.info("%s: done in %s", title, human_seconds(time.monotonic() - started))
        assert entry.digest is not None
        digests[stage.output] = entry.digest
        yield BuiltStage(stage.name, stage.device, stage.output, entry.digest, why)


def _make_again(output: Path, stage: Stage, lock: Lock) -> None:
    """Note that what a stage has found to be wrong is to be made again: the next run must not believe the digests."""
    for name in stage.after:
        lock[name] = replace(lock[name], made_from=None, digest=None)
    write_lock(output / LOCK_FILE, lock)


def _why(
    stage: Stage, entry: LockEntry | None, digests: Mapping[str, str], output: Path, progress: Progress
) -> str | None:
    """Why a stage has to run; None if its output is what it would make."""
    if entry is None or entry.made_from is None:
        return NOT_MADE
    found = list(differences(entry.made_from, stage.made_from(digests)))
    if found:
        return f"changed: {_listed(found)}"
    return damage(output, entry, progress)


def _make(stage: Stage, digests: Mapping[str, str], output: Path, progress: Progress) -> LockEntry:
    if stage.device is not None:
        (output / stage.device).mkdir(exist_ok=True)
    stage.make(progress)
    if stage.name == "profile":
        # A model is objects in circles, which would stay in memory until the collector comes by.
        gc.collect()
    files = digest_files(output, stage.output, progress)
    digest = content_digest(stage, output, files)
    made_from = stage.made_from(digests)
    return LockEntry(stage.name, stage.device, stage.output, made_from, stage.versions(), digest, files)


def _require_same(output: Path, stage: Stage, entry: LockEntry, made: LockEntry) -> None:
    if not stage.repeatable or (made.digest, made.files) == (entry.digest, entry.files):
        return
    changed = sorted(name for name in {*made.files, *entry.files} if made.files.get(name) != entry.files.get(name))
    other = list(differences(dict(entry.versions), dict(made.versions)))
    versions = f"; other versions: {_listed(other)}" if other else ""
    raise MismatchError(
        f"{stage.title} came out different from the lock file: {_listed(changed)}{versions}",
        where=output / stage.output,
        fix="build without --locked to accept it",
    )


def _tell_of_dropped(output: Path, stages: tuple[Stage, ...], lock: Lock) -> None:
    kept = {stage.output for stage in stages}
    for name in lock:
        if name not in kept and os.path.lexists(output / name):
            logger.info("%s is not built any more; it is left as it is", output / name)


def _listed(found: list[str]) -> str:
    more = len(found) - _SHOWN_DIFFERENCES
    return ", ".join(found[:_SHOWN_DIFFERENCES]) + (f" and {more} more" if more > 0 else "")
