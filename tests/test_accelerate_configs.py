"""The files for `accelerate launch --config_file`, read by accelerate itself down to what its processes are told."""

from pathlib import Path

import pytest
import tiny
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_multi_gpu_env


FOLDER = Path(__file__).parents[1] / "train" / "configs" / "accelerate"
TYPES = {"ddp": "MULTI_GPU", "fsdp2": "FSDP", "fsdp2_stage3": "FSDP"}


def environment(name: str) -> dict[str, str]:
    """Of the processes that `accelerate launch` starts on two machines of four GPUs."""
    cluster = ["--num_machines", "2", "--num_processes", "8", "--machine_rank", "1", "--main_process_ip", "10.0.0.1"]
    command = ["--config_file", str(FOLDER / f"{name}.yaml"), *cluster, "--main_process_port", "29500", "program.py"]
    arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args(command))
    told = prepare_multi_gpu_env(arguments)
    assert (arguments.nnodes, arguments.nproc_per_node, int(arguments.node_rank)) == ("2", "4", 1)
    return told


def test_every_file_is_known():
    assert {path.stem for path in FOLDER.glob("*.yaml")} == set(TYPES)


@pytest.mark.parametrize("name", TYPES)
def test_accelerate_reads_the_file(name):
    config = load_config_from_file(str(FOLDER / f"{name}.yaml"))
    assert config.distributed_type == DistributedType(TYPES[name])
    assert ("ACCELERATE_USE_FSDP" in environment(name)) == name.startswith("fsdp2")


@pytest.mark.parametrize(
    ("name", "model"),
    [("fsdp2", tiny.clip_model), ("fsdp2_stage3", tiny.generation_model)],
)
def test_fsdp2_wraps_layers_that_the_models_have(name, model, monkeypatch):
    for variable, value in environment(name).items():
        monkeypatch.setenv(variable, value)
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2 and plugin.reshard_after_forward is True
    assert not plugin.cpu_ram_efficient_loading and plugin.state_dict_type.name == "SHARDED_STATE_DICT"
    plugin.set_auto_wrap_policy(model())  # an error if a class is not there
    assert len(plugin.transformer_cls_names_to_wrap) == 2
