"""The oldest onnxruntime that is promised, in an environment of its own, runs what is promised to run there."""

from __future__ import annotations

import subprocess
import sys
import venv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.families import FAMILIES, shrink, write_checkpoint
from tests.graphs import handmade_bundle, int4_tensors
from tests.tensorrt_graphs import GraphRunner
from tests.tiny import TINY, random_parameters
from vila_edge import bindings
from vila_edge.bundle import GRAPHS, WEIGHTS
from vila_edge.engine.graph_parts import split_decoder
from vila_edge.engine.onnxruntime_session import DIALECT, session
from vila_edge.engine.tensorrt_options import COMPONENTS, BuildOptions
from vila_edge.export.graph_ops import GraphOps
from vila_edge.export.recipe import Recipe
from vila_edge.export.run import export_bundle

OLDEST = "1.23.2"  # the last for Python 3.10, which JetPack 6 has
SIZES = {"images": 2, "sequence": 5, "capacity": 12, "past": 7, "kept": 3}
TYPES = {"tensor(float)": "float32", "tensor(float16)": "float16", "tensor(int32)": "int32", "tensor(int64)": "int64"}

EXPORTS = {
    "llama, zero points": ("VILA1.5-3b", Recipe(method="rtn", group_size=16, lm_head="fp16")),
    "qwen2, symmetric, int8 head and tower": (
        "NVILA-Lite-15B",
        Recipe(method="rtn", group_size=16, symmetric=True, lm_head="int8", vision="int8"),
    ),
}

# Runs the graphs of a folder on the inputs that lie beside them, and writes their outputs there.
PROGRAM = """
import sys
from pathlib import Path
import numpy as np
import onnxruntime
weights, folder = sys.argv[1:]
assert onnxruntime.__version__ == "1.23.2", onnxruntime.__version__
for graph in Path(folder).glob("*.graph"):
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", weights)
    loaded = onnxruntime.InferenceSession(graph.read_bytes(), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in loaded.get_outputs()]
    outputs = loaded.run(names, dict(np.load(graph.with_suffix(".inputs.npz"))))
    np.savez(graph.with_suffix(".outputs.npz"), **dict(zip(names, outputs)))
"""


@pytest.fixture(scope="module")
def old_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    packages = [f"onnxruntime=={OLDEST}", f"numpy=={np.__version__}"]
    subprocess.run([python, "-m", "pip", "install", "-q", "--disable-pip-version-check", *packages], check=True)
    return python


def inputs_of(loaded: Any) -> dict[str, np.ndarray]:
    """Noise; positions in sequence behind those that are past."""
    rng, past, new = np.random.default_rng(0), SIZES["past"], SIZES["sequence"]
    known = {
        bindings.LAST_POSITION: [past + new - 1],
        bindings.TOTAL_LENGTH: past + new,
        bindings.LOGITS_TO_KEEP: [0, 2, 4],
        bindings.POSITION_IDS: [range(past, past + new)],
    }
    found = {}
    for node in loaded.get_inputs():
        shape = [SIZES[size] if isinstance(size, str) else size for size in node.shape]
        found[node.name] = np.asarray(known.get(node.name, rng.standard_normal(shape)), TYPES[node.type])
    return found


def compare(graphs: Mapping[str, bytes], weights: Path, python: Path, folder: Path) -> None:
    """Each graph there and here, on the same inputs."""
    folder.mkdir()
    here = {}
    for name, graph in graphs.items():
        loaded = session(graph, weights, Path(name), threads=1)
        inputs = inputs_of(loaded)
        here[name] = dict(zip([o.name for o in loaded.get_outputs()], loaded.run(None, inputs), strict=True))
        (folder / f"{name}.graph").write_bytes(graph)
        np.savez(folder / f"{name}.inputs.npz", **inputs)  # type: ignore[arg-type]
    subprocess.run([python, "-c", PROGRAM, str(weights), str(folder)], check=True)
    for name, outputs in here.items():
        there = np.load(folder / f"{name}.outputs.npz")
        for output, value in outputs.items():
            want = value.astype(np.float32)
            np.testing.assert_allclose(
                there[output].astype(np.float32), want, rtol=0, atol=0.02 * want.std(), err_msg=f"{name}, {output}"
            )


@pytest.mark.slow
@pytest.mark.parametrize("component", COMPONENTS)
def test_the_form_append_runs_there_as_it_does_here(component: str, old_python: Path, tmp_path: Path) -> None:
    """What TensorRT 10.3 takes is made of the same operators."""
    bundle = handmade_bundle(TINY, int4_tensors(random_parameters(TINY), 32)[0], tmp_path / "bundle")
    graph = GraphRunner(bundle, BuildOptions(64, 16, 2, "append"), tmp_path / "tensorrt").graphs[component]
    compare({component: graph.read_bytes()}, graph.parent, old_python, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("limit", [GraphOps.max_initializer, 2000])
@pytest.mark.parametrize("kind", EXPORTS)
def test_an_export_runs_there_as_it_does_here(
    kind: str, limit: int, old_python: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All its graphs, the decoder also in parts, and with weights that are cut."""
    family, recipe = EXPORTS[kind]
    monkeypatch.setattr(GraphOps, "max_initializer", limit)
    checkpoint = write_checkpoint(shrink(FAMILIES[family]), tmp_path)
    bundle = export_bundle(checkpoint, tmp_path / "bundle", recipe, lambda phase, done, total: None)
    names = ("vision_tower", "mm_projector", "decoder", "decoder_float16")
    graphs = {name: bundle.file(f"{GRAPHS}/{DIALECT}/{name}.onnx").read_bytes() for name in names}
    parts = split_decoder(graphs["decoder"], bundle.config.llm.num_hidden_layers, 2, bundle.path)
    assert len(parts) == 2
    graphs |= {f"part {number} of decoder": part for number, part in enumerate(parts)}
    compare(graphs, bundle.path / WEIGHTS, old_python, tmp_path / "run")


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.10 has no newer onnxruntime")
def test_this_onnxruntime_is_a_newer_one() -> None:
    """Otherwise nothing was compared above."""
    import onnxruntime

    assert tuple(map(int, onnxruntime.__version__.split(".")[:2])) > (1, 23)
