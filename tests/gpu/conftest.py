"""``--gpu-results FILE``: what passed on which GPU, as a result file that can be committed.

``pytest -p no:benchmark -n 6 --dist worksteal tests/gpu --gpu-results results/gpu-tests.json``: six
processes need about 70 GB of GPU memory and six minutes. Failures go to stderr at once.
"""

import fcntl
import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def much_memory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tests that need tens of GB wait for each other, and give back at once what they had."""
    import torch

    with (tmp_path_factory.getbasetemp().parent / "much-memory.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
        torch.cuda.empty_cache()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Of the process that distributes the tests."""
    parser.addoption("--gpu-results", type=Path, help="write outcomes with provenance to this file")


def pytest_configure(config: pytest.Config) -> None:
    """Collect where a file is asked for, and not once more in each worker."""
    file = config.getoption("--gpu-results", None)
    if file is not None and not hasattr(config, "workerinput"):
        config.pluginmanager.register(_Outcomes(file, list(config.invocation_params.args)))


class _Outcomes:
    def __init__(self, file: Path, arguments: list[str]) -> None:
        self.file, self.command = file, " ".join(["pytest", *arguments])
        self.counts: dict[str, Counter[str]] = {}
        self.reasons: dict[str, dict[str, str]] = {"failed": {}, "skipped": {}}
        self.seconds = 0.0

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """A test counts once: by its call, or by the step that ended it before or after."""
        self.seconds += report.duration
        if report.when != "call" and report.passed:
            return
        self._add(report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """A module that was skipped or is broken."""
        if not report.passed:
            self._add(report)

    def _add(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        module = report.nodeid.partition("::")[0]
        self.counts.setdefault(module, Counter())[report.outcome] += 1
        if not report.passed:
            text = report.longrepr
            text = text[2] if isinstance(text, tuple) else report.longreprtext
            self.reasons[report.outcome][report.nodeid] = text[-300:]
        if report.failed:
            print(f"\nFAILED {report.nodeid}\n{report.longreprtext[-3000:]}", file=sys.stderr)

    def pytest_sessionfinish(self, exitstatus: int) -> None:
        """Also of a session that was stopped, which its exit status tells."""
        import torch

        from maha_attn.bench.measure import provenance

        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        document: dict[str, Any] = provenance(self.command, {}, device)
        total = sum(self.counts.values(), Counter())
        document |= {
            "exit_status": int(exitstatus),
            "total": dict(total),
            "seconds_of_all_processes": round(self.seconds, 1),
            "modules": {name: dict(self.counts[name]) for name in sorted(self.counts)},
            **self.reasons,
        }
        self.file.write_text(json.dumps(document, indent=2) + "\n")
