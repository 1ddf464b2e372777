"""Findings: what the logs themselves say for or against a comparison, each with the files it is about.

`find(arms, ...)` looks at parsed arms (compare_runs.Arm), the ledger and the plan beside their logs, and
returns one Finding a fact. A level is what the finding does to a verdict: "blocks" it, "warns", or "notes".
What compare_runs.py refuses for the plain table arrives here as its Refusal and blocks.

Contents: 1 levels, 2 machine and settings, 3 runs of an arm, 4 order, 5 ledger and plan, 6 track, 7 all.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

from compare_runs import LOG_END, PACKINGS, SETTINGS, Arm, Refusal, Run, printable, some, started, values
from recordbook.drift import blocked_order, drift, drift_rule, outliers
from recordbook.tracks import Track

BLOCKS, WARNS, NOTES = "blocks", "warns", "notes"

# 1. levels --------------------------------------------------------------------------------------------------

# code: (level for a claim without a track, level under a track, whose records must prove themselves)
LEVELS = {
    "mixed": (BLOCKS, BLOCKS),  # runs of an arm differ in source, steps, evaluation, hardware, data, ...
    "different": (BLOCKS, BLOCKS),  # arms that do not measure the same thing
    "duplicate": (BLOCKS, BLOCKS),
    "contradictory": (BLOCKS, BLOCKS),
    "truncated": (BLOCKS, BLOCKS),
    "few-runs": (BLOCKS, BLOCKS),
    "no-variance": (BLOCKS, BLOCKS),
    "no-clock": (BLOCKS, BLOCKS),
    "failed": (WARNS, WARNS),  # counted as an infinite time and loss by the verdict
    "interrupted": (WARNS, WARNS),
    "machine": (BLOCKS, BLOCKS),
    "lanes": (NOTES, NOTES),  # the same GPUs of one host in every arm, equally often
    "machine-unknown": (WARNS, BLOCKS),
    "partly-logged": (WARNS, BLOCKS),
    "host-name": (NOTES, NOTES),  # containers of one machine have different names
    "software": (WARNS, WARNS),
    "source-unknown": (WARNS, BLOCKS),
    "same-seed": (BLOCKS, BLOCKS),
    "settings": (WARNS, WARNS),
    "gpu-state": (WARNS, WARNS),  # clocks or throttling of the arms differ
    "steps": (NOTES, NOTES),
    "steps-systems": (BLOCKS, BLOCKS),
    "same-source": (WARNS, WARNS),
    "dirty": (WARNS, WARNS),
    "no-total": (WARNS, WARNS),
    "unused": (WARNS, WARNS),
    "order-unknown": (WARNS, WARNS),
    "blocked-order": (WARNS, WARNS),
    "drift": (BLOCKS, BLOCKS),  # blocked order and a drift that may be the gain
    "drifting": (NOTES, NOTES),
    "outlier": (WARNS, WARNS),
    "held-up": (WARNS, WARNS),  # a run lost time in stretches in which the others of its arm did not
    "ledger": (BLOCKS, BLOCKS),  # cannot be read, or does not agree with the logs
    "ledger-failed": (WARNS, WARNS),
    "ledger-other": (WARNS, WARNS),
    "plan": (BLOCKS, BLOCKS),
    "unfinished": (BLOCKS, BLOCKS),
    "track": (BLOCKS, BLOCKS),
    "track-unknown": (WARNS, WARNS),
}
UNDECIDED = {
    "few-runs",
    "no-variance",
    "drift",
    "unfinished",
}  # other or more runs may still decide; all else is refused


@dataclass(frozen=True)
class Finding:
    """One fact about the evidence, in one sentence, with the files that it is about."""

    code: str
    level: str
    text: str
    files: tuple[str, ...] = ()

    @property
    def blocks(self) -> bool:
        """True if no claim can be accepted while this stands."""
        return self.level == BLOCKS


Fact = tuple[str, str, Iterable[Run]]  # code, sentence, runs


def counted(arms: Sequence[Arm]) -> list[tuple[Arm, Run]]:
    """Every run that counts, with its arm."""
    return [(arm, run) for arm in arms for run in arm.counted]


def names(runs: Iterable[Run], limit: int = 4) -> str:
    """Names of runs for a sentence."""
    return some([run.name for run in runs], limit)


# 2. machine and settings --------------------------------------------------------------------------------

MACHINE = ("uuids", "host", "driver", "torch", "cuda", "data")
SOFTWARE = ("triton", "python")


def by_value(runs: list[tuple[Arm, Run]], key: str) -> dict[str, list[tuple[Arm, Run]]]:
    """The runs by what their header says about `key`."""
    found = defaultdict(list)
    for arm, run in runs:
        found[str(run.head.get(key, "not logged"))].append((arm, run))
    return found


def group_text(groups: dict[str, list[tuple[Arm, Run]]]) -> str:
    """'node1 (base 2), node2 (new 2)'."""
    counts = {value: Counter(arm.name for arm, _ in found) for value, found in groups.items()}
    return some([f"{v} ({', '.join(f'{n} {c}' for n, c in of.items())})" for v, of in counts.items()])


def shared_evenly(arms: Sequence[Arm]) -> bool:
    """Did all arms use the same GPUs of one host equally often? Then these add noise, but favour no arm."""
    hosts = {run.head.get("host") for _, run in counted(arms)}
    used = [Counter(run.head.get("uuids") for run in arm.counted) for arm in arms]
    return len(hosts) == 1 and None not in hosts | used[0].keys() and all(u == used[0] for u in used)


def machine(arms: Sequence[Arm]) -> Iterator[Fact]:
    """All arms share one machine, driver, torch and data."""
    runs = counted(arms)
    one_set_of_gpus = len({run.head.get("uuids") for _, run in runs}) == 1 and "uuids" in runs[0][1].head
    for key in (*MACHINE, *SOFTWARE):
        groups = by_value(runs, key)
        if len(groups) == 1:
            continue
        code = "software" if key in SOFTWARE else "machine"
        if key == "host" and one_set_of_gpus:
            code = "host-name"
        elif key == "uuids" and shared_evenly(arms):
            code = "lanes"
        elif code == "machine" and len(groups.keys() - {"not logged"}) == 1:
            code = "partly-logged"
        largest = max(groups.values(), key=len)
        odd = [run for found in groups.values() if found is not largest for _, run in found]
        yield code, f"{key} differs between runs: {group_text(groups)}", odd
    if not any("uuids" in run.head or "host" in run.head for _, run in runs):
        text = "the logs name neither GPU UUIDs nor host: one machine for all runs cannot be checked"
        yield "machine-unknown", text, ()


def settings(arms: Sequence[Arm], claim: str | None) -> Iterator[Fact]:
    """What else differs between the arms, and what should differ but does not."""
    base = arms[0].counted[0]
    for arm in arms[1:]:
        run = arm.counted[0]
        for key in SETTINGS:
            if base.head.get(key) != run.head.get(key):
                pair = f"{base.head.get(key, 'not logged')} and {run.head.get(key, 'not logged')}"
                yield "settings", f"{arms[0].name} and {arm.name} differ in {key}: {pair}", ()
        if base.steps_planned != run.steps_planned:
            text = (
                f"{arms[0].name} and {arm.name} differ in steps: {base.steps_planned} and {run.steps_planned}"
            )
            systems = claim == "systems"
            why = ", so the maths is not the same and this is no systems claim; claim ml" if systems else ""
            yield "steps-systems" if systems else "steps", text + why, ()
        if run.source and run.source == base.source:
            text = f"{arm.name} has the source of {arms[0].name}: this is a baseline against itself (A/A)"
            yield "same-source", text, ()


CLOCK_GAP, THROTTLED = 0.01, 0.05  # relative gap of mean clocks; share of samples held back


def gpu_states(arm: Arm) -> tuple[list[float], set[str]]:
    """(mean clock of each GPU and run in MHz, what held GPUs back) from the files that run.sh leaves."""
    clocks, reasons = [], set()
    for run in arm.counted:
        path = LOG_END.sub("", run.path) + ".gpu.json"
        try:
            with open(path, encoding="utf-8") as file:
                for gpu in json.load(file)["gpus"]:
                    clocks += [gpu["sm_mhz"]["mean"]] if gpu["sm_mhz"] else []
                    shares = gpu["throttle"] or {}
                    reasons |= {k for k, share in shares.items() if share >= THROTTLED and k != "idle"}
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return clocks, reasons


def gpu_state(arms: Sequence[Arm]) -> Iterator[Fact]:
    """Do clocks and throttling differ between the arms? Only series of run.sh know."""
    (base_clocks, base_reasons), base = gpu_states(arms[0]), arms[0].name
    for arm in arms[1:]:
        clocks, reasons = gpu_states(arm)
        if not clocks or not base_clocks:
            continue
        means = [sum(found) / len(found) for found in (base_clocks, clocks)]
        if abs(means[1] - means[0]) > CLOCK_GAP * means[0]:
            shown = f"{means[0]:.0f} and {means[1]:.0f} MHz"
            yield "gpu-state", f"{base} and {arm.name} ran at different GPU clocks: {shown}", ()
        if reasons != base_reasons:
            shown = " and ".join(some(sorted(r)) or "nothing" for r in (base_reasons, reasons))
            yield "gpu-state", f"GPUs of {base} and {arm.name} were held back differently: {shown}", ()


# 3. runs of an arm ----------------------------------------------------------------------------------------


def failures(arms: Sequence[Arm]) -> Iterator[Fact]:
    """Runs that did not end well: cut logs say nothing, failed runs are infinite times."""
    for arm in arms:
        bad = [run for run in arm.attempts if not run.complete and run.status != "contradictory"]
        ended = endings(arms, bad) if bad else {}
        for run in bad:
            if ended[run.path] not in (*FAILED, "interrupted"):
                yield "truncated", f"{arm.name}: {run.name} is not whole: {printable(run.reason)}", [run]
        for code, kinds, what in (
            ("failed", FAILED, "failed run(s) count as infinite time and loss"),
            ("interrupted", ("interrupted",), "interrupted run(s) do not count"),
        ):
            if found := [run for run in bad if ended[run.path] in kinds]:
                each = some([f"{run.name} {ended[run.path]}" for run in found])
                yield code, f"{arm.name}: {len(found)} {what}: {each}", found


def failed_runs(arms: Sequence[Arm], arm: Arm) -> list[Run]:
    """Runs of an arm that failed by themselves, by their log or their ledger."""
    bad = [run for run in arm.attempts if not run.complete]
    ended = endings(arms, bad) if bad else {}
    return [run for run in bad if ended[run.path] in FAILED]


def repeats(arms: Sequence[Arm]) -> Iterator[Fact]:
    """Same seeds, uncommitted changes, formats that cannot show a cut, unknown sources."""
    for arm in arms:
        seeds = Counter(run.head["seed"] for run in arm.counted if "seed" in run.head)
        if repeated := [f"{seed} ({count} runs)" for seed, count in seeds.items() if count > 1]:
            text = f"{arm.name}: same-seed repeats are not independent losses: seed {some(repeated)}"
            yield "same-seed", text, [run for run in arm.counted if seeds[run.head.get("seed")] > 1]
        if dirty := [run for run in arm.counted if run.head.get("dirty") == "true"]:
            yield "dirty", f"{arm.name}: uncommitted changes in {names(dirty)}", dirty
        if any(run.kind == "llm.c" for run in arm.counted):
            why = "llm.c logs name no total of steps, so a cut at a validation would not show"
            yield "no-total", f"{arm.name}: {why}", ()
        if any(run.source is None for run in arm.counted):
            yield "source-unknown", f"{arm.name}: logs without a source: what ran cannot be checked", ()


def clocks(arms: Sequence[Arm]) -> Iterator[Fact]:
    """A claim is about time."""
    for arm in arms:
        if values(arm, "seconds") is None:
            yield "no-clock", f"{arm.name}: {arm.counted[0].kind} logs hold no train_time", ()


def unused(arms: Sequence[Arm]) -> Iterator[Fact]:
    """Logs in the same folders that no argument named."""
    used = {os.path.realpath(run.path) for arm in arms for run in arm.runs}
    if left := sorted({path for arm in arms for path in arm.seen} - used):
        shown = [printable(os.path.basename(path)) for path in left]
        yield "unused", f"{len(left)} log(s) in the same folders are in no arm: {some(shown, 8)}", ()


def odd_values(arms: Sequence[Arm]) -> Iterator[Fact]:
    """Outliers are flagged and counted, never dropped."""
    for arm in arms:
        for key, what, form in (("seconds", "time", ".3f"), ("metric", arm.metric, ".4f")):
            found = values(arm, key)
            if not found or len(found) < 3:
                continue
            check = outliers(found)
            for i in check.indices:
                far = f"{abs(found[i] - check.median):{form}} from the median {check.median:{form}}"
                text = f"{arm.name}: {arm.counted[i].name}: {what} {found[i]:{form}} is an outlier, {far}"
                yield "outlier", f"{text}; it counts", [arm.counted[i]]


SLOW, LOST = 1.25, 0.005  # times a stretch of steps usually takes; of a run's time, lost in such stretches


def held_up(arms: Sequence[Arm]) -> Iterator[Fact]:
    """Runs that something disturbed: stretches of steps far slower than in the other runs of the arm.

    Needs three runs, and clocks on the step lines. A slower GPU is slower all along, which is no finding.
    """
    for arm in arms:
        runs = [run for run in arm.counted if run.seconds]
        common = sorted(set.intersection(*(set(run.marks) for run in runs))) if len(runs) > 2 else []
        stretches = list(pairwise(common))
        took = [[run.marks[b] - run.marks[a] for run in runs] for a, b in stretches]
        usual = [median(times) for times in took]
        for i, run in enumerate(runs):
            ratios = [times[i] / most if most else 1.0 for times, most in zip(took, usual, strict=True)]
            slow = [k for k, ratio in enumerate(ratios) if ratio > SLOW * median(ratios)]
            lost = sum(took[k][i] - usual[k] * median(ratios) for k in slow)
            if lost < LOST * run.seconds:
                continue
            worst = max(slow, key=lambda k: took[k][i] - usual[k])
            text = (
                f"{arm.name}: {run.name} lost {lost:.1f} of its {run.seconds:.1f} s where other runs did not"
            )
            place = "steps {} to {}".format(*stretches[worst])
            much = f"{place}, for one, took {took[worst][i]:.1f} s, usually {usual[worst]:.1f}"
            yield "held-up", f"{text}: {much}; it counts", [run]


# 4. order ---------------------------------------------------------------------------------------------------


def run_order(arms: Sequence[Arm], all_attempts: bool = False) -> tuple[list[tuple[Arm, Run]], str]:
    """(runs in the order of their starts, where that comes from); ([], 'unknown') if nothing says it.

    File times count only if they lie apart as runs of one machine must: a copy or a checkout destroys them.
    """
    runs = [(a, r) for a in arms for r in (a.attempts if all_attempts else a.counted)]
    if all(run.head.get("started") for _, run in runs):
        return sorted(runs, key=lambda pair: started(pair[1])[0]), "the start times in the logs"
    if len({run.path for _, run in runs}) < len(runs) or not all(os.path.isfile(r.path) for _, r in runs):
        return [], "unknown"
    ended = sorted(((os.path.getmtime(run.path), arm, run) for arm, run in runs), key=lambda row: row[0])
    for (before, *_), (after, _, run) in pairwise(ended):
        if after - before < (run.seconds or 1.0) * 0.9:
            return [], "unknown"
    return [(arm, run) for _, arm, run in ended], "the times of the files"


def order(arms: Sequence[Arm]) -> Iterator[Fact]:
    """Is a drift of the machine confounded with the change?"""
    runs, origin = run_order(arms)
    if not runs:
        text = "when the runs started is unknown, so drift and the order of the arms cannot be checked"
        yield "order-unknown", text, ()
        return
    for candidate in arms[1:] or [arms[0]]:
        pair = [(arm, run) for arm, run in runs if arm is candidate or arm is arms[0]]
        yield from pair_order(arms[0], candidate, pair, origin)


def pair_order(base: Arm, candidate: Arm, pair: list[tuple[Arm, Run]], origin: str) -> Iterator[Fact]:
    """Order and drift of two arms (or of one) in the order of their starts."""
    labels, times = [arm.name for arm, _ in pair], [run.seconds for _, run in pair]
    timed = None not in times and max(Counter(labels).values()) >= 3
    found = drift(times, labels) if timed else None
    if found and found.p < 0.05:
        size = f"{found.slope:+.3g} s a run (rho {found.rho:.2f}, p {found.p:.2g})"
        yield "drifting", f"times drift with the order of runs: {size}", ()
    if candidate is base or not blocked_order(labels).blocked:
        return
    who = f"{base.name} and {candidate.name}"
    yield (
        "blocked-order",
        f"{who} ran one after the other, not interleaved: drift looks like a gain or a loss",
        (),
    )
    if timed:
        gain = sum(values(candidate, "seconds")) / len(candidate.counted)
        gain -= sum(values(base, "seconds")) / len(base.counted)
        rule = drift_rule(times, labels, gain)
        if rule.no_verdict:
            yield "drift", f"{who} by {origin}: {rule.reason}; interleave the runs", ()


# 5. ledger and plan -----------------------------------------------------------------------------------------

LEDGER, PLAN, PLAN_HASH = "ledger.jsonl", "plan.json", "plan.json.sha256"
FAILED = ("diverged", "crashed")  # infinite times; an interrupted run is made again and only told


@dataclass(frozen=True)
class Attempt:
    """One started run of a ledger."""

    arm: str  # its letter in the plan
    path: str  # of its log, absolute, without the suffix of a packer
    status: str
    source: str
    digest: str  # of the log as it was closed, or ''
    plan: str  # hash of the plan that it was started under, or ''


@dataclass(frozen=True)
class Series:
    """A ledger and its plan; `broken` says why one of them cannot be read."""

    folder: str
    attempts: tuple[Attempt, ...]
    plan: dict | None
    plan_hash: str
    broken: str

    @property
    def early_stop(self) -> bool:
        """True if the series was to end as soon as its p-value was small enough."""
        return bool(self.plan) and self.plan.get("stop", {}).get("rule") == "until-decided"


def bare(path: str) -> str:
    """A log's real path without the suffix of a packer, so that packing loses no run."""
    name, suffix = os.path.splitext(os.path.realpath(path))
    return name if suffix in PACKINGS else name + suffix


def read_attempts(folder: str) -> list[Attempt]:
    """Every attempt of a ledger but warm-ups: its lines are merged, later ones win. ValueError if broken."""
    merged: dict[object, dict] = {}
    with open(os.path.join(folder, LEDGER), encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            entry = json.loads(line)
            is_event = isinstance(entry, dict) and "event" in entry
            if not is_event or not isinstance(entry.get("attempt"), int | None):
                raise ValueError(f"line {number} is no event")
            if entry["event"] in ("start", "end"):
                merged.setdefault(entry.get("attempt"), {}).update(entry)
    return [
        Attempt(
            str(entry.get("arm", "")),
            bare(os.path.join(folder, str(entry.get("log", "")))),
            str(entry.get("status", "started")),
            *(str(entry.get(key, "")) for key in ("source", "log_sha256", "plan")),
        )
        for entry in merged.values()
        if entry.get("role") != "warm-up"
    ]


def read_series(folder: str) -> Series:
    """The ledger and the plan of a folder; never raises."""
    attempts, content, plan_hash = [], None, ""
    try:
        attempts = read_attempts(folder)
        if os.path.isfile(path := os.path.join(folder, PLAN)):
            with open(path, "rb") as file:
                data = file.read()
            plan_hash, content = hashlib.sha256(data).hexdigest(), json.loads(data)
            if not isinstance(content, dict):
                raise ValueError(f"{PLAN} is no object")
            for key, kind in (("stop", dict), ("arms", list)):
                if not isinstance(content.get(key, kind()), kind):
                    raise ValueError(f"{key} of {PLAN} is no {kind.__name__}")
    except (OSError, ValueError, RecursionError) as error:
        return Series(folder, (), None, "", printable(f"{LEDGER} or {PLAN} cannot be read ({error})"))
    return Series(folder, tuple(attempts), content, plan_hash, "")


def all_series(arms: Sequence[Arm]) -> list[Series]:
    """The series whose ledger lies beside the logs or one folder above."""
    own = {os.path.dirname(os.path.realpath(run.path)) for arm in arms for run in arm.runs}
    places = sorted(own | {os.path.dirname(folder) for folder in own})
    return [read_series(f) for f in places if os.path.isfile(os.path.join(f, LEDGER))]


def logs_of(arms: Sequence[Arm]) -> dict[str, tuple[Arm, Run]]:
    """Every run by its path and by its digest, so that moved logs are found too."""
    pairs = [(arm, run) for arm in arms for run in arm.runs]
    return {bare(run.path): (arm, run) for arm, run in pairs} | {run.digest: (arm, run) for arm, run in pairs}


def missing_attempts(arms: Sequence[Arm], series: Series) -> list[tuple[Arm | None, Attempt]]:
    """Attempts whose log is not among the arms', with the arm that they belong to (None: none of these)."""
    logs = logs_of(arms)
    held = {a: logs.get(a.path) or logs.get(a.digest) for a in series.attempts}
    labels = {a.arm: found[0] for a, found in held.items() if found}
    sources = {arm.attempts[0].source: arm for arm in reversed(arms) if arm.attempts}
    return [(labels.get(a.arm) or sources.get(a.source), a) for a, found in held.items() if not found]


def lost_failures(arms: Sequence[Arm], arm: Arm) -> int:
    """Attempts of an arm that failed by the ledger and whose log is not among those given."""
    lost = [pair for series in all_series(arms) for pair in missing_attempts(arms, series)]
    return sum(owner is arm and attempt.status in FAILED for owner, attempt in lost)


def endings(arms: Sequence[Arm], runs: Iterable[Run]) -> dict[str, str]:
    """{path of a run: how it ended}, by the ledger where there is one: a killed run cannot say it itself."""
    attempts = [a for series in all_series(arms) for a in series.attempts]
    by_log = {a.path: a.status for a in attempts} | {a.digest: a.status for a in attempts if a.digest}
    return {run.path: by_log.get(run.digest) or by_log.get(bare(run.path)) or run.status for run in runs}


def ledger(arms: Sequence[Arm]) -> Iterator[Fact]:
    """Every attempt of the ledger is among the logs, unaltered, and every log is in the ledger."""
    logs = logs_of(arms)
    for series in all_series(arms):
        if series.broken:
            yield "ledger", series.broken, ()
            continue
        missing = missing_attempts(arms, series)
        shown = {a: f"{os.path.relpath(a.path, series.folder)} {a.status}" for _, a in missing}
        if whole := [printable(shown[a]) for owner, a in missing if owner and a.status == "done"]:
            text = f"{LEDGER} holds {len(series.attempts)} runs, {len(whole)} of which are not among the logs"
            yield "ledger", f"{text}: {some(whole)}", ()
        if failed := [printable(shown[a]) for owner, a in missing if owner and a.status != "done"]:
            yield "ledger-failed", f"{LEDGER}: attempts without a log here: {some(failed)}", ()
        if others := [printable(shown[a]) for owner, a in missing if not owner]:
            yield "ledger-other", f"{LEDGER} has runs of arms not compared here: {some(others)}", ()
        known = {a.path for a in series.attempts} | {a.digest for a in series.attempts}
        inside = [r for arm in arms for r in arm.attempts if bare(r.path).startswith(series.folder + os.sep)]
        if strangers := [r for r in inside if not {bare(r.path), r.digest} & known]:
            yield "ledger", f"not in {LEDGER}: {names(strangers)}", strangers
        at_place = [(logs[a.path][1], a) for a in series.attempts if a.path in logs and a.digest]
        if altered := [run for run, attempt in at_place if run.digest != attempt.digest]:
            yield "ledger", f"altered since {LEDGER} has their hash: {names(altered)}", altered
        yield from plan(arms, series)


def plan(arms: Sequence[Arm], series: Series) -> Iterator[Fact]:
    """The plan is the one that the runs were started under, names their sources, and was carried out."""
    if series.plan is None:
        yield "plan", f"{LEDGER} without {PLAN}: what was decided before the first run is unknown", ()
        return
    if wrong := [a for a in series.attempts if a.plan not in ("", series.plan_hash)]:
        text = f"{PLAN} is not the plan of the runs: {len(wrong)} were started under {wrong[0].plan[:12]}"
        yield "plan", printable(text), ()
    stated = os.path.join(series.folder, PLAN_HASH)
    if os.path.isfile(stated):
        with open(stated, encoding="utf-8", errors="replace") as file:
            if file.read().split()[:1] != [series.plan_hash]:
                yield "plan", f"{PLAN} was altered after it was hashed ({PLAN_HASH})", ()
    planned = {str(arm.get("source")) for arm in series.plan.get("arms", ()) if isinstance(arm, dict)}
    paths = {a.path for a in series.attempts}
    for arm in arms:
        inside = [run for run in arm.counted if bare(run.path) in paths]
        if odd := [run for run in inside if planned and run.source not in planned]:
            yield "plan", f"{arm.name}: {names(odd)} ran a source that is not in {PLAN}", odd
        rule, runs = series.plan.get("stop", {}).get("rule"), series.plan.get("runs")
        done = sum(r.status in ("complete", *FAILED) for r in arm.attempts if bare(r.path) in paths)
        if rule == "fixed" and isinstance(runs, int) and inside and done < runs:
            yield "unfinished", f"{arm.name}: {done} of the {runs} runs of {PLAN} are there", ()


# 6. track ---------------------------------------------------------------------------------------------------


def track_rules(arms: Sequence[Arm], track: Track) -> Iterator[Fact]:
    """Runs are of the track's recipe, data and hardware."""
    for arm in arms:
        run = arm.counted[0]
        devices = run.head.get("gpus") or [run.head.get("device_name") or ""]
        count = run.head.get("world_size") or len(run.head.get("gpus") or ())
        if why := track.unfit_hardware([name for name in devices if name], count):
            yield "track", f"{arm.name} {why}", ()
        for key, wanted in (("recipe", track.recipe), ("data", track.data)):
            logged = run.head.get(key)
            if wanted and logged is None:
                yield (
                    "track-unknown",
                    f"{arm.name}: the logs name no {key}, track {track.name} wants {wanted}",
                    (),
                )
            elif wanted and logged.split(" ")[0] != wanted:
                text = f"{arm.name}: {key} {printable(logged)}, track {track.name} wants {wanted}"
                yield "track", text, ()


# 7. all -----------------------------------------------------------------------------------------------------


def facts(arms: Sequence[Arm], claim: str | None, track: Track | None) -> Iterator[Fact]:
    """Every fact about arms that compare_runs.py does not refuse."""
    yield from failures(arms)
    yield from machine(arms)
    yield from settings(arms, claim)
    yield from gpu_state(arms)
    yield from repeats(arms)
    if claim:
        yield from clocks(arms)
    yield from unused(arms)
    yield from odd_values(arms)
    yield from held_up(arms)
    yield from order(arms)
    yield from ledger(arms)
    if track and track.name:
        yield from track_rules(arms, track)


def find(
    arms: Sequence[Arm],
    claim: str | None = None,
    track: Track | None = None,
    refusals: Sequence[Refusal] = (),  # compare_runs.refusals of the same arms
) -> list[Finding]:
    """Findings about these arms, blocking ones first. With refusals only what needs no counted runs."""
    column = bool(track and track.name)
    found = [(r.code, str(r), r.runs) for r in refusals]
    found += [*failures(arms), *unused(arms), *ledger(arms)] if refusals else facts(arms, claim, track)
    all_findings = [
        Finding(code, LEVELS[code][column], text, tuple(dict.fromkeys(run.name for run in runs)))
        for code, text, runs in found
    ]
    unique = list(dict.fromkeys(all_findings))
    return sorted(unique, key=lambda finding: (BLOCKS, WARNS, NOTES).index(finding.level))
