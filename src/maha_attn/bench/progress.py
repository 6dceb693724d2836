"""Where a long benchmark is, on the terminal and nowhere else."""

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn


class Steps:
    """Tells the user which of ``total`` steps begins."""

    def __init__(self, total: int) -> None:
        self.bar = Progress(
            BarColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.description}"),
            console=Console(stderr=True),
            auto_refresh=False,  # No thread of its own beside what is timed.
            transient=True,
        )
        self.task = self.bar.add_task("", total=total)

    def __call__(self, description: str) -> None:
        """Begin the next step."""
        self.bar.update(self.task, description=description, advance=1, refresh=True)


@contextmanager
def progress(total: int) -> Iterator[Steps]:
    """Show `Steps` while the body runs."""
    steps = Steps(total)
    with steps.bar:
        yield steps
