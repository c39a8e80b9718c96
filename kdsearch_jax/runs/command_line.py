"""What every command shares: its command line, its way to fail.

A command is a thin `main(argv) -> int`, started by `cli.run(main)`, around functions that know nothing of command
lines. `--config` and `--quick` choose an experiment; whatever else stands on the line overrides one of its settings by
its dotted name (`--budget.macs 0.4`). A mistake of the user's ends in one line on stderr and a non-zero status; a
mistake of ours keeps its traceback.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import logging
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar

from kdsearch_jax import storage
from kdsearch_jax.runs import heap
from kdsearch_jax.runs.config import SETTINGS, Experiment, ModelConfig, check, load_experiment
from kdsearch_jax.storage.files import parse_json
from kdsearch_jax.tracing.messages import nearest
from kdsearch_jax.training import processes
from kdsearch_jax.training.preemption import Preempted, raise_on_sigterm

T = TypeVar("T")
R = TypeVar("R", bound="RunOptions")

log = logging.getLogger(__name__)

USAGE, FAILED, INTERRUPTED = 2, 1, 130  # exit statuses


class UsageError(ValueError):
    """The command line itself is wrong."""


@dataclass(frozen=True)
class Options:
    """Flags of every command."""

    traceback: bool = False
    """Show where an error came from, not its line alone (also KDSEARCH_TRACEBACK=1)."""
    coordinator: str | None = None
    """HOST:PORT of process 0, for a run of several processes that JAX does not find by itself."""
    num_processes: int | None = None
    """How many processes the run has; 1 for a run of its own, whoever started others beside it."""
    process_id: int | None = None
    """Which of them this one is, from 0."""
    join_timeout: int = 300
    """Seconds to wait for the others."""
    trust_code: bool = False
    """Import the packages that a network's directory names as package.module:factory, so that their code runs."""


@dataclass(frozen=True)
class RunOptions(Options):
    """Flags of every command that makes or continues a run."""

    config: str = "digits"
    """An experiment of configs/ by name, an experiment file, or the config.json of a run; `own` where the line names a
    model package.module:factory or data npz:FILE and no experiment."""
    quick: bool = False
    """The experiment's variant of a few steps, to see that everything works."""
    workdir: Path | None = None
    """The run's directory; runs/NAME if left out."""
    resume: bool = False
    """Go on with whatever workdir holds: nothing yet, a run that has ended, or one that another command began. The
    command that began a run goes on with it without this."""


def parse(argv: list[str], options: type[R], prog: str, description: str) -> tuple[R, Experiment]:
    """The options and the checked experiment that a command line asks for.

    options: the command's record of flags, `RunOptions` or a record derived from it; its `config` default is the
    experiment of an empty command line. The `workdir` returned is never None. Raises UsageError; exits after `--help`.
    """
    with _usage_errors():
        argv = _in_full(argv)
        _known_flags(argv, (*_names(options), *SETTINGS))
        given = _first_pass(argv)
        if options().config == RunOptions.config and _names_own(argv) and not {"config", "quick"} & set(given):
            given["config"] = "own" if _run_config(given) is None else _run_config(given)
        chosen = dataclasses.replace(options(), **{k: given[k] for k in ("config", "quick") if k in given})
        base = load_experiment(_run_config(given) or chosen.config, chosen.quick)
        parsed = _tyro(argv, {"options": chosen, "experiment": base}, prog, f"{description}\n\n{_SHORT}")
        experiment = check(dataclasses.replace(parsed.experiment, model=_model(base.model, parsed.experiment.model)))
    workdir = parsed.options.workdir or Path("runs") / experiment.name
    return _brought(dataclasses.replace(parsed.options, workdir=workdir), whole=True), experiment


def parse_options(argv: list[str], options: type[T], prog: str, description: str) -> T:
    """The options of a command that takes no experiment. Raises UsageError; exits after `--help`."""
    with _usage_errors():
        _known_flags(argv, _names(options))
        parsed = _tyro(argv, {"options": options}, prog, description).options
    return _brought(parsed)


def _brought(options: T, whole: bool = False) -> T:
    """The options with the paths of copies in place of addresses of an object store."""
    values = {name: getattr(options, name) for name in _names(options)}
    paths = {name: value for name, value in values.items() if isinstance(value, Path)}
    local = {name: storage.local_copy(path, _dashed(name), entire_run=whole) for name, path in paths.items()}
    return dataclasses.replace(options, **local)  # type: ignore  # a record of flags


def run(main: Callable[[list[str]], int]) -> NoReturn:
    """Run a command on the process's command line and exit with its status: the last line of every command's file."""
    argv = sys.argv[1:]
    full = "--traceback" in argv or os.environ.get("KDSEARCH_TRACEBACK", "0") not in ("", "0")
    configure_logging()
    if heap.expects_cpu():
        heap.keep_freed()
    try:
        if not {"-h", "--help"} & set(argv):
            join_processes(argv)
        with raise_on_sigterm():
            status = main(argv)
            storage.publish()
    except (Exception, Preempted) as error:
        status = exit_status(error)
        if full or status is None:
            traceback.print_exc()
        else:
            print(f"error: {error_line(error)}", file=sys.stderr)
    except KeyboardInterrupt:
        if full:
            traceback.print_exc()
        print("error: interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        status = INTERRUPTED
    status = FAILED if status is None else status
    storage.discard_copies()
    if status:
        processes.exit_after_failure(status)
    sys.exit(status)


def exit_status(error: BaseException) -> int | None:
    """The exit status of a failure that one line explains; None for a programming error, whose traceback matters.

    An exception class may say so itself, by an attribute `exit_status`.
    """
    own = getattr(error, "exit_status", None)
    if isinstance(own, int):
        return own
    if isinstance(error, UsageError):
        return USAGE
    return FAILED if isinstance(error, (ValueError, OSError, ImportError, FloatingPointError)) else None


def error_line(error: BaseException) -> str:
    """What is printed of a failure; raised outside this package, it also says how to find where."""
    text = str(error).strip() or type(error).__name__
    frames = traceback.extract_tb(error.__traceback__)
    ours = not frames or Path(__file__).parent in Path(frames[-1].filename).parents
    if not ours and not isinstance(error, (OSError, ImportError)) and not hasattr(error, "exit_status"):
        text = f"{type(error).__name__}: {text} (--traceback shows where)"
    text = storage.display_paths(text)
    # Names out of files may hold anything, also what moves a terminal's cursor.
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in " ".join(text.split()))


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return storage.display_paths(super().format(record))


def configure_logging() -> None:
    """Plain lines on stderr: ours from INFO, other packages' from WARNING, and nothing of Orbax below ERROR."""
    handler = logging.StreamHandler()
    handler.setFormatter(_Formatter("%(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("kdsearch_jax").setLevel(logging.INFO)
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax logs here, a dozen lines a checkpoint
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # and here, a traceback for each array it could not read
    logging.captureWarnings(True)
    warnings.formatwarning = _one_line_warning


_formatwarning = warnings.formatwarning


def _one_line_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """A warning of this package as its message alone; others as Python shows them."""
    if category.__module__.startswith("kdsearch_jax."):
        return f"warning: {message}"
    return _formatwarning(message, category, filename, lineno, line)


def join_processes(argv: list[str]) -> None:
    """Join the other processes of the run, where there are some; see `processes`. Raises UsageError, ValueError."""
    with _usage_errors():
        given = _values(argv, (*processes.FLAGS, "join_timeout"))
        timeout = given.pop("join_timeout", str(Options.join_timeout))
        if not timeout.isascii() or not timeout.isdigit() or not int(timeout):
            raise UsageError(f"--join-timeout: {timeout!r} is not possible; give seconds, at least 1")
        place = processes.detect(given, os.environ)
    if place is not None:
        processes.join(place, int(timeout))


# --- the command line -----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _usage_errors() -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise error if isinstance(error, UsageError) else UsageError(str(error)) from error


def _names(options: Any) -> tuple[str, ...]:
    return tuple(f.name for f in dataclasses.fields(options))


def _flag(token: str) -> str:
    return token.partition("=")[0].removeprefix("--").replace("-", "_")


def _dashed(name: str) -> str:
    return "--" + name.replace("_", "-")


_ALIASES = {"--model": "--model.name", "--teacher": "--teacher-from", "--data": "--data.name", "--from": "--front-from"}
_SHORT = (
    f"In short: {', '.join(f'{short} X is {full} X' for short, full in _ALIASES.items())}; "
    "--teacher-from X Y Z is --teacher-from X --distill.teachers Y Z."
)


def _in_full(argv: list[str]) -> list[str]:
    """The line without aliases. Raises UsageError where one stands without a value, or beside its full name."""
    full = []
    for i, token in enumerate(argv):
        name, equals, value = token.partition("=")
        if name in _ALIASES:
            if not equals and (i + 1 == len(argv) or argv[i + 1].startswith("--")):
                raise UsageError(f"{name}: no value; give one, as in {name} X (the same as {_ALIASES[name]} X)")
            if any(other.partition("=")[0].replace("_", "-") == _ALIASES[name] for other in argv):
                raise UsageError(f"{name} is {_ALIASES[name]} in short; give one of them")
            token = _ALIASES[name] + equals + value
        full.append(token)
    return _budgets(_one_teacher(full))


def _budgets(argv: list[str]) -> list[str]:
    """The line with the values of `--budgets`, which commas may part as well, one by one; UsageError without any."""
    split, inside = [], False
    for token in argv:
        flag, equals, value = token.partition("=")
        inside = flag == "--budgets" or (inside and not token.startswith("--"))
        if flag == "--budgets" and equals:
            token = f"{flag},{value}"
        split += [part for part in token.split(",") if part] if inside else [token]
    place = split.index("--budgets") + 1 if "--budgets" in split else 0
    if place and (place == len(split) or split[place].startswith("--")):
        raise UsageError("--budgets: none is given; give some, as in --budgets 0.7 0.5 0.3")
    return split


def _one_teacher(argv: list[str]) -> list[str]:
    """The line with one value of --teacher-from; further ones are those of --distill.teachers."""
    names = [token.partition("=")[0].replace("_", "-") for token in argv]
    if "--teacher-from" not in names:
        return argv
    first = names.index("--teacher-from") + (1 if "=" in argv[names.index("--teacher-from")] else 2)
    end = next((i for i in range(first, len(argv)) if argv[i].startswith("--")), len(argv))
    if first >= end:
        return argv
    if "--distill.teachers" in names:
        raise UsageError("--teacher-from X Y is --teacher-from X --distill.teachers Y in short; give one of them")
    return [*argv[:first], *argv[end:], "--distill.teachers", *argv[first:end]]


def _names_own(argv: list[str]) -> bool:
    """Whether the line names a model or data of the user's own."""
    pairs = zip(argv, [*argv[1:], ""], strict=False)
    values = {token.partition("=")[0]: token.partition("=")[2] or following for token, following in pairs}
    return ":" in values.get("--model.name", "") or values.get("--data.name", "").startswith("npz:")


def _known_flags(argv: list[str], known: tuple[str, ...]) -> None:
    """Raise UsageError for a flag that does not exist, with the nearest that does."""
    for token in argv:
        name = _flag(token)
        if not token.startswith("--") or token == "--" or name in known or name == "help":
            continue
        head, _, last = name.rpartition(".")
        if last.startswith("no_") and f"{head}.{last[3:]}".lstrip(".") in known:
            continue
        if name.startswith("model.arguments.") and "model.arguments" in known:
            raise UsageError(f"{token} is not an option; write --model.arguments {last}=VALUE")
        raise UsageError(f"{_dashed(name)} is not an option; {nearest(_dashed(name), map(_dashed, known))}")


def _values(argv: list[str], names: tuple[str, ...]) -> dict[str, str]:
    """The values, as text, of those flags that stand on the line. Raises UsageError where one has none."""
    given = {}
    for token, following in zip(argv, [*argv[1:], "--"], strict=False):
        name = _flag(token)
        if token.startswith("--") and name in names:
            given[name] = token.partition("=")[2] if "=" in token else following
            if not given[name] or given[name].startswith("--"):
                raise UsageError(f"{_dashed(name)}: no value; give one")
    return given


def _first_pass(argv: list[str]) -> dict[str, Any]:
    """Those given of config, quick, workdir, resume and the runs to start from: they decide on all other defaults."""
    given: dict[str, Any] = {}
    for token, following in zip(argv, [*argv[1:], ""], strict=False):
        name, _, value = token.partition("=")
        name = name.replace("_", "-")
        if name in ("--config", "--workdir", "--search-from", "--front-from"):
            value = value or following
            if not value or value.startswith("--"):
                raise UsageError(
                    f"{name}: no value; give {'a name or a file' if name == '--config' else 'a directory'}"
                )
            given[name[2:]] = value
        elif name in ("--quick", "--no-quick", "--resume", "--no-resume"):
            given[name.removeprefix("--").removeprefix("no-")] = not name.startswith("--no-")
    return given


def _run_config(given: dict[str, Any]) -> str | None:
    """The config.json of the run to resume or to start from, where the command line names that and no experiment."""
    if not {"config", "quick"}.isdisjoint(given):
        return None
    named = [given["workdir"]] if given.get("resume") and "workdir" in given else []
    if "search-from" in given:  # a run, or its search stage
        stage = storage.local_copy(given["search-from"], "--search-from", entire_run=True)
        named += [str(stage), str(stage.parent)]
    if "front-from" in given:
        named.append(given["front-from"])
    paths = (storage.local_copy(name, entire_run=True) / "config.json" for name in named)
    return next((str(path) for path in paths if path.is_file()), None)


def _tyro(argv: list[str], parts: dict[str, Any], prog: str, description: str) -> Any:
    """tyro's reading of the line into one record a part (a record of defaults, or a type), no part's name in the flags.

    Its error, a box of several lines, is made one line.
    """
    import tyro  # 0.1 s, for commands only

    def part(value: Any) -> Any:
        if isinstance(value, type):
            return Annotated[value, tyro.conf.arg(name="")], dataclasses.field()
        return Annotated[type(value), tyro.conf.arg(name="")], dataclasses.field(default=value)

    record = dataclasses.make_dataclass("settings", [(name, *part(value)) for name, value in parts.items()])

    registry = tyro.constructors.ConstructorRegistry()

    @registry.primitive_rule
    def _(info: Any) -> tyro.constructors.PrimitiveConstructorSpec | None:
        if info.type != dict[str, Any]:
            return None
        return tyro.constructors.PrimitiveConstructorSpec(
            nargs="*",
            metavar="KEY=VALUE ... | JSON",
            instance_from_str=_read_arguments,
            is_instance=lambda value: isinstance(value, dict),
            str_from_instance=lambda value: [json.dumps(value)],
        )

    stderr = io.StringIO()
    try:
        with contextlib.redirect_stderr(stderr):
            return tyro.cli(
                record,
                args=argv,
                prog=f"python -m {prog}",
                description=description,
                registry=registry,
            )
    except SystemExit as end:
        if end.code:
            raise UsageError(_one_line(stderr.getvalue())) from None
        raise


_UNREAD = re.compile(
    r"Error parsing (?P<flag>--[\w.-]+): (no type matching (?P<kinds>\S+) could be instantiated from|"
    r"Could not find valid parse for arguments:) \[(?P<given>.*?)\]"
)


def _one_line(box: str) -> str:
    """The message of tyro's box: its first part, without borders and line breaks."""
    lines = [line.strip("│╭╮╰╯ \n") for line in re.sub(r"\x1b\[[0-9;]*m", "", box).splitlines()[1:]]
    end = next((i for i, line in enumerate(lines) if set(line) == {"─"}), len(lines))
    text = " ".join(" ".join(lines[:end]).split()).rstrip(".")
    if found := _UNREAD.match(text):
        wanted = f"; give {found['kinds'].replace('{None}', 'None').replace('|', ' or ')}" if found["kinds"] else ""
        text = f"{found['flag']}: {found['given']} cannot be read{wanted}"
    return text + "; --help lists everything"


class _Changes(dict[str, Any]):
    """Model arguments given as KEY=VALUE: they change some of the experiment's, and leave the others."""


def _read_arguments(tokens: list[str]) -> dict[str, Any]:
    """The dictionary of `depth=56 width=16` (values are JSON, or else text), or of one JSON dictionary."""
    if len(tokens) == 1 and tokens[0].lstrip().startswith("{"):
        return parse_json(tokens[0])
    changes = _Changes()
    for token in tokens:
        key, equals, text = token.partition("=")
        if not key or not equals:
            raise ValueError(f"{token!r} is neither KEY=VALUE nor a JSON dictionary")
        try:
            changes[key] = parse_json(text)
        except ValueError:
            changes[key] = text
    return changes


def _model(base: ModelConfig, given: ModelConfig) -> ModelConfig:
    """The model asked for; another model than the experiment's takes none of its arguments and keywords over."""
    same = given.name == base.name

    def merged(field: str) -> dict[str, Any]:
        value, before = getattr(given, field), getattr(base, field)
        if isinstance(value, _Changes):
            return {**(before if same else {}), **value}
        return value if same or value is not before else {}

    return ModelConfig(given.name, *(merged(field) for field in ("arguments", "train_kwargs", "eval_kwargs")))
