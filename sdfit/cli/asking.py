"""Commands that ask a model: predict, fits, largest, advise, models, report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sdfit.cli.options import (
    amount,
    gpu_option,
    json_option,
    level_option,
    memory_option,
    workload_from,
    workload_options,
)
from sdfit.units import format_bytes

if TYPE_CHECKING:
    from sdfit.predict.advise import Option
    from sdfit.predict.prediction import Prediction
    from sdfit.predict.predictor import Predictor
    from sdfit.workload import Workload


@click.command()
@gpu_option
@workload_options
@click.option("--image", type=click.Path(path_type=Path), default=None, help="Take height and width from a picture.")
@click.option("--metric", default="allocated", show_default=True, help="allocated, reserved, device or required.")
@level_option
@json_option
def predict(gpu: str, image: Path | None, metric: str, level: float | None, as_json: bool, **fields: Any) -> None:
    """Predict the peak memory of one run."""
    from sdfit.predict.library import load
    from sdfit.predict.predictor import DEFAULT_LEVEL

    workload = workload_from(fields, image)
    peak = load(gpu).predict_workload(workload, metric=metric, level=DEFAULT_LEVEL if level is None else level)
    click.echo(json.dumps(peak.to_dict(), indent=2) if as_json else describe(peak))


def describe(peak: Prediction) -> str:
    """A prediction in a few lines of text."""
    from sdfit.equation.terms import TERMS
    from sdfit.predict.prediction import BEYOND

    words = {
        "weights": "of what is on the card in that stage",
        BEYOND: "segments of the caching allocator" + (", the CUDA context" if peak.metric == "device" else ""),
    }
    w = peak.workload
    low, high = peak.interval
    lines = [
        f"{format_bytes(peak)} {peak.metric} ({peak.provenance}), set by the {peak.stage} stage",
        f"{100 * peak.level:g} % interval: {amount(low)} to {amount(high)}; upper bound: {amount(peak.upper)}",
        f"runs as {w.effective_height}x{w.effective_width}, {w.batch_size} image(s), {w.unet_batch} UNet sample(s)",
    ]
    parts = peak.breakdown
    width = max(8, *map(len, parts))
    for name, share in parts.items():
        lines.append(f"  {format_bytes(share):>11}  {name:{width}} {words.get(name) or TERMS[name].meaning}")
    if peak.extrapolated:
        lines.append("outside the swept domain: the interval is widened by guess")
    return "\n".join(lines)


@click.command()
@gpu_option
@memory_option
@workload_options
@level_option
@json_option
def fits(gpu: str, memory: str, level: float | None, as_json: bool, **fields: Any) -> int:
    """Say whether a run fits; exit code 3 if it does not."""
    from sdfit.predict.advise import options_that_fit

    f, workload, peak, limit = _asked(gpu, memory, level, fields)
    answer = peak.upper <= limit
    others = [] if answer else options_that_fit(f, workload, memory=memory, level=level)
    if as_json:
        shown = {"fits": answer, "memory_bytes": limit, **peak.to_dict(), "options": _as_data(others)}
        click.echo(json.dumps(shown, indent=2))
    else:
        click.echo("\n".join([_verdict(peak, limit), *_in_words(others, "would fit with")]))
    return 0 if answer else 3


@click.command()
@gpu_option
@memory_option
@click.option("--aspect", default="1:1", show_default=True, help="Width to height, for example 3:2.")
@click.option("--step", type=int, default=64, show_default=True, help="Both sides are multiples of it.")
@workload_options
@level_option
@json_option
def largest(gpu: str, memory: str, aspect: str, step: int, level: float | None, as_json: bool, **fields: Any) -> None:
    """Find the largest size of an aspect ratio that fits."""
    from sdfit.predict.library import load

    for name in ("height", "width"):
        if fields.pop(name) is not None:
            raise click.UsageError(f"--{name} is what this command finds; leave it out")
    try:
        across, down = (int(part) for part in aspect.split(":"))
    except ValueError:
        raise click.UsageError(f"--aspect is '{aspect}'; write for example 3:2") from None
    height, width = load(gpu).largest(memory=memory, aspect=(across, down), step=step, level=level, **fields)
    click.echo(json.dumps({"height": height, "width": width}) if as_json else f"{height}x{width} (height x width)")


@click.command()
@gpu_option
@memory_option
@workload_options
@level_option
@json_option
def advise(gpu: str, memory: str, level: float | None, as_json: bool, **fields: Any) -> None:
    """Say what fits: this run, its largest batch, and which options help."""
    from sdfit.predict.advise import NothingFits, options_that_fit

    f, workload, peak, limit = _asked(gpu, memory, level, fields)
    rest = {k: v for k, v in workload.to_dict().items() if k not in ("height", "width", "prompt_length", "batch_size")}
    try:
        batch = f.max_batch_size(
            workload.height, workload.width, workload.prompt_length, memory=memory, level=level, **rest
        )
    except NothingFits:
        batch = 0
    options = options_that_fit(f, workload, memory=memory, level=level)
    if as_json:
        answer: dict[str, Any] = {"fits": peak.upper <= limit, "memory_bytes": limit, "max_batch_size": batch}
        answer["options"] = _as_data(options)
        click.echo(json.dumps(answer, indent=2))
        return
    lines = [_verdict(peak, limit), f"largest batch of this size: {batch}", *_in_words(options, "with")]
    click.echo("\n".join(lines))


def _asked(
    gpu: str, memory: str, level: float | None, fields: dict[str, Any]
) -> tuple[Predictor, Workload, Prediction, int]:
    """The model, the run, what it needs at most, and what is there [bytes]."""
    from sdfit.predict.advise import bound
    from sdfit.predict.library import load
    from sdfit.units import parse_bytes

    f, workload = load(gpu), workload_from(fields)
    return f, workload, bound(f, workload, None, level), parse_bytes(memory)


def _verdict(peak: Prediction, limit_bytes: int) -> str:
    verb = "fits" if peak.upper <= limit_bytes else "does not fit"
    return f"{verb}: up to {amount(peak.upper)} {peak.metric} (level {peak.level:.3g}) of {format_bytes(limit_bytes)}"


def _in_words(options: list[Option], verb: str) -> list[str]:
    changes = [", ".join(f"{name}={value}" for name, value in option.change.items()) for option in options]
    return [
        f"  {verb} {change}: up to {format_bytes(option.upper_bytes)}"
        for change, option in zip(changes, options, strict=True)
    ]


def _as_data(options: list[Option]) -> list[dict[str, Any]]:
    return [{"change": option.change, "upper_bytes": round(option.upper_bytes)} for option in options]


@click.command()
@json_option
def models(as_json: bool) -> None:
    """List the models that can be loaded, and what each rests on."""
    from sdfit.errors import ArtifactError
    from sdfit.fit.card import models_table
    from sdfit.predict.library import available
    from sdfit.predict.loading import load_artifact
    from sdfit.predict.predictor import Predictor

    found = {}
    for name, path in available().items():
        try:
            found[name] = Predictor(load_artifact(path), path)
        except ArtifactError as error:  # one damaged file does not hide the others
            click.echo(f"note: {error}", err=True)
    if as_json:
        rows = {
            name: {
                "path": str(f.path),
                "provenance": f.provenance,
                "variants": f.artifact.swept,
                **f.artifact.evaluation,
            }
            for name, f in found.items()
        }
        click.echo(json.dumps(rows, indent=2))
    else:
        click.echo(models_table(found))


@click.command()
@gpu_option
def report(gpu: str) -> None:
    """Print a model's card: what it rests on, how good it is, its coefficients."""
    from sdfit.fit.card import model_card
    from sdfit.predict.library import load

    click.echo(model_card(load(gpu).artifact))
