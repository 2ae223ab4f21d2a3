"""Matplotlib figures as inline SVG that takes its colours and its font from the page around it.

A figure is drawn in stand-in colours, which become CSS variables: one picture serves light and dark pages. Text stays
text, ids are unique on the page, and the same figure gives the same bytes.
"""

from __future__ import annotations

import contextlib
import io
import re
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final

from tiue_cli.text import plain

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS: Final = {
    # name: (light page, dark page); Okabe and Ito (2008), lightened for dark paper.
    "ink": ("#1b1f24", "#e8eaed"),
    "muted": ("#5b6470", "#9aa4b0"),
    "rule": ("#dfe3e8", "#343b44"),
    "paper": ("#ffffff", "#15181d"),
    "text": ("#cc79a7", "#d68fb6"),
    "unet_encoder": ("#56b4e9", "#6fc0ee"),
    "unet_decoder": ("#0072b2", "#3b93cb"),
    "unet": ("#009e73", "#2fb48d"),
    "vae": ("#e69f00", "#ecb23a"),
    "rest": ("#b9c0c8", "#59626d"),
    "teacher": ("#d55e00", "#ee8434"),
    "peer": ("#009e73", "#2fb48d"),
    "student": ("#0072b2", "#5aaee0"),
    "student-plain": ("#8a6bb1", "#b59bd6"),
    "plain-unet": ("#5b6470", "#9aa4b0"),
}
"""Every colour of a figure, by what it stands for."""

_STAND_INS: Final = {name: f"#fe{index:02x}01" for index, name in enumerate(COLOURS)}
_FONT: Final = "DejaVu Sans"
"""What Matplotlib measures with. It is wider than the usual fonts of a page, so whatever fits will fit there."""


def colour(name: str) -> str:
    """The colour to draw with for one of ``COLOURS``."""
    return _STAND_INS[name]


def css_variables() -> tuple[str, str]:
    """Declarations of all colours for a light page and for a dark one."""
    light, dark = (
        " ".join(f"--{name.replace('_', '-')}: {pair[index]};" for name, pair in COLOURS.items()) for index in (0, 1)
    )
    return light, dark


@contextlib.contextmanager
def drawing(*, font_px: float) -> Iterator[None]:
    """Settings of every figure: to be drawn and written inside."""
    import matplotlib

    settings: dict[Any, Any] = {
        "font.family": _FONT,
        "font.size": font_px,
        "text.parse_math": False,
        "text.color": colour("ink"),
        "axes.labelcolor": colour("muted"),
        "axes.edgecolor": colour("muted"),
        "axes.titlecolor": colour("ink"),
        "axes.titlesize": font_px,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.titlepad": 8,
        "axes.labelsize": font_px,
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
        "xtick.labelsize": font_px,
        "ytick.labelsize": font_px,
        "legend.frameon": False,
        "legend.fontsize": font_px,
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
    metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(stream, format="svg", transparent=True, metadata=metadata)
    svg = stream.getvalue()
    svg = svg[svg.index("<svg") :].strip()
    svg = re.sub(r"\s*<metadata>.*?</metadata>", "", svg, count=1, flags=re.DOTALL)
    svg = re.sub(r"\s*<defs>\s*<style.*?</style>\s*</defs>", "", svg, count=1, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->\s*", "", svg, flags=re.DOTALL)
    svg = _with_page_colours(svg)
    # Older Matplotlib writes the shorthand.
    svg = re.sub(rf"font: (?:(\d+) )?([\d.]+px) '{_FONT}'", _font, svg)
    svg = svg.replace(f"font-family: '{_FONT}'; ", "")
    svg = re.sub(r"<[^>]*>", lambda tag: re.sub(r"(\d\.\d\d)\d+", r"\1", tag[0]), svg)
    svg = _with_own_ids(svg, name)
    return _with_own_head(svg, description)


def _with_page_colours(svg: str) -> str:
    names = {stand_in: name for name, stand_in in _STAND_INS.items()}

    def variable(match: re.Match[str]) -> str:
        name = names.get(match[2])
        return match[0] if name is None else f"{match[1]}: var(--{name.replace('_', '-')})"

    return re.sub(r"\b(fill|stroke): (#[0-9a-f]{6})\b", variable, svg)


def _font(match: re.Match[str]) -> str:
    weight = "" if match[1] is None else f"font-weight: {match[1]}; "
    return f"{weight}font-size: {match[2]}"


def _with_own_ids(svg: str, name: str) -> str:
    """Ids that something refers to, made unique on the page; the others go."""
    used = set(re.findall(r'(?:url\(#|href="#)([\w.-]+)', svg))

    def renamed(match: re.Match[str]) -> str:
        return f' id="{name}-{match[1]}"' if match[1] in used else ""

    svg = re.sub(r' id="([\w.-]+)"', renamed, svg)
    svg = re.sub(r"url\(#([\w.-]+)\)", rf"url(#{name}-\1)", svg)
    return re.sub(r'(?:xlink:)?href="#([\w.-]+)"', rf'href="#{name}-\1"', svg)


def _with_own_head(svg: str, description: str) -> str:
    from markupsafe import escape

    box = re.search(r'viewBox="([\d. ]+)"', svg)
    assert box is not None
    head = f'<svg role="img" aria-label="{escape(plain(description))}" viewBox="{box[1]}">'
    return head + svg[svg.index(">") + 1 :]
