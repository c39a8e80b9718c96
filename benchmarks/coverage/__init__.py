"""Which networks that others wrote does the tool take as they are? `python -m benchmarks.coverage` finds out.

Each package is installed without its dependencies into a folder of its own, its networks are made with random
parameters and put through the same steps: traced, cut to a random half, freed of random branches, and both students
compared with the gated network that they were cut from. The result is `docs/coverage.md`.

A file for each package says how its networks are called; their code is used as it is installed.
"""
