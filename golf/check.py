"""Check a run of the 16 MB contest: thirteen checks, each of which must also notice what it is there for.

    python golf/check.py                                 the newest run in logs/golf, of data/default
    python golf/check.py logs/golf/RUN --data data/books

RUN is the folder that golf/train_golf.py wrote, DATA the prepared folder it was given. A row of CHECKS has a
test, and a control: the same test of something known to be wrong. A check passes if the test passes and the
control does not. Models run on the GPU where there is one, else on the CPU, where equal means bit for bit.
Into RUN goes checks.json. Contents: grep '^# [0-9]' golf/check.py
"""

import argparse
import contextlib
import copy
import dataclasses
import functools
import hashlib
import io
import json
import math
import os
import re
import site
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))  # run as a script, its folder is on the path, not the project

from golf import train_golf as golf  # noqa: E402  before torch: it configures the allocator

# isort: split
import numpy as np  # noqa: E402
import shards  # noqa: E402  golf.tokens has put data/ on the path
import torch  # noqa: E402
from torch import Tensor  # noqa: E402

import train_gpt as tg  # noqa: E402
from golf import artifact, log_of, score, tokens  # noqa: E402
from golf.artifact import CAP_BYTES  # noqa: E402
from golf.score import MODES  # noqa: E402
from golf.submit import FILES, digests  # noqa: E402
from golf.tokens import BYTES  # noqa: E402
from golf.train_golf import NOT_INHERITED, PARAMS, SAME_SCORE, InputError  # noqa: E402
from recordbook import statistics  # noqa: E402
from recordbook.tracks import GAIN_UNITS, find_track  # noqa: E402

DOCUMENTS = 1000  # whose bytes are counted, or all there are
PROBE_DOCUMENTS = 6  # that the models of checks 5 to 8 see, cut to PROBE_TOKENS and a few more each
PROBE_TOKENS = 40
COVERED_TOKENS = 1_000_000  # of the validation stream, that check 4 covers without a model
MAX_GAP = 0.1  # of the bits a byte before quantisation, that it may cost
SUM_TOLERANCE = {"cpu": 1e-4, "cuda": 1e-3}  # of the probabilities' sum
SAME_NLL = {"cpu": 0.0, "cuda": 0.05}  # nats between two runs that must agree; bf16 sums in another order
MOVED = 1.3  # how far weights must be from the initial ones, in root mean squares of their rounding
SMALL_TRAIN, SMALL_VAL = 40_000, 2_000  # tokens that the trainings of check 12 get
SMALL = (
    "steps=6", "score=", f"cap_bytes={CAP_BYTES}", "batch_tokens=1024", "micro_tokens=1024",
    "holdout_tokens=1024", "calibration_tokens=1024", "val_points=1",
)  # fmt: skip
CHILD_S = 900  # when a child process is given up


@dataclass(frozen=True)
class Found:
    """What a test has seen."""

    holds: bool
    measured: str
    broke: bool = False  # an exception ended it: that is no answer


# 1. the run -----------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class Case:
    """A run's folder, opened: what every check looks at."""

    run: Path
    data: Path
    result: dict
    log: str
    corpus: tg.Corpus
    manifest: dict
    tokenizer: tokens.Charges
    tokenizer_path: Path
    ranks: tg.Ranks

    @classmethod
    def open(cls, run: Path, data: Path, ranks: tg.Ranks) -> "Case":
        """InputError names what is missing or is not of this run."""
        missing = [name for name in FILES if not (run / name).is_file()]
        if missing := missing + ["log"] * (not log_of(run).is_file()):
            raise InputError(f"{run}: no {', '.join(missing)}; name the folder of a run that ended")
        try:
            result = json.loads((run / "result.json").read_text())
            manifest = json.loads((data / "manifest.json").read_text())
        except (OSError, ValueError) as error:
            raise InputError(f"{run} with {data}: {error}; name a run and its prepared data") from None
        corpus = tg.Corpus.open(data)
        tokenizer, path = golf.open_tokenizer(data, corpus)
        log = log_of(run).read_text(errors="replace")
        if f"\ndata: sha256={corpus.sha256}\n" not in log:
            raise InputError(f"{data}: is not the data of {run}, its log has another hash; name it: --data")
        return cls(
            run=run, data=data, result=result, log=log, corpus=corpus, manifest=manifest, tokenizer=tokenizer,
            tokenizer_path=path, ranks=ranks,
        )  # fmt: skip

    @property
    def device(self) -> str:
        return self.ranks.device.type

    @functools.cached_property
    def compiled(self) -> tempfile.TemporaryDirectory:
        """What scoring compiles: empty at first, so that nothing comes from the run; then for all modes."""
        return tempfile.TemporaryDirectory(prefix="golf-check-", dir=os.path.realpath(tempfile.gettempdir()))

    @functools.cached_property
    def packed(self) -> bytes:
        return artifact.read(self.run / "model.golf")

    @functools.cached_property
    def contents(self) -> tuple[dict, dict[str, artifact.Quantized]]:
        """(meta, tensors) of the artifact."""
        return artifact.unpack(self.packed)

    @functools.cached_property
    def model(self) -> golf.Golf:
        """As score.py loads it; whoever changes it takes a copy."""
        return score.load_model(self.run / "model.golf", self.tokenizer, self.ranks.device).eval()

    @functools.cached_property
    def initial(self) -> golf.Golf:
        """The model before the first step of this run's seed."""
        seeds = re.findall(r"^seed: (\d+)$", self.log, re.M)  # the last one: before it stand the sources
        if not seeds:
            raise InputError(f"{log_of(self.run)}: no line 'seed: N'; name a log of train_golf.py")
        model = golf.Golf(self.model.cfg, self.tokenizer.vocab_size, int(seeds[-1]), self.model.dtype)
        return model.eval().to(self.ranks.device)

    @functools.cached_property
    def stream(self) -> np.ndarray:
        """uint16: the whole validation split."""
        return golf.read_split(self.corpus.val, self.tokenizer.vocab_size)

    @functools.cached_property
    def decoded_bytes(self) -> int:
        """Of the whole validation split, by the tokenizer's own library."""
        return len(self.tokenizer.decode(self.stream.astype(np.int64)))

    @functools.cached_property
    def small_artifacts(self) -> list[str]:
        return small_artifacts(self)

    def documents(self) -> Iterator[np.ndarray]:
        """Tokens of each document, BOS first: validation, then training."""
        for path in (*sorted(self.corpus.val), *sorted(self.corpus.train)):
            shard = np.asarray(tg.map_shard(path))
            edges = np.append(np.flatnonzero(shard == self.tokenizer.bos), len(shard))
            for begin, end in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
                yield shard[begin:end]

    @functools.cached_property
    def probe(self) -> np.ndarray:
        """A short stream of several documents, cut to different lengths."""
        parts = []
        for i, document in enumerate(self.documents()):
            parts.append(document[: PROBE_TOKENS + 7 * i])
            if len(parts) == PROBE_DOCUMENTS:
                break
        return np.concatenate(parts).astype(np.int64)

    @functools.cached_property
    def settings(self) -> score.Settings:
        """Small windows and chunks, so that the probe has many of them."""
        length = min(self.model.cfg.seq_len, 64)
        return score.Settings(
            length=length,
            stride=length // 8,
            batch_tokens=4 * length,
            sgd_chunk=length,
            lora_chunk=length // 4,
        )

    def scored(self, mode: str, stream: np.ndarray, change: Callable | None = None) -> score.Scorer:
        """A stream scored by a copy of the model, as score.py does it; `change` wraps the losses.

        Not compiled: the probe has more shapes than torch.compile keeps; check 1 runs what is compiled.
        """
        model = copy.deepcopy(self.model)
        scorer = score.Scorer.of(model, stream, self.settings, self.ranks, is_compiled=False)
        if change:
            scorer.evaluator = dataclasses.replace(scorer.evaluator, nll_at=change(scorer.evaluator.nll_at))
        scorer.nll.fill_(math.nan)
        MODES[mode](scorer, *((self.tokenizer.bos,) if mode == "lora" else ()))
        return scorer


# 2. the artifact: checks 1 and 2 --------------------------------------------------------------------------

# Runs a program that may open the files named to it, the interpreter's and the system's; no socket. What a
# library opens from C is not seen.
SANDBOX = """
import os, runpy, sys
allowed, sys.argv = sys.argv[1].split(os.pathsep), sys.argv[2:]
def watch(event, args):
    if event in ("socket.connect", "socket.bind", "socket.getaddrinfo"):
        raise PermissionError(f"network: {event}")
    if event == "open" and isinstance(args[0], (str, bytes)):
        path = os.path.realpath(os.fsdecode(args[0]))
        if not any(path == root or path.startswith(root.rstrip(os.sep) + os.sep) for root in allowed):
            raise PermissionError(f"opened {path}")
sys.path[0] = os.path.dirname(sys.argv[0])
sys.addaudithook(watch)
runpy.run_path(sys.argv[0], run_name="__main__")
"""
COMPILED = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")  # where compiled code is kept
SYSTEM = ("/usr", "/lib", "/lib64", "/bin", "/etc", "/proc", "/sys", "/dev", "/opt")


def last_error(stderr: str) -> str:
    """The line that names the exception that ended a process; torch writes advice behind it."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    named = [line for line in lines if re.match(r"[\w.]+(Error|Exception|Interrupt|Exit)\b", line)]
    return (named or lines or [""])[-1]


def score_alone(case: Case, mode: str, leak: str) -> tuple[dict | None, str]:
    """(score.json, why there is none) of the packed code, in an empty folder; `leak` precedes it."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        code, where, answer = folder / "code", folder / "empty", folder / "score.json"
        with zipfile.ZipFile(case.run / "code.zip") as archive:
            archive.extractall(code)
        where.mkdir()
        program = code / "golf" / "score.py"
        program.write_text(leak + program.read_text())
        listed = [case.run / "model.golf", *case.corpus.val]
        listed += [] if str(case.tokenizer_path) == BYTES else [case.tokenizer_path, *own_files(case)]
        homes = {sys.prefix, sys.base_prefix, site.getuserbase()}
        python = homes | {str(Path(home).resolve()) for home in homes}
        allowed = [str(folder), case.compiled.name, *SYSTEM, *python]
        allowed += [str(path.resolve()) for path in listed]
        command = [sys.executable, "-c", SANDBOX, os.pathsep.join(allowed), str(program)]
        command += [str((case.run / "model.golf").resolve()), "--tokenizer", str(case.tokenizer_path)]
        command += ["--mode", mode, "--json", str(answer)]
        command += ["--val", *(str(path.resolve()) for path in case.corpus.val)]
        env = {key: value for key, value in os.environ.items() if key not in NOT_INHERITED}
        env |= {"HOME": str(where), "TMPDIR": str(folder), "XDG_CACHE_HOME": str(folder)}
        env["PYTHONUSERBASE"] = site.getuserbase()  # packages that `pip install --user` put there
        env |= {key: case.compiled.name for key in COMPILED}
        done = subprocess.run(command, cwd=where, env=env, capture_output=True, text=True, timeout=CHILD_S)
        why = last_error(done.stderr) or f"exit code {done.returncode}"
        return (json.loads(answer.read_text()) if answer.is_file() else None), why


def own_files(case: Case) -> list[Path]:
    """Every file of the tokenizer, as the manifest lists them."""
    return [case.data / row["file"] for row in case.manifest["tokenizer"]["files"]]


def is_this_program(archive: Path) -> bool:
    """Whether a zip holds the sources beside this file. Not unpacked where it has other names or sizes."""
    with zipfile.ZipFile(archive) as theirs, zipfile.ZipFile(io.BytesIO(golf.pack_code())) as ours:
        names, others = ([(e.filename, e.file_size) for e in z.infolist()] for z in (ours, theirs))
        return names == others and all(ours.read(name) == theirs.read(name) for name, _ in names)


def decodes_alone(case: Case, leak: str = "") -> Found:
    """A process that sees artifact, tokenizer and shards alone finds every score that the run reports."""
    # Checks 4 to 8 look at the sources beside this file: they say nothing of a code.zip that holds others.
    if not is_this_program(case.run / "code.zip"):
        return Found(False, "code.zip is not this program: check the run with the sources that it has")
    said = {mode: [row["val_bpb"]] for mode, row in case.result["scores"].items()}
    said["none"] = [*said.get("none", []), case.result["quantized_val_bpb"]]
    worst, bpbs = 0.0, []
    for mode, reported in sorted(said.items()):
        found, why = score_alone(case, mode, leak)
        if found is None:
            return Found(False, f"no score {mode}: {why[:160]}")
        if found["tokens"] != len(case.stream) - 1:
            return Found(False, f"score {mode}: {found['tokens']:,} of {len(case.stream) - 1:,} tokens")
        bpbs.append(f"{mode} {found['val_bpb']:.8f}")
        for bpb in reported:
            worst = larger(worst, abs(found["val_bpb"] - bpb))
    text = f"{', '.join(bpbs)} bits/byte, {worst:.1e} at most from what the run reports"
    return Found(worst <= SAME_SCORE[case.device], f"{text}; {len(case.stream) - 1:,} tokens")


def reads_more(case: Case) -> Found:
    """Control: the scoring code opens the run's result."""
    return decodes_alone(case, f"open({str((case.run / 'result.json').resolve())!r})\n")


def total_bytes(case: Case, extra: int = 0) -> Found:
    """Model and code that was shipped are at most the cap, and as large as the run says."""
    model, code = (os.path.getsize(case.run / name) for name in ("model.golf", "code.zip"))
    total, said = model + code + extra, case.result["total_bytes"]
    beside = 0 if str(case.tokenizer_path) == BYTES else os.path.getsize(case.tokenizer_path)
    sizes = f"{model:,} model + {code:,} code.zip = {total:,}"
    text = f"{sizes} of {CAP_BYTES:,}; tokenizer {beside:,} beside"
    return Found(total <= CAP_BYTES and total == said + extra, text)


# 3. what is counted: checks 3 and 4 -----------------------------------------------------------------------


def byte_accounting(case: Case, tokenizer: tokens.Charges | None = None) -> Found:
    """Charged bytes are decoded bytes, document by document, and all of the split's."""
    tokenizer, wrong, count = tokenizer or case.tokenizer, 0, 0
    for document in case.documents():
        ids = document.astype(np.int64)
        wrong += int(tokenizer.bytes_of_targets(ids[:-1], ids[1:]).sum()) != len(tokenizer.decode(ids))
        count += 1
        if count == DOCUMENTS:
            break
    ids = case.stream.astype(np.int64)
    charged = int(tokenizer.bytes_of_targets(ids[:-1], ids[1:]).sum())
    exact = case.manifest["token_bytes"].get("exact", False)
    due = case.manifest["splits"]["val"]["bytes"] if exact else case.decoded_bytes
    agree = True
    for row in case.result["scores"].values():
        bpb = row["val_loss"] * (len(ids) - 1) / math.log(2) / charged
        agree &= (row["tokens"], row["bytes"]) == (len(ids) - 1, charged)
        agree &= math.isclose(row["val_bpb"], bpb, rel_tol=1e-9)
    source = "the text's" if exact else "the decoded text's"
    text = f"{wrong} of {count:,} documents differ; {charged:,} bytes charged, {due:,} are {source}"
    return Found(not wrong and charged == due and agree, text if agree else f"{text}; a score differs")


def space_twice(case: Case) -> Found:
    """Control: a leading space, or a byte that is one, is charged twice."""
    t = case.tokenizer
    pairs = (
        t.decode([i, i]) if n else b"" for i, n in enumerate(t.num_bytes)
    )  # the second is not at the start
    space = np.array([pair[-n:][:1] == b" " for pair, n in zip(pairs, t.num_bytes, strict=True)])
    return byte_accounting(case, dataclasses.replace(t, num_bytes=t.num_bytes + space))


def as_it_is(nll_at: Callable) -> Callable:
    return nll_at


def no_model(nll_at: Callable) -> Callable:
    """Losses of 0 at once, where only the places matter."""
    return lambda rows, places, targets: torch.zeros(targets.shape, device=rows.device)


def coverage(case: Case, cut: int = 0, modes: Sequence[str] = tuple(MODES)) -> Found:
    """Every target of the stream is scored once, in every mode; `cut`: so many are left out."""
    stream, problems, checked = case.stream[-COVERED_TOKENS:], [], 0
    cases = [("none", stream, no_model), ("sliding", stream, no_model)]
    cases += [(mode, case.probe, as_it_is) for mode in modes]
    for mode, part, change in cases:
        scorer = case.scored(mode, part, change)
        if cut:
            scorer.nll[-cut:] = math.nan
            scorer.events[-1] = scorer.events[-1]._replace(high=scorer.events[-1].high - cut)
        count = np.zeros(len(part) - 1, np.int64)
        for event in scorer.events:
            count[event.low : event.high] += event.what == "score"
        missing = int(torch.isnan(scorer.nll).sum())
        if missing or (count != 1).any():
            problems.append(f"{mode}: {missing} without a score, {int((count != 1).sum())} not scored once")
        checked += len(count)
    text = f"{checked:,} targets once each in {len(cases)} passes; BOS is a target, the first token is none"
    return Found(not problems, "; ".join(problems[:2]) or text)


# 4. what is known: checks 5 to 8 --------------------------------------------------------------------------


def larger(a: float, b: float) -> float:
    """The larger, and what is no number is larger than all."""
    return max(a, b) if b == b else math.inf


def replaced(case: Case, stream: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Other tokens for those at `places`; BOS stays."""
    bos, size = case.tokenizer.bos, case.tokenizer.vocab_size
    other = (stream[places] + 1 + np.arange(len(places)) % 5) % size
    other = np.where(other == bos, (other + 7) % size, other)
    return np.where(stream[places] == bos, bos, other)


def inputs_alone(case: Case, stream: np.ndarray, places: np.ndarray) -> tuple[np.ndarray, Callable]:
    """(a stream changed at `places`, a change of nll_at): the model reads other tokens, its targets stay.

    So the loss of a changed token itself must stay too: a model that sees what it predicts is found out. Ids
    from the vocabulary's size on stand for pairs of (what is read, what is predicted).
    """
    size, device = case.tokenizer.vocab_size, case.ranks.device
    coded, same = stream.copy(), np.arange(size)
    coded[places] = size + np.arange(len(places))
    read = torch.from_numpy(np.concatenate((same, replaced(case, stream, places)))).to(device)
    due = torch.from_numpy(np.concatenate((same, stream[places]))).to(device)
    is_bos = stream[places] == case.tokenizer.bos
    coded[places[is_bos]] = case.tokenizer.bos

    def decoded(nll_at: Callable) -> Callable:
        return lambda rows, at, targets, *rest: nll_at(read[rows.long()], at, due[targets.long()], *rest)

    return coded, decoded


def causality(case: Case, change: Callable = as_it_is, modes: Sequence[str] = tuple(MODES)) -> Found:
    """Reading another token j, or others from j on, moves no loss up to token j's own, in any mode."""
    stream, worst, count = case.probe, 0.0, 0
    for mode in modes:
        base = case.scored(mode, stream, change).nll
        for j in (int(part * len(stream)) for part in (0.4, 0.8)):
            j += int(stream[j] == case.tokenizer.bos)
            for places in (np.array([j]), np.arange(j, len(stream))):
                coded, decoded = inputs_alone(case, stream, places)
                nll = case.scored(mode, coded, lambda nll_at, d=decoded: d(change(nll_at))).nll
                worst = larger(worst, float((nll[:j] - base[:j]).abs().max()))  # target j - 1 is token j
                count += 1
    text = f"losses up to a change move by {worst:.1e} nats at most, {count} changes in {', '.join(modes)}"
    return Found(worst <= SAME_NLL[case.device], text)


def sees_the_next(case: Case) -> Found:
    """Control: the model is shown the token that it must predict."""

    def leak(nll_at: Callable) -> Callable:
        return lambda rows, *rest: nll_at(torch.roll(rows, -1, 1), *rest)

    return causality(case, leak, ("none",))


def order_of(events: Sequence[score.Event]) -> str:
    """What is wrong with the order of scores and updates; empty if nothing is."""
    learnt: dict[int, int] = {}
    scored: dict[int, set] = {}
    for event in events:
        targets, state = range(event.low, event.high), event.state
        if event.what == "update":
            if not scored.get(state, set()).issuperset(targets):
                return f"state {state} learns {event.low}..{event.high} before it is scored"
            learnt[state] = max(learnt.get(state, 0), event.high)
        elif event.low < learnt.get(state, 0):
            return f"state {state} scores {event.low} after it has learnt up to {learnt[state]}"
        else:
            scored.setdefault(state, set()).update(targets)
    return ""


def score_first(case: Case, change: Callable = lambda events: events) -> Found:
    """No state is updated on a target that it has yet to score."""
    faults, count = [], 0
    for mode in ("sgd", "lora"):
        events = case.scored(mode, case.probe).events
        count += sum(event.what == "update" for event in events)
        if fault := order_of(change(events)):
            faults.append(f"{mode}: {fault}")
    return Found(not faults and count > 0, "; ".join(faults) or f"{count} updates, each behind its scores")


def update_first(case: Case) -> Found:
    """Control: the first update comes before everything else."""

    def swap(events: Sequence[score.Event]) -> list[score.Event]:
        first = next(event for event in events if event.what == "update")
        return [first, *(event for event in events if event is not first)]

    return score_first(case, swap)


def normalisation(case: Case, change: Callable = as_it_is) -> Found:
    """The probabilities of all tokens sum to 1: of the model, after SGD, and with low-rank additions."""
    size, worst = case.tokenizer.vocab_size, 0.0
    device = case.ranks.device
    window = torch.from_numpy(case.probe[: case.settings.length].astype(np.int32)).to(device)[None]
    everything = torch.arange(size, device=device, dtype=torch.int32)[None]
    lora = score.Lora(case.model, 1, case.settings)
    for a, b in lora.factors.values():
        b.data.copy_(0.1 * torch.randn(b.shape, generator=torch.Generator().manual_seed(1)))
        a.requires_grad_(False), b.requires_grad_(False)
    additions = (lora.additions(case.model.dtype),)
    adapted = case.scored("sgd", case.probe).evaluator.nll_at
    for nll_at, extra in ((case.model.nll_at, ()), (adapted, ()), (case.model.nll_at, additions)):
        for place in np.linspace(0, case.settings.length - 1, 4).astype(int).tolist():
            with torch.no_grad():
                nll = change(nll_at)(window, torch.full((1, size), place, device=device), everything, *extra)
            worst = larger(worst, abs(float(torch.exp(-nll.double()).sum()) - 1))
    text = f"sums differ from 1 by {worst:.1e} at most, 12 positions of 3 models"
    return Found(worst <= SUM_TOLERANCE[case.device], text)


def unnormalised(case: Case) -> Found:
    """Control: every probability is raised a little, as a cache outside of the softmax would do."""
    return normalisation(case, lambda nll_at: lambda *args: 0.99 * nll_at(*args))


def isolation(case: Case, mode: str = "lora") -> Found:
    """Where documents are scored by themselves, the text of one does not reach the next."""
    stream = case.probe
    starts = np.flatnonzero(stream == case.tokenizer.bos)
    begin, end = int(starts[1]), int(starts[2])
    changed, inside = stream.copy(), np.arange(begin + 1, end)
    changed[inside] = replaced(case, stream, inside)
    # Loss `end` is that of the first token behind the third document's BOS.
    moved = (case.scored(mode, changed).nll - case.scored(mode, stream).nll).abs()
    behind, own = float(moved[end:].max()), float(moved[begin:end].max())
    text = (
        f"{mode}: a changed document (its own losses move by {own:.2f} nats) moves later ones by {behind:.1e}"
    )
    return Found(behind <= SAME_NLL[case.device] and own > 0, text)


# 5. what was trained: checks 9 to 12 ----------------------------------------------------------------------


def quantiser(case: Case, swapped: bool = False) -> Found:
    """GPTQ's error in the output is at most round-to-nearest's on real activations; the file round-trips.

    The trained weights before quantisation are not kept, so both quantise the artifact's, two bits coarser.
    """
    cfg, moments, worst = case.model.cfg, golf.Moments(), 0.0
    data = golf.Sequences.open(case.corpus, cfg, 0)
    rows = torch.from_numpy(data.read(data.batch(0, max(4096 // cfg.seq_len, 1)))).to(case.ranks.device)
    with torch.no_grad():
        case.model.stream(rows[:, :-1], True, tap=moments)
        hessians = moments.banks(case.ranks)
        for row in PARAMS:
            if row.kind != "matrix":
                continue
            w, bits, hessian = (
                getattr(case.model, row.name).detach(),
                max(cfg.matrix_bits - 2, 2),
                hessians[row.reads],
            )
            scale = golf.row_scale(w, bits, "sigma", 3.0)
            ours = weighted(w - scale * golf.gptq(w, scale, bits, hessian, cfg.damp), hessian)
            plain = weighted(w - scale * golf.round_to_nearest(w, scale, bits), hessian)
            worst = larger(worst, plain / ours if swapped else ours / plain)
    same = artifact.pack(*case.contents) == case.packed
    gap = case.result["quantized_val_bpb"] / case.result["val_bpb"] - 1
    text = f"error at most {worst:.3f} of plain rounding's; gap {gap:.2%}, at most {MAX_GAP:.0%}"
    text += "" if same else "; packed again it is another file"
    return Found(worst <= 1 and same and gap <= MAX_GAP, text)


def weighted(error: Tensor, hessian: Tensor) -> float:
    """tr(E H E^T), summed over a bank."""
    return float(torch.einsum("mrc,mcd,mrd->", error.double(), hessian.double(), error.double()))


def unigram_bpb(case: Case) -> float:
    """Bits a byte of a model that knows only how often each token of the validation text comes."""
    ids = case.stream.astype(np.int64)
    counts = np.bincount(ids[1:]).astype(np.float64)
    seen = counts[counts > 0]
    bits = float((seen * np.log2(seen.sum() / seen)).sum())
    return bits / int(case.tokenizer.bytes_of_targets(ids[:-1], ids[1:]).sum())


def trained(case: Case, model: golf.Golf | None = None) -> Found:
    """Every matrix is further from its initial value than rounding explains, and the score beats unigrams."""
    meta, tensors = case.contents
    near, text = math.inf, "?"
    if model is not None:  # the control: this model in the place of the trained one, rounded as it was
        cfg, weights = model.cfg, {name: p.detach() for name, p in model.named_parameters()}
        tensors = golf.quantize(weights, {}, cfg, meta["stretch"], "rtn")
    state = golf.restore(tensors, case.model.cfg, case.tokenizer.vocab_size)
    for name, q in tensors.items():
        if not q.bits:
            continue
        step = torch.from_numpy(q.scales.astype(np.float32)).view(*([-1] if q.values.ndim == 2 else [-1, 1]))
        rounding = float(step.square().mean().sqrt()) / math.sqrt(12)
        start = getattr(case.initial, name).detach().cpu().float().view(state[name].shape)
        far = float((state[name] - start).square().mean().sqrt()) / max(rounding, 1e-12)
        near, text = min((near, text), (far, name))
    bpb = case.result["quantized_val_bpb"] if model is None else model_bpb(case, model)
    unigram = unigram_bpb(case)
    moved = f"{text} has moved {near:.1f} roundings, the least of all"
    return Found(near >= MOVED and bpb < unigram, f"{moved}; {bpb:.4f} bits/byte, unigrams {unigram:.4f}")


def model_bpb(case: Case, model: golf.Golf) -> float:
    """Bits a byte of a model on the probe."""
    evaluator = golf.Evaluator.of(model.nll_at, case.probe, case.ranks.device, case.settings.length, 4096)
    num_bytes = int(case.tokenizer.bytes_of_targets(case.probe[:-1], case.probe[1:]).sum())
    return evaluator.mean(case.ranks) * evaluator.num_targets / math.log(2) / num_bytes


def within_budget(case: Case, result: dict | None = None) -> Found:
    """The run ended well, kept its promises, read training data within the budget, and its ledger adds up."""
    result = result or case.result
    cfg, faults = case.contents[0]["config"], list(result["promises_not_kept"])
    end, budget = result["train_data_access_end_s"], cfg["budget_seconds"]
    if not cfg["steps"] and end > budget:
        faults.append(f"training data read until {end:.1f} s of {budget:g}")
    for mode, row in result["scores"].items():
        if not row["within_budget"] or row["seconds"] > row["budget_seconds"]:
            faults.append(f"score {mode} over its budget")
    needed = {"compile and warm-up", "training", "calibration", "quantise, fit, pack"}
    if missing := needed - set(result["ledger_s"]):
        faults.append(f"no {', '.join(sorted(missing))} in the ledger")
    # Training and validation are within `training`; the published time leaves validation out.
    if result["train_time_ms"] / 1000 > sum(result["ledger_s"].values()):
        faults.append("the ledger is shorter than the training time")
    if (ends := re.findall(r"^status: (.*)$", case.log, re.M))[-1:] != ["done"]:
        faults.append(f"the log ends with {ends[-1:]}, not with 'done'")
    if "\nschedule: " not in case.log:
        faults.append("the log does not say when the schedule's events came")
    total = sum(result["ledger_s"].values())
    text = f"{result['steps']} steps, training data until {end:.1f} s, ledger {total:.1f} s"
    return Found(not faults, "; ".join(faults) or text)


def over_budget(case: Case) -> Found:
    """Control: the same run with a score that took longer than allowed."""
    result = copy.deepcopy(case.result)
    result["promises_not_kept"].append("score none took longer than its budget")
    return within_budget(case, result)


def small_data(case: Case, folder: Path) -> Path:
    """A prepared folder of the same text, a little of it."""
    manifest = copy.deepcopy(case.manifest)
    sides = {"train": (case.corpus.train[0], SMALL_TRAIN), "val": (case.corpus.val[0], SMALL_VAL)}
    for side, (path, size) in sides.items():
        part = np.asarray(tg.map_shard(path)[:size])
        data, name = shards.header(len(part)) + part.astype("<u2").tobytes(), f"small_{side}_000000.bin"
        (folder / name).write_bytes(data)
        counts = {"tokens": len(part), "documents": int((part == case.tokenizer.bos).sum())}
        counts["bytes"] = int(case.corpus.token_bytes[part].sum(dtype=np.int64))
        row = {"file": name, "sha256": hashlib.sha256(data).hexdigest(), **counts}
        manifest["splits"][side] = {**counts, "shards": [row]}
    for path in (*own_files(case), case.data / manifest["token_bytes"]["file"]):
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


SEEDS = (1, 1, 2)


def small_artifacts(case: Case) -> list[str]:
    """SHA-256 of what small trainings on the CPU write, one for each of SEEDS, or why there is none."""
    found = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "data").mkdir()
        command = [sys.executable, str(ROOT / "golf" / "train_golf.py"), "--mode", "smoke", "--data"]
        command += [str(small_data(case, folder / "data"))]
        command += [word for change in SMALL for word in ("--set", change)]
        env = {key: value for key, value in os.environ.items() if key not in NOT_INHERITED}
        env |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        runs = []
        for i, seed in enumerate(SEEDS):
            args = [*command, "--seed", str(seed), "--out", str(folder / str(i))]
            runs.append(
                subprocess.Popen(args, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
            )
        try:
            for i, run in enumerate(runs):
                lines = run.communicate(timeout=CHILD_S)[1].strip().splitlines()
                path = folder / str(i) / "model.golf"
                digest = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
                found.append(digest or f"no artifact: {(lines or ['?'])[-1]}")
        finally:
            for run in runs:
                run.kill()
    return found


def brief(digest: str) -> str:
    """The first digits of a SHA-256; whatever else stands in its place, whole."""
    return digest[:12] if re.fullmatch("[0-9a-f]{64}", digest) else digest


def determinism(case: Case, second: int = 1) -> Found:
    """Small trainings with one seed give one artifact; 1, 2 and 4 ranks see the same batches.

    `second`: place in SEEDS of the training that the first is compared with.
    """
    one, two = case.small_artifacts[0], case.small_artifacts[second]
    data = golf.Sequences.open(case.corpus, case.model.cfg, 1)
    size = case.model.cfg.batch_tokens // case.model.cfg.seq_len
    orders = {
        hashlib.sha256(global_batch(case, data, size, ranks).tobytes()).hexdigest() for ranks in (1, 2, 4)
    }
    same = one == two and not one.startswith("no")
    text = f"seeds {SEEDS[0]} and {SEEDS[second]}: {brief(one)} and {brief(two)}"
    return Found(same and len(orders) == 1, f"{text}; {len(orders)} order of data at 1, 2 and 4 ranks")


def global_batch(case: Case, data: golf.Sequences, size: int, world_size: int) -> np.ndarray:
    """The tokens of the first two batches, put together from what the loader gives to each rank."""
    parts = []
    for rank in range(world_size):
        ranks = tg.Ranks(rank, world_size, torch.device("cpu"))
        steps = golf.batches(data, case.model.cfg, ranks, case.corpus)
        parts.append([torch.cat(next(steps)).numpy() for _ in range(2)])
        steps.close()
    return np.concatenate([rows[step] for step in range(2) for rows in parts])


# 6. significance: check 13 --------------------------------------------------------------------------------


def significance(
    new: Sequence[float], base: Sequence[float], gain: float, unit: str, bytes_per_token: float
) -> float:
    """p that the bits a byte `new` are not better than `base` by more than the gain: Welch, one-sided.

    `unit` of the gain is nats/token, nats/byte or bits/byte. InputError with fewer than two runs of a side.
    """
    if unit not in GAIN_UNITS:
        raise InputError(f"unit {unit!r}: 0.005 nats of what? use one of {', '.join(GAIN_UNITS)}")
    try:
        return statistics.welch(new, base, "less", 0.95, -GAIN_UNITS[unit](gain, bytes_per_token)).p
    except ValueError as error:
        raise InputError(str(error)) from None


# Bits a byte of three seeds each, made up: 0.004 better, between what 0.005 nats a token and a byte ask for.
NEW_SEEDS, BASE_SEEDS = (1.0601, 1.0604, 1.0598), (1.0641, 1.0644, 1.0638)


UNITS = ("nats/token", "nats/byte")


def tells_units(case: Case, units: tuple[str, str] = UNITS) -> Found:
    """The test knows its unit, agrees with scipy, and refuses a single run."""
    from scipy import stats

    rules = find_track("golf")
    found = [significance(NEW_SEEDS, BASE_SEEDS, rules.gain, unit, rules.bytes_per_token) for unit in units]
    shifted = [x + rules.least_gain for x in NEW_SEEDS]
    theirs = float(stats.ttest_ind(shifted, BASE_SEEDS, equal_var=False, alternative="less").pvalue)
    try:
        significance(NEW_SEEDS[:1], BASE_SEEDS, rules.gain, units[0], rules.bytes_per_token)
        refuses = False
    except InputError:
        refuses = True
    agrees = math.isclose(found[0], theirs, rel_tol=1e-9)
    first, second = (f"p = {p:.2g} for 0.005 {unit}" for p, unit in zip(found, units, strict=True))
    text = f"{first}, {second}; one run refused: {refuses}"
    return Found(found[0] < rules.alpha <= found[1] and agrees and refuses, text)


# 7. the table ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Check:
    """A test, and one of its kind that must not hold."""

    name: str
    test: Callable[[Case], Found]
    control: Callable[[Case], Found]
    wrong: str  # what the control is


CHECKS = (
    Check("artifact-only decode", decodes_alone, reads_more, "the scoring code opens result.json"),
    Check("total bytes", total_bytes, lambda case: total_bytes(case, CAP_BYTES), "16 MB more"),
    Check("byte accounting", byte_accounting, space_twice, "a leading space is charged twice"),
    Check("scored once", coverage, lambda case: coverage(case, 64, ()), "the last 64 targets are left out"),
    Check("causality", causality, sees_the_next, "the model sees the token to predict"),
    Check("score before update", score_first, update_first, "an update precedes its scores"),
    Check("normalisation", normalisation, unnormalised, "every probability is raised"),
    Check("document isolation", isolation, lambda case: isolation(case, "sliding"), "one stream"),
    Check("quantiser", quantiser, lambda case: quantiser(case, True), "plain rounding for GPTQ"),
    Check("trained, not initial", trained, lambda case: trained(case, case.initial), "the initial weights"),
    Check("schedule and budget", within_budget, over_budget, "a score over its budget"),
    Check("determinism", determinism, lambda case: determinism(case, 2), "another seed"),
    Check("significance", tells_units, lambda case: tells_units(case, UNITS[::-1]), "units exchanged"),
)  # fmt: skip


def attempt(test: Callable[[Case], Found], case: Case) -> Found:
    """A test that breaks does not hold, and says why."""
    try:
        return test(case)
    except Exception as error:  # whatever a broken artifact or scorer does, the other checks are still wanted
        return Found(False, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}", broke=True)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Windows of 64 tokens do not pay for a second thread: on a busy CPU two took six times as long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def run_checks(case: Case, chosen: Sequence[int]) -> list[dict]:
    """One row and one line a check."""
    rows = []
    for number in chosen:
        check, began = CHECKS[number - 1], time.perf_counter()
        found, control = attempt(check.test, case), attempt(check.control, case)
        is_caught = not control.holds and not control.broke  # a control that breaks has shown nothing
        passed = found.holds and is_caught
        seconds = time.perf_counter() - began
        rows.append({
            "number": number, "name": check.name, "passed": passed, "holds": found.holds,
            "measured": found.measured, "control": check.wrong,
            "control_caught": is_caught, "control_measured": control.measured,
            "seconds": round(seconds, 2),
        })  # fmt: skip
        note = "" if is_caught else f" CONTROL NOT CAUGHT ({check.wrong}: {control.measured})"
        print(f"{'pass' if passed else 'FAIL'} {number:2} {check.name}: {found.measured}{note}", flush=True)
    return rows


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="check.py",
        description=__doc__.split("\n\n")[0],
        epilog="Writes checks.json into RUN. Exit codes: 0 all passed, 1 a check failed, 2 bad input.",
    )
    add, default = parser.add_argument, ROOT / "data" / "default"
    add("run", nargs="?", type=Path, metavar="RUN", help="folder of a run; default the newest in logs/golf")
    add("--data", type=Path, default=default, help="prepared folder that the run was given; data/default")
    add("--only", metavar="N,N", help=f"these checks alone, numbers from 1 to {len(CHECKS)}")
    parser.error = tg.refuse
    args = parser.parse_args(argv)
    if args.run is None:
        ended = [path.parent for path in Path("logs", "golf").glob("*/model.golf")]
        if not ended:
            raise InputError("logs/golf: holds no run that ended; train one, or name the folder of one")
        args.run = max(ended, key=lambda run: (run / "model.golf").stat().st_mtime)
        print(f"run: {args.run}")
    numbers = args.only.split(",") if args.only is not None else map(str, range(1, len(CHECKS) + 1))
    args.chosen = [int(n) if n.isdecimal() else 0 for n in numbers]
    if not all(1 <= n <= len(CHECKS) for n in args.chosen):
        raise InputError(
            f"--only {args.only}: must be numbers from 1 to {len(CHECKS)}, with commas; correct it"
        )
    return args


def main(argv: Sequence[str] | None = None) -> int:
    try:
        args = parse(argv)
        case = Case.open(args.run, args.data, tg.Ranks.from_torchrun())
        _ = case.contents  # before any check: what is no artifact is bad input
        with one_thread():
            rows = run_checks(case, args.chosen)
        passed = all(row["passed"] for row in rows)
        report = {
            "sha256": digests(args.run), "passed": passed,
            "complete": len(rows) == len(CHECKS), "device": case.device, "checks": rows,
        }  # fmt: skip
        text = json.dumps(report, indent=1) + "\n"
        tg.atomically(args.run / "checks.json", lambda path: path.write_text(text))
    except (InputError, tokens.UserError, artifact.ArtifactError, OSError, KeyError) as error:
        reason = (
            f"no {error} in the run's result" if isinstance(error, KeyError) else " ".join(str(error).split())
        )
        print(f"check.py: error: {reason}", file=sys.stderr)
        return 2
    print(f"{sum(row['passed'] for row in rows)} of {len(rows)} checks passed; {args.run / 'checks.json'}")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
