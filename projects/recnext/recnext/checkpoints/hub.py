"""Segmentors on the Hugging Face hub, through huggingface_hub: its tokens, its cache, its ``HF_ENDPOINT``.

Only files are moved here. What they may hold is decided where they are read.
"""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from ..utils.errors import UserError, first_line, printable
from .folder import DESCRIPTION, HUB, WEIGHTS

LOG_IN = 'Log in with hf auth login, or set HF_TOKEN.'


class HubError(UserError):
    """The hub, or huggingface_hub, refuses or cannot be reached."""


class Repository(NamedTuple):
    """A repository of the hub, and which state of it."""

    name: str  # 'user/name'
    revision: str | None = None  # branch, tag or commit; None means the newest

    def __str__(self) -> str:
        return f'{HUB}{self.name}{f"@{self.revision}" if self.revision else ""}'


def parse_repository(address: str) -> Repository:
    """Read ``hf://user/name``, ``hf://user/name@revision``, or the same without the scheme.

    Raises:
        UserError: it is called otherwise.
    """
    found = re.fullmatch(r'([\w.-]+/[\w.-]+)(?:@([\w./-]+))?', address.removeprefix(HUB))
    if found is None:
        raise UserError(f'{printable(address)} is no repository; expected hf://user/name or hf://user/name@revision.')
    return Repository(*found.groups())


def pull_description(repository: Repository) -> Path:
    """Download ``config.json``, unless the cache has it; without a network, the cached one.

    Raises:
        HubError: it cannot be had.
    """
    import huggingface_hub

    with _asked(repository):
        name, revision = repository
        return Path(huggingface_hub.hf_hub_download(name, DESCRIPTION, revision=revision))


def pull_weights(repository: Repository, description: Path) -> Path:
    """Download ``model.safetensors`` of the commit that a description is from, unless the cache has it; say its size.

    Raises:
        HubError: it cannot be had.
    """
    import huggingface_hub

    # The description lies in a folder that is called as its commit: the branch may have moved since.
    commit = description.parent.name
    with _asked(repository):
        if not isinstance(huggingface_hub.try_to_load_from_cache(repository.name, WEIGHTS, revision=commit), str):
            address = huggingface_hub.hf_hub_url(repository.name, WEIGHTS, revision=commit)
            size = huggingface_hub.HfApi().get_hf_file_metadata(url=address).size
            print(f'{repository}: downloading {WEIGHTS}, {(size or 0) / 1e6:.1f} MB', flush=True)
        return Path(huggingface_hub.hf_hub_download(repository.name, WEIGHTS, revision=commit))


def push_folder(folder: Path, repository: Repository, private: bool) -> str:
    """Put the files of a folder into a repository, as one commit; the repository is created if it is not there.

    Returns:
        The address of the commit.

    Raises:
        HubError: there is no token or no permission, or the hub cannot be reached.
    """
    import huggingface_hub

    api = huggingface_hub.HfApi()
    with _asked(repository):
        api.create_repo(repository.name, private=private or None, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repository.name, folder_path=folder, revision=repository.revision, commit_message='recnext push'
        )
    return commit.commit_url


@contextlib.contextmanager
def _asked(repository: Repository) -> Iterator[None]:
    """Say in a few lines what huggingface_hub says in many."""
    from huggingface_hub import errors

    try:
        yield
    except errors.LocalEntryNotFoundError as error:
        reason = first_line(error.__cause__ or error)
        raise HubError(f'{repository} cannot be reached, and is not in the cache. ({printable(reason, 200)})') from None
    except errors.GatedRepoError:
        raise HubError(f'{repository} is gated: ask for access on its page. {LOG_IN}') from None
    except errors.RepositoryNotFoundError:
        raise HubError(f'{repository}: no such repository, or a private one. {LOG_IN}') from None
    except errors.RevisionNotFoundError:
        raise HubError(f'{repository}: the repository has no such revision.') from None
    except errors.EntryNotFoundError:
        raise HubError(
            f'{repository} lacks {DESCRIPTION} or {WEIGHTS}: no segmentor of recnext push. Other checkpoints can be '
            'named by their address, beside a config.'
        ) from None
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        known = {401: f'no valid token. {LOG_IN}', 403: 'the token has no permission for this.'}
        raise HubError(f'{repository}: {known.get(status) or f"the hub answers {status}."}') from None
    except Exception as error:  # of the HTTP library, which changes, and of failed checks
        cause = error.__cause__ or error
        reason = printable(first_line(cause), 200)
        raise HubError(f'{repository}: {type(cause).__name__}: {reason}') from None
