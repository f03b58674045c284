"""What a call may bring along that is no field of a `Workload`: another scheduler, and guidance that ends early."""

from __future__ import annotations

from typing import Any

from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)

from sdfit.errors import InvalidWorkload, nearest

SCHEDULERS: dict[str, Any] = {
    "pndm": PNDMScheduler,
    "ddim": DDIMScheduler,
    "euler_ancestral": EulerAncestralDiscreteScheduler,
    "dpmpp_2m": DPMSolverMultistepScheduler,
    "unipc": UniPCMultistepScheduler,
    "lcm": LCMScheduler,
}
"""diffusers' schedulers by short names; the checkpoint's own comes first."""


def scheduler_of(name: str, config: Any) -> Any:
    """A scheduler of `SCHEDULERS`, fresh.

    Raises
    ------
    InvalidWorkload
        If there is none of that name.
    """
    if name not in SCHEDULERS:
        raise InvalidWorkload(f"there is no scheduler '{name}'{nearest(name, tuple(SCHEDULERS))}", given=name)
    return SCHEDULERS[name].from_config(config)


def guidance_until(share: float) -> dict[str, Any]:
    """Arguments of a call that end classifier-free guidance after a share of the steps: the UNet's batch halves from there.

    diffusers' own recipe ("dynamic classifier-free guidance"), through ``callback_on_step_end``; a call without guidance stays
    as it is.
    """

    def cut(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if step == int(pipe.num_timesteps * share) and pipe.do_classifier_free_guidance:
            pipe._guidance_scale = 0.0
            tensors["prompt_embeds"] = tensors["prompt_embeds"].chunk(2)[-1]
        return tensors

    return {"callback_on_step_end": cut, "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"]}
