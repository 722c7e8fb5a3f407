"""What a user asks of the next token and of the end: names, defaults, ranges. Knows no model, so no vocabulary."""

import math
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from numbers import Integral, Real

# Below this temperature the softmax is a spike: sampling is argmax (vLLM draws the line at the same value).
GREEDY_BELOW = 1e-5
MAX_SEED = 2**63 - 1
MAX_SAMPLES = 16_384  # vLLM's limit: more of them are a mistake, or an attack
MAX_LOGPROBS = 20  # vLLM's default limit
MAX_STOPS, MAX_STOP_LEN = 64, 1024  # every new character is compared with each of them
MAX_LOGIT_BIAS = 1024  # entries; all of them go to the device in every step


def is_int(value: object) -> bool:
    # First the plain case: prompts are checked token by token, and to look an abstract class up takes a microsecond.
    return type(value) is int or (isinstance(value, Integral) and not isinstance(value, bool))


@dataclass(frozen=True, kw_only=True)
class StructuredOutputsParams:
    """What the text must look like; exactly one of these. Names are vLLM's.

    Args:
        json: a JSON schema, as a dict or as text.
        regex: a regular expression for the whole text.
        choice: the texts to choose from.
        json_object: True for any JSON object.
    """

    json: dict | str | None = None
    regex: str | None = None
    choice: list[str] | None = None
    json_object: bool | None = None

    def __post_init__(self):
        given = [name for name, value in vars(self).items() if value is not None]
        if len(given) != 1 or self.json_object is False:
            raise ValueError(f"structured_outputs needs exactly one of json, regex, choice, json_object, got {given}")

    @property
    def kind_and_source(self) -> tuple[str, object]:
        """As `GrammarCompiler.compile` takes them."""
        if self.json is not None:
            return "json_schema", self.json
        if self.regex is not None:
            return "regex", self.regex
        return ("choice", self.choice) if self.choice is not None else ("json_object", None)


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to draw the next token and when to stop. Names, defaults and meanings are vLLM's.

    A value out of range, or of another type, raises ValueError with the range; a token id that the model does not have
    does so when the request comes. With a `seed`, the token drawn at a position depends on (seed, position,
    distribution) alone: never on the batch, the order of arrival, preemption or the page size. Sample i of a request is
    what another one gets with `seed + i`.

    The order of what changes the logits is vLLM's: `allowed_token_ids` and `structured_outputs`, `min_tokens` and
    `logit_bias`, the penalties, `temperature`, `min_p`, `top_k`, `top_p`.

    Args:
        n: samples of the prompt.
        temperature: in [0, 2]; 0 is greedy.
        top_p: in (0, 1]; draw from the most likely tokens that together have this probability.
        top_k: draw from the most likely so many tokens; 0 or -1: from all. Tokens as likely as the last one are in.
        min_p: in [0, 1]; draw from tokens that are at least so likely as this share of the most likely one.
        seed: None for one from torch's global generator.
        stop: texts that end the output where they begin; at most 64 of at most 1,024 characters.
        stop_token_ids: tokens that end the output, as an EOS does.
        ignore_eos: do not end at an EOS.
        max_tokens: None for as many as fit.
        min_tokens: so many tokens come before an EOS, a stop token, or the end of a `stop` text.
        logprobs: of each generated token, its log-probability and those of the so many most likely ones, at most 20.
            They are the model's, before anything here changes them.
        prompt_logprobs: the same of each prompt token but the first. The prompt is computed, whatever is cached.
        presence_penalty: in [-2, 2], subtracted from the logits of tokens that the output has.
        frequency_penalty: in [-2, 2], subtracted once for each time that the output has the token.
        repetition_penalty: in [0.001, 10]; logits of tokens in prompt or output are divided by it, negative ones
            multiplied (Keskar et al., https://arxiv.org/abs/1909.05858).
        logit_bias: added to the logits of at most 1,024 tokens, by their ids; in [-100, 100].
        allowed_token_ids: no others are generated.
        skip_special_tokens: leave special tokens out of the text.
        include_stop_str_in_output: let the text end with the stop text, or the stop token's.
        structured_outputs: what the text must look like. Needs llguidance (the extra `structured`).
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
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    structured_outputs: StructuredOutputsParams | None = None

    def __post_init__(self):
        self._check_number("temperature", 0, 2)
        self._check_number("top_p", 0, 1, above=True)
        self._check_number("min_p", 0, 1)
        self._check_number("presence_penalty", -2, 2)
        self._check_number("frequency_penalty", -2, 2)
        self._check_number("repetition_penalty", 0.001, 10)  # by less, a logit may be more than a float can hold
        self._check_int("n", 1, MAX_SAMPLES)
        self._check_int("top_k", -1)
        self._check_int("min_tokens", 0)
        self._check_int("max_tokens", 1, none="as many as fit")
        self._check_int("seed", 0, MAX_SEED, none="one of torch's")
        self._check_int("logprobs", 0, MAX_LOGPROBS, none="none")
        self._check_int("prompt_logprobs", 0, MAX_LOGPROBS, none="none")
        self._check_ids("stop_token_ids")
        self._check_ids("allowed_token_ids")
        for name in ("ignore_eos", "skip_special_tokens", "include_stop_str_in_output"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be a bool, got {getattr(self, name)!r}")
        if self.n > 1 and self.greedy:
            raise ValueError(f"n must be 1 with temperature=0, or all samples would be the same, got {self.n}")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens={self.min_tokens} is more than max_tokens={self.max_tokens}")
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            raise ValueError("allowed_token_ids is empty: no token could be generated")
        self._check_stop()
        self._check_logit_bias()
        if not isinstance(self.structured_outputs, StructuredOutputsParams | None):
            raise ValueError(f"structured_outputs must be StructuredOutputsParams, got {self.structured_outputs!r}")

    @property
    def greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop texts."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def penalises(self) -> bool:
        """Whether what was said before changes what comes next."""
        return (self.presence_penalty, self.frequency_penalty, self.repetition_penalty) != (0, 0, 1)

    def _check_number(self, name: str, least: float, most: float, above: bool = False) -> None:
        value = getattr(self, name)
        is_number = isinstance(value, Real) and not isinstance(value, bool)
        if not is_number or not least <= value <= most or (above and value == least):
            raise ValueError(f"{name} must be a number in {'(' if above else '['}{least}, {most}], got {value!r}")

    def _check_int(self, name: str, least: int, most: int | None = None, none: str = "") -> None:
        value = getattr(self, name)
        if value is None and none:
            return
        if not is_int(value) or value < least or (most is not None and value > most):
            bounds = f">= {least}" if most is None else f"in [{least}, {most}]"
            raise ValueError(f"{name} must be an int {bounds}{f', or None for {none}' if none else ''}, got {value!r}")

    def _check_ids(self, name: str) -> None:
        value = getattr(self, name)
        if value is not None and not (isinstance(value, list | tuple) and all(is_int(i) and i >= 0 for i in value)):
            raise ValueError(f"{name} must be a list of token ids, got {_shortened(value)}")

    def _check_stop(self) -> None:
        stops = [self.stop] if isinstance(self.stop, str) else self.stop
        if stops is None:
            return
        if not isinstance(stops, list | tuple) or len(stops) > MAX_STOPS:
            raise ValueError(f"stop must be a text or a list of at most {MAX_STOPS}, got {_shortened(stops)}")
        for text in stops:
            if not isinstance(text, str) or not 1 <= len(text) <= MAX_STOP_LEN:
                raise ValueError(f"stop must be of 1 to {MAX_STOP_LEN} characters, got {_shortened(text)}")

    def _check_logit_bias(self) -> None:
        bias = self.logit_bias
        if bias is None:
            return
        if not isinstance(bias, dict) or not all(is_int(token_id) and token_id >= 0 for token_id in bias):
            raise ValueError(f"logit_bias must be a dict by token ids, got {_shortened(bias)}")
        if len(bias) > MAX_LOGIT_BIAS:
            raise ValueError(f"logit_bias has {len(bias)} entries, more than {MAX_LOGIT_BIAS}")
        for token_id, value in bias.items():
            is_number = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
            if not is_number or abs(value) > 100:
                raise ValueError(f"logit_bias must be in [-100, 100], got {value!r} for token {token_id}")


def _shortened(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}…"
