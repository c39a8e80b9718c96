"""What a run would take on a target that is not here: its steps, compiled for it from abstract arguments."""

from kdsearch_jax.runs.planning.report import plan
from kdsearch_jax.runs.planning.steps import AbstractRun, Program
from kdsearch_jax.runs.planning.text import print_plan

__all__ = ["AbstractRun", "Program", "plan", "print_plan"]
