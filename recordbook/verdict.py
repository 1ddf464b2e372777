"""The verdict: ACCEPT, REJECT or INCONCLUSIVE, by a track's rules and the kind of claim, one reason a line.

    systems  the maths is the same: faster, and the loss not worse by the track's margin
    ml       it is not: faster, the target reached, and faster at equal loss where seconds_per_loss is known
    score    the budget is fixed: the metric is better than the baseline's by more than the track's gain

Every reason passes, fails or stays open. A failed one or a blocking finding rejects. What is open says how
many runs of each arm would decide it at a power of 0.9, if the means and sds seen are the true ones. Failed
runs of the candidate are infinite times and losses, which only a rank test can hold, so they add one. A
series that could stop early is judged by always-valid p-values.

Values are turned so that lower is better (`direction`); texts show them as logged.
Contents: 1 results, 2 rules, 3 statistics, 4 reasons, 5 decision, 6 plain words.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from compare_runs import Arm, InputError, Refusal, Run, check_duplicates, refusals, values
from recordbook import drift, planning, statistics
from recordbook.integrity import (
    UNDECIDED,
    Finding,
    all_series,
    endings,
    failed_runs,
    find,
    lost_failures,
    run_order,
)
from recordbook.tracks import Track

ACCEPT, REJECT, INCONCLUSIVE = "ACCEPT", "REJECT", "INCONCLUSIVE"
PASS, FAIL, OPEN = "pass", "fail", "open"
POWER = 0.9  # of the number of runs that an inconclusive verdict proposes
PRICE_ERRORS = 3.0  # standard errors by which a price of loss may be wrong where an always-valid p counts
MOST_REPEATS = 12  # of the runs seen, when more of the same are imagined for a rank test

# 1. results -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reason:
    """One line of a verdict. `runs`: of each arm in all, to decide what is open; None if it is not."""

    about: str  # time, loss, target, adjusted, failed, runs, or the code of a finding
    state: str
    text: str
    p: float | None = None
    runs: int | None = None


@dataclass(frozen=True)
class Verdict:
    """The outcome with everything it rests on. `more`: runs to add to each arm if inconclusive."""

    outcome: str
    more: int | None
    baseline: str
    candidate: str
    claim: str
    track: str
    alpha: float  # of each test, after Holm's correction for several candidates
    reasons: tuple[Reason, ...]
    findings: tuple[Finding, ...]
    statistics: dict[str, Any]  # name: result, or the reason why it does not exist

    @property
    def line(self) -> str:
        """The outcome as it is printed."""
        return f"{self.outcome} (about {self.more} more runs of each arm)" if self.more else self.outcome

    @property
    def p(self) -> float:
        """The largest p of the required tests: the claim's p-value. 1 if a required one is missing."""
        found = [r.p for r in self.reasons if r.p is not None]
        return max(found) if found else 1.0


def plain(value: Any) -> Any:
    """A result as JSON holds it: dataclasses as objects, what is not finite as null."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    return value


# 2. rules -----------------------------------------------------------------------------------------------

WITHOUT_TRACK = {"alpha": 0.01, "margin": 0.002, "min_runs": 4, "time_test": "welch-less"}


def rules(arm: Arm, target: float | None, alpha: float | None, time_test: str | None) -> Track:
    """The rules of a claim without a track: the defaults above, the logs' target, any hardware."""
    given = {"alpha": alpha, "time_test": time_test}
    chosen = WITHOUT_TRACK | {key: value for key, value in given.items() if value is not None}
    direction = "higher" if arm.higher else "lower"
    return Track(
        name="", title="no track", metric=arm.metric, direction=direction, claims=("systems", "ml"),
        target=math.nan if target is None else target, recipe="", gpus=0, hardware="", **chosen,
    )  # fmt: skip


def described(track: Track, claim: str, alpha: float) -> str:
    """The rules in one line."""
    name = f"track {track.name}" if track.name else "no track"
    bound = f"margin {track.margin:g}" if claim == "systems" else f"target {track.target:g}"
    if claim == "score":
        bound = f"gain {track.least_gain:.5f} bits/byte ({track.gain:g} {track.gain_unit})"
    return (
        f"claim {claim}, {name}: {track.metric}, {bound}, alpha {alpha:.3g}, "
        f"at least {track.min_runs} runs of each arm, time test {track.time_test}"
        + (f", loss test {track.loss_test}" if claim == "systems" else "")
    )


# 3. statistics ------------------------------------------------------------------------------------------


def oriented(arm: Arm, track: Track) -> list[float]:
    """The metric of the counted runs in run order, turned so that lower is better."""
    sign = -1 if track.direction == "higher" else 1
    return [sign * run.metrics[track.metric] for run in arm.counted]


NO_PAIRS = "the runs are not interleaved in pairs: {} lack a partner of the other arm"


def paired_runs(base: Arm, candidate: Arm) -> list[tuple[Run, Run]]:
    """(new, base) of runs that ran one after the other on the same GPUs; ValueError says why there are none.

    A failed run has its place in a pair; an interrupted one was made again, so it has none. Series of several
    lanes have pairs on several sets of GPUs at once.
    """
    runs, _ = run_order([base, candidate], all_attempts=True)
    if not runs:
        raise ValueError("the order of the runs is unknown")
    ended = endings([base, candidate], [run for _, run in runs if not run.complete])
    runs = [(arm, run) for arm, run in runs if ended.get(run.path) != "interrupted"]
    places = {run.head["uuids"] for _, run in runs if "uuids" in run.head}
    kept, begun = [], {}
    for arm, run in runs:
        place = run.head.get("uuids") if len(places) > 1 else None
        if place not in begun:
            begun[place] = arm, run
            continue
        other, before = begun.pop(place)
        if other is arm:
            raise ValueError(NO_PAIRS.format(f"{before.name}, {run.name}"))
        if run.complete and before.complete:
            kept.append((run, before) if arm is candidate else (before, run))
    if begun:
        raise ValueError(NO_PAIRS.format(", ".join(run.name for _, run in begun.values())))
    return kept


def paired_times(base: Arm, candidate: Arm) -> tuple[list[float], list[float]]:
    """(new, base) times of the pairs."""
    kept = paired_runs(base, candidate)
    return [new.seconds for new, _ in kept], [old.seconds for _, old in kept]


def paired_metric(base: Arm, candidate: Arm, track: Track) -> tuple[list[float], list[float]]:
    """(new, base) values of the metric of the pairs, lower is better."""
    sign, kept = -1 if track.direction == "higher" else 1, paired_runs(base, candidate)
    new, old = ([sign * pair[i].metrics[track.metric] for pair in kept] for i in (0, 1))
    return new, old


def shifted_pairs(base: Arm, candidate: Arm, track: Track, gain: float) -> statistics.AlwaysValid:
    """Is the metric of the pairs better by more than the gain?"""
    new, old = paired_metric(base, candidate, track)
    return statistics.always_valid_pairs([x + gain for x in new], old)


def adjusted_pairs(base: Arm, candidate: Arm, track: Track) -> statistics.AlwaysValid:
    """Are the pairs faster at equal loss, at the price within PRICE_ERRORS that favours new least?"""
    new, old = paired_metric(base, candidate, track)
    new_times, old_times = paired_times(base, candidate)
    error = PRICE_ERRORS * (track.seconds_per_loss_sd or 0.0)
    k = max(0.0, track.seconds_per_loss + (error if sum(new) > sum(old) else -error))
    return statistics.always_valid_pairs(
        [t + k * x for t, x in zip(new_times, new, strict=True)],
        [t + k * x for t, x in zip(old_times, old, strict=True)],
    )


def ordered_times(base: Arm, candidate: Arm) -> tuple[list[float], list[bool]]:
    """(times in run order, is it the candidate's)."""
    runs, _ = run_order([base, candidate])
    if not runs:
        raise ValueError("the order of the runs is unknown")
    return [run.seconds for _, run in runs], [arm is candidate for arm, _ in runs]


def or_why(test: Callable[[], Any]) -> Any:
    """The result of a test, or the sentence that says why it does not exist."""
    try:
        return test()
    except ValueError as error:
        return str(error)


def time_statistics(base: Arm, candidate: Arm, alpha: float) -> dict[str, Callable[[], Any]]:
    """Every test of the times."""
    new, old = values(candidate, "seconds"), values(base, "seconds")
    if not new or not old:
        return {}
    st, level = statistics, 1 - 2 * alpha
    gain = sum(new) / len(new) - sum(old) / len(old)
    return {
        "time_welch_less": partial(st.welch, new, old, "less", level),
        "time_welch_two_sided": partial(st.welch, new, old, "two-sided", 1 - alpha),
        "time_student": partial(st.student, new, old, "less", level),
        "time_paired": lambda: st.paired(*paired_times(base, candidate), "less", level),
        "time_always_valid_pairs": lambda: st.always_valid_pairs(*paired_times(base, candidate)),
        "time_permutation": partial(st.permutation_test, new, old),
        "time_yuen": partial(st.yuen, new, old, level=level),
        "time_arm_and_order": lambda: drift.arm_and_order(*ordered_times(base, candidate), True, level=level),
        "time_drift": lambda: drift.drift_rule(*ordered_times(base, candidate), gain),
        "time_detectable_gain": lambda: planning.detectable_gain(
            min(len(new), len(old)), pooled_sd(new, old), alpha, POWER
        ),
    }


def loss_statistics(base: Arm, candidate: Arm, track: Track, alpha: float) -> dict[str, Callable[[], Any]]:
    """Every test of the metric, and of time and metric together. Signs: lower is better."""
    new, old, st = oriented(candidate, track), oriented(base, track), statistics
    level, found = 1 - 2 * alpha, {}
    found["loss_difference"] = partial(st.welch, new, old, "two-sided", level)
    found["loss_non_inferiority"] = partial(st.non_inferiority, new, old, track.margin, level)
    found["loss_non_inferiority_pairs"] = lambda: st.non_inferiority_pairs(
        *paired_metric(base, candidate, track), track.margin, level
    )
    found["loss_always_valid_pairs"] = lambda: st.always_valid_pairs(
        *paired_metric(base, candidate, track), track.margin
    )
    if math.isfinite(track.target):
        target = -track.target if track.direction == "higher" else track.target
        found["loss_target"] = partial(st.one_sample, new, target, "less", level)
        found["loss_always_valid"] = partial(st.always_valid, new, target)
    if track.gain:
        gain = track.least_gain
        found["loss_gain"] = partial(st.welch, new, old, "less", level, -gain)
        found["loss_gain_always_valid_pairs"] = lambda: shifted_pairs(base, candidate, track, gain)
    times = values(candidate, "seconds"), values(base, "seconds")
    if track.seconds_per_loss and all(times):
        k, sd_k = track.seconds_per_loss, track.seconds_per_loss_sd or 0.0
        found["loss_adjusted"] = partial(st.loss_adjusted, *times, new, old, k, sd_k, level=level)
        found["loss_adjusted_always_valid_pairs"] = lambda: adjusted_pairs(base, candidate, track)
    return found


def analyse(base: Arm, candidate: Arm, track: Track, alpha: float | None = None) -> dict[str, Any]:
    """Every statistic of a candidate against a baseline by name; a sentence where one does not exist."""
    alpha = alpha or track.alpha
    tests = time_statistics(base, candidate, alpha) | loss_statistics(base, candidate, track, alpha)
    return {name: or_why(test) for name, test in tests.items()}


def pooled_sd(new: Sequence[float], old: Sequence[float]) -> float:
    """Root mean square of the two sample sds, which planning takes for both arms."""
    return math.hypot(statistics.mean_sd(list(new))[1], statistics.mean_sd(list(old))[1]) / math.sqrt(2)


# 4. reasons ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """What every reason is made from."""

    base: Arm
    new: Arm
    track: Track
    alpha: float
    found: dict[str, Any]
    failed: int  # attempts of the candidate that did not finish
    early_stop: bool = False  # the series ends when its p is small enough, so only always-valid p count

    @property
    def n(self) -> int:
        """Complete runs of the smaller arm."""
        return min(len(self.base.counted), len(self.new.counted))


def compared(p: float, alpha: float) -> str:
    """'p = 0.003 <= 0.01'."""
    return f"p = {p:.3g} {'<=' if p <= alpha else '>'} {alpha:.3g}"


def judged(
    case: Case,
    about: str,
    text: str,
    p: float,
    wrong_p: float,  # of the opposite claim
    gain: float,  # positive: the right way
    needed: Callable[[], int],  # runs of each arm that show such a gain
) -> Reason:
    """Pass, fail or open. The wrong way fails, once there are enough runs or it is shown to be wrong."""
    if p <= case.alpha and gain > 0:
        return Reason(about, PASS, text, p)
    if gain <= 0:
        if case.n >= case.track.min_runs or wrong_p <= case.alpha:
            return Reason(about, FAIL, text, p)
        return Reason(about, OPEN, text, p, case.track.min_runs)
    try:
        runs = max(needed(), case.n + 1)
    except ValueError:
        text += f"; too small to be shown with {planning.MAX_RUNS:,} runs"
        return Reason(about, FAIL, text, p)
    return Reason(about, OPEN, f"{text}; such a gain needs about {runs} runs of each arm", p, runs)


def missing(case: Case, about: str, why: str, fatal: bool = False) -> Reason:
    """A required statistic that does not exist."""
    runs = None if fatal else max(case.track.min_runs, case.n + 1)
    return Reason(about, FAIL if fatal else OPEN, f"{about}: {why}", None, runs)


# time_test: (statistic, its name, alpha of the one-sided test behind it)
TIME_TESTS = {
    "welch-less": ("time_welch_less", "Welch's one-sided t-test", 1.0),
    "welch-two-sided": ("time_welch_two_sided", "Welch's two-sided t-test", 0.5),
    "student": ("time_student", "Student's one-sided t-test", 1.0),
    "paired": ("time_paired", "paired one-sided t-test", 1.0),
}


def valid_p(case: Case, about: str, key: str) -> float | Reason:
    """The always-valid p of a series that could stop early; the reason that says why there is none."""
    valid = case.found[key]
    if isinstance(valid, str):
        return missing(case, about, f"the series could stop early, but {valid}", fatal=True)
    return valid.p_final


def time_reason(case: Case) -> Reason:
    """Is the candidate faster, by the track's test?"""
    key, name, share = TIME_TESTS[case.track.time_test]
    result = case.found.get(key, "the logs hold no times")
    if isinstance(result, str):
        return missing(case, "time", f"no {name}: {result}", fatal=key == "time_paired" or not case.found)
    test = getattr(result, "test", result)
    times, base_times = values(case.new, "seconds"), values(case.base, "seconds")
    base_mean = statistics.mean_sd(base_times)[0]
    gain, n, p = -test.difference, f"n {test.n_new} and {test.n_base}", test.p
    if case.early_stop:
        name, p = (
            "always-valid paired test, because the series could stop early",
            valid_p(case, "time", "time_always_valid_pairs"),
        )
        if isinstance(p, Reason):
            return p
    text = (
        f"time: {case.new.name} is {abs(gain):.4f} s ({abs(gain) / base_mean:.2%}) "
        f"{'faster' if gain > 0 else 'slower'} than {case.base.name} ({base_mean:.4f} s), {n}; "
        f"{name}: {compared(p, case.alpha)}; {test.level:.0%} interval {test.low:+.4f} to {test.high:+.4f} s"
    )
    if key == "time_paired":
        needed = partial(planning.runs_needed_one_sample, gain, result.sd, case.alpha)
    else:
        sd = pooled_sd(times, base_times)
        needed = partial(planning.runs_needed_two_sample, gain, sd, case.alpha * share)
    wrong_p = test.p if test.alternative == "two-sided" else 1 - test.p
    return judged(case, "time", text, p, wrong_p, gain, needed)


# loss_test: (statistic, its name)
LOSS_TESTS = {
    "welch": ("loss_non_inferiority", "non-inferiority"),
    "paired": ("loss_non_inferiority_pairs", "non-inferiority of pairs"),
}


def loss_test(case: Case) -> tuple[str, Any]:
    """(name, result) of the track's test; Welch's where all pairs differ by the same, as equal maths may."""
    key, name = LOSS_TESTS[case.track.loss_test]
    if key == "loss_non_inferiority_pairs" and isinstance(case.found[key], str):
        pairs = or_why(partial(paired_metric, case.base, case.new, case.track))
        if not isinstance(pairs, str) and len({round(a - b, 9) for a, b in zip(*pairs, strict=True)}) == 1:
            key, name = LOSS_TESTS["welch"]
            name += " of the arms, as all pairs differ by the same"
    return name, case.found[key]


def loss_reason(case: Case) -> Reason:
    """systems: is the metric not worse than the baseline's by the margin, by the track's test?"""
    (name, result), metric, margin = loss_test(case), case.track.metric, case.track.margin
    if isinstance(result, str):
        return missing(case, "loss", result, fatal=name == LOSS_TESTS["paired"][1])
    test = getattr(result, "test", result)
    p = test.p
    if case.early_stop:
        name, p = "always-valid non-inferiority of pairs", valid_p(case, "loss", "loss_always_valid_pairs")
        if isinstance(p, Reason):
            return p
    gain, seen, bounds = margin - test.difference, test.difference, (test.low, test.high)
    if case.track.direction == "higher":
        seen, bounds = -seen, (-test.high, -test.low)
    text = (
        f"loss: {metric} differs by {seen:+.5f} ({test.level:.0%} interval {bounds[0]:+.5f} to "
        f"{bounds[1]:+.5f}), may be worse by less than {margin:g}; "
        f"{name}: {compared(p, case.alpha)}"
    )
    if isinstance(result, statistics.Paired):
        needed = partial(planning.runs_needed_one_sample, gain, result.sd, case.alpha)
    else:
        sd = pooled_sd(oriented(case.new, case.track), oriented(case.base, case.track))
        needed = partial(planning.runs_needed_two_sample, gain, sd, case.alpha)
    return judged(case, "loss", text, p, 1 - test.p, gain, needed)


def target_reason(case: Case) -> Reason:
    """ml: is the candidate's mean on the good side of the target?"""
    test, track = case.found.get("loss_target", "there is no target; give --target"), case.track
    if isinstance(test, str):
        return missing(case, "target", test, fatal="loss_target" not in case.found)
    found = oriented(case.new, track)
    mean, sd = statistics.mean_sd(found)
    gain, good = -test.difference, ("above", "below") if track.direction == "higher" else ("below", "above")
    always = case.found["loss_always_valid"].p_final
    use = "which counts here" if case.early_stop else "for looks after every run"
    text = (
        f"target: mean {track.metric} {abs(mean):.4f} (sd {sd:.4f}, n {len(found)}) is {abs(gain):.4f} "
        f"{good[gain <= 0]} {track.target:g}; one-sample t-test: {compared(test.p, case.alpha)}; "
        f"always-valid p {always:.3g}, {use}"
    )
    needed = partial(planning.runs_needed_one_sample, gain, sd, case.alpha)
    p = always if case.early_stop else test.p
    return judged(case, "target", text, p, 1 - test.p, gain, needed)


def gain_reason(case: Case) -> Reason:
    """score: is the metric better than the baseline's by more than the track's gain?"""
    test, track = case.found["loss_gain"], case.track
    if isinstance(test, str):
        return missing(case, "gain", test)
    name, p, least = "Welch's one-sided t-test", test.p, track.least_gain
    if case.early_stop:
        name, p = "always-valid test of pairs", valid_p(case, "gain", "loss_gain_always_valid_pairs")
        if isinstance(p, Reason):
            return p
    seen, word = -test.difference, "better" if test.difference < 0 else "worse"
    text = (
        f"gain: {track.metric} of {case.new.name} is {abs(seen):.5f} {word} than that of {case.base.name}, "
        f"must be more than {least:.5f} ({track.gain:g} {track.gain_unit}); {name}: {compared(p, case.alpha)}"
    )
    sd = pooled_sd(oriented(case.new, track), oriented(case.base, track))
    needed = partial(planning.runs_needed_two_sample, seen - least, sd, case.alpha)
    return judged(case, "gain", text, p, 1 - test.p, seen - least, needed)


def adjusted_reason(case: Case) -> Reason | None:
    """ml: is the candidate faster at equal loss? None where a unit of loss has no price."""
    result = case.found.get("loss_adjusted")
    if result is None:
        return None
    if isinstance(result, str):
        return missing(case, "adjusted", result)
    test, gain = result.test, -result.test.difference
    name, p = "", test.p
    if case.early_stop:
        name, p = (
            "always-valid test of pairs at the least favourable price: ",
            valid_p(case, "adjusted", "loss_adjusted_always_valid_pairs"),
        )
        if isinstance(p, Reason):
            return p
    text = (
        f"adjusted: at equal {case.track.metric} {abs(gain):.4f} s {'faster' if gain > 0 else 'slower'} "
        f"({result.d_time:+.4f} s of time, {result.k * result.d_loss:+.4f} s for {result.d_loss:+.5f} at "
        f"{result.k:g} +- {result.sd_k:g} s), standard error {test.se:.4f} s: {name}{compared(p, case.alpha)}"
    )
    needed = partial(planning.runs_needed_two_sample, gain, test.se * math.sqrt(case.n / 2), case.alpha)
    return judged(case, "adjusted", text, p, 1 - test.p, gain, needed)


def rank_p(case: Case, new: list[float], old: list[float], repeats: int) -> float:
    """p of the rank test with the failed runs last, if the runs seen came `repeats` times."""
    ours = (new + [math.inf] * case.failed) * repeats
    places = drift.ranks(ours + old * repeats)
    return statistics.permutation_test(places[: len(ours)], places[len(ours) :]).p


def sign_p(case: Case, new: list[float], target: float, repeats: int) -> float:
    """p of the sign test against the target, failed runs on the wrong side."""
    n, good = (len(new) + case.failed) * repeats, sum(x < target for x in new) * repeats
    return min(1.0, sum(math.comb(n, k) for k in range(good, n + 1)) / 2**n)


def failed_reason(case: Case, about: str, what: str, p_of: Callable[[int], float]) -> Reason:
    """Failed runs of the candidate, as the last in rank."""
    p = p_of(1)
    who = f"{case.failed} failed run(s) of {case.new.name}"
    text = f"failed: with {who} as infinite {what}: {compared(p, case.alpha)}"
    if p <= case.alpha:
        return Reason(about, PASS, text, p)
    repeats = next((r for r in range(2, MOST_REPEATS + 1) if p_of(r) <= case.alpha), None)
    if repeats is None:
        return Reason(about, FAIL, text + ", and more runs with as many failures would not show it", p)
    return Reason(about, OPEN, text, p, case.n * repeats)


def failed_reasons(case: Case, claim: str) -> list[Reason]:
    """One reason for the times and one for the losses, if runs failed."""
    if not case.failed or not (times := values(case.new, "seconds")):
        return []
    new, old = oriented(case.new, case.track), oriented(case.base, case.track)
    target = -case.track.target if case.track.direction == "higher" else case.track.target
    bound = -case.track.least_gain if claim == "score" else case.track.margin
    shifted = [x - bound for x in new]
    of_time = partial(rank_p, case, times, values(case.base, "seconds"))
    of_loss = partial(sign_p, case, new, target) if claim == "ml" else partial(rank_p, case, shifted, old)
    of_times = [] if claim == "score" else [failed_reason(case, "failed", "times: rank test", of_time)]
    return [
        *of_times,
        failed_reason(case, "failed", f"losses: {'sign' if claim == 'ml' else 'rank'} test", of_loss),
    ]


def runs_reason(case: Case) -> Reason:
    """Are there as many complete runs as the track asks for?"""
    sizes = [len(case.base.counted), len(case.new.counted)]
    text = f"runs: {sizes[0]} and {sizes[1]} complete, the rule is at least {case.track.min_runs} of each arm"
    if min(sizes) >= case.track.min_runs:
        return Reason("runs", PASS, text)
    return Reason("runs", OPEN, text, None, case.track.min_runs)


CRITERIA = {
    "systems": (time_reason, loss_reason),
    "ml": (time_reason, target_reason, adjusted_reason),
    "score": (gain_reason,),
}

# 5. decision --------------------------------------------------------------------------------------------


def finding_reasons(findings: Sequence[Finding], n: int, track: Track) -> list[Reason]:
    """Blocking findings as reasons: most fail, some are open to more or other runs."""
    runs = {"drift": n + track.min_runs}  # a set of its own, interleaved
    rest = max(track.min_runs, n + 1)
    return [
        Reason(f.code, OPEN, f"{f.code}: {f.text}", None, runs.get(f.code, rest))
        if f.code in UNDECIDED
        else Reason(f.code, FAIL, f"{f.code}: {f.text}")
        for f in findings
        if f.blocks
    ]


def outcome_of(reasons: Sequence[Reason], n: int) -> tuple[str, int | None]:
    """(outcome, runs to add to each arm)."""
    states = {reason.state for reason in reasons}
    if FAIL in states:
        return REJECT, None
    if OPEN not in states:
        return ACCEPT, None
    return INCONCLUSIVE, max(1, *(reason.runs - n for reason in reasons if reason.runs is not None))


def decide(
    baseline: Arm,
    candidate: Arm,
    track: Track,
    claim: str,
    alpha: float | None = None,  # of each test; the track's
    refused: Sequence[Refusal] | None = None,  # compare_runs.refusals, if they are already known
) -> Verdict:
    """The verdict on a candidate. InputError if the track does not know the claim or the logs its metric."""
    if claim not in track.claims:
        known = ", ".join(track.claims)
        raise InputError(f"--claim {claim}: track {track.name} accepts {known}; make that claim")
    alpha, pair = alpha or track.alpha, [baseline, candidate]
    for arm in pair:
        arm.metric, arm.higher = track.metric, track.direction == "higher"
    refused = list(refusals(pair, {"target"}) if refused is None else refused)
    findings = find(pair, claim, track, refused)
    n, found, reasons = min(len(arm.counted) for arm in pair), {}, []
    failed = len(failed_runs(pair, candidate)) + lost_failures(pair, candidate)
    if failed > len(candidate.counted):
        text = f"failed: {failed} run(s) of {candidate.name} failed, {len(candidate.counted)} ended well"
        reasons.append(Reason("failed", FAIL, text))
    if not refused:
        found = analyse(baseline, candidate, track, alpha)
        early_stop = any(series.early_stop for series in all_series(pair))
        case = Case(baseline, candidate, track, alpha, found, failed, early_stop)
        reasons += [reason for test in CRITERIA[claim] if (reason := test(case))]
        reasons += [*failed_reasons(case, claim), runs_reason(case)]
    reasons += finding_reasons(findings, n, track)
    outcome, more = outcome_of(reasons, n)
    names = baseline.name, candidate.name, claim, track.name
    return Verdict(outcome, more, *names, alpha, tuple(reasons), tuple(findings), found)


def refused_of(arms: Sequence[Arm], candidate: Arm, ignore: set[str]) -> list[Refusal]:
    """Refusals of a pair, and runs that it shares with other candidates."""
    found = {str(refusal): refusal for refusal in refusals([arms[0], candidate], ignore)}
    own = {id(run) for run in candidate.runs}
    shared = [r for r in check_duplicates(arms) if own & {id(run) for run in r.runs}]
    return list((found | {str(refusal): refusal for refusal in shared}).values())


def decide_all(
    arms: Sequence[Arm],
    track: Track,
    claim: str,
    ignore: Iterable[str] = ("target",),  # traits in which arms may differ, as for compare_runs.refusals
) -> list[Verdict]:
    """A verdict on each candidate against the first arm. Several share alpha by Holm's rule."""
    refused = [refused_of(arms, arm, set(ignore)) for arm in arms[1:]]
    verdicts = [decide(arms[0], arm, track, claim, None, r) for arm, r in zip(arms[1:], refused, strict=True)]
    if len(verdicts) < 2:
        return verdicts
    adjusted = statistics.holm([verdict.p for verdict in verdicts])
    shares = [v.p / a if a else 1 / len(verdicts) for v, a in zip(verdicts, adjusted, strict=True)]
    return [
        decide(arms[0], arm, track, claim, track.alpha * share, found)
        for arm, share, found in zip(arms[1:], shares, refused, strict=True)
    ]


# 6. plain words -------------------------------------------------------------------------------------------


def chance(p: float) -> str:
    """A p-value in words."""
    if p >= 0.095:
        return f"in {p:.0%} of such comparisons"
    return f"once in {1 / max(p, 1e-9):,.0f} such comparisons{' or less' if p < 1e-9 else ''}"


def time_words(base: Arm, arm: Arm) -> list[str]:
    """What the times say, without a term of statistics."""
    times, base_times = values(arm, "seconds"), values(base, "seconds")
    if not times or not base_times:
        return []
    test = or_why(partial(statistics.welch, times, base_times))
    if isinstance(test, str):
        return [f"{arm.name}: {test}"]
    mean = statistics.mean_sd(base_times)[0]
    size, word = abs(test.difference), "faster" if test.difference < 0 else "slower"
    p = test.p if test.difference < 0 else 1 - test.p
    return [
        f"{arm.name} is {size:.4f} s ({size / mean:.2%}) {word} than {base.name}; with 95 % confidence the "
        f"difference lies between {test.low:+.4f} and {test.high:+.4f} s.",
        f"  If both were equally fast, so large a difference or a larger one would show {chance(p)}.",
    ]


def loss_words(base: Arm, arm: Arm, target: float | None) -> list[str]:
    """What the metric says of one arm, against the target and against the baseline."""
    found, what, lines = values(arm, "metric"), arm.metric, []
    if target is not None:
        sign = -1 if arm.higher else 1
        test = or_why(partial(statistics.one_sample, [sign * x for x in found], sign * target))
        if not isinstance(test, str):
            side = "better" if test.difference < 0 else "worse"
            line = f"{arm.name}: mean {what} is {abs(test.difference):.4f} {side} than the target {target:g}"
            ending = f"; a mean on the target would look as good or better {chance(test.p)}."
            lines.append(line + ending)
    if arm is not base:
        test = or_why(partial(statistics.welch, found, values(base, "metric")))
        if not isinstance(test, str):
            lines.append(
                f"{arm.name}: mean {what} differs from that of {base.name} by {test.difference:+.4f}; "
                f"with 95 % confidence by {test.low:+.4f} to {test.high:+.4f}."
            )
    return lines


def words(arms: Sequence[Arm], target: float | None) -> list[str]:
    """The table in plain words, a sentence a line."""
    lines = [line for arm in arms[1:] for line in time_words(arms[0], arm)]
    return lines + [line for arm in arms for line in loss_words(arms[0], arm, target)]
