"""Many prompts from a JSONL file, answered in batches.

A line is an object with "prompt" (a string) or "messages" (a conversation); its other fields are
copied to the line of its answer.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from dca_jax.config import LlamaConfig
from dca_jax.errors import InputError
from dca_jax.inference.generate import NotFiniteError, check_prompts
from dca_jax.inference.llm import LLM, Generation
from dca_jax.inference.methods import Method, method_by_name, reading, whole_length
from dca_jax.inference.options import Options
from dca_jax.text_files import check_characters, decode, parse_json

ANSWER = ("text", "finish_reason", "prompt_tokens", "completion_tokens")


class Request(NamedTuple):
    """One prompt.

    Attributes:
        fields: the first fields of its answer's line.
        tokens: the prompt's token ids.
    """

    fields: dict[str, Any]
    tokens: list[int]


def read_lines(data: bytes, name: str) -> dict[str, dict[str, Any]]:
    """The objects of a JSONL file by "NAME:LINE"; blank lines are skipped.

    Args:
        data: the contents of the file.
        name: its name, for error messages.

    Raises:
        InputError: a line that is not an object as described in the module docstring, or no lines.
    """
    found = {}
    for number, line in enumerate(decode(data, name).split("\n"), start=1):
        if line.strip():
            where = f"{name}:{number}"
            found[where] = _checked(line, where)
    if not found:
        raise InputError(f'{name} is empty; expected one JSON object per line, with a "prompt"')
    return found


def make_requests(
    llm: LLM, lines: dict[str, dict[str, Any]], *, thinking: bool | None = None
) -> list[Request]:
    """The prompts of `read_lines` as tokens; `thinking` as in `Options`.

    Raises:
        InputError: a prompt that the model does not accept, with its line.
    """
    requests = []
    for where, fields in lines.items():
        try:
            tokens = (
                llm.tokenize(fields["prompt"])
                if "prompt" in fields
                else llm.apply_chat_template(fields["messages"], thinking=thinking)
            )
            check_prompts([tokens], llm.model.config.vocab_size)
        except InputError as error:
            raise InputError(f"{where}: {error}") from None
        requests.append(Request(fields, tokens))
    return requests


def answers(
    llm: LLM, requests: Sequence[Request], *, method: str, batch: int, options: Options
) -> Iterator[list[dict[str, Any]]]:
    """Answers the requests in order, up to `batch` at a time; yields the answers of each batch.

    A method that depends on the length of a text uses the length of each prompt and its answer. So
    reading a prompt does not depend on the others, and a batch ends where the method changes.

    Args:
        llm: a model loaded with `dca=None`.
        method: a name in `dca_jax.inference.methods`.
        options: options of `LLM.generate`; each batch has its own seed, derived from this one.

    Yields:
        For each request its fields and those of `ANSWER`; also "error" if that is the finish_reason
        (non-finite logits).
    """
    reader, current, begun = None, None, 0
    for wanted, together in batches(llm.model.config, requests, method, batch, options):
        if reader is None or wanted != current:
            length = len(together[0].tokens) + options.max_new_tokens
            reader, current = reading(llm, method, length), wanted
        drawn = replace(options, seed=_nth_seed(options.seed, begun))
        prompts = [request.tokens for request in together]
        try:
            said = [_answer(one) for one in reader.generate(prompts, drawn)]
        except (
            NotFiniteError
        ) as error:  # in a batch of one; in larger ones, `Generation` has the error
            said = [_failure(len(prompts[0]), error)]
        yield [{**request.fields, **answer} for request, answer in zip(together, said, strict=True)]
        begun += len(together)


def batches(
    config: LlamaConfig, requests: Sequence[Request], method: str, batch: int, options: Options
) -> Iterator[tuple[Method, list[Request]]]:
    """The batches of `answers` in order, and the method of each."""
    rest, new = list(requests), options.max_new_tokens

    def its_method(request: Request) -> Method:
        return method_by_name(method, config, whole_length(config, len(request.tokens) + new))

    while rest:
        wanted = its_method(rest[0])
        others = (n for n, one in enumerate(rest[:batch]) if its_method(one) != wanted)
        size = next(others, batch)
        yield wanted, rest[:size]
        rest = rest[size:]


def _nth_seed(seed: int, number: int) -> int:
    """A different 32-bit seed for each number; `seed` itself for 0."""
    return (seed + number + 2**31) % 2**32 - 2**31


def _answer(generation: Generation) -> dict[str, Any]:
    values = (
        generation.text,
        generation.finish_reason,
        generation.prompt_tokens,
        len(generation.tokens),
    )
    failed = {} if generation.error is None else {"error": generation.error}
    return dict(zip(ANSWER, values, strict=True)) | failed


def _failure(prompt_tokens: int, error: Exception) -> dict[str, Any]:
    """The answer to a prompt that cannot be continued."""
    return dict(zip(ANSWER, ("", "error", prompt_tokens, 0), strict=True)) | {"error": str(error)}


def _checked(line: str, where: str) -> dict[str, Any]:
    fields = parse_json(line, where, unique=True)
    check_characters(json.dumps(fields, ensure_ascii=False), where)
    if not isinstance(fields, dict) or ("prompt" in fields) == ("messages" in fields):
        raise InputError(f'{where}: expected a JSON object with either "prompt" or "messages"')
    if "prompt" in fields and not (isinstance(fields["prompt"], str) and fields["prompt"]):
        raise InputError(f'{where}: "prompt" must be a non-empty string')
    if "messages" in fields and not _is_conversation(fields["messages"]):
        raise InputError(
            f'{where}: "messages" must be a list of objects with "role" and "content" (or '
            '"tool_calls"), not empty'
        )
    taken = [name for name in ANSWER if name in fields]
    if taken:
        raise InputError(
            f"{where} has a field {taken[0]!r}, which its answer is to have; rename it"
        )
    return fields


def _is_conversation(messages: Any) -> bool:
    return (
        isinstance(messages, list)
        and bool(messages)
        and all(
            isinstance(message, dict)
            and isinstance(message.get("role"), str)
            and ("content" in message or "tool_calls" in message)
            for message in messages
        )
    )
