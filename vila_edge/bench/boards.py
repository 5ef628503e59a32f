"""What is known of boards, and what others have published for models like VILA on them. None of it was measured here."""

from __future__ import annotations

from dataclasses import dataclass

FLOPS_PER_CLOCK = 512  # dense, of a tensor core of Orin, float16 with sums in float32


@dataclass(frozen=True)
class Board:
    """A device's peaks. Clocks are those of its fastest power mode."""

    name: str
    bytes_per_s: float
    tensor_cores: int
    clock_hz: float
    source: str

    @property
    def flops_per_s(self) -> float:
        """Dense, float16."""
        return self.tensor_cores * FLOPS_PER_CLOCK * self.clock_hz


BOARDS = (
    Board("AGX Orin 64 GB", 204.8e9, 64, 1.3e9, "NVIDIA, Jetson AGX Orin Series data sheet"),
    Board("Orin NX 16 GB", 102.4e9, 32, 0.918e9, "NVIDIA, Jetson Orin NX Series data sheet"),
    Board("Orin Nano 8 GB", 68e9, 32, 0.625e9, "NVIDIA, Jetson Orin Nano Series data sheet"),
    Board("Orin Nano 8 GB Super", 102.4e9, 32, 1.02e9, "NVIDIA, Jetson Orin Nano Super Developer Kit data sheet"),
)


@dataclass(frozen=True)
class Published:
    """Tokens a second of a decode with a batch of 1, as its author gives them."""

    engine: str
    model: str
    board: str
    weights: str
    tokens_per_s: float
    source: str


_TINYCHAT = "mit-han-lab/llm-awq, tinychat/README.md (d6e797a)"
_VILA = "NVlabs/VILA, README.md (0085724)"
_NVILA = "NVlabs/VILA, README.md (b760c34)"
_EDGE_LLM = "TensorRT-Edge-LLM 0.10, performance-benchmarks.md"
_NANO = "hokwangchoi/jetson-orin-nano-benchmarks"
_GENAI = "NVIDIA-AI-IOT/jetson-ai-lab, src/data/benchmarks.json (0d6baca)"
_AGX, _NX, _SUPER = (
    "AGX Orin 64 GB",
    "Orin NX 16 GB",
    "Orin Nano 8 GB Super",
)  # sources do not always say which AGX Orin
PUBLISHED = (
    Published("TinyChat", "NVILA-2B", _AGX, "int4", 1e3 / 22.25, _TINYCHAT),
    Published("TinyChat", "NVILA-2B", _AGX, "float16", 1e3 / 24.22, _TINYCHAT),
    Published("TinyChat", "VILA1.5-3B", _AGX, "int4", 42.5, _VILA),
    Published("TinyChat", "VILA1.5-3B", _AGX, "float16", 25.4, _VILA),
    Published("TinyChat", "VILA1.5-8B", _AGX, "int4", 28.7, _VILA),
    Published("TinyChat", "VILA1.5-8B", _AGX, "float16", 10.2, _VILA),
    Published("TinyChat", "NVILA-8B", _AGX, "int4", 1e3 / 30.48, _TINYCHAT),
    Published("TinyChat", "NVILA-8B", _AGX, "int4", 28.1, _NVILA),
    Published("TinyChat", "NVILA-8B", _AGX, "float16", 11.6, _TINYCHAT),
    # Other models of about these sizes.
    Published("TensorRT Edge-LLM", "Qwen3-VL-2B", _AGX, "int4", 88.7, _EDGE_LLM),
    Published("TensorRT Edge-LLM", "Qwen3-VL-8B", _AGX, "int4", 30.6, _EDGE_LLM),
    Published("TensorRT Edge-LLM", "Qwen3-VL-2B", _NX, "int4", 52.6, _EDGE_LLM),
    Published("TensorRT Edge-LLM", "Qwen3-VL-8B", _NX, "int4", 17.4, _EDGE_LLM),
    Published("TensorRT Edge-LLM", "Cosmos-Reason2-2B", _SUPER, "int4", 59.9, _NANO),
    Published("vLLM", "Cosmos-Reason2-2B", _SUPER, "int4", 56.5, _NANO),
    Published("llama.cpp", "Cosmos-Reason2-2B", _SUPER, "Q4_K_M", 38.0, _NANO),
    Published("vLLM", "Qwen3-VL-2B", _AGX, "int4", 60.0, _GENAI),
)
