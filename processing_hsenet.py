# Copyright 2026 The HSENet package authors. Licensed under the Apache License, Version 2.0.
"""From CT scans and text to the tensors that HSENet reads.

`HSENetImageProcessor` turns a scan (NIfTI file, DICOM folder, array in HU with its geometry) into `pixel_values`
(the volume for the 3D encoders) and `slice_pixel_values` (axial slices for the 2D encoder), both cut from the same
field of view in the same orientation: depth inferior to superior, height anterior to posterior, width patient right
to left. `HSENetProcessor` adds the tokenizer, and expands each image placeholder to the volume's tokens.
"""

from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import torch
from transformers import BaseImageProcessor, BatchFeature, ProcessorMixin
from transformers.processing_utils import MultiModalData


try:
    from .reading_hsenet import UnsupportedImageError, Volume, read_volume
except ImportError:  # imported as a plain top-level module, not from the Hub cache
    if __package__:
        raise
    from reading_hsenet import UnsupportedImageError, Volume, read_volume


class HSENetImageProcessor(BaseImageProcessor):
    r"""
    Args:
        image_size (`tuple[int, int, int]`): depth, height, width of `pixel_values`; the model's `image_size`.
        hu_window (`tuple[float, float]`): HU that become 0 and 1 in `pixel_values`; values outside are clipped.
        volume_mean, volume_std (`float`): subtracted from and divided into the windowed volume; the paper's 0 and 1.
        spacing (`tuple[float, float, float]`, *optional*):
            Millimetres between voxels of `pixel_values` along depth, height, width. The field of view is then
            `image_size * spacing`, centred on the body and padded with the window's lower end. `None` (the paper's
            way): the whole body is stretched to `image_size`, whatever its size.
        crop_to_body (`bool`): whether the field of view starts from the body's bounding box or from the whole scan.
        num_slices (`int`): axial slices for the 2D encoder; 0 for models without slice guidance.
        slice_size (`tuple[int, int]`): height and width of a slice.
        slice_hu_window (`tuple[float, float]`): HU that become black and white in the slices.
        slice_selection (`"uniform"` or `"slab_mean"`):
            Single planes at equal distances from bottom to top, or the mean of each of `num_slices` equal slabs.
        image_mean, image_std (`tuple[float, ...]`): normalisation of the slices' channels; BiomedCLIP's by default.
    """

    model_input_names = ["pixel_values", "slice_pixel_values"]
    _auto_class = "AutoImageProcessor"

    def __init__(
        self,
        image_size: tuple[int, int, int] = (32, 256, 256),
        hu_window: tuple[float, float] = (-1000, 200),
        volume_mean: float = 0.0,
        volume_std: float = 1.0,
        spacing: tuple[float, float, float] | None = None,
        crop_to_body: bool = True,
        num_slices: int = 32,
        slice_size: tuple[int, int] = (224, 224),
        slice_hu_window: tuple[float, float] = (-1000, 1000),
        slice_selection: Literal["uniform", "slab_mean"] = "uniform",
        image_mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073),
        image_std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711),
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.image_size = _numbers("image_size", image_size, 3)
        self.hu_window = _window("hu_window", hu_window)
        self.volume_mean = volume_mean
        self.volume_std = volume_std
        self.spacing = _numbers("spacing", spacing, 3) if spacing is not None else None
        self.crop_to_body = crop_to_body
        self.num_slices = num_slices
        self.slice_size = _numbers("slice_size", slice_size, 2)
        self.slice_hu_window = _window("slice_hu_window", slice_hu_window)
        if slice_selection not in ("uniform", "slab_mean"):
            raise ValueError(f"slice_selection should be 'uniform' or 'slab_mean', got {slice_selection!r}.")
        self.slice_selection = slice_selection
        self.image_mean = tuple(image_mean)
        self.image_std = _numbers("image_std", image_std, len(self.image_mean))

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
        array = torch.from_numpy(volume.array)
        field_of_view = self.field_of_view(volume)
        tensors = {"pixel_values": self._pixel_values(array, field_of_view)}
        if self.num_slices:
            tensors["slice_pixel_values"] = self._slice_pixel_values(array, field_of_view)
        return tensors

    def field_of_view(self, volume: Volume) -> list[tuple[float, float]]:
        """Start and extent, in voxels of the scan, of what the model sees along depth, height, width."""
        box = [(0.0, float(size)) for size in volume.array.shape]
        if self.crop_to_body:
            box = _body_box(torch.from_numpy(volume.array))
        if self.spacing is None:
            return box
        extents = [
            size * target / stored
            for size, target, stored in zip(self.image_size, self.spacing, volume.spacing, strict=True)
        ]
        return [(start + (size - extent) / 2, extent) for (start, size), extent in zip(box, extents, strict=True)]

    def _pixel_values(self, array: torch.Tensor, field_of_view: list[tuple[float, float]]) -> torch.Tensor:
        weights = [
            _resampling_weights(length, start, extent, samples)
            for length, (start, extent), samples in zip(array.shape, field_of_view, self.image_size, strict=True)
        ]
        resampled = _resample_windowed(array, self.hu_window, weights)
        return (resampled.unsqueeze(0) - self.volume_mean) / self.volume_std

    def _slice_pixel_values(self, array: torch.Tensor, field_of_view: list[tuple[float, float]]) -> torch.Tensor:
        (start, extent), *in_plane = field_of_view
        select = _plane_weights if self.slice_selection == "uniform" else _slab_weights
        weights = [select(array.shape[0], start, extent, self.num_slices)]
        for length, (start, extent), samples in zip(array.shape[1:], in_plane, self.slice_size, strict=True):
            weights.append(_resampling_weights(length, start, extent, samples))
        slices = _resample_windowed(array, self.slice_hu_window, weights)
        mean, std = torch.tensor(self.image_mean).view(-1, 1, 1), torch.tensor(self.image_std).view(-1, 1, 1)
        return (slices.unsqueeze(1) - mean) / std  # (num_slices, channels, height, width)


class HSENetProcessor(ProcessorMixin):
    r"""
    Args:
        image_processor ([`HSENetImageProcessor`]).
        tokenizer: of the language model, or of the text encoder of [`HSENetCLIPModel`].
        image_seq_length (`int`, *optional*):
            Tokens that a volume takes in the prompt, the model's `config.image_seq_length`; `None` for a contrastive
            model, whose texts have no placeholders.
        image_token (`str`): the placeholder.
        chat_template (`str`, *optional*):
            By default the tokenizer's own, made to accept volumes, or else the paper's plain prompt.
    """

    _auto_class = "AutoProcessor"

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        image_seq_length: int | None = None,
        image_token: str = "<image>",
        chat_template: str | None = None,
    ):
        self.image_seq_length = image_seq_length
        self.image_token = image_token
        self.image_token_id = None
        if image_seq_length is not None:
            self.image_token_id = _placeholder_id(tokenizer, image_token)
            tokenizer.padding_side = "left"  # generation continues at the right end of every row
            if tokenizer.pad_token is None:
                tokenizer.pad_token = tokenizer.eos_token
            if chat_template is None:
                volumes_to_text = VOLUMES_TO_TEXT.replace("<image>", image_token)
                chat_template = volumes_to_text + (tokenizer.chat_template or PLAIN_PROMPT_TEMPLATE)
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
                volumes, each becomes the paper's plain prompt: see [`~HSENetProcessor.plain_prompt`].
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

    def plain_prompt(self, question: str) -> str:
        """The paper's prompt for one volume: the tokenizer's BOS, the volume, the question, nothing between them."""
        return f"{self.tokenizer.bos_token or ''}{self.image_token}{question}"

    def tokenize_prompts(self, prompts: list[str], **kwargs) -> BatchFeature:
        """Texts with placeholders whose volumes the model gets otherwise, such as cached `slice_features`."""
        features = self._tokenize(list(prompts), True, **kwargs)
        return BatchFeature(features, tensor_type="pt", skip_tensor_conversion=["text_replacement_offsets"])

    def apply_chat_template(self, conversation: list, *args, **kwargs) -> Any:
        """As [`ProcessorMixin.apply_chat_template`]; a content item `{"type": "volume", "volume": scan}` is a scan."""
        if conversation and isinstance(conversation[0], dict):
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

    def _match_texts(self, texts: list[str], num_volumes: int) -> list[str]:
        if self.image_seq_length is None:
            return texts  # contrastive: any number of volumes against any number of texts
        num_placeholders = sum(text.count(self.image_token) for text in texts)
        if num_placeholders == 0 and len(texts) == num_volumes:
            return [self.plain_prompt(text) for text in texts]
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
            # The plain prompt starts with BOS: a tokenizer that adds one itself would double it.
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


def _numbers(name: str, values: Any, count: int) -> tuple:
    if len(values) != count or min(values) <= 0:
        raise ValueError(f"{name} should be {count} positive numbers, got {values}.")
    return tuple(values)


def _window(name: str, window: Any) -> tuple[float, float]:
    if len(window) != 2 or window[0] >= window[1]:
        raise ValueError(f"{name} should be (lower HU, upper HU), got {window}.")
    return tuple(window)


# Half-way between lung and soft tissue: air, lung and out-of-field padding lie below, the body's wall above.
BODY_THRESHOLD_HU = -500


def _body_box(array: torch.Tensor) -> list[tuple[float, float]]:
    projection = array.amax(dim=0) > BODY_THRESHOLD_HU
    if not projection.any():
        raise UnsupportedImageError(
            f"No voxel of the volume lies above {BODY_THRESHOLD_HU} HU, so there is no body in it. Expected a CT in "
            f"HU, got values from {array.min():.0f} to {array.max():.0f}."
        )
    box = []
    for plane in (projection.any(dim=1), projection.any(dim=0)):
        first, last = plane.nonzero()[[0, -1], 0].tolist()
        box.append((float(first), float(last + 1 - first)))
    # Most scans begin and end within the body, so the search from both ends is short.
    planes = range(len(array))
    first = next(index for index in planes if (array[index] > BODY_THRESHOLD_HU).any())
    last = next(index for index in reversed(planes) if (array[index] > BODY_THRESHOLD_HU).any())
    return [(float(first), float(last + 1 - first)), *box]


def _resampling_weights(length: int, start: float, extent: float, samples: int) -> torch.Tensor:
    """`(samples, length)`: linear interpolation, widened to the sample distance when shrinking (antialiasing).

    Samples are the centres of equal parts of `extent`; those outside the scan get no weight, that is, the window's
    lower end.
    """
    step = extent / samples
    centres = start + (torch.arange(samples, dtype=torch.float64) + 0.5) * step - 0.5  # in voxel indices
    distances = (torch.arange(length, dtype=torch.float64) - centres.unsqueeze(1)).abs()
    weights = (1 - distances / max(step, 1.0)).clamp(min=0)
    weights = weights / weights.sum(dim=1, keepdim=True).clamp(min=1e-9)
    inside = (centres > -0.5) & (centres < length - 0.5)
    return (weights * inside.unsqueeze(1)).float()


def _plane_weights(length: int, start: float, extent: float, samples: int) -> torch.Tensor:
    """`(samples, length)`: the single planes nearest to equal distances from the first plane to the last."""
    planes = start + torch.linspace(0, extent - 1, samples, dtype=torch.float64)
    planes = planes.round()
    return (torch.arange(length, dtype=torch.float64) == planes.unsqueeze(1)).float()


def _slab_weights(length: int, start: float, extent: float, samples: int) -> torch.Tensor:
    """`(samples, length)`: the share of each plane in each of the equal slabs; nothing lies outside the scan."""
    step = extent / samples
    lower = start + torch.arange(samples, dtype=torch.float64).unsqueeze(1) * step
    planes = torch.arange(length, dtype=torch.float64)
    shared = torch.minimum(planes + 1, lower + step) - torch.maximum(planes, lower)
    return (shared.clamp(min=0) / step).float()


# Parts of the work that fit the processor's cache. A block of samples needs only the voxels near them.
DEPTH_BLOCK, IN_PLANE_BLOCK, SLAB_ROWS = 8, 32, 4


def _resample_windowed(array: torch.Tensor, window: tuple[float, float], weights: list[torch.Tensor]) -> torch.Tensor:
    """The scan (D, H, W) with its window applied, resampled along every axis; it is never whole in float32."""
    (lower, upper), (depth, height, width) = window, weights
    height, array = _used(height, array, 1)
    width, array = _used(width, array, 2)
    planes = []
    for block, part in _blocks(depth, array, 0, DEPTH_BLOCK):
        slabs = (slab.float().clamp(lower, upper).sub_(lower) for slab in part.split(SLAB_ROWS, dim=1))
        planes.append(torch.cat([torch.tensordot(block, slab, 1) for slab in slabs], dim=1))
    resampled = torch.cat(planes).div_(upper - lower)
    resampled = torch.cat([block @ part for block, part in _blocks(height, resampled, 1, IN_PLANE_BLOCK)], dim=1)
    return torch.cat([part @ block.T for block, part in _blocks(width, resampled, 2, IN_PLANE_BLOCK)], dim=2)


def _blocks(
    weights: torch.Tensor, array: torch.Tensor, axis: int, size: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    for block in weights.split(size):
        yield _used(block, array, axis)


def _used(weights: torch.Tensor, array: torch.Tensor, axis: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights (samples, voxels) and array without the voxels along the axis that no sample needs."""
    used = weights.any(dim=0).nonzero()[:, 0]
    first, last = used[[0, -1]].tolist() if len(used) else (0, -1)
    if len(used) == last + 1 - first:
        return weights.narrow(1, first, len(used)), array.narrow(axis, first, len(used))
    return weights[:, used], array.index_select(axis, used)


__all__ = ["HSENetImageProcessor", "HSENetProcessor"]
