"""A model for EleutherAI's lm-evaluation-harness: LongBench, RULER, SCROLLS and all other tasks.

    python -m dca_jax.lm_eval run --model dca_jax --tasks ruler --model_args \\
        pretrained=./Llama-2-7b-hf,method=dca,max_length=32768

is lm-eval's own command, which then knows this model; a program of one's own imports this module.
(lm-eval finds its models by name in its own list only.)

`max_length` has nothing to do with the length the model was trained on: it bounds what may be
asked, and a request beyond it is refused. lm-eval's own models cut such a request from the left,
and do not say so in their results. `loglikelihood_rolling` reads windows of `max_length` tokens,
without one each document whole. Its tokens come without the BOS that the tokenizer would add, for
lm-eval puts one before them (its own model for transformers, as of 0.4.13, so has two).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from dca_jax.errors import InputError
from dca_jax.evaluation.texts import encode, joined, prefix_token
from dca_jax.evaluation.windows import make_windows
from dca_jax.inference import tokenizer
from dca_jax.inference.chat_templates import own_template
from dca_jax.inference.llm import LLM
from dca_jax.inference.load import load
from dca_jax.inference.methods import method_by_name, reading
from dca_jax.inference.sampling import Sampler
from dca_jax.inference.score import Reader, Scores
from dca_jax.lengths import parse_tokens

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import normalize_gen_kwargs
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "dca_jax.lm_eval needs lm-evaluation-harness: pip install 'dca_jax[eval]'"
    ) from error

MAX_NEW_TOKENS = 256  # where a task says nothing, as in lm-eval's own models
TOGETHER = 16_384  # tokens of a batch, where its size is left open


@register_model("dca_jax")
class DcaJaxLM(TemplateLM):
    """A model of this package, as lm-eval calls it.

    Args:
        pretrained: a folder, or a name on the Hugging Face Hub (`dca_jax.load`).
        method: how to read, a name that `dca_jax.inference.methods` knows. What depends on the
            length of a text is given that of the longest of a batch, in whole trained lengths.
        max_length: tokens of a request at most (32768, or "32k"), its answer included; None: what
            fits into memory.
        max_gen_toks: new tokens where the task does not say.
        batch_size: requests read together; "auto" for as many as 16k tokens hold.
        dtype, mesh: as in `dca_jax.load`.
        max_batch_size, device: lm-eval gives them to every model; they change nothing here.

    Raises:
        InputError: what `dca_jax.load` and `dca_jax.inference.methods` refuse, or a model without
            tokenizer.
    """

    def __init__(
        self,
        pretrained: str,
        *,
        method: str = "auto",
        max_length: int | str | None = None,
        max_gen_toks: int | str = MAX_NEW_TOKENS,
        batch_size: int | str | None = "auto",
        dtype: str | None = None,
        mesh: str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
    ) -> None:
        super().__init__()
        del max_batch_size, device
        self.llm = load(pretrained, dca=None, dtype=dtype, mesh=mesh)
        if self.llm.tokenizer is None:
            raise InputError(f"{pretrained} has no tokenizer, which lm-eval needs")
        self.method, self.pretrained = method, pretrained
        self.tokenizer = self.llm.tokenizer
        self.max_length = None if max_length is None else parse_tokens(str(max_length))
        self.max_gen_toks = parse_tokens(str(max_gen_toks))
        self.batch_size = None if batch_size in (None, "auto") else int(batch_size)
        self._in_chat = False
        method_by_name(method, self.llm.model.config, self.max_length or 1)

    # --- what lm-eval's base class asks for ---

    @property
    def eot_token_id(self) -> int:
        """The id that ends a text."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without a context: BOS, or else EOS."""
        return prefix_token(self.llm)

    @property
    def tokenizer_name(self) -> str:
        """For the names of lm-eval's caches."""
        return self.pretrained.replace("/", "__")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """A text's ids; unless told, with the special tokens that it does not have yet.

        A conversation has all that its template gives it, as everywhere in transformers: so after
        `apply_chat_template` none are added. (lm-eval's own model adds a BOS that is not there.)
        """
        del kwargs
        bos = getattr(self.tokenizer, "bos_token", None)
        if add_special_tokens is None:
            add_special_tokens = not self._in_chat and not (bos and string.startswith(bos))
        return tokenizer.encode(self.tokenizer, string, add_special_tokens=add_special_tokens)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A conversation as the model's chat template writes it; from now on, prompts are such."""
        self._in_chat = True
        template, variables = own_template(self.tokenizer), self.tokenizer.special_tokens_map
        templates = self.llm.chat_templates
        if not add_generation_prompt:
            return templates.write_open(template, variables, chat_history)
        (text,) = templates.write(template, variables, chat_history, [(len(chat_history), True)])
        return text

    # --- the three requests ---

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        """ln p(continuation | context) of each, and whether it is what greedy decoding gives."""
        del kwargs
        texts = [np.asarray([*context, *more], np.int32) for _, context, more in requests]
        results = []
        for (pair, _, more), scores in zip(
            requests, self._scores(texts, "loglikelihood", disable_tqdm), strict=True
        ):
            if len(more) > len(scores.nll):
                raise InputError(f"a request has no context to begin with: {pair!r:.200}")
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
            tokens = joined([self.prefix_token_id], np.asarray(encode(self.llm, text), np.int32))
            if len(tokens) > 1:
                for window in make_windows("rolling", len(tokens), self.max_length or len(tokens)):
                    texts.append(tokens[window.start : window.stop])
                    windows.append((number, window.stop - window.first))
        totals = [0.0] * len(requests)
        scored = self._scores(texts, "loglikelihood_rolling", disable_tqdm, room=1)
        for (number, counted), scores in zip(windows, scored, strict=True):
            totals[number] -= float(scores.nll[-counted:].sum(dtype=np.float64))
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """What the model says after each context, up to the first of the task's stop strings."""
        jobs = []
        for number, request in enumerate(requests):
            context, options = request.args
            wanted = dict(normalize_gen_kwargs(options, self.max_gen_toks))
            jobs.append((self.tok_encode(context), wanted, number))
        texts = [""] * len(requests)
        # Longest first, alike options together.
        jobs.sort(key=lambda job: (repr(sorted(job[1].items(), key=str)), -len(job[0])))
        with tqdm(total=len(jobs), desc="generate_until", disable=disable_tqdm) as bar:
            while jobs:
                prompt, options, _ = jobs[0]
                length = len(prompt) + options["max_gen_toks"]
                self._check_length(length)
                size = self._batch_of(length)
                batch = [job for job in jobs[:size] if job[1] == options]
                jobs = jobs[len(batch) :]
                said = self._reading(length).generate(
                    [prompt for prompt, _, _ in batch],
                    max_new_tokens=options["max_gen_toks"],
                    stop=[stop for stop in options["until"] if stop],
                    sampler=_sampler(options),
                    progress=False,
                )
                for (_, _, number), answer in zip(batch, said, strict=True):
                    texts[number] = answer.text
                    self.cache_hook.add_partial(
                        "generate_until", requests[number].args, answer.text
                    )
                bar.update(len(batch))
        return texts

    # --- how ---

    def _reading(self, length: int) -> LLM:
        """The model, reading texts of so many tokens by the method."""
        return reading(self.llm, self.method, length)

    def _batch_of(self, length: int) -> int:
        return self.batch_size or max(1, min(64, TOGETHER // length))

    def _check_length(self, length: int, room: int = 0) -> None:
        if self.max_length is not None and length > self.max_length + room:
            raise InputError(
                f"a request needs {length} tokens, and max_length is {self.max_length}; give a "
                "larger one in --model_args, for nothing is cut in silence here"
            )

    def _scores(
        self, texts: Sequence[np.ndarray], name: str, disable_tqdm: bool, room: int = 0
    ) -> list[Scores]:
        """The scores of texts of any length, read longest first and a batch at a time.

        Args:
            room: tokens beyond `max_length` that are only predicted, and not read.
        """
        order = sorted(range(len(texts)), key=lambda number: -len(texts[number]))
        found: dict[int, Scores] = {}
        reader: Reader | None = None
        with tqdm(total=len(texts), desc=name, disable=disable_tqdm) as bar:
            while len(found) < len(texts):
                length = len(texts[order[len(found)]])
                self._check_length(length, room)
                size = min(self._batch_of(length), len(texts))
                batch = order[len(found) : len(found) + size]
                if reader is None or reader.batch != size or 2 * length < reader.capacity:
                    reader = Reader(self._reading(length).model, size, length)
                scored = reader.read([texts[number] for number in batch])
                found |= dict(zip(batch, scored, strict=True))
                bar.update(len(batch))
        return [found[number] for number in range(len(texts))]


def _sampler(options: dict[str, Any]) -> Sampler:
    """Greedy unless the task asks to draw."""
    if not options.get("do_sample"):
        return Sampler()
    return Sampler(
        temperature=float(options.get("temperature") or 1.0),
        top_k=options.get("top_k"),
        top_p=options.get("top_p"),
        min_p=options.get("min_p"),
    )
