"""What the stages of some runs hold under tables of kernels: arithmetic on what is live at their convolutions."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from sdfit.equation.sizes import Array
from sdfit.equation.stages import stages_of
from sdfit.equation.weights import GRANULE_BYTES
from sdfit.fit.folds import Indices
from sdfit.fit.live import Convolution, Skeleton
from sdfit.fit.tables import OPERANDS, UPSAMPLED, Copies, Odd, Table, own_rules
from sdfit.predict.simulation.workspaces import HALF, PAD_BYTES, Architecture, Rule, convolution_bytes
from sdfit.records import Record

Mask = np.ndarray[Any, np.dtype[np.bool_]]


class Shown:
    """The stages of runs of one group of dtypes, a row each, in their order.

    Parameters
    ----------
    skeletons : sequence of Skeleton
    dtypes : tuple of str
    own : Architecture
        The prior's, whose rules a table without copies of its own has.

    Attributes
    ----------
    bare_bytes : array, shape (rows,)
        Each stage's peak where no kernel holds anything.
    weights_bytes : array, shape (rows,)
        The weights in it.
    """

    def __init__(self, skeletons: Sequence[Skeleton], dtypes: tuple[str, ...], own: Architecture) -> None:
        self.dtypes, self.own = dtypes, own
        bare: list[int] = []
        weights: list[int] = []
        live: list[int] = []
        starts: list[int] = []
        self.convolutions: list[Convolution] = []
        for one in skeletons:
            record = record_of(0, one, [one.bare_bytes[s] for s in stages_of(one.workload.variant)])
            for stage in stages_of(one.workload.variant):
                weights.append(record.weights_bytes(stage))
                bare.append(one.bare_bytes[stage])
                starts.append(len(live))
                found = one.live_bytes.get(stage, {})
                live += [one.bare_bytes[stage], *found.values()]
                self.convolutions += [_NOTHING, *found]
        self.weights_bytes = np.array(weights, dtype=np.int64)
        self.bare_bytes, self._live = np.array(bare, dtype=np.int64), np.array(live, dtype=np.int64)
        self._starts = np.array(starts, dtype=np.intp)
        shapes = self.convolutions
        self.pixels = np.array([0 if one is _NOTHING else one[3][2] * one[3][3] for one in shapes])
        self._one = np.array([image[0] == 1 for _, image, _, _ in shapes])
        self._last = np.array([(image[1], weight[0]) == UPSAMPLED for _, image, weight, _ in shapes])
        self._element_bytes = 2 if dtypes == HALF else 4
        facts = [_facts(one) for one in shapes]
        self._elements = np.array([fact.elements for fact in facts], dtype=np.int64).reshape(-1, len(OPERANDS)).T
        self._only = {"all": self.pixels > 0, "aligned": np.array([fact.aligned for fact in facts], dtype=bool)}
        self._strided = np.array([fact.strided for fact in facts], dtype=bool)
        self._winograd = np.array([fact.winograd_bytes for fact in facts], dtype=np.int64)
        made = Architecture("", (), own_rules(dtypes, own), 0)
        self._of_prior = np.array([_held(made, one) for one in shapes], dtype=np.int64)
        self._mains: dict[tuple[Copies, str], Array] = {}

    def peaks(self, table: Table) -> Array:
        """The peak of each stage under a table [bytes]."""
        held = self._live + self.held(table)
        found: Array = np.maximum.reduceat(held, self._starts)
        return found

    def highest(self, table: Table) -> Indices:
        """Of each stage that convolution during which most is held."""
        held = self._live + self.held(table)
        ends = [*self._starts[1:].tolist(), len(held)]
        return np.array(
            [first + int(np.argmax(held[first:end])) for first, end in zip(self._starts.tolist(), ends, strict=True)]
        )

    def needed(self, table: Table, odd: Odd) -> Array:
        """What is in use while each convolution runs by a larger plan [bytes]; 0 where there is none, or it would set no peak."""
        usual = self._usual(table)
        total = self._live + odd.amount * usual // 10
        sets = (
            (usual > 0)
            & self._reach(odd.scope)
            & (total > np.repeat(self.bare_bytes, np.diff([*self._starts, len(total)])))
        )
        found: Array = np.where(sets, total, 0)
        return found

    def held(self, table: Table) -> Array:
        """What the kernel of each convolution holds [bytes]."""
        held, larger = self._usual(table), table.having("larger")
        if larger is not None:
            wanted = larger.amount * held // 10
            taken = self._reach(larger.scope)
            if larger.room_bytes is not None:
                taken = taken & (self._live + wanted <= larger.room_bytes)
            held = np.where(taken, wanted, held)
        return np.asarray(held)

    def _usual(self, table: Table) -> Array:
        held = self._of_prior if table.copies is None else self._main(table.copies, table.only)
        for kind, where in (("single", self._one), ("small", None)):
            other = table.having(kind)
            if other is not None:
                only = table.only or "all"
                inside = (self.pixels <= other.amount if where is None else where) & self._only[only]
                held = np.where(inside, self._main(other.copies or (0, 0, 0), only), held)
        large = table.having("large")
        if large is not None:
            inside = (self.pixels > large.amount) & self.images(large.scope)
            held = np.where(inside, self._main(large.copies or (0, 0, 0), table.only or "all"), held)
        if table.having("unstrided") is not None:
            held = np.where(self._strided, 0, held)
        pad = table.having("pad")
        if pad is not None:
            held = np.where(held > 0, held + pad.amount, held)
        if table.upsampled:
            held = np.where(self._last & ~self._one, 0, held)
        if table.winograd:
            held = np.where(self._winograd > 0, self._winograd, held)
        return np.asarray(held)

    def _main(self, copies: Copies, only: str) -> Array:
        known = self._mains.get((copies, only))
        if known is None:
            total = np.array(copies) @ self._elements * self._element_bytes
            known = np.where(self._only[only] & any(copies), -(-total // GRANULE_BYTES) * GRANULE_BYTES + PAD_BYTES, 0)
            self._mains[copies, only] = known
        return known

    def images(self, scope: str) -> Mask:
        """Which convolutions are of ``one`` image, of ``several``, of ``all``."""
        return {"one": self._one, "several": ~self._one}.get(scope, np.ones(len(self._one), dtype=bool))

    def _reach(self, scope: str) -> Mask:
        found = self._one if "one" in scope else np.ones(len(self._one), dtype=bool)
        return found & self._last if "upsampled" in scope else found


class _Facts(NamedTuple):
    """What of a convolution decides what its kernel holds: elements of its operands, at once; what rules go by."""

    elements: tuple[int, ...] = (0, 0, 0)
    aligned: bool = False
    strided: bool = False
    winograd_bytes: int = 0


@lru_cache(1 << 17)
def _facts(one: Convolution) -> _Facts:
    if one is _NOTHING:
        return _Facts()
    dtypes = one[:1]

    def held(**rule: Any) -> int:
        return convolution_bytes(Architecture("", (), (Rule(dtypes, evidence="", **rule),), 0), *one)

    elements = tuple(
        held(copies=(name,), element_bytes=GRANULE_BYTES, pad_bytes=0) // GRANULE_BYTES for name in OPERANDS
    )
    aligned, strided = (Rule(dtypes, (), "", **rule).holds(*one) for rule in ({"only": "aligned"}, {"strided": True}))
    return _Facts(elements, aligned, strided, held(copies=("winograd",), only="heavy"))


@lru_cache(1 << 17)
def _held(made: Architecture, one: Convolution) -> int:
    return 0 if one is _NOTHING else convolution_bytes(made, *one)


def record_of(index: int, run: Skeleton, peaks: Sequence[int]) -> Record:
    """The record of a simulated run, by the peaks of its stages, in their order [bytes]."""
    found = {stage: int(peak) for stage, peak in zip(stages_of(run.workload.variant), peaks, strict=True)}
    return Record(
        index,
        run.workload,
        "ok",
        found,
        run.component_bytes,
        allocated_bytes=max(found.values()),
        baseline_bytes=run.baseline_bytes,
    )


_NOTHING: Convolution = ("", (2, 1, 1, 1), (1, 1, 1, 1), (2, 1, 1, 1))
"""Stands in each stage for what is there without any convolution."""
