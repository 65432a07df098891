"""Reports print what the records hold: tables, the HTML page, the trace."""

from __future__ import annotations

import io
import json
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from mapper.driver import CheckReport, Compiled
from mapper.report import html, numbers, perfetto, plots, terminal
from mapper.report.terminal import folded
from mapper.schedule.violation import Violation
from tests.sample import result, schedule


def text(*parts: object) -> str:
    out = io.StringIO()
    Console(file=out, width=200, markup=False, highlight=False).print(*parts, sep="\n")
    return out.getvalue()


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0, "0 s"),
        (1.5, "1.5 s"),
        (0.25, "250 ms"),
        (40e-6, "40 us"),
        (1.234e-7, "123 ns"),
        (5e-11, "0.05 ns"),
    ],
)
def test_seconds(value: float, shown: str) -> None:
    assert numbers.seconds(value) == shown


def test_counts() -> None:
    assert [numbers.count(x) for x in (0, 12, 3480000, 7.5e12)] == ["0", "12", "3.48 M", "7.5 T"]


def test_terminal_table_holds_the_figures() -> None:
    shown = text(*terminal.results([result()]))
    for figure in (
        "40 us",
        "31 us .. 59.2 us",
        "20 us (units)",
        "2.00",
        "25 k",
        "50 k",
        "a[0], busy 50.0 %",
        "Bad FAILS",
    ):
        assert figure in shown


def test_explanation_names_the_dominating_constants_in_order() -> None:
    shown = text(*terminal.explanation("decode", result().phases["decode"]))
    assert shown.index("issue") < shown.index("latency")
    assert "+12 us (+30 %)" in shown
    assert "unit a: 20 cycles" in shown


class Page(HTMLParser):
    """Collects what an HTML page loads and says; notes tags that do not close."""

    VOID = frozenset({"meta", "br", "img", "input", "link"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []
        self.links: list[str] = []
        self.said = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.open.append(tag)
        found = dict(attrs)
        self.loads += [v for k in ("src", "srcset") if (v := found.get(k))]
        if tag == "a":
            self.links.append(found["href"] or "")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.said += data


def compiled(folder: Path | None = None) -> Compiled:
    from dataclasses import replace

    report = CheckReport({"Good": (), "Bad": (Violation("step 3 <b> overlaps"),)})
    made = result() if folder is None else replace(result(), schedule_dir=str(folder))
    return Compiled(schedule(), report, made)


def test_page_is_whole_self_contained_and_escaped(tmp_path: Path) -> None:
    folder = tmp_path / "out" / "toy"
    folder.mkdir(parents=True)
    perfetto.write(schedule(), folder / "trace.json")
    verified = {"max_abs_err": 1.25e-6, "tokens_equal": True, "oracle": "onnxruntime <x>"}
    path = html.write([html.Entry(compiled(folder), verified)], tmp_path / "report.html")
    page = Page()
    page.feed(path.read_text(encoding="utf-8"))
    assert page.open == []
    assert page.loads == []
    assert page.links == ["out/toy/trace.json", "https://ui.perfetto.dev"]
    for said in (
        "1.23 M parameters in 2 layers",
        "40 us",
        "1.25e-06",
        "onnxruntime <x>",
        "step 3 <b> overlaps",
        "latency",
    ):
        assert said in page.said


def test_page_is_the_same_each_time() -> None:
    assert html.render([html.Entry(compiled())]) == html.render([html.Entry(compiled())])


def test_plots_of_nothing_are_empty() -> None:
    assert plots.times([]) == plots.influences([]) == plots.loads([]) == ""


def test_trace_has_an_event_per_step_and_tracks_by_unit() -> None:
    found = json.loads(perfetto.trace(schedule()))
    slices = [e for e in found["traceEvents"] if e["ph"] == "X" and e["name"] == "run"]
    assert sorted((e["tid"], e["ts"], e["dur"]) for e in slices) == [
        (0, 0, 5), (0, 5, 5), (0, 15, 5), (0, 20, 5), (1, 30, 10),
    ]  # fmt: skip
    assert {e["args"]["op"] for e in slices} == {"layers.0/mlp <down>"}
    tracks = {e["args"]["name"] for e in found["traceEvents"] if e["name"] == "thread_name"}
    assert tracks == {"a[0]", "b", "blocks"}
    blocks = [
        (e["name"], e["ts"], e["dur"]) for e in found["traceEvents"] if e.get("tid") == 3 and e["ph"] == "X"
    ]
    assert blocks == [("layer 1/2", 0, 10), ("layer 2/2", 15, 10), ("head", 30, 10)]


def test_a_long_trace_shows_first_repetitions_only() -> None:
    found = json.loads(perfetto.trace(schedule(), max_events=4))
    assert sum(e["ph"] == "X" and e["name"] == "run" for e in found["traceEvents"]) == 3


def test_trace_is_the_same_each_time() -> None:
    assert perfetto.trace(schedule()) == perfetto.trace(schedule())


def test_ports_that_differ_by_a_number_alone_are_one_line() -> None:
    one = {"role": "past.key.0", "shape": [1]}
    other = {"role": "past.key.1", "shape": [2]}
    record = {"ids": {"role": "ids"}, "k0": one, "k1": {**one, "role": "past.key.1"}, "k2": other, "v7": one}
    assert folded(record) == {
        "ids": {"role": "ids"},
        "k{0..1}": {"role": "past.key.#", "shape": [1]},
        "k2": other,
        "v7": one,
    }


@pytest.mark.parametrize(
    ("numbers", "shown"),
    [((0, 1), "0..1"), ((3, 4, 5), "3..5"), ((0, 2), "0,2"), ((0, 2, 4, 6), "0,2..6"), ((0, 1, 3), "0,1,3")],
)
def test_a_line_of_many_ports_claims_no_port_that_is_not_there(numbers: tuple[int, ...], shown: str) -> None:
    assert list(folded({f"k{n}": {"shape": [1]} for n in numbers})) == [f"k{{{shown}}}"]
