"""Probes against float64 references written from the formulas, on one process and on gloo ranks."""

import math
from copy import deepcopy

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks
from reference import polar_factor
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from optimizers import OLion, Probe, build_optimizer, measures, probe
from optimizers.probe import QUANTITIES, _update
from optimizers.watched import choose

RULES = ("olion", "muon", "adamuon", "lion", "adamw")
ALL = tuple(QUANTITIES)


def hadamard(n: int) -> Tensor:
    """Sylvester's Hadamard matrix: entries of +-1, rows orthogonal."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < n:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix


def structured() -> dict[str, Tensor]:
    """Matrices that are hard to measure, in float64."""
    generator = torch.Generator().manual_seed(0)

    def gaussian(m: int, n: int) -> Tensor:
        return torch.randn(m, n, generator=generator, dtype=torch.float64)

    dead = gaussian(20, 12)
    dead[[3, 7]] = 0
    heavy = gaussian(18, 30)
    heavy[:, 5] *= 100
    return {
        "square": gaussian(16, 16),
        "tall": gaussian(40, 12),
        "wide": gaussian(12, 50),
        "low rank": gaussian(24, 3) @ gaussian(3, 16),
        "dead rows": dead,
        "heavy column": heavy,
        "hadamard": hadamard(16),
        "decaying": gaussian(16, 16) @ torch.diag(0.5 ** torch.arange(16.0, dtype=torch.float64)),
        "one column": gaussian(9, 1),
    }


every_matrix = pytest.mark.parametrize("name", structured())


def direction_reference(mixed: Tensor, update: Tensor) -> dict[str, float]:
    """PAPER's formulas, one singular vector at a time."""
    u, sigma, vh = torch.linalg.svd(mixed, full_matrices=False)
    rank = int((sigma > sigma[0] * 1e-12).sum())
    q = polar_factor(mixed)
    signs = torch.sign(q)
    agreements = [float(u[:, k] @ signs @ vh[k]) for k in range(rank)]
    mean = float(q.abs().sum()) / rank
    deviation = math.sqrt(sum((each - mean) ** 2 for each in agreements))
    m, n = mixed.shape
    applied = torch.sign(update)
    return {
        "isotropy": math.sqrt(rank) * deviation / float(q.abs().sum()),
        "isotropy_haar": math.sqrt((math.pi / 2 - 1) * rank / (m * n)),
        "flatness": float(q.abs().sum()) / math.sqrt(rank * m * n),
        "sign_spectral": float(torch.linalg.matrix_norm(applied, 2)) / math.sqrt(max(m, n)),
        "flipped_signs": float((applied * signs < 0).double().mean()),
        "alignment": float((mixed * applied).sum() / sigma.sum()) / mean,
    }


def numbers(found: dict[str, Tensor]) -> dict[str, float]:
    return {name: value.item() for name, value in found.items()}


# --- One matrix


@every_matrix
def test_norms_match_an_svd(name):
    matrix = structured()[name]
    sigma = torch.linalg.svdvals(matrix)
    entries = matrix.flatten() - matrix.mean()
    expected = {
        "weight_spectral": sigma[0].item(),
        "weight_max_abs": matrix.abs().max().item(),
        "weight_frobenius": sigma.square().sum().sqrt().item(),
        "weight_stable_rank": (sigma.square().sum() / sigma[0] ** 2).item(),
        "weight_kurtosis": (entries**4).mean().item() / entries.square().mean().item() ** 2,
    }
    # The spectral norm is the root of an eigenvalue, good to some float64 eps.
    assert numbers(measures.norms(matrix[None])) == pytest.approx(expected, rel=1e-10)


@every_matrix
def test_directions_match_the_formulas_in_float64(name):
    mixed = structured()[name]
    update = torch.sign(mixed) + 0.1 * mixed  # with some signs of its own, and zeros in dead rows
    found = numbers(measures.direction(mixed[None], update[None]))
    assert found == pytest.approx(direction_reference(mixed, update), rel=1e-9, abs=1e-12)


def test_directions_in_float32_are_near_those_in_float64():
    mixed = structured()["tall"]
    wide = numbers(measures.direction(mixed[None], mixed[None]))
    narrow = numbers(measures.direction(mixed[None].float(), mixed[None].float()))
    assert narrow == pytest.approx(wide, rel=1e-4, abs=1e-5)  # a condition number of 10, hundreds of sums


def test_a_hadamard_matrix_is_isotropic_and_flat():
    matrix = hadamard(32)
    found = numbers(measures.direction(matrix[None], matrix[None]))
    assert found | {"isotropy_haar": 0} == pytest.approx(
        {"isotropy": 0, "isotropy_haar": 0, "flatness": 1, "sign_spectral": 1, "flipped_signs": 0, "alignment": 1},
        abs=1e-12,
    )


def test_the_haar_level_is_that_of_random_orthogonal_matrices():
    torch.manual_seed(0)
    stack = torch.linalg.qr(torch.randn(20, 128, 48, dtype=torch.float64)).Q
    found = measures.direction(stack, stack)
    # 20 matrices of 48 singular directions: a sample's level strays by about 1 / sqrt(2 x 960), the formula by 1 / 48.
    assert found["isotropy"].mean().item() == pytest.approx(found["isotropy_haar"][0].item(), rel=0.1)
    assert found["flatness"].mean().item() == pytest.approx(math.sqrt(2 / math.pi), rel=0.01)


def test_spectra_are_quantiles_of_an_svd_and_of_the_entries():
    weight, momentum = structured()["wide"], structured()["decaying"]
    found = measures.spectrum(weight[None], momentum[None])
    places = torch.linspace(0, 1, measures.POINTS, dtype=torch.float64)
    expected = {
        "weight_entries": weight.flatten().quantile(places),
        "weight_singular_values": torch.linalg.svdvals(weight).quantile(places),
        "momentum_singular_values": torch.linalg.svdvals(momentum).quantile(places),
    }
    for name, values in expected.items():
        torch.testing.assert_close(found[name][0], values, rtol=1e-9, atol=1e-12, msg=name)


def test_matrices_beyond_the_exact_limit_match_an_svd(monkeypatch):
    generator = torch.Generator().manual_seed(3)
    stack = torch.randn(2, 150, 90, generator=generator, dtype=torch.float64)
    exact = numbers({k: v.mean() for k, v in {**measures.norms(stack), **measures.direction(stack, stack)}.items()})
    monkeypatch.setattr(measures, "EXACT_LIMIT", 20)
    found = {k: v.mean().item() for k, v in {**measures.norms(stack), **measures.direction(stack, stack)}.items()}
    assert math.isnan(found.pop("isotropy")) and exact.pop("isotropy") > 0
    assert found == pytest.approx(exact, rel=1e-3)  # 40 Lanczos steps on 90 dimensions; the rest is to rounding
    low_rank = structured()["low rank"][None]  # the Krylov space is exhausted after 3 steps
    assert measures.spectral_norm(low_rank).item() == pytest.approx(torch.linalg.svdvals(low_rank)[0, 0].item())


# --- A model and its optimizer


class Net(nn.Module):
    """Two matrices of one shape, one of another, a table and a head."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(11, 8)
        self.layers = nn.ModuleList([nn.Linear(8, 25, bias=False), nn.Linear(25, 8), nn.Linear(8, 25, bias=False)])
        self.back = nn.Linear(25, 8)
        self.head = nn.Linear(8, 11)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.table(tokens)
        x = x + self.layers[1](self.layers[0](x).relu())
        return self.head(x + self.back(self.layers[2](x).relu()))


def build(rule: str, dtype: torch.dtype = torch.float64, **options) -> tuple[Net, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = Net().to(dtype)
    return model, build_optimizer(model, rule, lr=1e-2, **options)


def backward(model: nn.Module, seed: int) -> None:
    tokens = torch.randint(0, 11, (32,), generator=torch.Generator().manual_seed(seed))
    model.zero_grad()
    nn.functional.cross_entropy(model(tokens), (tokens * 3 + 1) % 11).backward()


def train(rule: str, steps: int = 3) -> tuple[Net, torch.optim.Optimizer]:
    """Return a model after some steps, with the gradient of the next."""
    model, optimizer = build(rule)
    for seed in range(steps):
        backward(model, seed)
        optimizer.step()
    backward(model, steps)
    return model, optimizer


@pytest.mark.parametrize("rule", RULES)
def test_the_measured_update_is_the_one_applied(rule):
    model, optimizer = train(rule)
    watch = Probe(optimizer, every=1, model=model, per_shape=0)
    matrices = choose(optimizer, model=model, per_shape=0)
    assert {each.name for each in matrices} == {
        *(f"layers.{i}.weight" for i in range(3)),
        "back.weight",
    }
    with torch.no_grad():
        updates = [_update(each, each.param.grad, optimizer.state[each.param]) for each in matrices]
    before = [each.param.detach().clone() for each in matrices]
    assert watch(1)
    optimizer.step()
    for each, old, update in zip(matrices, before, updates, strict=True):
        lr, decay = each.group["lr"], each.group["weight_decay"]
        torch.testing.assert_close(each.param.detach(), old * (1 - lr * decay) - lr * update, msg=each.name)


@pytest.mark.parametrize("rule", RULES)
def test_a_probe_matches_the_reference_and_changes_nothing(rule):
    model, optimizer = train(rule)
    before = deepcopy((model.state_dict(), optimizer.state_dict()["state"], [p.grad for p in model.parameters()]))
    random = torch.get_rng_state()
    quantities = ALL if rule in ("olion", "muon", "adamuon") else ("norms", "cosine", "spectrum")
    found = probe(optimizer, model=model, quantities=quantities, mean=False)
    after = (model.state_dict(), optimizer.state_dict()["state"], [p.grad for p in model.parameters()])
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    assert torch.equal(random, torch.get_rng_state())

    name, weight = "back.weight", model.back.weight
    old, state, grad = weight.detach().clone(), optimizer.state[weight], weight.grad.clone()
    momentum = state["momentum" if "momentum" in state else "exp_avg"].clone()
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.0
    optimizer.step()
    update = (old - weight.detach()) / 1e-2
    expected = {
        "weight_spectral": torch.linalg.svdvals(old)[0].item(),
        "cosine": float((update * grad).sum() / update.norm() / grad.norm()),
    }
    if rule == "olion":
        moved = 0.98 * momentum + 0.02 * grad
        expected |= direction_reference(0.05 * grad + 0.95 * moved, update)
    for key, value in expected.items():
        assert found[f"probe/{name}/{key}"] == pytest.approx(value, rel=1e-6, abs=1e-9), key
    places = torch.linspace(0, 1, measures.POINTS, dtype=torch.float64)
    values = torch.linalg.svdvals(momentum).quantile(places).tolist()
    assert found[f"probe/{name}/momentum_singular_values"] == pytest.approx(values, rel=1e-6, abs=1e-12)


def test_means_over_shapes_are_the_means_of_the_matrices():
    _, optimizer = train("olion")
    each, mean = (probe(optimizer, mean=mean, quantities=ALL) for mean in (False, True))
    for name in ("flatness", "weight_spectral", "cosine"):
        values = [each[f"probe/layers.{i}.weight/{name}"] for i in (0, 2)]
        assert mean[f"probe/25x8/{name}"] == pytest.approx(sum(values) / 2)
    assert len(mean["probe/25x8/weight_entries"]) == measures.POINTS


def test_fused_blocks_are_measured_one_by_one():
    torch.manual_seed(0)
    fused = nn.Parameter(torch.randn(24, 8, dtype=torch.float64))
    fused.grad = torch.randn(24, 8, dtype=torch.float64)
    found = probe(OLion([("fused", fused)], lr=1e-2, qkv_split=3, weight_decay=0.0), mean=False)
    expected = [torch.linalg.svdvals(block)[0].item() for block in fused.detach().split(8)]
    assert found["probe/fused/weight_spectral"] == pytest.approx(sum(expected) / 3)
    isotropy = [direction_reference(block, block)["isotropy"] for block in fused.grad.split(8)]
    assert found["probe/fused/isotropy"] == pytest.approx(sum(isotropy) / 3)


def test_unequal_blocks_are_measured_one_by_one():
    torch.manual_seed(0)
    fused = nn.Parameter(torch.randn(24, 8, dtype=torch.float64))
    fused.grad = torch.randn(24, 8, dtype=torch.float64)
    found = probe(OLion([("fused", fused)], lr=1e-2, qkv_split=(4, 1, 1), weight_decay=0.0))
    sizes = (16, 4, 4)
    expected = [torch.linalg.svdvals(block)[0].item() for block in fused.detach().split(sizes)]
    assert found["probe/16x8+4x8/weight_spectral"] == pytest.approx(sum(expected) / 3)
    isotropy = [direction_reference(block, block)["isotropy"] for block in fused.grad.split(sizes)]
    assert found["probe/16x8+4x8/isotropy"] == pytest.approx(sum(isotropy) / 3)


def test_a_probe_is_due_at_the_first_step_and_every_so_many():
    _, optimizer = train("olion")
    watch = Probe(optimizer, every=3, quantities=("norms",))
    assert [step for step in range(1, 8) if watch(step)] == [1, 3, 6]
    never = Probe(optimizer, every=None)
    assert not any(never(step) for step in range(1, 8))


@pytest.mark.parametrize("rule", ["olion", "lion"])
def test_all_is_the_default_and_the_spectrum(rule):
    model, optimizer = train(rule)
    default, everything = (probe(optimizer, model=model, quantities=each) for each in (None, ("all",)))
    more = {key.split("/")[-1] for key in everything.keys() - default.keys()}
    assert more == {"weight_entries", "weight_singular_values", "momentum_singular_values"}
    assert default.keys() < everything.keys()


def test_patterns_and_numbers_choose_matrices():
    _, optimizer = train("olion")
    names = {key.split("/")[1] for key in probe(optimizer, matrices=("layers.*",), mean=False) if key != "probe/ms"}
    assert names == {"layers.0.weight", "layers.1.weight", "layers.2.weight"}
    names = {key.split("/")[1] for key in probe(optimizer, per_shape=1, mean=False) if key != "probe/ms"}
    assert names == {"layers.0.weight", "layers.1.weight"}


def test_values_that_are_not_finite_are_left_out():
    model, optimizer = train("olion")
    with torch.no_grad():
        model.back.weight[0, 0] = torch.nan
        model.layers[0].weight.grad[0, 0] = torch.inf
    found = probe(optimizer, mean=False)
    assert "probe/back.weight/weight_spectral" not in found and "probe/back.weight/isotropy" in found
    assert "probe/layers.0.weight/isotropy" not in found and "probe/layers.0.weight/weight_spectral" in found


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Muon])
def test_other_optimizers_have_weights_and_momentum_measured(kind):
    model, _ = build("olion", torch.float32)
    matrices = [model.back.weight, model.layers[0].weight]
    optimizer = kind(matrices, **({"momentum": 0.9} if kind is torch.optim.SGD else {}))
    backward(model, 0)
    optimizer.step()
    found = probe(optimizer, model=model, quantities=("norms", "spectrum"))
    name = "exp_avg" if kind is torch.optim.AdamW else "momentum_buffer"
    largest = torch.linalg.svdvals(optimizer.state[model.back.weight][name])[0].item()
    assert found["probe/8x25/momentum_singular_values"][-1] == pytest.approx(largest, rel=1e-4)


@pytest.mark.parametrize(
    "rule, chosen, message",
    [
        ("olion", {"every": 0}, "interval must be 1 step or more, or None for never; got 0"),
        ("olion", {"every": -5}, "interval must be 1 step or more"),
        ("olion", {"every": 1.5}, "interval must be 1 step or more"),
        ("olion", {"matrices": ("*.wieght",)}, "'\\*.wieght' fits none of layers.0.weight, .*; did you mean"),
        ("olion", {"matrices": ("table.*",)}, "'table.\\*' fits none"),
        ("olion", {"quantities": ("isotropie",)}, "got 'isotropie'; did you mean 'isotropy'"),
        ("olion", {"per_shape": -1}, "per_shape must be a number of matrices, or 0 for all; got -1"),
        ("olion", {"quantities": ("all", "norms")}, "or all by itself; got 'all'"),
        ("lion", {"quantities": ("isotropy",)}, "lion orthogonalizes nothing, .* ask for norms, cosine, spectrum"),
        ("adamw", {"quantities": ("hadamard",)}, "adamw orthogonalizes nothing"),
    ],
)
def test_a_probe_refuses_impossible_arguments_in_one_line(rule, chosen, message):
    model, optimizer = build(rule)
    with pytest.raises(ValueError, match=message) as error:
        Probe(optimizer, **{"every": 1, "model": model, **chosen})
    assert "\n" not in str(error.value)


def test_a_probe_refuses_missing_models_gradients_and_rules():
    _, lion = build("lion")
    with pytest.raises(ValueError, match="needs the model"):
        Probe(lion)
    model, olion = build("olion")
    with pytest.raises(ValueError, match=r"needs gradients, got none .* after backward"):
        probe(olion)
    assert probe(olion, quantities=("norms",))
    torch_adamw = torch.optim.AdamW(model.parameters())
    with pytest.raises(ValueError, match="not of this package has no rule to ask; ask for norms, spectrum"):
        probe(torch_adamw, model=model, quantities=("cosine",))


# --- Ranks


@pytest.fixture(scope="module")
def ranks2():
    with Ranks(2) as ranks:
        yield ranks


def probe_on_ranks(rule: str, layout: str) -> dict[str, float]:
    torch.manual_seed(0)
    model = Net().double()
    group = None
    if layout == "fsdp":
        mesh = init_device_mesh("cpu", (2,))
        for layer in model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        model.set_force_sum_reduction_for_comms(True)  # gloo has no averages of shards
        for layer in model.layers:
            layer.set_force_sum_reduction_for_comms(True)
    else:
        group = dist.group.WORLD
    optimizer = build_optimizer(model, rule, lr=1e-2, process_group=group)
    for seed in range(3):
        backward(model, seed)  # the same batch on both ranks: their mean is one process's gradient
        optimizer.step()
    backward(model, 3)
    found = probe(optimizer, model=model, quantities=("norms", "cosine", "spectrum"), mean=False)
    if rule == "olion":
        found |= probe(optimizer, quantities=("isotropy", "hadamard", "flips", "alignment"))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["fsdp", "replicated"])
@pytest.mark.parametrize("rule", ["olion", "adamw"])
def test_measures_of_ranks_match_those_of_one_process(ranks2, rule, layout):
    model, optimizer = train(rule)
    expected = probe(optimizer, model=model, quantities=("norms", "cosine", "spectrum"), mean=False)
    if rule == "olion":
        expected |= probe(optimizer, quantities=("isotropy", "hadamard", "flips", "alignment"))
    expected.pop("probe/ms")
    for found in ranks2(probe_on_ranks, rule, layout):
        assert found.pop("probe/ms") > 0
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert found[key] == pytest.approx(value, rel=1e-8, abs=1e-11), key
