"""Says in one line what the hub, or the way to it, refuses."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from hybrid.errors import CheckpointError, DiskSpaceError, first_line
from hybrid.hub.names import HubName


class UnreachableError(CheckpointError):
    """The hub does not answer, or may not be asked."""


@contextmanager
def in_our_words(name: HubName, what: str) -> Iterator[None]:
    """Say in one line what the hub, or the way to it, refuses."""
    from huggingface_hub.errors import (  # type: ignore[attr-defined]
        EntryNotFoundError,
        HfHubHTTPError,
        HTTPError,
    )

    try:
        yield
    except (EntryNotFoundError, HfHubHTTPError, HTTPError, ConnectionError) as error:
        cause = error.__cause__  # a file that is not here hides why it could not be fetched
        raise _told(name, what, cause if isinstance(cause, HfHubHTTPError) else error) from error
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise DiskSpaceError(
            f"the disk is full, and {what} of {name} has yet to come",
            hint="free some space and run the same command again: it goes on from there",
        ) from error


def _told(name: HubName, what: str, error: BaseException) -> CheckpointError:
    from huggingface_hub import constants, errors

    if isinstance(error, errors.GatedRepoError):
        return CheckpointError(
            f"{name} is gated: its publisher asks for an agreement first",
            hint=f"accept it at https://huggingface.co/{name.repo}, then 'hf auth login'",
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return CheckpointError(
            f"{name.repo} has no revision {name.revision!r}",
            hint="leave @REVISION out for the newest",
        )
    here = f"there is no directory {name.repo!r} here"
    if isinstance(error, errors.RepositoryNotFoundError):
        return CheckpointError(
            f"{here} and no such repository on the hub, or it is private",
            hint="check the name; 'hf auth login' for one that is private",
        )
    if isinstance(error, errors.HfHubHTTPError):
        status = error.response.status_code
        if status == 404:
            return CheckpointError(
                f"{name} has no {what}", hint="name a repository of a Hugging Face model"
            )
        if status in (401, 403):
            return CheckpointError(
                f"{name} may not be read ({status})", hint="'hf auth login' with a token that may"
            )
        return UnreachableError(
            f"the hub answers {status} when asked for {name}",
            hint="try again later; what was downloaded is kept",
        )
    if constants.HF_HUB_OFFLINE:
        return UnreachableError(
            f"{here}, and HF_HUB_OFFLINE forbids to look for it on the hub",
            hint="unset HF_HUB_OFFLINE, or give the path of a model's directory",
        )
    return UnreachableError(
        f"{here}, and the hub cannot be reached: {first_line(error)}",
        hint="check the connection, or give the path of a model's directory",
    )
