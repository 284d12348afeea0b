# Copyright 2026 The HSENet package authors. Licensed under the Apache License, Version 2.0.
"""The page: what is on it, and what happens when somebody acts."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import gradio as gr
from assistant import Assistant, Wish
from handlers import EMPTY, ask, draw_slice, find_nearest, open_scan, read_options, whole_page, write_report
from viewer import PLANES, WINDOWS

from hsenet.encoded_scan import MAX_QUESTION_CHARACTERS


FORGOTTEN_AFTER = 30 * 60  # seconds
OPENING = '<div class="facts" role="status"><p>Opening the scan.</p></div>'
HEADER = """
<header><h1>HSENet</h1><p>3D chest CT: report, questions, similar scans</p>
<p class="notice" role="note"><b>Research only. Not a medical device.</b> Texts are written by a model and are often
wrong. Do not use them for any decision about a patient, and upload only scans that you may share with this server.</p>
</header>"""
LIMITS = """
<section class="limits"><h2>Limits</h2><ul>
<li>Non-contrast and contrast chest CT of adults. Other regions are read, but the text about them means nothing.</li>
<li>A model trained on the package's phantoms knows no real disease. The model's card says what it was trained on.</li>
<li>Such models err most on small nodules, bones, and left and right. What is not mentioned is not excluded.</li>
<li>Colours show how much the 2E3 encoder weighs each patch against the others, not where a finding lies.</li>
<li>Uploads are deleted within seconds of being read; the scan stays in memory here for at most 30 minutes.</li>
</ul></section>"""
SCALE = '<p class="scale"><span>lowest</span><i aria-hidden="true"></i><span>highest weight in this scan</span></p>'
QUIET = {"queue": False, "show_progress": "hidden", "trigger_mode": "always_last", "api_visibility": "private"}
ON_THE_MODEL = {"concurrency_id": "model", "concurrency_limit": 1, "api_visibility": "private"}  # one at a time


@dataclass
class Opening:
    """How a scan comes in."""

    upload: gr.File
    samples: gr.Radio
    series: gr.Textbox
    resample: gr.Checkbox
    status: gr.HTML


@dataclass
class Viewer:
    """Three planes and how they are shown."""

    window: gr.Radio
    overlay: gr.Checkbox
    opacity: gr.Slider
    pictures: dict[str, gr.HTML]
    sliders: dict[str, gr.Slider]


@dataclass
class Texts:
    """What the model says."""

    write: gr.Button
    stop: gr.Button
    report: gr.Textbox
    truth: gr.Textbox
    chat: gr.Chatbot
    question: gr.Textbox
    find: gr.Button
    nearest: gr.HTML


def build_page(assistant: Assistant) -> gr.Blocks:
    windows = {**WINDOWS, "Model": assistant.processor.image_processor.hu_window}
    with gr.Blocks(title="HSENet", delete_cache=(600, FORGOTTEN_AFTER), analytics_enabled=False) as page:
        scan = gr.State(None, time_to_live=FORGOTTEN_AFTER)
        gr.HTML(HEADER, padding=False)
        opening = _opening(assistant)
        with gr.Row(elem_classes="reading"):
            viewer = _viewer(windows)
            texts = _texts(assistant)
        gr.HTML(LIMITS, padding=False)
        _connect_viewer(viewer, scan, windows)
        running = _connect_texts(texts, scan, assistant)
        _connect_opening(opening, viewer, texts, scan, assistant, windows, running)

        def forget(request: gr.Request) -> None:
            """Of a tab that is closed; Gradio itself would keep the scan for an hour."""
            page.state_holder.delete_state(request.session_hash)

        page.unload(forget)
    return page


def _opening(assistant: Assistant) -> Opening:
    with gr.Row(elem_classes="opening"):
        upload = gr.File(
            label="Upload: NIfTI, NRRD or zipped DICOM series",
            file_types=[".nii", ".gz", ".nrrd", ".zip"],
            height=140,
            elem_id="upload",
        )
        with gr.Column():
            samples = gr.Radio(list(assistant.samples), label="Or a sample", elem_id="samples")
            with gr.Accordion("If a scan is refused", open=False):
                series = gr.Textbox(label="Series, by its number in the message", max_length=4, elem_id="series")
                resample = gr.Checkbox(label="Interpolate tilted, missing or uneven slices", elem_id="resample")
    return Opening(upload, samples, series, resample, gr.HTML(elem_id="status", padding=False))


def _viewer(windows: dict[str, tuple[float, float]]) -> Viewer:
    pictures, sliders = {}, {}
    with gr.Column(scale=5, elem_classes="viewer"):
        window = gr.Radio(list(windows), value="Lung", label="Window", elem_id="window")
        with gr.Row(elem_classes="controls"):
            overlay = gr.Checkbox(label="Patch scores", elem_id="overlay", interactive=False, min_width=140)
            opacity = gr.Slider(0.1, 0.9, 0.4, step=0.1, label="Opacity", elem_id="opacity", buttons=[], min_width=140)
        gr.HTML(SCALE, padding=False)
        with gr.Row(elem_classes="planes"):
            for plane in PLANES:
                name = plane.capitalize()
                with gr.Column(min_width=240, elem_classes=["plane", plane]):
                    pictures[plane] = gr.HTML(EMPTY.format(name), elem_id=f"{plane}-picture", padding=False)
                    sliders[plane] = gr.Slider(
                        1, 2, 1, step=1, label=f"{name} slice", interactive=False, elem_id=plane, buttons=[]
                    )
    return Viewer(window, overlay, opacity, pictures, sliders)


def _texts(assistant: Assistant) -> Texts:
    with gr.Column(scale=4, min_width=320, elem_classes="texts"):
        with gr.Row(elem_classes="buttons"):
            write = gr.Button("Write report", variant="primary", interactive=False, elem_id="write")
            stop = gr.Button("Stop", elem_id="stop", min_width=80)
        report = gr.Textbox(label="Report, as written by the model", lines=7, max_lines=16, elem_id="report")
        truth = gr.Textbox(label="What was drawn into this phantom", visible=False, elem_id="truth")
        chat = gr.Chatbot(
            label="Questions",
            render_markdown=False,
            height=260,
            elem_id="chat",
            buttons=[],
            group_consecutive_messages=False,
        )
        question = gr.Textbox(
            label="Ask about this scan",
            placeholder="Is there a pleural effusion?",
            max_length=MAX_QUESTION_CHARACTERS,
            interactive=False,
            submit_btn="Ask",
            elem_id="question",
        )
        find = gr.Button("Find similar scans", visible=assistant.index is not None, interactive=False, elem_id="find")
        return Texts(write, stop, report, truth, chat, question, find, gr.HTML(elem_id="nearest", padding=False))


def _connect_viewer(viewer: Viewer, scan: gr.State, windows: dict[str, tuple[float, float]]) -> None:
    """Only the newest position matters; the queue is for the model."""
    settings = [scan, viewer.window, viewer.overlay, viewer.opacity]
    draw = partial(draw_slice, windows)
    for plane, slider in viewer.sliders.items():
        moved = [slider.input, slider.release]
        gr.on(moved, partial(draw, plane), [slider, *settings], viewer.pictures[plane], **QUIET)

    def draw_all(*values) -> list[str]:
        numbers, shown = values[: len(PLANES)], values[len(PLANES) :]
        return [draw(plane, number, *shown) for plane, number in zip(PLANES, numbers, strict=True)]

    changed = [viewer.window.change, viewer.overlay.change, viewer.opacity.change]
    gr.on(changed, draw_all, [*viewer.sliders.values(), *settings], [*viewer.pictures.values()], **QUIET)


def _connect_texts(texts: Texts, scan: gr.State, assistant: Assistant) -> list[Any]:
    """The events that run the model, which what comes next may end."""
    writing = texts.write.click(partial(write_report, assistant), scan, texts.report, **ON_THE_MODEL)
    asked = [scan, texts.question]
    asking = texts.question.submit(partial(ask, assistant), asked, [texts.question, texts.chat], **ON_THE_MODEL)
    finding = texts.find.click(partial(find_nearest, assistant), scan, texts.nearest, **ON_THE_MODEL)
    texts.stop.click(None, cancels=[writing, asking], api_visibility="private")
    return [writing, asking, finding]


def _connect_opening(
    opening: Opening,
    viewer: Viewer,
    texts: Texts,
    scan: gr.State,
    assistant: Assistant,
    windows: dict[str, tuple[float, float]],
    running: list[Any],
) -> None:
    """
    In two steps. At once, whoever has the model: the page is emptied, and what is being said of the scan before is
    ended, so that nothing of it can be taken for the new one. When the model is free: the newest wish is fulfilled.
    """
    shown = [scan, opening.status, viewer.overlay, texts.write, texts.question, texts.find]
    shown += [texts.report, texts.truth, texts.chat, texts.nearest]
    shown += [*viewer.sliders.values(), *viewer.pictures.values()]
    settings = [viewer.window, viewer.overlay, viewer.opacity]
    wish = gr.State(None, time_to_live=FORGOTTEN_AFTER, delete_callback=_give_up)

    def choose_upload(path, before, *settings) -> list[Any]:
        _give_up(before)
        return [assistant.claim(path), None, None, *whole_page(windows, None, OPENING, *settings)]

    def choose_sample(name, before, *settings) -> list[Any]:
        _give_up(before)
        return [Wish(sample=name), *whole_page(windows, None, OPENING, *settings)]

    def fulfil(wish, series, resample, *settings) -> list[Any]:
        if wish is None or wish.is_over:
            return [gr.skip()] * len(shown)
        opened, said = open_scan(assistant, wish, **read_options(series, resample))
        if wish.is_over:  # another was made meanwhile
            return [gr.skip()] * len(shown)
        wish.is_over = True
        return whole_page(windows, opened, said, *settings)

    at_once = {"cancels": running, "queue": False, "trigger_mode": "multiple", "api_visibility": "private"}
    chosen = [
        opening.upload.upload(
            choose_upload,
            [opening.upload, wish, *settings],
            [wish, opening.upload, opening.samples, *shown],
            **at_once,
        ),
        opening.samples.input(choose_sample, [opening.samples, wish, *settings], [wish, *shown], **at_once),
    ]
    for choice in chosen:
        read_with = [opening.series, opening.resample]
        choice.then(fulfil, [wish, *read_with, *settings], shown, trigger_mode="always_last", **ON_THE_MODEL)


def _give_up(wish: Wish | None) -> None:
    if wish is not None:
        wish.give_up()
