"""The pages: links lead somewhere, Python compiles, and the programs know the options of the commands."""

import argparse
import ast
import importlib
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch.cuda
from accelerate.commands.launch import launch_command_parser
from transformers import dynamic_module_utils
from transformers.models.auto import configuration_auto

from hsenet_command import COMMANDS


ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "benchmarks/README.md", *sorted((ROOT / "docs").glob("*.md"))]
PROGRAMS = ("accelerate", "hsenet", "make", "pip", "python")
SOURCES = [
    *(ROOT / name for name in ("hsenet_command.py", "hsenet_doctor.py")),
    *ROOT.glob("*_hsenet.py"),
    *(path for folder in ("hsenet", "train", "datasets_scripts") for path in (ROOT / folder).rglob("*.py")),
]
# Where messages of libraries that are quoted too come from.
LIBRARIES = {"torch": [torch.cuda], "transformers": [dynamic_module_utils, configuration_auto]}
FILLED_IN = "\0"
# What stands in the pages for something else.
PLACEHOLDERS = {" COMMAND": " report", " KIND": " vlm", "[EXTRA]": "[dev]", " --config ...": "", " ...": ""}
VARIABLES = dict.fromkeys(("RANK_OF_THIS_NODE", "SLURM_NNODES", "SLURM_GPUS_ON_NODE", "SLURM_NODEID"), "2")
VARIABLES |= dict.fromkeys(("ADDRESS_OF_NODE_0", "MASTER_ADDR"), "localhost")
# With nothing to run, the shell hands over every command's words, as it has understood them.
WORD, COMMAND = "\x1f", "\x1e"
PRINT_COMMANDS = r"""
command_not_found_handle() { local words; printf -v words '%s\x1f' "$@"; printf '%s\x1e' "$words" >&3; }
"""


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def prose(page: Path) -> str:
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def spans(page: Path) -> list[str]:
    """What stands between backticks outside of code blocks, on one line each."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose(page))]


def headings(page: Path) -> list[str]:
    return re.findall(r"^#+ (.*)$", prose(page), flags=re.MULTILINE)


def anchor(heading: str) -> str:
    """As GitHub and the Hub make it."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        path, _, fragment = link.partition("#")
        if "://" in link:
            continue
        target = page.parent / path if path else page
        if not target.exists() or (fragment and fragment not in map(anchor, headings(target))):
            broken.append(link)
    assert not broken


def test_every_page_is_linked_from_the_readme():
    linked = re.findall(r"\]\(docs/([\w-]+\.md)[^)]*\)", (ROOT / "README.md").read_text())
    assert {page.name for page in (ROOT / "docs").glob("*.md")} == set(linked)


def test_every_command_is_in_the_table_of_commands():
    rows = re.findall(r"^\| (`.*?) \|", (ROOT / "docs/command_line.md").read_text(), flags=re.MULTILINE)
    assert set(COMMANDS) <= {name for row in rows for name in re.findall(r"`(\w+)`", row)}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_named_files_exist(page):
    folders = "benchmarks|datasets_scripts|demo|docs|examples|hsenet|tests|train"
    named = [span for span in spans(page) if re.fullmatch(rf"(?:{folders})/[\w./-]*|\w+_hsenet\.py", span)]
    assert not [path for path in named if not (ROOT / path).exists()]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_python_compiles_and_its_imports_exist(page):
    for block in blocks(page, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] in ("hsenet", "transformers"):
                module = importlib.import_module(node.module)
                assert not [alias.name for alias in node.names if not hasattr(module, alias.name)]


def commands_of(script: str, folder: Path) -> list[list[str]]:
    """The words of each command, after the shell has joined lines, set variables and gone through loops."""
    shell = [shutil.which("bash"), "--norc", "-c", f"exec 3>&1 >/dev/null; {PRINT_COMMANDS}\n{script}"]
    environment = {"PATH": "/nowhere", **VARIABLES}
    run = subprocess.run(shell, capture_output=True, text=True, env=environment, cwd=folder, timeout=20)
    commands = []
    for command in run.stdout.split(COMMAND)[:-1]:
        words = command.split(WORD)[:-1]
        commands += commands_of(words[-1], folder) if words[:3] == ["srun", "bash", "-c"] else [words]
    return [words for words in commands if words[0] in PROGRAMS]


class Understood(Exception):
    """The program has read its options: the rest of it is not run."""


@pytest.fixture
def refusal(monkeypatch, capsys):
    """What a program says against its options, by its own parser; None if it understands them."""
    parse, depth = argparse.ArgumentParser.parse_known_args, 0

    def parse_and_end(self, args=None, namespace=None):
        nonlocal depth
        depth += 1  # subcommands have parsers of their own
        try:
            parsed, unknown = parse(self, args, namespace)
        finally:
            depth -= 1
        if depth:
            return parsed, unknown
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        raise Understood

    def ask(module: str | None, path: Path | None, arguments: list[str]) -> str | None:
        monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", parse_and_end)
        monkeypatch.setattr(sys, "argv", [str(path or module), *arguments])
        try:
            if path is None:
                importlib.import_module(module).main(arguments)
            else:
                monkeypatch.syspath_prepend(str(path.parent))
                runpy.run_path(str(path), run_name="__main__")
        except Understood:
            return None
        except SystemExit as ending:
            return capsys.readouterr().err if ending.code else None  # 0: --help
        except (OSError, ValueError) as error:
            return str(error)
        finally:
            monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", parse)
        raise AssertionError(f"{path or module} did not read its options")

    monkeypatch.chdir(ROOT)
    return ask


def asked(words: list[str]) -> tuple[str | None, Path | None, list[str]]:
    """Module or file of the program, and its options; Accelerate's own are read here."""
    if words[:2] == ["accelerate", "launch"]:
        launch = launch_command_parser().parse_args(words[2:])
        words = [*(["python", "-m"] if launch.module else ["python"]), launch.training_script]
        words += launch.training_script_args
    if words[0] == "hsenet":
        return "hsenet_command", None, words[1:]
    if words[1] == "-m":
        return words[2], None, words[3:]
    return None, ROOT / words[1], words[2:]


def check(words: list[str], refusal) -> str | None:
    """What is wrong with a command; None if nothing is, or if the program is not of this repository."""
    if words[0] == "pip":
        extras = {extra for word in words for part in re.findall(r"\.\[(.*?)\]", word) for extra in part.split(",")}
        return f"no such extra: {extras - declared_extras()}" if extras - declared_extras() else None
    if words[0] == "make":
        known = re.findall(r"^([\w-]+)(?::| \?=)", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
        return None if {word.partition("=")[0] for word in words[1:]} <= {*known} else "no such target or variable"
    if words[0] == "python" and not words[1].endswith(".py") and words[1:3] != ["-m", "hsenet_command"]:
        return None
    return refusal(*asked(words))


def declared_extras() -> set[str]:
    section = (ROOT / "pyproject.toml").read_text().split("[project.optional-dependencies]\n")[1].split("\n[")[0]
    return set(re.findall(r"^([\w-]+) = \[", section, flags=re.MULTILINE))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_are_understood(page, refusal, tmp_path):
    # In prose, and with "...", a command may stand for itself with what else it needs.
    begin = rf"(?:\w+=\S+ )?(?:accelerate launch .*(?:\.py|-m )|(?:{'|'.join(PROGRAMS[1:])}) \S)"
    scripts = [(script, " ..." in script) for script in blocks(page, "bash")]
    scripts += [(span, True) for span in spans(page) if re.match(begin, span)]
    for script, is_part in scripts:
        for words in commands_of(filled(script), tmp_path):
            problem = check(words, refusal)
            assert not problem or (is_part and "are required" in problem), f"{' '.join(words)}\n{problem}"


@pytest.mark.parametrize(
    ("command", "problem"),
    [
        ("hsenet report DIR scan.nii.gz --adaptor DIR", "--adaptor"),
        ("hsenet convert vlm2 DIR OUTPUT", "vlm2"),
        ("hsenet evaluate --stage3 DIR", "--stage3"),
        ("for stage in stage1; do accelerate launch train/$stage.py \\\n  --lora_r 8; done", "--lora_r"),
        ("srun bash -c 'accelerate launch train/stage3.py --quantization 2bit'", "2bit"),
        ("python train/stage1.py --config train/configs/nowhere.yaml", "nowhere"),
        ("python datasets_scripts/build_ct_rate.py --corpus DIR --output DIR", "--release"),
        ("python train/stage9.py", "stage9"),
        ('pip install -e ".[trian]"', "trian"),
        ("make everything", "no such target"),
    ],
)
def test_what_a_program_does_not_know_is_found(command, problem, refusal, tmp_path):
    (words,) = commands_of(command, tmp_path)
    assert problem in check(words, refusal)


def filled(script: str) -> str:
    for placeholder, meaning in PLACEHOLDERS.items():
        script = script.replace(placeholder, meaning)
    return script


def texts_of(path: Path) -> list[str]:
    """A file's strings but docstrings, joined as Python joins them, with a mark where a value is filled in."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    docstrings = [node.value for node in nodes if isinstance(node, ast.Expr)]
    texts = []
    for node in nodes:
        if isinstance(node, ast.JoinedStr):
            parts = [part.value if isinstance(part, ast.Constant) else FILLED_IN for part in node.values]
            texts.append("".join(parts))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in docstrings:
            texts.append(node.value)
    return texts


def says(texts: list[str], quotation: str) -> bool:
    """Whether one text has the quotation's words in their order, and fills something in where it has "..."."""
    words = [re.escape(part) for part in quotation.split("...")]
    pattern = re.compile(f"{FILLED_IN}.*?".join(words), flags=re.DOTALL)
    return any(pattern.search(text) for text in texts)


def test_quoted_messages_are_those_of_the_source():
    own = [text for path in SOURCES for text in texts_of(path)]
    unknown, count = [], 0
    for heading in headings(ROOT / "docs/troubleshooting.md"):
        library = re.match(r'(\w+): "', heading)
        texts = own
        if library:
            texts = [Path(module.__file__).read_text() for module in LIBRARIES[library[1]]]
        for quotation in re.findall(r'"([^"]+)"', heading):
            count += 1
            unknown += [] if says(texts, quotation) else [quotation]
    assert count > 50 and not unknown


def test_what_no_message_says_is_found():
    texts = [f"The file is {FILLED_IN} bytes and would unzip to {FILLED_IN}."]
    assert says(texts, "The file is ... bytes and would")
    assert not says(texts, "The file is not bytes and would") and not says(texts, "would unzip to ... bytes")


@pytest.mark.slow
def test_docstrings_render(tmp_path):
    """Warnings of pdoc are errors of the program."""
    pytest.importorskip("pdoc")
    command = [sys.executable, ROOT / "docs" / "render.py", tmp_path / "pages"]
    run = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert "HSENetForConditionalGeneration" in (tmp_path / "pages" / "modeling_hsenet.html").read_text()
