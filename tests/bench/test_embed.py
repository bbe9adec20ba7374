import json

from click.testing import CliRunner


def test_the_quick_bench_times_every_step(bench):
    found = json.loads(CliRunner().invoke(bench.main, ["--quick", "--json"], catch_exceptions=False).stdout)
    assert found["loras"] == 5
    assert all(found[name] > 0 for name in ("ingest_ms", "embed_ms", "search_ms"))
