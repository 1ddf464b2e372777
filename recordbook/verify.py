"""Is a record what its logs say? Everything is made again from the logs alone and compared.

    python compare_runs.py verify                        every record of every track, tables and plots
    python compare_runs.py verify records/tiny           one track
    python compare_runs.py verify records/tiny/2026-...  one record

Of a record: no file is missing or there in excess, each has the hash of MANIFEST.sha256; plan, ledger and
logs are one account (evidence.py); the trainer is the source in every log; the verdict, by the track's rules
of today, is still ACCEPT; every number, sentence and curve of result.json and README.md is the same; no other
record rests on its runs. Of a track: table and plot are those of its records.

Numbers may differ by 1e-9 in relation, which is what other processors and versions of scipy leave open, and
everything that is printed is rounded far above that; texts must be equal. The plot must have the same bytes
under the version of matplotlib that drew it, else the same data, which it holds.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compare_runs import InputError, Parser, printable, replace_file
from recordbook import evidence, pages, verdict
from recordbook.book import (
    MADE,
    MANIFEST,
    README,
    RESULT,
    Record,
    in_order,
    read_record,
    record_folders,
    records_of,
)
from recordbook.result import OWN_FILES, Judged, contents, generated, judge, previous_of
from recordbook.tracks import FILE, RECORDS, Track, load_track, track_names

TOLERANCE = 1e-9  # relative, of numbers that another machine or version computes
SHOWN = 8  # differences of one file
MANIFEST_LINE = re.compile(r"([0-9a-f]{64})  (\S[^\n]*)")
REWRITE = "compare_runs.py verify --write makes it again"

# 1. one record --------------------------------------------------------------------------------------------


@dataclass
class Check:
    """What is wrong with a record. `made`: its generated files as they should be, if the evidence stands."""

    evidence: list[str] = field(default_factory=list)
    generated: list[str] = field(default_factory=list)
    made: dict[str, bytes] | None = None

    @property
    def faults(self) -> list[str]:
        return [*self.evidence, *self.generated]


def stated_hashes(text: str, check: Check) -> dict[str, str]:
    """{file: hash} of a manifest."""
    stated: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), 1):
        match = MANIFEST_LINE.fullmatch(line)
        if match and match[2] not in stated:
            stated[match[2]] = match[1]
        else:
            shown = printable(line)[:80]
            check.evidence.append(
                f"{MANIFEST}, line {number}: {shown!r} is no hash and name, or a second one"
            )
    return stated


def check_manifest(files: dict[str, Path], check: Check) -> None:
    """Files without the stated hash, missing ones, those that the manifest does not name."""
    if MANIFEST not in files:
        check.evidence.append(f"{MANIFEST} is missing")
        return
    stated = stated_hashes(evidence.read_bytes(files[MANIFEST]).decode("utf-8", "replace"), check)
    for name in sorted(stated.keys() | files.keys() - {MANIFEST}):  # a stated name is not opened for that
        faults = check.generated if name in (RESULT, README) else check.evidence
        if name not in files:
            faults.append(f"{printable(name)[:200]} is missing, {MANIFEST} names it")
        elif name not in stated:
            faults.append(f"{name} is not in {MANIFEST}")
        elif hashlib.sha256(evidence.read_bytes(files[name])).hexdigest() != stated[name]:
            faults.append(f"{name} does not have the hash that {MANIFEST} states")


def source_faults(judged: Judged, files: dict[str, Path]) -> Iterator[str]:
    """The stored trainer is the source in the logs of its arm."""
    arm = judged.arms[-1].name
    for source in judged.sources:
        if source.name not in files:
            yield f"{source.name} is missing: it is a source of {arm}"
        elif evidence.read_bytes(files[source.name]) != source.text:
            yield f"{source.name} is not the source in the logs of {arm}"


def excess(judged: Judged, held: dict[str, bytes], files: dict[str, Path]) -> Iterator[str]:
    """Files that are no part of a record."""
    stored = evidence.record_names(held)
    known = {*stored.values(), *OWN_FILES, *(source.name for source in judged.sources)}
    for name in sorted(files.keys() - known):
        yield f"{name} is no part of a record"


def is_near(stated: Any, made: Any) -> bool:
    """Equal, or numbers within the tolerance."""
    numbers = [isinstance(x, int | float) and not isinstance(x, bool) for x in (stated, made)]
    if all(numbers):
        return math.isclose(stated, made, rel_tol=TOLERANCE, abs_tol=1e-15)
    return type(stated) is type(made) and stated == made


def differences(stated: Any, made: Any, where: str = "") -> Iterator[str]:
    """The places in which two JSON values differ."""
    if isinstance(stated, dict) and isinstance(made, dict):
        for key in sorted(stated.keys() | made.keys()):
            place = f"{where}.{key}".lstrip(".")
            if key not in stated or key not in made:
                yield f"{place} is {'missing' if key in made else 'unknown'}"
            else:
                yield from differences(stated[key], made[key], place)
    elif isinstance(stated, list) and isinstance(made, list) and len(stated) == len(made):
        for i, pair in enumerate(zip(stated, made, strict=True)):
            yield from differences(*pair, f"{where}[{i}]")
    elif not is_near(stated, made):
        yield f"{where} is {repr(stated)[:60]}, must be {repr(made)[:60]}"


def result_faults(stated: dict, made: dict) -> list[str]:
    """Where result.json says something else than the logs and the rules; not what computed it."""
    found = list(differences(stated | {"made_with": None}, made | {"made_with": None}))
    shown = [f"{RESULT}: {printable(fault)}" for fault in found[:SHOWN]]
    return shown + [f"{RESULT}: {len(found) - SHOWN} more differences"] * (len(found) > SHOWN)


def page_faults(stated: bytes, made: bytes, name: str) -> Iterator[str]:
    """The first line of a page that is another one."""
    if stated == made:
        return
    ours, theirs = (text.decode("utf-8", "replace").splitlines() for text in (made, stated))
    for number in range(max(len(ours), len(theirs))):
        pair = [lines[number] if number < len(lines) else "(no line)" for lines in (theirs, ours)]
        if pair[0] != pair[1]:
            at = next((i for i, (a, b) in enumerate(zip(*pair, strict=False)) if a != b), min(map(len, pair)))
            is_, wanted = (printable(line[max(0, at - 30) : at + 40]) for line in pair)
            yield f"{name}, line {number + 1}: {is_!r}, must be {wanted!r}; {REWRITE}"
            return
    yield f"{name}: other ends of lines than it was written with; {REWRITE}"


def other_faults(record: Record, others: Sequence[Record]) -> Iterator[str]:
    """What a record has in common with others of its track."""
    own = {run["sha256"] for run in record.own.runs}
    for other in others:
        if own & {run["sha256"] for run in other.own.runs}:
            yield f"rests on the same logs as {other.id}"
        if record.content["previous"] is other.content["previous"] is None:
            yield f"claims to be the first record of the track, as {other.id} does"


def examine(folder: Path, track: Track, records: Sequence[Record]) -> Check:
    """Every check of one record. `records`: those of the track that can be read."""
    check = Check()
    try:
        if folder.is_symlink():
            raise InputError("is a link; a record is a folder")
        files = evidence.listed(folder)
        evidence.check_size(files)
        check_manifest(files, check)
        record = read_record(folder)
        held = evidence.of_record(files)
        with tempfile.TemporaryDirectory() as place:
            evidence.write_series(held, Path(place))
            try:
                compare(check, record, files, held, Path(place), track, records)
            except InputError as error:
                raise InputError(str(error).replace(f"{place}{os.sep}", "")) from None
    except InputError as error:
        check.evidence.append(str(error))
    except OSError as error:
        check.evidence.append(f"{printable(str(error.filename))}: cannot be read ({error.strerror})")
    if check.evidence:
        check.made = None
    return check


def compare(
    check: Check,
    record: Record,
    files: dict[str, Path],
    held: dict[str, bytes],
    place: Path,  # the evidence laid out as a series
    track: Track,
    records: Sequence[Record],
) -> None:
    """Judge the series again, and compare what comes of it with what is stored."""
    judged = judge(held, place, track, record.claim)
    if record.track != track.name:
        check.evidence.append(f"is a record of track {printable(record.track)}, not of {track.name}")
    check.evidence += [*source_faults(judged, files), *excess(judged, held, files)]
    if judged.verdict.outcome != verdict.ACCEPT:
        why = [printable(reason.text) for reason in judged.verdict.reasons if reason.state != verdict.PASS]
        check.evidence.append(f"the verdict is {judged.verdict.outcome}: {'; '.join(why)}")
        return
    others = [other for other in records if other.id != record.id]
    check.evidence += other_faults(record, others)
    made = contents(judged, place, track, record.claim, record.name)
    stated, before = record.content["previous"], None
    if stated is not None:
        before = next((other for other in others if other.id == stated["record"]), None)
        if before is None:
            check.evidence.append(f"stands beside {printable(stated['record'])}, which is not in the track")
    source = made["arms"][0]["source"] if len(made["arms"]) > 1 else None
    made["previous"] = previous_of(before, made["machine"], source)
    stored = {name: evidence.read_bytes(path) for name, path in files.items() if name not in MADE}
    check.made = generated(made, stored)
    check.generated += result_faults(record.content, made)
    if README not in files:
        check.generated.append(f"{README} is missing; {REWRITE}")
    else:
        check.generated += page_faults(evidence.read_bytes(files[README]), check.made[README], README)


# 2. one track -----------------------------------------------------------------------------------------------


def track_files(track: Track, records: Sequence[Record]) -> dict[str, bytes]:
    """The generated files of a track; none without records."""
    if not records:
        return {}
    return {README: pages.track_page(track, records).encode(), pages.PLOT: pages.plot(track, records)}


def plot_faults(stated: bytes, made: bytes) -> Iterator[str]:
    """Is the plot that of the records?"""
    theirs, ours = pages.plot_data(stated), pages.plot_data(made)
    if theirs is None or theirs[1] != ours[1]:
        yield f"{pages.PLOT} does not hold the numbers of the records; {REWRITE}"
    elif theirs[0] == ours[0] and stated != made:
        yield f"{pages.PLOT} is not what matplotlib {ours[0]} draws of its numbers; {REWRITE}"


def track_faults(folder: Path, track: Track, records: Sequence[Record]) -> list[str]:
    """What is wrong with the table, the plot and other files of a track's folder."""
    made, found = track_files(track, records), []
    for name in (README, pages.PLOT):
        path = folder / name
        if path.is_symlink() or (path.exists() and not path.is_file()):
            found.append(f"{name} is not a plain file; replace it")
        elif path.exists() and name not in made:
            found.append(f"{name} is there without a record; remove it")
        elif name in made and not path.exists():
            found.append(f"{name} is missing; {REWRITE}")
        elif name in made:
            text = evidence.read_bytes(path)
            found += (
                plot_faults(text, made[name]) if name == pages.PLOT else page_faults(text, made[name], name)
            )
    known = {FILE, README, pages.PLOT}
    strays = [path.name for path in folder.iterdir() if not path.is_dir() and path.name not in known]
    return found + [f"{printable(name)} is no part of a track" for name in sorted(strays)]


def write_track(track: Track, records: Path) -> list[Path]:
    """Write the pages of a track anew; returns the files that changed."""
    changed = []
    for name, data in track_files(track, records_of(track.name, records)).items():
        path = records / track.name / name
        if not path.is_file() or path.is_symlink() or path.read_bytes() != data:
            replace_file(str(path), lambda temporary, data=data: Path(temporary).write_bytes(data))
            changed.append(path)
    return changed


# 3. the book ------------------------------------------------------------------------------------------------


def readable(folders: Sequence[Path]) -> list[Record]:
    """The records among folders; what cannot be read is reported where it is examined."""
    found = []
    for folder in folders:
        try:
            found.append(read_record(folder))
        except InputError:
            continue
    return in_order(found)


def told(name: str, faults: Sequence[str], well: str = "ok") -> list[str]:
    """'name: ok', or each thing that is wrong on a line of its own."""
    return [f"{name}: {fault}" for fault in faults] or [f"{name}: {well}"]


def verify_record(
    folder: Path, track: Track, records: Sequence[Record], write: bool
) -> tuple[list[str], bool]:
    """(lines, is all well) of one record, whose generated files are made again if asked for."""
    if sys.stderr.isatty():
        print(f"verifying {printable(folder.name)}", file=sys.stderr)
    check, name = examine(folder, track, records), f"{track.name}/{printable(folder.name)}"
    if write and check.made and check.generated:
        for file, data in check.made.items():
            replace_file(str(folder / file), lambda temporary, data=data: Path(temporary).write_bytes(data))
        return [f"{name}: written anew: {fault}" for fault in check.generated], True
    return told(name, check.faults), not check.faults


def verify_track(folder: Path, only: Path | None, write: bool) -> tuple[list[str], bool]:
    """(lines, is all well) of a track, or of one of its records."""
    track = load_track(folder / FILE)
    folders, lines, well = record_folders(track.name, folder.parent), [], True
    records = readable(folders)
    order = {record.folder.name: i for i, record in enumerate(records)}  # a record is told before later ones
    for place in [only] if only else sorted(folders, key=lambda path: order.get(path.name, -1)):
        found, good = verify_record(place, track, readable(folders) if write else records, write)
        lines, well = [*lines, *found], well and good
    if only is not None:
        return lines, well
    if not well:
        return [
            *lines,
            f"{track.name}: table and plot not checked, they are made of the records above",
        ], False
    if write:
        lines += [f"{track.name}: written anew: {path.name}" for path in write_track(track, folder.parent)]
    if faults := track_faults(folder, track, readable(folders)):
        return [*lines, *told(track.name, faults)], False
    return lines + told(track.name, [], "table and plot ok") * bool(folders), True


def places(args: Sequence[str], records: Path) -> Iterator[tuple[Path, Path | None]]:
    """(track's folder, one record or None for all) of the arguments."""
    if not records.is_dir():
        raise InputError(
            f"--records {printable(str(records))}: no such folder; name the folder of the tracks"
        )
    for name in [] if args else track_names(records):
        yield records / name, None
    for arg in args:
        path = Path(os.path.abspath(arg))
        if (path / FILE).is_file():
            yield path, None
        elif path.is_dir() and (path.parent / FILE).is_file():
            yield path.parent, path
        else:
            raise InputError(f"{printable(arg)}: no record and no track; name a folder of records/<track>/")


def command(argv: Sequence[str]) -> tuple[str, int]:
    """`verify [RECORD ...]`: (lines to print, exit code)."""
    parser = Parser(
        prog="compare_runs.py verify",
        description="Recompute records from their logs: hashes, sources, plan, verdict, numbers, pages.",
        epilog="Exit codes: 0 all well, 1 something is wrong, 2 bad input.",
    )
    parser.add_argument(
        "records", metavar="RECORD", nargs="*", help="folders of records or tracks; default: all"
    )
    parser.add_argument(
        "--records", dest="book", default=str(RECORDS), metavar="DIR", help="the book; default: records/"
    )
    held = "make README.md, result.json, hashes and the track's pages again where the evidence stands"
    parser.add_argument("--write", action="store_true", help=held)
    args = parser.parse_args(argv)
    lines, well = [], True
    for folder, only in list(places(args.records, Path(args.book))):
        found, good = verify_track(folder, only, args.write)
        lines, well = [*lines, *found], well and good
    return "\n".join(lines or ["There is no record yet, so there is nothing to verify."]), 0 if well else 1
