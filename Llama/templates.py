"""How conversations are written as text, in training and as a chat template of transformers."""

import json
from collections.abc import Iterator
from dataclasses import dataclass

Messages = list[dict[str, str]]  # {"role": one of ROLES, "content": ...}
ROLES = ("system", "user", "assistant")
FINE_TUNING = ("instructions", "mathinstruct")  # the data sets of conversations; the others are of text


@dataclass(frozen=True)
class Template:
    """The text around messages. Trained on are a response, from `lead` on, and `end`."""

    system: tuple[str, str]  # before and after a system message
    user: tuple[str, str]
    response: str  # before a response
    lead: str = ""  # where a response begins: a space, for tokenizers whose words begin with one
    end: str | None = None  # the token that ends a response; None is the tokenizer's end of text
    preamble: str = ""  # the system message of a conversation that has none

    def segments(self, messages: Messages) -> Iterator[tuple[str, bool]]:
        """Cut a conversation into texts, and tell whether each is a response; what follows the last is left out."""
        if self.preamble and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.preamble}, *messages]
        prompt = ""
        for message in messages:
            if message["role"] == "assistant":
                yield prompt + self.response, False
                yield self.lead + message["content"], True
                prompt = ""
            else:
                before, after = getattr(self, message["role"])
                prompt += before + message["content"] + after

    def jinja(self) -> str:
        """Say the same as a chat template of transformers."""
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
            sets + "{{- bos_token -}}"
            "{%- if preamble and messages[0].role != 'system' -%}"
            f"{{{{- {before} + preamble + {after} -}}}}{{%- endif -%}}"
            "{%- for message in messages -%}"
            "{%- if message.role == 'assistant' -%}"
            f"{{{{- response + lead + message.content + {end} -}}}}" + branches + "{%- endif -%}{%- endfor -%}"
            "{%- if add_generation_prompt -%}{{- response -}}{%- endif -%}"
        )


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
