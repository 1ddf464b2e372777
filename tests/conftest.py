"""A small prepared corpus and a miniature recipe, for every test of the trainer. No network, no GPU."""

import dataclasses
import hashlib
import importlib.util
import json
import signal
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

VOCAB, BOS = 250, 1
TOKEN_BYTES = 3  # of every token but BOS


def load_program(path: Path) -> ModuleType:
    """A program of a folder that is no package, as a module."""
    spec = importlib.util.spec_from_file_location(f"{path.parent.name}_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where its dataclasses look for themselves
    spec.loader.exec_module(module)
    return module


def write_shard(path: Path, tokens: np.ndarray) -> None:
    """The benchmark's format, written independently of the project's own writer."""
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, len(tokens)
    path.write_bytes(header.tobytes() + tokens.astype("<u2").tobytes())


def make_tokens(rng: np.random.Generator, size: int, mean_length: int = 60) -> np.ndarray:
    """Documents of random length, each beginning with BOS; the text is a Markov chain that can be learnt."""
    tokens = np.empty(size, np.int64)
    at = 0
    while at < size:
        length = min(2 + int(rng.exponential(mean_length)), size - at)
        steps = rng.integers(1, 4, length)
        tokens[at : at + length] = 2 + (rng.integers(0, VOCAB - 2) + np.cumsum(steps)) % (VOCAB - 2)
        tokens[at] = BOS
        at += length
    return tokens


def write_token_bytes(folder: Path, table: np.ndarray) -> dict[str, str]:
    """The byte table of a prepared folder; its row of the manifest."""
    path = folder / "token_bytes.npy"
    np.save(path, table)
    return {"file": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def write_corpus(
    folder: Path, train_sizes: tuple[int, ...] = (30_000, 30_000), val_size: int = 6_000
) -> Path:
    """A prepared folder as data/prepare.py leaves it."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    splits = {}
    for split, sizes in (("train", train_sizes), ("val", (val_size,))):
        rows = []
        for i, size in enumerate(sizes):
            name, tokens = f"toy_{split}_{i:06d}.bin", make_tokens(rng, size)
            write_shard(folder / name, tokens)
            digest = hashlib.sha256((folder / name).read_bytes()).hexdigest()
            count = int((tokens == BOS).sum())
            num_bytes = TOKEN_BYTES * (size - count)
            rows.append(
                {"file": name, "tokens": size, "documents": count, "bytes": num_bytes, "sha256": digest}
            )
        splits[split] = {
            "shards": rows,
            **{k: sum(r[k] for r in rows) for k in ("tokens", "documents", "bytes")},
        }
    table = np.full(VOCAB, TOKEN_BYTES, np.uint16)
    table[BOS] = 0
    manifest = {
        "format": 1,
        "tokenizer": {"kind": "bytes", "name": "toy", "vocab_size": VOCAB, "bos_id": BOS, "files": []},
        "token_bytes": write_token_bytes(folder, table),
        "splits": splits,
        "sources": [],
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


@pytest.fixture(scope="session")
def corpus_dir(tmp_path_factory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="session")
def nano():
    """Recipe `tiny` in miniature: every kind of layer, all stages, the split step, 14 steps in seconds."""
    import train_gpt

    tiny = train_gpt.RECIPES["tiny"]
    sizes = (768, 1536, 2304, 2304)
    stages = tuple(
        dataclasses.replace(stage, steps=steps, batch_tokens=size)
        for stage, steps, size in zip(tiny.stages, (4, 4, 4, 2), sizes, strict=True)
    )
    return dataclasses.replace(
        tiny,
        name="nano",
        model_dim=32,
        num_heads=4,
        head_dim=8,
        hidden_dim=64,
        stages=stages,
        momentum=((0, 0.85), (3, 0.95), (11, 0.95), (14, 0.85)),
        max_seq_len=96,
        val_tokens=2048,
        val_slot=512,
        val_every=7,
    )


@pytest.fixture
def restored(monkeypatch, nano):
    """One thread, as the ranks of the tests have it; signal handlers put back; the recipe in the table."""
    import torch

    import train_gpt

    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setitem(train_gpt.RECIPES, "nano", nano)
    yield
    torch.set_num_threads(threads)
    for number, handler in handlers.items():
        signal.signal(number, handler)


# A series as run.sh leaves it, for the record book ----------------------------------------------------------

DAY = "2026-03-01"
TIMES = {"A": (2.1, 2.12, 2.09, 2.11, 2.1, 2.13, 2.11, 2.08), "B": (2.0, 2.01, 1.99, 2.01, 2, 2.02, 1.98, 2)}
LOSSES = (4.101, 4.103, 4.099, 4.102, 4.1, 4.104, 4.098, 4.1015)
SOURCES = {"A": "print('a')\nlr = 1\n", "B": "print('b')\nlr = 1\n"}


def series_plan(
    folder: Path, kind: str, n: int, most: int | None, started: str, host: str, sources: dict
) -> dict:
    """A plan of n runs, or of at most `most`, ended early."""
    from recordbook import runs

    rule = "open" if kind == "series" else "until-decided" if most else "fixed"
    plan = {"format": runs.PLAN_FORMAT, "kind": kind, "made": f"{started}T09:00:00+0000", "arms": []}
    for letter in "A" if kind == "series" else "AB":
        files = {"train_gpt.py": hashlib.sha256(sources[letter].encode()).hexdigest()}
        source = runs.source_of(files)
        name = folder.name if kind == "series" else f"{letter}-train_gpt-{source[:8]}"
        plan["arms"].append({"arm": letter, "name": name, "source": source, "files": files})
    plan |= {"runs": n, "order": runs.pattern(kind, most or n), "alpha": 0.01, "warm_up": False}
    plan |= {"test": runs.TESTS[rule], "stop": {"rule": rule, "least": min(n, 4), "most": most or n}}
    plan |= {"recipe": "tiny", "data": "data/default", "data_manifest": "d" * 64, "gpus": 0}
    return plan | {"machine": [host]}


def series_run(
    folder: Path, which: dict, seconds: float | None, loss: float, clock: str, meta: dict, source: str
) -> dict:
    """Write the log of one attempt; returns the `end` event."""
    from tests.test_compare_runs import our_log

    facts = {"gpu_0": None, "cpu": "Test CPU", "driver": None, "target": "4.15"}
    facts |= {"started": f"{clock}:00+0000"} | {"run_id": f"{folder.name}-{which['log']}"} | meta
    status, stop = ("done", None) if seconds else ("diverged at step 12: nan", 12)
    text = our_log(loss, round(1000 * (seconds or 2)), which["seed"], status, source, stop=stop, **facts)
    log = folder / which["log"]
    log.parent.mkdir(exist_ok=True)
    log.write_text(text)
    log.with_suffix(".json").write_text("{}\n")
    end = {"status": status.split(" ")[0], "reason": "", "exit_code": 0, "counted": True, "gpu": None}
    end |= {"log_sha256": hashlib.sha256(text.encode()).hexdigest(), "ended": f"{clock}:30+0000"}
    return which | end


def write_series(
    folder: Path,
    kind: str = "ab",
    n: int = 6,
    times: dict | None = None,  # {arm: seconds by seed}; None for a run that diverges
    losses: dict | None = None,  # {arm: by seed}
    most: int | None = None,  # runs of each arm that the plan allows; after n it is decided
    extend: int = 0,  # runs that a series of one trainer got later
    started: str = DAY,
    host: str = "node1",
    sources: dict = SOURCES,
    **meta: str,  # header lines of every log
) -> Path:
    """A finished series of track `tiny`, by the runner's own plan and ledger, but without a trainer."""
    from recordbook import runs

    folder.mkdir(parents=True)
    plan, times = series_plan(folder, kind, n, most, started, host, sources), TIMES | (times or {})
    meta["host"] = host
    runs.write_plan(folder, plan)
    ledger, arms = runs.Ledger(folder), {arm["arm"]: arm for arm in plan["arms"]}
    bound = {"format": runs.LEDGER_FORMAT, "plan": runs.digest_of((folder / runs.PLAN).read_bytes())}
    if extend:
        ledger.append("extend", runs=n + extend, time=f"{started}T09:30:00+0000")
    for position, letter in enumerate(runs.pattern(kind, n + extend), 1):
        seed, clock = -(-position // len(arms)), f"{started}T10:{position:02d}"
        place = "" if kind == "series" else f"{arms[letter]['name']}/"
        which = {"attempt": position, "role": "run", "arm": letter, "seed": seed, "position": position}
        which |= {"log": f"{place}run-{seed:03d}.txt", "source": arms[letter]["source"]}
        ledger.append("start", **which, started=f"{clock}:00+0000", **bound)
        loss = (losses or {}).get(letter, LOSSES)[seed - 1]
        run = series_run(folder, which, times[letter][seed - 1], loss, clock, meta, sources[letter])
        ledger.append("end", **run)
    if most:
        ledger.append("decision", after=n, decided="faster", time=f"{started}T12:00:00+0000")
    ledger.file.close()
    return folder


@pytest.fixture
def series(tmp_path):
    """write_series in a folder of its own name."""
    return lambda name="ab", **options: write_series(tmp_path / "logs" / name, **options)
