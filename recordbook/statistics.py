"""Statistics that decide whether a change is real: pure functions of lists of floats.

Values are in the unit of the input (seconds for times, nats for losses, bits for bits per byte); a
`difference` is new minus base, so faster and better are negative and the usual alternative is "less".
Every function checks its input: ValueError names value, rule and remedy, and NoVariance (a ValueError) says
that a t statistic does not exist. No function returns NaN. numpy and scipy are imported at the first call.

Contents: 1 input, 2 t-tests, 3 robust and permutation tests, 4 always-valid p, 5 power,
6 loss-adjusted speed, 7 several tests at once, 8 drift, order and outliers.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist, median

ALTERNATIVES = ("less", "greater", "two-sided")
LARGEST = 1e100  # squares and their sums stay finite below
NOISE = 8 * 2.0**-52  # an sd below this share of the values is rounding, not spread
EXACT_LIMIT = 20_000  # resamples enumerated at most, and drawn otherwise
MAX_RUNS = 1_000_000  # a plan beyond this is refused
BLOCKED_ABOVE = 0.5  # order imbalance above which the arms count as blocked
OUTLIER_MADS = 4.0
MAD_TO_SD = 1.4826  # sd of a normal distribution over its median absolute deviation


class NoVariance(ValueError):
    """All values are equal where a test needs spread; a table prints a dash, a verdict refuses."""


# 1. input -------------------------------------------------------------------------------------------------


def checked(name: str, values: Sequence[float], least: int) -> list[float]:
    """The values as floats. ValueError unless at least `least` finite numbers of size up to 1e100."""
    if isinstance(values, str | bytes):
        raise ValueError(f"{name}: {values!r:.40} is text, must be a list of numbers; parse it first")
    try:
        found = [float(x) for x in values]
    except (TypeError, ValueError):
        raise ValueError(f"{name}: must be a list of numbers, got {values!r:.60}; parse it first") from None
    for i, x in enumerate(found):
        if not abs(x) <= LARGEST:
            rule = "must be finite and at most 1e100; count a failed run as failed, do not test its value"
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
        why = "all values are equal in each sample, so a t-test does not exist"
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
) -> Paired:
    """Analysis of interleaved runs: new[i] and base[i] ran one after the other.

    t = mean(d) / (s_d / sqrt(n)), d = new - base. The permutation test flips the sign of whole blocks of
    consecutive pairs: exact up to 20,000 sign patterns, else 20,000 seeded draws; its p is at least
    1/2^blocks. Errors: arms of different length, fewer than 2 pairs, a block that does not divide them;
    NoVariance if all differences are equal. Source: scipy.stats.ttest_rel and wilcoxon (exact when small).
    """
    import numpy as np
    from scipy.stats import wilcoxon

    d, size = pairs(new, base, 2)
    if isinstance(pairs_per_block, bool) or not isinstance(pairs_per_block, int) or pairs_per_block < 1:
        raise ValueError(f"pairs_per_block: {pairs_per_block!r} must be a whole number from 1; 2 is ABBA")
    if len(d) % pairs_per_block:
        raise ValueError(f"pairs_per_block: {pairs_per_block} must divide the {len(d)} pairs; use 1")
    m, s = mean_sd(d, size)
    test = t_test("paired", alternative, (len(d), len(d)), m, [(s**2 / len(d), len(d) - 1)], level)
    grain = NOISE * size  # so that equal differences tie in spite of rounding
    ranks_p = float(wilcoxon(np.round(np.array(d) / grain), alternative=alternative).pvalue)
    blocks = np.array(d).reshape(-1, pairs_per_block).sum(axis=1)
    return Paired(test, s, sign_flips(blocks, alternative, m), ranks_p)


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
    ways = math.comb(n, k)
    rows = max(1, 2_000_000 // n)

    def resamples():
        if ways <= EXACT_LIMIT:
            yield pool[np.array(list(itertools.combinations(range(n), k)))].sum(axis=1)
            return
        rng = np.random.default_rng(0)
        for start in range(0, EXACT_LIMIT, rows):
            many = np.tile(pool, (min(rows, EXACT_LIMIT - start), 1))
            yield rng.permuted(many, axis=1)[:, :k].sum(axis=1)

    noise = 64 * NOISE * (float(np.abs(pool).sum()) + max(map(abs, xs + ys)))
    return count_hits(resamples, float(pool[:k].sum()), noise, alternative, difference, ways <= EXACT_LIMIT)


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
    or, on the target itself, t = 0. Errors: no value, non-finite ones, scale <= 0.
    Source: statistics.md 3.5 (measured false accepts 0.6 % at alpha 0.01, n = 2..30).
    """
    one_sided(alternative, both=False)
    xs = checked("values", values, 1)
    target = number("target", target, -LARGEST, LARGEST)
    scale, sign = number("scale", scale, 0, LARGEST), 1 if alternative == "less" else -1
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
    Errors: sd or tau not positive. Source: statistics.md 3.5 (Robbins' mixture).
    """
    from scipy.special import log_ndtr

    one_sided(alternative, both=False)
    xs = checked("values", values, 1)
    target, sd = number("target", target, -LARGEST, LARGEST), number("sd", sd, 0, LARGEST)
    ratio, sign = (
        number("tau", sd if tau is None else tau, 0, LARGEST) / sd,
        1 if alternative == "less" else -1,
    )
    z, logs, total = [], [], 0.0
    for n, x in enumerate(xs, 1):
        total += sign * (target - x) / sd  # S / s
        shrunk = total * ratio / math.sqrt(1 + n * ratio**2)
        z.append(total / math.sqrt(n))
        logs.append(math.log(2) - 0.5 * math.log1p(n * ratio**2) + shrunk**2 / 2 + float(log_ndtr(shrunk)))
    return running(alternative, z, logs)


# 5. power -------------------------------------------------------------------------------------------------


def t_power(df: float, noncentrality: float, alpha: float) -> float:
    """P(one-sided t-test rejects at alpha) = nct.sf(t_{1 - alpha, df}; df, noncentrality)."""
    from scipy.special import stdtrit
    from scipy.stats import nct

    return float(nct.sf(-stdtrit(df, alpha), df, noncentrality))


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


# 6. loss-adjusted speed ---------------------------------------------------------------------------------


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
    k = -a / b
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


# 7. several tests at once -------------------------------------------------------------------------------


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


# 8. drift, order and outliers ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Drift:
    """Trend against run order; slope in the values' unit per run, [low, high] at `level`."""

    n: int
    rho: float
    p: float  # two-sided, of rho
    slope: float
    level: float
    low: float
    high: float


@dataclass(frozen=True)
class ArmOrder:
    """Least squares value ~ arm + order: the arm's effect freed of a linear drift, and the drift itself."""

    effect: TTest
    slope: float  # per run
    slope_se: float
    slope_p: float  # two-sided


@dataclass(frozen=True)
class Order:
    """How arms lie in time. imbalance 0: same mean position (ABBA); 1: one arm wholly before the other."""

    pattern: str
    imbalance: float
    blocked: bool


@dataclass(frozen=True)
class DriftRule:
    """Whether drift could have made the gain; `reason` is a sentence."""

    no_verdict: bool
    total: float  # slope * n
    limit: float  # a quarter of the gain
    order: Order
    drift: Drift
    reason: str


def arm_positions(arms: Sequence, count: int) -> dict:
    """Positions 0.. of each arm in run order; ValueError unless there is one label a value."""
    labels = list(arms)
    if len(labels) != count:
        raise ValueError(
            f"arms: {len(labels)} labels for {count} values, must be one each; give all in run order"
        )
    return {label: [i for i, x in enumerate(labels) if x == label] for label in dict.fromkeys(labels)}


def ranks(values: list[float]) -> list[float]:
    """Ranks from 1; equal values share their mean rank."""
    ordered = sorted(values)
    first = {x: i for i, x in reversed(list(enumerate(ordered)))}
    last = {x: i for i, x in enumerate(ordered)}
    return [(first[x] + last[x]) / 2 + 1 for x in values]


def rank_trend(groups: list[list[float]]) -> tuple[float, float]:
    """Spearman's rho against order, pooled over groups ranked each for itself, and its two-sided p.

    p by enumerating the orders within groups when there are at most 20,000, else from
    t = rho sqrt(df / (1 - rho^2)), df = n - groups - 1, and never below 2 / number of orders.
    """
    from scipy.special import stdtr

    centred = [[r - (len(g) + 1) / 2 for r in ranks(g)] for g in groups]
    places = [[i - (len(g) - 1) / 2 for i in range(len(g))] for g in groups]
    size = math.sqrt(
        math.fsum(r * r for g in centred for r in g) * math.fsum(x * x for g in places for x in g)
    )
    if size == 0:
        return 0.0, 1.0

    def score(g: Sequence[float], x: list[float]) -> float:
        return math.fsum(a * b for a, b in zip(g, x, strict=True))

    rho = max(-1.0, min(1.0, math.fsum(map(score, centred, places)) / size))
    ways = math.prod(math.factorial(min(len(g), 20)) for g in groups)
    if ways <= EXACT_LIMIT:
        scores = [
            [score(g, x) for g in itertools.permutations(c)] for c, x in zip(centred, places, strict=True)
        ]
        found = [abs(sum(row)) / size for row in itertools.product(*scores)]
        return rho, sum(x >= abs(rho) - 1e-9 for x in found) / len(found)
    df = sum(map(len, groups)) - len(groups) - 1
    t = abs(rho) * math.sqrt(df / (1 - rho * rho)) if abs(rho) < 1 else math.inf
    return rho, max(2 * float(stdtr(df, -t)), 2 / ways)


def drift(values: Sequence[float], arms: Sequence | None = None, level: float = 0.95) -> Drift:
    """Trend of values in run order: Spearman's rho with p, and the Theil-Sen slope with its interval.

    slope = median of (x_j - x_i) / (j - i). With arms (a label a value) only pairs of the same arm count,
    so a real gain between blocked arms is no drift. Interval: Sen's, from Kendall's variance with ties,
    summed over arms. Equal values: rho 0, p 1, slope 0. Errors: fewer than 3 values, no arm with 3.
    Source: Sen 1968; for one arm scipy.stats.theilslopes and spearmanr (whose p is approximate below n = 8).
    """
    import numpy as np

    xs = checked("values", values, 3)
    level = number("level", level, 0, 1)
    places = list(arm_positions([0] * len(xs) if arms is None else arms, len(xs)).values())
    if max(map(len, places)) < 3:
        raise ValueError(f"arms: at most {max(map(len, places))} values an arm, 3 needed; make more runs")
    slopes, variance = [], 0.0
    for where in places:
        x, at = np.array([xs[i] for i in where]), np.array(where, float)
        i, j = np.triu_indices(len(x), 1)
        slopes.append((x[j] - x[i]) / (at[j] - at[i]))
        ties = np.unique(x, return_counts=True)[1]
        n = len(x)
        variance += (n * (n - 1) * (2 * n + 5) - float((ties * (ties - 1) * (2 * ties + 5)).sum())) / 18
    ordered = np.sort(np.concatenate(slopes))
    reach = NormalDist().inv_cdf((1 + level) / 2) * math.sqrt(variance)
    low = max(round((len(ordered) - reach) / 2) - 1, 0)
    high = min(round((len(ordered) + reach) / 2), len(ordered) - 1)
    rho, p = rank_trend([[xs[i] for i in where] for where in places])
    return Drift(len(xs), rho, p, float(np.median(ordered)), level, float(ordered[low]), float(ordered[high]))


def arm_and_order(
    values: Sequence[float],  # in run order
    arms: Sequence,
    new,  # the label of the new arm; the other label is the base
    alternative: str = "less",
    level: float = 0.95,
) -> ArmOrder:
    """Least squares value = c + effect [arm is new] + slope * order, n - 3 degrees of freedom.

    Errors: not exactly two arms, fewer than 4 values, an exact fit (NoVariance).
    Source: statistics.md 3.8; equals the t statistics of an ordinary regression.
    """
    from scipy.special import stdtr

    xs = checked("values", values, 4)
    places = arm_positions(arms, len(xs))
    if len(places) != 2 or new not in places:
        raise ValueError(f"arms: {len(places)} labels, must be two with {new!r} among them; pick two arms")
    n, n_new = len(xs), len(places[new])
    is_new = [float(i in set(places[new])) - n_new / n for i in range(n)]
    order, mean = [i - (n - 1) / 2 for i in range(n)], math.fsum(xs) / n

    def dot(a, b) -> float:
        return math.fsum(p * q for p, q in zip(a, b, strict=True))

    y = [x - mean for x in xs]
    aa, oo, ao = dot(is_new, is_new), dot(order, order), dot(is_new, order)
    det = aa * oo - ao * ao  # positive: a 0/1 column is a line in the order only for two values
    effect = (oo * dot(is_new, y) - ao * dot(order, y)) / det
    slope = (aa * dot(order, y) - ao * dot(is_new, y)) / det
    rest = dot(*[[u - effect * v - slope * w for u, v, w in zip(y, is_new, order, strict=True)]] * 2)
    if math.sqrt(rest / n) <= NOISE * max(map(abs, xs)):
        rest = 0.0
    variance = rest / (n - 3)
    sizes = (n_new, n - n_new)
    test = t_test("least squares", alternative, sizes, effect, [(variance * oo / det, n - 3)], level)
    se = math.sqrt(variance * aa / det)
    return ArmOrder(test, slope, se, 2 * float(stdtr(n - 3, -abs(slope) / se)))


def blocked_order(arms: Sequence) -> Order:
    """Are arms confounded with run order? Labels in run order, at least two different ones.

    imbalance = largest over pairs of arms of |mean position A - mean position B| / (half their runs), with
    positions counted among the runs of the two: a linear drift of s per run biases their difference by
    s * imbalance * half. Blocked: above 0.5 (AABB 1, ABAB of 4 0.5, ABBA 0). Errors: fewer than two arms.
    """
    places = arm_positions(arms, len(list(arms)))
    if len(places) < 2:
        raise ValueError(f"arms: {len(places)} label(s), at least two needed; give the labels in run order")
    worst = 0.0
    for a, b in itertools.combinations(places.values(), 2):
        rank = {place: i for i, place in enumerate(sorted(a + b))}
        middle = [math.fsum(rank[i] for i in where) / len(where) for where in (a, b)]
        worst = max(worst, abs(middle[0] - middle[1]) / (len(rank) / 2))
    names = dict(zip(places, "ABCDEFGHIJKLMNOPQRSTUVWXYZ" + "?" * len(places), strict=False))
    return Order("".join(names[x] for x in arms), worst, worst > BLOCKED_ABOVE)


def drift_rule(values: Sequence[float], arms: Sequence, gain: float) -> DriftRule:
    """No verdict when the order is blocked and |slope * n| is above a quarter of the claimed gain.

    slope: within-arm Theil-Sen slope of all runs in run order, n their number. gain: its size counts.
    Errors: as drift and blocked_order; a gain of 0 leaves no verdict if blocked. Source: statistics.md 3.8.
    """
    gain = abs(number("gain", gain, -LARGEST, LARGEST))
    order, found = blocked_order(arms), drift(values, arms)
    total, limit = found.slope * found.n, gain / 4
    refused = order.blocked and (abs(total) > limit or gain == 0)
    where = f"order {order.pattern} is {'blocked' if order.blocked else 'balanced'}"
    size = f"drift over the runs {total:+.3g} is {'above' if abs(total) > limit else 'within'} {limit:.3g}"
    return DriftRule(refused, total, limit, order, found, f"{where}; {size}, a quarter of the gain")


@dataclass(frozen=True)
class Outliers:
    """Positions of values beyond `limit` from the median; flagged, never dropped."""

    median: float
    mad: float
    limit: float
    indices: tuple[int, ...]


def outliers(values: Sequence[float]) -> Outliers:
    """Values with |x - median| > 4 * 1.4826 * MAD.

    MAD 0 (more than half are equal): the scale is then 1.2533 times the mean absolute deviation from the
    median, the same sd for a normal sample, so one odd value among equal ones is still found; all equal:
    none. Errors: fewer than 3 values. Source: statistics.md 3.8; Iglewicz and Hoaglin 1993.
    """
    xs = checked("values", values, 3)
    centre = median(xs)
    away = [abs(x - centre) for x in xs]
    mad = median(away)
    scale = MAD_TO_SD * mad or math.sqrt(math.pi / 2) * math.fsum(away) / len(away)
    limit = OUTLIER_MADS * scale
    noise = NOISE * max(map(abs, xs))
    return Outliers(centre, mad, limit, tuple(i for i, x in enumerate(away) if x > limit + noise))
