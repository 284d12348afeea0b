"""The losses against plain NumPy formulas, and one process against two, by their gradients."""

import numpy as np
import pytest
import tiny
import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import multiprocessing, nn

from hsenet.collators import ContrastiveCollator
from hsenet.contrastive import ContrastiveArguments, ContrastiveObjective
from hsenet.data import VolumeRows, add_report_texts
from hsenet.evaluation import evaluate_retrieval
from hsenet.losses import (
    consistency_weight,
    global_similarity,
    image_text_contrastive_loss,
    semantic_consistency_loss,
    sibling_pairs,
)


def embeddings(rows: int = 8, width: int = 5) -> list[torch.Tensor]:
    """Images, texts, anchor images, anchor texts."""
    generator = torch.Generator().manual_seed(0)
    return [
        nn.functional.normalize(torch.randn(rows, width, generator=generator, dtype=torch.float64), dim=-1)
        for _ in range(4)
    ]


def both_losses(images, texts, anchor_images, anchor_texts, scale) -> torch.Tensor:
    similarity = global_similarity(images, texts)
    anchor = global_similarity(anchor_images, anchor_texts)
    consistency = semantic_consistency_loss(similarity, anchor, scale)
    return image_text_contrastive_loss(similarity, scale) + 0.1 * consistency


def test_contrastive_loss_is_info_nce_in_both_directions():
    images, texts, *_ = embeddings()
    logits = 7.0 * images.numpy() @ texts.numpy().T
    by_image = np.log(np.exp(logits).sum(1)) - np.diag(logits)
    by_text = np.log(np.exp(logits).sum(0)) - np.diag(logits)
    loss = image_text_contrastive_loss(global_similarity(images, texts), torch.tensor(7.0))
    assert loss.item() == pytest.approx((by_image.mean() + by_text.mean()) / 2, abs=1e-12)


def test_consistency_loss_is_the_squared_difference_of_logits():
    images, texts, anchor_images, anchor_texts = embeddings()
    difference = 7.0 * (images @ texts.t() - anchor_images @ anchor_texts.t())
    similarity, anchor = global_similarity(images, texts), global_similarity(anchor_images, anchor_texts)
    loss = semantic_consistency_loss(similarity, anchor, torch.tensor(7.0))
    assert loss.item() == pytest.approx((difference**2).mean().item(), abs=1e-12)
    assert semantic_consistency_loss(anchor, anchor, torch.tensor(7.0)) == 0


def test_consistency_loss_gives_no_gradient_to_anchor_and_temperature():
    parts = [part.requires_grad_() for part in embeddings()]
    scale = torch.tensor(7.0, requires_grad=True)
    similarity, anchor = global_similarity(*parts[:2]), global_similarity(*parts[2:])
    semantic_consistency_loss(similarity, anchor, scale).backward()
    assert parts[0].grad.abs().sum() > 0 and parts[1].grad.abs().sum() > 0
    assert parts[2].grad is None and parts[3].grad is None and scale.grad is None


def test_each_matrix_may_have_its_own_temperature():
    images, texts, anchor_images, anchor_texts = embeddings()
    difference = 7.0 * images @ texts.t() - 3.0 * anchor_images @ anchor_texts.t()
    similarity, anchor = global_similarity(images, texts), global_similarity(anchor_images, anchor_texts)
    anchor_scale = torch.tensor(3.0, requires_grad=True)
    loss = semantic_consistency_loss(similarity, anchor, torch.tensor(7.0), anchor_scale, scale_gradient=True)
    assert loss.item() == pytest.approx((difference**2).mean().item(), abs=1e-12)
    assert not loss.requires_grad  # not even through the anchor's own temperature


def test_weight_of_the_consistency_loss_over_the_steps():
    steps = (0, 1, 2500, 4999, 5000, 7000)
    decayed = [consistency_weight(step, 0.1, "linear_decay", 5000) for step in steps]
    assert decayed == pytest.approx([0.1, 0.09998, 0.05, 0.00002, 0, 0], abs=1e-12)
    assert [consistency_weight(step, 0.1, "constant", 5000) for step in steps] == [0.1] * 6
    assert consistency_weight(3, 0.4, "linear_decay", 4) == pytest.approx(0.1)
    cosine = [consistency_weight(step, 0.1, "cosine", 6) for step in (0, 2, 3, 4, 6, 9)]
    assert cosine == pytest.approx([0.1, 0.075, 0.05, 0.025, 0, 0], abs=1e-12)
    for schedule in ("linear_decay", "cosine"):
        with pytest.raises(ValueError, match="at least 1, got 0"):
            consistency_weight(3, 0.1, schedule, 0)


def test_a_batch_of_one_study_has_nothing_to_tell_apart():
    images, texts, *_ = embeddings()
    similarity = global_similarity(images, texts)
    siblings = sibling_pairs(torch.zeros(8, 2, dtype=torch.int64))
    assert not siblings.diagonal().any() and siblings.sum() == 56
    assert image_text_contrastive_loss(similarity, torch.tensor(7.0), siblings, "masked") == 0
    shared = image_text_contrastive_loss(similarity, torch.tensor(0.0), siblings, "multi_positive")
    assert shared.item() == pytest.approx(np.log(8))
    with pytest.raises(ValueError, match="which rows are siblings"):
        image_text_contrastive_loss(similarity, torch.tensor(7.0), mode="masked")


def test_modes_agree_without_siblings():
    similarity = global_similarity(*embeddings()[:2])
    siblings = sibling_pairs(torch.arange(16).reshape(8, 2))
    losses = [
        image_text_contrastive_loss(similarity, torch.tensor(7.0), siblings, mode).item()
        for mode in ("none", "masked", "multi_positive")
    ]
    assert losses == pytest.approx([losses[0]] * 3, abs=1e-12)


@pytest.mark.parametrize("mode", ["masked", "multi_positive", "none"])
def test_loss_of_an_evaluation_is_that_of_a_training_batch(mode):
    """Two studies with one report are each other's siblings, or wrong, in both."""
    reports = [tiny.SENTENCES[1], tiny.SENTENCES[1], tiny.SENTENCES[2], tiny.SENTENCES[3]]
    rows = [{"volume_name": str(n), "study_id": str(n), "findings": text} for n, text in enumerate(reports)]
    add_report_texts(rows, ("findings",))
    volumes = torch.rand(4, 1, *tiny.IMAGE_SIZE, generator=torch.Generator().manual_seed(0))
    dataset = VolumeRows(rows, {str(n): {"pixel_values": volume} for n, volume in enumerate(volumes)})
    model, collator = tiny.clip_model().eval(), ContrastiveCollator(tiny.tokenizer(pad_token="[PAD]"), 64)
    objective = ContrastiveObjective(Accelerator(cpu=True), ContrastiveArguments(mode))
    expected, _ = objective(model, collator([dataset[n] for n in range(4)]), 0)
    found = evaluate_retrieval(model, dataset, collator, batch_size=3, siblings=mode)["loss"]
    assert found == pytest.approx(expected.item(), rel=1e-5)
    if mode == "masked":  # as positives, rows of one and the same report give the sum that they give as negatives
        assert found != pytest.approx(evaluate_retrieval(model, dataset, collator, 3)["loss"], rel=1e-2)


def released_losses(student: dict, teacher: dict, log_scale: torch.Tensor, step: int) -> torch.Tensor:
    """Stage 2's loss as the released weights were trained, in plain torch: raw features to one number."""

    def unit(features: torch.Tensor) -> torch.Tensor:
        return features / features.norm(dim=-1, keepdim=True)

    scale = log_scale.exp()
    logits = scale * unit(student["images"]) @ unit(student["texts"]).T
    teacher_logits = (scale * unit(teacher["images"]) @ unit(teacher["texts"]).T).detach()
    targets = torch.eye(len(logits), dtype=logits.dtype)
    contrastive = -(targets * (logits.log_softmax(1) + logits.log_softmax(0))).sum() / (2 * len(logits))
    forwards, backwards = (logits - teacher_logits) ** 2, (logits.T - teacher_logits.T) ** 2
    weight = 0.1 * (1 - step / 5000) if step < 5000 else 0.0
    return contrastive + weight * (forwards.mean() + backwards.mean()) / 2


@pytest.mark.parametrize("step", [0, 1000, 2500, 4999, 5000, 7000])
def test_released_stage2_of_a_whole_model(step):
    """Losses and gradients of a tiny stage-2 model and its frozen teacher, with the released settings."""
    student, teacher = tiny.clip_model("slices", logit_scale_init_value=1.1314), tiny.clip_model()  # exp: 3.1
    generator = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    tokens = tiny.tokenizer()(tiny.SENTENCES[:4], padding=True, return_tensors="pt")
    inputs = {"input_ids": tokens["input_ids"], "attention_mask": tokens["attention_mask"]}
    inputs["pixel_values"] = torch.rand(4, 1, *tiny.IMAGE_SIZE, generator=generator)
    slices = torch.randn(4, tiny.NUM_SLICES, tiny.SLICES["hidden_size"], generator=generator)

    def gradients(loss: torch.Tensor) -> tuple[float, dict[str, torch.Tensor]]:
        student.zero_grad()
        loss.backward()
        return loss.item(), {n: p.grad.clone() for n, p in student.named_parameters() if p.grad is not None}

    with torch.no_grad():
        anchor_outputs = teacher(**inputs)
    outputs = student(**inputs, slice_features=slices)
    similarity = global_similarity(outputs.image_embeds, outputs.text_embeds)
    anchor = global_similarity(anchor_outputs.image_embeds, anchor_outputs.text_embeds)
    consistency = semantic_consistency_loss(similarity, anchor, student.logit_scale.exp(), scale_gradient=True)
    contrastive = image_text_contrastive_loss(similarity, student.logit_scale.exp())
    loss, actual = gradients(contrastive + consistency_weight(step, 0.1, "linear_decay", 5000) * consistency)

    def features(model, **guidance) -> dict[str, torch.Tensor]:
        texts = model.get_text_features(inputs["input_ids"], inputs["attention_mask"]).pooler_output
        return {"images": model.get_image_features(inputs["pixel_values"], **guidance).pooler_output, "texts": texts}

    reference = released_losses(features(student, slice_features=slices), features(teacher), student.logit_scale, step)
    expected_loss, expected = gradients(reference)
    assert loss == pytest.approx(expected_loss, abs=1e-6)
    assert set(actual) == set(expected) and actual["logit_scale"].abs() > 1e-4
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, atol=1e-5, rtol=1e-4)


def one_rank(rank: int, world_size: int, port: int, results) -> None:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size)
    torch.set_num_threads(1)
    parts = [part.chunk(world_size)[rank].clone() for part in embeddings()]
    images, texts = (part.requires_grad_() for part in parts[:2])
    scale = torch.tensor(7.0, dtype=torch.float64, requires_grad=True)
    loss = both_losses(images, texts, *parts[2:], scale)
    loss.backward()
    results[rank] = [tensor.detach().numpy() for tensor in (loss, images.grad, texts.grad, scale.grad)]
    dist.destroy_process_group()


def test_two_processes_have_the_loss_and_gradients_of_one():
    parts = embeddings()
    images, texts = (part.requires_grad_() for part in parts[:2])
    scale = torch.tensor(7.0, dtype=torch.float64, requires_grad=True)
    loss = both_losses(images, texts, *parts[2:], scale)
    loss.backward()
    with multiprocessing.Manager() as manager:
        results = manager.dict()
        multiprocessing.spawn(one_rank, (2, 29611, results), nprocs=2)
        ranks = [results[0], results[1]]
    # DDP averages over processes: embeddings of a rank only exist there, so their gradients are halved.
    assert np.mean([rank[0] for rank in ranks]) == pytest.approx(loss.item(), abs=1e-12)
    np.testing.assert_allclose(np.concatenate([rank[1] for rank in ranks]) / 2, images.grad.numpy(), atol=1e-12)
    np.testing.assert_allclose(np.concatenate([rank[2] for rank in ranks]) / 2, texts.grad.numpy(), atol=1e-12)
    np.testing.assert_allclose(np.mean([rank[3] for rank in ranks]), scale.grad.numpy(), atol=1e-12)
