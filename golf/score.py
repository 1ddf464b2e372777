"""Score an artifact: bits per byte on the validation shards, by a process that sees nothing else.

    python golf/score.py model.golf --tokenizer data/books/sp8192.model --val data/books/*_val_*.bin
    torchrun --standalone --nproc_per_node=8 golf/score.py model.golf ... --mode sliding

Modes (each scores every target of the stream exactly once, and commits it before anything learns from it):
    none     windows of the training length that do not overlap
    sliding  windows that advance by --stride: every target sees at least length - stride tokens before it
    sgd      sliding, by chunks; after a chunk is scored the whole model takes SGD steps on it (contest #549)
    lora     each document by itself, from its BOS on: chunks are scored, then low-rank additions to the
             weights take an AdamW step on them; they begin anew with every document (contest #77, #1530)

Target t is token t + 1 of the stream, predicted after token t. A BOS is scored, and charged with no byte.
"""

import argparse
import contextlib
import itertools
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))  # run as a script, its folder is on the path, not the project

from golf import train_golf as golf  # noqa: E402  before torch: it configures the allocator

# isort: split
import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch import Tensor  # noqa: E402
from tqdm import tqdm  # noqa: E402

import train_gpt as tg  # noqa: E402
from golf import artifact, tokens  # noqa: E402

InputError = tg.InputError
WHOLE_STREAM = -1  # the state that `sgd` updates; `lora` has one for each document


# 1. settings and events -----------------------------------------------------------------------------------
@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """How a stream is scored; lengths in tokens."""

    length: int  # of a window
    stride: int  # targets that a sliding window scores
    batch_tokens: int  # of one forward pass
    lora_chunk: int
    sgd_chunk: int = 32_768
    sgd_epochs: int = 3
    sgd_lr: float = 0.003  # constant: what is to come, its length too, must not matter
    sgd_momentum: float = 0.9
    sgd_clip: float = 1.0  # largest norm of a gradient
    lora_rank: int = 32
    lora_alpha: float = 48.0
    lora_lr: float = 1e-4
    lora_beta2: float = 0.99  # of AdamW; beta1 is 0
    lora_decay: float = 0.5


class Event(NamedTuple):
    """What happened to a range of targets, in the order in which it happened."""

    what: str  # "score" or "update"
    state: int  # whose weights: WHOLE_STREAM, or the first target of a document
    low: int
    high: int


def check_events(events: Sequence[Event], num_targets: int) -> None:
    """AssertionError unless each target is scored once, before any update of the same state has seen it."""
    count, seen = np.zeros(num_targets, np.int64), {}
    for event in events:
        part, learnt = slice(event.low, event.high), seen.get(event.state, 0)
        if event.what == "update":
            assert (count[part] == 1).all(), f"an update before its score: {event}"
            seen[event.state] = max(learnt, event.high)
        else:
            assert event.low >= learnt, f"scored after an update had seen it: {event}"
            count[part] += 1
    wrong = np.flatnonzero(count != 1)
    assert not len(wrong), f"{len(wrong)} targets are not scored exactly once, the first is {wrong[0]}"


@dataclass(slots=True)
class Scorer:
    """A model, a stream, and what has been scored of it."""

    model: golf.Golf
    evaluator: golf.Evaluator
    settings: Settings
    ranks: tg.Ranks
    nll: Tensor  # float32 [N] of the targets, 0 where another rank scores
    events: list[Event] = field(default_factory=list)
    progress: Callable[[int], object] = lambda count: None

    @classmethod
    def of(
        cls,
        model: golf.Golf,
        stream: np.ndarray,
        settings: Settings,
        ranks: tg.Ranks,
        is_compiled: bool = True,
    ) -> "Scorer":
        """`is_compiled`, on a GPU: a minute for each shape, which a short stream does not repay."""
        compiler = golf.compiler_for(ranks.device if is_compiled else torch.device("cpu"))
        nll_at, length = compiler(model.nll_at, dynamic=False), settings.length
        evaluator = golf.Evaluator.of(nll_at, stream, ranks.device, length, settings.batch_tokens)
        nll = torch.zeros(evaluator.num_targets, device=ranks.device)
        return cls(model.eval(), evaluator, settings, ranks, nll)

    @property
    def num_targets(self) -> int:
        return self.evaluator.num_targets

    def score(self, first: int, after: int, stride: int) -> None:
        """Score a range with the weights as they are now."""
        self.evaluator.score(first, after, stride, self.nll, self.ranks, self.progress)
        self.events.append(Event("score", WHOLE_STREAM, first, after))


# 2. fixed weights -----------------------------------------------------------------------------------------
def plain(scorer: Scorer) -> None:
    """Windows that do not overlap."""
    scorer.score(0, scorer.num_targets, scorer.evaluator.length)


def sliding(scorer: Scorer) -> None:
    """Windows that advance by the stride."""
    scorer.score(0, scorer.num_targets, scorer.settings.stride)


# 3. SGD on chunks -----------------------------------------------------------------------------------------
def chunk_sgd(scorer: Scorer) -> None:
    """Score a chunk by sliding windows, then train all weights on it; the last chunk teaches nobody."""
    s, total = scorer.settings, scorer.num_targets
    chunks = [(begin, min(begin + s.sgd_chunk, total)) for begin in range(0, total, s.sgd_chunk)]
    trainer = ChunkTrainer(scorer)
    for first, after in chunks:
        scorer.score(first, after, s.stride)
        if after < total:
            trainer.learn(first, after)


class ChunkTrainer:
    """SGD with momentum over all float32 parameters; ranks share the sequences of a chunk."""

    def __init__(self, scorer: Scorer) -> None:
        s, self.scorer = scorer.settings, scorer
        self.params = list(scorer.model.parameters())
        self.sgd = torch.optim.SGD(self.params, lr=s.sgd_lr, momentum=s.sgd_momentum)

    def learn(self, first: int, after: int) -> None:
        """sgd_epochs passes over the targets first..after-1, a batch of whole windows at a step."""
        s, ev, ranks = self.scorer.settings, self.scorer.evaluator, self.scorer.ranks
        plan = golf.plan_windows(first, after, ev.length, ev.length)
        share = ev.rows * ranks.world_size
        for _ in range(s.sgd_epochs):
            for begin in range(0, len(plan.low), share):
                self._step(plan, begin + ranks.rank * ev.rows, int(plan.low[begin]), begin + share)
        self.scorer.events.append(Event("update", WHOLE_STREAM, first, after))

    def _step(self, plan: golf.Plan, mine: int, low: int, after: int) -> None:
        """One step on the mean loss of the windows up to `after`; this rank's begin at `mine`."""
        s, ev, model = self.scorer.settings, self.scorer.evaluator, self.scorer.model
        count = int(plan.high[min(after, len(plan.low)) - 1]) - low
        chosen = np.minimum(np.arange(mine, mine + ev.rows), len(plan.low) - 1)
        start, first, last = (
            torch.from_numpy(part[chosen]).to(ev.tokens.device).unsqueeze(1) for part in plan
        )
        targets = start + torch.arange(ev.length, device=ev.tokens.device)
        # A window may also hold targets before its range (already learnt) and fill a batch a second time.
        is_new = torch.from_numpy(np.arange(mine, mine + ev.rows) < len(plan.low)).to(ev.tokens.device)
        counts = (targets >= first) & (targets < last) & is_new.unsqueeze(1)
        places = (targets - start).contiguous()
        loss = ev.nll_at(ev.tokens[targets], places, ev.tokens[targets + 1])
        (torch.where(counts, loss, 0.0).sum() / count).backward()
        for p in self.params:
            self.scorer.ranks.sum(p.grad)
        torch.nn.utils.clip_grad_norm_(self.params, s.sgd_clip)
        self.sgd.step()
        model.zero_grad(set_to_none=True)


# 4. low-rank additions, document by document ----------------------------------------------------------------
LORA_TARGETS = {"qkv": ("q", "k", "v"), "o": ("o",), "up": ("up",), "down": ("down",)}


class Lora:
    """A and B of every target for B documents at once, with AdamW states; row b belongs to one document."""

    def __init__(self, model: golf.Golf, rows: int, settings: Settings) -> None:
        gen, s, device = torch.Generator().manual_seed(0), settings, next(model.parameters()).device
        self.settings, self.factors, self.initial = s, {}, {}
        self.scale = s.lora_alpha / s.lora_rank
        shapes = golf.Golf.shapes(model.cfg, model.vocab_size)
        for name, parts in LORA_TARGETS.items():
            layers, _, columns = shapes[parts[0]]
            a = torch.empty(layers, s.lora_rank, columns).normal_(std=columns**-0.5, generator=gen).to(device)
            b = torch.zeros(layers, sum(shapes[part][1] for part in parts), s.lora_rank, device=device)
            self.initial[name] = a, b
            self.factors[name] = tuple(x.expand(rows, *x.shape).clone().requires_grad_() for x in (a, b))
        self.leaves = [x for pair in self.factors.values() for x in pair]
        self.second = [torch.zeros_like(x) for x in self.leaves]
        self.steps = torch.zeros(rows, device=device)

    def additions(self, dtype: torch.dtype) -> dict[str, tuple[Tensor, Tensor]]:
        """What `Golf.stream` takes."""
        return {name: (a.to(dtype), (self.scale * b).to(dtype)) for name, (a, b) in self.factors.items()}

    @torch.no_grad()
    def reset(self, row: int) -> None:
        """A new document in this row."""
        for name, pair in self.factors.items():
            for x, value in zip(pair, self.initial[name], strict=True):
                x[row] = value
        for second in self.second:
            second[row] = 0.0
        self.steps[row] = 0.0

    @torch.no_grad()
    def update(self) -> None:
        """One AdamW step (beta1 = 0) of every row by its gradient. Rows do not touch each other."""
        s = self.settings
        self.steps += 1
        correction = 1 - s.lora_beta2**self.steps
        for x, second in zip(self.leaves, self.second, strict=True):
            second.lerp_(x.grad.square(), 1 - s.lora_beta2)
            size = (second / correction.view(-1, *[1] * (x.dim() - 1))).sqrt() + 1e-8
            x.mul_(1 - s.lora_lr * s.lora_decay).sub_(s.lora_lr * x.grad / size)
            x.grad = None


def documents(stream: np.ndarray, bos: int) -> list[tuple[int, int]]:
    """(first target, after the last) of every document, in stream order; together all targets.

    A document's targets are its tokens behind the first, and the BOS that ends it: that is predicted from the
    document before, as in a stream without isolation.
    """
    starts = np.flatnonzero(stream[:-1] == bos)
    edges = np.unique(np.concatenate(([0], starts, [len(stream) - 1]))).tolist()
    return list(itertools.pairwise(edges))


class Chunk(NamedTuple):
    """The next targets of the document in a slot of the batch."""

    row: int  # the slot
    begin: int  # the document's first target
    low: int  # the chunk's targets: low..high-1
    high: int
    end: int  # after the document's last target


def doc_lora(scorer: Scorer, bos: int) -> None:
    """Documents in stream order, a slot of the batch each; a slot that is done takes the next document."""
    s, ev, ranks = scorer.settings, scorer.evaluator, scorer.ranks
    rows = max(s.batch_tokens // ev.length, 1)
    scorer.model.requires_grad_(False)
    waiting = iter(documents(ev.tokens.cpu().numpy(), bos)[ranks.rank :: ranks.world_size])
    lora, chunks = Lora(scorer.model, rows, s), {}
    while True:
        for row in set(range(rows)) - set(chunks):
            if document := next(waiting, None):
                begin, end = document
                chunks[row] = Chunk(row, begin, begin, min(begin + s.lora_chunk, end), end)
                lora.reset(row)
        if not chunks:
            return
        score_chunks(scorer, lora, list(chunks.values()))
        learn_chunks(scorer, lora, list(chunks.values()))
        following = (c._replace(low=c.high, high=min(c.high + s.lora_chunk, c.end)) for c in chunks.values())
        chunks = {c.row: c for c in following if c.low < c.end}


def score_chunks(scorer: Scorer, lora: Lora, chunks: Sequence[Chunk]) -> None:
    """Score every slot's chunk; the gradient of the same pass is kept for the update."""
    s, ev = scorer.settings, scorer.evaluator
    device, needed = ev.tokens.device, max(min(c.high - c.begin, ev.length) for c in chunks)
    length = next(n for n in window_lengths(ev.length) if n >= needed)
    table = np.zeros((len(lora.steps), 3), np.int64)  # window's start, low, high; a free slot scores nothing
    for c in chunks:
        table[c.row] = max(c.begin, c.high - length), c.low, c.high
    start, low, high = torch.from_numpy(table).to(device).unsqueeze(-1).unbind(1)
    targets = low + torch.arange(s.lora_chunk, device=device)
    counts = targets < high
    targets = torch.where(counts, targets, start)
    # Behind the chunk lies text that a causal model does not see yet, and behind the stream its last token.
    window = ev.tokens[(start + torch.arange(length, device=device)).clamp_max(ev.num_targets)]
    additions = lora.additions(scorer.model.dtype)
    found = ev.nll_at(window, targets - start, ev.tokens[targets + 1], additions)
    torch.where(counts, found, 0.0).sum().backward()
    scorer.nll[targets[counts]] = found.detach()[counts]
    for c in chunks:
        scorer.events.append(Event("score", c.begin, c.low, c.high))
        scorer.progress(c.high - c.low)


def learn_chunks(scorer: Scorer, lora: Lora, chunks: Sequence[Chunk]) -> None:
    """Take the step that the scored chunks' gradients ask for."""
    lora.update()
    for c in chunks:
        scorer.events.append(Event("update", c.begin, c.low, c.high))


def window_lengths(longest: int) -> list[int]:
    """Two shapes, each compiled once: short documents do not pay for long windows.

    Slots are out of step with each other, so the longest document of many decides: shapes below half would
    hardly be used, and each costs a minute of compilation.
    """
    return sorted({max(longest // 2, 1), longest})


# 5. the process -------------------------------------------------------------------------------------------
def load_model(path: Path, vocab: tokens.Tokenizer, device: torch.device) -> golf.Golf:
    """The model that an artifact holds, nothing else read. InputError where it is of another tokenizer."""
    meta, tensors = artifact.unpack(artifact.read(path))
    try:
        row = {
            key: tuple(value) if isinstance(value, list) else value for key, value in meta["config"].items()
        }
        cfg, size, digest = golf.Config(**row), meta["vocab_size"], meta["tokenizer"]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise InputError(f"artifact {path} is not one of train_golf.py ({reason}); train it again") from None
    if (size, digest) != (vocab.vocab_size, vocab.sha256):
        found = f"vocabulary {vocab.vocab_size}, SHA-256 {vocab.sha256[:12]}"
        own = f"artifact {path} was trained with vocabulary {size}, SHA-256 {str(digest)[:12]}"
        raise InputError(f"{own}, not with {found}; name its own tokenizer with --tokenizer")
    state = golf.restore(tensors, cfg, size)
    model = golf.Golf(cfg, size, 0, torch.bfloat16 if device.type == "cuda" else torch.float32)
    model.load_state_dict(state)
    return model.to(device)


def rules(key: str, value: float, cfg: golf.Config) -> Iterator[tuple[bool, str]]:
    """(whether a setting is as it must be, the rule in words)."""
    yield (value >= 0, "0 or more") if key.endswith(("decay", "momentum")) else (value > 0, "above 0")
    if key in ("sgd_momentum", "lora_beta2"):
        yield value < 1, "below 1"
    most = {"batch_tokens": golf.MAX_PASS_TOKENS, "lora_rank": cfg.model_dim}.get(key, math.inf)
    yield value <= most, f"at most {most}"


def settings_of(model: golf.Golf, changes: Sequence[str]) -> Settings:
    """The defaults for a model, with every `key=value` of `changes`."""
    cfg = model.cfg
    values = {name: f.default for name, f in Settings.__dataclass_fields__.items()}
    values |= {"length": cfg.seq_len, "stride": cfg.stride, "lora_chunk": cfg.stride}
    values["batch_tokens"] = cfg.micro_tokens
    for change in changes:
        key, equals, text = change.partition("=")
        if key not in values or not equals:
            raise InputError(
                f"--set {change}: no setting {key!r}; use KEY=VALUE, KEY one of {', '.join(values)}"
            )
        values[key] = golf.parsed(key, values[key], text)
        for holds, rule in rules(key, values[key], cfg):
            if not holds:
                raise InputError(f"--set {change}: must be {rule}; give such a value")
    if max(values["stride"], values["lora_chunk"]) > values["length"] or values["length"] > cfg.seq_len:
        found = f"length {values['length']}, stride {values['stride']}, lora_chunk {values['lora_chunk']}"
        rule = f"a window is at most the {cfg.seq_len} tokens of training and holds stride and chunk"
        raise InputError(f"{found}: {rule}; change them with --set")
    return Settings(**values)


MODES = {"none": plain, "sliding": sliding, "sgd": chunk_sgd, "lora": doc_lora}


def score(
    model: golf.Golf, stream: np.ndarray, bos: int, mode: str, settings: Settings, ranks: tg.Ranks
) -> Scorer:
    """Score a stream; the Scorer holds every target's loss, summed over ranks, and the events."""
    scorer = Scorer.of(model, stream, settings, ranks)
    bar = tqdm(
        total=scorer.num_targets, unit=" tokens", unit_scale=True, disable=None, desc=mode, leave=False
    )
    with bar if ranks.rank == 0 else contextlib.nullcontext():
        scorer.progress = lambda count: bar.update(count * ranks.world_size) if ranks.rank == 0 else None
        MODES[mode](scorer, *((bos,) if mode == "lora" else ()))
    ranks.sum(scorer.nll)
    if mode == "lora" and ranks.world_size > 1:  # each rank has its own documents
        everybody: list = [None] * ranks.world_size
        dist.all_gather_object(everybody, scorer.events)
        scorer.events = [event for events in everybody for event in events]
    check_events(scorer.events, scorer.num_targets)
    return scorer


def run(args: argparse.Namespace, ranks: tg.Ranks) -> int:
    """Load, score, print; the exit code."""
    began = time.perf_counter()
    vocab = tokens.load_tokenizer(args.tokenizer)
    stream = golf.read_split(args.val, vocab.vocab_size)
    is_partial = 0 < args.limit < len(stream) - 1
    stream = stream[: args.limit + 1] if is_partial else stream
    model = load_model(args.model, vocab, ranks.device)
    settings = settings_of(model, args.set)
    with ranks.process_group():
        scorer = score(model, stream, vocab.bos, args.mode, settings, ranks)
        nats = float(scorer.nll.double().sum())
        if not math.isfinite(nats):
            raise golf.Ended(f"diverged: the loss of mode {args.mode} is {nats}", 3)
    num_bytes = int(vocab.bytes_of_targets(stream[:-1], stream[1:]).sum())
    seconds, count = time.perf_counter() - began, scorer.num_targets
    result = {
        "mode": args.mode, "val_loss": nats / count, "val_bpb": nats / math.log(2) / num_bytes,
        "tokens": count, "bytes": num_bytes, "seconds": seconds, "budget_seconds": args.budget,
        "within_budget": seconds <= args.budget, "is_partial": is_partial, "world_size": ranks.world_size,
        "settings": {name: getattr(settings, name) for name in Settings.__dataclass_fields__},
    }  # fmt: skip
    if ranks.rank == 0:
        figures = f"val_loss:{result['val_loss']:.8f} val_bpb:{result['val_bpb']:.8f}"
        notes = " PARTIAL: not the whole split" if is_partial else ""
        notes += "" if result["within_budget"] else " OVER ITS BUDGET"
        spent = f"tokens:{count} bytes:{num_bytes} seconds:{seconds:.1f} of {args.budget:g}"
        print(f"score {args.mode} {figures} {spent}{notes}", flush=True)
        if args.json:
            text = json.dumps(result, indent=1) + "\n"
            tg.atomically(args.json, lambda path: path.write_text(text))
    return 0 if result["within_budget"] else 4


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="score.py",
        description=__doc__.split("\n\n")[0],
        epilog="Modes and settings: the docstring and class Settings of this file. Exit codes: 0 done, "
        "2 bad input, 3 the loss is no number, 4 over the budget, 130 interrupted. Also runs under torchrun.",
    )
    add = parser.add_argument
    add("model", type=Path, metavar="MODEL", help="artifact of train_golf.py, model.golf")
    add(
        "--tokenizer",
        required=True,
        help="SentencePiece .model, GPT-2's encoder.json, prepared folder, or bytes",
    )
    add("--val", nargs="+", type=Path, required=True, metavar="SHARD", help="all validation shards")
    add("--mode", default="sliding", help=f"one of {', '.join(MODES)}; default sliding")
    add(
        "--budget",
        type=float,
        default=600.0,
        metavar="SECONDS",
        help="of loading, compiling and scoring; 600",
    )
    add(
        "--limit",
        type=int,
        default=0,
        metavar="N",
        help="score the first N targets alone, and say so; 0: all",
    )
    add("--json", type=Path, metavar="FILE", help="write the result there too")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="change one setting")
    parser.error = tg.refuse
    args = parser.parse_args(argv)
    if args.mode not in MODES:
        raise InputError(f"--mode {args.mode!r} does not exist; choose one of {', '.join(MODES)}")
    if other := [path for path in args.val if not path.is_file()]:
        raise InputError(f"--val {other[0]}: is no file; name the shards, such as FOLDER/*_val_*.bin")
    if args.json and not args.json.parent.is_dir():
        raise InputError(f"--json {args.json}: its folder does not exist; make it, or name another file")
    if not args.budget > 0 or args.limit < 0:
        raise InputError(
            f"--budget {args.budget:g}, --limit {args.limit}: must be above 0 and not negative; mend them"
        )
    return args


def main() -> int:
    try:
        return run(parse(), tg.Ranks.from_torchrun())
    except (InputError, tokens.UserError, artifact.ArtifactError, OSError, golf.Ended) as error:
        message, code = error.args if isinstance(error, golf.Ended) else (f"error: {error}", 2)
        if os.environ.get("RANK", "0") == "0":
            print(f"score.py: {message}", file=sys.stderr)
        return code
    except KeyboardInterrupt:
        print("score.py: interrupted; nothing was written, run it again", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
