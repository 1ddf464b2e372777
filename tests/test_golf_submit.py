"""golf/submit.py: the contest's folder says what the runs say; what must not be submitted is refused."""

import hashlib
import io
import json
import statistics
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from golf import artifact, submit

ROOT = Path(__file__).resolve().parents[1]
FIELDS = ("author", "github_id", "name", "blurb", "date", "val_loss", "val_bpb", "bytes_total", "bytes_code")


def code_zip(text: str = "print('golf')\n") -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in ("__main__.py", "golf/train_golf.py"):
            archive.writestr(zipfile.ZipInfo(name), text)
    return buffer.getvalue()


def make_run(folder: Path, seed: int, gpus: int = 8, dim: int = 4, code: bytes = b"", **result) -> Path:
    """A run's folder as train_golf.py and check.py leave it, with numbers of our own."""
    folder.mkdir(parents=True)
    code = code or code_zip()
    weights = artifact.Quantized(np.full((dim, 8), seed, np.int8), 6, np.ones(dim, np.float16))
    packed = artifact.pack({"config": {"dim": dim}, "tokenizer": "ab" * 32}, {"w": weights})
    bpb = 1.06 + seed / 1000
    rows = {
        mode: {"val_loss": 2.7 * (bpb + plus), "val_bpb": bpb + plus, "seconds": 100.0, "within_budget": True,
               "is_partial": False, "tokens": 9, "bytes": 30}
        for mode, plus in (("none", 0.02), ("sliding", 0.0))
    }  # fmt: skip
    found = {
        "recipe": "golf-full", "steps": 5000, "val_loss": 2.8, "val_bpb": 1.05, "scores": rows,
        "tokens_seen": 10**9,
        "train_time_ms": 585_000.0, "train_data_access_end_s": 590.0, "artifact_bytes": len(packed),
        "total_bytes": len(packed) + len(code), "artifact_sha256": hashlib.sha256(packed).hexdigest(),
        "ledger_s": {"training": 585.0}, **result,
    }  # fmt: skip
    machine = {f"gpu {i}": f"NVIDIA H100 80GB HBM3 GPU-{i}" for i in range(gpus)} or {
        "cpu": "x86_64, 2 cores"
    }
    meta = {
        "seed": str(seed), "data": "sha256=1", "started": "2026-05-01T10:00:00+0000",
        "world_size": max(gpus, 1),
        "command": f"golf/train_golf.py --mode full --data x --seed {seed} --set embed_bits=8 --out y",
        **machine,
    }  # fmt: skip
    checks = [
        {"number": n, "name": f"check {n}", "passed": True, "measured": f"a | b {seed}"} for n in range(1, 14)
    ]
    for name, content in (("result.json", found), ("train.json", {"meta": meta})):
        (folder / name).write_text(json.dumps(content))
    (folder / "train.txt").write_text("x = 1\nRunning PyTorch 2.11.0 compiled for CUDA 12.8\nstep:1/2\n")
    (folder / "model.golf").write_bytes(packed)
    (folder / "code.zip").write_bytes(code)
    report = {"sha256": submit.digests(folder), "passed": True, "complete": True, "checks": checks}
    (folder / "checks.json").write_text(json.dumps(report))
    return folder


@pytest.fixture
def runs(tmp_path) -> list[Path]:
    return [make_run(tmp_path / f"run{seed}", seed) for seed in (3, 1, 2)]


def change(folder: Path, name: str, **values) -> None:
    content = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(content | values))
    if name != "checks.json":
        change(folder, "checks.json", sha256=submit.digests(folder))


def test_the_folder(runs, tmp_path):
    out = tmp_path / "records" / "2026-05-01_Try"
    facts = submit.write_submission(runs, out, author="A", github_id="a", name="Try", blurb="What it does.")
    assert facts == json.loads((out / "submission.json").read_text())
    assert set(FIELDS) <= set(facts)
    bpbs = [1.061, 1.062, 1.063]
    assert facts["val_bpb"] == pytest.approx(statistics.mean(bpbs))
    assert facts["val_bpb_std"] == pytest.approx(statistics.stdev(bpbs))
    assert (facts["seeds"], facts["scoring"]) == ([1, 2, 3], "sliding")
    assert facts["seed_results"]["2"]["val_bpb"] == 1.062
    assert facts["seed_results"]["2"]["step_avg_ms"] == pytest.approx(117.0)
    assert (facts["track"], facts["hardware"]) == ("track_10min_16mb", "8 x NVIDIA H100 80GB HBM3")
    assert (facts["pytorch_version"], facts["cuda_version"]) == ("2.11.0", "12.8")
    assert facts["bytes_code"] == len(code_zip())
    assert facts["bytes_total"] == len(code_zip()) + (runs[0] / "model.golf").stat().st_size
    assert facts["date"] == "2026-05-01"
    assert all(facts["compliance"].values())
    assert len(facts["compliance"]) == 13
    names = {path.name for path in out.iterdir()}
    logs = {f"train_seed{seed}.log" for seed in (1, 2, 3)} | {f"checks_seed{seed}.json" for seed in (1, 2, 3)}
    assert names == logs | {"README.md", "submission.json", "train_gpt.py", "source", "requirements.txt"}
    assert (out / "train_gpt.py").read_bytes() == code_zip()
    assert (out / "source" / "golf" / "train_golf.py").is_file()
    done = subprocess.run([sys.executable, "train_gpt.py"], cwd=out, capture_output=True, text=True)
    assert done.stdout == "golf\n", "train_gpt.py runs inside of that folder"


def test_the_page_is_made_from_the_numbers(runs, tmp_path):
    submit.write_submission(runs, tmp_path / "out", name="Try", blurb="What it does.")
    page = (tmp_path / "out" / "README.md").read_text()
    assert "**1.06200 bits per byte** (sd 0.00100), n = 3" in page
    assert "| 2 | 5,000 | 1.05000 | 1.08200 | 1.06200 |" in page
    assert "train_gpt.py --mode full --set embed_bits=8 --data DATA --seed 1 --out run" in page
    assert "| check 13 | a / b 1 | a / b 2 | a / b 3 |" in page
    assert "not comparable" not in page
    tables = [line for line in page.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in tables} == {9, 5}


def test_requirements_are_the_projects(runs, tmp_path):
    submit.write_submission(runs, tmp_path / "out")
    lines = (tmp_path / "out" / "requirements.txt").read_text().splitlines()
    assert {line.split("==")[0] for line in lines} == set(submit.REQUIRED)
    project = (ROOT / "requirements.txt").read_text()
    assert all(line.split(" ")[0] in project for line in lines)


def test_other_hardware_is_no_record(tmp_path):
    run = make_run(tmp_path / "run", 1, gpus=1)
    facts = submit.write_submission([run], tmp_path / "out")
    assert (facts["track"], facts["val_bpb_std"]) == ("track_non_record_16mb", None)
    page = (tmp_path / "out" / "README.md").read_text()
    assert "not comparable with the contest's board" in page
    assert "Fewer than 3 seeds" in page
    late = make_run(tmp_path / "late", 1, train_data_access_end_s=601.0)
    assert submit.write_submission([late], tmp_path / "out2")["track"] == "track_non_record_16mb"


def test_a_score_that_one_run_lacks_does_not_count(runs, tmp_path):
    for name, values in (("within_budget", False), ("is_partial", True)):
        result = json.loads((runs[1] / "result.json").read_text())
        result["scores"]["sliding"] |= {"within_budget": True, "is_partial": False} | {name: values}
        change(runs[1], "result.json", scores=result["scores"])
        facts = submit.write_submission(runs, tmp_path / name)
        assert facts["scoring"] == "none"
        assert facts["val_bpb"] == pytest.approx(1.082)


def failed_check(run: Path) -> None:
    report = json.loads((run / "checks.json").read_text())
    report["checks"][4]["passed"] = False
    (run / "checks.json").write_text(json.dumps(report | {"passed": False}))


REFUSED = {
    "no checks": (lambda run: (run / "checks.json").unlink(), "checks.json: No such file"),
    "a failed check": (failed_check, "checks failed: 5"),
    "some checks": (lambda run: change(run, "checks.json", complete=False), "were not all run"),
    "no digests": (lambda run: change(run, "checks.json", sha256={}), "another model.golf"),
    "another artifact": (lambda run: (run / "model.golf").write_bytes(b"GOLF"), "another model.golf"),
    "another program": (lambda run: (run / "code.zip").write_bytes(code_zip("pass")), r"another code\.zip"),
    "another log": (lambda run: (run / "train.txt").write_text("x = 2\n"), r"another train\.txt"),
    "another result": (lambda run: (run / "result.json").write_text("{}"), r"another result\.json"),
    "other conditions": (lambda run: (run / "train.json").write_text("{}"), r"another train\.json"),
    "another size": (lambda run: change(run, "result.json", total_bytes=1), "bytes"),
    "a seed twice": (lambda run: change(run, "train.json", meta=META_2), "a seed counts once"),
    "another hardware": (lambda run: change(run, "train.json", meta=META_2 | OTHER), "hardware"),
    "no seed": (lambda run: change(run, "train.json", meta={}), "no seed"),
    "a list": (lambda run: (run / "train.json").write_text("[]"), "not a JSON object"),
    "no JSON": (lambda run: (run / "result.json").write_text("{"), "not JSON"),
}  # fmt: skip
OTHER = {"seed": "9", "gpu 0": "NVIDIA X GPU-1"}
META_2 = {"seed": "2", "data": "sha256=1"} | {f"gpu {i}": f"NVIDIA H100 80GB HBM3 GPU-{i}" for i in range(8)}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case, runs, tmp_path):
    damage, why = REFUSED[case]
    damage(runs[0])
    with pytest.raises(submit.InputError, match=why) as caught:
        submit.write_submission(runs, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_runs_of_two_programs(runs, tmp_path):
    with pytest.raises(submit.InputError, match=r"another code\.zip"):
        submit.write_submission(
            [*runs, make_run(tmp_path / "c", 7, code=code_zip("pass\n"))], tmp_path / "out"
        )
    with pytest.raises(submit.InputError, match="another configuration"):
        submit.write_submission([*runs, make_run(tmp_path / "d", 7, dim=5)], tmp_path / "out")
    with pytest.raises(submit.InputError, match="no run"):
        submit.write_submission([], tmp_path / "out")


def test_the_command_without_its_places(tmp_path):
    run = make_run(tmp_path / "run", 1)
    words = "a.py --mode full --data=/home/me/data --see 3 --set steps=9 --out x --recipe golf"
    change(run, "train.json", meta=META_2 | {"command": words})
    submit.write_submission([run], tmp_path / "out")
    page = (tmp_path / "out" / "README.md").read_text()
    assert " train_gpt.py --mode full --set steps=9 --recipe golf --data DATA --seed 2 --out run\n" in page
    assert "/home" not in page


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ([], "the following arguments are required: RUN, --out; use what --help lists"),
        (["run", "--out", "out", "--colour"], "unrecognized arguments: --colour"),
        (["{run}", "--out", "{run}/out"], "a run's files lack"),
    ],
)
def test_bad_input_is_one_line(args, said, tmp_path, capsys):
    run = make_run(tmp_path / "run", 1, scores=["none"])
    assert submit.main([arg.format(run=run) for arg in args]) == 2
    stderr = capsys.readouterr().err
    assert stderr.startswith("submit.py: error: ")
    assert (stderr.count("\n"), said in stderr) == (1, True), stderr


def test_an_artifact_over_the_cap(tmp_path, monkeypatch):
    run = make_run(tmp_path / "run", 1)
    size = sum((run / name).stat().st_size for name in ("model.golf", "code.zip"))
    monkeypatch.setattr(artifact, "CAP_BYTES", size - 1)
    with pytest.raises(submit.InputError, match="at most"):
        submit.write_submission([run], tmp_path / "out")


def test_nothing_is_overwritten_or_left(runs, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("keep")
    assert submit.main([*map(str, runs), "--out", str(out)]) == 2
    assert capsys.readouterr().err.startswith("submit.py: error: ")
    assert (out / "mine").read_text() == "keep"
    (tmp_path / "file").write_text("")
    assert submit.main([*map(str, runs), "--out", str(tmp_path / "file" / "out")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert submit.main([*map(str, runs), "--out", str(tmp_path / "new"), "--author", "A"]) == 0
    assert "1.06200 bits per byte" in capsys.readouterr().out
    assert json.loads((tmp_path / "new" / "submission.json").read_text())["author"] == "A"
    assert [path.name for path in tmp_path.glob(".*")] == []
