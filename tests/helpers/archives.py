"""Write the same images in every kind of store, from a folder train/<class>/*.jpg, val/<class>/*.jpg."""

import io
import json
import tarfile
import zipfile
from pathlib import Path

import numpy as np

from data.stores.split import Split, open_split
from tests.helpers.data_doubles import write_folder

WNIDS = ("n01440764", "n01443537", "n02119789")
SPLITS = ("train", "val")


def imagenet_like(root: Path) -> Path:
    """Write three ImageNet classes with ImageNet's file names: <wnid>_<number> in train, numbered files in val."""
    write_folder(root, train=dict.fromkeys(WNIDS, 16), val=dict.fromkeys(WNIDS, 3))
    for path in sorted(root.glob("train/*/*.jpg")):
        number = int(path.stem)
        path.rename(path.with_name(f"{path.parent.name}_{number * number * 7 + 2}.jpg"))
    pictures = sorted(root.glob("val/*/*.jpg"))
    for number, i in enumerate(np.random.RandomState(0).permutation(len(pictures)), 1):
        pictures[i].rename(pictures[i].with_name(f"ILSVRC2012_val_{number:08d}.jpg"))
    return root


def open_logged(root: Path, split: str = "train", **options) -> tuple[Split, list[str]]:
    """Open a split; return it and the lines that it logged."""
    logged: list[str] = []
    return open_split(root, split, progress=logged.append, **options), logged


def files_of(folder: Path, split: str) -> list[tuple[str, str, bytes]]:
    """Return (class, file name, bytes) in an order that is not the sorted one."""
    found = [(p.parent.name, p.name, p.read_bytes()) for p in sorted((folder / split).glob("*/*"))]
    np.random.RandomState(5).shuffle(found)
    return found


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def write_tar(path: Path, files: list[tuple[str, bytes]], **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as tar:
        for name, data in files:
            add(tar, name, data)
    return path


def as_tar(folder: Path, root: Path, form: int = tarfile.GNU_FORMAT) -> Path:
    for split in SPLITS:
        files = [(f"./{cls}/{name}", data) for cls, name, data in files_of(folder, split)]
        write_tar(root / f"{split}.tar", [("./README.txt", b"x"), ("./cat/._000.jpg", b"x"), *files], format=form)
    return root


def as_one_tar(folder: Path, root: Path) -> Path:
    files = [(f"pictures/{s}/{cls}/{name}", data) for s in SPLITS for cls, name, data in files_of(folder, s)]
    return write_tar(root / "pictures.tar", files)


def as_shards(folder: Path, root: Path, label: str = "cls", names: bool = False, subfolder: str = "") -> Path:
    for split in SPLITS:
        files = files_of(folder, split)
        classes = sorted({cls for cls, _, _ in files_of(folder, "train")})
        per = -(-len(files) // 3)
        for shard in range(3):
            members = []
            for cls, name, data in files[shard * per : (shard + 1) * per]:
                key, value = name.removesuffix(".jpg"), cls if names else classes.index(cls)
                text = json.dumps({"label": value, "width": 9}) if label == "json" else f"{value}\n"
                members += [(f"{key}.jpg", data), (f"{key}.{label}", text.encode())]
            write_tar(root / subfolder.format(split=split) / f"imagenet-{split}-{shard:06d}.tar", members)
    return root


def tars_of_classes(folder: Path, split: str) -> list[tuple[str, bytes]]:
    """Return (<class>.tar, its bytes), the members of ILSVRC2012_img_train.tar."""
    found: dict[str, list[tuple[str, bytes]]] = {}
    for cls, name, data in files_of(folder, split):
        found.setdefault(cls, []).append((name, data))
    packed = []
    for cls, files in found.items():
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as tar:
            for name, data in files:
                add(tar, name, data)
        packed.append((f"{cls}.tar", buffer.getvalue()))
    return packed


def as_official(folder: Path, root: Path) -> Path:
    """Write the train tar of tars and the flat val tar, without a label file for val."""
    write_tar(root / "ILSVRC2012_img_train.tar", tars_of_classes(folder, "train"))
    files = [(name, data) for _, name, data in files_of(folder, "val")]
    write_tar(root / "ILSVRC2012_img_val.tar", files)
    return root


def as_class_tars(folder: Path, root: Path) -> Path:
    for split in SPLITS:
        (root / split).mkdir(parents=True)
        for name, data in tars_of_classes(folder, split):
            (root / split / name).write_bytes(data)
    return root


def as_zip(folder: Path, root: Path, inner: str = "", method: int = zipfile.ZIP_STORED) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    for split in SPLITS:
        with zipfile.ZipFile(root / f"{split}.zip", "w", method) as archive:
            archive.mkdir("empty")
            for cls, name, data in files_of(folder, split):
                info = zipfile.ZipInfo(f"{inner}{cls}/{name}")
                info.compress_type, info.extra = method, b"\x99\x99\x02\x00ab"
                archive.writestr(info, data)
    return root
