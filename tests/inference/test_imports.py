"""Inference and evaluation run where the training stack is not installed."""

from __future__ import annotations

import subprocess
import sys

FORBIDDEN = ["deepspeed", "megatron", *(f"nextlat_dist.{p}" for p in ("training", "objective", "model", "parallel"))]
PROGRAM = f"""
import importlib.abc, sys

class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if any(name == f or name.startswith(f + ".") for f in {FORBIDDEN!r}):
            raise ImportError(f"blocked: {{name}}")

sys.meta_path.insert(0, Block())
import nextlat_dist.inference
import nextlat_dist.evaluation.run_report.publish
import nextlat_dist.evaluation.speculative.measure
try:
    import nextlat_dist.training
except ImportError:
    print("works")
"""


def test_nothing_of_the_training_stack_is_imported() -> None:
    result = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False)
    assert result.stdout.strip() == "works", result.stderr
