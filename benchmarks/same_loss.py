"""Do the kernels and FP8 train to the loss that plain PyTorch trains to?

    python benchmarks/same_loss.py --recipe sprint --data data/books [--seeds 3] [--steps 8]

Two arms at equal seeds and steps, seed by seed in turn: the recipe as it is, with everything that makes it
fast, and plain PyTorch: eager, no kernels of ours, no FP8, attention with a mask, nothing recorded. The
schedule is the recipe's, cut to so many steps a stage and 2 of extension; validation reads at most 10
slots. The answer is a table of final losses and Welch's interval for the difference of the means. A run of
the plain arm takes about five times as long.
"""

import argparse
import math
import statistics
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))

import train_gpt as tg  # noqa: E402

kernels = tg.kernels


def cut(recipe: tg.Recipe, steps: int) -> tg.Recipe:
    """The recipe with `steps` in every stage and 2 in the extension; momentum scaled with it."""
    stages = [replace(stage, steps=steps) for stage in recipe.stages[:-1]]
    stages.append(replace(recipe.stages[-1], steps=2))
    factor = (3 * steps + 2) / recipe.total_steps
    momentum = tuple((math.ceil(at * factor), value) for at, value in recipe.momentum)
    val_tokens = min(recipe.val_tokens, 10 * recipe.val_slot)
    return replace(recipe, stages=tuple(stages), momentum=momentum, val_tokens=val_tokens, val_every=10**9)


def build(args: argparse.Namespace, recipe: tg.Recipe, ranks: tg.Ranks, is_plain: bool) -> tg.Job:
    """A job of one arm, its log in a temporary folder."""
    corpus = tg.Corpus.open(args.data)
    options = ["--recipe", args.recipe, "--data", str(args.data), "--out", f"{args.folder}/{is_plain}.txt"]
    given = tg.parse(options)
    tg.RECIPES[args.recipe] = replace(recipe, fp8=()) if is_plain else recipe
    cfg, _ = tg.configure(given, ranks, corpus)
    cfg = replace(cfg, attention="reference") if is_plain else cfg
    job, _ = tg.build(given, cfg, ranks, corpus)
    if is_plain:
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


def never(x: object) -> bool:
    """Whether a kernel of ours is used, in the plain arm."""
    return False


def compare(args: argparse.Namespace) -> None:
    ranks, stop = tg.Ranks.from_torchrun(), tg.StopRequest()
    recipe, arms, on_gpu = cut(tg.RECIPES[args.recipe], args.steps), {}, kernels._use_kernels
    matmul_on_gpu = kernels._use_matmul_kernels
    with ranks.process_group():
        for name, is_plain in (("fast", False), ("plain", True)):
            arms[name] = build(args, recipe, ranks, is_plain), []
        tg.warm_up(arms["fast"][0])
        for seed in range(1, args.seeds + 1):
            for name, (job, losses) in arms.items():
                is_plain = name == "plain"
                kernels._use_kernels = never if is_plain else on_gpu
                kernels._use_matmul_kernels = never if is_plain else matmul_on_gpu
                result = train(job, seed, stop)
                losses.append(result["val_loss"])
                seconds, mib = result["train_time_ms"] / 1000, result["peak_memory_mib"]
                print(
                    f"{name} seed {seed}: loss {losses[-1]:.5f} in {seconds:.1f} s, {mib:,} MiB", flush=True
                )
    print(f"fast less plain: {interval(arms['fast'][1], arms['plain'][1])}")


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="same_loss.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", default="tiny", help=f"one of {', '.join(tg.RECIPES)}; default tiny")
    parser.add_argument("--data", type=Path, help="folder of shards; default as for train_gpt.py")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each arm; default 3")
    parser.add_argument("--steps", type=int, default=8, help="of each stage; default 8")
    parser.error = tg.refuse
    try:
        args = parser.parse_args()
        if args.recipe not in tg.RECIPES or args.seeds < 1 or args.steps < 2:
            found = f"--recipe {args.recipe}, --seeds {args.seeds}, --steps {args.steps}"
            raise tg.InputError(
                f"{found}: want a recipe of {', '.join(tg.RECIPES)}, 1 seed, 2 steps at least"
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
