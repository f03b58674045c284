"""Trace a workload without a card: the same pipeline on meta tensors.

diffusers' unmodified `StableDiffusionImg2ImgPipeline.__call__` runs on tensors that have a shape and no storage,
while `sdfit.backends.trace.follow` counts what is live. Two host-side parts are replaced because they need values: the image processor
(its device work is kept, its conversion to and from pictures is not) and the scheduler's timesteps stay in host memory.

What a trace cannot see: memory inside kernels. What is known of it comes in through ``workspace``.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
from diffusers import StableDiffusionPipeline
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from sdfit.backends.boundaries import watched
from sdfit.backends.pipeline import build_pipeline, call_arguments, variant_applied
from sdfit.backends.quantised import in_int8, stored
from sdfit.backends.schedulers import scheduler_of
from sdfit.backends.trace.follow import AsOnACard, FollowStorages, Operation
from sdfit.backends.trace.repeats import skipped
from sdfit.backends.trace.streaming import streamed
from sdfit.equation.stages import COMPONENTS
from sdfit.equation.weights import rounded
from sdfit.errors import InvalidWorkload, nearest
from sdfit.predict.simulation.card import Card, Traced
from sdfit.predict.simulation.meter import Meter
from sdfit.predict.simulation.simulate import uncollected
from sdfit.workload import STREAMED, VAE_SCALE, Workload

TASKS = ("img2img", "txt2img", "vae_encode", "vae_decode")
"""What can be traced; the last three are there to compare with published measurements of them."""

Workspace = Callable[[Workload, Any, tuple[Any, ...], Any], int]
"""``workspace(workload, func, args, out) -> bytes`` that a kernel holds while it runs."""


def scheduled(name: str, config: Any) -> Any:
    """A scheduler of `sdfit.backends.schedulers.SCHEDULERS`, fresh, with its timesteps in host memory, where they have values."""
    scheduler = scheduler_of(name, config)
    set_timesteps = scheduler.set_timesteps

    def on_the_host(num_inference_steps: int, device: Any = None, **kwargs: Any) -> None:
        set_timesteps(num_inference_steps, device="cpu", **kwargs)

    scheduler.set_timesteps = on_the_host
    return scheduler


class ShapesOnly(VaeImageProcessor):
    """diffusers' image processor without the pictures: shapes in, shapes out, the device work in between."""

    def preprocess(self, image: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Give the host tensor that `VaeImageProcessor.preprocess` makes of PIL images, without its values."""
        height, width = self.get_default_height_width(image[0])
        return torch.zeros(()).expand(len(image), 3, height, width)

    @staticmethod
    def pt_to_numpy(images: torch.Tensor) -> Any:
        """Leave the device as one black pixel per image: what follows is host memory."""
        return torch.zeros(images.shape[0], 1, 1, 3).numpy()

    @staticmethod
    def numpy_to_pil(images: Any) -> Any:
        """One small picture per image."""
        return [Image.new("RGB", (8, 8))] * len(images)


class Tracer:
    """Traces workloads; keeps the meta pipelines it has built.

    Parameters
    ----------
    workspace : callable, optional
        Kernel workspaces to add, see `Workspace`. None: the bare trace.
    num_inference_steps : int
        Steps of the denoising loop; two reach the peak, as PNDM runs them (three UNet calls).
    settings : dict, optional
        Other component settings, for tests (see `sdfit.backends.pipeline.build_components`).
    """

    def __init__(
        self,
        workspace: Workspace | None = None,
        *,
        num_inference_steps: int = 2,
        settings: dict[str, dict[str, Any]] | None = None,
    ) -> None:
        self.workspace, self.num_inference_steps, self.settings = workspace, num_inference_steps, settings
        self._pipes: dict[tuple[str, str, bool, bool], Any] = {}
        self._weights: dict[int, dict[str, _Weights]] = {}
        self._unsplit: dict[int, dict[tuple[str, ...], int]] = {}

    def pipeline(self, workload: Workload) -> Any:
        """The meta pipeline that a workload runs on."""
        key = (workload.dtype, workload.vae, workload.safety_checker, workload.execution == "int8")
        if key not in self._pipes:
            dtype, vae, checker, int8 = key
            pipe = build_pipeline(dtype=dtype, device="meta", vae=vae, safety_checker=checker, settings=self.settings)
            if int8:
                in_int8(pipe.unet)
            pipe.image_processor = ShapesOnly(**pipe.image_processor.config)
            self._pipes[key] = pipe
            self._weights[id(pipe)] = {
                n: _Weights(getattr(pipe, n)) for n in COMPONENTS if getattr(pipe, n) is not None
            }
        return self._pipes[key]

    def weights(self, workload: Workload) -> list[torch.Tensor]:
        """The weights and buffers of all components of the pipeline that a workload runs on."""
        return [tensor for part in self._weights[id(self.pipeline(workload))].values() for tensor in part.tensors]

    def run(
        self,
        workload: Workload,
        *,
        task: str = "img2img",
        keep_events: bool = False,
        observe: Callable[[Meter], Operation] | None = None,
        full: bool = False,
        scheduler: str = "pndm",
        num_inference_steps: int | None = None,
        call: Mapping[str, Any] | None = None,
        around: Callable[[FollowStorages], AbstractContextManager[Any]] | None = None,
    ) -> Traced:
        """Trace one workload.

        Parameters
        ----------
        task : {'img2img', 'txt2img', 'vae_encode', 'vae_decode'}
            ``txt2img``: `StableDiffusionPipeline` of the same components. The last two: only the VAE is there, and
            one image tensor is encoded and sampled, or one latent tensor decoded.
        keep_events : bool
            Also return every allocation and free of a block, for the allocator replay. The weights come first.
        observe : callable, optional
            ``observe(meter)`` gives a function that is called after each operation.
        full : bool
            Run every denoising step, slice and tile, though repeats add nothing new (see `sdfit.backends.trace.repeats`).
        scheduler : str
            A name of `sdfit.backends.schedulers.SCHEDULERS`.
        num_inference_steps : int, optional
            Of this run; None: the tracer's own.
        call : mapping, optional
            Further arguments of the pipeline's call, such as ``strength`` and ``callback_on_step_end``.
        around : callable, optional
            ``around(follow)`` gives a context to run in, such as `sdfit.backends.trace.playing.Known.playing`.
        """
        if task not in TASKS:
            raise InvalidWorkload(f"there is no task '{task}'{nearest(task, TASKS)}", given=task)
        pipe = self.pipeline(workload)
        # a scheduler keeps tensors of its last run, and moves its table to the device once
        pipe.scheduler = scheduled(scheduler, pipe.scheduler.config)
        steps = self.num_inference_steps if num_inference_steps is None else num_inference_steps
        meter = Meter(keep_events=keep_events)
        parts = COMPONENTS if task in ("img2img", "txt2img") else ("vae",)
        weights = {name: part for name, part in self._weights[id(pipe)].items() if name in parts}
        sizes = {name: part.sizes for name, part in weights.items()}
        scratch = None
        if self.workspace is not None:
            workspace = self.workspace

            def scratch(func: Any, args: tuple[Any, ...], out: Any) -> int:
                return workspace(workload, func, args, out)

        follow = FollowStorages(meter, workspace=scratch, after=observe(meter) if observe else None)
        for part in weights.values():
            for tensor in part.tensors:  # never freed, so they are counted here and only known to the mode
                follow.ignore(tensor)
        card = Card(
            meter,
            sizes,
            offload=workload.offload,
            standing_bytes=getattr(self.workspace, "standing_bytes", 0),
            encodes=task != "txt2img",
            unsplit=self._unsplit.setdefault(id(pipe), {}),
        )
        seconds: dict[str, float] = {}
        since: list[Any] = ["", time.perf_counter()]

        def enter(stage: str) -> None:
            now = time.perf_counter()
            if since[0]:
                seconds[since[0]] = seconds.get(since[0], 0.0) + now - since[1]
            since[:] = [stage, now]
            if stage:
                card.enter(stage)

        as_on_a_card = AsOnACard("math" if workload.attention == "math" else "fused")
        repeats = nullcontext() if full else skipped(pipe, follow)
        # frees must not depend on when Python happens to collect
        streams = streamed(pipe, workload.offload, follow) if workload.offload in STREAMED else nullcontext()
        # the pipeline would look through all modules for hooks of an offload, six times a run
        placed = patch.object(type(pipe), "_execution_device", torch.device("meta"))
        with uncollected(), _no_warnings(), placed, variant_applied(pipe, workload), as_on_a_card:
            own = nullcontext() if around is None else around(follow)
            with streams as buffers, watched(pipe, enter, streamed=workload.offload in STREAMED), own, repeats, follow:
                _RUN[task](pipe, workload, steps, call or {})
                enter("")
                meter.leave()
            events = None if meter.events is None else list(meter.events)  # what outlives the run is no part of it
        return card.taken(events, seconds, buffers=buffers or 0)


def _img2img(pipe: Any, workload: Workload, steps: int, call: Mapping[str, Any]) -> None:
    width = pipe.text_encoder.config.hidden_size
    pipe(**(call_arguments(workload, num_inference_steps=steps, device="meta", width=width, mode="1") | dict(call)))


def _txt2img(pipe: Any, workload: Workload, steps: int, call: Mapping[str, Any]) -> None:
    width = pipe.text_encoder.config.hidden_size
    arguments = call_arguments(workload, num_inference_steps=steps, device="meta", width=width, mode="1")
    del arguments["image"], arguments["strength"]
    other = StableDiffusionPipeline(**pipe.components, requires_safety_checker=pipe.safety_checker is not None)
    other.image_processor = pipe.image_processor
    other.set_progress_bar_config(disable=True)
    other(**arguments, **call, height=workload.effective_height, width=workload.effective_width)


def _vae_encode(pipe: Any, workload: Workload, steps: int, call: Mapping[str, Any]) -> None:
    shape = (workload.batch_size, 3, workload.effective_height, workload.effective_width)
    with torch.no_grad():
        pipe.vae.encode(torch.empty(shape, dtype=pipe.vae.dtype, device="meta")).latent_dist.sample()


def _vae_decode(pipe: Any, workload: Workload, steps: int, call: Mapping[str, Any]) -> None:
    sides = (workload.effective_height // VAE_SCALE, workload.effective_width // VAE_SCALE)
    shape = (workload.batch_size, pipe.vae.config.latent_channels, *sides)
    with torch.no_grad():
        pipe.vae.decode(torch.empty(shape, dtype=pipe.vae.dtype, device="meta"), return_dict=False)


_RUN = {"img2img": _img2img, "txt2img": _txt2img, "vae_encode": _vae_encode, "vae_decode": _vae_decode}


class _Weights:
    """The weights and buffers of a component, and their sizes as the allocator rounds them [bytes]."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.tensors = list(stored(module))
        self.sizes = [rounded(tensor.untyped_storage().nbytes()) for tensor in self.tensors]


@contextmanager
def _no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
