"""Recipes: every shipped one fits the model it is for, and a wrong one is refused by file and field."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from tests.families import FAMILIES, Family, config_of, shrink, write_checkpoint
from vila_edge.bundle import Bundle
from vila_edge.errors import InputError, ParityError, UsageError
from vila_edge.export.checkpoint import Checkpoint
from vila_edge.export.gate import Gate
from vila_edge.export.hub import parse_id
from vila_edge.export.recipe import Recipe, read_recipe, recipes
from vila_edge.export.run import export_bundle

ROOT = Path(__file__).parents[1]
README = (ROOT / "export" / "README.md").read_text()
NAMES = sorted(recipes())
# Recipes of models whose config files are taken to be another's.
LIKE = {"Llama-3-VILA1.5-8B-Fix": "Llama-3-VILA1.5-8B", "NVILA-15B": "NVILA-Lite-15B"}
AT_MOST = ("mean_kl", "max_activation")


def quiet(phase: str, done: int, total: int) -> None:
    pass


def family_of(name: str) -> Family:
    return FAMILIES[LIKE.get(name, name)]


def written(folder: Path, text: str) -> Path:
    path = folder / "mine.toml"
    path.write_text(text)
    return path


def test_every_family_has_a_recipe() -> None:
    assert set(NAMES) == {*FAMILIES, *LIKE}


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_is_read_by_name_and_by_path(name: str) -> None:
    recipe = read_recipe(name)
    assert recipe == read_recipe(name.upper()) == read_recipe(str(recipes()[name]))
    assert (recipe.name, recipe.quantization, recipe.calibration) == (name, "int4", None)
    assert "CC-BY-NC-SA-4.0" in recipe.license_note and "\n" not in recipe.license_note
    assert "  " not in recipe.license_note


@pytest.mark.parametrize("name", NAMES)
def test_its_first_line_is_a_command_that_gets_the_model(name: str) -> None:
    first = recipes()[name].read_text().splitlines()[0]
    found = re.fullmatch(rf"# {re.escape(name)}: vila-edge pull (\S+)", first)
    assert found and parse_id(found[1])[0].partition("/")[2] == name


@pytest.mark.parametrize("name", NAMES)
def test_its_groups_fit_the_released_sizes(name: str, tmp_path: Path) -> None:
    """Also where the comment names them."""
    cfg, recipe = config_of(family_of(name), tmp_path), read_recipe(name)
    recipe.check(cfg)
    said = re.search(r"# divides ([\d,]+) and ([\d,]+),", recipes()[name].read_text())
    assert said
    assert [int(n.replace(",", "")) for n in said.groups()] == [cfg.llm.hidden_size, cfg.llm.intermediate_size]


@pytest.mark.parametrize("name", NAMES)
def test_with_it_nothing_of_the_model_is_left_open(name: str, tmp_path: Path) -> None:
    checkpoint = Checkpoint(write_checkpoint(shrink(family_of(name)), tmp_path), read_recipe(name).choices)
    assert checkpoint.warnings == []
    profile = checkpoint.config.profile
    assert profile.era == family_of(name).era
    assert profile.token_order == ("column_major" if profile.era == "vila1.5" else "row_major")
    templates = {"Llama-3-VILA1.5-8B": "llama_3_may_2024", "Llama-3-VILA1.5-8B-Fix": "llama_3"}
    assert profile.template == templates.get(name, "qwen2" if profile.era == "nvila" else "vicuna_v1")


@pytest.mark.parametrize("name", NAMES)
def test_its_limits_are_stricter_and_said_to_be_untried(name: str) -> None:
    gate, default = dataclasses.asdict(read_recipe(name).gate), dataclasses.asdict(Gate())
    for limit, value in gate.items():
        assert value <= default[limit] if limit in AT_MOST else value >= default[limit]
    assert gate != default
    assert "have not been run on the released weights" in recipes()[name].read_text()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("group_sise = 32", "unknown field 'group_sise'"),
        ('group_size = "32"', r"group_size: expected int, found '32'"),
        ("symmetric = 1", "symmetric: expected bool, found 1"),
        ('quantization = "int3"', r"quantization: expected Literal\['int4', 'fp16', 'fp32'\], found 'int3'"),
        ("calibration = 3", "calibration: expected Path, found 3"),
        ("gate = 0.9", "'gate' is 0.9, expected a table"),
        ("[gate]\nblocks = 0.9", "gate: unknown field 'blocks'"),
        ("[gate]\nblock = true", "gate.block: expected float, found True"),
        ("[gate]\nmean_kl = nan", "gate.mean_kl is nan, expected a number"),
        ('[choices]\nera = "vila2"', "choices.era vila2: expected one of v1.0, vila1.5, nvila"),
        ('[choices]\ntoken_order = "rows"', "choices.token_order rows: expected one of row_major, column_major"),
        ('[choices]\ntemplate = "vicuna"', "choices.template vicuna: expected one of "),
        ('[choices]\ncolour = "red"', "choices: unknown field 'colour'"),
        ("group_size 32", "not TOML: .*line 1"),
        ('name = "a"\nname = "b"', "not TOML: "),
    ],
)
def test_what_is_wrong_is_named(text: str, message: str, tmp_path: Path) -> None:
    path = written(tmp_path, text)
    with pytest.raises(InputError, match=message) as caught:
        read_recipe(str(path))
    assert str(path) in caught.value.message and "\n" not in caught.value.message


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_bytes(b'name = "\xff"')
    with pytest.raises(InputError, match="not UTF-8"):
        read_recipe(str(path))


def test_an_unknown_name_gets_the_list() -> None:
    with pytest.raises(UsageError, match="no recipe 'vila2'") as caught:
        read_recipe("vila2")
    assert all(name.lower() in caught.value.hint for name in NAMES)


def test_paths_are_seen_from_the_recipes_folder(tmp_path: Path) -> None:
    recipe = read_recipe(
        str(written(tmp_path, 'calibration = "samples"\n[choices]\nvision_tower = "../clip"\n[gate]\nblock = 1'))
    )
    assert recipe.calibration == (tmp_path / "samples").resolve()
    assert recipe.choices.vision_tower == (tmp_path.parent / "clip").resolve()
    assert recipe.gate.block == 1.0


def test_an_empty_recipe_is_the_default(tmp_path: Path) -> None:
    assert read_recipe(str(written(tmp_path, ""))) == Recipe()


def test_a_limit_that_is_broken_loses_nothing(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """The README says so: with another limit the same export goes on."""
    text = 'group_size = 32\nname = "mine"\nlicense_note = "ours"\n[gate]\nblock_int4 = '
    strict, loose = (read_recipe(str(written(tmp_path, f"{text}{limit}"))) for limit in (0.99999, 0.9))
    with pytest.raises(ParityError, match=r"llm.*layers\.0: mean cosine .* expected 0\.99999"):
        export_bundle(tiny_checkpoint, tmp_path / "bundle", strict, quiet)
    said: list[str] = []
    export_bundle(tiny_checkpoint, tmp_path / "bundle", loose, quiet, warn=said.append)
    assert any(message.startswith("going on with what is finished") for message in said)
    manifest = Bundle.open(tmp_path / "bundle").manifest
    assert (manifest.name, manifest.license) == ("mine", "ours")


def test_the_wheel_has_the_recipes(tmp_path: Path) -> None:
    """Where `read_recipe` looks in an installed package."""
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    environment = {**os.environ, "VILA_EDGE_WHEEL_WITHOUT_CODE": "1"}  # of kernels, which take a minute to build
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, env=environment)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        for name, path in recipes().items():
            assert archive.read(f"vila_edge/export/recipes/{name}.toml") == path.read_bytes()


def test_what_reads_toml_on_python_3_10_is_installed_with_export() -> None:
    assert "'tomli>=2; python_version < \"3.11\"'" in (ROOT / "pyproject.toml").read_text()
    assert "\ntomli==" in (ROOT / "constraints.txt").read_text()


def test_the_readme_lists_every_recipe_and_script() -> None:
    for name in NAMES:
        assert f"| `{name}`" in README or f", `{name}`" in README
    for script in (ROOT / "export").glob("*.py"):
        assert script.name == "common.py" or f"| `{script.name} " in README


def test_the_readme_has_every_field_with_its_default() -> None:
    rows = dict(re.findall(r"^\| `([\w.]+)` \| (.*?) \|", README.split("### Write one")[1], re.MULTILINE))
    assert list(rows) == fields()
    plain = dataclasses.asdict(Recipe())
    for name, said in rows.items():
        section, _, field = name.rpartition(".")
        value: Any = plain[section][field] if section else plain[field]
        if value is None or name == "name":  # told in words
            assert "`" not in said
        else:
            assert said == f"`{toml(value)}`"


def fields() -> list[str]:
    """Of a recipe, its sections last."""
    plain = dataclasses.asdict(Recipe())
    nested = [f"{section}.{name}" for section in ("choices", "gate") for name in plain[section]]
    return [name for name in plain if name not in ("choices", "gate")] + nested


def toml(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if isinstance(value, str) else str(value)


def test_the_example_of_the_readme_is_a_recipe(tmp_path: Path) -> None:
    (example,) = re.findall(r"```toml\n(.*?)```", README, re.DOTALL)
    recipe = read_recipe(str(written(tmp_path, example)))
    assert (recipe.name, recipe.choices.era, recipe.gate.top1_agreement) == ("my-vila", "vila1.5", 0.9)
