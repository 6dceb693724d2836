"""A benchmark runs end to end and writes down what another person needs to repeat it."""

import json

import pytest

from maha_attn.cli import main

LAYER = ["layer", "--device=cpu", "--width=32", "--heads=2", "--tokens=1", "--rounds=2"]


def test_layer(tmp_path, capsys):
    output = tmp_path / "results" / "layer.json"
    main(["bench", *LAYER, "--lengths=64,130", f"--output={output}"])
    document = json.loads(output.read_text())
    for key in ("command", "commit", "device", "versions", "settings", "ceilings"):
        assert document[key], key
    assert {row["length"] for row in document["rows"]} == {64, 130}
    ran = {row["side"]: row for row in document["rows"] if "skipped" not in row}
    assert ran["MAHA convex"]["forward"]["median_ms"] > 0
    assert ran["MAHA convex"]["train_speedup"] > 0
    assert "MAHA nash" in capsys.readouterr().out


def test_decode(tmp_path):
    output = tmp_path / "decode.json"
    options = ["--contexts=64,130", "--rows=3", "--layers=1", "--scales=3", "--window=8"]
    main(["bench", "decode", *LAYER[1:4], *options, "--rounds=2", f"--output={output}"])
    document = json.loads(output.read_text())
    assert document["commit"]
    assert {row["context"] for row in document["rows"]} == {64, 130}
    ran = {row["side"]: row for row in document["rows"] if "skipped" not in row}
    assert ran["MAHA, fine queries"]["step_ms"] > 0
    assert ran["SDPA flash"]["cache_bytes"] == 2 * 3 * 130 * 32 * 4
    assert "cuDNN" not in " ".join(ran), "there is none on a CPU"


def test_wrong_benchmark_is_named(capsys):
    with pytest.raises(SystemExit):
        main(["bench", "nothing"])
    assert "ops" in capsys.readouterr().err
