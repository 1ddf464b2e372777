"""The rules of style that a program can hold: budgets, order, no reach-ins, a frozen command line."""

import argparse
import ast
import importlib
import io
import re
import symtable
import tokenize
from pathlib import Path

import pytest
import torch

import train_gpt

ROOT = Path(__file__).resolve().parents[1]
MAX_LINES, MAX_FUNCTION, MAX_WIDTH = 1500, 60, 110
LONGER = {"GPT.forward": 90, "GPT.stream": 90, "GPT.attend": 90}
SECTIONS = (
    "config", "ranks, log, clock", "data", "schedule", "blocks", "model", "update rules", "optimizer", "run",
    "main",
)  # fmt: skip
OPTIONS = {"-h", "--help", "--recipe", "--data", "--out", "--seed", "--resume", "--checkpoint-every"}
OPTIONS |= {"--profile"}
# Public, and said in full by name and signature. Methods of at most SHORT_METHOD lines need none either.
UNDOCUMENTED = {"Recipe", "Sched", "round_up", "check_tokens", "norm", "check_params", "parse", "main"}
UNDOCUMENTED |= {"ValSet.read"}
SHORT_METHOD = 12
both_files = pytest.mark.parametrize("name", ["train_gpt", "triton_kernels"])


def source_of(name: str) -> str:
    return (ROOT / f"{name}.py").read_text(encoding="utf-8")


def functions(tree: ast.AST, prefix: str = ""):
    """(qualified name, node) of every function and class, nested ones included."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield f"{prefix}{node.name}", node
            yield from functions(node, f"{prefix}{node.name}.")
        else:
            yield from functions(node, prefix)


@both_files
def test_length_of_the_file(name):
    assert len(source_of(name).splitlines()) <= MAX_LINES


@both_files
def test_length_of_functions(name):
    lengths = {
        where: node.end_lineno - node.lineno + 1
        for where, node in functions(ast.parse(source_of(name)))
        if not isinstance(node, ast.ClassDef)
    }
    over = {where: n for where, n in lengths.items() if n > LONGER.get(where, MAX_FUNCTION)}
    assert not over, f"functions that are too long: {over}"
    assert name != "train_gpt" or set(LONGER) <= set(lengths), "an allowance without its function"


@both_files
def test_lines_are_short_and_ascii(name):
    lines = enumerate(source_of(name).splitlines(), start=1)
    wrong = [i for i, line in lines if len(line) > MAX_WIDTH or not line.isascii() or "\t" in line]
    assert not wrong, f"lines over {MAX_WIDTH} columns or not ASCII: {wrong}"


def test_sections_are_in_order():
    source = source_of("train_gpt")
    banners = re.findall(r"^# (\d+)\. ([^:\n]+?)(?::[^\n]*)? -{10,}$", source, re.M)
    assert [(int(n), title) for n, title in banners] == list(enumerate(SECTIONS, start=1))
    # The docstring promises that this prints the table of contents.
    assert len(re.findall(r"^# [0-9]", source, re.M)) == len(SECTIONS)


@both_files
def test_nobody_is_named_in_comments(name):
    tokens = tokenize.generate_tokens(io.StringIO(source_of(name)).readline)
    texts = [(t.start[0], t.string) for t in tokens if t.type in (tokenize.COMMENT, tokenize.STRING)]
    named = [
        (line, found) for line, text in texts for found in re.findall(r"(?<![\w.])@[A-Za-z][\w-]+", text)
    ]
    assert not named, f"attributions belong into records: {named}"


def reach_ins(name: str) -> set[tuple[str, str]]:
    """(function, variable): reads of a module's lower-case variables from inside functions."""
    source, module = source_of(name), importlib.import_module(name)
    imported = {
        alias.asname or alias.name.split(".")[0]
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    table = symtable.symtable(source, name, "exec")
    variables = {
        s.get_name()
        for s in table.get_symbols()
        if s.is_assigned() and s.get_name() not in imported and s.get_name() != s.get_name().upper()
    }
    # A name bound to a function or a class is one, however it was made.
    variables = {v for v in variables if not callable(getattr(module, v, None))}

    def walk(scope: symtable.SymbolTable, where: str):
        for child in scope.get_children():
            inner = f"{where}.{child.get_name()}".lstrip(".")
            if child.get_type() == "function":
                found = (s.get_name() for s in child.get_symbols() if s.is_global() and s.is_referenced())
                yield from ((inner, variable) for variable in found if variable in variables)
            yield from walk(child, inner)

    return set(walk(table, ""))


@both_files
def test_functions_read_no_module_variables(name):
    assert reach_ins(name) == set()


@both_files
def test_module_variables_are_not_rebound(name):
    """What a `global` statement does; UPPER names are constants."""
    found = [n.lineno for n in ast.walk(ast.parse(source_of(name))) if isinstance(n, ast.Global)]
    assert not found, f"global statements in lines {found}"


@both_files
def test_assertions_have_messages(name):
    found = [
        n.lineno for n in ast.walk(ast.parse(source_of(name))) if isinstance(n, ast.Assert) and not n.msg
    ]
    assert not found, f"assertions without a message in lines {found}"


@both_files
def test_the_environment_is_read_in_one_place(name):
    tree = ast.parse(source_of(name))
    allowed = {"Ranks.from_torchrun", "main"} if name == "train_gpt" else set()
    inside = {
        line for where, n in functions(tree) if where in allowed for line in range(n.lineno, n.end_lineno + 1)
    }
    if name == "train_gpt":
        inside.update(lines_of_settings(tree))
    reads = [
        n.lineno
        for n in ast.walk(tree)
        if isinstance(n, ast.Attribute)
        and n.attr in ("environ", "getenv", "putenv")
        and n.lineno not in inside
    ]
    assert not reads, f"the environment is read in lines {reads}"


READ_AT_IMPORT = "PYTORCH_ALLOC_CONF", "TORCHINDUCTOR_AUTOGRAD_CACHE_ALLOW_CUSTOM_AUTOGRAD"
READ_LATER = ("TRITON_PTXAS_PATH",)


def lines_of_settings(tree: ast.Module) -> list[int]:
    """The lines that set variables which torch reads when it is imported, or Triton when it compiles."""
    statements = [n for n in tree.body if isinstance(n, ast.Expr | ast.If)]
    calls = [n for statement in statements for n in ast.walk(statement) if isinstance(n, ast.Call)]
    settings = [n for n in calls if ast.unparse(n.func) == "os.environ.setdefault"]
    assert [n.args[0].value for n in settings] == [*READ_AT_IMPORT, *READ_LATER]
    imports = [n for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom)]
    torch_line = min(n.lineno for n in imports if re.search(r"\b(torch|triton_kernels)\b", ast.unparse(n)))
    early = [n for n in settings if n.args[0].value in READ_AT_IMPORT]
    assert all(n.lineno < torch_line for n in early), "torch reads these variables when it is imported"
    return [n.lineno for n in settings]


def test_the_loop_has_one_clock():
    nodes = dict(functions(ast.parse(source_of("train_gpt"))))
    calls = [
        n for n in ast.walk(nodes["train"]) if isinstance(n, ast.Name) and n.id in ("time", "perf_counter")
    ]
    assert not calls, "the training loop reads the time itself; Clock does that"


def test_the_command_line_is_frozen(monkeypatch):
    parsers = []
    monkeypatch.setattr(
        argparse.ArgumentParser, "parse_args", lambda self, argv: (parsers.append(self), 1 / 0)
    )
    with pytest.raises(ZeroDivisionError):
        train_gpt.parse([])
    assert set(parsers[0]._option_string_actions) == OPTIONS
    positional = [a.dest for a in parsers[0]._actions if not a.option_strings]
    assert not positional, f"positional arguments {positional}"
    assert not parsers[0]._subparsers, "subcommands"


def test_every_row_of_params_is_in_the_model(nano):
    cfg = train_gpt.Config(
        recipe=nano, vocab_size=250, slots=12, dtype=torch.float32, attention="reference", fp8=()
    )
    names = [name for name, _ in train_gpt.GPT(cfg, 0).named_parameters()]
    assert sorted(row.name for row in train_gpt.PARAMS) == sorted(names)
    train_gpt.check_params(names)
    with pytest.raises(ValueError, match=r"duplicate.*missing.*'other'.*extra.*'embed'"):
        train_gpt.check_params([*(n for n in names if n != "embed"), "other"])
    assert {row.tied_to for row in train_gpt.PARAMS} <= {None, *names}
    assert len({row.work for row in train_gpt.PARAMS}) == len(names), (
        "two rows share a place in the work order"
    )


def test_public_names_have_docstrings():
    nodes, bare = dict(functions(ast.parse(source_of("train_gpt")))), set()
    for where, node in nodes.items():
        owner = nodes.get(where.rpartition(".")[0])
        is_short = isinstance(owner, ast.ClassDef) and node.end_lineno - node.lineno < SHORT_METHOD
        is_private = re.search(r"(^|\.)_", where) or isinstance(owner, ast.FunctionDef)
        if not (is_private or is_short or ast.get_docstring(node)):
            bare.add(where)
    assert bare == UNDOCUMENTED, f"no docstring: {bare - UNDOCUMENTED}, needless: {UNDOCUMENTED - bare}"
