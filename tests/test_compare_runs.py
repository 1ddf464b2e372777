"""compare_runs.py: published tables to the last digit, every log format, and every input it must refuse."""

import gzip
import hashlib
import json
import lzma
import math
import os
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import pytest
import zstandard

import compare_runs as cr

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "compare_runs.py"
PUBLISHED = ROOT.parent / "shared" / "logs"
RULE = "=" * 100
published = pytest.mark.skipif(
    not PUBLISHED.is_dir(), reason="the published run logs are not beside the checkout"
)


def our_log(
    loss: float = 3.27,
    ms: int = 1000,
    seed: int = 1,
    status: str | None = "done",
    source: str = "print('hi')\nlr = 1\n",
    total: int = 30,
    every: int = 10,
    stop: int | None = None,
    **meta: str,
) -> str:
    """A log in our own format; `stop` ends it after that step, `meta` replaces header lines (None drops)."""
    digest = hashlib.sha256(source.encode()).hexdigest()
    facts = {
        "run_id": f"run-{loss}-{ms}-{seed}",
        "host": "node1",
        "gpu 0": "NVIDIA H100 80GB HBM3 GPU-1111",
        "driver": "550.1",
        "commit": "abc",
        "dirty": "false",
        "data": "sha256=" + "d" * 64,
        "recipe": "tiny",
        "seed": str(seed),
        "world_size": "1",
        "target": "3.28",
        "command": "train_gpt.py",
        "started": f"2026-02-01T10:{seed % 60:02d}:00",
    } | {key.replace("_0", " 0"): value for key, value in meta.items()}
    lines = [
        f"#### source train_gpt.py sha256={digest} lines={source.count(chr(10))}",
        source.rstrip("\n"),
        RULE,
    ]
    lines += ["Running Python 3.11.9", "Running PyTorch 2.9.0 compiled for CUDA 12.6"]
    lines += ["Running Triton version 3.5.0", *(f"{k}: {v}" for k, v in facts.items() if v is not None), RULE]
    for step in range(0, (total if stop is None else stop) + 1):
        at = ms * step // total
        if step:
            lines.append(
                f"step:{step}/{total} train_loss:5.0000 train_time:{at}ms step_avg:{at / step:.2f}ms"
            )
        if step % every == 0 or step == total:
            value = loss + 0.1 * (total - step)
            avg = at / max(step, 1)
            speed = f"train_time:{at}ms step_avg:{avg:.2f}ms"
            lines.append(f"step:{step}/{total} val_loss:{value:.4f} {speed} val_bpb:{value / 3:.4f}")
    lines.append("peak memory allocated: 123 MiB reserved: 456 MiB")
    if status:
        lines.append(f"status: {status}")
    return "\n".join(lines) + "\n"


def write_arm(folder: Path, losses: list[float], times: list[int], **options) -> Path:
    """A folder of complete runs, one for each loss and time in ms."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, (loss, ms) in enumerate(zip(losses, times, strict=True)):
        (folder / f"run{i}.txt").write_text(our_log(loss, ms, seed=i, **options))
    return folder


@pytest.fixture
def arms(tmp_path: Path) -> tuple[Path, Path]:
    """Two sound arms."""
    base = write_arm(tmp_path / "base", [3.271, 3.273, 3.275, 3.274], [1000, 1010, 1020, 1006])
    new = write_arm(tmp_path / "new", [3.272, 3.270, 3.276], [900, 905, 913], source="x = 2\n")
    return base, new


def run_script(*args: object) -> subprocess.CompletedProcess:
    """compare_runs.py as a user starts it."""
    command = [sys.executable, str(SCRIPT), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def parse_one(text: str | bytes) -> cr.Run:
    """The only run of a log."""
    data = text if isinstance(text, bytes) else text.encode()
    (run,) = cr.parse_log(data, "log.txt", "log.txt")
    return run


def community_log(rows: list[str], source: str = "code = 1") -> str:
    """A log of the speedrun: source, rule, versions, rule, rows."""
    versions = ["Running Python 3.12.1 (main)", "Running PyTorch 2.10 compiled for CUDA 12.6"]
    return "\n".join([source, RULE, *versions, RULE, *rows]) + "\n"


def test_a_missing_package_is_one_line(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "scipy.special", None)
    for i in range(3):
        (tmp_path / f"{i}.txt").write_text(our_log(3.27 + i / 1000, 1000 + i, seed=i, run_id=str(i)))
    assert cr.main([str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "package scipy.special is not installed; pip install -r requirements.txt" in error
    assert error.count("\n") == 1


# statistics -------------------------------------------------------------------------------------------------


def test_mean_and_sample_sd_by_hand():
    """1, 2, 3, 4: mean 2.5, sum of squares 5, over n - 1 = 3."""
    assert cr.mean([1, 2, 3, 4]) == 2.5
    assert cr.sample_sd([1, 2, 3, 4]) == math.sqrt(5 / 3)
    assert cr.sample_sd([0.1] * 7) == 0  # though seven times 0.1, divided by seven, may round away from 0.1


def test_one_sample_by_hand():
    """n = 3 with t = -2 and 2 degrees of freedom: P = 1/2 - 2 / (2 sqrt(2 + 4)) by the closed form."""
    values, sd = [1.0, 2.0, 3.0], 1.0
    target = 2.0 + 2 * sd / math.sqrt(3)
    assert cr.one_sample_less(values, target) == pytest.approx(0.5 - 2 / (2 * math.sqrt(6)), rel=1e-12)


def test_welch_by_hand():
    """Equal n and variance: t = -1 / sqrt(2/3 * 1), df = 4; the closed form of df = 4 gives P."""
    t, df = cr.welch([1, 2, 3], [2, 3, 4])
    assert t == pytest.approx(-1 / math.sqrt(2 / 3), rel=1e-12)
    assert df == pytest.approx(4, rel=1e-12)
    x = t / math.sqrt(t * t + 4)
    assert cr.welch_less([1, 2, 3], [2, 3, 4]) == pytest.approx(0.5 + x * (3 - x * x) / 4, rel=1e-12)


def test_against_scipy_stats():
    """The tests are scipy's, without the price of importing it."""
    from scipy import stats

    a, b = [104.6, 104.4, 104.2, 104.5], [105.3, 105.5, 105.4, 105.5, 105.61]
    less = stats.ttest_ind(a, b, equal_var=False, alternative="less").pvalue
    assert cr.welch_less(a, b) == pytest.approx(less, rel=1e-9)
    assert cr.welch_two_sided(a, b) == pytest.approx(stats.ttest_ind(a, b, equal_var=False).pvalue, rel=1e-9)
    assert cr.one_sample_less(a, 105) == pytest.approx(
        stats.ttest_1samp(a, 105, alternative="less").pvalue, rel=1e-9
    )


@pytest.mark.parametrize("test", [lambda: cr.one_sample_less([1, 1], 2), lambda: cr.welch([1, 1], [2, 2])])
def test_zero_variance_is_an_error(test):
    """No p-value comes out of values without variance."""
    with pytest.raises(ValueError, match="zero variance"):
        test()


# published figures ------------------------------------------------------------------------------------------


@published
def test_published_table_of_record_61(capsys):
    """The table of the record's own README, digit for digit and space for space."""
    folder = PUBLISHED / "2026-01-18_UnifiedOptimizers"
    assert cr.main([str(folder / "baseline"), str(folder / "unified-optimizer")]) == 0
    out = capsys.readouterr().out
    assert out.startswith(
        "                   Runs   Time \u03bc  Time \u03c3  Time +/-  Time p"
        "  Loss \u03bc  Loss \u03c3  Loss +/-      p\n"
        "baseline              8 105.5361  0.0923    0.0000     NaN  3.2783  0.0008    0.0000 0.0003\n"
        "unified-optimizer     8 104.4579  0.1430   -1.0782  0.0000  3.2782  0.0015   -0.0001 0.0060\n"
    )
    assert "p = 2.607e-10" in out
    assert "Welch's t-test, one-sided (less)" in out
    assert "3.28, the default" in out


@published
def test_published_alternation(capsys):
    """Two arms in one folder, by glob and by source hash."""
    folder = PUBLISHED / "2025-09-05_SkipMLPBlocks"
    assert cr.main([f"{folder}/comparison_*", f"{folder}@c09cf162"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:3]]
    assert rows[0][1:] == [
        "10",
        "164.4524",
        "0.2071",
        "0.0000",
        "NaN",
        "3.2770",
        "0.0012",
        "0.0000",
        "0.0000",
    ]
    assert rows[1][1:5] == ["10", "163.0351", "0.1934", "-1.4173"]
    assert rows[1][6] == "3.2778"


@published
def test_published_welch_of_alternation(tmp_path):
    """Full precision goes to the JSON."""
    folder = PUBLISHED / "2025-09-05_SkipMLPBlocks"
    assert (
        cr.main([f"{folder}/comparison_*", f"{folder}/????????-*", "--json", str(tmp_path / "o.json")]) == 0
    )
    arms = json.loads((tmp_path / "o.json").read_text())["arms"]
    assert arms[1]["row"]["time_p"] == pytest.approx(2.85e-12, rel=2e-3)
    assert [round(arm["row"]["loss_mean"], 5) for arm in arms] == [3.27700, 3.27780]


@published
def test_published_mixed_folder_is_refused_by_name():
    """9 + 1 + 1 logs: the groups, their files, and an argument that selects the first."""
    result = run_script(PUBLISHED / "2025-11-29_BatchSizeSchedule")
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert "9 + 1 + 1" in result.stderr
    assert "2025-11-29_BatchSizeSchedule@4f6a005c" in result.stderr
    assert "val_every_five_after.txt" in result.stdout
    assert "validated every 5 steps" in result.stdout


@published
def test_published_selection_of_eight_names_what_it_leaves_out(capsys):
    """The published n = 8 leaves one of nine equal runs out; the report says which."""
    assert cr.main([str(PUBLISHED / "2025-11-29_BatchSizeSchedule" / "?[!e]*-*.txt")]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[1].split()[1:4] == ["8", "132.2144", "0.0431"]
    assert "3 log(s) in the same folders are in no arm: 3e3c0f33" in out


@published
def test_published_truncated_log_is_named_and_not_counted(capsys):
    """One of eight logs lacks its last validation."""
    assert cr.main([str(PUBLISHED / "2026-01-30_MimeticValueOutput")]) == 0
    out = capsys.readouterr().out
    assert "8 attempts, 7 complete" in out
    assert "6037e443-df16-4eeb-ba71-282b5f7096d0.txt incomplete: stops at step 1555 of 1555 before" in out


@published
@pytest.mark.parametrize(
    ("name", "parsed"),
    [
        ("2024-10-13_llmc", "step 19560/19560  loss 3.2722     no time"),
        ("2024-10-14_ModernArch", "step 5100/5100  loss 3.2741   910.546 s"),
        ("golf_NaiveBaseline", "step 13780/20000  loss 2.0727 bpb 1.2244   600.038 s"),
    ],
)
def test_published_single_runs_are_read_and_refused(name, parsed):
    """Old formats and the 16 MB contest parse; one run is not a comparison."""
    result = run_script(PUBLISHED / name)
    assert result.returncode == 2
    assert parsed in result.stdout
    assert "1 complete run(s) of 1" in result.stderr


@published
def test_published_old_log_keeps_its_source_hash():
    """A log that opens with a rule has its source between the first two."""
    (path,) = (PUBLISHED / "2024-10-14_ModernArch").glob("*.txt")
    run = parse_one(path.read_bytes())
    assert run.source not in (None, hashlib.sha256(b"").hexdigest())
    assert run.head["torch"] == "2.4.1+cu121"
    assert run.head["started"] == "2024-10-14T05:01:30"
    assert run.hardware == "8 x NVIDIA H100 80GB HBM3"
    assert run.train_lines == 5100


# formats ----------------------------------------------------------------------------------------------------


def test_our_format():
    """Everything that the header and the closing lines say."""
    run = parse_one(our_log(3.27, 1234, seed=7))
    assert (run.kind, run.status, run.reason) == ("splits", "complete", "")
    assert (run.loss, run.seconds, run.bpb, run.peak_mib) == (3.27, 1.234, 1.09, 123)
    assert (run.steps_done, run.steps_planned, run.interval) == (30, 30, "every 10 steps")
    assert run.head["seed"] == 7
    assert run.head["world_size"] == 1
    assert run.head["target"] == 3.28
    assert run.head["gpus"] == ["NVIDIA H100 80GB HBM3"]
    assert run.head["uuids"] == "GPU-1111"
    assert [p.step for p in run.val] == [0, 10, 20, 30]
    assert run.train_lines == 30
    assert run.sources == {"train_gpt.py": hashlib.sha256(b"print('hi')\nlr = 1\n").hexdigest()}


def test_our_format_on_a_cpu():
    """No GPU line: the hardware is the CPU's name and the number of ranks."""
    run = parse_one(our_log(gpu_0=None, driver=None, cpu="x86_64, 2 cores", world_size="2"))
    assert run.complete
    assert run.hardware == "2 x CPU x86_64, 2 cores"


@pytest.mark.parametrize(
    ("options", "status", "reason"),
    [
        ({"status": None}, "incomplete", "has no closing status line"),
        ({"status": None, "stop": 17}, "incomplete", "stops at step 17 of 30"),
        ({"status": "diverged at step 12: loss is nan", "stop": 12}, "diverged", "at step 12: loss is nan"),
        ({"status": "interrupted at step 9: SIGTERM", "stop": 9}, "interrupted", "at step 9: SIGTERM"),
        ({"status": "crashed at step 3: CUDA error", "stop": 3}, "crashed", "at step 3: CUDA error"),
        ({"status": "crashed: no memory", "stop": -1}, "crashed", "no memory"),
        ({"status": "done", "stop": 20}, "contradictory", "says 'status: done' but stops at step 20 of 30"),
        ({"status": "don"}, "incomplete", "has no closing status line"),
        ({"resumed": "ckpt.pt"}, "incomplete", "was resumed, so this log does not hold the whole run"),
    ],
)
def test_our_statuses(options, status, reason):
    """Only `done` with the last planned validation is complete."""
    run = parse_one(our_log(**options))
    assert (run.status, run.reason) == (status, reason)


def test_forged_source_is_a_contradiction():
    """The embedded text must have the hash that its header claims."""
    run = parse_one(our_log().replace("lr = 1", "lr = 2"))
    assert run.status == "contradictory"
    assert "train_gpt.py" in run.reason


def test_source_lines_are_not_results():
    """A source may hold sample log lines; only what follows it counts."""
    sample = "'''\nstep:30/30 val_loss:1.0000 train_time:1ms step_avg:1ms\nstatus: done\n'''\n"
    assert parse_one(our_log(source=sample)).loss == 3.27
    rows = ["step:5/5 val_loss:3.3000 train_time:900ms step_avg:180.00ms"]
    run = parse_one(community_log(rows, source=sample + 'print(f"step:{step}/{n} val_loss:{x}")'))
    assert (run.loss, run.seconds, run.head["torch"]) == (3.3, 0.9, "2.10")


def test_seconds_milliseconds_nan_and_suffixes():
    """Track 3 counts seconds with five decimals and adds keys; step 0 has no average yet."""
    rows = [
        "step:0/3350 val_loss:10.82580 train_time:0.000s step_avg:nanms",
        "step:3350/3350 val_loss:3.27839 train_time:492.485s step_avg:147.03ms ema:3.27 lr:0.01",
    ]
    run = parse_one(community_log(rows))
    assert (run.status, run.loss, run.seconds) == ("complete", 3.27839, 492.485)


def test_several_trials_in_one_file():
    """A step that goes back starts the next trial; an unfinished one is named by its number."""
    line = "step:{}/20 val_loss:{:.5f} train_time:{:.3f}s step_avg:1.00ms"
    rows = [line.format(step, 9 - step / 4, step / 10) for step in (0, 10, 20)]
    runs = cr.parse_log(community_log(rows + rows[:2] + rows).encode(), "t.txt", "t.txt")
    assert [run.name for run in runs] == ["t.txt#1", "t.txt#2", "t.txt#3"]
    assert [run.status for run in runs] == ["complete", "incomplete", "complete"]


def test_late_training_lines_are_not_another_trial():
    """A training loss that arrives after the next validation belongs to the same run."""
    lines = our_log().split("\n")
    late = next(i for i, line in enumerate(lines) if line.startswith("step:10/30 train_loss"))
    lines[late], lines[late + 1] = lines[late + 1], lines[late]
    lines.insert(late + 3, lines.pop(late - 1))
    assert parse_one("\n".join(lines)).complete


def test_llmc_lines():
    """No total and no clock: complete if a validation is the last thing logged."""
    rows = ["s:0 tel:11.0", "s:0 trl:11.0 lr:0.1", "s:1 trl:10.0 lr:0.1", "s:2 tel:9.5"]
    run = parse_one("\n".join(rows) + "\n")
    assert (run.kind, run.status, run.loss, run.seconds, run.steps_planned) == (
        "llm.c",
        "complete",
        9.5,
        None,
        2,
    )
    assert parse_one("\n".join([*rows, "s:2 trl:9.4 lr:0.1"]) + "\n").status == "incomplete"


def test_contest_log_uses_the_loss_after_quantisation():
    """The wall clock may end a contest run; without its final_ line it does not count."""
    rows = [
        "step:0/99 val_loss:6.9000 val_bpb:4.0900 train_time:0ms",
        "step:50/99 val_loss:2.0600 val_bpb:1.2172 train_time:600038ms step_avg:43.54ms",
        "stopping_early: wallclock_cap train_time:600038ms step:50/99",
    ]
    final = ["final_q val_loss:2.0727 val_bpb:1.2244", "final_q_exact val_loss:2.07269931 val_bpb:1.22436570"]
    run = parse_one(community_log(rows + final))
    assert (run.kind, run.status, run.loss, run.bpb) == ("contest", "complete", 2.07269931, 1.22436570)
    assert parse_one(community_log(rows)).status == "incomplete"
    assert parse_one(community_log([*rows, "final_q val_loss:2.0 val_bpb:nan"])).status == "diverged"


@pytest.mark.parametrize("cut", range(1, 46, 4))
def test_log_cut_in_mid_line_is_never_a_shorter_number(cut):
    """A log that ends inside its last validation line does not yield a loss with fewer digits."""
    rows = [
        f"step:{s}/20 val_loss:{x} train_time:{s}0ms step_avg:1.50ms" for s, x in ((0, 9.1234), (20, 3.2784))
    ]
    text = community_log(rows)
    assert parse_one(text.rstrip("\n")).complete
    run = parse_one(text[: -1 - cut])
    assert run.status == "incomplete"
    assert run.loss != 3.2


@pytest.mark.parametrize(
    ("row", "status"),
    [
        ("step:20/20 val_loss:nan train_time:30ms step_avg:1ms", "diverged"),
        ("step:20/20 val_loss:inf train_time:30ms step_avg:1ms", "diverged"),
        ("step:20/20 val_loss:3.2 train_time:nanms step_avg:1ms", "incomplete"),
        ("step:20/20 val_loss:3.2 train_time:5ms step_avg:1ms", "contradictory"),
        ("step:20/21 val_loss:3.2 train_time:30ms step_avg:1ms", "contradictory"),
        ("step:20/20 val_loss:1e200 train_time:30ms step_avg:1ms", "diverged"),
        ("step:20/20 val_loss:-1e200 train_time:30ms step_avg:1ms", "diverged"),
        (f"step:20/20 val_loss:3.2 train_time:{'9' * 160}ms step_avg:1ms", "incomplete"),
        ("step:20/20 val_loss:3.2 train_time:30ms val_bpb:nan", "contradictory"),
        ("step:20/20 val_loss:3.2 train_time:30ms val_bpb:1e200", "contradictory"),
        ("step:20/0 val_loss:3.2 train_time:30ms step_avg:1ms", "contradictory"),
        ("step:20/0 train_loss:3.2 train_time:30ms step_avg:1ms", "contradictory"),
        ("step:20/20 val_loss:three train_time:30ms step_avg:1ms", "contradictory"),
        ("step:10/20 val_loss:3.2 train_time:30ms step_avg:1ms", "contradictory"),
    ],
)
def test_lines_that_cannot_count(row, status):
    """Non-finite, backward, or disagreeing lines."""
    rows = ["step:0/20 val_loss:9.1 train_time:0ms step_avg:nanms"]
    rows.append("step:10/20 val_loss:4.1 train_time:20ms step_avg:2ms")
    assert parse_one(community_log([*rows, row])).status == status


def test_parsing_is_fast():
    """40 logs of 4,000 lines in well under a second on an idle core; the bound leaves room for a busy one."""
    rows = [f"step:{s}/4000 train_time:{s}0ms step_avg:59.50ms" for s in range(1, 4001)]
    data = community_log(
        [*rows, "step:4000/4000 val_loss:3.2784 train_time:40001ms step_avg:10.00ms"]
    ).encode()
    began = time.process_time()
    for _ in range(40):
        cr.parse_log(data, "a.txt", "a.txt")
    assert time.process_time() - began < 2


# arms and reports -------------------------------------------------------------------------------------------


def test_compressed_logs_and_target_of_the_logs(tmp_path, capsys):
    """.gz, .xz and .zst count like .txt; the target comes from the logs."""
    arm = write_arm(tmp_path / "arm", [3.0, 3.1], [10, 11], target="3.33")
    halves = [
        our_log(3.15, 14, seed=10, target="3.33").encode()[part] for part in (slice(99), slice(99, None))
    ]
    (arm / "e.txt.zst").write_bytes(b"".join(map(zstandard.ZstdCompressor().compress, halves)))
    (arm / "c.txt.gz").write_bytes(gzip.compress(our_log(3.2, 12, seed=8, target="3.33").encode()))
    (arm / "d.log.xz").write_bytes(lzma.compress(our_log(3.3, 13, seed=9, target="3.33").encode()))
    (arm / "run0.json").write_text("{}")
    assert cr.main([str(arm)]) == 0
    out = capsys.readouterr().out
    assert "5 attempts, 5 complete" in out
    assert "Target: 3.33, the 'target:' line of the logs of arm." in out
    assert "Time p" not in out


def test_given_target_wins(arms, capsys):
    """--target replaces the one in the logs."""
    assert cr.main([*map(str, arms), "--target", "3.5"]) == 0
    assert "Target: 3.5, --target." in capsys.readouterr().out


def test_failed_runs_are_named_and_not_averaged(arms, capsys):
    """Attempts count every launched run, the mean only complete ones."""
    base, new = arms
    (new / "d.txt").write_text(
        our_log(1.0, 1, seed=30, status="diverged at step 12: nan", stop=12, source="x = 2\n")
    )
    (new / "e.txt").write_text("")
    (new / "notes.txt").write_text("hello\n")
    assert cr.main([str(base), str(new)]) == 0
    out = capsys.readouterr().out
    assert "new: 5 attempts, 3 complete" in out
    assert "new: d.txt diverged: at step 12: nan" in out
    assert "new: e.txt incomplete: is empty" in out
    assert "new: notes.txt not a log: no step line" in out
    assert out.splitlines()[2].split()[1] == "3"


def test_bpb_columns_follow_the_community_columns(arms, capsys):
    """Our logs have bits per byte; the community's columns keep their place."""
    assert cr.main([*map(str, arms)]) == 0
    header = capsys.readouterr().out.splitlines()[0]
    assert header.split()[-6:] == ["bpb", "\u03bc", "bpb", "\u03c3", "bpb", "+/-"]


def test_equal_folder_names_become_distinct(tmp_path, capsys):
    """x/logs and y/logs are told apart by their parents."""
    one = write_arm(tmp_path / "x" / "logs", [3.1, 3.2], [10, 11])
    two = write_arm(tmp_path / "y" / "logs", [3.3, 3.4], [12, 13])
    assert cr.main([str(one), str(two)]) == 0
    out = capsys.readouterr().out
    assert "\nx/logs " in out
    assert "\ny/logs " in out


def test_warnings_that_weaken(tmp_path, capsys):
    """Another host, the same seed twice, uncommitted changes, the same source in both arms, blocked order."""
    base = write_arm(tmp_path / "base", [3.1, 3.2], [10, 11])
    new = write_arm(tmp_path / "new", [3.3, 3.4], [12, 13], host="node2", dirty="true")
    for i, path in enumerate(sorted(new.iterdir())):
        text = path.read_text().replace(f"seed: {i}", "seed: 5").replace("2026-02-01", "2026-02-02")
        path.write_text(text)
    assert cr.main([str(base), str(new)]) == 0
    out = capsys.readouterr().out
    assert "host differs between runs: node1 (base 2), node2 (new 2)" in out
    assert "same-seed repeats are not independent losses: seed 5 (2 runs)" in out
    assert "uncommitted changes in run0.txt, run1.txt" in out
    assert "(A/A)" in out
    assert "not interleaved" in out


def test_json_holds_every_number(arms, tmp_path):
    """Numbers at full precision, every run, the names of the tests, the schema."""
    (arms[1] / "z.txt").write_text(our_log(status=None, stop=11, source="x = 2\n", seed=40))
    path = tmp_path / "out.json"
    assert cr.main([*map(str, arms), "--json", str(path)]) == 0
    report = json.loads(path.read_text())
    assert report["schema"] == cr.SCHEMA
    assert report["target"] == 3.28
    base, new = report["arms"]
    assert (new["attempts"], new["complete"]) == (4, 3)
    assert new["times"] == [0.9, 0.905, 0.913]
    assert new["row"]["time_diff"] == cr.mean([0.9, 0.905, 0.913]) - cr.mean(base["times"])
    assert new["row"]["time_p"] == cr.welch_less(new["times"], base["times"])
    assert [run["counted"] for run in new["runs"]] == [True, True, True, False]
    assert new["runs"][3]["reason"] == "stops at step 11 of 30"
    assert base["runs"][0]["val"][-1] == [30, 3.271, 1.0]
    assert "Welch" in report["tests"]["time_p"]
    assert list(tmp_path.glob(".*")) == []


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_plot_is_drawn(arms, tmp_path, suffix):
    """The file is there, of its kind, and not empty."""
    path = tmp_path / f"plot.{suffix}"
    assert cr.main([*map(str, arms), "--plot", str(path)]) == 0
    data = path.read_bytes()
    assert data.startswith({"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}[suffix])
    assert len(data) > 5000


# refusals ---------------------------------------------------------------------------------------------------


def refused(capsys, *args: object) -> str:
    """The one line on stderr of a refused call."""
    assert cr.main([*map(str, args)]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1, captured.err
    assert captured.err.startswith("compare_runs.py: ")
    return captured.err


MIXES = {
    "source": {"source": "other = 1\n"},
    "total of steps": {"total": 40},
    "validation interval": {"every": 5},
    "hardware": {"world_size": "2"},
    "recipe": {"recipe": "short"},
    "settings": {"attention": "sdpa"},
    "data": {"data": "sha256=" + "e" * 64},
    "target": {"target": "3.38"},
}


@pytest.mark.parametrize("trait", MIXES)
def test_mixed_arm_is_refused(arms, capsys, trait):
    """Runs of an arm are repeats of one experiment."""
    base, _ = arms
    (base / "x.txt").write_text(our_log(3.29, 1015, seed=20, **MIXES[trait]))
    error = refused(capsys, base)
    assert f"4 + 1 runs that differ in {trait}" in error


@pytest.mark.parametrize("trait", ["hardware", "recipe", "data", "target", "validation interval"])
def test_arms_that_cannot_be_compared_are_refused(tmp_path, capsys, trait):
    """Both arms share what is measured and where."""
    base = write_arm(tmp_path / "base", [3.1, 3.2], [10, 11])
    new = write_arm(tmp_path / "new", [3.3, 3.4], [12, 13], **MIXES[trait])
    assert f"base and new differ in {trait}" in refused(capsys, base, new)


def test_mixed_target_is_no_matter_if_one_is_given(tmp_path):
    """--target makes the targets of the logs irrelevant."""
    base = write_arm(tmp_path / "base", [3.1, 3.2], [10, 11])
    new = write_arm(tmp_path / "new", [3.3, 3.4], [12, 13], target="3.38")
    assert cr.main([str(base), str(new), "--target", "3.3"]) == 0


def test_incomplete_run_joins_the_group_it_fits(arms):
    """A truncated log says less; it is listed with the runs that it does not contradict."""
    base, _ = arms
    (base / "x.txt").write_text(our_log(3.29, 1015, seed=20, **MIXES["source"]))
    (base / "y.txt").write_text(our_log(3.28, 1016, seed=21, status=None, stop=15, **MIXES["source"]))
    result = run_script(base)
    assert result.returncode == 2
    assert "4 + 2 runs that differ in source cannot be one arm" in result.stderr
    assert result.stdout.index("group 2") < result.stdout.index("y.txt")


def test_remedy_of_a_mixed_arm_works(arms, capsys):
    """The argument that the refusal names selects the group."""
    base, _ = arms
    (base / "x.txt").write_text(our_log(3.29, 1015, seed=20, **MIXES["source"]))
    remedy = refused(capsys, base).split("such as '")[1].split("'")[0]
    assert cr.main([remedy]) == 0
    assert "1 log(s) in the same folders are in no arm: x.txt" in capsys.readouterr().out


def test_duplicates_are_refused(arms, capsys):
    """The same bytes, the same run_id, the same measurements, or one run in two arms."""
    base, new = arms
    copy = base / "copy.txt.gz"
    text = (base / "run0.txt").read_text()
    copy.write_bytes(gzip.compress(text.encode()))
    assert "the same content" in refused(capsys, base)
    copy.write_bytes(gzip.compress(text.replace("val_loss:3.2710", "val_loss:3.2711").encode()))
    assert "the same run_id" in refused(capsys, base)
    copy.write_bytes(gzip.compress(text.replace("run_id: ", "run_id: x").encode()))
    assert "the same losses and times" in refused(capsys, base)
    copy.unlink()
    assert "base (1) and base (2): run0.txt and run0.txt" in refused(capsys, base, base)
    assert cr.main([str(base), str(new)]) == 0


def pack_zst(data: bytes, stated: bool) -> bytes:
    """One frame; `stated`: with its size in the header, as the command line tool does for files."""
    if stated:
        return zstandard.ZstdCompressor().compress(data)
    stream = zstandard.ZstdCompressor().compressobj()
    return stream.compress(data) + stream.flush()


@pytest.mark.parametrize("stated", [True, False])
def test_packings_of_zst(tmp_path, stated):
    """Frames with and without their size, empty ones, ones above a read's size: all bytes come back."""
    noise = hashlib.shake_256(b"0").hexdigest(50_000).encode()
    path = tmp_path / "a.log.zst"
    path.write_bytes(b"".join(pack_zst(part, stated) for part in (noise, b"", b"x" * 300_000, b"end\n")))
    assert cr.read_log(str(path)) == noise + b"x" * 300_000 + b"end\n"


@pytest.mark.parametrize("packing", ["", ".gz", ".xz", ".zst"])
def test_a_log_has_a_largest_size(tmp_path, capsys, monkeypatch, packing):
    """What unpacks beyond the limit is refused in one line; a log of exactly the limit is read."""
    text = our_log() + our_log(seed=2)
    monkeypatch.setattr(cr, "MOST_BYTES", 1 << 20)
    full = text.encode() + b"\n" * ((1 << 20) - len(text))
    pack = {
        "": bytes,
        ".gz": gzip.compress,
        ".xz": lzma.compress,
        ".zst": zstandard.ZstdCompressor().compress,
    }
    path = tmp_path / f"a.txt{packing}"
    path.write_bytes(pack[packing](full))
    assert cr.read_log(str(path)) == full
    path.write_bytes(pack[packing](full + b"\n"))
    assert "over 1 MiB unpacked, so no log; leave it out by glob" in refused(capsys, path)


@pytest.mark.parametrize("packing", ["gz", "xz", "zst"])
def test_a_small_file_cannot_fill_the_memory(tmp_path, packing):
    """8 GiB of zeros in a small file are refused before they are unpacked."""
    unit = b"\0" * (1 << 24)
    pack = {"gz": gzip.compress, "xz": lzma.compress, "zst": zstandard.ZstdCompressor().compress}[packing]
    path = tmp_path / f"a.txt.{packing}"
    path.write_bytes(pack(unit) * 512)
    tracemalloc.start()
    try:
        with pytest.raises(cr.InputError, match="over 128 MiB unpacked"):
            cr.read_log(str(path))
        assert tracemalloc.get_traced_memory()[1] < 1 << 30
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "holds no logs"),
        ({"a.json": "{}"}, "holds no logs"),
        ({"a.txt": "hello\n"}, "no run log among 1 file(s): a.txt"),
        ({"a.txt": b"\x00\x01step:1/1 val_loss:3"}, "binary, not a text log"),
        ({"a.txt.gz": b"not gzip"}, "cannot be read"),
        ({"a.txt.gz": gzip.compress(b"step:1/1 val_loss:3" * 99)[:-9]}, "cannot be read"),
        ({"a.txt.xz": b"\xfd7zXZ broken"}, "cannot be read"),
        ({"a.txt.zst": b"not zst"}, "cannot be read"),
        ({"a.txt.zst": zstandard.ZstdCompressor().compress(b"step:1/1 val_loss:3" * 99)[:-9]}, "of a frame"),
        ({"a.txt": our_log()}, "1 complete run(s) of 1"),
        (
            {"a.txt": our_log(), "b.txt": our_log(3.1, seed=2)[:-20]},
            "1 complete run(s) of 2 (b.txt incomplete: has no closing status line)",
        ),
        ({"a.txt": our_log(3.1), "b.txt": our_log(3.1, 990, seed=2)}, "all 2 losses are 3.1: no variance"),
        (
            {"a.txt": our_log(float("nan"))},
            "0 complete run(s) of 1 (a.txt diverged: non-finite loss at step 0)",
        ),
        (
            {"a.txt": our_log() + "status: crashed at step 3: x\n"},
            "a.txt contradicts itself: has several status lines",
        ),
        (
            {"a.txt": community_log([f"step:5/5 val_loss:3.{i} train_time:9ms" for i in (2, 3)])},
            "two different validation lines at step 5",
        ),
    ],
)
def test_bad_folders(tmp_path, capsys, files, message):
    """One line that names the file and the rule; exit code 2."""
    folder = tmp_path / "arm"
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert message in refused(capsys, folder)


def test_zero_variance_of_times(tmp_path, capsys):
    """Two arms whose times never vary have no Welch test."""
    base = write_arm(tmp_path / "base", [3.1, 3.2], [10, 10])
    new = write_arm(tmp_path / "new", [3.3, 3.4], [12, 12])
    assert "no variance in the times" in refused(capsys, base, new)


def test_dangling_link_and_pipe(tmp_path, capsys):
    """What is not a readable file is refused, not waited for."""
    import os

    (tmp_path / "a.txt").symlink_to(tmp_path / "gone")
    assert "cannot be read" in refused(capsys, tmp_path)
    (tmp_path / "a.txt").unlink()
    os.mkfifo(tmp_path / "b.txt")
    assert "not a regular file" in refused(capsys, tmp_path)


def test_links_and_pipes_are_not_replaced_by_output(arms, tmp_path, capsys):
    """For root the same rename would put a file in the place of /dev/null."""
    pipe, link = tmp_path / "pipe.svg", tmp_path / "link.svg"
    os.mkfifo(pipe)
    link.symlink_to("/dev/null")
    for path in (pipe, link):
        for option in ("--json", "--plot"):
            assert cr.main([*map(str, arms), option, str(path)]) == 2
            assert "or a link or a device, which is not replaced" in capsys.readouterr().err
    assert pipe.is_fifo()
    assert link.is_symlink()


def test_odd_file_names_stay_on_one_line(tmp_path, capsys):
    """A line feed or an escape in a name is shown as an escape."""
    (tmp_path / "a\n\x1b[31m.txt").write_text(our_log())
    error = refused(capsys, tmp_path)
    assert "\x1b" not in error


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "required: BASELINE; see compare_runs.py --help"),
        (["--frob"], "BASELINE"),
        (["no/such/folder"], "no such file or folder"),
        ([""], "empty name: no such file or folder"),
        (["no/such/*.txt"], "no such file or folder"),
        (["BASE", "--target", "low"], "must be a finite positive loss"),
        (["BASE", "--target", "nan"], "must be a finite positive loss"),
        (["BASE", "--target", "-1"], "must be a finite positive loss"),
        (["BASE@123456789"], "no log there has a source hash"),
        (["BASE", "--plot", "p.jpg"], "must end in one of .png, .svg, .pdf"),
        (["BASE", "--plot", "no/such/p.png"], "not a file in an existing folder"),
        (["BASE", "--json", "no/such/o.json"], "not a file in an existing folder"),
        (["BASE", "--json", "BASE/run0.txt"], "is one of the logs"),
    ],
)
def test_bad_command_lines(arms, args, message):
    """From a shell: exit code 2, one line on stderr, no traceback."""
    result = run_script(*(arg.replace("BASE", str(arms[0])) for arg in args))
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1, result.stderr
    assert message in result.stderr


# start-up ---------------------------------------------------------------------------------------------------


def test_help_imports_nothing_heavy():
    """--help answers at once and explains every column."""
    code = (
        "import sys, compare_runs as c\n"
        "try: c.main(['--help'])\n"
        "except SystemExit as e: assert not e.code\n"
        "heavy = {'numpy', 'scipy', 'pandas', 'matplotlib', 'torch'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stderr
    for word in ("Runs", "Time +/-", "Time p", "Loss +/-", "examples:", "exit codes:"):
        assert word in result.stdout


def test_runs_without_torch_pandas_matplotlib_and_scipy_stats(arms):
    """The table needs none of them."""
    code = (
        "import sys\n"
        "for name in ('torch', 'triton', 'pandas', 'matplotlib', 'scipy.stats'): sys.modules[name] = None\n"
        "import compare_runs\nsys.exit(compare_runs.main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, *map(str, arms)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert "Time p" in result.stdout


def test_closed_pipe_is_silent(arms):
    """`| head -1` leaves no traceback."""
    command = f"'{sys.executable}' '{SCRIPT}' '{arms[0]}' '{arms[1]}' | head -0"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert result.stderr == ""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_full_disk_is_one_line(arms):
    """Output that cannot be written is an error that says so."""
    with open("/dev/full", "w") as full:
        command = [sys.executable, str(SCRIPT), str(arms[0])]
        result = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    assert result.returncode == 2
    assert result.stderr.startswith("compare_runs.py: stdout: cannot be written")
    assert result.stderr.count("\n") == 1


def test_ascii_terminal(arms):
    """A terminal that cannot show Greek gets escapes, not a traceback."""
    command = [sys.executable, str(SCRIPT), *map(str, arms)]
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=60, env={"PYTHONIOENCODING": "ascii"}
    )
    assert result.returncode == 0, result.stderr
    assert "Time \\u03bc" in result.stdout
