"""Named arguments from lm-eval: `--model_args`, and the `generation_kwargs` of tasks.

Users know the arguments of lm-eval's own model for transformers, `HFLM`. Each one has the same
meaning here or is rejected by name; none is ignored.
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

LM_EVAL_DEVICE = "cuda:0"  # the default of lm-eval's --device
OWNER = "dca_jax"  # a cache's key for its owner; lm-eval's own keys are checksums
OFF = (None, False, "", "False", "false", "None", "none")  # as written in --model_args

# Unsupported arguments of HFLM, and what to do instead.
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
    """Raises InputError for an argument of `--model_args` that is neither `known` nor disabled."""
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
    """The mesh, rejoined with axes that --model_args has split at commas: "context=2,tensor=4"."""
    axes = [f"{axis}={given.pop(axis)}" for axis in AXES if axis in given]
    return ",".join([*([mesh] if mesh else []), *axes]) or None


def check_device(device: str | None) -> None:
    """Raises InputError for any device but JAX's.

    lm-eval passes its `--device` to every model, with PyTorch's names. JAX chooses its devices when
    it starts, so another one cannot be selected here. lm-eval's default is `cuda:0`: without a GPU,
    a warning names the device in use.
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
    """Records the owner of an empty cache, or compares it with the recorded one.

    Raises:
        InputError: the owner is another one, or answers have no owner.
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
    """Parses True, False or None, which a command line passes as text.

    Raises:
        InputError: the value is anything else.
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
    """Options for answering a request; requests with equal options can be batched.

    Attributes:
        max_new_tokens: maximum number of new tokens.
        until: strings that end the answer.
        sampler: sampling parameters.
    """

    max_new_tokens: int
    until: tuple[str, ...]
    sampler: Sampler


_DRAWING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


def read_generation_kwargs(
    kwargs: Mapping[str, Any], checkpoint: Mapping[str, Any] | None = None
) -> Wanted:
    """A task's options, with the defaults of transformers' `generate`.

    Args:
        kwargs: options as returned by lm-eval's `normalize_gen_kwargs`.
        checkpoint: the checkpoint's generation_config.json, with the task's defaults, as in
            transformers. Without either, sampling is among the 50 most likely tokens.

    Raises:
        InputError: an option is not supported, or a value is invalid.
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
    """As in transformers: 50 by default, and 0 for all tokens."""
    if given is None:
        return 50
    return given or None
