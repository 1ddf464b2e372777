"""What else could have made the gain: drift over the runs, their order, outliers.

Values are given in run order, arms as one label a value; input rules and errors as in statistics.py.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist, median

from recordbook.statistics import EXACT_LIMIT, LARGEST, NOISE, TTest, checked, number, t_test

BLOCKED_ABOVE = 0.5  # order imbalance above which the arms count as blocked
LONGEST_FOR_SLOPES = 1_000  # runs of an arm; the pairs of more would not fit in memory
OUTLIER_MADS = 4.0
MAD_TO_SD = 1.4826  # sd of a normal distribution over its median absolute deviation


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
    so a real gain between blocked arms is no drift; arms of more than 1,000 runs are thinned evenly for the
    slope. Interval: Sen's, from Kendall's variance with ties, summed over arms. Equal values: rho 0, p 1,
    slope 0. Errors: fewer than 3 values, no arm with 3.
    Source: Sen 1968; for one arm scipy.stats.theilslopes and spearmanr (whose p is approximate below n = 8).
    """
    import numpy as np

    xs = checked("values", values, 3)
    level = number("level", level, 0, 1)
    places = list(arm_positions([0] * len(xs) if arms is None else arms, len(xs)).values())
    if max(map(len, places)) < 3:
        raise ValueError(f"arms: at most {max(map(len, places))} values an arm, 3 needed; make more runs")
    slopes, variance = [], 0.0
    for full in places:
        where = full[:: math.ceil(len(full) / LONGEST_FOR_SLOPES)]
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
    is_new = [-n_new / n] * n
    for i in places[new]:
        is_new[i] += 1
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
