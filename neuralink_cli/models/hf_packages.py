"""The packages of the extra `hf`: required with a clear message, and kept quiet while they work for us."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator

from neuralink_cli.checkpoint.hub import quiet_hub
from neuralink_cli.errors import MissingDependencyError


def require_hf_packages(*names: str) -> None:
    """Check that packages can be imported.

    Raises:
        MissingDependencyError: One cannot.
    """
    try:
        for name in names:
            importlib.import_module(name)
    except ImportError as error:
        raise MissingDependencyError(
            f"the Python packages {', '.join(names)} are needed for this ({error})",
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
    """Silence datasets, and the hub library below it, within the block: its errors are raised, and once is enough."""
    from datasets.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        with quiet_hub():
            yield
    finally:
        logging.set_verbosity(verbosity)
