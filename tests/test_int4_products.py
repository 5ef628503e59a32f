"""The comparison of forms of a 4-bit product: every form computes, and the report's ratios are those of its figures."""

from __future__ import annotations

import numpy as np
import onnxruntime as ort
import pytest

from benchmarks.int4_peers import form as forms
from benchmarks.int4_peers.form import FORMS, Chain, shapes, stored_bytes
from benchmarks.int4_peers.ort_chain import make_model
from benchmarks.int4_products import Figures, markdown, report

CHAIN = Chain(3, (1, 5), 1, 2)


@pytest.fixture(autouse=True)
def _narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forms, "WIDTHS", (256, 512))
    monkeypatch.setattr("benchmarks.int4_peers.ort_chain.WIDTHS", (256, 512))


@pytest.mark.parametrize("name", FORMS)
def test_every_form_computes_and_keeps_the_size_of_its_input(name: str) -> None:
    loaded = ort.InferenceSession(make_model(FORMS[name], CHAIN), providers=["CPUExecutionProvider"])
    y = loaded.run(None, {"x": np.random.default_rng(0).standard_normal((5, 256)).astype(np.float32)})[0]
    assert y.shape == (5, 256)
    assert 0.3 < y.std() < 3


def test_bytes_are_those_that_the_model_holds_but_for_wider_scales() -> None:
    for name, form in FORMS.items():
        groups = sum(rows * columns // form.group_size for rows, columns in shapes(CHAIN))
        header = 4000  # names and shapes
        assert 0 <= len(make_model(form, CHAIN)) - stored_bytes(name, CHAIN) - 2 * groups < header, name


def test_ratios_are_to_the_first_form_and_the_share_is_of_the_best_bandwidth() -> None:
    first, second = list(FORMS)[:2]
    figures = {first: [Figures({1: [4.0, 2.0], 5: [10.0]}, "a")], second: [Figures({1: [6.0, 6.0], 5: [5.0]}, "a")]}
    result = report(figures, CHAIN, [1e9, 2e9])
    assert result["forms"][second]["decode_over_first"] == 2
    assert result["forms"][second]["prefill_over_first"] == 0.5
    assert result["forms"][first]["decode_fraction_of_read_bandwidth"] == stored_bytes(first, CHAIN) / 2e-3 / 2e9
    assert f"| {second} | 2.00 |" in markdown(result)
