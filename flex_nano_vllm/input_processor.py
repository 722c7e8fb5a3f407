"""Validates requests, and turns prompts and parameters into sequences. Independent of pages and queues.

An invalid request raises ValueError with the numbers and the remedy, before any resource is allocated.
"""

import itertools
import json
import logging
import re
import threading
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from typing import Any

import numpy as np
import torch
from jinja2.exceptions import TemplateError
from transformers import GenerationConfig, PreTrainedTokenizerBase

from flex_nano_vllm.detokenizer import Detokenizer, decode, special_token_names
from flex_nano_vllm.geometry import Geometry, cdiv
from flex_nano_vllm.grammar import Grammar, GrammarCompiler, string_limit
from flex_nano_vllm.memory import refusal
from flex_nano_vllm.models import ModelSpec
from flex_nano_vllm.outputs import RequestMetrics
from flex_nano_vllm.sampling_params import MAX_SEED, InvalidRequestError, SamplingParams, is_int, not_applied, shortened
from flex_nano_vllm.sequence import Sequence

logger = logging.getLogger(__name__)

Prompt = str | SequenceOf[int] | dict


ROLES = ("system", "user", "assistant", "tool")
# A number between these characters replaces a control token of a message while the template is rendered. The first
# character itself is replaced in the same way, so that a message cannot forge such a placeholder.
_OPEN, _CLOSE = "\ue000", "\ue001"


def chat_token_ids(
    tokenizer: PreTrainedTokenizerBase | None, messages: list[dict], tools: list[dict] | None = None
) -> list[int]:
    """Return the tokens of a conversation, up to the point where the model answers.

    A message cannot end its turn or open another turn: a control token in its content is tokenized as plain characters.
    A template is a program that comes with the tokenizer. transformers runs it in a sandbox, and it receives only the
    messages and tools of a request.

    Args:
        messages: `{"role": ..., "content": ...}`, the content a string or a list of `{"type": "text", "text": ...}`. An
            assistant message may have `tool_calls`. A tool message may have the `tool_call_id` of the call it answers.
        tools: in OpenAI's form, `{"type": "function", "function": {"name": ..., "parameters": {...}}}`.
    Raises:
        ValueError: messages have another form, the template does not support the given tools, there is no tokenizer or
            no template, or the template raises an error.
    """
    if tokenizer is None:
        raise ValueError("a chat needs a tokenizer, but the engine has none")
    if not tokenizer.chat_template:
        raise ValueError("the tokenizer has no chat template: use completions, or a chat model")
    if not isinstance(messages, list | tuple) or not messages:
        got = f"an empty {type(messages).__name__}" if messages in ([], ()) else f"a {type(messages).__name__}"
        raise ValueError(f"messages must be a non-empty list of dicts with role and content, not {got}")
    if tools and "tools" not in template_of(tokenizer):
        raise ValueError("tools: the model's chat template does not support them, so the model would not see them")
    control_tokens = sorted({_OPEN, *special_token_names(tokenizer)}, key=len, reverse=True)
    pattern = re.compile("|".join(map(re.escape, control_tokens)))
    plain_texts: list[str] = []

    def defused(match: re.Match) -> str:
        plain_texts.append(match[0])
        return f"{_OPEN}{len(plain_texts) - 1}{_CLOSE}"

    try:
        conversation = [_message(message, index) for index, message in enumerate(messages)]
        given = _with_texts((conversation, tools or None), lambda text: pattern.sub(defused, text))
        json.dumps(tools, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("messages or tools are nested too deeply") from None
    except TypeError as error:
        raise ValueError(f"tools must be a list of JSON objects: {error}") from error
    except UnicodeEncodeError as error:
        raise ValueError(f"tools are not valid Unicode: {error}") from None
    try:
        text = tokenizer.apply_chat_template(given[0], tools=given[1], tokenize=False, add_generation_prompt=True)
    except (TemplateError, ArithmeticError, LookupError, TypeError) as error:
        raise ValueError(f"the chat template raises an error for the messages: {error}") from error
    parts = re.split(f"{_OPEN}([0-9]+){_CLOSE}", text)
    # One call for all parts, because a call of the tokenizer has more overhead than work.
    written = tokenizer(parts[::2], add_special_tokens=False).input_ids
    token_ids = list(written[0])
    if len(parts) > 1:
        texts = [plain_texts[int(number)] for number in parts[1::2]]
        ids_of_texts = tokenizer(texts, add_special_tokens=False, split_special_tokens=True).input_ids
        for ids_of_text, ids_written in zip(ids_of_texts, written[1:]):
            token_ids += ids_of_text + ids_written
    return token_ids


def template_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the chat template for conversations with tools; "" if there is none."""
    templates = tokenizer.chat_template
    if isinstance(templates, dict):  # a tokenizer may have several
        return templates.get("tool_use") or templates.get("default") or ""
    return templates or ""


def _with_texts(value: Any, change: Callable[[str], str]) -> Any:
    """Return a nested structure with `change` applied to all of its strings, including dict keys."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list | tuple):
        return [_with_texts(item, change) for item in value]
    if isinstance(value, dict):
        return {change(str(key)): _with_texts(item, change) for key, item in value.items()}
    return value


def _message(message: dict, index: int) -> dict:
    """Check a message and return it in the form that templates expect."""
    name = f"message {index}"
    if not isinstance(message, dict) or message.get("role") not in ROLES:
        raise ValueError(f"{name} must be a dict with content and one of the roles {', '.join(ROLES)}")
    role, content = message["role"], message.get("content")
    calls = message.get("tool_calls") or [] if role == "assistant" else []
    if content is None and calls:
        content = ""
    if isinstance(content, list | tuple):
        for part in content:
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            if kind != "text":
                raise ValueError(f"{name}: only content parts of type text are supported, got {shortened(kind)}")
            if not isinstance(part.get("text"), str):
                raise ValueError(f"{name}: a content part of type text has no text, which must be a string")
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise ValueError(f"{name}: content must be a string or a list of text parts, got {type(content).__name__}")
    result = {"role": role, "content": content}
    if calls:
        result["tool_calls"] = [_call(call, f"{name}: tool call {i}") for i, call in enumerate(calls)]
    if role == "tool":
        result |= {key: message[key] for key in ("tool_call_id", "name") if isinstance(message.get(key), str)}
    try:
        json.dumps(result, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} is not valid Unicode: {error}") from None
    return result


def _call(call: dict, name: str) -> dict:
    """Check a tool call and return it with its arguments parsed, because templates write the JSON themselves."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ValueError(f"{name} must be a dict with a function that has a name")
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError:
            raise ValueError(f"{name}: arguments must be a string that contains a JSON object") from None
    if not isinstance(arguments, dict):
        raise ValueError(f"{name}: arguments must be a JSON object")
    function = {"name": function["name"], "arguments": arguments}
    return {"id": str(call.get("id", "")), "type": "function", "function": function}


class InputProcessor:
    """Turns requests into sequences and assigns request ids. Any thread may call it: a lock serializes tokenization."""

    def __init__(
        self,
        spec: ModelSpec,
        tokenizer: PreTrainedTokenizerBase | None,
        geometry: Geometry,
        queue_key: Callable[[Sequence], tuple[float, ...]],
    ):
        self.warns_of_defaults = True  # until the first warning
        self.tokenizer, self.geometry, self.queue_key = tokenizer, geometry, queue_key
        self.num_embeddings, self.num_logits = spec.num_embeddings, spec.num_logits
        # A tokenizer may have more tokens than the model, and a config may name an EOS token that does not exist.
        eos_token_ids = spec.eos_token_ids | {getattr(tokenizer, "eos_token_id", None)}
        self.eos_token_ids = eos_token_ids.intersection(range(self.num_logits))
        self._request_ids = itertools.count()
        self._grammars: GrammarCompiler | None = None
        # A tokenizer may raise an error if two threads call it at once. The grammar compiler does not need the lock.
        self.lock = threading.Lock()

    def requests(
        self,
        prompts: Prompt | SequenceOf[Prompt],
        sampling_params: SamplingParams | SequenceOf[SamplingParams] | None,
        cache_salt: str | None,
    ) -> list[list[Sequence]]:
        """Return the samples of each prompt. Raises ValueError if any of the requests is invalid."""
        is_list = isinstance(prompts, list | tuple)
        is_one = isinstance(prompts, str | dict) or (is_list and prompts and is_int(prompts[0]))
        prompts = [prompts] if is_one else prompts
        if not isinstance(prompts, list | tuple) or not prompts:
            kind = type(prompts).__name__
            got = f"an empty {kind}" if isinstance(prompts, list | tuple) else f"an object of type {kind}"
            raise ValueError(
                f"prompts must be a text, a list of token ids, or a non-empty list of texts or id lists, not {got}"
            )
        if sampling_params is None:
            sampling_params = SamplingParams()
        if isinstance(sampling_params, SamplingParams):
            sampling_params = [sampling_params] * len(prompts)
        if not isinstance(sampling_params, list | tuple) or any(params is None for params in sampling_params):
            raise ValueError(
                f"sampling_params must be SamplingParams or a list of them, got {shortened(sampling_params)}"
            )
        if len(sampling_params) != len(prompts):
            raise ValueError(f"got {len(prompts)} prompts but {len(sampling_params)} sampling_params")
        return [
            self.request(prompt, params, cache_salt, f"prompt {i}")
            for i, (prompt, params) in enumerate(zip(prompts, sampling_params))
        ]

    def request(
        self,
        prompt: Prompt,
        params: SamplingParams | None,
        cache_salt: str | None = None,
        name: str = "prompt",
        follow: bool = False,
    ) -> list[Sequence]:
        """Return the samples of one request.

        Args:
            name: name of the prompt in error messages.
            follow: detokenize the output token by token, so that its text can be streamed.
        """
        if cache_salt is not None and not (isinstance(cache_salt, str) and cache_salt):
            raise InvalidRequestError(
                f"cache_salt must be None or a non-empty string, got {shortened(cache_salt)}", "cache_salt"
            )
        params = SamplingParams() if params is None else params
        if not isinstance(params, SamplingParams):
            raise ValueError(f"{name}: sampling_params must be SamplingParams, got {shortened(params)}")
        if isinstance(prompt, dict):
            prompt = _of_dict(prompt, name)
        with self.lock:
            token_ids = self.token_ids(prompt, name)
            reason = refusal(self.geometry, len(token_ids))
            if reason is not None:
                raise InvalidRequestError(f"{name} {reason}", "prompt", "context_length_exceeded")
            eos_token_ids = frozenset() if params.ignore_eos else self.eos_token_ids
            self._check_texts(params, follow, name)
            stop_string_ids = self._stop_string_ids(params)
            self._check_ids(params, eos_token_ids.union(params.stop_token_ids or (), stop_string_ids), name)
            allowed = self._allowed(params)
            grammar = self._grammar(params, name)
            self._check_both(allowed, grammar, name)
            request_id = next(self._request_ids)
        room = self.geometry.max_request_tokens - len(token_ids)
        seed = _draw_seed(params)
        group: list[Sequence] = []
        metrics = RequestMetrics()
        for index in range(params.n):
            sequence = Sequence(
                request_id=request_id,
                prompt=prompt if isinstance(prompt, str) else None,
                token_ids=list(token_ids),
                num_prompt_tokens=len(token_ids),
                params=params,
                seed=(seed + index) % (MAX_SEED + 1),
                eos_token_ids=eos_token_ids,
                max_total_tokens=len(token_ids) + (room if params.max_tokens is None else min(room, params.max_tokens)),
                stop_string_ids=stop_string_ids,
                cache_salt=cache_salt,
                allowed=allowed,
                grammar=None if grammar is None else grammar.follow(),
                metrics=metrics,
                group=group,
            )
            if self.tokenizer is not None and (follow or params.stops):
                sequence.text = Detokenizer(
                    self.tokenizer,
                    token_ids,
                    sequence.hidden_token_ids,
                    params.skip_special_tokens,
                    params.stops,
                    params.include_stop_str_in_output,
                    params.min_tokens,
                    has_own_start=grammar is not None,
                )
        key = self.queue_key(group[0])
        for sequence in group:
            sequence.queue_key = key
        return group

    def warn_of_defaults(self, generation_config: GenerationConfig, params: SamplingParams) -> None:
        """Log once which settings in `generation_config` apply to `model.generate` but not to a request."""
        missing = not_applied(generation_config, params) if self.warns_of_defaults else {}
        if missing:
            self.warns_of_defaults = False
            stated = ", ".join(f"{name}={value!r}" for name, value in missing.items())
            logger.warning(
                "the model's generation_config states %s: model.generate applies these settings, but this request does "
                "not (get_default_sampling_params() returns those that are supported)",
                stated[:400],
            )

    def tokenize(self, text: str) -> list[int]:
        """Return the token ids of a text prompt."""
        with self.lock:
            return self.token_ids(text, "prompt")

    def chat_prompt(self, messages: list[dict], tools: list[dict] | None = None) -> list[int]:
        """Return the token ids of a conversation, see `chat_token_ids`."""
        with self.lock:  # for example because split_special_tokens changes the tokenizer's state
            try:
                return chat_token_ids(self.tokenizer, messages, tools)
            except ValueError as error:
                raise InvalidRequestError(
                    str(error), "tools" if str(error).startswith("tools") else "messages"
                ) from error

    def detokenize(self, token_ids: list[int]) -> str:
        """Return the text of tokens, control tokens included."""
        if not all(token_id < self.num_embeddings for token_id in token_ids):
            raise InvalidRequestError(f"the model's token ids are 0 to {self.num_embeddings - 1}", "tokens")
        return decode(self.tokenizer, token_ids, skip_special_tokens=False)

    def token_ids(self, prompt: str | SequenceOf[int], name: str) -> list[int]:
        """Return the token ids of a prompt. Raises InvalidRequestError if the model does not have one of them."""
        if isinstance(prompt, str | list | tuple) and not prompt:
            raise InvalidRequestError(f"{name} is empty", "prompt")
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise InvalidRequestError(
                    f"{name} is a text, but the engine has no tokenizer: pass token ids", "prompt"
                )
            try:
                prompt.encode()
            except UnicodeEncodeError as error:
                raise InvalidRequestError(f"{name} is not valid Unicode: {error}", "prompt") from None
            # A prompt from a chat template already begins with the BOS.
            has_bos = bool(self.tokenizer.bos_token) and prompt.startswith(self.tokenizer.bos_token)
            prompt = self.tokenizer(prompt, add_special_tokens=not has_bos).input_ids
        if not isinstance(prompt, list | tuple):
            raise InvalidRequestError(
                f"{name} must be a text or a list of token ids, got {type(prompt).__name__}", "prompt"
            )
        for token_id in prompt:
            if not is_int(token_id) or not 0 <= token_id < self.num_embeddings:
                valid = f"the model's token ids are 0 to {self.num_embeddings - 1}"
                raise InvalidRequestError(f"{name} holds {shortened(token_id)}, but {valid}", "prompt")
        if not prompt:
            raise InvalidRequestError(f"{name} tokenizes to an empty list", "prompt")
        return [int(token_id) for token_id in prompt]

    def _check_ids(self, params: SamplingParams, stop_token_ids: frozenset[int], name: str) -> None:
        """Check token ids and numbers in the parameters against the model's tokens.

        `allowed_token_ids` must contain a token that can be generated under `min_tokens`.
        """
        for parameter in ("stop_token_ids", "allowed_token_ids", "logit_bias"):
            for token_id in getattr(params, parameter) or ():
                if token_id >= self.num_logits:
                    valid = f"the model's token ids are 0 to {self.num_logits - 1}"
                    raise InvalidRequestError(f"{name}: {parameter} holds {token_id}, but {valid}", parameter)
        allowed = params.allowed_token_ids
        if allowed is not None and params.min_tokens and stop_token_ids.issuperset(allowed):
            message = f"{name}: allowed_token_ids holds stop tokens only, but min_tokens={params.min_tokens}"
            raise InvalidRequestError(message, "allowed_token_ids")
        for parameter in ("logprobs", "prompt_logprobs"):
            if (getattr(params, parameter) or 0) > self.num_logits:
                message = f"{name}: {parameter} is more than the {self.num_logits} tokens of the model"
                raise InvalidRequestError(message, parameter)

    def _stop_string_ids(self, params: SamplingParams) -> frozenset[int]:
        """Return the special tokens that are a stop string. A text without special tokens never contains them."""
        names = set(special_token_names(self.tokenizer)) if params.stops else ()
        ids = {self.tokenizer.convert_tokens_to_ids(stop) for stop in params.stops if stop in names}
        return frozenset(ids).intersection(range(self.num_logits))

    def _check_texts(self, params: SamplingParams, follow: bool, name: str) -> None:
        if self.tokenizer is None and params.stops:
            message = f"{name}: stop is a string, but the engine has no tokenizer: use stop_token_ids"
            raise InvalidRequestError(message, "stop")
        if self.tokenizer is not None and (follow or params.stops) and not self.tokenizer.is_fast:
            kind = type(self.tokenizer).__name__
            raise ValueError(f"{name}: stop strings and streams need a fast tokenizer, not a {kind}")

    def _allowed(self, params: SamplingParams) -> np.ndarray | None:
        """Return `allowed_token_ids` as bits, in the format of `sampler.Draw`."""
        if params.allowed_token_ids is None:
            return None
        bits = np.zeros(32 * cdiv(self.num_logits, 32), dtype=bool)
        bits[list(params.allowed_token_ids)] = True
        return np.packbits(bits, bitorder="little").view(np.int32)

    def _check_both(self, allowed: np.ndarray | None, grammar: Grammar | None, name: str) -> None:
        """Check that `structured_outputs` and `allowed_token_ids` have a first token in common."""
        if allowed is not None and grammar is not None and not (grammar.follow().allowed([]) & allowed).any():
            message = f"{name}: no token of allowed_token_ids can begin a text that fits structured_outputs"
            raise InvalidRequestError(message, "allowed_token_ids")

    def check_grammar(self, grammar: str) -> None:
        """Check that a grammar compiles. Raises ValueError if it does not."""
        with self.lock:
            self._grammar_compiler().compile("grammar", grammar)

    def _grammar_compiler(self) -> GrammarCompiler:
        if self._grammars is None:
            self._grammars = GrammarCompiler(self.tokenizer, self.num_logits, self.eos_token_ids)
        return self._grammars

    def _grammar(self, params: SamplingParams, name: str) -> Grammar | None:
        if params.structured_outputs is None:
            return None
        if self.tokenizer is None:
            message = f"{name}: structured_outputs constrain text, but the engine has no tokenizer"
            raise InvalidRequestError(message, "structured_outputs")
        try:
            limit = string_limit(self.geometry.max_request_tokens)
            return self._grammar_compiler().compile(**params.structured_outputs.arguments, max_string_len=limit)
        except (ValueError, ImportError) as error:
            raise InvalidRequestError(f"{name}: structured_outputs: {error}", "structured_outputs") from error


def check_streamed(params: SamplingParams | None) -> None:
    """Check the parameters of a stream. Raises ValueError for `prompt_logprobs`, which deltas do not contain."""
    if isinstance(params, SamplingParams) and params.prompt_logprobs is not None:
        raise ValueError("prompt_logprobs are not supported in a stream: use generate")


def _of_dict(prompt: dict, name: str) -> str | SequenceOf[int]:
    """Unpack a prompt in vLLM's form: `{"prompt": text}` or `{"prompt_token_ids": [...]}`."""
    if len(prompt) != 1 or not prompt.keys() <= {"prompt", "prompt_token_ids"}:
        raise ValueError(f"{name} must have one key, prompt or prompt_token_ids, got {sorted(map(str, prompt))}")
    ((key, value),) = prompt.items()
    if isinstance(value, str) != (key == "prompt"):
        raise ValueError(f"{name}: {key} must be {'a text' if key == 'prompt' else 'a list of token ids'}")
    return value


def _draw_seed(params: SamplingParams) -> int:
    """Return the request's seed, or a seed from torch's global generator. Greedy requests do not draw a seed."""
    if params.seed is None:
        return 0 if params.greedy else int(torch.randint(MAX_SEED, ()))
    return int(params.seed)  # a numpy integer would overflow
