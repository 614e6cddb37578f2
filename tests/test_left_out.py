"""Nothing is left out of "all-linear" without a word: heads, stacked experts, weights only read."""

import io
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from expert_models import EXPERT_MODELS
from module_cases import IDS, TinyLM, randomize
from rich.console import Console
from torch import Tensor, nn

import lowrank_ext as lr
from lowrank_ext.nn import LowRankLinear

SIZES = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
SMALL = dict(vocab_size=32, **SIZES)
LLAMA = dict(**SMALL, num_key_value_heads=1, pad_token_id=0)
DISTIL = dict(vocab_size=32, dim=16, hidden_dim=24, n_layers=1, n_heads=2)
T5 = dict(vocab_size=32, d_model=16, d_ff=24, d_kv=8, num_layers=1, num_heads=2)
HEADS = {
    "BertForSequenceClassification": (SMALL, ["classifier"]),
    "BertForTokenClassification": (SMALL, ["classifier"]),
    "BertForQuestionAnswering": (SMALL, ["qa_outputs"]),
    "BertForMultipleChoice": (SMALL, ["classifier"]),
    "RobertaForSequenceClassification": (SMALL, ["classifier"]),
    "DistilBertForSequenceClassification": (DISTIL, ["classifier", "pre_classifier"]),
    "LlamaForSequenceClassification": (LLAMA, ["score"]),
    "T5ForSequenceClassification": (T5, ["classification_head"]),
    "ViTForImageClassification": (SIZES | dict(image_size=8, patch_size=4), ["classifier"]),
}


def made(name: str, options: dict) -> nn.Module:
    torch.manual_seed(0)
    model_class = getattr(transformers, name)
    return model_class(model_class.config_class(**options)).eval()


def adapted_paths(model: nn.Module) -> list[str]:
    return [path for path, m in model.named_modules() if isinstance(m, LowRankLinear)]


def rows(model: nn.Module) -> list[list[str]]:
    console = Console(width=200, file=io.StringIO())
    console.print(lr.summary(model))
    lines = console.file.getvalue().splitlines()
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in lines]


@pytest.mark.parametrize("name", HEADS)
def test_new_heads_train_and_are_saved(name: str, tmp_path: Path) -> None:
    options, heads = HEADS[name]
    model = lr.adapt(made(name, options), lr.LoRAConfig(r=2))
    assert sorted(model.lowrank_config.modules_to_save) == heads
    for head in heads:
        parameters = list(model.get_submodule(head).parameters())
        assert all(parameter.requires_grad for parameter in parameters)
        assert any(row[0] == head and row[6] not in ("", "0") for row in rows(model))
        for parameter in parameters:
            nn.init.normal_(parameter)
    randomize(model)
    lr.save_adapter(model, tmp_path)
    again = lr.load_adapter(made(name, options), tmp_path)
    for (key, saved), loaded in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(saved, loaded), key


def test_pefts_model_of_the_task_has_the_same_file(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = made("BertForSequenceClassification", SMALL)
    lr.save_adapter(lr.adapt(model, lr.LoRAConfig(r=2, target_modules=["query"])), tmp_path)
    theirs = peft.PeftModel.from_pretrained(
        made("BertForSequenceClassification", SMALL), tmp_path
    ).base_model.model
    head = theirs.classifier.modules_to_save["default"]
    assert torch.equal(head.weight, model.classifier.weight)


@pytest.mark.parametrize(
    "options, saved, adapted",
    [
        (dict(exclude_modules=["classifier"]), (), False),
        (dict(exclude_modules="class.*"), (), False),
        (dict(target_modules=["query", "classifier"]), (), True),
        (dict(target_modules=".*(query|classifier)"), (), True),
        (dict(modules_to_save=["classifier"]), ("classifier",), False),
        (dict(target_modules=["query"]), ("classifier",), False),
    ],
)
def test_a_head_that_the_config_names(options: dict, saved: tuple, adapted: bool) -> None:
    model = lr.adapt(made("BertForSequenceClassification", SMALL), lr.LoRAConfig(r=2, **options))
    assert model.lowrank_config.modules_to_save == saved
    assert ("classifier" in adapted_paths(model)) is adapted


def test_language_models_train_no_head() -> None:
    for name in ("LlamaForCausalLM", "BertForMaskedLM"):
        model = lr.adapt(made(name, LLAMA if "Llama" in name else SMALL), lr.LoRAConfig(r=2))
        assert model.lowrank_config.modules_to_save == ()


def test_a_module_that_cannot_be_saved_is_refused_before_training() -> None:
    for names in (["lm_head"], ["embed"]):
        model = TinyLM(tied=True)
        with pytest.raises(
            ValueError, match=r"adapt: modules_to_save must name all owners of a tied weight, got"
        ):
            lr.adapt(model, lr.LoRAConfig(r=2, modules_to_save=names))
        assert not adapted_paths(model) and all(p.requires_grad for p in model.parameters())
    lr.adapt(TinyLM(tied=True), lr.LoRAConfig(r=2, modules_to_save=["lm_head", "embed"]))


# ------------------------------------------------------------------------------- stacked experts


@pytest.mark.parametrize("name", EXPERT_MODELS)
def test_stacked_experts_are_reported(name: str) -> None:
    model = made(name, EXPERT_MODELS[name])
    experts = {
        path: module
        for path, module in model.named_modules()
        if any(p.dim() == 3 for p in module.parameters(recurse=False))
    }
    assert experts
    left = sum(p.numel() for m in experts.values() for p in m.parameters(False) if p.dim() == 3)
    total = sum(p.numel() for p in model.parameters())
    with pytest.warns(UserWarning) as caught:
        lr.adapt(model, lr.LoRAConfig(r=2))
    said = [str(w.message) for w in caught if "not adapted" in str(w.message)]
    assert len(said) == 1, "once"
    assert said[0].startswith(
        f"adapt: {left:,} parameters ({100 * left / total:.3g} % of the model) are not adapted: "
        f"those of {next(iter(experts))} "
    )
    kind = type(next(iter(experts.values()))).__name__
    assert [row for row in rows(model) if row[:2] == ["experts", f"{kind}, not adapted"]]


class Beside(nn.Module):
    """A linear layer beside ``part``."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part, self.fc = part, nn.Linear(8, 8)


OWN_PRODUCTS = {
    "attention": (lambda: nn.MultiheadAttention(8, 2), 4 * 8 * 8),
    "attention of other widths": (lambda: nn.MultiheadAttention(8, 2, kdim=4, vdim=6), 8 * 26),
    "LSTM": (lambda: nn.LSTM(8, 8, num_layers=2), 2 * 2 * 4 * 8 * 8),
    "GRU cell": (lambda: nn.GRUCell(8, 8), 2 * 3 * 8 * 8),
    "encoder layer": (lambda: nn.TransformerEncoderLayer(8, 2, 16), 4 * 8 * 8),
}


@pytest.mark.parametrize("name", OWN_PRODUCTS)
def test_matrices_that_torch_multiplies_without_a_linear_module(name: str) -> None:
    make, left = OWN_PRODUCTS[name]
    model = Beside(make())
    with pytest.warns(UserWarning, match=f"adapt: {left:,} parameters .* are not adapted"):
        lr.adapt(model, lr.LoRAConfig(r=2))
    assert [row for row in rows(model) if row[1:2] and row[1].endswith("not adapted")]


@pytest.mark.parametrize("norm", [nn.utils.parametrizations.weight_norm, nn.utils.spectral_norm])
def test_convolutions_are_no_stacked_weights(norm) -> None:
    """However their weight is computed: wav2vec2 normalizes it."""
    model = Beside(norm(nn.Conv1d(8, 8, 3)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lr.adapt(model, lr.LoRAConfig(r=2))
    assert not [row for row in rows(model) if row[1:2] and row[1].endswith("not adapted")]


def test_a_choice_is_not_reported() -> None:
    for options in (dict(exclude_modules=["experts"]), dict(target_modules=["q_proj"])):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            lr.adapt(
                made("MixtralForCausalLM", EXPERT_MODELS["MixtralForCausalLM"]),
                lr.LoRAConfig(r=2, **options),
            )


def test_convolutions_and_tokens_are_no_experts() -> None:
    model = nn.ModuleDict({"conv": nn.Conv1d(4, 4, 3), "proj": nn.Linear(4, 4)})
    model.query = nn.Parameter(torch.zeros(1, 3, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lr.adapt(model, lr.LoRAConfig(r=2))


# ------------------------------------------------------------------------------ weights only read


class Mixer(nn.Module):
    """dt_proj is read and never called, out_proj is called on one of two paths, in_proj always."""

    def __init__(self) -> None:
        super().__init__()
        self.in_proj, self.dt_proj, self.out_proj = (nn.Linear(8, 8) for _ in range(3))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.in_proj.weight)

    def fuse(self) -> None:  # no call of it comes from forward
        self.fused = nn.Parameter(self.in_proj.weight.detach().clone())

    def forward(self, x: Tensor, fast: bool = False) -> Tensor:
        x = self.in_proj(x.to(self.in_proj.weight.dtype))
        if isinstance(self.in_proj.weight, Tensor) and hasattr(self.dt_proj, "bias"):
            x = x @ self.dt_proj.weight.t() + self.dt_proj.bias
        return F.linear(x, self.out_proj.weight) if fast else self.out_proj(x)


class Mixers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Mixer() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


DEAD = (
    r"adapt: 144 parameters .* of layers\.0\.dt_proj \(weights that Mixer\.forward reads itself\)"
)
BYPASSED = r"adapter of {} does not act where Mixer\.forward reads the weight"


@pytest.mark.parametrize("init", ["kaiming", "pissa"])
def test_modules_that_are_never_called_are_left_out(init: str) -> None:
    model, x = Mixers(), torch.randn(3, 8)
    expected = model(x)
    with (
        pytest.warns(UserWarning, match=DEAD),
        pytest.warns(UserWarning, match=BYPASSED.format(r"layers\.0\.out_proj")),
    ):
        lr.adapt(model, lr.LoRAConfig(r=2, init=init))
    assert [p.rpartition(".")[2] for p in adapted_paths(model)] == ["in_proj", "out_proj"] * 2
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    model(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert next(r for r in rows(model) if "dt" in r[0])[:3] == [
        "dt_proj",
        "Linear, not adapted",
        "2",
    ]


def test_a_module_that_is_named_is_adapted_with_a_warning() -> None:
    with pytest.warns(UserWarning, match=BYPASSED.format(r"layers\.0\.dt_proj")):
        model = lr.adapt(Mixers(), lr.LoRAConfig(r=2, target_modules=["dt_proj"]))
    assert len(adapted_paths(model)) == 2


class OnlyRead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.proj.weight)


def test_something_must_be_called() -> None:
    with pytest.raises(
        ValueError, match="target_modules must leave a linear module that is called"
    ):
        lr.adapt(OnlyRead(), lr.LoRAConfig(r=2))


def test_mamba() -> None:
    sizes = dict(vocab_size=32, hidden_size=16, num_hidden_layers=1, state_size=4, expand=1)
    with pytest.warns(UserWarning, match=r"mixer\.dt_proj \(weights that MambaMixer\.forward"):
        model = lr.adapt(made("MambaForCausalLM", sizes), lr.LoRAConfig(r=2))
    names = {path.rpartition(".")[2] for path in adapted_paths(model)}
    assert names == {"in_proj", "x_proj", "out_proj"}


def test_ordinary_models_give_no_warning() -> None:
    models = [TinyLM(), made("T5Model", T5)]
    models += [made("LlamaForCausalLM", LLAMA), made("BertForSequenceClassification", SMALL)]
    for model in models:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            lr.adapt(model, lr.LoRAConfig(r=2))


# ------------------------------------------------------------------------- options that do nothing


def test_ranks_above_that_of_any_change() -> None:
    with pytest.warns(
        UserWarning, match=r"r is above min.* in layers\.0\.q_proj \(r=9, 8 to 8 feat"
    ):
        lr.adapt(TinyLM(), lr.LoRAConfig(r=9))
    config = lr.LoRAConfig(r=10**6)
    model = TinyLM()
    with pytest.raises(
        ValueError, match=r"adapt: layers\.0\.q_proj: .*r must be at most .* 1000000"
    ):
        lr.adapt(model, config)
    assert not adapted_paths(model)


OPTIMIZERS = {
    "all": lambda model: torch.optim.AdamW(model.parameters()),
    "groups": lambda model: torch.optim.SGD([{"params": [p]} for p in model.parameters()], lr=0.1),
    "some": lambda model: torch.optim.SGD(model.lm_head.parameters(), lr=0.1),
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("tied", [False, True])
def test_an_optimizer_made_before_adapt(make, tied: bool) -> None:
    model = TinyLM(tied=tied)
    optimizer = make(model)
    with pytest.warns(
        UserWarning, match="adapt: an optimizer holds parameters of the model, which"
    ):
        lr.adapt(model, lr.LoRAConfig(r=2))
    del optimizer


@pytest.mark.parametrize("tied", [False, True])
def test_other_references_are_no_optimizer(tied: bool) -> None:
    model = TinyLM(tied=tied)
    kept = [list(model.parameters()), dict(model.named_parameters()), {"params": IDS}]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lr.adapt(model, lr.LoRAConfig(r=2))
    assert kept
