"""Tokens to bytes: how many bytes of text each scored token is charged with.

Bits per byte = nats / ln 2 / bytes, so a byte counted twice flatters the score. A token is charged with what
it adds to the decoded text. For GPT-2's pieces and for plain bytes that is the token's own; a SentencePiece
token that begins with a space (U+2581 in the piece) may lose it at the beginning of a document: that depends
on the model, and on the token before. Control, unknown and unused pieces are charged with nothing.

The text is the tokenizer's: where a model normalises (nmt_nfkc does), these are bytes of the normalised text,
as the contest counts them.
"""

import hashlib
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

DATA = Path(__file__).resolve().parents[1] / "data"
if DATA.is_dir():  # in a submission's folder the two modules are beside this file
    sys.path.append(str(DATA))

import vocab  # noqa: E402
from shards import MANIFEST, UserError, read_manifest  # noqa: E402

BYTES = "bytes"  # as a path: the tokenizer that needs no file


class Tokenizer(Protocol):
    """What the score needs to know of a vocabulary."""

    vocab_size: int
    bos: int  # begins every document
    sha256: str  # of the file that says which bytes a token stands for

    def bytes_of_targets(self, inputs: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """int64 of the targets' shape: bytes charged for each, given the token before it."""

    def decode(self, ids: Iterable[int]) -> bytes:
        """The text of whole documents, end to end, by the tokenizer's own library."""


@dataclass(frozen=True, eq=False)
class Charges:
    """A `Tokenizer`: three tables over the vocabulary, and the library's own decoder."""

    vocab_size: int
    bos: int
    sha256: str
    num_bytes: np.ndarray  # int64 [vocab]: bytes of each token after another token of text
    lost_at_start: np.ndarray  # int64 [vocab]: of these, those that a document's first token does not add
    is_boundary: np.ndarray  # bool [vocab]: tokens that are no text, after which a document begins
    library: vocab.Tokenizer

    def bytes_of_targets(self, inputs: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """int64 of the targets' shape: bytes charged for each, given the token before it."""
        return self.num_bytes[targets] - self.lost_at_start[targets] * self.is_boundary[inputs]

    def decode(self, ids: Iterable[int]) -> bytes:
        """The text of whole documents, end to end, as SentencePiece or tiktoken decodes it."""
        tokens = np.fromiter(ids, dtype=np.int64)
        documents = np.split(tokens, np.flatnonzero(tokens == self.bos))
        return b"".join(
            _decode_one(self.library, document[document != self.bos].tolist()) for document in documents
        )


def _decode_one(library: vocab.Tokenizer, ids: list[int]) -> bytes:
    """A document's bytes. SentencePiece writes U+FFFD for a character that a cut left incomplete."""
    if library.kind == "bytes":
        return bytes(ids)
    if library.kind == "gpt2":
        return library.encoding.decode_bytes(ids)
    return library.processor.decode(ids, out_type=bytes) if ids else b""  # 0.2.2 makes a str of no tokens


def load_tokenizer(path: str | Path) -> Charges:
    """The tokenizer of a prepared folder, of a SentencePiece .model or GPT-2's encoder.json, or 'bytes'."""
    path = Path(path)
    if str(path) == BYTES:
        library = vocab.Bytes()
    elif path.is_dir():
        library = _of_folder(path)
    elif path.name == vocab.ENCODER.name:
        library = vocab.Gpt2(vocab.gpt2_files(path.parent))
    elif path.suffix == ".model":
        library = vocab.SentencePiece(path.stem, path.name, _read(path))
    else:
        rule = (
            f"must be a prepared folder, a SentencePiece .model, GPT-2's {vocab.ENCODER.name}, or {BYTES!r}"
        )
        raise UserError(f"tokenizer {path}: {rule}")
    return charges_of(library)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"tokenizer {path}: {error.strerror}; check the path") from None


def _of_folder(folder: Path) -> vocab.Tokenizer:
    """The tokenizer that a prepared folder's manifest names, its files checked."""
    manifest = read_manifest(folder)
    if manifest is None:
        raise UserError(f"tokenizer {folder}: no {MANIFEST} in it; prepare it with data/prepare.py")
    row, files = manifest["tokenizer"], {}
    for file in row["files"]:
        name = Path(file["file"]).name
        files[name] = _read(folder / name)
        if (found := hashlib.sha256(files[name]).hexdigest()) != file["sha256"]:
            raise UserError(f"tokenizer {folder / name}: SHA-256 {found}, the manifest says {file['sha256']}")
    return vocab.load(row["kind"], row["name"], files)


def charges_of(library: vocab.Tokenizer) -> Charges:
    """The tables of one of vocab.py's tokenizers."""
    num_bytes = library.token_bytes.astype(np.int64)
    lost, is_boundary = np.zeros_like(num_bytes), num_bytes == 0
    if library.kind == "sentencepiece":
        lost = _lost_at_start(library)
    decides = library.files.get(vocab.ENCODER.name) or next(
        iter(library.files.values()), library.name.encode()
    )
    digest = hashlib.sha256(decides).hexdigest()
    return Charges(library.vocab_size, library.bos_id, digest, num_bytes, lost, is_boundary, library)


def _lost_at_start(library: vocab.SentencePiece) -> np.ndarray:
    """int64 [vocab]: bytes that the model's own decoder drops from a token at the beginning of a document."""
    p = library.processor
    if p.piece_to_id(vocab.SPACE) == p.unk_id():
        # Without it a space costs three byte tokens, and every word would be charged with two bytes too many.
        raise UserError(
            f"{library.name}: the model has no piece U+2581 alone; train it with byte fallback and a space"
        )
    lost = np.zeros(library.vocab_size, dtype=np.int64)
    for i in range(library.vocab_size):
        if library.token_bytes[i] and not p.is_byte(i) and p.id_to_piece(i).startswith(vocab.SPACE):
            lost[i] = int(library.token_bytes[i]) - len(p.decode([i]).encode())
    return lost
