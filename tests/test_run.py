"""run.sh: series, interleaving, failures and refusals, with a trainer that takes no time."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
STAMPS = list(Path(sys.prefix).glob(".splits-*"))
pytestmark = [
    pytest.mark.skipif(shutil.which("bash") is None, reason="no bash on this machine"),
    pytest.mark.skipif(
        not STAMPS, reason="run.sh did not set up this environment and would install packages"
    ),
]
# What run.sh asks torch for.
FAKE_TORCH = """
class cuda:
    device_count = staticmethod(lambda: {gpus})
"""
# The launcher's arguments go to a file, the rest to the trainer.
FAKE_TORCHRUN = """#!/bin/sh
echo "$1 $2" >> launches
shift 2
exec python "$@"
"""
# Writes a log as the trainer does; `plan` says how the attempts of this trainer end, in turn.
FAKE_TRAINER = r"""
import argparse, pathlib, sys
parser = argparse.ArgumentParser()
for name in ("--recipe", "--data", "--seed", "--out"):
    parser.add_argument(name)
args = parser.parse_args()
here = pathlib.Path(__file__)
ledger, plan = pathlib.Path("ledger"), here.with_suffix(".plan")
ends = plan.read_text().split() if plan.exists() else []
end = ends.pop(0) if ends else "done"
plan.write_text(" ".join(ends))
with ledger.open("a") as file:
    file.write(f"{here.stem}:{args.seed}:{end}\n")
if end == "bad":
    sys.exit(2)
source = here.read_text()
lines = source.removesuffix("\n").split("\n")
import hashlib
head = f"#### source {here.name} sha256={hashlib.sha256(source.encode()).hexdigest()} lines={len(lines)}"
started = f"2026-01-01T00:00:{len(ledger.read_text().split()):02d}+0000"
meta = ["host: h", "cpu: c", "recipe: tiny", "world_size: 1", "target: 4.0", "data: sha256=0"]
meta += [f"run_id: {args.out}", f"seed: {args.seed}", f"started: {started}"]
loss, ms = 4 + int(args.seed) / 100, 2000 + int(args.seed)
steps = [f"step:{s}/2 val_loss:{loss:.4f} train_time:{s * ms}ms step_avg:1.00ms" for s in (0, 2)]
status = {"done": "done", "diverged": "diverged at step 1: nan", "interrupted": "interrupted at step 1: x"}
versions = ["Running Python 3", "Running PyTorch 2 compiled for CUDA None"]
text = [head, *lines, "=" * 100, *versions, *meta, "=" * 100, *steps]
text.append("peak memory allocated: 1 MiB reserved: 1 MiB")
if end in status:
    text.append("status: " + status[end])
pathlib.Path(args.out).write_text("\n".join(text) + "\n")
sys.exit({"done": 0, "diverged": 3, "interrupted": 130, "killed": 137}[end])
"""


@pytest.fixture
def project(tmp_path):
    """A folder with the real run.sh and compare_runs.py, and two trainers that only write logs."""
    for name in ("run.sh", "compare_runs.py", "requirements.txt"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(
        ROOT / "recordbook", tmp_path / "recordbook", ignore=shutil.ignore_patterns("__pycache__")
    )
    (tmp_path / "torch.py").write_text(FAKE_TORCH.format(gpus=0))
    (tmp_path / "torchrun").write_text(FAKE_TORCHRUN)
    (tmp_path / "torchrun").chmod(0o755)
    (tmp_path / "triton_kernels.py").write_text("")
    (tmp_path / "train_gpt.py").write_text(FAKE_TRAINER)
    (tmp_path / "other.py").write_text(FAKE_TRAINER + "# another program\n")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "prepare.py").write_text("")
    return tmp_path


def run(project: Path, *arguments: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "VIRTUAL_ENV": sys.prefix}
    environment["PATH"] = f"{project}:{Path(sys.executable).parent}:{environment['PATH']}"
    command = ["bash", "run.sh", *arguments]
    return subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, timeout=120)


def ledger(project: Path) -> list[str]:
    path = project / "ledger"
    return path.read_text().split() if path.exists() else []


def test_a_series_ends_with_the_table(project):
    result = run(project)
    assert result.returncode == 0, result.stderr
    assert ledger(project) == ["train_gpt:1:done", "train_gpt:2:done"]
    assert re.search(r"^tiny-[0-9a-f]{8} +2 ", result.stdout, re.M)
    assert [log.name for log in sorted((project / "logs").rglob("*.txt"))] == ["run-001.txt", "run-002.txt"]


def test_a_complete_series_runs_nothing_and_a_longer_one_continues(project):
    run(project)
    assert run(project).returncode == 0
    assert len(ledger(project)) == 2
    assert run(project, "3").returncode == 0
    assert ledger(project)[2:] == ["train_gpt:3:done"]


def test_bytecode_is_kept_where_python_may_not_write_it_beside_its_packages(project, monkeypatch):
    for name in ("PYTHONDONTWRITEBYTECODE", "PYTHONPYCACHEPREFIX"):  # run.sh, which runs the tests, sets them
        monkeypatch.delenv(name, raising=False)
    run(project, "1")
    assert not (project / ".cache" / "bytecode").exists()
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    assert run(project, "2").returncode == 0
    assert list((project / ".cache" / "bytecode").rglob("argparse.*.pyc")), "what the trainer imports"


def test_two_trainers_alternate(project):
    result = run(project, "ab", "train_gpt.py", "other.py", "4")
    assert result.returncode == 0, result.stderr
    a, b = "train_gpt", "other"
    arms = [line.split(":")[0] for line in ledger(project)]
    assert arms == [a, b, b, a, b, a, a, b]
    assert [line.split(":")[1] for line in ledger(project)] == ["1", "1", "2", "2", "3", "3", "4", "4"]
    (series,) = (project / "logs").iterdir()
    names = sorted(path.name.rsplit("-", 1)[0] for path in series.iterdir() if path.is_dir())
    assert names == ["A-train_gpt", "B-other"], "the arms share a folder with their plan and ledger"


@pytest.mark.parametrize("end", ["interrupted", "killed"])
def test_a_run_that_did_not_end_by_itself_is_made_again(project, end):
    (project / "train_gpt.plan").write_text(end)
    first = run(project)
    assert first.returncode in (130, 0, 2)
    assert run(project).returncode == 0
    assert ledger(project).count("train_gpt:1:done") == 1
    assert ledger(project).count("train_gpt:2:done") == 1
    names = sorted(log.name for log in (project / "logs").rglob("*.txt"))
    assert names == ["run-001-try2.txt", "run-001.txt", "run-002.txt"], "the attempt is kept"


def test_an_interruption_ends_the_series(project):
    (project / "train_gpt.plan").write_text("interrupted")
    result = run(project)
    assert result.returncode == 130
    assert ledger(project) == ["train_gpt:1:interrupted"]


def test_a_failed_run_is_kept_counted_and_not_made_again(project):
    (project / "train_gpt.plan").write_text("done diverged done")
    result = run(project, "3")
    assert result.returncode == 0, result.stderr
    assert len(ledger(project)) == 3
    assert "3 attempts, 2 complete" in result.stdout
    run(project, "3")
    assert len(ledger(project)) == 3


def test_bad_input_ends_the_series(project):
    (project / "train_gpt.plan").write_text("bad")
    result = run(project)
    assert result.returncode == 2
    assert ledger(project) == ["train_gpt:1:bad"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["0"], "'0' must be a whole number"),
        (["2", "3"], "two numbers"),
        (["--recipe"], "--recipe needs a value"),
        (["--nonsense"], "unknown argument '--nonsense'"),
        (["ab", "train_gpt.py"], "ab needs two trainer files"),
        (["ab", "train_gpt.py", "missing.py", "2"], "missing.py does not exist"),
        (["ab", "train_gpt.py", "./train_gpt.py", "2"], "are the same program"),
    ],
)
def test_wrong_arguments_are_one_line_and_code_2(project, arguments, words):
    result = run(project, *arguments)
    assert result.returncode == 2
    assert words in result.stderr
    assert result.stderr.count("\n") == 1
    assert ledger(project) == []
    assert not (project / "logs").exists()


def test_one_run_makes_no_table(project):
    result = run(project, "1")
    assert result.returncode == 0
    assert "no table" in result.stdout


def outside(project: Path, path: str, **more: str) -> subprocess.CompletedProcess:
    """`bash run.sh setup` with no environment active but what `more` says."""
    unset = ("VIRTUAL_ENV", "CONDA_PREFIX")
    environment = {key: value for key, value in os.environ.items() if key not in unset}
    command, environment = ["bash", "run.sh", "setup"], environment | {"PATH": path} | more
    return subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, timeout=120)


def test_a_setup_that_was_interrupted_is_made_again(project):
    """Ctrl-C while venv installs pip leaves a .venv with Python in it, and nothing that activates it."""
    (project / "requirements.txt").write_text("")
    (project / ".venv" / "bin").mkdir(parents=True)
    (project / ".venv" / "bin" / "python").symlink_to(sys.executable)
    result = outside(project, f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert result.returncode == 0, result.stderr
    assert (project / ".venv" / "bin" / "activate").exists()


def test_an_environment_without_python_is_one_line(project, tmp_path_factory):
    """As one that conda made empty."""
    folder = tmp_path_factory.mktemp("bin")
    for name in ("bash", "dirname"):
        (folder / name).symlink_to(shutil.which(name))
    result = outside(project, str(folder), CONDA_PREFIX=str(folder))
    assert result.returncode == 2
    assert result.stderr == (
        "run.sh: error: the active environment has no python; Splits needs Python 3.11 or newer\n"
    )


def test_help_needs_no_setup(project):
    result = run(project, "--help")
    assert result.returncode == 0
    for word in ("ab A.py B.py N", "test", "--recipe", "--data"):
        assert word in result.stdout


def with_gpus(project: Path, count: int) -> None:
    (project / "torch.py").write_text(FAKE_TORCH.format(gpus=count))


def arm(project: Path) -> str:
    (folder,) = (project / "logs").iterdir()
    return folder.name.rsplit("-", 1)[0]


def test_with_gpus_and_fineweb_it_is_short_on_all_of_them(project):
    with_gpus(project, 3)
    (project / "data" / "fineweb10B").mkdir()
    (project / "data" / "fineweb10B" / "manifest.json").write_text("{}")
    result = run(project)
    assert result.returncode == 0, result.stderr
    assert arm(project) == "short"
    assert (project / "launches").read_text().split("\n")[:2] == ["--standalone --nproc_per_node=3"] * 2


def test_with_gpus_and_no_fineweb_it_says_how_to_get_it_and_runs_tiny(project):
    with_gpus(project, 1)
    result = run(project)
    assert result.returncode == 0, result.stderr
    assert "python data/fineweb.py" in result.stdout
    assert arm(project) == "tiny"


def test_with_gpus_and_data_it_is_sprint_on_them(project):
    with_gpus(project, 2)
    result = run(project, "--data", "data/mine")
    assert result.returncode == 0, result.stderr
    assert arm(project) == "sprint-mine"


def test_a_recipe_can_be_named(project):
    assert run(project, "--recipe=short").returncode == 0
    assert arm(project) == "short"


def test_bad_input_under_torchrun_has_no_log_and_ends_the_series(project):
    with_gpus(project, 2)
    (project / "train_gpt.plan").write_text("bad")
    assert run(project).returncode == 2
    assert len(ledger(project)) == 1
