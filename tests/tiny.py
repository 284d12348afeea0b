"""Tiny real configurations, tokenizers and scans for the tests: the package's own classes at small sizes."""

from pathlib import Path

import nibabel
import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    BertTokenizerFast,
    PreTrainedTokenizerFast,
)

from configuration_hsenet import HSENetCLIPConfig, HSENetConfig, HSENetVisionConfig
from modeling_hsenet import HSENetCLIPModel, HSENetForConditionalGeneration, HSENetVisionModel
from processing_hsenet import HSENetImageProcessor, HSENetProcessor


IMAGE_SIZE, PATCH_SIZE, WINDOW = (8, 32, 32), (2, 8, 8), (1, 2, 2)
NUM_SLICES, SLICE_SIZE = 4, (16, 16)

VISION = {
    "image_size": IMAGE_SIZE,
    "patch_size": PATCH_SIZE,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.2,  # so that a change of the input shows in the output
}
SLICES = {
    **VISION,
    "image_size": (1, *SLICE_SIZE),
    "patch_size": (1, 8, 8),
    "num_channels": 3,
    "hidden_size": 24,
    "qkv_bias": True,
}
SENTENCES = [
    "Can you summarize with findings the images presented?",
    "There is a nodule of 12 mm in the left lower lobe.",
    "No pleural effusion or consolidation is seen.",
    "Is there a pericardial effusion? yes no",
    "The heart is enlarged; trachea and main bronchi are open.",
]


def tokenizer(**special_tokens: str) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<image>", "[CLS]", "[PAD]"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(SENTENCES, trainer)
    tokens = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, **{**tokens, **special_tokens}, additional_special_tokens=["<image>"]
    )


def text_config(model_type: str = "phi3", **changes) -> dict:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {"vocab_size": 400, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    heads = {"num_key_value_heads": 2} if model_type != "bert" else {}
    return {"model_type": model_type, **sizes, **ids, **heads, "initializer_range": 0.2, **changes}


def vision_model(**changes) -> HSENetVisionModel:
    torch.manual_seed(0)
    return HSENetVisionModel(HSENetVisionConfig(**{**VISION, **changes})).eval()


def clip_model(guidance: str = "none", **changes) -> HSENetCLIPModel:
    torch.manual_seed(0)
    slices = {"slice_config": SLICES, "num_slices": NUM_SLICES} if guidance == "slices" else {}
    config = HSENetCLIPConfig(
        guidance=guidance,
        vision_config=VISION,
        text_config=text_config("bert", max_position_embeddings=64),
        projection_dim=16,
        **{**slices, **changes},
    )
    return HSENetCLIPModel(config).eval()


def generation_model(**changes) -> HSENetForConditionalGeneration:
    torch.manual_seed(0)
    settings = {
        "vision_config": VISION,
        "slice_config": SLICES,
        "num_slices": NUM_SLICES,
        "text_config": text_config(),
        "packer_window_size": WINDOW,
        "image_token_id": 1,
        "initializer_range": 0.2,
    }
    return HSENetForConditionalGeneration(HSENetConfig(**{**settings, **changes})).eval()


def image_processor(**changes) -> HSENetImageProcessor:
    settings = {"image_size": IMAGE_SIZE, "num_slices": NUM_SLICES, "slice_size": SLICE_SIZE}
    return HSENetImageProcessor(**{**settings, **changes})


def processor(model: HSENetForConditionalGeneration | None = None) -> HSENetProcessor:
    length = model.config.image_seq_length if model is not None else None
    return HSENetProcessor(image_processor(), tokenizer(), image_seq_length=length)


def scan(seed: int = 0, shape: tuple[int, int, int] = (10, 40, 36)) -> np.ndarray:
    """A lopsided body of soft tissue with an air cavity, in HU, (D, H, W)."""
    generator = np.random.default_rng(seed)
    array = np.full(shape, -1000, dtype=np.float32)
    depth, height, width = shape
    array[:, height // 8 : -height // 8, width // 8 : -width // 4] = 40
    array[depth // 3 :, height // 4 : height // 2, width // 4 : width // 2] = -850
    return array + generator.normal(0, 15, shape).astype(np.float32)


def write_scan(path: Path, flips: tuple[int, ...] = ()) -> Path:
    """`scan` as a NIfTI file; bodies that lie differently, to which the tiny model gives different answers."""
    image = nibabel.Nifti1Image(np.flip(scan(), flips).transpose(2, 1, 0), np.diag([-8.0, -8.0, 10.0, 1.0]))
    nibabel.save(image, path)
    return path


def save_generation(folder: Path, model: HSENetForConditionalGeneration | None = None) -> Path:
    """A model that writes with its processor, as `from_pretrained` takes them."""
    model = model or generation_model()
    model.save_pretrained(folder)
    processor(model).save_pretrained(folder)
    return folder


def bert(folder: Path, **changes) -> str:
    """A BERT of transformers with its tokenizer, saved; with `id2label` one that classifies."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "no", "effusion", "nodule", "seen", "is", "a", "."]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(words))
    vocabulary = BertTokenizerFast(str(folder / "vocab.txt"))
    vocabulary.model_max_length = 16
    vocabulary.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    config = BertConfig(vocab_size=len(words), max_position_embeddings=16, **sizes, **changes)
    (BertForSequenceClassification if changes else BertModel)(config).save_pretrained(folder)
    return str(folder)
