"""The results that an exhibit shows: of one budget, comparable, by row."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property

from maha_attn.experiments.comparison import check_comparable
from maha_attn.experiments.definition import BUDGETS, Budget, Experiment, Part
from maha_attn.experiments.results import RefusedError, Result, distinct
from maha_attn.report.metrics import metric, value


@dataclass(frozen=True)
class Selected:
    """The results of a part of an exhibit.

    Attributes:
        part: What was asked for.
        experiment: Of which experiment.
        budget: The name of the one that is shown; None: nothing was run.
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

    @cached_property
    def timed(self) -> list[Result]:
        """The results whose times can stand beside each other: of one device.

        It is the one that timed most rows at one commit; of several, the one that was used last.
        """
        columns = [column for column in self.part.columns if metric(column).by_device]
        timed = [r for r in self.results if any(value(r, c) is not None for c in columns)]

        def rank(device: str) -> tuple[int, str]:
            own = [result for result in timed if result["device"] == device]
            rows = {(result["commit"], result["row"]) for result in own}
            most = max(Counter(commit for commit, _ in rows).values())
            return most, max(result["date"] for result in own)

        chosen = max(distinct(timed, "device"), key=rank, default="")
        return [result for result in timed if result["device"] == chosen]

    @property
    def commit(self) -> str:
        """That of most times; times of other ones are marked."""
        commits = [result["commit"] for result in self.timed]
        return max(commits, key=commits.count, default="")

    def with_value(self, results: Iterable[Result], column: str) -> list[Result]:
        """Those of a row's results whose number may stand in the table.

        Of times, those of `timed`, and of these the ones of `commit` where there are any.
        """
        known = [result for result in results if value(result, column) is not None]
        if not metric(column).by_device:
            return known
        known = [result for result in known if result in self.timed]
        return [result for result in known if result["commit"] == self.commit] or known

    def values(self, results: Iterable[Result], column: str) -> list[float]:
        """Their numbers."""
        return [
            number
            for result in self.with_value(results, column)
            if (number := value(result, column)) is not None
        ]

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
        budget: Of this budget; None: of the one with most rows, the largest of several.
    """
    wanted = [r for r in results if r["experiment"] == experiment.name and r["row"] in part.rows]
    if budget is None and wanted:
        rows = Counter(name for name, _ in {(r["budget"], r["row"]) for r in wanted})
        budget = max(rows, key=lambda name: (rows[name], BUDGETS.index(name)))
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
