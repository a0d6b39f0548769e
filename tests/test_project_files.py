"""What the files around the package say of each other and of the package."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import click
import pytest

from neuralink_cli import __version__
from neuralink_cli.cli.commands import COMMANDS, cli

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    str(path.relative_to(ROOT))
    for folder in (".", "docs", "examples", "examples/c_runtime", "examples/tiny-relu")
    for path in (ROOT / folder).glob("*.md")
)
WORKFLOW = ".github/workflows/ci.yml"
SCRIPTS = (".ci/run", WORKFLOW, "examples/ci.yml", "examples/Makefile", "Makefile")
# A requirement with a lower bound, on a line of its own.
REQUIREMENT = re.compile(r'    "([\w-]+)>=([\w.]+)",')


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def read_yaml(name: str) -> Any:
    import yaml

    return yaml.safe_load(text_of(name))


def lower_bounds() -> dict[str, str]:
    """The oldest version of every package that pyproject.toml asks for."""
    text = text_of("pyproject.toml")
    lists = re.findall(r"^(?:dependencies|hf|plot|dask|dev) = \[\n(.*?)^\]", text, re.MULTILINE | re.DOTALL)
    assert len(lists) == 5
    lines = "".join(lists).splitlines()
    matches = [REQUIREMENT.fullmatch(line) for line in lines]
    without = [line for line, match in zip(lines, matches, strict=True) if match is None]
    assert not without, f"no lower bound, or none that this test can read: {without}"
    return {match[1]: match[2] for match in matches if match is not None}


def pins(name: str) -> dict[str, str]:
    """The versions in a file of constraints."""
    lines = (line.partition("#")[0].strip() for line in text_of(name).splitlines())
    return dict(line.split("==") for line in lines if line)


def make_targets() -> set[str]:
    """The targets that the Makefile declares for people."""
    phony = re.search(r"^\.PHONY: (.*)$", text_of("Makefile"), re.MULTILINE)
    assert phony is not None
    return set(phony[1].split())


def code_lines(name: str) -> list[str]:
    """The lines of a script; of a page those of its code blocks, and what stands between backticks."""
    text = text_of(name).replace("\\\n", " ")
    if not name.endswith(".md"):
        return [line.removeprefix("      - run: ").strip() for line in text.splitlines()]
    prose, *blocks = re.split(r"^ *```\w*$", text, flags=re.MULTILINE)
    assert len(blocks) % 2 == 0, "a code block is not closed"
    prose += "".join(blocks[1::2])
    spans = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose)]
    return [line.strip() for block in blocks[::2] for line in block.splitlines()] + spans


def command_lines(name: str) -> list[list[str]]:
    """The neuralink commands in a file, with their arguments."""
    matches = [re.match(r"(?:\S*/)?neuralink ([a-z].*)", re.sub(r"\$\(\w+\)", "X", line)) for line in code_lines(name)]
    return [shlex.split(match[1], comments=True) for match in matches if match is not None]


def test_every_lower_bound_is_the_pin_of_the_oldest_versions() -> None:
    assert lower_bounds() == pins("constraints-oldest.txt")


def test_the_default_environment_is_not_older_than_the_lower_bounds() -> None:
    bounds = lower_bounds()
    for name, version in pins("constraints.txt").items():
        oldest, pinned = (tuple(map(int, each.split("."))) for each in (bounds[name], version))
        assert pinned >= oldest, name


def test_make_help_describes_every_target() -> None:
    described = re.findall(r'^\t@echo "make (\w+) +\S', text_of("Makefile"), re.MULTILINE)
    assert sorted(described) == sorted(make_targets() - {"help"})


def test_every_target_has_a_rule() -> None:
    rules = set(re.findall(r"^([a-z]+):", text_of("Makefile"), re.MULTILINE))
    assert rules == make_targets()


@pytest.mark.parametrize("name", [*PAGES, *SCRIPTS])
def test_every_make_target_that_is_named_exists(name: str) -> None:
    named = {match[1] for line in code_lines(name) if (match := re.match(r"make ([a-z]+)", line))}
    makefiles = ("examples/Makefile", "examples/c_runtime/Makefile") if name.startswith("examples/") else ()
    others = {target for path in makefiles for target in re.findall(r"^([\w-]+):", text_of(path), re.MULTILINE)}
    assert named <= make_targets() | others


def test_the_pages_and_scripts_do_name_commands() -> None:
    for name in ("README.md", "CONTRIBUTING.md", "examples/ci.yml", "Makefile"):
        assert command_lines(name), name


@pytest.mark.parametrize("name", [*PAGES, *SCRIPTS])
def test_every_command_and_option_that_is_named_exists(name: str) -> None:
    for command_name, *arguments in command_lines(name):
        assert command_name in COMMANDS, command_name
        command = cli.get_command(click.Context(cli), command_name)
        assert command is not None
        known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
        options = {argument.partition("=")[0] for argument in arguments if re.match(r"--?[a-z]", argument)}
        assert options <= known | {"--help", "-h"}, f"{command_name}: {options - known}"


@pytest.mark.parametrize("name", PAGES)
def test_every_link_to_a_file_leads_somewhere(name: str) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text_of(name)):
        if "://" not in target:
            assert (ROOT / name).parent.joinpath(target).exists(), target


def anchors_of(path: Path) -> set[str]:
    """The anchors that a host makes of the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", path.read_text(), flags=re.M | re.S), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", PAGES)
def test_every_link_to_a_heading_leads_there(name: str) -> None:
    page = ROOT / name
    for target, anchor in re.findall(r"\]\(([^)#\s]*)#([^)]*)\)", page.read_text()):
        if "://" not in target:
            assert anchor in anchors_of(page.parent / target if target else page), f"{target}#{anchor}"


@pytest.mark.parametrize("name", ["CONTRIBUTING.md", "SECURITY.md"])
def test_every_file_that_is_named_exists(name: str) -> None:
    folders = "|".join(path.name for path in ROOT.iterdir() if path.is_dir() and path.name != "build")
    named = re.findall(rf"`((?:{folders})/[\w./-]*)`", text_of(name).replace(".github", "github"))
    assert named
    for path in named:
        assert (ROOT / path.replace("github/", ".github/", 1)).exists(), path


def test_every_benchmark_is_in_the_table() -> None:
    scripts = {path.name for path in (ROOT / "benchmarks").glob("*.py")}
    assert set(re.findall(r"`benchmarks/(\w+\.py)`", text_of("CONTRIBUTING.md"))) == scripts
    rows = re.findall(r"^\| `benchmarks/(\w+\.py)` .* \| (yes|no)\b[^|]*\|$", text_of("CONTRIBUTING.md"), re.MULTILINE)
    run = set(re.findall(r"benchmarks/(\w+\.py) ", text_of("Makefile").partition("\nbench:")[2].partition("\n\n")[0]))
    assert {script for script, answer in rows if answer == "yes"} == run


def test_the_version_is_the_same_everywhere() -> None:
    assert read_yaml("CITATION.cff")["version"] == __version__
    assert re.search(rf"^(Version |## \[){re.escape(__version__)}\b", text_of("CHANGELOG.md"), re.MULTILINE)


def test_the_workflow_runs_the_oldest_python_with_the_oldest_versions() -> None:
    jobs = read_yaml(WORKFLOW)["jobs"]
    oldest, newest = jobs["versions"]["strategy"]["matrix"]["include"]
    required = re.search(r'^requires-python = ">=([\d.]+)"$', text_of("pyproject.toml"), re.MULTILINE)
    assert required is not None
    assert oldest == {"python": required[1], "versions": "oldest", "constraints": "constraints-oldest.txt"}
    classified = re.findall(r'"Programming Language :: Python :: 3\.(\d+)"', text_of("pyproject.toml"))
    assert int(newest["python"].partition(".")[2]) >= max(map(int, classified))
    assert min(classified, key=int) == required[1].partition(".")[2]


def test_the_workflow_uses_no_actions_of_third_parties() -> None:
    jobs = read_yaml(WORKFLOW)["jobs"].values()
    steps = [step for job in jobs for step in job["steps"]]
    used = {step["uses"].partition("@")[0] for step in steps if "uses" in step}
    assert used == {"actions/checkout", "actions/setup-python"}
    assert {"run": ".ci/run"} in steps


def test_no_test_is_skipped_in_the_workflow_for_want_of_a_package() -> None:
    jobs = read_yaml(WORKFLOW)["jobs"].values()
    on_linux = [job for job in jobs if job["runs-on"].startswith("ubuntu")]
    assert on_linux
    installed = [" ".join(step.get("run", "") for step in job["steps"]) for job in on_linux]
    assert all("libsimde-dev" in commands for commands in installed)
    # What CONTRIBUTING.md says that tests are skipped without.
    named = re.findall(r"`(libsimde-dev|gcc-[\w-]+|qemu-[\w-]+)`", text_of("CONTRIBUTING.md"))
    assert len(named) == 3
    assert any(all(package in commands for package in named) for commands in installed)


def test_the_hooks_before_a_commit_are_those_of_make_lint() -> None:
    (repository,) = read_yaml(".pre-commit-config.yaml")["repos"]
    assert repository["repo"] == "local"
    assert {hook["language"] for hook in repository["hooks"]} == {"system"}
    recipe = text_of("Makefile").partition("\nlint:")[2].partition("\n\n")[0]
    wanted = re.findall(r"\$\(BIN\)/(.*)$", recipe, re.MULTILINE)
    assert wanted
    hooks = {hook["entry"].removeprefix(".venv/bin/") for hook in repository["hooks"]}
    # Here the files come as arguments, there it is the folder.
    assert hooks == {re.sub(r" \.$", " --force-exclude", command) for command in wanted}
