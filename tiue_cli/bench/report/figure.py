"""Matplotlib figures as inline SVG that goes with a light page and with a dark one.

A figure is drawn in the colours of a light page. ``dark_css`` overrides them by what the elements' styles say, so the
SVG itself stays as Matplotlib wrote it. Text stays text, ids are unique on the page, and the same figure gives the same
bytes.
"""

from __future__ import annotations

import io
import textwrap
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final
from xml.etree import ElementTree

from tiue_cli.base.text import plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_BLUE, _GREEN, _GREY = ("#0072b2", "#5aaee0"), ("#009e73", "#2fb48d"), ("#5b6470", "#9aa4b0")
COLOURS: Final = {
    # name: (light page, dark page); Okabe and Ito (2008), lightened for dark paper. One light colour, one dark one.
    "ink": ("#1b1f24", "#e8eaed"),
    "muted": _GREY,
    "rule": ("#dfe3e8", "#343b44"),
    "paper": ("#ffffff", "#15181d"),
    "text": ("#cc79a7", "#d68fb6"),
    "unet_encoder": ("#56b4e9", "#a5dbff"),
    "unet_decoder": _BLUE,
    "unet": _GREEN,
    "vae": ("#e69f00", "#ecb23a"),
    "rest": ("#b9c0c8", "#59626d"),
    "teacher": ("#d55e00", "#ee8434"),
    "peer": _GREEN,
    "student": _BLUE,
    "student-plain": ("#8a6bb1", "#b59bd6"),
    "plain-unet": _GREY,
}
"""Every colour of a figure, by the page's part, stage or kind of subject that it stands for."""
_PAGE_COLOURS: Final = ("ink", "muted", "rule", "paper", "teacher")

WIDTH_PX: Final = 760
ROW_PX: Final = 26
PANEL_PX: Final = 70
"""Height of a panel's title, ticks and axis label."""
LABEL_CHARS: Final = 34
_SVG: Final = "http://www.w3.org/2000/svg"
_HREF: Final = "{http://www.w3.org/1999/xlink}href"


@dataclass(frozen=True)
class Plot:
    """A plot as ``svg``; ``caption`` says what is seen and how to read it."""

    title: str
    caption: str
    svg: str


def colour(name: str) -> str:
    """The colour to draw with for one of ``COLOURS``."""
    return COLOURS[name][0]


def css_variables() -> tuple[str, str]:
    """Declarations of the page's own colours, for a light page and for a dark one."""
    light, dark = (" ".join(f"--{name}: {COLOURS[name][index]};" for name in _PAGE_COLOURS) for index in (0, 1))
    return light, dark


def dark_css() -> str:
    """Rules that give the figures of a dark page its colours: stronger than the styles in the elements."""
    return "\n".join(
        f'.plot [style*="{use}: {light}"] {{ {use}: {dark} !important; }}'
        for light, dark in dict(COLOURS.values()).items()
        for use in ("fill", "stroke")
    )


def make_plot(name: str, title: str, caption: str, *, height_px: float, draw: Callable[[Figure], None]) -> Plot:
    """Let ``draw`` fill a figure; ``name`` must be unique on the page. No window system, no global state."""
    import matplotlib
    from matplotlib.figure import Figure

    # A prompt may be in a script that the measuring font lacks; the page's font will have it.
    with matplotlib.rc_context({**_style(), "svg.hashsalt": name}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure = Figure(figsize=(WIDTH_PX / 72, height_px / 72), layout="constrained")
        figure.get_layout_engine().set(h_pad=6 / 72, w_pad=4 / 72)  # type: ignore[union-attr,call-arg]
        draw(figure)
        return Plot(title, caption, _svg(figure, f"{title}. {caption}"))


def _style() -> dict[Any, Any]:
    sizes = ("font.size", "axes.titlesize", "axes.labelsize", "xtick.labelsize", "ytick.labelsize", "legend.fontsize")
    muted = ("axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    return {
        **dict.fromkeys(sizes, 12.5),
        **dict.fromkeys(muted, colour("muted")),
        # What Matplotlib measures with is wider than the usual fonts of a page: whatever fits will fit there.
        "font.family": "DejaVu Sans",
        "text.parse_math": False,
        "text.color": colour("ink"),
        "axes.titlecolor": colour("ink"),
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.titlepad": 8,
        "axes.linewidth": 0.8,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": colour("rule"),
        "legend.frameon": False,
        "figure.dpi": 72,
        "savefig.dpi": 72,
        "svg.fonttype": "none",
    }


def _svg(figure: Figure, description: str) -> str:
    """The ``<svg>`` element; ``description`` is what a screen reader says."""
    stream = io.StringIO()
    figure.savefig(
        stream, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type"))
    )
    root = ElementTree.fromstring(stream.getvalue())
    for group in root.iter(f"{{{_SVG}}}g"):  # figure_1, axes_1: the same in every figure, and nothing refers to them
        group.attrib.pop("id", None)
    for element in root.iter():
        if _HREF in element.attrib:  # in SVG 2, and in a page, without a namespace
            element.attrib["href"] = element.attrib.pop(_HREF)
    root.attrib = {"role": "img", "aria-label": plain(description), "viewBox": root.attrib["viewBox"]}
    ElementTree.register_namespace("", _SVG)
    return ElementTree.tostring(root, encoding="unicode")


# --- rows with labels ----------------------------------------------------------------------------------------------


def rows_height_px(panels: Sequence[Sequence[str]]) -> float:
    """Of panels whose rows have these labels; rows are equally high, as the longest label needs."""
    lines = max(len(_wrapped(label)) for labels in panels for label in labels)
    return sum(len(labels) * (ROW_PX + (lines - 1) * 8) + PANEL_PX for labels in panels)


def row_panels(figure: Figure, panels: Sequence[Sequence[str]]) -> list[Axes]:
    """One panel under the other, as high as their rows need; row i is at y = i from the top, its label at the left."""
    grid = figure.subplots(len(panels), 1, squeeze=False, height_ratios=[len(labels) for labels in panels])
    found = list(grid[:, 0])
    for axes, labels in zip(found, panels, strict=True):
        axes.set_ylim(len(labels) - 0.5, -0.55)
        axes.spines["left"].set_visible(False)
        axes.set_yticks(range(len(labels)), ["\n".join(_wrapped(label)) for label in labels])
        axes.tick_params(axis="y", length=0, labelcolor=colour("ink"))
        axes.grid(visible=False, axis="y")
    return found


def _wrapped(label: str) -> list[str]:
    return textwrap.wrap(plain(label), LABEL_CHARS) or [""]


def beside(axes: Axes, text: str, x: float, y: float, *, gap_px: float = 5, **style: Any) -> None:
    """A text to the right of a point, in the middle of its height."""
    axes.annotate(text, (x, y), (gap_px, 0), textcoords="offset points", va="center", **style)


# --- axes ----------------------------------------------------------------------------------------------------------


def linear_ticks(axis: Any) -> None:
    """A few ticks, written out with commas."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(nbins=6, min_n_ticks=2))
    axis.set_major_formatter("{x:,.10g}")


def log_ticks(axis: Any, *, unit: str = "") -> None:
    """Few round numbers, written out, as the limits need, which must be set: 1, 10, 100, or steps in between."""
    from matplotlib.ticker import LogLocator, NullLocator

    low, high = axis.get_view_interval()
    steps = (1.0, 1.5, 2.0, 3.0, 5.0, 7.0) if high < 8 * low else (1.0, 2.0, 5.0) if high < 200 * low else (1.0,)
    axis.set_major_locator(LogLocator(subs=steps, numticks=12))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter("{x:,.10g}" + unit)
