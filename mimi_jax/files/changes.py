"""Comparing the recorded settings of a run with those that it is to be continued with."""

from collections.abc import Mapping
from typing import Any


def describe_changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """Say which settings differ, for the error that refuses to continue a run.

    Args:
        old: recorded settings by name.
        new: the settings to compare with. A missing name counts as None, in both.

    Returns:
        "name was 1 and is 2" for each difference, joined by semicolons; empty if there is none.
    """
    names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    return "; ".join(f"{name} was {old.get(name)!r} and is {new.get(name)!r}" for name in names)
