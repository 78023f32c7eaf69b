"""What a request may say: OpenAI's fields, a few of vLLM's, and what is refused by name.

A field that would change the answer and is not computed here is an error, never ignored; one that
changes nothing (`user`, a penalty of 0) is taken.
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

NEW_TOKENS = 4096  # of an answer in a conversation, if a request does not say
CHOICES = 128  # of a prompt, and prompts of a request, at most

# Fields that are not computed, and the values that ask for nothing.
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
# Fields that say nothing about the answer.
ASIDE = frozenset(
    "user metadata store service_tier safety_identifier prompt_cache_key prompt_cache_retention "
    "verbosity request_id include_obfuscation".split()
)

Count = Annotated[int, Field(ge=1, le=LARGEST)]


class Fields(BaseModel):
    """A request's fields, as they are named; `null` is a field that is not given."""

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
    """What a stream ends with."""

    include_usage: bool = False


class TemplateOptions(Fields):
    """What a chat template is told."""

    enable_thinking: bool | None = None


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """A request in the engine's terms.

    Attributes:
        prompts: token ids. choices: texts of each. top: how many of the most likely tokens to tell
            at each place, besides the one drawn; None for no log-probabilities.
    """

    prompts: list[list[int]]
    options: Options
    choices: int
    top: int | None


class Generation(Fields, abc.ABC):
    """What both ways to ask for a text have."""

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
            raise ValueError("stream_options are of streams; set stream, or leave them out")
        return self

    @property
    def with_usage(self) -> bool:
        """Whether a stream ends with what it took."""
        return self.stream_options is not None and self.stream_options.include_usage

    def options(self, new_tokens: int) -> Options:
        """How to generate.

        Raises:
            InputError: a number out of range.
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
            InputError: a prompt that the model does not take, or that leaves no room.
        """
        prompts = self.prompts(llm)
        longest = max(map(len, prompts))
        if longest >= context:
            raise InputError(
                f"the prompt has {longest} tokens, and this server reads {context}: with a token "
                f"of an answer, at most {context - 1} fit"
            )
        new = self.new_tokens()
        if new is None:
            new = min(NEW_TOKENS, context - longest)
        return Wanted(prompts=prompts, options=self.options(new), choices=self.n, top=self.top())

    @abc.abstractmethod
    def prompts(self, llm: LLM) -> list[list[int]]:
        """The prompts in tokens."""

    @abc.abstractmethod
    def new_tokens(self) -> int | None:
        """Tokens to draw at most; None for what is usual."""

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
            raise ValueError("top_logprobs asks for more of logprobs; set logprobs, too")
        return self

    def prompts(self, llm: LLM) -> list[list[int]]:
        """The conversation as its template writes it."""
        return [conversation(llm, self.messages, self.chat_template_kwargs)]

    def new_tokens(self) -> int | None:
        """By either name."""
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
        """Texts in tokens, with the special tokens that the tokenizer puts around them."""
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
    """A conversation's ids, up to where the answer begins.

    Raises:
        InputError: a message that is none, or what the chat template refuses.
    """
    plain = [_message(message, number) for number, message in enumerate(messages, start=1)]
    return llm.apply_chat_template(plain, thinking=told.enable_thinking)


def _message(message: Mapping[str, Any], number: int) -> Message:
    """A message of texts: its role, its name if it has one, its content as one text."""
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
        raise InputError(f"message {number} must have a role, and a name if any, that is a text")
    content = given.get("content")
    if isinstance(content, list):
        content = "\n".join(_part(part, number) for part in content)
    if not isinstance(content, str):
        raise InputError(f"message {number} must have content: a text, or parts of text")
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
