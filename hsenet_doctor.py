# Copyright 2026 The HSENet package authors. Licensed under the Apache License, Version 2.0.
"""`hsenet doctor`: what is installed, what it runs on, whether a model is whole, and whether all works together.

It lies outside of the package, which cannot be imported where PyTorch and torchvision do not fit, and that is one of
the things to find.
"""

import argparse
import json as json_format
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement


OK, NOTE, PROBLEM = "ok", "note", "problem"
MIN_FREE_GB = 2.0
GB = 2**30
# Extras that install others, or what only developers need.
_LEFT_OUT = ("dev", "coco", "docs")


@dataclass
class Check:
    """One thing that was looked at; a problem comes with its remedy, a note is no problem."""

    name: str
    state: Literal["ok", "note", "problem"]
    found: str
    remedy: str = ""


def add_doctor(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", nargs="?", help="folder (or Hub id) to look at and to run")
    parser.add_argument("--check", action="store_true", help="compare MODEL with its stored fingerprint, in float32")
    parser.add_argument("--hub", action="store_true", help="ask whether the Hugging Face Hub can be reached")
    parser.add_argument("--device", help="for the smoke test (default: the accelerator, if there is one)")
    parser.add_argument("--json", action="store_true", help="all checks as one JSON object")
    parser.set_defaults(run=run_doctor)


def run_doctor(model: str | None, *, check: bool, hub: bool, device: str | None, json: bool) -> int:
    """Exit code: 0 without a problem, 1 with one."""
    checks: list[Check] = []

    def take(some: Iterator[Check]) -> bool:
        """Shows each as soon as it is known; whether there was no problem."""
        fine = True
        for one in some:
            checks.append(one)
            fine = fine and one.state != PROBLEM
            if not json:
                print(_line(one), flush=True)
        return fine

    importable = take(environment())
    take(machine() if importable else iter(()))
    if hub:
        take(reach_hub())
    if importable:
        from hsenet.cli_scan import quiet_libraries

        quiet_libraries(json=True)  # what is found is shown as it is found
        is_whole = take(model_files(model)) if model else True
        if is_whole:
            take(one_by_one("smoke test", lambda: _smoke_test(model, device)))
        if is_whole and check and model:
            take(one_by_one("fingerprint", lambda: _compare_fingerprint(model)))
    else:
        take(iter([Check("model", NOTE, "not looked at: the package cannot be imported before that is mended")]))
    problems = sum(one.state == PROBLEM for one in checks)
    if json:
        print(json_format.dumps({"problems": problems, "checks": [asdict(one) for one in checks]}, indent=2))
    else:
        print("no problem found" if not problems else f"{problems} problem{'s' if problems > 1 else ''} found")
    return 1 if problems else 0


def _line(check: Check) -> str:
    state = check.state.upper() if check.state == PROBLEM else check.state
    remedy = f"\n{'':>10}-> {check.remedy}" if check.remedy else ""
    return f"{state:>8}  {check.name}: {check.found}{remedy}"


def one_by_one(name: str, work: Callable[[], str]) -> Iterator[Check]:
    """What `work` says, or its error as a problem."""
    try:
        yield Check(name, OK, work())
    except Exception as error:  # whatever it is, it is what the user wants to know
        words = " ".join(str(error).split())[:400]
        yield Check(name, PROBLEM, f"{type(error).__name__}: {words}", _remedy(name, error))


def _remedy(name: str, error: Exception) -> str:
    if isinstance(error, ImportError):
        return "install what is missing, see the extras above"
    if name == "fingerprint":
        return "download or convert the model again, or store a new fingerprint where you trust what it computes"
    return "if the checks above are fine, the model's files are the first to suspect: download or convert it again"


# What is installed


def environment() -> Iterator[Check]:
    yield Check("Python", OK, f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    for requirement in _requirements():
        yield _installed(requirement)
    yield _fit_of_torchvision()
    yield from one_by_one("package", _import_package)
    for extra in metadata("hsenet").get_all("Provides-Extra") or []:
        if extra not in _LEFT_OUT:
            missing = sorted({one.name for one in _requirements(extra) if _installed(one).state != OK})
            if missing:
                yield Check(f"extra {extra}", NOTE, f"missing {', '.join(missing)}", f'pip install "hsenet[{extra}]"')
            else:
                yield Check(f"extra {extra}", OK, "there")


def _requirements(extra: str = "") -> list[Requirement]:
    """Of the package itself, or of one of its extras with the extras that this brings along."""
    found = []
    for requirement in map(Requirement, requires("hsenet") or []):
        is_core = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if is_core == (not extra) and (is_core or requirement.marker.evaluate({"extra": extra})):
            inner = [one for other in requirement.extras for one in _requirements(other)]
            found += inner if requirement.name == "hsenet" else [requirement]
    return found


def _installed(requirement: Requirement) -> Check:
    try:
        found = version(requirement.name)
    except PackageNotFoundError:
        return Check(requirement.name, PROBLEM, "not installed", f'pip install "{_plain(requirement)}"')
    if not requirement.specifier.contains(found, prereleases=True):
        wanted = f"expected {requirement.specifier}"
        return Check(requirement.name, PROBLEM, f"{found}, {wanted}", f'pip install "{_plain(requirement)}"')
    return Check(requirement.name, OK, found)


def _plain(requirement: Requirement) -> str:
    return f"{requirement.name}{requirement.specifier}"


def _fit_of_torchvision() -> Check:
    """Nothing here needs torchvision, but transformers imports it where it is there, and then it has to work."""
    try:
        found = version("torchvision")
    except PackageNotFoundError:
        return Check("torchvision", OK, "not installed, and not needed")
    # In a process of its own: an import that fails half-way leaves PyTorch with half of the operators.
    tried = subprocess.run([sys.executable, "-c", "import torchvision"], capture_output=True, text=True, check=False)
    if tried.returncode == 0:
        return Check("torchvision", OK, f"{found}, fits PyTorch")
    last = (tried.stderr.strip().splitlines() or ["no message"])[-1][:200]
    return Check(
        "torchvision",
        PROBLEM,
        f"{found} does not fit PyTorch {version('torch')} ({last})",
        "pip uninstall torchvision (nothing here needs it), or install torch and torchvision together from one index",
    )


def _import_package() -> str:
    import hsenet  # noqa: F401  registers the model classes

    return f"hsenet {version('hsenet')} is imported"


# What it runs on


def machine() -> Iterator[Check]:
    import torch

    yield Check("processor", OK, f"{_cores()} cores, {torch.get_num_threads()} threads for PyTorch")
    yield _memory()
    yield _accelerator()
    yield _bfloat16()
    yield _disk()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _memory() -> Check:
    try:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / GB
    except (AttributeError, ValueError, OSError):
        return Check("memory", NOTE, "not known on this system")
    return Check("memory", OK, f"{total:.1f} GB")


def _accelerator() -> Check:
    import torch

    if not torch.accelerator.is_available():
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built for the CPU"
        return Check("accelerator", NOTE, f"none is used (PyTorch {torch.__version__}, {built})")
    kind = torch.accelerator.current_accelerator().type
    if kind != "cuda":
        return Check("accelerator", OK, kind)
    free, total = torch.cuda.mem_get_info()
    room = f"{free / GB:.1f} of {total / GB:.1f} GB free"
    return Check("accelerator", OK, f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}, {room}")


def _bfloat16() -> Check:
    import torch

    if torch.cuda.is_available():
        fine = torch.cuda.is_bf16_supported(including_emulation=False)
        return Check("bfloat16", OK if fine else NOTE, "supported" if fine else "emulated: float16 is faster here")
    cpu = Path("/proc/cpuinfo")
    flags = cpu.read_text() if cpu.exists() else ""
    if "avx512_bf16" in flags or "amx_bf16" in flags:
        return Check("bfloat16", OK, "instructions of the processor")
    return Check("bfloat16", NOTE, "no instructions for it found: it works, slower than float32")


def _disk() -> Check:
    from huggingface_hub.constants import HF_HOME

    folder = Path(HF_HOME)
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free / GB
    if free < MIN_FREE_GB:
        return Check(
            "disk",
            PROBLEM,
            f"{free:.1f} GB free for the Hub's cache, less than {MIN_FREE_GB:.0f} GB",
            "make room, or set HF_HOME to a folder on another disk",
        )
    return Check("disk", OK, f"{free:.1f} GB free for the Hub's cache")


def reach_hub() -> Iterator[Check]:
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        yield Check("Hub", PROBLEM, "HF_HUB_OFFLINE is set: only what is in the cache loads", "unset HF_HUB_OFFLINE")
        return
    try:
        answer = get_session().head(constants.ENDPOINT, timeout=10)
        yield Check("Hub", OK, f"reached (status {answer.status_code})")
    except Exception as error:  # as many kinds as there are ways to be offline
        remedy = "check network and proxy (HTTPS_PROXY), or work from the cache with HF_HUB_OFFLINE=1"
        yield Check("Hub", PROBLEM, f"not reached ({type(error).__name__})", remedy)


# The model


def model_files(source: str) -> Iterator[Check]:
    folder = Path(source)
    if not folder.is_dir():
        from hsenet.folder_or_hub import check_model_source

        try:
            check_model_source(source)
            yield Check("model files", NOTE, "a Hub id: its files are checked as they are downloaded")
        except ValueError as error:
            yield Check("model files", PROBLEM, str(error), "give the folder of a saved model, or its Hub id")
        return
    from hsenet.model_folder import model_problems  # needs accelerate, which this says by itself

    try:
        problems = model_problems(folder, same_code=False)
    except ImportError as error:
        yield Check("model files", NOTE, f"not looked at: {error}")
        return
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors")) / GB
    if not problems:
        yield Check("model files", OK, f"complete, {size:.2f} GB of weights")
    for problem in problems:
        yield Check("model files", PROBLEM, problem, "download or convert the model again")


def _smoke_test(source: str | None, device: str | None) -> str:
    from hsenet.cli_scan import chosen_device
    from hsenet.smoke_test import smoke_test

    where = chosen_device(device)
    return f"{smoke_test(source, where)} on {where.type}"


def _compare_fingerprint(source: str) -> str:
    from hsenet.fingerprint import check_fingerprint

    result = check_fingerprint(source)
    return f"{result['hash']}, largest difference {result['largest_difference']:.1e}"
