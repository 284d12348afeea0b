"""File to tensors: seconds and peak memory of the reader and image processor, beside the usual way and the unzipping.

    python benchmarks/reading.py [--rounds 5] [--folder outputs/benchmarks]

One scan of 512x512x300 int16 (a phantom, drawn once and kept in the folder) goes from a .nii.gz file to
`pixel_values` and `slice_pixel_values`:
- ours: `read_volume` and `HSENetImageProcessor`;
- usual: nibabel to float64, canonical axes, clip, scipy to 1.5/0.75/0.75 mm, min-max, crop to the body, scipy to the
  model's size, 32 slices of the resampled volume (the published scripts' steps; they also do them twice);
- isal, zlib: unzipping the file to its end and nothing else, with the reader's fast library and the standard one.
Every run is a process of its own with one thread, in turns; the imports are not counted. Needs scipy and isal.
"""

import argparse
import importlib
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing import Process
from pathlib import Path

import numpy as np


SHAPE = (512, 512, 300)  # x, y, z
IMAGE_SIZE, SLICE_SIZE, NUM_SLICES = (32, 256, 256), 224, 32
MIN_AGREEMENT = 0.95  # correlation of the two sides' pixel_values: their resampling differs, the scan does not


def draw_phantom(path: Path) -> None:
    from hsenet.phantom import nifti_bytes, render_study, sample_study

    image = render_study(sample_study(seed=0, index=0), spacing=(360 / 512, 360 / 512, 1.0))
    z = int(np.argmax(np.abs(image.affine[2, :3])))
    array = np.moveaxis(image.array, z, 2)
    affine = image.affine[:, [*(axis for axis in range(3) if axis != z), z, 3]]
    array = np.concatenate([array, array[:, :, ::-1]], axis=2)[:, :, : SHAPE[2]]  # a short chest goes on upside down
    if array.shape != SHAPE:
        raise ValueError(f"expected a phantom of {SHAPE}, got {array.shape}")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(nifti_bytes(np.asfortranarray(array), affine))


def ours(path: Path) -> Callable[[], np.ndarray]:
    for name in ("nibabel", "isal.igzip"):  # the reader imports them when it needs them
        importlib.import_module(name)
    from hsenet import HSENetImageProcessor, read_volume

    processor = HSENetImageProcessor(image_size=IMAGE_SIZE, num_slices=NUM_SLICES, slice_size=(SLICE_SIZE, SLICE_SIZE))
    return lambda: processor.process_volume(read_volume(path))["pixel_values"][0].numpy()


def usual(path: Path) -> Callable[[], np.ndarray]:
    import nibabel
    from scipy import ndimage

    def zoom(array: np.ndarray, factors: np.ndarray | tuple) -> np.ndarray:
        return ndimage.zoom(array, factors, order=1, mode="nearest")  # the default surrounds the scan with 0 HU

    def run() -> np.ndarray:
        image = nibabel.as_closest_canonical(nibabel.load(path))
        array = image.get_fdata().clip(-1000, 1000)
        spacing = image.header.get_zooms()
        array = zoom(array, np.divide(spacing, (0.75, 0.75, 1.5))).transpose(2, 1, 0)
        array = array[:, ::-1, ::-1]
        planes = array[np.linspace(0, len(array) - 1, NUM_SLICES).astype(int)]
        pictures = zoom(planes, (1, *np.divide(SLICE_SIZE, planes.shape[1:])))
        np.repeat(((pictures / 1000 + 1) / 2 - 0.45)[:, None] / 0.27, 3, axis=1).astype(np.float32)
        array = array.clip(-1000, 200)
        array = (array - array.min()) / (array.max() - array.min())
        box = [np.flatnonzero((array > 0.4).any(axis=axes))[[0, -1]] for axes in ((1, 2), (0, 2), (0, 1))]
        array = array[tuple(slice(first, last + 1) for first, last in box)]
        return zoom(array, np.divide(IMAGE_SIZE, array.shape)).astype(np.float32)

    return run


def isal(path: Path) -> Callable[[], None]:
    from isal import igzip

    return lambda: unzip(igzip.open(path, "rb"))


def zlib(path: Path) -> Callable[[], None]:
    import gzip

    return lambda: unzip(gzip.open(path, "rb"))


def unzip(file) -> None:
    content = memoryview(np.empty(2 * int(np.prod(SHAPE)) + 352, dtype=np.uint8))
    done = 0
    while count := file.readinto(content[done : done + 2**22]):
        done += count
    if done != len(content) or file.read(1):
        raise ValueError(f"expected {len(content)} bytes, got {done}")


SIDES = {"ours": ours, "usual": usual, "isal": isal, "zlib": zlib}


def measure(side: str, path: Path) -> None:
    """In a process of its own: prints seconds of CPU and wall time, and MB beyond what the imports took."""
    import torch

    torch.set_num_threads(1)
    run = SIDES[side](path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    wall, cpu = time.perf_counter(), time.process_time()
    result = run()
    numbers = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
    numbers["peak_mb"] = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    if result is not None:
        np.save(path.parent / f"{side}.npy", result)
    print(json.dumps(numbers))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, default=Path("outputs/benchmarks"), help="for the scan")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each side")
    parser.add_argument("--side", choices=SIDES, help="measure this once (what each process runs)")
    arguments = parser.parse_args()
    path = arguments.folder / "phantom_512x512x300.nii.gz"
    if arguments.side:
        return measure(arguments.side, path)
    if not path.exists():
        # In a process of its own: Linux lets children start from their parent's peak memory, which would hide theirs.
        drawing = Process(target=draw_phantom, args=(path,))
        drawing.start()
        drawing.join()
    runs: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    for number in range(arguments.rounds):
        for side in list(SIDES)[:: 1 if number % 2 == 0 else -1]:
            command = [sys.executable, __file__, "--folder", str(arguments.folder), "--side", side]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            runs[side].append(json.loads(output.splitlines()[-1]))
    report(runs, path)


def report(runs: dict[str, list[dict[str, float]]], path: Path) -> None:
    sides = [np.load(path.parent / f"{side}.npy").ravel() for side in ("ours", "usual")]
    agreement = float(np.corrcoef(*sides)[0, 1])
    if agreement < MIN_AGREEMENT:
        raise SystemExit(f"The two sides made different tensors: correlation {agreement:.3f}.")
    print(f"{path.stat().st_size / 2**20:.1f} MB zipped; {platform.processor() or platform.machine()}, one thread")
    print(f"Correlation of the two sides' pixel_values: {agreement:.3f}")
    print(f"{'side':8}{'CPU s':>10}{'wall s':>10}{'peak MB':>10}   (medians of {len(runs['ours'])} runs)")
    for side, numbers in runs.items():
        medians = [statistics.median(run[name] for run in numbers) for name in ("cpu", "wall", "peak_mb")]
        print(f"{side:8}{medians[0]:10.3f}{medians[1]:10.3f}{medians[2]:10.0f}")
    for above, below in (("usual", "ours"), ("ours", "isal"), ("ours", "zlib")):
        ratios = sorted(a["cpu"] / b["cpu"] for a, b in zip(runs[above], runs[below], strict=True))
        median = statistics.median(ratios)
        print(f"{above}/{below}: {median:.2f} (paired CPU time, {ratios[0]:.2f} to {ratios[-1]:.2f})")


if __name__ == "__main__":
    main()
