"""Shared by all commands: parsing of the command line, exit statuses and error messages.

A command is a thin `main(argv) -> int`, started by `command_line.run(main)`. `--config` and `--quick` select an
experiment; every other flag overrides one of its settings by its dotted name (`--budget.macs 0.4`). A user error ends
in one line on stderr and a non-zero status; a bug keeps its traceback.
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
from collections.abc import Callable, Iterator, Sequence
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
PACKAGE = Path(__file__).parents[1]


class UsageError(ValueError):
    """The command line itself is wrong."""


@dataclass(frozen=True)
class Options:
    """Flags of every command."""

    traceback: bool = False
    """Show the full traceback of an error, not only its message (also KDSEARCH_TRACEBACK=1)."""
    coordinator: str | None = None
    """HOST:PORT of process 0, for a run of several processes that JAX does not detect by itself."""
    num_processes: int | None = None
    """Number of processes of the run; 1 runs alone even if a launcher started several."""
    process_id: int | None = None
    """The number of this process, from 0."""
    join_timeout: int = 300
    """Seconds to wait for the other processes."""
    trust_code: bool = False
    """Allow network directories to import the packages that they name as package.module:factory, which runs code."""


@dataclass(frozen=True)
class RunOptions(Options):
    """Flags of every command that starts or resumes a run."""

    config: str | None = None
    """An experiment in configs/ by name, an experiment file, or the config.json of a run. By default `digits`, or `own`
    if --model names package.module:factory or --data an npz file."""
    quick: bool = False
    """Use the experiment's variant with a few steps, to see that everything works."""
    workdir: Path | None = None
    """The run's directory; runs/NAME by default."""
    resume: bool = False
    """Continue whatever workdir holds: nothing yet, a finished run, or one that another command began. The command that
    began a run resumes it without this flag."""
    model: str | None = None
    """Short for --model.name."""
    data: str | None = None
    """Short for --data.name."""
    teacher: tuple[str, ...] = ()
    """Short for --teacher-from; any further teachers are added to --distill.teachers."""


_SHORT_FORMS = {"--model.name": "--model", "--data.name": "--data", "--teacher-from": "--teacher"}


def parse(
    argv: Sequence[str], options_type: type[R], prog: str, description: str, *, resumes: bool = False
) -> tuple[R, Experiment]:
    """Parses a command line into options and a checked experiment. Exits after `--help`.

    Args:
      options_type: the command's record of flags, `RunOptions` or a subclass.
      resumes: take the experiment from `workdir` even without `--resume`.

    Returns:
      The options, with `workdir` set and every path local, and the experiment.

    Raises:
      UsageError: a flag does not exist, or a value is invalid.
    """
    with _usage_errors():
        _show_help({"options": options_type, "experiment": Experiment}, argv, prog, description)
        options, settings = _tyro(options_type, [_short_form(token) for token in argv], prog)
        base = load_experiment(_experiment_name(options, resumes), options.quick)
        parsed, unknown = _tyro(Experiment, [*settings, *_long_forms(options, argv, settings)], prog, default=base)
        _refuse(unknown, (*_field_names(options), *SETTINGS))
        if not parsed.budgets and "--budgets" in (token.partition("=")[0] for token in argv):
            raise UsageError("--budgets: no value; give some, as in --budgets 0.7 0.5 0.3")
        experiment = check(dataclasses.replace(parsed, model=_merged_model(base.model, parsed.model)))
    options = dataclasses.replace(options, workdir=options.workdir or Path("runs") / experiment.name)
    return _with_local_paths(options, entire_run=True), experiment


def parse_options(argv: Sequence[str], options_type: type[T], prog: str, description: str) -> T:
    """Parses the options of a command that takes no experiment. Raises UsageError; exits after `--help`."""
    with _usage_errors():
        _show_help({"options": options_type}, argv, prog, description)
        options, unknown = _tyro(options_type, argv, prog)
        _refuse(unknown, _field_names(options))
    return _with_local_paths(options)


def _with_local_paths(options: T, entire_run: bool = False) -> T:
    """The options with addresses in an object store replaced by the paths of local copies."""
    paths = {name: value for name in _field_names(options) if isinstance(value := getattr(options, name), Path)}
    local = {name: storage.local_copy(path, _flag(name), entire_run=entire_run) for name, path in paths.items()}
    return dataclasses.replace(options, **local)  # type: ignore  # a dataclass


def run(main: Callable[[list[str]], int]) -> NoReturn:
    """Runs a command on the process's command line and exits with its status."""
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
        print("error: interrupted; the same command resumes from the last checkpoint", file=sys.stderr)
        status = INTERRUPTED
    status = FAILED if status is None else status
    storage.discard_copies()
    if status:
        processes.exit_after_failure(status)
    sys.exit(status)


def exit_status(error: BaseException) -> int | None:
    """The exit status of a user error; None for a bug, whose traceback should be shown.

    An exception class may define it by an attribute `exit_status`.
    """
    if isinstance(status := getattr(error, "exit_status", None), int):
        return status
    if isinstance(error, UsageError):
        return USAGE
    return FAILED if isinstance(error, (ValueError, OSError, ImportError, FloatingPointError)) else None


def error_line(error: BaseException) -> str:
    """The message of an error on one line; errors of other packages also name their type and `--traceback`."""
    text = str(error).strip() or type(error).__name__
    frames = traceback.extract_tb(error.__traceback__)
    ours = not frames or PACKAGE in Path(frames[-1].filename).parents
    if not ours and not isinstance(error, (OSError, ImportError)) and not hasattr(error, "exit_status"):
        text = f"{type(error).__name__}: {text} (--traceback shows where)"
    text = storage.display_paths(text)
    # Names from files may contain anything, including control sequences of a terminal.
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in " ".join(text.split()))


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return storage.display_paths(super().format(record))


def configure_logging() -> None:
    """Logs plain lines to stderr: this package from INFO, others from WARNING, Orbax from ERROR."""
    handler = logging.StreamHandler()
    handler.setFormatter(_Formatter("%(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("kdsearch_jax").setLevel(logging.INFO)
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax logs a dozen lines per checkpoint here
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # and here a traceback for each array it cannot read
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # a traceback before each error that it raises
    logging.captureWarnings(True)
    warnings.formatwarning = _one_line_warning


_formatwarning = warnings.formatwarning


def _one_line_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """Warnings of this package as their message only; others as Python formats them."""
    if category.__module__.startswith("kdsearch_jax."):
        return f"warning: {message}"
    return _formatwarning(message, category, filename, lineno, line)


def join_processes(argv: Sequence[str]) -> None:
    """Joins the other processes of the run, if there are any; see `processes`. Raises UsageError, ValueError."""
    with _usage_errors():
        options, _ = _tyro(Options, argv, "")
        if options.join_timeout < 1:
            raise UsageError(f"--join-timeout: {options.join_timeout} is not possible; give seconds, at least 1")
        flags = {name: str(value) for name in processes.FLAGS if (value := getattr(options, name)) is not None}
        place = processes.detect(flags, os.environ)
    if place is not None:
        processes.join(place, options.join_timeout)


# --- the command line -----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _usage_errors() -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise error if isinstance(error, UsageError) else UsageError(str(error)) from error


def _field_names(record: Any) -> tuple[str, ...]:
    return tuple(f.name for f in dataclasses.fields(record))


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _short_form(token: str) -> str:
    """A token of the command line with the short form of its flag, where there is one."""
    flag, equals, value = token.partition("=")
    return _SHORT_FORMS.get(flag.replace("_", "-"), flag) + equals + value


def _long_forms(options: RunOptions, argv: Sequence[str], settings: Sequence[str]) -> list[str]:
    """The short forms among the options as flags of settings. Raises UsageError if one contradicts another flag."""
    long_forms = []
    if options.model is not None:
        long_forms += ["--model.name", options.model]
    if options.data is not None:
        long_forms += ["--data.name", options.data]
    if options.teacher:
        first, *others = options.teacher
        long_forms += ["--teacher-from", first]
        if others:
            if any(token.partition("=")[0] == "--distill.teachers" for token in settings):
                raise UsageError("--teacher-from X Y includes --distill.teachers Y; give one of them")
            long_forms += ["--distill.teachers", *others]
    elif any(_short_form(token).partition("=")[0] == "--teacher" for token in argv):
        raise UsageError("--teacher-from: no value; give a teacher's path")
    return long_forms


def _experiment_name(options: RunOptions, resumes: bool) -> str:
    """The name or path of the experiment whose settings the command line overrides."""
    if options.config is not None:
        return options.config
    if options.quick:
        return "digits"
    runs = [options.workdir] if options.workdir is not None and (options.resume or resumes) else []
    if (search := getattr(options, "search_from", None)) is not None:  # a run, or its search stage
        stage = storage.local_copy(search, "--search-from", entire_run=True)
        runs += [stage, stage.parent]
    if (extended := getattr(options, "front_from", None)) is not None:
        runs.append(extended)
    for run in runs:
        if (path := storage.local_copy(run, entire_run=True) / "config.json").is_file():
            return str(path)
    return "own" if ":" in (options.model or "") or (options.data or "").startswith("npz:") else "digits"


def _refuse(unknown: Sequence[str], known: Sequence[str]) -> None:
    """Raises UsageError for the first unknown flag, with the nearest known one."""
    if not unknown:
        return
    token = next((token for token in unknown if token.startswith("--")), unknown[0])
    name = token.partition("=")[0].removeprefix("--").replace("-", "_")
    if not token.startswith("--"):
        raise UsageError(f"{token!r} is not an option, and no option takes it as a value")
    if name.startswith("model.arguments."):
        raise UsageError(f"{token} is not an option; write --model.arguments {name.rpartition('.')[2]}=VALUE")
    raise UsageError(f"{_flag(name)} is not an option; {nearest(_flag(name), map(_flag, known))}")


def _show_help(records: dict[str, type], argv: Sequence[str], prog: str, description: str) -> None:
    """Prints the flags of all records and exits if `--help` is on the command line."""
    if not {"-h", "--help"} & set(argv):
        return
    import tyro

    fields = [(name, Annotated[record, tyro.conf.arg(name="")]) for name, record in records.items()]
    tyro.cli(
        dataclasses.make_dataclass("settings", fields), args=["--help"], prog=f"python -m {prog}",
        description=description, registry=_tyro_registry(),
    )  # fmt: skip


def _tyro(record: type[T], argv: Sequence[str], prog: str, default: Any = None) -> tuple[T, list[str]]:
    """Parses the flags of a record by tyro; returns it and the tokens that it does not know.

    Raises:
      UsageError: tyro's error, a box of several lines, as one line.
    """
    import tyro  # takes 0.2 s, and only commands need it

    given = {} if default is None else {"default": default}
    stderr = io.StringIO()
    try:
        with contextlib.redirect_stderr(stderr):
            return tyro.cli(
                record, args=[token for token in argv if token not in ("-h", "--help")], prog=f"python -m {prog}",
                registry=_tyro_registry(), return_unknown_args=True, **given,
            )  # fmt: skip
    except SystemExit:
        raise UsageError(_one_line(stderr.getvalue())) from None


def _tyro_registry() -> Any:
    """How tyro parses dictionaries (KEY=VALUE or JSON) and lists of numbers (separated by spaces or commas)."""
    import tyro

    registry = tyro.constructors.ConstructorRegistry()
    specification = tyro.constructors.PrimitiveConstructorSpec

    @registry.primitive_rule
    def _(info: Any) -> Any:
        if info.type == dict[str, Any]:
            return specification(
                nargs="*",
                metavar="KEY=VALUE ... | JSON",
                instance_from_str=_read_arguments,
                is_instance=lambda value: isinstance(value, dict),
                str_from_instance=lambda value: [json.dumps(value)],
            )
        if info.type == tuple[float, ...]:
            return specification(
                nargs="*",
                metavar="[FLOAT [FLOAT ...]]",
                instance_from_str=lambda tokens: tuple(float(n) for t in tokens for n in t.split(",") if n),
                is_instance=lambda value: isinstance(value, tuple),
                str_from_instance=lambda value: [str(number) for number in value],
            )
        return None

    return registry


def _one_line(box: str) -> str:
    """The first paragraph of tyro's box, without borders and line breaks."""
    lines = [line.strip("│╭╮╰╯ \n") for line in re.sub(r"\x1b\[[0-9;]*m", "", box).splitlines()[1:]]
    end = next((i for i, line in enumerate(lines) if not line or set(line) == {"─"}), len(lines))
    return " ".join(" ".join(lines[:end]).split()).rstrip(".") + "; --help lists all options"


class _Changes(dict[str, Any]):
    """Model arguments given as KEY=VALUE, which change some of the experiment's and keep the others."""


def _read_arguments(tokens: list[str]) -> dict[str, Any]:
    """The dictionary of `depth=56 width=16` (values are JSON, or else text), or of one JSON object."""
    if len(tokens) == 1 and tokens[0].lstrip().startswith("{"):
        return parse_json(tokens[0])
    changes = _Changes()
    for token in tokens:
        key, equals, text = token.partition("=")
        if not key or not equals:
            raise ValueError(f"{token!r} is neither KEY=VALUE nor a JSON object")
        try:
            changes[key] = parse_json(text)
        except ValueError:
            changes[key] = text
    return changes


def _merged_model(base: ModelConfig, parsed: ModelConfig) -> ModelConfig:
    """The model asked for. Arguments and keywords of the base are kept only if the model is the same."""
    same = parsed.name == base.name

    def merged(field: str) -> dict[str, Any]:
        value, before = getattr(parsed, field), getattr(base, field)
        if isinstance(value, _Changes):
            return {**(before if same else {}), **value}
        return value if same or value is not before else {}

    return ModelConfig(parsed.name, *(merged(field) for field in ("arguments", "train_kwargs", "eval_kwargs")))
