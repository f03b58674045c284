"""What each way to run costs and saves: memory by a model, seconds as others published them or a sweep measured them.

Every option is changed alone, then some together, then the cheapest that suffices on a card of 4, 6 and 8 GB. Seconds are
shown only for the same card, size and batch, all from one source; nothing is carried over from another card.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import compress
from typing import Any

from sdfit.errors import UnknownVariant, listed
from sdfit.predict.memory import of_box
from sdfit.predict.options import options_that_fit
from sdfit.predict.prediction import Prediction
from sdfit.predict.predictor import Predictor
from sdfit.predict.verdict import best_metric, verdict
from sdfit.study.comparison.times import Time, best_series
from sdfit.units import aligned, format_bytes
from sdfit.workload import CARD_ALONE, CHOICES, NOT_QUANTISED, ON_A_CARD, Workload

ASKED = "as asked"
TOGETHER: tuple[dict[str, Any], ...] = (
    {"vae_slicing": True, "vae_tiling": True},
    {"vae_tiling": True, "offload": "model"},
    {"vae_slicing": True, "vae_tiling": True, "offload": "sequential"},
)
"""Options that are often switched on together."""
RECIPE_GB = (4, 6, 8)
"""Memory on the box of the cards that a recipe is found for: the first of what ``sdfit advise`` would say there [GiB]."""
CHANGES_NOTHING: tuple[tuple[str, str], ...] = (
    ("gradient checkpointing", "belongs to training: at inference the peak is the same to the byte (traced)"),
    (
        "scheduler",
        "DDIM, Euler ancestral, LCM hold no latents, DPM++ 2M two, PNDM and UniPC three (traced); nothing else differs",
    ),
    ("steps, strength", "nothing from five steps on (traced)"),
    (
        "guidance cut off late",
        "callback_on_step_end: the first steps set the peak; the callback holds two latents, and reserved memory may grow by 4 MiB (traced)",
    ),
)
"""What is often tried and moves the peak by nothing, or next to nothing; ``tests/backends/test_strategies.py`` holds it."""
QUANTISED_OTHERWISE = ("other quantised weights", NOT_QUANTISED)
COMPILED = "; published: allocated memory is the same to the byte at 512x512 (open-muse; T4, A100, RTX 4090)"


@dataclass(frozen=True, slots=True)
class Strategy:
    """One way to run.

    Parameters
    ----------
    name : str
    change : dict
        Fields of `Workload` and their new values.
    prediction : Prediction or None
        Of the metric that decides about fitting; None where the model does not know it.
    answer : str
        As `sdfit.predict.verdict.Verdict` has it; empty without a prediction.
    saved_bytes : float or None
        Less than as asked.
    time : Time or None
    speed : float or None
        Relative to the run as asked, of the same series: 2 is twice as fast.
    rests_on : str
        What the numbers rest on, or why there are none.
    frontier : bool
        Whether no other way is known to take both less memory and less time.
    """

    name: str
    change: dict[str, Any]
    prediction: Prediction | None
    answer: str
    saved_bytes: float | None
    time: Time | None
    speed: float | None
    rests_on: str
    frontier: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Plain values, amounts in bytes."""
        peak = self.prediction
        return {
            "strategy": self.name,
            "change": self.change,
            "peak_bytes": None if peak is None else round(peak),
            "upper_bytes": None if peak is None else round(peak.upper),
            "saved_bytes": None if self.saved_bytes is None else round(self.saved_bytes),
            "answer": self.answer or None,
            "seconds_per_image": None if self.time is None else self.time.seconds_per_image,
            "relative_speed": self.speed,
            "frontier": self.frontier,
            "rests_on": self.rests_on,
            "time": None
            if self.time is None
            else {"id": self.time.id, "source": self.time.source, "settings": self.time.settings},
        }


@dataclass(frozen=True, slots=True)
class Strategies:
    """All ways to run a workload, by peak.

    Parameters
    ----------
    workload : Workload
        As asked.
    metric : str
        Of the peaks.
    memory_bytes : int
    rows : tuple of Strategy
        Sorted by peak; those without one come last.
    card : str
        Whose times are shown.
    """

    workload: Workload
    metric: str
    memory_bytes: int
    rows: tuple[Strategy, ...]
    card: str
    notes: tuple[str, ...] = field(default=())

    def to_dict(self) -> dict[str, Any]:
        """Plain values, amounts in bytes."""
        return {
            "workload": self.workload.to_dict(),
            "metric": self.metric,
            "memory_bytes": self.memory_bytes,
            "card": self.card,
            "strategies": [row.to_dict() for row in self.rows],
            "notes": list(self.notes),
        }

    def table(self) -> str:
        """The table for a terminal, then what has no number, then what changes nothing, then notes.

        Columns that would be empty are left out; what all rows rest on is said once.
        """
        shown = [row for row in self.rows if row.prediction is not None or row.time is not None]
        timed = any(row.time is not None for row in shown)
        words = list(dict.fromkeys(row.rests_on for row in shown if row.prediction is not None))
        apart = timed or len(words) > 1
        width = max(map(len, words))
        head = ("", "strategy", "peak", "saved", "fits", "seconds per image", "relative speed", "rests on".ljust(width))
        wanted = (timed, True, True, True, True, timed, timed, apart)
        lines = [tuple(compress(cells, wanted)) for cells in (head, *(_cells(row, width) for row in shown))]
        nothing = dict(CHANGES_NOTHING)
        why: dict[str, list[str]] = {}
        for row in self.rows:
            if row.prediction is None and row.name not in nothing:
                why.setdefault(row.rests_on, []).append(row.name)
        rest = [f"  {'; '.join(names)}: {reason}" for reason, names in why.items()]
        return "\n".join(
            [
                aligned(lines, left=1 + timed),
                *(["no number:", *rest] if rest else []),
                "no difference:",
                *(f"  {name}: {reason}" for name, reason in CHANGES_NOTHING),
                *([] if apart else [f"rests on: {words[0]}"]),
                *self.notes,
            ]
        )


def _cells(row: Strategy, width: int) -> tuple[str, ...]:
    time = "-" if row.time is None else f"{row.time.seconds_per_image:.3f}"
    speed = "-" if row.speed is None else f"{row.speed:.2f}"
    if row.prediction is None or row.saved_bytes is None:
        return ("", row.name, "-", "-", "-", time, speed, f"time: {row.time.id}".ljust(width) if row.time else "")
    saved = format_bytes(row.saved_bytes) if abs(row.saved_bytes) >= 1 else "0 B"
    mark = "*" if row.frontier else ""
    return (mark, row.name, format_bytes(row.prediction), saved, row.answer, time, speed, row.rests_on.ljust(width))


def strategies(f: Predictor, workload: Workload, *, memory_bytes: int, times: Sequence[Time] = ()) -> Strategies:
    """Work out what each way to run a workload takes.

    Parameters
    ----------
    f : Predictor
        A card's model.
    workload : Workload
        The run as asked; every change is made to it.
    memory_bytes : int
        What PyTorch may take.
    times : sequence of Time
        Known times, those that were measured first (`sdfit.study.comparison.times`).

    Raises
    ------
    UnknownVariant
        If the model does not know the run as asked.
    """
    asked = verdict(f, workload, memory=memory_bytes).prediction
    changes = [(ASKED, {}), *_single(workload), *((_words(c), c) for c in TOGETHER)]
    recipes, others = _recipes(f, workload)
    apart = [change for _, change in recipes]
    changes = [one for one in changes if one[1] not in apart] + recipes  # each once
    runs = [replace(workload, **change) for _, change in changes]
    found = best_series(times, f.card.slug if f.card else f.name, runs)
    rows = [_row(f, name, change, run, asked, memory_bytes) for (name, change), run in zip(changes, runs, strict=True)]
    checked = [time for (_, change), time in zip(changes, found, strict=True) if "safety_checker" not in change]
    rows = [_timed(row, time, found[0], checked) for row, time in zip(rows, found, strict=True)]
    known = _with_frontier([row for row in rows if row.prediction is not None])
    known.sort(key=lambda row: float(row.prediction or 0))
    unknown = [row for row in rows if row.prediction is None]
    unknown += [
        Strategy(name, {}, None, "", None, None, None, words) for name, words in (QUANTISED_OTHERWISE, *CHANGES_NOTHING)
    ]
    notes = [
        f"peak: {best_metric(f)} memory; saved: less than as asked; fits: in {format_bytes(memory_bytes)}"
        + ("; *: no other takes both less memory and less time" if any(row.frontier for row in known) else ""),
        *others,
        *_about_times(f, workload, [t for t in found if t is not None], times),
    ]
    return Strategies(workload, best_metric(f), memory_bytes, (*known, *unknown), f.name, tuple(notes))


def _single(workload: Workload) -> list[tuple[str, dict[str, Any]]]:
    """Each option changed alone."""
    return [
        (f"{name}={value}", {name: value})
        for name, values in CHOICES.items()
        for value in values
        if value != getattr(workload, name)
    ]


def _words(change: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in change.items())


def _recipes(f: Predictor, workload: Workload) -> tuple[list[tuple[str, dict[str, Any]]], list[str]]:
    """The cheapest change that suffices on each kind of card; and, in words, where none is needed or none is found."""
    cards: dict[str, list[int]] = {}
    changes: dict[str, dict[str, Any]] = {}
    notes = []
    for gib in RECIPE_GB:
        memory = of_box(gib)
        if verdict(f, workload, memory=memory).answer == "fits":
            notes.append(f"card of {gib} GB: fits as asked")
            continue
        options = options_that_fit(f, workload, memory=memory)
        if not options:
            notes.append(f"card of {gib} GB: nothing is sure to fit at this size")
        elif "height" in options[0].change:
            notes.append(
                f"card of {gib} GB: nothing but a smaller picture is sure to fit ({_words(options[0].change)})"
            )
        else:
            words = _words(options[0].change)
            cards.setdefault(words, []).append(gib)
            changes[words] = options[0].change
    return [(f"card of {listed(gibs)} GB: {words}", changes[words]) for words, gibs in cards.items()], notes


def _row(
    f: Predictor, name: str, change: dict[str, Any], run: Workload, asked: Prediction, memory_bytes: int
) -> Strategy:
    try:
        answer = verdict(f, run, memory=memory_bytes)
    except UnknownVariant as error:
        if run.execution in ON_A_CARD:
            why = CARD_ALONE + (COMPILED if run.execution == "compiled" else "")
        elif "fails in diffusers" in str(error):
            why = str(error)
        else:
            why = f"no coefficients for it: sdfit sweep --gpu {f.artifact.name} --grid strategies, then sdfit fit"
        return Strategy(name, change, None, "", None, None, None, why)
    saved = float(asked) - float(answer.prediction)
    words = {"measured": "measured", "published": "trace, published kernels", "traced": "trace", "fake": "made up"}
    return Strategy(name, change, answer.prediction, answer.answer, saved, None, None, words[f.provenance])


def _timed(row: Strategy, time: Time | None, asked: Time | None, checked: Sequence[Time | None]) -> Strategy:
    if time is None or ("safety_checker" in row.change and time in checked):  # nobody timed the one beside the other
        return row
    speed = None if asked is None else asked.seconds_per_image / time.seconds_per_image
    words = row.rests_on if row.prediction is None else f"{row.rests_on}; time: {time.id}"
    return replace(row, time=time, speed=speed, rests_on=words)


def _with_frontier(rows: Sequence[Strategy]) -> list[Strategy]:
    """Mark those that no other beats in memory and time together; among those whose time is known."""
    timed = [(float(r.prediction or 0), r.time.seconds_per_image) for r in rows if r.time is not None]

    def beaten(row: Strategy) -> bool:
        if row.time is None:
            return True
        here = (float(row.prediction or 0), row.time.seconds_per_image)
        return any(m <= here[0] and s <= here[1] and (m, s) != here for m, s in timed)

    return [replace(row, frontier=not beaten(row)) for row in rows]


def _about_times(f: Predictor, w: Workload, found: Sequence[Time], times: Sequence[Time]) -> list[str]:
    if found:
        one = found[0]
        checker = "" if one.safety_checker else ", without a safety checker"
        return [f"seconds: {one.pipeline}, {one.num_inference_steps} steps{checker}; {one.source}"]
    card = f.card.slug if f.card else f.name
    sizes = sorted({f"{t.height}x{t.width} with {t.batch_size} image(s)" for t in times if t.card == card})
    shown = f"; there are some for {', '.join(sizes[:3])}" if sizes else ""
    return [f"seconds: none published for this card, size and batch{shown}, and none measured (--records)"]
