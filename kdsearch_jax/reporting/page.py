"""The report of a run as one HTML page: which sections it has, in the order in which a reader asks.

What came out, what it is made of, how it got there, where it differs from its teacher, what it costs, how to use it;
then what could not be done, and what the run was.
"""

from __future__ import annotations

from collections.abc import Mapping

from kdsearch_jax.reporting import agreement, costs, found, markup, provenance, results, usage
from kdsearch_jax.reporting.document import Section, broken, document
from kdsearch_jax.reporting.record import Run


def page(run: Run, pictures: Mapping[str, markup.Pictures]) -> str:
    """The whole page; `pictures` by name of the figure, those that could be drawn."""
    name = str(run.config.get("name", run.directory.name))
    quality = Section("results", "Results", "Results", results.networks(run))
    if run.front is None:
        sections = [quality, Section("costs", "Costs", costs.title(run), costs.costs(run))]
    else:
        sections = [Section("front", "Budgets", costs.front_title(run.front), costs.front(run, pictures)), quality]
    sections += [
        Section("architecture", "Architecture", found.architecture_title(run), found.architecture(run, pictures)),
        Section("gates", "Search", found.gates_title(run), found.gates(run, pictures)),
        Section("search", "Training", found.search_title(run), found.search(run, pictures)),
        Section("agreement", "Against the teacher", agreement.title(run), agreement.section(run, pictures)),
        Section("use", "Use the student", "Use the student", usage.use(run)),
        Section("frozen", "Not pruned", "What could not be pruned, and why", provenance.frozen(run)),
        Section("run", "The run", "The run", provenance.the_run(run.environment, run.config)),
    ]
    return document(name, f"<h1>Student of the {broken(name)} teacher</h1>{results.lead(run)}", sections)
