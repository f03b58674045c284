"""The metrics beside allocated memory: regressions on the run's peak and its sizes, by where the run stands.

What a caching allocator needs beyond the live bytes is packing: of a segment that a long-lived tensor sits in, the rest
may stay unused. How much that is follows from which stage sets the peak, which plans its convolutions run, what the
stage before left behind, and is then very nearly linear in the sizes. So `reserved`, `device`, `required` and `minimum`
have coefficients by *place*: what a run has in common with others that pack alike. A place with too few rows takes those
of a wider one. Where a tensor comes to need a segment of its own, or one that another left comes to suffice, the amount
jumps: a group has coefficients for each range of sizes between such jumps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from sdfit.equation.regimes import REGIMES, ROUGH, regime
from sdfit.equation.sizes import Numbers, Sizes
from sdfit.equation.stages import STAGES
from sdfit.equation.terms import COLUMN, products
from sdfit.errors import InvalidWorkload, listed, shown
from sdfit.workload import DTYPE_BYTES, SLICES, STREAMED, VARIANT_FIELDS, VariantKey

METRICS = ("allocated", "reserved", "device", "required", "minimum")
"""What the README's glossary explains; each a peak over one run [bytes]."""
DECIDES = "required"
"""The metric behind every answer to "does it fit"."""
NEVER_BELOW_LIVE = ("allocated", "reserved", "device")
"""Metrics that count what is live; the others are caps, under which PyTorch may do without a workspace."""
LINEAR = ("m·P", "B·A", "n·A", "D")
QUADRATIC = ("n·A²", "m·P²")
METRIC_FEATURES = ("1", "peak", *LINEAR, *QUADRATIC)
"""What the metrics are linear in, above the weights: a constant [1 MiB], the run's peak above the weights [B], and terms
of `sdfit.equation.terms.TERMS`; the quadratic ones only where attention is materialised."""
FEATURE_COLUMNS = tuple(COLUMN[name] for name in (*LINEAR, *QUADRATIC))
"""Where those terms stand among `sdfit.equation.terms.products`."""
CONSTANT_BYTES = 1 << 20
"""Of the feature ``1``, so that all features are of like size."""
MATERIALISED = ("math", "eager", *SLICES)
"""Kinds of attention that hold score matrices."""

PIECE = {stage: stage.removesuffix("_blocks").removesuffix("_mid") for stage in STAGES}
"""The part of the pipeline that a stage belongs to, as far as blocks pack alike in it."""
PIECES = tuple(dict.fromkeys(PIECE.values()))


def packs_like(attention: str, offload: str) -> str:
    """The attention of a `Place`.

    Examples
    --------
    >>> packs_like("sdpa", "model"), packs_like("sdpa", "sequential")
    ('sdpa', 'sdpa/sequential')
    """
    return f"{attention}/{offload}" if offload in STREAMED else attention


class Place(NamedTuple):
    """What runs that pack alike have in common.

    Parameters
    ----------
    element_bytes : int
        Of the dtype.
    attention, vae, offload : str
        As in `sdfit.workload.Workload`; where weights come module by module that is said of the attention too, because
        such runs pack like no others (`packs_like`).
    sliced, tiled : bool
        Whether the VAE really runs in slices, or in tiles: at one image, or up to 512 pixels, it does not.
    guided, three : bool
        Three: three images a pass past 2^31 elements, which pack like two and not like more.
    regime : int
        Of the decoder's blocks, whose convolutions are the largest: an index into `sdfit.equation.regimes.REGIMES`.
    piece : str
        The part of the pipeline that sets the peak of allocated memory: one of `PIECES`.
    """

    element_bytes: int
    attention: str
    vae: str
    offload: str
    sliced: bool
    tiled: bool
    guided: bool
    three: bool
    regime: int
    piece: str

    @property
    def split(self) -> bool:
        """Whether convolutions run image by image: past 2^31 elements."""
        return bool(_SPLIT[self.regime])

    @property
    def rough(self) -> tuple[float, float]:
        """How much less, and more, than the equation says such runs may need: see `sdfit.equation.regimes.ROUGH`."""
        return ROUGH if REGIMES[self.regime].rough else (0.0, 0.0)

    @property
    def tiles(self) -> bool:
        """Whether tiles set the peak: only there a pass's pixels are not the image's, and coefficients tell them apart."""
        return self.tiled and self.piece.startswith("vae")

    @property
    def scoring(self) -> str:
        """The attention, but one word for slices of any size."""
        return "sliced" if self.attention in SLICES else self.attention


_SPLIT = np.array([one.elements[0] > 0 for one in REGIMES])
"""Of each regime."""
WIDENING: tuple[tuple[str, ...], ...] = (
    Place._fields,
    ("element_bytes", "attention", "vae", "offload", "sliced", "tiled", "three", "regime", "piece"),
    ("element_bytes", "attention", "vae", "tiled", "regime", "piece"),
    ("element_bytes", "attention", "tiles", "regime", "piece"),
    ("element_bytes", "attention", "tiles", "piece"),
    ("regime", "piece"),
    ("piece",),
    (),
)
"""What a group of places agrees in, the narrowest first. No two have as many fields, so names tell them apart."""
FAMILIES: tuple[tuple[str, ...], ...] = (
    ("element_bytes", "attention", "vae", "offload", "sliced", "tiled", "split", "three", "piece"),
    ("scoring", "offload", "sliced", "tiled", "split"),
    ("scoring", "offload", "split"),
    ("scoring", "split"),
    (),
)
"""What runs that share conformal scores agree in, the narrowest first: rather another slice size than another offload, with
which the room that a component leaves is used otherwise."""


@cache
def metric_groups(place: Place) -> tuple[str, ...]:
    """The groups whose coefficients a metric may use, the narrowest first; ``""`` holds all.

    Examples
    --------
    >>> metric_groups(Place(2, "sdpa", "kl", "none", False, False, True, False, 1, "unet"))[-3:]
    ('1|unet', 'unet', '')
    """
    return tuple(_name(place, names) for names in WIDENING)


UNSEEN, LEAST = "unseen", "least"


def unseen(place: Place) -> tuple[str, str]:
    """The families of what packing adds to allocated memory in all kinds of runs, for a kind of which too few were seen.

    The narrower is of those that hold attention scores, that bring weights module by module, or neither. Of each kind it has
    the most; a twin, its name ending in `LEAST`, the least.

    Examples
    --------
    >>> unseen(Place(2, "eager", "tiny", "model", False, False, True, False, 1, "unet"))
    ('unseen|scores', 'unseen')
    """
    like = "streamed" if place.offload in STREAMED else "scores" if place.attention in MATERIALISED else "fused"
    return f"{UNSEEN}|{like}", UNSEEN


REPLAYED_FAMILY = "replayed"
"""The family of the scores of runs that were replayed (`sdfit.predict.replayed`); no place is in it."""


def group_fields(name: str) -> dict[str, str]:
    """What the places of a group agree in, as text, from its name.

    Examples
    --------
    >>> group_fields("1|unet")
    {'regime': '1', 'piece': 'unet'}
    """
    values = name.split("|") if name else []
    return dict(zip(next(fields for fields in WIDENING if len(fields) == len(values)), values, strict=True))


@cache
def families(place: Place) -> tuple[str, ...]:
    """The families whose conformal scores a run may use, the narrowest first; ``""`` holds all.

    Examples
    --------
    >>> families(Place(2, "sdpa", "kl", "none", False, False, True, False, 1, "unet"))
    ('2|sdpa|kl|none|0|0|0|0|unet', 'sdpa|none|0|0|0', 'sdpa|none|0', 'sdpa|0', '')
    """
    return tuple(_name(place, names) for names in FAMILIES)


def _name(place: Place, fields: tuple[str, ...]) -> str:
    values = (getattr(place, name) for name in fields)
    return "|".join(str(int(value) if isinstance(value, bool) else value) for value in values)


def place_codes(peaks: Mapping[str, Numbers], sizes: Sizes) -> Numbers:
    """Where runs of one variant stand, as whole numbers that `place_of` spells out; a number or an array.

    Parameters
    ----------
    peaks : mapping
        Stage -> its peak of allocated memory [bytes].
    sizes : Sizes
    """
    at = np.argmax(np.array(list(peaks.values()), dtype=float), axis=0)
    piece = np.array([PIECES.index(PIECE[stage]) for stage in peaks])[at]
    which = np.asarray(regime("vae_decoder_blocks", sizes))
    three = (sizes.m == 3) & _SPLIT[which]
    flags = (((sizes.n > sizes.B) * 2 + (sizes.m < sizes.B)) * 2 + (sizes.P < sizes.A)) * 2 + three
    return (flags * len(REGIMES) + which) * len(PIECES) + piece


def place_of(variant: VariantKey, code: int) -> Place:
    """The place that a code of `place_codes` stands for.

    Examples
    --------
    >>> from sdfit.workload import Workload
    >>> w = Workload(512, 512, batch_size=2)
    >>> place_of(w.variant, int(place_codes({"unet": 3.0, "vae_decoder_mid": 4.0}, Sizes.of_workload(w))))
    Place(element_bytes=2, attention='sdpa', vae='kl', offload='none', sliced=False, tiled=False, guided=True, \
three=False, regime=1, piece='vae_decoder')
    """
    values: dict[str, Any] = dict(zip(VARIANT_FIELDS, variant, strict=True))
    rest, piece = divmod(code, len(PIECES))
    flags, which = divmod(rest, len(REGIMES))
    return Place(
        element_bytes=DTYPE_BYTES[values["dtype"]],
        attention=packs_like(values["attention"], values["offload"]),
        vae=values["vae"],
        offload=values["offload"],
        sliced=bool(flags & 4),
        tiled=bool(flags & 2),
        guided=bool(flags & 8),
        three=bool(flags & 1),
        regime=which,
        piece=PIECES[piece],
    )


def highest(peaks: Mapping[str, Numbers]) -> Any:
    """The largest of the stage peaks [bytes]: the peak of allocated memory."""
    return np.maximum.reduce([np.asarray(p, dtype=float) for p in peaks.values()])


def weights_at_peak(peaks: Mapping[str, Numbers], weights: Mapping[str, Numbers]) -> Any:
    """The weights that are on the card in the stage that sets the peak [bytes]; of each stage a number, or one a run."""
    at = np.argmax(np.array(list(peaks.values()), dtype=float), axis=0)
    of_stage = np.array([weights[stage] for stage in peaks], dtype=float)
    return of_stage[at] if of_stage.ndim == 1 else np.take_along_axis(of_stage, at[None], axis=0)[0]


def metric_features(peaks: Mapping[str, Numbers], weights: Mapping[str, Numbers], sizes: Sizes) -> list[Any]:
    """The columns of `METRIC_FEATURES` from stage peaks and resident weights [bytes], and sizes."""
    top, every = highest(peaks), products(*sizes)
    above = top - weights_at_peak(peaks, weights)
    rest = [every[column] + 0.0 * top for column in FEATURE_COLUMNS]
    return [np.full_like(top, CONSTANT_BYTES), above, *rest]


def extent(sizes: Sizes) -> Numbers:
    """What ranges of sizes are told apart by: images times pixels [pixels]; a number or an array."""
    return sizes.B * sizes.A


def scalar_code(top: int, stages: Sequence[str], sizes: Sizes) -> int:
    """`place_codes` of one workload whose highest stage is the one at ``top``: plain numbers, a tenth of the time."""
    B, n, A, _, m, P, _ = sizes
    which = regime("vae_decoder_blocks", sizes)
    flags = 8 * (n > B) + 4 * (m < B) + 2 * (P < A) + (m == 3 and bool(_SPLIT[which]))
    return int((flags * len(REGIMES) + which) * len(PIECES) + PIECES.index(PIECE[stages[top]]))


def metric_value(
    groups: Mapping[str, Mapping[str, Any]],
    variant: VariantKey,
    peaks: Mapping[str, Numbers],
    weights: Mapping[str, int],
    sizes: Sizes,
) -> Any:
    """A metric from stage peaks [bytes].

    Parameters
    ----------
    groups : mapping
        Name as of `metric_groups` -> ``edges``, ascending values of `extent` [pixels], and ``coef``, a row of coefficients
        for each range between them.
    """
    codes = np.asarray(place_codes(peaks, sizes))
    columns, base = metric_features(peaks, weights, sizes), weights_at_peak(peaks, weights)
    value, size = np.zeros_like(base), np.asarray(extent(sizes))
    for code in np.unique(codes):
        group = next(groups[g] for g in metric_groups(place_of(variant, int(code))) if g in groups)
        ranges = np.searchsorted(group["edges"], size, side="right")
        for which in np.unique(ranges[codes == code] if np.ndim(ranges) else ranges):
            found = sum(c * x for c, x in zip(group["coef"][which], columns, strict=True) if c)
            value = np.where((codes == code) & (ranges == which), base + found, value)
    return value


def check_metric(metric: Any) -> str:
    """Refuse a metric that sdfit does not know.

    Raises
    ------
    InvalidWorkload
    """
    plain = str.__str__(metric) if issubclass(type(metric), str) else None  # whatever a subclass takes for equal
    if plain in METRICS:
        return plain
    raise InvalidWorkload(f"metric is {shown(metric)}; it must be one of {listed(METRICS)}", given=metric)
