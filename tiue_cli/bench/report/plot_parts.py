"""What the plots of a report are made of: panels of labelled rows, ticks that say plain numbers."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from tiue_cli.base.text import plain
from tiue_cli.bench.report.svg import colour, drawing, new_figure, to_svg
from tiue_cli.bench.report.view import Setting

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH_PX: Final = 760
ROW_PX: Final = 26
LABEL_CHARS: Final = 34
PANEL_PX: Final = 70
"""Height of a panel's title, ticks and axis label."""
BAR: Final = 0.62
"""Height of a bar, in rows."""


@dataclass(frozen=True)
class Plot:
    """A plot as ``svg``; ``caption`` says what is seen and how to read it."""

    title: str
    caption: str
    svg: str


def make_plot(name: str, title: str, caption: str, *, height_px: float, draw: Callable[[Figure], None]) -> Plot:
    """Draw a plot; ``name`` must be unique on the page."""
    with drawing():
        figure = new_figure(WIDTH_PX, height_px)
        draw(figure)
        return Plot(title, caption, to_svg(figure, name=name, description=f"{title}. {caption}"))


def panels_of(figure: Figure, rows: Sequence[int]) -> list[Axes]:
    """One panel under the other, as high as their rows need."""
    grid = figure.add_gridspec(len(rows), 1, height_ratios=rows)
    return [figure.add_subplot(grid[index, 0]) for index in range(len(rows))]


def rows_height_px(panels: Sequence[Sequence[str]]) -> float:
    """Of panels with these labels; rows are equally high, as the longest label needs."""
    lines = max(len(_wrapped(label)) for labels in panels for label in labels)
    return sum(len(labels) * (ROW_PX + (lines - 1) * 8) + PANEL_PX for labels in panels)


def _wrapped(label: str) -> list[str]:
    return textwrap.wrap(plain(label), LABEL_CHARS) or [""]


def name_rows(axes: Axes, labels: Sequence[str]) -> None:
    """Row i at y = i from the top, its label at the left of the panel."""
    axes.set_ylim(len(labels) - 0.5, -0.55)
    axes.spines["left"].set_visible(False)
    axes.set_yticks(range(len(labels)), ["\n".join(_wrapped(label)) for label in labels])
    axes.tick_params(axis="y", length=0, labelcolor=colour("ink"))


def batch_words(setting: Setting, what: str) -> str:
    """E.g. ``median time of a batch of 4 images, ms``."""
    return f"{what} of {'an image' if setting.batch == 1 else f'a batch of {setting.batch} images'}, ms"


def slug(setting: Setting) -> str:
    """A setting within an id."""
    return f"{setting.size[0]}x{setting.size[1]}-b{setting.batch}"


def thousands(axis: Any) -> None:
    """A few ticks, with commas."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axis.set_major_locator(MaxNLocator(nbins=6, min_n_ticks=2))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))


_LOG_STEPS: Final = ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 7))


def plain_log_ticks(axis: Any, low: float, high: float, *, unit: str = "") -> None:
    """Few round numbers, written out: the coarsest steps that give three ticks, or evenly spaced ones in between."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    choices = [[step * 10.0**exponent for exponent in exponents for step in steps] for steps in _LOG_STEPS]
    choices.append([float(tick) for tick in MaxNLocator(nbins=4).tick_values(low, high)])
    inside = [[tick for tick in ticks if low * 0.999 <= tick <= high * 1.001] for ticks in choices]
    axis.set_major_locator(FixedLocator(next((ticks for ticks in inside if len(ticks) >= 3), inside[-1])))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}{unit}"))


def paper_box() -> dict[str, Any]:
    """A box in the page's colour behind a text, so that no line runs through it."""
    return {"facecolor": colour("paper"), "edgecolor": "none", "pad": 1.0}


def beside(axes: Axes, text: str, x: float, y: float, *, gap_px: float = 5, **style: Any) -> None:
    """A text to the right of a point, in the middle of its height."""
    axes.annotate(text, (x, y), (gap_px, 0), textcoords="offset points", va="center", **style)
