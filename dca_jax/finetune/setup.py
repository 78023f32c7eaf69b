"""What is to be trained: settings, model, tokenizer and mesh, before any weight is read."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

from dca_jax.config import LlamaConfig, LoraConfig
from dca_jax.dca import DCAConfig
from dca_jax.finetune.settings import Settings
from dca_jax.finetune.train import Params
from dca_jax.model import Llama
from dca_jax.weights.parameters import Shardings
from dca_jax.weights.placement import parameter_shardings


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What is to be trained, before any weight is read.

    Attributes:
        folder: of the checkpoint to begin with. mesh: None is one device.
        chat_template: of the dialogues, if it is not the tokenizer's own.
        dca: None is plain attention. lora: None trains all weights.
        implementation: of the attention; None is the best on the device.
    """

    settings: Settings
    folder: Path
    config: LlamaConfig
    tokenizer: Any
    chat_template: str | None
    dca: DCAConfig | None
    lora: LoraConfig | None
    mesh: Mesh | None
    implementation: str | None = None

    @property
    def sharding(self) -> Shardings:
        """Where the parameters go."""
        if self.mesh is None:
            return None
        return parameter_shardings(self.config, self.mesh, lora=self.lora)

    @property
    def pad_id(self) -> int:
        """What fills up a row; it is never read."""
        pad = self.tokenizer.pad_token_id
        return 0 if pad is None else pad

    def build(self, params: Params) -> Llama:
        """The model around parameters, for a step of training."""
        return Llama.from_params(
            self.config,
            params,
            dca=self.dca,
            dtype=jnp.dtype(self.settings.dtype),
            implementation=self.implementation,
            remat=self.settings.remat,
            lora=self.lora,
        )
