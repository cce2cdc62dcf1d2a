"""An export opened once: what decoding, evaluation and calibration read of it, each part when it is first asked for.

    opened = open_export(path)
    opened.config, opened.weights, opened.drafter, opened.tokenizer

Needs torch, safetensors and (for the tokenizer) transformers. Nothing that lies in the export is imported.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from nextlat_dist.errors import UserError
from nextlat_dist.huggingface.base import LlamaConfig, check_is_export, load_base_weights, weights_sha256
from nextlat_dist.huggingface.drafters.catalogue import find_drafter
from nextlat_dist.huggingface.drafters.format import StoredDrafter, write_draft_vocabulary


@dataclass(frozen=True)
class SpecialTokens:
    """The BOS id, if any, and the EOS ids."""

    bos: int | None
    eos: frozenset[int]


@dataclass(frozen=True)
class OpenedExport:
    """An export directory; see `open_export`."""

    path: Path
    config: LlamaConfig

    @cached_property
    def weights(self) -> dict[str, torch.Tensor]:
        """The base weights by `LlamaForCausalLM`'s names, in their stored dtype, on the CPU.

        They are pages of the file, mapped into memory: keeping them costs nothing that the system could not take back.
        Never write into them.
        """
        return load_base_weights(self.path)

    @cached_property
    def base_sha256(self) -> str:
        """Content hash of the base weights."""
        return weights_sha256(self.weights)

    @cached_property
    def drafter(self) -> StoredDrafter | None:
        """What drafts for the base, if anything does.

        Raises:
            UserError: it belongs to other base weights, is damaged, or is of a kind that nothing installed brings.
        """
        return find_drafter(self.path, self.base_sha256)

    @cached_property
    def special_tokens(self) -> SpecialTokens:
        """`generation_config.json` overrides `config.json`."""
        merged: dict[str, Any] = {}
        for name in ("config.json", "generation_config.json"):
            path = self.path / name
            if path.is_file():
                merged.update({key: value for key, value in json.loads(path.read_text()).items() if value is not None})
        eos = merged.get("eos_token_id", [])
        return SpecialTokens(merged.get("bos_token_id"), frozenset([eos] if isinstance(eos, int) else eos))

    @cached_property
    def tokenizer(self) -> Any:
        """The export's `transformers` tokenizer.

        Raises:
            UserError: it has none that transformers loads without code of its own.
        """
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(self.path, trust_remote_code=False)
        except (OSError, ValueError) as error:
            reason = str(error).strip().split("\n")[0]
            raise UserError(
                f"{self.path} has no tokenizer that transformers loads without code from there ({reason}); export the "
                "run again"
            ) from None

    def set_draft_vocabulary(self, ids: torch.Tensor | None) -> None:
        """Let the drafter draft from these ids (int64, ascending) from now on; None: from all. A calibration measured
        with other ids is removed.
        """
        stored = self.drafter
        assert stored is not None
        assert stored.kind.draft_vocabulary
        write_draft_vocabulary(stored.directory, ids)
        self.__dict__["drafter"] = replace(stored, draft_vocabulary=ids)  # instead of what was read before


def open_export(path: Path | str) -> OpenedExport:
    """The export in the directory `path`.

    Raises:
        UserError: no export, or no plain Llama.
    """
    path = Path(path)
    check_is_export(path)
    return OpenedExport(path, LlamaConfig.from_directory(path))
