"""The playground's page: its layout and events in Gradio, and the server.

Nothing leaves the machine: Gradio's telemetry and version check are off, fonts are the system's,
and the browser is told (Content-Security-Policy) to load nothing from anywhere else.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable, Iterator
from importlib import resources
from typing import TYPE_CHECKING, Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before Gradio is imported
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

import gradio as gr
import uvicorn
from fastapi import FastAPI
from gradio import themes

from minigpt.playground.answers import MAX_PROMPT, MAX_TOKENS, Playground

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

log = logging.getLogger("minigpt")

WRITERS = 4  # stories that grow at once; the others wait
WAITING = 64  # visitors in the queue; one more is told that it is full
POLICY = (
    "default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'; "  # Gradio makes its own scripts
    "frame-ancestors 'self'; form-action 'self'"
)
FONT = ("system-ui", "sans-serif")
MONO = ("ui-monospace", "monospace")

INTRODUCTION = """# Mini GPT playground
A small language model, trained on children's stories. It writes one **token** (a word, or a piece
of one) at a time: each time it gives every token it knows a probability, and one is drawn.
"""
LEGEND = (
    '<div class="scale">surprised <i></i> sure</div><div class="caption">The colour is the '
    "probability that the model gave to each token. Point at one, or tap it, to see the five "
    "that it found likeliest.</div>"
)
WORDS = """Every token is a list of numbers, its **embedding**, which the model has learned.
Tokens that are used alike have embeddings that point the same way: their cosine is near 1."""
MAP = """The same embeddings, flattened to two dimensions. Nobody told the model what a family is:
the groups come from the stories."""
ATTENTION = """To choose the next token, each **head** of each layer looks back at the tokens
so far. Point at a token, or tap it: what it looks at turns blue. In the matrix, each row is a
token that looks, each column one that is looked at. A head that finds nothing often looks at
(start)."""


def build_page(playground: Playground) -> gr.Blocks:
    """The page with its four tabs."""
    with gr.Blocks(title="Mini GPT playground", analytics_enabled=False) as page:
        gr.Markdown(INTRODUCTION)
        with gr.Tab("Story"):
            _story_tab(playground)
        with gr.Tab("Words"):
            _words_tab(playground)
        with gr.Tab("Map"):
            gr.Markdown(MAP)
            name = _model_choice(playground)
            shown = gr.HTML(playground.map(name.value))
            _as_you_go(name.change, playground.map, [name], shown, "map")
        with gr.Tab("Attention"):
            _attention_tab(playground)
    page.queue(max_size=WAITING, default_concurrency_limit=WRITERS)
    return page


def _story_tab(playground: Playground) -> None:
    with gr.Row():
        with gr.Column(scale=3, min_width=300):
            prompt = gr.Textbox(
                "Once upon a time, there was a dog",
                label="The story begins",
                lines=2,
                max_length=MAX_PROMPT,
                elem_id="prompt",
            )
            with gr.Row():
                write = gr.Button("Write", variant="primary", elem_id="write")
                stop = gr.Button("Stop", elem_id="stop")
        with gr.Column(scale=2, min_width=300):
            temperature = gr.Slider(
                0,
                2,
                0.8,
                step=0.05,
                label="Temperature",
                info="0: always the likeliest token; 1: as the model believes; 2: wild",
                elem_id="temperature",
            )
            length = gr.Slider(
                10, MAX_TOKENS, 200, step=10, precision=0, label="Longest story, in tokens"
            )
            with gr.Accordion("Leave out unlikely tokens", open=False):
                top_k = gr.Slider(
                    0,
                    100,
                    0,
                    step=1,
                    precision=0,
                    label="top-k",
                    info="only the k likeliest; 0: all",
                )
                top_p = gr.Slider(
                    0.05, 1, 1, step=0.05, label="top-p", info="the likeliest up to this sum"
                )
                min_p = gr.Slider(
                    0, 0.5, 0, step=0.01, label="min-p", info="this share of the likeliest"
                )
    gr.HTML(LEGEND)
    stories = []
    with gr.Row():
        for name in playground.models:
            with gr.Column(min_width=300):
                gr.Markdown(f"**{name}**")
                stories.append(_tokens_part('<div class="story">${value}</div>'))

    def told(*typed: Any) -> Iterator[Any]:
        for pages in playground.write(*typed):
            yield pages if len(stories) > 1 else "".join(pages)  # Gradio takes one output bare

    writing = gr.on(
        [write.click, prompt.submit],
        told,
        [prompt, temperature, top_k, top_p, min_p, length],
        stories,
        api_name="write",
        concurrency_limit=WRITERS,
        show_progress="minimal",
    )
    stop.click(None, cancels=[writing], api_visibility="private")


def _words_tab(playground: Playground) -> None:
    gr.Markdown(WORDS)
    name = _model_choice(playground)
    with gr.Row():
        with gr.Column(min_width=300):
            word = gr.Textbox("dad", label="Words nearest to", max_lines=1, elem_id="word")
            near = gr.HTML(playground.neighbours(name.value, word.value), elem_id="neighbours")
        with gr.Column(min_width=300):
            text = gr.Textbox(
                "princess - girl + boy", label="Analogy", max_lines=1, elem_id="analogy"
            )
            answers = gr.HTML(playground.analogy(name.value, text.value), elem_id="answers")
    for event in (name.change, word.change):
        _as_you_go(event, playground.neighbours, [name, word], near, "neighbours")
    for event in (name.change, text.change):
        _as_you_go(event, playground.analogy, [name, text], answers, "analogy")


def _attention_tab(playground: Playground) -> None:
    shapes = [model.net.config for model in playground.models.values()]
    gr.Markdown(ATTENTION)
    name = _model_choice(playground)
    text = gr.Textbox(
        "Tom had a red ball. He gave the ball to his mom. She was happy.",
        label="Text",
        max_length=MAX_PROMPT,
        elem_id="attention-text",
    )
    with gr.Row():
        layer = gr.Slider(1, max(s.n_layers for s in shapes), 1, step=1, precision=0, label="Layer")
        head = gr.Slider(1, max(s.n_heads for s in shapes), 1, step=1, precision=0, label="Head")
    value = playground.attention(name.value, text.value, layer.value, head.value)
    shown = _tokens_part("${value}", value, elem_id="attention")
    for event in (name.change, text.change, layer.change, head.change):
        _as_you_go(event, playground.attention, [name, text, layer, head], shown, "attention")


def _model_choice(playground: Playground) -> gr.Dropdown:
    names = list(playground.models)
    return gr.Dropdown(names, value=names[0], label="Model", visible=len(names) > 1)


def _tokens_part(template: str, value: str = "", elem_id: str | None = None) -> gr.HTML:
    script = _resource("playground.js")
    return gr.HTML(value, html_template=template, js_on_load=script, elem_id=elem_id)


def _as_you_go(
    event: Callable[..., Any],
    answer: Callable[..., str],
    inputs: list[Any],
    output: gr.HTML,
    api_name: str,
) -> None:
    """Answer while the visitor types or slides; of waiting questions the newest counts.

    `event` is a change: Gradio's `input` comes neither with pasted text nor with backspace.
    """
    event(
        answer,
        inputs,
        output,
        api_name=api_name,
        show_progress="hidden",
        trigger_mode="always_last",
    )


def build_app(playground: Playground, auth: tuple[str, str] | None = None) -> ASGIApp:
    """The page as an ASGI application."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    mounted = gr.mount_gradio_app(
        app,
        build_page(playground),
        path="/",
        auth=auth,
        footer_links=[],
        run_history=False,  # what visitors type is not kept in their browsers
        ssr_mode=False,
        enable_monitoring=False,
        max_file_size="1kb",  # nothing is to be uploaded
        theme=_theme(),
        css=_resource("playground.css"),
    )
    return _with_policy(mounted)


def _theme() -> themes.ThemeClass:
    """Gradio's own, with the system's fonts and hints that can be read in either mode."""
    hint = {"block_info_text_color": "*neutral_600", "block_info_text_color_dark": "*neutral_300"}
    return themes.Default(font=FONT, font_mono=MONO).set(**hint)


def _with_policy(app: ASGIApp) -> ASGIApp:
    """`app` with the Content-Security-Policy in each answer."""

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = [*message["headers"], (b"content-security-policy", POLICY.encode())]
                message = {**message, "headers": headers}
            await send(message)

        await app(scope, receive, send_with_policy)

    return answer


def run_server(
    playground: Playground, listening: socket.socket, auth: tuple[str, str] | None, url: str
) -> None:
    """Serve on a socket that listens already, until ctrl-C."""
    config = uvicorn.Config(
        build_app(playground, auth), log_level="warning", timeout_graceful_shutdown=1
    )
    log.info("open %s in a browser (ctrl-C stops the page)", url)
    uvicorn.Server(config).run(sockets=[listening])


def _resource(name: str) -> str:
    return (
        resources.files("minigpt")
        .joinpath("playground", "static", name)
        .read_text(encoding="utf-8")
    )
