"""compare_runs.py report: the page of accepted records, parsed back; hostile records; its charts."""

import copy
import html
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from shutil import copytree

import pytest

import compare_runs as cr
from recordbook import report, svg
from recordbook.book import Record, records_of
from recordbook.statistics import half_interval
from recordbook.tracks import RECORDS, find_track, track_names
from tests.conftest import write_series

VOID = {"meta", "br"}
RUNS = 12
TIMES = {"A": tuple(2.1 + 0.01 * (i % 3) for i in range(RUNS))}  # seconds
TIMES["B"] = (*(2 + 0.007 * (i % 4) for i in range(RUNS - 1)), None)  # the last one diverges
LOSSES = {arm: tuple(4.1 + 0.001 * (i % 5) for i in range(RUNS)) for arm in "AB"}
RULES = ("short", "sprint", "tiny")


class Page(HTMLParser):
    """What a page holds: ids, attributes, tables and text; fails where tags do not match."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.ids, self.attributes, self.tags, self.open = [], [], [], []
        self.tables, self.texts = {}, []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, key, value) for key, value in attrs]
        self.ids += [value for key, value in attrs if key == "id"]
        if tag in VOID:
            return
        self.open.append(tag)
        if dict(attrs).get("role") == "region":
            self.rows = self.tables.setdefault(dict(attrs)["aria-label"], [])
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        if "style" not in self.open:
            self.texts.append(data)
        if "td" in self.open or "th" in self.open:
            self.rows[-1][-1] += data


@pytest.fixture(scope="module")
def book(tmp_path_factory) -> Path:
    """A record book with two accepted records of track tiny, the second with a run that diverged."""
    folder = tmp_path_factory.mktemp("book")
    for name in track_names():
        (folder / "records" / name).mkdir(parents=True)
        (folder / "records" / name / "track.toml").write_bytes((RECORDS / name / "track.toml").read_bytes())
    series = write_series(folder / "first", kind="series")
    options = ["--track", "tiny", "--records", str(folder / "records")]
    assert cr.main(["accept", str(series), "--name", "first", "--claim", "baseline", *options]) == 0
    series = write_series(folder / "second", n=RUNS, times=TIMES, losses=LOSSES, started="2026-04-05")
    assert cr.main(["accept", str(series), "--name", "second-one", "--claim", "systems", *options]) == 0
    return folder / "records"


@pytest.fixture(scope="module")
def text(book) -> str:
    return report.page(report.read_book(book))


@pytest.fixture(scope="module")
def page(text) -> Page:
    return Page(text)


@pytest.fixture
def second(book) -> Record:
    """The second record, to be changed."""
    record = records_of("tiny", book)[-1]
    return Record(record.folder, copy.deepcopy(record.content))


def page_of(*records: Record) -> str:
    return report.page([(find_track("tiny"), records)])


# the page ---------------------------------------------------------------------------------------------------


def test_nothing_is_loaded_from_elsewhere(text, page):
    for foreign in (
        "http:",
        "https:",
        "//",
        "src=",
        "url(",
        "@import",
        "<script",
        "<link",
        "<img",
        "javascript",
    ):
        assert foreign not in text.replace("<!DOCTYPE html>", ""), foreign
    links = [value for _, key, value in page.attributes if key == "href"]
    assert links
    assert all(link.startswith("#") and link[1:] in page.ids for link in links)


def test_ids_are_unique_and_names_of_charts_exist(page):
    assert len(page.ids) == len(set(page.ids))
    assert {"tiny", "short", "sprint", "tiny.2026-03-01_first", "tiny.2026-04-05_second-one"} <= set(page.ids)
    named = [i for _, key, value in page.attributes if key == "aria-labelledby" for i in value.split()]
    assert len(named) == 2 * page.tags.count("svg") > 0
    assert set(named) <= set(page.ids)


def test_a_phone_and_the_dark_are_thought_of(text, page):
    assert ("meta", "content", "width=device-width, initial-scale=1") in page.attributes
    assert "prefers-color-scheme: dark" in text
    assert "font: 16px" in text
    boxes = [value for tag, key, value in page.attributes if (tag, key) == ("div", "class")]
    assert boxes.count("scroll") == page.tags.count("table")


def test_every_class_has_a_style(text, page):
    used = {name for _, key, value in page.attributes if key == "class" for name in value.split()}
    assert (
        used - {name for name in used if f".{name} " in text or f".{name}," in text or f".{name}:" in text}
        == set()
    )


def test_the_table_of_a_track(book, page):
    """The newest record first; each number is that of result.json, as it is printed everywhere."""
    second = records_of("tiny", book)[-1]
    head, *rows = page.tables["Records of track tiny"]
    assert head == ["Date", "Record", "Time, s", "Gain, s", "val_loss", "p", "Claim", "Runs", "Hardware"]
    stats, gain = second.own.stats, second.gain
    seconds = [run["seconds"] for run in second.own.runs if run["counted"]]
    assert rows[0] == [
        "2026-04-05",
        "second-one",
        f"{stats['time_mean']:.4f} ± {half_interval(seconds):.4f}",
        f"{gain['amount']:.4f} ({gain['relative']:.2%})"
        f"{gain['level']:.0%}: {gain['low']:.4f} to {gain['high']:.4f}",
        f"{stats['loss_mean']:.4f} ± {half_interval(LOSSES['B'][:-1]):.4f}",
        f"{second.content['verdict']['p']:.3g}",
        "systems",
        "12 and 11",
        "M1: 1 x CPU Test CPU",
    ]
    own = records_of("tiny", book)[0].own
    half = half_interval([run["seconds"] for run in own.runs])
    assert rows[1][:4] == ["2026-03-01", "first", f"{own.stats['time_mean']:.4f} ± {half:.4f}", "-"]
    assert len(rows) == 2


def test_every_run_is_shown(book, page):
    record = records_of("tiny", book)[-1]
    _, *rows = page.tables[f"Runs of {record.id}"]
    runs = [(arm, run) for arm in record.arms for run in arm.runs]
    assert len(runs) == len(rows) == 24
    for (arm, run), row in zip(runs, rows, strict=True):
        seconds = f"{run['seconds']:.3f}"
        assert row[:4] == [arm.name, str(run["seed"]), seconds, f"{run['metric']:.4f}"]
        assert row[4].startswith(run["status"])
        assert row[5] == run["log"]
    assert rows[-1][4].startswith("diverged: ")
    assert rows[-1][4].endswith("(ended diverged, not counted)")


def test_reasons_findings_and_arms(book, page):
    record = records_of("tiny", book)[-1]
    found = record.content["verdict"]
    assert page.tables[f"Reasons for {record.id}"][1:] == [[r["state"], r["text"]] for r in found["reasons"]]
    rows = page.tables[f"Findings on {record.id}"][1:]
    assert [row[0] for row in rows] == [f["level"] for f in found["findings"]]
    assert all(row[1].startswith(f["text"]) for row, f in zip(rows, found["findings"], strict=True))
    _, *arms = page.tables[f"Arms of {record.id}"]
    assert [(row[0], row[2], row[3]) for row in arms] == [
        (a.name, str(a.stats["runs"]), str(a.failed)) for a in record.arms
    ]
    assert arms[1][5] == f"{record.own.stats['time_sd']:.4f}"


def test_tracks_without_records_show_their_rules(page):
    said = " ".join(page.texts)
    assert said.count("No record yet.") == 3
    assert "8 GPUs named NVIDIA (H100 80GB HBM3|H200)" in said
    assert "one unit is worth 390 ± 30 s" in said
    assert "score: equal budget; val_bpb better by more than 0.00194 bits a byte (0.005 nats/token)" in said
    assert "2 records on 4 tracks." in said
    assert "each at the level 0.01; Welch's one-sided t-test of val_bpb" in said, "the time is fixed there"
    assert "taken by a process that sees the artifact" in said, "lines of the notes are no lines of the page"


def test_the_same_records_give_the_same_bytes(book, text, tmp_path):
    copytree(book, tmp_path / "elsewhere")
    out = tmp_path / "page.html"
    assert cr.main(["report", "--records", str(tmp_path / "elsewhere"), "--out", str(out)]) == 0
    assert out.read_text(encoding="utf-8") == text
    assert [path.name for path in tmp_path.iterdir() if path.suffix != ""] == ["page.html"]


def test_twenty_records_of_long_runs_stay_small(second):
    points = [[step, step / 10, 4 + 3 / (step + 1)] for step in range(0, 4000, 2)]
    runs = [{"arm": arm.name, "log": f"{i}.txt", "points": points} for arm in second.arms for i in range(20)]
    for arm in second.content["arms"]:
        arm["runs"] = [arm["runs"][0] | {"log": f"logs/{'n' * 40}{i}.txt"} for i in range(20)]
    records = []
    for day in range(1, 21):
        content = second.content | {"curves": runs, "date": f"2026-05-{day:02d}", "name": f"n{day}"}
        records.append(Record(second.folder, content))
    assert len(page_of(*records).encode()) < 1_000_000


# hostile and odd records ------------------------------------------------------------------------------------

HOSTILE = "</td></svg><script>alert(1)</script><img src=x onerror=\"alert('1')\">&amp;\u202e\x1b[31m"


def poisoned(value):
    """The same value with markup added to every text."""
    if isinstance(value, dict):
        return {key: poisoned(item) for key, item in value.items()}
    if isinstance(value, list):
        return [poisoned(item) for item in value]
    return value + HOSTILE if isinstance(value, str) else value


def test_markup_in_a_record_stays_text(second):
    """Every text of result.json is hostile but date, name, track and role, whose forms the reader checks."""
    second.content["previous"]["comparable"] = "another machine"
    content = poisoned(second.content) | {key: second.content[key] for key in ("date", "name", "track")}
    text = page_of(Record(second.folder, content))
    assert "<script" not in text
    assert "<img" not in text
    assert "\u202e" not in text
    assert "\x1b" not in text
    found = Page(text)
    assert not any(key.startswith("on") for _, key, _ in found.attributes)
    plain = Page(page_of(second))
    assert found.tags == plain.tags
    assert found.ids == plain.ids
    assert cr.printable(second.own.name + HOSTILE) in {row[0] for row in found.tables[f"Runs of {second.id}"]}


def test_hostile_rules_stay_text():
    track = find_track("tiny")
    values = {key: getattr(track, key) for key in track.__slots__}
    bad = values | {"title": HOSTILE, "notes": HOSTILE, "recipe": HOSTILE}
    text = report.page([(type(track)(**bad), [])])
    assert "<script" not in text
    assert html.escape(cr.printable(HOSTILE)) in text


def test_losses_that_are_not_numbers_leave_gaps(second):
    for curve in second.content["curves"]:
        curve["points"][0][2] = None
        curve["points"][-1][1] = None
    assert "null" not in page_of(second)
    second.content["curves"] = []
    assert "<figure>" in page_of(second)


@pytest.mark.parametrize("place", ["curve", "run", "stats", "gain"])
def test_numbers_that_nobody_measures_are_refused(second, place):
    content = second.content
    holder, key = {
        "curve": (content["curves"][0]["points"][1], 2),
        "run": (content["arms"][0]["runs"][0], "seconds"),
        "stats": (content["arms"][1]["stats"], "loss_mean"),
        "gain": (content["gain"], "low"),
    }[place]
    holder[key] = -1e200
    with pytest.raises(cr.InputError, match=r"-1e\+200 is no time, loss or p-value; restore the record"):
        report.check_numbers(second)


# command line -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--out", "page.txt"], "must end in one of .html, .htm"),
        (["--out", "no/such/page.html"], "not a file in an existing folder"),
        (["--records", "nowhere"], "nowhere: holds no track"),
        (["--nonsense"], "unrecognized arguments"),
    ],
)
def test_bad_arguments_are_one_line(argv, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cr.main(["report", *argv]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error
    assert list(tmp_path.iterdir()) == []


def test_a_broken_record_leaves_the_old_page(book, tmp_path, capsys):
    copytree(book, tmp_path / "records")
    out = tmp_path / "page.html"
    out.write_text("old")
    place = tmp_path / "records" / "tiny" / "2026-03-01_first" / "result.json"
    place.write_text(json.dumps(json.loads(place.read_text()) | {"arms": []}))
    assert cr.main(["report", "--records", str(tmp_path / "records"), "--out", str(out)]) == 2
    assert "result.json" in capsys.readouterr().err
    assert out.read_text() == "old"


def test_the_project_s_own_book_makes_a_page(tmp_path, capsys):
    out = tmp_path / "page.html"
    assert cr.main(["report", "--out", str(out)]) == 0
    assert re.fullmatch(r".*page\.html: \d+ kB\n", capsys.readouterr().out)
    text = out.read_text(encoding="utf-8")
    assert {*RULES} <= set(Page(text).ids)
    assert "\\" not in text, "an escape of Markdown, which the records' own pages have"


# charts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [
        (0, 10, ["0", "2", "4", "6", "8", "10"]),
        (3.2741, 3.2809, ["3.276", "3.278", "3.280"]),
        (99.4, 100.3, ["99.4", "99.6", "99.8", "100.0", "100.2"]),
        (-1e-4, 1e-4, ["-0.00010", "-0.00005", "0.00000", "0.00005", "0.00010"]),
        (0, 2.5e6, ["0", "500000", "1000000", "1500000", "2000000", "2500000"]),
    ],
)
def test_ticks_are_round(low, high, words):
    ticks = svg.round_ticks(low, high)
    assert [text for _, text in ticks] == words
    assert all(low - 1e-9 <= value <= high + 1e-9 for value, _ in ticks)


def test_points_lie_where_they_should():
    frame = svg.Frame(svg.Axis("x", 0, 10, ()), svg.Axis("y", 0, 1, ()))
    corners = frame.x(0), frame.x(10), frame.y(0), frame.y(1)
    assert corners == (svg.LEFT, svg.WIDTH - svg.RIGHT, svg.HEIGHT - svg.BOTTOM, svg.TOP)
    middle = f"{(svg.LEFT + svg.WIDTH - svg.RIGHT) / 2:g} {(svg.TOP + svg.HEIGHT - svg.BOTTOM) / 2:g}"
    assert middle in svg.path(frame, [(0, 0), (5, 0.5)], "new")
    assert svg.path(frame, [(0, 0)], "new") == ""


def test_equal_values_have_a_range():
    axis = svg.axis_of("loss", [3.28, 3.28])
    assert axis.low < 3.28 < axis.high
    assert axis.ticks
    assert svg.axis_of("zero", [0.0]).low < 0
    assert svg.axis_of("from zero", [0.0, 0.0], from_zero=True).ticks
    assert svg.axis_of("from zero", [7.0, 9.0], from_zero=True).low == 0
    assert svg.axis_of("below zero", [-5.0], from_zero=True).low < -5


def test_the_history_breaks_where_times_cannot_be_compared(book, second):
    first = records_of("tiny", book)[0]
    assert second.content["previous"]["comparable"] == ""
    joined = report.history(find_track("tiny"), [first, second], "a")
    second.content["previous"]["comparable"] = "another machine"
    broken = report.history(find_track("tiny"), [first, second], "a")
    assert joined.count('class="step"') == 1
    assert broken.count('class="step"') == 2
    assert "line breaks" in broken
    assert "line breaks" not in joined


def test_thinned_curves_keep_their_ends():
    assert report.thinned(range(5), 5) == [0, 1, 2, 3, 4]
    found = report.thinned(range(1000), 7)
    assert len(found) == 7
    assert (found[0], found[-1]) == (0, 999)
