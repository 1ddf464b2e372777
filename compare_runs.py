#!/usr/bin/env python3
"""Compare training runs from their logs: the community's table, the tests behind it, and what does not count.

    python compare_runs.py logs/baseline logs/candidate       one arm an argument, the first is the baseline
    python compare_runs.py 'logs/ab/base_*' 'logs/ab/new_*'   arms by glob: quote the '*'
    python compare_runs.py logs/ab@1e951856 logs/ab@c09cf162  arms by source hash, if one folder holds both
    python compare_runs.py logs/candidate                     one arm against the target alone
    python compare_runs.py logs/a logs/b --json out.json --plot out.png
    python compare_runs.py logs/a logs/b --track short --claim ml    ACCEPT, REJECT or INCONCLUSIVE
    python compare_runs.py accept logs/ab --track short --claim ml --name fused-head    write a record
    python compare_runs.py verify                                    are all records what their logs say?

Reads the logs of every era of the GPT speedrun, and ours. Needs scipy; --plot needs matplotlib; never torch.
Only complete runs are averaged. Every other run is named with the reason; a mixed arm is refused.
Order of this file: statistics, log parsing, arms and their checks, report, command line. The findings,
the verdict, the plot and the subcommands live in recordbook/, which is imported only when it is needed.
"""

from __future__ import annotations

import argparse
import contextlib
import glob
import hashlib
import json
import math
import os
import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

MEASURES = ("loss", "seconds", "bpb")  # numbers that every kind of log can have
SCHEMA = "splits.compare_runs/1"
DEFAULT_TARGET = 3.28
MIN_RUNS = 2  # a sample standard deviation needs two
PACKINGS = (".gz", ".xz", ".zst")
LOG_SUFFIXES = tuple(kind + packed for kind in (".txt", ".log") for packed in ("", *PACKINGS))
LOG_END = re.compile(rf"\.(txt|log)({'|'.join(map(re.escape, PACKINGS))})?(#\d+)?$")  # also of a run's name
LARGEST = 1e50  # of a number in a log; squares stay finite below
MOST_BYTES = 128 << 20  # of one log, unpacked; published ones have less than 1 MB
METRIC_TITLES = {"val_loss": "Loss", "val_bpb": "bpb"}
PLOT_SUFFIXES = (".png", ".svg", ".pdf")
TIME_TESTS = {  # --time-test: what Time p then is
    "welch-less": "Welch's t-test, one-sided (less)",
    "welch-two-sided": "Welch's t-test, two-sided",
    "student": "Student's t-test (pooled variance), one-sided (less)",
    "paired": "paired t-test of interleaved runs, one-sided (less)",
}
TESTS = {
    "time_p": "Welch's t-test (unequal variances), one-sided 'less': mean time < that of the first row",
    "time_p_two_sided": "Welch's t-test (unequal variances), two-sided: the mean times differ",
    "loss_p": "one-sample t-test, one-sided 'less': mean loss < target",
}


class InputError(ValueError):
    """Bad input: the message names the value, the rule and the remedy."""


# 1. statistics --------------------------------------------------------------------------------------------


def mean(values: list[float]) -> float:
    """Arithmetic mean, summed without rounding error."""
    return math.fsum(values) / len(values)


def sample_sd(values: list[float]) -> float:
    """Standard deviation with n - 1 in the denominator; exactly 0 for equal values."""
    if min(values) == max(values):
        return 0.0
    centre = mean(values)
    return math.sqrt(math.fsum((x - centre) ** 2 for x in values) / (len(values) - 1))


def t_below(t: float, df: float) -> float:
    """P(T <= t) of Student's t. scipy.special alone loads several times faster than scipy.stats."""
    from scipy.special import stdtr

    return float(stdtr(df, t))


def one_sample_less(values: list[float], target: float) -> float:
    """One-sided p-value of H1: mean(values) < target. Undefined (ValueError) at zero variance."""
    sd = sample_sd(values)
    if sd == 0:
        raise ValueError("zero variance")
    return t_below((mean(values) - target) / (sd / math.sqrt(len(values))), len(values) - 1)


def welch(new: list[float], base: list[float]) -> tuple[float, float]:
    """(t, degrees of freedom) of Welch's test of mean(new) - mean(base); ValueError at zero variance."""
    var_new, var_base = sample_sd(new) ** 2 / len(new), sample_sd(base) ** 2 / len(base)
    if var_new + var_base == 0:
        raise ValueError("zero variance")
    df = (var_new + var_base) ** 2 / (var_new**2 / (len(new) - 1) + var_base**2 / (len(base) - 1))
    return (mean(new) - mean(base)) / math.sqrt(var_new + var_base), df


def welch_less(new: list[float], base: list[float]) -> float:
    """One-sided p-value of H1: mean(new) < mean(base), variances not assumed equal."""
    return t_below(*welch(new, base))


def welch_two_sided(new: list[float], base: list[float]) -> float:
    """Two-sided p-value of H1: the means differ, variances not assumed equal."""
    t, df = welch(new, base)
    return 2 * t_below(-abs(t), df)


# 2. one log -----------------------------------------------------------------------------------------------

RULE = b"=" * 100
OMITTED = re.compile(rb"# source omitted here, sha256 ([0-9a-f]{64})")
OUR_SOURCE = re.compile(rb"#### source (.+) sha256=([0-9a-f]{64}) lines=(\d{1,7})")
STEP = re.compile(rb"step:(\d{1,9})/(\d{1,9}) ")
TRAIN = re.compile(rb"step:\d+/\d+ train_loss:(\S+)(?: train_time:([\d.]+|nan)(ms|s)\b)?")
LLMC = re.compile(rb"s:(\d{1,9}) (tel|trl):(\S+)")
CLOCK = re.compile(rb" train_time:(\S+)")
MARKS = 32  # about so many of a run's times are kept: they show where time was lost, and take little memory
KEY_VALUE = re.compile(rb"(\w+):(\S+)")
DURATION = re.compile(rb"([\d.]+|nan)(ms|s)")
PEAK = re.compile(rb"peak memory (?:allocated|consumption): (\d{1,9}) MiB(?: reserved: (\d{1,9}) MiB)?")
STATUS = re.compile(rb"status: (?:(done)|(diverged|interrupted|crashed)\b ?(.*))$")
SMI_DATE = re.compile(
    rb"(?:Mon|Tue|Wed|Thu|Fri|Sat|Sun) ([A-Z][a-z]{2}) +(\d+) (\d\d:\d\d:\d\d)(?: \w+)? (\d{4})"
)
MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
HEAD_PATTERNS = {  # name: pattern at a line start of the header
    "python": rb"Running Python (\S+)",
    "torch": rb"Running [Pp]y[Tt]orch (\S+)",
    "cuda": rb"Running [Pp]y[Tt]orch \S+ compiled for CUDA (\S+)",
    "triton": rb"Running Triton version (\S+)",
    "driver": rb"\| NVIDIA-SMI .*Driver Version: (\S+)",
    "world_size": rb"(?:Running on device_name=.* with world_size=|world_size:)(\d+)",
    "device_name": rb"Running on device_name=(.*) with world_size=",
    "seed": rb"(?:Using seed=|seed:)(\d+)",
}
SETTINGS = ("dtype", "attention", "fp8", "slots")  # what a machine may decide differently for one source
OUR_KEYS = ("run_id", "host", "driver", "commit", "dirty", "data", "recipe", "seed", "world_size", "started")
OUR_KEYS += (*SETTINGS, "resumed")


class Point(NamedTuple):
    """One measured line: seconds is None where the format has no clock."""

    step: int
    loss: float
    seconds: float | None


@dataclass
class Trial:
    """The lines of one training run; a file of the fixed-architecture track can hold several."""

    val: list[Point] = field(default_factory=list)
    train_lines: int = 0  # training losses are counted, not kept: many long logs would not fit in memory
    train_last: Point | None = None
    train_bad: int | None = None  # first step with a training loss that is not finite
    bpb: list[float] = field(default_factory=list)
    measured: dict[bytes, bytes] = field(default_factory=dict)  # every key of the last validation line
    marks: dict[int, float] = field(default_factory=dict)  # training seconds after some of the steps
    totals: set[int] = field(default_factory=set)
    last_step: int = -1
    stopped_early: bool = False  # a line says that the budget, not the schedule, ended the run
    final: tuple[str, float, float] | None = None  # label, loss, bits per byte of the contest's closing line
    peak_mib: int | None = None
    closing: list[tuple[str, str]] = field(default_factory=list)  # (status, rest of the line)
    conflict: str = ""  # the first contradiction found
    lines_after_close: bool = False


@dataclass
class Run:
    """What one run says about itself. `head` holds the header's facts; absent means not in the log."""

    name: str
    path: str
    kind: str  # splits, community, contest, llm.c
    status: str  # complete, incomplete, diverged, crashed, interrupted, contradictory, not a log
    reason: str
    head: dict
    source: str | None
    sources: dict[str, str]
    digest: str
    val: list[Point]
    train_last: Point | None = None
    train_lines: int = 0
    steps_done: int | None = None
    steps_planned: int | None = None
    loss: float | None = None
    seconds: float | None = None
    bpb: float | None = None
    loss_from: str = "last validation line"
    peak_mib: int | None = None
    metrics: dict[str, float] = field(default_factory=dict)  # finite numbers of the last validation
    marks: dict[int, float] = field(default_factory=dict)  # training seconds after some of the steps

    @property
    def complete(self) -> bool:
        """True if the run counts."""
        return self.status == "complete"

    @property
    def interval(self) -> str | None:
        """Validation interval in words, without the last gap, which the end of the schedule may shorten."""
        steps = [p.step for p in self.val]
        gaps = [b - a for a, b in pairwise(steps)][:-1]
        kept = [gap for i, gap in enumerate(gaps) if i == 0 or gap != gaps[i - 1]]
        if not self.complete:
            return None
        return "every " + " then ".join(map(str, kept[:6])) + " steps" if kept else "only at the end"

    @property
    def hardware(self) -> str | None:
        """Devices used, such as '8 x NVIDIA H100 80GB HBM3'; None if the log does not say."""
        names = self.head.get("gpus") or [n for n in (self.head.get("device_name"),) if n]
        count = self.head.get("world_size") or len(names)
        if not count:
            return None
        return f"{count} x {' + '.join(sorted(set(names))) or 'CPU or unnamed device'}"


def parse_number(text: bytes) -> float | None:
    """A float, nan and inf included; None if the text is no number. Above 1e50 nothing is measured: inf."""
    try:
        number = float(text)
    except ValueError:
        return None
    return math.inf if abs(number) > LARGEST else number


def parse_seconds(text: bytes | None) -> float | None:
    """'105607ms' or '492.485s' as seconds; None where there is no such field."""
    match = DURATION.fullmatch(text or b"")
    number = parse_number(match[1]) if match else None
    if number is None:
        return None
    return number / 1000 if match[2] == b"ms" else number


def our_source(lines: list[bytes]) -> tuple[dict[str, str], int, str]:
    """({file: hash}, index of the first line after our sources, a file that fails its hash)."""
    sources, i, forged = {}, 0, ""
    while i < len(lines) and (match := OUR_SOURCE.fullmatch(lines[i])):
        name, claimed, end = match[1].decode("utf-8", "replace"), match[2].decode(), i + 1 + int(match[3])
        text = b"\n".join(lines[i + 1 : end])
        whole = end < len(lines)
        if whole and claimed not in (hashlib.sha256(text + tail).hexdigest() for tail in (b"\n", b"")):
            forged = forged or name
        sources[name], i = claimed, end
    return sources, min(i, len(lines)), forged


def their_source(lines: list[bytes]) -> tuple[str | None, int]:
    """(source hash, index of the first line after the embedded source) of a community log."""
    rules = [i for i, line in enumerate(lines) if line == RULE]
    if not rules:
        return None, 0
    # Before 2025 a first rule opens the source; the rule that ends it stands above the version lines.
    end = next((i for i in rules if lines[i + 1 : i + 2] and lines[i + 1].startswith(b"Running ")), rules[0])
    omitted = OMITTED.fullmatch(lines[0])
    text = b"\n".join(line for line in lines[bool(omitted) : end] if line != RULE)
    if omitted and not text.strip():
        return omitted[1].decode(), end
    return hashlib.sha256(text).hexdigest(), end


def parse_head(lines: list[bytes], ours: bool) -> dict:
    """Facts of the header: versions, devices, seed, target, date."""
    text, head = b"\n".join(lines), {}
    for key, pattern in HEAD_PATTERNS.items():
        if match := re.search(rb"^" + pattern, text, re.M):
            head[key] = match[1].decode("utf-8", "replace")
    if names := re.findall(rb"^\|\s+\d+\s+(\S.*?)\s+(?:On|Off)\s+\|\s+[0-9A-F]{4,8}:", text, re.M):
        head["gpus"] = [name.decode("utf-8", "replace") for name in names]
    if match := SMI_DATE.search(text):
        month = match[1].decode()
        if month in MONTHS:
            day, clock, year = int(match[2]), match[3].decode(), match[4].decode()
            head["started"] = f"{year}-{MONTHS.index(month) + 1:02d}-{day:02d}T{clock}"
    if ours:
        pairs = [line.decode("utf-8", "replace").partition(": ") for line in lines if b": " in line]
        fields = {key: value.strip() for key, _, value in pairs}
        head.update({key: fields[key] for key in OUR_KEYS if fields.get(key)})
        devices = [v for k, v in fields.items() if re.fullmatch(r"gpu \d+", k)]
        if devices:
            head["gpus"] = [re.sub(r" ((GPU|MIG)-\S+|unknown)$", "", device) for device in devices]
            if uuids := re.findall(r" ((?:GPU|MIG)-\S+)$", "\n".join(devices), re.M):
                head["uuids"] = ", ".join(sorted(uuids))
        elif "cpu" in fields:
            head["device_name"] = f"CPU {fields['cpu']}"
        target = parse_number(fields.get("target", "").encode())
        if target is not None and math.isfinite(target):
            head["target"] = target
    for key in ("world_size", "seed"):
        if str(head.get(key, "")).isdigit():
            head[key] = int(head[key])
    return head


def ends_whole(line: bytes, earlier: list[bytes]) -> bool:
    """True if an unterminated last line ends like an earlier validation line, unit and decimals included."""

    def shape(text: bytes) -> bytes:
        return re.sub(rb"\d", b"0", re.sub(rb":\d+", b":", text.split()[-1]))

    return any(shape(line) == shape(other) for other in earlier)


def add_train(trial: Trial, line: bytes, step: int) -> None:
    """Add the training loss of one `step:` line, if it has one. Most lines of a log pass through here."""
    if match := TRAIN.match(line):
        loss, clock = parse_number(match[1]), parse_number(match[2] or b"")
        count_train(trial, step, loss, clock / 1000 if clock is not None and match[3] == b"ms" else clock)


def count_train(trial: Trial, step: int, loss: float | None, seconds: float | None) -> None:
    """Note one training loss; None is no number."""
    if loss is None:
        return
    trial.train_lines += 1
    trial.train_last = Point(step, loss, seconds)
    if not math.isfinite(loss):
        trial.train_bad = step if trial.train_bad is None else min(step, trial.train_bad)


def add_val(trial: Trial, line: bytes, step: int) -> None:
    """Add one validation line; one that cannot be true beside the others becomes the trial's conflict."""
    fields = dict(KEY_VALUE.findall(line))
    loss, seconds = parse_number(fields.get(b"val_loss", b"")), parse_seconds(fields.get(b"train_time"))
    if loss is None:
        trial.conflict = trial.conflict or f"garbled loss in the validation line of step {step}"
        return
    point, last = Point(step, loss, seconds), trial.val[-1] if trial.val else None
    if last and last.step == step:
        if last != point and not (math.isnan(loss) and math.isnan(last.loss)):
            trial.conflict = trial.conflict or f"two different validation lines at step {step}"
        return
    if last and seconds is not None and seconds < (last.seconds or 0):
        trial.conflict = trial.conflict or f"train_time goes back at step {step}"
    trial.val.append(point)
    trial.measured = fields
    bpb = parse_number(fields.get(b"val_bpb", b""))
    if bpb is not None:
        trial.bpb.append(bpb)
        if math.isfinite(loss) and not math.isfinite(bpb):
            trial.conflict = trial.conflict or f"val_bpb {bpb} beside a finite loss at step {step}"


def add_mark(trial: Trial, step: int, seconds: float | None) -> None:
    """Keep the clock at a step, unless it shows no time."""
    if seconds is not None and math.isfinite(seconds):
        trial.marks[step] = seconds


def add_closing(trial: Trial, line: bytes) -> None:
    """Add a closing line (peak memory, status, early end, contest result) if it is one."""
    if line.startswith(b"status: "):
        if match := STATUS.fullmatch(line.rstrip()):
            rest = (match[3] or b"").decode("utf-8", "replace").removeprefix(": ")
            trial.closing.append(((match[1] or match[2]).decode(), rest))
    elif line.startswith(b"stopping_early"):
        trial.stopped_early = True
    elif line.startswith(b"final_"):
        fields = dict(KEY_VALUE.findall(line))
        loss, bpb = (parse_number(fields.get(key, b"")) for key in (b"val_loss", b"val_bpb"))
        if loss is not None and bpb is not None:
            if trial.final and abs(trial.final[1] - loss) > 5.1e-5 and line.split()[0].endswith(b"_exact"):
                trial.conflict = trial.conflict or "two final_ lines with different losses"
            trial.final = (line.split()[0].decode("utf-8", "replace"), loss, bpb)
    elif match := PEAK.match(line):
        trial.peak_mib = int(match[1])


def parse_trials(lines: list[bytes], start: int) -> tuple[list[Trial], int]:
    """(trials, index of the first measured line): one pass over the lines after the source."""
    trials, first = [Trial()], len(lines)
    for i in range(start, len(lines)):
        line = lines[i]
        if line.startswith(b"step:"):
            if not (match := STEP.match(line)):
                continue
            step, is_val = int(match[1]), b" val_loss:" in line
        elif line.startswith(b"s:"):
            if not (match := LLMC.match(line)):
                continue
            step, is_val = int(match[1]), match[2] == b"tel"
        else:
            if line.startswith((b"status: ", b"stopping_early", b"final_", b"peak ")):
                add_closing(trials[-1], line)
            continue
        first = min(first, i)
        # Training losses may be logged late, so only a validation that goes back starts the next trial.
        if is_val and trials[-1].val and step < trials[-1].val[-1].step:
            trials.append(Trial())
        trial = trials[-1]
        trial.last_step = max(trial.last_step, step)
        trial.lines_after_close |= bool(trial.closing)
        if match.re is STEP:
            total = int(match[2])
            trial.totals.add(total)
            (add_val if is_val else add_train)(trial, line, step)
            if not step % (total // MARKS or 1) and (clock := CLOCK.search(line)):
                add_mark(trial, step, parse_seconds(clock[1]))
        elif not is_val:
            count_train(trial, step, parse_number(match[3]), None)
        elif (loss := parse_number(match[3])) is not None:
            trial.val.append(Point(step, loss, None))
    return trials, first


def judge(trial: Trial, ours: bool, contest: bool, cut: bool) -> tuple[str, str]:
    """(status, reason) of one run. Complete: the last planned validation is there, nothing disagrees."""
    total = max(trial.totals, default=None)
    done = trial.val[-1].step if trial.val else None
    bad = [p.step for p in trial.val if not math.isfinite(p.loss)]
    bad += [trial.train_bad] if trial.train_bad is not None else []
    bad += [trial.last_step] if trial.final and not all(map(math.isfinite, trial.final[1:])) else []
    reason = ""
    if trial.conflict:
        return "contradictory", trial.conflict
    if len(trial.totals) > 1:
        return "contradictory", f"names several totals of steps: {', '.join(map(str, sorted(trial.totals)))}"
    if len(set(trial.closing)) > 1 or (ours and trial.lines_after_close):
        return "contradictory", "has several status lines" if trial.closing[
            1:
        ] else "goes on after its status line"
    if trial.closing and trial.closing[0][0] != "done":
        return trial.closing[0]
    if bad:
        return "diverged", f"non-finite loss at step {min(bad)}"
    if cut:
        reason = "cut in mid-line"
    elif done is None:
        reason = "holds no validation line"
    elif total is not None and done < total and not trial.stopped_early:
        before = " before the last validation" if trial.last_step >= total else ""
        reason = f"stops at step {trial.last_step} of {total}{before}"
    elif total is None and trial.train_last and trial.train_last.step >= done:
        reason = f"stops at step {trial.last_step} without a last validation"
    elif contest and trial.final is None:
        reason = "has no final_ line with the loss after quantisation"
    elif trial.val[-1].seconds is not None and not 0 < trial.val[-1].seconds < math.inf:
        reason = f"its last train_time is {trial.val[-1].seconds:g} s"
    if reason and trial.closing:
        return "contradictory", f"says 'status: done' but {reason}"
    if not reason and ours and not trial.closing:
        reason = "has no closing status line"
    return ("incomplete", reason) if reason else ("complete", "")


def metrics_of(trial: Trial, run: Run) -> dict[str, float]:
    """What --metric can name: the finite numbers of the last validation line, or of the closing line."""
    found = {key.decode(): parse_number(text) for key, text in trial.measured.items()}
    found |= {"val_loss": run.loss, "val_bpb": run.bpb}
    return {k: v for k, v in found.items() if k != "step" and v is not None and math.isfinite(v)}


def parse_log(data: bytes, name: str, path: str) -> list[Run]:
    """Every run of one log, in order. Never raises: what cannot be read becomes a status and a reason."""
    digest = hashlib.sha256(data).hexdigest()
    lines = data.replace(b"\r\n", b"\n").split(b"\n")
    last, cut = lines[-1], False
    if last.startswith(b"step:") and b"val_loss" in last:
        cut = not ends_whole(last, [x for x in lines[:-1] if x.startswith(b"step:") and b" val_loss:" in x])
        lines = lines[:-1] if cut else lines
    sources, start, forged = our_source(lines)
    if sources:
        joined = "".join(f"{file} {claimed}\n" for file, claimed in sorted(sources.items()))
        source = hashlib.sha256(joined.encode()).hexdigest()
    else:
        source, start = their_source(lines)
    trials, first = parse_trials(lines, start)
    head = parse_head(lines[start:first], bool(sources))
    timeless = any(t.val and not t.totals for t in trials)
    contest = any(t.final or t.stopped_early for t in trials) or b"\nval_bpb:enabled" in data
    kind = "splits" if sources else "llm.c" if timeless else "contest" if contest else "community"
    runs = []
    for number, trial in enumerate(trials, 1):
        status, reason = judge(trial, bool(sources), contest, cut and number == len(trials))
        if sources and len(trials) > 1:
            status, reason = "contradictory", "its steps go back: one log holds one run"
        if forged:
            status, reason = "contradictory", f"the source of {forged} in it does not have the hash it claims"
        if status == "complete" and head.get("resumed", "None") != "None":
            status, reason = "incomplete", "was resumed, so this log does not hold the whole run"
        if trial.last_step < 0 and source is None:
            status, reason = ("not a log", "no step line") if data.strip() else (status, "is empty")
        label = f"{name}#{number}" if len(trials) > 1 else name
        run = Run(label, path, kind, status, reason, head, source, sources, digest, trial.val)
        run.train_last, run.train_lines = trial.train_last, trial.train_lines
        run.steps_done = trial.last_step if trial.last_step >= 0 else None
        run.steps_planned = max(trial.totals, default=run.steps_done if timeless else None)
        run.peak_mib, run.marks = trial.peak_mib, trial.marks
        if trial.val:
            run.loss, run.seconds = trial.val[-1].loss, trial.val[-1].seconds
            run.bpb = trial.bpb[-1] if len(trial.bpb) == len(trial.val) else None
        if trial.final:
            run.loss_from, run.loss, run.bpb = trial.final
        run.metrics = metrics_of(trial, run)
        runs.append(run)
    return runs


# 3. arms and their checks -----------------------------------------------------------------------------------


@dataclass
class Arm:
    """The runs that one argument names. `seen`: every log in view, so that none is dropped in silence."""

    arg: str
    name: str
    runs: list[Run]
    seen: set[str]
    metric: str = "val_loss"
    higher: bool = False  # which side of the target is good

    @property
    def attempts(self) -> list[Run]:
        """Every run launched, failed ones included."""
        return [run for run in self.runs if run.status != "not a log"]

    @property
    def counted(self) -> list[Run]:
        """Complete runs, in the order in which they started where the logs say so."""
        return [run for run in self.attempts if run.complete]


class Refusal(InputError):
    """Runs that may not be averaged; `evidence` is the listing that shows why, `runs` are those at fault.

    The plain table ends with the first of them. A verdict takes all of them as findings that block it.
    """

    def __init__(self, message: str, evidence: str, code: str, runs: Iterable[Run] = ()):
        super().__init__(message)
        self.evidence, self.code, self.runs = evidence, code, tuple(runs)


def printable(text: str) -> str:
    """The text on one line: control characters and undecodable bytes of file names as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "replace").decode() for c in text)


def some(names: list[str], limit: int = 4) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def is_log(path: str) -> bool:
    """True for the file names that a folder's logs have."""
    return path.lower().endswith(LOG_SUFFIXES) and not os.path.basename(path).startswith(".")


def logs_under(folder: str) -> list[str]:
    """Logs in a folder and its subfolders, sorted; hidden folders are skipped."""

    def fail(error: OSError) -> None:
        raise InputError(
            f"{printable(error.filename)}: cannot be listed ({error.strerror}); check its rights"
        )

    found = []
    for parent, folders, files in os.walk(folder, onerror=fail):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [os.path.join(parent, name) for name in sorted(files) if is_log(name)]
    return found


def find_logs(arg: str) -> tuple[list[str], str]:
    """(log files that an argument names, folder that their names are relative to)."""
    if os.path.isdir(arg):
        files, base = logs_under(arg), arg
    elif os.path.isfile(arg):
        return [arg], os.path.dirname(arg) or "."
    else:
        matches = sorted(glob.glob(arg, recursive=True))
        if not matches and not os.path.lexists(arg):
            what = printable(arg) or "empty name"
            raise InputError(f"{what}: no such file or folder, and no file matches it; quote a '*'")
        files = [
            f for m in matches for f in (logs_under(m) if os.path.isdir(m) else [m] if is_log(m) else [])
        ]
        base = os.path.commonpath([os.path.dirname(f) or "." for f in files]) if files else arg
    if not files:
        kinds = ", ".join(LOG_SUFFIXES)
        raise InputError(f"{printable(arg)}: holds no logs; a run log ends in one of {kinds}")
    return files, base


def read_gz(path: str, most: int) -> bytes:
    """The first `most` unpacked bytes of a .gz file."""
    import gzip
    import zlib

    try:
        with gzip.open(path) as file:
            return file.read(most)
    except (EOFError, zlib.error) as error:
        raise OSError(str(error)) from None


def read_xz(path: str, most: int) -> bytes:
    """The first `most` unpacked bytes of a .xz file."""
    import lzma

    try:
        with lzma.open(path) as file:
            return file.read(most)
    except (EOFError, lzma.LZMAError) as error:
        raise OSError(str(error)) from None


def read_zst(path: str, most: int) -> bytes:
    """The first `most` unpacked bytes of a .zst file, whose frames follow each other.

    Fed by the kilobyte, so that no step unpacks more than 32 MiB (a block of 4 bytes holds at most 128 KiB).
    The library's own reader takes a cut file for a whole one.
    """
    try:
        import zstandard
    except ModuleNotFoundError:
        raise OSError("zstandard is not installed: pip install zstandard") from None

    text, frame, packed = bytearray(), None, b""
    with open(path, "rb") as file:
        while len(text) < most and (packed := packed or file.read(1024)):
            frame = frame or zstandard.ZstdDecompressor().decompressobj()
            try:
                text += frame.decompress(packed)
            except zstandard.ZstdError as error:
                raise OSError(str(error)) from None
            packed, frame = frame.unused_data, None if frame.eof else frame
    if frame and len(text) < most:
        raise OSError("it ends in the middle of a frame")
    return bytes(text[:most])


def read_plain(path: str, most: int) -> bytes:
    """The first `most` bytes of a file."""
    with open(path, "rb") as file:
        return file.read(most)


READERS = {".gz": read_gz, ".xz": read_xz, ".zst": read_zst}


def read_log(path: str) -> bytes:
    """The bytes of a log, unpacked. InputError if it cannot be read, is too long or is not text."""
    shown = printable(path)
    if os.path.exists(path) and not os.path.isfile(path):
        raise InputError(f"{shown}: not a regular file; leave it out by glob")
    try:
        data = READERS.get(os.path.splitext(path)[1].lower(), read_plain)(path, MOST_BYTES + 1)
    except OSError as error:
        raise InputError(
            f"{shown}: cannot be read ({error.strerror or error}); repair it or leave it out by glob"
        ) from None
    if len(data) > MOST_BYTES:
        raise InputError(f"{shown}: over {MOST_BYTES >> 20} MiB unpacked, so no log; leave it out by glob")
    if b"\0" in data:
        raise InputError(f"{shown}: binary, not a text log; leave it out by glob")
    return data


def with_progress(files: list[str]) -> Iterable[str]:
    """The same files, with a bar on a terminal where reading takes more than two seconds."""
    if len(files) < 100 or not sys.stderr.isatty():
        return files
    try:
        from tqdm import tqdm
    except ModuleNotFoundError:
        return files
    return tqdm(files, desc="logs", unit="", delay=2, leave=False)


def load_arm(arg: str) -> Arm:
    """Find, read and parse the logs of one argument: a file, folder or glob, perhaps with @<hash>."""
    place, pick = arg, ""
    if not os.path.lexists(arg) and (match := re.fullmatch(r"(.+)@([0-9a-f]{6,64})", arg)):
        place, pick = match[1], match[2]
    files, base = find_logs(place)
    runs = []
    for path in with_progress(files):
        runs += parse_log(read_log(path), printable(os.path.relpath(path, base)), path)
    if all(run.status == "not a log" for run in runs):
        names = some([run.name for run in runs])
        raise InputError(
            f"{printable(arg)}: no run log among {len(runs)} file(s): {names}; a log has step lines"
        )
    seen = set(files)
    if not os.path.isdir(place):
        for folder in {os.path.dirname(path) or "." for path in files}:
            seen |= {os.path.join(folder, f) for f in os.listdir(folder) if is_log(f)}
    if pick:
        runs = [run for run in runs if run.source and run.source.startswith(pick)]
        if not runs:
            raise InputError(f"{printable(arg)}: no log there has a source hash that starts with {pick}")
    if all(run.head.get("started") for run in runs if run.complete):
        runs.sort(key=started)
    return Arm(arg, "", runs, {os.path.realpath(path) for path in seen})


def name_arms(arms: list[Arm]) -> None:
    """Name each arm after its folder or file; equal names take more of the path until they differ."""

    def label(arm: Arm, depth: int) -> str:
        parts = Path(os.path.abspath(arm.arg)).parts[1:]
        if depth == 0 and not os.path.isdir(arm.arg) and parts:
            inner = glob.has_magic(parts[-1]) and len(parts) > 1
            return printable(parts[-2] if inner else LOG_END.sub("", parts[-1]))
        return printable("/".join(parts[-1 - depth :])) or "/"

    for arm in arms:
        rivals = {os.path.abspath(other.arg): other for other in arms if label(other, 0) == label(arm, 0)}
        depths = range(len(Path(os.path.abspath(arm.arg)).parts))
        named = [[label(other, depth) for other in rivals.values()] for depth in depths]
        depth = next((d for d, names in enumerate(named) if len(set(names)) == len(names)), depths[-1])
        arm.name = label(arm, depth)
    names = [arm.name for arm in arms]
    for i, arm in enumerate(arms):
        if names.count(arm.name) > 1:
            arm.name = f"{names[i]} ({names[: i + 1].count(names[i])})"


def traits(run: Run) -> dict[str, str | None]:
    """What all runs of an arm must share; None where the log does not say."""
    total = f"{run.steps_planned} steps" if run.steps_planned is not None else None
    target = run.head.get("target")
    return {
        "source": f"source {run.source[:12]}" if run.source else None,
        "total of steps": total,
        "validation interval": f"validated {run.interval}" if run.interval else None,
        "hardware": run.hardware,
        "recipe": f"recipe {run.head['recipe']}" if "recipe" in run.head else None,
        "settings": ", ".join(f"{key} {run.head[key]}" for key in SETTINGS if key in run.head) or None,
        "data": f"data {run.head['data'][:19]}" if "data" in run.head else None,
        "target": f"target {target:g}" if target is not None else None,
        "clock": ("timed" if run.seconds is not None else "without times") if run.complete else None,
    }


def mixed_traits(runs: list[Run]) -> list[str]:
    """Names of the traits in which runs differ; only a complete run is held to what its log does not say."""
    found = defaultdict(set)
    for run in runs:
        for key, value in traits(run).items():
            if value is not None or run.complete:
                found[key].add(value)
    return [key for key, distinct in found.items() if len(distinct) > 1]


def remedy(arm: Arm, group: list[Run], by_source: bool) -> str:
    """An argument that selects exactly one group of a mixed arm, if a simple one exists."""
    place = arm.arg if os.path.lexists(arm.arg) else arm.arg.rpartition("@")[0] or arm.arg
    if os.path.isdir(place):
        names = sorted(run.path for run in group)
        pairs = zip(names[0], names[-1], strict=False)
        prefix = names[0][: next((i for i, (a, b) in enumerate(pairs) if a != b), len(names[0]))]
        pattern = glob.escape(prefix) + "*"
        if prefix != os.path.join(place, "") and sorted(filter(is_log, glob.glob(pattern))) == names:
            return f"'{pattern}'"
    if by_source and group[0].source:
        return f"'{place}@{group[0].source[:8]}'"
    return "its files by glob, or a folder each"


def check_mixed(arm: Arm, ignore: set[str]) -> Iterator[Refusal]:
    """An arm whose runs are not repeats of one experiment; the evidence shows its groups."""
    mixed = [key for key in mixed_traits(arm.attempts) if key not in ignore]
    if not mixed:
        return
    groups: dict[tuple, list[Run]] = {}
    for run in sorted(arm.attempts, key=lambda run: not run.complete):
        facts = [traits(run)[key] for key in mixed]
        key = tuple(fact or f"{key} unknown" for fact, key in zip(facts, mixed, strict=True))
        if not run.complete:  # it joins the first group that it does not contradict
            fits = (g for g in groups if all(f in (None, of) for f, of in zip(facts, g, strict=True)))
            key = next(fits, key)
        groups.setdefault(key, []).append(run)
    ordered = sorted(groups.items(), key=lambda item: -len(item[1]))
    lines = [f"{arm.name}: {len(arm.attempts)} runs in {len(groups)} groups"]
    for number, (key, runs) in enumerate(ordered, 1):
        lines += [
            f"group {number}: {len(runs)} run(s), {', '.join(key)}",
            *("  " + run_line(r) for r in runs),
        ]
    sizes = " + ".join(str(len(runs)) for _, runs in ordered)
    example = remedy(arm, ordered[0][1], "source" in mixed)
    yield Refusal(
        f"{arm.name}: {sizes} runs that differ in {', '.join(mixed)} cannot be one arm (groups on stdout);"
        f" pass one group, such as {printable(example)}",
        "\n".join(lines),
        "mixed",
        (run for _, runs in ordered[1:] for run in runs),
    )


def check_duplicates(arms: list[Arm]) -> Iterator[Refusal]:
    """Runs that are counted twice: the same bytes, the same run_id, or the same measured lines."""
    seen: dict[tuple, tuple[Arm, Run]] = {}
    for arm in arms:
        for run in (r for r in arm.attempts if r.steps_done is not None):
            part = run.name.rpartition("#")[2] if "#" in run.name else ""
            keys = {("content", run.digest, part): "the same content"}
            if "run_id" in run.head:
                keys["run_id", run.head["run_id"]] = f"the same run_id {run.head['run_id']}"
            if sum(bool(p.seconds) for p in run.val) >= 2:
                keys["val", *run.val] = "the same losses and times at every validation"
            if same := next((key for key in keys if key in seen), None):
                other_arm, other = seen[same]
                where = arm.name if other_arm is arm else f"{other_arm.name} and {arm.name}"
                yield Refusal(
                    f"{where}: {other.name} and {run.name} have {keys[same]};"
                    " a run counts once, leave one out",
                    f"{other_arm.name}\n  {run_line(other)}\n{arm.name}\n  {run_line(run)}",
                    "duplicate",
                    (other, run),
                )
            seen |= dict.fromkeys(keys, (arm, run))


def check_counts(arm: Arm) -> Iterator[Refusal]:
    """Contradictory logs, fewer than two complete runs, and losses without variance."""
    listing = f"{arm.name}\n" + "\n".join("  " + run_line(run) for run in arm.runs)
    for run in arm.attempts:
        if run.status == "contradictory":
            message = f"{arm.name}: {run.name} contradicts itself: {run.reason}; leave it out by glob"
            yield Refusal(message, listing, "contradictory", [run])
    done = arm.counted
    if len(done) < MIN_RUNS:
        failed = [f"{r.name} {r.status}: {r.reason}" for r in arm.attempts if not r.complete]
        why = f" ({some(failed)})" if failed else ""
        yield Refusal(
            f"{arm.name}: {len(done)} complete run(s) of {len(arm.attempts)}{why};"
            f" a comparison needs at least {MIN_RUNS} complete runs in each arm, add runs",
            listing,
            "few-runs",
        )
        return
    found = values(arm, "metric")
    if found is None:
        known = sorted(set.intersection(*(set(run.metrics) for run in done)))
        raise InputError(
            f"--metric {printable(arm.metric)}: not in every log of {arm.name};"
            f" they hold {', '.join(known)}: choose one of these"
        )
    if sample_sd(found) == 0:
        what = "losses" if arm.metric == "val_loss" else f"values of {arm.metric}"
        message = f"{arm.name}: all {len(done)} {what} are {found[0]}: no variance, no t-test; add runs"
        yield Refusal(message, listing, "no-variance", done)


def check_pair(base: Arm, arm: Arm, ignore: set[str]) -> Iterator[Refusal]:
    """Arms whose times or losses do not measure the same thing, and times without variance."""
    if not (base.counted and arm.counted):
        return
    ours, theirs = traits(arm.counted[0]), traits(base.counted[0])
    for key in ("hardware", "recipe", "data", "target", "validation interval"):
        if key not in ignore and ours[key] and theirs[key] and ours[key] != theirs[key]:
            yield Refusal(
                f"{base.name} and {arm.name} differ in {key}: {theirs[key]} against {ours[key]};"
                " both arms of a comparison share it, run both alike or pass one arm at a time",
                "\n".join(arm_line(a) for a in (base, arm)),
                "different",
            )
    times = [[run.seconds for run in a.counted] for a in (base, arm)]
    if None not in times[0] + times[1] and sample_sd(times[0]) == sample_sd(times[1]) == 0:
        yield Refusal(
            f"{base.name} and {arm.name}: no variance in the times of either arm, no t-test; add runs",
            "\n".join(arm_line(a) for a in (base, arm)),
            "no-variance",
        )


def refusals(arms: list[Arm], ignore: set[str]) -> Iterator[Refusal]:
    """Every reason not to average or compare these arms, duplicates first."""
    yield from check_duplicates(arms)
    for arm in arms:
        yield from check_mixed(arm, ignore)
        yield from check_counts(arm)
    for arm in arms[1:]:
        yield from check_pair(arms[0], arm, ignore)


def find_target(arms: list[Arm], given: float | None) -> tuple[float | None, str]:
    """(target, where it comes from); None for contest logs, which are judged by bits per byte."""
    if given is not None:
        return given, "--target"
    if arms[0].metric != "val_loss":
        return None, f"none: the logs' target is about val_loss, --target gives one for {arms[0].metric}"
    logged = next((run.head["target"] for run in arms[0].counted if "target" in run.head), None)
    if logged is not None:
        return logged, f"the 'target:' line of the logs of {arms[0].name}"
    if any(run.kind == "contest" for arm in arms for run in arm.counted):
        return None, "none: contest logs are judged by val_bpb; give --target to test their losses"
    return DEFAULT_TARGET, "the default, because the logs name none"


# 4. report --------------------------------------------------------------------------------------------------


@dataclass
class Row:
    """One row of the table at full precision; None where there is no clock or a test does not apply."""

    runs: int
    time_mean: float | None
    time_sd: float | None
    time_diff: float | None
    time_p: float | None
    time_p_two_sided: float | None
    loss_mean: float
    loss_sd: float
    loss_diff: float
    loss_p: float | None
    bpb_mean: float | None
    bpb_sd: float | None
    bpb_diff: float | None


def values(arm: Arm, key: str) -> list[float] | None:
    """One number of each counted run, or None if a run has none; `metric` is the one compared."""
    metric = arm.metric if key == "metric" else key
    found = [getattr(run, key) if key in MEASURES else run.metrics.get(metric) for run in arm.counted]
    return None if None in found else found


def time_p_of(test: str, times: list[float], base_times: list[float]) -> float:
    """The p-value of an unpaired --time-test."""
    if test == "student":
        from recordbook.statistics import student

        return student(times, base_times).p
    return (welch_two_sided if test == "welch-two-sided" else welch_less)(times, base_times)


def paired_p(base: Arm, arm: Arm) -> float:
    """The one-sided p-value of the paired test; refused if the runs were not interleaved in pairs."""
    from recordbook import statistics
    from recordbook.verdict import paired_times

    try:
        return statistics.paired(*paired_times(base, arm)).test.p
    except ValueError as error:
        raise InputError(f"--time-test paired: {error}; choose another test") from None


def make_row(arm: Arm, base: Arm, target: float | None, test: str = "welch-less") -> Row:
    """The statistics of an arm against the first row and the target."""
    losses, base_losses = values(arm, "metric"), values(base, "metric")
    times, base_times = values(arm, "seconds"), values(base, "seconds")
    bpbs, base_bpbs = values(arm, "bpb"), values(base, "bpb")
    tested = bool(times and base_times and arm is not base)
    sign, time_p = -1 if arm.higher else 1, None
    if tested:
        time_p = paired_p(base, arm) if test == "paired" else time_p_of(test, times, base_times)
    return Row(
        runs=len(losses),
        time_mean=mean(times) if times else None,
        time_sd=sample_sd(times) if times else None,
        time_diff=mean(times) - mean(base_times) if times and base_times else None,
        time_p=time_p,
        time_p_two_sided=welch_two_sided(times, base_times) if tested else None,
        loss_mean=mean(losses),
        loss_sd=sample_sd(losses),
        loss_diff=mean(losses) - mean(base_losses),
        loss_p=one_sample_less([sign * x for x in losses], sign * target) if target is not None else None,
        bpb_mean=mean(bpbs) if bpbs else None,
        bpb_sd=sample_sd(bpbs) if bpbs else None,
        bpb_diff=mean(bpbs) - mean(base_bpbs) if bpbs and base_bpbs else None,
    )


def table(names: list[str], rows: list[Row], metric: str = "val_loss", markdown: bool = False) -> str:
    """The community's table to its last digit; bits per byte follow where every run has them."""
    loss = METRIC_TITLES.get(metric, metric)
    columns = [
        ("Runs", "runs"),
        ("Time \u03bc", "time_mean"),
        ("Time \u03c3", "time_sd"),
        ("Time +/-", "time_diff"),
        ("Time p", "time_p"),
        (f"{loss} \u03bc", "loss_mean"),
        (f"{loss} \u03c3", "loss_sd"),
        (f"{loss} +/-", "loss_diff"),
        ("p", "loss_p"),
    ]
    if len(rows) == 1:
        columns = [column for column in columns if column[1] != "time_p"]
    if metric != "val_bpb" and any(row.bpb_mean is not None for row in rows):
        columns += [("bpb \u03bc", "bpb_mean"), ("bpb \u03c3", "bpb_sd"), ("bpb +/-", "bpb_diff")]

    def cell(row: Row, key: str) -> str:
        value = getattr(row, key)
        if value is None:
            return "NaN" if key == "time_p" and row is rows[0] and row.time_mean is not None else "-"
        return str(value) if key == "runs" else f"{value:.4f}"

    if markdown:
        cells = [
            [name.replace("|", "\\|"), *(cell(row, key) for _, key in columns)]
            for name, row in zip(names, rows, strict=True)
        ]
        heads = [["", *(title for title, _ in columns)], ["---", *["---:"] * len(columns)]]
        return "\n".join(f"| {' | '.join(line)} |" for line in [*heads, *cells])
    width = max(map(len, names))
    lines = [" " * width, *(name.ljust(width) for name in names)]
    for title, key in columns:
        cells = [title, *(cell(row, key) for row in rows)]
        size = max(len(title) + 1, *map(len, cells))
        lines = [f"{line} {text:>{size}}" for line, text in zip(lines, cells, strict=True)]
    return "\n".join(lines)


def run_line(run: Run) -> str:
    """One run in one line: when, how it ended, what it measured, its file."""
    seconds = f"{run.seconds:.3f} s" if run.seconds is not None else "no time"
    loss = f"loss {run.loss:.4f}" if run.loss is not None else "no loss"
    if run.val and not run.complete:
        seconds += f" at step {run.val[-1].step}"
    bpb = f" bpb {run.bpb:.4f}" if run.bpb is not None else ""
    steps = f"step {run.steps_done}/{run.steps_planned}" if run.steps_done is not None else "no steps"
    why = f" ({run.reason})" if run.reason else ""
    when = run.head.get("started", "no date")
    return f"{when:<19}  {run.status:<11} {steps}  {loss}{bpb}  {seconds:>10}  {run.name}{printable(why)}"


def arm_line(arm: Arm) -> str:
    """What the runs of an arm share, and how many of them count."""
    facts = [v for k, v in traits((arm.counted or arm.attempts)[0]).items() if v and k != "clock"]
    return f"{arm.name}: {len(arm.attempts)} attempts, {len(arm.counted)} complete; {', '.join(facts)}"


def lists(arm: Arm) -> str:
    """The losses and times of one arm as the community prints them."""

    def show(key: str) -> str:
        found = values(arm, key)
        return f"[{', '.join(f'{x:.4f}' for x in found)}]" if found else "-"

    lines = [f"{arm.name}:", f"  losses = {show('metric')}", f"  times  = {show('seconds')}"]
    if values(arm, "bpb") and arm.metric != "val_bpb":
        lines.append(f"  bpb    = {show('bpb')}")
    return "\n".join([*lines, f"  (n = {len(arm.counted)})"])


def explain(arms: list[Arm], rows: list[Row], target: float | None, origin: str, test: str) -> list[str]:
    """Which test each p is, with its value at full use, and where the target comes from."""
    lines = []
    if len(arms) > 1:
        question = "differ from" if test == "welch-two-sided" else "below"
        what = f"is the mean time below that of {arms[0].name}?"
        if test == "welch-two-sided":
            what = f"does the mean time {question} that of {arms[0].name}?"
        lines.append(f"Time p: {TIME_TESTS[test]}: {what}")
    for arm, row in zip(arms, rows, strict=True):
        if row.time_p is not None:
            lines.append(f"  {arm.name}: p = {row.time_p:.4g} (two-sided: {row.time_p_two_sided:.4g})")
        if row.time_mean is None:
            lines.append(f"  {arm.name}: no times, because {arm.counted[0].kind} logs hold no train_time")
    if target is not None:
        side, way = ("above", "greater") if arms[0].higher else ("below", "less")
        what = "loss" if arms[0].metric == "val_loss" else arms[0].metric
        lines.append(
            f"p: one-sample t-test, one-sided ({way}): is the mean {what} {side} the target {target:g}?"
        )
        lines += [f"  {a.name}: p = {r.loss_p:.4g}" for a, r in zip(arms, rows, strict=True)]
    lines.append(f"Target: {f'{target:g}, ' if target is not None else ''}{origin}.")
    labels = sorted({run.loss_from for arm in arms for run in arm.counted})
    lines.append(f"Losses: {', '.join(labels)} of each run. +/- is against the first row.")
    return lines


@dataclass
class Outcome:
    """All that one call found; `rows` is empty if a verdict was asked of runs that may not be averaged."""

    arms: list[Arm]
    rows: list[Row]
    target: float | None
    origin: str
    time_test: str
    metric: str
    preface: list[str]  # how --by made the arms
    refused: list[Refusal]
    findings: list  # recordbook.integrity.Finding
    words: list[str]
    verdicts: list  # recordbook.verdict.Verdict; empty if none was asked for
    rules: list[str]  # of each verdict, in one line

    @property
    def code(self) -> int:
        """The exit code: 0 if every verdict accepts, 1 if one rejects, else 4."""
        outcomes = {verdict.outcome for verdict in self.verdicts} - {"ACCEPT"}
        return 1 if "REJECT" in outcomes else 4 if outcomes else 0


def finding_line(finding) -> str:
    """A finding with its level, and the files that its sentence does not name."""
    unnamed = [name for name in finding.files if name not in finding.text]
    files = f" ({some(unnamed)})" if unnamed else ""
    return f"{finding.level}: {finding.text}{files}"


def sections(outcome: Outcome) -> list[tuple[str, list[str]]]:
    """(title, lines) of all that is printed below the table; no title for what needs none."""
    arms, found = outcome.arms, []
    if outcome.rows:
        found += [("", lists(arm).split("\n")) for arm in arms]
        found.append(("", explain(arms, outcome.rows, outcome.target, outcome.origin, outcome.time_test)))
        found.append(("In plain words:", outcome.words))
    for arm in arms:
        found.append(("", [arm_line(arm), *("  " + run_line(run) for run in arm.runs)]))
    failed = [(arm, run) for arm in arms for run in arm.runs if not run.complete]
    left = [f"{arm.name}: {run.name} {run.status}: {printable(run.reason)}" for arm, run in failed]
    found.append(("Not counted:", left))
    found.append(("Findings:", [finding_line(finding) for finding in outcome.findings]))
    for verdict, rules in zip(outcome.verdicts, outcome.rules, strict=True):
        title = f"Verdict on {verdict.candidate}: {verdict.line}"
        found.append((title, [f"({rules})", *(f"{r.state}: {r.text}" for r in verdict.reasons)]))
    return [(title, lines) for title, lines in found if lines]


def report(outcome: Outcome) -> str:
    """Everything that is printed: table, lists, tests, every run launched, findings, verdict."""
    parts = ["\n".join(outcome.preface)] if outcome.preface else []
    if outcome.rows:
        parts.append(table([arm.name for arm in outcome.arms], outcome.rows, outcome.metric))
    else:
        parts += dict.fromkeys(refusal.evidence for refusal in outcome.refused if refusal.code == "mixed")
    for title, lines in sections(outcome):
        parts.append("\n".join([title, *("  " + line for line in lines)] if title else lines))
    return "\n\n".join(parts)


def report_markdown(outcome: Outcome) -> str:
    """The same for a pull request: table, verdict and findings in Markdown, the rest as it is."""
    parts, below = [], []
    if outcome.rows:
        parts.append(table([arm.name for arm in outcome.arms], outcome.rows, outcome.metric, markdown=True))
    for title, lines in sections(outcome):
        if title:
            items = "\n".join(f"- {line.strip()}" for line in lines)
            (parts if title.startswith("Verdict") else below).append(f"**{title}**\n\n{items}")
        else:
            below.append("\n".join(["```", *lines, "```"]))
    preface = ["\n".join(["```", *outcome.preface, "```"])] if outcome.preface else []
    return "\n\n".join(preface + parts + below)


def as_json(outcome: Outcome, statistics: dict) -> dict:
    """The same at full precision; a number that is not finite becomes null."""
    arms, rows = outcome.arms, outcome.rows or [None] * len(outcome.arms)
    tests = TESTS | ({"time_p": TIME_TESTS[outcome.time_test]} if outcome.time_test != "welch-less" else {})

    def finite(value):
        return value if value is None or math.isfinite(value) else None

    def points(found: list[Point]) -> list[list]:
        return [[p.step, finite(p.loss), finite(p.seconds)] for p in found]

    def record(run: Run) -> dict:
        facts = ("name", "path", "kind", "status", "reason", "source", "sources", "digest", "steps_done")
        facts += ("steps_planned", "loss_from", "peak_mib", "interval", "hardware")
        measured = {key: finite(getattr(run, key)) for key in ("loss", "seconds", "bpb")}
        return (
            {key: getattr(run, key) for key in facts}
            | measured
            | {
                "metrics": run.metrics,
                "counted": run.complete,
                "head": run.head,
                "val": points(run.val),
                "train": points([run.train_last] if run.train_last else []),
                "train_lines": run.train_lines,
            }
        )

    return {
        "schema": SCHEMA,
        "target": outcome.target,
        "target_from": outcome.origin,
        "metric": outcome.metric,
        "tests": tests,
        "points": ["step", "loss", "seconds"],
        "findings": [vars(finding) | {"files": list(finding.files)} for finding in outcome.findings],
        "plain_words": outcome.words,
        "statistics": statistics,
        "verdicts": [verdict_json(verdict) for verdict in outcome.verdicts],
        "exit_code": outcome.code,
        "arms": [
            {
                "name": arm.name,
                "argument": arm.arg,
                "attempts": len(arm.attempts),
                "complete": len(arm.counted),
                "row": row and vars(row),
                "losses": values(arm, "metric"),
                "times": values(arm, "seconds"),
                "bpb": values(arm, "bpb"),
                "runs": [record(run) for run in arm.runs],
            }
            for arm, row in zip(arms, rows, strict=True)
        ],
    }


def verdict_json(verdict) -> dict:
    """A verdict without what stands elsewhere in the file."""
    from recordbook.verdict import plain

    kept = {key: value for key, value in vars(verdict).items() if key not in ("findings", "statistics")}
    return plain(kept | {"line": verdict.line, "p": verdict.p})


# 5. command line --------------------------------------------------------------------------------------------


def replace_file(path: str, write) -> None:
    """Write a file under a temporary name beside it, then rename: a failure leaves nothing half-written."""
    folder, name = os.path.split(path)
    temporary = os.path.join(folder, f".{os.getpid()}.{name}")
    try:
        write(temporary)
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(
            f"{printable(path)}: cannot be written ({error.strerror}); name another file"
        ) from None
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def save_plot(arms: list[Arm], target: float | None, path: str) -> None:
    """Draw the comparison to a file."""
    try:
        from recordbook.plots import figure_of

        figure = figure_of(arms, target)
    except ModuleNotFoundError as error:
        lacking = "recordbook/ beside compare_runs.py"
        need = f"pip install {error.name}" if error.name == "matplotlib" else lacking
        raise InputError(f"--plot: {error.name} is missing; it needs {need}") from None
    import warnings

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # a name's script that the font lacks
        replace_file(path, lambda temporary: figure.savefig(temporary))


def check_output(path: str | None, option: str, suffixes: tuple[str, ...], arms: list[Arm]) -> None:
    """Refuse an output path that cannot work or that would overwrite a log."""
    if path is None:
        return
    if suffixes and not path.lower().endswith(suffixes):
        raise InputError(f"{option} {printable(path)}: the name must end in one of {', '.join(suffixes)}")
    special = os.path.lexists(path) and (os.path.islink(path) or not os.path.isfile(path))
    if special or not os.path.isdir(os.path.dirname(path) or "."):
        what = "not a file in an existing folder, or a link or a device, which is not replaced"
        raise InputError(f"{option} {printable(path)}: {what}; create the folder first or name another file")
    if os.path.realpath(path) in {log for arm in arms for log in arm.seen}:
        raise InputError(f"{option} {printable(path)}: is one of the logs; name another file")


def target_number(text: str) -> float:
    """--target as a finite, positive number."""
    value = parse_number(text.encode())
    if value is None or not 0 < value < math.inf:
        raise InputError(
            f"--target {printable(text)}: must be a finite positive loss, such as {DEFAULT_TARGET}"
        )
    return value


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str):
        raise InputError(f"{message}; see compare_runs.py --help")


HELP = """columns:
  Runs             complete runs of the arm; only these are averaged
  Time \u03bc, Time \u03c3   mean and sample sd (n - 1) of train_time at the last validation, in seconds
  Time +/-         mean time minus that of the first row
  Time p           Welch's t-test, one-sided: small if the arm is faster than the first row
  Loss \u03bc, Loss \u03c3   mean and sample sd of the last validation loss
  Loss +/-         mean loss minus that of the first row
  p                one-sample t-test, one-sided: small if the mean loss is below the target
  bpb ...          the same for bits per byte, where every run of an arm has it

arms:
  a folder (searched with its subfolders for .txt and .log, plain or .gz, .xz, .zst), a file, a quoted glob,
  or one of these with @<first digits of the source hash>; all runs of an arm share source, steps, validation
  interval, hardware, recipe, data and target, or the arm is refused and its groups are shown

verdict:
  --claim systems  the maths is the same: faster, and the loss not worse by the track's margin
  --claim ml       it is not: faster, the target reached, faster at equal loss if the track says its price
  --claim score    equal budget: the metric better by more than the track's gain (needs --track)
  --track NAME     rules of records/NAME/track.toml; without it alpha 0.01, margin 0.002, 4 runs of each arm
  Each reason passes, fails, or stays open for want of runs. What a verdict refuses to rest on is a finding.

subcommands:
  compare_runs.py accept SERIES ...     judge a series of run.sh and write its record if a track accepts it
  compare_runs.py verify [RECORD ...]   recompute records from their logs
  compare_runs.py report [--out FILE]   one HTML page of the record book
  compare_runs.py diff A B              what changed between the sources of two logs
  compare_runs.py replay LOG FOLDER     write the sources of a log into a folder, ready to run
  compare_runs.py plan ...              how many runs a claim needs

examples:
  compare_runs.py logs/baseline logs/candidate
  compare_runs.py 'logs/ab/base_*' 'logs/ab/new_*' --plot ab.png
  compare_runs.py logs/ab@1e951856 logs/ab@c09cf162 --json ab.json
  compare_runs.py logs/ab --by source --track sprint --claim systems
  compare_runs.py logs/ab --by steps=1670,1705
  compare_runs.py logs/candidate --target 3.28

exit codes: 0 ACCEPT or no verdict asked, 1 REJECT, 4 INCONCLUSIVE,
  2 bad input (one line on stderr says what, why and what to do)"""
BY = ("source", "steps", "prefix")
NUMBERING = re.compile(r"[-_.]?([0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f-]+|[0-9a-f]{8,}|\d[\dT:_-]*)$")


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = Parser(
        prog="compare_runs.py",
        description="Compare training runs from their logs. The first arm is the baseline.",
        epilog=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "baseline", metavar="BASELINE", help="the first arm: every +/- and Time p is against it"
    )
    parser.add_argument("candidates", metavar="CANDIDATE", nargs="*", default=[], help="further arms")
    add = parser.add_argument
    add("--by", metavar="KIND", help="split the logs by source, steps or prefix; =A,B picks and orders")
    add("--track", metavar="NAME", help="the rules of a verdict: a track's name or its track.toml")
    add("--claim", choices=("systems", "ml", "score"), help="ask for a verdict on this kind of claim")
    add("--time-test", choices=tuple(TIME_TESTS), help="what Time p is; the verdict's, without a track")
    add("--metric", metavar="KEY", help="key of the step lines to compare, val_loss if left out; KEY:higher")
    add("--alpha", metavar="X", help="level of each test of the verdict, without a track")
    add("--target", metavar="X", help="target loss; else that of the logs, else 3.28")
    add("--json", metavar="FILE", help="write every number, run, finding and verdict to FILE")
    add("--plot", metavar="FILE", help="draw the runs to FILE (.png, .svg or .pdf)")
    add("--markdown", action="store_true", help="print Markdown")
    return parser.parse_args(argv)


def group_key(run: Run, kind: str) -> str | None:
    """The group of a run for --by; None if its log does not say."""
    if kind == "source":
        return run.source and run.source[:12]
    if kind == "steps":
        return None if run.steps_planned is None else str(run.steps_planned)
    name = LOG_END.sub("", run.name)
    folder, _, file = name.rpartition("/")
    return os.path.join(folder, NUMBERING.sub("", file)) or "(no prefix)"


def split_arms(pooled: list[Arm], by: str) -> tuple[list[Arm], list[str]]:
    """(arms, lines that show them) by source, steps or prefix: the first to start is the baseline."""
    kind, _, wanted = by.partition("=")
    if kind not in BY:
        raise InputError(f"--by {printable(by)}: must be one of {', '.join(BY)}; choose one")
    groups: dict[str, list[Run]] = {}
    for run in sorted((run for arm in pooled for run in arm.attempts), key=started):
        if (key := group_key(run, kind)) is not None:
            groups.setdefault(key, []).append(run)
    if not groups:
        raise InputError(f"--by {printable(by)}: no log names its {kind}; name the arms by folder or glob")
    for pick in filter(None, wanted.split(",")):
        found = [key for key in groups if key == pick or (kind == "source" and key.startswith(pick[:12]))]
        if len(found) != 1:
            known = ", ".join(groups)
            raise InputError(
                f"--by {printable(by)}: {printable(pick)} fits {len(found)} of {printable(known)}"
            )
        groups[found[0]] = groups.pop(found[0])  # to the end, in the order given
    if wanted:
        groups = dict(list(groups.items())[-len(list(filter(None, wanted.split(",")))) :])
    seen = set().union(*(arm.seen for arm in pooled))
    arms = [Arm(pooled[0].arg, f"{kind} {key}", runs, seen) for key, runs in groups.items()]
    shown = [f"  {arm.name}: {len(arm.runs)} run(s): {some([r.name for r in arm.runs])}" for arm in arms]
    return arms, [f"Arms by {kind}, the first is the baseline:", *map(printable, shown)]


def started(run: Run) -> tuple[str, str]:
    """Sort key: when a run started, as far as its log says it, then its name. In UTC if it has a zone."""
    text = run.head.get("started", "~")
    with contextlib.suppress(ValueError, OverflowError):
        when = datetime.fromisoformat(text)
        text = when.astimezone(UTC).isoformat() if when.tzinfo else text
    return text, run.name


def metric_of(text: str | None) -> tuple[str, bool]:
    """(key, higher is better) of --metric: accuracies are better when higher, all else when lower."""
    key, _, side = (text or "val_loss").partition(":")
    if side not in ("", "lower", "higher") or not re.fullmatch(r"[A-Za-z]\w*", key):
        raise InputError(f"--metric {printable(text)}: must be a key such as val_bpb, or val_acc:higher")
    return key, side == "higher" if side else key.endswith(("acc", "accuracy"))


def find_rules(name: str):
    """The track of a name, a folder or a file."""
    from recordbook.tracks import FILE, find_track, load_track

    if os.path.isdir(name) and os.path.isfile(os.path.join(name, FILE)):
        return load_track(os.path.join(name, FILE))
    return load_track(name) if name.endswith(".toml") or os.path.isfile(name) else find_track(name)


def check_rules(args: argparse.Namespace, track) -> None:
    """A track's rules are not changed from the command line; without a claim --alpha means nothing."""
    if track is None:
        if args.alpha is not None and args.claim is None:
            raise InputError("--alpha: is for a verdict; give --claim systems or --claim ml too")
        return
    key, higher = metric_of(args.metric)
    fixed = {
        "--alpha": args.alpha is None,
        "--target": args.target is None or parse_number(args.target.encode()) == track.target,
        "--time-test": args.time_test in (None, track.time_test),
        "--metric": args.metric is None or (key, higher) == (track.metric, track.direction == "higher"),
    }
    if changed := [option for option, kept in fixed.items() if not kept]:
        raise InputError(f"{', '.join(changed)}: the rules of track {track.name} are fixed; leave it out")
    if args.claim is None and len(track.claims) > 1:
        known = " or ".join(f"--claim {claim}" for claim in track.claims)
        raise InputError(f"--track {track.name}: accepts several claims; add {known}")
    args.claim = args.claim or track.claims[0]


def alpha_number(text: str | None) -> float | None:
    """--alpha as a number in (0, 0.5)."""
    value = None if text is None else parse_number(text.encode())
    if text is not None and (value is None or not 0 < value < 0.5):
        raise InputError(f"--alpha {printable(text)}: must be above 0 and below 0.5, such as 0.01")
    return value


def load_arms(args: argparse.Namespace) -> tuple[list[Arm], list[str]]:
    """(arms of the command line, how --by made them)."""
    arms, preface = [load_arm(arg) for arg in (args.baseline, *args.candidates)], []
    if args.by:
        arms, preface = split_arms(arms, args.by)
    else:
        name_arms(arms)
    return arms, preface


def judge_arms(args: argparse.Namespace, track, outcome: Outcome, ignore: set[str]) -> None:
    """Fill in the verdicts."""
    from recordbook import verdict

    if len(outcome.arms) < 2:
        raise InputError(f"--claim {args.claim}: a verdict needs a baseline and a candidate; name two arms")
    target = outcome.target
    track = track or verdict.rules(outcome.arms[0], target, alpha_number(args.alpha), args.time_test)
    outcome.verdicts = verdict.decide_all(outcome.arms, track, args.claim, ignore)
    outcome.rules = [verdict.described(track, v.claim, v.alpha) for v in outcome.verdicts]


def describe(args: argparse.Namespace, track, outcome: Outcome) -> None:
    """Fill in findings and plain words. compare_runs.py alone, without recordbook/, prints the table."""
    try:
        from recordbook import integrity, verdict
    except ModuleNotFoundError as error:
        if not str(error.name).startswith("recordbook"):
            raise
        outcome.words = ["recordbook/ is not beside compare_runs.py, so the runs were not checked further"]
        return
    outcome.findings = integrity.find(outcome.arms, args.claim, track, outcome.refused)
    if outcome.rows:
        outcome.words = verdict.words(outcome.arms, outcome.target)


def statistics_of(args: argparse.Namespace, track, outcome: Outcome) -> dict:
    """{candidate: every statistic} for --json."""
    from recordbook import verdict

    if not outcome.rows:
        return {}
    base, found = outcome.arms[0], {v.candidate: v.statistics for v in outcome.verdicts}
    rules = track or verdict.rules(base, outcome.target, alpha_number(args.alpha), args.time_test)
    for arm in outcome.arms[1:]:
        found.setdefault(arm.name, verdict.analyse(base, arm, rules))
    return verdict.plain(found)


def compare(argv: list[str] | None) -> tuple[str, int]:
    """Load, check, test, judge, write the files asked for; returns the report and the exit code."""
    args = parse_args(argv)
    given = target_number(args.target) if args.target is not None else None
    alpha_number(args.alpha)
    track = find_rules(args.track) if args.track is not None else None
    check_rules(args, track)
    metric, higher = (track.metric, track.direction == "higher") if track else metric_of(args.metric)
    check_output(args.plot, "--plot", PLOT_SUFFIXES, [])
    arms, preface = load_arms(args)
    check_output(args.json, "--json", (), arms)
    check_output(args.plot, "--plot", PLOT_SUFFIXES, arms)
    for arm in arms:
        arm.metric, arm.higher = metric, higher
    ignore = {"target"} if given is not None or track or metric != "val_loss" else set()
    refused = list(refusals(arms, ignore)) if args.claim else []
    if not args.claim:
        for refusal in refusals(arms, ignore):
            refusal.evidence = "\n".join([*preface, refusal.evidence])
            raise refusal
    target, origin = (track.target, f"track {track.name}") if track else find_target(arms, given)
    test = (track.time_test if track else args.time_test) or "welch-less"
    shown = (
        "welch-less" if test == "paired" and args.claim else test
    )  # the verdict says why there are no pairs
    rows = [] if refused else [make_row(arm, arms[0], target, shown) for arm in arms]
    outcome = Outcome(arms, rows, target, origin, shown, metric, preface, refused, [], [], [], [])
    describe(args, track, outcome)
    if args.claim:
        judge_arms(args, track, outcome, ignore)
    if args.json:
        content = as_json(outcome, statistics_of(args, track, outcome))
        text = json.dumps(content, indent=1, allow_nan=False) + "\n"
        replace_file(args.json, lambda temporary: Path(temporary).write_text(text))
    if args.plot:
        if not rows:
            raise InputError("--plot: these runs cannot be averaged, see the verdict; leave --plot out")
        save_plot(arms, target, args.plot)
    return (report_markdown if args.markdown else report)(outcome), outcome.code


def subcommand(argv: list[str]) -> tuple[str, int] | None:
    """(text, exit code) of a subcommand; None if the first word is none."""
    name, rest = (argv[0], argv[1:]) if argv else ("", [])
    if name == "accept":
        from recordbook import accept

        return accept.command(rest)
    if name == "verify":
        from recordbook import verify

        return verify.command(rest)
    if name == "report":
        from recordbook import report as page

        return page.command(rest), 0
    if name in ("diff", "replay"):
        from recordbook import sources

        text = (sources.diff_command if name == "diff" else sources.replay_command)(rest)
        return text.rstrip("\n"), 0
    if name == "plan":
        from recordbook import runs

        return "", runs.main(["plan", *rest])
    return None


def main(argv: list[str] | None = None) -> int:
    """Print the report; the exit code, which is 2 with one line on stderr. A closed pipe is no error."""
    sys.stdout.reconfigure(errors="backslashreplace")
    text, code, error = "", 0, None
    argv = sys.argv[1:] if argv is None else list(argv)
    try:
        text, code = subcommand(argv) or compare(argv)
    except InputError as refusal:
        text, error = getattr(refusal, "evidence", ""), refusal
    except ModuleNotFoundError as missing:
        error = InputError(f"package {missing.name} is not installed; pip install -r requirements.txt")
    try:
        if text:
            print(text, flush=True)
    except OSError as failure:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the exit would flush it once more
        if not isinstance(failure, BrokenPipeError):
            error = error or InputError(f"stdout: cannot be written ({failure.strerror}); send it elsewhere")
    if error:
        print(f"compare_runs.py: {error}", file=sys.stderr)
    return 2 if error else code


if __name__ == "__main__":
    sys.modules["compare_runs"] = sys.modules["__main__"]  # recordbook imports this file: one InputError
    sys.exit(main())
