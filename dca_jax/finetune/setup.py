"""The setup of a run (settings, model, tokenizer and mesh) before any weight is read."""

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
    """The setup of a run before any weight is read.

    Attributes:
        folder: folder of the checkpoint to start from.
        mesh: the mesh; None for one device.
        chat_template: template of the dialogues, if it is not the tokenizer's own.
        dca: the DCA setting; None for plain attention.
        lora: the adapters; None to train all weights.
        implementation: attention implementation; None picks the best on the device.
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
        """The sharding of the parameters."""
        if self.mesh is None:
            return None
        return parameter_shardings(self.config, self.mesh, lora=self.lora)

    @property
    def pad_id(self) -> int:
        """The token id for padding; it is never read."""
        pad = self.tokenizer.pad_token_id
        return 0 if pad is None else pad

    def build(self, params: Params) -> Llama:
        """The model with the given parameters, for a training step."""
        return Llama.from_params(
            self.config,
            params,
            dca=self.dca,
            dtype=jnp.dtype(self.settings.dtype),
            implementation=self.implementation,
            remat=self.settings.remat,
            lora=self.lora,
        )
