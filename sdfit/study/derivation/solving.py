"""Polynomials in the sizes of a run that give the live bytes at its operations, from runs of some sizes, exactly.

Not a fit to noise: a coefficient is a whole multiple of what channels and bytes can make of it, and what remains is the
allocator's rounding to 512 bytes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sdfit.backends.trace.observe import OperationName
from sdfit.equation.sizes import Array, Sizes
from sdfit.equation.stages import UNET_STAGES
from sdfit.study.derivation.closed_form import (
    VAE_STAGES,
    WHEN,
    embedded_rows,
    in_regime,
    last_passes,
    letters,
    products_at,
)
from sdfit.workload import SLICES, Workload

Name = OperationName
At = tuple[int, int, int]
"""Where an operation was seen: the number of the point, P and D of the pass."""

# the order is the order of preference: of products that are not identified at the points the first one stays
_SMALL = ("1", "B", "n", "n·L", "n·E", "B·L", "B·E")
_UNET_PRODUCTS = (*_SMALL, "n·A", "B·A", "n·L·A", "n·A²")
_SLICED_PRODUCTS = (*_UNET_PRODUCTS, "A", "L·A", "A²")
_VAE_PRODUCTS = (*_SMALL, "B·A", "n·A", "B·A²", "A²")
_VAE_PART_PRODUCTS = (*_SMALL, "B·A", "n·A", "m·P", "m·P²", "P²", "D")

_STEPS = {(2, 0): 2.0**-20, (1, 1): 2.0**-10, (1, 0): 2.0**-8, (0, 1): 64.0, (0, 0): 1.0}
"""Of what the coefficient of a product with that many pixels and tokens is a multiple [bytes]."""
TOLERANCE_BYTES = 16 * 1024


@dataclass(frozen=True, slots=True)
class Candidate:
    """An operation that is a polynomial in one regime: its products' coefficients [bytes]."""

    name: Name
    when: str
    products: tuple[str, ...]
    coefficients: Array


class Places(NamedTuple):
    """Workloads at which candidates are compared: their regimes and the products of their passes, worked out once."""

    workloads: Sequence[Workload]
    starts: NDArray[np.intp]
    """Which of the passes is each workload's first."""
    products: dict[str, Array]
    runs: dict[str, Array]
    """Of each part of `WHEN`, in which workloads it is so."""

    @classmethod
    def of(cls, workloads: Sequence[Workload]) -> Places:
        """List the passes of workloads that can be the highest."""
        places = [(j, s.P, s.D) for j, w in enumerate(workloads) for s in last_passes(w)]
        starts = np.searchsorted([j for j, _, _ in places], range(len(workloads)))
        runs = {when: np.array([in_regime(workload, when) for workload in workloads]) for when in WHEN}
        return cls(workloads, starts, columns_at(workloads, places), runs)

    def values_of(self, candidates: Sequence[Candidate]) -> Array:
        """The bytes of each candidate (rows) for each workload (columns); minus infinity where it does not run."""
        out = np.full((len(candidates), len(self.workloads)), -np.inf)
        kinds: dict[tuple[str, tuple[str, ...]], list[int]] = defaultdict(list)
        for i, c in enumerate(candidates):
            kinds[c.when, c.products].append(i)
        for (when, products), rows in kinds.items():
            coefficients = np.array([candidates[i].coefficients for i in rows])
            found = coefficients @ np.stack([self.products[product] for product in products])
            runs = np.all([self.runs[part] for part in when.split(", ")], axis=0)
            out[rows] = np.where(runs, np.maximum.reduceat(found, self.starts, axis=1), -np.inf)
        return out


def columns_at(workloads: Sequence[Workload], places: Sequence[At]) -> dict[str, Array]:
    """Every product by name, an array over places."""
    _, pixels, done = np.array(places, dtype=float).T
    chosen = [workloads[i] for i, _, _ in places]
    sizes = Sizes.of_workloads(chosen)._replace(P=pixels, D=done)
    found = products_at(sizes, np.array([embedded_rows(w) for w in chosen], dtype=float))
    return {name: np.broadcast_to(value, pixels.shape) for name, value in found.items()}


def _products(stage: str, variant: Workload) -> tuple[str, ...]:
    if stage in VAE_STAGES:
        return _VAE_PART_PRODUCTS if variant.vae_slicing or variant.vae_tiling else _VAE_PRODUCTS
    return _SLICED_PRODUCTS if variant.attention in SLICES else _UNET_PRODUCTS


def solve(seen: dict[Name, dict[At, int]], points: tuple[Workload, ...]) -> list[Candidate]:
    """Solve for the coefficients of every operation that is a polynomial, all of one layout at a time.

    One that is no polynomial over all points may be one for a batch of one and another for more: matmul folds its
    operands otherwise, a loop over slices has a first turn.
    """
    found: list[Candidate] = []
    groups: dict[tuple[str, tuple[At, ...]], list[Name]] = defaultdict(list)
    for name, rows in seen.items():
        groups[name.stage, tuple(rows)].append(name)
    presence = {when: {i for i, point in enumerate(points) if in_regime(point, when)} for when in WHEN}
    for (stage, places), left in groups.items():
        present = {point for point, _, _ in places}
        when = next((when for when, expected in presence.items() if present == expected), None)
        if when is None:
            continue
        halves = ("n=1", "n>=2") if stage in UNET_STAGES else ("B=1", "B>=2")
        for regimes in ((when,), tuple(f"{when}, {half}" if when else half for half in halves)):
            solved = [c for regime in regimes for c in _solve_part(regime, stage, places, left, seen, points)]
            found += solved
            done = {c.name for c in solved}
            left = [name for name in left if name not in done]  # noqa: PLW2901
    return found


def _solve_part(
    when: str,
    stage: str,
    places: Sequence[At],
    names: Sequence[Name],
    seen: dict[Name, dict[At, int]],
    points: Sequence[Workload],
) -> list[Candidate]:
    """Solve for operations of one layout in one regime; those that are no polynomial there are left out."""
    use = [at for at in places if in_regime(points[at[0]], when)]
    if not use or not names:
        return []
    products, matrix = _independent(_products(stage, points[0]), columns_at(points, use))
    if len(use) <= len(products):
        return []
    live = np.array([[seen[name][at] for at in use] for name in names], dtype=float).T
    exact = _exact(products, matrix, live)
    worst = np.abs(matrix @ exact - live).max(axis=0)
    return [Candidate(name, when, products, exact[:, i]) for i, name in enumerate(names) if worst[i] <= TOLERANCE_BYTES]


def _exact(products: tuple[str, ...], matrix: Array, live: Array) -> Array:
    """Solve for the exact numbers that the coefficients stand for, highest degree first.

    Bytes per pixel are multiples of 1/256 and bytes per pixel squared of 2^-20: channels are multiples of 64 (the
    latents' four are at full resolution), a latent is 64 pixels, and the lowest resolution has a 64th of the latents.
    Bytes per token are multiples of 64. What rounding to 512 leaves over goes into the terms without a size.
    """
    exact = np.zeros((len(products), live.shape[1]))
    todo = list(range(len(products)))
    while todo:
        columns = matrix[:, todo]
        scale = np.abs(columns).max(axis=0)
        solved = np.linalg.pinv(columns / scale) @ (live - matrix @ exact) / scale[:, None]
        highest = max(_degree(products[i]) for i in todo)
        step = _STEPS[highest]
        for row, i in enumerate(tuple(todo)):
            if _degree(products[i]) == highest:
                exact[i] = np.round(solved[row] / step) * step
                todo.remove(i)
    return exact


def _degree(product: str) -> tuple[int, int]:
    """How often pixels and tokens appear in a product."""
    used = letters(product)
    return sum(letter in "APD" for letter in used), sum(letter in "LE" for letter in used)


def _independent(products: Sequence[str], values: dict[str, Array]) -> tuple[tuple[str, ...], Array]:
    """The products that are identified by these values, and their columns."""
    kept: list[str] = []
    columns: list[Array] = []
    for product in products:
        column = values[product]
        if not column.any():
            continue
        trial = np.column_stack([c / np.linalg.norm(c) for c in [*columns, column]])
        if np.linalg.svd(trial, compute_uv=False)[-1] > 1e-9:
            kept.append(product)
            columns.append(column)
    return tuple(kept), np.column_stack(columns)
