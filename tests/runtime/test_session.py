"""What a run reports, and that it is true."""

from __future__ import annotations

import json
import math
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from neuralink_cli.calibration.readers import read_token_sequences
from neuralink_cli.errors import InputError, MismatchError, OptionError, UnsupportedError
from neuralink_cli.models.hf_packages import quiet_transformers
from neuralink_cli.runtime.dense_comparison import TokenComparison
from neuralink_cli.runtime.perplexity import perplexity
from neuralink_cli.runtime.session import RunReport, RunRequest, run_layout
from neuralink_cli.sparse_models.settings import GenerationOptions, RunSettings
from neuralink_cli.storage.budget import parse_budget
from tests.runnables import Runnable, RunnableFactory
from tests.tiny_models import MAX_POSITIONS, TEXT

PARTS = ("cache", "resident", "dense", "working", "sequence", "programs")
PROMPT = "The river rises in the hills"


def go(made: Runnable, **options: Any) -> RunReport:
    dtype = options.pop("dtype", "float32")
    names = {field.name for field in fields(GenerationOptions)}
    generation = GenerationOptions(**{"max_new_tokens": 8, **{k: v for k, v in options.items() if k in names}})
    others = {name: value for name, value in options.items() if name not in names}
    settings = RunSettings(parse_budget("30%"), dtype=dtype)
    return run_layout(RunRequest(made.layout, settings, generation=generation, **others))


def dense_of(made: Runnable) -> Any:
    with quiet_transformers():
        return AutoModelForCausalLM.from_pretrained(made.model, dtype=torch.float32).eval()


@pytest.mark.parametrize(("family", "ratio"), [("opt", None), ("qwen2", 0.3)])
def test_a_comparison_finds_the_same_tokens(runnable: RunnableFactory, family: str, ratio: float | None) -> None:
    made = runnable(family, active_ratio=ratio)
    report = go(made, prompt=PROMPT, compare=made.model, perplexity_text=TEXT, perplexity_tokens=100)
    assert report.exact == (ratio is None)
    assert report.generated is not None
    assert report.comparison is not None
    masked, dense = report.comparison.masked, report.comparison.dense
    assert masked == TokenComparison(len(report.generated.new_tokens), len(report.generated.new_tokens), None, 1e-4)
    assert dense is not None
    assert dense.agrees == (ratio is None)
    assert report.perplexity is not None
    assert report.comparison.dense_perplexity is not None
    cost = report.perplexity.value / report.comparison.dense_perplexity.value
    assert (abs(cost - 1) < 1e-4) == (ratio is None)
    assert report.perplexity.tokens == report.comparison.dense_perplexity.tokens == 100 - 2


def test_the_text_is_that_of_the_dense_model(runnable: RunnableFactory) -> None:
    made = runnable("opt")
    report = go(made, prompt=PROMPT)
    tokenizer = AutoTokenizer.from_pretrained(made.model)
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    with quiet_transformers(), torch.inference_mode():
        expected = dense_of(made).generate(ids, do_sample=False, max_new_tokens=8)[0]
    assert report.generated is not None
    assert [*report.generated.prompt_tokens, *report.generated.new_tokens] == expected.tolist()
    assert report.generated.text == tokenizer.decode(expected[ids.shape[1] :], skip_special_tokens=True)


def test_the_figures_fit_each_other(runnable: RunnableFactory) -> None:
    made = runnable("llama", active_ratio=0.3)
    report = go(made, prompt=PROMPT, max_new_tokens=20)
    assert report.generated is not None
    first, rest = report.generated.prompt_phase, report.generated.token_phase
    assert first.tokens == len(report.generated.prompt_tokens)
    assert rest.tokens == len(report.generated.new_tokens) - 1
    for phase in (first, rest):
        assert 0 < phase.counters.io_seconds <= phase.counters.fetch_seconds < phase.seconds
        assert 0 <= phase.counters.hits < phase.counters.looked_up
        assert 0 < phase.counters.bytes_useful <= phase.counters.bytes_read
    memory = report.memory
    assert 0 < memory.cache_bytes <= 0.3 * memory.flash_bytes
    assert memory.planned_bytes == sum(memory.as_document()[f"{part}_bytes"] for part in PARTS)
    # The rest of the process is this test's.
    assert memory.planned_bytes - memory.programs_bytes < 10_000_000 < memory.peak_bytes
    # As if loading had taken more than the plan.
    loaded = replace(memory, peak_bytes=2 * memory.planned_bytes)
    assert loaded.needed_bytes == loaded.peak_bytes + memory.working_bytes + memory.sequence_bytes
    assert replace(memory, peak_bytes=0).needed_bytes == memory.planned_bytes
    document = report.as_document()
    assert document["dtype"] == "float32"
    assert document["tokens"]["tokens_per_second"] == pytest.approx(rest.tokens / rest.seconds)
    assert document["tokens"]["reads_per_token"] == pytest.approx(rest.counters.reads / rest.tokens)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_auto_is_the_dtype_of_the_checkpoint(runnable: RunnableFactory, dtype: str) -> None:
    made = runnable("llama", activation="relu", dtype=dtype)
    report = go(made, dtype="auto", prompt=PROMPT, compare=made.model)
    assert report.dtype == dtype
    assert report.comparison is not None
    assert report.comparison.masked is not None
    assert report.comparison.masked.agrees
    width = {"bfloat16": 2, "float32": 4}[dtype]
    # 320 tokens in embedding and head, 2 layers with attention of one key and value head.
    assert report.memory.dense_bytes > width * (2 * 320 * 16 + 2 * 3 * 16 * 16)
    assert report.memory.dense_bytes < 1.05 * width * (2 * 320 * 16 + 2 * 3 * 16 * 16) + 1000


def test_one_token_is_all_in_the_first_phase(runnable: RunnableFactory) -> None:
    report = go(runnable("opt"), prompt=PROMPT, max_new_tokens=1)
    assert report.generated is not None
    assert len(report.generated.new_tokens) == 1
    assert report.generated.token_phase.tokens == 0
    assert report.generated.token_phase.tokens_per_second >= 0
    assert report.as_document()["tokens"]["reads_per_token"] == 0


def test_the_likeliest_token_is_taken_whatever_the_generation_config_asks_for(runnable: RunnableFactory) -> None:
    asked = {
        "do_sample": True,
        "repetition_penalty": 5.0,
        "no_repeat_ngram_size": 1,
        "guidance_scale": 3.0,
        "top_k": 1,
        "suppress_tokens": list(range(40)),
        "num_beams": 3,
        "eos_token_id": 10**6,
    }
    plain = runnable("opt", generation_config='{"eos_token_id": 1000000}')
    other = runnable("opt", generation_config=json.dumps(asked))
    for options in ({}, {"temperature": 2.0, "seed": 3}):
        texts = [go(made, prompt=PROMPT, max_new_tokens=12, **options).generated for made in (plain, other)]
        assert texts[0] is not None
        assert texts[1] is not None
        assert texts[0].new_tokens == texts[1].new_tokens


def test_tokens_are_drawn_from_all_unless_asked_otherwise(runnable: RunnableFactory) -> None:
    made = runnable("opt", generation_config='{"eos_token_id": 1000000}')

    def drawn(**options: Any) -> set[int]:
        generated = go(made, prompt=PROMPT, max_new_tokens=40, temperature=1e4, seed=1, **options).generated
        assert generated is not None
        return set(generated.new_tokens)

    (greedy,) = [go(made, prompt=PROMPT, max_new_tokens=1).generated]
    assert greedy is not None
    # So hot that all are alike: hardly any is drawn twice, beyond the 50 that transformers would keep.
    assert len(drawn()) > 25
    assert len(drawn(top_k=2)) < 25
    first = go(made, prompt=PROMPT, max_new_tokens=1, temperature=1e4, top_k=1).generated
    assert first is not None
    assert first.new_tokens == greedy.new_tokens
    with pytest.raises(OptionError, match="without a temperature"):
        go(made, prompt=PROMPT, top_p=0.5)


def test_drawing_depends_on_the_seed_alone(runnable: RunnableFactory) -> None:
    made = runnable("opt")
    drawn = [go(made, prompt=PROMPT, temperature=3.0, seed=seed).generated for seed in (1, 1, 2)]
    assert drawn[0] is not None
    assert drawn[1] is not None
    assert drawn[2] is not None
    assert drawn[0].new_tokens == drawn[1].new_tokens != drawn[2].new_tokens


def test_perplexity_is_that_of_the_definition(runnable: RunnableFactory) -> None:
    made = runnable("gpt2", activation="relu")
    report = go(made, perplexity_text=TEXT, perplexity_tokens=150)
    sequences = read_token_sequences(made.model, TEXT, sequences=3, length=MAX_POSITIONS)
    sequences[-1] = sequences[-1][: 150 - 2 * MAX_POSITIONS]
    dense, total, count = dense_of(made), 0.0, 0
    for sequence in sequences:
        ids = torch.from_numpy(sequence.astype(np.int64))
        with torch.inference_mode():
            chances = dense(input_ids=ids[None]).logits[0].double().log_softmax(dim=1)
        total -= sum(float(chances[k, ids[k + 1]]) for k in range(len(ids) - 1))
        count += len(ids) - 1
    assert report.generated is None
    assert report.perplexity is not None
    assert report.perplexity.value == pytest.approx(math.exp(total / count), rel=1e-4)
    assert report.perplexity.tokens == count
    assert perplexity(dense, [np.array([1], dtype=np.int32)]) is None


def test_what_does_not_go_together(runnable: RunnableFactory, tmp_path: Path) -> None:
    made, other = runnable("opt"), runnable("opt", dtype="float16")
    with pytest.raises(OptionError, match="there is nothing to do"):
        go(made)
    with pytest.raises(OptionError, match=r"tokens drawn at random .* leave out --temperature or --compare"):
        go(made, prompt=PROMPT, temperature=1.0, compare=made.model)
    with pytest.raises(MismatchError, match="has fingerprint"):
        go(made, prompt=PROMPT, compare=other.model)
    with pytest.raises(OptionError, match=rf"more than the {MAX_POSITIONS} .*; pass --max-new-tokens \d+$"):
        go(made, prompt=PROMPT, max_new_tokens=MAX_POSITIONS)
    with pytest.raises(OptionError, match="shorten the prompt"):
        go(made, prompt=TEXT)
    with pytest.raises(InputError, match="has fewer than two tokens"):
        go(made, perplexity_text="")
    with pytest.raises(InputError, match="the prompt has no tokens"):
        go(runnable("gpt2", activation="relu"), prompt="")
    with pytest.raises(UnsupportedError, match="is an encoder"):
        go(runnable("bert", activation="relu"), prompt=PROMPT)


@pytest.mark.parametrize(("gap", "agrees"), [(None, True), (0.0, True), (1e-4, True), (2e-4, False), (math.nan, False)])
def test_rounding_is_no_difference(gap: float | None, agrees: bool) -> None:
    assert TokenComparison(8, 3, gap, 1e-4).agrees == agrees


@pytest.mark.parametrize("asked", ["prompt", "perplexity_text"])
def test_logits_that_are_no_numbers_choose_nothing(
    runnable: RunnableFactory, monkeypatch: pytest.MonkeyPatch, asked: str
) -> None:
    """Whatever token is taken then would look like one that the model has chosen."""
    from transformers import OPTForCausalLM

    forward = OPTForCausalLM.forward

    def broken(self: Any, *arguments: Any, **options: Any) -> Any:
        output = forward(self, *arguments, **options)
        output.logits[..., 7] = math.nan
        return output

    monkeypatch.setattr(OPTForCausalLM, "forward", broken)
    with pytest.raises(InputError, match="the model's outputs are not numbers"):
        go(runnable("opt"), **{asked: TEXT[:100]})


def test_a_model_that_fails_is_told_with_its_layout(runnable: RunnableFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import OPTForCausalLM

    def broken(self: Any, *arguments: Any, **options: Any) -> Any:
        raise ValueError("sizes do not fit")

    made = runnable("opt")
    monkeypatch.setattr(OPTForCausalLM, "forward", broken)
    with pytest.raises(InputError, match="fails when it runs: sizes do not fit") as caught:
        go(made, perplexity_text=TEXT[:100])
    assert caught.value.where == str(made.layout)
