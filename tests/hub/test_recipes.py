"""Recipes: kept in files, shown as YAML, followed again; and mergekit's, as far as they say the same."""

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from modelgrove_hub.errors import DataError, NotFoundError, UsageError
from modelgrove_hub.plugins import check_params, get_plugin
from modelgrove_hub.recipes import _MERGEKIT_METHODS, MAX_BYTES, Ingredient, Recipe, read_recipe, recipe_of

RECIPE = Recipe(
    method="ties",
    parameters={"density": 0.3},
    seed=7,
    base=Ingredient(name="base"),
    models=(Ingredient(name="me/a", digest="ab", weight=0.5), Ingredient(name="b", weight=-2)),
)
names = st.text(st.characters(categories=("L", "N", "P")), min_size=1, max_size=20)
ingredients = st.builds(
    Ingredient, name=names, digest=st.none() | names, weight=st.floats(allow_nan=False, allow_infinity=False)
)
recipes = st.builds(
    Recipe,
    method=names,
    parameters=st.dictionaries(names, st.integers() | st.booleans() | names, max_size=3),
    seed=st.none() | st.integers(0, 2**48),
    base=st.none() | ingredients,
    models=st.lists(ingredients, min_size=1, max_size=4).map(tuple),
)


def written(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text if isinstance(text, str) else yaml.safe_dump(text), "utf-8")
    return path


@given(recipes)
def test_yaml_and_metadata_keep_everything(tmp_path_factory, recipe):
    assert read_recipe(written(tmp_path_factory.mktemp("recipe"), recipe.to_yaml())) == recipe
    assert recipe_of(recipe.to_metadata(), "merged") == recipe


def test_the_parameters_of_the_merger_come_with_weights_base_and_seed():
    assert RECIPE.params() == {"density": 0.3, "weights": [0.5, -2.0], "base": True, "seed": 7}


def test_others_read_the_names():
    assert RECIPE.to_metadata()["modelspec.merged_from"] == "me/a, b"


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("[1, 2]", "no recipe"),
        ("{", "no YAML"),
        ("method: sum\n", "models"),
        ("method: sum\nmodels: []\n", "models"),
        ("method: sum\nmodels: [{name: a, weight: .inf}]\n", "weight"),
        ("method: sum\nsurprise: 1\nmodels: [{name: a}]\n", "surprise"),
        ("method: !!python/object/apply:os.getcwd []\n", "no YAML"),
        ("x" * (MAX_BYTES + 1), "larger than"),
    ],
)
def test_what_is_no_recipe_is_refused_by_name(text, match, tmp_path):
    with pytest.raises(DataError, match=match):
        read_recipe(written(tmp_path, text))


def test_a_missing_file_is_told_by_name(tmp_path):
    with pytest.raises(NotFoundError, match=r"none\.yaml"):
        read_recipe(tmp_path / "none.yaml")


def test_a_model_without_a_recipe_says_so():
    with pytest.raises(NotFoundError, match="keeps no recipe"):
        recipe_of({"format": "pt"}, "a")
    with pytest.raises(DataError, match="no JSON"):
        recipe_of({"modelgrove.merge": "{"}, "a")


def mergekit(**fields):
    models = [
        {"model": "base"},
        {"model": "a", "parameters": {"weight": 0.5}},
        {"model": "b", "parameters": {"weight": 0.3}},
    ]
    return {"merge_method": "task_arithmetic", "base_model": "base", "models": models} | fields


def test_mergekit_s_task_arithmetic_is_our_sum(tmp_path):
    recipe = read_recipe(written(tmp_path, mergekit(dtype="float32")))
    assert recipe == Recipe(
        method="sum",
        base=Ingredient(name="base"),
        models=(Ingredient(name="a", weight=0.5), Ingredient(name="b", weight=0.3)),
    )


def test_mergekit_s_ties_looks_at_entries_and_its_weights_are_shares(tmp_path):
    models = [{"model": name, "parameters": {"weight": 0.5}} for name in "ab"]
    fields = {"merge_method": "ties", "base_model": "base", "models": models, "parameters": {"density": 0.4}}
    recipe = read_recipe(written(tmp_path, fields))
    assert (recipe.method, recipe.parameters) == ("ties", {"space": "full", "density": 0.4})
    assert [model.weight for model in recipe.models] == [1.0, 1.0]


@pytest.mark.parametrize(
    ("method", "given", "wanted"),
    [
        ("ties", {"int8_mask": True, "normalize": True}, {"density": 1.0}),
        ("breadcrumbs", {"density": 0.5, "gamma": 0.1}, {"density": 0.5, "outliers": 0.1}),
        ("della", {"density": 0.5, "epsilon": 0.1}, {"density": 0.5, "epsilon": 0.2}),
        ("della", {"density": 0.5}, {"density": 0.5, "epsilon": 0.3}),
        ("della", {}, {"density": 1.0, "epsilon": 0.0}),
        ("dare_ties", {"normalize": True}, {"density": 1.0, "elect": True}),
    ],
)
def test_mergekit_s_parameters_keep_their_meaning(method, given, wanted, tmp_path):
    fields = {"merge_method": method, "base_model": "c", "models": [{"model": "a"}, {"model": "b"}]}
    recipe = read_recipe(written(tmp_path, fields | {"parameters": given}))
    assert recipe.parameters == {"space": "full"} | wanted


@pytest.mark.parametrize("listed", [["a", "b"], ["b", "a"], ["b"]])
def test_mergekit_s_slerp_goes_from_its_base(listed, tmp_path):
    models = [{"model": name} for name in listed]
    fields = {"merge_method": "slerp", "base_model": "a", "models": models, "parameters": {"t": 0.25}}
    recipe = read_recipe(written(tmp_path, fields))
    assert recipe.base is None
    assert [(model.name, model.weight) for model in recipe.models] == [("a", 0.75), ("b", 0.25)]


def test_mergekit_s_linear_averages_its_base_too(tmp_path):
    fields = {"merge_method": "linear", "base_model": "a", "models": [{"model": "a"}, {"model": "b"}]}
    recipe = read_recipe(written(tmp_path, fields | {"parameters": {"normalize": True}}))
    assert recipe.base is None
    assert [model.name for model in recipe.models] == ["a", "b"]
    assert recipe.parameters == {}


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"merge_method": "karcher"}, "karcher"),
        ({"merge_method": "slerp", "models": [{"model": "a"}], "parameters": {"t": [0, 1]}}, "gradient"),
        ({"merge_method": "ties"}, "the same weight"),
        ({"merge_method": "dare_ties"}, "`normalize: true` only"),
        ({"merge_method": "dare_linear", "parameters": {"rescale": False}}, "`rescale: true` only"),
        ({"merge_method": "linear", "base_model": "c"}, "list c among the models"),
        ({"merge_method": "della", "parameters": {"density": [0.1, 0.2]}}, "gradients"),
        ({"merge_method": "della", "parameters": {"density": 0.5, "epsilon": [0.1, 0.2]}}, "gradients"),
        ({"merge_method": "breadcrumbs", "models": [{"model": "a"}], "parameters": {"density": 0.5}}, "a single model"),
        (
            {
                "models": [
                    {"model": "a", "parameters": {"density": 0.1}},
                    {"model": "b", "parameters": {"density": 0.2}},
                ]
            },
            "of their own",
        ),
    ],
)
def test_what_mergekit_can_and_we_cannot_is_refused(fields, match, tmp_path):
    with pytest.raises(UsageError, match=match):
        read_recipe(written(tmp_path, mergekit(**fields)))


@pytest.mark.parametrize("fields", [{"slices": []}, {"models": [3]}, {"models": [{"model": "a", "parameters": 1}]}])
def test_a_mergekit_recipe_of_another_form_is_refused_by_field(fields, tmp_path):
    with pytest.raises(DataError, match=next(iter(fields))):
        read_recipe(written(tmp_path, mergekit(**fields)))


@pytest.mark.parametrize("method", _MERGEKIT_METHODS)
def test_what_mergekit_s_methods_become_is_there(method, tmp_path):
    models = [{"model": "a"}] if method == "slerp" else [{"model": "a"}, {"model": "b"}]
    switches = {"normalize": True} if method == "dare_ties" else {}
    fields = {"merge_method": method, "models": models, "parameters": switches}
    recipe = read_recipe(written(tmp_path, fields if method == "linear" else fields | {"base_model": "c"}))
    check_params(get_plugin(f"merger.{recipe.method}"), recipe.params())
