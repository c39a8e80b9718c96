"""Faster convolutions on CPUs for unmodified modules; `dispatch` chooses an implementation."""
