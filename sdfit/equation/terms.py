"""The equation: which terms a stage's peak is made of.

    peak = max over stages s of  W_s + sum over terms t of  c_(s,t) * t(B, n, A, L)

with W_s the weights that are resident in the stage and non-negative coefficients c. The terms are a constant, H·W, (H·W)²
and L·H·W, multiplied by the images or samples that a stage holds at once, and three that a batch of small images shows
(per image, per sample, per token). `TERMS` says what each one counts.

Sizes
-----
B  images per call                       n  samples per UNet call: B, or 2·B with classifier-free guidance
A  effective pixels of one image         L  tokens as the UNet sees them
m  images per VAE pass: 1 with slicing   P  pixels per VAE pass: a tile with tiling, else A
D  pixels that earlier VAE passes of the call left behind: slices and tiles that are done; else 0
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from types import CodeType
from typing import Any

import numpy as np

from sdfit.equation.stages import STAGES
from sdfit.workload import VARIANT_FIELDS, VariantKey, Workload

TILE_PIXELS, TILE_STRIDE = 512, 384
"""Side of a VAE tile and the distance to the next one [pixels] (`tile_sample_min_size`, overlap 0.25)."""

MANY_ELEMENTS = 2**31
WIDEST_CHANNELS = {"vae_encoder_blocks": 128, "vae_decoder_blocks": 256}
"""Channels of the widest tensor at full resolution; past 2^31 elements PyTorch runs its convolution image by image."""

REGIMES = (
    "one image per pass",
    "several images per pass",
    "two images, past 2^31 elements",
    "three images or more, past 2^31 elements",
    "two images, past 2^32 elements",
    "three images or more, past 2^32 elements",
)
"""cuDNN chooses other plans for one image than for several (published: A100, RTX 4090, T4). A convolution of more than
2^31 elements runs image by image and needs copies of one only: first those of the widest tensors, at twice the size
those of tensors half as wide. With two images the copies for one still count, with more the tensors outweigh them."""


@dataclass(frozen=True, slots=True)
class Term:
    """One column of the design matrix: a name, the product that it is, its coefficient's unit, its meaning."""

    name: str
    product: str
    unit: str
    meaning: str


_TERMS = (
    # name        product        unit of the coefficient  what it counts
    Term("1",     "1",           "B",                     "what does not grow: kernel workspaces, small tensors"),
    Term("m",     "m",           "B/image",               "per image of a VAE pass, whatever its size"),
    Term("B",     "B",           "B/image",               "per image, whatever its size"),
    Term("n",     "n",           "B/sample",              "per UNet sample, whatever its size"),
    Term("m·A",   "m*P",         "B/px",                  "feature maps of a VAE pass: H·W"),
    Term("m·A²",  "m*P*P",       "B/px²",                 "attention scores where materialised, else a remainder: (H·W)²"),
    Term("n·A",   "n*A",         "B/px",                  "feature maps of the UNet: H·W"),
    Term("n·A²",  "n*A*A",       "B/px²",                 "attention scores where materialised, else a remainder: (H·W)²"),
    Term("A²",    "A*A",         "B/px²",                 "the scores of one slice: (H·W)², whatever the batch"),
    Term("n·L·A", "n*L*A",       "B/px/token",            "cross-attention scores, where materialised: L·H·W"),
    Term("n·L",   "n*L",         "B/token",               "the prompt's embeddings, their keys and values"),
    Term("B·A",   "B*A",         "B/px",                  "images that wait for their turn: H·W"),
    Term("D",     "D",           "B/px",                  "slices and tiles that are done and wait: H·W"),
)  # fmt: skip
TERMS = {term.name: term for term in _TERMS}

_VAE = ("1", "m·A", "m·A²", "m", "n·L", "n·A", "B·A", "D")
STAGE_TERMS: dict[str, tuple[str, ...]] = {
    "text_encoder": ("1", "n", "n·L"),
    "vae_encoder_blocks": _VAE,
    "vae_encoder_mid": _VAE,
    "unet": ("1", "n·A", "n·A²", "n", "n·L·A", "n·L"),
    "vae_decoder_mid": _VAE,
    "vae_decoder_blocks": _VAE,
    "safety_checker": ("1", "B", "B·A", "n·L"),
}
"""Terms per stage, in the order in which the data may claim them when it cannot tell two apart."""

STAGE_FIELDS: dict[str, tuple[str, ...]] = {
    "text_encoder": ("dtype",),
    "vae_encoder_blocks": ("dtype", "vae"),
    "vae_encoder_mid": ("dtype", "attention", "vae"),
    "unet": ("dtype", "attention"),
    "vae_decoder_mid": ("dtype", "attention", "vae"),
    "vae_decoder_blocks": ("dtype", "vae"),
    "safety_checker": ("dtype",),
}
"""The discrete fields that a stage's coefficients depend on: variants that agree in these share them.

VAE slicing and tiling are not among them: they change the sizes m, P and D, and a pass over a slice or a tile is a pass
over an image of that size.
"""

StageKey = tuple[str, ...]
Numbers = Any  # a scalar or an array of float64


def stage_key(stage: str, variant: VariantKey) -> StageKey:
    """Name the coefficients that a stage of a variant uses: the stage and the fields that matter to it.

    ``enable_attention_slicing`` does not reach the VAE, so its mid block runs ``sdpa`` there.

    Examples
    --------
    >>> stage_key("unet", Workload(512, 512).variant)
    ('unet', 'float16', 'sdpa')
    """
    values = dict(zip(VARIANT_FIELDS, variant, strict=True))
    if stage.startswith("vae") and values["attention"] == "sliced":
        values["attention"] = "sdpa"
    return (stage, *(str(values[name]) for name in STAGE_FIELDS[stage]))


def stages_of(variant: VariantKey) -> tuple[str, ...]:
    """The stages that a variant runs through: the tiny VAE has no mid block, the checker may be absent."""
    values = dict(zip(VARIANT_FIELDS, variant, strict=True))
    skipped = {"safety_checker"} if not values["safety_checker"] else set()
    if values["vae"] == "tiny":
        skipped |= {"vae_encoder_mid", "vae_decoder_mid"}
    return tuple(stage for stage in STAGES if stage not in skipped)


def terms_of(key: StageKey) -> tuple[str, ...]:
    """The terms of a stage; with sliced attention the scores of one slice do not grow with the batch."""
    names = STAGE_TERMS[key[0]]
    if key[0] == "unet" and "sliced" in key:
        names = tuple("A²" if name == "n·A²" else name for name in names)
    return names


def tiled_pixels(side: Numbers) -> Numbers:
    """Pixels along one side that all VAE tiles cover together, overlaps counted twice.

    Examples
    --------
    >>> int(tiled_pixels(1024)), int(tiled_pixels(512))
    (1280, 640)
    """
    starts = TILE_STRIDE * np.arange(-(-int(np.max(side)) // TILE_STRIDE))
    return np.clip(np.subtract.outer(side, starts), 0, TILE_PIXELS).sum(axis=-1)


@dataclass(frozen=True, slots=True)
class Sizes:
    """The sizes that the terms are products of; each a number or an array of equal length."""

    B: Numbers
    n: Numbers
    A: Numbers
    L: Numbers
    m: Numbers
    P: Numbers
    D: Numbers

    @classmethod
    def of(
        cls,
        height: Numbers,
        width: Numbers,
        tokens: Numbers,
        batch: Numbers,
        unet_batch: Numbers,
        slicing: Numbers,
        tiling: Numbers,
    ) -> Sizes:
        """Work the sizes out from effective sides [pixels], tokens, images, UNet samples and the VAE's two options."""
        pixels = height * width
        if not np.any(slicing) and not np.any(tiling):
            return cls(batch, unet_batch, pixels, tokens, batch, pixels, 0 * pixels)
        passes = np.where(slicing, 1, batch)
        tiled = np.asarray(tiling, dtype=bool) & (np.maximum(height, width) > TILE_PIXELS)
        tile = np.minimum(height, TILE_PIXELS) * np.minimum(width, TILE_PIXELS)
        tile = np.where(tiled, tile, pixels)
        covered = np.where(tiled, tiled_pixels(height) * tiled_pixels(width), pixels)
        done = (batch - passes) * pixels + passes * (covered - tile)
        return cls(batch, unet_batch, pixels, tokens, passes, tile, done)

    @classmethod
    def of_workloads(cls, workloads: Sequence[Workload]) -> Sizes:
        """The sizes of workloads, as arrays of float64."""
        return cls.of(*size_columns(workloads).T)


SIZE_COLUMNS = (
    "effective_height",
    "effective_width",
    "tokens",
    "batch_size",
    "unet_batch",
    "vae_slicing",
    "vae_tiling",
)
"""What `Sizes.of` takes, and the columns of a regression's ``X``."""


def size_columns(workloads: Sequence[Workload]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Rows of `SIZE_COLUMNS` for some workloads [pixels, tokens, images, samples, 0 or 1]."""
    return np.array([[getattr(w, name) for name in SIZE_COLUMNS] for w in workloads], dtype=float).reshape(
        -1, len(SIZE_COLUMNS)
    )


@cache
def _compiled(product: str) -> CodeType:
    return compile(product, f"<term {product}>", "eval")


def evaluate(name: str, sizes: Sizes) -> Numbers:
    """Evaluate one term."""
    names = {"B": sizes.B, "n": sizes.n, "A": sizes.A, "L": sizes.L, "m": sizes.m, "P": sizes.P, "D": sizes.D}
    return eval(_compiled(TERMS[name].product), {"__builtins__": {}}, names)


def design_matrix(key: StageKey, workloads: Sequence[Workload]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """The columns of a stage's terms for some workloads.

    Parameters
    ----------
    key : tuple
        As `stage_key` gives it.
    workloads : list of Workload
        Which must share that key.

    Returns
    -------
    array of shape (workloads, terms)
        Each column in the unit that its coefficient divides by: 1, images, pixels, pixels², pixels·tokens, tokens.

    Examples
    --------
    >>> w = Workload(512, 512, batch_size=2, guidance_scale=1)
    >>> design_matrix(stage_key("unet", w.variant), [w])[0, :3].tolist()
    [1.0, 524288.0, 137438953472.0]
    """
    sizes = Sizes.of_workloads(workloads)
    ones = np.ones(len(workloads))
    return np.column_stack([evaluate(name, sizes) * ones for name in terms_of(key)])


def regime(key: StageKey, sizes: Sizes) -> Numbers:
    """The regime of a stage, an index into `REGIMES`; for the UNet by its samples, for the rest by images per pass."""
    images = np.asarray(sizes.n if key[0] == "unet" else sizes.m)
    several = (images > 1).astype(int)
    if key[0] not in WIDEST_CHANNELS:
        return several
    elements = images * sizes.P * WIDEST_CHANNELS[key[0]]
    group = np.where(images > 2, 3, 2) + 2 * (elements >= 2 * MANY_ELEMENTS)
    return np.where((images > 1) & (elements >= MANY_ELEMENTS), group, several)


def domain_columns(workloads: Sequence[Workload]) -> Mapping[str, list[int]]:
    """What a domain is measured in: pixels, images, images times pixels, tokens."""
    return {
        "A": [w.pixels for w in workloads],
        "B": [w.batch_size for w in workloads],
        "B·A": [w.batch_size * w.pixels for w in workloads],
        "L": [w.tokens for w in workloads],
    }
