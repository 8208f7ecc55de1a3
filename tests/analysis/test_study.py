import json
import math
import re
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from minigpt.analysis import analogies, study
from minigpt.analysis.analogies import Analogy, Answers
from minigpt.analysis.coherence import (
    Continuation,
    Opening,
    coherence,
    score,
    story_openings,
    told_by_their_writers,
    write_continuations,
)
from minigpt.analysis.embeddings import EmbeddingProbe
from minigpt.core.settings import UserError
from minigpt.data.sources import bundled_sample
from minigpt.generation.sampling import SamplingConfig, stream_text
from minigpt.model import GPT, GPTConfig
from minigpt.runs.folder import Run
from minigpt.tokenizer import Tokenizer
from tests.conftest import naming

STORIES = [
    "Once there was a girl named Lily. Lily ran to Tom.",
    "The sun was up. A boy named Max woke.",  # names nobody in its first sentence
    "Here is a cat called Kitty. It ate. It slept.",
    "There was a dog named Lily, and a cat. It barked.",  # the name does not end the sentence
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(STORIES * 5, 300)


def told(text: str, name: str = "Lily", ended: bool = True) -> Continuation:
    return Continuation(Opening(f"A girl named {name}.", name, (0, 1), ""), (), text, ended)


def test_openings_are_first_sentences_that_end_in_a_name(tokenizer):
    found = story_openings(STORIES, tokenizer, 2, 40)
    assert [(o.text, o.name) for o in found] == [
        ("Once there was a girl named Lily.", "Lily"),
        ("Here is a cat called Kitty.", "Kitty"),
    ]
    assert found[1].rest == " It ate. It slept."
    assert found[0].ids == (0, *tokenizer.encode("Once there was a girl named Lily."))
    with pytest.raises(UserError, match=naming("2", "3", "20")):
        story_openings(STORIES, tokenizer, 3, 40)
    with pytest.raises(UserError, match=naming("0", "1", "2")):
        story_openings(STORIES, tokenizer, 1, 4)


def test_enough_validation_stories_begin_by_naming_somebody(tokenizer):
    found = story_openings(bundled_sample().stories("valid"), tokenizer, 1000, 256)
    assert sum(o.text.startswith("Once upon a time") for o in found) > 500


def test_the_hero_is_kept_when_the_last_third_has_the_name():
    kept = [
        told("one two three four five Lily's"),
        told("Lily two three four five six"),  # the first third
        told("one two three four Lilypad six"),
        told("she LILY"),
        told(""),  # no words: left out
    ]
    assert coherence(kept).hero_kept == 2 / 4


def test_names_are_words_with_a_capital_where_no_sentence_begins():
    story = told(' Then Tom met Anna. "Hi," said Tom. Anna, Lily and Ben saw I-don\'t. Sue ran.')
    found = coherence([story])
    assert found.names == 3  # Tom, Anna, Ben; not the opening's Lily, and not Sue
    assert found.names_back == pytest.approx(2 / 3)  # Ben does not come again
    assert coherence([told("no one here")]).names_back is None
    assert coherence([story, told("on and on", ended=False)]).unfinished == 0.5


@pytest.fixture(scope="module")
def net(tokenizer) -> GPT:
    torch.manual_seed(0)
    return GPT(
        GPTConfig(tokenizer.vocab_size, 40, d_model=16, n_layers=1, n_heads=2, d_ff=16)
    ).eval()


def test_continuations_come_in_the_order_of_their_openings_and_fill_the_context(net, tokenizer):
    openings = story_openings(STORIES, tokenizer, 2, 40) * 3
    stories = write_continuations(net, tokenizer, openings, 1.0, seed=1)
    assert [s.opening for s in stories] == openings
    assert len({s.text for s in stories}) > 1
    for story in stories:
        room = 40 - len(story.opening.ids)
        assert len(story.ids) < room if story.ended else len(story.ids) == room
        assert 0 not in story.ids
        assert story.text == tokenizer.decode(story.ids)
    again = write_continuations(net, tokenizer, openings, 1.0, seed=1)
    assert again == stories != write_continuations(net, tokenizer, openings, 1.0, seed=2)


def test_the_writers_own_words_are_cut_where_the_context_ends(tokenizer):
    openings = story_openings(STORIES, tokenizer, 2, 40)
    rest = len(tokenizer.encode(openings[0].rest))
    whole = len(openings[0].ids) + rest + 1  # and the end-of-text
    for context, ended in ((whole, True), (whole - 1, False)):
        story, _ = told_by_their_writers(openings, tokenizer, context)
        assert (story.ended, len(story.ids)) == (ended, rest)
    story, _ = told_by_their_writers(openings, tokenizer, whole - 3)
    assert openings[0].rest.startswith(story.text)
    assert len(story.ids) == rest - 2


def test_perplexity_is_of_the_continuation_and_its_end_alone(net, tokenizer):
    openings = story_openings(STORIES, tokenizer, 2, 40)
    stories = told_by_their_writers(openings, tokenizer, 40)
    nats, n = 0.0, 0
    for s in stories:
        whole = [*s.opening.ids, *s.ids, *([0] if s.ended else [])]
        logits = net(torch.tensor([whole[:-1]]))[0]
        begin = len(s.opening.ids)
        targets = torch.tensor(whole[begin:])
        nats += F.cross_entropy(logits[begin - 1 :], targets, reduction="sum").item()
        n += len(targets)
    assert len({len(s.opening.ids) + len(s.ids) for s in stories}) == 2  # so that one row is padded
    assert score(net, stories, 0) == pytest.approx(math.exp(nats / n), rel=1e-5)


# ------------------------------------------------------------------------------- analogies


def test_the_rank_is_the_place_of_the_expected_answer(monkeypatch):
    words = ("prince", "princess", "girl", "boy", "king")
    tokenizer = Tokenizer.train([f"a {a} {b} a" for a in words for b in words] * 5, 330)
    matrix = torch.eye(tokenizer.vocab_size, 400)
    ids = {word: tokenizer.encode(f" {word}")[0] for word in words}
    target = matrix[ids["princess"]] - matrix[ids["girl"]] + matrix[ids["boy"]]
    matrix[ids["king"]] = target
    matrix[ids["prince"]] = target + matrix[ids["prince"]]
    monkeypatch.setattr(analogies, "WORDS", ("prince", "dad"))
    answers = analogies.ask(EmbeddingProbe(matrix, tokenizer))
    first = answers.analogies[0]
    assert (first.question, first.expected, first.rank) == ("princess − girl + boy", "prince", 2)
    assert [word for word, _ in first.top[:2]] == ["king", "prince"]
    problem = answers.analogies[1]
    assert problem.rank is None
    assert re.search(naming("'dad'", "4"), problem.problem or "")
    assert answers.summary["asked"] == 1
    assert answers.summary["first"] == 0
    assert answers.summary["among five"] == 1
    text = analogies.markdown({"one": answers})
    assert "| gender | princess − girl + boy | prince | 2 (king 1.00) |" in text
    assert "| one | 1 | 0 % | 100 % | 2 |" in text


def test_a_token_with_a_line_break_stays_in_its_cell():
    top = [("\n", 0.5), ("|", 0.25), ("", 0.1)]
    found = Answers({"dad": top}, [Analogy("gender", "a − b + c", "d", 3, top)])
    text = analogies.markdown({"one": found})
    assert "| dad | \\n 0.50, \\| 0.25, (a space) 0.10 |\n" in text
    assert "| gender | a − b + c | d | 3 (\\n 0.50) |\n" in text


def test_there_are_twenty_analogies_of_five_kinds_and_no_word_twice_in_one():
    assert list(analogies.ANALOGIES) == ["gender", "royal", "plural", "tense", "opposite"]
    every = [words for group in analogies.ANALOGIES.values() for words in group]
    assert len(set(every)) == 20
    assert all(len(set(words)) == 4 for words in every)


# ------------------------------------------------------------------------------- all of it


SIZES = {"larger": 32, "smaller": 16}  # d_ff


def untrained(folder: Path, tokenizer: Tokenizer, context: int = 40, d_ff: int = 16) -> Run:
    """A run folder with the weights a model begins with."""
    shape = GPTConfig(tokenizer.vocab_size, context, 16, n_layers=1, n_heads=2, d_ff=d_ff)
    (folder / "checkpoints").mkdir(parents=True)
    weights = {f"net.{name}": tensor for name, tensor in GPT(shape).state_dict().items()}
    content = {"state_dict": weights, "hyper_parameters": {"model": asdict(shape)}}
    torch.save(content, folder / "checkpoints/last.ckpt")
    (folder / "config.yaml").write_text(json.dumps({"model": asdict(shape)}))
    tokenizer.save(folder / "tokenizer.json")
    return Run.open(folder)


def test_a_study_of_two_runs_writes_its_files(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(study, "NOVELTY_STORIES", 100)
    runs = [untrained(tmp_path / name, tokenizer, 100, d_ff) for name, d_ff in SIZES.items()]
    out = tmp_path / "out"
    study.write_study(runs, out, study.StudyConfig(n=4, temperatures=(0.5, 1.0)))
    assert sorted(path.name for path in out.iterdir()) == [
        "coherence.json", "coherence.md", "coherence.png", "embeddings.json", "embeddings.md",
        "samples.md",
    ]  # fmt: skip
    content = json.loads((out / "coherence.json").read_text(encoding="utf-8"))
    assert content["settings"]["judge"] == "larger"
    assert [(row["run"], row["temperature"]) for row in content["rows"]] == [
        (study.ORIGINALS, None),
        *(("smaller", 0.5), ("smaller", 1.0)),
        *(("larger", 0.5), ("larger", 1.0)),
    ]
    assert "\n| smaller | 0.5 | " in (out / "coherence.md").read_text(encoding="utf-8")
    samples = (out / "samples.md").read_text(encoding="utf-8")
    assert samples.count(f"> {study.SAMPLE_PROMPT}") == 6
    maps = (out / "embeddings.md").read_text(encoding="utf-8").partition("## Maps")[2]
    assert re.search("^smaller\\b.*data.vocab_size", maps, re.MULTILINE)
    embeddings = json.loads((out / "embeddings.json").read_text(encoding="utf-8"))
    assert list(embeddings) == ["smaller", "larger"]
    assert len(embeddings["larger"]["analogies"]) == 20


def test_samples_are_those_of_generate_whatever_the_rest_is_computed_on(
    tokenizer, tmp_path, monkeypatch
):
    class ReachedError(Exception):
        pass

    def study_rows(models: list[study.Model], config: study.StudyConfig) -> None:
        assert models[0].net.embedding.weight.device.type == "meta"
        raise ReachedError

    there = SimpleNamespace(accelerator="meta")
    monkeypatch.setattr(study.Hardware, "find", lambda *asked: there)
    monkeypatch.setattr(study, "study_rows", study_rows)
    run = untrained(tmp_path / "one", tokenizer)
    with pytest.raises(ReachedError):
        study.write_study([run], tmp_path / "out")
    sampling = SamplingConfig(study.SAMPLE_TEMPERATURE, max_tokens=study.SAMPLE_TOKENS, seed=2)
    text = "".join(stream_text(run.load_net(), tokenizer, study.SAMPLE_PROMPT, sampling))
    quoted = "\n".join(f"> {line}".rstrip() for line in (study.SAMPLE_PROMPT + text).split("\n"))
    assert f"Seed 2:\n\n{quoted}\n" in (tmp_path / "out/samples.md").read_text(encoding="utf-8")


def test_a_map_is_drawn_of_each_run_whose_words_are_known(tmp_path):
    words = "mom dad mother father brother sister grandma grandpa"
    tokenizer = Tokenizer.train([f"the {words}"] * 9, 350)
    net = GPT(GPTConfig(tokenizer.vocab_size, 8, 16, n_layers=1, n_heads=2, d_ff=16))
    text = study._write_maps({"one": EmbeddingProbe(net, tokenizer)}, tmp_path)
    assert (tmp_path / "map-one.png").read_bytes().startswith(b"\x89PNG")
    assert sum("](map-one.png)" in part for part in text) == 1


def test_runs_that_cannot_be_compared_are_refused(tokenizer, tmp_path):
    one = untrained(tmp_path / "one", tokenizer)
    other = untrained(tmp_path / "other", tokenizer, context=8)
    with pytest.raises(UserError, match=naming("one, other", "tokenizer", "context")):
        study.write_study([one, other], tmp_path / "out")
    with pytest.raises(UserError, match=naming("one, one")):
        study.write_study([one, one], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("wrong", [{"n": 0}, {"seed": -1}])
def test_settings_out_of_range_are_refused(wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(UserError, match=naming(name, str(value))):
        study.StudyConfig(**wrong)
