"""Every kernel of triton_kernels.py against its reference compiled by torch and the best library call.

    python benchmarks/kernels.py                        # at the shapes of stage 3: 49,152 rows
    python benchmarks/kernels.py --stages --json FILE   # at the shapes of all three stages
    python benchmarks/kernels.py --rows 8192 --only 'relu2|fp8'
    python benchmarks/kernels.py --autotune             # time the candidate configs, freeze the winners

Times are medians of CUDA-event intervals on the device: a sleeping kernel runs ahead of each, so launches are
queued before their turn and the host's time does not count. Caches are not flushed: a * marks a row whose
inputs fit in the L2 cache. `vs ref` and `vs library` are their times over ours: above 1, ours is faster.
References are compiled, once each, at the shapes of the first stage timed. The library call is often less
work than ours, and then a bound: products without the activation or the quantization, cross-entropy of logits
that are capped already, a copy without the transpose, F.rms_norm of q and k alone for all of prepare_qkv. The
references of the FP8 ops are the same in bf16. FP8 ops are compiled too, because that fuses what rounds their
operands. The error is the largest difference over the largest magnitude, of outputs and gradients, against
float64 or float32 (FP8: against the same rounding emulated), at a size that allows it.

One failing kernel prints its error in its row and the others go on; the exit code is then 1. Without a GPU
it is 2.
"""

import argparse
import ast
import contextlib
import itertools
import json
import math
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from kernel_cases import FAMILIES, STAGES, Case, Stage  # noqa: E402

import triton_kernels as tk  # noqa: E402

REPEATS = 15
ERROR_LIMIT = 0.3  # FP8 may round to the neighbour, 0.125 of e5m2's largest value; a wrong kernel is off by 1
ROUNDS, ROUND_REPEATS = 7, 3  # of autotune: all candidates in turn, so that a drift of the clocks hits each
MIN_GAIN = 1.02  # a config is frozen anew if it is this much faster


def time_us(call: Callable[[], object], repeats: int = REPEATS) -> float:
    """Median device time of a call, launch gaps not counted; the first two calls are not timed."""
    call()
    torch.cuda.synchronize()
    began = time.perf_counter()
    call()
    host_s = time.perf_counter() - began
    torch.cuda.synchronize()
    cycles = int(2e9 * min(2 * host_s + 1e-4, 0.02))  # at 2 GHz, twice what the host needs to enqueue a call
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(cycles)
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3)
    return sorted(times)[repeats // 2]


# ------------------------------------------------------------------------------------------------------------
# 1. table


class Row(NamedTuple):
    """One line; None where nothing was measured."""

    kernel: str
    shape: str
    us: float | None = None
    rate: float | None = None  # 1e12 units a second
    unit: str = ""  # "TB/s" or "TFLOP/s"
    vs_ref: float | None = None
    vs_library: float | None = None
    library: str = ""
    error: float | None = None
    is_cached: bool = False  # the inputs fit in the L2 cache
    problem: str = ""  # why the row counts as failed
    notes: tuple[str, ...] = ()  # what became of a baseline that did not run


HEADER = f"{'kernel':<34} {'shape':<22} {'us':>10} {'rate':>16} {'vs ref':>7} {'vs library':>22} {'error':>8}"


def format_row(row: Row) -> str:
    """A line under HEADER; the columns hold whatever failed."""

    def cell(value: float | None, form: str, suffix: str = "") -> str:
        return "-" if value is None else f"{value:{form}}{suffix}"

    us = cell(row.us, ".1f", "*" if row.is_cached else " ")
    library = f"{row.library} {cell(row.vs_library, '.2f')}" if row.library else "-"
    cells = f"{us:>10} {cell(row.rate, '.2f', ' ' + row.unit):>16} {cell(row.vs_ref, '.2f'):>7}"
    line = f"{row.kernel:<34} {row.shape:<22} {cells} {library:>22} {cell(row.error, '.1e'):>8}"
    problem = (f"FAILED: {row.problem}",) if row.problem else ()
    return "  ".join((line, *problem, *row.notes))


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"


def _ratio(name: str, call: Callable[[], object] | None, us: float) -> tuple[float | None, tuple[str, ...]]:
    """A baseline's time over ours; one that cannot run, for want of memory say, is a note, not a failure."""
    try:
        return (time_us(call) / us if call else None), ()
    except Exception as error:
        return None, (f"no {name}: {_reason(error)}",)


def measure(op: str, case: Case, has_ref: bool, cache_bytes: int) -> Row:
    """Time and check one case; whatever it raises becomes the row's problem."""
    row = Row(f"{op} {case.part}".strip(), case.shape)
    try:
        us, error = time_us(case.kernel), case.error()
    except Exception as failure:
        return row._replace(problem=_reason(failure))
    vs_ref, ref_notes = _ratio("ref", case.ref if has_ref else None, us)
    library, call = case.library or ("", None)
    vs_library, library_notes = _ratio(library, call, us)
    return row._replace(
        us=us, rate=case.tera / us * 1e6, unit=f"{case.unit}/s", vs_ref=vs_ref, vs_library=vs_library,
        library=library, error=error if math.isfinite(error) else None,
        is_cached=sum(x.nbytes for x in case.reads) < cache_bytes,
        problem="" if error <= ERROR_LIMIT else f"wrong by {error:.1e} of the largest value",  # NaN is, too
        notes=ref_notes + library_notes,
    )  # fmt: skip


def _free() -> None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def bench(stages: Sequence[Stage], only: str, cache_bytes: int) -> Iterator[Row]:
    """The rows of every family that matches, as they are measured; a shape that stages share comes once."""
    for family in FAMILIES:
        if not re.search(only, family.op):
            continue
        done = set()
        for stage, shape in ((s, shape) for s in stages for shape in family.shapes(s)):
            if shape in done:
                continue
            done.add(shape)
            cases = []
            try:
                cases = family.make(*shape)
            except Exception as error:
                yield Row(family.op, "x".join(map(str, shape)), problem=_reason(error))
            for case in cases:
                yield measure(family.op, case, stage == stages[0], cache_bytes)
            cases = case = None
            _free()


# ------------------------------------------------------------------------------------------------------------
# 2. autotune


class Tuned(NamedTuple):
    """Constants of triton_kernels.py that are frozen together, and the case whose time decides."""

    names: tuple[str, ...]
    op: str
    part: str
    candidates: tuple[tuple, ...]  # values of `names`; the frozen ones compete without being listed
    shape: tuple | None = None  # of the family; None: the first one of the stage


def _tiles(*rows: tuple[int, ...]) -> tuple[tuple[tk.Tile], ...]:
    return tuple((tk.Tile(*row),) for row in rows)


def _persistent(*rows: tuple[int, ...]) -> tuple[tuple[tuple[tk.Tile, int, int]], ...]:
    return tuple(((tk.Tile(*row[:5]), *row[5:]),) for row in rows)


SQUARE = _tiles(  # block_m, block_n, block_k, stages, warps
    (128, 128, 64, 4, 8), (128, 128, 64, 3, 4), (128, 128, 64, 3, 8), (64, 128, 128, 4, 8),
    (64, 128, 64, 4, 4), (128, 64, 64, 4, 4), (64, 64, 64, 4, 4), (128, 256, 64, 3, 8),
)  # fmt: skip
# All of these compile for a processor's shared memory. Behind the tile: programs a processor, parts.
FORWARD = _persistent(
    (128, 256, 64, 3, 8, 1, 1), (128, 256, 64, 3, 8, 1, 2), (128, 256, 64, 4, 8, 1, 2),
    (256, 128, 64, 3, 8, 1, 1), (128, 128, 64, 5, 8, 1, 1), (128, 128, 64, 5, 4, 1, 1),
    (128, 128, 64, 5, 4, 2, 1), (128, 128, 128, 2, 8, 1, 1),
)  # fmt: skip
BACKWARD = _persistent(
    (128, 256, 64, 3, 8, 1, 2), (128, 256, 64, 2, 8, 1, 1), (256, 128, 64, 3, 8, 1, 2),
    (128, 128, 64, 5, 8, 1, 1), (128, 128, 64, 5, 4, 1, 1), (128, 128, 64, 5, 4, 2, 1),
    (128, 128, 64, 4, 4, 1, 1), (128, 128, 64, 2, 4, 2, 1), (128, 128, 128, 2, 8, 1, 1),
)  # fmt: skip
EIGHT = _persistent(
    (128, 128, 128, 3, 4, 2, 2), (128, 256, 64, 6, 8, 1, 2), (128, 256, 128, 3, 8, 1, 2),
    (128, 128, 64, 4, 4, 2, 2), (128, 128, 64, 6, 4, 2, 2), (256, 128, 64, 5, 8, 1, 1),
    (256, 128, 128, 3, 8, 1, 2), (128, 128, 64, 4, 8, 2, 1),
)  # fmt: skip
EIGHT_BACKWARD = _persistent(
    (128, 128, 64, 4, 8, 2, 1), (128, 128, 64, 4, 8, 2, 2), (128, 128, 64, 4, 4, 2, 2),
    (128, 128, 64, 3, 8, 2, 1), (128, 128, 128, 2, 8, 2, 1), (128, 256, 128, 3, 8, 1, 2),
    (256, 128, 64, 5, 8, 1, 1), (256, 128, 128, 3, 8, 1, 2),
)  # fmt: skip
BLOCKS = ((1024, 2), (1024, 4), (2048, 2), (2048, 4), (2048, 8), (4096, 4), (4096, 8), (8192, 8))
CHUNKS = (8192,), (12288,), (16384,), (24576,)  # no more: memory is to win as well
ROWS = (16, 8), (8, 4), (32, 16)  # 8 elements of a row of 128 a thread: see QKV_ROWS
BYTES = ((64, 2), (64, 4), (128, 4), (128, 8), (256, 8))
TUNED = (
    Tuned(("XXT_TILE",), "xxt", "", SQUARE, (40, 768, 768)),
    Tuned(("BA_TILE",), "ba_plus_caa", "", SQUARE),
    Tuned(("RELU2_FORWARD",), "linear_relu2", "forward", FORWARD),
    Tuned(("RELU2_BACKWARD",), "linear_relu2", "backward", BACKWARD),
    Tuned(("RELU2_FP8",), "fp8_relu2", "forward", EIGHT),
    Tuned(("RELU2_FP8_BACKWARD",), "fp8_relu2", "backward", EIGHT_BACKWARD),
    Tuned(("CE_FORWARD_BLOCK", "CE_FORWARD_WARPS"), "softcapped_cross_entropy", "forward", BLOCKS),
    Tuned(("CE_BACKWARD_BLOCK", "CE_BACKWARD_WARPS"), "softcapped_cross_entropy", "backward", BLOCKS),
    Tuned(("HEAD_CHUNK",), "fp8_head_loss", "", CHUNKS),
    Tuned(("QKV_ROWS", "QKV_WARPS"), "prepare_qkv", "fwd+bwd", ROWS),
    Tuned(("TRANSPOSE_BYTES", "TRANSPOSE_WARPS"), "columns8", "", BYTES, (49152, 3072)),
)


def literal(value: object) -> str:
    """Source of a config: numbers, strings, and tuples, named tuples and dicts of them."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{literal(k)}: {literal(v)}" for k, v in value.items()) + "}"
    if isinstance(value, tuple):
        inside = ", ".join(map(literal, value))
        if hasattr(value, "_fields"):
            return f"{type(value).__name__}({inside})"
        return f"({inside},)" if len(value) == 1 else f"({inside})"
    return repr(value)


def _assigned(statement: ast.stmt, name: str) -> list[ast.expr | None]:
    """The values that a statement assigns to the name; None for one that is not written out."""
    if isinstance(statement, ast.AnnAssign | ast.AugAssign):
        targets, value = [statement.target], statement.value if isinstance(statement, ast.AnnAssign) else None
    elif isinstance(statement, ast.Assign):
        targets, value = statement.targets, statement.value
    else:
        return []
    found = [value for target in targets if isinstance(target, ast.Name) and target.id == name]
    for target in targets:
        if isinstance(target, ast.Tuple):
            is_plain = isinstance(value, ast.Tuple) and len(value.elts) == len(target.elts)
            values = value.elts if is_plain else [None] * len(target.elts)
            pairs = zip(target.elts, values, strict=True)
            found += [v for t, v in pairs if isinstance(t, ast.Name) and t.id == name]
    return found


def rewrite(source: str, name: str, value: object) -> str:
    """The source with the value of one top-level assignment replaced; all else, comments too, stays."""
    found = [value for statement in ast.parse(source).body for value in _assigned(statement, name)]
    if len(found) != 1 or found[0] is None:
        raise ValueError(f"{name}: found {len(found)} top-level assignments, want one, of a plain value")
    text = source.encode()  # ast counts columns in bytes
    starts = [0, *itertools.accumulate(map(len, text.splitlines(keepends=True)))]
    begin = starts[found[0].lineno - 1] + found[0].col_offset
    end = starts[found[0].end_lineno - 1] + found[0].end_col_offset
    return (text[:begin] + literal(value).encode() + text[end:]).decode()


def write_atomically(path: Path, text: str) -> None:
    """Replace the file's text, or leave it as it is; its mode stays."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8", newline="") as file:
            file.write(text)
        shutil.copymode(path, name)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


@contextlib.contextmanager
def _configured(names: Sequence[str], values: Sequence[object]) -> Iterator[None]:
    before = [getattr(tk, name) for name in names]
    try:
        for name, value in zip(names, values, strict=True):
            setattr(tk, name, value)
        yield
    finally:
        for name, value in zip(names, before, strict=True):
            setattr(tk, name, value)


def race(call: Callable[[], object], names: Sequence[str], candidates: Sequence[tuple]) -> list[float]:
    """Median time of each candidate, measured in turns; infinite if it does not run."""
    times: list[list[float]] = [[] for _ in candidates]
    for _, (values, mine) in itertools.product(range(ROUNDS), list(zip(candidates, times, strict=True))):
        if math.inf in mine:
            continue
        try:
            with _configured(names, values):
                mine.append(time_us(call, ROUND_REPEATS))
        except Exception as error:  # most often too much shared memory
            print(f"  {literal(values)}: {_reason(error)}", flush=True)
            mine.append(math.inf)
    return [math.inf if math.inf in mine else sorted(mine)[len(mine) // 2] for mine in times]


def pick(times: Sequence[float]) -> int:
    """The fastest, or 0, which is the frozen one, unless it is beaten by MIN_GAIN."""
    best = min(range(len(times)), key=times.__getitem__)
    return best if times[best] * MIN_GAIN <= times[0] else 0


def tune(row: Tuned, stage: Stage) -> dict[str, object]:
    """New values of the row's constants; none if the frozen ones stay."""
    family = next(family for family in FAMILIES if family.op == row.op)
    cases = family.make(*(row.shape or family.shapes(stage)[0]))
    case = next(case for case in cases if case.part == row.part)
    frozen = tuple(getattr(tk, name) for name in row.names)
    candidates = [frozen, *(values for values in row.candidates if values != frozen)]
    times = race(case.kernel, row.names, candidates)
    for values, us in sorted(zip(candidates, times, strict=True), key=lambda pair: pair[1]):
        print(f"  {us:>10.1f} us  {literal(values)}{'  frozen' if values == frozen else ''}")
    if math.isinf(min(times)):
        raise ValueError("no candidate runs")
    best = pick(times)
    if best == 0:
        return {}
    with _configured(row.names, candidates[best]):
        error = case.error()
    if not error <= ERROR_LIMIT:
        raise ValueError(f"the fastest config is wrong by {error:.1e} of the largest value")
    return dict(zip(row.names, candidates[best], strict=True))


def autotune(stage: Stage, only: str, is_dry: bool, path: Path = ROOT / "triton_kernels.py") -> int:
    """Time the candidates of every family that matches and freeze the winners; the number that failed."""
    failed = 0
    for row in (row for row in TUNED if re.search(only, row.op)):
        print(f"{', '.join(row.names)}: {row.op} {row.part}", flush=True)
        try:
            winners = tune(row, stage)
            source = path.read_text(encoding="utf-8")  # read anew: it may have changed meanwhile
            for name, value in winners.items():
                print(f"  {name}: {literal(getattr(tk, name))} -> {literal(value)}")
                source = rewrite(source, name, value)
            if winners and not is_dry:
                write_atomically(path, source)
            print(f"  {'kept' if not winners else 'not written' if is_dry else 'written'}", flush=True)
        except Exception as error:
            failed += 1
            print(f"  FAILED: {_reason(error)}", flush=True)
        _free()
    return failed


# ------------------------------------------------------------------------------------------------------------
# 3. main


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The options, checked."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], epilog="\n\n".join(__doc__.strip().split("\n\n")[1:]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--rows", type=int, metavar="N", help="rows of the flattened batch, one slot (49152)")
    size.add_argument(
        "--stages", action="store_true", help="the shapes of all three stages, not only stage 3"
    )
    parser.add_argument("--only", default="", metavar="REGEX", help="ops whose name matches")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there as well")
    parser.add_argument("--autotune", action="store_true", help="freeze the fastest configs instead")
    parser.add_argument("--dry-run", action="store_true", help="with --autotune: print, change no file")
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: error: {message}\n")  # one line
    options = parser.parse_args(argv)
    if options.rows is not None and (options.rows < 16 or options.rows % 16):
        parser.error(f"--rows {options.rows}: FP8 products need a positive multiple of 16")
    if options.dry_run and not options.autotune:
        parser.error("--dry-run: nothing to leave unwritten without --autotune")
    if options.autotune and (options.json or options.stages):
        parser.error("--autotune: has no rows for --json, and tunes at one size (--rows), not at --stages")
    try:
        re.compile(options.only)
    except re.error as error:
        parser.error(f"--only {options.only!r} is not a regular expression: {error}")
    if not any(re.search(options.only, family.op) for family in FAMILIES):
        parser.error(f"--only {options.only!r}: matches none of {', '.join(f.op for f in FAMILIES)}")
    return options


def describe() -> dict[str, str]:
    """What the numbers depend on."""
    backends, (_, fp8_problem) = tk.attention_backends("cuda", torch.bfloat16), tk.fp8_available("cuda")
    return {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": tk.triton.__version__,
        "fp8": fp8_problem or "usable",
        "attention": "; ".join(
            f"{name} {'usable' if is_usable else why}" for name, is_usable, why in backends
        ),
    }


def main(argv: list[str] | None = None) -> int:
    """The exit code: 0, 1 if a kernel failed, 2 without a GPU."""
    options = parse(argv)
    if tk.triton is None or torch.version.cuda is None or not torch.cuda.is_available():
        lack = "Triton is not installed" if tk.triton is None else "torch finds none"
        print(f"kernels.py: needs an NVIDIA GPU and Triton: {lack}", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    began, about = time.perf_counter(), describe()
    print(*(f"{name}: {text}" for name, text in about.items()), sep="\n", flush=True)
    stages = STAGES if options.stages else STAGES[:1]
    if options.rows:
        stages = (STAGES[0]._replace(rows=options.rows, slot_len=options.rows),)
    if options.autotune:
        return int(autotune(stages[0], options.only, options.dry_run) > 0)
    print(HEADER)
    rows = []
    for row in bench(stages, options.only, torch.cuda.get_device_properties().L2_cache_size):
        rows.append(row)
        print(format_row(row), flush=True)
    failed = sum(bool(row.problem) for row in rows)
    print(f"{len(rows)} rows, {failed} failed, {time.perf_counter() - began:.0f} s")
    if options.json:
        text = json.dumps({**about, "rows": [row._asdict() for row in rows]}, indent=1, allow_nan=False)
        options.json.write_text(text + "\n", encoding="utf-8")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
