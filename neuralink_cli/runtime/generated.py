"""What generating text gives: the tokens and what each phase took. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from neuralink_cli.sparse_models.counters import FlashCounters


@dataclass(frozen=True)
class Phase:
    """What computing some tokens took: the prompt's at once, or the new ones one by one."""

    tokens: int
    seconds: float
    counters: FlashCounters

    @property
    def tokens_per_second(self) -> float:
        """0.0 if there were none."""
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def io_share(self) -> float:
        """Share of the time in which it waited for reads."""
        return self.counters.io_seconds / self.seconds if self.seconds else 0.0


@dataclass(frozen=True)
class Generated:
    """The new tokens after a prompt, their text, and the two phases; the prompt phase gives the first new token."""

    text: str
    prompt_tokens: tuple[int, ...]
    new_tokens: tuple[int, ...]
    prompt_phase: Phase
    token_phase: Phase

    @property
    def tokens(self) -> int:
        """Tokens of the prompt and new ones."""
        return len(self.prompt_tokens) + len(self.new_tokens)
