"""A benchmark runs end to end and writes down what another person needs to repeat it."""

import json

import pytest
import torch

from maha_attn import AttentionSpec, MultiscaleAttention
from maha_attn.bench import fusion
from maha_attn.bench.decode import bytes_read
from maha_attn.bench.measure import Work
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
    # Projections of full attention, 8·D² a token, and its visible pairs.
    flops = 8 * 32**2 * 130 + 4 * 32 * 130 * 131 // 2
    assert ran["SDPA flash"]["forward_flops"] == flops
    share = flops / ran["SDPA flash"]["forward"]["median_ms"] / 1e9
    share /= document["ceilings"]["matmul_tflop_s"]
    assert ran["SDPA flash"]["forward_of_matmul"] == pytest.approx(share)


def test_ops(tmp_path, capsys):
    output = tmp_path / "ops.json"
    main(["bench", "ops", *LAYER[1:], "--lengths=9", f"--output={output}"])
    ran = {row["side"]: row for row in json.loads(output.read_text())["rows"]}
    assert "skipped" in ran["FlexAttention window"]
    full, window, steep = (ran[name] for name in ("SDPA flash", "window", "MAHA convex, ratio 4"))
    assert full["forward_flops"] == window["forward_flops"] == 4 * 32 * 45
    assert full["train_flops"] == 3.5 * full["forward_flops"]
    assert steep["forward_flops"] == 4 * 32 * (45 + 3)  # Two blocks of four tokens.
    assert full["forward_bytes"] == 4 * 9 * 32 * 4  # Queries, keys, values and outputs, fp32.
    for row in ran.values():
        if "skipped" not in row:
            assert row["train"]["median_ms"] > 0
            assert row["forward_of_copy"] > 0
            assert row["train_of_matmul"] > 0
    assert "of peak" in capsys.readouterr().out


def test_backward_products_are_counted():
    work = Work(attention=4, projections=2)
    assert work.flops("forward") == 6
    assert work.flops("train") == 14 + 6


def test_fusion(tmp_path, capsys):
    pytest.importorskip("triton")
    output = tmp_path / "fusion.json"
    shape = ["--tokens=8", "--length=8", "--width=16", "--heads=2", "--scales=2", "--rounds=1"]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    fusion.main([*shape, "--dtype=fp32", f"--device={device}", f"--output={output}"])
    rows = {(r["fusion"], r["pass"]): r for r in json.loads(output.read_text())["rows"]}
    assert {which for _, which in rows} == {"forward", "backward"}
    # Twelve outputs, the result and two weights a head and token, fp32.
    assert rows["mean", "forward"]["bytes"] == 4 * (12 * 16 + 8 * 16 + 8 * 2 * 2)
    assert all(row["of_copy"] > 0 for row in rows.values())
    assert "nash" in capsys.readouterr().out


def test_decode(tmp_path):
    output = tmp_path / "decode.json"
    options = ["--contexts=64,130", "--rows=3", "--layers=1", "--scales=3", "--window=8"]
    main(["bench", "decode", *LAYER[1:4], *options, "--rounds=2", f"--output={output}"])
    document = json.loads(output.read_text())
    assert document["commit"]
    assert {row["context"] for row in document["rows"]} == {64, 130}
    ran = {row["side"]: row for row in document["rows"] if "skipped" not in row}
    assert ran["MAHA, fine queries"]["step_ms"] > 0
    assert ran["MAHA, fine queries"]["first_call_s"] > 0
    assert ran["SDPA flash"]["step_bytes"] == ran["SDPA flash"]["cache_bytes"] + 4 * 32**2 * 4
    assert 0 < ran["MAHA"]["of_copy"] < ran["SDPA flash"]["of_copy"]
    assert ran["SDPA flash"]["cache_bytes"] == 2 * 3 * 130 * 32 * 4
    assert "cuDNN" not in " ".join(ran), "there is none on a CPU"


def test_first_call(tmp_path, capsys):
    output = tmp_path / "first.json"
    sizes = ["--width=32", "--heads=2", "--length=64", "--dtype=fp32"]
    main(["bench", "first_call", "--device=cpu", *sizes, f"--output={output}"])
    document = json.loads(output.read_text())
    assert document["commit"]
    assert min(document["seconds"].values()) > 0
    assert set(document["seconds"]) == {"start", "training", "decoding"}
    assert "training" in capsys.readouterr().out


@pytest.mark.parametrize("queries", ["coarse", "fine"])
def test_a_step_reads_what_its_due_queries_see(queries):
    spec = AttentionSpec(hidden_size=8, num_heads=1, num_scales=3, window=4, queries=queries)
    layer = MultiscaleAttention(spec)
    weights = sum(p.nbytes for p in layer.parameters())
    tokens = [4, 4, 10] if queries == "fine" else [4, 4 / 2, 10 / 4]
    seen = 2 * 5 * 8 * 4 * sum(tokens)
    assert bytes_read(layer, 5, 40) == weights + seen
    # A single row leaves coarse weights alone at most steps.
    idle = (2 if queries == "coarse" else 1) * 8 * 8 * 4 * (1 / 2 + 3 / 4)
    assert bytes_read(layer, 1, 40) == weights - idle + seen / 5


def test_wrong_benchmark_is_named(capsys):
    with pytest.raises(SystemExit):
        main(["bench", "nothing"])
    assert "ops" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("layer --width=65 --heads=2", "--width must be a multiple of twice --heads; got 65 and 2"),
        ("ops --lengths=abc", "--lengths: must be lengths, as 512,4096; got 'abc'"),
        pytest.param(
            *("decode --device=cuda", "torch finds no CUDA device here; use cpu"),
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is one"),
        ),
    ],
)
def test_options_that_cannot_be(arguments, message, capsys):
    with pytest.raises(SystemExit):
        main(["bench", *arguments.split()])
    assert message in capsys.readouterr().err


def test_results_of_another_device_are_kept(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "results").mkdir()
    file = tmp_path / "results" / "bench-first-call.json"
    file.write_text('{"device": "H200"}')
    with pytest.raises(SystemExit, match=r"was measured on H200, not .*: name another file"):
        main(["bench", "first_call", "--device=cpu"])
    assert file.read_text() == '{"device": "H200"}'
