"""The forms of a 4-bit product, and the chain of them that is timed. Standard library alone: a peer reads this too."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass

WIDTHS = (2560, 6912)  # of VILA1.5-3B's decoder: hidden and intermediate


@dataclass(frozen=True)
class Form:
    """How onnxruntime is given a weight."""

    bits: int = 4
    group_size: int = 128
    zero_points: bool = True
    accuracy_level: int = 4  # of MatMulNBits: 4 rounds activations to 8 bits, 1 does not
    dequantize: bool = False  # DequantizeLinear and MatMul of the standard, which it fuses when it loads them


FORMS = {
    "MatMulNBits, groups of 128, zero points": Form(),
    "MatMulNBits, groups of 128, symmetric": Form(zero_points=False),
    "MatMulNBits, groups of 64, zero points": Form(group_size=64),
    "MatMulNBits, groups of 32, zero points": Form(group_size=32),
    "MatMulNBits, groups of 256, zero points": Form(group_size=256),
    "MatMulNBits, groups of 128, zero points, activations in 32 bits": Form(accuracy_level=1),
    "DequantizeLinear, groups of 128, zero points": Form(dequantize=True),
}
OPENVINO = "OpenVINO, u4, groups of 128, zero points"


@dataclass(frozen=True)
class Chain:
    """`pairs` of products behind each other, run on so many `rows` of input, each `repetitions` times after one more."""

    pairs: int
    rows: tuple[int, int]
    threads: int
    repetitions: int

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Chain:
        fields = json.loads(text)
        return cls(fields["pairs"], tuple(fields["rows"]), fields["threads"], fields["repetitions"])


def shapes(chain: Chain) -> list[tuple[int, int]]:
    """(outputs, inputs) of every product."""
    narrow, wide = WIDTHS
    return [(wide, narrow), (narrow, wide)] * chain.pairs


def stored_bytes(name: str, chain: Chain) -> int:
    """Bytes of all weights as a bundle stores them: integers, 16-bit scales, packed zero points."""
    form = FORMS.get(name, Form())
    total = 0
    for rows, columns in shapes(chain):
        groups = columns // form.group_size
        zeros = rows * -(-groups * form.bits // 8) if form.zero_points else 0
        total += rows * columns * form.bits // 8 + 2 * rows * groups + zeros
    return total
