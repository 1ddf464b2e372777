"""The model against a plain-torch reference in float64: loss and every gradient; who sees whom; init.

The reference is written from the published description of record 61 (with the key offset of record 62), one
slot, one document, one query at a time. It shares no code with the trainer, only the layer table.
"""

import dataclasses
import math

import pytest
import torch
from torch import Tensor

import train_gpt as tg

T, MAX_SEQ_LEN, VOCAB = 44, 21, 250
STARTS = ((0, 13, 14, 35), (0, 9, 30))  # documents of each slot, the longest of 21 tokens
SHORT_WINDOW, LONG_WINDOW, SCALE = 5, 9, 0.37
MTP = (1.0, 0.5, 0.25)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def config(recipe: tg.Recipe, dtype: torch.dtype = torch.float64, fp8: tuple[str, ...] = ()) -> tg.Config:
    return tg.Config(recipe=recipe, vocab_size=VOCAB, slots=12, dtype=dtype, attention="reference", fp8=fp8)


def frequencies(head_dim: int) -> Tensor:
    """Faster than the recipe's, so that every pair of dims turns visibly within a document."""
    return 0.05 ** torch.linspace(0, 1, head_dim // 4, dtype=torch.float64)


def random_model(recipe: tg.Recipe) -> tg.GPT:
    """Float64, every parameter at a random value: at the initial zeros most gradients vanish."""
    model = tg.GPT(config(recipe), seed=3).double()
    gen = torch.Generator().manual_seed(4)
    spread = {
        "attn_bank": 0.3,
        "mlp_bank": 0.3,
        "lm_head": 0.5,
        "embed": 1.0,
        "scalars": 0.3,
        "x0_lambdas": 0.3,
    }
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=gen, dtype=p.dtype) * spread.get(name, 0.7)
            p.copy_(p + noise if name == "scalars" else noise)
    model.set_rotary(frequencies(recipe.head_dim))
    return model


def knobs(mtp=MTP, short: int = SHORT_WINDOW, long: int = LONG_WINDOW) -> tg.Knobs:
    return tg.Knobs(
        torch.tensor(short), torch.tensor(long), torch.tensor(SCALE, dtype=torch.float64), torch.tensor(mtp)
    )


def batch(seed: int = 0, starts=STARTS) -> tg.Batch:
    gen = torch.Generator().manual_seed(seed)
    packed = torch.randint(2, VOCAB, (len(starts), T + 1), generator=gen)
    cu = [slot * T + start for slot, row in enumerate(starts) for start in row]
    cu += [len(starts) * T] * 3  # the vector has a fixed size: documents of no tokens at its end
    return flat(packed[:, :-1], packed[:, 1:], torch.tensor(cu, dtype=torch.int32))


def flat(tokens: Tensor, targets: Tensor, cu_seqlens: Tensor) -> tg.Batch:
    """Slots [slots, T] one after another."""
    positions = torch.arange(tokens.shape[1], dtype=torch.int32).expand(tokens.shape)
    return tg.Batch(tokens.int().flatten(), targets.long().flatten(), positions.flatten(), cu_seqlens)


# The reference


def rms_norm(x: Tensor, eps: float = torch.finfo(torch.float64).eps) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def turn(x: Tensor, position: int) -> Tensor:
    """One head of one token: adjacent pairs of the first half of its dims turn, the second half stays."""
    freqs, out = frequencies(len(x)), list(x)
    for i, freq in enumerate(freqs):
        cos, sin = torch.cos(position * freq), torch.sin(position * freq)
        out[2 * i] = cos * x[2 * i] + sin * x[2 * i + 1]
        out[2 * i + 1] = cos * x[2 * i + 1] - sin * x[2 * i]
    return torch.stack(out)


def one_head(q: list[Tensor], k: list[Tensor], v: list[Tensor], docs: list[int], window: int) -> list[Tensor]:
    """Attention of one head: lists over positions; `docs` says which document each position is of."""
    out = []
    for i, query in enumerate(q):
        seen = [j for j in range(max(0, i - window), i + 1) if docs[j] == docs[i]]
        weights = torch.softmax(torch.stack([SCALE * (query @ k[j]) for j in seen]), 0)
        out.append(sum(w * v[j] for w, j in zip(weights, seen, strict=True)))
    return out


def reference_attention(x, layer, matrices, qkv_mul, out_mul, gate, ve, ve_gate, docs, heads):
    """x: [T, D], normalised."""
    tokens, dim = x.shape
    q, k, v = (((qkv_mul * matrices[i]) @ x.T).T.reshape(tokens, heads, -1) for i in range(3))
    q, k = (rms_norm(z, torch.finfo(torch.float32).eps) for z in (q, k))  # of a kernel, for every dtype
    if ve is not None:
        v = v + 2 * torch.sigmoid(x[:, :12] @ ve_gate.T)[:, :, None] * ve.reshape(tokens, heads, -1)
    window = {"short": SHORT_WINDOW, "long": LONG_WINDOW}[layer.window]
    y = [[None] * heads for _ in range(tokens)]
    if layer.attn == "paired":
        # Heads h and h + H/2 share their keys: a sequence with both at every token. Odd heads turn one
        # position further than even ones.
        half = heads // 2
        for h in range(half):
            order = [(t, head) for t in range(tokens) for head in (h, h + half)]
            rows = [[turn(z[t, head], 2 * t + head % 2) for t, head in order] for z in (q, k)]
            values = [v[t, head] for t, head in order]
            result = one_head(*rows, values, [docs[t] for t, _ in order], window)
            for (t, head), value in zip(order, result, strict=True):
                y[t][head] = value
    else:
        for h in range(heads):
            queries, keys = ([turn(z[t, h], t) for t in range(tokens)] for z in (q, k))
            if layer.key_offset:
                half = len(keys[0]) // 2
                keys = [torch.cat((keys[t][:half], keys[max(t - 1, 0)][half:])) for t in range(tokens)]
            for t, value in enumerate(one_head(queries, keys, list(v[:, h]), docs, window)):
                y[t][h] = value
    y = torch.stack([torch.stack(row) for row in y]) * torch.sigmoid(x[:, :12] @ gate.T)[:, :, None]
    return ((out_mul * matrices[3]) @ y.reshape(tokens, dim).T).T


def reference_stream(p: dict[str, Tensor], recipe: tg.Recipe, tokens: Tensor, starts) -> Tensor:
    """Tokens of one slot to what the head reads, [T, D]."""
    num = len(recipe.layers)
    s = p["scalars"]
    resid, qkv_mul, out_mul = s[:num], s[num : 2 * num], s[2 * num : 3 * num]
    smear, backout, skip = s[3 * num], s[3 * num + 1], s[3 * num + 2]
    docs = [sum(start <= t for start in starts) for t in range(len(tokens))]
    raw = p["embed"][tokens]
    rows = [raw[0]]
    for t in range(1, len(tokens)):
        rows.append(raw[t] + smear * torch.sigmoid(p["smear_gate"][0] @ raw[t, :12]) * raw[t - 1])
    x0 = x = rms_norm(torch.stack(rows))
    kept, attn_row, ve_row = {}, 0, 0
    for i, layer in enumerate(recipe.layers):
        if layer.skip_from:
            gate = torch.sigmoid(skip) * 2 * torch.sigmoid(x0[:, :12] @ p["skip_gate"][0])
            x = x + gate[:, None] * kept[layer.skip_from]
        x = resid[i] * x + p["x0_lambdas"][i] * x0
        if layer.attn:
            ve = ve_gate = None
            if layer.value_embed is not None:
                ve, ve_gate = p[f"ve{layer.value_embed}"][tokens], p["ve_gate_bank"][ve_row]
                ve_row += 1
            matrices, gate = p["attn_bank"][attn_row], p["attn_gate_bank"][attn_row]
            attn_row += 1
            arguments = matrices, qkv_mul[i], out_mul[i], gate, ve, ve_gate, docs, recipe.num_heads
            x = x + reference_attention(rms_norm(x), layer, *arguments)
        fc, proj = p["mlp_bank"][i]
        x = x + torch.clamp(rms_norm(x) @ fc.T, min=0) ** 2 @ proj
        if layer.save_as:
            kept[layer.save_as] = x
    return rms_norm(x - backout * kept["backout"])


def reference_loss(p: dict[str, Tensor], recipe: tg.Recipe, data: tg.Batch, mtp, starts=STARTS) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for tokens, targets, row in zip(
        data.tokens_N.view(-1, T), data.targets_N.view(-1, T), starts, strict=True
    ):
        logits = reference_stream(p, recipe, tokens.long(), row) @ p["lm_head"]
        log_p = torch.log_softmax(23 * torch.sigmoid((logits + 5) / 7.5), -1)
        for r in range(len(tokens)):
            for k, weight in enumerate(mtp):
                if r + k < len(tokens):
                    total = total - weight * log_p[r, targets[r + k]]
    return total


# Loss and gradients


def assert_gradients_match(recipe: tg.Recipe, mtp=MTP) -> None:
    model, data = random_model(recipe), batch()
    loss = model(*data, MAX_SEQ_LEN, knobs(mtp))
    loss.backward()
    leaves = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    wanted = reference_loss(leaves, recipe, data, mtp)
    wanted.backward()
    assert loss.dtype == torch.float64, "a float32 step would hide small differences"
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-10)
    for name, p in model.named_parameters():
        want = leaves[name].grad
        assert float(want.abs().max()) > 1e-4, f"{name}: a gradient of zero proves nothing"
        error = float((p.grad - want).abs().max() / want.abs().max())
        assert error < 1e-9, f"{name}: error {error:.2e} of the largest element"


def test_loss_and_every_gradient_of_the_miniature_recipe(nano):
    assert_gradients_match(nano)


def test_loss_and_every_gradient_with_other_heads(nano):
    """Six heads, of which odd and even ones fall into both halves, and a layer list in another order."""
    rows = (
        tg.Layer(window="long", value_embed=2, save_as="one"),
        tg.Layer(attn="paired", value_embed=0, skip_from="one", save_as="backout"),
        tg.Layer(key_offset=True, value_embed=1),
    )
    assert_gradients_match(
        dataclasses.replace(nano, layers=rows, num_heads=6, head_dim=4, model_dim=24), (1, 0.375, 0)
    )


def test_padding_of_the_banks_gets_no_gradient(nano):
    rows = (tg.Layer(save_as="backout", value_embed=0), tg.Layer(value_embed=1), tg.Layer(value_embed=2))
    model = random_model(dataclasses.replace(nano, layers=rows))
    model(*batch(), MAX_SEQ_LEN, knobs()).backward()
    assert model.attn_bank.shape[0] == 4, "3 layers of 4 matrices, a multiple of 8"
    assert model.mlp_bank.shape[0] == 4
    for bank in (model.attn_bank, model.mlp_bank):
        assert not bank.grad[3:].any()
        assert bank.grad[:3].flatten(1).any(dim=1).all()


# FP8, emulated

FP8 = ("head", "mlp", "qkv", "out")


@pytest.mark.parametrize(
    ("products", "bound"), [(("head",), 0.1), (("mlp",), 0.25), (("qkv",), 0.1), (("out",), 0.1), (FP8, 0.3)]
)
def test_fp8_is_close_and_only_for_training(nano, products, bound):
    """One rounding of each operand and of the logits' gradient, whatever factor the loss is multiplied by.

    These weights are ten times a trained model's, and the errors of five MLPs add up. The gradients of the
    scalars are sums over a weight's gradient that cancel: with that of q, k, v in 8 bits, 0.139 of the norm.
    """
    results = []
    for fp8, factor in (((), 1.0), (products, 1.0), (products, 0.125)):
        model, data = random_model(nano).float(), batch()
        model.cfg = dataclasses.replace(model.cfg, fp8=fp8)
        with torch.no_grad():
            model.lm_head.mul_(0.1)  # into the range that FP8 keeps
        numbers = knobs()._replace(scale=torch.tensor(SCALE))
        loss = model(*data, MAX_SEQ_LEN, numbers)
        (loss * factor).backward()
        evaluated = float(model.eval()(*data, MAX_SEQ_LEN, numbers))
        results.append((loss.detach(), evaluated, {k: p.grad for k, p in model.named_parameters()}))
    (loss, value, grads), (loss8, value8, grads8), (again, _, eighth) = results
    assert value8 == value, "evaluation does not use FP8"
    assert loss8.dtype == torch.float32
    assert loss8 == again
    assert 0 < abs(float(loss8 / loss) - 1) < 0.01
    for name, grad in grads.items():
        error = float((grads8[name] - grad).norm() / grad.norm())
        most = 0.15 if (products, name) == (("qkv",), "scalars") else bound
        assert 0 < error < most, f"{name}: {error:.3f} of the norm"
        torch.testing.assert_close(eighth[name], grads8[name] / 8, rtol=1e-5, atol=1e-7, msg=name)


# Compilation


@pytest.mark.slow
def test_one_training_graph_does_for_every_number_of_rows(nano):
    """Forward and backward of the whole model in whole graphs, at the batches of all stages.

    Then evaluation, which is one more; and back to training. Windows here are shorter than a third of the
    rows: the reference of attention, which no GPU runs, is another graph for fewer than three of its blocks.

    Each is traced once: a module's float that is read in traced code becomes a symbol, and where it must be a
    number after all, everything is traced again.
    """
    recipe = dataclasses.replace(nano, val_windows=(128, 256))
    model = random_model(recipe).float()
    model.cfg = dataclasses.replace(model.cfg, fp8=FP8)
    with torch.no_grad():
        model.lm_head.mul_(0.1)
    torch._dynamo.reset()
    traced = []

    def backend(graph, inputs):
        """Note whether the graph is that of training, and its symbolic floats, which it reads by item()."""
        floats = [str(node.args[0]) for node in graph.graph.nodes if node.target == "item"]
        traced.append((model.training, floats))
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
    weights = (1.0, 0.5, 0.25), (1.0, 0.25, 0.0), (1.0, 0.0, 0.0), (1.0, 0.0, 0.0)

    def run(call, stage: int, is_training: bool, slots: int, slot_tokens: int):
        gen = torch.Generator().manual_seed(stage)
        packed = torch.randint(2, VOCAB, (slots, slot_tokens + 1), generator=gen)
        starts = [i * slot_tokens + k for i in range(slots) for k in range(0, slot_tokens, 21)]
        cu = torch.tensor(starts + [slots * slot_tokens] * 7, dtype=torch.int32)
        row = nano.stages[stage]
        numbers = knobs(weights[stage], row.short, row.long)._replace(scale=torch.tensor(SCALE + 0.1 * stage))
        model.train(is_training)
        model.zero_grad()
        loss = call(*flat(packed[:, :-1], packed[:, 1:], cu), nano.max_seq_len, numbers)
        if is_training:
            loss.backward()
        return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    calls = [(stage, True, 12, nano.stages[stage].batch_tokens // 12) for stage in range(4)]
    calls += [(1, True, 6, nano.stages[1].batch_tokens // 12), (0, False, 1, nano.val_slot), calls[0]]
    for i, what in enumerate(calls):
        may_compile = i == 0 or not what[1]
        with torch.compiler.set_stance("default" if may_compile else "fail_on_recompile"):
            loss, grads = run(compiled, *what)
        wanted, wanted_grads = run(model, *what)
        torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=1e-4)
        assert set(grads) == set(wanted_grads)
        for name, grad in grads.items():
            error = float((grad - wanted_grads[name]).norm() / wanted_grads[name].norm())
            assert error < 1e-3, f"call {i}, {name}: {error:.1e}"
    assert [is_training for is_training, _ in traced] == [True, False], "traced more than once"
    assert traced[0][1] == [], "symbolic floats in the training graph"
    torch._dynamo.reset()


# Evaluation


def test_evaluation_is_the_negative_log_softmax_of_the_next_token(nano):
    model, data = random_model(nano).eval(), batch()
    loss = model(*data, MAX_SEQ_LEN, knobs())
    leaves = {name: p.detach() for name, p in model.named_parameters()}
    assert float(loss) == pytest.approx(float(reference_loss(leaves, nano, data, (1,))), rel=1e-9)


def test_evaluation_in_pieces_is_the_same(nano, monkeypatch):
    model, data = random_model(nano).eval(), batch()
    whole = float(model(*data, MAX_SEQ_LEN, knobs()))
    monkeypatch.setattr(tg, "VAL_ROWS", 13)
    assert float(model(*data, MAX_SEQ_LEN, knobs())) == pytest.approx(whole, rel=1e-12)


def test_initial_loss_is_that_of_a_uniform_guess(nano):
    model = tg.GPT(config(nano, torch.float32), seed=1).eval()
    data = batch()
    with torch.no_grad():
        loss = float(model(*data, MAX_SEQ_LEN, knobs())) / data.targets_N.numel()
    assert loss == pytest.approx(math.log(256), abs=0.02), "250 tokens, padded to 256, which all take part"


# Who sees whom


@torch.no_grad()
def hidden(model: tg.GPT, tokens: Tensor, starts=STARTS, **windows: int) -> Tensor:
    """What the head reads, [slots, T, D]."""
    data = batch(starts=starts)
    where = data.positions_N, data.cu_seqlens, MAX_SEQ_LEN
    return model.stream(tokens.flatten(), where, knobs(**windows)).view(*tokens.shape, -1)


def changed(model: tg.GPT, slot: int, position: int, starts=STARTS, **windows: int) -> dict[int, list[int]]:
    """The positions of each slot that notice another token at one place."""
    tokens = batch(starts=starts).tokens_N.view(-1, T)
    other = tokens.clone()
    other[slot, position] = (tokens[slot, position] - 2 + 100) % (VOCAB - 2) + 2
    differs = (hidden(model, tokens, starts, **windows) != hidden(model, other, starts, **windows)).any(-1)
    return {i: row.nonzero().flatten().tolist() for i, row in enumerate(differs)}


def without_leaks(recipe: tg.Recipe) -> tg.GPT:
    rows = tuple(dataclasses.replace(layer, key_offset=False) for layer in recipe.layers)
    model = random_model(dataclasses.replace(recipe, layers=rows))
    with torch.no_grad():
        model.scalars[model.slices["smear"]] = 0
    return model


@pytest.mark.parametrize("position", [0, 14, 20, 43])
def test_slots_are_independent_and_time_goes_forward(nano, position):
    model = random_model(nano)
    for slot in (0, 1):
        seen = changed(model, slot, position)
        assert seen[1 - slot] == []
        assert seen[slot][0] == position, "no earlier position may notice, and the position itself must"


def test_neither_smear_nor_key_offset_crosses_a_slot_end(nano):
    """The last token of slot 0 lies just before the first of slot 1; one layer, so that each acts alone."""
    rows = (tg.Layer(key_offset=True, value_embed=0), tg.Layer(attn=None, save_as="backout"))
    model = random_model(dataclasses.replace(nano, layers=rows))
    for smear in (0.0, 0.5):
        with torch.no_grad():
            model.scalars[model.slices["smear"]] = smear
        assert changed(model, 0, T - 1, short=2 * T, long=2 * T) == {0: [T - 1], 1: []}


def test_slots_side_by_side_are_slots_on_their_own(nano):
    """What the head reads of a slot does not depend on where in the rows the slot lies: positions count."""
    model, tokens = random_model(nano), batch().tokens_N.view(2, T)
    both = hidden(model, tokens)
    for slot in (0, 1):
        alone = hidden(model, tokens[slot : slot + 1], STARTS[slot : slot + 1])
        torch.testing.assert_close(alone[0], both[slot], rtol=1e-12, atol=1e-12)
    swapped = hidden(model, tokens.flip(0), STARTS[::-1])
    torch.testing.assert_close(swapped.flip(0), both, rtol=1e-12, atol=1e-12)


def test_training_losses_of_slots_add_up(nano):
    """f(a, b) = g(a) + h(b), also for the targets after the next."""
    model, (one, two) = random_model(nano), (batch(0), batch(1))

    def loss(i: tg.Batch, j: tg.Batch) -> float:
        parts = [(x.view(2, T)[0], y.view(2, T)[1]) for x, y in zip(i[:2], j[:2], strict=True)]
        data = flat(*map(torch.stack, parts), i.cu_seqlens)
        with torch.no_grad():
            return float(model(*data, MAX_SEQ_LEN, knobs((0.1, 0.5, 1.0))))

    assert loss(one, one) - loss(two, one) == pytest.approx(loss(one, two) - loss(two, two), abs=1e-9)
    assert abs(loss(one, one) - loss(two, one)) > 1e-2


@pytest.mark.parametrize("position", [2, 12, 13, 33, 34])
def test_attention_stays_within_documents(nano, position):
    """Documents of slot 0 begin at 0, 13, 14 and 35; windows are as wide as the slot."""
    first, after = next((a, b) for a, b in ((0, 13), (13, 14), (14, 35)) if a <= position < b)
    seen = changed(without_leaks(nano), 0, position, short=2 * T, long=2 * T)
    assert seen[0] == list(range(position, after)), f"the document is {first} to {after - 1}"


@pytest.mark.parametrize(("position", "reaches"), [(11, []), (12, [13])])
def test_smear_crosses_a_document_end_by_one_position(nano, position, reaches):
    model = without_leaks(nano)
    with torch.no_grad():
        model.scalars[model.slices["smear"]] = 0.5
    assert [t for t in changed(model, 0, position, short=2 * T, long=2 * T)[0] if t >= 13] == reaches


@pytest.mark.parametrize(("position", "reaches"), [(32, []), (33, []), (34, list(range(36, T)))])
def test_key_offset_crosses_a_document_end_by_one_position(nano, position, reaches):
    """One layer with attention, so that the key's other half has seen nothing but its own token.

    The first position attends to itself alone, whatever its key; those after it notice.
    """
    rows = (tg.Layer(key_offset=True, value_embed=0), tg.Layer(attn=None, save_as="backout"))
    model = random_model(dataclasses.replace(nano, layers=rows))
    with torch.no_grad():
        model.scalars[model.slices["smear"]] = 0
    seen = [t for t in changed(model, 0, position, short=2 * T)[0] if t >= 35]
    assert seen == reaches


def test_window_reaches_exactly_as_far_as_it_says(nano):
    """One layer, one document: the token itself and `window` after it notice; half as many if paired."""
    starts = ((0,), (0,))
    for attn, window, reach in (("plain", 5, 5), ("plain", 0, 0), ("paired", 6, 3), ("paired", 5, 3)):
        rows = (tg.Layer(attn=attn, value_embed=0), tg.Layer(attn=None, save_as="backout"))
        model = random_model(dataclasses.replace(nano, layers=rows))
        with torch.no_grad():
            model.scalars[model.slices["smear"]] = 0
        seen = changed(model, 0, 10, starts, short=window, long=T)[0]
        assert seen == list(range(10, 10 + reach + 1)), f"{attn}, window {window}"


@pytest.mark.parametrize(
    ("weights", "rows"), [((1, 0, 0), 1), ((0, 1, 0), 1), ((0, 0, 1), 1), ((1, 1, 1), 3)]
)
def test_targets_after_the_next_reach_over_document_ends_not_slot_ends(nano, weights, rows):
    """The gradient of the logits of one row tells which targets it was given."""
    model, data = random_model(nano), batch()
    where = data.positions_N, data.cu_seqlens, MAX_SEQ_LEN
    x = model.stream(data.tokens_N, where, knobs()).detach()
    for row in (12, T - 1, T):  # the last of document 0, the last of slot 0, the first of slot 1
        left = (T if row < T else 2 * T) - row  # targets until the end of the slot
        logits = (x @ model.lm_head.detach()).requires_grad_()
        tg.kernels.softcapped_cross_entropy(
            logits, data.targets_N, data.positions_N, torch.tensor(weights).double()
        )[row].backward()
        pulled = {int(i) for i in (logits.grad[row] < 0).nonzero()}
        wanted = [row + k for k, weight in enumerate(weights) if weight and k < left]
        assert pulled == {int(data.targets_N[i]) for i in wanted}
        assert len(wanted) == min(rows, left) or sum(weights) == 1


# Rotary tables


def test_rotary_tables(nano):
    recipe = dataclasses.replace(nano, head_dim=32, model_dim=128)
    model = tg.GPT(config(recipe, torch.float32), seed=1)
    assert model.cos.shape == model.sin.shape == (2 * 512, 8), "twice the longest slot: paired heads"
    for stage in (0, 3, 1):
        pointer, freqs = model.cos.data_ptr(), tg.yarn(recipe, stage)[0]
        model.set_rotary(freqs)
        assert model.cos.data_ptr() == pointer, "in place, or a compiled graph reads the old table"
        for t in (0, 1, 17, 1023):
            for j, freq in enumerate(freqs.tolist()):
                assert float(model.cos[t, j]) == pytest.approx(math.cos(t * freq), abs=1e-4)
                assert float(model.sin[t, j]) == pytest.approx(math.sin(t * freq), abs=1e-4)


def test_rotary_tables_are_not_part_of_a_checkpoint(nano):
    assert set(tg.GPT(config(nano), seed=1).state_dict()) == {row.name for row in tg.PARAMS}


# Initial values


@pytest.fixture(scope="module")
def fresh():
    return tg.GPT(config(tg.RECIPES["tiny"], torch.float32), seed=1)


@torch.no_grad()
def test_init_of_the_banks(fresh):
    std = 128**-0.5
    for values, wanted in ((fresh.attn_bank[:, :3], std), (fresh.mlp_bank[:, 0], std / 2)):
        bound = 3**0.5 * wanted
        for matrices in values.flatten(0, -3):  # every one of them, padding too
            assert float(matrices.abs().max()) <= bound * (1 + 1e-6)
            assert float(matrices.max()) > 0.99 * bound
            assert float(matrices.min()) < -0.99 * bound
            assert float(matrices.std()) == pytest.approx(wanted, rel=0.02)
            assert abs(float(matrices.mean())) < 0.03 * wanted
    assert not fresh.attn_bank[:, 3].any(), "attention's output matrices"
    assert not fresh.mlp_bank[:, 1].any(), "the MLP's output matrices"


@torch.no_grad()
def test_init_of_everything_else(fresh):
    assert float(fresh.lm_head.std()) == pytest.approx(0.005, rel=0.02)
    assert float(fresh.lm_head.abs().max()) > 0.015, "normal, not uniform"
    assert torch.equal(fresh.embed, fresh.lm_head.T)
    assert fresh.embed.is_contiguous()
    zeros = ("ve0", "ve1", "ve2", "smear_gate", "skip_gate", "attn_gate_bank", "ve_gate_bank", "x0_lambdas")
    for name in zeros:
        assert not fresh.get_parameter(name).any(), name
    values = [1.1] * 5 + [0.5] * 5 + [1.0] * 5 + [0.0, 0.5, -1.5] + [1.0] * 6
    assert fresh.scalars.tolist() == pytest.approx(values)


def test_scalar_layout_of_the_full_model():
    slices, init = tg.scalar_layout(11)
    assert slices == {
        "resid": slice(0, 11),
        "qkv": slice(11, 22),
        "out": slice(22, 33),
        "smear": slice(33, 34),
        "backout": slice(34, 35),
        "skip": slice(35, 36),
    }
    assert init.tolist() == pytest.approx([1.1] * 11 + [0.5] * 11 + [1.0] * 11 + [0, 0.5, -1.5, 1, 1, 1, 1])


def test_same_seed_same_model(nano):
    one, same, other = (tg.GPT(config(nano, torch.float32), seed=seed).state_dict() for seed in (1, 1, 2))
    random = {name for name in one if not torch.equal(one[name], other[name])}
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert random == {"attn_bank", "mlp_bank", "lm_head", "embed"}


def test_initial_values_are_drawn_in_float32_whatever_they_are_kept_in(nano):
    wide, narrow = (tg.GPT(config(nano, t), seed=1).state_dict() for t in (torch.float32, torch.bfloat16))
    assert all(torch.equal(narrow[name], x.to(narrow[name].dtype)) for name, x in wide.items())


def test_initial_values_do_not_depend_on_global_random_state(nano):
    torch.manual_seed(5)
    one = tg.GPT(config(nano), seed=1).lm_head
    torch.manual_seed(6)
    assert torch.equal(one, tg.GPT(config(nano), seed=1).lm_head)


def test_dtypes(nano):
    model = tg.GPT(config(nano, torch.bfloat16), seed=1)
    wide = {name for name, p in model.named_parameters() if p.dtype == torch.float32}
    assert wide == {"scalars", "x0_lambdas"}
    assert model.cos.dtype == model.sin.dtype == torch.bfloat16
    loss = model(*batch(), MAX_SEQ_LEN, knobs()._replace(scale=torch.tensor(SCALE)))
    assert loss.dtype == torch.float32
    loss.backward()
    assert all(p.grad.dtype == p.dtype for p in model.parameters())


def test_norm_uses_the_float32_epsilon_for_bf16():
    """At the raw embeddings' size bf16's own epsilon, 0.0078, would shrink them 18-fold."""
    x = torch.full((1, 64), 0.005)
    assert float(tg.norm(x.bfloat16())[0, 0]) == pytest.approx((1 + 1.19e-7 / 2.5e-5) ** -0.5, rel=0.01)
    assert float(tg.norm(x)[0, 0]) == pytest.approx((1 + 1.19e-7 / 2.5e-5) ** -0.5, rel=1e-5)


# The full model


def test_layer_table_of_the_full_model():
    """Rows: attention, window, key offset, value embedding, saved as, skip from."""
    rows = [(x.attn, x.window, x.key_offset, x.value_embed, x.save_as, x.skip_from) for x in tg.LAYERS]
    assert rows == [
        ("paired", "short", False, 1, None, None),
        ("plain", "short", False, 2, None, None),
        ("paired", "short", False, None, None, None),
        ("plain", "long", True, None, "skip", None),
        ("plain", "short", False, None, None, None),
        ("paired", "short", False, None, None, None),
        (None, "short", False, None, None, "skip"),
        ("plain", "short", False, None, "backout", None),
        ("plain", "short", False, 0, None, None),
        ("paired", "short", False, 1, None, None),
        ("plain", "long", True, 2, None, None),
    ]


def test_shapes_of_the_full_model():
    cfg = dataclasses.replace(config(tg.RECIPES["short"], torch.bfloat16), vocab_size=50257)
    with torch.device("meta"):
        model = tg.GPT(cfg, seed=1)
    assert {name: tuple(p.shape) for name, p in model.named_parameters()} == {
        "attn_bank": (10, 4, 768, 768),
        "mlp_bank": (12, 2, 3072, 768),
        "scalars": (40,),
        "ve0": (50304, 768),
        "ve1": (50304, 768),
        "ve2": (50304, 768),
        "smear_gate": (1, 12),
        "skip_gate": (1, 12),
        "attn_gate_bank": (10, 6, 12),
        "ve_gate_bank": (5, 6, 12),
        "x0_lambdas": (11,),
        "lm_head": (768, 50304),
        "embed": (50304, 768),
    }


@pytest.mark.parametrize(
    "change", [{"num_heads": 3, "model_dim": 24}, {"head_dim": 6, "model_dim": 24}, {"model_dim": 48}]
)
def test_recipe_refuses_dimensions_that_do_not_fit(nano, change):
    with pytest.raises(ValueError, match="heads"):
        dataclasses.replace(nano, **change)
