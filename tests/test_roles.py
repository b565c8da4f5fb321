"""Roles decide which tensors are matrices and which are decayed, alike for all optimizers."""

from fnmatch import fnmatchcase

import pytest
import reference
import torch
import transformers
from torch import nn
from torch.nn import functional

from optimizers import Muon, build_optimizer, roles_of

NAMES = ["olion", "muon", "adamuon", "lion", "adamw"]
MATRIX_RULES = ["olion", "muon", "adamuon"]
every_name = pytest.mark.parametrize("name", NAMES)


class Block(nn.Module):
    def __init__(self, width: int, bias: bool):
        super().__init__()
        self.ln_1 = nn.LayerNorm(width, bias=bias)
        self.c_attn = nn.Linear(width, 3 * width, bias=bias)
        self.c_proj = nn.Linear(width, width, bias=bias)

    def forward(self, x):
        query, key, value = self.c_attn(self.ln_1(x)).chunk(3, dim=-1)
        return x + self.c_proj(functional.scaled_dot_product_attention(query, key, value, is_causal=True))


class TinyGPT(nn.Module):
    """The tensors of a GPT: two tables, hidden weights, norms, biases, and a head that is tied or not."""

    def __init__(self, tied: bool = True, bias: bool = True, width: int = 8, context: int = 6, vocabulary: int = 11):
        super().__init__()
        self.wte = nn.Embedding(vocabulary, width)
        self.wpe = nn.Embedding(context, width)
        self.blocks = nn.ModuleList([Block(width, bias), Block(width, bias)])
        self.ln_f = nn.LayerNorm(width, bias=bias)
        self.lm_head = nn.Linear(width, vocabulary, bias=False)
        if tied:
            self.lm_head.weight = self.wte.weight

    def forward(self, tokens):
        x = self.wte(tokens) + self.wpe.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.lm_head(self.ln_f(x))


HIDDEN = {f"blocks.{i}.{name}.weight" for i in (0, 1) for name in ("c_attn", "c_proj")}
TABLES = {"wte.weight", "wpe.weight"}


def groups_of(optimizer) -> dict[str, tuple[str, float]]:
    """Each tensor's name -> (the rule of its group, its weight decay); fails on a tensor in two groups."""
    found = {}
    for group in optimizer.param_groups:
        for name, param in zip(group["param_names"], group["params"], strict=True):
            assert name not in found and param is not None
            found[name] = (group["rule"], group["weight_decay"])
    return found


@every_name
@pytest.mark.parametrize("tied", [True, False])
def test_groups_match_the_roles_for_every_optimizer_alike(name, tied):
    model = TinyGPT(tied)
    groups = groups_of(build_optimizer(model, name, lr=1e-3, weight_decay=0.1))
    vectors = {each for each, param in model.named_parameters() if param.ndim == 1}
    expected = dict.fromkeys(HIDDEN, (name, 0.1)) | dict.fromkeys(vectors, ("adamw", 0.0))
    expected |= dict.fromkeys(TABLES | (set() if tied else {"lm_head.weight"}), ("adamw", 0.1))
    assert groups == expected


@every_name
@pytest.mark.parametrize("tied", [True, False])
def test_trainable_parameters_match_the_groups_one_to_one(name, tied):
    model = TinyGPT(tied)
    model.blocks[0].c_proj.weight.requires_grad_(False)
    optimizer = build_optimizer(model, name, lr=1e-3)
    grouped = [id(param) for group in optimizer.param_groups for param in group["params"]]
    trainable = [id(param) for param in model.parameters() if param.requires_grad]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == set(trainable)


@pytest.mark.parametrize(
    "sizes",
    [
        {"width": 8, "context": 8},  # positions have the shape of c_proj, as in GPT-2 medium (1024 and 1024)
        {"width": 8, "context": 24},  # positions have the shape of c_attn
        {"width": 8, "vocabulary": 24},  # tokens have the shape of c_attn
    ],
)
@pytest.mark.parametrize("tied", [True, False])
def test_a_table_with_the_shape_of_a_hidden_weight_matches_the_same_roles(tied, sizes):
    roles = roles_of(TinyGPT(tied, **sizes))
    assert {name for name, role in roles.items() if role == "matrix"} == HIDDEN
    assert {name for name, role in roles.items() if role == "embedding"} == TABLES
    assert ("lm_head.weight" in roles) == (not tied)
    assert tied or roles["lm_head.weight"] == "head"


@pytest.mark.parametrize("name", MATRIX_RULES + ["lion"])
def test_the_rest_of_the_model_matches_adamw_whatever_the_rule(name):
    torch.manual_seed(1)
    model = TinyGPT(tied=False)
    twin = TinyGPT(tied=False)
    twin.load_state_dict(model.state_dict())
    optimizers = build_optimizer(model, name, lr=1e-2), build_optimizer(twin, "adamw", lr=1e-2)
    for _ in range(3):
        for parameter, other in zip(model.parameters(), twin.parameters(), strict=True):
            parameter.grad = torch.randn_like(parameter)
            other.grad = parameter.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    others = dict(twin.named_parameters())
    for each, parameter in model.named_parameters():
        assert torch.equal(parameter, others[each]) == (each not in HIDDEN)


@every_name
def test_one_optimizer_for_the_whole_model_trains_it(name):
    torch.manual_seed(1)
    model = TinyGPT()
    optimizer = build_optimizer(model, name, lr=1e-2)
    tokens = torch.randint(11, (4, 6))
    losses = []
    for _ in range(20):
        loss = functional.cross_entropy(model(tokens).flatten(0, 1), tokens.roll(-1, dims=1).flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("module", ["ln_proj", "embed_mlp", "lm_head_mixer", "adaLN_modulation"])
def test_names_decide_nothing(module):
    """A hidden Linear is a matrix whatever it is called (the authors' code sent adaLN modulation to AdamW)."""
    model = TinyGPT()
    model.blocks[0].add_module(module, nn.Linear(8, 48))
    assert roles_of(model)[f"blocks.0.{module}.weight"] == "matrix"
    assert roles_of(model)[f"blocks.0.{module}.bias"] == "vector"


@every_name
@pytest.mark.parametrize("shape", [(8, 8), (2, 8, 8)])
def test_a_raw_parameter_is_refused_until_its_role_is_declared(name, shape):
    model = TinyGPT()
    model.blocks[0].gate = nn.Parameter(torch.randn(shape))
    with pytest.raises(ValueError, match="roles=") as caught:
        build_optimizer(model, name, lr=1e-3)
    assert "blocks.0.gate" in str(caught.value)
    assert "\n" not in str(caught.value)

    expected = {"embedding": ("adamw", 0.1), "head": ("adamw", 0.1), "vector": ("adamw", 0.0)}
    for role, group in expected.items():
        optimizer = build_optimizer(model, name, lr=1e-3, roles={"*.gate": role})
        assert groups_of(optimizer)["blocks.0.gate"] == group
    optimizer = build_optimizer(model, name, lr=1e-3, roles={"*.gate": "matrix"}, as_matrices="batch")
    assert groups_of(optimizer)["blocks.0.gate"] == (name, 0.1)


def test_declared_roles_overrule_the_models_own():
    model = TinyGPT()
    assert roles_of(model, {"blocks.0.c_proj.weight": "embedding"})["blocks.0.c_proj.weight"] == "embedding"
    assert roles_of(model, {"wpe.*": "matrix"})["wpe.weight"] == "matrix"


def test_a_raw_vector_needs_no_declared_role():
    model = TinyGPT()
    model.blocks[0].gain = nn.Parameter(torch.ones(8))
    assert roles_of(model)["blocks.0.gain"] == "vector"


@pytest.mark.parametrize("name", MATRIX_RULES)
def test_a_convolution_is_a_matrix_and_refused_without_as_matrices(name):
    model = nn.Sequential(nn.Conv2d(3, 8, 2))
    assert roles_of(model) == {"0.weight": "matrix", "0.bias": "vector"}
    with pytest.raises(ValueError, match=r"0\.weight.*as_matrices"):
        build_optimizer(model, name, lr=1e-3)
    build_optimizer(model, name, lr=1e-3, as_matrices="flatten")


TINY = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 16,
}


def names_of(model: nn.Module, role: str, **options) -> set[str]:
    return {name for name, found in roles_of(model, **options).items() if found == role}


class WithValue(nn.Module):
    """A language model with a value head, as in reinforcement learning."""

    def __init__(self, language_model: nn.Module, width: int):
        super().__init__()
        self.language_model, self.value = language_model, nn.Linear(width, 1)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("labels", [2, 3])
def test_heads_of_bert_match_its_outputs(tied, labels):
    config = transformers.BertConfig(**TINY, tie_word_embeddings=tied, num_labels=labels)
    decoder = set() if tied else {"cls.predictions.decoder.weight"}
    model = transformers.BertForPreTraining(config)
    assert names_of(model, "head") == decoder | {"cls.seq_relationship.weight"}
    assert "cls.predictions.transform.dense.weight" in names_of(model, "matrix")
    classifier = transformers.BertForSequenceClassification(config)
    assert names_of(classifier, "head") == {"classifier.weight"}
    assert len(names_of(classifier, "matrix")) == 2 * 6 + 1  # six per layer, and the pooler


def test_heads_of_musicgen_match_its_codebooks():
    config = transformers.MusicgenDecoderConfig(
        vocab_size=48,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        ffn_dim=64,
        max_position_embeddings=16,
        num_codebooks=4,
        pad_token_id=0,
        bos_token_id=0,
        tie_word_embeddings=False,
    )
    model = transformers.MusicgenForCausalLM(config)
    assert names_of(model, "head") == {f"lm_heads.{i}.weight" for i in range(4)}
    assert names_of(model, "embedding") == {f"model.decoder.embed_tokens.{i}.weight" for i in range(4)}


def gpt2(tied: bool = True) -> nn.Module:
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 50, "n_positions": 16}
    config = transformers.GPT2Config(**sizes, tie_word_embeddings=tied, bos_token_id=0, eos_token_id=0)
    return transformers.GPT2LMHeadModel(config)


@pytest.mark.parametrize("tied", [True, False])
def test_heads_of_gpt2_with_a_value_head_match_both(tied):
    model = WithValue(gpt2(tied), 32)
    assert names_of(model, "head") == {"value.weight"} | (set() if tied else {"language_model.lm_head.weight"})
    assert len(names_of(model, "matrix")) == 2 * 4  # Conv1D weights


def mixtral(**options) -> nn.Module:
    config = transformers.MixtralConfig(**TINY, num_key_value_heads=1, num_local_experts=4, **options)
    return transformers.MixtralForCausalLM(config)


def test_experts_of_mixtral_match_batches_and_its_routers_are_refused_together():
    model = mixtral()
    with pytest.raises(ValueError, match=r"got 2 without") as caught:
        build_optimizer(model, "olion", lr=1e-3)
    assert 'roles={"model.layers.*.mlp.gate.weight": "matrix"}' in str(caught.value)
    optimizer = build_optimizer(model, "olion", lr=1e-3, roles={"model.layers.*.mlp.gate.weight": "matrix"})
    batches = {
        name for group in optimizer.param_groups if group.get("as_matrices") == "batch" for name in group["param_names"]
    }
    assert batches == {f"model.layers.{i}.mlp.experts.{each}" for i in (0, 1) for each in ("gate_up_proj", "down_proj")}
    assert names_of(model, "head", roles={"*.gate.weight": "matrix"}) == {"lm_head.weight"}


def language_model(
    heads_first: bool = False, heads: int = 1, outputs: int = 50, width: int = 32, table: int = 50, **more
) -> nn.Module:
    """A table, a body of two layers, and heads before or after it."""
    model = nn.Module()
    body = nn.ModuleList(nn.TransformerEncoderLayer(width, 2, 2 * width, batch_first=True) for _ in range(2))
    outer = nn.ModuleList(nn.Linear(width, outputs) for _ in range(heads))
    model.table = nn.Embedding(table, width)
    for name, module in (("heads", outer), ("body", body))[:: 1 if heads_first else -1]:
        model.add_module(name, module)
    for name, module in more.items():
        model.add_module(name, module)
    return model


@pytest.mark.parametrize(
    "model",
    [
        language_model(),
        language_model(heads=4),
        language_model(heads_first=True),
        language_model(outputs=64),
        language_model(table=64, heads_first=True, width=40),  # the table is padded
    ],
)
def test_heads_match_the_vocabulary_wherever_they_are(model):
    assert names_of(model, "head") == {f"heads.{i}.weight" for i in range(len(model.heads))}
    assert len(names_of(model, "matrix")) == 2 * 4


def test_a_last_layer_of_a_size_that_earlier_layers_read_is_refused():
    """A decoder back to the input or the end of a residual branch: it may be a head or a hidden layer."""
    with pytest.raises(ValueError, match=r"4.weight \(20, 6\) may be a head"):
        roles_of(nn.Sequential(nn.Linear(20, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 20)))


@pytest.mark.parametrize("labels", [1, 2, 3, 7])
def test_a_classifier_and_a_value_head_match_heads_whatever_their_size(labels):
    model = language_model(classifier=nn.Linear(32, labels), value=nn.Linear(32, 1))
    assert names_of(model, "head") == {"heads.0.weight", "classifier.weight", "value.weight"}


def test_a_head_of_a_size_that_later_layers_read_is_refused_until_declared():
    model = language_model(heads_first=True, outputs=64, heads=2)  # 64 = 2 x 32, as a fused hidden layer
    with pytest.raises(ValueError, match="got 2 without") as caught:
        roles_of(model)
    assert 'roles={"heads.*.weight": "matrix"}' in str(caught.value) and "\n" not in str(caught.value)
    assert names_of(model, "head", roles={"heads.*.weight": "head"}) == {"heads.0.weight", "heads.1.weight"}


def test_every_tensor_without_a_role_matches_the_message():
    model = TinyGPT()
    model.gate, model.blocks[1].mixing = nn.Parameter(torch.ones(3, 3)), nn.Parameter(torch.ones(2, 2))
    with pytest.raises(ValueError, match="got 2 without") as caught:
        build_optimizer(model, "olion", lr=1e-3)
    assert 'roles={"gate": "matrix", "blocks.*.mixing": "matrix"}' in str(caught.value)


def options_of(optimizer, option: str) -> dict[str, object]:
    """{name: this option} of every tensor of the matrices' rule."""
    matrices = [group for group in optimizer.param_groups if group["rule"] != "adamw"]
    return {name: group[option] for group in matrices for name in group["param_names"]}


@every_name
def test_blocks_of_fused_weights_of_torch_match_their_gates(name):
    model = nn.Module()
    model.attention, model.keys = nn.MultiheadAttention(8, 2, add_bias_kv=True), nn.MultiheadAttention(8, 2, kdim=4)
    model.lstm, model.gru, model.rnn = nn.LSTM(8, 8, proj_size=4), nn.GRU(4, 8), nn.RNN(8, 8)
    model.cell, model.norm = nn.LSTMCell(8, 8), nn.LayerNorm((2, 8))
    optimizer = build_optimizer(model, name, lr=1e-3)
    found = roles_of(model)
    assert {found[each] for each in ("attention.bias_k", "attention.bias_v", "norm.weight", "norm.bias")} == {"vector"}
    if name in MATRIX_RULES:
        split = options_of(optimizer, "qkv_split")
        assert {each: count for each, count in split.items() if count != 1} == {
            "attention.in_proj_weight": 3,
            **{f"{module}.weight_{kind}": 4 for module, kind in (("cell", "ih"), ("cell", "hh"))},
            **{f"lstm.weight_{kind}_l0": 4 for kind in ("ih", "hh")},
            **{f"gru.weight_{kind}_l0": 3 for kind in ("ih", "hh")},
        }
        declared = options_of(build_optimizer(model, name, lr=1e-3, qkv_split={"lstm.*_l0": 1}), "qkv_split")
        assert declared["lstm.weight_ih_l0"] == 1 and declared["gru.weight_ih_l0"] == 3


@every_name
def test_as_matrices_of_a_pattern_matches_its_tensors_and_elementwise_rules_ignore_it(name):
    model = nn.Sequential(nn.Conv2d(3, 8, 2), nn.ReLU(), nn.Conv1d(8, 8, 2))
    with pytest.raises(ValueError, match="as_matrices: 'x'"):
        build_optimizer(model, name, lr=1e-3, as_matrices={"x": "flatten"})
    optimizer = build_optimizer(model, name, lr=1e-3, as_matrices={"0.*": "flatten", "2.*": "batch"})
    assert groups_of(optimizer)["0.weight"] == (name, 0.1)
    if name in MATRIX_RULES:
        assert options_of(optimizer, "as_matrices") == {"0.weight": "flatten", "2.weight": "batch"}
        with pytest.raises(ValueError, match="got none for") as caught:
            build_optimizer(model, name, lr=1e-3)
        assert 'as_matrices={"0.weight": "flatten", "2.weight": "flatten"}' in str(caught.value)


def test_the_rates_of_matrices_and_rest_match_the_arguments():
    optimizer = build_optimizer(TinyGPT(), "olion", lr=1e-3, adamw_lr=5e-3)
    assert {group["rule"]: group["lr"] for group in optimizer.param_groups} == {"olion": 1e-3, "adamw": 5e-3}
    optimizer = build_optimizer(TinyGPT(), "olion", lr=1e-3)
    assert {group["lr"] for group in optimizer.param_groups} == {1e-3}


def test_the_papers_configuration_is_the_default_of_each_optimizer():
    first = {name: build_optimizer(TinyGPT(), name, lr=1e-3).param_groups[0] for name in NAMES}
    assert first["olion"]["betas"] == (0.95, 0.98)
    assert first["muon"]["adjust_lr_fn"] == "match_rms_adamw"
    assert (first["lion"]["betas"], first["lion"]["scale"]) == (pytest.approx((0.931, 0.98)), 0.2)
    assert (first["adamw"]["betas"], first["adamw"]["eps"]) == ((0.9, 0.95), 1e-8)
    for name in NAMES:
        rest = build_optimizer(TinyGPT(), name, lr=1e-3).param_groups[-1]
        assert (rest["betas"], rest["eps"]) == ((0.9, 0.95), 1e-8)


@pytest.mark.parametrize("name", MATRIX_RULES)
def test_qkv_split_of_a_pattern_matches_the_fused_weights_alone(name):
    optimizer = build_optimizer(TinyGPT(), name, lr=1e-3, qkv_split={"*.c_attn.weight": 3})
    split = {each: group["qkv_split"] for group in optimizer.param_groups[:2] for each in group["param_names"]}
    assert split == {each: 3 if "c_attn" in each else 1 for each in HIDDEN}


def phi3() -> nn.Module:
    """Four heads of 8 for queries, one each for keys and values, in one weight (32 + 8 + 8, 32)."""
    sizes = {**TINY, "num_attention_heads": 4}
    return transformers.Phi3ForCausalLM(transformers.Phi3Config(**sizes, num_key_value_heads=1, pad_token_id=0))


@pytest.mark.parametrize(
    ("make", "pattern", "split", "sizes", "dim"),
    [
        (gpt2, "*.c_attn.weight", 3, (32, 32, 32), 1),  # Conv1D: (in, out)
        (phi3, "*.qkv_proj.weight", (4, 1, 1), (32, 8, 8), 0),
        (phi3, "*.qkv_proj.weight", [32, 8, 8], (32, 8, 8), 0),
    ],
)
def test_blocks_of_fused_attention_match_matrices_of_their_own(make, pattern, split, sizes, dim):
    model = make().double()
    optimizer = build_optimizer(model, "muon", lr=0.1, qkv_split={pattern: split})
    fused = [param for name, param in model.named_parameters() if fnmatchcase(name, pattern)]
    parts = [[nn.Parameter(part.clone()) for part in param.detach().split(sizes, dim)] for param in fused]
    separate = Muon([part for each in parts for part in each], lr=0.1, adjust_lr_fn="match_rms_adamw")
    for param, of_param in zip(fused, parts, strict=True):
        param.grad = torch.randn_like(param)
        for part, grad in zip(of_param, param.grad.split(sizes, dim), strict=True):
            part.grad = grad
    optimizer.step()
    separate.step()
    assert len(fused) == 2
    for param, of_param in zip(fused, parts, strict=True):
        torch.testing.assert_close(param.detach(), torch.cat(of_param, dim).detach(), rtol=0, atol=1e-11)  # rounding


@pytest.mark.parametrize(
    "options, named",
    [
        ({"name": "oilon"}, "'olion'"),
        ({"name": "muom"}, "'muon'"),
        ({"name": "olion", "ns_step": 3}, "'ns_steps'"),
        ({"name": "adamw", "ns_steps": 3}, "ns_steps"),
        ({"name": "olion", "lr": -1.0}, "lr"),
        ({"name": "olion", "adamw_lr": -1.0}, "lr"),
        ({"name": "olion", "roles": {"wpe.weight": "matrices"}}, "'matrix'"),
        ({"name": "olion", "roles": {"wpe.weigth": "matrix"}}, "'wpe.weight'"),
        ({"name": "olion", "qkv_split": {"*.c_atn.weight": 3}}, "c_atn"),
        ({"name": "olion", "qkv_split": {"*.c_attn.weight": 5}}, "qkv_split"),
        ({"name": "olion", "qkv_split": {"*.c_attn.weight": 1.5}}, "qkv_split must be a whole number or a list"),
        ({"name": "olion", "qkv_split": {"*.c_attn.weight": (32, 8, 8)}}, "c_attn.weight: qkv_split=.* 48 equal parts"),
    ],
)
def test_build_optimizer_refuses_a_bad_option_naming_the_nearest(options, named):
    with pytest.raises(ValueError, match=named) as caught:
        build_optimizer(TinyGPT(), **{"lr": 1e-3, **options})
    assert "\n" not in str(caught.value)


def test_a_model_without_trainable_parameters_is_refused():
    with pytest.raises(ValueError, match="trainable"):
        build_optimizer(TinyGPT().requires_grad_(False), "olion", lr=1e-3)


@pytest.mark.parametrize("rest", ["polarsgdm", "signum"])
def test_rest_gives_tables_another_rule_and_leaves_vectors_to_adamw(rest):
    optimizer = build_optimizer(TinyGPT(), "muon", lr=0.1, adamw_lr=0.2, rest=rest, rest_lr=0.3, weight_decay=0.4)
    found = groups_of(optimizer)
    assert {found[name] for name in TABLES} == {(rest, 0.4)}
    assert {found[name] for name in HIDDEN} == {("muon", 0.4)}
    assert {found[name] for name in found.keys() - TABLES - HIDDEN} == {("adamw", 0.0)}
    rates = {group["rule"]: group["lr"] for group in optimizer.param_groups}
    assert rates == {rest: 0.3, "muon": 0.1, "adamw": 0.2}


def test_polarsgdm_on_tables_steps_them_by_their_nuclear_norm():
    model = TinyGPT(bias=False).double()
    optimizer = build_optimizer(model, "olion", lr=0.0, rest="polarsgdm", rest_lr=0.5, weight_decay=0.0)
    before = model.wte.weight.detach().clone()
    for param in model.parameters():
        param.grad = torch.randn_like(param)
    optimizer.step()
    expected, _ = reference.polargrad(before, model.wte.weight.grad, {}, lr=0.5, momentum=0.9)
    torch.testing.assert_close(model.wte.weight.detach(), expected, rtol=0, atol=1e-10)


def test_rest_refuses_a_rate_for_adamw_and_an_unknown_rule():
    for options, message in (({"rest_lr": 0.1}, "set adamw_lr"), ({"rest": "polarsgd"}, "did you mean 'polarsgdm'")):
        with pytest.raises(ValueError, match=message):
            build_optimizer(TinyGPT(), "olion", lr=0.1, **options)
