"""How many runs a claim needs, and what a number of runs can show: power of the one-sided t-test.

Gains and sds are in one unit (seconds, or nats); input rules and errors as in statistics.py.
"""

from __future__ import annotations

import argparse
import math

from recordbook.statistics import LARGEST, number

MAX_RUNS = 1_000_000  # a plan beyond this is refused


def t_power(df: float, noncentrality: float, alpha: float) -> float:
    """P(one-sided t-test rejects at alpha) = nct.sf(t_{1 - alpha, df}; df, noncentrality).

    Above 1e4, where scipy's nct overflows for few runs, the numerator's unit noise is neglected:
    P(V < noncentrality / t_{1 - alpha}), V^2 = chi^2 / df; error below 1e-4.
    """
    from scipy.special import chdtr, stdtrit
    from scipy.stats import nct

    critical = -float(stdtrit(df, alpha))
    if noncentrality > 1e4:
        return float(chdtr(df, df * min(noncentrality / critical, LARGEST) ** 2))
    return float(nct.sf(critical, df, noncentrality))


def noncentrality(arms: int, n: int, gain: float, sd: float) -> tuple[float, float]:
    """(df, noncentrality) of n runs an arm: one sample (arms 1) or two samples of equal sd (arms 2)."""
    return arms * (n - 1), gain / sd * math.sqrt(n / arms)


def power_at(arms: int, n: int, gain: float, sd: float, alpha: float = 0.01) -> float:
    """Power of the one-sided t-test with n >= 2 runs in each of 1 or 2 arms; gain and sd in one unit."""
    if arms not in (1, 2) or isinstance(n, bool) or not isinstance(n, int) or n < 2:
        raise ValueError(f"arms and n: {arms} and {n} must be 1 or 2, and a whole number from 2; change them")
    gain, sd = number("gain", gain, 0, LARGEST), number("sd", sd, 0, LARGEST)
    return t_power(*noncentrality(arms, n, gain, sd), number("alpha", alpha, 0, 0.5))


def runs_needed(arms: int, gain: float, sd: float, alpha: float, power: float) -> int:
    """Smallest n >= 2 with power_at(arms, n, ...) >= power; ValueError beyond 1,000,000 runs."""
    power = number("power", power, number("alpha", alpha, 0, 0.5), 1)

    def enough(n: int) -> bool:
        return power_at(arms, n, gain, sd, alpha) >= power

    high = 2
    while not enough(high):
        if high >= MAX_RUNS:
            why = f"needs more than {MAX_RUNS} runs at sd {sd:g}"
            raise ValueError(f"gain: {gain:g} {why}; claim a larger gain or lower the noise")
        high *= 2
    low = max(1, high // 2)  # not enough, or below the least
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def runs_needed_one_sample(margin: float, sd: float, alpha: float = 0.01, power: float = 0.9) -> int:
    """Runs needed to show a mean `margin` below the target with probability `power` (one-sided t-test).

    Smallest n with nct.sf(t_{1-alpha, n-1}; n-1, margin sqrt(n) / sd) >= power. margin and sd in the same
    unit. Errors: values not positive. Source: statistics.md 3.6 (sd 0.0013, margin 0.001: 25).
    """
    return runs_needed(1, margin, sd, alpha, power)


def runs_needed_two_sample(gain: float, sd: float, alpha: float = 0.01, power: float = 0.9) -> int:
    """Runs needed per arm to show a gain between two arms of equal sd (one-sided two-sample t-test).

    Smallest n with nct.sf(t_{1-alpha, 2n-2}; 2n-2, gain sqrt(n / 2) / sd) >= power.
    Errors: values not positive. Source: statistics.md 3.6 (sd 0.076 s, gain 0.1 s: 17 per arm).
    """
    return runs_needed(2, gain, sd, alpha, power)


def detectable_gain(n: int, sd: float, alpha: float = 0.01, power: float = 0.9, arms: int = 2) -> float:
    """Smallest gain (unit of sd) that n runs an arm show with probability `power`; inverse of power_at.

    By bisection to 1e-12 relative. Errors: as power_at, power not in (alpha, 1).
    """
    power, sd = number("power", power, number("alpha", alpha, 0, 0.5), 1), number("sd", sd, 0, LARGEST)
    low, high = 0.0, 1.0
    while power_at(arms, n, high, 1.0, alpha) < power:
        low, high = high, 2 * high
    while high - low > 1e-12 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if power_at(arms, n, middle, 1.0, alpha) >= power else (middle, high)
    return high * sd


def cost(runs: int, args: argparse.Namespace) -> str:
    """GPU-minutes of so many runs in all, where a duration was given."""
    if args.seconds_per_run is None:
        return ""
    minutes = runs * args.seconds_per_run / 60
    what = f"{minutes:.0f} min"
    return (
        f", {what} on {args.gpus} GPU(s): {minutes * args.gpus:.0f} GPU-minutes" if args.gpus else f", {what}"
    )


def in_words(args: argparse.Namespace) -> str:
    """How many runs a claim needs, for the arguments of `run.sh plan`."""
    level = f"alpha {args.alpha:g}, power {args.power:g}, sd {args.sd:g}"
    if args.gain is not None:
        n = runs_needed_two_sample(args.gain, args.sd, args.alpha, args.power)
        m = runs_needed_one_sample(args.gain, args.sd, args.alpha, args.power)
        return "\n".join(
            [
                f"To show a gain of {args.gain:g} s ({level}):",
                f"  {n} runs of each arm, if the sd is that of one arm's times (Welch){cost(2 * n, args)}",
                f"  {m} pairs, if the sd is that of the difference within pairs (paired){cost(2 * m, args)}",
                f"  bash run.sh aa TRAINER.py N measures both; then: bash run.sh ab A.py B.py {n}",
            ]
        )
    one = runs_needed_one_sample(args.loss_margin, args.sd, args.alpha, args.power)
    two = runs_needed_two_sample(args.loss_margin, args.sd, args.alpha, args.power)
    return "\n".join(
        [
            f"For a loss margin of {args.loss_margin:g} ({level}):",
            f"  {one} runs, to show a mean that far below the target{cost(one, args)}",
            f"  {two} runs of each arm, to show that an equal loss is not worse than the baseline's by that"
            f"{cost(2 * two, args)}",
            f"  {one} pairs for the same, if the sd is that of the difference within pairs"
            f"{cost(2 * one, args)}",
        ]
    )
