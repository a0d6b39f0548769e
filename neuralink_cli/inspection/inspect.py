"""Says of any artefact what it is, what it gained, what the next stage needs, and what can be done next."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from neuralink_cli.activations.trace import Trace
from neuralink_cli.architectures.architecture import parse_architecture
from neuralink_cli.checkpoint.checkpoint import Checkpoint
from neuralink_cli.checkpoint.hub import ModelSource, find_model
from neuralink_cli.devices.device import DeviceModel, device_record, find_device
from neuralink_cli.errors import OptionError
from neuralink_cli.files.input_file import digest_of
from neuralink_cli.inspection.checkpoint_facts import CheckpointFacts, read_checkpoint
from neuralink_cli.inspection.facts import Facts, read_facts
from neuralink_cli.inspection.kinds import (
    CHECKPOINT,
    DEVICE,
    FIO,
    PLACED_KINDS,
    PLACEMENT,
    TRACE,
    Found,
    recognise,
    with_article,
)
from neuralink_cli.inspection.next_steps import NextStep, after_checkpoint, after_document, after_stage
from neuralink_cli.inspection.reading import ReadingTime
from neuralink_cli.layout.companions import was_changed
from neuralink_cli.layout.open_layout import check_weight_files, open_layout
from neuralink_cli.placement.placement import Placement
from neuralink_cli.progress import Progress, no_progress

# What is a file even if it has a name that a model could have, and is not there.
_FILE_ENDINGS = (".safetensors", ".json", ".toml", ".html")

# What `cluster` holds out if it is not told otherwise.
_HELD_OUT = 0.2


@dataclass(frozen=True)
class Need:
    """What a stage needs, in bytes; `what` says for which stage and of which kind."""

    stage: str
    what: str
    bytes: int


@dataclass(frozen=True)
class DeviceFacts:
    """A device profile, or fio's output read as one.

    Attributes:
        operation_in_bundles: What a read operation costs in bundles of some sizes, by their bytes.
    """

    path: Path
    device: Mapping[str, Any]
    hot_rate: float | None
    operation_in_bundles: Mapping[int, float]


@dataclass(frozen=True)
class ArchitectureFacts:
    """A description of an architecture: its block ids, with the tensors of each role."""

    path: Path
    name: str
    task: str
    model_types: tuple[str, ...]
    blocks: Mapping[str, Mapping[str, str]]


@dataclass(frozen=True)
class Inspection:
    """What a file or directory is.

    Attributes:
        kind: One of the names of `kinds`.
        facts: What it says of itself.
        needs: What the next stages need, as far as that is known without running them.
        reading: How long reading a token takes; None if it holds no order that was measured for its bundles.
        next_steps: Commands that accept it.
        checked: What `check` found to be right; None without `check`.
    """

    kind: str
    facts: CheckpointFacts | Facts | DeviceFacts | ArchitectureFacts
    needs: tuple[Need, ...]
    next_steps: tuple[NextStep, ...]
    checked: tuple[str, ...] | None
    reading: ReadingTime | None = None

    def as_document(self) -> dict[str, Any]:
        """Everything for JSON."""
        facts = {key: str(value) if isinstance(value, Path) else value for key, value in asdict(self.facts).items()}
        return {
            "kind": self.kind,
            **facts,
            "needs": [asdict(need) for need in self.needs],
            "reading": None if self.reading is None else self.reading.as_document(),
            "next": [asdict(step) for step in self.next_steps],
            "checked": None if self.checked is None else list(self.checked),
        }


def inspect(
    path: str | Path,
    *,
    revision: str | None = None,
    check: bool = False,
    tokens_per_second: float | None = None,
    progress: Progress = no_progress,
) -> Inspection:
    """Describe a checkpoint, trace, placement, layout, device profile, fio output or architecture.

    Only headers, configs and indexes are read.

    Args:
        path: A file or directory; a string may also be the hub id of a checkpoint, see `find_model`.
        revision: Branch, tag or commit of a hub model.
        tokens_per_second: Also say how fast storage must be to read for so many.
        check: Also read everything that has a digest and compare it; compute the fingerprint of a checkpoint.

    Raises:
        OptionError: Tokens per second of something that holds no order, or a revision of a local path.
        InputError: It is something else, damaged or malformed.
        UnsupportedError: A checkpoint with weights that are not understood.
        VerificationError: A layout that was changed after it was written.
    """
    source = ModelSource(Path(path), None)
    if revision is not None or (isinstance(path, str) and not path.endswith(_FILE_ENDINGS)):
        source = find_model(path, revision)
    path = source.directory
    found = recognise(path)
    if tokens_per_second is not None and found.kind not in PLACED_KINDS:
        raise OptionError(
            f"--tokens-per-second is for placements and layouts, but {path} is {with_article(found.kind)}",
            fix="see what `neuralink estimate MODEL --trace TRACE` says",
        )
    if found.kind == CHECKPOINT:
        checkpoint = read_checkpoint(path, source.origin)
        checked = _check_checkpoint(path) if check else None
        return Inspection(found.kind, checkpoint, _needs_of(checkpoint), after_checkpoint(checkpoint), checked)
    if found.document is not None:
        document = _device_facts(path) if found.kind in (DEVICE, FIO) else _architecture_facts(found)
        return Inspection(
            found.kind, document, (), after_document(path, found.kind), ("its schema",) if check else None
        )
    facts = read_facts(found)
    checked = tuple(_check_stage(found, progress)) if check else None
    reading = _reading_time(facts, tokens_per_second)
    return Inspection(found.kind, facts, tuple(_needs_after(facts)), after_stage(facts), checked, reading)


def _reading_time(facts: Facts, tokens_per_second: float | None) -> ReadingTime | None:
    if facts.read_bytes is None or facts.device is None:
        return None
    rate = float(facts.device["bytes_per_second"])
    return ReadingTime(facts.device["name"], facts.read_bytes / rate, tokens_per_second)


def _device_facts(path: Path) -> DeviceFacts:
    device: DeviceModel = find_device(str(path))
    sizes = (1024, 4096, 12288, 24576)
    costs = {size: device.operation_in_bundles(size) for size in sizes}
    return DeviceFacts(path, device_record(device), device.hot_rate, costs)


def _architecture_facts(found: Found) -> ArchitectureFacts:
    architecture = parse_architecture(dict(found.document or {}), found.path)
    blocks: dict[str, dict[str, str]] = {}
    for block in architecture.blocks:
        blocks.setdefault(block.id, {}).update({role: part.weight for role, part in block.parts.items()})
    return ArchitectureFacts(found.path, architecture.name, architecture.task, architecture.model_types, blocks)


def _needs_of(facts: CheckpointFacts) -> tuple[Need, ...]:
    if facts.problem is not None:
        return ()
    weights = "memory for weights as float32, the default on CPUs (with less, --max-memory reads them for every batch)"
    return (
        Need("profile", weights, facts.loaded_bytes),
        Need("profile", "disk for a trace of a million tokens", round(1_000_000 * facts.trace_bytes_per_token)),
        Need("relayout", "disk for a layout as in the source", facts.bytes),
        Need("relayout", "memory for the largest block", facts.largest_block_bytes),
    )


def _needs_after(facts: Facts) -> Iterator[Need]:
    if facts.kind == TRACE:
        # Imported here because numba is slow to import and only a trace needs it.
        from neuralink_cli.clustering.preflight import block_bytes
        from neuralink_cli.placement.held_out import split_tokens
        from neuralink_cli.placement.planned_size import placement_bytes

        with Trace(facts.path) as trace:
            split = split_tokens(trace, _HELD_OUT)
            largest = max(block_bytes(trace, block, split, 0.0) for block in trace.info.blocks)
            yield Need("cluster", "memory for each block ordered at a time", largest)
            yield Need("cluster", "disk for the placement", placement_bytes(trace))
    elif facts.kind == PLACEMENT and facts.flash_bytes is not None:
        sizes = [block.neurons * (block.bundle_bytes or 0) for block in facts.blocks]
        yield Need("relayout", "disk for the bundles, beside all other weights", facts.flash_bytes)
        yield Need("relayout", "memory for the largest block", max(sizes))
    elif facts.dram_bytes:
        kept = sum(facts.dram_bytes.values())
        yield Need("a runtime", "DRAM for weights as they are stored, without a cache for bundles", kept)


def _check_checkpoint(path: Path) -> tuple[str, ...]:
    with Checkpoint(path) as checkpoint:
        return (f"fingerprint {checkpoint.fingerprint} (computed; a checkpoint states no digest)",)


def _check_stage(found: Found, progress: Progress) -> Iterator[str]:
    if found.kind == TRACE:
        with Trace(found.path) as trace, progress("check", None, "B"):
            trace.check_content()
        yield "content digest"
    elif found.kind == PLACEMENT:
        # Opening it compares the digest.
        with Placement(found.path):
            yield "content digest"
        yield "every order is a permutation"
    else:
        with open_layout(found.path) as layout:
            yield "index digest, header and ranges, every order is a permutation"
            with progress("check", sum(file.size for file, _ in layout.weight_files), "B") as advance:
                check_weight_files(layout, advance)
            yield "digests of the weight files"
            for companion in layout.companions:
                beside = layout.directory / companion["name"]
                if digest_of(beside) != companion["sha256"]:
                    raise was_changed(beside)
            yield f"digests of {len(layout.companions):,} files beside the weights"
