"""What the playground shows, as HTML: coloured tokens, bars, the attention of a head.

Pure functions of plain values. Every text goes through `html.escape`: prompts and words are typed
by visitors. Colours and the panel of alternatives are in static/.
"""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from minigpt.generation.sampling import SamplingConfig, encode_prompt, generate
from minigpt.model import GPT
from minigpt.tokenizer import Tokenizer

N_ALTERNATIVES = 5
CELL = 14  # width of a cell of the attention heatmap, in its own units
MARGIN = 80  # beside the heatmap, for the words


@dataclass(frozen=True)
class ShownToken:
    """One generated token, or the few that spell one character, and what else it could have been.

    Probabilities are the model's own, before temperature and filters.
    """

    text: str  # "" where the story ends
    probability: float
    rank: int  # among all tokens; 1 is the likeliest
    alternatives: tuple[tuple[str, float], ...]  # the likeliest tokens, best first


def stream_tokens(
    net: GPT, tokenizer: Tokenizer, prompt: str, sampling: SamplingConfig
) -> Iterator[ShownToken]:
    """The tokens after `prompt`, as they are sampled; the last has no text if the story ended.

    The texts join to what `stream_text` gives. Tokens that hold parts of one character come as
    one, with the product of their probabilities, and rank and alternatives of the first.
    """
    pending: list[int] = []  # ids whose last character is not whole yet
    shown: ShownToken | None = None  # what `pending` comes to
    ids, end, size = encode_prompt(tokenizer, prompt), tokenizer.end_of_text, tokenizer.vocab_size
    for step in generate(net, ids, sampling, end, vocab_size=size):
        chosen = int(step.ids.item())
        token = _judged(step.logits[0].softmax(dim=-1), chosen, tokenizer)
        if chosen == end:
            yield from (shown, token) if shown else (token,)
            return
        pending.append(chosen)
        if shown:
            token = replace(shown, probability=shown.probability * token.probability)
        shown = replace(token, text=tokenizer.decode(pending))
        if not shown.text.endswith("\N{REPLACEMENT CHARACTER}"):
            yield shown
            pending, shown = [], None
    if shown:
        yield shown


def _judged(probabilities: Tensor, chosen: int, tokenizer: Tokenizer) -> ShownToken:
    top = probabilities.topk(min(N_ALTERNATIVES, len(probabilities)))
    likeliest = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    return ShownToken(
        text="",
        probability=probabilities[chosen].item(),
        rank=int((probabilities > probabilities[chosen]).sum()) + 1,
        alternatives=tuple((token_name(tokenizer, i), p) for i, p in likeliest),
    )


def token_name(tokenizer: Tokenizer, token_id: int) -> str:
    """A token by itself, such as "dad"; one that goes on with a word is "…ing".

    What cannot be seen is spelled out.
    """
    if token_id == tokenizer.end_of_text:
        return "(end of the story)"
    text = tokenizer.token(token_id)
    if "\N{REPLACEMENT CHARACTER}" in text:
        return "(part of a character)"
    shown = text.removeprefix(" ").replace("\n", "↵").replace(" ", "␣") or "␣"
    return f"…{shown}" if text[0].isalnum() else shown


def prompt_html(prompt: str) -> str:
    """The prompt, in front of its story."""
    return f'<span class="prompt">{html.escape(prompt)}</span>'


def token_html(token: ShownToken) -> str:
    """A token on a ground of its probability; the script shows the rest on hover, focus or tap."""
    details = {"p": token.probability, "rank": token.rank, "alternatives": token.alternatives}
    text = html.escape(token.text) if token.text else "<i>the end</i>"
    return (
        f'<span class="token{"" if token.text else " end"}" tabindex="0" '
        f'style="--p:{token.probability:.3f}" '
        f'data-details="{html.escape(json.dumps(details))}">{text}</span>'
    )


def note_html(text: str, kind: str = "note") -> str:
    """One line about what is shown: a `note`, or an `error` to mend."""
    role = ' role="alert"' if kind == "error" else ""
    return f'<div class="{kind}"{role}>{html.escape(text)}</div>'


def bars_html(cosines: Iterable[tuple[str, float]]) -> str:
    """Words with their cosines, as bars."""
    rows = "".join(
        f'<tr><th scope="row">{html.escape(word.replace(chr(10), "↵") or "␣")}</th>'
        f'<td class="bar"><div style="width:{100 * max(0.0, cosine):.0f}%"></div></td>'
        f"<td>{cosine:.2f}</td></tr>"
        for word, cosine in cosines
    )
    return f'<table class="bars"><tbody>{rows}</tbody></table>'


def attention_html(names: Sequence[str], weights: Tensor) -> str:
    """Where each of T tokens looks, for one head.

    Args:
        names: the texts of the tokens, T of them.
        weights: (T, T), each row a distribution over the tokens up to its own.

    Returns: the text, in which the script shades what the pointed token looks at (at first the
    last one), and below it the whole matrix.
    """
    rows = [[round(w, 3) for w in row[: i + 1]] for i, row in enumerate(weights.tolist())]
    tokens = "".join(
        f'<span class="token" tabindex="0" style="--p:0" data-row="{i}">{html.escape(name)}</span>'
        for i, name in enumerate(names)
    )
    return (
        f'<div class="looks" dir="auto" data-rows="{html.escape(json.dumps(rows))}">{tokens}</div>'
        f"{_heatmap(names, rows)}"
    )


def _heatmap(names: Sequence[str], rows: list[list[float]]) -> str:
    """An SVG: a row for each token that looks, a column for each that is looked at.

    Opacity is the root of the weight, so that small ones can be seen; the title has the number.
    """
    side = MARGIN + CELL * len(names)
    cells, labels = [], []
    names = [name.strip(" ").replace("\n", "↵") or "␣" for name in names]
    for i, (name, row) in enumerate(zip(names, rows, strict=True)):
        at = MARGIN + CELL * i
        text = html.escape(name if len(name) <= 10 else f"{name[:9]}…")
        labels += [
            f'<text x="{MARGIN - 4}" y="{at + 10}" text-anchor="end">{text}</text>',
            f'<text transform="translate({at + 10} {MARGIN - 4}) rotate(-90)">{text}</text>',
        ]
        for j, weight in enumerate(row):
            title = f"{html.escape(f'{name} looks at {names[j]}')}: {weight:.1%}"
            cells.append(
                f'<rect x="{MARGIN + CELL * j}" y="{at}" width="{CELL - 1}" height="{CELL - 1}" '
                f'style="fill-opacity:{weight**0.5:.3f}"><title>{title}</title></rect>'
            )
        frame = f'x="{MARGIN}" y="{at}" width="{CELL * (i + 1) - 1}" height="{CELL - 1}"'
        cells.append(f'<rect class="frame" {frame}/>')
    return (
        f'<svg class="heatmap" viewBox="0 0 {side} {side}" style="max-width:{1.3 * side:.0f}px" '
        f'role="img" aria-label="attention matrix">{"".join(cells)}{"".join(labels)}</svg>'
    )
