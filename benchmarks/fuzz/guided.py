"""A coverage-guided fuzzer on the readers of formats: `python -m benchmarks.fuzz.guided READER [--seconds 60]`.

Atheris (`pip install atheris`), which is libFuzzer for Python: it sees which branches of the reader an input takes,
and breeds inputs that take new ones. It ends at the first input that breaks the reader's promise, and keeps it.
"""

from __future__ import annotations

import argparse
import importlib
import resource
import sys
import tempfile
from pathlib import Path
from typing import Any

PACKAGES = ["kdsearch_jax", "json", "zipfile", "numpy.lib"]


def main() -> None:
    """Runs one reader on bred inputs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reader")
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    atheris: Any = importlib.import_module("atheris")  # not among the dependencies
    import flax.linen  # noqa: F401  # not to be instrumented
    import jax  # noqa: F401

    from benchmarks.fuzz import readers

    with atheris.instrument_imports(include=PACKAGES):
        read = readers.READERS[options.reader]
        contents = readers.examples(options.reader)
        for content in contents:
            read(content)  # what it imports is instrumented as well
    folder = Path(tempfile.mkdtemp(prefix=f"kdsearch-guided-{options.reader}-"))
    (folder / "corpus").mkdir()
    for i, content in enumerate(contents):
        (folder / "corpus" / str(i)).write_bytes(content)
    resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
    flags = [
        f"-max_total_time={options.seconds}",
        f"-seed={options.seed}",
        "-timeout=20",
        "-rss_limit_mb=4096",
        "-max_len=4096",
        f"-artifact_prefix={folder}/",
        "-print_final_stats=1",
    ]
    atheris.Setup([sys.argv[0], *flags, str(folder / "corpus")], lambda content: read(bytes(content)))
    atheris.Fuzz()


if __name__ == "__main__":
    main()
