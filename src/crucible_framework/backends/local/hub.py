"""Models of the Hugging Face hub: their files, and clear refusals. This file does not know how a model is loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ...config import places
from ...errors import AuthError, ConfigError, ServiceError
from . import smollm

__all__ = ["advice", "snapshot"]

_HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt"]


def advice(name: str) -> str:
    """What to do where a hub model cannot be had."""
    licence = f"accept its licence on the hub page of {name}, " if name.startswith(("meta-llama/", "google/", "mistralai/")) else ""
    return f"To use it, {licence}set HF_TOKEN if it is gated, or pass a folder with its files as base_model. Works offline: {smollm.NAME!r}."


def snapshot(name: str, item_bytes: int | None, check: Callable[[str, int], None]) -> Path:
    """The snapshot folder of a hub model.

    Args:
        name: organisation/name.
        item_bytes: size of a weight; None fetches only tokenizer and configuration.
        check: refuses a model of so many bytes.

    Raises:
        AuthError: the model is gated.
        ConfigError: there is no such model.
        ServiceError: it is not cached and the hub cannot be reached, or the hub fails.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

    patterns = [p for p in _HUB_FILES if item_bytes is not None or p != "*.safetensors"]
    alone = "offline mode is on (HF_HUB_OFFLINE or CRUCIBLE_OFFLINE)" if places().offline else ""
    numbers = 0
    try:
        if not alone and item_bytes is not None:
            try:
                tensors = HfApi().model_info(name, timeout=10).safetensors
                numbers = sum(tensors.parameters.values()) if tensors is not None else 0
            except (HfHubHTTPError, HFValidationError):
                raise
            except Exception as error:  # the hub's client lets its transport's own errors through
                alone = f"the hub cannot be reached ({type(error).__name__})"
        check(name, numbers * (item_bytes or 0))
        return Path(snapshot_download(name, allow_patterns=patterns, local_files_only=bool(alone), etag_timeout=10))
    except GatedRepoError as error:
        raise AuthError(f"The hub refuses {name!r}: it is gated and this account has no access. {advice(name)}") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise ConfigError(f"The hub has no model {name!r} that this account may see. Check the spelling. {advice(name)}") from error
    except LocalEntryNotFoundError as error:
        why = alone or "the hub cannot be reached"
        raise ServiceError(f"{name!r} is not in the Hugging Face cache, and {why}. {advice(name)}", retryable=not places().offline) from error
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        if status in (401, 403):
            raise AuthError(f"The hub refuses {name!r} with HTTP {status}. {advice(name)}") from error
        raise ServiceError(f"The hub answered HTTP {status} for {name!r}. Try again later. {advice(name)}", status=status, retryable=True) from error
