"""What was set by hand on a module of a component: what cannot matter is passed over, all else is named with where it is."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("diffusers")

import torch
from tiny import TINY

from sdfit.backends.pipeline import build_pipeline
from sdfit.backends.trace.tracer import Tracer
from sdfit.predict.built import IGNORED, altered
from sdfit.workload import Workload

BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"


def another(value: Any) -> Any:
    """A value of the same kind, where there is one."""
    if isinstance(value, bool):
        return not value
    return value * 2 + 1 if isinstance(value, int | float) else "another"


def test_what_is_passed_over_changes_no_block() -> None:
    """With another value of every such attribute in every module a run makes the same blocks, one by one."""
    tracer, workload = Tracer(settings=TINY), Workload(64, 64)
    before = tracer.run(workload, keep_events=True).events
    changed = set()
    pipe = tracer.pipeline(workload)
    for part in (pipe.unet, pipe.vae, pipe.text_encoder, pipe.safety_checker):
        for module in part.modules():
            for name in vars(module).keys() & IGNORED - {"use_slicing", "use_tiling"}:
                vars(module)[name] = another(vars(module)[name])
                changed.add(name)
    assert {"eps", "training", "output_scale_factor", "tile_sample_min_size", "in_features"} <= changed
    assert before and tracer.run(workload, keep_events=True).events == before


CHANGES: dict[str, tuple[str, Callable[[Any], Any], str]] = {
    "heads": ("unet", lambda m: setattr(m.get_submodule(f"{BLOCK}.attn1"), "heads", 1), f"heads=1 (built with 8) in unet.{BLOCK}.attn1"),
    "groups": ("vae", lambda m: setattr(m.decoder.conv_norm_out, "num_groups", 8), "num_groups=8 (built with 32) in vae.decoder.conv_norm_out"),
    "stride": ("unet", lambda m: setattr(m.conv_in, "stride", [2, 2]), "stride=[2, 2] (built with (1, 1)) in unet.conv_in"),
    "padding": ("vae", lambda m: setattr(m.encoder.conv_in, "padding", (0, 0)), "padding=(0, 0) (built with (1, 1)) in vae.encoder.conv_in"),
    "in place": ("unet", lambda m: [setattr(a, "inplace", True) for a in m.modules() if isinstance(a, torch.nn.SiLU)], "inplace=True (built with False) in unet.time_embedding.act and 9 more"),
    "residual": ("vae", lambda m: setattr(m.decoder.mid_block.attentions[0], "residual_connection", False), "residual_connection=False (built with True) in vae.decoder.mid_block.attentions.0"),
    "cross attention only": ("unet", lambda m: setattr(m.get_submodule(BLOCK), "only_cross_attention", True), f"only_cross_attention=True (built with False) in unet.{BLOCK}"),
    "upsampling": ("unet", lambda m: setattr(m.up_blocks[0].upsamplers[0], "use_conv", False), "use_conv=False (built with True) in unet.up_blocks.0.upsamplers.0"),
    "a tensor": ("unet", lambda m: setattr(m.get_submodule(f"{BLOCK}.attn1"), "heads", torch.ones(2)), f"heads=a Tensor (built with 8) in unet.{BLOCK}.attn1"),
    "a deleted one": ("unet", lambda m: delattr(m.conv_in, "groups"), "groups=None (built with 1) in unet.conv_in"),
    "on a class": ("unet", lambda m: setattr(m, "_supports_gradient_checkpointing", 7), "_supports_gradient_checkpointing=7 (built with None) in unet"),
    "float32": ("unet", lambda m: setattr(m.get_submodule(f"{BLOCK}.attn2"), "upcast_softmax", True), "attention in float32 in the unet"),
    "FreeU": ("unet", lambda m: setattr(m.up_blocks[0], "s1", 0.9), "FreeU in the unet"),
    "another activation": ("unet", lambda m: setattr(m, "conv_act", torch.nn.ReLU()), "a ReLU, built as a SiLU in unet.conv_act"),
    "one more": ("unet", lambda m: setattr(m.get_submodule(f"{BLOCK}.attn1"), "spatial_norm", torch.nn.Identity()), f"a Identity, which is built without one in unet.{BLOCK}.attn1.spatial_norm"),
    "one less": ("unet", lambda m: setattr(m, "conv_act", None), "no SiLU in unet.conv_act"),
    "eager text encoder": ("text_encoder", lambda m: m.set_attn_implementation("eager"), "attention by 'eager' (built with 'sdpa') in text_encoder and 5 more"),
    "scaling of scores": ("text_encoder", lambda m: [setattr(a, "is_causal", True) for a in m.modules() if hasattr(a, "is_causal")], "is_causal=True (built with False) in text_encoder.encoder.layers.0.self_attn and 1 more"),
}  # fmt: skip


@pytest.fixture(scope="module")
def tiny() -> Any:
    return build_pipeline(
        dtype="float16", device="meta", settings=TINY | {"unet": TINY["unet"] | {"attention_head_dim": 8}}
    )


@pytest.mark.parametrize("kind", CHANGES)
def test_what_was_set_by_hand_is_named_with_its_place(tiny: Any, kind: str) -> None:
    """And with what it is as built; nothing else is."""
    part, change, words = CHANGES[kind]
    module = copy.deepcopy(getattr(tiny, part))
    assert list(altered(part, module, explained=False)) == []
    change(module)
    assert [text for text in altered(part, module, explained=False) if text != "attention in float32"] == [words]


def test_attributes_of_nobodys_are_passed_over(tiny: Any) -> None:
    """A name that no code of the library looks for, and a switch that is off."""
    module = copy.deepcopy(tiny.unet)
    module.note, module.up_blocks[0].s1, module.is_quantized = "mine", None, False
    assert list(altered("unet", module, explained=False)) == []


def test_what_cannot_be_built_again_is_said(tiny: Any) -> None:
    """A configuration that its class does not take."""
    module = copy.deepcopy(tiny.unet)
    module.register_to_config(block_out_channels=(32,))
    found = list(altered("unet", module, explained=False))
    assert len(found) == 1 and found[0].startswith(
        "a unet that UNet2DConditionModel does not build from its configuration ("
    )
