# Copyright 2026 The HSENet package authors. Licensed under the Apache License, Version 2.0.
"""One scan, read and encoded once, for any number of questions.

    model, processor = load_generation_model("outputs/quickstart/stage3")
    scan = EncodedScan.read(model, processor, "scan.nii.gz")
    scan.ask("Can you summarize with findings the images presented?")
    for piece in scan.stream("Is there a pleural effusion?"):  # text as it is written
        print(piece, end="", flush=True)

`read` runs the encoders, a question the language model alone.
"""

import copy
import threading
import warnings
from collections.abc import Iterator
from typing import Any
from weakref import WeakKeyDictionary

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoProcessor,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
)

from hsenet.digests import content_hash
from hsenet.folder_or_hub import check_model_source
from modeling_hsenet import HSENetForConditionalGeneration
from processing_hsenet import HSENetProcessor
from reading_hsenet import HSENetInputWarning, Volume, read_volume


MAX_QUESTION_CHARACTERS = 8000
PROBE = "What is seen?"  # any question: what comes before it is the same for all
# Ways of generating in which the language model's cache is not that of one row which grows at its end.
_OTHER_CACHES = ("assistant_model", "cache", "past_key_values", "cache_implementation", "prompt_lookup_num_tokens")

# `catch_warnings` is the whole process's, and a model generates for one caller at a time: the random numbers, the
# tokenizer's padding and some rotary embeddings are shared.
_READING = threading.Lock()
_GENERATING: WeakKeyDictionary[PreTrainedModel, threading.Lock] = WeakKeyDictionary()


def load_generation_model(
    source: str,
    *,
    revision: str | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    **from_pretrained_kwargs,
) -> tuple[HSENetForConditionalGeneration, HSENetProcessor]:
    """
    Args:
        source (`str`): folder or Hub id.
        revision (`str`, *optional*): branch, tag or commit on the Hub.
        device (*optional*): default: the accelerator, if there is one; has no say beside `device_map`.
        dtype (*optional*): of the weights; default: as they are stored.
        from_pretrained_kwargs:
            As `device_map` or `quantization_config`. `trust_remote_code=True` runs the model's own code; otherwise it
            is the installed package's, whatever lies in the folder.

    Raises:
        ValueError: there is no model, it is one of another kind, or a weight is missing.
    """
    check_model_source(source, revision=revision)
    trusted = from_pretrained_kwargs.pop("trust_remote_code", False)
    location = {"revision": revision} if revision is not None else {}
    device = device if device is not None else best_device()
    if dtype is not None:
        from_pretrained_kwargs["dtype"] = dtype
    if from_pretrained_kwargs.get("quantization_config") is not None:  # such weights are made where they stay
        from_pretrained_kwargs.setdefault("device_map", {"": device})
    if trusted:
        model = AutoModel.from_pretrained(source, trust_remote_code=True, **location, **from_pretrained_kwargs)
        processor = AutoProcessor.from_pretrained(source, trust_remote_code=True, **location)
    else:
        kind = AutoConfig.from_pretrained(source, **location).model_type
        if kind != HSENetForConditionalGeneration.config_class.model_type:
            raise ValueError(f"Expected a model that writes (stage 3, hsenet), got one of type {kind}.")
        model = HSENetForConditionalGeneration.from_pretrained(source, **location, **from_pretrained_kwargs)
        processor = HSENetProcessor.from_pretrained(source, **location)
    if from_pretrained_kwargs.get("device_map") is None:
        model = model.to(device)
    return model.eval(), processor


def best_device() -> torch.device:
    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")


class EncodedScan:
    """
    What the model sees of a scan, as it is when the scan is read: encode anew after another adapter was set.

    Encoders and packers run once, here. The language model reads the scan's tokens with the first question; later ones
    start from its cache. One model generates for one caller at a time: others wait.

    Args:
        model ([`HSENetForConditionalGeneration`]): or the same with adapters.
        processor ([`HSENetProcessor`]): the one it was trained with.
        volume ([`Volume`]).
        warnings (`list[str]`): what the reader had to say.

    Attributes:
        pixel_values (`torch.Tensor` of shape `(1, depth, height, width)`): as the model sees the scan, on the CPU.
        patch_scores (`torch.Tensor` of shape `(grid_depth, grid_height, grid_width)`, *optional*):
            The slices' weight on each patch, on the CPU; `None` for models without slice guidance.
        geometry (`dict`): shape and spacing (mm) along D, H, W, orientation as stored, range of the HU.
        sha256 (`str`): of the HU, the same however the scan is stored.
    """

    def __init__(
        self,
        model: HSENetForConditionalGeneration,
        processor: HSENetProcessor,
        volume: Volume,
        warnings: list[str] | None = None,
    ):
        self.model = model
        self.processor = processor
        self.warnings = list(warnings or [])
        self.geometry = describe_geometry(volume)
        self.sha256 = content_hash(volume)
        tensors = processor.image_processor.process_volume(volume)
        inputs = {name: tensor.unsqueeze(0).to(model.device) for name, tensor in tensors.items()}
        with torch.no_grad(), self._lock:
            self.image_features = model.get_image_features(**inputs)
        scores = self.image_features.patch_scores
        self.pixel_values = tensors["pixel_values"]
        self.patch_scores = None if scores is None else scores[0].float().cpu()
        self._prefix: tuple[torch.Tensor, str, Any] | None = None

    @classmethod
    def read(cls, model, processor: HSENetProcessor, source: Any, **read_options) -> "EncodedScan":
        """
        Args:
            source: what `read_volume` takes: NIfTI, NRRD, folder or zip of a DICOM series, `Volume`, array.
            read_options: of `read_volume`, such as `series="largest"`.

        Raises:
            HSENetInputError: what the reader refuses.
        """
        volume, said = read_with_warnings(source, **read_options)
        return cls(model, processor, volume, said)

    def ask(self, question: str, *, max_new_tokens: int = 256, **generate_kwargs) -> str:
        """
        The model's answer, the same as `generate` gives for this scan and question.

        Args:
            question (`str`): what is asked, without control tokens of the language model.
            max_new_tokens (`int`): at most; also never more than the language model has positions for.
            generate_kwargs: of `generate`, such as `do_sample` and `temperature`.

        Raises:
            ValueError: the question is empty, too long, or holds control tokens.
        """
        with self._lock:
            return self._decode(self._generate(question, max_new_tokens, **generate_kwargs)).strip()

    def stream(self, question: str, *, max_new_tokens: int = 256, **generate_kwargs) -> Iterator[str]:
        """As [`~EncodedScan.ask`], piece by piece; joined they are the answer. Leaving the loop ends the writing."""
        streamer = TextIteratorStreamer(self.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        stop, failures = _Stop(), []
        criteria = StoppingCriteriaList([stop, *generate_kwargs.pop("stopping_criteria", [])])

        def write() -> None:
            try:
                with self._lock:
                    self._generate(
                        question, max_new_tokens, streamer=streamer, stopping_criteria=criteria, **generate_kwargs
                    )
            except BaseException as error:  # raised again below, where somebody waits for text
                failures.append(error)
                streamer.end()

        writer = threading.Thread(target=write, daemon=True)
        writer.start()
        try:
            yield from _stripped(streamer)
        finally:  # whoever leaves the loop does not wait for the token that is being computed
            stop.requested.set()
        writer.join()
        if failures:
            raise failures[0]

    @property
    def _lock(self) -> threading.Lock:
        return _GENERATING.setdefault(self.model, threading.Lock())

    def _generate(self, question: str, max_new_tokens: int, **generate_kwargs) -> torch.Tensor:
        """The answer's tokens `(num_tokens,)`."""
        input_ids = self._input_ids(question)
        if (limit := self._max_positions) is not None:
            if input_ids.shape[1] >= limit:
                raise ValueError(
                    f"Expected a scan and a question of fewer than {limit} tokens, the language model's positions, "
                    f"got {input_ids.shape[1]}: shorten the question."
                )
            max_new_tokens = min(max_new_tokens, limit - input_ids.shape[1])
        generated = self.model.generate(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=max_new_tokens,
            **self._what_is_known(input_ids, generate_kwargs),
            **generate_kwargs,
        )
        return generated[0, input_ids.shape[1] :]

    def _decode(self, tokens: torch.Tensor) -> str:
        return self.processor.tokenizer.decode(tokens, skip_special_tokens=True)

    def _input_ids(self, question: str) -> torch.Tensor:
        prompt = prompt_for(self.processor, question)
        return self.processor.tokenize_prompts([prompt])["input_ids"].to(self.model.device)

    @property
    def _max_positions(self) -> int | None:
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    def _what_is_known(self, input_ids: torch.Tensor, generate_kwargs: dict[str, Any]) -> dict[str, Any]:
        """The language model's cache of the prompt up to the scan's end, or, where it has no use, the scan itself."""
        if self._continues_a_cache(input_ids, generate_kwargs):
            if self._prefix is None:
                self._prefix = self._read_prefix()
            prefix, name, cache = self._prefix
            length = prefix.shape[1]
            if input_ids.shape[1] > length and torch.equal(input_ids[:, :length], prefix):
                return {name: copy.deepcopy(cache)}
        return {"mm_encoder_outputs": {"image": self.image_features}}

    def _continues_a_cache(self, input_ids: torch.Tensor, generate_kwargs: dict[str, Any]) -> bool:
        settings = {**self.model.generation_config.to_dict(), **generate_kwargs}
        if config := generate_kwargs.get("generation_config"):
            settings = {**config.to_dict(), **generate_kwargs}
        rows = (settings.get("num_beams") or 1) * (settings.get("num_return_sequences") or 1)
        if rows > 1 or settings.get("use_cache") is False or any(settings.get(name) for name in _OTHER_CACHES):
            return False
        # Some rotary embeddings change all positions once a prompt is longer than this.
        text_config = self.model.config.get_text_config()
        rope = getattr(text_config, "rope_parameters", None) or {}
        original = rope.get("original_max_position_embeddings", self._max_positions)
        return original is None or input_ids.shape[1] <= original

    @torch.no_grad()
    def _read_prefix(self) -> tuple[torch.Tensor, str, Any]:
        """Tokens of any prompt up to the scan's last, and the language model's cache after them with its name."""
        prompt = self._input_ids(PROBE)
        end = (prompt[0] == self.model.config.image_token_id).nonzero()[-1].item() + 1
        prefix = prompt[:, :end]
        outputs = self.model(
            input_ids=prefix,
            attention_mask=torch.ones_like(prefix),
            mm_encoder_outputs={"image": self.image_features},
            use_cache=True,
            logits_to_keep=1,
        )
        name = "cache" if "cache" in outputs else "past_key_values"  # transformers 5.24, before
        return prefix, name, outputs[name]


def prompt_for(processor: HSENetProcessor, question: str) -> str:
    """The text that asks about a scan; a `ValueError` for a question that cannot be asked about any."""
    if not question.strip() or len(question) > MAX_QUESTION_CHARACTERS:
        raise ValueError(f"Expected a question of 1 to {MAX_QUESTION_CHARACTERS} characters, got {len(question)}.")
    return processor.prompt(question)


def describe_geometry(volume: Volume) -> dict[str, Any]:
    """What may be said of a scan to anybody: where its voxels lie and what values they have, and no name."""
    return {
        "shape": list(volume.array.shape),
        "spacing": [round(millimetres, 4) for millimetres in volume.spacing],
        "stored_orientation": volume.stored_orientation,
        "hu_range": [float(volume.array.min()), float(volume.array.max())],
    }


def read_with_warnings(source: Any, **read_options) -> tuple[Volume, list[str]]:
    """As `read_volume`, with its warnings as text instead of on the console."""
    with _READING, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", HSENetInputWarning)
        volume = read_volume(source, **read_options)
    for one in caught:
        if not issubclass(one.category, HSENetInputWarning):
            warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)
    return volume, [str(one.message) for one in caught if issubclass(one.category, HSENetInputWarning)]


class _Stop(StoppingCriteria):
    """Ends the writing after the next token, once requested."""

    def __init__(self):
        self.requested = threading.Event()

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), self.requested.is_set(), device=input_ids.device)


def _stripped(pieces: Iterator[str]) -> Iterator[str]:
    """The same text without white space at its ends, and no empty piece."""
    started, waiting = False, ""
    for piece in pieces:
        text = waiting + piece if started else piece.lstrip()
        kept = text.rstrip()
        waiting = text[len(kept) :]
        if kept:
            started = True
            yield kept


__all__ = ["EncodedScan", "describe_geometry", "load_generation_model", "prompt_for", "read_with_warnings"]
