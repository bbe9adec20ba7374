import pytest

from modelgrove_hub.formats.families import match_families
from modelgrove_hub.formats.listing import ListedTensor
from modelgrove_hub.formats.naming import adapter_names, container_names
from modelgrove_hub.formats.signature import FOLDER, VOCABULARY, load_signatures

MINIMAL = """
name = "{name}"
title = "A family"
[[layouts]]
name = "plain"
role = "classifier"
kind = "checkpoint"
names = ["@dense"]
[layouts.shapes]
"first.weight" = [3, "*"]
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / VOCABULARY).write_text('dense = ["{first,last}.{weight,bias}"]')
    (tmp_path / "mine.toml").write_text(MINIMAL.format(name="mine"))
    return tmp_path


def test_a_new_family_is_a_new_file(folder):
    tensors = {"first.weight": ListedTensor("F32", (3, 9)), "last.bias": ListedTensor("F32", (2,))}
    [match] = match_families(tensors, load_signatures(folder))
    assert (match.signature.name, match.coverage) == ("mine", 1)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (('name = "mine"', 'name = "other"'), "called like its family"),
        (('role = "classifier"', 'role = "wizard"'), "role"),
        (('title = "A family"', 'title = "A family"\ncolour = "red"'), "colour"),
        (('"first.weight"', '"*.weight"'), "must be a plain name"),
        (('"@dense"', '"@nothing"'), "nothing"),
        (("[[layouts]]", "[layouts"), "mine.toml"),
    ],
)
def test_a_wrong_file_is_refused_by_its_name(folder, change, complaint):
    path = folder / "mine.toml"
    path.write_text(path.read_text().replace(*change))
    load_signatures.cache_clear()
    with pytest.raises(ValueError, match=complaint) as error:
        load_signatures(folder)
    assert "mine.toml" in str(error.value)


def test_all_shipped_families_load_and_the_readme_names_them():
    readme = (FOLDER / "README.md").read_text()
    names = [signature.name for signature in load_signatures()]
    assert len(names) == len(set(names)) >= 25
    assert [name for name in names if f"`{name}`" not in readme] == []


def test_every_base_that_is_named_is_a_family():
    names = {signature.name for signature in load_signatures()}
    bases = {
        base
        for signature in load_signatures()
        for layout in signature.layouts
        for base in (*layout.bases, *(b for variant in layout.variants for b in variant.bases))
    }
    assert bases <= names


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("a.b.lora_A.weight", ("a.b", ".lora_A.weight")),
        ("a.to_q.lora.down.weight", ("a.to_q", ".lora.down.weight")),
        ("a.to_q_lora.down.weight", ("a.to_q", "_lora.down.weight")),
        ("lora_unet_x.hada_w1_a", ("lora_unet_x", ".hada_w1_a")),
        ("conv_in.bias", None),
    ],
)
def test_an_adapters_tensor_name_is_split_into_module_and_suffix(name, split):
    assert adapter_names().split(name) == split


def test_the_longest_prefix_names_the_part():
    names = container_names()
    assert names.part_of("model.diffusion_model.out.0.weight") == "model.diffusion_model."
    assert names.part_of("model.layers.0.weight") == "model."
    assert names.part_of("conv_in.weight") == ""
