"""Draw attention maps of a model over photographs, as figures for a paper.

    python -m tools.visualize --checkpoint output/NAME/best_raw.safetensors photo.jpg --out pictures
    python -m tools.visualize --checkpoint SG-Former-S.pth photo.jpg --out pictures --at 310,240 --format pdf

    SG-Former        significance of the tokens, and the tokens that were merged
    STViT            super tokens, and the attention that pixels receive through them
    GroupMixFormer   the weight of each token in the keys of each group
    --at             instead of these: the attention of the token at a point of the photograph

Maps cover the evaluation crop, at the resolution of the photograph. docs/attention_maps.md explains each of them.
"""

import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.progress import track
from torch import Tensor

from config.command_line import Parser
from data.loaders.decode import UnreadableImageError
from models.attention_maps import BlockIndex, all_blocks, attention_maps, check_blocks, has_maps, last_blocks
from models.backbone import Backbone
from tools.classifier import Classifier, add_checkpoint_options, find_images, load_from_args, read_image
from tools.terminal import Screen, say

SMALLEST = 8  # pixels of a photograph's side
PAGE = 4  # photographs on a page of the contact sheet
FORMATS = ("png", "pdf", "svg")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = visualize_parser()
    args = parser.parse_args(argv)
    screen = Screen(stderr=True, soft_wrap=True)
    out = Path(args.out)
    try:
        check_matplotlib()
        check_folder(out)
        images = find_images(args.images)
        classifier = load_from_args(args)
        if not has_maps(classifier.model):
            raise ValueError(
                f"{classifier.name} has no maps to show: not all of its blocks have an attention with `attention_maps`"
            )
        blocks = parse_blocks(args.blocks, classifier.model)
        point = parse_point(args.at) if args.at else None
        out.mkdir(parents=True, exist_ok=True)
        screen.print(classifier.describe(), style="dim")
        for note in classifier.notes:
            screen.print(f"note: {note}")
        todo = track(images, "drawing", console=screen, transient=True, disable=not screen.is_terminal)
        written, unreadable = draw_all(
            classifier, todo, blocks=blocks, point=point, smooth=args.smooth, out=out, formats=args.format
        )
    except (ValueError, OSError) as error:
        parser.fail(error)
    for failed in unreadable:
        screen.print(f"not read: {failed.name} {failed.reason}")
    for path in written:
        say(str(path))
    if not written:
        screen.print("nothing was drawn: none of the images can be read")
    return 0 if written else 1


def visualize_parser() -> Parser:
    """Return the parser of this command."""
    parser = Parser("Draw attention maps of a model over photographs.")
    parser.prog = "python -m tools.visualize"
    parser.add_argument("images", metavar="IMAGE", nargs="+", help="image files, and folders to search for them")
    parser.add_argument(
        "--checkpoint", metavar="FILE", help="weights of any layout (default: random weights of --model)"
    )
    parser.add_argument("--out", metavar="DIR", required=True, help="folder for the figures, created if missing")
    parser.add_argument(
        "--at", metavar="X,Y", help="draw the attention of the token at this pixel, e.g. 310,240 or 40%%,60%%"
    )
    parser.add_argument(
        "--blocks",
        metavar="S.B",
        nargs="+",
        default=["last"],
        help="blocks as stage.block, from 1; last (of each stage), or all",
    )
    parser.add_argument("--smooth", action="store_true", help="interpolate between tokens instead of drawing each")
    parser.add_argument(
        "--format",
        nargs="+",
        choices=FORMATS,
        default=["png"],
        help="file formats (png); pdf and svg have vector lines",
    )
    add_checkpoint_options(parser)
    return parser


def check_matplotlib() -> None:
    """Raise ValueError with the remedy if matplotlib is missing."""
    try:
        import matplotlib  # noqa: F401  takes a second
    except ImportError as error:
        raise ValueError("pictures need matplotlib, which is not installed; run pip install matplotlib") from error


def check_folder(out: Path) -> None:
    """Raise ValueError if the output folder cannot be created or written."""
    nearest = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not nearest.is_dir():
        raise ValueError(f"--out {out}: {nearest} is a file; name a folder")
    if not os.access(nearest, os.W_OK):
        raise ValueError(f"--out {out}: {nearest} cannot be written; name another folder")


def parse_blocks(texts: Sequence[str], model: Backbone) -> list[BlockIndex]:
    """Return the positions of the requested blocks. Raises ValueError for a block that the model lacks."""
    known = {"last": last_blocks, "all": all_blocks}
    found: list[BlockIndex] = []
    for text in texts:
        stage, _, block = text.partition(".")
        if text in known:
            found += known[text](model)
        elif stage.isdecimal() and block.isdecimal():
            found.append((int(stage), int(block)))
        else:
            raise ValueError(f"--blocks {text} is not understood; give stage.block, e.g. 3.2, or last, or all")
    return check_blocks(model, found)


def parse_point(text: str) -> tuple[float, float, bool]:
    """Return x, y and True if they are fractions of the photograph's sides, False for pixels."""
    parts = text.split(",")
    relative = all(part.strip().endswith("%") for part in parts)
    try:
        x, y = (float(part.strip().removesuffix("%") if relative else part) for part in parts)
    except ValueError as error:
        raise ValueError(
            f"--at {text} is not understood; give pixels, e.g. 310,240, or percentages, e.g. 40%,60%"
        ) from error
    return (x / 100, y / 100, True) if relative else (x, y, False)


def draw_all(
    classifier: Classifier,
    images: Iterable[Path],
    *,
    blocks: Sequence[BlockIndex],
    point: tuple[float, float, bool] | None,
    smooth: bool,
    out: Path,
    formats: Sequence[str],
) -> tuple[list[Path], list[UnreadableImageError]]:
    """Write a folder of figures for each photograph, and contact sheets; return the sheets and the unreadable images."""
    from trainer.figures.figure import save, sheet
    from trainer.figures.panels import Panel

    rows: list[list[Panel]] = []
    captions: list[str] = []
    unreadable = []
    names: set[str] = set()
    for path in images:
        name = path.stem.lstrip(".") or "image"  # ..jpg has the stem "."
        name = name if name not in names else path.name.lstrip(".")
        name = name if name not in names else f"{len(names)}_{name}"
        try:
            panels, caption = draw(classifier, read_image(path), path, blocks=blocks, point=point, smooth=smooth)
            _save_panels(panels, caption, out / name, formats, path)
        except UnreadableImageError as error:
            unreadable.append(error)
            continue
        names.add(name)
        rows.append(panels)
        captions.append(f"{path.name}: {caption}")
    written = []
    for start in range(0, len(rows), PAGE):
        page = "" if len(rows) <= PAGE else f"_{start // PAGE + 1}"
        for kind in formats:
            written.append(out / f"sheet{page}.{kind}")
            save(sheet(rows[start : start + PAGE], captions[start : start + PAGE]), written[-1])
    return written, unreadable


def _save_panels(panels: Sequence, caption: str, folder: Path, formats: Sequence[str], path: Path) -> None:
    """Write a figure for each panel of the photograph `path`; UnreadableImageError for one too large for a figure."""
    from trainer.figures.figure import save, single

    folder.mkdir(exist_ok=True)
    try:
        for panel in panels:
            for kind in formats:
                save(single(panel, caption), folder / f"{panel.name}.{kind}")
    except (ValueError, MemoryError) as error:
        reason = f"cannot be drawn ({str(error)[:200] or type(error).__name__})"
        raise UnreadableImageError(str(path), reason, "give a smaller one") from error


def draw(
    classifier: Classifier,
    image: Tensor,
    path: Path,
    *,
    blocks: Sequence[BlockIndex],
    point: tuple[float, float, bool] | None,
    smooth: bool,
) -> tuple[list, str]:
    """Return the panels of a photograph, uint8 (3, H, W), and a caption with the model's prediction."""
    from trainer.figures.panels import original, panels
    from trainer.figures.photograph import Photograph

    height, width = image.shape[1:]
    if min(height, width) < SMALLEST:
        raise UnreadableImageError(str(path), f"cannot be drawn on ({width} x {height} pixels)", "give a larger one")
    photo = Photograph.framed(image.permute(1, 2, 0).numpy(), *classifier.transform.geometry(height, width), path.name)
    mark = at = None
    if point:
        mark = (point[0] * width, point[1] * height) if point[2] else point[:2]
        at = photo.fractions(*mark)
    logits, maps = attention_maps(classifier.model, classifier.prepare(image)[None], at, blocks)
    best = logits.softmax(1).max(1)
    caption = f"{classifier.readable[int(best.indices)]} {100 * float(best.values):.1f} %"
    drawn = [original(photo, mark)]
    for found in maps:
        drawn += panels(found, 0, photo, mark, smooth)
    return drawn, f"{caption}  ·  {classifier.name}, {classifier.transform.crop} px"


if __name__ == "__main__":
    sys.exit(main())
