"""Write reports: the page of one model, or a site over all cards; and find records that a model's fit did not see."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from sdfit.errors import SdfitError
from sdfit.files import Kind, Output, shipped, write
from sdfit.fit.files import judging_files, read_pooled
from sdfit.judging.evaluate import evaluate
from sdfit.judging.evaluation import Evaluation
from sdfit.predict.artifact import Artifact
from sdfit.predict.predictor import DEFAULT_LEVEL, Predictor
from sdfit.study.report.page import report
from sdfit.study.report.site import index

PAGE = Kind("page", (".html", ".htm"), b'<meta name="generator" content="sdfit">')


def unseen(predictor: Predictor, files: Sequence[Path] = ()) -> Evaluation | None:
    """How a model does on records that its fit did not see.

    Parameters
    ----------
    predictor : Predictor
    files : sequence of Path
        Empty: those of the grid that judges models, under ``data`` of a checkout.

    Returns
    -------
    Evaluation or None
        None where no files were given and there are none.

    Raises
    ------
    RecordsError
        If given files cannot be read, or hold nothing that the model knows.
    """
    found = list(files) or holdout(predictor.artifact)
    return evaluate(predictor, read_pooled(found), DEFAULT_LEVEL) if found else None


def holdout(artifact: Artifact) -> list[Path]:
    """Records of a model's card that judge models and are never fitted, where this is a checkout that has some."""
    return judging_files(shipped("data") / artifact.name)


def write_report(predictor: Predictor, out: Path, files: Sequence[Path] = ()) -> Path:
    """Write the page of one model.

    Parameters
    ----------
    predictor : Predictor
    out : Path
        An ``.html`` file.
    files : sequence of Path
        As in `unseen`.

    Raises
    ------
    SdfitError
        If it cannot be written; see `sdfit.files.write`.
    """
    page = Output(out, report(predictor, unseen(predictor, files)).encode(), PAGE)
    write(page, inputs=[*files, *([predictor.path] if predictor.path else [])])
    return out


def write_site(models: Mapping[str, Predictor], out: Path) -> list[Path]:
    """Write a folder: ``index.html`` over all cards, and a page for each model.

    Parameters
    ----------
    models : mapping
        Name -> model.
    out : Path
        The folder; made where it is not there.

    Raises
    ------
    SdfitError
        If there is no model, or a page cannot be written.
    """
    if not models:
        raise SdfitError("there is no model to report on; type: sdfit sweep, then sdfit fit")
    pages = {"index": index(models)} | {name: report(f, unseen(f), home="index.html") for name, f in models.items()}
    outputs = [Output(out / f"{name}.html", text.encode(), PAGE) for name, text in pages.items()]
    write(*outputs)
    return [output.path for output in outputs]
