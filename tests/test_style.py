"""The repository's form: ruff, short functions, and Hub files that need nothing but what a Hub user has."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parent.parent
HUB_FILES = sorted(ROOT.glob("*_hsenet.py"))
SHIPPED = [ROOT / "hsenet_command.py", ROOT / "hsenet_doctor.py"] + sorted(
    path
    for folder in ("hsenet", "train", "datasets_scripts", "examples", "benchmarks", "demo")
    for path in (ROOT / folder).rglob("*.py")
)
ALLOWED_IMPORTS = {"torch", "numpy", "transformers", "huggingface_hub"}
MAX_LINES = 80
MAX_MAIN_LINES = 100  # of a training program, which reads from top to bottom


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]])
def test_ruff(command):
    run = subprocess.run([sys.executable, "-m", "ruff", *command, "."], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


def test_functions_are_short():
    assert len(HUB_FILES) == 10 and len(SHIPPED) > 10
    too_long = []
    for path in (*HUB_FILES, *SHIPPED):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                limit = MAX_MAIN_LINES if node.name == "main" and path.parent.name == "train" else MAX_LINES
                lines = node.end_lineno - node.lineno + 1
                if lines > limit:
                    too_long.append(f"{path.relative_to(ROOT)}: {node.name} has {lines} lines, at most {limit}")
    assert not too_long, "\n".join(too_long)


def top_level_imports(path: Path) -> set[str]:
    """What `import`ing the file needs: imports outside of functions, without those of siblings."""
    names, nodes = set(), list(ast.parse(path.read_text()).body)
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module.split(".")[0])
        elif not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            nodes.extend(
                child for child in ast.iter_child_nodes(node) if isinstance(child, (ast.stmt, ast.excepthandler))
            )
    return names - sys.stdlib_module_names - {path.stem for path in HUB_FILES}


@pytest.mark.parametrize("path", HUB_FILES, ids=lambda path: path.name)
def test_hub_files_need_no_other_packages(path):
    imported = top_level_imports(path)
    assert imported <= ALLOWED_IMPORTS, f"{path.name} imports {sorted(imported - ALLOWED_IMPORTS)}"
    if path.name in ("reading_hsenet.py", "nifti_hsenet.py", "dicom_hsenet.py", "volume_hsenet.py"):
        assert imported == {"numpy"}
    if path.name in ("modeling_hsenet.py", "attention_hsenet.py", "projectors_hsenet.py"):
        assert imported == {"torch", "transformers"}


@pytest.mark.parametrize("path", HUB_FILES, ids=lambda path: path.name)
def test_hub_files_import_siblings_in_the_two_ways(path):
    """`from .sibling` for the Hub, `from sibling` for plain modules; the platform copies only the former."""
    ways = {0: set(), 1: set()}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.level or node.module.endswith("_hsenet")):
            assert node.module in {hub_file.stem for hub_file in HUB_FILES}
            ways[node.level].add((node.module, *sorted(alias.name for alias in node.names)))
    assert ways[0] == ways[1]
