"""Series of timed runs with a plan written before the first run and a ledger of every attempt.

    python -m recordbook.runs [TRAINER.py] [N]  N runs of train_gpt.py; `bash run.sh` hands over to this
    python -m recordbook.runs ab A.py B.py N    two trainers, interleaved ABBA BAAB, seeds 1..N equal in both
    python -m recordbook.runs aa TRAINER.py N   one trainer as both arms: the noise floor of this machine
    python -m recordbook.runs plan ...          how many runs a claim needs

A series has a folder: `plan.json` with `plan.json.sha256` (what was decided, written before the first run),
`ledger.jsonl` (a `start` and an `end` line for each attempt, failed and interrupted ones included), and a
folder of logs for each arm. `compare_runs.py` reads the logs. Order of this file: plan, ledger, one run, what
is measured, what is shown, the series, command line.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from compare_runs import STATUS, InputError, Run, parse_log, printable, read_log
from recordbook import gpu

PROJECT = Path(__file__).resolve().parents[1]
PLAN_FORMAT, LEDGER_FORMAT, NOISE_FORMAT = "splits.plan/1", "splits.ledger/1", "splits.noise/1"
GPU_LINE = "GPUs: "  # how the line begins that a series adds to a log behind its closing one
PLAN, PLAN_HASH, LEDGER, NOISE = "plan.json", "plan.json.sha256", "ledger.jsonl", "noise.json"
KERNELS = "triton_kernels.py"
ENDED = ("done", "diverged", "crashed")  # ended by themselves: these count
MOST_RUNS = 10_000
TRAINING_STEP = re.compile(rb"^step:[1-9]\d*/\d+ ", re.M)
ANY_STEP = re.compile(rb"^step:\d+/\d+ val_loss", re.M)  # the first: the clock starts about here
KILLED = (signal.SIGINT, signal.SIGTERM, signal.SIGKILL, signal.SIGHUP)
TESTS = {
    "open": "none fixed: a sample of one trainer, which may grow; only an always-valid p allows for that",
    "fixed": "paired t-test and Welch's t-test of train_time, one-sided (less), once, after all pairs",
    "until-decided": "always-valid t of the pair differences of train_time, both directions, after each pair",
}


def say(text: str) -> None:
    """One line to the terminal; a reader that has gone does not end the series."""
    try:
        print(f"run.sh: {text}\n", end="", flush=True)  # one write: lanes do not tear each other's lines
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w")


def now() -> str:
    """The time of day with its zone, as the logs write it."""
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


def digest_of(data: bytes) -> str:
    """SHA-256 in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def write_atomically(path: Path, text: str) -> None:
    """Write under a temporary name, flush to the disk, rename."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


# 1. plan --------------------------------------------------------------------------------------------------


@functools.cache
def asked(trainer: str, digest: str) -> tuple[Path, ...]:
    """The files that a trainer says it logs: `python TRAINER --sources` prints one path a line."""
    done = subprocess.run([sys.executable, trainer, "--sources"], capture_output=True, text=True)
    files = tuple(map(Path, done.stdout.splitlines())) if done.returncode == 0 else ()
    if not files or not all(file.is_file() for file in files):
        rule = f"a {KERNELS} beside it, or must print the files that it logs when started with --sources"
        raise InputError(f"{printable(trainer)} needs {rule}; add one of the two")
    return files


def files_of(trainer: str) -> dict[str, str]:
    """{file name: SHA-256} of what a trainer logs: itself and the kernels beside it, or what it names."""
    path = Path(trainer)
    if not path.is_file():
        raise InputError(f"trainer {printable(trainer)} does not exist; name a Python file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            compile(path.read_bytes(), trainer, "exec")
        kernels = path.parent / KERNELS
        files = (path, kernels) if kernels.is_file() else asked(trainer, digest_of(path.read_bytes()))
        return {file.name: digest_of(file.read_bytes()) for file in files}
    except (SyntaxError, ValueError) as error:
        line = f", line {error.lineno}" if getattr(error, "lineno", None) else ""
        raise InputError(f"{printable(trainer)}{line}: is no Python ({error.args[0]}); correct it") from None


def source_of(files: dict[str, str]) -> str:
    """One hash of all files of an arm, equal to what compare_runs.py makes of the log's header."""
    return digest_of("".join(f"{name} {sha}\n" for name, sha in sorted(files.items())).encode())


def pattern(kind: str, pairs: int) -> str:
    """Arms in the order of their runs: ABBA BAAB, so that over four runs a steady drift cancels."""
    if kind == "series":
        return "A" * pairs
    return "".join(("AB", "BA", "BA", "AB")[i % 4] for i in range(pairs))


def make_plan(args: argparse.Namespace, place: Place) -> dict:
    """Everything that is decided before the first run; `place` is where it runs."""
    most = args.max or args.runs
    rule = "open" if args.kind == "series" else "until-decided" if args.until_decided else "fixed"
    arms = []
    for letter, trainer in zip("AB", args.trainers, strict=False):
        files = files_of(trainer)
        name = f"{letter}-{Path(trainer).stem}-{source_of(files)[:8]}"
        facts = {"arm": letter, "name": name, "trainer": os.path.relpath(trainer)}
        arms.append(facts | {"source": source_of(files), "files": files})
    if args.kind == "series":
        arms[0]["name"] = args.out.name
    stop = {"rule": rule, "least": args.runs, "most": most}
    if rule == "until-decided":
        stop["loss_margin"] = args.loss_margin
    return {
        "format": PLAN_FORMAT,
        "kind": args.kind,
        "made": now(),
        "arms": arms,
        "runs": args.runs,
        "order": pattern(args.kind, most),
        "seeds": list(range(1, most + 1)),
        "test": TESTS[rule],
        "alpha": args.alpha,
        "stop": stop,
        "warm_up": place.gpus > 0 and args.kind != "series",
        "recipe": place.recipe,
        "data": os.path.relpath(place.data),
        "data_manifest": place.manifest,
        "gpus": place.gpus,
        "lanes": args.lanes,
        "machine": place.machine,
    }


def arms_apart(trainers: Sequence[str]) -> None:
    """Refuse two arms of the same bytes: only aa compares a program with itself."""
    a, b = (sorted(files_of(trainer).values()) for trainer in trainers)
    if a == b:
        names = f"{printable(trainers[0])} and {printable(trainers[1])}"
        raise InputError(f"{names} are the same program; change one, or measure the noise: aa TRAINER.py N")


def differences(old: dict, new: dict) -> list[str]:
    """What a new plan has otherwise than the one in the folder, in words."""
    if old.get("format") != new["format"]:
        return [f"its format is {old.get('format')!r}, this program writes {new['format']!r}"]
    found = []
    for was, is_ in zip(old["arms"], new["arms"], strict=False):
        for name in sorted({*was["files"], *is_["files"]}):
            a, b = (arm["files"].get(name, "no such file") for arm in (was, is_))
            if a != b:
                found.append(f"arm {is_['arm']}: {name} was {a[:12]} and is {b[:12]}")
    skip = {"format", "made", "arms", "order", "seeds", "test"}
    if old["stop"]["rule"] == new["stop"]["rule"] == "open":
        skip |= {"runs", "stop"}  # a series of one trainer may grow
    for key in new:
        if key not in skip and old.get(key) != new[key]:
            found.append(f"{key} was {json.dumps(old.get(key))} and is {json.dumps(new[key])}")
    return found


def plan_text(plan: dict) -> str:
    """The bytes that are hashed."""
    return json.dumps(plan, indent=1, allow_nan=False) + "\n"


def write_plan(folder: Path, plan: dict) -> None:
    """The hash first: where there is a plan.json, there is its hash."""
    text = plan_text(plan)
    write_atomically(folder / PLAN_HASH, f"{digest_of(text.encode())}  {PLAN}\n")
    write_atomically(folder / PLAN, text)


def read_plan(folder: Path) -> dict | None:
    """The plan of a folder, None if there is none; InputError if it is not what was hashed."""
    path, remedy = folder / PLAN, "move the folder away and begin anew"
    if not path.exists():
        return None
    try:
        data, stated = path.read_bytes(), (folder / PLAN_HASH).read_text(encoding="utf-8", errors="replace")
        plan = json.loads(data)
    except OSError as error:
        what = printable(str(error.filename))
        raise InputError(f"{what}: cannot be read ({error.strerror}); restore it, or {remedy}") from None
    except ValueError:
        raise InputError(f"{printable(str(path))}: is no JSON; restore it, or {remedy}") from None
    if stated.split()[:1] != [digest_of(data)]:
        raise InputError(f"{printable(str(path))}: was altered after it was hashed; restore it, or {remedy}")
    return plan


# 2. ledger ------------------------------------------------------------------------------------------------


class Ledger:
    """The attempts of a series, one JSON line an event; only appended to. One writer at a time.

    The file's lock lives as long as the file is open, in this process or in a run that outlived it; `lock` is
    for the lanes of this process.
    """

    def __init__(self, folder: Path) -> None:
        self.path, self.events, self.lock = folder / LEDGER, [], threading.RLock()
        try:
            self.file = self.path.open("a+b")
        except OSError as error:
            raise InputError(f"{printable(str(self.path))}: {error.strerror}; check its rights") from None
        try:
            import fcntl

            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:  # no locks on this system: two writers at once are the user's care
            pass
        except OSError:
            self.file.close()
            what = f"{printable(str(folder))}: a run of this series is still going on"
            raise InputError(f"{what}; wait for it, or end it and start again") from None
        self._read()

    def _read(self) -> None:
        self.file.seek(0)
        data = self.file.read()
        whole, _, torn = data.rpartition(b"\n")
        if torn:  # a write that a power cut halved: its attempt has at most a start, and is treated as such
            say(f"{self.path}: its last line is cut and is dropped")
            self.file.truncate(len(data) - len(torn))
        for number, line in enumerate(whole.split(b"\n") if whole else [], 1):
            try:
                event = json.loads(line)
                if not isinstance(event, dict) or "event" not in event:
                    raise ValueError
            except ValueError:
                where = f"{printable(str(self.path))}, line {number}"
                raise InputError(f"{where}: is no event; restore it, or move the folder away") from None
            self.events.append(event)

    def append(self, event: str, **facts: object) -> dict:
        """Write one line and wait for the disk."""
        entry = {"event": event, **facts}
        with self.lock:
            try:
                self.file.write(json.dumps(entry, allow_nan=False).encode() + b"\n")
                self.file.flush()
                os.fsync(self.file.fileno())
            except OSError as error:
                why = f"cannot be written ({error.strerror})"
                raise InputError(f"{printable(str(self.path))}: {why}; make room and start again") from None
            self.events.append(entry)
        return entry

    def ends(self, role: str | None = None) -> list[dict]:
        """The `end` events, of one role or of all."""
        return [e for e in self.events if e["event"] == "end" and role in (None, e["role"])]

    def open_starts(self) -> list[dict]:
        """Starts without an end: the runner itself was killed."""
        ended = {e["attempt"] for e in self.ends()}
        return [e for e in self.events if e["event"] == "start" and e["attempt"] not in ended]

    def next_attempt(self) -> int:
        """Numbers from 1, never used twice."""
        return 1 + max((e["attempt"] for e in self.events if "attempt" in e), default=0)

    def start(self, **facts: object) -> dict:
        """The `start` line of a new attempt, with its number."""
        with self.lock:
            return self.append("start", attempt=self.next_attempt(), **facts)


# 3. one run -----------------------------------------------------------------------------------------------


def outcome(log: Path, code: int | None, asked: bool) -> tuple[str, str]:
    """(status, reason) of a run: what its log's closing line says, else what its exit code means."""
    data = log.read_bytes() if log.exists() else None
    told = re.sub(rb"\n" + GPU_LINE.encode() + rb"[^\n]*\Z", b"", data.rstrip()) if data else b""
    last = told.rpartition(b"\n")[2]
    if match := STATUS.fullmatch(last):
        reason = (match[3] or b"").decode("utf-8", "replace").removeprefix(": ")
        return (match[1] or match[2]).decode(), reason
    if code is None:
        return "interrupted", "the runner ended before the run did"
    number = -code if code < 0 else code - 128
    if asked or number in KILLED:
        by = f"by {signal.Signals(number).name}" if number in KILLED else "by a signal to the series"
        return "interrupted", f"ended {by}, without a closing line"
    if data is None:
        return ("refused" if code == 2 else "crashed"), f"exit code {code} and no log"
    return "crashed", f"exit code {code} and no closing line"


def measured(log: Path) -> Run | None:
    """What the log of a run says; None where there is none."""
    return parse_log(read_log(str(log)), log.name, str(log))[0] if log.exists() else None


@dataclass
class Lane:
    """GPUs and CPU cores on which one run at a time goes on. The only lane has all of both."""

    number: int
    gpus: str | None = None  # its CUDA_VISIBLE_DEVICES; None: that of this process
    cores: frozenset[int] | None = None  # None: those of this process
    sampler: gpu.Sampler | None = None
    child: subprocess.Popen | None = None

    def settle(self) -> None:
        """Keep this thread, and what it starts, to the lane's cores: on Linux, where a thread has its own."""
        if self.cores and hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, self.cores)

    def environment(self) -> dict[str, str] | None:
        """Of the runs on this lane; None is this process's own."""
        return None if self.gpus is None else {**os.environ, "CUDA_VISIBLE_DEVICES": self.gpus}


@dataclass
class Series:
    """A series at work: its plan, ledger and arms; `asked` counts the signals that it was sent."""

    folder: Path
    plan: dict
    ledger: Ledger
    lanes: list[Lane]
    asked: int = 0
    count: int = 0  # runs of each arm that this start makes, if nothing decides earlier
    cache: dict[str, Run] = field(default_factory=dict)

    def arm_folder(self, letter: str) -> Path:
        """Where the logs of an arm are; those of one trainer alone lie in the series' own folder."""
        return self.folder if self.plan["kind"] == "series" else self.folder / self.arm(letter)["name"]

    def arm(self, letter: str) -> dict:
        return next(arm for arm in self.plan["arms"] if arm["arm"] == letter)

    def counted(self, letter: str, seed: int) -> dict | None:
        """The end of the attempt that counts, None while there is none."""
        ends = [e for e in self.ledger.ends("run") if e["counted"]]
        return next((e for e in ends if e["arm"] == letter and e["seed"] == seed), None)

    def result(self, end: dict) -> Run | None:
        """The run behind an end event."""
        if end["log"] not in self.cache:
            self.cache[end["log"]] = measured(self.folder / end["log"])
        return self.cache[end["log"]]

    def on_signal(self, number: int, frame: object) -> None:
        """Pass a signal on to the runs, which end their step and close the log; the third one kills them."""
        self.asked += 1
        soft = signal.SIGINT if number == signal.SIGINT else signal.SIGTERM
        for child in [lane.child for lane in self.lanes]:
            if child and child.poll() is None:
                child.send_signal(signal.SIGKILL if self.asked > 2 else soft)

    def command(self, letter: str, seed: int, log: Path) -> list[str]:
        """What is executed: the trainer by itself, or by torchrun on several GPUs."""
        plan, trainer = self.plan, self.arm(letter)["trainer"]
        options = ["--recipe", plan["recipe"], "--data", plan["data"], "--seed", str(seed), "--out", str(log)]
        several = ["torchrun", "--standalone", f"--nproc_per_node={plan['gpus']}"]
        return [*(several if plan["gpus"] > 1 else [sys.executable]), trainer, *options]

    def execute(
        self, command: list[str], log: Path, lane: Lane, stop_at_first_step: bool
    ) -> tuple[int, float | None]:
        """(exit code, when the timed loop began) of one process, which gets a group of its own: a Ctrl-C
        reaches it once, through this process."""
        began, stopped, kept = None, False, (self.ledger.file.fileno(),)
        try:
            child = subprocess.Popen(command, process_group=0, pass_fds=kept, env=lane.environment())
        except OSError as error:
            raise InputError(f"{printable(command[0])}: cannot be started ({error.strerror})") from None
        lane.child = child
        if self.asked:  # the signal came before there was a run to pass it on to
            child.send_signal(signal.SIGINT)
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = child.wait(timeout=1)
                lane.child = None
                return code, began
            if (began is None or (stop_at_first_step and not stopped)) and log.exists():
                text = log.read_bytes()
                began = began or (time.time() if ANY_STEP.search(text) else None)
                if stop_at_first_step and not stopped and TRAINING_STEP.search(text):
                    stopped = True
                    child.send_signal(signal.SIGINT)

    def attempt(self, letter: str, seed: int, position: int, role: str, lane: Lane, what: str) -> dict:
        """One run with a log of its own, and its two lines in the ledger; returns the `end` line."""
        arm, folder = self.arm(letter), self.arm_folder(letter)
        if files_of(arm["trainer"]) != arm["files"]:
            what = f"{printable(arm['trainer'])} or a file that it logs changed since the plan was made"
            raise InputError(f"{what}; restore it, or start a new series with --out FOLDER")
        stem = f"run-{seed:03d}"
        if role == "warm-up":
            folder, stem = folder.parent / "warm-up" / folder.name, "warm-up"
            folder.mkdir(parents=True, exist_ok=True)
        log, tries = folder / f"{stem}.txt", 1
        while log.exists():
            tries += 1
            log = folder / f"{stem}-try{tries}.txt"
        say(f"{arm['name']}: {what} -> {log}")
        which = {"role": role, "arm": letter, "seed": seed, "position": position, "lane": lane.number}
        which |= {"log": os.path.relpath(log, self.folder), "source": arm["source"]}
        bound = {"format": LEDGER_FORMAT, "plan": digest_of((self.folder / PLAN).read_bytes())}
        which["attempt"] = self.ledger.start(**which, started=now(), **bound)["attempt"]
        if lane.sampler:
            lane.sampler.start()
        clock = time.perf_counter()
        code = began = None
        try:
            code, began = self.execute(self.command(letter, seed, log), log, lane, role == "warm-up")
        finally:
            wall = round(time.perf_counter() - clock, 3)
            state = lane.sampler.stop(began or math.inf) if lane.sampler else None
            if code is None:  # it could not be started
                facts = {"status": "refused", "reason": "could not be started", "exit_code": None}
                self.ledger.append("end", **which, **facts, counted=False, wall_s=wall, ended=now())
        if state and log.exists():
            write_atomically(log.with_name(f"{log.stem}.gpu.json"), json.dumps(state, indent=1) + "\n")
            if log.read_bytes().endswith(b"\n"):  # else the run was cut off within a line
                with log.open("a", encoding="utf-8") as file:
                    file.write(f"{GPU_LINE}{gpu.in_words(state)}\n")
        return self.close(which, log, code, {"wall_s": wall, "ended": now(), "gpu": state})

    def close(self, which: dict, log: Path, code: int | None, facts: dict) -> dict:
        """The `end` line of an attempt."""
        status, reason = outcome(log, code, bool(self.asked))
        run, number = None, {}
        with contextlib.suppress(InputError):  # a log that a power cut filled with zeros
            run = measured(log)
        if run:
            shown = {"loss": run.loss, "seconds": run.seconds} if run.complete else {}
            number = {"log_sha256": run.digest, **{k: v for k, v in shown.items() if v is not None}}
        counted = which["role"] == "run" and status in ENDED and run is not None
        what = {"status": status, "reason": reason, "exit_code": code, "counted": counted}
        return self.ledger.append("end", **which, **what, **number, **facts)

    def close_lost(self) -> None:
        """End what a killed runner left open; a run that finished without it counts."""
        for start in self.ledger.open_starts():
            keys = ("attempt", "role", "arm", "seed", "position", "lane", "log", "source")
            which = {key: start[key] for key in keys}
            facts = {"wall_s": None, "ended": None, "found": now(), "gpu": None}
            end = self.close(which, self.folder / start["log"], None, facts)
            say(f"{start['log']} was left behind by an earlier start; the ledger has it as {end['status']}")


# 4. what is measured --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pairs:
    """Pairs of complete runs, base and new, in order; `failed` counts the failed runs of each arm."""

    base: list[Run]
    new: list[Run]
    failed: dict[str, int]

    def both(self, key: str) -> tuple[list[float], list[float]]:
        """(new, base) values of the pairs in which both have one."""
        values = [(getattr(b, key), getattr(a, key)) for a, b in zip(self.base, self.new, strict=True)]
        kept = [pair for pair in values if None not in pair]
        return [b for b, _ in kept], [a for _, a in kept]


def pairs_of(series: Series, count: int) -> Pairs:
    """The first `count` pairs."""
    base, new, failed = [], [], {"A": 0, "B": 0}
    for seed in range(1, count + 1):
        found = {}
        for letter in "AB":
            end = series.counted(letter, seed)
            run = series.result(end) if end else None
            if run and run.complete:
                found[letter] = run
            elif end:
                failed[letter] += 1
        if len(found) == 2:
            base.append(found["A"])
            new.append(found["B"])
    return Pairs(base, new, failed)


def decide(pairs: Pairs, alpha: float, loss_margin: float | None) -> dict:
    """Always-valid p-values of the pair differences, and what they decide: 'faster', 'not faster' or None.

    Faster: p <= alpha for a lower time, and, with a margin, for a loss not worse by the margin. Not faster:
    p <= alpha for a higher time, or for a loss worse by more than the margin. A failed run of B is an
    infinite time, so B is not found faster beside one.
    """
    from recordbook.statistics import always_valid_pairs

    found: dict = {"pairs": len(pairs.new), "decided": None}
    new, base = pairs.both("seconds")
    if not new:
        return found
    found["p_faster"] = always_valid_pairs(new, base, alternative="less").p_final
    found["p_slower"] = always_valid_pairs(new, base, alternative="greater").p_final
    is_faster, is_slower = found["p_faster"] <= alpha, found["p_slower"] <= alpha
    if loss_margin is not None:
        new, base = pairs.both("loss")
        found["p_loss_held"] = always_valid_pairs(new, base, loss_margin, "less").p_final
        found["p_loss_worse"] = always_valid_pairs(new, base, loss_margin, "greater").p_final
        is_faster &= found["p_loss_held"] <= alpha
        is_slower |= found["p_loss_worse"] <= alpha
    if is_slower:
        found["decided"] = "not faster"
    elif is_faster and not pairs.failed["B"]:
        found["decided"] = "faster"
    return found


# 5. what is shown -----------------------------------------------------------------------------------------


def moments(values: list[float]) -> tuple[str, str]:
    """(mean, sample sd) as the table prints them; a dash where there is none."""
    from recordbook.statistics import mean_sd

    if not values:
        return "-", "-"
    centre, sd = mean_sd(values) if len(values) > 1 else (values[0], None)
    return f"{centre:.4f}", "-" if sd is None else f"{sd:.4f}"


def short_table(rows: dict[str, list[Run]], failed: dict[str, int]) -> list[str]:
    """compare_runs.py's first columns, for any number of runs; the first row is the baseline."""
    lines = [
        [
            "",
            "Runs",
            "failed",
            "Time \u03bc",
            "Time \u03c3",
            "Time +/-",
            "Loss \u03bc",
            "Loss \u03c3",
            "Loss +/-",
        ]
    ]
    first: dict[str, float] = {}
    for (name, runs), count in zip(rows.items(), failed.values(), strict=True):
        cells = [name, str(len(runs)), str(count)]
        for key in ("seconds", "loss"):
            values = [getattr(run, key) for run in runs]
            values = [] if None in values else values
            centre = math.fsum(values) / len(values) if values else None
            base = first.setdefault(key, centre) if centre is not None else None
            cells += [*moments(values), "-" if base is None else f"{centre - base:.4f}"]
        lines.append(cells)
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return [
        "  ".join(
            [line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))]
        )
        for line in lines
    ]


def live_table(series: Series, count: int) -> str:
    """After pair `count`: both arms, and the differences of the pairs. Arms of one run are shown too."""
    from recordbook.statistics import NoVariance, one_sample

    pairs, rows = pairs_of(series, count), {}
    for letter in "AB":
        ends = [series.counted(letter, seed) for seed in range(1, count + 1)]
        runs = [series.result(end) for end in ends if end]
        rows[series.arm(letter)["name"]] = [run for run in runs if run and run.complete]
    lines = [f"after pair {count} of {series.plan['stop']['most']}:", *short_table(rows, pairs.failed)]
    new, base = pairs.both("seconds")
    if new:
        gaps = [b - a for b, a in zip(new, base, strict=True)]
        centre, sd = moments(gaps)
        line = f"B - A within pairs: {centre} s (sd {sd}, n = {len(gaps)})"
        if len(gaps) > 1:
            with contextlib.suppress(NoVariance):
                test = one_sample(gaps, 0.0)
                line += f", 95 % interval {test.low:.4f} to {test.high:.4f}"
        lines.append(line)
        found = decide(pairs, series.plan["alpha"], series.plan["stop"].get("loss_margin"))
        valid = {key[2:].replace("_", " "): value for key, value in found.items() if key.startswith("p_")}
        words = ", ".join(f"{key} {value:.4g}" for key, value in valid.items())
        lines.append(f"always-valid p, which may be looked at after each pair: {words}")
    return "\n        ".join(lines)


# 6. the series --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """Where and on what a series runs."""

    recipe: str
    data: str
    manifest: str | None  # SHA-256 of the data's manifest, as the logs print it
    gpus: int  # of one run
    machine: list[str]  # UUIDs of the GPUs; the host's name without any


def count_gpus() -> int:
    """What torch sees, asked in a process of its own: this one loads no torch and holds no GPU."""
    code = "import torch; print(torch.cuda.device_count())"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if run.returncode or not run.stdout.strip().isdigit():
        why = printable((run.stderr.strip() or "no number").split("\n")[-1])
        raise InputError(f"torch cannot count the GPUs ({why}); bash run.sh setup installs it")
    return int(run.stdout)


def choose(recipe: str | None, data: str | None, gpus: int) -> tuple[str, str, str]:
    """(recipe, data folder, name for the logs) where the command line leaves them open."""
    if recipe is None:
        if gpus == 0 or data:
            recipe = "sprint" if gpus else "tiny"
        elif Path("data/fineweb10B/manifest.json").exists():
            recipe = "short"
        else:
            recipe = "tiny"
            say("no FineWeb in data/fineweb10B (get it: python data/fineweb.py), so recipe tiny on its text")
            say("  with shards of your own: bash run.sh --recipe sprint --data DIR")
    if data:
        return recipe, data, f"{recipe}-{Path(data).resolve().name}"
    if recipe != "tiny":
        return recipe, "data/fineweb10B", recipe
    if code := subprocess.run([sys.executable, "data/prepare.py", "--default"]).returncode:
        raise SystemExit(130 if code in (130, -signal.SIGINT) else 2)  # it has said why
    return recipe, "data/default", recipe


def shares(items: Sequence, count: int) -> list[list]:
    """`count` runs of equal length; a rest is left over."""
    size = len(items) // count
    return [list(items[i * size : (i + 1) * size]) for i in range(count)]


def make_lanes(count: int, gpus: int) -> tuple[list[Lane], str]:
    """(lanes, why the GPUs are not sampled); GPUs and cores are split evenly."""
    if count == 1:
        sampler, why = gpu.find() if gpus else (None, "no NVIDIA GPU here")
        return [Lane(1, sampler=sampler)], why
    if gpus == 0 or gpus % count:
        raise InputError(f"--lanes {count} must divide the number of GPUs, {gpus} here; change it")
    seen = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(gpus)))
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    lanes, why = [], ""
    for mine, core in zip(shares(seen.split(",")[:gpus], count), shares(cores, count), strict=True):
        sampler, why = gpu.find(",".join(mine))
        lanes.append(Lane(len(lanes) + 1, ",".join(mine), frozenset(core), sampler))
    return lanes, why


def settle(args: argparse.Namespace) -> tuple[Place, list[Lane]]:
    """Machine, recipe and data; fills args.out."""
    gpus = count_gpus()
    lanes, why = make_lanes(args.lanes, gpus)
    recipe, data, name = choose(args.recipe, args.data, gpus)
    if why:
        say(f"{why}, so clocks and temperatures are not sampled")
    manifest = Path(data) / "manifest.json"
    digest = digest_of(manifest.read_bytes()) if manifest.is_file() else None
    uuids = sorted({uuid for lane in lanes if lane.sampler for uuid in lane.sampler.uuids})
    machine = uuids or [socket.gethostname()]
    if args.out is None:
        if args.kind == "series":  # the hash of what runs, so that logs of two versions never mix
            label = f"{name}-{source_of(files_of(args.trainers[0]))[:8]}"
        else:
            trainers = args.trainers[: 1 if args.kind == "aa" else 2]
            label = "-".join([args.kind, name, *(Path(trainer).stem for trainer in trainers)])
        args.out = Path("logs") / label
    return Place(recipe, data, digest, gpus // args.lanes, machine), lanes


def open_series(args: argparse.Namespace, place: Place, lanes: list[Lane]) -> Series:
    """The series in its folder: a new one with its plan, or the one there, if its plan is the same."""
    folder, wanted = args.out, make_plan(args, place)
    if not (folder / PLAN).exists() and folder.is_dir() and any(folder.rglob("*.txt")):
        what = f"{printable(str(folder))}: holds logs that no plan and no ledger count"
        raise InputError(f"{what}; move it away, or name another folder with --out")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        ledger = Ledger(folder)
        plan = read_plan(folder)
        if plan is None:
            if ledger.events:
                what = f"{printable(str(folder))}: its ledger has runs but its plan is gone"
                raise InputError(f"{what}; restore {PLAN}, or move the folder away")
            write_plan(folder, wanted)
            plan = wanted
        series = Series(folder, plan, ledger, lanes)
        if changed := differences(plan, wanted):
            why = f"{printable(str(folder))}: a series with another plan: {printable('; '.join(changed))}"
            remedy = "repeat the command of that plan to go on with it, or name another folder with --out"
            raise InputError(f"{why}; {remedy}")
        for arm in plan["arms"]:
            series.arm_folder(arm["arm"]).mkdir(exist_ok=True)
    except OSError as error:
        why = f"{printable(str(folder))}: cannot be written ({error.strerror})"
        raise InputError(f"{why}; check permissions and space, or name another folder with --out") from None
    return series


class Interrupted(Exception):
    """A signal ended the series."""


def left(series: Series, runs: int) -> str:
    """How long `runs` more take, from those that there are."""
    walls = [e["wall_s"] for e in series.ledger.ends("run") if e["counted"] and e["wall_s"]]
    if not walls or not runs:
        return ""
    minutes = runs * math.fsum(walls) / len(walls) / 60 / len(series.lanes)
    return f", about {minutes:.0f} min left" if minutes >= 1 else ""


def run_one(series: Series, letter: str, seed: int, position: int, lane: Lane, role: str = "run") -> None:
    """One attempt of the series: what goes on, how it ended. Bad input and interruption end the series."""
    arm, total = series.arm(letter), series.count * len(series.plan["arms"])
    what = f"run {position} of {total}, seed {seed}" if role == "run" else "warm-up, which does not count"
    what += left(series, total - position + 1)
    what += f", lane {lane.number}" if len(series.lanes) > 1 else ""
    if series.asked:
        raise Interrupted
    end = series.attempt(letter, seed, position, role, lane, what)
    status, log, code = end["status"], end["log"], end["exit_code"]
    if end["gpu"] and role == "run":
        say(f"{GPU_LINE}{gpu.in_words(end['gpu'])}")
    if series.asked:
        raise Interrupted
    if status == "refused":
        raise SystemExit(2)  # the trainer has said why
    if not (series.folder / log).exists():
        raise InputError(f"{printable(arm['trainer'])}: {end['reason']}; a trainer writes a log to --out")
    if role == "warm-up":
        if status not in ("done", "interrupted"):
            raise InputError(
                f"the warm-up {printable(log)} {status} ({printable(end['reason'])}); see its end"
            )
    elif status == "interrupted":
        raise Interrupted
    elif status != "done":
        line = f"run {seed} of {arm['name']} {status} ({end['reason'] or f'exit code {code}'})"
        print(f"run.sh: {printable(line)}; it is kept and counted", file=sys.stderr)
        if code == 2:
            raise SystemExit(2)


def series_length(series: Series) -> int:
    """Runs that a series of one trainer has been extended to."""
    extended = [e["runs"] for e in series.ledger.events if e["event"] == "extend"]
    return max([series.plan["runs"], *extended])


def in_lanes(series: Series, jobs: Sequence[Callable[[Lane], object]]) -> list:
    """One job a lane, at the same time. All end before what one of them raised is raised here."""
    with ThreadPoolExecutor(len(jobs)) as pool:

        def job_on(job: Callable[[Lane], object], lane: Lane) -> object:
            lane.settle()
            return job(lane)

        futures = [pool.submit(job_on, *pair) for pair in zip(jobs, series.lanes, strict=False)]
    return [future.result() for future in futures]


def warm_up(series: Series) -> None:
    """Start each source once that has runs to make and was not yet started."""
    ends = series.ledger.ends("warm-up")
    warm = {e["source"] for e in ends if e["status"] in ("done", "interrupted")}
    cold = {}
    for position, letter in enumerate(pattern(series.plan["kind"], series.count), 1):
        seed = 1 + (position - 1) // len(series.plan["arms"])
        source = series.arm(letter)["source"]
        if source not in warm and not series.counted(letter, seed):
            cold.setdefault(source, (letter, seed, position))
    jobs = [lambda lane, one=one: run_one(series, *one, lane, "warm-up") for one in cold.values()]
    for first in range(0, len(jobs), len(series.lanes)):
        in_lanes(series, jobs[first : first + len(series.lanes)])


def run_seed(series: Series, seed: int, lane: Lane) -> bool:
    """The runs of one seed that are missing, one after the other; True if there were any."""
    arms, is_new = len(series.plan["arms"]), False
    order = pattern(series.plan["kind"], seed)[arms * (seed - 1) :]
    for position, letter in enumerate(order, arms * (seed - 1) + 1):
        if not series.counted(letter, seed):
            run_one(series, letter, seed, position, lane)
            is_new = True
    return is_new


def go(series: Series) -> dict | None:
    """All runs that are missing, in order; the decision that ended them early, if one did."""
    plan, ledger, stop, lanes = series.plan, series.ledger, series.plan["stop"], len(series.lanes)
    series.close_lost()
    if plan["warm_up"]:
        warm_up(series)
    for first in range(1, series.count + 1, lanes):
        seeds = range(first, min(first + lanes, series.count + 1))
        jobs = [lambda lane, seed=seed: run_seed(series, seed, lane) for seed in seeds]
        is_new = any(in_lanes(series, jobs))
        if len(plan["arms"]) == 2 and is_new:
            say(live_table(series, seeds[-1]))
        if stop["rule"] == "until-decided" and seeds[-1] >= stop["least"]:
            found = decide(pairs_of(series, seeds[-1]), plan["alpha"], stop["loss_margin"])
            if found["decided"]:
                if not any(e["event"] == "decision" for e in ledger.events):
                    ledger.append("decision", after=seeds[-1], **found, time=now())
                return found | {"after": seeds[-1]}
    return None


def alternating_pairs(counted: Sequence[tuple[dict, Run | None]]) -> Pairs:
    """The runs of one program as two arms, ABBA on each lane: a run and the next one there are a pair."""
    base, new = [], []
    for lane in sorted({end["lane"] for end, _ in counted}):
        here = [run for end, run in counted if end["lane"] == lane]
        for i in range(0, len(here) - 1, 2):
            a, b = here[i : i + 2] if i % 4 == 0 else reversed(here[i : i + 2])
            if a and a.complete and b and b.complete:
                base.append(a)
                new.append(b)
    return Pairs(base, new, {})


def measure_noise(series: Series) -> None:
    """What runs of one program as two arms say about this machine, to noise.json and the terminal."""
    from recordbook import noise

    ends = sorted((e for e in series.ledger.ends("run") if e["counted"]), key=lambda e: e["attempt"])
    counted, is_aa = [(end, series.result(end)) for end in ends], series.plan["kind"] == "aa"
    runs = [run for _, run in counted if run and run.complete and run.seconds is not None]
    pairs = pairs_of(series, series.plan["runs"]) if is_aa else alternating_pairs(counted)
    if not is_aa and len(pairs.both("seconds")[0]) < 2:
        return  # too few to say anything of a machine
    head = {"format": NOISE_FORMAT, "plan": digest_of((series.folder / PLAN).read_bytes())}
    floor = head | noise.floor(pairs, runs, series.plan["alpha"], same_seeds=is_aa)
    write_atomically(series.folder / NOISE, json.dumps(floor, indent=1, allow_nan=False) + "\n")
    print("\n" + noise.in_words(floor), flush=True)


def run_series(args: argparse.Namespace) -> int:
    """A series from its arguments to its table; the exit code."""
    place, lanes = settle(args)
    series = open_series(args, place, lanes)
    plan = series.plan
    series.count = args.runs if plan["stop"]["rule"] == "open" else plan["stop"]["most"]
    if plan["kind"] == "series" and args.runs > series_length(series):
        series.ledger.append("extend", runs=args.runs, time=now())
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, series.on_signal)
    say(f"plan {digest_of((series.folder / PLAN).read_bytes())[:12]} in {series.folder / PLAN}")
    try:
        decision = go(series)
    except Interrupted:
        print("run.sh: interrupted; the same command continues the series", file=sys.stderr)
        return 130
    finally:
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if decision:
        say(f"decided after {decision['after']} pairs: B is {decision['decided']} (alpha {plan['alpha']:g})")
    elif plan["stop"]["rule"] == "until-decided":
        say(f"not decided after {plan['stop']['most']} pairs, the most that the plan allows")
    if plan["stop"]["rule"] == "until-decided":
        say(
            "the p-values of the table below are for a number of runs fixed beforehand, so they do not decide"
        )
    if series.count == 1:
        more = "; bash run.sh 2 adds the second" if plan["kind"] == "series" else ""
        say(f"one run is no sample, so there is no table{more}")
        return 0
    sys.stdout.flush()
    arms = [str(series.arm_folder(arm["arm"])) for arm in plan["arms"]]
    code = subprocess.run([sys.executable, str(PROJECT / "compare_runs.py"), *arms]).returncode
    if plan["kind"] != "ab" and code == 0:
        measure_noise(series)
    return code


# 7. command line ------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str):
        message = re.sub(r"^argument (\S+): expected one argument$", r"\1 needs a value", message)
        message = re.sub(r"^unrecognized arguments: (\S+).*$", r"unknown argument '\1'", message)
        message = re.sub(r"^argument (--\S+): ", r"\1: ", message)
        raise InputError(f"{message}; see {self.prog} --help")


def whole(text: str, name: str = "number of runs") -> int:
    """A whole number from 1, without a leading zero."""
    if not re.fullmatch(r"[1-9]\d{0,8}", text) or int(text) > MOST_RUNS:
        raise InputError(
            f"{name} '{printable(text)}' must be a whole number from 1 to {MOST_RUNS}; change it"
        )
    return int(text)


def between(low: float, high: float, closed: bool = False) -> Callable[[str], float]:
    """A type for argparse: a number in an interval."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (low < value < high or (closed and value == low)):
            rule = f"must be a number {'from' if closed else 'above'} {low:g}"
            raise argparse.ArgumentTypeError(
                f"{printable(text)!r} {rule}" + (f" and below {high:g}" if high < 1e50 else "")
            )
        return value

    return parse


USAGE = {
    "series": "bash run.sh [TRAINER.py] [N] [--recipe R] [--data DIR]",
    "ab": "bash run.sh ab A.py B.py N [--recipe R] [--data DIR] [--until-decided --max M]",
    "aa": "bash run.sh aa TRAINER.py N [--recipe R] [--data DIR]",
    "plan": "bash run.sh plan --gain SECONDS --sd S [--seconds-per-run T --gpus G]",
}
ABOUT = {
    "series": "N runs (default 2) of train_gpt.py or of the trainer named, then the table of compare_runs.py "
    "(it may grow later) and, from two pairs of runs on, what they say as two arms of one program (A/A).",
    "ab": "N runs of each of two trainers, interleaved ABBA BAAB on this machine, seeds 1..N equal in both.",
    "aa": "One trainer as both arms, N pairs: sd of times and of pair differences, drift by order, the least "
    "gain that N pairs show, and how often the procedure accepts a gain that is none.",
    "plan": "How many runs, and how many GPU-minutes, a claim needs.",
}
NOTES = """A series lives in one folder: plan.json and its hash (written before the first run), ledger.jsonl
(every attempt, failed and interrupted ones too), a folder of logs for each arm. The same command continues a
series that was interrupted; N counts the runs that ended by themselves, whether they finished, diverged or
crashed. Another plan (sources, N, recipe, data, machine) in the same folder is refused. Nothing is deleted.
With GPUs, ab and aa first start each source once to fill its compile caches, and stop it with SIGINT when its
log shows the first training step: the trainer compiles everything before its clock starts. That attempt is
in the ledger as `warm-up`, and its log is outside the arms, in warm-up/. On a CPU nothing is compiled.
Exit codes: 0 done, 2 bad input or a refused comparison, 130 interrupted."""


def make_parser(kind: str) -> Parser:
    """The options of one kind of command."""
    raw = argparse.RawDescriptionHelpFormatter
    notes = NOTES if kind != "plan" else "Exit codes: 0 done, 2 bad input."
    prog = f"bash run.sh{'' if kind == 'series' else ' ' + kind}"
    parser = Parser(prog=prog, usage=USAGE[kind], description=ABOUT[kind], epilog=notes, formatter_class=raw)
    parser.allow_abbrev = False
    add = parser.add_argument
    if kind != "plan":
        add(
            "words",
            nargs="*",
            metavar={"series": "[TRAINER.py] N", "ab": "A.py B.py N", "aa": "TRAINER.py N"}[kind],
        )
        add("--recipe", metavar="R", help="default: tiny on a CPU; with GPUs short, or sprint with --data")
        add("--data", metavar="DIR", help="folder of shards; default: the recipe's own")
        at_once = "seeds at once, each on its share of GPUs and cores, where its pair stays; default 1"
        add("--lanes", default="1", metavar="L", help=at_once)
    if kind in ("ab", "aa"):
        add(
            "--out", type=Path, metavar="FOLDER", help=f"of the series; default logs/{kind}-RECIPE-TRAINER..."
        )
    if kind != "series":
        add(
            "--alpha",
            type=between(0, 0.5),
            default=0.01,
            metavar="P",
            help="level of each test; default 0.01",
        )
    if kind == "ab":
        until = "go on after N pairs until the always-valid p of the pair differences decides, either way"
        add("--until-decided", action="store_true", help=until)
        add("--max", metavar="M", help="pairs at most, with --until-decided")
        held = "with --until-decided: 'faster' also needs a loss that is not worse by X"
        add("--loss-margin", type=between(0, 1e50, closed=True), metavar="X", help=held)
    if kind == "plan":
        claim = parser.add_mutually_exclusive_group(required=True)
        positive = between(0, 1e50)
        claim.add_argument("--gain", type=positive, metavar="SECONDS", help="a gain in time between two arms")
        held = "distance below the target, or margin of non-inferiority"
        claim.add_argument("--loss-margin", type=positive, metavar="X", help=held)
        add("--sd", type=positive, required=True, metavar="S", help="sd of one run, in the unit of the claim")
        add("--power", type=between(0, 1), default=0.9, metavar="P", help="chance to show it; default 0.9")
        add("--seconds-per-run", type=positive, metavar="T", help="wall time of one run, start to end")
        add(
            "--gpus",
            type=int,
            choices=range(0, 100_001),
            default=1,
            metavar="G",
            help="of one run; default 1",
        )
    return parser


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line, checked as far as it goes without looking at the machine."""
    kind = argv[0] if argv and argv[0] in ("ab", "aa", "plan") else "series"
    args = make_parser(kind).parse_intermixed_args(list(argv[kind != "series" :]))
    args.kind = kind
    if kind == "plan":
        if not args.alpha < args.power:
            raise InputError(f"--power {args.power:g} must be above --alpha {args.alpha:g}; raise it")
        return args
    is_named = "".join(args.words[:1]).endswith(".py")
    trainers = {"series": int(is_named), "ab": 2, "aa": 1}[kind]
    if kind != "series" and len(args.words) < trainers + 1:
        what = "two trainer files" if kind == "ab" else "a trainer file"
        raise InputError(f"{kind} needs {what} and a number of runs: {USAGE[kind]}")
    args.trainers, numbers = args.words[:trainers] or ["train_gpt.py"], args.words[trainers:]
    if len(numbers) > 1:
        if all(number.isdigit() for number in numbers):
            raise InputError(f"two numbers of runs, {numbers[0]} and {numbers[1]}; give one")
        raise InputError(f"unknown argument '{printable(numbers[1])}'; see bash run.sh --help")
    if kind == "series" and numbers and not re.fullmatch(r"-?[0-9.]+", numbers[0]):
        raise InputError(f"unknown argument '{printable(numbers[0])}'; see bash run.sh --help")
    args.runs = whole(numbers[0]) if numbers else 2
    args.until_decided, args.loss_margin = (
        getattr(args, "until_decided", False),
        getattr(args, "loss_margin", None),
    )
    args.lanes = whole(args.lanes, "--lanes")
    args.max = whole(args.max, "--max") if getattr(args, "max", None) is not None else None
    args.alpha, args.out = getattr(args, "alpha", 0.01), getattr(args, "out", None)
    if kind == "aa" and args.runs < 2:
        raise InputError("number of runs '1' must be at least 2: one pair has no spread; change it")
    if args.until_decided and args.max is None:
        raise InputError("--until-decided needs --max M: the most pairs that you would pay for")
    if not args.until_decided and (args.max is not None or args.loss_margin is not None):
        raise InputError("--max and --loss-margin belong to --until-decided; add that, or leave them out")
    if args.max is not None and args.max < args.runs:
        raise InputError(f"--max {args.max} must be at least the number of pairs, {args.runs}; raise it")
    if args.out is not None and args.out.exists() and not args.out.is_dir():
        raise InputError(f"--out {printable(str(args.out))}: is a file; name a folder")
    for trainer in args.trainers:
        files_of(trainer)
    if kind == "ab":
        arms_apart(args.trainers)
    if kind == "aa":
        args.trainers = args.trainers * 2
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code; bad input is one line on stderr. A first word `check` only looks at the arguments."""
    words = list(sys.argv[1:] if argv is None else argv)
    only_check = words[:1] == ["check"]
    try:
        args = parse(words[only_check:])
        if only_check:
            return 0
        if args.kind == "plan":
            from recordbook.planning import in_words

            print(in_words(args))
            return 0
        return run_series(args)
    except (ValueError, OSError) as error:  # InputError, and what statistics.py refuses
        print(f"run.sh: error: {error}", file=sys.stderr)
        return 2
    except SystemExit as end:  # --help, or a program of the series that has said why
        return end.code
    except KeyboardInterrupt:
        print("run.sh: interrupted; the same command continues the series", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
