"""What computing once, and each option of training, is worth: seconds of a training step with and without.

    python benchmarks/training_steps.py               # all pairs, about ten minutes on one quiet core
    python benchmarks/training_steps.py --pairs stage2 stage3

The widths and the token counts are the paper's, the number of layers and the batch are not: `--layers 12` for the
encoders' own. Both sides of a pair alternate in one process on one thread, and their CPU time is compared, so that
other load on the machine matters little. For caches the ratio that the operations alone predict is printed beside it.
Weights are random.
"""

import argparse
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from operation_count import language_model, packers, text_encoder, vision_encoder
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from transformers import BertConfig, Phi3Config

from configuration_hsenet import HSENetCLIPConfig, HSENetConfig
from hsenet.adapters import lora_config
from hsenet.compilation import compile_layers
from hsenet.contrastive import Anchor, ConsistencyArguments, ContrastiveArguments, ContrastiveObjective
from hsenet.frozen_features import CachedEmbeddings, ComputedEmbeddings
from modeling_hsenet import HSENetCLIPModel, HSENetForConditionalGeneration


Step = Callable[[], torch.Tensor]
ROWS = 2
TEXT_TOKENS = 300  # of a report
ANSWER_TOKENS = 34  # of a question's row beside the volume's tokens
SLICES = {"image_size": (1, 224, 224), "patch_size": (1, 16, 16), "num_channels": 3, "qkv_bias": True}
VOCABULARY = 32_000


class Sides:
    """The two sides of a pair; each reads its inputs from a file, as training does, and makes an optimiser's step."""

    def __init__(self, model: torch.nn.Module, **optimizer: Any):
        self.trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=0.0, **optimizer)
        self.folder = tempfile.TemporaryDirectory()

    def step(self, loss_of: Callable[[dict], torch.Tensor], inputs: dict[str, torch.Tensor]) -> Step:
        path = Path(self.folder.name) / f"{len(list(Path(self.folder.name).iterdir()))}.safetensors"
        save_file(inputs, path)

        def run() -> torch.Tensor:
            loss = loss_of(load_file(path))
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            return loss.detach()

        return run


def clip_config(layers: int, guidance: str) -> HSENetCLIPConfig:
    slices = {"slice_config": {**SLICES, "num_hidden_layers": layers}} if guidance == "slices" else {}
    return HSENetCLIPConfig(
        guidance=guidance,
        vision_config={"num_hidden_layers": layers},
        text_config=BertConfig(num_hidden_layers=layers, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0),
        **slices,
    )


def clip_inputs(config: HSENetCLIPConfig) -> dict[str, torch.Tensor]:
    return {
        "input_ids": torch.randint(1000, 20_000, (ROWS, TEXT_TOKENS)),
        "attention_mask": torch.ones(ROWS, TEXT_TOKENS, dtype=torch.long),
        "pixel_values": torch.rand(ROWS, 1, *config.vision_config.image_size),
        "index": torch.arange(ROWS),
        "sibling_ids": torch.arange(2 * ROWS).reshape(ROWS, 2),
    }


def stage2(layers: int) -> tuple[Step, Step, float]:
    """Neither slice features nor the anchor's embeddings cached, and both."""
    run = Accelerator(cpu=True)
    config, anchor = clip_config(layers, "slices"), HSENetCLIPModel(clip_config(layers, "none")).eval()
    config.vision_config.scorer_dropout = 0.0
    model = HSENetCLIPModel(config).train()
    model.slice_encoder.requires_grad_(False).eval()
    inputs = clip_inputs(config)
    slices = torch.rand(ROWS, config.num_slices, 3, *SLICES["image_size"][1:])
    computed = ComputedEmbeddings(anchor, 0, run)
    known = CachedEmbeddings(*computed(inputs["index"], inputs))
    with torch.no_grad():
        features = model.get_slice_features(slices).contiguous()

    def objective(embeddings: CachedEmbeddings | ComputedEmbeddings) -> Callable[[dict], torch.Tensor]:
        held_by = Anchor(embeddings, anchor.logit_scale.detach().exp(), ConsistencyArguments())
        contrastive = ContrastiveObjective(run, ContrastiveArguments(), held_by)
        return lambda batch: contrastive(model, batch, 0)[0]

    sides = Sides(model)
    neither = sides.step(objective(computed), {**inputs, "slice_pixel_values": slices})
    both = sides.step(objective(known), {**inputs, "slice_features": features})
    trained = 3 * (vision_encoder(config.vision_config, config.num_slices) + text_encoder(config.text_config, 300))
    once = vision_encoder(anchor.config.vision_config) + text_encoder(anchor.config.text_config, TEXT_TOKENS)
    once += config.num_slices * vision_encoder(config.slice_config)
    return neither, both, (trained + once) / trained


def stage3_model(layers: int) -> tuple[HSENetForConditionalGeneration, torch.nn.Module]:
    """The model, and the same with LoRA, as it trains."""
    text = Phi3Config(
        vocab_size=VOCABULARY, hidden_size=1536, intermediate_size=4096, num_hidden_layers=2 * layers,
        num_attention_heads=12, num_key_value_heads=4, pad_token_id=0,
    )  # fmt: skip
    config = HSENetConfig(
        vision_config={"num_hidden_layers": layers}, text_config=text, packer_dropout=0.0, image_token_id=1,
        slice_config={**SLICES, "num_hidden_layers": 1},
    )  # fmt: skip
    base = HSENetForConditionalGeneration(config)
    model = get_peft_model(base, lora_config(base, dropout=0.0)).train()
    for encoder in (base.model.global_encoder, base.model.local_encoder):
        encoder.eval()
    return base, model


def packing(layers: int) -> tuple[Step, Step, None]:
    """Four questions of a volume in four rows, and in one row that has the volume's tokens once; patches cached."""
    base, model = stage3_model(layers)
    config, questions, volume = base.config, 4, base.config.image_seq_length
    width, patches = config.vision_config.hidden_size, math.prod(config.vision_config.grid_size)
    names = ("global_patch_features", "local_patch_features")
    features = {name: torch.randn(1, patches, width) for name in names}
    ids = torch.randint(2, VOCABULARY, (questions, volume + ANSWER_TOKENS))
    ids[:, :volume] = config.image_token_id
    answers = torch.arange(volume + ANSWER_TOKENS) >= volume + ANSWER_TOKENS // 2
    labels = ids.masked_fill(~answers, -100)
    apart = {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}
    apart |= {name: tensor.repeat(questions, 1, 1) for name, tensor in features.items()}
    turns = torch.cat([torch.zeros(volume), torch.arange(1, questions + 1).repeat_interleave(ANSWER_TOKENS)])
    seen = ((turns[:, None] == turns) | (turns == 0)).tril()  # the volume and the own question
    positions = torch.cat([torch.arange(volume), volume + torch.arange(ANSWER_TOKENS).repeat(questions)])
    together = {
        "input_ids": torch.cat([ids[0, :volume], ids[:, volume:].flatten()])[None],
        "labels": torch.cat([labels[0, :volume], labels[:, volume:].flatten()])[None],
        "attention_mask": torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)[None, None],
        "position_ids": positions[None],
        **features,
    }
    sides = Sides(model)
    return *(sides.step(lambda batch: model(**batch).loss, inputs) for inputs in (apart, together)), None


def stage3(layers: int) -> tuple[Step, Step, float]:
    """Encoders run in every step, and their patch features cached; slice features are cached on both sides."""
    base, model = stage3_model(layers)
    config, text = base.config, base.config.text_config
    tokens = config.image_seq_length + ANSWER_TOKENS
    ids = torch.randint(2, VOCABULARY, (ROWS, tokens))
    ids[:, : config.image_seq_length] = config.image_token_id
    labels = ids.masked_fill(torch.arange(tokens) < tokens - ANSWER_TOKENS // 2, -100)
    texts = {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}
    volumes = {
        "pixel_values": torch.rand(ROWS, 1, *config.vision_config.image_size),
        "slice_features": torch.randn(ROWS, config.num_slices, config.local_vision_config.slice_hidden_size),
    }
    with torch.no_grad():
        features = base.get_patch_features(**volumes)
    patches = {name: features[name].contiguous() for name in ("global_patch_features", "local_patch_features")}
    sides = Sides(model)
    computed = sides.step(lambda batch: model(**batch).loss, {**texts, **volumes})
    cached = sides.step(lambda batch: model(**batch).loss, {**texts, **patches})
    encoders = vision_encoder(config.vision_config) + vision_encoder(config.local_vision_config, config.num_slices)
    rest = 3 * packers(config) + 2 * language_model(text, tokens, ANSWER_TOKENS // 2)
    return computed, cached, (encoders + rest) / rest


def answer_logits(layers: int) -> tuple[Step, Step, None]:
    """Logits of all positions of a report's row, and of its answer's: output head and loss alone, 200k words."""
    width, words, tokens, answer = 1024, 200_064, 588, 332
    head = torch.nn.Linear(width, words, bias=False).requires_grad_(False)
    scale = torch.nn.Parameter(torch.ones(width))
    labels = torch.randint(words, (tokens,)).masked_fill(torch.arange(tokens) < tokens - answer, -100)
    sides, inputs = Sides(torch.nn.ParameterList([scale])), {"states": torch.randn(tokens, width), "labels": labels}

    def everywhere(batch: dict) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(head(batch["states"] * scale), batch["labels"])

    def at_answers(batch: dict) -> torch.Tensor:
        kept = batch["labels"] != -100
        return torch.nn.functional.cross_entropy(head((batch["states"] * scale)[kept]), batch["labels"][kept])

    return sides.step(everywhere, inputs), sides.step(at_answers, inputs), None


def option(
    layers: int, *, patch_dropout: float = 0.0, checkpointing: bool = False, bf16: bool = False, fused: bool = False,
    compiled: bool = False,
) -> tuple[Step, Step, None]:  # fmt: skip
    """Stage 1 without the option, and with it."""

    def side(*, on: bool) -> Step:
        run = Accelerator(cpu=True)
        torch.manual_seed(0)
        model = HSENetCLIPModel(clip_config(layers, "none")).train()
        if on:
            model.vision_model.config.patch_dropout = patch_dropout
            if checkpointing:
                model.gradient_checkpointing_enable()
        if on and compiled:
            compile_layers(model)
        contrastive = ContrastiveObjective(run, ContrastiveArguments())

        def loss_of(batch: dict) -> torch.Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=on and bf16):
                return contrastive(model, batch, 0)[0]

        return Sides(model, fused=on and fused).step(loss_of, clip_inputs(model.config))

    return side(on=False), side(on=True), None


PAIRS: dict[str, Callable[[int], tuple[Step, Step, float | None]]] = {
    "stage2": stage2,
    "stage3": stage3,
    "answer_logits": answer_logits,
    "packing": packing,
    "patch_dropout": lambda layers: option(layers, patch_dropout=0.5),
    "gradient_checkpointing": lambda layers: option(layers, checkpointing=True),
    "bf16": lambda layers: option(layers, bf16=True),
    "fused": lambda layers: option(layers, fused=True),
    "compile": lambda layers: option(layers, compiled=True),
}


def seconds(step: Step) -> float:
    start = time.process_time()
    step()
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pairs", nargs="+", choices=PAIRS, default=list(PAIRS))
    parser.add_argument("--layers", type=int, default=2, help="of each encoder; the paper's have 12")
    parser.add_argument("--rounds", type=int, default=5, help="steps of each side")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"One thread, {arguments.layers} layers an encoder, {ROWS} rows a step, torch {torch.__version__}")
    print(
        f"{'pair':24}{'without s':>11}{'with s':>9}{'ratio':>8}{'range':>14}{'predicted':>11}{'loss differs by':>17}"
    )
    for name in arguments.pairs:
        torch.manual_seed(0)
        without, with_it, predicted = PAIRS[name](arguments.layers)
        difference = abs(float(without()) / float(with_it()) - 1)  # a warm-up, too
        rounds = [(seconds(without), seconds(with_it)) for _ in range(arguments.rounds)]
        ratios = sorted(a / b for a, b in rounds)
        medians = [statistics.median(side) for side in zip(*rounds, strict=True)]
        spread = f"{ratios[0]:.2f} to {ratios[-1]:.2f}"
        expected = f"{predicted:.2f}" if predicted is not None else ""
        print(
            f"{name:24}{medians[0]:11.2f}{medians[1]:9.2f}{statistics.median(ratios):8.2f}{spread:>14}{expected:>11}"
            f"{difference:17.1e}",
            flush=True,
        )


if __name__ == "__main__":
    main()
