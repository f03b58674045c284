"""Commands that make a model: sweep, fit, demo."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sdfit.cli.options import (
    backend_option,
    example,
    json_option,
    names_of_cards,
    names_of_grids,
    note,
    out_option,
    records_argument,
)
from sdfit.errors import FitError, SdfitError
from sdfit.units import aligned, parse_duration, parse_share
from sdfit.workload import CARD_ALONE, Workload, variant_name

if TYPE_CHECKING:
    from sdfit.fit.planning import Few
    from sdfit.sweep.grid import Plan
    from sdfit.sweep.run import Outcome

MOST_FINDINGS = 12
"""Findings of the fit's own judgement that are printed, the gravest first."""


@click.command(
    epilog=example(
        "sdfit sweep --gpu t4 --backend trace --grid quick --dry-run",
        "sdfit sweep --gpu mine --backend fake --grid quick",
        "sdfit sweep --gpu t4 --backend trace --grid quick --runs 6 --dry-run",
    )
)
@click.option(
    "--gpu",
    default="auto",
    show_default=True,
    shell_complete=names_of_cards,
    help="The card, as in 't4'; auto takes what is there.",
)
@click.option(
    "--grid",
    default="default",
    show_default=True,
    shell_complete=names_of_grids,
    help="Name of a grid, as in quick, or a .toml file.",
)
@backend_option
@out_option
@click.option(
    "--engine",
    type=click.Choice(["local", "ray"]),
    default="local",
    show_default=True,
    help="Workers on this machine, or on those of a Ray cluster.",
)
@click.option("--address", default=None, help="Of a Ray cluster to join, as auto or 10.0.0.1:6379.")
@click.option("--workers", type=click.IntRange(1), default=None, help="Processes; one per card or processor.")
@click.option("--devices", default=None, help="Cards of this machine, as 0,1: a process each; left out, all.")
@click.option("--budget", default=None, help="Start nothing new after this time, as 5m; what tells most runs first.")
@click.option(
    "--runs", type=click.IntRange(1, 48), default=None, help="Only so many: those that tell most of the card."
)
@click.option("--narrow", default="2%", show_default=True, help="With --runs or --budget: ±95 % that is narrow enough.")
@click.option("--prior", default="auto", show_default=True, help="The model that few runs correct; none: grid order.")
@click.option("--limit", default="30m", show_default=True, help="Give a workload up after this time.")
@click.option("--weights", default="architecture", show_default=True, help="architecture, a folder, or a Hub id.")
@click.option("--workspaces/--no-workspaces", default=True, help="Trace: add the kernel workspaces known for the card.")
@click.option("--kernels", default=None, help="Trace: another card's workspaces, or a file of sdfit calibrate (.json).")
@click.option(
    "--history",
    is_flag=True,
    help="Record the allocations of the first workloads of each variant, for sdfit calibrate.",
)
@click.option("--dry-run", is_flag=True, help="Print the plan and run nothing.")
@json_option
def sweep(
    gpu: str,
    grid: str,
    backend: str,
    out: Path | None,
    engine: str,
    address: str | None,
    workers: int | None,
    devices: str | None,
    budget: str | None,
    limit: str,
    runs: int | None,
    narrow: str,
    prior: str,
    weights: str,
    workspaces: bool,
    kernels: str | None,
    history: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Run a grid on a card and record the peaks."""
    from sdfit.backends.history import worth_recording
    from sdfit.cli.progress import Reporter
    from sdfit.sweep import grid as grids
    from sdfit.sweep.run import sweep as run
    from sdfit.sweep.workers import cards_here, cards_named

    plan = grids.load(grid)
    if dry_run and runs is None:
        click.echo(_planned(plan, None, as_json))
        return
    options: dict[str, Any] = {"gpu": gpu}
    if address is not None and engine != "ray":
        raise click.UsageError(f"--address is '{address}', of a Ray cluster; add --engine ray")
    if devices is not None and (engine != "local" or backend == "trace" or workers is not None):
        raise click.UsageError(
            f"--devices is '{devices}', a process for each card of this machine; leave out --engine, --workers and trace"
        )
    if backend == "cuda":
        options["weights"] = weights
    elif weights != "architecture":
        raise click.UsageError(f"--weights is '{weights}'; the backend {backend} loads none, leave it out")
    if history and backend != "cuda":
        raise click.UsageError("--history records what a card's allocator does; leave it out, or type --backend cuda")
    if kernels and backend != "trace":
        raise click.UsageError("--kernels is for --backend trace: a card brings its own kernels")
    if backend == "trace":
        options |= {"workspaces": workspaces} | ({"kernels": kernels} if kernels else {})
        whole, plan = plan, plan.for_the_trace()
        if len(plan.workloads) < len(whole.workloads):
            note(f"{len(whole.workloads) - len(plan.workloads)} of {len(whole.workloads)} runs left out: {CARD_ALONE}")
        if words := foreign_releases():
            note(words)
        if workspaces and gpu != "auto" and not kernels:
            from sdfit.predict.simulation.workspaces import workspaces_for

            try:
                workspaces_for(gpu)
            except SdfitError as error:
                note(f"{error}; this trace has none")
    few = _few(gpu, backend, plan.workloads, runs, budget, narrow, prior)
    if dry_run:
        click.echo(_planned(plan, few, as_json))
        return
    with Reporter(f"{gpu} {plan.name}", len(few.steps) if few else len(plan.workloads)) as reporter:
        outcome = run(
            plan,
            backend,
            options,
            out,
            engine=engine,
            workers=workers,
            devices=cards_named(devices, cards_here(backend)) if devices else (),
            address=address,
            limit_s=parse_duration(limit),
            budget_s=parse_duration(budget) if budget else None,
            histories=worth_recording(plan.workloads) if history else (),
            choose=few,
            report=reporter.of_few if few else reporter,
        )
    _tell(outcome, few)
    if as_json:
        names = ("done", "total", "oom", "crashed", "disturbed", "skipped", "complete")
        counts = {name: getattr(outcome, name) for name in names}
        click.echo(json.dumps({"paths": [str(path) for path in outcome.paths], **counts}))
        return
    for path in outcome.paths:
        click.echo(path)


def foreign_releases() -> str:
    """That nothing is simulated under other releases than those in which the programs of runs were found; else nothing."""
    from sdfit.backends.environment import releases
    from sdfit.predict.simulation.library import shipped_library

    known, here = shipped_library().found_in, releases()
    differ = [f"{name} {here[name]} ({release})" for name, release in known.items() if here[name] != release]
    if not differ:
        return ""
    return f"{', '.join(differ)}: runs are simulated for the releases in brackets alone, so each is traced; that takes longer"


def _tell(outcome: Outcome, few: Few | None) -> None:
    """Say beside the answer what a sweep left behind."""
    for words in outcome.notes:
        note(words)
    if few is not None:
        click.echo(few.words or "time is up: the same command goes on", err=True)
    click.echo(
        f"{outcome.done} of {outcome.total} done, {outcome.oom} out of memory, {outcome.crashed} crashed, "
        f"{outcome.skipped} were there already",
        err=True,
    )
    if outcome.crashed and outcome.complete:
        note(f"{outcome.crashed} gave no answer however often they were tried; their rows say why")
    if outcome.disturbed:
        note(
            f"{outcome.disturbed} ran while another program's memory came or went: their rows say so, and no fit uses them"
        )
    if not outcome.complete and few is None:
        click.echo("not complete: run the same command to go on", err=True)


def _few(
    gpu: str,
    backend: str,
    workloads: Sequence[Workload],
    runs: int | None,
    budget: str | None,
    narrow: str,
    prior: str,
) -> Few | None:
    """What to run where few runs are wanted; None: the whole grid in its order."""
    if runs is None and (budget is None or prior == "none" or (backend == "fake" and prior == "auto")):
        return None
    from sdfit.backends.environment import a_card_is_there
    from sdfit.fit.planning import MOST_RUNS
    from sdfit.fit.priors import few_for

    share = parse_share(narrow)
    try:
        return few_for(gpu, workloads, prior=prior, runs=runs or MOST_RUNS, narrow=share)
    except FitError as error:
        if backend == "cuda":
            a_card_is_there(gpu)  # without one there is nothing to plan for, and that is what to say
        if runs is not None or prior != "auto":
            raise
        note(f"{error}; this sweep follows the grid's order")
        return None


def _few_table(few: Few, workloads: Sequence[Workload]) -> str:
    """The runs in their order, and what each leads to."""
    lines = [("run", "size", "images", "prompt", "guidance", "variant", "95 % interval then")]
    for number, step in enumerate(few.steps, start=1):
        w = workloads[step.index]
        size = f"{w.height}x{w.width}"
        guidance = f"{w.guidance_scale:g}"
        then = f"±{step.width:.1%}"
        lines.append(
            (str(number), size, str(w.batch_size), str(w.prompt_length), guidance, variant_name(w.variant), then)
        )
    head = f"prior: {few.prior.artifact.name} ({few.prior.artifact.provenance}); intervals as planned, for 95 % of the grid"
    return f"{head}\n{aligned(lines, left=0)}"


def _planned(plan: Plan, few: Few | None, as_json: bool) -> str:
    """What a sweep would run; as plain values an interval is a share of the peak, to either side."""
    if not as_json:
        return _few_table(few, plan.workloads) if few else plan.summary()
    found: dict[str, Any] = {"grid": plan.name, "grid_sha256": plan.sha256, "runs": len(plan.workloads)}
    if few is None:
        return json.dumps(found)
    found |= {"prior": few.prior.artifact.name, "provenance": few.prior.artifact.provenance}
    found["planned"] = [
        {"index": step.index, "workload": plan.workloads[step.index].to_dict(), "interval_then": step.width}
        for step in few.steps
    ]
    return json.dumps(found, indent=2)


@click.command(epilog=example("sdfit fit"))
@records_argument
@click.option("--gpu", default=None, help="Fit only this card's records under ./data.")
@click.option("--prior", default="auto", show_default=True, help="The model that few records correct; none: fit all.")
@out_option
@json_option
def fit(files: tuple[Path, ...], gpu: str | None, prior: str, out: Path | None, as_json: bool) -> None:
    """Fit the equation to records; without files, to all that was swept under ./data.

    Fewer than 40 runs correct the model of the card's kernels instead.
    """
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # of a matrix of ten columns threads make waiting and no haste
    from sdfit.fit.card import coefficients, fit_summary
    from sdfit.fit.files import fit_files, swept_files
    from sdfit.judging.judge import judge
    from sdfit.study.comparison import residuals

    jobs = {gpu or "": list(files)} if files else swept_files(Path("data"), gpu)
    if out is not None and len(jobs) > 1:
        raise click.UsageError(f"--out is one file and there are records of {', '.join(jobs)}; choose one with --gpu")
    published = residuals.read()
    for name, paths in jobs.items():
        result = fit_files(paths, name or None, out, published, prior)
        for words in result.notes:
            note(words)
        if as_json:
            known = {name: result.artifact.prior.get(name) for name in ("name", "provenance", "rows", "scale")}
            told = {"prior": known} if result.artifact.prior else {}
            found = {"evaluation": result.artifact.evaluation, **told, "coefficients": coefficients(result.artifact)}
            click.echo(json.dumps(found, indent=2))
        else:
            click.echo(fit_summary(result.artifact))
        findings = judge(result.records, result.artifact)
        for f in findings[:MOST_FINDINGS]:
            click.echo(f"judged: {f.severity}: {f.where}: {f.message}", err=True)
        if len(findings) > MOST_FINDINGS:
            click.echo(f"judged: {len(findings) - MOST_FINDINGS} more findings of less weight", err=True)
        click.echo(f"wrote {result.path} and {result.path.with_suffix('.md').name}", err=True)


@click.command(epilog=example("sdfit demo"))
@click.option(
    "--out", type=click.Path(path_type=Path, file_okay=False), default=Path("demo"), show_default=True, help="A folder."
)
@json_option
def demo(out: Path, as_json: bool) -> None:
    """Sweep a small grid, fit it, and compare with runs that it never saw."""
    from sdfit.cli.demo import run_demo

    found = run_demo(out)
    click.echo(json.dumps(found.to_dict(), indent=2) if as_json else found.text())
