"""Everything that makes a run: settings, command line, run directory, stages, evaluation, comparison.

Imports all other packages; the commands import this one.
"""
