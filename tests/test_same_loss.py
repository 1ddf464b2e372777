"""The comparison of the fast path with plain PyTorch: its schedule, its arms, its refusals."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "benchmarks"))

import same_loss  # noqa: E402

import train_gpt as tg  # noqa: E402


def test_the_cut_schedule_has_every_stage():
    recipe = same_loss.cut(tg.RECIPES["sprint"], 8)
    assert [stage.steps for stage in recipe.stages] == [8, 8, 8, 2]
    assert [stage.short for stage in recipe.stages] == [stage.short for stage in tg.RECIPES["sprint"].stages]
    assert recipe.val_tokens == 10 * recipe.val_slot
    assert recipe.momentum[-1][0] == recipe.total_steps
    assert tg.RECIPES["sprint"].total_steps == 353, "the recipe itself stays"


def test_the_interval():
    assert same_loss.interval([1.5], [1.25]) == "+0.2500 (one seed: no interval)"
    # Two pairs that lie 0.2 apart: a standard error of 0.1414, 2 degrees of freedom, t = 4.303.
    assert same_loss.interval([1.0, 1.2], [1.1, 1.3]) == "-0.1000, 95 % interval -0.7085 to +0.5085"


@pytest.mark.parametrize(
    "options",
    [
        ["--recipe", "none"],
        ["--seeds", "0"],
        ["--steps", "1"],
        ["--steps", "-1"],
        ["--seeds", "x"],
        ["--fast"],
        ["--fp8", "none", "body"],
        ["--fp8", "head"],
        ["--fp8", "head+mlp", "mlp+head"],
    ],
    ids=str,
)
def test_bad_input_is_one_line(options):
    command = [sys.executable, str(ROOT / "benchmarks" / "same_loss.py"), *options]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("same_loss.py: error: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "end", [("interrupted at step 3: asked to by a signal", 130), ("diverged", 3)], ids=str
)
def test_a_run_that_ends_early_is_one_line(monkeypatch, capsys, end):
    def compare(args):
        raise tg.Ended(*end)

    monkeypatch.setattr(same_loss, "compare", compare)
    monkeypatch.setattr(sys, "argv", ["same_loss.py"])
    assert same_loss.main() == end[1]
    assert capsys.readouterr().err == f"same_loss.py: {end[0]}\n"


def test_the_whole_schedule_is_the_recipe_s():
    recipe = same_loss.cut(tg.RECIPES["sprint"], 0)
    assert (recipe.stages, recipe.momentum) == (tg.RECIPES["sprint"].stages, tg.RECIPES["sprint"].momentum)
    assert recipe.val_tokens == tg.RECIPES["sprint"].val_tokens


def test_arms_of_sets_end_with_the_baseline():
    arms = same_loss.arms_of(["none", "head", "head+mlp"], tg.RECIPES["sprint"])
    assert [(arm.name, arm.fp8) for arm in arms] == [
        ("head", ("head",)), ("head+mlp", ("head", "mlp")), ("none", ()),
    ]  # fmt: skip
    assert not any(arm.is_plain for arm in arms)


def test_differences_at_equal_seeds():
    assert same_loss.paired([1.5], [1.25]) == "one pair"
    text = "pairs: sd 0.1414, standard error 0.1000, n=2"
    assert same_loss.paired([1.2, 1.4], [1.1, 1.1]) == text


@pytest.mark.slow
def test_both_arms_on_a_cpu(corpus_dir, nano, monkeypatch, capsys, tmp_path):
    """Without a GPU both arms are plain PyTorch in float32, so they end equal."""
    monkeypatch.setitem(tg.RECIPES, "tiny", nano)
    monkeypatch.setattr(
        sys, "argv", ["same_loss.py", "--data", str(corpus_dir), "--seeds", "2", "--steps", "2"]
    )
    monkeypatch.setattr(same_loss.tg, "StopRequest", lambda: type("Never", (), {"is_set": False})())
    assert same_loss.main() == 0
    printed = capsys.readouterr().out
    assert printed.count("fast seed") == printed.count("plain seed") == 2
    assert "fast less plain: +0.0000" in printed


@pytest.mark.slow
def test_sets_of_products_on_a_cpu(corpus_dir, nano, monkeypatch, capsys):
    """The rounding is emulated; of the empty set nothing is rounded, so it ends as plain PyTorch does."""
    monkeypatch.setitem(tg.RECIPES, "tiny", nano)
    command = ["same_loss.py", "--data", str(corpus_dir), "--seeds", "2", "--steps", "2"]
    monkeypatch.setattr(same_loss.tg, "StopRequest", lambda: type("Never", (), {"is_set": False})())
    printed = []
    for more in ([], ["--fp8", "none", "head", "mlp+qkv+out"]):
        monkeypatch.setitem(tg.RECIPES, "tiny", nano)
        monkeypatch.setattr(sys, "argv", [*command, *more])
        assert same_loss.main() == 0
        printed.append(capsys.readouterr().out)
    plain = re.findall(r"plain seed \d: loss (\S+)", printed[0])
    assert re.findall(r"none seed \d: loss (\S+)", printed[1]) == plain
    for name in ("head", "mlp\\+qkv\\+out"):
        losses = re.findall(name + r" seed \d: loss (\S+)", printed[1])
        assert len(losses) == 2
        assert losses != plain
        assert re.search(name + r" less none: .*, n=2", printed[1])
