"""Prompts and output where the locale is not UTF-8."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from neuralink_cli.cli.options import text_argument

SCRIPT = """
import sys
from neuralink_cli.cli.options import text_argument
from neuralink_cli.cli.output import set_defaults
set_defaults()
text = text_argument(sys.argv[1])
print(ascii(text))
print(text)
"""


@pytest.mark.parametrize(("argument", "text"), [("Höhe 水".encode(), "Höhe 水"), (b"a\xff", "a\udcff")])
def test_a_prompt_is_utf8_in_a_locale_without_it(argument: bytes, text: str) -> None:
    environment = {**os.environ, "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    done = subprocess.run([sys.executable, "-c", SCRIPT, argument], env=environment, capture_output=True, check=True)
    seen, printed = done.stdout.splitlines()
    assert seen.decode() == ascii(text)
    assert printed == (b"H\\xf6he \\u6c34" if text.isprintable() else argument)


def test_in_a_utf8_locale_a_prompt_stays_what_it_is() -> None:
    assert text_argument("Höhe 水 \udcff \ud800") == "Höhe 水 \udcff \ud800"
