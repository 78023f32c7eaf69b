"""A model's shape, read from any Hugging Face `config.json` of the Llama family."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from dca_jax import fields
from dca_jax.dca import DCAConfig, SparseConfig, preset_dca
from dca_jax.errors import InputError
from dca_jax.rope import RopeConfig

CONFIG = "config.json"

# The projections of a layer that LoRA can adapt.
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, kw_only=True)
class MixtureConfig:
    """Experts in place of a layer's MLP; a router chooses some of them for each token.

    Attributes:
        num_experts: number of experts in each layer.
        num_experts_per_tok: number of experts chosen for each token.
        moe_intermediate_size: inner width of an expert, in elements.
        norm_topk_prob: whether the weights of the chosen experts are normalized to add up to 1.
        dense_layers: numbers of the layers that have an MLP instead, ascending.
        router_aux_loss_coef: coefficient of the load-balancing loss in finetuning.
    """

    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    norm_topk_prob: bool = True
    dense_layers: tuple[int, ...] = ()
    router_aux_loss_coef: float = 0.001

    def __post_init__(self) -> None:
        for name in ("num_experts", "num_experts_per_tok", "moe_intermediate_size"):
            if fields.integer(vars(self), name, "a mixture of experts") is None:
                raise InputError(f"a mixture of experts needs {name}")
        if self.num_experts_per_tok > self.num_experts:
            raise InputError(
                f"num_experts_per_tok ({self.num_experts_per_tok}) must not exceed num_experts "
                f"({self.num_experts})"
            )
        fields.number(vars(self), "router_aux_loss_coef", "a mixture of experts", least=0)


@dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """Shape of a Llama-family decoder. Names are Hugging Face's; sizes are numbers of elements.

    Attributes:
        qkv_bias, o_bias, mlp_bias: which projections have a bias (Qwen2: q, k and v only).
        qk_norm: whether each head's query and key are RMS-normalized before rotation (Qwen3).
        mixture: the mixture of experts in some or all layers; None for an MLP in every layer.
        sliding_window: number of keys that a token can attend to in the model's own plain attention
            (Mistral v0.1); None for all. DCA replaces it; plain attention refuses longer texts.
        max_position_embeddings: maximum number of tokens according to the checkpoint: the trained
            length (`trained_length`), or more if its RoPE scaling or DCA extends it.
        max_sequence_length: the trained length of models finetuned with FastChat (Vicuna 16k),
            which do not change `max_position_embeddings`; None for all others.
        dca: the checkpoint's own setting (`dual_chunk_attention_config`), or None.
        sparse_attention: the checkpoint's own setting of sparse attention, or None.
        eos_token_ids: all ids that end a text (Llama 3 has several).
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-6
    rope: RopeConfig = RopeConfig()
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    mixture: MixtureConfig | None = None
    sliding_window: int | None = None
    dca: DCAConfig | None = None
    sparse_attention: SparseConfig | None = None
    model_type: str = "llama"
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None
    max_sequence_length: int | None = None

    def __post_init__(self) -> None:
        sizes = (
            "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads "
            "num_key_value_heads head_dim max_position_embeddings"
        ).split()
        for name in sizes:
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value <= fields.LARGEST:
                raise InputError(
                    f"{name} must be a positive integer of at most {fields.LARGEST}, got "
                    f"{fields.shown(value)}"
                )
        fields.integer(vars(self), "max_sequence_length", "a model's config")
        if self.head_dim % 2:
            raise InputError(f"head_dim must be even (RoPE rotates pairs), got {self.head_dim}")
        if self.head_dim == 2 and self.rope.rope_type == "dynamic":
            raise InputError("rope_type 'dynamic' needs a head_dim of at least 4, got 2")
        if self.num_attention_heads % self.num_key_value_heads:
            raise InputError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of "
                f"num_key_value_heads ({self.num_key_value_heads})"
            )
        fields.number(vars(self), "rms_norm_eps", "a model's config", above=0)
        if self.model_type not in FAMILIES:
            raise InputError(
                f"model_type {self.model_type!r} is not supported; expected one of "
                f"{', '.join(FAMILIES)}"
            )
        if self.sliding_window is not None and self.sliding_window < 1:
            raise InputError(f"sliding_window must be positive or null, got {self.sliding_window}")
        if self.mixture is not None:
            self._check_dense_layers(self.mixture.dense_layers)

    def _check_dense_layers(self, dense: tuple[int, ...]) -> None:
        layers = range(self.num_hidden_layers)
        if list(dense) != sorted(set(dense)) or not all(n in layers for n in dense):
            raise InputError(
                f"dense_layers must be ascending numbers of the {len(layers)} layers, got "
                f"{fields.shown(list(dense))}"
            )
        if len(dense) == len(layers):
            raise InputError(
                "a mixture of experts needs at least one layer that is not in dense_layers"
            )

    @property
    def untied(self) -> bool:
        """Whether the unembedding is a separate matrix."""
        return not self.tie_word_embeddings

    @property
    def dense_layers(self) -> Sequence[int]:
        """Numbers of the layers that have an MLP, ascending."""
        return range(self.num_hidden_layers) if self.mixture is None else self.mixture.dense_layers

    @property
    def sparse_layers(self) -> tuple[int, ...]:
        """Numbers of the layers that have a mixture of experts, ascending."""
        if self.mixture is None:
            return ()
        dense = set(self.mixture.dense_layers)
        return tuple(n for n in range(self.num_hidden_layers) if n not in dense)

    @property
    def has_mlp(self) -> bool:
        """Whether any layer has an MLP."""
        return bool(self.dense_layers)

    @property
    def qwen_experts(self) -> bool:
        """Whether the experts' parameters have Qwen's names."""
        return self.mixture is not None and self.model_type != "mixtral"

    @property
    def mixtral_experts(self) -> bool:
        """Whether the experts' parameters have Mixtral's names."""
        return self.mixture is not None and self.model_type == "mixtral"

    @property
    def trained_length(self) -> int:
        """c, the number of tokens that the model was trained to read at their true positions.

        `max_position_embeddings` may be larger, if DCA or YaRN extends the model without training.
        So the trained length is the first of these that config.json has:

        1. `original_max_position_embeddings` of its DCA setting (Qwen2.5-1M). If that is missing
           and `max_position_embeddings` is at least twice its `chunk_size`, then `chunk_size`, the
           largest query position.
        2. `original_max_position_embeddings` of YaRN, unless the model was finetuned with it.
           (In Llama 3.1's RoPE parameters it is the length of an earlier training stage; the model
           was trained on its full length.)
        3. `max_sequence_length`.
        4. `max_position_embeddings`.
        """
        most = self.max_position_embeddings
        if self.dca is not None and self.dca.trained_length is not None:
            return self.dca.trained_length
        if self.dca is not None and most >= 2 * self.dca.max_query_position:
            return self.dca.max_query_position
        if self.rope.rope_type == "yarn" and not self.rope.finetuned:
            return self.rope.original_max_position_embeddings or most
        return self.max_sequence_length or most

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "LlamaConfig":
        """Reads the dict of a Hugging Face `config.json`, old form or new.

        Raises:
            InputError: an unsupported architecture, activation, rope type or quantization, or a
                missing or impossible size.
        """
        model_type = _model_type(config)
        activation = fields.text(config, "hidden_act", CONFIG, default="silu")
        if activation not in ("silu", "swish"):
            raise InputError(
                f"hidden_act {activation!r} is not supported: this model's MLP is SwiGLU ('silu')"
            )
        _refuse_elsewhere(config)
        quantization = fields.mapping(config, "quantization_config", CONFIG)
        if quantization:
            method = fields.shown(quantization.get("quant_method", "unknown"), quote=False)
            raise InputError(
                f"this checkpoint is quantized ({method}); use the unquantized checkpoint"
            )
        required = (
            "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads "
            "max_position_embeddings"
        ).split()
        missing = [name for name in required if config.get(name) is None]
        if missing:
            raise InputError(f"config.json lacks {', '.join(missing)}")
        sizes = {name: cast(int, fields.integer(config, name, CONFIG)) for name in required}
        heads, width = sizes["num_attention_heads"], sizes["hidden_size"]
        kv_heads = fields.integer(config, "num_key_value_heads", CONFIG)
        own: dict[str, Any] = {
            "num_key_value_heads": kv_heads or heads,
            "head_dim": fields.integer(config, "head_dim", CONFIG),
            "rms_norm_eps": fields.number(config, "rms_norm_eps", CONFIG, default=1e-6, above=0),
            "rope": RopeConfig.from_hf(config),
        }
        own |= FAMILIES[model_type].read(config)
        if own["head_dim"] is None:
            if width % heads:
                raise InputError(
                    f"hidden_size {width} is not a multiple of num_attention_heads {heads}, and "
                    "config.json gives no head_dim"
                )
            own["head_dim"] = width // heads
        if kv_heads is None and heads % own["num_key_value_heads"]:
            own["num_key_value_heads"] = (
                heads  # the family's default does not fit this number of heads
            )
        dca = fields.mapping(config, "dual_chunk_attention_config", CONFIG)
        return cls(
            **sizes,
            tie_word_embeddings=fields.boolean(config, "tie_word_embeddings", CONFIG),
            **own,
            dca=None if dca is None else DCAConfig.from_hf(dca),
            sparse_attention=None if dca is None else SparseConfig.from_hf(dca),
            model_type=model_type,
            bos_token_id=fields.integer(config, "bos_token_id", CONFIG, least=0),
            eos_token_ids=fields.token_ids(config, "eos_token_id", CONFIG),
            pad_token_id=fields.integer(config, "pad_token_id", CONFIG, least=-1),
            max_sequence_length=fields.integer(config, "max_sequence_length", CONFIG),
        )

    def to_hf(self) -> dict[str, Any]:
        """The dict of a new-form `config.json` that `from_hf` and `transformers` read back."""
        family = FAMILIES[self.model_type]
        names = (
            "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads "
            "num_key_value_heads head_dim max_position_embeddings rms_norm_eps "
            "tie_word_embeddings model_type bos_token_id pad_token_id"
        ).split()
        config: dict[str, Any] = {"architectures": [family.architecture], "hidden_act": "silu"}
        config |= {name: getattr(self, name) for name in names}
        config["rope_parameters"] = self.rope.to_hf()
        eos = list(self.eos_token_ids)
        config["eos_token_id"] = None if not eos else eos[0] if len(eos) == 1 else eos
        config |= family.write(self)
        if self.max_sequence_length is not None:
            config["max_sequence_length"] = self.max_sequence_length
        if self.dca is not None:
            sparse = {} if self.sparse_attention is None else self.sparse_attention.to_hf()
            config["dual_chunk_attention_config"] = self.dca.to_hf() | sparse
        return config


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters of projections (LoRA, arXiv 2106.09685): y = x W + alpha / rank (x A) B.

    Attributes:
        rank: columns of A, rows of B.
        alpha: scaling numerator, as in the paper's section 4.1.
        targets: the projections with adapters, in every layer; names in `LORA_TARGETS`.
        rslora: whether the scale is alpha / sqrt(rank) instead (rsLoRA, arXiv 2312.03732).
    """

    rank: int = 16
    alpha: float = 32.0
    targets: tuple[str, ...] = LORA_TARGETS
    rslora: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1:
            raise InputError(f"the LoRA rank must be a positive integer, got {self.rank!r}")
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise InputError(f"the LoRA alpha must be positive, got {self.alpha}")
        unknown = [name for name in self.targets if name not in LORA_TARGETS]
        if unknown or not self.targets or len(set(self.targets)) < len(self.targets):
            found = ", ".join(self.targets) or "none"
            raise InputError(
                f"LoRA targets must be one or more of {', '.join(LORA_TARGETS)}, each once; got "
                f"{found}"
            )

    @property
    def scale(self) -> float:
        """The factor on x A B."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


def lora_targets(config: LlamaConfig) -> tuple[str, ...]:
    """The projections of a model that LoRA can adapt; experts are excluded."""
    mlp = ("gate_proj", "up_proj", "down_proj")
    return tuple(name for name in LORA_TARGETS if config.has_mlp or name not in mlp)


# --- families ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Family:
    """The specifics of a family of Hugging Face checkpoints.

    Attributes:
        architecture: its class in `transformers`.
        read: function from `config.json` to the fields of `LlamaConfig` that this family writes in
            its own way or implies.
        write: function from a `LlamaConfig` to the family's own keys of `config.json`.
    """

    architecture: str
    read: Callable[[Mapping[str, Any]], dict[str, Any]]
    write: Callable[[LlamaConfig], dict[str, Any]]


def _read_llama(config: Mapping[str, Any]) -> dict[str, Any]:
    attention_bias = fields.boolean(config, "attention_bias", CONFIG)  # of q, k, v and o
    return {
        "qkv_bias": attention_bias,
        "o_bias": attention_bias,
        "mlp_bias": fields.boolean(config, "mlp_bias", CONFIG),
    }


def _read_mistral(config: Mapping[str, Any]) -> dict[str, Any]:
    # A missing key has transformers' default; null is a value and means no window.
    window = fields.integer(config, "sliding_window", CONFIG)
    read: dict[str, Any] = {"sliding_window": window if "sliding_window" in config else 4096}
    return read if "num_key_value_heads" in config else read | {"num_key_value_heads": 8}


def _read_qwen2(config: Mapping[str, Any]) -> dict[str, Any]:
    _refuse_sliding_layers(config)
    read: dict[str, Any] = {"qkv_bias": True}
    return read if "num_key_value_heads" in config else read | {"num_key_value_heads": 32}


def _read_qwen3(config: Mapping[str, Any]) -> dict[str, Any]:
    _refuse_sliding_layers(config)
    attention_bias = fields.boolean(config, "attention_bias", CONFIG)  # of q, k, v and o
    read: dict[str, Any] = {"qk_norm": True, "qkv_bias": attention_bias, "o_bias": attention_bias}
    left_out = {"num_key_value_heads": 32, "head_dim": 128}
    return read | {name: value for name, value in left_out.items() if name not in config}


def _read_qwen3_moe(config: Mapping[str, Any]) -> dict[str, Any]:
    attention_bias = fields.boolean(config, "attention_bias", CONFIG)
    window = None
    if fields.boolean(config, "use_sliding_window", CONFIG):  # in all layers
        window = fields.integer(config, "sliding_window", CONFIG, default=4096)
    read: dict[str, Any] = {
        "qk_norm": True,
        "qkv_bias": attention_bias,
        "o_bias": attention_bias,
        "sliding_window": window,
        "mixture": _read_qwen_mixture(config),
    }
    return read if "num_key_value_heads" in config else read | {"num_key_value_heads": 4}


def _read_qwen_mixture(config: Mapping[str, Any]) -> MixtureConfig | None:
    # transformers 5 writes `num_local_experts`, earlier versions `num_experts`.
    name = "num_experts" if "num_experts" in config else "num_local_experts"
    experts = fields.integer(config, name, CONFIG, default=128, least=0)
    layers = range(fields.integer(config, "num_hidden_layers", CONFIG) or 1)
    step = fields.integer(config, "decoder_sparse_step", CONFIG, default=1)
    only = config.get("mlp_only_layers") or []
    if not isinstance(only, list) or not all(type(n) is int for n in only):
        raise InputError(
            f"config.json: mlp_only_layers must be a list of layers, got {fields.shown(only)}"
        )
    dense = tuple(n for n in layers if n in only or (n + 1) % step)
    if not experts or len(dense) == len(layers):
        return None
    return MixtureConfig(
        num_experts=experts,
        num_experts_per_tok=fields.integer(config, "num_experts_per_tok", CONFIG, default=8),
        moe_intermediate_size=fields.integer(config, "moe_intermediate_size", CONFIG, default=768),
        norm_topk_prob=fields.boolean(config, "norm_topk_prob", CONFIG),
        dense_layers=dense,
        router_aux_loss_coef=_read_aux_loss(config),
    )


def _write_qwen3_moe(config: LlamaConfig) -> dict[str, Any]:
    window = config.sliding_window
    written: dict[str, Any] = {
        "attention_bias": config.qkv_bias,
        "use_sliding_window": window is not None,
        "sliding_window": window,
        "mlp_only_layers": list(config.dense_layers),
        "decoder_sparse_step": 1,
    }
    if config.mixture is None:
        return written | {"num_experts": 0}
    names = "num_experts num_experts_per_tok moe_intermediate_size norm_topk_prob".split()
    names.append("router_aux_loss_coef")
    return written | {name: getattr(config.mixture, name) for name in names}


def _read_mixtral(config: Mapping[str, Any]) -> dict[str, Any]:
    width = fields.integer(config, "intermediate_size", CONFIG)
    if width is None:
        raise InputError("config.json lacks intermediate_size")
    # Mixtral's weights are a softmax over only the chosen experts, which is equivalent.
    mixture = MixtureConfig(
        num_experts=fields.integer(config, "num_local_experts", CONFIG, default=8),
        num_experts_per_tok=fields.integer(config, "num_experts_per_tok", CONFIG, default=2),
        moe_intermediate_size=width,
        norm_topk_prob=True,
        router_aux_loss_coef=_read_aux_loss(config),
    )
    read: dict[str, Any] = {
        "mixture": mixture,
        "sliding_window": fields.integer(config, "sliding_window", CONFIG),
        "rms_norm_eps": fields.number(config, "rms_norm_eps", CONFIG, default=1e-5, above=0),
        "rope": RopeConfig.from_hf({"rope_theta": 1_000_000.0} | dict(config)),
    }
    return read if "num_key_value_heads" in config else read | {"num_key_value_heads": 8}


def _write_mixtral(config: LlamaConfig) -> dict[str, Any]:
    mixture = config.mixture
    assert mixture is not None
    return {
        "num_local_experts": mixture.num_experts,
        "num_experts_per_tok": mixture.num_experts_per_tok,
        "router_aux_loss_coef": mixture.router_aux_loss_coef,
        "sliding_window": config.sliding_window,
    }


def _read_aux_loss(config: Mapping[str, Any]) -> float:
    return fields.number(config, "router_aux_loss_coef", CONFIG, default=0.001, least=0)


def _refuse_sliding_layers(config: Mapping[str, Any]) -> None:
    layers = fields.integer(config, "num_hidden_layers", CONFIG) or 1
    first = fields.integer(config, "max_window_layers", CONFIG, default=28, least=0)
    if fields.boolean(config, "use_sliding_window", CONFIG) and first < layers:
        raise InputError(
            "use_sliding_window is true: sliding-window attention in Qwen's upper layers is not "
            "supported; set it to false in config.json to attend to everything"
        )


# Keys with which related families change the computation. They are refused unless they are null,
# false, zero or empty; other unknown keys do not affect the result.
_ELSEWHERE = (
    "attention_chunk_size attn_logit_softcapping attn_temperature_tuning clip_qkv "
    "embedding_multiplier final_logit_softcapping logit_scale logits_scaling no_rope_layers "
    "first_k_dense_replace moe_layer_freq n_group n_shared_experts num_shared_experts "
    "query_pre_attn_scalar residual_multiplier routed_scaling_factor router_jitter_noise "
    "scoring_func shared_expert_intermediate_size topk_group"
).split()


def _refuse_elsewhere(config: Mapping[str, Any]) -> None:
    for name in _ELSEWHERE:
        if config.get(name):
            raise InputError(
                f"config.json sets {name} ({fields.shown(config[name])}), which changes the "
                "model's computation and is not supported"
            )
    layer_types = config.get("layer_types")
    listed = isinstance(layer_types, list) and set(map(str, layer_types)) == {"full_attention"}
    if layer_types is not None and not listed:
        raise InputError(
            f"config.json has layer_types {fields.shown(layer_types)}: only layers of "
            "full_attention are supported"
        )


# By model_type. A family with other modules in its layers also adds them to
# `dca_jax.weights.parameters.TABLE` and to `dca_jax.layers`.
FAMILIES = {
    "llama": Family(
        "LlamaForCausalLM",
        _read_llama,
        lambda config: {"attention_bias": config.qkv_bias, "mlp_bias": config.mlp_bias},
    ),
    "mistral": Family(
        "MistralForCausalLM",
        _read_mistral,
        lambda config: {"sliding_window": config.sliding_window},
    ),
    "qwen2": Family("Qwen2ForCausalLM", _read_qwen2, lambda config: {}),
    "qwen3": Family(
        "Qwen3ForCausalLM", _read_qwen3, lambda config: {"attention_bias": config.qkv_bias}
    ),
    "qwen3_moe": Family("Qwen3MoeForCausalLM", _read_qwen3_moe, _write_qwen3_moe),
    "mixtral": Family("MixtralForCausalLM", _read_mixtral, _write_mixtral),
}


def _model_type(config: Mapping[str, Any]) -> str:
    by_architecture = {family.architecture: name for name, family in FAMILIES.items()}
    architectures = config.get("architectures") or []
    if not isinstance(architectures, list) or not all(isinstance(a, str) for a in architectures):
        raise InputError(
            f"config.json: architectures must be a list of names, got {fields.shown(architectures)}"
        )
    known = [by_architecture[name] for name in architectures if name in by_architecture]
    if known:
        return known[0]
    named = (
        f"architecture {fields.shown(architectures[0])}"
        if architectures
        else "no known architecture"
    )
    model_type = fields.text(config, "model_type", CONFIG, default="None")
    if architectures or model_type not in FAMILIES:
        raise InputError(
            f"config.json names {named} (model_type {fields.shown(model_type)}), which is not "
            f"supported; expected one of {', '.join(by_architecture)}"
        )
    return model_type


# --- what follows from a config ----------------------------------------------------------------


def choose_dca(choice: DCAConfig | str | None, config: LlamaConfig) -> DCAConfig | None:
    """The DCA setting for a model.

    Args:
        choice: a DCAConfig; a name in `PRESETS`, computed from the model's `trained_length` ("qwen"
            keeps the checkpoint's own chunks and adds Qwen's temperature); "auto" for the
            checkpoint's own setting or else "paper"; None or "none" for plain attention.
        config: the model's config.

    Raises:
        InputError: an unknown name, or a trained length that the preset does not support.
    """
    if choice is None or isinstance(choice, DCAConfig):
        return choice
    if choice == "none":
        return None
    if choice == "auto" and config.dca is not None:
        return config.dca
    if choice == "qwen":
        return DCAConfig.qwen(config.trained_length, own=config.dca)
    return preset_dca("paper" if choice == "auto" else choice, config.trained_length)


def axis_sizes(config: LlamaConfig) -> dict[str, int]:
    """The size of each axis letter in this model."""
    mixture = config.mixture
    experts = {}
    if mixture is not None:
        experts = {"E": mixture.num_experts, "M": mixture.moe_intermediate_size}
    return experts | {
        "V": config.vocab_size,
        "D": config.hidden_size,
        "F": config.intermediate_size,
        "N": config.num_attention_heads,
        "K": config.num_key_value_heads,
        "H": config.head_dim,
    }
