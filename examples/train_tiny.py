"""Train the tiny ReLU language model in `tiny-relu/`.

The model is an ordinary OPT checkpoint, small enough to live in a git repository. Its FFN blocks are sparse because
the training loss contains a penalty on how many neurons fire per token. Reads `text/train.txt` and `text/heldout.txt`.

    python examples/train_tiny.py
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import click
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional
from tqdm import trange
from transformers import AutoModelForCausalLM, OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast

HERE = Path(__file__).resolve().parent
TEXT = HERE / "text"
EOS, PAD = "<|endoftext|>", "<|pad|>"


@dataclasses.dataclass(frozen=True)
class Hyperparameters:
    """Everything that decides the outcome of a training run."""

    vocabulary: int = 1024
    layers: int = 4
    hidden: int = 128
    ffn: int = 768
    heads: int = 4
    context: int = 256
    dropout: float = 0.1
    steps: int = 3200
    warmup: int = 200
    batch: int = 8
    learning_rate: float = 2e-3
    weight_decay: float = 0.1
    active: float = 0.06
    sparsify: float = 0.3
    penalty: float = 0.01
    penalty_rate: float = 0.01
    seed: int = 0


def train_tokenizer(text: str, hyper: Hyperparameters) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=hyper.vocabulary,
        special_tokens=[EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=EOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=hyper.context,
        clean_up_tokenization_spaces=False,
    )


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, output: Path) -> None:
    """Save the tokenizer under the class name that transformers 4 and 5 both know."""
    tokenizer.save_pretrained(output)
    path = output / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(config, indent=2) + "\n")


def encode(tokenizer: PreTrainedTokenizerFast, path: Path) -> torch.Tensor:
    """Read a text file as one long row of token ids."""
    backend = tokenizer.backend_tokenizer
    return torch.tensor(backend.encode(path.read_text(encoding="utf-8")).ids)


def build_model(hyper: Hyperparameters, tokenizer: PreTrainedTokenizerFast) -> OPTForCausalLM:
    """Create the untrained model."""
    return OPTForCausalLM(
        OPTConfig(
            vocab_size=hyper.vocabulary,
            num_hidden_layers=hyper.layers,
            hidden_size=hyper.hidden,
            word_embed_proj_dim=hyper.hidden,
            ffn_dim=hyper.ffn,
            num_attention_heads=hyper.heads,
            max_position_embeddings=hyper.context,
            activation_function="relu",
            dropout=hyper.dropout,
            attention_dropout=0.0,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


@contextmanager
def recorded_activations(model: OPTForCausalLM) -> Iterator[list[torch.Tensor]]:
    """Collect the output of each FFN's ReLU, in layer order; the caller empties the list between passes."""
    seen: list[torch.Tensor] = []
    hooks = [
        layer.activation_fn.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
        for layer in model.model.decoder.layers
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def density(fired: torch.Tensor) -> torch.Tensor:
    """Hoyer's measure of density, averaged over tokens: 1 if all neurons are equal, near 0 if only one fires.

    It does not depend on the scale of the activations, so it cannot be lowered by merely shrinking the weights.
    """
    norm = fired.square().sum(-1).add(1e-6).sqrt()
    return (fired.sum(-1) / norm).mean() / math.sqrt(fired.shape[-1])


def optimizer_for(model: OPTForCausalLM, hyper: Hyperparameters) -> torch.optim.Optimizer:
    """AdamW with weight decay on matrices only."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": hyper.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=hyper.learning_rate, betas=(0.9, 0.98))


def learning_rate_factor(hyper: Hyperparameters) -> Callable[[int], float]:
    """Linear warm-up, then a cosine down to a twentieth."""

    def factor(step: int) -> float:
        if step < hyper.warmup:
            return (step + 1) / hyper.warmup
        progress = (step - hyper.warmup) / max(1, hyper.steps - hyper.warmup)
        return 0.05 + 0.475 * (1 + math.cos(math.pi * progress))

    return factor


def train(model: OPTForCausalLM, tokens: torch.Tensor, hyper: Hyperparameters) -> None:
    """Train on random windows of the text, steering each layer's penalty towards the wanted active ratio."""
    generator = torch.Generator().manual_seed(hyper.seed)
    weights = torch.full((hyper.layers,), hyper.penalty)
    optimizer = optimizer_for(model, hyper)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, learning_rate_factor(hyper))
    window = torch.arange(hyper.context + 1)
    model.train()
    with recorded_activations(model) as seen:
        for step in (bar := trange(hyper.steps, desc="train", mininterval=5)):
            starts = torch.randint(len(tokens) - hyper.context, (hyper.batch, 1), generator=generator)
            rows = tokens[starts + window]
            seen.clear()
            logits = model(input_ids=rows[:, :-1]).logits
            loss = functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
            penalties = torch.stack([density(fired) for fired in seen])
            (loss + (weights * penalties).sum()).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            ratios = torch.stack([(fired > 0).float().mean() for fired in seen])
            wanted = hyper.active ** min(1.0, step / (hyper.steps * hyper.sparsify))
            weights *= (hyper.penalty_rate * (ratios / wanted).log().clamp(-1, 1)).exp()
            if step % 50 == 0:
                shown = " ".join(f"{ratio:.1%}" for ratio in ratios.tolist())
                bar.set_postfix_str(f"loss {loss.item():.3f}, active {shown}", refresh=False)


@torch.no_grad()
def evaluate(model: OPTForCausalLM, tokens: torch.Tensor, hyper: Hyperparameters) -> tuple[float, torch.Tensor]:
    """Mean loss over the text, and for each layer and neuron the fraction of tokens it fires on."""
    model.eval()
    windows = (len(tokens) - 1) // hyper.context
    inputs = tokens[: windows * hyper.context].view(windows, hyper.context)
    targets = tokens[1 : windows * hyper.context + 1].view(windows, hyper.context)
    loss = 0.0
    counts = torch.zeros(hyper.layers, hyper.ffn)
    with recorded_activations(model) as seen:
        for rows, wanted in zip(inputs.split(32), targets.split(32), strict=True):
            seen.clear()
            logits = model(input_ids=rows).logits
            loss += functional.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="sum").item()
            counts += torch.stack([(fired > 0).flatten(0, -2).sum(0) for fired in seen])
    return loss / targets.numel(), counts / targets.numel()


def report(output: Path, tokens: torch.Tensor, hyper: Hyperparameters) -> None:
    """Print what the saved checkpoint, not the model in memory, achieves on held-out text."""
    model = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32)
    loss, frequency = evaluate(model, tokens, hyper)
    size = (output / "model.safetensors").stat().st_size
    click.echo(f"parameters            {sum(p.numel() for p in model.parameters()):,}")
    click.echo(f"model.safetensors     {size:,} bytes")
    click.echo(f"held-out tokens       {len(tokens):,}")
    click.echo(f"held-out loss         {loss:.3f}")
    click.echo(f"held-out perplexity   {math.exp(loss):.2f}")
    click.echo("layer   active   never fire")
    for layer, row in enumerate(frequency):
        click.echo(f"{layer:5}   {row.mean().item():6.2%}   {int((row == 0).sum()):4} of {hyper.ffn}")


@click.command()
@click.option("--output", type=click.Path(path_type=Path), default=HERE / "tiny-relu", help="Checkpoint directory.")
@click.option("--steps", default=Hyperparameters.steps, show_default=True, help="Training steps.")
@click.option("--active", default=Hyperparameters.active, show_default=True, help="Wanted active ratio.")
@click.option("--seed", default=Hyperparameters.seed, show_default=True, help="Seed of weights, windows and dropout.")
@click.option("--threads", default=1, show_default=True, help="CPU threads; another number rounds differently.")
def main(output: Path, steps: int, active: float, seed: int, threads: int) -> None:
    """Train the tiny ReLU language model and print its held-out figures."""
    hyper = Hyperparameters(steps=steps, active=active, seed=seed)
    torch.set_num_threads(threads)
    torch.manual_seed(hyper.seed)
    torch.use_deterministic_algorithms(True)

    tokenizer = train_tokenizer((TEXT / "train.txt").read_text(encoding="utf-8"), hyper)
    model = build_model(hyper, tokenizer)
    begun = time.perf_counter()
    train(model, encode(tokenizer, TEXT / "train.txt"), hyper)
    click.echo(f"trained {hyper.steps} steps in {(time.perf_counter() - begun) / 60:.1f} minutes")

    output.mkdir(parents=True, exist_ok=True)
    model.half().save_pretrained(output)
    save_tokenizer(tokenizer, output)
    report(output, encode(tokenizer, TEXT / "heldout.txt"), hyper)


if __name__ == "__main__":
    main()
