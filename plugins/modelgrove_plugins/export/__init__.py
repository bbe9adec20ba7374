"""Exporters: registered models as files that other tools read. See docs/exchange.md."""
