"""What the page's arithmetic needs, as plain values: the equation's tables, a fitted model, the cards and their memory.

`assets/model.js` states none of it. Infinite ends are null, since JSON has no infinity.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from sdfit.equation import metrics as m
from sdfit.equation.regimes import REGIMES, ROUGH
from sdfit.equation.sizes import TILE_PIXELS, TILE_STRIDE
from sdfit.equation.stages import COMPONENTS, RESIDENT_WHEN_OFFLOADED, RESIDENT_WHEN_STREAMED, STAGE
from sdfit.equation.terms import TERMS
from sdfit.predict import conformal
from sdfit.predict.advise import LIKELY
from sdfit.predict.artifact import Artifact
from sdfit.predict.cards import find_card, table
from sdfit.predict.library import answering
from sdfit.predict.memory import left, of_box
from sdfit.predict.options import COSTS, SAVING
from sdfit.predict.predictor import DEFAULT_LEVEL, WRONG_HALF, Predictor
from sdfit.predict.replayed import why_not
from sdfit.predict.variant import MOST_BELOW, SURE
from sdfit.predict.verdict import ANSWERS, SAFE_LEVEL
from sdfit.workload import (
    CHOICES,
    CHUNK_TOKENS,
    DTYPE_BYTES,
    LIMITS,
    SLICES,
    STREAMED,
    TINY_BLOCKS,
    TINY_TILES,
    VAE_SCALE,
    Workload,
)

TITLES = {
    "text_encoder": "Text encoder",
    "vae_encoder_blocks": "VAE encoder, blocks",
    "vae_encoder_mid": "VAE encoder, mid block",
    "unet": "UNet",
    "unet_deep": "UNet, deep blocks",
    "vae_decoder_mid": "VAE decoder, mid block",
    "vae_decoder_blocks": "VAE decoder, blocks",
    "safety_checker": "Safety checker",
}
"""What a page calls each stage."""
SIZES_GB = (4, 6, 8, 12, 16, 24)
"""Memory on the box of the cards whose reach the map shows [GiB]."""


def equation_facts() -> dict[str, Any]:
    """The tables of the equation and of what rests on it, as `assets/model.js` takes them."""
    return {
        "terms": list(TERMS),
        "stages": [
            {"name": s.name, "batch": s.batch, "fields": s.fields, "widest_channels": s.widest_channels}
            for s in STAGE.values()
        ],
        "regimes": [{"images": _ends(r.images), "elements": _ends(r.elements), "rough": r.rough} for r in REGIMES],
        "rough": ROUGH,
        "tile": {"pixels": TILE_PIXELS, "stride": TILE_STRIDE},
        "vae_scale": VAE_SCALE,
        "chunk_tokens": CHUNK_TOKENS,
        "choices": CHOICES,
        "limits": LIMITS,
        "defaults": {**Workload(512, 512).to_dict()},
        "dtype_bytes": DTYPE_BYTES,
        "components": COMPONENTS,
        "resident_when_offloaded": RESIDENT_WHEN_OFFLOADED,
        "streamed": STREAMED,
        "resident_when_streamed": RESIDENT_WHEN_STREAMED,
        "slices": SLICES,
        "tiny_blocks": TINY_BLOCKS,
        "tiny_tiles": TINY_TILES,
        "pieces": m.PIECE,
        "metrics": m.METRICS,
        "never_below_live": m.NEVER_BELOW_LIVE,
        "decides": m.DECIDES,
        "unseen": m.UNSEEN,
        "least": m.LEAST,
        "materialised": m.MATERIALISED,
        "feature_columns": m.FEATURE_COLUMNS,
        "constant_bytes": m.CONSTANT_BYTES,
        "widening": m.WIDENING,
        "families": m.FAMILIES,
        "kept": conformal.KEPT,
        "least_scale_bytes": conformal.LEAST_SCALE_BYTES,
        "weights_share": conformal.WEIGHTS_SHARE,
        "packed_share": conformal.PACKED_SHARE,
        "most_below": MOST_BELOW,
        "sure": SURE,
        "level": DEFAULT_LEVEL,
        "safe_level": SAFE_LEVEL,
        "answers": ANSWERS,
        "likely": LIKELY,
        "costs": COSTS,
        "saving": SAVING,
        "meanings": {term.name: term.meaning for term in TERMS.values()},
        "titles": TITLES,
        "wrong_half": WRONG_HALF,
    }


def model_facts(artifact: Artifact) -> dict[str, Any]:
    """A fitted model, without what only tables show: bounds of coefficients, the baseline, errors."""
    return {
        "name": artifact.name,
        "provenance": artifact.provenance,
        "simulates": not why_not(Predictor(artifact)),
        "components": artifact.components,
        "stages": {
            key: {name: stage[name] for name in ("terms", "regimes", "coef", "domain")}
            | {"unidentified": list(stage["unidentified"])}
            for key, stage in artifact.stages.items()
        },
        "metrics": {metric: groups for metric, groups in artifact.metrics.items() if groups},
        "scores": {
            metric: {family: [found["count"], found["values"]] for family, found in families.items()}
            for metric, families in artifact.scores.items()
        },
    }


def card_facts(predictor: Predictor) -> dict[str, Any]:
    """A card as the calculator offers it: what PyTorch may take there, and what its answers rest on."""
    card = predictor.card
    found: dict[str, Any] = {
        "typed": predictor.name,
        "name": predictor.name,
        "kind": "",
        "model": predictor.artifact.name,
        "context_bytes": predictor.context_bytes,
        "memory_bytes": None,
        "memory": "this card is in no table: give what PyTorch may take",
        "rests_on": predictor.rests_on,
        "wrong_half": predictor.wrong_half,
    }
    if card is not None:
        there = left(card)
        # two names may share what is typed: the other one then answers to its whole name
        typed = card.typed if find_card(card.typed) == card else card.name
        short = card.name.removeprefix("NVIDIA ")
        name = short if "GB" in short else f"{short}, {card.memory_gib}\u00a0GB"
        found |= {"typed": typed, "name": name, "kind": card.kind}
        found |= {"memory_bytes": there.memory_bytes, "memory": there.words}
    return found


def cards_of(models: dict[str, Predictor]) -> list[Predictor]:
    """Every card of the table that one of some models answers for, in the table's order, each with its model."""
    found = []
    for card in table():
        model = answering(card, models)
        if model is not None:
            found.append(Predictor(models[model].artifact, models[model].path, card.slug, card))
    return found


def boxes() -> list[dict[str, Any]]:
    """The memory sizes of the map: what PyTorch may take on a card of each that drives a screen [bytes]."""
    return [{"gib": gib, "memory_bytes": of_box(gib)} for gib in SIZES_GB]


def _ends(ends: Iterable[float]) -> list[float | None]:
    return [None if math.isinf(end) else end for end in ends]
