"""Old names of modules and functions still work, with a warning; `old_names.txt` lists every public name there was.

Each line of that file is a module and its public names as they were before modules moved. `GONE` holds those that went
on purpose.
"""

from __future__ import annotations

import importlib
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from nextlat_dist.moved_names import MODULES, NAMES

CHECKOUT = Path(__file__).parents[1]
OLD_NAMES = {
    module: names.split()
    for module, _, names in (
        line.partition(":") for line in Path(__file__).with_name("old_names.txt").read_text().splitlines()
    )
}
REPORT = "measuring returns a Report; drawing returns a figure, and `publish` writes both"
BATCH = "model.rows.Batch names the parts of a batch"
GONE: dict[str, str] = {  # "module.name": why
    "nextlat_dist.doctor.software.check_extension": "training builds none; check_extensions looks at all locks",
    "nextlat_dist.report.envelope": "Report.content gives it",
    "nextlat_dist.evaluation.run_report.EXPORT_REPORT": "the names of a run's files stand in nextlat_dist.files",
    "nextlat_dist.evaluation.run_report.draw_loss_terms": REPORT,
    **{
        f"nextlat_dist.model.embedding.{name}": BATCH
        for name in ("DOCUMENT", "LABEL", "LOSS_MASK", "TOKEN", "pack_rows")
    },
    "nextlat_dist.model.embedding.embed_for_predictor": "objectives are called with named inputs (model.rows)",
    "nextlat_dist.model.embedding.lend_weight": "objectives are called with named inputs (model.rows)",
    "nextlat_dist.training.engine_state.optimizer_step": "Engine.optimizer_steps gives it",
    "nextlat_dist.training.optimizer.clip_before_step": "the engine clips",
    "nextlat_dist.training.optimizer.global_gradient_norm": "ranks exchange their shares with the loss terms",
    "nextlat_dist.training.signals.installed_request": "the request is passed to train()",
    "nextlat_dist.evaluation.belief_page.CURVES": REPORT,
    "nextlat_dist.evaluation.belief_page.draw_geometry": REPORT,
    "nextlat_dist.evaluation.belief_page.draw_steps": REPORT,
    "nextlat_dist.evaluation.belief_page.write_page": REPORT,
    "nextlat_dist.evaluation.city_map.draw_maps": REPORT,
    "nextlat_dist.evaluation.task_answers.open_decoder": "ExportModel.decoder: an export is opened once",
    "nextlat_dist.evaluation.task_pictures.draw_pictures": REPORT,
    "nextlat_dist.evaluation.task_report.table": REPORT,
    "nextlat_dist.evaluation.task_scoring.score_export": "tasks.catalogue.scorer_of names the function of a task",
    "nextlat_dist.bench.path_star.train_steps": "a helper of one caller",
    "nextlat_dist.bench.gpu_decoding.costs": "named_costs reads the costs' own row",
    "nextlat_dist.evaluation.speculative_pictures.draw_pictures": "reporting.publish draws the pictures of a report",
    "nextlat_dist.evaluation.speculative_summary.CELL_KEYS": "a cell is a record",
    "nextlat_dist.evaluation.speculative_summary.CLAIMS": "summary.claims gives records",
    "nextlat_dist.evaluation.speculative_summary.CLOCKS": "summary.claims gives records",
    "nextlat_dist.evaluation.speculative_summary.cells_with": "summary.claims gives records",
    "nextlat_dist.evaluation.speculative_words.verdicts": "Claim.sentence, of summary.claims",
    "nextlat_dist.evaluation.calibrate.drafter_directory": "`calibration.calibrate.drafter_of` says it",
    "nextlat_dist.export.layout.Config": "a type variable; a drafter's kind says the type of its config",
    "nextlat_dist.doctor.examine.show": "shown returns the text, the command says it",
    "nextlat_dist.doctor.software.CONSTRAINTS": "config.shipped finds them, in a wheel too",
}


@pytest.mark.parametrize("module", OLD_NAMES)
def test_every_public_name_is_still_served(module: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        found = importlib.import_module(module)
        missing = [name for name in OLD_NAMES[module] if f"{module}.{name}" not in GONE and not hasattr(found, name)]
    assert missing == []


def test_what_is_gone_is_gone() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        for name in GONE:
            module, _, attribute = name.rpartition(".")
            assert attribute in OLD_NAMES[module]
            assert not hasattr(importlib.import_module(module), attribute), name


def test_tables_name_old_modules_only_and_no_chain() -> None:
    assert set(MODULES) | set(NAMES) <= set(OLD_NAMES)
    for successor in MODULES.values():
        assert successor not in MODULES
        assert importlib.util.find_spec(successor) is not None, successor
    for names in NAMES.values():
        assert not any(target.partition(":")[0] in MODULES for target in names.values())


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=CHECKOUT, check=False)


def test_an_old_module_is_the_new_one_and_says_so() -> None:
    result = python("-c", "from nextlat_dist.report import machine\nprint(machine.__module__)")
    assert result.stdout == "nextlat_dist.reporting.report\n", result.stderr
    assert result.stderr.startswith("<string>:1: DeprecationWarning: nextlat_dist.report is now nextlat_dist.reporting")


def test_an_old_module_where_a_package_is_now() -> None:
    program = "from nextlat_dist.data.storage import Storage\nfrom nextlat_dist.data.storage import cache\n"
    result = python("-W", "error", "-c", program)
    assert "DeprecationWarning: nextlat_dist.data.storage.Storage is now nextlat_dist.data.records" in result.stderr
    result = python("-c", f"{program}print(Storage.__module__, cache.__name__)")
    assert result.stdout == "nextlat_dist.data.records nextlat_dist.data.storage.cache\n", result.stderr


def test_what_never_was_is_missing() -> None:
    for program in ("from nextlat_dist.report import nothing", "from nextlat_dist.data.storage import nothing"):
        result = python("-c", program)
        assert "ImportError: cannot import name 'nothing'" in result.stderr
    assert "No module named 'nextlat_dist.reports'" in python("-c", "import nextlat_dist.reports").stderr


def test_an_old_command_runs() -> None:
    result = python("-m", "nextlat_dist.bench.path_star", "--help")
    assert result.returncode == 0, result.stderr
    assert "usage:" in result.stdout
    assert "nextlat_dist.bench.path_star is now nextlat_dist.experiments.path_star" in result.stderr


@pytest.mark.parametrize(
    "program",
    [
        "from nextlat_dist import export as first\nfrom nextlat_dist.export.huggingface import export_checkpoint",
        "from nextlat_dist.export.huggingface import export_checkpoint\nfrom nextlat_dist import export as first",
    ],
    ids=["function-first", "package-first"],
)
def test_export_is_a_function_and_was_a_package(program: str) -> None:
    program += "\nfrom nextlat_dist import export\nimport nextlat_dist.export.llama\nfrom pathlib import Path\n"
    program += "print(export_checkpoint.__module__, nextlat_dist.export.llama.to_llama.__name__)\n"
    program += "for function in (first, export, nextlat_dist.export):\n"
    program += "    try:\n        function(Path('/nowhere'), Path('/nowhere'))\n"
    program += "    except ValueError as error:\n        print(error)"
    result = python("-c", program)
    lines = result.stdout.splitlines()
    assert lines[0] == "nextlat_dist.huggingface.export to_llama", result.stderr
    assert len(lines) == 4, result.stderr
    assert all(line.startswith("there is no checkpoint under /nowhere") for line in lines[1:]), lines


def test_importing_the_package_imports_no_torch() -> None:
    program = "import sys, nextlat_dist, nextlat_dist.cli, data_tools.cli, nextlat_dist.data.loader\n"
    program += "print([name for name in ('torch', 'deepspeed', 'megatron', 'transformers') if name in sys.modules])\n"
    program += "print(nextlat_dist.__version__, sorted(nextlat_dist.__all__))"
    result = python("-c", program)
    assert result.stdout.splitlines()[0] == "[]", result.stderr
    assert result.stdout.splitlines()[1].endswith("['__version__', 'export', 'load', 'train']")
