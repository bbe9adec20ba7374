"""What the service bears: `python bench/serve.py [load|download|upload]... [--quick] [--json]`.

A real server process (`modelgrove serve`) on this machine, its clients beside it on the same cores.

    load      200 connections that ask without a pause for 60 s: lists, models, the Hugging Face API, and one search in
              five, by words that come in an order of their own; answers a second, errors, median and 99th percentile
              (target: no error, p99 < 1 s)
    download  a file of 1 GiB by curl, from us and from nginx in turns; medians of five (target: 0.7 of nginx; needs
              Debian's `nginx-light`)
    upload    a checkpoint of 5 GB by `HfApi.upload_file`, and the server's peak memory (target: 500 MB)
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import click
from rich.console import Console
from rich.table import Table
from search import BASE, SAMPLE

PARTS = ("load", "download", "upload")
CLIENTS, SECONDS = 200, 60
PATIENCE = 30
GIB = 1 << 30
CLI = [sys.executable, "-c", "from modelgrove_hub.cli.root import main; main()"]
NGINX = """\
worker_processes 1; pid {folder}/nginx.pid; error_log {folder}/error.log; daemon off;
events {{ worker_connections 64; }}
http {{ access_log off; sendfile on; server {{ listen 127.0.0.1:{port}; root {folder}; }} }}
"""


@dataclass
class Served:
    """A server process and where it answers."""

    url: str
    process: subprocess.Popen[bytes]

    @property
    def peak(self) -> int:
        """The most memory, in bytes, that a process of the server ever held."""
        every = [self.process.pid, *_children(self.process.pid)]
        return max(_high_water(pid) for pid in every)


def _children(pid: int) -> list[int]:
    found = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True, check=False).stdout.split()
    return [int(child) for child in found]


def _high_water(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text("utf-8")
    return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) * 1024


@contextmanager
def served(home: Path) -> Iterator[Served]:
    """`modelgrove serve` on a free port until the block ends."""
    command, log = [*CLI, "--home", str(home), "serve", "--port", "0"], home.parent / "server.log"
    with log.open("w") as out:  # a pipe that nobody reads would stop the server when it is full
        process = subprocess.Popen(command, stderr=out)
    try:
        while not (found := re.search(r"http://\S+", log.read_text("utf-8"))):
            if process.poll() is not None:
                raise RuntimeError(f"the server did not start: {log.read_text('utf-8')}")
            time.sleep(0.1)
        yield Served(found[0], process)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)


def command(home: Path, *arguments: str) -> None:
    subprocess.run([*CLI, "--home", str(home), *arguments], check=True, capture_output=True)


# ---- load -----------------------------------------------------------------------------------


@dataclass
class Tally:
    """What came of requests: milliseconds by what was asked, and what went wrong."""

    times: dict[str, list[float]] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)


def load(home: Path, quick: bool) -> dict[str, Any]:
    command(home, "ingest", str(BASE), str(SAMPLE))
    command(home, "expert", "fit", "--tree", "zoo", "--no-ask", "--local")
    from modelgrove_hub.search.words import words

    names = [f"local/{path.name}" for path in sorted(SAMPLE.iterdir()) if path.is_dir()]
    with served(home) as server:
        seconds, clients = (5, 20) if quick else (SECONDS, CLIENTS)
        tally = asyncio.run(_ask(server.url, names, list(words()), clients, seconds))
        peak = server.peak
    every = [value for values in tally.times.values() for value in values]
    return {
        "clients": clients, "seconds": seconds, "answers_per_second": len(every) / seconds, "errors": len(tally.errors),
        "first_errors": tally.errors[:3], "peak_mb": peak / 1e6,
        "all": _spread(every), **{kind: _spread(values) for kind, values in sorted(tally.times.items())},
    }  # fmt: skip


def _spread(values: Sequence[float]) -> dict[str, float]:
    ordered = sorted(values)
    return {"p50_ms": ordered[len(ordered) // 2], "p99_ms": ordered[int(len(ordered) * 0.99)], "answers": len(ordered)}


async def _ask(url: str, names: list[str], texts: list[str], clients: int, seconds: float) -> Tally:
    tally, end = Tally(), time.monotonic() + seconds
    await asyncio.gather(*(_client(url, names, texts, random.Random(seed), end, tally) for seed in range(clients)))
    return tally


async def _client(
    url: str, names: list[str], texts: list[str], chance: random.Random, end: float, tally: Tally
) -> None:  # fmt: skip
    place = urlsplit(url)
    reader, writer = await asyncio.open_connection(place.hostname, place.port)
    asked: dict[str, Callable[[], str]] = {
        "list": lambda: f"/api/v1/models?limit=20&text={chance.choice('abcdefgh')}",
        "model": lambda: f"/api/v1/models/{chance.choice(names)}",
        "hf": lambda: f"/api/models/{chance.choice(names)}",
        "search": lambda: f"/api/v1/search?text={quote(chance.choice(texts))}",
    }
    try:
        while time.monotonic() < end:
            kind = chance.choices(list(asked), (3, 3, 2, 2))[0]
            path, started = asked[kind](), time.perf_counter()
            writer.write(f"GET {path} HTTP/1.1\r\nHost: {place.netloc}\r\n\r\n".encode())
            status = await asyncio.wait_for(_answer(reader), PATIENCE)
            tally.times.setdefault(kind, []).append(1000 * (time.perf_counter() - started))
            if status != 200:
                tally.errors.append(f"{status} {path}")
    except (OSError, ValueError, IndexError, TimeoutError, asyncio.IncompleteReadError) as error:
        tally.errors.append(repr(error))
    finally:
        writer.close()


async def _answer(reader: asyncio.StreamReader) -> int:
    """Read a whole answer: its status."""
    status, length = int((await reader.readline()).split()[1]), 0
    while (line := await reader.readline()) != b"\r\n":
        if line.lower().startswith(b"content-length:"):
            length = int(line.split(b":")[1])
    await reader.readexactly(length)
    return status


# ---- download -------------------------------------------------------------------------------


def download(home: Path, quick: bool) -> dict[str, Any]:
    from safetensors.torch import save_file
    from torch import rand

    if shutil.which("nginx") is None:
        return {"skipped": "no nginx here: apt-get install nginx-light"}
    size = GIB // (16 if quick else 1)
    file = home / "files/big.safetensors"
    file.parent.mkdir(parents=True)
    save_file({"weight": rand(size // 4)}, file)
    command(home, "ingest", str(file))
    with served(home) as server, _nginx(file.parent) as other:
        urls = {"modelgrove": f"{server.url}/local/big/resolve/main/{file.name}", "nginx": f"{other}/{file.name}"}
        speeds: dict[str, list[float]] = {name: [] for name in urls}
        for _ in range(2 if quick else 5):
            for name, url in urls.items():
                speeds[name].append(_fetch(url, file.stat().st_size))
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    return {**{f"{name}_mb_s": value / 1e6 for name, value in medians.items()}, "bytes": file.stat().st_size,
            "ratio": medians["modelgrove"] / medians["nginx"]}  # fmt: skip


def _fetch(url: str, size: int) -> float:
    curl = ["curl", "--silent", "--fail", "--output", os.devnull, "--write-out", "%{speed_download} %{size_download}"]
    speed, got = subprocess.run([*curl, url], check=True, capture_output=True, text=True).stdout.split()
    if int(got) != size:
        raise RuntimeError(f"{url}: {got} of {size} bytes")
    return float(speed)


@contextmanager
def _nginx(folder: Path) -> Iterator[str]:
    port = random.Random(os.getpid()).randrange(20000, 30000)
    config = folder / "nginx.conf"
    folder.chmod(0o755)
    config.write_text(NGINX.format(folder=folder, port=port), "utf-8")
    process = subprocess.Popen(["nginx", "-g", "user root;", "-c", str(config)])
    try:
        time.sleep(1)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(10)


# ---- upload ---------------------------------------------------------------------------------


def upload(home: Path, quick: bool) -> dict[str, Any]:
    from huggingface_hub import HfApi

    size = 5_000_000_000 // (20 if quick else 1) // 1024 * 1024
    header = json.dumps({"weight": {"dtype": "F16", "shape": [size // 2048, 1024], "data_offsets": [0, size]}}).encode()
    file = home / "sparse.safetensors"
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("wb") as out:  # zeros that take no room on disk
        out.write(len(header).to_bytes(8, "little") + header)
        out.truncate(8 + len(header) + size)
    with served(home) as server:
        hub = HfApi(endpoint=server.url, token="none")
        hub.create_repo("bench/large")
        before, started = server.peak, time.perf_counter()
        hub.upload_file(path_or_fileobj=file, path_in_repo=file.name, repo_id="bench/large")
        seconds, peak = time.perf_counter() - started, server.peak
    return {"bytes": file.stat().st_size, "seconds": seconds, "peak_mb": peak / 1e6, "before_mb": before / 1e6}


@click.command()
@click.argument("parts", nargs=-1, type=click.Choice(PARTS))
@click.option("--quick", is_flag=True, help="20 clients for 5 s, 64 MiB, 250 MB.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def main(parts: tuple[str, ...], quick: bool, as_json: bool) -> None:
    """Measure what the service bears."""
    run = {"load": load, "download": download, "upload": upload}
    results = {}
    for part in parts or PARTS:
        with tempfile.TemporaryDirectory() as folder:
            home = Path(folder) / "hub"
            command(home, "init")
            results[part] = run[part](home, quick)
    if as_json:
        click.echo(json.dumps({**results, "load_average": os.getloadavg()[0]}, indent=2))
        return
    for part, found in results.items():
        made = Table("what", "value", title=part)
        for name, value in found.items():
            made.add_row(name, json.dumps(value) if isinstance(value, dict) else str(value))
        Console(width=120).print(made)


if __name__ == "__main__":
    main()
