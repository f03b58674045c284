"""What other systems would set aside for the same run: one function per system, a Workload to bytes for the whole run.

Each function is that system's own arithmetic, read from its source, for a Stable Diffusion v1.5 img2img call that
keeps everything on the card. Symbols: A latent pixels of one image (H·W/64), B images, n samples per UNet call, e bytes
per element. The systems that load no safety checker are not charged for one. None of these numbers was made for
diffusers' pipeline; what each leaves out stands beside it in `PEERS`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from sdfit.equation.weights import weights_bytes
from sdfit.errors import UnknownModel, nearest
from sdfit.units import GIB, MIB
from sdfit.workload import DTYPE_BYTES, VAE_SCALE, Workload

COMFYUI_RESERVED_BYTES = 400 * MIB
"""``EXTRA_RESERVED_VRAM`` on Linux."""
TILE_AREA = 512 * 512
"""One VAE tile: ``tile_sample_min_size`` of this VAE is 512."""
HEADS = 8
"""Attention heads of the UNet, at every resolution."""


def _latent_pixels(w: Workload) -> int:
    return w.pixels // VAE_SCALE**2


def _fused(w: Workload) -> bool:
    # these systems ask whether attention goes through PyTorch's own function, not which kernel it picks
    return w.attention in ("sdpa", "math")


def _model_bytes(w: Workload) -> int:
    return weights_bytes(replace(w, safety_checker=False))


def comfyui_bytes(workload: Workload) -> int:
    """Size the run as ComfyUI does before it loads a model [bytes].

    ``1.1·weights + max(0.8 GiB + R, need + R)`` with R = 400 MiB; need is the largest of the UNet, 2B·A·e·0.01 MiB with
    PyTorch or xformers attention and 2B·A·0.15 MiB otherwise, the VAE decode, 2178·H·W·e, and its encode, 1767·H·W·e.
    The UNet's batch is 2B even without guidance. The VAE is sized for one image: a batch is cut into what fits.

    Source: `memory_required` in comfy/model_base.py, `load_models_gpu` and `minimum_inference_memory` in
    comfy/model_management.py, `_prepare_sampling` in comfy/sampler_helpers.py, `memory_used_decode` in comfy/sd.py
    (SD15's ``memory_usage_factor`` is 1.0), all of comfyanonymous/ComfyUI.

    Examples
    --------
    >>> comfyui_bytes(Workload(512, 512))
    3907047339
    """
    e, area = DTYPE_BYTES[workload.dtype], 2 * workload.batch_size * _latent_pixels(workload)
    unet = area * (0.01 * e if _fused(workload) else 0.15) * MIB
    need = max(unet, 2178 * workload.pixels * e, 1767 * workload.pixels * e)
    extra = COMFYUI_RESERVED_BYTES + max(0.8 * GIB, need)
    return int(1.1 * _model_bytes(workload) + extra)


def forge_bytes(workload: Workload) -> int:
    """Size the run as Stable Diffusion WebUI Forge does before it loads a model [bytes].

    ``1.3·weights + max(1 GiB, need)``; the UNet needs 1.28·2B·A·e·16384 with PyTorch or xformers attention, otherwise
    1.65·2B·A·4·16384 (its attention is upcast to float32 by default); the VAE as in ComfyUI, and nothing when tiled.

    Source: lllyasviel/stable-diffusion-webui-forge, in backend/: `memory_required` in modules/k_model.py,
    `sampling_prepare` in sampling/sampling_function.py, `load_models_gpu` in memory_management.py, `VAE` in
    patcher/vae.py, `get_attn_precision` in attention.py.

    Examples
    --------
    >>> forge_bytes(Workload(512, 512))
    3914111062
    """
    e, area = DTYPE_BYTES[workload.dtype], 2 * workload.batch_size * _latent_pixels(workload)
    unet = area * 16384 * (1.28 * e if _fused(workload) else 1.65 * 4)
    vae = 0 if workload.vae_tiling else 2178 * workload.pixels * e
    return int(1.3 * _model_bytes(workload) + max(GIB, unet, vae))


def invokeai_bytes(workload: Workload) -> int:
    """Size the run as InvokeAI's model cache does [bytes].

    ``weights + max(3 GiB, VAE)``: 3 GiB is ``device_working_mem_gb``, which also stands for the UNet. The VAE decode is
    2200·H·W·e of one image, or 1.25·2200·512²·e when tiled; where attention is materialised, 17·A² if that is more
    (of one tile when tiled); 250 MiB on top in float32. The encode (1100) never exceeds the decode.

    Source: `estimate_vae_working_memory_sd15_sdxl` in invokeai/backend/util/vae_working_memory.py,
    `SDPA_MATH_BYTES_PER_SCORE_ELEMENT` in invokeai/backend/util/attention.py, `_get_vram_available` in
    invokeai/backend/model_manager/load/model_cache/model_cache.py, all of invoke-ai/InvokeAI (2026; earlier versions
    have no attention term). The 3 GB default is in its documentation of low-VRAM mode.

    Examples
    --------
    >>> invokeai_bytes(Workload(512, 512))
    5353696086
    """
    e = DTYPE_BYTES[workload.dtype]
    pixels, margin = (TILE_AREA, 1.25) if workload.vae_tiling else (workload.pixels, 1.0)
    vae = 2200 * pixels * e * margin
    if workload.attention != "sdpa":
        vae = max(vae, 17 * (pixels // VAE_SCALE**2) ** 2)
    if e == 4:
        vae += 250 * MIB
    return int(_model_bytes(workload) + max(3 * GIB, vae))


def split_attention_bytes(workload: Workload) -> int:
    """Size the run as A1111's split attention (Doggettx) does: the weights and the attention scores [bytes].

    ``weights + 8·n·A²·e·m``, m = 3 in 16 bits and 2.5 in 32: what it wants free before it computes the first
    self-attention of the UNet in one piece.

    Source: `split_cross_attention_forward` in modules/sd_hijack_optimizations.py of
    AUTOMATIC1111/stable-diffusion-webui.

    Examples
    --------
    >>> split_attention_bytes(Workload(512, 512, attention="eager"))
    3743083350
    """
    e = DTYPE_BYTES[workload.dtype]
    modifier = 3 if e == 2 else 2.5
    scores = HEADS * workload.unet_batch * _latent_pixels(workload) ** 2 * e
    return int(_model_bytes(workload) + scores * modifier)


def gguf_parser_bytes(workload: Workload) -> int:
    """Size the run as gguf-parser does for SD 1.x on stable-diffusion.cpp: the memory of the GPU [bytes].

    A sum over stages: weights + 2·768·77·4 (text) + the regression 7876368.57 + 161.423·H·W + 0.00781249·(H·W)² (UNet;
    one image, no guidance, float32 scores, the same with flash attention) + 6656·H·W (VAE decode; 512² when tiled).
    Its 100 MiB of work context is host memory, so it is not counted here.

    Source: `EstimateStableDiffusionCppRun` in file_estimate__stablediffusioncpp.go and
    `GuessSD1DiffusionModelMemoryUsage` in zz_generated.diffusion_model_memory_usage.regression.go of
    gpustack/gguf-parser-go.

    Examples
    --------
    >>> gguf_parser_bytes(Workload(512, 512))
    4464836790
    """
    area = workload.pixels
    unet = int(7.8763685671743e06 + 161.42301986333496 * area + 0.007812489338703485 * area**2)
    decode = 6656 * (TILE_AREA if workload.vae_tiling else area)
    return _model_bytes(workload) + 2 * 768 * 77 * 4 + unet + decode


def accelerate_bytes(workload: Workload) -> int:
    """Size the run as ``accelerate estimate-memory`` advises: 1.2 x the weights of every component [bytes].

    The command itself refuses diffusers pipelines (it takes transformers and timm); this is its rule applied by hand,
    as the Space diffusers/compute-pipeline-size does.

    Source: `gather_data` in src/accelerate/commands/estimate.py of huggingface/accelerate; the 20 % is in the advice
    that goes with it (blog.eleuther.ai/transformer-math).

    Examples
    --------
    >>> accelerate_bytes(Workload(512, 512))
    3288520548
    """
    return int(1.2 * weights_bytes(workload))


def hand_derivation_a_bytes(workload: Workload) -> int:
    """Size the run by circulating hand derivation A: materialised attention scores dominate [bytes].

    ``2.23e9 + 1.1·max(UNet, VAE)``. UNet, in 2-byte elements with n samples: 4·n·A latents, 77·768·n text, 3·512·n·A
    query, key and value, 8·n·A² scores, 8·77·n·A cross-attention, 1280·n·A features, 2·256·n·A skips. VAE:
    512·B·(H/2)·(W/2). This reading gives back the source's own printed 39.96 GiB at 1200x1800 (n = 2) where 9.06 GiB
    were measured, +341 %, and its 2.29, 3.61 and 143.94 GiB at 380x396, 534x800 and 2048².

    Source: cell 3 of task.ipynb of dheepakshakthi/vRam_estimation_for_diffusion_model.

    Examples
    --------
    >>> round(hand_derivation_a_bytes(Workload(1200, 1800)) / 2**30, 2)
    39.96
    """
    n, area = workload.unet_batch, (workload.height // VAE_SCALE) * (workload.width // VAE_SCALE)
    # latents, text, q k v, scores, cross-attention, features, skips: in elements
    linear = 4 + 3 * 512 + HEADS * 77 + 1280 + 2 * 256
    per_sample = linear * area + 77 * 768 + HEADS * area**2
    vae = 2 * workload.batch_size * 512 * (workload.height // 2) * (workload.width // 2)
    return int((860_000_000 + 132_000_000 + 123_000_000) * 2 + 1.1 * max(2 * n * per_sample, vae))


def hand_derivation_b_bytes(workload: Workload) -> int:
    """Size the run by circulating hand derivation B: average channel counts [bytes].

    ``1.2·(weights + max(A·(4470 + 2L), 24·H·W + 8·A))`` with L the tokens of the prompt, unpadded; 4470 = 745 channels
    · 2 bytes · 3. This reading errs by -18 % on the published T4 row at 380x396, -32 % at 534x800, -72 % at 1200x1800,
    and by -77.5 % at 2048² against the 12.09 GiB that the notebook of derivation A measured on a T4.

    Source: `f` in main.py of Vishnu373/stable-diffusion-vram-calculator.

    Examples
    --------
    >>> hand_derivation_b_bytes(Workload(380, 396))
    2571743623
    """
    area = (workload.height // VAE_SCALE) * (workload.width // VAE_SCALE)
    unet = area * (745 * 2 * 3 + 2 * workload.prompt_length)
    vae = 4 * (3 * 2 * workload.height * workload.width) + 4 * 2 * area
    return int(1.2 * (_model_bytes(workload) + max(unet, vae)))


@dataclass(frozen=True, slots=True)
class Peer:
    """A system that can be compared with.

    Parameters
    ----------
    name : str
        Short name, as typed.
    title : str
        As it is printed.
    predict : callable
        Workload to bytes for the whole run.
    applies : callable
        Workload to bool: whether the system has a formula for such a run at all.
    applies_to : str
        The same in words.
    leaves_out : str
    source : str
        Repository, or where it was published.
    """

    name: str
    title: str
    predict: Callable[[Workload], int]
    applies: Callable[[Workload], bool]
    applies_to: str
    leaves_out: str
    source: str


def _resident(w: Workload) -> bool:
    return w.offload == "none" and w.vae == "kl"


def _materialised(w: Workload) -> bool:
    return _resident(w) and w.attention in ("eager", "math")


def _sixteen_bit(w: Workload) -> bool:
    return _resident(w) and DTYPE_BYTES[w.dtype] == 2


_RESIDENT = "offload none, vae kl"
_EAGER = "offload none, vae kl, attention eager or math"
_SIXTEEN = "offload none, vae kl, float16 or bfloat16"
# fmt: off
PEERS = (
    Peer("comfyui", "ComfyUI", comfyui_bytes, _resident, _RESIDENT,
         "batch at the VAE (it decodes what fits), VAE tiling, prompt length, safety checker",
         "comfyanonymous/ComfyUI"),
    Peer("forge", "SD WebUI Forge", forge_bytes, _resident, _RESIDENT,
         "batch at the VAE (it decodes what fits), prompt length, safety checker",
         "lllyasviel/stable-diffusion-webui-forge"),
    Peer("invokeai", "InvokeAI", invokeai_bytes, _resident, _RESIDENT,
         "the UNet's size (a flat 3 GiB), batch, guidance, prompt length, safety checker",
         "invoke-ai/InvokeAI"),
    Peer("split_attention", "split attention (A1111)", split_attention_bytes, _materialised, _EAGER,
         "everything but weights and attention scores; short of memory it slices",
         "AUTOMATIC1111/stable-diffusion-webui"),
    Peer("gguf_parser", "gguf-parser (sd.cpp)", gguf_parser_bytes, _resident, _RESIDENT,
         "batch, guidance, flash attention, VAE encode, safety checker",
         "gpustack/gguf-parser-go"),
    Peer("accelerate", "accelerate x 1.2", accelerate_bytes, _resident, _RESIDENT,
         "every activation: image size, batch, guidance, attention",
         "huggingface/accelerate"),
    Peer("hand_a", "hand derivation A", hand_derivation_a_bytes, _sixteen_bit, _SIXTEEN,
         "fused attention, prompt length, VAE at full resolution, safety checker",
         "dheepakshakthi/vRam_estimation_for_diffusion_model"),
    Peer("hand_b", "hand derivation B", hand_derivation_b_bytes, _sixteen_bit, _SIXTEEN,
         "batch, guidance, VAE activations, self-attention scores, safety checker",
         "Vishnu373/stable-diffusion-vram-calculator"),
)
# fmt: on
"""The systems, in the order in which they are printed."""


def peer(name: str) -> Peer:
    """Get a system by its name.

    Raises
    ------
    UnknownModel
        If there is none of that name.

    Examples
    --------
    >>> peer("comfyui").title
    'ComfyUI'
    """
    for candidate in PEERS:
        if candidate.name == name:
            return candidate
    raise UnknownModel(f"no system '{name}' to compare with{nearest(name, [p.name for p in PEERS])}", given=name)
