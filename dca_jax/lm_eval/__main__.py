"""lm-eval's own command, which knows the model "dca_jax": `python -m dca_jax.lm_eval run ...`."""

import os

from lm_eval.__main__ import cli_evaluate

import dca_jax.lm_eval  # noqa: F401  (registers the model)
from dca_jax.distributed import exit_on_input_error

# Only its tokenizers are used, so nobody needs to be told that there is no PyTorch.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

if __name__ == "__main__":
    with exit_on_input_error():
        cli_evaluate()
