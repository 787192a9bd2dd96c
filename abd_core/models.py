"""CLIPs through open_clip and safetensors: build, load, save; nothing pickled is ever read."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import open_clip
import torch
from open_clip.transform import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.nn.attention import SDPBackend, sdpa_kernel

from abd_core.config import unknown
from abd_core.kernels.perturb import perturb
from abd_core.paths import RunError, atomic, data_dir, regular

open_clip.add_model_config(Path(__file__).parent / "model_configs")

NORMALISATION = (OPENAI_DATASET_MEAN, OPENAI_DATASET_STD)
EMBEDDED = "emoji-rn14"  # the embedded benchmark's architecture, abd_core/model_configs/emoji-rn14.json


def device() -> torch.device:
    """The GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def autocast(on: torch.device | None = None) -> torch.autocast:
    """bf16 mixed precision where the device computes in it, else a context that changes nothing."""
    on = on or device()
    if on.type == "cpu":
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    else:
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.autocast(on.type, torch.bfloat16, enabled=native)


def build(name: str = EMBEDDED, *, seed: int = 0) -> open_clip.CLIP:
    """A freshly initialised CLIP of an open_clip architecture, in eval mode.

    Raises:
        ConfigError: open_clip knows no architecture of that name.
    """
    if name not in open_clip.list_models():
        raise unknown("model", name, open_clip.list_models())
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        logging.disable(logging.WARNING)  # open_clip warns that the weights are random: they are meant to be
        try:
            model = open_clip.create_model(name, load_weights=False)
        finally:
            logging.disable(logging.NOTSET)
    return model.to(device(), memory_format=torch.channels_last).eval()


def clean_weights() -> Path:
    """The published clean weights of the embedded benchmark (`pretrain` made them)."""
    return data_dir() / "base" / "model.safetensors"


def save(model: open_clip.CLIP, path: Path, *, name: str = EMBEDDED, half: bool = False) -> None:
    """Weights as safetensors with the architecture's name; `half` stores floats as fp16."""

    def stored(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.detach().cpu().contiguous()
        return tensor.half() if half and tensor.is_floating_point() else tensor

    with atomic(path) as temporary:
        weights = {key: stored(tensor) for key, tensor in model.state_dict().items()}
        save_file(weights, temporary, metadata={"model": name})


def load(path: Path) -> open_clip.CLIP:
    """The CLIP stored at `path` by `save`, in eval mode.

    Raises:
        RunError: the file is missing, is no safetensors file, or its tensors do not fit the architecture that it names.
    """
    regular(path)
    try:
        with safe_open(path, framework="pt") as f:
            name = (f.metadata() or {}).get("model", "")
            weights = {key: f.get_tensor(key) for key in f.keys()}  # noqa: SIM118 (safe_open is no mapping)
    except (OSError, SafetensorError, ValueError) as error:
        raise RunError(f"damaged file: {path}: not safetensors ({error})") from None
    if name not in open_clip.list_models():
        raise RunError(f"{path}: its metadata names the model {name!r}, which open_clip does not know")
    model = build(name)
    expected = {key: tuple(t.shape) for key, t in model.state_dict().items()}
    stored = {key: tuple(t.shape) for key, t in weights.items()}
    if stored != expected:
        key = min(key for key, _ in stored.items() ^ expected.items())
        raise RunError(f"{path}: tensor {key} is {stored.get(key)}, but {name} needs {expected.get(key)}")
    bad = next((key for key, t in weights.items() if not torch.isfinite(t.float()).all()), None)
    if bad:
        raise RunError(f"{path}: tensor {bad} holds NaN or infinity")
    model.load_state_dict(weights)
    return model


def frozen(model: open_clip.CLIP) -> open_clip.CLIP:
    """The same model in eval mode without gradients for its weights."""
    return model.eval().requires_grad_(False)


def resolution(model: open_clip.CLIP) -> int:
    """Side of the model's input images in pixels."""
    size = model.visual.image_size
    return size[0] if isinstance(size, Sequence) else size


def encode_image(model: open_clip.CLIP, images: torch.Tensor) -> torch.Tensor:
    """Unit image features, float32 (B, D), of images (B, 3, H, W), floats in [0, 1] or uint8; normalised as CLIP's."""
    images = images.to(next(model.parameters()).device)
    kind = images.device.type
    with autocast(images.device):
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        features = model.encode_image(perturb(images, normalise=NORMALISATION, dtype=dtype, channels_last=True))
    return torch.nn.functional.normalize(features.float(), dim=-1)


def encode_text(model: open_clip.CLIP, tokens: torch.Tensor) -> torch.Tensor:
    """Unit text features, float32 (B, D), of tokens (B, context_length)."""
    tokens = tokens.to(next(model.parameters()).device)
    # On the CPU the plain attention is the faster one for captions: its backward takes a third of the fused one's time.
    plain = sdpa_kernel(SDPBackend.MATH) if tokens.device.type == "cpu" else nullcontext()
    with autocast(tokens.device), plain:
        features = model.encode_text(tokens)
    return torch.nn.functional.normalize(features.float(), dim=-1)
