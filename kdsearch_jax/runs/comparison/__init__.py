"""`python -m kdsearch_jax.compare`: `rows` names the students, `making` trains them, `table` compares them."""
