"""What FSDP2 needs beside its configuration file: scalars that stay whole, and the whole model back.

FSDP2 leaves each process a part of every weight. Evaluation on the main process, and the folder that a run leaves,
need the model as it was before.
"""

import copy
import os

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn


class WholeModel:
    """
    The model without sharding, whenever it is asked for. Make it before `accelerator.prepare`.

    Where nothing is sharded it is the unwrapped model itself. Else it is a plain model of the same classes, on the
    main process alone, with weights that are gathered at each call.
    """

    def __init__(self, accelerator: Accelerator, model: nn.Module):
        self.accelerator = accelerator
        self.skeleton = None
        if is_sharded(accelerator):
            # No second copy of the weights: those of the skeleton have shapes only.
            empty = {id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in model.parameters()}
            self.skeleton = copy.deepcopy(model, empty)
        if accelerator.is_fsdp2:
            _keep_scalars_whole(accelerator, model)

    def __call__(self, model: nn.Module) -> nn.Module | None:
        """Of the prepared model; on all processes together. `None` where another process has it."""
        if self.skeleton is None:
            return self.accelerator.unwrap_model(model)
        weights = self.accelerator.get_state_dict(model)
        if not self.accelerator.is_main_process:
            return None
        self.skeleton.load_state_dict(weights, assign=True)
        if hasattr(self.skeleton, "tie_weights"):
            self.skeleton.tie_weights()
        return self.skeleton.to(self.accelerator.device)


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether no process has the whole model."""
    return accelerator.distributed_type == DistributedType.FSDP


def refuse_deepspeed() -> None:
    """
    To be called before there is an accelerator: on CPUs accelerate leaves DeepSpeed out and says nothing.

    Raises:
        ValueError: the launcher was told to use it.
    """
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        raise ValueError(
            "DeepSpeed is not supported: it fails on a scalar parameter, which the temperature of stages 1 and 2 is, "
            "and it reads its checkpoints with an unpickler that can run any code in them. FSDP2 shards the same "
            "things: launch with train/configs/accelerate/fsdp2.yaml, or fsdp2_stage3.yaml."
        )


def _keep_scalars_whole(accelerator: Accelerator, model: nn.Module) -> None:
    """FSDP2 shards along a dimension, and a scalar, the temperature, has none. `average_gradient` is its share."""
    scalars = [parameter for parameter in model.parameters() if parameter.ndim == 0]
    if not scalars:
        return
    plugin = accelerator.state.fsdp_plugin
    if isinstance(plugin.ignored_modules, str):
        raise ValueError("fsdp_ignored_modules should not be set: it is needed for parameters that cannot be sharded.")
    if plugin.cpu_ram_efficient_loading:
        raise ValueError("fsdp_cpu_ram_efficient_loading should be false: it puts other parameters in their places.")
    with torch.no_grad():
        for scalar in scalars:
            scalar.data = scalar.data.to(accelerator.device)  # FSDP2 moves only what it shards
    plugin.ignored_modules = [*(plugin.ignored_modules or []), nn.ParameterList(scalars)]
