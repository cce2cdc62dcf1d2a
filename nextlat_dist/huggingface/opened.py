"""An export opened once: what decoding, evaluation and calibration read of it, each part when it is first asked for.

    opened = open_export(path)
    opened.config, opened.weights, opened.drafter, opened.tokenizer

Needs torch, safetensors and (for the tokenizer) transformers. Nothing that lies in the export is imported.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from nextlat_dist.huggingface.base import (
    ADVICE,
    CONFIG_FILE,
    LlamaConfig,
    check_is_export,
    load_base_weights,
    weights_sha256,
)
from nextlat_dist.huggingface.drafters.catalogue import find_drafter
from nextlat_dist.huggingface.drafters.format import StoredDrafter, write_draft_vocabulary
from nextlat_dist.huggingface.stored import check_tensors, read_fields
from nextlat_dist.huggingface.tokenizer import load_tokenizer


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
        weights = load_base_weights(self.path)
        if self.config.tie_word_embeddings:
            weights.pop("lm_head.weight", None)  # some write it all the same
        check_tensors(self.path, weights, self.config.shapes(), ADVICE)
        return weights

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
        return find_drafter(self.path, self.base_sha256, self.config)

    @cached_property
    def special_tokens(self) -> SpecialTokens:
        """`generation_config.json` overrides `config.json`.

        Raises:
            UserError: one of them is damaged.
        """
        bos: int | None = None
        eos: frozenset[int] = frozenset()
        for name in (CONFIG_FILE, "generation_config.json"):
            if not os.path.isfile(self.path / name):
                continue
            fields = read_fields(self.path / name, ADVICE)
            bos = fields.integer("bos_token_id", maximum=self.config.vocab_size - 1, default=bos)
            if "eos_token_id" in fields:
                found = fields.values["eos_token_id"]
                ids = found if isinstance(found, list) else [found]
                if not all(type(index) is int for index in ids):
                    raise fields.wrong("eos_token_id", "be a token id or a list of them")
                eos = frozenset(ids)
        return SpecialTokens(bos, eos)

    @cached_property
    def tokenizer(self) -> Any:
        """The export's `transformers` tokenizer; where there is sentencepiece's file alone, that of training.

        Raises:
            UserError: it has none that transformers loads without code of its own.
        """
        return load_tokenizer(self.path)

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
