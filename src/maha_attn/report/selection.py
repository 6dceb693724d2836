"""The results that an exhibit shows: of one budget, comparable, by row."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from maha_attn.experiments.comparison import check_comparable
from maha_attn.experiments.definition import BUDGETS, Budget, Experiment, Part
from maha_attn.experiments.results import RefusedError, Result, distinct


@dataclass(frozen=True)
class Selected:
    """The results of a part of an exhibit.

    Attributes:
        part: What was asked for.
        experiment: Of which experiment.
        budget: The name of the largest budget of which there is a result; None: nothing was run.
        rows: Results by row, in the part's order and by seed; rows without any are left out.
        refused: Why the results may not stand in one table; then ``rows`` is empty.
    """

    part: Part
    experiment: Experiment
    budget: str | None = None
    rows: dict[str, list[Result]] = field(default_factory=dict)
    refused: str = ""

    @property
    def conditions(self) -> Budget | None:
        """The budget itself."""
        return None if self.budget is None else self.experiment.budgets[self.budget]

    @property
    def results(self) -> list[Result]:
        """All of them."""
        return [result for row in self.rows.values() for result in row]

    @property
    def counts(self) -> bool:
        """The results say something: they are not those of a smoke test."""
        conditions = self.conditions
        return conditions is not None and (self.budget != "smoke" or not conditions.differs)

    @property
    def one_device(self) -> bool:
        """Times can be compared."""
        return len(distinct(self.results, "device")) <= 1

    @property
    def commit(self) -> str:
        """That of most results; times of other ones are marked."""
        commits = [result["commit"] for result in self.results]
        return max(commits, key=commits.count, default="")

    def printed(self, row: str) -> str:
        """Whether a row ran under the paper's conditions, as it prints the method: yes or no."""
        conditions = self.conditions
        assert conditions is not None
        return "yes" if row in self.experiment.printed and not conditions.differs else "no"


def select(
    part: Part, experiment: Experiment, results: Iterable[Result], budget: str | None = None
) -> Selected:
    """Choose the results of a part.

    Args:
        part: What is asked for.
        experiment: Its experiment.
        results: All results.
        budget: Of this budget; None: of the largest one of which there is a result.
    """
    wanted = [r for r in results if r["experiment"] == experiment.name and r["row"] in part.rows]
    found = [name for name in BUDGETS if any(r["budget"] == name for r in wanted)]
    budget = budget or (found[-1] if found else None)
    wanted = [r for r in wanted if r["budget"] == budget]
    if budget is None or not wanted:
        return Selected(part, experiment)
    try:
        check_comparable(wanted, experiment)
        _check_causal(wanted)
    except RefusedError as error:
        return Selected(part, experiment, budget, refused=str(error))
    rows = {
        row: sorted((r for r in wanted if r["row"] == row), key=lambda r: r["seed"])
        for row in part.rows
    }
    return Selected(part, experiment, budget, {row: r for row, r in rows.items() if r})


def _check_causal(results: Iterable[Result]) -> None:
    """Refuse a trained language model that saw what it was to predict."""
    for result in results:
        if result["metrics"].get("causal") is False:
            raise RefusedError(f"{result.path}: a prediction changes with a later token")
