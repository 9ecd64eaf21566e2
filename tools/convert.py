"""Convert weights between our names and the published names, in safetensors or .pth files.

    python -m tools.convert SG-Former-S.pth small.safetensors --model sgformer_small --weights ema
    python -m tools.convert output/NAME/best_raw.safetensors theirs.pth --model stvit_base --to published

IN is a file of any layout that models/weights.py lists; no code in it is run. OUT holds only the weights, unchanged bit for
bit: a .pth with our names is {"model": ..., "facts": ...}, one with the published names has the authors' layout.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.atomic_files import write_atomically
from common.text import shorten
from config.command_line import Parser
from engine.checkpoint.files import save_state, save_weights
from engine.result_files import check_location
from models.backbone import Backbone
from models.build import check_name, retoken_models
from models.identify import identify, skeleton
from models.published import constants, is_published, to_published
from models.weights import fit, load_weights
from tools.terminal import say

SUFFIXES = (".safetensors", ".pth", ".pt")
ENTRIES = {"SGFormer": "state_dict"}  # entry with the weights in the authors' layout; the other families: model
KINDS = {"raw": "raw", "ema": "EMA"}


@dataclass
class Conversion:
    """Weights under the requested names, with their metadata."""

    tensors: dict[str, Tensor]
    family: str
    published: bool  # True if these names are the published ones
    was_published: bool  # the same for the names in the input
    metadata: dict[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = convert_parser()
    args = parser.parse_args(argv)
    source, target = Path(args.source), Path(args.target)
    try:
        check_paths(source, target)
        weights, metadata = load_weights(source, args.weights or "raw")
        if args.weights and metadata["weights"] != args.weights:
            raise ValueError(
                f"{source} holds {KINDS[metadata['weights']]} weights only; leave --weights out to convert them"
            )
        say(describe_file(source, metadata))
        for note in metadata.get("notes", ()):
            say(note)
        done = convert(weights, metadata, args.model, args.to == "published", str(source))
        say(describe_weights(done))
        write(target, done)
    except (ValueError, OSError) as error:
        parser.fail(error)
    say(f"{target}: written, {'published' if done.published else 'our'} names, {len(done.tensors)} tensors")
    return 0


def convert_parser() -> Parser:
    """Return the parser of this tool."""
    parser = Parser("Convert weights between our names and the published names.")
    parser.prog = "python -m tools.convert"
    parser.add_argument("source", metavar="IN", help="file with weights, of any layout: ours, timm's, Swin's, DeiT's")
    parser.add_argument("target", metavar="OUT", help="file to write: .safetensors, .pth or .pt")
    parser.add_argument(
        "--model", metavar="NAME", help=f"model of IN (identified by its weights): {', '.join(retoken_models())}"
    )
    parser.add_argument("--weights", choices=("raw", "ema"), help="weights to take from a file with both (raw)")
    parser.add_argument("--to", choices=("retoken", "published"), default="retoken", help="names to write (retoken)")
    return parser


def check_paths(source: Path, target: Path) -> None:
    """Raise ValueError for a file that cannot be written, or that is the input."""
    if target.suffix not in SUFFIXES:
        raise ValueError(f"{target}: the suffix selects the format; end it in {', '.join(SUFFIXES)}")
    check_location(str(target), target, f"weights{target.suffix}")
    if target.exists() and source.exists() and target.samefile(source):
        raise ValueError(f"{target} is the file to be read; give OUT another name")


def convert(
    weights: Mapping[str, Tensor], metadata: Mapping[str, Any], model: str | None, published: bool, source: str
) -> Conversion:
    """Fit weights to a registered variant and return them under our or the published names, values and types unchanged.

    Raises ValueError naming the first names and shapes that do not fit, and the variant that does.
    """
    if model is None:
        found = identify(weights)
        if found is None:
            raise ValueError(
                f"{source} resembles no variant ({', '.join(list(weights)[:4])}, ...); name one with --model"
            )
        model = found.name
    elif model not in retoken_models():
        check_name(model, "--model")
        raise ValueError(f"--model={shorten(model)} has one naming only; choose one of {', '.join(retoken_models())}")
    net = skeleton(model, weights, _size(metadata))
    try:
        fitted = fit(net, weights, source, remedy=f"--model is {model}")
    except ValueError as error:
        raise ValueError(f"{error}; {_nearest_variant(weights, model)}") from error
    # BatchNorm counters that the file lacks are left out: on the meta device they have no value.
    ours = {
        name: tensor.clone(memory_format=torch.contiguous_format)
        for name, tensor in fitted.items()
        if not tensor.is_meta
    }
    return Conversion(
        tensors=with_published_names(net, ours) if published else ours,
        family=type(net).__name__,
        published=published,
        was_published=is_published(net, weights),
        metadata={
            **{key: value for key, value in metadata.items() if key not in ("layout", "holds", "notes")},
            "model": model,
            "num_classes": net.num_classes,
            "parameters": sum(p.numel() for p in net.parameters()),
        },
    )


def with_published_names(model: Backbone, ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return copies of weights under the published names, with the constants of published files."""
    theirs = {name: tensor.clone() for name, tensor in to_published(model, ours).items()}
    return theirs | constants(model, theirs)


def write(target: Path, done: Conversion) -> None:
    """Write a conversion in the format of the file's suffix."""
    if target.suffix == ".safetensors":
        save_weights(target, done.tensors, done.metadata)
    elif done.published:
        content = {ENTRIES.get(done.family, "model"): done.tensors}
        write_atomically(target, lambda file: torch.save(content, file))
    else:
        save_state(target, {"model": done.tensors, "ema": None, "facts": done.metadata})


def describe_file(source: Path, metadata: Mapping[str, Any]) -> str:
    """Return the file's layout and the weights taken from it as text."""
    others = [KINDS[kind] for kind in metadata["holds"] if kind != metadata["weights"]]
    more = f" (it also holds {' and '.join(others)} weights)" if others else ""
    return f"{source}: {metadata['layout']} layout, {KINDS[metadata['weights']]} weights{more}"


def describe_weights(done: Conversion) -> str:
    """Return the weights' model, names, classes and number of parameters as text."""
    names = "the published" if done.was_published else "our"
    metadata = done.metadata
    return (
        f"{metadata['model']} ({done.family}) under {names} names, {metadata['num_classes']} classes, "
        f"{metadata['parameters']:,} parameters"
    )


def _nearest_variant(weights: Mapping[str, Tensor], model: str) -> str:
    """Return a hint that names the variant nearest to the weights."""
    found = identify(weights)
    if found is None:
        return "it resembles no variant"
    return f"{found}: give --model {found.name}" if found.name != model else str(found)


def _size(metadata: Mapping[str, Any]) -> int | tuple[int, int] | None:
    """Return the image size in metadata, None without one."""
    size = metadata.get("img_size")
    return tuple(size) if isinstance(size, list) else size


if __name__ == "__main__":
    sys.exit(main())
