"""recordbook/runs.py and gpu.py: plan before runs, ledger, early stop, noise floor, GPU state, planning.

The trainer is a stand-in that writes logs in our format at once, with times and ends that a test gives it.
"""

import dataclasses
import hashlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from recordbook import gpu, noise, runs

ROOT = Path(__file__).resolve().parents[1]
# `<stem>.json` beside the trainer: {"times": seconds by seed, "ends": how its attempts end, in turn}.
TRAINER = r"""
import argparse, hashlib, json, pathlib, signal, sys, time
parser = argparse.ArgumentParser()
for name in ("--recipe", "--data", "--seed", "--out"):
    parser.add_argument(name)
args = parser.parse_args()
here, out = pathlib.Path(__file__), pathlib.Path(args.out)
orders = here.with_name(f"{here.stem}.json")
told = json.loads(orders.read_text()) if orders.exists() else {}
end = told["ends"].pop(0) if told.get("ends") else "done"
if "ends" in told:
    orders.write_text(json.dumps(told))
seed = int(args.seed)
with pathlib.Path("order").open("a") as file:
    file.write(f"{here.stem}:{seed}\n")
plans = list(pathlib.Path(".").glob("logs/*/plan.json"))
for plan in plans:
    stated = (plan.parent / "plan.json.sha256").read_text().split()[0]
    assert stated == hashlib.sha256(plan.read_bytes()).hexdigest()
if not plans or end == "no log":
    sys.exit("no plan" if not plans else 1)
if end == "bad":
    sys.exit(2)
number = len(pathlib.Path("order").read_text().split())
source = here.read_text()
lines = source.removesuffix("\n").split("\n")
head = f"#### source {here.name} sha256={hashlib.sha256(source.encode()).hexdigest()} lines={len(lines)}"
meta = ["host: h", "cpu: c", "recipe: tiny", "world_size: 1", "target: 4.0", "data: sha256=0"]
meta += [f"run_id: {out}", f"seed: {seed}", f"started: 2026-01-01T00:00:{number:02d}+0000"]
versions = ["Running Python 3", "Running PyTorch 2 compiled for CUDA None"]
text = [head, *lines, "=" * 100, *versions, *meta, "=" * 100]
out.write_text("\n".join(text) + "\n")
log = out.open("a")
say = lambda line: (log.write(line + "\n"), log.flush())
times = told.get("times", [2.0])
loss, ms = 4 + seed / 100 + number / 10000, 1000 * times[(seed - 1) % len(times)]
if end == "wait":
    def stop(number, frame):
        say("status: interrupted at step 1: asked to by a signal")
        sys.exit(130)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
say(f"step:0/2 val_loss:{loss:.4f} train_time:0ms step_avg:1.00ms")
say(f"step:1/2 train_loss:{loss:.4f} train_time:1ms step_avg:1.00ms")
if end == "wait":
    time.sleep(40)
if end in ("done", "diverged"):
    say(f"step:2/2 val_loss:{loss:.4f} train_time:{ms:.0f}ms step_avg:1.00ms")
    say("status: " + {"done": "done", "diverged": "diverged at step 2: training loss is nan"}[end])
sys.exit({"done": 0, "diverged": 3, "dead": 1, "killed": 137}[end])
"""
SMI = """#!{python}
import sys, time
line = "{{now}}, 0, GPU-1, 1980, 2619, 690.5, 61, 0x0000000000000004"
while True:
    print(line.format(now=time.strftime("%Y/%m/%d %H:%M:%S.000")), flush=True)
    if "-l" not in sys.argv:
        break
    time.sleep(0.05)
"""


@pytest.fixture
def project(tmp_path):
    """A folder with the package and stand-ins for torch and two trainers; no GPU."""
    shutil.copy(ROOT / "compare_runs.py", tmp_path)
    shutil.copytree(
        ROOT / "recordbook", tmp_path / "recordbook", ignore=shutil.ignore_patterns("__pycache__")
    )
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "prepare.py").write_text("")
    (tmp_path / "triton_kernels.py").write_text("")
    (tmp_path / "a.py").write_text(TRAINER)
    (tmp_path / "b.py").write_text(TRAINER + "# faster\n")
    with_gpus(tmp_path, 0)
    return tmp_path


def with_gpus(project: Path, count: int) -> None:
    (project / "torch.py").write_text(f"class cuda:\n    device_count = staticmethod(lambda: {count})\n")


def tell(project: Path, name: str, **what) -> None:
    (project / f"{name}.json").write_text(json.dumps(what))


def start(project: Path, *words: str) -> subprocess.Popen:
    path = f"{project}:{os.environ['PATH']}"
    return subprocess.Popen(
        [sys.executable, "-m", "recordbook.runs", *words],
        cwd=project,
        env={**os.environ, "PATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(project: Path, *words: str) -> subprocess.CompletedProcess:
    process = start(project, *words)
    out, err = process.communicate(timeout=120)
    return subprocess.CompletedProcess(words, process.returncode, out, err)


def order(project: Path) -> list[str]:
    path = project / "order"
    return path.read_text().split() if path.exists() else []


def folder(project: Path) -> Path:
    (found,) = (project / "logs").iterdir()
    return found


def events(project: Path, kind: str = "end") -> list[dict]:
    lines = (folder(project) / "ledger.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


def wait_for(condition, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "never came"
        time.sleep(0.05)


# 1. plan, order, ledger -----------------------------------------------------------------------------------


def test_interleaved_with_a_plan_first_and_two_ledger_lines_a_run(project):
    tell(project, "a", times=[2.0, 2.1, 2.05, 2.2])
    tell(project, "b", times=[1.9, 2.05, 2.0, 2.0])
    result = run(project, "ab", "a.py", "b.py", "4")
    assert result.returncode == 0, result.stderr  # the stand-in fails without a hashed plan
    assert order(project) == ["a:1", "b:1", "b:2", "a:2", "b:3", "a:3", "a:4", "b:4"]
    plan = json.loads((folder(project) / "plan.json").read_text())
    assert plan["order"] == "ABBABAAB"
    assert plan["seeds"] == [1, 2, 3, 4]
    assert plan["arms"][0]["files"]["a.py"] == hashlib.sha256((project / "a.py").read_bytes()).hexdigest()
    assert plan["stop"] == {"rule": "fixed", "least": 4, "most": 4}
    starts, ends = events(project, "start"), events(project)
    assert [e["position"] for e in starts] == [e["position"] for e in ends] == list(range(1, 9))
    assert all(e["status"] == "done" and e["counted"] and e["exit_code"] == 0 for e in ends)
    assert {e["plan"] for e in starts} == {(folder(project) / "plan.json.sha256").read_text().split()[0]}
    for end in ends:
        log = folder(project) / end["log"]
        assert hashlib.sha256(log.read_bytes()).hexdigest() == end["log_sha256"]
    assert [e["seconds"] for e in ends] == [2.0, 1.9, 2.05, 2.1, 2.0, 2.05, 2.2, 2.0]
    assert "after pair 1 of 4" in result.stdout
    assert "B - A within pairs: -0.1000 s" in result.stdout
    assert result.stdout.count("no NVIDIA GPU here") == 1
    assert "Welch's t-test" in result.stdout, "the table of compare_runs.py ends it"
    assert run(project, "ab", "a.py", "b.py", "4").returncode == 0
    assert len(order(project)) == 8, "a complete series runs nothing"


def test_the_source_hash_is_the_one_that_compare_runs_finds_in_the_log(project):
    files = {"train_gpt.py": "a" * 64, "triton_kernels.py": "b" * 64}
    lines = "".join(f"#### source {name} sha256={sha} lines=0\n" for name, sha in files.items())
    from compare_runs import parse_log

    assert parse_log((lines + "x").encode(), "n", "p")[0].source == runs.source_of(files)


@pytest.mark.parametrize(("end", "status"), [("diverged", "diverged"), ("dead", "crashed")])
def test_a_failed_run_is_in_the_ledger_counts_and_does_not_stop_the_series(project, end, status):
    tell(project, "b", ends=["done", end], times=[1.9, 2.0, 1.95])
    tell(project, "a", times=[2.0, 2.3, 2.1])
    result = run(project, "ab", "a.py", "b.py", "3")
    assert result.returncode == 0, result.stderr
    assert "it is kept and counted" in result.stderr
    found = [e for e in events(project) if e["status"] != "done"]
    assert [(e["arm"], e["seed"], e["status"], e["counted"]) for e in found] == [("B", 2, status, True)]
    assert found[0]["reason"]
    run(project, "ab", "a.py", "b.py", "3")
    assert len(order(project)) == 6, "it is not made again"


def test_the_table_lives_with_one_run_and_with_none(project):
    tell(project, "b", ends=["diverged", "diverged"])
    tell(project, "a", times=[2.0, 2.1])
    result = run(project, "ab", "a.py", "b.py", "2")
    assert "after pair 1 of 2" in result.stdout
    assert "after pair 2 of 2" in result.stdout
    assert "Traceback" not in result.stderr
    assert result.returncode == 2, "compare_runs.py refuses an arm without runs"


def test_an_interrupted_attempt_is_made_again_and_stays_in_the_ledger(project):
    tell(project, "b", ends=["killed"])
    result = run(project, "ab", "a.py", "b.py", "2")
    assert result.returncode == 130
    assert "the same command continues" in result.stderr
    run(project, "ab", "a.py", "b.py", "2")
    assert order(project) == ["a:1", "b:1", "b:1", "b:2", "a:2"]
    ends = events(project)
    assert [e["status"] for e in ends] == ["done", "interrupted", "done", "done", "done"]
    assert [e["counted"] for e in ends] == [True, False, True, True, True]
    assert [Path(e["log"]).name for e in ends][:3] == ["run-001.txt", "run-001.txt", "run-001-try2.txt"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_reaches_the_run_once_and_the_ledger_says_so(project, number):
    tell(project, "a", ends=["wait"])
    process = start(project, "ab", "a.py", "b.py", "2")
    wait_for(lambda: any("step:1/2" in p.read_text() for p in project.glob("logs/*/A-*/run-001.txt")))
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    (end,) = events(project)
    assert (end["status"], end["counted"], end["exit_code"]) == ("interrupted", False, 130)


def test_a_killed_runner_leaves_a_start_that_the_next_one_closes(project):
    tell(project, "a", ends=["wait"])
    process = start(project, "ab", "a.py", "b.py", "2")
    wait_for(lambda: any("step:1/2" in p.read_text() for p in project.glob("logs/*/A-*/run-001.txt")))
    listed = list(Path("/proc").glob(f"{process.pid}/task/*/children"))
    if not listed:
        pytest.skip("children of a process are only listed in Linux's /proc")
    child = int(" ".join(path.read_text() for path in listed).split()[0])
    process.kill()
    process.wait()
    assert [len(events(project, kind)) for kind in ("start", "end")] == [1, 0]
    refused = run(project, "ab", "a.py", "b.py", "2")
    assert refused.returncode == 2
    assert "still going on" in refused.stderr
    os.kill(child, signal.SIGKILL)
    wait_for(lambda: not Path(f"/proc/{child}").exists() or "Z" in Path(f"/proc/{child}/stat").read_text())
    run(project, "ab", "a.py", "b.py", "2")
    assert [e["status"] for e in events(project)] == ["interrupted", "done", "done", "done", "done"]
    assert events(project)[0]["reason"] == "the runner ended before the run did"


def test_a_plan_that_changed_is_refused_with_what_changed(project):
    run(project, "ab", "a.py", "b.py", "2")
    ran = len(order(project))
    for words in (["3"], ["2", "--until-decided", "--max", "4"], ["2", "--alpha", "0.05"]):
        result = run(project, "ab", "a.py", "b.py", *words)
        assert result.returncode == 2
        assert result.stderr.count("\n") == 1
        assert "another plan" in result.stderr
        assert "--out" in result.stderr
    assert "runs was 2 and is 3" in run(project, "ab", "a.py", "b.py", "3").stderr
    with (project / "b.py").open("a") as file:
        file.write("# once more\n")
    result = run(project, "ab", "a.py", "b.py", "2")
    assert result.returncode == 2
    assert "arm B: b.py was" in result.stderr
    assert len(order(project)) == ran
    assert run(project, "ab", "a.py", "b.py", "2", "--out", "logs2/new").returncode in (0, 2)
    assert len(order(project)) == 2 * ran, "the remedy works"


def test_an_altered_plan_or_ledger_is_refused(project):
    run(project, "ab", "a.py", "b.py", "2")
    plan, ledger = folder(project) / "plan.json", folder(project) / "ledger.jsonl"
    kept = plan.read_text()
    plan.write_text(kept.replace('"alpha": 0.01', '"alpha": 0.05'))
    assert "altered after it was hashed" in run(project, "ab", "a.py", "b.py", "2").stderr
    plan.write_text(kept)
    ledger.write_text("what\n" + ledger.read_text())
    assert "line 1: is no event" in run(project, "ab", "a.py", "b.py", "2").stderr
    plan.unlink()
    assert "no plan and no ledger" in run(project, "ab", "a.py", "b.py", "2").stderr


def test_a_line_cut_by_a_power_failure_is_dropped(tmp_path, capsys):
    (tmp_path / "ledger.jsonl").write_text('{"event": "start", "attempt": 1}\n{"event": "en')
    ledger = runs.Ledger(tmp_path)
    assert [e["attempt"] for e in ledger.open_starts()] == [1]
    assert "is dropped" in capsys.readouterr().out
    assert ledger.next_attempt() == 2


def test_a_source_that_changes_during_the_series_ends_it(project):
    (project / "a.py").write_text("open('b.py', 'a').write('# edited\\n')\n" + TRAINER)
    result = run(project, "ab", "a.py", "b.py", "2")
    assert result.returncode == 2
    assert "b.py or a file that it logs changed since the plan was made" in result.stderr
    assert order(project) == ["a:1"]


def test_a_trainer_of_another_folder_names_what_it_logs(project):
    """As golf/train_golf.py does: files of several folders, and no kernels beside it."""
    says = "import sys\nif '--sources' in sys.argv:\n"
    says += "    print(__file__, 'shared.py', sep='\\n')\n    sys.exit()\n"
    (project / "golf").mkdir()
    (project / "shared.py").write_text("1\n")
    (project / "golf" / "c.py").write_text(says + TRAINER)
    result = run(project, "ab", "a.py", "golf/c.py", "1", "--out", "logs/x")
    assert result.returncode == 0, result.stderr
    arm = json.loads((project / "logs" / "x" / "plan.json").read_text())["arms"][1]
    assert sorted(arm["files"]) == ["c.py", "shared.py"]
    assert arm["files"]["shared.py"] == hashlib.sha256(b"1\n").hexdigest()
    alone = run(project, "golf/c.py", "2", "--recipe", "tiny")
    assert alone.returncode == 0, alone.stderr
    plan = json.loads(next((project / "logs").glob("tiny*/plan.json")).read_text())
    assert (plan["kind"], plan["arms"][0]["trainer"]) == ("series", "golf/c.py")
    (project / "shared.py").write_text("2\n")
    again = run(project, "ab", "a.py", "golf/c.py", "1", "--out", "logs/x")
    assert "arm B: shared.py was " in again.stderr


@pytest.mark.parametrize("end", ["bad", "no log"])
def test_a_trainer_that_does_not_start_ends_the_series_and_does_not_count(project, end):
    tell(project, "a", ends=[end])
    result = run(project, "ab", "a.py", "b.py", "2")
    assert result.returncode == 2
    assert [e["counted"] for e in events(project)] == [False]
    assert events(project)[0]["status"] == {"bad": "refused", "no log": "crashed"}[end]


def test_a_series_of_one_trainer_may_grow_and_its_ledger_says_so(project):
    shutil.copy(project / "a.py", project / "train_gpt.py")
    tell(project, "train_gpt", times=[2.0, 2.1, 2.2])
    assert run(project, "2").returncode == 0
    assert run(project, "3").returncode == 0
    assert order(project) == ["train_gpt:1", "train_gpt:2", "train_gpt:3"]
    assert [e["runs"] for e in events(project, "extend")] == [3]
    assert json.loads((folder(project) / "plan.json").read_text())["stop"]["rule"] == "open"


def test_logs_that_no_ledger_counts_are_refused(project):
    shutil.copy(project / "a.py", project / "train_gpt.py")
    run(project, "2")
    for name in ("plan.json", "ledger.jsonl"):
        (folder(project) / name).unlink()
    result = run(project, "2")
    assert result.returncode == 2
    assert "no plan and no ledger count" in result.stderr


# 2. early stop ----------------------------------------------------------------------------------------------


def wobble(centre: float, count: int = 12) -> list[float]:
    return [round(centre + 0.01 * math.sin(7 * i), 3) for i in range(count)]


@pytest.mark.parametrize(("gain", "words"), [(0.1, "B is faster"), (-0.1, "B is not faster")])
def test_until_decided_stops_either_way(project, gain, words):
    tell(project, "a", times=wobble(2.0))
    tell(project, "b", times=[round(t - gain + 0.002 * (i % 3), 3) for i, t in enumerate(wobble(2.0))])
    command = ("ab", "a.py", "b.py", "3", "--until-decided", "--max", "12")
    result = run(project, *command)
    assert result.returncode == 0, result.stderr
    assert words in result.stdout
    (decision,) = events(project, "decision")
    assert 3 <= decision["after"] < 12
    made = len(order(project))
    assert made == 2 * decision["after"]
    assert words in run(project, *command).stdout
    assert len(order(project)) == made, "a decided series stays decided"
    assert len(events(project, "decision")) == 1


def test_until_decided_never_goes_beyond_max(project):
    tell(project, "a", times=[2.0, 2.1, 2.2, 2.0])
    tell(project, "b", times=[2.1, 2.0, 2.1, 2.1])
    result = run(project, "ab", "a.py", "b.py", "2", "--until-decided", "--max", "4")
    assert len(order(project)) == 8
    assert "not decided after 4 pairs" in result.stdout


def pairs(base, new, losses=None, failed=0):
    def made(times, i):
        loss = losses[i] if losses else [4.0] * len(times)
        return [type("R", (), {"seconds": t, "loss": x}) for t, x in zip(times, loss, strict=True)]

    return runs.Pairs(made(base, 0), made(new, 1), {"A": 0, "B": failed})


def test_what_decides():
    base, new = wobble(2.0), [t - 0.1 + 0.001 * (i % 3) for i, t in enumerate(wobble(2.0))]
    assert runs.decide(pairs(base, new), 0.01, None)["decided"] == "faster"
    assert runs.decide(pairs(new, base), 0.01, None)["decided"] == "not faster"
    assert runs.decide(pairs(base, new, failed=1), 0.01, None)["decided"] is None, "a failed run is infinite"
    assert runs.decide(pairs([], []), 0.01, None)["decided"] is None
    worse = [wobble(4.0), [x + 0.05 + 0.001 * (i % 3) for i, x in enumerate(wobble(4.0))]]
    assert runs.decide(pairs(base, new, worse), 0.01, 0.01)["decided"] == "not faster"
    assert runs.decide(pairs(base, new, worse), 0.01, 0.1)["decided"] == "faster"


def test_order():
    assert runs.pattern("ab", 8) == "ABBABAAB" * 2
    assert runs.pattern("ab", 3) == "ABBABA"
    assert runs.pattern("series", 3) == "AAA"


# 3. noise floor ---------------------------------------------------------------------------------------------


def test_aa_reports_the_noise_floor(project):
    tell(project, "a", times=[2.0, 2.1, 2.05, 2.2])
    (project / "a.py").write_text(TRAINER.replace("* times[(", "* (1 + number / 1000) * times[("))
    result = run(project, "aa", "a.py", "4")
    assert result.returncode == 0, result.stderr
    assert "Noise floor of this machine: 8 runs of one program, 4 pairs" in result.stdout
    floor = json.loads((folder(project) / "noise.json").read_text())
    assert floor["pairs"] == 4
    assert 0 < floor["pair_sd_s"] < floor["time_sd_s"]
    assert floor["detectable_paired_s"] < floor["detectable_welch_s"]
    assert floor["false_accepts"]["patterns"] == 16
    plan = json.loads((folder(project) / "plan.json").read_text())
    assert plan["arms"][0]["source"] == plan["arms"][1]["source"]
    assert sorted(p.name[:2] for p in folder(project).iterdir() if p.is_dir()) == ["A-", "B-"]


def test_a_series_of_one_trainer_is_an_aa_too(project):
    tell(project, "a", times=[2.0, 2.1, 2.05, 2.3, 2.2])
    result = run(project, "a.py", "3")
    assert "Noise floor" not in result.stdout  # one pair has no spread
    result = run(project, "a.py", "5")
    assert result.returncode == 0, result.stderr
    assert "Noise floor of this machine: 5 runs of one program, 2 pairs" in result.stdout
    assert "within a pair (other seeds)" in result.stdout
    floor = json.loads((folder(project) / "noise.json").read_text())
    assert floor["difference_s"]["mean"] == pytest.approx((0.1 - 0.25) / 2)  # AB BA: 2.1 - 2.0, 2.05 - 2.3
    assert floor["runs"] == 5
    assert floor["same_seeds"] is False


@pytest.mark.parametrize("clock", [" train_time:{ms:.0f}ms", ""])
def test_a_series_without_spread_or_without_times_has_its_table(project, clock):
    path = project / "a.py"
    path.write_text(path.read_text().replace(" train_time:{ms:.0f}ms", clock))
    result = run(project, "a.py", "4")
    assert result.returncode == 0, result.stderr
    assert ("Noise floor" in result.stdout) == bool(clock)


def test_pairs_of_a_series_are_runs_of_one_lane():
    @dataclasses.dataclass
    class Stand:
        name: str
        complete: bool = True

    lanes, names = [1, 2, 1, 2, 2, 1, 1, 2], "abcdefgh"
    ran = [({"lane": lane}, Stand(name)) for lane, name in zip(lanes, names, strict=True)]
    pairs = runs.alternating_pairs(ran)
    found = [(a.name, b.name) for a, b in zip(pairs.base, pairs.new, strict=True)]
    assert found == [("a", "c"), ("g", "f"), ("b", "d"), ("h", "e")]
    ran[2][1].complete = False
    assert [a.name for a in runs.alternating_pairs(ran).base] == ["g", "b", "h"]


def test_false_accepts_are_about_alpha_for_noise():
    import numpy as np

    rng = np.random.default_rng(1)
    base, new = rng.normal(2, 0.1, (2, 20)).tolist()
    rates = noise.false_accepts(base, new, 0.05)
    assert not rates["exact"]
    assert rates["paired"] == pytest.approx(0.05, abs=0.015)
    assert rates["welch"] == pytest.approx(0.05, abs=0.025)
    assert rates["always_valid"] < 0.05
    still = noise.false_accepts([2.0] * 4, [2.0] * 4, 0.05)
    assert (still["paired"], still["welch"], still["always_valid"]) == (0, 0, 0)


# 4. GPUs ----------------------------------------------------------------------------------------------------

TEXT = """2026/01/01 12:00:00.000, 0, GPU-a, 1980, 2619, 700.00, 60, 0x0000000000000004
2026/01/01 12:00:00.001, 1, GPU-b, 1000, [N/A], 300.00, 50, 0x0000000000000001
2026/01/01 12:00:01.000, 0, GPU-a, 1755, 2619, 690.00, 64, 0x0000000000000024
2026/01/01 12:00:01.001, 1, GPU-b, 1200, [N/A], 320.00, 51, [N/A]
2026/01/01 12:00:02.000, 0, GPU-a, 1980, 26
"""


def test_gpu_samples_are_summarised_by_gpu():
    samples = gpu.parse_samples(TEXT)
    assert len(samples) == 4, "the line that was cut is none"
    first, second = gpu.summarise(samples)["gpus"]
    assert first["sm_mhz"] == {"mean": 1867.5, "min": 1755, "max": 1980}
    assert first["temperature_c"]["max"] == 64
    assert first["throttle"] == {"sw_power_cap": 1.0, "sw_thermal": 0.5}
    assert second["memory_mhz"] is None
    assert second["throttle"] == {"idle": 1.0}
    late = gpu.summarise(samples, since=samples[2].time)["gpus"]
    assert [g["samples"] for g in late] == [1, 1]
    assert late[1]["throttle"] is None
    assert "1000 to 1980 MHz" in gpu.in_words(gpu.summarise(samples))
    assert "no sample" in gpu.in_words(gpu.summarise([]))


@pytest.mark.parametrize(
    "text", ["", "No devices were found", "NVIDIA-SMI has failed, because, a, b, c, d, e"]
)
def test_gpu_text_without_samples(text):
    assert gpu.parse_samples(text) == []


def test_unknown_throttle_bits_keep_their_number():
    assert gpu.parse_reasons("0x0000000000001008") == ("hw_slowdown", "bit_0x1000")
    assert gpu.parse_reasons("0x0000000000000000") == ()
    assert gpu.parse_reasons("Active") is None


def test_with_a_gpu_each_source_warms_up_once_uncounted_and_state_is_sampled(project, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with_gpus(project, 1)
    (project / "nvidia-smi").write_text(SMI.format(python=sys.executable))
    (project / "nvidia-smi").chmod(0o755)
    tell(project, "a", ends=["wait"], times=[2.0, 2.1])
    tell(project, "b", times=[1.9, 2.05])
    result = run(project, "ab", "a.py", "b.py", "2", "--recipe", "sprint")
    assert result.returncode == 0, result.stderr
    assert order(project) == ["a:1", "b:1", "a:1", "b:1", "b:2", "a:2"]
    warm = [e for e in events(project) if e["role"] == "warm-up"]
    assert [(e["arm"], e["status"], e["counted"]) for e in warm] == [
        ("A", "interrupted", False),
        ("B", "done", False),
    ]
    logs = sorted(p.relative_to(folder(project)).parts[0][:2] for p in folder(project).rglob("*.txt"))
    assert logs == ["A-", "A-", "B-", "B-", "wa", "wa"], "warm-up logs are in no arm"
    for end in events(project):
        state = json.loads((folder(project) / end["log"]).with_suffix(".gpu.json").read_text())
        assert state == end["gpu"]
        *_, closing, said = (folder(project) / end["log"]).read_text().splitlines()
        assert closing.startswith("status: ")
        assert said == f"GPUs: {gpu.in_words(state)}"
        assert runs.outcome(folder(project) / end["log"], None, False)[0] == end["status"]
    assert json.loads((folder(project) / "plan.json").read_text())["machine"] == ["GPU-1"]
    assert "are not sampled" not in result.stdout


def test_lanes_keep_a_pair_on_its_gpus_and_wait_for_each_other(project, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    with_gpus(project, 2)
    visible = "__import__('os').environ['CUDA_VISIBLE_DEVICES']"
    # In one write: two programs share the pipe.
    show = f"sys.stdout.write(' '.join(['gpus', {visible}, args.seed, here.stem]) + chr(10))\n"
    show += "sys.stdout.flush()\n"
    for name in "ab":
        path = project / f"{name}.py"
        path.write_text(path.read_text().replace("seed = int(args.seed)\n", f"seed = int(args.seed)\n{show}"))
        tell(project, name, times=[2.0, 2.1, 2.05])
    result = run(project, "ab", "a.py", "b.py", "3", "--recipe", "sprint", "--lanes", "2")
    assert result.returncode == 0, result.stderr
    shown = [line.split()[1:] for line in result.stdout.splitlines() if line.startswith("gpus")][2:]
    assert {(gpus, seed) for gpus, seed, _ in shown} == {("4", "1"), ("5", "2"), ("4", "3")}
    assert [name for _, seed, name in shown if seed == "2"] == ["b", "a"], result.stdout
    ends = [e for e in events(project) if e["role"] == "run"]
    assert sorted(e["attempt"] for e in ends) == list(range(3, 9)), "no number twice"
    assert {(e["seed"], e["lane"]) for e in ends} == {(1, 1), (2, 2), (3, 1)}
    plan = json.loads((folder(project) / "plan.json").read_text())
    assert (plan["lanes"], plan["gpus"]) == (2, 1)
    assert "after pair 2 of 3" in result.stdout
    assert "after pair 1 of 3" not in result.stdout, "looked at when all lanes are done"
    refused = run(project, "ab", "a.py", "b.py", "3", "--recipe", "sprint", "--lanes", "3", "--out", "x")
    assert refused.returncode == 2
    assert refused.stderr == "run.sh: error: --lanes 3 must divide the number of GPUs, 2 here; change it\n"


def test_a_signal_ends_the_runs_of_all_lanes(project, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with_gpus(project, 2)
    for name in "ab":
        tell(project, name, ends=["wait", "wait", "wait"])
    process = start(project, "ab", "a.py", "b.py", "2", "--recipe", "sprint", "--lanes", "2")
    wait_for(lambda: len(list((project / "logs").glob("*/*/run-*.txt"))) == 2)
    wait_for(lambda: all("step:1" in p.read_text() for p in (project / "logs").glob("*/*/run-*.txt")))
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) == 130
    process.communicate()
    assert [e["status"] for e in events(project) if e["role"] == "run"] == ["interrupted"] * 2


def test_no_gpu_is_said_in_words(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpu.find() == (None, "no nvidia-smi on this machine")
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho No devices were found\nexit 6\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert gpu.find()[1].endswith("it says: No devices were found")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert gpu.find()[1] == "CUDA_VISIBLE_DEVICES names no GPU"


# 5. planning and bad input ----------------------------------------------------------------------------------


def test_planning(capsys):
    assert (
        runs.main(["plan", "--gain", "0.1", "--sd", "0.076", "--seconds-per-run", "120", "--gpus", "8"]) == 0
    )
    text = capsys.readouterr().out
    assert "17 runs of each arm" in text  # statistics.md 3.6
    assert "68 min on 8 GPU(s): 544 GPU-minutes" in text
    assert runs.main(["plan", "--loss-margin", "0.001", "--sd", "0.0013"]) == 0
    text = capsys.readouterr().out
    assert "25 runs, to show a mean that far below the target" in text
    assert "25 pairs for the same, if the sd is that of the difference within pairs" in text
    assert "GPU-minutes" not in text


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["plan", "--sd", "1"], "one of the arguments --gain --loss-margin is required"),
        (["plan", "--gain", "0.1"], "required: --sd"),
        (["plan", "--gain", "-1", "--sd", "1"], "must be a number above 0"),
        (["plan", "--gain", "nan", "--sd", "1"], "must be a number above 0"),
        (["plan", "--gain", "1e-9", "--sd", "1"], "needs more than"),
        (["plan", "--gain", "1", "--sd", "1", "--power", "0.001"], "must be above --alpha"),
        (["plan", "--gain", "1", "--loss-margin", "1", "--sd", "1"], "not allowed with"),
        (["ab", "a.py", "b.py"], "ab needs two trainer files and a number of runs"),
        (["ab", "a.py", "b.py", "x"], "'x' must be a whole number"),
        (["ab", "a.py", "b.py", "02"], "'02' must be a whole number"),
        (["ab", "a.py", "b.py", "99999"], "from 1 to 10000"),
        (["ab", "a.py", "b.py", "2", "3"], "two numbers"),
        (["ab", "a.py", "copy.py", "2"], "are the same program"),
        (["ab", "a.py", "wrong.py", "2"], "line 1: is no Python"),
        (["ab", "a.py", "alone/c.py", "2"], "needs a triton_kernels.py beside it"),
        (["ab", "a.py", "b.py", "2", "--until-decided"], "needs --max"),
        (["ab", "a.py", "b.py", "2", "--max", "4"], "belong to --until-decided"),
        (["ab", "a.py", "b.py", "5", "--until-decided", "--max", "4"], "at least the number of pairs"),
        (["ab", "a.py", "b.py", "2", "--alpha", "2"], "--alpha: '2' must be a number above 0 and below 0.5"),
        (["ab", "a.py", "b.py", "2", "--out", "a.py"], "is a file"),
        (["aa", "a.py"], "aa needs a trainer file and a number"),
        (["aa", "a.py", "1"], "at least 2"),
        (["-3"], "'-3' must be a whole number"),
        (["2", "--until-decided"], "unknown argument '--until-decided'"),
    ],
)
def test_bad_input_is_one_line_and_code_2(project, monkeypatch, capsys, words, said):
    monkeypatch.chdir(project)
    (project / "alone").mkdir()
    for name, text in (("copy.py", TRAINER), ("wrong.py", "a b\n"), ("alone/c.py", "1\n")):
        (project / name).write_text(text)
    for first in ([], ["check"]) if words[0] != "plan" else ([],):
        assert runs.main([*first, *words]) == 2
        err = capsys.readouterr().err
        assert said in err
        assert err.count("\n") == 1
    assert not (project / "logs").exists()


def test_a_folder_that_cannot_be_made_is_one_line(project):
    (project / "logs").write_text("")
    result = run(project, "ab", "a.py", "b.py", "2")
    assert result.returncode == 2
    assert "cannot be written" in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("kind", ["ab", "aa", "plan"])
def test_help(capsys, kind):
    assert runs.main([kind, "--help"]) == 0
    out = capsys.readouterr().out
    assert "usage:" in out
    assert kind == "plan" or "warm-up" in out


def test_import_is_light():
    code = "import sys, recordbook.runs; print({'torch', 'numpy', 'scipy'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.stdout.strip() == "set()", run.stderr
