"""The book's figures and tables."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
import torch
from matplotlib.axes import Axes
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


# --- similarity (chapter 6) ---------------------------------------------------------------------------------


def estimates(table: pd.DataFrame, *, index: str, columns: str, digits: int = 1) -> pd.DataFrame:
    """A tidy table of `value`, `ci_low` and `ci_high` to read: cells `value [low, high]`, in the order of the table."""
    form = f"{{:.{digits}f}} [{{:.{digits}f}}, {{:.{digits}f}}]"
    cells = [form.format(row.value, row.ci_low, row.ci_high) for row in table.itertuples()]
    wide = table.assign(cell=cells).pivot(index=index, columns=columns, values="cell")
    return wide.loc[table[index].unique(), table[columns].unique()].rename_axis(index=None, columns=None)


def intervals(axes: Axes, table: pd.DataFrame, *, row: str) -> None:
    """Values with their 95 % intervals as horizontal whiskers: a line for each `row`, a colour for each `model`.

    Args:
        table: `row`, `model`, `value`, `ci_low`, `ci_high`; where there is a column `paper`, its value as a diamond.
    """
    rows, models = list(table[row].unique()), list(table["model"].unique())
    for i, model in enumerate(models):
        part = table[table["model"] == model]
        y = [rows.index(name) + 0.8 * ((i + 0.5) / len(models) - 0.5) for name in part[row]]
        error = [part["value"] - part["ci_low"], part["ci_high"] - part["value"]]
        axes.errorbar(
            part["value"], y, xerr=error, fmt="o", markersize=4, capsize=3, color=f"C{i}", mec="black", label=model
        )
    if "paper" in table:
        paper = table.drop_duplicates(row)["paper"]
        axes.errorbar(paper, range(len(rows)), fmt="D", mfc="none", mec="black", label="paper (its own model)")
    axes.set_yticks(range(len(rows)), [textwrap.fill(name, 21) for name in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.grid(axis="y", visible=False)


def distributions(
    values: pd.DataFrame, means: pd.DataFrame, *, row: str, value: str, xlabel: str, title: str
) -> Figure:
    """Violins of `value` for each `row` and `model`, with the means that `intervals` draws on top of them."""
    rows = list(means[row].unique())
    figure, axes = plt.subplots(figsize=(8.5, 0.6 + 0.95 * len(rows)), layout="constrained")
    sns.violinplot(
        values,
        y=row,
        x=value,
        hue="model",
        order=rows,
        density_norm="width",
        inner=None,
        alpha=0.4,
        linewidth=0.5,
        legend=False,
        ax=axes,
    )
    intervals(axes, means, row=row)
    axes.set(xlabel=xlabel, ylabel="", title=title)
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def clouds(
    panels: Mapping[str, Mapping[str, torch.Tensor]], shares: Mapping[str, torch.Tensor], *, title: str
) -> Figure:
    """Points in two principal components, a panel a model; an arrow leads from the first cloud's mean to each other's.

    Args:
        panels: model -> cloud -> coordinates (N, 2).
        shares: model -> share of the variance on either axis, (2,).
    """
    figure, grid = plt.subplots(1, len(panels), figsize=(4.4 * len(panels), 4.2), squeeze=False, layout="constrained")
    for axes, (model, sets) in zip(grid[0], panels.items(), strict=True):
        start = next(iter(sets.values())).mean(0).tolist()
        for i, (label, points) in enumerate(sets.items()):
            axes.scatter(*points.T.numpy(), s=6, alpha=0.35, linewidth=0, color=f"C{i}", label=label)
        for i, points in enumerate(list(sets.values())[1:], 1):
            style = {"arrowstyle": "-|>", "color": "black", "linewidth": 3.5}
            for look in (style, {**style, "color": f"C{i}", "linewidth": 2}):
                axes.annotate("", xy=points.mean(0).tolist(), xytext=start, arrowprops={**look, "shrinkA": 0})
        first, second = (f"axis {i + 1}: {share:.0%} of the variance" for i, share in enumerate(shares[model].tolist()))
        axes.set(title=model, xlabel=first, ylabel=second, aspect="equal")
    grid[0][-1].legend(frameon=False, markerscale=3, loc="upper left", bbox_to_anchor=(1, 1))
    figure.suptitle(title)
    return figure
