"""The shipped base and some of the shipped LoRAs, with what each was trained on."""

from __future__ import annotations

import json
from pathlib import Path

import modelgrove_analyzers.zoo
from modelgrove_analyzers.encoders.deltas import read_model
from modelgrove_analyzers.encoders.features import common_layers, stacked
from modelgrove_analyzers.encoders.lesson import Lesson
from modelgrove_analyzers.encoders.training import label_vectors
from modelgrove_hub.search.background import Background
from modelgrove_hub.testing import FolderModel

DATA = Path(modelgrove_analyzers.zoo.__file__).parent / "data"
BASE = FolderModel(DATA / "zoo-base", name="modelgrove/zoo-base")
ROWS = [json.loads(line) for line in (DATA / "sample/truth.jsonl").read_text("utf-8").splitlines()]
KNOWN = [row for row in ROWS if not row["held_out"]]
HELD_OUT = [row for row in ROWS if row["held_out"]]
WORDS = (
    "violin", "leopard", "dolphin", "motorcycle", "palm tree", "purple heart", "cupcake", "tulip", "cat", "dog",
    "horse", "fish", "rose", "apple", "pizza", "house", "train", "bicycle", "airplane", "rocket", "clock",
    "soccer ball", "guitar", "drum", "crown", "key", "ghost", "red heart", "river", "shoe", "chair", "umbrella",
    "spider", "cheese", "mountain", "book", "robot", "hat", "tower", "snowman",
)  # fmt: skip


def updates(rows, shapes=None):
    models = [read_model(FolderModel(DATA / "sample" / row["path"], name=row["name"]), None, 4) for row in rows]
    return stacked(models, shapes or common_layers(models))


def lesson(rows, background: Background, base=BASE) -> Lesson:
    import torch

    labels = label_vectors([(row["concept"], row["text"]) for row in rows], background)
    return Lesson(updates(rows), labels, background, 0.8, torch.Generator().manual_seed(0), base=base, words=WORDS)
