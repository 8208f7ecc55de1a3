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
from minigpt.core.plots import INK, new_figure, to_svg, write_png
from minigpt.core.settings import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
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
COLOURS = ("#2563eb", "#d97706")  # as many as there are clusters

# Positions of a word beside its dot, best first: offset in points, and its alignment.
SIDES = tuple(
    ((x * reach, y * reach), {1: "left", 0: "center", -1: "right"}[x])
    for reach in (6, 11, 17, 24)
    for x, y in ((1, 0), (-1, 0), (0, 1.4), (0, -1.4), (1, 1), (1, -1), (-1, 1), (-1, -1))
)


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
    between = "" if layout.between is None else f", between groups {layout.between:.2f}"
    cosines = f"Mean cosine within a group {layout.within:.2f}{between}.".replace("-0", "−0")
    kept = f"{layout.explained:.0%} of the variance"
    return f"{cosines} The map keeps {kept}, so that words close on it may still differ."


def map_figure(layout: EmbeddingMap) -> Figure:
    """Draw a dot and its word for each token, one colour for each cluster."""
    figure = new_figure(8, 6)
    (axes,) = figure.axes
    groups = layout.points.split([len(members) for members in layout.words.values()])
    for colour, name, points in zip(COLOURS, layout.words, groups, strict=True):
        axes.scatter(*points.T.tolist(), s=22, color=colour, label=name)
    axes.set(xlabel="first principal component", ylabel="second principal component")
    axes.set(xticks=[], yticks=[])
    axes.margins(0.08)
    figure.legend(frameon=False, labelcolor=INK, fontsize=11, loc="outside upper left", ncols=2)
    figure.draw_without_rendering()  # fixes where a point lies on the figure
    _label(axes, [word for members in layout.words.values() for word in members], layout.points)
    return figure


def _label(axes: Axes, words: list[str], points: Tensor) -> None:
    """Write each word beside its dot, at the first position where it covers nothing."""
    from matplotlib.transforms import Bbox

    dots = axes.transData.transform(points.numpy())
    taken = [Bbox.from_bounds(x - 4, y - 4, 8, 8) for x, y in dots.tolist()]
    for word, point in zip(words, points.tolist(), strict=True):
        label = axes.annotate(
            word, tuple(point), (0, 0), textcoords="offset points", color=INK, va="center"
        )
        box = Bbox.null()
        for offset, side in SIDES:
            label.set(position=offset, ha=side)
            box = label.get_window_extent().padded(3, -1)  # apart sideways, close in height
            if not any(box.overlaps(other) for other in taken):
                break
        taken.append(box)


def write_map(layout: EmbeddingMap, path: Path) -> None:
    """Write the map as a PNG, whole or not at all. The folder is created if missing."""
    write_png(map_figure(layout), path, dpi=150)


def map_svg(layout: EmbeddingMap) -> str:
    """Return the map as an <svg> element for a page."""
    return to_svg(map_figure(layout))
