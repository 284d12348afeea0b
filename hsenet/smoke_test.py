# Copyright 2026 The HSENet package authors. Licensed under the Apache License, Version 2.0.
"""Whether everything works together here: a phantom as a file, read back, through a model to text or an embedding."""

import tempfile
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModel, PreTrainedTokenizerFast

from configuration_hsenet import HSENetConfig
from hsenet.encoded_scan import EncodedScan, load_generation_model
from hsenet.phantom import QUICKSTART_SPACING, nifti_bytes, render_study, sample_study
from hsenet.report_prompts import REPORT_PROMPTS
from modeling_hsenet import HSENetForConditionalGeneration
from processing_hsenet import HSENetImageProcessor, HSENetProcessor


NUM_TOKENS = 8
IMAGE_TOKEN, END_TOKEN = "<image>", "<|endoftext|>"


def smoke_test(source: str | None, device: torch.device) -> str:
    """
    Args:
        source: folder or Hub id of a model that writes or compares; `None`: a small one without training, saved and
            loaded again.

    Returns:
        `str`: what happened, for people.

    Raises:
        Whatever goes wrong, and `ValueError` for numbers that are none.
    """
    with tempfile.TemporaryDirectory(prefix="hsenet-") as folder:
        scan = Path(folder) / "phantom.nii.gz"
        image = render_study(sample_study(seed=0, index=0), spacing=QUICKSTART_SPACING)
        scan.write_bytes(nifti_bytes(image.array, image.affine))
        if source is None:
            source = str(Path(folder) / "model")
            _save_untrained(source)
        kind = AutoConfig.from_pretrained(source).model_type
        if kind == HSENetConfig.model_type:
            return _writes(source, scan, device)
        if kind == "hsenet_clip":
            return _compares(source, scan, device)
        raise ValueError(f"Expected a model that writes or compares (hsenet, hsenet_clip), got one of type {kind}.")


def _writes(source: str, path: Path, device: torch.device) -> str:
    model, processor = load_generation_model(source, device=device)
    scan = EncodedScan.read(model, processor, str(path))
    _check_finite(scan.image_features.pooler_output)
    text = scan.ask(REPORT_PROMPTS[0], max_new_tokens=NUM_TOKENS, min_new_tokens=NUM_TOKENS)
    return f"a phantom was read, encoded and reported on ({len(text)} characters)"


@torch.no_grad()
def _compares(source: str, path: Path, device: torch.device) -> str:
    model = AutoModel.from_pretrained(source).to(device).eval()
    processor = HSENetProcessor.from_pretrained(source)
    inputs = processor(volumes=[str(path)], text=["No pleural effusion."], return_tensors="pt").to(device)
    cosine = model(**inputs)
    cosine = (cosine.image_embeds @ cosine.text_embeds.T).flatten()
    _check_finite(cosine)
    return f"a phantom was read and compared with a text (cosine {cosine.item():+.3f})"


def _check_finite(features: torch.Tensor) -> None:
    if not torch.isfinite(features).all():
        raise ValueError("The model's features are not finite numbers: its weights are damaged.")


def _save_untrained(folder: str) -> None:
    sizes = {"intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    volume = {"image_size": (8, 32, 32), "patch_size": (2, 8, 8), "hidden_size": 32, **sizes}
    pictures = {"image_size": (1, 16, 16), "patch_size": (1, 8, 8), "num_channels": 3, "hidden_size": 32, **sizes}
    tokenizer = _tokenizer()
    ends = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), tokenizer.eos_token_id)
    text = {"model_type": "phi3", "hidden_size": 32, "vocab_size": len(tokenizer), "num_key_value_heads": 4}
    config = HSENetConfig(
        vision_config=volume,
        slice_config=pictures,
        num_slices=4,
        text_config={**text, **sizes, **ends},
        packer_window_size=(1, 2, 2),
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
    )
    HSENetForConditionalGeneration(config).save_pretrained(folder)
    images = HSENetImageProcessor(image_size=volume["image_size"], num_slices=4, slice_size=(16, 16))
    HSENetProcessor(images, tokenizer, image_seq_length=config.image_seq_length).save_pretrained(folder)


def _tokenizer() -> PreTrainedTokenizerFast:
    """Of bytes."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = [END_TOKEN, IMAGE_TOKEN]
    backend.train_from_iterator(
        [], trainers.BpeTrainer(special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    )
    ends = dict.fromkeys(("bos_token", "eos_token", "pad_token"), END_TOKEN)
    return PreTrainedTokenizerFast(tokenizer_object=backend, **ends, additional_special_tokens=[IMAGE_TOKEN])
