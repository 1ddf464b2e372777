"""The golf trainer: quantiser, size fit, optimizer, average, schedule, model, data, and whole small runs."""

import ast
import dataclasses
import hashlib
import io
import json
import math
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import test_import
import test_style
import torch
import torch.multiprocessing as mp
from conftest import write_shard

import compare_runs
import train_gpt as tg
from golf import artifact, log_of
from golf import train_golf as golf
from recordbook import runs

pytestmark = pytest.mark.usefixtures("restored")

ROOT = Path(__file__).resolve().parents[1]
CPU = tg.Ranks(0, 1, torch.device("cpu"))
TINY = (
    "num_layers=3 model_dim=32 order=0,1,2,1,2 parallel_from=2 seq_len=64 stride=16 batch_tokens=512 "
    "micro_tokens=256 holdout_tokens=512 calibration_tokens=1024 steps=12 cap_bytes=150000 score="
).split()


def tiny(*changes: str) -> golf.Config:
    return golf.configure("smoke", "golf", [*TINY, *changes])


# the quantiser ----------------------------------------------------------------------------------------------
def hessians(gen: torch.Generator, banks: int, columns: int, dtype=torch.float64) -> torch.Tensor:
    """Second moments of correlated inputs of very different sizes."""
    mix = torch.randn(columns, columns, generator=gen, dtype=dtype)
    x = torch.randn(banks, 4 * columns, columns, generator=gen, dtype=dtype) @ mix
    x = x * torch.logspace(-1, 1, columns, dtype=dtype)
    return x.mT @ x


def constrained_codes(w: np.ndarray, scale: np.ndarray, most: int, hessian: np.ndarray) -> np.ndarray:
    """Round columns by falling diagonal; each time the rest is the least-squares answer to all errors.

    The minimum over the free columns F of tr(E H E^T), with the errors of the rounded columns Q fixed, is at
    E_F = -E_Q H_QF H_FF^-1: solved anew at every step, no factor carried along.
    """
    order = np.argsort(-np.diag(hessian), kind="stable")
    codes, errors = np.zeros_like(w), np.zeros_like(w)
    for n, j in enumerate(order):
        done, now = order[:n], w[:, j].copy()
        if n:
            free = order[n:]
            shift = (
                -errors[:, done] @ hessian[np.ix_(done, free)] @ np.linalg.inv(hessian[np.ix_(free, free)])
            )
            now += shift[:, 0]
        codes[:, j] = np.clip(np.round(now / scale), -most, most)
        errors[:, j] = codes[:, j] * scale - w[:, j]
    return codes


@pytest.mark.parametrize("block", [1, 5, 128])
def test_gptq_is_sequential_least_squares(block):
    gen = torch.Generator().manual_seed(block)
    w = torch.randn(3, 7, 24, generator=gen, dtype=torch.float64)
    hessian = hessians(gen, 3, 24)
    scale = golf.row_scale(w, 4, "sigma", 3.0).double()
    codes = golf.gptq(w, scale, 4, hessian, damp=0.01, block=block)
    for m in range(3):
        damped = hessian[m] + 0.01 * hessian[m].diagonal().mean() * torch.eye(24)
        wanted = constrained_codes(w[m].numpy(), scale[m, :, 0].numpy(), 7, damped.numpy())
        assert np.array_equal(codes[m].numpy(), wanted)


def weighted_error(w, codes, scale, hessian) -> torch.Tensor:
    e = codes * scale - w
    return torch.einsum("mri,mij,mrj->m", e, hessian, e)


@pytest.mark.parametrize("seed", range(5))
def test_gptq_beats_rounding_to_nearest_in_the_output(seed):
    gen = torch.Generator().manual_seed(seed)
    w, hessian = torch.randn(4, 16, 48, generator=gen), hessians(gen, 4, 48, torch.float32)
    scale = golf.row_scale(w, 6, "sigma", 12.85)
    nearest = golf.round_to_nearest(w, scale, 6)
    better = weighted_error(w, golf.gptq(w, scale, 6, hessian, 0.01), scale, hessian)
    plain = weighted_error(w, nearest, scale, hessian)
    assert (better < 0.7 * plain).all(), (better / plain).tolist()
    # Where inputs are not correlated there is nothing to take back.
    eye = torch.eye(48).expand(4, 48, 48)
    assert torch.equal(golf.gptq(w, scale, 6, eye, 0.01), nearest)


def test_gptq_of_dead_and_collinear_inputs():
    gen = torch.Generator().manual_seed(0)
    w, x = torch.randn(1, 4, 12, generator=gen), torch.randn(30, 12, generator=gen)
    x[:, 3] = 0.0
    x[:, 7] = x[:, 8]
    scale = golf.row_scale(w, 6, "sigma", 8.0)
    codes = golf.gptq(w, scale, 6, (x.T @ x)[None], damp=0.0)
    assert (codes[..., 3] == 0).all()
    assert codes.isfinite().all()
    assert codes.abs().max() <= 31


def test_sigma_clip_sets_the_entropy():
    w = torch.randn(1, 64, 4096, generator=torch.Generator().manual_seed(0)) * 0.03
    for bits, k in ((6, 12.85), (7, 15.0), (8, 20.0), (6, 6.0)):
        scale = golf.row_scale(w, bits, "sigma", k)
        most = 2 ** (bits - 1) - 1
        assert torch.allclose(scale[0, :, 0], k * w[0].std(dim=1, correction=0) / most, rtol=1e-3)
        assert torch.equal(scale.half().float(), scale)  # what is stored is what was divided by
        codes = golf.round_to_nearest(w, scale, bits)
        counts = torch.bincount((codes + most).long().flatten(), minlength=2 * most + 1).double()
        p = counts[counts > 0] / counts.sum()
        assert float(-(p * p.log2()).sum()) == pytest.approx(bits - math.log2(k) + 1.05, abs=0.05)
        assert codes.abs().max() <= most
    # A value far outside is clipped, not spread over the row.
    w[0, 0, 0] = 10.0
    scale = golf.row_scale(w, 6, "sigma", 6.0)
    assert golf.round_to_nearest(w, scale, 6)[0, 0, 0] == 31
    largest = golf.row_scale(w, 6, "max", 1.0)
    assert float(largest[0, 0]) == pytest.approx(10 / 31, rel=1e-3)
    assert golf.row_scale(torch.zeros(1, 2, 8), 6, "sigma", 12.0).min() > 0


@pytest.mark.parametrize("cap", [900.0, 500.0, 101.0])
def test_fit_comes_from_below(cap):
    def size(stretch: float) -> float:
        return 100 + 1000 / stretch

    found = golf.fit(size, cap, 0.5, 1000.0, rounds=20)
    assert size(found) <= cap
    assert size(found / 1.001) > cap


def test_fit_at_the_ends():
    assert golf.fit(lambda s: 1 / s, 100.0, 0.5, 4.0) == 0.5  # all fits: the finest
    assert golf.fit(lambda s: 1 / s, 0.1, 0.5, 4.0) == 4.0  # nothing fits: the coarsest


def random_weights(cfg: golf.Config, vocab: int = 257) -> tuple[dict, dict]:
    """Normal weights of the model's shapes, and Hessians for them."""
    gen = torch.Generator().manual_seed(0)
    shapes = golf.Golf.shapes(cfg, vocab)
    weights = {name: 0.05 * torch.randn(shape, generator=gen) for name, shape in shapes.items()}
    moments = {}
    for row in golf.PARAMS:
        if row.reads:
            *_, columns = shapes[row.name]
            moments[row.reads] = hessians(gen, 1 if row.kind == "embed" else cfg.num_layers, columns).float()
    return weights, moments


@pytest.mark.parametrize("quantizer", ["gptq", "rtn"])
def test_the_artifact_fills_its_room_and_no_more(quantizer):
    cfg = tiny(f"quantizer={quantizer}")
    weights, moments = random_weights(cfg)
    for room in (16_000, 24_000):
        packed = golf.compress(weights, moments, cfg, {"a": 1}, room)
        assert 0.97 * room < len(packed.data) <= room
        meta, tensors = artifact.unpack(packed.data)
        assert meta == {"a": 1, "stretch": packed.stretch}
        state = golf.restore(tensors, cfg, 257)
        assert {name: tuple(value.shape) for name, value in state.items()} == golf.Golf.shapes(cfg, 257)
    assert golf.compress(weights, moments, cfg, {"a": 1}, room).data == packed.data
    # No room at all: the coarsest, for the caller to say so.
    assert golf.compress(weights, moments, cfg, {}, 100).stretch == golf.stretch_limits(cfg)[1]


def test_tensors_of_another_model_are_refused():
    cfg = tiny()
    tensors = golf.quantize(*random_weights(cfg), cfg, 1.0, "rtn")
    with pytest.raises(golf.InputError, match="shape"):
        golf.restore(tensors, tiny("num_layers=4", "order="), 257)
    del tensors["q"]
    with pytest.raises(golf.InputError, match=r"\['q'\]"):
        golf.restore(tensors, cfg, 257)


# optimizer and average --------------------------------------------------------------------------------------
def polar(u: torch.Tensor) -> torch.Tensor:
    left, _, right = torch.linalg.svd(u.double(), full_matrices=False)
    return left @ right


@pytest.mark.parametrize("shape", [(2, 12, 8), (2, 8, 12)])
@pytest.mark.parametrize("has_row_norm", [True, False])
def test_muon_is_a_scaled_polar_step(shape, has_row_norm):
    gen = torch.Generator().manual_seed(0)
    p, grad, momentum = (torch.randn(shape, generator=gen) for _ in range(3))
    grad, momentum = grad.double().mul(100).float(), momentum * torch.logspace(-2, 2, shape[1])[:, None]
    before, kept = p.clone(), momentum.clone()
    lr, decay, mu = torch.tensor(0.1), torch.tensor(0.5), torch.tensor(0.9)
    golf.muon_step(p, grad, momentum, lr, decay, mu, has_row_norm, torch.float32)
    assert torch.allclose(momentum, 0.9 * kept + grad)
    u = grad + 0.9 * momentum
    if has_row_norm:
        u = u / u.norm(dim=-1, keepdim=True)
    step = (0.95 * before - p) / (0.1 * max(1.0, shape[1] / shape[2]) ** 0.5)  # 0.95: decay before the step
    wanted = polar(u).float()
    assert (step * wanted).sum() / (step.norm() * wanted.norm()) > 0.99
    values = torch.linalg.svdvals(step)
    assert values.max() < 1.16
    if has_row_norm:
        assert values.min() > 0.8
        # Rows that differ by 1e4 in size must not matter: the same step from the normalised momentum.
        again, zero = before.clone(), torch.zeros_like(p)
        golf.muon_step(again, u, zero, lr, decay, torch.tensor(0.0), True, torch.float32)
        assert torch.allclose(again, p, atol=2e-3)


def test_decay_is_decoupled():
    gen, results = torch.Generator().manual_seed(0), []
    p, grad = torch.randn(1, 6, 6, generator=gen), torch.randn(1, 6, 6, generator=gen)
    for decay in (0.0, 0.3):
        moved = p.clone()
        rates = torch.tensor(0.1), torch.tensor(decay), torch.tensor(0.9)
        golf.muon_step(moved, grad, torch.zeros_like(p), *rates, True, torch.float32)
        results.append(moved)
    assert torch.allclose(results[0] - results[1], 0.03 * p, atol=1e-6)


def one_step(rank: int, world: int, folder: str) -> None:
    """One optimizer step on this rank's half of a batch; rank 0 writes the parameters."""
    torch.set_num_threads(1)
    ranks = tg.Ranks(rank, world, torch.device("cpu"))
    if world > 1:
        where = f"file://{folder}/rendezvous"
        torch.distributed.init_process_group("gloo", init_method=where, rank=rank, world_size=world)
    cfg = tiny()
    model = golf.Golf(cfg, 257, 0, torch.float32)
    for p in model.parameters():  # nothing at its special initial value, where gradients vanish
        p.data += 0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
    optimizer = golf.MuonAndAdamW(model, ranks, lambda fn, **_: fn)
    rows = torch.randint(0, 257, (8, cfg.seq_len + 1), generator=torch.Generator().manual_seed(2))
    for i in range(2):
        (model(rows[rank::world], True) / (8 * cfg.seq_len)).backward()
        optimizer.step(golf.at(cfg, i / 2))
    if rank == 0:
        torch.save(model.state_dict(), f"{folder}/{world}.pt")
    if world > 1:
        torch.distributed.destroy_process_group()


def test_two_ranks_step_as_one(tmp_path):
    one_step(0, 1, str(tmp_path))
    mp.spawn(one_step, (2, str(tmp_path)), nprocs=2)
    one, two = (torch.load(tmp_path / f"{world}.pt") for world in (1, 2))
    model = golf.Golf(tiny(), 257, 0, torch.float32)
    for name, initial in model.state_dict().items():
        assert torch.allclose(one[name], two[name], atol=2e-5), name
        assert not torch.allclose(one[name], initial, atol=1e-3), f"{name} did not move"


def test_the_average_is_float32_and_moves():
    """A bf16 copy of the same rule, the negative control, stands still."""
    model = torch.nn.Linear(50, 50, bias=False)
    average, target = golf.Average(model), model.weight.detach() + 0.02 * torch.ones(50, 50)
    average.update(0.003)
    start = average.shadow[0].clone()
    coarse = start.bfloat16()
    model.weight.data.copy_(target)
    for _ in range(1000):
        average.update(0.003)
        coarse.lerp_(target.bfloat16(), 0.003)
    wanted = target + (start - target) * 0.997**1000
    assert average.shadow[0].dtype == torch.float32
    assert torch.allclose(average.shadow[0], wanted, atol=1e-5)
    assert (coarse.float() - wanted).abs().mean() > 20 * (average.shadow[0] - wanted).abs().mean()
    assert (coarse == start.bfloat16()).float().mean() > 0.3  # entries that never moved
    before = model.weight.detach().clone()
    average.swap()
    assert torch.equal(average.shadow[0], before)
    average.swap()
    assert torch.equal(model.weight, before)


# schedule ---------------------------------------------------------------------------------------------------
def test_schedule_at_its_points():
    cfg = golf.Config()
    assert golf.at(cfg, 0.0) == (1.0, pytest.approx(0.92), False, False)
    assert golf.at(cfg, 0.15)[:2] == (1.0, pytest.approx(0.945))
    assert golf.at(cfg, 0.3)[1] == 0.97
    assert [golf.at(cfg, f).is_looped for f in (0.349, 0.35, 1.0)] == [False, True, True]
    assert [golf.at(cfg, f).has_ema for f in (0.499, 0.5, 1.0)] == [False, True, True]
    assert golf.at(cfg, 0.28).lr == pytest.approx(1.0)
    assert golf.at(cfg, 0.64).lr == pytest.approx(0.5 + 0.5 * 0.1)
    assert golf.at(cfg, 1.0).lr == golf.at(cfg, 1.2).lr == pytest.approx(0.1)
    base = golf.configure("one", "baseline", [])
    assert not any(golf.at(base, f).is_looped or golf.at(base, f).has_ema for f in np.linspace(0, 1, 50))


def test_an_average_over_time_does_not_depend_on_the_number_of_steps():
    """Weights of the last tenth of the time, for 100 and for 1,000 steps."""
    shares = []
    for steps in (100, 1000):
        weight, old = golf.ema_weight(golf.Config(), 1 / steps), 1.0
        for _ in range(steps // 10):
            old *= 1 - weight
        shares.append(1 - old)
    assert shares[0] == pytest.approx(shares[1], rel=1e-9)
    assert shares[0] == pytest.approx(1 - math.exp(-0.1 / 0.065))


def test_the_guard_names_what_did_not_happen():
    cfg = tiny()
    guard = golf.Guard(cfg)
    for step, fraction in enumerate((0.0, 0.2, 0.33)):
        guard.note(cfg, step, golf.at(cfg, fraction), has_averaged=False)
    assert guard.missing() == ["loop", "EMA"]
    guard.note(cfg, 3, golf.at(cfg, 0.9), has_averaged=True)
    assert guard.missing() == []
    constant = dataclasses.replace(cfg, lr_floor=1.0)
    assert golf.at(constant, 1.0).lr == 1
    assert "warm-down" not in golf.Guard(constant).missing()
    assert guard.fired == {"warm-down": 2, "full momentum": 2, "loop": 3, "EMA": 3}


# model ------------------------------------------------------------------------------------------------------
def disturbed(cfg: golf.Config, seed: int = 0) -> golf.Golf:
    model = golf.Golf(cfg, 50, seed, torch.float32).eval()
    gen = torch.Generator().manual_seed(seed + 1)
    for p in model.parameters():
        p.data += 0.1 * torch.randn(p.shape, generator=gen)
    return model


def test_a_loop_is_the_unrolled_model():
    """Layers 1 2 twice = six layers, two pairs of them with equal weights."""
    looped = disturbed(tiny("num_layers=4", "order=0,1,2,1,2,3", "ln_scale=false", "parallel_from=9"))
    flat = disturbed(tiny("num_layers=6", "order=", "ln_scale=false", "parallel_from=9"))
    order = looped.cfg.order
    for row in golf.PARAMS:
        value = getattr(looped, row.name).detach()
        getattr(flat, row.name).data.copy_(value if row.name in ("embed", "skip") else value[list(order)])
    tokens = torch.randint(0, 50, (2, 64), generator=torch.Generator().manual_seed(3))
    assert torch.equal(looped.stream(tokens, True), flat.stream(tokens, False))
    assert not torch.allclose(looped.stream(tokens, True), looped.stream(tokens, False), atol=1e-2)


@pytest.mark.parametrize("recipe", ["golf", "baseline"])
def test_the_model_is_causal(recipe):
    model = disturbed(golf.configure("smoke", recipe, ["seq_len=64"]))
    tokens = torch.randint(0, 50, (1, 64), generator=torch.Generator().manual_seed(3))
    other = tokens.clone()
    other[0, 40] = (other[0, 40] + 1) % 50
    a, b = model.stream(tokens, True), model.stream(other, True)
    assert torch.equal(a[:, :40], b[:, :40])
    assert ((a - b)[:, 40:].abs().amax(-1) > 1e-6).all()


def test_attention_leaves_out_what_a_token_says_of_itself():
    gen = torch.Generator().manual_seed(0)
    y, v = torch.randn(2, 4, 5, 8, generator=gen), torch.randn(2, 2, 5, 8, generator=gen)
    out = golf.without_self(y, v)
    for head in range(4):
        along = v[:, head // 2] / v[:, head // 2].norm(dim=-1, keepdim=True)
        assert (out[:, head] * along).sum(-1).abs().max() < 1e-5
        kept = y[:, head] - out[:, head]
        assert torch.allclose(kept, (kept * along).sum(-1, keepdim=True) * along, atol=1e-5)


def test_the_loss_of_both_softcaps():
    for softcap, capped in (
        (30.0, lambda z: 30 * torch.tanh(z / 30)),
        (0.0, lambda z: 23 / (1 + (-(z + 5) / 7.5).exp())),
    ):
        model = disturbed(tiny(f"softcap={softcap}"))
        x, targets = torch.randn(20, 32, generator=torch.Generator().manual_seed(0)) * 3, torch.arange(20)
        z = capped(x @ model.embed.T)
        wanted = -z.log_softmax(-1)[range(20), targets]
        assert torch.allclose(model.nll(x, targets), wanted, atol=1e-5)
        assert model.nll(x, targets).requires_grad


def test_the_compiled_path_has_no_breaks_and_few_graphs():
    """Graphs are captured whole, as on a GPU; run without a code generator they give the same numbers."""
    captured = []

    def backend(graph, inputs):
        captured.append(graph)
        return graph

    torch._dynamo.reset()
    cfg = tiny()
    plain, model = disturbed(cfg), disturbed(cfg)
    forward, nll_at = (
        torch.compile(f, fullgraph=True, dynamic=False, backend=backend) for f in (model, model.nll_at)
    )
    rows = torch.randint(0, 50, (2, 65), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    places = torch.arange(64).expand(2, -1)
    for _ in range(2):
        for is_looped in (False, True):
            assert torch.allclose(forward(rows, is_looped), plain(rows, is_looped))
        with torch.no_grad():
            found = nll_at(rows[:, :-1], places, rows[:, 1:])
        assert torch.allclose(found.sum(), plain(rows, True), rtol=1e-5)
    assert len(captured) == 3
    optimizer = golf.MuonAndAdamW(
        model, CPU, lambda fn, **options: torch.compile(fn, backend=backend, **options)
    )
    for fraction in (0.1, 0.9):
        forward(rows, True).backward()
        optimizer.step(golf.at(cfg, fraction))
    shapes = {p.shape for p in model.parameters() if p.dim() == 3 and p.shape[1] > 2}
    assert len(captured) == 3 + len(shapes)
    torch._dynamo.reset()


# data -------------------------------------------------------------------------------------------------------
def test_every_window_once_an_epoch_and_the_hold_out_never(corpus_dir):
    cfg, corpus = tiny(), tg.Corpus.open(corpus_dir)
    data = golf.Sequences.open(corpus, cfg, seed=3)
    count = sum((len(tg.map_shard(path)) - 1) // 64 for path in corpus.train)
    held, size = data.holdout(), 8
    steps = (count - len(held)) // size
    epoch = np.concatenate([data.batch(step, size) for step in range(steps)])
    assert len(np.unique(epoch)) == len(epoch) == steps * size
    assert not set(held) & set(epoch)
    over = np.concatenate([data.batch(step, size) for step in range(3 * steps)])
    assert not set(held) & set(over)
    assert max(np.bincount(over)) <= 4
    assert not np.array_equal(epoch, over[len(epoch) : 2 * len(epoch)])
    rows = data.read(np.array([0, count - 1]))
    first, last = (tg.map_shard(path) for path in corpus.train)
    assert np.array_equal(rows[0], first[:65])
    place = (len(last) - 1) // 64 - 1
    assert np.array_equal(rows[1], last[64 * place : 64 * place + 65])


def test_two_ranks_read_what_one_reads(corpus_dir):
    cfg, corpus = tiny(), tg.Corpus.open(corpus_dir)
    data = golf.Sequences.open(corpus, cfg, seed=3)

    def first_steps(ranks: tg.Ranks) -> list[torch.Tensor]:
        stream = golf.batches(data, cfg, ranks, corpus)
        found = [torch.cat(next(stream)) for _ in range(3)]
        stream.close()
        return found

    alone = first_steps(CPU)
    both = [first_steps(tg.Ranks(rank, 2, torch.device("cpu"))) for rank in range(2)]
    for step in range(3):
        assert torch.equal(alone[step], torch.cat((both[0][step], both[1][step])))


# whole runs -------------------------------------------------------------------------------------------------
def sentences(rng: np.random.Generator, count: int) -> str:
    """Documents that can be learnt: few words, each likely to follow its neighbour."""
    words = [f"{a}{b}" for a in ("ka", "lo", "mi", "tu", "re") for b in ("n", "st", "l", "r", "mm")]
    lines = []
    for _ in range(count):
        at = np.cumsum(rng.integers(1, 4, rng.integers(20, 90))) + rng.integers(len(words))
        lines.append(" ".join(words[i % len(words)] for i in at) + ".")
    return "\n<|endoftext|>\n".join(lines)


@pytest.fixture(scope="session")
def golf_dir(tmp_path_factory) -> Path:
    """A folder that data/prepare.py made, plain bytes as tokens."""
    folder, rng = tmp_path_factory.mktemp("golf"), np.random.default_rng(0)
    (folder / "train.txt").write_text(sentences(rng, 200))
    (folder / "val.txt").write_text(sentences(rng, 20))
    argv = [ROOT / "data" / "prepare.py", folder / "train.txt", "--val", folder / "val.txt"]
    argv += ["--tokenizer", "bytes", "--out", folder / "toy", "--workers", "1"]
    subprocess.run([sys.executable, *argv], check=True, capture_output=True)
    return folder / "toy"


@pytest.fixture
def trainer(monkeypatch, capfd, golf_dir, tmp_path):
    """Run train_golf.py in this process: (exit code, folder, stderr)."""

    def call(*options: object, mode: str = "smoke", name: str = "run", changes=()) -> tuple[int, Path, str]:
        sets = [part for change in [*TINY, *changes] for part in ("--set", change)]
        argv = ["train_golf.py", "--mode", mode, "--data", golf_dir, "--out", tmp_path / name]
        argv += [*sets, *options]
        monkeypatch.setattr(sys, "argv", list(map(str, argv)))
        capfd.readouterr()
        return golf.main(), tmp_path / name, capfd.readouterr().err

    return call


def test_a_run_as_run_sh_starts_it(trainer, tmp_path):
    """RECIPE-MODE, and the name of a log; the plan's sources are those of the log."""
    options = "--recipe", "baseline-smoke", "--out", tmp_path / "run-001.txt"
    code, _, err = trainer(*options, changes=["score=none", "order="])
    assert code == 0, err
    (run,) = compare_runs.parse_log((tmp_path / "run-001.txt").read_bytes(), "run", "run")
    assert (run.status, run.head["recipe"]) == ("complete", "baseline-smoke")
    assert (tmp_path / "run-001" / "model.golf").exists()
    assert log_of(tmp_path / "run-001") == tmp_path / "run-001.txt"
    assert runs.source_of(runs.files_of(str(ROOT / "golf" / "train_golf.py"))) == run.source


def test_ablations_leave_the_run_as_it_is(trainer, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import golf_ablations

    code, plain, _ = trainer(name="plain")
    assert code == 0
    monkeypatch.setattr(golf, "export", golf_ablations.with_ablations(golf.export))
    code, out, err = trainer(name="ablated")
    assert code == 0, err
    rows = json.loads((out / "ablations.json").read_text())
    assert list(rows)[2:] == list(golf_ablations.COMPRESSIONS)
    result = json.loads((out / "result.json").read_text())
    own = rows["gptq, range by sigma"]
    assert own["val_bpb"] == pytest.approx(result["quantized_val_bpb"], abs=1e-6)
    assert rows["exported weights, not quantised"]["val_bpb"] == pytest.approx(result["val_bpb"], abs=1e-9)
    assert all(row.get("fits", True) for name, row in rows.items() if "sigma" in name)
    sizes = [rows[f"gptq, range by sigma{k}"]["total_bytes"] for k in (", embed_k 15", ", embed_k 9", "")]
    assert sizes == sorted(set(sizes))  # there is room enough here, so finer codes are only more bytes
    assert (out / "model.golf").read_bytes() == (plain / "model.golf").read_bytes()


def test_a_run_and_its_files(trainer, golf_dir):
    code, out, _ = trainer(changes=["score=none"])
    assert code == 0
    result, log = json.loads((out / "result.json").read_text()), (out / "train.txt").read_text()
    data, packed = (out / "model.golf").read_bytes(), (out / "code.zip").read_bytes()
    assert result["artifact_bytes"] == len(data)
    assert result["total_bytes"] == len(data) + len(packed) <= result["cap_bytes"]
    assert result["scores"]["none"]["val_bpb"] == pytest.approx(result["quantized_val_bpb"], abs=1e-6)
    assert (
        result["scores"]["none"]["bytes"]
        == json.loads((golf_dir / "manifest.json").read_text())["splits"]["val"]["bytes"]
    )
    assert result["quantized_val_loss"] < 0.9 * math.log(257)
    assert packed == golf.pack_code()
    with zipfile.ZipFile(out / "code.zip") as archive:
        for name in golf.CODE:
            source = (ROOT / name).read_bytes()
            assert archive.read(name) == source
            assert f"#### source {Path(name).name} sha256={hashlib.sha256(source).hexdigest()}" in log
    ledger = result["ledger_s"]
    assert {"training", "calibration", "quantise, fit, pack", "score none"} <= set(ledger)
    assert log.rstrip().endswith("status: done")
    (run,) = compare_runs.parse_log((out / "train.txt").read_bytes(), "run", "run")
    assert (run.status, run.reason) == ("complete", "")
    assert run.bpb == pytest.approx(result["scores"]["none"]["val_bpb"], abs=1e-6)
    assert run.seconds == pytest.approx(result["train_time_ms"] / 1000, abs=0.01)
    assert re.findall(r"^step:(\d+)/12 train_loss:", log, re.M) == [str(step) for step in range(1, 13)]
    assert re.findall(r"^step:(\d+)/12 val_loss:", log, re.M) == ["6", "12"]


def test_a_seed_repeats_and_another_differs(trainer):
    folders = [trainer("--seed", seed, name=name)[1] for seed, name in ((1, "a"), (1, "b"), (2, "c"))]
    first, again, other = ((folder / "model.golf").read_bytes() for folder in folders)
    assert first == again
    assert first != other


def test_ablations_run(trainer):
    code, out, _ = trainer(
        name="rtn", changes=["quantizer=rtn", "clip=max", "ema=false", "order=", "softcap=0"]
    )
    assert code == 0
    assert "loop" not in (out / "train.txt").read_text().split("schedule: ")[1].split("\n")[0]
    assert json.loads((out / "result.json").read_text())["hold_out"].keys() == {"last"}


def test_a_budget_in_seconds(trainer):
    code, out, _ = trainer(
        mode="one",
        changes=[
            "steps=0",
            "budget_seconds=3",
            "reserve=0.2",
            "num_heads=4",
            "num_kv_heads=2",
            "rope_dims=8",
        ],
    )
    result = json.loads((out / "result.json").read_text())
    assert code == 0, result
    assert 2.4 <= result["train_data_access_end_s"] <= 3
    (run,) = compare_runs.parse_log((out / "train.txt").read_bytes(), "run", "run")
    assert (run.status, run.reason) == ("complete", "")
    assert "stopping_early: budget" in (out / "train.txt").read_text()


def test_the_worse_weights_are_not_exported(trainer, monkeypatch):
    """An average that is spoilt is not chosen."""
    update = golf.Average.update

    def spoil(self, weight):
        update(self, weight)
        for mean in self.shadow:
            mean.add_(0.3 * torch.randn(mean.shape, generator=torch.Generator().manual_seed(0)))

    monkeypatch.setattr(golf.Average, "update", spoil)
    _, out, _ = trainer()
    result = json.loads((out / "result.json").read_text())
    assert result["hold_out"]["average"] > result["hold_out"]["last"] + 0.1
    assert result["val_loss"] < result["hold_out"]["last"] + 0.1


@pytest.mark.parametrize(
    ("changes", "options", "said"),
    [
        (["depth=3"], (), r"no field 'depth'.*KEY one of num_layers"),
        (["num_layers=three"], (), r"num_layers=three: must be int"),
        (["ema=yes"], (), r"ema=yes: must be true or false"),
        (["matrix_lr=nan"], (), r"matrix_lr=nan: must be float"),
        (["order=0,1"], (), r"order is \(0, 1\): must name layers 0 to 2"),
        (["matrix_bits=9"], (), r"matrix_bits is 9: must be from 2 to 8"),
        (["num_layers=2000000000"], (), r"num_layers is 2000000000: must be from 2 to 64"),
        (["num_layers=1", "order="], (), r"num_layers is 1: must be from 2 to 64"),
        (["micro_tokens=10000000000000"], (), r"micro_tokens is 10000000000000: must be at most 1048576"),
        (["val_points=1000000000000"], (), r"val_points is 1000000000000: must be below 1000000"),
        (["damp=1e9"], (), r"damp is 1000000000.0: must be from 0 to below 1"),
        (["batch_tokens=100"], (), r"batch_tokens is 100: must be a multiple of seq_len 64"),
        (["cap_bytes=50000"], (), r"cap_bytes is 50,000"),
        (["holdout_tokens=100000000"], (), r"the training shards give"),
        ([], ("--recipe", "other"), r"--recipe 'other' does not exist"),
        ([], ("--recipe", "golf-full"), r"--mode smoke, but --recipe names mode full"),
        ([], ("--data", "/nowhere"), r"no manifest.json in /nowhere"),
        ([], ("--seed", "-1"), r"--seed -1"),
    ],
)
def test_refusals(trainer, tmp_path, changes, options, said):
    code, out, stderr = trainer(*options, changes=changes)
    assert code == 2
    assert len(stderr.rstrip().split("\n")) == 1
    assert re.search(said, stderr), stderr
    assert not out.exists()


def test_documents_on_both_sides_are_refused(trainer, golf_dir, tmp_path):
    folder = shutil.copytree(golf_dir, tmp_path / "leak")
    (train,), (val,) = (list(folder.glob(f"*_{split}_*.bin")) for split in ("train", "val"))
    one, two = (np.array(tg.map_shard(path)) for path in (train, val))
    document = two[: np.flatnonzero(two == 256)[1]]
    joined = np.concatenate((one, document))
    write_shard(train, joined)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["splits"]["train"]["shards"][0]["tokens"] = len(joined)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    code, out, stderr = trainer("--data", folder)
    assert code == 2
    assert "1 of 20 validation documents are in this training shard" in stderr
    assert not out.exists()


def test_another_vocabulary_is_refused(trainer, corpus_dir):
    """A folder that says `bytes` and holds 250 tokens."""
    code, _, stderr = trainer("--data", corpus_dir)
    assert code == 2
    assert "vocabulary 257, BOS 256" in stderr


def test_a_tokenizer_file_that_was_changed_is_refused(trainer, golf_dir, tmp_path):
    """The shards' manifest names another hash than the file beside them has."""
    folder = shutil.copytree(golf_dir, tmp_path / "other")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["tokenizer"] |= {"kind": "sentencepiece", "files": [{"file": "a.model", "sha256": "0" * 64}]}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "a.model").write_bytes(b"another model")
    code, _, stderr = trainer("--data", folder)
    assert code == 2
    assert re.search(r"a.model: SHA-256 \S+, the manifest says 0000", stderr)


def test_a_budget_without_a_step_is_refused(trainer):
    code, _, stderr = trainer(
        mode="one",
        changes=["steps=0", "budget_seconds=0.001", "num_heads=4", "num_kv_heads=2", "rope_dims=8"],
    )
    assert code == 2
    assert "one step takes" in stderr


def test_a_schedule_that_is_not_reached_fails(trainer):
    code, out, _ = trainer(changes=["steps=1"])
    assert code == 4
    last = (out / "train.txt").read_text().rstrip().split("\n")[-1]
    assert last.startswith("status: crashed: promise not kept: scheduled and never reached: warm-down")
    assert (out / "model.golf").exists()  # the work is not lost
    (run,) = compare_runs.parse_log((out / "train.txt").read_bytes(), "run", "run")
    assert run.status == "crashed"


def test_a_loss_that_is_no_number_ends_the_run(trainer, monkeypatch):
    nll = golf.Golf.nll
    monkeypatch.setattr(golf.Golf, "nll", lambda self, x, t: nll(self, x, t) * math.nan)
    code, out, _ = trainer()
    assert code == 3
    assert "status: diverged at step 1: training loss is nan" in (out / "train.txt").read_text()


def test_what_is_over_the_cap_says_so(trainer, monkeypatch):
    monkeypatch.setattr(golf, "expected_bytes", lambda *_: 0.0)
    code, out, _ = trainer(changes=[f"cap_bytes={len(golf.pack_code()) + 500}"])
    assert code == 4
    assert "are over the cap of" in (out / "train.txt").read_text().rstrip().split("\n")[-1]
    assert (out / "model.golf").exists()


def test_nothing_is_overwritten(trainer):
    code, out, _ = trainer()
    kept = (out / "model.golf").read_bytes()
    code, _, stderr = trainer("--seed", "2")
    assert code == 2
    assert "holds a model.golf already" in stderr
    assert (out / "model.golf").read_bytes() == kept


def test_the_code_is_all_that_runs(tmp_path):
    """In a clean process, what the scorer imports of the project is what code.zip holds."""
    folder = tmp_path / "code"
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import golf.score;"
        "files = [str(getattr(m, '__file__', '')) for m in list(sys.modules.values())];"
        "print(*(f for f in files if f.startswith(sys.argv[1])), sep='\\n')"
    )
    environment = {"PYTHONPATH": "", "HOME": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}
    with zipfile.ZipFile(io.BytesIO(golf.pack_code())) as archive:
        archive.extractall(folder)
    command = [sys.executable, "-c", code, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = {str(Path(line).relative_to(folder)) for line in done.stdout.split()}
    assert found == set(golf.CODE)


def test_config_fields_are_all_ruled_or_switches():
    """Every number of the config has a rule, so that no mistyped value trains for ten minutes."""
    ruled = {name for name, _, rule in golf.Config().rules() if "type" not in rule}
    free = {f.name for f in dataclasses.fields(golf.Config)} - ruled
    assert free == {"row_norm", "ln_scale", "ema"}


# style and import -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["train_golf", "score"])
def test_the_files_keep_the_rules_of_style(monkeypatch, name):
    source = (ROOT / "golf" / f"{name}.py").read_text(encoding="utf-8")
    lines, tree = source.splitlines(), ast.parse(source)
    assert len(lines) <= test_style.MAX_LINES
    assert all(len(line) <= test_style.MAX_WIDTH and line.isascii() and "\t" not in line for line in lines)
    for where, node in test_style.functions(tree):
        is_class = isinstance(node, ast.ClassDef)
        assert is_class or node.end_lineno - node.lineno < test_style.MAX_FUNCTION, where
    assert not [n.lineno for n in ast.walk(tree) if isinstance(n, ast.Global)]
    assert all(n.msg for n in ast.walk(tree) if isinstance(n, ast.Assert))
    monkeypatch.setattr(test_style, "source_of", lambda module: source)
    assert test_style.reach_ins(f"golf.{name}") == set()


def test_importing_has_no_side_effect(tmp_path):
    test_import.run_clean(IMPORT, tmp_path, CUDA_VISIBLE_DEVICES="")


IMPORT = """
import os, signal, sys, threading
import torch, torch.distributed as dist
handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
random, threads = torch.get_rng_state(), threading.enumerate()
import golf.score, golf.train_golf
assert golf.score.golf is golf.train_golf, "two copies"
assert not dist.is_initialized() and not torch.cuda.is_initialized()
assert threading.enumerate() == threads and os.listdir() == []
assert handlers == {s: signal.getsignal(s) for s in handlers}
assert torch.equal(random, torch.get_rng_state())
for heavy in ("sentencepiece", "tiktoken", "matplotlib", "scipy"):
    assert heavy not in sys.modules, heavy
"""
