"""`neuralink profile`."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, fields
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from neuralink_cli.activations.options import SIGNALS
from neuralink_cli.architectures.choice import ArchitectureChoice
from neuralink_cli.cli.options import (
    TRACE_PATH,
    Number,
    WholeNumber,
    allow_uncovered_option,
    architecture_options,
    ignore_remote_code_option,
    model_argument,
    output_option,
    overwrite_option,
    reporting_options,
    revision_option,
)
from neuralink_cli.cli.output import print_json, print_table, print_text, progress_bar, show_nothing
from neuralink_cli.models.execution import DTYPES
from neuralink_cli.profiling.launch import find_launch
from neuralink_cli.sizes import parse_size

if TYPE_CHECKING:
    from neuralink_cli.activations.options import BlockSummary
    from neuralink_cli.profiling.ranks import Ranks


class PartType(click.ParamType):  # type: ignore[type-arg,unused-ignore]
    """`I/N`: the I-th of N parts."""

    name = "I/N"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        """Split and check the two numbers."""
        if isinstance(value, tuple):
            return value
        first, _, second = str(value).partition("/")
        if not (first.isdigit() and second.isdigit() and 1 <= int(first) <= int(second)):
            self.fail(f"{value!r} is not I/N with 1 <= I <= N", param, ctx)
        return int(first), int(second)


@click.command(
    "profile",
    epilog="""\b
Examples:
  neuralink profile MODEL --dataset calib.txt -o model.trace.safetensors
  neuralink profile MODEL --dataset wiki.txt --dataset chat.jsonl \\
      --max-tokens 32768 -o model.trace.safetensors
  neuralink profile MODEL --dataset alpaca.json --text-column instruction \\
      --text-column input --text-column output --active-ratio 0.3 \\
      -o model.trace.safetensors
  neuralink profile Qwen/Qwen2.5-0.5B --revision main --active-ratio 0.3 \\
      --dataset Salesforce/wikitext:wikitext-2-raw-v1@main \\
      -o model.trace.safetensors
  torchrun --nproc-per-node 4 -m neuralink_cli profile MODEL \\
      --dataset calib.txt -o model.trace.safetensors
""",
)
@model_argument
@revision_option
@click.option(
    "--dataset",
    "datasets",
    multiple=True,
    required=True,
    metavar="DATA",
    help="Calibration data: a .txt, .json, .jsonl, .csv or .parquet file (compressed or not), or a hub dataset "
    "(NAME[:CONFIG][@REVISION]); "
    "for vision models an image, a folder of images, or a table with a column of them. May be repeated.",
)
@output_option("TRACE", "Trace to write.")
@click.option(
    "--signal",
    type=click.Choice(SIGNALS),
    default="gate",
    show_default=True,
    help="What decides firing: the activated gate (if none, the up projection), or the input of the down projection.",
)
@click.option(
    "--active-ratio",
    type=Number(0, 1, min_open=True, max_open=True),
    metavar="RATIO",
    help="Set the sparsity: calibrate each block's threshold so that this share of neurons fires. Needed unless the "
    "activation is a kind of ReLU, whose threshold is 0.",
)
@click.option(
    "--calibration-tokens",
    type=WholeNumber(min=1),
    default=4096,
    show_default=True,
    metavar="N",
    help="Calibrate thresholds on N tokens, taken from all datasets in proportion and spread over each.",
)
@click.option(
    "--thresholds-from",
    type=TRACE_PATH,
    metavar="TRACE",
    help="Use the thresholds of another trace, so that the two can be merged.",
)
@click.option(
    "--text-column",
    "text_columns",
    multiple=True,
    default=("text",),
    show_default=True,
    metavar="NAME",
    help="Column with the text; may be repeated, and the columns that a row has are joined by newlines. Rows without "
    "it but with `messages` or `conversations` use the chat template.",
)
@click.option("--split", default="train", show_default=True, help="Split of hub datasets.")
@click.option(
    "--num-samples",
    type=WholeNumber(min=0),
    default=1024,
    show_default=True,
    metavar="N",
    help="Samples of each dataset (lines of a .txt file); 0 for all.",
)
@click.option(
    "--max-tokens",
    type=WholeNumber(min=0),
    default=131072,
    show_default=True,
    metavar="N",
    help="Tokens of each dataset; 0 for all.",
)
@click.option(
    "--max-seq-length",
    type=WholeNumber(min=1),
    metavar="N",
    help="Tokens per sequence.  [default: 512, or as many as the model has positions]",
)
@click.option(
    "--packing/--no-packing",
    default=None,
    help="Join samples into sequences of full length.  [default: for causal language models]",
)
@click.option(
    "--batch-size", type=WholeNumber(min=1), default=8, show_default=True, metavar="N", help="Sequences per batch."
)
@click.option(
    "--seed",
    type=int,
    metavar="N",
    help="Draw samples at random from the whole of each dataset.  [default: in file order]",
)
@click.option(
    "--part", type=PartType(), metavar="I/N", help="Run only the I-th of N parts of the data; join them with `merge`."
)
@click.option(
    "--device", default="auto", show_default=True, help="cpu, cuda, cuda:1, mps; auto takes a GPU if there is one."
)
@click.option(
    "--dtype",
    type=click.Choice(DTYPES),
    default="auto",
    show_default=True,
    help="Precision of the forward pass; auto is float32 on the CPU and the checkpoint's elsewhere.",
)
@click.option(
    "--max-memory",
    type=parse_size,
    metavar="SIZE",
    help="Memory for weights, like 8GB. Weights that do not fit are read again for every batch, so use large "
    "batches. The files they are read from are mapped into memory on top of this; the system takes that back if"
    " memory runs short.  "
    "[default: most free memory]",
)
@click.option("--trust-remote-code", is_flag=True, help="DANGEROUS: run code that comes with the model.")
@ignore_remote_code_option
@allow_uncovered_option
@architecture_options
@overwrite_option
@reporting_options
def command(
    model: str,
    output: Path,
    architecture: ArchitectureChoice,
    overwrite: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Record which FFN neurons fire on calibration data.

    Runs MODEL over the data and records which neurons fire for each token. Only padding is left out. MODEL is a local
    HuggingFace checkpoint directory (safetensors), or a hub model, which is fetched into the hub's cache.

    Under torchrun the processes share the data, and the trace is the one that a single process writes.
    """
    from neuralink_cli.activations.options import ProfileOptions, ThresholdOptions
    from neuralink_cli.calibration.options import CalibrationOptions
    from neuralink_cli.models.execution import ExecutionOptions
    from neuralink_cli.profiling.profile import profile

    def some(kind: type[Any], **renamed: str) -> dict[str, Any]:
        """The options that a dataclass takes, under their own names or renamed."""
        taken = {field.name: renamed.get(field.name, field.name) for field in fields(kind)}
        return {name: options[key] for name, key in taken.items() if key in options}

    for name in ("num_samples", "max_tokens"):
        options[name] = options[name] or None
    with _ranks() as ranks:
        summary = profile(
            model,
            output,
            CalibrationOptions(**some(CalibrationOptions)),
            ProfileOptions(
                thresholds=ThresholdOptions(**some(ThresholdOptions, trace="thresholds_from")),
                execution=ExecutionOptions(**some(ExecutionOptions)),
                architecture=architecture,
                **some(ProfileOptions),
            ),
            overwrite=overwrite,
            progress=progress_bar,
            ranks=ranks,
        )
    if ranks.rank:
        return
    if as_json:
        print_json({"output": str(output), **asdict(summary)})
        return
    print_table(["block", "neurons", "threshold", "active"], list(_rows(summary.blocks)))
    for source in summary.sources:
        print_text(f"{source.name}: {source.tokens:,} tokens, {source.active_ratio or 0:.1%} of the neurons active")
    click.echo(str(summary.coverage))
    click.echo(f"{output}: {summary.tokens:,} tokens")


def _ranks() -> AbstractContextManager[Ranks]:
    """The processes that share the work: those that torchrun started, or this one alone. Only rank 0 shows anything."""
    from neuralink_cli.profiling.ranks import ALONE

    launch = find_launch(os.environ)
    if launch is None:
        return nullcontext(ALONE)
    from neuralink_cli.profiling.torch_ranks import joined_ranks

    if launch.rank:
        show_nothing()
    return joined_ranks(launch)


def _rows(blocks: Sequence[BlockSummary]) -> Iterator[list[str]]:
    """A row per block; the experts of a layer share a row."""
    from neuralink_cli.architectures.blocks import experts_of

    for name, group in groupby(blocks, lambda block: experts_of(block.id) or block.id):
        of_layer = list(group)
        thresholds = sorted({f"{block.threshold:.6g}" for block in of_layer}, key=float)
        values = sum(block.tokens * block.neurons for block in of_layer)
        fired = sum(block.tokens * block.neurons * block.active_ratio for block in of_layer)
        yield [
            name if of_layer[0].id == name else f"{name} ({len(of_layer)})",
            str(of_layer[0].neurons),
            thresholds[0] if len(thresholds) == 1 else f"{thresholds[0]} to {thresholds[-1]}",
            f"{fired / values if values else 0:.1%}",
        ]
