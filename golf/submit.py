"""A run of the 16 MB contest as the contest wants it: one folder for records/track_.../ of its repository.

    python golf/submit.py logs/golf/A logs/golf/B logs/golf/C --out DIR --author NAME --github-id ID

The runs are those of one program and one configuration with different seeds, each with the files that
train_golf.py and check.py left. All numbers of the folder come from them. It is written whole or not at all.

    README.md          what was run, on what, and every number, seed by seed
    submission.json    the same for programs, with the contest's fields
    train_gpt.py       all counted code: an archive that Python runs, `python train_gpt.py --mode full ...`
    source/            the same code, unpacked to be read; not counted
    train_seedN.log    the log of each run, which begins with every source
    checks_seedN.json  what golf/check.py found
    requirements.txt
"""

import argparse
import hashlib
import io
import json
import re
import shutil
import sys
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))  # run as a script, its folder is on the path, not the project

from compare_runs import InputError, mean, printable, sample_sd  # noqa: E402
from golf import LOG, artifact, log_of  # noqa: E402

FILES = ("model.golf", "code.zip", "result.json")  # of a run, besides its log
REQUIRED = ("torch", "triton", "numpy", "sentencepiece", "tiktoken", "tqdm")  # of requirements.txt
MIN_SEEDS = 3  # below it the contest's p < 0.01 cannot be had, and README.md says so
RECORD_TRACK = "track_10min_16mb"
OFFICIAL = re.compile(r"8 x NVIDIA H100 80GB HBM3")


@dataclass(frozen=True)
class Seed:
    """One run's numbers."""

    folder: Path
    seed: int
    meta: dict  # conditions, as the log's header states them
    result: dict
    checks: dict
    code: bytes
    config: dict  # of the artifact
    tokenizer: str  # SHA-256


# 1. reading -----------------------------------------------------------------------------------------------


def read_json(path: Path) -> dict:
    """The object in a file; InputError where there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or f"not JSON ({printable(str(error))[:80]})"
        raise InputError(f"{path}: {reason}; name the folder of a run that ended and was checked") from None
    if not isinstance(found, dict):
        raise InputError(f"{path}: not a JSON object; name the folder of a run that ended and was checked")
    return found


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of a run's files: what its checks have looked at, and what is submitted."""
    log = log_of(folder)
    paths = {name: folder / name for name in FILES} | {LOG: log, "train.json": log.with_suffix(".json")}
    return {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in paths.items()}


def read_run(folder: Path) -> Seed:
    """A run whose checks all passed on these very files. InputError says what is missing."""
    twin = log_of(folder).with_suffix(".json")
    checks, result, log = map(read_json, (folder / "checks.json", folder / "result.json", twin))
    try:
        packed, code = (artifact.read(folder / name) for name in FILES[:2])
        found = digests(folder)
    except OSError as error:
        raise InputError(f"{error.filename}: {error.strerror}; name the folder of a run that ended") from None
    checked = checks.get("sha256", {})
    if other := [name for name in found if checked.get(name) != found[name]]:
        raise InputError(f"{folder}: checks.json is of another {other[0]}; run golf/check.py again")
    if not (checks.get("passed") and checks.get("complete")):
        failed = [str(row["number"]) for row in checks.get("checks", []) if not row["passed"]]
        what = f"failed: {', '.join(failed)}" if failed else "were not all run"
        raise InputError(f"{folder}: checks {what}; only a run that passes all of golf/check.py is submitted")
    total = len(packed) + len(code)
    if total > artifact.CAP_BYTES or total != result.get("total_bytes"):
        raise InputError(
            f"{folder}: {total:,} bytes, at most {artifact.CAP_BYTES:,} and what result.json says"
        )
    meta, _ = artifact.unpack(packed)
    conditions = log.get("meta", {})
    seed = str(conditions.get("seed", ""))
    if not seed.isdecimal():
        raise InputError(f"{twin}: no seed; name a run of train_golf.py")
    return Seed(folder, int(seed), conditions, result, checks, code, meta["config"], meta["tokenizer"])


def read_runs(folders: Sequence[Path]) -> list[Seed]:
    """The runs by seed: one program, one configuration, one tokenizer, different seeds."""
    if not folders:
        raise InputError("no run; name the folders of the runs, one for each seed")
    runs = sorted(map(read_run, folders), key=lambda run: run.seed)
    same: dict[str, Callable[[Seed], object]] = {
        "code.zip": lambda run: run.code,
        "configuration": lambda run: run.config,
        "tokenizer": lambda run: run.tokenizer,
        "data": lambda run: run.meta.get("data"),
        "hardware": hardware,
    }
    for what, of in same.items():
        if other := [run for run in runs if of(run) != of(runs[0])]:
            found = f"{other[0].folder}: another {what} than {runs[0].folder}"
            raise InputError(f"{found}; submit the runs of one program")
    for one, two in pairwise(runs):
        if one.seed == two.seed:
            raise InputError(f"{two.folder}: seed {two.seed} as {one.folder}; a seed counts once")
    return runs


def hardware(run: Seed) -> str:
    """'8 x NVIDIA H100 80GB HBM3', or the CPU."""
    gpus = [str(value).rpartition(" GPU-")[0] for key, value in run.meta.items() if key.startswith("gpu ")]
    return f"{len(gpus)} x {gpus[0]}" if gpus else f"CPU {run.meta.get('cpu', 'unknown')}"


def mode_of(runs: Sequence[Seed]) -> str:
    """The way of scoring that counts: the best mean of those that every run took within the budget."""

    def is_sound(row: dict | None) -> bool:
        return bool(row) and row["within_budget"] and not row["is_partial"]

    names = list(runs[0].result["scores"])
    sound = [name for name in names if all(is_sound(run.result["scores"].get(name)) for run in runs)]
    if not sound:
        raise InputError("no way of scoring is whole and within its budget in every run; score them again")
    return min(sound, key=lambda name: mean([run.result["scores"][name]["val_bpb"] for run in runs]))


# 2. what is said ------------------------------------------------------------------------------------------


def submission(runs: Sequence[Seed], mode: str, about: dict[str, str]) -> dict:
    """submission.json: the contest's usual fields, and those of its better submissions."""
    scores = [run.result["scores"][mode] for run in runs]
    losses, bpbs = ([row[key] for row in scores] for key in ("val_loss", "val_bpb"))
    totals = [run.result["total_bytes"] for run in runs]
    is_official = OFFICIAL.fullmatch(hardware(runs[0])) is not None
    within = all(run.result["train_data_access_end_s"] <= 600 for run in runs)
    return {
        **about,
        "date": str(runs[-1].meta.get("started", ""))[:10],
        "track": RECORD_TRACK if is_official and within else "track_non_record_16mb",
        "val_loss": mean(losses),
        "val_bpb": mean(bpbs),
        "bytes_total": max(totals),
        "bytes_code": len(runs[0].code),
        "val_loss_std": sample_sd(losses) if len(runs) > 1 else None,
        "val_bpb_std": sample_sd(bpbs) if len(runs) > 1 else None,
        "seeds": [run.seed for run in runs],
        "seed_results": {str(run.seed): seed_row(run, mode) for run in runs},
        "artifact_bytes_max": max(run.result["artifact_bytes"] for run in runs),
        "scoring": mode,
        "hardware": hardware(runs[0]),
        "pytorch_version": versions(runs[0])[0],
        "cuda_version": versions(runs[0])[1],
        "tokenizer_sha256": runs[0].tokenizer,
        "data": runs[0].meta.get("data"),
        "compliance": {
            row["name"]: row["passed"] for row in runs[0].checks["checks"]
        },  # of every run: read_run
    }


def versions(run: Seed) -> list[str | None]:
    """[torch, CUDA], from the log's line of versions."""
    log = log_of(run.folder).read_text(errors="replace")
    found = re.findall(r"^Running PyTorch (\S+) compiled for CUDA (\S+)$", log, re.M)
    return list(found[-1]) if found else [None, None]


def seed_row(run: Seed, mode: str) -> dict:
    """The numbers of one seed, under the contest's names."""
    result, row = run.result, run.result["scores"][mode]
    return {
        "val_loss": row["val_loss"], "val_bpb": row["val_bpb"], "artifact_bytes": result["artifact_bytes"],
        "steps": result["steps"], "step_avg_ms": result["train_time_ms"] / max(result["steps"], 1),
        "eval_time_s": row["seconds"], "train_time_s": result["train_time_ms"] / 1000,
        "val_bpb_before_quantisation": result["val_bpb"], "artifact_sha256": result["artifact_sha256"],
        "tokens_seen": result["tokens_seen"],
    }  # fmt: skip


def score_table(runs: Sequence[Seed], counted: str) -> list[str]:
    """A row a seed: every way of scoring, beside the score before quantisation."""
    modes = list(runs[0].result["scores"])
    rows = ["| seed | steps | before quantisation | " + " | ".join(modes) + " | bytes | training | scoring |"]
    rows.append("| ---: " * (len(modes) + 6) + "|")
    for run in runs:
        result = run.result
        found = [result["scores"].get(mode) for mode in modes]
        bpbs = [f"{row['val_bpb']:.5f}" if row else "-" for row in found]
        times = f"{result['train_time_ms'] / 1000:.1f} s | {result['scores'][counted]['seconds']:.1f} s"
        cells = [run.seed, f"{result['steps']:,}", f"{result['val_bpb']:.5f}", *bpbs]
        rows.append("| " + " | ".join(map(str, cells)) + f" | {result['total_bytes']:,} | {times} |")
    return rows


def check_table(runs: Sequence[Seed]) -> list[str]:
    """A row a check, with what it measured for each seed."""
    rows = ["| check | " + " | ".join(f"seed {run.seed}" for run in runs) + " |"]
    rows.append("| --- " * (len(runs) + 1) + "|")
    for number, check in enumerate(runs[0].checks["checks"]):
        measured = (run.checks["checks"][number]["measured"].replace("|", "/") for run in runs)
        rows.append(f"| {check['name']} | " + " | ".join(measured) + " |")
    return rows


NOT_COMPARABLE = " These numbers are not comparable with the contest's board."
PAGE = """# {title}

**{bpb:.5f} bits per byte**{spread}, n = {n}, at most {total:,} bytes, scored by `{mode}`.{few}

{blurb}

Bits per byte, seed by seed:

{scores}

Hardware: {hardware}; PyTorch {torch}, CUDA {cuda}.{comparable}
Tokens seen: {tokens:,} (seed {seed}). Ledger of that run: {ledger}.
Code: {code:,} bytes, the archive `train_gpt.py`, which `source/` shows unpacked. The tokenizer (SHA-256
{tokenizer}) is not counted.

## Run it

```bash
pip install -r requirements.txt
torchrun --standalone --nproc_per_node={gpus} train_gpt.py {recipe} --data DATA --seed {seed} --out run
python train_gpt.py score run/model.golf --tokenizer DATA/MODEL --val DATA/*_val_*.bin --mode {mode}
```

## Checks

Each ran on the artifact, and each noticed its negative control (`checks_seedN.json`).

{checks}
"""


def page(runs: Sequence[Seed], mode: str, facts: dict) -> str:
    """README.md, from the numbers alone."""
    first = runs[0]
    few = f" Fewer than {MIN_SEEDS} seeds say nothing of its significance." if len(runs) < MIN_SEEDS else ""
    return PAGE.format(
        title=facts["name"] or "A model in 16 MB", bpb=facts["val_bpb"], n=len(runs),
        spread=f" (sd {facts['val_bpb_std']:.5f})" if len(runs) > 1 else "",
        total=facts["bytes_total"], mode=mode, few=few,
        blurb=facts["blurb"], scores="\n".join(score_table(runs, mode)), hardware=facts["hardware"],
        torch=facts["pytorch_version"], cuda=facts["cuda_version"], tokens=first.result["tokens_seen"],
        comparable="" if facts["track"] == RECORD_TRACK else NOT_COMPARABLE, seed=first.seed,
        ledger=", ".join(f"{name} {seconds:.1f} s" for name, seconds in first.result["ledger_s"].items()),
        code=facts["bytes_code"], tokenizer=facts["tokenizer_sha256"], gpus=first.meta.get("world_size", 1),
        recipe=arguments_of(first), checks="\n".join(check_table(runs)),
    )  # fmt: skip


def arguments_of(run: Seed) -> str:
    """The arguments of a run's command that say what was trained, not where: mode, --recipe and --set."""
    places = argparse.ArgumentParser(add_help=False)
    for option in ("--data", "--out", "--seed"):
        places.add_argument(option)
    return " ".join(places.parse_known_args(str(run.meta.get("command", "")).split()[1:])[1])


def requirements() -> str:
    """The pinned packages that training and scoring need."""
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    return "".join(
        line.split("#")[0].rstrip() + "\n" for line in lines if re.split(r"[=<>]", line)[0] in REQUIRED
    )


# 3. writing -----------------------------------------------------------------------------------------------


def write_submission(
    run_folders: Sequence[str | Path],
    out: str | Path,
    author: str = "",
    github_id: str = "",
    name: str = "",
    blurb: str = "",
) -> dict:
    """Write the contest's folder of these runs; submission.json's object. InputError: no folder then."""
    runs, out = read_runs([Path(folder) for folder in run_folders]), Path(out)
    if out.exists():
        raise InputError(f"{out}: is there already; name a new folder")
    mode = mode_of(runs)
    facts = submission(runs, mode, {"author": author, "github_id": github_id, "name": name, "blurb": blurb})
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        (partial / "README.md").write_text(page(runs, mode, facts), encoding="utf-8")
        (partial / "submission.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        (partial / "train_gpt.py").write_bytes(runs[0].code)
        (partial / "requirements.txt").write_text(requirements())
        with zipfile.ZipFile(io.BytesIO(runs[0].code)) as archive:
            archive.extractall(partial / "source")
        for run in runs:
            shutil.copyfile(log_of(run.folder), partial / f"train_seed{run.seed}.log")
            shutil.copyfile(run.folder / "checks.json", partial / f"checks_seed{run.seed}.json")
        partial.rename(out)
    except OSError as error:
        raise InputError(f"{out}: {error.strerror}; name a folder that can be written") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return facts


def refuse(message: str) -> None:
    """argparse's own errors in one line."""
    raise InputError(f"{message}; use what --help lists")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="submit.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Exit codes: 0 written, 2 bad input.",
    )  # fmt: skip
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run, one for each seed")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write; must not exist")
    for option in ("author", "github-id", "name", "blurb"):
        parser.add_argument(f"--{option}", default="", help="as submission.json wants it")
    parser.error = refuse
    try:
        args = vars(parser.parse_args(argv))
        facts = write_submission(
            args.pop("runs"), args["out"], **{key: args[key] for key in args if key != "out"}
        )
    except (InputError, artifact.ArtifactError, KeyError, TypeError, AttributeError) as error:
        is_told = isinstance(error, InputError | artifact.ArtifactError)
        what = error if is_told else f"a run's files lack {error}; make them again"
        print(f"submit.py: error: {what}", file=sys.stderr)
        return 2
    figures = f"{facts['val_bpb']:.5f} bits per byte, {facts['bytes_total']:,} bytes"
    print(f"{args['out']}: {figures}, {facts['track']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
