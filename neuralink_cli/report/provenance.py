"""Where a layout came from, as the layout and the trace say it: what a report lists at its end."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neuralink_cli import __version__
from neuralink_cli.activations.trace import Trace
from neuralink_cli.checkpoint.origin import parse_origin
from neuralink_cli.layout.open_layout import open_layout
from neuralink_cli.placement.placement import Placement

Lines = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Provenance:
    """What is known of the inputs of a report, ready to be shown.

    Attributes:
        model: What to call the model: its id on the hub, else its type.
        sections: A title, and lines of a name and a value.
    """

    model: str
    sections: tuple[tuple[str, Lines], ...]


def read_provenance(path: Path, trace: Trace) -> Provenance:
    """Read where a layout, or a placement file, and a trace came from.

    Raises:
        InputError: As `read_contender`.
        VerificationError: As `read_contender`.
    """
    kind, document, made = _documents(path)
    origin = parse_origin(document["origin"])
    model = document["model"]
    about_model = [
        ("model", model["model_type"] if origin is None else f"{origin.id}, revision {origin.revision}"),
        ("architecture", model["architecture"]),
        ("fingerprint", model["fingerprint"]),
        ("fires by", _signal(document)),
    ]
    digest = document.get("document_sha256", document.get("content_sha256", ""))
    about_layout = [
        ("kind", kind),
        ("SHA-256 of its document" if "document_sha256" in document else "SHA-256", str(digest)),
        ("SHA-256 of the trace that made it", str(made["trace_sha256"])),
        *(("made from", _source(source)) for source in made["sources"]),
        *_parameters(made["parameters"]),
        ("written by", str(document["tool"])),
    ]
    if "placement_sha256" in made:
        about_layout.insert(2, ("SHA-256 of its placement", str(made["placement_sha256"])))
    sources = [
        {"name": each.name, "revision": each.parameters.get("revision"), "sha256": each.sha256, "tokens": each.tokens}
        for each in trace.info.sources
    ]
    about_trace = [
        ("SHA-256", str(trace.document["content_sha256"])),
        *(("text", _source(source)) for source in sources),
        ("written by", str(trace.document["tool"])),
    ]
    sections = (
        ("Model", tuple(about_model)),
        ("Layout", tuple(about_layout)),
        ("Trace that was replayed", tuple(about_trace)),
        ("Report", (("written by", f"neuralink {__version__}"),)),
    )
    return Provenance(str(model["model_type"]) if origin is None else origin.id, sections)


def _documents(path: Path) -> tuple[str, Mapping[str, Any], Mapping[str, Any]]:
    """The kind of what lies at a path, its document, and the part that says what it was made from."""
    if not path.is_dir():
        with Placement(path) as placement:
            trace = placement.document["trace"]
            made = {
                "trace_sha256": trace["content_sha256"],
                "sources": trace["sources"],
                "parameters": placement.document["parameters"],
            }
            return "placement", placement.document, made
    with open_layout(path) as layout:
        document = layout.index if layout.kind == "permuted" else layout.index.document
        return f"{layout.kind} layout", document, document["provenance"]


def _signal(document: Mapping[str, Any]) -> str:
    calibration = document["calibration"]
    if calibration is None:
        return f"{document['signal']} signal, threshold 0"
    share = f"{100 * calibration['active_ratio']:g} % of the neurons"
    return f"{document['signal']} signal, thresholds calibrated to {share} on {calibration['tokens']:,} tokens"


def _source(source: Mapping[str, Any]) -> str:
    revision = source.get("revision")
    at = "" if revision is None else f", revision {revision}"
    return f"{source['name']}{at}, {source['tokens']:,} tokens, SHA-256 {source['sha256']}"


def _parameters(parameters: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The options of `cluster`, as they are recorded."""
    for name, value in sorted(parameters.items()):
        yield f"option {name}", value if isinstance(value, str) else json.dumps(value, sort_keys=True)
