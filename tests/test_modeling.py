"""The models' laws and values on tiny real configurations: encoders, packers, contrastive and generating models."""

from itertools import product
from math import prod

import einops
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedModel

from attention_hsenet import HSENetCrossAttention
from modeling_hsenet import HSENetForConditionalGeneration
from projectors_hsenet import HSENetSpatialPacker


SLICE_WIDTH = tiny.SLICES["hidden_size"]
QUESTIONS = ["a nodule?", "Is there a pericardial effusion? The heart is enlarged; trachea"]
NEW_TOKENS = 8


def volumes(count: int = 2, seed: int = 1) -> torch.Tensor:
    return torch.rand(count, 1, *tiny.IMAGE_SIZE, generator=torch.Generator().manual_seed(seed))


def slice_features(count: int = 2, seed: int = 2) -> torch.Tensor:
    return torch.randn(count, tiny.NUM_SLICES, SLICE_WIDTH, generator=torch.Generator().manual_seed(seed))


def slices(count: int = 2, seed: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, tiny.NUM_SLICES, 3, *tiny.SLICE_SIZE, generator=generator)


def encoder_inputs(guided: bool) -> dict[str, torch.Tensor]:
    return {"pixel_values": volumes(), **({"slice_features": slice_features()} if guided else {})}


# The vision transformer


def test_patches_are_cut_in_raster_order():
    embeddings = tiny.vision_model(num_channels=2).embeddings
    pixel_values = torch.cat([volumes(seed=1), volumes(seed=2)], dim=1)
    depth, height, width = tiny.PATCH_SIZE
    pattern = "b c (d pd) (h ph) (w pw) -> b (d h w) (pd ph pw c)"
    patches = einops.rearrange(pixel_values, pattern, pd=depth, ph=height, pw=width)
    expected = embeddings.projection(patches) + embeddings.position_embeddings
    torch.testing.assert_close(embeddings(pixel_values), expected)


def test_scores_of_one_give_the_plain_vit():
    plain, guided = tiny.vision_model(), tiny.vision_model(slice_hidden_size=SLICE_WIDTH)
    missing, unexpected = guided.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected and all(name.startswith("scorer.") for name in missing)
    expected = plain(volumes()).last_hidden_state
    nn.init.zeros_(guided.scorer.score_proj.weight)
    nn.init.constant_(guided.scorer.score_proj.bias, 50)
    torch.testing.assert_close(guided(**encoder_inputs(True)).last_hidden_state, expected)
    nn.init.zeros_(guided.scorer.score_proj.bias)
    assert (guided(**encoder_inputs(True)).last_hidden_state - expected).abs().max() > 0.01


def test_patch_scores_and_their_use():
    model = tiny.vision_model(slice_hidden_size=SLICE_WIDTH)
    nn.init.constant_(model.cls_token, 3)
    outputs = model(**encoder_inputs(True), output_hidden_states=True)
    assert outputs.patch_scores.shape == (2, *model.config.grid_size)
    assert (outputs.patch_scores > 0).all() and (outputs.patch_scores < 1).all() and outputs.patch_scores.std() > 0.01
    first = outputs.hidden_states[0]
    torch.testing.assert_close(first[:, 1:], model.embeddings(volumes()) * outputs.patch_scores.flatten(1)[..., None])
    # CLS has no position embedding and no score.
    assert (first[:, 0] == 3).all()
    torch.testing.assert_close(outputs.pooler_output, outputs.last_hidden_state[:, 0])
    other = model(volumes(), slice_features(seed=9)).patch_scores
    assert (other - outputs.patch_scores).abs().max() > 0.01


def attended_by_hand(attention: HSENetCrossAttention, queries, context, residual: str) -> torch.Tensor:
    """Single-head cross-attention and LayerNorm, one query at a time."""
    keys, values = attention.k_proj(context), attention.v_proj(context)
    rows = []
    for query in queries:
        projected = attention.q_proj(query)
        weights = (keys @ projected / len(query) ** 0.5).softmax(dim=0)
        added = projected if residual == "projected_query" else query
        rows.append(attention.norm(added + attention.out_proj(weights @ values)))
    return torch.stack(rows)


@pytest.mark.parametrize("residual", ["projected_query", "query"])
def test_scorers_residual(residual):
    model = tiny.vision_model(slice_hidden_size=SLICE_WIDTH, scorer_residual=residual)
    outputs = model(**encoder_inputs(True))
    patches = model.embeddings(volumes())[1]
    guided = attended_by_hand(model.scorer.attention, patches, slice_features()[1], residual)
    expected = torch.sigmoid(model.scorer.score_proj(guided)).reshape(model.config.grid_size)
    torch.testing.assert_close(outputs.patch_scores[1], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("residual", ["projected_query", "query"])
@pytest.mark.parametrize("window", [(1, 4, 4), (2, 2, 2), (2, 4, 4), (1, 8, 8)])
def test_packer_by_hand(window, residual):
    """The paper's windows, each patch looked up by its index in the grid."""
    grid = (2, 16, 8)
    vision_config = {**tiny.VISION, "image_size": grid, "patch_size": (1, 1, 1)}
    config = tiny.generation_model(
        encoders="global", vision_config=vision_config, packer_window_size=window, packer_residual=residual
    ).config
    torch.manual_seed(4)
    module = HSENetSpatialPacker(config, config.vision_config).eval()
    patches = torch.randn(1, prod(grid), vision_config["hidden_size"])
    rows = []
    for corner in product(*(range(0, size, step) for size, step in zip(grid, window, strict=True))):
        offsets = product(*(range(start, start + step) for start, step in zip(corner, window, strict=True)))
        voxel = torch.stack([patches[0, (d * grid[1] + h) * grid[2] + w] for d, h, w in offsets])
        attended = attended_by_hand(module.attention, voxel.mean(dim=0, keepdim=True), voxel, residual)
        rows.append(module.fc2(nn.functional.gelu(module.fc1(attended)))[0])
    assert len(rows) == config.image_seq_length
    torch.testing.assert_close(module(patches)[0][0], torch.stack(rows), atol=1e-5, rtol=0)


@pytest.mark.parametrize("guided", [False, True])
def test_patch_dropout_is_for_training_only(guided):
    model = tiny.vision_model(slice_hidden_size=SLICE_WIDTH if guided else None, patch_dropout=0.5)
    num_patches = model.config.num_patches
    assert model.eval()(**encoder_inputs(guided)).last_hidden_state.shape[1] == 1 + num_patches
    output = model.train()(**encoder_inputs(guided))
    assert output.last_hidden_state.shape[1] == 1 + num_patches // 2
    assert not guided or output.patch_scores[0].numel() == num_patches


def test_dropped_patches_are_drawn_for_each_volume_without_repetition():
    model = tiny.vision_model(patch_dropout=0.25).train()
    num_patches = model.config.num_patches
    patches = torch.arange(num_patches, dtype=torch.float).reshape(1, -1, 1).repeat(8, 1, 3)
    kept = model._drop_patches(patches)[..., 0]
    assert all(len(set(row.tolist())) == round(0.75 * num_patches) for row in kept)
    assert len({tuple(sorted(row.tolist())) for row in kept}) > 1


def test_order_of_slices_does_not_matter():
    """The scorer's attention sees a set of slices; their position is for the features to tell."""
    model = tiny.vision_model(slice_hidden_size=SLICE_WIDTH)
    scores = [model(volumes(), features).patch_scores for features in (slice_features(), slice_features().flip(1))]
    torch.testing.assert_close(*scores)


@pytest.mark.parametrize("guided", [False, True])
def test_attention_implementations_agree(guided):
    model = tiny.vision_model(slice_hidden_size=SLICE_WIDTH if guided else None)
    outputs = {}
    for name in ("eager", "sdpa"):
        model.set_attn_implementation(name)
        outputs[name] = model(**encoder_inputs(guided), output_attentions=name == "eager")
    for name in ("last_hidden_state", "patch_scores"):
        eager, sdpa = (getattr(outputs[implementation], name) for implementation in ("eager", "sdpa"))
        assert (eager is None) == (name == "patch_scores" and not guided)
        if eager is not None:
            torch.testing.assert_close(eager, sdpa, atol=1e-5, rtol=0)
    attentions = outputs["eager"].attentions
    assert len(attentions) == model.config.num_hidden_layers
    torch.testing.assert_close(attentions[0].sum(dim=-1), torch.ones(2, 4, 1 + model.config.num_patches))
    if guided:
        assert outputs["eager"].slice_attentions.shape == (2, model.config.num_patches, tiny.NUM_SLICES)


def test_gradient_checkpointing_gives_the_same_gradients():
    model = tiny.vision_model(slice_hidden_size=SLICE_WIDTH, scorer_dropout=0.0).train()
    calls = []
    model.layers[0].norm1.register_forward_hook(lambda *_: calls.append(1))

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        model(**encoder_inputs(True)).last_hidden_state.square().sum().backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    expected = gradients()
    assert len(calls) == 1
    model.gradient_checkpointing_enable()
    torch.testing.assert_close(gradients(), expected)
    assert len(calls) == 3  # computed again for the backward pass


def test_slice_encoder_takes_pictures():
    model = tiny.vision_model(**tiny.SLICES)
    pictures = slices()[0].unsqueeze(2)  # (num_slices, 3, 1, height, width)
    assert model(pictures).pooler_output.shape == (tiny.NUM_SLICES, SLICE_WIDTH)
    assert model.layers[0].attention.qkv.bias is not None
    pattern = "b c 1 (h ph) (w pw) -> b (h w) (ph pw c)"
    patches = einops.rearrange(pictures, pattern, ph=8, pw=8)
    expected = model.embeddings.projection(patches) + model.embeddings.position_embeddings
    torch.testing.assert_close(model.embeddings(pictures), expected)


@pytest.mark.parametrize(
    ("guided", "inputs", "words"),
    [
        (True, lambda: {"pixel_values": volumes()}, ["slice_pixel_values", "slice_features"]),
        (False, lambda: encoder_inputs(True), ["no slice guidance"]),
        (
            True,
            lambda: {"pixel_values": volumes(), "slice_features": slice_features(1)},
            ["(2, num_slices, 24)", "(1,"],
        ),
        (
            True,
            lambda: {"pixel_values": volumes(), "slice_features": slice_features()[..., :5]},
            ["(2, num_slices, 24)", "(2, 4, 5)"],
        ),
        (False, lambda: {"pixel_values": volumes()[..., :16]}, ["1, 8, 32, 32", "(2, 1, 8, 32, 16)"]),
        (False, lambda: {"pixel_values": volumes()[:, 0]}, ["1, 8, 32, 32", "(2, 8, 32, 32)"]),
    ],
)
def test_wrong_encoder_inputs(guided, inputs, words):
    model = tiny.vision_model(slice_hidden_size=SLICE_WIDTH if guided else None)
    with pytest.raises(ValueError) as error:
        model(**inputs())
    assert all(word in str(error.value) for word in words), str(error.value)


# The spatial packer


def packer(window: tuple[int, int, int]) -> HSENetSpatialPacker:
    config = tiny.generation_model(encoders="global", packer_window_size=window).config
    torch.manual_seed(4)
    return HSENetSpatialPacker(config, config.vision_config).eval()


def patch_states() -> torch.Tensor:
    return torch.randn(2, 64, tiny.VISION["hidden_size"], generator=torch.Generator().manual_seed(5))


SPLIT = "b (d wd h wh w ww) c -> (b d h w) (wd wh ww) c"


@pytest.mark.parametrize("window", [(1, 2, 2), (2, 2, 2), (4, 1, 2)])
def test_windows(window):
    module = packer(window)
    sizes = dict(zip(("wd", "wh", "ww"), window, strict=True))
    grid = {name: 4 // size for name, size in zip(("d", "h", "w"), window, strict=True)}
    expected = einops.rearrange(patch_states(), SPLIT, **sizes, **grid)
    torch.testing.assert_close(module.split_windows(patch_states()), expected)
    # Attention, whose query is the window's mean, neither sees the order within a window nor another window.
    packed, _ = module(patch_states())
    back = "(b d h w) (wd wh ww) c -> b (d wd h wh w ww) c"
    shuffled_patches = expected[:, torch.randperm(expected.shape[1])]
    within = einops.rearrange(shuffled_patches, back, **sizes, **grid)
    assert not torch.equal(within, patch_states())
    torch.testing.assert_close(module(within)[0], packed)
    order = torch.randperm(packed.shape[1], generator=torch.Generator().manual_seed(6))
    windows = expected.unflatten(0, (2, -1))[:, order].flatten(0, 1)
    between = einops.rearrange(windows, back, **sizes, **grid)
    torch.testing.assert_close(module(between)[0], packed[:, order])
    assert (packed[:, order] - packed).abs().max() > 0.01


def test_packer_in_bfloat16():
    module = packer((1, 2, 2))
    expected, _ = module(patch_states())
    packed, _ = module.to(torch.bfloat16)(patch_states().to(torch.bfloat16))
    assert packed.dtype == torch.bfloat16
    assert nn.functional.cosine_similarity(packed.float(), expected, dim=-1).min() > 0.99


# The contrastive model


def text_inputs(*texts: str) -> dict[str, torch.Tensor]:
    tokens = tiny.tokenizer()(list(texts), padding=True, return_tensors="pt")
    return {"input_ids": tokens["input_ids"], "attention_mask": tokens["attention_mask"]}


@pytest.mark.parametrize("guidance", ["none", "slices"])
def test_logits_are_scaled_cosines(guidance):
    model = tiny.clip_model(guidance, logit_scale_init_value=1.3)
    images = {"pixel_values": volumes()} | ({"slice_pixel_values": slices()} if guidance == "slices" else {})
    texts = text_inputs(*tiny.SENTENCES[:3])
    outputs = model(**images, **texts)
    image_features = model.get_image_features(**images).pooler_output
    text_features = model.get_text_features(**texts).pooler_output
    cosines = nn.functional.cosine_similarity(image_features[:, None], text_features[None], dim=-1)
    scale = torch.tensor(1.3).exp()
    torch.testing.assert_close(outputs.logits_per_image, scale * cosines)
    torch.testing.assert_close(outputs.logits_per_text, scale * cosines.T)
    torch.testing.assert_close(outputs.image_embeds, nn.functional.normalize(image_features, dim=-1))
    torch.testing.assert_close(outputs.text_embeds, nn.functional.normalize(text_features, dim=-1))
    assert outputs.patch_scores is None
    assert cosines.std() > 0.01  # volumes and texts differ


def test_padding_does_not_change_text_embeddings():
    model = tiny.clip_model()
    alone = [model.get_text_features(**text_inputs(text)).pooler_output for text in tiny.SENTENCES[:2]]
    inputs = text_inputs(*tiny.SENTENCES)
    assert (inputs["attention_mask"][:2] == 0).any()
    together = model.get_text_features(**inputs).pooler_output
    torch.testing.assert_close(together[:2], torch.cat(alone), atol=1e-5, rtol=1e-5)


def test_cached_slice_features_and_patch_scores():
    model = tiny.clip_model("slices")
    texts = text_inputs(*tiny.SENTENCES[:2])
    features = model.get_slice_features(slices())
    assert features.shape == (2, tiny.NUM_SLICES, SLICE_WIDTH)
    one = model.slice_encoder(slices()[1, 2, :, None][None]).pooler_output[0]
    torch.testing.assert_close(features[1, 2], one, atol=1e-5, rtol=1e-5)
    pixels = model(pixel_values=volumes(), slice_pixel_values=slices(), output_patch_scores=True, **texts)
    cached = model(pixel_values=volumes(), slice_features=features, output_patch_scores=True, **texts)
    torch.testing.assert_close(pixels.logits_per_image, cached.logits_per_image)
    assert pixels.patch_scores.shape == (2, *model.config.vision_config.grid_size)
    torch.testing.assert_close(pixels.patch_scores, model.vision_model(volumes(), features).patch_scores)


def test_wrong_contrastive_inputs():
    texts = text_inputs("a")
    with pytest.raises(ValueError, match="no 2D encoder of slices"):
        tiny.clip_model()(pixel_values=volumes(), slice_pixel_values=slices(), **texts)
    model = tiny.clip_model("slices")
    with pytest.raises(ValueError, match="slice_pixel_values"):
        model(pixel_values=volumes(), **texts)
    with pytest.raises(ValueError, match="not both"):
        model(pixel_values=volumes(), slice_pixel_values=slices(), slice_features=slice_features(), **texts)
    with pytest.raises(ValueError, match=r"\(batch, 4, channels.*\(2, 3, 3, 16, 16\)"):
        model(pixel_values=volumes(), slice_pixel_values=slices()[:, :3], **texts)


# The generating model


def prompts(model: HSENetForConditionalGeneration, texts: list[str], scans: list) -> dict[str, torch.Tensor]:
    return dict(tiny.processor(model)(volumes=scans, text=texts, spacing=(3, 1, 1), return_tensors="pt"))


def generated(model: HSENetForConditionalGeneration, inputs: dict, **kwargs) -> list[list[int]]:
    """The new tokens only; no end token before `NEW_TOKENS`, so that no row stops earlier than another."""
    settings = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False, **kwargs}
    return model.generate(**inputs, **settings)[:, inputs["input_ids"].shape[1] :].tolist()


@pytest.fixture(scope="module")
def model() -> HSENetForConditionalGeneration:
    return tiny.generation_model()


@pytest.fixture(scope="module")
def batch(model) -> dict[str, torch.Tensor]:
    return prompts(model, QUESTIONS, [tiny.scan(0), tiny.scan(1)[:, ::-1].copy()])


@pytest.fixture(scope="module")
def greedy(model, batch) -> list[list[int]]:
    return generated(model, batch)


def test_loss_is_the_shifted_cross_entropy(model, batch):
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    labels[:, :20] = -100
    outputs = model(**batch, labels=labels)
    losses = [
        -row_logits.log_softmax(dim=-1)[position, label]
        for row_logits, row_labels in zip(outputs.logits, labels, strict=True)
        for position, label in enumerate(row_labels[1:].tolist())
        if label != -100
    ]
    assert 5 < len(losses) < labels.numel()
    torch.testing.assert_close(outputs.loss, torch.stack(losses).mean())
    assert outputs.patch_scores is None
    scores = model(**batch, output_patch_scores=True).patch_scores
    assert scores.shape == (2, 4, 4, 4) and scores.std() > 0.01


def test_training_keeps_no_logits_and_has_the_loss_and_gradients_of_all_positions(batch):
    """Answer positions alone meet the vocabulary; the full form is the cross-entropy over all logits."""
    model = tiny.generation_model()
    labels = batch["input_ids"].clone()
    labels[0, :30] = -100
    labels[1, :40] = -100
    logits = model(**batch).logits[:, :-1]
    full = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels[:, 1:])
    full.backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    sizes = []
    model.lm_head.register_forward_hook(lambda module, inputs, output: sizes.append(output.numel()))
    outputs = model(**batch, labels=labels, skip_logits=True)
    outputs.loss.backward()
    assert outputs.logits is None
    assert sizes == [(labels[:, 1:] != -100).sum() * model.config.text_config.vocab_size]
    torch.testing.assert_close(outputs.loss, full)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-6, msg=name)
    assert model.train()(**batch, labels=labels).logits is None
    assert model(**batch, labels=labels, skip_logits=False).logits.shape[:2] == labels.shape
    assert model(**batch).logits is not None


def test_logits_are_kept_where_asked(model, batch):
    everything = model(**batch).logits
    torch.testing.assert_close(model(**batch, logits_to_keep=3).logits, everything[:, -3:])
    positions = torch.tensor([2, 40])
    torch.testing.assert_close(model(**batch, logits_to_keep=positions).logits, everything[:, positions])
    labels = batch["input_ids"]
    both = model(**batch, labels=labels, logits_to_keep=1)
    torch.testing.assert_close(both.loss, model(**batch, labels=labels).loss)
    assert both.logits.shape[1] == 1


# Cached patch features


def features_of(model, batch) -> tuple[dict, dict]:
    """The volumes of a batch as patch features, and the batch with these in their place."""
    volumes = {name: batch[name] for name in ("pixel_values", "slice_pixel_values")}
    with torch.no_grad():
        features = model.get_patch_features(**volumes)
    features = {name: tensor for name, tensor in features.items() if name != "patch_scores"}
    return features, {**{name: tensor for name, tensor in batch.items() if name not in volumes}, **features}


@pytest.mark.parametrize("encoders", ["both", "global", "local"])
def test_cached_patch_features_stand_for_the_volumes(batch, encoders):
    model = tiny.generation_model(encoders=encoders)
    batch = prompts(model, QUESTIONS, [tiny.scan(0), tiny.scan(1)[:, ::-1].copy()])
    features, cached = features_of(model, batch)
    assert len(features) == (2 if encoders == "both" else 1)
    torch.testing.assert_close(model(**cached).logits, model(**batch).logits)
    losses = [model(**inputs, labels=batch["input_ids"]).loss for inputs in (cached, batch)]
    gradients = []
    for loss in losses:
        model.zero_grad()
        loss.backward()
        gradients.append(
            model.model.multi_modal_projector.get_parameter(
                "local_packer.fc2.weight" if encoders == "local" else "global_packer.fc2.weight"
            ).grad
        )
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}, {"use_cache": False}])
def test_generation_from_cached_patch_features(model, batch, settings):
    _, cached = features_of(model, batch)
    settings = {"max_new_tokens": 6, "do_sample": False, **settings}
    assert torch.equal(model.generate(**cached, **settings), model.generate(**batch, **settings))


def test_patch_features_that_do_not_fit_are_errors(model, batch):
    features, cached = features_of(model, batch)
    local = cached.pop("local_patch_features")
    with pytest.raises(ValueError, match=r"local_patch_features .*\(num_volumes, 64, 32\), got None"):
        model(**cached)
    with pytest.raises(ValueError, match=r"got \(2, 63, 32\)"):
        model(**cached, local_patch_features=local[:, 1:])
    with pytest.raises(ValueError, match="not both"):
        model(**batch, **features)
    with pytest.raises(ValueError, match="to be None without"):
        tiny.generation_model(encoders="global")(**cached, local_patch_features=local)


def test_tokens_of_the_volumes_replace_the_placeholders(model):
    """Two volumes in one prompt, against a hand-made sequence of embeddings."""
    inputs = prompts(model, ["<image>nodule <image>a nodule of 12 mm"], [tiny.scan(0), tiny.scan(1)[:, ::-1].copy()])
    volume_inputs = {name: inputs[name] for name in ("pixel_values", "slice_pixel_values")}
    features = model.get_image_features(**volume_inputs).pooler_output
    assert features.shape == (2, model.config.image_seq_length, 32) and model.config.image_seq_length == 32
    assert (features[0] - features[1]).abs().max() > 0.1
    embeddings, queue = model.get_input_embeddings()(inputs["input_ids"]).clone(), list(features.flatten(0, 1))
    for position, token in enumerate(inputs["input_ids"][0].tolist()):
        if token == model.config.image_token_id:
            embeddings[0, position] = queue.pop(0)
    assert not queue
    expected = model(inputs_embeds=embeddings, attention_mask=inputs["attention_mask"]).logits
    torch.testing.assert_close(model(**inputs).logits, expected)
    swapped = {**inputs, **{name: tensor.flip(0) for name, tensor in volume_inputs.items()}}
    assert (model(**swapped).logits - expected)[:, -1].abs().max() > 0.01
    # Embeddings with placeholders still in them
    from_embeddings = model(inputs_embeds=model.get_input_embeddings()(inputs["input_ids"]), **volume_inputs).logits
    torch.testing.assert_close(from_embeddings, expected)


def test_global_tokens_come_before_local_ones(model, batch):
    core, pixel_values = model.model, batch["pixel_values"]
    features = core.get_image_features(pixel_values, batch["slice_pixel_values"]).pooler_output
    packed = core.multi_modal_projector.global_packer(core.global_encoder(pixel_values).last_hidden_state[:, 1:])[0]
    torch.testing.assert_close(features[:, :16], packed)


@pytest.mark.parametrize("change", [-1, 1])
def test_number_of_placeholders_is_checked(model, batch, change):
    input_ids = batch["input_ids"].clone()
    row = (input_ids[0] == 1).nonzero()[0, 0]
    input_ids[0, row + (0 if change < 0 else -1)] = 5 if change < 0 else 1
    with pytest.raises(ValueError, match=rf"(?s){64 + change}.*2 volume.*64"):
        model(**{**batch, "input_ids": input_ids})


@pytest.mark.parametrize("encoders", ["global", "local"])
def test_one_encoder(encoders):
    one = tiny.generation_model(encoders=encoders)
    assert one.config.image_seq_length == 16
    parts = (one.model.global_encoder, one.model.local_encoder, one.slice_encoder)
    assert [part is None for part in parts] == ([False, True, True] if encoders == "global" else [True, False, False])
    inputs = prompts(one, QUESTIONS, [tiny.scan(0), tiny.scan(1)])
    outputs = one(**inputs, output_patch_scores=True)
    assert (outputs.patch_scores is None) == (encoders == "global")
    inputs["slice_pixel_values"] = inputs["slice_pixel_values"].flip(0)
    assert torch.equal(outputs.logits, one(**inputs).logits) == (encoders == "global")
    assert len(generated(one, inputs)) == 2


def test_batch_equals_singles(model, batch, greedy):
    assert (batch["attention_mask"][0] == 0).any()  # questions of different lengths
    assert greedy[0] != greedy[1]
    scans = [tiny.scan(0), tiny.scan(1)[:, ::-1].copy()]
    singles = [prompts(model, [text], [scan]) for text, scan in zip(QUESTIONS, scans, strict=True)]
    assert [generated(model, single)[0] for single in singles] == greedy
    beams = generated(model, batch, num_beams=3)
    assert [generated(model, single, num_beams=3)[0] for single in singles] == beams
    assert beams != greedy


def test_ways_to_generate_agree(model, batch, greedy):
    """Each reference is a plain loop over forward passes without cache and without `generate`."""
    input_ids, mask = batch["input_ids"], batch["attention_mask"]
    for _ in range(NEW_TOKENS):
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        inputs = {**batch, "input_ids": input_ids, "attention_mask": mask, "position_ids": positions}
        logits = model(**inputs).logits[:, -1]
        logits[:, 0] = -torch.inf  # as `min_new_tokens`
        input_ids = torch.cat([input_ids, logits.argmax(dim=-1, keepdim=True)], dim=1)
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
    assert greedy == input_ids[:, -NEW_TOKENS:].tolist()
    assert generated(model, batch, use_cache=False) == greedy
    assert generated(model, batch, cache_implementation="static") == greedy
    several = generated(model, batch, num_beams=3, num_return_sequences=2)
    assert several[::2] == generated(model, batch, num_beams=3)
    assert several[0] != several[1]


@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}, {"use_cache": False}, {"num_return_sequences": 2}])
def test_encoders_run_once(model, batch, settings):
    runs = []
    encoders = (model.model.global_encoder, model.model.local_encoder, model.slice_encoder)
    hooks = [encoder.register_forward_hook(lambda module, *_: runs.append(id(module))) for encoder in encoders]
    generated(model, batch, **{"do_sample": "num_return_sequences" in settings, **settings})
    for hook in hooks:
        hook.remove()
    assert sorted(runs) == sorted(map(id, encoders))


def test_the_callers_cache_is_filled(model, batch, greedy):
    past = DynamicCache(config=model.config.text_config)
    assert generated(model, batch, past_key_values=past) == greedy
    assert past.get_seq_length() == batch["input_ids"].shape[1] + NEW_TOKENS - 1


def test_cached_slice_features_generate_the_same(model, batch, greedy):
    features = model.get_slice_features(batch["slice_pixel_values"])
    inputs = {**batch, "slice_features": features}
    del inputs["slice_pixel_values"]
    assert generated(model, inputs) == greedy
    assert generated(model, inputs, num_beams=3) == generated(model, batch, num_beams=3)
    shuffled = {**inputs, "slice_features": features.flip(0)}
    assert (model(**shuffled).logits - model(**inputs).logits).abs().max() > 1e-3


def test_padding_on_the_right_is_refused(model, batch):
    length = int(batch["attention_mask"][0].sum())
    shift = batch["input_ids"].shape[1] - length
    rolled = {name: batch[name].clone() for name in ("input_ids", "attention_mask")}
    for tensor in rolled.values():
        tensor[0] = tensor[0].roll(-shift)
    with pytest.raises(ValueError, match="padded on the left"):
        generated(model, {**batch, **rolled})


def test_text_alone(model):
    inputs = dict(tiny.processor(model)(text="No pleural effusion", return_tensors="pt"))
    assert set(inputs) == {"input_ids", "attention_mask"}
    assert len(generated(model, inputs)[0]) == NEW_TOKENS


def test_bfloat16(batch, model):
    half = tiny.generation_model().to(torch.bfloat16)
    outputs = half(**batch)
    assert outputs.logits.dtype == torch.bfloat16
    difference = (outputs.logits - model(**batch).logits)[batch["attention_mask"] == 1]
    assert difference.square().mean().sqrt() < 0.02 * outputs.logits.std()
    assert len(generated(half, batch)) == 2


def test_training_reaches_every_packer_parameter(batch):
    trained = tiny.generation_model().train()
    trained.gradient_checkpointing_enable()
    trained(**batch, labels=batch["input_ids"]).loss.backward()
    without = [name for name, parameter in trained.named_parameters() if parameter.grad is None]
    assert not without
    projector = trained.model.multi_modal_projector
    gradients = {name: parameter.grad.abs().sum() for name, parameter in projector.named_parameters()}
    # A key's bias shifts all logits of a softmax alike.
    assert all(gradient > 0 for name, gradient in gradients.items() if not name.endswith("k_proj.bias"))


# Language models


FAMILIES = {
    "phi3": {"tie_word_embeddings": True},
    "llama": {"tie_word_embeddings": False},
    "qwen2": {"tie_word_embeddings": True},
    "gpt2": {"tie_word_embeddings": True},
    "gemma2": {"head_dim": 8, "final_logit_softcapping": 3.0},
    "cohere": {"logit_scale": 0.3},
    "granite": {"logits_scaling": 5.0},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_text_logits_are_the_language_models_own(family):
    text_config = tiny.text_config(family, **FAMILIES[family])
    torch.manual_seed(7)
    original = AutoModelForCausalLM.from_config(AutoConfig.for_model(**text_config)).eval()
    model = tiny.generation_model(encoders="global", text_config=text_config)
    model.model.language_model.load_state_dict(original.base_model.state_dict())
    model.lm_head.load_state_dict(original.get_output_embeddings().state_dict())
    tied = model.lm_head.weight is model.get_input_embeddings().weight
    assert tied == text_config.get("tie_word_embeddings", original.config.tie_word_embeddings)
    inputs = text_inputs(*tiny.SENTENCES[1:3])
    torch.testing.assert_close(model(**inputs).logits, original(**inputs).logits, atol=1e-5, rtol=1e-5)
    last = model(**inputs, logits_to_keep=1).logits
    torch.testing.assert_close(last, original(**inputs).logits[:, -1:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_tied_embeddings_are_tied_again_after_loading(family, tmp_path):
    model = tiny.generation_model(encoders="global", text_config=tiny.text_config(family, tie_word_embeddings=True))
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    loaded = HSENetForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight
    torch.testing.assert_close(loaded.state_dict(), model.state_dict())


def test_language_model_with_another_head_is_refused():
    with pytest.raises(ValueError, match="'phi'.*bias-free"):
        tiny.generation_model(text_config=tiny.text_config("phi"))


# Loading


def reload_without(model, keep: str, folder, monkeypatch):
    """Saves, removes all but one tensor from the file, and loads with NaN in all memory that nobody initialised."""
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    save_file({keep: tensors[keep] + 1}, folder / "model.safetensors", metadata={"format": "pt"})
    torch.use_deterministic_algorithms(True)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    try:
        # transformers' own loading, which initialises what is missing: ours refuses to (tests/test_fingerprint.py).
        loaded = PreTrainedModel.from_pretrained.__func__(type(model), folder)
    finally:
        torch.use_deterministic_algorithms(False)
    torch.testing.assert_close(loaded.state_dict()[keep], tensors[keep] + 1)
    return loaded


@pytest.mark.parametrize("kind", ["generation", "clip"])
def test_parameters_missing_in_the_file_are_initialised(kind, tmp_path, monkeypatch):
    model = tiny.generation_model() if kind == "generation" else tiny.clip_model("slices", initializer_range=0.2)
    encoder = "model.local_encoder" if kind == "generation" else "vision_model"
    kept = f"{encoder}.layers.0.mlp.fc1.weight"
    loaded = reload_without(model, kept, tmp_path, monkeypatch)
    for name, tensor in loaded.state_dict().items():
        assert tensor.isfinite().all(), name
        if name == kept:
            continue
        if name == "logit_scale":
            assert tensor.item() == pytest.approx(model.config.logit_scale_init_value)
        elif name.endswith(("bias", "cls_token")):
            assert (tensor == 0).all(), name
        elif tensor.ndim == 1:
            assert (tensor == 1).all(), name  # norms
        elif tensor.numel() > 400:
            assert tensor.std().item() == pytest.approx(0.2, rel=0.2), name
    for name, buffer in loaded.named_buffers():
        assert buffer.isfinite().all(), name
