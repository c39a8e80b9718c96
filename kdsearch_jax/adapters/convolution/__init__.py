"""Convolutions of unmodified modules, fast on CPUs: `dispatch` replaces XLA's where others are faster."""
