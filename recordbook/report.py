"""The record book as one page of HTML: rules, tables, history and loss curves of every track.

    python compare_runs.py report [--out FILE] [--records FOLDER]

The page needs no network, no script and no other file, is read on a phone as well as on a desk, and follows
the dark mode of the system. It is made from records/ alone: the same records give the same bytes. Whatever a
record says is escaped. Order of this file: text, rules, table, charts, one record, page, command line.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from datetime import date
from html import escape
from pathlib import Path
from statistics import fmean

from compare_runs import InputError, Parser, check_output, printable, replace_file
from recordbook import svg
from recordbook.book import Record, records_of
from recordbook.pages import beside_previous, gain_text, machine_letters, probability
from recordbook.statistics import half_interval
from recordbook.tracks import CPU, FILE, RECORDS, Track, load_track, track_names
from recordbook.verdict import LOSS_TESTS, TIME_TESTS

OUT = "records.html"
POINTS_OF_A_CHART = 1_200  # of all its curves: some 15 kB
MOST_OF_A_CURVE, LEAST_OF_A_CURVE = 60, 8
UNSEEN = 0.15  # of a run: its loss falls steeply there, and would flatten the rest of the curve
LARGEST = 1e9  # of a time or a loss; what is beyond is no measurement
STYLE = """
:root { color-scheme: light dark; --ink: #1a1a1a; --paper: #fff; --faint: #5c5c5c; --line: #d9d9d9;
  --box: #f5f5f5; --link: #0050a0; --base: #0072b2; --new: #c04f00; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8e8e8; --paper: #161616; --faint: #adadad;
  --line: #3d3d3d; --box: #212121; --link: #8ab8ff; --base: #56b4e9; --new: #f0a030; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 75rem; color: var(--ink); background: var(--paper);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; -webkit-text-size-adjust: 100%; }
h1, h2, h3, h4 { line-height: 1.25; margin: 1.5em 0 0.5em; }
h1 { margin-top: 0.25em; }
h2 { border-top: 2px solid var(--line); padding-top: 1rem; margin-top: 2.5rem; }
a { color: var(--link); }
.faint, figcaption { color: var(--faint); }
.scroll { overflow-x: auto; }
.scroll:focus-visible, summary:focus-visible { outline: 2px solid var(--link); outline-offset: 2px; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 0.35rem 0.75rem 0.35rem 0; text-align: left; vertical-align: top; white-space: nowrap;
  border-bottom: 1px solid var(--line); overflow-wrap: normal; }
td.wide { white-space: normal; min-width: 9rem; overflow-wrap: anywhere; }
.n { text-align: right; }
dl { display: grid; grid-template-columns: minmax(7rem, max-content) 1fr; gap: 0.25rem 1rem; }
dt { color: var(--faint); }
dd { margin: 0; }
details { background: var(--box); border-radius: 6px; margin: 0.75rem 0; padding: 0.5rem 1rem; }
summary { cursor: pointer; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); gap: 1rem;
  margin-top: 1rem; }
figure { margin: 0; max-width: 34rem; }
svg { display: block; width: 100%; height: auto; font: 12px system-ui, sans-serif; fill: var(--ink); }
svg path { fill: none; stroke-width: 1; }
svg .grid { stroke: var(--line); }
svg .target { stroke: var(--ink); stroke-dasharray: 6 3; }
svg .base { stroke: var(--base); stroke-dasharray: 3 2; }
svg .new, svg .span { stroke: var(--new); }
svg .step { stroke: var(--new); stroke-width: 2; }
svg .base-mean { stroke: var(--base); stroke-width: 2.5; }
svg .new-mean { stroke: var(--new); stroke-width: 2.5; }
svg .base-point { fill: var(--base); fill-opacity: 0.65; }
svg .new-point { fill: var(--new); fill-opacity: 0.65; }
.key-base, .key-new { font-weight: 600; }
.key-base { color: var(--base); }
.key-new { color: var(--new); }
"""


# 1. text --------------------------------------------------------------------------------------------------


def safe(words: object) -> str:
    """Text of a record, for HTML: on one line, markup and control characters escaped."""
    return escape(printable(str(words)))


def seconds_text(value: float | None) -> str:
    """A time in seconds, as the community's table prints it."""
    return "-" if value is None else f"{value:.4f}"


def loss_text(value: float | None) -> str:
    """A loss, to the digits that logs have."""
    return "-" if value is None else f"{value:.4f}"


def with_interval(centre: float, found: Sequence[float], show) -> str:
    """A mean with half of its 95 % interval, as `show` writes numbers."""
    return f"{show(centre)} ± {show(half_interval(found))}" if len(found) > 1 else show(centre)


def measured(arm, key: str) -> list[float]:
    """One number of each counted run of an arm; those that have it."""
    return [run[key] for run in arm.runs if run["counted"] and run[key] is not None]


def time_of(arm) -> str:
    """Mean final time of an arm with its interval."""
    return with_interval(arm.stats["time_mean"], measured(arm, "seconds"), seconds_text)


def loss_of(arm) -> str:
    """Mean final loss of an arm with its interval."""
    return with_interval(arm.stats["loss_mean"], measured(arm, "metric"), loss_text)


def gain_of(record: Record) -> str:
    """Seconds saved, or what the metric gained, its share and its interval below, as HTML."""
    if (gain := record.gain) is None:
        return "-"
    form = seconds_text if gain["of"] == "time" else loss_text
    ends = f"{form(gain['low'])} to {form(gain['high'])}"
    return f"{form(gain['amount'])} ({gain['relative']:.2%})<br>{gain['level']:.0%}: {ends}"


def place_of(record: Record) -> str:
    """Where a record is on the page. No name holds a dot, so no place is that of something else."""
    return f"{record.track}.{record.id}"


def not_comparable(record: Record) -> str:
    """Why a record's time cannot be compared with that of the record before; '' if it can."""
    previous = record.content["previous"]
    return previous["comparable"] if previous else ""


def table(label: str, heads: Sequence[str], rows: Iterable[Sequence[str]], kinds: str) -> str:
    """A table that scrolls in a box of its own. Cells are HTML; kinds: t text, w wide text, n number."""
    look = {"t": "", "w": ' class="wide"', "n": ' class="n"'}
    ends = [look[kind] for kind in kinds]

    def row(tag: str, cells: Sequence[str]) -> str:
        shown = (f"<{tag}{end}>{cell}</{tag[:2]}>" for end, cell in zip(ends, cells, strict=True))
        return f"<tr>{''.join(shown)}</tr>"

    head = row('th scope="col"', heads).replace('" class="wide"', '"')
    body = "\n".join(row("td", cells) for cells in rows)
    box = f'<div class="scroll" role="region" aria-label="{escape(label)}" tabindex="0">'
    return f"{box}<table>\n<thead>{head}</thead>\n<tbody>\n{body}\n</tbody></table></div>"


def definitions(pairs: Iterable[tuple[str, object]]) -> str:
    """Terms and what they are."""
    rows = "\n".join(f"<dt>{term}</dt><dd>{safe(words)}</dd>" for term, words in pairs if words)
    return f"<dl>\n{rows}\n</dl>"


# 2. rules -------------------------------------------------------------------------------------------------


def claims_of(track: Track) -> Iterator[str]:
    """What each claim of a track must show, in words."""
    worth = ""
    if track.seconds_per_loss is not None:
        error = f" ± {track.seconds_per_loss_sd:g}" if track.seconds_per_loss_sd else ""
        worth = (
            f", and faster at equal {track.metric} (one unit is worth {track.seconds_per_loss:g}{error} s)"
        )
    known = {
        "systems": f"systems: same maths; faster, and {track.metric} worse by less than {track.margin:g}",
        "ml": f"ml: other maths; faster, and the target is reached{worth}",
    }
    if "score" in track.claims:
        gain = f"{track.least_gain:.5f} bits a byte ({track.gain:g} {track.gain_unit})"
        known["score"] = f"score: equal budget; {track.metric} better by more than {gain}"
    return (known[claim] for claim in track.claims)


def rules_of(track: Track) -> str:
    """The rules of a track in words."""
    side = "at or below" if track.direction == "lower" else "at or above"
    machine = f"{track.gpus} GPU{'s' * (track.gpus > 1)} named {track.hardware}"
    test = f"{TIME_TESTS[track.time_test][1]} of the training times"
    if "systems" in track.claims:
        test += f"; {LOSS_TESTS[track.loss_test][1]}, of a systems claim's {track.metric}"
    goal = f"the least training time to a mean {track.metric} {side} {track.target:g}"
    if track.is_score:
        goal = f"the best mean {track.metric} of a fixed budget, {side} {track.target:g}"
        test = f"Welch's one-sided t-test of {track.metric}"
    rows = [
        ("Goal", goal),
        ("Hardware", "a CPU" if track.hardware == CPU else machine),
        ("Recipe", track.recipe),
        ("Data", track.data or "any; the same in every run of a record"),
        ("Runs", f"at least {track.min_runs} complete ones of each arm, on one machine, planned beforehand"),
        ("Tests", f"each at the level {track.alpha:g}; {test}"),
        ("Claims", "; ".join(claims_of(track))),
        ("Notes", " ".join(track.notes.split())),
    ]
    return definitions(rows)


# 3. table -------------------------------------------------------------------------------------------------


def records_table(track: Track, records: Sequence[Record]) -> str:
    """The records of a track, the newest first."""
    rows, letters = [], machine_letters(records)
    for record in reversed(records):
        runs = " and ".join(str(arm.stats["runs"]) for arm in record.arms)
        why = not_comparable(record)
        cells = [
            safe(record.date),
            f'<a href="#{place_of(record)}">{safe(record.name)}</a>',
            time_of(record.own) + (f"<br>{safe(why)}" if why else ""),
            gain_of(record),
            loss_of(record.own),
            probability(record.content["verdict"]["p"]),
            safe(record.claim),
            runs,
            safe(f"{letters[record.machine['id']]}: {record.machine['hardware']}"),
        ]
        rows.append(cells)
    gain = "Gain" if track.is_score else "Gain, s"
    heads = ["Date", "Record", "Time, s", gain, escape(track.metric), "p", "Claim", "Runs", "Hardware"]
    return table(f"Records of track {track.name}", heads, rows, "twnnnntnw")


# 4. charts ------------------------------------------------------------------------------------------------


def day_axis(days: Sequence[int]) -> svg.Axis:
    """The axis of dates, given as ordinals, with at most three ticks on days."""
    first, last = min(days), max(days)
    low, high = svg.widened(days) if last > first else (first - 1, last + 1)
    shown = sorted({first, (first + last) // 2, last})
    return svg.Axis("date", low, high, tuple((day, date.fromordinal(day).isoformat()) for day in shown))


def history(track: Track, records: Sequence[Record], name: str) -> str:
    """Time, or score, of each record over its date; the line breaks where they cannot be compared."""
    stat, key, form, unit = ("time_mean", "seconds", seconds_text, "time, s")
    if track.is_score:
        stat, key, form, unit = ("loss_mean", "metric", loss_text, track.metric)
    days = [date.fromisoformat(record.date).toordinal() for record in records]
    means = [record.own.stats[stat] for record in records]
    halves = [half_interval(found) if len(found) > 1 else 0.0
              for found in (measured(record.own, key) for record in records)]  # fmt: skip
    ends = [mean + sign * half for mean, half in zip(means, halves, strict=True) for sign in (-1, 1)]
    frame = svg.Frame(day_axis(days), svg.axis_of(unit, ends))
    marks, line = [], []
    for i, (day, mean) in enumerate(zip(days, means, strict=True)):
        line = line and [*line, (day, line[-1][1])]
        if not_comparable(records[i]):
            marks.append(svg.path(frame, line, "step"))
            line = []
        line.append((day, mean))
    marks.append(svg.path(frame, [*line, (frame.x_axis.high, line[-1][1])], "step"))
    for day, mean, half in zip(days, means, halves, strict=True):
        marks.append(svg.path(frame, [(day, mean - half), (day, mean + half)], "span"))
        marks.append(svg.point(frame, day, mean, "new-point"))
    said = "; ".join(f"{r.date} {printable(r.name)}: {form(x)}" for r, x in zip(records, means, strict=True))
    what = f"Record {unit.partition(',')[0]}"
    drawing = svg.chart(name, f"{what} of track {track.name} over the date", said, frame, marks)
    caption = f"{escape(what)} over the date; bars: 95 % interval of the mean."
    broken = " The line breaks where machine or data changed." if any(map(not_comparable, records)) else ""
    return figure(drawing, caption + broken)


def figure(drawing: str, caption: str) -> str:
    """A chart with what it shows; the caption is HTML."""
    return f"<figure>\n{drawing}\n<figcaption>{caption}</figcaption></figure>"


def thinned(points: Sequence, most: int) -> list:
    """At most `most` of the points, evenly, the first and the last among them."""
    if len(points) <= most:
        return list(points)
    return [points[round(i * (len(points) - 1) / (most - 1))] for i in range(most)]


def roles_of(record: Record) -> dict[str, str]:
    """{name of an arm: kind of its marks}."""
    return {arm.name: "new" if arm is record.own else "base" for arm in record.arms}


def legend(record: Record, target: float | None) -> str:
    """Which mark is which arm, and the target."""
    words = {"new": "solid, round", "base": "dashed, square"}
    found = [
        f'<span class="key-{kind}">{safe(name)}</span> ({words[kind]})'
        for name, kind in roles_of(record).items()
    ]
    return ", ".join(found) + (f"; long dashes: target {target:g}" if target is not None else "")


def loss_curves(track: Track, record: Record, name: str) -> str:
    """Validation loss of every run against its time, without the large drop at its start."""
    target = track.target if track.metric == "val_loss" else None
    curves = []
    for curve in record.content["curves"]:
        known = [(point[1], point[2]) for point in curve["points"] if None not in point[1:]]
        if kept := [(x, y) for x, y in known if x >= UNSEEN * known[-1][0]]:
            curves.append((curve["arm"], kept))
    if not curves:
        return ""
    share = max(LEAST_OF_A_CURVE, min(MOST_OF_A_CURVE, POINTS_OF_A_CHART // len(curves)))
    losses = [y for _, points in curves for _, y in points] + ([target] if target is not None else [])
    x_axis = svg.axis_of("training time, s", [x for _, points in curves for x, _ in points], from_zero=True)
    frame = svg.Frame(x_axis, svg.axis_of("validation loss", losses))
    kinds = roles_of(record)
    marks = [svg.path(frame, thinned(points, share), kinds.get(arm, "base")) for arm, points in curves]
    marks += [svg.level(frame, target, "target")] if target is not None else []
    drawing = svg.chart(
        name, f"Loss curves of {printable(record.id)}", f"{len(curves)} runs, a line each.", frame, marks
    )
    return figure(
        drawing, f"Loss against time of {safe(record.name)}, a line a run: {legend(record, target)}."
    )


def final_values(track: Track, record: Record, name: str) -> str:
    """Final time and loss of every counted run; crosses are means."""
    kinds, marks, told = roles_of(record), [], []
    runs = {arm.name: [(r["seconds"], r["metric"]) for r in arm.runs if r["counted"]] for arm in record.arms}
    runs = {arm: [pair for pair in pairs if None not in pair] for arm, pairs in runs.items()}
    if not all(runs.values()):
        return ""
    flat = [pair for pairs in runs.values() for pair in pairs]
    y_axis = svg.axis_of(f"final {track.metric}", [y for _, y in flat] + [track.target])
    frame = svg.Frame(svg.axis_of("final time, s", [x for x, _ in flat]), y_axis)
    for arm, pairs in runs.items():
        kind = kinds[arm]
        marks += [svg.point(frame, x, y, f"{kind}-point", square=kind == "base") for x, y in pairs]
        centre = fmean(x for x, _ in pairs), fmean(y for _, y in pairs)
        marks.append(svg.cross(frame, *centre, f"{kind}-mean"))
        told.append(f"{printable(arm)}: mean {seconds_text(centre[0])} s, {loss_text(centre[1])}")
    marks.append(svg.level(frame, track.target, "target"))
    title = f"Final times and losses of {printable(record.id)}"
    drawing = svg.chart(name, title, "; ".join(told), frame, marks)
    return figure(drawing, f"Last validation of each run, crosses: means: {legend(record, track.target)}.")


# 5. one record --------------------------------------------------------------------------------------------


def facts_of(record: Record) -> str:
    """What a record rests on, beside its runs."""
    content, plan = record.content, record.content["plan"]
    planned = f"{plan['kind']}, {plan['runs']} runs of each arm, made {plan['made']}"
    versions, names = (
        content["versions"],
        {"python": "Python", "torch": "PyTorch", "cuda": "CUDA", "triton": "Triton"},
    )
    rows = [
        ("Verdict", f"{content['verdict']['outcome']}, p {probability(content['verdict']['p'])}"),
        ("Claim", record.claim),
        ("Gain", f"{gain_text(record.gain)}; {record.gain['test']}" if record.gain else ""),
        ("Beside others", " ".join(beside_previous(content))),
        ("Plan", f"{planned}, sha256 {plan['sha256'][:12]}"),
        ("Machine", ", ".join(str(v) for k in ("hardware", "host", "id") if (v := record.machine[k]))),
        ("Software", ", ".join(f"{names[k]} {versions[k]}" for k in names if versions[k])),
        ("Data", (record.machine["data"] or "")[:19]),  # twelve digits of its hash
    ]
    return definitions(rows)


def arms_table(track: Track, record: Record) -> str:
    """The arms with their means."""
    rows = []
    for arm in record.arms:
        stats = arm.stats
        cells = [safe(arm.name), safe(arm.role), str(stats["runs"]), str(arm.failed), time_of(arm)]
        cells += [
            seconds_text(stats["time_sd"]),
            loss_of(arm),
            loss_text(stats["loss_sd"]),
            probability(stats["loss_p"]),
        ]
        rows.append([*cells, safe(arm.source[:12])])
    metric = escape(track.metric)
    heads = ["Arm", "Role", "Complete", "Failed", "Time, s", "sd", metric, "sd", "p", "Source"]
    return table(f"Arms of {printable(record.id)}", heads, rows, "ttnnnnnnnt")


def runs_table(track: Track, record: Record) -> str:
    """Every run of every arm, failed ones included."""
    rows = []
    for arm in record.arms:
        for run in arm.runs:
            seed = "-" if run["seed"] is None else str(run["seed"])
            status = f"{run['status']}: {run['reason']}" if run["reason"] else run["status"]
            if not run["counted"]:
                status += f" (ended {run['ended']}, not counted)"
            seconds = "-" if run["seconds"] is None else f"{run['seconds']:.3f}"
            cells = [safe(arm.name), seed, seconds, loss_text(run["metric"])]
            rows.append([*cells, safe(status), safe(run["log"])])
    heads = ["Arm", "Seed", "Time, s", escape(track.metric), "Status", "Log"]
    return table(f"Runs of {printable(record.id)}", heads, rows, "tnnnwt")


def record_details(track: Track, record: Record) -> str:
    """One record, folded: its verdict with reasons, findings, arms, runs and curves."""
    found, place = record.content["verdict"], place_of(record)
    reasons = [(safe(r["state"]), safe(r["text"])) for r in found["reasons"]]
    findings = [(safe(f["level"]), safe(f["text"]) + safe(named(f))) for f in found["findings"]]
    title = f"{safe(record.date)} <strong>{safe(record.name)}</strong>: {time_of(record.own)} s"
    charts = [loss_curves(track, record, f"{place}.curves"), final_values(track, record, f"{place}.final")]
    parts = [
        f'<details>\n<summary>{title}</summary>\n<h3 id="{place}">{safe(record.id)}</h3>',
        facts_of(record),
        "<h4>Reasons of the verdict</h4>",
        table(f"Reasons for {printable(record.id)}", ["State", "Reason"], reasons, "tw"),
        "<h4>Findings</h4>",
        table(f"Findings on {printable(record.id)}", ["Level", "Finding"], findings, "tw")
        if findings
        else "<p>None.</p>",
        '<div class="charts">',
        *charts,
        "</div>",
        "<h4>Arms</h4>",
        arms_table(track, record),
        "<h4>Runs</h4>",
        runs_table(track, record),
        "</details>",
    ]
    return "\n".join(filter(None, parts))


def named(finding: dict) -> str:
    """The files of a finding that its sentence does not name."""
    unnamed = [name for name in finding["files"] if name not in finding["text"]]
    return f" ({', '.join(unnamed)})" if unnamed else ""


# 6. page --------------------------------------------------------------------------------------------------


def track_section(track: Track, records: Sequence[Record]) -> str:
    """One track: rules, table, charts, records."""
    parts = [f'<section>\n<h2 id="{track.name}">{escape(track.name)}: {safe(track.title)}</h2>']
    rules = rules_of(track)
    if not records:
        parts += ["<p>No record yet.</p>", f"<h3>Rules</h3>\n{rules}", "</section>"]
        return "\n".join(parts)
    newest = records[-1]
    charts = [history(track, records, f"{track.name}.history")]
    charts.append(loss_curves(track, newest, f"{track.name}.newest"))
    parts += [
        records_table(track, records),
        '<div class="charts">',
        *filter(None, charts),
        "</div>",
        f"<h3>Rules</h3>\n{rules}",
        "<h3>Records</h3>",
        *(record_details(track, record) for record in reversed(records)),
        "</section>",
    ]
    return "\n".join(parts)


READING = """<p>Every record is a set of runs that the rules of its track accept, compared with a baseline on
one machine. ± is half of the 95 % interval of the mean. <em>Gain</em> is the time saved against the record's
own baseline, or the score won where the time is fixed, with the interval of its test; <em>p</em> the largest
p-value of the tests that the claim needs: small means that noise hardly explains it. Times of different
machines cannot be compared.</p>"""


def page(book: Sequence[tuple[Track, Sequence[Record]]]) -> str:
    """The whole page."""
    count = sum(len(records) for _, records in book)
    known = f"{count} record{'s' * (count != 1)} on {len(book)} track{'s' * (len(book) != 1)}"
    links = [f'<a href="#{t.name}">{escape(t.name)}</a> ({len(records)})' for t, records in book]
    parts = [
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>Record book</title>\n<style>{STYLE}</style>\n</head>\n<body>",
        f"<header>\n<h1>Record book</h1>\n<p>{known}.</p>\n<nav>Tracks: {', '.join(links)}</nav>\n</header>",
        f"<main>\n{READING}",
        *(track_section(track, records) for track, records in book),
        '</main>\n<footer><p class="faint">Made from records/ by compare_runs.py report.</p></footer>',
        "</body>\n</html>\n",
    ]
    return "\n".join(parts)


def check_numbers(record: Record) -> None:
    """Refuse numbers that no run measures and no axis can show."""
    where = printable(str(record.folder))
    found = [number for curve in record.content["curves"] for point in curve["points"] for number in point]
    found += [run[key] for arm in record.arms for run in arm.runs for key in ("seconds", "metric")]
    found += [number for arm in record.arms for number in arm.stats.values()]
    found += [*(record.gain or {}).values(), record.content["verdict"]["p"]]
    for number in found:
        if isinstance(number, int | float) and not (math.isfinite(number) and abs(number) <= LARGEST):
            raise InputError(f"{where}: {number:.3g} is no time, loss or p-value; restore the record")


def read_book(records: str | Path) -> list[tuple[Track, list[Record]]]:
    """Every track of a folder with its records, oldest first."""
    names = track_names(records)
    if not names:
        raise InputError(f"{printable(str(records))}: holds no track; name a folder of tracks with --records")
    book = [(load_track(Path(records, name, FILE)), records_of(name, records)) for name in names]
    for record in (record for _, found in book for record in found):
        check_numbers(record)
    return book


# 7. command line ------------------------------------------------------------------------------------------


def command(argv: Sequence[str] | None = None) -> str:
    """`report`; returns what to print."""
    parser = Parser(
        prog="compare_runs.py report",
        description="Make one HTML page of the record book, which needs no network and no other file.",
    )
    parser.add_argument("--out", metavar="FILE", default=OUT, help=f"the page, .html; {OUT} if left out")
    parser.add_argument("--records", metavar="FOLDER", default=RECORDS, help="the record book; else records/")
    args = parser.parse_args(argv)
    check_output(args.out, "--out", (".html", ".htm"), [])
    text = page(read_book(args.records))
    replace_file(args.out, lambda temporary: Path(temporary).write_text(text, encoding="utf-8"))
    return f"{printable(args.out)}: {len(text.encode()) / 1000:.0f} kB"
