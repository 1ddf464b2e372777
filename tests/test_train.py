"""Whole runs of a miniature recipe: log, resume, ranks, stop, divergence, and every refusal."""

import dataclasses
import hashlib
import importlib.metadata
import json
import math
import os
import pickle
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from conftest import write_corpus

import compare_runs
import train_gpt as tg

pytestmark = pytest.mark.usefixtures("restored")

ROOT = Path(__file__).resolve().parents[1]
RULE = "=" * 100
TOTAL = 14  # steps of `nano`; embedding and head are split after step 9
# As the community's tools read them.
STEP = re.compile(r"step:(\d+)/(\d+) (?:train_loss:(\d+\.\d{4}) )?train_time:(\d+)ms step_avg:(\d+\.\d\d)ms$")
VAL = re.compile(
    r"step:(\d+)/(\d+) val_loss:(\d+\.\d{4}) train_time:(\d+)ms step_avg:(\d+\.\d\d)ms"
    r"( val_bpb:(\d+\.\d{4}))?$"
)
REMEDY = re.compile(r"\b(make it|fetch it|prepare|add shards|choose|use|name|must be)\b")


class Outcome(NamedTuple):
    code: int
    log: Path
    stdout: str
    stderr: str

    @property
    def lines(self) -> list[str]:
        return self.log.read_text().split("\n")[:-1]

    @property
    def losses(self) -> list[str]:
        """Every `step:` line without its times."""
        return [
            re.sub(r" train_time:\S+ step_avg:\S+", "", line)
            for line in self.lines
            if line.startswith("step:")
        ]

    @property
    def twin(self) -> dict:
        return json.loads(self.log.with_suffix(".json").read_text())


@pytest.fixture
def trainer(monkeypatch, capfd, corpus_dir, tmp_path):
    """Run `train_gpt.py` in this process. The last of repeated options counts."""

    def call(*options: object, out: Path | None = None) -> Outcome:
        log = out or tmp_path / "logs" / f"run{time.perf_counter_ns()}.txt"
        argv = ["train_gpt.py", "--recipe", "nano", "--data", corpus_dir, "--out", log, *options]
        monkeypatch.setattr(sys, "argv", list(map(str, argv)))
        capfd.readouterr()
        code = tg.main()
        return Outcome(code, log, *capfd.readouterr())

    return call


class Baseline(NamedTuple):
    outcome: Outcome
    checkpoints: dict[int, Path]  # by the number of steps done


@pytest.fixture(scope="module")
def baseline(nano, corpus_dir, tmp_path_factory) -> Baseline:
    """One run from beginning to end, with a checkpoint kept of every step."""
    folder, patch = tmp_path_factory.mktemp("baseline"), pytest.MonkeyPatch()
    checkpoints, save = {}, tg.Job.save

    def keep(job, step):
        save(job, step)
        checkpoints[step] = folder / f"step{step}.ckpt"
        shutil.copy(folder / "run.ckpt", checkpoints[step])

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    patch.setitem(tg.RECIPES, "nano", nano)
    patch.setattr(tg.Job, "save", keep)
    argv = ["--recipe", "nano", "--data", corpus_dir, "--out", folder / "run.txt", "--checkpoint-every", 1]
    patch.setattr(sys, "argv", ["train_gpt.py", *map(str, argv)])
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        code = tg.main()
    finally:
        patch.undo()
        torch.set_num_threads(threads)
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert code == 0, "the uninterrupted run fails"
    return Baseline(Outcome(code, folder / "run.txt", "", ""), checkpoints)


def at_step(monkeypatch, number: int, do) -> None:
    """Call do(optimizer) right after an optimizer step that the warm-up does not make."""
    step, warmed = tg.NorMuonAndAdam.step, (0, tg.RECIPES["nano"].split_step)

    def wrapped(self, sched):
        step(self, sched)
        if sched.step == number:
            with torch.no_grad():
                do(self)

    assert number not in warmed, "the warm-up makes this step too"
    monkeypatch.setattr(tg.NorMuonAndAdam, "step", wrapped)


def assert_same_state(a: object, b: object, where: str = "") -> None:
    """Bitwise, through nested dictionaries."""
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same_state(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype, where
        assert torch.equal(a, b), f"{where}: {int((a != b).sum())} of {a.numel()} differ"
    else:
        assert a == b, where


def state_in(checkpoint: Path) -> dict:
    saved = torch.load(checkpoint, weights_only=True)
    return {key: saved[key] for key in ("step", "model", "optimizer")}


def final_parts(outcome: Outcome, after: int) -> list[str]:
    """The `step:` lines, without times, of what follows `after` done steps."""
    return [line for line in outcome.losses if int(re.match(r"step:(\d+)", line)[1]) > after]


# --- the log -----------------------------------------------------------------------------------------------


def test_sources_in_the_log_reproduce_the_files(baseline):
    lines = baseline.outcome.lines
    for name in ("train_gpt.py", "triton_kernels.py"):
        pattern = re.compile(rf"#### source {re.escape(name)} sha256=([0-9a-f]{{64}}) lines=(\d+)")
        match = pattern.fullmatch(lines[0])
        assert match, lines[0][:200]
        count = int(match[2])
        source = "\n".join(lines[1 : 1 + count]) + "\n"
        assert hashlib.sha256(source.encode()).hexdigest() == match[1]
        assert "def " in source
        lines = lines[1 + count :]
    assert lines[0] == RULE, "something between the sources and the header"


def test_sources_are_the_files_that_ran(trainer, monkeypatch):
    """Byte for byte; the same text that is on the disk now."""
    monkeypatch.setattr(tg, "warm_up", lambda job: None)
    monkeypatch.setattr(tg, "train", lambda job, stop: {})
    before = [(ROOT / name).read_bytes() for name in ("train_gpt.py", "triton_kernels.py")]
    log = trainer("--seed", 3).log.read_bytes()
    after = [(ROOT / name).read_bytes() for name in ("train_gpt.py", "triton_kernels.py")]
    if before != after:
        pytest.skip("the sources were edited while the run started")
    assert all(b"\n" + source in log for source in before)


def test_header(baseline, nano, corpus_dir):
    lines = baseline.outcome.lines
    first, second = (i for i, line in enumerate(lines) if line == RULE)
    header = lines[first + 1 : second]
    assert header[0].startswith("Running Python 3.")
    assert header[1].startswith(f"Running PyTorch {torch.__version__} compiled for CUDA ")
    assert header[2].startswith("Running Triton version ")
    meta = dict(line.split(": ", 1) for line in header[3:])
    assert len(meta) == len(header) - 3, "a key twice"
    keys = "run_id host data recipe seed world_size target command started commit dirty cpu slots dtype"
    assert set(keys.split()) <= set(meta)
    manifest = hashlib.sha256((corpus_dir / "manifest.json").read_bytes()).hexdigest()
    want = {"recipe": "nano", "seed": "1", "world_size": "1", "data": f"sha256={manifest}"}
    assert want.items() <= meta.items()
    assert float(meta["target"]) == nano.target
    assert "--recipe nano" in meta["command"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d{4}", meta["started"])
    assert re.fullmatch(r"[0-9a-f]{40}|unknown", meta["commit"])
    assert meta["dirty"] in ("true", "false", "unknown")
    assert meta == baseline.outcome.twin["meta"]


def test_step_lines_and_closing_lines(baseline, nano):
    lines = baseline.outcome.lines
    steps = [line for line in lines if line.startswith("step:")]
    trained = [m for m in map(STEP.match, steps) if m]
    validated = [m for m in map(VAL.match, steps) if m]
    assert len(trained) + len(validated) == len(steps), "a line that the community's tools cannot read"
    assert [int(m[1]) for m in trained] == list(range(1, TOTAL + 1))
    assert [int(m[1]) for m in validated] == [0, 7, TOTAL]
    assert {m[2] for m in trained + validated} == {str(TOTAL)}
    for m in trained + validated:
        milliseconds, average = int(m[4]), float(m[5])
        assert abs(average * max(int(m[1]), 1) - milliseconds) <= 0.5 + 0.005 * TOTAL
    times = [int((STEP.match(line) or VAL.match(line))[4]) for line in steps]
    assert times == sorted(times)
    assert lines[-1] == "status: done"
    peak = re.fullmatch(r"peak memory allocated: (\d+) MiB reserved: (\d+) MiB", lines[-2])
    assert int(peak[1]) > 0
    twin = baseline.outcome.twin
    assert twin["format"] == 1
    result = twin["result"]
    assert result["status"] == "done"
    assert result["steps"] == TOTAL
    assert f"{result['val_loss']:.4f}" == validated[-1][3]
    assert f"{result['val_bpb']:.4f}" == validated[-1][7]
    assert abs(result["train_time_ms"] - int(validated[-1][4])) < 100
    assert result["peak_memory_mib"] == int(peak[1])


def test_the_loss_falls_from_that_of_chance(baseline):
    losses = [float(VAL.match(line)[3]) for line in baseline.outcome.lines if VAL.match(line)]
    assert abs(losses[0] - 5.545) < 0.01  # ln 256: 250 tokens, padded to 256
    assert losses[1] < losses[0] - 0.3
    assert losses[2] < losses[1] - 0.2


def test_bits_per_byte(baseline):
    """Of all targets: three bytes a token, none of a BOS."""
    result = baseline.outcome.twin["result"]
    ratio = result["val_loss"] / result["val_bpb"]  # nats per token over bits per byte
    assert 0.693 * 2.8 < ratio < 0.6932 * 3


def test_a_seed_repeats_and_another_differs(trainer, baseline):
    """Saving checkpoints does not change a run either: the baseline saved one a step."""
    again, other = trainer(), trainer("--seed", 2)
    assert (again.code, other.code) == (0, 0)
    assert again.losses == baseline.outcome.losses
    assert not list(again.log.parent.glob("*.ckpt")), "a checkpoint that nobody asked for"
    assert again.twin["result"]["val_loss"] == baseline.outcome.twin["result"]["val_loss"]
    same = [a == b for a, b in zip(again.losses, other.losses, strict=True)]
    assert not any(same[1:])


def test_compare_runs_reads_the_logs(trainer, baseline, tmp_path, capfd):
    arm = tmp_path / "arm"
    runs = [baseline.outcome, trainer("--seed", 2, out=arm / "seed2.txt")]
    assert runs[1].code == 0
    shutil.copy(baseline.outcome.log, arm / "seed1.txt")
    code = compare_runs.main([str(arm), "--json", str(tmp_path / "table.json")])
    shown = capfd.readouterr()
    assert code == 0, shown.err
    assert re.search(r"arm\b.*\b2\b", shown.out)
    (found,) = json.loads((tmp_path / "table.json").read_text())["arms"]
    assert found["complete"] == found["attempts"] == 2
    for read, run in zip(found["runs"], runs, strict=True):
        result = run.twin["result"]
        assert read["status"] == "complete", read["reason"]
        assert read["loss"] == round(result["val_loss"], 4)
        assert read["bpb"] == round(result["val_bpb"], 4)
        assert abs(1000 * read["seconds"] - result["train_time_ms"]) < 100
        assert read["peak_mib"] == result["peak_memory_mib"]
        assert read["steps_done"] == read["steps_planned"] == result["steps"]
        assert read["head"]["recipe"] == run.twin["meta"]["recipe"]
        assert str(read["head"]["seed"]) == run.twin["meta"]["seed"]
        assert read["head"]["target"] == float(run.twin["meta"]["target"])
        assert set(read["sources"]) == {"train_gpt.py", "triton_kernels.py"}


@pytest.mark.skipif(sys.platform == "darwin", reason="macOS refuses such names")
def test_a_path_that_is_no_utf8(trainer, monkeypatch, tmp_path):
    """Linux takes any bytes for a name; the log holds them escaped, and stays UTF-8."""
    monkeypatch.setattr(tg, "warm_up", lambda job: None)
    monkeypatch.setattr(tg, "train", lambda job, stop: {})
    outcome = trainer(out=tmp_path / os.fsdecode(b"caf\xe9.txt"))
    assert outcome.code == 0
    assert r"caf\udce9.txt" in next(line for line in outcome.lines if line.startswith("command: "))


def test_the_header_survives_a_triton_without_package_data(trainer, monkeypatch):
    """Nightly builds and source trees bring the module `triton` under another package's name."""

    def version(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(tg, "train", lambda job, stop: {})
    outcome = trainer()
    assert outcome.code == 0
    assert any(line.startswith("Running Triton version ") for line in outcome.lines)


# --- warm-up -----------------------------------------------------------------------------------------------


def test_warm_up_leaves_no_trace(trainer, nano, monkeypatch):
    """Parameters, buffers, optimizer state, gradients, mode and random state; yet it makes the split step."""
    sizes, steps, checked = [], [], []
    warm_up, step = tg.warm_up, tg.NorMuonAndAdam.step

    def state(job):
        tensors = {**dict(job.model.named_parameters()), **dict(job.model.named_buffers())}
        tensors = {name: x.detach().clone() for name, x in tensors.items()}
        return {"tensors": tensors, "optimizer": job.optimizer.state_dict(), "random": torch.get_rng_state()}

    def checking(job):
        forward = job.forward

        def counting(tokens, targets, positions, cu, *rest):
            slots = int((positions == 0).sum())
            assert torch.equal(positions, torch.arange(len(tokens) // slots, dtype=torch.int32).repeat(slots))
            assert [x.dtype for x in (tokens, targets, positions, cu)] == [torch.int32] * 4
            sizes.append((job.model.training, (slots, len(tokens) // slots), len(cu) - 1))
            return forward(tokens, targets, positions, cu, *rest)

        job.forward = counting
        before = state(job)
        warm_up(job)
        assert_same_state(state(job), before)
        assert all(p.grad is None for p in job.model.parameters())
        assert job.model.training
        assert job.optimizer.is_tied
        assert job.clock.elapsed_ms == 0
        assert job.clock.started is None
        checked.append(job)

    def noting(self, sched):
        steps.append((sched.step, sched.is_adam_step, self.is_tied))
        step(self, sched)
        steps[-1] += (self.is_tied,)

    monkeypatch.setattr(tg.NorMuonAndAdam, "step", noting)
    monkeypatch.setattr(tg, "warm_up", checking)
    monkeypatch.setattr(tg, "train", lambda job, stop: {})
    assert trainer().code == 0
    # Step, whether Adam moves, and whether embedding and head are one parameter before and after.
    last = nano.split_step, True, True, False
    assert steps == [(0, False, True, True), (0, True, True, True), last]
    (job,) = checked
    shapes = [(True, (12, tokens), 12 * job.max_docs) for tokens in (64, 128, 192, 192)]  # a pass a stage
    shapes += [shapes[-1]] * 3  # gradients for the optimizer's steps
    shapes.append((False, (1, 512), job.val.max_docs))
    assert sizes == shapes, "every shape of the run, and no other, is warmed up"


# --- checkpoints -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("done", [3, 8, 10, 13, 14])
def test_resume_is_bitwise_the_uninterrupted_run(trainer, baseline, done):
    """From even and odd steps, before and after embedding and head are split, and from the end."""
    resumed = trainer("--resume", baseline.checkpoints[done], "--checkpoint-every", 1)
    assert resumed.code == 0, resumed.stderr
    assert final_parts(resumed, done) == final_parts(baseline.outcome, done)
    assert resumed.lines[-1] == "status: done"
    assert f"resumed: {baseline.checkpoints[done]}" in resumed.lines
    a, b = resumed.twin["result"], baseline.outcome.twin["result"]
    assert (a["val_loss"], a["val_bpb"]) == (b["val_loss"], b["val_bpb"])
    assert a["train_time_ms"] > torch.load(baseline.checkpoints[done], weights_only=True)["train_ms"]
    if done < TOTAL:
        assert_same_state(state_in(resumed.log.with_suffix(".ckpt")), state_in(baseline.checkpoints[TOTAL]))


def test_checkpoints_only_when_asked_for(trainer, tmp_path):
    seen, save = [], tg.Job.save
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tg.Job, "save", lambda job, step: (seen.append(step), save(job, step)))
        every = trainer("--checkpoint-every", 5, out=tmp_path / "five" / "log.txt")
    assert seen == [5, 10]
    assert sorted(p.name for p in every.log.parent.iterdir()) == ["log.ckpt", "log.json", "log.txt"]
    assert f"checkpoint: step 10 in {every.log.with_suffix('.ckpt')}" in every.lines


class Bomb:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (os.system, (f"touch {self.path}",))


def foreign(kind: str, good: Path, folder: Path) -> Path:
    path = folder / f"{kind}.ckpt"
    saved = torch.load(good, weights_only=True)
    if kind == "missing":
        return path
    if kind == "folder":
        path.mkdir()
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "noise":
        path.write_bytes(bytes(range(256)) * 50)
    elif kind == "truncated":
        path.write_bytes(good.read_bytes()[:-1000])
    elif kind == "bomb":
        torch.save({**saved, "step": Bomb(folder / "executed")}, path)
    elif kind == "raw bomb":
        path.write_bytes(pickle.dumps(Bomb(folder / "executed")))
    elif kind == "list":
        torch.save([1, 2], path)
    elif kind == "other keys":
        torch.save({"model": saved["model"]}, path)
    elif kind == "other shapes":
        torch.save({**saved, "model": {k: v[..., :-1].clone() for k, v in saved["model"].items()}}, path)
    elif kind == "other recipe":
        torch.save({**saved, "recipe": "tiny"}, path)
    elif kind == "other data":
        torch.save({**saved, "data": "0" * 64}, path)
    return path


KINDS = ["missing", "folder", "empty", "noise", "truncated", "bomb", "raw bomb", "list"]
KINDS += ["other keys", "other shapes", "other recipe", "other data"]


@pytest.mark.parametrize("kind", KINDS)
def test_foreign_checkpoints_are_refused(trainer, baseline, tmp_path, monkeypatch, recwarn, kind):
    path = foreign(kind, baseline.checkpoints[4], tmp_path)
    monkeypatch.setattr(tg, "train", lambda *_: pytest.fail("it trains"))
    outcome = trainer("--resume", path)
    assert_refused(outcome, str(path))
    assert not [str(w.message) for w in recwarn], "a warning is one more line on stderr"
    assert not (tmp_path / "executed").exists(), "code in the checkpoint was executed"
    assert not list(outcome.log.parent.glob("*")), "a refused run leaves files"


@pytest.fixture
def full_disk():
    """Call it: from then on files end at 0.5 MiB, which is less than a checkpoint and more than a log."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 19, limits[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_checkpoint_is_replaced_whole(trainer, tmp_path, monkeypatch, full_disk):
    """Writing fails half-way at the second one: the first is still there and good, no leftover beside it."""
    save, calls = tg.Job.save, []

    def breaking(job, step):
        calls.append(step)
        if len(calls) == 2:
            full_disk()
        save(job, step)

    monkeypatch.setattr(tg.Job, "save", breaking)
    folder = tmp_path / "full"
    outcome = trainer("--checkpoint-every", 3, out=folder / "log.txt")
    assert_refused(outcome, f"{folder / 'log.ckpt'} cannot be written", "free space")
    assert state_in(folder / "log.ckpt")["step"] == 3
    assert sorted(p.name for p in folder.iterdir()) == ["log.ckpt", "log.json", "log.txt"]
    assert outcome.lines[-1].startswith("status: crashed: InputError: ")


# --- divergence and signals --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("step", "value", "status"),
    [
        (2, float("nan"), "diverged at step 4: training loss is nan"),
        (6, float("nan"), "diverged at step 7: validation loss is nan"),
        (10, float("inf"), "diverged at step 12: training loss is nan"),
    ],
)
def test_a_loss_that_is_no_number_ends_the_run(trainer, monkeypatch, step, value, status):
    at_step(monkeypatch, step, lambda optimizer: optimizer.params["scalars"].fill_(value))
    outcome = trainer()
    assert outcome.code == 3
    assert outcome.lines[-1] == f"status: {status}"
    assert outcome.stderr == ""
    twin = json.loads(outcome.log.with_suffix(".json").read_text(), parse_constant=pytest.fail)
    assert twin["result"]["status"] == status
    steps = [int(m[1]) for m in map(STEP.match, outcome.lines) if m]
    assert steps == list(range(1, step + 2)), "the log ends at the step before"
    (run,) = compare_runs.parse_log(outcome.log.read_bytes(), "run", "run.txt")
    assert run.status == "diverged"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_step_and_the_run_resumes(trainer, baseline, number):
    """At an even number of done steps and at an odd one."""
    step = {signal.SIGTERM: 6, signal.SIGINT: 3}[number]  # 7 and 4 steps done
    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, step, lambda _: os.kill(os.getpid(), number))
        stopped = trainer("--checkpoint-every", 1000)
    assert stopped.code == 130
    assert stopped.lines[-1].startswith(f"status: interrupted at step {step + 1}: ")
    assert stopped.stderr == ""
    assert stopped.twin["result"]["status"] == stopped.lines[-1].removeprefix("status: ")
    (run,) = compare_runs.parse_log(stopped.log.read_bytes(), "run", "run.txt")
    assert run.status == "interrupted"
    checkpoint = stopped.log.with_suffix(".ckpt")
    assert_same_state(state_in(checkpoint), state_in(baseline.checkpoints[step + 1]))
    resumed = trainer("--resume", checkpoint)
    assert resumed.code == 0
    assert final_parts(resumed, step + 1) == final_parts(baseline.outcome, step + 1)


def test_a_signal_without_checkpoints_leaves_none(trainer, monkeypatch):
    at_step(monkeypatch, 2, lambda _: os.kill(os.getpid(), signal.SIGTERM))
    outcome = trainer()
    assert outcome.code == 130
    assert outcome.lines[-1].startswith("status: interrupted at step 3: ")
    assert not outcome.log.with_suffix(".ckpt").exists()


def test_a_second_signal_does_not_wait(trainer, monkeypatch):
    def twice(_):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    at_step(monkeypatch, 3, twice)
    outcome = trainer("--checkpoint-every", 1)
    assert outcome.code == 130
    assert re.match(r"status: interrupted at .*step", outcome.lines[-1])
    assert not any(line.startswith("step:4/") for line in outcome.lines)


@pytest.mark.parametrize("where", ["warm_up", "build", "open"])
def test_a_signal_before_the_loop(trainer, monkeypatch, where):
    """While it compiles, builds, or reads the data, before there is a log: no traceback, code 130."""
    owner = tg.Corpus if where == "open" else tg
    monkeypatch.setattr(owner, where, lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM))
    outcome = trainer()
    assert outcome.code == 130
    assert "Traceback" not in outcome.stderr
    if outcome.log.exists():
        assert re.match("status: interrupted at .*start", outcome.lines[-1])


def test_a_signal_passes_through_whoever_catches_everything(trainer, baseline, monkeypatch):
    """Reading a checkpoint is one such place; importing an attention package and torch.compile are others."""
    monkeypatch.setattr(torch, "load", lambda *_, **__: os.kill(os.getpid(), signal.SIGINT))
    outcome = trainer("--resume", baseline.checkpoints[4])
    assert outcome.code == 130
    assert outcome.stderr == "train_gpt.py: interrupted at the start\n"


def test_a_crash_closes_the_log(trainer, monkeypatch, tmp_path):
    def broken(*_, **__):
        raise RuntimeError("first line\nsecond line")

    monkeypatch.setattr(tg, "validate", broken)
    log = tmp_path / "crash.txt"
    with pytest.raises(RuntimeError):
        trainer(out=log)
    assert log.read_text().endswith("\nstatus: crashed: RuntimeError: first line\n")
    assert json.loads(log.with_suffix(".json").read_text())["result"]["status"].startswith("crashed: ")


# --- refusals ----------------------------------------------------------------------------------------------


def assert_refused(outcome: Outcome, *found: str) -> None:
    """Code 2 and one line on stderr that names value and remedy."""
    assert outcome.code == 2
    assert outcome.stderr.startswith("train_gpt.py: error: ")
    assert outcome.stderr.count("\n") == 1, outcome.stderr
    for text in (*found, REMEDY):
        assert re.search(text if isinstance(text, re.Pattern) else re.escape(text), outcome.stderr), (
            outcome.stderr
        )


def listing(folder: Path) -> dict[Path, bytes | None]:
    return {p: p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


REFUSALS = {  # options after the good ones, what the message names
    "unknown recipe": (["--recipe", "big"], ["'big'", "nano", "short"]),
    "negative checkpoint": (["--checkpoint-every", "-1"], ["--checkpoint-every -1", "0"]),
    "no data folder": (["--data", "{tmp}/nowhere"], ["{tmp}/nowhere", "manifest.json", "data/"]),
    "data is a file": (["--data", "{tmp}/file"], ["{tmp}/file"]),
    "other tokens": (["--recipe", "short"], ["short", "gpt2", "bytes", "--tokenizer gpt2"]),
    "log under a file": (["--out", "{tmp}/file/log.txt"], ["{tmp}/file/log.txt", "--out"]),
    "log exists": (["--out", "{tmp}/file"], ["{tmp}/file", "--out", "exists"]),
    "log is a folder": (["--out", "{tmp}/folder"], ["{tmp}/folder", "--out"]),
    "log without a name": (["--out", ""], ["log .:", "--out"]),
    "log is the root": (["--out", "/"], ["log /:", "--out"]),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_bad_input_is_refused_in_one_line(trainer, tmp_path, monkeypatch, case):
    options, found = ([text.format(tmp=tmp_path) for text in texts] for texts in REFUSALS[case])
    (tmp_path / "file").write_text("precious")
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path)
    before = listing(tmp_path)
    outcome = trainer(*options)
    assert_refused(outcome, *found)
    assert outcome.stdout == ""
    assert listing(tmp_path) == before, "a refused run leaves files or changes one"


@pytest.mark.parametrize("rank", [0, 1])
def test_a_world_size_that_does_not_divide(trainer, tmp_path, monkeypatch, rank):
    """Noticed by every rank before there is a process group, said by the first."""
    for name, value in (("WORLD_SIZE", 5), ("RANK", rank), ("LOCAL_RANK", rank)):
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(
        torch.distributed, "init_process_group", lambda *_, **__: pytest.fail("a process group")
    )
    outcome = trainer()
    assert outcome.code == 2
    assert listing(tmp_path) == {}
    if rank == 0:
        assert_refused(outcome, "world size 5", "nano", "[1, 2, 3, 4")
    else:
        assert outcome.stderr == ""


def set_ranks(monkeypatch, rank: object, local: object, world: object, here: object) -> None:
    names = "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"
    for name, value in zip(names, (rank, local, world, here), strict=True):
        monkeypatch.setenv(name, str(value))


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_more_processes_than_gpus(trainer, monkeypatch, rank):
    """The ranks that have a GPU refuse too, or the first, which alone speaks, would not say it."""
    set_ranks(monkeypatch, rank, rank, 3, 3)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    outcome = trainer()
    assert outcome.code == 2
    if rank == 0:
        assert_refused(outcome, "3 processes", "2 GPUs", "--nproc_per_node=2")
    else:
        assert outcome.stderr == ""


def test_a_process_that_torchrun_did_not_start_is_alone(monkeypatch):
    """Without RANK and WORLD_SIZE: a child of a rank that was given one of its GPUs."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert tg.Ranks.from_torchrun() == tg.Ranks(0, 1, torch.device("cuda", 0))


def test_each_host_says_what_it_lacks(trainer, tmp_path, monkeypatch):
    """The second host of two has no data: its first process is rank 1."""
    set_ranks(monkeypatch, 1, 0, 2, 1)
    assert_refused(trainer("--data", tmp_path / "nowhere"), "nowhere", "manifest.json")


@pytest.mark.parametrize("ranks", [(1, 0, 1, 1), (0, 0, 0, 1), ("x", 0, 1, 1)], ids=str)
def test_an_environment_that_is_no_rank_of_a_world(trainer, monkeypatch, ranks):
    set_ranks(monkeypatch, *ranks)
    assert_refused(trainer(), "RANK", f"'{ranks[0]}'", "use torchrun")


@pytest.mark.parametrize("options", [["--seed", "x"], ["--no-such-option"], ["--checkpoint-every", "1.5"]])
def test_options_that_cannot_be_read(trainer, options):
    assert_refused(trainer(*options), options[0])


@pytest.mark.parametrize("seed", [2**64, -(2**64)])
def test_a_seed_out_of_range_is_refused(trainer, seed):
    assert_refused(trainer("--seed", seed), str(seed))


@pytest.mark.parametrize("suffix", [".json", ".ckpt"])
def test_the_twin_does_not_overwrite_the_log(trainer, tmp_path, suffix):
    """A log that is named like what is written beside it is refused or survives."""
    outcome = trainer("--checkpoint-every", 7, out=tmp_path / f"log{suffix}")
    if outcome.code == 2:
        assert_refused(outcome, f"log{suffix}")
        return
    assert outcome.log.read_bytes().startswith(b"#### source train_gpt.py "), "the log was overwritten"


def test_files_beside_the_log_are_not_overwritten(trainer, tmp_path):
    """results.json may be anybody's; a new log results.txt must not replace it."""
    (tmp_path / "results.json").write_text("precious")
    (tmp_path / "results.ckpt").write_text("precious")
    trainer("--checkpoint-every", 7, out=tmp_path / "results.txt")
    assert (tmp_path / "results.json").read_text() == "precious"
    assert (tmp_path / "results.ckpt").read_text() == "precious"


def test_too_little_data_is_refused_before_training(trainer, tmp_path, monkeypatch, nano):
    monkeypatch.setattr(tg, "warm_up", lambda *_: pytest.fail("it warms up"))
    data = write_corpus(tmp_path / "little", (9_000, 9_000))
    outcome = trainer("--data", data)
    assert_refused(outcome, f"of {TOTAL} steps", "nano", f"{nano.train_tokens:,}", "18,000", "add shards")
    few = trainer("--data", write_corpus(tmp_path / "few", val_size=2000))
    assert_refused(few, "2,049 validation tokens", "2,000", "data/prepare.py")
    assert not list(outcome.log.parent.glob("*")), "a refused run leaves files"


def test_help_is_complete(capsys):
    with pytest.raises(SystemExit) as stop:
        tg.parse(["--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for option in ("--recipe", "--data", "--out", "--seed", "--resume", "--checkpoint-every", "--help"):
        assert option in text
    for recipe in ("tiny", "sprint", "short"):
        assert re.search(rf"{recipe}:? \d+ steps, [\d.]+ M tokens", text)
    codes = text[text.index("Exit codes") :]
    assert re.search(r"\b0\b.*\b2\b.*\b3\b.*\b130\b", codes)
    assert "default" in text
    assert "torchrun" in text


def test_defaults_say_where_not_what(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    args = tg.parse([])
    assert (args.recipe, args.seed, args.resume, args.checkpoint_every) == ("tiny", 1, None, 0)
    assert args.data == ROOT / "data" / "default"
    assert args.out.parent == Path("logs") / "tiny"
    assert args.out.suffix == ".txt"
    assert tg.parse([]).out != args.out
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    args = tg.parse([])
    assert args.recipe == "short"
    assert args.data == ROOT / "data" / "fineweb10B"


# --- as a program: pipes, real signals, several ranks, the compiler ----------------------------------------


@pytest.fixture
def program(tmp_path, nano, corpus_dir):
    """The command line of a script that adds a recipe to the table and runs the trainer."""

    def command(*options: object, recipe: tg.Recipe = nano, before: str = "") -> tuple[list[str], Path]:
        script = tmp_path / f"driver{time.perf_counter_ns()}.py"
        script.write_text(
            f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nimport train_gpt\n"
            f"from train_gpt import Layer, Recipe, Stage\n"
            f"train_gpt.RECIPES['nano'] = {recipe!r}\n{before}\n"
            "if __name__ == '__main__':\n    sys.exit(train_gpt.main())\n"
        )
        log = script.with_suffix(".txt")
        argv = [script, "--recipe", "nano", "--data", corpus_dir, "--out", log, *options]
        return list(map(str, argv)), log

    return command


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def test_a_closed_pipe_does_not_end_the_run(program, baseline):
    """As in `train_gpt.py | head -1`."""
    argv, log = program()
    child = subprocess.Popen(
        [sys.executable, *argv], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT, text=True
    )
    child.stdout.close()
    stderr = child.stderr.read()
    child.stderr.close()
    assert child.wait(timeout=120) == 0, stderr
    outcome = Outcome(0, log, "", stderr)
    assert outcome.lines[-1] == "status: done"
    assert outcome.losses == baseline.outcome.losses
    assert stderr == ""


def test_a_real_signal_to_the_program(program):
    """The exit code as the shell sees it; the process goes within a step."""
    slow = "step = train_gpt.NorMuonAndAdam.step\nimport time\n"
    slow += "train_gpt.NorMuonAndAdam.step = lambda *a: (time.sleep(0.3), step(*a))\n"
    argv, log = program("--checkpoint-every", 1000, before=slow)
    child = subprocess.Popen(
        [sys.executable, *argv], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=ENVIRONMENT, text=True
    )
    deadline = time.monotonic() + 100
    while time.monotonic() < deadline and not (log.exists() and "\nstep:1/" in log.read_text()):
        time.sleep(0.05)
    child.send_signal(signal.SIGTERM)
    _, stderr = child.communicate(timeout=60)
    assert child.returncode == 130, stderr
    assert stderr == ""
    assert re.search(r"\nstatus: interrupted at step \d+: .*\n$", log.read_text())
    assert log.with_suffix(".ckpt").exists()


def torchrun(world: int, argv: list[str]) -> None:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc_per_node={world}",
        *argv,
    ]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


def numbers(lines: list[str]) -> list[tuple[str, float]]:
    return [(line[: m.start()], float(m[1])) for line in lines if (m := re.search(r"_loss:([\d.]+)", line))]


def assert_close(got: list[str], want: list[str]) -> None:
    pairs = list(zip(numbers(got), numbers(want), strict=True))
    assert len(pairs) == len(got) > 0
    for (step, loss), (other, target) in pairs:
        assert step == other
        assert abs(loss - target) < 1e-3, f"{step}: {loss} and {target}"


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3])
def test_world_sizes_train_alike(program, baseline, world):
    """Three ranks pad what they share: 250 rows, 32 matrices, four validation slots."""
    argv, log = program("--checkpoint-every", 7)
    torchrun(world, argv)
    outcome = Outcome(0, log, "", "")
    assert_close(outcome.losses, baseline.outcome.losses)
    assert outcome.twin["meta"]["world_size"] == str(world)
    assert outcome.lines[-1] == "status: done"
    mine, theirs = state_in(log.with_suffix(".ckpt")), state_in(baseline.checkpoints[TOTAL])
    for name, value in theirs["model"].items():
        assert mine["model"][name].shape == value.shape
        torch.testing.assert_close(mine["model"][name], value, rtol=0.02, atol=0.02, msg=name)
    assert mine["optimizer"]["updates"] == theirs["optimizer"]["updates"]


def test_the_process_group_ends(tmp_path):
    """A thread of gloo that outlives it can abort the process at its exit, one time in sixty.

    torch._dynamo imports torch.distributed.nn.functional, whose functions have the group of that moment as a
    default argument, and so keep it.
    """
    code = """
import os, torch, train_gpt as tg
with tg.Ranks(0, 2, torch.device("cpu")).process_group():
    import torch._dynamo
    torch.distributed.all_reduce(torch.ones(3))
names = [open(f"/proc/self/task/{task}/comm").read() for task in os.listdir("/proc/self/task")]
assert not [name for name in names if "gloo" in name], names
"""
    if not Path("/proc/self/task").exists():
        pytest.skip("no list of threads here")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    children = []
    for rank in range(2):
        ranks = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        command = [sys.executable, "-c", code]
        pipe = subprocess.PIPE
        children.append(
            subprocess.Popen(command, cwd=ROOT, env={**ENVIRONMENT, **ranks}, stderr=pipe, text=True)
        )
    for child in children:
        _, stderr = child.communicate(timeout=120)
        assert child.returncode == 0, stderr


@pytest.mark.slow
def test_eight_ranks_train_as_one(program, nano):
    """The world size that the benchmark is for, with three slots a rank."""
    outcomes = []
    for world in (1, 8):
        argv, log = program(recipe=dataclasses.replace(nano, slots=24))
        torchrun(world, argv)
        outcomes.append(Outcome(0, log, "", ""))
    assert_close(outcomes[1].losses, outcomes[0].losses)
    assert [outcome.twin["meta"]["world_size"] for outcome in outcomes] == ["1", "8"]
    assert [outcome.twin["meta"]["slots"] for outcome in outcomes] == ["24", "24"]


@pytest.mark.slow
def test_a_checkpoint_of_one_rank_resumes_on_two(program, baseline):
    argv, log = program("--resume", baseline.checkpoints[10])
    torchrun(2, argv)
    assert_close(final_parts(Outcome(0, log, "", ""), 10), final_parts(baseline.outcome, 10))


INDUCTOR = (
    pytest.mark.slow,
    pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="no C++ compiler"),
)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=INDUCTOR)])
def test_the_compiled_path_trains_alike(trainer, nano, monkeypatch, backend):
    """Two batch shapes, every kind of layer: all that a GPU compiles, but the head in FP8, for the CPU.

    aot_eager traces model, backward and update rules as whole graphs; inductor makes programs of them. All
    that the run needs is compiled by the warm-up.
    """
    layers = (
        tg.Layer(attn="paired", value_embed=1, save_as="skip"),
        tg.Layer(value_embed=0, skip_from="skip"),
        tg.Layer(window="long", key_offset=True, value_embed=2, save_as="backout"),
    )
    stages = tuple(
        dataclasses.replace(nano.stages[i], steps=n, batch_tokens=size)
        for i, n, size in ((0, 4, 960), (3, 2, 1536))
    )
    momentum = ((0, 0.85), (6, 0.95))
    reduced = dataclasses.replace(
        nano,
        layers=layers,
        stages=stages,
        momentum=momentum,
        val_every=3,
        val_tokens=1024,
        val_windows=(128, 256),  # of fewer than three blocks, the reference of attention is another graph
    )
    monkeypatch.setitem(tg.RECIPES, "nano", reduced)
    eager = trainer()
    torch_compile, compiled_functions, train = torch.compile, [], tg.train

    def compiler(function, **options):
        assert options["fullgraph"], "a graph break would go unnoticed"
        compiled_functions.append(function)
        return torch_compile(function, backend=backend, **options)

    def warmed_up(job, stop):
        with torch.compiler.set_stance("fail_on_recompile"):
            return train(job, stop)

    monkeypatch.setattr(torch, "compile", compiler)
    monkeypatch.setattr(tg, "train", warmed_up)
    monkeypatch.setitem(tg.RECIPES, "nano", dataclasses.replace(reduced, cpu_compile=True))
    # The C++ compiler's optimisation takes longer than this run.
    with torch._inductor.config.patch({"aot_inductor.debug_compile": True, "cpp.simdlen": 0}):
        compiled = trainer()
    torch._dynamo.reset()
    assert (eager.code, compiled.code) == (0, 0)
    assert len(compiled_functions) == 3
    assert any(line.startswith("compile: no") for line in eager.lines)
    assert not any(line.startswith("compile: no") for line in compiled.lines)
    assert_close(compiled.losses, eager.losses)


def test_without_a_compiler_it_runs_eagerly_and_says_so(monkeypatch, nano):
    cpu, wants = torch.device("cpu"), dataclasses.replace(nano, cpu_compile=True)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    compiler, lines = tg.compiler_for(wants, cpu)
    assert compiler(math.sqrt, dynamic=False) is math.sqrt
    assert len(lines) == 1
    assert "C++ compiler" in lines[0]
    monkeypatch.setattr(shutil, "which", lambda name: "c++")
    compiler, lines = tg.compiler_for(wants, cpu)
    assert compiler(math.sqrt, dynamic=False) is not math.sqrt
    assert not lines
    assert "takes longer than it saves" in tg.compiler_for(nano, cpu)[1][0]


@pytest.mark.parametrize(
    ("fp8", "tma", "kept", "said"),
    [
        ("", "", ("head", "mlp", "qkv"), []),
        ("", "no TMA", ("head", "qkv"), ["mlp: float32 instead of FP8 (no TMA)"]),
        ("none", "", (), [f"{name}: float32 instead of FP8 (none)" for name in ("head", "mlp", "qkv")]),
    ],
)
def test_fp8_falls_back_product_by_product(monkeypatch, nano, corpus_dir, fp8, tma, kept, said):
    monkeypatch.setitem(tg.RECIPES, "tiny", dataclasses.replace(nano, fp8=("head", "mlp", "qkv")))
    monkeypatch.setattr(tg.kernels, "fp8_available", lambda device: (not fp8, fp8))
    monkeypatch.setattr(tg.kernels, "tma_problem", lambda device: tma)
    ranks = tg.Ranks(0, 1, torch.device("cpu"))
    args = tg.parse(["--recipe", "tiny", "--data", str(corpus_dir)])
    cfg, lines = tg.configure(args, ranks, tg.Corpus.open(corpus_dir))
    assert cfg.fp8 == kept
    assert [line for line in lines if "FP8" in line] == said
