"""Compares the outputs of two checkpoints on the same tokens, as float32."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt

from neuralink_cli.architectures.architecture import Architecture
from neuralink_cli.calibration.batches import ModelBatch, encoder_decoder_batch, image_batch, text_batch
from neuralink_cli.calibration.images import load_image_processor, random_images
from neuralink_cli.calibration.readers import read_token_sequences
from neuralink_cli.errors import MismatchError, OptionError
from neuralink_cli.models.hf_packages import quiet_transformers, require_hf_packages
from neuralink_cli.models.model_class import TASKS_WITH_HEAD, saved_without_head
from neuralink_cli.models.model_errors import no_numbers

Outputs = npt.NDArray[np.float32]
# What of a text models are run on, unless more is asked for.
SEQUENCES, SEQUENCE_LENGTH = 4, 64
Watching = Callable[[Any], AbstractContextManager[object]]


@dataclass(frozen=True)
class OutputComparison:
    """How far the outputs (logits, or the hidden states of a model without a head) of two models are apart.

    `reference_scale` is the largest absolute value of the original's outputs, `same_argmax` the share of tokens for
    which both have the same largest output. A model whose neurons were only reordered differs by rounding.
    """

    max_abs_difference: float
    reference_scale: float
    tokens: int
    same_argmax: float
    tolerance: float

    @property
    def agrees(self) -> bool:
        """Whether no output differs by more than `tolerance` of the scale; false if any is NaN."""
        return self.max_abs_difference <= self.tolerance * self.reference_scale


def compare_outputs(
    original: Path,
    other: Path,
    batches: Sequence[ModelBatch],
    architecture: Architecture,
    *,
    tolerance: float = 1e-4,
    device: str = "cpu",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    ignore_remote_code: bool = False,
    watching: Watching = nullcontext,
) -> OutputComparison:
    """Run two local checkpoints, one after the other, on the same batches, each of one sequence.

    Args:
        tolerance: What `OutputComparison.agrees` allows, as a share of the original's largest absolute output.
        watching: Makes a context from the original's model, in which it runs.

    Raises:
        InputError, OptionError: A model cannot be loaded, as `load_model`.
        InputError: The outputs of the original are not numbers.
        MismatchError: The outputs have different shapes.
        MissingDependencyError: The packages of the extra `hf` are not installed.
    """
    require_hf_packages("torch", "transformers")

    def outputs(directory: Path, watching: Watching) -> list[Outputs]:
        with quiet_transformers():
            return list(
                run_model(
                    directory, batches, architecture, device, dtype, trust_remote_code, ignore_remote_code, watching
                )
            )

    expected = outputs(original, watching)
    if not all(np.isfinite(a).all() for a in expected):
        raise no_numbers(original)
    found = outputs(other, nullcontext)
    for a, b in zip(expected, found, strict=True):
        if a.shape != b.shape:
            raise MismatchError(f"gives outputs of shape {b.shape}, but {original} of {a.shape}", where=other)
    same = sum(int((a.argmax(axis=1) == b.argmax(axis=1)).sum()) for a, b in zip(expected, found, strict=True))
    tokens = sum(a.shape[0] for a in expected)
    # With numpy the maximum of values with a NaN is NaN; with Python's own max it is not.
    return OutputComparison(
        max_abs_difference=float(np.max([np.abs(a - b).max() for a, b in zip(expected, found, strict=True)])),
        reference_scale=float(np.max([np.abs(a).max() for a in expected])),
        tokens=tokens,
        same_argmax=same / tokens,
        tolerance=tolerance,
    )


def comparison_batches(
    directory: Path,
    architecture: Architecture,
    text: str | None,
    *,
    sequences: int = SEQUENCES,
    length: int = SEQUENCE_LENGTH,
    trust_remote_code: bool = False,
) -> list[ModelBatch]:
    """What to compare the outputs of two models on: the start of a text, or images of noise.

    Args:
        sequences: At most this many of the text, of `length` tokens each.

    Raises:
        OptionError: The model reads text, but no text is given.
        InputError: As `read_token_sequences`, or the checkpoint does not say how to prepare images.
        MissingDependencyError: The packages of the extra `hf` are not installed.
    """
    if architecture.task == "image-encoder":
        processor = load_image_processor(directory)
        return [image_batch(image[None], 1) for image in random_images(processor, 4)]
    if text is None:
        raise OptionError("--forward needs text to run on", fix="pass --text FILE")
    to_batch = encoder_decoder_batch(0) if architecture.task == "seq2seq" else text_batch
    found = read_token_sequences(
        directory, text, sequences=sequences, length=length, trust_remote_code=trust_remote_code
    )
    return [to_batch(ids.astype(np.int64)[None], np.ones((1, ids.size), dtype=bool)) for ids in found]


def run_model(
    directory: Path,
    batches: Sequence[ModelBatch],
    architecture: Architecture,
    device: str,
    dtype: str,
    trust_remote_code: bool,
    ignore_remote_code: bool = False,
    watching: Watching = nullcontext,
) -> Iterator[Outputs]:
    """Outputs of a checkpoint for each batch, of one sequence: float32 `[tokens, outputs]`.

    Args:
        watching: Makes a context from the loaded model, in which it runs.

    Raises:
        InputError, OptionError: As `load_model`.
    """
    import torch

    from neuralink_cli.models.loading import load_model
    from neuralink_cli.models.model_errors import explained_model_errors, require_known_tokens, vocabulary_of
    from neuralink_cli.models.offload import MemoryLimit, explained_offloading, input_device

    with_head = architecture.task in TASKS_WITH_HEAD and not saved_without_head(directory, architecture.task)
    with TemporaryDirectory(prefix="neuralink-") as folder, ExitStack() as watched:
        model: Any = load_model(
            directory,
            architecture,
            with_head=with_head,
            device=device,
            dtype=dtype,
            limit=MemoryLimit(folder=Path(folder)),
            trust_remote_code=trust_remote_code,
            ignore_remote_code=ignore_remote_code,
        )
        watched.enter_context(watching(model))
        for batch in batches:
            inputs = {name: torch.from_numpy(array).to(input_device(model)) for name, array in batch.inputs.items()}
            if "input_ids" in batch.inputs:
                require_known_tokens(
                    batch.inputs["input_ids"].ravel(), vocabulary_of(model), "the text to compare outputs on"
                )
            with explained_model_errors(model), torch.inference_mode(), explained_offloading():
                output = model(**inputs)
            values = output.logits if with_head else output.last_hidden_state
            yield values[0].float().cpu().numpy()
        watched.close()
        # Free the model before the next: memory may hold only one.
        del model
    gc.collect()
