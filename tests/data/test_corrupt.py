"""Unreadable images: replaced and listed in training, an error in evaluation; unusual but valid files are read."""

import json
import shutil

import numpy as np
import pytest
import torch

import train as train_script
from data.augment.rand_augment_policy import parse_policy
from data.augment.transforms import EvalTransform, TrainTransform
from data.loaders.bad_images import NEIGHBOURS, BadImage, BadImages, TooManyBadImagesError, read_or_replace
from data.loaders.decode import UnreadableImageError, decode
from data.loaders.jpeg_header import frame_header
from data.loaders.sampler import Sampler
from data.loaders.torch_loader import EvalLoader, TrainLoader
from data.stores.folder import scan
from tests.helpers.damaged_images import JPEG, READABLE, UNREADABLE
from tests.helpers.data_doubles import write_folder


def as_array(data):
    return np.frombuffer(bytearray(data), dtype=np.uint8)


def error_of(batches):
    try:
        list(batches)
    except UnreadableImageError as error:
        return str(error)
    return None


@pytest.mark.parametrize("kind", UNREADABLE)
def test_unreadable_file_is_named_with_the_reason(kind):
    with pytest.raises(
        UnreadableImageError, match=r"^cat/7\.jpg: cannot be decoded \(\d+ bytes; .+\); restore the file"
    ):
        decode(as_array(UNREADABLE[kind]), "cat/7.jpg")


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("empty", "0 bytes; the file is empty"),
        ("zeros", "3000 bytes; all bytes are zero"),
        ("html", "a web page, not an image"),
        ("garbage", "no image format that is read"),
        ("jpeg bomb", "65500 x 65500 pixels are more than the 178956970 that are decoded"),
        ("png bomb", "60000 x 60000 pixels are more than the 178956970"),
    ],
)
def test_reason_describes_the_file(kind, reason):
    with pytest.raises(UnreadableImageError, match=reason):
        decode(as_array(UNREADABLE[kind]), "x")


def test_damage_anywhere_is_an_unreadable_image_or_an_image():
    """Image decoders raise many kinds of errors for damaged files; none may end a worker."""
    rng = np.random.RandomState(0)
    for whole in (JPEG, READABLE["png"], READABLE["gif"], READABLE["progressive"]):
        for _ in range(60):
            data = as_array(whole)
            data[rng.randint(len(data), size=8)] = rng.randint(256, size=8)
            try:
                image = decode(data, "x")
            except UnreadableImageError:
                continue
            assert image.dtype == torch.uint8


@pytest.mark.parametrize("kind", READABLE)
def test_odd_file_is_augmented_and_evaluated(kind):
    image = decode(as_array(READABLE[kind]), "x")
    transform = TrainTransform(24, 0, policy=parse_policy("rand-m9-mstd0.5-inc1"))
    for position in range(5):
        assert transform(image, 0, position)[0].shape == (3, 24, 24)
    assert EvalTransform(24, 28)(image).shape == (3, 24, 24)
    assert EvalTransform(24, 0)(image).shape == (3, 24, 24)


def test_exif_rotation_is_not_applied():
    assert decode(as_array(READABLE["exif rotated"]), "x").shape == (3, 47, 61)


@pytest.mark.parametrize(
    ("kind", "size"), [("1 x 700", (700, 1)), ("progressive", (47, 61)), ("cmyk", (47, 61)), ("huge", (3000, 4000))]
)
def test_jpeg_size_is_read_from_the_header(kind, size):
    assert frame_header(as_array(READABLE[kind]))[:2] == size


@pytest.mark.parametrize(
    "data", [b"", b"\xff\xd8", JPEG[:30], b"\xff\xd8" + b"\xff" * 50, b"\xff\xd8\xff\xe0\x00\x00" * 9]
)
def test_jpeg_without_a_frame_has_no_size(data):
    with pytest.raises(ValueError, match=r"damaged|cut off|begin"):
        frame_header(as_array(data))


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    """Return a folder of 40 images in two classes, 6 of them unreadable: two adjacent ones, the last one, and others."""
    root = write_folder(tmp_path_factory.mktemp("damaged"), train={"cat": 20, "dog": 20}) / "train"
    kinds = iter(UNREADABLE.values())
    for name in ("cat/003", "cat/004", "cat/019", "dog/007", "dog/019", "cat/011"):
        (root / f"{name}.jpg").write_bytes(next(kinds))
    return scan(root, ["cat", "dog"], must_hold_all=True)


REPLACED = {3: 5, 4: 5, 11: 12, 19: 20, 27: 28, 39: 0}


def loader(source, rank=0, world=1, workers=0):
    return TrainLoader(source, TrainTransform(24, 1), Sampler(len(source), 1, 8, 4), rank, world, workers, 2)


@pytest.mark.parametrize(("world", "workers"), [(1, 0), (1, 2), (2, 0), (2, 1)])
def test_training_uses_the_next_readable_image_for_any_number_of_workers(damaged, world, workers):
    order = Sampler(40, 1, 8, 4).order(0)
    batches = {}
    for rank in range(world):
        for step, batch in enumerate(loader(damaged, rank, world, workers).epoch(0)):
            batches[step * world + rank] = batch
    used = torch.cat([batches[i].indices for i in range(10)])
    assert used.tolist() == [REPLACED.get(index, index) for index in order.tolist()]
    assert torch.cat([batches[i].labels for i in range(10)]).tolist() == damaged.labels[used.numpy()].tolist()
    bad = [bad for batch in batches.values() for bad in batch.bad]
    assert {one.index: one.replaced_by_index for one in bad} == REPLACED
    assert all(
        one.path == damaged.name(one.index) and one.replaced_by == damaged.name(one.replaced_by_index) for one in bad
    )
    assert all(one.reason.startswith("cannot be decoded (") for one in bad)


def test_replacement_has_the_pixels_of_its_neighbour_with_the_same_rng_key(damaged):
    transform = TrainTransform(24, 1)
    order = Sampler(40, 1, 8, 4).order(0).tolist()
    images = torch.cat([batch.images for batch in loader(damaged).epoch(0)])
    position = order.index(27)
    assert torch.equal(images[position], transform(decode(damaged.read(28), "x"), 0, position)[0])


def test_batch_keeps_its_bad_images_on_the_device(damaged):
    batch = next(batch for batch in loader(damaged).epoch(0) if batch.bad)
    assert batch.to("cpu").bad == batch.bad


@pytest.mark.parametrize("workers", [0, 1])
def test_evaluation_stops_and_names_the_file(damaged, workers):
    batches = EvalLoader(damaged, EvalTransform(24, 28), 8, workers=workers)
    assert error_of(batches).startswith(f"{damaged.name(3)}: cannot be decoded")


def test_missing_file_is_replaced_and_evaluation_stops(tmp_path):
    root = write_folder(tmp_path, train={"cat": 8}) / "train"
    source = scan(root, ["cat"], must_hold_all=True)
    (root / "cat" / "002.jpg").unlink()
    bad = [bad for batch in loader(source).epoch(0) for bad in batch.bad]
    assert [(one.index, one.replaced_by_index) for one in bad] == [(2, 3)]
    assert bad[0].reason.startswith("cannot be read ([Errno 2]")
    assert error_of(EvalLoader(source, EvalTransform(24), 8)).startswith(
        f"{root}/cat/002.jpg: cannot be read ([Errno 2]"
    )


def test_unreachable_storage_ends_training():
    def load(index):
        raise UnreadableImageError(f"{index}.jpg", "cannot be read (gone)", "")

    with pytest.raises(UnreadableImageError, match=r"^5: .*neither can the 7 images after it be read; see whether"):
        read_or_replace(5, 8, load, str)
    tried = []
    with pytest.raises(UnreadableImageError, match=f"the {NEIGHBOURS} images after it"):
        read_or_replace(5, 10**6, lambda index: tried.append(index) or load(index), str)
    assert tried == list(range(5, 6 + NEIGHBOURS))


def bad(number):
    return BadImage(f"{number}.jpg", "cannot be decoded (empty)", f"{number + 1}.jpg", number, number + 1)


@pytest.mark.parametrize(
    ("images", "share", "allowed"),
    [(1_281_167, 0.001, 1282), (1000, 0.001, 1), (24, 0.001, 1), (24, 0.0, 0), (10, 1, 10)],
)
def test_allowed_share_is_rounded_up(images, share, allowed):
    assert BadImages(images, share).allowed == allowed


def test_too_many_bad_images_stop_after_they_are_listed(tmp_path):
    found = BadImages(30, 0.1)
    assert found.add([[bad(1), bad(2)], [bad(2), bad(3)]], tmp_path) == [bad(1), bad(2), bad(3)]
    assert found.add([[bad(2)]], tmp_path) == []
    message = r"^4\.jpg: .* with it 4 of 30 training images cannot be read, DATA\.MAX_BAD_SHARE=0\.1 allows 3; .*bad_images\.jsonl"
    with pytest.raises(TooManyBadImagesError, match=message):
        found.add([[bad(4)]], tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "bad_images.jsonl").read_text().splitlines()]
    assert [row["path"] for row in rows] == ["1.jpg", "2.jpg", "3.jpg", "4.jpg"]
    assert rows[0]["replaced_by"] == "2.jpg"
    assert rows[0]["reason"] == "cannot be decoded (empty)"


def test_every_process_stops_at_the_same_count_also_without_a_list():
    with pytest.raises(TooManyBadImagesError, match=r"DATA\.MAX_BAD_SHARE=0 allows 0; restore"):
        BadImages(30, 0).add([[], [bad(4)]])


def test_continued_run_lists_a_file_once(tmp_path):
    BadImages(30, 1).add([[bad(1)]], tmp_path)
    with (tmp_path / "bad_images.jsonl").open("a") as file:
        file.write('{"path": "cut o')  # by a crash
    again = BadImages(30, 1)
    assert again.add([[bad(1), bad(2)]], tmp_path) == [bad(1), bad(2)]
    lines = (tmp_path / "bad_images.jsonl").read_text().splitlines()
    assert [json.loads(line)["path"] for line in (lines[0], lines[2])] == ["1.jpg", "2.jpg"]
    assert len(lines) == 3


def test_watch_collects_each_file_once(damaged):
    found = BadImages(40, 1)
    batches = [batch for epoch in range(2) for batch in found.watch(loader(damaged).epoch(epoch))]
    assert len(batches) == 20
    assert sorted(one.index for one in found.take_new()) == sorted(REPLACED)
    assert found.take_new() == []


@pytest.fixture
def bad_run(small_cfg, pictures, tmp_path):
    """Copy the run's pictures, damage two, and return a function that trains on them."""
    root = tmp_path / "pictures"
    shutil.copytree(pictures, root)
    for name in ("train/blue/003.jpg", "train/red/015.jpg"):
        (root / name).write_bytes(UNREADABLE["html"])

    def run(*opts):
        argv = ["--cfg", str(small_cfg), "--data-path", str(root), "--output", str(tmp_path / "out"), "--opts"]
        return train_script.main([*argv, "TRAIN.EPOCHS", "1", *opts])

    return root, tmp_path / "out" / "small", run


def listed(run):
    return [json.loads(line) for line in (run / "bad_images.jsonl").read_text().splitlines()]


def test_training_lists_replaced_images(bad_run, capsys):
    root, out, run = bad_run
    assert run("DATA.MAX_BAD_SHARE", "0.04") == 0  # 2 of 48
    rows = sorted(listed(out), key=lambda row: row["index"])
    assert [(row["index"], row["replaced_by_index"]) for row in rows] == [(3, 4), (47, 0)]
    assert rows[0]["path"] == f"{root}/train/blue/003.jpg"
    assert rows[0]["replaced_by"] == f"{root}/train/blue/004.jpg"
    assert "a web page, not an image" in rows[0]["reason"]
    assert f"{root}/train/blue/003.jpg cannot be decoded" in (out / "log.txt").read_text()


def test_training_stops_above_the_share_and_names_the_list(bad_run, capsys):
    _, out, run = bad_run
    with pytest.raises(SystemExit) as caught:
        run()
    assert caught.value.code == 1
    message = capsys.readouterr().err
    assert (
        f"2 of 48 training images cannot be read, DATA.MAX_BAD_SHARE=0.001 allows 1; {out}/bad_images.jsonl lists them"
        in message
    )
    assert len(listed(out)) == 2


@pytest.mark.slow
def test_processes_list_each_file_once_and_stop_together(bad_run, small_cfg, run_script, tmp_path):
    root, out, _ = bad_run
    argv = ["train.py", "--cfg", str(small_cfg), "--data-path", str(root), "--output", str(tmp_path / "out"), "--opts"]
    run_script(*argv, "TRAIN.EPOCHS", "1", "DATA.MAX_BAD_SHARE", "1", processes=2)
    assert sorted(row["index"] for row in listed(out)) == [3, 47]
    done = run_script(*argv, "TAG", "strict", "DATA.MAX_BAD_SHARE", "0", processes=2, check=False)
    assert done.returncode != 0
    assert done.stderr.count("DATA.MAX_BAD_SHARE=0 allows 0") >= 1
    assert len(listed(tmp_path / "out" / "small-strict")) >= 1
