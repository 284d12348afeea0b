"""Columns of the datasets, with what each holds: those of the phantoms, and what public corpora add."""

from datasets import Features, Image, Nifti, Sequence, Value

from hsenet.phantom import CT_RATE_LABELS


STUDY = {
    "volume_name": (Value("string"), "name of the volume, unique in the dataset"),
    "study_id": (Value("string"), "examination; its reconstructions share the report"),
    "patient_id": (Value("string"), "patient, in one split only"),
}
REPORT = {
    "volume": (
        Value("string"),
        "where the scan is, relative to this dataset: a file, or `FILE.parquet#ROW` for a row of `volumes`",
    ),
    **STUDY,
    "reconstruction": (Value("int16"), "number of the reconstruction in its study, from 1"),
    "age": (Value("int16"), "years"),
    "sex": (Value("string"), "M or F"),
    "clinical_information": (Value("string"), "why the examination was asked for"),
    "technique": (Value("string"), "how it was made"),
    "findings": (Value("string"), "the report's findings"),
    "impression": (Value("string"), "the report's conclusion"),
    "labels": (
        Sequence(Value("int8")),
        f"0 or 1 for each of CT-RATE's {len(CT_RATE_LABELS)} findings, in this order: {', '.join(CT_RATE_LABELS)}",
    ),
    "details": (Value("string"), "JSON of what else the corpus says"),
    "hu_slope": (
        Value("float64"),
        "HU = hu_slope * stored value + hu_intercept; null: the file says itself how its values become HU",
    ),
    "hu_intercept": (Value("float64"), "see hu_slope"),
    "sibling_of": (Value("string"), "the study's first volume, if this is a further reconstruction"),
    "duplicate_of": (
        Value("string"),
        "another study with the very same report, the first in the order test, validation, train",
    ),
    "content_hash": (
        Value("string"),
        "SHA-256 of the shape and the HU (rounded) in canonical orientation, before any resampling",
    ),
}
QUESTION = {
    **STUDY,
    "question": (Value("string"), "about the volume of this name"),
    "answer": (Value("string"), "in the corpus' words"),
    "question_type": (Value("string"), "presence, location, size, abnormality or region_report"),
    "label": (Value("string"), "the finding asked about"),
    "region": (Value("string"), "the region asked about, from large to small"),
}

# Of these, what `reports` does not have.
VOLUME = {
    "volume": (
        Nifti(),
        "the scan: int16 HU, with the affine that leads to mm in patient space; the other columns are `reports`'",
    )
}
PREVIEW = {
    "image": (
        Image(),
        "middle axial, coronal and sagittal plane, -1000 to 400 HU; beside it name and texts, of few rows",
    )
}

REPORT_FEATURES = Features({name: feature for name, (feature, _) in REPORT.items()})
VOLUME_FEATURES = Features({**REPORT_FEATURES, "volume": VOLUME["volume"][0]})
QUESTION_FEATURES = Features({name: feature for name, (feature, _) in QUESTION.items()})
PREVIEW_FEATURES = Features(
    {
        "image": PREVIEW["image"][0],
        **{name: REPORT_FEATURES[name] for name in ("volume_name", "findings", "impression")},
    }
)
