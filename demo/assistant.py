# Copyright 2026 The HSENet package authors. Licensed under the Apache License, Version 2.0.
"""What the page asks: a model, samples, and perhaps an index; and the scan that one visitor has opened."""

import os
import shutil
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from viewer import Overlay

from hsenet import HSENetInputError, Volume
from hsenet.encoded_scan import EncodedScan, load_generation_model, read_with_warnings
from hsenet.phantom import nifti_bytes, render_study, sample_study
from hsenet.report_prompts import REPORT_PROMPTS


REPORT_REQUEST = REPORT_PROMPTS[0]
SCAN_SUFFIXES = (".nii", ".nii.gz", ".nrrd", ".zip")
NUM_PHANTOMS, PHANTOM_SEED, PHANTOM_SPACING = 3, 2025, (2.0, 2.0, 4.0)  # mm along x, y, z
MAX_SAMPLES = 12


@dataclass(frozen=True)
class Sample:
    """A scan that anybody may open: a file of the host's choice, or a phantom that is drawn when it is asked for."""

    name: str
    source: Callable[[], Any]
    truth: str = ""  # what is known to be in it


@dataclass(eq=False)
class OpenScan:
    """One visitor's scan, and what was asked about it; in memory only."""

    volume: Volume
    encoded: EncodedScan
    overlay: Overlay | None
    truth: str = ""
    chat: list[dict[str, str]] = field(default_factory=list)


@dataclass(eq=False)
class Wish:
    """
    What a visitor wants to see: a sample, or the folder of an upload; without either the upload is gone.

    Made at once, and fulfilled when the model is free, unless there is a newer one.
    """

    sample: str | None = None
    folder: str | None = None
    is_over: bool = False

    def give_up(self) -> None:
        self.is_over = True
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)  # it may have been read already


class Assistant:
    """
    Args:
        model, processor: see [`~hsenet.encoded_scan.load_generation_model`].
        index ([`~hsenet.index.SearchIndex`], *optional*): where scans like the visitor's are looked for.
        samples (`list[Sample]`): scans to try.
        max_bytes (`int`): of all open scans together, without which one large file after the other fills the memory.
        generate_kwargs: of `generate`, such as `max_new_tokens`.
    """

    claims_come_within = 5.0  # seconds after an upload

    def __init__(self, model, processor, index=None, samples=(), max_bytes: int = 8 * 2**30, **generate_kwargs):
        self.model, self.processor, self.index = model, processor, index
        self.samples = {sample.name: sample for sample in samples}
        if len(self.samples) < len(samples):
            raise ValueError("Two samples have the same name: rename one.")
        self.max_bytes, self.generate_kwargs = max_bytes, generate_kwargs
        self._open_scans: weakref.WeakSet[OpenScan] = weakref.WeakSet()

    @classmethod
    def load(
        cls,
        model: str,
        revision: str | None = None,
        index: str | None = None,
        index_model: str | None = None,
        samples: str | None = None,
        **settings,
    ) -> "Assistant":
        """
        Args:
            model, index_model: folders or Hub ids of the model that writes and of the one that made the index.
            samples (`str`, *optional*): folder of scans; phantoms are always there.
            settings: `max_bytes`, and those of `generate`.
        """
        searched = None
        if index is not None:
            from hsenet.index import SearchIndex  # needs datasets, which the rest does not

            searched = SearchIndex.load(index, index_model)
        chosen = [*(sample_files(Path(samples)) if samples else ()), *phantoms()]
        return cls(*load_generation_model(model, revision=revision), searched, chosen, **settings)

    def fulfil(self, wish: Wish, **read_options) -> OpenScan:
        """Opens what is wished for; an uploaded file is deleted whether it can be read or not."""
        if wish.sample is not None:
            sample = self.samples[wish.sample]
            return self._open(sample.source(), sample.truth)
        if wish.folder is None:
            raise HSENetInputError("The file is no longer on the server. Please upload it again.")
        try:
            [file] = Path(wish.folder).iterdir()
            return self._open(file, **read_options)
        finally:
            shutil.rmtree(wish.folder, ignore_errors=True)

    def claim(self, path: str) -> Wish:
        """
        Gives an uploaded file to its visitor, in a folder of its own.

        Gradio keeps equal files of two visitors in one place, so a file is not read there, and deleted only when
        nobody can be about to claim it.
        """
        folder = tempfile.mkdtemp(dir=Path(path).parents[1])
        wish = Wish(folder=folder)
        try:
            os.link(path, Path(folder, Path(path).name))
        except FileNotFoundError:
            wish.give_up()
            return Wish()
        timer = threading.Timer(self.claims_come_within, self._delete_upload, [Path(path)])
        timer.daemon = True
        timer.start()
        return wish

    def _delete_upload(self, path: Path) -> None:
        """Not if another visitor has just uploaded it again, who starts a timer of his own."""
        try:
            if time.time() - path.stat().st_mtime >= self.claims_come_within:
                shutil.rmtree(path.parent)
        except FileNotFoundError:
            pass

    def report(self, scan: OpenScan) -> Iterator[str]:
        return scan.encoded.stream(REPORT_REQUEST, **self.generate_kwargs)

    def answer(self, scan: OpenScan, question: str) -> Iterator[str]:
        return scan.encoded.stream(question, **self.generate_kwargs)

    def nearest(self, scan: OpenScan, k: int = 5) -> Any:
        """[`~hsenet.index_results.SearchResult`]: the scans of the index most like this one, one a study."""
        return self.index.search(volume=scan.volume, k=k, one_per_study=True)

    def _open(self, source: Any, truth: str = "", **read_options) -> OpenScan:
        volume, said = read_with_warnings(source, **read_options)
        held = sum(scan.volume.array.nbytes for scan in self._open_scans)
        if held + volume.array.nbytes > self.max_bytes:
            raise HSENetInputError(
                "The server has no memory for another scan of this size now. Please come again later."
            )
        encoded = EncodedScan(self.model, self.processor, volume, said)
        overlay = None
        if encoded.patch_scores is not None:
            overlay = Overlay(*self.processor.image_processor.patches_on_scan(volume, encoded.patch_scores))
        scan = OpenScan(volume, encoded, overlay, truth)
        self._open_scans.add(scan)
        return scan


def sample_files(folder: Path) -> list[Sample]:
    """Scans of a folder, named as their files are: the host's choice, so no patient's."""
    if not folder.is_dir():
        raise FileNotFoundError("The folder of samples is not there: expected one with NIfTI, NRRD or zip files.")
    samples = []
    for path in sorted(folder.iterdir()):
        if suffix := next((suffix for suffix in SCAN_SUFFIXES if path.name.lower().endswith(suffix)), None):
            samples.append(Sample(path.name[: -len(suffix)], lambda path=path: path))
    if len(samples) > MAX_SAMPLES:
        raise ValueError(f"The folder of samples has {len(samples)} scans: expected {MAX_SAMPLES} or fewer.")
    return samples


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
