"""`f`: from a workload to bytes. Calling a `Predictor` gives a `Prediction`. Nothing but numpy is imported."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from sdfit.equation.metrics import METRICS, check_metric
from sdfit.equation.sizes import Sizes
from sdfit.errors import InvalidWorkload, listed
from sdfit.predict import advise, conformal, verdict
from sdfit.predict.artifact import Artifact
from sdfit.predict.cards import CONTEXT_BYTES, Card, architecture_of, find_card
from sdfit.predict.memory import available
from sdfit.predict.prediction import Prediction, predicted
from sdfit.predict.schema import RESTS_ON
from sdfit.predict.table import predict_table
from sdfit.predict.variant import Variant
from sdfit.predict.verdict import Verdict
from sdfit.workload import (
    CHUNK_TOKENS,
    VARIANT_FIELDS,
    WORKLOAD_FIELDS,
    VariantKey,
    Workload,
    check_keywords,
    one_of,
    plain_run,
)

DEFAULT_LEVEL = 0.95
ROUNDING = 1e-9
"""Relative; more than what a table and single calls of the same numbers differ by."""
WRONG_HALF = "This card computes float16 wrongly (black images): run it in float32 (dtype='float32')"
"""Said of a card of which `sdfit.predict.cards` says so."""


class Predictor:
    """A calibrated model of one card: ``f(height, width, prompt_length, **options)`` in bytes.

    Parameters
    ----------
    artifact : Artifact
    path : Path, optional
        Where it was loaded from.
    name : str, optional
        The card that it answers for; None: the artifact's own name.
    card : Card, optional
        That card's row of the table.

    Examples
    --------
    >>> import sdfit, warnings
    >>> with warnings.catch_warnings():
    ...     warnings.simplefilter("ignore")
    ...     f = sdfit.load("t4")
    >>> f(512, 512) < f(1024, 1024)
    True
    """

    _simulates = False
    _plain_images: float = math.inf
    _plain_pixels: float = math.inf
    """Of a call of so many images or more, so many pixels together and more are not left to the equation unseen."""

    def __init__(
        self, artifact: Artifact, path: Path | None = None, name: str | None = None, card: Card | None = None
    ) -> None:
        self.artifact, self.path, self.card = artifact, path, card
        self.name = name or artifact.name
        self._variants: dict[VariantKey, Variant] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return (Predictor, (self.artifact, self.path, self.name, self.card))

    @property
    def provenance(self) -> str:
        """What the numbers rest on: ``measured``, ``corrected``, ``published``, ``traced`` or ``fake``."""
        return self.artifact.provenance

    @property
    def equation(self) -> Predictor:
        """The regression alone, without any simulation (see `sdfit.predict.replayed`): here itself."""
        return self

    def within(self, limit_bytes: float) -> Predictor:
        """The model for many questions whether runs need more than a limit [bytes]: here itself."""
        return self

    @property
    def metrics(self) -> tuple[str, ...]:
        """The metrics that it can predict."""
        known = {"allocated", *self.artifact.metrics}
        if "reserved" in known:
            known.add("device")  # with a stated CUDA context, where the records hold none
        return tuple(name for name in METRICS if name in known)

    @property
    def context_bytes(self) -> int:
        """The CUDA context that device memory counts where no sweep measured it; of an unknown card the largest one."""
        return self.card.context_bytes if self.card is not None else CONTEXT_BYTES[-1][1]

    @property
    def evidence(self) -> str:
        """How many runs its numbers rest on, and whose: this card's, its architecture's, or those of a neighbour."""
        evaluation, card = self.artifact.evaluation, self.card
        prior = self.artifact.prior
        if prior:
            whose = "measured" if self.provenance == "corrected" else "none of them on a card"
            return f"{prior['rows']} runs, {whose}, correct the model '{prior['name']}' ({prior['provenance']})"
        if self.provenance != "published":
            rows = f"{evaluation['rows']} runs"
            return f"{rows} measured" if self.provenance == "measured" else f"{rows}, none of them on a card"
        published: dict[str, int] = evaluation["published"]["cards"] if "published" in evaluation else {}
        architecture = card.architecture if card is not None else architecture_of(self.name)
        own = published.get(card.slug, 0) if card is not None else 0
        known = {name: find_card(name) for name in published}
        alike = [name for name, other in known.items() if other is not None and other.architecture == architecture]
        if own:
            return f"{own} published measurements of this card"
        if alike:
            return f"{sum(published[n] for n in alike)} published measurements of its architecture ({listed(alike)})"
        if published:
            return (
                f"{sum(published.values())} published measurements of cards with the same kernels ({listed(published)})"
            )
        return "no published measurement of a card with these kernels: they are taken from neighbours"

    @property
    def rests_on(self) -> str:
        """One line on which model answers for a card, and what its numbers rest on."""
        artifact = self.artifact
        what = f"{self.name}: " + (f"model '{artifact.name}', " if artifact.name != self.name else "")
        if artifact.provenance == "measured" or artifact.prior:
            return what + self.evidence
        if artifact.provenance == "published":
            what += f"not measured; it rests on a calibrated simulation and {self.evidence}"
        else:
            what += f"not measured; it rests on {RESTS_ON[artifact.provenance]}"
        return what + (f". {WRONG_HALF}" if self.wrong_half else "")

    @property
    def wrong_half(self) -> bool:
        """Whether it is known of the card that it computes float16 wrongly."""
        return self.card is not None and self.card.half == "wrong"

    def __repr__(self) -> str:
        return f"<sdfit model '{self.name}', {self.provenance}, {len(self.artifact.swept)} variants>"

    @property
    def _alone(self) -> Callable[..., Prediction] | None:
        """Predicts the rows of a table that no sweep had, one by one, if it can."""
        return None

    def variant(self, key: VariantKey) -> Variant:
        """The compiled variant.

        Raises
        ------
        UnknownVariant
            If it was never swept; names those that were.
        """
        found = self._variants.get(key)
        if found is None:
            key = tuple(one_of(n, v) for n, v in zip(VARIANT_FIELDS, key, strict=True))
            found = self._variants[key] = Variant(self.artifact, key, self.context_bytes)
        return found

    def __call__(
        self,
        height: int,
        width: int,
        prompt_length: int = CHUNK_TOKENS,
        batch_size: int = 1,
        guidance_scale: float = 7.5,
        dtype: str = "float16",
        attention: str = "sdpa",
        vae: str = "kl",
        vae_slicing: bool = False,
        vae_tiling: bool = False,
        offload: str = "none",
        safety_checker: bool = True,
        execution: str = "default",
        metric: str = "allocated",
        level: float = DEFAULT_LEVEL,
        **unknown: Any,
    ) -> Prediction:
        """Predict the peak memory of one workload.

        Parameters
        ----------
        height, width, prompt_length, batch_size, guidance_scale, dtype, attention, vae, vae_slicing, vae_tiling, \
offload, safety_checker, execution
            As in `Workload`.
        metric : {'allocated', 'reserved', 'device', 'required'}
        level : float
            Of the prediction's ``interval`` and ``upper``.

        Returns
        -------
        Prediction
            A float [bytes].

        Raises
        ------
        InvalidWorkload, UnknownKeyword, UnknownVariant
        """
        if unknown:
            check_keywords(unknown, ("metric", "level"))
        key = (dtype, attention, vae, vae_slicing, vae_tiling, offload, safety_checker, execution)
        # the common case without a Workload: a variant that was used before, plain numbers, the default metric
        try:
            found = self._variants.get(key)
        except TypeError:  # a list or the like; the Workload says what is wrong with it
            found = None
        if (
            found is not None
            and vae_slicing is found.slicing  # 0 and 1 would find it too
            and vae_tiling is found.tiling
            and safety_checker is found.checked
            and type(metric) is str  # an array could not be compared
            and metric == "allocated"
            and type(level) is float
            and level == DEFAULT_LEVEL
            and not (found.strays and self._simulates)
        ):
            runs_as = plain_run(height, width, prompt_length, batch_size, guidance_scale)
            if runs_as is not None and (
                batch_size < self._plain_images or batch_size * height * width < self._plain_pixels
            ):
                numbers = height, width, prompt_length, batch_size, guidance_scale
                return predicted(found.peak(*runs_as), found, numbers, metric, level)
        workload = Workload(height, width, prompt_length, batch_size, guidance_scale, *key)
        return self.predict_workload(workload, metric=metric, level=level)

    def predict_workload(
        self, workload: Workload, *, metric: str = "allocated", level: float = DEFAULT_LEVEL
    ) -> Prediction:
        """Predict for a `Workload`; otherwise as calling."""
        check_metric(metric)
        conformal.check_level(level)
        found, sizes = self.variant(workload.variant), Sizes.of_workload(workload)
        value = float(found.metric(found.stage_peaks(sizes), metric, sizes))
        return Prediction(value, found, workload, metric, level)

    def predict(self, table: Any, *, metric: str = "allocated") -> Any:
        """Predict many workloads at once.

        Parameters
        ----------
        table : mapping of columns, or DataFrame
            Columns named as `Workload`'s fields; ``height`` and ``width`` must be there, the others take their
            defaults. A column is an array or one value for all rows.

        Returns
        -------
        array of float64, shape (rows,)
            Bytes.
        """
        check_metric(metric)
        return predict_table(self.variant, table, metric, alone=self._alone)[0]

    def predict_interval(self, table: Any, *, metric: str = "allocated", level: float = DEFAULT_LEVEL) -> Any:
        """Predict intervals for many workloads; ``table`` as in `predict`.

        Returns
        -------
        array of float64, shape (rows, 2)
            Lower and upper end [bytes]; infinite where the scores cannot support the level.
        """
        conformal.check_level(level)
        check_metric(metric)
        value, (below, above) = predict_table(self.variant, table, metric, level, alone=self._alone)
        return np.column_stack([np.maximum(value - below, 0.0), value + above])

    def beyond(self, table: Any, limit_bytes: float, *, metric: str, level: float) -> Any:
        """Which of many runs surely have an upper bound above a limit: those that a search need not ask for one by one.

        Parameters
        ----------
        table
            As in `predict`.
        level : float
            Of the one-sided bound.

        Returns
        -------
        array of bool, shape (rows,)
        """
        value, (_, above) = predict_table(self.variant, table, metric, 2 * level - 1)
        upper = value + above
        return np.isfinite(upper) & (upper > limit_bytes * (1 + ROUNDING))

    def is_sure(
        self, workload: Workload, limit_bytes: float, *, metric: str, level: float, simulated: bool = False
    ) -> bool:
        """Whether a run's upper bound is within a limit [bytes]: a question that may be answered sooner than by the bound.

        Raises
        ------
        InvalidWorkload
            As `sdfit.predict.verdict.bound`.
        """
        return verdict.bound(self, workload, metric, level).upper <= limit_bytes

    def supported_level(self, metric: str) -> float:
        """The highest level that a metric's conformal scores support; 0 without any."""
        check_metric(metric)
        every = self.artifact.scores.get(metric)
        return every[""]["count"] / (every[""]["count"] + 1) if every else 0.0

    def verdict(
        self,
        *args: Any,
        memory: str | float | None = None,
        metric: str | None = None,
        level: float | None = None,
        **kwargs: Any,
    ) -> Verdict:
        """Whether a workload fits, may fit or does not; see `sdfit.predict.verdict.verdict`.

        Parameters
        ----------
        memory : str or float, optional
            As in `sdfit.predict.memory.available`; None: what the card leaves.

        Examples
        --------
        >>> import sdfit, warnings
        >>> with warnings.catch_warnings():
        ...     warnings.simplefilter("ignore")
        ...     f = sdfit.load("t4")
        >>> f.verdict(512, 512, memory="8 GiB").answer, f.verdict(2048, 2048, memory="8 GiB").answer
        ('fits', 'does not fit')
        """
        there = available(memory, self.card).memory_bytes
        return verdict.verdict(self, _workload(args, kwargs), memory=there, metric=metric, level=level)

    def fits(
        self,
        *args: Any,
        memory: str | float | None = None,
        metric: str | None = None,
        level: float | None = None,
        **kwargs: Any,
    ) -> bool:
        """Whether a workload's upper bound stays within an amount of memory; see `sdfit.predict.verdict.fits`."""
        there = available(memory, self.card).memory_bytes
        return verdict.fits(self, _workload(args, kwargs), memory=there, metric=metric, level=level)

    def largest(self, *, memory: str | float | None = None, **kwargs: Any) -> advise.LargestSize:
        """The largest size of an aspect ratio that fits; see `sdfit.predict.advise.largest`."""
        return advise.largest(self, memory=available(memory, self.card).memory_bytes, **kwargs)

    def max_batch_size(
        self, height: int, width: int, *args: Any, memory: str | float | None = None, **kwargs: Any
    ) -> advise.LargestBatch:
        """The largest batch that fits; see `sdfit.predict.advise.max_batch_size`."""
        there = available(memory, self.card).memory_bytes
        return advise.max_batch_size(self, height, width, *args, memory=there, **kwargs)


def _workload(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Workload:
    """The workload of a call, its fields by place or by name."""
    if len(args) > len(WORKLOAD_FIELDS):
        raise InvalidWorkload(f"{len(args)} values were given by place; there are {len(WORKLOAD_FIELDS)} fields")
    given = dict(zip(WORKLOAD_FIELDS, args, strict=False))
    twice = sorted(set(given) & set(kwargs))
    if twice:
        raise InvalidWorkload(f"{twice[0]} was given twice, by place and by name")
    return Workload.from_dict(given | kwargs)
