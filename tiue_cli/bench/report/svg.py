"""Matplotlib figures as inline SVG that goes with a light page and with a dark one.

A figure is drawn in the colours of a light page. ``dark_css`` overrides them by what the elements' styles say, so the
SVG itself stays as Matplotlib wrote it. Text stays text, ids are unique on the page, and the same figure gives the same
bytes.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final
from xml.etree import ElementTree

from tiue_cli.base.text import plain

if TYPE_CHECKING:
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
"""Every colour of a figure, by what it stands for."""

FONT_PX: Final = 12.5
_SVG: Final = "http://www.w3.org/2000/svg"
_HREF: Final = "{http://www.w3.org/1999/xlink}href"


def colour(name: str) -> str:
    """The colour to draw with for one of ``COLOURS``."""
    return COLOURS[name][0]


def css_variables() -> tuple[str, str]:
    """Declarations of the page's own colours, for a light page and for a dark one."""
    light, dark = (
        " ".join(f"--{name}: {COLOURS[name][index]};" for name in ("ink", "muted", "rule", "paper", "teacher"))
        for index in (0, 1)
    )
    return light, dark


def dark_css() -> str:
    """Rules that give the figures of a dark page its colours: stronger than the styles in the elements."""
    return "\n".join(
        f'.plot [style*="{use}: {light}"] {{ {use}: {dark} !important; }}'
        for light, dark in dict(COLOURS.values()).items()
        for use in ("fill", "stroke")
    )


@contextlib.contextmanager
def drawing() -> Iterator[None]:
    """Settings of every figure: to be drawn and written inside."""
    import matplotlib

    sizes = ("font.size", "axes.titlesize", "axes.labelsize", "xtick.labelsize", "ytick.labelsize", "legend.fontsize")
    settings: dict[Any, Any] = {
        **dict.fromkeys(sizes, FONT_PX),
        # What Matplotlib measures with is wider than the usual fonts of a page: whatever fits will fit there.
        "font.family": "DejaVu Sans",
        "text.parse_math": False,
        "text.color": colour("ink"),
        "axes.labelcolor": colour("muted"),
        "axes.edgecolor": colour("muted"),
        "axes.titlecolor": colour("ink"),
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.titlepad": 8,
        "axes.linewidth": 0.8,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.grid.axis": "x",
        "axes.axisbelow": True,
        "grid.color": colour("rule"),
        "grid.linewidth": 0.8,
        "xtick.color": colour("muted"),
        "ytick.color": colour("muted"),
        "legend.frameon": False,
        "figure.dpi": 72,
        "savefig.dpi": 72,
        "svg.fonttype": "none",
    }
    # A prompt may be in a script that the measuring font lacks; the page's font will have it.
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


def new_figure(width_px: float, height_px: float) -> Figure:
    """A figure that becomes an SVG of that many units; no window system, no global state."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width_px / 72, height_px / 72), layout="constrained")
    figure.get_layout_engine().set(h_pad=6 / 72, w_pad=4 / 72)  # type: ignore[union-attr,call-arg]
    return figure


def to_svg(figure: Figure, *, name: str, description: str) -> str:
    """The ``<svg>`` element; ``name`` must be unique on the page, ``description`` is what a screen reader says."""
    import matplotlib

    stream = io.StringIO()
    # The salt makes the ids that something refers to the figure's own.
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    root = ElementTree.fromstring(stream.getvalue())
    for metadata in root.findall(f"{{{_SVG}}}metadata"):
        root.remove(metadata)
    for group in root.iter(f"{{{_SVG}}}g"):  # figure_1, axes_1: the same in every figure, and nothing refers to them
        group.attrib.pop("id", None)
    for element in root.iter():
        if _HREF in element.attrib:  # in SVG 2, and in a page, without a namespace
            element.attrib["href"] = element.attrib.pop(_HREF)
    root.attrib = {"role": "img", "aria-label": plain(description), "viewBox": root.attrib["viewBox"]}
    ElementTree.register_namespace("", _SVG)
    return ElementTree.tostring(root, encoding="unicode")
