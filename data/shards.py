"""Token shards on disk: the format, safe writing, the manifest, and how the data scripts fail.

A shard is 256 little-endian int32 (1,024 bytes: [0] = 20240520, [1] = 1, [2] = token count, rest 0), then
that many little-endian uint16 tokens. Each document begins with the BOS token. A folder of shards is
complete when it holds `manifest.json`: that file is written last, after everything it lists.
"""

import argparse
import contextlib
import errno
import hashlib
import io
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

MAGIC = 20240520
VERSION = 1
HEADER_INTS = 256
HEADER_BYTES = 4 * HEADER_INTS
MAX_VOCAB = 65_536  # tokens are uint16
TOKEN_DTYPE = np.dtype("<u2")
MANIFEST = "manifest.json"
MANIFEST_FORMAT = 1
TOKEN_BYTES_FILE = "token_bytes.npy"
PARTIAL = ".partial-"  # prefix of every file that is not finished; readers sort it out by name
JOURNAL = PARTIAL + "journal.json"  # while a folder's contents are replaced: the names that then mean nothing
CHUNK = 1 << 22


class UserError(ValueError):
    """Wrong input, file or environment. The message names value, rule and remedy, on one line."""


class Parser(argparse.ArgumentParser):
    """argparse, but a wrong command line is one line on stderr, as every other input error."""

    def error(self, message: str):
        raise UserError(f"{message} (see {self.prog} --help)")


def run_main(main: Callable[[], None]) -> None:
    """Call `main`; input errors become one line on stderr and exit code 2, an interrupt exit code 130."""

    def stop(signum, frame):
        raise KeyboardInterrupt

    with contextlib.suppress(ValueError):  # not the main thread: leave the caller's handler
        signal.signal(signal.SIGTERM, stop)
    try:
        main()
    except UserError as error:
        message = str(error)
    except BrokenPipeError:
        # The reader of stdout went away (`| head`); point it elsewhere so that the exit prints nothing.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        message = os_error_line(error)
    except KeyboardInterrupt:
        print("error: interrupted; unfinished files were removed, run it again", file=sys.stderr)
        sys.exit(130)
    else:
        return
    print("error: " + " ".join(message.split()), file=sys.stderr)
    sys.exit(2)


def os_error_line(error: OSError) -> str:
    """One line for an operating system error: file, reason, what to do."""
    remedy = {
        errno.ENOSPC: "free space or choose another folder",
        errno.EDQUOT: "free space in your quota or choose another folder",
        errno.EACCES: "check the permissions or choose another folder",
        errno.EPERM: "check the permissions or choose another folder",
        errno.EROFS: "choose a folder on a writable disk",
        errno.ENOTDIR: "a part of that path is a file; choose another folder",
        errno.EEXIST: "a file has that name; choose another folder",
        errno.ENOENT: "check the path",
    }.get(error.errno, "check the path and the disk")
    name = error.filename if error.filename is not None else "file"
    return f"{name}: {error.strerror or error}; {remedy}"


def sha256_file(path: Path, progress: Callable[[int], object] | None = None) -> str:
    """SHA-256 of a file in hex, read in pieces of 4 MiB; `progress` is called with each piece's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while piece := file.read(CHUNK):
            digest.update(piece)
            if progress:
                progress(len(piece))
    return digest.hexdigest()


def fsync_folder(folder: Path) -> None:
    """Make renames in `folder` durable (not every file system lets a folder be opened: then nothing)."""
    with contextlib.suppress(OSError):
        fd = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def write_atomically(path: Path, content: bytes) -> str:
    """Write `content` under a temporary name in the same folder, fsync, rename. Returns its SHA-256."""
    partial = path.with_name(PARTIAL + path.name + ".tmp")
    try:
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        raise named(error, path) from None
    fsync_folder(path.parent)
    return hashlib.sha256(content).hexdigest()


def named(error: BaseException, path: Path) -> BaseException:
    """An OSError of a write on an open file carries no name (a full disk does so): give it one."""
    if isinstance(error, OSError) and error.filename is None:
        error.filename = str(path)
    return error


@contextlib.contextmanager
def lock_folder(folder: Path, wait_note: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Create `folder` and hold it for one writer; a folder that this call made and left empty is removed.

    The lock is on the folder itself, so it leaves no file and ends with the process, however that ends.
    """
    missing = [p for p in (folder, *folder.parents) if not p.exists()]  # innermost first
    folder.mkdir(parents=True, exist_ok=True)
    fd = os.open(folder, os.O_RDONLY)
    try:
        _flock(fd, wait_note)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, "no permission to write", str(folder))
        remove_unfinished(folder)  # of a writer that was killed: nobody else writes, we hold the lock
        try:
            yield
        finally:
            remove_unfinished(folder)
    finally:
        os.close(fd)
        for made in missing:
            with contextlib.suppress(OSError):  # not empty: it holds results
                made.rmdir()


def remove_unfinished(folder: Path) -> None:
    """Remove what an unfinished writer left, also where it was stopped while it gave files their names."""
    journal = folder / JOURNAL
    if journal.exists() and not (folder / MANIFEST).exists():
        with contextlib.suppress(ValueError):  # cut off while it was written: then no file was touched yet
            for name in json.loads(journal.read_text()):
                (folder / name).unlink(missing_ok=True)
    for partial in folder.glob(PARTIAL + "*"):
        partial.unlink()


def write_journal(folder: Path, names: list[str]) -> None:
    """From now until the manifest is written, these files are removed if the writer stops."""
    write_atomically(folder / JOURNAL, json.dumps(names).encode())


def _flock(fd: int, wait_note: Callable[[], None]) -> None:
    try:
        import fcntl
    except ImportError:  # no fcntl on this system: two writers at once are the user's care
        return
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        wait_note()
        fcntl.flock(fd, fcntl.LOCK_EX)
    except OSError:  # a network file system without locks
        pass


def header(num_tokens: int) -> bytes:
    """The 1,024 bytes before the tokens."""
    ints = np.zeros(HEADER_INTS, dtype="<i4")
    ints[:3] = MAGIC, VERSION, num_tokens
    return ints.tobytes()


def read_shard(path: Path) -> np.ndarray:
    """Tokens of a shard as a read-only uint16 [tokens] memory map, once header and size are right."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        ints = np.frombuffer(file.read(HEADER_BYTES), dtype="<i4") if size >= HEADER_BYTES else None
    if ints is None or ints[0] != MAGIC:
        raise UserError(f"{path}: not a token shard (no magic number {MAGIC}); remove it or fetch it again")
    if ints[1] != VERSION:
        raise UserError(f"{path}: shard version {ints[1]}, this reads version {VERSION}; prepare it again")
    num_tokens = int(ints[2])
    if num_tokens < 0 or size != HEADER_BYTES + 2 * num_tokens:
        raise UserError(
            f"{path}: {size:,} bytes, but its header promises {num_tokens:,} tokens = "
            f"{HEADER_BYTES + 2 * num_tokens:,} bytes; remove it and run again"
        )
    if num_tokens == 0:
        return np.empty(0, TOKEN_DTYPE)
    return np.memmap(path, dtype=TOKEN_DTYPE, mode="r", offset=HEADER_BYTES, shape=(num_tokens,))


class ShardWriter:
    """One split's documents into shards {name}_{split}_{index:06d}.bin, with temporary names until `publish`.

    A document is never split: a shard closes when the next document would take it over `shard_tokens`, so
    shards hold at most that many tokens, but for a document that is longer alone.
    """

    def __init__(self, folder: Path, name: str, split: str, first_index: int, shard_tokens: int):
        self.folder, self.prefix = folder, f"{name}_{split}"
        self.index, self.shard_tokens = first_index, shard_tokens
        self.rows: list[dict] = []  # finished shards, as the manifest lists them
        self.num_documents = 0
        self._file = None

    def add(
        self,
        tokens: np.ndarray,  # uint16 [sum of doc_tokens], documents end to end, BOS included
        doc_tokens: np.ndarray,  # int64 [documents], tokens of each
        doc_bytes: np.ndarray,  # int64 [documents], UTF-8 bytes of each
    ) -> None:
        """Append whole documents."""
        ends = np.cumsum(doc_tokens)
        first = start = 0  # document and token where the part not yet written begins
        while first < len(ends):
            room = self.shard_tokens - (self._tokens if self._file else 0)
            last = int(np.searchsorted(ends, start + room, side="right"))  # documents [first, last) fit
            if last <= first:  # less: the open shard holds one document that is longer than a shard
                if self._file:
                    self._close_shard()
                    continue
                last = first + 1  # alone longer than a shard
            if not self._file:
                self._open_shard()
            end = int(ends[last - 1])
            try:
                self._file.write(tokens[start:end].astype(TOKEN_DTYPE, copy=False).tobytes())
            except OSError as error:
                raise named(error, self._partial) from None
            self._tokens += end - start
            self._documents += last - first
            self.num_documents += last - first
            self._bytes += int(doc_bytes[first:last].sum())
            first, start = last, end

    def _open_shard(self) -> None:
        self._partial = self.folder / f"{PARTIAL}{self.prefix}_{self.index:06d}.bin"
        self._file = open(self._partial, "wb")
        self._file.write(header(0))
        self._tokens = self._documents = self._bytes = 0

    def _close_shard(self) -> None:
        file, self._file = self._file, None
        try:
            file.seek(0)
            file.write(header(self._tokens))
            file.flush()
            os.fsync(file.fileno())
        except OSError as error:
            raise named(error, self._partial) from None
        finally:
            file.close()
        self.rows.append(
            {
                "file": self._partial.name.removeprefix(PARTIAL),
                "tokens": self._tokens,
                "documents": self._documents,
                "bytes": self._bytes,
                "sha256": sha256_file(self._partial),
            }
        )
        self.index += 1

    def close(self) -> None:
        """Finish the last shard. Nothing has its final name yet."""
        if self._file:
            self._close_shard()

    def abandon(self) -> None:
        """Close what is open; the folder's lock removes the files."""
        if self._file:
            with contextlib.suppress(OSError):
                self._file.close()
            self._file = None

    def totals(self) -> dict:
        """This split as the manifest lists it."""
        return split_row(self.rows)

    def publish(self) -> None:
        """Give the finished shards their final names."""
        for row in self.rows:
            os.replace(self.folder / (PARTIAL + row["file"]), self.folder / row["file"])


def split_row(rows: list[dict]) -> dict:
    """The manifest's entry of a split: totals over its shards, then the shards."""
    return {
        **{key: sum(row[key] for row in rows) for key in ("tokens", "bytes", "documents")},
        "shards": rows,
    }


def write_tokenizer(
    folder: Path,
    tokenizer,  # one of vocab.py's
    exact: bool,  # whether the token bytes of every document sum to its bytes
) -> dict:
    """Write the tokenizer's files and token_bytes.npy (uint16 [vocab]). Returns their manifest entries."""
    files = []
    for name, content in tokenizer.files.items():
        files.append({"file": name, "sha256": write_atomically(folder / name, content)})
    buffer = io.BytesIO()
    np.save(buffer, tokenizer.token_bytes.astype("<u2"), allow_pickle=False)
    sha256 = write_atomically(folder / TOKEN_BYTES_FILE, buffer.getvalue())
    token_bytes = {"file": TOKEN_BYTES_FILE, "sha256": sha256, "exact": exact}
    if not exact:
        token_bytes["note"] = (
            "This model changes text or adds to it, so token bytes do not sum to the documents' bytes: "
            "for bits a byte, use the bytes of the whole split."
        )
    keys = ("kind", "name", "vocab_size", "bos_id")
    return {
        "tokenizer": {**{key: getattr(tokenizer, key) for key in keys}, "files": files},
        "token_bytes": token_bytes,
    }


def write_manifest(folder: Path, manifest: dict) -> None:
    """Write `manifest.json`: the last step, its presence says that the folder is complete."""
    fsync_folder(folder)
    text = json.dumps(manifest, indent=1, ensure_ascii=False) + "\n"
    write_atomically(folder / MANIFEST, text.encode())


def read_manifest(folder: Path) -> dict | None:
    """The folder's manifest, or None if it has none that this version reads."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return manifest if manifest["format"] == MANIFEST_FORMAT else None
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):
        return None


def listed_files(manifest: dict) -> list[str]:
    """Names of all files that a manifest lists, shards first."""
    shards = [row["file"] for split in manifest["splits"].values() for row in split["shards"]]
    tokenizer = [row["file"] for row in manifest["tokenizer"]["files"]]
    return [*shards, manifest["token_bytes"]["file"], *tokenizer]


def is_complete(folder: Path, manifest: dict) -> bool:
    """Whether every listed file is there, the shards with the size that their token count gives."""
    try:
        for split in manifest["splits"].values():
            for row in split["shards"]:
                if (folder / row["file"]).stat().st_size != HEADER_BYTES + 2 * row["tokens"]:
                    return False
        return all((folder / name).is_file() for name in listed_files(manifest))
    except (OSError, KeyError, TypeError):
        return False


def summary(folder: Path) -> str:
    """What a complete folder holds, for people."""
    manifest = read_manifest(folder)
    lines = []
    for side, row in manifest["splits"].items():
        ratio = row["bytes"] / row["tokens"]
        counts = f"{row['tokens']:>14,} tokens {row['documents']:>11,} documents {row['bytes']:>15,} bytes"
        lines.append(f"{side:5} {counts} {ratio:6.3f} bytes/token {len(row['shards']):>4} shards")
    tokenizer = manifest["tokenizer"]
    lines.append(f"{folder}: tokenizer {tokenizer['name']}, vocabulary {tokenizer['vocab_size']:,}")
    removed = manifest.get("documents_removed_from_train", 0)
    empty = manifest.get("documents_empty", 0)
    if removed or empty:
        lines.append(f"left out: {removed:,} training documents also in validation, {empty:,} without text")
    return "\n".join(lines)
