"""Show on record what sweeps take for granted: the same few workloads, run under several conditions.

Does a peak depend on the number of steps, on the process's age, on the values of the weights, on the allocator's
settings? What does the first workload of a process cost extra? Which attention kernel runs for which head size? Each
answer is a row of a journal; `compared` sets them beside the reference, byte by byte.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sdfit.errors import RecordsError
from sdfit.records import MATTERS, Kind, differences
from sdfit.sweep.journal import Journal
from sdfit.sweep.workers import LocalPool
from sdfit.workload import Workload

REFERENCE, KERNELS = "reference", "sdpa kernels"
HEAD_DIMS = (40, 80, 160, 512)
"""Of the UNet's three resolutions, and of the VAE's middle."""


@dataclass(frozen=True, slots=True)
class Condition:
    """One way to run the workloads.

    Parameters
    ----------
    name, question : str
    options : dict
        For `sdfit.backends.cuda.CudaBackend`; other backends get the number of steps only.
    variables : dict
        Of the environment, in which the workers start.
    fresh : bool
        A new process for each workload; otherwise one for all.
    card_alone : bool
        Only with `sdfit.backends.cuda.CudaBackend`: the options are nothing to another.
    """

    name: str
    question: str
    options: dict[str, Any] = field(default_factory=dict)
    variables: dict[str, str] = field(default_factory=dict)
    fresh: bool = False
    card_alone: bool = False


_SCHEDULERS = ("ddim", "euler_ancestral", "dpmpp_2m", "unipc", "lcm")
CONDITIONS = (
    Condition(REFERENCE, "one process, one workload after the other"),
    Condition("again", "does a second sweep give the same bytes?"),
    Condition("fresh process", "does a process that lives long measure as a new one does?", fresh=True),
    Condition(
        "5 steps", "how much does the scheduler keep? PNDM holds four answers from here on", {"num_inference_steps": 5}
    ),
    *(
        Condition(
            name,
            "latents that it keeps: PNDM's less or more",
            {"scheduler": name, "num_inference_steps": 5},
            card_alone=True,
        )
        for name in _SCHEDULERS
    ),
    Condition(
        "guidance cut off",
        "the UNet's batch halves after two of five steps and its kernels run anew: does the peak stay?",
        {"guidance_share": 0.4, "num_inference_steps": 5},
        card_alone=True,
    ),
    Condition("50 steps", "do two steps reach the peak of fifty?", {"num_inference_steps": 50}),
    Condition("second seed", "does the peak depend on the values of the weights?", {"seed": 1}),
    Condition(
        "not warmed up", "what does the first workload of a process cost extra?", {"warm_up_side": 0}, fresh=True
    ),
    Condition(
        "expandable segments",
        "what does the allocator's other way of growing change?",
        variables={"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"},
    ),
)


def _row(values: Any) -> dict[str, Any]:
    """Check a parsed line."""
    if not isinstance(values, dict) or not {"condition", "index"} <= set(values):
        raise RecordsError("it has no condition, or no index")
    return values


PROOFS = Kind("proof", _row, dict, "python -m sdfit.study.lab campaign --parts proofs")
"""A row is a condition, the index of its workload, the fields of a Record and the environment it was run in."""
_SAME = tuple(name for name in MATTERS if name != "allocator_settings")  # which one condition changes


def prove(
    path: Path,
    workloads: Sequence[Workload],
    backend: str,
    options: Mapping[str, Any],
    in_time: Callable[[], bool] = lambda: True,
    conditions: Sequence[Condition] = CONDITIONS,
) -> bool:
    """Run the workloads under each condition, skipping what the file holds.

    Parameters
    ----------
    in_time : callable
        Asked before each process starts; False ends the work.

    Returns
    -------
    bool
        Whether nothing is left to do.

    Raises
    ------
    RecordsError
        If the file is no file of proofs, or its rows are of another card or other versions.
    """
    with Journal(path, {"backend": backend}, PROOFS) as journal:
        for condition in (c for c in conditions if backend == "cuda" or not c.card_alone):
            done = _done(journal.rows, condition.name)
            left = [i for i in range(len(workloads)) if i not in done]
            if not left:
                continue
            # one process for all: a row that is missing means that all must be run again in it
            groups = [[i] for i in left] if condition.fresh else [list(range(len(workloads)))]
            known = ("num_inference_steps",) if backend != "cuda" else tuple(condition.options)
            extra = {name: value for name, value in condition.options.items() if name in known}
            for group in groups:
                if not in_time():
                    return False
                with _variables(condition.variables):
                    for row in _rows(backend, dict(options) | extra, [(i, workloads[i]) for i in group], journal.rows):
                        journal.append({"condition": condition.name, **row})
        if not _done(journal.rows, KERNELS):
            if not in_time():
                return False
            journal.append({"condition": KERNELS, "index": 0, "kernels": kernels_in_a_process(backend)})
    return True


def _done(rows: Sequence[Mapping[str, Any]], condition: str) -> set[int]:
    """The indices of a condition's rows that are no crash."""
    return {r["index"] for r in rows if r["condition"] == condition and r.get("outcome") != "crash"}


def _rows(
    backend: str, options: dict[str, Any], jobs: list[tuple[int, Workload]], known: Sequence[Mapping[str, Any]]
) -> Iterator[dict[str, Any]]:
    pool = LocalPool(backend, options, 1)
    try:
        environment = pool.environment()
        before = next((r["environment"] for r in known if "environment" in r), environment)
        differ = differences(before, environment, _SAME)
        if differ:
            raise RecordsError(f"the proofs there are of other conditions ({'; '.join(differ)}); choose another folder")
        for index, fields in pool.run(jobs):
            yield {"index": index, "workload": dict(jobs)[index].to_dict(), **fields, "environment": environment}
    finally:
        pool.close()


@contextmanager
def _variables(wanted: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def compared(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Set each condition beside the reference.

    Returns
    -------
    list of dict
        ``condition``, ``runs``, and the smallest and largest difference from the reference, over the workloads, of
        the peak of any stage (``stages``), of allocated, reserved and baseline memory [bytes], as ``(low, high)``;
        None where either side is missing.
    """
    reference = {r["index"]: r for r in rows if r["condition"] == REFERENCE}
    names = list(dict.fromkeys(r["condition"] for r in rows if "workload" in r))
    table = []
    for name in names:
        pairs = [
            (r, reference[r["index"]])
            for r in rows
            if r["condition"] == name and r["index"] in reference and r.get("outcome") == "ok"
        ]
        entry: dict[str, Any] = {"condition": name, "runs": len(pairs)}
        stages = [
            one["stage_peaks_bytes"][s] - other["stage_peaks_bytes"][s]
            for one, other in pairs
            for s in one["stage_peaks_bytes"]
            if s in other.get("stage_peaks_bytes", {})
        ]
        entry["stages"] = (min(stages), max(stages)) if stages else None
        for metric in ("allocated", "reserved", "baseline"):
            key = f"{metric}_bytes"
            found = [
                one[key] - other[key] for one, other in pairs if one.get(key) is not None and other.get(key) is not None
            ]
            entry[metric] = (min(found), max(found)) if found else None
        table.append(entry)
    return table


def kernels_in_a_process(backend: str) -> list[dict[str, Any]]:
    """`attention_kernels` in a process of its own, so that its context does not count in anybody's device memory."""
    device = "cuda" if backend == "cuda" else "cpu"
    done = subprocess.run(
        [sys.executable, "-m", "sdfit.study.lab", "kernels", device], capture_output=True, text=True, check=False
    )
    if done.returncode:
        return [{"error": (done.stderr.strip().splitlines() or ["no output"])[-1]}]
    found: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return found


def attention_kernels(device: str) -> list[dict[str, Any]]:
    """Which kernel `scaled_dot_product_attention` runs for each head size and dtype: its choice, and the profiler's word.

    Sequence lengths are those of 512² (aligned) and of an odd latent size. It runs under the profiler, which itself
    takes device memory: never in a process that measures.
    """
    import torch
    from torch.nn.attention import SDPBackend
    from torch.profiler import ProfilerActivity, profile

    activity = ProfilerActivity.CUDA if device == "cuda" else ProfilerActivity.CPU
    found = []
    for dtype in ("float16", "bfloat16", "float32"):
        for head_dim in HEAD_DIMS:
            # a processor takes long, and shows the same with less
            for rows in (4096, 65 * 97) if device == "cuda" else (256, 9 * 11):
                heads = 1 if head_dim == 512 else 8
                shape = (1, heads, rows, head_dim)
                query, key, value = (torch.randn(shape, dtype=getattr(torch, dtype), device=device) for _ in range(3))
                torch.nn.functional.scaled_dot_product_attention(query, key, value)
                with profile(activities=[activity]) as profiler:
                    torch.nn.functional.scaled_dot_product_attention(query, key, value)
                    if device == "cuda":
                        torch.cuda.synchronize()
                names = list(dict.fromkeys(e.key[:160] for e in profiler.key_averages()))
                choice = SDPBackend(torch._fused_sdp_choice(query, key, value)).name.lower()
                found.append({"dtype": dtype, "head_dim": head_dim, "rows": rows, "choice": choice, "kernels": names})
    return found
