"""Accepting a record: judge a series by a track's rules, and write its folder if they accept it.

The folder is built beside its place, verified there as verify.py would, and renamed: a record is there whole,
or not at all. Nothing is written on REJECT and INCONCLUSIVE.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from compare_runs import InputError, Parser, finding_line, printable, some
from recordbook import evidence, pages, verdict, verify
from recordbook.book import BASELINE, Record, records_of
from recordbook.result import Judged, contents, generated, judge, previous_of
from recordbook.tracks import CLAIMS, RECORDS, Track, find_track

NAME = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
LONGEST_NAME = 60

# 1. accepting ---------------------------------------------------------------------------------------------


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


def check_new(judged: Judged, name: str, earlier: Sequence[Record]) -> None:
    """Refuse a name that a record has, and runs that a record already rests on."""
    if taken := [record.id for record in earlier if record.name == name]:
        raise InputError(f"--name: record {taken[0]} has that name; choose another")
    digests = {run.digest: run.name for run in judged.arms[-1].runs}
    for record in earlier:
        if used := [digests[run["sha256"]] for run in record.own.runs if run["sha256"] in digests]:
            what = f"{printable(some(used))}: record {record.id} rests on the same logs"
            raise InputError(f"{what}; a run counts once, make new ones")


def shown(judged: Judged, track: Track, claim: str) -> list[str]:
    """The verdict with its reasons, as compare_runs.py prints it."""
    found = judged.verdict
    lines = [f"Verdict on {found.candidate}: {found.line}"]
    lines.append(f"  ({verdict.described(track, claim, found.alpha)})")
    lines += [f"  {reason.state}: {reason.text}" for reason in found.reasons]
    return [printable(line) for line in [*lines, *(f"  {finding_line(f)}" for f in found.findings)]]


@dataclass(frozen=True)
class Proposal:
    """What accept was asked for."""

    series: Path
    track: Track
    name: str
    claim: str
    records: Path
    submission: Path | None = None  # where the 16 MB contest's own folder goes


def propose(proposal: Proposal) -> tuple[list[str], int]:
    """(what to print, exit code) of a proposal; writes the record and the track's pages on ACCEPT alone."""
    track, claim = proposal.track, proposal.claim
    earlier = records_of(track.name, proposal.records)
    files = evidence.of_series(proposal.series)
    judged = judge(files, proposal.series, track, claim)
    check_new(judged, proposal.name, earlier)
    lines = shown(judged, track, claim)
    if judged.verdict.outcome != verdict.ACCEPT:
        return [*lines, "Nothing was written."], 1 if judged.verdict.outcome == verdict.REJECT else 4
    content = contents(judged, proposal.series, track, claim, proposal.name)
    base = content["arms"][0]["source"] if claim != BASELINE else None
    content["previous"] = previous_of(earlier[-1] if earlier else None, content["machine"], base)
    if proposal.submission:
        submit(judged, proposal)
    stored = evidence.as_record(files) | {source.name: source.text for source in judged.sources}
    target = proposal.records / track.name / f"{content['date']}_{proposal.name}"
    try:
        build(target, stored | generated(content, stored), track, earlier)
    except BaseException:  # the folder is the contest's if the record is, and was not there before
        if proposal.submission:
            shutil.rmtree(proposal.submission, ignore_errors=True)
        raise
    written = [f"Accepted: {target}"] + [f"Written: {proposal.submission}"] * bool(proposal.submission)
    written += [f"Refreshed: {path}" for path in verify.write_track(track, proposal.records)]
    return [*lines, *map(printable, written), *pages.beside_previous(content)], 0


def submit(judged: Judged, proposal: Proposal) -> None:
    """The folder that the 16 MB contest asks for, of the runs that count; each has its own beside its log."""
    from golf.submit import write_submission

    runs = [Path(run.path).with_suffix("") for run in judged.arms[-1].counted]
    write_submission(runs, proposal.submission, name=proposal.name)


def build(target: Path, files: dict[str, bytes], track: Track, earlier: Sequence[Record]) -> None:
    """Write a record's folder under a temporary name, verify it there, and rename it."""
    temporary = target.parent / f".{os.getpid()}.tmp"
    folder = temporary / target.name
    try:
        for name, data in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)
        if wrong := verify.examine(folder, track, earlier).faults:
            raise InputError(f"{target.name}: would not verify: {'; '.join(wrong)}; nothing was written")
        os.rename(folder, target)  # fails where a record is
    except OSError as error:
        where = printable(str(target))
        raise InputError(f"{where}: cannot be written ({error.strerror}); check what is there") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


# 2. command line ------------------------------------------------------------------------------------------

NOTES = """SERIES is a folder that run.sh made: of two arms (bash run.sh ab A.py B.py N), A being the
baseline, or of one trainer (bash run.sh N), which only the claim `baseline` fits: a first record.
On ACCEPT it writes RECORDS/TRACK/<date of the last run>_NAME/ and refreshes the track's README.md and plot.
On REJECT and INCONCLUSIVE it prints the reasons and writes nothing.
Exit codes: 0 accepted, 1 REJECT, 4 INCONCLUSIVE, 2 bad input, or plan, ledger and logs that disagree."""


def command(argv: Sequence[str]) -> tuple[str, int]:
    """`accept SERIES --track T --name N --claim C`."""
    parser = Parser(
        prog="compare_runs.py accept",
        description="Judge a series by a track's rules, and write the record if they accept it.",
        epilog=NOTES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("series", metavar="SERIES", help="the folder with plan.json and ledger.jsonl")
    parser.add_argument("--track", required=True, metavar="TRACK", help="a folder of records/")
    parser.add_argument(
        "--name", required=True, metavar="NAME", help="of the record: small letters, digits, '-'"
    )
    parser.add_argument("--claim", choices=(*CLAIMS, BASELINE), help="what is claimed")
    parser.add_argument("--records", default=str(RECORDS), metavar="DIR", help="the book; default: records/")
    contest = "also write the 16 MB contest's own folder there, of runs of golf/train_golf.py"
    parser.add_argument("--submission", type=Path, metavar="DIR", help=contest)
    args = parser.parse_args(argv)
    check_name(args.name)
    if args.submission and args.submission.exists():
        raise InputError(f"--submission {printable(str(args.submission))}: is there; name a new folder")
    track = find_track(args.track, args.records)
    claim = check_claim(args.claim, track, records_of(track.name, args.records))
    if not os.path.isdir(args.series):
        raise InputError(f"{printable(args.series)}: no such folder; name the folder of a series")
    where = Path(args.series), track, args.name, claim, Path(args.records), args.submission
    lines, code = propose(Proposal(*where))
    return "\n".join(lines), code
