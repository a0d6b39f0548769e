"""Options for calibration data: the datasets, and how their samples become batches of tokens."""

from __future__ import annotations

from dataclasses import dataclass

from neuralink_cli.errors import OptionError

DEFAULT_SEQUENCE_LENGTH = 512


@dataclass(frozen=True)
class CalibrationOptions:
    """Calibration data, and how it becomes batches.

    Attributes:
        datasets: Files, or datasets of the Hugging Face hub as `NAME[:CONFIG][@REVISION]`.
        text_columns: Columns with text. The columns that a row has are joined by newlines.
        split: The split of hub datasets.
        num_samples: Most samples of each dataset; None for all.
        max_tokens: Most tokens of each dataset; None for all.
        max_seq_length: Most tokens of a sequence; None for 512, or fewer if the model has fewer positions.
        packing: Whether samples are joined into sequences of full length; None packs for models that generate text.
        batch_size: Most sequences per batch.
        seed: Draws samples at random from the whole dataset; None keeps the order of the file.

    Raises:
        OptionError: A value is out of range, or something is missing.
    """

    datasets: tuple[str, ...]
    text_columns: tuple[str, ...] = ("text",)
    split: str = "train"
    num_samples: int | None = None
    max_tokens: int | None = None
    max_seq_length: int | None = None
    packing: bool | None = None
    batch_size: int = 8
    seed: int | None = None

    def __post_init__(self) -> None:
        if not self.datasets:
            raise OptionError("no calibration data", fix="pass some with --dataset")
        if not self.text_columns:
            raise OptionError("no text column", fix="pass one with --text-column")
        for name in ("num_samples", "max_tokens", "max_seq_length", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise OptionError(f"--{name.replace('_', '-')} {value} is not at least 1")
