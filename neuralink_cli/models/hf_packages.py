"""The packages of the extra `hf`: a clear message if one is missing, and no output of their own while they run."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator

from neuralink_cli.checkpoint.hub import quiet_hub
from neuralink_cli.errors import MissingDependencyError


def require_hf_packages(*names: str) -> None:
    """Check that packages can be imported.

    Raises:
        MissingDependencyError: A package cannot be imported.
    """
    try:
        for name in names:
            importlib.import_module(name)
    except ImportError as error:
        raise MissingDependencyError(
            f"this needs the Python packages {', '.join(names)} ({error})",
            fix="pip install 'neuralink-cli[hf]'",
        ) from None


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence the progress bars and warnings of transformers within the block."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


@contextlib.contextmanager
def quiet_datasets() -> Iterator[None]:
    """Silence datasets and huggingface_hub within the block: they raise their errors, so logs would repeat them."""
    from datasets.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        with quiet_hub():
            yield
    finally:
        logging.set_verbosity(verbosity)
