"""transformers' own common model tests, on every class here.

They are no part of the installed package: the source distribution of the installed version is
fetched once into the user's cache, and without a network the tests here are skipped. What does not
run, and why, stands in ``skipped_common_tests.toml``.
"""

import fnmatch
import importlib
import re
import sys
import tomllib
import types
import unittest
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.models.auto import modeling_auto

from maha_attn import models

PACKAGE = "transformers_common_tests"
LISTED = tomllib.loads(Path(__file__).with_name("skipped_common_tests.toml").read_text())
NEVER = LISTED.pop("never")
SKIPPED = {pattern: why for section in LISTED.values() for pattern, why in section.items()}
AUTO = {
    "MODEL": ("MahaModel", "MahaSeq2SeqModel"),
    "MODEL_FOR_CAUSAL_LM": ("MahaForCausalLM",),
    "MODEL_FOR_MASKED_LM": ("MahaForMaskedLM",),
    "MODEL_FOR_QUESTION_ANSWERING": ("MahaForQuestionAnswering",),
    "MODEL_FOR_SEQUENCE_CLASSIFICATION": ("MahaForSequenceClassification",),
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM": ("MahaForSeq2SeqLM",),
}
KINDS = {
    "causal": (
        "MahaModel",
        "MahaForCausalLM",
        "MahaForSequenceClassification",
        "MahaForQuestionAnswering",
    ),
    "bidirectional": (
        "MahaModel",
        "MahaForMaskedLM",
        "MahaForSequenceClassification",
        "MahaForQuestionAnswering",
    ),
    "seq2seq": ("MahaSeq2SeqModel", "MahaForSeq2SeqLM"),
}


class ModelTester:
    """Configuration and inputs, as the common tests ask for them."""

    batch_size, seq_length, hidden_size, num_hidden_layers = 3, 13, 32, 2
    is_training = True

    def __init__(self, tiny: Any, kind: str) -> None:
        self.tiny, self.kind = tiny, kind

    def get_config(self) -> Any:
        options = {"initializer_range": 0.02, "tie_word_embeddings": True}
        if self.kind == "seq2seq":
            return self.tiny.seq2seq_config(**options)
        return self.tiny.config(causal=self.kind == "causal", **options)

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, torch.Tensor]]:
        ids = self.tiny.tokens(self.batch_size, self.seq_length)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if self.kind == "seq2seq":
            inputs["decoder_input_ids"] = self.tiny.tokens(self.batch_size, self.seq_length, seed=1)
        return self.get_config(), inputs


@pytest.fixture(scope="session")
def common(request: pytest.FixtureRequest, fetch_source: Any) -> types.ModuleType:
    """The module of the common tests, of the installed version."""
    requirement = f"transformers=={version('transformers')}"
    file = fetch_source(requirement, "tests/test_modeling_common.py")
    sys.modules[PACKAGE] = package = types.ModuleType(PACKAGE)
    package.__path__ = [str(file.parent)]
    # The distribution holds the files at the top of transformers' tests, not its folders.
    for name, mixin in (
        ("exporters.test_export", "Export"),
        ("generation.test_utils", "Generation"),
    ):
        mixin = f"{mixin}TesterMixin"
        parent, _, _ = name.rpartition(".")
        sys.modules[f"{PACKAGE}.{parent}"] = types.ModuleType(parent)
        sys.modules[f"{PACKAGE}.{name}"] = stub = types.ModuleType(name)
        setattr(stub, mixin, type(mixin, (), {}))
    source = file.read_text()
    for mark in set(re.findall(r"\bmark\.(\w+)", source)) - {"parametrize"}:
        request.config.addinivalue_line("markers", f"{mark}: transformers' own")
    return importlib.import_module(f"{PACKAGE}.test_modeling_common")


@pytest.mark.parametrize("kind", KINDS)
def test_common(tiny, kind, common, monkeypatch, subtests):
    for mapping, names in AUTO.items():
        for name in names:
            monkeypatch.setitem(getattr(modeling_auto, f"{mapping}_MAPPING_NAMES"), name, name)

    class Case(common.ModelTesterMixin, unittest.TestCase):
        all_model_classes = tuple(getattr(models, name) for name in KINDS[kind])
        model_tester = ModelTester(tiny, kind)
        has_attentions = False
        is_encoder_decoder = kind == "seq2seq"
        test_can_init_all_missing_weights_before_2023 = True

    names = unittest.TestLoader().getTestCaseNames(Case)
    assert len(names) > 100
    for name in names:
        with subtests.test(name):
            if name in NEVER:
                pytest.skip(NEVER[name])
            try:
                Case(name).debug()
            except unittest.SkipTest as skip:
                why = [why for pattern, why in SKIPPED.items() if fnmatch.fnmatch(name, pattern)]
                if not why:
                    pytest.fail(f"{name} skips itself ({skip}) and is not listed")
                pytest.skip(why[0])
