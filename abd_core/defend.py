"""Stage 3: turn the victim into a model without its backdoor that keeps its clean accuracy.

It reads the suspect's weights and what the defence says that it needs: clean pairs, a perturbation, the clean weights.
Never the attack's record: no trigger, no target, no poisoned rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from abd_core import inputs, models
from abd_core.config import ConfigError
from abd_core.defences import DEFENCES, DefendConfig, placed
from abd_core.evaluate import evaluate
from abd_core.generator import Perturbation
from abd_core.launch import launcher
from abd_core.paths import Run, load_or_make, sha256
from abd_core.train import steps_an_epoch


def defend(
    config: DefendConfig,
    victim: Path,
    *,
    perturbation: Path | None = None,
    clean: Path | None = None,
    force: bool = False,
) -> Run:
    """Load or make a defended model from the suspect's weights and what the defence needs.

    Args:
        victim: the suspect's weights.
        perturbation: what the adversary stage found; read only by a defence that needs one.
        clean: the published weights that the suspect was made from (default: the embedded base); read only by a defence
            that needs them.

    Its folder holds `model.safetensors` and, where the defence trains, `history.csv`; its metrics are what a defender
    can know: the CA before and after, on the development split, and how many pairs it had.

    Raises:
        RunError: a file is missing or damaged.
        ConfigError: the perturbation does not fit the images or the settings, or the defence needs one and got none.
    """
    kind = DEFENCES[config.defence]
    pairs = inputs.training_pairs(config, victim).subset(config.share, seed=config.seed)
    test = inputs.test_set(config, "dev", victim)
    universal = None
    if config.needs_perturbation:
        if perturbation is None:
            raise ConfigError(f"defence {config.defence!r} needs a perturbation, from the adversary stage")
        universal = placed(Perturbation.load(perturbation), config.patch_place)
        if universal.resolution != pairs.resolution:
            sides = f"{universal.resolution} px, the images {pairs.resolution} px"
            raise ConfigError(f"{perturbation}: the perturbation is for another resolution: {sides}")
    read = {"victim": sha256(victim), "dev": test.digest}
    if kind.needs_pairs:
        steps_an_epoch(len(pairs), config)
        read["pairs"] = pairs.digest
    if universal is not None and perturbation is not None:
        read["perturbation"] = sha256(perturbation)
    if config.needs_clean_weights:
        clean = clean or inputs.clean_weights(config)
        read["clean"] = sha256(clean)
    defence = kind(config, pairs, perturbation=universal, clean=clean)

    def make(folder: Path) -> Mapping[str, Any]:
        model = models.load(victim)
        before = evaluate(model, test)
        defence.defend(model, folder)
        models.save(model, folder / "model.safetensors")
        metrics: dict[str, Any] = {"before": before.to_dict(), "after": evaluate(model, test).to_dict()}
        return metrics | {"pairs": len(pairs)} if kind.needs_pairs else metrics

    launch = launcher("defend", config, victim=victim, perturbation=perturbation, clean=clean)
    return load_or_make("defend", config, read, make, force=force, launch=launch if kind.needs_pairs else None)
