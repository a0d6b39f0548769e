"""The runtime in C computes what the torch engine computes: logits up to rounding, the same greedy tokens."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from safetensors.numpy import load_file, save_file

from neuralink_cli.models.hf_packages import quiet_transformers
from neuralink_cli.sparse_models.loading import load_flash_model
from tests.checkpoints import write_random_placement
from tests.examples.conftest import CHECKED, LIBRARIES, LIBRARY, CRuntime, sources_of
from tests.layouts import relayout
from tests.scaled import MXFP4, mxfp4_gpt_oss, quantised_copy
from tests.tiny_models import build_model

TINY_RELU = Path(__file__).parents[2] / "examples/tiny-relu"
PROMPT = [7, 31, 12, 200, 5, 5, 99, 41, 18, 300, 2, 77]


def ask(program: Path, layout: Path, *requests: str, options: Sequence[object] = ()) -> list[str]:
    """The answers of flash_run, which must succeed."""
    result = subprocess.run(
        [program, "--json", "--dram", "100%", "--threads", "2", *map(str, options), layout],
        input="".join(f"{request}\n" for request in requests),
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert result.returncode == 0, result.stdout[-600:] + result.stderr[-3000:]
    return result.stdout.splitlines()


def logits(program: Path, layout: Path, tokens: Sequence[int], *options: object) -> npt.NDArray[np.float64]:
    answer = ask(program, layout, "logits " + " ".join(map(str, tokens)), options=options)[-1].split()
    assert answer[0] == "logits"
    return np.array(answer[1:], dtype=np.float64)


def generate(program: Path, layout: Path, tokens: Sequence[int], new: int, *options: object) -> list[int]:
    answers = ask(program, layout, f"generate {new} {' '.join(map(str, tokens))}", options=options)
    return [int(line.split()[1]) for line in answers if line.startswith("token ")]


def expected_logits(layout: Path, tokens: Sequence[int]) -> npt.NDArray[np.float64]:
    import torch

    with load_flash_model(layout, dram="100%") as model, torch.inference_mode():
        found: npt.NDArray[np.float64] = model(torch.tensor([list(tokens)])).logits[0, -1].double().numpy()
        return found


def expected_tokens(layout: Path, tokens: Sequence[int], new: int) -> list[int]:
    import torch

    with load_flash_model(layout, dram="100%") as model, torch.inference_mode(), quiet_transformers():
        output = model.generate(
            torch.tensor([list(tokens)]), do_sample=False, min_new_tokens=new, max_new_tokens=new, pad_token_id=0
        )
        return [int(token) for token in output[0, len(tokens) :]]


def lay_out(folder: Path, model: Path, *, threshold: float, **options: Any) -> Path:
    placement = write_random_placement(model, folder / "placement", seed=2, threshold=threshold)
    relayout(model, placement, folder / "layout", resident="gate", **options)
    return folder / "layout"


def build(folder: Path, kind: str, dtype: str = "float32", **options: Any) -> Path:
    """A random model of transformers with a Llama shape, or OPT."""
    import torch
    import transformers as hf

    sizes: dict[str, Any] = {
        "vocab_size": 320, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1,
    }  # fmt: skip
    if kind == "OPT":
        sizes |= {"ffn_dim": 96, "word_embed_proj_dim": 64, "init_std": 0.2}
    else:
        sizes |= {"intermediate_size": 96, "num_key_value_heads": 2, "initializer_range": 0.2, "hidden_act": "relu"}
    with torch.random.fork_rng(devices=[]), quiet_transformers():
        torch.manual_seed(5)
        model = getattr(hf, f"{kind}ForCausalLM")(getattr(hf, f"{kind}Config")(**{**sizes, **options}))
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                torch.nn.init.normal_(parameter, mean=0.0 if name.endswith("bias") else 1.0, std=0.2)
        model.to(getattr(torch, dtype)).save_pretrained(folder)
    return folder


LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 16, "rope_theta": 500.0}  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "opt": ("OPT", {}),
    "opt with a projected embedding": ("OPT", {"word_embed_proj_dim": 32}),
    "opt with norms behind": ("OPT", {"do_layer_norm_before": False}),
    "llama": ("Llama", {}),
    "llama, biases and tied": ("Llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "llama, linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.5, "rope_theta": 300.0}}),
    "llama, dynamic": ("Llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 300.0}}),
    "llama, llama3": ("Llama", {"rope_parameters": LLAMA3}),
    "mistral": ("Mistral", {"head_dim": 24}),
    "mistral, window": ("Mistral", {"sliding_window": 5}),
    "qwen2": ("Qwen2", {}),
    "qwen2, window": ("Qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "silu": ("Llama", {"hidden_act": "silu"}),
    "gelu": ("Llama", {"hidden_act": "gelu"}),
    "gelu, tanh": ("Llama", {"hidden_act": "gelu_pytorch_tanh"}),
    "squared relu": ("Llama", {"hidden_act": "relu2"}),
}


def agree(found: npt.NDArray[np.float64], expected: npt.NDArray[np.float64]) -> None:
    """Up to the rounding of some thousand float32 operations."""
    assert found.shape == expected.shape
    assert abs(found - expected).max() <= 3e-5 * abs(expected).max()
    assert found.argmax() == expected.argmax()


@pytest.mark.parametrize("name", MODELS)
def test_logits_of_every_model(c_runtime: CRuntime, tmp_path: Path, name: str) -> None:
    kind, options = MODELS[name]
    layout = lay_out(tmp_path, build(tmp_path / "model", kind, **options), threshold=0.02)
    agree(logits(c_runtime.checked / "flash_run", layout, PROMPT), expected_logits(layout, PROMPT))


@pytest.mark.parametrize(
    "family", ["prosparse", "turbosparse", "mixtral", "mixtral-fused", "qwen2_moe", "qwen3_moe", "qwen3_moe-fused"]
)
def test_logits_of_variants(c_runtime: CRuntime, tmp_path: Path, family: str) -> None:
    layout = lay_out(tmp_path, build_model(tmp_path / "model", family), threshold=0.01)
    agree(logits(c_runtime.checked / "flash_run", layout, PROMPT), expected_logits(layout, PROMPT))


@pytest.mark.parametrize("same", [True, False])
def test_a_head_that_is_stored_though_it_is_tied(c_runtime: CRuntime, tmp_path: Path, same: bool) -> None:
    """With other values than the embedding it is not tied, as for transformers."""
    model = build(tmp_path / "model", "Llama", tie_word_embeddings=True)
    tensors = load_file(model / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    tensors["lm_head.weight"] = embedding if same else np.ascontiguousarray(embedding[::-1])
    save_file(tensors, model / "model.safetensors")
    layout = lay_out(tmp_path, model, threshold=0.02)
    agree(logits(c_runtime.checked / "flash_run", layout, PROMPT), expected_logits(layout, PROMPT))


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        ("float16", {}),
        ("bfloat16", {}),
        ("float32", {"weights": "q8_0"}),
        ("float16", {"weights": "q4_0", "dense_weights": "q8_0"}),
        ("bfloat16", {"weights": "gate=q8_0,up=iq4_nl,down=source", "dense_weights": "source"}),
    ],
)
def test_logits_of_weight_formats(c_runtime: CRuntime, tmp_path: Path, dtype: str, options: dict[str, Any]) -> None:
    model = build(tmp_path / "model", "Llama", dtype, hidden_act="silu")
    layout = lay_out(tmp_path, model, threshold=0.02, **options)
    agree(logits(c_runtime.checked / "flash_run", layout, PROMPT), expected_logits(layout, PROMPT))


def test_mxfp4_rows(c_runtime: CRuntime, tmp_path: Path) -> None:
    values = quantised_copy(TINY_RELU, tmp_path / "model", MXFP4)
    layout = lay_out(tmp_path, tmp_path / "model", threshold=0.0, weights="up=mxfp4,down=q4_0")
    agree(logits(c_runtime.checked / "flash_run", layout, PROMPT), expected_logits(layout, PROMPT))
    command = [str(c_runtime.checked / "flash_read"), "--values", str(layout), "layers.1", "7"]
    line = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0].split()
    assert line[:2] + line[4:6] == ["neuron", "7", "up", "mxfp4"]
    up = next(value for name, value in values.items() if name.endswith("layers.1.fc1.weight"))
    assert np.array_equal(np.array(line[6:], dtype=np.float32), up[7])


def test_of_gpt_oss_the_attention_is_missing(c_runtime: CRuntime, tmp_path: Path) -> None:
    _, model, _ = mxfp4_gpt_oss(tmp_path)
    layout = lay_out(tmp_path, model, threshold=0.01, weights="gate=mxfp4,up=mxfp4,down=q4_0")
    command = [str(c_runtime.checked / "flash_read"), "--values", str(layout), "layers.0.experts.1", "5"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert [line.split()[4:6] for line in result.stdout.splitlines()] == [
        ["gate", "mxfp4"], ["up", "mxfp4"], ["down", "q4_0"],
    ]  # fmt: skip
    refused = subprocess.run([c_runtime.checked / "flash_run", layout], capture_output=True, text=True, check=False)
    assert 'models of type "gpt_oss" are not supported: the attention of opt, llama' in refused.stderr


def test_activations_of_8_bits(c_runtime: CRuntime, tmp_path: Path) -> None:
    """Close to exact, and the same with all kernels up to their rounding."""
    model = build(tmp_path / "model", "Llama", hidden_act="silu", hidden_size=96)
    weights = {"weights": "gate=q8_0,up=iq4_nl,down=q4_0", "dense_weights": "q4_0"}
    layout = lay_out(tmp_path, model, threshold=0.02, **weights)
    program, rounds = c_runtime.checked / "flash_run", ("--activations", "int8", "--batch", 1)
    exact, near = logits(program, layout, PROMPT, "--batch", 1), logits(program, layout, PROMPT, *rounds)
    assert 1e-3 * abs(exact).max() < abs(exact - near).max() < 0.1 * abs(exact).max()
    # A last bit may round an activation to the next code.
    others = logits(program, layout, PROMPT, *rounds, "--kernels", "scalar", "--threads", 1)
    assert abs(others - near).max() < 0.02 * abs(exact).max()
    plans = [ask(program, layout, options=of) for of in ((), rounds[:2])]
    assert ['"activations": "f32"' in plans[0][1], '"activations": "int8"' in plans[1][1]] == [True, True]


@pytest.fixture(scope="module")
def tiny_relu(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lay_out(tmp_path_factory.mktemp("tiny_relu"), TINY_RELU, threshold=0.0)


@pytest.fixture(scope="module")
def tiny_relu_tokens(tiny_relu: Path) -> list[int]:
    return expected_tokens(tiny_relu, PROMPT, 60)


@pytest.mark.parametrize(
    "options",
    [
        ("--dram", "20%"),
        ("--dram", "8MB", "--cache", "s3fifo", "--queue-depth", 3),
        ("--dram", "0%", "--threads", 1, "--batch", 5),
        ("--dram", "10%", "--reads", "threads", "--kernels", "scalar"),
        ("--dram", "10%", "--no-direct", "--map-dense", "--batch", 1, "--threads", 3),
    ],
)
def test_greedy_tokens_are_those_of_the_torch_engine(
    c_runtime: CRuntime, tiny_relu: Path, tiny_relu_tokens: list[int], options: tuple[object, ...]
) -> None:
    assert generate(c_runtime.fast / "flash_run", tiny_relu, PROMPT, 60, *options) == tiny_relu_tokens


def test_a_sequence_goes_on(c_runtime: CRuntime, tiny_relu: Path, tiny_relu_tokens: list[int]) -> None:
    answers = ask(
        c_runtime.checked / "flash_run",
        tiny_relu,
        f"generate 10 {' '.join(map(str, PROMPT))}",
        f"continue 5 {tiny_relu_tokens[9]}",
        "generate 1 5",
        f"generate 3 {' '.join(map(str, PROMPT))}",
    )
    tokens = [int(line.split()[1]) for line in answers if line.startswith("token ")]
    assert tokens[:15] == tiny_relu_tokens[:15]
    assert tokens[-3:] == tiny_relu_tokens[:3]
    assert sum(line.startswith("figures ") for line in answers) == 4


@pytest.mark.parametrize("batch", [1, 3, 64])
def test_perplexity_is_that_of_the_logits(c_runtime: CRuntime, tiny_relu: Path, batch: int) -> None:
    tokens = PROMPT[:5]
    prefixes = (" ".join(map(str, tokens[: k + 1])) for k in range(4))
    requests = [f"logits {prefix}" for prefix in prefixes] + ["perplexity " + " ".join(map(str, tokens))]
    answers = ask(c_runtime.checked / "flash_run", tiny_relu, *requests, options=("--batch", batch))
    values = np.array([line.split()[1:] for line in answers if line.startswith("logits ")], dtype=np.float64)
    (found,) = (line.split()[1:] for line in answers if line.startswith("perplexity "))
    surprises = np.log(np.exp(values).sum(axis=1)) - values[range(4), tokens[1:]]
    assert float(found[0]) == pytest.approx(surprises.mean(), rel=1e-5)
    assert found[1] == "4"


def test_it_stops_at_a_token(c_runtime: CRuntime, tiny_relu: Path, tiny_relu_tokens: list[int]) -> None:
    end = tiny_relu_tokens.index(tiny_relu_tokens[7])
    found = generate(c_runtime.checked / "flash_run", tiny_relu, PROMPT, 30, "--stop", f"9999,{tiny_relu_tokens[7]}")
    assert found == tiny_relu_tokens[: end + 1]


def test_sampling_depends_on_the_seed_alone(c_runtime: CRuntime, tiny_relu: Path, tiny_relu_tokens: list[int]) -> None:
    program = c_runtime.checked / "flash_run"

    def draw(*options: object) -> list[int]:
        return generate(program, tiny_relu, PROMPT, 12, *options)

    warm = draw("--temperature", 1.5, "--seed", 4)
    assert warm == draw("--temperature", 1.5, "--seed", 4)
    assert warm != draw("--temperature", 1.5, "--seed", 5)
    assert (
        draw("--temperature", 1.5, "--top-k", 1) == draw("--temperature", 9, "--top-p", 1e-6) == tiny_relu_tokens[:12]
    )


def test_figures_add_up(c_runtime: CRuntime, tiny_relu: Path) -> None:
    answers = ask(c_runtime.fast / "flash_run", tiny_relu, "generate 9 1 2 3", options=("--dram", "10%"))
    figures = json.loads(next(line for line in answers if line.startswith("figures ")).partition(" ")[2])
    memory = json.loads(next(line for line in answers if line.startswith("memory ")).partition(" ")[2])
    assert figures["prompt"]["tokens"] == 3
    assert figures["tokens"]["tokens"] == 8
    for phase in (figures["prompt"], figures["tokens"]):
        missing = phase["looked_up"] - phase["hits"]
        assert phase["bytes_useful"] == missing * 256 <= phase["bytes_read"]
        assert 0 < phase["reads"] <= missing
        assert 0 <= phase["io_seconds"] <= phase["seconds"]
    parts = ("programs", "dense", "resident", "sequence", "working", "tables", "system", "cache")
    assert memory["planned_bytes"] == sum(memory[f"{part}_bytes"] for part in parts)
    assert memory["flash_bytes"] == 4 * 768 * 256


CROSS, EMULATOR = shutil.which("aarch64-linux-gnu-gcc"), shutil.which("qemu-aarch64")


@pytest.mark.skipif(
    CROSS is None or EMULATOR is None, reason="no aarch64 compiler, or no qemu-user to run what it makes"
)
def test_it_computes_the_same_on_arm(
    c_runtime: CRuntime, tmp_path: Path, tiny_relu: Path, tiny_relu_tokens: list[int]
) -> None:
    program = tmp_path / "flash_run_arm"
    sources = map(str, (*LIBRARY, *sources_of("flash_run")))
    command = [str(CROSS), *CHECKED, "-O1", "-static", "-o", str(program), *sources, *LIBRARIES]
    made = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (made.returncode, made.stderr) == (0, "")
    emulated = tmp_path / "flash_run"
    emulated.write_text(f'#!/bin/sh\nexec {EMULATOR} {program} "$@"\n')
    emulated.chmod(0o755)
    # The emulator passes direct reads and io_uring on in parts only.
    options = ("--no-direct", "--reads", "threads")
    assert generate(emulated, tiny_relu, PROMPT, 8, *options) == tiny_relu_tokens[:8]
    weights = {"weights": "gate=q8_0,up=iq4_nl,down=q4_0", "dense_weights": "source"}
    layout = lay_out(tmp_path, build(tmp_path / "model", "Qwen3", "bfloat16", head_dim=16), threshold=0.02, **weights)
    agree(logits(emulated, layout, PROMPT, *options), logits(c_runtime.checked / "flash_run", layout, PROMPT))
    assert '"kernels": "neon"' in "".join(ask(emulated, layout, options=options))
