"""What is made here, on the Hugging Face Hub: only where a user asks for it by naming a repository."""

import glob
from pathlib import Path

from core.choices import UserError


def check_repository(name: str) -> None:
    """See that a repository can have this name, before anything is made for it. Nothing is asked of the hub.

    Raises:
        UserError: it cannot.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        said = str(error).partition("\n")[0].rstrip(".")
        raise UserError(
            f"--push is {name!r}, which no repository can be called ({said}): give NAME or OWNER/NAME"
        ) from None


def push(place: Path, repository: str) -> str:
    """Upload a folder, or one file, to a model repository, which is made if there is none; return its address.

    Raises:
        UserError: the hub did not take it. What lies on disk stays as it is.
    """
    from huggingface_hub import HfApi

    api, whole = HfApi(), place.is_dir()
    try:
        address = api.create_repo(repository, exist_ok=True)
        api.upload_folder(
            repo_id=repository,
            folder_path=place if whole else place.parent,
            allow_patterns=None if whole else [glob.escape(place.name)],  # never what lies beside a file
            commit_message=f"{place.name}, by MIMU",
        )
    except Exception as error:  # the hub's client raises errors of several libraries, all of which mean: not taken
        what = " ".join(str(error).split())[:200].rstrip(".") or type(error).__name__
        raise UserError(
            f"the hub did not take {place} as {repository} ({what}): it is whole on disk; log in with `hf auth login`, "
            "see that the repository is yours, and push it again"
        ) from None
    return str(address)
