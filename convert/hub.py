"""Files from the Hugging Face Hub, through its own client: its cache, its resume, its environment variables."""

from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

from .problems import UserError, refuse

HOW_TO_LOG_IN = "log in with `hf auth login`, or put a token with read access into HF_TOKEN"


def cached(repository: str, revision: str | None, files: Sequence[str]) -> tuple[Path, str] | None:
    """Return folder and commit of files that the Hub's cache holds already, None if one is not there.

    A revision other than a commit is looked up in the cache, not on the Hub: ask ``download`` for the newest.
    """
    try:
        folder = Path(
            snapshot_download(repository, revision=revision, allow_patterns=list(files), local_files_only=True)
        )
    except (LocalEntryNotFoundError, HFValidationError):
        return None
    return (folder, folder.name) if all((folder / name).is_file() for name in files) else None


def download(repository: str, revision: str | None, files: Sequence[str], quiet: bool = False) -> tuple[Path, str]:
    """Download files of a model repository into the Hub's cache; return their folder and the commit.

    Raises UserError, one line for what the user can do: accept a licence, give a token, mend the id or the network.
    """
    page = f"{constants.ENDPOINT}/{repository}"
    disabled = are_progress_bars_disabled()
    if quiet:
        disable_progress_bars()
    try:
        folder = Path(snapshot_download(repository, revision=revision, allow_patterns=list(files)))
    except GatedRepoError:
        raise UserError(f"{repository}: gated. Accept its licence at {page}, then {HOW_TO_LOG_IN}") from None
    except RevisionNotFoundError:
        raise UserError(f"{repository}: has no revision {revision!r}: see {page}/commits/main") from None
    except RepositoryNotFoundError:
        raise UserError(
            f"{repository}: not found on the Hub, or private: see {page}; if it is yours, {HOW_TO_LOG_IN}"
        ) from None
    except HFValidationError as error:
        raise UserError(f"{repository}: not a Hub id ({error})") from None
    except LocalEntryNotFoundError:
        hint = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "check the network"
        raise UserError(
            f"{repository}: no folder here, not in the Hub's cache, and {constants.ENDPOINT} was not reached: {hint}"
        ) from None
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", "no status")
        raise UserError(f"{repository}: the Hub answered {status}: try again, what has come down is kept") from None
    except OSError as error:
        raise UserError(
            f"{repository}: the download stopped ({error}): try again, what has come down is kept"
        ) from None
    finally:
        if quiet and not disabled:
            enable_progress_bars()
    refuse(
        [
            f"{repository}: holds no {name}: is this a PersonaPlex repository?"
            for name in files
            if not (folder / name).is_file()
        ]
    )
    return folder, folder.name
