"""Proof that a layout holds its source: structure, digests, and every source tensor compared byte for byte.

The full check reads each side once: the layout in file order, computing its digest, and the source beside it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from neuralink_cli.architectures.coverage import Coverage
from neuralink_cli.checkpoint.checkpoint import Checkpoint
from neuralink_cli.checkpoint.hub import find_model
from neuralink_cli.errors import MismatchError, VerificationError
from neuralink_cli.files.free_memory import remark_if_short
from neuralink_cli.files.header import Header
from neuralink_cli.layout.companions import companion_bytes
from neuralink_cli.layout.open_layout import Layout, coverage_of, open_layout
from neuralink_cli.layout.recall import MeasuredRecall
from neuralink_cli.layout.replaced import Unreplaced
from neuralink_cli.progress import Progress, no_progress
from neuralink_cli.rewriting.companion_comparison import check_companions, check_large_companions, large_bytes
from neuralink_cli.streaming.estimate import Estimate, Pass, estimate

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class VerifyReport:
    """What was checked: `checks` in words, tensors and bytes compared with the source.

    `exact` is False for a layout with rounded weights; `gate_recall` is what its index states of them. `coverage` is
    how much of the FFN weights is in blocks; all else is checked too.
    """

    layout: str
    mode: str
    exact: bool
    checks: tuple[str, ...]
    tensors: int
    bytes: int
    coverage: Coverage
    gate_recall: MeasuredRecall | None = None


def verify(
    model: str | Path,
    layout: Path,
    *,
    quick: bool = False,
    revision: str | None = None,
    progress: Progress = no_progress,
) -> VerifyReport:
    """Prove that a layout holds its checkpoint, byte for byte, and log the estimate.

    Args:
        model: A checkpoint directory; a string may also be a hub id, see `find_model`.
        quick: Check structure, permutations and small digests only; neither weights nor large files are read.

    Raises:
        MismatchError: The layout was made from another checkpoint.
        VerificationError: The layout does not hold the checkpoint; the message says which tensor and neuron.
        InputError, UnsupportedError: The checkpoint or the layout cannot be used.
    """
    source = find_model(model, revision)
    with (
        Unreplaced(source.directory),
        Checkpoint(source.directory, source.origin) as checkpoint,
        open_layout(layout) as opened,
        opened.unreplaced,
    ):
        # Always first, and without a progress bar.
        report = verify_quick(opened, checkpoint)
        if quick:
            return report
        expected = estimate_verify(opened, checkpoint)
        logger.info("%s", expected)
        remark_if_short(expected.memory_bytes)
        with progress("verify", layout_bytes(opened), "B") as advance:
            return _with_every_byte(report, opened, checkpoint, advance)


def verify_quick(layout: Layout, checkpoint: Checkpoint) -> VerifyReport:
    """Check structure only: schema, header, ranges, alignment, permutations, digests of small tensors, tensor lists.

    Opening the layout has done most of it.

    Raises:
        MismatchError: `checkpoint` is not the source of the layout.
        VerificationError: The message says what is wrong and where.
    """
    if layout.fingerprint != checkpoint.fingerprint:
        raise MismatchError(
            f"was made from the model with fingerprint {layout.fingerprint[:12]}, "
            f"but {checkpoint.directory} has {checkpoint.fingerprint[:12]}",
            where=layout.directory,
            fix="pass the model that it was made from",
        )
    _compare_tensor_lists(layout.source_headers, checkpoint, layout.directory)
    check_companions(layout, checkpoint)
    checks = ["index against schema", "header and ranges", "orders are permutations", "tensor list of the source"]
    checks.append("config, tokenizer and all other files beside the weights")
    checks += layout.check_small_tensors()
    recall = layout.index.gate_recall if layout.kind == "bundled" else None
    return VerifyReport(layout.kind, "quick", layout.exact, tuple(checks), 0, 0, coverage_of(layout), recall)


def verify_full(
    layout: Layout, checkpoint: Checkpoint, progress: Callable[[int], object] | None = None
) -> VerifyReport:
    """As `verify_quick`, and every byte: file digests, and each source tensor rebuilt and compared.

    Args:
        progress: Called with the layout bytes checked since the last call.

    Raises:
        MismatchError: `checkpoint` is not the source of the layout.
        VerificationError: The message says which tensor, and which neuron if it belongs to one.
    """
    return _with_every_byte(verify_quick(layout, checkpoint), layout, checkpoint, progress)


def _with_every_byte(
    quick: VerifyReport, layout: Layout, checkpoint: Checkpoint, progress: Callable[[int], object] | None
) -> VerifyReport:
    """What `verify_full` does after the quick check, added to its report."""
    # Imported here because numba is slow to import and a quick look at a layout does not need it.
    from neuralink_cli.rewriting.comparison import Comparison

    check_large_companions(layout, checkpoint, progress)
    Comparison(layout, checkpoint).run(progress)
    rounded = "" if layout.exact else ", rounded weights by rounding them again"
    checks = (*quick.checks, "file digests", f"every source tensor byte for byte{rounded}")
    tensors, size = len(checkpoint.tensors), checkpoint.total_bytes
    return replace(quick, mode="full", checks=checks, tensors=tensors, bytes=size)


def layout_bytes(layout: Layout) -> int:
    """Bytes of the layout that `verify_full` reads after the quick check."""
    return sum(file.header.data_bytes for file, _ in layout.weight_files) + large_bytes(layout)


def _compare_tensor_lists(headers: dict[str, Header], checkpoint: Checkpoint, where: Path) -> None:
    stated = {entry.name: (entry.dtype, entry.shape) for header in headers.values() for entry in header.entries}
    found = {e.name: (e.dtype, e.shape) for file in checkpoint.files for e in file.header.entries}
    if stated != found:
        name = sorted(dict(set(stated.items()) ^ set(found.items())))[0]
        ours, theirs = stated.get(name, "missing"), found.get(name, "missing")
        raise VerificationError(f"tensor {name!r} is {ours} in the layout, {theirs} in the source", where=where)


def estimate_verify(layout: Layout, checkpoint: Checkpoint) -> Estimate:
    """Estimate what `verify_full` will take."""
    # Imported here because numba is slow to import and a quick look at a layout does not need it.
    from neuralink_cli.rewriting.held_memory import held_while_comparing, record_bytes

    files = [file for file, _ in layout.weight_files]
    # Of a bundled layout one file has all; else each has a file of the source beside it.
    longest = None if layout.kind == "bundled" else max(file.size for file in files)
    other = 2 * companion_bytes(layout)
    work = Pass(files, hashed_share=0.5, beside=checkpoint.files, other_read=other, longest=longest)
    held = held_while_comparing(layout, checkpoint)
    if layout.kind == "bundled":
        held += record_bytes(len(layout.index.blocks))
    return estimate([work], held)
