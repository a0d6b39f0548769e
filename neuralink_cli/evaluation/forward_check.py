"""Runs a checkpoint and its layout on the same text, as `verify --forward` and a build do. Imports no torch itself."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neuralink_cli.architectures.choice import ArchitectureChoice, choose_architecture
from neuralink_cli.checkpoint.checkpoint import Checkpoint
from neuralink_cli.checkpoint.config import config_value
from neuralink_cli.checkpoint.model_description import describe
from neuralink_cli.errors import OptionError, VerificationError
from neuralink_cli.files.durable import require_space
from neuralink_cli.files.free_memory import remark_if_short
from neuralink_cli.layout.open_layout import open_layout
from neuralink_cli.layout.recall import GateRecall
from neuralink_cli.sizes import human_bytes

if TYPE_CHECKING:
    from neuralink_cli.architectures.architecture import Architecture
    from neuralink_cli.calibration.batches import ModelBatch
    from neuralink_cli.evaluation.model_distance import ModelDistance
    from neuralink_cli.evaluation.output_comparison import OutputComparison

logger = logging.getLogger(__name__)

# Keys of a config for the outputs of a token: logits, or else hidden states.
_WIDTHS = ("vocab_size", "hidden_size")
_ON_THE_WAY = 4
# Of the text for rounded weights, whose predictions are compared; of any other, see `comparison_batches`.
SEQUENCE_TOKENS = 128
DEFAULT_TOLERANCE = 1e-3
DEFAULT_TOKENS = 1024


@dataclass(frozen=True)
class ForwardOptions:
    """What two models are run on, and how far apart they may be.

    Attributes:
        text: Text to run on; None for a model of images, which runs on noise.
        tolerance: For an exact layout, the largest difference allowed, relative to the largest output.
        tokens: Tokens of the text, in sequences of 128, for a layout with rounded weights.
        max_perplexity_increase: For a layout with rounded weights, relative to the model (0.02 is 2 %); None for any.
        max_kl: For such a layout the largest mean KL divergence, in nats; None for any.
        trust_remote_code: As for `load_model`.
        ignore_remote_code: As for `load_model`.
    """

    text: Path | None
    tolerance: float = DEFAULT_TOLERANCE
    tokens: int = DEFAULT_TOKENS
    max_perplexity_increase: float | None = None
    max_kl: float | None = None
    trust_remote_code: bool = False
    ignore_remote_code: bool = False

    @property
    def limited(self) -> bool:
        """Whether it has a limit that only rounded weights can break."""
        return self.max_perplexity_increase is not None or self.max_kl is not None


def prepare_forward(
    model: Path, layout: Path, options: ForwardOptions, choice: ArchitectureChoice
) -> Callable[[], dict[str, Any]]:
    """What runs both models, once all that is quick to check is found to be right.

    Returns:
        A function that gives a `ModelDistance` if the layout has rounded weights, else an `OutputComparison`, as JSON.
        It raises VerificationError if they are too far apart, and MismatchError or UnsupportedError if the model does
        not compute what the layout says.

    Raises:
        OptionError: There is no text, it is too short, or limits for rounded weights are for a layout that has none.
        InputError: The text cannot be read, or what lies at one of the paths cannot.
        MissingDependencyError: The packages of the extra `hf` are not installed.
        OutputError: The layout as a checkpoint does not fit beside it.
    """
    from neuralink_cli.evaluation.output_comparison import comparison_batches
    from neuralink_cli.files.text_files import read_text
    from neuralink_cli.models.own_code import settle_own_code
    from neuralink_cli.profiling.preflight import comparing_needs
    from neuralink_cli.rewriting.restore import loadable_bytes

    with open_layout(layout) as opened:
        rounded, beside = not opened.exact, loadable_bytes(opened)
    require_space(layout, beside)
    if options.limited and not rounded:
        raise OptionError("--max-perplexity-increase and --max-kl are for layouts with rounded weights")
    with Checkpoint(model) as checkpoint:
        architecture, config = choose_architecture(describe(checkpoint), choice), checkpoint.config
    settle_own_code(model, architecture, trust=options.trust_remote_code, ignore=options.ignore_remote_code)
    text = None if options.text is None else read_text(options.text)
    sizes = {"sequences": -(-options.tokens // SEQUENCE_TOKENS), "length": SEQUENCE_TOKENS} if rounded else {}
    batches = comparison_batches(model, architecture, text, trust_remote_code=options.trust_remote_code, **sizes)
    needed = comparing_needs(model, output_bytes(config, options, rounded=rounded))
    disk = f" and {human_bytes(beside)} of disk" if beside else ""
    logger.info("running both models, one after the other, takes about %s of memory%s", human_bytes(needed), disk)
    remark_if_short(needed)
    return lambda: _run(model, layout, batches, architecture, options, rounded=rounded)


def output_bytes(config: Mapping[str, Any], options: ForwardOptions, *, rounded: bool) -> int:
    """Roughly the bytes of what both models give, which is kept to be compared."""
    from neuralink_cli.evaluation.output_comparison import SEQUENCE_LENGTH, SEQUENCES

    length = SEQUENCE_TOKENS if rounded else SEQUENCE_LENGTH
    sequences = -(-options.tokens // SEQUENCE_TOKENS) if rounded else SEQUENCES
    # Those of both models; and of one sequence what is computed on the way.
    return 4 * _output_width(config) * length * 2 * sequences + sequence_bytes(config, length)


def sequence_bytes(config: Mapping[str, Any], tokens: int) -> int:
    """Roughly the bytes of what a model gives for a sequence, and of what is computed on the way."""
    return 4 * _output_width(config) * tokens * _ON_THE_WAY


def _output_width(config: Mapping[str, Any]) -> int:
    return next((size for key in _WIDTHS if isinstance(size := config_value(config, key), int)), 0)


def forward_text(figures: dict[str, Any]) -> list[str]:
    """What two models were found to differ by, a line each."""
    described = _described_blocks(figures["described_blocks"])
    if "perplexity" not in figures:
        return [
            f"outputs agree on {figures['tokens']:,} tokens: largest difference {figures['max_abs_difference']:.2g} "
            f"of {figures['reference_scale']:.3g}, same first choice at {figures['same_argmax']:.2%}",
            described,
        ]
    gate = figures["gate"]
    return [
        f"on {figures['tokens']:,} tokens: perplexity {figures['perplexity']:.4g} of the source, "
        f"{figures['layout_perplexity']:.4g} of the layout ({figures['perplexity_increase']:+.2%}); KL divergence "
        f"{figures['mean_kl']:.4f} (99th percentile {figures['p99_kl']:.4f}); same first choice at "
        f"{figures['same_first_choice']:.2%}",
        *([] if gate is None else [f"rounded rows decide firing: {GateRecall(**gate)}"]),
        described,
    ]


def _described_blocks(compared: Sequence[str]) -> str:
    if not compared:
        return "no block could be computed again as the layout describes it"
    return f"the model computes what the layout says in the blocks that were computed again: {', '.join(compared)}"


def _run(
    model: Path,
    layout: Path,
    batches: list[ModelBatch],
    architecture: Architecture,
    options: ForwardOptions,
    *,
    rounded: bool,
) -> dict[str, Any]:
    from neuralink_cli.evaluation.layout_description import LayoutDescription
    from neuralink_cli.evaluation.model_distance import measure_distance
    from neuralink_cli.evaluation.output_comparison import compare_outputs
    from neuralink_cli.rewriting.restore import loadable

    description = LayoutDescription(layout, model, architecture)
    ways: dict[str, Any] = {
        "trust_remote_code": options.trust_remote_code,
        "ignore_remote_code": options.ignore_remote_code,
        "watching": description.watching,
    }
    with loadable(layout) as rewritten:
        models = model, rewritten, batches, architecture
        if rounded:
            figures = _accept_distance(measure_distance(*models, layout=layout, **ways), layout, options)
        else:
            figures = _accept_outputs(compare_outputs(*models, tolerance=options.tolerance, **ways), layout, options)
    return {**figures, "described_blocks": description.compared}


def _accept_distance(found: ModelDistance, layout: Path, options: ForwardOptions) -> dict[str, Any]:
    found.check(layout, max_increase=options.max_perplexity_increase, max_kl=options.max_kl)
    return {**asdict(found), "perplexity_increase": found.perplexity_increase}


def _accept_outputs(found: OutputComparison, layout: Path, options: ForwardOptions) -> dict[str, Any]:
    if not found.agrees:
        raise VerificationError(
            f"outputs differ by up to {found.max_abs_difference:.3g} (largest output {found.reference_scale:.3g}), "
            f"more than --tolerance {options.tolerance:g} allows",
            where=layout,
        )
    return asdict(found)
