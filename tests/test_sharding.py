"""FSDP2 on two processes without a GPU: gradients, clipping, steps, checkpoints and the saved folder.

Accelerate does not shard on CPUs; told that it does, it takes the same path as on GPUs, with torch's own `fully_shard`
on a mesh of gloo processes.
"""

import json

import contrastive_cases as cases
import processes
import pytest
import test_accumulation
import tiny
import torch
from accelerate import Accelerator
from peft import get_peft_model
from torch import nn
from torch.distributed.tensor import DTensor

from hsenet.accumulation import with_num_items
from hsenet.adapters import lora_config
from hsenet.contrastive import ContrastiveArguments, ContrastiveObjective
from hsenet.sharding import WholeModel
from hsenet.training import parameter_groups
from modeling_hsenet import HSENetCLIPModel, HSENetForConditionalGeneration


def full(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameter_groups(model, 0.1), lr=1e-2)


def train_step(accelerator: Accelerator, model: nn.Module, optimizer, backward) -> tuple[dict, float]:
    """Gradients before clipping, and their norm."""
    with accelerator.accumulate(model):
        backward(model)
        gradients = {n: full(p.grad).clone() for n, p in model.named_parameters() if p.grad is not None}
        norm = full(accelerator.clip_grad_norm_(model.parameters(), 0.5)).item()
        optimizer.step()
        optimizer.zero_grad()
    return gradients, norm


def contrastive(accelerator: Accelerator, folder: str) -> dict:
    """Stage 2 in chunks, sharded: a step, a checkpoint, another step, the checkpoint again, and the folder."""
    processes.shard_on_cpu(accelerator, ["HSENetEncoderLayer", "BertLayer"])
    model = cases.model("slices", torch.float64)
    whole = WholeModel(accelerator, model)
    model, optimizer = accelerator.prepare(model, optimizer_of(model))
    sharded = [name for name, parameter in model.named_parameters() if isinstance(parameter, DTensor)]
    assert set(dict(model.named_parameters())) - set(sharded) == {"logit_scale"}
    weight = dict(model.named_parameters())["vision_model.layers.0.mlp.fc1.weight"]
    assert weight.to_local().numel() == weight.numel() // 2
    objective = ContrastiveObjective(
        accelerator, ContrastiveArguments("masked", 3), cases.anchor("slices", torch.float64)
    )
    batch = cases.batch("slices", torch.float64)
    mine = {name: tensor.chunk(2)[accelerator.process_index] for name, tensor in batch.items()}

    def backward(model: nn.Module) -> None:
        accelerator.backward(objective(model, mine, cases.STEP)[0])

    gradients, norm = train_step(accelerator, model, optimizer, backward)
    accelerator.save_state(f"{folder}/state")
    train_step(accelerator, model, optimizer, backward)
    accelerator.load_state(f"{folder}/state")
    plain = whole(model)
    assert (plain is None) == (not accelerator.is_main_process)
    if plain is not None:
        plain.save_pretrained(f"{folder}/model")
    return {"gradients": gradients, "norm": norm}


def lora_model() -> nn.Module:
    model = tiny.generation_model()
    torch.manual_seed(1)
    peft_model = get_peft_model(model, lora_config(model, r=4, alpha=8, dropout=0.0)).double()
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "lora_B" in name:  # zero at the start: lora_A would get no gradient
                parameter.normal_(std=0.1)
    return peft_model


def language(accelerator: Accelerator, folder: str) -> dict:
    """Stage 3 with LoRA, sharded: a step of one row in each process, and both folders."""
    processes.shard_on_cpu(accelerator, ["HSENetEncoderLayer", "Phi3DecoderLayer"])
    model = lora_model()
    whole = WholeModel(accelerator, model)
    model, optimizer = accelerator.prepare(model, optimizer_of(model))
    row = test_accumulation.rows()[accelerator.process_index]
    batch = next(with_num_items([row], accelerator))

    def backward(model: nn.Module) -> None:
        accelerator.backward(model(**batch).loss)

    gradients, norm = train_step(accelerator, model, optimizer, backward)
    plain = whole(model)
    if plain is not None:
        plain.save_pretrained(f"{folder}/adapter")
        plain.merge_and_unload().save_pretrained(f"{folder}/language")
    return {"gradients": gradients, "norm": norm}


def reference_step(model: nn.Module, loss: torch.Tensor) -> tuple[dict, float]:
    """The same without processes and shards; the model has taken it."""
    optimizer = optimizer_of(model)
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    norm = nn.utils.clip_grad_norm_(model.parameters(), 0.5).item()
    optimizer.step()
    return gradients, norm


def check(found: list[dict], gradients: dict, norm: float, bound: float) -> None:
    assert norm > 0.5  # else nothing would have been clipped
    for process in found:
        assert process["norm"] == pytest.approx(norm, rel=bound)
        assert process["gradients"].keys() == gradients.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(process["gradients"][name], gradient, atol=bound, rtol=bound)


def test_stage2_sharded_takes_the_step_of_one_process(tmp_path):
    found = processes.run(contrastive, 2, 29647, tmp_path, str(tmp_path))
    model = cases.model("slices", torch.float64)
    loss = cases.plain_loss(model, "slices", "masked", cases.batch("slices", torch.float64), range(cases.ROWS))
    check(found, *reference_step(model, loss), bound=1e-12)
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["architectures"] == ["HSENetCLIPModel"]
    assert config["auto_map"]["AutoModel"] == "modeling_hsenet.HSENetCLIPModel"
    saved = HSENetCLIPModel.from_pretrained(tmp_path / "model").state_dict()
    for name, tensor in model.state_dict().items():  # the checkpoint's, not those of the step after it
        torch.testing.assert_close(saved[name], tensor, atol=1e-10, rtol=1e-7)


def test_stage3_sharded_takes_the_step_of_one_process(tmp_path):
    found = processes.run(language, 2, 29648, tmp_path, str(tmp_path))
    model, rows = lora_model(), test_accumulation.rows()[:2]
    losses = torch.cat([test_accumulation.token_losses(model, row) for row in rows])
    check(found, *reference_step(model, losses.mean()), bound=1e-5)  # transformers' loss is in float32
    merged = model.merge_and_unload().state_dict()
    saved = HSENetForConditionalGeneration.from_pretrained(tmp_path / "language").state_dict()
    assert saved.keys() == merged.keys()
    for name, tensor in merged.items():
        torch.testing.assert_close(saved[name], tensor, atol=1e-4, rtol=1e-4)
