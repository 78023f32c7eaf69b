"""Generation as one jitted function: prompts in, tokens out, nothing in between.

python examples/jitted_generation.py MODEL "Once upon a time" "The little dog"

`llm.generate` does this for you, piece by piece and with text. This is for scripts that want the
whole loop to run on the device.
"""

import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
import typer
from jaxtyping import Array, Int

import dca_jax
from dca_jax import KVCache, Llama, Sampler
from dca_jax.inference.buckets import capacity_bucket
from dca_jax.inference.compiled import compiler_options
from dca_jax.inference.steps import PAD, decode, first_token, read


@functools.partial(jax.jit, static_argnames="new_tokens", compiler_options=compiler_options())
def complete(
    model: Llama,
    prompts: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    stop_ids: Int[Array, " n"],
    sampler: Sampler,
    seed: int,
    *,
    new_tokens: int,
) -> Int[Array, "B new_tokens"]:
    """Each row's new tokens, with PAD after a stop id; `prompts` are right-padded to one width."""
    batch, width = prompts.shape
    capacity = capacity_bucket(width + new_tokens)
    cache = KVCache.create(model.config, batch=batch, capacity=capacity, dtype=model.dtype)
    hidden = jnp.zeros((batch, model.config.hidden_size), model.dtype)
    hidden, cache = read(model, cache, hidden, prompts, lengths, lengths)
    keys = jax.random.split(jax.random.key(seed), batch)
    state = first_token(model.unembed(hidden), cache, keys, sampler, stop_ids)
    first = state.token
    _, rest = decode(model, state, sampler, stop_ids, new_tokens - 1, max_tokens=new_tokens - 1)
    return jnp.concatenate([first[:, None], rest], axis=1)


def main(model: str, prompts: list[str], new_tokens: int = 64, temperature: float = 0.0) -> None:
    """Completes PROMPTS twice, to show how long compiling took."""
    llm = dca_jax.load(model)
    rows = [llm.tokenize(prompt) for prompt in prompts]
    lengths = [len(row) for row in rows]
    padded = np.zeros((len(rows), max(lengths)), np.int32)
    for number, row in enumerate(rows):
        padded[number, : len(row)] = row
    arguments = jnp.asarray(padded), jnp.asarray(lengths), jnp.asarray(sorted(llm.stop_ids))
    for _ in range(2):
        begin = time.perf_counter()
        tokens = complete(
            llm.model, *arguments, Sampler(temperature=temperature), 0, new_tokens=new_tokens
        )
        tokens.block_until_ready()
        print(f"{time.perf_counter() - begin:.2f} s")
    for prompt, row in zip(prompts, np.asarray(tokens), strict=True):
        print(prompt + llm.tokenizer.decode(row[row != PAD], skip_special_tokens=True))


if __name__ == "__main__":
    typer.run(main)
