"""Two-way map between our parameter names and those of the published checkpoints.

A family declares a table of rules, from ours to theirs; the first rule that matches a name applies:

    Rule("stem.conv1.*", "conv_stem.proj1.*")                            # a rename; * is the rest of the name
    Rule("stages.{i}.norm.*", "norm{i+1}.*")                             # {i} a number, shifted where theirs counts from 1
    Rule("stages.{i}.attn.qkv.*", ("b{i}.q.*", "b{i}.kv.*"), parts=(1, 2))  # theirs one below the other, heights 1 : 2
    Rule("attn.qkv.*", "att.qkv.*", rows=by_segment)                     # ours = theirs[by_segment(number of rows)]
    Rule("gamma1", "gamma_1", ones=(0, 2, 3))                            # theirs has dimensions of size 1, ours has not

Nothing is added or scaled, so that weights, buffers and gradients all map alike.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Protocol

import torch
from torch import Tensor

COUNTER = "num_batches_tracked"  # of BatchNorm: files may lack it
SHOWN = 3  # mismatches named in an error


@dataclass(frozen=True)
class Rule:
    """Correspondence of one of our entries to one or several of theirs.

    ours and theirs are name templates: `{i}` is a number, `*` any rest; `{i+1}` is allowed in theirs. Several of theirs are
    stacked along dimension 0 with heights in the proportion `parts`. `rows(n)` returns, for each of the n rows of ours, its
    row in that stack. `ones` are the positions of size-1 dimensions in theirs that ours lacks (not in entries ending in `bias`).
    """

    ours: str
    theirs: str | tuple[str, ...]
    parts: tuple[int, ...] = ()
    rows: Callable[[int], Tensor] | None = None
    ones: tuple[int, ...] = ()

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        pieces = re.split(r"(\{\w+\}|\*)", self.ours)
        return re.compile("".join(_as_regex(piece) for piece in pieces))

    @property
    def several(self) -> tuple[str, ...]:
        return (self.theirs,) if isinstance(self.theirs, str) else self.theirs

    def names(self, ours: str) -> tuple[str, ...] | None:
        """Return their names of our entry, None if this rule does not match it."""
        match = self._pattern.fullmatch(ours)
        if match is None:
            return None
        fields = match.groupdict()

        def fill(template: str) -> str:
            numbered = re.sub(r"\{(\w+?)([+-]\d+)?\}", lambda m: str(int(fields[m[1]]) + int(m[2] or 0)), template)
            return numbered.replace("*", fields.get("rest", ""))

        return tuple(fill(template) for template in self.several)

    def split(self, name: str, ours: Tensor) -> list[Tensor]:
        """Split our entry into theirs."""
        if self.rows is not None:
            ours = ours[torch.argsort(self.rows(len(ours))).to(ours.device)]
        for dim in self._ones(name):
            ours = ours.unsqueeze(dim)
        if len(self.several) == 1:
            return [ours]
        parts = self.parts or (1,) * len(self.several)
        if len(ours) % sum(parts):
            raise ValueError(f"{name} has {len(ours)} rows, which cannot be split as {parts}")
        return list(ours.split([part * len(ours) // sum(parts) for part in parts]))

    def join(self, name: str, theirs: Sequence[Tensor]) -> Tensor:
        """Join theirs to our entry: the inverse of `split`."""
        joined = theirs[0] if len(theirs) == 1 else torch.cat(list(theirs))
        for dim in reversed(self._ones(name)):
            joined = joined.squeeze(dim)
        if self.rows is not None:
            joined = joined[self.rows(len(joined)).to(joined.device)]
        return joined

    def _ones(self, name: str) -> tuple[int, ...]:
        return () if name.endswith("bias") else self.ones


def _as_regex(piece: str) -> str:
    if piece == "*":
        return r"(?P<rest>.+)"
    if piece.startswith("{"):
        return rf"(?P<{piece[1:-1]}>\d+)"
    return re.escape(piece)


@dataclass(frozen=True)
class Constant:
    """Constant tensors of published files that are no parameters of ours: dropped on reading, added on writing.

    Beside each published entry whose name ends in `beside` stand entries that have `suffixes` in its place.
    """

    beside: str
    suffixes: tuple[str, ...]
    make: Callable[[torch.dtype], Tensor]


class Published(Protocol):
    """Model with a table of published names."""

    published: ClassVar[Sequence[Rule]]
    published_constants: ClassVar[Sequence[Constant]]

    def state_dict(self) -> dict[str, Tensor]: ...

    def fit_entry(self, name: str, tensor: Tensor) -> Tensor: ...


def to_published(model: Published, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename entries of `model`, weights, buffers or gradients, all or some, to the published names."""
    own = model.state_dict()
    unexpected = [name for name in tensors if name not in own]
    shapes = [
        f"{name} {tuple(tensor.shape)} instead of {tuple(own[name].shape)}"
        for name, tensor in tensors.items()
        if name in own and tensor.shape != own[name].shape
    ]
    _refuse({"not in this model": unexpected, "of another shape": shapes})
    theirs: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        rule, names = find_rule(model.published, name)
        theirs.update(zip(names, rule.split(name, tensor), strict=True))
    return theirs


def from_published(model: Published, tensors: Mapping[str, Tensor], strict: bool = True) -> dict[str, Tensor]:
    """Rename published entries to the names of `model`.

    Raises ValueError on another shape and, if strict, on missing or unexpected entries. If not strict, the result includes
    unexpected entries, and merely renamed ones of another shape (a classifier for other classes). Batch counters may be
    missing; the family's constants are dropped.
    """
    dropped = tuple(suffix for constant in model.published_constants for suffix in constant.suffixes)
    left = {name: tensor for name, tensor in tensors.items() if not name.endswith(dropped)}
    ours: dict[str, Tensor] = {}
    missing, shapes = [], []
    for name, own in model.state_dict().items():
        rule, names = find_rule(model.published, name)
        pieces = [left.pop(key) for key in names if key in left]
        if len(pieces) < len(names):
            if not name.endswith(COUNTER):
                missing += [key for key in names if key not in tensors]
            continue
        wanted = [tuple(piece.shape) for piece in rule.split(name, own.to("meta"))]
        found = [tuple(piece.shape) for piece in pieces]
        if len(pieces) == 1 and found != wanted and len(found[0]) == len(wanted[0]):
            pieces = [model.fit_entry(name, pieces[0])]
        wrong = [i for i, piece in enumerate(pieces) if tuple(piece.shape) != wanted[i]]
        if not wrong:
            ours[name] = rule.join(name, pieces)
        elif strict or len(pieces) > 1 or rule.rows is not None:
            shapes += [f"{names[i]} {found[i]} instead of {wanted[i]}" for i in wrong]
        else:
            ours[name] = pieces[0]
    _refuse({"missing": missing, "unexpected": list(left)} if strict else {}, {"of another shape": shapes})
    return ours | left


def constants(model: Published, theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the constants that the authors' code expects beside these published entries; most families have none."""
    return {
        name.removesuffix(constant.beside) + suffix: constant.make(tensor.dtype)
        for constant in model.published_constants
        for name, tensor in theirs.items()
        if name.endswith(constant.beside)
        for suffix in constant.suffixes
    }


def is_published(model: Published, names: Iterable[str]) -> bool:
    """Return True if more of these names are the published ones than ours; False for a model without rules."""
    if not model.published:
        return False
    given = {name for name in names if not name.endswith(COUNTER)}
    own = [name for name in model.state_dict() if not name.endswith(COUNTER)]
    theirs = {key for name in own for key in find_rule(model.published, name)[1]}
    return len(given & theirs) > len(given.intersection(own))


def find_rule(rules: Sequence[Rule], name: str) -> tuple[Rule, tuple[str, ...]]:
    """Return the first rule that matches our entry, and their names of it."""
    for rule in rules:
        names = rule.names(name)
        if names is not None:
            return rule, names
    raise ValueError(f"no rule gives {name} a published name: add one to the family's table")


def _refuse(*groups: Mapping[str, Sequence[str]]) -> None:
    wrong = [
        f"{len(items)} {what}: {', '.join(items[:SHOWN])}{' ...' if len(items) > SHOWN else ''}"
        for group in groups
        for what, items in group.items()
        if items
    ]
    if wrong:
        raise ValueError("these entries do not fit the model: " + "; ".join(wrong))
