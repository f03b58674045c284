"""The same under other software: Pythons, and releases of torch, diffusers and transformers, each in a folder of its own.

Three questions. Does the base install predict from a built wheel, outside the checkout? Does the oldest that is declared fit
what the tested set fits? And does a release move memory? The last is asked of the trace, which runs the unmodified pipeline of whatever release it finds (grid ``releases``); what
kernels hold is not in a release of diffusers, and no trace sees it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sdfit
from sdfit.errors import SdfitError
from sdfit.predict.loading import load_artifact
from sdfit.predict.predictor import Predictor
from sdfit.records import Record, read
from sdfit.units import aligned
from sdfit.workload import Workload, variant_name

CHECKOUT = Path(sdfit.__file__).resolve().parents[1]
PYTHONS = ("3.11", "3.12", "3.13")
DIFFUSERS = (
    "0.32.0", "0.32.1", "0.32.2", "0.33.0", "0.33.1", "0.34.0", "0.35.0", "0.35.1", "0.35.2", "0.36.0", "0.37.0", "0.37.1",
    "0.38.0", "0.39.0", "0.40.0", "0.41.0", "0.42.0", "0.42.1",
)  # fmt: skip
TRANSFORMERS = ("5.23.0", "4.57.6")
"""Tried in this order beside each release of diffusers: the first with which its pipeline can be imported."""
BESIDE = ("httpx", "importlib_metadata", "requests", "regex", "safetensors", "pillow", "filelock")
"""What releases of diffusers need beside it."""
FULL = {
    "oldest": (
        "3.11", "torch==2.4.1", "diffusers==0.32.0", "transformers==4.46.3", "accelerate==1.0.1", "huggingface_hub<1",
        "numpy==1.26.4", "joblib==1.3.2", "click==8.1.7", "rich==13.0.0", "pillow==10.4.0",
    ),
    "3.12": ("3.12", "torch==2.14.1", "diffusers", "transformers", "accelerate", "pillow"),
    "newest": ("3.13", "torch==2.14.1", "diffusers", "transformers", "accelerate", "pillow"),
    "oldest, tested torch": (
        "3.11", "torch==2.13.0", "diffusers==0.32.0", "transformers==4.46.3", "accelerate==1.0.1", "huggingface_hub<1", "joblib",
        "click", "rich", "pillow",
    ),
    "newest, tested torch": ("3.11", "torch==2.13.0", "diffusers", "transformers", "accelerate", "pillow"),
}  # fmt: skip
"""Whole installs: a Python, and what pip is told. Each fetches some gigabytes where there is no CPU build of its torch."""
AMOUNTS = ("allocated_bytes", "reserved_bytes", "required_bytes", "minimum_bytes")
SWEEP = ("-m", "sdfit.cli", "sweep", "--backend", "trace", "--gpu", "t4", "--grid", "releases", "--workers", "1")
PREDICT = ("predict", "--gpu", "t4", "--height", "768", "--width", "512", "--batch-size", "2", "--json")
HEAD = ("software", "beside it", "peak at 512x512", "result")
Row = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a piece of software lies and what came of it there."""

    python: str
    folder: Path
    path: tuple[Path, ...]
    """Folders before those of that Python."""

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run that Python in the folder, away from the checkout."""
        environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "SDFIT_MODELS")}
        environment["PYTHONPATH"] = os.pathsep.join(map(str, self.path))
        return subprocess.run(
            [self.python, *words], cwd=self.folder, env=environment, text=True, capture_output=True, check=False
        )


def pythons() -> dict[str, str]:
    """The Pythons of this machine, by version: those on the path, and pyenv's."""
    home = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"), "versions")
    found: dict[str, str] = {}
    for version in PYTHONS:
        for candidate in (shutil.which(f"python{version}"), *home.glob(f"{version}.*/bin/python")):
            if candidate and subprocess.run([candidate, "-c", ""], capture_output=True, check=False).returncode == 0:
                found[version] = str(candidate)
                break
    return found


def wheels(folder: Path) -> list[Row]:
    """Build the wheel and the source distribution, and ask the base install under each Python for a prediction."""
    tools = _fresh(sys.executable, folder / "tools", "hatchling")
    shutil.rmtree(folder / "dist", ignore_errors=True)
    built = subprocess.run(
        [tools.python, "-m", "hatchling", "build", "-d", str(folder / "dist")],
        cwd=CHECKOUT, text=True, capture_output=True, check=False,
    )  # fmt: skip
    _done(built)
    (source,), (wheel,) = (folder / "dist").glob("*.tar.gz"), (folder / "dist").glob("*.whl")
    _done(tools.run("-m", "pip", "wheel", "-q", "--no-deps", "-w", str(folder / "again"), str(source)))
    told = _complete(wheel, folder / "again" / wheel.name)
    here = Place(sys.executable, folder, (CHECKOUT,)).run("-m", "sdfit.cli", *PREDICT)
    _done(here)
    rows = []
    there = pythons()
    for version in PYTHONS:
        if version not in there:
            rows.append((f"Python {version}", "", "not on this machine", ""))
            continue
        place = _fresh(there[version], folder / f"base-{version}", str(wheel))
        ran = place.run("-m", "sdfit.cli", *PREDICT)
        same = ran.returncode == 0 and json.loads(ran.stdout) == json.loads(here.stdout)
        packages = json.loads(place.run("-m", "pip", "list", "--format", "json").stdout)
        versions = {p["name"].lower(): p["version"] for p in packages}
        rows.append(
            (
                f"Python {version}",
                f"numpy {versions.get('numpy')}",
                "",
                "predicts the same" if same else f"fails: {_last(ran.stderr)}",
            )
        )
    return [("sdist, and a wheel of it", f"{source.stat().st_size} B", "", told), *rows]


def _complete(wheel: Path, again: Path) -> str:
    """Whether the wheel of the source distribution holds what that of the checkout holds, to the byte."""
    one, other = (
        {f.filename: f.CRC for f in zipfile.ZipFile(path).infolist() if not f.filename.endswith("/RECORD")}
        for path in (wheel, again)
    )
    differ = sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))
    return f"differ in {', '.join(differ)}" if differ else f"built; the same {len(one)} files as of the checkout"


def oldest(folder: Path, extras: Sequence[str] = ("fit", "plot")) -> list[Row]:
    """Fit a grid under the oldest release of everything that `pyproject.toml` declares, torch's extras left out; a row.

    Both models then predict the grid; a coefficient may differ in its last digits, a prediction hardly.
    """
    pins = declared(tomllib.loads((CHECKOUT / "pyproject.toml").read_text(encoding="utf-8"))["project"], extras)
    version, there = PYTHONS[0], pythons()
    if version not in there:
        return [(f"Python {version}", "the oldest", "not on this machine", "")]
    (fitted,) = (CHECKOUT / "data" / "sm90").glob("*-default-trace.jsonl.gz")
    fresh = _fresh(there[version], folder / "oldest", *pins)
    name = (f"Python {version}, the oldest declared", ", ".join(pins).replace("==", " "))
    models = []
    for place in (Place(fresh.python, fresh.folder, (CHECKOUT,)), Place(sys.executable, folder, (CHECKOUT,))):
        models.append(place.folder / "oldest.joblib")
        ran = place.run("-m", "sdfit.cli", "fit", str(fitted), "--out", str(models[-1]))
        if ran.returncode:
            return [(*name, "", f"cannot fit: {_last(ran.stderr)}")]
    one, other = (Predictor(load_artifact(path)) for path in models)
    workloads = [r.workload for r in read(fitted).records]
    far = max(abs(float(one.predict_workload(w)) / float(other.predict_workload(w)) - 1) for w in workloads)
    return [(*name, "", f"fits; its predictions differ by {far:.1e} at most")]


def declared(project: Mapping[str, Any], extras: Sequence[str]) -> tuple[str, ...]:
    """The oldest release of each declared dependency, as pip takes it.

    Examples
    --------
    >>> declared({"dependencies": ["numpy>=1.26"], "optional-dependencies": {"plot": ["matplotlib>=3.8"]}}, ["plot"])
    ('numpy==1.26', 'matplotlib==3.8')
    """
    wanted = [*project["dependencies"], *(one for extra in extras for one in project["optional-dependencies"][extra])]
    return tuple(one.replace(">=", "==") for one in wanted)


def diffusers(folder: Path, releases: Sequence[str] = DIFFUSERS) -> Iterator[Row]:
    """Trace the grid under each release of diffusers over this environment's torch; a row each."""
    reference = _reference(folder)
    for release in releases:
        place, transformers, refused = _overlay(folder, release)
        yield (f"diffusers {release}", f"transformers {transformers}{refused}", *_compared(place, reference))


def installs(folder: Path, names: Sequence[str] = tuple(FULL)) -> Iterator[Row]:
    """Trace the grid under whole installs of their own; a row each."""
    reference = _reference(folder)
    there = pythons()
    for name in names:
        version, *wanted = FULL[name]
        if version not in there:
            yield (f"Python {version}", name, "not on this machine", "")
            continue
        place = _fresh(there[version], folder / f"full-{name.replace(', ', '-').replace(' ', '-')}", *wanted)
        place = Place(place.python, place.folder, (CHECKOUT,))
        yield (f"Python {version}, {name}", _software(place), *_compared(place, reference))


def table(rows: Sequence[Row]) -> str:
    """One row a line."""
    return aligned([HEAD, *rows], left=4)


def _overlay(folder: Path, release: str) -> tuple[Place, str, str]:
    """A folder with a release of diffusers, over one with a transformers that it takes, over this environment's torch."""
    home = _into(folder / f"diffusers-{release}", "--no-deps", f"diffusers=={release}")
    refused = ""
    for transformers in TRANSFORMERS:
        beside = _into(folder / f"transformers-{transformers}", f"transformers=={transformers}", *BESIDE)
        place = Place(sys.executable, home, (home, beside, CHECKOUT))
        ran = place.run("-c", "from diffusers import StableDiffusionImg2ImgPipeline")
        if ran.returncode == 0:
            return place, transformers, refused
        refused += f"; {transformers}: {_last(ran.stderr).partition(' (/')[0]}"
    raise SdfitError(f"diffusers {release} goes with none of these transformers{refused}")


def _into(home: Path, *wanted: str) -> Path:
    """A folder of packages; one that is there is used again."""
    if not home.is_dir():
        part = home.with_name(f"{home.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        words = ("install", "-q", "--no-compile", "--target", str(part), *wanted)
        _done(Place(sys.executable, home.parent, ()).run("-m", "pip", *words))
        part.rename(home)
    return home


def _fresh(python: str, home: Path, *wanted: str) -> Place:
    """A virtual environment with some packages; one that is there and whole is used again."""
    place = Place(str(home / "bin" / "python"), home, ())
    stamp = home / "wanted.txt"
    if stamp.is_file() and stamp.read_text() == "\n".join(wanted) and not any(w.endswith(".whl") for w in wanted):
        return place
    shutil.rmtree(home, ignore_errors=True)
    home.parent.mkdir(parents=True, exist_ok=True)
    _done(subprocess.run([python, "-m", "venv", str(home)], text=True, capture_output=True, check=False))
    _done(place.run("-m", "pip", "install", "-q", "--no-cache-dir", *wanted))
    stamp.write_text("\n".join(wanted))
    return place


def _reference(folder: Path) -> dict[int, Record]:
    """The grid traced under this environment."""
    place = Place(sys.executable, folder / "here", (CHECKOUT,))
    place.folder.mkdir(parents=True, exist_ok=True)
    return _traced(place)


def _traced(place: Place) -> dict[int, Record]:
    out = place.folder / "records.jsonl"
    out.unlink(missing_ok=True)
    ran = place.run(*SWEEP, "--out", str(out))
    if not out.is_file():
        raise SdfitError(f"no trace in {place.folder}: {_last(ran.stderr)}")
    return {r.index: r for r in read(out).records}


def _compared(place: Place, reference: dict[int, Record]) -> tuple[str, str]:
    """The peak of the first workload [bytes], and where the others differ from the reference."""
    try:
        rows = _traced(place)
    except SdfitError as error:
        return "", str(error)
    told = []
    for index, record in reference.items():
        other = rows[index]
        if other.outcome == "crash" and record.outcome != "crash":
            told.append(f"{variant_name(record.workload.variant)}: {other.message}")
        elif differ := [n for n in AMOUNTS if getattr(other, n) != getattr(record, n)]:
            amounts = ", ".join(f"{n} {_change(getattr(record, n), getattr(other, n))}" for n in differ)
            told.append(f"{variant_name(record.workload.variant)}: {amounts}")
    same = sum(1 for i, r in reference.items() if all(getattr(rows[i], n) == getattr(r, n) for n in AMOUNTS))
    plain = next(i for i, r in reference.items() if r.workload == Workload(512, 512))
    return f"{rows[plain].allocated_bytes} B", "; ".join([f"{same} of {len(reference)} the same to the byte", *told])


def _change(old: Any, new: Any) -> str:
    return f"{new - old:+d} B" if isinstance(old, int) and isinstance(new, int) else f"{old} to {new}"


def _software(place: Place) -> str:
    names = ("torch", "diffusers", "transformers", "numpy")
    code = f"from importlib.metadata import version; print(', '.join(n + ' ' + version(n) for n in {names}))"
    return place.run("-c", code).stdout.strip()


def _done(ran: subprocess.CompletedProcess[str]) -> None:
    if ran.returncode:
        raise SdfitError(f"'{' '.join(map(str, ran.args))}' failed: {_last(ran.stderr or ran.stdout)}")


def _last(text: str) -> str:
    return ([line.strip() for line in text.splitlines() if line.strip()] or ["no word"])[-1]
