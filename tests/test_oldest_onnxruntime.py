"""The oldest onnxruntime that is promised, in an environment of its own, runs what is promised to run there."""

from __future__ import annotations

import subprocess
import sys
import venv
from pathlib import Path

import numpy as np
import pytest

from tests.graphs import handmade_bundle, int4_tensors
from tests.tensorrt_graphs import GraphRunner
from tests.tiny import TINY, random_parameters
from vila_edge import bindings
from vila_edge.bindings import GraphBindings
from vila_edge.bundle import GRAPHS, WEIGHTS
from vila_edge.engine.onnxruntime_session import DIALECT, session
from vila_edge.engine.tensorrt_options import BuildOptions, graph_bindings

OLDEST = "1.23.2"  # the last for Python 3.10, which JetPack 6 has
SIZES = {"images": 2, "sequence": 5, "capacity": 12, "past": 7, "kept": 3}

# Runs a graph on the inputs of an .npz, and writes its outputs to another.
PROGRAM = """
import sys
import numpy as np
import onnxruntime
graph, weights, inputs, outputs = sys.argv[1:]
assert onnxruntime.__version__ == "1.23.2", onnxruntime.__version__
options = onnxruntime.SessionOptions()
options.add_session_config_entry("session.model_external_initializers_file_folder_path", weights)
loaded = onnxruntime.InferenceSession(open(graph, "rb").read(), options, providers=["CPUExecutionProvider"])
names = [output.name for output in loaded.get_outputs()]
np.savez(outputs, **dict(zip(names, loaded.run(names, dict(np.load(inputs))))))
"""


@pytest.fixture(scope="module")
def old_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    packages = [f"onnxruntime=={OLDEST}", f"numpy=={np.__version__}"]
    subprocess.run([python, "-m", "pip", "install", "-q", "--disable-pip-version-check", *packages], check=True)
    return python


def inputs_of(layout: GraphBindings) -> dict[str, np.ndarray]:
    """Noise; positions in sequence behind those that are past."""
    rng, past, new = np.random.default_rng(0), SIZES["past"], SIZES["sequence"]
    known = {
        bindings.LAST_POSITION: [past + new - 1],
        bindings.TOTAL_LENGTH: past + new,
        bindings.LOGITS_TO_KEEP: [0, 2, 4],
        bindings.POSITION_IDS: [range(past, past + new)],
    }
    return {
        b.name: np.asarray(known[b.name] if b.name in known else rng.standard_normal(b.sized(**SIZES)), b.dtype)
        for b in layout.inputs
    }


@pytest.mark.slow
@pytest.mark.parametrize("dialect", [DIALECT, "tensorrt, append"])
@pytest.mark.parametrize("component", ["vision_tower", "mm_projector", "decoder"])
def test_what_is_promised_runs_there_as_it_does_here(
    dialect: str, component: str, old_python: Path, tmp_path: Path
) -> None:
    tensors, _ = int4_tensors(random_parameters(TINY), 32)
    bundle = handmade_bundle(TINY, tensors, tmp_path)
    if dialect == DIALECT:
        graph, weights = bundle.file(f"{GRAPHS}/{DIALECT}/{component}.onnx"), bundle.path / WEIGHTS
        layout = getattr(bindings, component)(TINY)
    else:
        options = BuildOptions(64, 16, 2, "append")
        graph = GraphRunner(bundle, options, tmp_path / "tensorrt").graphs[component]
        weights, layout = graph.parent, graph_bindings(TINY, component, options)
    inputs = inputs_of(layout)
    np.savez(tmp_path / "inputs.npz", **inputs)  # type: ignore[arg-type]
    arguments = [graph, weights, tmp_path / "inputs.npz", tmp_path / "outputs.npz"]
    subprocess.run([old_python, "-c", PROGRAM, *map(str, arguments)], check=True)
    there = np.load(tmp_path / "outputs.npz")
    here = session(graph.read_bytes(), weights, graph, threads=1)
    names = [output.name for output in here.get_outputs()]
    tolerance = 1e-4 if dialect == DIALECT else 0.02  # float16 is added up in another order
    for name, want in zip(names, here.run(names, inputs), strict=True):
        np.testing.assert_allclose(there[name].astype(np.float32), want.astype(np.float32), atol=tolerance)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.10 has no newer onnxruntime")
def test_this_onnxruntime_is_a_newer_one() -> None:
    """Otherwise nothing was compared above."""
    import onnxruntime

    assert tuple(map(int, onnxruntime.__version__.split(".")[:2])) > (1, 23)
