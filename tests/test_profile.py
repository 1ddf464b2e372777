"""`--profile`: which row a kernel belongs to, that the rows sum to the step, and whole runs on a CPU."""

import dataclasses
import gzip
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import compare_runs
import train_gpt as tg

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "benchmarks"))

import step_profile as sp  # noqa: E402

pytestmark = pytest.mark.usefixtures("restored")

# --- which row ---------------------------------------------------------------------------------------------

KERNELS = {
    "nvjet_sm90_tst_128x256_64x4_2x1_v_bz_coopA_NNT": sp.PRODUCTS,
    "nvjet_qqtst_128x128_128x6_1x2_h_bz_TNN": sp.PRODUCTS,
    "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_warpgroupsize1x1x1": sp.PRODUCTS,
    "void cutlass::device_kernel<cutlass::gemm::kernel::GemmUniversal<...>>(T1::Params)": sp.PRODUCTS,
    "void cublasLt::splitKreduce_kernel<32, 16, int, __nv_bfloat16>": sp.PRODUCTS,
    "_relu2_kernel": sp.PRODUCTS,
    "_symmetric_kernel": sp.PRODUCTS,
    "triton_tem_fused_mm_3": sp.PRODUCTS,
    "aten::mm": sp.PRODUCTS,
    "splits::linear_relu2": sp.PRODUCTS,
    "splits::linear_relu2_backward": sp.PRODUCTS,
    "splits::fp8_relu2": sp.PRODUCTS,
    "splits::product8": sp.PRODUCTS,
    "splits::fp8_head_loss": sp.PRODUCTS,
    "splits::xxt": sp.PRODUCTS,
    "splits::ba_plus_caa": sp.PRODUCTS,
    "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128, 128, 64, 4>>": "attention",
    "void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<...>": "attention",
    "kernel_cutlass_kernel_flash_attncuteflash_fwdFlashAttentionForwardSm90_object_at__0": "attention",
    "kernel_cutlass_flash_bwd_preprocess": "attention",
    "fmha_cutlassB_bf16_aligned_64x64_k128_sm80": "attention",
    "_ce_forward_kernel": sp.ENTROPY,
    "_ce_backward_kernel": sp.ENTROPY,
    "splits::softcapped_cross_entropy": sp.ENTROPY,
    "splits::columns8": sp.TRANSPOSES,
    "_transpose_kernel": sp.TRANSPOSES,
    "triton_poi_fused_add_mul_transpose_cross_entropy_7": sp.ELEMENTWISE,
    "triton_red_fused__to_copy_flash_attention_rms_norm_12": sp.ELEMENTWISE,
    "triton_per_fused_mean_pow_2": sp.ELEMENTWISE,
    "_prepare_qkv_kernel": sp.ELEMENTWISE,
    "_prepare_qkv_backward_kernel": sp.ELEMENTWISE,
    "splits::prepare_qkv": sp.ELEMENTWISE,
    "splits::prepare_qkv_backward": sp.ELEMENTWISE,
    "splits::transpose_add": sp.TRANSPOSES,
    "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>>": sp.ELEMENTWISE,
    "void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float>>": sp.ELEMENTWISE,
    "void at::native::(anonymous namespace)::CatArrayBatchedCopy<...>": sp.ELEMENTWISE,
    "triton_poi_fused_embedding_dense_backward_0": sp.EMBEDDING,
    "void at::native::indexing_backward_kernel_stride_1<...>": sp.EMBEDDING,
    "void at::native::(anonymous namespace)::embedding_backward_feature_kernel<...>": sp.EMBEDDING,
    "ncclDevKernel_ReduceScatter_Sum_bf16_RING_LL(ncclDevKernelArgsStorage<4096ul>)": sp.COMMUNICATION,
    "ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)": sp.COMMUNICATION,
    "Memcpy HtoD (Pinned -> Device)": sp.COPIES,
    "Memset (Device)": sp.COPIES,
    "void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<float>>": sp.COPIES,
    "some_kernel_of_the_future": sp.OTHER,
}


@pytest.mark.parametrize("name", KERNELS)
def test_the_row_of_a_kernel(name):
    assert sp.classify(name) == KERNELS[name]


def test_the_optimizer_owns_all_but_communication():
    owned = {sp.classify(name, True) for name, row in KERNELS.items() if row != sp.COMMUNICATION}
    assert owned == {sp.OPTIMIZER}
    assert sp.classify("ncclDevKernel_AllGather", True) == sp.COMMUNICATION


def test_every_rule_has_a_row_and_every_row_a_rule():
    by_range = {sp.OPTIMIZER}
    assert {row for row, _ in sp.RULES} | by_range | {sp.OTHER, sp.GAPS} == set(sp.ROWS)
    assert len(set(sp.ROWS)) == len(sp.ROWS)


def triton_kernels_of_the_project() -> list[str]:
    source = (ROOT / "triton_kernels.py").read_text()
    return re.findall(r"^@jit\b[^\n]*\ndef (\w+)", source, re.M)


def operators_of_the_project() -> list[str]:
    source = (ROOT / "triton_kernels.py").read_text()
    return re.findall(r"custom_op\(f?\"(splits::\w+)", source)


@pytest.mark.parametrize("name", operators_of_the_project())
def test_every_operator_of_the_project_has_a_row(name):
    assert name.startswith("splits::")
    assert sp.classify(name) != sp.OTHER


def test_no_rule_names_a_kernel_that_is_gone():
    known = [*triton_kernels_of_the_project(), *operators_of_the_project()]
    rules = "|".join(pattern for _, pattern in sp.RULES)
    for name in re.findall(r"\b_\w+_kernel\b", rules):
        assert name in known, name
    listed = [name for name in KERNELS if re.fullmatch(r"_\w+_kernel|splits::\w+", name)]
    assert set(listed) <= set(known), set(listed) - set(known)


@pytest.mark.parametrize("name", triton_kernels_of_the_project())
def test_every_kernel_of_the_project_has_a_row(name):
    if name.endswith("_kernel"):  # the others are called by kernels
        assert sp.classify(name) != sp.OTHER


# --- a GPU's trace, written by hand ------------------------------------------------------------------------


def host(cat: str, name: str, ts: float, dur: float, **args) -> dict:
    return {"ph": "X", "cat": cat, "name": name, "tid": 1, "ts": ts, "dur": dur, "args": args}


def kernel(number: int, name: str, ts: float, dur: float, launch: float, cat: str = "kernel") -> list[dict]:
    """A kernel and its launch, by the driver where Triton launches it."""
    how = ("cuda_runtime", "cudaLaunchKernel") if number % 2 else ("cuda_driver", "cuLaunchKernelEx")
    device = {"ph": "X", "cat": cat, "name": name, "tid": 7, "ts": ts, "dur": dur}
    return [
        {**device, "args": {"correlation": number, "stream": 7}},
        host(*how, launch, 2, correlation=number),
    ]


def gpu_trace() -> list[dict]:
    """The host is 100 us ahead; the window is 200 to 400 us: two steps of 100 us."""
    return [
        host("user_annotation", "step 7", 0, 100),
        host("user_annotation", "step 8", 100, 60),
        host("user_annotation", "step 9", 160, 140),
        host("user_annotation", "optimizer", 150, 10),
        host("user_annotation", "optimizer", 280, 20),
        {**host("gpu_user_annotation", "optimizer", 200, 200), "tid": 7},
        host("cuda_runtime", "cudaDeviceSynchronize", 300, 110, correlation=99),
        host("cpu_op", "aten::mm", 101, 5),
        *kernel(1, "nvjet_old", 150, 50, 40),  # of the step before
        *kernel(2, "nvjet_a", 200, 40, 110),
        *kernel(3, "ncclDevKernel_AllReduce", 230, 40, 120),  # 10 us beside nvjet_a, 10 beside the copy
        *kernel(4, "Memcpy DtoD (Device -> Device)", 260, 20, 125, "gpu_memcpy"),
        *kernel(5, "triton_poi_fused_add_0", 280, 10, 155),  # launched by the optimizer
        *kernel(6, "ncclDevKernel_AllGather", 290, 10, 159),  # so is this
        # nothing from 300 to 310
        *kernel(7, "nvjet_a", 310, 50, 170),
        *kernel(8, "mystery<int>", 350, 20, 180),  # 10 us beside nvjet_a
        *kernel(9, "nvjet_polar", 370, 30, 290),
    ]


def test_a_gpu_trace_by_hand():
    trace = gpu_trace()
    events, window = sp.analyse(trace, 8, is_gpu=True)
    assert window == (200, 400)
    assert len(events) == 9, "something that is no kernel, or a kernel lost"
    rows = {row.name: row for row in sp.account(events, window, 2, {sp.PRODUCTS: 0.0225, sp.ENTROPY: 1.0})}
    us = {name: row.ms * 1e3 for name, row in rows.items() if row.ms}
    want = {sp.PRODUCTS: 45, sp.OPTIMIZER: 20, sp.OTHER: 5, sp.COMMUNICATION: 20, sp.COPIES: 5, sp.GAPS: 5}
    assert us == pytest.approx(want)
    assert sum(row.share for row in rows.values()) == pytest.approx(1)
    assert rows[sp.COMMUNICATION].busy_ms == pytest.approx(0.025), "time beside compute is not in it"
    assert rows[sp.OTHER].busy_ms == pytest.approx(0.01)
    assert [rows[name].calls for name in (sp.PRODUCTS, sp.COMMUNICATION, sp.GAPS)] == [1, 1, 0]
    assert rows[sp.PRODUCTS].roofline == pytest.approx(0.5)
    assert rows[sp.ENTROPY].roofline is None, "of a row that took no time"


def replayed(number: int, launch: float, *kernels: tuple[str, float, float]) -> list[dict]:
    """A recorded graph: one launch by the host, whose correlation all its kernels have."""
    nodes = []
    for i, (name, ts, dur) in enumerate(kernels):
        args = {"correlation": number, "stream": 7, "graph node id": i}
        cat = "gpu_memset" if name.startswith("Memset") else "kernel"
        nodes.append({"ph": "X", "cat": cat, "name": name, "tid": 7, "ts": ts, "dur": dur, "args": args})
    return [*nodes, host("cuda_runtime", "cudaGraphLaunch", launch, 3, correlation=number)]


def graph_trace() -> list[dict]:
    """Two steps of 100 us, each a copy, a graph and the optimizer; the window is 200 to 400 us.

    The host is done with a step's optimizer before the device begins with its graph.
    """
    trace = [
        host("user_annotation", "step 7", 0, 30),
        host("user_annotation", "step 8", 30, 30),
        host("user_annotation", "step 9", 60, 30),
        *replayed(1, 10, ("nvjet_old", 120, 60)),
        *kernel(2, "triton_poi_fused_old", 180, 20, 25),  # of the step before: the window begins at its end
    ]
    for k, step in enumerate((30, 60)):
        begin, number = 200 + 100 * k, 10 * (k + 1)
        trace += [
            host("user_annotation", "optimizer", step + 15, 10),
            *kernel(number, "Memcpy DtoD (Device -> Device)", begin, 5, step + 2, "gpu_memcpy"),
            *replayed(
                number + 1, step + 5, ("Memset (Device)", begin + 5, 5), ("nvjet_a", begin + 10, 30),
                ("_prepare_qkv_kernel", begin + 40, 10), ("_relu2_kernel", begin + 50, 20),
            ),
            *kernel(number + 2, "_symmetric_kernel", begin + 70, 15, step + 17),
            *kernel(number + 3, "triton_poi_fused_add_0", begin + 85, 10, step + 24),
            *kernel(number + 5, "vectorized_elementwise_kernel", begin + 95, 5, step + 27),  # of the monitor
        ]  # fmt: skip
    return trace


def test_a_trace_with_graphs_by_hand():
    """A graph's kernels were launched with it: before the optimizer, whenever they run; each is counted."""
    events, window = sp.analyse(graph_trace(), 8, is_gpu=True)
    assert window == (200, 400)
    rows = {row.name: row for row in sp.account(events, window, 2, {})}
    us = {name: row.ms * 1e3 for name, row in rows.items() if row.ms}
    assert us == pytest.approx({sp.COPIES: 10, sp.PRODUCTS: 50, sp.ELEMENTWISE: 15, sp.OPTIMIZER: 25})
    calls = {name: row.calls for name, row in rows.items() if row.calls}
    assert calls == {sp.COPIES: 2, sp.PRODUCTS: 2, sp.ELEMENTWISE: 2, sp.OPTIMIZER: 2}
    kernels = {k.name: k for k in sp.kernels_by_cost(events, window, 2)}
    assert kernels["_symmetric_kernel"].row == sp.OPTIMIZER
    assert kernels["nvjet_a"] == sp.Kernel("nvjet_a", sp.PRODUCTS, pytest.approx(0.03), 1)
    assert "nvjet_old" not in kernels


def test_the_report_hides_nothing():
    events, window = sp.analyse(gpu_trace(), 8, is_gpu=True)
    rows, kernels = sp.account(events, window, 2, {}), sp.kernels_by_cost(events, window, 2)
    text = sp.report(rows, kernels)
    assert "communication: 0.025 ms a step, 0.020 ms of it exposed" in text
    assert "kernels that no rule knows: 1\n  mystery<int>: 0.010 ms, 0.5 launches\n" in text
    assert all(f"| {name} " in text for name in (*sp.ROWS, "step"))
    assert re.search(r"\| step +\| +0\.100 \| 100\.0% \| +4 \|", text)
    assert kernels[0] == sp.Kernel("nvjet_a", sp.PRODUCTS, pytest.approx(0.045), 1)
    assert "nvjet_old" not in text, "a kernel from before the window"
    many = [sp.Kernel(f"k{i:03}", sp.ELEMENTWISE, 1.0, 1) for i in range(40)]
    assert len(re.findall(r"\| k\d+ ", sp.report(rows, many))) == sp.TOP_KERNELS


@pytest.mark.parametrize("seed", range(5))
def test_rows_sum_to_the_window(seed):
    """Events at random, on many streams, across the window's edges too."""
    gen = torch.Generator().manual_seed(seed)
    begins, lengths = (
        (torch.rand(300, generator=gen) * 1000).tolist(),
        torch.rand(300, generator=gen).tolist(),
    )
    which = torch.randint(len(sp.ROWS) - 1, (300,), generator=gen).tolist()
    events = [
        sp.Event("k", sp.ROWS[i], begin, begin + 9 * length, begin)
        for i, begin, length in zip(which, begins, lengths, strict=True)
    ]
    window = (100.0, 900.0)
    spent = sp.paint(events, window)
    assert sum(spent.values()) == pytest.approx(800)
    assert min(spent.values()) >= 0
    # Against a clock that looks every 10 ns.
    ticks = torch.arange(100, 900, 0.01, dtype=torch.float64)
    owner = torch.full(ticks.shape, len(sp.ROWS) - 1)
    for e in events:
        inside = (ticks >= e.begin) & (ticks < e.end)
        owner[inside] = owner[inside].clamp(max=sp.ROWS.index(e.row))
    for i, row in enumerate(sp.ROWS):
        assert spent[row] == pytest.approx(float((owner == i).sum()) * 0.01, abs=2)


def test_a_trace_without_kernels_is_an_error():
    trace = [e for e in gpu_trace() if e["cat"] != "kernel" and e["cat"] != "gpu_memcpy"]
    with pytest.raises(AssertionError, match="CUPTI"):
        sp.analyse(trace, 8, is_gpu=True)


def test_operators_of_a_cpu_are_cut_where_they_call_others():
    trace = [
        host("user_annotation", "step 8", 0, 50),
        host("user_annotation", "step 9", 50, 50),
        host("user_annotation", "optimizer", 80, 20),
        host("cpu_op", "aten::mm", 10, 20),
        host("cpu_op", "aten::fill_", 15, 5),
        host("cpu_op", "autograd::engine::evaluate_function: MmBackward0", 40, 10),
        host("cpu_op", "aten::mm", 42, 4),
        host("cpu_op", "splits::softcapped_cross_entropy", 60, 10),
        host("cpu_op", "aten::exp", 61, 9),
        host("cpu_op", "aten::mul", 85, 10),
        {**host("cpu_op", "aten::mm", 0, 100), "tid": 2},
    ]
    events, window = sp.analyse(trace, 8, is_gpu=False)
    rows = {row.name: row for row in sp.account(events, window, 2, {})}
    us = {name: 2e3 * row.ms for name, row in rows.items() if row.ms}
    want = {sp.PRODUCTS: 19, sp.COPIES: 5, sp.ENTROPY: 10, sp.OPTIMIZER: 10, sp.GAPS: 56}
    assert us == pytest.approx(want)
    assert rows[sp.PRODUCTS].calls == 1, "one operator in two pieces is one call"


def test_names_are_shortened():
    long = "void at::native::(anonymous namespace)::kernel<4, at::native::FillFunctor<float>>"
    assert sp.shorten(long) == "kernel<4, FillFunctor<float>>"
    assert sp.shorten("aten::mm") == "aten::mm"
    assert sp.shorten("x" * 100).endswith("x...")
    assert len(sp.shorten("x" * 100)) == 64


# --- which steps, which roofline ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*tg.RECIPES, "nano"])
def test_every_stage_has_its_steps(name, nano):
    recipe = {**tg.RECIPES, "nano": nano}[name]
    plans = list(sp.plans(recipe))
    assert [number for number, _, _ in plans] == list(range(len(recipe.stages) - 1))
    for number, first, even in plans:
        assert even % 2 == 0
        assert first < even, "no step before the profiled ones"
        scheds = [tg.at(recipe, step) for step in range(first, even + 2)]
        assert {sched.stage for sched in scheds} == {number}, "a step of another stage"
        assert [sched.is_adam_step for sched in scheds[-2:]] == [False, True]
        if name != "nano":
            assert even - first == sp.SETTLE_STEPS + sp.TIMED_STEPS + 1
            timed = range(even - 1 - sp.TIMED_STEPS, even + 2)
            assert recipe.split_step not in timed, "the split step is timed"


def test_least_times():
    """Against numbers worked out by hand for recipe `sprint` on one GPU, embedding and head tied."""
    cfg = tg.Config(
        recipe=tg.RECIPES["sprint"], vocab_size=50257, slots=8, dtype=torch.bfloat16, attention="reference",
        fp8=("head",),
    )  # fmt: skip
    with torch.device("meta"):
        params = {
            "attn_bank": torch.empty(10, 4, 768, 768, dtype=torch.bfloat16),
            "embed": torch.empty(50304, 768, dtype=torch.bfloat16),
            "lm_head": torch.empty(768, 50304, dtype=torch.bfloat16),
        }
        moments = {name: {key: torch.empty(p.shape) for key in "mv"} for name, p in params.items()}
        bank = {"momentum": torch.empty(40, 768, 768), "low": torch.empty(40, 768, 768, dtype=torch.int16)}
    optimizer = SimpleNamespace(params=params, state={**moments, "attn_bank": bank}, is_tied=True)
    tables = SimpleNamespace(
        PARAMS=[row for row in tg.PARAMS if row.name in params], POLAR_COEFFICIENTS=tg.POLAR_COEFFICIENTS
    )
    job = SimpleNamespace(cfg=cfg, ranks=SimpleNamespace(world_size=2), optimizer=optimizer)
    least = sp.least_times(job, tables, 2_000_000, sp.Ceiling(1e12, 2e12, 1e12))
    # 10 layers with attention, 11 MLPs; the head at twice the rate.
    per_token = 6 * (10 * 4 * 768**2 + 11 * 2 * 768 * 3072 + 768 * 50304 / 2)
    assert least[sp.PRODUCTS] == pytest.approx(1e6 * per_token / 1e9)
    # Of the output projection all but the weight's gradient, two thirds of the FLOPs.
    fp8, mlp, out = ["head"], 11 * 2 * 768 * 3072, 10 * 768**2
    for name, flops in (("mlp", 6 * mlp), ("qkv", 6 * 3 * out), ("out", 4 * out)):
        fp8.append(name)
        job.cfg = dataclasses.replace(cfg, fp8=tuple(fp8))
        per_token -= flops / 2
        with_more = sp.least_times(job, tables, 2_000_000, sp.Ceiling(1e12, 2e12, 1e12))
        assert with_more[sp.PRODUCTS] == pytest.approx(1e6 * per_token / 1e9)
        assert with_more[sp.ENTROPY] == least[sp.ENTROPY]
    assert least[sp.ENTROPY] == pytest.approx(1e6 * 50304 * 5 / 1e9)
    matrices, head = 40 * 768**2, 768 * 50304
    moved = matrices * (8 + 4 + 6) + head * (16 + 6) / 2 + head * 10 / 2
    assert least[sp.OPTIMIZER] == pytest.approx((moved + 5 * 40 * 4 * 768**3) / 1e9)
    optimizer.is_tied = False
    moved += head * (16 + 6) / 2 - head * 10 / 2
    assert sp.least_optimizer(optimizer, tables, sp.Ceiling(1e12, 2e12, 1e12)) == pytest.approx(
        (moved + 5 * 40 * 4 * 768**3) / 1e12
    )
    job.cfg = dataclasses.replace(cfg, fp8=())
    assert sp.least_times(job, tables, 2_000_000, sp.CEILINGS["H200"])[sp.ENTROPY] == pytest.approx(
        1e6 * 50304 * 6 / 4.3e9
    )


# --- whole runs --------------------------------------------------------------------------------------------


def check_outcome(log: Path) -> str:
    """The log's lines after its header, when log, twin and traces are as they should be."""
    text = log.read_text()
    assert text.endswith("\nstatus: profiled\n")
    text = text[text.rindex("=" * 100) :]
    assert not re.search(r"^step:", text, re.M), "a step line: other tools take the log for a run"
    assert [run.status for run in compare_runs.parse_log(log.read_bytes(), log.name, str(log))] != [
        "complete"
    ]
    result = json.loads(log.with_suffix(".json").read_text())["result"]
    assert result["status"] == "profiled"
    assert [stage["stage"] for stage in result["profile"]] == [1, 2, 3]
    assert sorted(path.name for path in log.parent.glob("*.gz")) == [
        f"{log.stem}.stage{k}.trace.json.gz" for k in (1, 2, 3)
    ]
    for stage in result["profile"]:
        rows = stage["rows"]
        assert list(rows) == list(sp.ROWS)
        assert sum(row["share"] for row in rows.values()) == pytest.approx(1)
        assert sum(row["ms"] for row in rows.values()) == pytest.approx(stage["ms"])
        assert all(rows[name]["ms"] > 0 for name in (sp.PRODUCTS, sp.ENTROPY, sp.OPTIMIZER, sp.GAPS))
        assert rows[sp.OTHER]["share"] < 0.05, "operators that no rule knows"
        assert stage["unprofiled_ms"] > 0
        assert f"{stage['ms']:.2f} ms" in text
        with gzip.open(log.with_name(f"{log.stem}.stage{stage['stage']}.trace.json.gz"), "rt") as file:
            names = {event.get("name") for event in json.load(file)["traceEvents"]}
        even = {1: 2, 2: 6, 3: 10}[stage["stage"]]
        assert {"aten::mm", "optimizer", f"step {even}", f"step {even + 1}"} <= names
    return text


def test_a_run_on_a_cpu(monkeypatch, corpus_dir, tmp_path, capsys):
    """Every stage is profiled, nothing is validated, nothing is trained."""
    validate, limits = tg.validate, []
    monkeypatch.setattr(
        tg, "validate", lambda job, sched, limit=None: limits.append(limit) or validate(job, sched, limit)
    )
    monkeypatch.setattr(tg, "train", lambda *_: pytest.fail("it trains"))
    log = tmp_path / "logs" / "run.txt"
    argv = ["train_gpt.py", "--recipe", "nano", "--data", corpus_dir, "--out", log, "--profile"]
    monkeypatch.setattr(sys, "argv", list(map(str, argv)))
    assert tg.main() == 0
    assert limits == [1], "validation other than the warm-up's"
    text = check_outcome(log)
    assert "ceilings of this CPU: unknown" in text
    shown = capsys.readouterr().out
    assert shown.count("| where") == text.count("| where") == 3
    assert shown.count("that cost most") == 3


def test_every_profiled_stage_is_recorded_in_the_warm_up(monkeypatch, nano, corpus_dir, tmp_path):
    """On a GPU a stage's first call records its graph; here something that counts calls stands in for it."""
    calls, warm_up = [], tg.warm_up

    class Recording(tg.Passes):
        def __init__(self, job):
            super().__init__(job)
            self.grads = ["as on a GPU"]

        def __call__(self, micro, sched):
            calls.append(sched)
            return self.eager(micro, self.job.knobs(sched))

    def warmed(job):
        warm_up(job)
        assert {sched.stage for sched in calls} == set(range(len(nano.stages)))
        calls.clear()

    monkeypatch.setattr(tg, "Passes", Recording)
    monkeypatch.setattr(tg, "warm_up", warmed)
    argv = ["--recipe", "nano", "--data", corpus_dir, "--out", tmp_path / "run.txt", "--profile"]
    monkeypatch.setattr(sys, "argv", ["train_gpt.py", *map(str, argv)])
    assert tg.main() == 0
    steps = [step for _, first, even in sp.plans(nano) for step in range(first, even + 2)]
    assert list(dict.fromkeys(sched.step for sched in calls)) == steps


@pytest.mark.slow
def test_two_ranks(nano, corpus_dir, tmp_path):
    """Rank 0 writes; collectives have a row of their own."""
    script, log = tmp_path / "driver.py", tmp_path / "run.txt"
    script.write_text(
        f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nimport train_gpt\n"
        f"from train_gpt import Layer, Recipe, Stage\ntrain_gpt.RECIPES['nano'] = {nano!r}\n"
        "sys.exit(train_gpt.main())\n"
    )
    argv = [script, "--recipe", "nano", "--data", corpus_dir, "--out", log, "--profile"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [*launcher, *map(str, argv)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "world size 2" in check_outcome(log)
    for stage in json.loads(log.with_suffix(".json").read_text())["result"]["profile"]:
        assert stage["rows"][sp.COMMUNICATION]["calls"] >= 5


@pytest.mark.parametrize("others", [["--resume", "a.ckpt"], ["--checkpoint-every", "5"]])
def test_options_that_do_not_go_together(others):
    with pytest.raises(tg.InputError, match=r"--profile .*use it without"):
        tg.parse(["--profile", *others])
    assert tg.parse(["--profile"]).profile
    assert not tg.parse([]).profile
