"""The four formats of tools/export.py: each function writes a model and returns the function read back from the file."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import model_entrypoint, save_for_hf
from torch import Tensor, nn

from models.build import is_retoken
from models.weights import fit, load_weights
from tools.classifier import Classifier
from tools.convert import ENTRIES, with_published_names

Forward = Callable[[Tensor], Tensor]  # images (B, 3, H, W) to logits
BATCH = ({0: torch.export.Dim.DYNAMIC},)
INPUT, OUTPUT = "images", "logits"
CLAUSES = {  # sentence of the model card, by the package that registers the model
    "retoken": "The architecture is registered with timm by `import models` of its repository, which must be on `PYTHONPATH`.",
    "timm": "The architecture is timm's own.",
    "own": "The architecture is registered with timm by the file `{file}`, which is not part of this folder.",
}


def write_onnx(classifier: Classifier, model: nn.Module, path: Path, opset: int | None = None) -> Forward:
    """Write an ONNX file whose batch may have any size, with preprocessing and class names as metadata."""
    import onnxruntime

    size = classifier.transform.crop
    try:
        program = torch.onnx.export(
            model,
            (torch.zeros(2, 3, size, size),),
            dynamo=True,
            verbose=False,
            external_data=False,
            dynamic_shapes=BATCH,
            input_names=[INPUT],
            output_names=[OUTPUT],
            opset_version=opset,
        )
    except torch.onnx.errors.OnnxExporterError as error:
        first = str(error).strip().splitlines()[0]
        raise ValueError(f"{classifier.name} could not be exported to ONNX ({first[:200]})") from error
    assert program is not None
    program.model.metadata_props.update({key: json.dumps(value) for key, value in metadata(classifier).items()})
    program.save(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def forward(images: Tensor) -> Tensor:
        (logits,) = session.run([OUTPUT], {INPUT: images.numpy()})
        return torch.from_numpy(logits)

    return forward


def write_program(classifier: Classifier, model: nn.Module, path: Path) -> Forward:
    """Write a program of torch.export whose batch may have any size."""
    size = classifier.transform.crop
    program = torch.export.export(model, (torch.zeros(2, 3, size, size),), dynamic_shapes=BATCH)
    with path.open("wb") as file:
        torch.export.save(program, file, extra_files={"retoken.json": json.dumps(metadata(classifier))})
    with path.open("rb") as file:
        return torch.export.load(file).module()


def write_published(classifier: Classifier, path: Path) -> Forward:
    """Write a .pth with the published parameter names, in the layout that the authors' code loads."""
    if not is_retoken(classifier.name):
        raise ValueError(f"{classifier.name} has no published names; choose another --format")
    net = classifier.model
    theirs = with_published_names(net, net.state_dict())  # type: ignore[arg-type]
    torch.save({ENTRIES.get(type(net).__name__, "model"): theirs}, path)
    other = _untrained(classifier)
    weights, _ = load_weights(path)
    other.load_state_dict(fit(other, weights, str(path)))
    return other.eval()


def write_timm(classifier: Classifier, folder: Path) -> Forward:
    """Write a folder that timm loads with local-dir: and, uploaded, with hf-hub:."""
    transform = classifier.transform
    for name in ("pretrained_cfg", "num_classes"):
        if not getattr(classifier.model, name, None):
            raise ValueError(
                f"{classifier.name} has no {name}, which timm's folders hold; build it by build_model_with_cfg, see "
                "docs/extending.md"
            )
    save_for_hf(
        classifier.model,
        str(folder),
        model_config={
            "num_classes": len(classifier.classes),
            "label_names": classifier.classes,
            "label_descriptions": dict(zip(classifier.classes, classifier.readable, strict=True)),
        },
        model_args={"img_size": transform.crop} if is_retoken(classifier.name) else None,
        data_config={
            "input_size": (3, transform.crop, transform.crop),
            "mean": classifier.mean,
            "std": classifier.std,
            "interpolation": transform.interpolation,
            "crop_pct": transform.crop / transform.resize if transform.resize else 1.0,
            "crop_mode": transform.mode if transform.resize else "squash",
        },
        safe_serialization=True,
    )
    (folder / "README.md").write_text(card(classifier), encoding="utf-8")
    return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()


def metadata(classifier: Classifier) -> dict[str, Any]:
    """Return the metadata of an exported file: model, classes, normalisation, evaluation crop."""
    transform = classifier.transform
    return {
        "model": classifier.name,
        "classes": classifier.classes,
        "names": classifier.readable,
        "mean": list(classifier.mean),
        "std": list(classifier.std),
        "evaluation": {"crop": transform.crop, "resize": transform.resize, "interpolation": transform.interpolation}
        | {"mode": transform.mode},
    }


def registered_by(name: str) -> tuple[str, Path]:
    """Return the origin of a model registered with timm, "retoken", "timm" or "own", and its file."""
    module = model_entrypoint(name).__module__
    kind = "retoken" if is_retoken(name) else "timm" if module.startswith("timm.") else "own"
    return kind, Path(sys.modules[module].__file__ or module)


def imports(name: str) -> str:
    """Return the line of Python that registers a model."""
    kind, file = registered_by(name)
    return {"retoken": "import models, timm", "timm": "import timm", "own": f"import {file.stem}, timm"}[kind]


def card(classifier: Classifier) -> str:
    """Return a model card for the Hugging Face hub."""
    accuracy = classifier.metadata.get("top1")
    kind, file = registered_by(classifier.name)
    about = f"Weights trained with Retoken. {CLAUSES[kind].format(file=file.name)}"
    result = f"Top-1 on its validation images: {accuracy:.3f} %.\n\n" if accuracy is not None else ""
    return (
        "---\nlibrary_name: timm\ntags:\n- image-classification\n- timm\n---\n\n"
        f"# {classifier.name}\n\n{about}\n\n{result}"
        f"{len(classifier.classes)} classes; {classifier.transform.describe()}.\n\n"
        f'    {imports(classifier.name)}\n    model = timm.create_model("hf-hub:USER/NAME", pretrained=True)\n'
    )


def _untrained(classifier: Classifier) -> nn.Module:
    """Return a new model of the same architecture, with random weights."""
    arguments = {"num_classes": len(classifier.classes), "img_size": classifier.transform.crop}
    return timm.create_model(classifier.name, **arguments)
