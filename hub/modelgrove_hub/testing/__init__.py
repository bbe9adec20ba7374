"""For plugin authors: run a plugin without a hub, and check that it keeps the contract.

`FolderModel` is a model on disk, `LocalContext` a context on a folder, `run_plugin` puts them
together, and `check_plugin` makes every check that `modelgrove plugin check` makes:

    def test_the_plugin_keeps_the_contract():
        assert [check for check in check_plugin(MyMethod()) if not check.ok] == []
"""

from modelgrove_hub.testing.checks import Check as Check
from modelgrove_hub.testing.checks import check_plugin as check_plugin
from modelgrove_hub.testing.local import FolderModel as FolderModel
from modelgrove_hub.testing.local import LocalContext as LocalContext
from modelgrove_hub.testing.local import run_plugin as run_plugin
from modelgrove_hub.testing.tiny import tiny_inputs as tiny_inputs
