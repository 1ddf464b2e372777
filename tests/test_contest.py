"""data/contest.py with a hub of our own: the contest's shards, whole, checked, and the same the next time."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "data"))

import contest  # noqa: E402
import shards  # noqa: E402
import vocab  # noqa: E402

from golf import tokens  # noqa: E402

WORDS = "the cat sat on a mat while seven quick foxes jumped over many lazy dogs in old green parks".split()
SIZE, VAL_DOCUMENTS = 320, 20
MODEL = f"fineweb_{SIZE}_bpe.model"
TRAIN_0, TRAIN_1 = "fineweb_train_000000.bin", "fineweb_train_000001.bin"


def prose(seed: int) -> str:
    rng = np.random.default_rng(seed)
    return f"Note {seed}: " + " ".join(rng.choice(WORDS, 40)) + "."


class Hub:
    """Serves the contest's files from memory, under the names that it has for them."""

    def __init__(self):
        model = vocab.train_sentencepiece([prose(i) for i in range(200)], SIZE, "golf")
        self.tokenizer = vocab.SentencePiece("sp", MODEL, model)
        self.files = {f"datasets/tokenizers/{MODEL}": model}
        counts = {contest.VAL: VAL_DOCUMENTS, TRAIN_0: 30, TRAIN_1: 40}
        for i, (name, count) in enumerate(counts.items()):
            documents = [[1, *self.tokenizer.encode(prose(1000 * i + k))] for k in range(count)]
            ids = np.concatenate(documents).astype("<u2")
            data = shards.header(len(ids)) + ids.tobytes()
            self.files[f"datasets/datasets/fineweb10B_sp{SIZE}/{name}"] = data
        self.asked, self.is_up, self.tells = [], True, True

    def checksums(self, variant, names):
        if not self.is_up:
            raise ConnectionError("no route\nto the hub")
        remote = {name: variant.remote(name) for name in names}
        found = {name: self.files[path] for name, path in remote.items() if path in self.files}
        return {
            name: hashlib.sha256(data).hexdigest() if self.tells else None for name, data in found.items()
        }

    def fetch(self, variant, name, folder):
        if not self.is_up:
            raise ConnectionError("no route to the hub")
        self.asked.append(name)
        (folder / name).write_bytes(self.files[variant.remote(name)])
        return folder / name


@pytest.fixture
def hub(monkeypatch) -> Hub:
    hub = Hub()
    monkeypatch.setattr(contest, "hub_checksums", hub.checksums)
    monkeypatch.setattr(contest, "hub_fetch", hub.fetch)
    monkeypatch.setattr(contest, "VAL_DOCUMENTS", VAL_DOCUMENTS)
    monkeypatch.setitem(contest.VARIANTS, "sp320", contest.Variant("someone/parameter-golf", SIZE))
    return hub


def run(folder: Path, num_train: int = 1) -> None:
    contest.main(["sp320", str(num_train), "--out", str(folder)])


def test_a_true_manifest_and_bytes(tmp_path, hub):
    out = tmp_path / "set"
    run(out, 2)
    manifest = json.loads((out / "manifest.json").read_text())
    assert hub.asked == [MODEL, contest.VAL, TRAIN_0, TRAIN_1]
    assert [row["file"] for row in manifest["splits"]["train"]["shards"]] == [TRAIN_0, TRAIN_1]
    assert manifest["splits"]["val"]["documents"] == VAL_DOCUMENTS
    assert manifest["tokenizer"]["bos_id"] == 1
    assert {path.name for path in out.iterdir()} == {
        MODEL, contest.VAL, TRAIN_0, TRAIN_1, "manifest.json", "token_bytes.npy",
    }  # fmt: skip
    tokenizer = tokens.load_tokenizer(out)
    for row in manifest["splits"]["train"]["shards"]:
        ids = np.fromfile(out / row["file"], "<u2", offset=1024).astype(np.int64)
        assert row["bytes"] == len(tokenizer.decode(ids))
        assert row["bytes"] == tokenizer.bytes_of_targets(ids[:-1], ids[1:]).sum()
        assert row["sha256"] == hashlib.sha256((out / row["file"]).read_bytes()).hexdigest()


def test_the_trainer_reads_it(tmp_path, hub):
    import train_gpt

    run(tmp_path / "set")
    corpus = train_gpt.Corpus.open(tmp_path / "set")
    assert (corpus.vocab_size, corpus.bos_id, len(corpus.train), len(corpus.val)) == (SIZE, 1, 1, 1)


def test_the_next_call_needs_no_hub_and_more_shards_are_added(tmp_path, hub, capsys):
    run(tmp_path / "set")
    hub.is_up, hub.asked = False, []
    run(tmp_path / "set")
    assert "up to date" in capsys.readouterr().out
    hub.is_up = True
    run(tmp_path / "set", 2)
    assert hub.asked == [TRAIN_1]
    (tmp_path / "set" / TRAIN_0).unlink()
    run(tmp_path / "set", 1)
    assert hub.asked == [TRAIN_1, TRAIN_0]
    manifest = json.loads((tmp_path / "set" / "manifest.json").read_text())
    assert len(manifest["splits"]["train"]["shards"]) == 2


def test_without_checksums_the_first_fetch_is_recorded(tmp_path, hub, capsys):
    """And what differs from it later is refused, though its header is right."""
    hub.tells = False
    run(tmp_path / "set")
    out = capsys.readouterr().out
    assert "no checksum is known of" in out
    assert "recorded in manifest.json" in out
    (tmp_path / "set" / TRAIN_0).unlink()
    remote = f"datasets/datasets/fineweb10B_sp{SIZE}/{TRAIN_0}"
    good = hub.files[remote]
    hub.files[remote] = good[:-2] + b"\5\0"
    with pytest.raises(shards.UserError, match="what the hub sent is not right"):
        run(tmp_path / "set")
    hub.files[remote] = good
    run(tmp_path / "set")
    assert "no checksum" not in capsys.readouterr().out


def test_a_file_that_was_published_anew_is_refused(tmp_path, hub):
    run(tmp_path / "set")
    path = contest.VARIANTS["sp320"].remote(contest.VAL)
    hub.files[path] = hub.files[path][:-2] + b"\5\0"
    with pytest.raises(shards.UserError, match="published anew"):
        run(tmp_path / "set", 2)
    assert (tmp_path / "set" / contest.VAL).is_file()


@pytest.mark.parametrize("name", [MODEL, contest.VAL])
def test_what_the_hub_sends_is_checked(tmp_path, hub, monkeypatch, name):
    def corrupt(variant, asked, folder):
        path = hub.fetch(variant, asked, folder)
        if asked == name:
            path.write_bytes(path.read_bytes()[:-2] + b"\5\0")

    monkeypatch.setattr(contest, "hub_fetch", corrupt)
    with pytest.raises(shards.UserError, match=name.replace(".", r"\.")):
        run(tmp_path / "set")
    assert not (tmp_path / "set" / name).exists()
    assert not (tmp_path / "set" / "manifest.json").exists()


def test_a_part_of_the_split_is_not_the_split(tmp_path, hub, monkeypatch):
    monkeypatch.setattr(contest, "VAL_DOCUMENTS", 50_000)
    with pytest.raises(shards.UserError, match="20 documents; the contest's split has 50,000"):
        run(tmp_path / "set")
    assert not (tmp_path / "set" / "manifest.json").exists()


def test_one_line_for_every_other_fault(tmp_path, hub, capsys):
    with pytest.raises(shards.UserError, match="has no fineweb_train_000002"):
        run(tmp_path / "set", 3)
    hub.is_up = False
    with pytest.raises(SystemExit) as stopped:
        shards.run_main(lambda: run(tmp_path / "other"))
    assert stopped.value.code == 2
    stderr = capsys.readouterr().err
    assert stderr.count("\n") == 1
    for word in (MODEL, "someone/parameter-golf", "no route"):
        assert word in stderr
    assert not (tmp_path / "other").exists()
    hub.is_up = True
    run(tmp_path / "set")
    contest.VARIANTS["sp320"] = contest.Variant("someone/parameter-golf", 400)
    with pytest.raises(shards.UserError, match="another vocabulary"):
        run(tmp_path / "set")


WRONG = {"sp9": "choose one of sp1024", "sp8192 0": "must be 1 to", "--colour": "--colour"}


@pytest.mark.parametrize("args", WRONG)
def test_wrong_input(tmp_path, args):
    command = [sys.executable, str(ROOT / "data" / "contest.py"), *args.split()]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert WRONG[args] in done.stderr


def test_the_library_out_of_reach_is_told_at_once(tmp_path):
    """The real library, told to stay offline: its error becomes one line that names file and data set."""
    command = [sys.executable, str(ROOT / "data" / "contest.py"), "--out", "set"]
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=60, env=env)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1, done.stderr
    assert "fineweb_8192_bpe.model: could not be fetched" in done.stderr
    assert "kevclark/parameter-golf" in done.stderr
    assert not list(tmp_path.iterdir())


def test_the_hubs_folders_do_not_stay(tmp_path, monkeypatch):
    """The library keeps the hub's paths; here a file has its name alone."""

    class Library:
        @staticmethod
        def hf_hub_download(repo, path, repo_type, local_dir):
            assert (repo, repo_type) == ("kevclark/parameter-golf", "dataset")
            (local_dir / path).parent.mkdir(parents=True)
            (local_dir / path).write_bytes(b"shard")
            return str(local_dir / path)

    monkeypatch.setattr(contest.fineweb, "_hub", lambda: Library)
    (tmp_path / "datasets" / "mine").mkdir(parents=True)
    path = contest.hub_fetch(contest.VARIANTS["sp8192"], contest.VAL, tmp_path)
    assert path.read_bytes() == b"shard"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["datasets", contest.VAL]
    assert (tmp_path / "datasets" / "mine").is_dir(), "a folder of the user's own was removed"


def test_names_on_the_hub():
    sp1024 = contest.VARIANTS["sp1024"]
    assert sp1024.remote(sp1024.model) == "datasets/tokenizers/fineweb_1024_bpe.model"
    assert sp1024.remote(contest.VAL) == "datasets/datasets/fineweb10B_sp1024/fineweb_val_000000.bin"
    assert contest.shard_names(2)[1:] == [TRAIN_0, TRAIN_1]
