"""benchmarks/compare_speed.py: its logs are complete runs, its bars can fail, it says what it lacks."""

import importlib.util
import random
import sys
from pathlib import Path

import pytest

import compare_runs as cr

COMMAND = Path(__file__).resolve().parents[1] / "benchmarks" / "compare_speed.py"


def load():
    spec = importlib.util.spec_from_file_location("benchmarks_compare_speed", COMMAND)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


bench = load()


def test_the_logs_are_complete_runs():
    text = bench.log_text(random.Random(0), 30, 99.5, 3.27, 90_061)
    (run,) = cr.parse_log(text.encode(), "a.txt", "a.txt")
    assert (run.status, run.seconds, run.train_lines, len(run.val)) == ("complete", 99.5, 30, 11)
    assert run.head["started"] == "2026-01-02T01:01:01"
    assert run.loss == pytest.approx(3.27, abs=1e-4)


def test_growth_is_measured_and_judged(monkeypatch, tmp_path, capsys):
    """At toy sizes no bar means anything, but each is timed, printed and decides the exit code."""
    monkeypatch.setattr(bench, "SIZES", (4, 6, 8, 10))
    for most, code, word in ((1e9, 0, "pass"), (-1e9, 1, "FAIL")):
        monkeypatch.setattr(bench, "MOST_DOUBLING", most)
        assert bench.main(["--only", "growth", "--repeats", "1"]) == code
        out = capsys.readouterr().out
        assert out.count(f"{word}: ") == 2
        assert [line.split()[0] for line in out.splitlines() if " lines  " in line] == ["4", "6", "8", "10"]


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
