# Copyright 2026 The HSENet package authors. Licensed under the Apache License, Version 2.0.
"""What the page does when somebody acts: from what the components hold to what they show."""

import html
import logging
from collections.abc import Iterator
from typing import Any

import gradio as gr
from assistant import Assistant, OpenScan, Wish
from viewer import PLANES, figure, render


EMPTY = '<figure class="slice empty"><span>{}</span></figure>'
MAX_SCAN_BYTES = 2**30
log = logging.getLogger("hsenet.demo")


def draw_slice(
    windows: dict[str, tuple[float, float]],
    plane: str,
    number: int,
    scan: OpenScan | None,
    window: str,
    overlay: bool,
    opacity: float,
) -> str:
    if scan is None:
        return EMPTY.format(plane.capitalize())
    count = scan.volume.array.shape[PLANES[plane].axis]
    index = min(max(int(number), 1), count) - 1
    scores = scan.overlay if overlay else None
    picture = render(scan.volume, plane, index, windows[window], scores, opacity)
    return figure(picture, scan.volume, plane, index, window)


def open_scan(assistant: Assistant, wish: Wish, **read_options) -> tuple[OpenScan | None, str]:
    """What is wished for, or `None`, and what is said of it; whatever happens, no scan is taken for another."""
    try:
        scan = assistant.fulfil(wish, **read_options)
    except ValueError as error:  # the reader's words
        return None, _alert("This scan is refused.", str(error))
    except Exception as error:
        log.error("a scan could not be opened: %s", type(error).__name__)  # its words may hold a name
        return None, _alert("This scan could not be opened.", "")
    return scan, _notes(scan)


def whole_page(
    windows: dict[str, tuple[float, float]],
    scan: OpenScan | None,
    said: str,
    window: str,
    overlay: bool,
    opacity: float,
) -> list[Any]:
    """All that the page shows of a scan, anew; without one, nothing is left to look at or to press."""
    ready = gr.update(interactive=scan is not None)
    has_scores = scan is not None and scan.overlay is not None
    sliders, figures = [], []
    for plane, (axis, *_) in PLANES.items():
        count = scan.volume.array.shape[axis] if scan else 2
        middle = (count + 1) // 2
        sliders.append(gr.update(maximum=count, value=middle, interactive=scan is not None))
        figures.append(draw_slice(windows, plane, middle, scan, window, overlay and has_scores, opacity))
    truth = scan.truth if scan else ""
    texts = ["", gr.update(value=truth, visible=bool(truth)), [], ""]
    # The overlay's choice outlives the moment without a scan.
    controls = [gr.update(interactive=has_scores), ready, ready, ready]
    return [scan, said, *controls, *texts, *sliders, *figures]


def write_report(assistant: Assistant, scan: OpenScan | None) -> Iterator[str]:
    text = ""
    for piece in assistant.report(_remembered(scan)):
        text += piece
        yield text


def ask(assistant: Assistant, scan: OpenScan | None, question: str | None) -> Iterator[tuple[str, list]]:
    """The chat is the scan's, not the browser's: it cannot come under another scan."""
    chat = _remembered(scan).chat
    if not (question and question.strip()):
        yield "", chat
        return
    answer = {"role": "assistant", "content": ""}
    chat += [{"role": "user", "content": html.escape(question)}, answer]
    text = ""
    try:
        for piece in assistant.answer(scan, question):
            text += piece
            answer["content"] = html.escape(text)
            yield "", chat
    except ValueError as error:  # what is wrong with the question
        answer["content"] = html.escape(f"Not asked. {error}")
        yield "", chat


def _remembered(scan: OpenScan | None) -> OpenScan:
    if scan is None:
        raise gr.Error("This scan is no longer in the server's memory. Please open it again.", print_exception=False)
    return scan


def find_nearest(assistant: Assistant, scan: OpenScan | None) -> str:
    result = assistant.nearest(_remembered(scan))
    rows = []
    for hit in result.hits:
        about = ", ".join(str(part) for part in (hit.sex, hit.age and f"{hit.age} years") if part)
        labels = ", ".join(hit.labels or ())
        rows.append(
            f"<li><b>{hit.rank}</b> <span>cosine {hit.score:+.3f}</span> <span>{html.escape(about)}</span> "
            f"<span>{html.escape(labels)}</span><p>{html.escape(hit.report or 'No report.')}</p></li>"
        )
    note = (
        ""
        if result.is_guarded
        else "<p>The index does not know whose scan this is: another of the same patient may be among these.</p>"
    )
    return f'<section class="nearest"><h2>Similar scans</h2><ol>{"".join(rows)}</ol>{note}</section>'


def read_options(series: str | None, resample: bool) -> dict[str, Any]:
    options: dict[str, Any] = {"max_bytes": MAX_SCAN_BYTES, **({"resample": True} if resample else {})}
    if series and series.strip():  # an untouched field may hold nothing at all
        options["series"] = int(series) if series.strip().isdigit() else series.strip()
    return options


def _notes(scan: OpenScan) -> str:
    geometry = scan.encoded.geometry
    size = " × ".join(map(str, geometry["shape"]))
    spacing = " × ".join(f"{millimetres:.2f}" for millimetres in geometry["spacing"])
    lowest, highest = geometry["hu_range"]
    facts = f"{size} voxels · {spacing} mm · {lowest:.0f} to {highest:.0f} HU"
    warnings = "".join(f"<li>{html.escape(said)}</li>" for said in scan.encoded.warnings)
    return f'<div class="facts" role="status"><p>{facts}</p>{f"<ul>{warnings}</ul>" if warnings else ""}</div>'


def _alert(what: str, why: str) -> str:
    return f'<div class="refused" role="alert"><b>{html.escape(what)}</b> {html.escape(why)}</div>'
