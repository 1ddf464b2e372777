"""The 16 MB contest: trainer, artifact, tokenizers, scorer."""

from pathlib import Path

LOG = "train.txt"


def log_of(run: Path) -> Path:
    """The log of a run: in its folder, or beside that under the folder's name, as run.sh wants it."""
    return run / LOG if (run / LOG).exists() else run.with_name(f"{run.name}.txt")
