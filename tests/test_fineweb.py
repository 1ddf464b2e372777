"""data/fineweb.py with a hub of our own: fetching, checking, resuming, indexing, and every wrong input."""

import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "data"))

import fineweb  # noqa: E402
import shards  # noqa: E402
import vocab  # noqa: E402

TEXTS = ["Hello world", "caf\u00e9 \U0001f600\n\n", "1,234 tabs\t."]


@pytest.fixture
def gpt2_folder() -> Path:
    for folder in (ROOT / "data" / "downloads", ROOT.parent / "shared" / "data" / "gpt2"):
        if all((folder / member.name).is_file() for member in vocab.GPT2_FILES):
            return folder
    pytest.skip(
        "GPT-2's files are not in data/downloads; `python data/prepare.py --tokenizer gpt2` fetches them"
    )


class Hub:
    """Stands for the hub: serves shards from memory and remembers what was asked of it."""

    def __init__(self, tokenizer: vocab.Gpt2, num_train: int):
        self.files, self.texts, self.asked, self.is_up, self.tells = {}, {}, [], True, True
        for i, name in enumerate(fineweb.shard_names(num_train)):
            texts = [f"{text} {i}" for text in TEXTS * (i + 1)]
            tokens = np.concatenate([[vocab.GPT2_BOS, *tokenizer.encode(text)] for text in texts])
            self.texts[name] = texts
            self.files[name] = shards.header(len(tokens)) + tokens.astype("<u2").tobytes()

    def checksums(self, names: list[str]) -> dict[str, str | None]:
        if not self.is_up:
            raise ConnectionError("no route\nto the hub")
        sums = {name: hashlib.sha256(self.files[name]).hexdigest() for name in names}
        return sums if self.tells else dict.fromkeys(names)

    def fetch(self, name: str, folder: Path) -> Path:
        if not self.is_up:
            raise ConnectionError("no route to the hub")
        self.asked.append(name)
        (folder / name).write_bytes(self.files[name])
        return folder / name


@pytest.fixture
def hub(gpt2_folder, monkeypatch) -> Hub:
    hub = Hub(vocab.Gpt2(vocab.gpt2_files(gpt2_folder)), 4)
    monkeypatch.setattr(fineweb, "hub_checksums", hub.checksums)
    monkeypatch.setattr(fineweb, "hub_fetch", hub.fetch)
    return hub


@pytest.fixture
def main(gpt2_folder):
    return lambda *args: fineweb.main([*map(str, args), "--gpt2-files", str(gpt2_folder)])


def manifest_of(folder: Path) -> dict:
    return json.loads((folder / "manifest.json").read_text())


def test_fetch_writes_a_true_manifest(tmp_path, hub, main):
    main(2, "--out", tmp_path / "fw")
    manifest = manifest_of(tmp_path / "fw")
    assert manifest["format"] == 1
    assert manifest["tokenizer"]["kind"] == "gpt2"
    assert (manifest["tokenizer"]["vocab_size"], manifest["tokenizer"]["bos_id"]) == (50257, 50256)
    expected = {
        "train": ["fineweb_train_000001.bin", "fineweb_train_000002.bin"],
        "val": ["fineweb_val_000000.bin"],
    }
    token_bytes = np.load(tmp_path / "fw" / "token_bytes.npy", allow_pickle=False)
    for side, names in expected.items():
        split = manifest["splits"][side]
        assert [row["file"] for row in split["shards"]] == names
        for row in split["shards"]:
            content = (tmp_path / "fw" / row["file"]).read_bytes()
            assert content == hub.files[row["file"]]
            assert row["sha256"] == hashlib.sha256(content).hexdigest()
            assert row["tokens"] == (len(content) - 1024) // 2
            assert row["documents"] == len(hub.texts[row["file"]])
            assert row["bytes"] == sum(len(text.encode()) for text in hub.texts[row["file"]])
            assert row["bytes"] == token_bytes[np.frombuffer(content[1024:], "<u2")].sum()
        for key in ("tokens", "documents", "bytes"):
            assert split[key] == sum(row[key] for row in split["shards"])
    assert [row["name"] for row in manifest["sources"]] == sorted(expected["train"] + expected["val"])
    assert manifest["sources"][0]["license"] == "ODC-By 1.0"
    assert hub.asked[0] == "fineweb_val_000000.bin"


def test_second_call_needs_no_hub_and_more_shards_are_added(tmp_path, hub, main, capsys):
    out = tmp_path / "fw"
    main(2, "--out", out)
    hub.is_up = False
    main(2, "--out", out)
    main(1, "--out", out)
    assert capsys.readouterr().out.count("up to date") == 2
    hub.is_up, hub.asked = True, []
    main(3, "--out", out)
    assert hub.asked == ["fineweb_train_000003.bin"]
    (out / "fineweb_train_000001.bin").unlink()
    main(1, "--out", out)
    assert hub.asked == ["fineweb_train_000003.bin", "fineweb_train_000001.bin"]
    assert len(manifest_of(out)["splits"]["train"]["shards"]) == 3  # the earlier ones stay listed


@pytest.mark.parametrize("damage", ["flipped", "cut", "magic"])
def test_wrong_shards_are_fetched_again(tmp_path, hub, main, damage):
    out = tmp_path / "fw"
    out.mkdir()
    good = hub.files["fineweb_train_000001.bin"]
    bad = {"flipped": good[:-2] + b"\0\0", "cut": good[:-2], "magic": b"\0" * 1024 + good[1024:]}[damage]
    (out / "fineweb_train_000001.bin").write_bytes(bad)
    (out / "fineweb_val_000000.bin").write_bytes(hub.files["fineweb_val_000000.bin"])
    main(1, "--out", out)
    assert hub.asked == ["fineweb_train_000001.bin"]
    assert (out / "fineweb_train_000001.bin").read_bytes() == good


def test_what_the_hub_sends_is_checked(tmp_path, hub, main):
    name = "fineweb_train_000001.bin"
    good = dict(hub.files)
    fetch = hub.fetch

    def corrupt(asked, folder):
        path = fetch(asked, folder)
        if asked == name:
            path.write_bytes(good[name][:-2] + b"\0\0")
        return path

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fineweb, "hub_fetch", corrupt)
        with pytest.raises(shards.UserError, match=f"{name}: what the hub sent is not right"):
            main(1, "--out", tmp_path / "fw")
    assert not (tmp_path / "fw" / name).exists()
    assert not (tmp_path / "fw" / "manifest.json").exists()
    main(1, "--out", tmp_path / "fw")
    assert (tmp_path / "fw" / name).read_bytes() == good[name]


def test_a_hub_without_checksums_still_has_headers(tmp_path, hub, main):
    hub.tells = False
    hub.files["fineweb_train_000001.bin"] = hub.files["fineweb_train_000001.bin"][:-2]
    with pytest.raises(shards.UserError, match="its header promises"):
        main(1, "--out", tmp_path / "fw")


def test_without_network_it_is_one_line(tmp_path, hub, main, capsys):
    hub.is_up = False
    with pytest.raises(SystemExit) as stopped:
        shards.run_main(lambda: main(1, "--out", tmp_path / "fw"))
    assert stopped.value.code == 2
    stderr = capsys.readouterr().err
    assert stderr.count("\n") == 1
    for word in ("fineweb_val_000000.bin", "kjj0/fineweb10B-gpt2", "no route", "--index", "--default"):
        assert word in stderr
    assert not (tmp_path / "fw").exists()


def test_all_shards_there_but_no_network(tmp_path, hub, main, capsys):
    out = tmp_path / "fw"
    out.mkdir()
    for name in fineweb.shard_names(1):
        (out / name).write_bytes(hub.files[name])
    hub.is_up = False
    main(1, "--out", out)
    assert "out of reach" in capsys.readouterr().out
    assert manifest_of(out)["splits"]["val"]["documents"] == 3


def test_index_gives_a_manifest(tmp_path, hub, main):
    main(2, "--out", tmp_path / "fetched")
    mine = tmp_path / "mine"
    mine.mkdir()
    for name in fineweb.shard_names(2):
        (mine / name).write_bytes(hub.files[name])
    main("--index", mine)
    fetched, indexed = manifest_of(tmp_path / "fetched"), manifest_of(mine)
    assert indexed["splits"] == fetched["splits"]
    assert indexed["token_bytes"] == fetched["token_bytes"]
    assert indexed["sources"][0]["license"] is None  # nobody told us
    main("--index", mine)


@pytest.mark.parametrize(
    ("tokens", "message"), [([50256, 50257], "token 50257 is not one of"), ([1, 2, 3], "no document begins")]
)
def test_index_refuses_other_tokens(tmp_path, hub, main, tokens, message):
    name = "fineweb_val_000000.bin"
    (tmp_path / "fineweb_train_000001.bin").write_bytes(hub.files["fineweb_train_000001.bin"])
    (tmp_path / name).write_bytes(shards.header(len(tokens)) + np.array(tokens, "<u2").tobytes())
    with pytest.raises(shards.UserError, match=message):
        main("--index", tmp_path)
    assert not (tmp_path / "manifest.json").exists()


def test_index_leaves_prepared_folders_alone(tmp_path, hub, main):
    for name in fineweb.shard_names(1):
        (tmp_path / name).write_bytes(hub.files[name])
    main("--index", tmp_path)
    manifest = {**manifest_of(tmp_path), "request": {}}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(shards.UserError, match=r"prepare\.py"):
        main("--index", tmp_path)
    assert manifest_of(tmp_path) == manifest


WRONG = {
    "0": "0 training shards: must be 1 to 103",
    "104": "104 training shards: must be 1 to 103",
    "many": "invalid int value: 'many'",
    "--index gone": "gone: no such folder",
    "--index .": "no shard named *_train_*.bin",
    "3 --index .": "leave out N and --out",
    "1 --gpt2-files . --out fw": "encoder.json",
    "--colour": "--colour",
}


@pytest.mark.parametrize("args", WRONG)
def test_wrong_input(tmp_path, args):
    command = [sys.executable, str(ROOT / "data" / "fineweb.py"), *args.split()]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("error: ")
    assert WRONG[args] in done.stderr
    assert not list(tmp_path.iterdir())


def test_the_library_out_of_reach_is_told_at_once(tmp_path, gpt2_folder):
    """The real library, told to stay offline: its error becomes one line."""
    command = [sys.executable, str(ROOT / "data" / "fineweb.py"), "1", "--out", "fw"]
    command += ["--gpt2-files", str(gpt2_folder)]
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=30, env=env)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1, done.stderr
    assert "could not be fetched" in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_hub_that_never_answers_is_given_up(tmp_path, gpt2_folder, monkeypatch, capsys):
    class Api:
        def get_paths_info(self, *args, **kwargs):
            time.sleep(30)

    class Library:
        HfApi = Api

    monkeypatch.setattr(fineweb, "_hub", lambda: Library)
    monkeypatch.setattr(fineweb, "HUB_TIMEOUT_S", 0.1)
    with pytest.raises(shards.UserError, match=r"no answer within 0\.1 s"):
        fineweb.main(["1", "--out", str(tmp_path / "fw"), "--gpt2-files", str(gpt2_folder)])


def test_help():
    command = [sys.executable, str(ROOT / "data" / "fineweb.py"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0
    for word in ("--index", "--out", "103", "default 9", "Exit codes"):
        assert word in done.stdout
