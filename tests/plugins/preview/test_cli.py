import json

import pytest
from click.testing import CliRunner
from PIL import Image

from modelgrove_hub.errors import UsageError
from modelgrove_plugins.preview.cli import sheet


def run(*arguments):
    return CliRunner().invoke(sheet, arguments, catch_exceptions=False, standalone_mode=False).stdout


def test_sheet_joins_pictures_into_one_file(tmp_path):
    picture, out = tmp_path / "a.png", tmp_path / "new/sheet.png"
    Image.new("RGB", (40, 40), "red").save(picture)

    told = json.loads(
        run(
            "--column", f"base={picture}", "--column", f"w = 2={picture}", "--row", "a cat", "--out", str(out), "--json"
        )
    )

    with Image.open(out) as joined:
        assert joined.size == (told["width"], told["height"])
        assert dict(map(reversed, joined.getcolors(1 << 16)))[(255, 0, 0)] == 2 * 40 * 40


def test_a_column_without_title_or_file_is_refused(tmp_path):
    for text in ("base", f"base={tmp_path / 'gone.png'}"):
        with pytest.raises(UsageError, match="write TITLE=FILE"):
            run("--column", text, "--out", str(tmp_path / "sheet.png"))
