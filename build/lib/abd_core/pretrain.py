"""Stage 0: train a clean CLIP from scratch: the embedded benchmark's base, or another model on these or other pairs."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from abd_core import inputs, models
from abd_core.config import ConfigError, derive_seed, option
from abd_core.data import TEST_VENDORS
from abd_core.evaluate import evaluate
from abd_core.inputs import PairInputs
from abd_core.launch import launcher
from abd_core.losses import clip_loss
from abd_core.paths import Run, data_dir, load_or_make, load_run, read_json
from abd_core.text import tokenize
from abd_core.train import Step, TrainConfig, fit


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(PairInputs, TrainConfig):
    """Settings of the clean base model; `model` is the architecture to train, by default the embedded base's."""

    epochs: int = option(60, "passes over the pairs", ge=1)
    lr: float = option(1e-3, "peak learning rate", gt=0, le=1)
    retrain: bool = option(False, "train the base anew instead of loading the committed one")
    warmup_steps: int = option(100, "steps of linear warm-up", ge=0)


def pretrain(config: PretrainConfig, *, force: bool = False) -> Run:
    """The clean base: the committed one, or with `config.retrain` one that is loaded or made like any other run.

    A retrained run's folder holds `model.safetensors` (fp16) and `history.csv`; `python -m abd_core.pretrain` made the
    committed files in `data/base/` in this way.

    Args:
        force: train anew, whatever is there; it implies `retrain`.

    Raises:
        ConfigError: settings, a model or data other than the committed base's without `retrain`; or the model takes
            images of another size than the embedded ones, where these are used.
        RunError: see `inputs.training_pairs` and `inputs.test_set`.
    """
    if force:
        config = config.replace(retrain=True)
    if not config.retrain:
        committed = load_run(data_dir() / "base")
        recipe = read_json(committed.file("config.json"))["config"]
        changed = [name for name, value in config.key().items() if name != "retrain" and value != recipe.get(name)]
        changed += [name for name in inputs.SHARED if config.places().get(name, models.EMBEDDED) != models.EMBEDDED]
        if changed:
            raise ConfigError(
                f"PretrainConfig.{changed[0]}: the committed base was trained otherwise; set retrain=True"
            )
        return committed
    pairs, name = inputs.training_pairs(config, None), inputs.architecture(config)
    tests = {split: inputs.test_set(config, split, None) for split in TEST_VENDORS}
    read = {"pairs": pairs.digest} | {split: test.digest for split, test in tests.items()}
    if name != models.EMBEDDED:  # whose runs were made before there were others
        read["model"] = name

    def make(folder: Path) -> Mapping[str, Any]:
        model = models.build(name, seed=derive_seed(config.seed, "init"))

        def loss(at: Step) -> tuple[torch.Tensor, dict[str, float]]:
            model.train()
            captions = pairs.captions(at.indices, seed=config.seed, epoch=at.epoch)
            image = models.encode_image(model, pairs.images(at.indices, seed=config.seed, step=at.step))
            text = models.encode_text(model, tokenize(captions, context_length=model.context_length))
            return clip_loss(image, text, model.logit_scale.exp()), {"logit_scale": model.logit_scale.detach().exp()}

        def after_epoch(epoch: int) -> Mapping[str, float]:
            return {"dev_ca": evaluate(model, tests["dev"]).ca[1].value}

        fit(
            model,
            loss,
            count=len(pairs),
            config=config,
            folder=folder,
            stage="pretrain",
            after_epoch=after_epoch,
            plan=pairs.plan,
        )
        models.save(model, folder / "model.safetensors", half=True)
        stored = models.load(folder / "model.safetensors")
        return {split: evaluate(stored, test).to_dict() for split, test in tests.items()}

    return load_or_make("pretrain", config, read, make, force=force, launch=launcher("pretrain", config))


if __name__ == "__main__":  # make the clean base that everything else starts from
    made = pretrain(PretrainConfig(retrain=True))
    shutil.copytree(made.folder, data_dir() / "base", dirs_exist_ok=True, ignore=shutil.ignore_patterns(".*"))
