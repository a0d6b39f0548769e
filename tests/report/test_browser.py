"""The page in a headless Chromium, where one is installed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from neuralink_cli.report.figures import FIGURE_NAMES
from tests.report.conftest import Reported

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")

# Appended to a copy of the page: what a reader's browser made of it.
PROBE = """<script>
const shown = [...document.querySelectorAll("figure svg")].filter(each => each.getBoundingClientRect().height > 50);
const wide = document.documentElement.scrollWidth - document.documentElement.clientWidth;
const broken = [...document.querySelectorAll("svg image")].filter(each => !each.getBBox().width);
document.title = `${shown.length} figures, ${broken.length} broken, ${wide} too wide`;
</script>"""


def visit(page: Path, profile: Path, width: int) -> tuple[str, str]:
    """The page as the browser has it, and what it says."""
    assert CHROMIUM is not None
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
        f"--user-data-dir={profile}", "--enable-logging=stderr", "--v=0",
        f"--window-size={width},900", "--dump-dom", page.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=60, check=True, env={**os.environ, "HOME": str(profile)}
    )
    return done.stdout, done.stderr


@pytest.mark.parametrize("width", [1400, 400])
def test_a_browser_shows_every_figure_and_complains_of_nothing(reported: Reported, tmp_path: Path, width: int) -> None:
    page = tmp_path / "page.html"
    page.write_text(reported.text.replace("</body>", PROBE + "</body>"), encoding="utf-8")
    dom, log = visit(page, tmp_path / "profile", width)
    title = re.search(r"<title>(.*?)</title>", dom)
    assert title is not None
    assert title[1] == f"{len(FIGURE_NAMES)} figures, 0 broken, 0 too wide"
    assert "CONSOLE" not in log
