"""Sampling parameters: names, defaults, ranges, and those of a model's `generation_config`. Independent of texts."""

import math
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from numbers import Integral, Number, Real
from typing import Any

from transformers import GenerationConfig

# Below this temperature, sampling is argmax, because the softmax is a spike (vLLM has the same threshold).
GREEDY_BELOW = 1e-5
MIN_SEED, MAX_SEED = -(2**63), 2**63 - 1
MAX_SAMPLES = 16_384  # vLLM's limit, against mistakes and attacks
MAX_LOGPROBS = 20  # vLLM's default limit
MAX_STOPS, MAX_STOP_LEN = 64, 1024  # every new character is compared with each stop string
MAX_LOGIT_BIAS = 1024  # entries; all of them are copied to the device in every step


class InvalidRequestError(ValueError):
    """The request is invalid. It is rejected before any resource is allocated.

    Args:
        param: the invalid parameter, by its name in `SamplingParams`, or "prompt".
        code: "context_length_exceeded" for a prompt that is too long, else None.
    """

    def __init__(self, message: str, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.param, self.code = param, code


def is_int(value: object) -> bool:
    # The common case first: prompts are checked token by token, and a check of an abstract class takes a microsecond.
    return type(value) is int or (isinstance(value, Integral) and not isinstance(value, bool))


@dataclass(frozen=True, kw_only=True)
class StructuredOutputsParams:
    """The required structure of the text. Names are vLLM's. Exactly one of the first five arguments must be set.

    Args:
        json: a JSON schema, as a dict or as text.
        regex: a regular expression for the whole text.
        choice: the texts to choose from.
        json_object: True for any JSON object.
        grammar: a grammar in llguidance's Lark syntax. Accept it from trusted callers only: few limits bound its cost.
        whitespace_pattern: a regular expression for the whitespace between two symbols of JSON. Default: one space.
    """

    json: dict | str | None = None
    regex: str | None = None
    choice: list[str] | None = None
    json_object: bool | None = None
    grammar: str | None = None
    whitespace_pattern: str | None = None

    def __post_init__(self):
        kinds = ("json", "regex", "choice", "json_object", "grammar")
        given = [name for name in kinds if getattr(self, name) is not None]
        if len(given) != 1 or self.json_object is False:
            message = f"structured_outputs needs exactly one of {', '.join(kinds)}, got {given}"
            raise InvalidRequestError(message, "structured_outputs")
        if self.whitespace_pattern is not None:
            if not isinstance(self.whitespace_pattern, str):
                raise InvalidRequestError("whitespace_pattern must be a string", "structured_outputs")
            if given[0] not in ("json", "json_object"):
                raise InvalidRequestError("whitespace_pattern needs json or json_object", "structured_outputs")

    @property
    def arguments(self) -> dict[str, object]:
        """Arguments for `GrammarCompiler.compile`."""
        kind, source = "json_object", None
        for name, its_kind in dict(json="json_schema", regex="regex", choice="choice", grammar="grammar").items():
            if getattr(self, name) is not None:
                kind, source = its_kind, getattr(self, name)
        given = {} if self.whitespace_pattern is None else {"whitespace_pattern": self.whitespace_pattern}
        return dict(kind=kind, source=source) | given


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How the next token is drawn and when the output ends. Names, defaults and meanings are vLLM's.

    A value that is out of range or has another type raises ValueError with the range. A token id that the model does
    not have raises ValueError when the request is added.

    With a `seed`, the token drawn at a position depends only on (seed, position, distribution). It does not depend on
    the batch, the order of arrival, preemption or the page size. Sample i of a request equals the first sample of a
    request with `seed + i`.

    The order in which parameters change the logits is vLLM's: `allowed_token_ids` and `structured_outputs`,
    `min_tokens` and `logit_bias`, the penalties, `temperature`, `min_p`, `top_k`, `top_p`.

    Args:
        n: number of samples of the prompt. With temperature 0 all samples are equal.
        temperature: in [0, 2]; 0 is greedy.
        top_p: in (0, 1]; draw from the most likely tokens that together have this probability.
        top_k: draw from the `top_k` most likely tokens; 0 or -1: from all. Ties with the last kept token are kept.
        min_p: in [0, 1]; draw from the tokens whose probability is at least `min_p` times the highest probability.
        seed: a signed 64-bit int; None for a seed from torch's global generator.
        stop: strings that end the output where they begin; at most 64, each of at most 1,024 characters.
        stop_token_ids: tokens that end the output, like an EOS token.
        ignore_eos: do not end the output at an EOS token.
        max_tokens: maximum number of generated tokens; None for as many as fit.
        min_tokens: number of tokens to generate before an EOS token, a stop token or the end of a stop string.
        logprobs: for each generated token, return its log-probability and those of the `logprobs` most likely tokens;
            at most 20. They are the model's own, before any parameter changes the logits.
        prompt_logprobs: the same for each prompt token except the first. The prompt is computed even if it is cached.
        presence_penalty: in [-2, 2], subtracted from the logits of tokens that occur in the output.
        frequency_penalty: in [-2, 2], subtracted from a token's logit once for each occurrence in the output.
        repetition_penalty: in [0.001, 10]; positive logits of tokens that occur in the prompt or the output are divided
            by it, negative ones are multiplied (Keskar et al., https://arxiv.org/abs/1909.05858).
        logit_bias: values in [-100, 100] that are added to the logits of at most 1,024 tokens, by token id.
        allowed_token_ids: generate only these tokens.
        priority: an int; requests with a smaller one come first, in an engine with `policy="priority"`.
        skip_special_tokens: leave special tokens out of the text.
        include_stop_str_in_output: keep the stop string, or the text of the stop token, at the end of the text.
        structured_outputs: the required structure of the text. Needs llguidance (the extra `structured`).
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | SequenceOf[str] | None = None
    stop_token_ids: SequenceOf[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: SequenceOf[int] | None = None
    priority: int = 0
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    structured_outputs: StructuredOutputsParams | None = None

    def __post_init__(self):
        self._check_number("temperature", 0, 2)
        self._check_number("top_p", 0, 1, above=True)
        self._check_number("min_p", 0, 1)
        self._check_number("presence_penalty", -2, 2)
        self._check_number("frequency_penalty", -2, 2)
        self._check_number("repetition_penalty", 0.001, 10)  # division by less may overflow a float
        self._check_int("n", 1, MAX_SAMPLES)
        self._check_int("top_k", -1)
        self._check_int("min_tokens", 0)
        self._check_int("max_tokens", 1, none="as many as fit")
        self._check_int("seed", MIN_SEED, MAX_SEED, none="a seed from torch's generator")
        self._check_int("priority", MIN_SEED, MAX_SEED)
        self._check_int("logprobs", 0, MAX_LOGPROBS, none="no log-probabilities")
        self._check_int("prompt_logprobs", 0, MAX_LOGPROBS, none="no log-probabilities")
        self._check_ids("stop_token_ids")
        self._check_ids("allowed_token_ids")
        for name in ("ignore_eos", "skip_special_tokens", "include_stop_str_in_output"):
            if not isinstance(getattr(self, name), bool):
                raise InvalidRequestError(f"{name} must be a bool, got {shortened(getattr(self, name))}", name)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            message = f"min_tokens={self.min_tokens} is more than max_tokens={self.max_tokens}"
            raise InvalidRequestError(message, "min_tokens")
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            raise InvalidRequestError("allowed_token_ids is empty: no token could be generated", "allowed_token_ids")
        self._check_stop()
        self._check_logit_bias()
        if not isinstance(self.structured_outputs, StructuredOutputsParams | None):
            message = f"structured_outputs must be StructuredOutputsParams, got {shortened(self.structured_outputs)}"
            raise InvalidRequestError(message, "structured_outputs")

    @property
    def greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def penalises(self) -> bool:
        """Whether any penalty is set, so that earlier tokens change the logits."""
        return (self.presence_penalty, self.frequency_penalty, self.repetition_penalty) != (0, 0, 1)

    def _check_number(self, name: str, least: float, most: float, above: bool = False) -> None:
        value = getattr(self, name)
        is_number = isinstance(value, Real) and not isinstance(value, bool)
        if not is_number or not least <= value <= most or (above and value == least):
            bounds = f"{'(' if above else '['}{least}, {most}]"
            raise InvalidRequestError(f"{name} must be a number in {bounds}, got {shortened(value)}", name)

    def _check_int(self, name: str, least: int, most: int | None = None, none: str = "") -> None:
        value = getattr(self, name)
        if value is None and none:
            return
        if not is_int(value) or value < least or (most is not None and value > most):
            bounds = f">= {least}" if most is None else f"in [{least}, {most}]"
            bounds += f", or None for {none}" if none else ""
            raise InvalidRequestError(f"{name} must be an int {bounds}, got {shortened(value)}", name)

    def _check_ids(self, name: str) -> None:
        value = getattr(self, name)
        if value is not None and not (isinstance(value, list | tuple) and all(is_int(i) and i >= 0 for i in value)):
            raise InvalidRequestError(f"{name} must be a list of token ids, got {shortened(value)}", name)

    def _check_stop(self) -> None:
        stops = [self.stop] if isinstance(self.stop, str) else self.stop
        if stops is None:
            return
        if not isinstance(stops, list | tuple) or len(stops) > MAX_STOPS:
            got = f"a list of {len(stops)}" if isinstance(stops, list | tuple) else shortened(stops)
            raise InvalidRequestError(f"stop must be a string or at most {MAX_STOPS} strings, got {got}", "stop")
        for text in stops:
            if not isinstance(text, str) or not 1 <= len(text) <= MAX_STOP_LEN:
                message = f"each stop must be a string of 1 to {MAX_STOP_LEN} characters, got {shortened(text)}"
                raise InvalidRequestError(message, "stop")

    def _check_logit_bias(self) -> None:
        bias = self.logit_bias
        if bias is None:
            return
        if not isinstance(bias, dict) or not all(is_int(token_id) and token_id >= 0 for token_id in bias):
            raise InvalidRequestError(f"logit_bias must map token ids to numbers, got {shortened(bias)}", "logit_bias")
        if len(bias) > MAX_LOGIT_BIAS:
            raise InvalidRequestError(f"logit_bias has {len(bias)} entries, more than {MAX_LOGIT_BIAS}", "logit_bias")
        for token_id, value in bias.items():
            is_number = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
            if not is_number or abs(value) > 100:
                message = f"each logit_bias must be in [-100, 100], got {shortened(value)} for token {token_id}"
                raise InvalidRequestError(message, "logit_bias")


def shortened(value: object) -> str:
    """Return at most 100 characters that show a value in an error; the type only if it is not a plain value."""
    if not isinstance(value, str | Number | list | tuple | dict | None):
        return f"an object of type {type(value).__name__}"
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}…"


# Fields of GenerationConfig, their names in SamplingParams, and the values that have no effect. No table contains
# `max_length`, which also counts the prompt: the request and the engine's limit determine the length of an output.
EXPRESSED = {
    "temperature": ("temperature", 1.0),
    "top_k": ("top_k", 0),
    "top_p": ("top_p", 1.0),
    "min_p": ("min_p", 0.0),
    "repetition_penalty": ("repetition_penalty", 1.0),
    "min_new_tokens": ("min_tokens", 0),
    "max_new_tokens": ("max_tokens", None),
}
OF_DRAWS = ("temperature", "top_k", "top_p", "min_p")  # no effect on greedy decoding
# Fields that change the tokens of `generate` and have no counterpart here, with the values that have no effect
NOT_EXPRESSED = {
    "no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1.0,
    "encoder_no_repeat_ngram_size": 0,
    "bad_words_ids": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "sequence_bias": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "exponential_decay_length_penalty": None,
    "min_length": 0,
    "stop_strings": None,
    "num_beams": 1,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "top_h": None,
    "penalty_alpha": None,
    "dola_layers": None,
    "guidance_scale": 1.0,
    "token_healing": False,
    "watermarking_config": None,
}


def sampling_defaults(config: GenerationConfig) -> dict[str, Any]:
    """Return the arguments of `SamplingParams` that a model's config sets.

    An explicit `do_sample=False` becomes temperature 0.

    Raises:
        ValueError: `SamplingParams` rejects a value.
    """
    stated = {ours: getattr(config, theirs, None) for theirs, (ours, _) in EXPRESSED.items()}
    defaults = {name: value for name, value in stated.items() if value is not None}
    if config.do_sample is False:
        defaults = {name: value for name, value in defaults.items() if name not in OF_DRAWS} | {"temperature": 0.0}
    SamplingParams(**{"max_tokens": None} | defaults)
    return defaults


def default_params(config: GenerationConfig) -> SamplingParams:
    """Return the parameters that a model's config sets. The default `max_tokens` is raised to the config's minimum."""
    defaults = sampling_defaults(config)
    if defaults.get("min_tokens", 0) > SamplingParams.max_tokens:
        defaults.setdefault("max_tokens", defaults["min_tokens"])
    return SamplingParams(**defaults)


def not_expressed(config: GenerationConfig) -> dict[str, Any]:
    """Return the settings of a model's config that no parameter here can express."""
    stated = {name: getattr(config, name, None) for name in NOT_EXPRESSED}
    return {name: value for name, value in stated.items() if value not in (None, [], NOT_EXPRESSED[name])}


def not_applied(config: GenerationConfig, params: SamplingParams) -> dict[str, Any]:
    """Return the settings that `model.generate` applies and a request with these parameters does not, by name."""
    missing = not_expressed(config)
    of_draws = OF_DRAWS if params.greedy or config.do_sample is False else ()
    for theirs, (ours, neutral) in EXPRESSED.items():
        value = getattr(config, theirs, None)
        is_chosen = getattr(params, ours) != neutral  # the request sets its own value
        if theirs not in ("max_new_tokens", *of_draws) and value not in (None, neutral) and not is_chosen:
            missing[theirs] = value
    return missing
