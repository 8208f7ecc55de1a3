"""Send an exported folder to the Hugging Face Hub: the only code here that sends anything."""

from __future__ import annotations

from pathlib import Path

from minigpt.core.settings import UserError


def check_repository(push: str, dry_run: bool = False) -> None:
    """Raise UserError unless `push` is user/name and there is a token to send with.

    Args:
        push: name of the repository on the Hub.
        dry_run: whether nothing is to be sent, which needs no token.
    """
    from huggingface_hub import get_token
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(push)
        _user, _name = push.split("/")  # ValueError unless there are both
    except ValueError:
        problem = "not the name of a model on the Hub: give user/name"
        raise UserError(problem, "push", push) from None
    if not dry_run and get_token() is None:
        raise UserError("the Hub needs a token: type hf auth login, or set HF_TOKEN", "push", push)


def push_folder(folder: Path, push: str, private: bool = False) -> str:
    """Send all files of `folder` as one commit; the repository is created if there is none.

    Args:
        folder: an export.
        push: name of the repository, user/name.
        private: whether to create it private; one that is there already must be private.

    Returns:
        The address of the model.

    Raises:
        UserError: the Hub cannot be reached or refuses; the repository is public.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.utils import httpx

    api = HfApi()
    try:
        url = api.create_repo(push, repo_type="model", exist_ok=True, private=private)
        if private and not api.model_info(push).private:
            raise UserError(f"is public: make it private at {url}/settings", "push", push)
        message = "Model exported by Mini GPT"
        api.upload_folder(repo_id=push, folder_path=folder, commit_message=message)
    except (httpx.HTTPError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"nothing was published: {reason}", "push", push) from None
    return str(url)
