"""The outer loop of members that share one computation.

The bookkeeping of each member is the ``Run`` that it would have alone (``outer_loop.py``); what is vectorised, inner
steps, hypergradients and moves of the hyperparameters, is put in its places here.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hyperopt_implicit.errors import HypergradientError
from hyperopt_implicit.history import Result, summarise
from hyperopt_implicit.hyperparameters import Value
from hyperopt_implicit.implicit import ImplicitBackend
from hyperopt_implicit.interrupts import Interrupt
from hyperopt_implicit.members import Members, column
from hyperopt_implicit.members_batches import Generators, MembersStream, put_together
from hyperopt_implicit.members_compiled import CompiledMembers
from hyperopt_implicit.members_curvature import Hypergradients, hypergradients, matrix
from hyperopt_implicit.members_solver import as_alone, norms
from hyperopt_implicit.members_training import MembersSnapshot, MembersTraining
from hyperopt_implicit.members_update import members_optimizer
from hyperopt_implicit.outer_loop import Taken
from hyperopt_implicit.prepared_run import PreparedRun
from hyperopt_implicit.snapshot import Snapshot
from hyperopt_implicit.vectors import Params

Outcome = Result | Exception


class PopulationRun:
    """Runs that are trained together.

    Args:
        runs: begun, and alike; their problems' tensors are put into stacks.
        backend: with a solver for many.
        generators: a state of torch's generators for each.
        compile: whether the computation is compiled; the places of members that leave are kept then.

    Attributes:
        outcomes: what each run has come to, by its place among ``runs``.
    """

    def __init__(
        self,
        runs: Sequence[PreparedRun],
        backend: ImplicitBackend,
        generators: Generators,
        *,
        compile: bool = False,
    ) -> None:
        self._runs = list(runs)
        self._backend = backend
        self._generators = generators
        self._options = runs[0].options
        self._places = list(range(len(runs)))
        self.outcomes: dict[int, Outcome] = {}
        loops = [each.run.loop for each in runs]
        self.members = Members([each.problem for each in runs])
        self._training = MembersStream(
            [each.training for each in loops], [each.problem.training_data for each in runs], generators
        )
        self._validation = MembersStream(
            [each.validation for each in loops], [each.problem.validation_data for each in runs], generators
        )
        self._compiled = CompiledMembers(self.members) if compile else None
        self._make()
        self._initial: MembersSnapshot | None = None
        if self._options.restart:
            self._initial = MembersSnapshot(self.members, self._inner)
            self._initial.take()

    def _make(self) -> None:
        """All that depends on which members there are."""
        problems = self.members.problems
        self._inner = members_optimizer(
            [each.optimizer for each in problems],
            [list(each.params.values()) for each in problems],
            self.members.params,
        )
        self._outer = members_optimizer(
            [each.outer.optimizer for each in self._runs],
            [list(each.hparams.values()) for each in problems],
            self.members.hparams,
        )
        self._steps = MembersTraining(self.members, self._inner, self._training, self._generators, self._compiled)
        self._live = list(range(len(self._runs)))
        self._good = MembersSnapshot(self.members, self._inner)
        self._good.take()
        for i, each in enumerate(self._runs):
            each.run.good = self._good.of(i)
        solver = self._backend.members_solver(problems)
        assert solver is not None
        self._solve = solver
        self._projects = any(
            callable(getattr(module, "project_", None))
            for each in problems
            for module in each.hyperparameters.modules()
            if module is not each.hyperparameters
        )

    @property
    def inner_steps(self) -> int:
        """Steps between two hypergradients."""
        return self._options.inner_steps

    @property
    def outer_steps(self) -> int:
        """How many there are at most."""
        return self._options.outer_steps

    def peek(self) -> tuple[list[Any], list[Any]]:
        """The next training batch and the next validation batch of each member."""
        return self._training.peek(), self._validation.peek()

    def dissolve(self) -> None:
        """Give each member memory of its own, as it was before it became one of many."""
        for i, each in enumerate(self._runs):
            self._inner.free(i)
            self._outer.free(i)
            each.run.good = Snapshot(each.problem)
        self.members.keep([])
        for each in self._runs:
            each.run.good.take()

    def go(self, interrupt: Interrupt | None = None) -> None:
        """Train all members to their ends, or until a signal asks for one."""
        try:
            if self._options.warmup_steps:
                values, rows = self._values()
                self._steps.take(self._options.warmup_steps, values, rows, self._good)
                for each, sound in zip(self._runs, self._sound(), strict=True):
                    each.run.is_good, each.run.warmed = sound, self._options.warmup_steps
            for step in range(self._options.outer_steps):
                if not self._live:
                    return
                self.advance(step, interrupt)
            self._leave(dict.fromkeys(self._live))
        except BaseException as error:
            for i in self._live:
                self._runs[i].close(error)
            raise

    def advance(self, step: int, interrupt: Interrupt | None = None) -> None:
        """One outer step of all members; those that have come to their end leave."""
        started = time.perf_counter()
        before = self._begin()
        stacked, values = self._values()
        losses = self._steps.take(self._options.inner_steps, stacked, values, before)
        trained = time.perf_counter()
        names = [each.hyperparameters.element_names for each in self.members.problems]
        shown = [summarise(own, elements) for own, elements in zip(values, names, strict=True)]
        found = self._differentiate()
        sound = self._sound()
        taken = [Taken(losses[i], shown[i], found.results[i], found.sizes[i], sound[i]) for i in range(len(self._runs))]
        lost = {i: self._runs[i].run.judge(step, taken[i]) for i in self._live}
        applied, ends = self._move(taken, found.gradients)
        going = [i for i in self._live if i not in ends]
        for i in going:
            self._runs[i].run.settle(step)
        ended = time.perf_counter()
        share = len(self._live)
        seconds = (trained - started) / share, (ended - trained) / share
        for i in going:
            each = self._runs[i]
            each.run.seconds += sum(seconds)
            with self._generators.of(i):
                record = each.run.record(step, taken[i], lost=lost[i], applied=applied[i], seconds=seconds)
            each.log(record)
            each.heed(interrupt)
            self._save(i)
            if each.run.stop_reason is not None:
                ends[i] = None
        self._leave(ends)

    # ----------------------------------------------------------------------------------------------------- the parts

    def _begin(self) -> MembersSnapshot:
        """Copy the state in which the step begins; gives the state in which its training does."""
        good = [i for i in self._live if self._runs[i].run.is_good]
        if len(good) == len(self._live):
            self._good.take()
            before = self._good
        else:  # after a warm-up that was lost; the present state is no place to come back to
            before = MembersSnapshot(self.members, self._inner)
            before.take()
            self._good.take(good)
        if self._initial is not None:
            before = self._initial
            before.restore(self._live)
        return before

    def _save(self, member: int) -> None:
        """Save a member where it is time to, or a signal has ended it, as the run alone that it could go on as."""
        run = self._runs[member]
        if run.keeper is None or not (run.keeper.is_due() or run.run.stop_reason == "interrupted"):
            return
        self._training.place(member)
        self._validation.place(member)
        for optimizer in (self._inner, self._outer):
            optimizer.release(member)
        rows = run.outer.state
        run.outer.state = as_alone(rows, run.problem.params)
        with self._generators.of(member):
            run.saved = run.keeper.save()
        run.outer.state = rows
        for optimizer in (self._inner, self._outer):
            optimizer.adopt(member)

    def _values(self) -> tuple[Params, list[dict[str, Value]]]:
        """The constrained hyperparameters, stacked, and of each member."""
        stacked = self.members.values()
        rows = {name: x.unbind(0) for name, x in stacked.items()}
        values: list[dict[str, Value]] = []
        for i, problem in enumerate(self.members.problems):
            held = problem.hyperparameters
            values.append({name: rows[name][i] if name in rows else getattr(held, name) for name in held.declarations})
        return stacked, values

    def _sound(self) -> list[bool]:
        """Whether the weights of each member are finite."""
        with torch.no_grad():
            return torch.tensor(norms(matrix(self.members.params))).isfinite().tolist()

    def _differentiate(self) -> Hypergradients:
        count = self._options.hessian_batches
        training = [put_together(self._training.next()) for _ in range(count)]
        validation = put_together(self._validation.next())
        states = [each.outer.state for each in self._runs]
        damping, compiled = self._backend.damping, self._compiled
        found = hypergradients(self.members, self._solve, damping, training, validation, states, compiled)
        for each, result in zip(self._runs, found.results, strict=True):
            each.outer.carry(result)
        return found

    def _move(self, taken: Sequence[Taken], gradients: Params) -> tuple[list[bool], dict[int, Exception | None]]:
        """Move the hyperparameters of all members as ``HyperOptimizer.apply`` does; who moved, and who has failed."""
        ends: dict[int, Exception | None] = {}
        scales: dict[int, float | None] = {}
        for i in self._live:
            try:
                scales[i] = self._runs[i].outer.guard.scale_of(taken[i].result, taken[i].size)
            except HypergradientError as error:
                scales[i], ends[i] = None, error
        moved = [scales.get(i) is not None for i in range(len(self._runs))]
        before = [x.detach().clone() for x in self.members.hparams.values()]
        with torch.no_grad():
            if None not in scales.values():
                factors = [scales.get(i) or 0.0 for i in range(len(self._runs))]
                if any(factor != 1.0 for factor in factors):
                    gradients = {name: x * column(factors, x) for name, x in gradients.items()}
                self._outer.step(dict(gradients))
            else:
                for i, scale in scales.items():
                    if scale is not None:
                        self._move_alone(i, taken[i], scale)
        for i, inside in enumerate(self.members.inside()):
            if moved[i] and not inside:
                self._put_back(before, i)
                moved[i] = False
                try:
                    self._runs[i].outer.guard.complain_of_step()
                except HypergradientError as error:
                    ends[i] = error
        if self._projects:
            for i in self._live:
                if i not in ends:
                    self.members.problems[i].hyperparameters.project_()
        return moved, ends

    def _move_alone(self, member: int, taken: Taken, scale: float) -> None:
        """By the member's own optimizer: the others' must not know of a step."""
        self._outer.release(member)
        hparams, optimizer = self.members.problems[member].hparams, self._runs[member].outer.optimizer
        for name, p in hparams.items():
            p.grad = taken.result.gradients[name].detach() * scale
        optimizer.step()
        for p in hparams.values():
            p.grad = None
        self._outer.adopt(member)

    def _put_back(self, before: Sequence[Tensor], member: int) -> None:
        for x, old in zip(self.members.hparams.values(), before, strict=True):
            x.detach()[member].copy_(old[member])

    def _leave(self, ends: dict[int, Exception | None]) -> None:
        """Let members go that have come to their end, with an error or without; the others go on."""
        if not ends:
            return
        rest = [i for i in self._live if i not in ends]
        for i in ends:
            self._inner.free(i)
            self._outer.free(i)
        leaving = [(self._places[i], self._runs[i], error) for i, error in ends.items()]
        if self._compiled is None or not rest:
            self._shrink(rest)
        else:  # for another number of members, all would have to be compiled anew
            for i in ends:
                self.members.free(i)
                self._training.drop(i)
                self._validation.drop(i)
                self._steps.gone.add(i)
            self._live = rest
        for place, each, failure in leaving:
            result = each.close(failure)
            self.outcomes[place] = result if failure is None else failure

    def _shrink(self, rest: list[int]) -> None:
        """Go on with the rest, in stacks of their own."""
        initial = self._initial
        self._runs, self._places = [self._runs[i] for i in rest], [self._places[i] for i in rest]
        self.members.keep(rest)
        for part in (self._training, self._validation, self._generators):
            part.keep(rest)
        self._live = list(range(len(rest)))
        if rest:
            self._make()
            if initial is not None:
                self._initial = initial.kept(self.members, self._inner, rest)
