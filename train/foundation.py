"""Small stand-ins, trained from nothing, for the pretrained parts that a machine without the Hub cannot download.

    accelerate launch train/foundation.py --config train/configs/quickstart/foundation.yaml

Writes three folders into the output directory, from the texts and volumes of the training split only:

- `text_encoder` for bert-base-uncased: a small BERT with its tokenizer, trained to match the findings of a report with
  its impression;
- `slice_encoder` for BiomedCLIP's 2D trunk: a small ViT, trained to tell from axial slices what the scan shows;
- `language_model` for Phi-4-mini: a small Phi-3 with its tokenizer, trained to answer from an impression before the
  question.

With real weights at hand none of this is needed: give their names to the three stages instead.
"""

import random
import re
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import nn
from torch.utils.data import DataLoader
from transformers import (
    BertConfig,
    BertModel,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedTokenizerFast,
)

from configuration_hsenet import HSENetVisionConfig
from hsenet.arguments import DataArguments, TrainingArguments, parse_arguments
from hsenet.cards import write_model_card
from hsenet.data import SimilarLengthSampler, load_rows, one_per_study, report_text
from hsenet.losses import global_similarity, image_text_contrastive_loss
from hsenet.report_prompts import REPORT_PROMPTS
from hsenet.training import start, train
from modeling_hsenet import HSENetVisionModel
from processing_hsenet import HSENetImageProcessor
from reading_hsenet import read_volume


@dataclass
class ModelArguments:
    text_config: dict = field(default_factory=dict, metadata={"help": "Sizes of the text encoder (BertConfig)."})
    text_vocab_size: int = field(default=1000)
    text_steps: int = field(default=300)
    slice_config: dict = field(default_factory=dict, metadata={"help": "Sizes of the 2D encoder."})
    num_slices: int = field(default=32)
    slice_steps: int = field(default=300)
    language_config: dict = field(default_factory=dict, metadata={"help": "Sizes of the language model."})
    language_vocab_size: int = field(default=1000)
    language_steps: int = field(default=300)
    language_batch_size: int = field(default=64)
    language_learning_rate: float = field(default=1e-3)
    report_repeats: int = field(
        default=3, metadata={"help": "How often the language model gets a report for each time it gets a question."}
    )


def part_of_run(training: TrainingArguments, name: str, **changes: Any) -> TrainingArguments:
    """The settings of one of the three trainings, which has a folder, a log and checkpoints of its own."""
    part = replace(training, output_dir=str(Path(training.output_dir) / name), **changes)
    part.settings = {**training.settings, "output_dir": name, **changes}
    return part


def wordpiece_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    special["mask_token"] = "[MASK]"
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=vocab_size, special_tokens=list(special.values()))
    backend.train_from_iterator(texts, trainer)
    ids = [(token, backend.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    backend.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ids)
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def byte_pair_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    end = "<|endoftext|>"  # BOS, EOS and padding at once, as in Phi-4-mini
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=[end, "<image>"], initial_alphabet=alphabet)
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=end, eos_token=end, pad_token=end)


class FindingsMatcher(nn.Module):
    """The text encoder with a projection: findings and impression of one report lie close to each other."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.encoder = BertModel(config, add_pooling_layer=False)
        self.projection = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, **tokens: torch.Tensor) -> torch.Tensor:
        return nn.functional.normalize(self.projection(self.encoder(**tokens).last_hidden_state[:, 0]), dim=-1)


def train_text_encoder(
    rows: list[dict], arguments: ModelArguments, data: DataArguments, training: TrainingArguments, run: Accelerator
) -> None:
    tokenizer = wordpiece_tokenizer([report_text(row) for row in rows], arguments.text_vocab_size)
    config = BertConfig(vocab_size=len(tokenizer), max_position_embeddings=data.max_length, **arguments.text_config)
    temperature = torch.tensor(14.0)

    def collate(rows: list[dict]) -> dict[str, dict[str, torch.Tensor]]:
        texts = {field: [report_text(row, (field,)) for row in rows] for field in ("findings", "impression")}
        settings = {"padding": True, "truncation": True, "max_length": data.max_length, "return_tensors": "pt"}
        return {name: dict(tokenizer(text, return_token_type_ids=False, **settings)) for name, text in texts.items()}

    def compute_loss(model: nn.Module, batch: dict, step: int) -> tuple[torch.Tensor, dict[str, float]]:
        similarity = global_similarity(model(**batch["findings"]), model(**batch["impression"]))
        return image_text_contrastive_loss(similarity, temperature.to(run.device)), {}

    loader = DataLoader(rows, training.batch_size, shuffle=True, drop_last=True, collate_fn=collate)
    part = part_of_run(training, "text_encoder", max_steps=arguments.text_steps)
    model = train(run, FindingsMatcher(config), loader, compute_loss, lambda model: {}, part)
    model.encoder.save_pretrained(part.output_dir, max_shard_size=training.max_shard_size)
    tokenizer.save_pretrained(part.output_dir)
    write_model_card(part.output_dir)


class SliceLabeller(nn.Module):
    """The 2D encoder with a head: a scan shows a finding if any of its slices does."""

    def __init__(self, config: HSENetVisionConfig, num_labels: int):
        super().__init__()
        self.encoder = HSENetVisionModel(config)
        self.head = nn.Linear(config.hidden_size, num_labels)

    def forward(self, slices: torch.Tensor) -> torch.Tensor:
        features = self.encoder(slices.flatten(0, 1).unsqueeze(2)).pooler_output.unflatten(0, slices.shape[:2])
        return self.head(features).amax(dim=1)  # (batch, num_labels)


def train_slice_encoder(
    rows: list[dict], arguments: ModelArguments, data: DataArguments, training: TrainingArguments, run: Accelerator
) -> None:
    config = HSENetVisionConfig(**arguments.slice_config)
    image_processor = HSENetImageProcessor(
        image_size=(1, 1, 1), num_slices=arguments.num_slices, slice_size=config.image_size[1:]
    )

    def collate(rows: list[dict]) -> dict[str, torch.Tensor]:
        volumes = [image_processor.process_volume(read_volume(row["volume"])) for row in rows]
        labels = torch.tensor([row["labels"] for row in rows], dtype=torch.float32)
        return {"slices": torch.stack([volume["slice_pixel_values"] for volume in volumes]), "labels": labels}

    def compute_loss(model: nn.Module, batch: dict, step: int) -> tuple[torch.Tensor, dict[str, float]]:
        logits = model(batch["slices"])
        return nn.functional.binary_cross_entropy_with_logits(logits, batch["labels"]), {}

    batch_size = min(16, training.batch_size)  # volumes with all their slices are heavier than texts
    loader = DataLoader(
        rows, batch_size, shuffle=True, drop_last=True, collate_fn=collate, num_workers=data.num_workers
    )
    part = part_of_run(training, "slice_encoder", max_steps=arguments.slice_steps, batch_size=batch_size)
    model = SliceLabeller(config, num_labels=len(rows[0]["labels"]))
    model = train(run, model, loader, compute_loss, lambda model: {}, part)
    model.encoder.save_pretrained(part.output_dir, max_shard_size=training.max_shard_size)
    write_model_card(part.output_dir)


@dataclass
class InContextRow:
    """A question with the words that answer it before it, where later the volume stands."""

    prompt: str
    answer: str


def in_context_rows(
    reports: list[dict], questions: list[dict], fields: tuple[str, ...], report_repeats: int, seed: int
) -> list[InContextRow]:
    """
    Every question, and `report_repeats` times every request for a report, after the study's impression.

    The impression's sentences come in another random order each time. A language model as large as Phi-4-mini answers
    from its context without further training; this teaches the small stand-in the same, from text alone, so that
    stage 3 has to teach the packers only.
    """
    shuffle = random.Random(seed).sample
    impressions = {row["study_id"]: re.split(r"(?<=[.!?])\s+", row["impression"].strip()) for row in reports}
    asked = [(row["study_id"], row["question"], row["answer"]) for row in questions]
    asked += [
        (row["study_id"], REPORT_PROMPTS[index % len(REPORT_PROMPTS)], report_text(row, fields))
        for index, row in enumerate(reports * report_repeats)
    ]
    return [
        InContextRow(" ".join(shuffle(impressions[study], len(impressions[study]))) + question, f" {answer}")
        for study, question, answer in asked
    ]


def train_language_model(
    rows: list[InContextRow],
    arguments: ModelArguments,
    data: DataArguments,
    training: TrainingArguments,
    run: Accelerator,
) -> None:
    texts = list(dict.fromkeys(text for row in rows for text in (row.prompt, row.answer)))
    tokenizer = byte_pair_tokenizer(texts, arguments.language_vocab_size)
    end = tokenizer.eos_token_id
    config = Phi3Config(
        vocab_size=len(tokenizer),
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
        tie_word_embeddings=True,
        max_position_embeddings=data.max_length,
        **arguments.language_config,
    )

    def collate(rows: list[InContextRow]) -> dict[str, torch.Tensor]:
        prompts = [[end, *tokenizer(row.prompt, add_special_tokens=False)["input_ids"]] for row in rows]
        answers = [[*tokenizer(row.answer, add_special_tokens=False)["input_ids"], end] for row in rows]
        pairs = list(zip(prompts, answers, strict=True))
        length = max(len(prompt) + len(answer) for prompt, answer in pairs)
        padding = [length - len(prompt) - len(answer) for prompt, answer in pairs]
        batch = {
            "input_ids": [p + a + [end] * pad for (p, a), pad in zip(pairs, padding, strict=True)],
            "labels": [[-100] * len(p) + a + [-100] * pad for (p, a), pad in zip(pairs, padding, strict=True)],
            "attention_mask": [[1] * (length - pad) + [0] * pad for pad in padding],
        }
        return {name: torch.tensor(values)[:, : data.max_length] for name, values in batch.items()}

    batch_size = arguments.language_batch_size
    sampler = SimilarLengthSampler([len(row.answer) for row in rows], batch_size, training.seed)
    loader = DataLoader(rows, batch_size, sampler=sampler, drop_last=True, collate_fn=collate)
    changes = {"max_steps": arguments.language_steps, "learning_rate": arguments.language_learning_rate}
    part = part_of_run(training, "language_model", batch_size=batch_size, **changes)
    model = train(run, Phi3ForCausalLM(config), loader, _language_loss, lambda model: {}, part)
    model.save_pretrained(part.output_dir, max_shard_size=training.max_shard_size)
    tokenizer.save_pretrained(part.output_dir)
    write_model_card(part.output_dir)


def _language_loss(model: nn.Module, batch: dict, step: int) -> tuple[torch.Tensor, dict[str, float]]:
    return model(**batch).loss, {}


def main(model_arguments: ModelArguments, data: DataArguments, training: TrainingArguments) -> None:
    if training.push_to_hub is not None:
        raise ValueError("push_to_hub is for the three stages: stand-ins are parts of their models.")
    accelerator = start(training, model=asdict(model_arguments), data=asdict(data))
    if accelerator.num_processes > 1:
        raise ValueError("The stand-ins are small: train them in one process.")
    reports = load_rows(data.dataset, "reports", data.train_split, data.max_train_rows)
    questions = load_rows(data.dataset, "vqa", data.train_split, data.max_train_rows)
    fields = tuple(data.report_fields)
    train_text_encoder(one_per_study(reports), model_arguments, data, training, accelerator)
    train_slice_encoder(reports, model_arguments, data, training, accelerator)
    rows = in_context_rows(one_per_study(reports), questions, fields, model_arguments.report_repeats, training.seed)
    train_language_model(rows, model_arguments, data, training, accelerator)


if __name__ == "__main__":
    main(*parse_arguments(ModelArguments, DataArguments, TrainingArguments))
