"""Peak memory of a contrastive training step, by batch and by chunk of gradient caching.

    python benchmarks/contrastive_memory.py [--batches 8 16 32 64] [--chunks 0 4 8] [--gradient_checkpointing]

A whole step of stage 1 (forward, loss, backward, AdamW) on random volumes and reports, each in a process of its own
after a first step with one row. On a CPU the figure is how far the step raises the process's peak of resident memory,
on a GPU how far torch's peak lies above what was allocated before. A chunk of 0 is the step without gradient caching.
Seconds are of one step, to show the price of the second forward pass; they are not repeated.
"""

import argparse
import json
import platform
import resource
import subprocess
import sys
import time

import torch
from accelerate import Accelerator

from configuration_hsenet import HSENetCLIPConfig
from hsenet.contrastive import ContrastiveArguments, ContrastiveObjective
from modeling_hsenet import HSENetCLIPModel


# The paper's sizes are for GPUs; the small ones keep 64 volumes within minutes on two cores.
PRESETS = {
    "small": {
        "vision_config": {
            "image_size": (16, 128, 128),
            "patch_size": (4, 16, 16),
            "hidden_size": 192,
            "intermediate_size": 768,
            "num_hidden_layers": 4,
            "num_attention_heads": 6,
        },
        "text_config": {
            "model_type": "bert",
            "vocab_size": 1000,
            "hidden_size": 192,
            "intermediate_size": 768,
            "num_hidden_layers": 2,
            "num_attention_heads": 6,
        },
        "projection_dim": 192,
    },
    "paper": {"vision_config": {}, "text_config": {"model_type": "bert"}, "projection_dim": 768},
}
TEXT_TOKENS = 128


def random_batch(config: HSENetCLIPConfig, rows: int, device: torch.device) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(config.text_config.vocab_size, (rows, TEXT_TOKENS), generator=generator)
    batch = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.rand(rows, 1, *config.vision_config.image_size, generator=generator),
        "index": torch.arange(rows),
        "sibling_ids": torch.arange(2 * rows).reshape(rows, 2),
    }
    return {name: tensor.to(device) for name, tensor in batch.items()}


def peak_mb(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(preset: str, rows: int, chunk_size: int, mixed_precision: str, gradient_checkpointing: bool) -> None:
    """In a process of its own: prints the step's MB and seconds."""
    torch.manual_seed(0)
    accelerator = Accelerator(mixed_precision=mixed_precision)
    config = HSENetCLIPConfig(guidance="none", **PRESETS[preset])
    model = HSENetCLIPModel(config).train()
    if gradient_checkpointing:
        model.gradient_checkpointing_enable()
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
    batch = random_batch(config, rows, accelerator.device)

    def step(batch: dict[str, torch.Tensor], chunk_size: int) -> None:
        objective = ContrastiveObjective(accelerator, ContrastiveArguments(chunk_size=chunk_size))
        loss, _ = objective(model, batch, 0)
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()

    step({name: tensor[:1] for name, tensor in batch.items()}, 0)
    if accelerator.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    before, start = peak_mb(accelerator.device), time.perf_counter()
    step(batch, chunk_size)
    after = peak_mb(accelerator.device)
    print(json.dumps({"mb": after - before, "seconds": time.perf_counter() - start}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--preset", choices=PRESETS, default="small", help="sizes of the model")
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 16, 32, 64])
    parser.add_argument("--chunks", type=int, nargs="+", default=[0, 4, 8], help="0: without gradient caching")
    parser.add_argument("--mixed_precision", default="no")
    parser.add_argument("--gradient_checkpointing", action="store_true", help="layers are computed again")
    parser.add_argument("--one", type=int, nargs=2, help="batch and chunk to measure (what each process runs)")
    arguments = parser.parse_args()
    if arguments.one:
        return measure(arguments.preset, *arguments.one, arguments.mixed_precision, arguments.gradient_checkpointing)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    print(f"{arguments.preset} sizes, {device}, torch {torch.__version__}, precision {arguments.mixed_precision}")
    print(f"{'MB of a step (seconds)':24}" + "".join(f"{f'batch {rows}':>18}" for rows in arguments.batches))
    for chunk_size in arguments.chunks:
        cells = []
        for rows in arguments.batches:
            command = [sys.executable, __file__, "--preset", arguments.preset, "--one", str(rows), str(chunk_size)]
            command += ["--mixed_precision", arguments.mixed_precision]
            command += ["--gradient_checkpointing"] * arguments.gradient_checkpointing
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            found = json.loads(output.splitlines()[-1])
            cells.append(f"{found['mb']:9.0f} ({found['seconds']:5.1f})")
        name = f"chunks of {chunk_size}" if chunk_size else "whole batch"
        print(f"{name:24}" + "".join(f"{cell:>18}" for cell in cells), flush=True)


if __name__ == "__main__":
    main()
