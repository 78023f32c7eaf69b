"""lm-eval's own command with the model "dca_jax": `python -m dca_jax.lm_eval run ...`."""

import os
import sys

from lm_eval.__main__ import cli_evaluate

import dca_jax.lm_eval  # noqa: F401  (registers the model)
from dca_jax.distributed import exit_on_input_error
from dca_jax.lm_eval.output import output_checked

# Only its tokenizers are used, so its warning about missing PyTorch is irrelevant.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

if __name__ == "__main__":
    with exit_on_input_error(), output_checked(sys.argv[1:]):
        cli_evaluate()
