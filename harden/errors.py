"""Errors that a user can act on. Entry points print their text on one line and leave with `exit_code`."""


class HardenError(Exception):
    """What the user gave cannot be used: a recipe, a path, a model, a prompt file."""

    exit_code = 2


class MeasurementError(HardenError):
    """What was asked for was under way and failed, or gave nothing that can be trusted (NaN, no rows)."""

    exit_code = 3
