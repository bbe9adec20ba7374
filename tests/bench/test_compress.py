from importlib.metadata import entry_points

from modelgrove_hub.plugins import check_params


def test_every_row_is_a_run_its_plugin_takes(bench):
    for method, given in (*bench.ROWS, *bench.QUICK):
        (plugin,) = entry_points(group="modelgrove.plugins", name=f"compressor.{method}")
        checked = check_params(plugin.load(), given)
        assert {name: getattr(checked, name) for name in given} == given


def test_a_run_is_measured_and_shown(bench):
    """In this process: one of its own could not import the bench as pytest loads it."""
    row = bench._run("rtn", {"bits": 4, "fidelity": True}, bench.BASE)
    assert 0.3 < row["ratio"] < 0.45  # half a byte a weight of two, and what is kept
    assert 0 < row["error"] < 0.1
    assert row["peak_mib"] > 100
    assert bench.table([row]).row_count == 1
