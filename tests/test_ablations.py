"""The arms of the paper's ablations: scoring guidance (table 1b) and projectors (table 2b)."""

import os
import subprocess
import sys
from math import prod

import pytest
import tiny
import torch
from accelerate import Accelerator
from torch import nn

from configuration_hsenet import HSENetConfig
from hsenet.collators import ContrastiveCollator
from hsenet.evaluation import evaluate_retrieval, guided_similarity
from hsenet.fingerprint import fingerprint
from hsenet.metrics.retrieval import retrieval_metrics, similarity_metrics
from hsenet.scoring.work import embeddings_of
from modeling_hsenet import HSENetCLIPModel, HSENetForConditionalGeneration
from projectors_hsenet import PROJECTORS, HSENetProjector


GUIDANCES = ["none", "slices", "text", "text_cls"]
WINDOWS = [(1, 4, 4), (2, 2, 2), (2, 4, 4), (1, 2, 2), (1, 1, 1)]


def volumes(count: int = 3) -> torch.Tensor:
    return torch.rand(count, 1, *tiny.IMAGE_SIZE, generator=torch.Generator().manual_seed(1))


def clip_inputs(guidance: str) -> dict[str, torch.Tensor]:
    tokens = tiny.tokenizer()(tiny.SENTENCES[:3], padding=True, return_tensors="pt")
    inputs = {"input_ids": tokens["input_ids"], "attention_mask": tokens["attention_mask"], "pixel_values": volumes()}
    if guidance == "slices":
        generator = torch.Generator().manual_seed(2)
        inputs["slice_features"] = torch.randn(3, tiny.NUM_SLICES, tiny.SLICES["hidden_size"], generator=generator)
    return inputs


def patch_states(count: int = 2, num_patches: int = 64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(count, num_patches, tiny.VISION["hidden_size"], generator=generator)


def projector(name: str, window: tuple[int, int, int] = tiny.WINDOW) -> HSENetProjector:
    model = tiny.generation_model(encoders="global", projector=name, packer_window_size=window)
    return model.model.multi_modal_projector.global_packer


# Scoring guidance


@pytest.mark.parametrize("guidance", GUIDANCES)
def test_guided_model_is_saved_and_loaded(guidance, tmp_path):
    model, inputs = tiny.clip_model(guidance), clip_inputs(guidance)
    model.save_pretrained(tmp_path)
    loaded = HSENetCLIPModel.from_pretrained(tmp_path)
    assert loaded.config.guidance == guidance
    assert (loaded.vision_model.scorer is None) == (guidance == "none")
    torch.testing.assert_close(loaded(**inputs).logits_per_image, model(**inputs).logits_per_image)
    assert fingerprint(loaded.float())["hash"] == fingerprint(model)["hash"]


@pytest.mark.parametrize("guidance", GUIDANCES)
def test_a_volumes_embedding_depends_on_the_text_that_guides_it_and_on_no_other(guidance):
    model, inputs = tiny.clip_model(guidance), clip_inputs(guidance)
    before = model(**inputs).image_embeds
    inputs["input_ids"] = inputs["input_ids"].clone()
    inputs["input_ids"][0, :3] = torch.tensor([20, 30, 40])
    moved = (model(**inputs).image_embeds - before).abs().amax(dim=1)
    assert (moved[0] > 1e-3) == guidance.startswith("text")
    assert moved[1:].max() < 1e-6


@pytest.mark.parametrize("guidance", ["text", "text_cls"])
def test_padding_of_the_guiding_text_does_not_matter(guidance):
    model, inputs = tiny.clip_model(guidance), clip_inputs(guidance)
    assert (inputs["attention_mask"] == 0).any()
    together = model(**inputs, output_patch_scores=True)
    for number in range(3):
        length = inputs["attention_mask"][number].sum()
        alone = {name: tensor[number : number + 1] for name, tensor in inputs.items()}
        alone |= {name: alone[name][:, :length] for name in ("input_ids", "attention_mask")}
        scores = model(**alone, output_patch_scores=True).patch_scores
        torch.testing.assert_close(together.patch_scores[number], scores[0], atol=1e-5, rtol=1e-5)


def test_cls_guidance_reads_the_cls_token_alone():
    model = tiny.clip_model("text_cls")
    states = torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(4))
    expected = model.get_image_features(volumes(), text_states=states).pooler_output
    states[:, 1:] += 1
    torch.testing.assert_close(model.get_image_features(volumes(), text_states=states).pooler_output, expected)
    states[:, 0] += torch.arange(32) / 8
    assert (model.get_image_features(volumes(), text_states=states).pooler_output - expected).abs().max() > 1e-3


@pytest.mark.parametrize("guidance", ["text", "text_cls"])
def test_gradients_reach_scorer_and_text_through_the_guidance(guidance):
    model = tiny.clip_model(guidance)
    inputs = clip_inputs(guidance)
    model(**inputs).image_embeds[:, 0].sum().backward()
    # Over a single key attention is 1 whatever query and key say.
    idle = () if guidance == "text" else ("scorer.attention.k_proj",)
    for name, parameter in (*model.vision_model.named_parameters(), *model.text_model.named_parameters()):
        if not name.startswith(idle or "-") and "cls_token" not in name and "k_proj.bias" not in name:
            assert parameter.grad is not None, name
    assert model.vision_model.scorer.attention.v_proj.weight.grad.abs().max() > 0
    assert model.text_model.embeddings.word_embeddings.weight.grad.abs().max() > 0


@pytest.mark.parametrize("count", [None, 2])
def test_guidance_needs_a_text_for_each_volume(count):
    model = tiny.clip_model("text")
    states = torch.zeros(count, 5, 32) if count else None
    with pytest.raises(ValueError, match=f"token states of 3 texts, got {count or 'none'}"):
        model.get_image_features(volumes(), text_states=states)


def examples() -> list[dict]:
    return [{"pixel_values": volumes()[i], "text": tiny.SENTENCES[i], "index": i} for i in range(3)]


@pytest.mark.parametrize("guidance", ["text", "text_cls"])
def test_guided_similarity_is_that_of_every_pair_alone(guidance):
    model, collator = tiny.clip_model(guidance), ContrastiveCollator(tiny.tokenizer(), 64)
    similarity = guided_similarity(model, examples(), collator, batch_size=2)
    for i, j in ((0, 0), (0, 2), (2, 1)):
        pair = collator([{**examples()[i], "text": tiny.SENTENCES[j]}])
        pair.pop("index")
        with torch.no_grad():
            outputs = model(**pair)
        expected = (outputs.image_embeds @ outputs.text_embeds.T)[0, 0]
        torch.testing.assert_close(similarity[i, j], expected, atol=1e-5, rtol=1e-5)
    metrics = evaluate_retrieval(model, examples(), collator, batch_size=2)
    assert metrics["image_to_text_R@5"] == 1 and metrics["chance_R@5"] == 1


def test_a_model_that_copies_its_guidance_finds_nothing():
    """Guided by its own report an empty volume is found; over all pairs, as retrieval is measured, it is not."""
    model, collator = tiny.clip_model("text"), ContrastiveCollator(tiny.tokenizer(), 64)
    empty = [{**example, "pixel_values": torch.zeros(1, *tiny.IMAGE_SIZE)} for example in examples()]
    similarity = guided_similarity(model, empty, collator, batch_size=3)
    torch.testing.assert_close(similarity, similarity[:1].expand(3, -1))  # the volumes are alike whatever guides them
    metrics = similarity_metrics(similarity.T, ks=(1,))
    assert metrics["image_to_text_R@1"] == pytest.approx(1 / 3)


def test_evaluation_by_embeddings_refuses_a_model_that_has_seen_the_answer(tmp_path):
    model, collator = tiny.clip_model("text"), ContrastiveCollator(tiny.tokenizer(), 64)
    with pytest.raises(ValueError, match='got guidance "text"'):
        embeddings_of([], model, "0", collator, None, 2, tmp_path, Accelerator(cpu=True))


def test_metrics_of_similarities_are_those_of_embeddings():
    generator = torch.Generator().manual_seed(5)
    images, texts = (torch.randn(9, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    images, texts = (nn.functional.normalize(embeddings, dim=1) for embeddings in (images, texts))
    studies = [0, 0, 1, 2, 3, 3, 4, 5, 6]
    expected = retrieval_metrics(images, texts, study_ids=studies, ks=(1, 3))
    assert similarity_metrics(images @ texts.T, study_ids=studies, ks=(1, 3)) == pytest.approx(expected)
    with pytest.raises(ValueError, match=r"square array, got shape \(9, 4\)"):
        similarity_metrics(images)


# Projectors


@pytest.mark.parametrize("name", PROJECTORS)
def test_model_with_each_projector_is_saved_and_loaded(name, tmp_path):
    model = tiny.generation_model(encoders="global", projector=name, qformer_num_layers=1)
    model.save_pretrained(tmp_path)
    loaded = HSENetForConditionalGeneration.from_pretrained(tmp_path)
    assert (
        loaded.config.projector == name and type(loaded.model.multi_modal_projector.global_packer) is PROJECTORS[name]
    )
    expected = model.get_image_features(volumes()).pooler_output
    assert expected.shape == (3, model.config.image_seq_length, 32) and expected.std() > 1e-3
    torch.testing.assert_close(loaded.get_image_features(volumes()).pooler_output, expected)


def test_models_saved_before_there_was_a_choice_have_spatial_packers():
    settings = HSENetConfig().to_dict()
    assert settings.pop("projector") == "spatial_packer" and settings.pop("qformer_num_layers") == 2
    assert HSENetConfig.from_dict(settings).projector == "spatial_packer"


@pytest.mark.parametrize("name", PROJECTORS)
def test_projector_at_the_papers_size(name):
    """256 tokens of 3072 for the language model, and weights that can be compared."""
    with torch.device("meta"):
        config = HSENetConfig(encoders="global", projector=name, text_config={"model_type": "llama"})
        config.text_config.hidden_size = 3072
        module = PROJECTORS[name](config, config.vision_config)
        packed, _ = module(torch.empty(2, 2048, 768))
    assert packed.shape == (2, 128, 3072)
    millions = sum(parameter.numel() for parameter in module.parameters()) / 1e6
    expected = {
        "spatial_packer": 14.2,
        "spatial_pooling": 11.8,
        "sequence_pooling": 11.8,
        "qformer": 30.8,
        "mlp": 47.2,
    }
    assert millions == pytest.approx(expected[name], abs=0.1)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("name", PROJECTORS)
def test_every_projector_gives_one_token_a_window(name, window):
    packed, _ = projector(name, window)(patch_states())
    assert packed.shape == (2, 64 // prod(window), 32)
    both = tiny.generation_model(projector=name, packer_window_size=window)
    assert both.config.image_seq_length == 2 * packed.shape[1]


@pytest.mark.parametrize("name", PROJECTORS)
def test_gradients_reach_all_weights_of_a_projector(name):
    module = projector(name)
    module(patch_states())[0][..., 0].sum().backward()
    for parameter_name, parameter in module.named_parameters():
        # A key's bias adds the same to all scores of a query: softmax does not see it.
        if parameter_name != "attention.k_proj.bias":
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, parameter_name


@pytest.mark.parametrize("name", PROJECTORS)
def test_volumes_of_a_batch_do_not_mix(name):
    module = projector(name)
    together = module(patch_states())[0]
    alone = torch.cat([module(states[None])[0] for states in patch_states()])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


def ends(module: HSENetProjector, packed: torch.Tensor) -> torch.Tensor:
    return module.fc2(nn.functional.gelu(module.fc1(packed)))


def test_poolings_and_mlp_by_hand():
    """Token 5 of windows (1, 2, 2) on the grid (4, 4, 4): depth 1, upper half, right half."""
    states = patch_states(1)
    grid = states.reshape(4, 4, 4, -1)
    window = grid[1, 0:2, 2:4].reshape(4, -1)
    pooling = projector("spatial_pooling")
    torch.testing.assert_close(pooling(states)[0][0, 5], ends(pooling, window.mean(dim=0)))
    mlp = projector("mlp")
    torch.testing.assert_close(mlp(states)[0][0, 5], ends(mlp, window.flatten()))
    sequence = projector("sequence_pooling")
    torch.testing.assert_close(sequence(states)[0][0, 5], ends(sequence, grid[1, 1].mean(dim=0)))


def test_qformer_looks_at_all_patches_and_its_tokens_differ():
    module = projector("qformer")
    states = patch_states(1).requires_grad_()
    packed = module(states)[0]
    packed[0, 0, 0].backward()
    assert (states.grad[0].abs().amax(dim=1) > 0).all()
    assert (packed[0, 0] - packed[0, 1]).abs().max() > 1e-3


def test_arms_load_as_remote_code(tmp_path):
    """A user with neither the package nor the repository: the files that travel are enough."""
    tiny.clip_model("text").save_pretrained(tmp_path / "text")
    tiny.generation_model(projector="qformer").save_pretrained(tmp_path / "qformer")
    program = (
        "import sys; from transformers import AutoModel\n"
        "for name in ('text', 'qformer'):\n"
        "    model = AutoModel.from_pretrained(name, trust_remote_code=True)\n"
        "    assert type(model).__module__.startswith('transformers_modules')\n"
        "assert model.model.multi_modal_projector.global_packer.__class__.__name__ == 'HSENetQFormer'\n"
        "assert 'hsenet' not in sys.modules and 'projectors_hsenet' not in sys.modules\n"
    )
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    command = [sys.executable, "-I", "-c", program]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
