"""Parrots: engines that generate the text that a test chooses, so that every form of a tool call occurs. Also tools."""

import copy
from functools import cache

import torch
from transformers import AutoTokenizer

from flex_nano_vllm import Inference
from flex_nano_vllm.models import EMBEDDED_MODELS
from flex_nano_vllm.server_tools import CALL_FORMS

HERMES, MISTRAL, LLAMA = CALL_FORMS


@cache
def gemma_tokenizer():
    return AutoTokenizer.from_pretrained(EMBEDDED_MODELS["tiny-gemma2"])


def parrot_of(engine):
    """Turn an engine into a parrot and return it.

    The engine no longer runs its model. It generates, token by token, the text after the last "SAY:" of its prompt, and
    then EOS. Where a grammar forbids the next token, EOS and the tokens that close a JSON value are the most likely.
    """
    tokenizer, num_logits = copy.deepcopy(engine.tokenizer), engine.input_processor.num_logits
    eos_id, *closing = tokenizer.convert_tokens_to_ids(["<eos>", '"', "}", "]"])
    likely = torch.zeros(num_logits)
    likely[closing], likely[eos_id] = 1.0, 2.0

    @cache
    def line(prompt):
        _, _, text = tokenizer.decode(prompt).rpartition("SAY:")
        for end in ("<end_of_turn>", "\n</tool_response>"):
            text = text.partition(end)[0]
        return tokenizer(text, add_special_tokens=False).input_ids

    def forward(chunks):
        engine.runner._copy_pages()
        rows = []
        for chunk in chunks:
            sequence, row = chunk.sequence, likely.clone()
            said = line(tuple(sequence.token_ids[: sequence.num_prompt_tokens]))
            place = sequence.num_tokens - sequence.num_prompt_tokens
            row[said[place] if place < len(said) else eos_id] = 9.0
            rows += [row] * chunk.num_logits
        return torch.stack(rows)

    engine.runner.forward = forward
    return engine


def new_parrot():
    sizes = dict(max_batch_size=4, max_seq_length=2048, compile=False)
    return parrot_of(Inference.from_pretrained("tiny-gemma2", **sizes))


def object_of(**properties):
    return dict(type="object", properties=properties, required=list(properties), additionalProperties=False)


def tool(name="f", description="d", **properties):
    return {
        "type": "function",
        "function": {"name": name, "description": description, "parameters": object_of(**properties)},
    }


def call_text(form, name, arguments):
    return f'{form.begin}{{"name": "{name}", "{form.arguments}": {arguments}}}{form.end}'


def written(form, *calls):
    """Return an output that contains only calls."""
    return form.opening + form.between.join(call_text(form, *call) for call in calls) + form.closing


def say(text):
    return [{"role": "user", "content": f"SAY:{text}"}]


f = tool("f", "d", a={"enum": [1, 22]}, b={"enum": ["c", "dd"]})
g = tool("g", "d", x={"const": 'é\n"}'})
CALL_F, CALL_G = ("f", '{"a": 22, "b": "dd"}'), ("g", '{"x": "é\\n\\"}"}')
