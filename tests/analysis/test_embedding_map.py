import re
from pathlib import Path
from typing import IO

import pytest
import torch
from matplotlib.figure import Figure

from minigpt.analysis.embedding_map import (
    CLUSTERS,
    FewWordsError,
    caption,
    embedding_map,
    map_figure,
    map_svg,
    write_map,
)
from minigpt.analysis.embeddings import EmbeddingProbe
from minigpt.core.plots import COLOURS, MARKERS
from minigpt.tokenizer import Tokenizer
from tests.conftest import naming

WORDS = ("dad", "mom", "king", "run", "jump", "sing")
CLUSTERED = {"roles": ("dad", "mom", "king", "grandpapa"), "activities": ("run", "jump", "sing")}


@pytest.fixture(scope="module")
def probe() -> EmbeddingProbe:
    """Roles point one way and activities another, each word a little off its way."""
    tokenizer = Tokenizer.train([f"the {a} {b}\n" for a in WORDS for b in WORDS] * 3, 330)
    matrix = torch.eye(tokenizer.vocab_size, 400)
    for i, word in enumerate(WORDS):
        matrix[tokenizer.encode(f" {word}")] = torch.eye(400)[350 + i] * 0.3
        matrix[tokenizer.encode(f" {word}"), 390 + i // 3] = 1
    return EmbeddingProbe(matrix, tokenizer)


def test_map_separates_clusters_and_leaves_out_split_words(probe):
    layout = embedding_map(probe, CLUSTERED)
    assert layout.words == {"roles": ["dad", "mom", "king"], "activities": ["run", "jump", "sing"]}
    assert layout.points.shape == (6, 2)
    roles, activities = layout.points[:3, 0], layout.points[3:, 0]
    assert roles.min() > 0 > activities.max()
    assert layout.within == pytest.approx(1 / 1.09)
    assert layout.between == pytest.approx(0, abs=1e-6)
    assert "0.92" in caption(layout)


def test_explained_share_is_that_of_the_two_largest_variances(probe):
    layout = embedding_map(probe, CLUSTERED)
    centred = probe.vectors(WORDS) - probe.vectors(WORDS).mean(dim=0)
    share = layout.points.square().sum() / centred.square().sum()
    assert layout.explained == pytest.approx(share.item())


def test_png_and_svg_of_the_map_show_every_word(probe, tmp_path):
    layout = embedding_map(probe, CLUSTERED)
    write_map(layout, tmp_path / "new" / "map.png")
    assert (tmp_path / "new" / "map.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["map.png"]
    svg = map_svg(layout)
    assert svg.startswith("<svg")
    assert {*WORDS, *CLUSTERED} <= set(re.findall(r">([^<>]+)</text>", svg))
    assert "currentColor" in svg


def test_caption_of_one_cluster_has_no_cosine_between_clusters(probe):
    layout = embedding_map(probe, {"roles": ("dad", "mom", "king"), "activities": ("jumpings",)})
    assert layout.between is None
    assert re.findall(r"\d\.\d+", caption(layout)) == ["0.92"]


def test_map_that_cannot_be_drawn_leaves_no_file(probe, tmp_path, monkeypatch):
    def fail(figure: Figure, file: Path | IO[bytes], **_: object) -> None:
        if isinstance(file, Path):
            file.touch()
        raise MemoryError

    layout = embedding_map(probe, CLUSTERED)
    monkeypatch.setattr(Figure, "savefig", fail)
    with pytest.raises(MemoryError):
        write_map(layout, tmp_path / "map.png")
    assert list(tmp_path.iterdir()) == []


def test_map_labels_do_not_overlap(probe):
    layout = embedding_map(probe, CLUSTERED)
    figure = map_figure(layout)
    figure.draw_without_rendering()
    boxes = [label.get_window_extent().padded(0, -1) for label in figure.axes[0].texts]
    assert len(boxes) == len(WORDS) + len(CLUSTERED)
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_tokenizer_without_the_words_is_an_error_that_names_vocab_size(probe):
    with pytest.raises(FewWordsError, match=naming("1", "data.vocab_size")):
        embedding_map(probe, {"roles": ("dad", "grandpapa")})


def test_each_cluster_has_a_colour_and_no_word_occurs_twice():
    assert len(COLOURS) == len(MARKERS) >= len(CLUSTERS)
    every = [word for members in CLUSTERS.values() for word in members]
    assert len(every) == len(set(every)) > 30
