from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import nn

from neuralink_cli.architectures.architecture import find_architecture
from neuralink_cli.architectures.blocks import BlockPart, FFNBlock
from neuralink_cli.architectures.find_blocks import find_blocks
from neuralink_cli.calibration.batches import encoder_decoder_batch, text_batch
from neuralink_cli.checkpoint.checkpoint import Checkpoint
from neuralink_cli.errors import UnsupportedError
from neuralink_cli.models.find_modules import find_experts, find_module
from neuralink_cli.models.loading import load_model, max_positions
from neuralink_cli.profiling.firing import FiringRule, firing_rule
from neuralink_cli.profiling.hooked_blocks import hooked_blocks
from neuralink_cli.profiling.recorder import HookedBlock, HookedModel
from tests.conftest import ModelFactory
from tests.families import FAMILY
from tests.profile_requests import ProfileRequest, profile
from tests.tiny_models import PLAIN


class Toy(nn.Module):  # type: ignore[misc]  # the types of torch are not read
    """One FFN that runs `times` times on `fed` of its tokens, and does with its output what `activate` says."""

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(
        self, times: int = 1, fed: slice = slice(None), flat: bool = False, activate: str | None = None
    ) -> None:
        super().__init__()
        self.embed, self.up, self.act = nn.Embedding(10, 4), nn.Linear(4, 5), nn.ReLU()
        self.times, self.fed, self.flat, self.activate = times, fed, flat, activate

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> None:
        x = self.embed(input_ids)[:, self.fed]
        for _ in range(self.times):
            output = self.up(x.reshape(-1, 4) if self.flat else x)
            if self.activate == "module":
                self.act(output)
            elif self.activate == "of something else":
                self.act(-output)


def seen_by_hooks(
    toy: Toy,
    ids: npt.NDArray[np.int64],
    mask: npt.NDArray[np.bool_],
    activation: nn.Module | None = None,
    rule: FiringRule | None = None,
) -> list[tuple[int, torch.Tensor]]:
    seen: list[tuple[int, torch.Tensor]] = []
    rule = rule or firing_rule("layers.0", "relu", "gate")
    with HookedModel(toy, [HookedBlock(toy.up, False, 5, rule, activation=activation)]) as hooked:
        hooked.run(text_batch(ids, mask), lambda index, values, _tokens: seen.append((index, values)))
    assert not toy.up._forward_hooks
    assert not toy.act._forward_hooks
    return seen


@pytest.mark.parametrize("activate", [None, "module", "of something else"])
@pytest.mark.parametrize("flat", [False, True])
def test_tokens_come_in_the_order_of_the_sequences(flat: bool, activate: str | None) -> None:
    toy = Toy(flat=flat, activate=activate)
    ids = np.array([[1, 2, 3], [4, 5, 0]])
    mask = np.array([[True, True, True], [True, True, False]])
    ((index, values),) = seen_by_hooks(toy, ids, mask, None if activate is None else toy.act)
    assert index == 0
    expected = toy.up(toy.embed(torch.tensor([1, 2, 3, 4, 5]))).relu()
    torch.testing.assert_close(values, expected)


def test_what_the_model_activates_is_not_activated_again() -> None:
    toy = Toy(activate="module")
    ids = np.array([[1, 2, 3]])
    ((_, values),) = seen_by_hooks(toy, ids, np.ones_like(ids, dtype=bool), toy.act, FiringRule("b", fail, False))
    assert torch.equal(values, toy.up(toy.embed(torch.from_numpy(ids)))[0].relu())


def fail(_values: torch.Tensor) -> NoReturn:
    raise AssertionError


# Their activations are functions, or modules of another kind than what goes by the name in their configs.
WITHOUT_ACTIVATION = {"bloom", "mpt", "lfm2"}


@pytest.mark.parametrize("family", [*PLAIN, "phi3"])
def test_what_the_model_activates_is_the_signal(model: ModelFactory, family: str) -> None:
    directory, known = model(family), FAMILY[family]
    architecture = find_architecture(known.renamed or known.model_type, directory)
    with Checkpoint(directory) as checkpoint:
        blocks = find_blocks(checkpoint, architecture)
        shapes = {name: place.entry.shape for name, place in checkpoint.tensors.items()}
    loaded = load_model(directory, architecture, device="cpu")
    hooked = hooked_blocks(loaded, blocks, shapes, architecture, "gate")
    modules = {id(block.activation) for block in hooked if block.activation is not None}
    assert len(modules) == (0 if family in WITHOUT_ACTIVATION else len(hooked))
    ids = np.arange(3, 15).reshape(2, 6)
    mask = np.array([[True] * 6, [True] * 4 + [False] * 2])
    to_batch = encoder_decoder_batch(0) if known.task == "seq2seq" else text_batch

    def signals(blocks: list[HookedBlock]) -> list[tuple[int, torch.Tensor]]:
        seen: list[tuple[int, torch.Tensor]] = []
        with HookedModel(loaded, blocks) as running:
            running.run(to_batch(ids, mask), lambda index, signal, _tokens: seen.append((index, signal)))
        return seen

    by_rule = signals([replace(block, activation=None) for block in hooked])
    # Where the model's own activation is found, none is computed a second time.
    by_model = signals(
        [
            block if block.activation is None else replace(block, rule=FiringRule(block.rule.block, fail, False))
            for block in hooked
        ]
    )
    for (index, computed), (same, found) in zip(by_rule, by_model, strict=True):
        assert index == same
        assert found.shape == (10, hooked[index].neurons)
        torch.testing.assert_close(found, computed)


@pytest.mark.parametrize(
    ("toy", "message"),
    [
        (Toy(times=2), "does not run once on all tokens"),
        (Toy(fed=slice(1, None)), "does not run once on all tokens"),
        (Toy(times=0), "did not run block 'layers.0'"),
    ],
)
def test_a_block_that_does_not_run_once_per_token(toy: Toy, message: str) -> None:
    ids = np.array([[1, 2, 3]])
    with pytest.raises(UnsupportedError, match=message):
        seen_by_hooks(toy, ids, np.ones_like(ids, dtype=bool))


@pytest.mark.parametrize(
    ("family", "with_head"),
    [
        (name, with_head)
        for name, family in FAMILY.items()
        for with_head in (False, True)
        if not (with_head and family.task.endswith("encoder"))
    ],
)
def test_modules_are_found_whatever_the_prefix(model: ModelFactory, family: str, with_head: bool) -> None:
    directory, known = model(family), FAMILY[family]
    architecture = find_architecture(known.renamed or known.model_type, directory)
    with Checkpoint(directory) as checkpoint:
        blocks = find_blocks(checkpoint, architecture)
        loaded = load_model(directory, architecture, with_head=with_head, device="cpu")
        assert max_positions(loaded) == known.positions
        assert {block.id: block.neurons for block in blocks} == known.neurons
        for block in blocks:
            for part in block.parts:
                stored = matrix_of(checkpoint, block, part)
                if block.expert is not None:
                    experts = find_experts(loaded, block.expert, architecture)
                    assert torch.equal(stored, expert_matrix(experts, block, part.role))
                    continue
                entry = checkpoint.place(part.weight).entry
                weight = find_module(loaded, part, entry.shape, architecture).weight
                rows = weight if part.neuron_axis == 0 else weight.T
                first = part.start // part.pitch if part.neuron_axis == 0 else part.start
                assert torch.equal(rows[first : first + block.neurons], stored)


def matrix_of(checkpoint: Checkpoint, block: FFNBlock, part: BlockPart) -> torch.Tensor:
    """The weights of a part, `[neurons, hidden]`, from the bytes of the checkpoint alone."""
    data = checkpoint.place(part.weight).file.read(part.weight).view(np.float32)
    lines, width = (block.neurons, block.hidden) if part.neuron_axis == 0 else (block.hidden, block.neurons)
    first, every = part.start + part.lane, part.lanes
    matrix = np.stack([data[first + k * part.pitch :][: width * every : every] for k in range(lines)])
    return torch.from_numpy(matrix if part.neuron_axis == 0 else matrix.T.copy())


def expert_matrix(experts: Any, block: FFNBlock, role: str) -> torch.Tensor:
    """The same from where transformers keeps all experts of a layer."""
    assert block.expert is not None
    if getattr(experts, "is_transposed", False):
        if role == "down":
            return experts.down_proj[block.expert.index]
        both = experts.gate_up_proj[block.expert.index].T
        if not experts.is_concatenated:
            return both[0::2] if role == "gate" else both[1::2]
        return both[: block.neurons] if role == "gate" else both[block.neurons :]
    if role == "down":
        return experts.down_proj[block.expert.index].T
    if len(block.parts) == 2:
        return experts.up_proj[block.expert.index]
    both = experts.gate_up_proj[block.expert.index]
    return both[: block.neurons] if role == "gate" else both[block.neurons :]


def test_a_module_that_is_not_there(model: ModelFactory) -> None:
    directory = model("opt")
    architecture = find_architecture("opt", directory)
    loaded = load_model(directory, architecture, device="cpu")
    part = BlockPart("up", "model.decoder.layers.7.fc1.weight", 0, "F32", None)
    with pytest.raises(UnsupportedError, match=r"OPTModel .* no module 'model\.decoder\.layers\.7\.fc1'"):
        find_module(loaded, part, (52, 16), architecture)


def test_ffns_that_run_in_chunks_are_refused(model: ModelFactory, text_file: Path, tmp_path: Path) -> None:
    directory = tmp_path / "chunked"
    directory.mkdir()
    for path in model("bert").iterdir():
        (directory / path.name).write_bytes(path.read_bytes())
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"chunk_size_feed_forward": 1}))
    request = ProfileRequest(directory, tmp_path / "t", (str(text_file),), active_ratio=0.3)
    with pytest.raises(UnsupportedError, match="does not run once on all tokens"):
        profile(request)
