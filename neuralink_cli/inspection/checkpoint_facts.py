"""What a checkpoint is: its architecture, its FFN blocks, and which stages it can go through."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from neuralink_cli.activations.threshold import EXACT_AT_ZERO
from neuralink_cli.activations.trace import bytes_per_token
from neuralink_cli.architectures.activation_names import split_cut, split_most
from neuralink_cli.architectures.blocks import FFNBlock
from neuralink_cli.architectures.choice import choose_architecture
from neuralink_cli.architectures.coverage import require_coverage
from neuralink_cli.architectures.find_blocks import find_blocks
from neuralink_cli.architectures.scales import refuse_scaled_blocks, refuse_scales
from neuralink_cli.checkpoint.checkpoint import Checkpoint
from neuralink_cli.checkpoint.loaded_size import loaded_bytes
from neuralink_cli.checkpoint.model_description import describe
from neuralink_cli.checkpoint.origin import Origin
from neuralink_cli.errors import InputError, UnsupportedError


@dataclass(frozen=True)
class BlockGroup:
    """Blocks of the same shape: how many there are, and the id of the first."""

    first: str
    count: int
    neurons: int
    hidden: int
    activation: str
    parts: tuple[str, ...]
    bundle_bytes: int
    experts: bool


@dataclass(frozen=True)
class CheckpointFacts:
    """What a checkpoint is.

    Attributes:
        origin: The hub model that it is in the local cache; None for a local directory.
        bytes: Of all tensors.
        loaded_bytes: What they take as float32 in memory without the output head, quantised ones too.
        dtypes: Bytes of the tensors of each dtype.
        architecture: Name of the built-in description; None if there is none that fits.
        task: As the architecture states it.
        ffn_bytes: Of the matrices of all FFN blocks; 0 if they are not known.
        covered_bytes: Of those that are in blocks.
        blocks: Of each shape, in the order of the model.
        problem: Why no stage takes it as it is; None if profile, cluster and relayout do.
        needs_ratio: Whether `profile` needs `--active-ratio`, as the activation is not exactly zero for some neurons.
        permutable: Whether a permuted layout can be made.
        runs: Whether `run` can generate text from its layout.
        largest_block_bytes: Of the bundles of the largest block.
        trace_bytes_per_token: What a trace takes on disk.
    """

    path: Path
    origin: Origin | None
    model_type: str
    files: int
    tensors: int
    bytes: int
    loaded_bytes: int
    dtypes: Mapping[str, int]
    architecture: str | None
    task: str | None
    ffn_bytes: int
    covered_bytes: int
    blocks: tuple[BlockGroup, ...]
    problem: str | None
    needs_ratio: bool
    permutable: bool
    runs: bool
    largest_block_bytes: int
    trace_bytes_per_token: float

    @property
    def ffn_share(self) -> float:
        """Share of all bytes that are weights of FFN blocks."""
        return self.covered_bytes / self.bytes if self.bytes else 0.0


def read_checkpoint(directory: Path, origin: Origin | None = None) -> CheckpointFacts:
    """Describe a checkpoint from its config and the headers of its weights.

    Raises:
        InputError, UnsupportedError: As `Checkpoint`.
    """
    with Checkpoint(directory, origin) as checkpoint:
        blocks: tuple[FFNBlock, ...] = ()
        architecture, coverage, problem = None, None, None
        try:
            refuse_scales(checkpoint)
            architecture = choose_architecture(describe(checkpoint))
            blocks = find_blocks(checkpoint, architecture)
            refuse_scaled_blocks(checkpoint, blocks)
            coverage = require_coverage(checkpoint, blocks)
        except (UnsupportedError, InputError) as error:
            problem = error.what if error.fix is None else f"{error.what}; {error.fix}"
        dtypes: Counter[str] = Counter()
        for place in checkpoint.tensors.values():
            dtypes[place.entry.dtype] += place.entry.nbytes
        cut = [block for block in blocks if not split_cut(block.activation)[0]]
        task = None if architecture is None else architecture.task
        return CheckpointFacts(
            path=directory,
            origin=origin,
            model_type=checkpoint.model_type,
            files=len(checkpoint.files),
            tensors=len(checkpoint.tensors),
            bytes=checkpoint.total_bytes,
            loaded_bytes=loaded_bytes(checkpoint, "float32", with_head=False),
            dtypes=dict(dtypes.most_common()),
            architecture=None if architecture is None else architecture.name,
            task=task,
            ffn_bytes=0 if coverage is None else coverage.ffn_bytes,
            covered_bytes=0 if coverage is None else coverage.covered_bytes,
            blocks=_groups(blocks),
            problem=problem,
            needs_ratio=any(split_most(block.activation)[1] not in EXACT_AT_ZERO for block in cut),
            permutable=problem is None and not checkpoint.scaled,
            runs=problem is None and task == "causal-lm",
            largest_block_bytes=max((block.neurons * block.bundle_bytes for block in blocks), default=0),
            trace_bytes_per_token=bytes_per_token(blocks),
        )


def _groups(blocks: tuple[FFNBlock, ...]) -> tuple[BlockGroup, ...]:
    groups: dict[tuple[object, ...], list[FFNBlock]] = {}
    for block in blocks:
        parts = tuple(part.role for part in block.parts)
        key = (block.neurons, block.hidden, block.activation, parts, block.expert is None, block.bundle_bytes)
        groups.setdefault(key, []).append(block)
    return tuple(
        BlockGroup(
            first=same[0].id,
            count=len(same),
            neurons=same[0].neurons,
            hidden=same[0].hidden,
            activation=same[0].activation,
            parts=tuple(part.role for part in same[0].parts),
            bundle_bytes=same[0].bundle_bytes,
            experts=same[0].expert is not None,
        )
        for same in groups.values()
    )
