"""Compares a sparse model with the dense checkpoint that its layout was made from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from neuralink_cli.architectures.architecture import Architecture
from neuralink_cli.calibration.sequences import TokenIds
from neuralink_cli.layout.plan import FlashBlock
from neuralink_cli.models.hf_packages import quiet_transformers
from neuralink_cli.models.loading import load_model
from neuralink_cli.models.model_errors import explained_model_errors
from neuralink_cli.models.offload import input_device
from neuralink_cli.runtime.generated import Generated
from neuralink_cli.runtime.generation import generate
from neuralink_cli.runtime.likelihood import Perplexity
from neuralink_cli.runtime.perplexity import perplexity
from neuralink_cli.sparse_models.masking import masked_neurons
from neuralink_cli.sparse_models.settings import GenerationOptions

# Sums in another order differ by rounding: logits closer than this share of the largest one count as equal.
_ROUNDING = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 1e-2}


@dataclass(frozen=True)
class TokenComparison:
    """New tokens compared with those of another model for the same prompt.

    `same` is how many of `tokens` are equal before the first difference. `logit_gap` is how much the other model
    preferred its own token there, as a share of the largest absolute logit; None without a difference.
    """

    tokens: int
    same: int
    logit_gap: float | None
    tolerance: float

    @property
    def agrees(self) -> bool:
        """Whether all tokens are equal, or the first difference is within rounding."""
        return self.logit_gap is None or self.logit_gap <= self.tolerance


@dataclass(frozen=True)
class DenseComparison:
    """Comparison with the dense model.

    `masked` compares with the dense model with non-firing neurons masked, which the sparse model must equal; `dense`
    with the full dense model, which is the same if no threshold was calibrated.
    """

    masked: TokenComparison | None
    dense: TokenComparison | None
    dense_tokens_per_second: float | None
    dense_perplexity: Perplexity | None


def compare_with_dense(
    checkpoint: Path,
    architecture: Architecture,
    blocks: Sequence[FlashBlock],
    generated: Generated | None,
    options: GenerationOptions,
    sequences: Sequence[TokenIds],
    *,
    exact: bool,
    dtype: str,
    ignore_remote_code: bool = False,
) -> DenseComparison:
    """Run the dense model of a checkpoint on the same prompt and the same sequences for perplexity.

    Raises:
        InputError: The checkpoint cannot be loaded.
    """
    with quiet_transformers():
        model = load_model(
            checkpoint,
            architecture,
            with_head=True,
            device="cpu",
            dtype=dtype,
            ignore_remote_code=ignore_remote_code,
        )
    dense_perplexity = perplexity(model, sequences) if sequences else None
    if generated is None:
        return DenseComparison(None, None, None, dense_perplexity)
    found = _go_on(model, generated, options)
    dense = _compare_tokens(model, generated, found, dtype)
    masked = dense
    if not exact:
        with masked_neurons(model, blocks, architecture):
            masked = _compare_tokens(model, generated, _go_on(model, generated, options), dtype)
    return DenseComparison(masked, dense, found.token_phase.tokens_per_second, dense_perplexity)


class _Silent:
    """Stands in for a tokenizer where only tokens matter."""

    def decode(self, _tokens: Any, **_options: Any) -> str:
        return ""


def _go_on(model: Any, generated: Generated, options: GenerationOptions) -> Generated:
    return generate(model, _Silent(), generated.prompt_tokens, options)


def _compare_tokens(model: Any, sparse: Generated, other: Generated, dtype: str) -> TokenComparison:
    ours, theirs = sparse.new_tokens, other.new_tokens
    same = next((k for k, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
    gap = None
    if same < min(len(ours), len(theirs)):
        ids = torch.tensor([[*sparse.prompt_tokens, *ours[:same]]], device=input_device(model))
        with explained_model_errors(model), torch.inference_mode():
            logits = model(input_ids=ids, use_cache=False).logits[0, -1].float()
        gap = float((logits[theirs[same]] - logits[ours[same]]) / logits.abs().max())
    elif len(ours) != len(theirs):
        gap = 1.0
    return TokenComparison(len(ours), same, gap, _ROUNDING[dtype])
