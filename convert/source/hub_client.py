"""What the Hub answers: it is waited for where it is busy, and every failure is one line that says what to do."""

import hashlib
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import httpx2
from huggingface_hub import constants, get_token
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    RevisionResolutionError,
)
from huggingface_hub.utils import (
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
    logging,
    parse_ratelimit_headers,
)

from ..errors import UserError, printable

HOW_TO_LOG_IN = "log in with `hf auth login`, or put a token into HF_TOKEN"
TRIES = 5
_SILENT = 50  # logging's CRITICAL
_LONGEST_WAIT = 300.0  # seconds between two tries, whatever the Hub asks for
R = TypeVar("R")


def git_blob(size: int) -> "hashlib._Hash":
    """Return the digest by which git, and the Hub for small files, calls a file of so many bytes."""
    return hashlib.sha1(f"blob {size}\0".encode(), usedforsecurity=False)


def with_retries(call: Callable[[], R]) -> R:
    """Return what a call to the Hub returns; where it is busy or broken, waits as long as it asks for and tries again.

    Raises what the call raises last.
    """
    for waited in range(TRIES):
        try:
            return call()
        except (HfHubHTTPError, RevisionResolutionError) as error:
            cause = error if isinstance(error, HfHubHTTPError) else error.__cause__
            if not isinstance(cause, HfHubHTTPError) or not is_transient(cause):
                raise
            asked = asked_wait(cause)
            time.sleep(0.5 * 2**waited if asked is None else asked)
    return call()


def asked_wait(error: HfHubHTTPError) -> float | None:
    """Return the seconds that the Hub asks to wait, None if it does not."""
    asked = error.response.headers.get("Retry-After", "")
    limit = parse_ratelimit_headers(error.response.headers)
    spent = limit is not None and error.response.status_code == 429 and limit.remaining == 0  # it is on every answer
    seconds = float(asked) if asked.isdigit() else (limit.reset_in_seconds + 1 if limit and spent else None)
    return None if seconds is None else min(float(seconds), _LONGEST_WAIT)


def is_transient(error: HfHubHTTPError) -> bool:
    """Tell whether an answer may be another one in a moment."""
    return error.response.status_code == 429 or error.response.status_code >= 500


@contextmanager
def silent_client(bars: bool = False) -> Iterator[None]:
    """Keep the Hub's client from printing: it names signed addresses in warnings. bars: let it show its own."""
    verbosity, disabled = logging.get_verbosity(), are_progress_bars_disabled()
    if not os.environ.get("HF_HUB_VERBOSITY"):
        logging.set_verbosity(_SILENT)
    if not bars and not disabled:
        disable_progress_bars()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if not bars and not disabled:
            enable_progress_bars()


@contextmanager
def translate_errors(repository: str, revision: str | None, doing: str = "the download") -> Iterator[None]:
    """Turn what can go wrong at the Hub into one line each."""
    page = f"{constants.ENDPOINT}/{repository}"
    again = "try again, what is done is kept"
    try:
        yield
    except RevisionResolutionError as error:
        raise UserError(_unreached(repository, error.__cause__, again)) from None
    except GatedRepoError:
        how = (
            f"then {HOW_TO_LOG_IN}"
            if get_token() is None
            else "with the account that the token is of, and see that the token may read gated repositories"
        )
        raise UserError(f"{repository}: gated. Accept its license at {page}, {how}") from None
    except RevisionNotFoundError:
        raise UserError(f"{repository}: has no revision {revision!r}: see {page}/commits/main") from None
    except RepositoryNotFoundError:
        how = f"if it is yours, {HOW_TO_LOG_IN}" if get_token() is None else "the token given may not see it"
        raise UserError(f"{repository}: not found on the Hub, or private: see {page}; {how}") from None
    except HFValidationError as error:
        raise UserError(f"{repository}: not a Hub id ({error})") from None
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise UserError(_unreached(repository, error.__cause__ or error, again)) from None
    except HfHubHTTPError as error:
        raise UserError(_unreached(repository, error, again)) from None
    except (httpx2.HTTPError, RuntimeError) as error:  # the client wraps what breaks an upload in RuntimeError
        cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
        raise UserError(f"{repository}: {doing} stopped ({type(cause).__name__}): {again}") from None
    except OSError as error:
        raise UserError(f"{repository}: {doing} stopped ({error.strerror or error}): {again}") from None


def _unreached(repository: str, cause: BaseException | None, again: str) -> str:
    """Return the line for a Hub that answered with an error, or not at all."""
    if isinstance(cause, HfHubHTTPError):
        status = cause.response.status_code
        if status == 401:
            return f"{repository}: the Hub does not know the token: {HOW_TO_LOG_IN}"
        said = printable(str(cause.server_message or "").split("\n")[0][:200])
        why = f" ({said})" if said else ""
        if status == 403:
            return (
                f"{repository}: the token may not do this{why}: reading gated repositories and writing are permissions "
                f"of their own, see {constants.ENDPOINT}/settings/tokens"
            )
        return f"{repository}: the Hub answered {status}{why}" + (f": {again}" if is_transient(cause) else "")
    offline = constants.HF_HUB_OFFLINE or isinstance(cause, OfflineModeIsEnabled)
    hint = "HF_HUB_OFFLINE is set" if offline else "check the network"
    return f"{repository}: no folder here, not in the Hub's cache, and {constants.ENDPOINT} was not reached: {hint}"
