"""The configuration: schema, merging of YAML files and options, validation, command lines. Imports no torch."""

from config.lookup import get, keys, run_name
from config.merge import dump, load
from config.schema import defaults
from config.validate import CHOICES, RANGES, TIMELINES, TO_MIN_LR

__all__ = [
    "CHOICES",
    "RANGES",
    "TIMELINES",
    "TO_MIN_LR",
    "defaults",
    "dump",
    "get",
    "keys",
    "load",
    "run_name",
]
