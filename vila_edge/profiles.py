"""The eras of VILA: what each does beyond the sizes, and which one a checkpoint is of (spec section 0)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from vila_edge.config import Profile, from_plain
from vila_edge.errors import ConfigError

PROFILE_KEY = "vila_edge_profile"  # in config.json: a checkpoint of our own training says what it is

VILA_1_5 = Profile(
    era="vila1.5",
    token_order="column_major",
    tokenization="per_chunk",
    template="vicuna_v1",
)

_TRANSFORMERS_OF_VILA_1_5 = ("4.36.", "4.37.")


def detect(config: Mapping[str, Any], llm_config: Mapping[str, Any], source: str) -> Profile:
    """The profile of a checkpoint in three folders, from its root config.json and that of its llm/.

    VILA1.5 and NVILA write the same keys and differ in silence, so a checkpoint that fits neither rule is
    refused. Raises ConfigError.
    """
    if PROFILE_KEY in config:
        return from_plain(Profile, config[PROFILE_KEY], f"{source}: {PROFILE_KEY}")
    version, family = str(config.get("transformers_version")), llm_config.get("model_type")
    if version.startswith(_TRANSFORMERS_OF_VILA_1_5) and family == "llama":
        return VILA_1_5
    raise ConfigError(
        f"{source}: cannot tell the era of this checkpoint (transformers_version {version!r}, llm of type {family!r}): "
        "only VILA1.5 with a LLaMA is understood by this version",
        f'if it is one, say so in {source}: "{PROFILE_KEY}": {dataclasses.asdict(VILA_1_5)}'.replace("'", '"'),
    )
