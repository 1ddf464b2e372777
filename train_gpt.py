"""Train a small GPT to a fixed validation loss, as fast as is honest, on a laptop CPU or on many GPUs.

    python train_gpt.py                                    one process: CPU or one GPU
    torchrun --standalone --nproc_per_node=8 train_gpt.py  eight GPUs of one host

The recipe (model, stages, batch, learning rates) is a row of the tables in section 1; the command line says
only where data and logs are. Every run log begins with the source of this file and of triton_kernels.py.

The maths is record 61 of the community speedrun (modded-nanogpt pull request 200) with the key offset of
record 62 (pull request 201). Measured figures are in LOG.md. Contents: grep '^# [0-9]' train_gpt.py
Suffixes: B slots of a micro-batch, T tokens of a slot, N rows (B*T), D model dim, H heads, K head dim,
F hidden dim, V padded vocabulary, L layers, M matrices of a bank, R rows and C columns of a matrix.
"""

import argparse
import contextlib
import functools
import hashlib
import importlib
import itertools
import json
import math
import os
import platform
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

# Read when torch is imported. Fragmentation costs gigabytes here, FP8 products not cached 16 s of a start.
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
os.environ.setdefault("TORCHINDUCTOR_AUTOGRAD_CACHE_ALLOW_CUSTOM_AUTOGRAD", "1")

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.nn.functional  # imported later, its defaults would keep the process group
import torch.nn.functional as F
from torch import Tensor, nn

import triton_kernels as kernels

# As Inductor has it once it compiles. Unset, the first start from its cache compiles our kernels again: 9 s.
if os.access(PTXAS := Path(torch.__file__).with_name("bin") / "ptxas", os.X_OK):
    os.environ.setdefault("TRITON_PTXAS_PATH", str(PTXAS))

# 1. config: every number of the recipes -----------------------------------------------------------------
GATE_DIM = 12  # gates read this many channels of their input; `attend` copies them: for a view all is written
BANK_MULTIPLE = 8  # matrices of a bank are padded to a multiple of this, so that 8 ranks share them evenly
VOCAB_MULTIPLE = 128  # padded vocabulary rows take part in the softmax and are never masked
ADAM_WIDTH, STEPS_AHEAD = 1024, 4  # columns of Adam's views of a parameter; steps packed before their turn
GRAD_SCALE = 1 / 8  # the optimizer sees (sum of token losses of the global batch) / 8 at any world size
SHARD_MAGIC, SHARD_VERSION, SHARD_HEADER_INTS = 20240520, 1, 256
PROJECT = Path(__file__).resolve().parent


class InputError(ValueError):
    """Something the user gave is wrong. The message names the value, the rule and the remedy."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Layer:
    """One row of the layer table; `forward` reads it and knows no layer numbers."""

    attn: str | None = "plain"  # "plain", "paired" (two heads attend to each other's keys) or None
    window: str = "short"  # a field of Knobs
    key_offset: bool = False  # half of the key dims come from the previous token
    value_embed: int | None = None  # which value-embedding table is added to the values
    save_as: str | None = None  # the residual stream after this layer is kept under this name
    skip_from: str | None = None  # a kept stream that is added, gated, before this layer


@dataclass(frozen=True, slots=True)
class Stage:
    """One row of the schedule."""

    steps: int
    batch_tokens: int  # of the global batch
    short: int  # window in tokens: a query sees itself and this many before it
    long: int
    lr_mul: float
    mtp: tuple[tuple[float, float], ...] = ((1, 1),)  # (start, end) weight of the k-th next token


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    name: str
    layers: tuple[Layer, ...]
    model_dim: int
    num_heads: int
    head_dim: int
    hidden_dim: int
    stages: tuple[Stage, ...]  # the last one is the extension: constant learning rate, longer windows
    momentum: tuple[tuple[int, float], ...]  # (step, NorMuon momentum), linear in between
    slots: int  # the global batch is packed as this many independent sequences
    micro_tokens: int  # at most this many tokens in one forward pass
    max_seq_len: int  # documents are cut here
    val_tokens: int
    val_slot: int  # tokens of one validation sequence
    val_windows: tuple[int, int]  # (short, long) of the final validation
    val_every: int  # steps
    target: float  # validation loss the track asks for
    fp8: tuple[str, ...]  # products of training in FP8 where the GPU can: "head", "mlp", "qkv", "out"
    cpu_compile: bool = True  # whether torch.compile pays where there is no GPU
    tokenizer: str | None = None  # the recipe's target means something only for this tokenizer
    cooldown: float = 0.5  # fraction of the scheduled steps over which the learning rate falls
    lr_floor: float = 0.1
    muon_lr: float = 0.023
    muon_beta2: float = 0.95
    muon_wd: float = 1.2
    adam_lr: float = 0.008
    adam_eps: float = 1e-10
    adam_wd: float = 0.005

    def __post_init__(self) -> None:
        if self.num_heads * self.head_dim != self.model_dim or self.num_heads % 2 or self.head_dim % 4:
            raise ValueError(f"recipe {self.name}: heads must be pairs, fill model_dim, have 4k dimensions")

    @property
    def scheduled_steps(self) -> int:
        return sum(stage.steps for stage in self.stages[:-1])

    @property
    def total_steps(self) -> int:
        return self.scheduled_steps + self.stages[-1].steps

    @property
    def split_step(self) -> int:
        """The odd step after which embedding and head are two parameters."""
        return math.ceil(self.scheduled_steps * 2 / 3) | 1

    @property
    def max_window(self) -> int:
        return max(self.val_windows[1], *(stage.long for stage in self.stages))

    @property
    def train_tokens(self) -> int:
        return sum(stage.steps * stage.batch_tokens for stage in self.stages)


LAYERS = (
    Layer(attn="paired", value_embed=1),
    Layer(value_embed=2),
    Layer(attn="paired"),
    Layer(window="long", key_offset=True, save_as="skip"),
    Layer(),
    Layer(attn="paired"),
    Layer(attn=None, skip_from="skip"),
    Layer(save_as="backout"),
    Layer(value_embed=0),
    Layer(attn="paired", value_embed=1),
    Layer(window="long", key_offset=True, value_embed=2),
)
TINY_LAYERS = (*LAYERS[:4:3], LAYERS[6], replace(LAYERS[8], save_as="backout"), LAYERS[10])  # every kind once


# fmt: off
def gpt_stages(steps: int, extension: int) -> tuple[Stage, ...]:
    """The full model's schedule: three stages of `steps`, then `extension`. 1.52 = 2**0.6, 1.73 = 3**0.5."""
    k = 1024
    return (
        #     steps      batch    short long  lr_mul weights of the next tokens
        Stage(steps,     128 * k, 128,  384,  1.00, ((1, 1), (0.5, 0.5), (0.25, 0))),
        Stage(steps,     256 * k, 384,  896,  1.52, ((1, 1), (0.5, 0))),
        Stage(steps,     384 * k, 640,  1408, 1.73),
        Stage(extension, 384 * k, 768,  1664, 1.73),
    )


SHORT = Recipe(
    name="short", layers=LAYERS, model_dim=768, num_heads=6, head_dim=128, hidden_dim=3072,
    stages=gpt_stages(575, 40), momentum=((0, 0.85), (300, 0.95), (1715, 0.95), (1765, 0.85)),
    slots=8, micro_tokens=48 * 1024, max_seq_len=2048,
    val_tokens=10 * 1024 * 1024, val_slot=256 * 1024, val_windows=(768, 2560), val_every=250,
    target=3.28, fp8=("head", "mlp", "qkv", "out"), tokenizer="gpt2",
)
SPRINT = replace(
    SHORT, name="sprint", stages=gpt_stages(115, 8), val_every=177, target=3.322, tokenizer=None,
    momentum=((0, 0.85), (60, 0.95), (343, 0.95), (353, 0.85)),
)
TINY = Recipe(
    name="tiny", layers=TINY_LAYERS, model_dim=128, num_heads=4, head_dim=32, hidden_dim=512,
    stages=(
        Stage(40, 2304, 32,  96,  1.00, ((1, 1), (0.5, 0.5), (0.25, 0))),
        Stage(40, 4608, 64,  160, 1.52, ((1, 1), (0.5, 0))),
        Stage(40, 6912, 96,  224, 1.73),
        Stage(5,  6912, 128, 256, 1.73),
    ),
    momentum=((0, 0.85), (25, 0.95), (115, 0.95), (125, 0.85)),
    slots=12, micro_tokens=8192, max_seq_len=768,
    val_tokens=65536, val_slot=2048, val_windows=(128, 384), val_every=25,
    target=4.15, fp8=(), cpu_compile=False,
)
RECIPES = {recipe.name: recipe for recipe in (TINY, SPRINT, SHORT)}
# fmt: on


@dataclass(frozen=True, slots=True)
class Param:
    """One row of the parameter table. The order of the rows is the order in which gradients are sent."""

    name: str
    optim: str  # "normuon" or "adam"
    comms: str  # "sharded" (reduce-scatter, own rows, all-gather) or "replicated" (all-reduce)
    work: int  # place in the order of updates: small and early-arriving first, polar express last
    betas: tuple[float, float] = (0.9, 0.99)
    lr_mul: tuple[float, ...] = (1.0,)  # cycled over the matrices of a bank
    wd_mul: float = 1.0
    tied_to: str | None = None  # until the split step a transposed copy of this parameter


# NorMuon's lr_mul for a matrix of R rows and C columns is max(1, R/C)**0.5, and twice that for c_proj.
MLP_LR_MUL = ((3072 / 768) ** 0.5, 2 * (3072 / 768) ** 0.5)
PARAMS = (
    #     name              optim      comms         work betas          lr_mul     wd_mul
    Param("attn_bank", "normuon", "sharded", 11),
    Param("mlp_bank", "normuon", "sharded", 12, lr_mul=MLP_LR_MUL),
    Param("scalars", "adam", "replicated", 0, (0.90, 0.99), (5.0,), 0),
    Param("ve0", "adam", "sharded", 6, (0.75, 0.95), (75.0,), 5),
    Param("ve1", "adam", "sharded", 7, (0.75, 0.95), (75.0,), 5),
    Param("ve2", "adam", "sharded", 8, (0.75, 0.95), (75.0,), 5),
    Param("smear_gate", "adam", "replicated", 1, (0.90, 0.99), (0.01,), 0),
    Param("skip_gate", "adam", "replicated", 2, (0.90, 0.99), (0.05,), 0),
    Param("attn_gate_bank", "adam", "replicated", 3, (0.90, 0.99), (1.0,), 1),
    Param("ve_gate_bank", "adam", "replicated", 4, (0.90, 0.99), (1.0,), 1),
    Param("x0_lambdas", "adam", "replicated", 5, (0.65, 0.95), (5.0,), 0),
    Param("lm_head", "adam", "sharded", 9, (0.50, 0.95), (1.0,), 150),
    Param("embed", "adam", "sharded", 10, (0.50, 0.95), (1.0,), 150, tied_to="lm_head"),
)
WORK_ORDER = tuple(sorted(PARAMS, key=lambda row: row.work))


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """A recipe together with what the data and the machine decide."""

    recipe: Recipe
    vocab_size: int  # of the tokenizer
    slots: int
    dtype: torch.dtype
    attention: str  # backend of kernels.attention
    fp8: tuple[str, ...]

    @property
    def padded_vocab(self) -> int:
        return round_up(self.vocab_size, VOCAB_MULTIPLE)


def round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def packing(recipe: Recipe, world_size: int) -> int:
    """The recipe's slots if the world size divides them; else a common multiple, and other document cuts."""
    sizes = sorted({stage.batch_tokens for stage in recipe.stages})
    good = [w for w in range(1, 1025) if not any(size % (16 * math.lcm(recipe.slots, w)) for size in sizes)]
    if world_size not in good:
        message = f"world size {world_size} does not divide the batches of recipe {recipe.name} into slots"
        raise InputError(f"{message} of a multiple of 16 tokens (batches: {sizes}); use one of {good}")
    return math.lcm(recipe.slots, world_size)


def slots_per_pass(slots: int, slot_tokens: int, micro_tokens: int) -> int:
    """The largest divisor of `slots` whose tokens fit in one forward pass; at least 1."""
    limit = max(micro_tokens, slot_tokens)
    return max(b for b in range(1, slots + 1) if slots % b == 0 and b * slot_tokens <= limit)


# 2. ranks, log, clock -----------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Ranks:
    """This process among all of them."""

    rank: int
    world_size: int
    device: torch.device

    @classmethod
    def from_torchrun(cls) -> "Ranks":
        """Read torchrun's environment; a single process where there is none. Starts no process group."""
        names = "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"
        given = [os.environ.get(*of) for of in zip(names, "0011", strict=True)]
        if not all(number.isdecimal() for number in given) or int(given[0]) >= int(given[2]):
            raise InputError(f"{', '.join(names)} are {given}, which is no rank of a world; use torchrun")
        rank, local, world, here = map(int, given)
        if not torch.cuda.is_available():
            return cls(rank, world, torch.device("cpu"))
        if (here := max(local + 1, min(here, world))) > (count := torch.cuda.device_count()):
            raise InputError(f"{here} processes on a host with {count} GPUs; use --nproc_per_node={count}")
        return cls(rank, world, torch.device("cuda", local))

    def sum(self, values: Tensor) -> Tensor:
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    @contextlib.contextmanager
    def process_group(self) -> Iterator[None]:
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        if self.world_size > 1:
            backend, device_id = ("nccl", self.device) if self.device.type == "cuda" else ("gloo", None)
            dist.init_process_group(backend, device_id=device_id)
            dist.barrier()
        try:
            yield
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()


def output_of(*command: str) -> str | None:
    """What a program prints, or None where it does not exist or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def machine_lines(device: torch.device) -> dict[str, str]:
    """Every visible GPU of this host with its UUID, and the driver; or the CPU."""
    if device.type != "cuda":
        return {"cpu": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"}
    found = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    driver = output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") or "unknown"
    return {f"gpu {i}": f"{p.name} GPU-{p.uuid}" for i, p in enumerate(found)} | {"driver": driver.split()[0]}


class Log:
    """The run log: source, conditions, step lines, closing line; its JSON twin. Only the master writes."""

    def __init__(self, path: Path, is_master: bool) -> None:
        self.path, self.is_master = path, is_master
        self.file, self.meta, self.live = None, {}, ""
        if is_master:
            beside = [path.parent / f"{path.stem}{suffix}" for suffix in (".json", ".ckpt")]
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                if path in beside or any(other.exists() for other in beside):
                    raise FileExistsError(0, f"it, {beside[0].name} or {beside[1].name} would be overwritten")
                self.file = path.open("x", encoding="utf-8", errors="backslashreplace")
            except OSError as error:  # FileExistsError too: a log is never overwritten
                raise InputError(f"log {path}: {error.strerror}; name another with --out") from None

    def write(self, text: str) -> None:
        if self.file:
            self.file.write(text + "\n")
            self.file.flush()

    def say(self, text: str) -> None:
        self.write(text)
        if self.is_master:
            self._print(f"\r\033[K{text}\n" if self.live else f"{text}\n")
            self.live = ""

    def progress(self, text: str) -> None:
        """To the terminal alone, where there is one, on one line that is overwritten."""
        if self.is_master and sys.stdout.isatty():
            self.live = text[: shutil.get_terminal_size().columns - 1]
            self._print(f"\r\033[K{self.live}")

    def _print(self, text: str) -> None:
        try:
            print(text, end="", flush=True)
        except BrokenPipeError:  # whoever read the output has gone; the run and its log go on
            sys.stdout = open(os.devnull, "w")

    def header(self, sources: Iterable[Path], meta: dict[str, object]) -> None:
        """Everything that is needed to know, and to repeat, what ran."""
        self.meta = {key: str(value) for key, value in meta.items()}
        for path in sources:
            source = path.read_bytes()
            lines, digest = source.decode().removesuffix("\n").split("\n"), hashlib.sha256(source).hexdigest()
            self.write("\n".join([f"#### source {path.name} sha256={digest} lines={len(lines)}", *lines]))
        versions = ["Running Python " + sys.version.replace("\n", " ")]
        versions += [f"Running PyTorch {torch.__version__} compiled for CUDA {torch.version.cuda}"]
        versions += [f"Running Triton version {getattr(kernels.triton, '__version__', None)}"]
        conditions = (f"{key}: {value}" for key, value in self.meta.items())
        self.write("\n".join(["=" * 100, *versions, *conditions, "=" * 100]))

    def step(self, what: str, ms: float, steps: int, more: str = "") -> None:
        """One `step:` line of the community's format; validations are shown on the terminal too."""
        line = f"step:{what} train_time:{ms:.0f}ms step_avg:{ms / max(steps, 1):.2f}ms{more}"
        (self.say if "val_loss" in what else self.write)(line)

    def close(self, status: str, result: dict[str, object]) -> None:
        """The closing line; then the JSON twin, written whole or not at all."""
        if self.file is None:
            return
        self.say(f"status: {status}")
        self.file.close()
        self.file = None
        twin = json.dumps({"format": 1, "meta": self.meta, "result": {"status": status, **result}}, indent=1)
        atomically(self.path.with_suffix(".json"), lambda path: path.write_text(twin + "\n"))


def atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Write to a temporary name in the same folder, then rename."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        temporary.replace(path)
    except (OSError, RuntimeError) as error:  # torch.save makes the latter of a full disk
        raise InputError(f"{path} cannot be written ({error}); free space or name another --out") from None
    finally:
        temporary.unlink(missing_ok=True)


class Clock:
    """The published time: wall time between start() and the end, less what runs inside paused()."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.elapsed_ms, self.started = device, 0.0, None

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def start(self) -> None:
        self.synchronize()
        self.started = time.perf_counter()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        self.synchronize()
        self.elapsed_ms, self.started = self.ms(), None
        yield
        self.start()

    def ms(self) -> float:
        """Without a synchronisation: queued device work is not waited for."""
        running = 0.0 if self.started is None else 1000 * (time.perf_counter() - self.started)
        return self.elapsed_ms + running


# 3. data: shards, document index, batches ---------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Corpus:
    """A prepared folder: its shards, its vocabulary and the hash of its manifest."""

    train: tuple[Path, ...]
    val: tuple[Path, ...]
    vocab_size: int
    bos_id: int
    tokenizer: str
    token_bytes: np.ndarray  # uint16 [vocab_size], UTF-8 bytes of each token
    sha256: str

    @classmethod
    def open(cls, folder: Path) -> "Corpus":
        """Read and check the manifest and every shard's header and size (not its content)."""
        path, is_default = folder / "manifest.json", folder == PROJECT / "data" / "default"
        remedy = f"make it with data/prepare.py {'--default' if is_default else 'or data/fineweb.py'}"
        if not path.is_file():
            raise InputError(f"no manifest.json in {folder}, so there is no prepared data there; {remedy}")
        try:
            manifest, digest = json.loads(path.read_bytes()), hashlib.sha256(path.read_bytes()).hexdigest()
            tok, splits, entry = manifest["tokenizer"], manifest["splits"], manifest["token_bytes"]
            if hashlib.sha256((folder / entry["file"]).read_bytes()).hexdigest() != entry["sha256"]:
                raise ValueError(f"{entry['file']} has another hash than is stated")  # bpb would be wrong
            table = np.load(folder / entry["file"], allow_pickle=False)
            tokens = {row["file"]: row["tokens"] for s in ("train", "val") for row in splits[s]["shards"]}
            train, val = (tuple(sorted(folder.glob(f"*_{s}_*.bin"))) for s in ("train", "val"))
            corpus = cls(train, val, tok["vocab_size"], tok["bos_id"], tok["kind"], table, digest)
        except (KeyError, TypeError, ValueError, OSError, EOFError) as error:
            raise InputError(f"manifest {path}: {type(error).__name__}: {error}; {remedy}") from None
        different = sorted({f.name for f in train + val} ^ set(tokens))
        if different or not train or not val:
            raise InputError(f"{folder}: manifest and shards differ ({different[:3] or 'none'}); {remedy}")
        for shard in train + val:
            check_shard(shard, tokens[shard.name])
        vocab, bos, entries = corpus.vocab_size, corpus.bos_id, len(table)
        if not (isinstance(vocab, int) and isinstance(bos, int) and 0 <= bos < vocab == entries <= 65536):
            found = f"vocab_size {vocab}, bos_id {bos}, byte table of {entries}"
            raise InputError(f"manifest {path} contradicts itself: {found}; {remedy}")
        return corpus


def check_shard(path: Path, declared: int | None = None) -> int:
    """The number of tokens of a shard; InputError where header, size or manifest disagree."""
    header = np.fromfile(path, dtype="<i4", count=SHARD_HEADER_INTS)
    if len(header) < SHARD_HEADER_INTS or header[0] != SHARD_MAGIC or header[1] != SHARD_VERSION:
        found = f"{header[0]}, {header[1]}" if len(header) > 1 else "nothing"
        rule = f"a shard begins with {SHARD_MAGIC}, {SHARD_VERSION}, in a {4 * SHARD_HEADER_INTS} byte header"
        raise InputError(f"{path} is not a token shard: it begins with {found}; {rule}; fetch it again")
    tokens, size = int(header[2]), path.stat().st_size
    if size != 4 * SHARD_HEADER_INTS + 2 * tokens:
        raise InputError(f"{path} has {size} bytes, not what its {tokens} tokens need; fetch it again")
    if declared not in (None, tokens):
        raise InputError(f"{path} has {tokens} tokens, the manifest says {declared}; fetch it again")
    return tokens


def map_shard(path: Path) -> np.ndarray:
    """Tokens as a read-only uint16 memory map."""
    return np.memmap(path, dtype="<u2", mode="r", offset=4 * SHARD_HEADER_INTS)


def check_tokens(tokens: np.ndarray, corpus: Corpus, path: Path) -> None:
    if len(tokens) and int(tokens.max()) >= corpus.vocab_size:
        raise InputError(f"{path}: token {tokens.max()} of {corpus.vocab_size} there are; prepare it again")


@dataclass(frozen=True, slots=True)
class Documents:
    """The usable documents of one shard; `ends` makes filling a slot one binary search."""

    tokens: np.ndarray  # uint16 [shard]
    starts: np.ndarray  # int64 [documents]
    ends: np.ndarray  # int64 [documents + 1], running sum of the lengths after the cut at max_seq_len

    @classmethod
    def index(cls, path: Path, corpus: Corpus, max_seq_len: int, head: int | None = None) -> "Documents":
        """Scan a shard for BOS tokens; with `head`, only its first tokens, leaving out the cut document."""
        tokens = np.asarray(map_shard(path))  # slices of a plain array are made faster
        part = np.asarray(tokens[:head])
        check_tokens(part, corpus, path)
        edges = np.flatnonzero(part == corpus.bos_id)
        edges = edges if len(part) < len(tokens) else np.append(edges, len(tokens))
        return cls(tokens, edges[:-1], np.append(0, np.cumsum(np.minimum(np.diff(edges), max_seq_len))))

    def fill(self, first: int, slots: int, slot_tokens: int) -> list[int] | None:
        """Document bounds [slots + 1] of consecutive slots; None if the shard has too few left."""
        bounds = [first]
        for _ in range(slots):
            bounds.append(int(np.searchsorted(self.ends, self.ends[bounds[-1]] + slot_tokens + 1)))
            if bounds[-1] >= len(self.ends):
                return None
        return bounds

    def pack(self, first: int, after: int, slot_tokens: int) -> tuple[np.ndarray, np.ndarray]:
        """uint16 tokens [slot_tokens + 1] of documents first..after-1, and where each begins in the slot."""
        begins, lengths = self.ends[first:after] - self.ends[first], np.diff(self.ends[first : after + 1])
        lengths[-1] = slot_tokens + 1 - begins[-1]
        spans = zip(self.starts[first:after].tolist(), lengths.tolist(), strict=True)
        return np.concatenate([self.tokens[s : s + n] for s, n in spans]), begins


class Batch(NamedTuple):
    """One micro-batch on the device: slots one after another."""

    tokens_N: Tensor  # int32
    targets_N: Tensor  # int32; the next token of the packed slot, over document ends
    positions_N: Tensor  # int32, in the slot
    cu_seqlens: Tensor  # int32 [documents + 1], where documents begin in the N rows, padded at its end with N


def pack_batch(slots: Sequence[tuple[np.ndarray, np.ndarray]], max_docs: int) -> tuple[np.ndarray, ...]:
    """A Batch on the host, slots side by side; `max_docs` fixes the length of cu_seqlens."""
    packed = np.stack([tokens for tokens, _ in slots]).astype(np.int32)
    slot_tokens = packed.shape[1] - 1
    begins = np.concatenate([b + i * slot_tokens for i, (_, b) in enumerate(slots)])
    cu = np.full(max_docs + 1, len(slots) * slot_tokens, np.int32)
    assert len(begins) <= max_docs, f"{len(begins)} documents in a batch planned for {max_docs}"
    cu[: len(begins)] = begins
    positions = np.tile(np.arange(slot_tokens, dtype=np.int32), len(slots))
    return packed[:, :-1].reshape(-1), packed[:, 1:].reshape(-1), positions, cu


def to_device(packed: tuple[np.ndarray, ...], device: torch.device) -> Batch:
    """Without waiting for the copies."""
    tensors = map(torch.from_numpy, packed)
    if device.type == "cuda":
        tensors = (t.pin_memory().to(device, non_blocking=True) for t in tensors)
    return Batch(*tensors)


def batch_bounds(recipe: Recipe, slots: int, corpus: Corpus) -> Iterator[tuple[Documents, list[int]]]:
    """For every step the shard in use and the document bounds of all slots. No document is used twice."""
    steps = (stage.batch_tokens // slots for stage in recipe.stages for _ in range(stage.steps))
    slot_tokens, done = next(steps), 0
    index = functools.partial(Documents.index, corpus=corpus, max_seq_len=recipe.max_seq_len)
    with ThreadPoolExecutor(max_workers=1) as pool:
        # Each is indexed while the one before is used; of the first, at the start, only its beginning.
        queue = [pool.submit(index, corpus.train[0], head=4_000_000), pool.submit(index, corpus.train[0])]
        for following in (*corpus.train[1:], None):
            cursor, futures = 0, queue
            queue = [pool.submit(index, following)] if following else []
            for documents in (future.result() for future in futures):
                while bounds := documents.fill(cursor, slots, slot_tokens):
                    yield documents, bounds
                    cursor, done = bounds[-1], done + 1
                    if (slot_tokens := next(steps, None)) is None:
                        return
    have = f"they hold {sum(map(check_shard, corpus.train)):,}, documents are cut at {recipe.max_seq_len}"
    need = f"recipe {recipe.name} needs {recipe.train_tokens:,} tokens, {have} and at slot ends"
    raise InputError(f"the training shards last for {done} of {recipe.total_steps} steps: {need}; add shards")


def check_train_data(recipe: Recipe, slots: int, corpus: Corpus) -> int:
    """InputError if the data does not last; otherwise the most documents that any one slot holds."""
    return max(max(np.diff(bounds)) for _, bounds in batch_bounds(recipe, slots, corpus))


def batches(cfg: Config, ranks: Ranks, corpus: Corpus, max_docs: int, first: int) -> Iterator[list[Batch]]:
    """This rank's micro-batches of each step from `first` on; packed in a thread, a few steps ahead."""
    recipe, per_rank = cfg.recipe, cfg.slots // ranks.world_size
    stages = [stage for stage in recipe.stages for _ in range(stage.steps)]
    mine = range(ranks.rank * per_rank, (ranks.rank + 1) * per_rank)

    def pack() -> Iterator[list[tuple[np.ndarray, ...]]]:
        bounds_of_steps = enumerate(batch_bounds(recipe, cfg.slots, corpus))
        for step, (documents, bounds) in itertools.islice(bounds_of_steps, first, None):
            slot_tokens = stages[step].batch_tokens // cfg.slots
            packed = [documents.pack(bounds[i], bounds[i + 1], slot_tokens) for i in mine]
            size = slots_per_pass(per_rank, slot_tokens, recipe.micro_tokens)
            yield [pack_batch(packed[i : i + size], size * max_docs) for i in range(0, per_rank, size)]

    stream = pack()
    with ThreadPoolExecutor(max_workers=1) as pool:
        ahead = deque(pool.submit(next, stream, None) for _ in range(STEPS_AHEAD))
        while packed := ahead.popleft().result():
            ahead.append(pool.submit(next, stream, None))
            yield [to_device(micro, ranks.device) for micro in packed]


@dataclass(frozen=True, slots=True)
class ValSet:
    """Validation sequences in stream order, not aligned to documents."""

    slots: list[tuple[np.ndarray, np.ndarray]]  # (tokens [val_slot + 1], document starts), of this rank
    max_docs: int  # of any slot of any rank
    max_seq_len: int
    num_tokens: int  # targets of all ranks
    num_bytes: int  # UTF-8 bytes that these targets stand for

    @classmethod
    def read(cls, recipe: Recipe, corpus: Corpus, ranks: Ranks) -> "ValSet":
        need = recipe.val_tokens + 1
        tokens = np.concatenate([map_shard(f)[:need] for f in corpus.val])[:need]
        if len(tokens) < need:
            found = f"recipe {recipe.name} needs {need:,} validation tokens, the shards hold {len(tokens):,}"
            raise InputError(f"{found}; prepare more with data/prepare.py --val or --val-fraction")
        check_tokens(tokens, corpus, corpus.val[0].parent)
        parts = [tokens[b : b + recipe.val_slot + 1] for b in range(0, recipe.val_tokens, recipe.val_slot)]
        slots = [(part, np.union1d(0, np.flatnonzero(part[:-1] == corpus.bos_id))) for part in parts]
        longest = max(int(np.diff(np.append(b, recipe.val_slot)).max()) for _, b in slots)
        num_bytes = int(corpus.token_bytes[tokens[1:]].sum(dtype=np.int64))
        mine, max_docs = slots[ranks.rank :: ranks.world_size], max(len(b) for _, b in slots)
        return cls(mine, max_docs, round_up(longest, 128), recipe.val_tokens, num_bytes)


# 4. schedule: pure functions of the step ----------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Sched:
    step: int
    stage: int
    windows: tuple[int, int]  # (short, long) in tokens
    mtp: tuple[float, float, float]
    lr: float  # multiplier of every base learning rate
    momentum: float  # of NorMuon
    is_adam_step: bool  # Adam parameters move on odd steps, with the gradients of two steps


def stage_of(recipe: Recipe, step: int) -> tuple[int, int]:
    """(stage index, step within the stage); the last stage goes on for ever."""
    for i, stage in enumerate(recipe.stages[:-1]):
        if step < stage.steps:
            return i, step
        step -= stage.steps
    return len(recipe.stages) - 1, step


def at(recipe: Recipe, step: int) -> Sched:
    """The schedule of the step about to be executed; `step` = total steps is the final validation."""
    index, within = stage_of(recipe, step)
    stage = recipe.stages[index]
    # A stage's learning rate begins one step after its batch does.
    lr_mul = recipe.stages[stage_of(recipe, max(step - 1, 0))[0]].lr_mul
    left = min(max((1 - step / recipe.scheduled_steps) / recipe.cooldown, 0), 1)
    weights = [float(np.interp(within, (0, stage.steps), ends)) for ends in stage.mtp]
    windows = recipe.val_windows if step == recipe.total_steps else (stage.short, stage.long)
    lr = lr_mul * left + recipe.lr_floor * (1 - left)
    mtp, momentum = (*weights, 0.0, 0.0)[:3], float(np.interp(step, *zip(*recipe.momentum, strict=True)))
    return Sched(step, index, windows, mtp, lr, momentum, is_adam_step=step % 2 == 1)


def yarn(recipe: Recipe, stage: int) -> tuple[Tensor, float]:
    """(rotary frequencies float32 [head_dim / 4], attention scale) after the window changes up to `stage`.

    Frequencies that turn less than once in the old window are slowed as it grows. Source: arXiv 2309.00071.
    """
    freqs, scale = (1 / 1024) ** torch.linspace(0, 1, recipe.head_dim // 4), 0.1
    for old, new in itertools.pairwise(row.long for row in recipe.stages[: stage + 1]):
        turns = old * freqs / (2 * math.pi)
        keep = ((turns - 1) / (32 - 1)).clamp(0, 1)
        freqs = freqs * (old / new + keep * (1 - old / new))
        scale *= 1 + 0.2 * math.log(new / old)
    return freqs, scale


# 5. blocks ----------------------------------------------------------------------------------------------
def norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],))


class Knobs(NamedTuple):
    """What changes during training without a new compilation: 0-D CPU tensors, and weights on the device."""

    short: Tensor  # int64 window
    long: Tensor
    scale: Tensor  # float32, attention
    mtp_K: Tensor  # float32 [3], on the device


def scalar_layout(num_layers: int) -> tuple[dict[str, slice], Tensor]:
    """Named slices of the `scalars` parameter, and its initial value."""
    rows = ("resid", num_layers, 1.1), ("qkv", num_layers, 0.5), ("out", num_layers, 1.0)
    rows += ("smear", 1, 0.0), ("backout", 1, 0.5), ("skip", 1, -1.5)
    init = torch.ones(round_up(sum(count for _, count, _ in rows), 8))
    slices, at = {}, 0
    for name, count, value in rows:
        slices[name] = slice(at, at + count)
        init[slices[name]] = value
        at += count
    return slices, init


# 6. model -----------------------------------------------------------------------------------------------
VAL_ROWS = 32768  # rows of logits at a time in evaluation: 3.3 GB in bf16


class GPT(nn.Module):
    """Parameters in banks, one loop over the layer table."""

    def __init__(self, cfg: Config, seed: int) -> None:
        """Parameters on the CPU, the same for the same seed on every device and rank."""
        super().__init__()
        r, gen = cfg.recipe, torch.Generator().manual_seed(seed)
        self.cfg, self.layers = cfg, r.layers
        self.slices, scalars = scalar_layout(len(r.layers))
        attending = [layer for layer in r.layers if layer.attn]
        value_layers = [layer for layer in r.layers if layer.value_embed is not None]
        attn_rows = round_up(4 * len(attending), BANK_MULTIPLE) // 4
        mlp_rows = round_up(2 * len(r.layers), BANK_MULTIPLE) // 2
        bound = (3 / r.model_dim) ** 0.5  # of the uniform distribution with standard deviation D^-1/2
        zeros = functools.partial(torch.zeros, dtype=cfg.dtype)
        head = torch.empty(r.model_dim, cfg.padded_vocab).normal_(std=0.005, generator=gen).to(cfg.dtype)
        init = {
            "attn_bank": zeros(attn_rows, 4, r.model_dim, r.model_dim),  # matrices q, k, v, o
            "mlp_bank": zeros(mlp_rows, 2, r.hidden_dim, r.model_dim),  # c_fc and, transposed, c_proj
            "scalars": scalars,
            **{f"ve{i}": zeros(cfg.padded_vocab, r.model_dim) for i in range(3)},
            **{name: zeros(1, GATE_DIM) for name in ("smear_gate", "skip_gate")},
            "attn_gate_bank": zeros(len(attending), r.num_heads, GATE_DIM),
            "ve_gate_bank": zeros(len(value_layers), r.num_heads, GATE_DIM),
            "x0_lambdas": torch.zeros(len(r.layers)),
            "lm_head": head,
            "embed": head.T.contiguous(),
        }
        for bank, part, most in (("attn_bank", slice(0, 3), bound), ("mlp_bank", slice(0, 1), bound / 2)):
            values = init[bank][:, part]  # drawn as float32, whatever they are kept as
            values.copy_(torch.empty(values.shape).uniform_(-most, most, generator=gen))
        for name, value in init.items():
            self.register_parameter(name, nn.Parameter(value))
        # Twice the longest slot: paired heads give every token two positions.
        longest = max(r.val_slot, *(stage.batch_tokens // cfg.slots for stage in r.stages))
        for name in ("cos", "sin"):
            self.register_buffer(name, zeros(2 * longest, r.head_dim // 4), persistent=False)
        self.set_rotary(yarn(r, 0)[0])

    def set_rotary(self, freqs: Tensor) -> None:
        """Fill the tables in place, so that nothing recompiles."""
        angles = torch.outer(torch.arange(len(self.cos), device=self.cos.device), freqs.to(self.cos.device))
        self.cos.copy_(angles.cos())
        self.sin.copy_(angles.sin())

    def attend(self, x_ND: Tensor, layer: Layer, w: dict[str, Tensor], where: tuple, knobs: Knobs) -> Tensor:
        """Attention of one layer: x is normalised; `w` holds the layer's weights and gates."""
        r, (positions_N, cu_seqlens, max_seq_len) = self.cfg.recipe, where
        H, K, paired = r.num_heads, r.head_dim, layer.attn == "paired"
        eight, gate_in = self.cfg.fp8 if self.training else (), x_ND[:, :GATE_DIM].contiguous()
        ve = (w["ve"].view(-1, H, K), F.linear(gate_in, w["ve_gate"])) if "ve" in w else (None, None)
        qkv = kernels.fp8_linear_qkv if "qkv" in eight else kernels.linear_qkv
        heads = qkv(x_ND, w["qkv"], self.cos, self.sin, positions_N, *ve, paired, layer.key_offset)
        if paired:
            # As they lie in memory, halves of the H heads are rows 2t and 2t+1 of a sequence twice as long.
            heads = [z.view(-1, H // 2, K) for z in heads]
            cu_seqlens, max_seq_len = 2 * cu_seqlens, 2 * max_seq_len
        limits = cu_seqlens, max_seq_len, getattr(knobs, layer.window), knobs.scale, r.max_window
        y_NHK = kernels.attention(*heads, *limits, self.cfg.attention).view(-1, H, K)
        y_NHK = y_NHK * torch.sigmoid(F.linear(gate_in, w["attn_gate"])).unsqueeze(-1)
        return (kernels.fp8_linear if "out" in eight else F.linear)(y_NHK.flatten(1), w["out"])

    def layer_weights(self, tokens_N: Tensor) -> list[dict[str, Tensor]]:
        """Each layer's slices. Banks are split once, by unbind, to avoid a select-backward kernel a slice."""
        qkv_mul, out_mul = (self.scalars[self.slices[n]].unbind(0) for n in ("qkv", "out"))
        attn, attn_gates = iter(self.attn_bank.unbind(0)), iter(self.attn_gate_bank.unbind(0))
        ve_gates, mlp = iter(self.ve_gate_bank.unbind(0)), iter(self.mlp_bank.flatten(0, 1).unbind(0))
        values, weights = [F.embedding(tokens_N, table) for table in (self.ve0, self.ve1, self.ve2)], []
        for i, layer in enumerate(self.layers):
            w = {"fc": next(mlp), "proj": next(mlp)}
            if layer.attn:
                matrices = next(attn)
                # The scalar multiplies the weight: cheaper than the activation, and the same gradient.
                w["qkv"] = qkv_mul[i] * matrices[:3].flatten(0, 1)
                w["out"] = out_mul[i] * matrices[3]
                w["attn_gate"] = next(attn_gates)
            if layer.value_embed is not None:
                w["ve"], w["ve_gate"] = values[layer.value_embed], next(ve_gates)
            weights.append(w)
        return weights

    def stream(self, tokens_N: Tensor, where: tuple, knobs: Knobs) -> Tensor:
        """Tokens to the normalised residual stream [N, D] that the head reads."""
        scalar = {name: self.scalars[part] for name, part in self.slices.items()}
        resid, x0_mul = scalar["resid"].unbind(0), self.x0_lambdas.unbind(0)
        smear, backout, skip = (scalar[name].squeeze(0) for name in ("smear", "backout", "skip"))
        e = F.embedding(tokens_N, self.embed)
        gate = smear * torch.sigmoid(F.linear(e[:, :GATE_DIM], self.smear_gate))
        before = torch.cat((torch.zeros_like(e[:1]), e[:-1]))
        x = x0 = norm(e + torch.where(where[0].unsqueeze(1) > 0, gate * before, 0))
        is_fp8 = self.training and "mlp" in self.cfg.fp8
        mlp, kept = kernels.fp8_linear_relu2 if is_fp8 else kernels.linear_relu2, {}
        for i, (layer, w) in enumerate(zip(self.layers, self.layer_weights(tokens_N), strict=True)):
            if layer.skip_from:
                gate = 2 * torch.sigmoid(skip) * torch.sigmoid(F.linear(x0[:, :GATE_DIM], self.skip_gate))
                x = x + gate * kept[layer.skip_from]
            # At the first layer x is x0 itself, so one product does for both.
            x = (resid[i] + x0_mul[i]) * x if i == 0 else resid[i] * x + x0_mul[i] * x0
            if layer.attn:
                x = x + self.attend(norm(x), layer, w, where, knobs)
            x = x + mlp(norm(x), w["fc"], w["proj"])
            if layer.save_as:
                kept[layer.save_as] = x
        return norm(x - backout * kept["backout"])

    def forward(
        self, tokens_N: Tensor, targets_N: Tensor, positions_N: Tensor, cu_seqlens: Tensor, max_seq_len: int,
        knobs: Knobs,
    ) -> Tensor:  # fmt: skip
        """Sum of the token losses, float32; with multi-token targets when training."""
        x_ND = self.stream(tokens_N, (positions_N, cu_seqlens, max_seq_len), knobs)
        if not self.training:  # a validation slot's logits would fill the memory: a piece at a time
            pieces = zip(x_ND.split(VAL_ROWS), targets_N.split(VAL_ROWS), strict=True)
            return torch.stack([kernels.softcapped_nll(x @ self.lm_head, t).sum() for x, t in pieces]).sum()
        rows = targets_N, positions_N, knobs.mtp_K
        if "head" in self.cfg.fp8:
            return kernels.fp8_head_loss(x_ND, self.lm_head, *rows)
        return kernels.softcapped_cross_entropy(x_ND @ self.lm_head, *rows).sum()


# 7. update rules: tensors in, tensors changed in place --------------------------------------------------
POLAR_COEFFICIENTS = (  # five steps, cushion 2, safety 2e-2; source: arXiv 2505.16932
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


def polar_express(u_MRC: Tensor, dtype: torch.dtype) -> Tensor:
    """The nearest semi-orthogonal matrix to each of M, roughly, in `dtype`. Source: arXiv 2505.16932.

    Error: singular values in (0.83, 1.15) where they were at least 1e-3 of the norm (test_optim.py).
    """
    is_tall = u_MRC.shape[-2] > u_MRC.shape[-1]
    x = (u_MRC / (u_MRC.norm(dim=(-2, -1), keepdim=True) * 1.02 + 1e-6)).to(dtype)
    for a, b, c in POLAR_COEFFICIENTS:
        # The smaller of the two products of x with itself; a tall x is multiplied from the right.
        poly = kernels.ba_plus_caa(kernels.xxt(x.mT if is_tall else x), c, b)
        x = torch.baddbmm(x, *((x, poly) if is_tall else (poly, x)), beta=a)
    return x


def join_float32(high: Tensor, low: Tensor) -> Tensor:
    """float32 whose upper 16 bits are the bf16 tensor's and whose lower 16 are the int16 tensor's."""
    return ((high.view(torch.int16).int() << 16) | (low.int() & 0xFFFF)).view(torch.float32)


def split_float32(x: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse of join_float32; the bf16 part is x truncated, not rounded."""
    bits = x.view(torch.int32)
    return (bits >> 16).to(torch.int16).view(torch.bfloat16), (bits & 0xFFFF).to(torch.int16)


# fmt: off
def normuon_step(
    p_MRC: Tensor,           # updated in place; bf16 with `low`, or float32
    low_MRC: Tensor | None,  # int16: the bits of a float32 parameter that bf16 leaves out
    grad_MRC: Tensor,
    momentum_MRC: Tensor,    # float32 state
    second_MR1: Tensor,      # float32 state: running mean square of rows, or of columns where they are more
    lr_M11: Tensor,          # float32; about the root mean square singular value of the step
    decay: Tensor, mu: Tensor,  # 0-D CPU float32, so that new values do not recompile; decay is before lr_mul
    beta2: float,
) -> None:
    """One NorMuon update with cautious decay. Source: arXiv 2510.05491; 2505.16932; decay 2510.12402."""
    g = grad_MRC.float()
    momentum_MRC.copy_(mu * momentum_MRC + (1 - mu) * g)
    o = polar_express((1 - mu) * g + mu * momentum_MRC, p_MRC.dtype).float()
    dim = -1 if o.shape[-2] >= o.shape[-1] else -2
    # Each row is divided by its running RMS, then the matrix gets its Frobenius norm back.
    square = o.square().mean(dim=dim, keepdim=True)
    second_MR1.lerp_(square, 1 - beta2)
    scale = second_MR1.clamp_min(1e-10).rsqrt()
    after = square * scale.square()
    norms = [x.sum((-2, -1), keepdim=True).mul(o.shape[dim]).sqrt() for x in (square, after)]
    o = o * (scale * (norms[0] / norms[1].clamp_min(1e-10)))
    p = p_MRC if low_MRC is None else join_float32(p_MRC, low_MRC)
    p = p - lr_M11 * (decay * p * (o * p >= 0) + o)
    high, low = (p, None) if low_MRC is None else split_float32(p)
    p_MRC.copy_(high)
    if low is not None:
        low_MRC.copy_(low)


def adam_step(
    p: Tensor,             # updated in place
    grad: Tensor,
    m: Tensor, v: Tensor,  # float32 state
    # 0-D CPU float32, so that one graph does for all: lr times bias correction, weight decay times lr squared
    step_size: Tensor, decay: Tensor, beta1: Tensor, beta2: Tensor,
    eps: float,
) -> None:
    """One Adam update with cautious decoupled decay. Source: arXiv 1412.6980; decay arXiv 2510.12402."""
    g, p32 = grad.float(), p.float()
    m.copy_(beta1 * m + (1 - beta1) * g)
    v.copy_(beta2 * v + (1 - beta2) * g.square())
    u = step_size * m / (v.sqrt() + eps)
    p.copy_(p32 - (u + decay * p32 * (u * p32 > 0)))
# fmt: on


# 8. optimizer: state, communication, order --------------------------------------------------------------
class Shard:
    """This rank's rows of a parameter, and the moves of its gradient and of its new value."""

    def __init__(self, full: Tensor, ranks: Ranks, is_sharded: bool) -> None:
        self.full = full
        self.world_size = ranks.world_size if is_sharded else 1
        self.is_replicated = not is_sharded and ranks.world_size > 1
        self.rows = -(-len(full) // self.world_size)
        self.first = self.rows * ranks.rank if is_sharded else 0

    def pad(self, rows: Tensor, count: int) -> Tensor:
        missing = count - len(rows)
        return torch.cat((rows, rows.new_zeros(missing, *rows.shape[1:]))) if missing else rows

    def own(self, full: Tensor) -> Tensor:
        """This rank's rows of `full`: a view, or a zero-padded copy where they run out."""
        return self.pad(full[self.first : self.first + self.rows], self.rows)

    def reduce(self, grad: Tensor) -> tuple[dist.Work | None, Tensor]:
        """Start summing the gradient over ranks; (what to wait for, where this rank's rows will be)."""
        grad = self.pad(grad.view(self.full.shape), self.rows * self.world_size)
        if self.is_replicated:
            return dist.all_reduce(grad, async_op=True), grad
        if self.world_size == 1:
            return None, grad
        mine = grad.new_empty(self.rows, *grad.shape[1:])
        scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)  # before torch 2.13
        return scatter(mine, grad, async_op=True), mine

    def gather(self, mine: Tensor, out: Tensor) -> Callable[[], None]:
        """Start collecting all ranks' rows into `out`; call the result to finish."""
        if self.world_size == 1:
            return lambda: None
        is_padded = self.rows * self.world_size != len(out)
        whole = out.new_empty(self.rows * self.world_size, *out.shape[1:]) if is_padded else out
        # NCCL has no 16-bit integers; gathering moves bits, whatever they are called.
        wire = [x.view(torch.bfloat16) if x.dtype == torch.int16 else x for x in (whole, mine.contiguous())]
        all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)  # before torch 2.13
        work = all_gather(*wire, async_op=True)

        def finish() -> None:
            work.wait()
            if is_padded:
                out.copy_(whole[: len(out)])

        return finish


def check_params(names: Sequence[str]) -> None:
    table = [row.name for row in PARAMS]
    duplicate = sorted({name for name in table if table.count(name) > 1})
    missing, extra = sorted(set(names) - set(table)), sorted(set(table) - set(names))
    if duplicate or missing or extra:
        raise ValueError(f"PARAMS does not match the model: {duplicate=}, {missing=}, {extra=}")


class NorMuonAndAdam:
    """Both optimizers. It knows only rows of PARAMS: reduced in table order, updated in `work` order."""

    def __init__(self, model: nn.Module, recipe: Recipe, ranks: Ranks, compiler: Callable) -> None:
        self.params, self.recipe = dict(model.named_parameters()), recipe
        check_params(list(self.params))
        self.is_tied = True
        self.shards, self.state, self.lr_muls, self.updates = {}, {}, {}, dict.fromkeys(self.params, 0)
        for row in PARAMS:
            p = self.params[row.name].detach()
            full = p.flatten(0, 1) if row.optim == "normuon" else p
            self.shards[row.name] = Shard(full, ranks, row.comms == "sharded")
            self._new_state(row, self.shards[row.name])
        self._normuon_step = compiler(normuon_step, dynamic=False)
        self._adam_step = compiler(adam_step, dynamic=False)

    def _new_state(self, row: Param, shard: Shard) -> None:
        mine = shard.own(shard.full)
        zeros = functools.partial(torch.zeros, device=mine.device)
        if row.optim == "adam":
            self.state[row.name] = {"m": zeros(mine.shape), "v": zeros(mine.shape)}
            return
        M, R, C = mine.shape
        second = (M, R, 1) if R >= C else (M, 1, C)
        self.state[row.name] = {"momentum": zeros(M, R, C), "second": zeros(second)}
        if mine.dtype == torch.bfloat16:
            self.state[row.name]["low"] = zeros(M, R, C, dtype=torch.int16)
        muls = [row.lr_mul[i % len(row.lr_mul)] for i in range(shard.first, shard.first + M)]
        self.lr_muls[row.name] = torch.tensor(muls, device=mine.device).view(M, 1, 1)

    @torch.no_grad()
    def step(self, sched: Sched) -> None:
        """Reduce, update and share every parameter that is due; clear the gradients that were used."""
        due = [row for row in PARAMS if row.optim == "normuon" or sched.is_adam_step]
        reductions, finishers = {}, {}
        for row in due:
            if follower := self._follower(row):
                kernels.transpose_add(self.params[row.name].grad, self.params[follower].grad)
            if not (row.tied_to and self.is_tied):
                reductions[row.name] = self.shards[row.name].reduce(self.params[row.name].grad)
        for row in WORK_ORDER:
            if row.name in reductions:
                work, grad = reductions.pop(row.name)
                if work:
                    work.wait()
                finishers[row.name] = self._update(row, grad, sched)
        for row in sorted(due, key=lambda row: self._follower(row) is None):  # what a copy waits for, first
            finishers.get(row.name, lambda: None)()
            if follower := self._follower(row):
                kernels.transpose_copy(self.params[follower], self.params[row.name])
        if self.is_tied and sched.step >= self.recipe.split_step:
            self._untie()
        for row in due:
            self.params[row.name].grad = None

    def _follower(self, row: Param) -> str | None:
        """The parameter that is a transposed copy of this one at present."""
        return next((other.name for other in PARAMS if self.is_tied and other.tied_to == row.name), None)

    def _update(self, row: Param, grad: Tensor, sched: Sched) -> Callable[[], None]:
        """Move this rank's rows; start sharing them; the result finishes that."""
        r, shard, state = self.recipe, self.shards[row.name], self.state[row.name]
        mine = shard.own(shard.full)
        self.updates[row.name] += 1
        if row.optim == "normuon":
            lr = r.muon_lr * sched.lr
            decay, mu = torch.tensor(r.muon_wd * row.wd_mul * lr), torch.tensor(sched.momentum)
            tensors = state["momentum"], state["second"], self.lr_muls[row.name] * lr, decay, mu
            self._normuon_step(mine, state.get("low"), grad, *tensors, r.muon_beta2)
        else:
            beta1, beta2 = row.betas
            lr, t = r.adam_lr * row.lr_mul[0] * sched.lr, self.updates[row.name]
            step_size = torch.tensor(lr * (1 - beta2**t) ** 0.5 / (1 - beta1**t))
            decay = torch.tensor(lr * lr * r.adam_wd * row.wd_mul)
            # Elementwise, so one graph does for all; rows of known width load 7 times as fast as flat views.
            width = ADAM_WIDTH if mine.numel() % ADAM_WIDTH == 0 < mine.numel() - ADAM_WIDTH else 1
            rows = [x.view(-1, width) for x in (mine, grad, state["m"], state["v"])]
            for x in rows:
                torch._dynamo.mark_dynamic(x, 0)
            self._adam_step(*rows, step_size, decay, *map(torch.tensor, row.betas), r.adam_eps)
        return shard.gather(mine, shard.full)

    def _untie(self) -> None:
        """Give every tied parameter a state of its own: the transposed moments of its source."""
        for row in PARAMS:
            if row.tied_to:
                source, own = self._full_state(row.tied_to), self.shards[row.name].own
                self.state[row.name] = {k: own(x.T).contiguous() for k, x in source.items()}
                self.updates[row.name] = self.updates[row.tied_to]
        self.is_tied = False

    def _full_state(self, name: str) -> dict[str, Tensor]:
        shard, full = self.shards[name], {}
        for key, x in self.state[name].items():
            full[key] = x if shard.world_size == 1 else x.new_empty(len(shard.full), *x.shape[1:])
            shard.gather(x, full[key])()
        return full

    def state_dict(self) -> dict:
        """Whole tensors on the CPU, whatever the world size. Every rank must call it."""
        tensors = {n: {k: x.to("cpu", copy=True) for k, x in self._full_state(n).items()} for n in self.state}
        return {"is_tied": self.is_tied, "updates": dict(self.updates), "tensors": tensors}

    def load_state_dict(self, saved: dict | None) -> None:
        """To a saved state, bitwise, in place; None: as new, embedding and head tied."""
        saved = saved or {"is_tied": True, "updates": dict.fromkeys(self.params, 0), "tensors": None}
        self.is_tied, self.updates = saved["is_tied"], dict(saved["updates"])
        for name, state in self.state.items():
            for key, x in state.items():
                x.zero_()
                if saved["tensors"]:
                    x.copy_(self.shards[name].own(saved["tensors"][name][key].to(x.device)))


# 9. run: build, warm up, validate, train ----------------------------------------------------------------
@dataclass(kw_only=True, slots=True)
class Job:
    """Everything a run needs, made by `build`."""

    cfg: Config
    ranks: Ranks
    corpus: Corpus
    model: GPT
    forward: Callable  # the model, compiled where that pays
    optimizer: NorMuonAndAdam
    val: ValSet
    max_docs: int  # most documents in a slot of any step
    mtp_SK: Tensor  # float32 [steps + 1, 3], on the device
    clock: Clock
    start: dict  # where the warm-up ends: the checkpoint to resume from, or one of step 0; on the host
    log: Log | None = None  # opened when all input has been checked
    passes: "Passes | None" = None
    first_step: int = 0
    checkpoint_every: int = 0

    def knobs(self, sched: Sched) -> Knobs:
        short, long = (torch.tensor(window) for window in sched.windows)
        scale = torch.tensor(yarn(self.cfg.recipe, sched.stage)[1], dtype=torch.float32)
        return Knobs(short, long, scale, self.mtp_SK[sched.step].clone())

    def save(self, step: int) -> None:
        """Write all the rest depends on, gradients that wait for Adam's odd step too. Every rank calls it."""
        recipe, data = self.cfg.recipe.name, self.corpus.sha256
        saved = {"step": step, "train_ms": self.clock.ms(), "recipe": recipe, "data": data}
        saved |= {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        grads = {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}
        saved["grads"] = {name: self.ranks.sum(grad.clone()) for name, grad in grads.items()}
        if self.ranks.rank == 0:
            path = self.log.path.with_suffix(".ckpt")
            atomically(path, lambda temporary: torch.save(saved, temporary))
            self.log.say(f"checkpoint: step {step} in {path}")

    def restore(self, saved: dict) -> None:
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.first_step, self.clock.elapsed_ms = saved["step"], saved["train_ms"]
        grads = saved["grads"] if self.ranks.rank == 0 else {}  # they are summed over ranks already
        for name, p in self.model.named_parameters():
            p.grad = grads[name].to(p.device) if name in grads else None


def read_checkpoint(path: Path, job: Job) -> None:
    """Continue where a checkpoint of this recipe and data ends; only tensors and numbers are unpickled."""
    try:
        with warnings.catch_warnings(action="ignore"):
            saved = torch.load(path, map_location="cpu", weights_only=True)
        found, wanted = (saved["recipe"], saved["data"]), (job.cfg.recipe.name, job.corpus.sha256)
        if found == wanted:
            job.restore(saved)
            job.start = saved
    except Exception as error:  # whatever a foreign file makes torch.load raise
        reason = f"{type(error).__name__}: {error}".split("\n")[0]
        raise InputError(f"checkpoint {path} is not one of this trainer ({reason}); name another") from None
    if found != wanted:
        raise InputError(f"checkpoint {path} is of recipe and data {found}, this run of {wanted}; use those")


def compiler_for(recipe: Recipe, device: torch.device) -> tuple[Callable, list[str]]:
    """torch.compile, or no compilation where it does not pay or cannot work; and what there is to say."""
    reason = None
    if device.type == "cpu" and not recipe.cpu_compile:
        reason = f"compiling recipe {recipe.name} for a CPU takes longer than it saves"
    elif device.type == "cpu" and not any(map(shutil.which, ("c++", "g++", "clang++"))):
        reason = "torch.compile needs a C++ compiler, and none is on the path"
    if reason:
        return lambda fn, **_: fn, [f"compile: no, running eagerly ({reason})"]
    return functools.partial(torch.compile, fullgraph=True), []


class Passes:
    """Forward and backward of one micro-batch: adds its gradients, returns its summed token loss, detached.

    On a GPU it is recorded once a stage as a CUDA graph and replayed, so that no kernel waits for the host.
    """

    def __init__(self, job: Job) -> None:
        self.job, self.graphs, self.pool, self.params = job, {}, None, list(job.model.parameters())
        # A graph writes to fixed addresses: these take the place of gradients made anew.
        self.grads = [torch.empty_like(p) for p in self.params] if job.ranks.device.type == "cuda" else []

    def eager(self, micro: Sequence[Tensor], knobs: Knobs) -> Tensor:
        loss = self.job.forward(*micro, self.job.cfg.recipe.max_seq_len, knobs)
        (loss * GRAD_SCALE).backward()
        return loss.detach()

    def __call__(self, micro: Batch, sched: Sched) -> Tensor:
        knobs = self.job.knobs(sched)
        if not self.grads:
            return self.eager(micro, knobs)
        for p, grad in zip(self.params, self.grads, strict=True):
            if p.grad is not grad:
                p.grad = grad.zero_() if p.grad is None else grad.copy_(p.grad)
        if sched.stage not in self.graphs:
            *batch, mtp_K = inputs = [x.clone() for x in (*micro, knobs.mtp_K)]
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, self.pool, capture_error_mode="thread_local"):  # NCCL's may go on
                loss = self.eager(batch, knobs._replace(mtp_K=mtp_K))
            self.graphs[sched.stage], self.pool = (graph, inputs, loss), graph.pool()
        graph, inputs, loss = self.graphs[sched.stage]
        for there, here in zip(inputs, (*micro, knobs.mtp_K), strict=True):
            there.copy_(here)
        graph.replay()
        return loss.clone()


def warm_up(job: Job) -> None:
    """Compile, record: every kind of pass and step on random tokens, which cannot teach; then reset."""
    cfg, r, gen = job.cfg, job.cfg.recipe, np.random.default_rng(0)
    per_rank, first, seconds = cfg.slots // job.ranks.world_size, 0, {}
    job.model.zero_grad(set_to_none=True)

    def timed(what: str, call: Callable, *arguments: object) -> None:
        began, _ = time.perf_counter(), job.log.progress(f"warm-up: {what}")
        call(*arguments)
        job.clock.synchronize()
        seconds[what] = seconds.get(what, 0) + time.perf_counter() - began

    for stage in r.stages:
        slot_tokens, sched = stage.batch_tokens // cfg.slots, at(r, first)
        size = slots_per_pass(per_rank, slot_tokens, r.micro_tokens)
        noise = gen.integers(0, cfg.vocab_size, (size, slot_tokens + 1), dtype=np.uint16)
        slots = [(row, np.arange(0, slot_tokens, r.max_seq_len)) for row in noise]
        micro = to_device(pack_batch(slots, size * job.max_docs), job.ranks.device)
        timed("training graph", job.passes.eager, micro, job.knobs(sched))
        if job.passes.grads:
            timed("recording", job.passes, micro, sched)
        first += stage.steps
    for is_adam_step, step in ((False, 0), (True, 0), (True, r.split_step)):  # the last unties
        job.passes(micro, sched)
        timed("optimizer", job.optimizer.step, replace(sched, step=step, is_adam_step=is_adam_step))
    timed("evaluation graph", validate, job, at(r, 0), 1)
    job.log.say("warm-up: " + ", ".join(f"{what} {s:.1f} s" for what, s in seconds.items()))
    torch.cuda.empty_cache()  # passes that are recorded have memory of their own
    job.restore(job.start)


@torch.no_grad()
def validate(job: Job, sched: Sched, limit: int | None = None) -> tuple[float, float]:
    """(mean nats per token, bits per byte) over the validation tokens of all ranks."""
    val, knobs = job.val, job.knobs(sched)
    total = torch.zeros((), dtype=torch.float64, device=job.ranks.device)
    job.model.eval()
    for i, slot in enumerate(val.slots[:limit]):
        job.log.progress(f"validating: {i + 1}/{len(val.slots)}")
        batch = to_device(pack_batch([slot], val.max_docs), job.ranks.device)
        total += job.forward(*batch, val.max_seq_len, knobs)
    job.model.train()
    nats = float(job.ranks.sum(total))
    return nats / val.num_tokens, nats / math.log(2) / val.num_bytes


class Ended(BaseException):  # a signal raises it anywhere: no `except Exception` on the way may take it
    """The run ends before its schedule does; its arguments are the log's status and the exit code."""


class StopRequest:
    """SIGINT and SIGTERM: in the training loop the first asks for the end of the step, else at once."""

    def __init__(self) -> None:
        self.is_set, self.in_loop = False, False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: object) -> None:
        if self.is_set or not self.in_loop:
            raise Ended(f"interrupted at {'an unfinished step' if self.in_loop else 'the start'}", 130)
        self.is_set = True


class Monitor:
    """Losses and stop requests, agreed on by all ranks, read `lag` steps later so that no step waits."""

    def __init__(self, job: Job) -> None:
        self.job, self.recipe, self.device = job, job.cfg.recipe, job.ranks.device
        self.lag = 2 if self.device.type == "cuda" else 0
        self.waiting, self.recent = deque(), deque(maxlen=20)
        self.tokens = [stage.batch_tokens for stage in self.recipe.stages for _ in range(stage.steps)]

    def put(self, step: int, loss: Tensor, wants_stop: bool) -> None:
        values, event = self.job.ranks.sum(torch.stack((loss, torch.full_like(loss, wants_stop)))), None
        if self.device.type == "cuda":  # into pinned memory: a copy into other memory waits for the device
            values = torch.empty(2, pin_memory=True).copy_(values, non_blocking=True)
            event = torch.cuda.current_stream().record_event()
        self.waiting.append((step, values, event))

    def drain(self, everything: bool = False) -> bool:
        """Log the steps whose losses have arrived; whether some rank wants to stop. Raises Ended."""
        wants_stop = False
        while len(self.waiting) > (0 if everything else self.lag):
            step, values, event = self.waiting.popleft()
            if event:
                event.synchronize()
            loss, stop = (values / torch.tensor([self.tokens[step], 1])).tolist()
            if not math.isfinite(loss):
                raise Ended(f"diverged at step {step + 1}: training loss is {loss}", 3)
            wants_stop |= bool(stop)
            self._report(step + 1, loss)
        return wants_stop

    def _report(self, done: int, loss: float) -> None:
        total, ms = self.recipe.total_steps, self.job.clock.ms()
        self.job.log.step(f"{done}/{total} train_loss:{loss:.4f}", ms, done)
        self.recent.append((ms, self.tokens[done - 1]))
        if len(self.recent) > 1:
            span = self.recent[-1][0] - self.recent[0][0]
            rate = 1000 * sum(n for _, n in list(self.recent)[1:]) / max(span, 1e-3)
            eta = sum(self.tokens[done:]) / rate
            self.job.log.progress(
                f"step {done}/{total} | loss {loss:.4f} | {span / (len(self.recent) - 1):.1f} ms/step | "
                f"{rate:,.0f} tokens/s | ETA {eta:.0f} s | {peak_memory(self.device)[0]:,} MiB"
            )


def peak_memory(device: torch.device) -> tuple[int, int]:
    """(allocated, reserved) MiB at their highest; on a CPU the process's resident set stands for both."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) >> 20, torch.cuda.max_memory_reserved(device) >> 20
    shift = 20 if sys.platform == "darwin" else 10  # bytes on macOS, KiB on Linux
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> shift,) * 2


def train(job: Job, stop: StopRequest) -> dict[str, object]:
    """The timed loop; the result that goes into the JSON twin."""
    r, clock, monitor, stage, last = job.cfg.recipe, job.clock, Monitor(job), None, job.cfg.recipe.total_steps
    stop.in_loop = True
    clock.start()
    stream = batches(job.cfg, job.ranks, job.corpus, job.max_docs, job.first_step)
    for step in range(job.first_step, last + 1):
        sched = at(r, step)
        if sched.stage != stage:
            stage = sched.stage
            job.model.set_rotary(yarn(r, stage)[0])
        if step == last or step % r.val_every == 0:
            with clock.paused():
                monitor.drain(everything=True)
                loss, bpb = validate(job, sched)
                job.log.step(f"{step}/{last} val_loss:{loss:.4f}", clock.ms(), step, f" val_bpb:{bpb:.4f}")
                if not math.isfinite(loss):
                    raise Ended(f"diverged at step {step}: validation loss is {loss}", 3)
        if step == last:
            break
        losses = [job.passes(micro, sched) for micro in next(stream)]
        job.optimizer.step(sched)
        monitor.put(step, torch.stack(losses).sum(), stop.is_set)
        is_last = monitor.drain()
        if job.checkpoint_every and (is_last or (step + 1) % job.checkpoint_every == 0):
            with clock.paused():
                job.save(step + 1)
        if is_last:
            raise Ended(f"interrupted at step {step + 1}: asked to by a signal", 130)
    mib, reserved = peak_memory(job.ranks.device)
    job.log.say(f"peak memory allocated: {mib} MiB reserved: {reserved} MiB")
    return dict(val_loss=loss, val_bpb=bpb, train_time_ms=clock.ms(), steps=last, peak_memory_mib=mib)


def describe(args: argparse.Namespace, cfg: Config, ranks: Ranks, corpus: Corpus) -> dict[str, object]:
    """The conditions of a run, as the log's header states them."""
    status, git = output_of("git", "-C", str(PROJECT), "status", "--porcelain"), ("git", "-C", str(PROJECT))
    return {
        "run_id": uuid.uuid4(), "host": socket.gethostname(), **machine_lines(ranks.device),
        "commit": output_of(*git, "rev-parse", "HEAD") or "unknown",
        "dirty": "unknown" if status is None else str(bool(status)).lower(),
        "data": f"sha256={corpus.sha256}", "recipe": cfg.recipe.name, "seed": args.seed,
        "world_size": ranks.world_size, "slots": cfg.slots, "dtype": str(cfg.dtype).removeprefix("torch."),
        "attention": cfg.attention, "fp8": " ".join(cfg.fp8) or "no", "target": cfg.recipe.target,
        **({"resumed": args.resume} if args.resume else {}),
        "command": " ".join(sys.argv), "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }  # fmt: skip


def configure(args: argparse.Namespace, ranks: Ranks, corpus: Corpus) -> tuple[Config, list[str]]:
    """The Config, and the lines that say what the machine decided."""
    recipe, lines = RECIPES[args.recipe], []
    if recipe.tokenizer and corpus.tokenizer != recipe.tokenizer:
        found = f"recipe {recipe.name} is defined for {recipe.tokenizer} tokens, these are {corpus.tokenizer}"
        raise InputError(f"{found}; prepare the text with data/prepare.py --tokenizer {recipe.tokenizer}")
    slots = packing(recipe, ranks.world_size)
    if slots != recipe.slots:
        lines.append(f"packing: {slots} slots instead of {recipe.slots}, documents are cut in other places")
    dtype = torch.bfloat16 if ranks.device.type == "cuda" else torch.float32
    backends = kernels.attention_backends(ranks.device, dtype)
    backend = next(name for name, is_usable, _ in backends if is_usable)
    reasons = "; ".join(f"no {name}: {why}" for name, is_usable, why in backends if not is_usable)
    lines.append(f"attention backend {backend}" + (f" ({reasons})" if reasons else ""))
    reason, instead = kernels.fp8_available(ranks.device)[1], str(dtype).removeprefix("torch.")
    problems = {x: reason or (kernels.tma_problem(ranks.device) if x == "mlp" else None) for x in recipe.fp8}
    lines += [f"{x}: {instead} instead of FP8 ({problems[x]})" for x in recipe.fp8 if problems[x]]
    return Config(
        recipe=recipe, vocab_size=corpus.vocab_size, slots=slots, dtype=dtype, attention=backend,
        fp8=tuple(x for x in recipe.fp8 if not problems[x]),
    ), lines  # fmt: skip


def build(args: argparse.Namespace, cfg: Config, ranks: Ranks, corpus: Corpus) -> tuple[Job, list[str]]:
    """Data, model and optimizer on this rank's device; and what there is to say. Raises InputError."""
    r, per_slot = cfg.recipe, check_train_data(cfg.recipe, cfg.slots, corpus)
    val, (compiler, lines) = ValSet.read(r, corpus, ranks), compiler_for(r, ranks.device)
    model = GPT(cfg, args.seed)
    initial = {name: x.clone() for name, x in model.state_dict().items()}
    model.to(ranks.device)
    job = Job(
        cfg=cfg, ranks=ranks, corpus=corpus, model=model, forward=compiler(model, dynamic=True), val=val,
        optimizer=NorMuonAndAdam(model, r, ranks, compiler), max_docs=round_up(per_slot, 64),
        mtp_SK=torch.tensor([at(r, step).mtp for step in range(r.total_steps + 1)]).to(ranks.device),
        clock=Clock(ranks.device), checkpoint_every=args.checkpoint_every,
        start={"step": 0, "train_ms": 0.0, "model": initial, "optimizer": None, "grads": {}},
    )  # fmt: skip
    job.passes = Passes(job)
    if args.resume:
        read_checkpoint(args.resume, job)
    return job, lines


def run(args: argparse.Namespace, ranks: Ranks, stop: StopRequest) -> int:
    """One run, arguments to closing line; the exit code. All input is checked before the log is opened."""
    began, corpus = time.perf_counter(), Corpus.open(args.data)
    cfg, lines = configure(args, ranks, corpus)
    job, more = build(args, cfg, ranks, corpus)
    log = job.log = Log(args.out, is_master=ranks.rank == 0)
    try:
        log.header(map(Path, (__file__, kernels.__file__)), describe(args, cfg, ranks, corpus))
        log.say("\n".join([*lines, *more, f"data and model: {time.perf_counter() - began:.1f} s"]))
        with ranks.process_group():
            warm_up(job)
            log.say(f"warm-up: done {time.perf_counter() - began:.1f} s after the start")
            if args.profile:
                sys.path.append(str(PROJECT / "benchmarks"))
                log.close("profiled", importlib.import_module("step_profile").run(job, sys.modules[__name__]))
                return 0
            log.close("done", train(job, stop))
        return 0
    except Ended as end:
        log.close(end.args[0], {})
        return end.args[1]
    except BaseException as error:
        log.close(f"crashed: {type(error).__name__}: {error}".split("\n")[0], {})
        raise


# 10. main -----------------------------------------------------------------------------------------------
def refuse(message: str) -> None:
    """argparse's own errors in one line."""
    raise InputError(f"{message}; use what --help lists")


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    sizes = (f"{r.name} {r.total_steps} steps, {r.train_tokens / 1e6:.1f} M tokens" for r in RECIPES.values())
    parser = argparse.ArgumentParser(
        prog="train_gpt.py",
        description=__doc__.split("\n\n")[0],
        epilog=f"Recipes (section 1 of this file): {'; '.join(sizes)}. Exit codes: 0 done, 2 bad input, "
        "3 diverged, 130 stopped by a signal. Also runs under torchrun.",
    )
    add, default = parser.add_argument, "short" if torch.cuda.is_available() else "tiny"
    add("--recipe", default=default, help=f"one of {', '.join(RECIPES)}; default short with a GPU, else tiny")
    add("--data", type=Path, help="folder of shards; default data/default for tiny, else data/fineweb10B")
    add("--out", type=Path, help="log file to write; default logs/<recipe>/<run id>.txt")
    add("--seed", type=int, default=1, help="of the initial parameters; default 1")
    add("--resume", type=Path, metavar="CKPT", help="continue from this checkpoint")
    add("--checkpoint-every", type=int, default=0, metavar="N", help="steps; goes beside the log; 0: never")
    add("--profile", action="store_true", help="do not train: a table of where a step goes, and a trace")
    parser.error = refuse
    args = parser.parse_args(argv)
    if args.profile and (args.resume or args.checkpoint_every):
        raise InputError("--profile makes no run to resume or to save; use it without these two options")
    if args.recipe not in RECIPES:
        raise InputError(f"recipe {args.recipe!r} does not exist; choose one of {', '.join(RECIPES)}")
    if args.checkpoint_every < 0 or not 0 <= args.seed < 2**63:
        found = f"--checkpoint-every {args.checkpoint_every}, --seed {args.seed}"
        raise InputError(f"{found}: must be whole numbers from 0 on, the seed below 2**63; use such")
    args.data = args.data or PROJECT / "data" / ("default" if args.recipe == "tiny" else "fineweb10B")
    args.out = args.out or Path("logs") / args.recipe / f"{uuid.uuid4()}.txt"
    return args


def main() -> int:
    try:
        return run(parse(), Ranks.from_torchrun(), StopRequest())
    except (InputError, OSError, Ended) as error:  # OSError: a full disk, a shard that went away
        message, code = error.args if isinstance(error, Ended) else (f"error: {error}", 2)
        if os.environ.get("LOCAL_RANK", "0") == "0":  # of each host: it alone may lack something
            print(f"train_gpt.py: {message}", file=sys.stderr)
        return code


if __name__ == "__main__":
    sys.exit(main())
