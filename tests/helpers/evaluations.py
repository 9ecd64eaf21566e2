"""Runs of eval.py in the test's own process: small data, checkpoints with random weights, and logits computed without the loader."""

import csv
import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

import config
import eval as eval_script
from data.augment.transforms import EvalTransform
from data.stores.class_labels import imagenet_wnids
from tests.helpers.data_doubles import picture

WNIDS = imagenet_wnids()
TWELVE = [f"class{n}" for n in range(12)]
SMALL = "DEVICE cpu MODEL.NAME test_efficientnet DATA.IMG_SIZE 32 DATA.EVAL_RESIZE 36 DATA.WORKERS 0 EVAL.BATCH 4"


def tensor(image):
    """Return a PIL image as a uint8 tensor (3, H, W)."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def cfg_of(*opts):
    """Return the default config with options."""
    return config.load(opts=["DATA.WORKERS", "0", *map(str, opts)])


def draw(root, counts, start=0):
    """Write root/<class>/*.jpg: as many pictures a class as `counts` says."""
    for number, (name, count) in enumerate(counts.items(), start):
        (root / name).mkdir(parents=True)
        for i in range(count):
            rng = np.random.RandomState([number, i])
            picture(rng, *rng.randint(30, 60, size=2)).save(root / name / f"{name}_{i:02d}.jpg")
    return root


def weights_of(num_classes, seed):
    """Return random weights whose answers differ from image to image."""
    torch.manual_seed(seed)
    model = timm.create_model("test_efficientnet", num_classes=num_classes)
    pictures = [tensor(picture(np.random.RandomState([99, i]), 36, 36))[:, 2:34, 2:34] for i in range(24)]
    images = (torch.stack(pictures) / 255 - 0.45) / 0.225
    with torch.no_grad():
        model.train()
        for _ in range(30):  # statistics of batch norm that fit the pictures
            model(images)
        model.eval()
        model.classifier.weight.normal_(std=0.5)
        model.classifier.bias -= model(images).mean(0)
    return model.state_dict()


def checkpoint(path, classes, seed=0, names=True, **metadata):
    """Write best_raw-like safetensors; without names a plain file of weights."""
    weights = {k: v.contiguous() for k, v in weights_of(len(classes), seed).items()}
    known = {"model": "test_efficientnet", "num_classes": len(classes), "classes": list(classes), **metadata}
    save_file(weights, path, {"retoken": json.dumps(known)} if names else None)
    return path


def argv_of(eval_cfg, *more):
    """Return the arguments of eval.py for a small model, with more flags and, after --opts, more options."""
    more = [str(part) for part in more]
    where = more.index("--opts") if "--opts" in more else len(more)
    return ["--cfg", str(eval_cfg), *more[:where], "--opts", *SMALL.split()[:-2], *more[where + 1 :]]


def run_eval(eval_cfg, capsys, *more):
    """Evaluate; return the output."""
    assert eval_script.main(argv_of(eval_cfg, *more)) == 0
    return capsys.readouterr().out


def eval_fails(eval_cfg, capsys, *more):
    """Check that eval.py exits with status 2; return its message."""
    with pytest.raises(SystemExit) as caught:
        eval_script.main(argv_of(eval_cfg, *more))
    assert caught.value.code == 2
    return capsys.readouterr().err


def table(path):
    """Return the rows of a CSV file."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def logits_by_hand(path, images, flip=False, size=32, resize=36):
    """Return the logits of image files, computed without the loader."""
    from safetensors.torch import load_file

    weights = load_file(path)
    model = timm.create_model("test_efficientnet", num_classes=len(weights["classifier.bias"]))
    model.load_state_dict(weights)
    model.eval()
    transform, rows = EvalTransform(size, resize), []
    mean, std = (torch.tensor(cfg_of().DATA[key]).view(3, 1, 1) for key in ("MEAN", "STD"))
    for image in images:
        x = ((transform(tensor(Image.open(image))) / 255 - mean) / std)[None]
        with torch.inference_mode():
            rows.append((model(x) + model(x.flip(-1))) / 2 if flip else model(x))
    return torch.cat(rows)
