"""The command line as a user meets it: real processes, exit codes, one-line errors."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file


@pytest.fixture
def modelgrove(tmp_path):
    def run(*arguments, **environment):
        variables = {**os.environ, "MODELGROVE_HOME": str(tmp_path / "home"), **environment}
        command = [sys.executable, "-m", "modelgrove_hub", *arguments]
        return subprocess.run(command, env=variables, cwd=tmp_path, capture_output=True, text=True, check=False)

    return run


@pytest.fixture
def ready(modelgrove, tmp_path):
    """A hub with one small model called local/tiny."""
    save_file({"weight": torch.arange(12.0).reshape(3, 4)}, tmp_path / "tiny.safetensors")
    assert modelgrove("init").returncode == 0
    assert modelgrove("ingest", str(tmp_path / "tiny.safetensors")).returncode == 0
    return modelgrove


def test_a_hub_that_was_not_made_says_how_to_make_it(modelgrove):
    done = modelgrove("ls")
    assert done.returncode == 7
    assert "modelgrove init" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_init_twice_is_harmless(modelgrove):
    assert modelgrove("init").returncode == 0
    assert modelgrove("init", "--json").returncode == 0


def test_an_empty_hub_says_what_to_do_next(modelgrove):
    modelgrove("init")
    done = modelgrove("ls")
    assert done.returncode == 0
    assert "modelgrove ingest" in done.stderr


def test_ls_and_show_answer_in_text_and_json(ready):
    assert "local/tiny" in ready("ls").stdout
    (row,) = json.loads(ready("ls", "--json").stdout)
    assert (row["name"], row["parameters"]) == ("local/tiny", 12)
    assert "unknown" in ready("show", "tiny").stdout
    assert json.loads(ready("show", "tiny", "--json").stdout)["files"][0]["path"] == "tiny.safetensors"


def test_show_says_what_an_adapter_changes(ready, tmp_path):
    module = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
    factors = {f"{module}.lora_A.weight": torch.ones(4, 8), f"{module}.lora_B.weight": torch.ones(8, 4)}
    save_file(factors, tmp_path / "style.safetensors")
    ready("ingest", str(tmp_path / "style.safetensors"))
    shown = dict(line.split(maxsplit=1) for line in ready("show", "style").stdout.splitlines()[:12])
    assert shown["kind"] == "adapter lora"
    assert shown["format"] == "safetensors: F32 × 2"
    assert shown["rank"] == "4"
    assert shown["changes"] == "1 modules of the denoiser"
    assert shown["modules"] == "attn2.to_k × 1"
    assert shown["explained"] == "100% of 2 tensors"


def test_show_names_style_tokens(ready, tmp_path):
    said = {"styles": [{"token": "monet", "sha256": "0" * 64}], "base": "", "parent": None}
    save_file({"x": torch.ones(2)}, tmp_path / "style.safetensors", {"modelgrove.museum": json.dumps(said)})
    ready("ingest", str(tmp_path / "style.safetensors"))
    assert "style tokens  <monet>" in ready("show", "style").stdout


def test_a_foreign_file_that_is_not_finite_is_registered_and_says_so(ready, tmp_path):
    weights = {"a": torch.tensor([1.0, float("nan")]), "b": torch.ones(2), "c": torch.tensor([-float("inf")]).half()}
    save_file(weights, tmp_path / "broken.safetensors")
    done = ready("ingest", str(tmp_path / "broken.safetensors"))
    assert done.returncode == 0
    assert "(2 tensors hold NaN or infinite values)" in done.stdout
    (line,) = [line for line in ready("show", "broken").stdout.splitlines() if line.startswith("not finite")]
    assert "2 tensors" in line
    assert line.endswith("first a")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("bogus = 1", "bogus: Extra inputs"),
        ("lease_seconds = -1", "lease_seconds: "),
        ("safe_mode = [", "Invalid value"),
    ],
)
def test_a_wrong_settings_file_is_a_usage_error_in_one_line(modelgrove, tmp_path, text, said):
    (tmp_path / "modelgrove.toml").write_text(text)
    done = modelgrove("ls")
    assert done.returncode == 2
    assert said in done.stderr
    assert "modelgrove.toml" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_the_environment_wins_over_a_settings_file(modelgrove, tmp_path):
    (tmp_path / "modelgrove.toml").write_text('home = "elsewhere"')
    assert json.loads(modelgrove("init", "--json").stdout)["home"] == str(tmp_path / "home")


def test_a_closed_pipe_is_no_error_to_read(ready):
    command = f"{sys.executable} -m modelgrove_hub ls --json | true"
    home = json.loads(ready("init", "--json").stdout)["home"]
    done = subprocess.run(
        ["bash", "-c", command], env={**os.environ, "MODELGROVE_HOME": home},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stderr == ""


def test_bash_completes_commands(modelgrove):
    script = modelgrove("completion", "bash").stdout
    # The script calls the program by the name it completes: $1.
    probe = 'COMP_WORDS=(modelgrove exp); COMP_CWORD=1; _modelgrove_completion modelgrove; echo "${COMPREPLY[@]}"'
    folder = os.path.dirname(sys.executable)  # noqa: PTH120
    done = subprocess.run(
        ["bash", "--norc", "-c", f"{script}\n{probe}"], env={**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout.split() == ["expert", "export"]


def test_a_database_that_is_down_is_one_line(modelgrove):
    pytest.importorskip("psycopg", reason="pip install 'modelgrove[server]'")
    done = modelgrove("ls", MODELGROVE_DATABASE_URL="postgresql://ann:secret@127.0.0.1:9/none")
    assert done.returncode == 7
    assert len(done.stderr.strip().splitlines()) == 1
    assert "refused" in done.stderr
    assert "secret" not in done.stderr


def test_plugin_show_says_types_limits_and_defaults(modelgrove):
    lines = modelgrove("plugin", "show", "compressor.rtn").stdout.splitlines()
    (smallest,) = [line for line in lines if line.startswith("--smallest")]
    assert "integer ≥ 0" in smallest
    assert any("--skip" in line and "list of string" in line for line in lines)


def test_a_wrong_name_offers_near_ones_in_one_line(ready):
    done = ready("show", "tinny")
    assert done.returncode == 3
    assert "did you mean local/tiny?" in done.stderr
    assert "Traceback" not in done.stderr


def test_debug_shows_the_traceback(ready):
    assert "Traceback" in ready("--debug", "show", "tinny").stderr


def test_a_usage_error_is_2(ready):
    assert ready("ls", "--limit", "zero").returncode == 2
    assert ready("compress", "tiny", "--method", "nothing").returncode == 3


def test_export_writes_the_very_bytes_and_refuses_a_full_folder(ready, tmp_path):
    assert ready("export", "tiny", str(tmp_path / "out")).returncode == 0
    assert (tmp_path / "out/tiny.safetensors").read_bytes() == (tmp_path / "tiny.safetensors").read_bytes()
    assert ready("export", "tiny", str(tmp_path / "out")).returncode == 4


def test_export_as_a_format_says_what_became_of_each_tensor(ready, tmp_path):
    done = ready("export", "tiny", str(tmp_path / "out"), "--as", "dense", "--json")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["files"] == ["tiny.safetensors"]
    assert set(said["tensors"].values()) == {"as it was"}


def test_export_refuses_an_unknown_format_and_a_dry_run_of_one(ready, tmp_path):
    assert ready("export", "tiny", str(tmp_path / "out"), "--as", "onnx").returncode == 3
    assert ready("export", "tiny", str(tmp_path / "out"), "--as", "gguf", "--dry-run").returncode == 2
    assert not (tmp_path / "out").exists()


def test_rm_forgets_the_model_and_leaves_the_file(ready, tmp_path):
    assert json.loads(ready("rm", "tiny", "--dry-run", "--json").stdout)["would_remove"] == ["local/tiny"]
    assert ready("rm", "tiny").returncode == 0
    assert ready("show", "tiny").returncode == 3
    assert (tmp_path / "tiny.safetensors").exists()


def test_only_refused_files_is_an_error(modelgrove, tmp_path):
    modelgrove("init")
    (tmp_path / "bad.safetensors").write_bytes(b"\xff" * 100)
    assert modelgrove("ingest", str(tmp_path / "bad.safetensors")).returncode == 5


def test_doctor_is_content_with_a_new_hub_and_not_with_none(modelgrove):
    assert modelgrove("doctor").returncode == 5
    modelgrove("init")
    done = modelgrove("doctor", "--json")
    assert done.returncode == 0, done.stdout
    assert all(check["ok"] for check in json.loads(done.stdout))


def test_settings_come_from_toml_and_the_environment_wins(modelgrove, tmp_path):
    (tmp_path / "modelgrove.toml").write_text(f'home = "{tmp_path / "from-toml"}"\n')
    assert json.loads(modelgrove("init", "--json").stdout)["home"] == str(tmp_path / "home")
    assert json.loads(modelgrove("--home", str(tmp_path / "flag"), "init", "--json").stdout)["home"] == str(
        tmp_path / "flag"
    )


def test_completion_is_printed_for_each_shell(modelgrove):
    for shell in ("bash", "zsh", "fish"):
        assert "_MODELGROVE_COMPLETE" in modelgrove("completion", shell).stdout


def test_piped_into_head_it_ends_quietly(ready):
    command = f"{sys.executable} -m modelgrove_hub ls | true"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr


def test_a_broken_command_of_a_stranger_harms_nobody(modelgrove, tmp_path):
    dist = tmp_path / "site/stranger-1.0.dist-info"
    dist.mkdir(parents=True)
    (dist / "METADATA").write_text("Metadata-Version: 2.1\nName: stranger\nVersion: 1.0\n")
    (dist / "entry_points.txt").write_text("[modelgrove.commands]\noops = nowhere_at_all:command\n")
    environment = {"PYTHONPATH": str(tmp_path / "site")}
    shown = modelgrove("--help", **environment)
    assert shown.returncode == 0
    assert "broken, from stranger" in shown.stdout
    done = modelgrove("oops", "--any", "thing", **environment)
    assert done.returncode == 6
    assert "stranger" in done.stderr
