"""`python -m kdsearch_jax.compare`: `rows` names the students, `make_rows` trains them, `table` compares them."""
