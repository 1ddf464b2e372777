"""The record book: what an accepted record says, reading it, and accepting one.

A record is a folder `records/<track>/<date>_<name>/`; all that is in it but the evidence is made here and in
pages.py from the evidence and the track's rules, by the same functions when it is accepted and when it is
verified. `result.json` (format splits.record/1) holds everything a page about a record needs:

    for record in records_of("tiny"):            # oldest first, each checked for its shape
        print(record.name, record.own.stats["time_mean"], record.gain)

Order of this file: format, reading, contents, the verdict on a first record, accepting, command line.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from compare_runs import (
    Arm,
    InputError,
    Parser,
    Run,
    finding_line,
    load_arm,
    make_row,
    printable,
    refusals,
    sample_sd,
    some,
)
from recordbook import evidence, verdict
from recordbook.evidence import MAYBE_NUMBER, MAYBE_TEXT, NUMBER, Account
from recordbook.integrity import failed_runs, find, lost_failures
from recordbook.sources import Source, check_whole, sources_of
from recordbook.tracks import CLAIMS, RECORDS, Track, find_track
from recordbook.verdict import Case, Reason, Verdict

FORMAT = "splits.record/1"
RESULT, README, MANIFEST = "result.json", "README.md", "MANIFEST.sha256"
OWN_FILES = (RESULT, README, MANIFEST, *evidence.TOP)  # names that no source of a record may have
BASELINE = (
    "baseline"  # the claim of a track's first record: it reaches the target, and is faster than nothing
)
NAME = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
FOLDER = re.compile(r"(\d{4}-\d{2}-\d{2})_([a-z0-9]+(?:-[a-z0-9]+)*)")
LONGEST_NAME = 60

# 1. format ------------------------------------------------------------------------------------------------

# Of one run. `log`: its path in the series; `status`: what its log says (complete, diverged, ...); `ended`:
# what the ledger says; `sha256`: of the unpacked log; `metrics`: the numbers of its last validation.
RUN = {
    "log": str,
    "sha256": str,
    "seed": (int, type(None)),
    "status": str,
    "reason": str,
    "ended": str,
    "counted": bool,
    "started": MAYBE_TEXT,
    "steps": (int, type(None)),
    "seconds": MAYBE_NUMBER,
    "metric": MAYBE_NUMBER,
    "metrics": dict,
    "peak_mib": (int, type(None)),
    "hardware": MAYBE_TEXT,
}
# `stats` are those of compare_runs.Row; times in seconds, loss is the track's metric.
STATS = {
    "runs": int,
    "time_mean": NUMBER,
    "time_sd": NUMBER,
    "time_diff": NUMBER,
    "loss_mean": NUMBER,
    "loss_sd": NUMBER,
    "loss_diff": NUMBER,
    "loss_p": MAYBE_NUMBER,
}
ARM = {"name": str, "role": str, "source": str, "files": dict, "runs": [RUN], "failed": int, "stats": STATS}
REASON = {"about": str, "state": str, "text": str, "p": MAYBE_NUMBER}
FINDING = {"code": str, "level": str, "text": str, "files": [str]}
# `id` is what tells machines apart: the UUIDs of the GPUs, or the host's name without any.
MACHINE = {"id": str, "host": MAYBE_TEXT, "hardware": str, "driver": MAYBE_TEXT, "data": MAYBE_TEXT}
# Of the candidate over its own baseline arm: seconds saved, the two-sided interval of that at `level`.
GAIN = {
    "seconds": NUMBER,
    "relative": NUMBER,
    "low": NUMBER,
    "high": NUMBER,
    "level": NUMBER,
    "p": NUMBER,
    "test": str,
}
# The newest record when this one was accepted; `comparable`: '' if the times can be compared, else why not.
PREVIOUS = {
    "record": str,
    "time_mean": NUMBER,
    "loss_mean": NUMBER,
    "comparable": str,
    "is_baseline_arm": bool,
}
SHAPE = {
    "format": str,
    "track": str,
    "name": str,
    "date": str,
    "claim": str,
    "made_with": dict,  # versions of the libraries that computed it
    "rules": {"metric": str, "direction": str, "target": NUMBER, "alpha": NUMBER, "min_runs": int},
    "plan": {"sha256": str, "kind": str, "made": str, "rule": str, "runs": int},
    "machine": MACHINE,
    "versions": {"python": MAYBE_TEXT, "torch": MAYBE_TEXT, "cuda": MAYBE_TEXT, "triton": MAYBE_TEXT},
    "verdict": {"outcome": str, "p": NUMBER, "alpha": NUMBER, "reasons": [REASON], "findings": [FINDING]},
    "arms": [ARM],  # the baseline, then the candidate; the candidate alone if the claim is `baseline`
    "tests": dict,  # every statistic of recordbook/verdict.py by name; a sentence where one does not exist
    "curves": [{"arm": str, "log": str, "points": [list]}],  # [step, seconds, val_loss] of every validation
}
CHOICES = {"gain": GAIN, "previous": PREVIOUS}  # null where there is none


def unlike(content: Any) -> str:
    """What is wrong with the shape of a result; '' if nothing is."""
    if wrong := evidence.misfit(content, SHAPE):
        return wrong
    if content["format"] != FORMAT:
        return f"format {printable(content['format'])!r}, must be {FORMAT}"
    for key, shape in CHOICES.items():
        if key not in content:
            return f"{key} is missing"
        if content[key] is not None and (wrong := evidence.misfit(content[key], shape, key)):
            return wrong
    if (
        not FOLDER.fullmatch(f"{content['date']}_{content['name']}")
        or evidence.moment(f"{content['date']}T00Z") is None
    ):
        return f"date {printable(content['date'])!r} or name {printable(content['name'])!r} is none"
    roles = [arm["role"] for arm in content["arms"]]
    if roles != (["candidate"] if content["claim"] == BASELINE else ["baseline", "candidate"]):
        return (
            f"arms have the roles {printable(some(roles)) or 'of nobody'}, which is not a claim of its kind"
        )
    if content["claim"] not in (BASELINE, *CLAIMS):
        return f"claim {printable(content['claim'])!r} is unknown"
    for curve in content["curves"]:
        for point in curve["points"]:
            if len(point) != 3 or evidence.misfit(point, [MAYBE_NUMBER]):
                return f"a point of the curve of {printable(curve['log'])} is not [step, seconds, loss]"
    return ""


# 2. reading -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Record:
    """An accepted record. `content` is its result.json, which has the shape above."""

    folder: Path
    content: dict

    @property
    def id(self) -> str:
        """The folder's name, <date>_<name>."""
        return f"{self.date}_{self.name}"

    @property
    def track(self) -> str:
        return self.content["track"]

    @property
    def name(self) -> str:
        return self.content["name"]

    @property
    def date(self) -> str:
        """The day of the last run, YYYY-MM-DD."""
        return self.content["date"]

    @property
    def claim(self) -> str:
        return self.content["claim"]

    @cached_property
    def arms(self) -> list[SimpleNamespace]:
        """The arms, with the keys of ARM as attributes."""
        return [SimpleNamespace(**arm) for arm in self.content["arms"]]

    @property
    def own(self) -> SimpleNamespace:
        """The arm that the record is about."""
        return self.arms[-1]

    @property
    def baseline(self) -> SimpleNamespace | None:
        """The arm that it was compared with, on the same machine at the same time; None for a first record."""
        return self.arms[0] if len(self.arms) > 1 else None

    @property
    def gain(self) -> dict | None:
        """Seconds saved against its own baseline arm, with interval and test (GAIN); None for a first record."""
        return self.content["gain"]

    @property
    def machine(self) -> dict:
        return self.content["machine"]


def read_record(folder: str | Path) -> Record:
    """The record of a folder; InputError if its result.json is malformed. verify.py checks that it is true."""
    path = Path(folder, RESULT)
    if path.is_symlink() or not path.is_file():
        raise InputError(
            f"{printable(str(path))}: no such file, so {printable(str(folder))} is no record; restore it"
        )
    content, shown = (
        evidence.parse_json(evidence.read_bytes(path), printable(str(path))),
        printable(str(path)),
    )
    if wrong := unlike(content):
        raise InputError(f"{shown}: {wrong}; restore it")
    record = Record(path.parent, content)
    if record.id != os.path.basename(os.path.abspath(folder)):
        raise InputError(f"{shown}: is of {printable(record.id)}, a record's folder is named so; rename it")
    return record


def record_folders(track: str, records: str | Path = RECORDS) -> list[Path]:
    """The folders of a track's records, oldest first; whatever they hold."""
    return sorted(path for path in Path(records, track).iterdir() if path.is_dir() and path.name[0] != ".")


def records_of(track: str, records: str | Path = RECORDS) -> list[Record]:
    """The records of a track, oldest first; InputError on the first that is malformed."""
    return [read_record(folder) for folder in record_folders(track, records)]


# 3. contents ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Judged:
    """A series as the track's rules see it."""

    account: Account
    arms: list[Arm]
    verdict: Verdict
    sources: list[Source]  # of the arm that the record is about


def library_versions() -> dict[str, str]:
    """What computes the numbers."""
    import numpy
    import scipy

    python = ".".join(map(str, sys.version_info[:3]))
    return {"format": FORMAT, "python": python, "numpy": numpy.__version__, "scipy": scipy.__version__}


def one_source(account: Account, files: dict[str, bytes], letter: str) -> list[Source]:
    """The sources in the logs of an arm, which must be the same in every one, and safe to write out."""
    first: list[Source] = []
    for end in account.ends:
        if (
            end["arm"] != letter
            or end["log"] not in files
            or (not end["counted"] and end["status"] != "done")
        ):
            continue
        found = sources_of(files[end["log"]], printable(end["log"]))
        check_whole(found, printable(end["log"]))
        if first and found != first:
            raise InputError(
                f"{printable(end['log'])}: holds other sources than the first log of its arm; look at both"
            )
        first = found
    for source in first:
        if source.name.casefold() in {name.casefold() for name in (*OWN_FILES, evidence.LOGS)}:
            raise InputError(
                f"source {source.name}: a record has a file of that name itself; rename the trainer"
            )
    return first


def judge(files: dict[str, bytes], folder: Path, track: Track, claim: str) -> Judged:
    """The verdict on the series in `folder`, which holds these files. InputError names what bars any record."""
    account = evidence.account_of(files)
    if found := evidence.faults(account, files):
        raise InputError(f"no record: {'; '.join(found)}")
    if (claim == BASELINE) != (account.plan["kind"] == "series"):
        rule = f"a series of one trainer is claimed as {BASELINE}, one of two arms as {' or '.join(track.claims)}"
        raise InputError(f"--claim {claim}: {rule}; change the claim, or run bash run.sh ab A.py B.py N")
    arms = []
    for letter, planned in account.arms.items():
        arm = load_arm(str(folder / account.folder(letter)))
        arm.name, arm.metric, arm.higher = (
            printable(planned["name"]),
            track.metric,
            track.direction == "higher",
        )
        arms.append(arm)
    if claim == BASELINE:
        found = decide_baseline(arms[0], track, account.extended)
    else:
        (found,) = verdict.decide_all(arms, track, claim)
    return Judged(account, arms, found, one_source(account, files, list(account.arms)[-1]))


def machine_of(run: Run) -> dict:
    """What tells machines, and data, apart."""
    head = run.head
    facts = {key: head.get(key) for key in ("host", "driver", "data")}
    return {
        "id": head.get("uuids") or head.get("host") or "unknown",
        "hardware": run.hardware or "unknown",
    } | facts


def run_content(run: Run, arm: Arm, folder: Path, ended: dict[str, str]) -> dict:
    """One run of an arm (RUN)."""
    log = Path(os.path.relpath(run.path, folder)).as_posix()
    log = evidence.stem_of(log) + evidence.LOG_END.search(log)[0].removesuffix(evidence.packing(log))
    return {
        "log": log,
        "sha256": run.digest,
        "seed": run.head.get("seed"),
        "status": run.status,
        "reason": run.reason,
        "ended": ended[log],
        "counted": run.complete,
        "started": run.head.get("started"),
        "steps": run.steps_done,
        "seconds": run.seconds,
        "metric": run.metrics.get(arm.metric),
        "metrics": run.metrics,
        "peak_mib": run.peak_mib,
        "hardware": run.hardware,
    }


def gain_of(judged: Judged, track: Track) -> dict | None:
    """The gain in time (GAIN) by the track's test; None without a baseline arm."""
    if len(judged.arms) < 2:
        return None
    key, title, _ = verdict.TIME_TESTS[track.time_test]
    result = judged.verdict.statistics[key]
    test = getattr(result, "test", result)
    base = make_row(judged.arms[0], judged.arms[0], None).time_mean
    p = next(reason.p for reason in judged.verdict.reasons if reason.about == "time")
    return {
        "seconds": -test.difference,
        "relative": -test.difference / base,
        "low": -test.high,
        "high": -test.low,
        "level": test.level,
        "p": p,
        "test": title,
    }


def previous_of(newest: Record | None, machine: dict, base_source: str | None) -> dict | None:
    """How a record stands beside the newest one of its track (PREVIOUS)."""
    if newest is None:
        return None
    differ = [
        word
        for key, word in (("id", "another machine"), ("data", "other data"))
        if machine[key] != newest.machine[key]
    ]
    stats = newest.own.stats
    return {
        "record": newest.id,
        "time_mean": stats["time_mean"],
        "loss_mean": stats["loss_mean"],
        "comparable": " and ".join(differ),
        "is_baseline_arm": base_source == newest.own.source,
    }


def contents(judged: Judged, folder: Path, track: Track, claim: str, name: str) -> dict:
    """result.json of an accepted series, but for `previous`, which is about other records."""
    account, found, arms = judged.account, judged.verdict, judged.arms
    ended, first = {end["log"]: end["status"] for end in account.ends}, arms[-1].counted[0]
    arm_contents = []
    for arm, letter in zip(arms, account.arms, strict=True):
        planned = account.arms[letter]
        arm_contents.append(
            {
                "name": arm.name,
                "role": "candidate" if arm is arms[-1] else "baseline",
                "source": planned["source"],
                "files": planned["files"],
                "runs": [run_content(run, arm, folder, ended) for run in arm.runs],
                "failed": len(failed_runs(arms, arm)) + lost_failures(arms, arm),
                "stats": vars(make_row(arm, arms[0], track.target)),
            }
        )
    plan, stop = account.plan, account.plan["stop"]["rule"]
    reasons = [{key: getattr(r, key) for key in REASON} for r in found.reasons]
    content = {
        "format": FORMAT,
        "track": track.name,
        "name": name,
        "date": account.date,
        "claim": claim,
        "made_with": library_versions(),
        "rules": {key: getattr(track, key) for key in RULES},
        "plan": {"sha256": account.plan_hash, "kind": plan["kind"], "made": plan["made"]}
        | {"rule": stop, "runs": account.runs, "extended": account.extended},
        "machine": machine_of(first),
        "versions": {key: first.head.get(key) for key in SHAPE["versions"]},
        "verdict": {"outcome": found.outcome, "p": found.p, "alpha": found.alpha, "reasons": reasons}
        | {"findings": [vars(finding) for finding in found.findings]},
        "gain": gain_of(judged, track),
        "arms": arm_contents,
        "tests": found.statistics,
        "curves": [
            {"arm": arm.name, "log": run["log"], "points": [[p.step, p.seconds, p.loss] for p in read.val]}
            for arm, content in zip(arms, arm_contents, strict=True)
            for read, run in zip(arm.runs, content["runs"], strict=True)
        ],
    }
    return verdict.plain(content)


# What of a track decides. Rules of a track that has records do not change: other rules are another track.
RULES = ("metric", "direction", "target", "alpha", "margin", "min_runs", "recipe", "gpus", "hardware")
RULES += ("time_test", "data", "seconds_per_loss", "seconds_per_loss_sd")

# 4. the verdict on a first record -------------------------------------------------------------------------


def decide_baseline(arm: Arm, track: Track, extended: bool) -> Verdict:
    """The verdict on one arm alone: the target is reached, by enough runs, and no finding blocks it.

    A series that grew after its plan could have stopped early, so the always-valid p counts. Failed runs
    are on the wrong side of the target, in a sign test.
    """
    refused = list(refusals([arm], {"target"}))
    findings = find([arm], BASELINE, track, refused)
    n, statistics, reasons = len(arm.counted), {}, []
    if not refused:
        tests = verdict.loss_statistics(arm, arm, track, track.alpha)
        statistics = {key: verdict.or_why(tests[key]) for key in ("loss_target", "loss_always_valid")}
        failed = len(failed_runs([arm], arm)) + lost_failures([arm], arm)
        case = Case(arm, arm, track, track.alpha, statistics, failed, extended)
        reasons = [verdict.target_reason(case), *failed_baseline(case)]
        text = f"runs: {n} complete, the rule is at least {track.min_runs}"
        enough = n >= track.min_runs
        reasons.append(
            Reason("runs", *((verdict.PASS, text) if enough else (verdict.OPEN, text, None, track.min_runs)))
        )
    reasons += verdict.finding_reasons(findings, n, track)
    outcome, more = verdict.outcome_of(reasons, n)
    return Verdict(
        outcome,
        more,
        "",
        arm.name,
        BASELINE,
        track.name,
        track.alpha,
        tuple(reasons),
        tuple(findings),
        statistics,
    )


def failed_baseline(case: Case) -> list[Reason]:
    """The reason that failed runs give."""
    if not case.failed:
        return []
    target = -case.track.target if case.track.direction == "higher" else case.track.target
    new = verdict.oriented(case.new, case.track)
    return [
        verdict.failed_reason(
            case, "failed", "losses: sign test", lambda n: verdict.sign_p(case, new, target, n)
        )
    ]


# 5. accepting ---------------------------------------------------------------------------------------------


def check_name(name: str) -> None:
    """Refuse a record's name that would not be a plain part of a path and of a link."""
    if not NAME.fullmatch(name) or len(name) > LONGEST_NAME:
        rule = f"up to {LONGEST_NAME} small letters and digits, parts joined by '-', such as fused-head"
        raise InputError(f"--name {printable(name)!r}: must be {rule}; choose another")


def check_claim(claim: str | None, track: Track, earlier: Sequence[Record]) -> str:
    """The claim, if the track accepts it now."""
    known = [*track.claims, BASELINE]
    if claim is None:
        raise InputError(
            f"--track {track.name}: accepts several claims; add --claim {' or --claim '.join(known)}"
        )
    if claim not in known:
        raise InputError(f"--claim {claim}: track {track.name} accepts {', '.join(known)}; make that claim")
    if claim == BASELINE and earlier:
        first = earlier[0].id
        raise InputError(
            f"--claim {BASELINE}: is for the first record of a track, there is {first}; compare with it"
        )
    return claim


def check_new(judged: Judged, earlier: Sequence[Record]) -> None:
    """Refuse runs that an accepted record already rests on."""
    digests = {run.digest: run.name for run in judged.arms[-1].runs}
    for record in earlier:
        if used := [digests[run["sha256"]] for run in record.own.runs if run["sha256"] in digests]:
            raise InputError(
                f"{printable(some(used))}: record {record.id} rests on the same logs; a run counts once, make new ones"
            )


def generated(content: dict, stored: dict[str, bytes]) -> dict[str, bytes]:
    """The files of a record that are made from its result: result.json, README.md, MANIFEST.sha256."""
    from recordbook import pages

    made = {RESULT: pages.json_text(content).encode(), README: pages.record_page(content).encode()}
    return made | {MANIFEST: pages.manifest(stored | made).encode()}


def write_files(files: dict[str, bytes], folder: Path) -> None:
    """Write files below a new folder."""
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def refused(judged: Judged, track: Track, claim: str) -> str:
    """The verdict with its reasons, as compare_runs.py prints it."""
    found = judged.verdict
    lines = [f"Verdict on {found.candidate}: {found.line}"]
    lines.append(f"  ({verdict.described(track, claim, found.alpha)})")
    lines += [f"  {reason.state}: {reason.text}" for reason in found.reasons]
    return "\n".join(printable(line) for line in [*lines, *(f"  {finding_line(f)}" for f in found.findings)])


@dataclass(frozen=True)
class Proposal:
    """What accept was asked for."""

    series: Path
    track: Track
    name: str
    claim: str
    records: Path


def accept(proposal: Proposal) -> tuple[str, int]:
    """(what to print, exit code) of a proposal; writes the record and the track's pages on ACCEPT alone."""
    from recordbook import verify

    track, place = proposal.track, proposal.records / proposal.track.name
    earlier = records_of(track.name, proposal.records)
    files = evidence.of_series(proposal.series)
    judged = judge(files, proposal.series, track, proposal.claim)
    check_new(judged, earlier)
    shown = refused(judged, track, proposal.claim)
    if judged.verdict.outcome != verdict.ACCEPT:
        return f"{shown}\nNothing was written.", 1 if judged.verdict.outcome == verdict.REJECT else 4
    content = contents(judged, proposal.series, track, proposal.claim, proposal.name)
    source = content["arms"][0]["source"] if len(content["arms"]) > 1 else None
    content["previous"] = previous_of(earlier[-1] if earlier else None, content["machine"], source)
    target = place / f"{content['date']}_{proposal.name}"
    if taken := [record.id for record in earlier if record.name == proposal.name] or os.path.lexists(target):
        where = taken[0] if isinstance(taken, list) else target.name
        raise InputError(f"--name {proposal.name}: record {where} has that name; choose another")
    stored = evidence.as_record(files) | {source.name: source.text for source in judged.sources}
    temporary = place / f".{os.getpid()}.tmp"
    try:
        write_files(stored | generated(content, stored), temporary / target.name)
        if wrong := verify.record_faults(temporary / target.name, track, earlier):
            raise InputError(
                f"{target.name}: would not verify ({'; '.join(wrong)}); nothing was written, report this"
            )
        os.rename(temporary / target.name, target)
    except OSError as error:
        raise InputError(
            f"{printable(str(target))}: cannot be written ({error.strerror}); check it"
        ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    pages_written = verify.write_track(track, proposal.records)
    written = [f"Accepted: {target}", *(f"Refreshed: {path}" for path in pages_written), *remarks(content)]
    return "\n".join([shown, *map(printable, written)]), 0


def remarks(content: dict) -> list[str]:
    """What a reader of a record must know beside its numbers."""
    from recordbook import pages

    return pages.beside_previous(content)


# 6. command line ------------------------------------------------------------------------------------------

ACCEPT_HELP = """SERIES is a folder that run.sh made: of two arms (bash run.sh ab A.py B.py N), A being the baseline, or of one
trainer (bash run.sh N), which only the claim `baseline` fits, for the first record of a track.
On ACCEPT it writes RECORDS/TRACK/<date of the last run>_NAME/ and refreshes the track's README.md and plot.
On REJECT and INCONCLUSIVE it prints the reasons and writes nothing.
Exit codes: 0 accepted, 1 REJECT, 4 INCONCLUSIVE, 2 bad input, which plan, ledger and logs that disagree are."""


def accept_command(argv: Sequence[str]) -> tuple[str, int]:
    """`accept SERIES --track T --name N --claim C`."""
    import argparse

    parser = Parser(
        prog="compare_runs.py accept",
        description="Judge a series by a track's rules, and write the record if they accept it.",
        epilog=ACCEPT_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("series", metavar="SERIES", help="the folder with plan.json and ledger.jsonl")
    parser.add_argument("--track", required=True, metavar="TRACK", help="a folder of records/")
    parser.add_argument(
        "--name", required=True, metavar="NAME", help="of the record: small letters, digits, '-'"
    )
    parser.add_argument("--claim", choices=(*CLAIMS, BASELINE), help="what is claimed")
    parser.add_argument("--records", default=str(RECORDS), metavar="DIR", help="the book; default: records/")
    args = parser.parse_args(argv)
    check_name(args.name)
    track = find_track(args.track, args.records)
    claim = check_claim(args.claim, track, records_of(track.name, args.records))
    if not os.path.isdir(args.series):
        raise InputError(f"{printable(args.series)}: no such folder; name the folder of a series")
    return accept(Proposal(Path(args.series), track, args.name, claim, Path(args.records)))
