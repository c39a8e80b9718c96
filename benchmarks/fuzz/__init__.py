"""Bad input: what the commands do with it (`python -m benchmarks.fuzz`), and the readers (`… benchmarks.fuzz.guided`)."""
