"""Is a searched student better than one made by hand? The experiment, from one teacher, and its table.

    python -m kdsearch_jax.compare --config NAME [--seeds 0 1 2] [--match both] [--rows …] --workdir DIR

Every student has the same teacher, budget, data and training recipe, and as many updates as search and retraining have
together; what differs is how it was made (`rows`). Each row with each seed has a directory of its own in DIR
(`making`), so an interrupted comparison goes on, several processes may share one, and rows and seeds can be added.
What is finished is collected (`table`): mean and standard deviation over the seeds, and differences paired by seed.
"""
