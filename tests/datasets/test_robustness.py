"""Images and splits: the shipped cut is the frozen one, splits never mix, augmentation equals a plain loop."""

import pytest
import torch
from moezoo.datasets.robustness import RobustnessData, channel_statistics, split_by_class
from moezoo.datasets.robustness_augment import crop_and_flip
from moezoo.errors import UserError
from moezoo.zoo.advmoe import AdvMoE
from torch.utils.data import DataLoader


@pytest.fixture(scope="module")
def fashion():
    data = RobustnessData()
    data.setup("fit")
    return data


def batches(loader: DataLoader):
    return [torch.cat(parts) for parts in zip(*loader, strict=True)]


def test_the_shipped_cut_is_the_frozen_one(fashion):
    assert {name: len(part) for name, part in fashion.splits.items()} == {"train": 7200, "valid": 800, "test": 2000}
    for name, each in {"train": 720, "valid": 80, "test": 200}.items():
        assert fashion.splits[name].label.bincount().tolist() == [each] * 10
    schema = fashion.schema
    assert (schema["dataset"], schema["channels"], schema["image_size"]) == ("fashion_mnist_cut", 1, 28)
    assert schema["num_classes"] == len(schema["class_names"]) == 10
    # The whole train split of 60,000 images has mean 0.2860 and std 0.3530.
    assert schema["mean"] == [pytest.approx(0.2860, abs=2e-3)] and schema["std"] == [pytest.approx(0.3530, abs=2e-3)]


def test_batches_are_pixels_of_their_index_in_the_unit_range(fashion):
    image, label, index = batches(fashion.test_dataloader())
    assert index.tolist() == list(range(2000))
    assert image.dtype == torch.float32 and image.min() == 0 and image.max() == 1
    torch.testing.assert_close(image * 255, fashion.opened.test.image.float())
    assert torch.equal(label, fashion.opened.test.label)
    shuffled = next(iter(fashion.train_dataloader()))
    kept = fashion.splits["train"]
    torch.testing.assert_close(shuffled.image * 255, kept.image[shuffled.index].float())
    assert torch.equal(shuffled.label, kept.label[shuffled.index])
    assert not torch.equal(shuffled.index, shuffled.index.sort().values)


def test_a_model_of_the_zoo_takes_schema_and_batch(fashion):
    model = AdvMoE(fashion.schema, "small_resnet", router_width=4, router_blocks=1, router_pool=2)
    batch = next(iter(fashion.val_dataloader()))
    assert model(batch.image[:8]).logits.shape == (8, 10)


def test_validation_is_a_fixed_draw_of_every_class():
    label = torch.randint(0, 5, (1003,), generator=torch.Generator().manual_seed(1))
    torch.manual_seed(1)
    kept, aside = split_by_class(label, 5, 0.2)
    torch.manual_seed(2)
    again = split_by_class(label, 5, 0.2)
    assert torch.equal(kept, again[0]) and torch.equal(aside, again[1])
    assert torch.equal(torch.cat([kept, aside]).sort().values, torch.arange(1003))
    assert label[aside].bincount().tolist() == [round(0.2 * n) for n in label.bincount().tolist()]


def test_limits_keep_schema_and_order(fashion):
    small = RobustnessData(train_limit=500, test_limit=100)
    small.opened = fashion.opened  # read once
    assert small.schema == fashion.schema
    assert {name: len(part) for name, part in small.splits.items()} == {"train": 500, "valid": 800, "test": 100}
    assert small.splits["train"].label.bincount().min() > 20  # of all classes
    assert torch.equal(small.splits["test"].image, fashion.opened.test.image[:100])


def test_statistics_are_those_of_the_pixels():
    image = torch.randint(0, 256, (40, 3, 6, 6), dtype=torch.uint8)
    mean, std = channel_statistics(image)
    pixels = image.double() / 255
    assert mean == pytest.approx(pixels.mean((0, 2, 3)).tolist(), abs=1e-6)
    assert std == pytest.approx(pixels.std((0, 2, 3), correction=0).tolist(), abs=1e-6)


def test_crops_and_flips_equal_a_plain_loop():
    image = torch.rand(64, 3, 9, 7)
    out = crop_and_flip(image, torch.arange(64), epoch=3, seed=5, padding=2)
    seen = set()
    for i in range(64):
        padded = torch.zeros(3, 13, 11)
        padded[:, 2:-2, 2:-2] = image[i]
        crops = {
            (top, left, flip): (padded.flip(2) if flip else padded)[:, top : top + 9, left : left + 7]
            for top in range(5)
            for left in range(5)
            for flip in (False, True)
        }
        matching = [place for place, crop in crops.items() if torch.equal(crop, out[i])]
        assert len(matching) == 1
        seen.add(matching[0])
    assert len(seen) > 30 and {flip for *_, flip in seen} == {False, True}


def test_what_becomes_of_an_image_depends_on_index_epoch_and_seed_alone():
    image, index = torch.rand(1000, 1, 8, 8), torch.arange(1000)
    out = crop_and_flip(image, index, epoch=0, seed=0)
    order = torch.randperm(1000)
    torch.testing.assert_close(crop_and_flip(image[order], index[order], epoch=0, seed=0), out[order], rtol=0, atol=0)
    for other in (crop_and_flip(image, index, epoch=1, seed=0), crop_and_flip(image, index, epoch=0, seed=1)):
        same = (other == out).flatten(1).all(1).float().mean()
        assert same < 0.05  # of 162 outcomes
    still = crop_and_flip(image, index, epoch=0, seed=0, padding=0, flip=False)
    assert torch.equal(still, image)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"validation_fraction": 0.0}, "data.validation_fraction=0.0: expected a share between 0 and 1"),
        ({"batch_size": 0}, "data.batch_size=0: expected at least 1"),
        ({"padding": -1}, "data.padding=-1: expected 0 pixels or more"),
        ({"source": "cifar"}, "data.files.path: source 'cifar' needs it"),
        ({"files": {"path": "x"}}, "data.files.path: source 'fashion_mnist_cut' has no such argument; it takes none"),
        ({"source": "atlas", "files": {"path": "x", "colour": "rgb"}}, "data.files.colour: .* it takes path"),
        ({"source": "auto", "files": {"path": "/no/such"}}, "data.files.path=/no/such: no such file or folder"),
    ],
)
def test_mistakes_are_one_line(arguments, said):
    with pytest.raises(UserError, match=said) as error:
        RobustnessData(**arguments).schema  # noqa: B018
    assert "\n" not in str(error.value)


def test_a_limit_beyond_the_data_is_told(fashion):
    data = RobustnessData(train_limit=7201)
    data.opened = fashion.opened
    with pytest.raises(UserError, match=r"data.train_limit=7201: there are 7200 train images"):
        data.splits  # noqa: B018
