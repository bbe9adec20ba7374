"""Schemas go up and down on both databases, keep rows, and agree with the code."""

from __future__ import annotations

import shutil
import subprocess
import sys
from multiprocessing import get_context
from pathlib import Path

import pytest
from sqlalchemy import inspect, text
from sqlmodel import select

from modelgrove_hub import tables
from modelgrove_hub.errors import StorageError, UsageError
from modelgrove_hub.registry import schema
from modelgrove_hub.registry.commits import head, history
from modelgrove_hub.registry.database import connect, transaction
from modelgrove_hub.registry.events import check_chain, record
from modelgrove_hub.registry.models import latest_revision
from modelgrove_hub.tables import Blob, Edge, Job, Model, Relation, Revision, RevisionFile
from modelgrove_migrations import run

# A migration that rewrites the table every other one points to: the hardest thing for SQLite.
REWRITE = """
import sqlalchemy as sa
from alembic import op
revision, down_revision, branch_labels, depends_on = "0008", "0007", None, None

def HOW():
    return "always" if op.get_bind().dialect.name == "sqlite" else "never"

def upgrade():
    with op.batch_alter_table("model", recreate=HOW()) as batch:
        batch.add_column(sa.Column("stars", sa.Integer, nullable=False, server_default="0"))
    with op.batch_alter_table("revision", recreate=HOW()) as batch:
        batch.alter_column("digest", type_=sa.String(128))

def downgrade():
    with op.batch_alter_table("revision", recreate=HOW()) as batch:
        batch.alter_column("digest", type_=sa.String(64))
    with op.batch_alter_table("model", recreate=HOW()) as batch:
        batch.drop_column("stars")
"""


def test_upgrade_makes_every_table_the_code_declares(database_url: str) -> None:
    run.upgrade(database_url)

    engine = connect(database_url)
    assert set(inspect(engine).get_table_names()) == {*tables.SQLModel.metadata.tables, "alembic_version"}
    assert run.current(database_url) == schema.HEAD
    engine.dispose()


def test_models_and_migrations_agree(database_url: str) -> None:
    run.upgrade(database_url)

    assert run.check(database_url) == []


def test_check_names_what_differs(database_url: str) -> None:
    run.upgrade(database_url)
    _execute(database_url, "ALTER TABLE event DROP COLUMN detail", "CREATE TABLE stray (id INTEGER PRIMARY KEY)")
    _execute(database_url, "DROP INDEX ix_job_state")

    differences = "\n".join(run.check(database_url))

    assert "column event.detail: only in the code" in differences
    assert "table stray: only in the database" in differences
    assert "index job.ix_job_state: only in the code" in differences


def test_check_of_a_database_without_tables_says_what_to_run(database_url: str) -> None:
    with pytest.raises(StorageError, match="modelgrove db upgrade"):
        run.check(database_url)


def test_head_in_the_hub_is_the_newest_migration() -> None:
    assert run.head() == schema.HEAD


def test_revision_ids_sort_as_text_because_the_hub_compares_them_so() -> None:
    files = sorted((run.SCRIPTS / "versions").glob("*.py"))
    assert [file.name[:4] for file in files] == [f"{number:04d}" for number in range(1, len(files) + 1)]


def test_scripts_import_nothing_of_ours() -> None:
    for file in (run.SCRIPTS / "versions").glob("*.py"):
        assert "modelgrove" not in file.read_text(), file.name


def test_upgrading_twice_is_harmless(database_url: str) -> None:
    run.upgrade(database_url)
    run.upgrade(database_url)

    assert run.pending(database_url) == []


def test_pending_lists_what_upgrade_would_run(database_url: str) -> None:
    assert run.pending(database_url)[0].startswith("0001 First tables")


def test_downgrade_to_base_leaves_no_table(database_url: str) -> None:
    run.upgrade(database_url)
    run.downgrade(database_url, "base")

    engine = connect(database_url)
    assert set(inspect(engine).get_table_names()) == {"alembic_version"}
    assert run.current(database_url) is None
    engine.dispose()


def test_a_populated_database_keeps_every_row_through_an_upgrade_and_back(
    database_url: str, newer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.upgrade(database_url)
    _populate(database_url)
    before = _contents(database_url)

    monkeypatch.setattr(run, "SCRIPTS", newer)
    run.upgrade(database_url)
    assert run.current(database_url) == "0008"
    changed = _contents(database_url)
    assert [row[-1] for row in changed.pop("model")] == [0, 0]
    assert changed == {name: rows for name, rows in before.items() if name != "model"}

    run.downgrade(database_url, "0007")
    assert _contents(database_url) == before

    monkeypatch.undo()
    assert run.check(database_url) == []


def test_adapters_keep_their_family_as_their_tree_and_nothing_else_is_told(database_url: str) -> None:
    run.upgrade(database_url, "0001")
    facts = {"a/lora": ("adapter", "sd1"), "a/strange": ("adapter", "unknown"), "a/base": ("checkpoint", "sd1")}
    _execute(
        database_url,
        *(
            "INSERT INTO model (name, kind, family, tags, card, trust, created_at, updated_at) VALUES "
            f"('{name}', '{kind}', '{family}', '[]', '', 'ok', '2026-01-01 00:00:00', '2026-01-01 00:00:00')"
            for name, (kind, family) in facts.items()
        ),
    )
    before = _contents(database_url)
    run.upgrade(database_url, "0002")

    engine = connect(database_url)
    with transaction(engine) as session:
        rows = session.exec(select(Model.name, Model.tree, Model.tree_reason))
        found = {name: (tree, reason) for name, tree, reason in rows}
    engine.dispose()
    tree, reason = found.pop("a/lora")
    assert (tree, reason["by"]) == ("sd1", "family")
    assert list(found.values()) == [(None, None)] * 2
    run.downgrade(database_url, "0001")
    assert _contents(database_url) == before


def test_what_there_was_becomes_commits_on_main(database_url: str) -> None:
    run.upgrade(database_url, "0004")
    moment = "2026-01-01 00:00:00"
    _execute(
        database_url,
        "INSERT INTO model (id, name, kind, family, tags, card, trust, created_at, updated_at) VALUES "
        f"(1, 'a/lora', 'adapter', 'sd1', '[]', '', 'ok', '{moment}', '{moment}')",
        *(
            "INSERT INTO revision (id, model_id, digest, parameters, size, summary, created_at) VALUES "
            f"({number}, 1, '{number:064x}', 0, 0, '{{}}', '{moment}')"
            for number in (1, 2, 3)
        ),
    )
    before = _contents(database_url)
    run.upgrade(database_url)

    engine = connect(database_url)
    with transaction(engine) as session:
        model = session.get_one(Model, 1)
        assert not model.private
        assert [one.revision_id for one in history(session, head(session, model))] == [3, 2, 1]
        assert latest_revision(session, model).id == 3
    engine.dispose()
    run.downgrade(database_url, "0004")
    assert _contents(database_url) == before


def test_events_of_an_older_database_are_chained_in_their_order(database_url: str) -> None:
    run.upgrade(database_url, "0003")
    rows = [
        (7, "2026-01-01 00:00:00.250000", "registered", "local/größe", '{"b": 1.5, "a": ["ü", null]}'),
        (9, "2026-01-01 00:00:01", "removed", "local/base", "{}"),
    ]
    insert = "INSERT INTO event (id, at, action, subject, detail) VALUES "
    zone = "" if database_url.startswith("sqlite") else "+02"
    _execute(database_url, *(insert + str((row[0], row[1] + zone, *row[2:])) for row in rows))
    before = _contents(database_url)
    run.upgrade(database_url)

    engine = connect(database_url)
    with transaction(engine) as session:
        record(session, "registered", "local/later")
        chain = check_chain(session)
        assert (chain.sound, chain.problem) == (3, "")
        session.exec(text("UPDATE event SET subject = 'local/other' WHERE id = 9"))
        assert check_chain(session).broken == "event 9 (removed local/other)"
        session.exec(text("DELETE FROM event WHERE id = 10"))
        session.exec(text("UPDATE event SET subject = 'local/base' WHERE id = 9"))
    run.downgrade(database_url, "0003")
    assert _contents(database_url) == before
    with transaction(engine) as session:  # the older version takes ids from the database, and none twice
        session.exec(
            text("INSERT INTO event (at, action, subject, detail) SELECT at, action, subject, '{}' FROM event")
        )
    engine.dispose()


def test_a_migration_that_fails_changes_nothing(
    database_url: str, newer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.upgrade(database_url)
    _populate(database_url)
    before = _contents(database_url)
    script = newer / "versions" / "0008_rewrite.py"
    script.write_text(
        REWRITE.replace("def downgrade", '    op.execute("INSERT INTO nowhere VALUES (1)")\n\ndef downgrade')
    )
    monkeypatch.setattr(run, "SCRIPTS", newer)

    with pytest.raises(StorageError, match="nowhere"):
        run.upgrade(database_url)

    assert run.current(database_url) == "0007"
    assert _contents(database_url) == before


def test_a_migration_that_loses_rows_others_point_to_is_rolled_back(
    sqlite_url: str, newer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.upgrade(sqlite_url)
    _populate(sqlite_url)
    script = newer / "versions" / "0008_rewrite.py"
    script.write_text(REWRITE.replace("def downgrade", '    op.execute("DELETE FROM model")\n\ndef downgrade'))
    monkeypatch.setattr(run, "SCRIPTS", newer)

    with pytest.raises(StorageError, match="revision → model"):
        run.upgrade(sqlite_url)

    assert len(_contents(sqlite_url)["model"]) == 2


def test_upgrade_backs_a_populated_sqlite_file_up_first(
    sqlite_url: str, newer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run.upgrade(sqlite_url) is None  # there was nothing to lose
    _populate(sqlite_url)
    before = _contents(sqlite_url)

    monkeypatch.setattr(run, "SCRIPTS", newer)
    backup = run.upgrade(sqlite_url)

    assert backup is not None
    assert ".0007." in backup.name
    assert _contents(f"sqlite:///{backup}") == before
    assert run.upgrade(sqlite_url) is None  # and none when there is nothing to do


def test_downgrade_backs_a_sqlite_file_up_first(sqlite_url: str) -> None:
    run.upgrade(sqlite_url)
    _populate(sqlite_url)

    backup = run.downgrade(sqlite_url, "base")

    assert backup is not None
    assert len(_contents(f"sqlite:///{backup}")["model"]) == 2


def test_two_upgrades_at_once_make_one_schema(database_url: str) -> None:
    # Alembic's context is one for a process, so the rivals are processes.
    rivals = [get_context("fork").Process(target=run.upgrade, args=(database_url,)) for _ in range(3)]
    for rival in rivals:
        rival.start()
    for rival in rivals:
        rival.join(120)

    assert [rival.exitcode for rival in rivals] == [0, 0, 0]
    assert run.check(database_url) == []


def test_a_database_of_a_newer_version_is_left_alone(database_url: str) -> None:
    run.upgrade(database_url)
    _execute(database_url, "UPDATE alembic_version SET version_num = '9999'")

    for action in (run.upgrade, run.pending, lambda url: run.downgrade(url, "base")):
        with pytest.raises(StorageError, match=r"9999.*install the modelgrove that made it"):
            action(database_url)


def test_an_unknown_revision_is_refused_with_the_known_ones(database_url: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="base, 0001"):
        run.upgrade(database_url, "0815")
    run.upgrade(database_url)
    for unknown in ("0815", "-1"):
        with pytest.raises(UsageError, match="base, 0001"):
            run.downgrade(database_url, unknown)
    assert not list(tmp_path.glob("*.bak"))


def test_downgrading_to_where_the_database_is_does_nothing(database_url: str) -> None:
    assert run.downgrade(database_url, "base") is None
    run.upgrade(database_url)
    assert run.downgrade(database_url, schema.HEAD) is None


def test_someone_elses_tables_are_not_overwritten(database_url: str) -> None:
    _execute(database_url, "CREATE TABLE model (id INTEGER PRIMARY KEY, theirs TEXT)")

    with pytest.raises(StorageError, match="model"):
        run.upgrade(database_url)

    engine = connect(database_url)
    assert inspect(engine).get_table_names() == ["model"]
    engine.dispose()


def test_a_removed_id_never_names_another_model(database_url: str) -> None:
    run.upgrade(database_url)
    _populate(database_url)
    engine = connect(database_url)
    with transaction(engine) as session:
        last = session.exec(select(Model).order_by(text("id desc"))).first()
        gone = last.id
        session.delete(last)
    with transaction(engine) as session:
        session.add(another := Model(name="local/another"))
        session.flush()
        assert another.id > gone
    engine.dispose()


def test_a_server_that_does_not_answer_is_a_storage_error() -> None:
    with pytest.raises(StorageError, match=r"127\.0\.0\.1:1/"):
        run.upgrade("postgresql://nobody:secret@127.0.0.1:1/nothing")


def test_upgrade_needs_the_package_alone(sqlite_url: str, tmp_path: Path) -> None:
    site = tmp_path / "site-packages"
    for package in (Path(tables.__file__).parent, run.SCRIPTS):
        shutil.copytree(package, site / package.name, ignore=shutil.ignore_patterns("__pycache__"))
    code = (
        f"import sys; sys.path.insert(0, {str(site)!r}); from modelgrove_migrations import run; "
        f"assert run.__file__.startswith({str(site)!r}); run.upgrade({sqlite_url!r})"
    )

    subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, check=True)

    assert run.current(sqlite_url) == schema.HEAD


def test_the_alembic_command_works_from_the_repository(sqlite_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    root = Path(__file__).resolve().parents[2]
    monkeypatch.setenv("MODELGROVE_DATABASE_URL", sqlite_url)

    result = subprocess.run(
        [sys.executable, "-m", "alembic", "upgrade", "head"], cwd=root, capture_output=True, text=True
    )

    assert result.returncode == 0, result.stderr
    assert run.current(sqlite_url) == schema.HEAD


@pytest.fixture
def newer(tmp_path: Path) -> Path:
    """The package's scripts as a newer version might ship them, with one migration more."""
    folder = tmp_path / "100% newer"  # Alembic's configuration gives "%" a meaning
    shutil.copytree(run.SCRIPTS, folder, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "versions" / "0008_rewrite.py").write_text(REWRITE)
    return folder


def _populate(url: str) -> None:
    engine = connect(url)
    with transaction(engine) as session:
        session.add_all([Blob(sha256=letter * 64, size=2**40) for letter in "ab"])
        session.flush()
        session.add_all([Model(name="local/base", tags=["ein", "zwei"]), Model(name="local/child", card="Größe ≥ 3")])
        session.flush()
        session.add_all([Revision(model_id=n, digest=f"{n:064d}", summary={"rank": [4, 8]}) for n in (1, 2)])
        session.flush()
        session.add(RevisionFile(revision_id=1, path="model.safetensors", sha256="a" * 64, manifest="b" * 64))
        session.add(Edge(child_id=2, parent_id=1, relation=Relation.ADAPTER))
        session.add(Job(id="1", plugin="compressor.rtn", idempotency_key="1", inputs=[1]))
        record(session, "registered", "local/base")
    engine.dispose()


def _contents(url: str) -> dict[str, list[tuple[object, ...]]]:
    engine = connect(url)
    with engine.connect() as connection:
        names = sorted(set(inspect(connection).get_table_names()) - {"alembic_version"})
        contents = {
            name: sorted((tuple(row) for row in connection.exec_driver_sql(f"SELECT * FROM {name}")), key=repr)
            for name in names
        }
    engine.dispose()
    return contents


def _execute(url: str, *statements: str) -> None:
    engine = connect(url)
    with engine.begin() as connection:
        for statement in statements:
            connection.exec_driver_sql(statement)
    engine.dispose()
