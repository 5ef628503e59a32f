"""Everything of a bundle that can be checked without running the model: the checks of `vila-edge verify`.

What is wrong is collected. A check reads only files that are what the manifest says, and leaves out what needs others.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from vila_edge import architecture, fsio
from vila_edge.bundle import (
    GRAPHS,
    KV_SCALES_FILE,
    MANIFEST,
    TOKENIZER,
    WEIGHTS,
    Manifest,
    file_problems,
    read_manifest,
)
from vila_edge.engine.onnx_file import check_external_data, external_data
from vila_edge.engine.onnxruntime_session import DIALECT, GRAPH_SIZE_LIMIT
from vila_edge.errors import BundleError, InputError
from vila_edge.inventory import Inventory, said_otherwise, take_inventory
from vila_edge.templates import get_template
from vila_edge.tensorfile import TensorEntry, TensorFile
from vila_edge.tokenizer import Tokenizer

CHECKS = ("manifest", "files", "parameters", "values", "graphs", "tokenizer", "size")
TOWER_GRAPHS = ("vision_tower", "mm_projector")
DECODER_GRAPHS = ("decoder", "decoder_float16", "decoder_int8")  # the last where the bundle has scales for it
PIECE = 1 << 22  # numbers that are looked at together

_USES = re.compile(
    rf"{re.escape(TOKENIZER)}|{WEIGHTS}/[^/]+\.safetensors|{GRAPHS}/[^/]+/({'|'.join(TOWER_GRAPHS + DECODER_GRAPHS)})\.onnx"
)
_EXPORT_AGAIN = "every byte is as it was exported, so a copy does not help: export the checkpoint again"


@dataclass(frozen=True)
class Problem:
    """What is wrong with a file, by its name in the bundle."""

    file: str
    message: str
    hint: str = _EXPORT_AGAIN


@dataclass(frozen=True)
class Check:
    """One check. `note` says what was looked at. `skipped`: why it could not be made, or not of everything."""

    name: str
    note: str = ""
    problems: tuple[Problem, ...] = ()
    skipped: str = ""

    @property
    def passed(self) -> bool:
        return not self.problems and not self.skipped


@dataclass
class Inspection:
    """All checks of one bundle."""

    path: Path
    digest: str = ""
    checks: list[Check] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)


def inspect(path: Path) -> Inspection:
    """Check a bundle. Nothing is changed, and nothing of it is run."""
    found = Inspection(path)
    try:
        manifest = read_manifest(path)
    except BundleError as error:
        found.checks.append(Check("manifest", "", (Problem(MANIFEST, error.message, error.hint),)))
        found.checks += (Check(name, skipped="it needs the manifest") for name in CHECKS[1:])
        return found
    found.digest = manifest.digest
    found.checks.append(Check("manifest", f"format {manifest.format_version}, sha256 {manifest.digest[:12]}"))
    inspector = Inspector(path, manifest)
    found.checks += (getattr(inspector, name)() for name in CHECKS[1:])
    return found


class Inspector:
    """The checks of a bundle whose manifest is sound; one method each, `files` first and `parameters` next."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path, self.manifest, self.cfg = path, manifest, manifest.config
        self.damaged: set[str] = set()  # files that are not what the manifest says
        self.weights: dict[str, TensorFile] = {}
        self.inventory = Inventory()

    def files(self) -> Check:
        """Names, kinds, sizes and digests, and whether each file has a use."""
        entries = self.manifest.files
        wrong = dict(file_problems(self.path, entries))
        self.damaged = set(wrong)
        problems = [Problem(name, error.message, error.hint) for name, error in wrong.items()]
        for name in entries.keys() - wrong.keys():
            if not _USES.fullmatch(name):
                problems.append(self._problem(name, "no part of a bundle reads such a file"))
        size = sum(entry.size for entry in entries.values())
        return Check("files", f"{len(entries)} files, {size / 1e6:,.1f} MB, each with its sha256", tuple(problems))

    def parameters(self) -> Check:
        """Every parameter of the architecture is stored once, in a known form, and nothing else is."""
        problems = []
        for name in self._sound(WEIGHTS):
            try:
                self.weights[name] = TensorFile(self.path / name)
            except InputError as error:
                problems.append(Problem(name, error.message))
        found = self.inventory = take_inventory(self.cfg, self.weights)
        problems += (self._problem(file, message) for file, message in found.problems)
        skipped = self._skipped(WEIGHTS)
        if not skipped:  # otherwise they may be in what is damaged
            problems += (self._problem("", f"{name}: no file of {WEIGHTS}/ has it") for name in found.missing)
        problems += (
            self._problem(MANIFEST, message) for message in said_otherwise(found, self.cfg, self.manifest.quantization)
        )
        forms = Counter(part.form for part in found.parts.values())
        note = f"{len(found.parts)} stored once: {', '.join(f'{n} {form}' for form, n in sorted(forms.items()))}"
        return Check("parameters", note, tuple(problems), skipped)

    def values(self) -> Check:
        """Scales and all other floats are finite. Every integer is in range, by its bits; what fills a byte is 0."""
        problems, floats = [], 0
        for name, file in self.weights.items():
            for tensor, entry in file.entries.items():
                if entry.dtype in ("F16", "F32"):
                    floats += 1
                    if not _finite(file, tensor):
                        problems.append(self._problem(name, f"{tensor} has values that are not finite"))
        for part in self.inventory.parts.values():
            zeros = part.name.removesuffix(".weight") + ".qzeros"
            half = zeros in part.tensors and part.shape[1] // part.group_size % 2
            if half and (self.weights[part.file].array(zeros)[:, -1] >> 4).any():
                problems.append(self._problem(part.file, f"{zeros} has zero points for groups that are not there"))
        return Check("values", f"{floats} tensors of floats are finite", tuple(problems), self._skipped(WEIGHTS))

    def graphs(self) -> Check:
        """All graphs of each dialect are there; their tensors are stored tensors, and every stored one is used."""
        names = [name for name in self.manifest.files if name.startswith(f"{GRAPHS}/")]
        dialects = sorted({DIALECT} | {name.split("/")[1] for name in names if name.count("/") == 2})
        problems: list[Problem] = []
        skipped, references = self._skipped(GRAPHS), 0
        decoders = DECODER_GRAPHS if KV_SCALES_FILE in self.manifest.files else DECODER_GRAPHS[:-1]
        for dialect in dialects:
            used: dict[str, set[tuple[str, int]]] = {}
            for graph in TOWER_GRAPHS + decoders:
                used[graph], found = self._graph(f"{GRAPHS}/{dialect}/{graph}.onnx")
                problems += found
            references += len(set().union(*used.values()))
            if all(used.values()):
                towers = set().union(*(used[graph] for graph in TOWER_GRAPHS))
                problems += (problem for name in decoders for problem in self._unused(dialect, towers | used[name]))
        note = f"{', '.join(dialects)}: {references} places in the weights, each a whole tensor"
        return Check("graphs", note, tuple(problems), skipped or self._skipped(WEIGHTS))

    def tokenizer(self) -> Check:
        """It loads, its ids have rows in the embedding table, a stop token can be chosen, the template is known."""
        if skipped := self._skipped(TOKENIZER):
            return Check("tokenizer", skipped=skipped)
        rows, profile = self.cfg.llm.vocab_size, self.cfg.profile
        source = str(self.path / TOKENIZER)
        try:
            if TOKENIZER not in self.manifest.files:
                raise InputError(f"{source}: missing from the manifest")
            tokenizer = Tokenizer(fsio.read_text(self.path / TOKENIZER), source, self.cfg.tokenizer)
            tokenizer.check_rows(rows)
            get_template(profile.template)
        except InputError as error:
            return Check("tokenizer", "", (Problem(TOKENIZER, error.message, error.hint or _EXPORT_AGAIN),))
        stops = {token: tokenizer.control_id(token) for token in profile.stop_tokens}
        known = [token for token, i in stops.items() if i is not None and i < rows]
        if not known:
            text = f"has none of the stop tokens {', '.join(stops)} below the {rows:,} rows of the table"
            return Check("tokenizer", "", (self._problem(TOKENIZER, text),))
        return Check("tokenizer", f"fits {rows:,} rows, template {profile.template}, stops at {' '.join(known)}")

    def size(self) -> Check:
        """What the manifest says that the parameters take, against what they take."""
        stated, least = self.manifest.quantization.get("parameter_bytes"), self.inventory.parameter_bytes
        problems: list[Problem] = []
        skipped = self._skipped(WEIGHTS)
        if type(stated) is not int or stated < 1:
            message = f"quantization.parameter_bytes is {stated!r}, expected a number of bytes"
            problems.append(self._problem(MANIFEST, message))
        elif not skipped and stated != least:
            message = f"quantization.parameter_bytes is {stated:,}, but the parameters take {least:,}"
            problems.append(self._problem(MANIFEST, message))
        total = sum(entry.size for entry in self.manifest.files.values()) + (self.path / MANIFEST).stat().st_size
        note = f"{total / 1e6:,.1f} MB, {total / max(least, 1):.3f} of the {least / 1e6:,.1f} MB of the parameters"
        return Check("size", "" if skipped else note, tuple(problems), skipped)

    def _graph(self, graph: str) -> tuple[set[tuple[str, int]], list[Problem]]:
        """(file, offset) of the tensors that a graph reads, and what is wrong with it."""
        path, used, problems = self.path / graph, set[tuple[str, int]](), list[Problem]()
        if graph in self.damaged:
            return used, problems
        if graph not in self.manifest.files:
            return used, [self._problem(graph, "missing from the manifest")]
        try:
            data = fsio.read_bytes(path, GRAPH_SIZE_LIMIT)
            if not self._skipped(WEIGHTS):
                check_external_data(data, self.path / WEIGHTS, path)
            tensors = {name: _by_offset(file) for name, file in self.weights.items()}
            places = {
                (f"{WEIGHTS}/{place.location}", place.offset, place.length) for place in external_data(data, path)
            }
            for file, begin, end in _joined(places, tensors):
                found = _whole_tensors(begin, end, tensors.get(file, {}))
                used.update((file, offset) for offset in found or [begin])
                if file not in self.damaged and not found:
                    problems.append(self._problem(graph, f"bytes {begin:,}..{end:,} of {file} are no tensor"))
        except (InputError, OSError) as error:
            problems.append(Problem(graph, getattr(error, "message", f"{path}: {error}")))
        if not used and not problems:
            problems.append(self._problem(graph, "reads no weights"))
        return used, problems

    def _unused(self, dialect: str, used: set[tuple[str, int]]) -> Iterator[Problem]:
        """Parameters that no graph of a dialect reads, but for the table that tokens are looked up in."""
        for part in self.inventory.parts.values():
            if part.name != f"{architecture.EMBED_TOKENS}.weight" or self.cfg.llm.tie_word_embeddings:
                for tensor, entry in part.tensors.items():
                    if (part.file, entry.offset) not in used:
                        yield self._problem(part.file, f"{tensor}: no graph of {dialect} reads it")

    def _problem(self, file: str, message: str) -> Problem:
        return Problem(file, f"{self.path / file}: {message}")

    def _sound(self, folder: str) -> list[str]:
        return [name for name in self.manifest.files if name.startswith(f"{folder}/") and name not in self.damaged]

    def _skipped(self, start: str) -> str:
        """Why a check of these files is not whole: some are damaged. "" if none is."""
        wrong = sorted(name for name in self.damaged & self.manifest.files.keys() if name.startswith(start))
        return f"without {', '.join(wrong)}" if wrong else ""


def _by_offset(file: TensorFile) -> dict[int, TensorEntry]:
    return {entry.offset: entry for entry in file.entries.values() if entry.length}


def _whole_tensors(begin: int, end: int, known: Mapping[int, TensorEntry]) -> list[int]:
    """Where those begin that take exactly these bytes, one or some behind each other; none if it is not so."""
    found = []
    while begin < end and begin in known:
        found.append(begin)
        begin += known[begin].length
    return found if begin == end else []


def _joined(
    places: Iterable[tuple[str, int, int]], tensors: Mapping[str, Mapping[int, TensorEntry]]
) -> list[tuple[str, int, int]]:
    """File, begin and end of each place that is read; slices of a tensor that lie behind each other are one."""
    found, cut = list[tuple[str, int, int]](), list[tuple[str, int, int]]()
    for file, begin, length in sorted(places):
        whole = _whole_tensors(begin, begin + length, tensors.get(file, {}))
        if not whole and cut and (cut[-1][0], cut[-1][2]) == (file, begin):
            cut[-1] = (file, cut[-1][1], begin + length)
        else:
            (found if whole else cut).append((file, begin, begin + length))
    return found + cut


def _finite(file: TensorFile, tensor: str) -> bool:
    """Whether a tensor of floats has neither infinities nor NaNs; some numbers are read at a time."""
    values = file.array(tensor).reshape(-1)
    return all(bool(np.isfinite(values[i : i + PIECE]).all()) for i in range(0, len(values), PIECE))
