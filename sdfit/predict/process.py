"""What PyTorch is set to in this process, as far as a run's memory depends on it: attention kernels, cuDNN, the allocator.

These settings can change between two calls without a change of the pipeline, so they are asked for at each call. torch is
not imported: where it is not loaded there is no pipeline either.
"""

from __future__ import annotations

import os
import re
import sys
from types import BuiltinFunctionType
from typing import Any

from sdfit.predict.code import home

MATH, FLASH, EFFICIENT, CUDNN = 0, 1, 2, 3
"""PyTorch's numbers of the attention kernels (`torch.nn.attention.SDPBackend`)."""
ORDER = (FLASH, EFFICIENT, MATH, CUDNN)
"""The order in which they are tried where PyTorch does not tell."""
_SWITCHES = {
    FLASH: "flash_sdp_enabled", EFFICIENT: "mem_efficient_sdp_enabled", MATH: "math_sdp_enabled", CUDNN: "cudnn_sdp_enabled",
}  # fmt: skip
VARIABLES = {
    "CUBLAS_WORKSPACE_CONFIG": "cuBLAS workspaces of another size",
    "CUBLASLT_WORKSPACE_SIZE": "cuBLASLt workspaces of another size",
    "PYTORCH_NO_CUDA_MEMORY_CACHING": "no caching of memory",
    "TORCH_CUDNN_V8_API_DISABLED": "cuDNN's old interface",
    "TORCH_CUDNN_USE_HEURISTIC_MODE_B": "cuDNN's other heuristic",
    "CUDNN_CONV_WSCAP_DBG": "a cap on cuDNN's workspaces",
    "PYTORCH_TUNABLEOP_ENABLED": "matrix products by PyTorch's search for the fastest kernel",
    "TORCH_BLAS_PREFER_CUBLASLT": "matrix products by cuBLASLt",
    "DISABLE_ADDMM_CUDA_LT": "linear layers by cuBLAS alone",
}
"""Environment variables that change how much a run takes, and what they do."""
FUNCTIONS = (
    "scaled_dot_product_attention", "conv2d", "linear", "group_norm", "layer_norm", "silu", "gelu", "softmax", "interpolate", "pad",
)  # fmt: skip
"""What the modules call of `torch.nn.functional`; other attention kernels are often put there (SageAttention)."""
HARMLESS = (
    "expandable_segments", "garbage_collection_threshold", "pinned_", "release_lock_on_cudamalloc", "throw_on_cudamalloc_oom",
    "graph_capture_record_stream_reuse", "per_process_memory_fraction",
)  # fmt: skip
"""How settings of PyTorch's allocator begin under which it cuts blocks as the models assume; `remark` speaks of the first."""


def fused(vae: str) -> tuple[str, str]:
    """Which attention `scaled_dot_product_attention` gives at this moment.

    Parameters
    ----------
    vae : {'kl', 'tiny'}
        Only the first has attention of its own: one head of 512 channels.

    Returns
    -------
    attention : {'sdpa', 'math'}
        ``sdpa`` if no scores are materialised anywhere.
    unknown : str
        Empty, or why it is neither.

    Notes
    -----
    PyTorch takes the first kernel, in the order of priority, that is allowed and can do the shapes. The
    memory-efficient one can do all of Stable Diffusion's. Flash attention takes heads of up to 256 channels in 16 bits on
    sm80 and newer, cuDNN's fewer: the VAE's head of 512 goes past both to what is next.
    """
    torch = sys.modules.get("torch")
    if torch is None:
        return "sdpa", ""
    switches = torch.backends.cuda
    ask = getattr(torch._C, "_get_sdp_priority_order", None)
    allowed = {kernel for kernel, name in _SWITCHES.items() if getattr(switches, name, bool)()}
    order = [kernel for kernel in (ask() if ask else ORDER) if kernel in allowed]
    certain = [kernel for kernel in order if kernel in (EFFICIENT, MATH)]
    if certain[:1] == [EFFICIENT]:
        return "sdpa", ""
    if order[:1] == [MATH]:
        allowed_16 = getattr(switches, "fp16_bf16_reduction_math_sdp_allowed", bool)()
        return "math", "math attention that sums in 16 bits (allow_fp16_bf16_reduction_math_sdp)" if allowed_16 else ""
    where = (
        "all of it on cards that lack them" if vae == "tiny" else "the VAE's, whose head of 512 is too wide for them"
    )
    falls = "is materialised" if certain else "fails"
    return "sdpa", (
        f"attention kernels without the memory-efficient one before math ({where}, {falls}); allow it in sdpa_kernel([...])"
    )


def unknown(dtype: str) -> list[str]:
    """Settings of this process under which a run takes another amount than the models say, each in words."""
    found = [
        f"{words} ({name} is set)" for name, words in VARIABLES.items() if os.environ.get(name, "") not in ("", "0")
    ]
    torch = sys.modules.get("torch")
    if torch is None:
        return found
    cudnn = torch.backends.cudnn
    if not cudnn.enabled:
        found.append("cuDNN switched off (torch.backends.cudnn.enabled=False)")
    if cudnn.benchmark:
        found.append(
            "cuDNN's search for the fastest kernel (torch.backends.cudnn.benchmark=True), which may take any workspace"
        )
    if cudnn.deterministic or torch.are_deterministic_algorithms_enabled():
        found.append("deterministic kernels only (use_deterministic_algorithms, or cudnn.deterministic=True)")
    if dtype == "float32" and _tf32(cudnn) is not True:
        found.append("float32 convolutions without TF32 (torch.backends.cudnn)")
    if dtype == "float32" and _tf32(torch.backends.cuda.matmul) is not False:
        found.append("float32 matrix products in TF32 (torch.backends.cuda.matmul)")
    if dtype == "float32" and os.environ.get("NVIDIA_TF32_OVERRIDE"):
        found.append("TF32 as the driver is told (NVIDIA_TF32_OVERRIDE is set)")
    ask = getattr(torch.backends.cuda, "preferred_blas_library", None)
    if ask is not None and ask().name not in ("Default", "Cublas"):
        found.append(f"matrix products by {ask().name} (torch.backends.cuda.preferred_blas_library)")
    found += [
        f"a replaced torch.nn.functional.{name}"
        for name in FUNCTIONS
        if not (
            isinstance(own := getattr(torch.nn.functional, name), BuiltinFunctionType) or home(own).startswith("torch.")
        )
    ]
    if torch.nn.modules.module._has_any_global_hook():
        found.append("hooks on all modules (register_module_forward_hook)")
    settings = allocator()
    found += [
        f"an allocator set otherwise ({name}:{value})" for name, value in settings.items() if _matters(name, value)
    ]
    backend = getattr(torch._C, "_cuda_getAllocatorBackend", lambda: "native")()
    if backend != "native" and backend != settings.get("backend"):
        found.append(f"another allocator ({backend}) than PyTorch's own")
    if torch.version.hip:
        found.append("a card of AMD's (ROCm), whose kernels' workspaces are not known")
    return found


def remark() -> str:
    """What of the settings changes the number without making it wrong to act on; empty if nothing.

    Expandable segments waste less between blocks: seven traced runs required 1.0 to 6.6 % less with them (simulated).
    """
    if allocator().get("expandable_segments", "").lower() != "true":
        return ""
    return "expandable_segments is on: runs then need a few per cent less than sdfit says, which assumes it off"


def allocator() -> dict[str, str]:
    """PyTorch's allocator settings by name, from the environment or as set since."""
    torch = sys.modules.get("torch")
    ask: Any = getattr(torch and torch._C, "_accelerator_getAllocatorSettings", None)
    text = ask() if ask else os.environ.get("PYTORCH_ALLOC_CONF") or os.environ.get("PYTORCH_CUDA_ALLOC_CONF") or ""
    pairs = (pair.partition(":") for pair in re.split(r",(?![^\[]*\])", text)) if text else ()
    return {name.strip(): value.strip() for name, _, value in pairs}


def _matters(name: str, value: str) -> bool:
    return bool(name) and not name.startswith(HARMLESS) and (name, value) != ("backend", "native")


def _tf32(library: Any) -> bool | None:
    """Whether TF32 is used, as by default in convolutions alone; None where two ways of setting it were mixed: asking fails."""
    try:
        return bool(library.allow_tf32)
    except RuntimeError:
        return None
