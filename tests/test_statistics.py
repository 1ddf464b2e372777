"""recordbook: every statistic against scipy or a figure worked by hand, and every input it must refuse."""

import itertools
import json
import math
import subprocess
import sys
import time
import warnings
from dataclasses import fields, is_dataclass
from pathlib import Path

import numpy as np
import pytest
from scipy import integrate, stats

from recordbook import calibration, drift, planning
from recordbook import statistics as rb

ROOT = Path(__file__).resolve().parent.parent
# The published alternating runs of 2025-09-05 (milliseconds, in run order; each new run before its base run).
NEW = [162534, 162926, 163129, 163078, 163144, 163100, 163029, 163224, 163046, 163141]
BASE = [164459, 164306, 164244, 164301, 164370, 164403, 164348, 164833, 164817, 164443]
NEW, BASE = [x / 1000 for x in NEW], [x / 1000 for x in BASE]
ALTERNATING = [x for pair in zip(NEW, BASE, strict=True) for x in pair]
SMALL = ([3.1, 2.9, 3.4, 2.7, 3.3], [3.6, 3.2, 3.9, 3.5])
# Of numpy and scipy; not "error" alone: that also catches what other tests leave to the garbage collector.
pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning", "error::DeprecationWarning")


# t-tests ----------------------------------------------------------------------------------------------------


def test_welch_of_the_published_runs():
    """The README of the record: 163.0351 and 164.4524, Welch 2.85e-12."""
    found = rb.welch(NEW, BASE)
    assert found.difference == pytest.approx(-1.4173, abs=1e-10)
    assert f"{found.p:.2e}" == "2.85e-12"
    assert found.low < found.difference < found.high


@pytest.mark.parametrize("alternative", rb.ALTERNATIVES)
@pytest.mark.parametrize(("new", "base"), [SMALL, (NEW, BASE), ([1, 2, 4], [3, 3.5])])
def test_two_sample_tests_equal_scipy(new, base, alternative):
    for ours, equal_var in ((rb.welch, False), (rb.student, True)):
        found = ours(new, base, alternative, 0.9)
        expected = stats.ttest_ind(new, base, equal_var=equal_var, alternative=alternative)
        assert (found.t, found.p) == pytest.approx((expected.statistic, expected.pvalue), rel=1e-9)
        assert found.df == pytest.approx(expected.df, rel=1e-12)
        two_sided = stats.ttest_ind(new, base, equal_var=equal_var)
        assert (found.low, found.high) == pytest.approx(tuple(two_sided.confidence_interval(0.9)), rel=1e-8)


def test_welch_with_one_constant_arm_is_a_one_sample_test():
    found, expected = rb.welch([1, 2, 4], [3, 3]), rb.one_sample([1, 2, 4], 3)
    assert (found.t, found.df, found.p) == pytest.approx((expected.t, 2, expected.p))


@pytest.mark.parametrize("alternative", rb.ALTERNATIVES)
def test_one_sample_equals_scipy(alternative):
    losses = [3.2776, 3.279, 3.2782, 3.2772, 3.2764]
    found, expected = (
        rb.one_sample(losses, 3.28, alternative),
        stats.ttest_1samp(losses, 3.28, alternative=alternative),
    )
    assert (found.t, found.p, found.df) == pytest.approx((expected.statistic, expected.pvalue, 4), rel=1e-9)
    assert found.difference == pytest.approx(np.mean(losses) - 3.28, abs=1e-12)


def test_non_inferiority_is_the_shifted_welch_test():
    new, base = SMALL
    found = rb.non_inferiority(new, base, 0.25)
    shifted = stats.ttest_ind(np.array(new) - 0.25, base, equal_var=False, alternative="less")
    assert found.p == pytest.approx(shifted.pvalue, rel=1e-9)
    assert (found.null, found.difference) == (0.25, rb.welch(new, base).difference)
    assert rb.non_inferiority(new, base, 0).p == rb.welch(new, base).p


def test_non_inferiority_of_pairs_is_the_shifted_paired_test():
    rng = np.random.default_rng(5)
    base = rng.normal(3.3, 0.002, 8)
    new = base + rng.normal(0.0024, 0.0016, 8)  # what the runs of a pair share is left out
    found = rb.non_inferiority_pairs(new.tolist(), base.tolist(), 0.005)
    expected = stats.ttest_rel(new - 0.005, base, alternative="less")
    assert found.test.p == pytest.approx(expected.pvalue, rel=1e-9)
    assert found.test.difference == pytest.approx((new - base).mean(), rel=1e-9), "not shifted"
    assert found.test.low < found.test.difference < found.test.high
    assert found.test.p < rb.non_inferiority(new.tolist(), base.tolist(), 0.005).p
    shifted = rb.paired((new - 0.005).tolist(), base.tolist())
    assert found.permutation.p == shifted.permutation.p
    assert found.wilcoxon_p == pytest.approx(shifted.wilcoxon_p)


def test_paired_of_the_published_runs():
    """The README of the logs: -1.4173 (sd 0.2631, p 1.86e-8; Wilcoxon 0.00098)."""
    found = rb.paired(NEW, BASE)
    assert (f"{found.test.difference:.4f}", f"{found.sd:.4f}") == ("-1.4173", "0.2631")
    assert (f"{found.test.p:.2e}", f"{found.wilcoxon_p:.5f}") == ("1.86e-08", "0.00098")
    assert found.permutation == rb.Permutation("less", found.test.difference, 1 / 1024, True, 1024)
    assert rb.paired(NEW, BASE, pairs_per_block=2).permutation.p == 1 / 32


@pytest.mark.parametrize("alternative", rb.ALTERNATIVES)
def test_paired_equals_scipy(alternative):
    new, base = [3.1, 2.9, 3.4, 2.7, 3.3, 3.0], [3.6, 2.8, 3.9, 3.5, 3.4, 3.2]
    found = rb.paired(new, base, alternative)
    t = stats.ttest_rel(new, base, alternative=alternative)
    assert (found.test.t, found.test.p) == pytest.approx((t.statistic, t.pvalue), rel=1e-9)
    flips = stats.permutation_test(
        (np.array(new) - base,),
        lambda d, axis: d.mean(axis),
        permutation_type="samples",
        alternative=alternative,
    )
    assert found.permutation.p == pytest.approx(flips.pvalue, abs=1e-12)
    rounded = np.round(np.array(new) - base, 6)  # 0.1 and 3.5 - 3.4 tie
    assert found.wilcoxon_p == pytest.approx(stats.wilcoxon(rounded, alternative=alternative).pvalue)


def test_many_pairs_are_drawn_with_a_fixed_seed():
    rng = np.random.default_rng(1)
    new, base = rng.normal(0, 1, 40), rng.normal(0.4, 1, 40)
    found = rb.paired(new, base)
    assert not found.permutation.exact
    assert found.permutation == rb.paired(new, base).permutation
    assert found.permutation.p == pytest.approx(found.test.p, rel=0.2)


# robust tests -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trim", [0, 0.1, 0.2, 0.3])
def test_yuen_equals_scipy(trim):
    found = rb.yuen(NEW, BASE[:9], trim)
    expected = stats.ttest_ind(NEW, BASE[:9], equal_var=False, trim=trim, alternative="less")
    assert (found.t, found.p, found.df) == pytest.approx(
        (expected.statistic, expected.pvalue, expected.df), rel=1e-9
    )


def test_permutation_by_hand():
    """Of the C(5, 2) = 10 splits of 1..5 only {1, 2} has so low a mean; both tails hold two."""
    assert rb.permutation_test([1, 2], [3, 4, 5]).p == 0.1
    assert rb.permutation_test([1, 2], [3, 4, 5], "greater").p == 1
    assert rb.permutation_test([1, 2], [3, 4, 5], "two-sided").p == 0.2
    assert rb.permutation_test([3, 4, 5], [1, 2], "greater").p == 0.1
    assert rb.permutation_test([1, 1, 1], [1, 1, 1]) == rb.Permutation("less", 0, 1, True, 20)
    assert rb.permutation_test([0.1 + 0.2, 0.3], [0.3, 0.1 + 0.2]).p == 1  # ties in spite of rounding


@pytest.mark.parametrize("alternative", ["less", "greater"])  # scipy doubles the smaller tail
def test_permutation_equals_scipy(alternative):
    new, base = [*SMALL[0], 3.0], SMALL[1]
    found = rb.permutation_test(new, base, alternative)
    expected = stats.permutation_test(
        (new, base), lambda x, y, axis: x.mean(axis) - y.mean(axis), vectorized=True, alternative=alternative
    )
    assert found.exact
    assert found.resamples == math.comb(10, 4)
    assert found.p == pytest.approx(expected.pvalue, abs=1e-12)


def test_permutation_draws_when_there_are_many_splits():
    found = rb.permutation_test(NEW, BASE)
    assert (found.exact, found.resamples, found.p) == (False, 20_000, 1 / 20_001)
    rng = np.random.default_rng(2)
    new, base = rng.normal(0, 1, 30), rng.normal(0.5, 1, 25)
    assert rb.permutation_test(new, base).p == pytest.approx(rb.welch(new, base).p, rel=0.25)
    assert rb.permutation_test(range(5000), [-1.0]).resamples == 5001  # exact, one run in an arm


# always-valid p ---------------------------------------------------------------------------------------------


def quadrature(t: float, n: int, scale: float = 1.0) -> float:
    """log L_n as statistics.md writes it."""

    def integrand(x: float) -> float:
        return stats.nct.pdf(t, n - 1, x * math.sqrt(n)) * 2 * stats.norm.pdf(x, scale=scale)

    top = min(max(t / math.sqrt(n), 0.01), 5.0)
    area = sum(
        integrate.quad(integrand, a, b, epsabs=0, epsrel=1e-10)[0] for a, b in ((0, top), (top, 10 * scale))
    )
    return math.log(area / stats.t.pdf(t, n - 1))


@pytest.mark.parametrize("n", [2, 3, 5, 10, 40])
def test_log_evidence_equals_direct_quadrature(n):
    for t in (-3.0, -0.5, 0.0, 1.0, 2.5, 6.0, 12.0):
        assert float(rb.log_t_evidence(t, n)) == pytest.approx(quadrature(t, n), abs=1e-9)
    assert float(rb.log_t_evidence(2.0, n, 0.5)) == pytest.approx(quadrature(2.0, n, 0.5), abs=1e-9)


@pytest.mark.parametrize("n", [2, 3, 10, 100])
def test_evidence_has_mean_one_and_rises_with_t(n):
    """What makes 1 / L a p-value at the target, and the worst case of all means above it."""

    def integrand(t: float) -> float:
        return math.exp(float(rb.log_t_evidence(t, n))) * stats.t.pdf(t, n - 1)

    area = sum(
        integrate.quad(integrand, a, b, limit=300)[0] for a, b in ((-math.inf, 0), (0, 5), (5, math.inf))
    )
    assert area == pytest.approx(1, abs=1e-6)
    grid = np.concatenate([[-math.inf], np.linspace(-50, 50, 2001), [1e9, math.inf]])
    assert (np.diff(rb.log_t_evidence(grid, n)) >= 0).all()


def test_log_evidence_at_the_ends():
    """Infinite t has a finite limit; far below zero the tail formula takes over without a step."""
    for n in (2, 5, 40):
        limit = math.log(2) + (n - 1) / 2 * math.log1p(n) + stats.t.logcdf(n, n)
        assert float(rb.log_t_evidence(math.inf, n)) == pytest.approx(limit, rel=1e-12)
        assert float(rb.log_t_evidence(1e12, n)) == pytest.approx(limit, rel=1e-9)
    n, t = 2000, np.linspace(-60, -20, 401)
    found = rb.log_t_evidence(t, n)
    assert np.isfinite(found).all()
    assert abs(np.diff(found, 2)).max() < 0.01
    assert rb.log_t_evidence(-math.inf, 1_000_000) < -5


def test_always_valid_by_hand():
    values = [3.2776, 3.279, 3.2782, 3.2772, 3.2764, 3.2747, 3.2806, 3.276]
    found = rb.always_valid(values, 3.28)
    assert (found.n, found.t[0], found.log_evidence[0], found.p[0]) == (8, 0, 0, 1)
    for n in range(2, 9):
        t = -stats.ttest_1samp(values[:n], 3.28).statistic
        assert found.t[n - 1] == pytest.approx(t, rel=1e-9)
        assert found.log_evidence[n - 1] == pytest.approx(quadrature(t, n), abs=1e-9)
        assert found.p[n - 1] == pytest.approx(min(1, *(math.exp(-x) for x in found.log_evidence[:n])))
    assert found.p_final == found.p[-1] == min(found.p)
    assert found.decided_at(found.p[5]) <= 6
    assert found.decided_at(1e-9) is None
    mirrored = rb.always_valid([2 * 3.28 - x for x in values], 3.28, "greater")
    assert mirrored.log_evidence == pytest.approx(found.log_evidence, rel=1e-9)
    assert rb.always_valid(values, 3.28, "greater").p_final == 1


def test_always_valid_of_pairs():
    found = rb.always_valid_pairs(NEW, BASE)
    d = [x - y for x, y in zip(NEW, BASE, strict=True)]
    assert found.p == pytest.approx(rb.always_valid(d, 0).p)
    assert found.decided_at(0.01) == 6
    assert rb.always_valid_pairs(BASE, NEW, 0.5).p_final == 1
    assert rb.always_valid_pairs(BASE, NEW, 2.5).p_final < 0.01  # slower by less than 2.5 s


def test_always_valid_without_variance():
    """Documented: the finite limit, so equal printed losses are no proof; on the target no evidence."""
    equal = rb.always_valid([3.27, 3.27, 3.27], 3.28)
    assert equal.t == (0, math.inf, math.inf)
    assert 1 / equal.p_final == pytest.approx(2 * 4 * stats.t.cdf(3, 3))
    assert rb.always_valid([3.28] * 5, 3.28).p == (1,) * 5
    assert rb.always_valid([3.29] * 5, 3.28).p_final == 1
    assert rb.always_valid_pairs([1.1, 2.1, 3.3], [1.0, 2.0, 3.2], alternative="greater").t[-1] == math.inf
    assert rb.always_valid([3.2], 3.28).p == (1,)


def test_always_valid_is_fast():
    """Under 50 ms for 40 runs; measured 0.3 ms."""
    values = list(np.random.default_rng(0).normal(3.279, 0.0013, 40))
    rb.always_valid(values, 3.28)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        rb.always_valid(values, 3.28)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.05


def test_known_sd_equals_its_mixture():
    """Each L_n against int prod N(x; target - m, s) / N(x; target, s) halfnormal(m; tau) dm."""
    values, sd, tau = [3.2776, 3.279, 3.2812, 3.2772], 0.0013, 0.002
    found = rb.always_valid_known_sd(values, 3.28, sd, tau)
    for n in range(1, 5):
        total = sum(3.28 - x for x in values[:n])
        area, _ = integrate.quad(
            lambda m, n=n, total=total: (
                math.exp((m * total - n * m * m / 2) / sd**2) * stats.halfnorm.pdf(m, scale=tau)
            ),
            0,
            10 * tau,
            epsabs=0,
        )
        assert found.log_evidence[n - 1] == pytest.approx(math.log(area), abs=1e-7)
    assert found.p[0] < 1  # the first run counts
    far = rb.always_valid_known_sd([1e30], 3.28, 0.001)
    assert (far.p_final, math.isfinite(far.log_evidence[0])) == (1, True)


# planning ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("margin", "runs"), [(0.0005, 91), (0.001, 25), (0.0015, 13), (0.002, 9)])
def test_runs_of_one_sample(margin, runs):
    assert planning.runs_needed_one_sample(margin, 0.0013, 0.01, 0.9) == runs
    assert planning.power_at(1, runs - 1, margin, 0.0013) < 0.9 <= planning.power_at(1, runs, margin, 0.0013)


@pytest.mark.parametrize(("gain", "runs"), [(0.1, 17), (0.2, 6), (0.3, 4), (0.5, 3)])
def test_runs_of_two_samples(gain, runs):
    assert planning.runs_needed_two_sample(gain, 0.076, 0.01, 0.9) == runs
    assert planning.detectable_gain(runs, 0.076) <= gain < planning.detectable_gain(runs - 1, 0.076)


def test_detectable_gain_inverts_the_power():
    for arms, n in itertools.product((1, 2), (2, 5, 100)):
        gain = planning.detectable_gain(n, 0.076, 0.01, 0.9, arms)
        assert planning.power_at(arms, n, gain, 0.076) == pytest.approx(0.9, abs=1e-8)


def test_power_by_simulation_and_at_the_ends():
    rng = np.random.default_rng(3)
    new, base = rng.normal(-0.1, 0.076, (20_000, 17)), rng.normal(0, 0.076, (20_000, 17))
    share = (stats.ttest_ind(new, base, axis=1, alternative="less").pvalue < 0.01).mean()
    assert share == pytest.approx(planning.power_at(2, 17, 0.1, 0.076), abs=0.01)
    assert planning.power_at(1, 5, 1e-9, 1.0) == pytest.approx(0.01, rel=1e-4)
    assert planning.power_at(1, 2, 1e30, 1e-30, 1e-12) == 1
    below, above = planning.t_power(9, 9_999, 1e-30), planning.t_power(9, 10_001, 1e-30)
    assert below == pytest.approx(above, abs=1e-3)


# loss-adjusted speed ----------------------------------------------------------------------------------------


def test_loss_adjusted_by_hand():
    """D = -1 + 400 * 0.001 and var D = 1/4 (0.02 + 0.02) + 400^2 / 4 (2e-6 / 3 * 2) + 0.001^2 50^2."""
    times, losses = [9.9, 10.1, 10.1, 9.9], [3.279, 3.28, 3.28, 3.281]
    slower = [x + 1 for x in times]
    worse = [x + 0.001 for x in losses]
    found = rb.loss_adjusted(times, slower, worse, losses, 400, 50, df_k=6)
    assert (found.d_time, found.d_loss) == pytest.approx((-1, 0.001))
    time_part, loss_part, k_part = 2 * 0.04 / 3 / 4, 400**2 * 2 * (2e-6 / 3) / 4, (0.001 * 50) ** 2
    assert found.test.difference == pytest.approx(-0.6)
    assert found.test.se**2 == pytest.approx(time_part + loss_part + k_part)
    assert (found.se_time**2, found.se_loss**2) == pytest.approx((time_part, loss_part))
    assert found.se_k**2 == pytest.approx(k_part)
    halves = [(time_part / 2, 3)] * 2 + [(loss_part / 2, 3)] * 2 + [(k_part, 6)]
    df = (time_part + loss_part + k_part) ** 2 / sum(v * v / d for v, d in halves)
    assert found.test.df == pytest.approx(df)
    assert found.test.p == pytest.approx(stats.t.cdf(-0.6 / found.test.se, df))
    same = rb.loss_adjusted(times, slower, losses, losses, 400, 50)
    assert (same.test.difference, same.se_k) == (pytest.approx(-1), 0)


def test_loss_adjusted_interval_covers():
    """95 % interval on simulated arms with an uncertain k: it covers in 93 to 97 %."""
    rng, covered, k = np.random.default_rng(4), 0, 400.0
    for _ in range(1000):
        arms = [rng.normal(m, s, 8) for m, s in ((99, 0.08), (100, 0.08), (3.279, 0.0013), (3.278, 0.0013))]
        found = rb.loss_adjusted(*arms, rng.normal(k, 40), 40).test
        covered += found.low <= -1 + k * 0.001 <= found.high
    assert 930 <= covered <= 970


def test_slope_from_sweep():
    """Exact lines: 0.08 s and -0.0002 nats a step are 400 s per nat; noise gives a k within its error."""
    steps = [1200, 1250, 1300, 1350]
    exact = rb.slope_from_sweep(steps, [3.5 - 0.0002 * n for n in steps], [0.08 * n for n in steps])
    assert (exact.k, exact.df, exact.n) == (pytest.approx(400), 2, 4)
    assert exact.sd < 1e-6
    rng, steps, scores = np.random.default_rng(5), np.repeat([1150, 1250, 1350, 1450], 4), []
    for _ in range(400):
        losses = 3.5 - 0.0002 * steps + rng.normal(0, 0.0013, 16)
        found = rb.slope_from_sweep(steps, losses, 0.08 * steps + rng.normal(0, 0.08, 16))
        scores.append((found.k - 400) / found.sd)
    assert 0.9 < np.std(scores) < 1.25
    assert abs(np.mean(scores)) < 0.2


@pytest.mark.parametrize(
    ("steps", "losses", "times", "says"),
    [
        ([1, 2], [3, 2], [1, 2], "at least 3"),
        ([5, 5, 5], [3, 2, 1], [1, 2, 3], "sweep the length"),
        ([1, 2, 3], [3, 2, 1], [1, 2, 3, 4], "pair them"),
        ([1, 2, 3], [3, 2, 1], [3, 2, 1], "one machine"),
        ([1, 2, 3], [1, 2, 3], [1, 2, 3], "widen the sweep"),
        ([1, 2, 3, 4], [3, 1, 3, 2], [1, 2, 3, 4], "widen the sweep"),
        ([1, 1.5, 3], [3, 2, 1], [1, 2, 3], "whole numbers"),
    ],
)
def test_a_sweep_that_tells_nothing(steps, losses, times, says):
    with pytest.raises(ValueError, match=says):
        rb.slope_from_sweep(steps, losses, times)


# several tests, drift, order, outliers ----------------------------------------------------------------------


def test_holm_by_hand():
    assert rb.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx((0.03, 0.06, 0.06, 0.02))
    assert rb.holm([0.5, 0.9]) == (1, 1)
    assert rb.holm([0.02]) == (0.02,)
    with pytest.raises(ValueError, match=r"p-value: 1\.2 must lie in \[0, 1\]"):
        rb.holm([0.1, 1.2])
    with pytest.raises(ValueError, match="at least 1"):
        rb.holm([])


@pytest.mark.parametrize("values", [NEW, ALTERNATING, [1, 2, 2, 3, 1, 5, 4, 4, 6.0], [3, 1, 2]])
def test_drift_equals_scipy(values):
    found = drift.drift(values)
    rho, sen = stats.spearmanr(values, range(len(values))), stats.theilslopes(values, alpha=0.95)
    assert found.rho == pytest.approx(rho.statistic)
    if len(values) > 7:
        assert found.p == pytest.approx(rho.pvalue, rel=1e-9)
    assert (found.slope, found.low, found.high) == pytest.approx((sen.slope, sen.low_slope, sen.high_slope))


def test_drift_of_few_runs_has_an_exact_p():
    assert drift.drift([1, 2, 3]).p == pytest.approx(2 / 6)
    assert drift.drift([1, 2, 3, 4]).p == pytest.approx(2 / 24)
    assert drift.drift([2.0] * 4).p == 1
    assert drift.drift(list(range(12))).p == pytest.approx(2 / math.factorial(12))
    assert drift.drift([1, 2, 3, 7, 8, 9], "AAABBB").p == pytest.approx(2 / 36)


def test_a_gain_between_blocks_is_no_drift():
    """8 runs at 10 s, then 8 at 9 s, noise apart: no slope within arms, a large one if labels are ignored."""
    rng = np.random.default_rng(6)
    values = np.repeat([10.0, 9.0], 8) + rng.normal(0, 0.05, 16)
    assert drift.drift(values).p < 0.01
    within = drift.drift(values, "A" * 8 + "B" * 8)
    assert within.p > 0.05
    assert within.low < 0 < within.high


def test_drift_within_arms_has_honest_p_and_interval():
    """Under no drift p < 0.05 comes in about 5 %, and the 95 % interval misses 0 in about 5 %."""
    rng, small, missed = np.random.default_rng(7), 0, 0
    for _ in range(1000):
        found = drift.drift(rng.normal(0, 1, 16), "ABBABAABABBABAAB")
        small += found.p < 0.05
        missed += not found.low <= 0 <= found.high
    assert 25 <= small <= 75
    assert 20 <= missed <= 75


def test_arm_and_order_equals_least_squares():
    arms = "nb" * 10
    found = drift.arm_and_order(ALTERNATING, arms, "n")
    columns = np.column_stack([np.ones(20), [a == "n" for a in arms], np.arange(20)])
    beta, rest, *_ = np.linalg.lstsq(columns, np.array(ALTERNATING), rcond=None)
    cov = np.linalg.inv(columns.T @ columns) * rest[0] / 17
    assert (found.effect.difference, found.slope) == pytest.approx(tuple(beta[1:]))
    assert (found.effect.se, found.slope_se) == pytest.approx(tuple(np.sqrt(np.diag(cov)[1:])))
    assert found.effect.p == pytest.approx(stats.t.cdf(beta[1] / found.effect.se, 17), rel=1e-6)
    assert found.slope_p == pytest.approx(2 * stats.t.sf(abs(beta[2]) / found.slope_se, 17))


@pytest.mark.parametrize(
    ("arms", "imbalance", "blocked"),
    [
        ("AABB", 1, True),
        ("AAAAAABB", 1, True),
        ("ABBA", 0, False),
        ("ABBABAAB", 0, False),
        ("ABAB", 0.5, False),
        ("AAABBA", 0.5, False),
        ("AABABB", 7 / 9, True),
        ("AABBCC", 1, True),
        ("ABCCBA", 0, False),
    ],
)
def test_blocked_order(arms, imbalance, blocked):
    found = drift.blocked_order(arms)
    assert (found.imbalance, found.blocked) == (pytest.approx(imbalance), blocked)
    assert found.pattern == arms
    assert drift.blocked_order([{"A": "base", "B": "new", "C": "third"}[a] for a in arms]).pattern == arms


def test_drift_rule():
    """A drift of 0.1 s a run over 8 runs: refused if blocked and the gain small, not otherwise."""
    values = [10.0, 9.9, 9.81, 9.7, 9.6, 9.5, 9.41, 9.3]
    blocked = drift.drift_rule(values, "AAAABBBB", -0.4)
    assert blocked.no_verdict
    assert blocked.total == pytest.approx(-0.8, abs=0.01)
    assert "blocked" in blocked.reason
    assert not drift.drift_rule(values, "AAAABBBB", 10.0).no_verdict
    assert not drift.drift_rule(values, "ABBABAAB", 0.4).no_verdict
    flat = [10, 10.01, 10, 10.01, 9, 9.01, 9, 9.01]
    assert not drift.drift_rule(flat, "AAAABBBB", 1.0).no_verdict


def test_outliers():
    assert drift.outliers(NEW).indices == (0,)
    assert drift.outliers([1, 2, 3, 4, 100]).indices == (4,)
    found = drift.outliers([1, 2, 3, 4, 5])
    assert (found.median, found.mad, found.limit, found.indices) == (3, 1, pytest.approx(4 * 1.4826), ())


def test_outliers_where_most_values_are_equal():
    assert drift.outliers([5.0] * 9 + [6.0]).indices == (9,)
    assert drift.outliers([5.0] * 6).indices == ()
    assert drift.outliers([5, 5, 5, 5, 5, 4, 6, 4.5, 5.5]).indices == ()


def test_ten_thousand_runs():
    """No quadratic memory, and linear enough: all of it in seconds."""
    rng = np.random.default_rng(8)
    new, base = rng.normal(9, 1, 10_000), rng.normal(10, 1, 10_000)
    assert rb.welch(new, base).p < 1e-9
    assert rb.always_valid_pairs(new, base).p_final < 1e-9
    assert rb.permutation_test(new[:500], base[:500]).p == 1 / 20_001
    assert abs(drift.drift(new).slope) < 1e-4


# bad input --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: rb.welch([1.0], [1, 2]), r"new: 1 value\(s\), the rule is at least 2; make more runs"),
        (lambda: rb.welch([1, math.nan], [1, 2]), "new: value 2 of 2 is nan, must be finite .* failed run"),
        (lambda: rb.student([1, 2], [1, math.inf]), "base: value 2 of 2 is inf"),
        (lambda: rb.one_sample([], 3.28), "values: 0 value"),
        (lambda: rb.one_sample([1, 2], math.nan), "target: nan must lie in"),
        (lambda: rb.one_sample("3.28", 3.28), "is text"),
        (lambda: rb.one_sample([1, None], 3.28), "list of numbers"),
        (lambda: rb.one_sample(3.0, 3.28), "list of numbers"),
        (lambda: rb.welch([1, 2], [1, 3], "smaller"), "alternative: 'smaller' must be one of less"),
        (lambda: rb.welch([1, 2], [1, 3], level=1.0), "level: 1.0 must lie in"),
        (lambda: rb.non_inferiority([1, 2], [1, 3], -1), "margin: -1 must lie in"),
        (lambda: rb.paired([1, 2], [1, 2, 3]), "2 and 3 values, pairs need equally many"),
        (lambda: rb.paired([1, 2, 3], [1, 3, 5], pairs_per_block=2), "must divide the 3 pairs"),
        (lambda: rb.paired([1, 2, 3], [1, 3, 5], pairs_per_block=0), "whole number"),
        (lambda: rb.permutation_test([1], [2]), "at least 3"),
        (lambda: rb.yuen([1, 2, 3, 4, 5], [1, 2, 3], 0.4), "new: 1 value left"),
        (lambda: rb.yuen([1, 2, 3], [1, 2, 3], 0.5), "trim: 0.5"),
        (lambda: rb.always_valid([], 3.28), "values: 0 value"),
        (lambda: rb.always_valid([1, 2], 3, "two-sided"), "must be one of less, greater;"),
        (lambda: rb.always_valid([1, 2], 3, scale=0), "scale: 0 must lie"),
        (lambda: rb.always_valid_known_sd([1], 3, 0), "sd: 0 must lie"),
        (lambda: planning.runs_needed_one_sample(0, 1), "gain: 0 must lie"),
        (lambda: planning.runs_needed_one_sample(1e-9, 1), "more than 1000000 runs"),
        (lambda: planning.runs_needed_two_sample(1, 1, 0.01, 0.005), "power: 0.005 must lie in"),
        (lambda: planning.power_at(3, 5, 1, 1), "arms and n"),
        (lambda: planning.detectable_gain(1, 1), "arms and n"),
        (lambda: rb.loss_adjusted([1, 2], [1, 2], [1, 2], [1, 2], -3, 1), "k: -3 must lie"),
        (lambda: drift.drift([1, 2]), "at least 3"),
        (lambda: drift.drift([1, 2, 3, 4], "AABB"), "at most 2 values an arm"),
        (lambda: drift.drift([1, 2, 3], "AB"), "2 labels for 3 values"),
        (lambda: drift.arm_and_order([1, 2, 3, 4], "AAAA", "A"), "must be two"),
        (lambda: drift.blocked_order("AAA"), "at least two"),
        (lambda: drift.outliers([1, 2]), "at least 3"),
    ],
)
def test_refusals_name_value_rule_and_remedy(call, says):
    with pytest.raises(ValueError, match=says):
        call()


@pytest.mark.parametrize(
    "call",
    [
        lambda: rb.welch([1, 1], [2, 2]),
        lambda: rb.student([1, 1], [1, 1]),
        lambda: rb.one_sample([3.27] * 4, 3.28),
        lambda: rb.paired([1, 2, 3], [2, 3, 4]),
        lambda: rb.paired([1.1, 2.1, 3.3], [1.0, 2.0, 3.2]),  # equal differences but for rounding
        lambda: rb.yuen([1, 1, 1, 9], [2, 2, 2, 2], 0.25),
        lambda: rb.loss_adjusted([1, 1], [2, 2], [3, 3], [3, 3], 400, 10),
        lambda: drift.arm_and_order([1, 2, 3, 4], "ABAB", "A"),
    ],
)
def test_no_variance_is_refused_not_proof(call):
    """Two arms of equal values with different means would be t = inf, p = 0: more likely copies of a log."""
    with pytest.raises(rb.NoVariance, match="duplicated logs"):
        call()


def numbers_of(found) -> list[float]:
    """All numbers inside a result."""
    if is_dataclass(found):
        return [x for f in fields(found) for x in numbers_of(getattr(found, f.name))]
    if isinstance(found, tuple):
        return [x for item in found for x in numbers_of(item)]
    return [found] if isinstance(found, float) else []


def test_never_nan_never_another_error():
    """Ugly but finite numbers: a ValueError or numbers that are not NaN, and no warning."""
    rng = np.random.default_rng(9)
    pool = [0.0, -0.0, 1.0, 1 + 2**-52, 3.28, 3.2801, -2.0, 1e-300, 1e-160, 1e-20, 1e20, 1e49, -1e49, 5e-324]
    calls = [rb.welch, rb.student, rb.paired, rb.yuen, rb.permutation_test, rb.always_valid_pairs]
    calls += [lambda x, y: rb.non_inferiority(x, y, abs(y[0])), lambda x, y: rb.one_sample(x, y[0])]
    calls += [
        lambda x, y: rb.always_valid(x, y[0]),
        lambda x, y: rb.always_valid_known_sd(x, y[0], abs(y[-1])),
    ]
    calls += [lambda x, y: rb.loss_adjusted(x, y, y, x, abs(x[0]), abs(y[0]))]
    calls += [lambda x, y: rb.slope_from_sweep(range(1, len(x) + 1), x, y), lambda x, y: drift.outliers(x)]
    calls += [lambda x, y: drift.drift_rule(x + y, "A" * len(x) + "B" * len(y), x[0])]
    calls += [lambda x, y: drift.arm_and_order(x + y, "A" * len(x) + "B" * len(y), "B")]
    calls += [lambda x, y: planning.power_at(2, 3, abs(x[0]), abs(y[0]))]
    calls += [lambda x, y: planning.detectable_gain(4, abs(x[0])), lambda x, y: rb.holm(x)]
    answered = 0
    for _ in range(60):
        n = int(rng.integers(1, 7))
        x, y = (rng.choice(pool, n).tolist() for _ in range(2))
        for call in calls:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                try:
                    found = call(x, y)
                except ValueError:
                    continue
            answered += 1
            assert not any(map(math.isnan, numbers_of(found))), (x, y, found)
    assert answered > 200


def test_import_loads_neither_numpy_nor_scipy():
    code = (
        "import sys, recordbook.statistics, recordbook.drift, recordbook.planning, recordbook.calibration\n"
    )
    code += "print([m for m in ('numpy', 'scipy', 'torch', 'matplotlib') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


# calibration ------------------------------------------------------------------------------------------------

VALID, NAIVE = "peeking, always-valid p, n = 2..30", "peeking, t-test after each run, n = 3..40"


def complaints(rows: list[calibration.Row]) -> list[str]:
    """What is wrong with a calibration: bounds that a wrong statistic, or a wrong simulation, breaks."""
    by_name = {r.name: r for r in rows}
    found = []
    for name in [n for n in by_name if "always-valid" in n and not n.startswith("power")]:
        if by_name[name].rate > 1.0 + 3 * by_name[name].error:
            found.append(f"{name}: {by_name[name].rate} % false accepts at alpha 1 %")
    for name in [n for n in by_name if n.startswith("non-inferiority")]:
        if by_name[name].rate > 1.2 + 3 * by_name[name].error:
            found.append(f"{name}: {by_name[name].rate} % false accepts at alpha 1 %")
    for name, least in ((NAIVE, 6.0), ("worst two of 10 dropped", 10.0), ("best of 5 batches of 8", 4.5)):
        if by_name[name].rate - 3 * by_name[name].error < least:
            found.append(f"{name}: only {by_name[name].rate} %, the simulation sees no peeking")
    return found


@pytest.fixture(scope="module")
def losses():
    return calibration.load_losses(None)[0]


@pytest.fixture(scope="module")
def rows(losses):
    return calibration.measure(losses)


def test_calibration_bounds(rows):
    """The always-valid p holds its 1 % on real losses while the rule in use does not."""
    assert complaints(rows) == []
    assert all(0 <= r.rate <= 100 and r.error > 0 for r in rows)


def test_calibration_agrees_with_the_design(rows):
    for r in rows:
        if r.design:
            low, high = (float(x) for x in (r.design.split(" to ") if " to " in r.design else [r.design] * 2))
            slack = 4 * r.error + 0.25
            assert low - slack < r.rate < high + slack, r


def test_calibration_can_fail(losses, monkeypatch):
    """Both ways: a p-value that is not always valid, and a peeking that is not simulated."""
    naive, evidence = calibration.naive, rb.log_t_evidence
    monkeypatch.setattr(rb, "log_t_evidence", lambda t, n: evidence(t, n) + 1.5)
    assert any(VALID in text for text in complaints(calibration.measure(losses, trials=5000)))
    monkeypatch.setattr(rb, "log_t_evidence", evidence)
    monkeypatch.setattr(calibration, "naive", lambda x, looks: naive(x, range(looks.stop - 1, looks.stop)))
    assert any(NAIVE in text for text in complaints(calibration.measure(losses, trials=5000)))


def test_balanced_order_survives_drift(rows):
    rate = {r.name: r.rate for r in rows}
    assert rate["time test, drift 2 sd, blocked order"] > 20
    assert rate["time test, drift 2 sd, ABBA BAAB order"] < 1.2
    assert rate["time test, drift 2 sd, blocked order, drift rule"] < 6
    assert rate["time test, drift 0 sd, blocked order"] < 1.3


def test_pairs_use_what_their_runs_share(rows, losses):
    """Both tests hold their level; where a pair shares variance, that of arms gives most of it away."""
    rate = {r.name: r.rate for r in rows}
    shared = "n = 8, 60% of a pair's variance shared"
    assert rate[f"non-inferiority by arms, {shared}"] < 0.3
    assert rate[f"non-inferiority by pairs, {shared}"] > 0.7
    power = {r.name: r.rate for r in calibration.measure_margin(losses, 2000, 0, gap=1.5)}
    assert (
        power[f"shown 1.5 sd of loss by pairs, {shared}"]
        > power[f"shown 1.5 sd of loss by arms, {shared}"] + 5
    )


def test_vectorised_statistics_equal_the_pure_ones():
    """The calibration tests the functions that the verdict uses."""
    rng = np.random.default_rng(12)
    base, new = rng.normal(3.28, 0.002, (2, 30, 6))
    tests = calibration.margin_tests(new - 0.004, base)
    for i in range(30):
        by_arms = rb.non_inferiority(new[i].tolist(), base[i].tolist(), 0.004)
        by_pairs = rb.non_inferiority_pairs(new[i].tolist(), base[i].tolist(), 0.004)
        assert tests["by arms"][i] == (by_arms.p < 0.01)
        assert tests["by pairs"][i] == (by_pairs.test.p < 0.01)
    assert 0 < tests["by pairs"].sum() < 30
    x = np.random.default_rng(10).normal(-0.3, 1, (20, 12))
    x[0, :3] = -0.5  # equal values
    found = calibration.first_valid(x, range(2, 13))
    for values, n in zip(x, found, strict=True):
        assert (rb.always_valid(values, 0).decided_at(0.01) or 0) == n
    accepted = calibration.naive(x[1:], range(3, 13))
    for values, verdict in zip(x[1:], accepted, strict=True):
        assert verdict == any(rb.one_sample(values[:n], 0).p < 0.01 for n in range(3, 13))


def test_calibration_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(calibration, "SHORT", 200)
    out = tmp_path / "rows.json"
    assert calibration.main(["--seed", "3", "--json", str(out)]) == 0
    text = capsys.readouterr().out
    content = json.loads(out.read_text())
    assert (content["schema"], content["seed"], content["long"]) == (calibration.SCHEMA, 3, False)
    assert all(r["name"] in text for r in content["rows"])
    assert list(tmp_path.iterdir()) == [out]
    monkeypatch.setattr(calibration, "LOSSES", tmp_path / "absent.json")
    assert calibration.main([]) == 0
    assert "normal model" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--seed", "-1"], "must be 0 or more"),
        (["--seed", "x"], "invalid int value"),
        (["--losses", "absent.json"], "cannot be read"),
        (["--losses", "bad.json"], "is no JSON"),
        (["--losses", "text.json"], "holds no list"),
        (["--losses", "few.json"], "at least 20"),
        (["--losses", "equal.json"], "all values are equal"),
        (["--losses", "nan.json"], "must be finite"),
        (["--json", "absent/rows.json"], "create the folder first"),
        (["--json", "/dev/full"], "a device, which is not replaced"),
    ],
)
def test_calibration_refuses(args, says, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    contents = {"bad": "[1,", "text": '{"a": 1}', "few": "[3.28, 3.27]"}
    contents |= {"equal": json.dumps([3.28] * 30), "nan": json.dumps([3.28] * 30 + [math.nan])}
    for name, content in contents.items():
        (tmp_path / f"{name}.json").write_text(content)
    assert calibration.main(args) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1


@pytest.mark.slow
def test_calibration_in_the_long_form(losses):
    """A tenth of --long: the same bounds with smaller errors, and the power of the design document."""
    rows = calibration.measure(losses, seed=1, long=True, trials=100_000)
    assert complaints(rows) == []
    for r in rows:
        if r.name.startswith("power") and r.name.endswith("30"):
            assert r.rate == pytest.approx(float(r.design.split(",")[0]), abs=2), r
            assert float(r.note.split()[-1]) == pytest.approx(float(r.design.split()[-1]), abs=0.4), r
