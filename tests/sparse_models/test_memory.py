"""What a run plans to hold in memory is what its process takes, as the system counts it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import Gemma4TextConfig, LlamaConfig, LlamaForCausalLM

from neuralink_cli.models.hf_packages import quiet_transformers
from neuralink_cli.sparse_models.memory import sequence_bytes
from tests.checkpoints import write_random_placement
from tests.cli.test_announced_memory import MEASURE, announced_in
from tests.layouts import relayout
from tests.tiny_models import tokenizer_of

VOCABULARY, HIDDEN = 60_000, 512


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a model whose embedding and head are much larger than what else is in memory."""
    folder = tmp_path_factory.mktemp("large")
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=1024, num_hidden_layers=1, num_attention_heads=8,
        hidden_act="relu", tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    with quiet_transformers():
        LlamaForCausalLM(config).half().save_pretrained(folder / "model")
        tokenizer_of("llama").save_pretrained(folder / "model")
    write_random_placement(folder / "model", folder / "placement", threshold=0.0)
    relayout(folder / "model", folder / "placement", folder / "flash", resident="gate")
    return folder / "flash"


@pytest.mark.skipif(sys.platform != "linux", reason="the unit of ru_maxrss, and what counts as resident, differ")
@pytest.mark.parametrize(("dtype", "size"), [("auto", 2), ("float32", 4)])
def test_the_sum_of_the_parts_is_what_the_process_takes(layout: Path, dtype: str, size: int) -> None:
    arguments = ["run", layout, "--prompt", "The river", "--max-new-tokens", 2, "--dtype", dtype, "--json"]
    script = MEASURE.replace("stdout=subprocess.DEVNULL", "stdout=sys.stderr")
    command = [sys.executable, "-c", script, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    memory = json.loads(done.stderr[done.stderr.index("{") :])["dram"]
    taken, announced = int(done.stdout.split()[-1]), announced_in(done.stderr)
    assert 1 <= announced / taken <= 1.15
    weights = size * (2 * VOCABULARY * HIDDEN + 4 * HIDDEN * HIDDEN)
    assert weights < memory["dense_bytes"] < 1.01 * weights
    # A second copy of embedding or head would be larger than this.
    allowed = 0.9 * size * VOCABULARY * HIDDEN
    assert abs(taken - memory["planned_bytes"]) < allowed
    # Once measured, the process still has to end.
    assert 0.9 < memory["peak_bytes"] / taken < 1.1


def test_a_sequence_takes_its_attention_cache_or_its_logits() -> None:
    blocks: Any = [SimpleNamespace(neurons=100)]
    config = SimpleNamespace(
        num_hidden_layers=3, num_attention_heads=8, num_key_value_heads=2, hidden_size=64, vocab_size=1000
    )
    assert sequence_bytes(config, blocks, 7, 2, whole=False) == 2 * 7 * (2 * 3 * 2 * 8 + 4 * 100)
    assert sequence_bytes(config, blocks, 7, 2, whole=True) == 2 * 7 * 1000
    assert sequence_bytes(SimpleNamespace(), blocks, 7, 2, whole=False) == 2 * 7 * 4 * 100


def test_layers_whose_heads_differ_are_counted_one_by_one() -> None:
    """transformers refuses to tell the size of a head of the whole model."""
    blocks: Any = [SimpleNamespace(neurons=100)]
    config = Gemma4TextConfig(
        num_hidden_layers=3, layer_types=["sliding_attention", "sliding_attention", "full_attention"],
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, global_head_dim=16, hidden_size=64, vocab_size=1000,
    )  # fmt: skip
    cached = 2 * 2 * (8 + 8 + 16)
    assert sequence_bytes(config, blocks, 7, 2, whole=False) == 7 * 2 * (cached + 4 * 100)
    assert sequence_bytes(config, blocks, 7, 2, whole=True) == 7 * 2 * 1000
