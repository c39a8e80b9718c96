"""From a network's jaxpr to its topology: labels walked through equations, coupled groups, exact costs, reasons.

`topology` is the result, and what the rest of the package knows; the other modules make it.
"""
