"""The book's figures and tables."""

from __future__ import annotations

import itertools
import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import torch
from IPython.display import Markdown
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from abd_core import escape
from abd_core.evaluate import Rate
from abd_core.results import METRICS, MOST_CA_LOST, TO_BEAT, VICTIM, front, means, replication, shown_difference


def style() -> None:
    """One look for all figures: seaborn's white grid, a colour-blind-safe palette; tables are shown whole."""
    pd.set_option("display.max_rows", None, "display.max_colwidth", None)
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
    axes.set(ylim=(0, 109), ylabel="%", title=escape.figure(title))
    axes.set_xticks(range(len(metrics)), [METRICS[m] for m in metrics])
    axes.grid(axis="x", visible=False)
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


# The grid's results: tables and figures of chapters 4 and 5. All take rows of one split as `read_results` gives them,
# show what is there, and say how many seeds a figure rests on.


def table(
    results: pd.DataFrame, attacks: Iterable[str], defences: Iterable[str], metrics: Sequence[str] = ("ca_top1", "asr")
) -> pd.DataFrame:
    """Means over seeds beside the paper's values, in %; a row an attack and defence that has been measured.

    Cells are `mean ± half the t-interval over k seeds (k)`, or for one seed `value [interval of that run] (1)`.
    """
    summary = means(results)
    rows = []
    for attack, defence in itertools.product(attacks, defences):
        row = {"attack": attack, "defence": defence}
        for metric in metrics:
            if (attack, defence, metric) in summary.index:
                cell = summary.loc[(attack, defence, metric)]
                row[METRICS[metric]] = _cell(cell)
                row[f"{METRICS[metric]}, paper"] = "" if pd.isna(cell["paper"]) else f"{100 * cell['paper']:.2f}"
        if len(row) > 2:
            rows.append(row)
    columns = [name for metric in metrics for name in (METRICS[metric], f"{METRICS[metric]}, paper")]
    shown = pd.DataFrame(rows, columns=["attack", "defence", *columns]).fillna("").set_index(["attack", "defence"])
    return shown[[name for name in columns if not name.endswith("paper") or shown[name].any()]]


def _cell(cell: pd.Series) -> str:
    value, low, high, half = (100 * cell[name] for name in ("mean", "ci_low", "ci_high", "half"))
    spread = f"[{low:.1f}, {high:.1f}]" if cell["seeds"] == 1 else f"± {half:.1f}"
    return f"{value:.1f} {spread} ({cell['seeds']:.0f})"


def single_runs(
    results: pd.DataFrame, attacks: Iterable[str], defences: Iterable[str], metric: str = "asr"
) -> pd.DataFrame:
    """A metric of every run, `value [interval over the test images]` in %; a row an attack and defence, a column a
    seed."""
    rows = results[results["metric"] == metric]
    cells = rows.assign(cell=[str(Rate(r.value, r.n, r.ci_low, r.ci_high)) for r in rows.itertuples()])
    wide = cells.pivot(index=["attack", "defence"], columns="seed", values="cell").fillna("")
    there = [cell for cell in itertools.product(attacks, defences) if cell in wide.index]
    return wide.loc[there].rename_axis(columns=f"{METRICS[metric]}, seed")


def difference_table(differences: pd.DataFrame) -> pd.DataFrame:
    """Rows of `differences` to read: points with their interval, the paper's difference, seeds, and what it says."""
    shown = pd.DataFrame(
        {
            "difference": [f"{r.defence} - {r.against}" for r in differences.itertuples()],
            "attack": differences["attack"].to_numpy(),
            "metric": differences["metric"].map(METRICS).to_numpy(),
            "here [95 % over seeds]": [shown_difference(r) for r in differences.itertuples()],
            "paper": ["" if pd.isna(paper) else f"{100 * paper:+.2f}" for paper in differences["paper"]],
            "seeds": differences["seeds"].to_numpy(),
            "of two machines": differences["two_machines"].to_numpy(),
            "here it is": differences["side"].to_numpy(),
        }
    )
    shown = shown.set_index(["difference", "attack", "metric"])
    return shown.drop(columns=[name for name in ("paper", "of two machines") if not shown[name].any()])


def aims_table(aims: pd.DataFrame) -> pd.DataFrame:
    """Rows of `results.aims` to read: CA lost in points, ASR in %, and which of the aims these means meet."""
    kept = (aims["lost"] <= MOST_CA_LOST).map({True: "yes", False: "no"})
    beaten = {
        f"ASR below {name}'s?": [
            "not measured" if pd.isna(apart) else "yes" if apart < 0 else "no" for apart in aims[name]
        ]
        for name in TO_BEAT
    }
    return pd.DataFrame(
        {
            "CA lost, points": [f"{100 * lost:.2f}" for lost in aims["lost"]],
            f"at most {100 * MOST_CA_LOST:.0f} points of CA lost?": kept.to_numpy(),
            "ASR, %": [f"{100 * asr:.1f}" for asr in aims["asr"]],
            **beaten,
        },
        index=aims.index,
    )


def _timed(results: pd.DataFrame, defences: Iterable[str]) -> pd.DataFrame:
    """A row a timed run: `attack`, `defence`, `seed`, `seconds` and `machine` (device and threads)."""
    runs = results[results["defence"].isin(list(defences))].drop_duplicates(["attack", "defence", "seed", "device"])
    threads = runs["versions"].str.extract(r"(, \d+ threads?)", expand=False)
    return runs.assign(machine=runs["device"] + threads.fillna("")).dropna(subset="seconds")


def bullets(lines: Iterable[str]) -> Markdown:
    """Sentences as a list to show."""
    return Markdown("\n".join(f"- {line}" for line in lines) or "- not measured yet")


def cost_table(results: pd.DataFrame, defences: Iterable[str]) -> pd.DataFrame:
    """Wall time of a run in seconds: median, extremes and number of runs; a row a defence and machine."""
    times = _timed(results, defences).groupby(["defence", "machine"], sort=False)["seconds"]
    return times.agg(median="median", fastest="min", slowest="max", runs="size").round(1)


def replication_table(results: pd.DataFrame, again: pd.DataFrame) -> pd.DataFrame:
    """`results.replication` in points; a row an attack and metric."""
    found = replication(results, again).reset_index()
    points = {
        "runs made twice": found["runs"],
        "mean difference": [f"{100 * value:+.1f}" for value in found["bias"]],
        "two machines, one seed": [f"{100 * value:.1f}" for value in found["machines"]],
        "two seeds, one machine": [f"{100 * value:.1f}" for value in found["seeds"]],
    }
    return pd.DataFrame({"attack": found["attack"], "metric": found["metric"].map(METRICS), **points}).set_index(
        ["attack", "metric"]
    )


MARKERS = "o^DvP*X<>p"  # no square: that is for what does not compete


def _colours(labels: Sequence[str]) -> dict[str, Any]:
    """Colours of the colour-blind-safe palette; from the eleventh label on they come again, darker."""
    palette = sns.color_palette("colorblind")
    palette += [sns.set_hls_values(colour, l=0.25) for colour in palette]
    return dict(zip(labels, itertools.cycle(palette), strict=False))


def _without_rows(title: str) -> Figure:
    """Stands in for a figure that has nothing to show yet."""
    figure, axes = plt.subplots(figsize=(6, 1.2), layout="constrained")
    axes.text(0.5, 0.5, "no rows yet", ha="center", va="center")
    axes.set_axis_off()
    figure.suptitle(escape.figure(title))
    return figure


def plane(
    results: pd.DataFrame, attacks: Sequence[str], rivals: Sequence[str], *, aside: Sequence[str] = (), title: str
) -> Figure:
    """CA against ASR, a panel an attack: lower right is better.

    Seeds are faint, means bold with their intervals, the paper's points hollow. Every rival has a colour and a shape of
    its own. The line is the Pareto front of the rivals' means; defences `aside` are squares and do not compete for it.
    """
    xy = ["ca_top1", "asr"]
    results = results[results["metric"].isin(xy) & results["attack"].isin(list(attacks))]
    if results.empty:
        return _without_rows(title)
    both = pd.MultiIndex.from_product([["mean", "half", "paper"], xy])  # a metric may not have been measured
    summary = 100 * means(results)[["mean", "half", "paper"]].unstack("metric").reindex(columns=both)
    runs = results.pivot(index=["attack", "defence", "seed"], columns="metric", values="value")
    runs = 100 * runs.reindex(columns=xy)
    colours, columns = _colours(rivals) | _colours(aside), min(2, len(attacks))
    markers = dict(zip(rivals, itertools.cycle(MARKERS), strict=False))
    rows = math.ceil(len(attacks) / columns)
    size = (3.9 * columns + 1.8, 3.6 * rows)
    figure, grid = plt.subplots(
        rows, columns, figsize=size, squeeze=False, sharex=True, sharey=True, layout="constrained"
    )
    for axes, attack in zip(grid.flat, attacks, strict=False):
        for name, colour in colours.items():
            if (attack, name) not in summary.index:
                continue
            cell, marker = summary.loc[(attack, name)], markers.get(name, "s")
            axes.plot(*runs.loc[(attack, name)].T.to_numpy(), marker, color=colour, alpha=0.3, ms=5, mew=0)
            error = dict(zip(("xerr", "yerr"), cell["half"][xy], strict=True))
            label = escape.figure(name)
            axes.errorbar(*cell["mean"][xy], **error, fmt=marker, color=colour, ms=8, elinewidth=1, label=label)
            axes.plot(*cell["paper"][xy], marker, color=colour, ms=8, mfc="none", mew=1.5)
        best = 100 * front(results, attack, rivals)
        axes.step(best["ca_top1"], best["asr"], color="0.4", lw=1, ls="--", zorder=0)
        axes.set(title=escape.figure(attack), xlabel="CA, %", ylabel="ASR, %", ylim=(-3, 103))
        axes.tick_params(labelbottom=True)
    for axes in grid.flat[len(attacks) :]:
        axes.set_axis_off()
    shown = {label: h for axes in grid.flat for h, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(shown.values(), shown.keys(), loc="outside right upper", frameon=False)
    figure.suptitle(escape.figure(title))
    return figure


def forest(differences: pd.DataFrame, *, title: str, label: str = "against") -> Figure:
    """Paired differences in points with their 95 % t-intervals over seeds; a panel a metric, a colour an attack.

    Args:
        differences: rows of `differences`, of one or several pairs of defences.
        label: the column that names a row of the figure. A single seed has no interval; hollow diamonds: the paper.
    """
    if differences.empty:
        return _without_rows(title)
    metrics, attacks = differences["metric"].unique(), differences["attack"].unique()
    names = pd.Index(differences[label].unique())
    colours = _colours(attacks)
    height = 1.4 + len(names) * max(0.35, 0.16 * len(attacks))
    figure, grid = plt.subplots(
        1, len(metrics), figsize=(3.6 * len(metrics) + 3.5, height), squeeze=False, sharey=True, layout="constrained"
    )
    for axes, metric in zip(grid[0], metrics, strict=True):
        for i, attack in enumerate(attacks):
            part = differences[differences["metric"].eq(metric) & differences["attack"].eq(attack)]
            y = names.get_indexer(part[label]) + (i - (len(attacks) - 1) / 2) * 0.8 / len(attacks)
            half = 100 * (part["ci_high"] - part["difference"])
            look = {"fmt": "o", "color": colours[attack], "ms": 5, "capsize": 2, "label": escape.figure(attack)}
            axes.errorbar(100 * part["difference"], y, xerr=half, **look)
            axes.plot(100 * part["paper"], y, "D", color=colours[attack], ms=6, mfc="none")
        axes.axvline(0, color="0.4", lw=1)
        axes.set(title=METRICS[metric], xlabel="difference, points")
    grid[0][0].set_yticks(range(len(names)), [escape.figure(name) for name in names])
    grid[0][0].set_ylim(len(names) - 0.5, -0.5)
    grid[0][-1].legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    figure.suptitle(escape.figure(title))
    return figure


def matrix(
    results: pd.DataFrame, defences: Iterable[str], attacks: Iterable[str], *, title: str, metric: str = "asr"
) -> Figure:
    """Heat map of one metric in %, a row a defence and a column an attack; cells are means ± half the t-interval."""
    summary = means(results[results["metric"] == metric]).reset_index()
    mean, half = (100 * summary.pivot(index="defence", columns="attack", values=part) for part in ("mean", "half"))
    there = [name for name in defences if name in mean.index], [name for name in attacks if name in mean.columns]
    if not all(there):
        return _without_rows(title)
    mean, half = (part.loc[there].rename(index=escape.figure, columns=escape.figure) for part in (mean, half))
    shown = mean.map("{:.0f}".format) + half.map(lambda h: "" if pd.isna(h) else f" ± {h:.0f}")
    size = (3.5 + 1.2 * len(there[1]), 1.8 + 0.42 * len(there[0]))
    figure, axes = plt.subplots(figsize=size, layout="constrained")
    sns.heatmap(
        mean,
        annot=shown,
        fmt="",
        vmin=0,
        vmax=100,
        cmap="rocket_r",
        ax=axes,
        cbar_kws={"label": f"{METRICS[metric]}, %"},
    )
    axes.set(xlabel="attack", ylabel="defence", title=escape.figure(title))
    axes.set_xticks(axes.get_xticks(), mean.columns, rotation=30, ha="right")
    axes.tick_params(axis="y", rotation=0)
    return figure


def costs(results: pd.DataFrame, defences: Sequence[str], *, title: str) -> Figure:
    """Wall time of single runs and its medians, a row a defence, a colour a machine; the axis is logarithmic."""
    runs = _timed(results, defences)
    if runs.empty:
        return _without_rows(title)
    there = [escape.figure(name) for name in defences if name in set(runs["defence"])]
    runs = runs.assign(**{name: runs[name].map(escape.figure) for name in ("defence", "machine")})
    figure, axes = plt.subplots(figsize=(8, 1.4 + 0.3 * len(there)), layout="constrained")
    sns.stripplot(runs, x="seconds", y="defence", hue="machine", order=there, alpha=0.6, jitter=0.2, ax=axes)
    medians = runs.groupby(["defence", "machine"])["seconds"].median().reset_index()
    axes.plot(medians["seconds"], medians["defence"], "|", color="black", ms=16, label="median of a machine")
    axes.set(xscale="log", xlabel="seconds", ylabel="", title=escape.figure(title))
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def doses(results: pd.DataFrame, *, rate: float, title: str) -> Figure:
    """ASR and CA of victims by the share of the pairs that is poisoned: means with 95 % intervals, a line an attack.

    Args:
        results: rows of one split; an attack `<name>, rate <share>` is another dose of `<name>`.
        rate: the plain attacks' share.
    """
    victims = results[results["defence"].eq(VICTIM) & results["metric"].isin(["asr", "ca_top1"])]
    parts = victims["attack"].str.extract(r"^(?P<name>[^,]*)(?:, rate (?P<share>.*))?$")
    share = pd.to_numeric(parts["share"], errors="coerce")
    victims = victims.assign(name=parts["name"], share=share.where(parts["share"].notna(), rate))
    dosed = parts["name"].isin(parts["name"][share.notna()])
    victims = victims[dosed & victims["share"].between(0, 1, inclusive="right")]  # another rate is no share
    if victims.empty:
        return _without_rows(title)
    figure, grid = plt.subplots(1, 2, figsize=(10, 3.4), layout="constrained")
    for axes, metric in zip(grid, ("asr", "ca_top1"), strict=True):
        for name, part in victims[victims["metric"] == metric].groupby("name", sort=False):
            points = means(part).reset_index().merge(part[["attack", "share"]].drop_duplicates()).sort_values("share")
            error = 100 * points["half"].fillna(0)
            axes.errorbar(
                100 * points["share"], 100 * points["mean"], error, marker="o", capsize=3, label=escape.figure(name)
            )
        axes.set(xscale="log", xlabel="% of pairs poisoned", ylabel=f"{METRICS[metric]} of the victim, %")
        shares = sorted(100 * victims["share"].unique())
        axes.set_xticks(shares, [f"{share:g}" for share in shares])
        axes.minorticks_off()
    grid[0].legend(frameon=False)
    figure.suptitle(escape.figure(title))
    return figure


def speeds(benchmarks: pd.DataFrame, metric: str, *, title: str) -> Figure:
    """Ratios to a case's first variant, a panel a device and a bar a variant; to the right of 1 is better than it.

    A line at a bar's end is the ratio's 95 % interval, where it was measured. Panels stand below one another, since a
    page is narrower than two of them. A case whose first variant is not that of the legend names it.

    Args:
        benchmarks: rows as `results.read_benchmarks` gives them.
    """
    rows = benchmarks[benchmarks["metric"].eq(metric) & benchmarks["ratio"].notna()]
    if rows.empty:
        return _without_rows(title)
    first = rows.groupby(["device", "case"])["variant"].transform("first")
    usual = first.eq(rows["variant"].iloc[0])
    rows = rows.assign(case=rows["case"].where(usual, rows["case"] + "\n1: " + first))
    devices = list(rows["device"].unique())
    heights = [1 + 0.22 * len(rows[rows["device"] == device]) for device in devices]
    figure, grid = plt.subplots(
        len(devices), 1, figsize=(9, sum(heights)), height_ratios=heights, squeeze=False, layout="constrained"
    )
    colours = _colours(list(rows["variant"].unique()))
    for axes, device in zip(grid[:, 0], devices, strict=True):
        part = rows[rows["device"] == device]
        cases, variants = list(part["case"].unique()), list(part["variant"].unique())
        look = {"hue": "variant", "palette": colours, "errorbar": None, "legend": False}
        sns.barplot(part, y="case", x="ratio", ax=axes, **look)
        for row in part.dropna(subset="ratio_low").itertuples():
            y = cases.index(row.case) + 0.8 * ((variants.index(row.variant) + 0.5) / len(variants) - 0.5)
            axes.plot([row.ratio_low, row.ratio_high], [y, y], color="0.2", linewidth=1)
        axes.axvline(1, color="0.3", linewidth=1)
        axes.set(xlabel=f"{metric}: times better than the first", ylabel="", title=escape.figure(device))
    handles = [Patch(color=colour, label=variant) for variant, colour in colours.items()]
    figure.legend(handles=handles, loc="outside right upper", frameon=False)
    figure.suptitle(escape.figure(title))
    return figure


def shares(benchmarks: pd.DataFrame, metrics: Mapping[str, str], *, of: str, title: str) -> Figure:
    """Ratios as shares, a row a device and variant and a bar a metric in it.

    Args:
        benchmarks: rows as `results.read_benchmarks` gives them.
        metrics: metric -> what it is called.
        of: what a ratio is a share of.
    """
    rows = benchmarks[benchmarks["metric"].isin(metrics) & benchmarks["ratio"].notna()]
    if rows.empty:
        return _without_rows(title)
    rows = rows.assign(
        row=[escape.figure(f"{device}: {name}") for device, name in zip(rows["device"], rows["variant"], strict=True)],
        metric=rows["metric"].map(metrics),
    )
    figure, axes = plt.subplots(figsize=(9, 1.2 + 0.4 * rows["row"].nunique()), layout="constrained")
    sns.barplot(rows, y="row", x="ratio", hue="metric", palette=_colours(list(metrics.values())), ax=axes)
    axes.axvline(1, color="0.3", linewidth=1)
    axes.set(xlabel=f"share of {of}", ylabel="", title=escape.figure(title))
    sns.move_legend(axes, "upper left", bbox_to_anchor=(1, 1), title=None, frameon=False)
    return figure


def roofline(benchmarks: pd.DataFrame, metrics: Mapping[str, str], *, title: str) -> Figure:
    """Achieved operations a second against operations a byte, under the ceilings that each benchmark has measured.

    A panel a device. A case's place to the right is its operations over its least traffic. What is made of products is
    bound by the level lines, what passes over memory once by the slanting ones.

    Args:
        metrics: benchmark -> the metric (in ms) that takes the operations.
    """
    devices = list(benchmarks["device"].unique())
    figure, grid = plt.subplots(
        max(1, len(devices)), 1, figsize=(9, 4.2 * max(1, len(devices))), squeeze=False, layout="constrained"
    )
    for axes, device in zip(grid[:, 0], devices, strict=False):
        rows = benchmarks[benchmarks["device"] == device]
        for (name, case), part in rows.groupby(["benchmark", "case"], sort=False):
            figures = part.set_index("metric")["value"]
            if name not in metrics or "operations" not in figures.index:
                continue
            operations = float(figures["operations"])
            times = part[part["metric"] == metrics[name]]
            best = times.loc[times["variant"].str.startswith("abd_core"), "value"].min()
            axes.scatter(operations / float(figures["least traffic"]), operations / best * 1e3, label=f"{name}: {case}")
        low, high = axes.get_xlim()
        reach = np.geomspace(max(low, 0.1), max(high, 10) * 2)
        ceilings = rows[rows["variant"].eq("ceiling") & rows["benchmark"].isin(metrics)]
        products = ceilings[ceilings["metric"] == "matrix product"]
        highest = 1e3 * products["value"].max() if len(products) else np.inf
        for look, row in zip(itertools.cycle(["-", "--", ":"]), ceilings.itertuples(), strict=False):
            level = np.full_like(reach, 1e3 * row.value)
            line = level if row.metric == "matrix product" else np.minimum(reach * row.value, highest)
            axes.plot(reach, line, look, color="0.3", label=f"{row.benchmark}: {row.metric}, {row.case}")
        axes.set(
            xscale="log",
            yscale="log",
            xlabel="operations a byte of least traffic",
            ylabel="GFLOP/s",
            title=escape.figure(device),
        )
        axes.legend(fontsize="small", frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    figure.suptitle(escape.figure(title))
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
        axes_row[0].text(
            -0.1, 0.5, escape.figure(label), transform=axes_row[0].transAxes, ha="right", va="center", fontsize=10
        )
    figure.suptitle(escape.figure(title))
    return figure


def amplified(delta: torch.Tensor) -> torch.Tensor:
    """A signed perturbation (..., 3, H, W) as a picture in [0, 1]: grey is 0, the largest magnitude black or full."""
    return 0.5 + 0.5 * delta / delta.abs().amax().clamp_min(1e-8)


def curves(history: pd.DataFrame, *, x: str, panels: Sequence[Sequence[str]], title: str, window: int = 1) -> Figure:
    """Loss curves, a panel for each group of columns; `window` smooths by a running mean."""
    across = 3 if len(panels) == 3 else min(2, len(panels))
    down = math.ceil(len(panels) / across)
    size = (min(4.6 * across, 10), 2.9 * down)
    figure, grid = plt.subplots(down, across, figsize=size, squeeze=False, layout="constrained")
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    for axes, columns in zip(grid.flat, panels, strict=False):
        for column in columns:
            axes.plot(history[x], history[column].rolling(window, min_periods=1).mean(), label=column.replace("_", " "))
        axes.set(xlabel=x, ylabel=columns[0].replace("_", " ") if len(columns) == 1 else "loss")
        if len(columns) > 1:
            axes.legend(frameon=False)
    figure.suptitle(escape.figure(title))
    return figure


# --- similarity (chapter 6) ---------------------------------------------------------------------------------


def estimates(table: pd.DataFrame, *, index: str, columns: str, digits: int = 1) -> pd.DataFrame:
    """A tidy table of `value`, `ci_low` and `ci_high` to read: cells `value [low, high]`, in the order of the table."""
    form = f"{{:.{digits}f}} [{{:.{digits}f}}, {{:.{digits}f}}]"
    cells = [form.format(row.value, row.ci_low, row.ci_high) for row in table.itertuples()]
    wide = table.assign(cell=cells).pivot(index=index, columns=columns, values="cell")
    return wide.loc[table[index].unique(), table[columns].unique()].rename_axis(index=None, columns=None)


def seeds_table(means: pd.DataFrame, *, index: Sequence[str], columns: str = "model", digits: int = 1) -> pd.DataFrame:
    """Rows of `fig2.over_seeds` to read: cells `mean ± half the 95 % interval (seeds)`, in the order of the table."""
    cells = [
        f"{row.value:.{digits}f}"
        + ("" if row.seeds < 2 else f" ± {row.ci_high - row.value:.{digits}f}")
        + f" ({row.seeds})"
        for row in means.itertuples()
    ]
    wide = means.assign(cell=cells).pivot_table("cell", list(index), columns, aggfunc="first", sort=False)
    return wide.fillna("").rename_axis(columns=None)


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
        below = [y + 0.43 for y in range(len(rows))]  # in no model's line: which model it was is not known
        axes.errorbar(paper, below, fmt="D", mfc="none", mec="black", label="paper (its own model)")
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
    axes.set(xlabel=xlabel, ylabel="", title=escape.figure(title))
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
    figure, grid = plt.subplots(1, len(panels), figsize=(3.2 * len(panels), 3.9), squeeze=False, layout="constrained")
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
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, markerscale=3, ncols=len(labels), loc="outside lower center")
    figure.suptitle(escape.figure(title))
    return figure
