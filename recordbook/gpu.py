"""State of the NVIDIA GPUs during a run: clocks, power, temperature, throttle reasons.

One `nvidia-smi -l 1` process beside the run asks the driver once a second and writes to a pipe, so it ends
with its reader. Nothing is loaded into the run, and no CUDA context is made. Without an NVIDIA GPU there is
no sampler, and the reason is a sentence. Parsing and summary are pure functions of nvidia-smi's text.
"""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

FORMAT = "splits.gpu/1"
SECONDS = 1  # between samples
COLUMNS = ("timestamp", "index", "uuid", "clocks.sm", "clocks.mem", "power.draw", "temperature.gpu")
MEASURES = ("sm_mhz", "memory_mhz", "power_w", "temperature_c")  # the last four columns
# The bit mask of the last column. Drivers before 535 know only the second name.
MASKS = ("clocks_event_reasons.active", "clocks_throttle_reasons.active")
REASONS = {  # bits as in nvml.h, nvmlClocksEventReasons
    0x001: "idle",
    0x002: "applications_clocks",
    0x004: "sw_power_cap",
    0x008: "hw_slowdown",
    0x010: "sync_boost",
    0x020: "sw_thermal",
    0x040: "hw_thermal",
    0x080: "hw_power_brake",
    0x100: "display_clocks",
}


@dataclass(frozen=True)
class Sample:
    """One GPU at one moment; None where nvidia-smi says [N/A]."""

    time: float  # seconds since 1970
    index: int
    uuid: str
    measures: tuple[float | None, ...]  # as MEASURES
    reasons: tuple[str, ...] | None


# 1. text to samples to summary ----------------------------------------------------------------------------


def measure(text: str) -> float | None:
    """A finite number, else None ([N/A], [Not Supported])."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def parse_reasons(text: str) -> tuple[str, ...] | None:
    """Names of the bits of '0x0000000000000024'; a bit without a name keeps its number."""
    try:
        mask = int(text, 16)
    except ValueError:
        return None
    bits = [1 << i for i in range(mask.bit_length()) if mask >> i & 1]
    return tuple(REASONS.get(bit, f"bit_{bit:#x}") for bit in bits)


def parse_sample(line: str) -> Sample | None:
    """One line of `--format=csv,noheader,nounits`; None if it is none (an error text, a line cut short)."""
    fields = [field.strip() for field in line.split(",")]
    if len(fields) != len(COLUMNS) + 1 or not fields[1].isdigit():
        return None
    try:
        moment = datetime.strptime(fields[0], "%Y/%m/%d %H:%M:%S.%f").timestamp()
    except ValueError:
        return None
    numbers = tuple(measure(field) for field in fields[3:7])
    return Sample(moment, int(fields[1]), fields[2], numbers, parse_reasons(fields[7]))


def parse_samples(text: str) -> list[Sample]:
    """Every sample of the text, in its order."""
    return [sample for line in text.splitlines() if (sample := parse_sample(line))]


def summarise(samples: Sequence[Sample], since: float = -math.inf, until: float = math.inf) -> dict:
    """Mean, least and most of each measure, and the share of samples with each throttle reason, by GPU.

    Samples outside [since, until] do not count: the run compiles before its clock starts.
    """
    gpus = []
    for index in sorted({sample.index for sample in samples}):
        found = [s for s in samples if s.index == index and since <= s.time <= until]
        if not found:
            continue
        entry = {"index": index, "uuid": found[0].uuid, "samples": len(found)}
        for i, name in enumerate(MEASURES):
            numbers = [s.measures[i] for s in found if s.measures[i] is not None]
            mean = round(math.fsum(numbers) / len(numbers), 3) if numbers else None
            entry[name] = {"mean": mean, "min": min(numbers), "max": max(numbers)} if numbers else None
        masks = [s.reasons for s in found if s.reasons is not None]
        names = sorted({name for mask in masks for name in mask})
        shares = {name: round(sum(name in mask for mask in masks) / len(masks), 4) for name in names}
        entry["throttle"] = shares if masks else None
        gpus.append(entry)
    return {"format": FORMAT, "interval_s": SECONDS, "gpus": gpus}


def in_words(summary: dict) -> str:
    """The summary on one line, the slowest clock and the highest temperature of all GPUs."""

    def over(name: str, key: str, choose) -> str:
        found = [gpu[name][key] for gpu in summary["gpus"] if gpu[name]]
        return f"{choose(found):.0f}" if found else "?"

    if not summary["gpus"]:
        return "no sample of the GPUs while the clock ran"
    shares = {}
    for gpu in summary["gpus"]:
        for name, share in (gpu["throttle"] or {}).items():
            shares[name] = max(share, shares.get(name, 0))
    held = ", ".join(f"{name} {share:.0%}" for name, share in sorted(shares.items()) if name != "idle")
    clocks = f"{over('sm_mhz', 'min', min)} to {over('sm_mhz', 'max', max)} MHz"
    warmth = f"{over('power_w', 'mean', max)} W, at most {over('temperature_c', 'max', max)} C"
    return f"{clocks}, {warmth}, held back by: {held or 'nothing'}"


# 2. sampling ----------------------------------------------------------------------------------------------


class Sampler:
    """Samples in the background between start() and stop(). Made by find()."""

    def __init__(self, command: list[str], uuids: list[str]) -> None:
        self.command, self.uuids = command, uuids
        self.process, self.reader, self.lines = None, None, []

    def start(self) -> None:
        """Begin; a sampler that cannot start leaves no samples and stops no run."""
        self.lines, self.process = [], None
        command = [*self.command, "-l", str(SECONDS)]
        try:
            self.process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, process_group=0
            )
        except OSError:
            return
        # The lists are handed over: a late reader of one run must not write into the next one.
        arguments = (self.process.stdout, self.lines)
        self.reader = threading.Thread(target=lambda pipe, lines: lines.extend(pipe), args=arguments)
        self.reader.daemon = True
        self.reader.start()

    def stop(self, since: float = -math.inf) -> dict:
        """End; the summary of the samples from `since` on."""
        if self.process:
            self.process.terminate()
            try:
                self.process.wait(timeout=5)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
            self.reader.join(timeout=5)
            self.process = None
        return summarise(parse_samples("".join(self.lines)), since, time.time())


def find(chosen: str | None = None) -> tuple[Sampler | None, str]:
    """(a sampler of the chosen GPUs, else of all that CUDA sees, or None; why there is none)."""
    program, chosen = shutil.which("nvidia-smi"), chosen or os.environ.get("CUDA_VISIBLE_DEVICES")
    if program is None:
        return None, "no nvidia-smi on this machine"
    if chosen is not None and chosen.split(",")[0].strip() in ("", "-1", "NoDevFiles"):
        return None, "CUDA_VISIBLE_DEVICES names no GPU"
    only = ["-i", chosen] if chosen else []
    for mask in MASKS:
        command = [program, "--query-gpu=" + ",".join((*COLUMNS, mask)), "--format=csv,noheader,nounits"]
        try:
            run = subprocess.run([*command, *only], capture_output=True, text=True, timeout=60)
        except (OSError, subprocess.TimeoutExpired) as error:
            return None, f"nvidia-smi does not work here ({type(error).__name__})"
        if run.returncode == 0 and (samples := parse_samples(run.stdout)):
            return Sampler(command + only, sorted({sample.uuid for sample in samples})), ""
    said = (run.stdout + run.stderr).strip().split("\n")[0][:100] or "nothing"
    return None, f"nvidia-smi shows no GPU state here, it says: {said}"
