"""Locate, attack and close the single neurons that switch refusal off in open-weight chat models."""

from importlib.metadata import version

__version__ = version("harden")
