"""The same update in another file is found in the same place: gauge, scale, naming, padding, order and precision.

Files on disk → expert → vector → places among the shipped sample's models, as a search ranks them.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from zoo_models import DATA, KNOWN

from modelgrove_analyzers.encoders.dense import Dense
from modelgrove_analyzers.encoders.gram_ridge import GramRidge
from modelgrove_analyzers.encoders.mvprobe import MVProbe
from modelgrove_analyzers.encoders.probex import ProbeX
from modelgrove_analyzers.zoo.export import Convention, tensor_names
from modelgrove_hub.formats.adapters import read_adapter
from modelgrove_hub.search.text import embed_texts
from modelgrove_hub.testing import FolderModel, run_plugin

TRAINED = {"rank": 16, "epochs": 5}
PLUGINS = {
    "gram-ridge": (GramRidge, {}),
    "probex": (ProbeX, TRAINED),
    "mvprobe": (MVProbe, TRAINED),
    "dense": (Dense, TRAINED),
}
QUERIES = ("a cat", "a musical instrument", "a flower", "something to eat", "a vehicle", "a clock")
# Two LoRAs of each of twenty concepts to fit on, and ten new ones.
FIRST = {row["concept"]: row["name"] for row in KNOWN}
LEARNED = [row for row in KNOWN if row["name"] != FIRST[row["concept"]]][:40]
NEW = [row for row in KNOWN if row["name"] == FIRST[row["concept"]]][:10]
ROUNDING = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-9}


@dataclass(frozen=True)
class Place:
    """An encoder's expert, and where it puts the sample's models."""

    plugin: object
    expert: Path
    background: object
    queries: np.ndarray
    vectors: np.ndarray

    def vector(self, model) -> np.ndarray:
        return np.array(self.plugin.embed(self.expert, model), np.float32)

    def scores(self, vectors) -> np.ndarray:
        return self.background.scores(np.atleast_2d(vectors), self.queries)


@pytest.fixture(scope="module", params=PLUGINS)
def place(request, background, tmp_path_factory):
    plugin, options = PLUGINS[request.param]
    job = tmp_path_factory.mktemp(request.param)
    learned, new = ([opened(row) for row in rows] for rows in (LEARNED, NEW))
    run_plugin(plugin(), [model for model in learned if model.card], job, options)
    expert = job / "out/expert.safetensors"
    vectors = [plugin().embed(expert, model) for model in (*learned, *new)]
    queries = background.centre(embed_texts(list(QUERIES)))
    return Place(plugin(), expert, background, queries, np.array(vectors, np.float32))


def opened(row):
    return FolderModel(DATA / "sample" / row["path"], name=row["name"], adapter_type="lora")


def invertible(rank, condition, generator):
    """R (rank, rank) with singular values from 1 down to 1 / condition, float64."""
    left, right = (torch.linalg.qr(torch.randn(rank, rank, generator=generator).double()).Q for _ in range(2))
    return left * torch.logspace(0, -np.log10(condition), rank, dtype=torch.float64) @ right


def rewritten(model, folder, convention, *, condition, alpha, padding, dtype, seed):
    """The model in another file: other factors of the same updates, as precise as `dtype` allows."""
    generator = torch.Generator().manual_seed(seed)
    folder.mkdir()
    tensors, ranks = {}, {}
    modules = list(read_adapter(model).modules.values())
    for number in torch.randperm(len(modules), generator=generator).tolist():
        factors = modules[number]
        R = invertible(factors.rank, condition, generator)
        down, up = R @ factors.down.double(), factors.up.double() @ torch.linalg.inv(R)
        down = torch.cat([down, torch.zeros(padding, down.shape[1])])
        up = torch.cat([up, torch.zeros(len(up), padding)], 1)
        rank = ranks[factors.module] = len(down)
        names = tensor_names(factors.module, convention)
        tensors[names[0]], tensors[names[1]] = down.to(dtype), (up * rank / alpha).to(dtype)
        if convention is Convention.KOHYA:
            tensors[names[0].replace("lora_down.weight", "alpha")] = torch.tensor(alpha, dtype=dtype)
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    (rank,) = set(ranks.values())
    config = {"r": rank, "lora_alpha": alpha}
    metadata = {"lora_adapter_metadata": json.dumps({f"unet.{name}": value for name, value in config.items()})}
    save_file(tensors, folder / "m.safetensors", metadata if convention is Convention.DIFFUSERS else None)
    if convention is Convention.PEFT:
        (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **config}))
    return FolderModel(folder, name=folder.name, adapter_type="lora")


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.integers(0, len(LEARNED) + len(NEW) - 1),
    st.sampled_from(list(Convention)),
    # Rounding the factors moves the update by up to condition · rounding: more in half precision is another update.
    st.sampled_from([(1, torch.float32), (1000, torch.float32), (10, torch.float16), (2, torch.bfloat16)]),
    st.sampled_from([0.5, 1.0, 24.0]),
    st.integers(0, 3),
    st.integers(0, 2**31),
)
def test_the_same_update_is_found_in_the_same_place(
    place, tmp_path_factory, row, convention, gauge, alpha, padding, seed
):
    condition, dtype = gauge
    folder = tmp_path_factory.mktemp("rewritten") / "model"
    again = place.vector(
        rewritten(
            opened([*LEARNED, *NEW][row]), folder, convention, condition=condition, alpha=alpha, padding=padding,
            dtype=dtype, seed=seed,
        )
    )  # fmt: skip
    # Relatively, an update moves by condition · rounding at most, and float32 arithmetic alone makes less than 2e-5.
    # An encoder whose encodings are shorter than what it reads amplifies that: 1.2 times was seen, 4 are allowed.
    tolerance = 4 * max(condition * ROUNDING[dtype], 2e-5)
    assert np.linalg.norm(again - place.vectors[row]) <= tolerance
    # Scores divide by the spread of background prompts, about 0.05: only models as near as that may change places.
    scores, (new,) = place.scores(place.vectors), place.scores(again)
    apart = np.abs(scores - scores[row]) > 20 * tolerance
    assert ((scores > scores[row]) == (scores > new))[apart].all()
