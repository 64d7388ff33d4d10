"""`IN_FORCE`: the functions that traced graphs may call now, by name. Dynamo guards on each attribute that it read."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from typing import Any

from torch._dynamo.callback import CallbackArgs, callback_handler

from layerzero_runtime.errors import LayerZeroError
from layerzero_runtime.selection.live_selector import Choice
from layerzero_runtime.serving.published import PUBLISHED
from layerzero_runtime.snapshot import Snapshot

# Beyond this the oldest answers are given up; graphs that rest on them are compiled again.
MAX_ANSWERS = 4096


class _InForce:
    """Holds functions as attributes."""


IN_FORCE: Any = _InForce()


@dataclass(frozen=True)
class Answer:
    """What serves the calls of a traced graph.

    Attributes:
        function: called in the graph with the arguments of the operation's kernels.
        choice: the kernel that it stands for.
        basis: all that the choice followed from.
        basis_in: the same of another snapshot: the answer holds where both are equal.
    """

    function: Callable[..., Any]
    choice: Choice
    basis: object
    basis_in: Callable[[Snapshot], object]

    def holds(self, snapshot: Snapshot) -> bool:
        try:
            return self.basis_in(snapshot) == self.basis
        except LayerZeroError:  # nothing serves these calls any more
            return False


# Guards the two below; held while an answer is compared with a snapshot, so that none is put in force behind one.
_lock = threading.Lock()
_answers: dict[str, Answer] = {}
# Those that the compilations under way have asked for: Dynamo fails where a guard does not hold at the end of its own
# compilation, so they stay until then, whatever is published. No other graph rests on them.
_asked_for: set[str] = set()
_numbers = count()


def name_of(answer: Answer, snapshot: Snapshot) -> str | None:
    """Put an answer of a snapshot in force; None where another snapshot has been published that answers otherwise."""
    if _compilations_ended not in callback_handler.end_callbacks:  # torch._dynamo.reset takes it out
        callback_handler.register_end_callback(_compilations_ended)
    with _lock:
        now = PUBLISHED.snapshot
        if now is not None and now is not snapshot and not answer.holds(now):
            return None
        for name in _asked_for:
            known = _answers[name]
            if known.function is answer.function and known.choice == answer.choice and known.basis == answer.basis:
                return name
        name = f"{answer.choice.kernel.kernel_id.replace('.', '_')}_{next(_numbers)}"
        if len(_answers) >= MAX_ANSWERS:
            _drop(next(iter(_answers)))
        _answers[name] = answer
        _asked_for.add(name)
        setattr(IN_FORCE, name, answer.function)
        return name


def _drop(name: str) -> None:
    del _answers[name]
    _asked_for.discard(name)
    vars(IN_FORCE).pop(name, None)


def refusal(error: LayerZeroError) -> str:
    """The name of a function that raises an error in place of a kernel."""
    kind, message = type(error), str(error)

    def refuse(*arguments: Any) -> Any:
        raise kind(message)

    IN_FORCE.refused = refuse
    return "refused"


def give_up() -> None:
    """Give up all answers, as after `torch._dynamo.reset()`: graphs that rest on them are compiled again."""
    with _lock:
        _answers.clear()
        _asked_for.clear()
        vars(IN_FORCE).clear()


def _follow(snapshot: Snapshot) -> None:
    """Take away the answers that do not hold in a snapshot, and put back those that do: their graphs serve again."""
    with _lock:
        for name, answer in _answers.items():
            if answer.holds(snapshot):
                setattr(IN_FORCE, name, answer.function)
            elif name not in _asked_for:
                vars(IN_FORCE).pop(name, None)


def _compilations_ended(arguments: CallbackArgs) -> None:
    """Let the answers of the compilations that have just ended follow what was published meanwhile."""
    with _lock:
        asked_for = tuple(_asked_for)
        _asked_for.clear()
        for name in asked_for:
            if PUBLISHED.snapshot is not None and not _answers[name].holds(PUBLISHED.snapshot):
                vars(IN_FORCE).pop(name, None)


PUBLISHED.followers += (_follow,)
