"""Figures of a table of one's own: whatever its labels are and whatever it lacks, they are drawn."""

from __future__ import annotations

import io

import pandas as pd
import pytest
from matplotlib.figure import Figure
from test_results import synthetic

from abd_core import plots
from abd_core.results import VICTIM, differences

WILD = r"mine $\foo{$"


def drawn(figure: Figure) -> Figure:
    """The figure, once matplotlib has typeset all of it."""
    figure.savefig(io.BytesIO())
    return figure


@pytest.fixture(scope="module")
def rows() -> pd.DataFrame:
    """An attack and a defence have a label that would be no formula, and a machine too."""
    made = synthetic((WILD, "BadNet"), (VICTIM, WILD))
    return made[made["split"] == "eval"].assign(device=WILD)


@pytest.mark.parametrize("kind", ["plane", "forest", "matrix", "costs", "doses"])
def test_a_label_between_dollar_signs_is_drawn_as_it_is(kind: str, rows: pd.DataFrame):
    dosed = rows.assign(attack=rows["attack"] + ", rate 0.1")
    figures = {
        "plane": lambda: plots.plane(rows, [WILD], [VICTIM, WILD], title="t"),
        "forest": lambda: plots.forest(differences(rows, [(VICTIM, WILD)]), title="t"),
        "matrix": lambda: plots.matrix(rows, [WILD], [WILD], title="t"),
        "costs": lambda: plots.costs(rows, [WILD], title="t"),
        "doses": lambda: plots.doses(dosed, rate=0.01, title="t"),
    }
    figure = drawn(figures[kind]())
    texts = {text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text"))}
    assert any(r"mine \$\foo{\$" in text for text in texts)


def test_a_plane_of_one_metric_alone_is_drawn(rows: pd.DataFrame):
    for metric in ("asr", "ca_top1"):
        part = rows[rows["metric"] == metric]
        axes = drawn(plots.plane(part, ["BadNet"], [VICTIM], title="t")).axes[0]
        assert axes.get_title() == "BadNet"


def test_a_dose_that_is_no_share_is_left_out(rows: pd.DataFrame):
    victims = rows[rows["defence"].eq(VICTIM) & rows["attack"].eq("BadNet")]
    doses = [victims.assign(attack=f"BadNet, rate {share}") for share in ("0.2", "high", "nan", "inf", "-1", "0")]
    axes = drawn(plots.doses(pd.concat([victims, *doses]), rate=0.01, title="t")).axes[0]
    assert axes.get_lines()[0].get_xdata() == pytest.approx([1, 20])
