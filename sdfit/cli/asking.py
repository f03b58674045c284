"""Commands that ask a model: predict, fits, largest, advise, cards, models."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sdfit.cli.options import (
    FILE,
    amount,
    example,
    gpu_option,
    json_option,
    level_option,
    memory_option,
    note,
    replay_option,
    suited,
    suited_fields,
    workload_from,
    workload_options,
    wrongly,
)
from sdfit.units import aligned, format_bytes

if TYPE_CHECKING:
    from sdfit.predict.artifact import Artifact
    from sdfit.predict.memory import Memory
    from sdfit.predict.options import Option
    from sdfit.predict.prediction import Prediction
    from sdfit.predict.predictor import Predictor
    from sdfit.predict.verdict import Verdict
    from sdfit.workload import Workload


@click.command(
    epilog=example("sdfit predict --gpu t4 --height 768 --width 512", "sdfit predict --gpu rtx3060 --image photo.jpg")
)
@gpu_option
@workload_options
@click.option("--image", type=FILE, default=None, help="Take height and width from a picture.")
@click.option("--metric", default=None, help="One of required, allocated, reserved, device; left out: all.")
@level_option
@replay_option
@json_option
def predict(
    gpu: str, image: Path | None, metric: str | None, level: float | None, replay: bool, as_json: bool, **fields: Any
) -> None:
    """Predict the peak memory of one run: what it requires, then what the counters will show."""
    from sdfit.predict.predictor import DEFAULT_LEVEL
    from sdfit.predict.verdict import best_metric

    workload, f = workload_from(fields, image), _model(gpu, replay)
    workload = suited(f, workload)
    level = DEFAULT_LEVEL if level is None else level
    shown = [metric] if metric is not None else [best_metric(f), *(m for m in f.metrics if m != best_metric(f))]
    peaks = [f.predict_workload(workload, metric=name, level=level) for name in shown]
    if as_json:
        every = {peak.metric: peak.to_dict() for peak in peaks}
        click.echo(json.dumps(every[shown[0]] | {"metrics": every}, indent=2))
        return
    w = workload
    lines = [_metric_line(peak) for peak in peaks]
    lines.append(
        f"runs as {w.effective_height}x{w.effective_width}, {w.batch_size} image(s), {w.unet_batch} UNet sample(s)"
    )
    lines += breakdown(next((peak for peak in peaks if peak.metric == "allocated"), peaks[0]))
    click.echo("\n".join([*lines, *wrongly(f, w.dtype)]))


SIMULATED = ", simulated"
_MEANS = {
    "required": "the smallest cap under which it runs",
    "allocated": "live blocks",
    "reserved": "segments taken from the driver",
    "device": "what nvidia-smi shows",
    "minimum": "the smallest cap if no kernel takes a workspace: slower",
}


def _metric_line(peak: Prediction) -> str:
    low, high = peak.interval
    return (
        f"{format_bytes(peak):>11} {peak.metric:9}  {amount(low)} to {amount(high)} at {100 * peak.level:g} %; at most "
        f"{amount(peak.upper)}; {_MEANS[peak.metric]}{SIMULATED if peak.replayed else ''}"
    )


def breakdown(peak: Prediction) -> list[str]:
    """What a prediction is made of, a line a part."""
    from sdfit.equation.terms import TERMS
    from sdfit.predict.prediction import BEYOND
    from sdfit.predict.simulated import ACTIVATIONS

    words = {
        ACTIVATIONS: "what that stage holds above them, simulated",
        "weights": "of what is on the card in that stage",
        BEYOND: "what the caching allocator needs beside them"
        + (", the CUDA context" if peak.metric == "device" else ""),
    }
    parts = peak.breakdown
    width = max(8, *map(len, parts))
    lines = [f"{peak.metric} is set by the {peak.stage} stage:"]
    for name, share in parts.items():
        lines.append(f"  {format_bytes(share):>11}  {name:{width}} {words.get(name) or TERMS[name].meaning}")
    if peak.extrapolated:
        lines.append("outside the swept domain: the intervals are widened by guess")
    return lines


@click.command(
    epilog=example(
        "sdfit fits --gpu t4 --height 1024 --width 1024", "sdfit fits --gpu a100 --memory 8GiB --height 512 --width 512"
    )
)
@gpu_option
@memory_option
@workload_options
@level_option
@click.option("--strict", is_flag=True, help="May fit is a no.")
@replay_option
@json_option
def fits(
    gpu: str, memory: str | None, level: float | None, strict: bool, replay: bool, as_json: bool, **fields: Any
) -> int:
    """Say whether a run fits, may fit, or does not; exit code 3 if it does not."""
    from sdfit.predict.options import options_that_fit
    from sdfit.predict.verdict import DOES_NOT_FIT, FITS

    f, workload, there = _asked(gpu, memory, replay, fields)
    answer = f.verdict(**workload.to_dict(), memory=there.memory_bytes, level=level)
    others = [] if answer.answer == FITS else options_that_fit(f, workload, memory=there.memory_bytes, level=level)
    if as_json:
        options = [option.to_dict() for option in others]
        click.echo(json.dumps(answer.to_dict() | {"memory": there.words, "options": options}, indent=2))
    else:
        lines = [*in_words(answer, there), *_options_in_words(others[:MOST_OPTIONS], "would fit with")]
        click.echo("\n".join([*lines, *wrongly(f, workload.dtype)]))
    return 3 if answer.answer == DOES_NOT_FIT or (strict and answer.answer != FITS) else 0


MOST_OPTIONS = 6
"""Changes that are shown in words; `--json` has all."""


def in_words(answer: Verdict, there: Memory) -> list[str]:
    """A verdict in two or three lines."""
    from sdfit.predict.verdict import MAY_FIT, level_in_words

    peak, spare = answer.prediction, answer.margin_bytes
    how = SIMULATED if peak.replayed else ""
    chance = ""
    if answer.slower:
        chance = ", with slower kernels"
    elif answer.answer == MAY_FIT and answer.chance is not None:
        chance = f", with a chance of {100 * answer.chance:.0f} %"
    lines = [
        f"{answer.answer}{chance}: {peak.metric} {format_bytes(peak)}, at most {amount(peak.upper)} ({level_in_words(peak)}{how}); "
        f"{format_bytes(abs(spare))} {'to spare' if spare >= 0 else 'too much'}",
        f"memory: {there.words}",
    ]
    if answer.slower:
        lines.append(
            "it is likely to run: convolutions would go without their workspaces, which no published number shows"
        )
    if answer.chance is None:
        lines.append("this model is only traced, without kernel workspaces: it never says that a run fits")
    return lines


@click.command(
    epilog=example("sdfit largest --gpu rtx3060 --aspect 3:2", "sdfit largest --gpu t4 --memory 8GiB --vae-tiling")
)
@gpu_option
@memory_option
@click.option("--aspect", default="1:1", show_default=True, help="Width to height, for example 3:2.")
@click.option(
    "--step",
    type=int,
    default=None,
    help="Both sides are multiples of it. Left out: of 64, or less where that is more than a 16th of the shorter side.",
)
@workload_options
@level_option
@replay_option
@json_option
def largest(
    gpu: str,
    memory: str | None,
    aspect: str,
    step: int | None,
    level: float | None,
    replay: bool,
    as_json: bool,
    **fields: Any,
) -> None:
    """Find the largest size of an aspect ratio that is sure to fit, and the largest that is likely to."""
    from sdfit.predict.advise import NothingFits
    from sdfit.predict.memory import available

    for name in ("height", "width"):
        if fields.pop(name) is not None:
            raise click.UsageError(f"--{name} is what this command finds; leave it out")
    try:
        across, down = (int(part) for part in aspect.split(":"))
    except ValueError:
        raise click.UsageError(f"--aspect is '{aspect}'; write for example 3:2") from None
    f = _model(gpu, replay)
    fields, there = suited_fields(f, fields), available(memory, f.card)
    try:
        found = f.largest(memory=there.memory_bytes, aspect=(across, down), step=step, level=level, **fields)
    except NothingFits as error:
        asked = shlex.join(["sdfit", "advise", "--gpu", gpu, *(["--memory", memory] if memory else [])])
        raise NothingFits(f"{error}; what to change: {asked} --height 512 --width 512", **error.facts) from None
    (height, width), (most_height, most_width) = found, found.likely
    if as_json:
        likely = {"height": most_height, "width": most_width}
        click.echo(json.dumps({"height": height, "width": width, "likely": likely, "memory_bytes": there.memory_bytes}))
        return
    click.echo(f"{height}x{width} (height x width) is sure to fit, {most_height}x{most_width} likely")
    click.echo("\n".join([f"memory: {there.words}", *wrongly(f, fields["dtype"])]))


@click.command(epilog=example("sdfit advise --gpu t4 --height 2048 --width 2048 --batch-size 8"))
@gpu_option
@memory_option
@workload_options
@level_option
@replay_option
@json_option
def advise(gpu: str, memory: str | None, level: float | None, replay: bool, as_json: bool, **fields: Any) -> None:
    """Say what to change so that a run fits: the cheapest sufficient changes first, and what each saves.

    Cheapest by rank, not by time: attention, VAE slicing, a split batch, VAE tiling, no safety checker, half precision,
    model offload, the tiny VAE, sequential offload (by far the slowest), group offload of leaves, a smaller size.
    """
    from sdfit.predict.advise import NothingFits
    from sdfit.predict.options import options_that_fit
    from sdfit.predict.verdict import FITS

    f, workload, there = _asked(gpu, memory, replay, fields)
    answer = f.verdict(**workload.to_dict(), memory=there.memory_bytes, level=level)
    rest = {k: v for k, v in workload.to_dict().items() if k != "batch_size"}
    try:
        batch = int(f.max_batch_size(**rest, memory=there.memory_bytes, level=level))
    except NothingFits:
        batch = 0
    options = options_that_fit(f, workload, memory=there.memory_bytes, level=level)
    if as_json:
        shown = {"max_batch_size": batch, "options": [option.to_dict() for option in options], "memory": there.words}
        click.echo(json.dumps(answer.to_dict() | shown, indent=2))
    elif answer.answer == FITS:
        fits = f"already fits: at most {amount(answer.prediction.upper)} of {there.words}; up to {batch} image(s) a call do"
        click.echo("\n".join([fits, *_options_in_words(options, "with more room:"), *wrongly(f, workload.dtype)]))
    else:
        changes = _options_in_words(options, "with") or ["  nothing that was tried makes it fit"]
        most = (
            f"up to {batch} image(s) a call are sure to fit"
            if batch
            else "no batch of this size is sure to fit as it is"
        )
        lines = [*in_words(answer, there), most, *changes]
        click.echo("\n".join([*lines, *wrongly(f, workload.dtype)]))


def _model(gpu: str, replay: bool) -> Predictor:
    """The model that answers for a card; its equation alone where a simulation is not wanted."""
    from sdfit.predict.library import load

    f = load(gpu)
    return f if replay else f.equation


def _asked(gpu: str, memory: str | None, replay: bool, fields: dict[str, Any]) -> tuple[Predictor, Workload, Memory]:
    """The model, the run, and the memory that is there."""
    from sdfit.predict.memory import available

    workload, f = workload_from(fields), _model(gpu, replay)
    return f, suited(f, workload), available(memory, f.card)


def _options_in_words(options: list[Option], verb: str) -> list[str]:
    from sdfit.predict.options import COSTS

    changes = [[f"{name}={value}" for name, value in option.change.items()] for option in options]
    lines = [
        f"  {verb} {', '.join(change)}: at most {format_bytes(option.upper_bytes)}, saves {format_bytes(option.saved_bytes)}"
        for option, change in zip(options, changes, strict=True)
    ]
    dear = dict.fromkeys(words for change in changes for words in change if words in COSTS)
    return [*lines, *(f"  {words}: {COSTS[words][1]}" for words in dear)]


def _readable(paths: Mapping[str, Path]) -> dict[str, Artifact]:
    """The models of some files; one that is damaged is a note, and does not hide the others."""
    from sdfit.errors import ArtifactError
    from sdfit.predict.loading import load_artifact

    found = {}
    for name, path in paths.items():
        try:
            found[name] = load_artifact(path)
        except ArtifactError as error:
            note(str(error))
    return found


@click.command(epilog=example("sdfit cards 3060", "sdfit cards --json"))
@click.argument("pattern", default="")
@json_option
def cards(pattern: str, as_json: bool) -> int:
    """List the cards that sdfit knows by name, their memory, and which model answers for each."""
    from sdfit.predict.cards import matching
    from sdfit.predict.library import answering, available
    from sdfit.predict.predictor import Predictor

    models = available()
    found = [(card, answering(card, models)) for card in matching(pattern)]
    artifacts = _readable({name: models[name] for _, name in found if name})
    rests = [
        "no model yet" if not model
        else "its model cannot be read" if model not in artifacts
        else Predictor(artifacts[model], models[model], card.slug, card).evidence
        for card, model in found
    ]  # fmt: skip
    if as_json:
        rows = [card.to_dict() | {"model": m, "rests_on": why} for (card, m), why in zip(found, rests, strict=True)]
        click.echo(json.dumps(rows, indent=2))
    elif found:
        lines = [("name", "--gpu", "architecture", "float16", "model", "rests on", "memory")]
        lines += [
            (c.name, c.typed, c.architecture, c.half, model or "none", why, format_bytes(c.memory_bytes))
            for (c, model), why in zip(found, rests, strict=True)
        ]
        click.echo(aligned(lines, left=6))
    else:
        click.echo(f"sdfit: no card matches '{pattern}'", err=True)
    return 0 if found else 3


@click.command(epilog=example("sdfit models"))
@json_option
def models(as_json: bool) -> None:
    """List the models that can be loaded, and what each rests on."""
    from sdfit.fit.card import models_table
    from sdfit.predict.library import available
    from sdfit.predict.predictor import Predictor

    paths = available()
    found = {name: Predictor(artifact, paths[name]) for name, artifact in _readable(paths).items()}
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
