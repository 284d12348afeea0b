"""Stage 3: both encoders frozen, a spatial packer for each, a language model with LoRA (paper section 3.3).

    accelerate launch train/stage3.py --config train/configs/quickstart/stage3.yaml
    accelerate launch --num_processes 8 train/stage3.py --config train/configs/paper/stage3_report.yaml --dataset DIR \
        --stage1 outputs/stage1 --stage2 outputs/stage2 --language_model microsoft/Phi-4-mini-instruct

Needs `pip install -e ".[train]"`. The output directory loads with `AutoModel.from_pretrained(DIR)`, LoRA merged; the
adapter alone lies in its folder `adapter`.
"""

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
from peft import PeftModel, get_peft_model
from torch import nn
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from configuration_hsenet import HSENetConfig
from hsenet.adapter_base import record_base
from hsenet.adapters import lora_config
from hsenet.arguments import DataArguments, TrainingArguments, parse_arguments
from hsenet.augmentation import VolumeAugmentation
from hsenet.cards import write_model_card
from hsenet.collators import ReportCollator
from hsenet.data import SimilarLengthSampler, VolumeRows, generation_rows, load_rows
from hsenet.evaluation import evaluate_language_loss
from hsenet.frozen_features import cache_patch_features
from hsenet.language_model import LanguageModelArguments, load_language_model
from hsenet.report_prompts import REPORT_PROMPTS
from hsenet.trained_model import push_trained, save_trained
from hsenet.training import start, train
from hsenet.volume_cache import cache_volumes
from modeling_hsenet import HSENetCLIPModel, HSENetForConditionalGeneration
from processing_hsenet import HSENetProcessor


IMAGE_TOKEN = "<image>"


@dataclass
class ModelArguments(LanguageModelArguments):
    stage1: str = field(default="", metadata={"help": "Trained stage 1: the global encoder."})
    stage2: str = field(default="", metadata={"help": "Trained stage 2: the local encoder and the slice encoder."})
    encoders: Literal["both", "global", "local"] = field(default="both")
    projector: Literal["spatial_packer", "spatial_pooling", "sequence_pooling", "qformer", "mlp"] = field(
        default="spatial_packer", metadata={"help": "Patches to tokens (paper table 2b): see HSENetConfig."}
    )
    qformer_num_layers: int = field(default=2)
    packer_window_size: list[int] = field(default_factory=lambda: [1, 4, 4])
    packer_dropout: float = field(default=0.1)
    packer_residual: Literal["projected_query", "query"] = field(
        default="projected_query", metadata={"help": "What a packer adds to its attention: see HSENetConfig."}
    )
    tasks: list[str] = field(default_factory=lambda: ["reports", "vqa"])
    prompt_style: Literal["chat", "plain"] = field(
        default="chat",
        metadata={
            "help": "The language model's chat template, if it has one, or the plain prompt of the paper's code."
        },
    )
    report_prompts: list[str] = field(
        default_factory=lambda: list(REPORT_PROMPTS),
        metadata={"help": "What asks for a report: one is drawn a row and epoch; evaluation takes the first."},
    )
    questions_per_row: int = field(
        default=1, metadata={"help": "Questions of a volume that share its tokens: same loss, fewer tokens."}
    )
    patch_features: Literal["cached", "computed"] = field(
        default="computed",
        metadata={
            "help": "What the frozen encoders say of each patch: computed in every step, or once, on disk (at the "
            "paper's sizes 12.6 MB a volume in float32). Augmentation that changes volumes needs the former."
        },
    )
    patch_feature_dtype: Literal["float32", "float16"] = field(
        default="float32", metadata={"help": "Of cached patch features on disk."}
    )
    lora_r: int = field(default=16)
    lora_alpha: int = field(default=32)
    lora_dropout: float = field(default=0.05)
    lora_target_modules: list[str] = field(
        default_factory=list,
        metadata={"help": "Names of the layers that get LoRA, such as o_proj; empty: all linear."},
    )


def assemble(
    stage1: HSENetCLIPModel, stage2: HSENetCLIPModel, arguments: ModelArguments, device: torch.device
) -> tuple[HSENetForConditionalGeneration, PreTrainedTokenizerBase]:
    """Both trained encoders and the language model in one model; only the packers are new."""
    if stage2.config.guidance != "slices":
        raise ValueError(
            f'Expected a stage 2 whose patches are scored by slices, got guidance "{stage2.config.guidance}": there '
            "is no report to score them by while one is written."
        )
    tokenizer = AutoTokenizer.from_pretrained(arguments.language_model)
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]})
    if arguments.prompt_style == "plain":
        tokenizer.chat_template = None  # saved with the model, it would be a prompt that the model never saw
    language_model = load_language_model(arguments, device)
    if len(tokenizer) > language_model.config.vocab_size:
        language_model.resize_token_embeddings(len(tokenizer))
    config = HSENetConfig(
        encoders=arguments.encoders,
        vision_config=stage1.config.vision_config.to_dict(),
        local_vision_config=stage2.config.vision_config.to_dict(),
        slice_config=stage2.config.slice_config.to_dict(),
        text_config=_plain_config(language_model),
        projector=arguments.projector,
        qformer_num_layers=arguments.qformer_num_layers,
        packer_window_size=arguments.packer_window_size,
        packer_dropout=arguments.packer_dropout,
        packer_residual=arguments.packer_residual,
        num_slices=stage2.config.num_slices,
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        initializer_range=stage1.config.initializer_range,
    )
    model = HSENetForConditionalGeneration(config)
    if arguments.encoders != "local":
        model.model.global_encoder.load_state_dict(stage1.vision_model.state_dict())
    if arguments.encoders != "global":
        model.model.local_encoder.load_state_dict(stage2.vision_model.state_dict())
        model.model.slice_encoder.load_state_dict(stage2.slice_encoder.state_dict())
    model.model.language_model, model.lm_head = language_model.base_model, language_model.get_output_embeddings()
    model.generation_config = language_model.generation_config
    # PEFT asks the whole model what its layers are.
    model.is_loaded_in_8bit = arguments.quantization == "8bit"
    model.is_loaded_in_4bit = arguments.quantization == "4bit"
    return model, tokenizer


def _plain_config(language_model: PreTrainedModel) -> dict:
    """Of the language model as the result is saved: merged, and no longer quantised."""
    config = language_model.config.to_dict()
    config.pop("quantization_config", None)
    return config


def with_lora(model: HSENetForConditionalGeneration, arguments: ModelArguments) -> nn.Module:
    """LoRA on every linear layer of the language model, as the paper, or on some; the packers train in full."""
    settings = (arguments.lora_r, arguments.lora_alpha, arguments.lora_dropout, arguments.lora_target_modules)
    return get_peft_model(model, lora_config(model, *settings))


def unquantized(model: PeftModel, adapter: Path, assembled: tuple) -> PeftModel:
    """With the adapter still apart; of a quantised model, on the weights that it was quantised from."""
    stage1, stage2, arguments, device = assembled
    if arguments.quantization != "none":
        base, _ = assemble(stage1, stage2, replace(arguments, quantization="none"), device)
        model = PeftModel.from_pretrained(base, adapter)
    return model


def main(model_arguments: ModelArguments, data: DataArguments, training: TrainingArguments) -> None:
    accelerator = start(training, model=asdict(model_arguments), data=asdict(data))

    ###########
    # Model   #
    ###########
    stage1 = HSENetCLIPModel.from_pretrained(model_arguments.stage1)
    stage2 = HSENetCLIPModel.from_pretrained(model_arguments.stage2)
    image_processor = HSENetProcessor.from_pretrained(model_arguments.stage2).image_processor
    assembled = (stage1, stage2, model_arguments, accelerator.device)
    model, tokenizer = assemble(*assembled)
    processor = HSENetProcessor(
        image_processor,
        tokenizer,
        image_seq_length=model.config.image_seq_length,
        prompt_style=model_arguments.prompt_style,
    )
    model = with_lora(model, model_arguments)
    if training.gradient_checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable()

    ###########
    # Dataset #
    ###########
    rows = {}
    for split, limit in ((data.train_split, data.max_train_rows), (data.eval_split, data.max_eval_rows)):
        reports = load_rows(data.dataset, "reports", split, limit)
        questions = []
        if "vqa" in model_arguments.tasks:
            questions = load_rows(data.dataset, "vqa", split, limit, data.question_types)
        cache = cache_volumes(
            reports + questions,
            image_processor,
            stage2.slice_encoder,
            data.cache_dir,
            accelerator,
            data.num_workers,
            data.max_failures,
            keep_slices=data.computes_slice_features,
        )
        reports = cache.readable(reports) if "reports" in model_arguments.tasks else []
        questions = cache.readable(questions)
        rows[split] = generation_rows(
            reports,
            questions,
            tuple(data.report_fields),
            model_arguments.questions_per_row,
            model_arguments.report_prompts,
        )
    if data.cache_only:
        return accelerator.end_training()
    train_rows, eval_rows = rows[data.train_split], rows[data.eval_split]
    collator = ReportCollator(processor, data.max_length)  # of evaluation: always the same prompt
    accelerator.print(f"{collator.num_truncated(train_rows)} of {len(train_rows)} rows are longer than max_length.")
    features = cache
    if model_arguments.patch_features == "cached" and data.changes_volumes:
        accelerator.print("Patch features are computed in every step: augmentation changes the volumes.")
    elif model_arguments.patch_features == "cached":
        features = cache_patch_features(
            train_rows + eval_rows,
            cache,
            model.get_base_model(),
            accelerator,
            training.batch_size,
            model_arguments.patch_feature_dtype,
        )
    augmentation = VolumeAugmentation(data, image_processor, seed=training.seed)
    lengths = [sum(len(question) + len(answer) for question, answer in row["turns"]) for row in train_rows]
    sampler = SimilarLengthSampler(lengths, training.batch_size, training.seed)
    loader = DataLoader(
        VolumeRows(train_rows, features, augmentation),
        training.batch_size,
        sampler=sampler,
        drop_last=True,
        collate_fn=ReportCollator(processor, data.max_length, training.seed),
        num_workers=data.loader_workers,
    )

    ############
    # Training #
    ############
    def compute_loss(model: nn.Module, batch: dict, step: int) -> tuple[torch.Tensor, dict[str, float]]:
        return model(**batch).loss, {}

    def evaluate(model: nn.Module) -> dict[str, float]:
        return evaluate_language_loss(model, VolumeRows(eval_rows, features), collator, training.batch_size)

    model = train(accelerator, model, loader, compute_loss, evaluate, training)
    if accelerator.is_main_process:
        adapter = Path(training.output_dir) / "adapter"
        model.save_pretrained(adapter)
        model = unquantized(model, adapter, assembled)
        record_base(model, adapter)
        save_trained(model.merge_and_unload(), processor, training)
        write_model_card(adapter)
    accelerator.end_training()
    push_trained(accelerator, training)


if __name__ == "__main__":
    main(*parse_arguments(ModelArguments, DataArguments, TrainingArguments))
