"""The plain four-term regression over whole runs: the form that the stages have to beat."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from sdfit.equation.sizes import Sizes
from sdfit.fit.folds import error_summary
from sdfit.records import Record
from sdfit.workload import VariantKey, Workload, variant_name

if TYPE_CHECKING:
    from sdfit.predict.predictor import Predictor

Array = np.ndarray[Any, np.dtype[np.float64]]

BASELINE_TERMS = ("1", "B·A", "B·A²", "n·L·A")
FEWEST_ROWS = 8 * len(BASELINE_TERMS)
"""Of a variant that gets a regression, if any has as many: it passes near fewer rows whatever they say."""
BASELINE_UNITS = ("B", "B/px", "B/px²", "B/px/token")


def baseline(ok: Sequence[Record]) -> dict[str, Any]:
    """The plain four-term regression over whole runs, one per variant of `FEWEST_ROWS`: constant, H·W, (H·W)², L·H·W.

    Images multiply the activations; nothing else is known of stages. Its errors are in-sample: a bound on how well
    that form can do.
    """
    from sdfit.fit.stage_model import nonnegative  # predicting with it needs no scipy

    found: dict[str, Any] = {}
    of_variant: dict[VariantKey, list[Record]] = defaultdict(list)
    for record in ok:
        of_variant[record.workload.variant].append(record)
    enough = {variant for variant, rows in of_variant.items() if len(rows) >= FEWEST_ROWS}
    for variant in sorted(enough or of_variant):
        rows = of_variant[variant]
        y = np.array([r.allocated_bytes for r in rows], dtype=float)
        design = baseline_design([r.workload for r in rows])
        coef = nonnegative(design / y[:, None], np.ones(len(y)))
        found[variant_name(variant)] = {
            "coef": coef.tolist(),
            "rows": len(rows),
            **error_summary((design @ coef - y) / y).to_dict(),
        }
    return {"terms": list(BASELINE_TERMS), "units": list(BASELINE_UNITS), "variants": found}


def baseline_design(workloads: Sequence[Workload]) -> Array:
    """The baseline's columns: 1, B·A, B·A², n·L·A."""
    sizes = Sizes.of_workloads(workloads)
    B, n, A, L = sizes.B, sizes.n, sizes.A, sizes.L
    return np.column_stack([np.ones(len(A)), B * A, B * A**2, n * L * A])


def predict_baseline(predictor: Predictor, workload: Workload) -> float | None:
    """What an artifact's plain regression says of a workload [bytes]; None if its variant was not swept."""
    found = predictor.artifact.baseline["variants"].get(variant_name(workload.variant))
    return None if found is None else float(np.dot(baseline_design([workload])[0], found["coef"]))
