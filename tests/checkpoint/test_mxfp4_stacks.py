"""MXFP4 as gpt-oss has it: which tensors are stacks, and what their weights are, by transformers' own decoding."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from neuralink_cli.architectures.regions import Region
from neuralink_cli.architectures.scales import refuse_scales
from neuralink_cli.checkpoint.checkpoint import Checkpoint
from neuralink_cli.checkpoint.mxfp4_stacks import find_stacks
from neuralink_cli.checkpoint.scaled_tensors import ScaledTensor, Shape
from neuralink_cli.errors import UnsupportedError
from neuralink_cli.weight_formats.scaled import read_scales, widen_rows, widen_scaled
from tests.scaled import mxfp4_gpt_oss

HERE = Path("the/model")
CONFIG = {"quant_method": "mxfp4"}
STACK: dict[str, Shape] = {"e.up_blocks": ("U8", (2, 6, 3, 16)), "e.up_scales": ("U8", (2, 6, 3))}


def test_a_stack_is_one_matrix_of_all_rows() -> None:
    found = find_stacks(CONFIG, {**STACK, "e.up_bias": ("BF16", (2, 6))}, HERE)
    assert found == {"e.up_blocks": ScaledTensor("e.up_blocks", "e.up_scales", 12, 96, 1, 32, 2)}


@pytest.mark.parametrize("config", [None, {}, {"quant_method": "fp8"}, "mxfp4"])
def test_of_other_checkpoints_nothing_is_a_stack(config: object) -> None:
    assert find_stacks(config, STACK, HERE) == {}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"e.up_scales": None}, "'e.up_blocks' is U8, but has no scales"),
        ({"e.up_scales": ("U8", (2, 6, 4))}, "with scales U8 [2, 6, 4], not understood"),
        ({"e.up_scales": ("BF16", (2, 6, 3))}, "with scales BF16 [2, 6, 3], not understood"),
        ({"e.up_blocks": ("U8", (2, 6, 3, 8))}, "is U8 [2, 6, 3, 8] with scales"),
        ({"e.up_blocks": ("U8", (6, 3, 16)), "e.up_scales": ("U8", (6, 3))}, "is U8 [6, 3, 16] with scales"),
        ({"e.up_blocks": ("U8", (0, 6, 3, 16)), "e.up_scales": ("U8", (0, 6, 3))}, "not understood as MXFP4"),
        ({"e.up_blocks": ("I8", (2, 6, 3, 16))}, "is I8 [2, 6, 3, 16] with scales"),
    ],
)
def test_other_shapes_are_refused(changes: dict[str, Shape | None], told: str) -> None:
    tensors = {name: shape for name, shape in {**STACK, **changes}.items() if shape is not None}
    with pytest.raises(UnsupportedError) as caught:
        find_stacks(CONFIG, tensors, HERE)
    assert told in str(caught.value)


def test_weights_are_those_that_transformers_decodes(tmp_path: Path) -> None:
    _, model, _ = mxfp4_gpt_oss(tmp_path)
    stored = load_file(model / "model.safetensors")
    with Checkpoint(model) as checkpoint:
        for name in ("gate_up_proj", "down_proj"):
            stem = f"model.layers.1.mlp.experts.{name}"
            blocks, scales = stored[f"{stem}_blocks"], stored[f"{stem}_scales"]
            decoded = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32).transpose(1, 2).numpy()
            entry = checkpoint.place(f"{stem}_blocks").entry
            assert (entry.dtype, entry.shape) == ("I8", decoded.shape)
            of_tensor = read_scales(checkpoint, f"{stem}_blocks")
            assert of_tensor is not None
            found = widen_rows(blocks.numpy().reshape(-1), 0, of_tensor).view(np.float32).reshape(decoded.shape)
            assert np.array_equal(found, decoded)
            # Every second row of the last expert, from its second on, as gate and up alternate.
            rows, columns = decoded.shape[1:]
            start = (2 * rows + 1) * columns
            region = Region(entry.name, 0, start, 2 * columns, rows // 2, columns)
            flat = blocks.numpy().reshape(-1)[start // 2 : region.stop // 2]
            of_rows = read_scales(checkpoint, entry.name, region)
            assert of_rows is not None
            assert of_rows.values.shape == (rows - 1, columns // 32)
            for each in (of_tensor, of_rows):
                values, _ = widen_scaled(flat, region, each)
                assert np.array_equal(values.view(np.float32).reshape(-1, columns), decoded[2, 1::2])
        assert checkpoint.total_bytes == checkpoint.files[0].header.data_bytes


def test_stacks_of_which_the_config_says_nothing_are_refused(tmp_path: Path) -> None:
    _, model, _ = mxfp4_gpt_oss(tmp_path)
    path = model / "config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "quantization_config"}))
    with Checkpoint(model) as checkpoint, pytest.raises(UnsupportedError, match=r"proj_blocks' and 7 more"):
        refuse_scales(checkpoint)
