"""`modelgrove basis`: columns of a shared orthogonal basis, so that adapters can be merged without harm."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from modelgrove_hub.cli.output import json_option, print_facts, print_json, print_table, say
from modelgrove_hub.cli.work import open_hub, resolve
from modelgrove_hub.errors import DataError, NotFoundError, UsageError

if TYPE_CHECKING:
    from sqlmodel import Session

    from modelgrove_hub.contracts import InputModel
    from modelgrove_hub.formats.shared_basis import BasisColumns
    from modelgrove_hub.hub import Hub
    from modelgrove_plugins.basis.checking import Checked


@click.group()
def basis() -> None:
    """Hand out columns of a basis that all adapters of a base share; those of two concepts never meet.

    BASE is the base model, any other model of its tree, or the tree's name.
    """


@basis.command()
@click.argument("base")
@click.argument("concept")
@click.option("--rank", type=click.IntRange(1), required=True, help="Of the adapter: how many columns it needs.")
@click.option(
    "--width",
    type=click.IntRange(1),
    help="Inputs of the narrowest layer that is trained; default: of the base's narrowest attention layer.",
)
@json_option
def assign(base: str, concept: str, rank: int, width: int | None, as_json: bool) -> None:
    """Give CONCEPT columns of its own, or tell those that it has."""
    from modelgrove_hub.registry import shared_bases

    hub = open_hub()
    with hub.reading() as session:
        tree = _tree(session, base)
        known = any(row.tree == tree for row in shared_bases.bases(session))
    if width is None and not known:
        from modelgrove_plugins.basis.layers import narrowest

        width = narrowest(_network(hub, tree))
    with hub.transaction() as session:
        found = shared_bases.assign(session, tree, concept, rank, width)
    columns, metadata = found.columns, found.columns.to_metadata()
    if as_json:
        print_json({"concept": concept, **asdict(columns), "made": found.made, "metadata": metadata})
        return
    click.echo(f"{concept} has columns {columns.start} to {columns.stop - 1} of the basis of {columns.base}")
    (entry,) = metadata.items()
    click.echo("in the adapter's metadata: " + "=".join(entry))


@basis.command("ls")
@click.argument("base", required=False)
@json_option
def list_bases(base: str | None, as_json: bool) -> None:
    """List bases and which concept has which columns."""
    from modelgrove_hub.registry import shared_bases

    with open_hub().reading() as session:
        tree = _tree(session, base) if base else None
        rows: list[dict[str, Any]] = [
            {
                "base": row.tree,
                "seed": row.seed,
                "columns": row.columns,
                "free": sum(count for _, count in shared_bases.gaps(row, ranges)),
                "concepts": [one.model_dump(include={"concept", "start", "rank"}) for one in ranges],
            }
            for row in shared_bases.bases(session)
            for ranges in (shared_bases.ranges_of(session, row.tree),)
            if tree in (None, row.tree)
        ]
    if as_json:
        print_json(rows)
        return
    print_table(
        ("base", "concept", "columns", "rank"),
        (
            (row["base"], one["concept"], f"{one['start']} to {one['start'] + one['rank'] - 1}", one["rank"])
            for row in rows
            for one in row["concepts"]
        ),
        empty="No concept has columns. Next: modelgrove basis assign BASE CONCEPT --rank 16",
    )
    for row in rows:
        say(f"basis of {row['base']}, seed {row['seed']}: {row['free']} of {row['columns']} columns are free")


@basis.command()
@click.argument("base")
@click.argument("concept")
@json_option
def release(base: str, concept: str, as_json: bool) -> None:
    """Take back the columns of CONCEPT. Only do it when no adapter that was trained in them is left."""
    from modelgrove_hub.registry import shared_bases

    with open_hub().transaction() as session:
        columns = shared_bases.release(session, _tree(session, base), concept)
    if as_json:
        print_json({"concept": concept, **asdict(columns)})
    else:
        say(f"columns {columns.start} to {columns.stop - 1} of the basis of {columns.base} are free")


@basis.command()
@click.argument("base")
@click.argument("concept")
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@json_option
def export(base: str, concept: str, file: Path, as_json: bool) -> None:
    """Write CONCEPT's columns to FILE (safetensors) for any trainer: width.N is the frozen down factor of N inputs."""
    from modelgrove_hub.registry.shared_bases import bases, columns_of, ranges_of
    from modelgrove_plugins.basis.layers import write_columns

    hub = open_hub()
    with hub.reading() as session:
        tree = _tree(session, base)
        row = next((row for row in bases(session) if row.tree == tree), None)
        found = next((one for one in ranges_of(session, tree) if one.concept == concept), None)
    if row is None or found is None:
        raise NotFoundError(f"{concept} has no columns of the basis of {tree}: see `modelgrove basis assign`")
    columns = columns_of(row, found)
    widths = write_columns(_network(hub, tree), columns, file)
    if as_json:
        print_json({"file": str(file), "concept": concept, **asdict(columns), "widths": widths})
    else:
        say(f"{file}: {columns.rank} columns for layers of {', '.join(map(str, widths))} inputs")


@basis.command()
@click.argument("model")
@json_option
def check(model: str, as_json: bool) -> None:
    """Check that an adapter keeps to its columns, and that no other has them (exit code 5 if not)."""
    from modelgrove_hub.formats.shared_basis import BasisColumns
    from modelgrove_hub.registry.inputs import load_input
    from modelgrove_hub.registry.models import find
    from modelgrove_hub.registry.shared_bases import bases
    from modelgrove_plugins.basis.checking import check as look_at

    hub = open_hub()
    source = load_input(hub, resolve(hub, model))
    with hub.reading() as session:
        tree = find(session, model).tree
        row = next((row for row in bases(session) if row.tree == tree), None)
    found = look_at(source, BasisColumns(row.tree, row.seed, 0, row.columns) if row else None)
    report = _report(hub, source.name, tree, found)
    if as_json:
        print_json(report)
    else:
        _tell(report)
    if not report["ok"]:
        raise DataError(f"{source.name} cannot be merged without crosstalk with the others of its basis")


def _report(hub: Hub, name: str, tree: str | None, found: Checked) -> dict[str, Any]:
    own, others, ranges = None, [], []
    if found.columns and tree:
        with hub.reading() as session:
            ranges = _ranges(session, tree, found.columns)
            others = _others(session, tree, name, found.columns)
        exact = {concept for concept, columns in ranges if columns == found.columns}
        own = next(iter(exact), None)
    foreign = [concept for concept, _ in ranges if concept != own]
    return {
        "model": name,
        "ok": found.kept and not foreign and not others,
        "declared": found.declared,
        "columns": asdict(found.columns) if found.columns else None,
        "concept": own,
        "modules": found.modules,
        "rotated": found.rotated,
        "outside": list(found.layers),
        "concepts_overlapped": foreign,
        "models_overlapped": others,
    }


def _tell(report: dict[str, Any]) -> None:
    columns = report["columns"]
    if columns is None:
        say(f"{report['model']} declares no columns, and reads those of no basis of its tree.")
        return
    print_facts(
        [
            ("columns", f"{columns['start']} to {columns['start'] + columns['rank'] - 1} of {columns['base']}"),
            ("", "declared" if report["declared"] else "not declared: found in the weights"),
            ("concept", report["concept"] or "none of this hub has exactly these"),
            ("layers", f"{report['modules'] - len(report['outside'])} of {report['modules']} keep to them"),
            ("overlaps", [*report["concepts_overlapped"], *report["models_overlapped"]]),
        ]
    )
    for one in report["outside"]:
        click.echo(f"  {one['layer']}: {one['distance']:.3g} of it is outside, {one['width']} inputs")


def _ranges(session: Session, tree: str, columns: BasisColumns) -> list[tuple[str, BasisColumns]]:
    """Concepts of the tree's basis that have a column of these."""
    from modelgrove_hub.registry.shared_bases import bases, columns_of, ranges_of

    rows = [row for row in bases(session) if row.tree == tree]
    found = [(one.concept, columns_of(row, one)) for row in rows for one in ranges_of(session, tree)]
    return [(concept, own) for concept, own in found if own.overlaps(columns)]


def _others(session: Session, tree: str, name: str, columns: BasisColumns) -> list[str]:
    """Registered adapters that declare a column of these."""
    from modelgrove_hub.registry.shared_bases import declared_in

    return [other for other, own in declared_in(session, tree) if other != name and own.overlaps(columns)]


def _tree(session: Session, base: str) -> str:
    from modelgrove_hub.registry.models import find
    from modelgrove_hub.registry.shared_bases import is_tree

    if is_tree(session, base):
        return base
    model = find(session, base)
    if model.tree is None:
        raise UsageError(
            f"model {model.name} belongs to no tree, so it has no basis: see `modelgrove show {model.name}`"
        )
    return model.tree


def _network(hub: Hub, tree: str) -> InputModel:
    """The network that the tree grew from."""
    from modelgrove_hub.registry.inputs import load_input
    from modelgrove_hub.registry.models import latest_revision
    from modelgrove_hub.registry.trees import find_root

    with hub.reading() as session:
        root = find_root(session, tree)
        revision = latest_revision(session, root).id if root else None
    if revision is None:
        raise NotFoundError(
            f"the base of tree {tree} is not registered, so its layers are not known: ingest it, or say --width"
        )
    return load_input(hub, revision)
