from importlib.metadata import entry_points

from modelgrove_hub.plugins import check_params


def test_every_row_is_a_run_its_plugin_takes(bench):
    for method, given in (*bench.ROWS, *bench.QUICK):
        (plugin,) = entry_points(group="modelgrove.plugins", name=f"compressor.{method}")
        checked = check_params(plugin.load(), given)
        assert {name: getattr(checked, name) for name in given} == given
