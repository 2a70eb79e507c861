"""One recorder of solves per engine, shared by all handlers that report them."""

from __future__ import annotations

from weakref import WeakKeyDictionary

from ignite.engine import Engine, Events

from monai_deqkan.solvers import SolveRecorder

__all__ = ["IterationRecorder"]

_OF_ENGINE: WeakKeyDictionary[Engine, IterationRecorder] = WeakKeyDictionary()


class IterationRecorder:
    """Record the solves of each iteration of an engine.

    Recorders must be closed in the reverse order of their opening, but Ignite calls the handlers of all events in the
    same order. Therefore there is one for all handlers of an engine. Get it by :meth:`of` before attaching handlers
    that read :attr:`last` when an iteration is completed.

    Args:
        engine: the trainer or evaluator to attach to.

    Attributes:
        last: the closed recorder of the last iteration that was completed.
    """

    def __init__(self, engine: Engine) -> None:
        self.last = SolveRecorder()
        self._open_one: SolveRecorder | None = None
        engine.add_event_handler(Events.ITERATION_STARTED, self._open)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._close)
        engine.add_event_handler(Events.EXCEPTION_RAISED, self._abandon)

    @classmethod
    def of(cls, engine: Engine) -> IterationRecorder:
        """Return the engine's recorder, made at the first call."""
        if engine not in _OF_ENGINE:
            _OF_ENGINE[engine] = cls(engine)
        return _OF_ENGINE[engine]

    def _open(self) -> None:
        # Still open where another handler passed an exception on before this one could see it.
        self._close()
        self._open_one = SolveRecorder().__enter__()

    def _close(self) -> None:
        if self._open_one is not None:
            self.last, self._open_one = self._open_one, None
            self.last.__exit__(None, None, None)

    def _abandon(self, engine: Engine, error: BaseException) -> None:
        self._close()
        raise error  # Ignite takes an exception for handled once a handler has seen it.
