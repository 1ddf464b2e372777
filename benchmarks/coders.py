"""How near do coders come to the entropy of quantised weights? The artifact's own against general ones.

    python benchmarks/coders.py                  # normal and t5 weights, int6 at k 12.85, int8 at k 20
    python benchmarks/coders.py logs/golf/RUN    # those of a trained artifact

One line a coder: bytes above the order-0 entropy of the codes (with tables and headers, without scales), and
seconds on one core. brotli only where it is installed; it is no requirement.
"""

import argparse
import importlib.util
import lzma
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))

from golf import artifact  # noqa: E402

SHAPE = (6144, 1024)  # 6.3 M weights
CASES = (("normal", 6, 12.85), ("t5", 6, 12.85), ("normal", 8, 20.0), ("t5", 8, 20.0))


def quantised(weights: np.ndarray, bits: int, k: float) -> np.ndarray:
    """int8 codes, rounded to nearest, of rows that span k standard deviations."""
    most = 2 ** (bits - 1) - 1
    steps = (k * weights.std(axis=1) / most).astype(np.float16).astype(np.float32)
    return np.clip(np.round(weights / steps[:, None]), -most, most).astype(np.int8)


def ours(tensors: list[np.ndarray]) -> int:
    """Bytes of states, words and packed tables."""
    streams = [codes.reshape(-1).view(np.uint8) ^ 0x80 for codes in tensors]
    chosen, tables = artifact.group_streams([artifact.histogram(stream) for stream in streams])
    states, words = artifact.encode(streams, [[artifact.UNIFORM, *tables][i] for i in chosen])
    return states.nbytes + words.nbytes + len(zlib.compress(repr([t.tolist() for t in tables]).encode(), 9))


def huffman(data: bytes) -> bytes:
    packer = zlib.compressobj(9, zlib.DEFLATED, 15, 9, zlib.Z_HUFFMAN_ONLY)
    return packer.compress(data) + packer.flush()


def coders() -> Iterator[tuple[str, Callable[[list[np.ndarray]], int]]]:
    """(name, bytes that it makes of the tensors)."""
    import zstandard

    def each(pack: Callable[[bytes], bytes]) -> Callable[[list[np.ndarray]], int]:
        return lambda tensors: sum(len(pack(codes.tobytes())) for codes in tensors)

    yield "rANS (artifact.py)", ours
    yield "zlib, Huffman only", each(huffman)
    yield "zlib -9", each(lambda data: zlib.compress(data, 9))
    yield "zstd -22", each(zstandard.ZstdCompressor(level=22).compress)
    yield "lzma -9", each(lambda data: lzma.compress(data, preset=9))
    if importlib.util.find_spec("brotli"):
        import brotli

        yield "brotli -11", each(lambda data: brotli.compress(data, quality=11, lgwin=24))


def compare(name: str, tensors: list[np.ndarray]) -> None:
    """Print the lines of one set of tensors."""
    count = sum(codes.size for codes in tensors)
    counts = [artifact.histogram(codes.reshape(-1).view(np.uint8)) for codes in tensors]
    bound = sum(map(artifact.entropy_bits, counts)) / 8
    print(f"{name}: {count:,} codes, {8 * bound / count:.4f} bits each", flush=True)
    for coder, size_of in coders():
        began = time.perf_counter()
        size = size_of(tensors)
        seconds = time.perf_counter() - began
        print(f"  {coder:20} {100 * (size / bound - 1):+6.2f} % {seconds:6.1f} s", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("run", nargs="?", type=Path, help="folder with a model.golf; else synthetic weights")
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: error: {message}\n")  # one line
    args = parser.parse_args()
    if args.run is None:
        rng = np.random.default_rng(0)
        for kind, bits, k in CASES:
            weights = rng.standard_normal(SHAPE) if kind == "normal" else rng.standard_t(5, SHAPE)
            compare(f"{kind} weights, int{bits}, k {k:g}", [quantised(weights, bits, k)])
        return 0
    try:
        _, tensors = artifact.unpack(artifact.read(args.run / "model.golf"))
    except (OSError, artifact.ArtifactError) as error:
        print(f"coders.py: error: {error}", file=sys.stderr)
        return 2
    for is_embed in (False, True):
        chosen = [q.values for name, q in tensors.items() if q.bits and (name == "embed") == is_embed]
        compare(f"{args.run.name}, {'embedding' if is_embed else 'matrices'}", chosen)
    return 0


if __name__ == "__main__":
    sys.exit(main())
