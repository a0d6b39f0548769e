"""What fires by rounded gate rows: which are found, how many are read, and what a lower threshold gains.

python benchmarks/gate_formats.py examples/tiny-relu --calibration examples/text/calibration.txt \
    --text examples/text/heldout.txt
python benchmarks/gate_formats.py MODEL --calibration wiki.txt --text held-out.txt --active-ratio 0.2

Only the rows that decide firing are rounded, in memory; they also give the values of the neurons that fire, since a
layout holds no others. `found` is the share of the neurons that fire by the source's rows that fire by the rounded ones
on the same hidden states, `read` how many fire by the rounded rows over those. Then the whole model runs with these
rows and without the neurons that do not fire; KL is the mean divergence of its predictions from those of the dense
source; `firing alone` is the same with values given by the source's rows. All figures are on text that set no
threshold.

With calibrated thresholds, each format is tried again with thresholds so low that a share of the neurons that fire is
found on the calibration text. For comparison, the source's own rows with thresholds that read as many.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from neuralink_cli.architectures.choice import choose_architecture
from neuralink_cli.architectures.find_blocks import find_blocks
from neuralink_cli.calibration.readers import read_token_sequences
from neuralink_cli.checkpoint.checkpoint import Checkpoint
from neuralink_cli.checkpoint.model_description import describe
from neuralink_cli.files.text_files import read_text
from neuralink_cli.models.find_modules import find_module
from neuralink_cli.models.hf_packages import quiet_transformers
from neuralink_cli.models.loading import load_model
from neuralink_cli.models.offload import MemoryLimit
from neuralink_cli.profiling.firing import firing_rule
from neuralink_cli.weight_formats.formats import BLOCK_FORMATS, NEAREST, SEARCH
from neuralink_cli.weight_formats.quantising import dequantise, quantise_rows

KINDS = (("q4_0", NEAREST), ("q4_0", SEARCH), ("iq4_nl", SEARCH), ("q8_0", NEAREST), ("q8_0", SEARCH))
LENGTH = 128

Weights = list[torch.Tensor]


@dataclass(frozen=True)
class Block:
    """The modules of a block whose firing can be decided here, and its rule."""

    firing: Any
    down: Any
    gated: bool
    rule: Any

    def values(self, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """What decides firing, `[tokens, neurons]`, of hidden states `[tokens, hidden]`."""
        found: torch.Tensor = torch.nn.functional.linear(hidden, weight, self.firing.bias)
        return found

    def signal(self, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        signal: torch.Tensor = self.rule.signal(self.values(hidden, weight)).abs()
        return signal


def blocks_of(model: Any, directory: Path, architecture: Any) -> list[Block]:
    found = []
    with Checkpoint(directory) as checkpoint:
        for block in find_blocks(checkpoint, architecture):
            shapes = {part.role: checkpoint.place(part.weight).entry.shape for part in block.parts}
            modules = {part.role: find_module(model, part, shapes[part.role], architecture) for part in block.parts}
            firing = modules[block.firing_part.role]
            if block.expert is not None or tuple(firing.weight.shape) != (block.neurons, block.hidden):
                raise SystemExit(f"{block.id}: the rows that decide firing are not a module of their own")
            rule = firing_rule(block.id, block.activation, "gate")
            found.append(Block(firing, modules["down"], "gate" in modules, rule))
    return found


def rounded(weight: torch.Tensor, name: str, rounding: str) -> torch.Tensor:
    kind, rows = BLOCK_FORMATS[name], np.ascontiguousarray(weight.numpy())
    made = np.zeros((len(rows), kind.row_bytes(rows.shape[1])), np.uint8)
    bad = quantise_rows(rows.view(np.uint8).reshape(-1), "F32", rows.shape[1], kind, made, rounding=rounding)
    assert bad is None
    return torch.from_numpy(dequantise(made, kind))


def hidden_states(model: Any, blocks: Sequence[Block], sequences: list[Any]) -> list[torch.Tensor]:
    """What goes into every block of the source, `[tokens, hidden]`."""
    seen: list[list[torch.Tensor]] = [[] for _ in blocks]
    with ExitStack() as hooks:
        for block, states in zip(blocks, seen, strict=True):

            def hook(_module: Any, inputs: tuple[Any, ...], states: list[torch.Tensor] = states) -> None:
                states.append(inputs[0].reshape(-1, inputs[0].shape[-1]).clone())

            hooks.callback(block.firing.register_forward_pre_hook(hook).remove)
        for ids in sequences:
            model(input_ids=torch.from_numpy(ids.astype(np.int64))[None], use_cache=False)
    return [torch.cat(states) for states in seen]


def log_probabilities(model: Any, sequences: list[Any]) -> torch.Tensor:
    inputs = (torch.from_numpy(ids.astype(np.int64))[None] for ids in sequences)
    return torch.cat([model(input_ids=ids, use_cache=False).logits[0, :-1].log_softmax(-1) for ids in inputs])


def sparse_probabilities(
    model: Any,
    blocks: Sequence[Block],
    deciding: Weights,
    giving: Weights,
    thresholds: list[float],
    sequences: list[Any],
) -> torch.Tensor:
    """Predictions of the model without the neurons that do not fire by some rows, and values given by others."""
    originals = [block.firing.weight.data for block in blocks]
    with ExitStack() as hooks:
        for block, rows, values, threshold in zip(blocks, deciding, giving, thresholds, strict=True):
            block.firing.weight.data = values
            fires: list[torch.Tensor] = []

            def remember(
                _module: Any,
                inputs: tuple[Any, ...],
                _output: Any,
                block: Block = block,
                rows: torch.Tensor = rows,
                least: float = threshold,
                fires: list[torch.Tensor] = fires,
            ) -> None:
                fires[:] = [block.rule.fires(block.values(inputs[0], rows), least)]

            def keep(_module: Any, inputs: tuple[Any, ...], fires: list[torch.Tensor] = fires) -> tuple[Any, ...]:
                return (inputs[0] * fires[0].reshape(inputs[0].shape), *inputs[1:])

            hooks.callback(block.firing.register_forward_hook(remember).remove)
            hooks.callback(block.down.register_forward_pre_hook(keep).remove)
        found = log_probabilities(model, sequences)
    for block, weight in zip(blocks, originals, strict=True):
        block.firing.weight.data = weight
    return found


def least_signals(fires: torch.Tensor, signal: torch.Tensor, share: float, threshold: float) -> float:
    """The threshold, at most `threshold`, above which a share of the signals of the neurons that fire lies."""
    kept = signal[fires]
    found = float(kept.sort().values[int((1 - share) * (len(kept) - 1))])
    return min(threshold, float(np.nextafter(np.float32(found), np.float32(0))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibration", type=Path, required=True, help="text for the thresholds")
    parser.add_argument("--text", type=Path, required=True, help="other text, for the figures")
    parser.add_argument("--tokens", type=int, default=4096, help="of both")
    parser.add_argument("--active-ratio", type=float, help="for activations that are never exactly zero")
    parser.add_argument("--found", type=float, nargs="*", default=(0.98, 0.99), help="shares to lower thresholds for")
    options = parser.parse_args()
    with Checkpoint(options.model) as checkpoint:
        architecture = choose_architecture(describe(checkpoint))

    def read(path: Path) -> list[Any]:
        return read_token_sequences(options.model, read_text(path), sequences=options.tokens // LENGTH, length=LENGTH)

    calibration, held_out = read(options.calibration), read(options.text)
    with TemporaryDirectory() as folder, quiet_transformers(), torch.inference_mode():
        limit = MemoryLimit(folder=Path(folder))
        model: Any = load_model(options.model, architecture, with_head=True, device="cpu", dtype="float32", limit=limit)
        blocks = blocks_of(model, options.model, architecture)
        source = [block.firing.weight.data.clone() for block in blocks]
        before = hidden_states(model, blocks, calibration)
        states = hidden_states(model, blocks, held_out)
        expected = log_probabilities(model, held_out)

        def signals(of: list[torch.Tensor], weights: Weights) -> list[torch.Tensor]:
            return [block.signal(*each) for block, *each in zip(blocks, of, weights, strict=True)]

        own = signals(before, source)
        thresholds = [
            0.0 if options.active_ratio is None else float(np.quantile(each.numpy(), 1 - options.active_ratio))
            for each in own
        ]
        fired_before = [each > least for each, least in zip(own, thresholds, strict=True)]
        exact = signals(states, source)
        fires = [each > least for each, least in zip(exact, thresholds, strict=True)]
        firing = sum(int(each.sum()) for each in fires)
        whole = sum(float(each[mask].sum()) for each, mask in zip(exact, fires, strict=True))
        share_firing = firing / sum(each.numel() for each in fires)
        print(f"{share_firing:.1%} of the neurons fire, {len(expected):,} predictions\n")
        print(f"{'rows':<18}{'thresholds':<22}{'found':>8}{'lost signal':>13}{'read':>7}{'KL':>10}{'firing alone':>14}")

        def divergence(deciding: Weights, giving: Weights, least: list[float]) -> float:
            found = sparse_probabilities(model, blocks, deciding, giving, least, held_out)
            return float((expected.exp() * (expected - found)).sum(-1).double().mean())

        def show(name: str, what: str, weights: Weights, least: list[float]) -> float:
            found = [each > limit for each, limit in zip(signals(states, weights), least, strict=True)]
            kept = sum(int((a & b).sum()) for a, b in zip(fires, found, strict=True))
            lost = sum(float(s[a & ~b].sum()) for s, a, b in zip(exact, fires, found, strict=True))
            ratio = sum(int(each.sum()) for each in found) / firing
            row = f"{name:<18}{what:<22}{kept / firing:8.2%}{lost / whole:13.2%}{ratio:7.3f}"
            print(
                f"{row}{divergence(weights, weights, least):10.5f}{divergence(weights, source, least):14.5f}",
                flush=True,
            )
            return ratio

        show("source", "as they are", source, thresholds)
        for name, rounding in KINDS:
            weights = [rounded(each, name, rounding) for each in source]
            label = f"{name} {rounding}"
            show(label, "as they are", weights, thresholds)
            if options.active_ratio is None:
                continue
            by_rounded = signals(before, weights)
            for share in options.found:
                triples = zip(fired_before, by_rounded, thresholds, strict=True)
                least = [least_signals(mask, each, share, limit) for mask, each, limit in triples]
                if least == thresholds:
                    continue
                ratio = show(label, f"for {share:.1%} found", weights, least)
                same = [float(np.quantile(each.numpy(), 1 - options.active_ratio * ratio)) for each in own]
                show("source", "that read as many", source, same)


if __name__ == "__main__":
    main()
