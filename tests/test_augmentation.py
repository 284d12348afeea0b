"""Augmentation that tells the truth: what moves together, whose sides are swapped, and what chance depends on."""

import pytest
import tiny
import torch
from torch.utils.data import DataLoader

from hsenet.augmentation import AugmentationArguments, VolumeAugmentation, shift, swap_sides
from hsenet.data import VolumeRows


class Volumes(dict):
    """In place of the cache: a volume and slices of the same field of view, each with one bright spot."""

    def __getitem__(self, name: str) -> dict[str, torch.Tensor]:
        volume, slices = torch.zeros(1, *tiny.IMAGE_SIZE), torch.zeros(tiny.NUM_SLICES, 3, *tiny.SLICE_SIZE)
        volume[0, 4, 20, 12] = 1
        slices[2, :, 10, 6] = 1
        return {"pixel_values": volume, "slice_pixel_values": slices}


def example_of(seed: int = 0, epoch: int = 0, index: int = 0, **arguments) -> dict:
    rows = [{"volume_name": str(number), "text": "A left nodule.", "findings": "Left."} for number in range(index + 1)]
    augmentation = VolumeAugmentation(
        AugmentationArguments(**arguments), tiny.image_processor(), ("findings",), seed=seed
    )
    dataset = VolumeRows(rows, Volumes(), augmentation)
    dataset.set_epoch(epoch)
    return dataset[index]


def bright(values: torch.Tensor) -> tuple[int, ...]:
    (place,) = values.nonzero().tolist()
    return tuple(place)


def test_slices_move_with_the_volume():
    moved = set()
    for index in range(20):
        example = example_of(index=index, max_shift=[2, 4, 4])
        _, depth, height, width = bright(example["pixel_values"])
        number, row, column = bright(example["slice_pixel_values"][:, 0])
        # Two voxels of depth to a slice, two voxels to a pixel; to the nearest.
        for voxels, pixels in ((depth - 4, number - 2), (height - 20, row - 10), (width - 12, column - 6)):
            assert abs(voxels / 2 - pixels) <= 0.5
        moved.add((depth, height, width))
    assert len(moved) > 15
    assert {depth - 4 for depth, _, _ in moved} == {-2, -1, 0, 1, 2}


def test_a_shift_repeats_the_border():
    values = torch.arange(4.0).reshape(1, 1, 1, 4)
    assert shift(values, (0, 0, 1)).flatten().tolist() == [0, 0, 1, 2]
    assert shift(values, (0, 0, -2)).flatten().tolist() == [2, 3, 3, 3]


def test_a_mirrored_volume_has_its_report_and_its_slices_mirrored():
    mirrored = example_of(mirror=1.0)
    width = tiny.IMAGE_SIZE[2]
    assert bright(mirrored["pixel_values"]) == (0, 4, 20, width - 1 - 12)
    assert bright(mirrored["slice_pixel_values"][:, 0]) == (2, 10, tiny.SLICE_SIZE[1] - 1 - 6)
    assert (mirrored["text"], mirrored["findings"]) == ("A right nodule.", "Right.")
    some = [example_of(index=index, mirror=0.5) for index in range(40)]
    flipped = [bright(example["pixel_values"])[3] != 12 for example in some]
    assert 10 < sum(flipped) < 30
    assert [example["text"] == "A right nodule." for example in some] == flipped


def test_turns_are_mirrored_too():
    augmentation = VolumeAugmentation(AugmentationArguments(mirror=1.0), tiny.image_processor())
    example = {**Volumes()["a"], "index": 0, "turns": [("Where is the nodule?", "In the left lower lobe.")]}
    assert augmentation(example, 0)["turns"] == [("Where is the nodule?", "In the right lower lobe.")]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Left-sided effusion, RIGHT hilum.", "Right-sided effusion, LEFT hilum."),
        ("Mediastinum moves leftward, then to the right.", "Mediastinum moves rightward, then to the left."),
        ("Bilateral bright upright leftover copyright.", "Bilateral bright upright leftover copyright."),
        ("The left and the right lung", "The right and the left lung"),
        ("", ""),
    ],
)
def test_sides_are_swapped_as_whole_words(text, expected):
    assert swap_sides(text) == expected
    assert swap_sides(swap_sides(text)) == text


def test_nothing_is_mirrored_or_turned_by_default():
    for index in range(10):
        example, original = example_of(index=index), Volumes()["a"]
        assert all(torch.equal(example[name], original[name]) for name in original)
        assert example["text"] == "A left nodule."


def test_legacy_turns_flips_and_brightens_the_volume_alone():
    some = [example_of(index=index, legacy_augmentation=True) for index in range(60)]
    original = Volumes()["a"]
    assert all(torch.equal(example["slice_pixel_values"], original["slice_pixel_values"]) for example in some)
    assert all(example["text"] == "A left nodule." for example in some)
    brightest = [int((example["pixel_values"] - example["pixel_values"].median()).argmax()) for example in some]
    same = sum(place == int(original["pixel_values"].argmax()) for place in brightest)
    assert 10 < same < 36  # 0.5 without a turn * 0.9^3 without a flip, of 60: 22
    contrast = [float(example["pixel_values"].max() - example["pixel_values"].median()) for example in some]
    assert 0.9 <= min(contrast) < 0.95 and 1.05 < max(contrast) <= 1.1
    assert sum(value == 1 for value in contrast) > 15  # half of them are not scaled
    assert max(float(example["pixel_values"].median()) for example in some) <= 0.1


@pytest.mark.parametrize("arguments", [{"max_shift": [1, 3, 3], "mirror": 0.5}, {"legacy_augmentation": True}])
def test_chance_follows_from_seed_epoch_and_index_for_any_number_of_workers(arguments):
    rows = [{"volume_name": str(number), "text": "left"} for number in range(6)]
    augmentation = VolumeAugmentation(AugmentationArguments(**arguments), tiny.image_processor(), seed=5)
    epochs = []
    for workers in (0, 2):
        dataset = VolumeRows(rows, Volumes(), augmentation)
        for epoch in (0, 1):
            dataset.set_epoch(epoch)
            torch.manual_seed(workers)  # must not matter
            loader = DataLoader(dataset, 2, num_workers=workers)
            epochs.append(torch.cat([batch["pixel_values"] for batch in loader]))
    assert torch.equal(epochs[0], epochs[2]) and torch.equal(epochs[1], epochs[3])
    assert not torch.equal(epochs[0], epochs[1])
    backwards = VolumeRows(rows, Volumes(), augmentation)
    assert torch.equal(torch.stack([backwards[i]["pixel_values"] for i in (5, 4)]), epochs[0][[5, 4]])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_shift": [1, 2]}, "three numbers of voxels"),
        ({"mirror": 1.5}, "a chance from 0 to 1, got 1.5"),
        ({"legacy_augmentation": True, "mirror": 0.5}, "stands alone"),
        ({"mirror": 0.5, "slice_features": "cached"}, "does not fit cached slice features"),
    ],
)
def test_augmentation_that_contradicts_itself_is_an_error(arguments, message):
    with pytest.raises(ValueError, match=message):
        AugmentationArguments(**arguments)


def test_slices_that_show_something_else_are_not_moved():
    processor = tiny.image_processor(slice_rotation=90)
    with pytest.raises(ValueError, match="expected slice_fit field_of_view.*got field_of_view, 90, depth"):
        VolumeAugmentation(AugmentationArguments(max_shift=[0, 1, 1]), processor)
    VolumeAugmentation(AugmentationArguments(max_shift=[0, 1, 1], slice_features="cached"), processor)
    with pytest.raises(ValueError, match="expected a square, got 32 by 40"):
        wide = tiny.image_processor(image_size=(8, 32, 40))
        VolumeAugmentation(AugmentationArguments(legacy_augmentation=True), wide)
