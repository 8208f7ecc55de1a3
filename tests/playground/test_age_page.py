"""Stories that follow the age slider of the page, also if it was moved in another tab."""

import traceback
from pathlib import Path
from typing import Any

from minigpt.playground import age_page
from minigpt.playground.answers import MAX_RUNS, Playground
from minigpt.runs.folder import Run, bundled_release
from tests.commands import CONTEXT


def test_stream_ends_when_the_age_changes_and_starts_again_for_the_newest():
    stream = age_page.Stream()
    assert not stream.is_due(3)  # nothing has changed yet
    story = stream.show(["a", "ab", "abc"], "nothing")
    assert next(story) == "a"
    stream.change_age(2, is_open=True)
    assert list(story) == ["nothing"]
    assert not stream.is_due(3)  # the age has changed again since
    assert stream.is_due(2)
    assert list(stream.show(["b"], "nothing")) == ["b"]
    assert not stream.is_due(2)


def test_stream_in_another_tab_is_due_only_if_it_is_shown():
    stream = age_page.Stream()
    stream.change_age(1, is_open=False)
    assert not stream.is_due(1)
    story = stream.show(["a", "ab"], "nothing")
    assert next(story) == "a"
    stream.change_age(0, is_open=False)
    stream.change_age(1, is_open=False)
    assert list(story) == ["nothing"]
    assert stream.is_due(1)  # it is not complete


def test_new_stream_ends_the_one_before():
    stream = age_page.Stream()
    first, second = stream.show(["a", "ab"], "nothing"), stream.show(["b", "bc"], "nothing")
    assert [next(first), next(second)] == ["a", "b"]
    assert list(first) == ["nothing"]
    assert list(second) == ["bc"]


def check_story_events(errors: Path) -> None:
    """Call events of the page, and write the traceback of a failure to `errors`."""
    try:
        _check_story_events()
    except BaseException:
        errors.write_text(traceback.format_exc(), encoding="utf-8")
        raise


def _check_story_events() -> None:
    import gradio as gr

    from minigpt.playground.page import build_page

    playground = Playground.load([Run.load(bundled_release())])
    (name,), end = playground.models, playground.n_ages
    events = {fn.name: fn.fn for fn in build_page(playground).fns.values()}

    titles = [events["entitle"]([name], age) for age in (1, end)]
    assert playground.aged(name, 1) in titles[0][0] != titles[1][0] == f"**{name}**"
    assert [len(title) for title in titles] == [MAX_RUNS] * 2

    stream, seed = age_page.Stream(), 3
    inputs = ["Tom had", 0.8, 0, 1.0, 0.0, 5, [name]]

    def last(event: str, *values: Any) -> Any:
        *_, columns = events[event](*values)
        return columns[0]

    written = last("write", *inputs, end, seed, stream)
    events["change_age"](False, 0, stream)
    # another tab is open
    assert last("follow_age", False, 0, *inputs, 0, seed, stream) == gr.skip()
    again = last("show_due", 0, *inputs, 0, seed, stream)
    assert again not in (written, gr.skip())
    assert last("show_due", 0, *inputs, 0, seed, stream) == gr.skip()
    events["change_age"](True, end, stream)
    assert last("follow_age", True, 0, *inputs, 0, seed, stream) == gr.skip()  # it is late
    assert 'class="token' in last("follow_age", True, end, *inputs, end, seed, stream)


def test_story_and_title_follow_the_age_also_if_it_was_changed_in_another_tab(tmp_path: Path):
    # In a process of its own, because Gradio leaves event loops open.
    errors = tmp_path / "errors.txt"
    process = CONTEXT.Process(target=check_story_events, args=(errors,))
    process.start()
    process.join()
    assert process.exitcode == 0, errors.read_text(encoding="utf-8")
