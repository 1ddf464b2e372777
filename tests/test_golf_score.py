"""The golf scorer: windows, events, causality with and without adaptation, and the process of its own."""

import json
import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from conftest import write_shard

import train_gpt as tg
from golf import artifact, score, tokens
from golf import train_golf as golf

pytestmark = pytest.mark.usefixtures("restored")

CPU = tg.Ranks(0, 1, torch.device("cpu"))
VOCAB, BOS = 257, 256
SIZES = (
    "num_layers=3 model_dim=32 order=0,1,2,1,2 parallel_from=2 seq_len=32 stride=8 batch_tokens=512 "
    "micro_tokens=256 holdout_tokens=512 softcap=0 score="
).split()
CFG = golf.configure("smoke", "golf", SIZES)
ADAPTING = ("sgd_chunk=48", "sgd_lr=0.05", "lora_chunk=8", "lora_lr=0.01")
ALL_MODES = pytest.mark.parametrize("mode", list(score.MODES))


def model() -> golf.Golf:
    """Random weights at which attention, loops and learning matter."""
    made, gen = golf.Golf(CFG, VOCAB, 0, torch.float32), torch.Generator().manual_seed(1)
    for p in made.parameters():
        p.data += 0.1 * torch.randn(p.shape, generator=gen)
    return made


def stream(size: int = 301, seed: int = 0) -> np.ndarray:
    """Documents of 1 to 90 tokens, a few bytes much more likely than others."""
    rng = np.random.default_rng(seed)
    made = (rng.exponential(20, size) % 256).astype(np.uint16)
    made[0] = BOS
    at = 0
    while (at := at + int(rng.integers(1, 90))) < size:
        made[at] = BOS
    return made


def run(mode: str, text: np.ndarray, *changes: str, ranks: tg.Ranks = CPU, made: golf.Golf | None = None):
    made = made or model()
    return score.score(made, text, BOS, mode, score.settings_of(made, [*ADAPTING, *changes]), ranks)


# windows ----------------------------------------------------------------------------------------------------
def test_windows_score_every_target_once_with_enough_context():
    for total in (1, 2, 7, 8, 9, 31, 64, 65, 100):
        for length in {1, 2, 5, 8, 64} & set(range(1, total + 1)):
            for stride in {1, 2, 3, 5, 8, 64} & set(range(1, length + 1)):
                for first, after in (
                    (0, total),
                    (total // 3, total),
                    (0, total // 2),
                    (total // 2, total // 2),
                ):
                    plan = golf.plan_windows(first, after, length, stride)
                    count = np.zeros(total, int)
                    for start, low, high in zip(*plan, strict=True):
                        count[low:high] += 1
                        assert 0 < high - low <= stride
                        assert 0 <= start <= low < high <= start + length <= total
                        assert low - start >= min(low, length - stride)  # tokens before the first target
                    assert (count[first:after] == 1).all()
                    assert count.sum() == after - first
                    assert (np.diff(plan.low) > 0).all()


@pytest.mark.parametrize("stride", [1, 8, 32])
def test_batched_windows_equal_one_target_at_a_time(stride):
    made, text = model().eval(), stream(101)
    ids = torch.from_numpy(text.astype(np.int64))
    evaluator = golf.Evaluator.of(made.nll_at, text, CPU.device, 32, batch_tokens=96)
    nll = torch.full((100,), math.nan)
    counted = []
    evaluator.score(0, 100, stride, nll, CPU, counted.append)
    for t in range(100):
        high = min((t // stride + 1) * stride, 100)
        start = max(high - 32, 0)
        x = made.stream(ids[None, start : t + 1], True)[0, -1]
        logits = 23 * torch.sigmoid((x @ made.embed.T + 5) / 7.5).detach()
        assert nll[t] == pytest.approx(float(-logits.log_softmax(-1)[ids[t + 1]]), abs=1e-4), t
    assert sum(counted) == 100


def test_the_trainers_mean_is_that_of_mode_none():
    made, text = model(), stream()
    evaluator = golf.Evaluator.of(made.eval().nll_at, text, CPU.device, 32, 256)
    assert float(run("none", text).nll.double().mean()) == pytest.approx(evaluator.mean(CPU), abs=1e-7)


# score before update ----------------------------------------------------------------------------------------
@ALL_MODES
def test_events_cover_the_stream_and_score_before_they_learn(mode):
    scorer = run(mode, stream())
    score.check_events(scorer.events, 300)
    assert bool([e for e in scorer.events if e.what == "update"]) == (mode in ("sgd", "lora"))
    assert (scorer.nll > 0).all()
    lows = [e.low for e in scorer.events if e.what == "score"]
    if mode != "lora":
        assert lows == sorted(lows), "the stream's order"


@pytest.mark.parametrize(
    ("events", "said"),
    [
        ([("update", -1, 0, 4), ("score", -1, 0, 8)], "an update before its score"),
        ([("score", -1, 0, 4), ("update", -1, 0, 5), ("score", -1, 4, 8)], "an update before its score"),
        ([("score", 0, 0, 4), ("score", 0, 5, 8)], "1 targets are not scored exactly once, the first is 4"),
        ([("score", 0, 0, 5), ("score", 0, 4, 8)], "1 targets are not scored exactly once, the first is 4"),
        ([("score", -1, 4, 8), ("update", -1, 4, 8), ("score", -1, 0, 4)], "scored after an update had seen"),
    ],
)
def test_events_that_break_the_rule_are_found(events, said):
    with pytest.raises(AssertionError, match=said):
        score.check_events([score.Event(*event) for event in events], 8)
    # Another document's update does not concern this one.
    score.check_events(
        [score.Event(*e) for e in (("score", 4, 4, 8), ("update", 4, 4, 8), ("score", 0, 0, 4))], 8
    )


@pytest.mark.parametrize("mode", ["sgd", "lora"])
def test_adaptation_changes_the_scores_and_learns(mode):
    """On a text that repeats itself; the first chunk is scored by the weights as they came."""
    text = np.tile(stream(40), 6)
    text[1:][text[1:] == BOS] = 3  # one document
    fixed, adapted = run("sliding", text).nll, run(mode, text).nll
    first = 48 if mode == "sgd" else 8
    assert torch.allclose(fixed[:first], adapted[:first], atol=1e-5)
    assert adapted[120:].mean() < fixed[120:].mean() - 0.2


def worst_change(mode: str, run_mode=run) -> float:
    """The largest change of any score before a place behind which the stream is another, length included."""
    worst = 0.0
    for place, size in ((40, 301), (97, 301), (150, 280), (200, 301)):
        one, two = stream(), stream(size, seed=5)
        two[:place] = one[:place]
        a, b = (run_mode(mode, text).nll[: place - 1] for text in (one, two))
        worst = max(worst, float((a - b).abs().max()))
    return worst


@ALL_MODES
def test_scores_depend_on_what_came_before_alone(mode):
    assert worst_change(mode) < 1e-5


def test_one_other_token_changes_no_earlier_score():
    one = stream()
    for mode in score.MODES:
        two = one.copy()
        two[130] = (two[130] + 7) % 250
        a, b = run(mode, one).nll, run(mode, two).nll
        assert (a[:129] - b[:129]).abs().max() < 1e-5
        assert abs(a[129] - b[129]) > 1e-3


def leaky_sgd(mode: str, text: np.ndarray) -> score.Scorer:
    """Learns a chunk before it is scored."""
    made = model()
    scorer = score.Scorer.of(made, text, score.settings_of(made, ADAPTING), CPU)
    trainer = score.ChunkTrainer(scorer)
    for first in range(0, scorer.num_targets, 48):
        after = min(first + 48, scorer.num_targets)
        trainer.learn(first, after)
        scorer.score(first, after, scorer.settings.stride)
    return scorer


def leaky_lora(monkeypatch) -> None:
    """Takes the step of a chunk, then scores that chunk again with what it learnt."""
    learn = score.learn_chunks

    def learn_and_rescore(scorer, lora, chunks):
        learn(scorer, lora, chunks)
        score.score_chunks(scorer, lora, chunks)

    monkeypatch.setattr(score, "learn_chunks", learn_and_rescore)
    monkeypatch.setattr(score, "check_events", lambda *_: None)


def test_what_is_not_to_be_compiled_is_not(monkeypatch):
    """Every other shape of a short stream would cost a GPU a minute, and the ninth is refused."""
    asked = []

    def compiler_for(device):
        asked.append(device.type)
        return lambda fn, **_: fn

    monkeypatch.setattr(golf, "compiler_for", compiler_for)
    made, ranks = model(), tg.Ranks(0, 1, torch.device("meta"))
    for is_compiled in (True, False):
        score.Scorer.of(made, stream(), score.settings_of(made, ADAPTING), ranks, is_compiled)
    assert asked == ["meta", "cpu"]


def test_a_leak_through_sgd_is_caught():
    assert worst_change("sgd", leaky_sgd) > 1e-3
    with pytest.raises(AssertionError, match="an update before its score"):
        score.check_events(leaky_sgd("sgd", stream()).events, 300)


def test_a_leak_through_lora_is_caught(monkeypatch):
    check = score.check_events
    leaky_lora(monkeypatch)
    assert worst_change("lora") > 1e-3
    with pytest.raises(AssertionError):
        check(run("lora", stream()).events, 300)


def test_a_model_that_sees_ahead_is_caught(monkeypatch):
    attention = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda q, k, v, is_causal, **options: attention(q, k, v, is_causal=False, **options),
    )
    assert worst_change("none") > 1e-3


def test_the_probabilities_sum_to_one():
    """The loss is that of one distribution over the vocabulary: exp(-nll) over all targets sums to 1."""
    for softcap in ("0", "30"):
        cfg = golf.configure("smoke", "golf", [*SIZES, f"softcap={softcap}"])
        made = golf.Golf(cfg, VOCAB, 0, torch.float32).eval()
        x = 3 * torch.randn(1, CFG.model_dim, generator=torch.Generator().manual_seed(0))
        nll = made.nll(x.expand(VOCAB, -1), torch.arange(VOCAB))
        assert float((-nll.detach()).exp().sum()) == pytest.approx(1.0, abs=1e-5)


# documents --------------------------------------------------------------------------------------------------
def test_documents_part_the_targets():
    text = np.array([BOS, 1, 2, BOS, BOS, 5, 6, 7, BOS], np.uint16)
    assert score.documents(text, BOS) == [(0, 3), (3, 4), (4, 8)]
    text[0] = 9
    assert score.documents(text, BOS)[0] == (0, 3)
    assert score.documents(np.array([BOS, BOS], np.uint16), BOS) == [(0, 1)]


def test_a_document_is_scored_as_if_it_were_alone():
    text = stream()
    whole = run("lora", text).nll
    for first, after in score.documents(text, BOS):
        assert torch.allclose(run("lora", text[first : after + 1]).nll, whole[first:after], atol=1e-4)
    assert torch.allclose(run("lora", text, "batch_tokens=32").nll, whole, atol=1e-4)


def on_two_ranks(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    where = f"file://{folder}/rendezvous"
    torch.distributed.init_process_group("gloo", init_method=where, rank=rank, world_size=2)
    found = {mode: run(mode, stream(), ranks=tg.Ranks(rank, 2, CPU.device)).nll for mode in score.MODES}
    if rank == 0:
        torch.save(found, f"{folder}/nll.pt")
    torch.distributed.destroy_process_group()


def test_two_ranks_score_as_one(tmp_path):
    mp.spawn(on_two_ranks, (str(tmp_path),), nprocs=2)
    found = torch.load(tmp_path / "nll.pt")
    for mode in ("none", "sliding", "lora"):
        assert torch.allclose(found[mode], run(mode, stream()).nll, atol=1e-4), mode
    # Two ranks of 256 tokens each take the steps of one that has 512.
    alone = run("sgd", stream(), "batch_tokens=512").nll
    assert torch.allclose(found["sgd"], alone, atol=1e-3)


# the process ------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """An artifact and a validation shard of plain bytes."""
    folder, made = tmp_path_factory.mktemp("score"), model()
    weights = {name: p.detach() for name, p in made.named_parameters()}
    meta = {"config": golf.dataclasses.asdict(CFG), "vocab_size": VOCAB}
    meta["tokenizer"] = tokens.load_tokenizer("bytes").sha256
    tensors = golf.quantize(weights, {}, CFG, 0.5, "rtn")
    (folder / "model.golf").write_bytes(artifact.pack(meta, tensors))
    (folder / "foreign.golf").write_bytes(artifact.pack({**meta, "tokenizer": "00"}, tensors))
    (folder / "config.golf").write_bytes(artifact.pack({**meta, "config": {"depth": 3}}, tensors))
    (folder / "short.golf").write_bytes((folder / "model.golf").read_bytes()[:-9])
    write_shard(folder / "toy_val_000000.bin", stream())
    write_shard(folder / "wide_val_000000.bin", np.array([256, 300]))
    return folder


@pytest.fixture
def scorer(monkeypatch, capfd, files):
    """Run score.py in this process: (exit code, stdout, stderr). The last of repeated options counts."""

    def call(*options: object, name: str = "model", val: str = "toy") -> tuple[int, str, str]:
        argv = ["score.py", files / f"{name}.golf", "--tokenizer", "bytes"]
        argv += ["--val", files / f"{val}_val_000000.bin", *options]
        monkeypatch.setattr(sys, "argv", list(map(str, argv)))
        capfd.readouterr()
        return score.main(), *capfd.readouterr()

    return call


def test_a_score_is_printed_and_written(scorer, files, tmp_path):
    code, out, _ = scorer("--mode", "none", "--json", tmp_path / "score.json")
    assert code == 0
    said = re.fullmatch(
        r"score none val_loss:(\S+) val_bpb:(\S+) tokens:300 bytes:(\d+) seconds:\S+ of 600\n", out
    )
    result = json.loads((tmp_path / "score.json").read_text())
    assert [float(x) for x in said.groups()] == pytest.approx(
        [result["val_loss"], result["val_bpb"], result["bytes"]], abs=1e-8
    )
    assert result["bytes"] == int((stream()[1:] != BOS).sum())
    state = golf.restore(artifact.unpack((files / "model.golf").read_bytes())[1], CFG, VOCAB)
    made = golf.Golf(CFG, VOCAB, 0, torch.float32)
    made.load_state_dict(state)
    nats = float(run("none", stream(), made=made).nll.double().sum())
    assert result["val_bpb"] == pytest.approx(nats / math.log(2) / result["bytes"], abs=1e-9)


def test_a_part_is_called_a_part_and_a_late_score_late(scorer):
    code, out, _ = scorer("--limit", "100", "--mode", "none")
    assert (code, "tokens:100 " in out, "PARTIAL: not the whole split" in out) == (0, True, True)
    code, out, _ = scorer("--budget", "0.000001", "--mode", "none")
    assert (code, "OVER ITS BUDGET" in out) == (4, True)


def test_an_interrupt_is_one_line(scorer, monkeypatch, tmp_path):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setitem(score.MODES, "sliding", interrupt)
    code, out, stderr = scorer("--json", tmp_path / "score.json")
    assert (code, out, len(stderr.rstrip().split("\n"))) == (130, "", 1)
    assert not (tmp_path / "score.json").exists()


def test_a_loss_that_is_no_number(scorer, monkeypatch):
    nll = golf.Golf.nll
    monkeypatch.setattr(golf.Golf, "nll", lambda self, x, t: nll(self, x, t) * math.nan)
    code, _, stderr = scorer()
    assert code == 3
    assert "the loss of mode sliding is nan" in stderr


@pytest.mark.parametrize(
    ("options", "names", "said"),
    [
        ((), {"name": "foreign"}, r"was trained with vocabulary 257, SHA-256 00, not with vocabulary 257"),
        ((), {"name": "config"}, r"config.golf is not one of train_golf.py \(TypeError.*depth"),
        ((), {"name": "short"}, r"error: "),
        ((), {"name": "missing"}, r"No such file.*missing.golf"),
        ((), {"val": "wide"}, r"token 300, but the vocabulary has 257"),
        ((), {"val": "missing"}, r"missing_val_000000.bin: is no file; name the shards"),
        (("--val", "/"), {}, r"--val /: is no file; name the shards"),
        (("--tokenizer", "nothing.model"), {}, r"nothing.model"),
        (("--mode", "oracle"), {}, r"--mode 'oracle' does not exist; choose one of none, sliding, sgd, lora"),
        (("--set", "stride=64"), {}, r"length 32, stride 64.*change them with --set"),
        (("--set", "stride=0"), {}, r"--set stride=0: must be above 0"),
        (("--set", "epochs=3"), {}, r"no setting 'epochs'.*KEY one of length"),
        (("--set", "sgd_lr=fast"), {}, r"sgd_lr=fast: must be float"),
        (("--set", "sgd_momentum=-1"), {}, r"--set sgd_momentum=-1: must be 0 or more"),
        (("--set", "sgd_momentum=1"), {}, r"--set sgd_momentum=1: must be below 1"),
        (("--set", "lora_beta2=1"), {}, r"--set lora_beta2=1: must be below 1"),
        (("--set", "lora_decay=-0.5"), {}, r"--set lora_decay=-0.5: must be 0 or more"),
        (("--set", "batch_tokens=1000000000000"), {}, r"must be at most 1048576"),
        (("--set", "lora_rank=33"), {}, r"--set lora_rank=33: must be at most 32"),
        (("--json", "/nowhere/score.json"), {}, r"--json /nowhere/score.json: its folder does not exist"),
        (("--budget", "0"), {}, r"--budget 0"),
        (("--colour",), {}, r"unrecognized arguments: --colour"),
    ],
)
def test_refusals(scorer, options, names, said):
    code, out, stderr = scorer(*options, **names)
    assert (code, out) == (2, "")
    assert len(stderr.rstrip().split("\n")) == 1
    assert re.search(said, stderr), stderr


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_layers": 2_000_000_000}, "num_layers is 2000000000: must be from 2 to 64"),
        ({"micro_tokens": 10**13}, "micro_tokens is 10000000000000: must be at most 1048576"),
        ({"micro_tokens": 256.5}, "micro_tokens is 256.5: must be of the type of 65536"),
        ({"num_heads": 4.0}, "num_heads is 4.0: must be of the type of 8"),
        ({"seq_len": True}, "seq_len is True: must be of the type of 2048"),
        ({"order": [0, 1.0, 2]}, "order is .*: must be of the type of"),
        ({"score": "none"}, "score is 'none': must be of the type of"),
        ({"ln_scale": [1]}, "ln_scale is .*: must be of the type of True"),
    ],
)
def test_a_config_that_lies_is_refused(scorer, files, changes, said):
    meta, tensors = artifact.unpack((files / "model.golf").read_bytes())
    packed = artifact.pack({**meta, "config": {**meta["config"], **changes}}, tensors)
    (files / "lies.golf").write_bytes(packed)
    code, out, stderr = scorer(name="lies")
    assert (code, out, len(stderr.rstrip().split("\n"))) == (2, "", 1)
    assert re.search(f"lies.golf is not one of train_golf.py .*{said}", stderr), stderr


@pytest.mark.parametrize("prefix", ["..", "../score/.."])
def test_a_shard_named_twice_is_refused(scorer, files, monkeypatch, prefix):
    """Test-time training would learn it, then score it again."""
    (files / "score").mkdir(exist_ok=True)
    monkeypatch.chdir(files / "score")
    code, out, stderr = scorer("--val", files / "toy_val_000000.bin", f"{prefix}/toy_val_000000.bin")
    assert (code, out) == (2, "")
    assert "a shard is named twice" in stderr
