"""The method from outside: `transformers.generate` on the same prompts, plain and with its prompt-lookup drafting.

Invariant: the same weights, dtype, device and number of threads as ours, one prompt at a time, EOS ignored, and the
prefill timed apart, so that what differs is the decoding loop.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.generation.streamers import BaseStreamer

from nextlat_dist.evaluation.speculative.trials import Decoded
from nextlat_dist.huggingface.base import LlamaConfig
from nextlat_dist.inference.generation import Generation

PROMPT_LOOKUP_TOKENS = 10


class HuggingFace:
    """The base model of an export in stock transformers."""

    def __init__(self, export: Path, device: torch.device, dtype: torch.dtype) -> None:
        LlamaConfig.from_directory(export).form.register()
        self.model = (
            AutoModelForCausalLM.from_pretrained(export, dtype=dtype, trust_remote_code=False, use_safetensors=True)
            .to(device)
            .eval()
        )
        self.model.generation_config.eos_token_id = None
        self.model.generation_config.pad_token_id = 0  # asked for, never used: rows are alone

    def generate(
        self, prompt_ids: list[int], *, max_new_tokens: int, temperature: float, seed: int, prompt_lookup: bool
    ) -> Decoded:
        """One continuation; a *cycle* is one forward after the first. What was drafted where is not to be had.

        The first forward of prompt lookup reads the prompt and verifies drafts at once: it counts as the prefill, and
        its further tokens as the first one's.
        """
        options: dict[str, Any] = {"do_sample": False}
        if temperature > 0:
            options = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        if prompt_lookup:
            options["prompt_lookup_num_tokens"] = PROMPT_LOOKUP_TOKENS
        torch.manual_seed(seed)
        ids = torch.tensor([prompt_ids], device=self.model.device)
        watch = _Stopwatch()
        started = time.perf_counter()
        with torch.inference_mode():
            self.model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, streamer=watch, **options
            )
        result = Generation(cycles=len(watch.blocks) - 1)
        result.token_ids = [token for block in watch.blocks for token in block]
        result.prefill_seconds = watch.first_at - started
        result.decode_seconds = watch.last_at - watch.first_at
        on_cpu = self.model.device.type == "cpu"
        return Decoded([result], watch.last_cpu - watch.first_cpu if on_cpu else None)


class _Stopwatch(BaseStreamer):
    """Collects the tokens of every forward, and when the first and the last of them came."""

    def __init__(self) -> None:
        self.prompt_seen = False
        self.blocks: list[list[int]] = []
        self.first_at = self.last_at = self.first_cpu = self.last_cpu = 0.0

    def put(self, value: torch.Tensor) -> None:
        if not self.prompt_seen:
            self.prompt_seen = True
            return
        self.blocks.append(value.flatten().tolist())
        self.last_at, self.last_cpu = time.perf_counter(), time.process_time()
        if len(self.blocks) == 1:
            self.first_at, self.first_cpu = self.last_at, self.last_cpu

    def end(self) -> None:
        pass
