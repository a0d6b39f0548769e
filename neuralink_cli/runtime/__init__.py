"""Runs models whose FFN weights stay in flash. Beside `activations` the only package that imports torch, when used."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from neuralink_cli.runtime.loading import load_flash_model


__all__ = ["load_flash_model"]


def __getattr__(name: str) -> Any:
    """Import what is asked for only then: torch takes seconds."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    from neuralink_cli.runtime import loading

    return getattr(loading, name)
