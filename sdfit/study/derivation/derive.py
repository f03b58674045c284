"""Find the closed form of the peak from the pipeline itself.

Trace one variant at some thirty workloads, chosen so that nothing is rounded (a module that ran at one of them is played at
the others, see `sdfit.backends.trace.playing`); align the operations by name; solve for the polynomial that gives each operation's live bytes; keep those that are the highest somewhere. The result is not a
fit to noise: the coefficients are channels times bytes, and the residual is the allocator's rounding to 512.

What it does not know: memory inside kernels, unless the tracer is given workspaces that are polynomials too. Sizes
whose latents are not a multiple of 8 are padded inside the UNet, but only below full latent resolution; the operations
that set the peak are at full resolution and hold no tensor of a lower one, so random sizes agree as well as round ones
do, to the 512 bytes that each block is rounded to. The UNet's polynomial for small images with long prompts is the
exception: its skip connections are padded. The trace is of two denoising steps; PNDM's history grows until the fourth
noise prediction, by one latent (B·A/8 bytes in float16) each.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sdfit.backends.trace.observe import PIPELINE, Observer, Pass, watching
from sdfit.backends.trace.playing import Known
from sdfit.backends.trace.tracer import Tracer
from sdfit.equation.sizes import vae_passes
from sdfit.equation.stages import STAGES, resident
from sdfit.errors import FitError
from sdfit.predict.simulation.card import Traced
from sdfit.predict.simulation.simulate import uncollected
from sdfit.study.derivation.closed_form import Derivation, Polynomial, in_regime
from sdfit.study.derivation.solving import TOLERANCE_BYTES, At, Candidate, Name, Places, columns_at, solve
from sdfit.workload import CHUNK_TOKENS, Workload, variant_name

# (height, width, batch_size, guided, prompt_length): sides are multiples of 256, so that even the lowest resolution
# of the UNet is a whole number of 512-byte blocks and no size is rounded
_POINTS = (
    (512, 512, 1, True, 77),
    (256, 256, 1, True, 77),
    (768, 1024, 1, True, 77),
    (2048, 2048, 1, True, 77),
    (1024, 1024, 2, True, 77),
    (512, 768, 3, True, 77),
    (1536, 1024, 4, True, 77),
    (512, 512, 1, True, 154),
    (1024, 768, 2, True, 154),
    (1536, 1280, 1, True, 231),
    (512, 512, 4, True, 231),
    (256, 512, 1, False, 77),
    (1024, 1280, 1, False, 77),
    (1024, 1024, 2, False, 77),
    (512, 512, 4, False, 77),
    (1536, 1536, 3, False, 77),
    (768, 768, 1, False, 154),
    (256, 512, 2, False, 231),
    (1280, 1280, 1, False, 231),
    (1024, 512, 3, False, 308),
    (256, 768, 2, True, 77),
    (1280, 768, 3, True, 231),
    (768, 768, 2, False, 77),
    (512, 1536, 4, False, 154),
    (512, 512, 1, False, 231),
    (1536, 1024, 1, False, 154),
    (2048, 2048, 1, False, 77),
    (512, 768, 1, False, 308),
)
_DOMINATED = 1e-4
"""A polynomial that adds less than this share anywhere is merged into the one below it."""


def derive(variant_workload: Workload, *, tracer: Tracer | None = None) -> Derivation:
    """Find the closed form of the peak for the variant of a workload.

    Parameters
    ----------
    variant_workload : Workload
        Its discrete fields count (dtype, attention, ...); its sizes are the reference at which tensors are listed.
    tracer : Tracer, optional
        To share pipelines that are built already, or to add kernel workspaces. By default a bare one.

    Returns
    -------
    Derivation
        The undominated polynomials of each stage [bytes].

    Raises
    ------
    FitError
        If an operation that can set the peak is no polynomial in the sizes: the message names it.

    Examples
    --------
    >>> form = derive(Workload(512, 512, attention="sdpa"))  # doctest: +SKIP
    >>> form.binding(Workload(1024, 1024)).coefficients["B·A"]  # doctest: +SKIP
    1536.375
    """
    tracer = tracer or Tracer()
    points = derivation_points(variant_workload)
    seen: dict[Name, dict[At, int]] = defaultdict(dict)
    tops: list[dict[str, int]] = []
    with uncollected(), watching(tracer, variant_workload, Known()) as watch:
        for number, point in enumerate(points):
            traced, observer = watch(point)
            tops.append(observer.stage_peaks)
            _collect(seen, number, point, observer.passes)
        candidates = solve(seen, points)
        _nothing_missed(candidates, points, tops)
        kept = _envelope(candidates, points)
        residual = max(_residual(candidate, seen[candidate.name], points) for candidate in kept)
        polynomials = _explained(kept, variant_workload, watch, traced.component_bytes)
    return Derivation(variant_workload.variant, polynomials, variant_workload, points, int(np.ceil(residual)))


def derivation_points(variant_workload: Workload) -> tuple[Workload, ...]:
    """The workloads that a variant is derived from: its discrete fields, our sizes.

    Examples
    --------
    >>> len(derivation_points(Workload(512, 512)))
    28
    """
    points = []
    for height, width, batch_size, guided, prompt_length in _POINTS:
        if variant_workload.vae_tiling and max(height, width) <= 512:
            height, width = height + 512, width + 768  # every point in tiles, of many shapes  # noqa: PLW2901
        points.append(
            replace(
                variant_workload,
                height=height,
                width=width,
                batch_size=batch_size,
                guidance_scale=7.5 if guided else 1.0,
                prompt_length=prompt_length,
            )
        )
    return tuple(points)


def _collect(seen: dict[Name, dict[At, int]], number: int, point: Workload, passes: Sequence[Pass]) -> None:
    """Add one run's operations [bytes]: of each name and each size of pass the highest of the last."""
    geometry = {path: vae_passes(point) for path in ("vae.encoder", "vae.decoder")}
    total = sum(images * pixels for images, pixels, _ in vae_passes(point))
    between = (0, total) if point.vae_slicing or point.vae_tiling else (point.pixels, 0)
    # a pass that is made again has the same list of names, and is taken together with the first
    alike: dict[tuple[int, tuple[int, int]], tuple[Pass, NDArray[np.int64]]] = {}
    for one in passes:
        at = between
        if one.path in geometry:
            try:
                at = next(geometry[one.path])[1:]
            except StopIteration:
                raise FitError(
                    f"{variant_name(point.variant)}: more passes of {one.path} than its tiles and slices"
                ) from None
        live, before = np.array(one.live_bytes, dtype=np.int64), alike.get((id(one.names), at))
        alike[id(one.names), at] = (one, live if before is None else np.maximum(live, before[1]))
    highest: dict[Name, dict[tuple[int, int], int]] = defaultdict(dict)
    for (_, at), (one, most) in alike.items():
        for name, live in zip(one.names, most.tolist(), strict=True):
            # outside a module the count runs on over steps and tiles: take those of a kind together
            rows = highest[name._replace(nth=-1) if one.path == PIPELINE else name]
            rows[at] = max(live, rows.get(at, 0))
    for name, rows in highest.items():
        for pixels, done in dict(rows.keys()).items():  # of each size the last pass
            seen[name][number, pixels, done] = rows[pixels, done]


def _polynomial(candidate: Candidate) -> Polynomial:
    pairs = zip(candidate.products, map(float, candidate.coefficients), strict=True)
    coefficients = {product: coefficient for product, coefficient in pairs if coefficient or product == "1"}
    return Polynomial(*candidate.name, candidate.when, coefficients, 0)


def _nothing_missed(
    candidates: Sequence[Candidate], points: Sequence[Workload], tops: Sequence[dict[str, int]]
) -> None:
    """Hold each stage's traced peak against the polynomials: an operation that is none must not stand above them."""
    values = Places.of(points).values_of(candidates)
    for stage in STAGES:
        rows = [i for i, c in enumerate(candidates) if c.name.stage == stage]
        for j, top in enumerate(tops):
            if stage in top:
                found = values[rows, j].max(initial=-np.inf)
                if found < top[stage] * (1 - _DOMINATED) - TOLERANCE_BYTES:
                    raise FitError(
                        f"{variant_name(points[j].variant)}: the peak of {stage} at {points[j].height}x"
                        f"{points[j].width}, batch {points[j].batch_size}, is {top[stage]} bytes at an operation that is no polynomial in the "
                        f"sizes (the highest polynomial gives {found:.0f}); fit this variant with `sdfit fit` instead",
                        stage=stage,
                    )


def _domain(variant: Workload) -> tuple[Workload, ...]:
    """Workloads over the whole domain, on which polynomials compete."""
    sides = sorted({64 * round(2 ** (k / 4)) for k in range(29)})
    return tuple(
        replace(variant, height=side, width=side * wide, batch_size=b, guidance_scale=g, prompt_length=length)
        for side in sides
        for wide in (1, 2)
        for b in (1, 2, 4, 16)
        for g in (1.0, 7.5)
        for length in (77, 154, 1001)
    )


def _envelope(candidates: Sequence[Candidate], points: Sequence[Workload]) -> list[Candidate]:
    """Keep the fewest polynomials whose maximum is the maximum of all, stage by stage."""
    kept: list[Candidate] = []
    grid = Places.of([*_domain(points[0]), *points])
    for stage in STAGES:
        first: dict[Any, Candidate] = {}  # of those that are the same polynomial
        for c in candidates:
            if c.name.stage == stage:
                first.setdefault((c.when, c.products, c.coefficients.tobytes()), c)
        rows = list(first.values())
        if not rows:
            continue
        values = grid.values_of(rows)
        needed = values.max(axis=0) * (1 - _DOMINATED)
        uncovered = np.isfinite(needed)
        chosen: list[int] = []
        while uncovered.any():
            covers = (values[:, uncovered] >= needed[uncovered]).sum(axis=1)
            best = int(covers.argmax())
            chosen.append(best)
            uncovered &= values[best] < needed
        kept += [rows[i] for i in sorted(chosen, key=lambda i: -np.nanmax(values[i]))]
    return kept


def _residual(candidate: Candidate, rows: dict[At, int], points: Sequence[Workload]) -> float:
    use = [at for at in rows if in_regime(points[at[0]], candidate.when)]
    found = _polynomial(candidate).at(columns_at(points, use))
    return float(np.abs(found - [rows[at] for at in use]).max())


def _explained(
    kept: Sequence[Candidate], reference: Workload, watch: Callable[..., tuple[Traced, Observer]], sizes: dict[str, int]
) -> tuple[Polynomial, ...]:
    """Attach what is live at each operation: at the reference, or near it for what does not run there."""
    wanted = {c.name for c in kept}

    def key(name: Name) -> Name | None:
        short = name._replace(nth=-1)
        return name if name in wanted else short if short in wanted else None

    plain = 1.0 if reference.guided else 7.5
    runs = (
        reference,
        replace(reference, batch_size=max(2, reference.batch_size)),
        replace(reference, guidance_scale=plain),
        replace(reference, prompt_length=154 if reference.prompt_length <= CHUNK_TOKENS else CHUNK_TOKENS),
        replace(reference, guidance_scale=1.0, batch_size=1),
    )
    tensors: dict[int, tuple[dict[str, Any], ...]] = {}
    for workload in runs:
        missing = [i for i, c in enumerate(kept) if i not in tensors and in_regime(workload, c.when)]
        if missing:
            _, observer = watch(workload, full=True, tensors=True, key=key)
            for i in missing:
                if kept[i].name in observer.peaks:
                    tensors[i] = tuple(asdict(tensor) for tensor in observer.peaks[kept[i].name].tensors)
    weights = {s: sum(sizes.get(name, 0) for name in resident(s, reference.offload)) for s in STAGES}
    return tuple(
        replace(_polynomial(c), weights_bytes=weights[c.name.stage], tensors=tensors.get(i, ()))
        for i, c in enumerate(kept)
    )
