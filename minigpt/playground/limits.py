"""Limits of what a request to the page can make the server do.

Gradio handles the body of a request before it calls an event handler, which could check the access
token. So the limits in this module apply earlier, to all visitors.
"""

from __future__ import annotations

import json
from typing import Any

from minigpt.playground.access import Access
from minigpt.playground.training import MAX_UPLOAD

MAX_BODY = 1_000_000  # bytes in the body of a request; all inputs but texts to train on need less
MAX_TRAINING_BODY = MAX_UPLOAD + MAX_BODY  # the same for a request with the access token
_DOWNLOADS = (  # functions of Gradio that download a URL
    "async_ssrf_protected_get", "async_ssrf_protected_download", "ssrf_protected_download",
    "save_url_to_cache", "unsafe_download",
)  # fmt: skip


def refuse_downloads() -> None:
    """Make Gradio refuse URLs of files in requests; otherwise it would download them.

    A visitor can send such a URL as the value of any component, also without the access token.
    The page itself needs no download.
    """
    import gradio as gr
    from gradio import processing_utils

    def refuse(*_: Any, **__: Any) -> Any:
        message = "The page downloads nothing: upload the file instead."
        raise gr.Error(message, print_exception=False)

    for name in _DOWNLOADS:
        setattr(processing_utils, name, refuse)


def with_limit(app: Any, access: Access | None) -> Any:
    """Return an ASGI app that calls `app`, but answers 413 to requests with a large body.

    A body without a declared length is counted while it is received.

    Args:
        app: the ASGI app of the page.
        access: the token that allows large bodies, for training texts; None means that no request
            may have a large body.
    """

    async def guard(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return await app(scope, receive, send)
        may_train = access is not None and access.admits(scope["headers"])
        limit = MAX_TRAINING_BODY if may_train else MAX_BODY
        lengths = [v for name, v in scope["headers"] if name.lower() == b"content-length"]
        n_declared = max((int(value) for value in lengths if value.isdigit()), default=0)
        n_bytes, is_answered = n_declared if n_declared > limit else 0, False

        async def count() -> Any:
            nonlocal n_bytes
            message = await receive()
            n_bytes += len(message.get("body", b""))
            if n_bytes > limit:
                raise OSError("the body is too large")
            return message

        async def answer(message: Any) -> None:
            nonlocal is_answered
            if n_bytes <= limit:  # otherwise it is the answer to an incomplete body
                is_answered = True
                await send(message)

        if n_bytes <= limit:
            try:
                await app(scope, count, answer)
            except Exception:
                if n_bytes <= limit:
                    raise
        if n_bytes > limit and not is_answered:
            await _refuse(send, limit)

    return guard


async def _refuse(send: Any, limit: int) -> None:
    line = f"413: the request is too large: at most {limit / 1e6:.0f} MB are allowed"
    body = json.dumps({"detail": line}).encode() + b"\n"  # Gradio's page shows `detail`
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": 413, "headers": headers})
    await send({"type": "http.response.body", "body": body})
