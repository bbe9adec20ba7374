import json
import subprocess
import sys
from pathlib import Path

BENCH = Path(__file__).parents[2] / "bench/embed.py"


def test_the_quick_bench_times_every_step():
    done = subprocess.run([sys.executable, str(BENCH), "--quick", "--json"], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert found["loras"] == 5
    assert all(found[name] > 0 for name in ("ingest_ms", "embed_ms", "search_ms"))
