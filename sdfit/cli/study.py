"""Commands that look into things: explain, derive, compare, evaluate, identify, report."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import click

from sdfit.cli.options import (
    FILE,
    example,
    gpu_option,
    json_option,
    level_option,
    note,
    out_option,
    records_argument,
    suited,
    workload_from,
    workload_options,
)
from sdfit.errors import SdfitError

kernels_option = click.option(
    "--kernels",
    default=None,
    help="Whose kernel workspaces to add: a card, as t4, or a file of sdfit calibrate (.json).",
)


def _kernels_of(f: Any) -> str | None:
    """The kernels of a model whose workspaces are known; None where they are not."""
    from sdfit.predict.simulation.workspaces import workspaces_for

    try:
        return workspaces_for(f.artifact.name).architecture.name
    except SdfitError:
        return None


def _tracer(kernels: str | None) -> Any:
    from sdfit.backends.environment import libraries_loaded
    from sdfit.backends.trace.tables import workspaces_of

    with libraries_loaded(compiles=False):
        from sdfit.backends.trace.tracer import Tracer

    return Tracer(workspaces_of(kernels) if kernels else None)


@click.command(
    epilog=example("sdfit explain --height 512 --width 512", "sdfit explain --height 512 --width 512 --gpu t4")
)
@workload_options
@kernels_option
@click.option("--timeline", type=FILE, default=None, help="Draw live memory over the run (.png).")
@click.option("--diagram", type=FILE, default=None, help="Draw the pipeline and where the peak is (.svg).")
@click.option(
    "--gpu",
    default=None,
    help="Add the terms of a model and, unless --kernels are given, the workspaces of its kernels.",
)
@click.option("--derive", "derives", is_flag=True, help="Derive the closed form and add its terms; takes longer.")
@json_option
def explain(
    kernels: str | None,
    timeline: Path | None,
    diagram: Path | None,
    gpu: str | None,
    derives: bool,
    as_json: bool,
    **fields: Any,
) -> None:
    """Say what a run's peak is made of: components, stages, the operation, its tensors."""
    from sdfit.predict.library import load

    if gpu is not None and derives:
        raise click.UsageError("--gpu adds a model's terms and --derive those of the closed form; give one of them")
    workload = workload_from(fields)
    equation: Any = None
    if gpu is not None:
        f = load(gpu)
        workload = suited(f, workload)
        peak = f.predict_workload(workload)
        equation, kernels = peak.breakdown, kernels or _kernels_of(f)
    tracer = _tracer(kernels)
    from sdfit.study.derivation.explain import explain as explained

    if derives:
        from sdfit.study.derivation.derive import derive as derived

        equation = derived(workload, tracer=tracer)
    whose = f"the model '{gpu}' (its own peak, {peak.provenance})" if gpu is not None else None
    told = explained(workload, tracer=tracer, equation=equation, terms_of=whose)
    click.echo(json.dumps(told.to_dict(), indent=2) if as_json else told.to_text())
    if timeline is not None:
        from sdfit.study.derivation.timeline import timeline as draw

        click.echo(f"wrote {draw(workload, timeline, explanation=told)}", err=True)
    if diagram is not None:
        from sdfit.study.derivation.diagram import diagram as drawn

        click.echo(f"wrote {drawn(told, diagram)}", err=True)


@click.command(epilog=example("sdfit derive --attention eager"))
@workload_options
@kernels_option
@click.option("--latex", "as_latex", is_flag=True, help="As an aligned LaTeX block.")
@json_option
def derive(kernels: str | None, as_latex: bool, as_json: bool, **fields: Any) -> None:
    """Find the closed form of a variant's peak from the pipeline itself."""
    tracer = _tracer(kernels)
    from sdfit.study.derivation.derive import derive as derived

    for side in ("height", "width"):  # the sizes do not matter: the result is a formula in them
        fields[side] = 512 if fields[side] is None else fields[side]
    derivation = derived(workload_from(fields), tracer=tracer)
    if as_json:
        click.echo(json.dumps(derivation.to_dict(), indent=2, ensure_ascii=False))
    else:
        click.echo(derivation.to_latex() if as_latex else derivation.to_text())


@click.command(epilog=example("sdfit compare", "sdfit compare --gpu t4 data/sm75/2026-11-28-holdout-trace.jsonl.gz"))
@records_argument
@click.option("--gpu", default=None, help="The model beside them; without it each published row gets its card's.")
@click.option("--figure", type=FILE, default=None, help="Draw predicted / actual (.png).")
@click.option("--cases", is_flag=True, help="Also list every case.")
@json_option
def compare(files: tuple[Path, ...], gpu: str | None, figure: Path | None, cases: bool, as_json: bool) -> None:
    """Set other estimators beside sdfit, on records or, without any, on the published measurements."""
    from sdfit.errors import ArtifactError
    from sdfit.fit.files import read_pooled
    from sdfit.predict.library import load
    from sdfit.study.comparison import cases as known_runs
    from sdfit.study.comparison.compare import compare as compared

    if files:
        data = read_pooled(files)
        known = known_runs.record_cases(data.records, load(gpu) if gpu is not None else None)
        source = "measured" if data.environment.get("backend") == "cuda" else "simulated"
    else:
        with warnings.catch_warnings():  # one model after the other: the table says what the truth is
            warnings.simplefilter("ignore")
            models = {}
            for card in known_runs.published_cards():
                try:
                    models[card] = load(card if gpu is None else gpu)
                except ArtifactError as error:  # the cases of other cards are there all the same
                    if gpu is not None:
                        raise
                    note(str(error))
        known, source = known_runs.published_cases(models=models), "published"
    result = compared(known, source=source)
    if as_json:
        click.echo(json.dumps(result.to_dict(), indent=2))
    else:
        click.echo(result.table() + ("\n\n" + result.cases_table() if cases else ""))
    if figure is not None:
        from sdfit.study.comparison.figure import draw

        click.echo(f"wrote {draw(result, figure)}", err=True)


@click.command(
    epilog=example(
        "sdfit evaluate --gpu t4 data/sm75/2026-11-28-holdout-trace.jsonl.gz",
        "sdfit evaluate --gpu t4 --decisions --no-replay data/sm75/2026-11-28-decisions-trace.jsonl.gz",
    )
)
@gpu_option
@records_argument
@level_option
@click.option("--figures", type=FILE, default=None, help="A folder for the figures.")
@click.option("--decisions", is_flag=True, help="Judge the largest sizes that it says fit, on ladders of sizes.")
@click.option(
    "--replay/--no-replay",
    default=None,
    help="Judge required memory as it is answered, every run simulated, or the equation alone. Left out: decisions as they "
    "are answered, numbers by the equation.",
)
@json_option
def evaluate(
    gpu: str,
    files: tuple[Path, ...],
    level: float | None,
    figures: Path | None,
    decisions: bool,
    replay: bool | None,
    as_json: bool,
) -> None:
    """Judge a model on records: errors, coverage, width, by stage, variant and size; or the decisions it leads to.

    Decisions without records are judged beside simulated runs of the sizes that `sdfit largest` searches, in a few minutes; with
    --no-replay it takes several times as long, for the equation's answers lie lower and all above them is simulated.
    """
    from sdfit.fit.files import fitted_on, read_pooled
    from sdfit.judging.evaluate import evaluate as judged
    from sdfit.predict.library import load
    from sdfit.predict.predictor import DEFAULT_LEVEL

    loaded = load(gpu)
    f = loaded if (decisions if replay is None else replay) else loaded.equation
    if decisions and not files:
        from sdfit.judging.decisions import decide_by_simulation
        from sdfit.predict.verdict import SAFE_LEVEL

        found = decide_by_simulation(f, loaded, level=SAFE_LEVEL if level is None else level)
        click.echo(json.dumps(found.to_dict(), indent=2) if as_json else found.table())
        return
    data = read_pooled(files)
    for words in fitted_on(f.artifact, files, data):
        note(words)
    if decisions:
        from sdfit.judging.decisions import decide
        from sdfit.predict.verdict import SAFE_LEVEL

        source = {"cuda": "measured"}.get(str(data.environment.get("backend")), "simulated")
        found = decide(f, data.records, level=SAFE_LEVEL if level is None else level, source=source)
        click.echo(json.dumps(found.to_dict(), indent=2) if as_json else found.table())
        return
    level = DEFAULT_LEVEL if level is None else level
    result = judged(f, data, level=level)
    click.echo(json.dumps(result.to_dict(), indent=2) if as_json else result.table())
    if figures is not None:
        from sdfit.judging.plots import draw_all

        for path in draw_all(f, data, figures, level=level):
            click.echo(f"wrote {path}", err=True)


@click.command(epilog=example("sdfit identify data/sm75/2026-11-28-default-trace.jsonl.gz"))
@records_argument
@click.option("--gpu", default=None, help="Also say it of this model's coefficients.")
@json_option
def identify(files: tuple[Path, ...], gpu: str | None, as_json: bool) -> None:
    """Say which terms records identify, L·H·W above all, and what to sweep next."""
    from sdfit.fit.files import read_pooled
    from sdfit.judging.identify import identifiability
    from sdfit.predict.library import load

    result = identifiability(read_pooled(files).records, load(gpu).artifact if gpu is not None else None)
    click.echo(json.dumps(result.to_dict(), indent=2) if as_json else result.table())


@click.command(epilog=example("sdfit report --gpu t4"))
@gpu_option
@records_argument
@click.option("--all", "every", is_flag=True, help="A folder: an index over all cards, and a page for each model.")
@out_option
@json_option
def report(gpu: str, files: tuple[Path, ...], every: bool, out: Path | None, as_json: bool) -> None:
    """Print a model's card, or write it as one HTML page to be asked and handed on: sdfit report --gpu t4 --out t4.html.

    The page holds the equation and its numbers, errors and coverage, figures, published rows beside ours, and a calculator; it
    needs no network. RECORDS that the fit did not see are judged in it. With --json every coefficient and its bounds.
    """
    from sdfit.fit.card import coefficients, model_card
    from sdfit.predict.library import load
    from sdfit.study.report.make import write_report, write_site

    if every:
        if out is None or as_json or files:
            raise click.UsageError("--all writes a folder; give its name with --out, and neither --json nor records")
        for path in write_site(_models(), out):
            click.echo(path)
        return
    if out is None and files:
        raise click.UsageError("records are judged in a page; give its name with --out")
    if out is not None and as_json:
        raise click.UsageError("--out writes a page, and --json prints; give one of them")
    f = load(gpu).equation
    if out is not None:
        click.echo(write_report(f, out, files))
    elif as_json:
        a = f.artifact
        facts = {
            "name": a.name,
            "provenance": a.provenance,
            "environment": a.environment,
            "sources": a.sources,
            "swept": a.swept,
        }
        found = facts | {"evaluation": a.evaluation, "baseline": a.baseline, "coefficients": coefficients(a)}
        click.echo(json.dumps(found, indent=2))
    else:
        click.echo(model_card(f.artifact))


def _models() -> dict[str, Any]:
    """Every model that can be loaded; a damaged one does not hide the others."""
    from sdfit.errors import ArtifactError
    from sdfit.predict.library import available
    from sdfit.predict.loading import load_artifact
    from sdfit.predict.predictor import Predictor

    found = {}
    for name, path in available().items():
        try:
            found[name] = Predictor(load_artifact(path), path)
        except ArtifactError as error:
            note(str(error))
    return found
