"""A defended model for use elsewhere: by open_clip, by Hugging Face transformers, and with a card that says what it is.

`python -m abd_core.export RUN_FOLDER OUT` writes the model of a finished run into the new folder OUT:

- `open_clip_model.safetensors`: `open_clip.create_model_and_transforms(name, pretrained=path)` loads it where open_clip
  knows the architecture, `open_clip.create_model_and_transforms("local-dir:OUT")` everywhere.
- `config.json`, `model.safetensors`, preprocessor and tokeniser: `transformers.CLIPModel.from_pretrained("OUT")` and
  `CLIPProcessor.from_pretrained("OUT")`; of plain vision transformers alone, because a `CLIPModel` can be nothing else.
- `README.md`: data, settings, metrics before and after.
"""

from __future__ import annotations

import argparse
import html
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import open_clip
from safetensors.torch import save_file

from abd_core import huggingface, models
from abd_core.config import AbdError
from abd_core.paths import Run, RunError, atomic, load_run, read_json, sha256, write_json

METRICS = {
    "ca_top1": "clean accuracy, top-1",
    "ca_top5": "clean accuracy, top-5",
    "ca_top10": "clean accuracy, top-10",
    "asr": "attack success rate",
    "asr_all": "attack success rate, target class included",
    "ra": "accuracy on triggered images",
}


def export(run: Run, out: Path) -> Path:
    """Write the model of a finished run for open_clip, for transformers where it can be, and its card; returns `out`.

    Args:
        run: a finished run with a `model.safetensors`: `defend`'s, or any other stage's.
        out: a folder that does not exist yet, or is empty.

    Raises:
        RunError: the run has no model, its weights or records are damaged, or `out` holds something or cannot be made.
    """
    if os.path.lexists(out) and (not out.is_dir() or any(out.iterdir())):
        raise RunError(f"{out}: a new or an empty folder is expected")
    model = models.load(run.file("model.safetensors"))
    name, cfg = model.architecture, open_clip.get_model_config(model.architecture)
    described = huggingface.describe(cfg)
    try:
        text = card(run, name=name, transformers=described is not None)
    except AbdError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise RunError(f"damaged file: {run.folder}: its records are not a run's ({error!r})") from None
    weights = {key: tensor.detach().cpu().contiguous() for key, tensor in model.state_dict().items()}
    mean, std = models.NORMALISATION
    preprocess = {"mean": list(mean), "std": list(std), "interpolation": "bicubic", "resize_mode": "shortest"}
    with _whole(out) as folder:
        with atomic(folder / "open_clip_model.safetensors") as temporary:
            save_file(weights, temporary, metadata={"format": "pt", "model": name})
        write_json(folder / "open_clip_config.json", {"model_cfg": cfg, "preprocess_cfg": preprocess})
        if described is not None:
            with atomic(folder / "model.safetensors") as temporary:
                save_file(huggingface.from_open_clip(weights), temporary, metadata={"format": "pt"})
            write_json(folder / "config.json", {**described, "dtype": "float32"})
            write_json(folder / "preprocessor_config.json", huggingface.preprocessor(models.resolution(model)))
            _tokeniser(folder, context_length=model.context_length)
        with atomic(folder / "README.md") as temporary:
            temporary.write_text(text, encoding="utf-8")
    return out


@contextmanager
def _whole(out: Path) -> Iterator[Path]:
    """A temporary folder beside `out` to write into; `out` gets what it holds only when the block ends well.

    Raises:
        RunError: either cannot be made.
    """
    place = out.absolute()
    temporary = place.with_name(f".{place.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # of a process that was killed
    try:
        temporary.mkdir(parents=True)
        yield temporary
        if out.is_dir():  # an empty one, perhaps a link or a mount, stays what it is
            for path in temporary.iterdir():
                shutil.move(path, out)
        else:
            temporary.rename(out)
    except OSError as error:
        raise RunError(f"{out} cannot be made: {error.strerror or error}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _tokeniser(out: Path, *, context_length: int) -> None:
    """CLIP's byte-pair encoding in the form of transformers' `CLIPTokenizer`."""
    tokeniser = open_clip.SimpleTokenizer()
    renamed = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    write_json(out / "vocab.json", {renamed.get(token, token): i for token, i in tokeniser.encoder.items()})
    merges = sorted(tokeniser.bpe_ranks, key=tokeniser.bpe_ranks.__getitem__)
    with atomic(out / "merges.txt") as temporary:
        temporary.write_text("\n".join(["#version: 0.2", *map(" ".join, merges)]) + "\n", encoding="utf-8")
    start, end = renamed.values()
    names = {"bos_token": start, "eos_token": end, "unk_token": end, "pad_token": end}
    settings = {"tokenizer_class": "CLIPTokenizer", "do_lower_case": True, "model_max_length": context_length}
    write_json(out / "tokenizer_config.json", {**settings, **names})


# --- the card -------------------------------------------------------------------------------------------------------


def card(run: Run, *, name: str, transformers: bool) -> str:
    """The model card: Markdown in which nothing that a run's record holds can be markup."""
    record = read_json(run.file("config.json"))
    stage, config, inputs = record["stage"], record["config"], record.get("inputs", {})
    lines = [
        "---",
        "library_name: open_clip",
        "pipeline_tag: zero-shot-image-classification",
        "tags: [clip, backdoor-defense]",
        "---",
        "",
        f"# {_escaped(name)}, {_escaped(config.get('defence', stage))}",
        "",
        f"A CLIP of open_clip's architecture {_escaped(name)}, from the stage {_escaped(stage)} of *Adversarial "
        "Backdoor Defense in CLIP*.",
        "",
    ]
    if stage == "defend":
        lines += [
            "**Trigger-blind.** The defence read the suspect's weights, and of what the table of inputs lists nothing "
            "else. It was given no trigger, no target class and no poisoned pair. It is no proof that no backdoor is "
            "left: an attack that was not measured below is not covered by it.",
            "",
        ]
    lines += ["## Use", "", "```python", "import open_clip", ""]
    if _published(name):
        lines.append(f"open_clip.create_model_and_transforms({name!r}, pretrained='open_clip_model.safetensors')")
    else:
        lines.append("open_clip.create_model_and_transforms('local-dir:.')  # in this folder")
    lines += ["```", ""]
    if transformers:
        lines += ["```python", "from transformers import CLIPModel, CLIPProcessor", ""]
        lines += ["model, processor = CLIPModel.from_pretrained('.'), CLIPProcessor.from_pretrained('.')", "```", ""]
    else:
        lines += [
            f"transformers' CLIPModel has a plain vision transformer, and cannot represent {_escaped(name)}: there is "
            "no file for it here.",
            "",
        ]
    lines += ["## Metrics", "", *_metrics(run, inputs), ""]
    lines += ["## Data and inputs", "", "Where the run found its data, and digests (SHA-256) of all that it read.", ""]
    lines += _table(("data", "place or number"), _data(run, record, inputs))
    lines += ["", *_table(("input", "digest"), sorted(inputs.items()))]
    lines += ["", "## Settings", "", *_table(("setting", "value"), config.items()), ""]
    if "perturbation" in inputs:
        lines += ["The perturbation that it was given was searched with:", ""]
        lines += [*_table(("setting", "value"), _search(run, inputs["perturbation"]).items()), ""]
    lines += ["## Environment", "", *_table(("", ""), record.get("environment", {}).items()), ""]
    return "\n".join(lines)


def _published(name: str) -> bool:
    """Whether open_clip itself brings the architecture."""
    return (Path(open_clip.__file__).parent / "model_configs" / f"{name}.json").is_file()


def _data(run: Run, record: Mapping[str, Any], inputs: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """What a run read, as far as it says: where it was, and how many pairs."""
    read = ("pairs", "test_images") if "pairs" in inputs else ("test_images",)
    places = dict.fromkeys(read, "the embedded benchmark's") | record.get("places", {})
    count = {"number of pairs": run.metrics["pairs"]} if "pairs" in run.metrics else {}
    return list((places | count).items())


def _search(run: Run, perturbation: str) -> Mapping[str, Any]:
    """Settings of the adversary's run, beside this one's stage, that made the perturbation of that digest."""
    for manifest in sorted((run.folder.parent.parent / "adversary").glob("*/manifest.json")):
        if read_json(manifest).get("perturbation.safetensors") == perturbation:
            return read_json(manifest.with_name("config.json"))["config"]
    return {"unknown": "its run is not among this one's"}


def _metrics(run: Run, inputs: Mapping[str, Any]) -> list[str]:
    """A table of each measurement of the model and of what it came from: the run's own, then later ones beside it."""
    metrics = run.metrics
    if {"before", "after"} <= metrics.keys():
        own = [("before", metrics["before"]), ("after", metrics["after"])]
    else:
        own = [("the model", value) for value in metrics.values() if isinstance(value, dict) and "ca_top1" in value]
    lines = ["Share in %, 95 % interval, number of images. Measured by the run itself:", "", *_rates(own)]
    measured = _measurements(run, before=inputs.get("victim"))
    if measured:
        lines += ["", "Measured afterwards, with the trigger of a known attack where an attack success rate is given:"]
        lines += ["", *_rates(measured)]
    return lines


def _measurements(run: Run, *, before: str | None) -> list[tuple[str, dict[str, Any]]]:
    """Finished evaluations, beside the run's stage, of its model and of the weights that it started from."""
    models_ = {sha256(run.file("model.safetensors")): "after"} | ({before: "before"} if before else {})
    found = []
    for folder in sorted((run.folder.parent.parent / "evaluate").glob("*/metrics.json")):
        inputs = read_json(folder.with_name("config.json"))["inputs"]
        if inputs.get("weights") in models_:
            trigger = inputs.get("trigger", "")[:12]
            when = models_[inputs["weights"]] + (f", trigger {trigger}" if trigger else "")
            found.append((when, read_json(folder)))
    return sorted(found, key=lambda item: (item[0].partition(",")[2], item[0].startswith("after")))


def _rates(measured: list[tuple[str, dict[str, Any]]]) -> list[str]:
    rows = [
        (when, values.get("split", ""), METRICS[metric], f"{100 * rate['value']:.1f}", interval, rate["n"])
        for when, values in measured
        for metric, rate in values.items()
        if metric in METRICS
        for interval in [f"{100 * rate['ci_low']:.1f} to {100 * rate['ci_high']:.1f}"]
    ]
    return _table(("model", "split", "metric", "%", "interval", "n"), rows)


def _table(head: tuple[str, ...], rows: Any) -> list[str]:
    def line(cells: Any) -> str:
        return "| " + " | ".join(_escaped(cell) for cell in cells) + " |"

    return [line(head), "|" + "---|" * len(head), *map(line, rows)]


def _escaped(value: Any) -> str:
    """A value as one line of Markdown that shows it: no markup, no HTML, no cell border, no line break in it."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    text = "".join(c if c.isprintable() else " " for c in text)
    return re.sub(r"([\\`*_{}\[\]()#+!|~$:@^-])", r"\\\1", html.escape(text, quote=False))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m abd_core.export", description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="a finished run's folder, e.g. runs/defend/30b109639bbd")
    parser.add_argument("out", type=Path, help="a new folder")
    chosen = parser.parse_args(arguments)
    print(export(load_run(chosen.run), chosen.out))


if __name__ == "__main__":
    try:
        main()
    except AbdError as error:
        sys.exit(str(error))
