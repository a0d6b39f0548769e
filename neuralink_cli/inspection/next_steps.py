"""What can be done next with an artefact: commands that can be pasted."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from neuralink_cli.inspection.checkpoint_facts import CheckpointFacts
from neuralink_cli.inspection.facts import Facts
from neuralink_cli.inspection.kinds import ARCHITECTURE, BUNDLED_LAYOUT, PLACEMENT, TRACE


@dataclass(frozen=True)
class NextStep:
    """A command line, and what it is for. Words in capitals are for the reader to fill in."""

    purpose: str
    command: str


def after_checkpoint(facts: CheckpointFacts) -> tuple[NextStep, ...]:
    """What to do with a checkpoint."""
    if facts.problem is not None:
        if facts.architecture is None:
            return (_step("describe an unknown architecture", "architectures", "--infer", *_checkpoint(facts)),)
        return ()
    ratio = ("--active-ratio", "0.3") if facts.needs_ratio else ()
    output = f"{_stem(facts.path if facts.origin is None else Path(facts.origin.id))}.trace.safetensors"
    return (
        _step("record which neurons fire", "profile", *_checkpoint(facts), "--dataset", "DATA", *ratio, "-o", output),
    )


def after_stage(facts: Facts) -> tuple[NextStep, ...]:
    """What to do with a trace, placement or layout."""
    path, stem = facts.path, _stem(facts.path)
    model = _model(facts)
    if facts.kind == TRACE:
        return (
            _step("order the neurons", "cluster", path, "-o", f"{stem}.placement.safetensors"),
            _step("see whether a layout fits it", "drift", "LAYOUT", "--trace", path),
        )
    if facts.kind == PLACEMENT:
        weights, resident = str(facts.options.get("weights", "source")), str(facts.options.get("resident", "none"))
        chosen = [*(("--weights", weights) if weights != "source" else ())]
        chosen += ["--resident", resident] if resident != "none" else []
        return (
            _step("see what the layout will need", "estimate", *model, "--placement", path, *chosen),
            _step("write the layout", "relayout", *model, "--placement", path, *chosen, "-o", f"{stem}-flash"),
            _step("measure it in detail", "bench", path, "--trace", "TRACE"),
        )
    return tuple(_after_layout(facts, model))


def after_document(path: Path, kind: str) -> tuple[NextStep, ...]:
    """What to do with a device profile, fio's output or an architecture."""
    if kind == ARCHITECTURE:
        output = "MODEL.trace.safetensors"
        return (_step("profile by it", "profile", "MODEL", "--architecture", path, "--dataset", "DATA", "-o", output),)
    return (
        _step("order for it", "cluster", "TRACE", "--device", path, "-o", "MODEL.placement.safetensors"),
        _step("see what a layout gains on it", "bench", "LAYOUT", "--trace", "TRACE", "--device", path),
    )


def _after_layout(facts: Facts, model: tuple[object, ...]) -> Iterator[NextStep]:
    yield _step("prove that it holds its model", "verify", *model, facts.path)
    yield _step("see whether it still fits", "drift", facts.path, "--trace", "TRACE")
    if facts.kind == BUNDLED_LAYOUT:
        yield _step("measure its reads", "bench", facts.path, "--trace", "TRACE")
        if facts.options["resident"] == "gate" and facts.signal == "gate":
            yield _step("generate text", "run", facts.path, "--prompt", "TEXT")
    yield _step("get the model back", "restore", facts.path, "-o", f"{_stem(facts.path)}-restored")


def _checkpoint(facts: CheckpointFacts) -> tuple[object, ...]:
    if facts.origin is None:
        return (facts.path,)
    return (facts.origin.id, "--revision", facts.origin.revision)


def _model(facts: Facts) -> tuple[object, ...]:
    if facts.origin is None:
        return ("MODEL",)
    return (facts.origin["id"], "--revision", facts.origin["revision"])


def _stem(path: Path) -> str:
    """The name to call what comes next by."""
    name = path.absolute().name
    return name.removesuffix(".safetensors").removesuffix(".trace").removesuffix(".placement")


def _step(purpose: str, *words: object) -> NextStep:
    return NextStep(purpose, " ".join(("neuralink", *(shlex.quote(str(word)) for word in words))))
