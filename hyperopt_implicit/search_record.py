"""What is said about a search: the MLflow run above those of its trials, which all workers of a study share.

No tracker is known here beyond the one that is given; ``tracking.py`` sends what this file describes.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hyperopt_implicit.credentials import without_credentials
from hyperopt_implicit.messages import warn
from hyperopt_implicit.places import is_lost, visible_trials
from hyperopt_implicit.run_record import figures_of, source_of, source_tags, versions
from hyperopt_implicit.telling import front, objective_names
from hyperopt_implicit.tracking import Tracker, Tracking

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from optuna.study import Study
    from optuna.trial import FrozenTrial, Trial

    from hyperopt_implicit.history import Result
    from hyperopt_implicit.knob_space import KnobSpace

_TRIAL = "trial"  # the tag of a nested run with its trial's number
_WAIT_SECONDS = 30.0  # for the worker that has made the study, to begin its run


class SearchRecord:
    """The MLflow run of a study, begun by whoever has made the study and continued by all others.

    Args:
        study: the study; it remembers its run.
        created: whether this process has made it.
        space: its knobs.
        described: further params.
        config: where and how; None tracks nothing.
    """

    def __init__(
        self, study: Study, created: bool, space: KnobSpace, described: Mapping[str, Any], config: Tracking | None
    ) -> None:
        self._study, self._config = study, config
        self._figures = config is not None and config.figures
        key = "" if config is None else f"mlflow:{without_credentials(config.resolved_uri)}"
        begun = None if config is None else _begun(study, key, wait=not created)
        self._key, self._begun = key, begun
        self._unsent: list[str] = []  # of the trials, in words
        params = {"study": study.study_name, **described, **versions()}
        params |= {f"knob.{name}": each for name, each in space.distributions.items()}
        tags = {**source_tags(source_of(space.builder)), "search": study.study_name}
        named = None if config is None else replace(config, run_name=config.run_name or study.study_name)
        self._tracker = Tracker(named, params, tags, resume=begun)
        self._remember()

    @property
    def run_id(self) -> str | None:
        """Of the run; None while no server was reached."""
        return self._tracker.run_id

    @property
    def run_link(self) -> str | None:
        """Where to look at it."""
        return self._tracker.run_link

    def _remember(self) -> None:
        """Have the study know its run, for those who go on with it."""
        if self._config is not None and self.run_id is not None and self.run_id != self._begun:
            self._begun = self.run_id
            self._study.set_user_attr(self._key, self.run_id)

    def nested(self, trial: Trial) -> Tracking | bool:
        """The tracking of a trial's own run, beneath this one, or beside it while this one could not be begun."""
        if self._config is None:
            return False
        return replace(
            self._config,
            _note=self._unsent.append,
            run_name=f"{self._config.run_name or 'trial'}-{trial.number}",
            parent_run_id=self.run_id,
            figures=False,
            tags={**self._config.tags, _TRIAL: str(trial.number), "study": self._study.study_name},
            params={
                **self._config.params,
                "trial": trial.number,
                **{f"knob.{name}": value for name, value in trial.params.items()},
            },
        )

    def log(self, trial: FrozenTrial) -> None:
        """Take the outcome of a trial."""
        if self._config is None:
            return
        self._remember()
        names = objective_names(self._study)
        values = dict(zip(names, trial.values or [math.nan] * len(names), strict=True))
        metrics = {f"search/{name}": value for name, value in values.items()}
        best = front(self._study)
        if len(names) == 1:
            metrics["search/best"] = best[0].values[0] if best else math.nan
        else:
            metrics["search/pareto_front"] = float(len(best))
        self._tracker.log_metrics(metrics, trial.number)

    def end(self, error: BaseException | None = None, best: tuple[int, Result] | None = None) -> None:
        """Log table and figures and end the run; where trials of other workers run on, leave that to the last.

        Args:
            error: what has ended the search, if anything did.
            best: number and result of the best trial, where it has run in this process.
        """
        if self._config is None:
            return
        try:
            is_over = self._log_study(best) or error is not None
        except Exception:  # a storage that has gone, which is what has ended the search
            if error is None:
                raise
            is_over = True
        if is_over:
            self._tracker.end(error)
        else:
            self._tracker.leave()
        if self._unsent:
            more = f" ({len(self._unsent)} trials in all)" if len(self._unsent) > 1 else ""
            warn(f"MLflow tracking: of a trial, {self._unsent[0]}{more}. The search itself is not affected.")
        with suppress(Exception):  # a storage that has gone
            self._remember()

    def _log_study(self, best: tuple[int, Result] | None) -> bool:
        """Take what the study has come to; whether no trial runs any more."""
        from optuna.trial import TrialState

        trials = self._study.get_trials(deepcopy=False)
        self._tracker.kill_nested(_TRIAL, [str(each.number) for each in trials if is_lost(each)])
        if any(each.state is TrialState.RUNNING for each in trials):
            return False
        found = front(self._study)
        if found:
            self._tracker.set_tag("best_trial", ", ".join(str(each.number) for each in found))
        if best is not None and self._figures and found and best[0] == found[0].number:
            result = best[1]
            self._tracker.log_files(lambda folder: [(path, "best_trial") for path in figures_of(result, folder)])
        figures = study_figures(self._study)
        self._tracker.log_files(lambda folder: files_of(self._study, figures, folder))
        return True


def _begun(study: Study, key: str, *, wait: bool) -> str | None:
    """The run that a study has already, for which its maker is given some seconds; None where there is none."""
    until = time.monotonic() + (_WAIT_SECONDS if wait and not study.get_trials(deepcopy=False) else 0.0)
    while True:
        found = study.user_attrs.get(key)
        if isinstance(found, str) or time.monotonic() >= until:
            return found
        time.sleep(0.1)


def files_of(study: Study, figures: Iterable[tuple[str, Figure]], folder: Path) -> Iterator[tuple[Path, str | None]]:
    """Write the table of trials and figures; gives each file with its place among the artifacts."""
    import pandas as pd

    rows = [_row(study, each) for each in visible_trials(study)]
    pd.DataFrame(rows).to_csv(folder / "trials.csv", index=False)
    yield folder / "trials.csv", None
    for name, figure in figures:
        figure.savefig(folder / f"{name}.png", dpi=120, bbox_inches="tight")
        yield folder / f"{name}.png", "figures"


def _row(study: Study, trial: FrozenTrial) -> dict[str, Any]:
    names = objective_names(study)
    return {
        "trial": trial.number,
        "state": trial.state.name.lower(),
        **dict(zip(names, trial.values or [None] * len(names), strict=True)),
        **{f"knob.{name}": value for name, value in trial.params.items()},
        **{f"constraint.{name}": value for name, value in trial.constraints.items()},
        "seconds": max(0.0, trial.duration.total_seconds()) if trial.duration is not None else None,
        "run_id": trial.user_attrs.get("run_id"),
        "failure": trial.user_attrs.get("failure"),
    }


def study_figures(study: Study) -> list[tuple[str, Figure]]:
    """Those of Optuna's figures that there are enough trials for.

    Optuna draws with pyplot and sets its style: call it from the main thread; both are as before afterwards.
    """
    import matplotlib.pyplot as plt
    from optuna.trial import TrialState
    from optuna.visualization import matplotlib as drawn

    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    if len(complete) < 2:
        return []
    several_knobs = len({name for each in complete for name in each.params}) > 1
    wanted: dict[str, Callable[[], Any]] = {}
    if len(study.directions) == 1:
        value = objective_names(study)[0].replace("_", " ")
        wanted = {
            "history": lambda: drawn.plot_optimization_history(study, target_name=value),
            "slices": lambda: drawn.plot_slice(study, target_name=value),
            "learning_curves": lambda: drawn.plot_intermediate_values(study),
        }
        if several_knobs:
            wanted["importances"] = lambda: drawn.plot_param_importances(study)
            wanted["parallel_coordinates"] = lambda: drawn.plot_parallel_coordinate(study, target_name=value)
    elif len(study.directions) < 4:
        wanted = {"pareto_front": lambda: drawn.plot_pareto_front(study)}
    found = []
    before = set(plt.get_fignums())
    with plt.rc_context(), plt.ioff(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Optuna calls these figures experimental
        for name, draw in wanted.items():
            try:
                axes = draw()
            except (ValueError, RuntimeError, ZeroDivisionError):  # trials that are all alike
                continue
            found.append((name, (axes.flat[0] if hasattr(axes, "flat") else axes).figure))
    for number in set(plt.get_fignums()) - before:
        plt.close(number)
    return found
