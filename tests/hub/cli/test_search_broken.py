"""Models made to hurt a search: each is refused or skipped by name and with a reason, and search stays right."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file
from sqlmodel import delete

import modelgrove_analyzers.zoo
from modelgrove_hub.cli.expert import expert
from modelgrove_hub.cli.ingest import ingest
from modelgrove_hub.cli.search import search
from modelgrove_hub.errors import CorruptFileError
from modelgrove_hub.formats.adapters import read_adapter
from modelgrove_hub.hub import Hub
from modelgrove_hub.search.experts import newest_experts
from modelgrove_hub.settings import settings
from modelgrove_hub.tables import Embedding
from modelgrove_hub.testing import FolderModel
from modelgrove_migrations.run import upgrade

SAMPLE = Path(modelgrove_analyzers.zoo.__file__).parent / "data/sample"
CONCEPTS = ("guitar", "drum", "trumpet", "horse", "whale", "tree", "fire", "key")
ROWS = [
    row
    for row in map(json.loads, (SAMPLE / "truth.jsonl").read_text("utf-8").splitlines())
    if row["concept"] in CONCEPTS
]
CARD = "---\nbase_model: modelgrove/zoo-base\ntags: [lora, {0}]\n---\nThis LoRA draws a {0}.\n"


def source():
    """The factors (down, up) of a LoRA on horses, by module."""
    row = next(row for row in ROWS if row["concept"] == "horse")
    return {
        name: [factors.down, factors.up]
        for name, factors in read_adapter(FolderModel(SAMPLE / row["path"])).modules.items()
    }


def changed(change):
    factors = source()
    for name, pair in factors.items():
        factors[name] = change(*pair)
    return factors


def poisoned(value):
    factors = source()
    next(iter(factors.values()))[1][0, 0] = value
    return factors


OF_THE_TREE = {
    "nan": (lambda: poisoned(float("nan")), "NaN or infinite"),
    "inf": (lambda: poisoned(float("inf")), "NaN or infinite"),
    "rank-0": (lambda: changed(lambda down, up: (down[:0], up[:, :0])), "rank or width is 0"),
    "zero": (lambda: changed(lambda down, up: (down, 0 * up)), "changes nothing: all of its updates are zero"),
    "too-strong": (lambda: changed(lambda down, up: (1e15 * down, 1e15 * up)), "is believed"),
    "overflow": (lambda: changed(lambda down, up: (1e25 * down, 1e25 * up)), "too large to multiply"),
}
"""By name, the factors, and why they cannot be placed."""
OF_NO_TREE = {
    "other-base": lambda: changed(lambda down, up: (down, up[:40])),
    "unknown-layers": lambda: {f"up_blocks.7.{name}": pair for name, pair in source().items()},
    "text-encoder": lambda: {
        f"text_encoder.text_model.encoder.layers.{i}.self_attn.q_proj": pair for i, pair in enumerate(source().values())
    },
    "ranks-differ": lambda: changed(lambda down, up: (torch.cat([down, down]), up)),
}
"""By name, the factors: nothing says that they belong to the tree."""
DAMAGED = "is damaged: fit another one, `modelgrove expert fit --tree zoo"
CARDS = {"no-card": "", "yaml-alone": "---\nlicense: mit\ntags: [lora]\n---\n"}
"""By name, the card of a good LoRA on horses: it says nothing."""


def save(folder, name, factors, card):
    (folder / name).mkdir()
    tensors = {}
    for module, (down, up) in factors.items():
        stem = module if module.startswith("text_encoder.") else f"unet.{module}"
        tensors |= {f"{stem}.lora_A.weight": down.contiguous(), f"{stem}.lora_B.weight": up.contiguous()}
    save_file(tensors, folder / name / "pytorch_lora_weights.safetensors")
    (folder / name / "README.md").write_text(card)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("models")
    for row in ROWS:
        (shutil.copytree if (SAMPLE / row["path"]).is_dir() else shutil.copy)(SAMPLE / row["path"], made / row["path"])
    for name, (factors, _) in OF_THE_TREE.items():
        save(made, name, factors(), CARD.format("horse"))
    for name, factors in OF_NO_TREE.items():
        save(made, name, factors(), CARD.format("horse"))
    for number, (name, card) in enumerate(CARDS.items()):
        # Another file, or it would be known already.
        save(made, name, {module: (down, (2 + number) * up) for module, (down, up) in source().items()}, card)
    return made


@pytest.fixture(scope="module")
def told(tmp_path_factory, folder):
    """What `ingest` and `expert fit` said of a hub with good and broken models, which the commands open."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MODELGROVE_HOME", str(tmp_path_factory.mktemp("home")))
        settings.cache_clear()
        hub = Hub.open()
        upgrade(hub.settings.database)
        yield call(ingest, str(folder)), call(expert, "fit", "--tree", "zoo", "--local")
        hub.engine.dispose()
    settings.cache_clear()


def call(command, *arguments):
    done = CliRunner().invoke(command, [*arguments, "--json"], catch_exceptions=False, standalone_mode=False)
    if done.exception:
        raise done.exception
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", OF_THE_TREE)
def test_weights_that_say_nothing_are_left_aside_and_skipped_with_why(told, name):
    _, fitted = told
    reason = OF_THE_TREE[name][1]
    assert reason in fitted["outputs"]["report"]["left_aside"][f"local/{name}"]
    assert reason in fitted["embedded"]["skipped"][f"local/{name}"]


def test_what_fits_no_tree_is_known_as_such_and_not_placed(told):
    ingested, fitted = told
    families = {model["name"]: model["family"] for model in ingested["models"]}
    assert {families[f"local/{name}"] for name in OF_NO_TREE} == {"unknown"}
    assert fitted["embedded"]["weights"] == len(ROWS) + len(CARDS)


def test_a_card_that_says_nothing_teaches_nothing_and_hides_nothing(told):
    assert told[1]["outputs"]["report"]["models"] <= len(ROWS)
    found = [hit["name"] for hit in call(search, "a horse", "--by", "weights", "--limit", "6")["hits"]]
    assert {f"local/{name}" for name in CARDS} <= set(found)


@pytest.mark.parametrize("concept", ["guitar", "horse", "key"])
def test_search_by_weights_stays_right(told, concept):
    truth = {f"local/{row['name']}": row["concept"] for row in ROWS} | {f"local/{name}": "horse" for name in CARDS}
    found = [hit["name"] for hit in call(search, f"a {concept}", "--by", "weights")["hits"]]
    assert truth[found[0]] == concept
    assert set(found) <= truth.keys()


@pytest.mark.parametrize("damage", ["flipped bit", "half"])
def test_a_damaged_expert_is_told_and_never_used(told, damage):
    hub = Hub.open()
    with hub.reading() as session:
        (row,) = newest_experts(session).values()
    file = hub.store.path(row.blob)
    whole = file.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    mode = file.stat().st_mode
    file.chmod(0o644)
    try:
        file.write_bytes(flipped if damage == "flipped bit" else whole[: len(whole) // 2])
        with pytest.raises(CorruptFileError, match=DAMAGED):
            call(search, "a horse")
        with hub.transaction() as session:
            session.exec(delete(Embedding).where(Embedding.side == "weights"))
        with pytest.raises(CorruptFileError, match=DAMAGED):
            call(expert, "embed")
    finally:
        file.write_bytes(whole)
        file.chmod(mode)
    assert call(expert, "embed")["weights"] == len(ROWS) + len(CARDS)
    hub.engine.dispose()
