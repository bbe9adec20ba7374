"""`python -m modelgrove_hub` is the `modelgrove` command."""

from modelgrove_hub.cli.root import main

main()
