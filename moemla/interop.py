"""The decoupled form is DeepSeek-V3's own: weights to and from the class of that name in Hugging Face's `transformers`.

Both hold the same numbers in another order, so the way there and back is the identity, bit by bit. A table says which
weight becomes which; gradients travel by the same table. A setting that the other side does not have is refused by
name. Dropout, which acts in training only, stays behind; next-token-prediction layers are no part of their model.
Built in chapter 14.
"""

import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from moemla.complexity import dense_layers
from moemla.config import ROW, ModelConfig, require
from moemla.devices import same_storage
from moemla.errors import MoemlaError, optional
from moemla.files import read_json, why, write_json
from moemla.generation import UNUSABLE
from moemla.model import LanguageModel
from moemla.tokenizer import EOT, Tokenizer


def _same(config: ModelConfig, weight: Tensor) -> tuple[Tensor]:
    return (weight,)


def _turned(config: ModelConfig, weight: Tensor) -> tuple[Tensor]:
    """They multiply by the transpose: (E, D, 2F) is (E, 2F, D) there."""
    return (weight.mT,)


def _halves(config: ModelConfig, both: Tensor) -> tuple[Tensor, ...]:
    """SwiGLU: the half under silu first, then the other."""
    return both.chunk(2)


def _whole(config: ModelConfig, gate: Tensor, value: Tensor) -> tuple[Tensor]:
    """The inverse of `_halves`."""
    return (torch.cat((gate, value)),)


def _join_heads(config: ModelConfig, k_up: Tensor, v_up: Tensor) -> tuple[Tensor]:
    """(H d_nope, R) and (H d_value, R) -> (H (d_nope + d_value), R): each head's keys, then its values."""
    k_up, v_up = (rearrange(weight, "(h k) r -> h k r", h=config.n_heads) for weight in (k_up, v_up))
    return (rearrange(torch.cat((k_up, v_up), dim=1), "h k r -> (h k) r"),)


def _part_heads(config: ModelConfig, kv_up: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse of `_join_heads`."""
    heads = rearrange(kv_up, "(h k) r -> h k r", h=config.n_heads)
    k_up, v_up = heads.split((config.d_nope, config.d_value), dim=1)
    return rearrange(k_up, "h k r -> (h k) r"), rearrange(v_up, "h k r -> (h k) r")


# How weights change, ours to theirs and theirs to ours.
SAME, TURNED, HALVES, HEADS = (_same, _same), (_turned, _turned), (_halves, _whole), (_join_heads, _part_heads)
MODEL = (
    ("embedding.weight", "model.embed_tokens.weight", SAME),
    ("norm.weight", "model.norm.weight", SAME),
)
HEAD = (("head.weight", "lm_head.weight", SAME),)  # where it is a table of its own
# In the layers: our names behind "blocks.N.", theirs behind "model.layers.N.".
ATTENTION = (
    ("norm1.weight", "input_layernorm.weight", SAME),
    ("norm2.weight", "post_attention_layernorm.weight", SAME),
    ("attention.q_proj.weight", "self_attn.q_proj.weight", SAME),
    ("attention.kv_down.weight", "self_attn.kv_a_proj_with_mqa.weight", SAME),
    ("attention.kv_norm.weight", "self_attn.kv_a_layernorm.weight", SAME),
    ("attention.k_up.weight attention.v_up.weight", "self_attn.kv_b_proj.weight", HEADS),
    ("attention.out_proj.weight", "self_attn.o_proj.weight", SAME),
)
DENSE = (
    ("feedforward.up.weight", "mlp.gate_proj.weight mlp.up_proj.weight", HALVES),
    ("feedforward.down.weight", "mlp.down_proj.weight", SAME),
)
EXPERTS = (
    ("feedforward.router.weight", "mlp.gate.weight", SAME),
    ("feedforward.router.bias", "mlp.gate.e_score_correction_bias", SAME),
    ("feedforward.experts.w_in", "mlp.experts.gate_up_proj", TURNED),
    ("feedforward.experts.w_out", "mlp.experts.down_proj", TURNED),
)
SHARED = (
    (
        "feedforward.shared.up.weight",
        "mlp.shared_experts.gate_proj.weight mlp.shared_experts.up_proj.weight",
        HALVES,
    ),
    ("feedforward.shared.down.weight", "mlp.shared_experts.down_proj.weight", SAME),
)


def _table(config: ModelConfig):
    """(our names, their names, change) of every weight of a model with this config."""
    for ours, theirs, change in MODEL + (() if config.tie_embeddings else HEAD):
        yield [ours], [theirs], change
    for layer in range(config.n_layers):
        routed = EXPERTS + (SHARED if config.n_shared else ())
        for ours, theirs, change in ATTENTION + (DENSE if layer < dense_layers(config) else routed):
            yield (
                [f"blocks.{layer}.{name}" for name in ours.split()],
                [f"model.layers.{layer}.{name}" for name in theirs.split()],
                change,
            )


def _require_places(weights: Mapping[str, Tensor], config: ModelConfig, side: int, head: str, table: str) -> None:
    """Nothing is left out in silence: no unknown name, and no tied head that differs from the embedding."""
    left = sorted(weights.keys() - {name for row in _table(config) for name in row[side]} - {head})
    require(not left, "weights", left[:3], "these have no place here")
    if config.tie_embeddings and weights.keys() >= {head, table}:
        one = same_storage(weights[head], weights[table]) or torch.equal(weights[head], weights[table])
        require(one, "tie_embeddings", True, f"{head} differs from {table}: False")


def weights_to_deepseek_v3(weights: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Tensors by our names (weights, or their gradients) as tensors by the names of DeepseekV3ForCausalLM.

    A weight that is not given is left out, and so is the head where it is tied; ValueError for a tied one that differs
    from the embedding, and for a name that has no place. Views of what is given where they can be.
    """
    _require_places(weights, config, 0, "head.weight", "embedding.weight")
    return {
        name: tensor
        for ours, theirs, (forth, _) in _table(config)
        if weights.keys() >= set(ours)
        for name, tensor in zip(theirs, forth(config, *(weights[name] for name in ours)), strict=True)
    }


def weights_from_deepseek_v3(weights: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """The inverse of `weights_to_deepseek_v3`."""
    _require_places(weights, config, 1, "lm_head.weight", "model.embed_tokens.weight")
    return {
        name: tensor
        for ours, theirs, (_, back) in _table(config)
        if weights.keys() >= set(theirs)
        for name, tensor in zip(ours, back(config, *(weights[name] for name in theirs)), strict=True)
    }


def _fill(model: nn.Module, weights: dict[str, Tensor], tied: bool) -> None:
    """Copies the weights in; ValueError if any is left over or missing."""
    own = {name for name, weight in model.state_dict().items() if weight.numel()}  # no shared experts: width 0 there
    wrong = sorted((own - ({"head.weight", "lm_head.weight"} if tied else set())) ^ weights.keys())
    require(not wrong, "weights", wrong[:3], "the model's config does not describe these")
    model.load_state_dict(weights, strict=False)


def _transformers() -> Any:
    return optional("transformers", "interop")


def settings_to_deepseek_v3(config: ModelConfig) -> dict[str, Any]:
    """The arguments of transformers' DeepseekV3Config for this model.

    ValueError with field, value and what is right for a setting that DeepseekV3 does not have. Dropout stays behind.
    """
    c, routed = config, dense_layers(config) < config.n_layers
    for field, right in dict(attention="mla-decoupled", norm="rmsnorm", activation="swiglu").items():
        require(getattr(c, field) == right, field, getattr(c, field), f"DeepseekV3 has {right!r} only")
    require(not c.bias, "bias", c.bias, "DeepseekV3 has bias=False only")
    require(not c.rope_learnable, "rope_learnable", c.rope_learnable, "DeepseekV3's frequencies are fixed: False")
    if routed:
        require(c.scores == "sigmoid", "scores", c.scores, "DeepseekV3 has 'sigmoid' only")
        right = "DeepseekV3's bias is for the selection only: False"
        require(not c.bias_in_gate, "bias_in_gate", c.bias_in_gate, right)
        require(c.n_experts > 1, "n_experts", c.n_experts, "DeepseekV3's router needs at least 2")
    return dict(
        vocab_size=c.vocab_size,
        max_position_embeddings=c.max_seq_len,
        num_hidden_layers=c.n_layers,
        hidden_size=c.d_model,
        num_attention_heads=c.n_heads,
        num_key_value_heads=c.n_heads,
        q_lora_rank=None,
        kv_lora_rank=c.latent_dim,
        qk_nope_head_dim=c.d_nope,
        qk_rope_head_dim=c.d_rope,
        v_head_dim=c.d_value,
        rope_parameters=dict(rope_type="default", rope_theta=float(c.rope_theta)),
        rope_interleave=c.rope_layout == "interleaved",
        first_k_dense_replace=dense_layers(c),
        intermediate_size=c.d_ff,
        n_routed_experts=c.n_experts,
        n_shared_experts=c.n_shared,
        num_experts_per_tok=c.top_k,
        moe_intermediate_size=c.d_expert,
        norm_topk_prob=c.renormalise,
        routed_scaling_factor=float(c.routed_scale),
        n_group=1,
        topk_group=1,
        tie_word_embeddings=c.tie_embeddings,
        hidden_act="silu",
        rms_norm_eps=1e-6,
        attention_bias=False,
        attention_dropout=0.0,
        num_nextn_predict_layers=0,
        bos_token_id=None,
        eos_token_id=None,
    )


def settings_from_deepseek_v3(hf_config: Any) -> ModelConfig:
    """Our config of a model with that DeepseekV3Config.

    ValueError with field, value and what is right for what ours cannot be. Dropout stays behind.
    """
    c = hf_config
    leading = min(c.first_k_dense_replace, c.num_hidden_layers)
    rope = c.rope_parameters
    kind = rope.get("rope_type", "default")
    groups = None if leading == c.num_hidden_layers else c.topk_group
    for field, value, fits, right in (
        ("q_lora_rank", c.q_lora_rank, c.q_lora_rank is None, "queries through a latent are not built: None"),
        ("rope_type", kind, kind == "default", "scaled positions are not built: 'default'"),
        ("attention_bias", c.attention_bias, not c.attention_bias, "q_proj has none there; all or nothing here: False"),
        ("hidden_act", c.hidden_act, c.hidden_act in ("silu", "swish"), "only SwiGLU's 'silu' is built"),
        ("rms_norm_eps", c.rms_norm_eps, c.rms_norm_eps == 1e-6, "must be 1e-6"),
        (
            "num_key_value_heads",
            c.num_key_value_heads,
            c.num_key_value_heads == c.num_attention_heads,
            f"heads have keys of their own: num_attention_heads={c.num_attention_heads}",
        ),
        (
            "topk_group",
            groups,
            groups is None or groups >= c.n_group,
            f"choosing among n_group={c.n_group} groups of experts is not built: both 1",
        ),
    ):
        require(fits, field, value, right)
    quantized = getattr(c, "quantization_config", None)
    require(quantized is None, "quantization_config", quantized, "load the model without quantization")
    return ModelConfig(
        vocab_size=c.vocab_size,
        max_seq_len=c.max_position_embeddings,
        n_layers=c.num_hidden_layers,
        d_model=c.hidden_size,
        n_heads=c.num_attention_heads,
        attention="mla-decoupled",
        latent_dim=c.kv_lora_rank,
        d_head=c.qk_nope_head_dim,
        d_nope=c.qk_nope_head_dim,
        d_rope=c.qk_rope_head_dim,
        d_value=c.v_head_dim,
        rope_theta=rope["rope_theta"],
        rope_layout="interleaved" if c.rope_interleave else "halves",
        ffn="dense" if leading == c.num_hidden_layers else "moe",
        n_dense_layers=0 if leading == c.num_hidden_layers else leading,
        d_ff=c.intermediate_size,
        n_experts=c.n_routed_experts,
        n_shared=c.n_shared_experts,
        top_k=c.num_experts_per_tok,
        d_expert=c.moe_intermediate_size,
        renormalise=bool(c.norm_topk_prob),
        routed_scale=c.routed_scaling_factor,
        norm="rmsnorm",
        activation="swiglu",
        bias=False,
        tie_embeddings=c.tie_word_embeddings,
    )


def to_deepseek_v3(model: LanguageModel) -> Any:
    """A transformers DeepseekV3ForCausalLM with copies of our weights: the same logits.

    Of the same dtype, on the same device, in the same mode; router and balancing bias (`e_score_correction_bias`) stay
    float32 or wider. Head and embedding are one table there if they are one here, whatever the config says. ValueError
    for a setting that it does not have; MoemlaError without transformers.
    """
    return _as_theirs(model, model.described, model.state_dict())


def _as_theirs(model: LanguageModel, config: ModelConfig, weights: Mapping[str, Tensor]) -> Any:
    """A DeepseekV3ForCausalLM with these weights of ours under this config; dtype, device and mode are the model's."""
    transformers, weight = _transformers(), model.embedding.weight
    settings = settings_to_deepseek_v3(config)
    if config.d_expert % ROW or weight.dtype == torch.float64:
        settings["experts_implementation"] = "eager"  # the others want rows of 16 bytes and have no float64
    # Made in its dtype and not moved to it, which would round the frequencies of the rotation.
    made = transformers.DeepseekV3Config(**settings)
    with torch.random.fork_rng(devices=[]):  # they draw weights, which are written over
        theirs = transformers.AutoModelForCausalLM.from_config(made, dtype=weight.dtype).to(weight.device)
    for ours, layer in zip(model.blocks, theirs.model.layers, strict=True):
        if hasattr(layer.mlp, "gate"):
            layer.mlp.gate.to(ours.feedforward.router.weight.dtype)
    _fill(theirs, weights_to_deepseek_v3(weights, config), config.tie_embeddings)
    return theirs.train(model.training)


def _for_every_engine(model: LanguageModel) -> tuple[ModelConfig, dict[str, Tensor]]:
    """The same function where dimensions turn as neighbours and the head has a table of its own.

    Some engines know no other way, and write wrong text without a word. Rows 0, w/2, 1, w/2 + 1 ... of what is turned
    become 0, 1, 2, 3 ..., in queries and keys alike.
    """
    c, weights = model.described, dict(model.state_dict())
    pairs = torch.arange(c.d_rope).view(2, -1).T.flatten().to(model.embedding.weight.device)
    for layer in range(c.n_layers if c.rope_layout == "halves" else 0):
        name = f"blocks.{layer}.attention."
        q = rearrange(weights[name + "q_proj.weight"], "(h k) d -> h k d", h=c.n_heads)
        q = torch.cat((q[:, : c.d_nope], q[:, c.d_nope :][:, pairs]), dim=1)
        weights[name + "q_proj.weight"] = rearrange(q, "h k d -> (h k) d")
        latent, k_rope = weights[name + "kv_down.weight"].split((c.latent_dim, c.d_rope))
        weights[name + "kv_down.weight"] = torch.cat((latent, k_rope[pairs]))
    config = ModelConfig.from_dict(c.to_dict() | dict(rope_layout="interleaved", tie_embeddings=False))
    return config, weights


def from_deepseek_v3(hf_model: Any) -> LanguageModel:
    """Our model with copies of the weights of a transformers DeepseekV3ForCausalLM: the same logits.

    Of the same dtype, on the same device, in the same mode; router and balancing bias are float32 or wider, as in all
    our models; head and embedding are one table or two as they are there. ValueError for what ours cannot be (queries
    through a latent, groups of experts, scaled positions, biases, other activations), naming it; MoemlaError without
    transformers.
    """
    wanted, kind = _transformers().DeepseekV3ForCausalLM, type(hf_model).__name__
    require(isinstance(hf_model, wanted), "hf_model", kind, f"give a {wanted.__name__}")
    tied = same_storage(hf_model.lm_head.weight, hf_model.model.embed_tokens.weight)
    config = replace(settings_from_deepseek_v3(hf_model.config), tie_embeddings=tied)
    weights = {name: weight for name, weight in hf_model.state_dict().items() if weight.numel()}
    weight = hf_model.model.embed_tokens.weight
    with torch.random.fork_rng(devices=[weight.device] if weight.is_cuda else []):  # its own weights are written over
        model = LanguageModel(config, device=weight.device, dtype=weight.dtype)
    _fill(model, weights_from_deepseek_v3(weights, config), config.tie_embeddings)
    return model.train(hf_model.training)


def export(model: LanguageModel, tokenizer: Tokenizer | None, out: str | os.PathLike) -> str | None:
    """Writes a folder that `transformers` loads without this package, or says which setting it has no place for.

    AutoModelForCausalLM and AutoTokenizer read it: safetensors, config, generation config, and a tokenizer with the
    same ids and text, in which no text makes the token <|endoftext|>; it is BOS, EOS and padding, stands before each
    text as in training, and fills a batch on the left. Rotated dimensions are neighbours and the head is written,
    whatever the model has: the form that all engines read. (They read the router of a 16-bit model back in 16 bits.) A
    model that DeepseekV3 cannot be is written as `model.save` does, and the reason returned. All or nothing:
    MoemlaError where `out` holds something already or cannot be written, for weights that are not finite, or without
    transformers; ValueError for the tokenizer of another vocabulary.
    """
    model.config.require_vocabulary(tokenizer)
    out = Path(out).resolve()
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise MoemlaError(f"{out} is there already and not empty: name another folder")
    for name, weight in model.state_dict().items():
        if not weight.isfinite().all():
            raise MoemlaError(f"{name} is not finite: {UNUSABLE}; nothing was exported")
    try:
        settings_to_deepseek_v3(model.config)
        reason, theirs = None, _as_theirs(model, *_for_every_engine(model))
    except ValueError as error:
        reason, theirs = str(error), None
    part = out.with_name(f".{out.name}.{os.getpid()}.part")  # of this process: two exports never meet
    try:
        shutil.rmtree(part, ignore_errors=True)  # of one that was killed and had the same number
        part.mkdir(parents=True)
        if theirs is None:
            model.save(part, tokenizer)
        else:
            _save_for_transformers(theirs, tokenizer, part)
        os.replace(part, out)
    except Exception as error:  # safetensors has errors of its own
        text = why(error) if isinstance(error, OSError) else " ".join(str(error).split())[:300]
        raise MoemlaError(f"{out} could not be written: {text}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return reason


def _save_for_transformers(theirs: Any, tokenizer: Tokenizer | None, folder: Path) -> None:
    transformers = _transformers()
    if tokenizer is not None:
        ids = dict(bos_token_id=tokenizer.eot, eos_token_id=tokenizer.eot)
        theirs.config.update(ids)
        theirs.generation_config = transformers.GenerationConfig(**ids, pad_token_id=tokenizer.eot)
        tokenizer.save(folder / "tokenizer.json")
        transformers.PreTrainedTokenizerFast(
            tokenizer_file=str(folder / "tokenizer.json"),
            **dict.fromkeys(("bos_token", "eos_token", "pad_token"), EOT),
            model_max_length=theirs.config.max_position_embeddings,
            padding_side="left",  # a story goes on at its end
            add_bos_token=True,  # a post-processor in tokenizer.json: other readers put it there too
            split_special_tokens=True,  # "<|endoftext|>" in a text is text
            clean_up_tokenization_spaces=False,
        ).save_pretrained(folder)
    theirs.config.update(dict(scoring_func="sigmoid", topk_method="noaux_tc"))  # implied there; other engines ask
    theirs.save_pretrained(folder)
    for file in folder.glob("*.safetensors"):  # written for their owner alone
        file.chmod((folder / "config.json").stat().st_mode)
    experts = theirs.get_experts_implementation()[""]
    if experts == "eager":  # read from a config, but not written into it
        write_json(folder / "config.json", read_json(folder / "config.json") | {"experts_implementation": experts})
