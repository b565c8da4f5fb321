"""nanoGPT.model against transformers' GPT2LMHeadModel, torch's FLOP counter, and its own definition."""

from dataclasses import replace
from functools import partial

import pytest
import torch
import transformers
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from common import UserError
from common.launch import Process
from common.parallel import ParallelConfig, move_or_shard
from nanoGPT.model import GPT, GPTConfig
from optimizers import roles_of

TINY = GPTConfig(n_layer=2, n_head=2, n_embd=32, context=16, vocab_size=61)


@pytest.fixture
def hugging_face():
    """A GPT2LMHeadModel whose every parameter is random: its own biases are 0 and its gains 1, which hides slips."""
    shape = dict(n_layer=3, n_head=4, n_embd=48, n_positions=32, vocab_size=97, attn_implementation="eager")
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 1e-5), (torch.float64, 1e-12)],  # of logits of size 10: a few roundings of each dtype
)
def test_logits_match_hugging_face(hugging_face, dtype, tolerance):
    hugging_face = hugging_face.to(dtype)
    tokens = torch.randint(97, (3, 32))
    logits, loss = GPT.from_huggingface(hugging_face)(tokens)
    expected = hugging_face(tokens).logits
    assert loss is None and logits.dtype == dtype
    assert (logits - expected).abs().max() < tolerance * expected.abs().max()


def test_loss_matches_hugging_face_for_shifted_targets(hugging_face):
    tokens = torch.randint(97, (3, 33))
    _, loss = GPT.from_huggingface(hugging_face)(tokens[:, :-1], tokens[:, 1:])
    logits = hugging_face(tokens[:, :-1]).logits
    torch.testing.assert_close(loss, F.cross_entropy(logits.reshape(-1, 97), tokens[:, 1:].reshape(-1)))


def test_gradients_match_hugging_face(hugging_face):
    hugging_face, tokens = hugging_face.double(), torch.randint(97, (2, 32))
    model = GPT.from_huggingface(hugging_face)
    model(tokens)[0].square().mean().backward()
    hugging_face(tokens).logits.square().mean().backward()
    theirs, ours = hugging_face.transformer, model
    torch.testing.assert_close(ours.wte.weight.grad, theirs.wte.weight.grad)
    torch.testing.assert_close(ours.blocks[1].attn.c_attn.weight.grad, theirs.h[1].attn.c_attn.weight.grad.t())
    torch.testing.assert_close(ours.blocks[2].mlp.c_proj.bias.grad, theirs.h[2].mlp.c_proj.bias.grad)


def test_from_huggingface_reads_a_saved_folder_like_the_model(hugging_face, tmp_path):
    hugging_face.save_pretrained(tmp_path)
    tokens = torch.randint(97, (1, 8))
    from_folder, from_model = GPT.from_huggingface(str(tmp_path)), GPT.from_huggingface(hugging_face)
    assert torch.equal(from_folder(tokens)[0], from_model(tokens)[0])


@pytest.mark.parametrize("changed", [{"activation_function": "relu"}, {"layer_norm_epsilon": 1e-6}])
def test_from_huggingface_refuses_other_arithmetic(changed):
    shape = dict(n_layer=1, n_head=2, n_embd=8, n_positions=8, vocab_size=11)
    with pytest.raises(ValueError, match=next(iter(changed))):
        GPT.from_huggingface(transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape, **changed)))


def test_from_huggingface_refuses_an_unreachable_hub_in_one_line(monkeypatch):
    def unreachable(name, **_):
        raise OSError("We couldn't connect to 'https://huggingface.co'\nto load the files")

    monkeypatch.setattr(transformers.GPT2LMHeadModel, "from_pretrained", unreachable)
    with pytest.raises(UserError, match=r"couldn't connect to .*hf download gpt2-medium --local-dir") as caught:
        GPT.from_huggingface("gpt2-medium")
    assert "\n" not in str(caught.value)


def test_from_huggingface_refuses_a_folder_that_lacks_weights(tmp_path):
    shape = dict(n_layer=1, n_head=2, n_embd=8, n_positions=8, vocab_size=11)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape))
    kept = {name: weight for name, weight in model.state_dict().items() if "ln_f" not in name}
    model.save_pretrained(tmp_path, state_dict=kept)
    with pytest.raises(UserError, match=r"lacks 2, as transformer\.ln_f\.bias"):
        GPT.from_huggingface(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"cut short")
    with pytest.raises(UserError, match="cannot be loaded from a folder") as caught:
        GPT.from_huggingface(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_loss_matches_the_mean_over_the_targets_that_are_not_minus_one():
    model, tokens, targets = GPT(TINY), torch.randint(61, (2, 16)), torch.randint(61, (2, 16))
    targets[0, 3:9] = -1
    logits, loss = model(tokens, targets)
    kept = targets != -1
    torch.testing.assert_close(loss, -logits.log_softmax(-1)[kept, targets[kept]].mean())


def test_logits_match_those_before_a_later_token_changed():
    model, tokens = GPT(TINY), torch.randint(61, (1, 16))
    changed = tokens.clone()
    changed[0, 10] = (tokens[0, 10] + 1) % 61
    before, after = model(tokens)[0], model(changed)[0]
    assert torch.equal(before[:, :10], after[:, :10])
    assert not torch.equal(before[:, 10:], after[:, 10:])


def test_loss_under_autocast_stays_in_float32():
    with torch.autocast("cpu", torch.bfloat16):
        logits, loss = GPT(TINY)(torch.zeros(1, 4, dtype=torch.long), torch.zeros(1, 4, dtype=torch.long))
    assert logits.dtype == torch.bfloat16 and loss.dtype == torch.float32


def test_compiled_model_matches_eager_without_a_graph_break():
    model, tokens = GPT(TINY), torch.randint(61, (2, 17))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    _, expected = model(tokens[:, :-1], tokens[:, 1:])
    _, loss = compiled(tokens[:, :-1], tokens[:, 1:])
    torch.testing.assert_close(loss, expected)


def test_initial_weights_match_gpt2s_standard_deviations():
    model = GPT(GPTConfig(n_layer=8, n_head=4, n_embd=128, context=256, vocab_size=512, bias=True))
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            expected = 0.02 / 4 if "c_proj" in name else 0.02  # 4 = sqrt(2 n_layer)
            assert parameter.std().item() == pytest.approx(expected, rel=0.03), name  # 16,384 draws or more
            assert abs(parameter.mean().item()) < 0.02 * expected + 1e-4, name
        else:
            assert torch.all(parameter == (1 if name.endswith("weight") else 0)), name


def test_num_parameters_matches_openais_gpt2_small():
    with torch.device("meta"):
        model = GPT(GPTConfig(vocab_size=50257, bias=True))
    assert model.num_parameters() == 124_439_808  # the Hub's count for "gpt2"
    assert model.lm_head.weight is model.wte.weight


def test_flops_per_token_match_torchs_counter():
    model, tokens = GPT(TINY), torch.randint(61, (2, 16))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(tokens, tokens)[1].backward()
    gains = sum(parameter.numel() for parameter in model.parameters() if parameter.ndim == 1)  # not counted by torch
    assert model.flops_per_token() * tokens.numel() == counter.get_total_flops() + 6 * gains * tokens.numel()


def test_generate_at_temperature_0_matches_the_argmax_of_each_prefix():
    model, tokens = GPT(TINY), torch.randint(61, (2, 3))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)  # so that every token of the context counts
    generated = model.generate(tokens, 20, temperature=0)  # passes the context of 16
    assert generated.shape == (2, 23) and torch.equal(generated[:, :3], tokens)
    for end in range(3, 23):
        logits, _ = model(generated[:, max(end - 16, 0) : end])
        assert torch.equal(generated[:, end], logits[:, -1].argmax(-1))
    assert torch.equal(generated, model.generate(tokens, 20, temperature=1.0, top_k=1))


def test_generate_matches_itself_for_a_seed_and_stays_within_the_vocabulary():
    model, tokens = GPT(TINY), torch.zeros(4, 1, dtype=torch.long)

    def draw(seed):
        return model.generate(tokens, 50, generator=torch.Generator().manual_seed(seed), vocab_size=7)

    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))
    assert draw(1).unique().tolist() == list(range(7))


def test_generate_matches_the_softmax_of_the_top_k_in_frequency():
    model, tokens = GPT(TINY), torch.zeros(20_000, 1, dtype=torch.long)
    torch.nn.init.normal_(model.wte.weight, std=0.3)  # far from uniform
    generated = model.generate(tokens, 1, 0.7, 5, torch.Generator().manual_seed(0))[:, 1]
    scores, kept = model(tokens[:1])[0][0, -1].detach().topk(5)
    frequencies = (generated[:, None] == kept).double().mean(0)
    # Four standard errors of a frequency at 20,000 draws are at most 0.0142.
    torch.testing.assert_close(frequencies, (scores / 0.7).softmax(0).double(), atol=0.0142, rtol=0)
    assert frequencies.sum() == 1


def test_forward_refuses_more_tokens_than_the_context():
    with pytest.raises(ValueError, match="context is 16 tokens, got 17"):
        GPT(TINY)(torch.zeros(1, 17, dtype=torch.long))


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"n_head": 5}, "n_head"),
        ({"n_layer": 0}, "n_layer"),
        ({"dropout": 1.0}, "dropout"),
        ({"vocab_size": 0}, "vocab"),
    ],
)
def test_gpt_refuses_an_impossible_shape(changed, named):
    with pytest.raises(ValueError, match=named):
        GPT(GPTConfig(**{"n_layer": 1, "n_head": 2, "n_embd": 8, "context": 4, "vocab_size": 8, **changed}))


def test_one_block_as_wide_as_its_context_has_the_roles_of_a_deeper_one():
    """The table of positions, of as many rows as attention has outputs, is no vocabulary."""
    found = roles_of(GPT(replace(TINY, n_layer=1, context=32, vocab_size=1000)))
    assert found["blocks.0.attn.c_proj.weight"] == found["blocks.0.mlp.c_fc.weight"] == "matrix"
    assert found["wte.weight"] == found["wpe.weight"] == "embedding"


def test_training_is_compiled_for_one_size_of_batch_after_validations_of_others(monkeypatch):
    """As on 8 GPUs, where a validation's passes have other sizes than training's."""
    symbolic = []

    def backend(graph, inputs):
        sizes = [size for each in inputs if torch.is_tensor(each) for size in each.shape]
        symbolic.append(any(isinstance(each, torch.SymInt) for each in (*inputs, *sizes)))
        return graph.forward

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    process = Process(rank=0, local_rank=0, world_size=1, device=torch.device("cpu"))
    network = move_or_shard(GPT(TINY), ParallelConfig(), process, torch.float32, compile=True, trained=True)
    for size in (4, 2, 3):
        network(*torch.zeros(2, size, 16, dtype=torch.long))
    assert symbolic == [False] * 3
