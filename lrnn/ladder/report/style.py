"""How arms and ranges look in all pictures: a colour for the arm, line and marker for the range."""

from typing import Any

from lrnn.eval.length_plot import panels
from lrnn.ladder.report.gathered import Gathered
from lrnn.ladder.report.protocol import arm_title

# Okabe and Ito's colours, which people with colour blindness can tell apart.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
BY_RANGE = {"negative": ("-", "o"), "positive": ("--", "s"), "none": (":", "^")}
DPI = 110

Kind = tuple[str, str]  # arm and range


class Style:
    """The looks of the kinds of a ladder."""

    def __init__(self, gathered: Gathered):
        self._gathered = gathered
        self._arms = list(gathered.ladder.arms)

    def color(self, arm: str) -> str:
        """Return the colour of an arm."""
        return COLORS[self._arms.index(arm) % len(COLORS)]

    def of(self, kind: Kind) -> dict[str, Any]:
        """Return keywords for lines: hollow squares and dashes are [0, 1], full circles and lines [-1, 1]."""
        color = self.color(kind[0])
        line, marker = BY_RANGE[kind[1]]
        face = "white" if kind[1] == "positive" else color
        label = arm_title(self._gathered, *kind)
        return {"color": color, "ls": line, "marker": marker, "ms": 5, "mfc": face, "lw": 1.3, "label": label}


def grid_of_panels(count: int, columns: int, sharey: bool = True) -> tuple[Any, list[Any]]:
    """Return a figure with `count` panels and its panels, each with a grid."""
    figure, axes = panels(count, columns, sharey)
    for axis in axes:
        axis.grid(alpha=0.3)
    return figure, axes


def add_legend(figure: Any, axes: list[Any]) -> None:
    """Add one legend of all panels below them, as wide as they are."""
    handles: dict[str, Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    if handles:
        columns = min(len(axes), 3)
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", fontsize=8, ncols=columns)
