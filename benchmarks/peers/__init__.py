"""Students made by other pruning libraries, from the same PyTorch weights, as rows of a comparison.

`python -m benchmarks.peers` prunes a CIFAR ResNet with Torch-Pruning 1.6 and writes each student as a network
directory, which `python -m kdsearch_jax.compare --rows … external:DIR` trains like every other row. See
`benchmarks.peers.__main__`.

    networks.py    the CIFAR ResNet in PyTorch, its data, and its costs
    pruning.py     Torch-Pruning's rules, and the ratios that meet a budget
    shapes.py      shapes found by other works, with the teacher's channels of the largest norm
    conversion.py  PyTorch's student as a network directory of this package, equal in its logits
"""
