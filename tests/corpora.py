"""Tiny copies of public corpora in their published layouts, made from phantoms."""

import csv
import gzip
import io
import json
import zipfile
from functools import cache
from pathlib import Path

import nibabel
import numpy as np
from PIL import Image

from hsenet.phantom import CT_RATE_LABELS, PhantomStudy, nifti_bytes, render_study, sample_study
from reading_hsenet import read_volume


SPACING = (4.8, 4.8, 8.0)  # coarse: these tests are about files


@cache
def study(index: int) -> PhantomStudy:
    return sample_study(3, index)


@cache
def scan(index: int) -> tuple[np.ndarray, np.ndarray]:
    """int16 HU and affine of a phantom, never below what a stored value of 0 means in CT-RATE."""
    image = render_study(study(index), spacing=SPACING)
    return np.clip(image.array, -1024, None), image.affine


def nifti(index: int, offset: int = 0) -> bytes:
    array, affine = scan(index)
    return nifti_bytes(array + np.int16(offset), affine)


def blank_nifti(index: int) -> bytes:
    """A header that does not say where the voxels are."""
    array, affine = scan(index)
    image = nibabel.Nifti1Image(array, affine)
    image.set_sform(None, code=0)
    image.set_qform(None, code=0)
    return gzip.compress(image.to_bytes(), mtime=0)


def write(path: Path, content: bytes | str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def table(rows: list[dict]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


# CT-RATE: volume name -> phantom. Two reconstructions each of train_1_a and valid_1_a.
VOLUMES = {
    "train_1_a_1": 0,
    "train_1_a_2": 20,
    "train_1_b_1": 1,
    "train_2_a_1": 2,
    "train_3_a_1": 3,
    "train_4_a_1": 4,  # the report of train_2_a
    "train_5_a_1": 5,
    "train_6_a_1": 6,
    "train_7_a_1": 7,
    "train_8_a_1": 8,  # a head
    "train_9_a_1": 9,  # blank header
    "train_10_a_1": 10,  # no findings
    "valid_1_a_1": 11,
    "valid_1_a_2": 21,
    "valid_2_a_1": 12,
}
REPORT_OF = {"train_1_a_2": 0, "train_4_a_1": 2, "valid_1_a_2": 11}
INTERCEPTS = (-1024, -8192)


def ct_rate(root: Path, release: str) -> Path:
    for number, (name, index) in enumerate(VOLUMES.items()):
        part, patient, scan_letter, _ = name.split("_")
        folder = f"dataset/{part}{'_fixed' if release == 'ct-rate-v2' else ''}/{part}_{patient}"
        offset = -INTERCEPTS[number % 2] if release == "ct-rate-v1" else 0
        content = blank_nifti(index) if name == "train_9_a_1" else nifti(index, offset)
        write(root / folder / f"{part}_{patient}_{scan_letter}" / f"{name}.nii.gz", content)
    for part, word in (("train", "train"), ("valid", "validation")):
        names = [name for name in VOLUMES if name.startswith(part)]
        write(root / f"dataset/radiology_text_reports/{word}_reports.csv", table([_report(name) for name in names]))
        labels = table([_labels(name) for name in names])
        write(root / f"dataset/multi_abnormality_labels/{part}_predicted_labels.csv", labels)
        metadata = [_metadata(number, name) for number, name in enumerate(VOLUMES) if name in names]
        write(root / f"dataset/metadata/{word}_metadata.csv", table(metadata))
        write(root / f"dataset/metadata/no_chest_{part}.txt", "train_8_a_1.nii.gz\n" if part == "train" else "")
    return root


def _report(name: str) -> dict:
    phantom = study(REPORT_OF.get(name, VOLUMES[name]))
    return {
        "VolumeName": f"{name}.nii.gz",
        "ClinicalInformation_EN": "Not given.",
        "Technique_EN": "Non-contrast images, axial plane.",
        "Findings_EN": "" if name == "train_10_a_1" else phantom.findings_text,
        "Impressions_EN": phantom.impression_text,
    }


def _labels(name: str) -> dict:
    labels = study(REPORT_OF.get(name, VOLUMES[name])).labels
    return {"VolumeName": f"{name}.nii.gz", **dict(zip(CT_RATE_LABELS, labels, strict=True))}


def _metadata(number: int, name: str) -> dict:
    phantom = study(VOLUMES[name])
    return {
        "VolumeName": f"{name}.nii.gz",
        "Manufacturer": "Phantom",
        "PatientSex": phantom.sex,
        "PatientAge": f"{phantom.age:03d}Y",
        "RescaleIntercept": INTERCEPTS[number % 2],
        "RescaleSlope": 1,
        "XYSpacing": "[4.8, 4.8]",
        "ZSpacing": 8.0,
    }


def radgenome(root: Path) -> Path:
    """Questions on the first reconstructions, of every type, and region reports; one row is about the whole scan."""
    for part, word in (("train", "train"), ("valid", "validation")):
        names = [name for name in VOLUMES if name.startswith(part) and name.endswith("_1")]
        rows = {kind: [] for kind in ("abnormality", "location", "presence", "size", "region_report")}
        for name in names:
            place = {"Volumename": f"{name}.nii.gz", "Anatomy": "lung/lung/right lung"}
            rows["abnormality"].append({**place, "Abnormality": "nodule, consolidation"})
            rows["location"].append({**place, "Abnormality": "nodule"})
            rows["presence"].append({**place, "Finding": "nodule", "Presence": "Yes."})
            rows["presence"].append({**place, "Anatomy": "", "Finding": "pleural effusion", "Presence": "No."})
            rows["size"].append({**place, "Abnormality": "nodule", "Size": "6x4 mm"})
            rows["region_report"].append({**place, "Sentence": "There is a nodule."})
            rows["region_report"].append({**place, "Sentence": "Ventilation is normal."})
        for kind, entries in rows.items():
            stem = kind if kind == "region_report" else f"vqa_{kind}"
            write(root / f"dataset/radgenome_files/{word}_{stem}.csv", table(entries))
    return root


def bimcv_r(root: Path, *, zipped: bool) -> Path:
    """Ten patients, one with two scans, one of them of an abdomen by its name; a row whose scan is missing."""
    entries, scans = [], {}
    for number in range(10):
        for run in (1, 2) if number == 0 else (1,):
            part = "abdomen" if number == 1 else "chest"
            name = f"sub-S{number:05d}_ses-E{number:05d}_run-{run}_bp-{part}_ct.nii.gz"
            entries.append(_bimcv_entry(number, name))
            scans[name] = nifti(number + 20 * (run - 1))
    entries.append(_bimcv_entry(11, "sub-S00011_ses-E00011_run-1_bp-chest_ct.nii.gz"))
    write(root / "meta/curated_ct_report_path_En.csv", table(entries))
    if not zipped:
        for name, content in scans.items():
            write(root / "CT1/ct" / name, content)
        return root
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        for name, content in scans.items():
            file.writestr(f"CT1/ct/{name}", content)
    write(root / "CT1.zip", archive.getvalue())
    return root


def _bimcv_entry(number: int, name: str) -> dict:
    return {
        "PatientID": f"sub-S{number:05d}",
        "ReportID": f"ses-E{number:05d}",
        "Report": "se realiza tc toracico",
        "Labels": "['', ' pleural effusion', 'nodule']",
        "Localizations": "['loc right']",
        "path": f"/raid/BIMCV_CT/{name}",
        "Report_en": study(number).findings_text,
    }


def m3d_cap(root: Path, *, zipped: bool) -> Path:
    """Cases of axial pictures with texts; one coronal series, one case in two splits, one empty findings section."""
    index = {"train": [], "validation": [], "test": []}
    files: dict[str, bytes] = {}
    for number in range(8):
        split = "test" if number == 6 else "validation" if number == 7 else "train"
        case = f"{number:06d}"
        series = ["Axial_non-contrast", *(["Coronal_C-_Pöschl"] if number == 0 else [])]
        for name in series:
            ascii_name = name.replace("ö", "o")
            entry = {"image": f"ct_case/{case}/{ascii_name}.npy", "text": f"ct_case/{case}/text.txt"}
            index[split].append(entry)
            if number == 5:
                index["test"].append(entry)
            files |= {f"{case}/{name}/{slice_number}.png": png for slice_number, png in enumerate(_pictures(number))}
        findings = "" if number == 4 else study(number).findings_text
        text = (
            f"Title: Case\n\npresentation: Cough.\n\nAge: 60 years\nGender: Female\n\nstudy_findings:\n{findings}\n\n"
        )
        files[f"{case}/text.txt"] = f"{text}discussion: {study(number).impression_text}\n".encode()
    write(root / "M3D_Cap/M3D_Cap.json", json.dumps(index))
    if not zipped:
        for name, content in files.items():
            write(root / "M3D_Cap/ct_case" / name, content)
        return root
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        for name, content in files.items():
            file.writestr(f"ct_case/{name}", content)
    write(root / "M3D_Cap/ct_case/ct_case_00.zip", archive.getvalue())
    return root


def _pictures(index: int) -> list[bytes]:
    """A phantom as radiologists look at it, from the top down, 8 bits between -160 and 240 HU."""
    array, affine = scan(index)
    volume = read_volume(array, affine=affine).array[::-1]
    grey = np.rint((np.clip(volume, -160, 240) + 160) / 400 * 255).astype(np.uint8)
    pictures = []
    for plane in grey:
        content = io.BytesIO()
        Image.fromarray(plane).save(content, "PNG")
        pictures.append(content.getvalue())
    return pictures
