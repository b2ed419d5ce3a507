"""Where a checkpoint is: a local path, or a model on the Hugging Face hub that is fetched into its cache."""

from __future__ import annotations

import re
from pathlib import Path

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(/[\w.-]+)*(@[\w./-]+)?")
_FILES = ("*.json", "*.safetensors", "*.yaml")
_PUBLISHED_OWNER, _PUBLISHED_TOKENIZER = "NX-AI", "NX-AI/xLSTM-7b"


def locate(path_or_hub_id: str | Path) -> Path:
    """A local path for ``path_or_hub_id``.

    Args:
        path_or_hub_id: an existing path, or ``owner/name`` on the hub, optionally followed by a folder inside
            the repository (``owner/name/folder``, as in the scaling-law models) and by ``@revision``.

    Raises:
        FileNotFoundError: neither exists, or the hub cannot be reached.
    """
    path = Path(path_or_hub_id)
    if path.exists():
        return path
    name = str(path_or_hub_id)
    if not _HUB_ID.fullmatch(name):
        raise FileNotFoundError(f"checkpoint '{name}' does not exist")
    name, _, revision = name.partition("@")
    owner, repository, *folders = name.split("/")
    folder = "/".join(folders)
    patterns = [f"{folder}/{pattern}" if folder else pattern for pattern in _FILES]
    root = _download(f"{owner}/{repository}", revision or None, patterns)
    if not (root / folder).is_dir():
        raise FileNotFoundError(f"'{owner}/{repository}' on the Hugging Face hub has no folder '{folder}'")
    return root / folder


def published_tokenizer(hub_id: str) -> Path | None:
    """The tokenizer that the published models share, for those that come without; None for other models."""
    if Path(hub_id).exists() or hub_id.split("/")[0] != _PUBLISHED_OWNER:
        return None
    return _download(_PUBLISHED_TOKENIZER, None, ["tokenizer*.json", "special_tokens_map.json"])


def locate_tokenizer(path_or_hub_id: str | Path) -> Path:
    """A local path for a tokenizer: an existing path, or the tokenizer files of ``owner/name`` on the hub.

    Raises:
        FileNotFoundError: neither exists, or the hub cannot be reached.
    """
    name = str(path_or_hub_id)
    if Path(name).exists():
        return Path(name)
    if not _HUB_ID.fullmatch(name):
        raise FileNotFoundError(f"tokenizer '{name}' does not exist")
    repository, _, revision = name.partition("@")
    return _download(repository, revision or None, ["tokenizer*.json", "special_tokens_map.json"])


def _download(repository: str, revision: str | None, patterns: list[str]) -> Path:
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(repository, revision=revision, allow_patterns=patterns))
    except Exception as error:  # the hub client raises dozens of kinds
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise FileNotFoundError(
            f"'{repository}' is neither a path here nor available from the Hugging Face hub: {reason}"
        ) from None
