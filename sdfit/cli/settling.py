"""Settle by simulation what a model's equation leaves open, where torch and diffusers are installed."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import TYPE_CHECKING, TypeVar

import click

from sdfit.cli.options import note

if TYPE_CHECKING:
    from sdfit.predict.predictor import Predictor
    from sdfit.workload import Workload

T = TypeVar("T")
replay_option = click.option(
    "--replay/--no-replay",
    default=None,
    help="Simulate the runs that the equation leaves open; seconds. Left out: where torch and diffusers are installed.",
)


def settling(f: Predictor, replay: bool | None, limit_bytes: float | None) -> Predictor:
    """The model, or one that simulates a run whenever its equation does not say whether it needs more than a limit [bytes].

    Without a limit every run is simulated.

    Raises
    ------
    SdfitError
        If ``replay`` is asked for and cannot be had.
    """
    from sdfit.errors import needs
    from sdfit.predict.replayed import Replayed, why_not

    missing = next((name for name in ("torch", "diffusers") if find_spec(name) is None), None)
    if replay and missing:
        raise needs("sweep", missing)
    if replay is False or (replay is None and (missing or why_not(f))):
        return f
    return Replayed(f, _Needed(f.artifact.name), limit_bytes=limit_bytes)


def best(f: Predictor, settled: Predictor, ask: Callable[[Predictor], T], is_open: Callable[[T], bool]) -> T:
    """What a question about the largest comes to: by the equation, and by simulation where that leaves it open."""
    from sdfit.predict.advise import NothingFits

    try:
        found = ask(f)
        if settled is f or not is_open(found):
            return found
    except NothingFits as no:
        if settled is f or no.facts["likely"] is None:
            raise
    return ask(settled)


def say_what_was_replayed(settled: Predictor) -> None:
    """Say that an answer is simulated in part."""
    count = getattr(settled, "replays", 0)
    if count:
        note(
            f"the equation left it open; {count} run{'s' if count > 1 else ''} simulated to settle it (--no-replay: not)"
        )


class _Needed:
    """`sdfit.backends.trace.needed.Needed`, with torch loaded only for the first run that is simulated."""

    def __init__(self, kernels: str) -> None:
        self.kernels = kernels
        self._needed: Callable[[Workload, str], int] | None = None

    def __call__(self, workload: Workload, metric: str) -> int:
        if self._needed is None:
            from sdfit.backends.trace.needed import Needed

            self._needed = Needed(self.kernels)
        return self._needed(workload, metric)
