"""The configurations: the paper's sizes, sizes that follow from others, refused values, saving and loading."""

import pytest
import tiny
import torch
from huggingface_hub.errors import StrictDataclassFieldValidationError
from torch import nn
from transformers import BertConfig, GPT2Config

from configuration_hsenet import HSENetCLIPConfig, HSENetConfig, HSENetVisionConfig
from modeling_hsenet import HSENetCLIPModel, HSENetForConditionalGeneration


def count_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_defaults_are_the_papers_sizes():
    config = HSENetConfig()
    for vision_config in (config.vision_config, config.local_vision_config):
        assert vision_config.image_size == (32, 256, 256) and vision_config.patch_size == (4, 16, 16)
        assert vision_config.grid_size == (8, 16, 16)
        assert vision_config.num_patches == 2048
        assert (vision_config.hidden_size, vision_config.num_hidden_layers) == (768, 12)
    assert config.image_seq_length == 256
    assert config.vision_config.slice_hidden_size is None
    assert config.local_vision_config.slice_hidden_size == config.slice_config.hidden_size == 768
    assert config.slice_config.grid_size == (1, 14, 14)
    assert config.text_config.hidden_size == 3072 and config.num_slices == 32


def test_residuals_are_those_of_models_saved_before_there_was_a_choice():
    assert HSENetVisionConfig().scorer_residual == HSENetConfig().packer_residual == "projected_query"


@pytest.mark.parametrize(
    ("config_class", "field"), [(HSENetVisionConfig, "scorer_residual"), (HSENetConfig, "packer_residual")]
)
def test_unknown_residual_is_refused(config_class, field):
    with pytest.raises(StrictDataclassFieldValidationError, match=f"{field}[^$]*'query'[^$]*got none"):
        config_class(**{field: "none"})
    assert getattr(config_class.from_dict(config_class(**{field: "query"}).to_dict()), field) == "query"


def test_parameter_counts_of_the_papers_sizes():
    with torch.device("meta"):
        model = HSENetForConditionalGeneration(HSENetConfig()).model
    encoders = {"global": model.global_encoder, "local": model.local_encoder}
    assert {name: len(encoder.state_dict()) for name, encoder in encoders.items()} == {"global": 138, "local": 150}
    millions = {name: round(count_parameters(encoder) / 1e6, 2) for name, encoder in encoders.items()}
    assert millions == {"global": 87.39, "local": 89.75}
    projector = model.multi_modal_projector
    assert count_parameters(projector.global_packer) == count_parameters(projector.local_packer) == 14_166_528
    assert round(count_parameters(model.language_model) / 1e9, 1) == 3.8
    # A ViT-B/16 of pictures without its classification head
    assert round(count_parameters(model.slice_encoder) / 1e6, 1) == 85.8


@pytest.mark.parametrize("guidance", ["none", "slices"])
def test_contrastive_defaults(guidance):
    with torch.device("meta"):
        model = HSENetCLIPModel(HSENetCLIPConfig(guidance=guidance))
    millions = round(count_parameters(model.vision_model) / 1e6, 2)
    assert millions == {"none": 87.39, "slices": 89.75}[guidance]
    assert (model.slice_encoder is None) == (guidance == "none")
    assert model.config.text_config.model_type == "bert" and model.config.projection_dim == 768
    assert not any("pooler" in name for name, _ in model.named_parameters())  # it would never get a gradient


@pytest.mark.parametrize(
    ("image_size", "patch_size", "window", "grid", "tokens"),
    [
        ((32, 256, 256), (4, 16, 16), (2, 2, 2), (8, 16, 16), 256),
        ((16, 64, 96), (4, 16, 16), (1, 2, 3), (4, 4, 6), 16),
        ((64, 128, 128), (8, 8, 32), (4, 4, 4), (8, 16, 4), 8),
    ],
)
def test_sizes_follow_from_others(image_size, patch_size, window, grid, tokens):
    vision = {"image_size": image_size, "patch_size": patch_size}
    for encoders, factor in (("global", 1), ("local", 1), ("both", 2)):
        # A list, as it comes from JSON
        name = "local_vision_config" if encoders == "local" else "vision_config"
        config = HSENetConfig(encoders=encoders, packer_window_size=list(window), **{name: vision})
        assert config.local_vision_config is None or config.local_vision_config.grid_size == grid
        assert config.vision_config is None or config.vision_config.grid_size == grid
        assert config.image_seq_length == factor * tokens


def test_encoders_of_different_sizes():
    """The local encoder may have its own grid; the number of tokens is the sum."""
    small = {**tiny.VISION, "image_size": (8, 16, 16)}
    model = tiny.generation_model(local_vision_config=small)
    assert model.config.vision_config.grid_size == (4, 4, 4) and model.config.local_vision_config.grid_size == (
        4,
        2,
        2,
    )
    assert model.config.image_seq_length == 16 + 4


@pytest.mark.parametrize(
    ("config_class", "arguments", "words"),
    [
        (HSENetVisionConfig, {"image_size": (30, 256, 256)}, ["(30, 256, 256)", "(4, 16, 16)", "divisible"]),
        (HSENetVisionConfig, {"image_size": (32, 256)}, ["image_size", "three", "(32, 256)"]),
        (HSENetVisionConfig, {"patch_size": (0, 16, 16)}, ["patch_size", "positive", "(0, 16, 16)"]),
        (HSENetVisionConfig, {"patch_dropout": 1.0}, ["patch_dropout", "below 1", "1.0"]),
        (HSENetVisionConfig, {"hidden_size": 100}, ["hidden_size 100", "num_attention_heads 12"]),
        (HSENetConfig, {"packer_window_size": (1, 3, 4)}, ["(8, 16, 16)", "(1, 3, 4)", "divisible"]),
        (HSENetConfig, {"packer_window_size": (4, 4)}, ["packer_window_size", "three", "(4, 4)"]),
        (HSENetConfig, {"qformer_num_layers": 0}, ["qformer_num_layers", "at least 1", "0"]),
        (HSENetCLIPConfig, {"guidance": "text", "slice_config": tiny.SLICES}, ["slice_config", 'guidance="slices"']),
        (
            HSENetCLIPConfig,
            {"guidance": "text", "vision_config": {"slice_hidden_size": 9}},
            ["slice_config", '"text"'],
        ),
        (
            HSENetConfig,
            {"local_vision_config": {"image_size": (12, 32, 32)}, "packer_window_size": (2, 2, 2)},
            ["(3, "],
        ),
        (HSENetConfig, {"vision_config": {"slice_hidden_size": 24}}, ["slice_hidden_size 24", "local_vision_config"]),
        (HSENetCLIPConfig, {"slice_config": tiny.SLICES}, ["slice_config", 'guidance="slices"']),
    ],
)
def test_sizes_that_do_not_fit_are_named(config_class, arguments, words):
    with pytest.raises(ValueError) as error:
        config_class(**arguments)
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize(
    ("config_class", "arguments"),
    [
        (HSENetConfig, {"encoders": "none"}),
        (HSENetCLIPConfig, {"guidance": "questions"}),
        (HSENetConfig, {"projector": "convolution"}),
        (HSENetVisionConfig, {"hidden_size": "768"}),
        (HSENetVisionConfig, {"qkv_bias": "yes"}),
    ],
)
def test_wrong_choices_and_types_are_refused(config_class, arguments):
    (name, value), *_ = arguments.items()
    with pytest.raises(StrictDataclassFieldValidationError, match=f"(?s){name}.*{value}"):
        config_class(**arguments)


def test_each_encoder_has_its_configuration_and_no_other():
    only_global = HSENetConfig(encoders="global", slice_config=tiny.SLICES)
    assert only_global.slice_config is None and only_global.local_vision_config is None
    only_local = HSENetConfig(encoders="local", vision_config=tiny.VISION, slice_config=tiny.SLICES)
    assert only_local.vision_config is None
    assert only_local.local_vision_config.grid_size == HSENetVisionConfig(**tiny.VISION).grid_size
    assert only_local.local_vision_config.slice_hidden_size == tiny.SLICES["hidden_size"]


def test_no_slice_encoder_where_the_scorer_says_how_wide_its_features_are():
    guided = {**tiny.VISION, "slice_hidden_size": 20}
    both = {"local_vision_config": guided, "vision_config": tiny.VISION, "packer_window_size": tiny.WINDOW}
    for config in (HSENetCLIPConfig(guidance="slices", vision_config=guided), HSENetConfig(**both)):
        again = type(config).from_dict(config.to_dict())
        assert config.slice_config is again.slice_config is None
        encoder = again.vision_config if config.model_type == "hsenet_clip" else again.local_vision_config
        assert encoder.slice_hidden_size == 20
    with_encoder = HSENetCLIPConfig(guidance="slices", vision_config=guided, slice_config=tiny.SLICES)
    assert with_encoder.vision_config.slice_hidden_size == tiny.SLICES["hidden_size"]


def test_local_encoder_has_the_global_encoders_sizes_by_default():
    config = tiny.generation_model().config
    changed = {"slice_hidden_size": tiny.SLICES["hidden_size"]}
    assert config.local_vision_config.to_dict() == {**config.vision_config.to_dict(), **changed}


def test_another_models_configuration_is_not_changed():
    first = tiny.clip_model().config
    second = HSENetCLIPConfig(guidance="slices", vision_config=first.vision_config, slice_config=tiny.SLICES)
    both = HSENetConfig(
        vision_config=first.vision_config,
        local_vision_config=first.vision_config,
        slice_config=second.slice_config,
        packer_window_size=tiny.WINDOW,
    )
    assert second.vision_config.slice_hidden_size == both.local_vision_config.slice_hidden_size == 24
    assert first.vision_config.slice_hidden_size is both.vision_config.slice_hidden_size is None


@pytest.mark.parametrize("kind", ["vision", "clip_global", "clip_slices", "global", "local", "both"])
def test_save_and_load(kind, tmp_path):
    config = {
        "vision": lambda: HSENetVisionConfig(**tiny.VISION, slice_hidden_size=7, scorer_dropout=0.3),
        "clip_global": lambda: tiny.clip_model().config,
        "clip_slices": lambda: tiny.clip_model("slices", logit_scale_init_value=1.5).config,
    }.get(kind, lambda: tiny.generation_model(encoders=kind, packer_dropout=0.25).config)()
    config.save_pretrained(tmp_path)
    loaded = type(config).from_pretrained(tmp_path)
    assert loaded.to_dict() == {**config.to_dict(), "auto_map": loaded.auto_map}
    for name in config.sub_configs:
        assert type(getattr(loaded, name)) is type(getattr(config, name))
    if kind in ("global", "local", "both"):
        assert loaded.image_seq_length == config.image_seq_length
        assert loaded.packer_window_size == tiny.WINDOW and loaded.packer_dropout == 0.25


@pytest.mark.parametrize("tied", [True, False])
def test_tying_comes_from_the_language_model(tied):
    assert HSENetConfig(text_config=tiny.text_config(tie_word_embeddings=tied)).tie_word_embeddings is tied


def test_language_model_configuration_may_be_an_object():
    config = HSENetConfig(text_config=GPT2Config(n_embd=48, n_layer=1, n_head=2))
    assert isinstance(config.text_config, GPT2Config) and config.text_config.hidden_size == 48
    assert HSENetConfig.from_dict(config.to_dict()).text_config.to_dict() == config.text_config.to_dict()


def test_no_trace_of_the_folders_that_the_parts_came_from():
    vision, text = HSENetVisionConfig(**tiny.VISION), BertConfig()
    vision._name_or_path = text._name_or_path = "/home/somebody/study"  # as from_pretrained leaves it
    for parts in ((vision, text), (vision.to_dict(), text.to_dict())):
        config = HSENetCLIPConfig(vision_config=parts[0], text_config=parts[1])
        assert "somebody" not in config.to_json_string()
    assert vision._name_or_path == "/home/somebody/study"  # the caller's own stays
