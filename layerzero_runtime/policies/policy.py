"""`Policy`: rules of the user's that bind the selection, each with the calls and the kernels that it is about."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase
from functools import lru_cache

from layerzero_runtime.context import FIELD_NAMES, SelectionContext
from layerzero_runtime.errors import PolicyLoadError
from layerzero_runtime.kernel import KernelSpec
from layerzero_runtime.selection.limits import Limit

# What a condition may read: the fields of a context and what follows from them.
CONDITION_FIELDS = tuple(
    sorted({*FIELD_NAMES, *(name for name, value in vars(SelectionContext).items() if isinstance(value, property))})
)

_matches = lru_cache(maxsize=4096)(fnmatchcase)


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule. A glob of "*" matches everything; a rule whose `when` is empty applies to all calls of its operations.

    Attributes:
        operation, kernel, backend: globs of operation names, kernel ids and libraries.
        when: conditions on the context, all of which must hold. A field that the call does not have (None) satisfies no
            bound and no divisor; a tuple of values must list it.
        boost: of a rule among `Policy.boosts`, what it adds; higher goes first.
        origin: where the rule was written, such as "policy.yaml:12".

    Raises:
        PolicyLoadError: a condition reads what no context has.
    """

    operation: str = "*"
    kernel: str = "*"
    backend: str = "*"
    when: tuple[Limit, ...] = ()
    boost: float = 0.0
    origin: str = ""

    def __post_init__(self) -> None:
        for condition in self.when:
            if condition.field not in CONDITION_FIELDS:
                raise PolicyLoadError(
                    f"{self.origin or 'a rule'}: {condition.field!r} in when is no field of a context; "
                    f"allowed: {', '.join(CONDITION_FIELDS)}"
                )

    def covers(self, spec: KernelSpec) -> bool:
        """Whether the rule is about this kernel."""
        return _matches(spec.kernel_id, self.kernel) and _matches(spec.backend, self.backend)

    def applies(self, context: SelectionContext) -> bool:
        """Whether the rule is about this call."""
        return _matches(context.operation, self.operation) and all(_holds(limit, context) for limit in self.when)

    def applies_by(self, context: SelectionContext, known: Collection[str]) -> bool | None:
        """The same where only these fields of the context are known; None where the others decide."""
        if not _matches(context.operation, self.operation):
            return False
        if not all(_holds(limit, context) for limit in self.when if limit.field in known):
            return False
        return True if all(limit.field in known for limit in self.when) else None

    def __str__(self) -> str:
        parts = [
            f"{name} {value}" for name in ("operation", "kernel", "backend") if (value := getattr(self, name)) != "*"
        ]
        parts += [f"{limit.field} {limit.required}" for limit in self.when]
        return f"{', '.join(parts) or 'everything'}" + (f" ({self.origin})" if self.origin else "")


def _holds(limit: Limit, context: SelectionContext) -> bool:
    actual = getattr(context, limit.field)
    if actual is None and limit.kind != "one_of":
        return False
    return limit.accepts(actual)


@dataclass(frozen=True, slots=True)
class Policy:
    """Rules by kind. The empty policy allows everything and changes nothing.

    In this order: a kernel that a deny rule covers never serves a call that the rule applies to. Where allow rules
    apply to a call, a kernel must be covered by one of them. The first lock that applies to a call and covers a kernel
    that could serve it restricts the choice to the kernels that it covers; a lock without such a kernel is ignored. Of
    what is left, the kernels with the highest sum of boosts go first, before any measurement.
    """

    locks: tuple[Rule, ...] = ()
    allows: tuple[Rule, ...] = ()
    denies: tuple[Rule, ...] = ()
    boosts: tuple[Rule, ...] = ()

    def rules(self) -> tuple[Rule, ...]:
        return tuple(rule for kind in fields(self) for rule in getattr(self, kind.name))

    def denial(self, spec: KernelSpec, context: SelectionContext) -> str | None:
        """Why the policy keeps the kernel from the call, None if it does not."""
        for rule in self.denies:
            if rule.covers(spec) and rule.applies(context):
                return f"POLICY_DENIED: by {rule}"
        applying = [rule for rule in self.allows if rule.applies(context)]
        if applying and not any(rule.covers(spec) for rule in applying):
            return f"POLICY_NOT_ALLOWED: covered by none of {'; '.join(map(str, applying))}"
        return None

    def boost(self, spec: KernelSpec, context: SelectionContext) -> float:
        """The sum of the boosts that cover the kernel and apply to the call."""
        return sum(rule.boost for rule in self.boosts if rule.covers(spec) and rule.applies(context))

    def overrules_measurement(self, context: SelectionContext) -> Rule | None:
        """The first lock or boost that applies to the call, which then is not the table's alone to decide."""
        return next((rule for rule in (*self.locks, *self.boosts) if rule.applies(context)), None)

    def relevance(self, context: SelectionContext, known: Collection[str]) -> str:
        """How the policy bears on all calls that share these known fields: "none", "fixed" where they decide every
        rule, or "per_call"."""
        outcomes = [rule.applies_by(context, known) for rule in self.rules()]
        if None in outcomes:
            return "per_call"
        return "fixed" if any(outcomes) else "none"

    def conditions(self, operation: str) -> Iterable[Limit]:
        """Every condition of the rules about this operation."""
        return (limit for rule in self.rules() if _matches(operation, rule.operation) for limit in rule.when)


EMPTY = Policy()
