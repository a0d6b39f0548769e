"""The README.md of a layout: the source's own card if it had one, and a section that says what was done and gained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from neuralink_cli import __version__
from neuralink_cli.checkpoint.checkpoint import Checkpoint
from neuralink_cli.flash.plan import MODEL_CARD
from neuralink_cli.placement.gain import Gain, layer_gains, source_gains, total_gain
from neuralink_cli.placement.placement import Placement

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
    original = checkpoint.directory / MODEL_CARD
    kept = original.read_text(encoding="utf-8", errors="replace").rstrip("\n") + "\n\n" if original.is_file() else ""
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
        "On held-out tokens: reads per token / neurons per read, both without access collapse or cache, and the gain,",
        "the modelled cost of the original order over that of each, with access collapse.",
        "",
        *table_rows([*layer_gains(info), *source_gains(info), total_gain(info)]),
    ]
    return kept + "\n".join(lines) + "\n"


def _dataset(source: Mapping[str, Any]) -> str:
    commit = "" if source["revision"] is None else f" at commit `{source['revision']}`"
    return f"{source['name']}{commit} ({source['tokens']:,} tokens)"


def table_rows(gains: list[Gain]) -> list[str]:
    """The gain table in Markdown, one string per line."""
    orders = list(gains[-1].orders)
    rows = [["", "active", *orders], ["---", *["---:"] * (len(orders) + 1)]]
    for gain in gains:
        # A source too small to hold anything out has no figures.
        figures = [gain.orders.get(order) for order in orders]
        cells = [f"{f.reads_per_token:.1f} / {f.mean_read_length:.2f} / {f.gain:.2f}" if f else "-" for f in figures]
        rows.append([gain.name, f"{gain.active_ratio:.1%}", *cells])
    return ["| " + " | ".join(" ".join(cell.replace("|", r"\|").split()) for cell in row) + " |" for row in rows]
