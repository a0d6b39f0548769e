"""One run of a layout: generate text, measure, compare with the dense checkpoint. Imports torch when it starts."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neuralink_cli.architectures.architecture import Architecture
from neuralink_cli.architectures.choice import BUILT_IN, ArchitectureChoice, choose_architecture
from neuralink_cli.architectures.coverage import Coverage
from neuralink_cli.checkpoint.checkpoint import Checkpoint
from neuralink_cli.checkpoint.hub import find_model
from neuralink_cli.errors import InputError, MismatchError, OptionError, UnsupportedError
from neuralink_cli.files.free_memory import resident_bytes
from neuralink_cli.layout.open_layout import coverage_of, describe_source, open_layout
from neuralink_cli.layout.plan import FlashBlock
from neuralink_cli.models.hf_packages import require_hf_packages
from neuralink_cli.runtime.engines import FLOATS, ROUNDED, TORCH, C
from neuralink_cli.sparse_models.memory import Memory, sequence_bytes, tell_needs
from neuralink_cli.sparse_models.settings import (
    GenerationOptions,
    RunSettings,
    compute_dtype,
    is_exact,
    require_runnable,
)

if TYPE_CHECKING:
    from neuralink_cli.calibration.sequences import TokenIds
    from neuralink_cli.runtime.dense_comparison import DenseComparison
    from neuralink_cli.runtime.generated import Generated, Phase
    from neuralink_cli.runtime.likelihood import Perplexity


# Tokens per sequence for perplexity, if the model has that many positions.
PERPLEXITY_LENGTH = 512


@dataclass(frozen=True)
class RunRequest:
    """What to run.

    Attributes:
        prompt: Text to continue; None to generate nothing.
        generation: How to continue it.
        compare: The checkpoint that the layout was made from; a string may be a hub id, see `find_model`.
        compare_revision: Branch, tag or commit of a hub model to compare with.
        engine: `torch`, or `c` for the runtime in C.
        engine_path: The program of the runtime in C; None to look for it.
        activations: `f32`; or with the runtime in C `int8`, to round them where weights are in block formats.
        perplexity_text: Text to measure perplexity on, its first `perplexity_tokens` tokens; None for no perplexity.
    """

    layout: Path
    settings: RunSettings
    prompt: str | None = None
    generation: GenerationOptions = GenerationOptions()
    compare: str | Path | None = None
    compare_revision: str | None = None
    perplexity_text: str | None = None
    perplexity_tokens: int = 4096
    architecture: ArchitectureChoice = BUILT_IN
    engine: str = TORCH
    engine_path: Path | None = None
    activations: str = FLOATS


@dataclass(frozen=True)
class RunReport:
    """Results of a run.

    `coverage`: of the source's FFN weights, by the blocks of the layout; `exact`: no threshold was calibrated;
    `direct`: reads went past the page cache; `dtype`: what it was computed in.
    """

    coverage: Coverage
    exact: bool
    direct: bool
    dtype: str
    load_seconds: float
    memory: Memory
    generated: Generated | None
    perplexity: Perplexity | None
    comparison: DenseComparison | None = None

    def as_document(self) -> dict[str, Any]:
        """The JSON document of `--json`."""
        generated, compared = self.generated, self.comparison
        return {
            "coverage": asdict(self.coverage),
            "exact": self.exact,
            "direct": self.direct,
            "dtype": self.dtype,
            "load_seconds": self.load_seconds,
            "dram": self.memory.as_document(),
            "text": None if generated is None else generated.text,
            "prompt_tokens": None if generated is None else list(generated.prompt_tokens),
            "new_tokens": None if generated is None else list(generated.new_tokens),
            "prompt": None if generated is None else phase_document(generated.prompt_phase),
            "tokens": None if generated is None else phase_document(generated.token_phase),
            "perplexity": None if self.perplexity is None else asdict(self.perplexity),
            "comparison": None if compared is None else asdict(compared),
        }


def phase_document(phase: Phase) -> dict[str, Any]:
    """A phase's figures, in total and per token; the tokens of a prompt are computed together and share neurons."""
    counters, tokens = phase.counters, max(phase.tokens, 1)
    return {
        "tokens": phase.tokens,
        "seconds": phase.seconds,
        "tokens_per_second": phase.tokens_per_second,
        "io_share": phase.io_share,
        "hit_rate": counters.hit_rate,
        "neurons_per_token": counters.looked_up / tokens,
        "reads_per_token": counters.reads / tokens,
        "bytes_read_per_token": counters.bytes_read / tokens,
        "bytes_useful_per_token": counters.bytes_useful / tokens,
    }


@dataclass(frozen=True)
class _Subject:
    architecture: Architecture
    blocks: tuple[FlashBlock, ...]
    coverage: Coverage
    exact: bool
    dtype: str
    dense: Path | None


def run_layout(request: RunRequest, on_text: Callable[[str], None] | None = None) -> RunReport:
    """Run a layout as asked. The sparse model is freed before the dense one is loaded.

    Args:
        on_text: Called with the text as it comes, by the runtime in C.

    Raises:
        OptionError: Nothing to do, or options that cannot be combined or do not fit this layout.
        InputError, VerificationError, UnsupportedError: The layout, the text or the model cannot be used.
        MismatchError: `compare` is not the checkpoint that the layout was made from.
        MissingDependencyError: The packages of the extra `hf` are not installed.
        WorkerError: The program of the runtime in C ended.
    """
    if request.prompt is None and request.perplexity_text is None:
        raise OptionError("there is nothing to do", fix="pass a prompt, or a text to measure perplexity on")
    if request.compare is None and request.compare_revision is not None:
        raise OptionError("--revision is for the model of --compare", fix="pass --compare, or leave out --revision")
    if request.compare is not None and request.generation.temperature > 0:
        raise OptionError("tokens drawn at random cannot be compared", fix="leave out --temperature or --compare")
    if request.engine != C and request.engine_path is not None:
        raise OptionError("--engine-path is for the runtime in C", fix="pass --engine c, or leave out --engine-path")
    if request.activations == ROUNDED and request.engine != C:
        raise OptionError("--activations int8 is for the runtime in C", fix="pass --engine c, or leave it out")
    if request.activations == ROUNDED and request.compare is not None:
        raise OptionError(
            "with rounded activations tokens need not be those of the dense checkpoint",
            fix="leave out --activations or --compare",
        )
    subject = _check(request)
    sequences: list[TokenIds] = []
    if request.engine == C:
        require_hf_packages("transformers")
        report, sequences = _run_in_c(request, subject, on_text)
    else:
        require_hf_packages("torch", "transformers")
        report, sequences = _run_sparse(request, subject)
    if subject.dense is None:
        return report
    gc.collect()
    from neuralink_cli.runtime.dense_comparison import compare_with_dense

    comparison = compare_with_dense(
        subject.dense,
        subject.architecture,
        subject.blocks,
        report.generated,
        request.generation,
        sequences,
        exact=report.exact,
        dtype=subject.dtype,
        ignore_remote_code=request.settings.ignore_remote_code,
    )
    return replace(report, comparison=comparison)


def _check(request: RunRequest) -> _Subject:
    with open_layout(request.layout) as opened:
        layout = require_runnable(opened)
        if request.compare is not None and not layout.exact:
            raise OptionError(
                "its weights are rounded, so its tokens need not be those of the dense checkpoint",
                where=layout.directory,
                fix="compare predictions with `neuralink verify --forward --text FILE`",
            )
        model_type = layout.index.document["model"]["model_type"]
        architecture = choose_architecture(describe_source(layout), request.architecture)
        if architecture.task != "causal-lm":
            raise UnsupportedError(
                f"is an encoder ({model_type}), which cannot generate text",
                where=request.layout,
                fix="run it from Python with neuralink_cli.load_flash_model",
            )
        dense = None
        if request.compare is not None:
            dense = find_model(request.compare, request.compare_revision).directory
            with Checkpoint(dense) as checkpoint:
                if checkpoint.fingerprint != layout.fingerprint:
                    raise MismatchError(
                        f"has fingerprint {checkpoint.fingerprint[:12]}, but the layout {request.layout} is made "
                        f"from a checkpoint with {layout.fingerprint[:12]}",
                        where=request.compare,
                    )
        dtype = compute_dtype(request.settings.dtype, layout)
        return _Subject(architecture, layout.index.blocks, coverage_of(layout), is_exact(layout), dtype, dense)


def _run_in_c(
    request: RunRequest, subject: _Subject, on_text: Callable[[str], None] | None
) -> tuple[RunReport, list[TokenIds]]:
    from neuralink_cli.runtime.c_session import positions_of, run_in_c

    sequences = _sequences(request, positions_of(request.layout))
    run = run_in_c(
        request.layout,
        request.prompt,
        sequences,
        request.settings,
        request.generation,
        request.engine_path,
        on_text,
        activations=request.activations,
    )
    report = RunReport(
        coverage=subject.coverage,
        exact=subject.exact,
        direct=run.facts["direct"],
        dtype="float32",
        load_seconds=run.load_seconds,
        memory=run.memory,
        generated=run.generated,
        perplexity=run.perplexity,
    )
    return report, sequences


def _run_sparse(request: RunRequest, subject: _Subject) -> tuple[RunReport, list[TokenIds]]:
    from neuralink_cli.models.loading import max_positions
    from neuralink_cli.models.tokenizer import load_tokenizer
    from neuralink_cli.runtime.generation import encode_prompt, generate
    from neuralink_cli.runtime.perplexity import perplexity
    from neuralink_cli.sparse_models.loading import load_with_settings

    started = time.perf_counter()
    tokenizer = load_tokenizer(request.layout)
    with load_with_settings(request.layout, request.settings, subject.architecture) as model:
        load_seconds = time.perf_counter() - started
        weights = model.flash
        generated = None
        sequences = _sequences(request, max_positions(model))
        prompt = None
        if request.prompt is not None:
            prompt = encode_prompt(model, tokenizer, request.prompt, request.generation)
        planned_tokens = 0 if prompt is None else len(prompt) + request.generation.max_new_tokens
        tell_needs(_memory(model, subject, planned_tokens, sequences))
        if prompt is not None:
            generated = generate(model, tokenizer, prompt, request.generation, lambda: weights.counters)
        found = perplexity(model, sequences) if sequences else None
        report = RunReport(
            coverage=subject.coverage,
            exact=subject.exact,
            direct=weights.reader.direct,
            dtype=subject.dtype,
            load_seconds=load_seconds,
            memory=_memory(model, subject, 0 if generated is None else generated.tokens, sequences),
            generated=generated,
            perplexity=found,
        )
    return report, sequences


def _memory(model: Any, subject: _Subject, tokens: int, sequences: list[TokenIds]) -> Memory:
    """What a run holds that generates up to `tokens` tokens, prompt included, and measures on some sequences."""
    peak = resident_bytes()
    weights = model.flash
    config, size = model.config.get_text_config(), model.dtype.itemsize
    longest = sequence_bytes(config, subject.blocks, tokens, size, whole=False) if tokens else 0
    if sequences:
        tokens = max(sequence.size for sequence in sequences)
        longest = max(longest, sequence_bytes(config, subject.blocks, tokens, size, whole=True))
    return Memory(
        flash_bytes=weights.flash_bytes,
        cache_bytes=weights.cache_bytes,
        resident_bytes=weights.resident_bytes,
        dense_bytes=weights.dense_bytes,
        working_bytes=weights.working_bytes,
        sequence_bytes=longest,
        programs_bytes=weights.programs_bytes,
        peak_bytes=peak,
    )


def _sequences(request: RunRequest, positions: int | None) -> list[TokenIds]:
    """What perplexity is measured on, for a model with so many positions (None: no limit)."""
    if request.perplexity_text is None:
        return []
    from neuralink_cli.calibration.readers import read_token_sequences

    length = min(PERPLEXITY_LENGTH, positions or PERPLEXITY_LENGTH, request.perplexity_tokens)
    wanted = -(-request.perplexity_tokens // length)
    found = read_token_sequences(request.layout, request.perplexity_text, sequences=wanted, length=length)
    found[-1] = found[-1][: request.perplexity_tokens - length * (len(found) - 1)]
    if all(sequence.size < 2 for sequence in found):
        raise InputError("the text to measure perplexity on has fewer than two tokens")
    return found
