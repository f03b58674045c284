"""Settle by simulation what a model's equation leaves open; where torch and diffusers are installed, by a trace what that does not cover."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import TYPE_CHECKING, TypeVar

import click

from sdfit.cli.options import note

if TYPE_CHECKING:
    from sdfit.predict.predictor import Predictor

T = TypeVar("T")
replay_option = click.option(
    "--replay/--no-replay",
    default=None,
    help="Simulate the runs that the equation leaves open.  [default: where the model rests on simulated runs]",
)


def settling(f: Predictor, replay: bool | None, limit_bytes: float | None) -> Predictor:
    """The model, or one that simulates a run whenever its equation does not say whether it needs more than a limit [bytes].

    Without a limit every run is simulated.

    Raises
    ------
    SdfitError
        If ``replay`` is asked for and cannot be had.
    """
    from sdfit.backends.trace.needed import Traced
    from sdfit.predict.replayed import replaying, why_not

    if replay is False or (replay is None and why_not(f)):
        return f
    whole = all(find_spec(name) for name in ("torch", "diffusers"))
    return replaying(f, limit_bytes=limit_bytes, otherwise=Traced(f.artifact.name) if whole else None)


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
