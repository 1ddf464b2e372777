"""benchmarks/timeline.py: the simulated step is what can be worked out by hand, and has what was measured."""

import itertools
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import load_program

import train_gpt as tg

COMMAND = Path(__file__).resolve().parents[1] / "benchmarks" / "timeline.py"


bench = load_program(COMMAND)
GB = 10**9


def job(gigabytes: float, ms: float, is_sharded: bool = True) -> bench.Job:
    return bench.Job(int(gigabytes * GB), is_sharded, ms)


@pytest.fixture(autouse=True)
def no_latency(monkeypatch):
    monkeypatch.setattr(bench, "LATENCY_MS", 0.0)


@pytest.fixture(scope="module")
def kinds() -> list[dict]:
    model = bench.sprint_model()
    return [bench.jobs_of(model, is_adam, is_tied=False) for is_adam in (False, True)]


def test_one_gpu_sends_nothing():
    jobs = {"a": job(1, 3.0), "b": job(2, 4.0, is_sharded=False)}
    machine = bench.Machine(world=1, bandwidth=100, fixed_ms=0.5, scale=2.0)
    assert bench.simulate(jobs, "ab", "ba", machine) == pytest.approx(2 * 7 + 0.5)


def test_two_gpus_by_hand():
    """Half a gigabyte at 100 GB/s takes 5 ms. The second gradient comes while the first is worked on."""
    jobs = {"a": job(1, 4.0), "b": job(1, 20.0)}
    machine = bench.Machine(world=2, bandwidth=100, fixed_ms=0.0, scale=1.0)
    # a: sent 0-5, worked on 5-7; b: sent 5-10, worked on 10-20; a's rows back 10-15, b's 20-25
    assert bench.simulate(jobs, "ab", "ab", machine) == pytest.approx(25)
    # b first: sent 0-5, worked on 5-15; a: sent 5-10, worked on 15-17; b's rows back 15-20, a's 20-25
    assert bench.simulate(jobs, "ba", "ba", machine) == pytest.approx(25)
    # a sent first but worked on last: b's work waits for both, 10-20; a 20-22; back 20-25, 25-30
    assert bench.simulate(jobs, "ab", "ba", machine) == pytest.approx(30)


def test_an_all_reduce_moves_twice_and_nothing_comes_back():
    machine = bench.Machine(world=2, bandwidth=100, fixed_ms=0.0, scale=1.0)
    jobs = {"a": job(1, 4.0, is_sharded=False)}
    assert bench.simulate(jobs, "a", "a", machine) == pytest.approx(10 + 4)


def test_what_comes_before_sending_delays_it():
    machine = bench.Machine(world=2, bandwidth=100, fixed_ms=0.0, scale=1.0)
    late = {"a": bench.Job(GB, True, 4.0, before_ms=3.0)}
    assert bench.simulate(late, "a", "a", machine) == pytest.approx(3 + 5 + 2 + 5)


def test_the_fit_has_what_was_measured(kinds):
    fixed, scale, bandwidth = bench.fitted(kinds)
    for world, ms in bench.OPTIMIZER_MS.items():
        pieces = sum(j.update_ms for jobs in kinds for j in jobs.values()) / 2
        assert fixed + scale * pieces / world == pytest.approx(ms, rel=0.05)
    assert 0.5 < scale < 2  # the pieces are about the whole
    for world, ms in bench.COLLECTIVES_MS.items():
        wire = sum(2 * j.wire_ms(world, bandwidth) for jobs in kinds for j in jobs.values() if j.is_sharded)
        assert wire / 2 == pytest.approx(ms, rel=0.1)


def test_jobs_are_the_trainers(kinds):
    even, odd = kinds
    assert list(even) == [row.name for row in tg.PARAMS if row.optim == "normuon"]
    assert list(odd) == [row.name for row in tg.PARAMS]
    tied = bench.jobs_of(bench.sprint_model(), is_adam_step=True, is_tied=True)
    assert set(odd) - set(tied) == {"embed"}
    assert tied["lm_head"].before_ms > odd["lm_head"].before_ms == 0
    sent, worked = bench.orders_of(odd)
    assert sent == [row.name for row in tg.PARAMS]
    assert worked == [row.name for row in tg.WORK_ORDER]


def test_no_order_beats_the_trainers_by_the_model(kinds):
    """The reason for the order in PARAMS: whoever changes it sees here what it costs on eight GPUs."""
    fixed, scale, _ = bench.fitted(kinds)
    orders = [bench.all_orders(jobs) for jobs in kinds]
    assert [len(each) for each in orders] == [2**2, 840**2]  # 7 large ones, 3 of them alike: 7! / 3!
    for bandwidth, (jobs, each) in itertools.product((80, 350), zip(kinds, orders, strict=True)):
        assert sorted(each[-1][0]) == sorted(each[-1][1]) == sorted(jobs)
        machine = bench.Machine(8, bandwidth, fixed, scale)
        now = bench.simulate(jobs, *bench.orders_of(jobs), machine)
        found = [bench.simulate(jobs, *order, machine) for order in each[:: 1 + len(each) // 5000]]
        assert max(found) > now + 0.2
        assert min(found) >= now - 0.005


def test_more_bandwidth_is_never_slower(kinds):
    fixed, scale, _ = bench.fitted(kinds)
    steps = [bench.mean_step(kinds, bench.Machine(8, rate, fixed, scale)) for rate in (50, 100, 200, 400)]
    assert steps == sorted(steps, reverse=True)


def test_command():
    done = subprocess.run([sys.executable, COMMAND], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    rows = [line for line in done.stdout.splitlines() if line.startswith("| ")][1:]
    assert [row.split()[1] for row in rows[1:]] == ["1", "2", "4", "8"]
    one = [float(cell) for cell in rows[1].split("|")[2:5]]
    assert one == pytest.approx(bench.STEP_MS[1], abs=0.051)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--bandwidth", "0"), "must be from 1 to 10,000"),
        (("--bandwidth", "nan"), "must be from 1 to 10,000"),
        (("--orders", "1"), "must be from 2 to 1,024"),
        (("--orders", "x"), "invalid int value"),
    ],
)
def test_bad_input_is_refused(options, said):
    with pytest.raises(tg.InputError, match=said):
        bench.main(options)


def test_bad_input_is_one_line():
    done = subprocess.run(
        [sys.executable, COMMAND, "--orders", "1"], capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "timeline.py: error: --orders 1: must be from 2 to 1,024 GPUs; change it\n"


# collectives.py, which measures the bandwidth that the timeline asks for

COLLECTIVES = COMMAND.with_name("collectives.py")


def test_collectives_are_timed_by_two_ranks():
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    words = [str(COLLECTIVES), "--recipe", "tiny", "--repeats", "2"]
    done = subprocess.run([*command, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    head, *table = done.stdout.splitlines()
    assert head.startswith("2 ranks, n=2 repeats; ")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table[2:]]
    assert ["mlp_bank", "4.194", "reduce-scatter"] in [row[:3] for row in rows]
    assert ["mlp_bank", "4.194", "all-gather"] in [row[:3] for row in rows]
    assert len({(row[1], row[2]) for row in rows if float(row[1]) > 1}) == 6  # one row for each size
    for _, megabytes, what, ms, rate in rows:
        moved = float(megabytes) / 2 * (2 if what == "all-reduce" else 1)
        assert float(ms) > 0
        assert float(rate) == pytest.approx(moved / float(ms), abs=0.06, rel=0.05)  # both are rounded


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ([], "torchrun"),
        (["--recipe", "huge"], "huge"),
        (["--repeats", "0"], "--repeats 0"),
        (["--repeats", "x"], "'x'"),
    ],
)
def test_collectives_refuse_in_one_line(monkeypatch, words, named):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(tg.InputError, match=re.escape(named)):
        load_program(COLLECTIVES).main(words)
