"""Hugging Face's cache and hub: what is on the disk is used as it is, the network only for what is missing."""

import re
from pathlib import Path

import torch
from diffusers import StableDiffusionXLPipeline
from huggingface_hub import constants, snapshot_download

from runtime.errors import InputError, first_line
from runtime.loading.folder import MODELS
from runtime.loading.quiet import quiet
from runtime.loading.weights import find_weights


def is_hub_id(source: str) -> bool:
    """Return whether a source that is not a path on this disk can be a repository's "organisation/name"."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", source) is not None


def cache_folder(repository: str) -> Path:
    """Return where Hugging Face's cache keeps a repository: what an error names as the place that was looked in."""
    return Path(constants.HF_HUB_CACHE) / f"models--{repository.replace('/', '--')}"


def fetch_files(repository: str, patterns: list[str], *, offline: bool) -> Path | None:
    """Return a repository's folder with the files that fit the patterns; None where they are not to be had."""
    try:
        return Path(
            snapshot_download(
                repository,
                allow_patterns=patterns,
                local_files_only=offline,
                cache_dir=constants.HF_HUB_CACHE,
            )
        )
    except Exception:  # not cached, no network, no such repository: classes of four libraries
        return None


def fetch_pipeline(repository: str, *, dtype: torch.dtype, allow_pickle: bool = False) -> Path:
    """Return the folder of a hub pipeline: from the cache where it is whole there, else asked for from the hub.

    Raises InputError that names the folder in the cache where there is nothing at all.
    """
    folder, reason = None, None
    for offline in (True, False):
        for variant in ("fp16", None) if dtype == torch.float16 else (None,):
            try:
                with quiet(bars=True):
                    downloaded = StableDiffusionXLPipeline.download(
                        repository,
                        variant=variant,
                        use_safetensors=None if allow_pickle else True,
                        local_files_only=offline,
                        cache_dir=constants.HF_HUB_CACHE,
                    )
                folder = Path(downloaded)
            except Exception as error:  # as in fetch_files
                reason = error.__cause__ or error
            if folder is not None and _is_whole(folder, dtype, allow_pickle):
                return folder
    if folder is None:
        raise InputError(
            f"model {repository}: not on this disk, looked in {cache_folder(repository)}; "
            f"not to be had from the hub: {first_line(reason)}"
        ) from reason
    return folder  # in part or of another kind: loading it says what is wrong, with the file's name


def _is_whole(folder: Path, dtype: torch.dtype, allow_pickle: bool) -> bool:
    try:
        for part in MODELS:
            find_weights(folder / part, dtype, allow_pickle)
    except InputError:
        return False
    return True
