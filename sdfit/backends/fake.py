"""A made-up card whose coefficients are known: the world in which sweep, fit and f() are tested.

It takes no time, runs out of memory where its capacity says so, and can be told to crash. Its numbers are invented;
they resemble a card, and no more.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sdfit.equation.stages import UNET_STAGES, resident, stage_key, stages_of
from sdfit.equation.terms import design_of, terms_of
from sdfit.equation.weights import component_bytes
from sdfit.errors import DeviceError
from sdfit.files import fingerprint
from sdfit.units import GIB
from sdfit.workload import DTYPE_BYTES, Workload

COEFFICIENTS: dict[str, dict[str, float]] = {
    "text_encoder": {"1": 9_000_000, "n": 400_000, "n·L": 1536},
    "vae_encoder_blocks": {"1": 9_000_000, "m·P": 1290.0, "m": 20_000, "n·L": 1536, "B·A": 2.0, "D": 8.0},
    "vae_encoder_mid": {"1": 9_000_000, "m·P": 140.0, "m": 20_000, "n·L": 1536, "B·A": 2.0, "D": 8.0},
    "unet": {"1": 12_000_000, "n·A": 260.0, "n": 300_000, "n·L": 1600, "n·L·A": 0.0},
    "unet_deep": {"1": 90_000_000, "n·A": 60.0, "n": 300_000, "n·L": 1600, "n·L·A": 0.0},
    "vae_decoder_mid": {"1": 9_000_000, "m·P": 140.0, "m": 20_000, "n·L": 1536, "B·A": 2.0, "D": 8.0},
    "vae_decoder_blocks": {"1": 9_000_000, "m·P": 2433.0, "m": 20_000, "n·L": 1536, "B·A": 2.0, "D": 8.0},
    "safety_checker": {"1": 9_000_000, "B": 3_000_000, "B·A": 24.0, "n·L": 1536},
}
"""Bytes per unit of each term, for 16 bits and fused attention; materialised attention adds the terms below."""
SCORES = {"eager": ("n·A²", 0.0078125), "math": ("n·A²", 0.015625), "sliced": ("A²", 0.0078125)}
CONTEXT_BYTES = 300 << 20


def true_coefficients(workload: Workload, stage: str) -> dict[str, float]:
    """The coefficients that a fit should give back for a stage of a workload's variant."""
    scale = DTYPE_BYTES[workload.dtype] / 2
    known = dict(COEFFICIENTS[stage])
    if stage in UNET_STAGES and workload.attention in SCORES:
        name, value = SCORES[workload.attention]
        known[name] = value
        known["n·L·A"] = 0.02
    if stage.endswith("_mid") and workload.attention in ("eager", "math"):
        known["m·P²"] = 2 * SCORES[workload.attention][1] / 16
    names = terms_of(stage_key(stage, workload.variant))
    return {name: known.get(name, 0.0) * scale for name in names}


class FakeBackend:
    """A card that computes its peaks from `true_coefficients`.

    Parameters
    ----------
    gpu : str
        The name that it goes by.
    capacity_bytes : int
        A run whose ``required_bytes`` is more runs out of memory.
    noise : float
        Relative, uniform within ±noise, the same for the same workload: misfit that no term explains.
    delay_s : float
        Time that a workload takes.
    crash_batch_size : int
        A workload of this batch size kills the process.
    hang_after : int, optional
        The card answers so many workloads of a process and never the next one.
    disturbed_runs : int
        During so many workloads of a process, its first, another program takes a GiB of the card.
    gone : str, optional
        A file, ``{card}`` in its name being CUDA_VISIBLE_DEVICES: while it is there the card is not, and each process that
        asks for the card takes a byte off it, until it is empty and the card is back. The process that has the card finds
        out in the middle of its workload.
    cards : sequence of str
        Names of the cards in its machine; it is the one that CUDA_VISIBLE_DEVICES shows, and ``gpu`` which is wanted.
    """

    def __init__(
        self,
        gpu: str = "fake",
        *,
        capacity_bytes: int = 140 << 30,
        noise: float = 0.0,
        delay_s: float = 0.0,
        crash_batch_size: int = 0,
        hang_after: int | None = None,
        disturbed_runs: int = 0,
        gone: str | None = None,
        num_inference_steps: int = 2,
        cards: Sequence[str] = (),
    ) -> None:
        self._gone = None if gone is None else Path(gone.format(card=os.environ.get("CUDA_VISIBLE_DEVICES", "")))
        if self._gone and self._gone.exists():
            left = self._gone.read_bytes()[1:]
            if left:
                self._gone.write_bytes(left)
            else:
                self._gone.unlink()
            raise RuntimeError("CUDA error: no CUDA-capable device is detected")
        if cards:
            there = cards[int(os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0])]
            if gpu not in ("auto", "fake", there):
                raise DeviceError(f"the card asked for is '{gpu}', and there is '{there}'; type --gpu {there}")
            gpu = there
        self.gpu, self.capacity_bytes, self.noise = gpu, capacity_bytes, noise
        self.delay_s, self.crash_batch_size, self.num_inference_steps = delay_s, crash_batch_size, num_inference_steps
        self.tainted, self._left, self._disturbed = False, hang_after, disturbed_runs

    def environment(self) -> dict[str, Any]:
        """A made-up card in a made-up environment."""
        return {
            "backend": "fake",
            "gpu": f"made-up card '{self.gpu}'",
            "name": self.gpu,
            "total_memory_bytes": self.capacity_bytes,
            "num_inference_steps": self.num_inference_steps,
        }

    def stage_peaks(self, workload: Workload) -> dict[str, int]:
        """The true peak of each stage [bytes]."""
        components = component_bytes(workload)
        peaks = {}
        for stage in stages_of(workload.variant):
            key = stage_key(stage, workload.variant)
            known = true_coefficients(workload, stage)
            activation = float(design_of(key, [workload])[0] @ [known[name] for name in terms_of(key)])
            random_part = random.Random(fingerprint([workload.to_dict(), stage])).uniform(-self.noise, self.noise)
            weights = sum(components.get(c, 0) for c in resident(stage, workload.offload))
            peaks[stage] = weights + round(activation * (1 + random_part))
        return peaks

    def measure(self, workload: Workload) -> dict[str, Any]:
        """See `sdfit.backends.Backend.measure`."""
        time.sleep(self.delay_s)
        if self._gone and self._gone.exists():
            self.tainted = True
            raise RuntimeError("CUDA error: device is busy or unavailable")
        if self._left is not None:
            while not self._left:
                time.sleep(3600)
            self._left -= 1
        if workload.batch_size == self.crash_batch_size:
            os._exit(9)
        peaks = self.stage_peaks(workload)
        components = component_bytes(workload)
        common = {"component_bytes": components, "baseline_bytes": sum(components.values()), "retries": 0}
        if self._disturbed:
            self._disturbed -= 1
            common |= {"others_bytes": GIB, "others_change_bytes": GIB}
        reached: dict[str, int] = {}
        weights = sum(components.values())
        for stage, peak in peaks.items():
            if peak + max(peak - weights, 0) // 10 > self.capacity_bytes:  # what `required_bytes` says below
                last = min(peak, self.capacity_bytes)
                return {
                    **common,
                    "outcome": "oom",
                    "stage_peaks_bytes": reached | {stage: last},
                    "allocated_bytes": max(last, *reached.values()) if reached else last,
                    "oom_bytes": last,
                    "oom_stage": stage,
                    "cap_bytes": self.capacity_bytes,
                }
            reached[stage] = peak
        top = max(peaks.values())
        activation = top - weights
        reserved = top + max(activation, 0) // 2
        return {
            **common,
            "outcome": "ok",
            "stage_peaks_bytes": peaks,
            "stage_s": dict.fromkeys(peaks, 0.0),
            "allocated_bytes": top,
            "reserved_bytes": reserved,
            "device_bytes": reserved + CONTEXT_BYTES,
            "required_bytes": top + max(activation, 0) // 10,
            "minimum_bytes": top - max(activation, 0) // 5,
        }
