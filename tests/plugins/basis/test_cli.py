import json

import pytest
import torch
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from modelgrove_hub.errors import ConflictError, DataError, NotFoundError, UsageError
from modelgrove_hub.formats.shared_basis import BasisColumns
from modelgrove_hub.hub import Hub
from modelgrove_hub.ingest.pipeline import ingest
from modelgrove_hub.registry.models import find
from modelgrove_hub.settings import settings
from modelgrove_hub.tables import Model
from modelgrove_kernels.shared_basis import columns
from modelgrove_migrations.run import upgrade
from modelgrove_plugins.basis.cli import basis

WIDTHS = {"attn1.to_q": 32, "attn2.to_k": 48}
TREE = "unknown:local/base"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub with a base of attention layers of 32 and 48 inputs, and an embedder of 8."""
    monkeypatch.setenv("MODELGROVE_HOME", str(tmp_path / "home"))
    settings.cache_clear()
    opened = Hub.open()
    upgrade(opened.settings.database)
    weights = {f"blocks.0.{name}.weight": torch.randn(16, width) for name, width in WIDTHS.items()}
    save_file({**weights, "embedder.weight": torch.randn(16, 8)}, tmp_path / "base.safetensors")
    add(opened, tmp_path / "base.safetensors")
    yield opened
    opened.engine.dispose()
    settings.cache_clear()


def add(hub, path):
    """Ingest a file and put it into the tree, which two layers alone do not tell."""
    (found,) = ingest(hub, [path], "reference")
    assert found.outcome == "new", found.reason
    with hub.transaction() as session:
        row = find(session, found.name)
        row.tree, row.tree_reason = TREE, {"by": "weights"}
    return found.name


@pytest.fixture
def lora(hub, tmp_path):
    """Register a LoRA in columns of the hub's basis, changed by `spoil`."""

    def make(name, own, dtype=torch.float32, declared=True, spoil=lambda down: down):
        tensors = {}
        for layer, width in WIDTHS.items():
            down = 0.5 * columns(width, own.seed, own.start, own.rank).T
            stem = f"unet.blocks.0.{layer}"
            tensors[f"{stem}.lora_A.weight"] = spoil(down).to(dtype).contiguous()
            tensors[f"{stem}.lora_B.weight"] = torch.randn(16, own.rank).to(dtype)
        path = tmp_path / f"{name}.safetensors"
        save_file(tensors, path, {"format": "pt"} | (own.to_metadata() if declared else {}))
        return add(hub, path)

    return make


def run(*arguments):
    done = CliRunner().invoke(basis, [*map(str, arguments), "--json"], catch_exceptions=True, standalone_mode=False)
    return done.exception, json.loads(done.stdout) if done.stdout else None


def ask(*arguments):
    error, found = run(*arguments)
    assert error is None, error
    return found


def assigned(concept, rank=4):
    found = ask("assign", TREE, concept, "--rank", rank)
    return BasisColumns(found["base"], found["seed"], found["start"], found["rank"])


def test_concepts_get_columns_of_the_narrowest_attention_layer(hub):
    first = ask("assign", "base", "cat", "--rank", 4)
    assert (first["base"], first["start"], first["made"]) == (TREE, 0, True)
    fields = {"base": TREE, "seed": first["seed"], "start": 0, "rank": 4}
    assert json.loads(first["metadata"]["modelgrove.basis"]) == fields
    assert assigned("dog").start == 4
    assert ask("assign", TREE, "cat", "--rank", 4) == {**first, "made": False}
    (listed,) = ask("ls", "base")
    assert (listed["columns"], listed["free"], listed["seed"]) == (32, 24, first["seed"])
    assert [(one["concept"], one["start"]) for one in listed["concepts"]] == [("cat", 0), ("dog", 4)]
    error, _ = run("assign", TREE, "owl", "--rank", 25)
    assert isinstance(error, ConflictError)
    ask("release", TREE, "cat")
    assert assigned("owl").start == 0


def test_a_width_may_be_said_before_the_first_columns(hub):
    ask("assign", TREE, "cat", "--rank", 4, "--width", 8)
    assert ask("ls")[0]["columns"] == 8


def test_a_model_without_a_tree_has_no_basis(hub):
    with hub.transaction() as session:
        session.get(Model, 1).tree = None
    error, _ = run("assign", "base", "cat", "--rank", 4)
    assert isinstance(error, UsageError)
    assert "no tree" in str(error)


def test_columns_are_written_for_every_width_that_has_them(hub, tmp_path):
    assigned("cat", 6)
    own = assigned("dog", 6)
    done = ask("export", TREE, "dog", tmp_path / "dog.safetensors")
    assert done["widths"] == [32, 48]  # the embedder of 8 has no column 11
    factors = load_file(tmp_path / "dog.safetensors")
    assert factors.keys() == {"width.32", "width.48"}
    for width in (32, 48):
        assert torch.equal(factors[f"width.{width}"], columns(width, own.seed, 6, 6).T)
    with safe_open(tmp_path / "dog.safetensors", "pt") as file:
        assert file.metadata() == own.to_metadata()
    error, _ = run("export", TREE, "owl", tmp_path / "owl.safetensors")
    assert isinstance(error, NotFoundError)
    assert not list(tmp_path.glob("*owl*"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_an_adapter_in_its_columns_passes(hub, lora, dtype):
    assigned("dog")
    name = lora("cat", assigned("cat"), dtype)
    report = ask("check", name)
    assert report["ok"]
    assert (report["declared"], report["concept"], report["modules"], report["outside"]) == (True, "cat", 2, [])


def test_layers_that_left_their_columns_are_named_with_their_distance(hub, lora):
    own = assigned("cat")

    def spoil(down):
        return down + 0.005 * columns(48, own.seed, 20, 4).T if down.shape[1] == 48 else down

    error, report = run("check", lora("cat", own, spoil=spoil))
    assert isinstance(error, DataError)
    (layer,) = report["outside"]
    assert "attn2" in layer["layer"]
    assert layer["distance"] == pytest.approx(0.01, rel=0.01)  # 0.005 of rows of length 0.5


def test_mixed_rows_of_the_right_columns_pass_and_are_told(hub, lora):
    mixing = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    report = ask("check", lora("cat", assigned("cat"), spoil=lambda down: mixing @ down))
    assert (report["ok"], report["rotated"]) == (True, 2)


def test_columns_of_another_concept_or_adapter_are_an_overlap(hub, lora):
    own = assigned("cat")
    first = lora("cat", own)
    other = lora("thief", BasisColumns(TREE, own.seed, 2, 4))
    error, report = run("check", other)
    assert isinstance(error, DataError)
    assert (report["concepts_overlapped"], report["models_overlapped"]) == (["cat"], [first])
    assert report["outside"] == []
    assert run("check", first)[1]["models_overlapped"] == [other]


def test_columns_that_nobody_declared_are_found(hub, lora):
    assigned("dog")
    report = ask("check", lora("cat", assigned("cat"), torch.float16, declared=False))
    assert (report["declared"], report["concept"], report["columns"]["start"]) == (False, "cat", 4)


def test_an_adapter_of_no_basis_fails(hub, lora):
    own = assigned("cat")
    noise = torch.Generator().manual_seed(0)
    name = lora("stranger", own, declared=False, spoil=lambda down: torch.randn(down.shape, generator=noise))
    error, report = run("check", name)
    assert isinstance(error, DataError)
    assert (report["columns"], report["ok"]) == (None, False)
