from __future__ import annotations

import json
from pathlib import Path

import pytest

from neuralink_cli.models.model_class import saved_without_head


@pytest.mark.parametrize(
    ("kind", "task", "named", "without"),
    [
        ("llama", "causal-lm", ["LlamaForCausalLM"], False),
        ("llama", "causal-lm", ["LlamaModel"], True),
        ("llama", "causal-lm", ["LlamaForSequenceClassification"], True),
        ("qwen2", "causal-lm", ["Qwen2ForTokenClassification"], True),
        ("t5", "seq2seq", ["T5ForQuestionAnswering"], True),
        ("t5", "seq2seq", ["T5ForConditionalGeneration"], False),
        ("bert", "encoder", ["BertModel"], False),
        ("llama", "causal-lm", [], False),
        ("llama", "causal-lm", None, False),
        ("llama", "causal-lm", "LlamaModel", False),
        ("own", "causal-lm", ["OwnModel"], False),
    ],
)
def test_whether_the_head_of_the_task_was_saved(
    tmp_path: Path, kind: str, task: str, named: object, without: bool
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind, "architectures": named}))
    assert saved_without_head(tmp_path, task) == without
