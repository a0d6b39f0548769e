"""`neuralink architectures`."""

from __future__ import annotations

import click

from neuralink_cli.cli.options import reporting_options
from neuralink_cli.cli.output import print_json, print_table


@click.command("architectures")
@reporting_options
def command(as_json: bool) -> None:
    """List the architectures that are built in.

    With the values of model_type in config.json that they serve.
    """
    from neuralink_cli.checkpoint.architecture import builtin_architectures

    known = builtin_architectures()
    if as_json:
        print_json([{"name": a.name, "task": a.task, "model_types": list(a.model_types)} for a in known])
        return
    print_table(
        ["model type", "architecture", "task"],
        [[model_type, a.name, a.task] for a in known for model_type in a.model_types],
    )
