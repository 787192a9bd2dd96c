"""The book's figures and tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
import torch
from matplotlib.figure import Figure

METRICS = {
    "ca_top1": "CA",
    "ca_top5": "CA top-5",
    "ca_top10": "CA top-10",
    "asr": "ASR",
    "asr_all": "ASR, all images",
    "ra": "RA",
}


def style() -> None:
    """One look for all figures: seaborn's white grid, a colour-blind-safe palette, quiet spines."""
    sns.set_theme(
        context="notebook", style="whitegrid", palette="colorblind", rc={"figure.dpi": 110, "savefig.bbox": "tight"}
    )


def results_table(
    evaluations: Mapping[str, Mapping[str, Any]], metrics: Sequence[str] = tuple(METRICS)
) -> pd.DataFrame:
    """A row a model and metric: value and 95 % interval in %, and n.

    Args:
        evaluations: model name -> metrics as `Evaluation.to_dict` writes them.
    """
    rows = [
        {
            "model": model,
            "metric": METRICS[name],
            "value": 100 * rate["value"],
            "ci_low": 100 * rate["ci_low"],
            "ci_high": 100 * rate["ci_high"],
            "n": rate["n"],
        }
        for model, record in evaluations.items()
        for name in metrics
        if (rate := record.get(name))
    ]
    return pd.DataFrame(rows)


def wide_table(evaluations: Mapping[str, Mapping[str, Any]], metrics: Sequence[str] = tuple(METRICS)) -> pd.DataFrame:
    """The same to read: a row a metric, a column a model, cells `value [low, high]` in %, and n.

    Raises:
        ValueError: the models were measured on different numbers of images.
    """
    long = results_table(evaluations, metrics)
    cells = long.assign(cell=[f"{r.value:.1f} [{r.ci_low:.1f}, {r.ci_high:.1f}]" for r in long.itertuples()])
    wide = cells.pivot(index="metric", columns="model", values="cell").loc[long["metric"].unique(), list(evaluations)]
    counts = long.groupby("metric")["n"]
    if (counts.nunique() > 1).any():
        raise ValueError("wide_table: the models were measured on different numbers of images")
    wide["n"] = counts.first().loc[wide.index]
    wide.columns.name = None
    wide.index.name = "% [95 % interval]"
    return wide


def bars(
    evaluations: Mapping[str, Mapping[str, Any]], *, title: str, metrics: Sequence[str] = ("ca_top1", "asr")
) -> Figure:
    """Grouped bars with 95 % intervals, in %, a group a metric and a bar a model."""
    long = results_table(evaluations, metrics)
    models = list(evaluations)
    figure, axes = plt.subplots(figsize=(2 + 0.8 * len(metrics) * len(models), 3.6), layout="constrained")
    width = 0.8 / len(models)
    for i, model in enumerate(models):
        part = long[long["model"] == model]
        x = [
            list(METRICS[m] for m in metrics).index(name) + (i - (len(models) - 1) / 2) * width
            for name in part["metric"]
        ]
        error = [(part["value"] - part["ci_low"]).to_numpy(), (part["ci_high"] - part["value"]).to_numpy()]
        drawn = axes.bar(x, part["value"], width, yerr=error, capsize=3, label=model)
        axes.bar_label(drawn, fmt="%.1f", padding=2, fontsize=9)
    axes.set(ylim=(0, 109), ylabel="%", title=title)
    axes.set_xticks(range(len(metrics)), [METRICS[m] for m in metrics])
    axes.grid(axis="x", visible=False)
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def images(rows: Mapping[str, torch.Tensor], *, title: str = "") -> Figure:
    """A labelled row of pictures for each entry; tensors are (N, 3, H, W) in [0, 1]."""
    columns = max(len(row) for row in rows.values())
    figure, grid = plt.subplots(
        len(rows), columns, figsize=(1.05 * columns + 1, 1.1 * len(rows) + 0.3), squeeze=False, layout="constrained"
    )
    for axes_row, (label, row) in zip(grid, rows.items(), strict=True):
        for axes in axes_row:
            axes.axis("off")
        for axes, image in zip(axes_row, row, strict=False):
            axes.imshow(image.detach().cpu().permute(1, 2, 0).clamp(0, 1).numpy(), interpolation="nearest")
        axes_row[0].text(-0.1, 0.5, label, transform=axes_row[0].transAxes, ha="right", va="center", fontsize=10)
    figure.suptitle(title)
    return figure


def amplified(delta: torch.Tensor) -> torch.Tensor:
    """A signed perturbation (..., 3, H, W) as a picture in [0, 1]: grey is 0, the largest magnitude black or full."""
    return 0.5 + 0.5 * delta / delta.abs().amax().clamp_min(1e-8)


def curves(history: pd.DataFrame, *, x: str, panels: Sequence[Sequence[str]], title: str, window: int = 1) -> Figure:
    """Loss curves, a panel for each group of columns; `window` smooths by a running mean."""
    figure, grid = plt.subplots(1, len(panels), figsize=(4.2 * len(panels), 3.1), squeeze=False, layout="constrained")
    for axes, columns in zip(grid[0], panels, strict=True):
        for column in columns:
            axes.plot(history[x], history[column].rolling(window, min_periods=1).mean(), label=column.replace("_", " "))
        axes.set(xlabel=x, ylabel=columns[0].replace("_", " ") if len(columns) == 1 else "loss")
        if len(columns) > 1:
            axes.legend(frameon=False)
    figure.suptitle(title)
    return figure
