"""What the index of vectors costs and finds: `python bench/index.py [--quick] [--json]`.

10⁴, 10⁵ and 10⁶ vectors of 384 numbers, one thread, searched one query at a time with what `modelgrove search` uses.
`texts` are vectors like those of models: near one label or between two (names of pictures in Unicode), with noise,
scaled as search scales them; queries are sentences about some of the names. `random` directions are the worst case,
which no embedding looks like: nothing is near anything, so cells tell nothing.

    kind        flat: all vectors are compared; 512 lists: inverted lists around so many k-means centres
    build_s     CPU seconds to make it of vectors in memory
    file_mb     size of its file
    save_s      clock seconds to write the file, with fsync
    open_s      clock seconds to open it as a new process does: read, checksum, FAISS; the file is in the page cache
    p50_ms, p99_ms
                CPU milliseconds a query for the first ten
    flat_ms     the same, median, when all vectors are compared
    recall10    share of the true first ten (by comparing all) among the first ten
    recall200   share of the true first ten among the first 200, which search scores again exactly
    few_ms, few_recall10
                median and recall10 when a filter allows one in a hundred, at random
    half_ms     median when it allows one in two
    change_ms   CPU milliseconds to take up 100 changed vectors: copy, remove, add
"""

from __future__ import annotations

import json
import os
import tempfile
import time
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import faiss
import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from modelgrove_hub.search.background import load_background
from modelgrove_hub.search.index_file import Version, read_index, write_index
from modelgrove_hub.search.text import SPACE, embed_texts
from modelgrove_hub.search.vectors import SAMPLE, VectorIndex, lists_for

Vectors = NDArray[np.float32]

SIZES, QUICK_SIZES = (10_000, 100_000, 1_000_000), (10_000, 100_000)
QUERIES, QUICK_QUERIES = 100, 50
BATCH = 20_000
FIRST, WINDOW = 10, 200
NOISE = (0.3, 1.0)
"""Least and greatest length of a model's noise, of a label's length."""
CHANGED = 100
VERSION = Version("weights", SPACE, 0, 0, "", "")


def labels() -> list[str]:
    return [name.lower() for code in range(0x1F300, 0x1FB00) if (name := unicodedata.name(chr(code), ""))]


def like_models(centres: Vectors, count: int) -> Iterator[Vectors]:
    rng = np.random.default_rng(0)
    for start in range(0, count, BATCH):
        size = min(BATCH, count - start)
        first, second = rng.integers(len(centres), size=(2, size))
        share = rng.uniform(0, 0.5, (size, 1)).astype(np.float32)
        noise = rng.uniform(*NOISE, (size, 1)).astype(np.float32) * directions(normal(rng, size))
        yield (1 - share) * centres[first] + share * centres[second] + noise


def directions_at_random(count: int) -> Iterator[Vectors]:
    rng = np.random.default_rng(0)
    for start in range(0, count, BATCH):
        yield normal(rng, min(BATCH, count - start))


def normal(rng: np.random.Generator, count: int) -> Vectors:
    return rng.standard_normal((count, 384), dtype=np.float32)


def directions(rows: Vectors) -> Vectors:
    found: Vectors = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return found


def build(vectors: Vectors) -> VectorIndex:
    """As `modelgrove_hub.search.index` does, which reads the vectors from the database."""
    lists = lists_for(len(vectors))
    chosen = np.sort(np.random.default_rng(0).permutation(len(vectors))[: lists * SAMPLE])
    index = VectorIndex.empty(vectors.shape[1], lists, vectors[chosen])
    for start in range(0, len(vectors), BATCH):
        part = vectors[start : start + BATCH]
        index.replace(np.arange(start, start + len(part)), part)
    return index


def best_of(vectors: Vectors, queries: Vectors, chosen: NDArray[np.int64]) -> list[set[int]]:
    """The ids of the first ten of the `chosen` for every query, by comparing all."""
    scores, ids = np.empty((len(queries), 0), np.float32), np.empty((len(queries), 0), np.int64)
    for start in range(0, len(chosen), BATCH):
        part = chosen[start : start + BATCH]
        scores = np.hstack([scores, queries @ vectors[part].T])
        ids = np.hstack([ids, np.broadcast_to(part, (len(queries), len(part)))])
        order = np.argpartition(-scores, FIRST - 1)[:, :FIRST]
        scores, ids = np.take_along_axis(scores, order, 1), np.take_along_axis(ids, order, 1)
    return [set(row.tolist()) for row in ids]


def ask(queries: Vectors, search: Callable[[Vectors], list[tuple[int, float]]]) -> tuple[list[float], list[set[int]]]:
    """CPU milliseconds and ids found for every query."""
    times, found = [], []
    for query in queries:
        started = time.process_time()
        hits = search(query)
        times.append(1000 * (time.process_time() - started))
        found.append({one for one, _ in hits})
    return times, found


def recall(found: list[set[int]], best: list[set[int]]) -> float:
    return float(np.mean([len(one & other) / len(other) for one, other in zip(found, best, strict=True)]))


def clocked(work: Callable[[], Any], clock: Callable[[], float]) -> tuple[Any, float]:
    started = clock()
    result = work()
    return result, clock() - started


def measure(vectors: Vectors, queries: Vectors, folder: Path) -> dict[str, float | str]:
    index, build_s = clocked(lambda: build(vectors), time.process_time)
    path = folder / "bench.faiss"
    _, save_s = clocked(lambda: write_index(path, index, VERSION), time.monotonic)
    (index, *_), open_s = clocked(lambda: read_index(path), time.monotonic)
    size = path.stat().st_size
    path.unlink()
    every, rng = np.arange(len(vectors)), np.random.default_rng(1)
    few, half = (np.sort(rng.permutation(every)[: len(every) // share]) for share in (100, 2))
    best, best_few = best_of(vectors, queries, every), best_of(vectors, queries, few)
    times, found = ask(queries, lambda query: index.search(query, FIRST))
    _, window = ask(queries, lambda query: index.search(query, WINDOW))
    few_times, few_found = ask(queries, lambda query: index.search(query, FIRST, few))
    half_times, _ = ask(queries[:20], lambda query: index.search(query, FIRST, half))
    flat_times, _ = ask(queries[:20], lambda query: list(enumerate((vectors @ query)[:FIRST])))
    changed = rng.permutation(every)[:CHANGED]
    _, change_s = clocked(lambda: index.copy().replace(changed, vectors[changed]), time.process_time)
    return {
        "kind": f"{index.lists} lists" if index.lists else "flat",
        "build_s": build_s,
        "file_mb": size / 1e6,
        "save_s": save_s,
        "open_s": open_s,
        "p50_ms": float(np.median(times)),
        "p99_ms": float(np.quantile(times, 0.99)),
        "flat_ms": float(np.median(flat_times)),
        "recall10": recall(found, best),
        "recall200": recall(window, best),
        "few_ms": float(np.median(few_times)),
        "few_recall10": recall(few_found, best_few),
        "half_ms": float(np.median(half_times)),
        "change_ms": 1000 * change_s,
    }


@click.command()
@click.option("--quick", is_flag=True, help=f"Only {' and '.join(f'{size:,}' for size in QUICK_SIZES)} vectors.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def main(quick: bool, as_json: bool) -> None:
    """Measure the index of vectors by size."""
    faiss.omp_set_num_threads(1)
    torch.set_num_threads(1)
    background, names = load_background(), labels()
    asked = [f"a picture of a {name}" for name in names[:: -(-len(names) // (QUICK_QUERIES if quick else QUERIES))]]
    queries = background.centre(embed_texts(asked))
    centres = directions(background.centre(embed_texts(names)))
    results = {}
    for size in QUICK_SIZES if quick else SIZES:
        for population, made in (("texts", like_models(centres, size)), ("random", directions_at_random(size))):
            vectors = np.empty((size, queries.shape[1]), np.float32)
            for start, part in zip(range(0, size, BATCH), made, strict=True):
                vectors[start : start + len(part)] = background.scale(directions(part))
            with tempfile.TemporaryDirectory() as folder:
                row = results[f"{population} {size:,}"] = measure(vectors, queries, Path(folder))
            click.echo(f"{population} {size:,}: {json.dumps(row)}", err=True)
    if as_json:
        click.echo(json.dumps({"load": os.getloadavg()[0], "indexes": results}, indent=2))
        return
    table = Table("measure", *results, title=f"{len(queries)} queries, one thread, load {os.getloadavg()[0]:.1f}")
    for name in next(iter(results.values())):
        table.add_row(name, *(shown(row[name]) for row in results.values()))
    Console(width=160).print(table)


def shown(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.3f}" if value < 10 else f"{value:,.0f}"


if __name__ == "__main__":
    main()
