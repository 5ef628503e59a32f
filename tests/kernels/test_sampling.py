"""Tokens chosen on a device against numpy, what is drawn against the host's sampler, and the state of a decode step."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.kernels.draws import choose, kept, philox
from tests.kernels.runner import Runner
from vila_edge.kernels import sampling
from vila_edge.kernels.manifest import manifest
from vila_edge.kernels.sampling import INACTIVE, MAX_STOPS, REFUSED, RING, SETTINGS, State, read_ring, settings
from vila_edge.sampler import Sampler, Sampling

GREEDY = Sampling()
DRAWS = (
    Sampling(temperature=1.0),
    Sampling(temperature=0.7, top_k=40),
    Sampling(temperature=1.5, top_p=0.9),
    Sampling(temperature=0.3, top_k=7, top_p=0.5),
    GREEDY,
    Sampling(temperature=5.0, top_k=3),
    Sampling(temperature=100.0, top_p=0.99),
    Sampling(temperature=1e-30),
)
SHAPES = manifest()["ve_sample_f32"].shapes


@dataclasses.dataclass
class Step:
    """A decode step's end: the state of a batch on a device."""

    kernels: Runner
    logits: NDArray[np.float32]  # [batch, vocab]
    records: NDArray[Any]  # SETTINGS [batch]
    positions: NDArray[Any]
    allowed: NDArray[np.bool_] | None = None  # [batch, vocab]

    def __post_init__(self) -> None:
        put, (batch, vocab) = self.kernels.put, self.logits.shape
        self.on_device = {
            "ids": put(np.full(batch, 7, np.int32)),
            "positions": put(self.positions.astype(np.int32)),
            "step": put(np.zeros(batch, np.int32)),
            "ring": put(np.zeros((RING, batch), np.int64)),
            "settings": put(self.records.view(np.uint8).reshape(batch, -1)),
            "scratch": self.kernels.empty((sampling.scratch_bytes(vocab, batch) // 8,), np.uint64),
        }
        if self.allowed is not None:
            padded = np.zeros((batch, -(-vocab // 32) * 32), np.bool_)
            padded[:, :vocab] = self.allowed
            self.on_device["masks"] = put(np.packbits(padded, axis=1, bitorder="little").view("<u4"))
        self.state = State(**{name: array.address for name, array in self.on_device.items()})
        self.address = put(self.logits).address

    def run(self, greedy: bool = False) -> list[int]:
        """Once more; the tokens that the ring has for it."""
        launches = (sampling.greedy if greedy else sampling.sample)(self.address, self.state, *self.logits.shape[::-1])
        step = int(self.read("step")[0])
        for launch in launches:
            self.kernels.run(launch)
        assert self.read("step").tolist() == [step + 1] * len(self.logits)
        tokens = [read_ring(self.read("ring"), step, b) for b in range(len(self.logits))]
        assert None not in tokens
        return [int(token) for token in tokens if token is not None]

    def read(self, name: str) -> NDArray[Any]:
        return self.on_device[name].numpy()

    def expected(self) -> list[int]:
        """What numpy takes, for sequences that are active."""
        allowed = [None] * len(self.logits) if self.allowed is None else self.allowed
        rows = zip(self.logits, self.records, self.read("positions"), allowed, strict=True)
        return [choose(row, record, int(position) + 1, mask) for row, record, position, mask in rows]


def records(samplings: Any, **changes: Any) -> NDArray[Any]:
    """Of a batch, each with a seed of its own."""
    given = {"stops": (), "limit": 2**31 - 1, **changes}
    return np.concatenate([settings(chosen, seed=3 + (b << 40), **given) for b, chosen in enumerate(samplings)])


def random_logits(seed: int, vocab: int, batch: int) -> NDArray[np.float32]:
    return (np.random.default_rng(seed).standard_normal((batch, vocab)) * 3).astype(np.float32)


@pytest.mark.parametrize(("vocab", "batch"), manifest()["ve_sample_greedy"].shapes)
def test_greedy_takes_the_first_of_the_largest(kernels: Runner, vocab: int, batch: int) -> None:
    logits = np.round(random_logits(0, vocab, batch)) - 100 * (np.arange(batch)[:, None] % 2)
    logits[0] = np.minimum(logits[0], 0.0)
    logits[0, logits[0] == 0] *= np.where(np.arange((logits[0] == 0).sum()) % 2, 1, -1)  # both zeros are one number
    step = Step(kernels, logits.astype(np.float32), records([GREEDY] * batch), np.arange(batch))
    tokens = step.run(greedy=True)
    assert tokens == logits.argmax(1).tolist()
    assert step.read("ids").tolist() == tokens
    assert step.read("positions").tolist() == list(range(1, batch + 1))
    assert step.run() == tokens, "the launches that can draw do the same"


@pytest.mark.parametrize(("vocab", "batch"), SHAPES)
@pytest.mark.parametrize("first", range(0, len(DRAWS), 3))
def test_a_draw_is_that_of_numpy(kernels: Runner, vocab: int, batch: int, first: int) -> None:
    chosen = [DRAWS[(first + b) % len(DRAWS)] for b in range(batch)]
    step = Step(kernels, random_logits(first, vocab, batch), records(chosen), np.arange(batch) * 1000)
    for _ in range(2):
        expected = step.expected()
        assert step.run() == expected


def flat(rng: np.random.Generator) -> NDArray[Any]:
    return np.zeros(5000)


def few_levels(rng: np.random.Generator) -> NDArray[Any]:
    return rng.integers(-2, 3, 5000) / 64


def narrow(rng: np.random.Generator) -> NDArray[Any]:
    return rng.standard_normal(5000) * 1e-3 + 17


def extreme(rng: np.random.Generator) -> NDArray[Any]:
    return np.where(rng.random(5000) < 0.5, 3.3e38, -3.3e38)


def one_above(rng: np.random.Generator) -> NDArray[Any]:
    return np.where(np.arange(5000) == 4321, 40.0, rng.standard_normal(5000))


@pytest.mark.parametrize("make", [flat, few_levels, narrow, extreme, one_above], ids=lambda make: make.__name__)
def test_logits_that_fall_into_one_bin_are_told_apart(shuffled: Runner, make: Any) -> None:
    logits = np.stack([make(np.random.default_rng(seed)) for seed in range(len(DRAWS))]).astype(np.float32)
    chosen = [dataclasses.replace(draw, top_k=draw.top_k and 50 * draw.top_k) for draw in DRAWS]
    step = Step(shuffled, logits, records(chosen), np.full(len(DRAWS), 11))
    expected = step.expected()
    assert step.run() == expected


@pytest.mark.parametrize("equal", [511, 512, 513, 1025])
def test_as_many_tokens_as_a_list_holds_and_more(shuffled: Runner, equal: int) -> None:
    logits = np.concatenate([np.full(equal, 2), [1, 0, -1]]).astype(np.float32)[None]
    step = Step(shuffled, logits, records([DRAWS[0]]), np.array([3]))
    for _ in range(3):
        expected = step.expected()
        assert step.run() == expected


def test_top_p_lets_in_no_more_than_it_takes(shuffled: Runner) -> None:
    """Of four equal tokens two are a half, exactly; a hair more than a half takes a third."""
    half, more = (Sampling(temperature=1.0, top_p=top_p) for top_p in (0.5, 0.5 + 2.0**-53))
    step = Step(shuffled, np.full((2, 4), 2, np.float32), records([half, more]), np.zeros(2))
    first, second = zip(*[step.run() for _ in range(24)], strict=True)
    assert set(first) == {0, 1}
    assert set(second) == {0, 1, 2}


def test_a_large_vocabulary(shuffled: Runner) -> None:
    chosen = [Sampling(temperature=1.2, top_k=5000, top_p=0.95), Sampling(temperature=4.0), GREEDY]
    step = Step(shuffled, random_logits(1, 152_064, 3), records(chosen), np.array([5, 6, 7]))
    expected = step.expected()
    assert step.run() == expected


@pytest.mark.parametrize("draw", [draw for draw in DRAWS if draw.temperature], ids=str)
def test_masses_are_the_probabilities_of_the_hosts_sampler(draw: Sampling) -> None:
    for seed in range(5):
        logits = random_logits(seed, 3000, 1)[0]
        tokens, mass = kept(logits, records([draw])[0])
        found = np.zeros(3000)
        found[tokens] = mass / mass.sum()
        expected = Sampler(draw).probabilities(logits)
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-7 * expected.max())
        assert np.array_equal(found > 0, expected > 2.0**-44 * expected.max())


def test_draws_are_as_frequent_as_their_probabilities() -> None:
    draw, logits, count = Sampling(temperature=1.3, top_k=12, top_p=0.95), random_logits(8, 40, 1)[0], 4000
    record = records([draw])[0]
    seen = np.bincount([choose(logits, record, position) for position in range(count)], minlength=40)
    expected = Sampler(draw).probabilities(logits) * count
    assert (seen[expected == 0] == 0).all()
    drawn = expected > 0
    chi_square = (((seen - expected) ** 2)[drawn] / expected[drawn]).sum()
    assert 4 < drawn.sum() - 1 < 12
    assert chi_square < 30, "1 in 1000 for 11 degrees of freedom is 31"


def test_the_generator_is_that_of_its_authors() -> None:
    """The answers that Random123 publishes for philox4x32, 10 rounds."""
    assert philox(0, 0) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert philox(2**64 - 1, 2**128 - 1) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]


def test_a_sequence_gets_its_tokens_in_any_batch(shuffled: Runner) -> None:
    logits, chosen = random_logits(2, 333, 1), [DRAWS[0]]
    alone = Step(shuffled, logits, records(chosen), np.array([9]))
    among = Step(shuffled, np.repeat(logits, 4, 0), np.repeat(records(chosen), 4), np.array([3, 9, 9, 10]))
    for _ in range(4):
        (token,), tokens = alone.run(), among.run()
        assert tokens[1:3] == [token, token]


@pytest.mark.parametrize("greedy", [True, False])
def test_a_mask_says_what_is_allowed(kernels: Runner, greedy: bool) -> None:
    vocab, rng = 997, np.random.default_rng(3)
    allowed = rng.random((4, vocab)) < 0.02
    allowed[1] = False
    chosen = records([GREEDY, GREEDY, DRAWS[0], DRAWS[1]] if not greedy else [GREEDY] * 4, masked=True)
    chosen["masked"][3] = False
    step = Step(kernels, random_logits(3, vocab, 4), chosen, np.full(4, 5), allowed)
    step.allowed = allowed | (np.arange(4)[:, None] % 2 == 1)  # as the settings say; the mask of row 1 allows nothing
    expected = step.expected()
    expected[1] = REFUSED
    assert step.run(greedy) == expected
    assert step.read("positions").tolist() == [6, -1, 6, 6]


@pytest.mark.parametrize("greedy", [True, False])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused(shuffled: Runner, value: float, greedy: bool) -> None:
    logits = random_logits(4, 5000, 3)
    logits[1, 4998] = value
    chosen = records([DRAWS[0]] * 3, masked=True, stops=range(4990, 4998))
    step = Step(shuffled, logits, chosen, np.zeros(3), np.arange(5000) < [[4000]] * 3)
    tokens = step.run(greedy)
    assert tokens[1] == REFUSED
    assert min(tokens[::2]) >= 0
    assert step.read("positions").tolist() == [1, -1, 1]
    assert step.run(greedy)[1] == INACTIVE


@pytest.mark.parametrize("greedy", [True, False])
def test_a_sequence_ends_and_stays_as_it_was(kernels: Runner, greedy: bool) -> None:
    logits, stops = random_logits(5, 200, 5), range(100, 100 + MAX_STOPS)
    logits[:3, 150] = 100
    logits[1, 107] = 200  # the last stop
    chosen = records([GREEDY] * 3 + [DRAWS[0] if not greedy else GREEDY] * 2, stops=stops, limit=20)
    logits[3:, 100 : 100 + MAX_STOPS] = -100
    step = Step(kernels, logits, chosen, np.array([17, 5, -1, 18, 19]))
    first = step.run(greedy)
    assert first[:3] == [150, 107, INACTIVE]
    assert step.read("positions").tolist() == [18, -1, -1, 19, -1]
    assert step.read("ids").tolist() == [150, 107, 7, *first[3:]]
    second = step.run(greedy)
    assert (second[0], second[1], second[2], second[4]) == (150, INACTIVE, INACTIVE, INACTIVE)
    assert step.read("positions").tolist() == [19, -1, -1, -1, -1]
    assert step.read("ids").tolist() == [150, 107, 7, second[3], first[4]]
    assert step.run(greedy) == [150, *[INACTIVE] * 4], "the limit is 20: the last position is 19"
    assert step.run(greedy) == [INACTIVE] * 5


def test_the_ring_goes_round(shuffled: Runner) -> None:
    step = Step(shuffled, random_logits(6, 100, 2), records([GREEDY] * 2, limit=RING), np.array([0, 5]))
    tokens = [step.run(greedy=True) for _ in range(RING + 3)]
    assert tokens[RING - 1] == [int(step.logits[0].argmax()), INACTIVE]
    ring = step.read("ring")
    assert [read_ring(ring, s, 1) for s in range(3, RING + 3)] == [t[1] for t in tokens[3:]]
    assert read_ring(ring, RING + 3, 0) is None
    with pytest.raises(ValueError, match="step 2 of the ring was overwritten by step 66"):
        read_ring(ring, 2, 0)


def test_a_ring_of_zeros_holds_nothing() -> None:
    assert read_ring(np.zeros((RING, 1), np.int64), 0, 0) is None


def test_settings_lie_as_the_kernel_reads_them() -> None:
    assert SETTINGS.itemsize == 64
    record = settings(Sampling(temperature=0.5, top_p=0.25, top_k=2**40), 2**64 - 1, (7,), 99, masked=True)[0]
    assert record["rate"] == np.float32(2 / np.log(2))
    assert (record["top_k"], record["top_p"], record["limit"], record["masked"]) == (2**31 - 1, 2**62, 99, 1)
    assert record["stops"].tolist() == [7] + [-1] * (MAX_STOPS - 1)
    assert settings(GREEDY, 0, (), 1)[["rate", "top_p"]].tolist() == [(0, 0)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stops": range(9)}, "expected up to 8"),
        ({"stops": (-1,)}, "each from 0"),
        ({"limit": 0}, "limit 0"),
        ({"seed": 2**64}, "expected 1 to 2\\^31 - 1, and 0 to 2\\^64 - 1"),
    ],
)
def test_settings_that_do_not_fit_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settings(GREEDY, **{"seed": 0, "stops": (), "limit": 1, **change})


@pytest.mark.parametrize(("vocab", "batch"), [(0, 1), (2**18 + 1, 1), (100, 0), (100, 9)])
def test_sizes_that_the_kernels_cannot_take_are_refused(vocab: int, batch: int) -> None:
    state = State(*[16] * 6)
    for make in (sampling.greedy, sampling.sample):
        with pytest.raises(ValueError, match="expected 1 to 262144, and 1 to 8"):
            make(16, state, vocab, batch)
