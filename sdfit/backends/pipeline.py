"""Stable Diffusion v1.5 img2img: built from its settings, or loaded; and set to a variant.

The pipeline is diffusers' own `StableDiffusionImg2ImgPipeline`, unmodified. Peak memory does not depend on the values
of the weights, so ``weights="architecture"`` builds every component from its settings with random values: no
download, no token, no licence click. A local folder or a Hub id loads the real thing.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from sdfit.errors import SdfitError, needs
from sdfit.workload import CHUNK_TOKENS, SLICES, Workload

try:
    import torch
except ImportError as error:
    raise needs("sweep", "torch") from error

if TYPE_CHECKING:
    from diffusers import StableDiffusionImg2ImgPipeline

ARCHITECTURE = "architecture"
TEXT_WIDTH = 768
"""Channels of the text embeddings (`cross_attention_dim`)."""

# Source: the configuration files of stable-diffusion-v1-5/stable-diffusion-v1-5; the parameter counts that follow
# from them are held by a test.
UNET = {"sample_size": 64, "cross_attention_dim": TEXT_WIDTH, "attention_head_dim": 8}
VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 512,
}
TEXT = {
    "hidden_size": TEXT_WIDTH,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": CHUNK_TOKENS,
    "vocab_size": 49408,
    "hidden_act": "quick_gelu",
    "projection_dim": 768,
}
VISION = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "patch_size": 14,
    "image_size": 224,
    "hidden_act": "quick_gelu",
    "projection_dim": 768,
}
SCHEDULER = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
}


GROUPS: dict[str, dict[str, Any]] = {
    "group_block": {"offload_type": "block_level", "num_blocks_per_group": 1},
    "group_leaf": {"offload_type": "leaf_level"},
}
"""What each kind of group offload gives `enable_group_offload`."""


def offline_tokenizer() -> Any:
    """Make a CLIP tokenizer without a download: bytes, bytes that end a word, and the two special tokens.

    Its words differ from the checkpoint's; padding, truncation and token counts are the same code.
    """
    from transformers import CLIPTokenizer

    # the byte alphabet of GPT-2 and CLIP: printable bytes stand for themselves, the others for U+0100 and up
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    with tempfile.TemporaryDirectory() as folder:
        import json

        Path(folder, "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}), encoding="utf-8")
        Path(folder, "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
        config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": CHUNK_TOKENS}
        Path(folder, "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
        return CLIPTokenizer.from_pretrained(folder)


def build_components(
    dtype: str,
    device: str,
    *,
    vae: str = "kl",
    safety_checker: bool = True,
    settings: dict[str, dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Build every component of the pipeline from its settings, with random values, on a device.

    Parameters
    ----------
    dtype : str
        ``float16``, ``bfloat16`` or ``float32``.
    device : str
        A torch device; ``meta`` gives tensors without storage.
    settings : dict, optional
        Replaces settings by component (``unet``, ``vae``, ``text``, ``vision``): a small pipeline for tests.
    """
    from diffusers import AutoencoderKL, AutoencoderTiny, PNDMScheduler, UNet2DConditionModel
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPConfig, CLIPTextConfig, CLIPTextModel

    use: dict[str, Any] = {"unet": UNET, "vae": VAE, "text": TEXT, "vision": VISION, **(settings or {})}
    before = torch.get_default_dtype()
    # build in the target dtype: a float32 detour would need twice the memory on a small card
    torch.set_default_dtype(getattr(torch, dtype))
    try:
        with torch.device(device):
            components: dict[str, Any] = {
                "unet": UNet2DConditionModel(**use["unet"]),
                "vae": AutoencoderKL(**use["vae"]) if vae == "kl" else AutoencoderTiny(),
                "text_encoder": CLIPTextModel(CLIPTextConfig(**use["text"])),
            }
            if safety_checker:
                vision = CLIPConfig(
                    text_config=use["text"], vision_config=use["vision"], projection_dim=use["vision"]["projection_dim"]
                )
                components["safety_checker"] = StableDiffusionSafetyChecker(vision)
    finally:
        torch.set_default_dtype(before)
    components = {name: part.to(getattr(torch, dtype)).eval() for name, part in components.items()}
    components["tokenizer"] = offline_tokenizer()
    components["scheduler"] = PNDMScheduler(**SCHEDULER)
    return components


def build_pipeline(
    weights: str = ARCHITECTURE,
    *,
    dtype: str = "float16",
    device: str = "cpu",
    vae: str = "kl",
    safety_checker: bool = True,
    seed: int = 0,
    settings: dict[str, dict[str, Any]] | None = None,
) -> StableDiffusionImg2ImgPipeline:
    """Get diffusers' img2img pipeline: from its settings, from a folder, or from the Hub.

    Parameters
    ----------
    weights : str
        ``architecture`` (random values, nothing downloaded), a local folder, or a Hub id. For the last two the
        ``fp16`` variant of the files is taken where there is one and ``dtype`` has 16 bits.
    dtype, vae, safety_checker
        As in `Workload`.
    device : str
        Where the components go. Offload is switched on by `place`.
    seed : int
        For the random values; peak memory does not depend on it.

    Raises
    ------
    SdfitError
        If the folder or Hub id cannot be loaded; the message repeats diffusers' reason.
    """
    from diffusers import AutoencoderTiny, StableDiffusionImg2ImgPipeline

    torch.manual_seed(seed)
    if weights == ARCHITECTURE:
        parts = build_components(dtype, device, vae=vae, safety_checker=safety_checker, settings=settings)
        parts.setdefault("safety_checker", None)
        extractor = _feature_extractor() if safety_checker else None
        pipe = StableDiffusionImg2ImgPipeline(
            **parts, feature_extractor=extractor, requires_safety_checker=safety_checker
        )
    else:
        options: dict[str, Any] = {"torch_dtype": getattr(torch, dtype)}
        if not safety_checker:
            options |= {"safety_checker": None, "requires_safety_checker": False}
        pipe = _load(weights, options, prefer_fp16=dtype != "float32")
        if vae == "tiny":
            with torch.device(device):
                pipe.vae = AutoencoderTiny().to(getattr(torch, dtype))
        pipe.to(device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _load(weights: str, options: dict[str, Any], *, prefer_fp16: bool) -> StableDiffusionImg2ImgPipeline:
    from diffusers import StableDiffusionImg2ImgPipeline

    reason: Exception | None = None
    for variant in ("fp16", None) if prefer_fp16 else (None,):
        try:
            return StableDiffusionImg2ImgPipeline.from_pretrained(weights, variant=variant, **options)
        except (OSError, ValueError) as error:
            reason = error
    raise SdfitError(
        f"cannot load the pipeline '{weights}': {str(reason).splitlines()[0]}; "
        "give a diffusers folder, a Hub id, or --weights architecture",
        weights=weights,
    ) from reason


def _feature_extractor() -> Any:
    try:
        from transformers import CLIPImageProcessorPil as Processor
    except ImportError:  # transformers 4 has one class
        from transformers import CLIPImageProcessor as Processor
    return Processor(size={"shortest_edge": 224}, crop_size={"height": 224, "width": 224})


def place(pipe: StableDiffusionImg2ImgPipeline, workload: Workload, device: str) -> None:
    """Switch on what outlasts a run: the workload's offload to host memory, and how its UNet is executed."""
    if workload.offload == "model":
        pipe.enable_model_cpu_offload(device=device)
    elif workload.offload == "sequential":
        pipe.enable_sequential_cpu_offload(device=device)
    elif workload.offload in GROUPS:
        pipe.to("cpu")
        pipe.enable_group_offload(torch.device(device), **GROUPS[workload.offload])
    torch.backends.cuda.matmul.allow_tf32 = workload.execution == "tf32"
    if workload.execution == "channels_last":
        pipe.unet.to(memory_format=torch.channels_last)
    elif workload.execution == "compiled":
        pipe.unet.compile()


_switched: WeakKeyDictionary[Any, tuple[Any, ...]] = WeakKeyDictionary()
"""How each pipeline was switched last."""


@contextmanager
def variant_applied(pipe: StableDiffusionImg2ImgPipeline, workload: Workload) -> Iterator[None]:
    """Switch the pipeline's attention, VAE slicing and VAE tiling to the workload's for the time of a ``with`` block."""
    from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
    from torch.nn.attention import SDPBackend, sdpa_kernel

    vae: Any = pipe.vae
    switches = (workload.attention, workload.vae_slicing, workload.vae_tiling)
    if _switched.get(pipe) != switches:  # setting processors looks through every module
        processor = AttnProcessor if workload.attention == "eager" else AttnProcessor2_0
        pipe.unet.set_attn_processor(processor())
        if hasattr(vae, "set_attn_processor"):
            vae.set_attn_processor(processor())
        if workload.attention in SLICES:
            pipe.enable_attention_slicing(SLICES[workload.attention])
        (vae.enable_slicing if workload.vae_slicing else vae.disable_slicing)()
        (vae.enable_tiling if workload.vae_tiling else vae.disable_tiling)()
        _switched[pipe] = switches
    with sdpa_kernel(SDPBackend.MATH) if workload.attention == "math" else nullcontext():
        yield


def call_arguments(
    workload: Workload, *, num_inference_steps: int, device: str, width: int = TEXT_WIDTH, mode: str = "RGB"
) -> dict[str, Any]:
    """Make the keyword arguments of one img2img call.

    Prompts of up to 77 tokens go through the tokenizer; longer ones are ``prompt_embeds`` on the device, as Compel
    and its like make them. The images are PIL images of the workload's size, before diffusers floors it; ``mode`` is theirs, and another one than RGB is for
    what only asks their size.
    """
    from PIL import Image

    batch, guided = workload.batch_size, workload.guided
    image = Image.new(mode, (workload.width, workload.height))
    arguments: dict[str, Any] = {
        "image": [image] * batch,
        "strength": 1.0,
        "num_inference_steps": num_inference_steps,
        "guidance_scale": workload.guidance_scale,
    }
    if workload.prompt_length <= CHUNK_TOKENS:
        # one letter is one token of the offline tokenizer; two tokens are special
        arguments["prompt"] = [" ".join("a" * max(workload.prompt_length - 2, 0))] * batch
    else:
        dtype = getattr(torch, workload.dtype)
        names = ("prompt_embeds", "negative_prompt_embeds") if guided else ("prompt_embeds",)
        for name in names:
            arguments[name] = torch.zeros(batch, workload.prompt_length, width, dtype=dtype, device=device)
    return arguments
