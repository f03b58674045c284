"""The guard: a pipeline is what it is, what is not known is refused by name, and what is decided is done and undone."""

from __future__ import annotations

import contextvars
import copy
import functools
import gc
import inspect
import pickle
import subprocess
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

import sdfit

pytest.importorskip("diffusers")

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    PNDMScheduler,
    StableDiffusionControlNetImg2ImgPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.callbacks import SDCFGCutoffCallback
from diffusers.image_processor import VaeImageProcessor
from diffusers.models import embeddings
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0, XFormersAttnProcessor
from diffusers.models.autoencoders import autoencoder_kl
from diffusers.models.autoencoders.vae import Decoder, DiagonalGaussianDistribution
from PIL import Image
from tiny import TINY
from torch.nn.attention import SDPBackend, sdpa_kernel

from sdfit.backends.pipeline import build_pipeline
from sdfit.equation.weights import weights_bytes
from sdfit.errors import InvalidWorkload
from sdfit.guard import ExceedsWarning, Free, NotCovered, WillNotFit, free_memory
from sdfit.guard.memory import _staying, device_of
from sdfit.guard.reader import Reader
from sdfit.predict.pipelines import components, read
from sdfit.predict.predictor import Predictor
from sdfit.units import GIB
from sdfit.workload import Workload


def picture(height: int, width: int, mode: str = "RGB") -> Image.Image:
    return Image.new(mode, (width, height))


PICTURE = picture(520, 776)
SETTINGS: dict[str, Any] = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}


@pytest.fixture(scope="module")
def whole() -> Any:
    """Stable Diffusion v1.5, whole, on meta tensors: nobody changes it."""
    return build_pipeline(dtype="float16", device="meta")


@pytest.fixture
def pipe(whole: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The same, to be changed, and its runs only written down: with the processors and flags that it had then."""
    made = StableDiffusionImg2ImgPipeline(**copy.deepcopy(whole.components), requires_safety_checker=True)
    made.runs, made.restore, made.pause = [], lambda: None, lambda: None

    @functools.wraps(StableDiffusionImg2ImgPipeline.__call__)
    def run(self: Any, *args: Any, **kwargs: Any) -> str:
        kinds = {type(p).__name__ for p in self.unet.attn_processors.values()}
        self.runs.append((args, kwargs, self.vae.use_tiling, self.vae.use_slicing, kinds))
        self.pause()
        if kwargs.get("strength") == 0.123:
            raise RuntimeError("the run failed")
        return "pictures"

    monkeypatch.setattr(StableDiffusionImg2ImgPipeline, "__call__", run)
    yield made
    made.restore()


def unet(**changes: Any) -> UNet2DConditionModel:
    with torch.device("meta"):
        return UNet2DConditionModel(**SETTINGS | changes).to(torch.float16)


def replaced(**parts: Callable[[], Any]) -> Callable[[Any], Any]:
    """A change of a pipeline: some components are others."""

    def change(pipe: Any) -> Any:
        for name, make in parts.items():
            setattr(pipe, name, make())
        return pipe

    return change


def other(cls: Any, **extra: Callable[[], Any]) -> Callable[[Any], Any]:
    """A change of a pipeline: its components in a pipeline of another class."""

    def change(pipe: Any) -> Any:
        parts = {name: part for name, part in pipe.components.items() if name != "image_encoder"}
        return cls(**parts, **{name: make() for name, make in extra.items()}, requires_safety_checker=True)

    return change


def tiny_controlnet() -> Any:
    return ControlNetModel(
        block_out_channels=(32, 64), layers_per_block=1, down_block_types=("DownBlock2D", "DownBlock2D"),
        cross_attention_dim=768, norm_num_groups=8,
    )  # fmt: skip


def done(action: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A change of a pipeline by doing something to it."""

    def change(pipe: Any) -> Any:
        action(pipe)
        return pipe

    return change


def sequential(pipe: Any) -> None:
    from accelerate.hooks import AlignDevicesHook

    pipe.unet.conv_in._hf_hook = AlignDevicesHook(
        execution_device="cpu", offload=True
    )  # as enable_sequential_cpu_offload


def group(pipe: Any) -> None:
    from diffusers.hooks.hooks import HookRegistry, ModelHook

    class GroupOffloadingHook(ModelHook):
        pass

    HookRegistry.check_if_exists_or_initialize(pipe.unet.conv_in).register_hook(
        GroupOffloadingHook(), "group_offloading"
    )


def merged_tokens(pipe: Any) -> None:
    block = pipe.unet.mid_block.attentions[0].transformer_blocks[0]
    block.__class__ = type("ToMeBlock", (type(block),), {"__module__": "tomesd.patch"})


def offload_of_one(pipe: Any) -> None:
    from accelerate.hooks import CpuOffload

    pipe.unet._hf_hook = CpuOffload("cpu")


def offload_without_turns(pipe: Any) -> None:
    from accelerate.hooks import CpuOffload

    for part in (pipe.text_encoder, pipe.unet, pipe.vae):
        part._hf_hook = CpuOffload("cpu")
    pipe._all_hooks = [1, 2, 3]


def replaced_on_a_class(pipe: Any) -> None:
    from diffusers.models.attention import BasicTransformerBlock

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return own(self, *args, **kwargs)

    own = BasicTransformerBlock.forward
    pipe.restore = lambda: setattr(BasicTransformerBlock, "forward", own)
    functools.update_wrapper(forward, own)
    BasicTransformerBlock.forward = forward


def weights_in_pieces(pipe: Any) -> None:
    weight = torch.empty(4, 320, 3, 3, dtype=torch.float16, device="meta").transpose(0, 1)
    pipe.unet.conv_in.weight = torch.nn.Parameter(weight)


class Steps:
    """A scheduler that people write."""


class Quantised(torch.nn.Parameter):
    """As torchao's weights are: of another class, with the dtype that they stand for."""


class Processor(AttnProcessor2_0):
    """One that people write."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(*args, **kwargs)


def setting(part: str, **values: Any) -> Callable[[Any], Any]:
    return done(lambda pipe: getattr(pipe, part).register_to_config(**values))


KINDS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "ControlNet": (
        other(StableDiffusionControlNetImg2ImgPipeline, controlnet=tiny_controlnet),
        "ControlNetImg2ImgPipeline",
    ),
    "text to image": (other(StableDiffusionPipeline), "a StableDiffusionPipeline"),
    "inpainting": (other(StableDiffusionInpaintPipeline), "a StableDiffusionInpaintPipeline"),
    "InstructPix2Pix": (other(StableDiffusionInstructPix2PixPipeline), "a StableDiffusionInstructPix2PixPipeline"),
    "inpainting UNet": (replaced(unet=lambda: unet(in_channels=9)), "in_channels=9"),
    "SD 2": (
        replaced(
            unet=lambda: unet(cross_attention_dim=1024, attention_head_dim=[5, 10, 20, 20], use_linear_projection=True)
        ),
        "unet of 865,910,724 parameters",
    ),
    "linear projections": (replaced(unet=lambda: unet(use_linear_projection=True)), "use_linear_projection=True"),
    "LCM": (replaced(unet=lambda: unet(time_cond_proj_dim=256)), "time_cond_proj_dim=256"),
    "half width": (
        replaced(unet=lambda: unet(block_out_channels=(160, 320, 640, 640))),
        "block_out_channels=\\(160, 320",
    ),
    "small VAE": (replaced(vae=AutoencoderKL), "a vae of "),
    "LoRA": (done(lambda pipe: setattr(pipe.unet, "peft_config", {"default": 1})), "adapters \\(LoRA\\) in the unet"),
    "more weights": (
        done(lambda pipe: setattr(pipe.unet.conv_in, "lora_down", torch.nn.Linear(4, 4, dtype=torch.float16))),
        "parameters where Stable Diffusion v1.5 has 859,520,964",
    ),
    "IP-Adapter": (done(lambda pipe: setattr(pipe.unet, "encoder_hid_proj", torch.nn.Identity())), "an IP-Adapter"),
    "an image encoder": (
        done(lambda pipe: setattr(pipe, "image_encoder", torch.nn.Linear(2, 2))),
        "component 'image_encoder'",
    ),
    "token merging": (done(merged_tokens), "not diffusers' own \\(ToMeBlock\\)"),
    "mixed dtypes": (done(lambda pipe: pipe.vae.to(torch.float32)), "vae float32"),
    "layerwise casting": (done(lambda pipe: pipe.unet.to(torch.float8_e4m3fn)), "unet float8_e4m3fn"),
    "compiled": (done(lambda pipe: setattr(pipe, "unet", torch.compile(pipe.unet))), "a compiled unet"),
    "compiled in place": (done(lambda pipe: pipe.unet.compile()), "a compiled unet"),
    "channels last": (done(lambda pipe: pipe.unet.to(memory_format=torch.channels_last)), "channels-last"),
    "sequential offload of a part": (done(sequential), "sequential offload"),
    "group offload of a part": (done(group), "group offload with streams"),
    "xFormers": (
        done(lambda pipe: pipe.unet.set_attn_processor(XFormersAttnProcessor())),
        "processors of the UNet: XFormersAttnProcessor",
    ),
    "slices of three heads": (done(lambda pipe: pipe.enable_attention_slicing(3)), r"slices of \[3\] heads"),
    "FreeU": (done(lambda pipe: pipe.enable_freeu(0.9, 0.2, 1.2, 1.4)), "FreeU in the unet"),
    "a hook": (done(lambda pipe: pipe.unet.mid_block.register_forward_hook(print)), "forward hooks in the unet"),
    "a hook before": (
        done(lambda pipe: pipe.vae.decoder.register_forward_pre_hook(print)),
        "forward hooks in the vae",
    ),
    "a replaced forward": (
        done(lambda pipe: setattr(pipe.unet, "forward", lambda *a, **k: None)),
        "a replaced UNet2DConditionModel.forward in the unet",
    ),
    "a replaced forward of a block": (
        done(lambda pipe: setattr(pipe.unet.mid_block, "forward", functools.partial(print))),
        "a replaced UNetMidBlock2DCrossAttn.forward in the unet",
    ),
    "a replaced decode": (done(lambda pipe: setattr(pipe.vae, "decode", print)), "a replaced AutoencoderKL.decode"),
    "replaced on a class": (done(replaced_on_a_class), "a replaced BasicTransformerBlock.forward in the unet"),
    "a replaced step": (
        done(lambda pipe: setattr(pipe, "prepare_latents", print)),
        "a replaced StableDiffusionImg2ImgPipeline.prepare_latents",
    ),
    "a checker that is a function": (
        done(lambda pipe: setattr(pipe, "safety_checker", lambda images, clip_input: (images, [False]))),
        r"a safety checker that is a function \(to go without, set it to None\)",
    ),
    "a block compiled in place": (
        done(lambda pipe: pipe.unet.up_blocks[0].compile()),
        "torch.compile in the unet",
    ),
    "a compiled block": (
        done(lambda pipe: setattr(pipe.unet, "mid_block", torch.compile(pipe.unet.mid_block))),
        "torch.compile in the unet",
    ),
    "feed-forward in chunks": (
        done(lambda pipe: pipe.unet.mid_block.attentions[0].transformer_blocks[0].set_chunk_feed_forward(1, 1)),
        "feed-forward layers in chunks in the unet",
    ),
    "fused projections": (done(lambda pipe: pipe.unet.fuse_qkv_projections()), "fused projections in the unet"),
    "a processor of one's own": (
        done(lambda pipe: pipe.unet.set_attn_processor(Processor())),
        r"processors of the UNet: test_guard\.Processor",
    ),
    "one block channels last": (
        done(lambda pipe: pipe.unet.up_blocks[3].to(memory_format=torch.channels_last)),
        "channels-last",
    ),
    "weights of another kind": (
        done(lambda pipe: setattr(pipe.unet.conv_out, "bias", Quantised(pipe.unet.conv_out.bias))),
        r"no plain tensors \(Quantised\)",
    ),
    "buffers": (
        done(lambda pipe: pipe.unet.register_buffer("cache", torch.zeros(5000, device="meta"))),
        "buffers of 5,000 elements in the unet",
    ),
    "a scale of the middle": (setting("unet", mid_block_scale_factor=2), "a unet with mid_block_scale_factor=2, not 1"),
    "another activation": (setting("vae", act_fn="relu"), "a vae with act_fn=relu, not silu"),
    "fewer groups": (setting("unet", norm_num_groups=16), "a unet with norm_num_groups=16, not 32"),
    "more heads": (
        done(lambda pipe: setattr(pipe.text_encoder.config, "num_attention_heads", 8)),
        "a text_encoder with num_attention_heads=8, not 12",
    ),
    "another picture for the checker": (
        done(lambda pipe: setattr(pipe.safety_checker.config.vision_config, "image_size", 336)),
        "a safety_checker with image_size=336, not 224",
    ),
    "another image processor": (
        done(lambda pipe: setattr(pipe, "image_processor", VaeImageProcessor(vae_scale_factor=16))),
        "an image processor with vae_scale_factor=16",
    ),
    "a replaced step of the image processor": (
        done(lambda pipe: setattr(pipe.image_processor, "preprocess", print)),
        r"a replaced VaeImageProcessor\.preprocess",
    ),
    "offload of the UNet": (done(offload_of_one), "offload of unet alone"),
    "offload without turns": (done(offload_without_turns), "hooks that do not take turns"),
    "mixed attention": (
        done(lambda pipe: pipe.vae.set_attn_processor(AttnProcessor())),
        "attention in the VAE of another kind",
    ),
    "seamless pictures": (
        done(lambda pipe: setattr(pipe.unet.conv_in, "padding_mode", "circular")),
        r"pad in circles or otherwise than with zeros \(seamless pictures\) in the unet",
    ),
    "dilated convolutions": (
        done(lambda pipe: setattr(pipe.unet.mid_block.resnets[0].conv1, "dilation", (2, 2))),
        "dilated convolutions in the unet",
    ),
    "weights in pieces": (done(weights_in_pieces), "weights of the unet that do not lie in one piece"),
    "a scheduler of one's own": (
        done(lambda pipe: setattr(pipe, "scheduler", Steps())),
        r"a scheduler of class test_guard\.Steps",
    ),
    "a replaced step of the scheduler": (
        done(lambda pipe: setattr(pipe.scheduler, "step", print)),
        "a replaced PNDMScheduler.step",
    ),
    "other tiles": (
        done(lambda pipe: (pipe.vae.enable_tiling(), setattr(pipe.vae, "tile_sample_min_size", 256))),
        "VAE tiles of another size",
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_pipeline_that_sdfit_does_not_know_is_refused_by_name(pipe: Any, f: Predictor, kind: str) -> None:
    """Before anything runs, saying what it is; with on_unknown='warn' it is run unchecked."""
    change, words = KINDS[kind]
    changed = change(pipe)
    with pytest.raises(NotCovered, match=words) as caught:
        sdfit.guard(changed, f, memory="80 GiB").workload(image=PICTURE, prompt="a cat")
    assert caught.value.exit_code == 1 and caught.value.facts["unknown"]
    if type(changed) is StableDiffusionImg2ImgPipeline:
        with pytest.warns(ExceedsWarning, match="not checked: "):
            assert (
                sdfit.guard(changed, f, memory="1 GiB", on_unknown="warn")(image=PICTURE, prompt="a cat") == "pictures"
            )


def test_the_pipeline_itself_is_covered(whole: Any, f: Predictor) -> None:
    """Built from the settings of Stable Diffusion v1.5 nothing about it is unknown."""
    found = read(whole)
    assert found.unknown == () and found.variant == {n: getattr(Workload(512, 512), n) for n in found.variant}
    assert sdfit.guard(whole, f, memory="80 GiB").workload(image=PICTURE, prompt="cat") == Workload(520, 776)


STATES: dict[str, tuple[Callable[[Any], Any], dict[str, Any]]] = {
    "eager": (
        lambda p: (p.unet.set_attn_processor(AttnProcessor()), p.vae.set_attn_processor(AttnProcessor())),
        {"attention": "eager"},
    ),
    "sliced": (lambda p: p.enable_attention_slicing(), {"attention": "sliced"}),
    "sliced by 'max'": (lambda p: p.enable_attention_slicing("max"), {"attention": "sliced_max"}),
    "sliced by 2": (lambda p: p.enable_attention_slicing(2), {"attention": "sliced_2"}),
    "slicing": (lambda p: p.vae.enable_slicing(), {"vae_slicing": True}),
    "tiling": (lambda p: p.vae.enable_tiling(), {"vae_tiling": True}),
    "bfloat16": (lambda p: p.to(torch.bfloat16), {"dtype": "bfloat16"}),
    "no checker": (lambda p: setattr(p, "safety_checker", None), {"safety_checker": False}),
}


@pytest.mark.parametrize("state", STATES)
def test_a_change_of_the_pipeline_is_seen_at_the_next_call(pipe: Any, f: Predictor, state: str) -> None:
    """What was read before is dropped: the variant is that of now, and that of then once it is changed back."""
    guarded = sdfit.guard(pipe, f, memory="80 GiB")
    before = guarded.workload(image=PICTURE, prompt="a")
    change, expected = STATES[state]
    change(pipe)
    after = guarded.workload(image=PICTURE, prompt="a")
    assert {name: getattr(after, name) for name in expected} == expected and after != before
    if state.startswith("sliced") or state == "eager":
        pipe.unet.set_attn_processor(AttnProcessor2_0())
        pipe.vae.set_attn_processor(AttnProcessor2_0())
        assert guarded.workload(image=PICTURE, prompt="a") == before


def test_the_tiny_vae_is_read_with_its_tiles(f: Predictor) -> None:
    """It overlaps them by another share, which is its own; of another size they are refused."""
    tiny = build_pipeline(dtype="float16", device="meta", vae="tiny")
    tiny.vae.enable_tiling()
    guarded = sdfit.guard(tiny, f, memory="80 GiB")
    found = guarded.workload(image=PICTURE, prompt="a")
    assert (found.vae, found.vae_tiling) == ("tiny", True)
    tiny.vae.tile_sample_min_size = 1024
    with pytest.raises(NotCovered, match=r"VAE tiles of another size \(tile_sample_min_size=1024\)"):
        guarded.workload(image=PICTURE, prompt="a")


def test_a_setting_that_is_changed_later_is_seen(pipe: Any, f: Predictor) -> None:
    """Though the modules stay what they are."""
    guarded = sdfit.guard(pipe, f, memory="80 GiB")
    guarded.workload(image=PICTURE, prompt="a")
    pipe.unet.register_to_config(center_input_sample=True)
    with pytest.raises(NotCovered, match="a unet with center_input_sample=True, not False"):
        guarded.workload(image=PICTURE, prompt="a")


def test_forced_math_attention_is_read_as_what_it_is(pipe: Any, f: Predictor) -> None:
    """Inside `sdpa_kernel(MATH)` scores are materialised: five times the memory, and the guard says so."""
    guarded = sdfit.guard(pipe, f, memory="6 GiB")
    call: dict[str, Any] = {"image": picture(768, 768), "prompt": "a"}
    assert guarded(**call) == "pictures"
    with sdpa_kernel(SDPBackend.MATH):
        assert guarded.workload(**call).attention == "math"
        with pytest.raises(WillNotFit):
            guarded(**call)
    assert guarded.workload(**call).attention == "sdpa"


@pytest.mark.parametrize("kind", ["FreeU", "a hook", "a replaced forward", "a replaced forward of a block", "a replaced decode",
                                  "replaced on a class", "a block compiled in place", "one block channels last", "a hook before",
                                  "weights of another kind", "offload of the UNet", "a replaced step", "buffers",
                                  "seamless pictures", "dilated convolutions", "a scheduler of one's own", "a replaced step of the scheduler"])  # fmt: skip
def test_what_is_done_to_a_pipeline_after_it_was_read_is_seen(pipe: Any, f: Predictor, kind: str) -> None:
    """The reading that is kept is dropped, so that the pipeline of now is refused."""
    guarded = sdfit.guard(pipe, f, memory="80 GiB")
    guarded.workload(image=PICTURE, prompt="a")
    change, words = KINDS[kind]
    change(pipe)
    with pytest.raises(NotCovered, match=words):
        guarded.workload(image=PICTURE, prompt="a")


BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"


def test_what_is_set_by_hand_between_two_calls_is_seen(whole: Any, f: Predictor) -> None:
    """Any plain attribute of any module, whatever it is for, is looked at in each call; set back, the pipeline is covered."""
    guarded = sdfit.guard(whole, f, memory="80 GiB")
    call: dict[str, Any] = {"image": PICTURE, "prompt": "a"}
    before, kinds = guarded.workload(**call), torch.nn.modules
    changes: list[tuple[Any, str, Any, str]] = [
        (whole.unet.get_submodule(f"{BLOCK}.attn1"), "heads", 1, rf"heads=1 \(built with 8\) in unet\.{BLOCK}\.attn1"),
        (whole.vae.decoder.conv_norm_out, "num_groups", 1, r"num_groups=1 \(built with 32\) in vae.decoder"),
        (whole.unet.conv_in, "stride", (2, 2), r"stride=\(2, 2\)"),
        (whole.unet.conv_act, "inplace", True, "inplace=True"),
        (whole.unet.get_submodule(BLOCK), "_chunk_dim", 2, "_chunk_dim=2"),
        (whole.text_encoder.config, "_attn_implementation", "eager", "attention by 'eager'"),
        (
            whole.image_processor,
            "_internal_dict",
            whole.image_processor.config | {"do_resize": False},
            "do_resize=False",
        ),
    ]
    tables = (whole.unet.conv_act._forward_hooks, whole.unet.conv_in._forward_pre_hooks)
    for thing, name, value, words in changes:
        was = getattr(thing, name)
        setattr(thing, name, value)
        with pytest.raises(NotCovered, match=words):
            guarded.workload(**call)
        setattr(thing, name, was)
    for table in tables:  # where PyTorch did not register it
        table[0] = print
        with pytest.raises(NotCovered, match="forward hooks in the unet"):
            guarded.workload(**call)
        del table[0]
    act, whole.unet.conv_act = whole.unet.conv_act, kinds.ReLU()
    with pytest.raises(NotCovered, match=r"a ReLU, built as a SiLU in unet\.conv_act"):
        guarded.workload(**call)
    whole.unet.conv_act = act
    whole.enable_attention_slicing()
    assert guarded.workload(**call).attention == "sliced"
    for processor in whole.unet.attn_processors.values():
        processor.slice_size = 3
    with pytest.raises(NotCovered, match=r"slices of \[3\] heads"):
        guarded.workload(**call)
    for part in (whole.unet, whole.vae):
        part.set_attn_processor(AttnProcessor2_0())
    assert guarded.workload(**call) == before


def of_a_library(name: str, base: Any, module: str) -> Callable[[Any], Any]:
    """A change of a pipeline: linear layers of its UNet are of a class by this name, as quantisers make them."""
    cls = type(name, (base,), {"__module__": module})

    def change(pipe: Any) -> Any:
        for module in pipe.unet.mid_block.modules():
            if type(module) is base:
                module.__class__ = cls
        return pipe

    return change


LAYERS = {
    "bitsandbytes, 4 bits": of_a_library("Linear4bit", torch.nn.Linear, "bitsandbytes.nn.modules"),
    "bitsandbytes, 8 bits": of_a_library("Linear8bitLt", torch.nn.Linear, "bitsandbytes.nn.modules"),
    "torchao": of_a_library("Float8Linear", torch.nn.Linear, "torchao.float8.float8_linear"),
    "GGUF": of_a_library("GGUFLinear", torch.nn.Linear, "diffusers.quantizers.gguf.utils"),
    "convolutions": of_a_library("QConv2d", torch.nn.Conv2d, "optimum.quanto.nn.qconv2d"),
    "parametrized": done(
        lambda pipe: torch.nn.utils.parametrizations.weight_norm(pipe.unet.mid_block.resnets[0].conv1)
    ),
}


def test_layers_of_quantisers_are_refused_by_the_names_of_their_classes(pipe: Any, f: Predictor) -> None:
    """After the pipeline was read, too; the rest of it is as it was."""
    guarded = sdfit.guard(pipe, f, memory="80 GiB")
    before = pipe.unet.mid_block
    for kind, change in LAYERS.items():
        guarded.workload(image=PICTURE, prompt="a")
        pipe.unet.mid_block = copy.deepcopy(before)
        change(pipe)
        with pytest.raises(NotCovered, match=r"modules in the unet that are not diffusers' own \(\w+") as caught:
            guarded.workload(image=PICTURE, prompt="a")
        assert ("quantised weights" in str(caught.value)) == (kind not in ("GGUF", "parametrized"))
        pipe.unet.mid_block = before


class Copies:
    """What may stand in the place of a function, or of a class."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return args


@torch.no_grad()
def without_gradients(*args: Any, **kwargs: Any) -> Any:
    """A function of one's own, in a wrapper of PyTorch's."""
    return args


STEPS = "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_img2img"
CODE: list[tuple[Any, str, Any, str]] = [
    # where                          name                          other code                    is refused as a replaced
    (StableDiffusionImg2ImgPipeline, "prepare_latents",            without_gradients,            r"\w+\.prepare_latents"),
    (StableDiffusionImg2ImgPipeline, "do_classifier_free_guidance", property(lambda self: True), r"\w+\.do_classifier_free_guidance"),
    (PNDMScheduler,                  "step_plms",                  without_gradients,            r"PNDMScheduler\.step_plms"),
    (VaeImageProcessor,              "numpy_to_pt",                staticmethod(Copies()),       r"VaeImageProcessor\.numpy_to_pt"),
    (AutoencoderKL,                  "tiled_decode",               functools.partialmethod(Copies()), r"AutoencoderKL\.tiled_decode"),
    (DiagonalGaussianDistribution,   "sample",                     without_gradients,            r"DiagonalGaussianDistribution\.sample"),
    (Decoder,                        "forward",                    torch.compile(Decoder.forward), r"Decoder\.forward"),
    (sys.modules[STEPS],             "retrieve_timesteps",         lambda *args: args,           rf"{STEPS}\.retrieve_timesteps"),
    (sys.modules[STEPS],             "randn_tensor",               Copies(),                     rf"{STEPS}\.randn_tensor"),
    (autoencoder_kl,                 "DiagonalGaussianDistribution", Copies,                     r"[\w.]+\.DiagonalGaussianDistribution"),
    (embeddings,                     "get_timestep_embedding",     functools.partial(without_gradients), r"[\w.]+\.get_timestep_embedding"),
]  # fmt: skip


def test_other_code_in_a_library_is_seen(whole: Any, f: Predictor, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a class, whatever kind of method; in the module that calls it; in wrappers; put there between two calls."""
    guarded = sdfit.guard(whole, f, memory="80 GiB")
    call: dict[str, Any] = {"image": PICTURE, "prompt": "a"}
    before = guarded.workload(**call)
    for where, name, code, words in CODE:
        with monkeypatch.context() as patch:
            patch.setattr(where, name, code)
            with pytest.raises(NotCovered, match=f"a replaced {words}"):
                guarded.workload(**call)
    assert guarded.workload(**call) == before


def test_what_stands_beside_the_components_is_looked_at(pipe: Any, f: Predictor) -> None:
    """The tokenizer, which says how long prompts are, and what makes the safety checker's pictures; between two calls."""
    guarded = sdfit.guard(pipe, f, memory="80 GiB")
    call: dict[str, Any] = {"image": PICTURE, "prompt": "a"}
    pipe.tokenizer, pipe.feature_extractor = copy.copy(pipe.tokenizer), copy.copy(pipe.feature_extractor)
    changes: list[tuple[Any, str, Any, str]] = [
        (pipe.tokenizer, "model_max_length", 40, "a tokenizer that pads and cuts to 40 tokens, not 77"),
        (pipe.tokenizer, "model_max_length", int(1e30), r"a tokenizer that pads and cuts to 1e\+30 tokens"),
        (pipe, "tokenizer", Copies(), r"a tokenizer of class test_guard\.Copies"),
        (pipe, "feature_extractor", Copies(), r"a feature_extractor of class test_guard\.Copies"),
        (pipe.feature_extractor, "device", "cuda", "a feature_extractor that works on 'cuda'"),
        (pipe.scheduler, "step_plms", print, r"a replaced PNDMScheduler\.step_plms"),
        (pipe.text_encoder.config, "use_attention_mask", True, "a text_encoder with use_attention_mask=True"),
    ]
    before = guarded.workload(**call)
    for thing, name, value, words in changes:
        was = vars(thing).get(name, ...)
        setattr(thing, name, value)
        with pytest.raises(NotCovered, match=words):
            guarded.workload(**call)
        delattr(thing, name) if was is ... else setattr(thing, name, was)
    assert guarded.workload(**call) == before


def test_an_eager_safety_checker_is_known_but_for_small_pictures(pipe: Any, f: Predictor) -> None:
    """As transformers before 5 loads it: its scores count where nothing else sets the peak."""
    pipe.safety_checker.vision_model.set_attn_implementation("eager")
    guarded = sdfit.guard(pipe, f, memory="80 GiB")
    assert guarded.workload(image=PICTURE, prompt="a") == Workload(520, 776)
    with pytest.raises(NotCovered, match="eager attention in the safety checker"):
        guarded.workload(image=picture(64, 64), prompt="a")


def quanto_of(linear: Any, **changes: Any) -> Any:
    """What optimum-quanto 0.2.7 makes of a linear layer, as far as it can be told from outside."""

    class QLinear(torch.nn.Linear):
        __module__ = "optimum.quanto.nn.qlinear"

    made = QLinear(linear.in_features, linear.out_features, linear.bias is not None, "meta", linear.weight.dtype)
    made.weight._data = torch.empty(linear.weight.shape, dtype=changes.pop("dtype", torch.int8), device="meta")
    made.weight._scale = torch.empty(linear.out_features, 1, dtype=linear.weight.dtype, device="meta")
    made.weight.__tensor_flatten__ = lambda: (["_data", "_scale"], {})
    vars(made).update({"activation_qtype": None, "weight_group_size": None} | changes)
    made.register_buffer("input_scale", torch.ones((), device="meta"))
    return made


def quantised(part: str = "unet", most: int = 10**6, **changes: Any) -> Callable[[Any], Any]:
    def change(pipe: Any) -> Any:
        places = [
            (m, n) for m in getattr(pipe, part).modules() for n, c in m.named_children() if type(c) is torch.nn.Linear
        ]
        for module, name in places[:most]:
            setattr(module, name, quanto_of(getattr(module, name), **changes))
        return pipe

    return change


def test_a_unet_in_int8_is_read_as_such(pipe: Any, f: Predictor) -> None:
    """All of its linear layers by optimum-quanto, as ``execution="int8"`` has them; what lies on the card is what it weighs."""
    guarded = sdfit.guard(pipe, f, memory="80 GiB")
    assert guarded.workload(image=PICTURE, prompt="a").execution == "default"
    quantised()(pipe)
    found = guarded.workload(image=PICTURE, prompt="a")
    assert found == Workload(520, 776, execution="int8")
    assert _staying(pipe, None) == pytest.approx(weights_bytes(found), abs=5000)


@pytest.mark.parametrize(
    "change",
    [quantised(most=5), quantised("text_encoder"), quantised(activation_qtype="qint8"), quantised(dtype=torch.float8_e4m3fn),
     quantised(weight_group_size=128)],
    ids=["some layers", "text encoder", "activations", "float8", "groups"],
)  # fmt: skip
def test_what_is_quantised_otherwise_is_refused(pipe: Any, f: Predictor, change: Callable[[Any], Any]) -> None:
    """By name, with what is known."""
    with pytest.raises(
        NotCovered, match=r"not diffusers' own \(QLinear\); of quantised weights those of execution='int8'"
    ):
        sdfit.guard(change(pipe), f, memory="80 GiB").workload(image=PICTURE, prompt="a")


def test_what_leaves_no_trace_is_covered(pipe: Any, f: Predictor) -> None:
    """Switched off again, or of no effect: FreeU, hooks, a progress bar of one's own, sizes that only set defaults."""
    guarded = sdfit.guard(pipe, f, memory="80 GiB")
    before = guarded.workload(image=PICTURE, prompt="a")
    pipe.enable_freeu(0.9, 0.2, 1.2, 1.4)
    pipe.disable_freeu()
    pipe.unet.register_forward_hook(print).remove()
    pipe.unet.forward = pipe.unet.forward  # as accelerate leaves it after remove_hook_from_module
    pipe.progress_bar = print
    pipe.unet.register_to_config(sample_size=96)
    pipe.vae.register_to_config(scaling_factor=0.13)
    assert guarded.workload(image=PICTURE, prompt="a") == before


def test_a_component_that_was_dropped_is_freed(pipe: Any, f: Predictor) -> None:
    """The guard keeps nothing of a pipeline alive but the pipeline."""
    guarded = sdfit.guard(pipe, f, memory="80 GiB")
    guarded.workload(image=PICTURE, prompt="a")
    gone = weakref.ref(pipe.safety_checker.vision_model)
    pipe.safety_checker = None
    gc.collect()
    assert gone() is None and not guarded.workload(image=PICTURE, prompt="a").safety_checker


def test_model_offload_is_read_off_its_hooks_run_after_run() -> None:
    """As `enable_model_cpu_offload` makes them, on a small pipeline that really runs; they are put there anew after each.

    Nothing else that is looked at changes with a run.
    """
    tiny = build_pipeline(dtype="float32", settings=TINY)
    sized = set(read(tiny).unknown)
    tiny.enable_model_cpu_offload(device="cpu")
    reader = Reader(tiny)
    first = reader.read()
    assert first.offload == "model" and set(first.unknown) == sized
    tiny(image=picture(64, 64), prompt="a", num_inference_steps=1, strength=1.0)
    reader.read()
    seen = reader._seen
    tiny(image=picture(64, 64), prompt="a", num_inference_steps=1, strength=1.0)
    assert reader.read() == first and reader._seen is seen
    tiny.remove_all_hooks()
    assert reader.read().offload == "none" and set(reader.read().unknown) == sized


F, E, M, C = SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH, SDPBackend.CUDNN_ATTENTION
KERNELS: list[tuple[list[SDPBackend], bool, str, str]] = [
    # allowed     in this order, is,       or is refused
    ([F, E, M, C], False, "sdpa", ""),
    ([E], False, "sdpa", ""),
    ([M, E], False, "sdpa", ""),  # a list alone gives no order
    ([E, M], True, "sdpa", ""),
    ([F, E], True, "sdpa", ""),
    ([C, F, E, M], True, "sdpa", ""),
    ([M], False, "math", ""),
    ([M, E, F], True, "math", ""),
    ([M, C], False, "math", ""),
    ([F, M], False, "", "head of 512 is too wide for them, is materialised"),
    ([C, M, E], True, "", "head of 512 is too wide for them, is materialised"),
    ([F, M, E], True, "", "head of 512 is too wide for them, is materialised"),
    ([F], False, "", "head of 512 is too wide for them, fails"),
    ([C], False, "", "head of 512 is too wide for them, fails"),
]


@pytest.mark.parametrize(("kernels", "in_order", "attention", "words"), KERNELS, ids=range(len(KERNELS)))
def test_attention_is_that_of_the_kernel_that_runs(
    pipe: Any, f: Predictor, kernels: list[SDPBackend], in_order: bool, attention: str, words: str
) -> None:
    """By what is allowed and in which order it is tried; the VAE's head of 512 channels goes past flash attention."""
    guarded = sdfit.guard(pipe, f, memory="80 GiB")
    with sdpa_kernel(kernels, set_priority=in_order):
        if words:
            with pytest.raises(NotCovered, match=words):
                guarded.workload(image=PICTURE, prompt="a")
        else:
            assert guarded.workload(image=PICTURE, prompt="a").attention == attention
    assert guarded.workload(image=PICTURE, prompt="a").attention == "sdpa"


def test_sliced_attention_leaves_the_vae_to_the_kernels(pipe: Any, f: Predictor) -> None:
    """The UNet calls none then; the VAE does, and materialised in it is another amount."""
    pipe.enable_attention_slicing()
    guarded = sdfit.guard(pipe, f, memory="80 GiB")
    assert guarded.workload(image=PICTURE, prompt="a").attention == "sliced"
    with sdpa_kernel(SDPBackend.MATH), pytest.raises(NotCovered, match="beside math attention in the VAE"):
        guarded.workload(image=PICTURE, prompt="a")


@functools.wraps(torch.nn.functional.silu)
def print_it(*args: Any, **kwargs: Any) -> None:
    """What says that it is PyTorch's."""


def allocator(text: str) -> Callable[[pytest.MonkeyPatch], None]:
    return lambda patch: patch.setattr(torch._C, "_accelerator_getAllocatorSettings", lambda: text)


PROCESS: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], str]] = {
    "cuDNN off": (lambda p: p.setattr(torch.backends.cudnn, "enabled", False), "cuDNN switched off"),
    "benchmark": (lambda p: p.setattr(torch.backends.cudnn, "benchmark", True), "cudnn.benchmark=True"),
    "deterministic cuDNN": (lambda p: p.setattr(torch.backends.cudnn, "deterministic", True), "deterministic kernels"),
    "deterministic": (lambda p: p.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True), "determin"),
    "blocks not cut": (allocator("max_split_size_mb:128"), r"allocator set otherwise \(max_split_size_mb:128\)"),
    "another allocator": (allocator("backend:cudaMallocAsync"), "backend:cudaMallocAsync"),
    "segments of another size": (allocator("large_segment_size_mb:64"), "large_segment_size_mb:64"),
    "an allocator of one's own": (
        lambda p: p.setattr(torch._C, "_cuda_getAllocatorBackend", lambda: "pluggable", raising=False),
        r"another allocator \(pluggable\) than PyTorch's own",
    ),
    "AMD": (lambda p: p.setattr(torch.version, "hip", "6.2"), r"a card of AMD's \(ROCm\)"),
    "rounded": (allocator("a:1, roundup_power2_divisions:[256:1,>:4]"), "roundup_power2_divisions"),
    "cuBLAS": (lambda p: p.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8"), "CUBLAS_WORKSPACE_CONFIG is set"),
    "another library": (lambda p: p.setenv("TORCH_BLAS_PREFER_CUBLASLT", "1"), "products by cuBLASLt"),
    "chosen library": (
        lambda p: p.setattr(torch.backends.cuda, "preferred_blas_library", lambda: SimpleNamespace(name="Cublaslt")),
        "products by Cublaslt",
    ),
    "another attention": (
        lambda p: p.setattr(torch.nn.functional, "scaled_dot_product_attention", lambda *a, **k: None),
        "a replaced torch.nn.functional.scaled_dot_product_attention",
    ),
    "another activation": (lambda p: p.setattr(torch.nn.functional, "silu", print_it), r"functional\.silu"),
    "no cache": (lambda p: p.setenv("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"), "no caching of memory"),
    "sums in 16 bits": (
        lambda p: (
            [p.setattr(torch.backends.cuda, n, lambda: False) for n in ("flash_sdp_enabled", "mem_efficient_sdp_enabled")],
            p.setattr(torch.backends.cuda, "fp16_bf16_reduction_math_sdp_allowed", lambda: True),
        ),
        "sums in 16 bits",
    ),
    "hooks on all": (
        lambda p: p.setitem(torch.nn.modules.module._global_forward_hooks, 0, lambda *a: None),
        "hooks on all modules",
    ),
}  # fmt: skip


@pytest.mark.parametrize("state", PROCESS)
def test_settings_of_the_process_that_change_the_number_are_named(
    pipe: Any, f: Predictor, monkeypatch: pytest.MonkeyPatch, state: str
) -> None:
    """At the call, for they may be set between two; afterwards the pipeline is covered again."""
    guarded = sdfit.guard(pipe, f, memory="80 GiB")
    before = guarded.workload(image=PICTURE, prompt="a")
    setting, words = PROCESS[state]
    with monkeypatch.context() as patch:
        setting(patch)
        with pytest.raises(NotCovered, match=words):
            guarded.workload(image=PICTURE, prompt="a")
    assert guarded.workload(image=PICTURE, prompt="a") == before


def test_tf32_is_named_where_it_matters(pipe: Any, f: Predictor, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32, where convolutions take it by default; float16 has none. Two ways of setting it mixed count as unknown."""
    guarded = sdfit.guard(pipe, f, memory="80 GiB")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    assert guarded.workload(image=PICTURE, prompt="a").dtype == "float16"
    pipe.to(torch.float32)
    with pytest.raises(NotCovered, match="float32 convolutions without TF32"):
        guarded.workload(image=PICTURE, prompt="a")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    assert guarded.workload(image=PICTURE, prompt="a").dtype == "float32"
    products = torch.backends.cuda.matmul
    for name, on, off in (("allow_tf32", True, False), ("fp32_precision", "tf32", "none")):
        setattr(products, name, on)  # the second way makes PyTorch refuse to answer by the first
        try:
            with pytest.raises(NotCovered, match="float32 matrix products in TF32"):
                guarded.workload(image=PICTURE, prompt="a")
        finally:
            setattr(products, name, off)
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
    with pytest.raises(NotCovered, match="NVIDIA_TF32_OVERRIDE"):
        guarded.workload(image=PICTURE, prompt="a")


def test_expandable_segments_are_told_of(pipe: Any, f: Predictor, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is required is then less than the models say: acting on the bound is safe, and the caller knows."""
    monkeypatch.setattr(torch._C, "_accelerator_getAllocatorSettings", lambda: "expandable_segments:True")
    with pytest.warns(ExceedsWarning, match="expandable_segments is on") as caught:
        sdfit.guard(pipe, f, memory="80 GiB").predict(image=PICTURE, prompt="a")
    assert caught[0].filename == __file__


def test_an_allocator_that_is_set_to_its_defaults_is_covered(
    pipe: Any, f: Predictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Settings without effect on what a run requires are passed over."""
    monkeypatch.setattr(
        torch._C, "_accelerator_getAllocatorSettings", lambda: "backend:native,garbage_collection_threshold:0.8"
    )
    assert sdfit.guard(pipe, f, memory="80 GiB").workload(image=PICTURE, prompt="a") == Workload(520, 776)


CALLS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"image": np.zeros((520, 776, 3)), "prompt": "a"}, {"height": 520, "width": 776}),
    ({"image": torch.zeros(3, 520, 776), "prompt": "a"}, {"height": 520, "width": 776}),
    ({"image": torch.zeros(2, 3, 64, 72), "prompt": ["a", "b"]}, {"height": 64, "width": 72, "batch_size": 2}),
    ({"image": torch.zeros(1, 4, 64, 72), "prompt": "a"}, {"height": 512, "width": 576}),
    ({"image": [PICTURE] * 2, "prompt": ["a", "b"], "num_images_per_prompt": 3}, {"batch_size": 6}),
    ({"image": PICTURE, "prompt": ["a"] * 4, "guidance_scale": 1.0}, {"batch_size": 4, "guidance_scale": 1.0}),
    (
        {"image": PICTURE, "prompt_embeds": torch.zeros(2, 154, 768), "guidance_scale": 1.0},
        {"batch_size": 2, "prompt_length": 154},
    ),
    ({"image": picture(64, 72, "RGBA"), "prompt": "a"}, {"height": 512, "width": 576}),
    ({"image": np.zeros((64, 72, 4)), "prompt": "a"}, {"height": 512, "width": 576}),
    ({"image": [PICTURE, picture(64, 64)], "prompt": ["a", "b"]}, {"height": 520, "width": 776}),
    (
        {"image": PICTURE, "prompt": "a", "strength": np.float32(0.5), "num_images_per_prompt": np.int64(2)},
        {"batch_size": 2},
    ),
    ({"image": PICTURE, "prompt": "a", "strength": 0.4, "num_inference_steps": 30, "eta": 0.1}, {"batch_size": 1}),
]


@pytest.mark.parametrize(("call", "expected"), CALLS, ids=range(len(CALLS)))
def test_a_call_is_read_off(pipe: Any, f: Predictor, call: dict[str, Any], expected: dict[str, Any]) -> None:
    """Arrays, tensors, latents (eight times smaller), lists, prompts, embeddings, images per prompt."""
    found = sdfit.guard(pipe, f, memory="80 GiB").workload(**call)
    assert {name: getattr(found, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("call", "words"),
    [
        ({"output_type": "latent"}, "output_type='latent'"),
        ({"ip_adapter_image": PICTURE}, "IP-Adapter's image"),
        ({"cross_attention_kwargs": {"gligen": 1}}, "cross_attention_kwargs"),
    ],
)
def test_a_call_that_sdfit_does_not_know_is_refused(pipe: Any, f: Predictor, call: dict[str, Any], words: str) -> None:
    """By name; autocast too."""
    guarded = sdfit.guard(pipe, f, memory="80 GiB")
    with pytest.raises(NotCovered, match=words):
        guarded(**({"image": PICTURE, "prompt": "a"} | call))
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(NotCovered, match="autocast"):
        guarded(image=PICTURE, prompt="a")
    assert pipe.runs == []


def test_a_size_beyond_the_models_is_not_covered(pipe: Any, f: Predictor) -> None:
    """diffusers runs it, sdfit has no number: refused, or run unchecked."""
    call: dict[str, Any] = {"image": picture(300, 40), "prompt": "a"}
    with pytest.raises(NotCovered, match="width is 40; it must be from 64 to 16384; run the pipeline itself"):
        sdfit.guard(pipe, f, memory="80 GiB")(**call)
    with pytest.warns(ExceedsWarning, match="not checked: width is 40"):
        assert sdfit.guard(pipe, f, memory="80 GiB", on_unknown="warn")(**call) == "pictures"


def test_its_signature_is_the_pipelines_own(pipe: Any, f: Predictor) -> None:
    """All of its keywords pass through; one that it does not take is refused with diffusers' reason; the image is needed."""
    guarded = sdfit.guard(pipe, f, memory="80 GiB")
    own = list(inspect.signature(StableDiffusionImg2ImgPipeline.__call__).parameters)[1:]
    assert list(inspect.signature(guarded).parameters) == own
    assert guarded("a cat", PICTURE, 0.5, negative_prompt="dog", generator=None) == "pictures"
    assert pipe.runs[0][:2] == (("a cat", PICTURE, 0.5), {"negative_prompt": "dog", "generator": None})
    with pytest.raises(InvalidWorkload, match="does not take this call: multiple values for argument 'prompt'"):
        guarded("a", PICTURE, prompt="b")
    with pytest.raises(InvalidWorkload, match="has no image"):
        guarded(prompt="a")


BIG: dict[str, Any] = {"image": picture(1536, 1536), "prompt": "a"}


def test_what_does_not_fit_raises_with_the_numbers(pipe: Any, f: Predictor) -> None:
    """The prediction, the cheapest changes, the amounts; nothing ran."""
    with pytest.raises(WillNotFit, match=r"and 5\.000 GiB is there; it would fit with vae_tiling=True") as caught:
        sdfit.guard(pipe, f, memory="5 GiB")(**BIG)
    assert caught.value.prediction.upper > 5 * GIB and caught.value.options[0].change == {"vae_tiling": True}
    assert caught.value.exit_code == 3 and pipe.runs == []


def test_a_loop_over_a_folder_survives(pipe: Any, f: Predictor) -> None:
    """With skip, what does not fit is None and the others are run; with warn all are, with a warning."""
    small = {"image": picture(512, 512), "prompt": "a"}
    guarded = sdfit.guard(pipe, f, memory="5 GiB", on_exceed="skip")
    assert [guarded(**call) for call in (small, BIG, small)] == ["pictures", None, "pictures"]
    with pytest.warns(ExceedsWarning, match="needs up to"):
        assert sdfit.guard(pipe, f, memory="5 GiB", on_exceed="warn")(**BIG) == "pictures"


def test_adapt_switches_on_what_suffices_and_off_again(pipe: Any, f: Predictor) -> None:
    """Tiling for that run only, said in a warning; after a run that failed it is off too."""
    guarded = sdfit.guard(pipe, f, memory="5 GiB", on_exceed="adapt")
    with pytest.warns(ExceedsWarning, match="for this run: vae_tiling=True"):
        assert guarded(**BIG) == "pictures"
    assert pipe.runs[-1][2] is True and pipe.vae.use_tiling is False
    with pytest.warns(ExceedsWarning), pytest.raises(RuntimeError, match="the run failed"):
        guarded(**BIG, strength=0.123)
    assert pipe.vae.use_tiling is False


def test_adapt_brings_fused_attention_and_takes_it_back(pipe: Any, f: Predictor) -> None:
    """From eager processors to fused ones and back to the same objects; never beyond what is allowed."""
    pipe.unet.set_attn_processor(AttnProcessor())
    pipe.vae.set_attn_processor(AttnProcessor())
    before = pipe.unet.attn_processors
    call = {"image": picture(1024, 1024), "prompt": "a"}
    with pytest.warns(ExceedsWarning, match="attention=sdpa"):
        sdfit.guard(pipe, f, memory="7 GiB", on_exceed="adapt")(**call)
    assert pipe.runs[-1][4] == {"AttnProcessor2_0"} and pipe.unet.attn_processors == before
    with pytest.raises(WillNotFit):
        sdfit.guard(pipe, f, memory="7 GiB", on_exceed="adapt", allow=("vae_slicing",))(**call)


def test_another_models_memory_is_not_free(pipe: Any, f: Predictor) -> None:
    """What counts is spare memory and the pipeline's own weights; an ask that finds less makes the same run too large."""
    need = sdfit.guard(pipe, f, memory="80 GiB").predict(**BIG).upper
    own = round(2.7 * GIB)
    for spare, fits in ((need - own + GIB, True), (need - own - 1, False)):
        guarded = sdfit.guard(pipe, f, ask=lambda pipe, spare=spare: Free(round(spare), own), on_exceed="skip")
        assert (guarded(**BIG) is not None) == fits


def test_requests_at_once_are_not_all_told_yes(pipe: Any, f: Predictor) -> None:
    """Of six that reserve at the same moment as many get it as there is room for, and afterwards all is given back."""
    prediction = sdfit.guard(pipe, f, memory="80 GiB").predict(**BIG)
    own = round(2.7 * GIB)
    each = prediction.upper - own
    guarded = sdfit.guard(pipe, f, ask=lambda pipe: Free(round(each * 2.5), own))
    together, told, hold = threading.Barrier(6), [], threading.Event()

    def request() -> None:
        together.wait()
        try:
            with guarded.reserve(**BIG):
                told.append(True)
                hold.wait(20)
        except WillNotFit:
            told.append(False)
            if told.count(False) == 4:
                hold.set()

    threads = [threading.Thread(target=request) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(told) == [False] * 4 + [True] * 2
    with guarded.reserve(**BIG) as again:
        assert again.upper == prediction.upper


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"on_exceed": "explode"}, "on_exceed is 'explode'; it must be one of raise, warn, skip, adapt"),
        ({"on_unknown": "skip"}, "on_unknown is 'skip'"),
        ({"allow": ("dtype",)}, "allow holds dtype; it may hold attention, vae_slicing, vae_tiling"),
        ({"memory": "lots"}, "not an amount of memory"),
    ],
)
def test_bad_options_are_refused_at_once(pipe: Any, f: Predictor, options: dict[str, Any], words: str) -> None:
    """When the guard is made, not at the first run."""
    with pytest.raises(InvalidWorkload, match=words):
        sdfit.guard(pipe, f, **options)


def test_memory_of_a_device_without_any_is_asked_for(pipe: Any, f: Predictor) -> None:
    """On the CPU there is nothing to ask: one sentence, with what to give."""
    with pytest.raises(InvalidWorkload, match="which has no memory to ask; give memory="):
        sdfit.guard(pipe, f)(**BIG)


@pytest.mark.parametrize(
    "words", ["sdfit.guard", "sdfit.guard.guard", "sdfit.guard.WillNotFit", "sdfit.errors.SdfitError"]
)
def test_the_guard_is_there_once_sdfit_is_imported(words: str) -> None:
    """In a fresh process ``import sdfit`` is enough to call the guard and reach its errors, without torch."""
    code = f"import sdfit, sys; print(callable({words}), 'torch' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (ran.stdout, ran.stderr) == ("True False\n", "")


def test_models_and_predictions_pickle_and_copy_after_use(f: Predictor) -> None:
    """A predictor that was called, and what it gave."""
    peak = f(512, 512, metric="required")
    assert peak.upper > 0
    for again in (pickle.loads(pickle.dumps(f)), copy.deepcopy(f)):
        assert again(512, 512, metric="required").upper == peak.upper and again.name == f.name
    assert pickle.loads(pickle.dumps(peak)).upper == copy.copy(peak).upper == peak.upper


def test_warnings_say_where_the_call_was(pipe: Any, f: Predictor) -> None:
    """A warning points at the caller's line, not into sdfit."""
    guarded = sdfit.guard(pipe, f, memory="5 GiB", on_exceed="warn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        guarded(**BIG)
    assert [w.filename for w in caught if w.category is ExceedsWarning] == [__file__]


def used(pipe: Any, f: Predictor, spare: float, own: int) -> tuple[Any, dict[str, float], Any]:
    """A guard of a made-up card, what runs hold on it, and the requirement of a run beside the pipeline's own weights."""
    held = {"run": 0.0, "other": 0.0}

    def ask(pipe: Any) -> Free:
        taken = round(held["run"] + held["other"])
        return Free(round(spare) - taken, own, own + taken)

    guarded = sdfit.guard(pipe, f, ask=ask, on_exceed="skip")
    return guarded, held, guarded.predict(**BIG).upper - own


def test_what_a_promised_run_has_taken_counts_once(pipe: Any, f: Predictor) -> None:
    """With room for 2.5 runs the second is told yes before and after the first has its memory, the third never."""
    own = round(2.7 * GIB)
    each = sdfit.guard(pipe, f, memory="80 GiB").predict(**BIG).upper - own
    guarded, held, _ = used(pipe, f, each * 2.5, own)
    with guarded.reserve(**BIG):
        for share in (0.0, 0.4, 1.0):
            held["run"] = each * share
            with guarded.reserve(**BIG), pytest.raises(WillNotFit), guarded.reserve(**BIG):
                pass
        held["other"] = each * 0.6  # more than the promised run may have taken: someone else's
        with pytest.raises(WillNotFit), guarded.reserve(**BIG):
            pass
        held.update(run=0.0, other=0.0)
    held["run"] = each * 0.6  # nothing is promised: it is another's
    with guarded.reserve(**BIG), pytest.raises(WillNotFit), guarded.reserve(**BIG):
        pass


def test_another_process_is_seen_while_runs_are_in_progress(pipe: Any, f: Predictor) -> None:
    """Its memory is no longer free, and nothing of this process has grown."""
    own, room = round(2.7 * GIB), {"spare": 0.0}
    each = sdfit.guard(pipe, f, memory="80 GiB").predict(**BIG).upper - own
    guarded = sdfit.guard(pipe, f, ask=lambda pipe: Free(round(room["spare"]), own, own))
    room["spare"] = each * 2.5
    with guarded.reserve(**BIG):
        room["spare"] = each * 1.9
        with pytest.raises(WillNotFit), guarded.reserve(**BIG):
            pass


def test_a_call_inside_its_reservation_draws_on_it(pipe: Any, f: Predictor) -> None:
    """It is not counted twice, one call at a time, in threads that take the context along; afterwards it asks again."""
    own = round(2.7 * GIB)
    each = sdfit.guard(pipe, f, memory="80 GiB").predict(**BIG).upper - own
    guarded = sdfit.guard(pipe, f, ask=lambda pipe: Free(round(each * 1.5), own), on_exceed="skip")
    with guarded.reserve(**BIG):
        assert guarded(**BIG) == guarded(**BIG) == "pictures"
        told: list[Any] = []
        context = contextvars.copy_context()
        for target in (lambda: context.run(guarded, **BIG), lambda: guarded(**BIG)):
            thread = threading.Thread(target=lambda target=target: told.append(target()))
            thread.start()
            thread.join()
        assert told == ["pictures", None], "a bare thread holds nothing"
        with guarded._draw() as held:
            assert held == pytest.approx(each) and guarded(**BIG) is None, "another call draws on it"
        huge = BIG | {"image": picture(2048, 2048)}
        assert guarded(**huge) is None, "it holds less than that call needs"
    assert guarded(**BIG) == "pictures"


def test_a_call_larger_than_its_reservation_takes_the_rest(pipe: Any, f: Predictor) -> None:
    """Where the rest is there, it runs."""
    own = round(2.7 * GIB)
    guarded = sdfit.guard(pipe, f, ask=lambda pipe: Free(20 * round(GIB), own), on_exceed="skip")
    with guarded.reserve(image=picture(512, 512), prompt="a"):
        assert guarded(**BIG) == "pictures"


def test_an_amount_holds_the_weights_once(pipe: Any, f: Predictor) -> None:
    """Two runs of one pipeline share its weights: an amount for the weights and two runs is enough for two."""
    upper = sdfit.guard(pipe, f, memory="80 GiB").predict(**BIG).upper
    own = sum(p.numel() * p.element_size() for part in components(pipe).values() for p in part.parameters())
    guarded = sdfit.guard(pipe, f, memory=2 * upper - own + 4096)
    with guarded.reserve(**BIG), guarded.reserve(**BIG), pytest.raises(WillNotFit), guarded.reserve(**BIG):
        pass
    other = sdfit.guard(pipe, f, memory=upper - 2**20)
    with pytest.raises(WillNotFit):
        other(**BIG)


def test_another_thread_sees_nothing_of_what_is_adapted(pipe: Any, f: Predictor) -> None:
    """While one run is adapted, readings of others are those of before, and their runs wait; then they run untiled."""
    small: dict[str, Any] = {"image": picture(512, 512), "prompt": "a"}
    inside, go, told = threading.Event(), threading.Event(), []
    guarded = sdfit.guard(pipe, f, memory="5 GiB", on_exceed="adapt")
    pipe.pause = lambda: (inside.set(), go.wait(20))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = threading.Thread(target=lambda: told.append(guarded(**BIG)))
        adapted.start()
        assert inside.wait(20) and pipe.vae.use_tiling
        pipe.pause = lambda: None
        assert guarded.workload(**small).vae_tiling is False
        other = threading.Thread(target=lambda: told.append(sdfit.guard(pipe, f, memory="80 GiB")(**small)))
        other.start()
        other.join(0.2)
        assert other.is_alive() and told == [], "it waits"
        go.set()
        adapted.join(20)
        other.join(20)
    assert told == ["pictures"] * 2 and [run[2] for run in pipe.runs] == [True, False] and not pipe.vae.use_tiling


def test_adapting_waits_for_runs_and_not_for_its_own(pipe: Any, f: Predictor) -> None:
    """It begins once the others are over; inside a run of the same pipeline it is refused at once, and nothing hangs."""
    small: dict[str, Any] = {"image": picture(512, 512), "prompt": "a"}
    guarded = sdfit.guard(pipe, f, memory="5 GiB", on_exceed="adapt")
    inside, go, told = threading.Event(), threading.Event(), []

    def pause() -> None:
        pipe.pause = lambda: None
        with pytest.raises(WillNotFit):
            guarded(**BIG)
        inside.set()
        go.wait(20)

    pipe.pause = pause
    first = threading.Thread(target=lambda: told.append(guarded(**small)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        first.start()
        assert inside.wait(20)
        second = threading.Thread(target=lambda: told.append(guarded(**BIG)))
        second.start()
        second.join(0.2)
        assert second.is_alive() and not pipe.vae.use_tiling
        go.set()
        first.join(20)
        second.join(20)
    assert told == ["pictures"] * 2 and [run[2] for run in pipe.runs] == [False, True]


def test_a_wait_that_is_interrupted_holds_nobody_back(pipe: Any, f: Predictor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while an adapted run waits for others: later runs begin as ever."""
    small: dict[str, Any] = {"image": picture(512, 512), "prompt": "a"}
    guarded = sdfit.guard(pipe, f, memory="5 GiB", on_exceed="adapt")

    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt

    with guarded._turns.shared():
        turns = guarded._turns
        monkeypatch.setattr(turns._changed, "wait", interrupted)
        with pytest.raises(KeyboardInterrupt), turns.alone():
            pass
        monkeypatch.undo()
    monkeypatch.setattr(StableDiffusionImg2ImgPipeline, "__call__", lambda self, *args, **kwargs: "pictures")
    ran: list[Any] = []
    thread = threading.Thread(target=lambda: ran.append(guarded(**small)), daemon=True)
    thread.start()
    thread.join(20)
    assert ran == ["pictures"]


class Card:
    """A CUDA card as far as `free_memory` asks it."""

    def __init__(self, patch: pytest.MonkeyPatch, share: float = 1.0) -> None:
        self.asked: list[str] = []
        answers = {
            "mem_get_info": (8 * GIB, 16 * GIB), "memory_allocated": 3 * GIB, "memory_reserved": 4 * GIB,
            "get_per_process_memory_fraction": share, "current_device": 1, "get_device_name": "Tesla T4",
        }  # fmt: skip
        for name, answer in answers.items():
            patch.setattr(torch.cuda, name, lambda *where, answer=answer: self.asked.extend(map(str, where)) or answer)


@pytest.mark.parametrize("device", ["cuda", "cuda:1", 1, torch.device("cuda", 1)])
def test_the_device_is_the_one_that_hooks_say(
    pipe: Any, f: Predictor, monkeypatch: pytest.MonkeyPatch, device: Any
) -> None:
    """Whether accelerate has it as a device, a name or a number, with or without its index."""
    card = Card(monkeypatch)
    for part in (pipe.text_encoder, pipe.unet, pipe.vae):
        part._hf_hook = SimpleNamespace(execution_device=device)
    assert str(device_of(pipe)) == "cuda:1"
    free = free_memory(pipe)
    assert (free.spare_bytes, free.own_bytes, free.allocated_bytes) == (9 * GIB, 0, 3 * GIB) and "cuda:1" in card.asked


def test_a_cap_on_the_process_counts(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of 16 GiB of which 3 are allocated leaves 5."""
    Card(monkeypatch, share=0.5)
    pipe.unet._hf_hook = SimpleNamespace(execution_device="cuda:1")
    assert free_memory(pipe).spare_bytes == 5 * GIB


def test_without_a_name_the_model_is_that_of_the_pipelines_card(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The card that the pipeline is on, not the machine's first; asked for at the call, for it may move there later."""
    asked: list[str] = []
    monkeypatch.setattr("sdfit.guard.guarded.load", lambda name: asked.append(name) or sdfit.load("t4"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        guarded = sdfit.guard(pipe, memory="80 GiB")
        assert guarded.predict(image=PICTURE, prompt="a").upper > 0 and asked == ["auto"]
        Card(monkeypatch)
        for part in (pipe.text_encoder, pipe.unet, pipe.vae):
            part._hf_hook = SimpleNamespace(execution_device="cuda:1")
        assert guarded.model.name and asked == ["auto", "Tesla T4"]


def test_guards_pickle_and_copy(whole: Any, f: Predictor) -> None:
    """A copy guards the same pipeline with the same options; a deep one, and one from a pickle, the copy of it within."""
    guarded = sdfit.guard(whole, f, memory="80 GiB", on_exceed="skip", allow=("vae_tiling",))
    before = guarded.predict(**BIG).upper
    shallow, deep, stored = copy.copy(guarded), copy.deepcopy(guarded), pickle.loads(pickle.dumps(guarded))
    assert shallow.pipe is whole and deep.pipe is not whole and stored.pipe is not whole
    for again in (shallow, deep, stored):
        assert (again.on_exceed, again.memory, again.allow) == ("skip", "80 GiB", ("vae_tiling",))
        assert again.predict(**BIG).upper == before


def test_code_that_a_run_calls_back_is_told_of(whole: Any, f: Predictor) -> None:
    """What it takes cannot be known; diffusers' own callbacks take nothing."""
    guarded = sdfit.guard(whole, f, memory="80 GiB")
    call: dict[str, Any] = {"image": PICTURE, "prompt": "a"}
    with pytest.warns(ExceedsWarning, match="what callback_on_step_end itself takes is not in the number"):
        guarded.predict(**call, callback_on_step_end=lambda *args: {})
    with pytest.warns(ExceedsWarning, match="what callback itself takes"):
        guarded.predict(**call, callback=print)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        guarded.predict(**call, callback_on_step_end=SDCFGCutoffCallback(cutoff_step_ratio=0.4))


def test_a_picture_that_is_taken_for_latents_is_told_of(pipe: Any, f: Predictor) -> None:
    """Once, at the caller's line, with what to type."""
    guarded = sdfit.guard(pipe, f, memory="80 GiB", on_exceed="skip")
    call: dict[str, Any] = {"image": picture(64, 64, "RGBA"), "prompt": "a"}
    with pytest.warns(ExceedsWarning, match=r"mode 'RGBA' for latents.* makes 512x512 .*\.convert\('RGB'\)") as caught:
        guarded(**call)
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        guarded(**call)
    with pytest.warns(ExceedsWarning) as caught, copy.copy(guarded).reserve(**call):
        pass
    assert caught[0].filename == __file__
