"""Text files to documents: .txt and .jsonl, plain or .gz, .xz, .zst, as a stream of raw batches.

Documents: a .jsonl line's field `text`, as it is; in a .txt, the parts between lines that are exactly
`<|endoftext|>`, or, if it has none, paragraphs (blank lines part them) put together up to 4,000 characters.
"""

import gzip
import hashlib
import io
import json
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from shards import UserError

DOC_CHARS = 4_000  # of a document cut from a .txt; about 1,000 GPT-2 tokens
LINE_BYTES = 1 << 20  # a .txt line longer than this is cut, so that a file of one line still streams
BATCH_BYTES = 1 << 20  # raw input that a worker gets at once
SEPARATOR = b"<|endoftext|>"
DIGEST_BYTES = 16
BOM = "\ufeff"  # at the beginning of a file it marks the encoding and is no text
KINDS = (".txt", ".jsonl")
PACKINGS = ("", ".gz", ".xz", ".zst")


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """One input file."""

    path: Path
    size: int  # bytes on disk
    kind: str  # ".txt" or ".jsonl"
    packing: str  # "", ".gz", ".xz" or ".zst"
    sha256: str = ""
    license: str | None = None
    origin: str | None = None

    def row(self) -> dict:
        """As the manifest lists it."""
        keys = {"name": self.path.name, "bytes": self.size, "sha256": self.sha256}
        return {**keys, "license": self.license, "origin": self.origin}


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """Raw documents of one file, in order."""

    path: str
    kind: str
    parts: list[bytes]  # jsonl: a line each; txt: a document each
    where: list[int]  # jsonl: line numbers from 1; txt: byte offsets in the unpacked file


def find_sources(inputs: list[str]) -> list[Source]:
    """The files that `inputs` name (a folder: all of its .txt and .jsonl, sorted), unhashed."""
    sources = []
    for name in inputs:
        path = Path(name)
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.is_file() and _split_suffix(p) is not None)
            if not inside:
                raise UserError(f"{name}: no .txt or .jsonl file (.gz, .xz, .zst) in this folder")
        elif not path.exists():
            raise UserError(f"{name}: no such file; check the path")
        elif _split_suffix(path) is None:
            raise UserError(f"{name}: unknown kind of file; must be .txt or .jsonl, plain or .gz, .xz, .zst")
        else:
            inside = [path]
        for p in inside:
            kind, packing = _split_suffix(p)
            sources.append(Source(path=p, size=p.stat().st_size, kind=kind, packing=packing))
    return sources


def _split_suffix(path: Path) -> tuple[str, str] | None:
    packing = path.suffix if path.suffix in PACKINGS else ""
    kind = Path(path.name.removesuffix(packing)).suffix
    return (kind, packing) if kind in KINDS else None


class _Zstd(io.RawIOBase):
    """Unpacked bytes of a .zst file; unlike in the library's reader, a cut-off file is an error."""

    def __init__(self, file):
        import zstandard

        self._new = zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj
        self._file, self._frame, self._ready = file, None, b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self._ready:
            packed = self._file.read(1 << 17) if self._frame is None or not self._frame.unused_data else b""
            if self._frame is not None and self._frame.eof:
                packed, self._frame = self._frame.unused_data + packed, None
            if not packed:
                if self._frame is not None:
                    raise EOFError("the file ends in the middle of a frame")
                return 0
            if self._frame is None:
                self._frame = self._new()
            self._ready = self._frame.decompress(packed)
        part = self._ready[: len(buffer)]
        buffer[: len(part)] = part
        self._ready = self._ready[len(part) :]
        return len(part)


@contextmanager
def open_source(source: Source, progress: Callable[[int], object]) -> Iterator[io.BufferedReader]:
    """The unpacked bytes of a file; `progress` is told how many bytes on disk each read took."""

    class Counted(io.FileIO):
        def readinto(self, buffer):
            count = super().readinto(buffer)
            progress(count or 0)
            return count

    def damaged(reason) -> UserError:
        return UserError(f"{source.path}: damaged {source.packing} file ({reason}); fetch or pack it again")

    try:
        with io.BufferedReader(Counted(source.path), 1 << 20) as raw:
            if source.packing == ".gz":
                yield io.BufferedReader(gzip.GzipFile(fileobj=raw), 1 << 20)
            elif source.packing == ".xz":
                yield io.BufferedReader(lzma.LZMAFile(raw), 1 << 20)
            elif source.packing == ".zst":
                yield io.BufferedReader(_Zstd(raw), 1 << 20)
            else:
                yield raw
    except (EOFError, lzma.LZMAError, zlib.error, gzip.BadGzipFile) as error:
        raise damaged(error) from None
    except Exception as error:
        if type(error).__name__ == "ZstdError":  # named so: the library is imported only where it is needed
            raise damaged(error) from None
        raise


def batches(sources: list[Source], progress: Callable[[int], object]) -> Iterator[Batch]:
    """All documents of all files in order, about BATCH_BYTES at a time."""
    for source in sources:
        parts: list[bytes] = []
        where: list[int] = []
        size = 0
        has_separator = source.kind == ".txt" and _has_separator(source)
        with open_source(source, progress) as file:
            if source.kind == ".jsonl":
                documents = enumerate(file, start=1)
            elif has_separator:
                documents = _separated(file)
            else:
                documents = _paragraphs(file)
            for place, part in documents:
                parts.append(part)
                where.append(place)
                size += len(part)
                if size >= BATCH_BYTES:
                    yield Batch(path=str(source.path), kind=source.kind, parts=parts, where=where)
                    parts, where, size = [], [], 0
        if parts:
            yield Batch(path=str(source.path), kind=source.kind, parts=parts, where=where)


def _has_separator(source: Source) -> bool:
    with open_source(source, lambda count: None) as file:
        return any(map(_is_separator, _lines(file)))


def _is_separator(line: bytes) -> bool:
    return line.removeprefix(BOM.encode()).rstrip(b"\r\n") == SEPARATOR


def _lines(file: io.BufferedReader) -> Iterator[bytes]:
    """Lines with their ends; one longer than LINE_BYTES comes in parts, cut between UTF-8 characters."""
    kept = b""
    while line := file.readline(LINE_BYTES):
        line = kept + line
        kept = b""
        if not line.endswith(b"\n"):
            # Hold back a character that may be cut: from its first byte (11xxxxxx) in the last 3.
            for back in (1, 2, 3):
                if len(line) > back and line[-back] >= 0xC0:
                    line, kept = line[:-back], line[-back:]
                    break
        yield line
    if kept:
        yield kept


def _separated(file: io.BufferedReader) -> Iterator[tuple[int, bytes]]:
    """(byte offset, document): what stands between separator lines, without the line ends at its ends."""
    offset = begin = 0
    held: list[bytes] = []
    for line in _lines(file):
        if _is_separator(line):
            yield begin, b"".join(held)
            held, begin = [], offset + len(line)
        else:
            held.append(line)
        offset += len(line)
    yield begin, b"".join(held)


def _paragraphs(file: io.BufferedReader) -> Iterator[tuple[int, bytes]]:
    """(byte offset, document): whole paragraphs up to DOC_CHARS; one that is longer is cut at line ends.

    Characters are counted as bytes that begin one.
    """
    document: list[bytes] = []  # lines of whole paragraphs
    paragraph: list[bytes] = []  # lines of the one being read
    document_chars = paragraph_chars = 0
    offset = begin = paragraph_begin = 0
    for line in _lines(file):
        chars = _count_chars(line)
        too_long = paragraph_chars + chars > DOC_CHARS and paragraph_chars > 0
        is_blank = not line.strip()
        if too_long and not is_blank:
            if document:
                yield begin, b"".join(document)
            yield paragraph_begin, b"".join(paragraph)
            document, paragraph, document_chars, paragraph_chars = [], [], 0, 0
            begin = paragraph_begin = offset
        paragraph.append(line)
        paragraph_chars += chars
        offset += len(line)
        if is_blank:
            if document and document_chars + paragraph_chars > DOC_CHARS:
                yield begin, b"".join(document)
                document, document_chars, begin = [], 0, paragraph_begin
            document += paragraph
            document_chars += paragraph_chars
            paragraph, paragraph_chars, paragraph_begin = [], 0, offset
    if document and document_chars + paragraph_chars > DOC_CHARS:
        yield begin, b"".join(document)
        document, begin = [], paragraph_begin
    yield begin, b"".join(document + paragraph)


def _count_chars(line: bytes) -> int:
    return len(line) if line.isascii() else sum(1 for byte in line if byte & 0xC0 != 0x80)


def texts(batch: Batch) -> Iterator[tuple[str, str]]:
    """(place for messages, text) of each document, white space included."""
    for part, place in zip(batch.parts, batch.where, strict=True):
        if batch.kind == ".txt":
            try:
                text = part.decode()
            except UnicodeDecodeError as error:
                raise UserError(_not_utf8(f"{batch.path}: byte {place + error.start:,}")) from None
            text = text.removeprefix(BOM) if place == 0 else text
            yield f"{batch.path}: the document at byte {place:,}", text.strip("\r\n")
            continue
        where = f"{batch.path}:{place}"
        part = part.removeprefix(BOM.encode()) if place == 1 else part
        if not part.strip():
            continue
        try:
            row = json.loads(part.decode(), parse_int=float)  # int() refuses more than 4,300 digits
        except UnicodeDecodeError as error:
            raise UserError(_not_utf8(f"{where}, byte {error.start:,} of the line")) from None
        except (json.JSONDecodeError, RecursionError) as error:
            raise UserError(f"{where}: not JSON ({error}); a line must be an object with `text`") from None
        if not isinstance(row, dict) or not isinstance(row.get("text"), str):
            raise UserError(f"{where}: no string field `text`; a line must be an object with one")
        try:
            row["text"].encode()
        except UnicodeEncodeError:
            raise UserError(f"{where}: `text` holds half a surrogate pair, no character; mend it") from None
        yield where, row["text"]


def _not_utf8(where: str) -> str:
    return f"{where}: not UTF-8; convert the file (iconv -f ENCODING -t UTF-8)"


def digest_of(text: str) -> bytes:
    """What two equal documents share."""
    return hashlib.blake2b(text.encode(), digest_size=DIGEST_BYTES).digest()
