# Copyright 2026 The HSENet package authors. Licensed under the Apache License, Version 2.0.
"""A page to look at scans: three planes, the model's patch scores, its report, questions, and scans like this one.

    pip install -e ".[demo]"
    python demo/app.py --model outputs/quickstart/stage3

As a Space it takes the same settings from variables: HSENET_MODEL, HSENET_REVISION, HSENET_INDEX, HSENET_INDEX_MODEL,
HSENET_SAMPLES. An upload is deleted within seconds of being read; what is kept of a scan is in memory, one visitor's
apart from another's, and forgotten when the page is closed or after half an hour.
"""

import argparse
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any


os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before gradio is imported: nothing is told to anybody

import gradio as gr
from assistant import Assistant
from page import FORGOTTEN_AFTER, build_page


MAX_SESSIONS = 200  # that the server remembers; how many scans, is a question of memory


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    settings = os.environ.get
    parser.add_argument("--model", default=settings("HSENET_MODEL"), help="folder or Hub id of a model that writes")
    parser.add_argument("--revision", default=settings("HSENET_REVISION"), help="of the model: a commit, best")
    parser.add_argument("--index", default=settings("HSENET_INDEX"), help="folder that `hsenet index` wrote")
    parser.add_argument("--index_model", default=settings("HSENET_INDEX_MODEL"), help="the model that made the index")
    parser.add_argument("--samples", default=settings("HSENET_SAMPLES"), help="folder of scans that anybody may open")
    parser.add_argument("--max_new_tokens", type=int, default=256)
    parser.add_argument("--memory_gb", type=float, default=8, help="for the scans that are open (default: 8)")
    parser.add_argument("--max_upload", default="1gb", help="largest file (default: 1gb)")
    parser.add_argument("--host", default="0.0.0.0" if "SPACE_ID" in os.environ else "127.0.0.1")
    parser.add_argument("--port", type=int, default=7860)
    arguments = parser.parse_args(argv)
    if arguments.model is None:
        parser.error(
            "expected --model (or the variable HSENET_MODEL): a trained model that writes, such as "
            "outputs/quickstart/stage3"
        )
    if (arguments.index is None) != (arguments.index_model is None):
        parser.error("--index and --index_model belong together")
    return arguments


def launch(page: gr.Blocks, **settings) -> Any:
    theme = gr.themes.Base(
        primary_hue=gr.themes.colors.teal,
        neutral_hue=gr.themes.colors.slate,
        font=["system-ui", "sans-serif"],  # of the visitor's system: nothing is fetched
        font_mono=["ui-monospace", "monospace"],
        radius_size=gr.themes.sizes.radius_md,
    )
    page.queue(max_size=64, default_concurrency_limit=4)
    return page.launch(
        theme=theme,
        css_paths=Path(__file__).parent / "style.css",
        footer_links=[],
        state_session_capacity=MAX_SESSIONS,
        ssr_mode=False,
        quiet=True,
        prevent_thread_lock=True,
        **settings,
    )


def sweep(uploads: Path, older_than: float) -> None:
    """Deletes what Gradio forgets: uploads whose connection broke, and those of visitors who have left."""
    for path in uploads.iterdir():
        try:
            if time.time() - path.stat().st_mtime > older_than:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        except FileNotFoundError:  # read and deleted meanwhile
            pass


def keep_clean(uploads: Path) -> None:
    while True:
        time.sleep(60)
        sweep(uploads, FORGOTTEN_AFTER)


def main() -> None:
    arguments = parse_arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())  # ends as Ctrl-C does, not at once
    with tempfile.TemporaryDirectory() as uploads:  # gone when the server ends
        os.environ["GRADIO_TEMP_DIR"] = uploads
        assistant = Assistant.load(
            arguments.model,
            arguments.revision,
            arguments.index,
            arguments.index_model,
            arguments.samples,
            max_bytes=int(arguments.memory_gb * 2**30),
            max_new_tokens=arguments.max_new_tokens,
        )
        threading.Thread(target=keep_clean, args=[Path(uploads)], daemon=True).start()
        page = build_page(assistant)
        _, address, _ = launch(
            page, server_name=arguments.host, server_port=arguments.port, max_file_size=arguments.max_upload
        )
        print(f"The page is at {address}", flush=True)
        page.block_thread()


if __name__ == "__main__":
    main()
