"""Conversation templates: the exact text around what is said. One table, one definition of each.

A template is code that we ship. Templates found in a checkpoint are never rendered.
"""

from __future__ import annotations

from dataclasses import dataclass

from vila_edge.errors import ConfigError

_VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


@dataclass(frozen=True)
class Template:
    """Text that opens a conversation, and text before and after each turn.

    `stop` is the special token that ends an assistant's turn; it is inserted by id, never by text.
    """

    name: str
    opening: str
    before_user: str
    after_user: str
    before_answer: str  # what the model continues
    answer_lead: str  # what an answer given in the history starts with
    stop: str


TEMPLATES = {
    template.name: template
    for template in (
        Template("vicuna_v1", f"{_VICUNA_SYSTEM} ", "USER: ", " ", "ASSISTANT:", " ", "</s>"),
        Template("vicuna_v1_nosys", " ", "USER: ", " ", "ASSISTANT:", " ", "</s>"),
    )
}


def get_template(name: str) -> Template:
    """Raises ConfigError for a name that is not in the table."""
    if name not in TEMPLATES:
        raise ConfigError(f"unknown conversation template {name!r}", f"known templates: {', '.join(TEMPLATES)}")
    return TEMPLATES[name]
