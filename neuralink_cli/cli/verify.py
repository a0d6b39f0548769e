"""`neuralink verify`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import click

from neuralink_cli.architectures.choice import ArchitectureChoice
from neuralink_cli.cli.options import (
    PATH,
    PERCENT,
    Number,
    WholeNumber,
    architecture_options,
    ignore_remote_code_option,
    model_argument,
    reporting_options,
    revision_option,
)
from neuralink_cli.cli.output import print_json, print_text, progress_bar
from neuralink_cli.errors import MismatchError, NeuralinkError, OptionError, UnsupportedError, VerificationError
from neuralink_cli.sizes import human_bytes


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
    type=Number(min=0),
    default=1e-3,
    show_default=True,
    help="Largest difference that --forward allows, relative to the largest output.",
)
@click.option(
    "--forward-tokens",
    type=WholeNumber(min=128),
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
    type=Number(min=0),
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

    MODEL is a directory or hub id as for `profile`. Exit code 1 means that LAYOUT does not hold MODEL, 5 that it was
    made from another model; --json then says `"verified": false` and the problem. By default every byte is checked: the
    digests of the files, each tensor of MODEL against the one restored from the layout, and the other files of MODEL.
    The first difference is reported with its tensor and neuron. Weights that `relayout --weights` rounded are rounded
    again and compared bit by bit; --forward then compares predictions: perplexity, KL divergence and first choices.
    --forward also computes blocks of MODEL again as LAYOUT describes them, one of each kind in the first and in the
    last layer, and compares them with what MODEL computes.
    """
    if quick and forward:
        raise OptionError("--quick reads no weights, so it cannot be combined with --forward")
    from neuralink_cli.checkpoint.hub import find_model
    from neuralink_cli.evaluation.forward_check import ForwardOptions, forward_text, prepare_forward
    from neuralink_cli.rewriting.verify import verify

    options = None
    if forward:
        options = ForwardOptions(
            text=text_file,
            tolerance=tolerance,
            tokens=forward_tokens,
            max_perplexity_increase=max_perplexity_increase,
            max_kl=max_kl,
            trust_remote_code=trust_remote_code,
            ignore_remote_code=ignore_remote_code,
        )
    elif max_perplexity_increase is not None or max_kl is not None:
        raise OptionError("--max-perplexity-increase and --max-kl need --forward", fix="pass --forward --text FILE")

    directory = find_model(model, revision).directory
    run = None if options is None else prepare_forward(directory, layout_directory, options, architecture)
    with _saying_no(as_json, VerificationError, MismatchError):
        report = verify(directory, layout_directory, quick=quick, progress=progress_bar)
    document = asdict(report)
    if run is not None:
        # Both can be used, so that whatever ends this is an answer.
        with _saying_no(as_json, VerificationError, MismatchError, UnsupportedError):
            document["forward"] = run()
    if as_json:
        print_json({"verified": True, **document})
        return
    click.echo(f"verified: {layout_directory} ({document['layout']}, {document['mode']})")
    print_text(str(report.coverage), indent=2)
    for check in document["checks"]:
        print_text(check, indent=2)
    if document["tensors"]:
        verdict = "equal to the source" if document["exact"] else "as the source gives them"
        click.echo(f"  {document['tensors']:,} tensors, {human_bytes(document['bytes'])} {verdict}")
    recall = report.gate_recall
    if recall is not None:
        print_text(f"rounded rows decide firing; measured when it was written: {recall}", indent=2)
    for line in forward_text(document["forward"]) if "forward" in document else ():
        print_text(line, indent=2)


@contextlib.contextmanager
def _saying_no(as_json: bool, *answers: type[NeuralinkError]) -> Iterator[None]:
    """Within the block, errors that answer the question are printed as a document too, if that is what is asked for."""
    try:
        yield
    except answers as error:
        if as_json:
            print_json({"verified": False, "problem": str(error)})
        raise
