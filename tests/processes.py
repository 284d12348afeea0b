"""Real processes on one machine, which find each other through gloo, for what several of them compute together."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import multiprocessing


def _process(rank: int, work: Callable, world_size: int, port: int, folder: str, arguments: tuple) -> None:
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    os.environ.update(where, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == world_size
    torch.save(work(accelerator, *arguments), Path(folder) / f"{world_size}-{rank}.pt")
    accelerator.end_training()


def run(work: Callable[..., Any], world_size: int, port: int, folder: Path, *arguments) -> list[Any]:
    """What `work(accelerator, *arguments)`, a function of a module, gives in each process."""
    multiprocessing.spawn(_process, (work, world_size, port, str(folder), arguments), nprocs=world_size)
    return [torch.load(folder / f"{world_size}-{rank}.pt", weights_only=True) for rank in range(world_size)]


def shard_on_cpu(accelerator: Accelerator, layers: list[str]) -> None:
    """Each of `layers` by itself, as `accelerate launch` with FSDP2 has it on GPUs; before anything is prepared."""
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=layers,
        cpu_ram_efficient_loading=False,
    )
    for state in (AcceleratorState._shared_state, PartialState._shared_state):
        state["distributed_type"] = DistributedType.FSDP
    accelerator.state.fsdp_plugin = plugin
    assert accelerator.is_fsdp2
