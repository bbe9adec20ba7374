"""A short, always equal part of what bench/fuzz.py does; and a parser that is at fault is told."""

import random

import pytest

from modelgrove_hub.errors import DataError

NAMES = (
    "safetensors header", "GGUF header", "ONNX graph", "pickle, what it is", "pickle, is it plain", "card",
    "adapter keys", "quantized manifest", "sparse manifest", "scan manifest", "any file, recognised",
    "configs of a folder",
)  # fmt: skip


def test_all_parsers_are_here(bench):
    assert set(NAMES) == set(bench.TARGETS)
    assert sum(inputs for _, inputs in bench.TARGETS.values()) >= 10**6


@pytest.mark.parametrize("name", NAMES)
def test_mutated_files_are_read_or_refused(bench, name):
    row = bench.run(name, 300, 1, "", memory=0)
    assert (row["crashes"], row["kinds"]) == (0, [])


def test_inputs_are_the_same_again_and_differ_from_their_seeds(bench):
    made = [[bench.mutated([b"some bytes", b"others"], random.Random(seed)) for seed in range(50)] for _ in range(2)]
    assert made[0] == made[1]
    assert len(set(made[0]) - {b"some bytes", b"others"}) > 40


def test_a_crash_is_counted_and_its_input_kept(bench, monkeypatch, tmp_path):
    def read(data):
        if len(data) > 4:
            raise KeyError("a parser's own fault")
        raise DataError("refused")

    monkeypatch.setitem(bench.TARGETS, "faulty", (lambda: ([b"some"], read), 1))
    row = bench.run("faulty", 200, 0, str(tmp_path), memory=0)
    assert 0 < row["crashes"] < 200
    [kept] = tmp_path.iterdir()
    with pytest.raises(KeyError):
        read(kept.read_bytes())
