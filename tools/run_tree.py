"""Config of a run directory that may come from others, read for the report and the comparison of runs.

The trainer reads it with config.load, which knows its keys; here it may be of another version, so only its form is checked.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from common.regular_files import read_regular
from config.yaml_reader import parse_yaml
from engine.checkpoint.run_files import DAMAGED, DIGITS, check_depth

CONFIG_BYTES = 64 * 2**10  # the config of a run has some 6 kB
CELL = 400  # characters of a value in a table
Tree = dict[str, Any]


def read_config(path: Path) -> Tree:
    """Return the config in a file of a run directory; empty without the file. Raises ValueError with the remedy."""
    try:
        text = read_regular(path, CONFIG_BYTES).decode("utf-8")
        tree = parse_yaml(text) or {}
        if not isinstance(tree, dict):
            raise ValueError("it holds no KEY: VALUE lines")
        check_depth(tree)
        check_values(tree)
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}); are the disk there and the file yours?") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        if str(error).startswith(str(path)):
            raise
        reason = "nested too deep" if isinstance(error, RecursionError) else " ".join(str(error).split())
        raise ValueError(f"{path} is damaged ({reason[:160]}); {DAMAGED}") from error
    return tree


def check_values(value: Any) -> None:
    """Raise ValueError for anything but texts, numbers below 2**64, true, false and null in lists and sections."""
    if isinstance(value, dict):
        for key, entry in value.items():
            if not isinstance(key, str):
                raise ValueError(f"{str(key)[:40]!a} is no name of a key")
            check_values(entry)
    elif isinstance(value, list):
        for entry in value:
            check_values(entry)
    elif isinstance(value, int) and value.bit_length() > 64:
        raise ValueError(f"it holds a number of more than {DIGITS} digits")
    elif not isinstance(value, str | int | float | None):
        raise ValueError(f"it holds a {type(value).__name__}, which no config has")


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Tree:
    """Return the values of nested sections by their dotted names."""
    found: Tree = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            found |= flatten(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value
    return found


def cell(value: Any, length: int = CELL) -> str:
    """Return a value as text for a cell of a table, cut where it is long."""
    text = str(value)
    return text if len(text) <= length else f"{text[: length - 3]}..."
