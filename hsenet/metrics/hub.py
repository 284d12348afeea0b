"""The metrics as modules of the library `evaluate`: from the installed package, or as Spaces of the Hub.

    bleu = hsenet.metrics.load("report_overlap", "bleu-coco")         # offline: the files are in the package
    bleu.compute(predictions=[...], references=[...])
    push_module("report_overlap", "your-name/report_overlap", folder=...)

After the last line whoever may read the Space, and has the package, can `evaluate.load("your-name/report_overlap")`.
"""

import ast
import shutil
from pathlib import Path


MODULES_DIR = Path(__file__).parent / "modules"
MODULE_NAMES = tuple(sorted(path.parent.name for path in MODULES_DIR.glob("*/*.py")))
APP = """import evaluate
from evaluate.utils import launch_gradio_widget


launch_gradio_widget(evaluate.load("{name}"))
"""


def load(name: str, config_name: str | None = None, **options):
    """
    `evaluate.load` of one of this package's modules: `evaluate.EvaluationModule`. Needs nothing from the Hub.

    Args:
        name: `report_overlap`, `report_findings`, `ct_retrieval`, `ct_volume_retrieval` or `ct_vqa`.
        config_name: the protocol, see the module's description.

    Raises:
        ValueError: no such module.
    """
    import evaluate  # of the extra `eval`; the metrics themselves do without

    return evaluate.load(str(_module(name)), config_name, **options)


def write_space(name: str, folder: str | Path) -> list[Path]:
    """Writes the Space that `evaluate.load` takes a module from: script, card, requirements, a small app."""
    folder, script = Path(folder), _module(name)
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(script, folder / script.name)
    head = f"---\ntitle: {name}\nsdk: gradio\napp_file: app.py\ntags:\n- evaluate\n- metric\n---\n\n# {name}\n\n"
    usage = f"\n\nNeeds the package `hsenet` with its extra `eval`, which computes the scores: `{name}` is its skin.\n"
    (folder / "README.md").write_text(head + ast.get_docstring(ast.parse(script.read_text())) + usage)
    (folder / "requirements.txt").write_text("hsenet[eval]\n")
    (folder / "app.py").write_text(APP.format(name=name))
    return [folder / file for file in (script.name, "README.md", "requirements.txt", "app.py")]


def push_module(name: str, repo_id: str, *, folder: str | Path, private: bool = True) -> None:
    """
    Writes the Space's files to `folder` and uploads them. The script of a Space has the Space's own name.

    Args:
        private (`bool`):
            Of a Space that is made; one that exists keeps its visibility. Nothing goes to a public one unless
            `private=False`.

    Raises:
        ValueError: the Space's name is not the module's; a [`~hsenet.publication.PublishingError`] if the Hub refuses.
    """
    from hsenet.publication import Publication  # the metrics themselves do without the models
    from hsenet.publishing import publish

    if repo_id.rpartition("/")[2] != name:
        raise ValueError(f"evaluate takes the script's name from the Space's: expected OWNER/{name}, got {repo_id}.")
    files = {path.name: path for path in write_space(name, folder)}
    publish(Publication(files, [], ()), repo_id, repo_type="space", private=private, commit_message="Upload metric")


def _module(name: str) -> Path:
    if name not in MODULE_NAMES:
        raise ValueError(f"name must be one of {', '.join(MODULE_NAMES)}, got {name!r}.")
    return MODULES_DIR / name / f"{name}.py"
