"""`IN_FORCE`: the functions that traced graphs may call now, by name. Dynamo guards on each attribute that it read."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from typing import Any

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


# Guards `_answers`; held while an answer is compared with a snapshot, so that none is put in force behind one.
_lock = threading.Lock()
_answers: dict[str, Answer] = {}
_numbers = count()


def name_of(answer: Answer, snapshot: Snapshot) -> str | None:
    """Put an answer of a snapshot in force; None where another snapshot has been published that answers otherwise.

    Equal answers have one name, so that a graph which rests on one serves again once that holds again.
    """
    with _lock:
        now = PUBLISHED.snapshot
        if now is not None and now is not snapshot and not answer.holds(now):
            return None
        for name, known in _answers.items():
            if known.function is answer.function and known.choice == answer.choice and known.basis == answer.basis:
                setattr(IN_FORCE, name, known.function)
                return name
        name = f"{answer.choice.kernel.kernel_id.replace('.', '_')}_{next(_numbers)}"
        if len(_answers) >= MAX_ANSWERS:
            oldest = next(iter(_answers))
            del _answers[oldest]
            vars(IN_FORCE).pop(oldest, None)
        _answers[name] = answer
        setattr(IN_FORCE, name, answer.function)
        return name


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
        vars(IN_FORCE).clear()


def _follow(snapshot: Snapshot) -> None:
    """Take away the answers that do not hold in a snapshot, and put back those that do."""
    with _lock:
        for name, answer in _answers.items():
            if answer.holds(snapshot):
                setattr(IN_FORCE, name, answer.function)
            else:
                vars(IN_FORCE).pop(name, None)


PUBLISHED.followers += (_follow,)
