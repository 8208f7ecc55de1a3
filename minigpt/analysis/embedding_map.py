"""Map of words: their token embeddings in two dimensions, with a colour for each cluster.

>>> layout = embedding_map(EmbeddingProbe(net, tokenizer))
>>> write_map(layout, Path("embedding_map.png"))
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

from minigpt.analysis.embeddings import EmbeddingProbe
from minigpt.core.plots import COLOURS, MARKERS, Labels, new_figure, to_svg, write_png
from minigpt.core.settings import UserError

MAP = "embedding_map.png"

# Words of children's stories by meaning. The map leaves out words that are not single tokens.
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
    """Error raised if too few words of the map are single tokens."""


@dataclass(frozen=True)
class EmbeddingMap:
    """Positions of words in two dimensions, and statistics of the embeddings of these words."""

    words: dict[str, list[str]]  # words of each cluster that are single tokens
    points: Tensor  # (n, 2), in the order of `words`
    explained: float  # fraction of the variance that the two dimensions explain
    within: float  # mean cosine similarity of two words of one cluster, in all d dimensions
    between: float | None  # the same for words of different clusters; None if there is one cluster


def embedding_map(
    probe: EmbeddingProbe, clusters: Mapping[str, Sequence[str]] = CLUSTERS
) -> EmbeddingMap:
    """Project the embeddings of the words in `clusters` onto their first two principal components.

    Args:
        probe: the embeddings, normalised to length one.
        clusters: words by the name of their cluster.

    Returns:
        The positions and statistics of those words that are single tokens.

    Raises:
        FewWordsError: fewer than three of the words are single tokens.
    """
    words = {name: probe.single(members) for name, members in clusters.items()}
    singles = [word for members in words.values() for word in members]
    if len(singles) < 3:
        problem = "the map needs at least 3 English words that are single tokens of this model, "
        problem += f"but finds only {len(singles)}"
        fix = "train on more English stories, or with a larger"
        raise FewWordsError(f"{problem}; {fix} data.vocab_size")
    unit = probe.vectors(singles)  # (n, d)
    u, s, _ = torch.linalg.svd(unit - unit.mean(dim=0), full_matrices=False)
    points = u[:, :2] * s[:2]
    points = points * points[0].sign()  # the sign of a component is arbitrary: fix it
    group = torch.tensor([i for i, members in enumerate(words.values()) for _ in members])
    cosines, same = unit @ unit.T, group[:, None] == group
    other = ~torch.eye(len(singles), dtype=torch.bool)
    return EmbeddingMap(
        words=words,
        points=points,
        explained=(s[:2].square().sum() / s.square().sum()).item(),
        within=cosines[same & other].mean().item(),
        between=None if same.all() else cosines[~same].mean().item(),
    )


def caption(layout: EmbeddingMap) -> str:
    """Return the caption: a sentence on the clusters and a sentence on the limits of the map."""
    limit = "words that are close on the map may still differ"
    return f"{_cosines(layout)}. The map shows {layout.explained:.0%} of the variance: {limit}."


def _cosines(layout: EmbeddingMap) -> str:
    between = "" if layout.between is None else f", {layout.between:.2f} between groups"
    return f"Mean cosine {layout.within:.2f} within a group{between}".replace("-0", "−0")


def map_figure(layout: EmbeddingMap) -> Figure:
    """Draw a labelled point for each word; each cluster has a colour, a marker and a label.

    At most three clusters can be drawn. If there is no free position near a point, its label may
    cover another label.
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
    """Write the map to a PNG file atomically. The folder is created if missing."""
    write_png(map_figure(layout), path)


def map_svg(layout: EmbeddingMap) -> str:
    """Return the map as an <svg> element for a page."""
    return to_svg(map_figure(layout))
