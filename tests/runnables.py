"""Models with layouts that can be run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neuralink_cli.cli.entry import run
from tests.tiny_models import TEXT, build_model


@dataclass(frozen=True)
class Runnable:
    """A dense model and the layout that the pipeline made of it."""

    family: str
    model: Path
    layout: Path


RunnableFactory = Callable[..., Runnable]


def runnable_factory(make_folder: Callable[[str], Path]) -> RunnableFactory:
    """Makes each layout once, in a folder of the family's name: `runnable("llama", active_ratio=0.3)`."""
    made: dict[tuple[Any, ...], Runnable] = {}

    def get(
        family: str,
        *,
        active_ratio: float | None = None,
        signal: str = "gate",
        pin_hot: float = 0.0,
        relayout: tuple[str, ...] = ("--resident", "gate"),
        generation_config: str | None = None,
        **model_options: Any,
    ) -> Runnable:
        key = (family, active_ratio, signal, pin_hot, relayout, generation_config, *sorted(model_options.items()))
        if key not in made:
            folder = make_folder(family)
            model = build_model(folder / "model", family, **model_options)
            (folder / "text.txt").write_text(TEXT)
            if generation_config is not None:
                (model / "generation_config.json").write_text(generation_config)

            def go(*arguments: object) -> None:
                assert run([*map(str, arguments), "-q", "--json"]) == 0

            ratio = () if active_ratio is None else ("--active-ratio", active_ratio)
            go("profile", model, "--dataset", folder / "text.txt", "-o", folder / "t", "--signal", signal, *ratio)
            go("cluster", folder / "t", "-o", folder / "p", "--pin-hot", pin_hot, "--effort", "fast")
            go("relayout", model, "--placement", folder / "p", "-o", folder / "flash", *relayout)
            made[key] = Runnable(family, model, folder / "flash")
        return made[key]

    return get
