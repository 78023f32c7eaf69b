"""The requests: OpenAI's fields, a few of vLLM's, and those that are rejected by name.

An unsupported field that would change the answer is an error, and never ignored; one that changes
nothing (`user`, a penalty of 0) is accepted.
"""

import abc
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from dca_jax.errors import InputError
from dca_jax.fields import LARGEST, shown
from dca_jax.inference.llm import LLM
from dca_jax.inference.options import Options
from dca_jax.inference.prompts import Message
from dca_jax.inference.sampling import Sampler
from dca_jax.serving.programs import TOP

NEW_TOKENS = 4096  # default limit for an answer in a conversation
CHOICES = 128  # most choices of a prompt, and most prompts of a request

# Unsupported fields, and their values that have no effect.
NOT_HERE: dict[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": (),
    "web_search_options": (),
    "echo": (False,),
    "suffix": ("",),
    "best_of": (1,),
    "min_tokens": (0,),
    "prompt_logprobs": (),
    "truncate_prompt_tokens": (),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "include_stop_str_in_output": (False,),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "bad_words": ([],),
    "allowed_token_ids": ([],),
    "logits_processors": ([],),
    "length_penalty": (1,),
    "early_stopping": (False,),
    "priority": (0,),
    "use_beam_search": (False,),
    "chat_template": (),
    "documents": ([],),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "add_special_tokens": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "structured_outputs": (),
}
# Fields that do not affect the answer.
ASIDE = frozenset(
    "user metadata store service_tier safety_identifier prompt_cache_key prompt_cache_retention "
    "verbosity request_id include_obfuscation".split()
)

Count = Annotated[int, Field(ge=1, le=LARGEST)]


class Fields(BaseModel):
    """A request's fields; `null` counts as absent."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _known(cls, given: Any) -> Any:
        if not isinstance(given, Mapping):
            return given
        kept = {k: v for k, v in given.items() if v is not None and k not in ASIDE}
        for name in [name for name in kept if name in NOT_HERE]:
            value = kept.pop(name)
            if value not in NOT_HERE[name]:
                raise ValueError(f"{name} is not supported by this server; leave it out")
        for name in kept:
            if name not in cls.model_fields:
                raise ValueError(f"there is no field {shown(name)}; leave it out")
        return kept


class StreamOptions(Fields):
    """Options of the end of a stream."""

    include_usage: bool = False


class TemplateOptions(Fields):
    """Variables for a chat template."""

    enable_thinking: bool | None = None


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """A request in the engine's terms.

    Attributes:
        prompts: token ids.
        choices: number of texts for each prompt.
        top: number of most likely tokens to return at each position, besides the sampled one; None
            for no log-probabilities.
    """

    prompts: list[list[int]]
    options: Options
    choices: int
    top: int | None


class Generation(Fields, abc.ABC):
    """Fields common to both kinds of requests for text."""

    model: str | None = None
    max_tokens: Count | None = None
    temperature: Annotated[float, Field(ge=0)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0)] = 1.0
    seed: int | None = None
    n: Annotated[int, Field(ge=1, le=CHOICES)] = 1
    stop: str | Annotated[list[str], Field(max_length=16)] = []
    stop_token_ids: Annotated[list[int], Field(max_length=256)] = []
    ignore_eos: bool = False
    stream: bool = False
    stream_options: StreamOptions | None = None

    @model_validator(mode="after")
    def _of_streams(self) -> "Generation":
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options need a stream; set stream, or leave them out")
        return self

    @property
    def with_usage(self) -> bool:
        """Whether a stream ends with its token usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    def options(self, new_tokens: int) -> Options:
        """The options for generating.

        Raises:
            InputError: a number is out of range.
        """
        sampler = Sampler(
            temperature=self.temperature,
            top_k=None if self.top_k in (None, 0, -1) else self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
        )
        return Options(
            max_new_tokens=new_tokens,
            sampler=sampler,
            seed=secrets.randbelow(2**31) if self.seed is None else self.seed,
            stop=self.stop,
            stop_ids=self.stop_token_ids,
        )

    def wanted(self, llm: LLM, context: int) -> Wanted:
        """The request in tokens.

        Args:
            context: tokens of the longest text.

        Raises:
            InputError: the model does not accept a prompt, or a prompt leaves no room.
        """
        prompts = self.prompts(llm)
        longest = max(map(len, prompts))
        if longest >= context:
            raise InputError(
                f"the prompt has {longest} tokens, and this server's context is {context}: with "
                f"one token of an answer, at most {context - 1} fit"
            )
        new = self.new_tokens()
        if new is None:
            new = min(NEW_TOKENS, context - longest)
        return Wanted(prompts=prompts, options=self.options(new), choices=self.n, top=self.top())

    @abc.abstractmethod
    def prompts(self, llm: LLM) -> list[list[int]]:
        """The prompts as token ids."""

    @abc.abstractmethod
    def new_tokens(self) -> int | None:
        """Maximum number of new tokens; None for the default."""

    @abc.abstractmethod
    def top(self) -> int | None:
        """As of `Wanted`."""


class ChatRequest(Generation):
    """`/v1/chat/completions`."""

    messages: Annotated[list[dict[str, Any]], Field(min_length=1)]
    max_completion_tokens: Count | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=TOP)] = 0
    chat_template_kwargs: TemplateOptions = TemplateOptions()

    @model_validator(mode="after")
    def _of_logprobs(self) -> "ChatRequest":
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs; set logprobs, too")
        return self

    def prompts(self, llm: LLM) -> list[list[int]]:
        """The conversation in the model's chat template."""
        return [conversation(llm, self.messages, self.chat_template_kwargs)]

    def new_tokens(self) -> int | None:
        """The limit, by either of its names."""
        if self.max_completion_tokens is None:
            return self.max_tokens
        return self.max_completion_tokens

    def top(self) -> int | None:
        """As of `Wanted`."""
        return self.top_logprobs if self.logprobs else None


class CompletionRequest(Generation):
    """`/v1/completions`."""

    prompt: str | list[int] | list[str] | list[list[int]]
    logprobs: Annotated[int, Field(ge=0, le=TOP)] | None = None

    def prompts(self, llm: LLM) -> list[list[int]]:
        """The texts as token ids, with the tokenizer's special tokens."""
        given: Any = self.prompt
        if isinstance(given, str) or (given and isinstance(given[0], int)):
            given = [given]
        if not 1 <= len(given) <= CHOICES:
            raise InputError(f"prompt must hold 1 to {CHOICES} prompts, got {len(given)}")
        return [llm.tokenize(one) if isinstance(one, str) else list(one) for one in given]

    def new_tokens(self) -> int | None:
        """As OpenAI's."""
        return 16 if self.max_tokens is None else self.max_tokens

    def top(self) -> int | None:
        """As of `Wanted`."""
        return self.logprobs


class TokenizeRequest(Fields):
    """`/tokenize`: a text or a conversation."""

    model: str | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    chat_template_kwargs: TemplateOptions = TemplateOptions()

    def tokens(self, llm: LLM) -> list[int]:
        """Its ids."""
        if (self.prompt is None) == (self.messages is None):
            raise InputError("give either prompt (a text) or messages (a conversation)")
        if self.prompt is not None:
            return llm.tokenize(self.prompt)
        return conversation(llm, self.messages or [], self.chat_template_kwargs)


def conversation(
    llm: LLM, messages: Sequence[Mapping[str, Any]], told: TemplateOptions
) -> list[int]:
    """A conversation's ids, up to the beginning of the answer.

    Raises:
        InputError: a message is invalid, or the chat template rejects the conversation.
    """
    plain = [_message(message, number) for number, message in enumerate(messages, start=1)]
    return llm.apply_chat_template(plain, thinking=told.enable_thinking)


def _message(message: Mapping[str, Any], number: int) -> Message:
    """A text message: its role, its name if it has one, and its content as one text."""
    given = {name: value for name, value in message.items() if value not in (None, [])}
    if "content" not in given and isinstance(message.get("content"), list):
        given["content"] = []
    unknown = given.keys() - {"role", "content", "name"}
    if unknown:
        name = shown(min(unknown, key=str), quote=False)
        raise InputError(
            f"message {number} has {name}, which this server does not support; leave it out"
        )
    role, name = given.get("role"), given.get("name")
    if not isinstance(role, str) or not isinstance(name, str | None):
        raise InputError(f"message {number} must have a role, and its name, if any, must be text")
    content = given.get("content")
    if isinstance(content, list):
        content = "\n".join(_part(part, number) for part in content)
    if not isinstance(content, str):
        raise InputError(f"message {number} must have content: a text or text parts")
    named = {} if name is None else {"name": name}
    return {"role": role, "content": content, **named}


def _part(part: Any, number: int) -> str:
    if isinstance(part, Mapping) and part.get("type") == "text":
        text = part.get("text")
        if isinstance(text, str):
            return text
    kind = part.get("type") if isinstance(part, Mapping) else part
    raise InputError(
        f"message {number} has a part of type {shown(kind)}, and this model reads text only: "
        '{"type": "text", "text": ...}'
    )
