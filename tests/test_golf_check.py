"""golf/check.py: a small trained run passes all thirteen checks, and each broken run is caught by its own."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]

from golf import artifact, check, submit, tokens  # noqa: E402  puts data/ on the path

import prepare  # noqa: E402  isort: skip

SMALL = (
    "steps=40", "batch_tokens=2048", "micro_tokens=2048", "holdout_tokens=2048",
    "calibration_tokens=4096", "cap_bytes=400000", "score=none", "val_points=1",
)  # fmt: skip
WORDS = "the cat sat on a mat while seven quick foxes jumped over many lazy dogs in old green parks".split()


def prose(rng: np.random.Generator) -> str:
    """A document that can be learnt: each word has two that may follow it."""
    place, words = int(rng.integers(len(WORDS))), []
    for _ in range(int(rng.integers(40, 120))):
        words.append(WORDS[place])
        place = (place * 3 + int(rng.integers(2))) % len(WORDS)
    return " ".join(words) + "."


@pytest.fixture(scope="module")
def run_and_data(tmp_path_factory) -> tuple[Path, Path]:
    """A run of train_golf.py of some seconds, and its data."""
    folder = tmp_path_factory.mktemp("golf")
    rng = np.random.default_rng(0)
    lines = [json.dumps({"text": prose(rng)}) + "\n" for _ in range(900)]
    (folder / "text.jsonl").write_text("".join(lines))
    args = [
        str(folder / "text.jsonl"),
        "--out",
        str(folder / "data"),
        "--tokenizer",
        "golf:320",
        "--workers",
        "1",
    ]
    prepare.main(args)
    command = [sys.executable, str(ROOT / "golf" / "train_golf.py"), "--mode", "smoke"]
    command += ["--data", str(folder / "data"), "--out", str(folder / "run")] + [
        word for change in SMALL for word in ("--set", change)
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return folder / "run", folder / "data"


@pytest.fixture
def copy(run_and_data, tmp_path) -> Path:
    """The run, to be broken."""
    return Path(shutil.copytree(run_and_data[0], tmp_path / "run"))


def only(run: Path, data: Path, *numbers: int) -> tuple[int, list[dict]]:
    """(exit code, rows of checks.json) of some checks."""
    code = check.main([str(run), "--data", str(data), "--only", ",".join(map(str, numbers))])
    return code, json.loads((run / "checks.json").read_text())["checks"]


def change_result(run: Path, **changes) -> None:
    result = json.loads((run / "result.json").read_text())
    (run / "result.json").write_text(json.dumps(result | changes))


def test_all_thirteen_pass_and_every_control_is_caught(run_and_data, capsys):
    run, data = run_and_data
    assert check.main([str(run), "--data", str(data)]) == 0
    report = json.loads((run / "checks.json").read_text())
    assert (report["passed"], report["complete"], len(report["checks"])) == (True, True, 13)
    assert [row["number"] for row in report["checks"]] == list(range(1, 14))
    assert [row["name"] for row in report["checks"] if not row["control_caught"]] == []
    assert "PermissionError" in report["checks"][0]["control_measured"]
    lines = capsys.readouterr().out.splitlines()
    assert [line.startswith("pass") for line in lines] == [True] * 13 + [False]
    assert lines[-1].startswith("13 of 13 checks passed")
    assert [path.name for path in run.glob(".*")] == []


def broken_score(run: Path) -> None:
    result = json.loads((run / "result.json").read_text())
    change_result(run, quantized_val_bpb=result["quantized_val_bpb"] - 0.01)


def no_number(run: Path) -> None:
    change_result(run, quantized_val_bpb=float("nan"))


def another_program(run: Path) -> None:
    """It scores as well, but what it does is not what the other checks have seen."""
    with zipfile.ZipFile(run / "code.zip") as archive:
        sources = {name: archive.read(name) for name in archive.namelist()}
    proof = f"import os\nos.system('touch {run / 'proof'}')\n"  # a child process: the sandbox does not see it
    sources["golf/score.py"] = proof.encode() + sources["golf/score.py"]
    with zipfile.ZipFile(run / "code.zip", "w") as archive:
        for name, text in sources.items():
            archive.writestr(name, text)


def bomb(run: Path) -> None:
    """A program that is 1 GB of spaces, in 1 MB."""
    with zipfile.ZipFile(run / "code.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open("golf/score.py", "w", force_zip64=True) as file:
            for _ in range(1 << 10):
                file.write(b" " * (1 << 20))


def broken_total(run: Path) -> None:
    (run / "code.zip").write_bytes((run / "code.zip").read_bytes() + b"\0")


def broken_scores(run: Path) -> None:
    """A part of the split, reported as the whole."""
    result = json.loads((run / "result.json").read_text())
    result["scores"]["none"]["tokens"] //= 5
    change_result(run, scores=result["scores"])


def better_score(run: Path, **changes) -> None:
    """A score that the artifact does not have, beside the true one of mode none."""
    result = json.loads((run / "result.json").read_text())
    row = result["scores"]["none"]
    change_result(run, scores={**result["scores"], "sliding": {**row, "val_bpb": 0.9} | changes})


def other_loss(run: Path) -> None:
    """Nats a token that are not the bits a byte beside them."""
    result = json.loads((run / "result.json").read_text())
    change_result(run, scores={"none": {**result["scores"]["none"], "val_loss": 1.0}})


def untrained(run: Path) -> None:
    """The artifact of the initial weights, as an average that never moves would ship it."""
    from golf import train_golf as golf

    meta, tensors = artifact.unpack((run / "model.golf").read_bytes())
    cfg = golf.Config(**{k: tuple(v) if isinstance(v, list) else v for k, v in meta["config"].items()})
    weights = dict(golf.Golf(cfg, meta["vocab_size"], 1, golf.torch.float32).named_parameters())
    tensors = golf.quantize(
        {name: p.detach() for name, p in weights.items()}, {}, cfg, meta["stretch"], "rtn"
    )
    (run / "model.golf").write_bytes(artifact.pack(meta, tensors))


def broken_gap(run: Path) -> None:
    """Whatever the run says of the gap itself."""
    result = json.loads((run / "result.json").read_text())
    change_result(run, gap_bpb=0.0, val_bpb=result["quantized_val_bpb"] / 3)


def broken_promise(run: Path) -> None:
    change_result(run, promises_not_kept=["training data was read until 604.3 s of 600 s; raise reserve"])


def hidden_promise(run: Path) -> None:
    log = (run / "train.txt").read_text()
    (run / "train.txt").write_text(log.replace("\nstatus: done", "\nstatus: crashed: promise not kept"))


def late_score(run: Path) -> None:
    better_score(run, seconds=601.0)


def no_schedule(run: Path) -> None:
    log = (run / "train.txt").read_text()
    (run / "train.txt").write_text(log.replace("\nschedule: ", "\n"))


BROKEN = {
    "another score": (broken_score, 1, "1.0e-02 at most from what the run reports"),
    "a better score in another mode": (better_score, 1, "at most from what the run reports"),
    "no number for a score": (
        lambda run: change_result(run, quantized_val_bpb=float("nan")),
        1,
        "inf at most",
    ),
    "another program": (another_program, 1, "code.zip is not this program"),
    "a bomb for a program": (bomb, 1, "code.zip is not this program"),
    "a byte more of code": (broken_total, 2, "code.zip"),
    "part of the split": (broken_scores, 3, "a score differs"),
    "a loss that is not the score": (other_loss, 3, "a score differs"),
    "a quantiser that ruins the model": (broken_gap, 9, "gap 200"),
    "initial weights": (untrained, 10, "has moved 0.0 roundings"),
    "a promise not kept": (broken_promise, 11, "604.3 s"),
    "a promise not kept, in the log alone": (hidden_promise, 11, "promise not kept"),
    "a score after its time": (late_score, 11, "score sliding over its budget"),
    "a schedule that nobody saw": (no_schedule, 11, "schedule"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_run_is_caught(case, copy, run_and_data):
    damage, number, why = BROKEN[case]
    damage(copy)
    code, (row,) = only(copy, run_and_data[1], number)
    assert (code, row["passed"], row["holds"]) == (1, False, False)
    assert why in row["measured"]
    assert not (copy / "proof").exists(), "a foreign program was run"


def test_a_control_that_is_not_caught_fails_the_check(run_and_data, copy, monkeypatch, capsys):
    blind = check.Check("total bytes", check.total_bytes, check.total_bytes, "nothing")
    monkeypatch.setattr(check, "CHECKS", (check.CHECKS[0], blind, *check.CHECKS[2:]))
    code, (row,) = only(copy, run_and_data[1], 2)
    assert (code, row["passed"], row["holds"], row["control_caught"]) == (1, False, True, False)
    assert "CONTROL NOT CAUGHT (nothing" in capsys.readouterr().out


def test_a_control_that_breaks_has_shown_nothing(run_and_data, copy, monkeypatch):
    broken = check.Check("total bytes", check.total_bytes, lambda case: 1 / 0, "division by zero")
    monkeypatch.setattr(check, "CHECKS", (check.CHECKS[0], broken, *check.CHECKS[2:]))
    code, (row,) = only(copy, run_and_data[1], 2)
    assert (code, row["passed"], row["holds"], row["control_caught"]) == (1, False, True, False)


def test_nothing_compiled_comes_from_the_run(run_and_data, monkeypatch):
    """What was compiled earlier is not opened: the program alone must give the score."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/warm")
    monkeypatch.setenv("TRITON_CACHE_DIR", "/warm")
    seen = []

    def run(command, **options):
        seen.append((command, options["env"]))
        return subprocess.CompletedProcess(command, 1, "", "PermissionError: opened /warm\n\nSet VERBOSE=1")

    monkeypatch.setattr(check.subprocess, "run", run)
    case = check.Case.open(*run_and_data, check.tg.Ranks.from_torchrun())
    assert check.score_alone(case, "none", "") == (None, "PermissionError: opened /warm")
    assert check.score_alone(case, "lora", "") == (None, "PermissionError: opened /warm")
    (command, env), (_, second) = seen
    allowed = command[command.index(check.SANDBOX) + 1].split(":")
    for key in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        assert env[key] in allowed
        assert not os.listdir(env[key])
        assert env[key] == second[key]  # modes share what they compile
    assert "/warm" not in allowed


def test_the_error_is_named():
    named = "torch._inductor.exc.InductorError: PermissionError: opened /a"
    assert check.last_error(f"Traceback\n  at x\n{named}\n\nSet TORCHDYNAMO_VERBOSE=1 for more\n") == named
    assert check.last_error("score.py: error: no\n") == "score.py: error: no"
    assert check.last_error("\n") == ""


def test_order_of_events():
    def of(*rows):
        return check.order_of([check.score.Event(*row) for row in rows])

    assert of(("score", -1, 0, 8), ("update", -1, 0, 8), ("score", -1, 8, 16)) == ""
    assert of(("score", 0, 0, 8), ("update", 0, 0, 8), ("score", 3, 0, 8)) == ""  # another state
    assert "before it is scored" in of(("update", -1, 0, 8), ("score", -1, 0, 8))
    assert "before it is scored" in of(("score", -1, 0, 8), ("update", -1, 0, 9))
    assert "after it has learnt" in of(("score", 1, 0, 8), ("update", 1, 0, 8), ("score", 1, 7, 9))


def test_significance_has_a_unit():
    args = check.NEW_SEEDS, check.BASE_SEEDS, 0.005
    assert (
        check.significance(*args, "nats/token", 3.727)
        < 0.01
        < 0.99
        < check.significance(*args, "nats/byte", 3.727)
    )
    with pytest.raises(check.InputError, match="nats of what"):
        check.significance(*args, "nats", 3.727)
    with pytest.raises(check.InputError, match="2"):
        check.significance([1.0], check.BASE_SEEDS, 0.005, "nats/byte", 3.727)


WRONG = {
    "no such run": (["gone", "--data", "{data}"], "no model.golf"),
    "no such data": (["{run}", "--data", "gone"], "gone"),
    "check 14": (["{run}", "--data", "{data}", "--only", "14"], "from 1 to 13"),
    "check x": (["{run}", "--data", "{data}", "--only", "x"], "from 1 to 13"),
    "no run": (["--data", "{data}"], "logs/golf: holds no run"),
}


@pytest.mark.parametrize("case", WRONG)
def test_bad_input_is_one_line(case, run_and_data, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args, why = WRONG[case]
    run, data = run_and_data
    assert check.main([arg.format(run=run, data=data) for arg in args]) == 2
    stderr = capsys.readouterr().err
    assert stderr.count("\n") == 1
    assert stderr.startswith("check.py: error: ")
    assert why in stderr


def test_the_newest_run_is_checked_by_default(run_and_data, tmp_path, monkeypatch, capsys):
    run, data = run_and_data
    monkeypatch.chdir(tmp_path)
    shutil.copytree(run, tmp_path / "logs" / "golf" / "one")
    assert check.main(["--data", str(data), "--only", "13"]) == 0
    assert "run: logs/golf/one" in capsys.readouterr().out
    shutil.copytree(data, tmp_path / "other")
    with (tmp_path / "other" / "manifest.json").open("a") as file:
        file.write(" ")
    assert check.main(["--data", "other", "--only", "13"]) == 2
    assert "other: is not the data of logs/golf/one" in capsys.readouterr().err


def test_what_is_no_artifact_is_bad_input(copy, run_and_data, capsys):
    (copy / "model.golf").write_bytes(b"PK\x03\x04 not an artifact, but a zip of sorts")
    assert check.main([str(copy), "--data", str(run_and_data[1])]) == 2
    assert "no artifact: begins with" in capsys.readouterr().err
    (copy / "result.json").write_text("{")
    assert check.main([str(copy), "--data", str(run_and_data[1])]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_checked_run_can_be_submitted(run_and_data, tmp_path):
    """The whole way: the folder's own train_gpt.py scores the artifact as the run did."""
    run, data = run_and_data
    if not (run / "checks.json").is_file():  # this test alone
        assert check.main([str(run), "--data", str(data)]) == 0
    facts = submit.write_submission([run], tmp_path / "out")
    assert (facts["track"], facts["seeds"], facts["scoring"]) == ("track_non_record_16mb", [1], "none")
    command = [sys.executable, "train_gpt.py", "score", str(run / "model.golf"), "--mode", "none"]
    command += ["--tokenizer", str(data / "golf320.model"), "--val", *map(str, data.glob("*_val_*.bin"))]
    command += ["--json", str(tmp_path / "score.json")]
    done = subprocess.run(command, cwd=tmp_path / "out", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "score.json").read_text())
    assert found["val_bpb"] == pytest.approx(facts["val_bpb"], abs=1e-6)


def test_the_tokenizer_of_the_run_is_the_contests(run_and_data):
    tokenizer = tokens.load_tokenizer(run_and_data[1])
    assert tokenizer.library.processor.pad_id() == 0
