"""Conversation templates: the exact text around what is said. One table, one definition of each.

A template is code that we ship. Templates found in a checkpoint are never rendered.
"""

from __future__ import annotations

from dataclasses import dataclass

from vila_edge.errors import ConfigError


@dataclass(frozen=True)
class Template:
    """Text around each turn (spec section 3.1). `controls` in it are control tokens, in a user's text they are text.

    `before_answer` ends a prompt; an answer in the history is followed by `after_answer`, the last one of a whole
    conversation by `after_last_answer`. `stop` are the tokens that end an answer.
    """

    name: str
    opening: str
    before_user: str
    after_user: str
    before_answer: str
    answer_lead: str
    after_answer: str
    after_last_answer: str
    controls: tuple[str, ...]
    stop: tuple[str, ...]


_VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
_LLAMA_3_SYSTEM = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)


def _vicuna(name: str, system: str) -> Template:
    return Template(
        name, f"{system} ", "USER: ", " ", "ASSISTANT:", " ", "</s>", "</s>", controls=("</s>",), stop=("</s>",)
    )


def _llama_3(name: str, separator: str, role: str, last: str) -> Template:
    def head(of: str) -> str:
        return f"<|start_header_id|>{of}<|end_header_id|>\n\n"

    return Template(
        name,
        f"<|begin_of_text|>{head('system')}{_LLAMA_3_SYSTEM}{separator}",
        head("user"),
        separator,
        head(role),
        "",
        separator,
        last,
        controls=("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        stop=tuple(dict.fromkeys((separator, "<|end_of_text|>"))),
    )


_IM = ("<|im_start|>", "<|im_end|>")

TEMPLATES = {
    template.name: template
    for template in (
        _vicuna("vicuna_v1", _VICUNA_SYSTEM),
        _vicuna("vicuna_v1_nosys", ""),
        # Llama-3-VILA1.5-8B of May 2024 was trained with a slip in it; the -Fix release and all later code have not.
        _llama_3("llama_3", "<|eot_id|>", "assistant", "<|end_of_text|>"),
        _llama_3("llama_3_may_2024", "<|end_of_text|>", "system", "<|end_of_text|>"),
        Template(
            "hermes-2",
            "<|im_start|>system\nAnswer the questions.<|im_end|>",
            "<|im_start|>user\n",
            "<|im_end|>",
            "<|im_start|>assistant\n",
            "",
            "<|im_end|>",
            "<|im_end|>",
            controls=_IM,
            stop=("<|im_end|>",),
        ),
        Template(
            "qwen2",
            "<|im_start|>system\nYou are a helpful assistant<|im_end|>\n",
            "<|im_start|>user\n",
            "<|im_end|>\n",
            "<|im_start|>assistant\n",
            "",
            "<|im_end|>\n",
            "<|im_end|>\n",
            controls=_IM,
            stop=("<|im_end|>",),
        ),
        Template(
            "mistral", "<s>", "[INST] ", " [/INST]", "", "", "</s>", "</s>", controls=("<s>", "</s>"), stop=("</s>",)
        ),
        Template("plain", "", "", "", "", "", "\n", "\n", controls=(), stop=()),
    )
}

# The original's name -> the generations of a template that go by it.
GENERATIONS = {"llama_3": ("llama_3", "llama_3_may_2024")}


def get_template(name: str) -> Template:
    """Raises ConfigError for a name that is not in the table."""
    if name not in TEMPLATES:
        raise ConfigError(f"unknown conversation template {name!r}", f"known templates: {', '.join(TEMPLATES)}")
    return TEMPLATES[name]
