"""`neuralink run`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from neuralink_cli.architectures.choice import ArchitectureChoice
from neuralink_cli.cli.options import (
    PATH,
    Number,
    WholeNumber,
    architecture_options,
    ignore_remote_code_option,
    read_text,
    reporting_options,
    revision_option,
    text_argument,
)
from neuralink_cli.cli.output import print_json, remark
from neuralink_cli.errors import OptionError, VerificationError
from neuralink_cli.models.execution import RUN_DTYPES
from neuralink_cli.runtime.engines import ACTIVATIONS, ENGINES, FLOATS, TORCH, C
from neuralink_cli.sizes import human_bytes
from neuralink_cli.storage.policies import DEFAULT_POLICY, POLICY_NAMES

if TYPE_CHECKING:
    from neuralink_cli.runtime.generated import Phase
    from neuralink_cli.runtime.session import RunReport
    from neuralink_cli.sparse_models.settings import RunSettings


@click.command(
    "run",
    epilog="""\b
Examples:
  neuralink run model-flash/ --prompt "The river" --dram 20%
  neuralink run model-flash/ --prompt-file story.txt --dram 64MB \\
      --max-new-tokens 200 --device-profile ufs3.1
  neuralink run model-flash/ --prompt "The river" --compare MODEL \\
      --perplexity held-out.txt --json
  neuralink run model-flash/ --prompt "The river" --engine c --dram 1.2GB
""",
)
@click.argument("layout", metavar="FLASH", type=PATH)
@click.option("--prompt", metavar="TEXT", help="Text to continue.")
@click.option("--prompt-file", type=PATH, metavar="FILE", help="File with the text to continue.")
@click.option(
    "--dram",
    default="20%",
    show_default=True,
    metavar="PERCENT|BYTES",
    help="Memory for cached bundles, like 5% (of all bundles), 64MB or 1.5GiB. Resident rows come on top. With "
    "--engine c, an amount in bytes is all the memory that the program may take.",
)
@click.option(
    "--max-new-tokens",
    type=WholeNumber(min=1),
    default=64,
    show_default=True,
    metavar="N",
    help="Generate at most N tokens.",
)
@click.option(
    "--temperature",
    type=Number(min=0),
    default=0.0,
    show_default=True,
    help="Above 0: sample tokens at random instead of taking the likeliest.",
)
@click.option(
    "--top-k",
    type=WholeNumber(min=0),
    default=0,
    show_default=True,
    metavar="N",
    help="With --temperature: sample from the N likeliest tokens only; 0 for all.",
)
@click.option(
    "--top-p",
    type=Number(0, 1, min_open=True),
    default=1.0,
    show_default=True,
    metavar="P",
    help="With --temperature: sample from the likeliest tokens of this total probability only.",
)
@click.option("--seed", type=int, default=0, show_default=True, metavar="N", help="Seed for --temperature.")
@click.option(
    "--cache",
    type=click.Choice(POLICY_NAMES),
    default=DEFAULT_POLICY,
    show_default=True,
    help="Cache policy: which neurons stay in DRAM between tokens.",
)
@click.option(
    "--device-profile",
    metavar="NAME|FILE",
    help="Storage to plan reads for, as `cluster --device`.  [default: what the placement was made for]",
)
@click.option("--direct/--no-direct", default=None, help="Read past the page cache.  [default: if supported]")
@click.option(
    "--queue-depth", type=WholeNumber(1, 1024), default=32, show_default=True, metavar="N", help="Reads in flight."
)
@click.option(
    "--dtype",
    type=click.Choice(RUN_DTYPES),
    default="float32",
    show_default=True,
    help="Precision to compute in. auto: that of the weights outside FFN blocks, which then need no conversion.",
)
@click.option(
    "--compare",
    metavar="MODEL",
    help="Also run the dense checkpoint with non-firing neurons masked; exit with code 1 if its tokens differ.",
)
@revision_option
@click.option("--perplexity", "text_file", type=PATH, metavar="FILE", help="Also measure perplexity on this text.")
@click.option(
    "--perplexity-tokens",
    type=WholeNumber(min=2),
    default=4096,
    show_default=True,
    metavar="N",
    help="Tokens of the text to use for --perplexity.",
)
@click.option(
    "--engine",
    type=click.Choice(ENGINES),
    default=TORCH,
    show_default=True,
    help="What computes: torch, or the runtime in C (examples/c_runtime), for OPT and Llama-style models.",
)
@click.option(
    "--engine-path", type=PATH, metavar="FILE", help="Program of --engine c.  [default: where make puts it, or in PATH]"
)
@click.option(
    "--activations",
    type=click.Choice(ACTIVATIONS),
    default=FLOATS,
    show_default=True,
    help="With --engine c, int8 rounds the activations that rows of q8_0, q4_0 and iq4_nl are multiplied with, as "
    "llama.cpp does: faster, but no longer exact.",
)
@ignore_remote_code_option
@architecture_options
@reporting_options
def command(
    layout: Path,
    prompt: str | None,
    prompt_file: Path | None,
    compare: str | None,
    revision: str | None,
    text_file: Path | None,
    perplexity_tokens: int,
    engine: str,
    engine_path: Path | None,
    activations: str,
    architecture: ArchitectureChoice,
    as_json: bool,
    **options: Any,
) -> None:
    """Generate text while FFN weights stay in flash.

    FLASH is a bundled layout made with `--resident gate`: rows in DRAM tell which neurons fire, and only the other
    weights of these neurons are read. Text goes to stdout and figures to stderr; with --json both go into the JSON.
    """
    from neuralink_cli.runtime.session import RunRequest, run_layout
    from neuralink_cli.sparse_models.settings import GenerationOptions

    if prompt is not None and prompt_file is not None:
        raise OptionError("--prompt and --prompt-file cannot be combined")
    if prompt is None and prompt_file is None and text_file is None:
        raise OptionError("there is nothing to do", fix="pass --prompt, --prompt-file or --perplexity")
    chosen = ("max_new_tokens", "temperature", "seed", "top_k", "top_p")
    generation = GenerationOptions(**{name: options.pop(name) for name in chosen})
    request = RunRequest(
        layout=layout,
        settings=_settings(**options),
        prompt=_prompt(prompt, prompt_file),
        generation=generation,
        compare=compare,
        compare_revision=revision,
        perplexity_text=None if text_file is None else read_text(text_file),
        perplexity_tokens=perplexity_tokens,
        architecture=architecture,
        engine=engine,
        engine_path=engine_path,
        activations=activations,
    )
    streams = engine == C and not as_json
    report = run_layout(request, (lambda text: click.echo(text, nl=False)) if streams else None)
    if as_json:
        print_json({"layout": str(layout), **report.as_document()})
    else:
        if report.generated is not None:
            # What came as a stream lacks the end of its line.
            click.echo("" if streams else report.generated.text)
        _say(report)
    _require_agreement(report, layout)


def _prompt(text: str | None, file: Path | None) -> str | None:
    if file is not None:
        return read_text(file)
    return None if text is None else text_argument(text)


def _settings(*, dram: str, device_profile: str | None, **others: Any) -> RunSettings:
    from neuralink_cli.devices.device import find_device
    from neuralink_cli.sparse_models.settings import RunSettings
    from neuralink_cli.storage.budget import parse_budget

    device = None if device_profile is None else find_device(device_profile)
    return RunSettings(dram=parse_budget(dram), device=device, **others)


def _say(report: RunReport) -> None:
    """Figures on stderr."""
    if report.generated is not None:
        remark(f"prompt: {_phase(report.generated.prompt_phase)}")
        remark(f"text:   {_phase(report.generated.token_phase)}")
    memory = report.memory
    remark(
        f"DRAM: {human_bytes(memory.cache_bytes)} of cache and {human_bytes(memory.resident_bytes)} of resident rows, "
        f"for {human_bytes(memory.flash_bytes)} in flash; {report.coverage}"
    )
    remark(
        f"memory: {human_bytes(memory.peak_bytes)} at most in use, {human_bytes(memory.planned_bytes)} planned: these, "
        f"{human_bytes(memory.dense_bytes)} of other weights, {human_bytes(memory.working_bytes)} to fetch and decode, "
        f"{human_bytes(memory.sequence_bytes)} for tokens, {human_bytes(memory.programs_bytes)} of programs"
    )
    if not report.direct:
        remark("reads go through the page cache, so their times are not the storage's own")
    dense = None if report.comparison is None else report.comparison.dense_perplexity
    if report.perplexity is not None:
        cost = (
            "" if dense is None else f", dense {dense.value:.3f} ({_change(report.perplexity.value, dense.value):+.2%})"
        )
        remark(f"perplexity: {report.perplexity.value:.3f} on {report.perplexity.tokens:,} tokens{cost}")
    if report.comparison is not None and report.comparison.masked is not None:
        masked, plain = report.comparison.masked, report.comparison.dense
        if masked.agrees:
            whom = "the dense model" if report.exact else "the masked dense model"
            rounding = "" if masked.logit_gap is None else " up to rounding"
            remark(f"compare: {masked.same} of {masked.tokens} tokens equal {whom}'s{rounding}")
        if plain is not None and not report.exact:
            remark(f"compare: the first {plain.same} of {plain.tokens} tokens equal the full dense model's")


def _change(value: float, reference: float) -> float:
    """Relative, to the hundredth of a percent; no minus before a zero."""
    return round(value / reference - 1, 4) + 0.0


def _phase(phase: Phase) -> str:
    from neuralink_cli.runtime.session import phase_document

    figures = phase_document(phase)
    return (
        f"{phase.tokens:,} tokens in {phase.seconds:.2f} s ({phase.tokens_per_second:.1f} tokens/s), "
        f"{phase.io_share:.0%} of it waiting for reads; per token {figures['neurons_per_token']:.0f} neurons, "
        f"{figures['hit_rate']:.1%} of them in DRAM, {figures['reads_per_token']:.1f} reads, "
        f"{human_bytes(round(figures['bytes_read_per_token']))}"
    )


def _require_agreement(report: RunReport, layout: Path) -> None:
    masked = None if report.comparison is None else report.comparison.masked
    if masked is not None and not masked.agrees:
        raise VerificationError(
            f"token {masked.same + 1} differs from the dense model's with non-firing neurons masked",
            where=layout,
        )
