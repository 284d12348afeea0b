"""Stage 1: volumes and reports into one space, with the global 3D encoder (paper section 3.1).

    accelerate launch train/stage1.py --config train/configs/quickstart/stage1.yaml
    accelerate launch --num_processes 8 train/stage1.py --config train/configs/paper/stage1.yaml --dataset DIR

Needs `pip install -e ".[train]"`. The output directory loads with `AutoModel.from_pretrained(DIR)`.
"""

from dataclasses import asdict, dataclass, field

from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoModel, AutoTokenizer

from configuration_hsenet import HSENetCLIPConfig
from hsenet.arguments import DataArguments, TrainingArguments, parse_arguments
from hsenet.augmentation import VolumeAugmentation
from hsenet.collators import ContrastiveCollator
from hsenet.contrastive import ContrastiveArguments, ContrastiveObjective
from hsenet.data import VolumeRows, add_report_texts, load_rows, one_per_study
from hsenet.evaluation import evaluate_retrieval
from hsenet.report_augmentation import ReportAugmentation
from hsenet.trained_model import push_trained, save_trained
from hsenet.training import start, train
from hsenet.volume_cache import cache_volumes
from modeling_hsenet import HSENetCLIPModel
from processing_hsenet import HSENetImageProcessor, HSENetProcessor


@dataclass
class ModelArguments:
    text_encoder: str = field(default="bert-base-uncased", metadata={"help": "Pretrained text encoder and tokenizer."})
    vision_config: dict = field(default_factory=dict, metadata={"help": "Sizes that differ from the paper's."})
    patch_dropout: float | None = field(
        default=None, metadata={"help": "Share of patches left out in training; not given: as vision_config has it."}
    )
    image_processor: dict = field(
        default_factory=dict, metadata={"help": "Preprocessing that differs from the paper."}
    )
    projection_dim: int = field(default=768)
    logit_scale_init_value: float = field(default=2.6592, metadata={"help": "Log of the starting temperature."})


def main(
    model_arguments: ModelArguments,
    contrastive: ContrastiveArguments,
    data: DataArguments,
    training: TrainingArguments,
) -> None:
    settings = {"model": asdict(model_arguments), "contrastive": asdict(contrastive), "data": asdict(data)}
    accelerator = start(training, **settings)

    ###########
    # Model   #
    ###########
    tokenizer = AutoTokenizer.from_pretrained(model_arguments.text_encoder)
    dropout = model_arguments.patch_dropout
    config = HSENetCLIPConfig(
        guidance="none",
        vision_config=model_arguments.vision_config | ({} if dropout is None else {"patch_dropout": dropout}),
        text_config=AutoConfig.from_pretrained(model_arguments.text_encoder),
        projection_dim=model_arguments.projection_dim,
        logit_scale_init_value=model_arguments.logit_scale_init_value,
    )
    model = HSENetCLIPModel(config)
    text_model = AutoModel.from_pretrained(model_arguments.text_encoder, add_pooling_layer=False)
    model.text_model.load_state_dict(text_model.state_dict())
    if training.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    image_processor = HSENetImageProcessor(
        image_size=config.vision_config.image_size, num_slices=0, **model_arguments.image_processor
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
        None,
        data.cache_dir,
        accelerator,
        data.num_workers,
        data.max_failures,
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
    def evaluate(model: HSENetCLIPModel) -> dict[str, float]:
        dataset = VolumeRows(eval_rows, cache)
        return evaluate_retrieval(model, dataset, collator, training.batch_size, contrastive.siblings)

    objective = ContrastiveObjective(accelerator, contrastive)
    model = train(accelerator, model, loader, objective, evaluate, training)
    if accelerator.is_main_process:
        save_trained(model, HSENetProcessor(image_processor, tokenizer), training)
    accelerator.end_training()
    push_trained(accelerator, training)


if __name__ == "__main__":
    main(*parse_arguments(ModelArguments, ContrastiveArguments, DataArguments, TrainingArguments))
