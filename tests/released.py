"""Synthetic checkpoints in the released layouts: the real names, at the real shapes or at those of tests/tiny.py."""

import json
from pathlib import Path

import tiny
import torch
from safetensors.torch import save_file
from transformers import BertConfig, Phi3Config, Phi3ForCausalLM

from modeling_hsenet import HSENetVisionModel


DATA = Path(__file__).parent / "data/checkpoints"
NUM_LAYERS = 12  # the names' number of layers, which stays
RANK = 16

# Every size of the real shapes, and its tiny counterpart.
CLIP_SIZES = {1: 1, 2: 2, 768: 32, 2304: 96, 3072: 64, 1024: 128, 2048: 64, 30522: 400, 512: 64}
VLM_SIZES = {RANK: RANK, 768: 32, 3072: 48, 5120: 96, 8192: 64, 16384: 128}
TEXT = {
    "vocab_size": 400,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
LANGUAGE = Phi3Config(
    vocab_size=410,  # more rows than the tokenizer has words, as Phi-4-mini
    hidden_size=48,
    intermediate_size=64,
    num_hidden_layers=32,
    num_attention_heads=4,
    num_key_value_heads=2,
    tie_word_embeddings=True,
    bos_token_id=0,
    eos_token_id=0,
    pad_token_id=0,
    initializer_range=0.1,
)


def shapes(name: str) -> dict[str, tuple[int, ...]]:
    """`stage1_clip`, `stage2_clip` or `vlm_trained_only`: the released file's names and shapes."""
    lines = (line.split("\t") for line in (DATA / f"keys_{name}.txt").read_text().splitlines())
    return {
        line[0]: tuple(int(size) for size in line[1].strip("()").split(",") if size.strip())
        for line in lines
        if not line[0].startswith("#")
    }


def meta_tensors(name: str) -> dict[str, torch.Tensor]:
    return {key: torch.empty(shape, device="meta") for key, shape in shapes(name).items()}


def tiny_tensors(name: str, sizes: dict[int, int], seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for key, shape in shapes(name).items():
        tensors[key] = torch.randn([sizes[size] for size in shape], generator=generator) * (
            0.1 if "lora" in key else 0.2
        )
        if "norm" in key.lower() and key.endswith("weight"):
            tensors[key] += 1
        if key.endswith("logit_scale"):
            tensors[key] = torch.tensor(3.1)
    return tensors


def clip_config(name: str, **changes) -> dict:
    sizes = {
        "img_size": tiny.IMAGE_SIZE,
        "patch_size": tiny.PATCH_SIZE,
        "hidden_size": 32,
        "mlp_dim": 64,
        "num_heads": 4,
    }
    return {**json.loads((DATA / f"config_{name}.json").read_text()), **sizes, **changes}


def write_clip(folder: Path, name: str, *, tokenizer: bool = True, **config) -> dict[str, torch.Tensor]:
    """A folder as the public code writes it, with its text encoder's configuration in `bert` below it."""
    BertConfig(**TEXT).save_pretrained(folder / "bert")
    tensors = tiny_tensors(name, CLIP_SIZES)
    save_file(tensors, folder / "model.safetensors")
    config = clip_config(name, language_model_name_or_path=str(folder / "bert"), **config)
    (folder / "config.json").write_text(json.dumps(config))
    if tokenizer:
        tiny.tokenizer(bos_token="[CLS]", pad_token="[PAD]").save_pretrained(folder)
    return tensors


def write_slice_encoder(folder: Path) -> HSENetVisionModel:
    model = tiny.vision_model(**{**tiny.SLICES, "hidden_size": 32})
    model.save_pretrained(folder)
    return model


def write_language_model(folder: Path) -> Phi3ForCausalLM:
    torch.manual_seed(0)
    model = Phi3ForCausalLM(LANGUAGE).eval()
    model.generation_config.update(eos_token_id=[7, 0], do_sample=True)  # an instruct model's, for its chat
    model.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return model


def write_vlm_file(path: Path, seed: int = 0) -> dict[str, torch.Tensor]:
    tensors = tiny_tensors("vlm_trained_only", VLM_SIZES, seed)
    torch.save(tensors, path)
    return tensors
