"""The light half: importing sdfit and predicting need numpy and the standard library, nothing else."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

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
    import pytest

    import sdfit

    for name in sdfit.__all__:
        assert getattr(sdfit, name) is not None
    assert set(sdfit.__all__) <= set(dir(sdfit))
    with pytest.raises(AttributeError, match="'lod'"):
        _ = sdfit.lod
