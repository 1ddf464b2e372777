"""The schedule against literal rows: one per boundary and one inside a stage; packing."""

import dataclasses
import itertools
import math

import pytest

import train_gpt as tg

SHORT, SPRINT, TINY = (tg.RECIPES[name] for name in ("short", "sprint", "tiny"))
K = 1024

# fmt: off
GOLDEN_SHORT = (
    # step  stage  batch    short long   weights of the next tokens   lr        momentum  Adam step
    (0,     0,     128 * K, 128,  384,   (1, 0.5,      0.25),         1.0,      0.85,     False),
    (1,     0,     128 * K, 128,  384,   (1, 0.5,      0.249565),     1.0,      0.850333, True),
    (299,   0,     128 * K, 128,  384,   (1, 0.5,      0.12),         1.0,      0.949667, True),
    (300,   0,     128 * K, 128,  384,   (1, 0.5,      0.119565),     1.0,      0.95,     False),
    (574,   0,     128 * K, 128,  384,   (1, 0.5,      0.000435),     1.0,      0.95,     False),
    (575,   1,     256 * K, 384,  896,   (1, 0.5,      0),            1.0,      0.95,     True),
    (576,   1,     256 * K, 384,  896,   (1, 0.499130, 0),            1.52,     0.95,     False),
    (862,   1,     256 * K, 384,  896,   (1, 0.250435, 0),            1.52,     0.95,     False),
    (863,   1,     256 * K, 384,  896,   (1, 0.249565, 0),            1.519177, 0.95,     True),
    (1149,  1,     256 * K, 384,  896,   (1, 0.000870, 0),            1.048313, 0.95,     True),
    (1150,  2,     384 * K, 640,  1408,  (1, 0,        0),            1.046667, 0.95,     False),
    (1151,  2,     384 * K, 640,  1408,  (1, 0,        0),            1.184777, 0.95,     True),
    (1152,  2,     384 * K, 640,  1408,  (1, 0,        0),            1.182887, 0.95,     False),
    (1715,  2,     384 * K, 640,  1408,  (1, 0,        0),            0.118899, 0.95,     True),
    (1716,  2,     384 * K, 640,  1408,  (1, 0,        0),            0.117009, 0.948,    False),
    (1724,  2,     384 * K, 640,  1408,  (1, 0,        0),            0.101890, 0.932,    False),
    (1725,  3,     384 * K, 768,  1664,  (1, 0,        0),            0.1,      0.93,     True),
    (1764,  3,     384 * K, 768,  1664,  (1, 0,        0),            0.1,      0.852,    False),
    (1765,  3,     384 * K, 768,  2560,  (1, 0,        0),            0.1,      0.85,     True),  # validation
)
GOLDEN_SPRINT = (
    (0,     0,     128 * K, 128,  384,   (1, 0.5,      0.25),         1.0,      0.85,     False),
    (59,    0,     128 * K, 128,  384,   (1, 0.5,      0.121739),     1.0,      0.948333, True),
    (60,    0,     128 * K, 128,  384,   (1, 0.5,      0.119565),     1.0,      0.95,     False),
    (114,   0,     128 * K, 128,  384,   (1, 0.5,      0.002174),     1.0,      0.95,     False),
    (115,   1,     256 * K, 384,  896,   (1, 0.5,      0),            1.0,      0.95,     True),
    (116,   1,     256 * K, 384,  896,   (1, 0.495652, 0),            1.52,     0.95,     False),
    (229,   1,     256 * K, 384,  896,   (1, 0.004348, 0),            1.054899, 0.95,     True),
    (230,   2,     384 * K, 640,  1408,  (1, 0,        0),            1.046667, 0.95,     False),
    (231,   2,     384 * K, 640,  1408,  (1, 0,        0),            1.177217, 0.95,     True),
    (343,   2,     384 * K, 640,  1408,  (1, 0,        0),            0.118899, 0.95,     True),
    (344,   2,     384 * K, 640,  1408,  (1, 0,        0),            0.109449, 0.94,     False),
    (345,   3,     384 * K, 768,  1664,  (1, 0,        0),            0.1,      0.93,     True),
    (352,   3,     384 * K, 768,  1664,  (1, 0,        0),            0.1,      0.86,     False),
    (353,   3,     384 * K, 768,  2560,  (1, 0,        0),            0.1,      0.85,     True),  # validation
)
# fmt: on
ROWS = [(SHORT, row) for row in GOLDEN_SHORT] + [(SPRINT, row) for row in GOLDEN_SPRINT]


@pytest.mark.parametrize(("recipe", "row"), ROWS, ids=lambda x: getattr(x, "name", None) or str(x[0]))
def test_golden_rows(recipe, row):
    step, stage, batch_tokens, short, long, mtp, lr, momentum, is_adam_step = row
    sched = tg.at(recipe, step)
    assert (sched.step, sched.stage, sched.windows) == (step, stage, (short, long))
    assert recipe.stages[sched.stage].batch_tokens == batch_tokens
    assert sched.mtp == pytest.approx(mtp, abs=1e-6)
    assert sched.lr == pytest.approx(lr, abs=1e-6)
    assert sched.momentum == pytest.approx(momentum, abs=1e-6)
    assert sched.is_adam_step is is_adam_step


def test_every_step_of_short_follows_the_published_formulas():
    """Written with the fraction x of the 1725 scheduled steps, as record 61 states them."""
    for step in range(1765):
        sched, x = tg.at(SHORT, step), step / 1725
        base = 1.73 if x > 2 / 3 else 1.52 if x > 1 / 3 else 1.0
        w = max(2 * (1 - x), 0)
        lr = base * w + 0.1 * (1 - w) if x >= 0.5 else base
        if step < 575:
            mtp = (1, 0.5, 0.25 * (1 - 3 * x))
        else:
            mtp = (1, 0.5 * (2 - 3 * x) if step < 1150 else 0, 0)
        momentum = 0.85 + 0.1 * min(step / 300, 1) - 0.1 * max(step - 1715, 0) / 50
        got = (sched.lr, sched.momentum, *sched.mtp)
        assert got == pytest.approx((lr, momentum, *mtp), abs=1e-12), f"step {step}"


@pytest.mark.parametrize(
    ("recipe", "total", "scheduled", "split", "tokens"),
    [(SHORT, 1765, 1725, 1151, 467_927_040), (SPRINT, 353, 345, 231, 93_585_408)],
    ids=["short", "sprint"],
)
def test_totals(recipe, total, scheduled, split, tokens):
    assert (recipe.total_steps, recipe.scheduled_steps, recipe.split_step) == (total, scheduled, split)
    assert recipe.train_tokens == tokens
    assert sum(tg.at(recipe, step).is_adam_step for step in range(total)) == total // 2


@pytest.mark.parametrize("recipe", [TINY, SPRINT, SHORT], ids=lambda r: r.name)
def test_split_step_is_the_first_odd_one_after_two_thirds(recipe):
    assert recipe.split_step % 2 == 1, (
        "only an odd step updates the head, whose moments the embedding takes over"
    )
    assert 0 <= recipe.split_step - recipe.scheduled_steps * 2 / 3 < 2


def test_window_bound_covers_the_final_validation():
    assert (TINY.max_window, SPRINT.max_window, SHORT.max_window) == (384, 2560, 2560)


def test_momentum_is_linear_between_its_points_and_constant_outside():
    recipe = dataclasses.replace(SPRINT, momentum=((10, 0.5), (20, 0.9), (30, 0.9), (40, 0.1)))
    found = [tg.at(recipe, step).momentum for step in (0, 10, 15, 20, 25, 30, 35, 40, 99)]
    assert found == pytest.approx([0.5, 0.5, 0.7, 0.9, 0.9, 0.9, 0.5, 0.1, 0.1])


def yarn_by_hand(windows: list[int], count: int) -> tuple[list[float], float]:
    """Frequencies and attention scale in Python floats; windows in blocks of 128 tokens."""
    freqs, scale = [(1 / 1024) ** (j / (count - 1)) for j in range(count)], 0.1
    for o, n in itertools.pairwise(windows):
        for j, f in enumerate(freqs):
            w = min(max((128 * o * f / (2 * math.pi) - 1) / 31, 0), 1)
            freqs[j] = f * (o / n + w * (1 - o / n))
        scale *= 1 + 0.2 * math.log(n / o)
    return freqs, scale


@pytest.mark.parametrize("recipe", [SPRINT, SHORT], ids=lambda r: r.name)
@pytest.mark.parametrize(("stage", "scale"), list(enumerate((0.1, 0.116946, 0.127518, 0.131778))))
def test_yarn(recipe, stage, scale):
    freqs, got = tg.yarn(recipe, stage)
    wanted, exact = yarn_by_hand([3, 7, 11, 13][: stage + 1], 32)
    assert got == pytest.approx(scale, abs=5e-7)
    assert got == pytest.approx(exact, rel=1e-12)
    assert freqs.tolist() == pytest.approx(wanted, rel=1e-5)


def test_yarn_slows_only_what_turns_slowly():
    first, last = (tg.yarn(SHORT, stage)[0] for stage in (0, 3))
    assert first[0] == last[0] == 1, "the fastest pair turns 61 times in the first window: it stays"
    assert float(first[-1] / last[-1]) == pytest.approx(13 / 3, rel=1e-5)
    assert (last[:-1] > last[1:]).all()


def test_final_validation_keeps_the_last_stages_rotary():
    assert tg.at(SHORT, 1764).stage == tg.at(SHORT, 1765).stage == 3


@pytest.mark.parametrize(
    ("recipe", "world", "slots"),
    [
        *((SHORT, 1, 8), (SHORT, 2, 8), (SHORT, 4, 8), (SHORT, 8, 8), (SHORT, 16, 16), (SHORT, 64, 64)),
        *((SPRINT, 8, 8), (TINY, 1, 12), (TINY, 3, 12), (TINY, 8, 24), (TINY, 9, 36)),
    ],
    ids=lambda x: getattr(x, "name", x),
)
def test_packing(recipe, world, slots):
    assert tg.packing(recipe, world) == slots
    for stage in recipe.stages:
        assert stage.batch_tokens % (16 * slots) == 0


@pytest.mark.parametrize(
    ("recipe", "world", "good"),
    [
        (SHORT, 3, [1, 2, 4, 8, 16, 32, 64, 128]),
        (SHORT, 6, [1, 2, 4, 8, 16, 32, 64, 128]),
        (TINY, 5, [1, 2, 3, 4, 6, 8, 9, 12, 16, 18, 24, 36, 48, 72]),
    ],
    ids=lambda x: getattr(x, "name", None),
)
def test_packing_refuses_and_names_what_works(recipe, world, good):
    with pytest.raises(tg.InputError) as caught:
        tg.packing(recipe, world)
    message = str(caught.value)
    assert f"world size {world} " in message
    assert recipe.name in message
    listed = [int(world) for world in message.split("use one of [")[1].removesuffix("]").split(",")]
    assert [world for world in listed if world <= 128] == good


@pytest.mark.parametrize(
    ("slots", "slot_tokens", "micro_tokens", "expected"),
    [
        (8, 16384, 65536, 4),  # one process, stage 1
        (8, 32768, 65536, 2),
        (8, 49152, 65536, 1),
        (1, 49152, 65536, 1),  # eight ranks
        (4, 16384, 65536, 4),
        (1, 262144, 65536, 1),  # more than fits: still one
        (8, 20000, 65536, 2),  # three would fit and do not divide
        (12, 576, 8192, 12),
        (12, 576, 6911, 6),
    ],
)
def test_slots_per_pass(slots, slot_tokens, micro_tokens, expected):
    assert tg.slots_per_pass(slots, slot_tokens, micro_tokens) == expected


def test_a_schedule_is_read_from_its_recipe_alone():
    """Other stages, other numbers: nothing of `short` is left in the functions."""
    stages = (
        tg.Stage(3, 64, 4, 8, 1.0, ((1, 0.5),)),
        tg.Stage(3, 128, 8, 16, 2.0),
        tg.Stage(2, 128, 8, 32, 2.0),
    )
    recipe = dataclasses.replace(TINY, stages=stages, momentum=((0, 0.5),), cooldown=0.5, lr_floor=0.2)
    rows = [tg.at(recipe, step) for step in range(9)]
    assert [row.stage for row in rows] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert [row.lr for row in rows] == pytest.approx([1, 1, 1, 1, 1.4, 0.8, 0.2, 0.2, 0.2])
    assert [row.mtp[0] for row in rows[:4]] == pytest.approx([1, 5 / 6, 2 / 3, 1])
    assert {row.momentum for row in rows} == {0.5}
    assert rows[8].windows == TINY.val_windows
    assert rows[7].windows == (8, 32)
    assert (recipe.total_steps, recipe.split_step) == (8, 5)
