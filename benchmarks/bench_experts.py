"""LoRA on stacked expert weights: AdaptedExperts and lr.accelerate, against PEFT's ParamWrapper.

    python benchmarks/bench_experts.py                      # minutes on 2 cores
    python benchmarks/bench_experts.py --quick
    python benchmarks/bench_experts.py --case 256,16,4,1024,512,8,bfloat16

Each case is a training step of one experts module of Qwen3-MoE (transformers' grouped_mm, random
routing), both stacked weights adapted, with gradients of x and of the adapters. PEFT adds lora_B
lora_A of all experts to each weight in every forward. Candidates take turns in every round.
Figures: time / time of the frozen module of the same round, median, and PEFT's time over ours.
Rows in which PEFT wins are marked.
"""

import copy
import itertools
from collections.abc import Iterator
from typing import NamedTuple

import peft
import torch
from command import DTYPES, Row, loss, options_of, print_losses, run
from timing import Candidate, time_interleaved
from torch import Tensor, nn
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

import lowrank_ext as lr

SCALING = 2.0
PARAMETERS = ["experts.gate_up_proj", "experts.down_proj"]


class Case(NamedTuple):
    tokens: int
    num_experts: int
    top_k: int
    hidden: int
    intermediate: int
    rank: int
    dtype: str

    def __str__(self) -> str:
        t, e, k, hidden, inner, r, dtype = self
        return f"{dtype} {t} tokens, {k} of {e} experts, {hidden} x {inner} r={r}"


def grid() -> Iterator[Case]:
    for dtype, tokens in itertools.product(("bfloat16", "float32"), (64, 512, 2048)):
        yield Case(tokens, 8, 2, 1024, 1024, 16, dtype)
        yield Case(tokens, 64, 8, 1024, 512, 16, dtype)


def quick() -> Iterator[Case]:
    for dtype in ("bfloat16", "float32"):
        yield Case(256, 8, 2, 512, 512, 8, dtype)
        yield Case(256, 64, 4, 512, 256, 8, dtype)


class Layer(nn.Module):
    """An experts module with a name, which target_parameters need."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        config = Qwen3MoeConfig(
            hidden_size=case.hidden,
            moe_intermediate_size=case.intermediate,
            num_experts=case.num_experts,
        )
        config._experts_implementation = "grouped_mm"
        self.experts = Qwen3MoeExperts(config)
        for weight in self.parameters():
            nn.init.normal_(weight, std=weight.shape[-1] ** -0.5)

    def forward(self, *args: Tensor) -> Tensor:
        return self.experts(*args)


class Data(NamedTuple):
    frozen: Layer
    args: tuple[Tensor, Tensor, Tensor]  # x [T, hidden], indices and weights [T, top_k]
    dout: Tensor


def make_data(case: Case, device: str) -> Data:
    torch.manual_seed(0)
    dtype = DTYPES[case.dtype]
    layer = Layer(case).to(device, dtype).requires_grad_(False)
    x = torch.randn(case.tokens, case.hidden, device=device).to(dtype).requires_grad_()
    gates, ids = torch.rand(case.tokens, case.num_experts, device=device).topk(case.top_k)
    return Data(layer, (x, ids, gates.to(dtype)), torch.randn_like(x))


def make_layers(case: Case, data: Data) -> dict[str, nn.Module]:
    """The module frozen, PEFT's, PEFT's accelerated and ours, with equal adapters in fp32."""
    config = {"r": case.rank, "target_modules": [], "target_parameters": PARAMETERS}
    theirs = peft.get_peft_model(
        copy.deepcopy(data.frozen), peft.LoraConfig(lora_alpha=SCALING * case.rank, **config)
    )
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=case.rank**-0.5)
    accelerated = copy.deepcopy(theirs)
    report = lr.accelerate(accelerated)
    assert not report.left_alone
    ours = lr.adapt(copy.deepcopy(data.frozen), lr.LoRAConfig(alpha=SCALING * case.rank, **config))
    tensors = peft.get_peft_model_state_dict(theirs)
    for path, name in (("experts.base_layer", "gate_up_proj"), ("experts", "down_proj")):
        prefix = f"base_model.model.{path}.lora_"
        values = {"lora_a": tensors[f"{prefix}A.weight"], "lora_b": tensors[f"{prefix}B.weight"]}
        ours.experts.adapters()[name].fill(values)
    return {"frozen": data.frozen, "ours": ours, "accelerated": accelerated, "peft": theirs}


def check(case: Case, data: Data, layers: dict[str, nn.Module]) -> None:
    """Compare the candidates' outputs with PEFT's in fp64, so that only correct ones are timed."""
    exact = copy.deepcopy(layers["peft"]).double()
    exact.base_model.model.experts.get_base_layer().config._experts_implementation = "eager"
    x, ids, gates = data.args
    with torch.no_grad():
        truth = exact(x.double(), ids, gates.double())
        for name in ("ours", "accelerated", "peft"):
            error = (layers[name](*data.args).double() - truth).abs().max() / truth.abs().max()
            limit = 8 * torch.finfo(x.dtype).eps ** (1 if x.element_size() == 2 else 0.8)
            if not error <= limit:
                raise SystemExit(f"{case}: {name}: relative error {error:.2g} > {limit:.2g}")


def as_candidate(layer: nn.Module, data: Data) -> Candidate:
    wanted = [data.args[0], *(p for p in layer.parameters() if p.requires_grad)]
    return Candidate(lambda: layer(*data.args), lambda y: torch.autograd.grad(y, wanted, data.dout))


COLUMNS = (
    ("dtype", 8),
    ("T", 5),
    ("E", 4),
    ("top", 4),
    ("hidden", 7),
    ("inner", 6),
    ("r", 4),
    ("pass", 8),
    ("frozen ms", 10),
    ("ours", 6),
    ("accel.", 7),
    ("peft", 7),
    ("peft/ours", 10),
    ("rounds", 7),
    ("", 0),
)


def rows_of(case: Case, device: str, budget: float) -> Iterator[Row]:
    data = make_data(case, device)
    layers = make_layers(case, data)
    check(case, data, layers)
    candidates = {name: as_candidate(layer, data) for name, layer in layers.items()}
    rounds = time_interleaved(candidates, device, budget)
    for part, name in (("forward", "forward"), ("both", "fwd+bwd")):
        ratio = rounds.ratio("peft", "ours", part)
        yield {
            **case._asdict(),
            "pass": name,
            "frozen_ms": rounds.median("frozen", part) * 1e3,
            **{key: rounds.ratio(key, "frozen", part) for key in ("ours", "accelerated", "peft")},
            "peft_over_ours": ratio,
            "loses_to": ["peft"] if ratio < 1 else [],
            "rounds": len(rounds),
        }


def cells(row: Row) -> tuple[object, ...]:
    return (
        *(row[name] for name in (*Case._fields[-1:], *Case._fields[:-1], "pass")),
        f"{row['frozen_ms']:.3f}",
        *(f"{row[name]:.2f}" for name in ("ours", "accelerated", "peft", "peft_over_ours")),
        row["rounds"],
        loss(row),
    )


HEAD = (
    "an experts module of Qwen3-MoE: T tokens, top of E experts each, both weights adapted",
    "ours, accel. (lr.accelerate), peft: time / time of the frozen module, same round, median",
    f"peft: PEFT {peft.__version__}; adapters in fp32",
)


def main() -> None:
    options = options_of(__doc__, Case, quick="four cases")
    cases = options.case or list(quick() if options.quick else grid())
    print_losses(
        run(
            options,
            cases,
            HEAD,
            COLUMNS,
            lambda case: rows_of(case, options.device, options.seconds),
            cells,
        )
    )


if __name__ == "__main__":
    main()
