"""Examples that are read from disk when they are needed, for data sets that do not fit in memory.

    Records   a split of a TFDS data set in array_record format: random access to its examples
    Framing   how an encoded image becomes an array of a fixed size, randomly in training
    Reader    both: index → {"images", "labels"}
    Column    an entry of a split, in place of an array
    batches   a grain data set: decoded ahead by threads or processes

The position of each example in training is a pure function of seed and update (`ShuffledOrder`), and so is the
randomness of its framing: training can continue from any update without stored state, and several processes see what a
single one would.
"""

from kdsearch_jax.data.streaming.columns import Column, Reader, reader_of
from kdsearch_jax.data.streaming.framing import Framing, resize
from kdsearch_jax.data.streaming.pipeline import SequentialOrder, ShuffledOrder, batches
from kdsearch_jax.data.streaming.records import Records

__all__ = [
    "Column",
    "Framing",
    "Reader",
    "Records",
    "SequentialOrder",
    "ShuffledOrder",
    "batches",
    "reader_of",
    "resize",
]
