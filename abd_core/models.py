"""CLIPs through open_clip and safetensors: build, load, save; no code in a file is ever executed."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.transform import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from safetensors.torch import save_file

from abd_core import checkpoints, ranks, towers
from abd_core.config import ConfigError, digest, unknown
from abd_core.kernels.dispatch import sent
from abd_core.kernels.perturb import perturb
from abd_core.paths import RunError, atomic, cache_dir, data_dir, sha256

open_clip.add_model_config(Path(__file__).parent / "model_configs")

NORMALISATION = (OPENAI_DATASET_MEAN, OPENAI_DATASET_STD)
EMBEDDED = "emoji-rn14"  # the embedded benchmark's architecture, abd_core/model_configs/emoji-rn14.json
FOREIGN = "RN50-quickgelu"  # of weights that do not say what they are: the paper's


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
    """A freshly initialised CLIP of an open_clip architecture, in eval mode; its `architecture` is that name.

    Raises:
        ConfigError: open_clip knows no architecture of that name, or it is no plain CLIP with CLIP's own tokens.
    """
    if name not in open_clip.list_models():
        raise unknown("model", name, open_clip.list_models())
    if not _plain(name):
        raise ConfigError(f"model {name!r}: only architectures with CLIP's own text tower and tokeniser can be used")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        logging.disable(logging.WARNING)  # open_clip warns that the weights are random: they are meant to be
        try:
            model = open_clip.create_model(name, load_weights=False)
        finally:
            logging.disable(logging.NOTSET)
    towers.trim(model)
    model.architecture = name
    return model.to(device(), memory_format=torch.channels_last).eval()


def architectures() -> list[str]:
    """open_clip's architectures that `build` takes."""
    return [name for name in open_clip.list_models() if _plain(name)]


def _plain(name: str) -> bool:
    """Whether it is a CLIP with CLIP's own text tower and tokeniser."""
    cfg = open_clip.get_model_config(name)
    own_text = {"hf_model_name", "hf_tokenizer_name", "tokenizer_kwargs"} & set(cfg["text_cfg"])
    return not (own_text or "multimodal_cfg" in cfg or cfg.get("custom_text") or "init_logit_bias" in cfg)


def clean_weights() -> Path:
    """The published clean weights of the embedded benchmark (`pretrain` made them)."""
    return data_dir() / "base" / "model.safetensors"


def pretrained_weights(name: str, pretrained: str) -> Path:
    """The weights that a stage starts from, as one file that names its architecture.

    Args:
        name: open_clip architecture; "" where the weights tell, or else `FOREIGN`.
        pretrained: "" (the embedded benchmark's clean base), a file or folder of any kind that `checkpoints.read`
            reads, or one of open_clip's tags for `name` (e.g. "openai"), which is downloaded once.

    Raises:
        ConfigError: neither a path nor a tag of that architecture, or a tag for images normalised in another way.
        RunError: as `load`; or a tag's weights could not be downloaded.
    """
    if not pretrained:
        if name not in ("", EMBEDDED):
            raise ConfigError(f"pretrained = '': the embedded weights are of {EMBEDDED!r}, not of {name!r}")
        return clean_weights()
    path = Path(pretrained).expanduser()
    tag = {}
    if not path.exists():
        tags = open_clip.list_pretrained_tags_by_model(name)
        if pretrained not in tags:
            allowed = f"a path, or one of {', '.join(tags)}" if tags else "a path"
            raise ConfigError(f"pretrained = {pretrained!r}: no such file, and no tag of {name!r}: {allowed} expected")
        tag = open_clip.pretrained.get_pretrained_cfg(name, pretrained)
        if (tuple(tag["mean"]), tuple(tag["std"])) != NORMALISATION:
            raise ConfigError(f"pretrained = {pretrained!r}: its images are not normalised as CLIP's")
        try:
            path = Path(open_clip.pretrained.download_pretrained(tag))
        except Exception as error:  # of several libraries
            reason = " ".join(str(error).split())[:200]
            raise RunError(f"{name}, {pretrained}: no download: {type(error).__name__} {reason}") from None
    if path.is_file() and path.suffix.lower() == ".safetensors" and (own := checkpoints.read(path).name):
        _check_name(name, own, path)
        return path  # one of ours
    parts = sorted(p for p in path.iterdir() if p.is_file()) if path.is_dir() else [path]
    key = digest([name, [sha256(part) for part in parts]])[:16]
    stored = cache_dir() / f"{path.stem}-{key}.safetensors"
    if ranks.agreed(not stored.exists()):
        model = load(path, name=name, quick_gelu=tag.get("quick_gelu", False) if tag else None)
        save(model, stored)
    ranks.barrier()  # of several, the first one's is kept
    return stored


def save(model: open_clip.CLIP, path: Path, *, name: str = "", half: bool = False) -> None:
    """Weights as safetensors with the architecture's name (default: the model's own); `half` stores floats as fp16."""

    def stored(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.detach().cpu().contiguous()
        return tensor.half() if half and tensor.is_floating_point() else tensor

    if ranks.first():
        with atomic(path) as temporary:
            weights = {key: stored(tensor) for key, tensor in model.state_dict().items()}
            save_file(weights, temporary, metadata={"model": name or model.architecture})
    ranks.barrier()


def load(path: Path, *, name: str = "", quick_gelu: bool | None = None) -> open_clip.CLIP:
    """The CLIP stored at `path`, in eval mode: one of `save`, or one that others stored (see `checkpoints`).

    Where it is known that the weights were trained with another activation than the architecture's (QuickGELU against
    GELU: a loss of accuracy that nothing else shows), a warning says so; where the file does not tell, it says which
    one is computed.

    Args:
        name: its open_clip architecture; "": the one that the file names, or else `FOREIGN`.
        quick_gelu: whether the weights were trained with QuickGELU; None: as far as the file tells.

    Raises:
        RunError: the file is missing, damaged, or names another architecture; its tensors do not fit the architecture;
            or one of them holds NaN or infinity.
        ConfigError: open_clip knows no architecture `name`.
    """
    checkpoint = checkpoints.read(path)
    _check_name(name, checkpoint.name, path)
    name = name or checkpoint.name or FOREIGN
    model = build(name)
    model.load_state_dict(_fitting(checkpoint.weights, model, path))
    _say_activation(name, checkpoint, quick_gelu, path)
    return model


def _check_name(asked: str, stored: str, path: Path) -> None:
    """Whether a file's own name of its architecture is known, and the one that is asked for; "" is any."""
    if stored and stored not in open_clip.list_models():
        raise RunError(f"{path}: its metadata names the model {stored!r}, which open_clip does not know")
    if asked and stored not in ("", asked) and not _same_but_activation(asked, stored):
        raise RunError(f"{path}: holds the model {stored!r}, not {asked!r}")


def _fitting(weights: Mapping[str, torch.Tensor], model: open_clip.CLIP, path: Path) -> dict[str, torch.Tensor]:
    """The weights where they are all that the model needs. Raises RunError, naming a tensor, where they are not."""
    needed, fitting = model.state_dict(), dict(weights)
    for key, tensor in needed.items():
        if key.endswith("num_batches_tracked"):  # a counter that plays no part; some formats leave it out
            fitting.setdefault(key, torch.zeros_like(tensor))
    if "logit_scale" in fitting and fitting["logit_scale"].numel() == 1:  # (1,) in some
        fitting["logit_scale"] = fitting["logit_scale"].reshape(needed["logit_scale"].shape)
    expected = {key: tuple(t.shape) for key, t in needed.items()}
    stored = {key: tuple(t.shape) for key, t in fitting.items()}
    if stored != expected:
        key = min(key for key, _ in stored.items() ^ expected.items())
        raise RunError(f"{path}: tensor {key} is {stored.get(key)}, but {model.architecture} needs {expected.get(key)}")
    bad = next((key for key, t in fitting.items() if not torch.isfinite(t.float()).all()), None)
    if bad:
        raise RunError(f"{path}: tensor {bad} holds NaN or infinity")
    return fitting


def _cfg(name: str) -> dict[str, Any]:
    """open_clip's settings of an architecture, `quick_gelu` always among them."""
    return {"quick_gelu": False, **open_clip.get_model_config(name)}


def _same_but_activation(one: str, other: str) -> bool:
    return {**_cfg(one), "quick_gelu": None} == {**_cfg(other), "quick_gelu": None}


def _say_activation(name: str, checkpoint: checkpoints.Checkpoint, quick_gelu: bool | None, path: Path) -> None:
    """Warn where the weights were trained with another activation than `name` computes, or do not say with which."""
    if quick_gelu is None:
        quick_gelu = _cfg(checkpoint.name)["quick_gelu"] if checkpoint.name else checkpoint.quick_gelu
    titles, here = {True: "QuickGELU", False: "GELU"}, _cfg(name)["quick_gelu"]
    if quick_gelu == here:
        return
    twins = [twin for twin in open_clip.list_models() if twin != name and _same_but_activation(twin, name)]
    if quick_gelu is not None:
        hint = f": use model {twins[0]!r}" if twins else ""
        text = f"trained with {titles[quick_gelu]}, but {name} computes {titles[here]}{hint}"
    else:
        text = f"does not say its activation; {name} computes {titles[here]}"
        if twins:
            text += f": use model {twins[0]!r} where it was trained with {titles[not here]}"
        if not here and isinstance(_cfg(name)["vision_cfg"].get("layers"), list):
            text += ", as the ResNets of OpenAI, open_clip and CleanCLIP's code were"
    warnings.warn(f"{path}: {text}", stacklevel=3)


def frozen(model: open_clip.CLIP) -> open_clip.CLIP:
    """The same model in eval mode without gradients for its weights."""
    return model.eval().requires_grad_(False)


def output_projection(model: open_clip.CLIP) -> torch.Tensor | None:
    """The image tower's last weights, (D, W), from W hidden features to D; None where it ends in another way."""
    visual = model.visual
    if (projection := getattr(visual, "proj", None)) is not None:  # a ViT's, stored the other way round
        return projection.T
    pool = getattr(visual, "attnpool", None)  # a ResNet's
    return None if pool is None else pool.c_proj.weight


def resolution(model: open_clip.CLIP) -> int:
    """Side of the model's input images in pixels."""
    size = model.visual.image_size
    return size[0] if isinstance(size, Sequence) else size


def _unit(features: torch.Tensor) -> torch.Tensor:
    wide = features if features.dtype == torch.float64 else features.float()
    return torch.nn.functional.normalize(wide, dim=-1)


def encode_image(model: open_clip.CLIP, images: torch.Tensor) -> torch.Tensor:
    """Unit image features, (B, D), of images (B, 3, H, W), floats in [0, 1] or uint8; normalised as CLIP's.

    They are float32 (float64 of a float64 model). In a batch that ranks share, each encodes its part (`ranks`).
    """

    def encode(images: torch.Tensor) -> torch.Tensor:
        images = sent(images, next(model.parameters()).device)
        kind = images.device.type
        with autocast(images.device):
            own = next(model.parameters()).dtype
            dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else own
            return _unit(model.encode_image(perturb(images, normalise=NORMALISATION, dtype=dtype, channels_last=True)))

    return ranks.encoded(encode, images, model)


def encode_text(model: open_clip.CLIP, tokens: torch.Tensor) -> torch.Tensor:
    """Unit text features, (B, D), of tokens (B, context_length); float32 (float64 of a float64 model)."""

    def encode(tokens: torch.Tensor) -> torch.Tensor:
        tokens = sent(tokens, next(model.parameters()).device)
        with autocast(tokens.device):
            return _unit(towers.encode_text(model, tokens))

    return ranks.encoded(encode, tokens, model)
