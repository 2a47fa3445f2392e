"""Types of the command line's flags: what they refuse, they refuse in a sentence of argparse's."""

import argparse
from typing import Any

# A flag that --no-… takes back where a file has it.
switch: dict[str, Any] = {"action": argparse.BooleanOptionalAction, "default": False}


def at_least(smallest: int) -> Any:
    """An argparse type."""

    def whole(text: str) -> int:
        if (value := int(text)) < smallest:
            raise argparse.ArgumentTypeError(f"must be at least {smallest}, got {value}")
        return value

    whole.__name__ = "whole number"  # argparse names it where the text is no number
    return whole


def positive(text: str) -> float:
    """An argparse type."""
    if not 0 < (value := float(text)) < float("inf"):
        raise argparse.ArgumentTypeError(f"must be positive and finite, got {value}")
    return value


def not_negative(text: str) -> float:
    """An argparse type."""
    if not 0 <= (value := float(text)) < float("inf"):
        raise argparse.ArgumentTypeError(f"must be at least 0 and finite, got {value}")
    return value


def share(text: str) -> float:
    """An argparse type."""
    if not 0 < (value := float(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be between 0 and 1, got {value}")
    return value
