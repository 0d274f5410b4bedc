"""A model of the Hugging Face hub: ``org/name`` or ``org/name@revision``; safetensors only, no code from the hub.

``HF_HUB_OFFLINE=1`` uses the hub's local cache alone. The digest is the commit the weights came from.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from d2obench.errors import ModelError
from d2obench.models.base import Dimensions, LoadedModel, Progress, dimensions_of, loaded
from d2obench.models.local import weight_files
from d2obench.models.reading import read_config, read_folder, silent
from d2obench.suite.placement import Placement

if TYPE_CHECKING:
    import torch

WANTED = ("*.json", "model*.safetensors", "tokenizer.model", "*.txt", "*.jinja")


class Hub:
    """A source of one hub model.

    Args:
        name: ``org/name``, with ``@`` and a branch, tag or commit where it should be pinned.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.repo, _, self.revision = name.partition("@")

    def check(self) -> None:
        self._fetched(["config.json"])

    def describe(self) -> Dimensions:
        return dimensions_of(read_config(self._fetched(["config.json"])))

    def load(
        self, dtype: torch.dtype, device: torch.device, progress: Progress, placement: Placement | None = None
    ) -> LoadedModel:
        folder = self._complete()
        model, tokenizer = read_folder(folder, dtype, device, placement=placement)
        return loaded(self.name, model, tokenizer, digest=folder.name, has_sense=True)

    def pull(self, progress: Progress) -> Path | None:
        return self._complete()

    def _complete(self) -> Path:
        folder = self._fetched(WANTED)
        if not any(folder.glob("model*.safetensors")):
            raise ModelError(
                f"{self.name} has no safetensors weights",
                why="pickled ones can run code when they are read, so d2obench does not",
                remedy="use a revision that has them, or convert it and use --model FOLDER",
            )
        weight_files(folder)
        return folder

    @silent()
    def _fetched(self, patterns: Sequence[str]) -> Path:
        """The snapshot folder of the hub's cache with at least the files of ``patterns``."""
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import (
            GatedRepoError,
            HfHubHTTPError,
            HFValidationError,
            LocalEntryNotFoundError,
            RepositoryNotFoundError,
            RevisionNotFoundError,
        )

        remedy = "use a local folder (--model PATH), or the default --model embedded"
        try:
            return Path(snapshot_download(self.repo, revision=self.revision or None, allow_patterns=list(patterns)))
        except GatedRepoError:
            why, remedy = "its owner gives access on request only", "ask there, then set HF_TOKEN"
        except RepositoryNotFoundError:
            why = "the hub has no such model, or it is private"
        except RevisionNotFoundError:
            why, remedy = f"it has no revision '{self.revision}'", "use a branch, tag or commit of it"
        except HFValidationError:
            why = "that is no hub id"
        except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as problem:
            why = "HF_HUB_OFFLINE is set and it is not in the hub's cache" if _offline() else _reason(problem)
        raise ModelError(f"can't fetch {self.name}", why=why, remedy=remedy)


def _offline() -> bool:
    from huggingface_hub.constants import HF_HUB_OFFLINE

    return bool(HF_HUB_OFFLINE)


def _reason(problem: Exception) -> str:
    if isinstance(problem, OSError) and problem.errno == errno.ENOSPC:
        return "the disk is full"
    return "the hub can't be reached and the model is not in its cache"
