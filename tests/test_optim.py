"""Update rules against float64 and literal examples; the optimizer's order, ties, split and reset."""

import inspect
import math

import numpy as np
import pytest
import torch
from torch import Tensor

import train_gpt as tg

ONE_RANK = tg.Ranks(0, 1, torch.device("cpu"))
MUONS = ("attn_bank", "mlp_bank")
ADAMS = tuple(row.name for row in tg.PARAMS if row.optim == "adam")


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def random(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def zero_d(*values: float) -> list[Tensor]:
    return [torch.tensor(float(x)) for x in values]


# Adam


def test_adam_is_torch_adam_without_decay():
    """Only eps differs: torch adds it after the bias correction. Here both are too small to matter."""
    p = random(500, seed=1)
    theirs = torch.nn.Parameter(p.clone())
    torch_adam = torch.optim.Adam([theirs], lr=0.03, betas=(0.75, 0.95), eps=1e-30)
    m, v = torch.zeros(500), torch.zeros(500)
    for t in range(1, 8):
        grad = random(500, seed=10 + t, scale=10.0**-t)
        step_size = 0.03 * math.sqrt(1 - 0.95**t) / (1 - 0.75**t)
        tg.adam_step(p, grad, m, v, *zero_d(step_size, 0, 0.75, 0.95), 1e-30)
        theirs.grad = grad.clone()
        torch_adam.step()
        torch.testing.assert_close(
            p, theirs.detach(), rtol=1e-5, atol=1e-6, msg=lambda x, t=t: f"step {t}: {x}"
        )


def test_adam_adds_eps_to_the_uncorrected_root():
    """m = g/4 and sqrt(v) = g/2 = 5e-11: u = step * 2.5e-11 / (5e-11 + 1e-10) = step / 6."""
    p, m, v = torch.ones(1), torch.zeros(1), torch.zeros(1)
    tg.adam_step(p, torch.full((1,), 1e-10), m, v, *zero_d(0.6, 0, 0.75, 0.75), 1e-10)
    assert p.item() == pytest.approx(0.9, rel=1e-6)


def test_adam_decays_only_where_the_update_points_to_zero():
    """With both betas 0 an update is step_size * sign(g)."""
    p = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, -2.0, 0.0])
    g = torch.tensor([3.0, 3.0, -3.0, -3.0, 0.0, 0.0, 3.0])
    tg.adam_step(p, g, torch.zeros(7), torch.zeros(7), *zero_d(0.1, 0.01, 0, 0), 1e-10)
    assert p.tolist() == pytest.approx([0.89, -1.1, 1.1, -0.89, 1.0, -2.0, -0.1]), (
        "an update of 0 does not decay"
    )


def test_adam_keeps_float32_moments_of_a_bf16_parameter():
    p, m, v = torch.ones(4, dtype=torch.bfloat16), torch.zeros(4), torch.zeros(4)
    tg.adam_step(p, torch.full((4,), 1.0).bfloat16(), m, v, *zero_d(0.003, 0, 0.9, 0.99), 1e-10)
    assert m.tolist() == pytest.approx([0.1] * 4)
    assert v.tolist() == pytest.approx([0.01] * 4)
    assert p.tolist() == [float(torch.tensor(0.997).bfloat16())] * 4


# Polar express

# The polynomials' exact extremes over [1e-3, 1] are 0.8466 and 1.1411; bf16 widens that by less than 0.01.
BAND = 0.83, 1.15


def with_values(rows: int, columns: int, values: Tensor, seed: int) -> Tensor:
    """A matrix with these singular values."""
    left, _, right = torch.linalg.svd(random(rows, columns, seed=seed).double(), full_matrices=False)
    return (left * values @ right).float()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bf16"])
@pytest.mark.parametrize(
    ("rows", "columns"), [(32, 32), (64, 32), (32, 64), (128, 128), (256, 64), (16, 128)], ids=str
)
def test_polar_express_band(rows, columns, dtype):
    """Random, ill-conditioned, half of full rank and tiny; side by side, since a bank is one call."""
    rank = min(rows, columns)
    half = torch.where(torch.arange(rank) < rank // 2, 1.0, 1e-8).double()
    bank = [
        random(rows, columns),
        with_values(rows, columns, torch.logspace(0, -3.5, rank, dtype=torch.float64), seed=1),
        with_values(rows, columns, half, seed=2),
        1e-5 * random(rows, columns, seed=3),
    ]
    result = tg.polar_express(torch.stack(bank), dtype)
    assert (result.dtype, result.shape) == (dtype, (4, rows, columns))
    for given, o in zip(bank, result.double(), strict=True):
        left, values, right = torch.linalg.svd(given.double(), full_matrices=False)
        large = values >= 1e-3 * values.norm()
        got = torch.linalg.svdvals(o)[: int(large.sum())]
        assert BAND[0] < got.min() <= got.max() < BAND[1]
        # The same singular vectors: U^T O V is diagonal, with the new singular values on it.
        inner = left.T @ o @ right.mT
        along = inner.diagonal()[large]
        assert BAND[0] < along.min() <= along.max() < BAND[1]
        if dtype == torch.float32:
            assert float((inner - inner.diagonal().diag()).abs().max()) < 1e-4


def test_polar_express_of_nothing_is_nothing():
    assert not tg.polar_express(torch.zeros(2, 8, 4), torch.float32).any()


# bf16 and the bits it leaves out


def test_split_and_join_are_inverse_for_every_bit_pattern():
    patterns = np.random.default_rng(0).integers(0, 2**32, 200_000, dtype=np.uint32)
    special = [
        0,
        1 << 31,
        1,
        0x80000001,
        0x0000FFFF,
        0x00010000,
        0x007FFFFF,
        0x8000FFFF,
        0x7F7FFFFF,
        0xFF7FFFFF,
    ]
    bits = np.concatenate(
        [patterns, np.array(special, np.uint32), np.arange(0xFFFF, 1 << 20, 0x7FFF, np.uint32)]
    )
    x = torch.from_numpy(bits.view(np.float32))
    high, low = tg.split_float32(x)
    assert (high.dtype, low.dtype) == (torch.bfloat16, torch.int16)
    assert np.array_equal(high.view(torch.int16).numpy().view(np.uint16), (bits >> 16).astype(np.uint16))
    assert np.array_equal(low.numpy().view(np.uint16), (bits & 0xFFFF).astype(np.uint16))
    assert np.array_equal(tg.join_float32(high, low).numpy().view(np.uint32), bits)


def test_split_truncates():
    x = torch.tensor([1 + 2**-8 + 2**-9, -(1 + 2**-8 + 2**-9), 1 + 2**-7])  # rounding would go up
    assert tg.split_float32(x)[0].tolist() == [1.0, -1.0, 1 + 2**-7]


def test_bf16_with_low_bits_is_float32_arithmetic(monkeypatch):
    """Polar express computes in the parameter's dtype; take it out, and the two must agree in every bit."""
    monkeypatch.setattr(tg, "polar_express", lambda u, dtype: u)
    start = random(3, 16, 8, seed=1).bfloat16()
    bf16, low, f32 = start.clone(), torch.zeros(3, 16, 8, dtype=torch.int16), start.float()
    states = [(torch.zeros(3, 16, 8), torch.zeros(3, 16, 1)) for _ in range(2)]
    lr = torch.tensor([0.023, 0.046, 0.092]).view(3, 1, 1)
    for step in range(6):
        grad = random(3, 16, 8, seed=20 + step).bfloat16()
        rest = lr, *zero_d(0.03, 0.9), 0.95
        tg.normuon_step(bf16, low, grad, *states[0], *rest)
        tg.normuon_step(f32, None, grad, *states[1], *rest)
        assert torch.equal(tg.join_float32(bf16, low), f32), f"step {step}"
    assert low.any()
    assert not torch.equal(bf16, f32.bfloat16()), "truncated, not rounded"


# NorMuon


def polar_by_hand(u: Tensor) -> Tensor:
    """One matrix in float64; X X^T always over the smaller side."""
    x = u.T if u.shape[0] > u.shape[1] else u
    x = x / (1.02 * x.square().sum().sqrt() + 1e-6)
    for a, b, c in (
        (8.156554524902461, -22.48329292557795, 15.878769915207462),
        (4.042929935166739, -2.808917465908714, 0.5000178451051316),
        (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
        (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
        (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
    ):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if u.shape[0] > u.shape[1] else x


class MatrixByHand:
    """NorMuon of one matrix in float64."""

    def __init__(self, p: Tensor) -> None:
        self.p, self.momentum, self.second = p.double(), 0.0, 0.0

    def step(self, grad: Tensor, lr: float, decay: float, mu: float) -> None:
        g = grad.double()
        self.momentum = mu * self.momentum + (1 - mu) * g
        o = polar_by_hand((1 - mu) * g + mu * self.momentum)
        rows, columns = o.shape
        square = (o**2).mean(1 if rows >= columns else 0, keepdim=True)
        self.second = 0.95 * self.second + 0.05 * square
        before = (o**2).sum().sqrt()
        o = o / self.second.clamp(min=1e-10).sqrt()
        o = o * before / (o**2).sum().sqrt().clamp(min=1e-10)
        self.p = self.p - lr * (torch.where(o * self.p >= 0, decay * self.p, 0.0) + o)


class AdamByHand:
    """Adam of one tensor in float64; counts its own updates."""

    def __init__(self, p: Tensor) -> None:
        self.p, self.m, self.v, self.t = (
            p.double(),
            torch.zeros_like(p).double(),
            torch.zeros_like(p).double(),
            0,
        )

    def step(self, grad: Tensor, lr: float, decay: float, betas: tuple[float, float]) -> None:
        self.t += 1
        self.m = betas[0] * self.m + (1 - betas[0]) * grad.double()
        self.v = betas[1] * self.v + (1 - betas[1]) * grad.double() ** 2
        correction = math.sqrt(1 - betas[1] ** self.t) / (1 - betas[0] ** self.t)
        u = lr * correction * self.m / (self.v.sqrt() + 1e-10)
        self.p = self.p - u - torch.where(u * self.p > 0, lr**2 * decay * self.p, 0.0)


def assert_almost_all_close(got: Tensor, want: Tensor, what: str, tolerance: float = 2e-5) -> None:
    """An element whose update is about 0 may decay in one precision and not in the other: 1 in 1000 may."""
    error = (got.double() - want).abs() / (want.abs().mean() + 1e-12)
    assert float((error > tolerance).double().mean()) < 1e-3, f"{what}: {float(error.max()):.2e}"
    assert float(error.max()) < 0.05, f"{what}: {float(error.max()):.2e}"


@pytest.mark.parametrize(("rows", "columns"), [(24, 24), (48, 16), (16, 48)], ids=str)
def test_normuon_against_float64(rows, columns):
    p = random(3, rows, columns, seed=1)
    exact = [MatrixByHand(matrix) for matrix in p]
    momentum = torch.zeros_like(p)
    second = torch.zeros(3, rows, 1) if rows >= columns else torch.zeros(3, 1, columns)
    lrs = (0.02, 0.04, 0.3)
    for step, mu in enumerate((0.85, 0.9, 0.95, 0.95, 0.8)):
        # Rows and columns of very different size, so that the mean over the wrong one shows.
        grad = random(3, rows, columns, seed=step + 5) * torch.logspace(-1, 1, rows)[:, None]
        grad = grad * torch.logspace(1, -1, columns)
        lr = torch.tensor(lrs).view(3, 1, 1)
        tg.normuon_step(p, None, grad, momentum, second, lr, *zero_d(0.5, mu), 0.95)
        for i, matrix in enumerate(exact):
            matrix.step(grad[i], lrs[i], 0.5, mu)
    for i, matrix in enumerate(exact):
        assert_almost_all_close(p[i], matrix.p, f"matrix {i}", 1e-4)
        assert_almost_all_close(second[i], matrix.second, f"second moment {i}", 1e-4)


@pytest.mark.parametrize(("rows", "columns"), [(16, 16), (32, 8), (8, 32)], ids=str)
def test_variance_reduction_keeps_the_norm_and_evens_out_rows(rows, columns, monkeypatch):
    uneven = random(2, rows, columns) * torch.logspace(-1, 1, max(rows, columns))[:rows, None]
    monkeypatch.setattr(tg, "polar_express", lambda u, dtype: uneven)
    p, shape = torch.zeros(2, rows, columns), (2, rows, 1) if rows >= columns else (2, 1, columns)
    second = torch.zeros(shape)
    tg.normuon_step(p, None, uneven, uneven.clone(), second, torch.ones(2, 1, 1), *zero_d(0, 0.9), 0.95)
    torch.testing.assert_close(p.norm(dim=(1, 2)), uneven.norm(dim=(1, 2)), rtol=1e-5, atol=0)
    along = p.norm(dim=2 if rows >= columns else 1)  # after one step every row (column) has the same
    torch.testing.assert_close(along, along.mean(1, keepdim=True).expand_as(along), rtol=1e-4, atol=0)


def test_normuon_decays_where_the_update_does_not_point_away(monkeypatch):
    """Rows of equal size, so that the update is the polar factor itself; where it is 0, p decays."""
    o = torch.tensor([[[1.0, 0.0], [0.0, -1.0]]])
    monkeypatch.setattr(tg, "polar_express", lambda u, dtype: o)
    p = torch.tensor([[[2.0, 3.0], [-4.0, 5.0]]])
    state = torch.zeros(1, 2, 2), torch.zeros(1, 2, 1)
    tg.normuon_step(p, None, o, *state, torch.full((1, 1, 1), 0.1), *zero_d(0.01, 0.9), 0.95)
    assert p.flatten().tolist() == pytest.approx([1.898, 2.997, -3.996, 5.1], rel=1e-6)


def test_normuon_momentum_is_nesterov(monkeypatch):
    """mu = 0.9: g = 1 and then 2 give M = 0.1 and 0.29, U = 0.1 + 0.09 and 0.2 + 0.261."""
    seen = []
    monkeypatch.setattr(tg, "polar_express", lambda u, dtype: seen.append(u.item()) or u)
    p, momentum, second = torch.ones(1, 1, 1), torch.zeros(1, 1, 1), torch.zeros(1, 1, 1)
    for g in (1.0, 2.0):
        grad = torch.full((1, 1, 1), g)
        tg.normuon_step(p, None, grad, momentum, second, torch.ones(1, 1, 1), *zero_d(0, 0.9), 0.95)
    assert seen == pytest.approx([0.19, 0.461])
    assert momentum.item() == pytest.approx(0.29)


# The optimizer object


class Bench:
    """A nano model, its optimizer, and the arguments of every update by the name of the parameter."""

    def __init__(self, recipe: tg.Recipe, dtype: torch.dtype = torch.float32) -> None:
        cfg = tg.Config(recipe=recipe, vocab_size=250, slots=12, dtype=dtype, attention="reference", fp8=())
        self.recipe, self.model, self.calls = recipe, tg.GPT(cfg, seed=1), []
        self.params = dict(self.model.named_parameters())
        self.optimizer = tg.NorMuonAndAdam(self.model, recipe, ONE_RANK, self._recorder)

    def _recorder(self, fn, **_):
        names = {p.data_ptr(): name for name, p in self.params.items()}

        def call(*arguments):
            bound = inspect.signature(fn).bind(*arguments).arguments
            kept = {key: x.clone() if isinstance(x, Tensor) else x for key, x in bound.items()}
            self.calls.append((names[arguments[0].data_ptr()], kept))
            return fn(*arguments)

        return call

    def randomize(self) -> "Bench":
        """Decay and masks need parameters that are not zero; the tie stays."""
        for i, (name, p) in enumerate(self.params.items()):
            if name != "embed":
                p.data.copy_(random(*p.shape, seed=50 + i, scale=0.1))
        self.params["embed"].data.copy_(self.params["lm_head"].data.T)
        return self

    def gradients(self, step: int) -> dict[str, Tensor]:
        return {
            name: random(*p.shape, seed=1000 * step + i) for i, (name, p) in enumerate(self.params.items())
        }

    def step(self, step: int, gradients: dict[str, Tensor] | None = None) -> dict[str, dict]:
        """Add the gradients as backward would, take the step; the calls it made."""
        for name, grad in (gradients or self.gradients(step)).items():
            p, grad = self.params[name], grad.to(self.params[name].dtype)
            p.grad = grad.clone() if p.grad is None else p.grad + grad
        self.calls.clear()
        self.optimizer.step(tg.at(self.recipe, step))
        return dict(self.calls)

    def values(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self.params.items()}


def differing(one: dict[str, Tensor], two: dict[str, Tensor]) -> set[str]:
    return {name for name in one if not torch.equal(one[name], two[name])}


def test_whole_schedule_against_float64(nano):
    """All steps of the miniature recipe on random gradients: rates, decay, sums of two, tie and split."""
    bench = Bench(nano).randomize()
    lr_mul = dict.fromkeys(ADAMS, 1.0) | {
        "scalars": 5,
        "x0_lambdas": 5,
        "smear_gate": 0.01,
        "skip_gate": 0.05,
    }
    lr_mul |= {"ve0": 75, "ve1": 75, "ve2": 75}
    wd_mul = dict.fromkeys(ADAMS, 0) | {"ve0": 5, "ve1": 5, "ve2": 5, "lm_head": 150, "embed": 150}
    wd_mul |= {"attn_gate_bank": 1, "ve_gate_bank": 1}
    betas = dict.fromkeys(ADAMS, (0.9, 0.99)) | {"x0_lambdas": (0.65, 0.95)}
    betas |= dict.fromkeys(("ve0", "ve1", "ve2"), (0.75, 0.95)) | dict.fromkeys(
        ("lm_head", "embed"), (0.5, 0.95)
    )
    banks = {name: [MatrixByHand(x) for x in bench.params[name].data.flatten(0, 1)] for name in MUONS}
    adams = {name: AdamByHand(bench.params[name].data) for name in ADAMS}
    waiting = dict.fromkeys(ADAMS, 0.0)
    assert nano.split_step == 9
    for step in range(nano.total_steps):
        gradients, sched = bench.gradients(step), tg.at(nano, step)
        bench.step(step, gradients)
        for name, matrices in banks.items():
            for i, matrix in enumerate(matrices):
                mul = 1 if name == "attn_bank" else 4 if i % 2 else 2
                grad = gradients[name].flatten(0, 1)[i]
                matrix.step(grad, 0.023 * sched.lr * mul, 1.2 * 0.023 * sched.lr, sched.momentum)
        waiting = {name: waiting[name] + gradients[name].double() for name in ADAMS}
        if step % 2 == 0:
            continue
        if step <= 9:
            waiting["lm_head"] = waiting["lm_head"] + waiting.pop("embed").T
        for name, grad in waiting.items():
            adams[name].step(grad, 0.008 * lr_mul[name] * sched.lr, 0.005 * wd_mul[name], betas[name])
        if step <= 9:
            head, embed = adams["lm_head"], adams["embed"]
            embed.p, embed.m, embed.v, embed.t = head.p.T, head.m.T, head.v.T, head.t
        waiting = dict.fromkeys(ADAMS, 0.0)
    for name, matrices in banks.items():
        wanted = torch.stack([x.p for x in matrices])
        assert_almost_all_close(bench.params[name].data.flatten(0, 1), wanted, name, 1e-4)
    for name, exact in adams.items():
        assert_almost_all_close(bench.params[name].data, exact.p, name, 1e-4)
    assert {name: bench.optimizer.updates[name] for name in ("scalars", "embed", "mlp_bank")} == {
        "scalars": 7,
        "embed": 7,
        "mlp_bank": 14,
    }


def test_adam_moves_on_odd_steps_with_the_sum_of_two_gradients(nano):
    bench = Bench(nano).randomize()
    start, two = bench.values(), [bench.gradients(step) for step in (0, 1)]
    assert set(bench.step(0, two[0])) == set(MUONS)
    after_even = bench.values()
    assert differing(start, after_even) == set(MUONS)
    calls = bench.step(1, two[1])
    assert differing(after_even, bench.values()) == set(bench.params)
    assert set(calls) == set(bench.params) - {"embed"}
    for name in set(ADAMS) - {"lm_head", "embed"}:
        got, wanted = calls[name]["grad"].flatten(), (two[0][name] + two[1][name]).flatten()
        torch.testing.assert_close(got, wanted, rtol=0, atol=0)
    for name in MUONS:
        assert torch.equal(calls[name]["grad_MRC"], two[1][name].flatten(0, 1)), "of this step alone"


def test_adam_sees_rows_of_one_width(nano):
    """Views of everything, 1024 wide where that divides: what a compiler can load 16 bytes at a time."""
    bench = Bench(nano).randomize()
    for step in range(11):
        bench.step(step)
    calls = bench.step(11)
    widths = {}
    for name in ADAMS:
        shapes = {calls[name][key].shape for key in ("p", "grad", "m", "v")}
        (shape,) = shapes
        assert shape.numel() == bench.params[name].numel()
        widths.setdefault(shape[1], set()).add(name)
    assert widths[1024] == {"ve0", "ve1", "ve2", "lm_head", "embed"}
    assert set(widths) == {1, 1024}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bf16"])
def test_adam_needs_one_graph_a_width_and_dtype(nano, dtype):
    """Of any number of rows: parameters differ in it, and so do the ranks' shares."""
    bench, graphs = Bench(nano, dtype), []

    def count(graph, _):
        graphs.append(graph)
        return graph

    def compiler(fn, **options):
        if fn is tg.adam_step:
            return torch.compile(fn, fullgraph=True, backend=count, **options)
        return fn

    torch._dynamo.reset()
    bench.optimizer = tg.NorMuonAndAdam(bench.model, nano, ONE_RANK, compiler)
    eager = Bench(nano, dtype)
    for step in range(12):
        bench.step(step)
        eager.step(step)
    assert len(graphs) == {torch.float32: 2, torch.bfloat16: 3}[dtype]
    assert not differing(bench.values(), eager.values())
    torch._dynamo.reset()


def test_gradients_are_cleared_when_they_are_used(nano):
    bench = Bench(nano)
    for step in (0, 2, 4):  # an even step keeps Adam's, which go on adding up
        bench.step(step)
        assert {name for name, p in bench.params.items() if p.grad is None} == set(MUONS)
    wanted = sum(bench.gradients(step)["ve1"] for step in (0, 2, 4))
    torch.testing.assert_close(bench.params["ve1"].grad, wanted)
    bench.step(5)
    assert all(p.grad is None for p in bench.params.values()), "the tied embedding's too"
    for step in range(6, 12):
        bench.step(step)
    assert all(p.grad is None for p in bench.params.values())


def test_tied_phase(nano):
    bench = Bench(nano)
    params = bench.params
    for step in range(8):
        gradients, before = bench.gradients(step), params["embed"].data.clone()
        calls = bench.step(step, gradients)
        assert torch.equal(params["embed"], params["lm_head"].T)
        assert torch.equal(before, params["embed"]) is (step % 2 == 0)
        if step % 2:
            last = bench.gradients(step - 1)
            both = {name: last[name] + gradients[name] for name in ("lm_head", "embed")}
            wanted = (both["lm_head"] + both["embed"].T).flatten()
            torch.testing.assert_close(calls["lm_head"]["grad"].flatten(), wanted, rtol=1e-6, atol=1e-6)
        assert not bench.optimizer.state["embed"]["v"].any(), "no state of its own yet"


def test_split_copies_the_moments_and_lets_both_go(nano):
    bench = Bench(nano)
    params, state = bench.params, bench.optimizer.state
    for step in range(nano.split_step):
        bench.step(step)
        assert bench.optimizer.is_tied
    assert "embed" not in bench.step(nano.split_step), "the update of the split step is still a tied one"
    assert not bench.optimizer.is_tied
    assert torch.equal(params["embed"], params["lm_head"].T)
    for key in ("m", "v"):
        assert torch.equal(state["embed"][key], state["lm_head"][key].T)
        assert state["embed"][key].any()
        assert state["embed"][key].is_contiguous()
        assert state["embed"][key].data_ptr() != state["lm_head"][key].data_ptr()
    assert bench.optimizer.updates["embed"] == bench.optimizer.updates["lm_head"] == 5
    before = {name: params[name].data.clone() for name in ("lm_head", "embed")}
    bench.step(10)
    calls = bench.step(11)
    summed = {name: bench.gradients(10)[name] + bench.gradients(11)[name] for name in before}
    for name in before:
        grad = calls[name]["grad"].flatten()
        assert torch.equal(grad, summed[name].flatten()), f"{name}: its own gradient only"
        assert not torch.equal(before[name], params[name])
    assert not torch.equal(params["embed"], params["lm_head"].T)


def test_order_of_updates(nano):
    bench = Bench(nano)
    for step in range(13):
        bench.step(step)
    bench.step(13)
    assert [name for name, _ in bench.calls] == [
        *("scalars", "smear_gate", "skip_gate", "attn_gate_bank", "ve_gate_bank", "x0_lambdas"),
        *("ve0", "ve1", "ve2", "lm_head", "embed", "attn_bank", "mlp_bank"),
    ]


def test_order_of_reductions(nano, monkeypatch):
    order, reduce = [], tg.Shard.reduce
    monkeypatch.setattr(tg.Shard, "reduce", lambda self, grad: order.append(self.full) or reduce(self, grad))
    bench = Bench(nano)
    bench.step(0)
    bench.step(1)
    names = {p.data_ptr(): name for name, p in bench.params.items()}
    assert [names[full.data_ptr()] for full in order] == [
        *("attn_bank", "mlp_bank"),
        *("attn_bank", "mlp_bank", "scalars", "ve0", "ve1", "ve2", "smear_gate", "skip_gate"),
        *("attn_gate_bank", "ve_gate_bank", "x0_lambdas", "lm_head"),
    ]


def test_rates_and_decay_of_each_parameter(nano):
    """At schedule 1.0, per update: attention 6.35e-4, c_fc 1.27e-3, c_proj 2.54e-3; Adam's in the table."""
    bench = Bench(nano)
    bench.step(0)
    calls = bench.step(1)
    assert tg.at(nano, 1).lr == 1
    per_matrix = {name: (calls[name]["lr_M11"] * calls[name]["decay"]).flatten() for name in MUONS}
    assert per_matrix["attn_bank"].tolist() == pytest.approx([6.348e-4] * 16, rel=1e-4)
    assert per_matrix["mlp_bank"].tolist() == pytest.approx([1.2696e-3, 2.5392e-3] * 8, rel=1e-4)
    assert calls["attn_bank"]["lr_M11"].flatten().tolist() == pytest.approx([0.023] * 16)
    assert calls["mlp_bank"]["lr_M11"].flatten().tolist() == pytest.approx([0.046, 0.092] * 8)
    adam = {  # learning rate, decay of an update, betas
        "scalars": (0.04, 0, 0.9, 0.99),
        "x0_lambdas": (0.04, 0, 0.65, 0.95),
        "ve0": (0.6, 9.0e-3, 0.75, 0.95),
        "ve1": (0.6, 9.0e-3, 0.75, 0.95),
        "ve2": (0.6, 9.0e-3, 0.75, 0.95),
        "smear_gate": (8e-5, 0, 0.9, 0.99),
        "skip_gate": (4e-4, 0, 0.9, 0.99),
        "attn_gate_bank": (0.008, 3.2e-7, 0.9, 0.99),
        "ve_gate_bank": (0.008, 3.2e-7, 0.9, 0.99),
        "lm_head": (0.008, 4.8e-5, 0.5, 0.95),
    }
    assert {name for name in calls if name not in MUONS} == set(adam)
    for name, (lr, decay, beta1, beta2) in adam.items():
        call = calls[name]
        assert (float(call["beta1"]), float(call["beta2"])) == pytest.approx((beta1, beta2))
        assert float(call["decay"]) == pytest.approx(decay, rel=1e-6)
        assert float(call["step_size"]) == pytest.approx(lr * (1 - beta2) ** 0.5 / (1 - beta1), rel=1e-6)
        assert call["eps"] == 1e-10


def test_decay_goes_with_the_square_of_the_schedule(nano):
    bench = Bench(nano)
    for step in range(13):
        bench.step(step)
    calls, lr = bench.step(13), tg.at(nano, 13).lr
    assert lr == pytest.approx(0.1)
    assert float(calls["ve0"]["decay"]) == pytest.approx(9.0e-3 * lr**2, rel=1e-5)
    assert float(calls["embed"]["decay"]) == pytest.approx(4.8e-5 * lr**2, rel=1e-5)
    assert float(calls["attn_bank"]["decay"] * calls["attn_bank"]["lr_M11"][0]) == pytest.approx(
        6.348e-4 * lr**2
    )


def test_decay_alone_shrinks_the_banks(nano):
    """Without a gradient nothing but decay is left, also in the banks' padding."""
    bench = Bench(nano).randomize()
    before = bench.values()
    bench.step(0, {name: torch.zeros_like(p) for name, p in bench.params.items()})
    shrunk = {name: 1 - bench.params[name].data.double() / before[name].double() for name in MUONS}
    for values, wanted in (
        (shrunk["attn_bank"], 6.348e-4),
        (shrunk["mlp_bank"][:, 0], 1.2696e-3),
        (shrunk["mlp_bank"][:, 1], 2.5392e-3),
    ):
        torch.testing.assert_close(values, torch.full_like(values, wanted), rtol=0, atol=2e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bf16"])
@pytest.mark.parametrize("first", [0, 7, 11], ids=lambda x: f"at{x}")  # tied, over the split, after it
def test_reset_is_bitwise(nano, dtype, first):
    bench = Bench(nano, dtype)
    for step in range(first):
        bench.step(step)
    values, saved = bench.values(), bench.optimizer.state_dict()
    pending = {name: p.grad.clone() for name, p in bench.params.items() if p.grad is not None}
    kept = {name: {k: x.clone() for k, x in state.items()} for name, state in saved["tensors"].items()}
    updates, ends = dict(saved["updates"]), []
    for _ in range(2):
        for step in range(first, nano.total_steps):
            bench.step(step)
        ends.append((bench.values(), bench.optimizer.state_dict()))
        for name, p in bench.params.items():
            p.data.copy_(values[name])
            p.grad = pending[name].clone() if name in pending else None
        bench.optimizer.load_state_dict(saved)
    assert not differing(ends[0][0], ends[1][0])
    for end in (ends[1][1], bench.optimizer.state_dict()):
        wanted = ends[0][1] if end is ends[1][1] else saved
        assert (end["is_tied"], end["updates"]) == (wanted["is_tied"], wanted["updates"])
        assert set(end["tensors"]) == set(wanted["tensors"])
        for name, state in end["tensors"].items():
            assert not differing(state, wanted["tensors"][name]), name
    for name, state in kept.items():
        assert not differing(state, saved["tensors"][name]), f"{name}: steps changed what had been saved"
    assert saved["updates"] == updates


def test_state_loads_into_another_optimizer(nano):
    one, other = Bench(nano), Bench(nano)
    for step in range(12):
        one.step(step)
    for name, p in other.params.items():
        p.data.copy_(one.params[name].data)
    other.optimizer.load_state_dict(one.optimizer.state_dict())
    for step in (12, 13):
        one.step(step)
        other.step(step)
    assert not differing(one.values(), other.values())


def test_state_dtypes(nano):
    for dtype, keys in (
        (torch.float32, {"momentum", "second"}),
        (torch.bfloat16, {"momentum", "second", "low"}),
    ):
        bench = Bench(nano, dtype)
        bench.step(0)
        bench.step(1)
        state = bench.optimizer.state
        assert set(state["mlp_bank"]) == keys
        assert state["mlp_bank"]["second"].shape == (16, 64, 1)
        assert {x.dtype for name in ADAMS for x in state[name].values()} == {torch.float32}
        if dtype == torch.bfloat16:
            assert state["attn_bank"]["low"].any()


# The parameter table and the shards


def names_of_the_model() -> list[str]:
    return [row.name for row in tg.PARAMS]


def test_table_matches():
    tg.check_params(names_of_the_model())
    assert sorted(row.work for row in tg.PARAMS) == list(range(13))


def test_table_refuses_what_does_not_match(monkeypatch):
    with pytest.raises(ValueError, match=r"missing\W+bigram\W+extra\W+$"):
        tg.check_params([*names_of_the_model(), "bigram"])
    with pytest.raises(ValueError, match=r"missing\W+extra\W+embed\W+$"):
        tg.check_params(names_of_the_model()[:-1])
    names = names_of_the_model()
    monkeypatch.setattr(tg, "PARAMS", (*tg.PARAMS, tg.PARAMS[3]))
    with pytest.raises(ValueError, match=r"duplicate\W+ve0\W+missing"):
        tg.check_params(names)


def shards_of(full: Tensor, world: int, is_sharded: bool = True) -> list[tg.Shard]:
    return [tg.Shard(full, tg.Ranks(i, world, torch.device("cpu")), is_sharded) for i in range(world)]


@pytest.mark.parametrize("world", [1, 2, 3, 4, 5, 8, 12, 16])
def test_shards_cover_all_rows_once(world):
    full = torch.arange(1.0, 25.0).view(12, 2)
    parts = [shard.own(full) for shard in shards_of(full, world)]
    assert len({part.shape for part in parts}) == 1, "collectives need equal parts"
    assert parts[0].shape == (-(-12 // world), 2)
    joined = torch.cat(parts)
    assert torch.equal(joined[:12], full)
    assert not joined[12:].any()
    if 12 % world == 0:  # then updates happen in place
        assert {part.untyped_storage().data_ptr() for part in parts} == {full.untyped_storage().data_ptr()}


def test_replicated_rows_are_everybodys():
    full = random(7, 2)
    for shard in shards_of(full, 3, is_sharded=False):
        assert torch.equal(shard.own(full), full)
        assert shard.own(full).data_ptr() == full.data_ptr()


class Done:
    """A collective that has finished."""

    def wait(self) -> None:
        pass


@pytest.mark.parametrize("world", [2, 3, 5, 8])
def test_shards_reduce_their_own_rows(world, monkeypatch):
    """The collective is played by hand; all ranks bring the same gradient."""
    grad, sums = random(12, 2), []
    for rank, shard in enumerate(shards_of(torch.zeros(12, 2), world)):

        def reduce_scatter(mine, whole, async_op, rank=rank):
            assert async_op
            mine.copy_(world * whole.chunk(world)[rank])
            return Done()

        for name in ("reduce_scatter_tensor", "reduce_scatter_single"):  # until torch 2.12, and from 2.13
            monkeypatch.setattr(tg.dist, name, reduce_scatter, raising=False)
        work, mine = shard.reduce(grad)
        work.wait()
        assert mine.shape == (shard.rows, 2)
        sums.append(mine)
    assert torch.equal(torch.cat(sums)[:12], world * grad), "a sum, not a mean"
    assert not torch.cat(sums)[12:].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int16], ids=str)
@pytest.mark.parametrize("world", [2, 3, 5, 8])
def test_shards_gather_all_rows(world, dtype, monkeypatch):
    """16-bit integers travel as bf16: their bits must arrive."""
    full = torch.arange(-12, 12).view(12, 2).to(dtype)
    shards = shards_of(full, world)
    parts = [shard.own(full) for shard in shards]

    def all_gather(whole, mine, async_op):
        assert async_op
        assert whole.dtype == mine.dtype != torch.int16
        assert whole.numel() == world * mine.numel()
        whole.copy_(torch.cat([part.view(mine.dtype) for part in parts]))
        return Done()

    for name in ("all_gather_into_tensor", "all_gather_single"):
        monkeypatch.setattr(tg.dist, name, all_gather, raising=False)
    for shard, mine in zip(shards, parts, strict=True):
        out = torch.zeros_like(full)
        shard.gather(mine, out)()
        assert torch.equal(out, full)


def test_replicated_gradients_are_summed_in_place(monkeypatch):
    seen = []
    monkeypatch.setattr(tg.dist, "all_reduce", lambda grad, async_op: seen.append((grad, async_op)) or Done())
    grad, (_, shard) = random(7, 2), shards_of(random(7, 2), 2, is_sharded=False)
    work, mine = shard.reduce(grad)
    work.wait()
    assert mine.data_ptr() == grad.data_ptr() == seen[0][0].data_ptr()
    assert seen[0][1] is True


def test_one_rank_communicates_nothing(monkeypatch):
    monkeypatch.setattr(tg, "dist", None)
    full, grad = random(12, 2), random(12, 2, seed=1)
    (shard,) = shards_of(full, 1)
    work, mine = shard.reduce(grad)
    assert work is None
    assert mine.data_ptr() == grad.data_ptr()
    shard.gather(mine, full)()


@pytest.mark.parametrize("world", [2, 8, 16])
def test_matrix_rates_follow_the_rank(nano, world):
    """c_fc and c_proj alternate over the whole bank, wherever a rank's rows begin."""
    cfg = Bench(nano).model.cfg
    muls = []
    for rank in range(world):
        ranks = tg.Ranks(rank, world, torch.device("cpu"))
        optimizer = tg.NorMuonAndAdam(tg.GPT(cfg, seed=1), nano, ranks, lambda fn, **_: fn)
        muls += optimizer.lr_muls["mlp_bank"].flatten().tolist()
        assert optimizer.state["mlp_bank"]["momentum"].shape[0] == 16 // world
    assert muls == [2.0, 4.0] * 8
