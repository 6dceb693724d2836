"""``maha bench cost``: what the paper claims of FLOPs, honest rows, limits that hold."""

import json
import re
import time

import pytest
import torch

from maha_attn import AttentionSpec
from maha_attn.baselines import ATTENTIONS, obstacle
from maha_attn.bench.cost import growth
from maha_attn.bench.flops import count
from maha_attn.bench.limits import limited_memory, limited_time
from maha_attn.cli import main

SMALL = ["bench", "cost", "--device=cpu", "--width=32", "--heads=2", "--rounds=2"]


@pytest.fixture
def measure(tmp_path):
    """Run the command; returns its result file's content."""

    def run(*arguments: str) -> dict:
        output = tmp_path / "results" / "cost.json"
        main([*arguments, f"--output={output}"])
        return json.loads(output.read_text())

    return run


def test_the_default_saves_81_percent_of_attention_flops_at_4096_tokens(measure):
    """Executed, by the same counter on both sides, causal and bidirectional."""
    document = measure(
        *("bench", "cost", "--what=flops", "--lengths=4096", "--width=256", "--heads=4")
    )
    for causal in (True, False):
        rows = {r["attention"]: r for r in document["rows"] if r["causal"] == causal}
        assert set(rows) == set(ATTENTIONS)
        maha, full = rows["maha"], rows["full"]
        assert maha["attention_flops"] <= 0.19 * full["attention_flops"]
        assert full["attention_flops"] == rows["sdpa"]["attention_flops"]
        assert maha["visible_pairs"] < 0.13 * full["visible_pairs"]
        for name, row in rows.items():
            able = obstacle(name, causal=causal) is None
            assert ("attention_flops" in row) == (able and not ATTENTIONS[name].needs_gpu), name
            assert able or row["skipped"].startswith(f"{name} has no ")


EXACT = {"materialised", "bigbird", "reformer", "performer", "linformer"}


@pytest.mark.parametrize("name", [n for n, a in ATTENTIONS.items() if not a.needs_gpu])
def test_closed_form(name):
    """The counter agrees with the definition, where it sees all and nothing is done in vain."""
    causal = ATTENTIONS[name].causal
    spec = AttentionSpec(hidden_size=64, num_heads=2, window=32, causal=causal)
    counted = count(name, spec, 1536)
    executed, closed_form = counted.attention_flops, counted.closed_form_flops
    assert 0 < executed < counted.layer_flops
    if name in EXACT:
        assert executed == closed_form
    elif name in ("performer_relu", "gated_deltanet"):  # Sums, triangular systems: unseen.
        assert 0.6 * closed_form < executed < closed_form
    else:  # Blocks at the edge, masked pairs; Mamba-2's chunks once a head.
        assert closed_form < executed < 3 * closed_form


def test_every_attention_has_a_row_that_says_what_and_why(measure, capsys):
    document = measure(*SMALL, "--lengths=64,130")
    for key in ("command", "commit", "date", "device", "versions", "settings", "ceilings"):
        assert document[key], key
    rows = {(r["length"], r["causal"], r["attention"]): r for r in document["rows"]}
    assert len(rows) == len(document["rows"]) == 2 * 2 * len(ATTENTIONS)
    for (_, causal, name), row in rows.items():
        able = obstacle(name, causal=causal) is None and not ATTENTIONS[name].needs_gpu
        assert row["limits"] == ATTENTIONS[name].properties()
        assert ("train" in row) == able != ("skipped" in row), (name, row)
        if able:
            assert row["forward"]["median_ms"] > 0
            assert row["forward"]["rounds"] == 2
            sequences = row["train_sequences_per_s"] * row["train"]["median_ms"] / 1e3
            assert sequences == pytest.approx(row["batch"])
            assert row["train_peak_bytes"] >= 0
    printed = capsys.readouterr().out
    assert "native_sparse: needs a CUDA device" in printed
    assert "longformer: longformer has no causal form" in printed


def test_a_slow_side_is_stopped_and_says_so(measure):
    document = measure(
        *SMALL, "--what=time", "--attentions=performer_relu", "--directions=causal",
        "--lengths=64,65536,65600", "--limit=0.3",
    )  # fmt: skip
    short, long, longer = document["rows"]
    assert "train" in short
    assert long["skipped"] == "stopped at N = 65536: one pass takes over 0.3 s"
    assert longer["skipped"] == long["skipped"]


def test_a_side_without_memory_says_so(measure):
    document = measure(
        *SMALL, "--what=time", "--attentions=sliding,materialised", "--directions=causal",
        "--lengths=16384", "--memory=1",
    )  # fmt: skip
    sliding, materialised = document["rows"]
    assert "train" in sliding
    assert materialised["skipped"] == "out of memory at N = 16384"


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--attentions=maha,fast", "expected some of maha, .*; got fast"),
        ("--directions=left", "expected some of causal, bidirectional; got left"),
        ("--lengths=0,8", "lengths must be at least 1, got 0"),
    ],
)
def test_wrong_options_are_named(argument, message, capsys):
    with pytest.raises(SystemExit):
        main(["bench", "cost", argument])
    assert re.search(message, capsys.readouterr().err)


def test_growth_is_the_exponent():
    def row(length, causal, milliseconds):
        timing = {"median_ms": milliseconds}
        return {"attention": "maha", "causal": causal, "length": length, "batch": 2,
                "forward": timing, "train": timing}  # fmt: skip

    rows = [row(n, True, 3e-6 * n**1.5) for n in (512, 8192, 16384, 65536)]
    rows[0]["train"] = rows[0]["forward"] = {"median_ms": 1e9}  # Too short to count.
    rows.append(row(8192, False, 1.0))
    bidirectional, causal = growth(rows)
    assert causal["train"] == pytest.approx(1.5)
    assert causal["lengths"] == [8192, 16384, 65536]
    assert bidirectional["train"] is None


def test_limits_hold_and_are_lifted():
    with pytest.raises(TimeoutError), limited_time(0.05):
        time.sleep(10)
    with limited_time(0.05):
        pass
    time.sleep(0.06)  # Nothing rings later.
    with limited_memory(0.25, torch.device("cpu")):
        with pytest.raises(RuntimeError, match="allocate"):
            torch.empty(2**28)
        torch.empty(2**20)
    torch.empty(2**28)
