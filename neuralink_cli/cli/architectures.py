"""`neuralink architectures`."""

from __future__ import annotations

import click

from neuralink_cli.cli.options import reporting_options, revision_option
from neuralink_cli.cli.output import print_json, print_table
from neuralink_cli.errors import OptionError


@click.command(
    "architectures",
    epilog="""\b
Examples:
  neuralink architectures
  neuralink architectures --infer MODEL
""",
)
@click.option(
    "--infer",
    "model",
    metavar="MODEL",
    help="Instead, find the FFN tensors of a checkpoint by their names and shapes, and print the architecture as JSON: "
    "review it, then pass it to --architecture.",
)
@revision_option
@reporting_options
def command(model: str | None, revision: str | None, as_json: bool) -> None:
    """List the built-in architectures.

    With the values of model_type in config.json that each one supports.
    """
    if model is None and revision is not None:
        raise OptionError("--revision needs a model", fix="pass --infer MODEL")
    if model is not None:
        print_json(_infer(model, revision))
        return
    from neuralink_cli.architectures.architecture import builtin_architectures

    known = builtin_architectures()
    if as_json:
        print_json([{"name": a.name, "task": a.task, "model_types": list(a.model_types)} for a in known])
        return
    print_table(
        ["model type", "architecture", "task"],
        [[model_type, a.name, a.task] for a in known for model_type in a.model_types],
    )


def _infer(model: str, revision: str | None) -> dict[str, object]:
    from neuralink_cli.architectures.choice import remark_if_built_in
    from neuralink_cli.architectures.inference import infer_architecture
    from neuralink_cli.checkpoint.checkpoint import Checkpoint
    from neuralink_cli.checkpoint.hub import find_model
    from neuralink_cli.checkpoint.model_description import describe

    source = find_model(model, revision)
    with Checkpoint(source.directory, source.origin) as checkpoint:
        remark_if_built_in(checkpoint.model_type)
        return infer_architecture(describe(checkpoint))
