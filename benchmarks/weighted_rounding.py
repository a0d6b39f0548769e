"""Whether the search for scales should weigh errors by how large the inputs are, as llama.cpp does with an imatrix.

python benchmarks/weighted_rounding.py MODEL --calibration wiki.txt --text held-out.txt

The weights of the FFN blocks are rounded in memory, everything else stays as it is. The errors of gate and up weights
count times the mean square of their input over the calibration text (`weighted`), or alike (`search`); those of down
weights alike. Perplexity and KL divergence are against the source on other text; the last column is how much of the
KL divergence weighting adds, and its standard error over tokens.

With --outliers S, one in 64 inputs of the blocks is S times as large, and its weights are as much smaller. The model
computes what it did before, and is as hard to round as one with such inputs.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt
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
from neuralink_cli.weight_formats.formats import BLOCK_FORMATS, NEAREST, SEARCH
from neuralink_cli.weight_formats.quantising import dequantise, quantise_rows

WEIGHTED = "weighted"
ROWS = (("q4_0", NEAREST), ("q4_0", SEARCH), ("q4_0", WEIGHTED), ("iq4_nl", SEARCH), ("iq4_nl", WEIGHTED))
LENGTH = 128
EVERY = 64

Values = npt.NDArray[np.float32]


def rounded(rows: Values, name: str, rounding: str, importance: Values | None) -> Values:
    """float32 `[n, hidden]` as its codes stand for it."""
    kind = BLOCK_FORMATS[name]
    made = np.zeros((len(rows), kind.row_bytes(rows.shape[1])), np.uint8)
    data = np.ascontiguousarray(rows).view(np.uint8).reshape(-1)
    used, rule = (importance, SEARCH) if rounding == WEIGHTED else (None, rounding)
    bad = quantise_rows(data, "F32", rows.shape[1], kind, made, rounding=rule, importance=used)
    assert bad is None
    return dequantise(made, kind)


def projections(model: Any, directory: Path, architecture: Any) -> Iterator[tuple[str, Any]]:
    """The role and module of every part of the blocks, of models whose parts are modules of their own."""
    with Checkpoint(directory) as checkpoint:
        for block in find_blocks(checkpoint, architecture):
            for part in block.parts:
                module = find_module(model, part, checkpoint.place(part.weight).entry.shape, architecture)
                wanted = (block.neurons, block.hidden) if part.neuron_axis == 0 else (block.hidden, block.neurons)
                if block.expert is not None or tuple(module.weight.shape) != wanted:
                    raise SystemExit(f"{block.id}: its {part.role} is not a module of its own")
                yield part.role, module


def mean_squares(model: Any, modules: list[Any], sequences: list[Any]) -> list[Values]:
    """The mean square of every input of some modules, float32 `[hidden]`."""
    sums = [np.zeros(module.weight.shape[1]) for module in modules]

    def adding(total: npt.NDArray[np.float64]) -> Callable[[Any, tuple[Any, ...]], None]:
        def hook(_module: Any, inputs: tuple[Any, ...]) -> None:
            total[:] += (inputs[0].reshape(-1, total.size).double() ** 2).sum(0).numpy()

        return hook

    with ExitStack() as hooks:
        for module, total in zip(modules, sums, strict=True):
            hooks.callback(module.register_forward_pre_hook(adding(total)).remove)
        for ids in sequences:
            model(input_ids=torch.from_numpy(ids.astype(np.int64))[None], use_cache=False)
    return [(total / sum(ids.size for ids in sequences)).astype(np.float32) for total in sums]


def log_probabilities(model: Any, sequences: list[Any]) -> list[torch.Tensor]:
    inputs = (torch.from_numpy(ids.astype(np.int64))[None] for ids in sequences)
    return [model(input_ids=ids, use_cache=False).logits[0, :-1].log_softmax(-1) for ids in inputs]


def losses(found: list[torch.Tensor], sequences: list[Any]) -> torch.Tensor:
    targets = (torch.from_numpy(ids[1:].astype(np.int64)) for ids in sequences)
    return torch.cat([-each.gather(1, to[:, None])[:, 0] for each, to in zip(found, targets, strict=True)]).double()


def standard_error(values: torch.Tensor) -> float:
    return float(values.std() / values.numel() ** 0.5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibration", type=Path, required=True, help="text for the mean squares")
    parser.add_argument("--text", type=Path, required=True, help="other text, to compare predictions on")
    parser.add_argument("--tokens", type=int, default=8192, help="of that text")
    parser.add_argument("--calibration-tokens", type=int, default=32768)
    parser.add_argument("--outliers", type=float, default=1.0, metavar="S", help="make one in 64 inputs larger")
    options = parser.parse_args()
    with Checkpoint(options.model) as checkpoint:
        architecture = choose_architecture(describe(checkpoint))

    def read(path: Path, tokens: int) -> list[Any]:
        return read_token_sequences(options.model, read_text(path), sequences=tokens // LENGTH, length=LENGTH)

    calibration, held_out = read(options.calibration, options.calibration_tokens), read(options.text, options.tokens)
    with TemporaryDirectory() as folder, quiet_transformers(), torch.inference_mode():
        limit = MemoryLimit(folder=Path(folder))
        model: Any = load_model(options.model, architecture, with_head=True, device="cpu", dtype="float32", limit=limit)
        parts = list(projections(model, options.model, architecture))
        rows = [module for role, module in parts if role != "down"]
        squares = mean_squares(model, rows, calibration)
        original = [module.weight.numpy().copy() for _, module in parts]
        scales = [
            np.where(np.arange(each.size) % EVERY == 0, options.outliers, 1).astype(np.float32) for each in squares
        ]
        spread = max(float((each * s**2).max() / (each * s**2).mean()) for each, s in zip(squares, scales, strict=True))
        expected = log_probabilities(model, held_out)
        source = losses(expected, held_out)
        perplexity = float(source.mean().exp())
        print(f"perplexity of the source {perplexity:.3f}, {source.numel():,} tokens")
        print(f"largest mean square of an input: {spread:.1f} times the mean of its block\n")
        print(
            f"{'weights':<9}{'rounding':<10}{'perplexity':>11}{'change':>8}{'KL':>9}{'same':>7}  weighting adds to KL"
        )
        unweighted = None
        for name, rounding in ROWS:
            found = iter(zip(squares, scales, strict=True))
            for (role, module), weight in zip(parts, original, strict=True):
                if role == "down":
                    new = rounded(weight.T, name, NEAREST if rounding == NEAREST else SEARCH, None).T
                else:
                    square, scale = next(found)
                    new = rounded(weight / scale, name, rounding, square * scale**2 / square.mean()) * scale
                module.weight.copy_(torch.from_numpy(new.copy()))
            other = log_probabilities(model, held_out)
            pairs = list(zip(expected, other, strict=True))
            change = float((losses(other, held_out) - source).mean().exp() - 1)
            every = torch.cat([(a.exp() * (a - b)).sum(1) for a, b in pairs]).double()
            same = float(torch.cat([a.argmax(1) == b.argmax(1) for a, b in pairs]).double().mean())
            row = f"{name:<9}{rounding:<10}{perplexity * (1 + change):>11.3f}{change:>8.2%}"
            row += f"{every.mean():>9.5f}{same:>7.1%}"
            if rounding == WEIGHTED and unweighted is not None:
                more = every - unweighted
                row += f"  {more.mean() / unweighted.mean():+.1%} ± {standard_error(more) / unweighted.mean():.1%}"
            unweighted = every
            print(row, flush=True)


if __name__ == "__main__":
    main()
