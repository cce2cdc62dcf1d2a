"""Did the latents become belief states? Exports side by side on a hidden Markov process whose beliefs are known.

    evaluate_belief(exports, data, *, fit_data=None, documents=200, fit_documents=1000, controls=True, seed=0,
                    json_path=None, picture_dir=None, progress=True) -> dict

Four properties with thresholds (`belief_verdicts`), effective rank without: decodability (`belief_probes`),
sufficiency, equivalence and consistent transitions (`belief_measures`). Every model answers the same questions, the two
controls included. A model without a latent predictor is rolled out with one fitted afterwards (`belief_predictor`); one
that has its own is shown with both.

Command: `nextlat evaluate belief --export gpt=DIR nextlat=DIR --data data/hmm/test --json FILE --pictures DIR`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nextlat_dist.data.shard_format import MANIFEST_FILE
from nextlat_dist.errors import UserError
from nextlat_dist.evaluation.belief import measures
from nextlat_dist.evaluation.belief.controls import Oracle, Shuffled
from nextlat_dist.evaluation.belief.data import Histories, counterfactuals, find_pairs, read_histories
from nextlat_dist.evaluation.belief.page import COLUMNS, grouped, table_rows, write_page
from nextlat_dist.evaluation.belief.predictor import fit_predictor
from nextlat_dist.evaluation.belief.probes import decodability, decoded
from nextlat_dist.evaluation.belief.verdicts import PROPERTIES, verdicts
from nextlat_dist.evaluation.effective_rank import effective_rank
from nextlat_dist.evaluation.exports import named_exports
from nextlat_dist.evaluation.state_model import Latents, StateModel
from nextlat_dist.reporting import report
from nextlat_dist.tasks import vocab_size

OWN, FITTED, EXACT = "own", "fitted", "exact"  # whose p_ψ a row was rolled out with
ORACLE, SHUFFLED = "oracle", "shuffled"


class Questions:
    """What every model is asked: documents, pairs and counterfactuals, drawn once."""

    def __init__(self, histories: Histories, seed: int) -> None:
        self.histories, self.seed = histories, seed
        self.pairs = find_pairs(histories, seed)
        self.counterfactuals = counterfactuals(histories, seed)
        self.tokens = torch.from_numpy(histories.tokens)

    def about_states(self, states: Tensor) -> dict[str, Any]:
        """Decodability, equivalence and effective rank: what needs no p_ψ."""
        names = ("equivalence_auc", "equivalence_auc_random", "equivalence_ratio")
        pairs = dict.fromkeys(names) if self.pairs is None else measures.equivalence(states, self.pairs)
        rank = effective_rank(states.reshape(-1, states.shape[-1]))
        return decodability(states, self.histories, self.seed) | pairs | {"effective_rank": rank}

    def about_transitions(self, model: StateModel, states: Tensor) -> dict[str, Any]:
        """Sufficiency and transitions: by step, at the first one, and the worst."""
        rolled = measures.rollouts(model, states, self.histories)
        stationary = np.array(rolled["kl_stationary"])
        ratio = (np.array(rolled["kl"]) / stationary).tolist()
        other = None
        if self.counterfactuals is not None:
            other = measures.counterfactual_errors(model, states, self.counterfactuals, self.histories.steps)
        return {
            "kl": rolled["kl"],
            "kl_joint": sum(rolled["kl"]),
            "kl_ratio": ratio,
            "first_kl_ratio": ratio[0],
            "worst_kl_ratio": max(ratio),
            "forgetful_ratio": (np.array(rolled["kl_forgetful"]) / stationary).tolist(),
            "transition_error": rolled["transition_error"],
            "first_transition_error": rolled["transition_error"][0],
            "counterfactual_error": other,
            "first_counterfactual_error": None if other is None else other[0],
            "worst_transition_error": max(rolled["transition_error"] + (other or [])),
        }

    def row(self, model: StateModel, name: str, run: int, predictor: str) -> dict[str, Any]:
        states = model.states(self.tokens)
        named = {"model": name, "run": run, "predictor": predictor}
        return named | self.about_states(states) | self.about_transitions(model, states)


def evaluate_belief(
    exports: Sequence[str],
    data: Path,
    *,
    fit_data: Path | None = None,
    documents: int = 200,
    fit_documents: int = 1000,
    controls: bool = True,
    seed: int = 0,
    json_path: Path | None = None,
    picture_dir: Path | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Measure, print table and verdicts, write JSON and page where asked, and return the content of the JSON.

    Args:
        exports: `[name=]DIR` each; several of one name are its runs (seeds).
        data: a test set of `nextlat-data task hmm`.
        fit_data: documents that a missing p_ψ is fitted on; None: the directory `train` beside `data`.
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
    shown = report.Progress("belief", len(models) + 2 * controls, progress)
    rows: list[dict[str, Any]] = []
    half = len(histories.tokens) // 2
    geometry = {"exact": histories.beliefs[half:].reshape(-1, histories.beliefs.shape[-1])}
    widths = [model.predictor_hidden_size for _, model in models if model.predictor_hidden_size is not None]
    for entry, model in models:
        states = model.states(questions.tokens)
        about = {"model": entry.name, "run": entry.run} | questions.about_states(states)
        if entry.name not in geometry:
            geometry[entry.name] = decoded(states, histories)
        if model.has_predictor:
            rows.append({**about, "predictor": OWN} | questions.about_transitions(model, states))
        if fit_on is not None:
            width = model.predictor_hidden_size or max(widths, default=model.hidden_size)
            fitted = fit_predictor(model, torch.from_numpy(fit_on.tokens), width, seed)
            rows.append({**about, "predictor": FITTED} | questions.about_transitions(fitted, states))
        shown.add(histories.tokens.size)
    if controls:
        oracle = Oracle(histories.hmm)
        for name, control in ((ORACLE, oracle), (SHUFFLED, Shuffled(oracle, seed))):
            rows.append(questions.row(control, name, 0, EXACT))
            shown.add(histories.tokens.size)
    judged = _judged(rows)
    options = {"documents": len(histories.tokens), "fit_documents": fit_documents, "controls": controls, "seed": seed}
    content = report.envelope("nextlat evaluate belief", options, _summary(rows, judged), rows) | {
        "process": histories.hmm.parameters,
        "about": _about(histories, rows[0]["last_token_r2"]),
        "predictors": _predictors(rows),
        "verdicts": [sentence for name, own in judged.items() for sentence in verdicts(name, own)],
    }
    print(report.table(COLUMNS, table_rows(rows)), end="\n\n")
    print(content["about"], content["predictors"], *content["verdicts"], sep="\n")
    if json_path is not None:
        report.write_json(json_path, content)
    if picture_dir is not None:
        write_page(content, geometry, picture_dir)
    return content


def _opened(path: Path, histories: Histories) -> Latents:
    latents = Latents(path)
    needed = vocab_size(histories.hmm)
    if latents.vocab_size < needed:
        raise UserError(
            f"{path} knows {latents.vocab_size} tokens, but documents of the process {histories.hmm.process} have "
            f"{needed}; give an export that was trained on this data"
        )
    return latents


def _fit_data(
    data: Path, fit_data: Path | None, count: int, histories: Histories, models: Sequence[Latents]
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


def _judged(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """The rows that the verdicts are about, by model: with its own p_ψ where it has one."""
    judged: dict[str, list[Mapping[str, Any]]] = {}
    for (name, _), own in grouped(rows).items():  # a model's own p_ψ comes first
        judged.setdefault(name, own)
    return judged


def _summary(rows: Sequence[Mapping[str, Any]], judged: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """`{model}_{measure}`: mean over runs, with `_sd` where there are several; `{model}_{property}`: share of runs in
    which it holds. What was measured with a fitted p_ψ beside an own one has `_fitted` behind the model.
    """
    summary: dict[str, Any] = {}
    for (name, predictor), own in grouped(rows).items():
        prefix = f"{name}_fitted" if (judged[name][0]["predictor"], predictor) == (OWN, FITTED) else name
        for measure in own[0]:
            values = [row[measure] for row in own]
            if all(isinstance(value, float) for value in values):
                summary[f"{prefix}_{measure}"] = float(np.mean(values))
                if len(values) > 1:
                    summary[f"{prefix}_{measure}_sd"] = float(np.std(values, ddof=1))
        for entry in PROPERTIES:
            held = [entry.holds(row) for row in own]
            if None not in held:
                summary[f"{prefix}_{entry.name}"] = float(np.mean([bool(value) for value in held]))
    return summary


def _about(histories: Histories, floor: float) -> str:
    parameters = ", ".join(f"{name} {value}" for name, value in histories.hmm.parameters.items())
    return (
        f"Process: {parameters}; {len(histories.tokens)} documents that no model was trained on, {histories.steps} "
        f"steps ahead. The last token alone explains R² {floor:.3f} of the belief."
    )


def _predictors(rows: Sequence[Mapping[str, Any]]) -> str:
    kinds = {row["predictor"] for row in rows}
    words = []
    if OWN in kinds:
        words.append("p_ψ own: the latent predictor trained with the model; the verdicts are about it.")
    if FITTED in kinds:
        words.append(
            "p_ψ fitted: one of the same architecture, fitted afterwards to frozen states of training documents; a "
            "model without its own is judged by it."
        )
    return " ".join(words)
