"""`neuralink merge`."""

from __future__ import annotations

from pathlib import Path

import click

from neuralink_cli.architectures.coverage import coverage_text
from neuralink_cli.cli.options import TRACE_PATH, output_option, overwrite_option, reporting_options
from neuralink_cli.cli.output import print_json, progress_bar


@click.command(
    "merge",
    epilog="""\b
Examples:
  neuralink merge a.trace.safetensors b.trace.safetensors \\
      -o ab.trace.safetensors
""",
)
@click.argument("traces", nargs=-1, required=True, type=TRACE_PATH)
@output_option("TRACE", "Trace to write.")
@overwrite_option
@reporting_options
def command(traces: tuple[Path, ...], output: Path, overwrite: bool, as_json: bool) -> None:
    """Join traces of one model into one.

    TRACES of several datasets, or parts of one run (`profile --part`), become the trace that one run over all of them
    would have written, byte for byte. Model, signal and thresholds must be the same.
    """
    from neuralink_cli.activations.merge import merge_traces

    summary = merge_traces(traces, output, overwrite=overwrite, progress=progress_bar)
    if as_json:
        sources = [{"name": source.name, "tokens": source.tokens} for source in summary.sources]
        digest, tokens = summary.content_sha256, summary.tokens
        found = {"content_sha256": digest, "tokens": tokens, "sources": sources, "coverage": summary.coverage}
        print_json({"output": str(output), **found})
    else:
        count = len(summary.sources)
        click.echo(f"{output}: {summary.tokens:,} tokens of {count} {'source' if count == 1 else 'sources'}")
        if summary.coverage is not None:
            click.echo(coverage_text(**summary.coverage))
