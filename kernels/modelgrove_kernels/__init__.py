"""Numerics that more than one method needs: torch in, torch out."""
