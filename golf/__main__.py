"""The packed code as a program: `python code.zip --mode ...` trains, `python code.zip score ...` scores.

Python runs an archive whatever its name; in a submission's folder it is called train_gpt.py. In the project,
`python -m golf ...` does the same.
"""

import runpy
import sys
import tempfile
import zipfile
from pathlib import Path


def main() -> None:
    """Unpack, if this is inside of an archive, and run the program that the first argument asks for."""
    is_score = sys.argv[1:2] == ["score"]
    home, program = Path(__file__).resolve().parents[1], "score.py" if is_score else "train_golf.py"
    with tempfile.TemporaryDirectory() as folder:
        if home.is_file():
            with zipfile.ZipFile(home) as archive:
                archive.extractall(folder)
            # What came from the archive is imported anew from files: kernels are compiled from their sources.
            sys.path = [entry for entry in sys.path if entry and Path(entry).resolve() != home]
            for name in [name for name in sys.modules if name.split(".")[0] == "golf"]:
                del sys.modules[name]
            home = Path(folder)
        path = home / "golf" / program
        sys.argv = [str(path), *sys.argv[1 + is_score :]]
        sys.path.insert(0, str(path.parent))
        runpy.run_path(str(path), run_name="__main__")


if __name__ == "__main__":
    main()
