"""Text formats of conversations, for training and as chat templates of transformers."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass

Messages = list[dict[str, str]]  # {"role": one of ROLES, "content": ...}
ROLES = ("system", "user", "assistant")
FINE_TUNING = ("instructions", "mathinstruct")  # data sets of conversations
TOKEN = re.compile(r"(<\|\w+\|>)")  # a special token in a template's texts


@dataclass(frozen=True)
class Template:
    """The text around messages. Labels are on responses, from `lead` to `end`."""

    system: tuple[str, str]  # before and after a system message
    user: tuple[str, str]
    response: str  # before a response
    lead: str = ""  # start of a response: a space, for tokenizers whose words begin with one
    end: str | None = None  # token that ends a response; None: the tokenizer's end of text
    preamble: str = ""  # default system message

    def segments(self, messages: Messages) -> Iterator[tuple[list[str], bool]]:
        """Yield (segment, whether it is a response) of a conversation, up to the last response.

        A segment is a list of texts with the template's tokens in between: [text, token, text, ...]. Messages are text,
        even if they contain the spelling of a token.
        """
        if self.preamble and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.preamble}, *messages]
        prompt = [""]
        for message in messages:
            if message["role"] == "assistant":
                _extend(prompt, self.response)
                yield prompt, False
                yield [self.lead + message["content"]], True
                prompt = [""]
            else:
                before, after = getattr(self, message["role"])
                _extend(prompt, before)
                prompt[-1] += message["content"]
                _extend(prompt, after)

    def tokens(self) -> set[str]:
        """Return the special tokens that the template needs, except begin and end of text."""
        texts = (*self.system, *self.user, self.response, self.end or "")
        return {token for text in texts for token in TOKEN.findall(text)}

    def jinja(self, space: str = "") -> str:
        """Return the equivalent chat template of transformers.

        space: " " for tokenizers that add a space at the start of a text but not after a special token. transformers,
        unlike `segments`, parses the spelling of tokens in messages.
        """
        texts = {"preamble": self.preamble, "response": self.response, "lead": self.lead}
        sets = "".join(f"{{%- set {name} = {json.dumps(text)} -%}}" for name, text in texts.items())
        ends = {role: getattr(self, role) for role in ROLES[:2]}
        branches = "".join(
            f"{{%- elif message.role == {json.dumps(role)} -%}}"
            f"{{{{- {json.dumps(before)} + message.content + {json.dumps(after)} -}}}}"
            for role, (before, after) in ends.items()
        )
        end = "eos_token" if self.end is None else json.dumps(self.end)
        before, after = (json.dumps(text) for text in self.system)
        return (
            sets + f"{{{{- bos_token + {json.dumps(space)} -}}}}"
            "{%- if preamble and messages[0].role != 'system' -%}"
            f"{{{{- {before} + preamble + {after} -}}}}{{%- endif -%}}"
            "{%- for message in messages -%}"
            "{%- if message.role == 'assistant' -%}"
            f"{{{{- response + lead + message.content + {end} + {json.dumps(space)} -}}}}"
            + branches
            + "{%- endif -%}{%- endfor -%}"
            "{%- if add_generation_prompt -%}{{- response -}}{%- endif -%}"
        )


def _extend(parts: list[str], template_text: str) -> None:
    """Append a template's text to a segment; the last part of a segment is always text."""
    text, *rest = TOKEN.split(template_text)
    parts[-1] += text
    parts += rest


TEMPLATES = {
    "question": Template(system=("", "\n"), user=("Question: ", "\n"), response="Answer:", lead=" "),
    # Taori et al. 2023, github.com/tatsu-lab/stanford_alpaca; used with MathInstruct by MAmmoTH, arXiv 2309.05653.
    "alpaca": Template(
        system=("", "\n\n"),
        user=("### Instruction:\n", "\n\n"),
        response="### Response:",
        lead=" ",
        preamble="Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.",
    ),
    # Llama 3's, llama.com/docs/model-cards-and-prompt-formats/llama3_1.
    "llama3": Template(
        system=("<|start_header_id|>system<|end_header_id|>\n\n", "<|eot_id|>"),
        user=("<|start_header_id|>user<|end_header_id|>\n\n", "<|eot_id|>"),
        response="<|start_header_id|>assistant<|end_header_id|>\n\n",
        end="<|eot_id|>",
    ),
}
