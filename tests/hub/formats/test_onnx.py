"""ONNX graphs: parameters are listed from the wire format alone."""

import io
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelgrove_hub.errors import CorruptFileError
from modelgrove_hub.formats.listing import list_model
from modelgrove_hub.formats.onnx import looks_like_onnx, parse_onnx
from modelgrove_hub.formats.recognise import recognise


def varint(value):
    out = b""
    while value > 0x7F:
        out, value = out + bytes([value & 0x7F | 0x80]), value >> 7
    return out + bytes([value])


def field(number, value):
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    raw = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(raw)) + raw


def initialiser(name, shape, code=1, data=b"", *, packed=False):
    sides = field(1, b"".join(map(varint, shape))) if packed else b"".join(field(1, side) for side in shape)
    return field(5, sides + field(2, code) + field(8, name) + field(9, data))


def model(*parts, head=True):
    start = field(1, 10) + field(2, "by hand") if head else b""
    return start + field(7, field(2, "g") + field(1, b"") + b"".join(parts)) + field(14, field(1, "k") + field(2, "v"))


def parse(data):
    return parse_onnx(io.BytesIO(data), len(data), "x.onnx")


GOOD = model(initialiser("a.weight", (2, 3), data=bytes(24)), initialiser("b", (4,), 7, packed=True))


def test_a_model_encoded_by_hand_is_listed():
    graph = parse(GOOD)
    assert graph.tensors == {"a.weight": ("F32", (2, 3)), "b": ("I64", (4,))}
    assert graph.metadata == {"producer": "by hand", "k": "v"}
    assert graph.nodes == 1
    assert looks_like_onnx(io.BytesIO(GOOD), len(GOOD))


def test_a_model_of_the_reference_package_is_listed():
    onnx = pytest.importorskip("onnx", reason="pip install onnx to compare with the reference")
    import numpy as np

    values = {"w": np.zeros((2, 3), np.float16), "n": np.array(3, np.int64), "e": np.zeros((0, 4), np.float32)}
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Identity", ["x"], ["y"])],
        "g",
        [onnx.helper.make_tensor_value_info("x", 1, [1])],
        [onnx.helper.make_tensor_value_info("y", 1, [1])],
        [onnx.numpy_helper.from_array(value, name) for name, value in values.items()],
    )
    found = parse(onnx.helper.make_model(graph).SerializeToString())
    assert found.tensors == {"w": ("F16", (2, 3)), "n": ("I64", ()), "e": ("F32", (0, 4))}


BROKEN = {
    "nothing": (b"", "no graph"),
    "cut": (GOOD[:-3], "ends"),
    "a length past the end": (field(1, 10) + varint(7 << 3 | 2) + varint(10**9) + b"x", "ends after"),
    "an endless number": (b"\x08" + b"\xff" * 11, "64 bits"),
    "a group": (field(1, 10) + varint(7 << 3 | 3), "wire type"),
    "one name twice": (model(initialiser("a", (1,)), initialiser("a", (1,))), "two initialisers"),
    "no name": (model(initialiser("", (1,))), "empty name"),
    "an unknown type": (model(initialiser("a", (1,), 99)), "unknown type 99"),
    "nine dimensions": (model(initialiser("a", (1,) * 9)), "dimensions"),
    "nine packed dimensions": (model(initialiser("a", (1,) * 9, packed=True)), "dimensions"),
    "an impossible product": (model(initialiser("a", (2**40, 2**40))), "impossible size"),
    "an impossible sum": (model(*(initialiser(f"a{i}", (2**47,)) for i in range(3))), "impossible size"),
    "an impossible size": (model(initialiser("a", (2**60,))), "impossible size"),
    "a long name": (model(initialiser("a" * 70_000, (1,))), "text of 70000 bytes"),
    **{
        f"data at {place}": (
            model(field(5, field(8, "w") + field(13, field(1, "location") + field(2, place)))),
            "outside",
        )
        for place in ("../w", "/etc/passwd", "a/../../w", "c:\\w", "")
    },
    "a name that is no text": (model(initialiser(b"\xff\xfe", (1,))), "UTF-8"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_model_is_refused_with_its_name_and_the_rule(case):
    data, rule = BROKEN[case]
    with pytest.raises(CorruptFileError, match=rule) as error:
        parse(data)
    assert str(error.value).startswith("x.onnx: ")


@given(st.binary(max_size=200))
@settings(max_examples=200, deadline=None)
def test_any_bytes_are_read_or_refused(data):
    looks_like_onnx(io.BytesIO(data), len(data))
    with suppress(CorruptFileError):
        parse(data)


def kept_in(*places):
    """A model whose initialisers lie in these files."""
    tensors = (
        field(5, field(1, 4) + field(2, 1) + field(8, f"w{number}") + field(13, field(1, "location") + field(2, place)))
        for number, place in enumerate(places)
    )
    return model(*tensors)


def test_files_with_data_of_the_graph_are_listed_and_must_be_there(tmp_path):
    path = tmp_path / "x.onnx"
    path.write_bytes(kept_in("x.onnx_data", "./x.onnx_data", "deep/w.bin"))
    (tmp_path / "x.onnx_data").write_bytes(bytes(16))
    with pytest.raises(CorruptFileError, match=r"x\.onnx: data of its initialisers are in 'deep/w\.bin'"):
        list_model(path)
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep/w.bin").write_bytes(bytes(16))
    assert set(list_model(path).files) == {"x.onnx", "x.onnx_data", "deep/w.bin"}
    found = recognise(list_model(tmp_path))
    assert (found.trust, found.tensors) == ("ok", 3)


def test_data_in_too_many_files_are_refused(monkeypatch):
    monkeypatch.setattr("modelgrove_hub.formats.onnx.MAX_FILES", 2)
    with pytest.raises(CorruptFileError, match="more than 2 files"):
        parse(kept_in("a", "b", "c"))
    with pytest.raises(CorruptFileError, match="more than 1024 characters"):
        parse(kept_in("a" * 1025))


def test_an_opaque_graph_is_unknown_but_listed(tmp_path):
    path = tmp_path / "x.onnx"
    path.write_bytes(GOOD)
    listed = list_model(path)
    assert set(listed.tensors) == {"a.weight", "b"}
    found = recognise(listed)
    assert (found.family, found.format, found.trust) == ("unknown", "onnx", "ok")


@pytest.mark.skipif(find_spec("terrain_diffusion") is None, reason="pip install --no-deps adaptive-terrain-diffusion")
def test_the_consistency_unet_of_adaptive_terrain_diffusion_is_a_guided_diffusion_unet():
    folder = Path(find_spec("terrain_diffusion").submodule_search_locations[0]) / "weights"
    found = recognise(list_model(next(folder.glob("*.onnx"))))
    assert (found.kind, found.family, found.variant) == ("checkpoint", "ddpm-unet2d", "label-conditional")
    assert (found.convention, found.coverage) == ("guided-diffusion", 1)
    assert 10_000_000 < found.parameters < 11_000_000
