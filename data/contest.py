"""The 16 MB contest's data: FineWeb in SentencePiece tokens, as its participants published it.

    python data/contest.py              # sp8192: the whole validation split and 1 training shard, 0.3 GB
    python data/contest.py sp1024 80    # the organisers' own vocabulary, 8 B training tokens

A shard has 100 M tokens, 200 MB. Validation is always whole: the first 50,000 documents of the frozen order.
No checksum of these files is published with the contest: the hub's SHA-256 is checked where it gives one, and
what arrived first is recorded in manifest.json, so that a file which changes later is refused. An interrupted
fetch resumes; with manifest.json in place, a second call needs no network.
"""

import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import fineweb
import vocab
from shards import (
    MANIFEST_FORMAT,
    Parser,
    UserError,
    lock_folder,
    read_manifest,
    run_main,
    sha256_file,
    split_row,
    summary,
    write_manifest,
    write_tokenizer,
)

MAX_SHARDS = 1_000  # fewer are published: the hub says where they end
VAL_DOCUMENTS = 50_000
VAL = "fineweb_val_000000.bin"
HUB_FOLDER = "datasets"  # of every such repository
PARTIAL = ".hub"  # what is under way, with the hub's folders, which are of no use here


@dataclass(frozen=True)
class Variant:
    """A vocabulary's files on the hub."""

    repo: str
    size: int

    @property
    def model(self) -> str:
        return f"fineweb_{self.size}_bpe.model"

    def remote(self, name: str) -> str:
        """Path on the hub of a file that here has this name."""
        folder = "tokenizers" if name == self.model else f"datasets/fineweb10B_sp{self.size}"
        return f"{HUB_FOLDER}/{folder}/{name}"


VARIANTS = {
    "sp1024": Variant("willdepueoai/parameter-golf", 1024),
    "sp4096": Variant("kevclark/parameter-golf", 4096),
    "sp8192": Variant("kevclark/parameter-golf", 8192),
}
DEFAULT = "sp8192"


# ----------------------------------------------------------------------------------------------------------
# 1 the hub (tests put their own in the place of these two)
# ----------------------------------------------------------------------------------------------------------


def hub_checksums(variant: Variant, names: list[str]) -> dict[str, str | None]:
    """SHA-256 of each file that the hub has, None where it gives none."""
    remote = {variant.remote(name): name for name in names}
    api = fineweb._hub().HfApi()
    call = partial(api.get_paths_info, variant.repo, list(remote), repo_type="dataset")
    rows = fineweb.within(fineweb.HUB_TIMEOUT_S, call)
    return {remote[row.path]: row.lfs.sha256 if getattr(row, "lfs", None) else None for row in rows}


def hub_fetch(variant: Variant, name: str, folder: Path) -> Path:
    """Fetch one file into `folder`; resumes, shows its own progress bar."""
    get = fineweb._hub().hf_hub_download
    found = get(variant.repo, variant.remote(name), repo_type="dataset", local_dir=folder / PARTIAL)
    path = Path(shutil.move(found, folder / name))
    shutil.rmtree(folder / PARTIAL, ignore_errors=True)
    return path


# ----------------------------------------------------------------------------------------------------------
# 2 fetching
# ----------------------------------------------------------------------------------------------------------


def shard_names(num_train: int) -> list[str]:
    """Validation first; the contest counts training shards from 0."""
    return [VAL, *(f"fineweb_train_{i:06d}.bin" for i in range(num_train))]


def recorded(folder: Path) -> dict[str, str]:
    """SHA-256 of every file as it first came, from the folder's manifest."""
    manifest = read_manifest(folder)
    if manifest is None:
        return {}
    rows = [row for split in manifest["splits"].values() for row in split["shards"]]
    return {row["file"]: row["sha256"] for row in (*rows, *manifest["tokenizer"]["files"])}


def fetch(variant: Variant, num_train: int, folder: Path) -> bool:
    """Tokenizer, validation and the first training shards. Returns whether anything was done."""
    shards = shard_names(num_train)
    if has_all(folder, variant, shards):
        return False
    with lock_folder(folder, lambda: print(f"waiting for another run that writes {folder}", flush=True)):
        if has_all(folder, variant, shards):
            return False
        names, known = [variant.model, *shards], recorded(folder)
        if known and variant.model not in known:
            raise UserError(f"{folder}: holds another vocabulary; name another --out")
        sums = checksums(variant, names, folder, known)
        for i, name in enumerate(names):
            fetch_one(variant, name, f"{i + 1}/{len(names)}", folder, sums.get(name))
        earlier = [name for name in known if name.endswith(".bin") and (folder / name).is_file()]
        write_index(folder, variant, sorted({*shards, *earlier}))
    return True


def has_all(folder: Path, variant: Variant, shards: list[str]) -> bool:
    return fineweb.has_shards(folder, shards) and variant.model in recorded(folder)


def checksums(variant: Variant, names: list[str], folder: Path, known: dict[str, str]) -> dict[str, str]:
    """What each file must be: as it was recorded, else as the hub says. Says where nobody knows."""
    try:
        told = hub_checksums(variant, names)
    except Exception as error:  # the library raises the errors of its HTTP stack, which changes
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise fineweb.hub_error(missing[0], folder, error, variant.repo) from None
        print(
            "the hub is out of reach: what is there is checked by what was recorded, or by its header alone"
        )
        return known
    if absent := [name for name in names if name not in told]:
        raise UserError(f"{variant.repo} has no {absent[0]}; ask for fewer training shards")
    for name, sha256 in told.items():
        if sha256 and known.get(name, sha256) != sha256:
            change = f"{name}: the hub's SHA-256 is {sha256}, the one recorded here {known[name]}"
            raise UserError(
                f"{change}: it was published anew; fetch it into another --out, or keep what is here"
            )
    if unknown := [name for name in names if not told[name] and name not in known]:
        print(f"no checksum is known of {', '.join(unknown)}: what comes is recorded in manifest.json")
    return {name: known.get(name) or told[name] for name in names if known.get(name) or told[name]}


def fetch_one(variant: Variant, name: str, progress: str, folder: Path, checksum: str | None) -> None:
    """One file: kept if it is right, else fetched."""
    if name != variant.model:
        get = partial(hub_fetch, variant)
        fineweb.fetch_one(name, progress, folder, checksum, get=get, repo=variant.repo)
        return
    path = folder / name
    if path.is_file() and (checksum is None or sha256_file(path) == checksum):
        return
    print(f"[{progress}] {name}", flush=True)
    try:
        hub_fetch(variant, name, folder)
    except Exception as error:
        raise fineweb.hub_error(name, folder, error, variant.repo) from None
    if checksum is not None and (found := sha256_file(path)) != checksum:
        path.unlink()
        raise UserError(f"{name}: SHA-256 {found}, it must be {checksum}; it was removed, run again")


def write_index(folder: Path, variant: Variant, names: list[str]) -> None:
    """Check the split and the vocabulary, count the shards, write the manifest."""
    model = (folder / variant.model).read_bytes()
    tokenizer = vocab.SentencePiece(f"sp{variant.size}", variant.model, model)
    if tokenizer.vocab_size != variant.size:
        raise UserError(f"{variant.model}: {tokenizer.vocab_size} pieces, not {variant.size}; fetch it again")
    rows = [fineweb.shard_row(folder / n, tokenizer.token_bytes, bos=tokenizer.bos_id) for n in names]
    splits = {
        side: split_row([row for row in rows if f"_{side}_" in row["file"]]) for side in ("train", "val")
    }
    if (count := splits["val"]["documents"]) != VAL_DOCUMENTS:
        raise UserError(
            f"{VAL}: {count:,} documents; the contest's split has {VAL_DOCUMENTS:,}: fetch it again"
        )
    origin = f"Hugging Face data set {variant.repo} (FineWeb sample-10BT, the 16 MB contest's order)"
    about = {"license": fineweb.LICENSE, "origin": origin}
    manifest = {
        "format": MANIFEST_FORMAT,
        **write_tokenizer(folder, tokenizer, exact=False),  # bytes are those of the normalised text
        "splits": splits,
        "sources": [{"name": row["file"], "sha256": row["sha256"], **about} for row in rows],
        "val_rule": {"kind": "first documents", "documents": VAL_DOCUMENTS},
    }
    write_manifest(folder, manifest)


# ----------------------------------------------------------------------------------------------------------
# 3 command line
# ----------------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> None:
    """Fetch what the command line says."""
    p = Parser(prog="python data/contest.py", description=__doc__.split("\n\n")[0])
    p.add_argument("variant", nargs="?", default=DEFAULT, help=f"{', '.join(VARIANTS)} (default {DEFAULT})")
    p.add_argument(
        "num_train", nargs="?", type=int, default=1, metavar="N", help="training shards (default 1)"
    )
    p.add_argument("--out", type=Path, metavar="DIR", help="folder (default data/contest-VARIANT)")
    options = p.parse_args(argv)
    if options.variant not in VARIANTS:
        raise UserError(f"{options.variant}: no such vocabulary; choose one of {', '.join(VARIANTS)}")
    if not 1 <= options.num_train <= MAX_SHARDS:
        raise UserError(f"{options.num_train} training shards: must be 1 to {MAX_SHARDS}")
    folder = options.out or Path(__file__).resolve().parent / f"contest-{options.variant}"
    if fetch(VARIANTS[options.variant], options.num_train, folder):
        print(summary(folder))
    else:
        print(f"{folder}: up to date")


if __name__ == "__main__":
    run_main(main)
