"""Augmentation that tells the truth: volume, slices and report change together, by seed, epoch and row alone.

A volume that is moved takes its slices along; one that is mirrored takes its report's sides along too. The legacy
augmentation is what the code behind the released weights did instead.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from processing_hsenet import HSENetImageProcessor


@dataclass
class AugmentationArguments:
    max_shift: list[int] = field(
        default_factory=lambda: [0, 0, 0], metadata={"help": "Random shift of the volume in voxels (D, H, W)."}
    )
    mirror: float = field(
        default=0.0,
        metadata={"help": "Chance that a volume is mirrored, and left and right swapped in its text."},
    )
    legacy_augmentation: bool = field(
        default=False, metadata={"help": "Turns and flips of the volume alone, as behind the released weights."}
    )
    rewrite_reports: bool = field(
        default=False, metadata={"help": "Stages 1 and 2: random sentence order, sentences or sections left out."}
    )
    drop_sentences: float = field(default=0.1, metadata={"help": "With rewrite_reports: chance of each sentence."})
    whole_sentences: bool = field(
        default=False, metadata={"help": "Stages 1 and 2: a text that is too long ends after its last whole sentence."}
    )
    slice_features: Literal["auto", "cached", "computed"] = field(
        default="auto",
        metadata={
            "help": "Cached, or computed in every step from slices that move with the volume. auto: computed if they "
            "do. cached beside max_shift is an approximation: the slices stay where they were."
        },
    )

    def __post_init__(self):
        if len(self.max_shift) != 3 or min(self.max_shift) < 0:
            raise ValueError(f"max_shift should be three numbers of voxels (D, H, W), got {self.max_shift}.")
        if not 0 <= self.mirror <= 1:
            raise ValueError(f"mirror should be a chance from 0 to 1, got {self.mirror}.")
        if self.legacy_augmentation and (self.mirror or any(self.max_shift)):
            raise ValueError("legacy_augmentation stands alone: leave out max_shift and mirror.")
        if self.mirror and self.slice_features == "cached":
            raise ValueError("A mirrored volume does not fit cached slice features: leave out slice_features.")

    @property
    def changes_volumes(self) -> bool:
        return bool(self.mirror or any(self.max_shift) or self.legacy_augmentation)

    @property
    def computes_slice_features(self) -> bool:
        """Whether the slices themselves are needed in every step. The legacy augmentation left them as they were."""
        moves_slices = self.changes_volumes and not self.legacy_augmentation
        return self.slice_features == "computed" or (self.slice_features == "auto" and moves_slices)


class VolumeAugmentation:
    """
    Changes one example: its tensors, and the sides in its texts.

    The mirror image of a patient is no patient: liver, heart and aortic arch lie on the wrong side, and a text that
    names a chamber of the heart or the right lung's middle lobe becomes wrong. So `mirror` is 0 by default.

    Args:
        arguments ([`AugmentationArguments`]).
        image_processor ([`HSENetImageProcessor`]): how volumes and slices were made.
        fields: names of the example's texts whose sides are swapped, beside `text` and `turns`.
        seed (`int`).

    Raises:
        ValueError: slices that were turned or cut otherwise than the volume can't be moved with it; a turned volume
            would have another shape.
    """

    def __init__(
        self,
        arguments: AugmentationArguments,
        image_processor: HSENetImageProcessor,
        fields: Sequence[str] = (),
        seed: int = 0,
    ):
        self.max_shift, self.mirror = tuple(arguments.max_shift), arguments.mirror
        self.legacy, self.changes_volumes = arguments.legacy_augmentation, arguments.changes_volumes
        self.fields = ("text", *fields)
        self.seed = seed
        self.intensity = (image_processor.volume_mean, image_processor.volume_std)
        _, height, width = image_processor.image_size
        if self.legacy and height != width:
            raise ValueError(f"legacy_augmentation turns volumes by 90°: expected a square, got {height} by {width}.")
        cut = (image_processor.slice_fit, image_processor.slice_rotation, image_processor.slice_axis)
        if arguments.computes_slice_features and cut != ("field_of_view", 0, "depth") and image_processor.num_slices:
            raise ValueError(
                "Slices move with the volume only if both show the same: expected slice_fit field_of_view, "
                f"slice_rotation 0 and slice_axis depth, got {', '.join(map(str, cut))}: leave out the augmentation."
            )

    def __call__(self, example: dict[str, Any], epoch: int) -> dict[str, Any]:
        """`example` has `index`, its number in the dataset, and `pixel_values` `(1, depth, height, width)`."""
        if not self.changes_volumes:
            return example
        generator = torch.Generator().manual_seed(hash((self.seed, epoch, example["index"])))
        if self.legacy:
            return {**example, "pixel_values": self._turned(example["pixel_values"], generator)}
        offsets = [int(torch.randint(2 * limit + 1, (), generator=generator)) - limit for limit in self.max_shift]
        sizes = example["pixel_values"].shape[1:]
        example = {**example, "pixel_values": shift(example["pixel_values"], offsets)}
        if "slice_pixel_values" in example:
            slices = example["slice_pixel_values"].transpose(0, 1)  # (channels, num_slices, height, width)
            # To the nearest slice and pixel: half a pixel is less than a voxel.
            scaled = [
                round(offset * pixels / voxels)
                for offset, pixels, voxels in zip(offsets, slices.shape[1:], sizes, strict=True)
            ]
            example["slice_pixel_values"] = shift(slices, scaled).transpose(0, 1)
        if torch.rand((), generator=generator) < self.mirror:
            example = self._mirrored(example)
        return example

    def _mirrored(self, example: dict[str, Any]) -> dict[str, Any]:
        """The last axis of volume and slices runs from the patient's right to the left."""
        names = [name for name in ("pixel_values", "slice_pixel_values") if name in example]
        tensors = {name: example[name].flip(-1) for name in names}
        texts = {name: swap_sides(example[name]) for name in self.fields if example.get(name)}
        if "turns" in example:
            texts["turns"] = [tuple(map(swap_sides, turn)) for turn in example["turns"]]
        return {**example, **tensors, **texts}

    def _turned(self, pixel_values: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """What MONAI's transforms did: RandRotate90, RandFlip of each axis, RandScaleIntensity, RandShiftIntensity."""

        def happens(chance: float) -> bool:
            return bool(torch.rand((), generator=generator) < chance)

        def between(limit: float) -> float:
            return (2 * float(torch.rand((), generator=generator)) - 1) * limit

        if happens(0.5):
            turns = 1 + int(torch.randint(3, (), generator=generator))
            pixel_values = torch.rot90(pixel_values, turns, dims=(2, 3))
        for axis in (1, 2, 3):
            if happens(0.1):
                pixel_values = pixel_values.flip(axis)
        mean, std = self.intensity
        intensity = pixel_values * std + mean  # 0 to 1, as they were there
        if happens(0.5):
            intensity = intensity * (1 + between(0.1))
        if happens(0.5):
            intensity = intensity + between(0.1)
        return (intensity - mean) / std


def shift(values: torch.Tensor, offsets: Sequence[int]) -> torch.Tensor:
    """`(channels, depth, height, width)` moved by so many voxels along the last three axes, its border repeated."""
    for axis, offset in enumerate(offsets, start=1):
        if offset:
            size = values.shape[axis]
            values = values.index_select(axis, (torch.arange(size) - offset).clamp(0, size - 1))
    return values


_SIDES = re.compile(r"\b(left|right)(?=\b|wards?\b)", re.IGNORECASE)


def swap_sides(text: str) -> str:
    """
    Left for right and right for left, as whole words in any case, also in "left-sided" and "rightward".

    "Bilateral" stays. Not understood: abbreviations ("RUL"), left as what somebody did ("was left in place"), and
    sides that are names (the right ventricle of a mirrored heart).
    """
    return _SIDES.sub(lambda match: _like(match[0], "right" if match[0].lower() == "left" else "left"), text)


def _like(model: str, word: str) -> str:
    if model.isupper():
        return word.upper()
    return word.capitalize() if model[0].isupper() else word
