"""Flags in a file: TOML, whose keys are their names without the dashes in front."""

import argparse
import tomllib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import tomli_w

from examples.training.checkpoints import write_atomically

NAME = "config.toml"


def arguments(file: Path, known: Collection[str]) -> list[str]:
    """The arguments that a file's keys stand for.

    Args:
        file: ``key = value``, of which ``true`` gives a flag without a value and ``false`` none.
        known: the names of the flags, with underscores; keys may have hyphens too.

    Raises:
        ValueError: it is not there or no TOML, or has a key that is no flag, or a value for none.
    """
    try:
        found = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"--config must be a TOML file, got {file}: {reason}") from error
    given = []
    for key, value in found.items():
        if (name := key.replace("-", "_")) not in known:
            raise ValueError(f"{file} has the key {key}, which is no flag here; -h lists them")
        if not isinstance(value, str | int | float):
            raise ValueError(
                f"{file} must have text, a number, true or false for {key}, got {value!r}"
            )
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            given += [flag] * value
        else:
            given.append(f"{flag}={value}")
    return given


def write(folder: Path, flags: Mapping[str, Any]) -> None:
    """``config.toml``, from which ``--config`` has the same flags."""
    write_atomically(folder / NAME, tomli_w.dumps(flags).encode())


def refuse(parser: argparse.ArgumentParser, flags: Sequence[str]) -> None:
    """End a study's program that is given a file: its plan is to hold what it consists of."""
    if any(flag.partition("=")[0] == "--config" for flag in flags):
        parser.error("--config is one training's; give the study its flags")
