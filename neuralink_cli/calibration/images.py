"""Calibration images: found, turned into the pixel values of a vision model, and kept in an unnamed temporary file."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from glob import escape
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from neuralink_cli.arrays import Bytes
from neuralink_cli.calibration.batches import ModelBatch, image_batch
from neuralink_cli.calibration.digests import sequence_digest
from neuralink_cli.calibration.local_rows import UnreadableRow
from neuralink_cli.calibration.rows import Rows, local_name, numbered, open_rows, streamed_table
from neuralink_cli.calibration.sampling import draw
from neuralink_cli.calibration.sources import Source
from neuralink_cli.errors import InputError, OptionError, first_line
from neuralink_cli.files.durable import named_output, write_all
from neuralink_cli.files.input_file import require_reachable, require_regular
from neuralink_cli.models.hf_packages import require_hf_packages

Pixels = npt.NDArray[np.float32]
IMAGE_SUFFIXES = frozenset((".png", ".jpg", ".jpeg", ".webp", ".bmp"))


def load_image_processor(directory: Path) -> Any:
    """The image processor of a checkpoint, which turns images into pixel values.

    Raises:
        InputError: The checkpoint has no image processor, or it cannot be loaded.
        MissingDependencyError: Pillow is not installed.
    """
    require_hf_packages("PIL", "transformers")
    from transformers import AutoImageProcessor

    if not (directory / "preprocessor_config.json").is_file():
        raise InputError("has no preprocessor_config.json, so images cannot be prepared for it", where=directory)
    try:
        return AutoImageProcessor.from_pretrained(str(directory), local_files_only=True)
    except Exception as error:
        problem = f"transformers cannot load its image processor ({first_line(error)})"
        raise InputError(problem, where=directory) from error


def open_images(dataset: str, split: str) -> Rows:
    """Open a dataset of images: a folder, an image file, a .parquet file with an image column, or a hub id.

    Raises:
        InputError: The dataset does not exist or cannot be read.
    """
    require_hf_packages("PIL", "datasets")
    path = Path(dataset)
    require_reachable(path)
    builder = "parquet" if path.suffix.lower() == ".parquet" and path.is_file() else "imagefolder"
    if builder == "imagefolder" and not path.is_dir() and path.suffix.lower() not in IMAGE_SUFFIXES:
        return open_rows(dataset, split, wanted=())
    if not path.exists():
        raise InputError("no such file", where=dataset, fix="check its path")
    for image in path.rglob("*") if path.is_dir() else (path,):
        if image.suffix.lower() in IMAGE_SUFFIXES and not image.is_dir():
            require_regular(image)
    pattern = f"{escape(str(path.absolute()))}/**" if path.is_dir() else escape(str(path.absolute()))
    table = streamed_table(builder, dataset, pattern)
    return Rows(local_name(path.absolute()), dataset, False, None, None, None, True, lambda: numbered(table))


class ImageSource(Source):
    """A dataset of images. The pixel values are in an unnamed file, which is deleted with the source."""

    def __init__(
        self,
        name: str,
        sha256: str,
        tokens: int,
        digests: Bytes,
        parameters: Mapping[str, Any],
        pixels: npt.NDArray[np.float32],
    ) -> None:
        super().__init__(name, sha256, (tokens,) * pixels.shape[0], digests, parameters)
        self._pixels = pixels

    def batch_of(self, sequences: Sequence[int]) -> ModelBatch:
        """Some of the images."""
        return image_batch(np.array(self._pixels[list(sequences)]), self.lengths[0])


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
    """Make a source from the first images of a dataset.

    Args:
        count_tokens: How many tokens the model makes from an image, float32 `[1, channels, height, width]`.
        parameters: The parameters of the run that can change the trace's bits; the dataset's own are added.
        max_tokens: Take images up to this many tokens, but at least one image.
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
    digest, images, tokens, shape = hashlib.sha256(), 0, 0, (0, 0, 0)
    digests: list[Bytes] = []
    folder = Path(tempfile.gettempdir())
    with named_output(folder):
        file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115
    for pixels in _chosen(rows, processor, num_samples, seed):
        if images == 0:
            tokens, shape = count_tokens(pixels[None]), pixels.shape
        elif max_tokens is not None and (images + 1) * tokens > max_tokens:
            break
        if pixels.shape != shape:
            raise InputError(
                f"its images have different shapes after processing: {list(shape)} and {list(pixels.shape)}",
                where=rows.where,
            )
        digest.update(pixels.data)
        digests.append(sequence_digest(pixels.data))
        with named_output(folder):
            write_all(file, pixels.data.cast("B"))
        images += 1
        advance(tokens)
    if images == 0:
        raise InputError("has no rows", where=rows.where)
    stored = np.memmap(file, dtype=np.float32, mode="r", shape=(images, *shape))
    return ImageSource(rows.name, digest.hexdigest(), tokens, np.stack(digests), {**own, **parameters}, stored)


def random_images(processor: Any, count: int) -> Pixels:
    """Images of noise for comparing models, always the same: float32 `[count, channels, height, width]`."""
    from PIL import Image

    random = np.random.default_rng(0)
    noise = random.integers(0, 256, (count, 64, 64, 3), dtype=np.uint8)
    return np.stack([_pixels(Image.fromarray(image), processor) for image in noise])


def _chosen(rows: Rows, processor: Any, count: int | None, seed: int | None) -> Iterator[Pixels]:
    """The pixels of the first images, or of images drawn from all of them."""
    if seed is None:
        yield from (_pixels(image, processor) for image in islice(_images(rows), count))
        return
    shapes: list[tuple[int, ...]] = []

    def packed(image: Any) -> bytes:
        pixels = _pixels(image, processor)
        shapes.append(pixels.shape)
        if pixels.shape != shapes[0]:
            raise InputError(f"images come out as {list(shapes[0])} and {list(pixels.shape)}", where=rows.where)
        return pixels.tobytes()

    records = ((number, partial(packed, image)) for number, image in enumerate(_images(rows)))
    for data in draw(records, seed, count):
        yield np.frombuffer(bytearray(data), dtype=np.float32).reshape(shapes[0])


def _images(rows: Rows) -> Iterator[Any]:
    from PIL import Image

    column = None
    for _place, row in rows:
        if isinstance(row, UnreadableRow):
            continue
        if column is None:
            column = next((name for name, value in row.items() if isinstance(value, Image.Image)), None)
            if column is None:
                columns = ", ".join(map(repr, row))
                raise InputError(f"has no image column, only {columns}", where=rows.where)
        yield row[column]


def _pixels(image: Any, processor: Any) -> Pixels:
    values = processor(image.convert("RGB"), return_tensors="np")["pixel_values"]
    return np.ascontiguousarray(values[0], dtype=np.float32)


def require_image_options(packing: bool | None, text_columns: tuple[str, ...]) -> None:
    """Refuse options that are only for texts.

    Raises:
        OptionError: Such an option was given.
    """
    if packing or text_columns != ("text",):
        raise OptionError("--packing and --text-column are for texts, but this model takes images")
