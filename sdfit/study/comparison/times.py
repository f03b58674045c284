"""Seconds that others measured and published for a card: the rows of ``data/published/times.csv``, typed.

Rows of one *series* come from one source, card and number of steps, and only those are ever set beside each other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

from sdfit.files import shipped
from sdfit.predict.cards import card_slug
from sdfit.records import Record
from sdfit.study.comparison.csv_files import read_csv
from sdfit.workload import Workload

MATCHED = (
    "dtype", "attention", "vae", "vae_slicing", "vae_tiling", "offload", "execution", "batch_size", "guidance_scale",
)  # fmt: skip
"""Fields of a Workload that a time must agree in, beside its effective size. The safety checker is not among them: it
looks at one small picture, and the settings say whether it was there."""


@dataclass(frozen=True, slots=True)
class Time:
    """How long one call took on a card.

    Parameters
    ----------
    id, series : str
    card : str
        As `sdfit.predict.cards.card_slug` names it.
    pipeline : str
        ``txt2img`` or ``img2img``.
    height, width, batch_size, num_inference_steps : int
    guidance_scale : float
    dtype, attention, vae, vae_slicing, vae_tiling, offload, safety_checker
        As in `Workload`.
    execution : str
        As in `Workload`; other words where it has none for it.
    seconds : float
        Of the whole call [s].
    source, settings : str
        Address, file and commit; the settings as the source has them.
    """

    id: str
    series: str
    card: str
    pipeline: str
    height: int
    width: int
    batch_size: int
    num_inference_steps: int
    guidance_scale: float
    dtype: str
    attention: str
    vae: str
    vae_slicing: bool
    vae_tiling: bool
    offload: str
    safety_checker: bool
    execution: str
    seconds: float
    source: str
    settings: str

    @property
    def seconds_per_image(self) -> float:
        """Of one image [s]."""
        return self.seconds / self.batch_size

    def is_of(self, w: Workload) -> bool:
        """Whether this is the time of a workload, the prompt and the safety checker aside."""
        same_size = (self.height, self.width) == (w.effective_height, w.effective_width)
        guided = (self.guidance_scale > 1) == w.guided
        rest = (getattr(self, name) == getattr(w, name) for name in MATCHED if name != "guidance_scale")
        return same_size and guided and all(rest)


@lru_cache(maxsize=1)
def published_times() -> tuple[Time, ...]:
    """Every published time.

    Raises
    ------
    RecordsError
        If the file is not there or holds a value of the wrong kind.

    Examples
    --------
    >>> sorted({t.card for t in published_times()})
    ['a100', 'gtx1070', 'p100', 'rtx4090', 't4']
    """
    return read(shipped("data/published") / "times.csv")


def read(file: Path | str) -> tuple[Time, ...]:
    """Read published times from a file of the same columns; otherwise as `published_times`."""
    return read_csv(file, "published times", [field.name for field in fields(Time)], _typed)


def _typed(values: Mapping[str, str]) -> Time:
    kinds: dict[str, Any] = {
        "int": int,
        "float": float,
        "bool": lambda text: {"yes": True, "no": False}[text],
        "str": str,
    }
    return Time(**{f.name: kinds[str(f.type)](values[f.name]) for f in fields(Time)})


def measured_times(environment: Mapping[str, Any], records: Sequence[Record]) -> tuple[Time, ...]:
    """The times of a sweep that was measured on a card; none of a simulated one, which knows no time."""
    if environment.get("backend") != "cuda":
        return ()
    steps, card = int(environment.get("num_inference_steps", 0)), str(environment.get("name"))
    found = []
    for record in records:
        w = record.workload
        if record.outcome != "ok" or not record.stage_s:
            continue
        options: dict[str, Any] = {name: getattr(w, name) for name in (*MATCHED, "safety_checker")}
        size: dict[str, Any] = {"height": w.effective_height, "width": w.effective_width, "pipeline": "img2img"}
        told: dict[str, Any] = {
            "source": f"measured on {environment.get('gpu')}",
            "settings": f"{steps} steps, stage by stage",
        }
        found.append(
            Time(
                id=f"row {record.index}",
                series=f"measured, {steps} steps",
                card=card_slug(card),
                num_inference_steps=steps,
                seconds=sum(record.stage_s.values()),
                **options,
                **size,
                **told,
            )
        )
    return tuple(found)


def best_series(times: Sequence[Time], card: str, workloads: Sequence[Workload]) -> list[Time | None]:
    """For each workload its time on a card, all of one series: the one that has most of them, then the one of most
    steps, measured before published.

    Parameters
    ----------
    times : sequence of Time
        Those that are measured first.
    """
    by_series: dict[str, list[Time]] = {}
    for time in times:
        if time.card == card:
            by_series.setdefault(time.series, []).append(time)
    choices = [[next((t for t in known if t.is_of(w)), None) for w in workloads] for known in by_series.values()]
    none: list[Time | None] = [None] * len(workloads)

    def worth(found: list[Time | None]) -> tuple[int, int]:
        there = [t for t in found if t is not None]
        return len(there), there[0].num_inference_steps if there else 0

    return max(choices, key=worth, default=none)
