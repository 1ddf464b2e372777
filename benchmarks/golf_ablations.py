"""What each way of compressing a golf model costs, on the weights of one training.

    python benchmarks/golf_ablations.py --mode one --data data/books --out logs/golf/try

Takes the options of golf/train_golf.py and trains as it does. Before it packs its artifact, the same weights
go through every row of COMPRESSIONS, each fitted to the cap; those that were not exported (last or average)
are validated. Bits per byte and bytes of each go to OUT/ablations.json and to the log.
What needs a training of its own (--set order= for no recurrence, --recipe baseline) is one of train_golf.py;
the coders are compared by benchmarks/coders.py, the ways of scoring by golf/score.py. One process only.
"""

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))

from golf import artifact  # noqa: E402
from golf import train_golf as golf  # noqa: E402

# What each way of compressing changes of the config. A smaller embed_k takes bits from the matrices; 15 is
# what contest entries use.
COMPRESSIONS = {
    "gptq, range by sigma": {"quantizer": "gptq", "clip": "sigma"},
    "gptq, range by max": {"quantizer": "gptq", "clip": "max"},
    "rtn, range by sigma": {"quantizer": "rtn", "clip": "sigma"},
    "rtn, range by max": {"quantizer": "rtn", "clip": "max"},
    "gptq, range by sigma, embed_k 15": {"quantizer": "gptq", "clip": "sigma", "embed_k": 15.0},
    "gptq, range by sigma, embed_k 9": {"quantizer": "gptq", "clip": "sigma", "embed_k": 9.0},
    "gptq, range by sigma, embed_k 4.5": {"quantizer": "gptq", "clip": "sigma", "embed_k": 4.5},
}


def put(job: golf.Job, weights: dict) -> None:
    """Write weights into the model."""
    for name, p in job.model.named_parameters():
        p.detach().copy_(weights[name])


def compressed(job: golf.Job, weights: dict, moments: dict, name: str) -> dict[str, object]:
    """One way of compressing: bytes in all, stretch, bits per byte."""
    cfg = dataclasses.replace(job.cfg, **COMPRESSIONS[name])
    code = len(golf.pack_code())
    packed = golf.compress(weights, moments, cfg, {}, cfg.cap_bytes - code)
    put(job, golf.restore(artifact.unpack(packed.data)[1], cfg, job.corpus.vocab_size))
    bpb = job.validate(name, 0)[1]
    total = len(packed.data) + code
    return {"total_bytes": total, "fits": total <= cfg.cap_bytes, "stretch": packed.stretch, "val_bpb": bpb}


def ablate(job: golf.Job, moments: dict) -> dict[str, dict]:
    """Every row of the table; the model keeps its weights."""
    weights = {name: p.detach().clone() for name, p in job.model.named_parameters()}
    rows = {"exported weights, not quantised": {"val_bpb": job.validate("the exported weights", 0)[1]}}
    if job.average.shadow:
        job.average.swap()
        rows["the other weights (last or average)"] = {"val_bpb": job.validate("the other weights", 0)[1]}
        job.average.swap()
    for name in COMPRESSIONS:
        rows[name] = compressed(job, weights, moments, name)
    put(job, weights)
    return rows


def line(name: str, row: dict) -> str:
    """A row for the log."""
    size = ""
    if "total_bytes" in row:
        over = "" if row["fits"] else " (over the cap)"
        size = f", {row['total_bytes']:,} bytes{over}, stretch {row['stretch']:.4f}"
    return f"ablation: {name}: {row['val_bpb']:.5f} bits per byte{size}"


def with_ablations(export: Callable) -> Callable:
    """train_golf.export, the ablations before it."""

    def both(job: golf.Job, moments: dict, out: Path) -> dict[str, object]:
        if job.ranks.world_size > 1:
            raise golf.InputError(f"{job.ranks.world_size} processes: ablations are made by one; start one")
        rows = ablate(job, moments)
        for name, row in rows.items():
            job.log.say(line(name, row))
        text = json.dumps(rows, indent=1) + "\n"
        golf.tg.atomically(out / "ablations.json", lambda path: path.write_text(text))
        return export(job, moments, out)

    return both


def main() -> int:
    if {"-h", "--help"} & set(sys.argv):
        print(__doc__)
        return 0
    golf.export = with_ablations(golf.export)
    return golf.main()


if __name__ == "__main__":
    sys.exit(main())
