"""Weights as others store them: the same features come out, what does not fit is named, and no code is executed."""

from __future__ import annotations

import json
import math
import struct
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from conftest import Bomb
from safetensors.torch import load_file, save_file

from abd_core import checkpoints, models
from abd_core.config import ConfigError
from abd_core.paths import RunError, sha256
from abd_core.text import tokenize

# A ResNet and a vision transformer, each with its twin of the other activation.
RESNET = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None},
    "text_cfg": {"context_length": 20, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}
VIT = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 20, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}
ARCHITECTURES = {"small-rn": RESNET, "small-vit": VIT}
TOKENS = tokenize(["a picture of a banana.", "dog", ""], context_length=20)


@pytest.fixture(scope="module", autouse=True)
def architectures(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("architectures")
    for name, cfg in ARCHITECTURES.items():
        (folder / f"{name}.json").write_text(json.dumps(cfg))
        (folder / f"{name}-quickgelu.json").write_text(json.dumps({**cfg, "quick_gelu": True}))
    open_clip.add_model_config(folder)


@pytest.fixture(autouse=True)
def foreign(monkeypatch: pytest.MonkeyPatch) -> None:
    """The architecture of weights that do not name theirs; the real one's size is no part of the claims."""
    monkeypatch.setattr(models, "FOREIGN", "small-rn-quickgelu")


def features(model: open_clip.CLIP) -> torch.Tensor:
    images = torch.rand(3, 3, *[models.resolution(model)] * 2, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return torch.cat([models.encode_image(model, images), models.encode_text(model, TOKENS)])


def state(name: str = "small-rn-quickgelu", seed: int = 3) -> dict[str, torch.Tensor]:
    model = models.build(name, seed=seed)
    with torch.no_grad(), torch.random.fork_rng():  # away from the values that any fresh model has
        torch.manual_seed(seed)
        model.logit_scale.fill_(3.3)
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.uniform_(-0.1, 0.1)
                module.num_batches_tracked.fill_(7)
    return {key: tensor.clone().contiguous() for key, tensor in model.state_dict().items()}


# --- formats ------------------------------------------------------------------------------------------------


def training_checkpoint(weights: dict, prefix: str = "") -> dict[str, Any]:
    """As open_clip's, CleanCLIP's, BadCLIP's and RoCLIP's training scripts write it."""
    named = {prefix + key: tensor for key, tensor in weights.items()}
    optimizer = {"state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 1e-5}]}
    return {"epoch": 10, "name": "nodefence", "state_dict": named, "optimizer": optimizer}


def openai_state(weights: dict) -> dict[str, torch.Tensor]:
    """In half precision, without the counters of batches, and with its three numbers."""
    numbers = {"input_resolution": 64, "context_length": 20, "vocab_size": 49408}
    kept = {key: tensor.half() for key, tensor in weights.items() if not key.endswith("num_batches_tracked")}
    return {**kept, **{name: torch.tensor(number) for name, number in numbers.items()}}


FORMATS: dict[str, tuple[str, Callable[[dict, Path], object]]] = {
    "open_clip safetensors": ("m.safetensors", lambda w, path: save_file(w, path, metadata={"format": "pt"})),
    "state dict": ("m.pt", torch.save),
    "state dict, old format": ("m.pth", lambda w, path: torch.save(w, path, _use_new_zipfile_serialization=False)),
    "open_clip training": ("epoch_10.pt", lambda w, path: torch.save(training_checkpoint(w), path)),
    "CleanCLIP": ("epoch_10.pt", lambda w, path: torch.save(training_checkpoint(w, "module."), path)),
    "compiled": ("m.ckpt", lambda w, path: torch.save({"model": {f"_orig_mod.{k}": t for k, t in w.items()}}, path)),
    "DDP compiled": ("m.pt", lambda w, path: torch.save({f"_orig_mod.module.{k}": t for k, t in w.items()}, path)),
    "compiled in DDP": ("m.pt", lambda w, path: torch.save({f"module._orig_mod.{k}": t for k, t in w.items()}, path)),
    "capitals": ("m.PT", torch.save),
    "scale of one element": (
        "m.pt",
        lambda w, path: torch.save({**w, "logit_scale": w["logit_scale"].reshape(1)}, path),
    ),
}


@pytest.mark.parametrize(("file", "write"), FORMATS.values(), ids=FORMATS.keys())
def test_every_format_gives_the_same_weights(file: str, write: Callable, tmp_path: Path):
    weights = state()
    write(weights, tmp_path / file)
    model = models.load(tmp_path / file)
    assert model.architecture == "small-rn-quickgelu" and not model.training
    again = model.state_dict()
    assert again.keys() == weights.keys()
    assert [key for key, tensor in weights.items() if not torch.equal(again[key], tensor)] == []


def test_openai_s_state_dict_is_read_in_half_precision_and_known_to_be_of_quick_gelu(tmp_path: Path, fp32: None):
    weights = state()
    torch.save(openai_state(weights), tmp_path / "RN50.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = models.load(tmp_path / "RN50.pt", name="small-rn-quickgelu")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert torch.equal(model.visual.conv1.weight, weights["visual.conv1.weight"].half().float())
    assert model.visual.bn1.num_batches_tracked == 0
    with pytest.warns(UserWarning, match=r"trained with QuickGELU, but small-rn computes GELU: use .*-quickgelu'"):
        models.load(tmp_path / "RN50.pt", name="small-rn")


# --- TorchScript archives -----------------------------------------------------------------------------------


class Encoders(torch.nn.Module):
    """Both encoders in one graph, as OpenAI's published archives have them."""

    def __init__(self, model: open_clip.CLIP) -> None:
        super().__init__()
        for name, module in model.named_children():
            setattr(self, name, module)
        for name, parameter in model.named_parameters(recurse=False):
            setattr(self, name, parameter)
        for name, number in {"input_resolution": 64, "context_length": 20, "vocab_size": 49408}.items():
            self.register_buffer(name, torch.tensor(number))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.visual(images) * self.logit_scale


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    model = models.build("small-rn-quickgelu")
    model.load_state_dict(state())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(Encoders(model.eval()), torch.zeros(1, 3, 64, 64)).save(str(tmp_path / "RN50.pt"))
    return tmp_path / "RN50.pt"


def test_a_script_archive_gives_its_weights(archive: Path):
    weights = state()
    found = checkpoints.read(archive)
    assert found.quick_gelu is True and found.weights.keys() == weights.keys()
    assert [key for key, tensor in weights.items() if not torch.equal(found.weights[key], tensor)] == []


def rewritten(path: Path, change: Callable[[str, bytes], bytes]) -> None:
    with zipfile.ZipFile(path) as old:
        parts = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(path, "w") as new:
        for name, content in parts.items():
            new.writestr(name, change(name, content))


def test_the_code_of_a_script_archive_is_not_even_read(archive: Path):
    rewritten(archive, lambda name, content: b"no code" if "/code/" in name else content)
    assert checkpoints.read(archive).weights.keys() == state().keys()
    with pytest.raises(RuntimeError):
        torch.jit.load(str(archive))


@pytest.mark.parametrize(
    "payload",
    [
        b"\x80\x02cposix\nmkdir\nX%c\x00\x00\x00%b\x85R.",
        b"\x80\x02cbuiltins\neval\nX%c\x00\x00\x00%b\x85R.",
        b"\x80\x02ctorch._utils\n_rebuild_sparse_tensor\nX%c\x00\x00\x00%b\x85R.",
    ],
)
def test_code_in_a_script_archive_is_refused(payload: bytes, archive: Path, tmp_path: Path):
    marker = str(tmp_path / "marker").encode()
    attack = payload % (len(marker), marker)
    rewritten(archive, lambda name, content: attack if name.endswith("/data.pkl") else content)
    with pytest.raises(RunError, match="no TorchScript archive of weights") as error:
        models.load(archive)
    assert "\n" not in str(error.value) and not (tmp_path / "marker").exists()


def test_a_damaged_script_archive_is_refused(archive: Path):
    whole = archive.read_bytes()
    for damaged in (whole[: len(whole) // 2], whole.replace(b"FloatStorage", b"FloatStorave")):
        archive.write_bytes(damaged)
        with pytest.raises(RunError, match="damaged file"):
            models.load(archive)


# --- Hugging Face -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["gelu", "quick_gelu"])
def clip_model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A `CLIPModel` of transformers itself, and the folder that it was saved to."""
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(0)
    shared = {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    shared["hidden_act"] = request.param
    text = {**shared, "max_position_embeddings": 20}
    vision = {**shared, "image_size": 32, "patch_size": 16}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # fresh biases are zero, and fresh norms one
            parameter.add_(0.02 * torch.randn(parameter.shape))
    folder = tmp_path_factory.mktemp("hf")
    model.save_pretrained(folder)
    return folder, model


def test_a_clip_model_s_folder_gives_its_features_under_the_architecture_that_it_describes(clip_model, fp32: None):
    folder, theirs = clip_model
    model = models.load(folder)
    quick = theirs.config.vision_config.hidden_act == "quick_gelu"
    assert model.architecture == ("small-vit-quickgelu" if quick else "small-vit")
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        image = theirs.visual_projection(theirs.vision_model(pixel_values=images).pooler_output)
        text = theirs.text_projection(theirs.text_model(input_ids=TOKENS).pooler_output)
        torch.testing.assert_close(model.encode_image(images), image, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(model.encode_text(TOKENS), text, rtol=1e-4, atol=1e-5)
    assert model.logit_scale.item() == pytest.approx(theirs.logit_scale.item())


def test_the_other_activation_s_architecture_is_taken_with_a_warning(clip_model):
    folder, theirs = clip_model
    quick = theirs.config.vision_config.hidden_act == "quick_gelu"
    titles = ("QuickGELU", "GELU") if quick else ("GELU", "QuickGELU")
    name, right = ("small-vit", "small-vit-quickgelu") if quick else ("small-vit-quickgelu", "small-vit")
    message = f"trained with {titles[0]}, but {name} computes {titles[1]}: use model '{right}'"
    with pytest.warns(UserWarning, match=message):
        models.load(folder, name=name)


def test_shards_and_pickled_weights_of_a_clip_model_are_read_too(clip_model, tmp_path: Path):
    folder, _ = clip_model
    whole = load_file(folder / "model.safetensors")
    for kind in ("shards", "bin"):
        other = tmp_path / kind
        other.mkdir()
        (other / "config.json").write_bytes((folder / "config.json").read_bytes())
        if kind == "bin":
            torch.save(whole, other / "pytorch_model.bin")
        else:
            names = sorted(whole)
            parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
            for part, keys in parts.items():
                save_file({key: whole[key] for key in keys}, other / part)
            places = {key: part for part, keys in parts.items() for key in keys}
            (other / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
        assert torch.equal(features(models.load(other)), features(models.load(folder)))


HF_FAULTS: dict[str, tuple[Callable[[dict, dict], object], str]] = {
    "another model": (lambda config, _: config.update(model_type="siglip"), r"not the config of .* CLIPModel"),
    "another shape": (
        lambda config, _: config["vision_config"].update(num_attention_heads=4),
        r"no architecture of this shape \(2 layers of 32 on patches of 16 px",
    ),
    "no settings": (lambda config, _: config.update(text_config="large"), r"damaged file: .*config\.json"),
    "unknown tensor": (lambda _, t: t.update({"vision_model.extra": torch.zeros(1)}), r"vision_model\.extra has no"),
    "half a layer": (
        lambda _, t: t.pop("text_model.encoder.layers.1.self_attn.v_proj.bias"),
        r"tensor text_model\.encoder\.layers\.1\.self_attn\.v_proj\.bias is missing",
    ),
    "missing tensor": (lambda _, t: t.pop("visual_projection.weight"), r"tensor visual\.proj is None"),
}


@pytest.mark.parametrize(("change", "message"), HF_FAULTS.values(), ids=HF_FAULTS.keys())
def test_a_faulty_clip_model_is_refused_and_the_fault_named(change, message: str, clip_model, tmp_path: Path):
    folder, _ = clip_model
    config, tensors = json.loads((folder / "config.json").read_text()), dict(load_file(folder / "model.safetensors"))
    change(config, tensors)
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(RunError, match=message) as error:
        models.load(tmp_path)
    assert "\n" not in str(error.value)


def test_a_folder_without_config_or_weights_is_refused(clip_model, tmp_path: Path):
    with pytest.raises(RunError, match=r"config\.json: a folder is read as a Hugging Face CLIPModel"):
        models.load(tmp_path)
    (tmp_path / "config.json").write_bytes((clip_model[0] / "config.json").read_bytes())
    with pytest.raises(RunError, match=r"neither model\.safetensors nor pytorch_model\.bin"):
        models.load(tmp_path)


# --- refusals -----------------------------------------------------------------------------------------------


FAULTS: dict[str, tuple[Callable[[dict], dict], str]] = {
    "another width": (
        lambda w: {**w, "visual.conv1.weight": torch.zeros(8, 3, 3, 3)},
        r"tensor visual\.conv1\.weight is \(8, 3, 3, 3\), but small-rn-quickgelu needs \(4, 3, 3, 3\)",
    ),
    "missing": (lambda w: {k: t for k, t in w.items() if k != "text_projection"}, "tensor text_projection is None"),
    "further": (lambda w: {**w, "extra": torch.zeros(2)}, r"tensor extra is \(2,\), but .* needs None"),
    "NaN": (lambda w: {**w, "ln_final.bias": torch.full((32,), math.nan)}, r"tensor ln_final\.bias holds NaN"),
    "infinity": (lambda w: {**w, "logit_scale": torch.tensor(math.inf)}, "tensor logit_scale holds NaN or infinity"),
    "no tensor": (lambda w: {**w, "epoch": 3}, "'epoch' is a int: weights alone are expected"),
    "empty": (lambda w: {}, "holds no weights"),
}


@pytest.mark.parametrize(("change", "message"), FAULTS.values(), ids=FAULTS.keys())
def test_weights_that_do_not_fit_are_refused_in_one_line(change: Callable, message: str, tmp_path: Path):
    torch.save(change(state()), tmp_path / "m.pt")
    with pytest.raises(RunError, match=message) as error:
        models.load(tmp_path / "m.pt")
    assert "\n" not in str(error.value)


def test_weights_of_another_architecture_than_the_one_asked_for_are_refused(tmp_path: Path):
    models.save(models.build("small-rn-quickgelu"), tmp_path / "m.safetensors")
    with pytest.raises(RunError, match="holds the model 'small-rn-quickgelu', not 'small-vit'"):
        models.load(tmp_path / "m.safetensors", name="small-vit")


@pytest.mark.parametrize("nest", [lambda bomb: bomb, lambda bomb: {"state_dict": bomb}, lambda bomb: {"epoch": bomb}])
@pytest.mark.parametrize("new", [True, False], ids=["zip", "old format"])
def test_code_in_a_pickled_file_is_not_executed_and_a_way_out_is_said(nest: Callable, new: bool, tmp_path: Path):
    bomb = nest(Bomb(tmp_path / "marker"))
    torch.save(bomb, tmp_path / "m.pt", _use_new_zipfile_serialization=new)
    with pytest.raises(RunError, match="where you trust it, let") as error:
        models.load(tmp_path / "m.pt")
    assert "\n" not in str(error.value) and not (tmp_path / "marker").exists()


@pytest.mark.parametrize("content", [b"", b"no weights at all", bytes(1_000), b"PK\x03\x04" + bytes(100)])
@pytest.mark.parametrize("name", ["m.pt", "m.bin", "m.safetensors"])
def test_garbage_is_refused_in_one_line(content: bytes, name: str, tmp_path: Path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(RunError, match="damaged file") as error:
        models.load(tmp_path / name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("length", [2**63 - 1, 2**40, 100_000_001, 1_000])
def test_a_header_that_claims_more_than_the_file_is_refused_without_reading_it(length: int, tmp_path: Path):
    (tmp_path / "m.safetensors").write_bytes(struct.pack("<Q", length) + b'{"a":1}')
    with pytest.raises(RunError, match="damaged file"):
        models.load(tmp_path / "m.safetensors")


# --- activation ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["rn", "vit"])
def test_a_file_that_does_not_tell_its_activation_is_taken_with_a_line_on_which_one_is_computed(
    kind: str, tmp_path: Path
):
    path = tmp_path / "epoch_10.pt"
    torch.save(training_checkpoint(state(f"small-{kind}"), "module."), path)
    for name, twin, titles in [
        (f"small-{kind}", f"small-{kind}-quickgelu", ("GELU", "QuickGELU")),
        (f"small-{kind}-quickgelu", f"small-{kind}", ("QuickGELU", "GELU")),
    ]:
        with pytest.warns(UserWarning) as said:
            models.load(path, name=name)
        (line,) = [str(warning.message) for warning in said]
        expected = f"{path}: does not say its activation; {name} computes {titles[0]}: use model '{twin}' where it was "
        assert line.startswith(f"{expected}trained with {titles[1]}")
        assert ("the ResNets of OpenAI" in line) == (name == "small-rn")


def test_our_own_files_say_their_activation(tmp_path: Path):
    for name in ("small-rn", "small-rn-quickgelu"):
        models.save(models.build(name), tmp_path / "m.safetensors")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert models.load(tmp_path / "m.safetensors").architecture == name
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert models.load(models.clean_weights()).architecture == models.EMBEDDED


# --- where a stage starts -----------------------------------------------------------------------------------


def test_a_stage_starts_from_foreign_weights_as_one_file_that_names_its_architecture(runs: Path, tmp_path: Path):
    torch.save(training_checkpoint(state(), "module."), tmp_path / "epoch_10.pt")
    path = models.pretrained_weights("small-rn-quickgelu", str(tmp_path / "epoch_10.pt"))
    assert models.load(path).architecture == "small-rn-quickgelu"
    assert torch.equal(features(models.load(path)), features(models.load(tmp_path / "epoch_10.pt")))
    before = sha256(path), path.stat().st_mtime_ns
    assert models.pretrained_weights("small-rn-quickgelu", str(tmp_path / "epoch_10.pt")) == path
    assert (sha256(path), path.stat().st_mtime_ns) == before
    torch.save(state(seed=4), tmp_path / "epoch_10.pt")
    assert models.pretrained_weights("small-rn-quickgelu", str(tmp_path / "epoch_10.pt")) != path


def test_a_stage_starts_from_a_clip_model_s_folder(runs: Path, clip_model):
    path = models.pretrained_weights("", str(clip_model[0]))
    assert torch.equal(features(models.load(path)), features(models.load(clip_model[0])))


def test_a_stage_starts_from_our_own_file_as_it_is_and_without_one_from_the_embedded_base(tmp_path: Path):
    models.save(models.build("small-rn"), tmp_path / "m.safetensors")
    assert models.pretrained_weights("", str(tmp_path / "m.safetensors")) == tmp_path / "m.safetensors"
    assert models.pretrained_weights("", "") == models.pretrained_weights(models.EMBEDDED, "") == models.clean_weights()
    with pytest.raises(ConfigError, match="the embedded weights are of 'emoji-rn14', not of 'RN50'"):
        models.pretrained_weights("RN50", "")


def test_a_tag_is_downloaded_under_its_own_activation(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """open_clip's download is replaced by a file: of the tag, its settings are what counts."""
    asked = []

    def download(cfg: dict) -> str:
        asked.append(cfg)
        return str(tmp_path / "weights.pt")

    torch.save(state(), tmp_path / "weights.pt")
    cfg = open_clip.pretrained.get_pretrained_cfg("RN50", "yfcc15m")
    monkeypatch.setattr(open_clip, "list_pretrained_tags_by_model", lambda name: ["yfcc15m", "cc12m"])
    monkeypatch.setattr(open_clip.pretrained, "get_pretrained_cfg", lambda name, tag: cfg)
    monkeypatch.setattr(open_clip.pretrained, "download_pretrained", download)
    with pytest.warns(UserWarning, match="trained with QuickGELU, but small-rn computes GELU"):
        path = models.pretrained_weights("small-rn", "yfcc15m")
    assert asked == [cfg] and models.load(path).architecture == "small-rn"
    with pytest.raises(ConfigError, match=r"no such file, and no tag of 'small-rn': a path, or one of yfcc15m, cc12m"):
        models.pretrained_weights("small-rn", "laion400m")


def test_a_tag_that_cannot_be_had_is_said_in_one_line(runs: Path, monkeypatch: pytest.MonkeyPatch):
    def offline(cfg: dict) -> str:
        raise OSError("no route\nto host")

    monkeypatch.setattr(open_clip.pretrained, "download_pretrained", offline)
    with pytest.raises(RunError, match="RN50-quickgelu, openai: no download: OSError no route to host"):
        models.pretrained_weights("RN50-quickgelu", "openai")


def test_the_architectures_that_can_be_used_are_plain_clips():
    taken = models.architectures()
    assert {models.EMBEDDED, models.FOREIGN, "ViT-B-32", "small-vit"} <= set(taken) <= set(open_clip.list_models())
    assert not {"ViT-B-16-SigLIP", "coca_ViT-B-32", "roberta-ViT-B-32"} & set(taken)


def test_an_architecture_with_another_tokeniser_is_refused():
    with pytest.raises(ConfigError, match="only architectures with CLIP's own text tower and tokeniser"):
        models.build("ViT-B-16-SigLIP")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "side", "width"), [("RN50-quickgelu", 224, 1024), ("ViT-B-32-quickgelu", 224, 512)])
def test_the_real_architectures_go_through_a_foreign_file(name: str, side: int, width: int, tmp_path: Path):
    model = models.build(name)
    torch.save(training_checkpoint(model.state_dict(), "module."), tmp_path / "epoch_10.pt")
    again = models.load(tmp_path / "epoch_10.pt", name=name)
    image = torch.rand(1, 3, side, side)
    with torch.no_grad():
        found = models.encode_image(again, image)
        assert found.shape == (1, width) and torch.equal(found, models.encode_image(model, image))


def write(kind: str, folder: Path) -> Path:
    """Random weights of RN50 at 224 px in one of `FORMATS`, or as OpenAI's has them; returns their file.

    "TorchScript" is OpenAI's archive, "OpenAI state dict" what is in it, in half precision. "CLIPModel" is a folder of
    transformers with a ViT-B/32: that library has no ResNet.
    """
    if kind == "CLIPModel":
        from transformers import CLIPConfig, CLIPModel

        CLIPModel(CLIPConfig()).save_pretrained(folder / "clip")
        return folder / "clip"
    weights = state("RN50-quickgelu")
    if kind == "OpenAI state dict":
        torch.save(openai_state(weights), folder / "RN50.pt")
        return folder / "RN50.pt"
    if kind != "TorchScript":
        file, save = FORMATS[kind]
        save(weights, folder / file)
        return folder / file
    model = models.build("RN50-quickgelu")
    model.load_state_dict(weights)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(Encoders(model), torch.zeros(1, 3, 224, 224)).save(str(folder / "RN50.pt"))
    return folder / "RN50.pt"


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("kind", [*FORMATS, "TorchScript"])
def test_rn50_at_224_px_comes_out_of_every_format(kind: str, tmp_path: Path):
    weights = state("RN50-quickgelu")
    again = models.load(write(kind, tmp_path), name="RN50-quickgelu").state_dict()
    assert again.keys() == weights.keys()
    assert [key for key, tensor in weights.items() if not torch.equal(again[key], tensor)] == []
