from modelgrove_outliers import Outliers

from modelgrove_hub.testing import check_plugin


def test_the_plugin_keeps_the_contract():
    assert [check for check in check_plugin(Outliers) if not check.ok] == []
