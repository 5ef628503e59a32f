"""Where the parts of a checkpoint lie: one folder (v1.0), three folders (VILA1.5, NVILA), or one file for all.

Whatever the layout, a part has a config, and its tensors go by the architecture's names.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vila_edge import fsio
from vila_edge.architecture import MM_PROJECTOR
from vila_edge.errors import CheckpointError, InputError
from vila_edge.export.awq_formats import Packing
from vila_edge.export.fields import Fields
from vila_edge.export.packed_layout import (
    QUANTIZATION_CONFIG,
    activation_scales,
    find_packed_file,
    packing_of_config,
    packing_of_file,
)
from vila_edge.export.torch_file import TorchFile
from vila_edge.tensorfile import TensorFile

PARTS = ("llm", "vision_tower", "mm_projector")
PULLED_FROM = "vila-edge-source.json"  # where `vila-edge pull` fetched a checkpoint; no part of it


@dataclass(frozen=True)
class StoredParameter:
    """A tensor on the disk: `name` in `file`."""

    file: TensorFile
    name: str


@dataclass(frozen=True)
class Files:
    """An opened layout."""

    root: Path
    single_folder: bool
    configs: dict[str, Fields]  # of the root ("") and of each part
    tokenizer: Path
    preprocessor: Path
    tensors: dict[str, StoredParameter]  # by the architecture's names, and what else is stored
    packing: Packing | None = None  # of the linears in 4 bits, if there are any
    warnings: tuple[str, ...] = ()  # of files that are not read

    @property
    def paths(self) -> list[Path]:
        """Every file that an export reads, for its digest."""
        folders = {self.root, self.tokenizer, self.preprocessor.parent, *(self.root / part for part in PARTS)}
        small = (p for folder in folders for pattern in ("*.json", "tokenizer.model") for p in folder.glob(pattern))
        small = (p for p in small if p.name != PULLED_FROM)
        return sorted({*small, *(stored.file.path for stored in self.tensors.values())})


def open_files(path: Path, vision_tower: Path | None = None) -> Files:
    """Find and open everything. `vision_tower`: the folder of the tower, if it is not where the config says.

    Raises CheckpointError that names what is missing.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such directory, expected a VILA checkpoint")
    if (path / "manifest.json").is_file() and not (path / "config.json").is_file():
        raise CheckpointError(f"{path} is a bundle already, expected a checkpoint")
    root = read_json(path / "config.json")
    if (path / "llm").is_dir():
        return _three_folders(path, root, vision_tower)
    if "mm_vision_tower" in root:
        return _single_folder(path, root, vision_tower)
    raise CheckpointError(
        f"{path}: no folder llm/, and config.json has no 'mm_vision_tower', so this is not a VILA checkpoint",
        f"expected config.json and the folders {', '.join(PARTS)} (VILA1.5, NVILA), or all in one folder (v1.0)",
    )


def read_json(path: Path) -> dict[str, Any]:
    """Raises CheckpointError if there is no JSON object."""
    if not path.is_file():
        raise CheckpointError(f"{path}: missing from the checkpoint")
    try:
        return fsio.read_json(path, follow_links=True)
    except InputError as error:
        raise CheckpointError(error.message) from None


def _three_folders(path: Path, root: dict[str, Any], vision_tower: Path | None) -> Files:
    folders = {part: path / part for part in PARTS} | ({"vision_tower": vision_tower} if vision_tower else {})
    for part, folder in folders.items():
        if not folder.is_dir():
            raise CheckpointError(f"{folder}: no such folder, expected the {part} of the checkpoint")
    configs = {"": Fields(root, str(path / "config.json"))}
    configs |= {part: _fields(folder / "config.json") for part, folder in folders.items()}
    source = configs["llm"] if QUANTIZATION_CONFIG in configs["llm"].data else configs[""]
    packed_file, packing, warnings = _packing((folders["llm"], path), source)
    tensors: dict[str, StoredParameter] = {}
    whole = list(_tensor_files(path)) if not any(_has_weights(folder) for folder in folders.values()) else []
    for stored in whole:  # a preview that was saved as one model names the parts itself
        tensors[_tower_name(stored.name) if stored.name.startswith("vision_tower.") else stored.name] = stored
    if not whole:
        for part, folder in folders.items():
            for stored in _tensor_files(folder, packed_file if part == "llm" else None):
                tensors[f"{part}.{stored.name}"] = stored
    configs["llm"].ignore(QUANTIZATION_CONFIG)
    preprocessor = folders["vision_tower"] / "preprocessor_config.json"
    return Files(path, False, configs, path / "llm", preprocessor, tensors, packing, warnings)


def _single_folder(path: Path, root: dict[str, Any], vision_tower: Path | None) -> Files:
    tower = vision_tower or _find_tower(path, root["mm_vision_tower"])
    if not tower.is_dir():
        raise CheckpointError(f"{tower}: no such folder, expected a vision tower")
    packed_file, packing, warnings = _packing((path,), Fields(root, str(path / "config.json")))
    tensors = {}
    for stored in _tensor_files(path, packed_file):
        if stored.name.startswith("model.mm_projector."):
            tensors[f"{MM_PROJECTOR}.{stored.name.removeprefix('model.mm_projector.')}"] = stored
        elif not stored.name.startswith("model.vision_tower."):  # the original reads the tower's own folder instead
            tensors[f"llm.{stored.name}"] = stored
    for stored in _tensor_files(tower):
        tensors[f"vision_tower.{stored.name}"] = stored
    llm = {key: value for key, value in root.items() if key not in _VILA_KEYS and not key.startswith(_VILA_PREFIXES)}
    tower_config = _fields(tower / "config.json")
    if tower_config.data.get("model_type") == "clip":  # a whole CLIP, of which the tower is one half
        nested = tower_config.data.get("vision_config")
        nested = nested if isinstance(nested, dict) else {}
        tower_config = Fields({"model_type": "clip_vision_model", **nested}, f"{tower / 'config.json'}: vision_config")
    configs = {
        "": Fields(root, str(path / "config.json")),
        "llm": Fields(llm | {"model_type": "llama"}, str(path / "config.json")),
        "mm_projector": Fields(
            {"mm_projector_type": root.get("mm_projector_type", "linear")}, str(path / "config.json")
        ),
        "vision_tower": tower_config,
    }
    return Files(path, True, configs, path, tower / "preprocessor_config.json", tensors, packing, warnings)


# Keys of a v1.0 config.json that are not the LLaMA's; the prefixes are of how it was trained, and of the other parts.
_VILA_PREFIXES = ("mm_", "freeze_", "tune_", "unfreeze_")
_VILA_KEYS = (
    "image_aspect_ratio",
    "image_grid_pinpoints",
    "model_type",
    "mm_projector_type",
    QUANTIZATION_CONFIG,
    "use_mm_proj",
    "vision_resolution",
)


def _find_tower(path: Path, name: object) -> Path:
    """The tower's folder: a path from the checkpoint, or a folder of that name in it or beside it."""
    if not isinstance(name, str) or not name:
        raise CheckpointError(f"{path / 'config.json'}: 'mm_vision_tower' is {name!r}, expected a path or a name")
    last = name.rstrip("/").rpartition("/")[2]
    here = path.resolve()
    candidates = [here / name, here / last, here.parent / last, here.parent / name, here / "vision_tower"]
    for candidate in candidates:
        if (candidate / "config.json").is_file() and candidate.resolve() != here:
            return candidate
    raise CheckpointError(
        f"{path / 'config.json'}: the vision tower {name!r} is not here; its weights are not part of this checkpoint",
        f"download it and put it beside the checkpoint as {here.parent / last}, or say --vision-tower DIR",
    )


def _tower_name(name: str) -> str:
    return "vision_tower." + name.removeprefix("vision_tower.").removeprefix("vision_tower.")


def _fields(path: Path) -> Fields:
    return Fields(read_json(path), str(path))


# Forms of weights, in order of preference: index, file alone, reader.
_FORMS: tuple[tuple[str, str, type[TensorFile]], ...] = (
    ("model.safetensors.index.json", "model.safetensors", TensorFile),
    ("pytorch_model.bin.index.json", "pytorch_model.bin", TorchFile),
)


def _has_weights(folder: Path) -> bool:
    return any((folder / name).is_file() for form in _FORMS for name in form[:2])


def _packing(folders: tuple[Path, ...], config: Fields) -> tuple[Path | None, Packing | None, tuple[str, ...]]:
    """The .pt to read in place of the LLM's own files, how its linears are packed, and warnings.

    folders: the LLM's and others in which the .pt may lie. config: the one that may have a quantization_config. The
    releases of llm-awq keep the index of weights that they do not have, so it counts only if one of its files is there.
    """
    warnings = activation_scales(folders)
    file, stated = find_packed_file(folders), config.data.get(QUANTIZATION_CONFIG)
    if file is not None and not _has_any_shard(folders[0]):
        return file, packing_of_file(file, stated, config.source), tuple(warnings)
    if file is not None:
        warnings.append(f"{file}: not read: {folders[0]} has other weights, and they are")
    return None, None if stated is None else packing_of_config(stated, config.source), tuple(warnings)


def _has_any_shard(folder: Path) -> bool:
    indices = [folder / index for index, _, _ in _FORMS if (folder / index).is_file()]
    names = [name for index in indices for name in _shards(index)] + [alone for _, alone, _ in _FORMS]
    return any((folder / name).is_file() for name in names)


def _tensor_files(folder: Path, instead: Path | None = None) -> Iterator[StoredParameter]:
    """Every tensor of a folder, or of the one .pt that is read `instead`."""
    if instead is not None:
        yield from _tensors_of(instead, TorchFile)
        return
    for index_name, alone, reader in _FORMS:
        if (folder / index_name).is_file():
            names = _shards(folder / index_name)
        elif (folder / alone).is_file():
            names = [alone]
        else:
            continue
        for name in names:
            path = folder / name
            if path.parent != folder or not path.is_file():
                raise CheckpointError(
                    f"{path}: missing from the checkpoint"
                    + (f", which {index_name} names" if (folder / index_name).is_file() else ""),
                    "download or copy the whole checkpoint again",
                )
            yield from _tensors_of(path, reader)
        return
    raise CheckpointError(f"{folder / 'model.safetensors'}: missing from the checkpoint")


def _tensors_of(path: Path, reader: type[TensorFile]) -> Iterator[StoredParameter]:
    try:
        file = reader(path)
    except InputError as error:
        raise CheckpointError(error.message, error.hint or "download or copy the file again") from None
    yield from (StoredParameter(file, tensor) for tensor in file.entries)


def _shards(index: Path) -> list[str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: no object 'weight_map'")
    return sorted(set(map(str, weight_map.values())))
