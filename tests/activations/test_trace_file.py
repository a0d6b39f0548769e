"""Traces that are well-formed files and still make no sense."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from neuralink_cli.activations import trace as trace_module
from neuralink_cli.activations.trace import Trace, TraceBlock, TraceHeader, TraceSource, write_trace
from neuralink_cli.errors import InputError
from neuralink_cli.files.schema import Schema
from neuralink_cli.files.stage_file import StreamedTensor, write_stage_file
from tests.traces import numbered_digests


def test_a_block_named_twice_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    block = TraceBlock("layers.0", 8, 4, "relu", 0.0, {"up": 8, "down": 8})
    header = TraceHeader(
        {"fingerprint": "0" * 64, "model_type": "opt", "architecture": "opt"},
        None,
        "gate",
        None,
        (block, block),
        (TraceSource("x", "0" * 64, 0, 1, 1, 3, {}),),
    )

    def write_once(
        path: Path, schema: Schema, document: Mapping[str, Any], tensors: Sequence[StreamedTensor], **options: Any
    ) -> str:
        return write_stage_file(path, schema, document, tensors[1:], **options)

    # A writer that is not ours: the document has the block twice, the tensors once.
    monkeypatch.setattr(trace_module, "write_stage_file", write_once)
    bits = np.zeros((3, 1), dtype=np.uint8)
    write_trace(tmp_path / "t", header, np.array([3], dtype=np.uint32), numbered_digests(1), lambda _: [bits])
    with pytest.raises(InputError, match="lists a block twice"):
        Trace(tmp_path / "t")
