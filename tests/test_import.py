"""The light half: importing sdfit and predicting need numpy and the standard library, nothing else."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import sdfit

HEAVY = (
    "torch", "scipy", "pandas", "sklearn", "click", "rich", "joblib", "matplotlib", "diffusers", "transformers", "PIL",
    "ray",
)  # fmt: skip
PROGRAM = """
import json, sys, warnings
before = set(sys.modules)
import sdfit
sdfit.Workload(512, 512)
first = set(sys.modules) - before
warnings.simplefilter("ignore")
f = sdfit.load(sys.argv[1])
peak = f(768, 512, 77, batch_size=2, metric="required", level=0.9)
peak.interval, peak.upper, peak.stage, peak.breakdown, peak.extrapolated, peak.to_dict()
f.predict({"height": [512, 768], "width": 512}), f.predict_interval({"height": [512], "width": [512]})
f.fits(512, 512, memory="8 GiB"), f.largest(memory="8 GiB"), f.max_batch_size(512, 512, memory="8 GiB")
print(json.dumps([sorted(first), sorted(set(sys.modules) - before)]))
"""


def test_predicting_imports_numpy_and_the_standard_library(fake_model: Path) -> None:
    """Load, call, tables, advice: of what is not Python's own, only numpy and sdfit are imported."""
    ran = subprocess.run(
        [sys.executable, "-I", "-c", PROGRAM, str(fake_model)], capture_output=True, text=True, check=True
    )
    first, everything = ({name.split(".")[0] for name in names} for names in json.loads(ran.stdout))
    assert not everything & set(HEAVY)
    # -I leaves what editable installs and .pth files bring in; it is not what sdfit imports
    foreign = {name for name in everything if name not in sys.stdlib_module_names and not name.startswith("_")}
    assert foreign - {"sdfit", "numpy"} == set()
    assert "numpy" in everything and "sdfit" in first


def test_the_public_names_are_there() -> None:
    """Each name of ``__all__`` can be had, and a wrong one is an AttributeError that names it."""
    for name in sdfit.__all__:
        assert getattr(sdfit, name) is not None
    assert set(sdfit.__all__) <= set(dir(sdfit))
    with pytest.raises(AttributeError, match="'lod'"):
        _ = sdfit.lod


@pytest.mark.parametrize(
    ("command", "module", "extra"),
    [
        (("sweep",), "torch", "sweep"),
        (("sweep", "--backend", "trace", "--grid", "quick", "--workers", "1"), "torch", "sweep"),
        (("explain", "--height", "512", "--width", "512"), "torch", "sweep"),
        (("demo",), "torch", "sweep"),
        (("fit", "{records}"), "scipy", "fit"),
        (("compare", "--figure", "x.png"), "matplotlib", "plot"),
    ],
)
def test_what_an_install_without_extras_lacks_is_named(
    command: tuple[str, ...], module: str, extra: str, tmp_path: Path, fake_model: Path
) -> None:
    """Without an optional package a command says in one line which extra brings it; nothing is written."""
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    for name in {"torch", module}:
        (hidden / f"{name}.py").write_text(f"raise ModuleNotFoundError('no {name} here', name={name!r})\n")
    (records,) = fake_model.parent.parent.rglob("*-default.jsonl")
    words = [word.format(records=records, model=fake_model) for word in command]
    ran = subprocess.run(
        [sys.executable, "-m", "sdfit.cli", *words],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{hidden}{os.pathsep}{Path(sdfit.__file__).parent.parent}"},
        check=False,
    )
    assert ran.returncode == 1
    last = ran.stderr.strip().splitlines()[-1]
    assert last == f"sdfit: this needs {module}, which is not installed; type: pip install 'sdfit[{extra}]'"
    assert "Traceback" not in ran.stderr and not (tmp_path / "data").exists()


LIBRARIES = {"torch", "diffusers", "sklearn", "scipy", "pandas", "matplotlib", "ray", "PIL", "joblib"}


@pytest.mark.parametrize(
    ("command", "used"),
    [
        (("predict", "--gpu", "t4", "--height", "512", "--width", "512"), set()),
        (("fits", "--gpu", "t4", "--height", "512", "--width", "512", "--memory", "16GiB"), set()),
        (("models",), set()),
        (("compare",), set()),
        (("evaluate", "--gpu", "{model}", "{records}"), set()),
        (("explain", "--height", "64", "--width", "64"), {"torch", "diffusers", "PIL"}),
    ],
)
def test_a_command_loads_no_library_that_it_does_not_use(
    command: tuple[str, ...], used: set[str], fake_model: Path
) -> None:
    """Each command runs with the libraries that it uses and no other; diffusers brings what it likes."""
    (records,) = fake_model.parent.parent.rglob("*-default.jsonl")
    words = [word.format(records=records, model=fake_model) for word in command]
    code = (
        "import sys; from sdfit.cli import main; code = main(sys.argv[1:]); "
        "print(sorted({m.split('.')[0] for m in sys.modules}), file=sys.stderr); sys.exit(code)"
    )
    ran = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    *notes, names = ran.stderr.strip().splitlines()
    loaded = set(re.findall(r"'(\w+)'", names))
    brought = {"scipy"} if "torch" in used else set()
    assert loaded & LIBRARIES <= used | brought
    assert all(note.startswith("note: ") for note in notes), notes


def test_a_simulated_sweep_says_nothing_but_its_progress(tmp_path: Path) -> None:
    """Of the workers and the libraries that they load no word reaches the terminal."""
    pytest.importorskip("diffusers")
    grid = tmp_path / "one.toml"
    grid.write_text('[[block]]\nname = "one"\nshapes = [[64, 64]]\nsafety_checker = [false, true]\n')
    words = ["sweep", "--gpu", "t4", "--backend", "trace", "--workers", "1", "--grid", str(grid)]
    ran = subprocess.run(
        [sys.executable, "-m", "sdfit.cli", *words, "--out", str(tmp_path / "one.jsonl")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    own = re.compile(r"(t4 one: )?\d( of |/)2 done, ")
    assert all(own.match(line) for line in ran.stderr.splitlines()), ran.stderr
