"""data/prepare.py and its modules: round trips, format, determinism, the split, and every wrong input."""

import bz2
import errno
import gzip
import hashlib
import json
import lzma
import os
import signal
import subprocess
import sys
import time
import zipfile
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "data"))

import corpus  # noqa: E402
import prepare  # noqa: E402
import shards  # noqa: E402
import vocab  # noqa: E402
import wheels  # noqa: E402
import wikitext  # noqa: E402

TRICKY = [
    "Plain words, 1,234.5 and it's fine.",
    " leading and trailing  spaces  ",
    "tabs\tand\nlines\r\nand\n\n\nmore\r",
    "NUL \0 and bell \a and escape \x1b",
    "emoji \U0001f600 family \U0001f468\u200d\U0001f469\u200d\U0001f467 flag \U0001f1eb\U0001f1f7",
    "SentencePiece's \u2581 space \u2581\u2581 and \u2585 and literal <0x41> <s> </s> <unk>",
    "<|endoftext|> inside a text",
    "combining e\u0301, \u00e9, \u1e9b\u0323, \ufb01, \u2126, wide \uff21, bom \ufeff, spaces \u00a0\u3000",
    "private \ue000 noncharacter \uffff last \U0010ffff replacement \ufffd",
    "\u4f60\u597d \u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35 \u05e9\u05dc\u05d5\u05dd \u202eoverride\u202c",
    "\u2581",
    "\n",
]
WORDS = "the cat sat on a mat while seven quick foxes jumped over many lazy dogs in old green parks".split()


def prose(seed: int, num_words: int = 60) -> str:
    """Different text for each seed."""
    rng = np.random.default_rng(seed)
    return f"Note {seed}. " + " ".join(rng.choice(WORDS, num_words)) + "."


def write_jsonl(path: Path, documents: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents), encoding="utf-8")
    return path


@pytest.fixture
def gpt2_folder() -> Path:
    for folder in (ROOT / "data" / "downloads", ROOT.parent / "shared" / "data" / "gpt2"):
        if all((folder / member.name).is_file() for member in vocab.GPT2_FILES):
            return folder
    pytest.skip(
        "GPT-2's files are not in data/downloads; `python data/prepare.py --tokenizer gpt2` fetches them"
    )


@pytest.fixture(scope="session")
def sp_model() -> bytes:
    return vocab.train_sentencepiece([prose(i) for i in range(200)], 320)


@pytest.fixture(params=["bytes", "sentencepiece", "gpt2"])
def tokenizer(request):
    if request.param == "bytes":
        return vocab.Bytes()
    if request.param == "sentencepiece":
        return vocab.SentencePiece("sp", "sp.model", request.getfixturevalue("sp_model"))
    return vocab.Gpt2(vocab.gpt2_files(request.getfixturevalue("gpt2_folder")))


def run(*args, **env) -> subprocess.CompletedProcess:
    """The command line, as a user has it."""
    command = [sys.executable, str(ROOT / "data" / "prepare.py"), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **env}, timeout=60)


def main(*args) -> None:
    prepare.main([str(arg) for arg in args])


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def split_tokens(folder: Path, side: str) -> list[np.ndarray]:
    """Documents of a side, each with its BOS."""
    manifest = json.loads((folder / "manifest.json").read_text())
    documents = []
    for row in manifest["splits"][side]["shards"]:
        tokens = np.fromfile(folder / row["file"], dtype="<u2", offset=1024)
        starts = np.flatnonzero(tokens == manifest["tokenizer"]["bos_id"])
        documents += np.split(tokens, starts[1:])
    return documents


def split_texts(folder: Path, side: str) -> list[str]:
    """Documents of a side, decoded with the files in the folder alone."""
    row = json.loads((folder / "manifest.json").read_text())["tokenizer"]
    files = {file["file"]: (folder / file["file"]).read_bytes() for file in row["files"]}
    tokenizer = vocab.load(row["kind"], row["name"], files)
    return [tokenizer.decode(document) for document in split_tokens(folder, side)]


# ----------------------------------------------------------------------------------------------------------
# tokenizers
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", TRICKY, ids=range(len(TRICKY)))
def test_round_trip_and_token_bytes(tokenizer, text):
    tokens = tokenizer.encode(text)
    assert tokens.dtype == np.uint16
    assert tokenizer.decode(tokens) == text
    assert tokenizer.token_bytes[tokens].sum() == len(text.encode())
    assert tokenizer.bos_id not in tokens


def test_token_bytes_shape(tokenizer):
    assert tokenizer.token_bytes.shape == (tokenizer.vocab_size,)
    assert tokenizer.token_bytes[tokenizer.bos_id] == 0


def test_gpt2_is_gpt2(gpt2_folder):
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks

    files = vocab.gpt2_files(gpt2_folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", "")  # read the files themselves, write nothing
        theirs = data_gym_to_mergeable_bpe_ranks(
            str(gpt2_folder / "vocab.bpe"), str(gpt2_folder / "encoder.json")
        )
    assert vocab._gpt2_ranks(files["encoder.json"]) == theirs
    gpt2 = vocab.Gpt2(files)
    assert gpt2.encode("Hello world").tolist() == [15496, 995]
    assert gpt2.bos_id == 50256
    assert gpt2.vocab_size == 50257
    for text in TRICKY:
        assert gpt2.encode(text).tolist() == gpt2.encoding.encode_ordinary(text)


def test_training_a_vocabulary_is_deterministic(sp_model):
    assert vocab.train_sentencepiece([prose(i) for i in range(200)], 320) == sp_model


def test_sample_is_of_the_smallest_keys_in_any_order(monkeypatch):
    monkeypatch.setattr(vocab, "SP_SAMPLE_CHARS", 1_000)
    documents = [prose(i, 10) for i in range(100)]
    pairs = sorted((corpus.digest_of(text)[8:], text) for text in documents)
    expected, chars = [], 0
    for _, text in pairs:
        if chars >= 1_000:
            break
        expected.append(text)
        chars += len(text)
    for order in (pairs, pairs[::-1], pairs[50:] + pairs[:50]):
        sample = prepare.Sample()
        for key, text in order:
            if not sample.limit or key < sample.limit:  # as sample_batch does
                sample.add(key, text)
        assert sample.texts() == expected


# ----------------------------------------------------------------------------------------------------------
# inputs
# ----------------------------------------------------------------------------------------------------------


def documents_of(path: Path) -> list[str]:
    (source,) = corpus.find_sources([str(path)])
    return [text for batch in corpus.batches([source], lambda count: None) for _, text in corpus.texts(batch)]


def test_txt_with_separators(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(
        b"\xef\xbb\xbfone\r\n\r\ntwo\r\n<|endoftext|>\r\nthree <|endoftext|>\n<|endoftext|>\n\nfour\n"
    )
    assert documents_of(path) == ["one\r\n\r\ntwo", "three <|endoftext|>", "four"]


def test_a_byte_order_mark_is_no_part_of_a_separator(tmp_path):
    """At the beginning of a file, and inside one that was put together from such files."""
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbf<|endoftext|>\none\n\n\xef\xbb\xbf<|endoftext|>\r\ntwo\n")
    assert documents_of(path) == ["", "one", "two"]
    path.write_bytes(b"\xef\xbb\xbf<|endoftext|>\none\n")  # the only one
    assert documents_of(path) == ["", "one"]


def test_txt_without_separators_is_cut_at_blank_lines(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "DOC_CHARS", 300)
    paragraphs = [prose(i, 20) for i in range(40)] + ["\u00e9" * 250]
    path = tmp_path / "a.txt"
    path.write_text("\n\n".join(paragraphs), encoding="utf-8")
    documents = documents_of(path)
    assert "\n\n".join(documents) == "\n\n".join(paragraphs)
    assert max(map(len, documents)) <= 300
    # As full as whole paragraphs allow: no two neighbours would have fitted into one.
    assert all(len(a) + len(b.split("\n\n")[0]) + 2 > 300 for a, b in pairwise(documents))


def test_txt_of_one_paragraph_is_cut_at_line_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "DOC_CHARS", 300)
    lines = [prose(i, 20) for i in range(20)]
    path = tmp_path / "a.txt"
    path.write_text("\n".join(lines), encoding="utf-8")
    documents = documents_of(path)
    assert "\n".join(documents) == "\n".join(lines)
    assert 1 < len(documents) <= 20
    assert max(map(len, documents)) <= 300


def test_txt_of_one_line_is_cut_between_characters(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "LINE_BYTES", 7)
    monkeypatch.setattr(corpus, "DOC_CHARS", 10)
    text = "a\u00e9\u20ac\U0001f600" * 50
    path = tmp_path / "a.txt"
    path.write_text(text, encoding="utf-8")
    assert "".join(documents_of(path)) == text


def test_jsonl_text_is_taken_as_it_is(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", TRICKY)
    path.write_text("\ufeff" + path.read_text(encoding="utf-8") + "\n\n", encoding="utf-8")
    assert documents_of(path) == TRICKY


def test_jsonl_with_numbers_of_any_length(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a", "n": %s}\n{"n": -7, "text": "b"}\n' % ("1" * 5000))
    assert documents_of(path) == ["a", "b"]


@pytest.mark.parametrize("packing", [".gz", ".xz", ".zst"])
def test_packed_files_read_the_same_and_damage_is_told(tmp_path, packing):
    import zstandard

    raw = write_jsonl(tmp_path / "a.jsonl", [prose(i) for i in range(300)]).read_bytes()
    pack = {".gz": gzip.compress, ".xz": lzma.compress, ".zst": zstandard.ZstdCompressor().compress}[packing]
    path = tmp_path / f"b.jsonl{packing}"
    half = raw.index(b"\n", len(raw) // 2) + 1
    path.write_bytes(pack(raw[:half]) + pack(raw[half:]))  # two members, as `cat a.gz b.gz` makes them
    assert documents_of(path) == documents_of(tmp_path / "a.jsonl")
    packed = pack(raw)
    for damaged in (packed[:-40], packed[: len(packed) // 2] + b"\0" * 64 + packed[len(packed) // 2 + 64 :]):
        path.write_bytes(damaged)
        with pytest.raises(shards.UserError, match="damaged"):
            documents_of(path)


def test_folders_are_searched(tmp_path):
    (tmp_path / "in" / "deep").mkdir(parents=True)
    for name in ("b.txt", "a.jsonl.xz", "deep/c.jsonl", "notes.md"):
        (tmp_path / "in" / name).write_bytes(b"")
    found = [source.path.name for source in corpus.find_sources([str(tmp_path / "in")])]
    assert found == ["a.jsonl.xz", "b.txt", "c.jsonl"]


# ----------------------------------------------------------------------------------------------------------
# output
# ----------------------------------------------------------------------------------------------------------


def test_shards_and_manifest(tmp_path, tokenizer, sp_model, request):
    documents = [prose(i) for i in range(300)] + TRICKY
    source = write_jsonl(tmp_path / "in.jsonl", documents)
    (tmp_path / "sp.model").write_bytes(sp_model)
    choice = {"sentencepiece": tmp_path / "sp.model"}.get(tokenizer.kind, tokenizer.kind)
    out = tmp_path / "my_set"
    args = [source, "--out", out, "--tokenizer", choice, "--val-fraction", 0.2, "--shard-tokens", 3_000]
    if tokenizer.kind == "gpt2":
        args += ["--gpt2-files", request.getfixturevalue("gpt2_folder")]
    main(*args)

    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["format"] == 1
    row = manifest["tokenizer"]
    assert (row["kind"], row["vocab_size"], row["bos_id"]) == (
        tokenizer.kind,
        tokenizer.vocab_size,
        tokenizer.bos_id,
    )
    listed = {"manifest.json", "token_bytes.npy"}
    for file in [*row["files"], manifest["token_bytes"]]:
        listed.add(file["file"])
        assert hashlib.sha256((out / file["file"]).read_bytes()).hexdigest() == file["sha256"]
    token_bytes = np.load(out / "token_bytes.npy", allow_pickle=False)
    assert token_bytes.dtype == np.uint16
    assert token_bytes.shape == (tokenizer.vocab_size,)
    assert manifest["token_bytes"]["exact"]
    content = source.read_bytes()
    assert manifest["sources"][0]["name"] == "in.jsonl"
    assert manifest["sources"][0]["bytes"] == len(content)
    assert manifest["sources"][0]["sha256"] == hashlib.sha256(content).hexdigest()

    for side, first in (("train", 1), ("val", 0)):
        split = manifest["splits"][side]
        names = [shard["file"] for shard in split["shards"]]
        assert names == [f"my-set_{side}_{first + i:06d}.bin" for i in range(len(names))]
        assert names == sorted(path.name for path in out.glob(f"*_{side}_*.bin"))
        for shard in split["shards"]:
            listed.add(shard["file"])
            content = (out / shard["file"]).read_bytes()
            assert hashlib.sha256(content).hexdigest() == shard["sha256"]
            head = np.frombuffer(content[:1024], "<i4")
            assert head[:3].tolist() == [20240520, 1, shard["tokens"]]
            assert not head[3:].any()
            tokens = np.frombuffer(content[1024:], "<u2")
            assert len(tokens) == shard["tokens"] <= 3_000
            assert tokens[0] == tokenizer.bos_id
            assert (tokens == tokenizer.bos_id).sum() == shard["documents"]
            assert token_bytes[tokens].sum() == shard["bytes"]
        for key in ("tokens", "documents", "bytes"):
            assert split[key] == sum(shard[key] for shard in split["shards"])
    assert len(manifest["splits"]["train"]["shards"]) > 1
    assert {path.name for path in out.iterdir()} == listed

    full = [text for text in documents if text.strip()]
    train, val = split_texts(out, "train"), split_texts(out, "val")
    assert sorted(train + val) == sorted(full)
    assert train == [text for text in full if text in set(train)]  # the order of the input
    assert manifest["documents_empty"] == len(documents) - len(full)
    assert sum(manifest["splits"][side]["bytes"] for side in ("train", "val")) == sum(
        len(text.encode()) for text in full
    )


def test_a_document_longer_than_a_shard_is_one_shard(tmp_path):
    writer = shards.ShardWriter(tmp_path, "x", "train", 1, 10)
    sizes = np.array([4, 6, 25, 3, 7, 1])
    tokens = np.arange(sizes.sum(), dtype=np.uint16)
    writer.add(tokens, sizes, sizes)
    writer.close()
    writer.publish()
    assert [row["tokens"] for row in writer.rows] == [10, 25, 10, 1]
    assert [row["documents"] for row in writer.rows] == [2, 1, 2, 1]
    read = [shards.read_shard(tmp_path / row["file"]) for row in writer.rows]
    assert np.concatenate(read).tolist() == tokens.tolist()


@pytest.mark.parametrize("choice", ["sp:330", "bytes"])
def test_output_does_not_depend_on_workers(tmp_path, monkeypatch, choice):
    monkeypatch.setattr(corpus, "BATCH_BYTES", 4_000)
    a = write_jsonl(tmp_path / "a.jsonl", [prose(i) for i in range(100)])
    b = tmp_path / "b.txt"
    b.write_text("\n\n".join(prose(i) for i in range(100, 200)))
    made = []
    for workers in (1, 2):
        out = tmp_path / str(workers) / "set"
        main(a, b, "--out", out, "--tokenizer", choice, "--shard-tokens", 9_000, "--workers", workers)
        made.append(contents(out))
    assert made[0] == made[1]
    assert len(made[0]) > 4


def test_val_by_hash_keeps_copies_on_one_side(tmp_path):
    documents = [prose(i, 8) for i in range(200)]
    a = write_jsonl(tmp_path / "a.jsonl", documents)
    b = write_jsonl(tmp_path / "b.jsonl", documents[::-1] * 2)
    main(a, "--out", tmp_path / "one", "--tokenizer", "bytes", "--val-fraction", 0.3)
    main(a, b, "--out", tmp_path / "two", "--tokenizer", "bytes", "--val-fraction", 0.3)
    one = {side: set(split_texts(tmp_path / "one", side)) for side in ("train", "val")}
    two = {side: split_texts(tmp_path / "two", side) for side in ("train", "val")}
    assert {side: set(two[side]) for side in two} == one
    assert not one["train"] & one["val"]
    assert len(two["train"]) + len(two["val"]) == 600
    assert 30 < len(one["val"]) < 90


def test_val_files_are_kept_out_of_training(tmp_path, capsys):
    documents = [prose(i, 8) for i in range(50)]
    train = write_jsonl(tmp_path / "train.jsonl", documents + documents[:5] + [" \n "])
    val = write_jsonl(tmp_path / "val.jsonl", documents[:10] + documents[:1])
    out = tmp_path / "set"
    main(train, "--val", val, "--out", out, "--tokenizer", "bytes")
    assert split_texts(out, "train") == documents[10:]
    assert split_texts(out, "val") == documents[:10] + documents[:1]
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["documents_removed_from_train"] == 15
    assert manifest["bytes_removed_from_train"] == sum(map(len, documents[:10] + documents[:5]))
    assert manifest["documents_empty"] == 1
    assert manifest["val_rule"] == {"kind": "files"}
    assert "15 training documents also in validation, 1 without text" in capsys.readouterr().out


def test_vocabulary_is_trained_without_validation(tmp_path):
    rare = "qxq" * 400
    train = write_jsonl(tmp_path / "train.jsonl", [prose(i) for i in range(100)] + [rare])
    val = write_jsonl(tmp_path / "val.jsonl", [rare])
    main(train, "--val", val, "--out", tmp_path / "set", "--tokenizer", "sp:330")
    tokenizer = vocab.SentencePiece("x", "x", (tmp_path / "set" / "sp330.model").read_bytes())
    assert tokenizer.vocab_size == 330
    assert not any("qx" in tokenizer.processor.id_to_piece(i) for i in range(330))


def test_foreign_model_says_what_is_approximate(tmp_path):
    import io

    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(prose(i) for i in range(100)),
        model_writer=model,
        vocab_size=80,
        model_type="bpe",
        minloglevel=4,
    )
    (tmp_path / "their.model").write_bytes(model.getvalue())
    source = write_jsonl(tmp_path / "a.jsonl", [prose(i) for i in range(60)] + ["two  spaces \u00e9"])
    out = tmp_path / "set"
    main(source, "--out", out, "--tokenizer", tmp_path / "their.model", "--val-fraction", 0.2)
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["token_bytes"]["exact"] is False
    assert "bits a byte" in manifest["token_bytes"]["note"]
    true = sum(len(prose(i).encode()) for i in range(60)) + len("two  spaces \u00e9".encode())
    assert sum(row["bytes"] for row in manifest["splits"].values()) == true


# ----------------------------------------------------------------------------------------------------------
# again, interrupted, full disk
# ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def small(tmp_path) -> list:
    source = write_jsonl(tmp_path / "a.jsonl", [prose(i, 8) for i in range(60)])
    return [source, "--out", tmp_path / "set", "--tokenizer", "bytes"]


def test_second_run_does_nothing_and_a_change_is_noticed(tmp_path, small, capsys):
    main(*small)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "set").iterdir()}
    capsys.readouterr()
    main(*small)
    assert "up to date" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "set").iterdir()} == before

    first = contents(tmp_path / "set")
    main(*small, "--shard-tokens", 1_000)
    assert len(contents(tmp_path / "set")) > len(first)
    main(*small)
    assert contents(tmp_path / "set") == first  # no shard of the other run is left
    write_jsonl(small[0], [prose(i, 8) for i in range(61)])
    main(*small)
    assert contents(tmp_path / "set") != first
    (tmp_path / "set" / "set_train_000001.bin").unlink()
    main(*small)
    assert (tmp_path / "set" / "set_train_000001.bin").exists()


def test_other_peoples_shards_are_not_touched(tmp_path, small):
    out = tmp_path / "set"
    out.mkdir()
    (out / "set_train_000001.bin").write_bytes(b"precious")
    with pytest.raises(shards.UserError, match="unknown origin"):
        main(*small)
    assert contents(out) == {"set_train_000001.bin": b"precious"}


@pytest.mark.parametrize("moment", ["tokenize", "write_tokenizer", "write_manifest"])
def test_interrupted_run_leaves_nothing(tmp_path, small, monkeypatch, moment):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(prepare, moment, stop)
        with pytest.raises(KeyboardInterrupt):
            main(*small)
    assert not (tmp_path / "set").exists()
    main(*small)
    assert (tmp_path / "set" / "manifest.json").exists()


def test_failed_rerun_keeps_the_old_data(tmp_path, small):
    main(*small)
    before = contents(tmp_path / "set")
    small[0].write_text('{"text": 1}\n')
    with pytest.raises(shards.UserError):
        main(*small)
    assert contents(tmp_path / "set") == before


def test_killed_while_renaming_is_cleared_up(tmp_path, small):
    out = tmp_path / "set"
    main(*small)
    good = contents(out)
    shards.write_journal(out, ["set_train_000001.bin", "set_val_000000.bin", "token_bytes.npy"])
    (out / "manifest.json").unlink()
    (out / ".partial-set_val_000000.bin").write_bytes(b"x")
    (out / "set_val_000000.bin").unlink()
    main(*small)
    assert contents(out) == good


def test_sigterm_stops_workers_and_leaves_nothing(tmp_path):
    source = tmp_path / "a.jsonl"
    line = json.dumps({"text": prose(1, 200)}) + "\n"
    source.write_text(line * 60_000)
    out = tmp_path / "set"
    command = [sys.executable, str(ROOT / "data" / "prepare.py"), str(source), "--out", str(out)]
    command += ["--tokenizer", "bytes", "--workers", "2"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 30
        while not list(out.glob(".partial-*.bin")) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        _, stderr = process.communicate(timeout=30)
    assert process.returncode == 130, stderr
    assert stderr.count("\n") == 1
    assert not out.exists()


def test_full_disk_is_one_line(tmp_path, small, monkeypatch, capsys):
    class Full:
        def write(self, content):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        def close(self):
            pass

    open_shard = shards.ShardWriter._open_shard

    def open_full(self):
        open_shard(self)
        self._file.close()
        self._file = Full()

    monkeypatch.setattr(shards.ShardWriter, "_open_shard", open_full)
    with pytest.raises(SystemExit) as stopped:
        shards.run_main(lambda: main(*small))
    assert stopped.value.code == 2
    stderr = capsys.readouterr().err
    assert stderr.count("\n") == 1
    assert "No space left" in stderr
    assert "free space" in stderr
    assert not (tmp_path / "set").exists()


# ----------------------------------------------------------------------------------------------------------
# wrong input: one line, exit code 2, nothing written
# ----------------------------------------------------------------------------------------------------------

WRONG = {
    # name: (files to make, arguments, what the line must name)
    "no input": ({}, "--out o", "no INPUT"),
    "no out": ({"a.txt": b"x"}, "a.txt", "no --out"),
    "missing file": ({}, "gone.txt --out o", "gone.txt: no such file"),
    "unknown extension": ({"a.csv": b"x"}, "a.csv --out o", "a.csv: unknown kind"),
    "empty folder": ({"d/x.md": b"x"}, "d --out o", "d: no .txt"),
    "unknown tokenizer": ({"a.txt": b"x"}, "a.txt --out o --tokenizer bpe", "--tokenizer bpe"),
    "sp without size": ({"a.txt": b"x"}, "a.txt --out o --tokenizer sp:many", "sp:many"),
    "vocabulary too large": ({"a.txt": b"x"}, "a.txt --out o --tokenizer sp:65537", "65,536"),
    "golf without size": ({"a.txt": b"x"}, "a.txt --out o --tokenizer golf:", "golf:"),
    "golf too large": (
        {"a.txt": b"few words"},
        "a.txt --val a2.txt --out o --tokenizer golf:9000",
        "use golf:",
    ),
    "sp too large": ({"a.txt": b"few words"}, "a.txt --val a2.txt --out o --tokenizer sp:9000", "use sp:"),
    "sp too small": ({"a.txt": b"few words"}, "a.txt --val a2.txt --out o --tokenizer sp:100", "or more"),
    "missing model": ({"a.txt": b"x"}, "a.txt --out o --tokenizer m.model", "m.model: no such file"),
    "bad model": ({"a.txt": b"x", "m.model": b"junk"}, "a.txt --out o --tokenizer m.model", "not a readable"),
    "empty model": ({"a.txt": b"x", "m.model": b""}, "a.txt --out o --tokenizer m.model", "not a readable"),
    "not utf-8 txt": (
        {"a.txt": b"ab\n\ncd\xff"},
        "a.txt --out o --tokenizer bytes",
        "a.txt: byte 6: not UTF-8",
    ),
    "not utf-8 jsonl": (
        {"a.jsonl": b'{"text": "a"}\n{"text": "\xe9"}\n'},
        "a.jsonl --out o --tokenizer bytes",
        "a.jsonl:2, byte 10 of the line: not UTF-8",
    ),
    "bad json": (
        {"a.jsonl": b'{"text": "a"}\n{"text": \n'},
        "a.jsonl --out o --tokenizer bytes",
        "a.jsonl:2: not",
    ),
    "no text": (
        {"a.jsonl": b'{"text": "a"}\n\n{"body": "x"}'},
        "a.jsonl --out o --tokenizer bytes",
        "a.jsonl:3:",
    ),
    "text no string": (
        {"a.jsonl": b'{"text": null}'},
        "a.jsonl --out o --tokenizer bytes",
        "no string field",
    ),
    "json list": ({"a.jsonl": b"[1]"}, "a.jsonl --out o --tokenizer bytes", "a.jsonl:1: no string field"),
    "text a number": ({"a.jsonl": b'{"text": 5}'}, "a.jsonl --out o --tokenizer bytes", "no string field"),
    "byte order mark alone": (
        {"a.jsonl": b"\xef\xbb\xbf"},
        "a.jsonl --out o --tokenizer bytes",
        "a.jsonl: no text",
    ),
    "half surrogate": ({"a.jsonl": b'{"text": "\\ud800"}'}, "a.jsonl --out o --tokenizer bytes", "surrogate"),
    "empty corpus": ({"a.txt": b" \n\n "}, "a.txt --out o --tokenizer bytes", "a.txt: no text"),
    "empty val": ({"a.txt": b"x"}, "a.txt --out o --tokenizer bytes --val-fraction 1e-9", "validation empty"),
    "empty val file": ({"a.txt": b"x", "v.txt": b""}, "a.txt --val v.txt --out o --tokenizer bytes", "v.txt"),
    "train all in val": ({"a.txt": b"x"}, "a.txt --val a.txt --out o --tokenizer bytes", "are in --val too"),
    "fraction 0": ({"a.txt": b"x"}, "a.txt --out o --val-fraction 0", "--val-fraction 0:"),
    "fraction 1": ({"a.txt": b"x"}, "a.txt --out o --val-fraction 1", "--val-fraction 1:"),
    "fraction nan": ({"a.txt": b"x"}, "a.txt --out o --val-fraction nan", "--val-fraction nan:"),
    "fraction word": ({"a.txt": b"x"}, "a.txt --out o --val-fraction x", "--val-fraction: invalid float"),
    "fraction and val": (
        {"a.txt": b"x"},
        "a.txt --out o --val-fraction .1 --val a.txt",
        "exclude each other",
    ),
    "workers": ({"a.txt": b"x"}, "a.txt --out o --workers 0", "--workers 0"),
    "shard tokens": ({"a.txt": b"x"}, "a.txt --out o --shard-tokens 0", "--shard-tokens 0"),
    "default with input": ({"a.txt": b"x"}, "a.txt --default --out o", "--default"),
    "unknown option": ({"a.txt": b"x"}, "a.txt --out o --colour red", "--colour"),
    "out is a file": ({"a.txt": b"x", "o2": b""}, "a.txt --out o2/o --tokenizer bytes", "o2"),
    "gpt2 folder": ({"a.txt": b"x"}, "a.txt --out o --gpt2-files d", "d/encoder.json"),
    "gpt2 checksum": (
        {"a.txt": b"x", "d/encoder.json": b"{}", "d/vocab.bpe": b""},
        "a.txt --out o --gpt2-files d",
        "SHA-256",
    ),
    "damaged gz": ({"a.txt.gz": b"not gzip"}, "a.txt.gz --out o --tokenizer bytes", "damaged .gz"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input(tmp_path, case):
    files, args, message = WRONG[case]
    (tmp_path / "a2.txt").write_bytes(b"other words")
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    before = sorted(tmp_path.rglob("*"))
    command = [sys.executable, str(ROOT / "data" / "prepare.py"), *args.split()]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert sorted(tmp_path.rglob("*")) == before


def test_wrong_input_in_a_worker_is_one_line(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [prose(i) for i in range(50)])
    path.write_bytes(path.read_bytes() + b"{\n")
    done = run(path, "--out", tmp_path / "o", "--tokenizer", "bytes", "--workers", 2)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "a.jsonl:51: not JSON" in done.stderr
    assert not (tmp_path / "o").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_no_permission(tmp_path, small):
    (tmp_path / "set").mkdir(mode=0o500)
    with pytest.raises(PermissionError):
        main(*small)


def test_tokenizer_limit_is_one_line(tmp_path, gpt2_folder):
    # A regular expression of the tokenizer runs out of stack on a million line ends.
    path = write_jsonl(tmp_path / "a.jsonl", ["\n" * 1_000_000 + "x"])
    with pytest.raises(shards.UserError, match=r"a\.jsonl:1: gpt2 cannot encode"):
        main(path, "--out", tmp_path / "o", "--gpt2-files", gpt2_folder)


def test_help_and_import_do_nothing(tmp_path):
    done = run("--help")
    assert done.returncode == 0
    for word in ("--val-fraction", "--shard-tokens", "--default", "sp:SIZE", "endoftext", "Exit codes"):
        assert word in done.stdout
    code = "import sys; before = set(sys.modules); import prepare, fineweb; "
    code += "print({'tiktoken', 'sentencepiece', 'huggingface_hub', 'torch'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT / "data")},
    )
    assert done.stdout.strip() == "set()"
    assert not list(tmp_path.iterdir())


# ----------------------------------------------------------------------------------------------------------
# wheels and the embedded text
# ----------------------------------------------------------------------------------------------------------


def fake_member(content: bytes) -> wheels.Member:
    sha256 = hashlib.sha256(content).hexdigest()
    return wheels.Member(project="no-such-thing", version="1.0", path="pkg/data.txt", sha256=sha256)


def test_placed_wheel_is_used_and_checked(tmp_path):
    member = fake_member(b"hello")
    wheel = tmp_path / "no_such_thing-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("pkg/data.txt", "hello")
    assert wheels.fetch((member,), tmp_path) == [tmp_path / "data.txt"]
    assert (tmp_path / "data.txt").read_bytes() == b"hello"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("pkg/data.txt", "other")
    assert wheels.fetch((member,), tmp_path)  # the kept file is right: the wheel is not asked
    (tmp_path / "data.txt").write_bytes(b"broken")
    with pytest.raises(shards.UserError, match="SHA-256"):
        wheels.fetch((member,), tmp_path)
    wheel.write_bytes(b"no zip")
    with pytest.raises(shards.UserError, match="no readable"):
        wheels.fetch((member,), tmp_path)


def test_without_network_it_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(
        shards.UserError, match=r"no-such-thing==1\.0: could not be fetched.*place that wheel"
    ):
        wheels.fetch((fake_member(b"hello"),), tmp_path / "downloads")
    assert not list(tmp_path.iterdir())


def test_clean_keeps_prose_and_drops_markup():
    wiki = """{{Infobox person|name={{nowrap|A B}}|x=1}}
[[File:cat.jpg|thumb|A [[cat]] with a [http://x.org hat] and more words to be long enough here.]]
'''Cats''' are [[Felidae|felids]]<ref name="a">Smith, {{cite book|title=X}} p. 3.</ref> that run \
{{convert|12|km|mi}} a day&nbsp;&mdash; {{lang|fr|''chats''}} (; ), \
<ref name="b" />as the French (of France) say.
{| class="wikitable"
| a row of the table that is long enough to look like a sentence, and ends as one.
{| nested
| x
|}
|}
The energy is <math>E = mc^2</math> for a body at rest, which is a sentence that has a hole in it.
== Habits ==
* [[One]], [[two]]
* An item of a list that is a whole sentence, long enough to be worth keeping, is kept as a paragraph of \
its own, like this.<!-- no -->
== References ==
This sentence of the references is as long as a paragraph that is kept, but it is left out.
=== Deeper ===
This sentence below the references is as long as a paragraph that is kept, but it is left out.
== Life ==
They sleep for most of the day, as [[Aristotle|he]] noted in the year 350 BC. [[Category:Cats]]
[[fr:Chat]]
"""
    assert wikitext.clean(wiki) == [
        "Cats are felids that run 12 km a day \u2014 chats, as the French (of France) say.",
        "An item of a list that is a whole sentence, long enough to be worth keeping, is kept as a paragraph "
        "of its own, like this.",
        "They sleep for most of the day, as he noted in the year 350 BC.",
    ]


def test_documents_lose_nothing_and_stay_short():
    paragraphs = [prose(i, 10 + 7 * i) for i in range(60)]
    documents = wikitext.documents("Title", paragraphs)
    assert max(map(len, documents)) <= wikitext.MAX_DOC_CHARS
    joined = " ".join(" ".join(documents).split())
    assert joined == " ".join(" ".join(paragraphs).split())
    assert documents == wikitext.documents("Title", paragraphs)
    assert len({len(text) for text in documents}) > 5


def test_articles_skip_redirects(tmp_path):
    page = "<page><title>{}</title><ns>{}</ns>{}<revision><text>words</text></revision></page>"
    pages = page.format("A", 0, "") + page.format("B", 0, "<redirect/>") + page.format("C", 10, "")
    path = tmp_path / "x.bz2"
    path.write_bytes(bz2.compress(f'<m xmlns="http://www.mediawiki.org/x/">{pages}</m>'.encode()))
    assert list(wikitext.articles(path)) == [("A", "words")]


def test_the_embedded_text(tmp_path):
    """The only test that may need the package index; skipped where it is out of reach and nothing is kept."""
    try:
        (dump,) = wheels.fetch((wikitext.DUMP,))
    except shards.UserError as error:
        pytest.skip(str(error))
    (tmp_path / dump.name).write_bytes(dump.read_bytes())
    train, val = (documents_of(path) for path in wikitext.build(tmp_path))
    text = "\n".join(train + val)
    for debris in (
        "{",
        "}",
        "|",
        "[[",
        "]]",
        "<",
        ">",
        "==",
        "''",
        "http",
        "&nbsp;",
        "&amp;",
        "File:",
        "Category:",
    ):
        assert debris not in text, debris
    assert "()" not in text
    assert "  " not in text
    assert not set(train) & set(val)
    sizes = [sum(map(len, side)) for side in (train, val)]
    assert 0.08 < sizes[1] / sum(sizes) < 0.10
    assert sum(sizes) > 2_000_000
    assert max(map(len, train + val)) <= wikitext.MAX_DOC_CHARS
