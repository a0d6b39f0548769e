"""The calibration data of a run: opened before the model is loaded, read once the model is there."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path
from typing import Any

from neuralink_cli.calibration.batches import TextBatch, encoder_decoder_batch, text_batch
from neuralink_cli.calibration.images import (
    load_image_processor,
    open_images,
    prepare_images,
    require_image_options,
)
from neuralink_cli.calibration.options import DEFAULT_SEQUENCE_LENGTH, CalibrationOptions
from neuralink_cli.calibration.sequences import SequenceOptions, TokenIds, tokenize
from neuralink_cli.calibration.sources import CalibrationData, plan, tokenize_source
from neuralink_cli.calibration.texts import CorpusOptions, Sample, open_corpus
from neuralink_cli.checkpoint.config import stated_positions
from neuralink_cli.checkpoint.file_names import CONFIG_FILE
from neuralink_cli.errors import InputError
from neuralink_cli.files.json_text import read_foreign_object
from neuralink_cli.models.hf_packages import quiet_transformers, require_hf_packages
from neuralink_cli.progress import Progress

logger = logging.getLogger(__name__)

# Tasks whose samples may be packed.
PACKED_TASKS = ("causal-lm", "seq2seq")


class TextReader:
    """The texts of a run: opened by the constructor, tokenized once the model is loaded."""

    def __init__(self, options: CalibrationOptions, directory: Path, task: str, *, trust_remote_code: bool) -> None:
        from neuralink_cli.models.tokenizer import load_tokenizer

        self._options = options
        self._task = task
        self._tokenizer = load_tokenizer(directory, trust_remote_code=trust_remote_code)
        of_corpus = CorpusOptions(options.text_columns, options.split, options.num_samples, options.seed)
        self._corpora = [open_corpus(dataset, of_corpus, self._tokenizer) for dataset in options.datasets]

    def read(self, model: Any, progress: Progress) -> CalibrationData:
        """Tokenize all texts and plan the batches."""
        from neuralink_cli.models.loading import max_positions

        options = self._options
        packing = self._task in PACKED_TASKS if options.packing is None else options.packing
        length = _sequence_length(options.max_seq_length, max_positions(model))
        sequences = SequenceOptions(length, packing, options.max_tokens)
        vocabulary = int(model.get_input_embeddings().weight.shape[0])
        # Padding is masked and never recorded, so any token that the model knows will do.
        pad_ids = [token for token in (self._tokenizer.pad_token_id, self._tokenizer.eos_token_id) if token is not None]
        pad_id = next((token for token in pad_ids if token < vocabulary), 0)
        with progress("tokenizing", None, "token") as advance:
            sources = [
                tokenize_source(
                    corpus,
                    sequences,
                    _run_parameters(options, model),
                    self._to_batch(model, pad_id),
                    vocabulary=vocabulary,
                    pad_id=pad_id,
                    advance=advance,
                )
                for corpus in self._corpora
            ]
        return plan(sources, options.batch_size, packing)

    def _to_batch(self, model: Any, pad_id: int) -> TextBatch:
        if self._task != "seq2seq":
            return text_batch
        start = getattr(model.config, "decoder_start_token_id", None)
        return encoder_decoder_batch(pad_id if start is None else start)


class ImageReader:
    """The images of a run: opened by the constructor, prepared once the model is loaded."""

    def __init__(self, options: CalibrationOptions, directory: Path) -> None:
        require_image_options(options.packing, options.text_columns)
        self._options = options
        self._processor = load_image_processor(directory)
        self._rows = [open_images(dataset, options.split) for dataset in options.datasets]

    def read(self, model: Any, progress: Progress) -> CalibrationData:
        """Prepare all images and plan the batches."""
        from neuralink_cli.models.loading import count_image_tokens

        options = self._options
        with progress("preparing images", None, "token") as advance:
            sources = [
                prepare_images(
                    rows,
                    self._processor,
                    partial(count_image_tokens, model),
                    _run_parameters(options, model),
                    num_samples=options.num_samples,
                    seed=options.seed,
                    max_tokens=options.max_tokens,
                    advance=advance,
                )
                for rows in self._rows
            ]
        return plan(sources, options.batch_size, packing=False)


def _run_parameters(options: CalibrationOptions, model: Any) -> dict[str, Any]:
    """The parameters that can change the trace's bits for any dataset."""
    from neuralink_cli.models.offload import input_device

    return {
        "batch_size": options.batch_size,
        "device": input_device(model).type,
        "dtype": str(model.dtype).removeprefix("torch."),
    }


def _sequence_length(asked: int | None, limit: int | None) -> int:
    wanted = asked or DEFAULT_SEQUENCE_LENGTH
    if limit is None or wanted <= limit:
        return wanted
    if asked is not None:
        logger.warning("sequences are cut to %d tokens, the most positions that the model has", limit)
    return limit


def read_token_sequences(
    directory: Path, text: str, *, sequences: int = 4, length: int = 64, trust_remote_code: bool = False
) -> list[TokenIds]:
    """Tokenize the start of a text into at most `sequences` sequences of `length` tokens.

    A model with fewer positions gets the same tokens in more sequences.

    Raises:
        InputError: The text has no tokens, or the tokenizer cannot be loaded.
        MissingDependencyError: The packages of the extra `hf` are not installed.
    """
    require_hf_packages("transformers")
    from neuralink_cli.models.tokenizer import load_tokenizer

    positions = stated_positions(read_foreign_object(directory / CONFIG_FILE))
    fitting = length if positions is None else min(length, positions)
    with quiet_transformers():
        tokenizer = load_tokenizer(directory, trust_remote_code=trust_remote_code)
        options = SequenceOptions(fitting, packing=True, max_tokens=sequences * length)
        found = [sequence.ids for sequence in tokenize([Sample(text)], tokenizer, options)]
    if not found:
        raise InputError("the text to compare outputs on has no tokens", where=directory)
    return found
