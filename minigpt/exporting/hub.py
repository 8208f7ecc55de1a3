"""An exported folder to the Hugging Face Hub. Nothing here is called unless --push is typed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from minigpt.core.settings import UserError


def check_repository(repository: str, dry_run: bool) -> None:
    """Raises UserError unless `repository` is user/name and, to send, there is a token."""
    from huggingface_hub import get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repository)
    except HFValidationError:
        raise UserError(_not_a_repository(repository)) from None
    if repository.count("/") != 1:
        raise UserError(_not_a_repository(repository))
    if not dry_run and get_token() is None:
        raise UserError(
            "sending to the Hugging Face Hub needs a token: type hf auth login, or set HF_TOKEN; "
            "--dry-run lists what would be sent without one"
        )


def listing(repository: str, files: Sequence[Path]) -> str:
    """What would be sent: a line for each file with its size in bytes, and the sum."""
    sizes = [path.stat().st_size for path in files]
    lines = [f"{size:>12,}  {path.name}" for path, size in zip(files, sizes, strict=True)]
    total = f"{sum(sizes):>12,}  bytes in {len(files)} files to https://huggingface.co/{repository}"
    return "\n".join([*lines, total])


def push(folder: Path, repository: str, files: Sequence[Path], private: bool = False) -> str:
    """Send `files` of `folder` as one commit, into a repository that is made if there is none.

    `private`: it is made so; one that is there must be so.

    Returns:
        The address of the model.

    Raises:
        UserError: the Hub cannot be reached, or refuses; the repository is there, and public.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.utils import httpx

    api = HfApi()
    try:
        url = api.create_repo(repository, repo_type="model", exist_ok=True, private=private)
        if private and not api.model_info(repository).private:
            raise UserError(
                f"{repository} is there already, and public: make it private at "
                f"{url}/settings, push to another name, or leave out --private"
            )
        api.upload_folder(
            repo_id=repository,
            repo_type="model",
            folder_path=folder,
            allow_patterns=[path.name for path in files],
            commit_message="Model exported by Mini GPT",
        )
    except (httpx.HTTPError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"no file was published at {repository}: {reason}") from None
    return str(url)


def _not_a_repository(repository: str) -> str:
    return f"--push {repository} is not the name of a model: type --push user/name"
