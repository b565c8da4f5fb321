"""How conversations are written as text, in training and as a chat template of transformers."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass

Messages = list[dict[str, str]]  # {"role": one of ROLES, "content": ...}
ROLES = ("system", "user", "assistant")
FINE_TUNING = ("instructions", "mathinstruct")  # the data sets of conversations; the others are of text
TOKEN = re.compile(r"(<\|\w+\|>)")  # a special token in a template's texts


@dataclass(frozen=True)
class Template:
    """The text around messages. Trained on are a response, from `lead` on, and `end`."""

    system: tuple[str, str]  # before and after a system message
    user: tuple[str, str]
    response: str  # before a response
    lead: str = ""  # where a response begins: a space, for tokenizers whose words begin with one
    end: str | None = None  # the token that ends a response; None is the tokenizer's end of text
    preamble: str = ""  # the system message of a conversation that has none

    def segments(self, messages: Messages) -> Iterator[tuple[list[str], bool]]:
        """Cut a conversation into segments, and tell whether each is a response; what follows the last is left out.

        A segment is a list of texts and, between them, the template's tokens: [text, token, text, ...]. What messages
        contain is text, also where it is spelled like a token.
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
        """Return the special tokens that the template needs, but for begin and end of text."""
        texts = (*self.system, *self.user, self.response, self.end or "")
        return {token for text in texts for token in TOKEN.findall(text)}

    def jinja(self, space: str = "") -> str:
        """Return the chat template of transformers that writes the same text.

        space: for a tokenizer that begins a text with a space of its own, and no text after a special token; it is
        written out there. transformers knows no text in messages that only looks like a token.
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
    """Append a template's text to a segment, whose last part is a text before and after."""
    text, *rest = TOKEN.split(template_text)
    parts[-1] += text
    parts += rest


TEMPLATES = {
    "question": Template(system=("", "\n"), user=("Question: ", "\n"), response="Answer:", lead=" "),
    # Taori et al. 2023, github.com/tatsu-lab/stanford_alpaca; MAmmoTH, arXiv 2309.05653, trains on MathInstruct so.
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
