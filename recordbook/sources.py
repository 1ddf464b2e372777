"""The sources that a run log holds: extract them, write them out ready to run, compare those of two logs.

Ours:        `#### source NAME sha256=... lines=...` and the text, once for each file, then a line of 100 '='.
Theirs:      the script, then a line of 100 '='. Logs of 2024 begin with such a line too; logs from 2026 on
             append further files under a title of three lines: 40 '-', `# triton_kernels.py`, 40 '-'.
The contest: as theirs; what its program prints to the console holds no source.
Left out:    `# source omitted here, sha256 ...` stands for the text, in logs that were shortened by others.

What is written out is what the run executed, byte for byte. Order of this file: extraction, replay, diff,
command lines.
"""

from __future__ import annotations

import ast
import hashlib
import os
import re
import shutil
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from pathlib import Path

from compare_runs import (
    LLMC,
    OMITTED,
    OUR_SOURCE,
    RULE,
    STEP,
    InputError,
    Parser,
    Run,
    find_logs,
    parse_log,
    printable,
    read_log,
    some,
)

TRAINER = "train_gpt.py"  # the name of a script whose log does not say it
README = "README.txt"
TITLE = re.compile(rb"\n\n-{40}\n# (\S[^\n]*\.py)\n-{40}\n\n")  # above each further file, from 2026 on
VERSIONS = re.compile(rb"Running (?:Python|[Pp]y[Tt]orch) ")
IMPORT = re.compile(rb"^(?:import|from)[ \t]", re.M)
NO_NEWLINE = "\n\\ No newline at end of file"
CONTEXT = 3  # unchanged lines shown on either side of a change
WORTH_FOLDING = 4  # a fold takes one line, so it hides at least this many
PAIRS_OF_LINES = 40_000_000  # above this, difflib's shortcut for frequent lines is taken


@dataclass(frozen=True)
class Source:
    """One file of a log."""

    name: str
    text: bytes | None  # None where the log holds the hash alone
    sha256: str  # of the text; the declared hash where there is no text
    declared: str | None  # the hash that the log states

    @property
    def agrees(self) -> bool | None:
        """Whether the text has the declared hash; None where one of the two is missing."""
        return None if self.text is None or self.declared is None else self.sha256 == self.declared

    @property
    def lines(self) -> int:
        """Lines of text, an unterminated last one included."""
        return len(lines_of(self))


# 1. extraction --------------------------------------------------------------------------------------------


def digest_of(data: bytes) -> str:
    """SHA-256 in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def is_measured(line: bytes) -> bool:
    """True for a `step:1/2 ...` line with its numbers, which no format string has."""
    return bool(STEP.match(line) or LLMC.match(line))


def our_sources(lines: list[bytes], log: str) -> list[Source]:
    """The sources under our headers. A wrong hash is returned; a missing part is an InputError."""
    found, i = [], 0
    while i < len(lines) and (match := OUR_SOURCE.fullmatch(lines[i])):
        name, declared, end = match[1].decode("utf-8", "replace"), match[2].decode(), i + 1 + int(match[3])
        if end >= len(lines):  # at least the rule follows, so not even a last newline may be missing
            lacks = f"{len(lines) - i - 1} of the {end - i - 1} lines"
            raise InputError(f"{log}: cut in the source of {printable(name)} ({lacks}); use a whole log")
        text = b"\n".join(lines[i + 1 : end])
        # Whether the file ended in a newline is not in the log; its hash tells.
        text += b"" if digest_of(text) == declared else b"\n"
        found.append(Source(name, text, digest_of(text), declared))
        i = end
    ends = i < len(lines) and lines[i] == RULE
    if not ends and all(source.agrees for source in found):
        last = printable(found[-1].name)
        why = "no further source and no line of 100 '=' follows"
        raise InputError(f"{log}: cut or altered after the source of {last} ({why}); use a whole log")
    return found


def is_python(text: bytes) -> bool:
    """Whether the text parses; one that needs a newer Python than this does not."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            ast.parse(text)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return False
    return True


def their_text(lines: list[bytes], log: str) -> bytes:
    """What stands before the versions in a log of the community or the contest; empty if nothing does."""
    rules = [i for i, line in enumerate(lines) if line == RULE]
    if not rules:
        if any(map(is_measured, lines)):
            raise InputError(f"{log}: holds no source, its format has none; name a log that begins with one")
        if IMPORT.search(b"\n".join(lines)):
            raise InputError(f"{log}: cut in its source, or no run log at all; use a whole log")
        raise InputError(f"{log}: not a run log, it has no source and no step line; name a log")
    closing = next((i for i in rules if VERSIONS.match(b"".join(lines[i + 1 : i + 2]))), None)
    if (
        rules[0] == 0 and closing != 0
    ):  # 2024: written without a newline of its own, so the text keeps its last
        end = closing or next(iter(rules[1:]), None)
        if end is None:
            raise InputError(f"{log}: cut in its source, no second line of 100 '='; use a whole log")
        text = b"\n".join(lines[1:end]) + b"\n"
    else:
        end = rules[0] if closing is None else closing
        text = b"\n".join(lines[:end])
    within = any(map(is_measured, lines[:end]))
    if (within and not is_python(text)) or (closing is None and any(map(VERSIONS.match, lines[:end]))):
        raise InputError(f"{log}: output and source are mixed, as by two writers; use another log")
    if text.strip() and not IMPORT.search(text):
        raise InputError(f"{log}: what stands before its first line of 100 '=' is no source; use another log")
    return text if text.strip() else b""


def split_titles(text: bytes) -> Iterator[tuple[str, bytes]]:
    """(name, text) of each file of a community source."""
    name, at = TRAINER, 0
    for match in TITLE.finditer(text):
        yield name, text[at : match.start()]
        name, at = match[1].decode("utf-8", "replace"), match.end()
    yield name, text[at:]


def sources_of(data: bytes, log: str = "the log") -> list[Source]:
    """The sources in a log's bytes, in its order, the trainer first. `log` is the name that errors use.

    A text that lacks its declared hash is returned with `agrees` False. No source is an InputError.
    """
    if not data.strip():
        raise InputError(f"{log}: is empty; name a run log")
    if b"\0" in data:
        raise InputError(f"{log}: binary, not a text log; name a run log")
    if b"\n" + RULE + b"\r\n" in data or data.startswith(RULE + b"\r\n"):  # the whole log was converted
        data = data.replace(b"\r\n", b"\n")
    lines = data.split(b"\n")
    if OUR_SOURCE.fullmatch(lines[0]):
        return our_sources(lines, log)
    if lines[0].startswith(b"#### source "):
        raise InputError(
            f"{log}: its source header is damaged ({printable(repr(lines[0][:60]))}); use another log"
        )
    omitted = OMITTED.fullmatch(lines[0])
    text = their_text(lines[bool(omitted) :], log)
    if text:
        return [Source(name, part, digest_of(part), None) for name, part in split_titles(text)]
    if omitted:
        return [Source(TRAINER, None, omitted[1].decode(), omitted[1].decode())]
    raise InputError(f"{log}: holds no source, its first line is the rule; name a log that begins with one")


def load_sources(path: str) -> tuple[bytes, list[Source]]:
    """(bytes, sources) of a log file, plain or compressed."""
    data = read_log(path)
    return data, sources_of(data, printable(path))


# 2. replay --------------------------------------------------------------------------------------------------


def check_name(name: str, log: str) -> None:
    """Refuse a file name that could leave the folder, hide, or be taken for an option."""
    plain = name.isprintable() and not set(name) & set('/\\:*?"<>|') and name == name.strip()
    if not plain or name.startswith((".", "-")) or name.endswith(".") or len(os.fsencode(name)) > 200:
        rule = "a source has a plain file name: no folder, no leading '.' or '-', at most 200 bytes"
        raise InputError(f"{log}: file name {printable(name)!r}: {rule}; write that log's sources by hand")


def check_hashes(sources: Sequence[Source], log: str) -> None:
    """Refuse a text that does not have the hash its log declares."""
    for source in sources:
        if source.agrees is False:
            differ = f"sha256 {source.sha256[:12]}, but the log declares {source.declared[:12]}"
            name = printable(source.name)
            raise InputError(f"{log}: the source of {name} has {differ}: it was altered; use another log")


def check_whole(sources: Sequence[Source], log: str) -> None:
    """Refuse sources that cannot be written out: a wrong hash, no text, an unsafe or repeated name."""
    check_hashes(sources, log)
    taken = {README.casefold()}
    for source in sources:
        name = printable(source.name)
        if source.text is None:
            held = f"only its hash {source.sha256[:12]}"
            raise InputError(f"{log}: the source was left out, it holds {held}; get the original log")
        check_name(source.name, log)
        if source.name.casefold() in taken:
            raise InputError(f"{log}: two files would be named {name}; write that log's sources by hand")
        taken.add(source.name.casefold())


def fields_of(data: bytes) -> dict[str, str]:
    """The `key: value` lines of our header; empty for other logs."""
    lines = data.split(b"\n")
    if not OUR_SOURCE.fullmatch(lines[0].rstrip(b"\r")):
        return {}
    i = 0
    while i < len(lines) and (match := OUR_SOURCE.fullmatch(lines[i].rstrip(b"\r"))):
        i += 1 + int(match[3])
    fields = {}
    for line in lines[i + 1 :]:
        key, colon, value = line.decode("utf-8", "replace").rstrip("\r").partition(": ")
        if key.encode() == RULE or is_measured(line):
            break
        if colon:
            fields[key] = value
    return fields


def arguments_of(command: str, trainer: str) -> list[str]:
    """The options of a logged command, without --out, which would name a log that exists."""
    before, found, after = command.partition(trainer)
    words = after.split() if found and before[-1:] in ("", "/", " ", "\\") else command.split()[1:]
    kept, skip = [], False
    for word in words:
        if not skip and not word.startswith("--out=") and word != "--out":
            kept.append(word)
        skip = word == "--out" and not skip
    return kept


def run_line(run: Run, fields: dict[str, str], trainer: str) -> str:
    """The command that starts the trainer again, as far as the log tells."""
    count = run.head.get("world_size") or len(run.head.get("gpus") or ())
    several = run.kind != "splits" or count > 1  # the community's programs want torchrun on one GPU too
    start = f"torchrun --standalone --nproc_per_node={count or 1}" if several else "python"
    return " ".join([start, trainer, *arguments_of(fields.get("command", ""), trainer)])


def versions_of(run: Run) -> list[str]:
    """Versions that the header states, one a line."""
    head = run.head
    torch = head.get("torch") and head["torch"] + (
        f" for CUDA {head['cuda']}" if head.get("cuda", "None") != "None" else ""
    )
    found = {"Python": head.get("python"), "PyTorch": torch, "Triton": head.get("triton")}
    found["NVIDIA driver"] = head.get("driver")
    return [f"{key} {value}" for key, value in found.items() if value] or ["not in the log"]


def readme(log: str, data: bytes, sources: Sequence[Source]) -> str:
    """What was run, with what, on what, and how to run it again: all of it from the log."""
    run = parse_log(data, log, log)[0]
    fields, trainer = fields_of(data), sources[0].name
    said = "not in the log"
    result = ", ".join(
        [run.status]
        + [f"loss {run.loss:g} at step {run.steps_done} of {run.steps_planned}"] * (run.loss is not None)
        + [f"{run.seconds:.3f} s"] * (run.seconds is not None)
    )
    keys = ("recipe", "seed", "target", "dtype", "attention", "fp8", "slots", "world_size", "commit", "dirty")
    checked = {True: "has the hash that the log declares", None: "the log declares no hash"}
    rows: list[tuple[str, list[str]]] = [
        ("log", [log, f"sha256 {digest_of(data)} (uncompressed), format {run.kind}"]),
        ("result", [result]),
        ("files", [f"{s.name}: sha256 {s.sha256}, {s.lines} lines, {checked[s.agrees]}" for s in sources]),
        ("versions", versions_of(run)),
        ("hardware", [run.hardware or said]),
        ("data", [fields.get("data", said)]),
        ("settings", [f"{key} {fields[key]}" for key in keys if key in fields] or [said]),
        ("command", [fields.get("command", said)]),
        ("run it", [run_line(run, fields, trainer), *hints(run, fields)]),
    ]
    text = [f"Sources of the run log {printable(log)}, exactly as that run executed them.", ""]
    for title, values in rows:
        text += [f"{title if i == 0 else '':10}{printable(value)}" for i, value in enumerate(values)]
    return "\n".join(text) + "\n"


def hints(run: Run, fields: dict[str, str]) -> list[str]:
    """What the run line needs beside it."""
    if run.kind == "splits":
        found = ["in this folder; --data DIR names the prepared shards with the data hash above"]
        found += ["that run was resumed from a checkpoint: this is its last part"] * ("resumed" in fields)
        return found
    if run.kind == "contest":
        found = ["in this folder, with the contest's data and tokenizer where the script looks for them"]
        return [*found, "its settings may come from environment variables, which are not in the script"]
    return ["in this folder, with the shards where the script looks; the script's own name is not in the log"]


def write_folder(folder: str, files: dict[str, bytes]) -> None:
    """Write a new folder whole or not at all: under a temporary name beside it, then one rename."""
    shown, target = printable(folder), os.path.realpath(folder)
    parent, name = os.path.split(target)
    if os.path.lexists(target) and not os.path.isdir(target):
        raise InputError(f"{shown}: is a file, the sources go into a new folder; name another")
    if os.path.isdir(target) and (os.listdir(target) or os.path.samefile(target, os.curdir)):
        raise InputError(f"{shown}: not empty or in use, nothing is overwritten; name a new folder")
    if not name or not os.path.isdir(parent):
        raise InputError(f"{shown}: not a folder in an existing folder; create the outer one first")
    temporary = os.path.join(parent, f".{os.getpid()}.{name}")
    try:
        os.mkdir(temporary)
        try:
            for file, text in files.items():
                with open(os.path.join(temporary, file), "xb") as f:
                    f.write(text)
            os.rename(temporary, target)  # fails if something appeared there meanwhile
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise InputError(f"{shown}: cannot be written ({error.strerror}); name another folder") from None


def replay(log: str | Path, folder: str | Path) -> list[Source]:
    """Write the sources of a log into a new folder, with a README.txt; returns them."""
    data, sources = load_sources(str(log))
    check_whole(sources, printable(str(log)))
    files = {source.name: source.text for source in sources}
    about = readme(os.path.basename(str(log)), data, sources)
    write_folder(str(folder), files | {README: about.encode("utf-8", "replace")})
    return sources


# 3. diff ----------------------------------------------------------------------------------------------------


def lines_of(source: Source) -> list[str]:
    """The text as lines without their ends; an unterminated last line carries diff's remark."""
    text = (source.text or b"").decode("utf-8", "backslashreplace")
    lines = text.split("\n")
    last = lines.pop()
    return [*lines, last + NO_NEWLINE] if last else lines


def opcodes(old: list[str], new: list[str]) -> list[tuple[str, int, int, int, int]]:
    """difflib's opcodes; equal ends are taken off first, which is most of a typical pair."""
    shorter = min(len(old), len(new))
    head = next((i for i in range(shorter) if old[i] != new[i]), shorter)
    tail = next((i for i in range(shorter - head) if old[-1 - i] != new[-1 - i]), shorter - head)
    a, b = old[head : len(old) - tail], new[head : len(new) - tail]
    matcher = SequenceMatcher(None, a, b, autojunk=len(a) * len(b) > PAIRS_OF_LINES)
    codes = [("equal", 0, head, 0, head)] if head else []
    codes += [(tag, i + head, j + head, k + head, m + head) for tag, i, j, k, m in matcher.get_opcodes()]
    if tail:
        codes.append(("equal", len(old) - tail, len(old), len(new) - tail, len(new)))
    merged: list[tuple[str, int, int, int, int]] = []
    for code in codes:  # an equal end may touch an equal part of the middle
        if merged and code[0] == merged[-1][0] == "equal":
            code = ("equal", merged[-1][1], code[2], merged[-1][3], code[4])
            merged.pop()
        merged.append(code)
    return merged


def escaped(line: str) -> str:
    """A line of source, safe on a terminal: tabs stay, other control characters are escaped."""
    body, remark, _ = line.partition(NO_NEWLINE)
    return "\t".join(printable(part) for part in body.split("\t")) + remark


def fold(lines: list[str], before: bool, after: bool) -> list[str]:
    """An unchanged part: a few lines next to the changes, the rest as one line that counts it."""
    head, tail = CONTEXT * before, CONTEXT * after
    hidden = len(lines) - head - tail
    if hidden < WORTH_FOLDING:
        return [f" {escaped(line)}" for line in lines]
    middle = [f"@@ ... {hidden} unchanged lines @@"]
    shown = [f" {escaped(line)}" for line in lines]
    return shown[:head] + middle + shown[len(lines) - tail :]


def diff_lines(old: list[str], new: list[str]) -> tuple[list[str], int, int]:
    """(lines of the diff, lines added, lines removed)."""
    out, added, removed, codes = [], 0, 0, opcodes(old, new)
    for at, (tag, i, j, k, m) in enumerate(codes):
        if tag == "equal":
            out += fold(old[i:j], before=at > 0, after=at < len(codes) - 1)
            continue
        out += [f"-{escaped(line)}" for line in old[i:j]] + [f"+{escaped(line)}" for line in new[k:m]]
        removed, added = removed + j - i, added + m - k
    return out, added, removed


def pair_up(old: list[Source], new: list[Source]) -> list[tuple[Source | None, Source | None]]:
    """Files of two logs side by side: by name, and the two trainers whatever they are called."""
    pairs: list[tuple[Source | None, Source | None]] = []
    theirs = {source.name: source for source in new}
    if old[0].name not in theirs and new[0].name not in {source.name for source in old}:
        pairs.append((old[0], theirs.pop(new[0].name)))
    for source in old[len(pairs) :]:
        pairs.append((source, theirs.pop(source.name, None)))
    return pairs + [(None, source) for source in theirs.values()]


def diff_file(old: Source | None, new: Source | None) -> tuple[str, list[str]]:
    """(summary line, diff) of one file."""
    either = old or new
    name = printable(old.name if old else new.name)
    if old and new and old.name != new.name:
        name += f" -> {printable(new.name)}"
    if old and new and old.sha256 == new.sha256:
        return f"{name}: the same, sha256 {old.sha256[:12]}", []
    if old and new and (old.text is None or new.text is None):
        hashes = f"sha256 {old.sha256[:12]} and {new.sha256[:12]}"
        return f"{name}: differs ({hashes}), but the text was left out of a log", []
    body, added, removed = diff_lines(lines_of(old) if old else [], lines_of(new) if new else [])
    if not (old and new):
        state = "only in the second log" if new else "only in the first log"
        count = f"{either.lines} lines" if either.text is not None else "its text was left out"
        return f"{name}: {state}, {count}", ["--- " + (f"a/{name}" if old else "none"),
                                             "+++ " + (f"b/{name}" if new else "none"), *body]  # fmt: skip
    head = [f"--- a/{printable(old.name)} sha256 {old.sha256[:12]}"]
    head += [f"+++ b/{printable(new.name)} sha256 {new.sha256[:12]}"]
    return f"{name}: {added} lines added, {removed} removed", head + body


def settings_of(data: bytes) -> dict[str, str]:
    """What a header says about a run, but for what no two runs share."""
    run = parse_log(data, "", "")[0]
    names = {"python": "Python", "torch": "PyTorch", "cuda": "CUDA", "triton": "Triton", "driver": "driver"}
    found = {title: str(run.head[key]) for key, title in names.items() if key in run.head}
    if fields := fields_of(data):
        return found | {key: value for key, value in fields.items() if key not in ("run_id", "started")}
    if run.hardware:
        found["hardware"] = run.hardware
    if "seed" in run.head:
        found["seed"] = str(run.head["seed"])
    if run.steps_planned is not None:
        found["steps"] = str(run.steps_planned)
    return found


def diff(log_a: str | Path, log_b: str | Path) -> str:
    """What changed from one log to the other: a summary, the settings that differ, then each file's diff."""
    (data_a, old), (data_b, new) = load_sources(str(log_a)), load_sources(str(log_b))
    for log, sources in ((log_a, old), (log_b, new)):
        check_hashes(sources, printable(str(log)))
    files = [diff_file(a, b) for a, b in pair_up(old, new)]
    a, b = settings_of(data_a), settings_of(data_b)
    out = [f"a: {printable(str(log_a))}", f"b: {printable(str(log_b))}", *(line for line, _ in files)]
    differing = [key for key in dict.fromkeys([*a, *b]) if a.get(key) != b.get(key)]
    if differing:
        out += ["", "settings that differ:"]
        for key in differing:
            for sign, side in (("-", a), ("+", b)):
                out += [f"{sign}{printable(key)}: {printable(side[key])}"] if key in side else []
    else:
        out += ["", "no setting that the headers state differs"]
    for _, body in files:
        out += ["", *body] if body else []
    return "\n".join(out) + "\n"


# 4. command lines -------------------------------------------------------------------------------------------


def log_of(arg: str) -> str:
    """A log for the argument: itself, or one of a folder's or glob's logs if all hold the same sources."""
    if os.path.isfile(arg) or not (files := find_logs(arg)[0]):
        return arg
    kinds: dict[tuple, str] = {}
    for path in files:
        data = read_log(path)
        if parse_log(data, path, path)[0].status != "not a log":  # a README.txt beside the logs
            found = sources_of(data, printable(path))
            kinds.setdefault(tuple((s.name, s.sha256) for s in found), path)
    if not kinds:
        raise InputError(f"{printable(arg)}: no run log among {len(files)} file(s); name a run log")
    if len(kinds) > 1:
        names = some([printable(path) for path in kinds.values()])
        raise InputError(f"{printable(arg)}: its logs hold {len(kinds)} different sources; name one: {names}")
    return next(iter(kinds.values()))


def replay_command(argv: Sequence[str] | None = None) -> str:
    """`replay LOG FOLDER`; returns what to print."""
    parser = Parser(
        prog="compare_runs.py replay",
        description="Write the sources that a run log holds into a new folder, ready to run. Nothing is run.",
    )
    parser.add_argument(
        "log", metavar="LOG", help="a log of ours, the community or the contest; also .gz, .xz, .zst"
    )
    parser.add_argument("folder", metavar="FOLDER", help="a folder that does not exist or is empty")
    args = parser.parse_args(argv)
    rows = [
        f"  {printable(s.name)}  {s.lines} lines, sha256 {s.sha256}" for s in replay(args.log, args.folder)
    ]
    start = f"{printable(os.path.join(args.folder, README))} says how to run them; read them first."
    return (
        "\n".join([f"{printable(args.log)}: {len(rows)} file(s) in {printable(args.folder)}", *rows, start])
        + "\n"
    )


def diff_command(argv: Sequence[str] | None = None) -> str:
    """`diff A B`; returns what to print."""
    parser = Parser(
        prog="compare_runs.py diff",
        description="What changed between the sources and the settings of two run logs.",
    )
    for name in ("A", "B"):
        parser.add_argument(name, help="a log, or a folder or glob of logs of one source")
    args = parser.parse_args(argv)
    return diff(log_of(args.A), log_of(args.B))
