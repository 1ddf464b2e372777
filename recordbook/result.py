"""The contents of a record, made from the evidence of a series and the rules of its track.

accept.py and verify.py both call these functions, the one on the folder of a series, the other on a stored
record that is laid out as one, so that nothing in a record is said that its logs do not give.
Order of this file: judging, the verdict on a first record, contents, files.
"""

from __future__ import annotations

import os
import sys
import tomllib
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from compare_runs import Arm, InputError, Run, load_arm, make_row, printable, refusals, some
from recordbook import evidence, pages, verdict
from recordbook.book import BASELINE, FORMAT, MADE, MANIFEST, README, REASON, RESULT, SHAPE, Record
from recordbook.evidence import Account
from recordbook.integrity import failed_runs, find, lost_failures
from recordbook.runs import PROJECT
from recordbook.sources import Source, check_whole, sources_of
from recordbook.tracks import Track
from recordbook.verdict import Case, Reason, Verdict

OWN_FILES = (*MADE, *evidence.TOP, evidence.LOGS)  # names that no source of a record may have
MOST_FAULTS = 4  # of an account, in one line
# What of a track decides. Rules of a track that has records do not change: other rules are another track.
RULES = ("metric", "direction", "target", "alpha", "margin", "min_runs", "recipe", "gpus", "hardware")
RULES += ("time_test", "loss_test", "data", "seconds_per_loss", "seconds_per_loss_sd")

# 1. judging -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Judged:
    """A series as the track's rules see it."""

    account: Account
    arms: list[Arm]
    verdict: Verdict
    sources: list[Source]  # of the arm that the record is about


def one_source(account: Account, files: dict[str, bytes], letter: str) -> list[Source]:
    """The sources in the logs of an arm, which must be the same in every one, and safe to write out."""
    first: list[Source] = []
    for end in account.ends:
        if end["arm"] == letter and end["status"] == "done":
            log = printable(end["log"])
            found = sources_of(files[end["log"]], log)
            check_whole(found, log)
            if first and found != first:
                raise InputError(f"{log}: holds other sources than the first log of its arm; look at both")
            first = found
    own = {name.casefold() for name in OWN_FILES}
    if taken := [source.name for source in first if source.name.casefold() in own]:
        raise InputError(f"source {some(taken)}: a record has such a file itself; rename the trainer")
    return first


def judge(files: dict[str, bytes], folder: Path, track: Track, claim: str) -> Judged:
    """The verdict on the series in `folder`, which holds these files. InputError: what bars any record."""
    account = evidence.account_of(files)
    if found := evidence.faults(account, files):
        more = [f"and {len(found) - MOST_FAULTS} more"] * (len(found) > MOST_FAULTS)
        raise InputError(f"no record: {'; '.join([*found[:MOST_FAULTS], *more])}")
    if (claim == BASELINE) != (account.plan["kind"] == "series"):
        two = " or ".join(track.claims)
        rule = f"a series of one trainer is claimed as {BASELINE}, one of two arms as {two}"
        raise InputError(f"--claim {claim}: {rule}; change the claim, or run bash run.sh ab A.py B.py N")
    arms = []
    for letter, planned in account.arms.items():
        arm = load_arm(str(folder / account.folder(letter)))
        arm.name, arm.metric = printable(planned["name"]), track.metric
        arm.higher = track.direction == "higher"
        arms.append(arm)
    if claim == BASELINE:
        found = decide_baseline(arms[0], track, account.extended)
    else:
        (found,) = verdict.decide_all(arms, track, claim)
    return Judged(account, arms, found, one_source(account, files, list(account.arms)[-1]))


# 2. the verdict on a first record -------------------------------------------------------------------------


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
        missing = (verdict.OPEN, text, None, track.min_runs)
        reasons.append(Reason("runs", *((verdict.PASS, text) if n >= track.min_runs else missing)))
    reasons += verdict.finding_reasons(findings, n, track)
    outcome, more = verdict.outcome_of(reasons, n)
    names = "", arm.name, BASELINE, track.name
    return Verdict(outcome, more, *names, track.alpha, tuple(reasons), tuple(findings), statistics)


def failed_baseline(case: Case) -> list[Reason]:
    """The reason that failed runs give."""
    if not case.failed:
        return []
    target = -case.track.target if case.track.direction == "higher" else case.track.target
    new = verdict.oriented(case.new, case.track)
    p_of = partial(verdict.sign_p, case, new, target)
    return [verdict.failed_reason(case, "failed", "losses: sign test", p_of)]


# 3. contents ----------------------------------------------------------------------------------------------


def versions() -> dict[str, str]:
    """What computes the numbers."""
    import numpy
    import scipy

    project = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    python = ".".join(map(str, sys.version_info[:3]))
    found = {"splits": project["version"], "python": python}
    return found | {"numpy": numpy.__version__, "scipy": scipy.__version__}


def machine_of(runs: list[Run]) -> dict:
    """What tells machines, and data, apart; all GPUs of the runs, which lanes share out."""
    head = runs[0].head
    uuids = {uuid for run in runs for uuid in run.head.get("uuids", "").split(", ")} - {""}
    known = {"id": ", ".join(sorted(uuids)) or head.get("host") or "unknown"}
    known["hardware"] = runs[0].hardware or "unknown"
    return known | {key: head.get(key) for key in ("host", "driver", "data")}


def run_content(run: Run, arm: Arm, folder: Path, ended: dict[str, str]) -> dict:
    """One run of an arm (RUN)."""
    log = evidence.unpacked(Path(os.path.relpath(run.path, folder)).as_posix())
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
    """What is claimed (GAIN): a metric by Welch's test, or time by the track's; None for a first record."""
    found = {r.about: r.p for r in judged.verdict.reasons}
    base = make_row(judged.arms[0], judged.arms[0], None)
    if "gain" in found:
        of, mean, p = track.metric, base.loss_mean, found["gain"]
        key, title = "loss_gain", "Welch's one-sided t-test"
    elif "time" in found:
        of, mean, p = "time", base.time_mean, found["time"]
        key, title, _ = verdict.TIME_TESTS[track.time_test]
    else:
        return None
    result = judged.verdict.statistics[key]
    test = getattr(result, "test", result)
    return {
        "of": of,
        "amount": -test.difference,
        "relative": -test.difference / abs(mean),
        "low": -test.high,
        "high": -test.low,
        "level": test.level,
        "p": p,
        "test": title,
    }


def previous_of(newest: Record | None, machine: dict, base_source: str | None) -> dict | None:
    """How a record stands beside the newest one of its track (PREVIOUS).

    InputError if its baseline arm ran another program: over a slow one a gain would be easy.
    """
    if newest is None:
        return None
    if base_source != newest.own.source:
        what = f"arm A ran {str(base_source)[:12]}, record {newest.id} is of {newest.own.source[:12]}"
        raise InputError(f"{what}; run the newest record's program as the baseline: {newest.folder}")
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
    }


def arm_contents(judged: Judged, folder: Path, track: Track) -> list[dict]:
    """The arms (ARM)."""
    account, arms, found = judged.account, judged.arms, []
    ended = {end["log"]: end["status"] for end in account.ends}
    for arm, planned in zip(arms, account.arms.values(), strict=True):
        content = {"name": arm.name, "role": "candidate" if arm is arms[-1] else "baseline"}
        content |= {key: planned[key] for key in ("source", "files")}
        content["runs"] = [run_content(run, arm, folder, ended) for run in arm.runs]
        content["failed"] = len(failed_runs(arms, arm)) + lost_failures(arms, arm)
        content["stats"] = vars(make_row(arm, arms[0], track.target))
        found.append(content)
    return found


def curves(arms: list[Arm], known: list[dict]) -> list[dict]:
    """The validations of every run."""
    return [
        {"arm": arm.name, "log": run["log"], "points": [[p.step, p.seconds, p.loss] for p in read.val]}
        for arm, content in zip(arms, known, strict=True)
        for read, run in zip(arm.runs, content["runs"], strict=True)
    ]


def contents(judged: Judged, folder: Path, track: Track, claim: str, name: str) -> dict:
    """result.json of an accepted series, but for `previous`, which is about other records."""
    account, found = judged.account, judged.verdict
    plan, first = account.plan, judged.arms[-1].counted[0]
    arms = arm_contents(judged, folder, track)
    content = {
        "format": FORMAT,
        "track": track.name,
        "name": name,
        "date": account.finished[:10],
        "finished": account.finished,
        "claim": claim,
        "made_with": versions(),
        "rules": {key: getattr(track, key) for key in RULES},
        "plan": {
            "sha256": account.plan_hash,
            "kind": plan["kind"],
            "made": plan["made"],
            "rule": plan["stop"]["rule"],
            "runs": account.runs,
            "extended": account.extended,
        },
        "machine": machine_of(judged.arms[-1].counted),
        "versions": {key: first.head.get(key) for key in SHAPE["versions"]},
        "verdict": {
            "outcome": found.outcome,
            "p": found.p,
            "alpha": found.alpha,
            "reasons": [{key: getattr(reason, key) for key in REASON} for reason in found.reasons],
            "findings": [vars(finding) for finding in found.findings],
        },
        "gain": gain_of(judged, track),
        "arms": arms,
        "tests": found.statistics,
        "curves": curves(judged.arms, arms),
    }
    return verdict.plain(content)


# 4. files -------------------------------------------------------------------------------------------------


def generated(content: dict, stored: dict[str, bytes]) -> dict[str, bytes]:
    """The files of a record that are made from its result: result.json, README.md, MANIFEST.sha256."""
    made = {RESULT: pages.json_text(content).encode(), README: pages.record_page(content).encode()}
    return made | {MANIFEST: pages.manifest(stored | made).encode()}
