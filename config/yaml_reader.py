"""YAML of bounded cost, for files that others wrote: text, numbers, true, false, null, lists and sections, no tags.

A few lines of YAML can stand for gigabytes (aliases of aliases), recurse without end, or ask for Python objects: everything
is counted before a value is made of it. Dates are read as text.
"""

import os
import re
import stat
from pathlib import Path
from typing import Any

import yaml

from common.text import cut

MAX_BYTES = 2**18  # of a file; the resolved config of a run has 5 kB
MAX_VALUES = 5000  # in a file, those of an alias counted wherever it stands
MAX_CHARACTERS = 2**20  # of all values together, likewise
MAX_DEPTH = 32  # sections and lists inside each other
MAX_TEXT = 4096  # characters of one value, as in the longest path
MAX_DIGITS = 64  # characters of a number
TAGS = {f"tag:yaml.org,2002:{kind}" for kind in ("str", "int", "float", "bool", "null", "seq", "map", "merge")}
NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")


def parse_yaml(text: str) -> Any:
    """Return the value of a YAML text. Raises yaml.YAMLError, with a message of bounded length, for whatever is wrong with it."""
    if len(text) > MAX_BYTES:
        raise yaml.YAMLError(f"it has {len(text)} characters; at most {MAX_BYTES} are read")
    try:
        return yaml.load(text, _BoundedLoader)
    except yaml.YAMLError as error:
        raise yaml.YAMLError(cut(str(error), 600)) from error
    except (ValueError, TypeError, ArithmeticError, LookupError) as error:  # of a value that is none of its tag
        raise yaml.YAMLError(f"a value cannot be read ({cut(str(error))})") from error


def read_text(path: Path) -> str:
    """Return the text of a regular file of at most MAX_BYTES. Raises ValueError for any other file, naming it.

    A pipe or a device is refused without waiting for its content.
    """
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:  # noqa: PTH123  Path.open takes no descriptor
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise ValueError(f"{cut(str(path))} is no regular file; give a text file")
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ValueError(f"{cut(str(path))} cannot be read ({error.strerror})") from error
    if len(content) > MAX_BYTES:
        raise ValueError(f"{cut(str(path))} is larger than {MAX_BYTES // 1024} KiB; a config has a few")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{cut(str(path))} is not text in UTF-8 ({error.reason} at byte {error.start})") from error


class _BoundedLoader(yaml.SafeLoader):
    """Loader that refuses tags, keys given twice (PyYAML silently takes the last), and whatever exceeds the bounds above."""

    yaml_implicit_resolvers = {  # noqa: RUF012  PyYAML's attribute
        first: [(tag, pattern) for tag, pattern in resolvers if tag in TAGS]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._depth = self._nodes = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Compose a node, unless it lies too deep or is one too many."""
        self._nodes += 1
        self._depth += 1
        if self._nodes > MAX_VALUES or self._depth > MAX_DEPTH:
            bound = f"{MAX_VALUES} values" if self._nodes > MAX_VALUES else f"{MAX_DEPTH} levels"
            raise yaml.MarkedYAMLError(problem=f"more than {bound}", problem_mark=self.peek_event().start_mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def get_single_node(self) -> yaml.Node | None:
        """Compose the document and check it before anything is constructed."""
        node = super().get_single_node()
        if node is not None:
            sizes: dict[int, tuple[int, int] | None] = {}
            _measure(node, sizes)
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Construct a section whose keys differ and are no lists or sections."""
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(problem="a key is a list or section", problem_mark=key.start_mark)
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"{cut(key.value)} is given twice", problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _measure(node: yaml.Node, sizes: dict[int, tuple[int, int] | None]) -> tuple[int, int]:
    """Return the values and characters that a node stands for, its aliases expanded. Raises YAMLError beyond the bounds.

    `sizes` holds those of the nodes met before, by identity; None of those that contain this one.
    """
    if (known := sizes.get(id(node), (0, 0))) is None:
        raise yaml.MarkedYAMLError(problem="an alias stands inside what it names", problem_mark=node.start_mark)
    if id(node) in sizes:
        return known
    if node.tag not in TAGS:
        raise yaml.MarkedYAMLError(problem=f"the tag {cut(node.tag)} is not allowed", problem_mark=node.start_mark)
    sizes[id(node)] = None
    if isinstance(node, yaml.ScalarNode):
        _check_scalar(node)
        values, characters = 1, len(node.value)
    else:
        values, characters = 1, 0
        children = (
            node.value if isinstance(node, yaml.SequenceNode) else [child for pair in node.value for child in pair]
        )
        for child in children:
            more = _measure(child, sizes)
            values, characters = values + more[0], characters + more[1]
    if values > MAX_VALUES or characters > MAX_CHARACTERS:
        raise yaml.MarkedYAMLError(
            problem=f"with its aliases it stands for more than {MAX_VALUES} values or {MAX_CHARACTERS} characters",
            problem_mark=node.start_mark,
        )
    sizes[id(node)] = values, characters
    return values, characters


def _check_scalar(node: yaml.ScalarNode) -> None:
    """Raise YAMLError for a value that no file name, word or number has."""
    limit = MAX_DIGITS if node.tag in NUMBERS else MAX_TEXT
    problem = ""
    if len(node.value) > limit:
        problem = f"a value of {len(node.value)} characters; at most {limit} are read"
    elif "\0" in node.value or re.search("[\ud800-\udc7f\udd00-\udfff]", node.value):
        problem = "a value holds a NUL character or half of a surrogate pair"
    if problem:
        raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
