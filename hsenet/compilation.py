"""`torch.compile` of what a model repeats, in place: names, files and checkpoints stay what they are without."""

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer


# Of one piece of code, which all kinds of layers share (transformers wraps their forward pass): each kind may be met
# with and without gradients, with one row and with several, with texts of one length and of many.
_VARIANTS = 64


def compile_layers(model: nn.Module) -> None:
    """
    From now on the layers of all encoders and of the language model run compiled, all layers of a kind as one.

    Layers and not the whole model, because their calls are where FSDP2 gathers and releases weights. In place, because
    a wrapper would give all weights other names. Random numbers are torch's: with inductor's own, dropout would be
    another with the option than without, and a run that goes on with the option another run.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _VARIANTS)
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.compile(options={"fallback_random": True})
