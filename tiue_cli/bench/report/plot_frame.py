"""What the plots of a report have in common: their widths, rows of subjects, and axes. Lengths are in CSS pixels.

Text of subjects comes from outside: it is drawn as it is, never as mathematics or markup.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np

from tiue_cli.bench.report.svg import colour, drawing, new_figure, to_svg
from tiue_cli.bench.report.view import Place
from tiue_cli.text import plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Width = Literal["wide", "narrow"]
WIDTHS_PX: Final[dict[Width, int]] = {"wide": 760, "narrow": 350}
FONT_PX: Final = 12.5
ROW_PX: Final[dict[Width, int]] = {"wide": 26, "narrow": 42}
LABEL_CHARS: Final[dict[Width, int]] = {"wide": 34, "narrow": 46}
AXIS_PX: Final = 46
"""Height of a panel's title, ticks and axis label."""
TITLE_PX: Final = 24


@dataclass(frozen=True)
class Plot:
    """A plot in both widths; ``caption`` says what is seen and how to read it."""

    title: str
    caption: str
    wide: str
    narrow: str


Draw = Callable[["Figure", Width], None]


def make_plot(name: str, title: str, caption: str, height_px: Callable[[Width], float], draw: Draw) -> Plot:
    made: dict[Width, str] = {}
    for width, width_px in WIDTHS_PX.items():
        with drawing(font_px=FONT_PX if width == "wide" else FONT_PX - 1):
            figure = new_figure(width_px, height_px(width))
            draw(figure, width)
            made[width] = to_svg(figure, name=f"{name}-{width}", description=f"{title}. {caption}")
    return Plot(title, caption, made["wide"], made["narrow"])


# --- rows of subjects ----------------------------------------------------------------------------------------------


def panels_of(figure: Figure, rows: Sequence[int]) -> list[Axes]:
    """One panel under the other, as high as their rows need."""
    grid = figure.add_gridspec(len(rows), 1, height_ratios=rows)
    return [figure.add_subplot(grid[index, 0]) for index in range(len(rows))]


def rows_height_px(panels: Sequence[Sequence[str]], width: Width, *, extra_px: float = 0) -> float:
    """Of panels with these labels; rows are equally high, as the longest label needs."""
    lines = max(len(_wrapped(label, width)) for labels in panels for label in labels)
    row_px = ROW_PX[width] + (lines - 1) * (8 if width == "wide" else 13)
    return sum(len(labels) * row_px + AXIS_PX + TITLE_PX for labels in panels) + extra_px


def _wrapped(label: str, width: Width) -> list[str]:
    return textwrap.wrap(plain(label), LABEL_CHARS[width]) or [""]


def name_rows(axes: Axes, labels: Sequence[str], width: Width) -> None:
    """Row i at y = i from the top: its label at the left of the panel, or on a phone above the row."""
    wrapped = ["\n".join(_wrapped(label, width)) for label in labels]
    axes.set_ylim(len(labels) - 0.5, -0.55)
    axes.spines["left"].set_visible(False)
    if width == "wide":
        axes.set_yticks(range(len(labels)), wrapped)
        axes.tick_params(axis="y", length=0, labelcolor=colour("ink"))
        return
    axes.set_yticks([])
    for row, label in enumerate(wrapped):
        above = axes.get_yaxis_transform()
        axes.text(0, row - 0.46, label, transform=above, va="top", linespacing=0.95, bbox=paper_box(), zorder=2)


def row_offset(width: Width) -> float:
    """Where in its row a mark is drawn: on a phone the label takes the upper half."""
    return 0.0 if width == "wide" else 0.22


def bar_thickness(width: Width) -> float:
    return 0.62 if width == "wide" else 0.36


# --- axes ----------------------------------------------------------------------------------------------------------


def batch_words(place: Place, what: str) -> str:
    return f"{what} of an image, ms" if place.batch == 1 else f"{what} of a batch of {place.batch} images, ms"


def slug(place: Place) -> str:
    return f"{place.size[0]}x{place.size[1]}-b{place.batch}"


def no_ticks() -> Any:
    from matplotlib.ticker import NullLocator

    return NullLocator()


def thousands(axis: Any) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axis.set_major_locator(MaxNLocator(nbins=6, min_n_ticks=2))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))


_LOG_STEPS: Final = ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 7))


def plain_log_ticks(axis: Any, low: float, high: float, *, unit: str = "") -> None:
    """Few round numbers, written out: the coarsest steps that give three ticks, or evenly spaced ones in between."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator

    exponents = range(int(np.floor(np.log10(low))), int(np.ceil(np.log10(high))) + 1)
    choices = [[step * 10.0**exponent for exponent in exponents for step in steps] for steps in _LOG_STEPS]
    choices.append([float(tick) for tick in MaxNLocator(nbins=4).tick_values(low, high)])
    inside = [[tick for tick in ticks if low * 0.999 <= tick <= high * 1.001] for ticks in choices]
    axis.set_major_locator(FixedLocator(next((ticks for ticks in inside if len(ticks) >= 3), inside[-1])))
    axis.set_minor_locator(no_ticks())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}{unit}"))


def paper_box() -> dict[str, Any]:
    """A box in the page's colour behind a text, so that no line runs through it."""
    return {"facecolor": colour("paper"), "edgecolor": "none", "pad": 1.0}
