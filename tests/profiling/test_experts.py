"""What is recorded of experts, against routing and firing worked out from what goes into their layer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from neuralink_cli.activations.merge import merge_traces
from neuralink_cli.activations.trace import Trace
from neuralink_cli.architectures.architecture import find_architecture
from neuralink_cli.architectures.find_blocks import find_blocks
from neuralink_cli.checkpoint.checkpoint import Checkpoint
from neuralink_cli.errors import InputError
from neuralink_cli.models.find_modules import find_experts
from neuralink_cli.models.hf_packages import quiet_transformers
from neuralink_cli.models.loading import load_model
from neuralink_cli.profiling.experts import ExpertRun, experts_seen
from neuralink_cli.profiling.hooked_blocks import hooked_blocks
from neuralink_cli.profiling.recorder import HookedModel
from tests.conftest import ModelFactory
from tests.families import EXPERTS, FAMILY
from tests.profile_requests import ProfileRequest, profile
from tests.tiny_models import TEXT

MIXTURES = [
    "mixtral", "mixtral-fused", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v2", "deepseek_v3", "granitemoe",
    "gpt_oss",
]  # fmt: skip


def routed_values(
    directory: Path, family: str, ids: torch.Tensor, signal: str
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """By block id: the tokens routed to each expert, ascending, and their signal; by transformers' own experts."""
    architecture = find_architecture(FAMILY[family].model_type, directory)
    with Checkpoint(directory) as checkpoint:
        blocks = [(block, block.expert) for block in find_blocks(checkpoint, architecture) if block.expert is not None]
    model = load_model(directory, architecture, device="cpu")
    seen: dict[Any, tuple[torch.Tensor, torch.Tensor]] = {}
    modules = {block.id: find_experts(model, place, architecture) for block, place in blocks}
    for module in set(modules.values()):
        module.register_forward_pre_hook(lambda m, inputs: seen.__setitem__(m, inputs[:2]))
    with torch.no_grad():
        model(input_ids=ids)
    found = {}
    for block, place in blocks:
        module = modules[block.id]
        hidden, chosen = seen[module]
        tokens = (chosen == place.index).any(dim=1).nonzero().squeeze(1)
        if family == "gpt_oss":
            both = hidden[tokens] @ module.gate_up_proj[place.index] + module.gate_up_proj_bias[place.index]
            gate, up = both[:, ::2].clamp(max=7), both[:, 1::2].clamp(-7, 7) + 1
            gate = gate * torch.sigmoid(1.702 * gate)
        else:
            both = hidden[tokens] @ module.gate_up_proj[place.index].T
            gate, up = torch.nn.functional.silu(both[:, : block.neurons]), both[:, block.neurons :]
        found[block.id] = tokens, gate if signal == "gate" else gate * up
    return found


@pytest.mark.parametrize("signal", ["gate", "intermediate"])
@pytest.mark.parametrize("family", MIXTURES)
def test_experts_are_recorded_on_the_tokens_routed_to_them(
    model: ModelFactory, family: str, signal: str, text_file: Path, tmp_path: Path
) -> None:
    directory = model(family)
    request = ProfileRequest(
        directory, tmp_path / "t", (str(text_file),), signal, 0.3, batch_size=1, max_seq_length=40, max_tokens=40
    )
    summary = profile(request)
    with Trace(tmp_path / "t") as trace, quiet_transformers():
        from transformers import AutoTokenizer

        ids = AutoTokenizer.from_pretrained(directory)(TEXT, return_tensors="pt")["input_ids"][:, :40]
        expected = routed_values(directory, family, ids, signal)
        assert {block.id for block in trace.info.blocks if block.routed is not None} == expected.keys()
        per_layer: dict[str, list[int]] = {}
        for block, said in zip(trace.info.blocks, summary.blocks, strict=True):
            if block.routed is None:
                continue
            tokens, values = expected[block.id]
            assert trace.tokens_of(block).tolist() == tokens.tolist()
            assert block.routed == said.tokens == tokens.numel()
            bits = np.unpackbits(trace.fired(block), axis=1, bitorder="little")[:, : block.neurons].astype(bool)
            decided = (values.abs() - block.threshold).abs() > 1e-5
            assert decided.float().mean() > 0.99 or not tokens.numel()
            fired = (values.abs() > block.threshold).numpy()
            assert np.array_equal(bits[decided.numpy()], fired[decided.numpy()])
            everywhere = np.unpackbits(trace.fired_by_token(block), axis=1, bitorder="little")[:, : block.neurons]
            assert everywhere.sum() == bits.sum()
            assert np.array_equal(everywhere[tokens.numpy()].astype(bool), bits)
            per_layer.setdefault(block.id.partition(".experts")[0], []).append(block.routed)
        for counts in per_layer.values():
            assert len(counts) == EXPERTS
            assert sum(counts) == 40 * 2


@pytest.mark.parametrize("family", ["mixtral", "granitemoe"])
def test_the_model_computes_the_same_while_its_experts_are_seen(model: ModelFactory, family: str) -> None:
    directory = model(family)
    architecture = find_architecture(FAMILY[family].model_type, directory)
    with Checkpoint(directory) as checkpoint:
        blocks = find_blocks(checkpoint, architecture)
        shapes = {name: place.entry.shape for name, place in checkpoint.tensors.items()}
    loaded = load_model(directory, architecture, device="cpu")
    ids = torch.arange(3, 43)[None]
    with torch.no_grad():
        before = loaded(input_ids=ids).last_hidden_state
        implementation = loaded.config._experts_implementation
        with HookedModel(loaded, hooked_blocks(loaded, blocks, shapes, architecture, "gate")):
            during = loaded(input_ids=ids).last_hidden_state
        assert loaded.config._experts_implementation == implementation
        after = loaded(input_ids=ids).last_hidden_state
    torch.testing.assert_close(during, before, rtol=1e-5, atol=1e-5)
    assert torch.equal(before, after)


def test_padding_is_routed_nowhere(model: ModelFactory, tmp_path: Path) -> None:
    """Rows of different lengths in one batch give the same bits as each alone."""
    rows = tmp_path / "rows.csv"
    rows.write_text("text\n" + "\n".join(["one", "a longer row of words", "and", "seven more words in this last row"]))
    request = ProfileRequest(
        model("mixtral"), tmp_path / "together", (str(rows),), active_ratio=0.3, packing=False, batch_size=4
    )
    profile(request)
    profile(
        replace(
            request, output=tmp_path / "alone", batch_size=1, active_ratio=None, thresholds_from=tmp_path / "together"
        )
    )
    with Trace(tmp_path / "together") as together, Trace(tmp_path / "alone") as alone:
        for a, b in zip(together.info.blocks, alone.info.blocks, strict=True):
            assert together.tokens_of(a).tolist() == alone.tokens_of(b).tolist()
            differing = together.fired(a) != alone.fired(b)
            assert differing.mean() < 0.01


def test_parts_of_a_run_merge_into_the_whole(model: ModelFactory, text_file: Path, tmp_path: Path) -> None:
    request = ProfileRequest(
        model("qwen2_moe"), tmp_path / "whole", (str(text_file),), active_ratio=0.3, batch_size=1, max_seq_length=64
    )
    profile(request)
    parts = []
    for k in (1, 2, 3):
        parts.append(tmp_path / f"part{k}")
        profile(replace(request, output=parts[-1], part=(k, 3)))
    merge_traces(parts, tmp_path / "merged")
    assert (tmp_path / "merged").read_bytes() == (tmp_path / "whole").read_bytes()


def test_a_range_of_tokens_holds_those_routed_in_it(model: ModelFactory, text_file: Path, tmp_path: Path) -> None:
    profile(ProfileRequest(model("mixtral"), tmp_path / "t", (str(text_file),), active_ratio=0.3))
    with Trace(tmp_path / "t") as trace:
        block = trace.info.blocks[1]
        tokens, rows = trace.tokens_of(block), trace.fired(block)
        for start, stop in ((0, 0), (0, 7), (5, 60), (trace.info.tokens - 1, trace.info.tokens)):
            inside = (tokens >= start) & (tokens < stop)
            assert np.array_equal(trace.tokens_of(block, start, stop), tokens[inside])
            assert np.array_equal(trace.fired(block, start, stop), rows[inside])
            assert trace.fired_by_token(block, start, stop).shape == (stop - start, block.row_bytes)


def test_tokens_out_of_order_are_refused(model: ModelFactory, text_file: Path, tmp_path: Path) -> None:
    profile(ProfileRequest(model("mixtral"), tmp_path / "t", (str(text_file),), active_ratio=0.3))
    with Trace(tmp_path / "t") as trace:
        block = trace.info.blocks[0]
        place = trace.header.data_start + trace.entry(f"{block.id}.tokens").start
    content = bytearray((tmp_path / "t").read_bytes())
    content[place : place + 4] = (2**31).to_bytes(4, "little")
    (tmp_path / "t").write_bytes(content)
    with pytest.raises(InputError, match=r"layers.0.experts.0.tokens are not ascending"):
        Trace(tmp_path / "t")


def test_experts_of_layers_without_blocks_run_as_ever(model: ModelFactory) -> None:
    """All experts modules of a model share its config, and so the code that runs them."""
    directory = model("mixtral")
    architecture = find_architecture("mixtral", directory)
    with Checkpoint(directory) as checkpoint:
        first = next(block.expert for block in find_blocks(checkpoint, architecture) if block.expert is not None)
    loaded = load_model(directory, architecture, device="cpu")
    ids = torch.arange(3, 19)[None]
    seen: list[ExpertRun] = []
    with torch.no_grad():
        expected = loaded(input_ids=ids).last_hidden_state
        with experts_seen([(find_experts(loaded, first, architecture), seen.append)]):
            found = loaded(input_ids=ids).last_hidden_state
    assert sum(run.tokens.numel() for run in seen) == 2 * ids.numel()
    torch.testing.assert_close(found, expected)
