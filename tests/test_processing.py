"""Scans and texts to tensors: field of view, orientation, windows, resampling, prompts, chat templates, errors."""

from itertools import product

import nibabel
import numpy as np
import pytest
import tiny
import torch
from scans import stored_as
from tokenizers.processors import TemplateProcessing
from torch.nn.functional import interpolate

from hsenet import HSENetImageProcessor, HSENetProcessor, Volume, read_volume


SPACING = (3.0, 1.0, 1.0)
ANY_VALUES = {"hu_check": "warn"}  # for patterns that are no CT
TOKENS = 32  # of a volume
PHI_TEMPLATE = (
    "{% for m in messages %}<|{{m.role}}|>{{m.content}}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


pytestmark = pytest.mark.filterwarnings("ignore:The values don't look like Hounsfield units")


def pixels(array: np.ndarray, stored_spacing: tuple = SPACING, **settings) -> torch.Tensor:
    """`pixel_values` of one array, without batch and channel."""
    processor = tiny.image_processor(num_slices=0, **settings)
    return processor(array, spacing=stored_spacing, reading=ANY_VALUES, return_tensors="pt")["pixel_values"][0, 0]


def text_processor(**tokenizer_settings) -> HSENetProcessor:
    return HSENetProcessor(tiny.image_processor(), tiny.tokenizer(**tokenizer_settings), image_seq_length=TOKENS)


# The volume


def test_shapes_and_ranges():
    processor = tiny.image_processor(image_mean=(0.5, 0.4, 0.3), image_std=(0.2, 0.25, 0.5))
    outputs = processor([tiny.scan(0), tiny.scan(1, (12, 50, 30))], spacing=SPACING, return_tensors="pt")
    assert outputs["pixel_values"].shape == (2, 1, *tiny.IMAGE_SIZE)
    assert outputs["slice_pixel_values"].shape == (2, tiny.NUM_SLICES, 3, *tiny.SLICE_SIZE)
    assert outputs["pixel_values"].min() >= 0 and outputs["pixel_values"].max() <= 1
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (processor.image_mean, processor.image_std))
    grey = outputs["slice_pixel_values"] * std + mean
    assert grey.min() >= 0 and grey.max() <= 1 and grey.std() > 0.1
    torch.testing.assert_close(grey[:, :, 0], grey[:, :, 2])
    assert "slice_pixel_values" not in tiny.image_processor(num_slices=0)(tiny.scan(), spacing=SPACING)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"crop_to_body": False},
        {"spacing": (4.0, 1.5, 1.3)},
        {"volume_fit": "nonzero_box"},
        {"resample_spacing": (2.0, 1.5, 1.5)},
        {"orientation": "stored"},
        {"orientation": "stored", "volume_fit": "nonzero_box"},
    ],
    ids=str,
)
@pytest.mark.parametrize("flips", [(True, True, False), (False, True, True)])
def test_patches_lie_on_the_scan_where_the_model_saw_them(settings, flips):
    """What is painted where a patch is said to be turns up in that patch of `pixel_values`, and there alone."""
    processor = tiny.image_processor(num_slices=0, **settings)
    grid, patch = (2, 2, 2), [size // 2 for size in processor.image_size]
    body = np.full((24, 48, 40), -1000, dtype=np.float32)
    body[2:20, 4:40, 6:36] = -300
    affine = np.array([[0, 0, -1.0, 40.0], [0, -1.0, 0, 35.5], [3.0, 0, 0, -120.0], [0, 0, 0, 1]])
    stored, stored_affine = _stored(body, flips, affine)
    volume = read_volume(stored, affine=stored_affine, **ANY_VALUES)
    for cell in product(*map(range, grid)):
        one = torch.zeros(grid)
        one[cell] = 1
        scores, box = processor.patches_on_scan(volume, one)
        [place] = scores.nonzero().tolist()
        region = tuple(
            slice(max(0, round(start + index * extent / 2)), max(0, round(start + (index + 1) * extent / 2)))
            for index, (start, extent) in zip(place, box, strict=True)
        )
        painted = body.copy()
        painted[region] += 200 * (body[region] > -1000)
        stored, stored_affine = _stored(painted, flips, affine)
        values = processor(stored, affine=stored_affine, reading=ANY_VALUES, return_tensors="pt")["pixel_values"][0, 0]
        brightest = values.unfold(0, patch[0], patch[0]).unfold(1, patch[1], patch[1]).unfold(2, patch[2], patch[2])
        share = (brightest > brightest.max() - 0.04).float().mean((3, 4, 5))
        assert share[cell] > 0.15 and share.sum() - share[cell] < 0.25 * share[cell], (cell, share)


def _stored(array: np.ndarray, flips: tuple[bool, ...], affine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """As files have it: the third axis runs along the patient."""
    return stored_as(array, (2, 1, 0), flips, affine)


def test_paper_sizes_are_the_default():
    outputs = HSENetImageProcessor()(tiny.scan(), spacing=SPACING, return_tensors="np")
    assert outputs["pixel_values"].shape == (1, 1, 32, 256, 256)
    assert outputs["slice_pixel_values"].shape == (1, 32, 3, 224, 224)


def test_windows_map_hu_to_grey():
    array = np.full(tiny.IMAGE_SIZE, -1000, dtype=np.float32)
    levels = [-2000, -1000, -400, 200, 600, 3000]
    array[:, :, : len(levels)] = levels
    expected = torch.tensor([0, 0, 0.5, 1, 1, 1])
    torch.testing.assert_close(pixels(array, crop_to_body=False)[3, 5, : len(levels)], expected)
    processor = tiny.image_processor(
        crop_to_body=False, slice_size=tiny.IMAGE_SIZE[1:], image_mean=(0.5,), image_std=(0.5,)
    )
    slices = processor(array, spacing=SPACING, reading=ANY_VALUES, return_tensors="pt")["slice_pixel_values"]
    assert slices.shape == (1, tiny.NUM_SLICES, 1, *tiny.IMAGE_SIZE[1:])
    torch.testing.assert_close(slices[0, 0, 0, 5, : len(levels)], torch.tensor([-1.0, -1, -0.4, 0.2, 0.6, 1]))


def test_body_fills_the_field_of_view():
    """Air around the body does not change what the model sees."""
    array = tiny.scan()
    body = array[:, 5:-5, 4:-9]
    inner = np.s_[:, 2:-2, 2:-2]  # the outermost samples also mix in some of the air
    torch.testing.assert_close(pixels(array)[inner], pixels(body, crop_to_body=False)[inner])
    assert (pixels(array) - pixels(array, crop_to_body=False)).abs().max() > 0.5


@pytest.mark.parametrize("spacing", [(2.0, 1.0, 1.0), (4.0, 0.5, 2.0)])
def test_spacing_keeps_physical_sizes(spacing):
    """A body of twice the size covers twice the voxels along each axis, however finely it was scanned."""
    counts = []
    for millimetres in (8.0, 16.0):
        array = np.full([round(40 / stored) for stored in spacing], -1000, dtype=np.float32)
        array[tuple(slice(round(12 / stored), round((12 + millimetres) / stored)) for stored in spacing)] = 200
        volume = pixels(array, spacing, spacing=(4.0, 2.0, 2.0))
        assert volume[0].max() == 0 and volume[:, 0].max() == 0 and volume[:, :, 0].max() == 0  # padded with 0
        lines = (volume[:, 16, 16], volume[4, :, 16], volume[4, 16, :])
        counts.append([(line > 0.5).sum().item() for line in lines])
    assert counts == [[2, 4, 4], [4, 8, 8]]


def test_field_of_view_beyond_the_scan_is_padded():
    array = np.full((8, 8, 8), 200, dtype=np.float32)
    array[0, 0, 0] = 300
    volume = pixels(array, (1.0, 1.0, 1.0), spacing=(1.0, 0.5, 0.5), crop_to_body=False)
    assert (volume[:, :8] == 0).all() and (volume[:, 24:] == 0).all() and (volume[:, :, :8] == 0).all()
    assert (volume[:, 10:24, 10:24] == 1).all()


def test_left_posterior_superior_marker(tmp_path):
    """Depth runs to superior, height to posterior, width to the patient's left."""
    array = np.full((32, 32, 16), 0, dtype=np.float32)  # RAS+: the indices grow to right, anterior, superior
    array[:5, :5, 12:] = 200
    nibabel.save(nibabel.Nifti1Image(array, np.diag([1.0, 1.0, 2.0, 1.0])), tmp_path / "scan.nii.gz")
    volume = tiny.image_processor()(str(tmp_path / "scan.nii.gz"), reading=ANY_VALUES, return_tensors="pt")[
        "pixel_values"
    ][0, 0]
    bright = (volume > 0.95).nonzero()
    assert len(bright) == 2 * 5 * 5
    assert bright.min(dim=0).values.tolist() == [6, 27, 27] and bright.max(dim=0).values.tolist() == [7, 31, 31]


def test_stored_orientation_does_not_matter(tmp_path):
    array = tiny.scan(shape=(20, 22, 10))  # as (i, j, k)
    processor = tiny.image_processor()
    expected = None
    for signs in product((1, -1), repeat=3):
        affine = np.diag([*signs, 1.0]) @ np.diag([1.0, 1.0, 2.0, 1.0])
        affine[:3, 3] = [
            (size - 1) * scale if sign < 0 else 0
            for size, scale, sign in zip((20, 22, 10), (1, 1, 2), signs, strict=True)
        ]
        flipped = array[tuple(slice(None, None, sign) for sign in signs)]
        outputs = processor(flipped, affine=affine, reading=ANY_VALUES, return_tensors="pt")
        expected = expected or outputs
        for name, tensor in outputs.items():
            assert torch.equal(tensor, expected[name])
    nibabel.save(nibabel.Nifti1Image(flipped, affine), tmp_path / "scan.nii")
    for source in (
        tmp_path / "scan.nii",
        nibabel.load(tmp_path / "scan.nii"),
        read_volume(tmp_path / "scan.nii", **ANY_VALUES),
    ):
        torch.testing.assert_close(
            processor(source, reading=ANY_VALUES, return_tensors="pt")["pixel_values"], expected["pixel_values"]
        )
    mirrored = processor(array[::-1], affine=np.diag([1.0, 1.0, 2.0, 1.0]), reading=ANY_VALUES, return_tensors="pt")
    assert (mirrored["pixel_values"] - expected["pixel_values"]).abs().max() > 0.5


def test_list_of_files_and_arrays(tmp_path):
    volume = read_volume(tiny.scan(0), spacing=SPACING)
    array = np.ascontiguousarray(volume.array)
    nibabel.save(nibabel.Nifti1Image(array, volume.affine), tmp_path / "scan.nii.gz")
    processor = tiny.image_processor(spacing=(2.0, 1.5, 1.5))
    sources = [tmp_path / "scan.nii.gz", tiny.scan(1), [torch.from_numpy(tiny.scan(1))[None]]]
    together = processor(sources, spacing=[None, SPACING, (6.0, 2.0, 2.0)], return_tensors="pt")["pixel_values"]
    alone = [
        processor(source, spacing=spacing, return_tensors="pt")["pixel_values"][0]
        for source, spacing in ((volume, None), (tiny.scan(1), SPACING), (tiny.scan(1), (6.0, 2.0, 2.0)))
    ]
    torch.testing.assert_close(together, torch.stack(alone))
    assert (together[1] - together[2]).abs().max() > 0.5
    with pytest.raises(ValueError, match="one spacing for all volumes or 3, one for each, got 2"):
        processor(sources, spacing=[None, SPACING])


# Slices


def ramp(depth: int = 16) -> np.ndarray:
    """Each axial plane has one value, 0 to 150 HU."""
    return np.broadcast_to(np.linspace(0, 150, depth, dtype=np.float32)[:, None, None], (depth, 16, 16)).copy()


@pytest.mark.parametrize(("selection", "planes"), [("uniform", [0, 5, 10, 15]), ("slab_mean", [1.5, 5.5, 9.5, 13.5])])
@pytest.mark.parametrize("crop", [True, False])
def test_slice_selection(selection, planes, crop):
    settings = {"slice_selection": selection, "image_mean": (0.0,), "image_std": (1.0,), "crop_to_body": crop}
    slices = tiny.image_processor(**settings)(ramp(), spacing=SPACING, reading=ANY_VALUES, return_tensors="pt")[
        "slice_pixel_values"
    ]
    values = slices[0, :, 0, 4, 4] * 2000 - 1000  # the slices' window
    torch.testing.assert_close(values, 10 * torch.tensor(planes, dtype=torch.float32), atol=0.01, rtol=0)


def test_slabs_cut_planes_in_parts():
    """10 planes in 4 slabs of 2.5."""
    array = ramp(10)
    array[:, :, :] = np.arange(10, dtype=np.float32)[:, None, None] * 10
    settings = {"slice_selection": "slab_mean", "image_mean": (0.0,), "image_std": (1.0,)}
    slices = tiny.image_processor(**settings)(array, spacing=SPACING, reading=ANY_VALUES, return_tensors="pt")[
        "slice_pixel_values"
    ]
    expected = [(0 + 10 + 5 * 2) / 2.5, (5 * 2 + 0 + 30 + 40) / 2.5, (50 + 60 + 5 * 7) / 2.5, (5 * 7 + 80 + 90) / 2.5]
    values = slices[0, :, 0, 4, 4] * 2000 - 1000
    torch.testing.assert_close(values, torch.tensor(expected), atol=0.01, rtol=0)


# Resampling


def random_body(*shape: int) -> np.ndarray:
    """Random HU inside the volume's window, with body in every plane."""
    return np.random.default_rng(0).uniform(-400, 200, shape).astype(np.float32)


def grey(array: np.ndarray) -> torch.Tensor:
    return (torch.from_numpy(array) + 1000) / 1200


def test_equal_sizes_are_not_resampled():
    array = random_body(*tiny.IMAGE_SIZE)
    torch.testing.assert_close(pixels(array), grey(array))


def test_enlarging_is_trilinear_interpolation():
    array = random_body(8, 16, 20)
    expected = interpolate(grey(array)[None, None], (16, 40, 50), mode="trilinear", align_corners=False)[0, 0]
    torch.testing.assert_close(pixels(array, image_size=(16, 40, 50)), expected, atol=1e-5, rtol=0)


def test_shrinking_is_antialiased_as_pictures_are():
    """Each axial plane of a volume that shrinks in plane only, against torch's antialiased bilinear picture."""
    array = random_body(8, 64, 50)
    expected = interpolate(grey(array)[:, None], (32, 20), mode="bilinear", antialias=True, align_corners=False)[:, 0]
    torch.testing.assert_close(pixels(array, image_size=(8, 32, 20)), expected, atol=1e-5, rtol=0)


def test_checkerboard_shrinks_to_its_mean():
    indices = np.indices((32, 128, 128)).sum(axis=0)
    array = np.where(indices % 2, 200, -400).astype(np.float32)
    inner = pixels(array)[1:-1, 1:-1, 1:-1]
    torch.testing.assert_close(inner, torch.full_like(inner, 0.75), atol=1e-4, rtol=0)


@pytest.mark.parametrize("shape", [(9, 33, 35), (50, 20, 70)])
def test_constant_stays_constant(shape):
    array = np.full(shape, 80, dtype=np.float32)
    array[0, 0, 0] = 80.001  # a scan of one value only is refused
    torch.testing.assert_close(pixels(array), torch.full(tiny.IMAGE_SIZE, 0.9))


# Prompts


def test_placeholders_are_expanded():
    processor = text_processor()
    outputs = processor(
        text=["<image>a nodule?", "No <image> or <image> effusion"],
        volumes=[tiny.scan(i) for i in range(3)],
        spacing=SPACING,
        return_tensors="pt",
    )
    counts = (outputs["input_ids"] == processor.image_token_id).sum(dim=1).tolist()
    assert counts == [TOKENS, 2 * TOKENS]
    assert outputs["pixel_values"].shape[0] == 3
    assert outputs["attention_mask"][0, 0] == 0 and outputs["attention_mask"][:, -1].all()  # padded on the left
    text = processor.tokenizer.decode(outputs["input_ids"][1])
    assert text == f"No {'<image>' * TOKENS} or {'<image>' * TOKENS} effusion"


def test_plain_prompt_is_made_for_one_text_a_volume():
    processor = text_processor()
    scans = [tiny.scan(0), tiny.scan(1)]
    outputs = processor(text=["a nodule?", "effusion?"], volumes=scans, spacing=SPACING, return_tensors="pt")
    explicit = [f"<|endoftext|><image>{question}" for question in ("a nodule?", "effusion?")]
    assert [processor.plain_prompt(question) for question in ("a nodule?", "effusion?")] == explicit
    expected = processor(text=explicit, volumes=scans, spacing=SPACING, return_tensors="pt")
    for name, tensor in expected.items():
        assert torch.equal(outputs[name], tensor)
    assert processor.tokenizer.decode(outputs["input_ids"][1]).endswith("<image>effusion?")


def test_a_question_becomes_a_turn_of_the_chat_template():
    processor = text_processor(chat_template=PHI_TEMPLATE)
    turn = "<|user|><image>a nodule?<|end|><|assistant|>"
    assert processor.prompt("a nodule?") == turn
    assert processor.answer("a nodule?", "yes") == "yes<|end|>"
    volumes = {"volumes": tiny.scan(), "spacing": SPACING, "return_tensors": "pt"}
    expected = processor(text=turn, **volumes)
    outputs = processor(text="a nodule?", **volumes)
    assert all(torch.equal(outputs[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("template", [None, PHI_TEMPLATE])
@pytest.mark.parametrize(
    ("layout", "prompt"),
    [("adjacent", "<|endoftext|><image>a nodule?"), ("separate_line", "<|endoftext|><image>\na nodule?")],
)
def test_the_plain_prompt_knows_no_template(template, layout, prompt):
    tokenizer = tiny.tokenizer(**({"chat_template": template} if template is not None else {}))
    processor = HSENetProcessor(
        tiny.image_processor(), tokenizer, TOKENS, prompt_style="plain", plain_prompt_layout=layout
    )
    assert processor.prompt("a nodule?") == processor.plain_prompt("a nodule?") == prompt
    assert processor.answer("a nodule?", "yes") == " yes<|endoftext|>"
    assert processor.apply_chat_template(conversation(), tokenize=False, add_generation_prompt=True) == prompt
    dialogue = processor.apply_chat_template(conversation(answer="yes"), tokenize=False)
    assert dialogue == f"{prompt} yes<|endoftext|>"
    ids = processor(text="a nodule?", volumes=tiny.scan(), spacing=SPACING)["input_ids"][0]
    assert processor.tokenizer.decode(ids) == prompt.replace("<image>", "<image>" * TOKENS)


def test_without_a_template_both_styles_are_the_plain_prompt():
    chat, plain = (HSENetProcessor(tiny.image_processor(), tiny.tokenizer(), TOKENS, prompt_style=style)
                   for style in ("chat", "plain"))  # fmt: skip
    assert chat.prompt("a nodule?") == plain.prompt("a nodule?") == chat.plain_prompt("a nodule?")
    assert chat.answer("a nodule?", "yes") == plain.answer("a nodule?", "yes")


def test_a_template_whose_prompt_is_no_beginning_of_its_dialogue_is_refused():
    thinking = PHI_TEMPLATE.replace("%}<|assistant|>{%", "%}<|assistant|><think>{%")
    with pytest.raises(ValueError, match='other text before the answer: use prompt_style="plain"'):
        text_processor(chat_template=thinking).answer("a nodule?", "yes")


@pytest.mark.parametrize("setting", ["prompt_style", "plain_prompt_layout"])
def test_unknown_prompts_are_refused(setting):
    with pytest.raises(ValueError, match=f"{setting} should be '.*' or '.*', got 'other'"):
        HSENetProcessor(tiny.image_processor(), tiny.tokenizer(), TOKENS, **{setting: "other"})


def test_bos_is_not_doubled():
    tokenizer = tiny.tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    assert tokenizer("a")["input_ids"][0] == 0
    processor = HSENetProcessor(tiny.image_processor(), tokenizer, image_seq_length=TOKENS)
    for text in ("a nodule?", "<image>a nodule?", "<|endoftext|><image>a nodule?"):
        outputs = processor(text=text, volumes=tiny.scan(), spacing=SPACING)
        assert outputs["input_ids"][0].count(0) == 1 and outputs["input_ids"][0][1] == 1
    assert processor(text="a nodule?")["input_ids"][0].count(0) == 1


@pytest.mark.parametrize(
    ("texts", "count", "words"),
    [
        (["<image><image>?"], 1, ["got 2 in 1 text(s) for 1 volume(s)"]),
        (["a", "b"], 1, ["got 0 in 2 text(s) for 1 volume(s)"]),
        (["<image>a", "b"], 2, ["got 1 in 2 text(s) for 2 volume(s)"]),
        ("<image>a", 0, ["got 1 in 1 text(s) for 0 volume(s)"]),
    ],
)
def test_number_of_placeholders_is_checked(texts, count, words):
    volumes = {"volumes": [tiny.scan()] * count, "spacing": SPACING} if count else {}
    with pytest.raises(ValueError) as error:
        text_processor()(text=texts, **volumes)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_padding_on_the_right_is_refused():
    processor = text_processor()
    with pytest.raises(ValueError, match='padding_side="left", got "right"'):
        processor(text=["a", "a nodule"], padding_side="right")
    processor.tokenizer.padding_side = "right"
    with pytest.raises(ValueError, match='padding_side="left", got "right"'):
        processor(text=["a nodule?"], volumes=tiny.scan(), spacing=SPACING)


def test_truncating_a_volumes_tokens_is_refused():
    with pytest.raises(ValueError, match="truncation"):
        text_processor()(text="<image>a", volumes=tiny.scan(), spacing=SPACING, truncation=True, max_length=9)


def test_other_names_and_nested_lists():
    processor, scans = text_processor(), [tiny.scan(0), tiny.scan(1)]
    expected = processor(text=["a", "b"], volumes=scans, spacing=SPACING, return_tensors="pt")
    for arguments in (
        {"images": scans, "spacing": SPACING},
        {"images": [[scan] for scan in scans], "spacing": [SPACING, SPACING]},
        {"volumes": tuple(scans), "images_kwargs": {"spacing": SPACING}},
    ):
        outputs = processor(text=["a", "b"], return_tensors="pt", **arguments)
        assert set(outputs) == set(expected)
        assert all(torch.equal(outputs[name], expected[name]) for name in expected)
    with pytest.raises(ValueError, match="pass one"):
        processor(images=scans, volumes=scans, text=["a", "b"], spacing=SPACING)
    with pytest.raises(ValueError, match="got neither"):
        processor()


def test_text_or_volume_alone():
    processor = text_processor()
    assert set(processor(text="a nodule?")) == {"input_ids", "attention_mask"}
    assert set(processor(volumes=tiny.scan(), spacing=SPACING)) == {"pixel_values", "slice_pixel_values"}
    numpy = processor(text="a", volumes=tiny.scan(), spacing=SPACING, return_tensors="np")
    assert all(isinstance(value, np.ndarray) for value in numpy.values())


def test_prompts_for_cached_features():
    processor = text_processor()
    outputs = processor.tokenize_prompts([processor.plain_prompt("a"), processor.plain_prompt("a nodule?")])
    expected = processor(text=["a", "a nodule?"], volumes=[tiny.scan()] * 2, spacing=SPACING, return_tensors="pt")
    assert torch.equal(outputs["input_ids"], expected["input_ids"])


def test_contrastive_processor_compares_any_number_of_texts():
    tokenizer = tiny.tokenizer()
    side = tokenizer.padding_side
    processor = HSENetProcessor(tiny.image_processor(), tokenizer)
    outputs = processor(text=tiny.SENTENCES[:3], volumes=tiny.scan(), spacing=SPACING, return_tensors="pt")
    assert outputs["input_ids"].shape[0] == 3 and outputs["pixel_values"].shape[0] == 1
    assert not (outputs["input_ids"] == 1).any() and tokenizer.padding_side == side == "right"


def test_placeholder_must_be_one_token():
    with pytest.raises(ValueError, match="no token '<ct-volume>' .* add it first"):
        HSENetProcessor(tiny.image_processor(), tiny.tokenizer(), image_seq_length=4, image_token="<ct-volume>")


# Errors


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda folder: np.zeros((64, 64)), "3D volume"),
        (lambda folder: tiny.scan()[:4], "slices"),
        (lambda folder: np.zeros((2, 10, 40, 36)), "3D volume"),
        (lambda folder: tiny.scan() * 0 - 1000 + np.indices((10, 40, 36))[0], "Hounsfield"),
        (lambda folder: [], "empty list"),
        (lambda folder: "missing", "no file or folder"),
        (lambda folder: "text.nii.gz", "NIfTI"),
        (lambda folder: "picture.png", "not NIfTI"),
        (lambda folder: "empty", "DICOM"),
        (lambda folder: {"array": 1}, "dict"),
    ],
)
def test_scans_that_cannot_be_used(make, words, tmp_path):
    folder = tmp_path / "smith_john"
    (folder / "empty").mkdir(parents=True)
    (folder / "text.nii.gz").write_text("no scan " * 100)
    (folder / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(400))
    source = make(folder)
    spacing = SPACING if isinstance(source, np.ndarray) else None
    source = folder / source if isinstance(source, str) else source
    with pytest.raises(ValueError, match=words) as error:
        text_processor()(text="a nodule?", volumes=source, spacing=spacing)
    assert "smith" not in str(error.value)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"image_size": (32, 256)}, "image_size should be 3"),
        ({"spacing": (1, 0, 1)}, "spacing should be 3 positive"),
        ({"hu_window": (200, -1000)}, "hu_window .*lower"),
        ({"slice_selection": "middle"}, "'uniform' or 'slab_mean', got 'middle'"),
        ({"image_mean": (0.5, 0.5)}, "image_std should be 2"),
    ],
)
def test_wrong_settings(settings, words):
    with pytest.raises(ValueError, match=words):
        tiny.image_processor(**settings)


# Chat templates


def conversation(kind: str = "volume", seed: int = 0, question: str = "a nodule?", answer: str | None = None) -> list:
    content = [{"type": kind, kind: tiny.scan(seed)}, {"type": "text", "text": question}]
    answers = [{"role": "assistant", "content": [{"type": "text", "text": answer}]}] if answer is not None else []
    return [{"role": "user", "content": content}, *answers]


def geometry() -> dict:
    """A new dictionary each time: the platform adds to what it gets."""
    return {"processor_kwargs": {"spacing": SPACING}}


@pytest.mark.parametrize("kind", ["volume", "image"])
@pytest.mark.parametrize(
    ("template", "text"),
    [
        (None, "<|endoftext|><image>a nodule?"),
        (PHI_TEMPLATE, "<|user|><image>a nodule?<|end|><|assistant|>"),
    ],
)
def test_chat_template(kind, template, text):
    processor = text_processor(**({"chat_template": template} if template is not None else {}))
    messages = conversation(kind)
    assert processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == text
    batch = [messages, conversation(kind, 1, "Is there a pericardial effusion?")]
    texts = processor.apply_chat_template(batch, tokenize=False, add_generation_prompt=True)
    assert texts == [text, text.replace("a nodule?", "Is there a pericardial effusion?")]
    settings = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}
    single = processor.apply_chat_template(messages, **settings, **geometry())
    expected = processor(text=text, volumes=tiny.scan(0), spacing=SPACING, return_tensors="pt")
    assert set(single) == set(expected)
    assert all(torch.equal(single[name], expected[name]) for name in expected)
    both = processor.apply_chat_template(batch, **settings, **geometry())
    expected = processor(text=texts, volumes=[tiny.scan(0), tiny.scan(1)], spacing=SPACING, return_tensors="pt")
    assert all(torch.equal(both[name], expected[name]) for name in expected)


def test_plain_chat_is_the_plain_prompt():
    processor = text_processor()
    messages = conversation(answer="yes")
    text = processor.apply_chat_template(messages, tokenize=False)
    assert text == f"{processor.plain_prompt('a nodule?')} yes<|endoftext|>"
    strings = [{"role": "user", "content": "<image>a nodule?"}, {"role": "assistant", "content": "yes"}]
    assert processor.apply_chat_template(strings, tokenize=False) == text


def test_assistant_mask_is_the_answer():
    processor = text_processor()
    answers = ["yes", "No pleural effusion is seen."]
    batch = [conversation(seed=seed, answer=answer) for seed, answer in enumerate(answers)]
    outputs = processor.apply_chat_template(
        batch, tokenize=True, return_dict=True, return_tensors="pt", return_assistant_tokens_mask=True, **geometry()
    )
    for input_ids, mask, answer in zip(outputs["input_ids"], outputs["assistant_masks"], answers, strict=True):
        assert processor.tokenizer.decode(input_ids[mask == 1]) == f" {answer}<|endoftext|>"


def test_several_volumes_in_a_chat():
    processor = text_processor(chat_template=PHI_TEMPLATE)
    parts = [
        {"type": "text", "text": "before "},
        {"type": "volume", "volume": tiny.scan(0)},
        {"type": "text", "text": " after "},
        {"type": "volume", "volume": tiny.scan(1)},
    ]
    outputs = processor.apply_chat_template(
        [{"role": "system", "content": "You read CT."}, {"role": "user", "content": parts}],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        **geometry(),
    )
    text = processor.tokenizer.decode(outputs["input_ids"][0])
    assert (
        text == f"<|system|>You read CT.<|end|><|user|>before {'<image>' * TOKENS} after {'<image>' * TOKENS}<|end|>"
    )
    expected = processor.image_processor([tiny.scan(0), tiny.scan(1)], spacing=SPACING, return_tensors="pt")
    assert torch.equal(outputs["pixel_values"], expected["pixel_values"])


# Saving


SETTINGS = {
    "image_size": (16, 24, 20), "hu_window": (-900, 300), "spacing": (2.5, 1.25, 1.5), "crop_to_body": False,
    "num_slices": 5, "slice_size": (20, 12), "slice_hu_window": (-160, 240), "slice_selection": "slab_mean",
    "image_mean": (0.5, 0.4, 0.3), "image_std": (0.1, 0.2, 0.3),
}  # fmt: skip


@pytest.mark.parametrize("template", [None, PHI_TEMPLATE])
def test_save_and_load(template, tmp_path):
    defaults = HSENetImageProcessor()
    assert all(getattr(defaults, name) != value for name, value in SETTINGS.items())  # each setting is put to the test
    tokenizer = tiny.tokenizer(**({"chat_template": template} if template is not None else {}))
    processor = HSENetProcessor(HSENetImageProcessor(**SETTINGS), tokenizer, image_seq_length=7)
    processor.save_pretrained(tmp_path)
    loaded = HSENetProcessor.from_pretrained(tmp_path)
    assert {
        name: tuple(value) if isinstance(value, (list, tuple)) else value
        for name in SETTINGS
        for value in [getattr(loaded.image_processor, name)]
    } == SETTINGS
    assert (loaded.image_seq_length, loaded.image_token, loaded.image_token_id) == (7, "<image>", 1)
    assert loaded.chat_template == processor.chat_template
    assert loaded.tokenizer.padding_side == "left" and loaded.tokenizer.get_vocab() == tokenizer.get_vocab()
    messages = conversation(answer="yes")
    outputs = [
        each.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt", **geometry())
        for each in (processor, loaded)
    ]
    assert all(torch.equal(outputs[1][name], outputs[0][name]) for name in outputs[0])


def test_a_volume_of_another_copy_of_the_reader_is_taken():
    """As when the package and the Hub's copy of the code meet."""
    volume = read_volume(tiny.scan(), spacing=SPACING)
    assert isinstance(volume, Volume)
    expected = tiny.image_processor()(tiny.scan(), spacing=SPACING, return_tensors="pt")
    outputs = tiny.image_processor()(volume, return_tensors="pt")
    assert torch.equal(outputs["pixel_values"], expected["pixel_values"])


# Text injection

PIECES = (
    *("<image>", "<|end|>", "<|endoftext|>", "<|assistant|>", "[PAD]", "<ima", "ge>", "<|", "|>", "end", "\u202e"),
    *("\x1b[31m", "\uff1cimage\uff1e", "{{ bos_token }}", "{% endfor %}", "\x00", " ", "\n", "is there a nodule?"),
)


@pytest.mark.parametrize("style", ["plain", "chat"])
def test_no_question_adds_a_control_token(style):
    """200 questions of such pieces: each is refused, or its prompt has the control tokens of any other's."""
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens(["<|end|>", "<|user|>", "<|assistant|>"])
    tokenizer.chat_template = PHI_TEMPLATE
    processor = HSENetProcessor(tiny.image_processor(), tokenizer, image_seq_length=TOKENS, prompt_style=style)
    control = torch.tensor(sorted(tokenizer.added_tokens_decoder))

    def control_tokens(question: str) -> list[int]:
        ids = processor.tokenize_prompts([processor.prompt(question)])["input_ids"][0]
        return ids[torch.isin(ids, control)].tolist()

    expected, generator, refused = control_tokens("What is seen?"), np.random.default_rng(0), 0
    assert expected.count(processor.image_token_id) == TOKENS
    for _ in range(200):
        question = "".join(generator.choice(PIECES, size=generator.integers(1, 6)))
        try:
            assert control_tokens(question) == expected, repr(question)
        except ValueError as error:
            assert "Expected words only" in str(error)
            refused += 1
    assert 50 < refused < 190
