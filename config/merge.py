"""How a config comes together: files and the ones they build on, the authors' PUBLISHED sections, KEY VALUE pairs.

What may be said stands in the schema (config/schema.py); everything here is merged into a copy of it and named in errors by its source.
"""

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from yacs.config import CfgNode

RESOLVED = "resolved"  # stands under PUBLISHED in a dump
OF_ANY_LENGTH = ("OPTIM.BETAS", "SCHEDULE.MILESTONES")  # lists of numbers; others have as many entries as their default


def keys(node: CfgNode, prefix: str = "") -> list[str]:
    """List the dotted names of all values below a node."""
    names: list[str] = []
    for key, value in node.items():
        names += keys(value, f"{prefix}{key}.") if isinstance(value, CfgNode) else [prefix + key]
    return names


def get(cfg: CfgNode, key: str) -> Any:
    """Return the value under a dotted name."""
    for part in key.split("."):
        cfg = cfg[part]
    return cfg


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
    """Keys to merge: a file's, or its PUBLISHED section. `ends` says that what was published before counts no more."""

    tree: dict[str, Any]
    source: str
    published: bool = False
    ends: bool = False
    resolved: bool = False  # of a dump, which is in one mode for good


def steps_of_mode(cfg: CfgNode, steps: Sequence[ConfigLayer], asked: str | None, names: str) -> Iterator[ConfigLayer]:
    """Yield the steps that count in the mode asked for, else in the one the files say."""
    said = [step.tree["RECIPE"]["MODE"] for step in steps if "MODE" in (step.tree.get("RECIPE") or {})]
    mode = asked or (said[-1] if said else cfg.RECIPE.MODE)
    for step in steps:
        own = (step.tree.get("RECIPE") or {}).get("MODE", "corrected")
        if step.resolved and own != mode:
            raise ValueError(
                f"RECIPE.MODE={mode}: {step.source} is the resolved config of a run in mode {own}; start from the recipe's file"
            )
    last = max((i for i, step in enumerate(steps) if step.ends), default=-1)
    overlays = [step for step in steps[last + 1 :] if step.published]
    if mode == "published" and not overlays and not any(step.resolved for step in steps):
        raise ValueError(
            f"RECIPE.MODE=published: {names or 'no config'} states no PUBLISHED section, nobody published such a run; leave "
            "the mode at corrected"
        )
    for i, step in enumerate(steps):
        if not step.published or (mode == "published" and i > last):
            yield step


def read_steps(cfg: CfgNode, file: Path, parents: tuple[Path, ...]) -> Iterator[ConfigLayer]:
    """Yield what a file and those it builds on say, in the order in which it counts."""
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
            yield from read_steps(cfg, path.parent / base, (*parents, path))
    overlay = tree.pop("PUBLISHED", False)
    if not (overlay in (None, False, RESOLVED) or isinstance(overlay, dict)):
        raise ValueError(f"PUBLISHED in {file} must be a section of keys, {{}} or null, got {overlay!r}")
    yield ConfigLayer(tree, str(file), ends=overlay is None, resolved=overlay == RESOLVED)
    if isinstance(overlay, dict):
        source = f"PUBLISHED of {file}"
        merge_tree(cfg.clone(), overlay, "", source)  # checked also where it is not used
        yield ConfigLayer(overlay, source, published=True)


def _parse(file: Path, parents: tuple[Path, ...]) -> dict[str, Any]:
    """Return a YAML file's tree; ValueError says what is wrong with it, or what lies near it."""
    if not file.is_file():
        said_by = f", named by BASE in {parents[-1]}" if parents else ""
        folder = next((p for p in file.parents if p.is_dir()), Path())
        near = difflib.get_close_matches(file.name, [p.name for p in folder.glob("[!.]*.yaml")], n=3, cutoff=0.3)
        hint = f"; near it lie {', '.join(str(folder / n) for n in near)}" if near else ""
        what = "is a folder, not a file" if file.is_dir() else "does not exist"
        raise ValueError(f"config file {file} {what}{said_by}{hint}")
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
    return tree


def merge_tree(cfg: CfgNode, tree: dict[str, Any], prefix: str, source: str) -> None:
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
    section, _, key = name.rpartition(".")
    node = get(cfg, section) if section else cfg
    try:
        value = text if isinstance(node[key], str) else yaml.safe_load(text)
    except yaml.YAMLError:
        value = text
    node[key] = _coerce(value, node[key], name, source)


def _unknown(cfg: CfgNode, name: str, source: str) -> str:
    known = [key for key in keys(cfg) if key != "BASE"]
    if "." not in name and source != "--opts":  # of a file, where sections stand too
        known += [section for section in cfg if isinstance(cfg[section], CfgNode)]
    near = difflib.get_close_matches(name.upper(), known, n=1, cutoff=0.0)
    leaf = [key for key in known if key.rsplit(".", 1)[-1] == name.rsplit(".", 1)[-1].upper()]
    return f"unknown key {name} in {source}; did you mean {(leaf or near)[0]}? All keys stand in config/schema.py"


def _coerce(value: Any, default: Any, name: str, source: str) -> Any:
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
            return float(value)  # an int is fine, and so is 1e-3, which YAML reads as a string
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
