# Copyright 2026 The HSENet package authors. Licensed under the Apache License, Version 2.0.
"""What a training program leaves: a folder that loads, with what says what it is, and the same on the Hub."""

from pathlib import Path

from accelerate import Accelerator
from transformers import PreTrainedModel

from hsenet.arguments import TrainingArguments
from hsenet.cards import write_model_card
from hsenet.fingerprint import store_fingerprint
from hsenet.model_folder import INDEX, SINGLE
from hsenet.publishing import PublishingError, push_model
from processing_hsenet import HSENetProcessor


def save_trained(model: PreTrainedModel, processor: HSENetProcessor, arguments: TrainingArguments) -> None:
    """
    Model, processor, fingerprint and card into the output directory; on the main process alone.

    The fingerprint loads what was saved once more, in float32 in the CPU's memory, and runs it once.
    """
    for name in (SINGLE, INDEX):  # of an earlier run: transformers leaves them, and loads the one file first
        (Path(arguments.output_dir) / name).unlink(missing_ok=True)
    model.save_pretrained(arguments.output_dir, max_shard_size=arguments.max_shard_size)
    processor.save_pretrained(arguments.output_dir)
    store_fingerprint(arguments.output_dir)
    write_model_card(arguments.output_dir, repo_id=arguments.push_to_hub)


def push_trained(accelerator: Accelerator, arguments: TrainingArguments) -> None:
    """
    Uploads what the output directory holds, if the run was told to; to be called when all is saved.

    Raises:
        [`PublishingError`]: it was not uploaded. The message says how to try again without training.
    """
    if arguments.push_to_hub is None or not accelerator.is_main_process:
        return
    try:
        commit = push_model(arguments.output_dir, arguments.push_to_hub, private=arguments.hub_private)
    except PublishingError as error:
        public = "" if arguments.hub_private else " --public"
        raise PublishingError(
            f"The trained model is saved, but not uploaded. {error} To try again without training: "
            f"hsenet push {arguments.output_dir} {arguments.push_to_hub}{public}"
        ) from error
    print(f"Uploaded: {commit.commit_url}")
