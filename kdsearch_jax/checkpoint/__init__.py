"""What a run leaves on disk and finds again: checkpoints of a training state, and finished networks.

Arrays are stored by Orbax under flat names ("params/stage1/conv/kernel"). Orbax gives back a flipped byte, or another
dtype, without a word, so every array carries its own SHA-256 over dtype, shape and bytes, checked whenever it is read.

    states      Checkpointer: DIRECTORY/STEP/{state, meta}, the newest few and the best; falls back past damaged ones
    networks    DIRECTORY/{architecture.json, network.json, variables}: one network, written whole or not at all
    arrays      names, digests, and what Orbax is told

A state is a pytree of arrays and plain numbers; its structure is not stored: the caller brings it along when restoring,
and with it the devices on which each array shall lie, however many there were when it was saved.
"""

from kdsearch_jax.checkpoint.arrays import describe, flatten, unflatten, verified
from kdsearch_jax.checkpoint.networks import (
    BASE,
    BOXES,
    MODE,
    fitting_module,
    in_boxes,
    load_network,
    module_info,
    own_boxes,
    own_shapes,
    save_network,
)
from kdsearch_jax.checkpoint.shared import CheckpointError, written_whole
from kdsearch_jax.checkpoint.states import Checkpointer

__all__ = [
    "BASE",
    "BOXES",
    "MODE",
    "CheckpointError",
    "Checkpointer",
    "describe",
    "fitting_module",
    "flatten",
    "in_boxes",
    "load_network",
    "module_info",
    "own_boxes",
    "own_shapes",
    "save_network",
    "unflatten",
    "verified",
    "written_whole",
]
