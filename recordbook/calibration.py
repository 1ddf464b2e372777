"""How often does each procedure accept a record that is none? Measured by resampling real final losses.

    python -m recordbook.calibration                 seconds; what CI bounds
    python -m recordbook.calibration --long          minutes; adds power, with more trials
    python -m recordbook.calibration --json out.json --seed 1 --losses losses.json

Losses (1,261 runs of one program) are shifted to a mean of exactly the target, so every acceptance at
alpha 0.01 is false. Rates are in percent with their Monte Carlo standard error, sqrt(r (1 - r) / trials),
next to the figures of the design document where it has one.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from compare_runs import InputError, check_output, replace_file
from recordbook import statistics
from recordbook.drift import drift_rule

SCHEMA = "splits.calibration/1"
# Final losses of 1,261 published runs of one program (modded-nanogpt, 2024-12-17).
LOSSES = Path(__file__).resolve().parent / "final_losses_1261.json"
TARGET = 3.28
NORMAL_SD = 0.00185  # of the real losses
TIME_SD = 0.076  # seconds, between runs on one node
ALPHA = 0.01
CHUNK = 20_000  # trials at once: bounds the memory
RULED = 1_000  # accepted trials put to the drift rule
SHORT, LONG = 20_000, 1_000_000  # trials a row; rows of the always-valid p take a fifth in the long form
EFFECTS = ((0.5, 32, 26.6), (0.75, 73, 21.3), (1.0, 96, 15.8), (1.25, 99.8, 12.2), (1.5, 100, 10.2))


@dataclass(frozen=True)
class Row:
    """One measured rate. `design` is the design document's figure in percent, None if it has none."""

    name: str
    rate: float  # percent
    error: float  # Monte Carlo standard error, percent
    trials: int
    design: str | None
    note: str = ""


def load_losses(path: str | None) -> tuple[object, str]:
    """(losses as an array, where they come from): the file, or a normal model if none was named."""
    import numpy as np

    if path is None and not LOSSES.is_file():
        normal = np.random.default_rng(1261).normal(TARGET, NORMAL_SD, 100_000)
        return normal, f"a normal model of sd {NORMAL_SD} (the file of real losses is not here)"
    file = Path(path) if path is not None else LOSSES
    try:
        values = json.loads(file.read_text())
    except OSError as error:
        raise ValueError(f"--losses {file}: cannot be read ({error.strerror}); name a JSON list") from None
    except ValueError:
        raise ValueError(f"--losses {file}: is no JSON; give a list of final losses") from None
    if not isinstance(values, list):
        raise ValueError(f"--losses {file}: holds no list; give a JSON list of final losses")
    losses = np.array(statistics.checked("--losses", values, 20))
    if losses.min() == losses.max():
        raise ValueError(f"--losses {file}: all values are equal; give losses that vary")
    return losses, f"{len(losses)} losses of {file.name}"


# 1. procedures: arrays of (trials, runs) of losses minus target, to an array of verdicts -------------------


def t_statistics(x):
    """One-sample t after each run (columns 2..n), positive if the mean is below 0."""
    import numpy as np

    n = np.arange(1, x.shape[1] + 1)
    total, squares = np.cumsum(x, axis=1), np.cumsum(x * x, axis=1)
    variance = np.maximum(squares - total**2 / n, 0)[:, 1:] / (n[1:] - 1)
    rounding = 1e-12 * squares[:, 1:] / n[1:]  # losses have 4 decimals: equal ones leave only rounding
    se = np.sqrt(np.where(variance > rounding, variance, 0) * n[1:])
    with np.errstate(divide="ignore"):  # equal losses below the target: t is inf, and a naive test accepts
        return np.divide(-total[:, 1:], se, out=np.zeros_like(se), where=total[:, 1:] != 0)


def naive(x, looks: range):
    """The rule in use: a t-test at each look, accepted at the first p < alpha."""
    import numpy as np
    from scipy.special import stdtrit

    critical = -stdtrit(np.array(looks) - 1, ALPHA)
    return (t_statistics(x)[:, looks.start - 2 : looks.stop - 2] > critical).any(axis=1)


def first_valid(x, looks: range):
    """Number of runs at which the always-valid p was first <= alpha; 0 if never."""
    import numpy as np

    logs = statistics.log_t_evidence(t_statistics(x)[:, np.array(looks) - 2], np.array(looks))
    decided = logs >= -math.log(ALPHA)
    return np.where(decided.any(axis=1), np.array(looks)[decided.argmax(axis=1)], 0)


def best_batch(x, size: int = 8):
    """Batches of 8 until one has p < alpha; the others are never shown."""
    batches = [x[:, i : i + size] for i in range(0, x.shape[1], size)]
    return sum(naive(batch, range(size, size + 1)) for batch in batches) > 0


def drop_worst(x, worst: int):
    """The t-test without the highest losses."""
    import numpy as np

    kept = np.sort(x, axis=1)[:, : x.shape[1] - worst]
    return naive(kept, range(kept.shape[1], kept.shape[1] + 1))


def loss_procedures() -> list[tuple[str, int, Callable, str | None]]:
    """(name, runs a trial, procedure, figure of the design document in percent)."""
    rows = [(f"fixed n = {n}", n, lambda x, n=n: naive(x, range(n, n + 1)), "1.3 to 1.4") for n in (4, 10)]
    for last, figure in ((10, "5.2"), (20, "7.0"), (40, "8.8")):
        name = f"peeking, t-test after each run, n = 3..{last}"
        rows.append((name, last, lambda x, last=last: naive(x, range(3, last + 1)), figure))
    name = "peeking, always-valid p, n = 2..30"
    rows.append((name, 30, lambda x: first_valid(x, range(2, 31)) > 0, "0.6"))
    for count, figure in ((3, "4.0"), (5, "6.6")):
        rows.append((f"best of {count} batches of 8", 8 * count, best_batch, figure))
        name = f"the same {count} batches, all in the ledger, always-valid p"
        rows.append((name, 8 * count, lambda x: first_valid(x, range(8, x.shape[1] + 1, 8)) > 0, None))
    rows.append(("worst of 9 dropped", 9, lambda x: drop_worst(x, 1), "5.6"))
    rows.append(("worst two of 10 dropped", 10, lambda x: drop_worst(x, 2), "12.5"))
    return rows


# 2. measuring ---------------------------------------------------------------------------------------------


def chunks(trials: int) -> Iterator[int]:
    """Sizes of at most CHUNK that add up to `trials`."""
    for start in range(0, trials, CHUNK):
        yield min(CHUNK, trials - start)


def binomial(hits: int, trials: int) -> tuple[float, float]:
    """(rate, its standard error); the error of 0 or all hits is that of one miss."""
    rate = hits / trials
    safe = min(max(rate, 1 / trials), 1 - 1 / trials) if trials > 1 else 0.5
    return rate, math.sqrt(safe * (1 - safe) / trials)


def row(name: str, hits: int, trials: int, design: str | None, note: str = "") -> Row:
    """A Row from counts."""
    rate, error = binomial(hits, trials)
    return Row(name, 100 * rate, 100 * error, trials, design, note)


def measure_losses(losses, trials: int, seed: int, long: bool) -> Iterator[Row]:
    """False accepts of every loss procedure; each row has its own random stream."""
    import numpy as np

    centred = losses - losses.mean()
    for i, (name, runs, procedure, design) in enumerate(loss_procedures()):
        rng, hits = np.random.default_rng([seed, 1, i]), 0
        count = trials // 5 if long and "always-valid" in name else trials
        for size in chunks(count):
            hits += int(procedure(rng.choice(centred, (size, runs))).sum())
        yield row(name, hits, count, design)


def measure_drift(trials: int, seed: int) -> Iterator[Row]:
    """False accepts of the time test when the machine gets faster by 2 sd over 16 runs, arms equal.

    Blocked: 8 runs of the baseline, then 8 of the candidate, Welch's test. ABBA: the same runs, balanced.
    Times are normal (sd 0.076 s), not resampled: no published set is known to be free of drift.
    """
    import numpy as np
    from scipy.special import stdtr

    orders = {"blocked": "AAAAAAAABBBBBBBB", "ABBA BAAB": "ABBABAABABBABAAB"}
    for j, total in enumerate((0.0, 2.0)):
        for i, (name, order) in enumerate(orders.items()):
            new = np.array([arm == "B" for arm in order])
            rng, accepted, ruled, seen = np.random.default_rng([seed, 2, j, i]), 0, 0, 0
            for size in chunks(trials):
                x = rng.normal(0, TIME_SD, (size, 16)) - np.linspace(0, total * TIME_SD, 16)
                a, b = x[:, ~new], x[:, new]
                va, vb = a.var(axis=1, ddof=1) / 8, b.var(axis=1, ddof=1) / 8
                gap = b.mean(axis=1) - a.mean(axis=1)
                df = (va + vb) ** 2 / ((va**2 + vb**2) / 7)
                found = np.flatnonzero(stdtr(df, gap / np.sqrt(va + vb)) < ALPHA)
                accepted += len(found)
                looked = found[: RULED * size // trials + 1]  # half a millisecond each: a sample
                seen += len(looked)
                ruled += sum(not drift_rule(x[k].tolist(), order, gap[k]).no_verdict for k in looked)
            label = f"time test, drift {total:g} sd, {name} order"
            yield row(label, accepted, trials, None)
            if name == "blocked":
                note = f"{seen} of {accepted} accepted trials put to the rule"
                (rate, error), (share, wrong) = binomial(accepted, trials), binomial(ruled, max(seen, 1))
                both = math.hypot(share * error, rate * wrong)
                yield Row(f"{label}, drift rule", 100 * rate * share, 100 * both, trials, None, note)


def margin_tests(x, base) -> dict[str, object]:
    """{test: verdicts} on (trials, pairs) of losses, x less the margin: is the candidate not inferior?"""
    import numpy as np
    from scipy.special import stdtr

    n, d = x.shape[1], x - base
    vx, vb = (values.var(axis=1, ddof=1) / n for values in (x, base))
    df = (vx + vb) ** 2 / ((vx**2 + vb**2) / (n - 1))
    with np.errstate(divide="ignore", invalid="ignore"):  # equal differences: t is -inf, or no number
        pairs_t = d.mean(axis=1) / np.sqrt(d.var(axis=1, ddof=1) / n)
        return {
            "by arms": stdtr(df, d.mean(axis=1) / np.sqrt(vx + vb)) < ALPHA,
            "by pairs": stdtr(n - 1, pairs_t) < ALPHA,
        }


def measure_margin(losses, trials: int, seed: int, gap: float = 0.0) -> Iterator[Row]:
    """How often a candidate is found not inferior whose loss is `gap` sd from being worse by just the margin.

    With a gap of 0 each is a false accept. The runs of a pair have a share of their variance in common,
    as a seed's initial parameters give; the rest is their own.
    """
    import numpy as np

    centred, what = losses - losses.mean(), "non-inferiority" if gap == 0 else f"shown {gap:g} sd of loss"
    for i, (n, share) in enumerate(((4, 0.0), (4, 0.6), (8, 0.0), (8, 0.6))):
        rng, hits = np.random.default_rng([seed, 4, i, round(100 * gap)]), {}
        for size in chunks(trials):
            common, *own = (rng.choice(centred, (size, n)) for _ in range(3))
            base, new = (math.sqrt(share) * common + math.sqrt(1 - share) * x for x in own)
            for test, found in margin_tests(new - gap * losses.std(), base).items():
                hits[test] = hits.get(test, 0) + int(found.sum())
        for test, count in hits.items():
            yield row(f"{what} {test}, n = {n}, {share:.0%} of a pair's variance shared", count, trials, None)


def measure_power(losses, trials: int, seed: int) -> Iterator[Row]:
    """Power and mean number of runs of the always-valid p, at most 30 and at most 40 runs."""
    import numpy as np

    shape = (losses - losses.mean()) / losses.std()
    for last in (30, 40):
        for i, (effect, power, mean_n) in enumerate(EFFECTS):
            rng, hits, runs = np.random.default_rng([seed, 3, last, i]), 0, 0
            for size in chunks(trials):
                found = first_valid(rng.choice(shape, (size, last)) - effect, range(2, last + 1))
                hits += int((found > 0).sum())
                runs += int(np.where(found > 0, found, last).sum())
            design = f"{power:g}, mean n {mean_n}" if last == 30 else None  # its figures are those of 30
            name = f"power of the always-valid p, effect {effect:g} sd, n = 2..{last}"
            yield row(name, hits, trials, design, f"mean n {runs / trials:.1f}")


def measure(
    losses,
    seed: int = 0,
    long: bool = False,
    trials: int | None = None,  # a row; default 20,000, long 1,000,000
    progress: Callable[[str], None] | None = None,
) -> list[Row]:
    """All rows. The same seed gives the same figures; power is only in the long form."""
    trials = trials or (LONG if long else SHORT)
    parts = [measure_losses(losses, trials, seed, long), measure_drift(trials // (5 if long else 1), seed)]
    parts.append(measure_margin(losses, trials // (5 if long else 1), seed))
    if long:
        parts.append(measure_power(losses, max(1, trials // 10), seed))
        parts.append(measure_margin(losses, max(1, trials // 10), seed, gap=1.5))
    rows = []
    for part in parts:
        for found in part:
            rows.append(found)
            if progress:
                progress(found.name)
    return rows


# 3. command line ------------------------------------------------------------------------------------------


def table(rows: list[Row], source: str, seconds: float) -> str:
    """The rows as text."""
    width = max(len(r.name) for r in rows)
    lines = [
        f"Accepted at alpha {ALPHA:g}, in percent; losses: {source}, shifted to the target; {seconds:.0f} s"
    ]
    lines += ["", f"{'procedure':{width}}  {'rate':>7} {'+-':>6}  {'design':<18} {'trials':>9}"]
    for r in rows:
        figures = f"{r.rate:7.2f} {r.error:6.3f}  {r.design or '-':<18} {r.trials:9}"
        lines.append(f"{r.name:{width}}  {figures}" + (f"  {r.note}" if r.note else ""))
    return "\n".join(lines)


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str):
        raise ValueError(f"{message}; see --help")


def main(argv: list[str] | None = None) -> int:
    """Print the table; 0, or 2 with one line on stderr."""
    parser = Parser(
        prog="python -m recordbook.calibration", description=__doc__.split("\n")[0], allow_abbrev=False
    )
    parser.add_argument("--long", action="store_true", help="a million trials a row, and power (minutes)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="random seed, from 0 (default 0)")
    parser.add_argument("--json", metavar="FILE", help="write every row to FILE")
    parser.add_argument("--losses", metavar="FILE", help="JSON list of final losses to resample")
    began = time.perf_counter()

    def progress(name: str) -> None:
        print(f"{time.perf_counter() - began:6.1f} s  {name}", file=sys.stderr, flush=True)

    try:
        args = parser.parse_args(argv)
        if args.seed < 0:
            raise ValueError(f"--seed {args.seed}: must be 0 or more; choose another")
        check_output(args.json, "--json", (), [])
        losses, source = load_losses(args.losses)
        rows = measure(losses, args.seed, args.long, progress=progress if args.long else None)
        seconds = time.perf_counter() - began
        print(table(rows, source, seconds))
        if args.json:
            facts = {"schema": SCHEMA, "alpha": ALPHA, "losses": source, "seed": args.seed, "long": args.long}
            facts |= {"seconds": round(seconds, 1), "rows": [asdict(r) for r in rows]}
            text = json.dumps(facts, indent=1, allow_nan=False) + "\n"
            replace_file(args.json, lambda temporary: Path(temporary).write_text(text))
    except (ValueError, InputError) as error:
        print(f"calibration: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
