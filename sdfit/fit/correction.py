"""Corrections to a prior: what a few runs of a card change in the model of its kernels.

    coefficient of the card = coefficient of the prior + correction,    corrections ~ Normal(0, S)

Cards of one pipeline differ in what their kernels hold beside its tensors: bytes per pixel at a stage's peak, by regime, and
a constant. So two coefficients of each stage and regime are corrected, the constant and the main term in H·W
(`MAIN_TERM`); the others follow from shapes and stay the prior's. The correction of a slope is the sum of effects that
it shares with others (`SLOPE_SHARES`), so a run tells most of its own stage and regime, something of those that are like
them, and nothing of the rest. S follows from the standard deviations of the effects.

Before that `sdfit.fit.kernels` finds which kernels the runs show. Where the prior can be simulated, runs are held against their
simulation with these, not against an equation: what it misses of its own card is no correction.

With a misfit that is taken for granted (`MISFIT`) the posterior is linear algebra: `correct` works it out from records,
`sdfit.fit.planning` from workloads that have not run yet.

The standard deviations are a judgement. They span what the kernels known so far do to each other's models (`models/`: from
V100 to Pascal the slopes of the VAE's blocks differ by a third to three quarters, within one dtype by much less), and
`Posterior.scale` compares them with what the card's own runs show.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from sdfit.equation.metrics import MATERIALISED
from sdfit.equation.regimes import REGIMES, regime
from sdfit.equation.sizes import Array, Sizes
from sdfit.equation.stages import STAGE, UNET_STAGES, StageKey, stage_key, stages_of
from sdfit.equation.terms import COLUMN, products
from sdfit.errors import FitError, UnknownVariant, listed
from sdfit.fit.folds import Indices
from sdfit.fit.kernels import Kernels, kernels_of_prior, recognise
from sdfit.predict.artifact import Artifact
from sdfit.predict.predictor import Predictor
from sdfit.predict.variant import Variant
from sdfit.records import Record
from sdfit.workload import DTYPE_BYTES, Workload

MAIN_TERM = {stage: "m·P" if stage.startswith("vae") else "n·A" for stage in STAGE} | {
    "text_encoder": "n",
    "safety_checker": "B",
}
"""The term of each stage whose coefficient is corrected beside the constant."""
SLOPE_SHARES = {"kind": 0.30, "kind, regime": 0.20, "kind, regime, size": 0.02, "own": 0.01, "own, regime": 0.01}
"""Standard deviation of each effect on a slope, as a share of it. A *kind* is a stage of one VAE in dtypes of one size; float16
and bfloat16 run the same plans, as far as anybody published.

The size's effect has no place in the equation: a kernel that is chosen at some sizes only, as in published row COL-003, is
misfit. It makes the plan visit several sizes, and intervals allow for those that it did not."""
UNEXPLAINED = {"kind": 0.5, "kind, regime": 0.4, "kind, regime, size": 0.3}
"""The same where no table gives what the runs show: as far as workspaces may go, from none to several copies, at sizes and numbers
of images that no run shows."""
UNSHOWN = 0.6
"""How much further a slope may lie there at sizes that no run shows, as a share of it: kernels may change with the size, from none to
several copies. Of intervals alone: as a correction's it would make runs say more of their own sizes, and less of all others."""
UNEXPLAINED_MISFIT = 4.0
"""And so much further from the equation does a stage lie."""
ATTENTION_SHARES = {"kind": 0.10, "kind, regime": 0.05, "own": 0.08}
"""The same in stages that depend on the kind of attention: convolutions seldom set their peak, and attention decides which."""
CARD_BYTES, KIND_BYTES, UNET_BYTES, OWN_BYTES = 64 << 20, 16 << 20, 128 << 20, 2 << 20
"""Standard deviation of constants: the card's in every stage (cuBLAS, say), a kind's (the UNet's filters are larger), one set of
coefficients' [bytes]. Where no scores are held, the UNet's differs by regime too, by as much as a kind's: one sample of a small
image is where filters outweigh feature maps, and there the equation bends."""
SIZE_EDGES = (640_000, 2_560_000)
"""Where sizes are told apart, in pixels of a pass: 800² and 1600²."""
MISFIT, MISFIT_BYTES, UNET_MISFIT_BYTES = 0.002, 4 << 20, 16 << 20
"""How far a stage lies from a corrected equation: this share of the run's activations, and so many bytes in 16 bits, twice as many in
32. The UNet's more: in small images its peak is where filters are copied, in large ones where feature maps are widest."""
ONE_BY_ONE = tuple(i for i, r in enumerate(REGIMES) if r.images[0] > 2 and r.elements[0])
APART = 0.03
"""Where three images or more run one by one (`ONE_BY_ONE`), what the kernels of one hold does not grow with their number, and no term
of the equation is of one image: this share of a stage's activations may be so."""
MOST_DISCOUNT = 100.0
"""A stage far below the run's peak may be off by so many times more than the stage that sets it, at most."""
LEAST_SLOPE = 64.0
"""Of which a share is taken where the prior's slope is next to nothing [bytes per pixel in 16 bits]."""
SLOPES_OF_NO_PIXELS = {"n": 1e6, "B": 5e6}
"""The same of terms that count samples or images [bytes]."""
PRIOR_RUNS = 8
"""So many runs as assumed the scale starts from."""


class Rows(NamedTuple):
    """Stages of workloads, a row each.

    Parameters
    ----------
    X : array, shape (rows, effects)
        What each effect adds [bytes, or bytes per share].
    place : array of int, shape (rows,)
        Which workload a row is of.
    prior_bytes, weights_bytes : arrays, shape (rows,)
        The stage's peak by the prior, and the weights in it [bytes].
    misfit_bytes : array, shape (rows,)
        Standard deviation of what the equation misses [bytes].
    apart_bytes : array, shape (rows,)
        What of it is of images that run one by one [bytes].
    """

    X: Array
    place: Indices
    prior_bytes: Array
    weights_bytes: Array
    misfit_bytes: Array
    apart_bytes: Array

    def highest(self, values: Array) -> Array:
        """The highest of some values of each workload's stages."""
        found = np.full(int(self.place.max()) + 1, -np.inf)
        np.maximum.at(found, self.place, values)
        return found


class Prior:
    """A model whose coefficients are to be corrected, and the effects that may do so.

    Parameters
    ----------
    artifact : Artifact

    Attributes
    ----------
    sd : array, shape (effects,)
        Their standard deviations.
    kept : array of bool, shape (effects,)
        Those that become part of a corrected model; the others are misfit.
    kernels : Architecture or None
        Those that it was simulated with; None: it cannot be simulated.
    wide : frozenset of int
        Bytes of an element of those dtypes of whose kernels no table gives what runs show.
    """

    def __init__(self, artifact: Artifact) -> None:
        self.artifact, self.predictor, self.kernels = artifact, Predictor(artifact), kernels_of_prior(artifact)
        self.effects: dict[tuple[object, ...], int] = {}
        self.wide: frozenset[int] = frozenset()
        found: list[float] = []
        self._slopes: dict[StageKey, list[float]] = {}
        self._at: dict[tuple[StageKey, int, int], tuple[list[int], list[int]]] = {}
        for key in (tuple(text.split("|")) for text in artifact.stages):
            self._slopes[key] = _slopes(artifact, key)
            for which in regimes_of(key):
                for size in range(len(SIZE_EDGES) + 1):
                    both: tuple[list[int], list[int]] = ([], [])
                    for i, named in enumerate((_constants(key, which), _shares(key, which, size))):
                        for name, sd in named.items():
                            if name not in self.effects:
                                self.effects[name] = len(found)
                                found.append(sd)
                            both[i].append(self.effects[name])
                    self._at[key, which, size] = both
        self.sd = np.array(found)
        self.kept = np.array([name[0] != "kind, regime, size" for name in self.effects])

    def with_stages_of(self, artifact: Artifact) -> Prior:
        """The same effects, on top of another model's equation."""
        twin = copy.copy(self)
        twin.artifact, twin.predictor = artifact, Predictor(artifact)
        return twin

    def unexplained(self, kernels: Kernels) -> Prior:
        """The same effects, wide as kernels may be where no table gives what the runs show."""
        twin = copy.copy(self)
        twin.wide = frozenset(DTYPE_BYTES[dtype] for dtype in DTYPE_BYTES if not kernels.is_explained(dtype))
        wide = {name: UNEXPLAINED[str(name[0])] for name in self.effects if twin._is_wide(name)}
        twin.sd = np.array([wide.get(name, sd) for name, sd in zip(self.effects, self.sd, strict=True)])
        return twin

    @property
    def unshown(self) -> Array:
        """Of each effect the standard deviation that intervals add where no run tells it: `UNSHOWN` of those of sizes, else none."""
        sizes = [name[0] == "kind, regime, size" and self._is_wide(name) for name in self.effects]
        return UNSHOWN * np.array(sizes, dtype=float)

    def _is_wide(self, effect: tuple[object, ...]) -> bool:
        """Whether an effect is of kernels that no table gives: by the kind, a stage, a VAE and the bytes of an element."""
        return effect[0] in UNEXPLAINED and effect[3] in self.wide

    def variant(self, workload: Workload) -> Variant:
        """What the prior has of a workload's variant."""
        return self.predictor.variant(workload.variant)

    def knows(self, workload: Workload) -> bool:
        """Whether the prior has a prediction for a workload."""
        try:
            return bool(self.variant(workload))
        except UnknownVariant:
            return False

    def effects_on(self, key: StageKey, which: int, term: str) -> Array:
        """What each effect adds to a coefficient of a corrected model, the constant or the main term, in a regime.

        Nothing, where the prior has no such line: it came with the kernels.
        """
        row = np.zeros(len(self.sd))
        constants, shares = self._at.get((key, which, 0), ([], []))
        if term == "1":
            row[constants] = 1.0
        else:
            row[shares] = self._slopes[key][which] if shares else 0.0
        kept: Array = row * self.kept
        return kept

    def rows(self, workloads: Sequence[Workload]) -> Rows:
        """The stages of some workloads, in the order in which they run."""
        designs: list[Array] = []
        place, peaks, weights, misfits, apart = [], [], [], [], []
        for i, w in enumerate(workloads):
            variant, sizes = self.variant(w), Sizes.of_workload(w)
            every, found = products(*sizes), variant.stage_peaks(sizes)
            top = max(found[stage] - variant.weights[stage] for stage in found)
            for stage in stages_of(w.variant):
                key, which = stage_key(stage, w.variant), int(regime(stage, sizes))
                constants, shares = self._at[key, which, _size(stage, sizes)]
                row = np.zeros(len(self.sd))
                row[constants] = 1.0
                row[shares] = self._slopes[key][which] * every[COLUMN[MAIN_TERM[stage]]]
                designs.append(row)
                place.append(i)
                peaks.append(found[stage])
                weights.append(variant.weights[stage])
                wide = UNEXPLAINED_MISFIT if DTYPE_BYTES[key[1]] in self.wide else 1.0
                misfits.append(wide * misfit_bytes(key, found[stage] - variant.weights[stage], top))
                one_by_one = which in ONE_BY_ONE and "tiny" not in key
                apart.append(APART * (found[stage] - variant.weights[stage]) if one_by_one else 0.0)
        noise = np.hypot(misfits, apart)
        return Rows(np.array(designs), np.array(place), np.array(peaks), np.array(weights), noise, np.array(apart))


def regimes_of(key: StageKey) -> range:
    """The regimes that a stage tells apart: those of elements only where its convolutions can pass 2^31 of them."""
    return range(len(REGIMES) if STAGE[key[0]].widest_channels else 2)


def misfit_bytes(key: StageKey, activation_bytes: float, top_bytes: float) -> float:
    """How far a stage may lie from the equation [bytes]: the further it is below the run's highest, the more.

    An error there spoils no answer, and what lies below the peak was fitted with less weight.
    """
    below = min(top_bytes / max(activation_bytes, 1.0), MOST_DISCOUNT)
    own = (UNET_MISFIT_BYTES if key[0] in UNET_STAGES else MISFIT_BYTES) * DTYPE_BYTES[key[1]] / 2
    return (MISFIT * top_bytes + own) * below


@dataclass(frozen=True, slots=True)
class Posterior:
    """What is known of the corrections after some runs.

    Parameters
    ----------
    prior : Prior
    mean : array, shape (effects,)
    covariance : array, shape (effects, effects)
        In units of the effects' standard deviations, as assumed; times ``scale`` squared as the runs have it.
    scale : float
        How far the runs lay from predictions by the other runs, over what was assumed; 1 at least.
    degrees : float
        Of freedom, of Student's distribution that the corrections then have.
    left_out : dict
        Place of a run among those that succeeded -> by how much the others correct each of its stages [bytes]; NaN where the run
        told nothing of it.
    found : Kernels or None
        The kernels that the runs show; corrections are of a model with these. None: the prior cannot be simulated.
    """

    prior: Prior
    mean: Array
    covariance: Array
    scale: float
    degrees: float
    left_out: dict[int, Array]
    found: Kernels | None


def correct(prior: Prior, records: Sequence[Record], before: Kernels | None = None) -> Posterior:
    """Work out the corrections from runs.

    Parameters
    ----------
    prior : Prior
    records : sequence of Record
        Runs that succeeded tell all their stages; others nothing.
    before : Kernels, optional
        As `sdfit.fit.kernels.recognise` takes it.

    Raises
    ------
    FitError
        If none tells anything, or one is of a variant that the prior lacks.
    """
    ok = [r for r in records if r.outcome == "ok"]
    if not ok:
        raise FitError(
            f"none of the {len(records)} runs succeeded: there is nothing to correct a prior by; sweep smaller sizes"
        )
    lacking = [r.workload for r in ok if not prior.knows(r.workload)]
    if lacking:
        raise FitError(
            f"the prior '{prior.artifact.name}' knows nothing of {lacking[0].variant}; it knows: "
            f"{listed(prior.artifact.swept)}; --prior names another, --prior none fits every coefficient"
        )
    rows = prior.rows([r.workload for r in ok])
    stages = [(i, stage) for i, r in enumerate(ok) for stage in stages_of(r.workload.variant)]
    seen = np.array([ok[i].stage_peaks_bytes.get(s, np.nan) - ok[i].weights_bytes(s) for i, s in stages])
    kernels = recognise(prior.kernels, ok, before) if prior.kernels is not None else None
    if kernels is not None:
        prior = prior.unexplained(kernels)
        rows = prior.rows([r.workload for r in ok])
    expected = rows.prior_bytes - rows.weights_bytes
    if kernels is not None:
        held = np.concatenate(kernels.held_bytes([r.workload for r in ok]))
        expected = np.where(np.isfinite(held), held, expected + kernels.constant_bytes)
    error, told = seen - expected, np.isfinite(seen)
    X, error, noise, place = rows.X[told], error[told], rows.misfit_bytes[told], rows.place[told]
    half = X * prior.sd
    inverse = np.linalg.inv(half @ half.T + np.diag(noise**2))
    solved = inverse @ error
    covariance = np.eye(len(prior.sd)) - half.T @ inverse @ half
    z, left_out = [], {}
    for i, record in enumerate(ok):
        mine = np.flatnonzero(place == i)
        # what the others say of this run: the block of the inverse gives the error of its prediction, and its variance
        variance = np.linalg.inv(inverse[np.ix_(mine, mine)])
        miss = variance @ solved[mine]
        peaks = seen[told][mine] - miss + rows.weights_bytes[told][mine]
        top = int(np.argmax(peaks))
        left_out[i] = np.full(np.count_nonzero(rows.place == i), np.nan)
        left_out[i][told[rows.place == i]] = error[mine] - miss
        z.append((max(record.stage_peaks_bytes.values()) - peaks[top]) / np.sqrt(variance[top, top]))
    degrees = float(PRIOR_RUNS + len(z))
    scale = float(np.sqrt(max((PRIOR_RUNS + np.sum(np.square(z))) / degrees, 1.0)))
    return Posterior(prior, prior.sd * (half.T @ solved), covariance, scale, degrees, left_out, kernels)


def _slopes(artifact: Artifact, key: StageKey) -> list[float]:
    """The prior's slope in each regime, of which the corrections are shares; where it is next to nothing, a least one."""
    stage, term = artifact.stages["|".join(key)], MAIN_TERM[key[0]]
    least = SLOPES_OF_NO_PIXELS.get(term, LEAST_SLOPE * DTYPE_BYTES[key[1]] / 2)
    column = stage["terms"].index(term)
    return [max(float(stage["coef"][row][column]), least) for row in stage["regimes"]]


def _kind(key: StageKey) -> tuple[object, ...]:
    return key[0], "tiny" in key, DTYPE_BYTES[key[1]], *key[1 + len(STAGE[key[0]].fields) :]


def _constants(key: StageKey, which: int) -> dict[tuple[object, ...], float]:
    kind = UNET_BYTES if key[0] in UNET_STAGES else KIND_BYTES
    named: dict[tuple[object, ...], float] = {
        ("card",): CARD_BYTES,
        ("kind, constant", *_kind(key)): kind,
        ("own, constant", *key): OWN_BYTES,
    }
    if key[0] in UNET_STAGES and not any(kind in key for kind in MATERIALISED):
        named["kind, constant, regime", *_kind(key), which] = KIND_BYTES
    return named


def _shares(key: StageKey, which: int, size: int) -> dict[tuple[object, ...], float]:
    named: dict[str, tuple[object, ...]] = {
        "kind": _kind(key),
        "kind, regime": (*_kind(key), which),
        "kind, regime, size": (*_kind(key), which, size),
        "own": key,
        "own, regime": (*key, which),
    }
    sd = dict(SLOPE_SHARES)
    if "attention" in STAGE[key[0]].fields:
        sd |= ATTENTION_SHARES
        if any(kind in key for kind in MATERIALISED):  # score matrices set its peak, and they are no kernel's
            named["kind"], named["kind, regime"] = (*_kind(key), "scores"), (*_kind(key), which, "scores")
    return {(effect, *name): sd[effect] for effect, name in named.items()}


def _size(stage: str, sizes: Sizes) -> int:
    pixels = sizes.m * sizes.P if stage.startswith("vae") else sizes.n * sizes.A
    return sum(pixels > edge for edge in SIZE_EDGES)
