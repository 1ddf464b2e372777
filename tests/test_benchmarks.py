"""benchmarks/kernels.py without a GPU: what it covers, its table, and the rewriting of frozen configs.

Every family runs here at toy shapes through the references, on a host clock: that holds the cases, their
baselines and their errors together. What a GPU does is `pytest -m gpu` and the command itself.
"""

import ast
import json
import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import load_program

import triton_kernels as tk

ROOT = Path(__file__).resolve().parents[1]
COMMAND = ROOT / "benchmarks" / "kernels.py"
KERNELS = ROOT / "triton_kernels.py"
# Upper-case names of triton_kernels.py that no autotuning may touch.
NOT_CONFIGS = {"SOFTCAP_A", "SOFTCAP_B", "SOFTCAP_C", "NUM_TARGETS", "E4M3", "E5M2", "ATTENTION_BACKENDS"}
NOT_CONFIGS |= {"QKV_EPS", "QKV_EXACT", "QKV_E5M2", "LINEAR_FACTOR", "DX_FACTOR", "DW_FACTOR"}
NOT_CONFIGS |= {"E4M3_X_FACTOR", "E4M3_W_FACTOR", "E4M3_POST_FACTOR", "E5M2_GRAD_FACTOR"}
NOT_CONFIGS |= {"E5M2_LOGITS_FACTOR", "HEAD_DX_FACTOR", "HEAD_DW_FACTOR"}


bench = load_program(COMMAND)
cases = sys.modules["kernel_cases"]
OPS = [family.op for family in bench.FAMILIES]


def host_us(call, repeats: int = 1) -> float:
    began = time.perf_counter()
    call()
    return max(time.perf_counter() - began, 1e-9) * 1e6


@pytest.fixture
def toy(monkeypatch):
    """Small shapes, a host clock, references that are not compiled: a stage to run on this CPU."""
    sizes = {"D": 32, "HIDDEN": 48, "V": 80, "HEADS": 2, "HEAD_DIM": 16, "MAX_SEQ_LEN": 64, "FEW": 16}
    for name, value in sizes.items():
        monkeypatch.setattr(cases, name, value)
    monkeypatch.setattr(cases, "BANKS", ((2, 16, 24), (3, 16, 16)))
    monkeypatch.setattr(cases, "TALL", ((2, 24, 16),))
    monkeypatch.setattr(cases, "_compiled", lambda ref: ref)
    monkeypatch.setattr(cases, "_device", lambda: "cpu")
    monkeypatch.setattr(bench, "time_us", host_us)
    return cases.Stage(48, 24, (8, 16), (1.0, 0.5, 0.25))


# ------------------------------------------------------------------------------------------------------------
# 1. coverage


def test_every_public_op_with_a_reference_is_a_family():
    names = {name.removesuffix("_ref") for name in vars(tk) if name.endswith("_ref") and name[0] != "_"}
    ops = {name for name in names if hasattr(tk, name) or hasattr(tk, f"_{name}")}
    assert {"xxt", "linear_relu2", "attention", "fp8_relu2"} <= ops
    assert ops <= set(OPS), f"ops without a row in FAMILIES: {ops - set(OPS)}"
    assert len(set(OPS)) == len(OPS), "an op in two families"


def test_every_frozen_config_is_tuned():
    targets = [
        target
        for node in ast.parse(KERNELS.read_text(encoding="utf-8")).body
        for target in getattr(node, "targets", [getattr(node, "target", None)])
    ]
    names = {x.id for t in targets if t is not None for x in ast.walk(t) if isinstance(x, ast.Name)}
    configs = {name for name in names if re.fullmatch(r"[A-Z][A-Z0-9_]*", name)} - NOT_CONFIGS
    tuned = [name for row in bench.TUNED for name in row.names]
    assert set(tuned) == configs, f"untuned {configs - set(tuned)}, unknown {set(tuned) - configs}"
    assert len(tuned) == len(set(tuned)), "a constant in two rows"


def test_rows_of_the_autotune_table_agree_with_what_is_frozen():
    for row in bench.TUNED:
        assert row.op in OPS, row.op
        for values in row.candidates:
            for name, value in zip(row.names, values, strict=True):
                assert type(value) is type(getattr(tk, name)), f"{name}: {value!r}"


def test_candidates_of_the_relu2_kernel_store_whole_vectors():
    """A tile is stored whole or in two halves, as wide as the kernel can split them."""
    rows = [row for row in bench.TUNED if row.names[0].startswith("RELU2_")]
    assert len(rows) == 4
    for tile, programs, parts in (value for row in rows for (value,) in row.candidates):
        assert isinstance(tile, tk.Tile)
        assert programs >= 1
        assert parts in (1, 2)


def test_candidates_of_prepare_qkv_keep_16_bytes_a_thread():
    (row,) = (row for row in bench.TUNED if row.op == "prepare_qkv")
    for rows, warps in ((tk.QKV_ROWS, tk.QKV_WARPS), *row.candidates):
        assert rows * cases.HEAD_DIM == 8 * 32 * warps


def test_a_tall_bank_is_multiplied_as_a_view(toy, monkeypatch):
    seen, xxt = [], tk.xxt
    monkeypatch.setattr(tk, "xxt", lambda x: (seen.append((x.shape, x.stride())), xxt(x))[1])
    (row,) = (row for row in bench.bench((toy,), "^xxt$", cache_bytes=1) if row.shape.endswith("view"))
    assert seen[-1] == ((2, 16, 24), (16 * 24, 1, 16))
    assert not row.problem


def test_stages_are_those_of_the_recipe():
    """32,768 rows of the first two stages, 49,152 of the third, in slots of their own lengths."""
    import train_gpt

    recipe, sizes = train_gpt.RECIPES["short"], {}
    for stage in recipe.stages[:3]:
        slot = stage.batch_tokens // recipe.slots
        sizes[slot] = slot * train_gpt.slots_per_pass(recipe.slots, slot, recipe.micro_tokens)
    assert {stage.slot_len: stage.rows for stage in bench.STAGES} == sizes
    width = recipe.num_heads, recipe.head_dim, recipe.max_seq_len, recipe.model_dim, recipe.hidden_dim
    assert width == (cases.HEADS, cases.HEAD_DIM, cases.MAX_SEQ_LEN, cases.D, cases.HIDDEN)


def test_documents_cover_the_batch_and_are_as_long_as_said():
    for tokens in (1000, 49152, 65536):
        cu_seqlens = cases.documents(tokens)
        lengths = cu_seqlens.diff()
        assert cu_seqlens.dtype == torch.int32
        assert (cu_seqlens[0], cu_seqlens[-1]) == (0, tokens)
        assert lengths.min() >= 0
        assert lengths.max() <= cases.MAX_SEQ_LEN
        if tokens > 1000:
            assert 550 < float(lengths[lengths > 0].float().mean()) < 850


# ------------------------------------------------------------------------------------------------------------
# 2. the table


@pytest.mark.parametrize("op", OPS)
def test_every_family_runs_through_the_references(toy, monkeypatch, op):
    name, called = op if hasattr(tk, op) else f"_{op}", []
    original = getattr(tk, name)
    monkeypatch.setattr(tk, name, lambda *a, **options: (called.append(op), original(*a, **options))[1])
    rows = list(bench.bench((toy,), f"^{op}$", cache_bytes=1))
    assert rows
    assert called, f"{op} is not what its cases call"
    for row in rows:
        assert not row.problem, row
        assert row.us > 0, row
        assert row.rate > 0, row
        assert row.error is not None, row
        assert not [note for note in row.notes if note.startswith("no ref")], row


def test_shapes_that_stages_share_are_timed_once_and_refs_at_the_first(toy):
    stages = toy, toy._replace(rows=64), toy._replace(rows=64, slot_len=32)
    rows = list(bench.bench(stages, "^(xxt|columns8)$", cache_bytes=1 << 40))
    assert [(row.kernel, row.shape) for row in rows] == [
        ("xxt", "2x16x24"), ("xxt", "3x16x16"), ("xxt", "2x24x16 view"),
        *(("columns8", f"{n}x{c}") for n in (48, 64) for c in (32, 48, 80)),
    ]  # fmt: skip
    assert [row.vs_ref is not None for row in rows] == 6 * [True] + 3 * [False]
    assert all(row.vs_library for row in rows)
    assert all(row.is_cached for row in rows)


def failing(*_):
    raise RuntimeError("no\n such   kernel")


def test_a_failing_kernel_is_one_row_and_a_failing_baseline_a_note(toy, monkeypatch):
    monkeypatch.setattr(tk, "xxt", failing)
    rows = list(bench.bench((toy,), "xxt|transpose_copy", cache_bytes=1))
    assert [row.problem for row in rows] == ["RuntimeError: no such kernel"] * 3 + [""]
    assert "FAILED: RuntimeError: no such kernel" in bench.format_row(rows[0])
    monkeypatch.setattr(cases, "_compiled", lambda ref: failing)
    (row,) = bench.bench((toy,), "transpose_copy", cache_bytes=1)
    assert (row.problem, row.vs_ref, row.notes) == ("", None, ("no ref: RuntimeError: no such kernel",))
    monkeypatch.setattr(tk, "softcap", failing)
    (row,) = bench.bench((toy,), "softcapped", cache_bytes=1)
    assert row.problem == "RuntimeError: no such kernel", "inputs that cannot be made fail too"


@pytest.mark.parametrize("wrong", [math.nan, 1.0])
def test_a_wrong_result_fails(toy, wrong):
    case = cases._transpose_copy_cases()[0]._replace(error=lambda: wrong)
    row = bench.measure("op", case, False, 1)
    assert "wrong by" in row.problem
    assert row.vs_ref is None


def test_format_of_a_row():
    row = bench.Row("xxt", "24x768x3072", 123.45, 1.5, "TB/s", 1.25, 0.9, "bmm", 1e-3, True)
    line = bench.format_row(row)
    assert line.split() == "xxt 24x768x3072 123.5* 1.50 TB/s 1.25 bmm 0.90 1.0e-03".split()
    assert len(line) == len(bench.HEADER)
    bare = bench.format_row(bench.Row("xxt", "24x768x3072"))
    assert bare.split() == ["xxt", "24x768x3072", *"-----"]
    assert len(bare) == len(bench.HEADER)


def test_names_fit_their_columns(toy):
    for row in bench.bench((toy,), "", cache_bytes=1):
        assert len(row.kernel) <= 34, row.kernel
    widest = max((f"{s.rows}x{cases.D}x50304/{s.slot_len}" for s in bench.STAGES), key=len)
    assert len(widest) <= 22, widest


# ------------------------------------------------------------------------------------------------------------
# 3. rewriting the frozen configs

SOURCE = '''"""Doc: TILE = 1."""
TILE = Tile(1, 2)  # measured, caf\u00e9
TABLE = {768: Tile(1, 2)}  # by inner dimension
BLOCK, WARPS = 1024, 2  # record 67
SHAPE = (
    64,
    128,
)  # rows, columns
LIMIT: int = 4
TWICE = 1
TWICE = 2
BOTH, COUNTED = pair()
GROWN = 1
GROWN += 1


def f():
    INNER = 1
    return INNER
'''


@pytest.mark.parametrize(
    ("name", "value", "before", "after"),
    [
        ("TILE", tk.Tile(1, 2, 3, 4, 5), "TILE = Tile(1, 2)  # m", "TILE = Tile(1, 2, 3, 4, 5)  # m"),
        ("TABLE", {768: tk.Tile(1, 2, 3, 4, 5)}, "{768: Tile(1, 2)}", "{768: Tile(1, 2, 3, 4, 5)}"),
        ("BLOCK", 2048, "1024, 2  #", "2048, 2  #"),
        ("WARPS", 16, "1024, 2  #", "1024, 16  #"),
        ("SHAPE", (32, 64), "(\n    64,\n    128,\n)  #", "(32, 64)  #"),
        ("LIMIT", 8, "int = 4", "int = 8"),
    ],
)
def test_rewrite_replaces_one_value_and_nothing_else(name, value, before, after):
    assert SOURCE.count(before) == 1
    assert bench.rewrite(SOURCE, name, value) == SOURCE.replace(before, after)


@pytest.mark.parametrize(
    ("name", "count"), [("ABSENT", 0), ("INNER", 0), ("TWICE", 2), ("COUNTED", 1), ("GROWN", 2), ("f", 0)]
)
def test_rewrite_refuses_what_is_missing_or_ambiguous(name, count):
    with pytest.raises(ValueError, match=rf"{name}: found {count} top-level"):
        bench.rewrite(SOURCE, name, 1)


def test_every_tuned_constant_can_be_rewritten_in_the_real_file():
    source = KERNELS.read_text(encoding="utf-8")
    for row in bench.TUNED:
        for name, value in zip(row.names, row.candidates[-1], strict=True):
            changed = bench.rewrite(source, name, value)
            (found,) = [v for s in ast.parse(changed).body for v in bench._assigned(s, name)]
            assert ast.unparse(found) == ast.unparse(ast.parse(bench.literal(value)).body[0].value)
            again = bench.rewrite(changed, name, getattr(tk, name))
            assert ast.dump(ast.parse(again)) == ast.dump(ast.parse(source)), name


def test_literals_evaluate_to_themselves():
    for value in ((1,), (64, 128), {768: tk.Tile(1, 2, 3, 4, 5)}, tk.Tile(1, 2, 3, 4, 5), True, 0.5, "a", ()):
        assert eval(bench.literal(value), {"Tile": tk.Tile}) == value


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "file.py"
    path.write_text("old\n")
    path.chmod(0o640)
    bench.write_atomically(path, "caf\u00e9\n")
    assert path.read_bytes() == "caf\u00e9\n".encode()
    assert path.stat().st_mode & 0o777 == 0o640
    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(RuntimeError):
        bench.write_atomically(path, "new\n")
    assert [p.name for p in tmp_path.iterdir()] == ["file.py"]
    assert path.read_text() == "caf\u00e9\n"


# ------------------------------------------------------------------------------------------------------------
# 4. autotune


def test_a_config_is_kept_unless_it_is_beaten_clearly():
    assert bench.pick([100.0, 99.0, 98.5]) == 0
    assert bench.pick([100.0, 99.0, 97.0]) == 2
    assert bench.pick([math.inf, 50.0, math.inf]) == 1
    assert bench.pick([math.inf, math.inf]) == 0


@pytest.fixture
def clock(monkeypatch):
    """Time is BA_TILE's number of warps; 8 of them run out of shared memory."""

    def time_us(call, repeats):
        warps = tk.BA_TILE.warps
        if warps == 8:
            raise RuntimeError("out of resource: shared memory")
        return float(warps)

    monkeypatch.setattr(bench, "time_us", time_us)


def tuned(*warps: int):
    return bench.Tuned(("BA_TILE",), "ba_plus_caa", "", tuple((tk.BA_TILE._replace(warps=w),) for w in warps))


@pytest.mark.parametrize("is_dry", [True, False])
def test_autotune_writes_the_winner(toy, clock, monkeypatch, tmp_path, capsys, is_dry):
    monkeypatch.setattr(tk, "BA_TILE", tk.BA_TILE._replace(warps=4))
    monkeypatch.setattr(bench, "TUNED", (tuned(8, 4, 2),))
    path, frozen = tmp_path / "kernels.py", tk.BA_TILE
    path.write_text("BA_TILE = Tile(1, 2, 3, 4, 5)  # kept\nOTHER = 1\n")
    before = path.read_text()
    assert bench.autotune(toy, "", is_dry, path) == 0
    out = capsys.readouterr().out
    wanted = before.replace("Tile(1, 2, 3, 4, 5)", bench.literal(frozen._replace(warps=2)))
    assert path.read_text() == (before if is_dry else wanted)
    assert out.splitlines()[-1].strip() == ("not written" if is_dry else "written")
    assert "shared memory" in out
    assert tk.BA_TILE == frozen, "what was tried is undone"


def test_autotune_leaves_the_file_if_nothing_wins_and_reports_what_fails(toy, clock, monkeypatch, tmp_path):
    monkeypatch.setattr(tk, "BA_TILE", tk.BA_TILE._replace(warps=2))
    path = tmp_path / "kernels.py"
    path.write_text("BA_TILE = 1\n")
    monkeypatch.setattr(bench, "TUNED", (tuned(4, 2),))
    assert bench.autotune(toy, "", False, path) == 0
    monkeypatch.setattr(bench, "TUNED", (tuned(1),))
    monkeypatch.setattr(tk, "ba_plus_caa_ref", lambda a, *_: a + 100)
    assert bench.autotune(toy, "", False, path) == 0, "both are wrong alike: the op is its reference here"
    path.write_text("BA_TILE = 1\nBA_TILE = 2\n")
    assert bench.autotune(toy, "", False, path) == 1, "an ambiguous constant is a failure"
    assert path.read_text() == "BA_TILE = 1\nBA_TILE = 2\n"
    assert bench.autotune(toy, "xxt", False, path) == 0, "--only leaves it out"
    monkeypatch.setattr(tk, "BA_TILE", tk.BA_TILE._replace(warps=8))
    monkeypatch.setattr(bench, "TUNED", (tuned(8),))
    assert bench.autotune(toy, "", False, path) == 1, "nothing runs"


def test_a_wrong_winner_is_refused(toy, clock, monkeypatch, tmp_path):
    path = tmp_path / "kernels.py"
    path.write_text("BA_TILE = 1\n")
    monkeypatch.setattr(tk, "BA_TILE", tk.BA_TILE._replace(warps=4))
    monkeypatch.setattr(bench, "TUNED", (tuned(2),))
    monkeypatch.setattr(tk, "ba_plus_caa", lambda a, *_: a * 100 + 100)
    assert bench.autotune(toy, "", False, path) == 1
    assert path.read_text() == "BA_TILE = 1\n"


# ------------------------------------------------------------------------------------------------------------
# 5. the command


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    hidden = {"CUDA_VISIBLE_DEVICES": "", **environment}
    return subprocess.run(
        [sys.executable, str(COMMAND), *arguments], env=os.environ | hidden, capture_output=True, text=True
    )


@pytest.mark.parametrize("arguments", [(), ("--autotune", "--dry-run")])
def test_without_a_gpu_it_says_so_in_one_line(arguments):
    result = run(*arguments)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("kernels.py: needs an NVIDIA GPU")
    assert result.stderr.count("\n") == 1


def test_help_explains_without_a_gpu():
    result = run("--help")
    assert (result.returncode, result.stderr) == (0, "")
    assert all(
        word in result.stdout for word in ("--rows", "--stages", "--autotune", "L2 cache", "exit code")
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rows", "100"], "multiple of 16"),
        (["--rows", "-16"], "multiple of 16"),
        (["--rows", "64", "--stages"], "not allowed with"),
        (["--dry-run"], "without --autotune"),
        (["--autotune", "--stages"], "at one size"),
        (["--only", "("], "not a regular expression"),
        (["--only", "nothing_like_it"], "matches none of xxt"),
    ],
)
def test_options_that_make_no_sense_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit_info:
        bench.parse(arguments)
    assert exit_info.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_the_clock_takes_the_median_and_keeps_the_device_busy(monkeypatch):
    intervals, slept, calls = iter([9.0, 1.0, 2.0, 3.0, 50.0]), [], []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self): ...

        def synchronize(self): ...

        def elapsed_time(self, other):
            return next(intervals)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "_sleep", slept.append)
    assert bench.time_us(lambda: calls.append(1), repeats=5) == 3000.0
    assert (len(calls), len(slept)) == (7, 5)
    assert all(200_000 <= cycles <= 40_000_000 for cycles in slept)


def test_the_header_names_what_the_numbers_depend_on(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(tk, "triton", type("Triton", (), {"__version__": "3.0"}))
    about = bench.describe()
    assert (about["gpu"], about["torch"], about["triton"]) == ("a GPU", torch.__version__, "3.0")
    assert all(name in about["attention"] for name in tk.ATTENTION_BACKENDS)
    assert about["fp8"]


@pytest.mark.parametrize("is_broken", [False, True])
def test_main_prints_the_table_and_writes_json(toy, monkeypatch, tmp_path, capsys, is_broken):
    """A GPU is pretended; the families run on this CPU."""
    monkeypatch.setattr(bench, "STAGES", (toy,))
    monkeypatch.setattr(bench, "describe", lambda: {"gpu": "none", "torch": torch.__version__})
    monkeypatch.setattr(tk, "triton", object())
    monkeypatch.setattr(tk, "_use_matmul_kernels", lambda x: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    properties = type("Properties", (), {"L2_cache_size": 1 << 30})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: properties)
    if is_broken:
        monkeypatch.setattr(tk, "xxt", failing)
    path = tmp_path / "rows.json"
    assert bench.main(["--only", "xxt|ba_plus", "--json", str(path)]) == int(is_broken)
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == ["gpu: none", f"torch: {torch.__version__}", bench.HEADER]
    assert lines[-1].startswith(f"5 rows, {3 * is_broken} failed, ")
    written = json.loads(path.read_text())
    assert [row["kernel"] for row in written["rows"]] == ["xxt"] * 3 + ["ba_plus_caa"] * 2
    assert [bool(row["problem"]) for row in written["rows"]] == [is_broken] * 3 + [False] * 2
