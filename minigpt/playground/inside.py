"""HTML answers of the page about the layers of a model: logit lens, attribution, activations."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from minigpt.analysis.activations import activations
from minigpt.analysis.attention import HeadScores
from minigpt.analysis.lens import logit_attribution, logit_lens
from minigpt.core.settings import UserError
from minigpt.generation.sampling import encode_prompt
from minigpt.playground import html
from minigpt.playground.answers import LoadedModel, Playground, checked_text

MAX_COLUMNS = 24  # maximum number of tokens in a readable table
N_TOP = 5  # number of tokens in the tooltip of a cell
Answer = Callable[[LoadedModel, Tensor], str]


def lens(playground: Playground, name: str, text: str) -> str:
    """Return the logit lens as an HTML table: what each layer would predict after each token.

    Args:
        playground: the loaded models.
        name: name of the model.
        text: text to read; at most its first MAX_COLUMNS tokens are shown.

    Returns:
        The table, or a one-line error.
    """
    return _answer(playground, name, text, _lens)


def _lens(model: LoadedModel, ids: Tensor) -> str:
    shares = logit_lens(model.net, ids)[..., : model.tokenizer.vocab_size].exp()
    top = shares.topk(min(N_TOP, shares.shape[-1]))
    rows = []
    for tokens, probabilities in zip(top.indices.tolist(), top.values.tolist(), strict=True):
        cells = []
        for best, values in zip(tokens, probabilities, strict=True):
            names = [html.token_name(model.tokenizer, i) for i in best]
            title = "\n".join(f"{n}  {p:.1%}" for n, p in zip(names, values, strict=True))
            cells.append(html.Cell(names[0], values[0], title))
        rows.append(cells)
    return html.grid_html(_columns(model, ids), _layers(model, "embeddings"), rows)


def attribution(playground: Playground, name: str, text: str, position: int) -> str:
    """Return how much each head and layer adds to the logit of the next token, as HTML.

    Args:
        playground: the loaded models.
        name: name of the model.
        text: text to read; at most its first MAX_COLUMNS tokens are read.
        position: number of a token, from 1. The target is the token after this one. For the
            last token, the target is the token that the model finds most likely next. The result
            shows the parts of the target's logit, relative to the mean logit of the vocabulary.

    Returns:
        A line that names the target, and the table; or a one-line error.
    """
    return _answer(playground, name, text, lambda model, ids: _attribution(model, ids, position))


def _attribution(model: LoadedModel, ids: Tensor, position: int) -> str:
    n = ids.shape[1]
    if not 1 <= position <= n:
        raise UserError(f"The text has {n} tokens: choose a position from 1 to {n}.")
    best = logit_lens(model.net, ids)[-1, -1, : model.tokenizer.vocab_size].argmax()
    targets = ids[0].roll(-1)
    targets[-1] = best
    parts, i = logit_attribution(model.net, ids, targets), position - 1
    others = torch.stack([parts.attention_bias[:, i], parts.feed_forward[:, i]], dim=1)
    values = torch.cat([parts.heads[:, :, i], others], dim=1).tolist()  # a row for each layer
    columns = [f"head {h + 1}" for h in range(model.net.config.n_heads)]
    table = _signed([*columns, "bias", "feed-forward"], _layers(model)[1:], values)
    rest = parts.embedding[i] + parts.positions[i] + parts.norm_bias[i]
    before, after = (_columns(model, ids)[i], html.token_name(model.tokenizer, int(targets[i])))
    line = f"After “{before.strip() or before}”, the logit of “{after}” is {parts.total[i]:+.2f} "
    line += "relative to the mean logit of the vocabulary; "
    line += f"embeddings, positions and final norm add {rest:+.2f}."
    return html.note_html(line) + table


def activity(playground: Playground, name: str, text: str) -> str:
    """Return the root mean square of the activations of each layer at each token, as HTML.

    Args:
        playground: the loaded models.
        name: name of the model.
        text: text to read; at most its first MAX_COLUMNS tokens are shown.

    Returns:
        The table, or a one-line error.
    """
    return _answer(playground, name, text, _activity)


def _activity(model: LoadedModel, ids: Tensor) -> str:
    values = activations(model.net, ids)
    rows, names = [], []
    for name in values:
        if name.endswith(("attention", "feed_forward", ".input")) or name == "residual":
            rows.append(values[name][0].square().mean(dim=-1).sqrt().tolist())
            names.append(name)
    return _signed(_columns(model, ids), names, rows)


def scores_html(scores: HeadScores | None) -> str:
    """Return the previous-token score and the induction score of every head, as HTML tables.

    Args:
        scores: the scores. None means that they cannot be measured; a note then replaces the
            tables.
    """
    if scores is None:
        return html.note_html("The scores cannot be measured for this model.")
    tables = []
    for title, values in (
        ("Previous-token score", scores.previous_token),
        ("Induction score", scores.induction),
    ):
        columns = [f"head {h + 1}" for h in range(values.shape[1])]
        rows = [f"layer {i + 1}" for i in range(len(values))]
        cells = [[html.Cell(f"{v:.2f}", v) for v in row] for row in values.tolist()]
        tables.append(html.note_html(title) + html.grid_html(columns, rows, cells))
    return "".join(tables)


def _answer(playground: Playground, name: str, text: str, function: Answer) -> str:
    """Return the result of `function` for a model and the ids of a text, or a one-line error."""
    try:
        model = playground.models[name]
        ids = encode_prompt(model.tokenizer, checked_text(text, "a sentence"))
        n_tokens, most = ids.shape[1], min(MAX_COLUMNS, model.net.config.context_length)
        answer = function(model, ids[:, :most].to(model.net.embedding.weight.device))
    except UserError as error:
        return html.note_html(str(error), "error")
    if n_tokens > most:
        answer += html.note_html(f"Only the first {most} of {n_tokens} tokens are shown.")
    return answer


def _columns(model: LoadedModel, ids: Tensor) -> list[str]:
    return ["(start)", *(html.token_name(model.tokenizer, i) for i in ids[0, 1:].tolist())]


def _layers(model: LoadedModel, first: str = "") -> list[str]:
    return [first, *(f"layer {i + 1}" for i in range(model.net.config.n_layers))]


def _signed(columns: Sequence[str], rows: Sequence[str], values: Sequence[Sequence[float]]) -> str:
    """Return an HTML table of numbers, each coloured by its ratio to the largest absolute value."""
    top = max((abs(value) for row in values for value in row), default=0.0) or 1.0
    cells = [[html.Cell(f"{value:.2f}", value / top) for value in row] for row in values]
    return html.grid_html(columns, rows, cells)
