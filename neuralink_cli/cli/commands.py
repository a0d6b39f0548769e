"""The command group. A command's module is imported when it runs, so that `--help` starts fast."""

from __future__ import annotations

import difflib
import importlib

import click

from neuralink_cli import __version__

# Name of each command, its module, and its line in the group's help, which a test compares with the command.
COMMANDS: dict[str, tuple[str, str]] = {
    "profile": ("profile", "Record which FFN neurons fire on calibration data."),
    "merge": ("merge", "Join traces of one model into one."),
    "cluster": ("cluster", "Order the neurons of every block by co-activation."),
    "estimate": ("estimate", "Estimate what a layout will gain and need."),
    "relayout": ("relayout", "Write a checkpoint in the order of a placement."),
    "verify": ("verify", "Prove that a layout holds its checkpoint."),
    "restore": ("restore", "Get the original checkpoint back from a layout."),
    "bench": ("bench", "Measure the read times of layouts and their gain."),
    "report": ("report", "Write an HTML page that shows what a layout gains."),
    "inspect": ("inspect", "Say what a file or directory is, and what can be done with it."),
    "diff": ("diff", "Compare two traces, placements or layouts."),
    "drift": ("drift", "Check whether a layout is still good on new traffic."),
    "build": ("build", "Run the whole pipeline for a fleet of devices."),
    "run": ("run", "Generate text while FFN weights stay in flash."),
    "probe": ("probe", "Measure the storage under a directory."),
    "architectures": ("architectures", "List the built-in architectures."),
}


def commands_with(option: str) -> list[str]:
    """The commands that have an option, such as `--dataset`. Imports them all."""
    return [
        name
        for name, (module, _) in COMMANDS.items()
        if any(
            option in parameter.opts
            for parameter in importlib.import_module(f"neuralink_cli.cli.{module}").command.params
        )
    ]


class LazyGroup(click.Group):
    """Imports a command's module only when the command is used."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        """Commands in pipeline order."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        """Import a command."""
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"neuralink_cli.cli.{COMMANDS[cmd_name][0]}")
        command = module.command
        assert isinstance(command, click.Command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click does, but a name that is not known gets the nearest ones."""
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            near = difflib.get_close_matches(args[0], COMMANDS, n=2)
            meant = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
            ctx.fail(f"No such command {args[0]!r}.{meant}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        """List the commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in COMMANDS.items()])


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="""\b
Examples:
  neuralink profile MODEL --dataset calib.jsonl -o model.trace.safetensors
  neuralink cluster model.trace.safetensors -o model.placement.safetensors
  neuralink relayout MODEL --placement model.placement.safetensors \\
      -o model-flash/
  neuralink verify MODEL model-flash/
""",
)
@click.version_option(__version__, prog_name="neuralink")
def cli() -> None:
    """Rewrite HuggingFace checkpoints into co-activation-ordered flash layouts.

    Sparse inference on a phone reads only the FFN neurons that fire. Stored side by side, neurons that fire together
    are read together: fewer, longer reads. Four steps: profile, cluster, relayout, verify.
    """
