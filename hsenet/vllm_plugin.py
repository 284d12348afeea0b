# Copyright 2026 The HSENet package authors. Licensed under the Apache License, Version 2.0.
"""The package as a plugin of vLLM (docs/vllm.md): what vLLM's own loader of pictures cannot do.

vLLM finds `register` by its entry point wherever both are installed, and calls it in each of its processes.
"""

from base64 import b64decode
from pathlib import Path

from vllm import ModelRegistry, envs
from vllm.multimodal.media import MEDIA_CONNECTOR_REGISTRY, MediaConnector, MediaIO

from modeling_hsenet import HSENetForConditionalGeneration
from reading_hsenet import ReadOptions, UnsafePathError


def register() -> None:
    """Importing `hsenet` has registered the Auto classes already, so that vLLM needs no remote code."""
    # By name, because vLLM inspects models in a process of their own, before it touches an accelerator.
    ModelRegistry.register_model(HSENetForConditionalGeneration.__name__, "hsenet.vllm_model:HSENetForVLLM")
    MEDIA_CONNECTOR_REGISTRY.register("hsenet")(ScanConnector)


class ScanIO(MediaIO[bytes]):
    """The file as it is: what it holds is looked at where a refusal can be said in the reader's words."""

    def get_max_bytes(self) -> int:
        return ReadOptions.max_bytes

    def load_bytes(self, data: bytes) -> bytes:
        return data

    def load_base64(self, media_type: str, data: str) -> bytes:
        return b64decode(data, validate=True)

    def load_file(self, filepath: Path) -> bytes:
        if not filepath.is_file():
            raise UnsafePathError("The URL names no regular file: expected one file, a DICOM series as a zip.")
        return filepath.read_bytes()


class ScanConnector(MediaConnector):
    """Takes scans where the OpenAI protocol has pictures (`VLLM_MEDIA_CONNECTOR=hsenet`)."""

    def fetch_image(self, image_url: str, **kwargs) -> bytes:
        return self.load_from_url(image_url, ScanIO(), fetch_timeout=envs.VLLM_IMAGE_FETCH_TIMEOUT)

    async def fetch_image_async(self, image_url: str, **kwargs) -> bytes:
        return await self.load_from_url_async(image_url, ScanIO(), fetch_timeout=envs.VLLM_IMAGE_FETCH_TIMEOUT)
