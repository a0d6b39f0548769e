"""The short run of the fuzzing harness: every kind of file, seeded; `make fuzz` is the long one."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fuzzing import KINDS, World, cases, check_case


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World.create(tmp_path_factory.mktemp("fuzzing") / "world")


@pytest.mark.parametrize("part", range(4))
def test_whatever_a_file_says_it_is_refused_or_right(
    tmp_path: Path, world: World, part: int, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, (kind, random) in enumerate(cases(seed=part, count=6 * len(KINDS))):
        problems = check_case(world, tmp_path / f"case-{number}", kind, random)
        assert problems == []
        stdout, stderr = capsys.readouterr()
        assert all(len(line) <= 500 for line in stderr.splitlines())
        assert "Traceback" not in stdout + stderr
