"""A contest in this process: admission, correctness, then the clock."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from time import perf_counter
from types import MappingProxyType

from layerzero_runtime.accuracy import error_floor
from layerzero_runtime.kernel import Kernel, KernelFunction
from layerzero_runtime.operations import operation_named
from layerzero_runtime.selection.transforms import apply_transforms
from layerzero_tune.measure.admission import refusal
from layerzero_tune.measure.bench import Bench
from layerzero_tune.measure.clock import BLOCKS, Rotation, TimedCalls, take_sample, warm_up
from layerzero_tune.measure.contention import MAX_ATTEMPTS, MAX_SHARE, others_share
from layerzero_tune.measure.contest import COMPILING_CALL, LOAD, Candidate, Contest, ContestOutcome, JobOutcome
from layerzero_tune.measure.core_speed import CoreWatch
from layerzero_tune.measure.correctness import Check, judge, tolerances
from layerzero_tune.measure.entrants import Entrants, Progress
from layerzero_tune.measure.failures import Result, attempt
from layerzero_tune.measure.full_speed import FullSpeed
from layerzero_tune.measure.gpu_state import OWN_LOAD, GpuConditions, GpuState
from layerzero_tune.measure.inputs import RandomTensors, check_measurable, rotating_inputs
from layerzero_tune.measure.kept_memory import KEPT_BYTES, KeptMemory
from layerzero_tune.measure.screening import finalists
from layerzero_tune.measure.verification import later_fault, tolerances_on
from layerzero_tune.measure.work import WIDEST_BYTES, call_elements

_NOTHING_SETTLED: Mapping[int, JobOutcome] = MappingProxyType({})
# With the time of the warm-up these are three, of which one may be disturbed.
_MIN_SCREENINGS = 2
# A candidate so many times slower than the best is settled by two looks; more would cost as much as all the others.
_HOPELESS = 4.0
# One so many times slower takes no part in the final rounds, however much noise makes the others' times differ.
_BEYOND_NOISE = 32.0


def measure_contest(
    contest: Contest,
    kernels: Mapping[str, Kernel],
    *,
    device: str = "cpu",
    settled: Mapping[int, JobOutcome] = _NOTHING_SETTLED,
    progress: Progress = lambda candidate, step: None,
    tuner: int | None = None,
) -> ContestOutcome:
    """Measure the contest's candidates on a device of this machine (torch's name for it), in this process.

    Everything runs under `torch.inference_mode`, as the loops of serving engines do: no autograd is recorded and no
    version counters are kept. Threads are torch's default. `settled` holds outcomes that are known already (of kernels
    that killed an earlier process), by index; those candidates are not touched. `tuner` is as for `Bench.of`.

    Raises:
        ContextError: the point cannot be measured on the device: graph mode on a CPU, an unknown operation or dtype, a
            missing size, or a feature that the generated inputs lack.
        DeviceError: there is no such device.
        SpoiledProcessError: a candidate left the process unfit: its device is lost, or its memory runs away.
    """
    import torch

    bench = Bench.of(device, contest.context.mode, tuner)
    with torch.inference_mode(), bench.current():
        run = _ContestRun(contest, kernels, bench, settled, progress)
        outcomes = run.run()
    ended = datetime.now(UTC).isoformat(timespec="seconds")
    return ContestOutcome(outcomes, ended, run.preparation_s, run.contention, run.gpu_conditions)


class _ContestRun:
    """One run of a contest."""

    full_speed: FullSpeed
    core: CoreWatch | None
    timed: dict[int, TimedCalls]

    def __init__(
        self,
        contest: Contest,
        kernels: Mapping[str, Kernel],
        bench: Bench,
        settled: Mapping[int, JobOutcome],
        progress: Progress,
    ) -> None:
        self.candidates = contest.candidates
        self.policy = contest.policy
        self.operation = operation_named(contest.context.operation)
        self.operation.validate(contest.context)
        check_measurable(contest.context)
        error_floor(contest.context.result_dtype)  # raises for a dtype that has none
        self.bench = bench
        self.context = contest.context.with_device(bench.spec)
        self.kernels = kernels
        self.progress = progress
        self.seed = contest.seed
        self.chance = random.Random(contest.seed)
        self.first_call_ns: dict[int, float] = {}
        copies = 2 * call_elements(self.context) * WIDEST_BYTES
        # Tensors of other devices are not the C library's, which there holds what drivers and graphs ask for.
        kept = KEPT_BYTES + self.policy.cache_bytes + copies if bench.spec.platform == "cpu" else math.inf
        self.entrants = Entrants(settled, KeptMemory(kept), progress)
        self.preparation_s = 0.0
        self.contention = 0.0
        self.gpu_states: list[GpuState] = []

    def run(self) -> tuple[JobOutcome, ...]:
        start = perf_counter()
        self.bench.give_back_memory()
        entered = self._admit()
        source = RandomTensors(self.bench.name, self.seed)
        self._check(entered, source)
        self.preparation_s = perf_counter() - start
        self._time_undisturbed(source)
        return tuple(self.entrants.outcomes[index] for index in range(len(self.candidates)))

    def _admit(self) -> list[int]:
        """Indices of the candidates that may run, the default first; outcomes for the others."""
        admitted = []
        for index, candidate in enumerate(self.candidates):
            if index not in self.entrants.outcomes:
                refused = refusal(candidate, self.kernels, self.context)
                if refused is None:
                    admitted.append(index)
                else:
                    self.entrants.outcomes[index] = refused
        return sorted(admitted, key=lambda index: not self.candidates[index].is_default)

    def _check(self, entered: list[int], source: RandomTensors) -> None:
        """Load and check; the default, which comes first, says how accurate the others have to be."""
        self.progress(None, "reference")
        check = attempt(lambda: Check.prepare(self.operation, self.context, source, self.seed))
        if isinstance(check, JobOutcome):
            self.entrants.outcomes.update(dict.fromkeys(entered, check))
            return
        allowed: tuple[float, ...] | None = None
        for index in entered:
            self.progress(index, LOAD)
            function = self.entrants.attempt(index, partial(self._load, self.candidates[index]), "compile_failed")
            if function is None:
                continue
            compiles = self.kernels[self.candidates[index].kernel_id].spec.compiles
            self.progress(index, COMPILING_CALL if compiles else "first call")
            run = partial(self.entrants.memory.count, index, partial(check.run, function))
            trial = self.entrants.attempt(index, run, "compile_failed" if compiles else "failed")
            if trial is None:
                continue
            if allowed is None:
                usable = self.candidates[index].is_default and not trial.fault
                allowed = tolerances(trial if usable else check.written_out(), self.context.result_dtype)
            verdict = judge(trial, allowed)
            self.entrants.outcomes[index] = JobOutcome(
                verdict.status, verdict.message, verdict.relative_error, verdict.tolerance
            )
            if verdict.status == "ok":
                self.entrants.functions[index] = function
                self.first_call_ns[index] = trial.call_ns

    def _load(self, candidate: Candidate) -> KernelFunction:
        kernel = self.kernels[candidate.kernel_id]
        return apply_transforms(kernel.load(self.context, candidate.configuration), kernel.spec, self.context)

    def _verify(self, indices: Iterable[int], source: RandomTensors) -> None:
        """Check candidates that were right at first again, on fresh inputs."""
        entered = sorted(self.entrants.functions.keys() & set(indices))
        if not entered:
            return
        self.progress(None, "reference")
        check = attempt(lambda: Check.prepare(self.operation, self.context, source, self.chance.getrandbits(32)))
        if isinstance(check, JobOutcome):
            for index in entered:
                self.entrants.outcomes[index] = check
                del self.entrants.functions[index]
            return
        allowed = None
        for index in entered:
            if self.candidates[index].is_default:
                self.progress(index, "verification")
                allowed = self.entrants.attempt(index, partial(tolerances_on, check, self.entrants.functions[index]))
        if allowed is None:
            allowed = tolerances_on(check, None)
        for index, function in tuple(self.entrants.functions.items()):
            if index not in entered:
                continue
            fault = self.entrants.step(index, "verification", partial(later_fault, check, function, allowed))
            if fault:
                self.entrants.outcomes[index] = JobOutcome("flaky", fault)
                del self.entrants.functions[index]

    def _time_undisturbed(self, source: RandomTensors) -> None:
        """Time the candidates, again where other processes took much of the machine meanwhile."""
        self.progress(None, "inputs")
        sets = attempt(lambda: rotating_inputs(self.operation, self.context, self.policy, source))
        if isinstance(sets, JobOutcome):
            self.entrants.outcomes.update(dict.fromkeys(self.entrants.functions, sets))
            return
        for _ in range(MAX_ATTEMPTS):
            waiting = partial(self.progress, None, "waiting for the machine")
            core = self.core = None if self.bench.core is None else CoreWatch(self.bench.core, waiting)
            in_parts_s = (lambda: 0.0) if core is None else partial(getattr, core, "waited_s")
            speed = self.full_speed = FullSpeed(self.bench.speed, waiting, self.bench.patience, in_parts_s)
            start = self.bench.now()
            speed.wait()
            self.gpu_states.clear()
            self._time(Rotation(sets), source)
            others = others_share(start, self.bench.now()) if self.bench.is_shared else 0.0
            self.contention = max(others, speed.lost, core.lost if core else 0.0)
            if others <= MAX_SHARE:
                break
        self._verify(self.entrants.functions, source)

    def _time(self, rotation: Rotation, source: RandomTensors) -> None:
        self.timed = {}
        for index in tuple(self.entrants.functions):
            function = self.entrants.functions[index]
            made = self.entrants.step(index, "prepare", partial(self.bench.clock.timed, function, rotation))
            if made is not None:
                self.timed[index] = made
        call_ns = {
            index: time
            for index in tuple(self.timed)
            if (
                time := self.entrants.step(index, "warm-up", partial(warm_up, self.timed[index], self.policy.warmup_ms))
            )
            is not None
        }
        slow = frozenset(index for index, time in call_ns.items() if time > self.policy.max_call_ms * 1e6)
        settled = slow | self._slower(call_ns, _HOPELESS)
        screened = self._at_full_speed(lambda: self._screen(call_ns, settled))
        entered = finalists(screened, self.policy.screen_margin) - slow - self._slower(call_ns, _BEYOND_NOISE)
        # The default and the anchors tie contests together, whatever the screening says of them.
        always = frozenset(
            i for i in self.entrants.functions if self.candidates[i].is_default or self.candidates[i].is_anchor
        )
        without_rounds = any(self.candidates[index].is_default for index in slow)
        entered = frozenset() if without_rounds else entered | (always - slow)
        self._verify(entered, source)
        samples = self._final_rounds(call_ns, entered & self.entrants.functions.keys())
        for index in self.entrants.functions:
            self.entrants.outcomes[index] = replace(
                self.entrants.outcomes[index],
                screen_ns=statistics.median(screened[index]),
                samples_ns=tuple(samples.get(index, ())),
            )

    def _at_full_speed(self, part: Callable[[], Result]) -> Result:
        """What the part gives at full speed; of a GPU, the state in which it was taken is kept."""
        found = self.full_speed.take(part if self.core is None else self.core.part(part))
        if self.core is not None:
            self.core.keep_part()
        if self.bench.gpu is not None:
            is_own_load = self.full_speed.is_own_load and self.bench.gpu.is_of_load()
            state = self.bench.gpu.last
            self.gpu_states.append(replace(state, slowed=(OWN_LOAD,)) if is_own_load else state)
        return found

    def _timed_step(self, index: int, name: str, call_ns: float, measure: Callable[[], float]) -> float | None:
        """As `Entrants.step`, on a core at full speed where a call is so short that the host's part decides."""
        step = partial(self.entrants.step, index, name, measure)
        return step() if self.core is None else self.core.take(call_ns, step)

    @property
    def gpu_conditions(self) -> GpuConditions | None:
        """The state of the GPU, and of the core that calls it, over all parts that were kept; None for a CPU or where
        nothing was timed."""
        return GpuConditions.of(self.gpu_states, self.core.seen_ns if self.core else ()) if self.gpu_states else None

    def _slower(self, call_ns: Mapping[int, float], times: float) -> frozenset[int]:
        """The candidates that were so many times slower than the best in their first call and while they warmed up."""
        fastest = {index: min(time, self.first_call_ns[index]) for index, time in call_ns.items()}
        return frozenset(index for index, time in fastest.items() if time > times * min(fastest.values()))

    def _screen(self, call_ns: Mapping[int, float], settled: frozenset[int]) -> dict[int, list[float]]:
        """Times per candidate in ns per call: that of the warm-up and, where this is not `settled`, some more.

        They are taken in turn, so that a drift of the machine falls on all candidates.
        """
        screen_ns = self.policy.screen_ms * 1e6
        turns = {
            index: 0 if index in settled else min(BLOCKS, max(_MIN_SCREENINGS, screen_ns // call))
            for index, call in call_ns.items()
        }
        times = {index: [call] for index, call in call_ns.items()}
        for turn in range(BLOCKS):
            for index in self._shuffled(index for index in times if turn < turns[index]):
                calls = max(1, round(screen_ns / BLOCKS / call_ns[index]))
                time = self._timed_step(index, "screening", call_ns[index], partial(self.timed[index], calls))
                if time is not None:
                    times[index].append(time)
        return {index: found for index, found in times.items() if index in self.entrants.functions}

    def _final_rounds(self, call_ns: Mapping[int, float], entered: frozenset[int]) -> dict[int, list[float]]:
        """Medians of the rounds in ns per call, by candidate: one per round for each that came through all of them."""
        samples: dict[int, list[float]] = {index: [] for index in entered}
        for number in range(1, self.policy.rounds + 1):
            for index, time in self._at_full_speed(partial(self._round, number, call_ns, entered)).items():
                samples[index].append(time)
        return samples

    def _round(self, number: int, call_ns: Mapping[int, float], entered: frozenset[int]) -> dict[int, float]:
        times: dict[int, float] = {}
        for index in self._shuffled(entered):
            measure = partial(take_sample, self.timed[index], call_ns[index], self.policy.round_ms)
            time = self._timed_step(index, f"round {number}", call_ns[index], measure)
            if time is not None:
                times[index] = time
        return times

    def _shuffled(self, indices: Iterable[int]) -> list[int]:
        order = sorted(indices)
        self.chance.shuffle(order)
        return order
