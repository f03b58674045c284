"""The command line: each command parses, calls one function and prints.

Answers go to stdout, everything else to stderr. Exit codes: 0 done, 1 a known failure in one line, 2 usage, 3 the
answer is no, 130 interrupted.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from sdfit import __version__
from sdfit.errors import SdfitError
from sdfit.units import format_bytes, parse_duration
from sdfit.workload import CHOICES, CHUNK_TOKENS, Workload

if TYPE_CHECKING:
    from sdfit.predictor import Prediction

F = TypeVar("F", bound=Callable[..., Any])


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    warnings.showwarning = _note
    try:
        result = cli.main(arguments, standalone_mode=False)
        return int(result or 0)
    except SdfitError as error:
        click.echo(f"sdfit: {error}", err=True)
        return error.exit_code
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (KeyboardInterrupt, click.Abort):
        click.echo("sdfit: interrupted; what was recorded is kept, run the same command to go on", err=True)
        return 130
    except BrokenPipeError:  # the reader of our output went away, as head does
        sys.stderr.close()
        return 0


def _note(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    if category.__module__.startswith("sdfit"):
        click.echo(f"note: {message}", err=True)


def workload_options(command: F) -> F:
    """Add the options that make up a Workload."""
    for name in reversed(CHOICES):
        flag = "--" + name.replace("_", "-")
        options = CHOICES[name]
        if isinstance(options[0], bool):
            negative = "--no-" + name.replace("_", "-")
            command = click.option(f"{flag}/{negative}", name, default=options[0], show_default=True)(command)
        else:
            kind = click.Choice([str(o) for o in options])
            command = click.option(flag, name, type=kind, default=options[0], show_default=True)(command)
    for flag, kind, default, text in reversed(_NUMBERS):
        command = click.option(flag, type=kind, default=default, show_default=default is not None, help=text)(command)
    return command


_NUMBERS: tuple[tuple[str, Any, Any, str], ...] = (
    ("--height", int, None, "Of the input image, in pixels."),
    ("--width", int, None, "Of the input image, in pixels."),
    ("--prompt-length", int, CHUNK_TOKENS, "Tokens; up to 77 cost the same, more means prompt_embeds."),
    ("--batch-size", int, 1, "Images per call."),
    ("--guidance-scale", float, 7.5, "Above 1 doubles the UNet's batch."),
)
gpu_option = click.option("--gpu", required=True, help="Name or path of a model; see: sdfit models")
json_option = click.option("--json", "as_json", is_flag=True, help="Plain values, amounts in bytes.")
level_option = click.option("--level", type=float, default=None, help="Of intervals and bounds, between 0 and 1.")
memory_option = click.option("--memory", required=True, help="What PyTorch may take, for example 15GiB.")
out_option = click.option("--out", type=click.Path(path_type=Path), default=None, help="The file to write.")
records_argument = click.argument("files", nargs=-1, type=click.Path(path_type=Path), metavar="RECORDS...")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="sdfit")
def cli() -> None:
    """How much GPU memory will a Stable Diffusion v1.5 img2img run need, and will it fit?"""


@cli.command()
@click.option("--gpu", default="auto", show_default=True, help="The card, as in 't4'; auto takes what is there.")
@click.option("--grid", default="default", show_default=True, help="quick, default, holdout, or a .toml file.")
@click.option("--backend", type=click.Choice(["cuda", "trace", "fake"]), default="cuda", show_default=True)
@out_option
@click.option("--engine", type=click.Choice(["local", "ray"]), default="local", show_default=True)
@click.option("--workers", type=click.IntRange(1), default=None, help="Processes; one per card or processor.")
@click.option("--budget", default=None, help="Start nothing new after this time, for example 5m.")
@click.option("--weights", default="architecture", show_default=True, help="architecture, a folder, or a Hub id.")
@click.option("--workspaces/--no-workspaces", default=True, help="Trace: add the kernel workspaces known for the card.")
@click.option("--dry-run", is_flag=True, help="Print the plan and run nothing.")
def sweep(
    gpu: str,
    grid: str,
    backend: str,
    out: Path | None,
    engine: str,
    workers: int | None,
    budget: str | None,
    weights: str,
    workspaces: bool,
    dry_run: bool,
) -> None:
    """Run a grid on a card and record the peaks."""
    from sdfit import grid as grids
    from sdfit.progress import Reporter
    from sdfit.sweep import sweep as run

    plan = grids.load(grid)
    if dry_run:
        click.echo(plan.summary())
        return
    options: dict[str, Any] = {"gpu": gpu}
    if backend == "cuda":
        options["weights"] = weights
    if backend == "trace":
        options["workspaces"] = workspaces
    with Reporter(f"{gpu} {plan.name}", len(plan.workloads)) as reporter:
        outcome = run(
            plan,
            backend,
            options,
            out,
            engine=engine,
            workers=workers,
            budget_s=parse_duration(budget) if budget else None,
            report=reporter,
        )
    for note in outcome.notes:
        click.echo(f"note: {note}", err=True)
    click.echo(
        f"{outcome.done} of {outcome.total} done, {outcome.oom} out of memory, {outcome.crashed} crashed, "
        f"{outcome.skipped} were there already",
        err=True,
    )
    if not outcome.complete:
        click.echo("not complete: run the same command to go on", err=True)
    click.echo(outcome.path)


@cli.command()
@records_argument
@click.option("--gpu", default=None, help="Fit only this card's records under ./data.")
@out_option
def fit(files: tuple[Path, ...], gpu: str | None, out: Path | None) -> None:
    """Fit the equation to records; without files, to all that was swept under ./data."""
    from sdfit.fitting import fit_files, swept_files
    from sdfit.report import coefficient_table, fit_summary

    jobs = {gpu or "": list(files)} if files else swept_files(Path("data"), gpu)
    for name, paths in jobs.items():
        result = fit_files(paths, name or None, out)
        for note in result.notes:
            click.echo(f"note: {note}", err=True)
        click.echo(coefficient_table(result.artifact))
        click.echo(fit_summary(result.artifact))
        for finding in result.findings:
            click.echo(f"judged: {finding}", err=True)
        click.echo(f"wrote {result.path} and {result.path.with_suffix('.md').name}", err=True)


@cli.command()
@gpu_option
@workload_options
@click.option("--image", type=click.Path(path_type=Path), default=None, help="Take height and width from a picture.")
@click.option("--metric", default="allocated", show_default=True, help="allocated, reserved, device or required.")
@level_option
@json_option
def predict(gpu: str, image: Path | None, metric: str, level: float | None, as_json: bool, **fields: Any) -> None:
    """Predict the peak memory of one run."""
    from sdfit.library import load
    from sdfit.predictor import DEFAULT_LEVEL

    workload = _workload(fields, image)
    peak = load(gpu).predict_workload(workload, metric=metric, level=DEFAULT_LEVEL if level is None else level)
    click.echo(json.dumps(peak.to_dict(), indent=2) if as_json else describe(peak))


def describe(peak: Prediction) -> str:
    """A prediction in a few lines of text."""
    w = peak.workload
    low, high = peak.interval
    lines = [
        f"{format_bytes(peak)} {peak.metric} ({peak.provenance}), set by the {peak.stage} stage",
        f"{100 * peak.level:g} % interval: {_amount(low)} to {_amount(high)}; upper bound: {_amount(peak.upper)}",
        f"runs as {w.effective_height}x{w.effective_width}, {w.batch_size} image(s), {w.unet_batch} UNet sample(s)",
    ]
    lines += [f"  {format_bytes(amount):>12}  {name}" for name, amount in peak.breakdown.items()]
    if peak.extrapolated:
        lines.append("outside the swept domain: the interval is widened by guess")
    return "\n".join(lines)


def _amount(value: float) -> str:
    return format_bytes(value) if value != float("inf") else "unknown (too few scores for this level)"


def _workload(fields: dict[str, Any], image: Path | None = None) -> Workload:
    if image is not None:
        try:
            from PIL import Image, UnidentifiedImageError
        except ImportError as error:
            from sdfit.errors import needs

            raise needs("sweep", "pillow") from error
        try:
            with Image.open(image) as picture:
                fields |= {"width": picture.width, "height": picture.height}
        except (OSError, UnidentifiedImageError) as error:
            raise SdfitError(f"cannot read a picture from '{image}': {error}") from error
    for name in ("height", "width"):
        if fields.get(name) is None:
            raise click.UsageError(f"give --{name}" + (", or --image" if image is None else ""))
    return Workload.from_dict(fields)


@cli.command()
@gpu_option
@memory_option
@workload_options
@level_option
@json_option
def fits(gpu: str, memory: str, level: float | None, as_json: bool, **fields: Any) -> int:
    """Say whether a run fits; exit code 3 if it does not."""
    from sdfit.advise import SAFE_LEVEL, bound, options_that_fit
    from sdfit.library import load
    from sdfit.units import parse_bytes

    f, workload, level = load(gpu), _workload(fields), SAFE_LEVEL if level is None else level
    peak, limit = bound(f, workload, None, level), parse_bytes(memory)
    answer = peak.upper <= limit
    others = [] if answer else options_that_fit(f, workload, memory=memory, level=level)
    if as_json:
        shown = [{"change": o.change, "upper_bytes": round(o.upper_bytes)} for o in others]
        click.echo(json.dumps({"fits": answer, "memory_bytes": limit, **peak.to_dict(), "options": shown}, indent=2))
    else:
        verb = "fits" if answer else "does not fit"
        click.echo(f"{verb}: up to {_amount(peak.upper)} {peak.metric} (level {level:g}) of {format_bytes(limit)}")
        for option in others:
            change = ", ".join(f"{name}={value}" for name, value in option.change.items())
            click.echo(f"  would fit with {change}: up to {format_bytes(option.upper_bytes)}")
    return 0 if answer else 3


@cli.command()
@gpu_option
@memory_option
@click.option("--aspect", default="1:1", show_default=True, help="Width to height, for example 3:2.")
@click.option("--step", type=int, default=64, show_default=True, help="Both sides are multiples of it.")
@workload_options
@level_option
@json_option
def largest(gpu: str, memory: str, aspect: str, step: int, level: float | None, as_json: bool, **fields: Any) -> None:
    """Find the largest size of an aspect ratio that fits."""
    from sdfit.advise import SAFE_LEVEL
    from sdfit.library import load

    for name in ("height", "width"):
        if fields.pop(name) is not None:
            raise click.UsageError(f"--{name} is what this command finds; leave it out")
    try:
        across, down = (int(part) for part in aspect.split(":"))
    except ValueError:
        raise click.UsageError(f"--aspect is '{aspect}'; write for example 3:2") from None
    height, width = load(gpu).largest(
        memory=memory, aspect=(across, down), step=step, level=SAFE_LEVEL if level is None else level, **fields
    )
    click.echo(json.dumps({"height": height, "width": width}) if as_json else f"{height}x{width} (height x width)")


@cli.command()
@gpu_option
@memory_option
@workload_options
@level_option
@json_option
def advise(gpu: str, memory: str, level: float | None, as_json: bool, **fields: Any) -> None:
    """Say what fits: this run, its largest batch, and which options help."""
    from sdfit.advise import SAFE_LEVEL, NothingFits, bound, options_that_fit
    from sdfit.library import load
    from sdfit.units import parse_bytes

    f, workload, level = load(gpu), _workload(fields), SAFE_LEVEL if level is None else level
    peak, limit = bound(f, workload, None, level), parse_bytes(memory)
    rest = {k: v for k, v in workload.to_dict().items() if k not in ("height", "width", "prompt_length", "batch_size")}
    try:
        batch = f.max_batch_size(
            workload.height, workload.width, workload.prompt_length, memory=memory, level=level, **rest
        )
    except NothingFits:
        batch = 0
    options = options_that_fit(f, workload, memory=memory, level=level)
    if as_json:
        shown = [{"change": o.change, "upper_bytes": round(o.upper_bytes)} for o in options]
        answer = {"fits": peak.upper <= limit, "memory_bytes": limit, "max_batch_size": batch, "options": shown}
        click.echo(json.dumps(answer, indent=2))
        return
    verb = "fits" if peak.upper <= limit else "does not fit"
    click.echo(f"{verb}: up to {_amount(peak.upper)} {peak.metric} (level {level:g}) of {format_bytes(limit)}")
    click.echo(f"largest batch of this size: {batch}")
    for option in options:
        change = ", ".join(f"{name}={value}" for name, value in option.change.items())
        click.echo(f"  with {change}: up to {format_bytes(option.upper_bytes)}")


@cli.command()
@json_option
def models(as_json: bool) -> None:
    """List the models that can be loaded, and what each rests on."""
    from sdfit.artifact import load_artifact
    from sdfit.library import available
    from sdfit.predictor import Predictor
    from sdfit.report import models_table

    found = {name: Predictor(load_artifact(path), path) for name, path in available().items()}
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


@cli.command()
@gpu_option
def report(gpu: str) -> None:
    """Print a model's card: what it rests on, how good it is, its coefficients."""
    from sdfit.library import load
    from sdfit.report import model_card

    click.echo(model_card(load(gpu).artifact))


@cli.command()
@click.option("--out", type=click.Path(path_type=Path), default=Path("demo"), show_default=True, help="A folder.")
def demo(out: Path) -> None:
    """Sweep a small grid, fit it, and compare with runs that it never saw."""
    from sdfit.demo import run_demo

    click.echo(run_demo(out))


if __name__ == "__main__":
    raise SystemExit(main())
