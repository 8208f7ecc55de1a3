"""A map of words: the token embedding in two dimensions, with a colour for each cluster of words.

>>> layout = embedding_map(EmbeddingProbe(net, tokenizer))
>>> write_map(layout, Path("embedding_map.png"))
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from minigpt.analysis.embeddings import EmbeddingProbe
from minigpt.core.plots import COLOURS, MARKERS, Labels, new_figure, to_svg, write_png
from minigpt.core.settings import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAP = "embedding_map.png"

# Words of children's stories by meaning. Words that a tokenizer splits are left out.
CLUSTERS: dict[str, tuple[str, ...]] = {
    "family roles": (
        *("mom", "dad", "mommy", "daddy", "mother", "father", "parents", "sister", "brother"),
        *("grandma", "grandpa", "girl", "boy", "baby", "man", "woman", "lady", "king", "queen"),
        *("prince", "princess"),
    ),
    "activities": (
        *("run", "jump", "play", "dance", "sing", "walk", "swim", "climb", "fly", "eat", "sleep"),
        *("read", "draw", "paint", "cook", "hide", "ride", "throw", "catch", "build"),
    ),
}


class FewWordsError(UserError):
    """The tokenizer has too few of the map's words as single tokens."""


@dataclass(frozen=True)
class EmbeddingMap:
    """Positions of words, and what shows how far the two dimensions can be trusted."""

    words: dict[str, list[str]]  # of each cluster, those that are single tokens
    points: Tensor  # (n, 2), in the order of `words`
    explained: float  # share of the variance in the two dimensions
    within: float  # mean cosine of two words of one cluster, in all d dimensions
    between: float | None  # of two words of different clusters; None: there is one cluster


def embedding_map(
    probe: EmbeddingProbe, clusters: Mapping[str, Sequence[str]] = CLUSTERS
) -> EmbeddingMap:
    """Lay out the words of `clusters` by the first two principal components of their embeddings.

    The embeddings have length one.

    Raises:
        FewWordsError: fewer than three of the words are single tokens.
    """
    words = {name: probe.single(members) for name, members in clusters.items()}
    kept = [word for members in words.values() for word in members]
    if len(kept) < 3:
        few = f"only {len(kept)} of its words are single tokens"
        raise FewWordsError(f"{few}; a larger data.vocab_size and more stories give more")
    unit = probe.vectors(kept)  # (n, d)
    u, s, _ = torch.linalg.svd(unit - unit.mean(dim=0), full_matrices=False)
    points = u[:, :2] * s[:2]
    points = points * points[0].sign()  # a component has no sign of its own: fix one
    group = torch.tensor([i for i, members in enumerate(words.values()) for _ in members])
    cosines, same = unit @ unit.T, group[:, None] == group
    other = ~torch.eye(len(kept), dtype=torch.bool)
    return EmbeddingMap(
        words=words,
        points=points,
        explained=(s[:2].square().sum() / s.square().sum()).item(),
        within=cosines[same & other].mean().item(),
        between=None if same.all() else cosines[~same].mean().item(),
    )


def caption(layout: EmbeddingMap) -> str:
    """Return what the map shows, and its limits."""
    limit = "words that are close on it may still differ"
    return f"{_cosines(layout)}. The map shows {layout.explained:.0%} of the variance: {limit}."


def _cosines(layout: EmbeddingMap) -> str:
    between = "" if layout.between is None else f", {layout.between:.2f} between groups"
    return f"Mean cosine {layout.within:.2f} within a group{between}".replace("-0", "−0")


def map_figure(layout: EmbeddingMap) -> Figure:
    """Draw a point and its word for each token; each cluster has a colour, a shape and a label.

    At most three clusters can be drawn. Words that have no free position near their point may
    cover others.
    """
    figure = new_figure(8, 6)
    (axes,) = figure.axes
    groups = layout.points.split([len(members) for members in layout.words.values()])
    for i, points in enumerate(groups):
        axes.scatter(*points.T.tolist(), s=22, color=COLOURS[i], marker=MARKERS[i])
    axes.set(xlabel="first principal component", ylabel="second principal component")
    axes.set(xticks=[], yticks=[])
    axes.margins(0.1)
    axes.set_title(_cosines(layout), loc="left", fontsize=11)
    labels = Labels(axes, layout.points.tolist())
    words = (word for members in layout.words.values() for word in members)
    for word, point in zip(words, layout.points.tolist(), strict=True):
        labels.add(word, point)
    for name, colour, points in zip(layout.words, COLOURS, groups, strict=False):
        if len(points):
            labels.add(name, points.mean(dim=0).tolist(), colour, fontweight="bold", fontsize=12)
    return figure


def write_map(layout: EmbeddingMap, path: Path) -> None:
    """Write the map as a PNG, whole or not at all. The folder is created if missing."""
    write_png(map_figure(layout), path, dpi=150)


def map_svg(layout: EmbeddingMap) -> str:
    """Return the map as an <svg> element for a page."""
    return to_svg(map_figure(layout))
