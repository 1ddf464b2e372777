"""What would a step of eight GPUs take? A timeline, simulated from what one, two and four took.

    python benchmarks/timeline.py                  # 1, 2, 4 and 8 GPUs; measurements beside
    python benchmarks/timeline.py --bandwidth 350  # GB/s of a GPU in a collective
    python benchmarks/timeline.py --orders 8       # other orders of sending and of work, on 8 GPUs

The model: passes cost in proportion to the tokens of a GPU. After the last one gradients are sent in the
order of the trainer's PARAMS, one collective after the other on a stream of their own; parameters are updated
in its WORK_ORDER, each as soon as its gradient is there, and sent back. A collective of B bytes among W GPUs
takes B (W - 1) / W over the bandwidth, an all-reduce twice that, and LATENCY_MS. GPUs never wait for the
slowest, and the host is never late: the simulation is a bound from below, and its orders are worth a
measurement. The default bandwidth is what collectives were seen to take, waiting for the slowest included.
"""

import argparse
import itertools
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))

import train_gpt as tg  # noqa: E402

# One host with four H200, recipe sprint, `--profile`, n=2 steps a stage (LOG.md: Hopper speed, second part).
STEP_MS = {1: (171.6, 358.9, 534.2), 2: (89.8, 179.2, 271.8), 4: (45.4, 94.2, 138.0)}  # stages 1, 2, 3
EXPOSED_MS = {2: (1.9, 3.4, 3.6), 4: (1.1, 1.2, 5.8)}  # communication that nothing hides
OPTIMIZER_MS = {1: 4.5, 2: 2.7, 4: 1.6}  # stage 3, mean of an even and an odd step
COLLECTIVES_MS = {2: 4.6, 4: 6.8}  # the same; all communication
# Of whole banks on one GPU: five products of a matrix with itself, five polynomials (benchmarks/kernels.py),
# five products (650 TFLOP/s), and 36 bytes an element at 3.9 TB/s. Adam moves 22 bytes an element.
BANK_MS = {"attn_bank": 1.23, "mlp_bank": 1.98}
ADAM_MS_PER_ELEMENT = 22 / 3.9e9
TRANSPOSE_MS = 0.062  # transpose_add of head and embedding
LATENCY_MS = 0.02  # of a collective; assumed


@dataclass(frozen=True)
class Job:
    """What a step does for one parameter."""

    num_bytes: int  # on the wire, all ranks' rows
    is_sharded: bool
    update_ms: float  # on one GPU, without the fixed part
    before_ms: float = 0.0  # on the compute stream before it is sent

    def wire_ms(self, world: int, bandwidth: float) -> float:
        """Of its reduction; that of its gathering where it is sharded. bandwidth: GB/s."""
        if world == 1:
            return 0.0
        rounds = 1 if self.is_sharded else 2
        return LATENCY_MS + rounds * self.num_bytes * (world - 1) / world / bandwidth / 1e6


def jobs_of(model: tg.GPT, is_adam_step: bool, is_tied: bool) -> dict[str, Job]:
    """What an optimizer step does, in the order of sending."""
    params, jobs = dict(model.named_parameters()), {}
    for row in tg.PARAMS:
        if (row.optim == "adam" and not is_adam_step) or (row.tied_to and is_tied):
            continue
        p = params[row.name]
        work = BANK_MS[row.name] if row.optim == "normuon" else p.numel() * ADAM_MS_PER_ELEMENT
        before = TRANSPOSE_MS * (is_tied and any(other.tied_to == row.name for other in tg.PARAMS))
        jobs[row.name] = Job(p.numel() * p.element_size(), row.comms == "sharded", work, before)
    return jobs


@dataclass(frozen=True)
class Machine:
    """A host of `world` GPUs."""

    world: int
    bandwidth: float  # GB/s
    fixed_ms: float  # of an optimizer step, however many GPUs share it
    scale: float  # of the pieces' sum to the whole optimizer, as measured


def simulate(jobs: dict[str, Job], sent: Sequence[str], worked: Sequence[str], machine: Machine) -> float:
    """ms from the end of the last pass to the end of the last gathering."""
    world, wire, compute, arrived = machine.world, 0.0, 0.0, {}
    for name in sent:
        compute += jobs[name].before_ms
        wire = max(wire, compute) + jobs[name].wire_ms(world, machine.bandwidth)
        arrived[name] = wire
    fixed = machine.fixed_ms / len(jobs)
    for name in worked:
        job = jobs[name]
        share = job.update_ms / (world if job.is_sharded else 1)
        compute = max(compute, arrived[name]) + fixed + machine.scale * share
        if job.is_sharded:
            wire = max(wire, compute) + job.wire_ms(world, machine.bandwidth)
    return max(wire, compute)


def orders_of(jobs: dict[str, Job]) -> tuple[list[str], list[str]]:
    """(sent, worked) of the trainer."""
    return list(jobs), [row.name for row in tg.WORK_ORDER if row.name in jobs]


def per_step(kinds: Sequence[dict[str, Job]], value: Callable[[Job], float]) -> float:
    """Sum over the jobs of a step, mean of an even and an odd one."""
    return sum(value(job) for jobs in kinds for job in jobs.values()) / len(kinds)


def moved_bytes(job: Job) -> int:
    """There and back; an all-reduce moves as much as both."""
    return 2 * job.num_bytes


def mean_step(kinds: Sequence[dict[str, Job]], machine: Machine) -> float:
    """ms of an optimizer step, mean of an even and an odd one."""
    return sum(simulate(jobs, *orders_of(jobs), machine) for jobs in kinds) / len(kinds)


def fitted(kinds: Sequence[dict[str, Job]]) -> tuple[float, float, float]:
    """(fixed ms, scale, GB/s) with which the model has the optimizer and collectives that were measured."""
    worlds = sorted(OPTIMIZER_MS)
    shared, fixed = np.polyfit([1 / w for w in worlds], [OPTIMIZER_MS[w] for w in worlds], 1)
    scale = shared / per_step(kinds, lambda job: job.update_ms)
    moved = per_step(kinds, moved_bytes)
    latency = LATENCY_MS * per_step(kinds, lambda job: 1 + job.is_sharded)
    rates = [moved * (w - 1) / w / 1e6 / (ms - latency) for w, ms in COLLECTIVES_MS.items()]
    return float(fixed), float(scale), sum(rates) / len(rates)


def all_orders(jobs: dict[str, Job]) -> list[tuple[list[str], list[str]]]:
    """Every (sent, worked) of the sharded parameters; replicated ones, all small, stay first."""
    small = [name for name, job in jobs.items() if not job.is_sharded]
    large = [name for name, job in jobs.items() if job.is_sharded]
    # The value embeddings are alike: their order among themselves changes nothing.
    alike = [name for name in large if name.startswith("ve")]
    distinct = [
        list(order)
        for order in itertools.permutations(large)
        if [name for name in order if name in alike] == alike
    ]
    return [(small + sent, small + worked) for sent, worked in itertools.product(distinct, repeat=2)]


def sprint_model() -> tg.GPT:
    """Parameters as on a GPU: bf16."""
    cfg = tg.Config(
        recipe=tg.RECIPES["sprint"],
        vocab_size=50257,
        slots=8,
        dtype=torch.bfloat16,
        attention="varlen",
        fp8=(),
    )
    return tg.GPT(cfg, 0)


def table(kinds: Sequence[dict[str, Job]], bandwidth: float | None) -> Iterator[str]:
    """Lines: a row for each world size."""
    fixed, scale, found = fitted(kinds)
    bandwidth = bandwidth or found
    moved = per_step(kinds, moved_bytes) / 1e6
    yield f"a step moves {moved:,.0f} MB (mean of an even and an odd one) at {bandwidth:.0f} GB/s"
    yield f"({found:.0f} was seen); optimizer {fixed:.2f} ms + {OPTIMIZER_MS[1] - fixed:.2f} ms / GPUs"
    yield ""
    yield "| GPUs | stage 1 | stage 2 | stage 3, ms | measured | optimizer, communication | measured |"
    yield "| ---: | ---: | ---: | ---: | --- | ---: | --- |"
    passes = [ms - OPTIMIZER_MS[1] for ms in STEP_MS[1]]
    for world in (1, 2, 4, 8):
        step = mean_step(kinds, Machine(world, bandwidth, fixed, scale))
        cells = [f"{one / world + step:.1f}" for one in passes]
        seen = ", ".join(f"{ms:.1f}" for ms in STEP_MS[world]) if world in STEP_MS else "-"
        rest = "-"
        if world in EXPOSED_MS:
            rest = ", ".join(f"{OPTIMIZER_MS[world] + ms:.1f}" for ms in EXPOSED_MS[world])
        yield f"| {world} | {' | '.join(cells)} | {seen} | {step:.1f} | {rest} |"


def best_order(jobs: dict[str, Job], machine: Machine) -> Iterator[str]:
    """Lines: how the trainer's order compares with the best and the worst."""
    now, best, worst = simulate(jobs, *orders_of(jobs), machine), (math.inf, None), 0.0
    orders = all_orders(jobs)
    for order in tqdm(orders, unit=" orders", unit_scale=True, disable=None, leave=False):
        ms = simulate(jobs, *order, machine)
        best, worst = min(best, (ms, order)), max(worst, ms)
    yield f"{now:.2f} ms as it is; of {len(orders):,} orders the best {best[0]:.2f}, the worst {worst:.2f}"
    if best[0] < now - 0.005:
        yield from (f"{what}: {', '.join(o)}" for what, o in zip(("sent", "worked on"), best[1], strict=True))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0],
        epilog="The model is in this file's docstring, the measurements in its first lines and in LOG.md.",
    )
    parser.add_argument("--bandwidth", type=float, metavar="GB/s", help="default: as was measured")
    parser.add_argument("--orders", type=int, metavar="GPUs", help="compare orders on so many GPUs")
    parser.error = tg.refuse
    args = parser.parse_args(argv)
    if args.bandwidth is not None and not 1 <= args.bandwidth <= 10_000:
        raise tg.InputError(f"--bandwidth {args.bandwidth:g}: must be from 1 to 10,000 GB/s; change it")
    if args.orders is not None and not 2 <= args.orders <= 1024:
        raise tg.InputError(f"--orders {args.orders}: must be from 2 to 1,024 GPUs; change it")
    model = sprint_model()
    kinds = [jobs_of(model, is_adam_step, is_tied=False) for is_adam_step in (False, True)]
    if args.orders is None:
        print("\n".join(table(kinds, args.bandwidth)))
        return 0
    fixed, scale, found = fitted(kinds)
    machine = Machine(args.orders, args.bandwidth or found, fixed, scale)
    for name, jobs in zip(("even step", "odd step"), kinds, strict=True):
        print(f"{name}, {args.orders} GPUs, {machine.bandwidth:.0f} GB/s:")
        print("\n".join(f"  {line}" for line in best_order(jobs, machine)))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except tg.InputError as error:
        print(f"timeline.py: error: {error}", file=sys.stderr)
        sys.exit(2)
