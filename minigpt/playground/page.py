"""Layout and events of the playground page, in Gradio.

The page needs no network: Gradio's telemetry and version check are off, and fonts are those of the
system.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before Gradio is imported
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

import gradio as gr
from gradio import themes
from gradio.routes import App, ORJSONResponse

from minigpt.core.settings import UserError
from minigpt.playground import html, inside
from minigpt.playground.access import with_token
from minigpt.playground.age_page import (
    Page,
    Stream,
    age_slider,
    at_age,
    curves_of,
    model_choices,
    place_of,
    show_answer,
    show_curves,
    show_stream,
)
from minigpt.playground.answers import MAX_PROMPT, MAX_RUNS, MAX_TOKENS, Playground
from minigpt.playground.hosts import Hosts, guarded
from minigpt.playground.limits import refuse_downloads, with_limit
from minigpt.playground.training_page import START_FROM, start_choices, training_tab

if TYPE_CHECKING:
    from minigpt.playground.server import Training

WRITERS = 4  # requests of one kind that are served at the same time; further requests wait
WAITING = 64  # maximum number of waiting requests; further requests get an error

PROMPT = "Once upon a time, there was a dog"
ATTENTION_TEXT = "Tom had a red ball. He gave the ball to his mom. She was happy."
TEMPERATURE = "0: always the most likely token; 1: the model's own probabilities; 2: often nonsense"
TOP_K = "sample from the k most likely tokens; 0: from all tokens"
TOP_P = "sample from the most likely tokens up to this total probability; 1: from all tokens"
MIN_P = "exclude tokens below this fraction of the highest probability; 0: exclude none"
INTRODUCTION = """# Mini GPT playground
The models on this page are small language models, such as ones trained on children's stories. A
model writes one **token** (a word or a part of a word) at a time: it gives each token in its
vocabulary a probability, and one of them is sampled.
"""
LEGEND = (
    '<div class="scale">unlikely <i></i> likely</div><div class="caption">The colour of a token '
    "shows the probability that the model gave it. Point at a token, or tap it, to see the five "
    "most likely tokens at its position.</div>"
)
WORDS = """The model represents each token by a vector, its **embedding**, which it has learned.
Tokens that are used similarly have embeddings with a similar direction: their cosine similarity is
close to 1."""
MAP = """This map shows the embeddings of words in two dimensions. Words that are used similarly are
close to each other. The model learned this from its training text alone."""
ATTENTION = """To predict the next token, each **head** in each layer attends to the tokens so far.
Point at a token, or tap it, and the tokens that it attends to turn blue. In the matrix, each row is
a token that attends, and each column is a token that it attends to. (start) is the token before the
text; a head that finds nothing relevant often attends to it."""
REFRESH_SECONDS = 6.0  # interval at which a page looks for newly trained models

SCORES = """**Scores of all heads**, measured on a random sequence that is repeated: the
previous-token score is the mean attention to the token before; the induction score is the mean
attention to the token after the earlier occurrence of the same token."""
LENS = """**Logit lens**: what the model would predict next if it ended after a layer. Point at a
cell to see the most likely tokens."""
ATTRIBUTION = """**Attribution**: how much each head, the biases and the feed-forward layers add to
the logit of the next token after the chosen position. Blue raises it, orange lowers it."""
ACTIVITY = """**Activations**: the root mean square of the residual stream before each block (input)
and after the last (residual), and of what each attention and feed-forward layer adds to it."""


def build_page(playground: Playground, training: Training | None = None) -> Page:
    """Return the page with its tabs: Story, Words, Map, Attention, Layers and, if allowed, Train.

    Args:
        playground: the loaded models.
        training: the queue of training runs and its access token; None means no tab Train.
    """
    refuse_downloads()
    # Uploads that no training run uses are deleted after an hour, or when the server ends.
    with Page(
        title="Mini GPT playground", analytics_enabled=False, delete_cache=(600, 3600)
    ) as page:
        page.playground, page.is_open = playground, gr.Checkbox(visible=False)
        gr.Markdown(INTRODUCTION)
        age_slider(page)
        with _tab("Story"):
            _story_tab(playground, page)
        with _tab("Words"):
            _words_tab(playground)
        with _tab("Map"):
            gr.Markdown(MAP)
            name = _model_choice(playground)
            show_answer(playground.map, [name], gr.HTML(playground.map(name.value)))
        with _tab("Attention"):
            _attention_tab(playground, page)
        with _tab("Layers"):
            _layers_tab(playground)
        show_curves(page)
        if training is not None:
            with gr.Tab("Train") as tab:
                training_tab(page, tab, playground, training)
            _refresh_models(page)
    page.queue(max_size=WAITING, default_concurrency_limit=WRITERS)
    return page


def build_app(hosts: Hosts, training: Training | None = None) -> App:
    """Return the web application of the page, with checks of the host and of the access token.

    These checks and the limit of the size of a request come before Gradio's own middleware, because
    that middleware reads uploads and adds Access-Control-Allow-Origin to every answer.

    Args:
        hosts: the hosts of this server; requests with another Host or Origin are refused.
        training: the queue of training runs and its access token. None means that visitors cannot
            train, so uploads are refused.
    """

    class GuardedApp(App):
        def build_middleware_stack(self) -> Any:
            access = None if training is None else training.access
            stack = with_limit(super().build_middleware_stack(), access)
            return guarded(with_token(stack, access), hosts)

    return GuardedApp(default_response_class=ORJSONResponse)


def _refresh_models(page: Page) -> None:
    """Make each open page regularly add newly trained models to its menus and loss curves.

    The age slider and the loss curves appear when the first model with snapshots is added. The
    length of the slider does not change.
    """
    blocks, choices = page.blocks.values(), model_choices(page)
    starts = [b for b in blocks if isinstance(b, gr.Dropdown) and b.label == START_FROM]
    playground = page.playground
    known = gr.State(list(playground.models))
    outputs = [known, page.age_column, page.curves, *choices, *starts]

    def refresh(known: list[str], age: int, *chosen: Any) -> list[Any]:
        names = list(playground.models)
        if names == known:
            return [gr.skip()] * len(outputs)
        column = gr.Column(visible=playground.has_ages)
        updates = [gr.Dropdown(names, visible=len(names) > 1) for _ in choices]
        updates += [gr.Dropdown(start_choices(playground)) for _ in starts]
        return [names, column, curves_of(playground, age, chosen), *updates]

    for event in (page.load, gr.Timer(REFRESH_SECONDS).tick):
        event(
            refresh, [known, page.age, *choices], outputs, show_progress="hidden",
            api_visibility="private",
        )  # fmt: skip


def _tab(label: str) -> gr.Tab:
    return gr.Tab(label, elem_id=f"tab-{label.lower()}")


def _story_tab(playground: Playground, page: Page) -> None:
    names = list(playground.models)
    models = gr.Dropdown(
        names, value=names[:MAX_RUNS], label="Models", multiselect=True, max_choices=MAX_RUNS,
        visible=len(names) > 1,
    )  # fmt: skip
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
    columns, titles, stories = [], [], []
    with gr.Row():
        for i in range(MAX_RUNS):
            with gr.Column(min_width=300, visible=i < len(names)) as column:
                columns.append(column)
                titles.append(gr.Markdown(f"**{names[i]}**" if i < len(names) else ""))
                stories.append(_tokens_part('<div class="story" dir="auto">${value}</div>'))
    seed, stream = gr.State(0), gr.State(Stream())

    def choose(chosen: list[str]) -> list[Any]:
        n = len(playground.chosen(chosen))
        return [gr.Column(visible=i < n) for i in range(MAX_RUNS)]

    def entitle(chosen: list[str], age: int) -> list[str]:
        shown = [f"**{playground.aged(name, age)}**" for name in playground.chosen(chosen)]
        return shown + [""] * (MAX_RUNS - len(shown))

    def write(*values: Any) -> Iterator[Any]:
        *inputs, results = values
        columns = ((*t, *[""] * (MAX_RUNS - len(t))) for t in playground.write(*inputs))
        yield from results.show(columns, (gr.skip(),) * MAX_RUNS)

    quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    models.change(choose, models, columns, **quiet)
    gr.on(
        [models.change, page.age.change], entitle, [models, page.age], titles,
        trigger_mode="always_last", **quiet,
    )  # fmt: skip
    inputs = [prompt, temperature, top_k, top_p, min_p, length, models, page.age, seed]
    new_seed = gr.on(
        [start.click, prompt.submit], lambda: random.getrandbits(31), None, seed, queue=False,
        api_visibility="private",
    )  # fmt: skip
    story = new_seed.then(write, [*inputs, stream], stories, show_progress="minimal")
    aged = show_stream(write, inputs, stories, stream, place_of(start))
    # Only one stream of stories at a time: a new one ends the others.
    gr.on(
        [start.click, prompt.submit, stop.click], None, cancels=[story, *aged],
        api_visibility="private",
    )  # fmt: skip


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
    show_answer(playground.neighbours, [name, word], words)
    show_answer(playground.analogy, [name, text], answers)


def _attention_tab(playground: Playground, page: Page) -> None:
    gr.Markdown(ATTENTION)
    name = _model_choice(playground)
    text = gr.Textbox(ATTENTION_TEXT, label="Text", max_length=MAX_PROMPT)
    with gr.Row():
        layer, head = _attention_sliders(playground, name.value, 1, 1)
    value = playground.attention(name.value, text.value, layer.value, head.value)
    matrix = _tokens_part("${value}", value, elem_id="attention")
    inputs = [name, text, layer, head]
    show_answer(playground.attention, [text, layer, head], matrix, inputs)
    sliders = partial(_attention_sliders, playground)
    changed = name.change(sliders, [name, layer, head], [layer, head], api_visibility="private")
    attention = at_age(playground.attention, page)
    changed.then(attention, [*inputs, page.age], matrix, api_visibility="private")

    def scores(name: str) -> str:
        try:
            return inside.scores_html(playground.models[name].scores)
        except UserError as error:  # the files of the model were deleted
            return html.note_html(str(error), "error")

    gr.Markdown(SCORES)
    show_answer(scores, [name], gr.HTML(scores(name.value), elem_id="scores"))


def _attention_sliders(playground: Playground, name: str, layer: int, head: int) -> list[gr.Slider]:
    """Return sliders for the layer and the head; a slider with only one value is hidden."""
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

    show_answer(lens, [name, text], gr.HTML(lens(name.value, text.value), elem_id="lens"))
    gr.Markdown(ATTRIBUTION)
    position = _slider("Position", 1, inside.MAX_COLUMNS, 6, 1)
    value = attribution(name.value, text.value, position.value)
    show_answer(attribution, [name, text, position], gr.HTML(value, elem_id="attribution"))
    gr.Markdown(ACTIVITY)
    value = activity(name.value, text.value)
    show_answer(activity, [name, text], gr.HTML(value, elem_id="activity"))


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
    precision = 0 if isinstance(step, int) else None  # 0: Gradio rounds values from clients
    return gr.Slider(
        low, high, value, step=step, precision=precision, label=label, info=info, visible=visible
    )


def _tokens_part(template: str, value: str = "", elem_id: str | None = None) -> gr.HTML:
    script = html.static_text("playground.js")
    return gr.HTML(value, html_template=template, js_on_load=script, elem_id=elem_id)


def page_theme() -> themes.ThemeClass:
    """Return a theme with system fonts and with readable hints in light and in dark mode."""
    hint = {"block_info_text_color": "*neutral_600", "block_info_text_color_dark": "*neutral_300"}
    mono = ("ui-monospace", "monospace")
    return themes.Default(font=("system-ui", "sans-serif"), font_mono=mono).set(**hint)
