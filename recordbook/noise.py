"""The noise floor of a machine: what runs of one program as both arms of a series say about it (A/A).

Order of this file: false accepts, the floor, the floor in words.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from compare_runs import InputError, Run

if TYPE_CHECKING:
    from recordbook.runs import Pairs


def false_accepts(base: list[float], new: list[float], alpha: float) -> dict:
    """How often equal arms pass as 'faster': the labels of each pair exchanged in all ways (or 16,384).

    Of the paired t-test and Welch's test after all pairs, and of the always-valid p after each pair.
    """
    import numpy as np
    from scipy.special import stdtr

    from recordbook.statistics import log_t_evidence

    n, gaps, middle = len(new), np.subtract(new, base), np.add(new, base) / 2
    ways = 2**n if n <= 14 else 2**14
    if n <= 14:
        signs = 1 - 2 * ((np.arange(ways)[:, None] >> np.arange(n)) & 1)
    else:
        signs = 1 - 2 * np.random.default_rng(0).integers(0, 2, (ways, n))
    d = signs * gaps

    def t_of(centre, variance):
        return np.divide(centre, np.sqrt(variance), out=np.zeros_like(centre), where=variance > 0)

    paired_t = t_of(d.mean(axis=1), d.var(axis=1, ddof=1) / n)
    b, a = middle + d / 2, middle - d / 2
    vb, va = b.var(axis=1, ddof=1) / n, a.var(axis=1, ddof=1) / n
    df = np.divide((va + vb) ** 2, (va**2 + vb**2) / (n - 1), out=np.ones_like(va), where=va + vb > 0)
    k = np.arange(2, n + 1)
    sums, squares = d.cumsum(axis=1)[:, 1:], (d * d).cumsum(axis=1)[:, 1:]
    after = t_of(-sums / k, np.maximum(squares - sums**2 / k, 0) / (k - 1) / k)
    return {
        "patterns": ways,
        "exact": n <= 14,
        "paired": float((stdtr(n - 1, paired_t) < alpha).mean()),
        "welch": float((stdtr(df, t_of(d.mean(axis=1), va + vb)) < alpha).mean()),
        "always_valid": float((log_t_evidence(after, k) >= -math.log(alpha)).any(axis=1).mean()),
    }


def floor(
    pairs: Pairs,
    runs: Sequence[Run],  # every complete run of both arms that has a time, in the order in which they ran
    alpha: float,
    same_seeds: bool,  # whether the runs of a pair have one seed
    power: float = 0.9,
) -> dict:
    """Spread, drift, the least gain that shows, and the share of false accepts. InputError below 2 pairs."""
    from recordbook.drift import drift
    from recordbook.planning import detectable_gain
    from recordbook.statistics import mean_sd, one_sample

    new, base = pairs.both("seconds")
    times, losses = [run.seconds for run in runs], [run.loss for run in runs]
    if len(new) < 2:
        raise InputError(f"{len(new)} pair(s) of complete runs, the noise floor needs 2; see the logs")
    gaps = [b - a for b, a in zip(new, base, strict=True)]
    loss_gaps = [b - a for b, a in zip(*pairs.both("loss"), strict=True)]
    sd_run, sd_pair = mean_sd(times)[1], mean_sd(gaps, max(times))[1]
    found = {"pairs": len(new), "runs": len(times), "same_seeds": same_seeds, "alpha": alpha, "power": power}
    found |= {"time_mean_s": mean_sd(times)[0], "time_sd_s": sd_run, "pair_sd_s": sd_pair}
    found |= {"loss_sd": mean_sd(losses)[1], "loss_pair_sd": mean_sd(loss_gaps, max(losses))[1]}
    found["first_run_extra_s"] = times[0] - math.fsum(times[1:]) / (len(times) - 1)
    if sd_pair > 0:
        test = one_sample(gaps, 0.0, "two-sided")
        found["difference_s"] = {"mean": test.difference, "low": test.low, "high": test.high, "p": test.p}
        found["detectable_paired_s"] = detectable_gain(len(new), sd_pair, alpha, power, arms=1)
    if sd_run > 0:
        found["detectable_welch_s"] = detectable_gain(len(new), sd_run, alpha, power, arms=2)
    if len(times) > 2:
        trend = drift(times)
        slope = {"s_per_run": trend.slope, "low": trend.low, "high": trend.high}
        found["drift"] = slope | {"spearman": trend.rho, "p": trend.p}
    found["false_accepts"] = false_accepts(base, new, alpha)
    return found


def in_words(found: dict) -> str:
    """The noise floor in words."""
    mean, n = found["time_mean_s"], found["pairs"]

    def seconds(x: float) -> str:
        return f"{x:.4g} s ({x / mean:.3%})"

    lines = [f"Noise floor of this machine: {found['runs']} runs of one program, {n} pairs (A/A)"]
    lines.append(f"  time {mean:.4f} s, sd of one run {seconds(found['time_sd_s'])}")
    lines.append(f"  sd of the difference within a pair {seconds(found['pair_sd_s'])}")
    if gap := found.get("difference_s"):
        span = f"{gap['low']:.4g} to {gap['high']:.4g}"
        lines.append(f"  B - A {gap['mean']:.4g} s, 95 % interval {span}, p {gap['p']:.3g} (0 is the truth)")
    if trend := found.get("drift"):
        span = f"{trend['low']:.3g} to {trend['high']:.3g}"
        by = f"  drift by order {trend['s_per_run']:+.3g} s a run (95 % {span}), Spearman"
        lines.append(f"{by} {trend['spearman']:+.2f}, p {trend['p']:.3g}")
    lines.append(f"  first run against the others {found['first_run_extra_s']:+.4g} s")
    seeds = "same seed" if found["same_seeds"] else "other seeds"
    lines.append(
        f"  sd of the loss {found['loss_sd']:.4g}, within a pair ({seeds}) {found['loss_pair_sd']:.4g}"
    )
    for name, how in (("paired", "paired t-test"), ("welch", "Welch's test")):
        if gain := found.get(f"detectable_{name}_s"):
            chance = f"with probability {found['power']:g} at alpha {found['alpha']:g}"
            lines.append(f"  smallest gain that {n} pairs show {chance}, {how}: {seconds(gain)}")
    rates = found["false_accepts"]
    ways = f"{'all' if rates['exact'] else 'drawn'} {rates['patterns']} exchanges of labels within pairs"
    lines.append(f"  accepted as faster at alpha {found['alpha']:g}, {ways}:")
    shown = {
        "paired": "paired t-test",
        "welch": "Welch's test",
        "always_valid": "always-valid p, after each pair",
    }
    lines += [f"    {name}: {rates[key]:.2%}" for key, name in shown.items()]
    return "\n".join(lines)
