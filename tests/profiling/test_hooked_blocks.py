"""Where the signal of a block is seen if its projection is but a part of what a module computes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from neuralink_cli.architectures.architecture import find_architecture
from neuralink_cli.architectures.find_blocks import find_blocks
from neuralink_cli.calibration.batches import text_batch
from neuralink_cli.checkpoint.checkpoint import Checkpoint
from neuralink_cli.models.loading import load_model
from neuralink_cli.profiling.hooked_blocks import hooked_blocks
from neuralink_cli.profiling.recorder import HookedModel
from tests.conftest import ModelFactory


@pytest.mark.parametrize(
    ("family", "module"), [("phi3", "layers.{}.mlp.gate_up_proj"), ("gpt2", "h.{}.mlp.c_fc"), ("opt", "layers.{}.fc1")]
)
@pytest.mark.parametrize("share", [0, 1, 2])
def test_the_signal_is_that_of_the_blocks_own_neurons(
    model: ModelFactory, family: str, module: str, share: int
) -> None:
    """Of a third of the module's outputs: rows of its weights, or columns, as the family has them."""
    directory = model(family)
    architecture = find_architecture(family, directory)
    with Checkpoint(directory) as checkpoint:
        blocks = find_blocks(checkpoint, architecture)
        shapes = {name: place.entry.shape for name, place in checkpoint.tensors.items()}
    loaded = load_model(directory, architecture, device="cpu")
    third = min(block.neurons for block in blocks) // 3
    thirds = []
    for block in blocks:
        part = block.firing_part
        start = share * third * (block.hidden if part.neuron_axis == 0 else 1)
        parts = tuple(replace(part, start=start) if part is other else other for other in block.parts)
        thirds.append(replace(block, neurons=third, parts=parts))
    outputs: dict[int, torch.Tensor] = {}
    signals: dict[int, torch.Tensor] = {}
    for name, found in loaded.named_modules():
        for index in range(len(blocks)):
            if name.endswith(module.format(index)):
                found.register_forward_hook(lambda _m, _i, output, index=index: outputs.__setitem__(index, output))
    hooked = hooked_blocks(loaded, thirds, shapes, architecture, "gate")
    ids = np.arange(3, 15).reshape(2, 6)
    with HookedModel(loaded, [replace(block, activation=None) for block in hooked]) as running:
        running.run(
            text_batch(ids, np.ones_like(ids, dtype=bool)), lambda index, *seen: signals.update({index: seen[0]})
        )
    assert signals.keys() == outputs.keys() == set(range(len(blocks)))
    for index, found in enumerate(hooked):
        seen = outputs[index].reshape(12, -1)[:, share * third : (share + 1) * third]
        torch.testing.assert_close(signals[index], found.rule.signal(seen))
