"""HTML for the playground: coloured tokens, bar charts, and the attention of a head.

All text is escaped with `html.escape`, because prompts and words come from visitors. The colours
are in static/playground.css. A script, static/playground.js, shows a panel with the most likely
tokens at a position.
"""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import resources

from torch import Tensor

from minigpt.generation.sampling import SamplingConfig, encode_prompt, generate
from minigpt.model import GPT
from minigpt.tokenizer import Tokenizer

N_ALTERNATIVES = 5
CELL = 14  # width of a cell of the attention heatmap, in units of its SVG
MARGIN = 80  # space for the token labels of the heatmap


@dataclass(frozen=True)
class ShownToken:
    """Generated token with its alternatives; tokens that are parts of one character are joined.

    Probabilities are those of the model, before temperature, top-k, top-p and min-p.
    """

    text: str  # "" at the end of the story
    probability: float
    rank: int  # rank among all tokens; 1 is the most likely
    alternatives: tuple[tuple[str, float], ...]  # the most likely tokens and their probabilities


def stream_tokens(
    net: GPT, tokenizer: Tokenizer, prompt: str, sampling: SamplingConfig
) -> Iterator[ShownToken]:
    """Yield the tokens after `prompt` as they are sampled.

    If the model ends the story, the last token has no text. The concatenated texts of the tokens
    equal the text from `stream_text`. Tokens that are parts of one character are joined. The joined
    token has the product of the probabilities of its parts, and the rank and the alternatives of
    the first part.

    Args:
        net: the model.
        tokenizer: the tokenizer that the model was trained with.
        prompt: beginning of the story.
        sampling: settings of the sampling.

    Yields:
        The next token.
    """
    pending: list[int] = []  # ids of tokens that end with an incomplete character
    partial: ShownToken | None = None  # the joined tokens of `pending`
    ids, end, size = encode_prompt(tokenizer, prompt), tokenizer.end_of_text, tokenizer.vocab_size
    for step in generate(net, ids, sampling, end, vocab_size=size):
        token_id = int(step.ids.item())
        token = _textless(step.logits[0].softmax(dim=-1), token_id, tokenizer)
        if token_id == end:
            yield from (partial, token) if partial else (token,)
            return
        pending.append(token_id)
        if partial:
            token = replace(partial, probability=partial.probability * token.probability)
        partial = replace(token, text=tokenizer.decode(pending))
        if not partial.text.endswith("\N{REPLACEMENT CHARACTER}"):
            yield partial
            pending, partial = [], None
    if partial:
        yield partial


def _textless(probabilities: Tensor, token_id: int, tokenizer: Tokenizer) -> ShownToken:
    """Return a token with its probability, rank and alternatives, but without its text."""
    top = probabilities.topk(min(N_ALTERNATIVES, len(probabilities)))
    alternatives = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    return ShownToken(
        text="",
        probability=probabilities[token_id].item(),
        rank=int((probabilities > probabilities[token_id]).sum()) + 1,
        alternatives=tuple((token_name(tokenizer, i), p) for i, p in alternatives),
    )


def token_name(tokenizer: Tokenizer, token_id: int) -> str:
    """Return the text to show for a token, such as "dad" for " dad" and "…ing" for "ing".

    One leading space is removed. Line breaks and other spaces are shown as symbols.
    """
    if token_id == tokenizer.end_of_text:
        return "(end of the story)"
    text = tokenizer.token(token_id)
    if "\N{REPLACEMENT CHARACTER}" in text:
        return "(part of a character)"
    name = text.removeprefix(" ").replace("\n", "↵").replace(" ", "␣") or "␣"
    return f"…{name}" if text[0].isalnum() else name


def prompt_html(prompt: str) -> str:
    """Return the HTML of the prompt at the start of a story."""
    return f'<span class="prompt">{html.escape(prompt)}</span>'


def token_html(token: ShownToken) -> str:
    """Return the HTML of a token, coloured by its probability.

    The attribute data-details contains what the panel shows: probability, rank and alternatives.
    """
    details = {"p": token.probability, "rank": token.rank, "alternatives": token.alternatives}
    text = html.escape(token.text) if token.text else "<i>the end</i>"
    return (
        f'<span class="token{"" if token.text else " end"}" tabindex="0" '
        f'style="--p:{token.probability:.3f}" '
        f'data-details="{html.escape(json.dumps(details))}">{text}</span>'
    )


def static_text(name: str) -> str:
    """Return the text of a file in static/."""
    return (resources.files("minigpt.playground") / "static" / name).read_text("utf-8")


def note_html(text: str, kind: str = "note") -> str:
    """Return the HTML of one line of text: a note, or an error that the visitor can fix.

    The line has a direction of its own, so that it does not decide that of the story around it.

    Args:
        text: the line.
        kind: "note" or "error".

    Returns:
        HTML, in which the line is escaped.
    """
    role = ' role="alert"' if kind == "error" else ""
    return f'<div class="{kind}" dir="auto"{role}>{html.escape(text)}</div>'


def bars_html(cosines: Iterable[tuple[str, float]]) -> str:
    """Return an HTML bar chart of words and their cosine similarities."""
    rows = "".join(
        f'<tr><th scope="row">{html.escape(word.replace(chr(10), "↵") or "␣")}</th>'
        f'<td class="bar"><div style="width:{100 * max(0.0, cosine):.0f}%"></div></td>'
        f"<td>{cosine:.2f}</td></tr>"
        for word, cosine in cosines
    )
    return f'<table class="bars"><tbody>{rows}</tbody></table>'


@dataclass(frozen=True)
class Cell:
    """Cell of a table: its text, a value from -1 to 1 that sets its colour, and its tooltip."""

    text: str
    value: float
    title: str = ""


def grid_html(columns: Sequence[str], rows: Sequence[str], cells: Sequence[Sequence[Cell]]) -> str:
    """Return a table with coloured cells: blue for positive values, orange for negative values.

    Args:
        columns: headings of the columns.
        rows: headings of the rows.
        cells: the cells of each row.

    Returns:
        HTML, in which all text is escaped.
    """
    head = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in columns)
    body = "".join(
        f'<tr><th scope="row">{html.escape(name)}</th>{"".join(map(_cell_html, row))}</tr>'
        for name, row in zip(rows, cells, strict=True)
    )
    table = f"<thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody>"
    return f'<div class="grid"><table>{table}</table></div>'


def _cell_html(cell: Cell) -> str:
    sign = ' class="negative"' if cell.value < 0 else ""
    title = f' title="{html.escape(cell.title)}"' if cell.title else ""
    style = f'style="--p:{min(abs(cell.value), 1):.3f}"'
    return f"<td{sign}{title} {style}>{html.escape(cell.text)}</td>"


def attention_html(names: Sequence[str], weights: Tensor) -> str:
    """Return the HTML of the attention of one head over T tokens.

    Args:
        names: texts of the T tokens.
        weights: attention weights (T, T); row i is a distribution over the tokens up to token i.

    Returns:
        The text and, below it, the attention matrix. A script on the page shades each token of the
        text by the weight with which the selected token attends to it. At first, the selected token
        is the last token of the text. The pointer or the keyboard focus selects another token.
    """
    rows = [[round(w, 3) for w in row[: i + 1]] for i, row in enumerate(weights.tolist())]
    tokens = "".join(
        f'<span class="token" tabindex="0" style="--p:0" data-row="{i}">{html.escape(name)}</span>'
        for i, name in enumerate(names)
    )
    data = html.escape(json.dumps(rows))
    text = f'<div class="attention" dir="auto" data-rows="{data}">{tokens}</div>'
    return text + _heatmap(names, rows)


def _heatmap(names: Sequence[str], rows: list[list[float]]) -> str:
    """Return an SVG of an attention matrix: a row per query token, a column per key token.

    The opacity of a cell is the square root of its attention weight, so that small weights are
    visible. The tooltip of a cell shows the weight.
    """
    side = MARGIN + CELL * len(names)
    cells, labels = [], []
    names = [name.strip(" ").replace("\n", "↵") or "␣" for name in names]
    for i, (name, row) in enumerate(zip(names, rows, strict=True)):
        y = MARGIN + CELL * i
        text = html.escape(name if len(name) <= 10 else f"{name[:9]}…")
        labels += [
            f'<text x="{MARGIN - 4}" y="{y + 10}" text-anchor="end">{text}</text>',
            f'<text transform="translate({y + 10} {MARGIN - 4}) rotate(-90)">{text}</text>',
        ]
        for j, weight in enumerate(row):
            title = f"{html.escape(f'{name} attends to {names[j]}')}: {weight:.1%}"
            cells.append(
                f'<rect x="{MARGIN + CELL * j}" y="{y}" width="{CELL - 1}" height="{CELL - 1}" '
                f'style="fill-opacity:{weight**0.5:.3f}"><title>{title}</title></rect>'
            )
        frame = f'x="{MARGIN}" y="{y}" width="{CELL * (i + 1) - 1}" height="{CELL - 1}"'
        cells.append(f'<rect class="frame" {frame}/>')
    return (
        f'<svg class="heatmap" viewBox="0 0 {side} {side}" style="max-width:{1.3 * side:.0f}px" '
        f'role="img" aria-label="attention matrix">{"".join(cells)}{"".join(labels)}</svg>'
    )
