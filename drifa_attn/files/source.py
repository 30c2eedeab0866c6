"""Where a file is: on the disk, in a folder, or in a repository of the Hugging Face hub, whose client keeps what it loaded."""

import re
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

ATTENTION = "attention.safetensors"
WHOLE = ("model.safetensors", "pytorch_model.bin")  # as a Trainer and accelerate call the checkpoint of a whole network
SCHEME = "hf://"
ADDRESS = re.compile(r"hf://(?P<repo>[^/@]+/[^/@]+)(?:@(?P<revision>[^/]+))?(?:/(?P<file>.+))?")


class Address(NamedTuple):
    """A file of a repository of the hub, "hf://user/name@revision/file"; without a revision the main one."""

    repo: str
    revision: str | None = None
    file: str = ATTENTION

    def __str__(self) -> str:
        return f"{SCHEME}{self.repo}{f'@{self.revision}' if self.revision else ''}"


def located(path: str | Path) -> Path:
    """The file that a path means: itself, the one in a folder, or for "hf://…" the one of the hub, downloaded or cached.

    Raises: ValueError, FileNotFoundError, ConnectionError: no address of the hub, or there is no such file.
    """
    if isinstance(path, str) and path.startswith(SCHEME):
        return downloaded(address(path))
    path = Path(path)
    if not path.is_dir():
        return path
    found = next((path / name for name in (ATTENTION, *WHOLE) if (path / name).is_file()), None)
    if found is None:
        held = ", ".join(sorted(entry.name for entry in path.iterdir())[:8]) or "nothing"
        raise FileNotFoundError(
            f"{path} has no {ATTENTION}, which save_pretrained writes, and no {' or '.join(WHOLE)}; it holds {held}. "
            "Name the file."
        )
    return found


def address(text: str) -> Address:
    """The parts of "hf://user/name@revision/file"; a slash within the revision is written %2F."""
    found = ADDRESS.fullmatch(text)
    if found is None:
        raise ValueError(f'a file of the hub is written "hf://user/name", "hf://user/name@revision/file", got {text!r}.')
    repo, revision, file = found["repo"], found["revision"], found["file"]
    return Address(repo, unquote(revision) if revision else None, file or ATTENTION)


def downloaded(where: Address) -> Path:
    """The file of an address, out of the cache of huggingface_hub where that has it."""
    from huggingface_hub import hf_hub_download, utils  # a dependency of timm; importing the package does not need it

    try:
        return Path(hf_hub_download(where.repo, where.file, revision=where.revision, library_name="drifa_attn"))
    except utils.LocalEntryNotFoundError as error:
        raise ConnectionError(
            f"{where} could not be reached, and its {where.file!r} is not in the cache: connect, or unset HF_HUB_OFFLINE; what "
            "was loaded once is kept in HF_HOME, and read there."
        ) from error
    except utils.GatedRepoError as error:
        raise PermissionError(f"{where} is gated: ask for access on its page, and log in (hf auth login).") from error
    except utils.RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"{where} is no repository of the hub, or a private one: check the name, or log in (hf auth login)."
        ) from error
    except utils.RevisionNotFoundError as error:
        raise FileNotFoundError(
            f"{where}: the repository {where.repo} has no revision {where.revision!r}: name a branch, a tag or a commit."
        ) from error
    except utils.EntryNotFoundError as error:
        hint = "it was not written by push_to_hub: name a file of it" if where.file == ATTENTION else "check its name"
        raise FileNotFoundError(f'{where} has no file {where.file!r}: {hint}, "{where}/file".') from error
    except utils.HFValidationError as error:
        raise ValueError(f"{where} is no name of a repository: {error}") from error
    except utils.HfHubHTTPError as error:
        raise ConnectionError(f"{where}: the hub refused {where.file!r}: {str(error).partition(chr(10))[0]}") from error
