"""``maha reproduce`` from the command line: whole, killed, continued, and what users get wrong."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from maha_attn.cli import main
from maha_attn.experiments.definition import exhibits, experiments
from maha_attn.experiments.results import write_result
from maha_attn.reproduce.job import Clock, Job
from maha_attn.reproduce.runner import Selection, jobs, run_missing


def test_figure3_is_drawn_without_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start = time.perf_counter()
    with pytest.raises(SystemExit) as ended:
        main(["reproduce", "figure3", "--device", "cpu", "--results", str(tmp_path)])
    assert not ended.value.code
    assert time.perf_counter() - start < 180
    printed = capsys.readouterr().out
    assert "8 run(s) done, 0 there already." in printed
    assert "HOLDS UNDER A CONDITION Attention takes 81 % fewer FLOPs" in printed
    page = (tmp_path / "report.html").read_text()
    assert "Holds with windows of 128 at every scale but the coarsest (91.7 % less)" in page
    assert "32.8 % more" in page  # every scale full
    figure = page.partition('<section id="figure3">')[2].partition("</section>")[0]
    assert '"name":"MAHA, windows"' in figure


def test_table2_survives_a_kill(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In the end all of it is there, nothing was run twice, and no half file was ever left.

    The two commands together do the work of one, and start twice: within the two minutes.
    """
    places = ("--results", str(tmp_path / "results"), "--runs", str(tmp_path / "runs"))
    arguments = ("reproduce", "table2", "--budget", "smoke", "--device", "cpu", *places)
    folder = tmp_path / "results" / "ablations" / "smoke"
    code = "from maha_attn.cli import main; main()"
    start = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments], stdout=subprocess.DEVNULL, start_new_session=True
    )
    while len(list(folder.glob("*.json"))) < 2 and time.monotonic() < start + 110:
        assert process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    before = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.json")}
    assert 2 <= len(before) < 10
    for name in before:
        assert json.loads((folder / name).read_text())["commit"]
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    assert not ended.value.code
    assert time.monotonic() - start < 120
    done = 10 - len(before)
    printed = capsys.readouterr().out
    assert f"{done} run(s) done, {len(before)} there already (to run one again" in printed
    after = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.json")}
    assert len(after) == 10
    assert {name: after[name] for name in before} == before
    assert "MAHA nash" in (tmp_path / "results" / "report.md").read_text()


def test_a_result_of_another_recipe_is_made_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["reproduce", "figure2", "--rows", "full,sliding", "--results", str(tmp_path)]

    def run() -> str:
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert not ended.value.code
        return capsys.readouterr().out

    run()
    path = tmp_path / "flops" / "small" / "sliding-seed0.json"
    content = json.loads(path.read_text())
    content["settings"]["window"] = 64
    path.write_text(json.dumps(content))
    printed = run()
    assert "1 run(s) done, 1 there already" in printed
    assert "made again: flops/sliding, seed 0: window was 64 and is 128" in printed
    assert "0 run(s) done, 2 there already" in run()


def test_a_model_is_trained_again_only_for_a_run_that_needs_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And results of fine-tuning say which model they started from."""
    places = ["--results", str(tmp_path / "results"), "--runs", str(tmp_path / "runs")]
    arguments = ["reproduce", "table1", "--budget", "smoke", "--device", "cpu", "--rows", "maha"]
    arguments += ["--experiments", "sst2", *places]

    def run() -> str:
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert not ended.value.code
        return capsys.readouterr().out

    assert "2 run(s) done, 0 there already" in run()
    results = tmp_path / "results"
    base, tuned = (
        json.loads((results / name / "smoke" / "maha-seed1.json").read_text())
        for name in ("mlm", "sst2")
    )
    model = tmp_path / "runs" / "mlm" / "smoke" / "maha-seed1" / "model" / "model.safetensors"
    sha256 = hashlib.sha256(model.read_bytes()).hexdigest()
    assert base["model_sha256"] == sha256
    assert tuned["pretrained"] == {
        **{"experiment": "mlm", "row": "maha", "seed": 1, "commit": base["commit"]},
        "sha256": sha256,
    }
    assert len(tuned["correct"]) == tuned["data"]["rows"]["validation"]
    right = 100 * tuned["correct"].count("1") / len(tuned["correct"])
    assert tuned["metrics"]["accuracy"] == pytest.approx(right)
    assert tuned["metrics"]["sequences_per_s"] > 0
    assert tuned["versions"]["mamba-ssm"] == "none"
    shutil.rmtree(tmp_path / "runs")
    assert "0 run(s) done, 2 there already" in run()
    (results / "sst2" / "smoke" / "maha-seed1.json").unlink()
    assert "2 run(s) done, 0 there already" in run()


@pytest.mark.slow
def test_everything_runs_at_smoke_budget(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = ("--results", str(tmp_path / "results"), "--runs", str(tmp_path / "runs"))
    with pytest.raises(SystemExit) as ended:
        main(["reproduce", "all", "--budget", "smoke", "--device", "cpu", *places])
    printed = capsys.readouterr().out
    assert not ended.value.code, printed
    assert "REFUSED" not in printed


def test_a_time_limit_starts_nothing_more(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = ("--results", str(tmp_path), "--runs", str(tmp_path / "runs"))
    with pytest.raises(SystemExit) as ended:
        main(["reproduce", "table1", "--budget", "smoke", "--time_limit", "0", *places])
    assert not ended.value.code
    assert "0 run(s) done" in (printed := capsys.readouterr().out)
    assert "left for the next time" in printed


def test_a_row_that_fails_does_not_take_the_others_along(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from maha_attn.reproduce import flops

    counted = flops.attention_cost

    def fail(spec: object, length: int) -> object:
        if spec.preset == "paper":  # pyright: ignore[reportAttributeAccessIssue]
            raise RuntimeError("no\nway")
        return counted(spec, length)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(flops, "attention_cost", fail)
    with pytest.raises(SystemExit) as ended:
        main(["reproduce", "figure2", "--results", str(tmp_path)])
    assert ended.value.code == 1
    printed = capsys.readouterr().out
    assert "4 run(s) done" in printed
    assert "FAILED flops/paper, seed 0: RuntimeError: no way" in printed


def test_results_are_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (file := tmp_path / "results").write_text("")
    with pytest.raises(SystemExit):
        main(["reproduce", "table2", "--results", str(file)])
    assert f"--results must be a folder; {file} is a file" in capsys.readouterr().err


def job(experiment: str, row: str, folder: Path, base: Job | None = None) -> Job:
    return Job(
        **{"experiment": experiments()[experiment], "row": row, "seed": 1, "budget": "small"},
        **{"folder": folder / "run", "device": torch.device("cpu"), "pretrained": base},
    )


def test_what_would_be_refused_or_has_no_start_is_not_run(tmp_path: Path) -> None:
    known = {name: "x" for name in ("experiment", "row", "budget", "command", "date", "commit")}
    known |= {"device": "H200", "versions": {"torch": "2"}, "data": {"fingerprint": "f"}, "seed": 1}
    known |= {"metrics": {"x": 1}, "settings": {"s": 1}, "device_class": "gpu"}
    there = {"experiment": "books", "row": "full", "budget": "small"}
    write_result(job("books", "full", tmp_path).result(tmp_path), known | there)
    base = job("mlm", "maha", tmp_path)
    ended = {"experiment": "mlm", "row": "maha", "budget": "small", "diverged": 3}
    write_result(base.result(tmp_path), known | ended | {"device_class": "cpu"})
    todo = [job("books", "convex", tmp_path), job("sst2", "maha", tmp_path, base)]
    outcome = run_missing(todo, tmp_path, "maha reproduce x", Clock())
    assert not outcome.done
    other, lost = outcome.failed.values()
    assert "has results of another class of device, gpu" in other
    assert lost == "what it would start from, mlm/maha, seed 1, diverged"


def test_jobs_are_each_wanted_once_and_first_seeds_come_first(tmp_path: Path) -> None:
    options = {"budget": "small", "device": torch.device("cpu"), "results": tmp_path}
    selection = Selection(**options, runs=tmp_path)
    chosen = [exhibits()[name] for name in ("table2", "figure4")]
    todo = jobs(chosen, experiments(), selection)
    names = [(job.row, job.seed) for job in todo]
    assert len(set(names)) == len(names) == 21  # 5 fusions and 2 other rows × 3 seeds
    assert [seed for _, seed in names] == sorted(seed for _, seed in names)
    few = Selection(**options, runs=tmp_path, seeds=[7], rows=["gate", "convex"])
    assert [(job.row, job.seed) for job in jobs(chosen, experiments(), few)] == [
        ("gate", 7),
        ("convex", 7),
    ]


def test_what_a_run_starts_from_comes_before_it(tmp_path: Path) -> None:
    options = {"budget": "small", "device": torch.device("cpu"), "results": tmp_path}
    selection = Selection(**options, runs=tmp_path, seeds=[2, 3], rows=["maha"])
    todo = jobs([exhibits()["table1"]], experiments(), selection)
    names = [(job.experiment.name, job.seed) for job in todo]
    assert names.count(("mlm", 1)) == 1
    assert names.index(("mlm", 1)) < names.index(("sst2", 2))
    (base,) = (job for job in todo if job.experiment.name == "mlm")
    assert base.keeps_model
    tuned = [job for job in todo if job.experiment.pretrained]
    assert {job.pretrained.folder for job in tuned if job.pretrained} == {base.folder}
    assert all(job.pretrained for job in tuned)
    assert {job.experiment.name for job in tuned} == {"sst2", "mnli", "squad"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("table9", "NAME must be one of table1, table2"),
        ("table2 --rows=convx", "table2 has no row convx; it has convex, gate"),
        ("table1 --experiments=book", "table1 has no experiment book; it has books, mnli"),
        ("table2 --seeds=a", "--seeds: must be whole numbers from 0, as 1,2; got 'a'"),
        ("table2 --seeds=-1", "--seeds: must be whole numbers from 0"),
        ("table2 --time_limit=nan", "--time_limit: must be a number of seconds from 0; got 'nan'"),
        ("table1 --experiments=sst2 --rows=convex", "no row convex is in sst2"),
        ("table2 --budget=huge", "--budget"),
        ("table2 --device=tpu", "--device must be auto, cpu or cuda; got 'tpu'"),
        ("table2 --bugdet=small", "--bugdet"),
    ],
)
def test_mistakes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: str, message: str
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["reproduce", *arguments.split(), "--results", str(tmp_path)])
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("maha reproduce: error: ")
    assert message in line


def test_without_a_commit_nothing_is_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("maha_attn.bench.measure._commit", lambda: None)
    with pytest.raises(SystemExit):
        main(["reproduce", "figure3", "--results", str(tmp_path)])
    assert "set MAHA_COMMIT" in capsys.readouterr().err
