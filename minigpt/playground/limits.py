"""Limits of what a request to the page can make the server do.

Gradio handles the body of a request before it calls an event handler, which could check the access
token. So the limits in this module apply earlier, to all visitors.
"""

from __future__ import annotations

from typing import Any

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
