"""The Python API is what docs/python.md says: every name is there, documented, and the examples run."""

from __future__ import annotations

import ast
import inspect
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import neuralink_cli

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs/python.md").read_text()


def test_the_page_lists_every_exported_name_and_no_other() -> None:
    rows = [line.split("|")[1] for line in PAGE.splitlines() if line.startswith("| `")]
    listed = [name for row in rows for name in re.findall(r"`(\w+)`", row)]
    assert sorted(listed) == sorted(neuralink_cli.__all__)


def test_type_checkers_see_what_is_exported() -> None:
    tree = ast.parse((ROOT / "neuralink_cli/__init__.py").read_text())
    checked = next(node for node in tree.body if isinstance(node, ast.If))
    imports = [node for node in checked.body if isinstance(node, ast.ImportFrom)]
    seen = {alias.name: str(node.module) for node in imports for alias in node.names}
    assert seen == {name: f"neuralink_cli.{home}" for name, home in neuralink_cli._HOMES.items()}
    assert sorted(seen) == neuralink_cli.__all__


@pytest.mark.parametrize("name", neuralink_cli.__all__)
def test_every_exported_name_has_a_docstring_that_says_what_can_go_wrong(name: str) -> None:
    value = getattr(neuralink_cli, name)
    text = inspect.getdoc(value)
    assert text, f"{name} has no docstring"
    assert value.__module__ == f"neuralink_cli.{neuralink_cli._HOMES[name]}"
    if inspect.isfunction(value) and name not in FAIL_NEVER:
        assert "Raises:" in text, f"{name} does not say which errors it raises"


# They look at the package's own data, or only compute.
FAIL_NEVER = {"builtin_architectures", "builtin_devices"}


def test_importing_the_package_loads_nothing() -> None:
    check = (
        "import sys, neuralink_cli; heavy = {'numpy', 'numba', 'torch', 'transformers', 'click'} & set(sys.modules);"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", check], check=True)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'unknown'"):
        _ = neuralink_cli.unknown  # type: ignore[attr-defined]
    assert {"profile", "__version__"} <= set(dir(neuralink_cli))


def test_the_examples_of_the_page_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    assert len(blocks) > 6
    shutil.copytree(ROOT / "examples/tiny-relu", tmp_path / "tiny-relu")
    # A part of it, since every order is measured on every token.
    text = (ROOT / "examples/text/calibration.txt").read_text(encoding="utf-8")
    (tmp_path / "calibration.txt").write_text(text[:1000], encoding="utf-8")
    (tmp_path / "page.py").write_text("\n".join(blocks))
    monkeypatch.chdir(tmp_path)
    runpy.run_path("page.py")
    printed = capsys.readouterr().out
    assert "full 68" in printed
    assert "nowhere no such directory" in printed
