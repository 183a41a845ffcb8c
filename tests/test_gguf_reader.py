"""Our reader and writer against each other, against gguf-py, and against files that lie."""

import struct
from concurrent.futures import wait

import gguf
import numpy as np
import pytest
import tiny
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from llama_oracle import Llama
from safetensors.torch import load_file

from luthier.gguf import GGUFFile
from luthier.gguf.convert import read_config, write_gguf
from luthier.gguf.types import F32, Q8_0
from luthier.gguf.writer import GGUFWriter, TensorInfo, plan

METADATA = {
    "general.architecture": "test",
    "a.bool": True,
    "an.int": 7,
    "a.negative": -7,
    "a.large.int": 1 << 40,
    "a.float": 0.5,
    "strings": ["a", "β", ""],
    "ints": [1, -2],
    "floats": [0.5, 1.5],
    "bools": [True, False],
    "nothing": np.zeros(0, np.float32),
}


def write(path, metadata=METADATA, tensors=(("a.weight", (3, 64), Q8_0), ("b", (5,), F32))):
    layout = plan(metadata, [TensorInfo(*row) for row in tensors])
    with GGUFWriter(path, layout) as writer:
        for number, info in enumerate(layout.tensors.values()):
            writer.write(info.name, torch.full((info.rows, info.row_bytes), number + 1, dtype=torch.uint8))
    return path


def plain(value):
    return value.tolist() if isinstance(value, np.ndarray) else value


def test_a_file_reads_as_it_was_written(tmp_path):
    file = GGUFFile(write(tmp_path / "x.gguf"))
    assert {key: plain(value) for key, value in file.metadata.items()} == {key: plain(value) for key, value in METADATA.items()}
    assert {name: (info.shape, info.type) for name, info in file.tensors.items()} == {
        "a.weight": ((3, 64), Q8_0),
        "b": ((5,), F32),
    }
    assert file.data("a.weight").shape == (3, 68) and (file.data("a.weight") == 1).all() and (file.data("b") == 2).all()
    assert np.array_equal(file.read("a.weight").numpy(), file.data("a.weight"))


def test_another_reader_agrees(tmp_path):
    theirs = gguf.GGUFReader(write(tmp_path / "x.gguf"))
    assert {key: theirs.fields[key].contents() for key in METADATA if key != "nothing"} == {
        key: value for key, value in METADATA.items() if key != "nothing"
    }
    assert [(t.name, t.tensor_type.name, t.shape.tolist()) for t in theirs.tensors] == [
        ("a.weight", "Q8_0", [64, 3]),
        ("b", "F32", [5]),
    ]


def test_encoded_values_copy_a_header_exactly(tmp_path):
    first = write(tmp_path / "x.gguf")
    assert write(tmp_path / "y.gguf", GGUFFile(first).encoded).read_bytes() == first.read_bytes()


def test_a_tensor_that_never_arrives_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="did not arrive whole: late"):
        with GGUFWriter(tmp_path / "x.gguf", plan({}, [TensorInfo("late", (2, 2), F32)])):
            pass


def test_a_disk_that_loses_a_byte_is_found(tmp_path):
    with pytest.raises(OSError, match="does not give back late as it was written"):
        with GGUFWriter(tmp_path / "x.gguf", plan({}, [TensorInfo("late", (1, 8), F32)])) as writer:
            writer.write("late", torch.ones(1, 32, dtype=torch.uint8))
            wait(writer._waiting)
            with open(tmp_path / "x.gguf", "r+b") as file:
                file.seek(-1, 2)
                file.write(b"\0")


def test_offsets_beyond_32_bits(tmp_path):
    """A sparse file of 6 GB: only the small tensors, which stand behind the large ones, are written."""
    path = tmp_path / "x.gguf"
    layout = plan(
        {"general.architecture": "test"}, [TensorInfo("large", (1 << 21, 768), F32), TensorInfo("small", (2, 4), F32)]
    )
    writer = GGUFWriter(path, layout)
    writer.write("small", torch.arange(8.0).view(2, 4).view(torch.uint8))
    with pytest.raises(ValueError, match="large"):  # it was announced and is a hole
        writer.__exit__(None)
    assert layout.tensors["small"].offset > 1 << 32 and path.stat().st_blocks * 512 < 1 << 24
    for data in (GGUFFile(path).data("small"), gguf.GGUFReader(path).tensors[1].data):
        assert np.array_equal(data.view(np.float32).ravel(), np.arange(8.0))


def test_llama_cpp_reads_behind_two_gigabytes(tmp_path):
    """A model whose first feed-forward is 2.3 GB of holes, so zeros, gives the logits of the one with small zeros there."""
    directory = tiny.save_tiny("llama3", tmp_path / "model")
    weights = load_file(directory / "model.safetensors")
    config, logits = read_config(directory), []
    config.num_hidden_layers = 1
    weights = {name: weight for name, weight in weights.items() if ".layers.1." not in name}
    for width in (96, 96 * 31250):
        config.intermediate_size = width
        for part, shape in (("gate", (width, 64)), ("up", (width, 64)), ("down", (64, width))):
            weights[f"model.layers.0.mlp.{part}_proj.weight"] = torch.zeros(1).expand(shape)
        path = tmp_path / f"{width}.gguf"
        write_sparse(config, directory, dict(sorted(weights.items(), key=lambda item: "mlp" not in item[0])), path)
        with Llama(path) as llama:
            logits.append(llama.logits([7, 8, 9]))
    assert GGUFFile(path).tensors["output.weight"].offset > 1 << 31 and path.stat().st_blocks * 512 < 1 << 25
    assert np.array_equal(*logits)


def write_sparse(config, directory, weights, path):
    """Like ``write_gguf`` in f32, but zeros stay holes."""
    original = GGUFWriter._send

    def skip_zeros(self, what, offset, data):
        if len(data) < 1 << 20 or np.frombuffer(data, np.uint8).any():
            original(self, what, offset, data)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GGUFWriter, "_send", skip_zeros)
        write_gguf(config, directory, weights, {path: "f32"})


def header(*parts, tensors=0, entries=0, version=3):
    return b"GGUF" + struct.pack("<IQQ", version, tensors, entries) + b"".join(parts) + bytes(64)


def text(data):
    return struct.pack("<Q", len(data)) + data


def tensor(name=b"t", shape=(32,), kind=0, offset=0):
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


ARRAY_OF_ARRAYS = struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 8 + struct.pack("<IQ", 0, 0)


@pytest.mark.parametrize(
    "data, message",
    [
        (b"", "too short"),
        (b"GGUX" + bytes(60), "does not begin with 'GGUF'"),
        (header(version=1), "version is 1"),
        (header(tensors=1 << 60), "claims 1152921504606846976 tensors"),
        (header(entries=1 << 63), "metadata entries, more than it has room for"),
        (header(struct.pack("<Q", 1 << 40), entries=1), "a metadata key would be"),
        (header(text(b"\xff\xfe"), entries=1), "a metadata key is not UTF-8"),
        (header(text(b"k"), struct.pack("<I", 77), entries=1), "'k' has the unknown type 77"),
        (header(text(b"k"), struct.pack("<IQ", 8, 1 << 50), entries=1), "the value of 'k' would be"),
        (header(text(b"k"), struct.pack("<IIQ", 9, 10, 1 << 61), entries=1), "items of 'k', more than it has room for"),
        (header(text(b"k"), struct.pack("<IIQ", 9, 8, 1 << 61), entries=1), "items of 'k', more than it has room for"),
        (header(text(b"k"), struct.pack("<IB", 7, 3), entries=1), "truth value"),
        (header(text(b"k"), ARRAY_OF_ARRAYS, entries=1), "nested more than"),
        (header(*[text(b"k") + struct.pack("<IB", 7, 1)] * 2, entries=2), "'k' comes twice"),
        (header(text(b"general.alignment"), struct.pack("<II", 4, 33), entries=1), "general.alignment is 33"),
        (header(tensor(shape=(1,) * 5), tensors=1), "has 5 dimensions"),
        (header(tensor(shape=()), tensors=1), "has 0 dimensions"),
        (header(tensor(shape=(0,)), tensors=1), "is empty"),
        (header(tensor(kind=99), tensors=1), "type 99"),
        (header(tensor(shape=(33,), kind=8), tensors=1), "rows of 33 weights"),
        (header(tensor(offset=4), tensors=1), "not a multiple of 32"),
        (header(tensor(shape=(1 << 63, 1 << 63)), tensors=1), "ends before the tensor 't'"),
        (header(tensor(), tensor(), tensors=2), "'t' comes twice"),
        (header(tensor(b"a", (8,)), tensor(b"b", (8,)), tensors=2), "overlaps"),
    ],
)
def test_lies_are_named(data, message, tmp_path):
    path = tmp_path / "x.gguf"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=message):
        GGUFFile(path)


ARRAY, LARGE = 9, 1 << 30


def claim(kind, count):
    return header(text(b"k"), struct.pack("<IIQ", ARRAY, kind, count), entries=1)


@pytest.mark.parametrize(
    "head, message",
    [
        (header(tensors=1 << 20), "claims 1048576 tensors, more than any model has"),
        (header(entries=1 << 20), "claims 1048576 metadata entries, more than any model has"),
        (header(text(b"k"), struct.pack("<IQ", 8, LARGE // 2), entries=1), "header is longer than 268435456 bytes"),
        (claim(0, LARGE // 2), "items of 'k', more than any model has"),
        (claim(8, LARGE // 16), "items of 'k', more than any model has"),
        (
            claim(ARRAY, LARGE // 1024),
            "items of 'k', more than any model has",
        ),
    ],
)
def test_a_file_of_holes_is_not_believed(head, message, tmp_path):
    """A gigabyte of zeros that takes no place on the disk, and would take several in memory."""
    path = tmp_path / "x.gguf"
    path.write_bytes(head)
    with open(path, "r+b") as stream:
        stream.truncate(LARGE)
    with pytest.raises(ValueError, match=message):
        GGUFFile(path)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_damage_breaks_the_reader(data, tmp_path):
    """Any bytes changed, inserted or cut: the file reads, or is refused with a ValueError; nothing else."""
    path = write(tmp_path / "x.gguf")
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(content) - 1))
        content[place : place + data.draw(st.integers(0, 8))] = data.draw(st.binary(max_size=12))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content)
    try:
        file = GGUFFile(path)
    except ValueError:
        return
    for name, info in file.tensors.items():
        assert file.data(name).size == info.size
