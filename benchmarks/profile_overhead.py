"""What recording costs: a model's plain forward pass against the same pass recorded, in turns in one process.

python benchmarks/profile_overhead.py --model examples/tiny-relu --model /path/to/another

Without a checkpoint it runs random models of two shapes: ReLU without a gate (OPT) and SiLU with one (Llama). Which of
the two passes comes first changes from round to round; the times are medians, the ratio the median of the rounds' own,
between its quartiles; the last column is the same of CPU time, which other work on the machine disturbs less.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import transformers

from neuralink_cli.activations.options import ProfileOptions
from neuralink_cli.activations.spool import Spool
from neuralink_cli.activations.threshold import EXACT_AT_ZERO
from neuralink_cli.calibration.batches import ModelBatch, text_batch
from neuralink_cli.models.hf_packages import quiet_transformers
from neuralink_cli.models.loading import load_model, max_positions
from neuralink_cli.profiling.hooked_blocks import hooked_blocks
from neuralink_cli.profiling.recorder import HookedModel, calibrate, record
from neuralink_cli.profiling.subject import read_subject

VOCABULARY = 4096


def build_random_models(folder: Path, layers: int, hidden: int) -> Iterator[Path]:
    """Save the built-in models."""
    common = {"vocab_size": VOCABULARY, "hidden_size": hidden, "num_hidden_layers": layers}
    heads = {"num_attention_heads": max(hidden // 64, 1)}
    opt = transformers.OPTConfig(
        **common, **heads, word_embed_proj_dim=hidden, ffn_dim=4 * hidden, max_position_embeddings=512
    )
    llama = transformers.LlamaConfig(
        **common, **heads, intermediate_size=11 * hidden // 4, max_position_embeddings=512, tie_word_embeddings=True
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for name, build, config in (
            ("random OPT", transformers.OPTForCausalLM, opt),
            ("random Llama", transformers.LlamaForCausalLM, llama),
        ):
            build(config).save_pretrained(folder / name)
            yield folder / name


@dataclass(frozen=True)
class Round:
    """Seconds of a plain and of a recorded pass, and the same in seconds of CPU."""

    plain: float
    recorded: float
    plain_cpu: float
    recorded_cpu: float


def alternate(plain: Callable[[], object], recorded: Callable[[], object], rounds: int) -> list[Round]:
    """Time both, round by round, after one round that does not count."""
    times = []
    for number in range(rounds + 1):
        order = (plain, recorded) if number % 2 else (recorded, plain)
        seconds, cpu = zip(*(_time(function) for function in order), strict=True)
        if not number % 2:
            seconds, cpu = seconds[::-1], cpu[::-1]
        times.append(Round(*seconds, *cpu))
    return times[1:]


def _time(function: Callable[[], object]) -> tuple[float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    function()
    return time.perf_counter() - wall, time.process_time() - cpu


def random_batch(sequences: int, length: int, vocabulary: int, padded: bool) -> ModelBatch:
    """A batch of random tokens; padded, the sequences are of all lengths from a half on."""
    rng = np.random.default_rng(0)
    lengths = np.linspace(length // 2, length, sequences).astype(int) if padded else np.full(sequences, length)
    return text_batch(rng.integers(4, vocabulary, (sequences, length)), np.arange(length) < lengths[:, None])


def run(path: Path, dtype: str, options: argparse.Namespace) -> None:
    """Measure one model and print its row."""
    subject = read_subject(path, ProfileOptions())
    model = load_model(path, subject.architecture, device=options.device, dtype=dtype)
    length = min(options.length, max_positions(model) or options.length)
    vocabulary = int(model.get_input_embeddings().weight.shape[0])
    batch = random_batch(options.batch_size, length, vocabulary, options.padded)
    blocks = hooked_blocks(model, subject.blocks, subject.shapes, subject.architecture, "gate")
    with tempfile.TemporaryDirectory(dir=options.folder) as folder, ExitStack() as stack:
        spool = stack.enter_context(Spool(Path(folder) / "trace", [-(-block.neurons // 8) for block in blocks]))
        thresholds = [0.0] * len(blocks)
        if any(block.activation not in EXACT_AT_ZERO for block in subject.blocks):
            with HookedModel(model, blocks) as hooked:
                thresholds = calibrate(hooked, [batch], lambda _tokens: None).thresholds(options.active_ratio)
        active: Sequence[int] = ()

        def recorded() -> None:
            nonlocal active
            with HookedModel(model, blocks) as hooked:
                active, _ = record(hooked, thresholds, [batch], spool, lambda _tokens: None, [0])

        def plain() -> None:
            HookedModel(model, []).run(batch, lambda *_: None)

        times = alternate(plain, recorded, options.rounds)
    share = sum(active) / (batch.tokens * sum(block.neurons for block in blocks))
    plain_ms, recorded_ms = (
        1000 * statistics.median(getattr(r, name) for r in times) for name in ("plain", "recorded")
    )
    ratios = sorted(r.recorded / r.plain for r in times)
    cpu_ratio = statistics.median(r.recorded_cpu / r.plain_cpu for r in times)
    shape = f"{len(blocks)} x {blocks[0].neurons}"
    quartiles = f"{ratios[len(ratios) // 4]:.3f}-{ratios[3 * len(ratios) // 4]:.3f}"
    print(
        f"{path.name:16} {dtype:9} {shape:>10} {subject.blocks[0].activation:>6} {share:7.1%} "
        f"{plain_ms:9.1f} {recorded_ms:9.1f} {statistics.median(ratios):7.3f} {quartiles:>12} {cpu_ratio:7.3f}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, action="append", default=[], help="a local checkpoint; may be repeated")
    parser.add_argument("--no-random", action="store_true", help="leave the built-in models out")
    parser.add_argument("--layers", type=int, default=8, help="of the built-in models")
    parser.add_argument("--hidden", type=int, default=1024, help="of the built-in models")
    parser.add_argument("--dtype", action="append", help="default: float32 and bfloat16")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--padded", action="store_true", help="sequences of different lengths")
    parser.add_argument("--active-ratio", type=float, default=0.3, help="of activations that need a threshold")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--folder", type=Path, help="for temporary files")
    options = parser.parse_args()
    print(f"{options.batch_size} sequences of up to {options.length} tokens, {torch.get_num_threads()} threads\n")
    columns = f"{'plain ms':>9} {'rec. ms':>9} {'ratio':>7} {'quartiles':>12} {'CPU':>7}"
    print(f"{'model':16} {'dtype':9} {'FFN':>10} {'act':>6} {'active':>7} {columns}")
    with tempfile.TemporaryDirectory(dir=options.folder) as folder, quiet_transformers():
        built_in = [] if options.no_random else build_random_models(Path(folder), options.layers, options.hidden)
        for path in [*options.model, *built_in]:
            for dtype in options.dtype or ["float32", "bfloat16"]:
                run(path, dtype, options)
    print(f"\npeak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10:.0f} MiB")


if __name__ == "__main__":
    main()
