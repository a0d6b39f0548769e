"""`neuralink verify`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from neuralink_cli.architectures.choice import ArchitectureChoice
from neuralink_cli.cli.options import (
    PATH,
    PERCENT,
    architecture_options,
    ignore_remote_code_option,
    model_argument,
    read_text,
    reporting_options,
    revision_option,
)
from neuralink_cli.cli.output import print_json, progress_bar
from neuralink_cli.errors import OptionError, VerificationError
from neuralink_cli.sizes import human_bytes

if TYPE_CHECKING:
    from neuralink_cli.architectures.architecture import Architecture
    from neuralink_cli.calibration.batches import ModelBatch
    from neuralink_cli.runtime.layout_description import LayoutDescription

    # The architecture, and the batches to run.
    Comparison = tuple[Architecture, list[ModelBatch]]


@click.command(
    "verify",
    epilog="""\b
Examples:
  neuralink verify MODEL model-flash/
  neuralink verify MODEL model-flash/ --quick --json
  neuralink verify MODEL model-flash/ --forward --text held-out.txt
""",
)
@model_argument
@revision_option
@click.argument("layout_directory", metavar="LAYOUT", type=PATH)
@click.option("--quick", is_flag=True, help="Check structure, permutations and small files only; read no weights.")
@click.option("--forward", is_flag=True, help="Also run both models with transformers and compare their outputs.")
@click.option("--text", "text_file", type=PATH, metavar="FILE", help="Text for --forward; image models run on noise.")
@click.option(
    "--tolerance",
    type=click.FloatRange(min=0),
    default=1e-3,
    show_default=True,
    help="Largest difference that --forward allows, relative to the largest output.",
)
@click.option(
    "--forward-tokens",
    type=click.IntRange(min=128),
    default=1024,
    show_default=True,
    metavar="N",
    help="Tokens of the text for --forward of a layout with rounded weights, in sequences of 128.",
)
@click.option(
    "--max-perplexity-increase",
    type=PERCENT,
    metavar="PERCENT",
    help="With --forward of rounded weights: fail if the perplexity increases by more, like 2%.",
)
@click.option(
    "--max-kl",
    type=click.FloatRange(min=0),
    metavar="NATS",
    help="With --forward of rounded weights: fail if the mean KL divergence from MODEL is larger, like 0.02.",
)
@click.option("--trust-remote-code", is_flag=True, help="DANGEROUS: let --forward run code that comes with the model.")
@ignore_remote_code_option
@architecture_options
@reporting_options
def command(
    model: str,
    revision: str | None,
    layout_directory: Path,
    quick: bool,
    forward: bool,
    text_file: Path | None,
    tolerance: float,
    forward_tokens: int,
    max_perplexity_increase: float | None,
    max_kl: float | None,
    trust_remote_code: bool,
    ignore_remote_code: bool,
    architecture: ArchitectureChoice,
    as_json: bool,
) -> None:
    """Prove that a layout holds its checkpoint.

    MODEL is a directory or hub id as for `profile`. Exit code 1 means that LAYOUT does not hold MODEL. By default every
    byte is checked: the digests of the files, each tensor of MODEL against the one restored from the layout, and the
    other files of MODEL. The first difference is reported with its tensor and neuron. Weights that `relayout --weights`
    rounded are rounded again and compared bit by bit; --forward then compares predictions: perplexity, KL divergence
    and first choices. --forward also computes blocks of MODEL again as LAYOUT describes them, one of each kind in the
    first and in the last layer, and compares them with what MODEL computes.
    """
    if quick and forward:
        raise OptionError("--quick reads no weights, so it cannot be combined with --forward")
    limits = {"max_increase": max_perplexity_increase, "max_kl": max_kl}
    if any(limit is not None for limit in limits.values()) and not forward:
        raise OptionError("--max-perplexity-increase and --max-kl need --forward", fix="pass --forward --text FILE")
    from neuralink_cli.checkpoint.hub import find_model
    from neuralink_cli.layout.recall import GateRecall
    from neuralink_cli.layout.verify import verify

    directory = find_model(model, revision).directory
    code = {"trust_remote_code": trust_remote_code, "ignore_remote_code": ignore_remote_code}
    rounded = forward and _is_rounded(layout_directory)
    if any(limit is not None for limit in limits.values()) and not rounded:
        raise OptionError("--max-perplexity-increase and --max-kl are for layouts with rounded weights")
    sizes = {"sequences": -(-forward_tokens // 128), "length": 128} if rounded else {}
    prepared = _prepare_comparison(directory, text_file, architecture, code, sizes) if forward else None
    try:
        report = verify(directory, layout_directory, quick=quick, progress=progress_bar)
        document = asdict(report)
        if prepared is not None:
            description = _describe(directory, layout_directory, prepared)
            if rounded:
                figures = _measure_distance(directory, layout_directory, prepared, limits, code, description)
            else:
                figures = _compare_outputs(directory, layout_directory, prepared, tolerance, code, description)
            document["forward"] = {**figures, "described_blocks": description.compared}
    except VerificationError as error:
        if as_json:
            print_json({"verified": False, "problem": str(error)})
        raise
    if as_json:
        print_json({"verified": True, **document})
        return
    click.echo(f"verified: {layout_directory} ({document['layout']}, {document['mode']})")
    for check in document["checks"]:
        click.echo(f"  {check}")
    if document["tensors"]:
        verdict = "equal to the source" if document["exact"] else "as the source gives them"
        click.echo(f"  {document['tensors']:,} tensors, {human_bytes(document['bytes'])} {verdict}")
    if "forward" in document:
        click.echo(f"  {_described_blocks(document['forward']['described_blocks'])}")
    recall = report.gate_recall
    if recall is not None:
        click.echo(f"  rounded rows decide firing; measured when it was written: {recall}")
    if "forward" in document and rounded:
        figures = document["forward"]
        click.echo(
            f"  on {figures['tokens']:,} tokens: perplexity {figures['perplexity']:.4g} of the source, "
            f"{figures['layout_perplexity']:.4g} of the layout ({figures['perplexity_increase']:+.2%}); KL divergence "
            f"{figures['mean_kl']:.4f} (99th percentile {figures['p99_kl']:.4f}); same first choice at "
            f"{figures['same_first_choice']:.2%}"
        )
        gate = figures["gate"]
        if gate is not None:
            click.echo(f"  rounded rows decide firing: {GateRecall(**gate)}")
    elif "forward" in document:
        figures = document["forward"]
        click.echo(
            f"  outputs agree on {figures['tokens']:,} tokens: largest difference {figures['max_abs_difference']:.2g} "
            f"of {figures['reference_scale']:.3g}, same first choice at {figures['same_argmax']:.2%}"
        )


def _prepare_comparison(
    model: Path, text_file: Path | None, choice: ArchitectureChoice, code: dict[str, bool], sizes: dict[str, int]
) -> Comparison:
    from neuralink_cli.architectures.choice import choose_architecture
    from neuralink_cli.architectures.model_description import describe
    from neuralink_cli.checkpoint.checkpoint import Checkpoint
    from neuralink_cli.models.own_code import settle_own_code
    from neuralink_cli.runtime.output_comparison import comparison_batches

    with Checkpoint(model) as checkpoint:
        architecture = choose_architecture(describe(checkpoint), choice)
    settle_own_code(model, architecture, trust=code["trust_remote_code"], ignore=code["ignore_remote_code"])
    text = None if text_file is None else read_text(text_file)
    trusted = code["trust_remote_code"]
    return architecture, comparison_batches(model, architecture, text, trust_remote_code=trusted, **sizes)


def _describe(model: Path, directory: Path, prepared: Comparison) -> LayoutDescription:
    from neuralink_cli.models.hf_packages import require_hf_packages

    require_hf_packages("torch", "transformers")
    from neuralink_cli.runtime.layout_description import LayoutDescription

    return LayoutDescription(directory, model, prepared[0])


def _described_blocks(compared: Sequence[str]) -> str:
    if not compared:
        return "no block could be computed again as the layout describes it"
    return f"the model computes what the layout says in the blocks that were computed again: {', '.join(compared)}"


def _is_rounded(directory: Path) -> bool:
    from neuralink_cli.layout.open_layout import open_layout

    with open_layout(directory) as layout:
        return not layout.exact


def _measure_distance(
    model: Path,
    directory: Path,
    prepared: Comparison,
    limits: dict[str, float | None],
    code: dict[str, bool],
    description: LayoutDescription,
) -> dict[str, Any]:
    from neuralink_cli.layout.restore import loadable
    from neuralink_cli.runtime.model_distance import measure_distance

    architecture, batches = prepared
    with loadable(directory) as decoded:
        distance = measure_distance(
            model,
            decoded,
            batches,
            architecture,
            trust_remote_code=code["trust_remote_code"],
            ignore_remote_code=code["ignore_remote_code"],
            layout=directory,
            watching=description.watching,
        )
    distance.check(directory, **limits)
    return {**asdict(distance), "perplexity_increase": distance.perplexity_increase}


def _compare_outputs(
    model: Path,
    directory: Path,
    prepared: Comparison,
    tolerance: float,
    code: dict[str, bool],
    description: LayoutDescription,
) -> dict[str, Any]:
    from neuralink_cli.layout.restore import loadable
    from neuralink_cli.runtime.output_comparison import compare_outputs

    architecture, batches = prepared
    with loadable(directory) as rewritten:
        comparison = compare_outputs(
            model,
            rewritten,
            batches,
            architecture,
            tolerance=tolerance,
            trust_remote_code=code["trust_remote_code"],
            ignore_remote_code=code["ignore_remote_code"],
            watching=description.watching,
        )
    if not comparison.agrees:
        raise VerificationError(
            f"outputs differ by up to {comparison.max_abs_difference:.3g} (largest output "
            f"{comparison.reference_scale:.3g}), more than --tolerance {tolerance:g} allows",
            where=directory,
        )
    return asdict(comparison)
