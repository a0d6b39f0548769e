"""Layout in, the original checkpoint out: every file byte for byte as it was."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from neuralink_cli.checkpoint.checkpoint import Checkpoint
from neuralink_cli.checkpoint.durable import new_directory, require_replaceable, require_space, sync_file
from neuralink_cli.errors import NeuralinkError
from neuralink_cli.flash.companions import companion_files, copy_companions
from neuralink_cli.flash.layouts import Layout, open_layout
from neuralink_cli.flash.output_file import OutputFile
from neuralink_cli.flash.permuted_layout import PermutedLayout


@dataclass(frozen=True)
class RestoreSummary:
    """What was restored: number of tensors and of weight bytes."""

    files: tuple[str, ...]
    tensors: int
    bytes: int


def restore(
    layout: Layout, output: Path, *, overwrite: bool = False, progress: Callable[[int], object] | None = None
) -> RestoreSummary:
    """Write the source checkpoint of a layout to `output`.

    Raises:
        OutputError: The output exists (and is not to be overwritten, or holds another model), or the disk is too small.
        InputError: The layout is damaged.
    """

    def replaceable(directory: Path) -> bool:
        return _holds_model(directory, layout.fingerprint)

    headers = layout.source_headers
    total = sum(header.data_start + header.data_bytes for header in headers.values())
    require_replaceable(output, overwrite, replaceable)
    require_space(output, total)
    with new_directory(output, overwrite=overwrite, replaceable=replaceable) as directory:
        copy_companions(companion_files(layout.directory), layout.directory, directory)
        for name, content in layout.verbatim.items():
            (directory / name).write_bytes(content)
            sync_file(directory / name)
        for name, header in headers.items():
            with OutputFile(directory / name, progress) as file:
                file.write(header.prelude)
                for entry in header.entries:
                    for chunk in layout.source_chunks(entry.name):
                        file.write(chunk)
    return RestoreSummary(tuple(headers), sum(len(header.entries) for header in headers.values()), total)


@contextlib.contextmanager
def loadable(directory: Path) -> Iterator[Path]:
    """A directory that transformers can load a layout from: its own, or the restored checkpoint's, for a while."""
    with open_layout(directory) as layout:
        if isinstance(layout, PermutedLayout):
            yield directory
            return
        with tempfile.TemporaryDirectory(prefix=".neuralink-", dir=directory.absolute().parent) as folder:
            restored = Path(folder) / "restored"
            restore(layout, restored)
            yield restored


def _holds_model(directory: Path, fingerprint: str) -> bool:
    try:
        with Checkpoint(directory) as checkpoint:
            return checkpoint.fingerprint == fingerprint
    except NeuralinkError:
        return False
