"""Importing the project's files does nothing: no process group, device, file, thread, process, argument."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# Libraries first; what they do at import is theirs. From then on every audit event of ours counts.
TRAINER = """
import os, signal, sys, threading
import numpy, torch, torch.distributed as dist
try:
    import triton.language
except ImportError:
    pass

class Argv(list):
    def refuse(self, *_):
        raise AssertionError("sys.argv is read at import")
    __getitem__ = __iter__ = __len__ = __contains__ = refuse

def watch(event, args):
    writes = event == "open" and isinstance(args[1], str) and set(args[1]) & set("wxa+")
    if writes or event in forbidden:
        seen.append((event, *map(str, args)))

seen = []
forbidden = {"os.mkdir", "os.rename", "os.remove", "subprocess.Popen", "os.system", "socket.connect"}
handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
random, dtype, environment = torch.get_rng_state(), torch.get_default_dtype(), dict(os.environ)
threads = threading.enumerate()
sys.addaudithook(watch)
argv, sys.argv = sys.argv, Argv()
import triton_kernels, train_gpt
sys.argv = argv
assert not seen, f"side effects: {seen}"
assert not dist.is_initialized(), "a process group"
assert not torch.cuda.is_initialized(), "CUDA is initialised"
assert threading.enumerate() == threads == [threading.main_thread()], threading.enumerate()
assert os.listdir() == [], os.listdir()
assert dict(os.environ) == environment, "an environment variable of the user was changed"
assert handlers == {s: signal.getsignal(s) for s in handlers}, "a signal handler"
assert torch.equal(random, torch.get_rng_state()) and torch.get_default_dtype() == dtype
assert train_gpt.kernels is triton_kernels
"""

COMPARISON = """
import os, sys
for name in ("torch", "triton", "train_gpt", "triton_kernels"):
    sys.modules[name] = None
import compare_runs
assert callable(compare_runs.main)
assert os.listdir() == [], os.listdir()
"""


def run_clean(code: str, folder: Path, **environment: str) -> None:
    """In a new interpreter with an empty folder as its current one and next to no environment."""
    environment = {
        "PYTHONPATH": str(ROOT),
        "PYTHONDONTWRITEBYTECODE": "1",
        "HOME": str(folder),
        **environment,
    }
    folder = folder / "empty"
    folder.mkdir(parents=True)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "", "something is printed at import"


def test_importing_the_trainer_has_no_side_effect(tmp_path):
    kept = {"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}
    kept["TORCHINDUCTOR_AUTOGRAD_CACHE_ALLOW_CUSTOM_AUTOGRAD"] = "0"
    kept["TRITON_PTXAS_PATH"] = str(tmp_path / "ptxas")
    run_clean(TRAINER, tmp_path, CUDA_VISIBLE_DEVICES="", **kept)


def test_triton_is_given_the_assembler_that_inductor_would_give_it(tmp_path):
    """Both name it before a kernel is compiled, in a start that compiles graphs and in one that has them."""
    (tmp_path / "bin").mkdir()
    ptxas = tmp_path / "bin" / "ptxas"
    ptxas.write_text("")
    code = f"import os, torch; torch.__file__ = {str(tmp_path / '__init__.py')!r}; import train_gpt; "
    run_clean(code + "assert 'TRITON_PTXAS_PATH' not in os.environ", tmp_path / "not executable")
    ptxas.chmod(0o755)
    run_clean(code + f"assert os.environ['TRITON_PTXAS_PATH'] == {str(ptxas)!r}", tmp_path / "executable")


def test_the_comparison_needs_no_torch(tmp_path):
    run_clean(COMPARISON, tmp_path)
