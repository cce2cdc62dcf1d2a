"""EleutherAI's lm-evaluation-harness: its tasks, loaded, and one export run on them.

The harness does all of it: prompts, scoring, standard errors, data sets (from the Hugging Face Hub, or its cache). One
thing is repaired: running text (wikitext) has one BOS in front as in training, where the harness by itself would have
two.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nextlat_dist.errors import UserError

BOOTSTRAPS = 100  # resamples for the standard error of what is no mean, such as a perplexity: known to 1 in √200, 7%


def load_tasks(names: Sequence[str], include_path: Path | None) -> tuple[Any, list[Any]]:
    """The harness's task manager, and its tasks and groups. Before a model is loaded: something may be missing.

    Raises:
        UserError: the harness is not installed, a task is unknown, or its data set cannot be fetched.
    """
    try:
        from lm_eval.tasks import TaskManager  # type: ignore[import-untyped]
    except ModuleNotFoundError:
        raise UserError(
            "nextlat evaluate lm needs lm-evaluation-harness, which is not installed; run "
            "`pip install 'nextlat-dist[eval]'`"
        ) from None
    if include_path is not None and not include_path.is_dir():
        raise UserError(f"--include-path {include_path} is no folder; name one with the YAML files of tasks")
    folder = None if include_path is None else str(include_path)
    manager = TaskManager(include_path=folder, include_defaults=False)
    if not set(names) <= set(manager.all_tasks):
        manager = TaskManager(include_path=folder)  # reads the harness's own thousands of files, for seconds
    loaded: list[Any] = []
    for name in names:
        if name not in manager.all_tasks:
            near = difflib.get_close_matches(name, manager.all_tasks, n=1)
            raise UserError(
                f"--tasks names {name!r}, which lm-evaluation-harness does not know"
                + (f"; the nearest name is {near[0]!r}" if near else "; `lm-eval ls tasks` lists what it does")
            )
        try:
            found = manager.load(name)
        except (OSError, ValueError) as error:  # what `datasets` raises for a data set that is not to be had
            reason = str(error).splitlines()[0].rstrip(".")
            raise UserError(
                f"the data set of task {name} cannot be fetched ({reason}); connect to the Hugging Face Hub (and unset "
                "HF_HUB_OFFLINE), or run the command once on a connected machine and copy its HF_HOME here, or leave "
                f"{name} out of --tasks"
            ) from error
        groups = found.get("groups", {})
        loaded += [groups[name]] if name in groups else found["tasks"].values()
    return manager, loaded


def run_tasks(export: Path, manager: Any, tasks: list[Any], limit: int | None, batch_size: int) -> dict[str, Any]:
    """The harness's results of one export, as it returns them.

    Raises:
        UserError: the export is damaged, or has no tokenizer that transformers loads.
    """
    import torch
    from lm_eval import simple_evaluate  # type: ignore[import-untyped]
    from lm_eval.models.huggingface import HFLM  # type: ignore[import-untyped]

    from nextlat_dist.huggingface.opened import open_export
    from nextlat_dist.huggingface.tokenizer import TrainingTokenizer

    class OneBos(HFLM):
        """Running text as in training, after one BOS. The harness puts one in front of what the tokenizer gives, which
        begins with BOS already, and would score that too.
        """

        def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
            self.add_bos_token: bool | None = False
            try:
                return list(super().loglikelihood_rolling(requests, disable_tqdm))
            finally:
                self.add_bos_token = None  # the tokenizer's own way

    opened = open_export(export)
    if not opened.weights or isinstance(opened.tokenizer, TrainingTokenizer):
        raise UserError(
            f"{export} has sentencepiece's file alone, which lm-evaluation-harness does not read; export the run "
            "without --no-tokenizer"
        )
    opened.config.form.register()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = simple_evaluate(
        OneBos(str(export), device=device, batch_size=batch_size, trust_remote_code=False, use_safetensors=True),
        tasks=tasks,
        task_manager=manager,  # or it reads all its files again
        limit=limit,
        bootstrap_iters=BOOTSTRAPS,
        log_samples=False,
    )
    assert found is not None, "rank 0 alone evaluates"
    return dict(found)
