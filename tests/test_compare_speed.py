"""benchmarks/compare_speed.py: its logs are complete runs, its bars can fail, it says what it lacks."""

import random
import sys
from pathlib import Path

import pytest
from conftest import load_program

import compare_runs as cr

COMMAND = Path(__file__).resolve().parents[1] / "benchmarks" / "compare_speed.py"


bench = load_program(COMMAND)


def test_the_logs_are_complete_runs():
    text = bench.log_text(random.Random(0), 30, 99.5, 3.27, 90_061)
    (run,) = cr.parse_log(text.encode(), "a.txt", "a.txt")
    assert (run.status, run.seconds, run.train_lines, len(run.val)) == ("complete", 99.5, 30, 11)
    assert run.head["started"] == "2026-01-02T01:01:01"
    assert run.loss == pytest.approx(3.27, abs=1e-4)


@pytest.mark.parametrize(("power", "code", "word"), [(1, 0, "pass"), (2, 1, "FAIL")])
def test_a_linear_cost_passes_and_a_quadratic_one_fails(monkeypatch, capsys, power, code, word):
    """A program of known cost in the place of compare_runs.py; no clock, which a busy machine would move."""

    def cost(command: list[str], cpu: bool = False) -> tuple[float, float]:
        assert cpu
        logs = sum(len(list(Path(folder).iterdir())) for folder in command[2:])
        return 0.1 + 0.001 * logs**power, 30.0

    monkeypatch.setattr(bench, "timed", cost)
    monkeypatch.setattr(bench, "SIZES", (4, 40, 80, 160))
    assert bench.main(["--only", "growth", "--repeats", "1"]) == code
    out = capsys.readouterr().out
    assert out.count(f"{word}: ") == 2
    assert [line.split()[0] for line in out.splitlines() if " lines  " in line] == ["4", "40", "80", "160"]


def test_the_real_program_reads_the_logs(tmp_path):
    arms = bench.write_arms(tmp_path, 4, 30)
    seconds, mib = bench.timed([sys.executable, str(bench.SCRIPT), *arms])
    assert 0 < seconds < 60
    assert mib > 10  # no upper bound: Linux counts what this process held when it started the other


def test_the_yardstick_may_be_missing(monkeypatch, capsys):
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: None)
    assert bench.main(["--only", "help"]) == 2
    assert "pandas is not installed" in capsys.readouterr().err


@pytest.mark.parametrize("argv", [["--only", "speed"], ["--repeats", "0"]])
def test_bad_arguments_are_one_line(argv, capsys):
    assert bench.main(argv) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert argv[1] in error


def test_a_command_that_fails_ends_the_benchmark():
    with pytest.raises(SystemExit, match="exit code 3: why"):
        bench.timed([sys.executable, "-c", "import sys; print('why', file=sys.stderr); sys.exit(3)"])
