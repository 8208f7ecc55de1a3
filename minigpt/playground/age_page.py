"""The slider "Age", with which visitors see the models at earlier points of their training.

The age is a position on the slider: it selects a snapshot from the training of each model, or, at
the end of the slider, the model itself. All tabs with answers of models follow the slider.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before Gradio is imported

import gradio as gr
from gradio.events import Dependency

from minigpt.playground.answers import Playground

AGE = "further left, the model is at an earlier point of its training"
PLAY_SECONDS = 1.5  # seconds at each position while the slider moves on its own
# JavaScript that sets the first input to whether the tab with the id %s is open. Only the browser
# knows this when the age changes: the server would learn too late that a tab was opened.
IS_OPEN = "(_, ...inputs) => [document.getElementById('%s')?.offsetParent != null, ...inputs]"


class Page(gr.Blocks):
    """The Gradio page, with the inputs that all tabs share."""

    playground: Playground
    age: gr.Slider
    age_column: gr.Column  # with the slider and the curves; hidden while no model has snapshots
    curves: gr.HTML  # loss curves of the models
    is_open: gr.Checkbox  # hidden input; `IS_OPEN` supplies its value in the browser


class Place(NamedTuple):
    """The tab and the page that contain a component."""

    tab: gr.Tab
    page: Page


def age_slider(page: Page) -> None:
    """Add the age slider, its button Play and the loss curves to the page.

    All three are hidden if no model has snapshots.
    """
    playground = page.playground
    n = playground.n_ages
    with gr.Column(visible=playground.has_ages, elem_id="age") as page.age_column:
        with gr.Row():
            page.age = gr.Slider(
                0, max(n, 1), n, step=1, precision=0, label="Age", info=AGE, scale=5
            )
            play = gr.Button("Play", scale=1, min_width=80)
        page.curves = gr.HTML(playground.age_html(None, n))

    def next_age(age: int) -> tuple[int, gr.Timer]:
        age = min(age + 1, n)
        return age, gr.Timer(active=age < n)

    def start(age: int) -> tuple[int, gr.Timer]:
        return (0 if age >= n else age), gr.Timer(active=True)

    def show(age: int) -> str:
        return playground.age_html(None, age)

    timer = gr.Timer(PLAY_SECONDS, active=False)
    private: dict[str, Any] = {"api_visibility": "private"}
    play.click(start, [page.age], [page.age, timer], **private)
    timer.tick(next_age, [page.age], [page.age, timer], show_progress="hidden", **private)
    page.age.change(show, [page.age], page.curves, show_progress="hidden", **private)


def on_age(
    function: Callable[..., Any], inputs: Sequence[Any], outputs: Any, place: Place,
    cancels: Sequence[Dependency] = (),
) -> Dependency:  # fmt: skip
    """Add an event that calls `function` when the age changes.

    Args:
        function: function to call. Its first argument is a bool: whether the tab `place.tab` is
            open. The values of `inputs` follow.
        inputs: components of the page.
        outputs: components that show the results.
        place: the tab that contains `outputs`, and its page. The tab must have an `elem_id`.
        cancels: events that are cancelled when the age changes.

    Returns:
        The Gradio event.
    """
    return place.page.age.change(
        function, [place.page.is_open, *inputs], outputs, js=IS_OPEN % place.tab.elem_id,
        show_progress="hidden", trigger_mode="always_last", api_visibility="private",
        cancels=list(cancels),
    )  # fmt: skip


def show_answer(
    function: Callable[..., str],
    changing: Sequence[Any],
    output: gr.HTML,
    inputs: Sequence[Any] | None = None,
) -> None:
    """Show the result of `function` in `output`; update it when `changing` or the age changes.

    A change of the age updates only the open tab. Another tab is updated when it is opened. If
    several changes are waiting, only the newest is handled. The result is updated by Gradio's event
    `change`, because the event `input` misses pasted text and backspace.

    Args:
        function: function that takes the values of `inputs` and returns HTML. The first value is
            the name of a model. Instead of this name, `function` gets the name of the model's
            snapshot at the selected age.
        changing: components that update the result when they change.
        output: component that shows the result.
        inputs: components with the arguments of `function`; None means `changing`.
    """
    place = place_of(output)
    inputs = [*(inputs or changing), place.page.age]
    answer = at_age(function, place.page)

    def follow(is_open: bool, *values: Any) -> Any:
        return answer(*values) if is_open else gr.skip()

    changes = [component.change for component in changing]
    how: dict[str, Any] = {"show_progress": "hidden", "trigger_mode": "always_last"}
    gr.on([*changes, place.tab.select], answer, inputs, output, **how)
    on_age(follow, inputs, output, place)


def at_age(function: Callable[..., str], page: Page) -> Callable[..., str]:
    """Return a function that calls `function` for the snapshot of a model at a selected age.

    The returned function takes the name of the model as its first argument, and the age as its last
    one. It calls `function` with the name of the model's snapshot at this age, followed by all
    arguments between the name and the age.
    """

    def answer(*values: Any) -> str:
        name, *rest, age = values
        return function(page.playground.aged(name, age), *rest)

    answer.__name__ = function.__name__  # name of the endpoint in Gradio's API
    return answer


def place_of(block: Any) -> Place:
    """Return the tab and the page that contain a component."""
    tab: Any = block
    while not isinstance(tab, gr.Tab):
        tab = tab.parent
    page: Any = tab
    while not isinstance(page, Page):
        page = page.parent
    return Place(tab, page)
