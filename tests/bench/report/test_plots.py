"""What the plots show is what the report says; labels never overlap; nothing but SVG comes out."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from xml.etree import ElementTree

import numpy as np
import pytest
from bench_reports import ONNX, PLAIN, STUDENT, TEACHER, make_report

from tiue_cli.base.text import number, plain
from tiue_cli.bench.report.figure import COLOURS, Plot, colour, css_variables, dark_css
from tiue_cli.bench.report.plots import quality_plot, ratio_plot, spread_plot, stage_plot, throughput_plot
from tiue_cli.bench.report.schema import BenchReport
from tiue_cli.bench.report.view import ReportView, as_speedup

KEYS = (TEACHER, PLAIN, STUDENT, ONNX)


@pytest.fixture(scope="module")
def report() -> BenchReport:
    return make_report(keys=KEYS, batches=(1, 4), rounds=20, grid=False)


@pytest.fixture(scope="module")
def view(report: BenchReport) -> ReportView:
    return ReportView(report)


def all_plots(view: ReportView) -> Iterator[Plot]:
    setting = view.settings[0]
    for plot in (
        stage_plot(view, setting),
        ratio_plot(view, setting),
        throughput_plot(view, setting.size),
        quality_plot(view),
        spread_plot(view, setting),
    ):
        assert plot is not None
        yield plot


@pytest.fixture(scope="module")
def plots(view: ReportView) -> list[Plot]:
    return list(all_plots(view))


@dataclass(frozen=True)
class Bar:
    colour: str
    left: float
    right: float
    top: float


def bars(svg: str, name: str) -> list[Bar]:
    """Filled rectangles in one of the colours, from the path data."""
    found = []
    for path, style in re.findall(r'<path d="([^"]*)" clip-path="[^"]*" style="([^"]*)"', svg):
        if f"fill: {colour(name)}" in style:
            points = np.array([float(word) for word in re.findall(r"-?\d+(?:\.\d+)?", path)]).reshape(-1, 2)
            found.append(Bar(name, float(points[:, 0].min()), float(points[:, 0].max()), float(points[:, 1].min())))
    return sorted(found, key=lambda bar: bar.top)


def marks(svg: str, *names: str) -> int:
    """Markers in one of the colours."""
    inks = {colour(name) for name in names}
    return sum(ink in inks for ink in re.findall(r"<use [^>]*fill: (#\w+)", svg))


def texts(svg: str) -> list[str]:
    return [element.text or "" for element in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]


def test_every_plot_is_a_described_svg_that_asks_for_nothing(plots: list[Plot]) -> None:
    for plot in plots:
        root = ElementTree.fromstring(plot.svg)
        assert root.tag.endswith("}svg") and root.attrib["role"] == "img" and root.attrib["aria-label"]
        assert not any(tag in plot.svg for tag in ("<script", "<metadata", "<image", "RDF"))
        assert re.findall(r'(?:src|href)="(?!#)', plot.svg) == []


def test_a_dark_page_has_a_colour_for_each_of_a_plot(plots: list[Plot]) -> None:
    rules = dark_css()
    for plot in plots:
        used = set(re.findall(r"(fill|stroke): (#\w+)", plot.svg))
        assert {ink for _, ink in used} <= {light for light, _ in COLOURS.values()}, used
        for use, ink in used:
            assert f'[style*="{use}: {ink}"] {{ {use}: #' in rules
    light, dark = css_variables()
    assert light.count("#") == dark.count("#") and light != dark
    assert len(dict(COLOURS.values())) == len(set(COLOURS.values())), "one light colour, one dark one"


def test_a_plot_has_some_hundred_marks_at_most() -> None:
    """Twenty subjects with 256 runs each: what papercut's report has."""
    report = make_report(keys=KEYS, batches=(1, 4), rounds=256, grid=False)
    more = [
        (subject.model_copy(update={"key": f"{subject.key}-{number}"}), subject.key)
        for number in range(5)
        for subject in report.subjects
    ]
    latency = [
        record.model_copy(update={"subject": subject.key})
        for subject, key in more
        for record in report.latency
        if record.subject == key
    ]
    changes = {
        "subjects": tuple(subject for subject, _ in more),
        "latency": tuple(latency),
        "ratios": (),
        "quality": (),
    }
    plot = spread_plot(view := ReportView(report.model_copy(update=changes)), view.settings[0])
    assert plot is not None
    assert 0 < plot.svg.count("<use") <= 400


def test_the_same_report_gives_the_same_plots(view: ReportView, plots: list[Plot]) -> None:
    assert spread_plot(view, view.settings[0]) == plots[4]


def test_bars_are_as_long_as_the_stages_took(report: BenchReport, view: ReportView, plots: list[Plot]) -> None:
    """Lengths in a panel are in the proportion of the medians, and parts add up to them."""
    records = {record.subject: record for record in view.records(view.settings[0])}
    decoders, encoders = bars(plots[0].svg, "unet_decoder"), bars(plots[0].svg, "unet_encoder")
    assert len(decoders) == len(encoders) == 2
    lengths = [bar.right - bar.left for bar in (*decoders, *encoders)]
    expected = [
        float(np.mean(np.divide(records[key].stage_samples_ms[stage], records[key].samples_ms)))
        * float(np.median(records[key].samples_ms))
        for stage in ("unet_decoder", "unet_encoder")
        for key in (STUDENT, ONNX)
    ]
    np.testing.assert_allclose(np.divide(lengths, lengths[0]), np.divide(expected, expected[0]), rtol=2e-3)
    first = [
        bar for name in ("text", "unet_encoder", "unet_decoder", "vae", "rest") for bar in bars(plots[0].svg, name)
    ]
    student = [bar for bar in first if abs(bar.top - decoders[0].top) < 0.5]
    whole_px = max(bar.right for bar in student) - min(bar.left for bar in student)
    median = float(np.median(records[STUDENT].samples_ms))
    assert whole_px / lengths[0] == pytest.approx(median / expected[0], rel=2e-3)


def test_the_teacher_has_a_scale_of_its_own(plots: list[Plot]) -> None:
    shown = texts(plots[0].svg)
    assert "One pass" in shown and "Many steps (another scale)" in shown
    assert "different scales" in plots[0].caption


def test_labels_give_the_figures_of_the_report(view: ReportView, plots: list[Plot]) -> None:
    setting = view.settings[0]
    for record in view.records(setting):
        median = view.summary(record).median
        assert f"{number(median)} ms" in texts(plots[0].svg)
    ratio = view.ratio(STUDENT, TEACHER, setting, "image")
    assert ratio is not None
    shown = as_speedup(ratio)
    assert shown.value == pytest.approx(1 / (ratio.ratio or 0)) and (shown.low or 0) < shown.value < (shown.high or 0)
    assert f"{number(shown.value)}× [{shown.interval}]" in texts(plots[1].svg)


def test_a_withheld_ratio_has_no_dot() -> None:
    compiled = "papercut-student/compile/k4"
    view = ReportView(make_report(keys=(TEACHER, PLAIN, compiled), batches=(1,), quality=False, grid=False))
    plot = ratio_plot(view, view.settings[0])
    assert plot is not None
    assert texts(plot.svg).count("withheld: the reason is in the table") == 2
    assert marks(plot.svg, "student") == 0


def test_outliers_are_counted_where_the_axis_ends() -> None:
    report = make_report(keys=(PLAIN,), batches=(1,), rounds=40, quality=False, grid=False)
    (record,) = report.latency
    samples = (*record.samples_ms[:-2], 10 * record.samples_ms[0], 20 * record.samples_ms[0])
    changed = record.model_copy(update={"samples_ms": samples, "stage_samples_ms": {}})
    view = ReportView(report.model_copy(update={"latency": (changed,)}))
    plot = spread_plot(view, view.settings[0])
    assert plot is not None
    largest = 100 * (samples[-1] / float(np.median(samples)) - 1)
    assert f"2 more, to +{number(largest, 2)} %" in texts(plot.svg)


def test_the_box_holds_the_middle_half_and_points_are_what_lies_beyond_the_whiskers() -> None:
    report = make_report(keys=(STUDENT,), batches=(1,), rounds=200, quality=False, grid=False)
    plot = spread_plot(view := ReportView(report), view.settings[0])
    assert plot is not None
    samples = np.asarray(report.latency[0].samples_ms)
    low, high = np.percentile(samples, [2.5, 97.5])
    beyond = int(((samples < low) | (samples > high)).sum())
    points = len(re.findall(rf'<use x="[^-][^>]*fill: {colour("student")}', plot.svg))
    assert beyond - 2 <= points <= beyond, "the extremes may lie outside of the axis"


def test_nothing_to_plot_is_no_plot(report: BenchReport) -> None:
    bare = ReportView(report.model_copy(update={"quality": (), "ratios": ()}))
    assert quality_plot(bare) is None and ratio_plot(bare, bare.settings[0]) is None
    single = ReportView(make_report(keys=(PLAIN,), batches=(1,), rounds=1, quality=False, grid=False))
    assert throughput_plot(single, single.settings[0].size) is None
    assert spread_plot(single, single.settings[0]) is None


def test_names_from_outside_are_text_in_a_plot(report: BenchReport) -> None:
    label = "<script>x</script> & $\\frac{1}{2}$ \x1b[31m 猫"
    subjects = tuple(subject.model_copy(update={"label": label}) for subject in report.subjects)
    view = ReportView(report.model_copy(update={"subjects": subjects}))
    plot = stage_plot(view, view.settings[0])
    assert plot is not None and "<script" not in plot.svg
    shown = " ".join(texts(plot.svg))
    assert "<script>x</script> &" in shown and "$\\frac{1}{2}$" in shown and "猫" in shown and "\x1b" not in plot.svg


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.01234, "0.0123"), (1.234, "1.23"), (12.34, "12.3"), (123.4, "123"), (1234.5, "1,234"),
     (9.996, "10.0"), (99.96, "100"), (0.9996, "1.00"), (-1.234, "-1.23"), (1e-9, "1.00e-09")],
)  # fmt: skip
def test_numbers_have_three_digits(value: float, text: str) -> None:
    assert number(value) == text


def test_plain_text_has_no_control_characters() -> None:
    assert plain("a\x00b\n\tc\u202ed\u200be") == "a b c d e"
    assert plain("naïve 猫 ★ ×") == "naïve 猫 ★ ×"


def test_references_against_references_are_a_line(report: BenchReport) -> None:
    ceiling = report.quality[0].model_copy(update={"subject": "reference"})
    view = ReportView(report.model_copy(update={"quality": (ceiling, *report.quality)}))
    plot = quality_plot(view)
    assert plot is not None and "dashed line" in plot.caption
    assert texts(plot.svg).count("reference") == len(view.main_metrics)
    assert len(re.findall(r"stroke-dasharray", plot.svg)) == len(view.main_metrics)
    names = {view.label(record.subject) for record in report.quality}
    assert sum(text in names for text in texts(plot.svg)) == len(report.quality), "it is no subject of the legend"
