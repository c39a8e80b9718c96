"""Examples that are read from disk when they are needed, for data sets that do not fit.

    Records   a split of a TFDS data set in array_record form: any example by its number
    Framing   how an encoded image becomes an array of a fixed size, by chance in training
    Reader    both: a number → {"images", "labels"}
    Column    an entry of a split, that stands where else an array does
    batches   grain: decoded by threads or processes, ahead of who asks

Which example is where in training is a pure function of seed and update (`Order`), and so is the chance in its framing:
nothing has to be remembered to go on from any update, and several processes see what one would.
"""

from kdsearch_jax.data.streaming.columns import Column, Reader, reader_of
from kdsearch_jax.data.streaming.framing import Framing, resized
from kdsearch_jax.data.streaming.pipeline import InOrder, Order, batches
from kdsearch_jax.data.streaming.records import Records

__all__ = ["Column", "Framing", "InOrder", "Order", "Reader", "Records", "batches", "reader_of", "resized"]
