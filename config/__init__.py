"""The configuration: schema, merging of YAML files and options, validation, command lines. Imports no torch."""

from config.schema import *  # noqa: F403
