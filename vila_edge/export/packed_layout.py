"""Where a checkpoint in 4 bits says how its linears are packed: a `quantization_config`, or the name of a .pt file."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vila_edge.errors import CheckpointError
from vila_edge.export.awq_formats import Packing
from vila_edge.export.fields import Fields

QUANTIZATION_CONFIG = "quantization_config"

_DEFAULT_GROUP_SIZE = 128  # llm-awq's, where the file's name says none
_USE_FLOATS = "give the checkpoint of 16 bits from which it was made; export quantises it"


def packing_of_config(config: object, source: str) -> Packing:
    """The packing that a `quantization_config` describes. Raises ConfigError for any but AutoAWQ's of 4 bits."""
    fields = _awq_fields(config, source)
    version = fields.optional("version", "gemm")
    if not isinstance(version, str) or version.lower() != "gemm":
        raise _not_read(fields, "version", "'gemm'")
    fields.ignore("modules_to_not_convert")  # seen by the tensors: each linear has a weight or a qweight
    fields.ignore("backend", "do_fuse", "exllama_config", "fuse_max_seq_len", "modules_to_fuse")  # of a run
    packing = Packing("autoawq-gemm", fields.integer("group_size"), fields.flag("zero_point", True))
    fields.done()
    return packing


def packing_of_file(path: Path, config: object, source: str) -> Packing:
    """The packing of a .pt of llm-awq; `config` is the `quantization_config` beside it, or None.

    Raises CheckpointError for another number of bits, or if name and config contradict each other.
    """
    bits, groups = re.search(r"-w(\d+)-", path.name), re.search(r"-g(\d+)-", path.name)
    if bits and int(bits[1]) != 4:
        raise CheckpointError(f"{path}: named as one of {int(bits[1])} bits, expected 4 (-w4-)", _USE_FLOATS)
    group_size = int(groups[1]) if groups else _DEFAULT_GROUP_SIZE
    if config is not None:
        fields = _awq_fields(config, source)
        stated = fields.integer("group_size", group_size)
        if groups and stated != group_size:
            raise CheckpointError(
                f"{fields.source}: 'group_size' is {stated}, but {path.name} is named as one of {group_size}",
                "correct the one that is wrong",
            )
        group_size = stated
    if group_size < 1:
        raise CheckpointError(f"{path}: named as one of groups of {group_size}, expected a positive number")
    return Packing("llm-awq-v2", group_size)


def find_packed_file(folders: tuple[Path, ...]) -> Path | None:
    """The .pt of llm-awq in the first of the folders that has one. Raises CheckpointError if it has several."""
    for folder in folders:
        found = sorted(path for path in folder.glob("*.pt") if path.is_file() and _is_packed(path.name))
        if len(found) > 1:
            raise CheckpointError(
                f"{folder}: several files of 4 bits: {', '.join(path.name for path in found)}", "keep the one to export"
            )
        if found:
            return found[0]
    return None


def activation_scales(folders: tuple[Path, ...]) -> list[str]:
    """A warning for each file of activation scales, which only an 8-bit vision tower needs."""
    found = (path for folder in folders for path in sorted(folder.glob("*-smooth-scale.pt")))
    return [f"{path}: not read: it is for a vision tower of 8 bits, which stays in 16 bits here" for path in found]


def _is_packed(name: str) -> bool:
    return not name.endswith("-smooth-scale.pt") and ("awq" in name.lower() or bool(re.search(r"-w\d+-g\d+", name)))


def _awq_fields(config: object, source: str) -> Fields:
    """The config, of which method and bits are read."""
    source = f"{source}: {QUANTIZATION_CONFIG}"
    if not isinstance(config, Mapping):
        raise CheckpointError(f"{source} is {config!r}, expected an object")
    fields = Fields(dict[str, Any](config), source)
    if fields.optional("quant_method", None) != "awq":
        raise _not_read(fields, "quant_method", "'awq'")
    if fields.optional("bits", None) != 4:
        raise _not_read(fields, "bits", "4")
    return fields


def _not_read(fields: Fields, key: str, expected: str) -> CheckpointError:
    return CheckpointError(
        fields.error(key, f"{expected}: of quantised weights, AutoAWQ's GEMM layout and llm-awq's v2 are read").message,
        _USE_FLOATS,
    )
