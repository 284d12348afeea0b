# Copyright 2026 The HSENet package authors. Licensed under the Apache License, Version 2.0.
"""HSENet on vLLM's transformers backend, with scans where the backend expects pictures.

The network is the Hub files' own. vLLM replaces the language model's attention and its output head.
"""

from collections.abc import Mapping
from typing import Any

from vllm.model_executor.models.transformers import TransformersMultiModalForCausalLM
from vllm.model_executor.models.transformers.multimodal import (
    MultiModalDummyInputsBuilder,
    MultiModalProcessingInfo,
    MultiModalProcessor,
)
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.parse import ImageProcessorItems, ModalityDataItems, MultiModalDataParser

from hsenet.phantom import render_study, sample_study
from reading_hsenet import Volume, read_volume


class ScanItems(ImageProcessorItems):
    """Scans as they came. Each is read only if vLLM's caches don't know it yet, by the hash of its bytes.

    It is read before it meets the processor: the backend's errors would repeat the file, with what it says of the
    patient.
    """

    def get(self, index: int) -> Volume:
        return read_volume(super().get(index))

    def get_item_for_hash(self, index: int) -> Any:
        scan = super().get_item_for_hash(index)
        if isinstance(scan, Volume):
            return {"array": scan.array, "affine": scan.affine, "stored_orientation": scan.stored_orientation}
        return scan


class ScanParser(MultiModalDataParser):
    """Of `multi_modal_data={"image": ...}`: one scan or a list, each anything that `read_volume` takes."""

    def _parse_image_data(self, data: Any) -> ModalityDataItems | None:
        if data is None or self.is_embeddings(data):
            return super()._parse_image_data(data)
        scans = data if isinstance(data, (list, tuple)) else [data]
        return ScanItems([scan if isinstance(scan, (bytes, Volume)) else read_volume(scan) for scan in scans])


class ScanProcessingInfo(MultiModalProcessingInfo):
    def get_data_parser(self) -> ScanParser:
        return ScanParser(
            expected_hidden_size=self._get_expected_hidden_size(),
            allow_missing_mm_embeddings=self.allow_missing_mm_embeddings,
        )


class DummyScans(MultiModalDummyInputsBuilder):
    """What vLLM measures the encoders' memory with; all scans take the same."""

    def get_dummy_mm_data(self, seq_len: int, mm_counts: Mapping[str, int], mm_options: Any) -> dict[str, list]:
        phantom = render_study(sample_study(seed=0, index=0))
        return {"image": [read_volume(phantom.array, affine=phantom.affine)] * mm_counts.get("image", 0)}


@MULTIMODAL_REGISTRY.register_processor(MultiModalProcessor, info=ScanProcessingInfo, dummy_inputs=DummyScans)
class HSENetForVLLM(TransformersMultiModalForCausalLM):
    """`HSENetForConditionalGeneration` as vLLM runs it."""
