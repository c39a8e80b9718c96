"""Targets: accelerators that are not here. Programs are compiled for them by their own compiler, and never run.

`chips` parses `tpu:v5e:2x4` and describes the devices, `compiler` compiles a step for them and caches what the
compiler says, `program_text` reads that from the compiled program. Needs libtpu, but no TPU:
`pip install 'kdsearch-jax[tpu-compiler]'`.
"""

from kdsearch_jax.runs.targets.chips import CHIPS, Target, TargetError, parse_target
from kdsearch_jax.runs.targets.compiler import Estimates, compile_for

__all__ = ["CHIPS", "Estimates", "Target", "TargetError", "compile_for", "parse_target"]
