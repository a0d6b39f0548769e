"""A run with the runtime in C: Python tokenises and shows the text, the program computes. Imports no torch."""

from __future__ import annotations

import contextlib
import json
import logging
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neuralink_cli.checkpoint.file_names import CONFIG_FILE
from neuralink_cli.devices.device import DeviceModel, device_record
from neuralink_cli.errors import OptionError
from neuralink_cli.files.json_text import read_foreign_object
from neuralink_cli.models.hf_packages import quiet_transformers
from neuralink_cli.runtime.c_engine import CEngine, find_engine
from neuralink_cli.runtime.engines import FLOATS
from neuralink_cli.runtime.generated import Generated, Phase
from neuralink_cli.runtime.likelihood import Perplexity, perplexity_of
from neuralink_cli.runtime.prompts import prompt_tokens, require_room
from neuralink_cli.sizes import human_bytes
from neuralink_cli.sparse_models.counters import FlashCounters
from neuralink_cli.sparse_models.memory import Memory
from neuralink_cli.sparse_models.settings import GenerationOptions, RunSettings
from neuralink_cli.storage.policies import LINKED_S3FIFO, S3FIFO

if TYPE_CHECKING:
    from neuralink_cli.calibration.sequences import TokenIds

logger = logging.getLogger(__name__)

_GENERATION_FILE = "generation_config.json"
# Stands for a character of which a token brings only a part.
_UNFINISHED = "\ufffd"


@dataclass(frozen=True)
class CRun:
    """What a run gives.

    Attributes:
        generated: None without a prompt.
        perplexity: None if no sequence has two tokens.
        memory: What the program held.
        facts: What its model is.
        load_seconds: Until it could be asked.
    """

    generated: Generated | None
    perplexity: Perplexity | None
    memory: Memory
    facts: dict[str, Any]
    load_seconds: float


def positions_of(layout: Path) -> int | None:
    """The tokens that a sequence can have, as the config of the model says."""
    limit = read_foreign_object(layout / CONFIG_FILE).get("max_position_embeddings")
    return limit if isinstance(limit, int) and limit > 0 else None


def run_in_c(
    layout: Path,
    prompt: str | None,
    sequences: Sequence[TokenIds],
    settings: RunSettings,
    options: GenerationOptions,
    engine: Path | None,
    on_text: Callable[[str], None] | None = None,
    activations: str = FLOATS,
) -> CRun:
    """Generate text with `flash_run`, then measure the perplexity of sequences, each on its own.

    Args:
        prompt: None to generate nothing.
        engine: The program; None to look for it.
        on_text: Called with the text as it comes, piece by piece.
        activations: As the program's option.

    Raises:
        OptionError: Settings that the program does not have, or memory that is too little.
        InputError, UnsupportedError, WorkerError, MissingDependencyError: As `CEngine` and `find_engine`.
    """
    from neuralink_cli.models.tokenizer import load_tokenizer

    program = find_engine(engine)
    arguments = [*_arguments(settings, options), "--activations", activations]
    tokenizer: Any = None
    tokens: tuple[int, ...] = ()
    longest = max((sequence.size for sequence in sequences), default=0)
    if prompt is not None:
        tokenizer = load_tokenizer(layout)
        tokens = prompt_tokens(tokenizer, prompt)
        require_room(tokens, options, positions_of(layout))
        longest = max(longest, len(tokens) + options.max_new_tokens)
    arguments += ["--context", str(longest)]
    stops = _stop_tokens(layout)
    if stops:
        arguments += ["--stop", ",".join(map(str, stops))]
    started = time.perf_counter()
    with _profile(settings.device) as profile, CEngine(program, layout, [*arguments, *profile]) as running:
        load_seconds = time.perf_counter() - started
        _tell_small_cache(running.facts.memory)
        generated = None
        if tokenizer is not None:
            generated = _generate(running, tokenizer, tokens, options.max_new_tokens, on_text)
        measured = _perplexity(running, sequences)
        return CRun(generated, measured, _memory(running), running.facts.model, load_seconds)


def _tell_small_cache(memory: dict[str, int]) -> None:
    """Say so if the cache is smaller than what one token uses. Without a cache that is as asked."""
    cache, cycle, enough = (memory.get(key, 0) for key in ("cache_bytes", "cycle_bytes", "cycle_dram_bytes"))
    if 0 < cache < cycle:
        needed = f"{-(-enough // 10**6)}MB" if enough else f"{-(-100 * cycle // memory['flash_bytes'])}%"
        logger.warning(
            "the cache takes %s, but a token uses %s of bundles: most are read again; --dram %s would take them",
            human_bytes(cache),
            human_bytes(cycle),
            needed,
        )


def _generate(
    running: CEngine,
    tokenizer: Any,
    prompt: tuple[int, ...],
    new_tokens: int,
    on_text: Callable[[str], None] | None,
) -> Generated:
    stream = _Stream(tokenizer, on_text)
    with quiet_transformers():
        tokens, figures = running.generate(prompt, new_tokens, stream.add)
        text = stream.end()
    return Generated(text, prompt, tokens, _phase(figures["prompt"]), _phase(figures["tokens"]))


def _perplexity(running: CEngine, sequences: Sequence[TokenIds]) -> Perplexity | None:
    total, count = 0.0, 0
    for sequence in sequences:
        if sequence.size > 1:
            mean, tokens = running.perplexity(sequence.tolist())
            total += mean * tokens
            count += tokens
    return perplexity_of(total, count)


def _arguments(settings: RunSettings, options: GenerationOptions) -> list[str]:
    """The program's options; what it cannot do is refused."""
    if settings.dtype not in ("float32", "auto"):
        raise OptionError(f"the runtime in C computes in float32, not {settings.dtype}", fix="leave out --dtype")
    if settings.cache not in (LINKED_S3FIFO, S3FIFO):
        raise OptionError(
            f"the runtime in C has no cache {settings.cache!r}", fix=f"pass --cache {LINKED_S3FIFO} or {S3FIFO}"
        )
    budget = settings.dram
    dram = f"{100 * (budget.fraction or 0.0):.9g}%" if budget.bytes is None else str(budget.bytes)
    found = ["--dram", dram, "--cache", settings.cache, "--queue-depth", str(settings.queue_depth)]
    if settings.direct is not None:
        found.append("--direct" if settings.direct else "--no-direct")
    if options.temperature > 0:
        found += ["--temperature", repr(options.temperature), "--top-k", str(options.top_k)]
        found += ["--top-p", repr(options.top_p), "--seed", str(options.seed % 2**64)]
    return found


@contextlib.contextmanager
def _profile(device: DeviceModel | None) -> Iterator[list[str]]:
    """The option that names the storage, as a file that is there while the program runs."""
    if device is None:
        yield []
        return
    record = device_record(device)
    kept = ("name", "queue_depth", "operation_seconds", "bytes_per_second", "page_bytes")
    document = {"format": "neuralink-device", "version": 1} | {key: record[key] for key in kept}
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(document, file)
        file.flush()
        yield ["--device", file.name]


def _stop_tokens(layout: Path) -> list[int]:
    """The tokens that end a text, from the generation config as transformers reads it."""
    path = layout / _GENERATION_FILE
    stated = read_foreign_object(path if path.is_file() else layout / CONFIG_FILE).get("eos_token_id")
    listed = stated if isinstance(stated, list) else [stated]
    return [token for token in listed if isinstance(token, int) and token >= 0]


def _phase(figures: dict[str, Any]) -> Phase:
    names = ("looked_up", "hits", "reads", "bytes_read", "bytes_useful", "io_seconds")
    counters = FlashCounters(**{name: figures[name] for name in names}, fetch_seconds=figures["io_seconds"])
    return Phase(figures["tokens"], figures["seconds"], counters)


def _memory(running: CEngine) -> Memory:
    of = running.facts.memory
    return Memory(
        flash_bytes=of["flash_bytes"],
        cache_bytes=of["cache_bytes"],
        resident_bytes=of["resident_bytes"],
        dense_bytes=of["dense_bytes"],
        working_bytes=of["working_bytes"] + of["tables_bytes"],
        sequence_bytes=of["sequence_bytes"],
        programs_bytes=of["programs_bytes"] + of["system_bytes"],
        peak_bytes=running.peak_bytes,
    )


class _Stream:
    """Turns tokens into text as they come. A character that is not whole yet is held back."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None] | None) -> None:
        self._tokenizer = tokenizer
        self._on_text = on_text
        self._tokens: list[int] = []
        self._shown = ""

    def add(self, token: int) -> None:
        """Show what a token brings."""
        self._tokens.append(token)
        if self._on_text is None:
            return
        text = self._text()
        # What is shown cannot be taken back: only text that goes on from it is.
        if text.startswith(self._shown) and not text.endswith(_UNFINISHED):
            self._on_text(text[len(self._shown) :])
            self._shown = text

    def end(self) -> str:
        """Show what is left, and return the whole text."""
        text = self._text()
        if self._on_text is not None and text.startswith(self._shown):
            self._on_text(text[len(self._shown) :])
        return text

    def _text(self) -> str:
        text: str = self._tokenizer.decode(self._tokens, skip_special_tokens=True)
        return text
