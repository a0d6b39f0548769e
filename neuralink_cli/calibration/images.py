"""Calibration images: found, made into what a vision model takes, and kept in a file without a name."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Iterator, Mapping
from glob import escape
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from neuralink_cli.calibration.batches import ModelBatch, image_batch
from neuralink_cli.calibration.rows import Rows, open_rows, streamed_table
from neuralink_cli.calibration.sources import Source
from neuralink_cli.errors import InputError, OptionError, first_line
from neuralink_cli.files.durable import named_output, write_all
from neuralink_cli.files.input_file import require_reachable, require_regular
from neuralink_cli.models.hf_packages import require_hf_packages

Pixels = npt.NDArray[np.float32]
IMAGE_SUFFIXES = frozenset((".png", ".jpg", ".jpeg", ".webp", ".bmp"))


def load_image_processor(directory: Path) -> Any:
    """What makes pixel values of an image, as the checkpoint describes it.

    Raises:
        InputError: There is no description, or it cannot be loaded.
        MissingDependencyError: Pillow is not installed.
    """
    require_hf_packages("PIL", "transformers")
    from transformers import AutoImageProcessor

    if not (directory / "preprocessor_config.json").is_file():
        raise InputError("has no preprocessor_config.json, so its images cannot be prepared", where=directory)
    try:
        return AutoImageProcessor.from_pretrained(str(directory), local_files_only=True)
    except Exception as error:
        problem = f"transformers cannot load its image processor ({first_line(error)})"
        raise InputError(problem, where=directory) from error


def open_images(dataset: str, split: str) -> Rows:
    """Open a dataset of images: a folder of them, an image, a .parquet file with a column of images, or a hub id.

    Raises:
        InputError: There is none, or it cannot be read.
    """
    require_hf_packages("PIL", "datasets")
    path = Path(dataset)
    require_reachable(path)
    if not path.is_dir() and path.suffix.lower() not in IMAGE_SUFFIXES:
        return open_rows(dataset, split)
    if not path.exists():
        raise InputError("no such file", where=dataset)
    for image in path.rglob("*") if path.is_dir() else (path,):
        if image.suffix.lower() in IMAGE_SUFFIXES and not image.is_dir():
            require_regular(image)
    pattern = f"{escape(str(path.absolute()))}/**" if path.is_dir() else escape(str(path.absolute()))
    return Rows(path.absolute().name, dataset, False, None, None, streamed_table("imagefolder", dataset, pattern))


class ImageSource(Source):
    """A dataset of images; the pixel values are in a file without a name, which is gone when the source is."""

    def __init__(
        self, name: str, sha256: str, tokens: int, parameters: Mapping[str, Any], pixels: npt.NDArray[np.float32]
    ) -> None:
        super().__init__(name, sha256, (tokens,) * pixels.shape[0], parameters)
        self._pixels = pixels

    def batch(self, first: int, stop: int) -> ModelBatch:
        """The images from `first` to `stop`."""
        return image_batch(np.array(self._pixels[first:stop]), self.lengths[0])


def prepare_images(
    rows: Rows,
    processor: Any,
    count_tokens: Callable[[Pixels], int],
    parameters: Mapping[str, Any],
    *,
    num_samples: int | None,
    seed: int | None,
    max_tokens: int | None,
    advance: Callable[[int], object],
) -> ImageSource:
    """Make a source of the first images of a dataset.

    Args:
        count_tokens: How many tokens the model makes of an image, float32 `[1, channels, height, width]`.
        parameters: Those of the run that can change the bits; the dataset's own are added.
        max_tokens: Take no more images than make so many tokens, but one at least.
        advance: Called with the number of tokens since the last call.

    Raises:
        InputError: A row without an image, or no rows.
    """
    own = {
        "split": rows.split,
        "revision": rows.revision,
        "num_samples": num_samples,
        "seed": seed,
        "max_tokens": max_tokens,
    }
    chosen = rows if seed is None else rows.shuffled(seed)
    digest, images, tokens, shape = hashlib.sha256(), 0, 0, (0, 0, 0)
    folder = Path(tempfile.gettempdir())
    with named_output(folder):
        file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115
    for pixels in (_pixels(image, processor) for image in islice(_images(chosen), num_samples)):
        if images == 0:
            tokens, shape = count_tokens(pixels[None]), pixels.shape
        elif max_tokens is not None and (images + 1) * tokens > max_tokens:
            break
        if pixels.shape != shape:
            raise InputError(f"images come out as {list(shape)} and {list(pixels.shape)}", where=rows.where)
        digest.update(pixels.data)
        with named_output(folder):
            write_all(file, pixels.data.cast("B"))
        images += 1
        advance(tokens)
    if images == 0:
        raise InputError("has no rows", where=rows.where)
    stored = np.memmap(file, dtype=np.float32, mode="r", shape=(images, *shape))
    return ImageSource(rows.name, digest.hexdigest(), tokens, {**own, **parameters}, stored)


def random_images(processor: Any, count: int) -> Pixels:
    """Images of noise, the same every time, to compare models on: float32 `[count, channels, height, width]`."""
    from PIL import Image

    random = np.random.default_rng(0)
    noise = random.integers(0, 256, (count, 64, 64, 3), dtype=np.uint8)
    return np.stack([_pixels(Image.fromarray(image), processor) for image in noise])


def _images(rows: Rows) -> Iterator[Any]:
    from PIL import Image

    column = None
    for row in rows:
        if column is None:
            column = next((name for name, value in row.items() if isinstance(value, Image.Image)), None)
            if column is None:
                columns = ", ".join(map(repr, row))
                raise InputError(f"has no column of images, its columns are {columns}", where=rows.where)
        yield row[column]


def _pixels(image: Any, processor: Any) -> Pixels:
    values = processor(image.convert("RGB"), return_tensors="np")["pixel_values"]
    return np.ascontiguousarray(values[0], dtype=np.float32)


def require_image_options(packing: bool | None, text_columns: tuple[str, ...]) -> None:
    """Refuse options that only texts have.

    Raises:
        OptionError: One was given.
    """
    if packing or text_columns != ("text",):
        raise OptionError("--packing and --text-column are for texts, and this model reads images")
