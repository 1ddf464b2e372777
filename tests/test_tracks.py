"""recordbook/tracks.py: the project's tracks load, and every wrong file is refused by key."""

import dataclasses
from pathlib import Path

import pytest

from compare_runs import InputError
from recordbook import tracks as tr

ROOT = Path(__file__).resolve().parents[1]
SOUND = {
    "name": '"toy"', "title": '"A toy"', "metric": '"val_bpb"', "direction": '"lower"', "target": "1",
    "alpha": "0.01", "margin": "0.002", "min_runs": "3", "claims": '["ml"]', "recipe": '"r"',
    "time_test": '"student"', "hardware.gpus": "1", "hardware.name": '"NVIDIA H200"',
}  # fmt: skip
DATA = '"sha256=' + "a1" * 32 + '"'


def toml(drop: str = "", **changes: str) -> str:
    """A track's file; `__` in a name stands for a dot, which TOML reads as a table."""
    rows = SOUND | {key.replace("__", "."): value for key, value in changes.items()}
    return "".join(f"{key} = {value}\n" for key, value in rows.items() if key != drop)


def refusal(text: str) -> str:
    with pytest.raises(InputError) as caught:
        tr.track_of(text, "x/track.toml")
    message = str(caught.value)
    assert message.startswith("x/track.toml: ")
    assert message.isprintable()
    return message


def test_the_projects_tracks():
    assert tr.track_names() == ["golf", "short", "sprint", "tiny"]
    golf, short, sprint, tiny = map(tr.find_track, tr.track_names())
    assert (golf.metric, golf.claims, golf.gain, golf.gain_unit) == (
        "val_bpb",
        ("score",),
        0.005,
        "nats/token",
    )
    assert (short.target, short.gpus, short.alpha, short.metric) == (3.28, 8, 0.01, "val_loss")
    assert (sprint.target, sprint.gpus, sprint.data) == (3.322, 1, None)
    assert (tiny.target, tiny.gpus, tiny.hardware) == (4.15, 0, "cpu")
    assert {track.claims for track in (short, sprint, tiny)} == {("systems", "ml")}


def test_targets_and_recipes_are_the_trainers():
    import train_gpt

    for name in ("short", "sprint", "tiny"):
        track = tr.find_track(name)
        assert train_gpt.RECIPES[track.recipe].target == track.target


def test_a_sound_track():
    track = tr.track_of(toml(data=DATA, seconds_per_loss="390", seconds_per_loss_sd="30", notes='"a\\nb"'))
    assert track == tr.Track(
        name="toy", title="A toy", metric="val_bpb", direction="lower", target=1.0, alpha=0.01, margin=0.002,
        min_runs=3, claims=("ml",), recipe="r", gpus=1, hardware="NVIDIA H200", time_test="student",
        data=DATA.strip('"'), seconds_per_loss=390.0, seconds_per_loss_sd=30.0, notes="a\nb",
    )  # fmt: skip
    assert isinstance(track.target, float)
    with pytest.raises(dataclasses.FrozenInstanceError):
        track.target = 2.0
    assert tr.track_of(toml()).data is None
    assert tr.track_of(toml()).loss_test == "welch"
    assert tr.track_of(toml(loss_test='"paired"')).loss_test == "paired"


@pytest.mark.parametrize("key", SOUND)
def test_each_key_is_needed(key):
    message = refusal(toml(drop=key))
    assert "missing key" in message
    assert key in message


def test_unknown_keys():
    assert "unknown key aplha;" in refusal(toml(aplha="0.01"))
    assert "unknown key hardware.uuid;" in refusal(toml(hardware__uuid="1"))
    assert "unknown key \\x1b;" in refusal(toml() + '"\\u001b" = 1\n')


WRONG = {
    "name": ['"Toy"', '""', '"../x"', "1", '"' + "a" * 41 + '"'],
    "title": ['" "', '"a\\nb"', "1"],
    "metric": ['"val loss"', '"Loss"', "true"],
    "direction": ['"down"', "1", "[]"],
    "target": ["nan", "inf", '"3.28"', "true", "[1]"],
    "alpha": ["0", "0.5", "-1", "nan", "1"],
    "margin": ["0", "-0.1", "inf"],
    "min_runs": ["1", "2.5", "true", '"4"'],
    "claims": ["[]", '"ml"', '["ml", "ml"]', '["faster"]', "[1]", "[[]]"],
    "recipe": ['""', "1"],
    "time_test": ['"welch"', "1"],
    "loss_test": ['"welch-less"', "1"],
    "data": ['"abc"', '"sha256=XY"', '""'],
    "seconds_per_loss": ["0", "-1", "nan"],
    "seconds_per_loss_sd": ["-1", '"1"'],
    "gain": ["0", "-0.005", "nan", "true"],
    "gain_unit": ['"nats"', "1", "[]"],
    "bytes_per_token": ["0", "inf"],
    "notes": ["1"],
    "hardware.gpus": ["-1", "1.0", "true"],
    "hardware.name": ['"("', '""', "8"],
}


@pytest.mark.parametrize(
    ("key", "value"), [(key, value) for key, values in WRONG.items() for value in values]
)
def test_wrong_values(key, value):
    message = refusal(toml(**{key.replace(".", "__"): value}))
    assert f": {key} = " in message
    assert "must be " in message


def test_keys_that_belong_together():
    assert "belong together" in refusal(toml(hardware__name='"cpu"'))
    assert "belong together" in refusal(toml(hardware__gpus="0"))
    assert "seconds_per_loss_sd without" in refusal(toml(seconds_per_loss_sd="1"))
    flat = toml(drop="hardware.gpus").replace('hardware.name = "NVIDIA H200"', "hardware = 8")
    assert "[hardware]" in refusal(flat)


def test_a_gain_has_a_unit():
    """0.005 nats is two numbers: both, for the contest's vocabulary of 8,192, as the track's file says."""
    score = {"claims": '["score"]', "gain": "0.005"}
    token = tr.track_of(toml(**score, gain_unit='"nats/token"', bytes_per_token="3.727"))
    byte = tr.track_of(toml(**score, gain_unit='"nats/byte"'))
    bits = tr.track_of(toml(**score, gain_unit='"bits/byte"'))
    assert token.least_gain == pytest.approx(0.00194, abs=5e-6)
    assert byte.least_gain == pytest.approx(0.00721, abs=5e-6)
    assert bits.least_gain == 0.005
    golf = tr.find_track("golf")
    assert golf.least_gain == token.least_gain
    text = (ROOT / "records" / "golf" / tr.FILE).read_text()
    assert f"= {token.least_gain:.5f} bits/byte" in text
    assert f"= {byte.least_gain:.5f} bits/byte" in text
    assert f"{0.005 * golf.bytes_per_token:.4f} nats a token" in text
    assert "add gain_unit" in refusal(toml(**score))
    assert "add bytes_per_token" in refusal(toml(**score, gain_unit='"nats/token"'))
    assert "add gain" in refusal(toml(claims='["ml", "score"]'))
    assert "make it 'val_bpb'" in refusal(toml(**score, gain_unit='"bits/byte"', metric='"val_loss"'))


def test_files_that_are_no_track(tmp_path):
    assert "not TOML" in refusal("name = \n")
    assert "not TOML" in refusal("a = 1\na = 2\n")
    folder = tmp_path / "toy"
    folder.mkdir()
    for data, why in ((b"\xff", "not UTF-8"), (None, "cannot be read")):
        if data is not None:
            (folder / tr.FILE).write_bytes(data)
        else:
            (folder / tr.FILE).unlink()
        with pytest.raises(InputError, match=why):
            tr.load_track(folder / tr.FILE)


def test_a_new_track_is_one_file(tmp_path):
    with pytest.raises(InputError, match=r"does not exist.*add track\.toml"):
        tr.find_track("toy", tmp_path)
    for name in ("toy", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / tr.FILE).write_text(toml())
    assert tr.find_track("toy", tmp_path).title == "A toy"
    with pytest.raises(InputError, match="named as its folder"):
        tr.find_track("other", tmp_path)
    with pytest.raises(InputError, match="choose one of other, toy"):
        tr.find_track("../toy", tmp_path)


def test_reaches():
    lower, higher = tr.track_of(toml()), tr.track_of(toml(direction='"higher"'))
    assert [lower.reaches(x) for x in (0.9, 1.0, 1.1)] == [True, True, False]
    assert [higher.reaches(x) for x in (0.9, 1.0, 1.1)] == [False, True, True]
    assert not lower.reaches(float("nan"))


def test_hardware():
    short, sprint, tiny = map(tr.find_track, ("short", "sprint", "tiny"))
    h100, h200, cpu = "NVIDIA H100 80GB HBM3", "NVIDIA H200", "CPU x86_64, 2 cores"
    assert short.unfit_hardware([h100] * 8, 8) == "" == short.unfit_hardware([h200] * 8, 8)
    assert "ran on 4 GPU(s)" in short.unfit_hardware([h100] * 8, 4)
    assert "NVIDIA H100 PCIe" in short.unfit_hardware([h100, "NVIDIA H100 PCIe"], 8)
    assert "names no GPU" in short.unfit_hardware([], 8)
    assert (
        sprint.unfit_hardware([h200], 1) == "" == tiny.unfit_hardware([cpu], 1) == tiny.unfit_hardware([], 2)
    )
    assert "is for a CPU" in tiny.unfit_hardware([h200], 1)
    assert "names no GPU" in sprint.unfit_hardware([cpu], 1)


def test_every_key_is_explained():
    text = (ROOT / "records" / "README.md").read_text()
    assert all(f"`{key}`" in text for key in tr.TABLE)
