from __future__ import annotations

import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest

from neuralink_cli import __version__
from neuralink_cli.cli.commands import COMMANDS, cli
from neuralink_cli.devices.device import builtin_devices
from neuralink_cli.placement.placement import ORDER_NAMES
from tests.cli.conftest import Neuralink

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "transformers", "datasets", "numba", "numpy", "networkx", "jsonschema", "tqdm", "matplotlib")


def command_of(name: str) -> click.Command:
    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    return command


def help_of(name: str, width: int) -> str:
    """The text of `--help` on a terminal of some width."""
    context = click.Context(cli, info_name="neuralink", terminal_width=width, **cli.context_settings)
    if not name:
        return cli.get_help(context)
    command = command_of(name)
    return command.get_help(click.Context(command, info_name=name, parent=context, terminal_width=width))


def examples_of(command: click.Command) -> list[str]:
    """The command lines at the end of the help."""
    lines = (command.epilog or "").replace("\b", "").strip().splitlines()
    assert not lines or lines[0] == "Examples:"
    return "\n".join(line.strip() for line in lines[1:]).replace("\\\n", "").splitlines()


def test_every_command_is_listed_and_every_module_is_a_command() -> None:
    assert cli.list_commands(click.Context(cli)) == list(COMMANDS)
    commands = {path.stem for path in (ROOT / "neuralink_cli/cli").glob("*.py") if "@click.command" in path.read_text()}
    assert {module for module, _ in COMMANDS.values()} == commands
    for name in COMMANDS:
        assert command_of(name).name == name


@pytest.mark.parametrize("name", COMMANDS)
def test_the_list_says_what_the_command_says_first(name: str) -> None:
    text = " ".join((command_of(name).help or "").split())
    first = re.match(r"(.*?\.)( |$)", text)
    assert first is not None
    assert first[1] == COMMANDS[name][1]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_has_help(name: str) -> None:
    for parameter in command_of(name).params:
        if isinstance(parameter, click.Option):
            assert parameter.help, parameter.name
            assert parameter.help.rstrip("]").endswith((".", "MODEL", "LAYOUT")) or "[default:" in parameter.help


@pytest.mark.parametrize("name", ["", *COMMANDS])
@pytest.mark.parametrize("width", [80, 100])
def test_help_fits_the_terminal(name: str, width: int) -> None:
    lines = help_of(name, width).splitlines()
    assert len(lines) > 5
    assert [line for line in lines if len(line) > width] == []


@pytest.mark.parametrize("name", ["", *COMMANDS])
def test_examples_can_be_pasted(name: str) -> None:
    command = command_of(name) if name else cli
    examples = examples_of(command)
    assert examples or name == "architectures"
    for example in examples:
        words = shlex.split(example)
        if words[0] == "torchrun":
            words = ["neuralink", *words[words.index("neuralink_cli") + 1 :]]
        program, subcommand, *arguments = words
        assert program == "neuralink"
        assert not name or subcommand == name
        # Parses and converts everything, and fails on unknown options and missing arguments.
        command_of(subcommand).make_context(subcommand, arguments)


@pytest.mark.parametrize("name", COMMANDS)
def test_both_spellings_of_help_work(neuralink: Neuralink, name: str) -> None:
    long, short = neuralink(name, "--help"), neuralink(name, "-h")
    assert long.code == short.code == 0
    assert long.stdout == short.stdout
    assert long.stdout.startswith(f"Usage: neuralink {name} [OPTIONS]")
    assert long.stderr == ""


def test_the_version_is_that_of_the_package(neuralink: Neuralink) -> None:
    outcome = neuralink("--version")
    assert (outcome.code, outcome.stdout, outcome.stderr) == (0, f"neuralink, version {__version__}\n", "")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("relayout", "--colour"), "No such option '--colour'"),
        (("--colour",), "No such option '--colour'"),
        (("relayot",), "No such command 'relayot'. Did you mean 'relayout' or 'report'?"),
        (("frobnicate", "x"), "No such command 'frobnicate'."),
        (("relayout",), "Missing argument 'MODEL'"),
        (("relayout", "model", "-o", "out"), "Missing option '--placement'"),
        (("relayout", "model", "--placement", "p"), "Missing option '-o' / '--output'"),
        (("relayout", "m", "--placement", "p", "-o", "o", "--layout", "x"), "'x' is not one of 'bundled', 'permuted'"),
        (("relayout", "m", "--placement", "p", "-o", "o", "--alignment", "x"), "'x' is not a valid integer"),
        (("cluster", "t", "-o", "o", "--held-out", "1"), "1.0 is not in the range 0<=x<=0.9"),
        (("verify", "m", "l", "--tolerance", "-1"), "-1.0 is not in the range x>=0"),
        (("profile", "m", "-o", "t"), "Missing option '--dataset'"),
        (("profile", "m", "--dataset", "d", "-o", "t", "--part", "3/2"), "'3/2' is not I/N with 1 <= I <= N"),
        (("profile", "m", "--dataset", "d", "-o", "t", "--part", "1"), "'1' is not I/N"),
        (("merge", "-o", "t"), "Missing argument 'TRACES...'"),
        (("profile", "m", "--effort", "fast"), "'--effort'. It is an option of cluster, estimate, drift, build."),
        (("--dataset", "d", "profile"), "It is an option of profile, build; options come after the command's name."),
        (("profile", "m", "--dataset", "d", "-o", "t", "--active-ratio", "30%"), "'30%' is not a valid number"),
        (("bench", "f", "--trace", "t", "--tokens", "1e3"), "'1e3' is not a valid whole number"),
    ],
)
def test_wrong_usage_is_exit_code_2(neuralink: Neuralink, arguments: tuple[str, ...], complaint: str) -> None:
    outcome = neuralink(*arguments)
    assert (outcome.code, outcome.stdout) == (2, "")
    assert outcome.stderr.startswith("Usage: neuralink")
    assert complaint in outcome.stderr.splitlines()[-1]


@pytest.mark.parametrize(("option", "names"), [("--device", tuple(builtin_devices())), ("--order", ORDER_NAMES)])
def test_the_help_of_cluster_names_all_that_is_built_in(option: str, names: tuple[str, ...]) -> None:
    (said,) = (
        each.help for each in command_of("cluster").params if isinstance(each, click.Option) and option in each.opts
    )
    assert said is not None
    assert [name for name in names if name not in said] == []


def test_help_imports_nothing_heavy() -> None:
    script = (
        "import sys; from neuralink_cli.cli.entry import run; code = run(['--help']);"
        f"print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr); sys.exit(code)"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "[]\n")
    assert result.stdout.startswith("Usage: neuralink [OPTIONS] COMMAND [ARGS]...")


def test_the_reference_of_the_commands_is_up_to_date() -> None:
    spec = importlib.util.spec_from_file_location("generate_cli", ROOT / "docs/generate_cli.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (ROOT / "docs/cli.md").read_text(encoding="utf-8") == module.render(), "run `make docs`"
