"""What a running model holds in memory: the sum of its parts, beside what the process was measured to take."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from neuralink_cli.files.free_memory import remark_if_short, with_margin
from neuralink_cli.layout.plan import FlashBlock
from neuralink_cli.sizes import human_bytes

logger = logging.getLogger(__name__)

# While bundles are fetched: the result, what is read (more than is asked for), and what is taken from it.
_FETCHING = 4
# Values of every neuron of a block that a model's code holds at the same time: gate, activated gate, up, product.
_VALUES = 4


@dataclass(frozen=True)
class Memory:
    """Bytes of a run.

    Attributes:
        flash_bytes: Of the bundles in flash, which are not in memory.
        cache_bytes: Cached bundles.
        resident_bytes: Rows that decide firing, and biases.
        dense_bytes: All weights outside FFN blocks. Those in the dtype that is computed with are mapped from the file.
        working_bytes: The most that fetching and decoding neurons takes.
        sequence_bytes: Attention cache, and values of the longest sequence; as far as the model's config tells.
        programs_bytes: Interpreter, libraries and kernels: what the process had taken before it loaded weights.
            Measured.
        peak_bytes: The most that the process has had resident, mapped pages included. Measured.
    """

    flash_bytes: int
    cache_bytes: int
    resident_bytes: int
    dense_bytes: int
    working_bytes: int
    sequence_bytes: int
    programs_bytes: int
    peak_bytes: int

    @property
    def planned_bytes(self) -> int:
        """The sum of the parts in memory."""
        weights = self.cache_bytes + self.resident_bytes + self.dense_bytes
        return weights + self.working_bytes + self.sequence_bytes + self.programs_bytes

    @property
    def needed_bytes(self) -> int:
        """The most that a model takes that is loaded: what is planned, or more if loading has taken more already.

        What Python and torch keep of a block is no part of the plan, and counts where there are thousands of experts.
        """
        return max(self.planned_bytes, self.peak_bytes + self.working_bytes + self.sequence_bytes)

    def as_document(self) -> dict[str, int]:
        """For the JSON document of a run."""
        return {**asdict(self), "planned_bytes": self.planned_bytes}


def tell_needs(memory: Memory) -> None:
    """Log roughly how much memory a run is about to take."""
    needed = with_margin(memory.needed_bytes)
    logger.info(
        "takes about %s of memory (%s of cached neurons, %s of other weights, %s to compute, the rest for programs)",
        human_bytes(needed),
        human_bytes(memory.cache_bytes),
        human_bytes(memory.resident_bytes + memory.dense_bytes),
        human_bytes(memory.working_bytes + memory.sequence_bytes),
    )
    remark_if_short(needed)


def neuron_bytes(block: FlashBlock, element_bytes: int) -> int:
    """The most that a neuron takes in memory while it is fetched, decoded and computed with.

    Args:
        element_bytes: Of a weight that is computed with.
    """
    decoded = len(block.parts) * block.hidden * element_bytes
    # Rounded weights become float32 first, part by part.
    return max(_FETCHING * block.stride, block.stride + decoded + 4 * block.hidden)


def sequence_bytes(config: Any, blocks: Sequence[FlashBlock], tokens: int, element_bytes: int, *, whole: bool) -> int:
    """What a sequence takes beside the weights, as far as a config of transformers tells.

    Args:
        config: Of the text model.
        whole: Whether the logits of all tokens are computed at once, as for perplexity; else there is an attention
            cache.
        element_bytes: Of a value that is computed with.
    """

    def stated(of: Any, *names: str) -> int:
        found = (getattr(of, name, None) for name in names)
        return next((value for value in found if isinstance(value, int) and value > 0), 0)

    def cached_in(layer: Any) -> int:
        heads = stated(layer, "num_attention_heads", "n_head", "n_heads")
        width = stated(layer, "head_dim") or stated(layer, "hidden_size", "n_embd", "d_model") // max(heads, 1)
        return 2 * (stated(layer, "num_key_value_heads") or heads) * width

    # Where layers differ, transformers lets their sizes be read from the config of each layer alone.
    differ = getattr(config, "is_heterogeneous", False)
    layers = (
        config.per_layer_config if differ else [config] * stated(config, "num_hidden_layers", "n_layer", "n_layers")
    )
    cached = sum(map(cached_in, layers))
    values = _VALUES * max(block.neurons for block in blocks)
    each = max(values, stated(config, "vocab_size")) if whole else cached + values
    return tokens * each * element_bytes
