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
with libraries_loaded(compiles=True):
    import scipy.stats
    assert not gc.isenabled()
    from scipy import stats
print("scipy.stats._stats_py" in sys.modules, gc.isenabled())
from scipy.stats import norm
print(norm.cdf(0.0), stats.norm is norm, hasattr(stats, "no_such_name"))
"""
COMPILER = """
import sys
from sdfit.backends.environment import libraries_loaded
with libraries_loaded(compiles=False):
    from sdfit.backends.trace.tracer import Tracer
from sdfit.workload import Workload
Tracer().run(Workload(64, 64))
unused = ("torch._dynamo.utils", "scipy.optimize._lsap", "scipy.integrate._ode")
print([name in sys.modules for name in unused])
import torch._dynamo.utils
print(sys.modules["torch._dynamo.utils"] is torch._dynamo.utils, torch._dynamo.eval_frame.OptimizedModule.__module__)
print(torch.compile(lambda x: x + 1, backend="eager")(torch.zeros(1)).item())
from transformers.loss import loss_for_object_detection as losses
print(losses.linear_sum_assignment([[2, 1], [1, 2]])[1].tolist())
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


def test_a_trace_leaves_the_compiler_alone() -> None:
    """A trace loads neither PyTorch's compiler nor optimisers and integrators; who asks for a module of the compiler then gets
    one of the whole, and it compiles; a function that was taken before its module was loaded does what it should."""
    pytest.importorskip("diffusers")
    assert run("-c", COMPILER).stdout.splitlines() == [
        "[False, False, False]",
        "True torch._dynamo.eval_frame",
        "1.0",
        "[1, 0]",
    ]
