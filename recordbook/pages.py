"""The pages of the record book: README.md of a record and of a track, and the track's plot.

All are pure functions of result.json, so that what a page says is what the file holds, and verify.py makes
them again. Order of this file: parts, a record's page, a track's page, the plot.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from datetime import UTC

from compare_runs import Row, printable, table
from recordbook.book import BASELINE, MANIFEST, README, RESULT, Record
from recordbook.tracks import Track

PLOT = "history.svg"
PLOT_FORMAT = "splits.history/1"
PLOT_DATA = re.compile(rb"<!-- splits\.history/1 (\{.*\}) -->")

# 1. parts -------------------------------------------------------------------------------------------------


def json_text(content: dict) -> str:
    """The text of result.json."""
    return json.dumps(content, indent=1, allow_nan=False, ensure_ascii=True) + "\n"


def manifest(files: dict[str, bytes]) -> str:
    """The hash of each file, as `sha256sum -c` reads it."""
    rows = sorted(
        (name, hashlib.sha256(data).hexdigest()) for name, data in files.items() if name != MANIFEST
    )
    return "".join(f"{digest}  {name}\n" for name, digest in rows)


def cell(text: object) -> str:
    """A text for a Markdown table, list or line: what Markdown or HTML would read is escaped."""
    return re.sub(r"([\\`*_\[\]<>|&])", r"\\\1", printable(str(text)))


def grid(heads: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[int] = ()) -> str:
    """A Markdown table; the columns in `numbers` are aligned to the right."""
    rule = ["---:" if i in numbers else "---" for i in range(len(heads))]
    return "\n".join(f"| {' | '.join(line)} |" for line in [heads, rule, *rows])


def probability(p: float | None) -> str:
    """A p-value at the precision of the reasons."""
    return "-" if p is None else f"{p:.3g}"


def gain_text(gain: dict | None, escape: Callable[[str], str] = str) -> str:
    """'0.1033 s (4.90%), 98% interval 0.0962 to 0.1104'; of a score '0.0824 val_bpb (6.25%), ...'."""
    if gain is None:
        return "-"
    unit = "s" if gain["of"] == "time" else escape(gain["of"])
    sized = f"{gain['amount']:.4f} {unit} ({gain['relative']:.2%})"
    return f"{sized}, {gain['level']:.0%} interval {gain['low']:.4f} to {gain['high']:.4f}"


# 2. a record's page ---------------------------------------------------------------------------------------


def beside_previous(content: dict, escape: Callable[[str], str] = str) -> list[str]:
    """How a record stands beside the newest one when it was accepted, one sentence each."""
    before = content["previous"]
    if before is None:
        return ["It is the first record of the track."]
    metric, own = escape(content["rules"]["metric"]), content["arms"][-1]["stats"]
    size = f"{before['time_mean']:.4f} s, {metric} {before['loss_mean']:.4f}"
    lines = [f"The newest record of the track was {before['record']}: {size}."]
    if content["claim"] == "score":
        gap = own["loss_mean"] - before["loss_mean"]
        lines.append(f"This {metric} is {abs(gap):.4f} {'lower' if gap < 0 else 'higher'}.")
    elif before["comparable"]:
        lines.append(
            f"The two times cannot be compared, they are from {before['comparable']}: one source differs by "
            "about 1 % between machines of one kind, as much as a record usually gains."
        )
    else:
        gap = own["time_mean"] - before["time_mean"]
        lower = f"{abs(gap):.4f} s {'lower' if gap < 0 else 'higher'}"
        lines.append(
            f"Both are from the same machine and data, not from the same hour; this time is {lower}."
        )
    return [*lines, "The baseline arm ran that record's program."]


BASELINE_SOURCE = (
    " The baseline's source is in its logs: `python compare_runs.py replay LOG FOLDER` writes it out."
)
CLAIMED = {
    "systems": "the maths is the same: faster, and the loss not worse by the margin",
    "ml": "the maths is not the same: faster, and the target reached",
    "score": "the budget is the same: the metric better by more than the track's gain",
    BASELINE: "the first record of the track: the target reached; no gain in time is claimed",
}


def result_lines(content: dict) -> list[str]:
    """The result in its first sentences."""
    rules, stats, found = content["rules"], content["arms"][-1]["stats"], content["verdict"]
    size = f"(sd {stats['loss_sd']:.4f}; target {rules['target']:g}, p = {probability(stats['loss_p'])})"
    lines = [
        f"**Result: {stats['time_mean']:.4f} s** (sd {stats['time_sd']:.4f}, n = {stats['runs']}) to "
        f"{rules['metric']} {stats['loss_mean']:.4f} {size}, {cell(content['machine']['hardware'])}.",
        f"Claim `{content['claim']}` ({CLAIMED[content['claim']]}): largest p of its tests "
        f"{probability(found['p'])}, level {found['alpha']:g}.",
    ]
    if content["gain"]:
        place = "its own baseline arm, which ran in turn with it on the same machine"
        word = "Faster" if content["gain"]["of"] == "time" else "Better"
        lines.append(f"{word} than {place}, by {gain_text(content['gain'], cell)}.")
    return lines


def run_rows(content: dict) -> list[list[str]]:
    """Every attempt of every arm."""

    def row(run: dict) -> list[str]:
        seconds, metric = ("-" if run[key] is None else f"{run[key]:.4f}" for key in ("seconds", "metric"))
        found = [run["log"], run["seed"], run["ended"], run["steps"], seconds, metric, run["peak_mib"]]
        return ["-" if value is None else cell(value) for value in found]

    return [row(run) for arm in content["arms"] for run in arm["runs"]]


def facts(content: dict) -> list[str]:
    """Plan, machine, versions and sources, a line each."""
    plan, machine, versions = content["plan"], content["machine"], content["versions"]
    grown = ", extended later" if plan["extended"] else ""
    named = ", ".join(f"{key} {versions[key]}" for key in sorted(versions) if versions[key])
    sources = [f"{arm['name']} ({arm['role']}): source {arm['source']}" for arm in content["arms"]]
    told = [
        f"plan of {plan['made']}, sha256 {plan['sha256']}",
        f"{plan['runs']} runs of each arm, rule {plan['rule']}{grown}",
        *sources,
        f"machine {machine['id']}, host {machine['host'] or 'not logged'}",
        f"driver {machine['driver'] or 'not logged'}, data {machine['data'] or 'not logged'}",
        named,
    ]
    return [f"- {cell(line)}" for line in told]


def record_page(content: dict) -> str:
    """README.md of a record."""
    arms, track = content["arms"], content["track"]
    rows = [Row(**arm["stats"]) for arm in arms]
    names = [cell(arm["name"]) for arm in arms]
    files = ", ".join(cell(name) for name in sorted(arms[-1]["files"]))
    verdict = content["verdict"]
    findings = [f"{found['level']}: {found['text']}" for found in verdict["findings"]]
    heads = ["log", "seed", "end", "steps", "time (s)", content["rules"]["metric"], "peak MiB"]
    parts = [
        f"# {track}: {content['name']} ({content['date']})",
        "\n".join(result_lines(content)),
        "\n".join(beside_previous(content, cell)),
        table(names, rows, content["rules"]["metric"], markdown=True),
        f"## Verdict: {verdict['outcome']}",
        "\n".join(f"- {reason['state']}: {cell(reason['text'])}" for reason in verdict["reasons"]),
        *(["Findings:", "\n".join(f"- {cell(line)}" for line in findings)] if findings else []),
        "## Runs",
        grid(heads, run_rows(content), range(1, 7)),
        "Every attempt that left a log. `end` is what the ledger says; only whole runs are averaged.",
        "## Evidence",
        "\n".join(facts(content)),
        f"What ran: {files}, equal to the source in every log of {cell(arms[-1]['name'])}."
        + (BASELINE_SOURCE if len(arms) > 1 else ""),
        f"This page and `{RESULT}` are made from `logs/`; the check makes them again:",
        f"```bash\npython compare_runs.py verify records/{track}/{content['date']}_{content['name']}\n```",
    ]
    return "\n\n".join(parts) + "\n"


# 3. a track's page ----------------------------------------------------------------------------------------


def machine_letters(records: Sequence[Record]) -> dict[str, str]:
    """A short name for each machine, in the order in which they appear: M1, M2, ..."""
    return {machine: f"M{i}" for i, machine in enumerate(dict.fromkeys(r.machine["id"] for r in records), 1)}


def history(records: Sequence[Record]) -> list[dict]:
    """The numbers of the table and the plot, one row a record."""
    letters, rows = machine_letters(records), []
    for record in records:
        stats, gain = record.own.stats, record.gain
        rows.append(
            {
                "record": record.id,
                "finished": record.finished.astimezone(UTC).isoformat(),
                "claim": record.claim,
                "n": stats["runs"],
                "time_mean": stats["time_mean"],
                "time_sd": stats["time_sd"],
                "loss_mean": stats["loss_mean"],
                "loss_sd": stats["loss_sd"],
                "p": stats["loss_p"],
                "gain": gain
                and {key: gain[key] for key in ("of", "amount", "relative", "low", "high", "level")},
                "base_mean": gain
                and record.baseline.stats["time_mean" if gain["of"] == "time" else "loss_mean"],
                "machine": letters[record.machine["id"]],
                "hardware": record.machine["hardware"],
            }
        )
    return rows


def track_page(track: Track, records: Sequence[Record]) -> str:
    """README.md of a track."""
    goal = "at most" if track.direction == "lower" else "at least"
    rows = [
        [
            row["record"].partition("_")[0],
            f"[{row['record'].partition('_')[2]}]({row['record']}/{README})",
            row["claim"],
            f"{row['time_mean']:.4f}",
            f"{row['time_sd']:.4f}",
            str(row["n"]),
            f"{row['loss_mean']:.4f}",
            f"{row['loss_sd']:.4f}",
            probability(row["p"]),
            gain_text(row["gain"], cell),
            cell(f"{row['machine']}: {row['hardware']}"),
        ]
        for row in history(records)
    ]
    heads = ["date", "record", "claim", "Time \u03bc", "Time \u03c3", "Runs", f"{track.metric} \u03bc"]
    heads += [f"{track.metric} \u03c3", "p", "gain over its own baseline arm", "machine"]
    rules = (
        f"{track.metric} of {goal} {track.target:g}, level {track.alpha:g}, at least {track.min_runs} runs "
        f"of each arm, margin {track.margin:g}, time test {track.time_test}, loss test {track.loss_test}; "
        "all rules: [track.toml](track.toml)."
    )
    across = (
        "Compare times of one machine (M1, M2, ...) alone; across machines the gain over the arm that ran in "
        "turn with the record is what stands."
    )
    if track.is_score:
        across = f"The budget is fixed, so {cell(track.metric)} decides."
    parts = [
        f"# Track {track.name}: {cell(track.title)}",
        rules,
        grid(heads, rows, range(3, 9)),
        f"Times in seconds. p: one-sample t-test against the target. {across}",
        f"![Records of track {track.name} over time]({PLOT})",
        "Made by `python compare_runs.py accept`; `verify` checks it.",
    ]
    return "\n\n".join(parts) + "\n"


# 4. the plot ----------------------------------------------------------------------------------------------


def draw(figure, rows: Sequence[dict], title: str, metric: str | None) -> None:
    """Times, or the metric, by machine above, gains over the own arm below, by the end of the last run."""
    from datetime import datetime, timedelta

    from matplotlib.dates import AutoDateLocator, ConciseDateFormatter

    tops, gains = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    mean, sd = ("loss_mean", "loss_sd") if metric else ("time_mean", "time_sd")
    for i, machine in enumerate(dict.fromkeys(row["machine"] for row in rows)):
        own, bars = [row for row in rows if row["machine"] == machine], {"capsize": 3, "ms": 4, "lw": 1}
        means, sds = ([row[key] for row in own] for key in (mean, sd))
        label, colour = f"{machine}: {own[0]['hardware']}".replace("$", r"\$"), f"C{i % 10}"
        ends = [datetime.fromisoformat(row["finished"]) for row in own]
        tops.errorbar(ends, means, yerr=sds, fmt="o-", color=colour, label=label, **bars)
        for end, row in zip(ends, own, strict=True):
            name = row["record"].partition("_")[2]
            tops.annotate(name, (end, row[mean]), (6, 3), textcoords="offset points", fontsize=7)
            if gain := row["gain"]:
                scale = 100 / abs(row["base_mean"])
                below, above = gain["amount"] - gain["low"], gain["high"] - gain["amount"]
                error = [[scale * below], [scale * above]]
                gains.errorbar([end], [100 * gain["relative"]], yerr=error, fmt="o", color=colour, **bars)
    every = [datetime.fromisoformat(row["finished"]) for row in rows]
    margin = max(timedelta(days=1), 0.08 * (max(every) - min(every)))
    tops.set_xlim(min(every) - margin, max(every) + margin)
    for axes, text in (
        (tops, f"{metric or 'time (s)'}, sd"),
        (gains, "gain over its baseline\narm (%), interval"),
    ):
        axes.set_ylabel(text)
        axes.grid(alpha=0.3)
        axes.ticklabel_format(axis="y", useOffset=False)
    tops.margins(y=0.15)
    tops.set_title(title.replace("$", r"\$"), fontsize=10)
    tops.legend(fontsize=8)
    gains.axhline(0, color="black", lw=1)
    locator = AutoDateLocator()
    gains.xaxis.set_major_locator(locator)
    gains.xaxis.set_major_formatter(ConciseDateFormatter(locator))


def plot(track: Track, records: Sequence[Record]) -> bytes:
    """The track's SVG: the same records give the same bytes under one version of matplotlib.

    A comment at its end holds what is drawn, and the version, for a check under another one.
    """
    import io

    import matplotlib
    from matplotlib.figure import Figure

    rows, image = history(records), io.BytesIO()
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # the settings of whoever runs it do not show
        matplotlib.rcParams |= {"svg.hashsalt": PLOT_FORMAT, "svg.fonttype": "none"}
        figure = Figure(figsize=(8, 6), layout="constrained")
        draw(figure, rows, f"{track.name}: {track.title}", track.metric if track.is_score else None)
        figure.savefig(image, format="svg", metadata={"Date": None, "Creator": None})
    data = json.dumps({"matplotlib": matplotlib.__version__, "rows": rows}, allow_nan=False)
    comment = f"<!-- {PLOT_FORMAT} {data.replace('--', '-' + chr(92) + 'u002d')} -->\n"
    return image.getvalue() + comment.encode()


def plot_data(svg: bytes) -> tuple[str, list] | None:
    """(matplotlib's version, rows) of a track's SVG; None if it holds none."""
    found = PLOT_DATA.search(svg)
    try:
        data = json.loads(found[1]) if found else None
        return str(data["matplotlib"]), list(data["rows"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
