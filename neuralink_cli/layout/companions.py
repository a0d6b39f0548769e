"""The files beside the weights of a layout: those of the source, and the model card."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from neuralink_cli import __version__
from neuralink_cli.checkpoint.checkpoint import Checkpoint
from neuralink_cli.checkpoint.companions import FolderContents, LeftOut, find_companions
from neuralink_cli.checkpoint.file_names import FLASH_INDEX, PERMUTED_INDEX, SHARD_INDEX
from neuralink_cli.errors import InputError, VerificationError, printable, shorten
from neuralink_cli.files.durable import copy_file, sync_directory, write_file
from neuralink_cli.layout.names import FLASH_FILE, MODEL_CARD, ORIGINALS, OWN_FOLDER, PERMUTED_PLACEMENT
from neuralink_cli.layout.recall import MeasuredRecall
from neuralink_cli.placement.gain import Gain, OrderFigures, layer_gains, source_gains, total_gain
from neuralink_cli.placement.placement import STORED, Placement, PlacementHeader
from neuralink_cli.sizes import human_bytes
from neuralink_cli.streaming.journal import JOURNAL_FILE

if TYPE_CHECKING:
    from neuralink_cli.layout.open_layout import Layout

# How many names a remark gives, and how many characters of each.
_SHOWN = 3
_LONGEST_NAME = 100
# What a layout itself may have in its directory, as a file system without upper case sees it.
_OWN_NAMES = frozenset(
    name.casefold() for name in (FLASH_FILE, FLASH_INDEX, PERMUTED_INDEX, MODEL_CARD, OWN_FOLDER, JOURNAL_FILE)
)


def stored_name(name: str) -> str:
    """Where a layout keeps a file of its source: under its name, or under `neuralink/original/` if it uses that itself.

    Args:
        name: Relative to the source's directory, with slashes; the result is relative to the layout's.
    """
    return f"{ORIGINALS}/{name}" if name.split("/")[0].casefold() in _OWN_NAMES else name


def source_name(stored: str) -> str:
    """The name in the source of a file of the layout; the inverse of `stored_name`."""
    return stored.removeprefix(f"{ORIGINALS}/")


def companions_to_copy(checkpoint: Checkpoint, *, all_files: bool) -> FolderContents:
    """The files that are copied from the folder of a checkpoint, and those that are left out, or would be.

    The checkpoint's model card is not among them: the layout's begins with it.

    Raises:
        InputError: As `find_companions`, or a name cannot be written into an index.
    """
    found = find_companions(checkpoint.directory, checkpoint.weight_names, all_files=all_files)
    for file in found.companions:
        if "\\" in file.name or not _is_unicode(file.name):
            raise InputError(
                "has a name that a layout cannot keep: it has a backslash in it, or is not UTF-8",
                where=checkpoint.directory / file.name,
                fix="rename it, or take it out of the folder",
            )
    return FolderContents(tuple(file for file in found.companions if file.name != MODEL_CARD), found.left_out)


def remark_on_left_out(left_out: Sequence[LeftOut]) -> str:
    """What is left out of a layout, in a line: how many files, of what size, the largest by name, and what they are."""
    by_size = sorted(left_out, key=lambda file: (-file.nbytes, file.name))
    names = ", ".join(shorten(printable(file.name), _LONGEST_NAME) for file in by_size[:_SHOWN])
    more = f" and {len(left_out) - _SHOWN:,} more" if len(left_out) > _SHOWN else ""
    kinds = ", ".join(dict.fromkeys(file.why for file in by_size))
    noun = "file" if len(left_out) == 1 else "files"
    size = human_bytes(sum(file.nbytes for file in left_out))
    return f"left out: {len(left_out):,} {noun}, {size} ({names}{more}): {kinds}; --all-files takes everything along"


def copy_files(
    names: Mapping[str, str], source: Path, target: Path, progress: Callable[[int], object] | None = None
) -> list[dict[str, Any]]:
    """Copy files byte for byte with their permissions, flushed to the device, and describe the copies for an index.

    Args:
        names: Where to put each file, relative to `target`, by its name relative to `source`.
        progress: Called with the bytes copied since the last call.

    Raises:
        InputError: A file cannot be read.
    """
    described, folders = [], {target}
    for name, to in sorted(names.items()):
        path = target / to
        path.parent.mkdir(parents=True, exist_ok=True)
        folders.update(parent for parent in path.parents if parent.is_relative_to(target))
        nbytes, sha256 = copy_file(source / name, path, progress)
        described.append(_described(to, nbytes, sha256))
    for folder in sorted(folders - {target}):
        sync_directory(folder)
    return described


def write_kept_files(directory: Path, checkpoint: Checkpoint, placement: Placement) -> list[dict[str, Any]]:
    """Write what a permuted layout keeps: placement, shard index and the original of the model card.

    Returns:
        The description of those that are files of the source, for the index.
    """
    kept = kept_files(checkpoint)
    own = directory / OWN_FOLDER
    for folder in (own, directory / ORIGINALS) if MODEL_CARD in kept else (own,):
        folder.mkdir(exist_ok=True)
    # Of files that are open, or were read before: others may have their names by now.
    write_file(directory / PERMUTED_PLACEMENT, placement.read_whole())
    described = []
    for name, to in kept.items():
        content = checkpoint.read_beside(name)
        write_file(directory / to, content)
        described.append(_described(to, len(content), hashlib.sha256(content).hexdigest()))
    for folder in (own, directory / ORIGINALS):
        if folder.is_dir():
            sync_directory(folder)
    return described


def kept_files(checkpoint: Checkpoint) -> dict[str, str]:
    """What a permuted layout keeps of the source beside its companions: where, by the name in the source."""
    kept = {SHARD_INDEX: SHARD_INDEX} if checkpoint.sharded else {}
    if (checkpoint.directory / MODEL_CARD).is_file():
        kept[MODEL_CARD] = stored_name(MODEL_CARD)
    return kept


def names_of_originals(described: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names in the source of the files that lie in `neuralink/original/`, in order."""
    return sorted(source_name(file["name"]) for file in described if file["name"].startswith(f"{ORIGINALS}/"))


def _described(name: str, nbytes: int, sha256: str) -> dict[str, Any]:
    return {"name": name, "bytes": nbytes, "sha256": sha256}


def restore_companions(layout: Layout, target: Path, progress: Callable[[int], object] | None = None) -> frozenset[str]:
    """Copy the files that a layout keeps beside its weights to where they were in the source; return their names there.

    Raises:
        InputError, VerificationError: A file is missing or was changed.
    """
    require_companions(layout)
    kept = {file["name"]: file for file in layout.companions}
    names = {stored: source_name(stored) for stored in kept}
    taken = Counter([*names.values(), *layout.source_headers])
    for name, count in taken.items():
        if count > 1 or any(str(folder) in taken for folder in PurePosixPath(name).parents):
            raise VerificationError(f"keeps two files of the source as {name}", where=layout.directory)
    for copy, stored in zip(copy_files(names, layout.directory, target, progress), sorted(kept), strict=True):
        if {**copy, "name": stored} != kept[stored]:
            raise was_changed(layout.directory / stored)
    return frozenset(names.values())


def require_companions(layout: Layout) -> None:
    """Check that the files that a layout keeps beside its weights are there and have their sizes.

    Raises:
        VerificationError: One is missing or has another size.
    """
    for file in layout.companions:
        path = layout.directory / file["name"]
        if not path.is_file():
            raise VerificationError("is missing", where=path)
        if path.stat().st_size != file["bytes"]:
            raise was_changed(path)


def companion_bytes(layout: Layout) -> int:
    """Bytes of the files that a layout keeps beside its weights."""
    return sum(file["bytes"] for file in layout.companions)


def was_changed(path: Path) -> VerificationError:
    """The error for a file of a layout that is not what its index says."""
    return VerificationError("was changed: its size or SHA-256 differs from the index", where=path)


def _is_unicode(name: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in name)


_WHAT = {
    "bundled": (
        "The neurons of every FFN block are stored as bundles in co-activation order, for runtimes that read only\n"
        "the neurons that fire. `model.flash.json` says where everything lies; `model.flash.safetensors` is not an\n"
        "ordinary checkpoint. `neuralink restore` brings the original back, byte for byte."
    ),
    "permuted": (
        "An ordinary checkpoint that loads anywhere and computes the same function; the neurons of every FFN block\n"
        "stand in co-activation order. `neuralink restore` brings the original back, byte for byte."
    ),
}


def model_card(checkpoint: Checkpoint, layout: str, placement: Placement, recall: MeasuredRecall | None = None) -> str:
    """The text of the card for a layout of a checkpoint."""
    kept = ""
    if (checkpoint.directory / MODEL_CARD).is_file():
        kept = checkpoint.read_beside(MODEL_CARD).decode(errors="replace").rstrip("\n") + "\n\n"
    info = placement.info
    origin = "" if checkpoint.origin is None else f", `{checkpoint.origin.id}` at commit `{checkpoint.origin.revision}`"
    lines = [
        "## Neuron order",
        "",
        f"Written by neuralink {__version__} (`--layout {layout}`).",
        _WHAT[layout],
        "",
        f"- Calibrated on: {', '.join(map(_dataset, info.trace['sources']))}",
        f"- Source model: `{info.model['model_type']}`{origin}, fingerprint `{info.model['fingerprint']}`",
        f"- Placement: `{placement.content_sha256}`",
        *([] if recall is None else [f"- Rounded rows decide which neurons fire: {recall}"]),
        "",
        "On held-out tokens: reads per token / neurons per read, both without access collapse or cache; then the gain,",
        "the modelled cost of the original order over that of each, both with access collapse; then the gain over",
        "naive reading, the original order without access collapse.",
        "",
        *table_rows([*layer_gains(info), *source_gains(info), total_gain(info)]),
        *_stored_gains(info),
    ]
    return kept + "\n".join(lines) + "\n"


def _dataset(source: Mapping[str, Any]) -> str:
    commit = "" if source["revision"] is None else f" at commit `{source['revision']}`"
    return f"{source['name']}{commit} ({source['tokens']:,} tokens)"


def _stored_gains(info: PlacementHeader) -> list[str]:
    """What is stored gains, in total and by dataset, with intervals."""
    stored = [gain for gain in info.gains if gain.order == STORED]
    lines = [
        f"- {'in total' if gain.source is None else gain.source}: gain {gain.gain}, over naive reading "
        f"{gain.gain_over_naive}"
        for gain in stored
    ]
    return ["", "What is stored, with 95% intervals over sequences:", "", *lines] if lines else []


def _cell(figures: OrderFigures) -> str:
    read = f"{figures.reads_per_token:.1f} / {figures.mean_read_length:.2f}"
    return f"{read} / {figures.gain:.2f} / {figures.gain_over_naive:.2f}"


def table_rows(gains: list[Gain]) -> list[str]:
    """The gain table in Markdown, one string per line."""
    orders = list(gains[-1].orders)
    rows = [["", "active", *orders], ["---", *["---:"] * (len(orders) + 1)]]
    for gain in gains:
        # A source too small to hold anything out has no figures.
        figures = [gain.orders.get(order) for order in orders]
        cells = [_cell(f) if f else "-" for f in figures]
        rows.append([gain.name, f"{gain.active_ratio:.1%}", *cells])
    return ["| " + " | ".join(" ".join(cell.replace("|", r"\|").split()) for cell in row) + " |" for row in rows]
