"""Tells whether latents became belief states: exports side by side on a hidden Markov process with known beliefs.

    evaluate_belief(exports, data, *, fit_data=None, documents=200, fit_documents=1000, controls=True, seed=0,
                    progress=True) -> Report

Four properties with thresholds (`belief.verdicts`), effective rank without: decodability (`belief.probes`),
sufficiency, equivalence and consistent transitions (`belief.measures`). Every model answers the same questions, the two
controls included. A model without a latent predictor is rolled out with one fitted afterwards (`belief.predictor`); one
that has its own is shown with both.

Command: `nextlat evaluate belief --export gpt=DIR nextlat=DIR --data data/hmm/test --json FILE --pictures DIR`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from nextlat_dist.data.shard_format import MANIFEST_FILE
from nextlat_dist.errors import UserError
from nextlat_dist.evaluation.belief.controls import Oracle, Shuffled
from nextlat_dist.evaluation.belief.data import Histories, read_histories
from nextlat_dist.evaluation.belief.page import belief_report
from nextlat_dist.evaluation.belief.predictor import fit_predictor
from nextlat_dist.evaluation.belief.probes import decoded
from nextlat_dist.evaluation.belief.questions import Questions
from nextlat_dist.evaluation.belief.rows import EXACT, FITTED, OWN, BeliefRow
from nextlat_dist.evaluation.exports import named_exports
from nextlat_dist.inference.state_model import ExportModel
from nextlat_dist.reporting.console import Progress
from nextlat_dist.reporting.report import Report
from nextlat_dist.tasks import vocab_size

ORACLE, SHUFFLED = "oracle", "shuffled"


def evaluate_belief(
    exports: Sequence[str],
    data: Path,
    *,
    fit_data: Path | None = None,
    documents: int = 200,
    fit_documents: int = 1000,
    controls: bool = True,
    seed: int = 0,
    progress: bool = True,
) -> Report:
    """Measure every export, and the controls.

    Args:
        exports: `[name=]DIR` each; several of one name are its runs (seeds).
        data: a test set of `nextlat-data task hmm`.
        fit_data: documents that a missing p_ψ is fitted on; None: the directory `train` next to `data`.
        documents, fit_documents: how many of each are read, the first ones.
        controls: also measure exact beliefs, and the same shuffled.

    Raises:
        UserError: no export, another vocabulary, no such data, or nothing to fit a missing p_ψ on.
    """
    named = named_exports(exports)
    histories = read_histories(data, documents)
    models = [(entry, _opened(entry.path, histories)) for entry in named]
    fit_on = _fit_data(data, fit_data, fit_documents, histories, [model for _, model in models])
    questions = Questions(histories, seed)
    shown = Progress("belief", len(models) + 2 * controls, progress)
    rows: list[BeliefRow] = []
    half = len(histories.tokens) // 2
    geometry = {"exact": histories.beliefs[half:].reshape(-1, histories.beliefs.shape[-1])}
    widths = [model.predictor_hidden_size for _, model in models if model.predictor_hidden_size is not None]
    for entry, model in models:
        states = model.states(questions.tokens)
        about = questions.about_states(states)
        if entry.name not in geometry:
            geometry[entry.name] = decoded(states, histories)
        if model.has_predictor:
            transitions = questions.about_transitions(model, states)
            rows.append(BeliefRow.of(entry.name, entry.run, OWN, about, transitions))
        if fit_on is not None:
            width = model.predictor_hidden_size or max(widths, default=model.hidden_size)
            fitted = fit_predictor(model, torch.from_numpy(fit_on.tokens), width, seed)
            transitions = questions.about_transitions(fitted, states)
            rows.append(BeliefRow.of(entry.name, entry.run, FITTED, about, transitions))
        shown.add(histories.tokens.size)
    if controls:
        oracle = Oracle(histories.hmm)
        for name, control in ((ORACLE, oracle), (SHUFFLED, Shuffled(oracle, seed))):
            rows.append(questions.row(control, name, 0, EXACT))
            shown.add(histories.tokens.size)
    options = {"documents": len(histories.tokens), "fit_documents": fit_documents, "controls": controls, "seed": seed}
    return belief_report(options, rows, histories, geometry)


def _opened(path: Path, histories: Histories) -> ExportModel:
    model = ExportModel(path)
    needed = vocab_size(histories.hmm)
    if model.vocab_size < needed:
        raise UserError(
            f"{path} knows {model.vocab_size} tokens, but documents of the process {histories.hmm.process} have "
            f"{needed}; give an export that was trained on this data"
        )
    return model


def _fit_data(
    data: Path, fit_data: Path | None, count: int, histories: Histories, models: Sequence[ExportModel]
) -> Histories | None:
    """Documents to fit p_ψ on; None where there are none and every model has its own."""
    path = fit_data or data.parent / "train"
    if fit_data is None and not (path / MANIFEST_FILE).is_file():
        lacking = [model.export for model in models if not model.has_predictor]
        if not lacking:
            return None
        raise UserError(
            f"{lacking[0]} has no latent predictor, and there is no {path} to fit one on; name a training set of the "
            "same process with --fit-data"
        )
    found = read_histories(path, count)
    if found.hmm != histories.hmm:
        raise UserError(
            f"{path} is of the process {found.hmm.parameters}, {data} of {histories.hmm.parameters}; give training "
            "documents of the same one with --fit-data"
        )
    return found
