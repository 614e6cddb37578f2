"""moe_lowrank_add against implementations in plain torch, on top of a frozen linear.

    python benchmarks/bench_moe.py                             # minutes on 2 cores
    python benchmarks/bench_moe.py --quick
    python benchmarks/bench_moe.py --case 2048,1024,1024,8,2,4,0.05,bfloat16

Each case is one training step of one layer: x, router and experts require gradients, the base is
frozen, and the loss holds the balance loss. Candidates take turns in every round; figures are
medians over the rounds of time / time of the frozen linear in that round. Candidates:

    ours      the op, experts and router in fp32
    released  the shape of GOAT's published code: activations copied to fp32, experts one after the
              other (gather, two linears, index_add), the first one on all tokens
    loop      an efficient form of it: in the base's dtype, every expert on its own tokens only
    all       every expert on all tokens, times a gate that is zero where it was not chosen
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from command import DTYPES, Row, loss, options_of, print_losses, run
from timing import Candidate, Rounds, time_interleaved
from torch import Tensor, nn

from lowrank_ext import ops, reference

SCALING = 2.0
BALANCE = 1e-3  # factor of the balance loss, GOAT's


class Case(NamedTuple):
    num_tokens: int
    in_features: int
    out_features: int
    num_experts: int
    top_k: int
    rank: int  # of one expert
    dropout: float
    dtype: str

    @property
    def multiply_adds(self) -> int:
        """Multiply-adds of the frozen linear."""
        return self.num_tokens * self.in_features * self.out_features

    def __str__(self) -> str:
        m, k, n, experts, top_k, rank, p, dtype = self
        return f"{dtype} M={m} K={k} N={n} E={experts} k={top_k} r_e={rank} dropout={p}"


def grid() -> Iterator[Case]:
    for dtype in ("bfloat16", "float32"):
        for dropout in (0.0, 0.05):
            yield Case(2048, 1024, 1024, 8, 2, 4, dropout, dtype)
            yield Case(2048, 1024, 1024, 8, 2, 16, dropout, dtype)
            yield Case(2048, 1024, 1024, 8, 2, 64, dropout, dtype)
            yield Case(2048, 576, 1536, 8, 2, 4, dropout, dtype)
            yield Case(16, 1024, 1024, 8, 2, 4, dropout, dtype)
    yield Case(2048, 1024, 1024, 32, 4, 4, 0.05, "bfloat16")
    yield Case(2048, 2048, 2048, 8, 2, 4, 0.05, "bfloat16")


def quick() -> Iterator[Case]:
    for rank in (4, 64):
        yield Case(2048, 1024, 1024, 8, 2, rank, 0.05, "bfloat16")


class Data(NamedTuple):
    """Tensors that all candidates of a case share; router and experts in fp32."""

    x: Tensor
    linear: nn.Linear
    router_weight: Tensor
    lora_a: Tensor
    lora_b: Tensor
    dout: Tensor

    @property
    def trained(self) -> tuple[Tensor, ...]:
        return self.x, self.router_weight, self.lora_a, self.lora_b


def make_data(case: Case, device: str) -> Data:
    torch.manual_seed(0)
    m, k, n, experts, _, rank, _, name = case
    dtype = DTYPES[name]

    def parameter(*shape: int) -> Tensor:
        return (torch.randn(shape, device=device) / shape[-1] ** 0.5).requires_grad_()

    return Data(
        torch.randn(m, k, device=device).to(dtype).requires_grad_(),
        nn.Linear(k, n, bias=False, dtype=dtype, device=device).requires_grad_(False),
        parameter(experts, k),
        parameter(experts, rank, k),
        parameter(experts, n, rank),
        torch.randn(m, n, device=device).to(dtype),
    )


# Candidates: y and the balance loss of a step


Step = Callable[[Case, Data], tuple[Tensor, ...]]


def ours(case: Case, data: Data) -> tuple[Tensor, Tensor]:
    y, loss, *_ = ops.moe_lowrank_add(
        data.linear(data.x),
        data.x,
        data.router_weight,
        data.lora_a,
        data.lora_b,
        top_k=case.top_k,
        scaling=SCALING,
        dropout_p=case.dropout,
    )
    return y, loss


def route(case: Case, x: Tensor, router_weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    probs = torch.softmax(F.linear(x, router_weight).float(), dim=-1)
    weights, ids = torch.topk(probs, case.top_k, dim=-1)
    share = F.one_hot(ids, case.num_experts).sum(1).float().mean(0)
    loss = case.num_experts * (share * probs.mean(0)).sum()
    return weights / weights.sum(-1, keepdim=True), ids, loss


def expert(case: Case, data: Data, x: Tensor, i: int) -> Tensor:
    h = F.linear(F.dropout(x, case.dropout), data.lora_a[i].to(x.dtype))
    return F.linear(h, data.lora_b[i].to(x.dtype)) * SCALING


def loop(case: Case, data: Data) -> tuple[Tensor, Tensor]:
    x = data.x
    weights, ids, loss = route(case, x, data.router_weight.to(x.dtype))
    y = data.linear(x)
    for i in range(case.num_experts):
        token, choice = torch.where(ids == i)
        gate = weights[token, choice].unsqueeze(-1).to(x.dtype)
        y = y.index_add(0, token, gate * expert(case, data, x[token], i))
    return y, loss


def released(case: Case, data: Data) -> tuple[Tensor, Tensor]:
    y, x = data.linear(data.x), data.x.float()
    weights, ids, loss = route(case, x, data.router_weight)
    branch = torch.zeros_like(y, dtype=torch.float32)
    for i in range(case.num_experts):
        token, choice = torch.where(ids == i)
        gate = weights[token, choice].unsqueeze(-1)
        out = expert(case, data, x, 0)[token] if i == 0 else expert(case, data, x[token], i)
        branch = branch.index_add(0, token, gate * out)
    return y + branch.to(y.dtype), loss


def all_experts(case: Case, data: Data) -> tuple[Tensor, Tensor]:
    x = data.x
    weights, ids, loss = route(case, x, data.router_weight.to(x.dtype))
    gates = weights.new_zeros(x.shape[0], case.num_experts).scatter(1, ids, weights)
    y = data.linear(x)
    for i in range(case.num_experts):
        y = y + gates[:, i : i + 1].to(x.dtype) * expert(case, data, x, i)
    return y, loss


STEPS: dict[str, Step] = {
    "frozen": lambda case, data: (data.linear(data.x),),
    "ours": ours,
    "released": released,
    "loop": loop,
    "all": all_experts,
}


def backward(data: Data, outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    if len(outputs) == 1:  # frozen
        return torch.autograd.grad(outputs, (data.x,), (data.dout,))
    upstream = (data.dout, torch.full_like(outputs[1], BALANCE))
    return torch.autograd.grad(outputs, data.trained, upstream)


def as_candidate(case: Case, data: Data, step: Step) -> Candidate:
    return Candidate(lambda: step(case, data), lambda outputs: backward(data, outputs))


# Checking: only correct kernels are timed

CHECKED_TOKENS = 256


def check(case: Case, device: str) -> None:
    """Check values and gradients: of every candidate in fp32 without dropout, of the op as timed.

    In fp32, because a router that rounds its logits sends some tokens to other experts.
    """
    few = case._replace(num_tokens=min(case.num_tokens, CHECKED_TOKENS))
    exact = few._replace(dropout=0.0, dtype="float32")
    data = make_data(exact, device)
    truth = _reference(exact, data, None)
    for name, step in STEPS.items():
        if name != "frozen":
            outputs = step(exact, data)
            _compare(f"{case}: {name}", data, (*outputs, *backward(data, outputs)), truth)
    data = make_data(few, device)
    seed = torch.tensor([1], device=device)
    arguments = (data.linear(data.x), *data.trained)
    options = {"top_k": case.top_k, "scaling": SCALING, "dropout_p": case.dropout, "seed": seed}
    outputs = ops.moe_lowrank_add(*arguments, **options)[:2]
    truth = _reference(few, data, seed)
    _compare(f"{case}: the op", data, (*outputs, *backward(data, outputs)), truth)


def _reference(case: Case, data: Data, seed: Tensor | None) -> tuple[Tensor, ...]:
    """The reference's results, with the router's weight rounded as by the op for equal routing."""
    dtype = data.x.dtype
    rounded = (data.x, data.router_weight.to(dtype), data.lora_a, data.lora_b)
    wide = [tensor.detach().double().requires_grad_() for tensor in rounded]
    base_out = F.linear(wide[0], data.linear.weight.double())
    options = {"top_k": case.top_k, "scaling": SCALING, "dropout_p": case.dropout, "seed": seed}
    y, loss, *_ = reference.moe_lowrank_add(base_out, *wide, **options)
    upstream = (data.dout.double(), torch.full_like(loss, BALANCE))
    return (y.detach(), loss.detach(), *torch.autograd.grad((y, loss), wide, upstream))


def _compare(what: str, data: Data, got: tuple[Tensor, ...], truth: tuple[Tensor, ...]) -> None:
    limit = 4 * torch.finfo(data.x.dtype).eps ** (1 if data.x.element_size() == 2 else 0.8)
    names = ("y", "balance_loss", "dx", "drouter_weight", "dlora_a", "dlora_b")
    for name, value, true in zip(names, got, truth, strict=True):
        error = (value.double() - true).abs().max() / true.abs().max()
        if not error <= limit:
            raise SystemExit(f"{what}: {name} is wrong: relative error {error:.2g} > {limit:.2g}")


# Rows

COLUMNS = (
    ("dtype", 8),
    ("M", 5),
    ("K", 5),
    ("N", 5),
    ("E", 3),
    ("k", 2),
    ("r_e", 4),
    ("drop", 5),
    ("pass", 8),
    ("frozen ms", 10),
    ("ours", 6),
    ("released", 8),
    ("loop", 6),
    ("all", 6),
    ("x released", 10),
    ("x loop", 7),
    ("rounds", 6),
    ("", 0),
)
RIVALS = ("released", "loop", "all")


def run_case(case: Case, device: str, budget: float) -> Rounds:
    check(case, device)
    data = make_data(case, device)
    candidates = {name: as_candidate(case, data, step) for name, step in STEPS.items()}
    return time_interleaved(candidates, device, budget)


def results(case: Case, rounds: Rounds) -> Iterator[Row]:
    """A row for forward, one for forward + backward."""
    for part in ("forward", "both"):
        ratios = {name: rounds.ratio(name, "frozen", part) for name in STEPS if name != "frozen"}
        yield {
            **case._asdict(),
            "pass": "forward" if part == "forward" else "fwd+bwd",
            "frozen_ms": rounds.median("frozen", part) * 1e3,
            "ratios": ratios,
            "speedups": {rival: rounds.ratio(rival, "ours", part) for rival in RIVALS},
            "loses_to": [rival for rival in RIVALS if ratios[rival] < ratios["ours"]],
            "rounds": len(rounds),
        }


def cells(row: Row) -> tuple[object, ...]:
    return (
        *(row[name] for name in ("dtype", "num_tokens", "in_features", "out_features")),
        *(row[name] for name in ("num_experts", "top_k", "rank", "dropout", "pass")),
        f"{row['frozen_ms']:.3f}",
        *(f"{row['ratios'][name]:.2f}" for name in ("ours", *RIVALS)),
        *(f"{row['speedups'][name]:.2f}" for name in ("released", "loop")),
        row["rounds"],
        loss(row),
    )


HEAD = ("time / time of the frozen linear in the same round, median; x: rival's time / ours",)


def main() -> None:
    options = options_of(__doc__, Case, quick="two cases")
    cases = options.case or list(quick() if options.quick else grid())

    def rows_of(case: Case) -> Iterator[Row]:
        return results(case, run_case(case, options.device, options.seconds))

    print_losses(run(options, cases, HEAD, COLUMNS, rows_of, cells))


if __name__ == "__main__":
    main()
