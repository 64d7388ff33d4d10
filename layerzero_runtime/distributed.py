"""Several ranks that must select alike: tensor-parallel ones run one layer together, and mixed kernels mix roundings.

`attach` compares the ranks' snapshots once. From then on no kernel is replaced on one rank alone: one that fails raises
`KernelExecutionError` there, for the application to end or to restart all ranks. Policies, kernels and tables may still
be changed, on all ranks alike; call `verify_consistent` after that, on all ranks.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence

import torch.distributed as dist

from layerzero_runtime import ranks
from layerzero_runtime.dispatch import current_snapshot, health
from layerzero_runtime.errors import ContextError, ContextTypeError, RanksDifferError
from layerzero_runtime.rank_answers import Answers, ask, next_question

TIMEOUT_S = 30.0

Parts = Mapping[str, str]


def attach(group: dist.ProcessGroup | None = None, timeout_s: float = TIMEOUT_S) -> None:
    """Declare this process one of the group's ranks (of all, without one), after comparing them. Collective.

    While ranks are attached, breakers stay as they are: a broken kernel is not tried again before `detach`. Call this
    while no calls are under way.

    Raises:
        RanksDifferError: as `verify_consistent`; this process is not attached then.
        ContextError: as `verify_consistent`.
    """
    members = _members(group)
    before = ranks.group()
    ranks.set_group(members)
    try:
        for kernel_id in health().half_open:
            # Whether it works would show on each rank at a time of its own.
            health().failed(kernel_id, "not tried again before ranks were attached")
        verify_consistent(members, timeout_s)
    except BaseException:
        _let_go(before)
        raise


def detach() -> None:
    """Take this process out of the ranks: failed kernels are replaced, and broken ones tried again, as before."""
    _let_go(None)


def _let_go(group: object | None) -> None:
    ranks.set_group(group)
    if group is None:
        health().reopen_due()


def verify_consistent(group: dist.ProcessGroup | None = None, timeout_s: float = TIMEOUT_S) -> None:
    """Check that all ranks of a group (of the world, without one) select alike. Collective: each of them calls it, the
    same number of times, one thread at a time. Either all of them raise or none does.

    Raises:
        RanksDifferError: ranks differ, or did not answer within `timeout_s`; says which and in what.
        ContextError: there is no group, this process is no member of it, or the timeout is not above 0.
    """
    if isinstance(timeout_s, bool) or not isinstance(timeout_s, int | float):
        raise ContextTypeError(f"timeout_s must be a number, not {timeout_s!r}")
    if not (timeout_s > 0 and math.isfinite(timeout_s)):
        raise ContextError(f"timeout_s is {timeout_s}, required a finite number above 0")
    members = _members(group)
    # Numbered before anything can fail, so that the ranks do not get out of step.
    question = next_question(members, dist.get_rank(), dist.get_process_group_ranks(members))
    parts = current_snapshot().digest_parts
    answers = ask(question, json.dumps(parts), timeout_s)
    parts_by_rank = {rank: json.loads(text) for rank, text in answers.texts.items()}
    differing = differing_parts(parts_by_rank)
    if answers.unanswered or differing:
        raise RanksDifferError(_message(answers, parts_by_rank, differing, timeout_s), differing, answers.unanswered)


def _members(group: dist.ProcessGroup | None) -> dist.ProcessGroup:
    """The group, for None the whole world; this process is in it."""
    if not (dist.is_available() and dist.is_initialized()):
        raise ContextError("there is no group of ranks: call torch.distributed.init_process_group first")
    members = dist.group.WORLD if group is None else group
    if members is None or dist.get_rank(members) < 0:
        raise ContextError("this process is not a member of the group; only the group's ranks are compared")
    return members


def majority(parts_by_rank: Mapping[int, Parts]) -> tuple[int, ...]:
    """The ranks of the largest set that agrees in everything; among equally large ones that of the lowest rank."""
    alike: dict[tuple[tuple[str, str], ...], list[int]] = {}
    for rank, parts in sorted(parts_by_rank.items()):
        alike.setdefault(tuple(sorted(parts.items())), []).append(rank)
    largest: list[int] = max(alike.values(), key=len, default=[])
    return tuple(largest)


def differing_parts(parts_by_rank: Mapping[int, Parts]) -> dict[int, tuple[str, ...]]:
    """For each rank that is not of the majority, in which parts it differs from that."""
    most = majority(parts_by_rank)
    if not most:
        return {}
    usual = parts_by_rank[most[0]]
    return {
        rank: tuple(name for name in dict.fromkeys((*usual, *parts)) if parts.get(name) != usual.get(name))
        for rank, parts in sorted(parts_by_rank.items())
        if rank not in most
    }


def _message(
    answers: Answers, parts_by_rank: Mapping[int, Parts], differing: Mapping[int, Sequence[str]], timeout_s: float
) -> str:
    sentences = []
    if differing:
        most = majority(parts_by_rank)
        usual = parts_by_rank[most[0]]
        found = "; ".join(
            f"rank {rank} has another {name}: {parts_by_rank[rank].get(name)}, not {usual.get(name)}"
            for rank, names in differing.items()
            for name in names
        )
        sentences.append(
            f"ranks do not select alike: {found} as {_named(most)}. Give all ranks the same policy, kernels, tables "
            "and libraries, then call verify_consistent on all of them"
        )
    if answers.failure:
        sentences.append(
            f"the store of the group cannot be asked ({answers.failure}): {_named(answers.unanswered)} did not answer; "
            "restart the ranks"
        )
    elif answers.unanswered:
        sentences.append(
            f"{_named(answers.unanswered)} did not answer in time (this rank's timeout is {timeout_s:g} s): a rank has "
            "ended, hangs, or does not call verify_consistent; restart the ranks, or give a longer timeout_s"
        )
    return ". ".join(sentences)


def _named(numbers: Sequence[int]) -> str:
    return f"rank{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"
