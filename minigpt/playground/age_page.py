"""The slider "Age", with which visitors see the models at earlier points of their training.

The age is a position on the slider: it selects a snapshot from the training of each model, or, at
the end of the slider, the model itself. All tabs with answers of models follow the slider.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before Gradio is imported

import gradio as gr
from gradio.events import Dependency

from minigpt.playground.answers import Playground

AGE = "further left, the model is at an earlier point of its training"
PLAY_SECONDS = 1.5  # seconds at each position while the slider moves on its own
# JavaScript that sets the first input to whether the tab with the id %s is open. Only the browser
# knows this when the age changes: the server would learn too late that a tab was opened.
IS_OPEN = "(_, ...inputs) => [document.getElementById('%s')?.offsetParent != null, ...inputs]"

T = TypeVar("T")


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


class Stream:
    """Results that a tab shows to one visitor as they grow, such as stories.

    A change of the age ends the results that grow. Gradio's `cancels` cannot do this: an event that
    cancels itself may also cancel its successor.
    """

    def __init__(self) -> None:
        self._number = 0
        self._age: int | None = None
        self._is_shown = self._is_due = False

    def change_age(self, age: int, is_open: bool) -> None:
        """End the results that grow, because the age has changed.

        Args:
            age: position of the age slider.
            is_open: whether the tab is open. If not, new results are due only if some are shown.
        """
        if age == self._age:  # the browser may report a change twice
            return
        self._number, self._age = self._number + 1, age
        self._is_due = is_open or self._is_shown

    def is_due(self, age: int) -> bool:
        """Return whether the results of `age` must replace the results on the page.

        Args:
            age: position of the age slider. The result is False if it has changed since.
        """
        return self._is_due and age == self._age

    def show(self, results: Iterable[T], nothing: T) -> Iterator[T]:
        """Yield `results` until the age changes or other results begin.

        Args:
            results: the results so far, each time that they have grown.
            nothing: update of the page that changes nothing. It is the last value if the results
                were ended, because Gradio sends the last value twice.
        """
        self._is_shown, self._is_due = True, False
        self._number += 1
        number = self._number
        for result in results:
            if number != self._number:
                yield nothing
                return
            yield result


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
        page.curves = gr.HTML(playground.age_html([], n))

    def next_age(age: int) -> tuple[int, gr.Timer]:
        age = min(age + 1, n)
        return age, gr.Timer(active=age < n)

    def start(age: int) -> tuple[int, gr.Timer]:
        return (0 if age >= n else age), gr.Timer(active=True)

    timer = gr.Timer(PLAY_SECONDS, active=False)
    private: dict[str, Any] = {"api_visibility": "private"}
    play.click(start, [page.age], [page.age, timer], **private)
    timer.tick(next_age, [page.age], [page.age, timer], show_progress="hidden", **private)


def model_choices(page: Page) -> list[gr.Dropdown]:
    """Return the menus of the page in which visitors choose the models that they look at."""
    blocks = page.blocks.values()
    menus = [block for block in blocks if isinstance(block, gr.Dropdown)]
    return [menu for menu in menus if menu.label in ("Model", "Models")]


def show_curves(page: Page) -> None:
    """Show the loss curves of the chosen models; update them when a choice or the age changes."""
    choices = model_choices(page)
    gr.on(
        [page.age.change, *(choice.change for choice in choices)],
        lambda age, *chosen: curves_of(page.playground, age, chosen), [page.age, *choices],
        page.curves, show_progress="hidden", trigger_mode="always_last", api_visibility="private",
    )  # fmt: skip


def curves_of(playground: Playground, age: int, chosen: Sequence[Any]) -> str:
    """Return the loss curves of the models that are chosen in the menus of the page, as HTML.

    Args:
        playground: the loaded models.
        age: position of the age slider.
        chosen: values of the menus: the name of a model, a list of names, or None.
    """
    lists = [[value] if isinstance(value, str) else value or [] for value in chosen]
    return playground.age_html([name for names in lists for name in names], age)


def show_stream(
    function: Callable[..., Iterator[Any]], inputs: Sequence[Any], outputs: Sequence[Any],
    stream: gr.State, place: Place,
) -> list[Dependency]:  # fmt: skip
    """Show the growing results of `function`, again for each age while the tab is open.

    If the age changes while another tab is open and results are shown, they are updated when the
    tab is opened.

    Args:
        function: generator that takes the values of `inputs` and of `stream` as arguments, and
            passes its results through `Stream.show`.
        inputs: components of the page.
        outputs: components that show the results.
        stream: state with a `Stream`.
        place: the tab that contains `outputs`, and its page. The tab must have an `elem_id`.

    Returns:
        The Gradio events that call `function`.
    """
    page, js = place.page, IS_OPEN % place.tab.elem_id

    def change_age(is_open: bool, age: int, results: Stream) -> None:
        results.change_age(age, is_open)

    def show_due(age: int, *values: Any) -> Iterator[Any]:
        is_due = values[-1].is_due(age)
        yield from function(*values) if is_due else [(gr.skip(),) * len(outputs)]

    def follow_age(is_open: bool, *values: Any) -> Iterator[Any]:
        yield from show_due(*values) if is_open else [(gr.skip(),) * len(outputs)]

    how: dict[str, Any] = {
        "show_progress": "hidden", "trigger_mode": "always_last", "api_visibility": "private",
    }  # fmt: skip
    # Gradio calls `follow_age` again only after the results that grow have ended. So another event,
    # which does not wait for `follow_age`, ends them.
    changed = page.age.change(
        change_age, [page.is_open, page.age, stream], js=js, queue=False, **how
    )
    inputs = [page.age, *inputs, stream]
    aged = changed.then(follow_age, [page.is_open, *inputs], outputs, js=js, **how)
    return [aged, place.tab.select(show_due, inputs, outputs, **how)]


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
    place.page.age.change(
        follow, [place.page.is_open, *inputs], output, js=IS_OPEN % place.tab.elem_id,
        api_visibility="private", **how,
    )  # fmt: skip


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
