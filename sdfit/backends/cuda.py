"""The backend ``cuda``: run the pipeline on a card and read the allocator's counters at each stage boundary.

A worker lives long and must measure like a fresh process. What could make it differ, and what is done about it:

- Handles of cuBLAS and cuDNN, and whatever else stays after a kind of run was seen once: each variant is run once on a
  small image before its first workload.
- Memory that a run leaves behind: after each workload the allocator is settled and its bytes compared with those
  before; if they differ, the worker is tainted. Rebuilding the pipeline starts from an empty allocator.
- Plans of convolutions: cuDNN takes one with less workspace where the best did not fit, and PyTorch keeps it for that
  shape as long as the process lives. So a run that ran out of memory, or nearly did, makes the worker tainted; and a
  size that was tried under caps is refused afterwards.
- Errors that a context keeps: after any failure that is not understood the worker is tainted.

What other programs have on the card is read before, during and after each run: where it changes, the row says so
(`sdfit.records.Record.disturbed`), and a sweep measures it again.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from sdfit.backends.boundaries import watched
from sdfit.backends.capacity import STEP_BYTES, smallest_capacity
from sdfit.backends.counters import ANY_CARD, Counters, CudaCounters
from sdfit.backends.environment import software
from sdfit.backends.history import packed
from sdfit.backends.kernels import kernels_noted
from sdfit.backends.pipeline import ARCHITECTURE, build_pipeline, call_arguments, place, variant_applied
from sdfit.backends.quantised import in_int8, stored
from sdfit.backends.run import Run, is_out_of_memory
from sdfit.backends.schedulers import guidance_until, scheduler_of
from sdfit.equation.stages import COMPONENTS
from sdfit.equation.weights import rounded
from sdfit.errors import SdfitError
from sdfit.workload import STREAMED, VariantKey, Workload


class CudaBackend:
    """Runs workloads on a card.

    Parameters
    ----------
    gpu : str
        The card wanted; ``auto`` takes what is there.
    weights : str
        ``architecture``, a folder, or a Hub id (see `sdfit.backends.pipeline.build_pipeline`).
    num_inference_steps : int
        Denoising steps asked for; PNDM runs one more UNet call.
    capacity_bytes : int, optional
        Cap of what the process may reserve, context not included. None: all there is.
    bisect : bool
        Also bisect for ``required``, the smallest capacity of each workload that runs.
    histories : sequence of dict
        Workloads, as plain values, that are run once more after they were measured, with the allocator's history recorded:
        their results have a ``history``, the content of a file (`sdfit.backends.history`).
    scheduler : str, optional
        A name of `sdfit.backends.schedulers.SCHEDULERS`; None: the pipeline's own.
    guidance_share : float, optional
        End guidance after this share of the steps, 0 to 1; None: it lasts.
    warm_up_side : int
        Side of the image [pixels] on which each variant is run once before its first workload; 0: it is not. With
        tiling a quarter more, so that a tile of 512 is not all.
    seed : int
        Of the random weights.
    settings : dict, optional
        Other component settings, for tests.
    counters : callable
        ``counters(gpu)`` makes the `Counters` to read: the card's, or in tests those of another device.

    Raises
    ------
    DeviceError
        If the card asked for is not there.
    """

    def __init__(
        self,
        gpu: str = ANY_CARD,
        *,
        weights: str = ARCHITECTURE,
        num_inference_steps: int = 2,
        capacity_bytes: int | None = None,
        bisect: bool = False,
        histories: Sequence[Mapping[str, Any]] = (),
        scheduler: str | None = None,
        guidance_share: float | None = None,
        warm_up_side: int = 512,
        seed: int = 0,
        settings: dict[str, dict[str, Any]] | None = None,
        counters: Callable[[str], Counters] = CudaCounters,
    ) -> None:
        self.counters = counters(gpu)
        self.weights, self.num_inference_steps, self.capacity_bytes = weights, num_inference_steps, capacity_bytes
        self.bisect, self.warm_up_side, self.seed, self.settings = bisect, warm_up_side, seed, settings
        self.histories = frozenset(Workload.from_dict(values) for values in histories)
        self.scheduler, self.guidance_share = scheduler, guidance_share
        self.tainted = False
        self._facts = self.counters.facts()
        self._pipe: Any = None
        self._pipe_key: tuple[Any, ...] = ()
        self._component_bytes: dict[str, int] = {}
        self._warm: set[VariantKey] = set()
        self._baseline_bytes = 0
        self._capped: set[tuple[Any, ...]] = set()
        self._others_bytes = self._others()
        self.counters.cap(capacity_bytes)

    def environment(self) -> dict[str, Any]:
        """See `sdfit.backends.Backend.environment`."""
        return {
            **self._facts,
            "workspaces": None,
            "weights": self.weights,
            "weights_seed": self.seed,
            "capacity_bytes": self.capacity_bytes,
            "num_inference_steps": self.num_inference_steps,
            **software(),
        }

    def measure(self, workload: Workload) -> dict[str, Any]:
        """See `sdfit.backends.Backend.measure`.

        Raises
        ------
        SdfitError
            If this process cannot measure this workload as a fresh one would; it is then tainted.
        """
        try:
            return self._measured(workload)
        except BaseException:
            self.tainted = True  # nobody knows what it left behind
            raise

    def _measured(self, workload: Workload) -> dict[str, Any]:
        if _convolutions(workload) in self._capped:
            raise SdfitError("this process tried this size under caps before; a fresh one must measure it")
        pipe = self._prepared(workload)
        baseline = self.counters.allocated()
        if baseline != self._baseline_bytes:
            raise SdfitError(
                f"{baseline} B are allocated before the run, and {self._baseline_bytes} B were after the run before"
            )
        run = self._run(pipe, workload)
        self._settle(run, baseline)
        allocated = max(run.stage_peaks.values(), default=0)
        fields: dict[str, Any] = {
            "outcome": "oom" if run.failed else "ok",
            "stage_peaks_bytes": run.stage_peaks,
            "component_bytes": self._component_bytes,
            "allocated_bytes": allocated,
            "reserved_bytes": run.reserved_bytes,
            "device_bytes": run.device_bytes,
            "baseline_bytes": baseline,
            "retries": run.retries,
            "stage_s": {stage: round(seconds, 6) for stage, seconds in run.stage_s.items()},
            "attention_kernel": run.attention_kernel,
            "cap_bytes": self.capacity_bytes,
        }
        if run.failed:
            total = self._facts["total_memory_bytes"]
            fields |= {"oom_stage": run.stage, "oom_bytes": run.oom_bytes, "message": run.message}
            fields["cap_bytes"] = total if self.capacity_bytes is None else self.capacity_bytes
        elif workload in self.histories and not self.tainted:
            fields["history"] = self._history(pipe, workload, baseline)
        if self.bisect and not (run.failed or self.tainted):
            fields["required_bytes"] = self._smallest(pipe, workload, allocated, run.reserved_bytes)
        return fields | self._beside()

    def _beside(self) -> dict[str, int]:
        """What other programs had since the workload before, and by how much it changed [bytes]."""
        now = self._others()
        seen, self._others_bytes = self._others_bytes + now, now
        return {"others_bytes": max(seen), "others_change_bytes": max(seen) - min(seen)} if seen else {}

    def _others(self) -> list[int]:
        others = self.counters.others()
        return [] if others is None else [others]

    # -- one run --

    def _run(self, pipe: Any, workload: Workload) -> Run:
        run = Run(self.counters)
        steps, width = self.num_inference_steps, pipe.text_encoder.config.hidden_size
        beside = {} if self.guidance_share is None else guidance_until(self.guidance_share)
        troubles = self.counters.troubles()
        try:
            with (
                self.counters.watching(),
                variant_applied(pipe, workload),
                kernels_noted(pipe, run.kernels),
                watched(pipe, run.enter, streamed=workload.offload in STREAMED),
            ):
                arguments = call_arguments(
                    workload, num_inference_steps=steps, device=self.counters.device, width=width
                )
                pipe(**arguments, **beside)
                run.leave()
        except Exception as error:
            if not is_out_of_memory(error, self.counters.troubles()[1] - troubles[1]):
                raise
            run.fail(error)
        # a scheduler keeps what the UNet said last on the device: up to four latents of this run's size
        with self.counters.watching():
            pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
        self._others_bytes += run.others_bytes
        run.retries, run.failures = (now - then for now, then in zip(self.counters.troubles(), troubles, strict=True))
        return run

    def _settle(self, run: Run, baseline: int) -> None:
        """Bring the allocator back, and see whether the process can go on."""
        self.counters.settle()
        self._baseline_bytes = self.counters.allocated()
        # where a request failed and the run went on, a convolution went on with another plan
        self.tainted = self.tainted or run.failed or run.failures > 0 or self._baseline_bytes != baseline

    def _history(self, pipe: Any, workload: Workload, baseline: int) -> bytes | None:
        """Run it again and let the allocator write it down; the measured run stays free of what that costs."""
        with self.counters.recording() as snapshot:
            run = self._run(pipe, workload)
            content = None if run.failed else snapshot()
        self._settle(run, baseline)
        if content is None:
            return None
        about = {
            "workload": workload.to_dict(),
            "environment": self.environment(),
            "stage_peaks_bytes": run.stage_peaks,
        }
        return packed(content, about)

    def _smallest(self, pipe: Any, workload: Workload, allocated: int, reserved: int) -> int | None:
        """Bisect, with the same allocator state before each try; None if it could not be restored."""
        baseline = self._baseline_bytes

        def fits(capacity_bytes: int) -> bool:
            self.counters.cap(capacity_bytes)
            try:
                run = self._run(pipe, workload)
            finally:
                self.counters.cap(self.capacity_bytes)
            self.counters.settle()
            if self.counters.allocated() != baseline:
                raise _StateLost
            return not run.failed

        self._capped.add(_convolutions(workload))
        try:
            return smallest_capacity(fits, allocated, reserved, step_bytes=STEP_BYTES)
        except _StateLost:
            self.tainted = True
            return None

    # -- the pipeline --

    def _prepared(self, workload: Workload) -> Any:
        """The workload's pipeline, its variant warmed up, the allocator settled."""
        key = (workload.dtype, workload.vae, workload.safety_checker, workload.offload, workload.execution)
        if key != self._pipe_key:
            self._drop()
            self._build(workload)
            self._pipe_key = key
        if self.warm_up_side and workload.variant not in self._warm:
            side = self.warm_up_side * 5 // 4 if workload.vae_tiling else self.warm_up_side
            batch = 2 if workload.vae_slicing else 1
            small = replace(workload, height=side, width=side, prompt_length=77, batch_size=batch)
            if not self._run(self._pipe, small).failed:  # else the workload itself will say so
                self._warm.add(workload.variant)
            self.counters.settle()
            gc.freeze()  # the pipeline's hundred thousand objects need no look at each collection
            self._baseline_bytes = self.counters.allocated()
            self._others_bytes = self._others()  # the context has grown by the kernels of this variant
        return self._pipe

    def _build(self, workload: Workload) -> None:
        with self.counters.watching():
            self._pipe = build_pipeline(
                self.weights,
                dtype=workload.dtype,
                device=self.counters.device,
                vae=workload.vae,
                safety_checker=workload.safety_checker,
                seed=self.seed,
                settings=self.settings,
            )
            if workload.execution == "int8":
                in_int8(self._pipe.unet)
            self._component_bytes = component_bytes(self._pipe)
            if self.scheduler is not None:
                self._pipe.scheduler = scheduler_of(self.scheduler, self._pipe.scheduler.config)
            place(self._pipe, workload, self.counters.device)
        self.counters.settle()
        self._baseline_bytes = self.counters.allocated()

    def _drop(self) -> None:
        """Let the pipeline go, and all that libraries keep, so that the next one finds an empty allocator."""
        if self._pipe is None:
            return
        self._pipe.remove_all_hooks()
        self._pipe, self._pipe_key = None, ()
        self._warm.clear()
        gc.unfreeze()
        self.counters.forget()
        self.counters.settle()
        left = self.counters.allocated()
        if left:
            raise SdfitError(
                f"{left} B stay allocated after the pipeline before; a fresh process must measure this one"
            )


class _StateLost(Exception):
    """A try under a cap left memory behind."""


def component_bytes(pipe: Any) -> dict[str, int]:
    """Bytes of each component's parameters and buffers, every tensor rounded up as the allocator rounds it."""
    parts = {name: getattr(pipe, name) for name in COMPONENTS if getattr(pipe, name) is not None}
    return {name: sum(rounded(t.untyped_storage().nbytes()) for t in stored(part)) for name, part in parts.items()}


def _convolutions(workload: Workload) -> tuple[Any, ...]:
    """What two workloads share if they may share a convolution's plan: more coarse than the plans' own key."""
    return (workload.dtype, workload.vae, workload.effective_height, workload.effective_width)
