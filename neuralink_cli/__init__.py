"""neuralink: co-activation-ordered flash layouts for sparse LLM inference."""

__version__ = "0.1.0"
