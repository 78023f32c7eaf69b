"""A model for EleutherAI's lm-evaluation-harness: LongBench, RULER, SCROLLS and all other tasks.

    python -m dca_jax.lm_eval run --model dca_jax --tasks ruler --model_args \\
        pretrained=./Llama-2-7b-hf,method=dca,max_length=32768

is lm-eval's own command with this model registered; other programs can import this module. (lm-eval
finds models by name only in its own list.)

Results equal those of lm-eval's own model for transformers, `HFLM`, with these exceptions:

- `max_length` is independent of the model's trained length: it limits the requests. A longer
  request is rejected before anything is read; `HFLM` truncates it on the left, as does
  `overlong=left`, which reports how many were truncated.
- `loglikelihood_rolling` puts one BOS before a text; `HFLM` (as of 0.4.13) has two.
- A continuation that merges with its context into one token is scored from that token on; `HFLM`
  stops the run. An empty one is rejected.
- Every sample has its own seed, derived from `seed`, so repeats differ.
"""

import inspect
import logging
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from dca_jax.errors import InputError
from dca_jax.evaluation.fingerprint import fingerprint
from dca_jax.evaluation.texts import joined, prefix_token
from dca_jax.evaluation.windows import make_windows
from dca_jax.fields import shown
from dca_jax.inference.chat_templates import own_template
from dca_jax.inference.llm import LLM
from dca_jax.inference.load import open_model
from dca_jax.inference.methods import method_by_name, reading
from dca_jax.inference.prefix import depends_on_length
from dca_jax.inference.score import Branches, Reader, Scores
from dca_jax.inference.tokenizer import encode, load_tokenizer
from dca_jax.lengths import parse_tokens
from dca_jax.lm_eval.arguments import (
    Wanted,
    check_arguments,
    check_device,
    claim_cache,
    read_generation_kwargs,
    take_mesh,
    truth,
)
from dca_jax.lm_eval.beginnings import Family, families
from dca_jax.planning.room import check_room
from dca_jax.products.packed import packed_forms
from dca_jax.sharding import mesh_of
from dca_jax.weights.files import read_json
from dca_jax.weights.hub import find_folder

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text

except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "dca_jax.lm_eval needs lm-evaluation-harness: pip install 'dca_jax[eval]'"
    ) from error

eval_logger = logging.getLogger("lm_eval")

MAX_NEW_TOKENS = 256  # default, as in lm-eval's own models
TOGETHER = 16_384  # tokens per batch with automatic size
MOST_ROWS = 64  # requests per batch with automatic size


@register_model("dca_jax")
class DcaJaxLM(TemplateLM):
    """A model of this package with lm-eval's interface.

    Args:
        pretrained: a folder, or a name on the Hugging Face Hub (`dca_jax.load`).
        method: position method, a name known to `dca_jax.inference.methods`. Methods that depend on
            a text's length use the longest of a batch, in whole trained lengths.
        max_length: maximum tokens of a request (32768, or "32k"), including its answer; None for as
            many as fit into memory.
        overlong: handling of longer requests: "error", or "left" to truncate them on the left.
        truncation: True is equivalent to `overlong="left"`.
        max_gen_toks: default number of new tokens.
        batch_size: requests read together; "auto" (or "auto:N") for up to 16k tokens.
        max_batch_size: upper limit for "auto".
        seed: seed for tasks that sample.
        tokenizer: another folder or name for the tokenizer.
        add_bos_token: False to omit the special tokens that the tokenizer puts before a text.
        prefix_token_id: first token of a text without a context; None for BOS, or else EOS.
        chat_template_args: arguments of the chat template, such as {"enable_thinking": False}.
        enable_thinking: shortcut for this argument of the chat template.
        think_end_token: a string or id after which an answer begins.
        dtype, cache_dtype, mesh, weights, sparse: as in `dca_jax.load`.
        peft: folder of a LoRA adapter to merge into the weights.
        device: as lm-eval's --device; any but JAX's device is rejected.
        **others: axes of the mesh ("tensor=4" after a comma), and disabled arguments of `HFLM`.

    Raises:
        InputError: `dca_jax.load` or `dca_jax.inference.methods` raises, the model has no
            tokenizer, or an argument is unknown or invalid.
    """

    def __init__(
        self,
        pretrained: str,
        *,
        method: str = "auto",
        max_length: int | str | None = None,
        overlong: str = "error",
        truncation: bool | str | None = False,
        max_gen_toks: int | str = MAX_NEW_TOKENS,
        batch_size: int | str | None = "auto",
        max_batch_size: int | str | None = None,
        seed: int = 0,
        tokenizer: str | None = None,
        add_bos_token: bool | str | None = None,
        prefix_token_id: int | None = None,
        chat_template_args: dict[str, Any] | None = None,
        enable_thinking: bool | str | None = None,
        think_end_token: str | int | None = None,
        dtype: str | None = None,
        cache_dtype: str | None = None,
        mesh: str | None = None,
        weights: str | None = None,
        sparse: str = "auto",
        peft: str | None = None,
        device: str | None = None,
        **others: Any,
    ) -> None:
        super().__init__()
        check_device(device)
        mesh = take_mesh(mesh, others)
        check_arguments(others, _arguments())
        if overlong not in ("error", "left"):
            raise InputError(f"overlong must be error or left, got {shown(overlong)}")
        self.batch_size = _batch_size(batch_size)
        self._most_rows = _batch_size(max_batch_size) or MOST_ROWS
        self.max_length = None if max_length is None else parse_tokens(str(max_length))
        options: dict[str, Any] = {"dtype": dtype, "cache_dtype": cache_dtype, "mesh": mesh}
        options |= {"adapter": peft, "weights": weights, "sparse": sparse}
        opened = open_model(pretrained, dca=None, context=self.max_length, **options)
        llm = opened.llm
        if tokenizer is not None:
            read = load_tokenizer(find_folder(tokenizer, weights=False))
            llm = replace(llm, tokenizer=read)
        if llm.tokenizer is None:
            raise InputError(f"{tokenizer or pretrained} has no tokenizer, which lm-eval needs")
        method_by_name(method, llm.model.config, self.max_length or 1)
        check_room(
            llm.model.config,
            mesh_of(llm.model),
            context_length=self.max_length or 1,
            batch=1,
            dtype=llm.model.dtype,
            cache_dtype=llm.cache_dtype,
            weights=weights,
            sparse=llm.model.sparse,
        )
        self.llm = replace(opened.load(), tokenizer=llm.tokenizer)
        self.method, self.pretrained, self.seed = method, pretrained, seed
        self.tokenizer = self.llm.tokenizer
        self.max_gen_toks = parse_tokens(str(max_gen_toks))
        self.cuts = overlong == "left" or bool(truth("truncation", truncation))
        self._add_bos = truth("add_bos_token", add_bos_token)
        self._prefix_token_id = None if prefix_token_id is None else int(prefix_token_id)
        self._template_args = dict(chat_template_args or {})
        thinks = truth("enable_thinking", enable_thinking)
        if thinks is not None:
            self._template_args["enable_thinking"] = thinks
        self.think_end_token = think_end_token
        if isinstance(think_end_token, str) and think_end_token.isdecimal():
            self.think_end_token = int(think_end_token)
        folder = self._folder = find_folder(pretrained)
        named = (folder / "generation_config.json").is_file()
        self._generation_config = read_json(folder, "generation_config.json") if named else {}
        self._adapter, self._own_tokenizer = peft, tokenizer

    # --- the interface of lm-eval's base class ---

    def set_cache_hook(self, cache_hook: Any) -> None:
        """Sets the cache of `--use_cache`, whose keys do not identify the model.

        Raises:
            InputError: it has answers of another model, or of this one with other settings.
        """
        super().set_cache_hook(cache_hook)
        if cache_hook.dbdict is not None:
            adapter = None if self._adapter is None else Path(self._adapter)
            packed = packed_forms(self.llm.model)
            dtype, kept = self.llm.model.dtype, self.llm.cache_dtype
            sparse = self.llm.model.sparse
            claim_cache(
                cache_hook.dbdict,
                {
                    "model": fingerprint(self._folder, adapter),
                    "dtype": str(dtype) if kept == dtype else f"{dtype}, cache {kept}",
                    "method": self.method,
                    "tokenizer": self._own_tokenizer,
                    "max_length": [self.max_length, self.cuts],
                    "add_bos_token": self._add_bos,
                    "prefix_token_id": self._prefix_token_id,
                    "think_end_token": self.think_end_token,
                    **({"weights": packed} if packed else {}),
                    **({} if sparse is None else {"sparse": sparse.described}),
                },
            )

    @property
    def eot_token_id(self) -> int:
        """The id that ends a text."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """The first token of a text without a context: BOS, or else EOS."""
        if self._prefix_token_id is not None:
            return self._prefix_token_id
        return prefix_token(self.llm)

    @property
    def tokenizer_name(self) -> str:
        """A name for lm-eval's caches."""
        return self.pretrained.replace("/", "__")

    def tok_encode(
        self,
        string: str,
        add_special_tokens: bool | None = None,
        left_truncate_len: int | None = None,
        **kwargs: Any,
    ) -> list[int]:
        """A text's ids; by default with BOS if the tokenizer adds it and the text has none."""
        del kwargs
        if add_special_tokens is None:
            begun = string.startswith(self.tokenizer.decode([self.prefix_token_id]))
            add_special_tokens = self._add_bos is not False and not begun
        ids = encode(self.tokenizer, string, add_special_tokens=add_special_tokens)
        return ids[-left_truncate_len:] if left_truncate_len else ids

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A conversation in the model's chat template.

        A system message is omitted with a warning if the template does not support it.
        """
        try:
            return self._in_template(chat_history, add_generation_prompt)
        except InputError as error:
            rest = [message for message in chat_history if message["role"] != "system"]
            if len(rest) == len(chat_history):
                raise
            eval_logger.warning("%s; the system message is left out", error)
            return self._in_template(rest, add_generation_prompt)

    def _in_template(self, history: list[dict[str, str]], add_generation_prompt: bool) -> str:
        templates, template = self.llm.chat_templates, own_template(self.tokenizer)
        variables = {**self.tokenizer.special_tokens_map, **self._template_args}
        if not add_generation_prompt:
            return templates.write_open(template, variables, history)
        (text,) = templates.write(template, variables, history, [(len(history), True)])
        return text

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """As in lm-eval; a continuation that merges with its context begins where they differ."""
        context_ids, continuation_ids = super()._encode_pair(context, continuation)
        if continuation_ids:
            return context_ids, continuation_ids
        whole = self.tok_encode(context + continuation)
        pairs = zip(context_ids, whole, strict=False)
        same = next((n for n, (a, b) in enumerate(pairs) if a != b), len(whole))
        return whole[:same] or [self.prefix_token_id], whole[same:]

    def loglikelihood(
        self, requests: list[Any], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """ln p(continuation | context) of each, and whether greedy decoding gives it.

        Raises:
            InputError: an empty continuation, before anything is read.
        """
        for request in requests:
            context, continuation = request.args
            if not continuation and not context[len(context.rstrip()) :]:
                raise InputError(
                    "a request has an empty continuation, which cannot be scored: context "
                    f"{shown(context[-80:])}"
                )
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    # --- the three requests ---

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        """ln p(continuation | context) of each, and whether it is what greedy decoding gives."""
        del kwargs
        for pair, context, more in requests:
            if not context or not more:
                missing = "continuation" if context else "context to begin with"
                raise InputError(f"a request has no {missing}: {shown(pair)}")
        texts = [np.asarray([*context, *more], np.int32) for _, context, more in requests]
        texts = self._fitting(texts, [len(more) for _, _, more in requests], room=1)
        contexts = [len(t) - len(more) for t, (_, _, more) in zip(texts, requests, strict=True)]
        longest = max(map(len, texts), default=1)
        model = self._reading(longest).model
        share = not depends_on_length(model) and model.reading(longest).sparse is None
        groups = families(texts, contexts, share=share)
        scored = self._scores(texts, groups, "loglikelihood", disable_tqdm)
        results = []
        for (pair, _, more), scores in zip(requests, scored, strict=True):
            last = slice(len(scores.nll) - len(more), None)
            found = -float(scores.nll[last].sum(dtype=np.float64)), bool(scores.is_best[last].all())
            self.cache_hook.add_partial("loglikelihood", pair, found)
            results.append(found)
        return results

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """ln p of each whole text, in windows of `max_length` tokens; every token counts once."""
        windows, texts = [], []
        for number, request in enumerate(requests):
            (text,) = request.args
            tokens = joined(
                [self.prefix_token_id],
                np.asarray(self.tok_encode(text, add_special_tokens=False), np.int32),
            )
            if len(tokens) > 1:
                for window in make_windows("rolling", len(tokens), self.max_length or len(tokens)):
                    texts.append(tokens[window.start : window.stop])
                    windows.append((number, window.stop - window.first))
        totals = [0.0] * len(requests)
        groups = [Family(0, [number]) for number in range(len(texts))]
        scored = self._scores(texts, groups, "loglikelihood_rolling", disable_tqdm)
        for (number, counted), scores in zip(windows, scored, strict=True):
            totals[number] -= float(scores.nll[-counted:].sum(dtype=np.float64))
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The model's answer to each context, up to the first of the task's stop strings."""
        wanted, prompts = [], []
        for request in requests:
            context, kwargs = request.args
            try:
                normal = normalize_gen_kwargs(kwargs, self.max_gen_toks)
            except (TypeError, ValueError, OverflowError) as error:
                raise InputError(f"generation_kwargs {shown(kwargs)}: {error}") from None
            wanted.append(read_generation_kwargs(normal, self._generation_config))
            prompts.append(np.asarray(self.tok_encode(context), np.int32))
        prompts = self._fitting(prompts, [one.max_new_tokens for one in wanted], answered=True)
        texts = [""] * len(requests)
        # Longest first, requests with equal options together.
        order = sorted(range(len(requests)), key=lambda n: (repr(wanted[n]), -len(prompts[n])))
        with tqdm(total=len(order), desc="generate_until", disable=disable_tqdm) as bar:
            while order:
                how = wanted[order[0]]
                length = len(prompts[order[0]]) + how.max_new_tokens
                batch = [n for n in order[: self._batch_of(length)] if wanted[n] == how]
                said = self._reading(length).generate(
                    [prompts[number] for number in batch],
                    max_new_tokens=how.max_new_tokens,
                    stop=how.until,
                    sampler=how.sampler,
                    # A different seed for each batch; the engine derives one for each of its rows.
                    seed=(self.seed + len(requests) - len(order)) % 2**31,
                    progress=False,
                )
                order = order[len(batch) :]
                for number, answer in zip(batch, said, strict=True):
                    texts[number] = self._answer(answer.tokens, how)
                    self.cache_hook.add_partial(
                        "generate_until", requests[number].args, texts[number]
                    )
                bar.update(len(batch))
        return texts

    # --- helpers ---

    def _answer(self, tokens: Sequence[int], how: Wanted) -> str:
        """The text of an answer's tokens, as in lm-eval's own models."""
        mark = self.think_end_token
        thought = [n for n, token in enumerate(tokens) if token == mark]
        text = self.tokenizer.decode(
            list(tokens[thought[-1] + 1 :] if thought else tokens), skip_special_tokens=True
        )
        return postprocess_generated_text(
            text.lstrip() if isinstance(mark, int) else text,
            list(how.until),
            mark if isinstance(mark, str) else None,
        )

    def _reading(self, length: int) -> LLM:
        """The model with the method set for texts of this length."""
        return reading(self.llm, self.method, length)

    def _batch_of(self, length: int) -> int:
        """Batch size for requests of `length` tokens; few sizes, because each is compiled."""
        if self.batch_size is not None:
            return self.batch_size
        fit = max(1, min(self._most_rows, TOGETHER // length))
        return 1 << (fit.bit_length() - 1)

    def _fitting(
        self,
        texts: list[np.ndarray],
        needed: list[int],
        *,
        room: int = 0,
        answered: bool = False,
    ) -> list[np.ndarray]:
        """The texts, truncated on the left as required by `max_length` and `cuts`.

        Args:
            needed: tokens that are never cut: a continuation at the end of its text, or new tokens
                after it (`answered`).
            room: tokens beyond `max_length` that are only predicted, and not read.

        Raises:
            InputError: a text is too long and must not be cut, or only `needed` tokens would be
                left.
        """
        if self.max_length is None:
            return texts
        most, fitting, overlong = self.max_length + room, [], 0
        for text, need in zip(texts, needed, strict=True):
            length = len(text) + need * answered
            kept = most - need * answered
            if length <= most:
                fitting.append(text)
                continue
            overlong += 1
            if not self.cuts or kept <= need * (not answered):
                worst = max(
                    len(text) + need * answered for text, need in zip(texts, needed, strict=True)
                )
                raise InputError(
                    f"a request needs {worst - room} tokens, and max_length is {self.max_length}; "
                    "give a larger one in --model_args, or overlong=left to cut such requests "
                    "from the left"
                )
            fitting.append(text[-kept:])
        if overlong:
            eval_logger.warning(
                "%d of %d requests were longer than max_length=%d and have been cut from the left",
                overlong,
                len(texts),
                self.max_length,
            )
        return fitting

    def _scores(
        self,
        texts: Sequence[np.ndarray],
        groups: Sequence[Family],
        name: str,
        disable_tqdm: bool,
    ) -> list[Scores]:
        """The scores of each text after the part that it shares with its group.

        Groups are read longest first and in batches; groups of one text are separate.
        """

        def length_of(group: Family) -> int:
            return max(len(texts[number]) for number in group.members)

        found: dict[int, Scores] = {}
        reader: Reader | None = None
        with tqdm(total=len(texts), desc=name, disable=disable_tqdm) as bar:
            for alone in (False, True):
                some = [group for group in groups if (len(group.members) == 1) == alone]
                some.sort(key=length_of, reverse=True)
                while some:
                    length = length_of(some[0])
                    size = min(self._batch_of(length), len(groups))
                    batch, some = some[:size], some[size:]
                    fits = reader is not None and length <= reader.capacity < 2 * length
                    if reader is None or not fits or reader.batch != size:
                        kept = self.llm.cache_dtype
                        model = self._reading(length).model
                        reader = Reader(model, size, length, cache_dtype=kept)
                    scored = reader.read_branches([_branches(texts, group) for group in batch])
                    for group, scores in zip(batch, scored, strict=True):
                        found |= dict(zip(group.members, scores, strict=True))
                        bar.update(len(scores))
        return [found[number] for number in range(len(texts))]


def _branches(texts: Sequence[np.ndarray], group: Family) -> Branches:
    shared = group.shared
    first = texts[group.members[0]][:shared]
    return Branches(first, [texts[number][shared:] for number in group.members])


def _arguments() -> list[str]:
    parameters = inspect.signature(DcaJaxLM.__init__).parameters
    return [name for name in parameters if name not in ("self", "others", "device")]


def _batch_size(given: int | str | None) -> int | None:
    """The batch size; None for automatic.

    Raises:
        InputError: it is neither a positive number nor "auto", with or without a number.
    """
    text = str(given)
    if given is None or text == "auto" or re.fullmatch(r"auto:\d+(\.\d+)?", text):
        return None
    if not text.isdecimal() or int(text) < 1:
        raise InputError(f"batch_size must be a positive number, or auto, got {shown(given)}")
    return int(text)
