"""Generating text: tokens out, and what each phase took."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessor
from transformers.generation.streamers import BaseStreamer

from neuralink_cli.models.hf_packages import quiet_transformers
from neuralink_cli.models.loading import max_positions
from neuralink_cli.models.model_errors import (
    explained_model_errors,
    has_choices,
    no_numbers,
    require_known_tokens,
    vocabulary_of,
)
from neuralink_cli.models.offload import input_device
from neuralink_cli.runtime.generated import Generated, Phase
from neuralink_cli.runtime.prompts import prompt_tokens, require_room
from neuralink_cli.sparse_models.counters import FlashCounters
from neuralink_cli.sparse_models.settings import GenerationOptions


def encode_prompt(model: Any, tokenizer: Any, prompt: str, options: GenerationOptions) -> tuple[int, ...]:
    """The tokens of a prompt, see `prompt_tokens`, for a model that is to go on with them.

    Raises:
        InputError: The prompt has no tokens, or it is not Unicode text.
        OptionError: Prompt and new tokens together need more positions than the model has.
    """
    tokens = prompt_tokens(tokenizer, prompt)
    require_known_tokens(tokens, vocabulary_of(model), "the prompt")
    require_room(tokens, options, max_positions(model))
    return tokens


def generate(
    model: Any,
    tokenizer: Any,
    prompt: tuple[int, ...],
    options: GenerationOptions,
    counters: Callable[[], FlashCounters] = FlashCounters,
) -> Generated:
    """Generate from the tokens of a prompt, as the options say, whatever the generation config of the checkpoint says.

    Args:
        model: A causal language model of transformers.
        counters: What has been fetched so far; nothing, for a dense model.

    Raises:
        InputError: The model fails as it runs, or its logits are not numbers.
    """
    marks = _Marks(counters)
    chosen: dict[str, Any] = {"do_sample": False}
    if options.temperature > 0:
        chosen = {
            "do_sample": True,
            "temperature": options.temperature,
            "top_k": options.top_k,
            "top_p": options.top_p,
        }
    ids = torch.tensor([prompt], device=input_device(model))
    torch.manual_seed(options.seed)
    with quiet_transformers(), explained_model_errors(model), torch.inference_mode(), _only_special_tokens(model):
        marks.start()
        output = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=options.max_new_tokens,
            num_beams=1,
            use_cache=True,
            pad_token_id=_pad_token(model),
            streamer=marks,
            logits_processor=[_RequireChoices()],
            **chosen,
        )
    new = tuple(output[0, len(prompt) :].tolist())
    first, rest = marks.phases(len(prompt))
    return Generated(tokenizer.decode(new, skip_special_tokens=True), prompt, new, first, rest)


class _RequireChoices(LogitsProcessor):  # type: ignore[misc]
    """Stops where logits are not numbers: whatever token is taken then means nothing."""

    def __call__(self, _ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        if not has_choices(logits):
            raise no_numbers("the text that was generated so far", dtype=True)
        return logits


@contextlib.contextmanager
def _only_special_tokens(model: Any) -> Iterator[None]:
    """Within the block the model's generation config says which tokens are special, and nothing else.

    transformers fills in whatever is not passed from it: penalties, forced or suppressed tokens, guidance, beams.
    """
    own = model.generation_config
    names = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
    model.generation_config = GenerationConfig(**{name: getattr(own, name, None) for name in names})
    try:
        yield
    finally:
        model.generation_config = own


def _pad_token(model: Any) -> int:
    """The token for padding: a batch of one never needs it, but `generate` wants it."""
    config = model.generation_config
    for token in (config.pad_token_id, config.eos_token_id):
        if token is not None:
            return int(token[0] if isinstance(token, list) else token)
    return 0


class _Marks(BaseStreamer):  # type: ignore[misc]
    """Records the time and the counters at the first and the last token."""

    def __init__(self, counters: Callable[[], FlashCounters]) -> None:
        self._counters = counters
        self._marks: list[tuple[float, FlashCounters]] = []
        self._new = 0

    def start(self) -> None:
        """Start the clock."""
        self._marks = [(time.perf_counter(), self._counters())]
        self._new = -1

    def put(self, value: torch.Tensor) -> None:  # noqa: ARG002
        """Note a token; the first call brings the prompt."""
        self._new += 1
        if self._new == 1:
            self._marks.append((time.perf_counter(), self._counters()))

    def end(self) -> None:
        """Note that the last token came."""
        self._marks.append((time.perf_counter(), self._counters()))

    def phases(self, prompt_tokens: int) -> tuple[Phase, Phase]:
        """The prompt, up to the first new token, and the rest."""
        (began, at_start), (first, at_first), (last, at_end) = self._marks
        return (
            Phase(prompt_tokens, first - began, at_first - at_start),
            Phase(self._new - 1, last - first, at_end - at_first),
        )
