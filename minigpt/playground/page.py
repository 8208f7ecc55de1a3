"""Layout and events of the playground page, in Gradio.

The page needs no network: Gradio's telemetry and version check are off, and fonts are those of the
system.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib import resources
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before Gradio is imported
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

import gradio as gr
from gradio import themes
from gradio.routes import App, ORJSONResponse

from minigpt.playground import inside
from minigpt.playground.answers import MAX_PROMPT, MAX_TOKENS, Playground
from minigpt.playground.hosts import Hosts, guarded

WRITERS = 4  # requests of one kind that are served at the same time; further requests wait
WAITING = 64  # maximum number of waiting requests; further requests get an error

PROMPT = "Once upon a time, there was a dog"
ATTENTION_TEXT = "Tom had a red ball. He gave the ball to his mom. She was happy."
TEMPERATURE = "0: always the most likely token; 1: the model's own probabilities; 2: nearly random"
TOP_K = "sample from the k most likely tokens; 0: from all tokens"
TOP_P = "sample from the most likely tokens up to this total probability; 1: from all tokens"
MIN_P = "exclude tokens below this fraction of the highest probability; 0: exclude none"
INTRODUCTION = """# Mini GPT playground
This is a small language model, trained on children's stories. It writes one **token** (a word or a
part of a word) at a time: it gives each token in its vocabulary a probability, and one is sampled.
"""
LEGEND = (
    '<div class="scale">unlikely <i></i> likely</div><div class="caption">The colour of a token '
    "shows the probability that the model gave it. Point at a token, or tap it, to see the five "
    "most likely tokens at its position.</div>"
)
WORDS = """The model represents each token by a vector, its **embedding**, which it has learned.
Tokens that are used similarly have embeddings with a similar direction: their cosine similarity is
close to 1."""
MAP = """This map shows the same embeddings in two dimensions. The model was trained only on
stories, and learned the groups from the way the words are used."""
ATTENTION = """To predict the next token, each **head** in each layer attends to the tokens so far.
Point at a token, or tap it, and the tokens that it attends to turn blue. In the matrix, each row is
a token that attends, and each column is a token that it attends to. A head that finds nothing
relevant often attends to (start)."""

SCORES = """**Scores of all heads**, measured on a random sequence that is repeated: the
previous-token score is the mean attention to the token before; the induction score is the mean
attention to the token after the earlier occurrence of the same token."""
LENS = """**Logit lens**: what the model would predict next if it ended after a layer. Point at a
cell to see the most likely tokens."""
ATTRIBUTION = """**Attribution**: how much each head adds to the logit of the next token after the
chosen position. Blue raises it, orange lowers it."""
ACTIVITY = """**Activations**: the root mean square of the residual stream before each block, and of
what its attention and its feed-forward layer add."""


def build_page(playground: Playground) -> gr.Blocks:
    """Return the page with its five tabs: Story, Words, Map, Attention and Layers."""
    with gr.Blocks(title="Mini GPT playground", analytics_enabled=False) as page:
        gr.Markdown(INTRODUCTION)
        with gr.Tab("Story"):
            _story_tab(playground)
        with gr.Tab("Words"):
            _words_tab(playground)
        with gr.Tab("Map"):
            gr.Markdown(MAP)
            name = _model_choice(playground)
            _answer(playground.map, [name], gr.HTML(playground.map(name.value)))
        with gr.Tab("Attention"):
            _attention_tab(playground)
        with gr.Tab("Layers"):
            _layers_tab(playground)
    page.queue(max_size=WAITING, default_concurrency_limit=WRITERS)
    return page


def build_app(hosts: Hosts) -> App:
    """Return the web application of the page, which refuses requests that `hosts` does not allow.

    The check is the outermost layer, because Gradio's own layers add
    Access-Control-Allow-Origin to every answer.
    """

    class GuardedApp(App):
        def build_middleware_stack(self) -> Any:
            return guarded(super().build_middleware_stack(), hosts)

    return GuardedApp(default_response_class=ORJSONResponse)


def _story_tab(playground: Playground) -> None:
    with gr.Row():
        with gr.Column(scale=3, min_width=300):
            prompt = gr.Textbox(PROMPT, label="Prompt", lines=2, max_length=MAX_PROMPT)
            with gr.Row():
                start = gr.Button("Write", variant="primary")
                stop = gr.Button("Stop")
        with gr.Column(scale=2, min_width=300):
            temperature = _slider("Temperature", 0, 2, 0.8, 0.05, TEMPERATURE)
            length = _slider("Maximum length (tokens)", 10, MAX_TOKENS, 200, 10)
            with gr.Accordion("Exclude unlikely tokens", open=False):
                top_k = _slider("top-k", 0, 100, 0, 1, TOP_K)
                top_p = _slider("top-p", 0.05, 1, 1, 0.05, TOP_P)
                min_p = _slider("min-p", 0, 0.5, 0, 0.01, MIN_P)
    gr.HTML(LEGEND)
    stories = []
    with gr.Row():
        for name in playground.models:
            with gr.Column(min_width=300):
                gr.Markdown(f"**{name}**")
                stories.append(_tokens_part('<div class="story" dir="auto">${value}</div>'))

    def write(*inputs: Any) -> Iterator[Any]:
        for columns in playground.write(*inputs):
            yield columns if len(stories) > 1 else columns[0]  # Gradio rejects 1-tuples

    inputs = [prompt, temperature, top_k, top_p, min_p, length]
    story = gr.on([start.click, prompt.submit], write, inputs, stories, show_progress="minimal")
    stop.click(None, cancels=[story], api_visibility="private")


def _words_tab(playground: Playground) -> None:
    gr.Markdown(WORDS)
    name = _model_choice(playground)
    with gr.Row():
        with gr.Column(min_width=300):
            word = gr.Textbox("dad", label="Words nearest to", max_lines=1)
            words = gr.HTML(playground.neighbours(name.value, "dad"), elem_id="neighbours")
        with gr.Column(min_width=300):
            text = gr.Textbox("princess - girl + boy", label="Analogy", max_lines=1)
            answers = gr.HTML(playground.analogy(name.value, text.value), elem_id="answers")
    _answer(playground.neighbours, [name, word], words)
    _answer(playground.analogy, [name, text], answers)


def _attention_tab(playground: Playground) -> None:
    gr.Markdown(ATTENTION)
    name = _model_choice(playground)
    text = gr.Textbox(ATTENTION_TEXT, label="Text", max_length=MAX_PROMPT)
    with gr.Row():
        layer, head = _attention_sliders(playground, name.value, 1, 1)
    value = playground.attention(name.value, text.value, layer.value, head.value)
    matrix = _tokens_part("${value}", value, elem_id="attention")
    inputs = [name, text, layer, head]
    _answer(playground.attention, [text, layer, head], matrix, inputs)
    sliders = partial(_attention_sliders, playground)
    changed = name.change(sliders, [name, layer, head], [layer, head], api_visibility="private")
    changed.then(playground.attention, inputs, matrix, api_visibility="private")
    if any(model.scores is not None for model in playground.models.values()):

        def scores(name: str) -> str:
            measured = playground.models[name].scores
            return "" if measured is None else inside.scores_html(measured)

        gr.Markdown(SCORES)
        _answer(scores, [name], gr.HTML(scores(name.value), elem_id="scores"))


def _attention_sliders(playground: Playground, name: str, layer: int, head: int) -> list[gr.Slider]:
    """Return the sliders for the layers and the heads of a model; one with one value is hidden."""
    shape = playground.models[name].net.config
    sizes = (("Layer", layer, shape.n_layers), ("Head", head, shape.n_heads))
    # Gradio needs a maximum above the minimum.
    return [_slider(label, 1, max(n, 2), min(i, n), 1, visible=n > 1) for label, i, n in sizes]


def _layers_tab(playground: Playground) -> None:
    name = _model_choice(playground)
    text = gr.Textbox(ATTENTION_TEXT, label="Text", max_length=MAX_PROMPT, elem_id="layers-text")
    gr.Markdown(LENS)

    def lens(name: str, text: str) -> str:
        return inside.lens(playground, name, text)

    def attribution(name: str, text: str, position: int) -> str:
        return inside.attribution(playground, name, text, position)

    def activity(name: str, text: str) -> str:
        return inside.activity(playground, name, text)

    _answer(lens, [name, text], gr.HTML(lens(name.value, text.value), elem_id="lens"))
    gr.Markdown(ATTRIBUTION)
    position = _slider("Position", 1, inside.MAX_COLUMNS, 6, 1)
    value = attribution(name.value, text.value, position.value)
    _answer(attribution, [name, text, position], gr.HTML(value, elem_id="attribution"))
    gr.Markdown(ACTIVITY)
    _answer(activity, [name, text], gr.HTML(activity(name.value, text.value), elem_id="activity"))


def _model_choice(playground: Playground) -> gr.Dropdown:
    names = list(playground.models)
    return gr.Dropdown(names, value=names[0], label="Model", visible=len(names) > 1)


def _slider(
    label: str,
    low: float,
    high: float,
    value: float,
    step: float,
    info: str | None = None,
    visible: bool = True,
) -> gr.Slider:
    precision = 0 if isinstance(step, int) else None  # 0 rounds the input of a client
    return gr.Slider(
        low, high, value, step=step, precision=precision, label=label, info=info, visible=visible
    )


def _tokens_part(template: str, value: str = "", elem_id: str | None = None) -> gr.HTML:
    script = static_text("playground.js")
    return gr.HTML(value, html_template=template, js_on_load=script, elem_id=elem_id)


def _answer(
    function: Callable[..., str],
    changing: Sequence[Any],
    output: gr.HTML,
    inputs: Sequence[Any] | None = None,
) -> None:
    """Show the result of `function` for `inputs` when one of `changing` changes.

    By default, `inputs` are `changing`.

    If several changes are waiting, only the newest is handled. The event is `change`, because
    Gradio's `input` misses pasted text and backspace.
    """
    changes = [component.change for component in changing]
    gr.on(
        changes,
        function,
        inputs or changing,
        output,
        show_progress="hidden",
        trigger_mode="always_last",
    )


def page_theme() -> themes.ThemeClass:
    """Return a theme with system fonts; hint text has enough contrast in light and dark mode."""
    hint = {"block_info_text_color": "*neutral_600", "block_info_text_color_dark": "*neutral_300"}
    mono = ("ui-monospace", "monospace")
    return themes.Default(font=("system-ui", "sans-serif"), font_mono=mono).set(**hint)


def static_text(name: str) -> str:
    """Return the text of a file in static/."""
    return (resources.files("minigpt.playground") / "static" / name).read_text("utf-8")
