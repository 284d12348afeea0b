# Copyright 2026 The HSENet package authors. Licensed under the Apache License, Version 2.0.
"""What all conversions share: models filled by name, a complete folder or nothing, and a report of every tensor."""

import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel

from hsenet.cards import write_model_card
from hsenet.fingerprint import store_fingerprint
from hsenet.name_table import NameTable, Renaming, rename
from processing_hsenet import HSENetImageProcessor, HSENetProcessor


REPORT_FILE = "conversion.json"
# Traces of where a configuration came from, which are not for another model's.
ORIGIN = ("_name_or_path", "architectures", "auto_map", "transformers_version", "dtype", "torch_dtype")


@dataclass
class Report:
    """
    Args:
        kind (`str`): what was converted.
        parts (`list[dict]`): for each source, its label, what was mapped and what was dropped.
        notes (`list[str]`): what else the user has to know.
    """

    kind: str
    parts: list[dict] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, what: str, source: str, renaming: Renaming) -> None:
        part = {
            "what": what,
            "source": source,
            "source_tensors": sum(len(row["sources"]) for row in renaming.mapped) + len(renaming.dropped),
            "model_tensors": len(renaming.state),
            "model_parameters": sum(tensor.numel() for tensor in renaming.state.values()),
            "mapped": renaming.mapped,
            "dropped": renaming.dropped,
        }
        self.parts.append(part)

    def lines(self) -> list[str]:
        """In short, without the tensors that are only renamed."""
        lines = []
        for part in self.parts:
            lines.append(
                f"{part['what']} from {part['source']}: {part['source_tensors']} tensors, {len(part['dropped'])} of "
                f"them dropped, give {part['model_tensors']} with {part['model_parameters']:,} parameters"
            )
            computed = Counter(row["how"] for row in part["mapped"] if row["how"] != "renamed")
            lines += [f"  computed, {count}: {how}" for how, count in computed.items()]
            lines += [f"  dropped, {count}: {reason}" for reason, count in Counter(part["dropped"].values()).items()]
        return lines + [f"note: {note}" for note in self.notes]

    def write(self, folder: Path, fingerprint: str | None = None) -> None:
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        report = {"kind": self.kind, "fingerprint": fingerprint, "versions": versions, "notes": self.notes}
        (folder / REPORT_FILE).write_text(json.dumps({**report, "parts": self.parts}, indent=1) + "\n")


def on_meta(model_class: type, config: PreTrainedConfig) -> PreTrainedModel:
    with torch.device("meta"):
        return model_class(config)


def fill(
    model: PreTrainedModel,
    tensors: dict[str, torch.Tensor],
    table: NameTable,
    what: str,
    label: str,
    report: Report,
) -> PreTrainedModel:
    """Puts all tensors, renamed, into all places of a model on the meta device, without copies where possible."""
    renaming = rename(tensors, table, model.state_dict(), f"{what} ({label})")
    report.add(what, label, renaming)
    model.load_state_dict(renaming.state, assign=True)
    return model.eval()


def plain_config(config: dict) -> dict:
    """A configuration as a part of another's."""
    return {name: value for name, value in config.items() if name not in ORIGIN}


def write_model(
    model: PreTrainedModel, processor: HSENetProcessor | HSENetImageProcessor | None, folder: Path, report: Report
) -> Report:
    """Saves model, processor, report and card, and the fingerprint of what loads from there."""
    model.save_pretrained(folder)
    if processor is not None:
        processor.save_pretrained(folder)
    report.write(folder, fingerprint=store_fingerprint(folder)["hash"])
    write_model_card(folder)
    return report


@contextmanager
def finished_folder(output: str | Path) -> Iterator[Path]:
    """A folder to write into, which takes its place and name at the end; after an error it is gone.

    Raises:
        `FileExistsError`: if there is something at `output` already.
    """
    output = Path(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise FileExistsError(f"{output} exists already: remove it, or choose another output folder.")
    output.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    try:
        yield folder
        _make_readable(folder)
        os.replace(folder, output)
    except BaseException:
        shutil.rmtree(folder)
        raise


def _make_readable(folder: Path) -> None:
    """Temporary folders and safetensors files are made for their owner alone."""
    umask = os.umask(0)
    os.umask(umask)
    for path in (folder, *folder.rglob("*")):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)
