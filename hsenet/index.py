# Copyright 2026 The HSENet package authors. Licensed under the Apache License, Version 2.0.
"""A search index: the volumes and reports of a dataset as embeddings, searched by text, by volume or by both.

    index = SearchIndex.build("outputs/index", "data/phantom", "outputs/quickstart/stage2")
    index = SearchIndex.load("outputs/index", "outputs/quickstart/stage2")
    result = index.search(text="Large left pleural effusion.", where=Filter(sex="F", min_age=50))

On disk it is a `datasets` Dataset (`load_from_disk` reads it) with `index.json`, which says what made it: another
model, tokenizer or preprocessing is refused, because its embeddings would mean something else.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from datasets import load_from_disk

from hsenet.corpora.pseudonyms import pseudonyms, salt_path
from hsenet.digests import content_hash
from hsenet.embedding import Embedder
from hsenet.index_filters import RELATIONS, Columns, Filter, relations
from hsenet.index_results import Hit, SearchResult
from hsenet.index_store import ROW, TARGETS, check_identity, read_info, write_index
from hsenet.scans import read_scan


class SearchIndex:
    """
    An index on disk with the model that made it; see [`~SearchIndex.build`] and [`~SearchIndex.load`].

    Args:
        folder: the index.
        embedder ([`Embedder`]): the same model, tokenizer and preprocessing that it was made with.
        engine (`"exact"` or `"faiss"`):
            What ranks: NumPy, or a flat faiss index through `datasets`. Both compare the query with every row and
            find the same; faiss takes a second copy of the embeddings in memory, and more threads.

    Raises:
        ValueError: there is no index in the folder, of a later format, or made with something else.
        ImportError: faiss is not installed.
    """

    def __init__(self, folder: str | Path, embedder: Embedder, engine: Literal["exact", "faiss"] = "exact"):
        self.folder, self.embedder, self.engine = Path(folder), embedder, engine
        if engine not in ("exact", "faiss"):
            raise ValueError(f"engine should be 'exact' or 'faiss', got {engine!r}.")
        self.info = read_info(self.folder)
        check_identity(self.info["made_with"], embedder.identity())
        self.dataset = load_from_disk(str(folder))
        self.columns = Columns.of(self.dataset)
        self._embeddings: dict[str, np.ndarray] = {}
        if engine == "faiss":
            _import_faiss()  # now rather than at the first search

    @classmethod
    def build(
        cls,
        output: str | Path,
        source: str | Path,
        model: str | Path | Embedder,
        *,
        splits: Sequence[str] | None = None,
        report_fields: Sequence[str] = ("findings", "impression"),
        cache_dir: str | Path = "outputs/cache",
        batch_size: int = 8,
        num_workers: int = 0,
        keep_ids: bool = False,
    ) -> "SearchIndex":
        """
        Embeds all volumes and reports and writes the index; its folder appears whole or not at all.

        Scans are read once, into the cache that training uses: an interrupted build, run again, reads the rest. What
        is written holds no path, and pseudonyms in place of the ids of volumes, studies and patients, whose key is in
        `OUTPUT.salt`, beside the index. Reports, ages, sexes and labels are taken over as they are.

        Args:
            output: folder to write; must not exist.
            source: dataset folder, Hub id, or table of scans; see [`~hsenet.index_rows.load_source`].
            model: folder or Hub id of a contrastive model, or an [`Embedder`].
            splits: only these; None: all.
            report_fields: sections of the report, in this order.
            num_workers (`int`): processes that read scans.
            keep_ids (`bool`): the ids as they are: of public or synthetic data.

        Raises:
            FileExistsError: there is something at `output` already.
            ValueError: what `load_source` refuses.
            HSENetInputError: a scan that cannot be read; none is left out.
        """
        embedder = model if isinstance(model, Embedder) else Embedder.load(model)
        settings = {"cache_dir": cache_dir, "batch_size": batch_size, "num_workers": num_workers, "keep_ids": keep_ids}
        write_index(Path(output), str(source), embedder, splits, report_fields, **settings)
        return cls(output, embedder)

    @classmethod
    def load(
        cls, folder: str | Path, model: str | Path | Embedder, engine: Literal["exact", "faiss"] = "exact"
    ) -> "SearchIndex":
        """
        Args:
            model: folder or Hub id of the model that made the index, or an [`Embedder`]; it embeds the queries.
            engine: see [`SearchIndex`].

        Raises:
            ValueError: it is another model, or there is no index.
        """
        read_info(Path(folder))  # before a model is loaded in vain
        return cls(folder, model if isinstance(model, Embedder) else Embedder.load(model), engine)

    def search(
        self,
        text: str | None = None,
        volume: Any = None,
        *,
        target: Literal["volumes", "reports"] = "volumes",
        k: int = 10,
        text_weight: float = 0.5,
        where: Filter | None = None,
        study_id: str | None = None,
        patient_id: str | None = None,
        include_same_patient: bool = False,
        one_per_study: bool = False,
    ) -> SearchResult:
        """
        The `k` rows with the largest cosine, ties in the order of the index.

        With both text and volume the query is the weighted sum of their two embeddings, which ranks by the same
        weighted sum of the two cosines. Cosines between volumes are usually larger and spread otherwise than between
        text and volumes, so equal weights need not mean equal influence: choose `text_weight` on held-out data.

        Rows of the query's own patient are left out, as they would be a leak in any comparison: those with the very
        voxels of `volume`, their studies and patients, and those of `study_id` and `patient_id`.

        Args:
            text (`str`, *optional*).
            volume (*optional*): what `read_volume` takes, or a dataset row, with its study and patient.
            target: whether to find volumes or reports.
            text_weight (`float`): 0 to 1, with both text and volume; the volume's is the rest.
            where ([`Filter`], *optional*): what rows have to be.
            study_id, patient_id (`str`, *optional*): the query's, as in the dataset.
            include_same_patient (`bool`): do not leave them out; `Hit.relation` still tells them.
            one_per_study (`bool`): only the best reconstruction of each study, which share their report.

        Raises:
            ValueError: neither text nor volume, a value out of range, or a filter that no row could pass.
            HSENetInputError: the volume cannot be read.
        """
        _check_query(text, volume, target, k, text_weight)
        row = volume if isinstance(volume, dict) else {"volume": str(volume) if isinstance(volume, Path) else volume}
        scan = None if volume is None else read_scan(row)
        study_id, patient_id = study_id or row.get("study_id"), patient_id or row.get("patient_id")
        hashes = [] if scan is None else [content_hash(scan), *filter(None, [row.get("content_hash")])]
        relation = relations(self.columns, hashes, self._stored_id(study_id), self._stored_id(patient_id))
        passes = (where or Filter()).mask(self.columns)
        if target == "reports":
            passes &= self.columns.has_report
        own = passes & (relation != "") & (not include_same_patient)
        query, candidates = self._query(text, scan, text_weight), passes & ~own
        ranked = self._rank(query, TARGETS[target], candidates, len(candidates) if one_per_study else k)
        if one_per_study:
            best: dict[str, tuple[int, float]] = {}
            for number, score in ranked:
                best.setdefault(self.columns.study_id[number], (number, score))
            ranked = list(best.values())[:k]
        return SearchResult(
            hits=self._hits(ranked, relation, target),
            num_candidates=int(candidates.sum()),
            left_out={name: int((relation[own] == name).sum()) for name in RELATIONS if name in relation[own]},
            is_guarded=patient_id is not None or bool((relation != "").any()),
        )

    def _stored_id(self, name: str | None) -> str | None:
        if name is None or self.info["ids"] == "kept":
            return name
        if not salt_path(self.folder).exists():
            raise ValueError(
                "The index holds pseudonyms, and their key, the .salt file, is not beside it: a study or patient "
                "cannot be told by its id. Leave the id out, or get the key from who made the index."
            )
        return pseudonyms(self.folder)(name)

    def _query(self, text: str | None, scan: Any, text_weight: float) -> np.ndarray:
        """`(projection_dim,)` of length 1."""
        if scan is None:
            return self.embedder.texts([text])[0]
        if text is None:
            return self.embedder.volume(scan)
        fused = text_weight * self.embedder.texts([text])[0] + (1 - text_weight) * self.embedder.volume(scan)
        return fused / np.linalg.norm(fused)

    def _rank(self, query: np.ndarray, column: str, candidates: np.ndarray, k: int) -> list[tuple[int, float]]:
        """The best rows with their scores, the best first."""
        numbers = np.flatnonzero(candidates)
        k = min(k, len(numbers))
        if self.engine == "faiss":
            return self._rank_with_faiss(query, column, numbers, k) if k else []
        if column not in self._embeddings:
            self._embeddings[column] = self.dataset.with_format("numpy")[column][:]  # (num_rows, projection_dim)
        scores = self._embeddings[column][numbers] @ query
        order = np.argsort(-scores, kind="stable")[:k]
        return list(zip(numbers[order].tolist(), scores[order].tolist(), strict=True))

    def _rank_with_faiss(self, query: np.ndarray, column: str, numbers: np.ndarray, k: int) -> list[tuple[int, float]]:
        faiss = _import_faiss()
        if column not in self.dataset.list_indexes():
            self.dataset.add_faiss_index(column, metric_type=faiss.METRIC_INNER_PRODUCT)
        parameters = faiss.SearchParameters(sel=faiss.IDSelectorBatch(numbers))
        found = self.dataset.search(column, query, k, params=parameters)
        return list(zip(found.indices.tolist(), found.scores.tolist(), strict=True))

    def _hits(self, ranked: list[tuple[int, float]], relation: np.ndarray, target: str) -> list[Hit]:
        hits, first = [], {}
        for rank, (number, score) in enumerate(ranked, start=1):
            row = self.dataset[number]
            contents = row["content_hashes"] if target == "volumes" else [row["report"]]
            copy_of = min((first[content] for content in contents if content in first), default=None)
            for content in contents:
                first.setdefault(content, rank)
            values = {name: row[name] for name in ROW}
            hits.append(Hit(rank, score, **values, relation=str(relation[number]), copy_of=copy_of))
        return hits


def _check_query(text: str | None, volume: Any, target: str, k: int, text_weight: float) -> None:
    if text is None and volume is None:
        raise ValueError("Expected a text, a volume or both to search by, got neither.")
    if text is not None and not text.strip():
        raise ValueError("The text to search by is empty: expected a finding or a report.")
    if target not in TARGETS:
        raise ValueError(f"target should be {' or '.join(TARGETS)}, got {target!r}.")
    if k < 1 or not 0 <= text_weight <= 1:
        raise ValueError(f"Expected k of at least 1 and text_weight from 0 to 1, got {k} and {text_weight}.")


def _import_faiss() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise ImportError('engine="faiss" needs faiss: pip install "hsenet[search]", or use exact search.') from error
    return faiss
