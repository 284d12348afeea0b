"""HSENet: 3D CT vision-language models. Importing the package registers them with transformers' Auto classes."""

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
)

from configuration_hsenet import HSENetCLIPConfig, HSENetConfig, HSENetVisionConfig
from modeling_hsenet import HSENetCLIPModel, HSENetForConditionalGeneration, HSENetVisionModel
from processing_hsenet import HSENetImageProcessor, HSENetProcessor
from reading_hsenet import HSENetInputError, Volume, read_volume


AutoConfig.register("hsenet_vision", HSENetVisionConfig)
AutoConfig.register("hsenet_clip", HSENetCLIPConfig)
AutoConfig.register("hsenet", HSENetConfig)
AutoModel.register(HSENetVisionConfig, HSENetVisionModel)
AutoModel.register(HSENetCLIPConfig, HSENetCLIPModel)
AutoModel.register(HSENetConfig, HSENetForConditionalGeneration)
AutoModelForImageTextToText.register(HSENetConfig, HSENetForConditionalGeneration)
AutoModelForCausalLM.register(HSENetConfig, HSENetForConditionalGeneration)
AutoImageProcessor.register(HSENetCLIPConfig, slow_image_processor_class=HSENetImageProcessor)
AutoImageProcessor.register(HSENetConfig, slow_image_processor_class=HSENetImageProcessor)
AutoProcessor.register(HSENetCLIPConfig, HSENetProcessor)
AutoProcessor.register(HSENetConfig, HSENetProcessor)

__all__ = [
    "HSENetCLIPConfig",
    "HSENetCLIPModel",
    "HSENetConfig",
    "HSENetForConditionalGeneration",
    "HSENetImageProcessor",
    "HSENetInputError",
    "HSENetProcessor",
    "HSENetVisionConfig",
    "HSENetVisionModel",
    "Volume",
    "read_volume",
]
