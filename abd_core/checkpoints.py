"""CLIP weights as others store them, read into open_clip's names; no code in a file is ever executed.

Read are safetensors (open_clip's, this package's), PyTorch files (`.pt`, `.pth`, `.bin`, `.ckpt`: open_clip's,
CleanCLIP's, BadCLIP's and RoCLIP's training checkpoints, plain state dicts, OpenAI's TorchScript archives) and folders
of a Hugging Face `CLIPModel`. PyTorch files are unpickled with nothing but tensors and plain containers allowed.
"""

from __future__ import annotations

import collections
import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open

from abd_core import huggingface
from abd_core.paths import RunError, read_json, regular, unpacked

PICKLED = (".pt", ".pth", ".bin", ".ckpt")
_NESTED = ("state_dict", "model", "model_state_dict")  # where training checkpoints keep their weights
_WRAPPERS = ("module.", "_orig_mod.")  # DistributedDataParallel, torch.compile, in either order
# Stored by OpenAI beside the weights, which are those of QuickGELU; and buffers that older versions stored.
_OPENAI = ("input_resolution", "context_length", "vocab_size")
_BUFFERS = ("attn_mask",)


@dataclass(frozen=True)
class Checkpoint:
    """What a file holds.

    Attributes:
        weights: tensors under open_clip's names.
        name: the open_clip architecture that the file itself names or describes; "" where it does not.
        quick_gelu: whether the weights were trained with QuickGELU; None where the file does not tell.
    """

    weights: dict[str, torch.Tensor]
    name: str = ""
    quick_gelu: bool | None = None


def read(path: Path) -> Checkpoint:
    """The weights at `path`: a file, or a folder of a Hugging Face `CLIPModel`.

    Raises:
        RunError: it is missing, damaged, of another kind, or cannot be read without executing code in it.
    """
    if path.is_dir():
        return _folder(path)
    regular(path)
    if path.suffix.lower() not in PICKLED:
        weights, metadata = _safetensors(path)
        return Checkpoint(_plain(weights, path), metadata.get("model", ""))
    record = _script_archive(path) if _is_script_archive(path) else _pickled(path)
    for name in _NESTED:
        if isinstance(record, Mapping) and isinstance(record.get(name), Mapping):
            record = record[name]
            break
    weights = _plain(record, path)
    return Checkpoint(weights, quick_gelu=True if _from_openai(record) else None)


def _safetensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and metadata; the library itself refuses a header that is larger than the file or than 100 MB."""
    try:
        with safe_open(path, framework="pt") as f:
            return {key: f.get_tensor(key) for key in f.keys()}, f.metadata() or {}  # noqa: SIM118 (no mapping)
    except (OSError, SafetensorError, ValueError) as error:
        raise RunError(f"damaged file: {path}: not safetensors ({error})") from None


def _pickled(path: Path) -> Any:
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                unpacked(archive)
        return torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:  # torch raises many kinds; code in the file is refused before it runs
        raise RunError(
            f"{path}: damaged file, or one that holds more than weights ({type(error).__name__}); such a file can run "
            "code when it is loaded: where you trust it, let torch.save write its state_dict alone, and pass that"
        ) from None


def _folder(path: Path) -> Checkpoint:
    if not (path / "config.json").is_file():
        raise RunError(f"missing file: {path / 'config.json'}: a folder is read as a Hugging Face CLIPModel")
    config = read_json(path / "config.json")
    try:
        name = huggingface.architecture(config, where=str(path / "config.json"))
        parts = _parts(path)
    except (AttributeError, KeyError, TypeError) as error:
        raise RunError(f"damaged file: {path / 'config.json'}, or an index beside it: {error!r}") from None
    weights: dict[str, torch.Tensor] = {}
    for part in parts:
        regular(part)
        weights |= _plain(_pickled(part) if part.suffix == ".bin" else _safetensors(part)[0], part)
    return Checkpoint(huggingface.to_open_clip(weights, where=str(path)), name, huggingface.quick_gelu(config))


def _parts(folder: Path) -> list[Path]:
    """The files of a folder that hold its weights."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            return [folder / name]
        if (folder / f"{name}.index.json").is_file():
            index = read_json(folder / f"{name}.index.json")
            return [folder / PurePosixPath(part).name for part in sorted(set(index["weight_map"].values()))]
    raise RunError(f"{folder}: neither model.safetensors nor pytorch_model.bin")


def _from_openai(weights: Mapping[str, Any]) -> bool:
    return all(name in weights for name in _OPENAI)


def _plain(weights: Any, path: Path) -> dict[str, torch.Tensor]:
    """Without wrappers' prefixes and what is no weight. Raises RunError where it is no dictionary of plain tensors."""
    if not isinstance(weights, Mapping) or not weights:
        raise RunError(f"{path}: holds no weights: a dictionary of tensors, or one under 'state_dict', is expected")
    for name, value in weights.items():
        if not isinstance(value, torch.Tensor):
            raise RunError(f"{path}: {name!r} is a {type(value).__name__}: weights alone are expected")
        if not _stored(value):
            raise RunError(f"{path}: tensor {name} is sparse, quantised, or larger than what is stored of it")
    plain = {str(name): tensor for name, tensor in weights.items()}
    while wrapper := next((w for w in _WRAPPERS if all(name.startswith(w) for name in plain)), ""):
        plain = {name.removeprefix(wrapper): tensor for name, tensor in plain.items()}
    return {name: tensor for name, tensor in plain.items() if name not in (*_OPENAI, *_BUFFERS)}


def _stored(tensor: torch.Tensor) -> bool:
    """Whether every element is there: four bytes can claim to be a tensor of any size, and a copy of it would be."""
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
        return False
    return tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()


# --- TorchScript archives -------------------------------------------------------------------------------------------

_STORAGES = {
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "BoolStorage": torch.bool,
}


def _is_script_archive(path: Path) -> bool:
    try:
        if not zipfile.is_zipfile(path):
            return False
        with zipfile.ZipFile(path) as archive:
            return any(PurePosixPath(name).name == "constants.pkl" for name in archive.namelist())
    except Exception:  # a damaged one fails in many ways; what reads it next says so
        return False


class _Module:
    """Stands for any module of a TorchScript archive: its attributes, and none of its code."""


class _Reader(pickle._Unpickler):
    """Of a TorchScript archive's `data.pkl`: makes tensors, dictionaries and `_Module`s, and knows nothing else.

    The unpickler in Python, because the one in C makes room for as many objects as a pickle says that it will have.
    """

    def __init__(self, file: BinaryIO, archive: zipfile.ZipFile, root: str) -> None:
        super().__init__(file)
        self.archive, self.root = archive, root
        self.module = type("Module", (_Module,), {})  # a pickle may set attributes of classes: of this one, then
        self.storages: dict[str, torch.Tensor] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module == "__torch__" or module.startswith("__torch__."):
            return self.module
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return self._tensor
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if module == "torch.jit._pickle" and name.startswith("build_"):
            return list  # lists of numbers among a module's attributes
        raise pickle.UnpicklingError(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> torch.Tensor:
        _, dtype, key, _, _ = pid
        if key not in self.storages:
            content = bytearray(self.archive.read(f"{self.root}/data/{int(key)}"))  # its checksum is checked
            if len(content) % dtype.itemsize:
                raise ValueError(f"{len(content)} bytes of {dtype}")
            self.storages[key] = torch.frombuffer(content, dtype=dtype) if content else torch.empty(0, dtype=dtype)
        return self.storages[key]

    def _tensor(self, storage: torch.Tensor, offset: int, size: tuple, stride: tuple, *_: Any) -> torch.Tensor:
        return torch.as_strided(storage, size, stride, offset)  # which refuses what lies outside the storage


def _script_archive(path: Path) -> dict[str, torch.Tensor]:
    """The state dict of a TorchScript archive, such as OpenAI publishes; its code is not even read."""
    try:
        with zipfile.ZipFile(path) as archive:
            pickled = next(name for name in archive.namelist() if PurePosixPath(name).name == "data.pkl")
            root = str(PurePosixPath(pickled).parent)
            read = [p for p in archive.infolist() if p.filename == pickled or p.filename.startswith(f"{root}/data/")]
            if sum(part.file_size for part in read) > path.stat().st_size:
                raise ValueError("it unpacks to more than it has")
            with archive.open(pickled) as file:
                module = _Reader(file, archive, root).load()  # type: ignore[arg-type]
        return dict(_tensors(module))
    except Exception as error:  # a damaged archive fails in many ways; a forbidden name is an UnpicklingError
        raise RunError(f"damaged file: {path}: no TorchScript archive of weights ({error})") from None


def _tensors(module: Any, prefix: str = "", seen: set[int] | None = None) -> list[tuple[str, torch.Tensor]]:
    """(dotted name, tensor) of a module and of those in it, each module once: shared ones could be 2^n."""
    seen = set() if seen is None else seen
    seen.add(id(module))
    found = []
    for name, value in vars(module).items():
        if isinstance(value, torch.Tensor):
            found.append((prefix + name, value))
        elif isinstance(value, _Module) and id(value) not in seen:
            found += _tensors(value, f"{prefix}{name}.", seen)
    return found
