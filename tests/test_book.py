"""The record book: what accept writes and refuses, and that verify finds and names every alteration."""

import hashlib
import json
import math
import os
import shutil
import socket
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import zstandard
from scipy import stats

import compare_runs as cr
from recordbook import book, evidence, pages
from tests import conftest
from tests.conftest import DAY, LOSSES, SOURCES, TIMES, write_series

ROOT = Path(__file__).resolve().parents[1]
FIRST, FASTER = f"{DAY}_first", f"{DAY}_faster"


def new_book(folder: Path) -> Path:
    """A book with track `tiny` and no record."""
    (folder / "tiny").mkdir(parents=True)
    shutil.copy(ROOT / "records" / "tiny" / "track.toml", folder / "tiny")
    return folder


def accept(records: Path, series: Path, name: str, claim: str = "systems") -> int:
    words = ["accept", str(series), "--track", "tiny", "--name", name, "--claim", claim]
    return cr.main([*words, "--records", str(records)])


def verify(records: Path, *words: str) -> int:
    return cr.main(["verify", "--records", str(records), *words])


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A book with a first record and one that is faster, and the series of both."""
    place = tmp_path_factory.mktemp("book")
    records = new_book(place / "records")
    for name, kind, claim in (("first", "series", "baseline"), ("faster", "ab", "systems")):
        series = write_series(place / "logs" / name, kind=kind)
        assert accept(records, series, name, claim) == 0
    return place


@pytest.fixture
def records(finished, tmp_path) -> Path:
    """A copy of that book."""
    return Path(shutil.copytree(finished / "records", tmp_path / "records"))


@pytest.fixture
def empty(tmp_path) -> Path:
    return new_book(tmp_path / "empty")


def remake_manifest(record: Path) -> None:
    """Hashes that fit the files, as a forger would write them."""
    lines = [f"{hashlib.sha256(data).hexdigest()}  {name}" for name, data in tree(record).items()]
    kept = [f"{line}\n" for line in lines if not line.endswith("  MANIFEST.sha256")]
    (record / "MANIFEST.sha256").write_text("".join(kept))


def arm_folder(record: Path, letter: str) -> Path:
    (found,) = (record / "logs").glob(f"{letter}-*")
    return found


def first_log(record: Path, letter: str = "B") -> Path:
    return arm_folder(record, letter) / "run-001.txt.zst"


def unpack(path: Path) -> bytes:
    return zstandard.ZstdDecompressor().decompress(path.read_bytes(), max_output_size=1 << 20)


def replace(path: Path, old: str, new: str, count: int = 1) -> None:
    """Change a text once; for a packed log, the text inside it."""
    packed = path.suffix == ".zst"
    text = (unpack(path) if packed else path.read_bytes()).decode()
    assert old in text, f"{old!r} is not in {path}"
    data = text.replace(old, new, count).encode()
    path.write_bytes(zstandard.ZstdCompressor().compress(data) if packed else data)


# what is written --------------------------------------------------------------------------------------------


def test_a_record_holds_the_evidence_byte_for_byte(finished):
    series, record = finished / "logs" / "faster", finished / "records" / "tiny" / FASTER
    for name in ("plan.json", "plan.json.sha256", "ledger.jsonl"):
        assert (record / name).read_bytes() == (series / name).read_bytes()
    logs = {name: data for name, data in tree(series).items() if name.endswith(".txt")}
    assert len(logs) == 12
    for name, data in logs.items():
        assert unpack(record / "logs" / f"{name}.zst") == data
    assert (record / "train_gpt.py").read_text() == SOURCES["B"]
    twins = [name for name in tree(series) if name.endswith("001.json")]
    assert len(twins) == 2
    assert all((record / "logs" / name).read_bytes() == b"{}\n" for name in twins)
    own = {"README.md", "result.json", "MANIFEST.sha256", "train_gpt.py"}
    assert len(tree(record)) == len(own) + 3 + 24


def test_the_manifest_is_sha256sums(finished):
    record = finished / "records" / "tiny" / FASTER
    for line in (record / "MANIFEST.sha256").read_text().splitlines():
        digest, name = line.split("  ")
        assert hashlib.sha256((record / name).read_bytes()).hexdigest() == digest
    assert "result.json" in (record / "MANIFEST.sha256").read_text()


def test_the_numbers_are_those_of_other_programs(finished):
    """Means and sds by the standard library, p and interval by scipy.stats."""
    record = book.read_record(finished / "records" / "tiny" / FASTER)
    new, old = TIMES["B"][:6], TIMES["A"][:6]
    found = record.own.stats
    assert found["time_mean"] == pytest.approx(statistics.mean(new), rel=1e-12)
    assert found["time_sd"] == pytest.approx(statistics.stdev(new), rel=1e-12)
    assert found["loss_mean"] == pytest.approx(statistics.mean(LOSSES[:6]), rel=1e-12)
    assert found["loss_p"] == pytest.approx(stats.ttest_1samp(LOSSES[:6], 4.15, alternative="less").pvalue)
    test = stats.ttest_rel(old, new)
    assert record.gain["amount"] == pytest.approx(statistics.mean(old) - statistics.mean(new))
    assert record.gain["p"] == pytest.approx(test.pvalue / 2)
    low, high = test.confidence_interval(record.gain["level"])
    assert (record.gain["low"], record.gain["high"]) == pytest.approx((low, high))
    text = (record.folder / "README.md").read_text()
    assert f"**Result: {statistics.mean(new):.4f} s** (sd {statistics.stdev(new):.4f}, n = 6)" in text
    assert f"by 0.1033 s (4.90%), 98% interval {low:.4f} to {high:.4f}" in text
    assert "pass: runs: 6 and 6 complete" in text


def test_a_result_has_what_a_page_needs(finished):
    first, faster = book.records_of("tiny", finished / "records")
    assert (first.name, first.claim, first.baseline, first.gain) == ("first", "baseline", None, None)
    assert (faster.name, faster.date, faster.claim) == ("faster", DAY, "systems")
    assert [arm.role for arm in faster.arms] == ["baseline", "candidate"]
    runs = faster.own.runs
    assert [run["seconds"] for run in runs] == list(TIMES["B"][:6])
    assert [run["seed"] for run in runs] == [1, 2, 3, 4, 5, 6]
    log = finished / "logs" / "faster" / runs[0]["log"]
    assert hashlib.sha256(log.read_bytes()).hexdigest() == runs[0]["sha256"]
    curves = faster.content["curves"]
    assert len(curves) == 12
    assert curves[6]["points"][-1] == [30, 2.0, 4.101]
    assert [point[0] for point in curves[6]["points"]] == [0, 10, 20, 30]
    assert faster.content["previous"]["record"] == FIRST
    assert faster.content["tests"]["time_paired"]["test"]["p"] == faster.gain["p"]


def test_the_track_has_a_table_and_a_plot(finished):
    folder = finished / "records" / "tiny"
    lines = [line for line in (folder / "README.md").read_text().splitlines() if line.startswith(f"| {DAY}")]
    assert ["[first]" in lines[0], "[faster]" in lines[1], len(lines)] == [True, True, 2]
    assert "| systems | 2.0050 | 0.0105 | 6 | 4.1015 | 0.0019 | 9.17e-09 | 0.1033 s (4.90%)" in lines[1]
    svg = (folder / "history.svg").read_bytes()
    _, rows = pages.plot_data(svg)
    assert [row["time_mean"] for row in rows] == pytest.approx([2.108333333, 2.005])
    import xml.etree.ElementTree as xml

    assert xml.fromstring(svg).tag.endswith("svg")
    assert b"<dc:date>" not in svg


def test_the_same_series_gives_the_same_bytes(finished, empty):
    for name, claim in (("first", "baseline"), ("faster", "systems")):
        assert accept(empty, finished / "logs" / name, name, claim) == 0
    assert tree(empty) == tree(finished / "records")


def test_a_first_record_claims_no_gain(finished, capsys):
    text = (finished / "records" / "tiny" / FIRST / "README.md").read_text()
    assert "no gain in time is claimed" in text
    assert "Faster than" not in text
    assert verify(finished / "records") == 0
    out = capsys.readouterr().out.splitlines()
    assert out == [f"tiny/{FIRST}: ok", f"tiny/{FASTER}: ok", "tiny: table and plot ok"]


def test_a_score_gains_in_its_metric(empty, series, capsys):
    """The logs' val_bpb is a third of their loss: 0.02 lower is 0.0067 bits a byte; the times are equal."""
    rules, score = empty / "tiny" / "track.toml", 'claims = ["score"]\ngain = 0.003\ngain_unit = "bits/byte"'
    replace(rules, 'metric = "val_loss"', 'metric = "val_bpb"')
    replace(rules, 'claims = ["systems", "ml"]', score)
    made = series(times={"B": TIMES["A"]}, losses={"B": [x - 0.02 for x in LOSSES]})
    assert accept(empty, made, "better", "score") == 0
    record = book.read_record(empty / "tiny" / f"{DAY}_better")
    assert (record.claim, record.gain["of"]) == ("score", "val_bpb")
    old, new = ([round((x - by) / 3, 4) for x in LOSSES[:6]] for by in (0, 0.02))
    assert record.gain["amount"] == pytest.approx(statistics.mean(old) - statistics.mean(new))
    test = stats.ttest_ind(old, new, equal_var=False)
    low, high = test.confidence_interval(record.gain["level"])
    assert (record.gain["low"], record.gain["high"]) == pytest.approx((low, high))
    text = (record.folder / "README.md").read_text()
    assert "pass: gain: val\\_bpb of B-train" in text
    assert "Faster than" not in text
    assert "Better than its own baseline arm" in text
    assert "val_bpb, sd" in (record.folder.parent / "history.svg").read_text()
    assert verify(empty) == 0
    page = empty / "book.html"
    assert cr.main(["report", "--records", str(empty), "--out", str(page)]) == 0
    assert "better" in page.read_text()


def test_other_machines_are_told_and_the_newest_record_is_the_baseline(records, series, capsys):
    """A time of another host is not compared with the record's."""
    b, c = conftest.SOURCES["B"], "x = 'third'\n"
    made = series(
        "ml", losses={"B": [x - 0.001 for x in LOSSES]}, started="2026-03-09", sources={"A": b, "B": c}
    )
    assert accept(records, made, "ml-claim", "ml") == 0
    text = (records / "tiny" / "2026-03-09_ml-claim" / "README.md").read_text()
    assert f"The newest record of the track was {FASTER}: 2.0050 s, val\\_loss 4.1015." in text
    assert "Both are from the same machine and data" in text
    assert "The baseline arm ran that record's program." in text
    assert "pass: target: mean val\\_loss 4.1005" in text
    made = series("slow", started="2026-03-10", sources={"A": b, "B": c})
    assert accept(records, made, "slow") == 2
    assert (
        f"arm A ran {book.read_record(records / 'tiny' / FASTER).own.source[:12]}" in capsys.readouterr().err
    )
    made = series("far", started="2026-03-10", host="node2", sources={"A": c, "B": "x = 'fourth'\n"})
    assert accept(records, made, "far") == 0
    text = (records / "tiny" / "2026-03-10_far" / "README.md").read_text()
    assert "cannot be compared, they are from another machine" in text
    assert verify(records) == 0


def test_the_contests_folder_is_written_first(empty, series, capsys, monkeypatch, tmp_path):
    """Of the runs' own folders, beside their logs; without it there is no record."""
    from golf import submit

    made, asked = series(), []
    out = tmp_path / "contest"
    words = ["--track", "tiny", "--name", "new", "--claim", "systems", "--records", str(empty)]
    words += ["--submission", str(out)]
    assert cr.main(["accept", str(made), *words]) == 2, "these runs are none of the contest"
    assert "name the folder of a run that ended and was checked" in capsys.readouterr().err
    assert not (empty / "tiny" / f"{DAY}_new").exists()
    monkeypatch.setattr(submit, "write_submission", lambda runs, out, name: asked.append((runs, out, name)))
    assert cr.main(["accept", str(made), *words]) == 0
    assert f"Written: {out}" in capsys.readouterr().out
    (runs, where, name) = asked[0]
    assert (where, name) == (out, "new")
    assert [path.name for path in runs] == [f"run-{i:03d}" for i in range(1, 7)]
    assert {path.parent.name[:2] for path in runs} == {"B-"}
    out.mkdir()
    assert cr.main(["accept", str(made), *words]) == 2
    assert "is there; name a new folder" in capsys.readouterr().err


def test_without_the_record_the_contests_folder_goes(empty, series, capsys, monkeypatch, tmp_path):
    from golf import submit

    def refuse(*_):
        assert out.is_dir()
        raise cr.InputError("would not verify")

    out = tmp_path / "contest"
    monkeypatch.setattr(submit, "write_submission", lambda runs, folder, name: folder.mkdir())
    monkeypatch.setattr("recordbook.accept.build", refuse)
    words = ["--track", "tiny", "--name", "new", "--claim", "systems", "--records", str(empty)]
    assert cr.main(["accept", str(series()), *words, "--submission", str(out)]) == 2
    assert "would not verify" in capsys.readouterr().err
    assert not out.exists()


def test_failed_runs_are_kept_and_counted(empty, series):
    times = {"B": (*TIMES["B"][:7], None)}
    assert accept(empty, series(n=8, times=times), "failing") == 0
    record = book.read_record(empty / "tiny" / f"{DAY}_failing")
    assert (record.own.failed, record.own.stats["runs"]) == (1, 7)
    last = record.own.runs[-1]
    assert (last["status"], last["ended"], last["counted"]) == ("diverged", "diverged", False)
    assert b"status: diverged" in unpack(record.folder / "logs" / f"{last['log']}.zst")
    assert any(reason["about"] == "failed" for reason in record.content["verdict"]["reasons"])
    assert verify(empty) == 0


def test_series_that_could_stop_early_count_by_their_always_valid_p(empty, series, capsys):
    losses = {"A": [x + 0.0001 * i for i, x in enumerate(LOSSES)], "B": [x - 0.002 for x in LOSSES]}
    assert accept(empty, series("early", n=8, most=20, losses=losses), "early") == 0
    assert "always-valid paired test, because the series could stop early" in capsys.readouterr().out
    assert accept(new_book(empty / "b"), series("grown", kind="series", extend=2), "grown", "baseline") == 0
    assert "always-valid p 0.000" in (out := capsys.readouterr().out)
    assert "which counts here" in out
    text = (empty / "b" / "tiny" / f"{DAY}_grown" / "README.md").read_text()
    assert "8 runs of each arm, rule open, extended later" in text


def test_packed_logs_of_a_series_are_taken(empty, series, finished):
    import gzip

    made = series("faster")
    for log in made.rglob("*.txt"):
        log.with_name(f"{log.name}.gz").write_bytes(gzip.compress(log.read_bytes()))
        log.unlink()
    assert accept(empty, made, "faster") == 0
    stored = tree(empty / "tiny" / FASTER)
    assert stored["logs/" + next(made.rglob("*.gz")).relative_to(made).as_posix()[:-3] + ".zst"]
    assert {k: v for k, v in stored.items() if k.endswith(".zst")} == {
        k: v for k, v in tree(finished / "records" / "tiny" / FASTER).items() if k.endswith(".zst")
    }


def test_a_series_of_the_real_runner(empty, tmp_path, capsys):
    """Plan and ledger as run.sh writes them, with an interrupted attempt and a stand-in for the trainer."""
    from tests.test_runs import TRAINER

    project = tmp_path / "project"
    (project / "data").mkdir(parents=True)
    shutil.copy(ROOT / "compare_runs.py", project)
    shutil.copytree(ROOT / "recordbook", project / "recordbook", ignore=shutil.ignore_patterns("__pycache__"))
    (project / "data/prepare.py").write_text("")
    (project / "triton_kernels.py").write_text("x = 1\n")
    (project / "torch.py").write_text("class cuda:\n    device_count = staticmethod(lambda: 0)\n")
    digest = hashlib.sha256((project / "triton_kernels.py").read_bytes()).hexdigest()
    kernels = f"#### source triton_kernels.py sha256={digest} lines=1"
    trainer = TRAINER.replace('"host: h"', f'"host: {socket.gethostname()}"')
    trainer = trainer.replace("*lines, ", f'*lines, "{kernels}", "x = 1", ')
    (project / "a.py").write_text(trainer)
    (project / "b.py").write_text(trainer + "# faster\n")
    (project / "a.json").write_text(json.dumps({"times": [2.1, 2.12, 2.09, 2.11, 2.1]}))
    (project / "b.json").write_text(json.dumps({"times": [2.0, 2.01, 1.99, 2.01, 2.0], "ends": ["killed"]}))
    command = [sys.executable, "-m", "recordbook.runs", "ab", "a.py", "b.py", "5"]
    codes = [subprocess.run(command, cwd=project, capture_output=True).returncode for _ in range(2)]
    assert codes == [130, 0]
    (made,) = (project / "logs").iterdir()
    assert accept(empty, made, "real", "ml") == 0, capsys.readouterr().out
    record = book.records_of("tiny", empty)[0]
    assert [run["ended"] for run in record.own.runs].count("interrupted") == 1
    assert (record.folder / "b.py").read_text() == trainer + "# faster\n"
    assert (record.folder / "triton_kernels.py").read_text() == "x = 1\n"
    assert verify(empty) == 0


def test_a_series_on_gpus_with_lanes_and_a_warm_up(tmp_path, monkeypatch):
    """Two lanes of one GPU each; the state of the GPUs stands beside the log and in the ledger."""
    plain_plan, plain_run = conftest.series_plan, conftest.series_run
    state = {"format": "splits.gpu/1", "gpus": [{"sm_mhz": {"mean": 1980.0}, "throttle": {"idle": 0.0}}]}
    machine = ["GPU-aa", "GPU-bb"]

    def plan(*args) -> dict:
        return plain_plan(*args) | {"recipe": "sprint", "machine": machine, "gpus": 1, "lanes": 2}

    def run(folder, which, seconds, loss, clock, meta, source) -> dict:
        facts = {"gpu_0": f"NVIDIA H200 {machine[which['seed'] % 2]}", "cpu": None, "recipe": "sprint"}
        end = plain_run(folder, which, seconds, loss, clock, meta | facts, source)
        (folder / which["log"]).with_suffix(".gpu.json").write_text(json.dumps(state))
        return end | {"gpu": state}

    monkeypatch.setattr(conftest, "series_plan", plan)
    monkeypatch.setattr(conftest, "series_run", run)
    losses = [x - 0.85 for x in LOSSES]
    made = conftest.write_series(tmp_path / "gpu", losses={"A": losses, "B": losses})
    warm = made / "warm-up" / "A" / "warm-up.txt"
    warm.parent.mkdir(parents=True)
    warm.write_text("step:1/2 train_loss:1\nstatus: interrupted at step 1: asked to\n")
    digest = hashlib.sha256(warm.read_bytes()).hexdigest()
    facts = {"attempt": 99, "role": "warm-up", "log": "warm-up/A/warm-up.txt"}
    end = {"status": "interrupted", "counted": False, "gpu": None, "log_sha256": digest}
    ledger_lines(made, lambda e: [e[0] | facts, e[1] | facts | end, *e])
    records = tmp_path / "records"
    (records / "sprint").mkdir(parents=True)
    shutil.copy(ROOT / "records" / "sprint" / "track.toml", records / "sprint")
    words = ["--track", "sprint", "--name", "lanes", "--claim", "systems", "--records", str(records)]
    assert cr.main(["accept", str(made), *words]) == 0
    (record,) = book.records_of("sprint", records)
    assert record.machine["id"] == "GPU-aa, GPU-bb"
    assert unpack(record.folder / "logs" / "warm-up" / "A" / "warm-up.txt.zst") == warm.read_bytes()
    assert verify(records) == 0
    replace(next(record.folder.glob("logs/B-*/run-001.gpu.json")), "1980.0", "1990.0")
    remake_manifest(record.folder)
    assert verify(records) == 1


# what is refused --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        ({"times": {"B": [x + 0.2 for x in TIMES["A"]]}}, 1, "REJECT"),
        ({"losses": {"B": [x + 0.01 for x in LOSSES]}}, 1, "fail: loss"),
        ({"n": 3}, 4, "open: runs: 3 and 3 complete"),
        ({"times": {"B": [x - 0.004 for x in (2.12, 2.1, 2.12, 2.08, 2.13, 2.11)]}}, 4, "INCONCLUSIVE"),
        ({"recipe": "short", "n": 6}, 2, "recipe of arm A: short, must be tiny"),
    ],
)
def test_without_accept_nothing_is_written(records, series, capsys, options, code, words):
    before = tree(records)
    assert accept(records, series(**options), "new") == code
    out, err = capsys.readouterr()
    assert words in out + err
    assert "Traceback" not in err
    assert tree(records) == before
    assert sorted(path.name for path in (records / "tiny").iterdir() if path.is_dir()) == [FASTER, FIRST]


@pytest.mark.parametrize(
    ("name", "claim", "kind", "words"),
    [
        ("Bad", "systems", "ab", "--name 'Bad': must be"),
        ("../x", "systems", "ab", "must be"),
        ("a_b", "systems", "ab", "must be"),
        ("", "systems", "ab", "must be"),
        ("faster", "systems", "ab", f"record {FASTER} has that name"),
        ("new", "baseline", "series", f"is for the first record of a track, there is {FIRST}"),
        ("new", "systems", "series", "a series of one trainer is claimed as baseline"),
    ],
)
def test_names_and_claims_are_checked(records, series, capsys, name, claim, kind, words):
    before = tree(records)
    assert accept(records, series(kind=kind, started="2026-04-01"), name, claim) == 2
    err = capsys.readouterr().err
    assert words in err
    assert err.count("\n") == 1
    assert tree(records) == before


def test_two_arms_are_no_first_record(empty, series, capsys):
    assert accept(empty, series(), "new", "baseline") == 2
    assert "one of two arms as systems or ml" in capsys.readouterr().err


def test_runs_count_for_one_record(records, finished, capsys):
    assert accept(records, finished / "logs" / "faster", "again") == 2
    assert f"record {FASTER} rests on the same logs" in capsys.readouterr().err


def test_places_that_are_no_series(empty, series, tmp_path, capsys):
    made = series()
    for place, words in (
        (next(made.glob("A-*")), "is one arm; name the folder of its series"),
        (tmp_path, "has no plan.json"),
        (tmp_path / "nothing", "no such folder"),
    ):
        assert accept(empty, place, "new") == 2
        assert words in capsys.readouterr().err
    assert cr.main(["accept", str(made), "--track", "tiny", "--name", "x", "--records", str(empty)]) == 2
    assert "add --claim systems or --claim ml or --claim baseline" in capsys.readouterr().err
    assert cr.main(["accept", str(made), "--track", "none", "--name", "x", "--records", str(empty)]) == 2
    assert "track 'none'" in capsys.readouterr().err


def ledger_lines(folder: Path, change) -> None:
    """Rewrite a ledger: `change` gets its events and returns those to keep."""
    path = folder / "ledger.jsonl"
    events = change([json.loads(line) for line in path.read_text().splitlines()])
    path.write_text("".join(json.dumps(event) + "\n" for event in events))


def new_plan(folder: Path, **changes) -> None:
    """Another plan, hashed, and known to the ledger as the one that the runs were started under."""
    data = json.dumps(json.loads((folder / "plan.json").read_text()) | changes).encode()
    (folder / "plan.json").write_bytes(data)
    digest = hashlib.sha256(data).hexdigest()
    (folder / "plan.json.sha256").write_text(f"{digest}  plan.json\n")
    ledger_lines(folder, lambda events: [e | ({"plan": digest} if "plan" in e else {}) for e in events])


def replace_plan(folder: Path, old: str, new: str) -> None:
    """Change a text in a plan, and what rests on its hash."""
    replace(folder / "plan.json", old, new)
    new_plan(folder)


def rename_seeds(events: list[dict]) -> list[dict]:
    swap = {1: 2, 2: 1}
    return [e | {"seed": swap.get(e["seed"], e["seed"])} if e.get("arm") == "B" else e for e in events]


def move_log(events: list[dict], log: str) -> list[dict]:
    return [e | {"log": log} if e.get("attempt") == 2 else e for e in events]


ALTERED = {  # name: (what is done to a series, words of the refusal)
    "plan altered": (
        lambda s: replace(s / "plan.json", '"runs": 6', '"runs": 5'),
        "was altered after it was made",
    ),
    "plan hash altered too": (
        lambda s: [
            replace(s / "plan.json", '"alpha": 0.01', '"alpha": 0.02'),
            (s / "plan.json.sha256").write_text(
                hashlib.sha256((s / "plan.json").read_bytes()).hexdigest() + "  plan.json\n"
            ),
        ],
        "is not the plan of the runs",
    ),
    "plan made later": (
        lambda s: new_plan(s, made=f"{DAY}T10:03:30+0000"),
        "started before plan.json was made",
    ),
    "plan of another kind": (lambda s: new_plan(s, kind="aa"), "kind 'aa': a record is of a series"),
    "plan of more runs": (
        lambda s: new_plan(s, runs=8),
        "the series is not finished, it lacks seed 7 of arm A, seed 7 of arm B",
    ),
    "plan of fewer runs": (
        lambda s: new_plan(s, runs=5),
        "more runs than planned: seed 6 of arm B, seed 6 of arm A",
    ),
    "plan of another machine": (lambda s: new_plan(s, machine=["other"]), "ran on host node1"),
    "plan of other data": (lambda s: new_plan(s, data_manifest="e" * 64), "data of arm A"),
    "plan with half a character": (
        lambda s: replace_plan(s, '"train_gpt.py"', '"\\ud800"'),
        "plan.json: cannot be read as JSON",
    ),
    "plan not JSON": (lambda s: (s / "plan.json").write_text("{"), "plan.json: cannot be read as JSON"),
    "plan without its hash": (
        lambda s: (s / "plan.json.sha256").unlink(),
        "plan.json.sha256: not in the series",
    ),
    "log missing": (lambda s: next(s.glob("B-*/run-003.txt")).unlink(), "run-003.txt is missing"),
    "log altered": (
        lambda s: replace(next(s.glob("B-*/run-003.txt")), "train_time:1990ms", "train_time:1890ms"),
        "run-003.txt was altered",
    ),
    "log of nobody": (
        lambda s: shutil.copy(next(s.glob("B-*/run-003.txt")), s / "B-more.txt"),
        "not in ledger.jsonl: B-more.txt",
    ),
    "logs exchanged": (
        lambda s: ledger_lines(s, lambda e: [x | {"arm": {"A": "B", "B": "A"}[x["arm"]]} for x in e]),
        "is not in the folder of arm",
    ),
    "end missing": (lambda s: ledger_lines(s, lambda e: e[:-1]), "attempt 12 lacks its start or its end"),
    "run forgotten": (lambda s: ledger_lines(s, lambda e: e[:-2]), "not in ledger.jsonl"),
    "whole run not counted": (
        lambda s: ledger_lines(s, lambda e: [*e[:-1], e[-1] | {"status": "interrupted", "counted": False}]),
        "run-006.txt: is a whole run, but ledger.jsonl has it as interrupted",
    ),
    "failure not counted": (
        lambda s: ledger_lines(s, lambda e: [*e[:-1], e[-1] | {"status": "crashed", "counted": False}]),
        "has it as crashed, and as not counted",
    ),
    "whole run as failed": (
        lambda s: ledger_lines(s, lambda e: [*e[:-1], e[-1] | {"status": "crashed"}]),
        "end of arm A: done, must be failed",
    ),
    "attempt twice": (lambda s: ledger_lines(s, lambda e: [*e, e[-1]]), "attempt 12 is there twice"),
    "seeds exchanged": (lambda s: ledger_lines(s, rename_seeds), "seed of arm B: 1, must be 2"),
    "position": (
        lambda s: ledger_lines(s, lambda e: [x | {"position": x["position"] + 1} for x in e]),
        "a position is not that of its arm and seed",
    ),
    "lanes": (lambda s: new_plan(s, lanes=0), "lanes 0, must be a whole number from 1"),
    "order": (
        lambda s: ledger_lines(
            s, lambda e: [x | {"attempt": {5: 7, 7: 5}.get(x["attempt"], x["attempt"])} for x in e]
        ),
        "the runs were made in the order",
    ),
    "rule unknown": (
        lambda s: new_plan(s, stop={"rule": "open", "least": 6, "most": 6}),
        "has the arms A, B and the rule fixed or until-decided",
    ),
    "extended": (
        lambda s: ledger_lines(s, lambda e: [{"event": "extend", "runs": 6}, *e]),
        "a series of rule fixed is not extended",
    ),
    "source of the plan": (
        lambda s: new_plan(
            s, arms=[a | {"files": {}} for a in json.loads((s / "plan.json").read_text())["arms"]]
        ),
        "the source of arm A is not the hash of its files",
    ),
    "log outside": (
        lambda s: ledger_lines(s, lambda e: move_log(e, "../x/run-001.txt")),
        "is no log below the series",
    ),
    "log absolute": (
        lambda s: ledger_lines(s, lambda e: move_log(e, "/x/run-001.txt")),
        "is no log below the series",
    ),
    "ledger torn": (
        lambda s: (s / "ledger.jsonl").write_text((s / "ledger.jsonl").read_text()[:-9]),
        "ledger.jsonl, line 24: cannot be read as JSON",
    ),
    "ledger wrong": (
        lambda s: ledger_lines(s, lambda e: [*e[:-1], e[-1] | {"counted": "yes"}]),
        "line 24: counted is 'yes', not bool",
    ),
    "GPU state altered": (
        lambda s: next(s.glob("B-*/run-003.txt")).with_name("run-003.gpu.json").write_text("{}"),
        "run-003.gpu.json is not the state of the GPUs",
    ),
}


@pytest.mark.parametrize("name", ALTERED)
def test_plan_ledger_and_logs_are_one_account(empty, series, capsys, name):
    change, words = ALTERED[name]
    made = series()
    change(made)
    before = tree(empty)
    assert accept(empty, made, "new") == 2
    err = capsys.readouterr().err
    assert words in err
    assert err.count("\n") == 1
    assert tree(empty) == before


def test_an_undecided_series_is_not_finished(empty, series, capsys):
    made = series(n=6, most=20)
    ledger_lines(made, lambda events: [e for e in events if e["event"] != "decision"])
    assert accept(empty, made, "new") == 2
    assert "not finished, it lacks seed 7 of arm A" in capsys.readouterr().err


def test_lanes_make_seeds_at_once_but_pairs_in_order(empty, series):
    """Attempts 1 to 4 are seeds 1 and 2 on two lanes: seed 2 may start between the runs of seed 1."""
    made = series()
    new_plan(made, lanes=2)
    attempts = {2: 3, 3: 2}
    ledger_lines(made, lambda e: [x | {"attempt": attempts.get(x["attempt"], x["attempt"])} for x in e])
    files = evidence.of_series(made)
    assert evidence.faults(evidence.account_of(files), files) == []
    ledger_lines(made, lambda e: [x | {"attempt": {1: 3, 3: 1}.get(x["attempt"], x["attempt"])} for x in e])
    files = evidence.of_series(made)
    assert "made in the order" in evidence.faults(evidence.account_of(files), files)[0]


def test_a_decision_is_not_earlier_than_the_plan_allows(empty, series, capsys):
    made = series(n=6, most=20)
    ledger_lines(made, lambda e: [x | ({"after": 3} if x["event"] == "decision" else {}) for x in e])
    assert accept(empty, made, "new") == 2
    assert "decided before the 4 runs" in capsys.readouterr().err


def test_a_failure_at_the_end_leaves_nothing(empty, series, monkeypatch, capsys):
    """The rename fails; then what was built does not verify."""
    from recordbook import verify as verifier

    made, before = series(), tree(empty)
    with monkeypatch.context() as patch:

        def fail(*_):
            raise OSError(28, "No space left on device")

        patch.setattr(os, "rename", fail)
        assert accept(empty, made, "new") == 2
        assert "cannot be written (No space left on device)" in capsys.readouterr().err
    assert [path.name for path in (empty / "tiny").iterdir()] == ["track.toml"]
    with monkeypatch.context() as patch:
        patch.setattr(verifier, "examine", lambda *_: verifier.Check(evidence=["a fault"]))
        assert accept(empty, made, "new") == 2
        assert "would not verify: a fault; nothing was written" in capsys.readouterr().err
    assert tree(empty) == before
    assert accept(empty, made, "new") == 0


def test_a_trainer_with_the_name_of_a_file_of_the_book(empty, tmp_path, monkeypatch, capsys):
    import tests.test_compare_runs as logs

    plain = logs.our_log
    monkeypatch.setattr(
        logs, "our_log", lambda *a, **k: plain(*a, **k).replace("train_gpt.py sha", "Readme.md sha")
    )
    digest = hashlib.sha256(SOURCES["A"].encode()).hexdigest()
    from recordbook import runs

    plan = conftest.series_plan

    def renamed(*args) -> dict:
        made = plan(*args)
        made["arms"][0] |= {"files": {"Readme.md": digest}, "source": runs.source_of({"Readme.md": digest})}
        return made

    monkeypatch.setattr(conftest, "series_plan", renamed)
    assert accept(empty, conftest.write_series(tmp_path / "s", kind="series"), "new", "baseline") == 2
    assert "source Readme.md: a record has such a file itself" in capsys.readouterr().err


# verify -----------------------------------------------------------------------------------------------------


def flip(path: Path) -> None:
    """Change one bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def swap_arms(record: Path) -> None:
    for name in ("run-001.txt.zst", "run-002.txt.zst"):
        a, b = (arm_folder(record, letter) / name for letter in "AB")
        data = a.read_bytes()
        a.write_bytes(b.read_bytes())
        b.write_bytes(data)


def set_result(record: Path, change) -> None:
    content = json.loads((record / "result.json").read_text())
    change(content)
    (record / "result.json").write_text(pages.json_text(content))


# name: (what is done to a record, words that name it, words that still do when the manifest fits)
FORGED = {
    "bit of a log": (lambda r: flip(first_log(r)), "run-001.txt.zst does not have the hash", "run-001.txt"),
    "log": (
        lambda r: replace(first_log(r), "train_time:2000ms", "train_time:1900ms"),
        "run-001.txt.zst does not have the hash",
        "run-001.txt was altered",
    ),
    "log missing": (lambda r: first_log(r).unlink(), "run-001.txt.zst is missing", "run-001.txt is missing"),
    "arms swapped": (swap_arms, "run-001.txt.zst does not have the hash", "run-001.txt was altered"),
    "trainer": (
        lambda r: replace(r / "train_gpt.py", "lr = 1", "lr = 2"),
        "train_gpt.py does not have the hash",
        "train_gpt.py is not the source in the logs of B-train_gpt",
    ),
    "trainer missing": (
        lambda r: (r / "train_gpt.py").unlink(),
        "train_gpt.py is missing",
        "train_gpt.py is missing: it is a source",
    ),
    "extra file": (
        lambda r: (r / "notes.txt").write_text("x"),
        "notes.txt is not in MANIFEST.sha256",
        "notes.txt is no part of a record",
    ),
    "extra log": (
        lambda r: shutil.copy(first_log(r), first_log(r).with_name("run-099.txt.zst")),
        "run-099.txt.zst is not in MANIFEST.sha256",
        "not in ledger.jsonl",
    ),
    "plan among the logs": (
        lambda r: shutil.copy(r / "plan.json", r / "logs"),
        "logs/plan.json is not in MANIFEST.sha256",
        "logs/plan.json is no part of a record",
    ),
    "log of another name": (
        lambda r: (r / "logs" / "RUN.TXT").write_bytes(unpack(first_log(r))),
        "logs/RUN.TXT is not in MANIFEST.sha256",
        "logs/RUN.TXT is no part of a record",
    ),
    "unpacked log": (
        lambda r: [first_log(r).with_suffix("").write_bytes(unpack(first_log(r))), first_log(r).unlink()],
        "run-001.txt is not in MANIFEST.sha256",
        "run-001.txt is no part of a record",
    ),
    "number in result.json": (
        lambda r: replace(r / "result.json", '"time_mean": 2.005', '"time_mean": 1.905'),
        "result.json does not have the hash",
        "result.json: arms[1].stats.time_mean is 1.905, must be 2.005",
    ),
    "small number in result.json": (
        lambda r: replace(r / "result.json", '"time_mean": 2.005', '"time_mean": 2.00500001'),
        "result.json does not have the hash",
        "arms[1].stats.time_mean is 2.00500001",
    ),
    "curve": (
        lambda r: set_result(r, lambda c: c["curves"][7]["points"].pop()),
        "result.json does not have the hash",
        "result.json: curves[7].points is",
    ),
    "reason": (
        lambda r: set_result(r, lambda c: c["verdict"]["reasons"].pop()),
        "result.json does not have the hash",
        "result.json: verdict.reasons is",
    ),
    "rules": (
        lambda r: set_result(r, lambda c: c["rules"].update(alpha=0.05)),
        "result.json does not have the hash",
        "rules.alpha is 0.05, must be 0.01",
    ),
    "claim": (
        lambda r: set_result(r, lambda c: c.update(claim="ml")),
        "result.json does not have the hash",
        "result.json: verdict.p is 0.000468",
    ),
    "key in result.json": (
        lambda r: set_result(r, lambda c: c.update(best=True)),
        "result.json does not have the hash",
        "result.json: best is unknown",
    ),
    "number in README.md": (
        lambda r: replace(r / "README.md", "**Result: 2.0050 s**", "**Result: 1.9050 s**"),
        "README.md does not have the hash",
        "README.md, line 3: '**Result: 1.9050 s**",
    ),
    "README.md missing": (
        lambda r: (r / "README.md").unlink(),
        "README.md is missing",
        "README.md is missing",
    ),
    "line endings": (
        lambda r: (r / "README.md").write_bytes((r / "README.md").read_bytes().replace(b"\n", b"\r\n")),
        "README.md does not have the hash",
        "README.md: other ends of lines",
    ),
    "ledger": (
        lambda r: replace(r / "ledger.jsonl", '"status": "done"', '"status": "interrupted"'),
        "ledger.jsonl does not have the hash",
        "ledger.jsonl has it as interrupted, and as counted",
    ),
    "ledger line": (
        lambda r: ledger_lines(r, lambda events: events[:-1]),
        "ledger.jsonl does not have the hash",
        "attempt 12 lacks its start or its end",
    ),
    "plan": (
        lambda r: replace(r / "plan.json", '"alpha": 0.01', '"alpha": 0.05'),
        "plan.json does not have the hash",
        "it was altered after it was made",
    ),
    "plan and all hashes": (
        lambda r: new_plan(r, made="2026-02-27T00:00:00+0000"),
        "plan.json does not have the hash",
        "result.json: plan.made is",
    ),
    "manifest missing": (lambda r: (r / "MANIFEST.sha256").unlink(), "MANIFEST.sha256 is missing", None),
    "manifest line": (
        lambda r: replace(r / "MANIFEST.sha256", "README.md", "../../README.md"),
        "../../README.md is missing, MANIFEST.sha256 names it",
        None,
    ),
    "manifest absolute": (
        lambda r: replace(r / "MANIFEST.sha256", "README.md", "/etc/passwd"),
        "/etc/passwd is missing, MANIFEST.sha256 names it",
        None,
    ),
    "manifest garbled": (
        lambda r: replace(r / "MANIFEST.sha256", "  README.md", " *README.md"),
        "is no hash and name",
        None,
    ),
}


@pytest.mark.parametrize("name", FORGED)
def test_every_alteration_is_found_and_named(records, capsys, name):
    """Once as it is, once with hashes that fit again, so that the numbers themselves are what is compared."""
    change, words, still = FORGED[name]
    record = records / "tiny" / FASTER
    change(record)
    assert verify(records, str(record)) == 1
    out = capsys.readouterr().out
    assert words in out
    assert all(line.startswith(f"tiny/{FASTER}: ") for line in out.splitlines())
    if still:
        remake_manifest(record)
        assert verify(records, str(record)) == 1
        assert still in capsys.readouterr().out


def test_the_verdict_is_made_again(records, capsys):
    """Stricter rules of the track than those that the record was accepted under."""
    replace(records / "tiny" / "track.toml", "min_runs = 4", "min_runs = 7")
    assert verify(records) == 1
    out = capsys.readouterr().out
    assert (
        f"tiny/{FASTER}: the verdict is INCONCLUSIVE: runs: 6 and 6 complete, the rule is at least 7" in out
    )
    assert f"tiny/{FIRST}: the verdict is INCONCLUSIVE" in out


def test_rules_of_a_track_with_records_do_not_change(records, capsys):
    replace(records / "tiny" / "track.toml", "alpha = 0.01", "alpha = 0.05")
    assert verify(records) == 1
    assert "rules.alpha is 0.01, must be 0.05" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: replace(t / "README.md", "2.0050", "1.0050"), "tiny: README.md, line "),
        (lambda t: (t / "README.md").unlink(), "tiny: README.md is missing"),
        (
            lambda t: replace(t / "history.svg", '"time_mean": 2.005', '"time_mean": 1.005'),
            "does not hold the numbers",
        ),
        (lambda t: replace(t / "history.svg", "<path d=", "<path id='x' d="), "is not what matplotlib"),
        (lambda t: (t / "history.svg").write_text("<svg/>"), "does not hold the numbers"),
        (lambda t: (t / "notes.txt").write_text("x"), "tiny: notes.txt is no part of a track"),
        (
            lambda t: shutil.rmtree(t / FIRST),
            f"tiny/{FASTER}: stands beside {FIRST}, which is not in the track",
        ),
        (lambda t: (t / "2026-01-01_empty").mkdir(), "tiny/2026-01-01_empty: "),
    ],
)
def test_table_and_plot_are_those_of_the_records(records, capsys, change, words):
    change(records / "tiny")
    assert verify(records) == 1
    assert words in capsys.readouterr().out


def test_a_plot_of_another_matplotlib_counts_by_its_numbers(records):
    svg = records / "tiny" / "history.svg"
    version, _ = pages.plot_data(svg.read_bytes())
    replace(svg, f'"matplotlib": "{version}"', '"matplotlib": "0.1"')
    replace(svg, "<path d=", "<path id='x' d=")
    assert verify(records) == 0


def test_two_records_on_the_same_runs_and_two_first_ones(records, empty, finished, capsys):
    assert accept(empty, finished / "logs" / "first", "other", "baseline") == 0
    shutil.copytree(empty / "tiny" / f"{DAY}_other", records / "tiny" / f"{DAY}_other")
    assert verify(records) == 1
    out = capsys.readouterr().out
    assert f"tiny/{DAY}_other: rests on the same logs as {FIRST}" in out
    assert f"claims to be the first record of the track, as {FIRST} does" in out


def test_a_gain_over_a_slower_program_than_the_newest_record(records, empty, series, capsys):
    """Accepted into a book without records, then copied beside the record whose program it did not run."""
    made = series("slow", started="2026-03-09")
    assert accept(records, made, "slow") == 2
    assert accept(empty, made, "slow") == 0
    shutil.copytree(empty / "tiny" / "2026-03-09_slow", records / "tiny" / "2026-03-09_slow")
    assert verify(records, "--write") == 1
    assert f"slow: claims to be the first record of the track, as {FIRST} does" in capsys.readouterr().out


def test_a_renamed_record(records, capsys):
    (records / "tiny" / FASTER).rename(records / "tiny" / "2026-03-02_faster")
    assert verify(records) == 1
    assert f"is of {FASTER}, a record's folder is named so" in capsys.readouterr().out


def test_numbers_may_differ_as_processors_do(records):
    record = records / "tiny" / FASTER
    set_result(record, lambda c: c["arms"][1]["stats"].update(time_mean=2.005 * (1 + 1e-12)))
    remake_manifest(record)
    assert verify(records, str(record)) == 0


def test_write_makes_pages_again_but_not_evidence(records, capsys):
    before = tree(records)
    record = records / "tiny" / FASTER
    replace(record / "README.md", "2.0050", "1.0050")
    set_result(record, lambda c: c.update(gain=c["gain"] | {"amount": 0.11}))
    (records / "tiny" / "README.md").unlink()
    first = records / "tiny" / FIRST / "result.json"  # which the later record names with its time
    replace(first, '"time_mean": 2.108', '"time_mean": 2.208')
    assert verify(records) == 1
    assert verify(records, "--write") == 0
    assert tree(records) == before
    assert verify(records) == 0
    replace(record / "README.md", "2.0050", "1.0050")
    flip(first_log(record))
    broken = tree(records)
    assert verify(records, "--write") == 1
    assert tree(records) == broken


def test_one_record_or_one_track(records, capsys):
    assert verify(records, str(records / "tiny" / FIRST)) == 0
    assert capsys.readouterr().out == f"tiny/{FIRST}: ok\n"
    assert verify(records, str(records / "tiny")) == 0
    assert len(capsys.readouterr().out.splitlines()) == 3
    for place in (records, records / "tiny" / "none", records / "tiny" / FIRST / "logs"):
        assert verify(records, str(place)) == 2
        assert "no record and no track" in capsys.readouterr().err
    assert verify(records / "none") == 2


def test_without_records(empty, capsys):
    assert verify(empty) == 0
    assert capsys.readouterr().out == "There is no record yet, so there is nothing to verify.\n"
    (empty / "tiny" / "README.md").write_text("x")
    assert verify(empty) == 1
    assert "README.md is there without a record" in capsys.readouterr().out


def test_the_records_of_this_project():
    assert cr.main(["verify"]) == 0


# records made to harm ---------------------------------------------------------------------------------------


def bomb(path: Path) -> None:
    """A frame of some kilobytes that unpacks to 200 MiB."""
    path.write_bytes(zstandard.ZstdCompressor(level=19).compress(b"step:1/2 \n" * (20 << 20)))
    assert path.stat().st_size < 1 << 20


def deep(path: Path) -> None:
    path.write_text("[" * 200_000)


def nest(record: Path, depth: int) -> None:
    """A value of so many levels among the tests, which may hold anything."""
    replace(record / "result.json", '"tests": {', f'"tests": {{"x": {"[" * depth}{"]" * depth},')


HARMFUL = {
    "zip bomb": (lambda r: bomb(first_log(r)), "over 128 MiB unpacked"),
    "cut log": (lambda r: first_log(r).write_bytes(first_log(r).read_bytes()[:-9]), "run-001.txt.zst"),
    "link to a log": (
        lambda r: [first_log(r).unlink(), first_log(r).symlink_to("/etc/hosts")],
        "a link or a device",
    ),
    "link to a folder": (lambda r: (r / "more").symlink_to("/etc"), "a link or a device"),
    "link to result.json": (
        lambda r: [(r / "result.json").unlink(), (r / "result.json").symlink_to("/etc/hosts")],
        "a link or a device",
    ),
    "pipe": (lambda r: os.mkfifo(r / "logs" / "pipe.txt"), "a link or a device"),
    "deep JSON": (lambda r: deep(r / "result.json"), "cannot be read as JSON"),
    "nested JSON": (lambda r: nest(r, 300), "over 20 levels deep"),
    "deep plan": (lambda r: deep(r / "plan.json"), "cannot be read as JSON"),
    "large JSON": (lambda r: os.truncate(r / "result.json", 65 << 20), "over 64 MiB"),
    "infinite number": (
        lambda r: replace(r / "result.json", '"time_mean": 2.005', '"time_mean": 1e999'),
        "is no number of a record",
    ),
    "endless number": (
        lambda r: replace(r / "result.json", '"time_mean": 2.005', f'"time_mean": {"9" * 5000}'),
        "is no number of a record",
    ),
    "no number": (
        lambda r: replace(r / "result.json", '"time_mean": 2.005', '"time_mean": NaN'),
        "no number",
    ),
    "other type": (
        lambda r: replace(r / "result.json", '"time_mean": 2.005', '"time_mean": "2"'),
        "not int or float",
    ),
    "no list": (lambda r: set_result(r, lambda c: c.update(arms={})), "arms is no list"),
    "no arms": (lambda r: set_result(r, lambda c: c.update(arms=[])), "is not of arms in the roles"),
    "no spread": (lambda r: replace(r / "result.json", '"time_sd": 0', '"time_sd": -0'), "is no result"),
    "huge number": (
        lambda r: replace(r / "result.json", '"time_mean": 2.005', '"time_mean": 1e300'),
        "is no result",
    ),
    "interval": (lambda r: set_result(r, lambda c: c["gain"].update(low=1.0)), "is no result"),
    "wrong date": (
        lambda r: set_result(r, lambda c: c.update(date="2026-99-01")),
        "is no time of 2026-99-01",
    ),
    "format": (lambda r: set_result(r, lambda c: c.update(format="x/9")), "format 'x/9', must be"),
    "many runs": (lambda r: new_plan(r, runs=10**12), "must be 1 to 10000"),
    "not UTF-8": (lambda r: (r / "MANIFEST.sha256").write_bytes(b"\xff\xfe\n"), "is no hash and name"),
    "control characters": (lambda r: (r / "a\x1b[2Jb").write_text("x"), "control characters in a file name"),
}


@pytest.mark.parametrize("name", HARMFUL)
def test_records_made_to_harm_are_refused_in_lines(records, capsys, name):
    change, words = HARMFUL[name]
    record = records / "tiny" / FASTER
    change(record)
    assert verify(records) == 1
    out, err = capsys.readouterr()
    assert words in out
    assert "\x1b" not in out
    assert err == ""
    assert f"tiny/{FIRST}: ok" in out


def test_a_record_that_is_a_link(records, tmp_path, capsys):
    (records / "tiny" / FASTER).rename(tmp_path / FASTER)
    (records / "tiny" / FASTER).symlink_to(tmp_path / FASTER)
    assert verify(records) == 1
    assert f"tiny/{FASTER}: is a link" in capsys.readouterr().out


def test_reading_a_malformed_record_is_one_error(records):
    (records / "tiny" / FASTER / "result.json").write_text("{}")
    with pytest.raises(cr.InputError, match=r"result\.json: format is missing"):
        book.records_of("tiny", records)
    (records / "tiny" / FASTER / "result.json").unlink()
    with pytest.raises(cr.InputError, match="no such file"):
        book.read_record(records / "tiny" / FASTER)


# parts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "shape", "wrong"),
    [
        ({"a": 1}, {"a": int}, ""),
        ({"a": True}, {"a": int}, "a is True, not int"),
        ({"a": True}, {"a": bool}, ""),
        ({"a": [{"b": 1}, {}]}, {"a": [{"b": int}]}, "a[1].b is missing"),
        ({"a": None}, {"a": evidence.MAYBE_NUMBER}, ""),
        ([], {"a": int}, "all of it is no object"),
    ],
)
def test_shapes(value, shape, wrong):
    assert evidence.misfit(value, shape) == wrong


def test_text_of_others_is_no_markup():
    assert pages.cell("<b>|x_y`") == r"\<b\>\|x\_y\`"
    assert pages.cell("a\nb") == r"a\\nb"


@pytest.mark.parametrize("log", ["a/run.txt", "run.log", "a/b/run.txt"])
def test_paths_inside(log):
    assert evidence.is_inside(log)


@pytest.mark.parametrize(
    "log", ["/a/run.txt", "../run.txt", "a/../run.txt", "a//run.txt", "./run.txt", "run.py", ""]
)
def test_paths_outside(log):
    assert not evidence.is_inside(log)


def test_near_numbers():
    from recordbook.verify import differences

    assert not list(differences({"a": [1.0, None]}, {"a": [1.0 + 1e-12, None]}))
    assert list(differences({"a": 1.0}, {"a": 1.0 + 1e-8})) == [f"a is 1.0, must be {1.0 + 1e-8}"]
    assert list(differences({"a": 1}, {"a": True})) == ["a is 1, must be True"]
    assert list(differences([1], [1, 2])) == [" is [1], must be [1, 2]"]
    assert math.isclose(1.0, 1.0 + 1e-12)


# a real series ----------------------------------------------------------------------------------------------

H200 = ROOT / "tests" / "series" / "2026-11-28_sprint-ab"


@pytest.mark.parametrize(
    ("claim", "about", "more"),
    [
        ("systems", "loss: val_loss differs by +0.00227 (98% interval -0.00213 to +0.00668)", 6),
        ("ml", "target: mean val_loss 3.3180 (sd 0.0021, n 4) is 0.0040 below 3.322", 3),
    ],
)
def test_four_pairs_on_h200_are_too_few_for_a_record(tmp_path, capsys, claim, about, more):
    """15 % faster, and refused: what its four pairs say of the loss is not sure enough."""
    book, first = tmp_path, "2026-11-28_foundation"
    shutil.copytree(ROOT / "records" / "sprint" / first, book / "sprint" / first)
    shutil.copy(ROOT / "records" / "sprint" / "track.toml", book / "sprint")
    before = sorted(book.rglob("*"))
    words = ["accept", str(H200), "--track", "sprint", "--claim", claim, "--name", "fast"]
    assert cr.main([*words, "--records", str(book)]) == 4
    said = capsys.readouterr().out
    assert f"INCONCLUSIVE (about {more} more runs of each arm)" in said
    assert "pass: time: B-train_gpt-4d0e2d6c is 22.4440 s (15.00%) faster" in said
    assert f"open: {about}" in said
    assert "lost" not in said, "no run was held up"
    assert sorted(book.rglob("*")) == before
