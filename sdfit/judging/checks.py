"""Checks of a fitted equation over its domain, of runs that failed, and of runs that were repeated.

`sdfit.judging.judge.judge` calls them all; each also stands alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from sdfit.equation.regimes import regime
from sdfit.equation.sizes import Sizes
from sdfit.errors import ArtifactError, UnknownVariant
from sdfit.judging.findings import DUPLICATES, GRAVE, Finding, label
from sdfit.judging.robust import MATERIAL
from sdfit.predict.artifact import Artifact
from sdfit.predict.predictor import Predictor
from sdfit.records import Record
from sdfit.units import format_bytes
from sdfit.workload import CHOICES, MAX_SIDE, MIN_SIDE, VAE_SCALE, VARIANT_FIELDS, VariantKey, Workload, variant_name

Array = np.ndarray[Any, np.dtype[Any]]
Place = tuple[int, ...]

SMALLEST_DROP_BYTES = 1 << 20
"""A fall of the peak below this is rounding."""
WIDTHS, MOST_BATCHES = 4, 24


def check_duplicates(records: Sequence[Record]) -> list[Finding]:
    """Name workloads that cost the same by design and yet were recorded with different peaks.

    Prompts of 1 to 77 tokens are one workload, and so are images that are floored to one size.

    Examples
    --------
    >>> rows = [
    ...     Record(i, Workload(512, 512), "ok", {"unet": peak}, allocated_bytes=peak)
    ...     for i, peak in enumerate((3 * 10**9, 4 * 10**9))
    ... ]
    >>> check_duplicates(rows)[0].message
    'row 0 (512x512 float16 sdpa) has 2.794 GiB and row 1 (512x512 float16 sdpa) 3.725 GiB (+33.3%) for the same work; \
measure them again'
    """
    seen: dict[tuple[object, ...], list[Record]] = {}
    for record in records:
        w = record.workload
        if record.outcome == "ok" and record.allocated_bytes:
            seen.setdefault((*w.runs_as, w.variant), []).append(record)
    findings = []
    for found in seen.values():
        least, most = (f(found, key=lambda r: r.allocated_bytes or 0) for f in (min, max))
        low, high = float(least.allocated_bytes or 1), float(most.allocated_bytes or 1)
        if high / low - 1 > DUPLICATES:
            off = high / low - 1
            text = (
                f"{label(least)} has {format_bytes(low)} and {label(most)} {format_bytes(high)} ({off:+.1%}) for the same "
                "work; measure them again"
            )
            where = variant_name(least.workload.variant)
            findings.append(Finding("error" if off > GRAVE else "warning", "duplicate", where, label(most), off, text))
    return findings


def check_censored(records: Sequence[Record], artifact: Artifact | None = None) -> list[Finding]:
    """Name runs whose end contradicts the equation, their own cap, or another run.

    A run that ran out of memory bounds its peak from below. An equation that lies under the bound would call it safe.
    """
    failed = [r for r in records if r.outcome == "oom"]
    passed = [r for r in records if r.outcome == "ok"]
    findings = []
    for record in passed:
        if record.cap_bytes and record.allocated_bytes and record.allocated_bytes > record.cap_bytes:
            off = record.allocated_bytes / record.cap_bytes - 1
            text = (
                f"{label(record)} succeeded with {format_bytes(record.allocated_bytes)}, above its cap of "
                f"{format_bytes(record.cap_bytes)}; the cap was not in force"
            )
            findings.append(_censored("error", record, off, text))
    predictor = None if artifact is None else Predictor(artifact)
    alike: dict[tuple[object, ...], list[Record]] = {}
    for record in passed if failed else ():
        alike.setdefault((record.workload.variant, record.cap_bytes), []).append(record)
    sizes = {key: np.array([r.workload.runs_as for r in rows]) for key, rows in alike.items()}
    for record in failed:
        if predictor is not None and record.oom_bytes:
            findings += _below_bound(record, predictor)
        key = record.workload.variant, record.cap_bytes
        covers = (sizes[key] >= record.workload.runs_as).all(axis=1) if key in sizes else np.zeros(1, dtype=bool)
        if covers.any():
            other = alike[key][int(np.argmax(covers))]
            text = f"{label(record)} ran out of memory, but {label(other)}, which needs no less, did not; measure both again"
            findings.append(_censored("warning", record, None, text))
    return findings


def _below_bound(record: Record, predictor: Predictor) -> list[Finding]:
    try:
        peaks = predictor.predict_workload(record.workload).stage_peaks
    except UnknownVariant:
        return []
    bound = float(record.oom_bytes or 0)
    predicted = peaks[record.oom_stage] if record.oom_stage in peaks else max(peaks.values())
    off = bound / predicted - 1
    if off <= MATERIAL:
        return []
    stage = record.oom_stage or "the run"
    text = (
        f"{label(record)} ran out of memory in {stage} with {format_bytes(bound)}, but the equation says "
        f"{format_bytes(predicted)} there; it would call that run safe"
    )
    return [_censored("error" if off > GRAVE else "warning", record, off, text)]


def _censored(severity: str, record: Record, off: float | None, text: str) -> Finding:
    return Finding(severity, "censored", variant_name(record.workload.variant), label(record), off, text)


def variant_key(name: str) -> VariantKey:
    """Read a variant back from its words (`sdfit.workload.variant_name`).

    Raises
    ------
    ArtifactError
        If they name no variant.

    Examples
    --------
    >>> variant_key("float16 sdpa vae_tiling=True")[4]
    True
    """
    dtype, attention, *rest = name.split(" ")
    given = {"dtype": dtype, "attention": attention} | dict(part.split("=", 1) for part in rest)
    values = []
    for field in VARIANT_FIELDS:
        text = given.pop(field, str(CHOICES[field][0]))
        found = [choice for choice in CHOICES[field] if str(choice) == text]
        if not found:
            raise ArtifactError(f"'{name}' is no variant: its {field} is '{text}'")
        values.append(found[0])
    if given:
        raise ArtifactError(f"'{name}' is no variant: it has an unknown '{next(iter(given))}'")
    return tuple(values)  # type: ignore[return-value]


def check_equation(artifact: Artifact) -> list[Finding]:
    """Check that each swept variant's peak is above its weights, and never falls as height, width or batch grows.

    Heights in steps of 8 pixels, a few widths, every batch size to 24 and the shortest and longest prompt, with and
    without guidance, as far as they lie in the swept domain. Falls are reported once per direction, where they are worst.

    Notes
    -----
    Coefficients are not negative, so a fall can only be where one regime ends and the next begins. There it may be true:
    cuDNN takes other plans. It is reported, since `largest` and `max_batch_size` search upwards.
    """
    findings = []
    falls: dict[tuple[str, str], list[Finding]] = {}
    predictor = Predictor(artifact)
    for name in artifact.swept:
        key = variant_key(name)
        found = predictor.variant(key)
        grid = _grid(found.domain)
        inside = _inside(found.domain, grid)
        if not inside.any():
            continue
        options = dict(zip(VARIANT_FIELDS, key, strict=True))
        columns = {column: values[inside] for column, values in grid.items()}
        peak = np.zeros(inside.shape)
        peak[inside] = predictor.predict(columns | options)
        low = np.where(inside, peak, np.inf)
        at = np.unravel_index(int(np.argmin(low)), low.shape)
        if low[at] < min(found.weights.values()) or not np.isfinite(peak[inside]).all():
            text = f"at {_size(_workload(grid, at, options))} the equation gives {format_bytes(low[at])}, below the weights"
            findings.append(Finding("error", "sign", name, None, None, text))
        for axis, side in enumerate(("height", "width", "batch size")):
            fall = _worst_fall(peak, inside, axis)
            if fall is None:
                continue
            before, after = (_workload(grid, end, options) for end in fall)
            drop, off = peak[fall[0]] - peak[fall[1]], float(peak[fall[1]] / peak[fall[0]] - 1)
            edge = any(_regime(stage, before) != _regime(stage, after) for stage in found.stages)
            text = f"the peak falls by {format_bytes(drop)} ({off:.1%}) as the {side} grows from {_size(before)} to {_size(after)}"
            text += ", where one regime ends and another begins" if edge else ""
            severity = "warning" if edge else "error"
            falls.setdefault((side, severity), []).append(Finding(severity, "monotone", name, None, off, text))
    for found_falls in falls.values():
        worst = min(found_falls, key=lambda f: f.off or 0.0)
        more = f"; so it does in {len(found_falls) - 1} other variants" if len(found_falls) > 1 else ""
        findings.append(replace(worst, message=worst.message + more))
    return findings


def _worst_fall(peak: Array, inside: Array, axis: int) -> tuple[Place, Place] | None:
    """The two neighbours along an axis between which the peak falls most; the second axis holds pairs of neighbours."""
    size = peak.shape[axis]
    first, second = (np.arange(size - 1), np.arange(1, size))
    step = np.take(peak, second, axis) - np.take(peak, first, axis)
    step = np.where(np.take(inside, second, axis) & np.take(inside, first, axis), step, 0.0)
    if not step.size:
        return None
    at = tuple(int(i) for i in np.unravel_index(int(np.argmin(step)), step.shape))
    if step[at] >= -SMALLEST_DROP_BYTES:
        return None
    return at, tuple(i + (a == axis) for a, i in enumerate(at))


def _regime(stage: str, w: Workload) -> int:
    return int(regime(stage, Sizes.of_workload(w)))


def _workload(grid: Mapping[str, Array], at: Any, options: Mapping[str, Any]) -> Workload:
    return Workload.from_dict({name: values[at].item() for name, values in grid.items()} | dict(options))


def _size(w: Workload) -> str:
    return f"{w.height}x{w.width} x{w.batch_size}"


def _grid(domain: Mapping[str, tuple[float, float]]) -> dict[str, Array]:
    """Sizes in and around a domain, as arrays of one five-dimensional grid."""
    low, high = (side**0.5 for side in domain["A"])
    heights = np.arange(
        max(MIN_SIDE, int(low / 2) // VAE_SCALE * VAE_SCALE), min(MAX_SIDE, int(1.5 * high)) + 1, VAE_SCALE
    )
    widths = np.linspace(max(MIN_SIDE, 0.75 * low), min(1.25 * high, MAX_SIDE - VAE_SCALE), WIDTHS).astype(int)
    widths = widths // VAE_SCALE * VAE_SCALE
    widths = np.unique(np.concatenate([widths, widths + VAE_SCALE]))
    first = int(domain["B"][0])
    batches = np.arange(first, min(int(domain["B"][1]), first + MOST_BATCHES - 1) + 1)
    prompts = np.unique(np.array(domain["L"], dtype=int))
    axes = np.meshgrid(heights, widths, batches, prompts, np.array([1.0, 7.5]), indexing="ij")
    return dict(zip(("height", "width", "batch_size", "prompt_length", "guidance_scale"), axes, strict=True))


def _inside(domain: Mapping[str, tuple[float, float]], grid: Mapping[str, Array]) -> Array:
    pixels = grid["height"] * grid["width"]
    inside = np.ones(pixels.shape, dtype=bool)
    for column, values in (("A", pixels), ("B", grid["batch_size"]), ("B·A", grid["batch_size"] * pixels)):
        low, high = domain[column]
        inside &= (values >= low) & (values <= high)
    return inside
