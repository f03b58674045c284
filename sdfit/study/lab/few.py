"""How few runs tell a card: errors against the number of runs, planned and at random, beside a fit of the whole grid.

Held on made-up cards and on the traced ones (`sdfit.study.lab.cards`), each corrected from a prior of other kernels. What is judged
on are the workloads of the grid that the card holds, which the fit of the whole grid has seen, and those of the holdout, which
nothing has. All of it is simulated.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from sdfit.equation.sizes import Array
from sdfit.errors import UnknownModel, listed
from sdfit.files import shipped
from sdfit.fit.correction import Posterior, Prior, Rows, correct
from sdfit.fit.few import fit_few, with_kernels
from sdfit.fit.held_out import fit_stages, predict_stages
from sdfit.fit.observations import Runs, observe
from sdfit.fit.planning import Few
from sdfit.predict.loading import load_artifact
from sdfit.predict.predictor import Predictor
from sdfit.predict.simulation.workspaces import ARCHITECTURES
from sdfit.records import Record, RecordsFile
from sdfit.study.lab.cards import MADE_UP, MadeUp, Skeleton, drawn, skeletons, strange
from sdfit.sweep import grid
from sdfit.units import aligned, percent

COUNTS = (2, 4, 8, 16, 32)
"""Numbers of runs."""
WANTED = 16
DRAWS = 3
"""Random choices of each number of runs; the median of their worst errors is shown."""
TIMES, LEAST = 1.5, 0.005
"""Sixteen runs are to reach so many times the worst error of the full grid, or this error."""
TRACED = {"sm61": "sm75", "sm70": "sm75", "sm75": "sm70", "sm90": "sm75"}
"""Traced cards, and the prior that each is corrected from: a model of other kernels."""
PRIOR = "sm75"
"""Of the made-up cards."""
DRAWN = tuple(f"drawn {seed}" for seed in (*range(100, 106), *range(200, 212)))
"""Cards drawn at random, by their seeds."""
STRANGE = tuple(f"strange {seed}" for seed in range(10, 14))
"""Cards that no table says, by theirs."""
_AT_RANDOM = {"drawn": drawn, "strange": strange}
HEADROOM = 0.97
"""A card holds runs whose peak is at most this share of its memory."""


@dataclass(frozen=True, slots=True)
class Line:
    """What was found of one card; errors are relative, of allocated memory.

    Parameters
    ----------
    card, prior : str
    workloads : int
        Of the grid that it holds.
    planned, at_random : dict
        Number of runs -> worst error over the holdout.
    planned_grid : dict
        Number of runs -> worst error over the grid.
    at_random_grid : float or None
        The same for `WANTED` runs at random; None if none were drawn.
    worst_at : str
        Where on the grid `WANTED` planned runs are off most.
    full, full_grid : float
        Worst errors of a fit of the whole grid, over the holdout and over its own rows.
    coverage, coverage_grid : float
        Share of 95 % intervals of the fit to `WANTED` runs that hold.
    width : float
        The half-width that half of the grid's intervals do not exceed, relative.
    matched : float
        The share of stages of these runs that the best tables of kernels give: the least of both sizes of dtypes.
    scale : float
        `sdfit.fit.correction.Posterior.scale` of that fit.
    """

    card: str
    prior: str
    workloads: int
    planned: dict[int, float]
    at_random: dict[int, float]
    planned_grid: dict[int, float]
    at_random_grid: float | None
    worst_at: str
    full: float
    full_grid: float
    coverage: float
    coverage_grid: float
    width: float
    matched: float
    scale: float

    @property
    def reached(self) -> bool:
        """Whether `WANTED` runs do as well as asked for, on workloads that no fit has seen."""
        return self.planned[WANTED] <= max(TIMES * self.full, LEAST)

    @property
    def reached_grid(self) -> bool:
        """The same on the grid's own workloads, which the fit of the whole grid has seen."""
        return self.planned_grid[WANTED] <= max(TIMES * self.full_grid, LEAST)


class _Judged:
    """Workloads whose truth is known, through the eyes of a prior."""

    def __init__(self, prior: Prior, records: Sequence[Record], memory_bytes: float) -> None:
        self.prior, self.records, self.memory_bytes = prior, records, float(int(memory_bytes))
        self.rows: Rows = prior.rows([r.workload for r in records])
        self.actual = np.array([r.allocated_bytes for r in records], dtype=float)

    def worst(self, posterior: Posterior) -> float:
        """The worst error of a corrected model."""
        return _worst(self.predicted(posterior), self.actual)

    def predicted(self, posterior: Posterior) -> Array:
        """The peaks by a corrected model [bytes]."""
        rows = with_kernels(posterior, self.memory_bytes).prior.rows([r.workload for r in self.records])
        return rows.highest(rows.prior_bytes + (rows.X * self.prior.kept) @ posterior.mean)

    def worst_at(self, posterior: Posterior) -> str:
        """Where that is: size, images, stage."""
        predicted = self.predicted(posterior)
        record = self.records[int(np.argmax(np.abs(predicted / self.actual - 1)))]
        w, peaks = record.workload, record.stage_peaks_bytes
        return f"{w.height}x{w.width} x{w.batch_size} {max(peaks, key=peaks.__getitem__)}"

    def covered(self, predictor: Predictor) -> tuple[float, float]:
        """The share of 95 % intervals that hold, and the half-width that half of them do not exceed, relative to the truth."""
        ends = np.array([predictor.predict_workload(r.workload).interval for r in self.records])
        holds = (ends[:, 0] <= self.actual) & (self.actual <= ends[:, 1])
        return float(np.mean(holds)), float(np.median((ends[:, 1] - ends[:, 0]) / 2 / self.actual))


def study(
    memory_bytes: float,
    cache: Path | None = None,
    report: Callable[[str], None] = lambda words: None,
    counts: Sequence[int] = COUNTS,
    draws: int = DRAWS,
    names: Sequence[str] = (),
) -> list[Line]:
    """Hold few runs against every card, or some.

    Parameters
    ----------
    memory_bytes : float
        What each card has; larger workloads are not asked about.
    cache : Path, optional
        A file to keep traces in: there are some 900, two or three a second.
    report : callable
        Called with each card's name.
    counts : sequence of int
        Numbers of runs, `WANTED` among them.
    draws : int
        Random choices of each; 0: none.
    names : sequence of str
        The cards, as `card_of` knows them; none: all.

    Raises
    ------
    UnknownModel
        If there is no such card.
    """
    cards = [card_of(name) for name in names or (*MADE_UP, *TRACED, *DRAWN, *STRANGE)]
    seen = skeletons(grid.load("default").for_the_trace().workloads, cache)
    unseen = skeletons(grid.load("holdout").for_the_trace().workloads, cache)
    priors: dict[str, tuple[Prior, Few]] = {}
    lines = []
    for card, name in cards:
        report(card.name)
        if name not in priors:
            prior = Prior(load_artifact(shipped("models") / f"{name}.joblib"))
            priors[name] = prior, Few(prior, [s.workload for s in seen], max(counts), memory_bytes)
        lines.append(_line(card, *priors[name], seen, unseen, memory_bytes, counts, draws))
    return lines


def card_of(name: str) -> tuple[MadeUp, str]:
    """A card and the prior that it is corrected from: made up, traced, or ``drawn`` and ``strange`` with any seed.

    Raises
    ------
    UnknownModel
        If there is no such card.
    """
    if name in TRACED:
        return MadeUp(name, "traced", ARCHITECTURES[name]), TRACED[name]
    kind, _, seed = name.partition(" ")
    if kind in _AT_RANDOM and seed.isdecimal():
        return _AT_RANDOM[kind](int(seed)), PRIOR
    if name not in MADE_UP:
        raise UnknownModel(
            f"no card '{name}' is made up; there are: {listed([*MADE_UP, *TRACED])}, 'drawn 100', 'strange 10' and the like"
        )
    return MADE_UP[name], PRIOR


def _line(
    card: MadeUp,
    prior: Prior,
    few: Few,
    seen: Sequence[Skeleton],
    unseen: Sequence[Skeleton],
    memory_bytes: float,
    counts: Sequence[int],
    draws: int,
) -> Line:
    swept = card.records(seen)
    grid_, hold = (
        [r for r in records if (r.allocated_bytes or 0) <= HEADROOM * memory_bytes]
        for records in (swept, card.records(unseen))
    )
    held = {r.index for r in grid_}
    judged, fresh = _Judged(prior, grid_, memory_bytes), _Judged(prior, hold, memory_bytes)
    planned: list[Record] = []
    for index in few(planned):
        planned += [swept[index]] * (index in held)
    rng = random.Random(7)
    drawn = {count: [correct(prior, rng.sample(grid_, count)) for _ in range(draws)] for count in counts if draws}
    posteriors = {count: correct(prior, planned[:count]) for count in counts}
    whole = fit_stages(observe(grid_))
    environment = {"backend": "trace", "name": card.name, "total_memory_bytes": int(memory_bytes)}
    artifact = fit_few(RecordsFile(environment, planned[:WANTED], []), prior.artifact)
    predictor = Predictor(artifact)
    return Line(
        card=card.name,
        prior=prior.artifact.name,
        workloads=len(grid_),
        planned={count: fresh.worst(found) for count, found in posteriors.items()},
        at_random={count: median(map(fresh.worst, found)) for count, found in drawn.items()},
        planned_grid={count: judged.worst(found) for count, found in posteriors.items()},
        at_random_grid=median(map(judged.worst, drawn[WANTED])) if draws else None,
        worst_at=judged.worst_at(posteriors[WANTED]),
        full=_full(whole, hold, fresh.actual),
        full_grid=_full(whole, grid_, judged.actual),
        coverage=fresh.covered(predictor)[0],
        coverage_grid=judged.covered(predictor)[0],
        width=judged.covered(predictor)[1],
        matched=min(kernels.matched.values(), default=0.0) if (kernels := posteriors[WANTED].found) else 0.0,
        scale=artifact.prior["scale"],
    )


def _full(models: Mapping[Any, Any], records: Sequence[Record], actual: Array) -> float:
    return _worst(np.nanmax(predict_stages(models, Runs(records)), axis=1), actual)


def _worst(predicted: Array, actual: Array) -> float:
    return float(np.max(np.abs(predicted / actual - 1)))


def table(lines: Sequence[Line]) -> str:
    """A line per card: worst errors by number of runs, the full grid's, whether sixteen runs do, coverage."""
    counts = list(lines[0].planned)
    at_random = lines[0].at_random_grid is not None
    head = (
        "card (simulated)", "prior", *(f"{count} runs" for count in counts), *["16 at random"] * at_random, "full grid", "16 do",
        "95 % hold", "grid: 16", *["at random"] * at_random, "full grid", "16 do", "95 % hold", "half within", "told",
        "16 are worst at",
    )  # fmt: skip
    rows = [head]
    for line in lines:
        rows.append(
            (
                line.card,
                line.prior,
                *(percent(line.planned[count], 2) for count in counts),
                *([percent(line.at_random[WANTED], 2)] if at_random else []),
                percent(line.full, 2),
                "yes" if line.reached else "no",
                percent(line.coverage, 1),
                percent(line.planned_grid[WANTED], 2),
                *([percent(line.at_random_grid, 2)] if line.at_random_grid is not None else []),
                percent(line.full_grid, 2),
                "yes" if line.reached_grid else "no",
                percent(line.coverage_grid, 1),
                f"±{percent(line.width, 1)}",
                percent(line.matched, 0),
                line.worst_at,
            )
        )
    what = (
        "worst error of allocated memory over the holdout, which no fit has seen; then over the grid's own workloads, which the "
        "full grid's fit has;\nhalf of its 95 % intervals are no wider than shown; told: the share of the runs' stages that the best tables "
        f"of kernels give\n16 do: at most {TIMES:g} x the full grid's worst error, or {percent(LEAST, 1)}"
    )
    return f"{what}\n{aligned(rows, left=2)}"


def to_dict(lines: Sequence[Line]) -> list[dict[str, Any]]:
    """Plain values, errors as fractions."""
    return [asdict(line) | {"reached": line.reached, "reached_grid": line.reached_grid} for line in lines]


def draw(lines: Sequence[Line], path: Path) -> Path:
    """Draw the worst error against the number of runs, a panel per card."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    columns = min(len(lines), 3 if len(lines) < 7 else 4)
    rows = -(-len(lines) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(3 * columns, 2.6 * rows), sharex=True, sharey=True, squeeze=False
    )
    for axis, line in zip(axes.flat, lines, strict=False):
        counts = list(line.planned)
        axis.plot(counts, [100 * line.at_random[c] for c in counts], "o:", color="0.55", label="at random")
        axis.plot(counts, [100 * line.planned[c] for c in counts], "o-", color="C0", label="planned")
        axis.axhline(100 * line.full, color="C1", label=f"full grid ({line.workloads} runs)")
        axis.axhline(100 * max(TIMES * line.full, LEAST), color="C1", linestyle="--", label="what 16 runs are to reach")
        axis.set_yscale("log")
        axis.set_xticks(counts)
        axis.set_title(f"{line.card}, from {line.prior}", fontsize=10)
    for axis in axes.flat[len(lines) :]:
        axis.axis("off")
    for axis in axes[-1]:
        axis.set_xlabel("runs")
    for axis in axes[:, 0]:
        axis.set_ylabel("worst error [%]")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    labels[2] = "full grid"
    figure.legend(handles, labels, loc="lower center", ncols=4 if columns > 2 else 2, frameon=False)
    figure.suptitle("Few runs correct a prior: worst error of allocated memory on unseen workloads (simulated)")
    figure.tight_layout(rect=(0, 0.05, 1, 0.98))
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path
