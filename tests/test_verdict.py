"""recordbook/verdict.py and compare_runs.py --claim: every outcome, each reason, and the exit codes."""

import dataclasses
import json
from pathlib import Path

import pytest

import compare_runs as cr
from recordbook import integrity, planning
from recordbook import verdict as vd
from recordbook.tracks import find_track
from tests.test_compare_runs import PUBLISHED, our_log, published, run_script

BASE_TIMES = [1000, 1004, 998, 1002, 1001, 999, 1003, 997]
FAST_TIMES = [950, 953, 949, 952, 951, 948, 954, 947]
LOSSES = [3.2701, 3.2713, 3.2695, 3.2708, 3.2699, 3.2711, 3.2704, 3.2706]
MORE_LOSSES = [3.2703, 3.2709, 3.2698, 3.2712, 3.2697, 3.2707, 3.2700, 3.2710]


def write(folder: Path, losses, times, first: int, source: str, **options) -> Path:
    """Runs of one arm at places first, first + 3, first + 4, ... of ABBA BAAB."""
    folder.mkdir(parents=True, exist_ok=True)
    slots = [2 * i + ((i % 4 in (1, 2)) != bool(first)) for i in range(len(times))]
    for i, (loss, ms, slot) in enumerate(zip(losses, times, slots, strict=True)):
        started = f"2026-02-01T{10 + slot // 60:02d}:{slot % 60:02d}:00"
        facts = {"started": started, "run_id": f"{folder.name}-{i}"} | options
        (folder / f"run{i}.txt").write_text(our_log(loss, ms, seed=i, source=source, **facts))
    return folder


@pytest.fixture
def pair(tmp_path):
    """A function that writes two interleaved arms; options of the candidate replace the defaults."""

    def make(losses=MORE_LOSSES, times=FAST_TIMES, n=8, **options) -> tuple[str, str]:
        base = write(tmp_path / "base", LOSSES[:n], BASE_TIMES[:n], 0, "x = 1\n")
        source = options.pop("source", "x = 2\n")
        new = write(tmp_path / "new", losses[:n], times[:n], 1, source, **options)
        return str(base), str(new)

    return make


def judge(args, claim: str = "systems", **options) -> vd.Verdict:
    """The verdict without a command line."""
    arms = [cr.load_arm(arg) for arg in args]
    cr.name_arms(arms)
    track = dataclasses.replace(vd.rules(arms[0], 3.28, None, None), **options)
    (found,) = vd.decide_all(arms, track, claim)
    return found


def states(found: vd.Verdict) -> dict[str, str]:
    return {reason.about: reason.state for reason in found.reasons}


# the outcomes -----------------------------------------------------------------------------------------------


def test_systems_claim_is_accepted(pair, capsys):
    args = pair()
    assert cr.main([*args, "--claim", "systems"]) == 0
    out = capsys.readouterr().out
    assert "Verdict on new: ACCEPT" in out
    assert "0.0500 s (5.00%) faster than base (1.0005 s), n 8 and 8" in out
    found = judge(args)
    assert states(found) == {"time": "pass", "loss": "pass", "runs": "pass"}
    assert found.more is None
    assert found.findings == ()


def test_ml_claim_is_accepted_with_the_price_of_loss(pair):
    found = judge(pair(), "ml", seconds_per_loss=10.0, seconds_per_loss_sd=1.0)
    assert found.outcome == vd.ACCEPT
    assert states(found) == {"time": "pass", "target": "pass", "adjusted": "pass", "runs": "pass"}
    assert "always-valid p" in next(r.text for r in found.reasons if r.about == "target")
    assert found.p == max(r.p for r in found.reasons if r.p is not None) <= 0.01


@pytest.mark.parametrize(
    ("changes", "claim", "about", "words"),
    [
        ({"times": [x + 60 for x in FAST_TIMES]}, "systems", "time", "slower than base"),
        ({"losses": [x + 0.01 for x in LOSSES]}, "systems", "loss", "may be worse by less than 0.002"),
        ({"losses": [x + 0.02 for x in LOSSES]}, "ml", "target", "above 3.28"),
        ({"host": "node2", "gpu_0": "NVIDIA H100 80GB HBM3 GPU-2222"}, "ml", "machine", "GPU-2222 (new 8)"),
        ({"driver": "560.0"}, "ml", "machine", "driver differs"),
        ({"data": "sha256=" + "e" * 64}, "ml", "different", "differ in data"),
        ({"recipe": "short"}, "ml", "different", "differ in recipe"),
        ({"every": 5}, "ml", "different", "differ in validation interval"),
        ({"world_size": "8"}, "ml", "different", "differ in hardware"),
        ({"total": 40, "every": 10}, "systems", "steps-systems", "no systems claim"),
    ],
)
def test_each_reason_to_reject(pair, capsys, changes, claim, about, words):
    """Exit code 1, and the line that says why."""
    args = pair(**changes)
    assert cr.main([*args, "--claim", claim]) == 1
    out = capsys.readouterr().out
    assert "Verdict on new: REJECT" in out
    lines = [line for line in out.splitlines() if line.startswith("  fail: ")]
    assert any(line.startswith(f"  fail: {about}: ") and words in line for line in lines), out


def test_slower_at_equal_loss_is_rejected(pair):
    """5 % faster, but the loss that it gave up is worth more than that."""
    found = judge(pair(losses=[x + 0.006 for x in MORE_LOSSES]), "ml", seconds_per_loss=20.0)
    assert (found.outcome, states(found)["adjusted"], states(found)["target"]) == (vd.REJECT, "fail", "pass")


def test_inconclusive_time_names_a_plausible_number_of_runs(pair, capsys):
    """A gain of half an sd: the number is planning's, less the runs that there are."""
    args = pair(times=[x - 1 for x in BASE_TIMES[::-1]])
    assert cr.main([*args, "--claim", "systems"]) == 4
    out = capsys.readouterr().out
    sd = cr.sample_sd(BASE_TIMES)
    more = planning.runs_needed_two_sample(1.0, sd, 0.01, 0.9) - 8
    assert 100 < more < 250
    assert f"Verdict on new: INCONCLUSIVE (about {more} more runs of each arm)" in out
    assert "  open: time: " in out


def test_too_few_runs_are_inconclusive(pair, capsys):
    """All tests pass with 3 runs, but the rule asks for 4; one run has no test at all."""
    args = pair(n=3)
    assert cr.main([*args, "--claim", "ml"]) == 4
    assert "INCONCLUSIVE (about 1 more runs of each arm)" in capsys.readouterr().out
    for name in ("run1.txt", "run2.txt"):
        (Path(args[1]) / name).unlink()
    assert cr.main([*args, "--claim", "ml"]) == 4
    out = capsys.readouterr().out
    assert "INCONCLUSIVE (about 3 more runs of each arm)" in out
    assert "few-runs: new: 1 complete run(s) of 1" in out


def test_equal_losses_are_inconclusive(pair, capsys):
    assert cr.main([*pair(losses=[3.27] * 8), "--claim", "ml"]) == 4
    assert "open: no-variance: new: all 8 losses are 3.27" in capsys.readouterr().out


def test_blocked_order_with_drift_has_no_verdict(tmp_path, capsys):
    """Times that fall from run to run make the later arm faster."""
    for arm, start, hour in (("base", 1100, 10), ("new", 1060, 12)):
        folder = tmp_path / arm
        folder.mkdir()
        for i in range(8):
            facts = {"started": f"2026-02-01T{hour}:{i:02d}:00", "run_id": f"{arm}{i}"}
            log = our_log(LOSSES[i], start - 5 * i, seed=i, source=f"x = '{arm}'\n", **facts)
            (folder / f"run{i}.txt").write_text(log)
    assert cr.main([str(tmp_path / "base"), str(tmp_path / "new"), "--claim", "systems"]) == 4
    out = capsys.readouterr().out
    assert (
        "open: drift: base and new by the start times in the logs: order AAAAAAAABBBBBBBB is blocked" in out
    )


# tests of time ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("test", cr.TIME_TESTS)
def test_every_time_test(pair, capsys, test):
    args = pair()
    assert cr.main([*args, "--claim", "systems", "--time-test", test]) == 0
    assert vd.TIME_TESTS[test][1] in capsys.readouterr().out
    assert cr.main([*args, "--time-test", test]) == 0
    assert cr.TIME_TESTS[test] in capsys.readouterr().out


def test_a_loss_of_pairs_is_surer_where_pairs_share_a_seed(pair):
    """Losses that differ by seed far more than by program: Welch's test cannot tell, that of pairs can."""
    by_seed = [loss + 0.02 * (i % 3) for i, loss in enumerate(LOSSES)]
    args = pair(losses=[loss + 0.0008 * (-1) ** i for i, loss in enumerate(by_seed)])
    for i, loss in enumerate(by_seed):
        path = Path(args[0]) / f"run{i}.txt"
        path.write_text(path.read_text().replace(f"val_loss:{LOSSES[i]:.4f}", f"val_loss:{loss:.4f}"))
    welch, pairs = (judge(args, margin=0.005, loss_test=test) for test in ("welch", "paired"))
    assert (states(welch)["loss"], states(pairs)["loss"]) == ("open", "pass")
    (reason,) = [r for r in pairs.reasons if r.about == "loss"]
    assert "non-inferiority of pairs: p = " in reason.text
    assert reason.p == pairs.statistics["loss_non_inferiority_pairs"].test.p
    assert (welch.outcome, pairs.outcome) == ("INCONCLUSIVE", "ACCEPT")
    (found,) = [r for r in judge(args, margin=0.0009, loss_test="paired").reasons if r.about == "loss"]
    assert found.state == "open"
    assert found.runs > 8


def test_a_loss_that_is_the_same_in_every_pair_is_judged_by_arms(pair):
    """Bitwise equal maths: differences of zero have no spread, and nothing is surer."""
    args = pair(losses=LOSSES)
    found = judge(args, loss_test="paired")
    assert found.outcome == "ACCEPT"
    (reason,) = [r for r in found.reasons if r.about == "loss"]
    assert "non-inferiority of the arms, as all pairs differ by the same: p = " in reason.text
    assert reason.p == found.statistics["loss_non_inferiority"].p


def test_a_loss_of_pairs_needs_pairs(pair):
    args = pair()
    (Path(args[1]) / "run2.txt").unlink()
    found = judge(args, loss_test="paired")
    assert found.outcome == "REJECT"
    (reason,) = [r for r in found.reasons if r.about == "loss"]
    assert "lack a partner of the other arm" in reason.text


def test_pairs_of_several_lanes_are_those_of_one_gpu(tmp_path):
    """Two GPUs of 950 and 1,050 ms at once; by start times alone, runs of different GPUs would be pairs."""
    ms = {
        (gpu, arm, i): 950 + 100 * gpu - 20 * (arm == "new") + i
        for gpu in (0, 1)
        for arm in ("base", "new")
        for i in range(3)
    }
    for (gpu, arm, i), time in ms.items():
        first = (arm == "new") == bool((gpu + i) % 2)  # which arm begins
        started = f"2026-02-01T10:{4 * i + 2 * (not first):02d}:0{gpu}"
        facts = {"gpu_0": f"NVIDIA H100 80GB HBM3 GPU-{gpu}", "started": started, "run_id": f"{arm}{gpu}{i}"}
        (tmp_path / arm).mkdir(exist_ok=True)
        text = our_log(3.27 + time / 1e6, time, seed=2 * i + gpu, source=f"{arm}\n", **facts)
        (tmp_path / arm / f"{gpu}{i}.txt").write_text(text)
    arms = [cr.load_arm(str(tmp_path / arm)) for arm in ("base", "new")]
    new, base = vd.paired_times(*arms)
    assert sorted(b - a for a, b in zip(base, new, strict=True)) == pytest.approx([-0.02] * 6)
    (tmp_path / "new" / "02.txt").unlink()
    arms[1] = cr.load_arm(str(tmp_path / "new"))
    with pytest.raises(ValueError, match=r"not interleaved in pairs: 02\.txt lack a partner"):
        vd.paired_times(*arms)


def test_paired_test_needs_pairs(pair, capsys):
    args = pair(started="2026-02-03T10:00:00")
    assert cr.main([*args, "--claim", "systems", "--time-test", "paired"]) == 1
    assert "not interleaved in pairs" in capsys.readouterr().out
    assert cr.main([*args, "--time-test", "paired"]) == 2


def test_student_and_two_sided_p_are_the_tables(pair, tmp_path):
    """The p of the verdict is that of the column."""
    args, path = pair(), tmp_path / "o.json"
    for test in ("welch-less", "welch-two-sided", "student"):
        cr.main([*args, "--claim", "ml", "--time-test", test, "--json", str(path)])
        report = json.loads(path.read_text())
        reasons = {r["about"]: r for r in report["verdicts"][0]["reasons"]}
        assert reasons["time"]["p"] == pytest.approx(report["arms"][1]["row"]["time_p"], rel=1e-9)


# failed runs, several candidates, metrics -----------------------------------------------------------------


def crash(folder: str, name: str, **facts) -> None:
    """A run that diverged at step 12."""
    options = {"status": "diverged at step 12: nan", "stop": 12, "source": "x = 2\n", "run_id": name}
    (Path(folder) / f"{name}.txt").write_text(our_log(3.0, 950, seed=50, **options | facts))


def test_failed_runs_are_infinite_times(pair, capsys):
    """One failure of nine is survived, two of four need more runs."""
    args = pair()
    crash(args[1], "bad")
    found = judge(args, "systems")
    assert found.outcome == vd.ACCEPT
    texts = [r.text for r in found.reasons if r.about == "failed"]
    assert len(texts) == 2
    assert "1 failed run(s) of new as infinite times: rank test: p = " in texts[0]
    crash(args[1], "worse")
    crash(args[1], "worst")
    assert judge(args, "ml").outcome != vd.ACCEPT
    assert "3 failed run(s) count as infinite time and loss" in str(judge(args).findings)


def test_a_candidate_that_always_crashes_is_rejected(pair, capsys):
    args = pair()
    for path in Path(args[1]).iterdir():
        path.unlink()
    crash(args[1], "bad")
    crash(args[1], "worse")
    assert cr.main([*args, "--claim", "ml"]) == 1
    assert "fail: failed: 2 run(s) of new failed, 0 ended well" in capsys.readouterr().out


def test_several_candidates_share_alpha(pair, tmp_path, capsys):
    """Holm: the weaker of two is tested at alpha, the stronger at half of it."""
    base, new = pair()
    third = write(
        tmp_path / "third", [x + 0.0005 for x in MORE_LOSSES], [x + 3 for x in FAST_TIMES], 1, "x = 3\n"
    )
    path = tmp_path / "o.json"
    assert cr.main([base, new, str(third), "--claim", "systems", "--json", str(path)]) == 0
    verdicts = json.loads(path.read_text())["verdicts"]
    assert sorted(round(v["alpha"], 6) for v in verdicts) == [0.005, 0.01]
    twin = write(tmp_path / "twin", MORE_LOSSES, FAST_TIMES, 1, "x = 3\n")
    assert cr.main([base, new, str(twin), "--claim", "systems"]) == 1
    assert capsys.readouterr().out.count("fail: duplicate: ") == 16
    slow = write(tmp_path / "slow", LOSSES[::-1], [x + 100 for x in BASE_TIMES], 1, "x = 4\n")
    assert cr.main([base, new, str(slow), "--claim", "systems"]) == 1
    out = capsys.readouterr().out
    assert "Verdict on new: ACCEPT" in out
    assert "Verdict on slow: REJECT" in out


def test_metric_and_its_direction(pair, capsys):
    """val_bpb is a third of the loss here; read as an accuracy, a higher value must be reached."""
    args = pair()
    assert cr.main([*args, "--metric", "val_bpb", "--target", "1.1", "--claim", "ml"]) == 0
    out = capsys.readouterr().out
    assert "bpb \u03bc" in out
    assert "mean val_bpb 1.0901" in out
    higher = ["--metric", "val_bpb:higher", "--claim", "ml"]
    assert cr.main([*args, *higher, "--target", "1.08"]) == 0
    assert "is 0.0101 above 1.08" in capsys.readouterr().out
    assert cr.main([*args, *higher, "--target", "1.1"]) == 1
    assert "is 0.0099 below 1.1" in capsys.readouterr().out
    for key in ("val_acc", "loss", "seconds", "bpb"):
        assert cr.main([*args, "--metric", key, "--claim", "ml"]) == 2
        assert f"--metric {key}: not in every log of base; they hold" in capsys.readouterr().err


# the command line -------------------------------------------------------------------------------------------


def tiny_pair(pair, **options):
    """Runs on a CPU, as the track tiny wants them."""
    cpu = {"gpu_0": None, "driver": None, "cpu": "x86_64, 2 cores", "recipe": "tiny", "target": "4.15"}
    base, new = pair(**cpu | options)
    write(Path(base), LOSSES, BASE_TIMES, 0, "x = 1\n", **cpu)
    return base, new


def test_track_rules(pair, capsys):
    args = tiny_pair(pair)
    assert cr.main([*args, "--track", "tiny", "--claim", "systems"]) == 0
    out = capsys.readouterr().out
    assert "claim systems, track tiny: val_loss, margin 0.005, alpha 0.01, at least 4 runs" in out
    assert "paired one-sided t-test" in out
    assert cr.main([*args, "--track", "sprint", "--claim", "systems"]) == 1
    out = capsys.readouterr().out
    assert "fail: track: base names no GPU, track sprint is for 1" in out
    assert "recipe tiny, track sprint wants sprint" in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--track", "tiny"], "add --claim systems or --claim ml"),
        (["--track", "none", "--claim", "ml"], "does not exist"),
        (["--track", "tiny", "--claim", "ml", "--alpha", "0.05"], "--alpha: the rules of track"),
        (["--track", "tiny", "--claim", "ml", "--time-test", "student"], "--time-test: the rules"),
        (["--track", "tiny", "--claim", "ml", "--metric", "val_bpb"], "--metric: the rules"),
        (["--track", "tiny", "--claim", "ml", "--target", "5"], "--target: the rules"),
        (["--alpha", "0.05"], "give --claim"),
        (["--alpha", "2", "--claim", "ml"], "must be above 0 and below 0.5"),
        (["--claim", "both"], "invalid choice"),
        (["--metric", "a b"], "must be a key"),
        (["--by", "colour"], "must be one of source, steps, prefix"),
        (["--by", "steps=99"], "99 fits 0 of 30"),
    ],
)
def test_bad_options(pair, capsys, options, message):
    assert cr.main([*pair(), *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_verdict_needs_two_arms(pair, capsys):
    assert cr.main([pair()[0], "--claim", "ml"]) == 2
    assert "name two arms" in capsys.readouterr().err


def test_as_a_script(pair, tmp_path):
    """From a shell the exit codes are the same, and InputError of recordbook is caught."""
    args = pair()
    assert run_script(*args).returncode == 0
    assert run_script(*args, "--claim", "systems").returncode == 0
    assert run_script(*args[::-1], "--claim", "systems").returncode == 1
    result = run_script(*args, "--claim", "ml", "--track", "nowhere")
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert run_script("replay", "no/such.txt", str(tmp_path / "x")).returncode == 2


def test_without_a_claim_there_is_no_verdict(pair, tmp_path, capsys):
    path = tmp_path / "o.json"
    assert cr.main([*pair(), "--json", str(path)]) == 0
    assert "Verdict" not in capsys.readouterr().out
    report = json.loads(path.read_text())
    assert report["verdicts"] == []
    found = report["statistics"]["new"]
    assert found["time_welch_less"]["p"] == pytest.approx(report["arms"][1]["row"]["time_p"])
    assert {"time_paired", "time_yuen", "time_permutation", "time_drift", "loss_always_valid"} <= found.keys()


def test_json_of_a_verdict(pair, tmp_path):
    path = tmp_path / "o.json"
    assert cr.main([*pair(host="node2", gpu_0=None), "--claim", "ml", "--json", str(path)]) == 1
    report = json.loads(path.read_text())
    assert report["exit_code"] == 1
    assert report["verdicts"][0]["outcome"] == "REJECT"
    assert report["arms"][0]["row"] is None
    assert {"code", "level", "text", "files"} == report["findings"][0].keys()


def test_by_source_steps_and_prefix(pair, tmp_path, capsys):
    pair()
    for file in (tmp_path / "base").iterdir():
        file.rename(tmp_path / f"alpha_{file.name}")
    for file in (tmp_path / "new").iterdir():
        file.rename(tmp_path / f"beta_{file.name}")
    assert cr.main([str(tmp_path), "--by", "prefix", "--claim", "systems"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(
        "Arms by prefix, the first is the baseline:\n  prefix alpha_run: 8 run(s): alpha_run0"
    )
    assert cr.main([str(tmp_path), "--by", "source", "--claim", "systems"]) == 0
    sources = [line.split()[1] for line in capsys.readouterr().out.splitlines()[1:3]]
    swapped = f"source={sources[1][:6]},{sources[0][:6]}"
    assert cr.main([str(tmp_path), "--by", swapped, "--claim", "systems"]) == 1
    assert cr.main([str(tmp_path), "--by", "steps"]) == 2  # one arm of two sources
    assert "differ in source" in capsys.readouterr().err


def test_markdown(pair, capsys):
    assert cr.main([*pair(), "--claim", "systems", "--markdown"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("|  | Runs | Time")
    assert lines[1].startswith("| --- | ---: |")
    assert any(line.startswith("**Verdict on new: ACCEPT**") for line in lines)


def test_diff_and_replay(pair, tmp_path, capsys):
    base, new = pair()
    assert cr.main(["diff", base, new]) == 0
    assert "+x = 2" in capsys.readouterr().out
    assert cr.main(["replay", f"{new}/run0.txt", str(tmp_path / "again")]) == 0
    assert (tmp_path / "again" / "train_gpt.py").read_text() == "x = 2\n"


# published runs ---------------------------------------------------------------------------------------------


@published
def test_record_61(capsys):
    """The table's digits, an ml claim that stands, and what a track of ours does not take from it."""
    folder = PUBLISHED / "2026-01-18_UnifiedOptimizers"
    args = [str(folder / "baseline"), str(folder / "unified-optimizer")]
    assert cr.main([*args, "--claim", "ml"]) == 0
    out = capsys.readouterr().out
    assert (
        "unified-optimizer     8 104.4579  0.1430   -1.0782  0.0000  3.2782  0.0015   -0.0001 0.0060" in out
    )
    assert "p = 2.61e-10 <= 0.01" in out
    assert "p = 0.00596 <= 0.01" in out
    assert "not interleaved" in out
    assert cr.main([*args, "--track", "short", "--claim", "systems"]) == 1
    out = capsys.readouterr().out
    assert "fail: machine-unknown: " in out
    assert "fail: steps-systems: " in out


@published
def test_strict_alternation(tmp_path, capsys):
    """Paired: -1.4173 (sd 0.2631, p 1.86e-8; Wilcoxon 0.00098)."""
    path, folder = tmp_path / "o.json", str(PUBLISHED / "2025-09-05_SkipMLPBlocks")
    options = ["--by", "steps=1670,1705", "--claim", "ml", "--time-test", "paired", "--json", str(path)]
    assert cr.main([folder, *options]) == 0
    report = json.loads(path.read_text())
    found = report["statistics"]["steps 1705"]
    assert round(found["time_paired"]["test"]["difference"], 4) == -1.4173
    assert round(found["time_paired"]["sd"], 4) == 0.2631
    assert found["time_paired"]["test"]["p"] == pytest.approx(1.86e-8, rel=5e-3)
    assert found["time_paired"]["wilcoxon_p"] == pytest.approx(0.00098, rel=5e-3)
    assert found["time_welch_less"]["p"] == pytest.approx(2.85e-12, rel=5e-3)
    assert report["verdicts"][0]["outcome"] == "ACCEPT"


@published
@pytest.mark.parametrize(
    ("name", "code", "words"),
    [
        ("2025-11-29_BatchSizeSchedule", "mixed", "9 + 1 + 1 runs that differ in source"),
        (
            "2026-01-30_MimeticValueOutput",
            "truncated",
            "6037e443-df16-4eeb-ba71-282b5f7096d0.txt is not whole",
        ),
        ("2024-10-13_llmc", "few-runs", "1 complete run(s) of 1"),
    ],
)
def test_negative_cases_are_refused_for_the_right_reason(capsys, name, code, words):
    base = PUBLISHED / "2026-01-18_UnifiedOptimizers" / "baseline"
    assert cr.main([str(base), str(PUBLISHED / name), "--claim", "ml"]) in (1, 4)
    out = capsys.readouterr().out
    assert any(f" {code}: " in line and words in line for line in out.splitlines())
    assert "ACCEPT" not in out


def test_every_level_is_known():
    """Undecided findings block, or they would not matter."""
    assert set(integrity.UNDECIDED) <= integrity.LEVELS.keys()
    assert all(integrity.LEVELS[code][0] == integrity.BLOCKS for code in integrity.UNDECIDED)
    assert find_track("short").min_runs == 8


# claim score ------------------------------------------------------------------------------------------------

SCORE = {"metric": "val_bpb", "claims": ("score",), "gain_unit": "bits/byte", "bytes_per_token": None}


def test_score_needs_the_gain_not_the_time(pair):
    """The logs' val_bpb is a third of their loss: 0.012 lower is 0.004 bits a byte; times are equal."""
    better = [x - 0.012 for x in MORE_LOSSES]
    args = pair(losses=better, times=BASE_TIMES)
    found = judge(args, "score", **SCORE, gain=0.003)
    assert (found.outcome, states(found)) == ("ACCEPT", {"gain": "pass", "runs": "pass"})
    assert found.p < 0.001
    more = judge(args, "score", **SCORE, gain=0.005)
    assert (more.outcome, states(more)["gain"]) == ("REJECT", "fail")
    near = judge(args, "score", **SCORE, gain=0.0039)
    assert (near.outcome, states(near)["gain"]) == ("INCONCLUSIVE", "open")
    (reason,) = (r for r in found.reasons if r.about == "gain")
    assert "0.00401 better" in reason.text
    assert "more than 0.00300 (0.003 bits/byte)" in reason.text


def test_score_in_the_wrong_direction(pair):
    found = judge(pair(losses=[x + 0.012 for x in MORE_LOSSES]), "score", **SCORE, gain=0.003)
    assert (found.outcome, states(found)["gain"]) == ("REJECT", "fail")


def test_score_is_of_a_track(pair):
    with pytest.raises(cr.InputError, match="claim score"):
        judge(pair(), "score")
    track = find_track("golf")
    assert "gain 0.00194 bits/byte (0.005 nats/token)" in vd.described(track, "score", 0.01)
