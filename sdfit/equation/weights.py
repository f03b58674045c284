"""What the components of Stable Diffusion v1.5 weigh: parameter counts, and the bytes they take in each dtype.

The one place for these numbers; the settings that give rise to them stand in `sdfit.backends.pipeline`.
"""

from __future__ import annotations

from sdfit.workload import DTYPE_BYTES, Workload

PARAMETERS = {
    "unet": 859_520_964,
    "vae": 83_653_863,
    "vae_tiny": 2_445_063,
    "text_encoder": 123_060_480,
    "safety_checker": 303_981_588,
}
"""Parameters of each component.

Source: counted on diffusers' own classes built from the settings of stable-diffusion-v1-5/stable-diffusion-v1-5
(`UNet2DConditionModel`, `AutoencoderKL`, `AutoencoderTiny`, `CLIPTextModel`, `StableDiffusionSafetyChecker`). Buffers
(position ids, a few kB) are not parameters and are not counted, nor is the allocator's rounding.
"""
COMPONENT_BYTES = {
    dtype: {name: count * size for name, count in PARAMETERS.items()} for dtype, size in DTYPE_BYTES.items()
}
"""Bytes of the weights by dtype and component."""


def component_bytes(workload: Workload) -> dict[str, int]:
    """List the weights that a workload's pipeline holds, by component [bytes].

    Parameters
    ----------
    workload : Workload
        ``dtype``, ``vae`` and ``safety_checker`` matter.

    Returns
    -------
    dict of str to int
        In the order unet, vae, text_encoder, safety_checker (the last only where the workload has it).

    Examples
    --------
    >>> component_bytes(Workload(512, 512, vae="tiny", safety_checker=False))
    {'unet': 1719041928, 'vae': 4890126, 'text_encoder': 246120960}
    """
    sizes = COMPONENT_BYTES[workload.dtype]
    parts = {
        "unet": sizes["unet"],
        "vae": sizes["vae" if workload.vae == "kl" else "vae_tiny"],
        "text_encoder": sizes["text_encoder"],
    }
    if workload.safety_checker:
        parts["safety_checker"] = sizes["safety_checker"]
    return parts


def weights_bytes(workload: Workload) -> int:
    """Add up the weights of every component of a workload's pipeline [bytes].

    Where they are is not its concern: with ``offload="model"`` the card holds one component at a time.

    Examples
    --------
    >>> weights_bytes(Workload(512, 512, safety_checker=False))
    2132470614
    >>> weights_bytes(Workload(512, 512))
    2740433790
    """
    return sum(component_bytes(workload).values())
