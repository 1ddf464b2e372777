"""The 16 MB artifact: quantised tensors in one file, coded by an interleaved rANS coder. Needs numpy alone.

    offset  size        content (little-endian)
    0       16          magic "GOLF", format version, bytes of the packed header, number of 16-bit words
    16      header      zlib of a JSON object: meta, frequency tables, tensor table
    ...     4 * lanes   final states of the coder, uint32; `lanes_of` the number of symbols
    ...     2 * words   the coded words
    ...     32          SHA-256 of all before it; nothing may follow

A tensor is one or more streams of byte symbols: its codes (+128), and each byte of its floats apart (the high
bytes of fp16 scales cost half of the low ones). All streams are coded one after the other by the same lanes:
lane j takes symbols j, j + lanes, ... of a stream, so that numpy works on whole rows. Each stream names a
frequency table; streams share one where that is smaller. Table 0 is uniform, 8 bits a symbol, for a stream
that no table shortens. Source of the coder: Duda, arXiv 1311.2540; interleaving: Giesen, arXiv 1402.3392.

Whatever `unpack` is given, it either returns tensors or raises ArtifactError, and takes no memory that the
file's length does not allow. Nothing in a file is executed.
"""

import hashlib
import json
import math
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

MAGIC, VERSION = b"GOLF", 1
HEAD = struct.Struct("<4sIII")
DIGEST_BYTES = 32
CAP_BYTES = 16_000_000  # decimal, with the code; no artifact is larger
HEADER_BYTES = 1 << 20  # of JSON, at most
MAX_TENSORS, MAX_DIMS, MAX_NAME, MAX_TABLES = 4096, 8, 200, 64
# Symbols that a file of n bytes may hold: one of probability 1 costs nothing, so the length is no bound.
FREE_SYMBOLS, SYMBOLS_PER_BYTE = 1 << 20, 16

PROB_BITS = 14  # a stream's frequencies sum to 2**14
STATE_LOW = 1 << 16  # states stay in [2**16, 2**32); words are 16 bits
MIN_LANES, MAX_LANES, SYMBOLS_PER_LANE = 16, 2048, 4096  # a lane costs about 3 bytes
CHUNK = 1 << 20  # of a count over many symbols
DAMAGED = "the file is damaged, copy it again"
RAW_DTYPES = {"<f2": np.dtype("<f2"), "<f4": np.dtype("<f4")}


class ArtifactError(ValueError):
    """Not an artifact, or tensors that cannot be one: value, rule and remedy on one line."""


def _require(sound: bool, fault: str) -> None:
    if not sound:
        raise ArtifactError(fault)


@dataclass(frozen=True, eq=False)
class Quantized:
    """A tensor as codes and scales, or (bits 0, scales None) as the float16 or float32 values themselves.

    Codes of b bits, 2 to 8, lie in [-(2**(b-1) - 1), 2**(b-1) - 1]. Scales are one a row, or one a group of
    columns / groups consecutive columns of it; a row is the first axis, its columns all others.
    """

    values: np.ndarray  # int8 codes, or float16 or float32, of the tensor's shape
    bits: int = 0
    scales: np.ndarray | None = None  # float16 [rows] or [rows, groups], finite and not negative

    def dequantized(self) -> np.ndarray:
        """float32 of the tensor's shape: code times scale, rounded once."""
        if self.scales is None:
            return self.values.astype(np.float32)
        rows = len(self.values)
        codes = self.values.reshape(rows, self.scales.size // rows, -1).astype(np.float32)
        return (codes * self.scales.astype(np.float32).reshape(rows, -1, 1)).reshape(self.values.shape)


# 1. streams -------------------------------------------------------------------------------------------------


def streams_of(q: Quantized) -> list[np.ndarray]:
    """uint8 [symbols] each: codes + 128, or the bytes of the floats, low ones first."""
    if q.scales is None:
        return _planes(q.values)
    codes = np.ascontiguousarray(q.values).reshape(-1).view(np.uint8) ^ 0x80
    return [codes, *_planes(q.scales)]


def _planes(floats: np.ndarray) -> list[np.ndarray]:
    little = np.ascontiguousarray(floats, dtype=floats.dtype.newbyteorder("<")).reshape(-1)
    return list(np.ascontiguousarray(little.view(np.uint8).reshape(len(little), -1).T))


def _floats(planes: list[np.ndarray], dtype: np.dtype, shape: list[int]) -> np.ndarray:
    return np.ascontiguousarray(np.stack(planes, axis=1)).view(dtype).reshape(shape)


def histogram(symbols: np.ndarray) -> np.ndarray:
    """int64 [256]: how often each byte occurs."""
    counts = np.zeros(256, dtype=np.int64)
    for start in range(0, len(symbols), CHUNK):
        counts += np.bincount(symbols[start : start + CHUNK], minlength=256)
    return counts


def entropy_bits(counts: np.ndarray) -> float:
    """Bits that symbols of these counts take at least, coded one by one with a fixed table."""
    total, seen = int(counts.sum()), counts[counts > 0].astype(np.float64)
    return float(total * math.log2(total) - (seen * np.log2(seen)).sum()) if total else 0.0


def table_bits(counts: np.ndarray) -> float:
    """About what a table costs in the packed header: 15 bits a frequency, first to last symbol."""
    seen = np.flatnonzero(counts)
    return 15.0 * (int(seen[-1]) - int(seen[0]) + 3)


def coded_bits(q: Quantized) -> float:
    """Estimate of a tensor's size in the artifact, in bits: from its histograms, with tables of its own."""
    counts = [histogram(stream) for stream in streams_of(q)]
    return sum(min(entropy_bits(c) + table_bits(c), 8.0 * c.sum()) for c in counts)


# 2. frequency tables ----------------------------------------------------------------------------------------


def frequencies(counts: np.ndarray) -> np.ndarray:
    """uint32 [256] that sum to 2**PROB_BITS, at least 1 where a count is."""
    total = int(counts.sum())
    freqs = np.where(counts > 0, np.maximum(1, (counts * 2**PROB_BITS + total // 2) // total), 0)
    excess = int(freqs.sum()) - 2**PROB_BITS
    for _ in range(abs(excess)):  # at most 256; the largest ones feel it least
        freqs[np.argmax(freqs)] -= int(math.copysign(1, excess))
    return freqs.astype(np.uint32)


UNIFORM = np.full(256, 2**PROB_BITS // 256, dtype=np.uint32)


def group_streams(histograms: list[np.ndarray]) -> tuple[list[int], list[np.ndarray]]:
    """(table of each stream, tables from number 1 on): each stream joins the table where it costs least."""
    groups: list[np.ndarray] = []  # counts that the streams of a table have together
    chosen = []
    for counts in histograms:
        costs = [8.0 * counts.sum()]
        costs += [entropy_bits(g + counts) + table_bits(g + counts) - _cost(g) for g in groups]
        costs.append(_cost(counts) if len(groups) < MAX_TABLES else math.inf)
        best = int(np.argmin(costs))
        chosen.append(best)
        if best > len(groups):
            groups.append(counts)
        elif best:
            groups[best - 1] = groups[best - 1] + counts
    return chosen, [frequencies(g) for g in groups]


def _cost(counts: np.ndarray) -> float:
    return entropy_bits(counts) + table_bits(counts)


def lanes_of(num_symbols: int) -> int:
    """Lanes of the coder for this many symbols in all: few, because each costs bytes; many, for speed."""
    return min(MAX_LANES, max(MIN_LANES, num_symbols // SYMBOLS_PER_LANE))


# 3. the coder -----------------------------------------------------------------------------------------------


def encode(streams: list[np.ndarray], tables: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """(uint32 [lanes] states, uint16 [words]) of the streams, each with its table (uint32 [256])."""
    lanes = lanes_of(sum(map(len, streams)))
    states = np.full(lanes, STATE_LOW, dtype=np.uint32)
    words = []  # last first: what is coded last is read first
    for symbols, freqs in zip(reversed(streams), reversed(tables), strict=True):
        starts = np.cumsum(freqs, dtype=np.uint32) - freqs
        for begin in range((len(symbols) - 1) // lanes * lanes, -1, -lanes):
            row = symbols[begin : begin + lanes]
            freq, x = freqs[row], states[: len(row)]
            full = x >> (32 - PROB_BITS) >= freq
            words.append(x[full].astype(np.uint16))
            x[full] >>= 16
            quotient = x // freq
            x[:] = (quotient << PROB_BITS) + (x - quotient * freq) + starts[row]
    return states, np.concatenate(words[::-1]) if words else np.empty(0, np.uint16)


def decode(
    states: np.ndarray,  # uint32 [lanes], is changed
    words: np.ndarray,  # uint16
    lengths: list[int],  # symbols of each stream
    tables: list[np.ndarray],  # uint32 [256] of each stream
) -> list[np.ndarray]:
    """The streams (uint8 [symbols] each); all states must end where the encoder began."""
    lanes, at, streams = len(states), 0, []
    slots: dict[int, tuple] = {}
    for length, freqs in zip(lengths, tables, strict=True):
        if id(freqs) not in slots:
            symbol = np.repeat(np.arange(256, dtype=np.uint8), freqs)
            offset = (
                np.arange(2**PROB_BITS, dtype=np.uint32) - (np.cumsum(freqs, dtype=np.uint32) - freqs)[symbol]
            )
            slots[id(freqs)] = symbol, freqs[symbol], offset
        symbol, freq, offset = slots[id(freqs)]
        out = np.empty(length, dtype=np.uint8)
        for begin in range(0, length, lanes):
            row = out[begin : begin + lanes]
            x = states[: len(row)]
            slot = x & (2**PROB_BITS - 1)
            row[:] = symbol[slot]
            x[:] = freq[slot] * (x >> PROB_BITS) + offset[slot]
            empty = (x < STATE_LOW).nonzero()[0]
            taken = words[at : at + len(empty)]
            _require(len(taken) == len(empty), f"the coded words end before the tensors do; {DAMAGED}")
            x[empty] = (x[empty] << 16) | taken
            at += len(empty)
        streams.append(out)
    ended = at == len(words) and bool((states == STATE_LOW).all())
    _require(ended, f"the coded words do not end with the tensors; {DAMAGED}")
    return streams


# 4. writing -------------------------------------------------------------------------------------------------


def pack(meta: dict, tensors: dict[str, Quantized]) -> bytes:
    """The artifact of these tensors; equal input gives equal bytes. It may be longer than the cap allows.

    meta: whatever JSON can say, without NaN; lists come back for tuples.
    """
    rows, streams = [], []
    for name, q in tensors.items():
        rows.append(_row_of(name, q))
        streams += streams_of(q)
    chosen, tables = group_streams([histogram(stream) for stream in streams])
    numbers = iter(chosen)
    for row in rows:
        row.append([next(numbers) for _ in range(_Tensor(*row, []).num_streams)])
    head = {"meta": meta, "tables": [_table_row(table) for table in tables], "tensors": rows}
    try:
        text = json.dumps(head, separators=(",", ":"), sort_keys=True, allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise ArtifactError(f"meta is not JSON ({error}); keep it to plain finite values") from None
    header = zlib.compress(text, 9)
    states, words = encode(streams, [([UNIFORM, *tables])[i] for i in chosen])
    front = HEAD.pack(MAGIC, VERSION, len(header), len(words)) + header
    data = front + states.astype("<u4").tobytes() + words.astype("<u2").tobytes()
    data += hashlib.sha256(data).digest()
    _layout(text, len(data))  # what cannot be read must not be written
    return data


def _row_of(name: str, q: Quantized) -> list:
    """[name, shape, bits, groups or dtype], once the arrays are what the dataclass promises."""
    what, shape, scales = f"tensor {str(name)[:MAX_NAME]!r}", list(map(int, q.values.shape)), q.scales
    _require(q.values.size > 0, f"{what}: shape {shape} holds nothing; leave it out")
    if q.bits == 0:
        dtype = q.values.dtype.newbyteorder("<").str
        fits = scales is None and dtype in RAW_DTYPES
        _require(
            fits, f"{what}: {q.values.dtype} without bits must be float16 or float32, and have no scales"
        )
        _check_finite(what, q.values)
        return [name, shape, 0, dtype]
    fits = (
        q.bits in range(2, 9) and q.values.dtype == np.int8 and getattr(scales, "dtype", None) == np.float16
    )
    _require(fits, f"{what}: {q.bits} bits of {q.values.dtype}; must be 2 to 8 of int8, with float16 scales")
    groups = scales.shape[1] if scales.ndim == 2 else 0
    fits = bool(shape) and scales.shape in ((shape[0],), (shape[0], groups))
    _require(fits, f"{what}: scales {scales.shape} for {shape}; must be [rows] or [rows, groups]")
    _check_range(what, q.values, q.bits)
    _check_scales(what, scales)
    return [name, shape, int(q.bits), groups]


def _check_range(what: str, codes: np.ndarray, bits: int) -> None:
    limit = 2 ** (bits - 1) - 1
    fits = -limit <= int(codes.min()) and int(codes.max()) <= limit
    _require(fits, f"{what}: a code is outside of +-{limit}, the range of {bits} bits; quantise again")


def _check_finite(what: str, values: np.ndarray) -> None:
    _require(bool(np.isfinite(values).all()), f"{what}: a value is not finite; train or quantise again")


def _check_scales(what: str, scales: np.ndarray) -> None:
    sound = bool((np.isfinite(scales) & (scales >= 0)).all())
    _require(sound, f"{what}: a scale is negative or not finite; quantise again")


def _table_row(freqs: np.ndarray) -> list[int]:
    """[first symbol, frequencies up to the last one that occurs]."""
    seen = np.flatnonzero(freqs)
    return [int(seen[0]), *map(int, freqs[seen[0] : seen[-1] + 1])]


# 5. reading -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Tensor:
    """A row of the header's tensor table."""

    name: str
    shape: list[int]
    bits: int
    detail: str | int  # dtype of a raw tensor; groups of a row's scales, 0 for one scale without an axis
    tables: list[int]  # of each stream

    @property
    def size(self) -> int:
        return math.prod(self.shape)  # Python's integers do not overflow

    @property
    def scale_shape(self) -> list[int]:
        return [self.shape[0], self.detail] if self.detail else self.shape[:1]

    @property
    def num_streams(self) -> int:
        return RAW_DTYPES[self.detail].itemsize if self.bits == 0 else 3

    def lengths(self) -> list[int]:
        """Symbols of each stream."""
        if self.bits == 0:
            return [self.size] * self.num_streams
        return [self.size, *[math.prod(self.scale_shape)] * 2]


def read(path: Path) -> bytes:
    """What a file holds. ArtifactError where that is more than the cap: then most of it is not read."""
    with path.open("rb") as file:
        data = file.read(CAP_BYTES + 1)
    _require(len(data) <= CAP_BYTES, f"{path}: more than {CAP_BYTES:,} bytes; quantise further")
    return data


def unpack(data: bytes) -> tuple[dict, dict[str, Quantized]]:
    """(meta, tensors) of an artifact. Raises ArtifactError for all that `pack` did not write."""
    _require(
        len(data) <= CAP_BYTES,
        f"{len(data):,} bytes; an artifact has at most {CAP_BYTES:,}: quantise further",
    )
    is_ours = len(data) >= HEAD.size + DIGEST_BYTES and data[:4] == MAGIC
    _require(
        is_ours, f"no artifact: begins with {bytes(data[:4])!r}, not {MAGIC!r}; name a file that `pack` wrote"
    )
    _, version, header_bytes, num_words = HEAD.unpack_from(data)
    _require(
        version == VERSION, f"format version {version}, not {VERSION}; read it with the program that wrote it"
    )
    digest = hashlib.sha256(memoryview(data)[:-DIGEST_BYTES]).digest()
    _require(
        digest == data[-DIGEST_BYTES:], f"the checksum is wrong, or bytes are missing or added; {DAMAGED}"
    )
    end = HEAD.size + header_bytes
    meta, tables, tensors = _layout(_inflate(data[HEAD.size : end]), len(data))
    lengths = [length for tensor in tensors for length in tensor.lengths()]
    lanes = lanes_of(sum(lengths))
    expected = end + 4 * lanes + 2 * num_words + DIGEST_BYTES
    _require(len(data) == expected, f"{len(data):,} bytes, but its header promises {expected:,}; {DAMAGED}")
    states = np.frombuffer(data, "<u4", lanes, end).astype(np.uint32)
    _require(bool((states >= STATE_LOW).all()), f"a state of the coder is below {STATE_LOW}; {DAMAGED}")
    words = np.frombuffer(data, "<u2", num_words, end + 4 * lanes)
    chosen = [tables[i] for tensor in tensors for i in tensor.tables]
    streams = iter(decode(states, words, lengths, chosen))
    return meta, {tensor.name: _tensor_of(tensor, streams) for tensor in tensors}


def _tensor_of(tensor: _Tensor, streams) -> Quantized:
    """Take a tensor's streams from the iterator."""
    what = f"tensor {tensor.name!r}"
    parts = [next(streams) for _ in range(tensor.num_streams)]
    if tensor.bits == 0:
        values = _floats(parts, RAW_DTYPES[tensor.detail], tensor.shape)
        _check_finite(what, values)
        return Quantized(values)
    scales = _floats(parts[1:], np.dtype("<f2"), tensor.scale_shape)
    _check_scales(what, scales)
    codes = (parts[0] ^ 0x80).view(np.int8).reshape(tensor.shape)
    _check_range(what, codes, tensor.bits)
    return Quantized(codes, tensor.bits, scales)


def _inflate(header: bytes) -> bytes:
    """The header's JSON text, never more than HEADER_BYTES of it."""
    unpacker = zlib.decompressobj()
    try:
        text = unpacker.decompress(header, HEADER_BYTES)
    except zlib.error as error:
        raise ArtifactError(f"the header cannot be unpacked ({error}); {DAMAGED}") from None
    is_whole = unpacker.eof and not unpacker.unused_data
    _require(is_whole, f"the header is cut off, or longer than {HEADER_BYTES:,} bytes; {DAMAGED}")
    return text


def _unique(pairs: list[tuple]) -> dict:
    keys = dict(pairs)
    if len(keys) < len(pairs):
        raise ValueError("a key twice")
    return keys


def _no_constant(text: str):
    raise ValueError(f"{text} is not JSON")


def _finite(text: str) -> float:
    if not math.isfinite(float(text)):
        raise ValueError(f"{text[:20]} is beyond all floats")
    return float(text)


def _layout(text: bytes, num_bytes: int) -> tuple[dict, list[np.ndarray], list[_Tensor]]:
    """(meta, tables with the uniform one, tensor rows) of a header in a file of num_bytes, all checked."""
    _require(
        len(text) <= HEADER_BYTES, f"a header of {len(text):,} bytes, not {HEADER_BYTES:,} at most; cut meta"
    )
    try:
        head = json.loads(
            text.decode(), object_pairs_hook=_unique, parse_constant=_no_constant, parse_float=_finite
        )
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"the header is not JSON ({str(error)[:80]!r}); {DAMAGED}") from None
    sound = type(head) is dict and set(head) == {"meta", "tables", "tensors"} and type(head["meta"]) is dict
    _require(sound, f"the header must hold meta, tables and tensors alone; {DAMAGED}")
    for key, most in (("tables", MAX_TABLES), ("tensors", MAX_TENSORS)):
        sound = type(head[key]) is list and len(head[key]) <= most
        _require(sound, f"the header's {key} must be a list of at most {most}; {DAMAGED}")
    tables = [UNIFORM, *map(_table_of, head["tables"])]
    tensors = [_row_read(row, len(tables)) for row in head["tensors"]]
    _require(
        len({tensor.name for tensor in tensors}) == len(tensors), "two tensors have one name; rename one"
    )
    total, most = sum(sum(t.lengths()) for t in tensors), FREE_SYMBOLS + SYMBOLS_PER_BYTE * num_bytes
    _require(
        total <= most, f"{total:,} symbols in {num_bytes:,} bytes, at most {most:,} are read; leave some out"
    )
    return head["meta"], tables, tensors


def _whole(value, least: int, most: int) -> bool:
    return type(value) is int and least <= value <= most


def _table_of(row) -> np.ndarray:
    """uint32 [256] of a table's row."""
    sound = type(row) is list and len(row) >= 2 and _whole(row[0], 0, 257 - len(row))
    sound = sound and all(_whole(f, 0, 2**PROB_BITS) for f in row[1:]) and sum(row[1:]) == 2**PROB_BITS
    _require(sound, f"a table must be a symbol and frequencies that sum to {2**PROB_BITS}; {DAMAGED}")
    freqs = np.zeros(256, dtype=np.uint32)
    freqs[row[0] : row[0] + len(row) - 1] = row[1:]
    return freqs


def _row_read(row, num_tables: int) -> _Tensor:
    """A row of the tensor table, all of it checked."""
    sound = type(row) is list and len(row) == 5 and type(row[0]) is str and 0 < len(row[0]) <= MAX_NAME
    _require(sound, f"a tensor's row must be name, shape, bits, detail, tables; {DAMAGED}")
    name, shape, bits, detail, numbers = row
    what = f"tensor {name!r}"
    sound = type(shape) is list and len(shape) <= MAX_DIMS and all(_whole(n, 1, 2**31 - 1) for n in shape)
    _require(sound, f"{what}: its shape must be a list of at most {MAX_DIMS} sizes from 1; {DAMAGED}")
    if _whole(bits, 0, 0):
        sound = type(detail) is str and detail in RAW_DTYPES
    else:
        columns = math.prod(shape[1:])
        sound = _whole(bits, 2, 8) and len(shape) > 0 and _whole(detail, 0, columns)
        sound = sound and columns % (detail or 1) == 0
    _require(
        sound, f"{what}: must have 0 bits and a dtype, or 2 to 8 and groups that part the columns evenly"
    )
    tensor = _Tensor(name, shape, bits, detail, numbers)
    sound = type(numbers) is list and all(_whole(n, 0, num_tables - 1) for n in numbers)
    sound = sound and len(numbers) == tensor.num_streams
    _require(sound, f"{what}: must name {tensor.num_streams} of {num_tables} tables; {DAMAGED}")
    return tensor
