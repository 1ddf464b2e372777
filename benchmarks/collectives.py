"""What do the trainer's collectives take on this host, each alone?

    torchrun --standalone --nproc_per_node=2 benchmarks/collectives.py [--recipe sprint] [--repeats 30]

One row for each size that the optimizer sends: the gradient's reduce-scatter (all-reduce where every rank
keeps the whole) and the all-gather of the new rows, by the trainer's own code, with nothing else on the
GPUs. Times are medians over the repeats of the slowest rank's, from a barrier to the end, by the host's
clock. GB/s: B bytes among W ranks move B (W - 1) / W each way, an all-reduce twice that; this is the
bandwidth that benchmarks/timeline.py asks for.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))

import train_gpt as tg  # noqa: E402

MOST_REPEATS = 10_000
WARM_UPS = 3


def parameters(recipe: tg.Recipe, ranks: tg.Ranks) -> Iterator[tuple[tg.Param, Tensor]]:
    """Rows of the trainer's table with tensors as the optimizer sends them, one of each size."""
    dtype, seen = torch.bfloat16 if ranks.device.type == "cuda" else torch.float32, set()
    size = {"vocab_size": 50257, "slots": recipe.slots}
    cfg = tg.Config(recipe=recipe, **size, dtype=dtype, attention="varlen", fp8=())
    params = dict(tg.GPT(cfg, 0).named_parameters())
    for row in tg.PARAMS:
        p = params[row.name]
        key = p.numel() * p.element_size(), row.comms
        if key not in seen:
            seen.add(key)
            yield row, p.detach().to(ranks.device)


def slowest_ms(call: Callable[[], None], ranks: tg.Ranks, repeats: int) -> float:
    """Median over the repeats of the slowest rank's milliseconds."""
    clock, found = tg.Clock(ranks.device), []
    for _ in range(WARM_UPS + repeats):
        dist.barrier()
        clock.synchronize()
        began = time.perf_counter()
        call()
        clock.synchronize()
        found.append(1000 * (time.perf_counter() - began))
    times = torch.tensor(found[WARM_UPS:], dtype=torch.float64, device=ranks.device)
    dist.all_reduce(times, dist.ReduceOp.MAX)
    return statistics.median(times.tolist())


def moves(row: tg.Param, p: Tensor, ranks: tg.Ranks) -> list[tuple[str, int, Callable[[], None]]]:
    """(what, rounds of its bytes, the collective and the wait for it)."""
    shard = tg.Shard(p, ranks, row.comms == "sharded")
    grad, mine = torch.ones_like(p), shard.own(p).clone()

    def reduce() -> None:
        work, _ = shard.reduce(grad)
        work.wait()

    if shard.is_replicated:
        return [("all-reduce", 2, reduce)]
    return [("reduce-scatter", 1, reduce), ("all-gather", 1, lambda: shard.gather(mine, p)())]


def table(recipe: tg.Recipe, ranks: tg.Ranks, repeats: int) -> list[str]:
    """The lines of a Markdown table; every rank must call it."""
    lines = ["| parameter | MB | collective | ms | GB/s |", "| --- | ---: | --- | ---: | ---: |"]
    world, known = ranks.world_size, list(parameters(recipe, ranks))
    for row, p in tqdm(known, disable=ranks.rank != 0 or None, leave=False):
        size = p.numel() * p.element_size()
        for what, rounds, call in moves(row, p, ranks):
            ms = slowest_ms(call, ranks, repeats)
            rate = rounds * size * (world - 1) / world / ms / 1e6
            lines.append(f"| {row.name} | {size / 1e6:.3f} | {what} | {ms:.3f} | {rate:.1f} |")
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--recipe", default="sprint", help=f"one of {', '.join(tg.RECIPES)}; default sprint")
    parser.add_argument("--repeats", type=int, default=30, metavar="N", help="of each collective; default 30")
    parser.error = tg.refuse
    args, ranks = parser.parse_args(argv), tg.Ranks.from_torchrun()
    if args.recipe not in tg.RECIPES:
        raise tg.InputError(f"--recipe {args.recipe}: must be one of {', '.join(tg.RECIPES)}; choose one")
    if not 1 <= args.repeats <= MOST_REPEATS:
        raise tg.InputError(f"--repeats {args.repeats}: must be from 1 to {MOST_REPEATS:,}; change it")
    if ranks.world_size < 2:
        raise tg.InputError("one process has no collectives; use torchrun --nproc_per_node=2 or more")
    with ranks.process_group():
        lines = table(tg.RECIPES[args.recipe], ranks, args.repeats)
    if ranks.rank == 0:
        place = tg.machine_lines(ranks.device)
        print(f"{ranks.world_size} ranks, n={args.repeats} repeats; {'; '.join(map(str, place.values()))}")
        print("\n".join(lines))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except tg.InputError as error:
        print(f"collectives.py: error: {error}", file=sys.stderr)
        sys.exit(2)
