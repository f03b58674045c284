"""The equation: which terms a stage's peak is made of.

    peak = max over stages s of  W_s + sum over terms t of  c_(s,t) * t(B, n, A, L, m, P, D)

with W_s the weights that are resident in the stage and non-negative coefficients c. The terms are a constant, H·W, (H·W)²
and L·H·W, multiplied by the images or samples that a stage holds at once, and three that a batch of small images shows
(per image, per sample, per token). `TERMS` says what each one counts, `products` what each one multiplies; everything
else, from one call of `f` to a million rows, a fit or a derivation, takes them from here. The letters are those of
`sdfit.equation.sizes`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sdfit.equation.sizes import Array, Numbers, Sizes
from sdfit.equation.stages import STAGE, UNET_STAGES, StageKey, is_beside
from sdfit.workload import SLICES, Workload


@dataclass(frozen=True, slots=True)
class Term:
    """One column of the design matrix: its product of sizes, its coefficient's unit, what it counts."""

    name: str
    unit: str
    meaning: str


_TERMS = (
    #    product  unit of the coefficient  what it counts
    Term("1",     "B",                     "what does not grow: kernel workspaces, small tensors"),
    Term("m",     "B/image",               "per image of a VAE pass, whatever its size"),
    Term("B",     "B/image",               "per image, whatever its size"),
    Term("n",     "B/sample",              "per UNet sample, whatever its size"),
    Term("m·P",   "B/px",                  "feature maps of a VAE pass: H·W"),
    Term("m·P²",  "B/px²",                 "attention scores where materialised, else a remainder: (H·W)²"),
    Term("n·A",   "B/px",                  "feature maps of the UNet: H·W"),
    Term("n·A²",  "B/px²",                 "attention scores where materialised, else a remainder: (H·W)²"),
    Term("A²",    "B/px²",                 "the scores of one slice: (H·W)², whatever the batch"),
    Term("n·L·A", "B/px/token",            "cross-attention scores, where materialised: L·H·W"),
    Term("n·L",   "B/token",               "the prompt's embeddings, their keys and values"),
    Term("B·A",   "B/px",                  "images that wait for their turn: H·W"),
    Term("D",     "B/px",                  "slices and tiles that are done and wait: H·W"),
)  # fmt: skip
TERMS = {term.name: term for term in _TERMS}
COLUMN = {name: i for i, name in enumerate(TERMS)}
"""The place of each term in `products`."""


def products(B: Numbers, n: Numbers, A: Numbers, L: Numbers, m: Numbers, P: Numbers, D: Numbers) -> tuple[Numbers, ...]:
    """What each of `TERMS` multiplies, in their order; numbers or arrays, `Sizes` unpacked.

    Examples
    --------
    >>> dict(zip(TERMS, products(*Sizes.of(8, 16, 77, 2, 4)), strict=True))["n·A²"]
    65536
    """
    mP, nA, nL = m * P, n * A, n * L
    return 1.0, m, B, n, mP, mP * P, nA, nA * A, A * A, nL * A, nL, B * A, D


SCORES = ("n·A²", "A²", "n·L·A")
"""The terms that count attention scores in the UNet."""


def terms_of(key: StageKey) -> tuple[str, ...]:
    """The terms of a stage; with sliced attention the scores of one slice do not grow with the batch.

    What stands beside the UNet's (`sdfit.equation.stages.beside`) holds no scores: attention is not what sets the peak there.

    Examples
    --------
    >>> terms_of(("unet_deep", "float16", "eager"))
    ('1', 'n·A', 'n', 'n·L')
    """
    names = STAGE[key[0]].terms
    if is_beside(key):
        return tuple(name for name in names if name not in SCORES)
    if key[0] in UNET_STAGES and not SLICES.keys().isdisjoint(key):
        names = tuple("A²" if name == "n·A²" else name for name in names)
    return names


def design_matrix(key: StageKey, sizes: Sizes) -> Array:
    """The columns of a stage's terms.

    Parameters
    ----------
    key : tuple
        As `stage_key` gives it.
    sizes : Sizes
        Arrays of equal length.

    Returns
    -------
    array of shape (rows, terms)
        Each column in the unit that its coefficient divides by: 1, images, pixels, pixels², pixels·tokens, tokens.

    Examples
    --------
    >>> from sdfit.equation.stages import stage_key
    >>> w = Workload(512, 512, batch_size=2, guidance_scale=1)
    >>> design_matrix(stage_key("unet", w.variant), Sizes.of_workloads([w]))[0, :3].tolist()
    [1.0, 524288.0, 137438953472.0]
    """
    every = products(*sizes)
    ones = np.ones(np.shape(sizes.A))
    return np.column_stack([every[COLUMN[name]] * ones for name in terms_of(key)])


def design_of(key: StageKey, workloads: Sequence[Workload]) -> Array:
    """`design_matrix` of workloads."""
    return design_matrix(key, Sizes.of_workloads(workloads))
