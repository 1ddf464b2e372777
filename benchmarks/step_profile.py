"""Where a training step goes: a table for each stage, and a trace that Perfetto and chrome://tracing open.

    python train_gpt.py --profile                                    one process: CPU or one GPU
    torchrun --standalone --nproc_per_node=2 train_gpt.py --profile  the table is that of rank 0

The job, its data and its warm-up are those of training: on a GPU the warm-up records every stage's graph, and
all steps here replay it. Each stage runs some steps unprofiled, and one even and one odd step (Adam moves on
odd ones) under torch.profiler, right behind a step that keeps the queue full: the window begins when the last
kernel of the step before ends, and ends with the last of the odd step. Every instant of the window is given
to one row, so the rows sum to the step. Where kernels of several streams run, compute goes before
communication, and that before copies: communication's `ms` is what is exposed. A collective runs while it
waits for the slowest rank, so its time is not all traffic. `launches` counts each kernel of a graph, though
the host launches them at once.

On a CPU the events are operators, each for the time it spends outside of those that it calls; read shares,
not times. Inside one of the project's own operators all counts as that.
"""

import contextlib
import gzip
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile, record_function

SETTLE_STEPS, TIMED_STEPS = 3, 4  # unprofiled; one more is traced before the window begins
TOP_KERNELS = 25

# 1. rules -----------------------------------------------------------------------------------------------
OPTIMIZER, COMMUNICATION, OTHER, GAPS = "optimizer", "communication", "other", "host gaps"
PRODUCTS, ENTROPY, COPIES = "matrix products", "cross-entropy", "copies and fills"
ELEMENTWISE, EMBEDDING, TRANSPOSES = "elementwise, reductions", "embeddings", "transposes"
# The first rule that is found in the name of a kernel or CPU operator names its row.
RULES = (
    (COMMUNICATION, r"nccl|^c10d::|gloo|param_comms"),
    (
        COPIES,
        r"^(Mem(cpy|set)|memcpy\d)|FillFunctor|^aten::(copy_|_to_copy|to|clone|contiguous|fill_|zero_)$",
    ),
    # Inductor's names list what a kernel fuses: with a gather or scatter in it, it is counted as that.
    (EMBEDDING, r"embedding|index_(put|add|select)|indexing_backward|scatter|gather|RadixSort|^aten::index"),
    (ELEMENTWISE, r"^triton_(poi|red|per|for)_"),
    ("attention", r"(?i)flash|fmha|attention|_attn"),
    (ENTROPY, r"_ce_(forward|backward)|cross_entropy|nll_loss|log_?softmax|logsumexp"),
    (TRANSPOSES, r"_transpose_|^splits::(transpose|columns8)"),
    # The FP8 head makes its loss as well, but on a CPU its operator cannot be told apart.
    (
        PRODUCTS,
        r"_relu2_kernel|_symmetric_kernel|^splits::(fp8_\w+|product8|linear_relu2\w*|xxt|ba_plus_caa)",
    ),
    (PRODUCTS, r"(?i)gemm|gemv|nvjet|cutlass|xmma|cublas|splitK|^triton_(tem|mm)"),
    (PRODUCTS, r"^aten::(mm|bmm|addmm|baddbmm|dot|mv|_scaled_mm)$"),
    (ELEMENTWISE, r"elementwise|reduce_kernel|CatArray|softmax|norm|prepare_qkv|cub::|^aten::|^detach"),
)
ROWS = (PRODUCTS, "attention", ENTROPY, TRANSPOSES, ELEMENTWISE, EMBEDDING, OPTIMIZER)
ROWS += (OTHER, COMMUNICATION, COPIES, GAPS)  # who comes first gets an instant that several rows claim


def classify(name: str, is_in_optimizer: bool = False) -> str:
    """The row of a kernel. All that the optimizer's step launches is its own, but for communication."""
    row = next((row for row, pattern in RULES if re.search(pattern, name)), OTHER)
    return OPTIMIZER if is_in_optimizer and row != COMMUNICATION else row


# 2. events of a trace -----------------------------------------------------------------------------------
Window = tuple[float, float]  # microseconds of the trace's clock


class Event(NamedTuple):
    """A kernel or copy on a GPU, or a piece of a CPU operator. Times in microseconds."""

    name: str
    row: str
    begin: float
    end: float
    launched: float  # when the host asked for it
    calls: int = 1  # 0 for the later pieces of an operator that others interrupt


def read_trace(path: Path) -> list[dict]:
    """The complete events of an exported trace."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [event for event in json.load(file)["traceEvents"] if event.get("ph") == "X"]


def ranges(trace: list[dict], name: str) -> list[dict]:
    """Host ranges that `record_function` made."""
    return [e for e in trace if e.get("cat") == "user_annotation" and e["name"] == name]


def is_within(spans: list[dict], time: float) -> bool:
    return any(e["ts"] <= time <= e["ts"] + e["dur"] for e in spans)


def device_events(trace: list[dict]) -> list[Event]:
    """Kernels, copies and fills; the launch is the driver's or runtime's call of the same correlation.

    All that a graph runs has the correlation of the graph's launch.
    """
    calls = [e for e in trace if e.get("cat") in ("cuda_runtime", "cuda_driver")]
    launches = {e["args"]["correlation"]: e["ts"] for e in calls if "correlation" in e.get("args", {})}
    optimizer, events = ranges(trace, OPTIMIZER), []
    for e in trace:
        if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset"):
            launched = launches.get(e["args"].get("correlation"), e["ts"])
            # By time alone: while the optimizer steps, no other thread launches anything.
            row = classify(e["name"], is_within(optimizer, launched))
            events.append(Event(e["name"], row, e["ts"], e["ts"] + e["dur"], launched))
    return events


def host_events(trace: list[dict], tid: object) -> list[Event]:
    """The operators of one thread, cut into the pieces in which no operator that they call runs."""
    is_engine = re.compile(r"^autograd::|Backward\d*$|AccumulateGrad$").search  # what they call is counted
    ops = [e for e in trace if e.get("cat") == "cpu_op" and e["tid"] == tid and not is_engine(e["name"])]
    ops = [e for e in ops if e["dur"] > 0]
    edges = [(e["ts"], 1, -e["dur"], i) for i, e in enumerate(ops)]
    edges += [(e["ts"] + e["dur"], 0, 0, i) for i, e in enumerate(ops)]
    optimizer, pieces, stack, begun, now = ranges(trace, OPTIMIZER), [], [], set(), 0.0
    for time, is_begin, _, i in sorted(edges):
        if stack:
            own = next((j for j in stack if ops[j]["name"].startswith("splits::")), stack[-1])
            row, name = classify(ops[own]["name"], is_within(optimizer, now)), ops[stack[-1]]["name"]
            pieces.append(Event(name, row, now, time, now, int(stack[-1] not in begun)))
            begun.add(stack[-1])
        stack.append(i) if is_begin else stack.remove(i)
        now = time
    return pieces


def device_window(events: list[Event], steps: Sequence[dict]) -> Window:
    """From the end of all that was launched before the first step to the end of what the steps launched."""
    first, last = steps[0]["ts"], steps[-1]["ts"] + steps[-1]["dur"]
    assert any(first <= e.launched < last for e in events), "the profiler saw no kernel: is CUPTI usable?"
    begin = max((e.end for e in events if e.launched < first), default=first)
    return begin, max(e.end for e in events if e.launched < last)


# 3. accounting ------------------------------------------------------------------------------------------
class Row(NamedTuple):
    """One line of the table; times and calls are of one step."""

    name: str
    ms: float  # of the step's wall time; all rows sum to it
    share: float
    calls: float
    busy_ms: float  # sum over kernels, those that run side by side counted each
    roofline: float | None = None  # least time at the ceilings over the time taken


class Kernel(NamedTuple):
    name: str
    row: str
    ms: float  # a step
    calls: float


def paint(events: list[Event], window: Window) -> Counter:
    """Microseconds of the window by row: each instant goes to the first of ROWS that is active."""
    edges = []
    for e in events:
        begin, end = max(e.begin, window[0]), min(e.end, window[1])
        if begin < end:
            edges += (begin, 1, ROWS.index(e.row)), (end, -1, ROWS.index(e.row))
    spent, active, now = Counter(), [0] * len(ROWS), window[0]
    for time, change, row in sorted(edges):
        spent[next((ROWS[i] for i, count in enumerate(active) if count), GAPS)] += time - now
        active[row] += change
        now = time
    spent[GAPS] += window[1] - now
    return spent


def account(events: list[Event], window: Window, num_steps: int, least_ms: dict[str, float]) -> list[Row]:
    """All rows of the table, in order, the empty ones too."""
    spent, rows, step_us = paint(events, window), [], (window[1] - window[0]) / num_steps
    for name in ROWS:
        mine = [e for e in events if e.row == name and window[0] <= e.begin < window[1]]
        us, busy = spent[name] / num_steps, sum(e.end - e.begin for e in mine) / num_steps
        roofline = 1e3 * least_ms[name] / us if name in least_ms and us else None
        calls = sum(e.calls for e in mine) / num_steps
        rows.append(Row(name, us / 1e3, us / step_us, calls, busy / 1e3, roofline))
    return rows


def kernels_by_cost(events: list[Event], window: Window, num_steps: int) -> list[Kernel]:
    """All kernels, the dearest first."""
    ms, calls = Counter(), Counter()
    for e in events:
        if window[0] <= e.begin < window[1]:
            ms[e.name, e.row] += (e.end - e.begin) / 1e3 / num_steps
            calls[e.name, e.row] += e.calls / num_steps
    return [Kernel(*key, cost, calls[key]) for key, cost in ms.most_common()]


# 4. rooflines -------------------------------------------------------------------------------------------
class Ceiling(NamedTuple):
    bf16_flops: float
    fp8_flops: float
    bytes_s: float


# What the best kernel reaches, less than the datasheet. Measured on H200s, see LOG.md: 8,192^3 bf16 product
# 770 to 800 TFLOP/s, copy 4.3 TB/s (read plus written). FP8 is twice bf16 as in the datasheet, not measured.
CEILINGS = {"H200": Ceiling(790e12, 1580e12, 4.3e12)}


def flops_per_token(cfg) -> tuple[float, float]:
    """(all, in FP8) of products with matrices, both ways; attention's own, a few percent, are left out."""
    r = cfg.recipe
    attending = sum(bool(layer.attn) for layer in r.layers)
    weights = {
        "qkv": 3 * attending * r.model_dim**2, "out": attending * r.model_dim**2,
        "mlp": 2 * len(r.layers) * r.model_dim * r.hidden_dim, "head": r.model_dim * cfg.padded_vocab,
    }  # fmt: skip
    # All three products of each, but that of the output projection's gradient.
    eight = sum((4.0 if name == "out" else 6.0) * weights[name] for name in cfg.fp8)
    return 6.0 * sum(weights.values()), eight


def least_times(job, tg: ModuleType, batch_tokens: int, ceiling: Ceiling) -> dict[str, float]:
    """Least ms a step of the rows whose arithmetic and traffic are known without asking the kernels."""
    cfg, tokens = job.cfg, batch_tokens / job.ranks.world_size
    flops, eight = flops_per_token(cfg)
    products_s = (flops - eight) / ceiling.bf16_flops + eight / ceiling.fp8_flops
    # bf16 logits are read forward and backward, and their gradient is written: in FP8 one byte each.
    logits_bytes = tokens * cfg.padded_vocab * (2 + 2 + (1 if "head" in cfg.fp8 else 2))
    optimizer_s = least_optimizer(job.optimizer, tg, ceiling)
    times = {PRODUCTS: tokens * products_s, ENTROPY: logits_bytes / ceiling.bytes_s, OPTIMIZER: optimizer_s}
    return {name: 1e3 * seconds for name, seconds in times.items()}


def least_optimizer(optimizer, tg: ModuleType, ceiling: Ceiling) -> float:
    """Seconds a step: state and parameter read and written, gradient read; polar express on top.

    Mean of even and odd steps. A symmetric product is half its FLOPs; what polar express moves is left out.
    """
    moved = flops = 0.0
    for row in tg.PARAMS:
        p, state = optimizer.params[row.name], optimizer.state[row.name]
        if row.tied_to and optimizer.is_tied:
            moved += 5 * p.nbytes / 2  # its gradient is added to the source's, whose new value is copied
            continue
        own = next(iter(state.values()))
        bytes_moved = 2 * sum(x.nbytes for x in state.values()) + 3 * own.numel() * p.element_size()
        moved += bytes_moved if row.optim == "normuon" else bytes_moved / 2
        if row.optim == "normuon":
            num, (small, large) = len(own), sorted(own.shape[1:])
            iteration = small**2 * large + small**3 + 2 * small**2 * large
            flops += len(tg.POLAR_COEFFICIENTS) * num * iteration
    return moved / ceiling.bytes_s + flops / ceiling.bf16_flops


# 5. tables ----------------------------------------------------------------------------------------------
def markdown(lines: Sequence[Sequence[str]], num_left: int) -> str:
    """A table that aligns in a terminal too; the first columns are text, the others numbers."""
    width = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rule = ["-" * n if i < num_left else "-" * (n - 1) + ":" for i, n in enumerate(width)]
    text = []
    for line in (lines[0], rule, *lines[1:]):
        cells = zip(line, width, strict=True)
        padded = [c.ljust(n) if i < num_left else c.rjust(n) for i, (c, n) in enumerate(cells)]
        text.append(f"| {' | '.join(padded)} |")
    return "\n".join(text)


def shorten(name: str, width: int = 64) -> str:
    """A kernel's name without return type, namespaces and what does not fit."""
    name = re.sub(r"\(anonymous namespace\)::|\b(?!aten|splits|c10d)\w+::|^void ", "", name).replace("|", "/")
    return name if len(name) <= width else name[: width - 3] + "..."


def report(rows: list[Row], kernels: list[Kernel]) -> str:
    """The table of a stage, what no rule knows, and the kernels that cost most."""
    lines = [("where", "ms", "share", "launches", "busy ms", "of roofline")]
    for row in (*rows, Row("step", *(sum(row[i] for row in rows) for i in range(1, 5)))):
        roofline = "-" if row.roofline is None else f"{row.roofline:.0%}"
        numbers = f"{row.ms:.3f}", f"{row.share:.1%}", f"{row.calls:g}", f"{row.busy_ms:.3f}", roofline
        lines.append((row.name, *numbers))
    comm, unknown = rows[ROWS.index(COMMUNICATION)], [k for k in kernels if k.row == OTHER]
    top = [(shorten(k.name), k.row, f"{k.ms:.3f}", f"{k.calls:g}") for k in kernels[:TOP_KERNELS]]
    return "\n".join((
        markdown(lines, 1),
        f"communication: {comm.busy_ms:.3f} ms a step, {comm.ms:.3f} ms of it exposed",
        f"kernels that no rule knows: {len(unknown)}",
        *(f"  {shorten(k.name)}: {k.ms:.3f} ms, {k.calls:g} launches" for k in unknown),
        markdown([(f"the {len(top)} that cost most", "row", "ms", "launches"), *top], 2),
    ))  # fmt: skip


# 6. the steps -------------------------------------------------------------------------------------------
def plans(recipe) -> Iterator[tuple[int, int, int]]:
    """(stage, first step to run, even step to profile) of every stage but the extension, the last's twin."""
    end = 0
    for number, stage in enumerate(recipe.stages[:-1]):
        start, end = end, end + stage.steps
        before = SETTLE_STEPS + TIMED_STEPS + 1
        even = min(start + before + 1, end - 2) & ~1
        assert even >= start, f"stage {number + 1} of recipe {recipe.name} has no even step before an odd one"
        yield number, max(start, even - before), even


def train_step(job, tg: ModuleType, stream: Iterator, monitor, step: int) -> None:
    """One step as the trainer's loop makes it, without its validation and its reports."""
    sched = tg.at(job.cfg.recipe, step)
    with record_function(f"step {step}"):
        losses = [job.passes(micro, sched) for micro in next(stream)]
        with record_function(OPTIMIZER):
            job.optimizer.step(sched)
        monitor.put(step, torch.stack(losses).sum(), False)


def run_stage(job, tg: ModuleType, plan: tuple[int, int, int], path: Path | None) -> float | None:
    """Run one stage's steps; the trace goes to `path`. Result: ms of an unprofiled step, if any was timed."""
    number, first, even = plan
    is_gpu, clock, monitor = job.ranks.device.type == "cuda", tg.Clock(job.ranks.device), tg.Monitor(job)
    job.model.set_rotary(tg.yarn(job.cfg.recipe, number)[0])
    lead = max(first, even - 1)
    timed = max(first, lead - TIMED_STEPS)
    with contextlib.closing(tg.batches(job.cfg, job.ranks, job.corpus, job.max_docs, first)) as stream:
        for step in range(first, lead):
            if step == timed:
                clock.start()
            train_step(job, tg, stream, monitor, step)
        clock.synchronize()
        unprofiled = clock.ms() / (lead - timed) if lead > timed else None
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if is_gpu else [])]
        with profile(activities=activities) if path else contextlib.nullcontext() as profiler:
            for step in range(lead, even + 2):
                train_step(job, tg, stream, monitor, step)
            clock.synchronize()
    if path:
        profiler.export_chrome_trace(str(path))
    return unprofiled


def analyse(trace: list[dict], even: int, is_gpu: bool) -> tuple[list[Event], Window]:
    """What ran in one even step and the odd step after it, and when."""
    steps = [e for step in (even, even + 1) for e in ranges(trace, f"step {step}")]
    if is_gpu:
        events = device_events(trace)
        return events, device_window(events, steps)
    window = steps[0]["ts"], steps[-1]["ts"] + steps[-1]["dur"]
    return host_events(trace, steps[0]["tid"]), window


def run(job, tg: ModuleType) -> dict[str, object]:
    """Profile every stage of a warmed-up job; `tg` is the trainer's module. Result: for the JSON twin."""
    r, ranks, log, found = job.cfg.recipe, job.ranks, job.log, []
    is_gpu = ranks.device.type == "cuda"
    name = torch.cuda.get_device_name(ranks.device) if is_gpu else "CPU"
    ceiling = next((ceiling for key, ceiling in CEILINGS.items() if key in name), None)
    known = "{:.4g} FLOP/s in bf16, {:.4g} in FP8, {:.4g} bytes/s".format(*ceiling) if ceiling else "unknown"
    log.say(f"profile: ceilings of this {name}: {known}")
    for plan in plans(r):
        (number, _, even), stage = plan, r.stages[plan[0]]
        path = log.path.with_name(f"{log.path.stem}.stage{number + 1}.trace.json.gz")
        unprofiled = run_stage(job, tg, plan, path if ranks.rank == 0 else None)
        if ranks.rank:
            continue
        events, window = analyse(read_trace(path), even, is_gpu)
        least_ms = least_times(job, tg, stage.batch_tokens, ceiling) if ceiling else {}
        rows = account(events, window, 2, least_ms)
        ms, without = sum(row.ms for row in rows), f"{unprofiled:.2f} ms" if unprofiled else "not timed"
        title = f"stage {number + 1}: {stage.batch_tokens:,} tokens a step, world size {ranks.world_size}"
        what = f"mean of steps {even} and {even + 1}: {ms:.2f} ms; unprofiled: {without}; trace: {path}"
        log.say(f"\n{title}\n{what}\n{report(rows, kernels_by_cost(events, window, 2))}")
        table = {row.name: row._asdict() for row in rows}
        found.append({"stage": number + 1, "ms": ms, "unprofiled_ms": unprofiled, "rows": table})
    return {"profile": found}
