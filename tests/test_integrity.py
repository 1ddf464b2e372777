"""recordbook/integrity.py: every finding, its level and the files it names, from small synthetic folders."""

import dataclasses
import hashlib
import json
import lzma
import os
import re
from pathlib import Path

import pytest

import compare_runs as cr
from recordbook import integrity as it
from recordbook import verdict as vd
from recordbook.statistics import always_valid
from recordbook.tracks import find_track
from tests.test_compare_runs import PUBLISHED, our_log, published

LOSSES = {"base": [3.2701, 3.2713, 3.2695, 3.2708], "new": [3.2703, 3.2709, 3.2698, 3.2712]}
TIMES = {"base": [1000, 1004, 998, 1002], "new": [950, 953, 949, 952]}
SLOTS = {"base": [0, 3, 5, 6], "new": [1, 2, 4, 7]}


def log_of(arm: str, i: int, **options) -> str:
    """Run i of an arm in order ABBA BAAB."""
    facts = {"started": f"2026-02-01T10:{SLOTS[arm][i]:02d}:00", "run_id": f"{arm}-{i}", "seed": i}
    facts |= {"source": f"x = '{arm}'\n"} | options
    return our_log(facts.pop("loss", LOSSES[arm][i]), facts.pop("ms", TIMES[arm][i]), **facts)


@pytest.fixture
def arms(tmp_path):
    """Two sound arms in tmp_path/base and tmp_path/new."""
    for arm in LOSSES:
        (tmp_path / arm).mkdir()
        for i in range(4):
            (tmp_path / arm / f"run{i}.txt").write_text(log_of(arm, i))
    return tmp_path


def change(folder: Path, arm: str, i: int, **options) -> None:
    """Write run i of an arm again, otherwise."""
    (folder / arm / f"run{i}.txt").write_text(log_of(arm, i, **options))


def findings(folder: Path, claim: str | None = "systems", track=None, names=("base", "new")) -> dict:
    """{code: finding} of the arms."""
    loaded = [cr.load_arm(str(folder / name)) for name in names]
    cr.name_arms(loaded)
    refused = list(cr.refusals(loaded, set()))
    return {finding.code: finding for finding in it.find(loaded, claim, track, refused)}


def test_sound_arms_have_no_findings(arms):
    assert findings(arms) == {}


def test_gpus_of_one_host_that_serve_all_arms_alike_favour_none(arms):
    other = {"gpu_0": "NVIDIA H100 80GB HBM3 GPU-2222"}
    for arm in LOSSES:
        for i in (1, 3):
            change(arms, arm, i, **other)
    found = findings(arms)
    assert {code: finding.level for code, finding in found.items()} == {"lanes": "notes"}
    assert "GPU-2222 (base 2, new 2)" in found["lanes"].text
    change(arms, "new", 3)
    assert findings(arms)["machine"].blocks, "one arm had a GPU more often"
    for arm in LOSSES:
        for i in (1, 3):
            change(arms, arm, i, host="n2", **other)
    assert {f.level for c, f in findings(arms).items() if c == "machine"} == {"blocks"}, "two hosts"


# one change each: (arm, runs, options, code, level, part of the sentence, files)
CASES = [
    ("new", [0, 1, 2, 3], {"host": "n2", "gpu_0": "NVIDIA H100 GPU-2"}, "different", "blocks", "hardware", 0),
    ("new", [1], {"gpu_0": "NVIDIA H100 80GB HBM3 GPU-2222"}, "machine", "blocks", "GPU-2222 (new 1)", 1),
    ("new", [1], {"driver": "560.1"}, "machine", "blocks", "driver differs between runs", 1),
    ("new", [0, 1, 2, 3], {"host": "n2"}, "host-name", "notes", "n2 (new 4)", 4),
    ("new", [2], {"driver": None}, "partly-logged", "warns", "not logged (new 1)", 1),
    ("new", [0, 1, 2, 3], {"data": "sha256=" + "e" * 64}, "different", "blocks", "differ in data", 0),
    ("new", [3], {"source": "other = 1\n"}, "mixed", "blocks", "3 + 1 runs that differ in source", 1),
    ("base", [3], {"total": 40}, "mixed", "blocks", "total of steps", 1),
    ("base", [3], {"every": 5}, "mixed", "blocks", "validation interval", 1),
    ("base", [3], {"world_size": "2"}, "mixed", "blocks", "hardware", 1),
    ("new", [0, 1, 2, 3], {"world_size": "2"}, "different", "blocks", "differ in hardware", 0),
    ("new", [0, 1, 2, 3], {"every": 5}, "different", "blocks", "differ in validation interval", 0),
    ("new", [0, 1, 2, 3], {"attention": "sdpa"}, "settings", "warns", "attention: not logged and sdpa", 0),
    ("new", [0, 1, 2, 3], {"total": 40}, "steps-systems", "blocks", "no systems claim", 0),
    ("new", [0, 1, 2, 3], {"source": "x = 'base'\n"}, "same-source", "warns", "(A/A)", 0),
    ("new", [0, 1], {"dirty": "true"}, "dirty", "warns", "uncommitted changes in run0.txt, run1.txt", 2),
    ("new", [3], {"seed": 1}, "same-seed", "blocks", "seed 1 (2 runs)", 2),
    ("new", [3], {"status": None, "stop": 17}, "truncated", "blocks", "is not whole: stops at step 17", 1),
    ("new", [3], {"status": "crashed at step 12: x", "stop": 12}, "failed", "warns", "run3.txt crashed", 1),
    ("new", [3], {"status": "interrupted at step 9", "stop": 9}, "interrupted", "warns", "run3.txt", 1),
    ("new", [3], {"loss": float("nan")}, "failed", "warns", "run3.txt diverged", 1),
    ("new", [3], {"status": "done", "stop": 20}, "contradictory", "blocks", "says 'status: done' but", 1),
    ("new", [3], {"run_id": "new-2"}, "duplicate", "blocks", "the same run_id new-2", 2),
    ("base", [0], {"ms": 1900}, "outlier", "warns", "run0.txt: time 1.900 is an outlier", 1),
]  # fmt: skip


@pytest.mark.parametrize(("arm", "runs", "options", "code", "level", "words", "files"), CASES)
def test_each_finding(arms, arm, runs, options, code, level, words, files):
    for i in runs:
        change(arms, arm, i, **options)
    found = findings(arms)[code]
    assert found.level == level
    assert words in found.text
    assert len(found.files) == files


def delay(path: Path, from_step: int, factor: float = 1.0, ms: int = 0) -> None:
    """Stretch the clock of a log, and add to it from a step on."""

    def later(match: re.Match) -> str:
        at = round(factor * int(match[3])) + (ms if int(match[2]) >= from_step else 0)
        return f"{match[1]}{at}ms"

    pattern = r"^(step:(\d+)/.* train_time:)(\d+)ms"
    path.write_text(re.sub(pattern, later, path.read_text(), flags=re.M))


def test_a_run_that_was_held_up_is_named(arms):
    delay(arms / "new" / "run1.txt", from_step=15, ms=300)
    found = findings(arms)["held-up"]
    assert (found.level, found.files) == ("warns", ("run1.txt",))
    assert "new: run1.txt lost 0.3 of its 1.3 s" in found.text
    assert "steps 14 to 15, for one, took 0.3 s, usually 0.0" in found.text
    delay(arms / "new" / "run1.txt", from_step=15, ms=-300)
    assert "held-up" not in findings(arms)


def test_a_run_that_is_slower_all_along_was_not_held_up(arms):
    delay(arms / "new" / "run1.txt", from_step=99, factor=1.5)
    assert "held-up" not in findings(arms)


def test_a_hold_up_shows_from_three_runs_on_by_the_clocks_that_there_are(arms):
    for arm in LOSSES:
        (arms / arm / "run3.txt").unlink()
    delay(arms / "new" / "run1.txt", from_step=15, ms=300)
    assert "held-up" in findings(arms)
    for i in (0, 2):
        path = arms / "new" / f"run{i}.txt"
        path.write_text(
            re.sub(r"(train_loss:\S+) train_time:\S+", r"\1 train_time:1.2.3ms", path.read_text())
        )
    assert "steps 10 to 20" in findings(arms)["held-up"].text, "validations have clocks too"
    for arm in LOSSES:
        (arms / arm / "run2.txt").unlink()
    assert "held-up" not in findings(arms)


def test_the_first_baseline_of_sprint_had_a_run_that_was_held_up():
    """One of its GPUs scored another model while the run's clock had started."""
    record = Path(it.__file__).parents[1] / "records" / "sprint" / "2026-11-28_foundation"
    (found,) = [f for f in it.find([cr.load_arm(str(record / "logs"))]) if f.code == "held-up"]
    assert found.files == ("run-002.txt.zst",)
    assert "lost 6.1 of its 154.1 s" in found.text


def test_contradictory_final_lines(arms):
    path = arms / "new" / "run3.txt"
    line = next(x for x in path.read_text().splitlines() if x.startswith("step:30/30 val_loss"))
    path.write_text(path.read_text().replace(line, f"{line}\n{line.replace('3.27', '3.26')}"))
    found = findings(arms)["contradictory"]
    assert found.blocks
    assert found.files == ("run3.txt",)
    assert "two different validation lines at step 30" in found.text


def test_levels_depend_on_the_track(arms):
    """What a claim alone only warns of blocks a record."""
    for arm in LOSSES:
        for i in range(4):
            change(arms, arm, i, host=None, gpu_0="NVIDIA H100 80GB HBM3 unknown")
    assert findings(arms, "ml")["machine-unknown"].level == "warns"
    assert findings(arms, "ml", find_track("sprint"))["machine-unknown"].level == "blocks"


def test_track_rules(arms):
    found = findings(arms, "ml", find_track("short"))
    assert found["track"].blocks
    assert findings(arms, "ml").keys() == set()
    texts = [f.text for f in it.find([cr.load_arm(str(arms / "base"))], "ml", find_track("short"))]
    assert any("ran on 1 GPU(s), track short is for 8" in text for text in texts)
    assert any("recipe tiny, track short wants short" in text for text in texts)


def test_llmc_logs_have_no_clock(tmp_path):
    for i in range(2):
        (tmp_path / f"{i}.txt").write_text(f"s:0 tel:11.0\ns:1 trl:10.0\ns:2 tel:9.{i}\n")
    found = findings(tmp_path, "ml", names=("",))
    assert found["no-clock"].blocks
    assert found["no-total"].level == "warns"
    assert "source-unknown" in found
    assert "no-clock" not in findings(tmp_path, None, names=("",))


def test_logs_that_no_argument_names(arms):
    loaded = [cr.load_arm(str(arms / "base" / "run[0-2].txt")), cr.load_arm(str(arms / "new"))]
    cr.name_arms(loaded)
    (found,) = it.find(loaded, "systems")
    assert (found.code, found.level) == ("unused", "warns")
    assert "1 log(s) in the same folders are in no arm: run3.txt" in found.text


def test_clocks_of_the_gpus(arms):
    """run.sh leaves a file beside each log."""
    for arm, clock, held in (("base", 1980, {}), ("new", 1900, {"sw_power_cap": 0.4, "idle": 0.9})):
        for i in range(4):
            gpu = {"index": 0, "sm_mhz": {"mean": clock}, "throttle": held}
            (arms / arm / f"run{i}.gpu.json").write_text(json.dumps({"gpus": [gpu]}))
    loaded = [cr.load_arm(str(arms / arm)) for arm in LOSSES]
    cr.name_arms(loaded)
    texts = [f.text for f in it.find(loaded) if f.code == "gpu-state"]
    assert "base and new ran at different GPU clocks: 1980 and 1900 MHz" in texts
    assert "GPUs of base and new were held back differently: nothing and sw_power_cap" in texts


# order ------------------------------------------------------------------------------------------------------


def blocked(arms: Path, drift: int) -> None:
    """One arm after the other, every run faster by `drift` ms."""
    for hour, arm in enumerate(LOSSES):
        for i in range(4):
            started = f"2026-02-01T1{hour}:{i:02d}:00"
            change(arms, arm, i, started=started, ms=1000 - 10 * hour - drift * (4 * hour + i) + i % 2)


def test_blocked_order_warns_and_drift_blocks(arms):
    blocked(arms, 0)
    found = findings(arms)
    assert found["blocked-order"].level == "warns"
    assert "drift" not in found
    blocked(arms, 8)
    found = findings(arms)
    assert found["drift"].blocks
    assert "order AAAABBBB is blocked" in found["drift"].text
    assert "drifting" in found


def test_order_from_file_times(arms):
    """Without start times the files' count, if they lie apart as runs must."""
    for arm in LOSSES:
        for i in range(4):
            change(arms, arm, i, started=None)
            os.utime(arms / arm / f"run{i}.txt", (1e9, 1e9))
    assert findings(arms)["order-unknown"].level == "warns"
    for arm in LOSSES:
        for i in range(4):
            ended = 1e9 + 60 * SLOTS[arm][i]
            os.utime(arms / arm / f"run{i}.txt", (ended, ended))
    assert findings(arms) == {}
    loaded = [cr.load_arm(str(arms / arm)) for arm in LOSSES]
    runs, origin = it.run_order(loaded)
    assert origin == "the times of the files"
    assert [arm is loaded[1] for arm, _ in runs] == [bool(int(x)) for x in "01101001"]


def test_order_over_the_end_of_summer_time(arms):
    """Runs of ten minutes from 1:40 on; at 2:00 it is 1:00 again."""
    clock = [f"01:{40 + 10 * i}:00-0600" if i < 2 else f"01:{10 * i - 20:02d}:00-0700" for i in range(8)]
    for arm in LOSSES:
        for i in range(4):
            change(arms, arm, i, started=f"2026-11-01T{clock[SLOTS[arm][i]]}")
    loaded = [cr.load_arm(str(arms / arm)) for arm in LOSSES]
    runs, _ = it.run_order(loaded)
    assert [arm is loaded[1] for arm, _ in runs] == [bool(int(x)) for x in "01101001"]
    assert [run.name for run in loaded[1].counted] == [f"run{i}.txt" for i in range(4)]
    assert findings(arms) == {}


# ledger and plan --------------------------------------------------------------------------------------------


def keep_books(folder: Path, rule: str = "fixed", runs: int = 4, **changes) -> list[dict]:
    """plan.json, its hash and ledger.jsonl as run.sh leaves them."""
    loaded = {name: cr.load_arm(str(folder / name)) for name in LOSSES}
    letters = dict(zip("AB", loaded, strict=True))
    plan = {
        "format": "splits.plan/1",
        "arms": [{"arm": k, "source": loaded[v].runs[0].source} for k, v in letters.items()],
        "runs": runs,
        "stop": {"rule": rule, "least": runs, "most": runs},
    } | changes
    data = json.dumps(plan).encode()
    digest = hashlib.sha256(data).hexdigest()
    (folder / "plan.json").write_bytes(data)
    (folder / "plan.json.sha256").write_text(f"{digest}  plan.json\n")
    events, number = [], 0
    for letter, name in letters.items():
        for run in loaded[name].runs:
            number += 1
            which = {"attempt": number, "role": "run", "arm": letter, "log": f"{name}/{run.name}"}
            which["source"] = run.source
            events.append({"event": "start", **which, "plan": digest})
            events.append({"event": "end", **which, "status": "done", "log_sha256": run.digest})
    write_ledger(folder, events)
    return events


def write_ledger(folder: Path, events: list[dict]) -> None:
    (folder / "ledger.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))


def test_sound_books_have_no_findings(arms):
    events = keep_books(arms)
    warm = {"attempt": 99, "role": "warm-up", "arm": "A", "log": "warm-up/w.txt", "status": "interrupted"}
    write_ledger(arms, [*events, {"event": "end", **warm}, {"event": "decision", "after": 3}])
    assert findings(arms) == {}
    for path in (arms / "new").iterdir():  # packed logs are the same logs
        (path.parent / f"{path.name}.xz").write_bytes(lzma.compress(path.read_bytes()))
        path.unlink()
    assert findings(arms) == {}


def test_a_run_that_was_left_out(arms):
    keep_books(arms)
    (arms / "new" / "run2.txt").unlink()
    found = findings(arms)["ledger"]
    assert found.blocks
    assert "ledger.jsonl holds 8 runs, 1 of which are not among the logs: new/run2.txt done" in found.text


def test_a_run_that_is_not_in_the_ledger(arms):
    events = keep_books(arms)
    write_ledger(arms, [event for event in events if event["log"] != "base/run1.txt"])
    found = findings(arms)["ledger"]
    assert (found.blocks, found.files) == (True, ("run1.txt",))


def test_a_log_that_was_altered(arms):
    keep_books(arms)
    change(arms, "new", 2, ms=940)
    assert "altered since ledger.jsonl has their hash: run2.txt" in findings(arms)["ledger"].text


def test_failed_attempts_without_a_log_are_infinite_times(arms):
    events = keep_books(arms)
    lost = {"attempt": 50, "role": "run", "arm": "B", "log": "new/run9.txt", "status": "crashed"}
    write_ledger(arms, [*events, {"event": "end", **lost}])
    assert findings(arms)["ledger-failed"].level == "warns"
    loaded = [cr.load_arm(str(arms / arm)) for arm in LOSSES]
    cr.name_arms(loaded)
    assert [it.lost_failures(loaded, arm) for arm in loaded] == [0, 1]
    (found,) = vd.decide_all(loaded, vd.rules(loaded[0], 3.28, None, None), "systems")
    assert any("1 failed run(s) of new as infinite times" in reason.text for reason in found.reasons)
    assert found.outcome != vd.ACCEPT  # 4 and 4 runs, one more infinite: no rank test can be at 0.01


def test_a_killed_run_is_what_the_ledger_says(arms):
    """Its log just ends; the ledger knows that it crashed."""
    change(arms, "new", 3, status=None, stop=17)
    assert "truncated" in findings(arms)
    events = keep_books(arms)
    write_ledger(arms, [*events[:-1], events[-1] | {"status": "crashed"}])
    found = findings(arms)
    assert "truncated" not in found
    assert "run3.txt crashed" in found["failed"].text


def test_other_arms_of_a_ledger_are_told(arms):
    events = keep_books(arms)
    other = {"attempt": 60, "role": "run", "arm": "C", "log": "c/run1.txt", "status": "done", "source": "f"}
    write_ledger(arms, [*events, {"event": "end", **other}])
    assert findings(arms)["ledger-other"].level == "warns"


BROKEN = ["no json\n", "[1]\n", "\xff\n", '{"a": 1}\n', '{"event": "end", "attempt": []}\n', "[" * 100_000]


@pytest.mark.parametrize("text", BROKEN)
def test_a_broken_ledger_is_a_finding(arms, text):
    keep_books(arms)
    (arms / "ledger.jsonl").write_text(text, encoding="latin-1")
    assert "cannot be read" in findings(arms)["ledger"].text


def test_plans(arms):
    """Missing, altered, exchanged, of other sources, or not carried out."""
    keep_books(arms)
    plan = arms / "plan.json"
    plan.write_text(plan.read_text().replace('"runs": 4', '"runs": 2'))
    assert findings(arms)["plan"].blocks
    plan.unlink()
    assert "without plan.json" in findings(arms)["plan"].text
    keep_books(arms, **{"arms": [{"arm": "A", "source": "0" * 64}]})
    assert "ran a source that is not in plan.json" in findings(arms)["plan"].text
    keep_books(arms, runs=6)
    assert "4 of the 6 runs of plan.json" in findings(arms)["unfinished"].text
    for text in ("{", "null", '{"stop": true}', '{"arms": 2}'):
        plan.write_text(text)
        assert "plan.json cannot be read" in findings(arms)["ledger"].text


def test_a_series_that_may_stop_early_needs_always_valid_p(arms):
    """The same runs: accepted if their number was fixed, open if the series ended when p was small."""
    loaded = [cr.load_arm(str(arms / arm)) for arm in LOSSES]
    cr.name_arms(loaded)
    rules = vd.rules(loaded[0], 3.28, None, None)
    keep_books(arms)
    assert vd.decide(*loaded, rules, "systems").outcome == vd.ACCEPT
    keep_books(arms, rule="until-decided")
    found = vd.decide(*loaded, rules, "systems")
    time = next(reason for reason in found.reasons if reason.about == "time")
    assert "always-valid paired test, because the series could stop early" in time.text
    assert time.p == found.statistics["time_always_valid_pairs"].p_final


def test_the_price_of_loss_in_a_series_that_may_stop_early(arms):
    """The candidate's loss is higher, so the price that counts is 3 standard errors above the track's."""
    keep_books(arms, rule="until-decided")
    loaded = [cr.load_arm(str(arms / arm)) for arm in LOSSES]
    cr.name_arms(loaded)
    rules = vd.rules(loaded[0], 3.28, None, None)
    priced = dataclasses.replace(rules, seconds_per_loss=10.0, seconds_per_loss_sd=1.0)
    found = vd.decide(*loaded, priced, "ml")
    adjusted = next(reason for reason in found.reasons if reason.about == "adjusted")
    gaps = [
        (TIMES["new"][i] - TIMES["base"][i]) / 1000 + 13 * (LOSSES["new"][i] - LOSSES["base"][i])
        for i in range(4)
    ]
    assert adjusted.p == pytest.approx(always_valid(gaps, 0.0).p_final)
    assert found.statistics["loss_adjusted"].test.p < 0.01 < adjusted.p  # that of a number fixed beforehand
    assert "always-valid test of pairs at the least favourable price" in adjusted.text


# published runs ---------------------------------------------------------------------------------------------


@published
@pytest.mark.parametrize("name", sorted(p.name for p in PUBLISHED.glob("20*")) if PUBLISHED.is_dir() else [])
def test_published_folders_never_end_in_a_traceback(name, capsys):
    folder = str(PUBLISHED / name)
    assert cr.main([folder]) in (0, 2)
    for by in cr.BY:
        assert cr.main([folder, "--by", by, "--claim", "ml"]) in (0, 1, 2, 4)
    assert "nan" not in capsys.readouterr().out.split("Findings")[-1]
