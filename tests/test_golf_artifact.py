"""golf/artifact.py: what goes in comes out, near the entropy; all else is refused in one line."""

import dataclasses
import hashlib
import json
import math
import pickle
import re
import struct
import subprocess
import sys
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest

from golf import artifact as art

ROOT = Path(__file__).resolve().parents[1]

F16, F32 = np.float16, np.float32


def quantise(weights: np.ndarray, bits: int, k: float) -> art.Quantized:
    """Round to nearest with clip k sigma a row, as the trainer's size fit does."""
    limit = 2 ** (bits - 1) - 1
    scales = (k * weights.std(axis=1) / limit).astype(F16)
    codes = np.clip(np.round(weights / scales[:, None].astype(F32)), -limit, limit)
    return art.Quantized(codes.astype(np.int8), bits, scales)


def small() -> dict[str, art.Quantized]:
    """A few tensors of every kind, 1,000 codes in all."""
    rng = np.random.default_rng(1)
    grouped = art.Quantized(rng.integers(-7, 8, (4, 6, 4)).astype(np.int8), 4, rng.random((4, 3)).astype(F16))
    return {
        "block.0/w": quantise(rng.standard_normal((16, 40)), 6, 12.85),
        "embed": quantise(rng.standard_t(4, (20, 10)), 8, 20.0),
        "grouped": grouped,
        "ternary": art.Quantized(rng.integers(-1, 2, (3, 7)).astype(np.int8), 2, np.ones(3, F16)),
        "gain": art.Quantized(rng.standard_normal(5).astype(F32)),
        "half": art.Quantized(np.array(1.5, F16)),
        "zeros": art.Quantized(np.zeros((2, 3), F32)),
    }


def same(a: art.Quantized, b: art.Quantized) -> bool:
    """Equal to the last bit, types and shapes too."""
    pairs = [(a.values, b.values), (a.scales, b.scales)]
    equal = [
        x is y is None or (x.dtype == y.dtype and x.shape == y.shape and (x == y).all()) for x, y in pairs
    ]
    return a.bits == b.bits and all(equal)


def assert_same(got: dict, expected: dict) -> None:
    assert list(got) == list(expected)
    assert [name for name in got if not same(got[name], expected[name])] == []


META = {"config": {"dim": 64, "layers": [0, 1, 1]}, "name": "caf\u00e9", "none": None, "x": 0.1}
DATA = art.pack(META, small())


# ----------------------------------------------------------------------------------------------------------
# round trips
# ----------------------------------------------------------------------------------------------------------


def test_round_trip_and_same_bytes():
    meta, tensors = art.unpack(DATA)
    assert meta == META
    assert_same(tensors, small())
    assert art.pack(dict(reversed(META.items())), small()) == DATA
    assert art.pack(meta, tensors) == DATA


@pytest.mark.parametrize("size", [1, 2, 3, 15, 16, 17, 21_846, 65_535, 65_536, 65_537, 80_000])
def test_sizes_around_the_lanes(size):
    """One lane, several, and a last row that does not fill them."""
    codes = (np.arange(size) % 61 - 30).astype(np.int8)[None]
    tensors = {"w": art.Quantized(codes, 6, np.ones(1, F16)), "b": art.Quantized(np.arange(size).astype(F32))}
    assert_same(art.unpack(art.pack({}, tensors))[1], tensors)


@pytest.mark.parametrize("bits", range(2, 9))
def test_extreme_distributions(bits):
    """A constant, one symbol among very many others, all symbols equally often, both ends of the range."""
    limit = 2 ** (bits - 1) - 1
    rng = np.random.default_rng(bits)
    rare = np.zeros(200_000, np.int8)
    rare[77_777] = -limit
    cases = [np.full(300, limit), rare, rng.integers(-limit, limit + 1, 50_000), np.array([-limit, limit])]
    tensors = {
        str(i): art.Quantized(case.astype(np.int8)[None], bits, np.ones(1, F16))
        for i, case in enumerate(cases)
    }
    assert_same(art.unpack(art.pack({}, tensors))[1], tensors)


def test_no_tensors():
    assert art.unpack(art.pack({"a": 1}, {})) == ({"a": 1}, {})


def test_layout_does_not_matter():
    """Fortran order, a slice, big-endian floats: the same tensor, the same bytes."""
    w = small()["block.0/w"]
    floats = np.arange(6, dtype=F32).reshape(2, 3)
    plain = art.pack({}, {"w": w, "f": art.Quantized(floats)})
    wide = np.repeat(w.values, 2, axis=1)[:, ::2]
    odd = art.Quantized(np.asfortranarray(wide), 6, np.repeat(w.scales, 2)[::2])
    assert art.pack({}, {"w": odd, "f": art.Quantized(np.asfortranarray(floats).astype(">f4"))}) == plain


def test_dequantised():
    q = small()["grouped"]
    expected = np.empty(q.values.shape, F32)
    for row in range(4):
        for column in range(24):
            code, scale = q.values.reshape(4, 24)[row, column], q.scales[row, column // 8]
            expected.reshape(4, 24)[row, column] = F32(code) * F32(scale)
    assert (q.dequantized() == expected).all()
    assert q.dequantized().dtype == F32
    one_a_row = small()["block.0/w"]
    product = one_a_row.values.astype(F32) * one_a_row.scales.astype(F32)[:, None]
    assert (one_a_row.dequantized() == product).all()
    assert art.Quantized(np.array([0.1], F16)).dequantized()[0] == F32(F16(0.1))


# ----------------------------------------------------------------------------------------------------------
# size
# ----------------------------------------------------------------------------------------------------------


def entropy_bytes(values: np.ndarray) -> float:
    """Order-0 entropy, by another road than the module's."""
    _, counts = np.unique(values, return_counts=True)
    p = counts / counts.sum()
    return float(-(p * np.log2(p)).sum() * counts.sum() / 8)


@pytest.mark.parametrize("tail", ["gauss", "t5"])
@pytest.mark.parametrize(("bits", "k"), [(6, 12.85), (8, 20.0)])
def test_within_one_percent_of_the_entropy(bits, k, tail):
    """The bar: tables, header, states and checksum included, fp16 scales at their entropy too."""
    rng = np.random.default_rng(0)
    draw = rng.standard_normal if tail == "gauss" else (lambda shape: rng.standard_t(5, shape))
    tensors = {str(i): quantise(draw((512, 1024)), bits, k) for i in range(3)}
    size = len(art.pack({}, tensors))
    bound = sum(entropy_bytes(q.values) for q in tensors.values())
    scales = sum(q.scales.nbytes for q in tensors.values())
    assert bound < size - 0.5 * scales
    assert size < 1.01 * bound + scales
    packed = sum(len(zlib.compress(q.values.tobytes(), 9)) for q in tensors.values())
    assert size < packed


def test_incompressible_bytes_cost_their_size():
    values = np.random.default_rng(0).integers(0, 2**15, 100_000).astype(np.uint32)
    floats = (values | 0x3F800000 | (values << 8)).view(F32)
    floats = np.where(np.isfinite(floats), floats, 0).astype(F32)
    assert len(art.pack({}, {"x": art.Quantized(floats)})) < floats.nbytes


def test_the_estimate_is_near():
    rng = np.random.default_rng(0)
    for bits, k in ((6, 12.85), (4, 3.0), (8, 20.0)):
        q = quantise(rng.standard_normal((512, 512)), bits, k)
        assert art.coded_bits(q) == pytest.approx(8 * len(art.pack({}, {"w": q})), rel=0.01)


def test_tables_are_shared_where_that_is_smaller():
    rng = np.random.default_rng(0)
    tensors = {str(i): quantise(rng.standard_normal((64, 64)), 6, 12.85) for i in range(30)}
    chosen, tables = art.group_streams([art.histogram(art.streams_of(q)[0]) for q in tensors.values()])
    assert (set(chosen), len(tables)) == ({1}, 1)
    other = quantise(rng.standard_normal((64, 64)), 6, 2.0)
    chosen, tables = art.group_streams(
        [art.histogram(art.streams_of(q)[0]) for q in (*tensors.values(), other)]
    )
    assert (chosen[-1], len(tables)) == (2, 2)
    assert all(int(table.sum()) == 2**14 for table in tables)


@pytest.mark.parametrize("seed", range(20))
def test_frequencies_sum_and_keep_every_symbol(seed):
    rng = np.random.default_rng(seed)
    counts = (rng.pareto(0.2, 256) * (rng.random(256) < rng.random())).clip(0, 1e9).astype(np.int64)
    counts[rng.integers(256)] += 1
    freqs = art.frequencies(counts)
    assert int(freqs.sum()) == 2**14
    assert ((freqs > 0) == (counts > 0)).all()


# ----------------------------------------------------------------------------------------------------------
# what pack refuses
# ----------------------------------------------------------------------------------------------------------

W = small()["block.0/w"]
WRONG_TENSORS = {
    "code out of range": (
        "w",
        dataclasses.replace(W, values=np.full_like(W.values, 32)),
        r"outside of \+-31",
    ),
    "code -128": (
        "w",
        dataclasses.replace(W, values=np.full_like(W.values, -128), bits=8),
        r"outside of \+-127",
    ),
    "1 bit": ("w", dataclasses.replace(W, bits=1), "2 to 8"),
    "9 bits": ("w", dataclasses.replace(W, bits=9), "2 to 8"),
    "int16 codes": ("w", dataclasses.replace(W, values=W.values.astype(np.int16)), "int8"),
    "no scales": ("w", dataclasses.replace(W, scales=None), "float16 scales"),
    "float32 scales": ("w", dataclasses.replace(W, scales=W.scales.astype(F32)), "float16 scales"),
    "scales of another shape": ("w", dataclasses.replace(W, scales=W.scales[:3]), r"\[rows\]"),
    "groups that do not fit": ("w", dataclasses.replace(W, scales=np.ones((16, 3), F16)), "evenly"),
    "NaN scale": ("w", dataclasses.replace(W, scales=np.full(16, np.nan, F16)), "not finite"),
    "negative scale": ("w", dataclasses.replace(W, scales=-W.scales), "negative"),
    "NaN value": ("g", art.Quantized(np.array([np.nan], F32)), "not finite"),
    "raw int8": ("g", art.Quantized(W.values), "float16 or float32"),
    "raw float64": ("g", art.Quantized(np.ones(3)), "float16 or float32"),
    "raw with scales": ("g", art.Quantized(np.ones(3, F32), 0, np.ones(3, F16)), "no scales"),
    "empty": ("g", art.Quantized(np.ones((3, 0), F32)), "holds nothing"),
    "codes without an axis": ("w", art.Quantized(np.array(1, np.int8), 4, np.array(1, F16)), r"\[rows\]"),
    "no name": ("", W, "name"),
    "long name": ("x" * 201, W, "name"),
    "nine axes": ("w", art.Quantized(np.ones((1,) * 9, F32)), "at most 8"),
}


def refused(message: str, match: str) -> None:
    """One printable line of bounded length that says `match`."""
    assert message.isprintable()
    assert len(message) < 400
    assert re.search(match, message), message


@pytest.mark.parametrize("case", WRONG_TENSORS)
def test_pack_refuses(case):
    name, q, match = WRONG_TENSORS[case]
    with pytest.raises(art.ArtifactError) as caught:
        art.pack({}, {name: q})
    refused(str(caught.value), match)


@pytest.mark.parametrize("meta", [{"x": float("nan")}, {"x": {1, 2}}, {"x": "a" * (1 << 20)}, [], None])
def test_pack_refuses_meta(meta):
    with pytest.raises(art.ArtifactError, match="meta"):
        art.pack(meta, {})


# ----------------------------------------------------------------------------------------------------------
# what unpack refuses
# ----------------------------------------------------------------------------------------------------------


def signed(body: bytes) -> bytes:
    """With the checksum of what it holds: what remains is for the other checks."""
    return body + hashlib.sha256(body).digest()


def parts(data: bytes) -> tuple[dict, bytes]:
    """(header, states and words) of an artifact, read without the module."""
    (size,) = struct.unpack_from("<I", data, 8)
    return json.loads(zlib.decompress(data[16 : 16 + size])), data[16 + size : -32]


def built(header, payload: bytes, num_words: int | None = None) -> bytes:
    """A signed artifact with any header (JSON value or bytes)."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    packed = zlib.compress(text, 9)
    words = NUM_WORDS if num_words is None else num_words
    return signed(struct.pack("<4sIII", b"GOLF", 1, len(packed), words) + packed + payload)


HEAD, PAYLOAD = parts(DATA)
(NUM_WORDS,) = struct.unpack_from("<I", DATA, 12)


def changed(change) -> bytes:
    """The small artifact after a change of its header."""
    header = json.loads(json.dumps(HEAD))
    change(header)
    return built(header, PAYLOAD)


def tensor(**values):
    """A change of the first tensor's row."""
    places = {"name": 0, "shape": 1, "bits": 2, "detail": 3, "tables": 4}

    def change(header):
        for key, value in values.items():
            header["tensors"][0][places[key]] = value

    return change


def table(change):
    return lambda header: change(header["tables"][0])


class Bomb:
    """A pickle of this would run a program."""

    def __reduce__(self):
        return (print, ("executed",))


def nested(depth: int) -> bytes:
    return b'{"meta":{"a":' + b"[" * depth + b"]" * depth + b'},"tables":[],"tensors":[]}'


def endless(*shape: int) -> bytes:
    """Tables of one symbol each, and lanes in their first state: any number of symbols in no bytes at all."""
    rows = [["w", list(shape), 8, 0, [1, 2, 2]]]
    lanes = min(2048, max(16, (math.prod(shape) + 2 * shape[0]) // 4096))
    states = struct.pack("<I", 1 << 16) * lanes
    return built({"meta": {}, "tables": [[128, 16384], [0, 16384]], "tensors": rows}, states, 0)


HOSTILE = {
    "empty": (b"", "no artifact"),
    "a pickle": (pickle.dumps(Bomb()), "no artifact"),
    "a zip": (b"PK\x03\x04" + bytes(100), "no artifact"),
    "text": (b"tensors: none\n" * 9, "no artifact"),
    "magic alone": (b"GOLF", "no artifact"),
    "one byte over the cap": (DATA + bytes(16_000_001 - len(DATA)), "16,000,000"),
    "cut off": (DATA[:-1], "checksum"),
    "a byte more": (DATA + b"\0", "checksum"),
    "a byte more, signed": (signed(DATA[:-32] + b"\0"), "promises"),
    "a word more, signed": (signed(DATA[:-32] + b"\0\0"), "promises"),
    "another version": (signed(DATA[:4] + b"\2" + DATA[5:-32]), "version 2"),
    "header longer than the file": (signed(DATA[:8] + b"\xff\xff\xff\xff" + DATA[12:-32]), "header"),
    "words longer than the file": (signed(DATA[:12] + b"\xff\xff\xff\xff" + DATA[16:-32]), "promises"),
    "a word less": (built(HEAD, PAYLOAD[:-2], NUM_WORDS - 1), "before the tensors"),
    "a word more": (built(HEAD, PAYLOAD + b"\0\0", NUM_WORDS + 1), "do not end"),
    "state 0": (built(HEAD, bytes(4) + PAYLOAD[4:]), "state of the coder"),
    "not zlib": (signed(struct.pack("<4sIII", b"GOLF", 1, 9, 0) + b"not zlib!"), "unpacked"),
    "a zlib bomb": (built(b" " * (100 << 20), PAYLOAD), "1,048,576"),
    "not JSON": (built(b"{", PAYLOAD), "not JSON"),
    "not UTF-8": (built(b'{"\xff":1}', PAYLOAD), "not JSON"),
    "nested too deep": (built(nested(200_000), PAYLOAD), "not JSON"),
    "a number of 5,000 digits": (built(b'{"meta":{"a":' + b"9" * 5000 + b"}}", PAYLOAD), "not JSON"),
    "NaN in meta": (built(b'{"meta":{"a":NaN},"tables":[],"tensors":[]}', PAYLOAD), "not JSON"),
    "infinity in meta": (built(b'{"meta":{"a":-1e999},"tables":[],"tensors":[]}', PAYLOAD), "not JSON"),
    "a key twice": (built(b'{"meta":{},"meta":{},"tables":[],"tensors":[]}', PAYLOAD), "a key twice"),
    "a list": (built([], PAYLOAD), "meta, tables and tensors"),
    "a key more": (changed(lambda h: h.update(more=1)), "meta, tables and tensors"),
    "meta is a list": (changed(lambda h: h.update(meta=[])), "meta, tables and tensors"),
    "too many tables": (changed(lambda h: h.update(tables=[[0, 16384]] * 65)), "tables must be a list"),
    "too many tensors": (changed(lambda h: h.update(tensors=h["tensors"] * 600)), "tensors must be a list"),
    "one name twice": (changed(lambda h: h["tensors"].append(h["tensors"][0])), "one name"),
    "a row that is short": (changed(lambda h: h["tensors"][0].pop()), "row must be"),
    "name is a number": (changed(tensor(name=7)), "row must be"),
    "no such table": (changed(tensor(tables=[99, 1, 1])), "tables"),
    "table -1": (changed(tensor(tables=[-1, 1, 1])), "tables"),
    "tables true": (changed(tensor(tables=[True, 1, 1])), "tables"),
    "tables that are too many": (changed(tensor(tables=[1, 1, 1, 1])), "tables"),
    "size 0": (changed(tensor(shape=[0, 40])), "shape"),
    "size -1": (changed(tensor(shape=[-16, -40])), "shape"),
    "size is a float": (changed(tensor(shape=[16.0, 40])), "shape"),
    "shape is a text": (changed(tensor(shape="16")), "shape"),
    "product over 2**64": (changed(tensor(shape=[2**31 - 1] * 8)), "symbols in"),
    "product that is 0 in 64 bits": (changed(tensor(shape=[2**16] * 4)), "symbols in"),
    "bits 9": (changed(tensor(bits=9)), "bits"),
    "bits 1": (changed(tensor(bits=1)), "bits"),
    "bits true": (changed(tensor(bits=True)), "bits"),
    "bits false": (changed(tensor(bits=False, detail="<f4")), "bits"),
    "object dtype": (changed(tensor(bits=0, detail="|O")), "dtype"),
    "groups that do not fit": (changed(tensor(detail=3)), "evenly"),
    "more groups than columns": (changed(tensor(detail=80)), "evenly"),
    "codes out of range": (changed(tensor(bits=2)), r"outside of \+-1"),
    "a table that sums to less": (changed(table(lambda t: t.pop())), "sum to 16384"),
    "a table beyond 255": (changed(table(lambda t: t.__setitem__(0, 250))), "sum to 16384"),
    "a negative frequency": (
        changed(table(lambda t: t.__setitem__(slice(None), [0, -1, 16385]))), "sum to 16384",
    ),
    "a table of floats": (changed(table(lambda t: t.__setitem__(slice(None), [0, 16384.0]))), "sum to 16384"),
    "2**40 symbols in no bytes": (endless(1 << 20, 1 << 20), "symbols in"),
    "2 million symbols in 150 bytes": (endless(1000, 2000), "symbols in"),
}  # fmt: skip


def test_a_file_over_the_cap_is_not_read(tmp_path):
    path = tmp_path / "model.golf"
    path.write_bytes(DATA)
    assert art.read(path) == DATA
    with path.open("ab") as file:
        file.truncate(1 << 33)
    tracemalloc.start()
    try:
        with pytest.raises(art.ArtifactError, match="more than 16,000,000 bytes; quantise further"):
            art.read(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 40e6


@pytest.mark.parametrize("case", HOSTILE)
def test_unpack_refuses(case, capsys):
    data, match = HOSTILE[case]
    tracemalloc.start()
    try:
        with pytest.raises(art.ArtifactError) as caught:
            art.unpack(data)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    refused(str(caught.value), match)
    assert peak < 24e6, "memory was taken before the refusal"
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("value", [np.nan, np.inf, -1.0])
def test_scales_and_values_are_checked_after_decoding(value, monkeypatch):
    for check in ("_check_scales", "_check_finite"):
        monkeypatch.setattr(art, check, lambda what, values: None)
    bad_scale = art.pack({}, {"w": dataclasses.replace(W, scales=np.full(16, value, F16))})
    bad_value = art.pack({}, {"g": art.Quantized(np.array([value], F32))})
    monkeypatch.undo()
    with pytest.raises(art.ArtifactError, match="a scale is negative or not finite"):
        art.unpack(bad_scale)
    if value != -1.0:
        with pytest.raises(art.ArtifactError, match="a value is not finite"):
            art.unpack(bad_value)


def test_a_constant_tensor_may_cost_nothing():
    """The bound on symbols leaves room for what is honest: a million zeros in a small file."""
    _, tensors = art.unpack(endless(1000, 1000))
    assert not tensors["w"].values.any()


# ----------------------------------------------------------------------------------------------------------
# fuzz
# ----------------------------------------------------------------------------------------------------------


def mutate(rng: np.random.Generator, data: bytes) -> bytes:
    """Bits flipped, bytes set, cut, added, moved, doubled."""
    body, kind = bytearray(data), int(rng.integers(6))
    at, other = sorted(int(i) for i in rng.integers(0, len(body), 2))
    if kind == 0:
        for i in rng.integers(0, len(body), int(rng.integers(1, 5))):
            body[i] ^= 1 << int(rng.integers(8))
    elif kind == 1:
        body[at] = int(rng.choice([0, 1, 127, 128, 255]))
    elif kind == 2:
        del body[at : at + int(rng.integers(1, 9))]
    elif kind == 3:
        body[at:at] = rng.bytes(int(rng.integers(1, 9)))
    elif kind == 4:
        body[at:other] = body[at:other][::-1]
    else:
        body[at:other] = body[at:other] * 2
    return bytes(body)


def mutate_header(rng: np.random.Generator) -> bytes:
    """A number, a text or a list of the header exchanged for another value; signed and packed again."""
    header = json.loads(json.dumps(HEAD))
    node, values = header, [0, 1, -1, 2, 7, 255, 16384, 2**31, 2**63, 1.5, "", "<f2", None, True, [], {}, [1]]
    while True:
        keys = list(node) if isinstance(node, dict) else range(len(node))
        key = keys[int(rng.integers(len(keys)))]
        if not isinstance(node[key], dict | list) or not node[key] or rng.random() < 0.1:
            break
        node = node[key]
    node[key] = values[int(rng.integers(len(values)))]
    return built(header, PAYLOAD)


def test_ten_thousand_mutations():
    """Each is refused, or decodes to sound tensors; memory stays bounded; most get past the checksum."""
    rng = np.random.default_rng(0)
    refusals, decoded, peak = {}, 0, 0
    tracemalloc.start()
    for i in range(10_500):
        data = (mutate(rng, DATA), mutate_header(rng), signed(mutate(rng, DATA[:-32])))[i % 3]
        try:
            _, tensors = art.unpack(data)
        except art.ArtifactError as error:
            refused(str(error), "")
            stage = str(error).split(";")[0][:24]
            refusals[stage] = refusals.get(stage, 0) + 1
        else:
            decoded += 1
            assert all(np.isfinite(q.dequantized()).all() for q in tensors.values())
        if i == 3_000:  # measuring takes four times as long as decoding
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
    assert 0 < peak < 24e6
    assert decoded > 100, "no mutation was harmless: the fuzz does not reach the decoder"
    assert len(refusals) > 15, f"the fuzz meets few of the checks: {refusals}"


def test_it_needs_numpy_alone(tmp_path):
    """The scoring process loads it without torch; nothing of the file is unpickled."""
    (tmp_path / "model.golf").write_bytes(DATA)
    code = (
        "import numpy, sys; sys.modules['torch'] = sys.modules['pickle'] = None\n"
        "sys.path.insert(0, sys.argv[1])\n"
        "import artifact; print(sorted(artifact.unpack(open('model.golf', 'rb').read())[1]))"
    )
    command = [sys.executable, "-c", code, str(ROOT / "golf")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == f"{sorted(small())}\n", done.stderr
