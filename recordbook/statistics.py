"""Statistics that decide whether a change is real: pure functions of lists of floats.

Values are in the unit of the input (seconds for times, nats for losses, bits for bits per byte); a
`difference` is new minus base, so faster and better are negative and the usual alternative is "less".
Every function checks its input: ValueError names value, rule and remedy, and NoVariance (a ValueError) says
that a t statistic does not exist. No function returns NaN. numpy and scipy are imported at the first call.

Contents: 1 input, 2 t-tests, 3 robust and permutation tests, 4 always-valid p, 5 loss-adjusted speed,
6 several tests at once. Beside this file: planning.py (power, runs needed), drift.py (order, outliers).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

ALTERNATIVES = ("less", "greater", "two-sided")
LARGEST = 1e50  # products of two squares stay finite below
NOISE = 8 * 2.0**-52  # an sd below this share of the values is rounding, not spread
EXACT_LIMIT = 20_000  # resamples enumerated at most, and drawn otherwise


class NoVariance(ValueError):
    """All values are equal where a test needs spread; a table prints a dash, a verdict refuses."""


# 1. input -------------------------------------------------------------------------------------------------


def checked(name: str, values: Sequence[float], least: int) -> list[float]:
    """The values as floats. ValueError unless at least `least` finite numbers of size up to 1e50."""
    if isinstance(values, str | bytes):
        raise ValueError(f"{name}: {values!r:.40} is text, must be a list of numbers; parse it first")
    try:
        found = [float(x) for x in values]
    except (TypeError, ValueError):
        raise ValueError(f"{name}: must be a list of numbers, got {values!r:.60}; parse it first") from None
    for i, x in enumerate(found):
        if not abs(x) <= LARGEST:
            rule = "must be finite and at most 1e50; count a failed run as failed, do not test its value"
            raise ValueError(f"{name}: value {i + 1} of {len(found)} is {x}, {rule}")
    if len(found) < least:
        raise ValueError(f"{name}: {len(found)} value(s), the rule is at least {least}; make more runs")
    return found


def number(name: str, value: float, low: float, high: float, closed: bool = False) -> float:
    """A number inside (low, high), or [low, high] if closed; else ValueError."""
    try:
        x = float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{name}: {value!r:.40} must be a number; give one") from None
    if not (low <= x <= high if closed else low < x < high):
        brackets = "[]" if closed else "()"
        rule = f"must lie in {brackets[0]}{low:g}, {high:g}{brackets[1]}"
        raise ValueError(f"{name}: {value} {rule}; choose another value")
    return x


def one_sided(alternative: str, both: bool = True) -> str:
    """The alternative if it is one that the caller can test."""
    names = ALTERNATIVES if both else ALTERNATIVES[:2]
    if alternative not in names:
        raise ValueError(f"alternative: {alternative!r} must be one of {', '.join(names)}; choose one")
    return alternative


def mean_sd(values: list[float], size: float = 0.0) -> tuple[float, float]:
    """Mean and sample sd (n - 1). The sd is exactly 0 below 8 ulp of the values or of `size`.

    Formula: sqrt(sum (x - mean)^2 / (n - 1)), both sums exact before one rounding (math.fsum).
    """
    centre = math.fsum(values) / len(values)
    if min(values) == max(values):
        return values[0], 0.0
    sd = math.sqrt(math.fsum((x - centre) ** 2 for x in values) / (len(values) - 1))
    return centre, sd if sd > NOISE * max(size, *map(abs, values)) else 0.0


def pairs(new: Sequence[float], base: Sequence[float], least: int) -> tuple[list[float], float]:
    """(new - base of each pair with rounding noise set to 0, largest absolute value of both arms)."""
    xs, ys = checked("new", new, least), checked("base", base, least)
    if len(xs) != len(ys):
        rule = "pairs need equally many runs"
        raise ValueError(
            f"new and base: {len(xs)} and {len(ys)} values, {rule}; drop the unpaired run by name"
        )
    size = max(map(abs, xs + ys))
    return [d if abs(d) > NOISE * size else 0.0 for d in (x - y for x, y in zip(xs, ys, strict=True))], size


# 2. t-tests -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TTest:
    """Result of a t-test. t = (difference - null) / se; [low, high] is the two-sided interval at `level`."""

    name: str
    alternative: str
    n_new: int
    n_base: int  # 0: one sample
    difference: float
    null: float
    se: float
    t: float
    df: float
    p: float
    level: float
    low: float
    high: float


def t_test(
    name: str,
    alternative: str,
    n: tuple[int, int],
    difference: float,
    parts: Sequence[tuple[float, float]],  # (variance, its degrees of freedom) of independent summands
    level: float,
    null: float = 0.0,
) -> TTest:
    """t, p and interval of a difference whose variance is a sum; df after Satterthwaite.

    df = (sum v)^2 / sum(v^2 / df_v). p of "less" is P(T_df <= t). Interval: difference -+ se * t quantile.
    """
    from scipy.special import stdtr, stdtrit

    one_sided(alternative)
    level = number("level", level, 0, 1)
    variance = math.fsum(v for v, _ in parts)
    if variance <= 0:
        why = "all values (or differences of pairs) are equal, so a t-test does not exist"
        raise NoVariance(f"{name}: {why}; look for duplicated logs, or add runs or printed digits")
    df = 1 / math.fsum((v / variance) ** 2 / d for v, d in parts)
    se = math.sqrt(variance)
    t = (difference - null) / se
    tail = {"less": t, "greater": -t, "two-sided": -abs(t)}[alternative]
    p = min(1.0, float(stdtr(df, tail)) * (2 if alternative == "two-sided" else 1))
    half = -float(stdtrit(df, (1 - level) / 2)) * se
    low, high = difference - half, difference + half
    return TTest(name, alternative, *n, difference, null, se, t, df, p, level, low, high)


def welch(
    new: Sequence[float],
    base: Sequence[float],
    alternative: str = "less",
    level: float = 0.95,
    null: float = 0.0,  # difference under the null hypothesis
) -> TTest:
    """Welch's test of mean(new) - mean(base), variances not assumed equal.

    t = difference / sqrt(s_new^2/n_new + s_base^2/n_base), df after Welch and Satterthwaite.
    Errors: fewer than 2 values an arm; NoVariance if both arms have none (one arm may).
    Source: Welch, Biometrika 1947; equals scipy.stats.ttest_ind(equal_var=False).
    """
    xs, ys = checked("new", new, 2), checked("base", base, 2)
    (mx, sx), (my, sy) = mean_sd(xs), mean_sd(ys)
    parts = [(sx**2 / len(xs), len(xs) - 1), (sy**2 / len(ys), len(ys) - 1)]
    return t_test("Welch", alternative, (len(xs), len(ys)), mx - my, parts, level, null)


def student(
    new: Sequence[float], base: Sequence[float], alternative: str = "less", level: float = 0.95
) -> TTest:
    """Student's two-sample test with pooled variance, df = n_new + n_base - 2.

    Errors: as welch. Source: scipy.stats.ttest_ind(equal_var=True).
    """
    xs, ys = checked("new", new, 2), checked("base", base, 2)
    (mx, sx), (my, sy) = mean_sd(xs), mean_sd(ys)
    df = len(xs) + len(ys) - 2
    pooled = ((len(xs) - 1) * sx**2 + (len(ys) - 1) * sy**2) / df
    parts = [(pooled * (1 / len(xs) + 1 / len(ys)), df)]
    return t_test("Student", alternative, (len(xs), len(ys)), mx - my, parts, level)


def one_sample(
    values: Sequence[float], target: float, alternative: str = "less", level: float = 0.95
) -> TTest:
    """t-test of mean(values) against a target; `difference` is mean - target.

    t = (mean - target) / (s / sqrt(n)). Errors: fewer than 2 values; NoVariance if all are equal.
    Source: scipy.stats.ttest_1samp; the community's rule is p < 0.01 of "less" against 3.28.
    """
    xs = checked("values", values, 2)
    target = number("target", target, -LARGEST, LARGEST)
    m, s = mean_sd(xs, abs(target))
    return t_test("one-sample", alternative, (len(xs), 0), m - target, [(s**2 / len(xs), len(xs) - 1)], level)


def half_interval(values: Sequence[float], level: float = 0.95) -> float:
    """Half the width of the two-sided interval of the mean by Student's t; 0 for equal values.

    Formula: t((1 + level) / 2; n - 1) s / sqrt(n). Errors: fewer than 2 values.
    """
    try:
        test = one_sample(values, 0.0, level=level)
    except NoVariance:
        return 0.0
    return (test.high - test.low) / 2


def non_inferiority(new: Sequence[float], base: Sequence[float], margin: float, level: float = 0.95) -> TTest:
    """Welch's test of H1: mean(new) < mean(base) + margin; the margin (>= 0) is `null` of the result.

    A small p says that new is worse by less than the margin. The interval is that of the plain difference.
    Errors: as welch, and a negative or infinite margin. Source: statistics.md 3.3,
    ttest_ind(new - margin, base, equal_var=False, alternative="less").
    """
    return welch(new, base, "less", level, number("margin", margin, 0, LARGEST, closed=True))


@dataclass(frozen=True)
class Paired:
    """The paired t-test, with a sign-flip permutation test and Wilcoxon's signed ranks beside it."""

    test: TTest
    sd: float  # of the differences
    permutation: Permutation
    wilcoxon_p: float


def paired(
    new: Sequence[float],
    base: Sequence[float],
    alternative: str = "less",
    level: float = 0.95,
    pairs_per_block: int = 1,  # 2 for ABBA BAAB: both pairs of a block change sign together
    null: float = 0.0,  # mean difference under the null hypothesis
) -> Paired:
    """Analysis of interleaved runs: new[i] and base[i] ran one after the other.

    t = (mean(d) - null) / (s_d / sqrt(n)), d = new - base. The permutation test flips the sign of whole
    blocks of consecutive d - null, which Wilcoxon ranks: exact up to 20,000 sign patterns, else 20,000 seeded
    draws; its p is at least 1/2^blocks. Errors: arms of different length, fewer than 2 pairs, a block that
    does not divide them; NoVariance if all differences are equal. Source: scipy.stats.ttest_rel and wilcoxon
    (exact when small).
    """
    import numpy as np
    from scipy.stats import wilcoxon

    d, size = pairs(new, base, 2)
    if isinstance(pairs_per_block, bool) or not isinstance(pairs_per_block, int) or pairs_per_block < 1:
        raise ValueError(f"pairs_per_block: {pairs_per_block!r} must be a whole number from 1; 2 is ABBA")
    if len(d) % pairs_per_block:
        raise ValueError(f"pairs_per_block: {pairs_per_block} must divide the {len(d)} pairs; use 1")
    m, s = mean_sd(d, size)
    test = t_test("paired", alternative, (len(d), len(d)), m, [(s**2 / len(d), len(d) - 1)], level, null)
    d = [x - null for x in d]
    grain = NOISE * size  # so that equal differences tie in spite of rounding
    ranks_p = float(wilcoxon(np.round(np.array(d) / grain), alternative=alternative).pvalue)
    blocks = np.array(d).reshape(-1, pairs_per_block).sum(axis=1)
    return Paired(test, s, sign_flips(blocks, alternative, m - null), ranks_p)


def non_inferiority_pairs(
    new: Sequence[float], base: Sequence[float], margin: float, level: float = 0.95
) -> Paired:
    """non_inferiority by the differences of pairs, which leave out what the runs of a pair share.

    Errors: as paired, and a negative or infinite margin.
    """
    return paired(new, base, "less", level, null=number("margin", margin, 0, LARGEST, closed=True))


# 3. robust and permutation tests ------------------------------------------------------------------------


@dataclass(frozen=True)
class Permutation:
    """A permutation p-value. Exact: hits / resamples; drawn: (hits + 1) / (resamples + 1), seed 0."""

    alternative: str
    difference: float
    p: float
    exact: bool
    resamples: int


def count_hits(
    statistics: Callable[[], object],  # yields arrays; the observed statistic is one of an exact enumeration
    observed: float,
    noise: float,  # statistics closer than this are equal
    alternative: str,
    difference: float,
    exact: bool,
) -> Permutation:
    """p of `observed` among the resampled statistics, for a statistic centred on 0 under the null."""
    hits = total = 0
    for found in statistics():
        total += len(found)
        if alternative == "two-sided":
            hits += int((abs(found) >= abs(observed) - noise).sum())
        else:
            sign = 1 if alternative == "less" else -1
            hits += int((sign * found <= sign * observed + noise).sum())
    p = hits / total if exact else (hits + 1) / (total + 1)
    return Permutation(alternative, difference, p, exact, total)


def sign_flips(blocks, alternative: str, difference: float) -> Permutation:
    """Permutation test of block sums (an array): each keeps or changes its sign with probability 1/2."""
    import numpy as np

    n = len(blocks)
    exact = 2 ** min(n, 64) <= EXACT_LIMIT
    rows = max(1, 2_000_000 // n)

    def resamples():
        if exact:
            bits = (np.arange(2**n)[:, None] >> np.arange(n)) & 1
            yield (1 - 2 * bits) @ blocks
            return
        rng = np.random.default_rng(0)
        for start in range(0, EXACT_LIMIT, rows):
            yield (1 - 2 * rng.integers(0, 2, (min(rows, EXACT_LIMIT - start), n))) @ blocks

    noise = 64 * NOISE * float(np.abs(blocks).sum())
    return count_hits(resamples, float(blocks.sum()), noise, alternative, difference, exact)


def permutation_test(new: Sequence[float], base: Sequence[float], alternative: str = "less") -> Permutation:
    """Permutation test of mean(new) - mean(base): labels exchanged in all ways, no normality assumed.

    Exact when C(n_new + n_base, n_new) <= 20,000, else 20,000 draws with seed 0 (standard error of p at
    0.01: 0.0007). The smallest exact p is 1 / C(n, n_new). Equal values in both arms give p = 1.
    Errors: an empty arm, or fewer than 3 values in all. Source: Fisher 1935.
    """
    import numpy as np

    xs, ys = checked("new", new, 1), checked("base", base, 1)
    one_sided(alternative)
    n, k = len(xs) + len(ys), len(xs)
    if n < 3:
        raise ValueError(f"new and base: {n} values in all, the rule is at least 3; make more runs")
    difference = mean_sd(xs)[0] - mean_sd(ys)[0]
    pool = np.array(xs + ys) - math.fsum(xs + ys) / n  # centred: the sum of one arm says all
    sign, k = (1, k) if 2 * k <= n else (-1, n - k)  # enumerate the smaller arm
    exact = math.comb(n, k) <= EXACT_LIMIT
    rows = max(1, 2_000_000 // n)

    def resamples():
        if exact:
            yield sign * pool[np.array(list(itertools.combinations(range(n), k)))].sum(axis=1)
            return
        rng = np.random.default_rng(0)
        for start in range(0, EXACT_LIMIT, rows):
            many = np.tile(pool, (min(rows, EXACT_LIMIT - start), 1))
            yield sign * rng.permuted(many, axis=1)[:, :k].sum(axis=1)

    observed = float(pool[: len(xs)].sum())
    noise = 64 * NOISE * (float(np.abs(pool).sum()) + max(map(abs, xs + ys)))
    return count_hits(resamples, observed, noise, alternative, difference, exact)


def yuen(
    new: Sequence[float],
    base: Sequence[float],
    trim: float = 0.2,
    alternative: str = "less",
    level: float = 0.95,
) -> TTest:
    """Yuen's test of trimmed means: Welch's test after dropping floor(trim * n) values at each end.

    Variance of a trimmed mean: (n - 1) s_w^2 / (h (h - 1)), s_w the winsorised sd, h = n - 2 floor(trim n).
    `difference` is that of the trimmed means. Errors: trim outside [0, 0.5), h < 2 in an arm; NoVariance.
    Source: Yuen, Biometrika 1974; equals scipy.stats.ttest_ind(equal_var=False, trim=0.2).
    """
    if number("trim", trim, 0, 0.5, closed=True) == 0.5:
        raise ValueError("trim: 0.5 must be below 0.5, or nothing is left; the usual value is 0.2")
    centres, parts, sizes = [], [], []
    for name, values in (("new", new), ("base", base)):
        xs = sorted(checked(name, values, 2))
        cut = int(trim * len(xs))
        kept = xs[cut : len(xs) - cut]
        if len(kept) < 2:
            raise ValueError(
                f"{name}: {len(kept)} value left after trimming, at least 2 needed; make more runs"
            )
        centre, _ = mean_sd(kept)
        _, s = mean_sd([kept[0]] * cut + kept + [kept[-1]] * cut)
        h = len(kept)
        parts.append(((len(xs) - 1) * s**2 / (h * (h - 1)), h - 1))
        centres.append(centre)
        sizes.append(len(xs))
    return t_test("Yuen", alternative, (sizes[0], sizes[1]), centres[0] - centres[1], parts, level)


# 4. always-valid p --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AlwaysValid:
    """Evidence after each run. p[i] may be looked at after run i + 1, and acted on, without inflation."""

    alternative: str
    n: int
    t: tuple[float, ...]  # t or z statistic, positive in the direction of the alternative; 0 before run 2
    log_evidence: tuple[float, ...]  # natural log of L_n
    p: tuple[float, ...]  # min over k <= n of 1 / L_k, at most 1
    p_final: float

    def decided_at(self, alpha: float) -> int | None:
        """Number of runs after which p was first <= alpha; None if it never was."""
        return next((i + 1 for i, p in enumerate(self.p) if p <= alpha), None)


def log_t_evidence(t, n, scale: float = 1.0):
    """log of the t e-process L_n; arrays broadcast. t is positive in the direction of the alternative.

    L_n = int_0^inf nct.pdf(t; n-1, delta sqrt(n)) pi(delta) d delta / t.pdf(t; n-1), pi half-normal.
    With V^2 = chi^2_{n-1} / (n-1), the noncentral t is a normal mixture over V, and both integrals close:
        c = n scale^2,  h = c / (1 + c),  w = t^2 / (n - 1 + t^2),  z = h w
        log L = log 2 - log(1 + c) / 2 - n/2 log(1 - z) + log T_n(sign(t) sqrt(n z / (1 - z)))
    with T_n Student's cdf at n (not n - 1) degrees of freedom. Finite for t = +-inf: at most
    log 2 + (n - 1)/2 log(1 + c). Error: 1e-12 relative to direct quadrature; where T_n < 1e-290 (L far
    below 1) its tail formula, 1e-3 of log L. Source: statistics.md 3.5; closed form derived here.
    """
    import numpy as np
    from scipy.special import gammaln, stdtr

    t, n = np.clip(np.asarray(t, float), -LARGEST, LARGEST), np.asarray(n, float)
    c = n * scale**2
    z = c / (1 + c) * (t * t / (n - 1 + t * t))
    u = np.sign(t) * np.sqrt(n * z / (1 - z))
    below = stdtr(n, u)
    # T_n(-u) ~ pdf(u) (1 + u^2/n) n / ((n - 1) u), and 1 + u^2/n = 1 / (1 - z)
    log_pdf = gammaln((n + 1) / 2) - gammaln(n / 2) - 0.5 * np.log(n * np.pi) + (n + 1) / 2 * np.log1p(-z)
    tail = log_pdf - np.log1p(-z) + np.log(n / ((n - 1) * np.maximum(np.abs(u), 1)))
    log_below = np.where(below < 1e-290, tail, np.log(np.maximum(below, 1e-290)))
    return math.log(2) - 0.5 * np.log1p(c) - n / 2 * np.log1p(-z) + log_below


def running(alternative: str, t: list[float], log_evidence: list[float]) -> AlwaysValid:
    """AlwaysValid from the statistics after each run: p is the running minimum of min(1, 1 / L)."""
    p = list(itertools.accumulate((math.exp(-max(0.0, x)) for x in log_evidence), min))
    return AlwaysValid(alternative, len(t), tuple(t), tuple(log_evidence), tuple(p), p[-1])


def always_valid(
    values: Sequence[float],
    target: float,
    alternative: str = "less",
    scale: float = 1.0,  # of the half-normal prior on the effect (target - mean) / sd
    size: float = 0.0,  # magnitude of the numbers that the values are differences of
) -> AlwaysValid:
    """Always-valid p of H1: mean < target (or "greater") with unknown sd, in run order: peek at will.

    t_n = (target - mean) / (s / sqrt(n)), L_n as in log_t_evidence, p_n = min over k <= n of 1 / L_k; under
    any mean >= target and any stopping rule P(some p_n <= alpha) <= alpha for normal values. The first
    value gives no evidence (L_1 = 1). Equal values: t is infinite and L its finite limit (7.8 for three),
    or, on the target itself, t = 0. Errors: no value, non-finite ones, scale outside [0.001, 1000].
    Source: statistics.md 3.5 (measured false accepts 0.6 % at alpha 0.01, n = 2..30).
    """
    one_sided(alternative, both=False)
    xs = checked("values", values, 1)
    target = number("target", target, -LARGEST, LARGEST)
    scale, sign = number("scale", scale, 1e-3, 1e3, closed=True), 1 if alternative == "less" else -1
    t, centre, squares, biggest = [0.0], sign * (target - xs[0]), 0.0, max(size, abs(target), abs(xs[0]))
    for n, x in enumerate(xs[1:], 2):  # Welford's update of mean and sum of squares of the distances
        gap = sign * (target - x) - centre
        centre += gap / n
        squares += gap * gap * (n - 1) / n
        biggest = max(biggest, abs(x))
        sd = math.sqrt(squares / (n - 1))
        if sd > NOISE * biggest:
            t.append(centre / (sd / math.sqrt(n)))
        else:
            t.append(math.copysign(math.inf, centre) if abs(centre) > NOISE * biggest else 0.0)
    if len(t) == 1:
        return running(alternative, t, [0.0])
    return running(alternative, t, [0.0, *log_t_evidence(t[1:], range(2, len(t) + 1), scale).tolist()])


def always_valid_pairs(
    new: Sequence[float],
    base: Sequence[float],
    margin: float = 0.0,  # 0: is new lower; positive: is new worse by less than this (non-inferiority)
    alternative: str = "less",
    scale: float = 1.0,
) -> AlwaysValid:
    """Always-valid p for interleaved runs: the differences new - base of the pairs against the margin.

    As always_valid, one look after each pair. Errors: arms of different length and those of always_valid.
    """
    d, size = pairs(new, base, 1)
    return always_valid(d, margin, alternative, scale, size)


def always_valid_known_sd(
    values: Sequence[float],
    target: float,
    sd: float,  # of one value, known beforehand
    tau: float | None = None,  # scale of the half-normal prior on target - mean, in the values' unit; else sd
    alternative: str = "less",
) -> AlwaysValid:
    """The half-normal mixture SPRT: as always_valid, with a known sd, so that the first run counts too.

    log L_n = log 2 + log(s^2 / (s^2 + n tau^2)) / 2 + S^2 tau^2 / (2 s^2 (s^2 + n tau^2))
              + log Phi(S tau / (s sqrt(s^2 + n tau^2))),  S = sum(target - x).
    Errors: sd not positive, tau / sd outside [0.001, 1000]. Source: statistics.md 3.5 (Robbins' mixture).
    """
    from scipy.special import erfcx, log_ndtr

    one_sided(alternative, both=False)
    xs = checked("values", values, 1)
    target, sd = number("target", target, -LARGEST, LARGEST), number("sd", sd, 0, LARGEST)
    ratio = number("tau", sd if tau is None else tau, 0, LARGEST) / sd
    number("tau / sd", ratio, 1e-3, 1e3, closed=True)
    number("(value - target) / sd", max(abs(x - target) / sd for x in xs), 0, LARGEST, closed=True)
    sign = 1 if alternative == "less" else -1
    z, logs, total = [], [], 0.0
    for n, x in enumerate(xs, 1):
        total += sign * (target - x) / sd  # S / s
        shrunk = total * ratio / math.sqrt(1 + n * ratio**2)
        z.append(total / math.sqrt(n))
        # x^2 / 2 + log Phi(x), which for x < 0 would cancel: Phi(x) = erfcx(-x / sqrt 2) exp(-x^2 / 2) / 2
        gain = shrunk**2 / 2 + log_ndtr(shrunk) if shrunk > 0 else math.log(erfcx(-shrunk / math.sqrt(2)) / 2)
        logs.append(math.log(2) - 0.5 * math.log1p(n * ratio**2) + float(gain))
    return running(alternative, z, logs)


# 5. loss-adjusted speed ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Slope:
    """k seconds per unit of loss with its standard error; df of the residuals behind it."""

    k: float
    sd: float
    df: float
    n: int


@dataclass(frozen=True)
class LossAdjusted:
    """D = d_time + k d_loss in seconds: negative is faster at equal loss. se_*: the parts of its error."""

    test: TTest
    d_time: float
    d_loss: float
    k: float
    sd_k: float
    se_time: float
    se_loss: float  # k times the standard error of d_loss
    se_k: float  # |d_loss| sd_k


def line(xs: Sequence[float], ys: list[float]) -> tuple[float, float]:
    """Least-squares slope of y on x and its standard error (n - 2 degrees of freedom)."""
    mx, my = math.fsum(xs) / len(xs), math.fsum(ys) / len(ys)
    sxx = math.fsum((x - mx) ** 2 for x in xs)
    b = math.fsum((x - mx) * (y - my) for x, y in zip(xs, ys, strict=True)) / sxx
    rest = math.fsum((y - my - b * (x - mx)) ** 2 for x, y in zip(xs, ys, strict=True))
    return b, math.sqrt(rest / (len(xs) - 2) / sxx)


def slope_from_sweep(steps: Sequence[float], losses: Sequence[float], times: Sequence[float]) -> Slope:
    """Seconds per unit of loss, from runs of one arm at several step counts (near the count compared).

    k = -(d time / d step) / (d loss / d step), both by least squares on the exact step count, so noise in
    neither biases the slope; (sd_k / k)^2 = (sd_a / a)^2 + (sd_b / b)^2 (delta method).
    Errors: fewer than 3 runs or 2 step counts, time not rising, loss not falling by at least 3 standard
    errors of its slope (below that 1/b has no usable error). Source: statistics.md 3.4.
    """
    ns, ls, ts = checked("steps", steps, 3), checked("losses", losses, 3), checked("times", times, 3)
    if not len(ns) == len(ls) == len(ts):
        raise ValueError(
            f"steps, losses, times: {len(ns)}, {len(ls)}, {len(ts)} values must be as many; pair them"
        )
    if not all(n >= 1 and n == int(n) for n in ns):
        raise ValueError(f"steps: {min(ns):g} to {max(ns):g} must be whole numbers from 1; give step counts")
    if len(set(ns)) < 2:
        raise ValueError(f"steps: all runs have {ns[0]:g}, at least 2 step counts needed; sweep the length")
    (a, sd_a), (b, sd_b) = line(ns, ts), line(ns, ls)
    if a <= 0:
        raise ValueError(f"times: slope {a:.3g} s per step must be positive; check that one machine ran all")
    if b >= 0 or -b < 3 * sd_b:
        found = f"slope {b:.3g} +- {sd_b:.2g} per step"
        raise ValueError(
            f"losses: {found} must be negative by 3 standard errors; widen the sweep or add runs"
        )
    k = number("k", -a / b, 0, LARGEST)
    return Slope(k, k * math.hypot(sd_a / a, sd_b / b), len(ns) - 2, len(ns))


def loss_adjusted(
    new_times: Sequence[float],
    base_times: Sequence[float],
    new_losses: Sequence[float],
    base_losses: Sequence[float],
    k: float,  # seconds per unit of loss, positive
    sd_k: float,  # standard error of k
    df_k: float = math.inf,  # Slope.df; inf takes sd_k as exact
    alternative: str = "less",
    level: float = 0.95,
) -> LossAdjusted:
    """Is new faster at equal loss: D = dT + k dL with its error, interval and p.

    var D = s_T,new^2/n + s_T,base^2/n + k^2 (s_L,new^2/n + s_L,base^2/n) + dL^2 var k, df after
    Satterthwaite. Times and losses count as independent (steps are fixed). Errors: fewer than 2 values in a
    list, k <= 0, sd_k < 0, df_k < 1; NoVariance if every term is 0. Source: statistics.md 3.4.
    """
    k, sd_k = number("k", k, 0, LARGEST), number("sd_k", sd_k, 0, LARGEST, closed=True)
    df_k = number("df_k", df_k, 1, math.inf, closed=True)
    lists = {"new_times": new_times, "base_times": base_times}
    lists |= {"new_losses": new_losses, "base_losses": base_losses}
    found = [checked(name, values, 2) for name, values in lists.items()]
    (tn, stn), (tb, stb), (ln, sln), (lb, slb) = map(mean_sd, found)
    sizes = [len(xs) for xs in found]
    weights = (1.0, 1.0, k * k, k * k)
    parts = [(w * s * s / n, n - 1) for w, s, n in zip(weights, (stn, stb, sln, slb), sizes, strict=True)]
    parts.append((((ln - lb) * sd_k) ** 2, df_k))
    d_time, d_loss = tn - tb, ln - lb
    test = t_test("loss-adjusted", alternative, (sizes[0], sizes[1]), d_time + k * d_loss, parts, level)
    se_time, se_loss = (math.sqrt(parts[i][0] + parts[i + 1][0]) for i in (0, 2))
    return LossAdjusted(test, d_time, d_loss, k, sd_k, se_time, se_loss, abs(d_loss) * sd_k)


# 6. several tests at once --------------------------------------------------------------------------------


def holm(pvalues: Sequence[float]) -> tuple[float, ...]:
    """Holm's adjusted p-values, in the order given; compare each with alpha.

    Sorted p_(i) of m: adjusted = max over j <= i of min(1, (m - j + 1) p_(j)). Holds the family-wise error
    under any dependence. Errors: no p-value, or one outside [0, 1]. Source: Holm, Scand. J. Stat. 1979.
    """
    ps = [number("p-value", p, 0, 1, closed=True) for p in checked("pvalues", pvalues, 1)]
    adjusted, highest = [0.0] * len(ps), 0.0
    for rank, i in enumerate(sorted(range(len(ps)), key=ps.__getitem__)):
        highest = max(highest, min(1.0, (len(ps) - rank) * ps[i]))
        adjusted[i] = highest
    return tuple(adjusted)
