"""What the server draws: rings, heat maps and families."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import numpy as np

from modelgrove_hub.registry.layers import Layer, Layers, place_of
from modelgrove_hub.registry.lineage import Node
from modelgrove_hub.web.family import family_svg
from modelgrove_hub.web.heat import heat_maps, measures_of
from modelgrove_hub.web.rings import rings

EVIL = "<script>alert(1)</script>\"'&"


def points(svg: str) -> np.ndarray:
    found = [node.attrib["points"].split() for node in ET.fromstring(svg).iter() if node.tag == "polygon"]
    return np.array(found, float)


def test_models_that_do_alike_have_rings_alike():
    rng = np.random.default_rng(0)
    one, other = rng.standard_normal((2, 384)).astype("<f4")
    near = one + 0.05 * other
    own, alike, unlike = (points(rings(vector.tobytes(), "a/b")) for vector in (one, near, other))
    assert rings(one.tobytes(), "a/b") == rings((3 * one).tobytes(), "c/d")
    assert np.abs(own - alike).mean() < 0.2 * np.abs(own - unlike).mean()
    assert own.min() > 0
    assert own.max() < 200


def test_rings_of_a_model_without_a_vector_are_its_own():
    assert rings(None, "a/b") != rings(None, "a/c")
    assert EVIL not in rings(None, EVIL)


def layer(module: str, norm: float | None) -> Layer:
    return Layer(module, *place_of(module), (4, 4), norm, norm, None)


def test_a_heat_map_has_a_cell_a_layer_and_escapes_names():
    evil = EVIL.replace("/", "")  # what stands before a slash is a component of its own
    found = [layer(f"unet/down_blocks.{i}.attn.to_q", float(i)) for i in range(6)] + [layer(f"unet/{evil}", None)]
    layers = Layers("weights", [*found, layer("codec/one", 1.0)], None, [])
    assert measures_of(layers) == ["spread", "norm"]
    (drawn,) = heat_maps(layers, "norm")
    svg = ET.fromstring(drawn.svg)
    cells = [node for node in svg if node.tag == "rect"]
    assert len(cells) == 7
    opacities = [float(cell.attrib["fill-opacity"]) for cell in cells[:6]]
    assert opacities == sorted(opacities)
    assert cells[6].attrib["class"] == "none"
    assert (drawn.low, drawn.high) == (0.0, 5.0)


def test_layers_of_one_norm_are_drawn():
    layers = Layers("changes", [layer(f"a.{i}.b", 0.0) for i in range(5)], None, [])
    assert heat_maps(layers, "norm")[0].high == 0.0
    assert heat_maps(Layers("weights", [], None, []), "norm") == []


def test_modules_are_parted_into_block_and_role():
    assert place_of("unet/down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0") == (
        "unet/down_blocks.1.attentions.0.transformer_blocks.0", "attn1.to_out.0",
    )  # fmt: skip
    assert place_of("text_model.encoder.layers.11.self_attn.q_proj") == (
        "text_model.encoder.layers.11", "self_attn.q_proj",
    )  # fmt: skip
    assert place_of("conv_in") == ("", "conv_in")
    assert place_of("unet/middle_block.1.proj") == ("unet/middle_block.1", "proj")


def test_a_family_tells_declared_from_inferred_and_escapes_names():
    child = Node("a/child", 2, "d2", "merge", inferred=False)
    parent = Node(EVIL, 3, "d3", "finetune", inferred=True, score=0.87)
    root = Node("a/b", 1, "d1", parents=[parent], children=[child])
    svg = family_svg(root, [("a/founder", "by its tree")])
    assert svg is not None
    assert EVIL not in svg
    drawn = ET.fromstring(svg)
    lines = [node.attrib["class"] for node in drawn.iter() if node.tag == "path"]
    assert sorted(lines) == ["line", "line inferred", "line inferred"]
    assert "finetune 0.87" in svg
    assert {node.attrib["href"] for node in drawn if node.tag == "a"} == {
        "/m/a/child", "/m/a/founder", "/m/%3Cscript%3Ealert%281%29%3C/script%3E%22%27%26",
    }  # fmt: skip
    assert family_svg(Node("a/b", 1, "d1")) is None


def test_a_large_family_is_cut():
    root = Node("a/b", 1, "d1", children=[Node(f"a/{i}", i, "d", "adapter") for i in range(2, 300)])
    svg = family_svg(root)
    assert svg is not None
    assert "and 288 more" in svg
    assert svg.count("<rect") == 12


def test_boxes_do_not_lie_on_each_other():
    grandchildren = [Node(f"g/{i}", 10 + i, "d", "adapter") for i in range(3)]
    children = [Node("c/1", 2, "d", "merge", children=grandchildren), Node("c/2", 3, "d", "merge")]
    root = Node("a/b", 1, "d1", children=children)
    drawn = ET.fromstring(str(family_svg(root)))
    boxes = [(float(n.attrib["x"]), float(n.attrib["y"])) for n in drawn.iter() if n.tag == "rect"]
    assert len(set(boxes)) == len(boxes) == 6
    for one in boxes:
        assert all(one is other or one[0] != other[0] or abs(one[1] - other[1]) > 40 for other in boxes)
