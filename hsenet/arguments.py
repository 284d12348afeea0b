"""What the training programs are told: their settings from a YAML file and the command line."""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import yaml
from transformers import HfArgumentParser

from hsenet.augmentation import AugmentationArguments


@dataclass
class DataArguments(AugmentationArguments):
    dataset: str = field(default="", metadata={"help": "Dataset folder or Hub id with `reports` (and `vqa`) rows."})
    train_split: str = field(default="train")
    eval_split: str = field(default="validation", metadata={"help": "Never the split of the final evaluation."})
    test_splits: list[str] = field(
        default_factory=lambda: ["test"],
        metadata={"help": "Splits for the final evaluation alone: refused for training and for choosing."},
    )
    max_train_rows: int | None = field(default=None, metadata={"help": "Use only the first rows."})
    max_eval_rows: int | None = field(default=None, metadata={"help": "Evaluate on the first rows while training."})
    max_length: int = field(default=512, metadata={"help": "Longest text (stage 3: prompt and answer) in tokens."})
    report_fields: list[str] = field(default_factory=lambda: ["findings", "impression"])
    question_types: list[str] = field(
        default_factory=list, metadata={"help": "Stage 3: only questions of these types; empty: all."}
    )
    cache_dir: str = field(default="outputs/cache", metadata={"help": "Where preprocessed volumes are kept."})
    num_workers: int = field(default=0, metadata={"help": "Processes that read scans while the cache is built."})
    max_failures: int = field(default=0, metadata={"help": "How many unreadable volumes may be left out."})
    cache_only: bool = field(default=False, metadata={"help": "Build the cache and end."})
    loader_workers: int = field(default=0, metadata={"help": "Processes that load batches while training."})

    def __post_init__(self):
        super().__post_init__()
        for name in ("train_split", "eval_split"):
            # "train[:90%]+test" is a split too.
            parts = {part.split("[")[0].strip() for part in getattr(self, name).split("+")}
            if refused := sorted(parts & set(self.test_splits)):
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}, but {refused[0]!r} is for the final evaluation alone: what "
                    "it chose could not be measured on it any more. Use another split, or say with test_splits what "
                    "this corpus calls the splits of its final evaluation."
                )


@dataclass
class TrainingArguments:
    output_dir: str = field(default="", metadata={"help": "The trained model and the run's checkpoints go here."})
    seed: int = field(default=42)
    learning_rate: float = field(default=1e-4)
    weight_decay: float = field(default=0.1)
    adam_beta2: float = field(default=0.999)
    max_grad_norm: float = field(default=1.0)
    warmup_ratio: float = field(default=0.03, metadata={"help": "Share of the steps with a rising learning rate."})
    num_train_epochs: int = field(default=1)
    max_steps: int = field(default=-1, metadata={"help": "Stop after so many steps; -1: after all epochs."})
    batch_size: int = field(default=3, metadata={"help": "Rows of one process in one forward pass."})
    gradient_accumulation_steps: int = field(default=1)
    gradient_checkpointing: bool = field(default=False)
    mixed_precision: str = field(default="no", metadata={"help": "no, bf16 or fp16"})
    optim: Literal["adamw_torch", "adamw_torch_fused"] = field(
        default="adamw_torch", metadata={"help": "AdamW, or the same in fewer passes over the weights."}
    )
    torch_compile: bool = field(
        default=False, metadata={"help": "Layers compiled by torch: worth its minute at the start on a GPU."}
    )
    logging_steps: int = field(default=10)
    eval_steps: int = field(default=-1, metadata={"help": "Evaluate every so many steps; -1: only at the end."})
    save_steps: int = field(
        default=-1, metadata={"help": "Write a checkpoint every so many steps; -1: only when told to end."}
    )
    save_total_limit: int = field(default=2, metadata={"help": "Checkpoints kept, beside the best one."})
    resume: bool = field(default=True, metadata={"help": "Continue from the newest checkpoint in output_dir."})
    metric_for_best_model: str | None = field(
        default=None, metadata={"help": "A metric of the evaluation (such as loss): its best checkpoint is kept."}
    )
    greater_is_better: bool | None = field(
        default=None, metadata={"help": "Of that metric; not given: unless its name ends with loss."}
    )
    load_best_model_at_end: bool = field(default=False, metadata={"help": "The trained model is the best one."})
    early_stopping_patience: int = field(
        default=0, metadata={"help": "End after so many evaluations without a better metric; 0: never."}
    )
    early_stopping_threshold: float = field(default=0.0, metadata={"help": "What counts as better than before."})
    max_shard_size: str = field(
        default="5GB", metadata={"help": "The trained model's weights are saved in files of at most this size."}
    )
    report_to: list[str] = field(default_factory=list, metadata={"help": "tensorboard, wandb, ..."})
    push_to_hub: str | None = field(
        default=None, metadata={"help": "OWNER/NAME on the Hub to upload the trained model to, at the end."}
    )
    hub_private: bool = field(default=True, metadata={"help": "For its owner's eyes only; false: for everybody's."})
    # All settings of the run, without local paths, as `start` records them.
    settings: dict = field(default_factory=dict, init=False)

    def __post_init__(self):
        chooses = self.load_best_model_at_end or self.early_stopping_patience > 0
        if chooses and self.metric_for_best_model is None:
            raise ValueError(
                "load_best_model_at_end and early_stopping_patience need metric_for_best_model: say which."
            )
        if self.early_stopping_patience > 0 and self.eval_steps <= 0:
            raise ValueError(
                "early_stopping_patience counts evaluations: set eval_steps, which is -1 (only at the end)."
            )
        if self.save_total_limit < 1:
            raise ValueError(f"save_total_limit should be at least 1, got {self.save_total_limit}.")


def parse_arguments(*dataclasses: type, argv: list[str] | None = None, prog: str | None = None) -> tuple:
    """
    Dataclasses from `--config file.yaml`, whose values become defaults, and from the command line, which wins.

    Args:
        argv: default: that of the process.
        prog: what the help calls the program; default: its file.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    settings = {}
    if "--config" in argv:
        position = argv.index("--config")
        if position + 1 == len(argv):
            raise ValueError("--config: expected a file, got none.")
        settings = yaml.safe_load(Path(argv[position + 1]).read_text())
        del argv[position : position + 2]
    parser = HfArgumentParser(dataclasses, prog=prog)
    known = {action.dest for action in parser._actions}
    if unknown := sorted(set(settings) - known):
        raise ValueError(f"Unknown settings in the configuration file: {', '.join(unknown)}.")
    parser.set_defaults(**settings)
    for action in parser._actions:
        if action.type is dict:  # on the command line a dictionary is JSON
            action.type = json.loads
    parsed = parser.parse_args_into_dataclasses(argv)
    for name, value in ((name, value) for group in parsed for name, value in vars(group).items()):
        if value == "":  # the default of what every run has to say
            raise ValueError(f"--{name} is missing: give it on the command line or in the configuration file.")
    return parsed
