"""Files that are given as weights and are something else: each is refused by its real name."""

import gzip
import io
import json
import lzma
import pickle
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save, save_file
from torch import nn

from config.command_line import train_parser
from models.file_kinds import SAFETENSORS, TORCH, kind_of
from models.weights import load_weights

WEIGHTS = {"a.weight": torch.arange(2000.0), "a.bias": torch.ones(3)}


def torch_bytes(value, **options):
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


def zip_bytes(*names):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in names:
            archive.writestr(name, b"x" * 50)
    return buffer.getvalue()


def npz_bytes():
    buffer = io.BytesIO()
    np.savez(buffer, a=np.zeros(3))
    return buffer.getvalue()


def npy_bytes():
    buffer = io.BytesIO()
    np.save(buffer, np.zeros(3))
    return buffer.getvalue()


def tar_bytes():
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("model.pth"))
    return buffer.getvalue()


def script_bytes():
    return zip_bytes("m/data.pkl", "m/code/__torch__.py", "m/constants.pkl", "m/version")


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 12345\n"
OTHERS = {
    "empty": (b"", "empty"),
    "zeros": (bytes(5000), "zeros"),
    "lfs": (POINTER, "Git LFS pointer"),
    "annex": (b"/annex/objects/SHA256E-s1--ab.pth\n", "git-annex"),
    "html": (b"<!DOCTYPE html>\n<html><body>Sign in</body></html>", "HTML"),
    "html in latin-1": (b"\n  <HTML><head>\xe9t\xe9</head>", "HTML"),
    "html with a BOM": (b"\xef\xbb\xbf<html>", "HTML"),
    "xml": (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "XML"),
    "json": (json.dumps({"weight_map": {"a": "b"}}).encode(), "JSON"),
    "text": ("Zugriff verweigert: für Sie nicht\n".encode() * 900, "text"),
    "utf-16": ("not found".encode("utf-16"), "UTF-16"),
    "gzip": (gzip.compress(torch_bytes(WEIGHTS)), "gzip"),
    "xz": (lzma.compress(b"weights"), "xz"),
    "zip": (zip_bytes("readme.txt", "x/y.md"), "zip archive, not one of torch"),
    "zip of a torch file": (zip_bytes("model.pth"), "zip archive of other files"),
    "empty zip": (zip_bytes(), "zip archive"),
    "npz": (npz_bytes(), r"\.npz"),
    "npy": (npy_bytes(), r"\.npy"),
    "tar": (tar_bytes(), "tar archive"),
    "onnx": (b"\x08\x08\x12\x07pytorch\x1a\x052.9.0" + bytes(range(256)), "ONNX"),
    "hdf5": (b"\x89HDF\r\n\x1a\n" + bytes(99), "HDF5"),
    "gguf": (b"GGUF\x03" + bytes(99), "GGUF"),
    "png": (b"\x89PNG\r\n\x1a\n" + bytes(99), "PNG"),
    "pdf": (b"%PDF-1.7\n" + bytes(99), "PDF"),
    "torchscript": (script_bytes(), "TorchScript"),
    "torch, cut off": (torch_bytes(WEIGHTS)[:3000], "damaged"),
    "torch, nearly whole": (torch_bytes(WEIGHTS)[:-30], "damaged"),
    "safetensors, cut off in its header": (save(WEIGHTS)[:40], "cut off"),
}


@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".pth.tar", ""])
@pytest.mark.parametrize("name", OTHERS)
def test_other_file_is_named_as_it_is(tmp_path, name, suffix):
    content, message = OTHERS[name]
    path = tmp_path / f"w{suffix}"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        load_weights(path)
    assert str(path) in str(caught.value)
    assert ";" in str(caught.value)  # the remedy


@pytest.mark.parametrize("name", ["w.pth", "w.pt", "w.bin", "w.ckpt", "w.pth.tar", "w"])
@pytest.mark.parametrize("legacy", [False, True])
def test_torch_file_is_read_under_any_name_but_safetensors(tmp_path, name, legacy):
    content = torch_bytes(WEIGHTS, _use_new_zipfile_serialization=not legacy)
    (tmp_path / name).write_bytes(content)
    assert kind_of(tmp_path / name) == (TORCH, "")
    assert load_weights(tmp_path / name)[0].keys() == WEIGHTS.keys()
    (tmp_path / "w.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"torch file named \.safetensors.*rename it to \.pth"):
        load_weights(tmp_path / "w.safetensors")


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".ckpt"])
def test_safetensors_under_the_name_of_a_torch_file_is_refused(tmp_path, suffix):
    save_file(WEIGHTS, tmp_path / f"w{suffix}")
    assert kind_of(tmp_path / f"w{suffix}") == (SAFETENSORS, "")
    with pytest.raises(ValueError, match=rf"safetensors file named \{suffix}; rename it to \.safetensors"):
        load_weights(tmp_path / f"w{suffix}")


def test_safetensors_is_read_under_its_name_or_one_without_a_suffix(tmp_path):
    for name in ("w.safetensors", "w.SAFETENSORS", "0a1b2c"):
        save_file(WEIGHTS, tmp_path / name)
        assert load_weights(tmp_path / name)[0].keys() == WEIGHTS.keys()


@pytest.mark.parametrize("keep", [0.3, 0.7, 0.99])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_truncated_file_is_called_damaged(tmp_path, suffix, keep):
    content = save(WEIGHTS) if suffix == ".safetensors" else torch_bytes(WEIGHTS)
    (tmp_path / f"w{suffix}").write_bytes(content[: int(keep * len(content))])
    with pytest.raises(ValueError, match="damaged"):
        load_weights(tmp_path / f"w{suffix}")


def test_pickle_that_is_no_torch_file_and_whole_model_are_refused(tmp_path):
    (tmp_path / "a.pth").write_bytes(pickle.dumps([1, 2]))
    torch.save(nn.Linear(2, 2), tmp_path / "b.pth")
    with pytest.raises(ValueError, match="a pickle of other Python objects"):
        load_weights(tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"torch\.nn\.modules\.linear\.Linear"):
        load_weights(tmp_path / "b.pth")


@pytest.mark.parametrize(
    "address",
    ["https://example.org/w.pth", "s3://bucket/w.safetensors", "hf-hub:user/name", "gs://b/w", "file:///w.pt"],
)
def test_address_is_answered_with_download_it(tmp_path, monkeypatch, address):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="is an address, not a file; download it first") as caught:
        load_weights(Path(address))
    assert address in str(caught.value) or address == "file:///w.pt"


def test_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    save_file(WEIGHTS, tmp_path / "w.safetensors")
    assert load_weights(Path("~/w.safetensors"))[0].keys() == WEIGHTS.keys()
    with pytest.raises(ValueError, match=rf"{tmp_path}/none\.pth does not exist"):
        load_weights(Path("~/none.pth"))


@pytest.mark.parametrize(
    "words", [["--local-rank=0"], ["--local_rank", "1"], ["--local_rank=3"], ["--local-rank", "0"]]
)
def test_flag_of_the_old_launcher_is_answered_with_torchrun(words, capsys):
    with pytest.raises(SystemExit):
        train_parser().parse_args([*words, "--cfg", "a.yaml"])
    assert "start with torchrun" in capsys.readouterr().err
