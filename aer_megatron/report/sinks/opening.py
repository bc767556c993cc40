"""The sinks of a run by their names in ``report.sinks``: checked before anything starts, made when it does."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Callable
from contextlib import ExitStack

from aer_megatron.options.report import ReportSection
from aer_megatron.report.masking import mask_text
from aer_megatron.report.sinks.base import Sink, SinkRun
from aer_megatron.report.sinks.console import ConsoleSink
from aer_megatron.report.sinks.guard import GuardedSink, ThreadedSink
from aer_megatron.report.sinks.mlflow import MlflowSink
from aer_megatron.report.sinks.tensorboard import TensorBoardSink
from aer_megatron.report.sinks.wandb import WandbSink

SINKS: dict[str, type[Sink]] = {
    "console": ConsoleSink,
    "tensorboard": TensorBoardSink,
    "wandb": WandbSink,
    "mlflow": MlflowSink,
}


def check_sinks(report: ReportSection) -> None:
    """Looks at every sink before a run starts; makes none.

    Raises:
        ValueError: one of the user's own cannot be imported or is no ``Sink``, or a sink has not the options given.
        RuntimeError: the package that a sink needs is not installed.
    """
    for name in report.sinks:
        chosen = _sink_class(name)
        if chosen.package is not None and importlib.util.find_spec(chosen.package) is None:
            raise RuntimeError(
                f"report.sinks: {name!r} needs the package {chosen.package}; pip install '{chosen.install}', or leave "
                "it out of report.sinks"
            )
        try:
            inspect.signature(chosen).bind(None, **report.sink_options.get(name, {}))
        except TypeError as error:
            raise ValueError(f"report.sink_options.{name}: {error}; its options are {_options(chosen)}") from None


def open_sinks(report: ReportSection, run: SinkRun, *, recorded_step: int) -> list[GuardedSink]:
    """Returns the run's sinks, ready for their first step.

    Args:
        recorded_step: the last step that earlier launches of this run recorded, -1 for none.

    Raises:
        ValueError, RuntimeError: as in ``check_sinks``, or a sink cannot start.
    """
    check_sinks(report)
    with ExitStack() as stack:
        opened = []
        for name in report.sinks:
            chosen = _sink_class(name)
            make: Callable[..., Sink] = chosen
            try:
                sink = make(run, **report.sink_options.get(name, {}))
            except Exception as error:  # a user's code, a server, a disk
                raise RuntimeError(
                    f"report.sinks: {name!r} cannot start: {type(error).__name__}: {mask_text(str(error))}; repair it, "
                    "or leave it out of report.sinks"
                ) from error
            guarded = (
                ThreadedSink(name, sink, first_step=recorded_step + 1)
                if chosen.remote
                else GuardedSink(name, sink, first_step=run.start_step)
            )
            stack.callback(guarded.close, failed=True)
            opened.append(guarded)
        stack.pop_all()
    return opened


def _sink_class(name: str) -> type[Sink]:
    if name in SINKS:
        return SINKS[name]
    module, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # a user's code
        raise ValueError(
            f"report.sinks: {name!r} cannot be imported: {type(error).__name__}: {error}; it must be "
            "'package.module:name', a class on the Python path (PYTHONPATH)"
        ) from error
    if not (isinstance(found, type) and issubclass(found, Sink)):
        raise ValueError(f"report.sinks: {name!r} must be a class derived from {Sink.__module__}.{Sink.__name__}")
    if missing := sorted(found.__abstractmethods__):
        raise ValueError(f"report.sinks: {name!r} must define {', '.join(missing)}, as {Sink.__module__}.Sink says")
    return found


def _options(chosen: type[Sink]) -> str:
    names = list(inspect.signature(chosen).parameters)[1:]
    return ", ".join(names) or "none"
