"""A run with the runtime in C: Python tokenises and shows the text, the program computes. Imports no torch."""

from __future__ import annotations

import contextlib
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from neuralink_cli.checkpoint.file_names import CONFIG_FILE
from neuralink_cli.devices.device import DeviceModel, device_record
from neuralink_cli.errors import OptionError
from neuralink_cli.files.json_text import read_foreign_object
from neuralink_cli.models.hf_packages import quiet_transformers
from neuralink_cli.runtime.c_engine import CAnswer, find_engine, run_engine
from neuralink_cli.runtime.counters import FlashCounters
from neuralink_cli.runtime.generated import Generated, Phase
from neuralink_cli.runtime.memory import Memory
from neuralink_cli.runtime.prompts import prompt_tokens, require_room
from neuralink_cli.runtime.settings import GenerationOptions, RunSettings
from neuralink_cli.storage.policies import LINKED_S3FIFO, S3FIFO

_GENERATION_FILE = "generation_config.json"
# Stands for a character of which a token brings only a part.
_UNFINISHED = "\ufffd"


def generate_in_c(
    layout: Path,
    prompt: str,
    settings: RunSettings,
    options: GenerationOptions,
    engine: Path | None,
    on_text: Callable[[str], None] | None = None,
    activations: str = "f32",
) -> tuple[Generated, Memory, dict[str, Any], float]:
    """Generate text with `flash_run`.

    Args:
        engine: The program; None to look for it.
        on_text: Called with the text as it comes, piece by piece.
        activations: As the program's option.

    Returns:
        What was generated; the program's memory; facts of its model; and the seconds until the prompt was begun.

    Raises:
        OptionError: Settings that the program does not have, or memory that is too little.
        InputError, UnsupportedError, MissingDependencyError: As `run_engine` and `find_engine`.
    """
    from neuralink_cli.models.tokenizer import load_tokenizer

    program = find_engine(engine)
    arguments = [*_arguments(settings, options), "--activations", activations]
    tokenizer = load_tokenizer(layout)
    tokens = prompt_tokens(tokenizer, prompt)
    config = read_foreign_object(layout / CONFIG_FILE)
    limit = config.get("max_position_embeddings")
    require_room(tokens, options, limit if isinstance(limit, int) else None)
    arguments += ["--context", str(len(tokens) + options.max_new_tokens)]
    stops = _stop_tokens(layout, config)
    if stops:
        arguments += ["--stop", ",".join(map(str, stops))]
    stream = _Stream(tokenizer, on_text)
    started = time.perf_counter()
    with quiet_transformers(), _profile(settings.device) as profile:
        arguments += profile
        answer = run_engine(program, layout, arguments, tokens, options.max_new_tokens, stream.add)
        text = stream.end()
    first, rest = (_phase(answer.figures[name]) for name in ("prompt", "tokens"))
    load_seconds = max(time.perf_counter() - started - first.seconds - rest.seconds, 0.0)
    return Generated(text, tokens, answer.tokens, first, rest), _memory(answer), answer.model, load_seconds


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


def _stop_tokens(layout: Path, config: dict[str, Any]) -> list[int]:
    """The tokens that end a text, from the generation config as transformers reads it."""
    path = layout / _GENERATION_FILE
    stated = (read_foreign_object(path) if path.is_file() else config).get("eos_token_id")
    listed = stated if isinstance(stated, list) else [stated]
    return [token for token in listed if isinstance(token, int) and token >= 0]


def _phase(figures: dict[str, Any]) -> Phase:
    names = ("looked_up", "hits", "reads", "bytes_read", "bytes_useful", "io_seconds")
    counters = FlashCounters(**{name: figures[name] for name in names}, fetch_seconds=figures["io_seconds"])
    return Phase(figures["tokens"], figures["seconds"], counters)


def _memory(answer: CAnswer) -> Memory:
    of = answer.memory
    return Memory(
        flash_bytes=of["flash_bytes"],
        cache_bytes=of["cache_bytes"],
        resident_bytes=of["resident_bytes"],
        dense_bytes=of["dense_bytes"],
        working_bytes=of["working_bytes"] + of["tables_bytes"],
        sequence_bytes=of["sequence_bytes"],
        programs_bytes=of["programs_bytes"],
        peak_bytes=answer.figures["peak_bytes"],
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
