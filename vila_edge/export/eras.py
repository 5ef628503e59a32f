"""Which era a checkpoint is of, and which template it was trained with: as far as its files tell.

What they do not tell is chosen, and said.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vila_edge.config import Profile, TokenOrder
from vila_edge.errors import ConfigError, UsageError
from vila_edge.export.encoders import image_end
from vila_edge.export.layouts import Files, read_json
from vila_edge.plain import from_plain
from vila_edge.profiles import ERAS, NVILA, PROFILE_KEY, VILA_1_0, VILA_1_5
from vila_edge.templates import TEMPLATES, get_template
from vila_edge.tokenizer import Tokenizer

# The template that NVILA's tokenizer_config.json carries. It is compared, never rendered.
_NVILA_CHAT_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\nYou are a helpful assistant<|im_end|>\\n' }}"
    "{% endif %}{% for message in messages if message['content'] is not none %}{{ '<|im_start|>' + message['role'] + "
    "'\\n' + message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
_TRANSFORMERS_OF_VILA_1_5 = ("4.36.", "4.37.")


@dataclass(frozen=True)
class Choices:
    """What a user says of a checkpoint, against what its files tell."""

    era: str | None = None
    token_order: str | None = None
    template: str | None = None
    vision_tower: Path | None = None

    def __post_init__(self) -> None:
        """Raises UsageError for a name that is not known."""
        for option, value, known in (
            ("--era", self.era, tuple(ERAS)),
            ("--token-order", self.token_order, ("row_major", "column_major")),
            ("--template", self.template, tuple(TEMPLATES)),
        ):
            if value is not None and value not in known:
                raise UsageError(f"{option} {value}: expected one of {', '.join(known)}")


def detect(
    files: Files, tokenizer: Tokenizer, eos_tokens: Collection[str], choices: Choices
) -> tuple[Profile, list[str]]:
    """The profile of a checkpoint, and warnings about what had to be guessed. Raises ConfigError."""
    root, warnings = files.configs[""], list[str]()
    if PROFILE_KEY in root.data and choices.era is None:
        profile = from_plain(Profile, root.data[PROFILE_KEY], f"{root.source}: {PROFILE_KEY}")
        get_template(profile.template)
    else:
        profile = ERAS[choices.era] if choices.era else _era(files, warnings)
        if choices.template is None:
            template = _template(profile, files, tokenizer, eos_tokens, warnings)
            profile = dataclasses.replace(profile, template=template)
        if profile.video_as == "video":
            profile = dataclasses.replace(profile, image_end=image_end(root))
    if choices.template is not None:
        profile = dataclasses.replace(profile, template=choices.template)
    if choices.token_order is not None:
        order: TokenOrder = "row_major" if choices.token_order == "row_major" else "column_major"
        profile = dataclasses.replace(profile, token_order=order)
    spoken = get_template(profile.template)
    lacking = [token for token in spoken.controls if tokenizer.control_id(token) is None]
    if lacking:
        warnings.append(
            f"the tokenizer has no token {lacking[0]!r}, which the template {spoken.name} uses: it is read as text, "
            "as the original does; if that is not meant, choose another with --template"
        )
    stops = (*spoken.stop, *sorted(eos_tokens))
    known = tuple(dict.fromkeys(token for token in stops if tokenizer.control_id(token) is not None))
    if not known:
        raise ConfigError(
            f"{files.tokenizer}: the tokenizer has none of the stop tokens {', '.join(stops) or '(none)'}"
        )
    return dataclasses.replace(profile, stop_tokens=known), warnings


def _era(files: Files, warnings: list[str]) -> Profile:
    if files.single_folder:
        return VILA_1_0
    stored = (fields.data.get("transformers_version") for fields in files.configs.values())
    versions = {str(version) for version in stored if version is not None}
    family = files.configs["llm"].data.get("model_type")
    old = any(version.startswith(_TRANSFORMERS_OF_VILA_1_5) for version in versions)
    profile = NVILA if family == "qwen2" else VILA_1_5
    if old != (profile is VILA_1_5):
        other = VILA_1_5 if profile is NVILA else NVILA
        warnings.append(
            f"{files.root}: the era is not certain (a {family} saved by transformers "
            f"{', '.join(sorted(versions)) or 'of no stated version'}); "
            f"taken for {profile.era}, with {profile.token_order} tokens. If it was trained as {other.era}, say "
            f"--era {other.era}; if only the order differs, --token-order {other.token_order}"
        )
    return profile


def _template(
    profile: Profile, files: Files, tokenizer: Tokenizer, eos_tokens: Collection[str], warnings: list[str]
) -> str:
    """The template by the control tokens that the tokenizer has."""
    named = files.configs[""].data.get("chat_template")
    if isinstance(named, str) and named in TEMPLATES and named != "llama_3":
        return named
    if profile is NVILA:
        path = files.tokenizer / "tokenizer_config.json"
        carried = _tokenizer_config(files).get("chat_template")
        if carried is not None and carried != _NVILA_CHAT_TEMPLATE:
            warnings.append(
                f"{path}: carries a chat_template that is not NVILA's; {profile.template} is used, choose with --template"
            )
        return profile.template
    if tokenizer.control_id("<|start_header_id|>") is not None:
        fixed = (
            "<|eot_id|>" in eos_tokens
            or re.search(r"(^|[-_.])fix($|[-_.])", files.root.resolve().name.lower()) is not None
        )
        chosen, other = ("llama_3", "llama_3_may_2024") if fixed else ("llama_3_may_2024", "llama_3")
        warnings.append(
            f"{files.root}: Llama-3 VILA1.5 was trained with two templates, and the files do not say with which; "
            f"{chosen} is used. For {'the release of May 2024' if fixed else 'a -Fix release'} say --template {other}"
        )
        return chosen
    if tokenizer.control_id("<|im_start|>") is not None:
        return "hermes-2"
    return profile.template


def _tokenizer_config(files: Files) -> dict[str, Any]:
    path = files.tokenizer / "tokenizer_config.json"
    return read_json(path) if path.is_file() else {}
