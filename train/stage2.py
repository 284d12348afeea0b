"""Stage 2: the local 3D encoder (2E3), guided by 2D slices and anchored to stage 1 (paper section 3.2).

    accelerate launch train/stage2.py --config train/configs/quickstart/stage2.yaml
    accelerate launch --num_processes 8 train/stage2.py --config train/configs/paper/stage2.yaml --dataset DIR \
        --stage1 outputs/stage1 --slice_encoder DIR

Needs `pip install -e ".[train]"`. The output directory loads with `AutoModel.from_pretrained(DIR)`.
"""

from dataclasses import asdict, dataclass, field
from typing import Literal

import torch
from torch.utils.data import DataLoader

from configuration_hsenet import HSENetCLIPConfig
from hsenet.collators import ContrastiveCollator
from hsenet.data import VolumeRows, load_rows, one_per_study, report_text
from hsenet.evaluation import embed, evaluate_retrieval
from hsenet.losses import (
    consistency_weight,
    global_similarity,
    image_text_contrastive_loss,
    semantic_consistency_loss,
)
from hsenet.report_augmentation import ReportAugmentation
from hsenet.training import DataArguments, TrainingArguments, parse_arguments, start, train
from hsenet.volume_cache import cache_volumes
from modeling_hsenet import HSENetCLIPModel, HSENetVisionModel
from processing_hsenet import HSENetImageProcessor, HSENetProcessor


@dataclass
class ModelArguments:
    stage1: str = field(default="", metadata={"help": "Trained stage 1: the frozen anchor, and the initialisation."})
    slice_encoder: str = field(default="", metadata={"help": "Frozen 2D encoder: a saved HSENetVisionModel."})
    init: Literal["stage1", "random"] = field(default="stage1", metadata={"help": "Where training starts from."})
    num_slices: int = field(default=32)
    scorer_residual: Literal["projected_query", "query"] = field(
        default="projected_query", metadata={"help": "What the scorer adds to its attention: see HSENetVisionConfig."}
    )
    consistency_weight: float = field(default=0.1, metadata={"help": "lambda_s of the paper; 0: no anchor."})
    consistency_schedule: Literal["constant", "linear_decay"] = field(
        default="constant",
        metadata={"help": "The weight over the steps: the paper's, or the released code's, which ends at 0."},
    )
    consistency_decay_steps: int = field(
        default=5000, metadata={"help": "With linear_decay: optimiser steps after which there is no anchor any more."}
    )
    consistency_scale: Literal["teacher", "student"] = field(
        default="teacher",
        metadata={"help": "Whose temperature scales the anchor's logits: its own, or (released) stage 2's."},
    )
    consistency_scale_gradient: bool = field(
        default=False, metadata={"help": "Whether stage 2's temperature learns from the anchor too (released: yes)."}
    )
    max_logit_scale: float = field(default=4.6052, metadata={"help": "The log temperature stays below: ln 100."})


def guided_model(anchor: HSENetCLIPModel, slice_encoder: HSENetVisionModel, arguments: ModelArguments):
    """A stage-2 model of the anchor's sizes; only its scorer is new, unless all of it is to start at random."""
    anchor_config = anchor.config.to_dict()
    config = HSENetCLIPConfig(
        guidance="slices",
        vision_config={**anchor_config["vision_config"], "scorer_residual": arguments.scorer_residual},
        text_config=anchor_config["text_config"],
        slice_config=slice_encoder.config.to_dict(),
        num_slices=arguments.num_slices,
        projection_dim=anchor.config.projection_dim,
        logit_scale_init_value=anchor.config.logit_scale_init_value,
        initializer_range=anchor.config.initializer_range,
    )
    model = HSENetCLIPModel(config)
    model.slice_encoder.load_state_dict(slice_encoder.state_dict())
    model.slice_encoder.requires_grad_(False)
    if arguments.init == "stage1":
        new = set(model.state_dict()) - set(anchor.state_dict())
        if not all(name.startswith(("vision_model.scorer.", "slice_encoder.")) for name in new):
            raise RuntimeError(f"Stage 1 does not fit: it has no weights for {sorted(new)}.")
        model.load_state_dict({**model.state_dict(), **anchor.state_dict()})
    return model


def main(model_arguments: ModelArguments, data: DataArguments, training: TrainingArguments) -> None:
    accelerator = start(training, model=asdict(model_arguments), data=asdict(data))

    ###########
    # Model   #
    ###########
    anchor = HSENetCLIPModel.from_pretrained(model_arguments.stage1).to(accelerator.device).eval()
    slice_encoder = HSENetVisionModel.from_pretrained(model_arguments.slice_encoder)
    stage1_processor = HSENetProcessor.from_pretrained(model_arguments.stage1)
    tokenizer = stage1_processor.tokenizer
    model = guided_model(anchor, slice_encoder, model_arguments)
    if training.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    image_processor = HSENetImageProcessor(
        **{
            **stage1_processor.image_processor.to_dict(),
            "num_slices": model_arguments.num_slices,
            "slice_size": slice_encoder.config.image_size[1:],
        }
    )

    ###########
    # Dataset #
    ###########
    train_rows = load_rows(data.dataset, "reports", data.train_split, data.max_train_rows)
    eval_rows = one_per_study(load_rows(data.dataset, "reports", data.eval_split, data.max_eval_rows))
    for row in train_rows + eval_rows:
        row["text"] = report_text(row, tuple(data.report_fields))
    cache = cache_volumes(
        train_rows + eval_rows,
        image_processor,
        slice_encoder,
        data.cache_dir,
        accelerator,
        data.num_workers,
        data.max_failures,
    )
    if data.cache_only:
        return accelerator.end_training()
    train_rows, eval_rows = cache.readable(train_rows), cache.readable(eval_rows)
    collator = ContrastiveCollator(tokenizer, data.max_length)
    rewrite = ReportAugmentation(tuple(data.report_fields), data.drop_sentences, training.seed)
    dataset = VolumeRows(train_rows, cache, max_shift=data.max_shift, seed=training.seed)
    loader = DataLoader(
        dataset,
        training.batch_size,
        shuffle=True,
        drop_last=True,
        collate_fn=ContrastiveCollator(tokenizer, data.max_length, rewrite if data.rewrite_reports else None),
        num_workers=data.loader_workers,
    )

    ############
    # Training #
    ############
    # The anchor is frozen and its inputs never change: its embeddings are computed once.
    if model_arguments.consistency_weight:
        without_slices = VolumeRows(train_rows, cache, with_slices=False)
        anchor_images, anchor_texts = embed(anchor, without_slices, collator, training.batch_size)

    def compute_loss(model: torch.nn.Module, batch: dict, step: int) -> tuple[torch.Tensor, dict[str, float]]:
        index = batch.pop("index").cpu()
        log_scale = accelerator.unwrap_model(model).logit_scale
        with torch.no_grad():
            log_scale.clamp_(max=model_arguments.max_logit_scale)
        outputs = model(**batch)
        similarity = global_similarity(outputs.image_embeds, outputs.text_embeds)
        loss = image_text_contrastive_loss(similarity, log_scale.exp())
        values = {"logit_scale": log_scale.exp().item()}
        if model_arguments.consistency_weight:
            anchor_similarity = global_similarity(
                anchor_images[index].to(loss.device), anchor_texts[index].to(loss.device)
            )
            consistency = semantic_consistency_loss(
                similarity,
                anchor_similarity,
                log_scale.exp(),
                anchor.logit_scale.exp() if model_arguments.consistency_scale == "teacher" else None,
                scale_gradient=model_arguments.consistency_scale_gradient,
            )
            weight = consistency_weight(
                step,
                model_arguments.consistency_weight,
                model_arguments.consistency_schedule,
                model_arguments.consistency_decay_steps,
            )
            loss = loss + weight * consistency
            values |= {"consistency": consistency.item(), "consistency_weight": weight}
        return loss, values

    def evaluate(model: HSENetCLIPModel) -> dict[str, float]:
        return evaluate_retrieval(model, VolumeRows(eval_rows, cache), collator, training.batch_size)

    model = train(accelerator, model, loader, compute_loss, evaluate, training)
    if accelerator.is_main_process:
        model.save_pretrained(training.output_dir)
        HSENetProcessor(image_processor, tokenizer).save_pretrained(training.output_dir)
    accelerator.end_training()


if __name__ == "__main__":
    main(*parse_arguments(ModelArguments, DataArguments, TrainingArguments))
