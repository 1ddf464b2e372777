"""The record book: what an accepted record says, and reading it.

A record is a folder `records/<track>/<date>_<name>/`. Its `result.json` (format splits.record/1) holds
everything that a page about it needs, so that no log is read again:

    for record in records_of("tiny"):  # oldest first, each checked for its shape
        print(record.name, record.own.stats["time_mean"], record.gain)

accept.py writes records, verify.py checks that they are true, result.py makes the contents for both.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from compare_runs import InputError, printable, some
from recordbook import evidence
from recordbook.evidence import MAYBE_NUMBER, MAYBE_TEXT, NUMBER
from recordbook.tracks import CLAIMS, RECORDS

FORMAT = "splits.record/1"
RESULT, README, MANIFEST = "result.json", "README.md", "MANIFEST.sha256"
MADE = (RESULT, README, MANIFEST)  # from the rest of a record's files
BASELINE = "baseline"  # claim of a first record: the target is reached, and no gain in time is claimed
LARGEST = 1e12  # of a measured mean
FOLDER = re.compile(r"(\d{4}-\d{2}-\d{2})_([a-z0-9]+(?:-[a-z0-9]+)*)")  # of a record: date and name

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
# Of the candidate over its own baseline arm, above 0 if it is better: `of` is "time" (in seconds), or the
# metric where the claim is a score; the two-sided interval of the amount at `level`.
GAIN = {
    "of": str,
    "amount": NUMBER,
    "relative": NUMBER,
    "low": NUMBER,
    "high": NUMBER,
    "level": NUMBER,
    "p": NUMBER,
    "test": str,
}
# The newest record when this one was accepted; `comparable`: '' if the times can be compared, else why not.
PREVIOUS = {"record": str, "time_mean": NUMBER, "loss_mean": NUMBER, "comparable": str}
SHAPE = {
    "format": str,
    "track": str,
    "name": str,
    "date": str,
    "finished": str,  # when its last run ended, with the zone; records are in this order
    "claim": str,
    "made_with": dict,  # versions of the libraries that computed it
    "rules": {"metric": str, "direction": str, "target": NUMBER, "alpha": NUMBER, "min_runs": int},
    "plan": {"sha256": str, "kind": str, "made": str, "rule": str, "runs": int, "extended": bool},
    "machine": MACHINE,
    "versions": dict.fromkeys(("python", "torch", "cuda", "triton", "commit"), MAYBE_TEXT),  # by the logs
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
    if not FOLDER.fullmatch(f"{content['date']}_{content['name']}"):
        return f"date {printable(content['date'])!r} or name {printable(content['name'])!r} is none"
    if evidence.moment(content["finished"]) is None or content["finished"][:10] != content["date"]:
        return f"finished {printable(content['finished'])!r} is no time of {content['date']}"
    roles = [arm["role"] for arm in content["arms"]]
    if roles != (["candidate"] if content["claim"] == BASELINE else ["baseline", "candidate"]):
        return f"claim {printable(content['claim'])!r} is not of arms in the roles {printable(some(roles))}"
    if content["claim"] not in (BASELINE, *CLAIMS):
        return f"claim {printable(content['claim'])!r} is unknown"
    for arm in content["arms"]:
        size = max(abs(arm["stats"][key] or 0) for key in STATS)
        if size > LARGEST or min(arm["stats"]["time_sd"], arm["stats"]["loss_sd"]) < 0:
            return f"stats of {printable(arm['name'])} is no result of measurements"
    if (gain := content["gain"]) and not -LARGEST < gain["low"] <= gain["amount"] <= gain["high"] < LARGEST:
        return "gain is no result of measurements, its interval does not hold it"
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
    def finished(self) -> datetime:
        """When its last run ended."""
        return evidence.moment(self.content["finished"])

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
        """The arm that it was compared with, run in turn with it; None for a first record."""
        return self.arms[0] if len(self.arms) > 1 else None

    @property
    def gain(self) -> dict | None:
        """What it gains over its own baseline arm (GAIN); None for a first record."""
        return self.content["gain"]

    @property
    def machine(self) -> dict:
        return self.content["machine"]


def read_record(folder: str | Path) -> Record:
    """The record of a folder; InputError if its result.json is malformed. Whether it is true: verify.py."""
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


def in_order(records: Iterable[Record]) -> list[Record]:
    """By the ends of their last runs."""
    return sorted(records, key=lambda record: (record.finished, record.id))


def record_folders(track: str, records: str | Path = RECORDS) -> list[Path]:
    """The folders in which a track's records are, by name; whatever they hold."""
    return sorted(path for path in Path(records, track).iterdir() if path.is_dir() and path.name[0] != ".")


def records_of(track: str, records: str | Path = RECORDS) -> list[Record]:
    """The records of a track, oldest first; InputError on the first that is malformed."""
    return in_order(read_record(folder) for folder in record_folders(track, records))
