"""Crucible."""
