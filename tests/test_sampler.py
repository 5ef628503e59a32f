"""Which tokens can come, how often, and always the same with the same seed."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest

from vila_edge.errors import UsageError, VilaEdgeError
from vila_edge.sampler import Sampler, Sampling

LOGITS = np.log(np.array([0.4, 0.3, 0.2, 0.06, 0.04], np.float32))


def frequencies(sampling: Sampling, draws: int = 4000) -> dict[int, float]:
    sampler = Sampler(sampling)
    return {token: n / draws for token, n in Counter(sampler(LOGITS) for _ in range(draws)).items()}


def test_temperature_0_takes_the_likeliest() -> None:
    assert frequencies(Sampling(), 10) == {0: 1.0}


def test_temperature_1_follows_the_probabilities() -> None:
    found = frequencies(Sampling(temperature=1, seed=0))
    assert found == pytest.approx({0: 0.4, 1: 0.3, 2: 0.2, 3: 0.06, 4: 0.04}, abs=0.03)


def test_temperature_sharpens_and_flattens() -> None:
    sharp, flat = (Sampler(Sampling(temperature=t)).probabilities(LOGITS) for t in (0.5, 2))
    np.testing.assert_allclose(sharp, np.exp(LOGITS) ** 2 / (np.exp(LOGITS) ** 2).sum(), rtol=1e-5)
    np.testing.assert_allclose(flat, np.exp(LOGITS) ** 0.5 / (np.exp(LOGITS) ** 0.5).sum(), rtol=1e-5)


def test_top_k_leaves_k_tokens() -> None:
    p = Sampler(Sampling(temperature=1, top_k=2)).probabilities(LOGITS)
    np.testing.assert_allclose(p, [4 / 7, 3 / 7, 0, 0, 0], rtol=1e-5)


@pytest.mark.parametrize(("top_p", "tokens"), [(0.05, 1), (0.39, 1), (0.5, 2), (0.75, 3), (0.95, 4), (1.0, 5)])
def test_top_p_leaves_the_fewest_tokens_that_reach_it(top_p: float, tokens: int) -> None:
    p = Sampler(Sampling(temperature=1, top_p=top_p)).probabilities(LOGITS)
    assert (p > 0).sum() == tokens
    assert p.sum() == pytest.approx(1)


def test_top_p_counts_what_top_k_left() -> None:
    p = Sampler(Sampling(temperature=1, top_k=2, top_p=0.5)).probabilities(LOGITS)
    np.testing.assert_allclose(p, [1, 0, 0, 0, 0])


def test_the_same_seed_gives_the_same_tokens() -> None:
    one, two, other = (
        [sampler(LOGITS) for _ in range(50)]
        for sampler in (Sampler(Sampling(temperature=1, seed=seed)) for seed in (7, 7, 8))
    )
    assert one == two != other


def test_a_seed_that_was_drawn_is_reported_and_repeats() -> None:
    first = Sampler(Sampling(temperature=1))
    again = Sampler(Sampling(temperature=1, seed=first.seed))
    assert [first(LOGITS) for _ in range(20)] == [again(LOGITS) for _ in range(20)]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_p", math.nan),
        ("top_k", -1),
        ("max_new_tokens", 0),
        ("seed", -1),
        ("seed", 2**64),
    ],
)
def test_values_out_of_range_are_named(field: str, value: Any) -> None:
    with pytest.raises(UsageError, match=f"{field} is .*, expected"):
        Sampling(**{field: value})


def test_logits_that_are_not_finite_are_an_error() -> None:
    with pytest.raises(VilaEdgeError, match="not finite"):
        Sampler(Sampling())(np.array([0.0, math.nan]))
