"""The files beside the weights of a layout: small files of the source, and the model card."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from neuralink_cli import __version__
from neuralink_cli.checkpoint.checkpoint import Checkpoint
from neuralink_cli.checkpoint.file_names import FLASH_INDEX, SHARD_INDEX, is_module_file, is_small_file
from neuralink_cli.errors import VerificationError
from neuralink_cli.files.durable import named_output, sync_directory, sync_file
from neuralink_cli.files.input_file import read_input, require_regular
from neuralink_cli.layout.names import MODEL_CARD, PERMUTED_INDEX
from neuralink_cli.placement.gain import Gain, OrderFigures, layer_gains, source_gains, total_gain
from neuralink_cli.placement.placement import STORED, Placement, PlacementHeader

_OWN_FILES = frozenset((SHARD_INDEX, FLASH_INDEX, PERMUTED_INDEX, MODEL_CARD))


def companion_files(directory: Path) -> list[str]:
    """Names of the files of a checkpoint that accompany every layout, relative to its directory.

    All files beside the weights, except weights and hidden files, and all files in folders of modules that follow the
    model (sentence-transformers).
    """
    beside = [path for path in directory.iterdir() if is_small_file(path.name) and path.name not in _OWN_FILES]
    in_modules = [path for path in directory.glob("*_*/*") if is_module_file(str(path.relative_to(directory)))]
    return sorted(str(path.relative_to(directory)) for path in [*beside, *in_modules] if path.is_file())


def copy_companions(names: Iterable[str], source: Path, target: Path) -> None:
    """Copy files byte for byte, flushed to the device."""
    folders = set()
    for name in names:
        folder = (target / name).parent
        folder.mkdir(exist_ok=True)
        folders.add(folder)
        require_regular(source / name)
        with named_output(target / name):
            shutil.copyfile(source / name, target / name)
        sync_file(target / name)
    for folder in folders - {target}:
        sync_directory(folder)


def describe_companions(directory: Path, names: Iterable[str]) -> list[dict[str, Any]]:
    """Name (relative to the layout's directory), size and SHA-256 of each file, for the index."""
    contents = {name: read_input(directory / name) for name in names}
    return [
        {"name": name, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for name, content in sorted(contents.items())
    ]


def check_companions(directory: Path, described: Sequence[Mapping[str, Any]]) -> None:
    """Compare the files beside the weights with their sizes and digests in the index.

    Raises:
        VerificationError: A file is missing or was changed.
    """
    for expected in described:
        path = directory / expected["name"]
        if not path.is_file():
            raise VerificationError("is missing", where=path)
        if describe_companions(directory, [expected["name"]]) != [expected]:
            raise VerificationError("was changed: its size or SHA-256 differs from the index", where=path)


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


def model_card(checkpoint: Checkpoint, layout: str, placement: Placement) -> str:
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
