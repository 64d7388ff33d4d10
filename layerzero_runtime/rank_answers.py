"""One question to all ranks of a group, answered through the store that the group met at.

No collective is used: one that waits for a dead rank may hang, or fail on the others in ways that name the wrong one.
Each rank writes its answer under a key of its own and polls for the others'. Whichever rank first has all answers, or
first gives up, writes the outcome, and all follow that: either every rank that asked sees all answers, or every one
sees the same list of ranks that did not answer.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store
    from torch.distributed import ProcessGroup

FIRST_PAUSE_S = 0.001
LONGEST_PAUSE_S = 0.05
# Of the timeout, kept back to agree on who did not answer: a tenth, at most so many seconds.
LONGEST_RESERVE_S = 1.0

# Numbers the questions of each group, so that their keys do not mix; equal on all ranks, which ask together.
_numbers: WeakKeyDictionary[ProcessGroup, count[int]] = WeakKeyDictionary()


@dataclass(frozen=True, slots=True)
class Question:
    """A question of a group, by a number of its own."""

    store: Store
    rank: int
    ranks: tuple[int, ...]
    number: int

    def key(self, name: object, earlier: int = 0) -> str:
        return f"layerzero/{self.number - earlier}/{name}"


@dataclass(slots=True)
class Answers:
    """What came of a question.

    Attributes:
        texts: by rank.
        unanswered: ranks that did not answer in time.
        failure: why the store could not be asked, "" if it could.
    """

    texts: dict[int, str] = field(default_factory=dict)
    unanswered: tuple[int, ...] = ()
    failure: str = ""


def next_question(group: ProcessGroup, rank: int, ranks: Sequence[int]) -> Question:
    """The group's next question; ranks are numbered as in the whole world."""
    number = next(_numbers.setdefault(group, count(1)))
    return Question(group.get_group_store(), rank, tuple(ranks), number)


def ask(question: Question, text: str, timeout_s: float) -> Answers:
    """Give this rank's answer and wait for the others', for `timeout_s` at most.

    A store that no longer answers may block whoever asks it, so that a thread of its own does. Once stuck it is left
    behind.
    """
    asking = _Asking(question, text, timeout_s)
    thread = threading.Thread(target=asking.run, name="layerzero-ranks", daemon=True)
    thread.start()
    thread.join(timeout_s)
    if asking.answers is not None:
        return asking.answers
    failure = asking.failure or "it does not answer"
    return Answers(unanswered=_behind_the_store(question), failure=failure)


class _Asking:
    """The course of a question; `answers` stays None while there are none, `failure` says why there will be none."""

    def __init__(self, question: Question, text: str, timeout_s: float) -> None:
        self._question = question
        self._text = text
        reserve_s = min(timeout_s / 10, LONGEST_RESERVE_S)
        self._deadline = time.monotonic() + timeout_s - reserve_s
        self._last_moment = self._deadline + reserve_s / 2
        self.answers: Answers | None = None
        self.failure = ""

    def run(self) -> None:
        try:
            self.answers = self._ask()
        except RuntimeError as error:  # torch's errors of stores and sockets are below it
            self.failure = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__

    def _ask(self) -> Answers:
        question, store = self._question, self._question.store
        store.set(question.key(question.rank), self._text)
        unanswered = self._wait()
        # The first to decide decides for all; whoever comes later gets what is there already.
        outcome = store.compare_set(question.key("outcome"), "", json.dumps(unanswered))
        answers = Answers(unanswered=tuple(json.loads(outcome)))
        for rank in question.ranks:
            if rank not in answers.unanswered:
                answers.texts[rank] = store.get(question.key(rank)).decode()
        store.set(question.key(f"{question.rank}/done"), "")
        if question.rank == 0:
            self._wait_for_readers(answers.texts)
        if not answers.unanswered:
            self._forget_earlier()
        return answers

    def _wait_for_readers(self, ranks: Iterable[int]) -> None:
        """Rank 0 may hold the store: it does not go on, perhaps to its end, before the others know the outcome."""
        keys = [self._question.key(f"{rank}/done") for rank in ranks]
        pauses = _pauses()
        while not self._question.store.check(keys) and time.monotonic() < self._last_moment:
            time.sleep(next(pauses))

    def _wait(self) -> list[int]:
        """The ranks that have not answered when the time is up or another rank has decided; none if all have."""
        question, store = self._question, self._question.store
        keys = [question.key(rank) for rank in question.ranks]
        pauses = _pauses()
        while not store.check(keys):
            if time.monotonic() >= self._deadline or store.check([question.key("outcome")]):
                return [rank for rank in question.ranks if not store.check([question.key(rank)])]
            time.sleep(next(pauses))
        return []

    def _forget_earlier(self) -> None:
        """Delete what this rank wrote for the question before: who has answered this one is done with that."""
        question = self._question
        if question.number > 1:
            names: list[object] = [question.rank, f"{question.rank}/done"]
            if question.rank == question.ranks[0]:
                names.append("outcome")
            for name in names:
                question.store.delete_key(question.key(name, earlier=1))


def _pauses() -> Iterator[float]:
    """Between looks at the store: short ones first."""
    pause = FIRST_PAUSE_S
    while True:
        yield pause
        pause = min(2 * pause, LONGEST_PAUSE_S)


def _behind_the_store(question: Question) -> tuple[int, ...]:
    """The ranks to name where the store does not answer: the one that holds it where that is known, else all others.

    Rank 0 holds the TCPStore of a world that met at an address, unless its launcher's agent does.
    """
    from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

    store = question.store
    while isinstance(store, PrefixStore):
        store = store.underlying_store
    of_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if isinstance(store, TCPStore) and not of_agent and question.rank != 0:
        return (0,)
    return tuple(rank for rank in question.ranks if rank != question.rank)
