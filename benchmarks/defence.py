"""The defence against BadNet: settings compared on the development split, the default reported on the other one.

    python benchmarks/defence.py development    # writes data/results/development.csv
    python benchmarks/defence.py evaluation     # writes data/results/evaluation.csv

A tidy row a metric. Runs are load-or-make, so that it can be interrupted. Defaults are chosen by the first table, of
other seeds and another split than the second: a setting replaces the default if over the development seeds the 95 %
t-interval of the paired difference says that its ASR is lower, and its CA is at most 5 points below the victim's. FT,
the untrained patch and the row without EDA are controls, and no candidates: they are not ABD.
"""

from __future__ import annotations

import json
import sys

import pandas as pd

from abd_core.adversary import AdversaryConfig, adversary
from abd_core.defend import DefendConfig, defend
from abd_core.evaluate import EvaluateConfig, measure
from abd_core.paths import atomic, data_dir, read_json
from abd_core.poison import PoisonConfig, poison

SEEDS = {"development": (100, 101, 102), "evaluation": (0, 1, 2, 3)}
SPLIT = {"development": "dev", "evaluation": "eval"}
# name -> (adversary's settings, defender's settings); what is left out is at its default
SETTINGS: dict[str, tuple[dict, dict]] = {
    "default": ({}, {}),
    "FT": ({}, {"defence": "ft"}),
    "patch of an untrained generator": ({"steps": 1}, {}),
    "UAP without Eq. (2)": ({"backdoor_weight": 0.0}, {}),
    "Eq. (2) drives the encoders apart": ({"backdoor_weight": -1.0}, {}),
    "patch in a fixed place": ({"placement": "fixed"}, {}),
    "additive": ({"mode": "additive"}, {}),
    "no EDA": ({}, {"eda": False}),
    "perturbed and clean view": ({}, {"view": "both"}),
    "frozen BatchNorm": ({}, {"batch_norm": "frozen"}),
    "half the learning rate": ({}, {"lr": 5e-4}),
    "twice the learning rate": ({}, {"lr": 2e-3}),
}
REPORTED = ("default", "FT", "patch of an untrained generator")


def rows(setting: str, seed: int, split: str) -> list[dict]:
    """One setting against one victim: CA, ASR and RA."""
    searcher, defender = ({"seed": seed, **settings} for settings in SETTINGS[setting])
    victim = poison(PoisonConfig(seed=seed))
    weights = victim.file("model.safetensors")
    config = DefendConfig.from_parameters(defender)
    perturbation = None
    if config.needs_perturbation:
        found = adversary(AdversaryConfig.from_parameters(searcher), weights)
        perturbation = found.file("perturbation.safetensors")
    defended = defend(config, weights, perturbation=perturbation)
    on_split = EvaluateConfig(split=split)
    measured = measure(defended.file("model.safetensors"), trigger=victim.file("trigger.safetensors"), config=on_split)
    environment = read_json(defended.file("config.json"))["environment"]
    return [
        {
            "setting": label,
            "settings": json.dumps(SETTINGS.get(label, ({}, {}))),
            "attack": "badnet",
            "seed": seed,
            "split": split,
            "metric": metric,
            **metrics[metric],
            "seconds": run.metrics["seconds"],
            "device": environment["device"],
            "threads": environment["threads"],
            "torch": environment["torch"],
            "git_sha": environment["git_sha"],
            "run_id": run.name,
        }
        for label, run, metrics in (
            ("(victim)", victim, victim.metrics[split]),
            (setting, defended, measured.metrics),
        )
        for metric in ("ca_top1", "asr", "ra")
    ]


def main(table_name: str) -> None:
    path = data_dir() / "results" / f"{table_name}.csv"
    path.parent.mkdir(exist_ok=True)
    collected: list[dict] = []
    for seed in SEEDS[table_name]:
        for setting in SETTINGS if table_name == "development" else REPORTED:
            collected += rows(setting, seed, SPLIT[table_name])
            table = pd.DataFrame(collected).drop_duplicates(["setting", "seed", "metric"])
            with atomic(path) as temporary:
                table.to_csv(temporary, index=False)
            print(
                table[table["setting"] == setting]
                .tail(3)[["setting", "seed", "metric", "value"]]
                .to_string(index=False)
            )


if __name__ == "__main__":
    if sys.argv[1:] not in (["development"], ["evaluation"]):
        sys.exit("usage: python benchmarks/defence.py development|evaluation")
    main(sys.argv[1])
