# Copyright 2026 The HSENet package authors. Licensed under the Apache License, Version 2.0.
"""What the page asks: a model, samples, and perhaps an index; and the scan that one visitor has opened."""

import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from viewer import Overlay

from hsenet import HSENetInputError, Volume
from hsenet.encoded_scan import EncodedScan, load_generation_model, read_with_warnings
from hsenet.phantom import nifti_bytes, render_study, sample_study


REPORT_REQUEST = "Can you summarize with findings the images presented?"
SCAN_SUFFIXES = (".nii", ".nii.gz", ".nrrd", ".zip")
NUM_PHANTOMS, PHANTOM_SEED, PHANTOM_SPACING = 3, 2025, (2.0, 2.0, 4.0)  # mm along x, y, z
MAX_SAMPLES = 12


@dataclass(frozen=True)
class Sample:
    """A scan that anybody may open: a file of the host's choice, or a phantom that is drawn when it is asked for."""

    name: str
    source: Callable[[], Any]
    truth: str = ""  # what is known to be in it


@dataclass
class OpenScan:
    """One visitor's scan, in memory only."""

    volume: Volume
    encoded: EncodedScan
    overlay: Overlay | None
    truth: str = ""


class Assistant:
    """
    Args:
        model, processor: see [`~hsenet.encoded_scan.load_generation_model`].
        index ([`~hsenet.index.SearchIndex`], *optional*): where scans like the visitor's are looked for.
        samples (`list[Sample]`): scans to try.
        generate_kwargs (`dict`, *optional*): of `generate`, such as `max_new_tokens`.
    """

    claims_come_within = 5.0  # seconds after an upload

    def __init__(self, model, processor, index=None, samples=(), generate_kwargs: dict[str, Any] | None = None):
        self.model, self.processor, self.index = model, processor, index
        self.samples = {sample.name: sample for sample in samples}
        self.generate_kwargs = generate_kwargs or {}

    @classmethod
    def load(
        cls,
        model: str,
        revision: str | None = None,
        index: str | None = None,
        index_model: str | None = None,
        samples: str | None = None,
        **generate_kwargs,
    ) -> "Assistant":
        """
        Args:
            model, index_model: folders or Hub ids of the model that writes and of the one that made the index.
            samples (`str`, *optional*): folder of scans; phantoms are always there.
        """
        searched = None
        if index is not None:
            from hsenet.index import SearchIndex  # needs datasets, which the rest does not

            searched = SearchIndex.load(index, index_model)
        chosen = [*(sample_files(Path(samples)) if samples else ()), *phantoms()]
        return cls(*load_generation_model(model, revision=revision), searched, chosen, generate_kwargs)

    def open_sample(self, name: str) -> OpenScan:
        sample = self.samples[name]
        return self._open(sample.source(), sample.truth)

    def claim(self, path: str) -> str | None:
        """
        Gives an uploaded file to its visitor, in a folder of its own, and returns that; None: it is gone.

        Gradio keeps equal files of two visitors in one place, so a file is not read there, and deleted only when
        nobody can be about to claim it.
        """
        folder = tempfile.mkdtemp(dir=Path(path).parents[1])
        try:
            os.link(path, Path(folder, Path(path).name))
        except FileNotFoundError:
            self.delete_claimed(folder)
            return None
        timer = threading.Timer(self.claims_come_within, self._delete_upload, [Path(path)])
        timer.daemon = True
        timer.start()
        return folder

    def _delete_upload(self, path: Path) -> None:
        """Not if another visitor has just uploaded it again, who starts a timer of his own."""
        try:
            if time.time() - path.stat().st_mtime >= self.claims_come_within:
                shutil.rmtree(path.parent)
        except FileNotFoundError:
            pass

    def open_claimed(self, folder: str | None, **read_options) -> OpenScan:
        """Reads a claimed file, and deletes it whether it can be read or not."""
        if folder is None:
            raise HSENetInputError("The file is no longer on the server. Please upload it again.")
        try:
            [file] = Path(folder).iterdir()
            return self._open(file, **read_options)
        finally:
            self.delete_claimed(folder)

    @staticmethod
    def delete_claimed(folder: str | None) -> None:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)  # it may have been read already

    def report(self, scan: OpenScan) -> Iterator[str]:
        return scan.encoded.stream(REPORT_REQUEST, **self.generate_kwargs)

    def answer(self, scan: OpenScan, question: str) -> Iterator[str]:
        return scan.encoded.stream(question, **self.generate_kwargs)

    def nearest(self, scan: OpenScan, k: int = 5) -> Any:
        """[`~hsenet.index_results.SearchResult`]: the scans of the index most like this one, one a study."""
        return self.index.search(volume=scan.volume, k=k, one_per_study=True)

    def _open(self, source: Any, truth: str = "", **read_options) -> OpenScan:
        volume, said = read_with_warnings(source, **read_options)
        encoded = EncodedScan(self.model, self.processor, volume, said)
        overlay = None
        if encoded.patch_scores is not None:
            overlay = Overlay(*self.processor.image_processor.patches_on_scan(volume, encoded.patch_scores))
        return OpenScan(volume, encoded, overlay, truth)


def sample_files(folder: Path) -> list[Sample]:
    """Scans of a folder, named as their files are: the host's choice, so no patient's."""
    if not folder.is_dir():
        raise FileNotFoundError("The folder of samples is not there: expected one with NIfTI, NRRD or zip files.")
    files = [path for path in sorted(folder.iterdir()) if path.name.endswith(SCAN_SUFFIXES)]
    return [Sample(path.name.split(".")[0], lambda path=path: path) for path in files[:MAX_SAMPLES]]


def phantoms() -> list[Sample]:
    """Synthetic scans with their true reports."""
    samples = []
    for index in range(NUM_PHANTOMS):
        study = sample_study(PHANTOM_SEED, index, "test")

        def draw(study=study) -> bytes:
            image = render_study(study, spacing=PHANTOM_SPACING)
            return nifti_bytes(image.array, image.affine)

        truth = f"Findings: {study.findings_text} Impression: {study.impression_text}"
        samples.append(Sample(f"Phantom {index + 1}", draw, truth))
    return samples
