"""Merging of a config: YAML files and their bases, the authors' PUBLISHED sections, KEY VALUE pairs and flags.

The schema (config/schema.py) declares the keys; everything is merged into a copy of it. Errors name the source of a value.
"""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import yaml
from yacs.config import CfgNode

from common.text import cut, for_system, shorten
from config.lookup import get, keys
from config.schema import defaults
from config.validate import validate
from config.yaml_reader import MAX_TEXT, parse_yaml, read_text

RUN_FILES = ("manifest.json", "metrics.jsonl", "checkpoints", "best_raw.safetensors", "best_ema.safetensors")
RUN_RECORDS = ("manifest.json", "metrics.jsonl")  # tell a run directory from the folders above a config
RESOLVED = "resolved"  # the value of PUBLISHED in a dump
MAX_FILES = 64  # of one config, a base that two files name counted twice
MAX_ENTRIES = 1000  # of a list
OF_ANY_LENGTH = ("OPTIM.BETAS", "SCHEDULE.MILESTONES")  # lists of numbers; others have as many entries as their default


def load(
    files: str | Sequence[str] = (),
    opts: Sequence[str] = (),
    flags: Mapping[str, tuple[str, str]] | None = None,
    run_code: bool = True,
) -> CfgNode:
    """Merge the files, KEY VALUE pairs and flags into the defaults; return the checked, frozen config.

    `flags` maps a flag, as errors call it, to its key and value. `run_code` is False for a config that is compared only.

    Raises ValueError, naming key, value, source and remedy, for anything the schema does not declare or allow, and for a
    MODEL.MODULE that only the config of a run directory names.
    """
    cfg = defaults()
    names = [files] if isinstance(files, str) else list(files)
    read: list[Path] = []
    layers = [layer for file in names for layer in read_layers(cfg, Path(file), (), read)]
    given = {**dict(zip(opts[::2], opts[1::2], strict=False)), **dict((flags or {}).values())}
    module = ""  # the source of MODEL.MODULE, if that is the config of a run directory
    for layer in layers_of_mode(cfg, layers, given.get("RECIPE.MODE"), " ".join(names)):
        merge_tree(cfg, layer.tree, "", layer.source)
        if "MODULE" in layer.tree.get("MODEL", {}):
            module = layer.source if layer.of_run else ""
    merge_opts(cfg, opts)
    for flag, (key, value) in (flags or {}).items():
        if key in opts[::2]:
            raise ValueError(f"{flag} {value} and --opts {key} set the same key; give one of them")
        set_text(cfg, key, value, flag)
    cfg.BASE = [""]
    validate(cfg)
    if run_code and module and cfg.MODEL.MODULE and "MODEL.MODULE" not in given:
        raise ValueError(
            f"MODEL.MODULE={shorten(cfg.MODEL.MODULE)} in {module}: the config of a run directory, maybe of somebody else's run, "
            "names a program, which would run with your rights. Read it, then name it yourself: --opts MODEL.MODULE FILE, or '' "
            "to do without"
        )
    cfg.freeze()
    return cfg


def dump(cfg: CfgNode) -> str:
    """Return the config as YAML that `load` reads back to the same config; `load` refuses any other RECIPE.MODE for it."""
    return str(cfg.dump(sort_keys=False)).replace("PUBLISHED: {}", f"PUBLISHED: {RESOLVED}")


@dataclass
class ConfigLayer:
    """Keys to merge: those of a file, or of its PUBLISHED section."""

    tree: dict[str, Any]
    source: str
    published: bool = False
    ends: bool = False  # PUBLISHED: null, which cancels the PUBLISHED sections merged before
    resolved: bool = False  # the dump of a config, whose mode cannot change
    of_run: bool = False  # the dump of a config, or a file in a run directory, at any depth


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


def read_layers(cfg: CfgNode, file: Path, parents: tuple[Path, ...], read: list[Path]) -> Iterator[ConfigLayer]:
    """Yield the layers of a file and of its bases in merging order.

    `parents` are the files that name it as a base; `read` lists all files read before, and is extended. Raises ValueError for
    a file that names itself, however indirectly, and for more than MAX_FILES.
    """
    path = _resolve(file, parents)
    if path in parents:
        raise ValueError(
            f"BASE: {cut(str(file))} includes itself ({' -> '.join(p.name for p in (*parents, path))}); break the circle"
        )
    read.append(path)
    if len(read) > MAX_FILES:
        raise ValueError(f"BASE: {read[0]} and its bases are more than {MAX_FILES} files; name each base once")
    tree = _parse(file, parents)
    bases = tree.pop("BASE", [])
    for base in bases if isinstance(bases, list) else [bases]:
        if not isinstance(base, str):
            raise ValueError(f"BASE in {cut(str(file))} must be a file name or a list of them, got {shorten(base)}")
        if base:
            yield from read_layers(cfg, path.parent / base, (*parents, path), read)
    overlay = tree.pop("PUBLISHED", False)
    if not (overlay in (None, False, RESOLVED) or isinstance(overlay, dict)):
        raise ValueError(
            f"PUBLISHED in {cut(str(file))} must be a section of keys, {{}} or null, got {shorten(overlay)}"
        )
    resolved = overlay == RESOLVED
    of_run = resolved or any(_is_in_run(place.parent) for place in (file.absolute(), path))
    yield ConfigLayer(tree, str(file), ends=overlay is None, resolved=resolved, of_run=of_run)
    if isinstance(overlay, dict):
        source = f"PUBLISHED of {cut(str(file))}"
        merge_tree(cfg.clone(), overlay, "", source)  # checks the section in the other mode too
        yield ConfigLayer(overlay, source, published=True, of_run=of_run)


def _parse(file: Path, parents: tuple[Path, ...]) -> dict[str, Any]:
    """Return the tree of a YAML file. Raises ValueError with the defect, or with similar file names if there is no such file."""
    if not file.is_file():
        folder = next((p for p in file.parents if p.is_dir()), Path())
        near = difflib.get_close_matches(file.name, _yaml_files(folder), n=3, cutoff=0.3)
        hint = f"; near it lie {', '.join(str(folder / n) for n in near)}" if near else ""
        there = "is a folder, not a file" if file.is_dir() else "is no regular file"
        defect = there if file.exists() else "does not exist"
        raise ValueError(f"config file {cut(str(file))} {defect}{_named_by(parents)}{hint}")
    try:
        tree = parse_yaml(read_text(file))
    except yaml.YAMLError as error:
        raise ValueError(f"config file {cut(str(file))} is not valid YAML: {error}") from error
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise ValueError(f"config file {cut(str(file))} must hold KEY: VALUE lines, not a {type(tree).__name__}")
    if not isinstance(tree.get("RECIPE", {}), dict):
        raise ValueError(
            f"RECIPE in {cut(str(file))} is a section, got {shorten(tree['RECIPE'])}; give its keys, e.g. MODE"
        )
    return {key: _for_system(value) for key, value in tree.items()}


def _is_in_run(folder: Path) -> bool:
    """Return True for a run directory, known by any of its files, and for the folders in one."""
    return any((folder / name).exists() for name in RUN_FILES) or any(
        (above / name).exists() for above in folder.parents for name in RUN_RECORDS
    )


def _named_by(parents: tuple[Path, ...]) -> str:
    return f", named by BASE in {cut(str(parents[-1]))}" if parents else ""


def _resolve(file: Path, parents: tuple[Path, ...]) -> Path:
    """Return the absolute path of a file, links followed. Raises ValueError for a name that no file can have."""
    try:
        path = file.resolve()
        path.exists()
    except (OSError, RuntimeError, ValueError) as error:  # too long, a circle of links, NUL
        raise ValueError(
            f"config file {cut(str(file))} cannot be opened{_named_by(parents)} ({cut(str(error))})"
        ) from error
    return path


def _yaml_files(folder: Path) -> list[str]:
    """List the names of up to 1000 YAML files in a folder."""
    try:
        return [path.name for path in islice(folder.glob("[!.]*.yaml"), 1000)]
    except OSError:
        return []


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
                    f"{name} in {source} is a section, got {shorten(value)}; give its keys, e.g. {keys(node[key])[:3]}"
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
        raise ValueError(f"--opts takes KEY VALUE pairs; {shorten(opts[-1])} has no value (got {cut(' '.join(opts))})")
    for name, text in zip(opts[::2], opts[1::2], strict=True):
        if name not in keys(cfg) or name == "BASE":
            raise ValueError(_unknown(cfg, name, "--opts"))
        set_text(cfg, name, text, "--opts")


def set_text(cfg: CfgNode, name: str, text: str, source: str) -> None:
    """Set a key to a value given as text, which is read as YAML unless the key holds a string."""
    section, _, key = name.rpartition(".")
    node = get(cfg, section) if section else cfg
    try:
        value = text if isinstance(node[key], str) else parse_yaml(text)
    except yaml.YAMLError:
        value = text
    node[key] = _coerce(value, node[key], name, source)


def _unknown(cfg: CfgNode, name: str, source: str) -> str:
    """Return the message for an unknown key, with the most similar known one."""
    name = cut(name)
    known = [key for key in keys(cfg) if key != "BASE"]
    if "." not in name and source != "--opts":  # a file may also name sections
        known += [section for section in cfg if isinstance(cfg[section], CfgNode)]
    near = difflib.get_close_matches(name.upper(), known, n=1, cutoff=0.0)
    leaf = [key for key in known if key.rsplit(".", 1)[-1] == name.rsplit(".", 1)[-1].upper()]
    return f"unknown key {name} in {source}; did you mean {(leaf or near)[0]}? All keys stand in config/schema.py"


def _coerce(value: Any, default: Any, name: str, source: str) -> Any:
    """Return a value in the type of the key's default. Raises ValueError if it has another type or length."""
    wanted = type(default)
    if isinstance(value, str | list | tuple) and len(value) > (
        limit := MAX_TEXT if isinstance(value, str) else MAX_ENTRIES
    ):
        unit = "characters" if isinstance(value, str) else "entries"
        raise ValueError(f"{name} in {source} has {len(value)} {unit}, at most {limit} are read; got {shorten(value)}")
    if isinstance(default, list):
        if name in OF_ANY_LENGTH and isinstance(value, list | tuple):
            return [_coerce(v, 0.0, f"{name}[{i}]", source) for i, v in enumerate(value)]
        if isinstance(value, list | tuple) and (len(value) == len(default)):
            return [_coerce(v, d, f"{name}[{i}]", source) for i, (v, d) in enumerate(zip(value, default, strict=True))]
        shape = "of numbers, e.g. [150, 225]" if name in OF_ANY_LENGTH else f"of {len(default)} like {default}"
        raise ValueError(f"{name} in {source} must be a list {shape}, got {shorten(value)}")
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
        f"{name} in {source} must be {wanted.__name__}, got {shorten(value)} ({type(value).__name__}); its default is {shorten(default)}"
    )
