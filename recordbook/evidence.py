"""The evidence of a series: its files, and whether plan, ledger and logs are one account of it.

A series of run.sh and a record hold the same evidence in two forms. Here it is one dictionary, {path in the
series' folder: bytes}, logs unpacked:

    series   plan.json, plan.json.sha256, ledger.jsonl, <arm>/run-001.txt, run-001.json, run-001.gpu.json
    record   the same, the logs' folders under logs/, each log as run-001.txt.zst

Nothing is read beyond the limits below, no link is followed, and no path that a file states is opened.
Order of this file: shapes, files, packing, the account, its faults.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path, PurePosixPath
from typing import Any

from compare_runs import LOG_END, InputError, Run, is_log, parse_log, printable, read_log, some
from recordbook.runs import (
    ENDED,
    LEDGER,
    LEDGER_FORMAT,
    MOST_RUNS,
    PLAN,
    PLAN_FORMAT,
    PLAN_HASH,
    pattern,
    source_of,
)

TOP = (PLAN, PLAN_HASH, LEDGER)
LOGS, PACKED = "logs", ".zst"
TWINS = (".gpu.json", ".json")  # beside a log
MOST_FILES, MOST_BYTES, MOST_TOTAL = 20_000, 64 << 20, 1 << 30  # files; bytes of one, but a log; of all
MOST_DEPTH = 20  # of a JSON value
LEVEL = 19  # of zstandard

# 1. shapes ------------------------------------------------------------------------------------------------

NUMBER = (int, float)
MAYBE_NUMBER, MAYBE_TEXT = (int, float, type(None)), (str, type(None))


def misfit(value: Any, shape: Any, where: str = "") -> str:
    """The first place where a JSON value lacks a shape, in words; '' if it fits.

    A shape is a type or a tuple of types, a list of one shape for each item, or {key: shape}, whose keys
    must all be there. Further keys are the writer's. True and False are no numbers.
    """
    if isinstance(shape, dict):
        if not isinstance(value, dict):
            return f"{where or 'all of it'} is no object"
        for key, inner in shape.items():
            place = f"{where}.{key}".lstrip(".")
            if key not in value:
                return f"{place} is missing"
            if found := misfit(value[key], inner, place):
                return found
        return ""
    if isinstance(shape, list):
        if not isinstance(value, list):
            return f"{where} is no list"
        found = (misfit(item, shape[0], f"{where}[{i}]") for i, item in enumerate(value))
        return next(filter(None, found), "")
    kinds = shape if isinstance(shape, tuple) else (shape,)
    if isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool)):
        return ""
    names = " or ".join("null" if kind is type(None) else kind.__name__ for kind in kinds)
    return f"{where} is {printable(repr(value))[:60]}, not {names}"


def is_deep(value: Any) -> bool:
    """Is a JSON value nested deeper than any that is written here? Such a one could end a recursion."""
    level = [value]
    for _ in range(MOST_DEPTH):
        inner = [x.values() if isinstance(x, dict) else x for x in level if isinstance(x, dict | list)]
        level = [x for values in inner for x in values]
    return bool(level)


def parse_json(data: bytes, file: str) -> Any:
    """A JSON value whose numbers are finite and of sane length; InputError names the file."""

    def number(text: str, kind: type = float) -> int | float:
        if len(text) > 40 or not math.isfinite(value := kind(text)):
            raise ValueError(f"{text[:40]} is no number of a record")
        return value

    def whole(text: str) -> int:
        return number(text, int)

    try:
        value = json.loads(data, parse_float=number, parse_int=whole, parse_constant=number)
        if is_deep(value):
            raise ValueError(f"over {MOST_DEPTH} levels deep")
        json.dumps(value, ensure_ascii=False).encode()  # half a surrogate pair is no text
        return value
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file}: cannot be read as JSON ({printable(str(error))}); restore it") from None


# 2. files -------------------------------------------------------------------------------------------------


def listed(folder: Path) -> dict[str, Path]:
    """{path with '/' below the folder: file}, sorted. InputError on a link, a device, or too many files."""
    found: dict[str, Path] = {}

    def fail(error: OSError) -> None:
        raise InputError(f"{printable(str(error.filename))}: cannot be listed ({error.strerror}); check it")

    for parent, folders, files in os.walk(folder, onerror=fail):
        for name in (*folders, *files):
            path = Path(parent, name)
            shown, mode = printable(str(path)), path.lstat().st_mode
            if not name.isprintable():
                raise InputError(f"{shown}: control characters in a file name; rename it")
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                raise InputError(
                    f"{shown}: a link or a device, but evidence is plain files; copy its content"
                )
        found |= {Path(parent, name).relative_to(folder).as_posix(): Path(parent, name) for name in files}
        if len(found) > MOST_FILES:
            many = f"holds over {MOST_FILES:,} files"
            raise InputError(f"{printable(str(folder))}: {many}; is it the right folder?")
    return dict(sorted(found.items()))


def check_size(files: dict[str, Path]) -> None:
    """Refuse files that are together larger than a record's evidence may be."""
    if sum(path.stat().st_size for path in files.values()) > MOST_TOTAL:
        raise InputError(f"its files have over {MOST_TOTAL >> 30} GiB; restore them")


def read_bytes(path: Path, most: int = MOST_BYTES) -> bytes:
    """The bytes of a plain file of at most `most` bytes."""
    shown = printable(str(path))
    try:
        with path.open("rb") as file:
            data = file.read(most + 1)
    except OSError as error:
        raise InputError(f"{shown}: cannot be read ({error.strerror}); restore it") from None
    if len(data) > most:
        raise InputError(f"{shown}: over {most >> 20} MiB, more than a record's file can have; restore it")
    return data


def stem_of(log: str) -> str:
    """A log's name without its ending."""
    return LOG_END.sub("", log)


def unpacked(log: str) -> str:
    """A log's name without the suffix of its packer."""
    return log.removesuffix(LOG_END.search(log)[2] or "")


def gather(files: dict[str, Path]) -> dict[str, bytes]:
    """The evidence among files of a series' form, packed logs unpacked; other files are left out."""
    logs = {name for name in files if is_log(name) and LOG_END.search(name)}  # .TXT is no name of run.sh
    twins = {stem_of(name) + twin for name in logs for twin in TWINS}
    known, found, total = logs | twins | {*TOP}, {}, 0
    for name, path in files.items():
        if name not in known:
            continue
        key = unpacked(name) if name in logs else name
        if key in found:
            raise InputError(f"{printable(str(path))}: lies there twice, packed and not; remove one of them")
        found[key] = read_log(str(path)) if name in logs else read_bytes(path)
        total += len(found[key])
        if total > MOST_TOTAL:
            much = f"with it the logs have over {MOST_TOTAL >> 30} GiB unpacked"
            raise InputError(f"{printable(str(path))}: {much}; is it the right folder?")
    return found


def of_series(folder: Path) -> dict[str, bytes]:
    """The evidence in a series' folder."""
    if not (folder / PLAN).is_file():
        above = folder.parent / PLAN
        where = printable(str(folder.parent if above.is_file() else folder))
        if above.is_file():
            raise InputError(f"{printable(str(folder))}: is one arm; name the folder of its series, {where}")
        raise InputError(f"{where}: has no {PLAN}, so it is no series; make one: bash run.sh --help")
    seen = {k: v for k, v in listed(folder).items() if not any(p.startswith(".") for p in k.split("/"))}
    return gather(seen)


def of_record(files: dict[str, Path]) -> dict[str, bytes]:
    """The evidence among the files of a record's folder."""
    inside = {name.partition("/")[2]: path for name, path in files.items() if name.startswith(f"{LOGS}/")}
    below = {name: path for name, path in inside.items() if name not in TOP}
    return gather(below | {name: files[name] for name in TOP if name in files})


def write_series(files: dict[str, bytes], folder: Path) -> None:
    """Lay evidence out as a series' folder."""
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def record_names(files: Iterable[str]) -> dict[str, str]:
    """{path in a series' folder: path in a record's folder}."""
    packed = {name: f"{name}{PACKED}" if is_log(name) else name for name in files}
    return {name: stored if name in TOP else f"{LOGS}/{stored}" for name, stored in packed.items()}


def as_record(files: dict[str, bytes]) -> dict[str, bytes]:
    """{path in a record's folder: bytes} of evidence. The same log gives the same bytes."""
    import zstandard

    packer = zstandard.ZstdCompressor(level=LEVEL, write_checksum=True)
    places = record_names(files)
    return {places[k]: packer.compress(data) if is_log(k) else data for k, data in files.items()}


# 3. the account -------------------------------------------------------------------------------------------

ARM = {"arm": str, "name": str, "source": str, "files": dict}
PLAN_SHAPE = {
    "format": str,
    "kind": str,
    "made": str,
    "arms": [ARM],
    "runs": int,
    "stop": {"rule": str, "least": int, "most": int},
    "recipe": str,
    "gpus": int,
    "machine": [str],
}
KINDS = {"series": ("A", ("open",)), "ab": ("AB", ("fixed", "until-decided"))}  # arms and rules of the end
ATTEMPT = {"attempt": int, "role": str, "arm": str, "seed": int, "position": int, "log": str, "source": str}
EVENTS = {
    "start": ATTEMPT | {"started": str, "plan": str, "format": str},
    "end": ATTEMPT | {"status": str, "reason": str, "counted": bool},
    "extend": {"runs": int},
    "decision": {"after": int},
}


@dataclass(frozen=True)
class Account:
    """What the plan and the ledger of a series say."""

    plan: dict
    plan_hash: str
    stated_hash: str
    starts: tuple[dict, ...]
    ends: tuple[dict, ...]
    runs: int  # of each arm, that the series was to have in the end
    extended: bool  # a series of one trainer that grew after its plan

    @property
    def counted(self) -> list[dict]:
        """The ends that count, in the order of their attempts."""
        return sorted(
            (e for e in self.ends if e["role"] == "run" and e["counted"]), key=lambda e: e["attempt"]
        )

    @property
    def arms(self) -> dict[str, dict]:
        """The plan's arms by their letter."""
        return {arm["arm"]: arm for arm in self.plan["arms"]}

    @property
    def finished(self) -> str:
        """When the last run ended; when it started, if nobody saw it end."""
        started = {e["attempt"]: e["started"] for e in self.starts}
        return max((str(e.get("ended") or started[e["attempt"]]) for e in self.counted), key=moment)

    def folder(self, letter: str) -> str:
        """Where the logs of an arm are, below the series' folder."""
        return "." if self.plan["kind"] == "series" else self.arms[letter]["name"]


def is_inside(path: str) -> bool:
    """True for the plain relative path of a log that stays in its folder."""
    parts = PurePosixPath(path).parts
    plain = bool(parts) and "/".join(parts) == path and not {"..", "/"} & set(parts) and "\\" not in path
    return plain and is_log(path)


def plan_of(data: bytes) -> dict:
    """A plan of the right shape, of a kind and rule that a record can rest on."""
    plan = parse_json(data, PLAN)
    if wrong := misfit(plan, PLAN_SHAPE):
        raise InputError(f"{PLAN}: {wrong}; restore it")
    kind, rule, lanes = plan["kind"], plan["stop"]["rule"], plan.get("lanes", 1)
    if plan["format"] != PLAN_FORMAT:
        raise InputError(f"{PLAN}: format {printable(plan['format'])!r}, must be {PLAN_FORMAT}; restore it")
    if misfit(lanes, int) or lanes < 1:
        raise InputError(
            f"{PLAN}: lanes {printable(repr(lanes))[:60]}, must be a whole number from 1; restore it"
        )
    if kind not in KINDS:
        known = "a record is of a series of one trainer or of 'ab'"
        raise InputError(f"{PLAN}: kind {printable(kind)!r}: {known}; run one")
    letters, rules = KINDS[kind]
    if [arm["arm"] for arm in plan["arms"]] != list(letters) or rule not in rules:
        known = f"the arms {', '.join(letters)} and the rule {' or '.join(rules)}"
        raise InputError(f"{PLAN}: a series of kind {kind} has {known}; restore it")
    return plan


def events_of(data: bytes) -> dict[str, list[dict]]:
    """{kind of event: events} of a ledger, each of the right shape."""
    events: dict[str, list[dict]] = {name: [] for name in EVENTS}
    for number, line in enumerate(data.splitlines(), 1):
        event = parse_json(line, f"{LEDGER}, line {number}")
        kind = event.get("event") if isinstance(event, dict) else None
        known = isinstance(kind, str) and kind in EVENTS
        wrong = misfit(event, EVENTS[kind]) if known else "is no event of a series"
        if not wrong and "log" in event and not is_inside(str(event["log"])):
            wrong = f"log {printable(str(event['log']))!r} is no log below the series' folder"
        if wrong:
            raise InputError(f"{LEDGER}, line {number}: {wrong}; restore it")
        events[kind].append(event)
    return events


def runs_of(plan: dict, extended: list[int], decided: list[int]) -> int:
    """How many runs each arm was to have in the end: as planned, unless it was extended or decided."""
    rule, least, most = (plan["stop"][key] for key in ("rule", "least", "most"))
    if (extended and rule != "open") or (decided and rule != "until-decided"):
        raise InputError(f"{LEDGER}: a series of rule {rule} is not extended or decided; restore it")
    if any(after < least for after in decided):
        raise InputError(f"{LEDGER}: decided before the {least} runs that {PLAN} asks for; restore it")
    runs = min([most, *decided]) if rule == "until-decided" else max([plan["runs"], *extended])
    if not 1 <= runs <= MOST_RUNS:
        raise InputError(f"{PLAN} and {LEDGER}: {runs} runs, must be 1 to {MOST_RUNS}; restore them")
    return runs


def account_of(files: dict[str, bytes]) -> Account:
    """The account of evidence. InputError if a part of it is missing or malformed."""
    if missing := [name for name in TOP if name not in files]:
        named = ", ".join(missing)
        raise InputError(f"{named}: not in the series; restore it, without it there is no record")
    plan, events = plan_of(files[PLAN]), events_of(files[LEDGER])
    extended, decided = [e["runs"] for e in events["extend"]], [e["after"] for e in events["decision"]]
    runs = runs_of(plan, extended, decided)
    stated = files[PLAN_HASH].decode("utf-8", "replace").split()
    return Account(
        plan,
        hashlib.sha256(files[PLAN]).hexdigest(),
        stated[0] if stated else "",
        tuple(events["start"]),
        tuple(events["end"]),
        runs,
        bool(extended) and runs > plan["runs"],
    )


# 4. its faults --------------------------------------------------------------------------------------------


def faults(account: Account, files: dict[str, bytes]) -> list[str]:
    """Everything in which plan, ledger and logs do not agree, one sentence each; none for a record."""
    found = [*plan_faults(account), *ledger_faults(account), *log_faults(account, files)]
    found = found or list(uncounted_faults(account, files))
    return found or [*run_faults(account, files), *count_faults(account)]


def moment(text: str) -> datetime | None:
    """A time of this age with its zone; None for anything else."""
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        return None
    return found if found.tzinfo and 2000 < found.year < 2200 else None


def plan_faults(account: Account) -> Iterator[str]:
    """The plan is the one that was hashed, and older than every run."""
    if account.stated_hash != account.plan_hash:
        yield f"{PLAN} is not what {PLAN_HASH} is the hash of: it was altered after it was made"
    if other := {e["plan"] for e in account.starts} - {account.plan_hash}:
        begun = printable(some(sorted(digest[:12] for digest in other)))
        yield f"{PLAN} is not the plan of the runs: some were started under {begun}"
    for arm in account.plan["arms"]:
        if source_of(arm["files"]) != arm["source"]:
            yield f"{PLAN}: the source of arm {arm['arm']} is not the hash of its files"
    made, times = moment(account.plan["made"]), [moment(e["started"]) for e in account.starts]
    ended = [moment(str(e["ended"])) for e in account.ends if e.get("ended")]
    if None in (made, *times, *ended):
        yield f"{PLAN} or {LEDGER}: a time is not written as 2026-01-31T23:59:59+0000"
    elif early := [e["log"] for e, time in zip(account.starts, times, strict=True) if time < made]:
        yield f"started before {PLAN} was made ({account.plan['made']}): {printable(some(early))}"


def ledger_faults(account: Account) -> Iterator[str]:
    """Every attempt has one start and one end, about the same run."""
    starts, ends = (Counter(e["attempt"] for e in found) for found in (account.starts, account.ends))
    if twice := sorted(number for found in (starts, ends) for number, count in found.items() if count > 1):
        yield f"{LEDGER}: attempt {some([str(n) for n in twice])} is there twice"
    if formats := {e["format"] for e in account.starts} - {LEDGER_FORMAT}:
        yield f"{LEDGER}: format {printable(some(sorted(formats)))}, must be {LEDGER_FORMAT}"
    if alone := sorted(starts.keys() ^ ends.keys()):
        numbers = some([str(n) for n in alone])
        yield f"{LEDGER}: attempt {numbers} lacks its start or its end; the command of the series closes it"
        return
    begun = {e["attempt"]: e for e in account.starts}
    for end in account.ends:
        if any(end[key] != begun[end["attempt"]][key] for key in ATTEMPT):
            yield f"{LEDGER}: start and end of attempt {end['attempt']} are not about the same run"


def log_faults(account: Account, files: dict[str, bytes]) -> Iterator[str]:
    """Every log of the ledger is there as it was closed, and no other one is."""
    for end in account.ends:
        log, stated = printable(end["log"]), end.get("log_sha256")
        if end["log"] not in files:
            if stated or end["counted"]:
                yield f"{log} is missing: the ledger has it as {printable(end['status'])}"
        elif stated != hashlib.sha256(files[end["log"]]).hexdigest():
            yield f"{log} was altered: it does not have the hash that {LEDGER} states"
        twin = stem_of(end["log"]) + TWINS[0]
        if twin in files and parse_json(files[twin], printable(twin)) != end.get("gpu"):
            yield f"{printable(twin)} is not the state of the GPUs that {LEDGER} has"
    known = {end["log"] for end in account.ends}
    if strangers := [name for name in files if is_log(name) and name not in known]:
        yield f"not in {LEDGER}: {printable(some(strangers))}"


def uncounted_faults(account: Account, files: dict[str, bytes]) -> Iterator[str]:
    """What ended by itself counts, so no whole run is left out."""
    for end in (end for end in account.ends if end["role"] == "run" and end["log"] in files):
        log, status = printable(end["log"]), printable(end["status"])
        if end["counted"] != (end["status"] in ENDED):
            yield f"{log}: {LEDGER} has it as {status}, and as {'' if end['counted'] else 'not '}counted"
        elif not end["counted"] and parse_log(files[end["log"]], log, log)[0].complete:
            yield f"{log}: is a whole run, but {LEDGER} has it as {status}"


def run_faults(account: Account, files: dict[str, bytes]) -> Iterator[str]:
    """Every counted log is of the run that the plan says: source, seed, recipe, data, machine."""
    plan = account.plan
    data = plan.get("data_manifest")
    for end in account.counted:
        log, arm = printable(end["log"]), account.arms.get(end["arm"])
        run = parse_log(files[end["log"]], log, log)[0]
        if arm is None or PurePosixPath(end["log"]).parent.as_posix() != account.folder(end["arm"]):
            yield f"{log} is not in the folder of arm {printable(end['arm'])}"
            continue
        logged = run.head.get("data", "").split(" ")[0] or None
        facts = {
            "source": (run.source, arm["source"]),
            "source in the ledger": (end["source"], arm["source"]),
            "seed": (run.head.get("seed"), end["seed"]),
            "recipe": (run.head.get("recipe"), plan["recipe"]),
            "data": (logged, f"sha256={data}" if data else logged),
            "start time": ("logged" if run.head.get("started") else None, "logged"),
            "end": ("done" if run.complete else "failed", "done" if end["status"] == "done" else "failed"),
        }
        for key, (is_, wanted) in facts.items():
            unsaid = is_ is None or (key == "source" and not run.head)  # by a run that failed early
            if is_ != wanted and not (unsaid and end["status"] != "done"):
                shown = f"{printable(str(is_))[:72]}, must be {printable(str(wanted))[:72]}"
                yield f"{log}: {key} of arm {end['arm']}: {shown}"
        if odd := machine_fault(run, plan["machine"]):
            yield f"{log}: {odd}"


def machine_fault(run: Run, machine: list[str]) -> str:
    """Why a run is not on the machine of the plan: UUIDs of GPUs, or a host without any; '' if it is."""
    uuids, host = run.head.get("uuids", ""), run.head.get("host")
    planned = {name for name in machine if name.startswith("GPU-")}
    if planned and "MIG-" not in uuids:
        others = set(filter(None, uuids.split(", "))) - planned
        return f"ran on {some(sorted(others))}, which {PLAN} does not name" if others else ""
    if not planned and not uuids and host not in machine:
        return f"ran on host {printable(str(host))}, {PLAN} names {printable(some(machine))}"
    return ""


def count_faults(account: Account) -> Iterator[str]:
    """As many runs as the plan says, each seed once in each arm, in the planned order."""
    counted = account.counted
    wanted = [(letter, seed) for seed in range(1, account.runs + 1) for letter in account.arms]
    have = Counter((e["arm"], e["seed"]) for e in counted)
    missing, over = [k for k in wanted if not have[k]], [k for k in have if have[k] > 1 or k not in wanted]
    if missing:
        shown = some([f"seed {seed} of arm {letter}" for letter, seed in missing])
        yield f"the series is not finished, it lacks {shown}; the command that began it goes on"
    if over:
        shown = some([f"seed {seed} of arm {printable(arm)}" for arm, seed in over])
        yield f"more runs than planned: {shown}"
    if not missing and not over:
        yield from order_faults(account)


def order_faults(account: Account) -> Iterator[str]:
    """The runs were made in the planned order: seed after seed, or as many at once as there are lanes."""
    counted, arms, lanes = account.counted, len(account.arms), account.plan.get("lanes", 1)
    order, places = pattern(account.plan["kind"], account.runs), [e["position"] for e in counted]
    planned = {(letter, i // arms + 1): i + 1 for i, letter in enumerate(order)}
    if places != [planned[e["arm"], e["seed"]] for e in counted]:
        yield f"{LEDGER}: a position is not that of its arm and seed in {order}"
        return
    batches = [(place - 1) // (arms * lanes) for place in places]
    by_seed = sorted(places, key=lambda place: (place - 1) // arms)  # else as they were made
    if batches != sorted(batches) or by_seed != sorted(by_seed):
        made = "".join(e["arm"] for e in counted)
        yield f"the runs were made in the order {made}, {PLAN} says {order}, {lanes} at once"
