"""Bad input: what commands (`python -m benchmarks.fuzz`) and readers (`… benchmarks.fuzz.guided`) do with it."""
