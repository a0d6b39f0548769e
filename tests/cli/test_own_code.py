"""Checkpoints with Python code of their own beside a type that transformers has: which of the two ran is a choice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from neuralink_cli.activations.trace import Trace
from tests.cli.conftest import Neuralink
from tests.tiny_models import TEXT, build_model

BOTH_WAYS = '''\
import torch
from transformers import Qwen2Model


class BothWays(Qwen2Model):
    """Everything sees everything."""

    def forward(self, input_ids=None, attention_mask=None, **kwargs):
        batch, length = input_ids.shape
        mask = torch.zeros(batch, 1, length, length, dtype=self.dtype, device=input_ids.device)
        masks = {"full_attention": mask, "sliding_attention": mask}
        return super().forward(input_ids=input_ids, attention_mask=masks, **kwargs)
'''


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture
def both_ways(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model of the type qwen2 whose own code attends in both directions."""
    from transformers import dynamic_module_utils

    cache = tmp_path / "modules"
    cache.mkdir()
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(cache))
    monkeypatch.syspath_prepend(str(cache))
    directory = build_model(tmp_path / "model", "qwen2", activation="relu")
    (directory / "both_ways.py").write_text(BOTH_WAYS)
    edit(directory / "config.json", auto_map={"AutoModel": "both_ways.BothWays"})
    return directory


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def fired(path: Path) -> tuple[Any, dict[str, str]]:
    with Trace(path) as trace:
        return np.concatenate([trace.fired(b).ravel() for b in trace.info.blocks]), dict(trace.info.model)


def test_profile_asks_which_code_is_to_run_and_keeps_the_answer(
    neuralink: Neuralink, both_ways: Path, text_file: Path, tmp_path: Path
) -> None:
    common = ("profile", both_ways, "--dataset", text_file, "--batch-size", 1, "-q")
    outcome = neuralink(*common, "-o", tmp_path / "t")
    assert outcome.code == 4
    assert "comes with Python code of its own (AutoModel: both_ways.BothWays), which may compute" in outcome.error
    assert "--trust-remote-code to run it, or --ignore-remote-code to do without it" in outcome.error
    assert not (tmp_path / "t").exists()
    assert neuralink(*common, "-o", tmp_path / "own", "--trust-remote-code").code == 0
    assert neuralink(*common, "-o", tmp_path / "plain", "--ignore-remote-code").code == 0
    own, plain = fired(tmp_path / "own"), fired(tmp_path / "plain")
    assert own[1]["code"] == "run"
    assert plain[1]["code"] == "ignored"
    assert (own[0] != plain[0]).mean() > 0.01
    edit(both_ways / "config.json", auto_map={})
    assert neuralink(*common, "-o", tmp_path / "without").code == 0
    without = fired(tmp_path / "without")
    assert "code" not in without[1]
    assert (without[0] == plain[0]).all()
    assert neuralink("merge", tmp_path / "own", tmp_path / "plain", "-o", tmp_path / "m").code == 5
    outcome = neuralink(*common, "-o", tmp_path / "t", "--trust-remote-code", "--ignore-remote-code")
    assert outcome.code == 2


def test_code_for_a_class_with_a_head_alone_is_run_too(
    neuralink: Neuralink, both_ways: Path, text_file: Path, tmp_path: Path
) -> None:
    head = "from transformers import Qwen2ForCausalLM\n\n\nclass Head(Qwen2ForCausalLM):\n"
    head += "    def __init__(self, config):\n"
    head += "        super().__init__(config)\n        self.model = BothWays(config)\n        self.post_init()\n"
    (both_ways / "both_ways.py").write_text(BOTH_WAYS + "\n\n" + head)
    common = ("profile", both_ways, "--dataset", text_file, "--batch-size", 1, "-q", "--trust-remote-code")
    assert neuralink(*common, "-o", tmp_path / "base").code == 0
    edit(both_ways / "config.json", auto_map={"AutoModelForCausalLM": "both_ways.Head"})
    assert neuralink(*common, "-o", tmp_path / "head").code == 0
    assert (fired(tmp_path / "base")[0] == fired(tmp_path / "head")[0]).all()
    edit(both_ways / "config.json", auto_map={"AutoModelForSequenceClassification": "both_ways.Head"})
    outcome = neuralink(*common, "-o", tmp_path / "t")
    assert outcome.code == 4
    assert "its own code has AutoModelForSequenceClassification and no AutoModel" in outcome.error


def test_own_code_of_the_tokenizer_counts(
    neuralink: Neuralink, both_ways: Path, text_file: Path, tmp_path: Path
) -> None:
    edit(both_ways / "config.json", auto_map={})
    edit(both_ways / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "tokens.Own"]})
    common = ("profile", both_ways, "--dataset", text_file, "-q", "-o", tmp_path / "t")
    outcome = neuralink(*common)
    assert outcome.code == 4
    assert "comes with Python code of its own (AutoTokenizer: tokens.Own)" in outcome.error
    assert neuralink(*common, "--ignore-remote-code").code == 0


def test_every_command_that_runs_the_model_asks(
    neuralink: Neuralink, both_ways: Path, text_file: Path, tmp_path: Path
) -> None:
    ignore = "--ignore-remote-code"
    layout, placement = tmp_path / "layout", tmp_path / "p"
    assert neuralink("profile", both_ways, "--dataset", text_file, "-o", tmp_path / "t", "-q", ignore).code == 0
    assert neuralink("cluster", tmp_path / "t", "-o", placement, "--effort", "fast", "-q").code == 0
    made = ("relayout", both_ways, "--placement", placement, "-o", layout, "--resident", "gate", "-q")
    assert neuralink(*made).code == 0
    assert json.loads((layout / "model.flash.json").read_text())["model"]["code"] == "ignored"
    for command in (
        ("verify", both_ways, layout, "--forward", "--text", text_file, "-q"),
        ("run", layout, "--prompt", "The river", "--max-new-tokens", 3, "--compare", both_ways, "-q"),
    ):
        outcome = neuralink(*command)
        assert outcome.code == 4
        assert "--ignore-remote-code to do without it" in outcome.error
        assert neuralink(*command, ignore).code == 0
