"""Is compare_runs.py quick? Three bars, held against the time that pandas and scipy.stats take to import.

    python benchmarks/compare_speed.py                  # all three bars, in about a minute
    python benchmarks/compare_speed.py --repeats 15 --only compare,help

compare:  comparing 2 x 20 logs of 4,000 lines takes at most 1.5 times as long as the bare import
help:     --help takes at most half of it
growth:   twice as many logs take at most 2.5 times as long, from 2,500 to 5,000 and from there to 10,000;
          each arm is half of them, what 20 logs take is taken off, and CPU seconds count, not those of the
          wall: a quadratic cost shows in them too, and another program's load hardly does

Every command is a process of its own. The commands of a bar take turns, so that a busy machine slows all of
them, and one round before is not counted: it fills the file caches. A bar compares medians; the spread is
printed. The logs are made up, in a temporary folder. Exit code: 0 if every bar is met, 1 if not, 2 without
what a bar needs.
"""

import argparse
import importlib.util
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "compare_runs.py"
YARDSTICK = [sys.executable, "-c", "import pandas, scipy.stats"]
BARS = ("compare", "help", "growth")
MOST_COMPARE, MOST_HELP, MOST_DOUBLING = 1.5, 0.5, 2.5  # ratios
SIZES = (20, 2_500, 5_000, 10_000)  # logs of both arms, for growth
LONG, SHORT = 4_000, 30  # step lines of a log
RULE = "=" * 100


class Timing(NamedTuple):
    """Seconds of one command, each time that it ran, and the most memory that it held."""

    seconds: list[float]
    peak_mib: float

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def log_text(rng: random.Random, lines: int, total_s: float, loss: float, number: int) -> str:
    """A run log in the community's format; a validation at every tenth of it."""
    head = ["x = 1", RULE, "Running Python 3.12.7", "Running PyTorch 2.10.0 compiled for CUDA 12.8"]
    day, second = 1 + number // 86_400, number % 86_400
    clock = f"{second // 3600:02d}:{second // 60 % 60:02d}:{second % 60:02d}"
    body = [f"Mon Jan {day:2d} {clock} 2026", RULE]
    for step in range(lines + 1):
        ms = round(1000 * total_s * step / lines)
        now = loss + 4 * (1 - step / lines) ** 2 + (rng.gauss(0, 0.02) if step < lines else 0)
        tail = f"train_time:{ms}ms step_avg:{ms / max(step, 1):.2f}ms"
        body += [f"step:{step}/{lines} train_loss:{now:.4f} {tail}"] if step else []
        if step % (lines // 10) == 0:
            body.append(f"step:{step}/{lines} val_loss:{now:.4f} {tail}")
    return "\n".join([*head, *body, "peak memory allocated: 30000 MiB reserved: 40000 MiB"]) + "\n"


def write_arms(folder: Path, logs: int, lines: int) -> list[str]:
    """Two folders of half the logs each, started in turn; the second arm is half a percent faster."""
    rng = random.Random(logs)
    for arm, total_s in (("base", 100.0), ("new", 99.5)):
        (folder / arm).mkdir(parents=True)
        for i in range(logs // 2):
            number = 2 * i + (arm == "new")
            text = log_text(rng, lines, rng.gauss(total_s, 0.08), rng.gauss(3.278, 0.0013), number)
            (folder / arm / f"{i:05d}.txt").write_text(text)
    return [str(folder / "base"), str(folder / "new")]


def timed(command: list[str], cpu: bool = False) -> tuple[float, float]:
    """(seconds, MiB at most) of a command; what it prints goes to the null device."""
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    error = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - began
    if code := os.waitstatus_to_exitcode(status):
        raise SystemExit(f"{' '.join(command[:3])} ...: exit code {code}: {error.decode().strip()}")
    seconds = usage.ru_utime + usage.ru_stime if cpu else seconds
    return seconds, usage.ru_maxrss / (1 << 20 if sys.platform == "darwin" else 1 << 10)


def race(commands: dict[str, list[str]], repeats: int, cpu: bool = False) -> dict[str, Timing]:
    """Timings of the commands, which take turns; the first round is not counted. Prints a table."""
    rounds = [{name: timed(command, cpu) for name, command in commands.items()} for _ in range(repeats + 1)][
        1:
    ]
    width, found = max(map(len, commands)), {}
    print(f"{'CPU s' if cpu else 'wall s':{width}}    n     min  median     max  peak MiB")
    for name in commands:
        times, peaks = zip(*(taken[name] for taken in rounds), strict=True)
        found[name] = Timing(list(times), max(peaks))
        low, high, middle = min(times), max(times), found[name].median
        print(f"{name:{width}}  {repeats:3d} {low:7.3f} {middle:7.3f} {high:7.3f} {max(peaks):9.0f}")
    return found


def judged(what: str, ratio: float, most: float) -> bool:
    """Print one bar; whether it is met."""
    print(f"{'pass' if ratio <= most else 'FAIL'}: {what}: {ratio:.2f}, at most {most:g}\n", flush=True)
    return ratio <= most


def against_imports(folder: Path, only: set[str], repeats: int) -> list[bool]:
    """The bars `compare` and `help`."""
    commands = {"import pandas, scipy.stats": YARDSTICK}
    start = [sys.executable, str(SCRIPT)]
    if "help" in only:
        commands["compare_runs.py --help"] = [*start, "--help"]
    if "compare" in only:
        commands[f"2 x 20 logs of {LONG:,} lines"] = [*start, *write_arms(folder, 40, LONG)]
    yardstick, *found = race(commands, repeats).items()
    bars = {"compare_runs.py --help": MOST_HELP}
    return [
        judged(f"{name} / {yardstick[0]}", timing.median / yardstick[1].median, bars.get(name, MOST_COMPARE))
        for name, timing in found
    ]


def growth(folder: Path, repeats: int) -> list[bool]:
    """The bar `growth`: a linear cost doubles, a quadratic one would come four times as dear."""
    start = [sys.executable, str(SCRIPT)]
    commands = {
        f"{size:6,} logs of {SHORT} lines": [*start, *write_arms(folder / str(size), size, SHORT)]
        for size in SIZES
    }
    base, *found = [timing.median for timing in race(commands, repeats, cpu=True).values()]
    net, met = [median - base for median in found], []
    for i, size in enumerate(SIZES[2:]):
        met.append(judged(f"{size:,} logs / {size // 2:,} logs", net[i + 1] / net[i], MOST_DOUBLING))
    return met


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="compare_speed.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=7, help="of each command; default 7")
    parser.add_argument("--only", default=",".join(BARS), help=f"bars, of {', '.join(BARS)}; default all")
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: error: {message}\n")  # one line
    args = parser.parse_args(argv)
    only = set(args.only.split(","))
    if not only <= set(BARS) or args.repeats < 1:
        found = f"--only {args.only} --repeats {args.repeats}"
        print(f"compare_speed.py: {found}: want bars of {', '.join(BARS)}, 1 repeat", file=sys.stderr)
        return 2
    if only & {"compare", "help"} and importlib.util.find_spec("pandas") is None:
        what = "the yardstick is its import beside that of scipy.stats; pip install pandas, or --only growth"
        print(f"compare_speed.py: pandas is not installed: {what}", file=sys.stderr)
        return 2
    print(f"Python {platform.python_version()}, {os.cpu_count()} cores, {platform.platform()}\n")
    with tempfile.TemporaryDirectory() as folder:
        met = against_imports(Path(folder), only, args.repeats) if only & {"compare", "help"} else []
        met += growth(Path(folder), max(1, args.repeats // 2)) if "growth" in only else []
    return 0 if all(met) else 1


if __name__ == "__main__":
    sys.exit(main())
