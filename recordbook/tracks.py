"""Tracks: the rules by which a record is accepted, one `records/<track>/track.toml` each.

A file is read into a frozen `Track`, or refused in one line that names the file, the key, the rule and the
remedy. What each key means stands in TABLE below and, with reasons, in the files themselves.
"""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compare_runs import InputError, printable, some

RECORDS = Path(__file__).resolve().parent.parent / "records"
FILE = "track.toml"
CPU = "cpu"
CLAIMS = ("systems", "ml", "score")
DIRECTIONS = ("lower", "higher")
# A gain in one of these units, as bits a byte: `b` bytes a token.
GAIN_UNITS = {
    "nats/token": lambda gain, b: gain / math.log(2) / b,
    "nats/byte": lambda gain, b: gain / math.log(2),
    "bits/byte": lambda gain, b: gain,
}
TIME_TESTS = ("welch-less", "welch-two-sided", "student", "paired")
LOSS_TESTS = ("welch", "paired")


@dataclass(frozen=True, slots=True, kw_only=True)
class Track:
    """The rules of one track."""

    name: str
    title: str
    metric: str  # the key in a log's step lines that the target is about
    direction: str  # of the metric: which side of the target is good
    target: float
    alpha: float  # of every test in the verdict
    margin: float  # of non-inferiority, in units of the metric
    min_runs: int  # complete runs of each arm
    claims: tuple[str, ...]  # accepted kinds of claim
    recipe: str  # that the logs name
    gpus: int  # 0 on a CPU
    hardware: str  # CPU, or a regular expression for the whole name of each GPU
    time_test: str
    loss_test: str = "welch"  # of a systems claim's non-inferiority
    data: str | None = None  # 'sha256=...' as our logs print it; None: equal in all arms, whatever it is
    seconds_per_loss: float | None = None  # k: seconds that one unit of the metric is worth
    seconds_per_loss_sd: float | None = None  # its standard error
    gain: float | None = None  # by which a score claim must be better, at equal budget
    gain_unit: str | None = None  # one of GAIN_UNITS
    bytes_per_token: float | None = None  # of the track's vocabulary on its validation text
    notes: str = ""

    @property
    def least_gain(self) -> float:
        """`gain` in bits a byte, the unit of val_bpb."""
        return GAIN_UNITS[self.gain_unit](self.gain, self.bytes_per_token)

    @property
    def is_score(self) -> bool:
        """Whether the budget is fixed and the metric alone decides."""
        return self.claims == ("score",)

    def reaches(self, value: float) -> bool:
        """Whether a value of the metric is on the good side of the target, the target itself included."""
        return value <= self.target if self.direction == "lower" else value >= self.target

    def unfit_hardware(self, names: Sequence[str], count: int | None) -> str:
        """Why a run on `count` devices of these names is not on the track's hardware; '' if it is.

        A CPU has no name, or one that begins with 'CPU', as compare_runs.py has it from our logs.
        """
        gpus = [name for name in names if not name.startswith("CPU")]
        if self.hardware == CPU:
            return f"ran on {some(sorted(set(gpus)))}, track {self.name} is for a CPU" if gpus else ""
        if not gpus:
            return f"names no GPU, track {self.name} is for {self.gpus}"
        if wrong := sorted({name for name in gpus if not re.fullmatch(self.hardware, name)}):
            return f"ran on {some(wrong)}, track {self.name} is for GPUs named {self.hardware}"
        if count != self.gpus:
            return f"ran on {count} GPU(s), track {self.name} is for {self.gpus}"
        return ""


# 1. the keys ------------------------------------------------------------------------------------------------


def is_number(value: Any) -> bool:
    """A finite integer or float; TOML also knows inf, nan and booleans."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def is_whole(value: Any, least: int) -> bool:
    """An integer of at least `least`."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def is_line(value: Any) -> bool:
    """A text that fits a line of a table."""
    return isinstance(value, str) and bool(value.strip()) and value.isprintable()


def is_match(pattern: str) -> Callable[[Any], bool]:
    """A check that a value is a text of this form."""
    return lambda value: isinstance(value, str) and re.fullmatch(pattern, value) is not None


def is_pattern(value: Any) -> bool:
    """A text that compiles as a regular expression."""
    if not is_line(value):
        return False
    try:
        re.compile(value)
    except (re.error, RecursionError, OverflowError):
        return False
    return True


def is_choices(value: Any) -> bool:
    """A list of different claims, at least one."""
    known = isinstance(value, list) and all(item in CLAIMS for item in value)
    return known and 0 < len(value) == len(set(value))


# key: (required, check, what it must be). Keys of [hardware] are written with a dot.
TABLE: dict[str, tuple[bool, Callable[[Any], bool], str]] = {
    "name": (True, is_match(r"[a-z][a-z0-9_-]{0,39}"), "up to 40 small letters, digits, '-' or '_'"),
    "title": (True, is_line, "one line of text"),
    "metric": (
        True,
        is_match(r"[a-z][a-z0-9_]*"),
        "a key of the step lines, such as 'val_loss' or 'val_bpb'",
    ),
    "direction": (True, lambda value: value in DIRECTIONS, f"one of {', '.join(DIRECTIONS)}"),
    "target": (True, is_number, "a finite number"),
    "alpha": (True, lambda value: is_number(value) and 0 < value < 0.5, "a number above 0 and below 0.5"),
    "margin": (True, lambda value: is_number(value) and value > 0, "a positive number"),
    "min_runs": (True, lambda value: is_whole(value, 2), "a whole number from 2"),
    "claims": (True, is_choices, f"a list of {', '.join(CLAIMS)}, or of some of them"),
    "recipe": (True, is_line, "the recipe that the logs name"),
    "time_test": (True, lambda value: value in TIME_TESTS, f"one of {', '.join(TIME_TESTS)}"),
    "loss_test": (False, lambda value: value in LOSS_TESTS, f"one of {', '.join(LOSS_TESTS)}"),
    "hardware.gpus": (True, lambda value: is_whole(value, 0), "a whole number, 0 for a CPU"),
    "hardware.name": (True, is_pattern, f"'{CPU}' or a regular expression for the GPUs' names"),
    "data": (
        False,
        is_match(r"sha256=[0-9a-f]{64}"),
        "'sha256=' and 64 hexadecimal digits, as logs print it",
    ),
    "seconds_per_loss": (False, lambda value: is_number(value) and value > 0, "a positive number"),
    "seconds_per_loss_sd": (False, lambda value: is_number(value) and value >= 0, "a number from 0"),
    "gain": (False, lambda value: is_number(value) and value > 0, "a positive number"),
    "gain_unit": (False, lambda value: value in list(GAIN_UNITS), f"one of {', '.join(GAIN_UNITS)}"),
    "bytes_per_token": (False, lambda value: is_number(value) and value > 0, "a positive number"),
    "notes": (False, lambda value: isinstance(value, str), "a text"),
}
FLOATS = (
    "target", "alpha", "margin", "seconds_per_loss", "seconds_per_loss_sd", "gain", "bytes_per_token",
)  # fmt: skip
RENAMED = {"hardware.gpus": "gpus", "hardware.name": "hardware"}


# 2. loading -------------------------------------------------------------------------------------------------


def track_of(text: str, file: str = FILE) -> Track:
    """The track that a file's text describes. `file` is the name that errors use."""
    try:
        raw = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise InputError(f"{file}: not TOML ({printable(str(error))}); correct that place") from None
    if not isinstance(raw.get("hardware", {}), dict):
        raise InputError(f"{file}: 'hardware' is a table with the keys gpus and name; write [hardware]")
    flat = {key: value for key, value in raw.items() if key != "hardware"}
    flat |= {f"hardware.{key}": value for key, value in raw.get("hardware", {}).items()}
    if unknown := sorted(flat.keys() - TABLE.keys()):
        known = ", ".join(TABLE)
        named = some([printable(key) for key in unknown])
        raise InputError(f"{file}: unknown key {named}; a track knows {known}: remove or correct it")
    if missing := [key for key, (required, *_) in TABLE.items() if required and key not in flat]:
        rules = "; ".join(f"{key} is {TABLE[key][2]}" for key in missing)
        raise InputError(f"{file}: missing key {', '.join(missing)}; add it ({rules})")
    for key, value in flat.items():
        _, check, rule = TABLE[key]
        if not check(value):
            raise InputError(f"{file}: {key} = {printable(repr(value))[:80]}: must be {rule}; correct it")
    if (flat["hardware.gpus"] == 0) != (flat["hardware.name"] == CPU):
        pair = f"hardware.gpus = {flat['hardware.gpus']} with hardware.name = {flat['hardware.name']!r}"
        raise InputError(
            f"{file}: {printable(pair)}: 0 GPUs and '{CPU}' belong together; correct one of them"
        )
    if "seconds_per_loss_sd" in flat and "seconds_per_loss" not in flat:
        raise InputError(f"{file}: seconds_per_loss_sd without seconds_per_loss; add that or remove this")
    check_gain(flat, file)
    values = {RENAMED.get(key, key): value for key, value in flat.items()}
    for key in FLOATS:
        if key in values:
            values[key] = float(values[key])
    return Track(**values | {"claims": tuple(values["claims"])})


def check_gain(flat: dict[str, Any], file: str) -> None:
    """A score claim needs a gain with its unit, of a metric in bits a byte. 0.005 alone means nothing."""
    if "score" not in flat["claims"]:
        return
    needed = ["gain", "gain_unit"] + ["bytes_per_token"] * (flat.get("gain_unit") == "nats/token")
    if missing := [key for key in needed if key not in flat]:
        raise InputError(f"{file}: claim score needs {', '.join(needed)}; add {', '.join(missing)}")
    if flat["metric"] != "val_bpb":
        metric = f"metric = {flat['metric']!r}"
        raise InputError(f"{file}: {metric}: the gain of claim score is in bits a byte; make it 'val_bpb'")


def load_track(path: str | Path) -> Track:
    """The track of a file; its name is that of the folder which holds it."""
    file = printable(str(path))
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise InputError(f"{file}: not UTF-8 text; save it as UTF-8") from None
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror}); name a {FILE}") from None
    track, folder = track_of(text, file), Path(path).resolve().parent.name
    if track.name != folder:
        where = f"name = '{track.name}' in folder {printable(folder)}"
        raise InputError(f"{file}: {where}: a track is named as its folder; rename one of them")
    return track


def track_names(records: str | Path = RECORDS) -> list[str]:
    """Names of the tracks of a records folder, sorted."""
    return sorted(path.parent.name for path in Path(records).glob(f"*/{FILE}"))


def find_track(name: str, records: str | Path = RECORDS) -> Track:
    """The track of this name."""
    names = track_names(records)
    if name not in names:
        known = f"choose one of {', '.join(names)}" if names else f"add {FILE} in a folder of that name"
        raise InputError(f"track {printable(name)!r}: does not exist in {printable(str(records))}; {known}")
    return load_track(Path(records) / name / FILE)
