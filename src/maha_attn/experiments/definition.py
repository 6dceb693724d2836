"""Experiments and exhibits, read from their YAML files."""

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import yaml

BUDGETS = ("smoke", "small", "paper")
"""Seconds a row and no meaning; minutes a row on one GPU; the paper's settings."""
Measure = Literal["value", "difference", "reduction", "slope"]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of a table: what it is called and how it differs from the experiment's recipe.

    Attributes:
        label: For people.
        attention: The attention of every layer, by its name among the baselines.
        settings: What differs beside.
    """

    label: str
    attention: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """The name of its attention among the baselines."""
        return self.attention or self.settings.get("attention", "maha")


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How much work a run is.

    Attributes:
        seeds: The seeds, the first ones first where fewer are asked for.
        variants: Variants of the recipe, applied in this order.
        settings: What differs from the recipe beside.
        differs: How the conditions differ from those of the paper's claims; empty: they do not.
    """

    seeds: list[int]
    variants: list[str] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    differs: str = ""


@dataclass(frozen=True, kw_only=True, eq=False)
class Experiment:
    """Runs that can be compared; equal to itself alone.

    Attributes:
        title: A line for people.
        kind: What a run does: a name that `maha_attn.reproduce` knows.
        recipe: The base recipe, for kinds that train.
        settings: What differs from the recipe in every row.
        printed: Rows that are what the paper prints: its method as its equations have it, and the
            full attention that it compares with.
        pretrained: The experiment whose model of the same row and the first seed a run starts from.
        match_parameters: The row whose number of parameters all rows get, by the width of their
            feed-forward part.
        explained: Rows whose attention on a passage is kept, of the first seed: it is large.
        budgets: By name.
        rows: By name.
    """

    name: str
    title: str
    kind: str
    budgets: dict[str, Budget]
    rows: dict[str, Row]
    recipe: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    printed: list[str] = field(default_factory=list)
    pretrained: str | None = None
    match_parameters: str | None = None
    explained: list[str] = field(default_factory=list)

    def merged(self, row: str, budget: str) -> dict[str, Any]:
        """All that differs from the recipe: the experiment's, the budget's, then the row's."""
        return {**self.settings, **self.budgets[budget].settings, **self.rows[row].settings}


@dataclass(frozen=True, kw_only=True)
class Part:
    """The rows of one experiment that an exhibit shows.

    Attributes:
        experiment: Its name.
        rows: Names of rows, in the order shown.
        columns: Metrics; the first one is that of ``claimed``.
        claimed: The paper's values of the first metric, by row, where they are known.
        seeds: At most so many of the budget's seeds.
        reference: The row that the others' first metric is compared with, in a column of its own.
        groups: Rows that vary one thing, by its name: ``{row: value}``.
    """

    experiment: str
    rows: list[str]
    columns: list[str] = field(default_factory=list)
    claimed: dict[str, float] = field(default_factory=dict)
    seeds: int | None = None
    reference: str | None = None
    groups: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A row for which a claim is tested, and against which other one.

    Attributes:
        row: The row.
        than: The row compared with, for a difference or a reduction.
        condition: What the case assumes, as the end of "holds …".
        experiment: Where it is not the exhibit's first.
        control: It is shown beside the claim and decides nothing.
    """

    row: str
    condition: str
    than: str | None = None
    experiment: str | None = None
    control: bool = False


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A sentence of the paper as an inequality about measured values.

    Attributes:
        text: The claim.
        source: Where it stands.
        claimed: Its number as printed; "–" where it has none or none that we know.
        measure: ``value`` of ``row``; its ``difference`` from ``than``; its ``reduction``
            ``1 - row/than``; or its ``slope``, of the logarithms against the tokens'.
        metric: Of what.
        at: At how many tokens, for metrics that depend on them.
        between: The ends of a slope, in tokens.
        at_least, at_most: The claim holds on this side of the number.
        cases: What it is tested on.
        percent: Write the measure in percent.
        caveat: What a reader must weigh beside the verdict, one sentence.
    """

    text: str
    source: str
    measure: Measure
    metric: str
    cases: list[Case]
    claimed: str = "–"
    at: int | None = None
    between: list[int] | None = None
    at_least: float | None = None
    at_most: float | None = None
    percent: bool = False
    caveat: str = ""

    def __post_init__(self) -> None:
        if (self.at_least is None) == (self.at_most is None):
            raise ValueError(f"claim {self.text!r}: give exactly one of at_least and at_most")
        if self.measure not in get_args(Measure):
            raise ValueError(
                f"claim {self.text!r}: measure must be one of {', '.join(get_args(Measure))}, "
                f"got {self.measure!r}"
            )
        for case in self.cases:
            if (case.than is None) == (self.measure in ("difference", "reduction")):
                raise ValueError(f"claim {self.text!r}: case {case.row!r} and its `than`")


@dataclass(frozen=True, kw_only=True)
class Exhibit:
    """A table or figure of the paper, or a question it leaves open.

    Attributes:
        title: A line for people.
        paper: What it is called in the paper; empty for our own questions.
        about: What it shows, a few sentences.
        parts: What it is made of.
        drawing: The name of its figure in `maha_attn.report.figures`; None: a table alone.
        options: Of the drawing.
        claims: What it decides.
    """

    name: str
    title: str
    about: str
    parts: list[Part]
    paper: str = ""
    drawing: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    claims: list[Claim] = field(default_factory=list)


@cache
def experiments() -> dict[str, Experiment]:
    """Every experiment by name.

    Raises:
        ValueError: In a definition something is missing, unknown or contradictory.
    """
    found = {path.stem: _experiment(path) for path in _definitions("experiments")}
    for name, experiment in found.items():
        if (base := experiment.pretrained) is None:
            continue
        if base not in found or experiment.rows.keys() - found[base].rows.keys():
            raise ValueError(f"{name}.yaml: pretrained must name an experiment with the same rows")
    return found


@cache
def exhibits() -> dict[str, Exhibit]:
    """Every exhibit by name, tables first, then figures, then our own."""
    known = experiments()
    found = {path.stem: _exhibit(path, known) for path in _definitions("exhibits")}
    order = ("table", "figure")
    rank = {name: [not name.startswith(prefix) for prefix in order] for name in found}
    return dict(sorted(found.items(), key=lambda item: (rank[item[0]], item[0])))


def _definitions(folder: str) -> list[Path]:
    """The files of a folder of ``recipes``, in a wheel or in a checkout."""
    package = Path(str(files("maha_attn")))
    for root in (package, package.parents[1]):
        if found := sorted((root / "recipes" / folder).glob("*.yaml")):
            return found
    raise ValueError(f"the package has no recipes/{folder}; install it again")


def _experiment(path: Path) -> Experiment:
    content = _read(path)
    for name, kind in (("budgets", Budget), ("rows", Row)):
        if isinstance(entries := content.get(name), dict):
            content[name] = {
                key: _make(kind, value, f"{path.name}, {name}, {key}")
                for key, value in entries.items()
            }
    experiment = _make(Experiment, {"name": path.stem, **content}, path.name)
    if unknown := set(experiment.printed) - experiment.rows.keys():
        raise ValueError(f"{path.name}: printed names no row: {', '.join(sorted(unknown))}")
    if unknown := experiment.budgets.keys() - set(BUDGETS):
        raise ValueError(f"{path.name}: budgets are {', '.join(BUDGETS)}; got {unknown}")
    matched, explained = experiment.match_parameters, experiment.explained
    for option, names in (("match_parameters", [matched]), ("explained", explained)):
        for name in names:
            if name is not None and name not in experiment.rows:
                raise ValueError(f"{path.name}: {option} names no row: {name!r}")
    return experiment


def _exhibit(path: Path, known: Mapping[str, Experiment]) -> Exhibit:
    content = _read(path)
    parts = [_make(Part, part, f"{path.name}, parts") for part in content.get("parts", [])]
    claims = []
    for claim in content.get("claims", []):
        where = f"{path.name}, claim {claim.get('text')!r}"
        cases = [_make(Case, case, where) for case in claim.get("cases", [])]
        claims.append(_make(Claim, {**claim, "cases": cases}, where))
    content |= {"parts": parts, "claims": claims}
    exhibit = _make(Exhibit, {"name": path.stem, **content}, path.name)
    named = [(part.experiment, row) for part in parts for row in part.rows]
    named += [(part.experiment, part.reference) for part in parts if part.reference]
    for case in (case for claim in claims for case in claim.cases):
        experiment = case.experiment or parts[0].experiment
        named += [(experiment, row) for row in (case.row, case.than) if row is not None]
    for experiment, row in named:
        if experiment not in known or row not in known[experiment].rows:
            raise ValueError(f"{path.name}: there is no row {row!r} of experiment {experiment!r}")
    return exhibit


def _read(path: Path) -> dict[str, Any]:
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"{path.name}: expected a mapping, got {type(content).__name__}")
    return content


_T = TypeVar("_T")


def _make(kind: type[_T], content: Mapping[str, Any], where: str) -> _T:
    """An object of a dataclass, or a ValueError that names what is unknown or missing."""
    known = {option.name: option for option in fields(kind)}  # pyright: ignore[reportArgumentType]
    if unknown := sorted(map(str, content.keys() - known.keys())):
        raise ValueError(
            f"{where}: {', '.join(unknown)} unknown; expected {', '.join(sorted(known))}"
        )
    missing = [
        name
        for name, option in known.items()
        if name not in content and option.default is option.default_factory is MISSING
    ]
    if missing:
        raise ValueError(f"{where}: {', '.join(missing)} missing")
    return kind(**content)
