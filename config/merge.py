"""Merging of a config: YAML files and their bases, the authors' PUBLISHED sections, KEY VALUE pairs and flags.

The schema (config/schema.py) declares the keys; everything is merged into a copy of it. Errors name the source of a value.
"""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from yacs.config import CfgNode

from common.text import for_system
from config.lookup import get, keys
from config.schema import defaults
from config.validate import validate

RESOLVED = "resolved"  # the value of PUBLISHED in a dump
OF_ANY_LENGTH = ("OPTIM.BETAS", "SCHEDULE.MILESTONES")  # lists of numbers; others have as many entries as their default


def load(
    files: str | Sequence[str] = (), opts: Sequence[str] = (), flags: Mapping[str, tuple[str, str]] | None = None
) -> CfgNode:
    """Merge the files, KEY VALUE pairs and flags into the defaults; return the checked, frozen config.

    `flags` maps a flag, as errors call it, to its key and value.

    Raises ValueError, naming key, value, source and remedy, for anything the schema does not declare or allow.
    """
    cfg = defaults()
    names = [files] if isinstance(files, str) else list(files)
    layers = [layer for file in names for layer in read_layers(cfg, Path(file), ())]
    given = {**dict(zip(opts[::2], opts[1::2], strict=False)), **dict((flags or {}).values())}
    for layer in layers_of_mode(cfg, layers, given.get("RECIPE.MODE"), " ".join(names)):
        merge_tree(cfg, layer.tree, "", layer.source)
    merge_opts(cfg, opts)
    for flag, (key, value) in (flags or {}).items():
        if key in opts[::2]:
            raise ValueError(f"{flag} {value} and --opts {key} set the same key; give one of them")
        set_text(cfg, key, value, flag)
    cfg.BASE = [""]
    validate(cfg)
    cfg.freeze()
    return cfg


def dump(cfg: CfgNode) -> str:
    """Return the config as YAML that `load` reads back to the same config; `load` refuses any other RECIPE.MODE for it."""
    return str(cfg.dump(sort_keys=False)).replace("PUBLISHED: {}", f"PUBLISHED: {RESOLVED}")


class _UniqueKeys(yaml.SafeLoader):
    """A YAML loader that refuses a key given twice in one section, where PyYAML silently takes the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"{key.value} is given twice", problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


@dataclass
class ConfigLayer:
    """Keys to merge: those of a file, or of its PUBLISHED section."""

    tree: dict[str, Any]
    source: str
    published: bool = False
    ends: bool = False  # PUBLISHED: null, which cancels the PUBLISHED sections merged before
    resolved: bool = False  # the dump of a config, whose mode cannot change


def layers_of_mode(
    cfg: CfgNode, layers: Sequence[ConfigLayer], requested: str | None, names: str
) -> Iterator[ConfigLayer]:
    """Yield the layers that apply in the requested mode, by default in the mode that the files set."""
    modes = [layer.tree["RECIPE"]["MODE"] for layer in layers if "MODE" in (layer.tree.get("RECIPE") or {})]
    mode = requested or (modes[-1] if modes else cfg.RECIPE.MODE)
    for layer in layers:
        own = (layer.tree.get("RECIPE") or {}).get("MODE", "corrected")
        if layer.resolved and own != mode:
            raise ValueError(
                f"RECIPE.MODE={mode}: {layer.source} is the resolved config of a run in mode {own}; start from the recipe's file"
            )
    last = max((i for i, layer in enumerate(layers) if layer.ends), default=-1)
    overlays = [layer for layer in layers[last + 1 :] if layer.published]
    if mode == "published" and not overlays and not any(layer.resolved for layer in layers):
        raise ValueError(
            f"RECIPE.MODE=published: {names or 'no config'} states no PUBLISHED section, nobody published such a run; leave "
            "the mode at corrected"
        )
    for i, layer in enumerate(layers):
        if not layer.published or (mode == "published" and i > last):
            yield layer


def read_layers(cfg: CfgNode, file: Path, parents: tuple[Path, ...]) -> Iterator[ConfigLayer]:
    """Yield the layers of a file and of its bases in merging order; `parents` are the files that name it as a base."""
    path = file.resolve()
    if path in parents:
        raise ValueError(
            f"BASE: {file} includes itself ({' -> '.join(p.name for p in (*parents, path))}); break the circle"
        )
    tree = _parse(file, parents)
    bases = tree.pop("BASE", [])
    for base in bases if isinstance(bases, list) else [bases]:
        if not isinstance(base, str):
            raise ValueError(f"BASE in {file} must be a file name or a list of them, got {base!r}")
        if base:
            yield from read_layers(cfg, path.parent / base, (*parents, path))
    overlay = tree.pop("PUBLISHED", False)
    if not (overlay in (None, False, RESOLVED) or isinstance(overlay, dict)):
        raise ValueError(f"PUBLISHED in {file} must be a section of keys, {{}} or null, got {overlay!r}")
    yield ConfigLayer(tree, str(file), ends=overlay is None, resolved=overlay == RESOLVED)
    if isinstance(overlay, dict):
        source = f"PUBLISHED of {file}"
        merge_tree(cfg.clone(), overlay, "", source)  # checks the section in the other mode too
        yield ConfigLayer(overlay, source, published=True)


def _parse(file: Path, parents: tuple[Path, ...]) -> dict[str, Any]:
    """Return the tree of a YAML file. Raises ValueError with the defect, or with similar file names if there is no such file."""
    if not file.is_file():
        named_by = f", named by BASE in {parents[-1]}" if parents else ""
        folder = next((p for p in file.parents if p.is_dir()), Path())
        near = difflib.get_close_matches(file.name, [p.name for p in folder.glob("[!.]*.yaml")], n=3, cutoff=0.3)
        hint = f"; near it lie {', '.join(str(folder / n) for n in near)}" if near else ""
        defect = "is a folder, not a file" if file.is_dir() else "does not exist"
        raise ValueError(f"config file {file} {defect}{named_by}{hint}")
    try:
        tree = yaml.load(file.read_text(encoding="utf-8"), _UniqueKeys)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"config file {file} is not valid YAML: {error}") from error
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise ValueError(f"config file {file} must hold KEY: VALUE lines, not a {type(tree).__name__}")
    if not isinstance(tree.get("RECIPE", {}), dict):
        raise ValueError(f"RECIPE in {file} is a section, got {tree['RECIPE']!r}; give its keys, e.g. MODE")
    return {key: _for_system(value) for key, value in tree.items()}


def _for_system(value: Any) -> Any:
    """Return a tree with its texts, such as paths, as file functions take them in any locale."""
    if isinstance(value, dict):
        return {key: _for_system(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_for_system(entry) for entry in value]
    return for_system(value) if isinstance(value, str) else value


def merge_tree(cfg: CfgNode, tree: dict[str, Any], prefix: str, source: str) -> None:
    """Merge a tree of keys into the config's section `prefix` ("" or "SECTION."). Raises ValueError naming the source."""
    node = get(cfg, prefix[:-1]) if prefix else cfg
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if key not in node:
            raise ValueError(_unknown(cfg, name, source))
        if isinstance(node[key], CfgNode):
            if not isinstance(value, dict):
                raise ValueError(
                    f"{name} in {source} is a section, got {value!r}; give its keys, e.g. {keys(node[key])[:3]}"
                )
            merge_tree(cfg, value, f"{name}.", source)
        else:
            node[key] = _coerce(value, node[key], name, source)


def merge_opts(cfg: CfgNode, opts: Sequence[str]) -> None:
    """Merge the KEY VALUE pairs of --opts into the config. Raises ValueError for anything else."""
    joined = next((text for text in opts[::2] if "=" in text), None)
    if joined:
        raise ValueError(
            f"--opts takes KEY VALUE pairs, with a space: write {joined.replace('=', ' ', 1)}, not {joined}"
        )
    if len(opts) % 2:
        raise ValueError(f"--opts takes KEY VALUE pairs; {opts[-1]!r} has no value (got {' '.join(opts)})")
    for name, text in zip(opts[::2], opts[1::2], strict=True):
        if name not in keys(cfg) or name == "BASE":
            raise ValueError(_unknown(cfg, name, "--opts"))
        set_text(cfg, name, text, "--opts")


def set_text(cfg: CfgNode, name: str, text: str, source: str) -> None:
    """Set a key to a value given as text, which is read as YAML unless the key holds a string."""
    section, _, key = name.rpartition(".")
    node = get(cfg, section) if section else cfg
    try:
        value = text if isinstance(node[key], str) else yaml.safe_load(text)
    except yaml.YAMLError:
        value = text
    node[key] = _coerce(value, node[key], name, source)


def _unknown(cfg: CfgNode, name: str, source: str) -> str:
    """Return the message for an unknown key, with the most similar known one."""
    known = [key for key in keys(cfg) if key != "BASE"]
    if "." not in name and source != "--opts":  # a file may also name sections
        known += [section for section in cfg if isinstance(cfg[section], CfgNode)]
    near = difflib.get_close_matches(name.upper(), known, n=1, cutoff=0.0)
    leaf = [key for key in known if key.rsplit(".", 1)[-1] == name.rsplit(".", 1)[-1].upper()]
    return f"unknown key {name} in {source}; did you mean {(leaf or near)[0]}? All keys stand in config/schema.py"


def _coerce(value: Any, default: Any, name: str, source: str) -> Any:
    """Return a value in the type of the key's default. Raises ValueError if it has another type or length."""
    wanted = type(default)
    if isinstance(default, list):
        if name in OF_ANY_LENGTH and isinstance(value, list | tuple):
            return [_coerce(v, 0.0, f"{name}[{i}]", source) for i, v in enumerate(value)]
        if isinstance(value, list | tuple) and (len(value) == len(default)):
            return [_coerce(v, d, f"{name}[{i}]", source) for i, (v, d) in enumerate(zip(value, default, strict=True))]
        shape = "of numbers, e.g. [150, 225]" if name in OF_ANY_LENGTH else f"of {len(default)} like {default}"
        raise ValueError(f"{name} in {source} must be a list {shape}, got {value!r}")
    if wanted is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            return float(value)  # accepts ints, and 1e-3, which YAML reads as a string
        except ValueError:
            pass
    if type(value) is wanted:
        return value
    if wanted is str and isinstance(value, bool):
        raise ValueError(
            f"{name} in {source} must be a word: YAML reads on, off, yes and no as true or false; put it in quotes"
        )
    raise ValueError(
        f"{name} in {source} must be {wanted.__name__}, got {value!r} ({type(value).__name__}); its default is {default!r}"
    )
