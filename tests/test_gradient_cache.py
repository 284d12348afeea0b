"""Loss and gradients of stages 1 and 2: one process, two and four, in chunks or not, against the plain formula."""

from itertools import product

import contrastive_cases as cases
import processes
import pytest
import torch
from accelerate import Accelerator

from hsenet.contrastive import ContrastiveArguments, ContrastiveObjective
from hsenet.losses import global_similarity, image_text_contrastive_loss, sibling_pairs


BOUNDS = {torch.float32: 1e-5, torch.float64: 1e-12}
# Rows a process: 8, 4, 2. Chunks that divide the batch, that do not, and none.
CHUNKS = {1: (0, 3), 2: (0, 3), 4: (0, 1)}


@pytest.fixture(scope="module")
def expected() -> dict[tuple, tuple]:
    """By stage, mode, dtype and number of accumulated batches."""
    found = {}
    for stage, mode, dtype, accumulation in product(cases.STAGES, cases.MODES, cases.DTYPES, (1, 2)):
        clip, inputs = cases.model(stage, dtype), cases.batch(stage, dtype)
        parts = [range(i * 8 // accumulation, (i + 1) * 8 // accumulation) for i in range(accumulation)]
        loss = sum(cases.plain_loss(clip, stage, mode, inputs, rows) for rows in parts) / accumulation
        loss.backward()
        found[stage, mode, dtype, accumulation] = loss.item(), cases.gradients(clip)
    return found


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_loss_and_gradients_are_those_of_the_global_batch(world_size, expected, tmp_path):
    chosen = list(product(cases.STAGES, cases.MODES, cases.DTYPES, CHUNKS[world_size], (1,)))
    if world_size < 4:  # two accumulated batches of four rows
        chosen += product(cases.STAGES, ("masked",), cases.DTYPES, (0, 1), (2,))
    for found in processes.run(cases.run_cases, world_size, 29640 + world_size, tmp_path, chosen):
        for (stage, mode, dtype, chunk_size, accumulation), (loss, gradients) in found.items():
            expected_loss, expected_gradients = expected[stage, mode, dtype, accumulation]
            bound, case = BOUNDS[dtype], f"{stage}, siblings {mode}, {dtype}, chunks of {chunk_size}, {accumulation}"
            assert loss == pytest.approx(expected_loss, abs=bound), case
            assert gradients.keys() == expected_gradients.keys()
            for name, gradient in expected_gradients.items():
                difference = (gradients[name] - gradient).abs().max()
                assert difference <= bound, f"{name} of {case} is off by {difference}"


def test_the_cases_tell_modes_apart(expected):
    """Else the test above could not fail for a loss that ignores the siblings, or the temperature's gradient."""
    for stage in cases.STAGES:
        of_modes = [expected[stage, mode, torch.float64, 1] for mode in cases.MODES]
        assert len({round(loss, 3) for loss, _ in of_modes}) == 3
        assert all(gradients["logit_scale"].abs() > 1e-3 for _, gradients in of_modes)


def test_both_passes_drop_the_same_units_and_patches():
    """In training mode, with dropout everywhere: chunks with a cache against the same chunks all in one graph."""
    accelerator = Accelerator(cpu=True)
    inputs = cases.batch("slices", torch.float64)

    def loss_and_gradients(run) -> tuple[float, dict, float]:
        clip = cases.model("slices", torch.float64).train()
        clip.vision_model.config.patch_dropout = 0.5
        torch.manual_seed(3)
        loss = run(clip)
        accelerator.backward(loss)
        return loss.item(), cases.gradients(clip), torch.rand(()).item()

    def together(clip) -> torch.Tensor:
        names = [name for name in inputs if name not in ("index", "sibling_ids")]
        outputs = [clip(**{name: inputs[name][rows] for name in names}) for rows in torch.arange(8).split(3)]
        images, texts = (torch.cat([output[side] for output in outputs]) for side in ("image_embeds", "text_embeds"))
        siblings = sibling_pairs(inputs["sibling_ids"])
        return image_text_contrastive_loss(
            global_similarity(images, texts), clip.logit_scale.exp(), siblings, "multi_positive"
        )

    def cached(clip) -> torch.Tensor:
        objective = ContrastiveObjective(accelerator, ContrastiveArguments("multi_positive", chunk_size=3))
        return objective(clip, inputs, 0)[0]

    expected, found = loss_and_gradients(together), loss_and_gradients(cached)
    assert found[0] == pytest.approx(expected[0], abs=1e-12)
    for name, gradient in expected[1].items():
        torch.testing.assert_close(found[1][name], gradient, atol=1e-12, rtol=1e-9)
    assert found[2] == expected[2]  # what is drawn next does not depend on the second pass
    assert (
        loss_and_gradients(cached)[0] == found[0] != pytest.approx(loss_and_gradients(lambda c: cached(c.eval()))[0])
    )
