"""Upload of exports to the Hugging Face Hub. No other module uploads anything to the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from minigpt.core.settings import UserError
from minigpt.runs.names import EVALUATION


def check_repository(push: str, dry_run: bool = False, argument: str = "push") -> None:
    """Check the name of a repository, and that a token for the upload is available.

    Args:
        push: name of the repository on the Hub, user/name.
        dry_run: whether nothing will be uploaded, so that no token is needed.
        argument: name of the argument, for error messages.

    Raises:
        UserError: the name is not valid, or there is no token.
    """
    from huggingface_hub import get_token
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(push)
        _user, _name = push.split("/")  # ValueError unless there are both
    except ValueError:
        problem = "this is not the name of a repository on the Hub: write user/name"
        raise UserError(problem, argument, push) from None
    if not dry_run and get_token() is None:
        problem = "the Hub needs a token: run hf auth login, or set HF_TOKEN"
        raise UserError(problem, argument, push)


def push_folder(
    folder: Path, push: str, private: bool = False, kind: Literal["model", "space"] = "model"
) -> str:
    """Upload all files of a folder in one commit; the repository is created if missing.

    If the folder has no evaluation.json, the commit deletes the one in the repository, because its
    results are for earlier weights.

    Args:
        folder: the folder of an export or of a Space.
        push: name of the repository on the Hub, user/name.
        private: whether the repository must be private. If so, a new repository is created as a
            private one.
        kind: kind of the repository, a model or a Space.

    Returns:
        The URL of the repository.

    Raises:
        UserError: the Hub cannot be reached or refuses the upload, or the repository is public
            although it must be private.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.utils import httpx

    api = HfApi()
    try:
        sdk: dict[str, Any] = {"space_sdk": "gradio"} if kind == "space" else {}
        url = api.create_repo(push, repo_type=kind, exist_ok=True, private=private, **sdk)
        if private and not api.repo_info(push, repo_type=kind).private:
            raise UserError(f"{push} exists and is public: make it private at {url}/settings")
        message = f"{kind.capitalize()} written by Mini GPT"
        # Results for weights that the repository contained before; in a Space, below model/.
        stale = [EVALUATION, f"model/{EVALUATION}"]
        api.upload_folder(
            repo_id=push, repo_type=kind, folder_path=folder, commit_message=message,
            delete_patterns=stale,
        )  # fmt: skip
    except (httpx.HTTPError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        problem = f"nothing was published to {push} ({reason})"
        raise UserError(f"{problem}; check the network, the token and the name") from None
    return str(url)
