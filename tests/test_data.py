"""Shards, manifests, document packing and validation data, against naive per-document loops."""

import dataclasses
import hashlib
import itertools
import json
import re
import shutil
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import BOS, TOKEN_BYTES, VOCAB, write_corpus, write_shard, write_token_bytes

import train_gpt as tg

CPU = torch.device("cpu")


# --- helpers: a corpus of given shards, and the loader transcribed from the specification as plain loops ---


def documents_of(rng: np.random.Generator, lengths: list[int]) -> np.ndarray:
    """Documents of these lengths, BOS included."""
    return np.concatenate([np.append(BOS, rng.integers(2, VOCAB, n - 1)) for n in lengths])


def random_shard(rng: np.random.Generator, size: int) -> np.ndarray:
    """Many short documents, some long ones, runs of empty ones; it begins within a document."""
    tokens, total = [rng.integers(2, VOCAB, int(rng.integers(0, 30)))], 0
    while total < size:
        kind = rng.integers(0, 10)
        lengths = (
            [1] * 3
            if kind == 0
            else [int(rng.integers(100, 300))]
            if kind == 1
            else [int(rng.integers(1, 60))]
        )
        tokens.append(documents_of(rng, lengths))
        total += sum(lengths)
    return np.concatenate(tokens)[:size]


def corpus_of(
    folder: Path, shards: list[np.ndarray], val: np.ndarray | None = None, vocab: int = VOCAB
) -> tg.Corpus:
    """A prepared folder that holds exactly these training shards."""
    folder.mkdir(parents=True, exist_ok=True)
    splits = {"train": {"shards": []}, "val": {"shards": []}}
    val = np.append(BOS, np.arange(2, 200)) if val is None else val
    for split, rows in (("train", shards), ("val", [val])):
        for i, tokens in enumerate(rows):
            name = f"made_{split}_{i:06d}.bin"
            write_shard(folder / name, tokens)
            splits[split]["shards"].append({"file": name, "tokens": len(tokens)})
    table = np.where(np.arange(vocab) == BOS, 0, TOKEN_BYTES).astype(np.uint16)
    tokenizer = {"kind": "bytes", "vocab_size": vocab, "bos_id": BOS}
    manifest = {"tokenizer": tokenizer, "token_bytes": write_token_bytes(folder, table), "splits": splits}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return tg.Corpus.open(folder)


def naive_slots(
    shards: list[np.ndarray], sizes: list[int], slots: int, max_seq_len: int
) -> list[list[tuple]]:
    """For each step its slots as (shard, tokens [n + 1], document starts); fewer steps where data ends.

    The loop of the community's loader, one document at a time: a slot takes documents while it has at most n
    tokens; each is cut at the next BOS, at max_seq_len and at the slot's n + 1 tokens.
    """
    steps, shard, cursor = [], 0, 0
    while len(steps) < len(sizes) and shard < len(shards):
        tokens, n = shards[shard], sizes[len(steps)]
        begins = [i for i, token in enumerate(tokens.tolist()) if token == BOS]
        batch, index = [], cursor
        for _ in range(slots):
            slot, starts = [], []
            while len(slot) <= n and index < len(begins):
                p = begins[index]
                limit = begins[index + 1] if index + 1 < len(begins) else len(tokens)
                end = min(limit, p + max_seq_len, p + n - len(slot) + 1)
                starts.append(len(slot))
                slot += tokens[p:end].tolist()
                index += 1
            if len(slot) <= n:
                break
            batch.append((shard, slot, starts))
        if len(batch) < slots:
            shard, cursor = shard + 1, 0
        else:
            steps.append(batch)
            cursor = index
    return steps


def small(nano: tg.Recipe, steps: tuple[int, ...], slot_tokens: tuple[int, ...], **changes) -> tg.Recipe:
    """A recipe of these stages for 4 slots."""
    slots = changes.get("slots", 4)
    stages = tuple(
        dataclasses.replace(nano.stages[min(i, 3)], steps=n, batch_tokens=slots * size)
        for i, (n, size) in enumerate(zip(steps, slot_tokens, strict=True))
    )
    return dataclasses.replace(nano, **{"stages": stages, "slots": slots, "max_seq_len": 90, **changes})


def sizes_of(recipe: tg.Recipe) -> list[int]:
    return [stage.batch_tokens // recipe.slots for stage in recipe.stages for _ in range(stage.steps)]


def config_of(recipe: tg.Recipe, corpus: tg.Corpus) -> tg.Config:
    return tg.Config(
        recipe=recipe,
        vocab_size=corpus.vocab_size,
        slots=recipe.slots,
        dtype=torch.float32,
        attention="reference",
        fp8=(),
    )


def load(
    recipe: tg.Recipe, corpus: tg.Corpus, rank: int = 0, world: int = 1, first_step: int = 0
) -> list[list]:
    """The micro-batches of every step, as one rank gets them."""
    max_docs = tg.check_train_data(recipe, recipe.slots, corpus)
    ranks = tg.Ranks(rank, world, CPU)
    return list(tg.batches(config_of(recipe, corpus), ranks, corpus, max_docs, first_step))


def rows(step: list) -> tuple[torch.Tensor, torch.Tensor]:
    """(tokens, targets) [slots, slot tokens] of all slots of a step; positions say where a slot begins."""
    parts = []
    for batch in step:
        T = int(batch.positions_N.max()) + 1
        assert batch.positions_N.view(-1, T).tolist() == [list(range(T))] * (len(batch.positions_N) // T)
        parts.append((batch.tokens_N.view(-1, T), batch.targets_N.view(-1, T)))
    tokens, targets = zip(*parts, strict=True)
    return torch.cat(tokens), torch.cat(targets)


def assert_same(got: list[list], want: list[list]) -> None:
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        assert len(a) == len(b)
        assert all(torch.equal(x, y) for m, n in zip(a, b, strict=True) for x, y in zip(m, n, strict=True))


@pytest.fixture
def copy(corpus_dir, tmp_path) -> Path:
    """The toy corpus, free to be damaged."""
    return Path(shutil.copytree(corpus_dir, tmp_path / "data"))


def refusal(call, *arguments) -> str:
    """The message of the InputError that a call must raise: one line."""
    with pytest.raises(tg.InputError) as caught:
        call(*arguments)
    message = str(caught.value)
    assert "\n" not in message
    return message


REMEDY = re.compile(r"\b(make it with|fetch it again|prepare|add shards|choose|use|name)\b")


def edit(folder: Path, change) -> None:
    """Rewrite the manifest."""
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def edit_table(folder: Path, table: np.ndarray | bytes) -> None:
    """Another byte table, its hash in the manifest."""
    if isinstance(table, bytes):
        (folder / "token_bytes.npy").write_bytes(table)
    else:
        np.save(folder / "token_bytes.npy", table)
    digest = hashlib.sha256((folder / "token_bytes.npy").read_bytes()).hexdigest()
    edit(folder, lambda manifest: manifest["token_bytes"].update(sha256=digest))


# --- shards and manifests ----------------------------------------------------------------------------------


def shard_bytes(magic: int = 20240520, version: int = 1, count: int = 50, stored: int = 50) -> bytes:
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, count
    return header.tobytes() + np.arange(stored, dtype="<u2").tobytes()


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (shard_bytes(magic=20240521), "20240521, 1"),
        (shard_bytes(version=2), "20240520, 2"),
        (shard_bytes()[:1000], "begins with"),
        (shard_bytes()[:2], "nothing"),
        (b"", "nothing"),
        (b"PK\x03\x04" + bytes(2000), "67324752"),
        (shard_bytes(stored=49), "1122 bytes"),
        (shard_bytes(stored=51), "1126 bytes"),
        (shard_bytes() + b"x", "1125 bytes"),
        (shard_bytes(count=-1), "-1 tokens"),
        (shard_bytes(count=2**31 - 1), "2147483647 tokens"),
    ],
)
def test_damaged_shards_are_refused(tmp_path, content, found):
    path = tmp_path / "a_train_000000.bin"
    path.write_bytes(content)
    message = refusal(tg.check_shard, path)
    assert str(path) in message
    assert found in message
    assert REMEDY.search(message)


def test_a_good_shard_is_counted_and_mapped(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(shard_bytes())
    assert tg.check_shard(path) == tg.check_shard(path, 50) == 50
    assert tg.map_shard(path).tolist() == list(range(50))
    assert not tg.map_shard(path).flags.writeable
    message = refusal(tg.check_shard, path, 51)
    assert "50 tokens" in message
    assert "manifest says 51" in message


def test_a_prepared_folder_opens(corpus_dir):
    corpus = tg.Corpus.open(corpus_dir)
    assert [p.name for p in corpus.train] == ["toy_train_000000.bin", "toy_train_000001.bin"]
    assert [p.name for p in corpus.val] == ["toy_val_000000.bin"]
    assert (corpus.vocab_size, corpus.bos_id, corpus.tokenizer) == (VOCAB, BOS, "bytes")
    assert corpus.sha256 == hashlib.sha256((corpus_dir / "manifest.json").read_bytes()).hexdigest()
    assert corpus.token_bytes.tolist() == [0 if i == BOS else TOKEN_BYTES for i in range(VOCAB)]


def first_row(manifest: dict) -> dict:
    return manifest["splits"]["train"]["shards"][0]


DAMAGE = {  # what is done to a good folder: what the message must hold
    "missing shard": (lambda d: (d / "toy_train_000001.bin").unlink(), "toy_train_000001.bin"),
    "extra shard": (lambda d: write_shard(d / "toy_train_000002.bin", np.arange(9)), "toy_train_000002.bin"),
    "no validation": (lambda d: (d / "toy_val_000000.bin").unlink(), "toy_val_000000.bin"),
    "bad shard": (lambda d: (d / "toy_val_000000.bin").write_bytes(b"x" * 2000), "toy_val_000000.bin"),
    "short shard": (lambda d: (d / "toy_val_000000.bin").write_bytes(shard_bytes()), "manifest says 6000"),
    "token count": (lambda d: edit(d, lambda m: first_row(m).update(tokens=5)), "manifest says 5"),
    "no manifest": (lambda d: (d / "manifest.json").unlink(), "no manifest.json"),
    "not JSON": (lambda d: (d / "manifest.json").write_text("{"), "JSONDecodeError"),
    "not text": (lambda d: (d / "manifest.json").write_bytes(b"\xff\xfe\x00"), "manifest.json"),
    "empty": (lambda d: (d / "manifest.json").write_text(""), "JSONDecodeError"),
    "a list": (lambda d: (d / "manifest.json").write_text("[]"), "TypeError"),
    "no tokenizer": (lambda d: edit(d, lambda m: m.pop("tokenizer")), "'tokenizer'"),
    "no splits": (lambda d: edit(d, lambda m: m.pop("splits")), "'splits'"),
    "no val split": (lambda d: edit(d, lambda m: m["splits"].pop("val")), "'val'"),
    "row without count": (lambda d: edit(d, lambda m: first_row(m).pop("tokens")), "'tokens'"),
    "no bos_id": (lambda d: edit(d, lambda m: m["tokenizer"].pop("bos_id")), "'bos_id'"),
    "no byte table": (lambda d: (d / "token_bytes.npy").unlink(), "token_bytes.npy"),
    "byte table garbage": (lambda d: edit_table(d, b"garbage"), "manifest.json"),
    "byte table empty": (lambda d: edit_table(d, b""), "manifest.json"),
    "byte table short": (lambda d: edit_table(d, np.zeros(9, np.uint16)), "byte table of 9"),
    "byte table of another": (
        lambda d: np.save(d / "token_bytes.npy", np.full(VOCAB, 7, np.uint16)),
        "token_bytes.npy has another hash",
    ),
    "vocabulary": (lambda d: edit(d, lambda m: m["tokenizer"].update(vocab_size=251)), "vocab_size 251"),
    "vocabulary text": (lambda d: edit(d, lambda m: m["tokenizer"].update(vocab_size="250")), "250"),
    "bos outside": (lambda d: edit(d, lambda m: m["tokenizer"].update(bos_id=VOCAB)), f"bos_id {VOCAB}"),
    "bos negative": (lambda d: edit(d, lambda m: m["tokenizer"].update(bos_id=-1)), "bos_id -1"),
    "bos null": (lambda d: edit(d, lambda m: m["tokenizer"].update(bos_id=None)), "None"),
    "bos text": (lambda d: edit(d, lambda m: m["tokenizer"].update(bos_id="1")), "1"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_folders_are_refused(copy, damage):
    do, found = DAMAGE[damage]
    do(copy)
    message = refusal(tg.Corpus.open, copy)
    assert str(copy) in message
    assert found in message
    assert REMEDY.search(message), "no remedy"


def test_a_folder_that_is_not_there(tmp_path, monkeypatch):
    message = refusal(tg.Corpus.open, tmp_path / "nothing")
    assert str(tmp_path / "nothing") in message
    assert "data/fineweb.py" in message
    monkeypatch.setattr(tg, "PROJECT", tmp_path)
    assert "data/prepare.py --default" in refusal(tg.Corpus.open, tmp_path / "data" / "default")


def test_a_vocabulary_must_fit_16_bits(tmp_path):
    assert "vocab_size 65537" in refusal(lambda: corpus_of(tmp_path, [np.arange(1, 9)], vocab=65537))


@pytest.mark.parametrize("place", [0, 7, 2500])
def test_training_tokens_outside_the_vocabulary_are_refused(tmp_path, nano, place):
    rng = np.random.default_rng(0)
    shards = [documents_of(rng, [40] * 64), documents_of(rng, [40] * 64)]
    shards[1][place] = VOCAB
    corpus = corpus_of(tmp_path, shards)
    message = refusal(load, small(nano, (9, 9), (64, 64)), corpus)
    assert str(corpus.train[1]) in message
    assert str(VOCAB) in message
    assert REMEDY.search(message), "no remedy"


def test_validation_tokens_outside_the_vocabulary_are_refused(tmp_path, nano):
    val = documents_of(np.random.default_rng(0), [50] * 50)
    val[2048] = VOCAB + 3  # the last target
    corpus = corpus_of(tmp_path, [np.arange(1, 99)], val)
    message = refusal(tg.ValSet.read, nano, corpus, tg.Ranks(0, 1, CPU))
    assert str(tmp_path) in message
    assert str(VOCAB + 3) in message
    assert REMEDY.search(message), "no remedy"


# --- document index and packing ----------------------------------------------------------------------------


@pytest.mark.parametrize("max_seq_len", [1, 2, 90, 10**6])
@pytest.mark.parametrize("head", [None, 1, 100, 2999, 3000, 9999])
def test_the_index_equals_a_scan(tmp_path, max_seq_len, head):
    tokens = random_shard(np.random.default_rng(5), 3000)
    corpus = corpus_of(tmp_path, [tokens])
    found = tg.Documents.index(corpus.train[0], corpus, max_seq_len, head)
    begins = [i for i, token in enumerate(tokens[:head]) if token == BOS]
    if head and head < len(tokens):
        begins, ends = begins[:-1], begins[1:]  # the last one may go on beyond the head
    else:
        ends = [*begins[1:], len(tokens)]
    lengths = [min(b - a, max_seq_len) for a, b in zip(begins, ends, strict=True)]
    assert found.starts.tolist() == begins
    assert found.ends.tolist() == [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    assert np.array_equal(found.tokens, tokens)


@pytest.mark.parametrize("seed", range(6))
def test_batches_equal_the_naive_loop(tmp_path, nano, seed):
    """Two shards, three slot sizes, documents longer than a slot, than max_seq_len, and of one token."""
    rng = np.random.default_rng(seed)
    shards = [random_shard(rng, 5000), random_shard(rng, 9000)]
    corpus = corpus_of(tmp_path, shards)
    recipe = small(nano, (5, 4, 2), (64, 112, 240), max_seq_len=int(rng.choice([50, 90, 250])))
    want = naive_slots(shards, sizes_of(recipe), 4, recipe.max_seq_len)
    got = load(recipe, corpus)
    assert len(got) == len(want) == recipe.total_steps
    assert {shard for step in want for shard, _, _ in step} == {0, 1}
    for step, slots in zip(got, want, strict=True):
        tokens, targets = rows(step)
        packed = torch.tensor([slot for _, slot, _ in slots])
        assert torch.equal(tokens, packed[:, :-1].to(torch.int32))
        assert torch.equal(targets, packed[:, 1:])
        done, T = 0, len(slots[0][1]) - 1
        for batch in step:
            N = len(batch.tokens_N)
            B = N // T
            assert batch.positions_N.tolist() == list(range(T)) * B
            starts = [i * T + s for i in range(B) for s in slots[done + i][2]]
            assert batch.cu_seqlens.tolist()[: len(starts)] == starts
            assert set(batch.cu_seqlens.tolist()[len(starts) :]) == {N}
            done += B
        assert done == 4


@pytest.mark.parametrize("seed", range(3))
def test_boundaries_are_the_places_of_bos(tmp_path, nano, seed):
    corpus = corpus_of(tmp_path, [random_shard(np.random.default_rng(seed), 12000)])
    for step in load(small(nano, (6, 4), (64, 240)), corpus):
        for tokens, targets, positions, cu in step:
            dtypes = [x.dtype for x in (tokens, targets, positions, cu)]
            assert dtypes == [torch.int32] * 4
            assert all(x.is_contiguous() and x.ndim == 1 for x in (tokens, targets, positions, cu))
            assert len(tokens) == len(targets) == len(positions)
            inside = positions[1:] > 0
            assert torch.equal(targets[:-1][inside], tokens[1:][inside].long())
            places = torch.nonzero(tokens == BOS).flatten().tolist()
            assert sorted(set(cu.tolist())) == [*places, len(tokens)]
            assert (tokens[positions == 0] == BOS).all()
            assert positions[0] == 0
            assert (cu.diff() >= 0).all()
            assert cu[0] == 0
            assert cu[-1] == len(tokens)


def test_each_document_is_used_at_most_once_and_in_order(tmp_path, nano):
    """Every document carries its number as its second token."""
    rng = np.random.default_rng(1)
    shards, number = [], 2
    for size in (60, 90):
        parts = []
        for _ in range(size):
            parts.append([BOS, number, *[number] * int(rng.integers(1, 150))])
            number += 1
        shards.append(np.concatenate(parts))
    corpus = corpus_of(tmp_path, shards, vocab=number)
    numbers = []
    for step in load(small(nano, (8, 4), (64, 112)), corpus):
        tokens, targets = rows(step)
        for row in torch.cat((tokens[:, :1].long(), targets), dim=1).tolist():
            whole = [b for a, b in itertools.pairwise(row) if a == BOS]
            assert set(row) == {BOS, *whole}, "tokens of a document that does not begin in the slot"
            numbers += whole
    assert numbers == sorted(set(numbers))


def test_a_change_of_shard_drops_the_rest(tmp_path, nano):
    """A shard with documents for two batches and a half, then one for the other three."""
    rng = np.random.default_rng(2)
    shards = [documents_of(rng, [65] * 10), documents_of(rng, [65] * 12)]
    corpus = corpus_of(tmp_path, shards)
    got = load(small(nano, (4, 1), (64, 64)), corpus)
    tokens = [rows(step)[0] for step in got]
    for i, (shard, first) in enumerate([(0, 0), (0, 4), (1, 0), (1, 4), (1, 8)]):
        want = shards[shard].reshape(-1, 65)[first : first + 4, :64]
        assert np.array_equal(tokens[i].numpy(), want)


@pytest.mark.parametrize("head", [40, 500, 1500, 4999])
def test_the_head_index_changes_nothing(tmp_path, nano, monkeypatch, head):
    """The first shard is used before its index is whole; where the head ends must not be seen in batches."""
    rng = np.random.default_rng(3)
    corpus = corpus_of(tmp_path, [random_shard(rng, 5000), random_shard(rng, 9000)])
    recipe, whole, used = small(nano, (5, 4, 2), (64, 112, 240)), tg.Documents.index, []
    want = load(recipe, corpus)

    def index(path, corpus, max_seq_len, head_asked=None):
        used.append(head_asked)
        return whole(path, corpus, max_seq_len, head if head_asked else None)

    monkeypatch.setattr(
        tg.Documents,
        "index",
        lambda path, corpus, max_seq_len, head=None: index(path, corpus, max_seq_len, head),
    )
    assert_same(load(recipe, corpus), want)
    assert any(used), "the loader did not ask for a head"


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("micro_tokens", [64, 600, 10**6])
def test_ranks_share_the_slots_of_one(tmp_path, nano, world, micro_tokens):
    """The union over ranks, in rank order, is what one rank gets: nothing twice, nothing lost."""
    corpus = corpus_of(tmp_path, [random_shard(np.random.default_rng(4), 40000)])
    recipe = small(nano, (3, 3), (64, 112), slots=12, micro_tokens=micro_tokens)
    alone = [rows(step) for step in load(dataclasses.replace(recipe, micro_tokens=10**6), corpus)]
    shared = [load(recipe, corpus, rank, world) for rank in range(world)]
    for i, (tokens, targets) in enumerate(alone):
        parts = [rows(steps[i]) for steps in shared]
        assert {len(part) for part, _ in parts} == {12 // world}
        assert torch.equal(torch.cat([part for part, _ in parts]), tokens)
        assert torch.equal(torch.cat([part for _, part in parts]), targets)
        for steps in shared:
            T = tokens.shape[1]
            assert all(b.tokens_N.numel() <= max(micro_tokens, T) for b in steps[i])
            assert len({b.tokens_N.shape for b in steps[i]}) == 1, "passes of a step differ in shape"
            assert len({len(b.cu_seqlens) for b in steps[i]}) == 1


def test_micro_batches_only_group(tmp_path, nano):
    corpus = corpus_of(tmp_path, [random_shard(np.random.default_rng(4), 40000)])
    recipe = small(nano, (3, 3), (64, 112), slots=12, micro_tokens=10**6)
    (one,), *_ = load(recipe, corpus)
    for passes in (1, 2, 3, 4, 6, 12):
        parts, *_ = load(dataclasses.replace(recipe, micro_tokens=64 * 12 // passes), corpus)
        assert len(parts) == passes
        assert torch.equal(rows(parts)[0], rows([one])[0])
        starts = [
            p + i * (12 // passes) * 64
            for i, b in enumerate(parts)
            for p in sorted(set(b.cu_seqlens.tolist()))
        ]
        assert sorted(set(starts)) == sorted(set(one.cu_seqlens.tolist()))
    assert [tg.slots_per_pass(12, 64, n) for n in (1, 64, 200, 256, 320, 768, 9999)] == [
        1,
        1,
        3,
        4,
        4,
        12,
        12,
    ]


@pytest.mark.parametrize("first_step", [1, 5, 9, 11])
def test_starting_later_equals_skipping(tmp_path, nano, first_step):
    rng = np.random.default_rng(3)
    corpus = corpus_of(tmp_path, [random_shard(rng, 5000), random_shard(rng, 9000)])
    recipe = small(nano, (5, 4, 2), (64, 112, 240))
    assert_same(load(recipe, corpus, first_step=first_step), load(recipe, corpus)[first_step:])


def test_the_most_documents_of_a_slot_are_known_before(tmp_path, nano):
    rng = np.random.default_rng(6)
    shards = [random_shard(rng, 20000)]
    recipe = small(nano, (5, 4, 2), (64, 112, 240))
    most = max(len(s) for step in naive_slots(shards, sizes_of(recipe), 4, 90) for _, _, s in step)
    assert tg.check_train_data(recipe, 4, corpus_of(tmp_path, shards)) == most


def test_too_few_tokens_are_noticed_before_training(tmp_path, nano):
    rng = np.random.default_rng(2)
    corpus = corpus_of(tmp_path, [documents_of(rng, [65] * 10), documents_of(rng, [65] * 12)])
    recipe = small(nano, (4, 2), (64, 64))
    message = refusal(tg.check_train_data, recipe, 4, corpus)
    for found in ("5 of 6 steps", recipe.name, f"{6 * 4 * 64:,} tokens", f"{22 * 65:,}", "90"):
        assert found in message
    assert REMEDY.search(message)
    exact = small(nano, (4, 1), (64, 64))
    assert len(load(exact, corpus)) == 5


def unchecked(recipe: tg.Recipe, corpus: tg.Corpus, max_docs: int = 99):
    """Batches without the check that the shards last."""
    return tg.batches(config_of(recipe, corpus), tg.Ranks(0, 1, CPU), corpus, max_docs, 0)


def test_the_end_of_the_shards_reaches_whoever_asks_for_the_batch(tmp_path, nano):
    """The thread that packs ahead notices it one step early; it comes with the step that lacks its data."""
    rng = np.random.default_rng(2)
    corpus = corpus_of(tmp_path, [documents_of(rng, [65] * 10), documents_of(rng, [65] * 12)])
    exact, before = small(nano, (4, 1), (64, 64)), threading.active_count()
    stream = unchecked(small(nano, (4, 2), (64, 64)), corpus, tg.check_train_data(exact, 4, corpus))
    assert_same([next(stream) for _ in range(5)], load(exact, corpus))
    assert "5 of 6 steps" in refusal(next, stream)
    assert threading.active_count() <= before, "a thread is left behind"
    assert list(stream) == []


def test_tokens_outside_the_vocabulary_reach_whoever_asks_for_the_batch(tmp_path, nano):
    rng = np.random.default_rng(2)
    shards = [documents_of(rng, [65] * 10), documents_of(rng, [65] * 12)]
    shards[1][7] = VOCAB
    stream = unchecked(small(nano, (4, 1), (64, 64)), corpus_of(tmp_path, shards))
    assert len([next(stream) for _ in range(2)]) == 2
    assert str(VOCAB) in refusal(next, stream)


def test_the_next_batch_is_packed_while_this_one_is_used(tmp_path, nano, monkeypatch):
    """So many steps ahead and no more, in another thread."""
    monkeypatch.setattr(tg, "STEPS_AHEAD", 1)
    corpus = corpus_of(tmp_path, [random_shard(np.random.default_rng(4), 20000)])
    recipe, packed, packing = small(nano, (3, 2), (64, 64)), [], tg.pack_batch  # one pass a step
    want = load(recipe, corpus)

    def watched(*arguments):
        packed.append(threading.current_thread())
        return packing(*arguments)

    monkeypatch.setattr(tg, "pack_batch", watched)
    stream, got = unchecked(recipe, corpus, tg.check_train_data(recipe, 4, corpus)), []
    for ahead in (2, 3, 4, 5, 5):
        got.append(next(stream))
        deadline = time.monotonic() + 30
        while len(packed) < ahead and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(0.02)
        assert len(packed) == ahead
    assert threading.main_thread() not in packed
    assert next(stream, None) is None
    assert_same(got, want)


def test_batches_may_be_left_unused(tmp_path, nano):
    """A run that ends early closes the stream and its threads."""
    corpus = corpus_of(tmp_path, [random_shard(np.random.default_rng(4), 20000)])
    before = threading.active_count()
    stream = unchecked(small(nano, (3, 2), (64, 64)), corpus)
    next(stream)
    stream.close()
    del stream
    assert threading.active_count() <= before


def test_an_empty_shard_among_others(tmp_path, nano):
    """A header that promises no tokens is a shard without documents, or is refused; never a traceback."""
    rng = np.random.default_rng(2)
    shards = [documents_of(rng, [65] * 8), np.empty(0, np.int64), documents_of(rng, [65] * 8)]
    try:
        got = load(small(nano, (3, 1), (64, 64)), corpus_of(tmp_path, shards))
    except tg.InputError:
        return
    assert len(got) == 4


def test_shards_without_documents_are_skipped(tmp_path, nano):
    rng = np.random.default_rng(2)
    shards = [np.full(500, 7), documents_of(rng, [65] * 8), np.full(500, 7), documents_of(rng, [65] * 8)]
    assert len(load(small(nano, (3, 1), (64, 64)), corpus_of(tmp_path, shards))) == 4
    nothing = corpus_of(tmp_path / "nothing", [np.full(5000, 7)])
    assert "0 of 4 steps" in refusal(load, small(nano, (3, 1), (64, 64)), nothing)


# --- validation --------------------------------------------------------------------------------------------


def test_validation_slots_are_the_stream(tmp_path, nano):
    """Not aligned to documents; the last target of a slot is the first token of the next."""
    val = random_shard(np.random.default_rng(8), 2500)
    table = np.random.default_rng(9).integers(0, 20, VOCAB).astype(np.uint16)
    corpus = dataclasses.replace(corpus_of(tmp_path, [np.arange(1, 99)], val), token_bytes=table)
    found = tg.ValSet.read(nano, corpus, tg.Ranks(0, 1, CPU))
    assert len(found.slots) == 4
    longest, most = 0, 0
    for i, (tokens, starts) in enumerate(found.slots):
        part = val[512 * i : 512 * i + 513]
        assert np.array_equal(tokens, part)
        want = [k for k in range(512) if k == 0 or part[k] == BOS]
        assert starts.tolist() == want
        longest = max(longest, *(b - a for a, b in zip(want, [*want[1:], 512], strict=True)))
        most = max(most, len(want))
    assert found.max_docs == most
    assert longest <= found.max_seq_len < longest + 128
    assert found.max_seq_len % 128 == 0
    assert found.num_tokens == 2048
    assert found.num_bytes == sum(int(table[t]) for t in val[1:2049])


def test_validation_may_span_shards(tmp_path, nano):
    val = random_shard(np.random.default_rng(8), 2500)
    one = corpus_of(tmp_path / "one", [np.arange(1, 99)], val)
    paths = []
    for i, part in enumerate((val[:100], val[100:1700], val[1700:])):
        paths.append(tmp_path / f"part_val_{i}.bin")
        write_shard(paths[-1], part)
    ranks = tg.Ranks(0, 1, CPU)
    a, b = (tg.ValSet.read(nano, c, ranks) for c in (one, dataclasses.replace(one, val=tuple(paths))))
    assert all(
        np.array_equal(x[0], y[0]) and np.array_equal(x[1], y[1])
        for x, y in zip(a.slots, b.slots, strict=True)
    )
    assert a.num_bytes == b.num_bytes


@pytest.mark.parametrize("world", [2, 3, 4, 5])
def test_validation_slots_over_ranks(tmp_path, nano, world):
    """Disjoint and complete, also where ranks get different numbers or none; shapes agree between ranks."""
    corpus = corpus_of(tmp_path, [np.arange(1, 99)], random_shard(np.random.default_rng(8), 2500))
    alone = tg.ValSet.read(nano, corpus, tg.Ranks(0, 1, CPU))
    shared = [tg.ValSet.read(nano, corpus, tg.Ranks(r, world, CPU)) for r in range(world)]
    for field in ("max_docs", "max_seq_len", "num_tokens", "num_bytes"):
        assert {getattr(val, field) for val in shared} == {getattr(alone, field)}
    key = sorted(tokens.tobytes() for val in shared for tokens, _ in val.slots)
    assert key == sorted(tokens.tobytes() for tokens, _ in alone.slots)
    assert len(set(key)) == 4


def test_too_short_validation_is_refused(tmp_path, nano):
    """Every target needs a token: one more than the recipe scores."""
    val = random_shard(np.random.default_rng(8), 2049)
    ranks = tg.Ranks(0, 1, CPU)
    assert tg.ValSet.read(nano, corpus_of(tmp_path / "a", [np.arange(1, 99)], val), ranks).num_tokens == 2048
    message = refusal(tg.ValSet.read, nano, corpus_of(tmp_path / "b", [np.arange(1, 99)], val[:-1]), ranks)
    for found in (nano.name, "2,049", "2,048", "data/prepare.py"):
        assert found in message


def test_a_batch_with_more_documents_than_planned_is_a_bug():
    slot = np.full(17, BOS, np.uint16), np.arange(17)
    with pytest.raises(AssertionError, match="17 documents"):
        tg.pack_batch([slot], 16)


def test_slots_are_packed_side_by_side():
    """Worked out by hand: two slots of three tokens, the target of a slot's last token is its fourth."""
    slots = [
        (np.array([1, 5, 1, 6], np.uint16), np.array([0, 2])),
        (np.array([1, 65535, 8, 9], np.uint16), np.array([0])),
    ]
    packed = tg.pack_batch(slots, 5)
    assert all(isinstance(x, np.ndarray) for x in packed)
    batch = tg.to_device(packed, CPU)
    assert {name: x.tolist() for name, x in batch._asdict().items()} == {
        "tokens_N": [1, 5, 1, 1, 65535, 8],
        "targets_N": [5, 1, 6, 65535, 8, 9],
        "positions_N": [0, 1, 2, 0, 1, 2],
        "cu_seqlens": [0, 2, 3, 6, 6, 6],
    }
    exact = tg.to_device(tg.pack_batch(slots, 3), CPU)
    assert exact.cu_seqlens.tolist() == [0, 2, 3, 6], "as many documents as were planned"


def test_the_toy_corpus_is_what_its_manifest_says(tmp_path):
    """The fixture itself: bytes of the validation targets by the table."""
    folder = write_corpus(tmp_path / "again", (500,), 300)
    corpus = tg.Corpus.open(folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    tokens = tg.map_shard(corpus.val[0])
    assert int(corpus.token_bytes[tokens].sum()) == manifest["splits"]["val"]["bytes"]
