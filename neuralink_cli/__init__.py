"""neuralink: co-activation-ordered flash layouts for sparse LLM inference."""

from __future__ import annotations

__version__ = "0.1.0"
