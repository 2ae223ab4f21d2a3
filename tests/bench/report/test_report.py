"""Reports on the disk: three files, nothing overwritten, and what comes from outside stays text."""

from __future__ import annotations

import json
import re
import statistics
import threading
from concurrent.futures import ThreadPoolExecutor
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from bench_reports import ONNX, PLAIN, STUDENT, TEACHER, make_grid, make_report
from markdown_it import MarkdownIt

from tiue_cli.bench.report.files import as_json, read_report, write_report
from tiue_cli.bench.report.html import render_html
from tiue_cli.bench.report.markdown import escaped, render_markdown
from tiue_cli.bench.report.schema import BenchReport
from tiue_cli.bench.report.view import ReportView
from tiue_cli.errors import ManifestError, OutputError

HOSTILE = '<script>alert(1)</script> | **bold** `code` [link](x) "quoted" & $x^2$ <img src=x onerror=y>'
FEW: dict[str, Any] = {"keys": (TEACHER, PLAIN, STUDENT, ONNX), "batches": (1,), "rounds": 24}


class Tags(HTMLParser):
    """Every tag with its attributes, and all text, of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


def as_html(markdown: str) -> str:
    """What GitHub's dialect makes of it, with raw HTML let through: the worst case."""
    return MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).render(markdown)


@pytest.fixture(scope="module")
def report() -> BenchReport:
    return make_report(**FEW, warnings=("the machine was busy",))


@pytest.fixture(scope="module")
def page(report: BenchReport) -> str:
    return render_html(report)


@pytest.fixture
def quick_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """A page without plots, where the test is not about them."""
    monkeypatch.setattr("tiue_cli.bench.report.files.render_html", lambda report: f"<h1>{report.name}</h1>")


@pytest.fixture(scope="module")
def hostile() -> BenchReport:
    plain = make_report(**FEW, grid=False)
    subjects = tuple(
        subject.model_copy(update={"label": f"{HOSTILE} {subject.key}", "model": HOSTILE, "notes": (HOSTILE,)})
        for subject in plain.subjects
    )
    return plain.model_copy(
        update={
            "subjects": subjects,
            "prompts": (HOSTILE, "二人の猫\u202e\x07"),
            "command": f"tiue bench {HOSTILE}\n```\n# not a heading",
            "warnings": (HOSTILE, "# no heading", "1. no list"),
            "grid": make_grid((STUDENT, ONNX), prompts=(HOSTILE,)),
            "machine": plain.machine.model_copy(update={"cpu": HOSTILE}),
        }
    )


# --- files


def test_three_files_are_written_and_the_json_reads_back_equal(report: BenchReport, page: str, tmp_path: Path) -> None:
    files = write_report(report, tmp_path / "new" / "folder")
    assert [file.name for file in files] == [f"{report.name}{suffix}" for suffix in (".json", ".md", ".html")]
    assert sorted(files) == sorted((tmp_path / "new" / "folder").iterdir()), "no temporary file is left"
    assert read_report(files.json) == report
    assert files.html.read_text(encoding="utf-8") == page, "the same report gives the same bytes"
    assert files.markdown.read_text(encoding="utf-8") == render_markdown(report)


@pytest.mark.usefixtures("quick_page")
def test_benches_that_end_at_once_take_different_names(tmp_path: Path) -> None:
    report = make_report(keys=(PLAIN,), batches=(1,), rounds=6, quality=False, grid=False)
    together = threading.Barrier(8)

    def write(number: int) -> Path:
        together.wait()
        return write_report(report.model_copy(update={"seed": number}), tmp_path).json

    with ThreadPoolExecutor(8) as threads:
        paths = list(threads.map(write, range(8)))
    assert len(set(paths)) == 8
    assert [read_report(path).seed for path in paths] == list(range(8))


@pytest.mark.usefixtures("quick_page")
def test_a_report_that_cannot_be_written_leaves_no_name_taken(
    report: BenchReport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tiue_cli.bench.report.files.as_json", lambda report: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_report(report, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_times_are_kept_to_the_nanosecond_and_old_reports_are_read(report: BenchReport, tmp_path: Path) -> None:
    data = json.loads(report.model_dump_json())
    data.pop("interrupted")
    data["latency"][0]["samples_ms"][0] = 259.23622799746227
    (tmp_path / "old.json").write_text(json.dumps(data, indent=2))
    read = read_report(tmp_path / "old.json")
    assert read.latency[0].samples_ms[0] == 259.236228 and read.latency[1] == report.latency[1]
    assert BenchReport.model_validate_json(as_json(read)) == read


@pytest.mark.usefixtures("quick_page")
def test_a_taken_name_gets_a_number_and_nothing_is_overwritten(report: BenchReport, tmp_path: Path) -> None:
    (tmp_path / f"{report.name}.md").write_text("mine")
    second = write_report(report, tmp_path)
    third = write_report(report, tmp_path)
    assert [file.stem for file in (second.json, third.json)] == [f"{report.name}-2", f"{report.name}-3"]
    assert read_report(third.json).name == f"{report.name}-3"
    assert (tmp_path / f"{report.name}.md").read_text() == "mine"
    assert f"# {report.name}-2".replace("_", "\\_") in second.markdown.read_text()


@pytest.mark.parametrize("name", ["../elsewhere", "a/b", "", ".hidden"])
def test_a_name_that_leaves_the_folder_is_refused(report: BenchReport, name: str, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot be a file"):
        write_report(report.model_copy(update={"name": name}), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_samples_survive_a_page_that_cannot_be_drawn(
    report: BenchReport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: BenchReport) -> str:
        raise RuntimeError("no page")

    monkeypatch.setattr("tiue_cli.bench.report.files.render_markdown", fail)
    with pytest.raises(RuntimeError):
        write_report(report, tmp_path)
    assert read_report(tmp_path / f"{report.name}.json") == report


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda data: data["latency"][0].update(subject="nobody"), "subject 'nobody' is not described"),
        (lambda data: data["latency"].append(data["latency"][0]), "was measured 2 times at batch 1"),
        (lambda data: data["subjects"].append(data["subjects"][0]), "there are 2 subjects"),
        (lambda data: data["latency"][0].update(samples_ms=[]), "has no samples"),
        (lambda data: data["latency"][0].update(rounds=[0]), "of 1 rounds"),
        (lambda data: data.update(format_version=99), "format_version 99 is newer"),
        (lambda data: data.update(kind="student"), "field 'kind'"),
        (lambda data: data["latency"][0].update(samples_ms=[-1.0]), "samples_ms"),
        (lambda data: data["latency"][0].update(samples_ms=[float("nan")]), "NaN"),
        (lambda data: data["latency"][0].update(samples_ms=[0.0]), "has no samples"),
        (lambda data: data["latency"][0].update(batch=0), "batch"),
        (lambda data: data["ratios"][0].update(baseline="reference"), "'reference' is not described"),
        (lambda data: data["grid"].update(png_base64="%%%"), "the grid's picture cannot be read"),
        (lambda data: data["grid"].update(png_base64="aGVsbG8="), "the grid's picture cannot be read"),
        (lambda data: data["grid"].update(png_base64=data["grid"]["png_base64"][:-60]), "the grid's picture"),
        (lambda data: data["grid"].update(cell=[64, 32]), "smaller than 2 rows and 3 columns of 64 x 32"),
        (lambda data: data["grid"].update(cell=[0, 32]), "cell"),
        (lambda data: data["grid"].update(seeds=[1]), "2 prompts and 1 seeds"),
        (lambda data: data["grid"].update(columns=[]), "0 columns"),
    ],
)
def test_a_report_that_contradicts_itself_is_refused(
    report: BenchReport, change: Any, fault: str, tmp_path: Path
) -> None:
    data = json.loads(report.model_dump_json())
    change(data)
    (tmp_path / "bad.json").write_text(json.dumps(data))
    with pytest.raises(ManifestError, match=re.escape(fault)):
        read_report(tmp_path / "bad.json")


def test_a_page_is_no_report(tmp_path: Path) -> None:
    with pytest.raises(ManifestError) as caught:
        read_report(tmp_path / "r.html")
    assert caught.value.hint == f"give {tmp_path / 'r.json'}"


# --- the pages


def test_pages_say_what_was_measured_with_what(report: BenchReport, page: str) -> None:
    markdown = render_markdown(report)
    rendered = Tags(as_html(markdown)).text
    for text in (Tags(page).text, rendered):
        for part in (
            "the machine was busy", "Imaginary CPU @ 2.1 GHz", "torch 2.13.0", "0123456789ab", "121212121212",
            report.command, "a red heart at night", "not with published figures", "fewer than 5,000 images",
            "61.2 dB to K = 4, torch", "median, ms", "UNet decoder", "of peak", "first call", "95 % interval",
        ):  # fmt: skip
            assert part in text, part


def test_medians_of_the_pages_are_those_of_the_samples(report: BenchReport, page: str) -> None:
    texts = Tags(page).text, render_markdown(report)
    for record in report.latency:
        median = statistics.median(record.samples_ms)
        figure = f"{median:.1f}" if median < 99.95 else f"{median:.0f}"
        rate = 1000 / median
        assert 1 < rate < 100
        for text in texts:
            assert figure in text, record.subject
            assert (f"{rate:.1f}" if rate >= 9.995 else f"{rate:.2f}") in text, record.subject


def test_a_withheld_ratio_is_shown_as_such_with_its_reason() -> None:
    keys = (TEACHER, PLAIN, "papercut-student/compile/k4")
    report = make_report(keys=keys, batches=(1,), quality=False, grid=False)
    assert all(ratio.ratio is None for ratio in report.ratios if "compile" in ratio.subject)
    page, markdown = Tags(render_html(report)).text, render_markdown(report)
    for text in (page, markdown):
        assert "withheld" in text and "21.3 dB, 40 needed" in text
    assert "as fast" not in page.split("How fast")[0], "no headline about a student whose pictures are wrong"


def test_headline_ratios_name_both_sides_and_the_first_are_of_one_backend(report: BenchReport) -> None:
    """The fastest student is an export: what it gains over torch's teacher is the method's and the runtime's."""
    view = ReportView(report)
    assert view.headline_subject == ONNX
    found = [(line.figure, line.what) for line in view.headlines() if " against " in line.what]
    setting = view.settings[0]
    expected = []
    for key in (STUDENT, ONNX):
        speedup, passes = view.ratio(key, TEACHER, setting, "image"), view.plain_ratio(key, setting, "unet")
        assert speedup is not None and speedup.ratio is not None and passes is not None and passes.ratio is not None
        label = view.side(key)
        teacher, plain = "papercut's teacher, 25 steps, torch", "one plain UNet pass, torch"
        expected.append((f"{1 / speedup.ratio:.1f}×", f"as fast: {label} against {teacher}"))
        expected.append((f"{passes.ratio:.2f}", f"times the UNet time: {label} against {plain}"))
    assert view.side(STUDENT) == "K = 4, torch" and view.side(ONNX) == "K = 4, onnx, ONNX Runtime"
    assert found == expected


def test_the_page_asks_for_nothing_from_elsewhere(page: str) -> None:
    tags = Tags(page)
    assert {tag for tag, _ in tags.tags}.isdisjoint({"script", "link", "iframe", "object", "embed", "base"})
    for tag, attributes in tags.tags:
        for name in ("src", "href", "xlink:href", "srcset", "action", "data"):
            value = attributes.get(name)
            assert value is None or value.startswith(("data:image/png;base64,", "#")), (tag, name, value)
    assert re.findall(r"url\((?!#)", page) == [] and "@import" not in page
    assert sum(tag == "img" for tag, _ in tags.tags) == 2 * 3, "two prompts by three columns"


def test_ids_are_unique_and_references_lead_somewhere(page: str) -> None:
    ids = [attributes["id"] for _, attributes in Tags(page).tags if "id" in attributes]
    assert len(ids) == len(set(ids)) > 0
    assert set(re.findall(r"(?:url\(#|href=\"#)([\w.-]+)", page)) <= set(ids)


def test_what_comes_from_outside_is_text_on_the_page(hostile: BenchReport) -> None:
    page = render_html(hostile)
    tags = Tags(page)
    assert all(tag != "script" for tag, _ in tags.tags)
    assert all("onerror" not in attributes for _, attributes in tags.tags)
    assert "<script" not in page.replace("&lt;script", "")
    assert tags.text.count(HOSTILE) >= 5
    assert "二人の猫" in tags.text and "\u202e" not in page and "\x07" not in page


def test_what_comes_from_outside_is_text_in_markdown(hostile: BenchReport) -> None:
    rendered = as_html(render_markdown(hostile))
    tags = Tags(rendered)
    names = [tag for tag, _ in tags.tags]
    assert not {"script", "img", "a", "em"} & set(names)
    assert names.count("h1") == 1
    assert tags.text.count(HOSTILE) >= 5
    tables = rendered.split("<table>")[1:]
    for table in tables:
        rows = table.partition("</table>")[0].split("<tr>")[1:]
        assert len({len(re.findall("<t[hd]", row)) for row in rows}) == 1, "no cell was split or lost"
    assert len(tables) == 7
    for text in ("# no heading", "1. no list", "# not a heading"):
        assert text in tags.text


@pytest.mark.parametrize(
    "text",
    [HOSTILE, "# a", "- a", "+ a", "1. a", "1) a", "---", "===", "a\nb", "~~a~~", "\\*a*", "a_b_c", "&amp;", "!(x)"],
)
def test_escaped_text_reads_as_it_was(text: str) -> None:
    rendered = Tags(as_html(escaped(text)))
    assert rendered.text == " ".join(text.split())
    assert [tag for tag, _ in rendered.tags] == ["p"]


def test_a_report_with_nothing_but_one_subject_has_a_page() -> None:
    report = make_report(
        keys=("lcm/diffusers/4",), batches=(1,), rounds=1, quality=False, grid=False, peak=None, commit=None
    )
    assert "LCM, 4 steps" in Tags(render_html(report)).text and "LCM, 4 steps" in render_markdown(report)


def test_an_empty_report_has_a_page() -> None:
    report = make_report(keys=(), batches=(), quality=False, grid=False)
    assert report.name in Tags(render_html(report)).text and "Machine" not in render_markdown(report).split("\n")[0]


def test_the_picture_is_cut_at_its_cells() -> None:
    """Gaps between the cells as ``bench.grid`` writes them: each cell shows its own colour and no gap."""
    import base64
    import io

    import numpy as np
    from PIL import Image

    gap, cell = 2, (5, 7)
    sheet = np.full((2 * cell[0] + gap, 3 * cell[1] + 2 * gap, 3), 255, np.uint8)
    for row in range(2):
        for column in range(3):
            top, left = row * (cell[0] + gap), column * (cell[1] + gap)
            sheet[top : top + cell[0], left : left + cell[1]] = 10 * row + column
    stream = io.BytesIO()
    Image.fromarray(sheet).save(stream, format="PNG")
    grid = make_grid((STUDENT, ONNX, PLAIN)).model_copy(
        update={"png_base64": base64.b64encode(stream.getvalue()).decode(), "cell": cell}
    )
    report = make_report(keys=(STUDENT, ONNX, PLAIN), batches=(), quality=False).model_copy(update={"grid": grid})
    page = Tags(render_html(report))
    (classes,) = [
        attributes["class"] or "" for tag, attributes in page.tags if tag == "table" and "style" in attributes
    ]
    assert classes.split() == ["grid", "small"], "7 pixels are shown enlarged"
    sources = [attributes["src"] or "" for tag, attributes in page.tags if tag == "img"]
    for index, source in enumerate(sources):
        with Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))) as image:
            pixels = np.asarray(image.convert("RGB"))
        assert pixels.shape == (*cell, 3)
        assert set(pixels.ravel().tolist()) == {10 * (index // 3) + index % 3}
