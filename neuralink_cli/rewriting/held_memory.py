"""What writing, comparing and restoring a layout have in memory as a whole, beside what waits to be worked on.

Each works on one tensor at a time, in memory that it uses again for the next; so what counts is the largest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

from neuralink_cli.architectures.blocks import FFNBlock, MovedPiece, moved_pieces
from neuralink_cli.architectures.regions import Placed, Slab, cut_into_slabs, stretches
from neuralink_cli.checkpoint.checkpoint import Checkpoint
from neuralink_cli.files.header import Header
from neuralink_cli.layout.dense_rounding import longest_rounded, passing_bytes
from neuralink_cli.layout.gathering import Gathering, gatherings_of
from neuralink_cli.layout.open_layout import Layout
from neuralink_cli.layout.plan import BundledPlan, DenseTensor, SourcePiece
from neuralink_cli.streaming import pipeline

# Of a block in bundles, beside its weights: what is read and written for its tensors, and the text and checks of the
# index. It counts where there are thousands of experts.
_RECORD_BYTES = 3072

# Of a source tensor while its file is rebuilt: what is read for it, and how it is written.
_REBUILT_BYTES = 1024

_Thing = TypeVar("_Thing")
_Piece = TypeVar("_Piece", bound=Placed)


def held_while_writing(checkpoint: Checkpoint, blocks: Sequence[FFNBlock], bundled: BundledPlan | None) -> int:
    """Bytes that writing the layout of a checkpoint holds: a tensor of it, with what is made on the way.

    Args:
        bundled: The plan of its flash file; None for a permuted layout.
    """
    if bundled is None:
        moved = moved_pieces(checkpoint, blocks)
        return _moving(cut_into_slabs(pieces, checkpoint.place(name).entry.nbytes) for name, pieces in moved.items())
    gatherings = gatherings_of(bundled.blocks, bundled.rounding).values()
    made = max(
        _most(gatherings, lambda each: each.nbytes),
        _most(bundled.dense, longest_rounded),
    )
    return made + _rounding(gatherings, bundled.dense, checkpoint)


def record_bytes(blocks: int) -> int:
    """Bytes that writing or comparing the bundles of so many blocks holds beside weights, once they are planned."""
    return _RECORD_BYTES * blocks


def held_while_comparing(layout: Layout, checkpoint: Checkpoint) -> int:
    """Bytes that comparing a layout with its source holds: a tensor of the layout, and what it is compared with."""
    gatherings, dense = layout.gatherings.values(), layout.dense.values()
    slabs = [slab for made in layout.made_slabs.values() for slab in made]
    compared = [slab for slab in slabs if any(not _rounded(piece, layout.gatherings) for piece in slab.pieces)]
    stored = max(
        _most(gatherings, lambda each: each.nbytes),
        _most(_pieces(compared), lambda piece: 0 if _rounded(piece, layout.gatherings) else piece.stored.bytes),
    )
    beside = max(
        _most(gatherings, lambda each: each.nbytes),
        _most(dense, longest_rounded),
        _most(compared, _longest),
    )
    apart = _most(compared, _taken_apart)
    return stored + beside + max(apart, _rounding(gatherings, dense, checkpoint)) + _moving(layout.moved_slabs.values())


def restoring_bytes(layout: Layout) -> int:
    """The most bytes that rebuilding the source of a layout takes, which is done file by file: with what waits."""
    most = 0
    for header in layout.source_headers.values():
        ahead = pipeline.most_ahead(list(_read_for(layout, header)))
        behind = min(pipeline.BEHIND, header.file_bytes)
        records = _REBUILT_BYTES * len(header.entries)
        most = max(most, ahead + behind + held_while_restoring(layout, header) + records)
    return most


def held_while_restoring(layout: Layout, header: Header) -> int:
    """Bytes that rebuilding a file of the source holds: a tensor of the layout, and what is made from it."""
    names = [entry.name for entry in header.entries]
    slabs = [slab for name in names for slab in layout.made_slabs.get(name, ())]
    moved = [layout.moved_slabs[name] for name in names if name in layout.moved_slabs]
    stored = _most(_pieces(slabs), lambda piece: piece.stored.bytes)
    made = _most(slabs, lambda slab: _longest(slab) if together(slab) else slab.nbytes)
    return stored + made + _most(slabs, _taken_apart) + _moving(moved)


def _read_for(layout: Layout, header: Header) -> Iterator[int]:
    """Bytes of the tensors of a layout that are read for a file of its source."""
    last = None
    for entry in header.entries:
        slabs = layout.made_slabs.get(entry.name)
        if not slabs:
            yield entry.nbytes
        for piece in _pieces(slabs or ()):
            # What is still in memory is not read again.
            if piece.stored != last:
                last = piece.stored
                yield last.bytes


def together(slab: Slab[SourcePiece]) -> bool:
    """Whether one tensor of the layout has all that a slab is rebuilt from, so that it can be rebuilt in stretches."""
    return len({piece.stored.tensor for piece in slab.pieces}) == 1


def _moving(tensors: Iterable[Sequence[Slab[MovedPiece]]]) -> int:
    """Bytes that moving the neurons of tensors holds: a slab, if neurons are its lines, else a stretch of lines."""
    slabs = [slab for tensor in tensors for slab in tensor]
    by_rows = [slab for slab in slabs if any(piece.region.neuron_axis == 0 for piece in slab.pieces)]
    moved = max(_most(by_rows, lambda slab: slab.nbytes), _most(slabs, _longest))
    # What alternates is taken apart, and moved, before it is put together again.
    return moved + 2 * _most(slabs, _taken_apart)


def _rounding(gatherings: Iterable[Gathering], dense: Iterable[DenseTensor], checkpoint: Checkpoint) -> int:
    """Bytes that rounding weights holds for a while beside them: scales, and what numbers are made of codes."""
    return max(
        _most(gatherings, lambda each: each.passing_bytes(checkpoint)),
        _most(dense, lambda each: passing_bytes(each, checkpoint)),
    )


def _rounded(piece: SourcePiece, gatherings: Mapping[str, Gathering]) -> bool:
    """Whether a piece is not rebuilt: its tensor is made from the source again."""
    return piece.stored.tensor in gatherings


def _pieces(slabs: Iterable[Slab[SourcePiece]]) -> Iterator[SourcePiece]:
    for slab in slabs:
        yield from slab.pieces


def _longest(slab: Slab[_Piece]) -> int:
    """Bytes of the longest stretch of lines that is worked on at a time."""
    return max(count * slab.pitch for _, count in stretches(slab.lines, slab.pitch, pipeline.PIECE))


def _taken_apart(slab: Slab[_Piece]) -> int:
    """Bytes of such a stretch that are copied first, as its elements alternate with those of others."""
    lanes = [piece.region.lanes for piece in slab.pieces if piece.region.lanes > 1]
    return _longest(slab) // min(lanes) if lanes else 0


def _most(things: Iterable[_Thing], size: Callable[[_Thing], int]) -> int:
    return max(map(size, things), default=0)
