"""Do the kernels and FP8 train to the loss that plain PyTorch trains to, and which FP8 product does not?

    python benchmarks/same_loss.py --recipe sprint --data data/books [--seeds 3] [--steps 8]
    python benchmarks/same_loss.py --recipe sprint --data data/books --fp8 head head+mlp head+mlp+qkv+out

Arms at equal seeds and steps, seed by seed in turn. Without `--fp8` two: the recipe as it is, with all
that makes it fast, and plain PyTorch: eager, no kernels of ours, no FP8, attention with a mask, nothing
recorded, which takes about five times as long. With `--fp8` an arm for each set of products in FP8, the
first one being what the others are compared with; a CPU emulates the rounding. The schedule is the
recipe's, cut to so many steps a stage and 2 of extension, and validation reads at most 10 slots; `--steps
0` leaves both whole. The answer is a table of final losses, Welch's interval for the difference of the
means, and the differences at equal seeds.
"""

import argparse
import math
import statistics
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))

import train_gpt as tg  # noqa: E402

kernels = tg.kernels
PRODUCTS = "head", "mlp", "qkv", "out"


class Arm(NamedTuple):
    name: str
    fp8: tuple[str, ...]
    is_plain: bool = False


def arms_of(sets: list[str] | None, recipe: tg.Recipe) -> list[Arm]:
    """What is compared, the baseline last; 'none' is the empty set."""
    if sets is None:
        return [Arm("fast", recipe.fp8), Arm("plain", (), is_plain=True)]
    arms = [Arm(name, tuple(x for x in name.split("+") if x != "none")) for name in sets]
    unknown = sorted({x for arm in arms for x in arm.fp8} - {*PRODUCTS})
    if unknown or len({frozenset(arm.fp8) for arm in arms}) < max(len(arms), 2):
        found = f"unknown {unknown}" if unknown else "two are equal, or there is only one"
        rule = f"two or more different sets of {', '.join(PRODUCTS)}, such as: none head head+mlp"
        raise tg.InputError(f"--fp8 {' '.join(sets)}: {found}; want {rule}")
    return [*arms[1:], arms[0]]


def cut(recipe: tg.Recipe, steps: int) -> tg.Recipe:
    """The recipe with `steps` in every stage and 2 in the extension; momentum scaled with it. 0: as it is."""
    if not steps:
        return replace(recipe, val_every=10**9)
    stages = [replace(stage, steps=steps) for stage in recipe.stages[:-1]]
    stages.append(replace(recipe.stages[-1], steps=2))
    factor = (3 * steps + 2) / recipe.total_steps
    momentum = tuple((math.ceil(at * factor), value) for at, value in recipe.momentum)
    val_tokens = min(recipe.val_tokens, 10 * recipe.val_slot)
    return replace(recipe, stages=tuple(stages), momentum=momentum, val_tokens=val_tokens, val_every=10**9)


def build(args: argparse.Namespace, recipe: tg.Recipe, ranks: tg.Ranks, arm: Arm) -> tg.Job:
    """A job of one arm, its log in a temporary folder."""
    corpus = tg.Corpus.open(args.data)
    options = ["--recipe", args.recipe, "--data", str(args.data), "--out", f"{args.folder}/{arm.name}.txt"]
    given = tg.parse(options)
    tg.RECIPES[args.recipe] = replace(recipe, fp8=arm.fp8)
    cfg, _ = tg.configure(given, ranks, corpus)
    if args.fp8 and cfg.fp8 != arm.fp8:
        if ranks.device.type == "cuda":
            missing = f"this GPU does not run {sorted({*arm.fp8} - {*cfg.fp8})} in FP8"
            raise tg.InputError(f"--fp8 {arm.name}: {missing}; leave it out, or use a CPU, which emulates it")
        cfg = replace(cfg, fp8=arm.fp8)
    cfg = replace(cfg, attention="reference") if arm.is_plain else cfg
    job, _ = tg.build(given, cfg, ranks, corpus)
    if arm.is_plain:
        job.forward, job.passes.grads = job.model, []
    job.log = tg.Log(given.out, is_master=True)
    return job


def train(job: tg.Job, seed: int, stop: tg.StopRequest) -> dict[str, object]:
    """Train from the seed's initial parameters and an empty optimizer."""
    fresh = tg.GPT(job.cfg, seed).state_dict()
    job.model.load_state_dict({name: x.to(job.ranks.device) for name, x in fresh.items()})
    job.optimizer.load_state_dict(None)
    job.model.zero_grad(set_to_none=True)
    job.clock = tg.Clock(job.ranks.device)
    result = tg.train(job, stop)
    stop.in_loop = False
    return result


def interval(new: list[float], base: list[float]) -> str:
    """Difference of the means with Welch's 95 % interval."""
    if len(new) < 2:
        return f"{new[0] - base[0]:+.4f} (one seed: no interval)"
    from scipy.stats import ttest_ind

    low, high = ttest_ind(new, base, equal_var=False).confidence_interval(0.95)
    return f"{statistics.mean(new) - statistics.mean(base):+.4f}, 95 % interval {low:+.4f} to {high:+.4f}"


def paired(new: list[float], base: list[float]) -> str:
    """The differences at equal seeds."""
    differences = [a - b for a, b in zip(new, base, strict=True)]
    if len(differences) < 2:
        return "one pair"
    sd = statistics.stdev(differences)
    return f"pairs: sd {sd:.4f}, standard error {sd / len(differences) ** 0.5:.4f}, n={len(differences)}"


def never(x: object) -> bool:
    """Whether a kernel of ours is used, in the plain arm."""
    return False


def compare(args: argparse.Namespace) -> None:
    ranks, stop = tg.Ranks.from_torchrun(), tg.StopRequest()
    recipe, on_gpu, matmul_on_gpu = tg.RECIPES[args.recipe], kernels._use_kernels, kernels._use_matmul_kernels
    arms = arms_of(args.fp8, recipe)
    recipe, jobs = cut(recipe, args.steps), {}
    losses = {arm.name: [] for arm in arms}
    with ranks.process_group():
        for arm in arms:
            jobs[arm.name] = build(args, recipe, ranks, arm)
            if not arm.is_plain:
                tg.warm_up(jobs[arm.name])
        for seed in range(1, args.seeds + 1):
            for arm in arms:
                kernels._use_kernels = never if arm.is_plain else on_gpu
                kernels._use_matmul_kernels = never if arm.is_plain else matmul_on_gpu
                result = train(jobs[arm.name], seed, stop)
                losses[arm.name].append(result["val_loss"])
                seconds, mib = result["train_time_ms"] / 1000, result["peak_memory_mib"]
                said = (
                    f"{arm.name} seed {seed}: loss {result['val_loss']:.5f} in {seconds:.1f} s, {mib:,} MiB"
                )
                print(said, flush=True)
    base = arms[-1].name
    for arm in arms[:-1]:
        both = losses[arm.name], losses[base]
        print(f"{arm.name} less {base}: {interval(*both)}; {paired(*both)}")


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="same_loss.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", default="tiny", help=f"one of {', '.join(tg.RECIPES)}; default tiny")
    parser.add_argument("--data", type=Path, help="folder of shards; default as for train_gpt.py")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each arm; default 3")
    parser.add_argument("--steps", type=int, default=8, help="of each stage; default 8; 0: the recipe's own")
    parser.add_argument("--fp8", nargs="+", metavar="SET", help="products joined by +, or none; see above")
    parser.error = tg.refuse
    try:
        args = parser.parse_args()
        if args.recipe not in tg.RECIPES or args.seeds < 1 or (args.steps < 2 and args.steps != 0):
            found = f"--recipe {args.recipe}, --seeds {args.seeds}, --steps {args.steps}"
            raise tg.InputError(
                f"{found}: want a recipe of {', '.join(tg.RECIPES)}, 1 seed, 2 steps at least or 0"
            )
        args.data = args.data or tg.parse(["--recipe", args.recipe]).data
        with tempfile.TemporaryDirectory() as args.folder:
            compare(args)
    except (tg.InputError, OSError, tg.Ended) as error:
        message, code = error.args if isinstance(error, tg.Ended) else (f"error: {error}", 2)
        print(f"same_loss.py: {message}", file=sys.stderr)
        return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
