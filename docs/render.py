"""The docstrings of the package as pages, with pdoc.

    python docs/render.py build/docs        # or `make docs`; open build/docs/index.html

Needs `pip install -e ".[dev]"`. A warning of pdoc, about an annotation that it cannot read for instance, is an error.
"""

import pkgutil
import re
import sys
import warnings
from pathlib import Path

import jinja2
import pdoc.render
from pdoc.render_helpers import to_markdown_with_context

import hsenet


ROOT = Path(__file__).parent.parent


@jinja2.pass_context
def to_markdown(context: jinja2.runtime.Context, docstring: str) -> str:
    """As pdoc's own, and it takes transformers' way of naming an object, [`~module.Name`], for a name to link."""
    return to_markdown_with_context(context, re.sub(r"\[`~?([\w.]+)`\]", r"`\1`", docstring))


def main(output: Path) -> None:
    names = sorted(path.stem for path in ROOT.glob("*hsenet*.py"))
    names += ["hsenet", *(module.name for module in pkgutil.iter_modules(hsenet.__path__, "hsenet."))]
    names = [name for name in names if not name.startswith("hsenet.vllm_")]  # vLLM has an environment of its own
    pdoc.render.configure(docformat="google", search=True)
    pdoc.render.env.filters["to_markdown"] = to_markdown
    with warnings.catch_warnings():
        warnings.filterwarnings("error", module="pdoc")
        pdoc.pdoc(*names, output_directory=output)
    print(f"{len(names)} modules in {output}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
