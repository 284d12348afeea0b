"""Looks for patients, scans and reports that splits of a dataset have in common.

    python datasets_scripts/scan_leakage.py data/ct_rate
    python datasets_scripts/scan_leakage.py data/phantom --hash-scans --output leakage.json

For every dataset with the rows of the phantoms' or the build scripts' card. Prints a table and ends with 1 if two
splits share a patient or a scan. Scans are compared by the rows' `content_hash`; `--hash-scans` reads all scans of a
dataset without it.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datasets import get_dataset_split_names
from tqdm import tqdm

from hsenet.corpora.leakage import find_leaks, leakage_table, write_leaks
from hsenet.data import load_rows
from hsenet.digests import content_hash
from hsenet.scans import read_scan


def rows_of(dataset: str, *, hash_scans: bool) -> Iterator[dict[str, Any]]:
    for split in get_dataset_split_names(dataset, "reports"):
        for row in tqdm(load_rows(dataset, "reports", split), split, disable=not hash_scans):
            if hash_scans and not row.get("content_hash"):
                row["content_hash"] = content_hash(read_scan(row))
            yield {**row, "split": split}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", help="folder or Hub id")
    parser.add_argument("--hash-scans", action="store_true", help="read the scans whose rows have no hash")
    parser.add_argument("--output", type=Path, help="file for the names of what is shared")
    arguments = parser.parse_args()
    rows = list(rows_of(arguments.dataset, hash_scans=arguments.hash_scans))
    leaks = find_leaks(rows)
    print(leakage_table(leaks, scans_hashed=all(row.get("content_hash") for row in rows)))
    if arguments.output:
        write_leaks(arguments.output, leaks)
    sys.exit(any(leak.kind != "report" and len(leak.splits) > 1 for leak in leaks))


if __name__ == "__main__":
    main()
