"""What other libraries have to say does not reach the terminal of somebody who runs sdfit."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import warnings
from sdfit.backends.environment import quiet_libraries
quiet_libraries()
from sdfit.errors import SimulatedModelWarning
warnings.warn("mind your version", FutureWarning)
warnings.warn("this model is a simulation", SimulatedModelWarning)
"""
STATISTICS = """
import gc, sys
from sdfit.backends.environment import libraries_loaded
with libraries_loaded():
    import scipy.stats
    assert not gc.isenabled()
    from scipy import stats
print("scipy.stats._stats_py" in sys.modules, gc.isenabled())
from scipy.stats import norm
print(norm.cdf(0.0), stats.norm is norm, hasattr(stats, "no_such_name"))
"""
KERNELS = "-m", "sdfit.study.lab", "kernels", "cpu"
DECODER = """
from sdfit.backends.environment import quiet_libraries
quiet_libraries()
from sdfit.backends.pipeline import build_pipeline
build_pipeline(device="meta", dtype="bfloat16", safety_checker=False)
"""


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, check=True)


def test_only_its_own_warnings_are_shown() -> None:
    """A library's warning is dropped, one of sdfit's is a note of one line."""
    assert run("-c", PROGRAM).stderr == "note: this model is a simulation\n"


@pytest.mark.parametrize("words", [("-c", DECODER), KERNELS], ids=["pipeline", "profiler"])
def test_libraries_are_silent(words: tuple[str, ...]) -> None:
    """Building the pipeline without a checker, and asking the profiler for kernels, print nothing beside the answer."""
    pytest.importorskip("diffusers")
    assert run(*words).stderr == ""


def test_what_few_need_is_loaded_when_it_is_used() -> None:
    """`scipy.stats` is imported twice and not loaded, then whole as soon as something of it is asked for; the collector is on again."""
    pytest.importorskip("scipy")
    assert run("-c", STATISTICS).stdout.splitlines() == ["False True", "0.5 True False"]
