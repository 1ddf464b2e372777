"""recordbook/sources.py: the sources of every kind of log come out byte for byte, or not at all."""

import gzip
import hashlib
import lzma
import os
import subprocess
import sys
from pathlib import Path

import pytest

import compare_runs as cr
from recordbook import sources as so

ROOT = Path(__file__).resolve().parents[1]
PUBLISHED = ROOT.parent / "shared" / "logs"
RULE = "=" * 100
TRAINER = "import torch\n\nlr = 1\n"
KERNELS = "# kernels\nimport triton\n"
META = {"run_id": "r", "host": "n", "cpu": "x, 2 cores", "data": "sha256=" + "d" * 64, "recipe": "tiny"}
META |= {"seed": "1", "world_size": "1", "fp8": "no", "command": "/x/train_gpt.py --seed 1 --out a.txt"}
published = pytest.mark.skipif(
    not PUBLISHED.is_dir(), reason="the published logs are not beside the checkout"
)


def sha(text: bytes) -> str:
    return hashlib.sha256(text).hexdigest()


def our_log(files: dict[str, bytes], tail: str = "status: done\n", **meta: str) -> bytes:
    """A log as train_gpt.py's Log.header writes it, reimplemented."""
    out = []
    for name, text in files.items():
        lines = text.decode().removesuffix("\n").split("\n")
        out += [f"#### source {name} sha256={sha(text)} lines={len(lines)}", *lines]
    out += [RULE, "Running Python 3.12.1 (main)", "Running PyTorch 2.11.0+cpu compiled for CUDA None"]
    out += ["Running Triton version 3.6.0", *(f"{k}: {v}" for k, v in (META | meta).items()), RULE]
    out += ["step:0/2 val_loss:6.9000 train_time:0ms step_avg:0.00ms"]
    out += ["step:2/2 val_loss:4.1000 train_time:70ms step_avg:35.00ms"]
    return ("\n".join(out) + "\n" + tail).encode()


def their_log(code: str, year: int = 2025, further: dict[str, str] | None = None) -> bytes:
    """A log of the community as its programs write it."""
    for name, text in (further or {}).items():
        code += f"\n\n{'-' * 40}\n# {name}\n{'-' * 40}\n\n{text}"
    head = f"{RULE}\n{code}{RULE}\n" if year == 2024 else f"{code}\n{RULE}\n"
    versions = (
        "Running pytorch 2.4.1 compiled for CUDA 12.1\n" if year == 2024 else "Running Python 3.12.1 (x)\n"
    )
    rows = f"step:0/2 val_loss:9.0000 train_time:0ms step_avg:nanms\n{RULE}\n"
    return (
        f"{head}{versions}{RULE}\n{rows}step:2/2 val_loss:3.2000 train_time:70ms step_avg:35.00ms\n".encode()
    )


def written(folder: Path, data: bytes, name: str = "log.txt") -> Path:
    (folder / name).write_bytes(data)
    return folder / name


def refusal(call, *args) -> str:
    """The one line of an InputError."""
    with pytest.raises(cr.InputError) as caught:
        call(*args)
    message = str(caught.value)
    assert "\n" not in message
    assert ";" in message or ":" in message
    return message


# extraction -------------------------------------------------------------------------------------------------

TEXTS = {
    "newline": b"import torch\nx = 1\n",
    "no newline": b"import torch\nx = 1",
    "empty": b"",
    "blank": b"\n",
    "blank lines at the end": b"import os\n\n\n",
    "rules, headers and titles inside": f"import os\n{RULE}\n#### source a sha256={'0' * 64} lines=3\n"
    f"\n\n{'-' * 40}\n# b.py\n{'-' * 40}\n\nstep:1/2 val_loss:1\n{RULE}\nRunning Python 3\n".encode(),
    "carriage returns": b"import os\r\nx = 1\r\n",
    "other line ends": "x = 'a\x0bb\x0c\u2028\x85c\rd'\n".encode(),
    "unicode": "μ = 'ü 漢'\n".encode(),
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())
def test_our_sources_come_back_byte_for_byte(text):
    files = {"train_gpt.py": TRAINER.encode(), "odd name.py": text, "last.py": KERNELS.encode()}
    found = so.sources_of(our_log(files))
    assert {s.name: s.text for s in found} == files
    assert all(s.agrees and s.sha256 == s.declared == sha(s.text) for s in found)


def test_the_trainer_writes_what_is_read_here(tmp_path):
    """Log.header itself, not this file's copy of it."""
    import train_gpt

    log = train_gpt.Log(tmp_path / "run.txt", is_master=True)
    paths = [ROOT / "train_gpt.py", ROOT / "triton_kernels.py"]
    log.header(paths, META)
    log.close("done", {})
    data = (tmp_path / "run.txt").read_bytes()
    assert [(s.name, s.text, s.agrees) for s in so.sources_of(data)] == [
        (p.name, p.read_bytes(), True) for p in paths
    ]
    copied = our_log({p.name: p.read_bytes() for p in paths})
    assert data.split(b"Running")[0] == copied.split(b"Running")[0]


@pytest.mark.parametrize("year", [2024, 2025])
def test_their_source(year):
    (found,) = so.sources_of(their_log(TRAINER, year))
    assert (found.name, found.text, found.declared, found.agrees) == (
        "train_gpt.py",
        TRAINER.encode(),
        None,
        None,
    )


def test_their_further_files():
    files = {"triton_kernels.py": KERNELS, "dc_kernels.py": "import os"}
    found = so.sources_of(their_log(TRAINER, further=files))
    assert [(s.name, s.text.decode()) for s in found] == [("train_gpt.py", TRAINER), *files.items()]


def test_their_source_may_hold_what_a_log_holds():
    """The end is the rule above the versions, and a docstring may show a step line."""
    code = f'"""\n{RULE}\nstep:1/2 val_loss:1 train_time:1ms\n"""\nimport os\n'
    (found,) = so.sources_of(their_log(code))
    assert found.text == code.encode()


def test_a_log_with_windows_line_ends():
    files = {"train_gpt.py": TRAINER.encode(), "k.py": KERNELS.encode()}
    assert so.sources_of(our_log(files).replace(b"\n", b"\r\n")) == so.sources_of(our_log(files))
    assert so.sources_of(their_log(TRAINER).replace(b"\n", b"\r\n"))[0].text == TRAINER.encode()


def test_hash_mismatch_is_returned_and_not_used(tmp_path):
    data = our_log({"train_gpt.py": TRAINER.encode()}).replace(b"lr = 1", b"lr = 2")
    (found,) = so.sources_of(data)
    assert found.agrees is False
    log = written(tmp_path, data)
    for call in (lambda: so.replay(log, tmp_path / "out"), lambda: so.diff(log, log)):
        message = refusal(call)
        assert "log.txt" in message
        assert "train_gpt.py" in message
        assert "declares" in message
    assert not (tmp_path / "out").exists()


def test_a_wrong_line_count_does_not_agree():
    data = our_log({"train_gpt.py": TRAINER.encode()})
    for wrong in (b"lines=2", b"lines=4"):
        assert [s.agrees for s in so.sources_of(data.replace(b"lines=3", wrong))] == [False]


OURS, THEIRS = our_log({"train_gpt.py": TRAINER.encode(), "k.py": KERNELS.encode()}), their_log(TRAINER)
REFUSED = {
    "empty": (b"\n", "is empty"),
    "binary": (b"import os\n\0", "binary"),
    "prose": (b"# Notes\nnothing here\n", "not a run log"),
    "llm.c": (b"s:0 tel:11.0\ns:1 trl:10.9 lr:1\n", "holds no source"),
    "console of the contest": (b"W0318 warn\nstep:0/2 val_loss:6.9 val_bpb:4\n", "holds no source"),
    "a rule alone": (
        f"{RULE}\nRunning Python 3.12\n{RULE}\nstep:0/1 val_loss:1\n".encode(),
        "holds no source",
    ),
    "not a source": (f"hello\n{RULE}\nRunning Python 3\n".encode(), "is no source"),
    "cut, ours, in a text": (OURS[: OURS.index(b"lr = 1")], "of the 3 lines"),
    "cut, ours, in a line": (OURS[: OURS.index(b"import triton") + 3], "cut"),
    "cut, ours, between files": (OURS[: OURS.rindex(b"#### source")], "cut or altered after"),
    "cut, ours, in a header": (OURS[:40], "header is damaged"),
    "cut, theirs": (THEIRS[: THEIRS.index(b"=")], "cut in its source"),
    "cut, theirs, 2024": (their_log(TRAINER, 2024)[:110], "cut in its source"),
    "two writers": (b'"""\nThe step:0/2 x\nstep:0/2 val_loss:6.9\nimport os\n' + THEIRS, "mixed"),
    "no rule of its own": (f"{RULE}\nimport os{RULE}\nRunning pytorch 2\n{RULE}\n".encode(), "mixed"),
}


@pytest.mark.parametrize(("data", "why"), REFUSED.values(), ids=REFUSED.keys())
def test_refused_logs(tmp_path, data, why):
    log = written(tmp_path, data)
    if b"\0" not in data:
        assert why in refusal(so.sources_of, data, "x.txt")
    message = refusal(so.replay, log, tmp_path / "out")
    assert why in message
    assert message.startswith(str(log))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["log.txt"]


def test_every_cut_gives_sources_or_one_line():
    """At any byte: what is returned is whole, what is not is refused."""
    for data in (OURS, THEIRS, their_log(TRAINER, 2024, {"k.py": KERNELS})):
        full = so.sources_of(data)
        for end in range(len(data)):
            try:
                found = so.sources_of(data[:end])
            except cr.InputError:
                continue
            assert found == full or any(s.agrees is False for s in found), end


# published logs ---------------------------------------------------------------------------------------------


def published_logs() -> list[Path]:
    return [Path(p) for p in cr.logs_under(str(PUBLISHED))] if PUBLISHED.is_dir() else []


@published
def test_every_published_log_yields_its_source_or_says_why():
    """All but one are shortened to the hash of their source; two formats never had one."""
    logs, kinds = published_logs(), {"text": 0, "hash": 0, "none": 0}
    for path in logs:
        data = cr.read_log(str(path))
        run = cr.parse_log(data, path.name, str(path))[0]
        if path.name in ("main.log", "train.log"):
            assert "holds no source" in refusal(so.sources_of, data)
            assert run.source is None
            kinds["none"] += 1
            continue
        (source,) = so.sources_of(data)
        if source.text is None:
            assert run.source == source.sha256 == source.declared
            kinds["hash"] += 1
        else:  # 2024: compare_runs.py hashes the text without its last newline
            assert source.text.startswith(b"import os\n")
            assert source.text.endswith(b"\n")
            assert so.is_python(source.text)
            assert run.source == sha(source.text[:-1])
            kinds["text"] += 1
    assert len(logs) > 50
    assert kinds == {"text": 1, "hash": len(logs) - 3, "none": 2}


@published
def test_published_logs_replay_and_differ(tmp_path):
    whole = next(PUBLISHED.glob("2024-10-14*/*.txt"))
    (source,) = so.replay(whole, tmp_path / "out")
    assert (tmp_path / "out" / "train_gpt.py").read_bytes() == source.text
    about = (tmp_path / "out" / so.README).read_text()
    assert "torchrun --standalone --nproc_per_node=8 train_gpt.py" in about
    old, new = sorted((PUBLISHED / "2026-01-18_UnifiedOptimizers").iterdir())
    log = next(new.iterdir())
    assert "left out" in refusal(so.replay, log, tmp_path / "no")
    text = so.diff_command([str(old), str(new)])
    assert "train_gpt.py: differs (sha256 ac1067d23b" in text
    assert "-steps: 1775\n+steps: 1765\n" in text
    mixed = refusal(so.log_of, str(PUBLISHED / "2025-09-05_SkipMLPBlocks"))
    assert "2 different sources" in mixed


@pytest.mark.parametrize("year", [2024, 2025])
def test_compare_runs_hashes_the_same_source(year):
    """One hash a log there, one a file here: they agree, but for the last newline of 2024."""
    data = their_log(TRAINER, year)
    (source,) = so.sources_of(data)
    assert cr.parse_log(data, "", "")[0].source == sha(source.text[:-1] if year == 2024 else source.text)
    files = so.sources_of(OURS)
    assert cr.parse_log(OURS, "", "")[0].sources == {s.name: s.sha256 for s in files}


# replay -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pack", [bytes, gzip.compress, lzma.compress], ids=["plain", "gz", "xz"])
def test_replay_writes_what_ran(tmp_path, pack):
    name = {bytes: "log.txt", gzip.compress: "log.txt.gz", lzma.compress: "log.txt.xz"}[pack]
    log, out = written(tmp_path, pack(OURS), name), tmp_path / "out"
    so.replay(log, out)
    assert (out / "train_gpt.py").read_text() == TRAINER
    assert (out / "k.py").read_text() == KERNELS
    about = (out / so.README).read_text()
    facts = ["python train_gpt.py --seed 1\n", "Python 3.12.1", "PyTorch 2.11.0+cpu", "recipe tiny"]
    facts += ["sha256=" + "d" * 64, sha(OURS), sha(TRAINER.encode()), "/x/train_gpt.py --seed 1 --out a.txt"]
    assert [fact for fact in facts if fact not in about] == []
    assert {p.name for p in out.iterdir()} == {"train_gpt.py", "k.py", so.README}
    assert {p.name for p in tmp_path.iterdir()} == {name, "out"}


def test_replayed_trainer_runs(tmp_path):
    files = {name: (ROOT / name).read_bytes() for name in ("train_gpt.py", "triton_kernels.py")}
    text = so.replay_command([str(written(tmp_path, our_log(files))), str(tmp_path / "out")])
    assert sha(files["train_gpt.py"]) in text
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "train_gpt.py", "--help"], cwd=tmp_path / "out", env=environment,
                          capture_output=True, text=True, timeout=120)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "--recipe" in done.stdout


HOSTILE = [
    "../x.py",
    "/etc/x.py",
    "a/b.py",
    "a\\b.py",
    "..",
    ".",
    ".bashrc",
    "-x.py",
    "C:x.py",
    "x.py ",
    "x.",
]
HOSTILE += ["README.txt", "readme.TXT", "a\tb.py", "\x1b[2Jx.py", "x" * 250, "train_gpt.py", "TRAIN_GPT.py"]


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names(tmp_path, name):
    data = our_log({"train_gpt.py": TRAINER.encode()})
    second = f"#### source {name} sha256={sha(b'x')} lines=1\nx\n".encode()
    log = written(tmp_path, data.replace(RULE.encode(), second + RULE.encode(), 1))
    message = refusal(so.replay, log, tmp_path / "out")
    assert message.isprintable()
    assert os.listdir(tmp_path) == ["log.txt"]


def test_hostile_title(tmp_path):
    """A community log names its further files too."""
    log = written(tmp_path, their_log(TRAINER, further={"../x.py": "import os\n"}))
    assert "plain file name" in refusal(so.replay, log, tmp_path / "out")


def test_nothing_is_overwritten(tmp_path, monkeypatch):
    log = written(tmp_path, OURS)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    assert "nothing is overwritten" in refusal(so.replay, log, tmp_path / "full")
    assert os.listdir(tmp_path / "full") == ["mine"]
    assert "is a file" in refusal(so.replay, log, log)
    assert "create the outer one" in refusal(so.replay, log, tmp_path / "no" / "out")
    (tmp_path / "empty").mkdir()
    so.replay(log, tmp_path / "empty")
    assert (tmp_path / "empty" / "k.py").is_file()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert "in use" in refusal(so.replay, log, ".")


def test_a_failure_leaves_nothing(tmp_path, monkeypatch):
    log = written(tmp_path, OURS)

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(so.os, "rename", full)
    assert "No space left" in refusal(so.replay, log, tmp_path / "out")
    assert os.listdir(tmp_path) == ["log.txt"]


def test_run_line():
    def line(**meta):
        data = our_log({"train_gpt.py": b"x\n"}, **meta)
        return so.run_line(cr.parse_log(data, "", "")[0], so.fields_of(data), "train_gpt.py")

    assert line(command="my/train_gpt.py --out=a --data d") == "python train_gpt.py --data d"
    assert line(command="train_gpt.py --out a", world_size="8").endswith("--nproc_per_node=8 train_gpt.py")
    assert line(command="") == "python train_gpt.py"
    assert line(command="x_train_gpt.py --seed 2") == "python train_gpt.py --seed 2"


# diff -------------------------------------------------------------------------------------------------------


def numbered(count: int, **changed: str) -> bytes:
    lines = [changed.get(f"n{i}", f"line {i}") for i in range(count)]
    return ("\n".join(lines) + "\n").encode()


def diff_of(tmp_path: Path, a: bytes, b: bytes) -> str:
    return so.diff(written(tmp_path, a, "a.txt"), written(tmp_path, b, "b.txt"))


def test_diff_folds_unchanged_parts(tmp_path):
    old = {"train_gpt.py": numbered(200), "k.py": KERNELS.encode()}
    new = {"train_gpt.py": numbered(200, n100="new\nnewer"), "k.py": KERNELS.encode()}
    text = diff_of(tmp_path, our_log(old), our_log(new, fp8="head", run_id="other", started="later"))
    body = text[text.index("--- a/train_gpt.py") :].splitlines()[2:]
    assert body[:4] == ["@@ ... 97 unchanged lines @@", " line 97", " line 98", " line 99"]
    assert body[4:7] == ["-line 100", "+new", "+newer"]
    assert body[7:] == [" line 101", " line 102", " line 103", "@@ ... 96 unchanged lines @@"]
    assert "train_gpt.py: 2 lines added, 1 removed\n" in text
    assert "k.py: the same" in text
    assert "settings that differ:\n-fp8: no\n+fp8: head\n\n" in text


def test_a_fold_hides_at_least_four_lines(tmp_path):
    """Between two changes: 9 unchanged lines are shown, 10 are folded to 3 + 1 + 3."""
    for gap, folded in ((9, False), (10, True)):
        new = numbered(40, n10="A", **{f"n{11 + gap}": "B"})
        text = diff_of(tmp_path, our_log({"t.py": numbered(40)}), our_log({"t.py": new}))
        assert ("@@ ... 4 unchanged lines @@" in text) == folded


def test_a_diff_can_be_undone():
    """The lines of both sides come back from the opcodes; equal ends do not hide a change."""
    cases = [
        ("", ""),
        ("a", ""),
        ("abc", "abc"),
        ("aaa", "aa"),
        ("abab", "ab"),
        ("xaby", "xbay"),
        ("aXa", "aa"),
    ]
    for old, new in cases:
        codes = so.opcodes(list(old), list(new))
        assert "".join(old[i:j] for _, i, j, _, _ in codes) == old
        assert "".join(new[k:m] for *_, k, m in codes) == new
        assert all((old[i:j] == new[k:m]) == (tag == "equal") for tag, i, j, k, m in codes)
        _, added, removed = so.diff_lines(list(old), list(new))
        assert added - removed == len(new) - len(old)


def test_diff_of_files(tmp_path):
    """Trainers of different names are one pair; other files are new or gone."""
    a = our_log({"train_gpt.py": TRAINER.encode(), "old.py": b"x\n"})
    b = our_log({"candidate.py": TRAINER.replace("1", "2").encode(), "new.py": b"y"})
    text = diff_of(tmp_path, a, b)
    assert "train_gpt.py -> candidate.py: 1 lines added, 1 removed\n" in text
    assert "old.py: only in the first log, 1 lines\n" in text
    assert "new.py: only in the second log, 1 lines\n" in text
    assert "+y\n\\ No newline at end of file\n" in text
    same = diff_of(tmp_path, a, a)
    assert "the same" in same
    assert "no setting that the headers state differs" in same


def test_diff_escapes_what_a_terminal_obeys(tmp_path):
    a, b = our_log({"t.py": b"x\n"}), our_log({"t.py": b"\tx\x1b[2J\n"}, recipe="\x1b[2J")
    text = diff_of(tmp_path, a, b)
    assert "\x1b" not in text
    assert "+\tx\\x1b[2J\n" in text


def test_diff_of_two_eras(tmp_path):
    text = diff_of(
        tmp_path, our_log({"train_gpt.py": TRAINER.encode()}), their_log(TRAINER.replace("1", "3"))
    )
    assert "train_gpt.py: 1 lines added, 1 removed" in text
    assert "-recipe: tiny\n" in text


def test_command_lines(tmp_path):
    log = written(tmp_path, OURS)
    assert "2 file(s)" in so.replay_command([str(log), str(tmp_path / "out")])
    assert "the same" in so.diff_command([str(log), str(tmp_path)])
    for call, argv in (
        (so.replay_command, [str(log)]),
        (so.diff_command, [str(log), str(tmp_path / "none")]),
    ):
        assert refusal(call, argv)
    for call in (so.replay_command, so.diff_command):
        with pytest.raises(SystemExit):
            call(["--help"])


def test_import_is_light():
    """compare_runs.py --help must stay quick: no numbers are loaded for text."""
    heavy = "[m for m in ('numpy', 'scipy', 'torch') if m in sys.modules]"
    code = f"import sys, recordbook.sources, recordbook.tracks; print({heavy})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout == "[]\n", done.stderr
