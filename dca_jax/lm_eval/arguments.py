"""What lm-eval hands over by name: `--model_args`, and the `generation_kwargs` of tasks.

Those of lm-eval's own model for transformers, `HFLM`, are what its users know. Each is taken in its
meaning there, or refused by name; none is dropped in silence.
"""

import difflib
import logging
from collections.abc import Collection, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

import jax

from dca_jax.errors import InputError
from dca_jax.fields import shown
from dca_jax.inference.sampling import Sampler
from dca_jax.sharding import AXES

log = logging.getLogger(__name__)

LM_EVAL_DEVICE = "cuda:0"  # what lm-eval's command passes where --device is not given
OWNER = "dca_jax"  # the key of a cache that tells whose it is; lm-eval's own are checksums
OFF = (None, False, "", "False", "false", "None", "none")  # as --model_args writes them

# Arguments of HFLM that mean nothing here, and what to do instead.
_INSTEAD = {
    "kv_cache_dtype": "give cache_dtype, int8 or fp8",
    "backend": "",
    "revision": "download the revision you want, and give its folder",
    "subfolder": "give the folder itself",
    "use_fast_tokenizer": "",
    "trust_remote_code": "code from a checkpoint is never run; leave it out",
    "logits_cache": "",
    "softmax_dtype": "log-likelihoods are always computed in float32",
    "mixed_precision_dtype": "give dtype",
    "parallelize": "give a mesh, as mesh=tensor=4",
    "tp_plan": "give a mesh, as mesh=tensor=4",
    "max_memory_per_gpu": "",
    "max_cpu_memory": "",
    "offload_folder": "",
    "delta": "add the delta to its model first",
    "load_in_8bit": "give weights=int8",
    "load_in_4bit": "give weights=int4",
    "autogptq": "",
    "gptqmodel": "",
    "gguf_file": "give the file itself as pretrained",
}
_HARMLESS = {"revision": "main", "backend": "causal", "logits_cache": "True", "subfolder": ""}


def check_arguments(given: Mapping[str, Any], known: Collection[str]) -> None:
    """Raises InputError for an argument of `--model_args` that is not `known` and not off."""
    for name, value in given.items():
        if value in OFF or str(value) == _HARMLESS.get(name):
            continue
        if name in _INSTEAD:
            reason = _INSTEAD[name] or "it does not exist for this model; leave it out"
            raise InputError(f"{name}={shown(value, quote=False)} is not supported: {reason}")
        near = difflib.get_close_matches(name, known, n=1)
        meant = f"did you mean {near[0]}?" if near else f"expected some of {', '.join(known)}"
        raise InputError(
            f"there is no model argument {shown(name, quote=False)!r}; {meant} (a value that holds "
            'commas is given as JSON: --model_args \'{"method": "dca:192k,256k"}\')'
        )


def take_mesh(mesh: str | None, given: dict[str, Any]) -> str | None:
    """The mesh, with the axes that --model_args has cut off at commas: "context=2,tensor=4"."""
    axes = [f"{axis}={given.pop(axis)}" for axis in AXES if axis in given]
    return ",".join([*([mesh] if mesh else []), *axes]) or None


def check_device(device: str | None) -> None:
    """Raises InputError for another device than the one that JAX computes on.

    lm-eval passes its `--device` to every model, in PyTorch's words. JAX chooses its devices when
    it starts, so another one cannot be had here, and must not be promised. lm-eval's default,
    `cuda:0`, is what its command passes when nobody asked: where there is no GPU a line says what
    computes.
    """
    if device is None:
        return
    kind, _, number = str(device).partition(":")
    platform = jax.default_backend()
    if device == LM_EVAL_DEVICE and platform != "gpu":
        log.warning("device=%s is lm-eval's default; JAX computes on %s", device, platform)
        return
    if {"cuda": "gpu"}.get(kind, kind) != platform:
        raise InputError(
            f"device={shown(device, quote=False)} was asked for, and JAX computes on {platform}; "
            "leave it out, or set JAX_PLATFORMS before the program starts (an NVIDIA GPU needs "
            "dca_jax[cuda13])"
        )
    if number not in ("", "0"):
        raise InputError(
            f"device={shown(device, quote=False)} was asked for, and a model takes the first "
            "device or those of its mesh; choose others with CUDA_VISIBLE_DEVICES, or give a mesh"
        )


def claim_cache(answers: MutableMapping[str, Any], owner: Mapping[str, Any]) -> None:
    """Notes whose answers an empty cache is to have, or compares with what has been noted.

    Raises:
        InputError: another owner, or answers of nobody known.
    """
    if len(answers) == 0:
        answers[OWNER] = dict(owner)
    noted = answers.get(OWNER)
    if noted != dict(owner):
        theirs = noted if isinstance(noted, Mapping) else {}
        different = ", ".join(name for name in owner if theirs.get(name) != owner[name])
        raise InputError(
            "the file of --use_cache has answers of another model, or of this one read in another "
            f"way (different: {different}); give another file"
        )


def truth(name: str, value: Any) -> bool | None:
    """True, False or None of an argument, which a command line gives as text.

    Raises:
        InputError: anything else.
    """
    if value in (None, "None", "none"):
        return None
    if value in (True, "True", "true"):
        return True
    if value in (False, "False", "false"):
        return False
    raise InputError(f"{name} must be True or False, got {shown(value)}")


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """How a request is to be answered; requests that are equal in this may be answered together.

    Attributes:
        max_new_tokens: at most so many.
        until: strings that end the answer.
        sampler: how tokens are drawn.
    """

    max_new_tokens: int
    until: tuple[str, ...]
    sampler: Sampler


_DRAWING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


def read_generation_kwargs(
    kwargs: Mapping[str, Any], checkpoint: Mapping[str, Any] | None = None
) -> Wanted:
    """What a task asks for, with the defaults of transformers' `generate`.

    Args:
        kwargs: as lm-eval's `normalize_gen_kwargs` returns them.
        checkpoint: its generation_config.json, whose values stand where the task has none, as in
            transformers. Without either a draw is among the 50 likeliest tokens.

    Raises:
        InputError: an option that does not exist here, or a value that makes no sense.
    """
    known = ("until", "max_gen_toks", "do_sample", *_DRAWING)
    for name, value in kwargs.items():
        off = value in (None, False) or (name in ("num_beams", "num_return_sequences", "use_cache"))
        if name in known or (off and value in (None, False, 1, True)):
            continue
        near = difflib.get_close_matches(name, known, n=1)
        meant = f"; did you mean {near[0]}?" if near else ""
        raise InputError(
            f"generation option {shown(name, quote=False)}={shown(value)} is not supported{meant} "
            f"(supported: {', '.join(known)})"
        )
    until = [stop for stop in kwargs["until"] if stop is not None]
    if not all(isinstance(stop, str) for stop in until):
        raise InputError(f"until must hold strings, got {shown(until)}")
    fixed = dict(checkpoint or {})
    chosen = {
        name: kwargs.get(name) if kwargs.get(name) is not None else fixed.get(name)
        for name in _DRAWING
    }
    penalty = 1.0 if chosen["repetition_penalty"] is None else chosen["repetition_penalty"]
    if not truth("do_sample", kwargs.get("do_sample")) or kwargs.get("temperature") == 0:
        sampler = Sampler(repetition_penalty=penalty)
    else:
        sampler = Sampler(
            temperature=1.0 if chosen["temperature"] is None else chosen["temperature"],
            top_k=_top_k(chosen["top_k"]),
            top_p=chosen["top_p"],
            min_p=chosen["min_p"],
            repetition_penalty=penalty,
        )
    return Wanted(
        max_new_tokens=kwargs["max_gen_toks"],
        until=tuple(stop for stop in until if stop),
        sampler=sampler,
    )


def _top_k(given: Any) -> int | None:
    """transformers draws among 50 unless told, and among all with 0."""
    if given is None:
        return 50
    return given or None
