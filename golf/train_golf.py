"""Train, quantise and pack the best language model that 16,000,000 bytes can hold, in a fixed time.

    python golf/train_golf.py --mode smoke                        2 cores, 2 minutes: the whole way, in small
    python golf/train_golf.py --mode one --data data/books        one GPU
    torchrun --standalone --nproc_per_node=8 golf/train_golf.py --mode full --data data/contest-sp8192

A mode is a row of the tables in section 1; `--set KEY=VALUE` changes one field of it, for ablations. Every
schedule is a fraction of the budget, so a slower machine takes fewer steps of the same run. What comes out is
a folder: train.txt (the run log, which begins with every source that ran), model.golf and code.zip (together
at most the cap: all that a score needs besides the tokenizer), result.json.

Score: golf/score.py, a process of its own. Helpers that are the same are train_gpt.py's.
Contents: grep '^# [0-9]' golf/train_golf.py
Suffixes: B sequences, T tokens of one, S scored rows of one, N rows, D model dim, H heads, K head dim,
V vocabulary, M matrices of a bank (layers), R rows and C columns of a matrix.
"""

import argparse
import contextlib
import dataclasses
import functools
import hashlib
import io
import itertools
import json
import math
import os
import socket
import subprocess
import sys
import tempfile
import time
import uuid
import zipfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))  # run as a script, its folder is on the path, not the project

import train_gpt as tg  # noqa: E402  before torch, whose allocator it configures

# isort: split
import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from tqdm import tqdm  # noqa: E402

import triton_kernels as kernels  # noqa: E402
from golf import LOG, artifact, tokens  # noqa: E402
from golf.artifact import Quantized  # noqa: E402

InputError, Ended = tg.InputError, tg.Ended

# 1. config: every number of the recipes -----------------------------------------------------------------
MAX_STEPS = 1_000_000  # what step lines name as the total where a budget of seconds ends the run
MAX_SEQ_LEN = 65_536
MAX_PASSES = 64  # of layers: what an artifact asks for is held in lists before its tensors are compared
MAX_PASS_TOKENS = 1 << 20
LAG = 2  # steps that a GPU may be behind the host: no step waits, and the clock is right to LAG steps
SCORE_MODES = ("none", "sliding", "sgd", "lora")  # of score.py


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """Model, training and compression of a run. Fractions are of the training time.

    The default is the contest's reference stack of April 2026 as far as each part paid by itself there: 11
    layers of 512 with 8 heads, 4 of keys and values, MLP 4x leaky relu^2 (35.9 M parameters with an 8,192
    vocabulary: 3.3 coded bits a weight), rotation of a quarter of the head, parallel residuals late, layers
    3 to 5 twice in the second part of training. Left out for what they cost in lines: gates, low-rank error
    correction, smearing, n-gram tables.
    """

    # the model
    num_layers: int = 11
    model_dim: int = 512
    num_heads: int = 8
    num_kv_heads: int = 4
    mlp_mul: int = 4
    leak: float = 0.5  # slope of the MLP's leaky relu below zero, before the square; 0: relu^2
    rope_dims: int = 16  # of a head, the first ones
    rope_base: float = 10000.0
    qk_gain: float = 5.25  # initial factor on the unit-norm queries of each head
    softcap: float = 30.0  # logits z become c tanh(z / c); 0: triton_kernels.py's softcap, in its fused loss
    parallel_from: int = 7  # from this layer on attention and MLP read the same input
    xsa_from: int = 0  # from this layer on attention leaves out what a token says of itself
    ln_scale: bool = True  # the input of layer i is scaled by 1 / sqrt(i + 1)
    order: tuple[int, ...] = (0, 1, 2, 3, 4, 5, 3, 4, 5, 6, 7, 8, 9, 10)  # layers once loops are on
    # training
    budget_seconds: float = 600.0  # of training, hold-out and calibration; not of compiling
    reserve: float = 0.03  # fraction of the budget for hold-out and calibration
    steps: int = 0  # above 0: the schedule is a fraction of so many steps instead, and a seed repeats
    seq_len: int = 2048
    batch_tokens: int = 262_144
    micro_tokens: int = 65_536  # at most so many in one forward pass of one rank
    holdout_tokens: int = 1_048_576  # of the training data, never trained on: chooses average or last weights
    val_points: int = 2  # validations at equal fractions of training, the last at its end
    loop_from: float = 0.35
    momentum: float = 0.97
    momentum_start: float = 0.92
    momentum_until: float = 0.3  # fraction over which momentum rises
    row_norm: bool = True  # rows of the momentum are normalised before the polar step
    matrix_lr: float = 0.025
    matrix_decay: float = 0.09  # decoupled: w *= 1 - lr * decay
    embed_lr: float = 0.03
    embed_decay: float = 0.085
    scalar_lr: float = 0.02
    scalar_decay: float = 0.02
    warmdown: float = 0.72  # the last part of the time, in which the learning rate falls
    lr_floor: float = 0.1
    ema: bool = True
    ema_from: float = 0.5
    ema_span: float = 0.065  # fraction of the time after which a step's weight in the average is 1/e
    # compression
    cap_bytes: int = artifact.CAP_BYTES  # of model.golf and code.zip together
    quantizer: str = "gptq"  # or "rtn", round to nearest
    clip: str = "sigma"  # a row's range is k standard deviations ("sigma") or its largest magnitude ("max")
    matrix_bits: int = 6
    matrix_k: float = 12.85
    embed_bits: int = 7
    embed_k: float = 6.3
    calibration_tokens: int = 1_048_576
    damp: float = 0.01  # of the Hessian's mean diagonal, added to the diagonal
    # scores that are taken at the end, each in a process of its own
    stride: int = 128  # targets of a sliding window: all see 15 / 16 of it or more, for 16 times the work
    score: tuple[str, ...] = ("none", "sliding")

    def __post_init__(self) -> None:
        for name, holds, rule in self.rules():
            if not holds:
                found = f"{name} is {getattr(self, name)!r}: {rule}"
                raise InputError(f"{found}; change it with --set {name}=...")

    def rules(self) -> Iterator[tuple[str, bool, str]]:
        """(field, whether it is as it must be, the rule in words). Artifacts bring values of any type."""
        for field in dataclasses.fields(self):
            like = field.default
            yield field.name, is_like(getattr(self, field.name), like), f"must be of the type of {like!r}"
        positive = "num_layers model_dim num_heads num_kv_heads mlp_mul seq_len stride micro_tokens matrix_k "
        positive += "budget_seconds batch_tokens holdout_tokens calibration_tokens cap_bytes val_points "
        for name in f"{positive} embed_k ema_span qk_gain rope_base".split():
            yield name, getattr(self, name) > 0, "must be above 0"
        for name in "reserve loop_from ema_from momentum momentum_start momentum_until damp".split():
            yield name, 0 <= getattr(self, name) < 1, "must be from 0 to below 1"
        for name in ("lr_floor", "warmdown"):
            yield name, 0 < getattr(self, name) <= 1, "must be above 0 and at most 1"
        rates = "matrix_lr embed_lr scalar_lr matrix_decay embed_decay scalar_decay steps"
        for name in f"{rates} softcap leak parallel_from xsa_from".split():
            yield name, getattr(self, name) >= 0, "must not be negative"
        for name in ("matrix_bits", "embed_bits"):
            yield name, 2 <= getattr(self, name) <= 8, "must be from 2 to 8"
        for name in ("steps", "val_points"):
            yield name, getattr(self, name) < MAX_STEPS, f"must be below {MAX_STEPS}"
        yield "num_layers", 2 <= self.num_layers <= MAX_PASSES, f"must be from 2 to {MAX_PASSES}"
        yield "seq_len", self.seq_len <= MAX_SEQ_LEN, f"must be at most {MAX_SEQ_LEN}"
        yield "micro_tokens", self.micro_tokens <= MAX_PASS_TOKENS, f"must be at most {MAX_PASS_TOKENS}"
        yield "stride", self.stride <= self.seq_len, f"must be at most seq_len {self.seq_len}"
        dim, heads, of = self.model_dim, self.num_heads, self.seq_len
        yield "num_heads", dim % heads == 0, f"must divide model_dim {dim}"
        yield "num_kv_heads", heads % self.num_kv_heads == 0, f"must divide num_heads {heads}"
        rule = f"must be even, above 0, at most the head's {self.head_dim}"
        yield "rope_dims", 0 < self.rope_dims <= self.head_dim and self.rope_dims % 2 == 0, rule
        rule = (
            f"must name layers 0 to {self.num_layers - 1}, each at least once, at most {MAX_PASSES}, or none"
        )
        covers = set(self.order) == set(range(self.num_layers)) and len(self.order) <= MAX_PASSES
        yield "order", not self.order or covers, rule
        yield "batch_tokens", self.batch_tokens % of == 0, f"must be a multiple of seq_len {of}"
        yield "quantizer", self.quantizer in ("gptq", "rtn"), "must be gptq or rtn"
        yield "clip", self.clip in ("sigma", "max"), "must be sigma or max"
        yield "score", set(self.score) <= set(SCORE_MODES), f"must be of {', '.join(SCORE_MODES)}"

    @property
    def head_dim(self) -> int:
        return self.model_dim // self.num_heads

    @property
    def plain_order(self) -> tuple[int, ...]:
        return tuple(range(self.num_layers))

    @property
    def has_loop(self) -> bool:
        return self.order not in ((), self.plain_order)

    def order_at(self, is_looped: bool) -> tuple[int, ...]:
        """The layers in the order in which a token passes them."""
        return self.order if is_looped and self.order else self.plain_order

    @property
    def train_seconds(self) -> float:
        return self.budget_seconds * (1 - self.reserve)


# Fields that a mode, then a recipe, then the small model of `smoke` change.
MODES = {
    "smoke": {"parallel_from": 2, "order": (0, 1, 1, 2), "score": SCORE_MODES},
    "one": {},
    "full": {"batch_tokens": 786_432},
}
RECIPES = {
    "golf": {},
    # The contest's baseline of March 2026, from its description: 9 layers, MLP 2x relu^2, vocabulary 1024,
    # int8 by row maximum, warm-down over the last 1,200 of 13,780 steps. Its Newton-Schulz is polar express
    # here, and its zlib our coder.
    "baseline": {
        "num_layers": 9, "mlp_mul": 2, "leak": 0.0, "rope_dims": 64, "qk_gain": 1.5,
        "parallel_from": 9, "xsa_from": 9, "ln_scale": False, "order": (), "seq_len": 1024,
        "batch_tokens": 524_288, "momentum": 0.95, "momentum_start": 0.85, "momentum_until": 0.04,
        "row_norm": False, "matrix_lr": 0.04, "matrix_decay": 0.0, "embed_lr": 0.05, "embed_decay": 0.0,
        "scalar_lr": 0.04, "scalar_decay": 0.0, "warmdown": 0.087, "lr_floor": 0.001, "ema": False,
        "quantizer": "rtn", "clip": "max", "matrix_bits": 8, "embed_bits": 8, "score": ("none",),
    },
}  # fmt: skip
SMALL = {
    "num_layers": 3, "model_dim": 64, "num_heads": 4, "num_kv_heads": 2, "rope_dims": 8, "seq_len": 128,
    "stride": 64, "batch_tokens": 2048, "micro_tokens": 2048, "steps": 120, "holdout_tokens": 16_384,
    "calibration_tokens": 16_384, "cap_bytes": 195_000,
}  # fmt: skip


def is_like(value: object, like: object) -> bool:
    """Whether a value may stand where `like` does: an integer also for a float."""
    if isinstance(like, tuple):
        return isinstance(value, tuple) and all(type(part) is type(like[0]) for part in value)
    return type(value) is type(like) or (type(like), type(value)) == (float, int)


def configure(mode: str, recipe: str, changes: Sequence[str]) -> Config:
    """The tables' config, with every `key=value` of `changes`. InputError where a key is unknown."""
    values = MODES[mode] | RECIPES[recipe] | (SMALL if mode == "smoke" else {})
    defaults = {field.name: field.default for field in dataclasses.fields(Config)}
    for change in changes:
        key, equals, text = change.partition("=")
        if key not in defaults or not equals:
            known = ", ".join(defaults)
            raise InputError(f"--set {change}: no field {key!r}; use KEY=VALUE, KEY one of {known}")
        values[key] = parsed(key, defaults[key], text)
    return Config(**values)


def parsed(key: str, like: object, text: str) -> object:
    """`text` as a value of the type of `like`."""
    try:
        if isinstance(like, bool):
            return {"true": True, "false": False}[text]
        if isinstance(like, tuple):
            kind = str if key == "score" else int
            return tuple(kind(part) for part in text.split(",") if part)
        value = type(like)(text)
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError
        return value
    except (ValueError, KeyError):
        kind = "true or false" if isinstance(like, bool) else type(like).__name__
        raise InputError(f"--set {key}={text}: must be {kind}, as {like!r} is; give such a value") from None


@dataclass(frozen=True, slots=True)
class Param:
    """One row of the parameter table."""

    name: str
    kind: str  # "matrix" (Muon, a bank [M, R, C]), "embed" or "scalar" (AdamW)
    reads: str = ""  # the activation that multiplies it, whose second moment is its Hessian


PARAMS = (
    Param("q", "matrix", "attn_in"),
    Param("k", "matrix", "attn_in"),
    Param("v", "matrix", "attn_in"),
    Param("o", "matrix", "attn_out"),
    Param("up", "matrix", "mlp_in"),
    Param("down", "matrix", "mlp_out"),
    Param("embed", "embed", "head"),
    Param("attn_scale", "scalar"),
    Param("mlp_scale", "scalar"),
    Param("mix", "scalar"),
    Param("q_gain", "scalar"),
    Param("skip", "scalar"),
)


# 2. schedule: pure functions of the fraction of the time that is over --------------------------------------
class Sched(NamedTuple):
    lr: float  # multiplier of every base learning rate
    momentum: float
    is_looped: bool
    has_ema: bool


def at(cfg: Config, fraction: float) -> Sched:
    """The schedule of a step that begins when `fraction` of the training time is over."""
    left = min((1 - fraction) / cfg.warmdown, 1)
    rise = min(fraction / cfg.momentum_until, 1) if cfg.momentum_until else 1
    momentum = cfg.momentum - (cfg.momentum - cfg.momentum_start) * (1 - rise)
    is_looped = cfg.has_loop and fraction >= cfg.loop_from
    lr, has_ema = max(left, 0) * (1 - cfg.lr_floor) + cfg.lr_floor, cfg.ema and fraction >= cfg.ema_from
    return Sched(lr, momentum, is_looped, has_ema)


def ema_weight(cfg: Config, elapsed: float) -> float:
    """Weight of the newest parameters in their average after a step that took `elapsed` of the time."""
    return 1 - math.exp(-elapsed / cfg.ema_span)


class Guard:
    """Which scheduled events have happened: a schedule that never reaches one must not pass unnoticed."""

    def __init__(self, cfg: Config) -> None:
        falls = cfg.lr_floor < 1
        self.expected = {"warm-down": falls, "full momentum": True, "loop": cfg.has_loop, "EMA": cfg.ema}
        self.fired: dict[str, int] = {}

    def note(self, cfg: Config, step: int, sched: Sched, has_averaged: bool) -> None:
        """What the step has really done."""
        now = {"warm-down": sched.lr < 1, "full momentum": sched.momentum == cfg.momentum}
        for name, happened in {**now, "loop": sched.is_looped, "EMA": has_averaged}.items():
            if happened:
                self.fired.setdefault(name, step)

    def missing(self) -> list[str]:
        """What was due and did not happen."""
        return [name for name, is_due in self.expected.items() if is_due and name not in self.fired]


# 3. data ------------------------------------------------------------------------------------------------
@functools.lru_cache(maxsize=4)
def shuffled(seed: int, epoch: int, count: int) -> np.ndarray:
    """int64 [count]: 0..count-1 in an order that depends on the arguments alone."""
    return np.random.default_rng((seed, epoch)).permutation(count)


@dataclass(frozen=True, slots=True)
class Sequences:
    """Training text in windows of seq_len + 1 tokens; a seeded shuffle gives the hold-out and the epochs."""

    shards: tuple[np.ndarray, ...]  # uint16 maps
    ends: np.ndarray  # int64 [shards], running count of windows
    seq_len: int
    num_holdout: int
    seed: int

    @classmethod
    def open(cls, corpus: tg.Corpus, cfg: Config, seed: int) -> "Sequences":
        shards = tuple(tg.map_shard(path) for path in corpus.train)
        ends = np.cumsum([max(len(shard) - 1, 0) // cfg.seq_len for shard in shards])
        held, batch = -(-cfg.holdout_tokens // cfg.seq_len), cfg.batch_tokens // cfg.seq_len
        if ends[-1] < held + batch:
            need = f"hold-out and one batch need {held} + {batch} sequences of {cfg.seq_len} tokens"
            raise InputError(f"{need}, the training shards give {ends[-1]}; add text or use a smaller batch")
        return cls(shards, ends, cfg.seq_len, held, seed)

    def read(self, windows: np.ndarray) -> np.ndarray:
        """int32 [windows, seq_len + 1]."""
        shards = np.searchsorted(self.ends, windows, side="right")
        rows = []
        for shard, window in zip(shards.tolist(), windows.tolist(), strict=True):
            begin = (window - (self.ends[shard - 1] if shard else 0)) * self.seq_len
            rows.append(self.shards[shard][begin : begin + self.seq_len + 1])
        return np.stack(rows).astype(np.int32)

    def holdout(self) -> np.ndarray:
        """The windows that are never trained on."""
        return shuffled(self.seed, 0, int(self.ends[-1]))[: self.num_holdout]

    def batch(self, step: int, size: int) -> np.ndarray:
        """The windows of a step's global batch: epoch after epoch, each window once an epoch."""
        count = int(self.ends[-1]) - self.num_holdout
        trained = shuffled(self.seed, 0, int(self.ends[-1]))[self.num_holdout :]
        places = np.arange(step * size, (step + 1) * size)
        epochs = np.unique(places // count).tolist()
        orders = {epoch: shuffled(self.seed, epoch + 1, count) for epoch in epochs}
        return trained[np.array([orders[place // count][place % count] for place in places.tolist()])]


def batches(data: Sequences, cfg: Config, ranks: tg.Ranks, corpus: tg.Corpus) -> Iterator[list[Tensor]]:
    """This rank's micro-batches [B, T + 1] of each step; read in a thread, one step ahead."""
    size = cfg.batch_tokens // cfg.seq_len
    per_rank = size // ranks.world_size
    micro = micro_size(cfg, ranks)

    def load(step: int) -> Tensor:
        mine = data.batch(step, size)[ranks.rank * per_rank : (ranks.rank + 1) * per_rank]
        rows = data.read(mine)
        tg.check_tokens(rows, corpus, corpus.train[0].parent)
        return torch.from_numpy(rows).pin_memory() if ranks.device.type == "cuda" else torch.from_numpy(rows)

    with ThreadPoolExecutor(max_workers=1) as pool:
        ahead = pool.submit(load, 0)
        for step in range(1, MAX_STEPS + 2):
            rows, ahead = ahead.result(), pool.submit(load, step)
            yield list(rows.to(ranks.device, non_blocking=True).split(micro))


def micro_size(cfg: Config, ranks: tg.Ranks) -> int:
    """Sequences of one forward pass: the largest divisor of a rank's share that micro_tokens allow."""
    size = cfg.batch_tokens // cfg.seq_len
    if size % ranks.world_size:
        fault = f"a batch of {size} sequences does not divide among {ranks.world_size} ranks"
        least = ranks.world_size * cfg.seq_len
        raise InputError(f"{fault}; choose --set batch_tokens= a multiple of {least}")
    return tg.slots_per_pass(size // ranks.world_size, cfg.seq_len, cfg.micro_tokens)


def read_split(paths: Sequence[Path], vocab_size: int) -> np.ndarray:
    """uint16: the tokens of shards in the order of their names. InputError where one is not a shard."""
    parts = []
    if len({path.resolve() for path in paths}) < len(paths):
        raise InputError("a shard is named twice, so that its tokens would count twice; name each once")
    for path in sorted(paths):
        tg.check_shard(path)
        parts.append(np.asarray(tg.map_shard(path)))
        if len(parts[-1]) and int(parts[-1].max()) >= vocab_size:
            fault = f"{path}: token {parts[-1].max()}, but the vocabulary has {vocab_size}"
            raise InputError(f"{fault}; use the tokenizer that made the shards")
    joined = np.concatenate(parts)
    if len(joined) < 2:
        raise InputError(f"{paths[0]}: {len(joined)} tokens, at least 2 are needed; prepare more text")
    return joined


def document_digests(path: Path, bos: int) -> Iterator[bytes]:
    """16 bytes for each document of a shard, BOS to BOS."""
    shard = np.asarray(tg.map_shard(path))
    for begin, end in itertools.pairwise([*np.flatnonzero(shard == bos).tolist(), len(shard)]):
        yield hashlib.blake2b(shard[begin:end].tobytes(), digest_size=16).digest()


def check_disjoint(corpus: tg.Corpus) -> None:
    """InputError where a validation document is in a training shard too; about 1 s for 100 M tokens."""
    val = {digest for path in corpus.val for digest in document_digests(path, corpus.bos_id)}
    for path in tqdm(corpus.train, desc="comparing documents", delay=2, disable=None, leave=False):
        shared = val.intersection(document_digests(path, corpus.bos_id))
        if shared:
            fault = f"{path}: {len(shared)} of {len(val)} validation documents are in this training shard"
            raise InputError(f"{fault}; prepare them again with data/prepare.py, which keeps them apart")


# 4. model -----------------------------------------------------------------------------------------------
Tap = Callable[[str, int, Tensor], None]  # (name of an activation, layer, the activation [B, T, C])


def norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],))


def linear(x_BTC: Tensor, w_RC: Tensor, lora: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """x W^T, and with `lora` = (A [B, r, C], B [B, R, r]) each sequence's own x A^T B^T added."""
    y_BTR = F.linear(x_BTC, w_RC)
    if lora is not None:
        y_BTR = y_BTR + (x_BTC @ lora[0].mT) @ lora[1].mT
    return y_BTR


def rotate(x_BHTK: Tensor, cos_TK: Tensor, sin_TK: Tensor) -> Tensor:
    """Rotary embedding of the first 2 * cos.shape[-1] dimensions of every head."""
    half = cos_TK.shape[-1]
    a, b, rest = x_BHTK.split((half, half, x_BHTK.shape[-1] - 2 * half), dim=-1)
    return torch.cat((a * cos_TK + b * sin_TK, b * cos_TK - a * sin_TK, rest), dim=-1)


def without_self(y_BHTK: Tensor, v_BGTK: Tensor) -> Tensor:
    """y less its part along the token's own value, by group of heads. Source: arXiv 2603.09078."""
    y = y_BHTK.unflatten(1, (v_BGTK.shape[1], -1))
    v = F.normalize(v_BGTK, dim=-1).unsqueeze(2)
    return (y - (y * v).sum(-1, keepdim=True) * v).flatten(1, 2)


class Golf(nn.Module):
    """float32 parameters in banks, used in `dtype`; the layers of an explicit order, one after another."""

    def __init__(self, cfg: Config, vocab_size: int, seed: int, dtype: torch.dtype) -> None:
        """Parameters on the CPU, the same for the same seed on every device and rank."""
        super().__init__()
        self.cfg, self.vocab_size, self.dtype = cfg, vocab_size, dtype
        gen = torch.Generator().manual_seed(seed)
        for name, shape in self.shapes(cfg, vocab_size).items():
            self.register_parameter(name, nn.Parameter(self._initial(name, shape, gen)))
        freqs = cfg.rope_base ** -torch.linspace(0, 1, cfg.rope_dims // 2 + 1)[:-1]
        angles = torch.outer(torch.arange(cfg.seq_len), freqs)
        self.register_buffer("cos", angles.cos().to(dtype), persistent=False)
        self.register_buffer("sin", angles.sin().to(dtype), persistent=False)
        self.register_buffer("next_only", torch.tensor([1.0, 0.0, 0.0]), persistent=False)

    @staticmethod
    def shapes(cfg: Config, vocab_size: int) -> dict[str, tuple[int, ...]]:
        """Every parameter's shape; banks [layers, rows, columns]."""
        L, D, H, hidden = cfg.num_layers, cfg.model_dim, cfg.num_heads, cfg.mlp_mul * cfg.model_dim
        kv = cfg.num_kv_heads * cfg.head_dim
        skips = max(len(cfg.order_at(is_looped)) // 2 for is_looped in (False, True))
        return {
            "q": (L, D, D), "k": (L, kv, D), "v": (L, kv, D), "o": (L, D, D),
            "up": (L, hidden, D), "down": (L, D, hidden), "embed": (vocab_size, D),
            "attn_scale": (L, D), "mlp_scale": (L, D), "mix": (L, 2, D), "q_gain": (L, H), "skip": (skips, D),
        }  # fmt: skip

    def _initial(self, name: str, shape: tuple[int, ...], gen: torch.Generator) -> Tensor:
        if name in ("o", "down"):  # every layer begins as the identity
            return torch.zeros(shape)
        if name in ("q", "k", "v", "up"):
            return torch.empty(shape).normal_(std=self.cfg.model_dim**-0.5, generator=gen)
        if name == "embed":
            return torch.empty(shape).normal_(std=0.005, generator=gen)
        value = torch.full(shape, self.cfg.qk_gain if name == "q_gain" else 1.0)
        if name == "mix":
            value[:, 1] = 0.0
        return value

    def layer_weights(self) -> list[dict[str, Tensor]]:
        """Each layer's slices in the compute dtype. Banks are split once, by unbind."""
        names = [row.name for row in PARAMS if row.name not in ("embed", "skip")]
        banks = {name: getattr(self, name).to(self.dtype).unbind(0) for name in names}
        return [{name: bank[i] for name, bank in banks.items()} for i in range(self.cfg.num_layers)]

    def attend(self, h_BTD: Tensor, w: dict[str, Tensor], layer: int, lora: dict, tap: Tap | None) -> Tensor:
        """Causal attention of one layer; h is normalised."""
        cfg, (B, T, _) = self.cfg, h_BTD.shape
        H, G, K = cfg.num_heads, cfg.num_kv_heads, cfg.head_dim
        if tap:
            tap("attn_in", layer, h_BTD)
        qkv = linear(h_BTD, torch.cat((w["q"], w["k"], w["v"])), lora.get("qkv"))
        q, k, v = qkv.view(B, T, H + 2 * G, K).transpose(1, 2).split((H, G, G), dim=1)
        q, k = (rotate(norm(x), self.cos[:T], self.sin[:T]) for x in (q, k))
        q = q * w["q_gain"][:, None, None]
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=H != G)
        if layer >= cfg.xsa_from:
            y = without_self(y, v)
        y_BTD = y.transpose(1, 2).reshape(B, T, H * K)
        if tap:
            tap("attn_out", layer, y_BTD)
        return w["attn_scale"] * linear(y_BTD, w["o"], lora.get("o"))

    def mlp(self, h_BTD: Tensor, w: dict[str, Tensor], layer: int, lora: dict, tap: Tap | None) -> Tensor:
        """W_down leaky_relu(W_up h)^2; h is normalised. Source: Primer, arXiv 2109.08668."""
        pre = linear(h_BTD, w["up"], lora.get("up"))
        post = F.leaky_relu(pre, self.cfg.leak).square()
        if tap:
            tap("mlp_in", layer, h_BTD)
            tap("mlp_out", layer, post)
        return w["mlp_scale"] * linear(post, w["down"], lora.get("down"))

    def stream(
        self, tokens_BT: Tensor, is_looped: bool, lora: dict | None = None, tap: Tap | None = None
    ) -> Tensor:
        """Tokens to the normalised residual stream [B, T, D] that the head reads.

        `lora`: name -> (A [B, layers, r, C], B [B, layers, R, r]). The first half of the order leaves its
        outputs, the second half takes them back, last first.
        """
        cfg, weights, skips = self.cfg, self.layer_weights(), self.skip.to(self.dtype)
        order = cfg.order_at(is_looped)
        half, kept = len(order) // 2, []
        # Rows of float32, so that the gradients of a frequent token are summed in float32.
        x = x0 = norm(F.embedding(tokens_BT, self.embed).to(self.dtype))
        for place, layer in enumerate(order):
            w = weights[layer]
            own = {name: (a[:, layer], b[:, layer]) for name, (a, b) in (lora or {}).items()}
            if place >= half and kept:
                x = x + skips[place - half] * kept.pop()
            x = w["mix"][0] * x + w["mix"][1] * x0
            damp = (layer + 1) ** -0.5 if cfg.ln_scale else 1.0
            h = norm(x) * damp
            y = x + self.attend(h, w, layer, own, tap)
            if layer < cfg.parallel_from:
                h = norm(y) * damp
            x = y + self.mlp(h, w, layer, own, tap)
            if place < half:
                kept.append(x)
        x = norm(x)
        if tap:
            tap("head", 0, x)
        return x

    def nll(self, x_ND: Tensor, targets_N: Tensor) -> Tensor:
        """-log p(target), float32 [N], of rows of the stream. Differentiable."""
        logits_NV = x_ND @ self.embed.to(self.dtype).T
        if self.cfg.softcap:
            capped = self.cfg.softcap * torch.tanh(logits_NV.float() / self.cfg.softcap)
            return F.cross_entropy(capped, targets_N.long(), reduction="none")
        # Terms beyond the next token weigh nothing, so positions do not matter.
        rest = torch.zeros_like(targets_N, dtype=torch.int32), self.next_only
        return kernels.softcapped_cross_entropy(logits_NV, targets_N, *rest, is_fast=self.training)

    def forward(self, rows_BT1: Tensor, is_looped: bool) -> Tensor:
        """Sum of the token losses of sequences [B, T + 1], float32."""
        x_BTD = self.stream(rows_BT1[:, :-1], is_looped)
        return self.nll(x_BTD.flatten(0, 1), rows_BT1[:, 1:].flatten()).sum()

    def nll_at(
        self, tokens_BT: Tensor, places_BS: Tensor, targets_BS: Tensor, lora: dict | None = None
    ) -> Tensor:
        """-log p of the targets that follow `places` of the sequences, float32 [B, S]; with the loops on."""
        x_BTD = self.stream(tokens_BT, True, lora)
        x_BSD = x_BTD.gather(1, places_BS.unsqueeze(-1).expand(-1, -1, x_BTD.shape[-1]))
        return self.nll(x_BSD.flatten(0, 1), targets_BS.flatten()).view(places_BS.shape)


# 5. optimizer and average -------------------------------------------------------------------------------
# fmt: off
def muon_step(
    p_MRC: Tensor,           # float32, updated in place
    grad_MRC: Tensor,        # float32
    momentum_MRC: Tensor,    # float32 state
    lr: Tensor, decay: Tensor, mu: Tensor,  # 0-D CPU float32, so that new values do not recompile
    has_row_norm: bool,
    dtype: torch.dtype,      # of the polar step's products
) -> None:
    """One Nesterov Muon update with decoupled decay: w *= 1 - lr * decay, then a step of spectral norm lr.

    With `has_row_norm` each row of the momentum is divided by its norm before it is made orthogonal.
    Source: MuonEq-R, arXiv 2603.28254; polar step arXiv 2505.16932.
    """
    momentum_MRC.copy_(mu * momentum_MRC + grad_MRC)
    u = grad_MRC + mu * momentum_MRC
    if has_row_norm:
        u = u / u.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    o = tg.polar_express(u, dtype).float()
    scale = max(1.0, p_MRC.shape[-2] / p_MRC.shape[-1]) ** 0.5
    p_MRC.copy_((1 - lr * decay) * p_MRC - lr * scale * o)
# fmt: on


class MuonAndAdamW:
    """Muon for the banks, shared among the ranks by layer; PyTorch's AdamW for all else, alike on every rank.

    Gradients are not clipped: Muon's step does not depend on their size, and Adam's hardly does.
    """

    def __init__(self, model: Golf, ranks: tg.Ranks, compiler: Callable) -> None:
        cfg, self.ranks, self.cfg = model.cfg, ranks, model.cfg
        self.params = dict(model.named_parameters())
        self.shards = {
            row.name: tg.Shard(self.params[row.name].detach(), ranks, is_sharded=True)
            for row in PARAMS
            if row.kind == "matrix"
        }
        self.momentum = {name: torch.zeros_like(shard.own(shard.full)) for name, shard in self.shards.items()}
        self.rest = [self.params[row.name] for row in PARAMS if row.kind != "matrix"]
        rates = {"embed": (cfg.embed_lr, cfg.embed_decay), "scalar": (cfg.scalar_lr, cfg.scalar_decay)}
        groups = []
        for kind, (lr, decay) in rates.items():
            members = [self.params[row.name] for row in PARAMS if row.kind == kind]
            groups.append({"params": members, "base": lr, "weight_decay": decay})
        self.adamw = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8, fused=ranks.device.type == "cuda")
        self.dtype = torch.bfloat16 if ranks.device.type == "cuda" else torch.float32
        self._muon_step = compiler(muon_step, dynamic=False)

    @torch.no_grad()
    def step(self, sched: Sched) -> None:
        """Sum the gradients over ranks, update, share; clear the gradients."""
        cfg, reductions = self.cfg, {}
        for name, shard in self.shards.items():
            reductions[name] = shard.reduce(self.params[name].grad)
        for p in self.rest:
            self.ranks.sum(p.grad)
        for group in self.adamw.param_groups:
            group["lr"] = group["base"] * sched.lr
        self.adamw.step()
        lr, decay, mu = map(torch.tensor, (cfg.matrix_lr * sched.lr, cfg.matrix_decay, sched.momentum))
        finishers = []
        for name, (work, grad) in reductions.items():
            if work:
                work.wait()
            shard = self.shards[name]
            mine = shard.own(shard.full)
            self._muon_step(mine, grad, self.momentum[name], lr, decay, mu, cfg.row_norm, self.dtype)
            finishers.append(shard.gather(mine, shard.full))
        for finish in finishers:
            finish()
        for p in self.params.values():
            p.grad = None

    def reset(self) -> None:
        """As if no step had been made."""
        self.adamw.state.clear()
        for momentum in self.momentum.values():
            momentum.zero_()


class Average:
    """Exponential moving average of the parameters, in float32, from the weights of its first update on.

    In bf16 a change of less than 1 part in 256 would round to nothing, and the average would stand still.
    """

    def __init__(self, model: nn.Module) -> None:
        self.params = [p.detach() for p in model.parameters()]
        self.shadow: list[Tensor] = []

    @torch.no_grad()
    def update(self, weight: float) -> None:
        """Move the average by `weight` of the way to the parameters; the first call copies them."""
        if not self.shadow:
            self.shadow = [p.float().clone() for p in self.params]
        else:
            torch._foreach_lerp_(self.shadow, [p.float() for p in self.params], weight)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange parameters and average."""
        for p, mean in zip(self.params, self.shadow, strict=True):
            kept = p.clone()
            p.copy_(mean)
            mean.copy_(kept)


# 6. evaluation: windows that score every target once ------------------------------------------------------
class Plan(NamedTuple):
    """Windows of equal length; window i scores the targets low[i]..high[i]-1, its last ones.

    Target t is token t + 1 of the stream, predicted after token t.
    """

    start: np.ndarray  # int64, first token of the window
    low: np.ndarray
    high: np.ndarray


def plan_windows(first: int, after: int, length: int, stride: int) -> Plan:
    """Windows that score the targets first..after-1 in order, each once, `stride` at a time.

    Every target sees at least length - stride tokens before it, as far as the stream has them. A window that
    begins with the stream also holds tokens behind its targets; the model is causal, so they change nothing.
    """
    high = np.minimum(np.arange(first + stride, after + stride, stride), after)
    low = np.concatenate(([first], high[:-1])) if len(high) else high
    return Plan(np.maximum(high - length, 0), low, high)


@dataclass(frozen=True, slots=True)
class Evaluator:
    """Scores windows of a token stream, a batch of equal shape at a time."""

    nll_at: Callable  # Golf.nll_at, compiled where that pays
    tokens: Tensor  # int32 [N + 1] on the device
    length: int  # tokens of a window
    rows: int  # windows in a batch

    @classmethod
    def of(
        cls, nll_at: Callable, stream: np.ndarray, device: torch.device, length: int, batch_tokens: int
    ) -> "Evaluator":
        length = min(length, len(stream) - 1)
        rows = max(batch_tokens // length, 1)
        return cls(nll_at, torch.from_numpy(stream.astype(np.int32)).to(device), length, rows)

    @property
    def num_targets(self) -> int:
        return len(self.tokens) - 1

    def score(
        self,
        first: int,
        after: int,
        stride: int,
        nll: Tensor,  # float32 [N], filled at first..after-1
        ranks: tg.Ranks,  # batches of windows are dealt among them; the others' are left as they are
        progress: Callable[[int], object] = lambda count: None,
    ) -> None:
        """Score a range of targets, `stride` to a window."""
        stride = min(stride, self.length)
        plan = plan_windows(first, after, self.length, stride)
        device, span = self.tokens.device, torch.arange(stride, device=self.tokens.device)
        in_window = torch.arange(self.length, device=device)
        for begin in range(ranks.rank * self.rows, len(plan.low), ranks.world_size * self.rows):
            # The last batch is filled up with its last window: every batch has one shape, and compiles once.
            chosen = np.minimum(np.arange(begin, begin + self.rows), len(plan.low) - 1)
            start, low, high = (torch.from_numpy(part[chosen]).to(device).unsqueeze(1) for part in plan)
            targets = torch.minimum(low + span, high - 1)
            with torch.no_grad():
                rows = self.tokens[start + in_window]
                found = self.nll_at(rows, targets - start, self.tokens[targets + 1])
            nll[targets.flatten()] = found.flatten()  # what is there twice is the same window's, and equal
            progress(int(plan.high[chosen[-1]] - plan.low[begin]))

    def mean(self, ranks: tg.Ranks) -> float:
        """Mean nats per target over the whole stream, each window by itself."""
        nll = torch.zeros(self.num_targets, device=self.tokens.device)
        self.score(0, self.num_targets, self.length, nll, ranks)
        return float(ranks.sum(nll.sum(dtype=torch.float64)) / self.num_targets)


# 7. compression -----------------------------------------------------------------------------------------
class Moments:
    """Second moments X^T X of every matrix's input, summed over calibration tokens: GPTQ's Hessians."""

    def __init__(self) -> None:
        self.sums: dict[str, dict[int, Tensor]] = {}

    def __call__(self, name: str, layer: int, x: Tensor) -> None:
        rows = x.detach().flatten(0, -2).float()
        layers = self.sums.setdefault(name, {})
        layers[layer] = rows.T @ rows if layer not in layers else layers[layer].addmm_(rows.T, rows)

    def banks(self, ranks: tg.Ranks) -> dict[str, Tensor]:
        """float32 [layers, C, C] of each activation, of all ranks together."""
        banks = {name: [layers[i] for i in sorted(layers)] for name, layers in self.sums.items()}
        return {name: ranks.sum(torch.stack(bank)) for name, bank in banks.items()}


def row_scale(w_MRC: Tensor, bits: int, clip: str, k: float) -> Tensor:
    """float32 [M, R, 1] of float16 values: the step of each row's codes.

    `sigma`: codes span k standard deviations of the row, so k sets the entropy, about bits - log2 k + 1.05
    (SDClip, contest pull request 1394). `max`: they span k times the largest magnitude. Rounded to what is
    stored before anything is divided by it.
    """
    span = k * (w_MRC.std(dim=-1, correction=0) if clip == "sigma" else w_MRC.abs().amax(dim=-1))
    smallest = torch.finfo(torch.float16).tiny
    return (span / (2 ** (bits - 1) - 1)).clamp(smallest, 60000.0).half().float().unsqueeze(-1)


def round_to_nearest(w_MRC: Tensor, scale_MR1: Tensor, bits: int) -> Tensor:
    """Codes as float32, each weight by itself."""
    most = 2 ** (bits - 1) - 1
    return (w_MRC / scale_MR1).round().clamp(-most, most)


def inverse_factor(hessian_MCC: Tensor, damp: float) -> Tensor:
    """U with H^-1 = U^T U, upper, of the damped Hessians; more damping where one is not positive."""
    diagonal = hessian_MCC.diagonal(dim1=-2, dim2=-1)
    mean, eye = diagonal.mean(-1)[:, None, None], torch.eye(diagonal.shape[-1], device=diagonal.device)
    while True:
        lower, failed = torch.linalg.cholesky_ex(hessian_MCC + max(damp, 1e-6) * mean * eye)
        if not failed.any():
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed.any():
                return upper
        damp = 10 * max(damp, 1e-6)
        assert damp < 1e6, "a Hessian holds values that are no numbers"


def gptq(
    w_MRC: Tensor, scale_MR1: Tensor, bits: int, hessian_MCC: Tensor, damp: float, block: int = 128
) -> Tensor:
    """Codes as float32 that nearly minimise tr(E H E^T), E the error of the matrix. Source: arXiv 2210.17323.

    Columns are rounded one after another, those of the largest diagonal first; what a column's error does to
    the output is taken back by the columns that follow, as far as they can.
    """
    most, (M, R, C) = 2 ** (bits - 1) - 1, w_MRC.shape
    diagonal = hessian_MCC.diagonal(dim1=-2, dim2=-1)
    is_dead = diagonal <= 0
    hessian = hessian_MCC + torch.diag_embed(is_dead.to(hessian_MCC.dtype))
    order = diagonal.argsort(dim=-1, descending=True, stable=True)
    w = w_MRC.masked_fill(is_dead.unsqueeze(1), 0.0).gather(2, order[:, None].expand(M, R, C))
    hessian = hessian.gather(1, order[:, :, None].expand(M, C, C)).gather(2, order[:, None].expand(M, C, C))
    upper = inverse_factor(hessian, damp)
    codes = torch.empty_like(w)
    for begin in range(0, C, block):
        end = min(begin + block, C)
        part, errors = w[:, :, begin:end].clone(), torch.empty_like(w[:, :, begin:end])
        for j in range(begin, end):
            column = part[:, :, j - begin, None]
            code = (column / scale_MR1).round().clamp(-most, most)
            error = (column - code * scale_MR1) / upper[:, j, None, None, j]
            part[:, :, j - begin :] -= error * upper[:, j, None, j:end]
            codes[:, :, j], errors[:, :, j - begin] = code[..., 0], error[..., 0]
        w[:, :, end:] -= errors @ upper[:, begin:end, end:]
    return torch.empty_like(codes).scatter_(2, order[:, None].expand(M, R, C), codes)


def quantize(
    weights: dict[str, Tensor], moments: dict[str, Tensor], cfg: Config, stretch: float, quantizer: str
) -> dict[str, Quantized]:
    """Every parameter as the artifact holds it; `stretch` multiplies every k: coarser codes, fewer bytes."""
    tensors = {}
    for row in PARAMS:
        w = weights[row.name]
        if row.kind == "scalar":
            tensors[row.name] = Quantized(w.half().cpu().numpy())
            continue
        is_matrix = row.kind == "matrix"
        bits, k = (cfg.matrix_bits, cfg.matrix_k) if is_matrix else (cfg.embed_bits, cfg.embed_k)
        bank = w if is_matrix else w.unsqueeze(0)
        scale = row_scale(bank, bits, cfg.clip, stretch * (k if cfg.clip == "sigma" else 1.0))
        if quantizer == "gptq":
            codes = gptq(bank, scale, bits, moments[row.reads], cfg.damp)
        else:
            codes = round_to_nearest(bank, scale, bits)
        values = codes.to(torch.int8).flatten(0, 1).cpu().numpy()
        tensors[row.name] = Quantized(values, bits, scale.half().flatten().cpu().numpy())
    return tensors


def restore(tensors: dict[str, Quantized], cfg: Config, vocab_size: int) -> dict[str, Tensor]:
    """The parameters that an artifact's tensors stand for, float32. InputError where they are others."""
    shapes = Golf.shapes(cfg, vocab_size)
    different = sorted(set(shapes) ^ set(tensors))
    if different:
        raise InputError(f"the artifact's tensors are not the model's: {different[:3]}; train it again")
    state = {}
    for name, shape in shapes.items():
        found = tensors[name].values.shape
        if math.prod(found) != math.prod(shape) or found[-1] != shape[-1]:
            raise InputError(f"the artifact's {name} has shape {found}, the model's {shape}; train it again")
        state[name] = torch.from_numpy(tensors[name].dequantized()).reshape(shape)
    return state


def fit(size_of: Callable[[float], float], cap: float, low: float, high: float, rounds: int = 12) -> float:
    """The smallest stretch in [low, high] whose size is at most cap; `high` where none is.

    To a part in 2**rounds of its logarithm. `size_of` must not rise with the stretch.
    """
    if size_of(low) <= cap:
        return low
    for _ in range(rounds if size_of(high) <= cap else 0):
        middle = math.sqrt(low * high)
        low, high = (low, middle) if size_of(middle) <= cap else (middle, high)
    return high


def stretch_limits(cfg: Config) -> tuple[float, float]:
    """Beyond them codes saturate, or hardly any is not zero."""
    return (0.4, 6.0) if cfg.clip == "sigma" else (1.0, 16.0)


class Packed(NamedTuple):
    data: bytes
    tensors: dict[str, Quantized]
    stretch: float


def compress(
    weights: dict[str, Tensor], moments: dict[str, Tensor], cfg: Config, meta: dict, room: int
) -> Packed:
    """The finest artifact of at most `room` bytes.

    The stretch is bisected with codes rounded to nearest, which take seconds less and have nearly the entropy
    of GPTQ's; the real size of the real codes decides, and tightens the bisection while it is over the cap.
    """

    def estimate(stretch: float) -> float:
        quick = quantize(weights, moments, cfg, stretch, "rtn")
        return sum(map(artifact.coded_bits, quick.values())) / 8

    low, high = stretch_limits(cfg)
    target = float(room)
    while True:
        stretch = fit(estimate, target, low, high)
        tensors = quantize(weights, moments, cfg, stretch, cfg.quantizer)
        data = artifact.pack({**meta, "stretch": stretch}, tensors)
        if len(data) <= room or stretch == high:  # over the cap: kept, and said at the end
            return Packed(data, tensors, stretch)
        # Aim as far below the room as this missed it, and a little more.
        target = min(target, estimate(stretch)) - 1.05 * (len(data) - room) - 64


def expected_bytes(cfg: Config, vocab_size: int, stretch: float) -> float:
    """Bytes of normally distributed weights at a stretch: bits - log2 k + 1.05 bits each, as in row_scale."""
    total = 0.0
    for row in PARAMS:
        count = math.prod(Golf.shapes(cfg, vocab_size)[row.name])
        bits, k = (cfg.matrix_bits, cfg.matrix_k) if row.kind == "matrix" else (cfg.embed_bits, cfg.embed_k)
        coded = min(max(bits - math.log2(k * stretch) + 1.05, 0.05), bits)
        total += count * (16 if row.kind == "scalar" else coded if cfg.clip == "sigma" else 1.0) / 8
    return total


# Everything that a score needs besides model, tokenizer and shards, relative to the project.
CODE = (
    "golf/__init__.py", "golf/train_golf.py", "golf/score.py", "golf/artifact.py", "golf/tokens.py",
    "train_gpt.py", "triton_kernels.py", "data/vocab.py", "data/shards.py", "data/wheels.py",
)  # fmt: skip
SOURCES = [ROOT / name for name in CODE]  # what a log begins with
START = "golf/__main__.py"  # unpacks code.zip and runs it: the archive is a program


def pack_code() -> bytes:
    """A zip of CODE, the same bytes for the same sources; unpacked, it scores an artifact."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for name in (*CODE, START):
            entry = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
            entry.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(entry, (ROOT / name).read_bytes())
        archive.writestr(zipfile.ZipInfo("__main__.py"), "from golf.__main__ import main\n\nmain()\n")
    return buffer.getvalue()


# 8. run: build, warm up, train, finish ----------------------------------------------------------------------
NOT_INHERITED = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "PYTHONPATH"}
SAME_SCORE = {"cpu": 1e-6, "cuda": 1e-4}  # bits per byte between this process and the one that scores


class Ledger:
    """Where the seconds of a run went, by name."""

    def __init__(self, clock: tg.Clock) -> None:
        self.clock, self.seconds = clock, {}

    @contextlib.contextmanager
    def spent(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self.clock.synchronize()
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began


@dataclass(kw_only=True, slots=True)
class Job:
    """Everything a run needs, made by `build`."""

    name: str  # recipe and mode
    cfg: Config
    ranks: tg.Ranks
    corpus: tg.Corpus
    tokenizer: tokens.Tokenizer
    tokenizer_path: Path
    data: Sequences
    model: Golf
    forward: Callable  # the model, compiled where that pays
    optimizer: MuonAndAdamW
    average: Average
    val: Evaluator
    val_bytes: int
    clock: tg.Clock
    ledger: Ledger
    group: dist.ProcessGroup | None = None  # of the host's processors, where the default one is the GPUs'
    log: tg.Log | None = None

    def agree(self, step: int, wants_stop: bool) -> tuple[float, bool]:
        """(fraction of the training time as rank 0's clock has it, whether any rank wants to stop)."""
        cfg = self.cfg
        fraction = step / cfg.steps if cfg.steps else self.clock.ms() / 1000 / cfg.train_seconds
        mine = fraction if self.ranks.rank == 0 else 0.0
        values = torch.tensor([mine, float(wants_stop)], dtype=torch.float64)
        if self.ranks.world_size > 1:
            dist.all_reduce(values, group=self.group)
        return float(values[0]), bool(values[1])

    def validate(self, what: str, step: int) -> tuple[float, float]:
        """(nats per token, bits per byte) over the whole validation split, windows that do not overlap."""
        with self.ledger.spent("validation"):
            self.log.progress(f"validating {what}")
            self.model.eval()
            loss = self.val.mean(self.ranks)
            self.model.train()
        if not math.isfinite(loss):
            raise Ended(f"diverged at step {step}: validation loss is {loss}", 3)
        return loss, self.bpb(loss)

    def bpb(self, loss: float) -> float:
        return loss * self.val.num_targets / math.log(2) / self.val_bytes

    def step_line(self, step: int, what: str, more: str = "") -> None:
        self.log.step(f"{step}/{self.cfg.steps or MAX_STEPS} {what}", self.clock.ms(), step, more)


class Losses:
    """Training losses of all ranks, read LAG steps late so that no step waits for the host."""

    def __init__(self, job: Job) -> None:
        self.job, self.waiting = job, deque()
        self.lag = LAG if job.ranks.device.type == "cuda" else 0

    def put(self, step: int, loss: Tensor, fraction: float) -> None:
        values, event = self.job.ranks.sum(loss), None
        if values.device.type == "cuda":  # into pinned memory: a copy into other memory waits for the device
            values = torch.empty((), pin_memory=True).copy_(values, non_blocking=True)
            event = torch.cuda.current_stream().record_event()
        self.waiting.append((step, values, event, fraction))

    def drain(self, everything: bool = False) -> None:
        """Log the steps whose losses have arrived. Raises Ended where one is no number."""
        while len(self.waiting) > (0 if everything else self.lag):
            step, values, event, fraction = self.waiting.popleft()
            if event:
                event.synchronize()
            loss = float(values)
            if not math.isfinite(loss):
                raise Ended(f"diverged at step {step}: training loss is {loss}", 3)
            self.job.step_line(step, f"train_loss:{loss:.4f}")
            seconds = self.job.clock.ms() / 1000
            eta = seconds * (1 / fraction - 1) if fraction else math.nan
            rate = step * self.job.cfg.batch_tokens / max(seconds, 1e-3)
            self.job.log.progress(
                f"step {step} | {100 * fraction:.1f} % of the time | loss {loss:.4f} | "
                f"{1000 * seconds / step:.1f} ms/step | {rate:,.0f} tokens/s | ETA {eta:.0f} s"
            )


def compiler_for(device: torch.device) -> Callable:
    """torch.compile on a GPU; on a CPU it takes longer than it saves."""
    return functools.partial(torch.compile, fullgraph=True) if device.type == "cuda" else lambda fn, **_: fn


def open_tokenizer(folder: Path, corpus: tg.Corpus) -> tuple[tokens.Tokenizer, Path]:
    """The folder's tokenizer, and the path by which score.py finds it. InputError where it is another's."""
    rows = json.loads((folder / "manifest.json").read_text())["tokenizer"].get("files", [])
    main = [row["file"] for row in rows if row["file"].endswith((".model", "encoder.json"))]
    if not main and corpus.tokenizer != tokens.BYTES:
        raise InputError(f"{folder}: holds no file of its tokenizer; prepare it again with data/prepare.py")
    path = (folder / main[0]).resolve() if main else Path(tokens.BYTES)
    tokenizer = tokens.load_tokenizer(folder)  # its file must have the hash that the manifest names
    if (tokenizer.vocab_size, tokenizer.bos) != (corpus.vocab_size, corpus.bos_id):
        found = f"vocabulary {tokenizer.vocab_size}, BOS {tokenizer.bos}"
        fault = f"{path}: {found}, the shards of {folder} have {corpus.vocab_size} and {corpus.bos_id}"
        raise InputError(f"{fault}; prepare them again with data/prepare.py")
    return tokenizer, path


def check_size(cfg: Config, vocab_size: int) -> None:
    """InputError where the model cannot fit the cap however coarse it is, before any time is spent on it."""
    least = expected_bytes(cfg, vocab_size, stretch_limits(cfg)[1]) + len(pack_code())
    if least > cfg.cap_bytes:
        need = f"model and code need about {least:,.0f} bytes at the coarsest, cap_bytes is {cfg.cap_bytes:,}"
        raise InputError(f"{need}; use fewer layers, fewer bits or a smaller vocabulary")


def build(args: argparse.Namespace, cfg: Config, ranks: tg.Ranks) -> Job:
    """Data, model and optimizer on this rank's device; all input is checked. Raises InputError."""
    corpus = tg.Corpus.open(args.data)
    tokenizer, tokenizer_path = open_tokenizer(args.data, corpus)
    check_size(cfg, corpus.vocab_size)
    micro_size(cfg, ranks)
    data = Sequences.open(corpus, cfg, args.seed)
    stream = read_split(corpus.val, corpus.vocab_size)
    check_disjoint(corpus)
    dtype = torch.bfloat16 if ranks.device.type == "cuda" else torch.float32
    model = Golf(cfg, corpus.vocab_size, args.seed, dtype).to(ranks.device)
    compiler, clock = compiler_for(ranks.device), tg.Clock(ranks.device)
    nll_at = compiler(model.nll_at, dynamic=False)
    return Job(
        name=f"{args.recipe}-{args.mode}", cfg=cfg, ranks=ranks, corpus=corpus, tokenizer=tokenizer,
        tokenizer_path=tokenizer_path, data=data, model=model, forward=compiler(model, dynamic=False),
        optimizer=MuonAndAdamW(model, ranks, compiler), average=Average(model),
        val=Evaluator.of(nll_at, stream, ranks.device, cfg.seq_len, cfg.micro_tokens),
        val_bytes=int(tokenizer.bytes_of_targets(stream[:-1], stream[1:]).sum()), clock=clock,
        ledger=Ledger(clock),
    )  # fmt: skip


def train_step(job: Job, micros: Sequence[Tensor], sched: Sched) -> Tensor:
    """Forward, backward and update of one step; this rank's share of the mean loss, detached."""
    losses = []
    for rows in micros:
        loss = job.forward(rows, sched.is_looped) / job.cfg.batch_tokens
        loss.backward()
        losses.append(loss.detach())
    job.optimizer.step(sched)
    return torch.stack(losses).sum()


def warm_up(job: Job) -> float:
    """Compile every graph on random tokens, which cannot teach; put all back. Seconds of the slower step."""
    cfg, device = job.cfg, job.ranks.device
    saved = {name: p.detach().to("cpu", copy=True) for name, p in job.model.named_parameters()}
    micro, per_rank = micro_size(cfg, job.ranks), cfg.batch_tokens // cfg.seq_len // job.ranks.world_size
    rows = torch.randint(0, job.corpus.vocab_size, (micro, cfg.seq_len + 1), dtype=torch.int32, device=device)
    seconds = 0.0
    for is_looped in (False, True) if cfg.has_loop else (False,):
        sched = at(cfg, 0.0)._replace(is_looped=is_looped)
        job.log.progress(f"warm-up: training graph {'with' if is_looped else 'without'} loops")
        train_step(job, [rows], sched)
        job.clock.synchronize()
        began = time.perf_counter()
        train_step(job, [rows] * (per_rank // micro), sched)
        job.clock.synchronize()
        seconds = max(seconds, time.perf_counter() - began)
    job.log.progress("warm-up: evaluation graph")
    job.model.eval()
    noise = rows[:1, :-1].expand(job.val.rows, -1)[:, : job.val.length].contiguous()
    places = torch.arange(job.val.length, device=device).expand(job.val.rows, -1).contiguous()
    with torch.no_grad():
        job.val.nll_at(noise, places, noise)
        for name, p in job.model.named_parameters():
            p.copy_(saved[name])
    job.model.train()
    job.optimizer.reset()
    return float(job.ranks.sum(torch.tensor(seconds, device=device))) / job.ranks.world_size


def train(job: Job, stop: tg.StopRequest) -> tuple[int, list[str]]:
    """The timed loop: (steps that the budget held, scheduled events that they did not reach)."""
    cfg, losses, guard = job.cfg, Losses(job), Guard(job.cfg)
    points = deque(i / cfg.val_points for i in range(1, cfg.val_points))
    stream = batches(job.data, cfg, job.ranks, job.corpus)
    stop.in_loop = True
    job.clock.start()
    before = 0.0
    for step in range(MAX_STEPS + 1):
        fraction, wants_stop = job.agree(step, stop.is_set)
        if wants_stop:
            losses.drain(everything=True)
            raise Ended(f"interrupted at step {step}: asked to by a signal", 130)
        if fraction >= 1:
            break
        if points and fraction >= points[0]:
            points.popleft()
            with job.clock.paused():
                losses.drain(everything=True)
                loss, bpb = job.validate("the last weights", step)
                job.step_line(step, f"val_loss:{loss:.4f}", f" val_bpb:{bpb:.4f}")
        sched = at(cfg, fraction)
        loss = train_step(job, next(stream), sched)
        if sched.has_ema:
            job.average.update(ema_weight(cfg, fraction - before))
        guard.note(cfg, step + 1, sched, has_averaged=bool(job.average.shadow))
        losses.put(step + 1, loss, fraction)
        losses.drain()
        before = fraction
    losses.drain(everything=True)
    stream.close()
    stop.in_loop = False
    job.log.say("schedule: " + ", ".join(f"{name} from step {first}" for name, first in guard.fired.items()))
    return step, guard.missing()


def choose_weights(job: Job) -> dict[str, float]:
    """Keep the average where it is not worse than the last weights on the hold-out; the losses of both."""
    cfg, losses, windows = job.cfg, {}, job.data.holdout()
    mine = job.data.read(windows[job.ranks.rank :: job.ranks.world_size])
    rows = torch.from_numpy(mine).to(job.ranks.device)

    def mean() -> float:
        size = job.val.rows
        total = torch.zeros((), dtype=torch.float64, device=rows.device)
        places = torch.arange(cfg.seq_len, device=rows.device).expand(size, -1).contiguous()
        for begin in range(0, len(rows), size):
            part = rows[begin : begin + size]
            full = torch.cat((part, part[:1].expand(size - len(part), -1)))  # one shape, so one graph
            found = job.val.nll_at(full[:, :-1].contiguous(), places, full[:, 1:].contiguous())
            total += found[: len(part)].sum(dtype=torch.float64)
        return float(job.ranks.sum(total)) / (len(windows) * cfg.seq_len)

    job.model.eval()
    with torch.no_grad():
        losses["last"] = mean()
        if job.average.shadow:
            job.average.swap()
            losses["average"] = mean()
            if losses["average"] > losses["last"]:
                job.average.swap()
    job.model.train()
    return losses


def calibrate(job: Job) -> dict[str, Tensor]:
    """The Hessians, from training text, as much of it as the budget still allows; at least one batch."""
    cfg, moments = job.cfg, Moments()
    count = max(cfg.calibration_tokens // cfg.seq_len // job.ranks.world_size, 1)
    windows = job.data.batch(0, count * job.ranks.world_size)[job.ranks.rank :: job.ranks.world_size]
    size = max(cfg.micro_tokens // cfg.seq_len // 2, 1)
    used = 0
    job.model.eval()
    with torch.no_grad():
        for begin in range(0, count, size):
            _, is_late = job.agree(0, not cfg.steps and job.clock.ms() / 1000 > cfg.budget_seconds)
            if is_late and begin:
                break
            job.log.progress(f"calibration: sequence {begin}/{count}")
            rows = torch.from_numpy(job.data.read(windows[begin : begin + size])).to(job.ranks.device)
            job.model.stream(rows[:, :-1], True, tap=moments)
            used += len(rows)
    job.model.train()
    job.clock.synchronize()
    job.log.say(f"calibration: {used * cfg.seq_len * job.ranks.world_size:,} tokens of training text")
    return moments.banks(job.ranks)


def finish(job: Job, steps: int, out: Path) -> dict[str, object]:
    """Choose, calibrate, quantise, fit, pack, validate, score; the result. Rank 0 writes the files."""
    cfg, ledger, result = job.cfg, job.ledger, {"recipe": job.name, "steps": steps}
    with ledger.spent("hold-out"):
        held = choose_weights(job)
    with ledger.spent("calibration"):
        moments = calibrate(job)
    with job.clock.paused():  # the published time ends here, and so does the use of training data
        access_end = job.clock.ms() / 1000
        job.log.say("hold-out loss: " + ", ".join(f"{name} {loss:.4f}" for name, loss in held.items()))
        loss, bpb = job.validate("the exported weights", steps)
        job.step_line(steps, f"val_loss:{loss:.4f}", f" val_bpb:{bpb:.4f}")
        if not cfg.steps:
            job.log.say(f"stopping_early: budget of {cfg.budget_seconds:g} s step:{steps}/{MAX_STEPS}")
        result |= {"val_loss": loss, "val_bpb": bpb, "hold_out": held, "train_time_ms": job.clock.ms()}
        result |= {"train_data_access_end_s": access_end, "tokens_seen": steps * cfg.batch_tokens}
        result |= export(job, moments, out)
        loss, quantized = job.validate("the artifact", steps)
    gap = quantized - bpb
    job.log.say(f"final_quantized val_loss:{loss:.8f} val_bpb:{quantized:.8f} gap_bpb:{gap:.8f}")
    result |= {"quantized_val_loss": loss, "quantized_val_bpb": quantized, "gap_bpb": gap}
    result["peak_memory_mib"], reserved = tg.peak_memory(job.ranks.device)
    job.log.say(f"peak memory allocated: {result['peak_memory_mib']} MiB reserved: {reserved} MiB")
    return result


def export(job: Job, moments: dict[str, Tensor], out: Path) -> dict[str, object]:
    """Pack the model's weights into the room that the code leaves, and put what was packed into the model."""
    cfg, code = job.cfg, pack_code()
    weights = {name: p.detach() for name, p in job.model.named_parameters()}
    figures: dict[str, object] = {"code_bytes": len(code), "cap_bytes": cfg.cap_bytes}
    if job.ranks.rank == 0:
        # No times, names or dates: equal weights of equal configs give equal bytes.
        meta = {"config": dataclasses.asdict(cfg), "vocab_size": job.corpus.vocab_size}
        meta |= {"tokenizer": job.tokenizer.sha256}
        with job.ledger.spent("quantise, fit, pack"):
            job.log.progress("quantising")
            packed = compress(weights, moments, cfg, meta, cfg.cap_bytes - len(code))
            for name, data in (("model.golf", packed.data), ("code.zip", code)):
                tg.atomically(out / name, lambda path, data=data: path.write_bytes(data))
        for name, value in restore(artifact.unpack(packed.data)[1], cfg, job.corpus.vocab_size).items():
            weights[name].copy_(value)
        coded = {name: artifact.coded_bits(q) / q.values.size for name, q in packed.tensors.items() if q.bits}
        total = len(packed.data) + len(code)
        figures |= {"artifact_bytes": len(packed.data), "total_bytes": total, "stretch": packed.stretch}
        figures |= {"artifact_sha256": hashlib.sha256(packed.data).hexdigest(), "bits_per_weight": coded}
        rates = ", ".join(f"{name} {bits:.3f}" for name, bits in coded.items())
        job.log.say(f"size: {len(packed.data):,} bytes of model + {len(code):,} of packed code = {total:,}")
        job.log.say(f"size: cap {cfg.cap_bytes:,}; stretch {packed.stretch:.4f}; bits a weight: {rates}")
    if job.ranks.world_size > 1:
        for value in weights.values():
            dist.broadcast(value, 0)
    return figures


def take_score(job: Job, mode: str, out: Path) -> dict[str, object]:
    """What score.py says of the artifact; it sees that, the tokenizer and the validation shards alone."""
    with tempfile.TemporaryDirectory() as folder:
        code, where, answer = Path(folder, "code"), Path(folder, "empty"), Path(folder, "score.json")
        with zipfile.ZipFile(out / "code.zip") as archive:
            archive.extractall(code)
        where.mkdir()
        command = [sys.executable, str(code / "golf" / "score.py"), str((out / "model.golf").resolve())]
        command += ["--tokenizer", str(job.tokenizer_path), "--mode", mode, "--json", str(answer)]
        command += ["--val", *(str(path.resolve()) for path in job.corpus.val)]
        inherited = {name: value for name, value in os.environ.items() if name not in NOT_INHERITED}
        inherited["OMP_NUM_THREADS"] = str(torch.get_num_threads())
        done = subprocess.run(command, cwd=where, env=inherited, stdout=subprocess.PIPE, text=True)
        if not answer.is_file():
            raise Ended(f"crashed: score.py --mode {mode} ended with code {done.returncode}", 4)
        return json.loads(answer.read_text())


def score_all(job: Job, result: dict[str, object], out: Path) -> None:
    """Every score of the config, into the log and the result."""
    result["scores"] = {}
    for mode in job.cfg.score:
        job.log.progress(f"scoring: {mode}")
        with job.ledger.spent(f"score {mode}"):
            found = result["scores"][mode] = take_score(job, mode, out)
        figures = " ".join(f"{key}:{found[key]:.8f}" for key in ("val_loss", "val_bpb"))
        job.log.say(f"final_{mode} {figures} tokens:{found['tokens']} seconds:{found['seconds']:.1f}")


def verdicts(job: Job, result: dict[str, object]) -> list[str]:
    """What a run promised and did not keep; empty if all was kept."""
    cfg, faults = job.cfg, []
    if result["not_reached"]:
        faults.append(f"scheduled and never reached: {', '.join(result['not_reached'])}; use a larger budget")
    if not cfg.steps and result["train_data_access_end_s"] > cfg.budget_seconds:
        end = result["train_data_access_end_s"]
        faults.append(f"training data was read until {end:.1f} s of {cfg.budget_seconds:g} s; raise reserve")
    if result["total_bytes"] > cfg.cap_bytes:
        faults.append(f"{result['total_bytes']:,} bytes are over the cap of {cfg.cap_bytes:,}")
    if "none" in result["scores"]:
        gap = abs(result["scores"]["none"]["val_bpb"] - result["quantized_val_bpb"])
        if gap > SAME_SCORE[job.ranks.device.type]:
            faults.append(f"score.py and this process differ by {gap:.2e} bits per byte on the same artifact")
    late = [mode for mode, row in result["scores"].items() if not row["within_budget"]]
    return faults + [f"score {mode} took longer than its budget" for mode in late]


def describe(args: argparse.Namespace, job: Job) -> dict[str, object]:
    """The conditions of a run, as the log's header states them."""
    status, git = tg.output_of("git", "-C", str(ROOT), "status", "--porcelain"), ("git", "-C", str(ROOT))
    return {
        "run_id": uuid.uuid4(), "host": socket.gethostname(), **tg.machine_lines(job.ranks.device),
        "commit": tg.output_of(*git, "rev-parse", "HEAD") or "unknown",
        "dirty": "unknown" if status is None else str(bool(status)).lower(),
        "data": f"sha256={job.corpus.sha256}", "tokenizer": f"sha256={job.tokenizer.sha256}",
        "recipe": job.name, "seed": args.seed, "world_size": job.ranks.world_size,
        "dtype": str(job.model.dtype).removeprefix("torch."),
        "parameters": sum(p.numel() for p in job.model.parameters()),
        "config": json.dumps(dataclasses.asdict(job.cfg)),
        "command": " ".join(sys.argv), "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }  # fmt: skip


def complete(job: Job, stop: tg.StopRequest, out: Path) -> tuple[dict[str, object], list[str]]:
    """From warm-up to the scores: (result, promises not kept)."""
    cfg, ranks = job.cfg, job.ranks
    with ranks.process_group():
        if ranks.world_size > 1 and ranks.device.type == "cuda":
            job.group = dist.new_group(backend="gloo")
        with job.ledger.spent("compile and warm-up"):
            seconds = warm_up(job)
        if not cfg.steps and seconds > cfg.train_seconds:
            need = f"one step takes {seconds:.1f} s, the budget leaves {cfg.train_seconds:.1f} s for training"
            raise InputError(f"{need}; use a larger --set budget_seconds= or a smaller batch_tokens")
        with job.ledger.spent("training"):
            steps, missing = train(job, stop)
        result = finish(job, steps, out) | {"not_reached": missing}
        if ranks.world_size > 1:
            dist.barrier()
    if ranks.rank == 0:
        if ranks.device.type == "cuda":
            torch.cuda.empty_cache()
        score_all(job, result, out)
    return result, verdicts(job, result) if ranks.rank == 0 else []


def run(args: argparse.Namespace, cfg: Config, ranks: tg.Ranks, stop: tg.StopRequest) -> int:
    """One run, arguments to closing line; the exit code. All input is checked before the log is opened."""
    began = time.perf_counter()
    job = build(args, cfg, ranks)
    job.ledger.seconds["load"] = time.perf_counter() - began
    if ranks.rank == 0 and (args.out / "model.golf").exists():
        raise InputError(f"{args.out}: holds a model.golf already; name another folder with --out")
    log = job.log = tg.Log(args.log, is_master=ranks.rank == 0)
    args.out.mkdir(parents=True, exist_ok=True)
    try:
        log.header(SOURCES, describe(args, job))
        result, faults = complete(job, stop, args.out)
        result["ledger_s"] = {name: round(seconds, 3) for name, seconds in job.ledger.seconds.items()}
        result |= {"promises_not_kept": faults}
        spent = (f"{name} {seconds:.1f} s" for name, seconds in job.ledger.seconds.items())
        log.say(f"ledger: {', '.join(spent)}")
        if ranks.rank == 0:
            text = json.dumps(result, indent=1) + "\n"
            tg.atomically(args.out / "result.json", lambda path: path.write_text(text))
        log.close("crashed: promise not kept: " + "; ".join(faults) if faults else "done", result)
        return 4 if faults else 0
    except Ended as end:
        log.close(end.args[0], {})
        return end.args[1]
    except BaseException as error:
        log.close(f"crashed: {type(error).__name__}: {error}".split("\n")[0], {})
        raise


# 9. main ------------------------------------------------------------------------------------------------
def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="train_golf.py",
        description=__doc__.split("\n\n")[0],
        epilog="Fields of --set, with their defaults: class Config in this file. Exit codes: 0 done, 2 bad "
        "input, 3 diverged, 4 a promise not kept (size, time, schedule, equal scores), 130 stopped by a "
        "signal. Also runs under torchrun.",
    )
    add = parser.add_argument
    on_gpu = torch.cuda.is_available()
    add("--mode", help=f"one of {', '.join(MODES)}; default one with a GPU, else smoke")
    add("--recipe", default="golf", help=f"one of {', '.join(RECIPES)}, or RECIPE-MODE as logs have it")
    add("--data", type=Path, help="prepared folder; for smoke, data/default where none is given")
    add("--out", type=Path, help="folder to write; X.txt: that log, and folder X; default in logs/golf")
    add("--sources", action="store_true", help="print the files that a run logs, and end")
    add("--seed", type=int, default=1, help="of the initial parameters and the order of the data; default 1")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="change one field of the config")
    parser.error = tg.refuse
    args = parser.parse_args(argv)
    args.recipe, _, mode = args.recipe.partition("-")
    if mode and args.mode not in (None, mode):
        raise InputError(f"--mode {args.mode}, but --recipe names mode {mode}; give one of them")
    args.mode = args.mode or mode or ("one" if on_gpu else "smoke")
    for name, value, table in (("--mode", args.mode, MODES), ("--recipe", args.recipe, RECIPES)):
        if value not in table:
            raise InputError(f"{name} {value!r} does not exist; choose one of {', '.join(table)}")
    if not 0 <= args.seed < 2**63:
        raise InputError(f"--seed {args.seed}: must be from 0 to below 2**63; use such a number")
    if args.data is None and args.mode != "smoke":
        raise InputError(f"--mode {args.mode} needs --data; make the folder with data/prepare.py and name it")
    args.data = args.data or ROOT / "data" / "default"
    args.out = args.out or Path("logs") / "golf" / f"{args.recipe}-{args.mode}-{uuid.uuid4()}"
    args.log = args.out / LOG
    if args.out.suffix == ".txt":  # as run.sh names a log
        args.log, args.out = args.out, args.out.with_suffix("")
    return args


def main() -> int:
    try:
        args = parse()
        if args.sources:
            print(*SOURCES, sep="\n")
            return 0
        cfg = configure(args.mode, args.recipe, args.set)
        if args.mode == "smoke":
            torch.set_num_threads(1)  # threads would wait for each other longer than such products take
        return run(args, cfg, tg.Ranks.from_torchrun(), tg.StopRequest())
    except (InputError, tokens.UserError, artifact.ArtifactError, OSError, Ended) as error:
        message, code = error.args if isinstance(error, Ended) else (f"error: {error}", 2)
        if os.environ.get("RANK", "0") == "0":
            print(f"train_golf.py: {message}", file=sys.stderr)
        return code


if __name__ == "__main__":
    sys.exit(main())
