"""The cuda engine on a fake GPU: decode in graphs, tokens without waiting, and what goes wrong."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import fake_cuda
from tests.cuda_engines import MODELS, bundle_of, config, open_fake, open_gpu, oracle_of, stored
from tests.fake_cuda import FakeDevice
from tests.graphs import handmade_bundle
from tests.kernels.host import Compiled, call
from tests.tiny import TINY, random_parameters
from vila_edge.bundle import Bundle
from vila_edge.engine.cuda.decode_loop import AHEAD, Running
from vila_edge.engine.cuda.engine import CudaEngine
from vila_edge.engine.protocol import Generating
from vila_edge.errors import BackendError, UsageError, VilaEdgeError
from vila_edge.kernels.attention import SPLIT, KvCache
from vila_edge.pipeline import Pipeline
from vila_edge.reference.engine import ReferenceEngine
from vila_edge.sampler import Sampling
from vila_edge.tokenizer import Tokenizer

RNG = np.random.default_rng(5)
IDS = RNG.integers(0, TINY.llm.vocab_size, 11).tolist()
GREEDY, WARM = Sampling(), Sampling(temperature=1.0, top_k=40, top_p=0.95)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return bundle_of("llama, grouped queries", tmp_path_factory.mktemp("bundle"), IDS)


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the module's engines keep their packed weights: they are packed once."""
    return tmp_path_factory.mktemp("packed")


@pytest.fixture
def device() -> FakeDevice:
    return FakeDevice()


@pytest.fixture
def engine(bundle: Bundle, compiled: Compiled, packed: Path, device: FakeDevice) -> Iterator[CudaEngine]:
    with open_fake(bundle, compiled, packed, device=device) as engine:
        yield engine
    assert not device.buffers and not device.pins and not device.modules, "everything was given back"


def begin(engine: Any, ids: list[int], capacity: int = 60) -> tuple[Any, int]:
    """A cache that holds `ids`, and the most likely token behind them."""
    cache = engine.new_cache(capacity)
    return cache, int(engine.forward(engine.embed_tokens(ids), cache)[0].argmax())


def greedy(oracle: ReferenceEngine, ids: list[int], count: int, capacity: int = 60) -> list[int]:
    """What the oracle says, one token after the other."""
    cache, token = begin(oracle, ids, capacity)
    said = [token]
    while len(said) < count:
        said.append(int(oracle.forward(oracle.embed_tokens(said[-1:]), cache)[0].argmax()))
    return said


def take(
    engine: CudaEngine, ids: list[int], count: int, sampling: Sampling = GREEDY, seed: int = 1, capacity: int = 60
) -> list[int]:
    cache, token = begin(engine, ids, capacity)
    tokens = engine.generate(token, cache, sampling, seed)
    return [token, *(next(tokens) for _ in range(count - 1))]


@pytest.mark.parametrize("opened", [open_fake, pytest.param(open_gpu, marks=pytest.mark.gpu)])
@pytest.mark.parametrize("kv_cache", ["float16", "int8"])
@pytest.mark.parametrize("model", MODELS)
def test_greedy_tokens_are_those_of_the_oracle(
    model: str, kv_cache: KvCache, opened: Callable[..., CudaEngine], compiled: Compiled, tmp_path: Path
) -> None:
    bundle = bundle_of(model, tmp_path, IDS)
    with opened(bundle, compiled, tmp_path, kv_cache) as engine:
        assert take(engine, IDS, 16) == greedy(oracle_of(bundle, kv_cache, IDS), IDS, 16)


def test_a_token_is_one_launch_of_a_graph_and_nothing_else(engine: CudaEngine, device: FakeDevice) -> None:
    cache, token = begin(engine, IDS)
    tokens = engine.generate(token, cache, GREEDY, 1)
    next(tokens)  # captures the graph, and has steps launched ahead
    before = Counter(device.calls)
    for _ in range(20):
        next(tokens)
    spent = device.calls - before
    assert spent.pop("done") > 0  # questions, which do not wait
    assert spent == {"launch": 20}
    layers = TINY.llm.num_hidden_layers
    assert engine.launches_per_token == 1 + 5 * layers + 1 + 2  # embedding, blocks, lm_head, the choice of a token


@pytest.mark.slow
def test_ten_thousand_tokens_take_no_memory(engine: CudaEngine, device: FakeDevice) -> None:
    """With kernels that do nothing but choose tokens: what is counted is what the host does."""
    cache, token = begin(engine, IDS, engine.max_context)

    def only_sampling(library: Any, name: str, *rest: Any) -> None:
        if name.startswith("ve_sample"):
            call(library, name, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fake_cuda, "call", only_sampling)
        room = engine.max_context - len(IDS)
        used, count = set[tuple[int, int, int]](), 0
        while count < 10_000:
            cache.truncate(len(IDS))
            count += sum(1 for _ in zip(engine.generate(token, cache, GREEDY, 1), range(room), strict=False))
            used.add((device.used, len(device.pins), device.calls["alloc"]))
    assert len(used) == 1


def test_the_cache_holds_all_but_the_last_token(engine: CudaEngine) -> None:
    cache, token = begin(engine, IDS)
    tokens = engine.generate(token, cache, GREEDY, 1)
    for count in range(1, 6):
        last = next(tokens)
        assert cache.length == len(IDS) + count
    tokens.close()
    said = engine.forward(engine.embed_tokens([last]), cache)[0].argmax()
    assert [*take(engine, IDS, 6), said] == take(engine, IDS, 7)


def test_an_answer_left_alone_leaves_nothing_behind(engine: CudaEngine, device: FakeDevice) -> None:
    want = take(engine, IDS, 5)
    for count in (2, 3):
        take(engine, IDS, count)  # and never asked again: steps are still under way
        assert take(engine, IDS, 5) == want


def test_what_comes_between_two_tokens_does_not_change_them(engine: CudaEngine) -> None:
    want, others = take(engine, IDS, 4, WARM), take(engine, IDS[::-1], 4, WARM)
    cache, token = begin(engine, IDS)
    other_cache, other_token = begin(engine, IDS[::-1])
    tokens = engine.generate(token, cache, WARM, 1)
    other_tokens = engine.generate(other_token, other_cache, WARM, 1)
    got, other_got = [token], [other_token]
    for _ in range(3):
        got.append(next(tokens))
        begin(engine, [3, 1, 4])
        other_got.append(next(other_tokens))
    assert (got, other_got) == (want, others)


def test_drawn_tokens_hang_on_the_seed_alone(engine: CudaEngine) -> None:
    drawn = {seed: tuple(take(engine, IDS, 6, WARM, seed)) for seed in (1, 2, 3)}
    assert len(set(drawn.values())) == 3
    assert tuple(take(engine, IDS, 6, WARM, 2)) == drawn[2]


def test_sequences_decoded_together_are_those_decoded_alone(engine: CudaEngine) -> None:
    prompts = [IDS[: 2 + 3 * place] for place in range(4)]
    alone = [take(engine, prompt, 4, sampling, 4) for prompt, sampling in zip(prompts, [GREEDY, WARM] * 2, strict=True)]
    sequences = []
    for prompt, sampling in zip(prompts, [GREEDY, WARM] * 2, strict=True):
        cache, token = begin(engine, prompt)
        sequences.append(Running(cache, token, sampling, 4))
    got = [[sequence.token] for sequence in sequences]
    for tokens, _ in zip(engine.generate_together(sequences), range(3), strict=False):
        for said, found in zip(got, tokens, strict=True):
            assert found is not None
            said.append(found)
    assert got == alone


def test_a_sequence_ends_while_others_go_on(engine: CudaEngine) -> None:
    short, long = take(engine, IDS, 9), take(engine, IDS[:4], 9)
    stop = next(token for token in short[1:] if token not in long)
    ends = short.index(stop)
    (cache, token), (other, first) = begin(engine, IDS), begin(engine, IDS[:4])
    together = [Running(cache, token, GREEDY, 1, [stop]), Running(other, first, GREEDY, 1)]
    columns = list(zip(*(t for t, _ in zip(engine.generate_together(together), range(8), strict=False)), strict=True))
    assert list(columns[0]) == short[1 : ends + 1] + [None] * (8 - ends)
    assert list(columns[1]) == long[1:]
    assert cache.length == len(IDS) + ends


def test_tokens_end_when_the_cache_is_full(engine: CudaEngine) -> None:
    cache, token = begin(engine, IDS, len(IDS) + 5)
    tokens = list(engine.generate(token, cache, GREEDY, 1))
    assert [token, *tokens] == take(engine, IDS, 6)
    assert cache.length == cache.capacity
    assert list(engine.generate(tokens[-1], cache, GREEDY, 1)) == []


def test_a_full_cache_stays_idle_when_the_others_go_on_after_a_break(engine: CudaEngine) -> None:
    """Its next position is beyond the cache, and may be beyond the rope tables: the GPU must not be told of it."""
    (full, token), (other, first) = begin(engine, IDS, len(IDS) + 2), begin(engine, IDS[:4])
    steps = engine.generate_together([Running(full, token, GREEDY, 1), Running(other, first, GREEDY, 1)])
    got = [next(steps) for _ in range(3)]
    begin(engine, [3, 1, 4])
    got += [next(steps), next(steps)]
    assert [tokens[0] for tokens in got] == [*take(engine, IDS, 3)[1:], None, None, None]
    assert [first, *(tokens[1] for tokens in got)] == take(engine, IDS[:4], 6)
    begin(engine, [3, 1, 4])
    next(steps)
    assert engine._decoder.staging.host["sequence_positions"][0] < 0


@pytest.mark.parametrize("count", [0, 9])
def test_one_to_eight_sequences_at_once(engine: CudaEngine, count: int) -> None:
    cache, token = begin(engine, IDS)
    with pytest.raises(UsageError, match=f"{count} sequences at once: expected 1 to 8"):
        next(engine.generate_together([Running(cache, token, GREEDY, 1)] * count))


def test_a_longer_context_takes_more_splits(compiled: Compiled, tmp_path: Path) -> None:
    """Behind the border of a split there is another graph; a short conversation beside a long one gets its own tokens."""
    bundle = bundle_of("long", tmp_path)
    ids = RNG.integers(0, TINY.llm.vocab_size, SPLIT - 3).tolist()
    with open_fake(bundle, compiled, tmp_path) as engine:
        assert engine.max_context > SPLIT + 8
        alone = [take(engine, prompt, 9, capacity=engine.max_context) for prompt in (ids, IDS)]
        assert alone[0] == greedy(oracle_of(bundle), ids, 9, engine.max_context)
        sequences = []
        for prompt in (ids, IDS):
            cache, token = begin(engine, prompt, engine.max_context)
            sequences.append(Running(cache, token, GREEDY, 1))
        together = [tokens for tokens, _ in zip(engine.generate_together(sequences), range(8), strict=False)]
    assert [[first[0], *column] for first, column in zip(alone, zip(*together, strict=True), strict=True)] == alone


def test_a_pipeline_lets_the_engine_sample(engine: CudaEngine, tokenizer: Tokenizer, bundle: Bundle) -> None:
    assert isinstance(engine, Generating)
    image = RNG.integers(0, 255, (46, 46, 3), np.uint8)
    sampling = Sampling(max_new_tokens=10)
    replies = [
        Pipeline("tiny", bundle.config, tokenizer, each).generate("What is <image>?", [image], sampling)
        for each in (engine, oracle_of(bundle))
    ]
    assert replies[0].token_ids == replies[1].token_ids
    assert replies[0].timings.decode_steps == replies[1].timings.decode_steps > 5


def test_a_cancelled_answer_ends_between_tokens(engine: CudaEngine, tokenizer: Tokenizer, bundle: Bundle) -> None:
    pipeline = Pipeline("tiny", bundle.config, tokenizer, engine)
    turn, media = pipeline.ask("What is 1 plus 2?")
    reply = pipeline.stream([turn], media, Sampling(max_new_tokens=30))
    for _ in reply:
        if len(reply.token_ids) >= 4:
            reply.cancel()
    assert reply.finish_reason == "cancelled"
    assert pipeline.generate("What is 1 plus 2?", sampling=Sampling(max_new_tokens=4)).token_ids == reply.token_ids[:4]


def test_logits_that_are_not_finite_end_the_answer(compiled: Compiled, tmp_path: Path) -> None:
    tensors = stored(config("llama"))
    tensors["llm.lm_head.scales"][7] = np.inf
    bundle = handmade_bundle(config("llama"), tensors, tmp_path / "bundle")
    with open_fake(bundle, compiled, tmp_path) as engine:
        cache = engine.new_cache(20)
        engine.forward(engine.embed_tokens(IDS), cache)
        with pytest.raises(VilaEdgeError, match="logits are not finite"):
            next(engine.generate(3, cache, GREEDY, 1))
        engine.forward(engine.embed_tokens([1]), cache)  # it lives on


def test_a_gpu_that_fails_is_told(engine: CudaEngine, device: FakeDevice) -> None:
    cache, token = begin(engine, IDS)
    tokens = engine.generate(token, cache, GREEDY, 1)
    next(tokens)

    def fails(*launch: Any) -> None:
        raise BackendError("the GPU failed: an illegal memory access was encountered")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fake_cuda, "call", fails)
        with pytest.raises(BackendError, match="illegal memory access"):
            for _ in range(AHEAD + 1):
                next(tokens)
        for stream in device.streams.values():
            stream.queue.clear()


def test_a_gpu_that_is_silent_is_told(engine: CudaEngine) -> None:
    cache, token = begin(engine, IDS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fake_cuda, "call", lambda *launch: None)
        with pytest.raises(BackendError, match="gave no token"):
            next(engine.generate(token, cache, GREEDY, 1))
    assert take(engine, IDS, 4)


def test_no_memory_for_the_weights(bundle: Bundle, compiled: Compiled, packed: Path) -> None:
    device = FakeDevice(total=100_000)
    with pytest.raises(BackendError, match="the GPU has no room for"):
        open_fake(bundle, compiled, packed, device=device)
    assert not device.buffers and not device.pins and not device.modules


def test_no_memory_for_another_conversation(engine: CudaEngine, device: FakeDevice) -> None:
    kept = engine.new_cache(40)
    device.total = device.used + 1000
    with pytest.raises(BackendError, match="the GPU has no room for"):
        engine.new_cache(60)
    assert len(engine.forward(engine.embed_tokens(IDS), kept)) == 1  # the first one goes on
    del kept
    device.total = 1 << 30
    engine.new_cache(60)


def test_a_cache_takes_the_memory_that_another_left(engine: CudaEngine, device: FakeDevice) -> None:
    cache = engine.new_cache(50)
    used, allocated = device.used, device.calls["alloc"]
    del cache
    again = engine.new_cache(50)
    assert (device.used, device.calls["alloc"]) == (used, allocated)
    other = engine.new_cache(50)
    assert set(other.layers_at).isdisjoint(again.layers_at)


def test_weights_are_packed_once(bundle: Bundle, compiled: Compiled, tmp_path: Path) -> None:
    with open_fake(bundle, compiled, tmp_path) as engine:
        first = take(engine, IDS, 5)
        (folder,) = (tmp_path / "packed").iterdir()
        assert str(folder) in engine.backend and bundle.manifest.digest in folder.name
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    with open_fake(bundle, compiled, tmp_path) as engine:
        assert take(engine, IDS, 5) == first
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    path = folder / "layers.1.safetensors"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(BackendError, match=r"layers\.1\.safetensors: not a whole safetensors file") as caught:
        open_fake(bundle, compiled, tmp_path)
    assert f"rm -r {folder}" in caught.value.hint


def test_without_a_place_to_keep_them_weights_are_packed_each_time(
    bundle: Bundle, compiled: Compiled, tmp_path: Path
) -> None:
    (tmp_path / "packed").write_text("a file where the folder should be")
    with open_fake(bundle, compiled, tmp_path) as engine:
        assert "not kept for next time" in engine.backend
        assert len(take(engine, IDS, 3)) == 3


def test_damaged_weights_are_not_packed(bundle: Bundle, compiled: Compiled, tmp_path: Path) -> None:
    folder = shutil.copytree(bundle.path, tmp_path / "damaged")
    weights = next((folder / "weights").glob("*layer*"))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(VilaEdgeError, match=weights.name):
        open_fake(Bundle(folder, bundle.manifest), compiled, tmp_path)
    assert not (tmp_path / "packed").exists() or not list((tmp_path / "packed").iterdir())


@pytest.mark.parametrize(
    ("how", "message", "hint"),
    [
        ({"group_size": 32}, "has a group_size of 32: the cuda engine takes 128", "-g 128"),
        ({"head": "fp16"}, "lm_head is stored in floats: the cuda engine takes 8 or 4 bits", "--lm-head int8"),
    ],
)
def test_a_bundle_of_another_form_is_refused(
    how: dict[str, Any], message: str, hint: str, compiled: Compiled, tmp_path: Path
) -> None:
    with pytest.raises(BackendError, match=message) as caught:
        open_fake(bundle_of("llama", tmp_path, **how), compiled, tmp_path)
    assert hint in caught.value.hint


def test_a_bundle_in_floats_is_refused(compiled: Compiled, tmp_path: Path) -> None:
    cfg = config("llama")
    bundle = handmade_bundle(cfg, random_parameters(cfg), tmp_path / "bundle")
    with pytest.raises(BackendError, match="is stored in floats: the cuda engine takes 4 bits") as caught:
        open_fake(bundle, compiled, tmp_path)
    assert "--quant int4" in caught.value.hint


def test_sizes_that_the_kernels_do_not_have_are_refused(tiny_bundle: Path, compiled: Compiled, tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="cannot compute hidden_size 64: its products take multiples of 128"):
        open_fake(Bundle.open(tiny_bundle), compiled, tmp_path)


def test_lm_head_in_4_bits_is_the_same_numbers_in_8(compiled: Compiled, tmp_path: Path) -> None:
    bundle = bundle_of("llama", tmp_path, head="int4")
    with open_fake(bundle, compiled, tmp_path) as engine:
        assert take(engine, IDS, 8) == greedy(oracle_of(bundle), IDS, 8)


def test_a_bundle_without_scales_has_no_kv_cache_in_8_bits(compiled: Compiled, tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="no scales for a kv_cache in int8"):
        open_fake(bundle_of("llama", tmp_path), compiled, tmp_path, "int8")
