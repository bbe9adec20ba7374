"""Plugins of real distributions on the path: good, broken, clashing and lying ones."""

import sys
from pathlib import Path

import pytest

from modelgrove_hub.entries import usable
from modelgrove_hub.errors import NotFoundError, PluginError, UsageError
from modelgrove_hub.plugins import State, check_params, find_plugin, get_plugin, load_plugins
from modelgrove_hub.settings import Settings

GOOD = """
from modelgrove_hub.contracts import API, Kind, Params, Result
from pydantic import Field, field_validator

class Options(Params):
    bits: int = Field(4, ge=2, le=8)
    name: str

    @field_validator("name")
    @classmethod
    def check(cls, value):
        if value == "crash":
            raise RuntimeError("my own bug")
        return value

class Shrink:
    name = "shrink"
    kind = Kind.COMPRESSOR
    api = API
    summary = "Shrinks."
    paper = ""
    Params = Options

    def run(self, context, params):
        return Result()
"""
SETTINGS = Settings(plugins="", safe_mode=False)


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Writes a distribution (its module and its dist-info folder) onto the path."""

    def write(distribution, module, source, *entries):
        root = tmp_path / distribution
        info = root / f"{distribution}-1.0.dist-info"
        info.mkdir(parents=True)
        (root / f"{module}.py").write_text(source)
        (info / "METADATA").write_text(f"Metadata-Version: 2.4\nName: {distribution}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text("\n".join(["[modelgrove.plugins]", *entries]))
        monkeypatch.syspath_prepend(root)
        monkeypatch.delitem(sys.modules, module, raising=False)

    return write


def state_of(name, config=SETTINGS):
    return next(state for state in load_plugins(config) if state.full_name == name)


def test_a_good_plugin_is_found_by_its_full_and_its_short_name(install):
    install("tidy", "tidy_shrink", GOOD, "compressor.shrink = tidy_shrink:Shrink")

    assert state_of("compressor.shrink").distribution == "tidy"
    assert get_plugin("compressor.shrink", SETTINGS) is get_plugin("shrink", SETTINGS)


def test_an_unknown_name_is_answered_with_near_ones(install):
    install("tidy", "tidy_shrink", GOOD, "compressor.shrink = tidy_shrink:Shrink")

    with pytest.raises(NotFoundError, match=r"no plugin 'shrunk'; near: compressor\.shrink"):
        get_plugin("shrunk", SETTINGS)


@pytest.mark.parametrize(
    ("asked", "near"),
    [
        ("shrnk", "near: compressor.shrink, editor.shrink"),
        ("editor.shrnk", "near: editor.shrink"),
        ("zzz", "there is: .*compressor.shrink, .*editor.shrink"),
    ],
)
def test_near_names_are_of_the_kind_that_was_asked_for(install, asked, near):
    install("tidy", "tidy_shrink", GOOD, "compressor.shrink = tidy_shrink:Shrink")
    install("other", "other_shrink", GOOD.replace("COMPRESSOR", "EDITOR"), "editor.shrink = other_shrink:Shrink")

    with pytest.raises(NotFoundError, match=near):
        get_plugin(asked, SETTINGS)


def test_a_short_name_of_two_kinds_must_be_said_in_full(install):
    editor = GOOD.replace("COMPRESSOR", "EDITOR")
    install("tidy", "tidy_shrink", GOOD, "compressor.shrink = tidy_shrink:Shrink")
    install("other", "other_shrink", editor, "editor.shrink = other_shrink:Shrink")

    with pytest.raises(UsageError, match=r"say compressor\.shrink or editor\.shrink"):
        get_plugin("shrink", SETTINGS)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("def f(:", "SyntaxError"),
        ("import sys\nsys.exit(3)", "SystemExit: 3"),
        ("raise ValueError('one\\ntwo')", "ValueError: one two"),
        ("Other = 1", "AttributeError"),
        ("Shrink = 1", "is a int, not a class"),
        (GOOD.replace("api = API", "api = '1'"), "`api` must be the integer 1, not '1'"),
        (GOOD.replace("api = API", ""), "`api` must be the integer 1, not None"),
        (GOOD.replace("Kind.COMPRESSOR", "'shrinker'"), "`kind` must be one of compressor"),
        (GOOD.replace('name = "shrink"', 'name = "other"'), "but the class says compressor.other"),
        (GOOD.replace("    Params = Options", ""), "`Params` must be a subclass"),
        (
            GOOD.replace("bits: int = Field(4, ge=2, le=8)", "bits: type[int] | object = 1\n    f: type = int"),
            "Pydantic",
        ),
        (GOOD.replace("def run", "def walk"), "has no method `run`"),
        (GOOD.replace("COMPRESSOR", "EMBEDDER"), "but the class says embedder.shrink"),
        (GOOD.replace('summary = "Shrinks."', "summary = None"), "`summary` must be text, not None"),
    ],
)
def test_a_broken_plugin_is_listed_with_its_reason_and_harms_no_other(install, source, reason):
    install("tidy", "tidy_shrink", GOOD.replace('"shrink"', '"fine"'), "compressor.fine = tidy_shrink:Shrink")
    install("sloppy", "sloppy_shrink", source, "compressor.shrink = sloppy_shrink:Shrink")

    broken = state_of("compressor.shrink")
    assert (broken.state, broken.distribution, broken.plugin) == (State.BROKEN, "sloppy", None)
    assert reason in broken.reason
    assert "\n" not in broken.reason
    assert state_of("compressor.fine").state is State.OK
    with pytest.raises(PluginError, match="'sloppy' is broken"):
        get_plugin("shrink", SETTINGS)


def test_an_embedder_needs_its_second_method(install):
    source = GOOD.replace("COMPRESSOR", "EMBEDDER")
    install("sloppy", "sloppy_shrink", source, "embedder.shrink = sloppy_shrink:Shrink")

    assert state_of("embedder.shrink").reason == "has no method `embed`"


def test_an_entry_point_without_a_kind_is_broken(install):
    install("sloppy", "sloppy_shrink", GOOD, "shrink = sloppy_shrink:Shrink")

    assert "class says compressor.shrink" in state_of("shrink").reason


def test_a_plugin_for_another_contract_is_incompatible_even_if_nothing_else_fits(install):
    install("future", "future_shrink", "class Shrink:\n    api = 2", "compressor.shrink = future_shrink:Shrink")

    state = state_of("compressor.shrink")
    assert (state.state, state.reason) == (State.INCOMPATIBLE, "speaks contract 2, this hub speaks 1")
    with pytest.raises(PluginError, match="incompatible"):
        get_plugin("shrink", SETTINGS)


def test_two_distributions_with_one_name_are_both_refused(install):
    install("tidy", "tidy_shrink", GOOD, "compressor.shrink = tidy_shrink:Shrink")
    install("copycat", "copycat_shrink", GOOD, "compressor.shrink = copycat_shrink:Shrink")

    states = [state for state in load_plugins(SETTINGS) if state.full_name == "compressor.shrink"]
    assert [(state.state, state.distribution) for state in states] == [
        (State.BROKEN, "copycat"),
        (State.BROKEN, "tidy"),
    ]
    assert all("copycat" in state.reason and "tidy" in state.reason for state in states)


def test_a_stranger_cannot_take_the_place_of_one_of_our_own(install):
    install("impostor", "impostor_rtn", "raise SystemExit('imported')", "compressor.rtn = impostor_rtn:Rtn")

    states = {state.distribution: state for state in load_plugins(SETTINGS) if state.full_name == "compressor.rtn"}
    assert states["modelgrove"].state is State.OK
    assert states["impostor"].state is State.BROKEN
    assert "choose another name" in states["impostor"].reason
    assert get_plugin("rtn", SETTINGS) is states["modelgrove"].plugin


def test_safe_mode_imports_no_third_party(install):
    install("wild", "wild_shrink", "raise SystemError('imported')", "compressor.shrink = wild_shrink:Shrink")

    states = load_plugins(Settings(plugins="", safe_mode=True))
    assert {state.state for state in states if state.distribution != "modelgrove"} == {State.DISABLED}
    assert "wild_shrink" not in sys.modules


@pytest.mark.parametrize("allowed", ["compressor.fine", " fine , another"])
def test_an_allow_list_disables_the_others_unseen(install, allowed):
    config = Settings(plugins=allowed, safe_mode=False)
    install("tidy", "tidy_shrink", GOOD.replace('"shrink"', '"fine"'), "compressor.fine = tidy_shrink:Shrink")
    install("wild", "wild_shrink", "raise SystemError('imported')", "compressor.shrink = wild_shrink:Shrink")

    assert find_plugin("fine", config).state is State.OK
    assert state_of("compressor.shrink", config).state is State.DISABLED
    assert "wild_shrink" not in sys.modules
    with pytest.raises(UsageError, match="allow-list"):
        get_plugin("shrink", config)


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"name": "a", "bits": 9}, "compressor.shrink: bits: Input should be less than or equal to 8, got 9"),
        ({}, "compressor.shrink: parameter 'name' is needed"),
        ({"name": "a", "bit": 4}, "compressor.shrink: no parameter 'bit'; there is: bits, name"),
    ],
)
def test_parameters_that_do_not_fit_are_told_in_one_line(install, values, line):
    install("tidy", "tidy_shrink", GOOD, "compressor.shrink = tidy_shrink:Shrink")

    with pytest.raises(UsageError) as caught:
        check_params(get_plugin("shrink", SETTINGS), values)
    assert str(caught.value) == line


def test_a_validator_that_crashes_is_the_plugins_fault(install):
    install("tidy", "tidy_shrink", GOOD, "compressor.shrink = tidy_shrink:Shrink")

    with pytest.raises(PluginError, match="cannot check its parameters: RuntimeError: my own bug"):
        check_params(get_plugin("shrink", SETTINGS), {"name": "crash"})


def test_a_new_distribution_on_the_path_is_seen_without_a_restart(install):
    before = {state.full_name for state in load_plugins(SETTINGS)}
    install("tidy", "tidy_shrink", GOOD, "compressor.shrink = tidy_shrink:Shrink")

    assert {state.full_name for state in load_plugins(SETTINGS)} - before == {"compressor.shrink"}


def test_fixtures_of_the_job_tests_are_all_good(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent / "fixtures")

    strangers = [state for state in load_plugins(SETTINGS) if state.distribution == "stranger"]
    assert {state.reason for state in strangers} == {""}


@pytest.mark.parametrize("allowed", ["tidy_shrinkers", "other, Tidy.Shrinkers"])
def test_only_distributions_of_the_allow_list_are_imported(install, allowed):
    config = Settings(distributions=allowed, safe_mode=False)
    install("tidy-shrinkers", "tidy_shrink", GOOD, "compressor.shrink = tidy_shrink:Shrink")
    # A name that is allowed does not help the stranger who takes it.
    install("wild", "wild_shrink", "raise SystemError('imported')", "compressor.rtn2 = wild_shrink:Shrink")

    assert find_plugin("shrink", config).state is State.OK
    assert "distribution 'wild' is not in the allow-list" in state_of("compressor.rtn2", config).reason
    assert find_plugin("rtn", config).state is State.OK
    assert "wild_shrink" not in sys.modules


def test_commands_and_exporters_keep_to_the_allow_list_and_none_takes_a_name_of_ours(install, tmp_path):
    install("wild", "wild_things", "raise SystemError('imported')")
    points = tmp_path / "wild/wild-1.0.dist-info/entry_points.txt"
    points.write_text("[modelgrove.exporters]\ngguf = wild_things:Gguf\nodd = wild_things:Odd\n")

    assert "odd" in usable("modelgrove.exporters", SETTINGS)
    assert usable("modelgrove.exporters", SETTINGS)["gguf"].value.startswith("modelgrove_plugins.")
    for config in (Settings(distributions="tidy"), Settings(safe_mode=True)):
        assert "odd" not in usable("modelgrove.exporters", config)
        assert "gguf" in usable("modelgrove.exporters", config)
