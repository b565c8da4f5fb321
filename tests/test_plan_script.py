"""scripts.plan: bytes as counted on gloo ranks, memory and work as by the formulas."""

import json
import re

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard
from torch.nn.parallel import DistributedDataParallel

from common import UserError
from nanoGPT.model import GPT, GPTConfig
from optimizers import OLion, RuleOptimizer, build_optimizer, count_bytes
from optimizers.layout import layout_of, local_of
from optimizers.polar import flops
from scripts.plan import Options, distribute, fake_group, gradient_traffic, main, parse_mesh, plan, planned, table

MESHES = ("ddp=4", "fsdp=4", "hsdp=2x2", "tp=4", "fsdp_tp=2x2")
RULES = ("adamw", "muon", "olion")
# Nothing divides by 4: the last shards are short, and some ranks own more matrices than others.
SMALL = GPTConfig(n_layer=3, n_head=2, n_embd=18, context=8, vocab_size=40)


@pytest.fixture(scope="module")
def ranks4():
    with Ranks(4) as ranks:
        yield ranks


def laid_out(text: str, rule: str, device: str) -> tuple[nn.Module, RuleOptimizer]:
    with torch.device(device):
        model = GPT(SMALL)
    # Matrices are orthogonalized in bfloat16 on GPUs and on meta, on CPUs only if asked.
    options = {} if rule == "adamw" else {"ns_dtype": torch.bfloat16}
    process_group = distribute(model, parse_mesh(text))
    return model, build_optimizer(model, rule, lr=1e-3, process_group=process_group, **options)


def counted(text: str) -> dict[str, tuple[dict, dict]]:
    """Step each rule once on random gradients; return the bytes that this rank (sent, received), by kind."""
    found = {}
    for rule in RULES:
        torch.manual_seed(0)
        model, optimizer = laid_out(text, rule, "cpu")
        for param in model.parameters():
            param.grad = torch.zeros_like(param)
            local_of(param.grad).normal_()
        with count_bytes() as traffic:
            optimizer.step()
        assert optimizer.plan.traffic() == traffic
        found[rule] = (dict(traffic.sent), dict(traffic.received))
    return found


@pytest.mark.parametrize("text", MESHES)
def test_planned_bytes_match_those_counted_on_gloo_ranks(ranks4, text):
    found = ranks4(counted, text)
    with fake_group(4, 0):
        for rule in RULES:
            plan = laid_out(text, rule, "meta")[1].plan
            for rank in range(4):
                traffic = plan.traffic(rank)
                assert (dict(traffic.sent), dict(traffic.received)) == found[rank][rule], (rule, rank)


def test_bytes_of_a_column_match_the_most_and_the_mean_of_gloo_ranks(ranks4):
    found = [sum(each["olion"][1].values()) for each in ranks4(counted, "hsdp=2x2")]
    with fake_group(4, 0):
        column = planned(laid_out("hsdp=2x2", "olion", "meta")[1], parse_mesh("hsdp=2x2"), torch.float32)
    assert column["received"]["all"] == {"busiest": max(found), "mean": sum(found) / 4}


def test_bytes_of_one_matrix_match_the_arithmetic_of_the_readme():
    with fake_group(4, 0):
        with torch.device("meta"):
            model = nn.Linear(128, 512, bias=False)
        fully_shard(model, mesh=init_device_mesh("cpu", (4,)))
        owner, other = (OLion(model.parameters(), ns_dtype=torch.float32).plan.traffic(rank) for rank in (0, 1))
    assert (owner.received, other.sent) == ({"to owners": 3 * 65_536}, {"to owners": 65_536})
    assert (owner.sent, other.received) == ({"directions": 3 * 2_080}, {"directions": 2_080})


def test_kinds_of_a_column_match_its_total():
    with fake_group(4, 0):
        column = planned(laid_out("tp=4", "normuon", "meta")[1], parse_mesh("tp=4"), torch.float32)
    mean = {kind: found["mean"] for kind, found in column["received"].items()}
    assert mean["rows"] > 0 and mean.pop("all") == pytest.approx(sum(mean.values()))


def planned_for(model: str, mesh: str, **options) -> dict:
    return plan(Options(model=model, mesh=mesh, **options))


@pytest.mark.parametrize(
    ("model", "parameters"),
    [
        ("gpt2_small", 124_373_760),  # 85 M of blocks, 50,304 + 1,024 rows of 768, no biases
        ("gpt2_xl", 1_556_840_000),
        ("llama2_7b", 6_738_415_616),  # the published checkpoints'
        ("llama2_13b", 13_015_864_320),
        ("llama2_70b", 68_976_648_192),
    ],
)
def test_models_match_their_published_sizes(model, parameters):
    assert planned_for(model, "fsdp=8", optimizers=("adamw",))["parameters"] == parameters


def test_memory_matches_the_formulas():
    columns = planned_for("gpt2_small", "fsdp=8", grad_dtype="bfloat16", state_dtype="bfloat16")["columns"]
    matrices, rest = 12 * 12 * 768**2, (50304 + 1024 + 25) * 768  # all dimensions are multiples of 8
    for column in columns.values():
        assert column["weights"] == 4 * (matrices + rest) // 8
        assert column["gradients"] == 2 * (matrices + rest) // 8
    counters = 4 * 27  # AdamW's step count of each tensor that is no matrix
    assert columns["adamw"]["state"] == 8 * (matrices + rest) // 8 + counters + 4 * 48
    assert columns["muon"]["state"] == columns["olion"]["state"] == (2 * matrices + 8 * rest) // 8 + counters


def test_memory_of_the_last_rank_matches_its_shorter_shards():
    last = planned_for("gpt2_small", "fsdp=7", rank=6, optimizers=("adamw",))["columns"]["adamw"]
    block = [(2304, 768), (768, 768), (3072, 768), (768, 3072)]
    shapes = 12 * block + 25 * [(768, 1)] + [(50304, 768), (1024, 768)]
    # torch.chunk gives the first six ranks a seventh, rounded up, and the last the rest.
    assert last["weights"] == 4 * sum((rows - 6 * -(-rows // 7)) * width for rows, width in shapes)


def test_work_of_gpt2_xl_on_8_replicas_matches_an_even_share():
    column = planned_for("gpt2_xl", "ddp=8", optimizers=("olion",))["columns"]["olion"]
    shapes = [(4800, 1600), (1600, 1600), (6400, 1600), (1600, 6400)]
    share = 48 * sum(flops(m, n, dtype=torch.bfloat16, device="meta") for m, n in shapes) / 8
    assert column["busiest_flops"] == pytest.approx(share * column["balance"])
    assert 1 <= column["balance"] < 1.01  # 192 matrices on 8 ranks, 24 each
    # Bits, and 144 bytes per matrix: 8 positions of zeros, its norm, and the flag of more.
    assert column["received"]["directions"]["mean"] == 7 / 8 * (48 * 12 * 1600**2 / 8 + 192 * 144)


def test_owners_of_gpt2_small_on_8_replicas_hold_an_eighth_of_the_momenta_and_halve_the_gradient_s_bytes():
    columns = {mesh: planned_for("gpt2_small", mesh, optimizers=("olion",))["columns"]["olion"] for mesh in OF_8}
    matrices, rest = 12 * 12 * 768**2, (50304 + 1024 + 25) * 768
    everywhere, owners = (columns[mesh] for mesh in OF_8)
    assert everywhere["gradient_traffic"] == 2 * 7 * 4 * (matrices + rest) // 8
    share = everywhere["state"] - owners["state"]  # rank 0 owns some of the largest: 6 matrices of 48
    assert share / 4 == pytest.approx(matrices * 7 / 8, rel=0.05)
    # A chain sends a matrix out of every rank but its owner; 16 bytes of its norm are all-reduced.
    wanted = 2 * 7 * 4 * rest // 8 + 4 * matrices * 7 / 8 + 2 * 7 * 16 * 48 / 8
    assert owners["gradient_traffic"] == pytest.approx(wanted, rel=0.05)
    assert owners["received"] == everywhere["received"]  # directions


OF_8 = ("ddp=8", "owners=8")


def reduced_to_owners() -> int:
    """Return the bytes that this rank sends, or receives if they are more, in a backward pass."""
    model = DistributedDataParallel(GPT(SMALL))
    build_optimizer(model, "olion", lr=1e-3, gradients="to_owners")
    tokens = torch.arange(16).view(2, 8)
    with count_bytes() as traffic:
        model(tokens, tokens)[1].backward()
    return max(traffic.total_sent, traffic.total_received)


@pytest.mark.slow
def test_bytes_of_gradients_to_owners_match_those_counted_on_gloo_ranks(ranks4):
    with fake_group(4, 0):
        _, optimizer = laid_out("owners=4", "olion", "meta")
        optimizer.keep_at_owners()
        column = planned(optimizer, parse_mesh("owners=4"), torch.float32)
    # A ring's bytes are rounded down per bucket.
    assert column["gradient_traffic"] == pytest.approx(max(ranks4(reduced_to_owners)), abs=8)


def test_layout_of_replicas_of_shards_of_parts_matches_the_mesh():
    whole, placements = (8, 6), [Replicate(), _StridedShard(0, split_factor=2), Shard(0)]
    with fake_group(8, 5):
        mesh = init_device_mesh("cpu", (2, 2, 2))
        lie = {"run_check": False, "shape": whole, "stride": (6, 1)}
        found = layout_of(DTensor.from_local(torch.zeros(2, 6), mesh, placements, **lie), None, None)
        groups = [dist.get_process_group_ranks(group) for group in found.groups]
    assert (found.kind, found.grid, groups) == ("hsdp", ((0, 1, 2, 3), (4, 5, 6, 7)), [[4, 5, 6, 7], [1, 5]])


def test_work_under_fsdp_and_tensor_parallelism_matches_an_eighth_of_the_whole():
    whole, shared = (planned_for("gpt2_small", mesh)["columns"]["muon"] for mesh in ("ddp=1", "fsdp_tp=2x4"))
    assert shared["busiest_flops"] == pytest.approx(whole["busiest_flops"] / 8 * shared["balance"])
    assert whole["balance"] is None and whole["received"]["all"]["busiest"] == 0 < shared["received"]["all"]["mean"]


def test_gradient_traffic_matches_a_ring_s():
    assert gradient_traffic(800, parse_mesh("ddp=8")) == 1400  # twice 7/8 of all
    assert gradient_traffic(100, parse_mesh("fsdp=8")) == 700  # 7/8 of all 800, once
    assert gradient_traffic(200, parse_mesh("hsdp=2x4")) == 600 + 200
    assert gradient_traffic(100, parse_mesh("fsdp_tp=4x2")) == 300
    assert gradient_traffic(100, parse_mesh("tp=8")) == 0


def test_times_match_the_given_speeds():
    fast, slow = (
        planned_for("gpt2_small", "fsdp=8", gpu_tflops=tflops, efficiency=0.5, link_gbs=gbs)["columns"]["muon"]
        for tflops, gbs in ((200, 50), (100, 25))
    )
    assert fast["seconds"]["orthogonalization"] == pytest.approx(fast["busiest_flops"] / 1e14)
    assert fast["seconds"]["exchange"] == pytest.approx(fast["received"]["all"]["busiest"] / 50e9)
    assert {name: 2 * taken for name, taken in fast["seconds"].items()} == pytest.approx(slow["seconds"])


def test_1024_ranks_of_llama2_70b_match_the_sum_of_their_directions():
    found = planned_for("llama2_70b", "hsdp=16x64")
    assert found["ranks"] == 1024
    directions = (68_976_648_192 - 2 * 32000 * 8192 - 161 * 8192) / 64  # entries a rank holds, of the matrices
    for rule, bits, beside in (("muon", 16, 0), ("olion", 1, 144)):  # bytes beside the signs of each of 7 x 80 matrices
        mean = found["columns"][rule]["received"]["directions"]["mean"]
        # All but 1 / 1024 come from others.
        assert mean == (bits / 8 * directions + beside * 7 * 80) * 1023 / 1024


def test_record_matches_the_table(monkeypatch, capsys, tmp_path):
    path = tmp_path / "plan.json"
    words = ["--model", "gpt2_small", "--mesh", "hsdp=2x4", "--print-plan", "--record", str(path)]
    monkeypatch.setattr("sys.argv", ["plan", *words])
    main()
    printed, record = capsys.readouterr().out, json.loads(path.read_text())
    assert table(record["columns"]) in printed
    assert "blocks.11.mlp.c_proj.weight" in printed and "hsdp" in printed  # the whole plan
    assert record["options"]["mesh"] == "hsdp=2x4" and record["machine"]["cores"] and record["ranks"] == 8


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mesh": "ddp8"}, "--mesh must be like ddp=8"),
        ({"mesh": "dpd=8"}, "hsdp=16x8"),
        ({"mesh": "hsdp=8"}, "got 'hsdp=8'"),
        ({"mesh": "fsdp=-1"}, "got 'fsdp=-1'"),
        ({"mesh": "fsdp="}, "in numbers of ranks"),
        ({"mesh": "hsdp=64x32"}, "1,024 ranks; got 2,048"),
        ({"mesh": "tp=8"}, "divide the 12 heads of gpt2_small; got 8"),
        ({"mesh": "ddp=4", "rank": 4}, "--rank must be from 0 to 3"),
        ({"mesh": "ddp=4", "link_gbs": 0.0}, "--link-gbs must be above 0 and finite; got 0"),
        ({"mesh": "ddp=4", "gpu_tflops": float("nan")}, "--gpu-tflops must be above 0 and finite; got nan"),
        ({"mesh": "ddp=4", "efficiency": 2.0}, "--efficiency must be above 0 and at most 1; got 2.0"),
    ],
)
def test_impossible_options_are_refused_in_one_line(options, words):
    with pytest.raises(UserError, match=re.escape(words)) as error:
        planned_for("gpt2_small", **options)
    assert "\n" not in str(error.value)
    assert not dist.is_initialized()
