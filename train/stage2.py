"""Stage 2: the local 3D encoder (2E3), guided by 2D slices and anchored to stage 1 (paper section 3.2).

    accelerate launch train/stage2.py --config train/configs/quickstart/stage2.yaml
    accelerate launch --num_processes 8 train/stage2.py --config train/configs/paper/stage2.yaml --dataset DIR \
        --stage1 outputs/stage1 --slice_encoder DIR

Needs `pip install -e ".[train]"`. The output directory loads with `AutoModel.from_pretrained(DIR)`.
"""

from dataclasses import asdict, dataclass, field
from typing import Literal

from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from configuration_hsenet import HSENetCLIPConfig
from hsenet.arguments import DataArguments, TrainingArguments, parse_arguments
from hsenet.augmentation import VolumeAugmentation
from hsenet.collators import ContrastiveCollator
from hsenet.contrastive import Anchor, ConsistencyArguments, ContrastiveArguments, ContrastiveObjective
from hsenet.conversion import load_tokenizer
from hsenet.data import VolumeRows, add_report_texts, load_rows, one_per_study
from hsenet.evaluation import evaluate_retrieval
from hsenet.frozen_features import ComputedEmbeddings, anchor_embeddings
from hsenet.report_augmentation import ReportAugmentation
from hsenet.trained_model import push_trained, save_trained
from hsenet.training import start, train
from hsenet.volume_cache import cache_volumes
from modeling_hsenet import HSENetCLIPModel, HSENetVisionModel
from processing_hsenet import HSENetImageProcessor, HSENetProcessor


@dataclass
class ModelArguments:
    stage1: str = field(default="", metadata={"help": "Trained stage 1: the frozen anchor, and the initialisation."})
    slice_encoder: str = field(
        default="", metadata={"help": "Frozen 2D encoder: a saved HSENetVisionModel; used with guidance by slices."}
    )
    init: Literal["stage1", "m3d_clip", "random"] = field(
        default="stage1", metadata={"help": "Where training starts from; the released weights: from M3D-CLIP."}
    )
    m3d_clip: str | None = field(
        default=None, metadata={"help": "With init=m3d_clip: the folder that `hsenet convert m3d-clip` wrote."}
    )
    num_slices: int = field(default=32)
    guidance: Literal["slices", "text", "text_cls", "none"] = field(
        default="slices", metadata={"help": "What scores the patches (paper table 1b): see HSENetCLIPConfig."}
    )
    patch_dropout: float | None = field(
        default=None,
        metadata={"help": "Share of patches left out in training; not given: as in the model that it starts from."},
    )
    image_processor: dict = field(
        default_factory=dict, metadata={"help": "Preprocessing of the slices that differs from stage 1's processor."}
    )
    scorer_residual: Literal["projected_query", "query"] = field(
        default="projected_query", metadata={"help": "What the scorer adds to its attention: see HSENetVisionConfig."}
    )


def initial_model(
    anchor: HSENetCLIPModel, tokenizer: PreTrainedTokenizerBase, arguments: ModelArguments
) -> HSENetCLIPModel:
    """Whose sizes and weights stage 2 takes over: the anchor, or M3D-CLIP if it takes the same volumes and words."""
    if arguments.init != "m3d_clip":
        return anchor
    if arguments.m3d_clip is None:
        raise ValueError("init=m3d_clip needs --m3d_clip, a folder that `hsenet convert m3d-clip` wrote; got none.")
    model = HSENetCLIPModel.from_pretrained(arguments.m3d_clip)
    volumes, expected = model.config.vision_config.image_size, anchor.config.vision_config.image_size
    if tuple(volumes) != tuple(expected):
        raise ValueError(f"M3D-CLIP reads volumes of {tuple(volumes)}, stage 1 of {tuple(expected)}: they must agree.")
    if load_tokenizer(arguments.m3d_clip).get_vocab() != tokenizer.get_vocab():
        raise ValueError("M3D-CLIP's tokenizer has other words than stage 1's: train stage 1 with its text encoder.")
    return model


def guided_model(source: HSENetCLIPModel, slice_encoder: HSENetVisionModel | None, arguments: ModelArguments):
    """A stage-2 model of the sizes of `source`; only its scorer is new, unless all of it is to start at random."""
    source_config = source.config.to_dict()
    changes = {"scorer_residual": arguments.scorer_residual}
    if arguments.patch_dropout is not None:
        changes["patch_dropout"] = arguments.patch_dropout
    config = HSENetCLIPConfig(
        guidance=arguments.guidance,
        vision_config={**source_config["vision_config"], **changes},
        text_config=source_config["text_config"],
        slice_config=slice_encoder.config.to_dict() if slice_encoder is not None else None,
        num_slices=arguments.num_slices,
        projection_dim=source.config.projection_dim,
        logit_scale_init_value=source.config.logit_scale_init_value,
        initializer_range=source.config.initializer_range,
    )
    model = HSENetCLIPModel(config)
    if slice_encoder is not None:
        model.slice_encoder.load_state_dict(slice_encoder.state_dict())
        model.slice_encoder.requires_grad_(False)
    if arguments.init != "random":
        new = set(model.state_dict()) - set(source.state_dict())
        if not all(name.startswith(("vision_model.scorer.", "slice_encoder.")) for name in new):
            raise RuntimeError(f"The model to start from does not fit: it has no weights for {sorted(new)}.")
        model.load_state_dict({**model.state_dict(), **source.state_dict()})
    return model


def main(
    model_arguments: ModelArguments,
    contrastive: ContrastiveArguments,
    consistency: ConsistencyArguments,
    data: DataArguments,
    training: TrainingArguments,
) -> None:
    groups = {"model": model_arguments, "contrastive": contrastive, "consistency": consistency, "data": data}
    accelerator = start(training, **{name: asdict(group) for name, group in groups.items()})

    ###########
    # Model   #
    ###########
    anchor = HSENetCLIPModel.from_pretrained(model_arguments.stage1).to(accelerator.device).eval()
    slice_encoder, slices = None, {}
    if model_arguments.guidance == "slices":
        slice_encoder = HSENetVisionModel.from_pretrained(model_arguments.slice_encoder)
        slices = {"num_slices": model_arguments.num_slices, "slice_size": slice_encoder.config.image_size[1:]}
    stage1_processor = HSENetProcessor.from_pretrained(model_arguments.stage1)
    tokenizer = stage1_processor.tokenizer
    model = guided_model(initial_model(anchor, tokenizer, model_arguments), slice_encoder, model_arguments)
    if training.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    image_processor = HSENetImageProcessor(
        **{**stage1_processor.image_processor.to_dict(), **slices, **model_arguments.image_processor}
    )

    ###########
    # Dataset #
    ###########
    train_rows = load_rows(data.dataset, "reports", data.train_split, data.max_train_rows)
    eval_rows = one_per_study(load_rows(data.dataset, "reports", data.eval_split, data.max_eval_rows))
    add_report_texts(train_rows + eval_rows, tuple(data.report_fields))
    cache = cache_volumes(
        train_rows + eval_rows,
        image_processor,
        slice_encoder,
        data.cache_dir,
        accelerator,
        data.num_workers,
        data.max_failures,
        keep_slices=data.computes_slice_features and slice_encoder is not None,
    )
    if data.cache_only:
        return accelerator.end_training()
    train_rows, eval_rows = cache.readable(train_rows), cache.readable(eval_rows)
    collator = ContrastiveCollator(tokenizer, data.max_length, whole_sentences=data.whole_sentences)
    rewrite = ReportAugmentation(tuple(data.report_fields), data.drop_sentences, training.seed)
    augmentation = VolumeAugmentation(data, image_processor, data.report_fields, training.seed)
    loader = DataLoader(
        VolumeRows(train_rows, cache, augmentation),
        training.batch_size,
        shuffle=True,
        drop_last=True,
        collate_fn=ContrastiveCollator(
            tokenizer,
            data.max_length,
            rewrite if data.rewrite_reports else None,
            whole_sentences=data.whole_sentences,
        ),
        num_workers=data.loader_workers,
    )

    ############
    # Training #
    ############
    held_by = None
    if consistency.consistency_weight:
        is_changed = data.changes_volumes or data.rewrite_reports
        if consistency.looks_up_anchor(is_changed=is_changed):
            embeddings = anchor_embeddings(anchor, train_rows, cache, collator, accelerator)
        else:
            embeddings = ComputedEmbeddings(anchor, contrastive.chunk_size, accelerator)
        held_by = Anchor(embeddings, anchor.logit_scale.detach().exp(), consistency)
    objective = ContrastiveObjective(accelerator, contrastive, held_by)

    def evaluate(model: HSENetCLIPModel) -> dict[str, float]:
        dataset = VolumeRows(eval_rows, cache)
        return evaluate_retrieval(model, dataset, collator, training.batch_size, contrastive.siblings)

    model = train(accelerator, model, loader, objective, evaluate, training, frozen=[anchor])
    if accelerator.is_main_process:
        save_trained(model, HSENetProcessor(image_processor, tokenizer), training)
    accelerator.end_training()
    push_trained(accelerator, training)


if __name__ == "__main__":
    main(
        *parse_arguments(ModelArguments, ContrastiveArguments, ConsistencyArguments, DataArguments, TrainingArguments)
    )
