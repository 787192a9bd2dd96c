"""Hugging Face's `CLIPModel` and open_clip's `CLIP`: one network under two sets of names, converted both ways.

A `CLIPModel` has a plain vision transformer: open_clip's ResNets, and transformers with other poolings, have no
counterpart there.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import open_clip
import torch
from open_clip.transform import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD

from abd_core.paths import RunError

# What a CLIPModel's config.json leaves out is this (transformers' CLIPTextConfig, CLIPVisionConfig).
_TEXT = {
    "vocab_size": 49408,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
_VISION = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 32,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
_EMBED_DIM = 512
# open_clip's settings that a CLIPModel has a counterpart for.
_VISION_CFG = {"layers", "width", "head_width", "mlp_ratio", "patch_size", "image_size"}
_TEXT_CFG = {"layers", "width", "heads", "mlp_ratio", "context_length", "vocab_size"}

# (open_clip, Hugging Face) outside the layers; a projection is stored transposed.
_OUTSIDE = (
    ("logit_scale", "logit_scale"),
    ("token_embedding.weight", "text_model.embeddings.token_embedding.weight"),
    ("positional_embedding", "text_model.embeddings.position_embedding.weight"),
    ("ln_final.weight", "text_model.final_layer_norm.weight"),
    ("ln_final.bias", "text_model.final_layer_norm.bias"),
    ("text_projection", "text_projection.weight"),
    ("visual.class_embedding", "vision_model.embeddings.class_embedding"),
    ("visual.conv1.weight", "vision_model.embeddings.patch_embedding.weight"),
    ("visual.positional_embedding", "vision_model.embeddings.position_embedding.weight"),
    ("visual.ln_pre.weight", "vision_model.pre_layrnorm.weight"),
    ("visual.ln_pre.bias", "vision_model.pre_layrnorm.bias"),
    ("visual.ln_post.weight", "vision_model.post_layernorm.weight"),
    ("visual.ln_post.bias", "vision_model.post_layernorm.bias"),
    ("visual.proj", "visual_projection.weight"),
)
_TRANSPOSED = {"text_projection", "visual.proj"}
_TOWERS = (
    ("transformer.resblocks.", "text_model.encoder.layers."),
    ("visual.transformer.resblocks.", "vision_model.encoder.layers."),
)
_IN_LAYER = (
    ("ln_1.", "layer_norm1."),
    ("ln_2.", "layer_norm2."),
    ("mlp.c_fc.", "mlp.fc1."),
    ("mlp.c_proj.", "mlp.fc2."),
    ("attn.out_proj.", "self_attn.out_proj."),
)


def _merged(config: Mapping[str, Any], part: str, defaults: Mapping[str, Any]) -> dict[str, Any]:
    return {**defaults, **(config.get(f"{part}_config") or {}), **(config.get(f"{part}_config_dict") or {})}


def quick_gelu(config: Mapping[str, Any]) -> bool:
    """Whether a `CLIPModel` with this config computes QuickGELU."""
    return bool(_merged(config, "vision", _VISION)["hidden_act"] == "quick_gelu")


def architecture(config: Any, *, where: str) -> str:
    """The open_clip architecture that a `CLIPModel`'s config describes.

    Raises:
        RunError: it is another model's config, or open_clip has no such architecture.
    """
    if not isinstance(config, dict) or config.get("model_type") != "clip":
        raise RunError(f"{where}: not the config of a Hugging Face CLIPModel (model_type 'clip')")
    text, vision = _merged(config, "text", _TEXT), _merged(config, "vision", _VISION)
    wanted = _compared(text), _compared(vision), config.get("projection_dim", _EMBED_DIM)
    for name in open_clip.list_models():
        described = describe(open_clip.get_model_config(name))
        if described is not None:
            ours = _merged(described, "text", {}), _merged(described, "vision", {})
            if (_compared(ours[0]), _compared(ours[1]), described["projection_dim"]) == wanted:
                return name
    shape = f"{vision['num_hidden_layers']} layers of {vision['hidden_size']} on patches of {vision['patch_size']} px"
    raise RunError(
        f"{where}: open_clip has no architecture of this shape ({shape}, {vision['hidden_act']}): describe it in a "
        "JSON file as open_clip does, and pass that to open_clip.add_model_config first"
    )


def _compared(part: Mapping[str, Any]) -> dict[str, Any]:
    return {name: part[name] for name in (_VISION if "patch_size" in part else _TEXT)}


def describe(cfg: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The config of the `CLIPModel` that computes what open_clip's architecture `cfg` does; None where none can."""
    if cfg is None or set(cfg) - {"embed_dim", "quick_gelu", "vision_cfg", "text_cfg"}:
        return None
    vision, text = cfg["vision_cfg"], cfg["text_cfg"]
    if set(vision) - _VISION_CFG or set(text) - _TEXT_CFG or not isinstance(vision.get("layers"), int):
        return None
    vision = {"mlp_ratio": 4.0, "head_width": 64, **vision}
    text = {"mlp_ratio": 4.0, "context_length": 77, "vocab_size": 49408, **text}
    shared = {"hidden_act": "quick_gelu" if cfg.get("quick_gelu") else "gelu", "layer_norm_eps": 1e-5}
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": cfg["embed_dim"],
        "text_config": {
            "model_type": "clip_text_model",
            "vocab_size": text["vocab_size"],
            "hidden_size": text["width"],
            "intermediate_size": int(text["width"] * text["mlp_ratio"]),
            "num_hidden_layers": text["layers"],
            "num_attention_heads": text["heads"],
            "max_position_embeddings": text["context_length"],
            "bos_token_id": 49406,
            "eos_token_id": 49407,
            **shared,
        },
        "vision_config": {
            "model_type": "clip_vision_model",
            "hidden_size": vision["width"],
            "intermediate_size": int(vision["width"] * vision["mlp_ratio"]),
            "num_hidden_layers": vision["layers"],
            "num_attention_heads": vision["width"] // vision["head_width"],
            "image_size": vision["image_size"],
            "patch_size": vision["patch_size"],
            **shared,
        },
    }


def preprocessor(side: int) -> dict[str, Any]:
    """The `preprocessor_config.json` of images of `side` pixels."""
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": side},
        "resample": 3,  # bicubic
        "do_center_crop": True,
        "crop_size": {"height": side, "width": side},
        "do_rescale": True,
        "do_normalize": True,
        "image_mean": list(OPENAI_DATASET_MEAN),
        "image_std": list(OPENAI_DATASET_STD),
        "do_convert_rgb": True,
    }


def to_open_clip(weights: Mapping[str, torch.Tensor], *, where: str) -> dict[str, torch.Tensor]:
    """A `CLIPModel`'s weights under open_clip's names: query, key and value joined, projections transposed.

    Raises:
        RunError: a tensor has no counterpart, is missing beside its fellows, or does not go with them.
    """
    ours: dict[str, torch.Tensor] = {}
    outside = {theirs: name for name, theirs in _OUTSIDE}
    for name, tensor in weights.items():
        if name.endswith("position_ids"):  # a buffer that older versions stored
            continue
        if name in outside:
            ours[outside[name]] = tensor.T if outside[name] in _TRANSPOSED and tensor.ndim == 2 else tensor
            continue
        for tower, prefix in _TOWERS:
            if match := re.fullmatch(rf"{re.escape(prefix)}(\d+)\.(.+)", name):
                layer, rest = f"{tower}{match[1]}.", match[2]
                break
        else:
            raise RunError(f"{where}: tensor {name} has no counterpart in open_clip's CLIP")
        if joined := re.fullmatch(r"self_attn\.([qkv])_proj\.(weight|bias)", rest):
            if joined[1] == "q":
                fellows = [name.replace(".q_proj.", f".{part}_proj.") for part in "qkv"]
                if missing := [fellow for fellow in fellows if fellow not in weights]:
                    raise RunError(f"{where}: tensor {missing[0]} is missing")
                parts = [weights[fellow] for fellow in fellows]
                if parts[0].ndim == 0 or len({part.shape for part in parts}) > 1:
                    raise RunError(f"{where}: tensor {name} and its fellows for key and value differ in shape")
                ours[f"{layer}attn.in_proj_{joined[2]}"] = torch.cat(parts)
            continue
        for inner, theirs in _IN_LAYER:
            if rest.startswith(theirs):
                ours[layer + inner + rest.removeprefix(theirs)] = tensor
                break
        else:
            raise RunError(f"{where}: tensor {name} has no counterpart in open_clip's CLIP")
    return ours


def from_open_clip(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The inverse of `to_open_clip`, for an architecture that `describe` knows."""
    theirs: dict[str, torch.Tensor] = {}
    outside = dict(_OUTSIDE)
    for name, tensor in weights.items():
        if name in outside:
            theirs[outside[name]] = (tensor.T if name in _TRANSPOSED else tensor).contiguous()
            continue
        for tower, prefix in _TOWERS:
            if match := re.fullmatch(rf"{re.escape(tower)}(\d+)\.(.+)", name):
                layer, rest = f"{prefix}{match[1]}.", match[2]
                break
        else:
            raise ValueError(f"from_open_clip: {name} has no counterpart")
        if rest.startswith("attn.in_proj_"):
            kind = rest.removeprefix("attn.in_proj_")
            for part, piece in zip("qkv", tensor.chunk(3), strict=True):
                theirs[f"{layer}self_attn.{part}_proj.{kind}"] = piece.contiguous()
            continue
        inner, outer = next(pair for pair in _IN_LAYER if rest.startswith(pair[0]))
        theirs[layer + outer + rest.removeprefix(inner)] = tensor
    return theirs
