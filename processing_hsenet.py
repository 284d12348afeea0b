# Copyright 2026 The HSENet package authors. Licensed under the Apache License, Version 2.0.
"""From CT scans and text to the tensors that HSENet reads.

`HSENetImageProcessor` turns a scan (NIfTI file, DICOM folder, array in HU with its geometry) into `pixel_values`
(the volume for the 3D encoders) and `slice_pixel_values` (axial slices for the 2D encoder), both cut from the same
field of view in the same orientation: depth inferior to superior, height anterior to posterior, width patient right
to left. `HSENetImageProcessor.released` has the settings of the released weights, which saw something else.
`HSENetProcessor` adds the tokenizer, and expands each image placeholder to the volume's tokens.
"""

from collections.abc import Callable
from io import BytesIO
from typing import Any, Literal

import numpy as np
import torch
from transformers import BaseImageProcessor, BatchFeature, ProcessorMixin
from transformers.processing_utils import MultiModalData


try:
    from .reading_hsenet import GeometryError, UnsupportedImageError, Volume, read_volume
    from .resampling_hsenet import (
        apply_window,
        body_box,
        min_max,
        nonzero_box,
        plane_weights,
        resample,
        resample_windowed,
        resampling_weights,
        slab_weights,
        stated,
        trilinear,
    )
except ImportError:  # imported as a plain top-level module, not from the Hub cache
    if __package__:
        raise
    from reading_hsenet import GeometryError, UnsupportedImageError, Volume, read_volume
    from resampling_hsenet import (
        apply_window,
        body_box,
        min_max,
        nonzero_box,
        plane_weights,
        resample,
        resample_windowed,
        resampling_weights,
        slab_weights,
        stated,
        trilinear,
    )


# The axis of a canonical volume (D, H, W) along which a direction of the patient lies, either way.
CANONICAL_AXIS = {"S": 0, "I": 0, "P": 1, "A": 1, "L": 2, "R": 2}


class HSENetImageProcessor(BaseImageProcessor):
    r"""
    Args:
        image_size (`tuple[int, int, int]`): depth, height, width of `pixel_values`; the model's `image_size`.
        orientation (`"canonical"` or `"stored"`):
            Whether scans are turned, by their affine, to the orientation above. `"stored"` (released weights): depth,
            height, width are the third, first and second axis as they lie in the file, whichever way they run, and
            the first axis' spacing counts for the second too. It takes only scans whose third axis is axial.
        resample_spacing (`tuple[float, float, float]`, *optional*):
            Millimetres along depth, height, width of a grid to which scans are first brought by trilinear
            interpolation. `None`: the scan's own grid.
        hu_window (`tuple[float, float]`): HU that become 0 and 1 in `pixel_values`; values outside are clipped.
        volume_normalization (`"window"` or `"min_max"`):
            What becomes 0 and 1: the window's ends, or (released weights) the scan's own extremes within the window.
        volume_mean, volume_std (`float`): subtracted from and divided into the normalised volume; the paper's 0 and 1.
        volume_fit (`"field_of_view"` or `"nonzero_box"`):
            How the volume comes to `image_size`: resampled, antialiased, from the field of view that `spacing` and
            `crop_to_body` choose, or (released weights) cut to the bounding box of what is above 0 after
            normalisation, then trilinear interpolation without antialiasing.
        spacing (`tuple[float, float, float]`, *optional*):
            Millimetres between voxels of `pixel_values` along depth, height, width. The field of view is then
            `image_size * spacing`, centred on the body and padded with the window's lower end. `None` (the paper's
            way): the whole body is stretched to `image_size`, whatever its size.
        crop_to_body (`bool`): whether the field of view starts from the body's bounding box or from the whole scan.
        num_slices (`int`): axial slices for the 2D encoder; 0 for models without slice guidance.
        slice_size (`tuple[int, int]`): height and width of a slice.
        slice_axis (`"depth"` or `"depth_if_shorter"`):
            Along which axis slices follow each other. `"depth_if_shorter"` (released weights, CT-RATE): along the
            height where the depth has at least as many planes, with the millimetres of depth, height, width in order
            counted for height, width, depth.
        slice_hu_window (`tuple[float, float]`, *optional*): HU that become black and white; `None`: none are clipped.
        slice_normalization (`"window"`, `"slice_min_max"` or `"volume_min_max"`):
            What becomes black and white: the window's ends, or the extremes of each slice or of the whole scan
            (released weights: CT-RATE, BIMCV-R).
        slice_selection (`"uniform"` or `"slab_mean"`):
            Single planes at equal distances from bottom to top, or the mean of each of `num_slices` equal slabs.
        slice_fit (`"field_of_view"` or `"whole_plane"`):
            How slices come to `slice_size`: stretched from the volume's field of view, or (released weights) whole
            planes, the shorter side resized bicubically and the centre cut out, as BiomedCLIP's own pictures. Planes
            between two are then rounded down, not to the nearest.
        slice_rotation (-90, 0, 90 or 180):
            Degrees counterclockwise by which the slices, but not the volume, are turned.
        slice_jpeg_quality (`int`, *optional*):
            1 to 100: slices become 8-bit pictures (rounded down) and go through JPEG. `None`: they don't.
        image_mean, image_std (`tuple[float, ...]`): normalisation of the slices' channels; BiomedCLIP's by default.
    """

    model_input_names = ["pixel_values", "slice_pixel_values"]
    _auto_class = "AutoImageProcessor"

    def __init__(
        self,
        image_size: tuple[int, int, int] = (32, 256, 256),
        orientation: Literal["canonical", "stored"] = "canonical",
        resample_spacing: tuple[float, float, float] | None = None,
        hu_window: tuple[float, float] = (-1000, 200),
        volume_normalization: Literal["window", "min_max"] = "window",
        volume_mean: float = 0.0,
        volume_std: float = 1.0,
        volume_fit: Literal["field_of_view", "nonzero_box"] = "field_of_view",
        spacing: tuple[float, float, float] | None = None,
        crop_to_body: bool = True,
        num_slices: int = 32,
        slice_size: tuple[int, int] = (224, 224),
        slice_axis: Literal["depth", "depth_if_shorter"] = "depth",
        slice_hu_window: tuple[float, float] | None = (-1000, 1000),
        slice_normalization: Literal["window", "slice_min_max", "volume_min_max"] = "window",
        slice_selection: Literal["uniform", "slab_mean"] = "uniform",
        slice_fit: Literal["field_of_view", "whole_plane"] = "field_of_view",
        slice_rotation: Literal[-90, 0, 90, 180] = 0,
        slice_jpeg_quality: int | None = None,
        image_mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073),
        image_std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711),
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.image_size = _numbers("image_size", image_size, 3)
        self.orientation = orientation
        self.resample_spacing = _optional(_numbers, "resample_spacing", resample_spacing, 3)
        self.hu_window = _window("hu_window", hu_window)
        self.volume_normalization = volume_normalization
        self.volume_mean = volume_mean
        self.volume_std = volume_std
        self.volume_fit = volume_fit
        self.spacing = _optional(_numbers, "spacing", spacing, 3)
        self.crop_to_body = crop_to_body
        self.num_slices = num_slices
        self.slice_size = _numbers("slice_size", slice_size, 2)
        self.slice_axis = slice_axis
        self.slice_hu_window = _optional(_window, "slice_hu_window", slice_hu_window)
        self.slice_normalization = slice_normalization
        self.slice_selection = slice_selection
        self.slice_fit = slice_fit
        self.slice_rotation = slice_rotation
        self.slice_jpeg_quality = slice_jpeg_quality
        self.image_mean = tuple(image_mean)
        self.image_std = _numbers("image_std", image_std, len(self.image_mean))
        _check_settings(self)

    @classmethod
    def released(cls, dataset: Literal["ct_rate", "bimcv_r"] = "ct_rate", **changes) -> "HSENetImageProcessor":
        """
        The preset named "released": what the public HSENet weights were trained on, volume and slices each its way.

        The two differ in window, sampling and orientation, and the two datasets in the slices' rotation. New
        training should keep to the defaults, where volume and slices show the same. Scans must be in HU: CT-RATE's
        own files need the rescale slope and intercept of its metadata first.

        Args:
            dataset (`"ct_rate"` or `"bimcv_r"`): whose preparation; BIMCV-R's is that of files up to 200 MB.
            changes: other settings, such as the sizes of a smaller model.
        """
        _check_choice("dataset", dataset, tuple(RELEASED_SETTINGS))
        return cls(**{**RELEASED_SETTINGS[dataset], **changes})

    def to_dict(self) -> dict[str, Any]:
        # The platform leaves out settings that are `None`; loading would put this one's default in their place.
        return {**super().to_dict(), "slice_hu_window": self.slice_hu_window}

    def __call__(self, images: Any, **kwargs) -> BatchFeature:
        return self.preprocess(images, **kwargs)

    def preprocess(
        self,
        images: Any,
        affine: Any = None,
        spacing: Any = None,
        reading: dict[str, Any] | None = None,
        return_tensors: str | None = None,
        **kwargs,
    ) -> BatchFeature:
        """
        Args:
            images:
                One scan or a (nested) list: path of a NIfTI file or DICOM folder, nibabel image, [`Volume`], or array
                or tensor in HU (then with `affine` or `spacing`).
            affine (4x4 array or list of them, *optional*):
                Voxel index to RAS+ millimetres, for arrays in the order of the affine's columns.
            spacing (three numbers or list of them, *optional*):
                Millimetres along depth, height, width, for arrays that already have the canonical orientation.
            reading (`dict`, *optional*): Options of the reader for all scans, such as `{"series": "largest"}`.
            return_tensors (`str`, *optional*): `"pt"` or `"np"`.

        Returns:
            [`BatchFeature`]: `pixel_values` `(num_volumes, 1, depth, height, width)`, in [0, 1] by default,
            and, if `num_slices`, `slice_pixel_values` `(num_volumes, num_slices, channels, height, width)`.
        """
        scans = _flatten(images)
        affines = _per_scan("affine", affine, len(scans), rank=2)
        spacings = _per_scan("spacing", spacing, len(scans), rank=1)
        volumes = [
            self.process_volume(read_volume(scan, affine=scan_affine, spacing=scan_spacing, **(reading or {})))
            for scan, scan_affine, scan_spacing in zip(scans, affines, spacings, strict=True)
        ]
        data = {name: torch.stack([volume[name] for volume in volumes]) for name in volumes[0]}
        return BatchFeature(data, tensor_type=return_tensors)

    def process_volume(self, volume: Volume) -> dict[str, torch.Tensor]:
        """One scan's `pixel_values` `(1, D, H, W)` and, if `num_slices`, `slice_pixel_values` `(S, C, h, w)`."""
        scan, spacing = self._oriented(volume)
        normalized = scan if self._windows_by_slabs else self._normalized(scan, spacing)
        field_of_view = self._field_of_view(scan, spacing, normalized)
        pixel_values = self._fit_volume(normalized, field_of_view).unsqueeze(0)
        tensors = {"pixel_values": pixel_values.sub_(self.volume_mean).div_(self.volume_std)}
        if self.num_slices:
            tensors["slice_pixel_values"] = self._slice_pixel_values(scan, spacing, field_of_view)
        return tensors

    def patches_on_scan(
        self, volume: Volume, patch_scores: torch.Tensor
    ) -> tuple[torch.Tensor, list[tuple[float, float]]]:
        """
        Where the model's patches lie in a scan, to show them over it.

        Args:
            volume: the scan that was processed.
            patch_scores (`torch.Tensor` of shape `(grid_depth, grid_height, grid_width)`): along the model's axes.

        Returns:
            The scores along D, H, W of `volume.array`, and for each of these axes start and extent, in voxels of
            `volume.array`, of what they cover; it may reach beyond the scan.
        """
        scan, spacing = self._oriented(volume)
        normalized = scan if self._windows_by_slabs else self._normalized(scan, spacing)
        seen = self._field_of_view(scan, spacing, normalized)
        scales = [old / new for old, new in zip(scan.shape, normalized.shape, strict=True)]
        box = [(start * scale, extent * scale) for (start, extent), scale in zip(seen, scales, strict=True)]
        order, reversed_axes = self._axes(volume)
        for axis in reversed_axes:
            start, extent = box[axis]
            box[axis] = (scan.shape[axis] - start - extent, extent)
        back = [order.index(axis) for axis in range(3)]
        return patch_scores.flip(reversed_axes).permute(back), [box[axis] for axis in back]

    def _oriented(self, volume: Volume) -> tuple[torch.Tensor, tuple[float, float, float]]:
        """HU (D, H, W) in the orientation of the settings, and the millimetres along these axes."""
        scan = torch.from_numpy(volume.array)
        if self.orientation == "canonical":
            return scan, volume.spacing
        order, reversed_axes = self._axes(volume)
        depth, height = volume.spacing[0], volume.spacing[order[1]]
        return scan.permute(order).flip(reversed_axes), (depth, height, height)

    def _axes(self, volume: Volume) -> tuple[list[int], list[int]]:
        """Which axis of the volume each of the settings' orientation is, and which of the latter run backwards."""
        if self.orientation == "canonical":
            return [0, 1, 2], []
        first, second, third = volume.stored_orientation or "???"
        if third not in "SI":
            raise GeometryError(
                'orientation="stored" expects a scan whose third axis is axial, got axes that run '
                f"{first}{second}{third}: read it from a NIfTI file with such axes, or pass its array (i, j, k) with "
                "affine=."
            )
        order = [CANONICAL_AXIS[direction] for direction in (third, first, second)]
        return order, [axis for axis, direction in enumerate((third, first, second)) if direction in "IAR"]

    def _resampled(self, values: torch.Tensor, spacing: tuple[float, float, float]) -> torch.Tensor:
        """On the grid of `resample_spacing`, in double precision; as they are if there is none."""
        if self.resample_spacing is None:
            return values
        sizes = [
            int(size * (stated(stored) / target))
            for size, stored, target in zip(values.shape, spacing, self.resample_spacing, strict=True)
        ]
        if min(sizes) < 1:
            raise UnsupportedImageError(
                f"The scan of {tuple(values.shape)} voxels, {spacing} mm apart, is thinner than one voxel of "
                f"resample_spacing {self.resample_spacing}: expected a whole chest."
            )
        return trilinear(values.double(), sizes)

    @property
    def _windows_by_slabs(self) -> bool:
        """Whether the window is applied while resampling, so that the scan is never whole in float32."""
        settings = (self.volume_normalization, self.volume_fit, self.resample_spacing)
        return settings == ("window", "field_of_view", None)

    @property
    def _slices_window_by_slabs(self) -> bool:
        return (self.slice_normalization, self.slice_fit, self.resample_spacing) == ("window", "field_of_view", None)

    def _normalized(self, scan: torch.Tensor, spacing: tuple[float, float, float]) -> torch.Tensor:
        """The volume in [0, 1], (D, H, W), on the grid of `resample_spacing`."""
        if self.volume_normalization == "window":
            return self._resampled(apply_window(scan, self.hu_window), spacing).float()
        return min_max(self._resampled(scan.clamp(*self.hu_window), spacing).float())

    def _field_of_view(
        self, scan: torch.Tensor, spacing: tuple[float, float, float], normalized: torch.Tensor
    ) -> list[tuple[float, float]]:
        """Start and extent, in voxels of `normalized`, of what the model sees along depth, height, width."""
        if self.volume_fit == "nonzero_box":
            return nonzero_box(normalized)
        box = body_box(scan) if self.crop_to_body else [(0.0, float(size)) for size in scan.shape]
        if self.spacing is not None:
            extents = [
                size * target / stored
                for size, target, stored in zip(self.image_size, self.spacing, spacing, strict=True)
            ]
            box = [(start + (size - extent) / 2, extent) for (start, size), extent in zip(box, extents, strict=True)]
        scales = [new / old for new, old in zip(normalized.shape, scan.shape, strict=True)]
        return [(start * scale, extent * scale) for (start, extent), scale in zip(box, scales, strict=True)]

    def _fit_volume(self, values: torch.Tensor, field_of_view: list[tuple[float, float]]) -> torch.Tensor:
        if self.volume_fit == "nonzero_box":
            box = tuple(slice(int(start), int(start + extent)) for start, extent in field_of_view)
            return trilinear(values[box], self.image_size)
        weights = [
            resampling_weights(length, start, extent, samples)
            for length, (start, extent), samples in zip(values.shape, field_of_view, self.image_size, strict=True)
        ]
        if self._windows_by_slabs:
            return resample_windowed(values, self.hu_window, weights)
        return resample(values, weights)

    def _slice_pixel_values(
        self, scan: torch.Tensor, spacing: tuple[float, float, float], field_of_view: list[tuple[float, float]]
    ) -> torch.Tensor:
        if self.slice_axis == "depth_if_shorter" and scan.shape[0] >= scan.shape[1]:
            scan = scan.movedim(0, 2)  # the spacings stay in their places, as the released preparation left them
        planes = self._planes(scan, spacing)
        whole = self.slice_fit == "whole_plane"
        slices = self._whole_slices(planes) if whole else self._stretched_slices(planes, field_of_view)
        if self.slice_normalization == "slice_min_max":
            slices = torch.stack([min_max(plane) for plane in slices])
        if self.slice_rotation:
            slices = torch.rot90(slices, self.slice_rotation // 90, dims=(1, 2))
        if whole or self.slice_jpeg_quality is not None:
            slices = torch.stack([self._picture(plane) for plane in slices])
        mean, std = torch.tensor(self.image_mean).view(-1, 1, 1), torch.tensor(self.image_std).view(-1, 1, 1)
        return (slices.float().unsqueeze(1) - mean).div_(std)  # (num_slices, channels, height, width)

    def _planes(self, scan: torch.Tensor, spacing: tuple[float, float, float]) -> torch.Tensor:
        """All planes, on the grid of `resample_spacing`; in [0, 1] unless that is done later."""
        if self._slices_window_by_slabs:
            return scan
        if self.slice_normalization == "window":
            return self._resampled(apply_window(scan, self.slice_hu_window), spacing)
        if self.slice_hu_window is not None:
            scan = scan.clamp(*self.slice_hu_window)
        if self.resample_spacing is not None:
            # In thousands of HU, as the released preparation: it decides which way values fall on 8-bit steps.
            scan = self._resampled(scan.double() / 1000, spacing)
        return min_max(scan) if self.slice_normalization == "volume_min_max" else scan

    def _whole_slices(self, planes: torch.Tensor) -> torch.Tensor:
        if self.resample_spacing is not None and len(planes) < self.num_slices:
            return trilinear(planes, (self.num_slices, *planes.shape[1:]))
        return planes[torch.linspace(0, len(planes) - 1, self.num_slices, dtype=torch.long)]  # rounds down

    def _stretched_slices(self, planes: torch.Tensor, field_of_view: list[tuple[float, float]]) -> torch.Tensor:
        (start, extent), *in_plane = field_of_view
        select = plane_weights if self.slice_selection == "uniform" else slab_weights
        weights = [select(planes.shape[0], start, extent, self.num_slices)]
        size = self.slice_size[::-1] if self.slice_rotation % 180 else self.slice_size
        for length, (start, extent), samples in zip(planes.shape[1:], in_plane, size, strict=True):
            weights.append(resampling_weights(length, start, extent, samples))
        if self._slices_window_by_slabs:
            return resample_windowed(planes, self.slice_hu_window, weights)
        return resample(planes, weights)

    def _picture(self, plane: torch.Tensor) -> torch.Tensor:
        """A slice in [0, 1] through JPEG, if the settings say so, and from a whole plane to `slice_size`."""
        from PIL import Image  # transformers' image processors need it too

        if self.slice_jpeg_quality is None:
            picture = Image.fromarray(plane.float().numpy())
        else:
            file = BytesIO()
            Image.fromarray((plane * 255).to(torch.uint8).numpy()).save(file, "JPEG", quality=self.slice_jpeg_quality)
            picture = Image.open(file)
        if self.slice_fit == "whole_plane":
            picture = _center(picture, self.slice_size[0])
        pixels = torch.from_numpy(np.array(picture))
        return pixels.clamp(0, 1) if pixels.is_floating_point() else pixels / 255


class HSENetProcessor(ProcessorMixin):
    r"""
    Args:
        image_processor ([`HSENetImageProcessor`]).
        tokenizer: of the language model, or of the text encoder of [`HSENetCLIPModel`].
        image_seq_length (`int`, *optional*):
            Tokens that a volume takes in the prompt, the model's `config.image_seq_length`; `None` for a contrastive
            model, whose texts have no placeholders.
        image_token (`str`): the placeholder.
        prompt_style (`"chat"` or `"plain"`):
            What a bare question becomes: a turn of the chat template, which is what instruct language models know, or
            (released weights) the plain prompt, without roles or system prompt. Training and evaluation follow it.
        plain_prompt_layout (`"adjacent"` or `"separate_line"`):
            The plain prompt's order: the tokenizer's BOS, the volume's placeholders, the question, with nothing
            between them (released weights), or with a line break between volume and question.
        chat_template (`str`, *optional*):
            By default the tokenizer's own, made to accept volumes; the plain prompt if it has none or
            `prompt_style="plain"`.
    """

    _auto_class = "AutoProcessor"

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        image_seq_length: int | None = None,
        image_token: str = "<image>",
        prompt_style: Literal["chat", "plain"] = "chat",
        plain_prompt_layout: Literal["adjacent", "separate_line"] = "adjacent",
        chat_template: str | None = None,
    ):
        _check_choice("prompt_style", prompt_style, ("chat", "plain"))
        _check_choice("plain_prompt_layout", plain_prompt_layout, ("adjacent", "separate_line"))
        self.prompt_style = prompt_style
        self.plain_prompt_layout = plain_prompt_layout
        self.image_seq_length = image_seq_length
        self.image_token = image_token
        self.image_token_id = None
        if image_seq_length is not None:
            self.image_token_id = _placeholder_id(tokenizer, image_token)
            tokenizer.padding_side = "left"  # generation continues at the right end of every row
            if tokenizer.pad_token is None:
                tokenizer.pad_token = tokenizer.eos_token
            if chat_template is None and prompt_style == "chat" and tokenizer.chat_template is not None:
                chat_template = VOLUMES_TO_TEXT.replace("<image>", image_token) + tokenizer.chat_template
            if chat_template is None:
                placeholder = image_token + self._separator.replace("\n", "\\n")  # inside a string of the template
                chat_template = VOLUMES_TO_TEXT.replace("<image>", placeholder) + PLAIN_PROMPT_TEMPLATE
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    def __call__(
        self,
        images: Any = None,
        text: str | list[str] | None = None,
        volumes: Any = None,
        affine: Any = None,
        spacing: Any = None,
        return_tensors: str | None = None,
        **kwargs,
    ) -> BatchFeature:
        """
        Args:
            images: The platform's standard name for `volumes`.
            text (`str` or `list[str]`, *optional*):
                With one image token where each volume belongs. If no text has one and there are as many texts as
                volumes, each becomes a prompt for its volume: see [`~HSENetProcessor.prompt`].
            volumes: One scan or a list; see [`HSENetImageProcessor.preprocess`], also for `affine` and `spacing`.
            return_tensors (`str`, *optional*): `"pt"` or `"np"`.
            kwargs: To the tokenizer; `padding=True` is the default, padding on the right is refused.

        Returns:
            [`BatchFeature`]: `pixel_values`, `slice_pixel_values`, `input_ids` and `attention_mask`, as far as given.
        """
        if images is not None and volumes is not None:
            raise ValueError("images is another name for volumes: pass one of them.")
        volumes = images if images is not None else volumes
        if volumes is None and text is None:
            raise ValueError("Expected volumes, text or both, got neither.")
        text_kwargs, images_kwargs = _split_kwargs(kwargs)
        texts = [text] if isinstance(text, str) else text
        features = {}
        if volumes is not None:
            scans = _flatten(volumes)
            if texts is not None:
                texts = self._match_texts(list(texts), len(scans))
            features.update(self.image_processor(scans, **{"affine": affine, "spacing": spacing, **images_kwargs}))
        elif texts is not None and self.image_seq_length is not None:
            self._match_texts(list(texts), 0)
        if texts is not None:
            features.update(self._tokenize(list(texts), volumes is not None, **text_kwargs))
        skip = ["text_replacement_offsets", "mm_token_type_ids"] if return_tensors is None else None
        return BatchFeature(
            features, tensor_type=return_tensors, skip_tensor_conversion=skip or ["text_replacement_offsets"]
        )

    def prompt(self, question: str) -> str:
        """The text, with one placeholder, that asks about one volume, in the processor's `prompt_style`."""
        if self.prompt_style == "plain":
            return self.plain_prompt(question)
        return self.apply_chat_template(_dialogue(question), tokenize=False, add_generation_prompt=True)

    def plain_prompt(self, question: str) -> str:
        """The paper's prompt for one volume: the tokenizer's BOS, volume, question, by `plain_prompt_layout`."""
        self._check_words(question)
        return f"{self.tokenizer.bos_token or ''}{self.image_token}{self._separator}{question}"

    def answer(self, question: str, answer: str) -> str:
        """What the model writes after `prompt(question)`, up to and with its end token: the target of training."""
        if self.prompt_style == "plain":
            return f" {answer}{self.tokenizer.eos_token}"
        prompt = self.prompt(question)
        dialogue = self.apply_chat_template(_dialogue(question, answer), tokenize=False)
        if not dialogue.startswith(prompt):
            raise ValueError(
                "Expected a chat template whose dialogues start with the prompt for generation, got one that puts "
                f'other text before the answer: use prompt_style="plain" (prompt {prompt!r}, dialogue {dialogue!r}).'
            )
        return dialogue[len(prompt) :]

    def tokenize_prompts(self, prompts: list[str], **kwargs) -> BatchFeature:
        """Texts with placeholders whose volumes the model gets otherwise, such as cached `slice_features`."""
        features = self._tokenize(list(prompts), True, **kwargs)
        return BatchFeature(features, tensor_type="pt", skip_tensor_conversion=["text_replacement_offsets"])

    def apply_chat_template(self, conversation: list, *args, **kwargs) -> Any:
        """
        As [`ProcessorMixin.apply_chat_template`]; a content item `{"type": "volume", "volume": scan}` is a scan.

        Raises:
            ValueError: a user's text has control tokens, which would end the turn or speak for another role.
        """
        is_one = bool(conversation) and isinstance(conversation[0], dict)
        dialogues = [conversation] if is_one else conversation
        for message in (message for dialogue in dialogues for message in dialogue if message["role"] == "user"):
            if isinstance(message["content"], str):
                self._check_words(message["content"].replace(self.image_token, " "))  # written out, the placeholder
            else:
                self._check_words(*(part["text"] for part in message["content"] if part["type"] == "text"))
        if is_one:
            return super().apply_chat_template(_volumes_as_images(conversation), *args, **kwargs)
        return super().apply_chat_template([_volumes_as_images(one) for one in conversation], *args, **kwargs)

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs) -> str:
        return self.image_token * self.image_seq_length

    def _get_num_multimodal_tokens(self, image_sizes: list | None = None, **kwargs) -> MultiModalData:
        count = len(image_sizes) if image_sizes is not None else 0
        return MultiModalData(num_image_tokens=[self.image_seq_length] * count, num_image_patches=[1] * count)

    @property
    def model_input_names(self) -> list[str]:
        return [*self.tokenizer.model_input_names, *self.image_processor.model_input_names]

    def _check_words(self, *texts: str) -> None:
        """A user's words must stay words: what looks like a control token would be one."""
        tokens = self.tokenizer.added_tokens_decoder
        control = {
            index
            for index, token in tokens.items()
            # Words that somebody added to the vocabulary are none; some control tokens are not marked as special.
            if (token.special or token.content.startswith(("<", "["))) and index != self.tokenizer.unk_token_id
        }
        for text in texts:
            if found := control.intersection(self.tokenizer.encode(text, add_special_tokens=False)):
                shown = ", ".join(sorted(tokens[index].content for index in found))
                raise ValueError(
                    f"Expected words only, got text with {shown}, which the language model takes for the end of a "
                    "turn, a volume or another role: leave it out."
                )

    @property
    def _separator(self) -> str:
        return "\n" if self.plain_prompt_layout == "separate_line" else ""

    def _match_texts(self, texts: list[str], num_volumes: int) -> list[str]:
        if self.image_seq_length is None:
            return texts  # contrastive: any number of volumes against any number of texts
        num_placeholders = sum(text.count(self.image_token) for text in texts)
        if num_placeholders == 0 and len(texts) == num_volumes:
            return [self.prompt(text) for text in texts]
        if num_placeholders != num_volumes:
            raise ValueError(
                f"Expected one {self.image_token} in the texts for each volume, got {num_placeholders} in "
                f"{len(texts)} text(s) for {num_volumes} volume(s). Put it where the volume belongs, or leave it out "
                "and pass one text a volume."
            )
        return texts

    def _tokenize(self, texts: list[str], with_volumes: bool, **kwargs) -> dict[str, Any]:
        return_offsets = kwargs.pop("return_text_replacement_offsets", False)
        return_types = kwargs.pop("return_mm_token_type_ids", False)
        kwargs = {"padding": True, **kwargs}
        offsets = []
        if self.image_seq_length is not None:
            if kwargs.get("padding_side", self.tokenizer.padding_side) != "left":
                raise ValueError(
                    'Expected padding_side="left", got "right": with padding between prompt and answer, batched '
                    "generation would give other texts than single generation."
                )
            # A prompt may start with BOS: a tokenizer that adds one itself would double it.
            bos = self.tokenizer.bos_token
            if bos is not None and all(text.startswith(bos) for text in texts):
                kwargs.setdefault("add_special_tokens", False)
            if with_volumes:
                replacements = [self.replace_image_token({}, 0)] * sum(t.count(self.image_token) for t in texts)
                texts, offsets = self.get_text_with_replacements(texts, replacements)
        encoded = dict(self.tokenizer(texts, **kwargs))
        if self.image_seq_length is not None:
            self._check_special_mm_tokens(texts, encoded, modalities=["image"])
        if return_offsets:
            encoded["text_replacement_offsets"] = offsets
        if return_types:
            encoded["mm_token_type_ids"] = self.create_mm_token_type_ids(encoded["input_ids"])
        return encoded


# Turns message content given as a list of parts into text with placeholders, so that the template of any instruct
# language model, most of which accept only strings, can follow it.
VOLUMES_TO_TEXT = """\
{%- set ns = namespace(messages=[]) -%}
{%- for message in messages -%}
  {%- if message.content is string -%}
    {%- set ns.messages = ns.messages + [message] -%}
  {%- else -%}
    {%- set ns.text = "" -%}
    {%- for part in message.content -%}
      {%- set ns.text = ns.text + ("<image>" if part.type in ["image", "volume"] else part.text) -%}
    {%- endfor -%}
    {%- set ns.messages = ns.messages + [dict(role=message.role, content=ns.text)] -%}
  {%- endif -%}
{%- endfor -%}
{%- set messages = ns.messages -%}
"""

# The paper's prompt: BOS, volume, question; a space and the answer, then EOS. No roles, no system prompt.
PLAIN_PROMPT_TEMPLATE = """\
{{- bos_token if bos_token is defined else "" -}}
{%- for message in messages -%}
  {%- if message.role == "assistant" -%}
    {%- generation -%}{{- " " + message.content + eos_token -}}{%- endgeneration -%}
  {%- else -%}
    {{- message.content -}}
  {%- endif -%}
{%- endfor -%}
"""


def _flatten(scans: Any) -> list[Any]:
    if not isinstance(scans, (list, tuple)):
        return [scans]
    flat = [item for scan in scans for item in _flatten(scan)]
    if not flat:
        raise ValueError("Expected at least one volume, got an empty list.")
    return flat


def _per_scan(name: str, value: Any, count: int, *, rank: int) -> list[Any]:
    """One geometry for all scans, or one each; `rank` is the number of dimensions of one."""
    if isinstance(value, (list, tuple)) and all(item is None or np.ndim(item) == rank for item in value):
        if len(value) != count:
            raise ValueError(f"Expected one {name} for all volumes or {count}, one for each, got {len(value)}.")
        return list(value)
    return [value] * count


def _split_kwargs(kwargs: dict) -> tuple[dict, dict]:
    """The tokenizer's and the image processor's arguments out of flat and nested (`text_kwargs=...`) ones."""
    common = kwargs.pop("common_kwargs", {})
    images_kwargs = kwargs.pop("images_kwargs", {})
    text_kwargs = {**common, **kwargs.pop("text_kwargs", {}), **kwargs}
    text_kwargs.pop("return_tensors", None)
    return text_kwargs, {
        name: value for name, value in images_kwargs.items() if name in ("affine", "spacing", "reading")
    }


def _dialogue(question: str, answer: str | None = None) -> list[dict]:
    user = {"role": "user", "content": [{"type": "volume"}, {"type": "text", "text": question}]}
    return [user] if answer is None else [user, {"role": "assistant", "content": answer}]


def _volumes_as_images(conversation: list[dict]) -> list[dict]:
    """The platform collects content items of type "image" only."""
    return [
        message
        if isinstance(message["content"], str)
        else {**message, "content": [_volume_as_image(part) for part in message["content"]]}
        for message in conversation
    ]


def _volume_as_image(part: dict) -> dict:
    if part["type"] != "volume":
        return part
    return {("image" if name == "volume" else name): value for name, value in {**part, "type": "image"}.items()}


def _placeholder_id(tokenizer: Any, image_token: str) -> int:
    ids = tokenizer.encode(image_token, add_special_tokens=False)
    if len(ids) != 1 or tokenizer.convert_ids_to_tokens(ids[0]) != image_token:
        raise ValueError(
            f"The tokenizer has no token {image_token!r} (it gives {len(ids)} others); add it first: "
            f'tokenizer.add_special_tokens({{"additional_special_tokens": [{image_token!r}]}}).'
        )
    return ids[0]


# What the released weights saw, step for step. What both datasets share:
_RELEASED = {
    "orientation": "stored",
    "hu_window": (-1000, 200),
    "volume_normalization": "min_max",
    "volume_fit": "nonzero_box",
    "slice_fit": "whole_plane",
    "slice_jpeg_quality": 95,
}
RELEASED_SETTINGS = {
    "ct_rate": {
        **_RELEASED,
        "resample_spacing": (1.5, 0.75, 0.75),
        "slice_axis": "depth_if_shorter",
        "slice_hu_window": (-1000, 1000),
        "slice_normalization": "slice_min_max",
        "slice_rotation": -90,
    },
    "bimcv_r": {
        **_RELEASED,
        "slice_hu_window": None,
        "slice_normalization": "volume_min_max",
        "slice_rotation": 90,
    },
}

_CHOICES = {
    "orientation": ("canonical", "stored"),
    "volume_normalization": ("window", "min_max"),
    "volume_fit": ("field_of_view", "nonzero_box"),
    "slice_axis": ("depth", "depth_if_shorter"),
    "slice_normalization": ("window", "slice_min_max", "volume_min_max"),
    "slice_selection": ("uniform", "slab_mean"),
    "slice_fit": ("field_of_view", "whole_plane"),
    "slice_rotation": (-90, 0, 90, 180),
}


def _check_choice(name: str, value: Any, choices: tuple) -> None:
    if value not in choices:
        raise ValueError(f"{name} should be {' or '.join(map(repr, choices))}, got {value!r}.")


def _check_settings(processor: HSENetImageProcessor) -> None:
    for name, choices in _CHOICES.items():
        _check_choice(name, vars(processor)[name], choices)
    quality = processor.slice_jpeg_quality
    if quality is not None and quality not in range(1, 101):
        raise ValueError(f"slice_jpeg_quality should be None or a whole number from 1 to 100, got {quality!r}.")
    if processor.volume_fit == "nonzero_box" and (processor.spacing is not None or not processor.crop_to_body):
        raise ValueError(
            f'volume_fit="nonzero_box" crops in its own way, got spacing {processor.spacing} and crop_to_body '
            f'{processor.crop_to_body}: leave both at their defaults, or use volume_fit="field_of_view".'
        )
    if processor.slice_normalization == "window" and processor.slice_hu_window is None:
        raise ValueError('slice_normalization="window" needs a slice_hu_window, got None.')
    whole = processor.slice_fit == "whole_plane"
    if processor.slice_axis == "depth_if_shorter" and not whole:
        raise ValueError('slice_axis="depth_if_shorter" needs slice_fit="whole_plane", got "field_of_view".')
    if whole and (processor.slice_selection != "uniform" or len(set(processor.slice_size)) > 1):
        raise ValueError(
            'slice_fit="whole_plane" needs slice_selection="uniform" and a square slice_size, got '
            f"{processor.slice_selection!r} and {processor.slice_size}."
        )


def _numbers(name: str, values: Any, count: int) -> tuple:
    if len(values) != count or min(values) <= 0:
        raise ValueError(f"{name} should be {count} positive numbers, got {values}.")
    return tuple(values)


def _optional(check: Callable, name: str, value: Any, *arguments) -> Any:
    return None if value is None else check(name, value, *arguments)


def _window(name: str, window: Any) -> tuple[float, float]:
    if len(window) != 2 or window[0] >= window[1]:
        raise ValueError(f"{name} should be (lower HU, upper HU), got {window}.")
    return tuple(window)


def _center(picture: Any, size: int) -> Any:
    """A PIL picture resized until its shorter side is `size`, then its middle: as BiomedCLIP's own transform."""
    from PIL import Image

    width, height = picture.size
    shorter = min(width, height)
    width, height = int(size * width / shorter), int(size * height / shorter)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return picture.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + size, top + size))


__all__ = ["HSENetImageProcessor", "HSENetProcessor"]
