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
