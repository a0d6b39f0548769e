"""Where and how transformers runs a model. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass

# The precisions that a model can run in, and the values of --dtype.
COMPUTE_DTYPES = ("float32", "bfloat16", "float16")
DTYPES = ("auto", *COMPUTE_DTYPES)
# Those of `run`, where "auto" is what the dense weights have and not the default.
RUN_DTYPES = (*COMPUTE_DTYPES, "auto")


@dataclass(frozen=True)
class ExecutionOptions:
    """Where and how a model runs.

    Attributes:
        device: As torch spells it ("cpu", "cuda:1", "mps"); "auto" takes a GPU if there is one.
        dtype: One of `DTYPES`, the precision of the forward pass; "auto" is float32 on the CPU and the checkpoint's
            own elsewhere.
        max_memory: Bytes of RAM for weights; None for most of the free RAM.
        trust_remote_code: Run code that comes with the model. Dangerous.
        ignore_remote_code: Run what transformers has for the model's type instead of the code that comes with it.
    """

    device: str = "auto"
    dtype: str = "auto"
    max_memory: int | None = None
    trust_remote_code: bool = False
    ignore_remote_code: bool = False
