"""Convert weights between our names and the published ones, in safetensors or .pth files.

    python -m tools.convert SG-Former-S.pth small.safetensors --model sgformer_small --weights ema
    python -m tools.convert output/NAME/best_raw.safetensors theirs.pth --model stvit_base --to published

IN is a file of any layout that models/weights.py lists; no code in it is run. OUT has the weights alone, bit by bit: a .pth
with our names is {"model": ..., "facts": ...}, one with the published names is what the authors' code loads.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.atomic_files import write_atomically
from config.command_line import Parser
from engine.checkpoint.files import save_state, save_weights
from models.backbone import Backbone
from models.build import check_name, retoken_models
from models.identify import identify, skeleton
from models.published import constants, is_published, to_published
from models.weights import fit, load_weights

SUFFIXES = (".safetensors", ".pth", ".pt")
ENTRIES = {"SGFormer": "state_dict"}  # where the authors' code looks for weights; the other families: model
KINDS = {"raw": "raw", "ema": "EMA"}


@dataclass
class Conversion:
    """Weights under the names asked for, and what a reader of the file wants to know about them."""

    tensors: dict[str, Tensor]
    family: str
    published: bool  # the names, of these and before
    was_published: bool
    metadata: dict[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = convert_parser()
    args = parser.parse_args(argv)
    source, target = Path(args.source), Path(args.target)
    try:
        check_target(source, target)
        weights, metadata = load_weights(source, args.weights or "raw")
        if args.weights and metadata["weights"] != args.weights:
            raise ValueError(
                f"{source} holds {KINDS[metadata['weights']]} weights only; leave --weights out to convert them"
            )
        print(describe_file(source, metadata))
        done = convert(weights, metadata, args.model, args.to == "published", str(source))
        print(describe_weights(done))
        write(target, done)
    except (ValueError, OSError) as error:
        parser.fail(error)
    print(f"{target}: written, {'published' if done.published else 'our'} names, {len(done.tensors)} tensors")
    return 0


def convert_parser() -> Parser:
    """Return the parser of this tool."""
    parser = Parser("Convert weights between our names and the published ones.")
    parser.prog = "python -m tools.convert"
    parser.add_argument("source", metavar="IN", help="file with weights, of any layout: ours, timm's, Swin's, DeiT's")
    parser.add_argument("target", metavar="OUT", help="file to write: .safetensors, .pth or .pt")
    parser.add_argument(
        "--model", metavar="NAME", help=f"what IN must be, else it is told: {', '.join(retoken_models())}"
    )
    parser.add_argument("--weights", choices=("raw", "ema"), help="which weights of a file that holds both (raw)")
    parser.add_argument("--to", choices=("retoken", "published"), default="retoken", help="names to write (retoken)")
    return parser


def check_target(source: Path, target: Path) -> None:
    """Raise ValueError for a file that cannot be written, or that would destroy what is read."""
    if target.suffix not in SUFFIXES:
        raise ValueError(f"{target}: the suffix says the format; end it in {', '.join(SUFFIXES)}")
    if target.is_dir() or not target.parent.is_dir():
        raise ValueError(
            f"{target}: {'is a folder' if target.is_dir() else 'its folder does not exist'}; name another file"
        )
    if target.exists() and source.exists() and target.samefile(source):
        raise ValueError(f"{target} is the file to be read; give OUT another name")


def convert(
    weights: Mapping[str, Tensor], metadata: Mapping[str, Any], model: str | None, published: bool, source: str
) -> Conversion:
    """Fit weights to a registered variant and give them our or the published names. Values and types stay.

    Raises ValueError naming the first names and shapes that do not fit, and the variant that would.
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
        raise ValueError(f"--model={model!r} has one naming only; choose one of {', '.join(retoken_models())}")
    net = skeleton(model, weights, _size(metadata))
    try:
        fitted = fit(net, weights, source, remedy=f"--model is {model}")
    except ValueError as error:
        raise ValueError(f"{error}; {_what_it_is(weights, model)}") from error
    # Counters that the file lacks stay away: they have no value here.
    ours = {
        name: tensor.clone(memory_format=torch.contiguous_format)
        for name, tensor in fitted.items()
        if not tensor.is_meta
    }
    return Conversion(
        with_published_names(net, ours) if published else ours,
        type(net).__name__,
        published,
        is_published(net, weights),
        {
            **{key: value for key, value in metadata.items() if key not in ("layout", "holds")},
            "model": model,
            "num_classes": net.num_classes,
            "parameters": sum(p.numel() for p in net.parameters()),
        },
    )


def with_published_names(model: Backbone, ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give weights the published names, each with memory of its own, and the constants that go with them."""
    theirs = {name: tensor.clone() for name, tensor in to_published(model, ours).items()}
    return theirs | constants(model, theirs)


def write(target: Path, done: Conversion) -> None:
    """Write a conversion in the format that the suffix says."""
    if target.suffix == ".safetensors":
        save_weights(target, done.tensors, done.metadata)
    elif done.published:
        content = {ENTRIES.get(done.family, "model"): done.tensors}
        write_atomically(target, lambda file: torch.save(content, file))
    else:
        save_state(target, {"model": done.tensors, "ema": None, "facts": done.metadata})


def describe_file(source: Path, metadata: Mapping[str, Any]) -> str:
    """Say what kind of file it is and which weights are taken."""
    others = [KINDS[kind] for kind in metadata["holds"] if kind != metadata["weights"]]
    more = f" (it also holds {' and '.join(others)} weights)" if others else ""
    return f"{source}: {metadata['layout']} layout, {KINDS[metadata['weights']]} weights{more}"


def describe_weights(done: Conversion) -> str:
    """Say what the weights are."""
    names = "the published" if done.was_published else "our"
    metadata = done.metadata
    return (
        f"{metadata['model']} ({done.family}) under {names} names, {metadata['num_classes']} classes, "
        f"{metadata['parameters']:,} parameters"
    )


def _what_it_is(weights: Mapping[str, Tensor], model: str) -> str:
    found = identify(weights)
    if found is None:
        return "it resembles no variant"
    return f"{found}: give --model {found.name}" if found.name != model else str(found)


def _size(metadata: Mapping[str, Any]) -> int | tuple[int, int] | None:
    size = metadata.get("img_size")
    return tuple(size) if isinstance(size, list) else size


if __name__ == "__main__":
    sys.exit(main())
