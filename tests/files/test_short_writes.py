"""A write may take only a part of what it is given: outputs are whole all the same."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from neuralink_cli.calibration.rows import Rows
from neuralink_cli.cli.entry import run
from neuralink_cli.files import durable
from tests.checkpoints import files_of
from tests.layouts import LayoutFactory


@pytest.fixture
def short_writes(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Every write of more than a page takes about half of it. Gives how many there were."""
    count = 0
    plain_write, plain_pwrite, plain_fdopen = os.write, os.pwrite, os.fdopen

    def half(data: Any) -> Any:
        nonlocal count
        view = memoryview(data).cast("B")
        if len(view) <= 16:
            return view
        count += 1
        # Whole pages, which is what direct writes need, where there are several.
        return view[: len(view) // 2 - len(view) // 2 % 4096 or len(view) // 2]

    class File(io.FileIO):
        def write(self, data: Any) -> int:
            return super().write(half(data))

    def fdopen(descriptor: int, mode: str = "r", *args: Any, **options: Any) -> Any:
        if options.get("buffering") == 0 and "w" in mode:
            return File(descriptor, "r+b")
        return plain_fdopen(descriptor, mode, *args, **options)

    monkeypatch.setattr(os, "fdopen", fdopen)
    monkeypatch.setattr(os, "write", lambda descriptor, data: plain_write(descriptor, half(data)))
    monkeypatch.setattr(os, "pwrite", lambda descriptor, data, offset: plain_pwrite(descriptor, half(data), offset))
    monkeypatch.setattr(durable, "open_new", lambda path: File(path, "x"))
    return lambda: count


def test_every_output_is_whole_though_writes_are_short(
    tmp_path: Path, layouts: LayoutFactory, request: pytest.FixtureRequest
) -> None:
    from tests.checkpoints import write_random_trace

    model, _ = layouts.checkpoint()
    trace = write_random_trace(model, tmp_path / "trace", tokens=120)

    def outputs(folder: Path) -> dict[str, bytes]:
        folder.mkdir()
        commands: tuple[tuple[object, ...], ...] = (
            ("merge", trace, "-o", folder / "merged"),
            ("cluster", trace, "-o", folder / "placement", "--effort", "fast", "--export-graph", folder / "graphs"),
            ("relayout", model, "--placement", folder / "placement", "-o", folder / "bundled", "--resume"),
            ("relayout", model, "--placement", folder / "placement", "-o", folder / "p", "--layout", "permuted"),
            ("restore", folder / "bundled", "-o", folder / "restored"),
            ("bench", folder / "placement", "--trace", trace, "--csv", folder / "bench.csv"),
        )
        for command in commands:
            assert run([*map(str, command), "-q"]) == 0
        found = files_of(folder)
        # Has the path of the placement in it.
        found["bench.csv"] = found["bench.csv"].replace(bytes(folder), b"")
        return found

    expected = outputs(tmp_path / "whole")
    count = request.getfixturevalue("short_writes")
    assert outputs(tmp_path / "short") == expected
    assert count() > 50


def test_the_spool_of_images_is_whole_though_writes_are_short(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As for files: the pixels that come back are those that went in."""
    import tempfile

    from neuralink_cli.calibration import images

    class Short(io.FileIO):
        def write(self, data: Any) -> int:
            return super().write(memoryview(data).cast("B")[:100])

    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **_: Short(tmp_path / "spool", "w+b"))
    pixels = np.arange(5 * 3 * 8 * 8, dtype=np.float32).reshape(5, 3, 8, 8)
    monkeypatch.setattr(images, "_chosen", lambda *_: iter(pixels))

    rows = Rows("pictures", "pictures", False, None, None, None, False, lambda: iter(()))
    source = images.prepare_images(
        rows, None, lambda _: 4, {}, num_samples=None, seed=None, max_tokens=None, advance=lambda _: None
    )
    assert np.array_equal(source.batch(0, 5).inputs["pixel_values"], pixels)
