"""Against transformers' DeepseekV3: the same logits, cached and not, the same gradients, the same weights bit by bit;
a folder that needs no moemla; and every setting without a place on the other side by its name.
"""

import json
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from moemla import interop
from moemla.checkpoint import load
from moemla.config import ModelConfig
from moemla.errors import MoemlaError
from moemla.generation import generate
from moemla.model import LanguageModel
from moemla.tokenizer import Tokenizer
from tests.helpers import config_of, shake, tokens_of
from tests.runs import STORIES, files_in

transformers = pytest.importorskip("transformers")

THEIRS = dict(norm="rmsnorm", activation="swiglu", bias=False, d_ff=24, rope_theta=100.0)
ODD = dict(latent_dim=7, d_nope=3, d_rope=6, d_value=5)  # every width of a head another, and an odd latent
CONFIGS = {
    "tied": {},
    "untied": dict(tie_embeddings=False),
    "scale 2.5": dict(routed_scale=2.5),
    "gates not renormalised": dict(renormalise=False),
    "leading dense layers": dict(n_layers=3, n_dense_layers=2),
    "all dense": dict(ffn="dense"),
    "62 experts": dict(n_experts=62, top_k=6),
    "one shared": dict(n_shared=1),
    "none shared": dict(n_shared=0),
    "interleaved": dict(rope_layout="interleaved"),
    "odd widths": ODD,
    "odd and interleaved": dict(**ODD, rope_layout="interleaved"),
    "odd experts": dict(d_expert=5, backend="loop"),
    "all at once": dict(
        **ODD, tie_embeddings=False, routed_scale=2.5, n_layers=3, n_dense_layers=1, n_experts=62, top_k=6, n_shared=1
    ),
}
LIMIT = 1e-5  # of the largest; theirs computes norms, router and rotation in float32 whatever the model's dtype


def ours_of(dtype=torch.float32, **changes) -> LanguageModel:
    """Every weight random, and a balancing bias that decides."""
    model = shake(LanguageModel(config_of("decoupled", **THEIRS | changes), dtype=dtype)).eval()
    for name, bias in model.named_buffers():
        if name.endswith("router.bias"):
            bias.uniform_(-0.5, 0.5)
    return model


def theirs_of(seed: int = 3, **changes):
    """One of theirs, made without our help: every weight random."""
    small = dict(vocab_size=37, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4)
    small |= dict(num_key_value_heads=4, q_lora_rank=None, kv_lora_rank=7, qk_nope_head_dim=3, qk_rope_head_dim=6)
    small |= dict(v_head_dim=5, n_routed_experts=8, n_shared_experts=2, num_experts_per_tok=3, moe_intermediate_size=8)
    small |= dict(n_group=1, topk_group=1, first_k_dense_replace=1, max_position_embeddings=24)
    model = transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config(**small | changes))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.state_dict().items():
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.3 + ("norm" in name))
    return model.eval()


def apart(a, b) -> float:
    """The largest difference, against the largest number of b."""
    assert a.shape == b.shape
    return ((a - b).abs().max() / b.abs().max()).item()


@pytest.fixture(params=CONFIGS)
def pair(request):
    ours = ours_of(**CONFIGS[request.param])
    return ours, interop.to_deepseek_v3(ours)


# --- the same function ----------------------------------------------------------------------------


def test_logits(pair):
    ours, theirs = pair
    text = tokens_of(3, 20)
    with torch.no_grad():
        assert apart(ours(text), theirs(text).logits) < LIMIT


@torch.no_grad()
def test_cached_decode_on_both_sides(pair):
    """A prompt of 13 tokens, then one at a time: each equals the other, and their pass over the whole text."""
    ours, theirs = pair
    text = tokens_of(3, 20)
    whole = theirs(text).logits
    cache, past, found = ours.new_cache(3, 24), transformers.DynamicCache(config=theirs.config), []
    for begin, end in ((0, 13), *((place, place + 1) for place in range(13, 20))):
        mine = ours(text[:, begin:end], cache=cache)
        other = theirs(text[:, begin:end], past_key_values=past, use_cache=True).logits
        found += [apart(mine, other), apart(mine, whole[:, begin:end])]
    assert past.get_seq_length() == cache.length == 20 and all(part < LIMIT for part in found), found


def test_gradients_of_every_parameter(pair):
    ours, theirs = pair
    text, targets = tokens_of(3, 20), tokens_of(3, 20, seed=5)
    loss = ours(text, targets)
    loss.backward()
    other = F.cross_entropy(theirs(text).logits.flatten(0, 1), targets.flatten())
    other.backward()
    mine = {name: parameter.grad for name, parameter in ours.named_parameters()}
    mapped = interop.weights_to_deepseek_v3(mine, ours.config)
    expected = {name: parameter.grad for name, parameter in theirs.named_parameters() if parameter.numel()}
    assert mapped.keys() == expected.keys()
    assert all(gradient.abs().max() > 0 for gradient in expected.values())
    found = {name: apart(mapped[name], expected[name]) for name in expected}
    assert all(part < LIMIT for part in found.values()), found
    assert abs(loss - other) < LIMIT


def test_the_bias_decides(pair):
    """Without it other experts are chosen: the comparisons above would notice if it stayed behind."""
    ours, theirs = pair
    text = tokens_of(3, 20)
    with torch.no_grad():
        before = theirs(text).logits
        for layer in theirs.model.layers:
            if hasattr(layer.mlp, "gate"):
                layer.mlp.gate.e_score_correction_bias.zero_()
        changed = apart(theirs(text).logits, before)
    assert changed > 100 * LIMIT or not ours.routing()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        dict(rope_interleave=False, tie_word_embeddings=True),
        dict(n_group=4, topk_group=4),  # all groups are chosen: no choice
        dict(first_k_dense_replace=0, n_shared_experts=1, norm_topk_prob=False, routed_scaling_factor=1.0),
        dict(first_k_dense_replace=5, rope_parameters=dict(rope_type="default", rope_theta=50.0)),
    ],
    ids=str,
)
def test_one_of_theirs_becomes_ours(changes):
    theirs = theirs_of(**changes)
    ours, text = interop.from_deepseek_v3(theirs), tokens_of(3, 20)
    with torch.no_grad():
        assert apart(ours(text), theirs(text).logits) < LIMIT
    again = interop.to_deepseek_v3(ours)
    assert same(again.state_dict(), theirs.state_dict())
    with torch.no_grad():
        assert torch.equal(again(text).logits, theirs(text).logits)


# --- the same weights -----------------------------------------------------------------------------


def same(a, b) -> bool:
    """Bit by bit, with the dtypes."""
    return a.keys() == b.keys() and all(a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_there_and_back_is_the_identity(name, dtype):
    ours = ours_of(dtype, **CONFIGS[name])
    back = interop.from_deepseek_v3(interop.to_deepseek_v3(ours))
    assert same(back.state_dict(), ours.state_dict())
    own = dict(d_head=ours.config.d_head, backend=ours.config.backend)  # what theirs has no place and no need for
    for field in ("n_experts", "n_shared", "top_k", "d_expert") if ours.config.ffn == "dense" else ():
        own[field] = getattr(ours.config, field)
    assert ModelConfig.from_dict(back.config.to_dict() | own) == ours.config


def test_copies_and_modes():
    ours = ours_of()
    theirs = interop.to_deepseek_v3(ours)
    back = interop.from_deepseek_v3(theirs)
    before = {name: weight.clone() for name, weight in ours.state_dict().items()}
    with torch.no_grad():
        for weight in (*theirs.parameters(), *theirs.buffers()):
            weight.zero_()
    assert same(ours.state_dict(), before) and same(back.state_dict(), before)
    assert not theirs.training and not back.training
    assert interop.to_deepseek_v3(ours.train()).training
    assert interop.from_deepseek_v3(theirs.train()).training


def test_bfloat16_keeps_router_bias_and_rotation_wide():
    wide = ours_of()
    ours = interop.from_deepseek_v3(interop.to_deepseek_v3(wide)).to(torch.bfloat16)
    theirs = interop.to_deepseek_v3(ours)
    gate = theirs.model.layers[0].mlp.gate
    assert theirs.dtype == torch.bfloat16
    assert gate.weight.dtype == gate.e_score_correction_bias.dtype == torch.float32
    assert torch.equal(gate.weight, wide.blocks[0].feedforward.router.weight)
    exact = interop.to_deepseek_v3(wide).model.rotary_emb.inv_freq
    assert torch.equal(theirs.model.rotary_emb.inv_freq, exact) and exact.dtype == torch.float32
    text = tokens_of(1, 20)
    with torch.no_grad():
        assert apart(theirs(text).logits.float(), ours(text).float()) < 0.05
        assert apart(ours(text).float(), wide(text)) < 0.05


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu():
    ours = ours_of().cuda()
    theirs = interop.to_deepseek_v3(ours)
    text = tokens_of(3, 20).cuda()
    assert theirs.device.type == interop.from_deepseek_v3(theirs).embedding.weight.device.type == "cuda"
    with torch.no_grad():
        assert apart(ours(text), theirs(text).logits) < 1e-4


# --- what has no place on the other side ----------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("attention", dict(attention="mla", latent_dim=8)),
        ("attention", dict(attention="mha", positions="learned")),
        ("norm", dict(norm="layernorm")),
        ("activation", dict(activation="gelu")),
        ("bias", dict(bias=True)),
        ("rope_learnable", dict(rope_learnable=True)),
        ("scores", dict(scores="softmax")),
        ("bias_in_gate", dict(bias_in_gate=True)),
        ("n_experts", dict(n_experts=1, top_k=1)),
    ],
)
def test_a_setting_that_theirs_lacks_is_named(field, changes):
    model = LanguageModel(config_of("decoupled", **THEIRS | changes))
    value = getattr(model.config, field)
    with pytest.raises(ValueError, match=f"^{field}={value!r}: .*DeepseekV3"):
        interop.to_deepseek_v3(model)


def test_settings_of_routing_do_not_matter_without_experts():
    dense = dict(ffn="dense", scores="softmax", bias_in_gate=True, n_experts=1, top_k=1)
    interop.to_deepseek_v3(LanguageModel(config_of("decoupled", **THEIRS | dense)))


YARN = dict(rope_type="yarn", rope_theta=100.0, factor=4.0, original_max_position_embeddings=24)


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("q_lora_rank=4", dict(q_lora_rank=4)),
        ("topk_group=1", dict(n_group=4, topk_group=1)),
        ("topk_group=2", dict(n_group=4, topk_group=2)),
        ("rope_type='yarn'", dict(rope_parameters=YARN, max_position_embeddings=96)),
        ("rope_type='linear'", dict(rope_parameters=dict(rope_type="linear", rope_theta=100.0, factor=2.0))),
        ("attention_bias=True", dict(attention_bias=True)),
        ("hidden_act='gelu'", dict(hidden_act="gelu")),
        ("rms_norm_eps=1e-05", dict(rms_norm_eps=1e-5)),
        ("num_key_value_heads=2", dict(num_key_value_heads=2)),
        ("d_model=20", dict(hidden_size=20)),
    ],
)
def test_a_setting_that_ours_lacks_is_named(field, changes):
    with pytest.raises(ValueError, match=f"^{field}: .{{10,}}"):
        interop.from_deepseek_v3(theirs_of(**changes))


def test_weights_that_ours_lacks_are_named():
    theirs = theirs_of()
    theirs.model.layers.append(torch.nn.Linear(3, 3))  # a layer that predicts the token after the next, say
    with pytest.raises(ValueError, match=r"^weights=\['model.layers.2.bias', 'model.layers.2.weight'\]: "):
        interop.from_deepseek_v3(theirs)
    theirs = theirs_of()
    del theirs.model.layers[1].mlp.shared_experts
    with pytest.raises(ValueError, match=r"^weights=\['blocks.1.feedforward.shared.down.weight'"):
        interop.from_deepseek_v3(theirs)


def test_quantized_weights_are_named():
    theirs = theirs_of()
    theirs.config.quantization_config = dict(quant_method="fp8")
    with pytest.raises(ValueError, match=r"^quantization_config="):
        interop.from_deepseek_v3(theirs)


def test_another_model_is_named():
    with pytest.raises(ValueError, match=r"^hf_model='Linear': give a DeepseekV3ForCausalLM"):
        interop.from_deepseek_v3(torch.nn.Linear(3, 3))


def test_without_transformers_the_remedy_is_named(monkeypatch, tmp_path):
    ours = ours_of()
    monkeypatch.setitem(sys.modules, "transformers", None)
    for call in (lambda: interop.to_deepseek_v3(ours), lambda: interop.from_deepseek_v3(None)):
        with pytest.raises(MoemlaError, match=r"pip install 'moemla\[interop\]'"):
            call()
    with pytest.raises(MoemlaError, match=r"pip install 'moemla\[interop\]'"):
        interop.export(ours, None, tmp_path / "out")
    assert not list(tmp_path.iterdir())
    reason = interop.export(LanguageModel(config_of("mla-rope")), None, tmp_path / "out")  # needs none
    assert reason.startswith("attention='mla': ")


# --- a folder without moemla ----------------------------------------------------------------------

TEXTS = (
    "Once upon a time Tom went to the park.",
    'Mia did n\'t see  it . "Look , a cat !"\n\n said Tom\t',
    "<|endoftext|>Once <|endoftext|>",
    " é日本🙂 \u200d\r\n",
    "",
)
READER = """
import json, sys
sys.modules["moemla"] = None  # whoever imports it fails
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, texts, prompts, steps = json.load(sys.stdin)
model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
tokenizer = AutoTokenizer.from_pretrained(folder)
import torch
torch.set_num_threads(1)
out = [model.generate(torch.tensor([p]), max_new_tokens=steps, do_sample=False)[0].tolist() for p in prompts]
ids = [tokenizer(text).input_ids for text in texts]
json.dump(dict(
    kind=type(model).__name__, loading={k: sorted(map(str, v)) for k, v in info.items()}, dtype=str(model.dtype),
    tokens=out, ids=ids, texts=[tokenizer.decode(i, skip_special_tokens=True) for i in ids],
    story=tokenizer.decode(out[0], skip_special_tokens=True), full=tokenizer.decode(out[0]),
    special=[tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.bos_token],
    config=[model.config.bos_token_id, model.config.eos_token_id],
    generation=[model.generation_config.bos_token_id, model.generation_config.eos_token_id],
    longest=tokenizer.model_max_length, vocab=len(tokenizer),
), sys.stdout)
"""


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(STORIES, 300)


@pytest.mark.parametrize("name", ["all at once", "odd experts"])
def test_transformers_alone_reads_the_folder(name, tokenizer, tmp_path):
    ours = ours_of(**CONFIGS[name] | dict(vocab_size=tokenizer.vocab_size, max_seq_len=64))
    out = tmp_path / "new" / "out"
    assert interop.export(ours, tokenizer, out) is None
    assert files_in(tmp_path / "new") == {
        f"out/{file}"
        for file in (
            "config.json",
            "generation_config.json",
            "model.safetensors",
            "tokenizer.json",
            "tokenizer_config.json",
        )
    }
    assert len({file.stat().st_mode for file in out.iterdir()}) == 1
    prompts = [[tokenizer.eot, *tokenizer.encode("Once upon")], [tokenizer.eot], [3, 1, 4, 1, 5, 9]]
    asked = json.dumps([str(out), TEXTS, prompts, 30])
    done = subprocess.run(
        [sys.executable, "-c", READER], input=asked, capture_output=True, text=True, cwd=tmp_path, check=True
    )
    found = json.loads(done.stdout)
    assert found["kind"] == "DeepseekV3ForCausalLM" and not any(found["loading"].values())
    assert found["dtype"] == "torch.float32" and found["longest"] == 64 and found["vocab"] == tokenizer.vocab_size
    assert found["special"] == [tokenizer.eot] * 3 + ["<|endoftext|>"]
    assert found["config"] == found["generation"] == [tokenizer.eot] * 2
    assert (
        found["ids"] == [[tokenizer.eot, *tokenizer.encode(text)] for text in TEXTS] and tuple(found["texts"]) == TEXTS
    )
    expected = generate(ours, [torch.tensor(p) for p in prompts], 30, temperature=0.0, stop=tokenizer.eot)
    assert found["tokens"] == [row.tolist() for row in expected]
    assert len({token for row in found["tokens"] for token in row}) > 12
    assert found["story"] == tokenizer.decode(found["tokens"][0])
    assert found["full"] == tokenizer.decode(found["tokens"][0], keep_eot=True)


def test_gpt2s_vocabulary_comes_along(tmp_path):
    tokenizer = Tokenizer.gpt2()
    model = LanguageModel(config_of("decoupled", **THEIRS, vocab_size=tokenizer.vocab_size))
    assert interop.export(model, tokenizer, tmp_path / "out") is None
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert [theirs(text).input_ids for text in TEXTS] == [[50256, *tokenizer.encode(text)] for text in TEXTS]
    assert theirs.bos_token_id == theirs.eos_token_id == tokenizer.eot == 50256


def test_another_form_is_written_as_our_own(tokenizer, tmp_path):
    model = LanguageModel(config_of("mla-rope", vocab_size=tokenizer.vocab_size)).eval()
    reason = interop.export(model, tokenizer, tmp_path / "out")
    assert reason == "attention='mla': DeepseekV3 has 'mla-decoupled' only"
    assert files_in(tmp_path) == {f"out/{file}" for file in ("config.json", "model.safetensors", "tokenizer.json")}
    back, words = load(tmp_path / "out")
    assert same(back.state_dict(), model.state_dict()) and words.hash == tokenizer.hash


def test_a_model_without_a_tokenizer(tmp_path):
    ours = ours_of()
    (tmp_path / "out").mkdir()  # an empty folder may be there
    assert interop.export(ours, None, str(tmp_path / "out")) is None
    assert files_in(tmp_path / "out") == {"config.json", "generation_config.json", "model.safetensors"}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["eos_token_id"] is None
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    back, text = interop.from_deepseek_v3(theirs), tokens_of(3, 20)
    with torch.no_grad():
        assert apart(back(text), ours(text)) < LIMIT


def test_what_is_there_stays(tmp_path):
    kept = tmp_path / "out" / "kept.txt"
    kept.parent.mkdir()
    kept.write_text("mine")
    for place in (kept, kept.parent):
        with pytest.raises(MoemlaError, match=f"{place.name} is there already and not empty"):
            interop.export(ours_of(), None, place)
    assert files_in(tmp_path) == {"out/kept.txt"} and kept.read_text() == "mine"


@pytest.mark.parametrize("form", ["decoupled", "mla-rope"])
def test_all_or_nothing(form, tokenizer, tmp_path, monkeypatch):
    def full(*args, **how):
        raise OSError(28, "No space left on device")

    place = transformers.PreTrainedModel if form == "decoupled" else LanguageModel
    monkeypatch.setattr(place, "save_pretrained" if form == "decoupled" else "save", full)
    settings = THEIRS if form == "decoupled" else {}
    model = LanguageModel(config_of(form, **settings, vocab_size=tokenizer.vocab_size))
    with pytest.raises(MoemlaError, match="out could not be written: no space left"):
        interop.export(model, tokenizer, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("said", [True, False])
def test_head_and_embedding_are_two_where_they_are_two_whatever_the_config_says(said, tmp_path):
    """A head that was trained by itself arrives, in both directions and in a folder."""
    text = tokens_of(2, 8)
    ours = ours_of(tie_embeddings=said)
    ours.head.weight = torch.nn.Parameter(torch.randn_like(ours.head.weight))
    theirs = interop.to_deepseek_v3(ours)
    assert not theirs.config.tie_word_embeddings
    assert torch.equal(theirs.lm_head.weight, ours.head.weight)
    assert apart(theirs(text).logits, ours(text)) < LIMIT
    assert interop.export(ours, None, tmp_path / "out") is None
    read = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(read.lm_head.weight, ours.head.weight)
    theirs = theirs_of(tie_word_embeddings=said)
    theirs.lm_head.weight = torch.nn.Parameter(torch.randn_like(theirs.lm_head.weight))
    back = interop.from_deepseek_v3(theirs)
    assert not back.tied and not back.config.tie_embeddings
    assert apart(back(text), theirs(text).logits) < LIMIT


def test_head_and_embedding_are_one_where_they_are_one():
    ours = ours_of(tie_embeddings=False)
    ours.head.weight = ours.embedding.weight
    theirs = interop.to_deepseek_v3(ours)
    assert theirs.lm_head.weight is theirs.model.embed_tokens.weight
    back = interop.from_deepseek_v3(theirs)
    assert back.tied and back.config.tie_embeddings


def test_weights_by_name_with_a_head_that_has_no_place():
    config = config_of("decoupled", **THEIRS)
    for there, head, table in (
        (interop.weights_to_deepseek_v3, "head.weight", "embedding.weight"),
        (interop.weights_from_deepseek_v3, "lm_head.weight", "model.embed_tokens.weight"),
    ):
        weight = torch.randn(37, 16)
        assert len(there({table: weight, head: weight.clone()}, config)) == 1
        with pytest.raises(ValueError, match=f"tie_embeddings=True: {head} differs from {table}: False"):
            there({table: weight, head: weight + 1}, config)


# --- a folder that all engines read alike ---------------------------------------------------------


@pytest.mark.parametrize("name", ["tied", "untied", "interleaved", "odd widths", "odd and interleaved", "all dense"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_exported_form_is_the_same_function(name, dtype, tmp_path):
    """Interleaved rows, a head that is written, and the fields that other engines ask for, whatever the model has."""
    ours, text = ours_of(dtype, **CONFIGS[name]), tokens_of(3, 20)
    before = {key: weight.clone() for key, weight in ours.state_dict().items()}
    state = torch.get_rng_state()
    assert interop.export(ours, None, tmp_path / "out") is None
    assert torch.equal(state, torch.get_rng_state()) and same(ours.state_dict(), before)
    settings = json.loads((tmp_path / "out" / "config.json").read_text())
    wanted = dict(rope_interleave=True, tie_word_embeddings=False, scoring_func="sigmoid", topk_method="noaux_tc")
    assert {field: settings[field] for field in wanted} == wanted
    file = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(file["lm_head.weight"], ours.head.weight)
    assert torch.equal(file["model.embed_tokens.weight"], ours.embedding.weight)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    if dtype == torch.float32:
        with torch.no_grad():
            assert apart(theirs(text).logits, ours(text)) < LIMIT
    c, q = ours.config, ours.blocks[0].attention.q_proj.weight.unflatten(0, (4, -1))
    turned = file["model.layers.0.self_attn.q_proj.weight"].unflatten(0, (4, -1))
    assert torch.equal(turned[:, : c.d_nope], q[:, : c.d_nope])
    order = (
        range(c.d_rope)
        if "interleaved" in name
        else [i + j * c.d_rope // 2 for i in range(c.d_rope // 2) for j in (0, 1)]
    )
    assert torch.equal(turned[:, c.d_nope :], q[:, c.d_nope :][:, list(order)])


def test_a_batch_of_unequal_prompts_and_a_pipeline_begin_as_training_did(tokenizer, tmp_path):
    ours = ours_of(vocab_size=tokenizer.vocab_size, max_seq_len=64)
    assert interop.export(ours, tokenizer, tmp_path / "out") is None
    settings = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert settings["padding_side"] == "left"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    words = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    texts, how = ["Tom saw a cat and was glad.", "Mia", "Once upon a time"], dict(max_new_tokens=20, do_sample=False)
    prompts = [torch.tensor([tokenizer.eot, *tokenizer.encode(text)]) for text in texts]
    expected = [tokenizer.decode(row) for row in generate(ours, prompts, 20, temperature=0.0, stop=tokenizer.eot)]
    assert len({len(prompt) for prompt in prompts}) == 3
    batch = words(texts, return_tensors="pt", padding=True)
    assert [row[mask.bool()].tolist() for row, mask in zip(batch.input_ids, batch.attention_mask, strict=True)] == [
        prompt.tolist() for prompt in prompts
    ]
    batch.pop("token_type_ids", None)
    assert words.batch_decode(theirs.generate(**batch, **how), skip_special_tokens=True) == expected
    write = transformers.pipeline("text-generation", model=theirs, tokenizer=words)
    for size in (1, 3):
        found = [rows[0]["generated_text"] for rows in write(texts, batch_size=size, **how)]
        assert found == expected, size
    rules = json.loads((tmp_path / "out" / "tokenizer.json").read_text())["post_processor"]
    assert rules["single"][0] == {
        "SpecialToken": {"id": "<|endoftext|>", "type_id": 0}
    }  # for readers of that file alone


def test_the_tokenizer_of_another_vocabulary_is_not_written(tokenizer, tmp_path):
    """A padded one too: what was written could not be loaded, or would give ids that the table has not."""
    for vocab_size in (60, tokenizer.vocab_size + 4):
        model = ours_of(**CONFIGS[next(iter(CONFIGS))] | dict(vocab_size=vocab_size))
        for write in (model.save, lambda out, words, model=model: interop.export(model, words, out)):
            with pytest.raises(ValueError, match=f"has {tokenizer.vocab_size} tokens, and the model {vocab_size}"):
                write(tmp_path / "out", tokenizer)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("form", ["decoupled", "mla-rope"])
@pytest.mark.parametrize("place", ["embedding.weight", "blocks.1.feedforward.router.bias"])
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_not_exported(form, place, number, tmp_path):
    model = LanguageModel(config_of(form, **THEIRS if form == "decoupled" else {}))
    with torch.no_grad():
        model.state_dict()[place].view(-1)[3] = number
    with pytest.raises(MoemlaError, match=f"^{place} is not finite: .*; nothing was exported$"):
        interop.export(model, None, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_conversions_draw_no_random_numbers_of_the_caller():
    ours = ours_of()
    state = torch.get_rng_state()
    interop.from_deepseek_v3(interop.to_deepseek_v3(ours))
    assert torch.equal(state, torch.get_rng_state())


def test_a_name_without_a_place_is_not_left_out_in_silence():
    config = config_of("decoupled", norm="rmsnorm", activation="swiglu", bias=False)
    weights = {f"module.{name}": tensor for name, tensor in LanguageModel(config).state_dict().items()}
    with pytest.raises(ValueError, match=r"weights=.*module.*these have no place here"):
        interop.weights_to_deepseek_v3(weights, config)
    with pytest.raises(ValueError, match="no place here"):
        interop.weights_from_deepseek_v3({"model.layers.0.self_attn.q_proj.bias": torch.zeros(1)}, config)
