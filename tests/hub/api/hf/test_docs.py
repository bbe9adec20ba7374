"""docs/hub.md does what it says: its commands and its program run against a server, in the order of the page."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

PAGE = (Path(__file__).parents[4] / "docs/hub.md").read_text("utf-8")


def test_the_page_runs(api, lora, tmp_path):
    (tmp_path / "my-lora.safetensors").write_bytes(lora(7).read_bytes())
    shell = re.findall(r"^hf (.*?)(?:  #.*)?$", PAGE, re.MULTILINE)
    commands = [["-m", "huggingface_hub.cli.hf", *shlex.split(line)] for line in shell]
    (program,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    said = [
        subprocess.run([sys.executable, *command], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
        for command in [*commands, ["-c", program]]
    ]
    assert len(shell) == 4
    assert "diffusers" in said[2]
    assert "'lora'" in said[-1]
    assert "['me/my-lora']" in said[-1]
