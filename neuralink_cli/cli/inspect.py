"""`neuralink inspect`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

import click

from neuralink_cli.architectures.coverage import coverage_text
from neuralink_cli.cli.options import reporting_options, revision_option, tokens_per_second_option
from neuralink_cli.cli.output import print_command, print_json, print_pairs, progress_bar
from neuralink_cli.sizes import human_bytes, human_number

if TYPE_CHECKING:
    from neuralink_cli.inspection.checkpoint_facts import CheckpointFacts
    from neuralink_cli.inspection.facts import BlockFacts, Facts
    from neuralink_cli.inspection.inspect import ArchitectureFacts, DeviceFacts, Inspection, Need
    from neuralink_cli.inspection.reading import ReadingTime

Pairs = Iterator[tuple[str, str]]


@click.command(
    "inspect",
    epilog="""\b
Examples:
  neuralink inspect MODEL
  neuralink inspect model.trace.safetensors
  neuralink inspect model-flash/ --check
  neuralink inspect model.placement.safetensors --tokens-per-second 10
  neuralink inspect my-phone.json --json
""",
)
@click.argument("path")
@revision_option
@click.option(
    "--check",
    is_flag=True,
    help="Also read all data and compare it with the digests that the artefact states; compute the fingerprint of a "
    "checkpoint.",
)
@tokens_per_second_option
@reporting_options
def command(path: str, revision: str | None, check: bool, tokens_per_second: float | None, as_json: bool) -> None:
    """Say what a file or directory is, and what can be done with it.

    PATH is a checkpoint (a directory or hub id, as for `profile`), a trace, a placement, a layout, a device profile,
    the JSON output of fio, or an architecture. Says of which model it is, from which data and with which options it
    was made, how large it is, what its order gained, what the next stages need, and the commands that come next. Reads
    only headers, configs and indexes, unless --check is given. If PATH is none of these, says what it is, with exit
    code 3.
    """
    from neuralink_cli.inspection.inspect import inspect

    found = inspect(path, revision=revision, check=check, tokens_per_second=tokens_per_second, progress=progress_bar)
    if as_json:
        print_json(found.as_document())
        return
    print_pairs([("what", f"{found.kind} {path}"), *_pairs(found)])
    if found.next_steps:
        click.echo("next")
    for step in found.next_steps:
        click.echo(f"  # {step.purpose}")
        print_command(step.command)


def _pairs(found: Inspection) -> Pairs:
    from neuralink_cli.inspection.checkpoint_facts import CheckpointFacts
    from neuralink_cli.inspection.facts import Facts
    from neuralink_cli.inspection.inspect import DeviceFacts

    facts = found.facts
    if isinstance(facts, CheckpointFacts):
        yield from _of_checkpoint(facts)
    elif isinstance(facts, Facts):
        yield from _of_stage(facts)
    elif isinstance(facts, DeviceFacts):
        yield from _of_device(facts)
    else:
        yield from _of_architecture(facts)
    yield from _needs(found.needs)
    yield from _reading(found.reading, facts)
    for check in found.checked or ():
        yield "checked", check


def _needs(needs: Sequence[Need]) -> Pairs:
    for need in needs:
        yield "needs", f"{need.stage}: {human_bytes(need.bytes)} of {need.what}"


def _reading(reading: ReadingTime | None, facts: object) -> Pairs:
    from neuralink_cli.inspection.facts import Facts

    if reading is None:
        if isinstance(facts, Facts) and facts.gains:
            yield "reading", "not known: its order was measured for bundles of another size; `neuralink bench` tells"
        return
    most = reading.most_tokens_per_second
    limit = "" if most is None else f": at most {human_number(most)} tokens/s"
    yield "reading", f"{human_number(1e3 * reading.io_seconds)} ms a token on {reading.device}, without a cache{limit}"
    if reading.speed_needed is not None:
        yield (
            "needs",
            f"a runtime: storage {human_number(reading.speed_needed, 2)} times as fast as {reading.device} for "
            f"{reading.tokens_per_second:g} tokens/s without a cache, if the runtime computes while it reads",
        )


def _of_checkpoint(facts: CheckpointFacts) -> Pairs:
    if facts.origin is not None:
        yield "hub", f"{facts.origin.id} at commit {facts.origin.revision}"
    yield "model type", facts.model_type
    dtypes = ", ".join(f"{name} {human_bytes(size)}" for name, size in facts.dtypes.items())
    files = "1 file" if facts.files == 1 else f"{facts.files:,} files"
    yield "size", f"{human_bytes(facts.bytes)} in {files}, {facts.tensors:,} tensors ({dtypes})"
    if facts.architecture is not None:
        yield "architecture", f"{facts.architecture} ({facts.task})"
    for group in facts.blocks:
        experts = "experts" if group.experts else "blocks"
        yield (
            "FFN",
            f"{group.count:,} {experts} of {group.neurons:,} neurons from {group.first} on: hidden size "
            f"{group.hidden:,}, {group.activation}, {' + '.join(group.parts)}, "
            f"{human_bytes(group.bundle_bytes)} a neuron",
        )
    if facts.ffn_bytes:
        covered = coverage_text(facts.covered_bytes, facts.ffn_bytes)
        yield "coverage", f"{facts.ffn_share:.0%} of all bytes are FFN weights; {covered}"
    if facts.problem is not None:
        yield "stages", f"none: {facts.problem}"
        return
    stages = ["profile" + (" (with --active-ratio)" if facts.needs_ratio else ""), "cluster", "relayout"]
    stages += ["relayout --layout permuted"] if facts.permutable else []
    stages += ["verify", "restore", "bench"] + (["run"] if facts.runs else [])
    yield "stages", ", ".join(stages)


def _of_stage(facts: Facts) -> Pairs:
    model = facts.model
    code = f", own code {model['code']}" if "code" in model else ""
    yield "model", f"{model['model_type']} (architecture {model['architecture']}{code})"
    yield "", model["fingerprint"]
    if facts.origin is not None:
        yield "origin", f"{facts.origin['id']} at {facts.origin['revision']}"
    yield "made by", facts.tool
    yield "size", _size(facts)
    for source in facts.data:
        commit = f" at {source['revision'][:12]}" if source["revision"] else ""
        some = ""
        if "sequences" in source:
            some = f" in {source['sequences']:,} of {source['total_sequences']:,} sequences"
        yield "data", f"{source['name']}{commit}: {source['tokens']:,} tokens{some}"
    yield "sparsity", _sparsity(facts)
    if facts.options:
        yield "options", ", ".join(f"{name}={_plain(value)}" for name, value in facts.options.items())
    if facts.device is not None:
        yield "device", str(facts.device["name"])
    if facts.formats:
        yield "formats", ", ".join(f"{role} {name}" for role, name in facts.formats.items())
    for line in _blocks(facts.blocks):
        yield "blocks", line
    if facts.coverage is not None:
        yield "coverage", coverage_text(**facts.coverage)
    for gain in facts.gains:
        if gain.source is None or len(facts.gains) > 2:
            where = "all held-out tokens" if gain.source is None else gain.source
            yield "gain", f"{gain.gain} on {where}; over naive reading {gain.gain_over_naive}"
    if facts.device is not None and not facts.gains:
        yield "gain", "not known: no tokens were held out to measure it"
    for name, digest in facts.digests.items():
        yield "digests", f"{name} {digest}"


def _size(facts: Facts) -> str:
    size = human_bytes(facts.bytes)
    if facts.dram_bytes:
        kept = ", ".join(f"{human_bytes(count)} {name}" for name, count in facts.dram_bytes.items() if count)
        return f"{size}: {human_bytes(facts.flash_bytes or 0)} of bundles in flash; in DRAM {kept or 'nothing'}"
    return size


def _sparsity(facts: Facts) -> str:
    rule = f"neurons fire by the {facts.signal} signal"
    if facts.calibration is None:
        return f"{rule}, at thresholds of 0 (ReLU)"
    share, tokens = facts.calibration["active_ratio"], facts.calibration["tokens"]
    return f"{rule}, {share:.3g} of them by thresholds calibrated on {tokens:,} tokens"


def _blocks(blocks: Sequence[BlockFacts]) -> Iterator[str]:
    """A line for neighbouring blocks that are alike."""

    def alike(block: BlockFacts) -> tuple[object, ...]:
        return (block.neurons, block.hidden, block.activation, block.bundle_bytes, block.order)

    for (neurons, _, activation, size, order), group in groupby(blocks, alike):
        same = list(group)
        names = same[0].id if len(same) == 1 else f"{same[0].id} to {same[-1].id} ({len(same):,})"
        pinned = sum(block.pinned or 0 for block in same)
        words = [f"{names}: {neurons:,} neurons", str(activation)]
        words += [] if size is None else [f"{size:,} bytes each"]
        words += [] if order is None else [f"order {order}"]
        words += [f"{pinned:,} pinned"] if pinned else []
        yield ", ".join(words)


def _of_device(facts: DeviceFacts) -> Pairs:
    device: Mapping[str, Any] = facts.device
    yield "name", device["name"]
    rate = f"{device['bytes_per_second'] / 1e6:,.0f} MB/s"
    yield (
        "reads",
        f"{1e6 * device['operation_seconds']:.1f} us an operation and {rate}, {device['queue_depth']} in flight, pages "
        f"of {device['page_bytes']:,} bytes",
    )
    yield "measured", f"{len(device['reads'])} read sizes" if device["reads"] else "no table of read sizes"
    if device["latency_seconds"]:
        yield "latency", f"{1e6 * device['latency_seconds']:.1f} us for each block of a token"
    fills = [read.get("fill_seconds", 0.0) for read in device["reads"]]
    if any(fills):
        yield "full queue", f"after up to {1e6 * max(fills):,.0f} us more for each block of a token"
    if facts.hot_rate is not None:
        yield "when hot", f"{facts.hot_rate:.0%} of its speed (pass it with :hot)"
    costs = ", ".join(f"{cost:.1f} of {size:,} bytes" for size, cost in facts.operation_in_bundles.items())
    yield "an operation", f"costs as much as bundles: {costs}"


def _of_architecture(facts: ArchitectureFacts) -> Pairs:
    yield "name", f"{facts.name} ({facts.task})"
    yield "model types", ", ".join(facts.model_types)
    for block, parts in facts.blocks.items():
        yield "block", f"{block}: " + ", ".join(f"{role} {weight}" for role, weight in parts.items())


def _plain(value: object) -> str:
    if isinstance(value, list):
        return "/".join(_plain(each) for each in value)
    return "none" if value is None else str(value)
