"""How far a model with rounded weights is from the one it was made from: in perplexity, and in its predictions."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from neuralink_cli.architectures.architecture import Architecture
from neuralink_cli.calibration.batches import ModelBatch
from neuralink_cli.checkpoint.checkpoint import Checkpoint
from neuralink_cli.errors import MismatchError, OptionError, UnsupportedError, VerificationError
from neuralink_cli.evaluation.output_comparison import Outputs, Watching, run_model
from neuralink_cli.layout.bundled_layout import BundledLayout
from neuralink_cli.layout.open_layout import open_layout
from neuralink_cli.layout.recall import GateRecall
from neuralink_cli.models.hf_packages import quiet_transformers, require_hf_packages
from neuralink_cli.models.model_class import saved_without_head
from neuralink_cli.models.model_errors import no_numbers

if TYPE_CHECKING:
    from neuralink_cli.evaluation.gate_recall import RecallMeter


@dataclass(frozen=True)
class ModelDistance:
    """Two models on the same text.

    Attributes:
        tokens: Tokens that were predicted, each from those before it.
        perplexity: Of the source, exp of the mean negative log-likelihood.
        layout_perplexity: Of the layout.
        mean_kl: Mean Kullback-Leibler divergence of the layout's predictions from the source's, in nats.
        p99_kl: Its 99th percentile over tokens.
        same_first_choice: Share of tokens for which both find the same token likeliest.
        gate: What rounding the rows that decide firing does; None if they are as in the source, or do not decide it
            alone.
    """

    tokens: int
    perplexity: float
    layout_perplexity: float
    mean_kl: float
    p99_kl: float
    same_first_choice: float
    gate: GateRecall | None = None

    @property
    def perplexity_increase(self) -> float:
        """Relative."""
        return self.layout_perplexity / self.perplexity - 1

    def check(self, where: Path, *, max_increase: float | None, max_kl: float | None) -> None:
        """Require that the layout is close enough.

        Args:
            max_increase: Of the perplexity, relative; None for any.
            max_kl: Of `mean_kl`, in nats; None for any.

        Raises:
            VerificationError: It is further away, or not a number.
        """
        for name, value, limit, show in (
            ("perplexity increases by", self.perplexity_increase, max_increase, "{:.2%}"),
            ("the mean KL divergence is", self.mean_kl, max_kl, "{:.4f}"),
        ):
            if limit is not None and not value <= limit:
                raise VerificationError(f"{name} {show.format(value)}, more than {show.format(limit)}", where=where)


def measure_distance(
    source: Path,
    other: Path,
    batches: Sequence[ModelBatch],
    architecture: Architecture,
    *,
    device: str = "cpu",
    trust_remote_code: bool = False,
    ignore_remote_code: bool = False,
    layout: Path | None = None,
    watching: Watching = nullcontext,
) -> ModelDistance:
    """Run two local checkpoints of a causal language model, one after the other, on the same sequences, as float32.

    Args:
        layout: The layout that `other` is decoded from, to see what its rounded rows let fire.
        watching: Makes a context from the source's model, in which it runs.

    Raises:
        UnsupportedError: Another kind of model, which has no perplexity.
        OptionError: No sequence has two tokens.
        InputError: A model cannot be loaded, as `load_model`; the outputs of the source are not numbers.
        VerificationError: The outputs of the source are numbers, and those of the other are not.
        MismatchError: The outputs have different shapes.
    """
    if architecture.task != "causal-lm":
        raise UnsupportedError(
            f"a model of the task {architecture.task} has no perplexity to compare rounded weights by", where=source
        )
    require_hf_packages("torch", "transformers")
    if saved_without_head(source, architecture.task):
        raise UnsupportedError(
            "is saved without the head that predicts tokens, and rounded weights are compared by its predictions",
            where=source,
            fix="leave --forward out: `verify` alone proves that the weights are rounded as they should be",
        )

    def predictions(directory: Path, watching: Watching) -> list[Outputs]:
        with quiet_transformers():
            outputs = run_model(
                directory, batches, architecture, device, "float32", trust_remote_code, ignore_remote_code, watching
            )
            return [_log_probabilities(require_numbers(logits, directory)[:-1]) for logits in outputs]

    def require_numbers(logits: Outputs, directory: Path) -> Outputs:
        if np.isfinite(logits).all():
            return logits
        if directory == source:
            raise no_numbers(source)
        raise VerificationError(
            "gives outputs that are not numbers (NaN or infinite), where the source gives numbers",
            where=layout or directory,
        )

    with _open_bundled(layout) as opened:
        meter = None if opened is None else _meter(opened, source, architecture)
        expected = predictions(source, watching if meter is None else _both(watching, meter.watching))
    found = predictions(other, nullcontext)
    targets = [batch.inputs["input_ids"][0][1:] for batch in batches]
    tokens = sum(target.size for target in targets)
    if not tokens:
        raise OptionError("the text is too short to predict a token of it", fix="pass a longer --text")
    losses = np.zeros(2)
    divergences: list[npt.NDArray[np.float64]] = []
    same = 0
    for a, b, target in zip(expected, found, targets, strict=True):
        if a.shape != b.shape:
            raise MismatchError(f"gives outputs of shape {b.shape}, but {source} of {a.shape}", where=other)
        places = np.arange(target.size)
        losses -= (a[places, target].sum(dtype=np.float64), b[places, target].sum(dtype=np.float64))
        divergences.append((np.exp(a) * (a - b)).sum(axis=1, dtype=np.float64))
        same += int((a.argmax(axis=1) == b.argmax(axis=1)).sum())
    every = np.concatenate(divergences)
    ours, theirs = (math.exp(min(loss / tokens, 700.0)) for loss in losses)
    return ModelDistance(
        tokens,
        ours,
        theirs,
        float(every.mean()),
        float(np.quantile(every, 0.99)),
        same / tokens,
        None if meter is None else meter.total,
    )


def _both(first: Watching, second: Watching) -> Watching:
    @contextmanager
    def entered(model: Any) -> Iterator[None]:
        with first(model), second(model):
            yield

    return entered


@contextmanager
def _open_bundled(directory: Path | None) -> Iterator[BundledLayout | None]:
    if directory is None:
        yield None
        return
    with open_layout(directory) as layout:
        yield layout if layout.kind == "bundled" else None


def _meter(layout: BundledLayout, source: Path, architecture: Architecture) -> RecallMeter:
    # Imported here because it needs torch.
    from neuralink_cli.evaluation.gate_recall import RecallMeter, rows_of_layout

    with Checkpoint(source) as checkpoint:
        return RecallMeter(rows_of_layout(layout), checkpoint, architecture)


def _log_probabilities(logits: Outputs) -> Outputs:
    """Log-softmax of float32 `[tokens, vocabulary]`."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True, dtype=np.float64)), dtype=np.float32)
