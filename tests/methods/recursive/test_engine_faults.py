"""What goes wrong in a request, a callback, a rule or a model stays there, and is said."""

from types import SimpleNamespace

import pytest
import torch
from decoders import decoder, tokens
from recursive_models import VOCABULARY, prompts, tiny_recursive

import lowrank_ext as lr
from lowrank_ext.methods.recursive import (
    Confidence,
    DepthwiseEngine,
    FixedDepth,
    ForcedExits,
    Sampling,
    evaluate,
)

COUNT = 6
LENGTHS = [6, 4, 7, 3, 5, 6]


@pytest.fixture(scope="module")
def model():
    return tiny_recursive()


@pytest.fixture(scope="module")
def expected(model) -> list[list[int]]:
    """Of each request alone."""
    answers = []
    for prompt, length in zip(prompts(COUNT), LENGTHS, strict=True):
        engine = DepthwiseEngine(model, max_rows=1)
        engine.add(prompt, max_new_tokens=length)
        answers.append(engine.run()[0].tokens)
    return answers


def add_all(engine: DepthwiseEngine, **on_token) -> None:
    for i, (prompt, length) in enumerate(zip(prompts(COUNT), LENGTHS, strict=True)):
        engine.add(prompt, max_new_tokens=length, id=i, on_token=on_token.get(f"of_{i}"))


@pytest.mark.parametrize("draft_tokens", [0, 2])
@pytest.mark.parametrize("policy", ["static", "continuous", "depth-wise"])
@pytest.mark.parametrize(("by", "whom"), [(0, 1), (1, 0), (2, 0), (0, 2), (1, 1)])
@pytest.mark.parametrize("then", ["goes on", "raises"])
def test_a_callback_cancels_any_request(
    model, expected, policy, draft_tokens, by, whom, then
) -> None:
    """Its slot's next sequence begins at its first token, and the others are not touched."""
    if draft_tokens and policy != "depth-wise":
        pytest.skip("drafts need depth-wise")
    engine = DepthwiseEngine(model, max_rows=3, policy=policy, draft_tokens=draft_tokens)

    def cancel(request: object, token: int) -> None:
        engine.cancel(whom)
        if then == "raises":
            raise KeyError("its own")

    add_all(engine, **{f"of_{by}": cancel})
    results = engine.run()
    failed = {whom: "cancelled"} | ({by: "error"} if then == "raises" and by != whom else {})
    for i in range(COUNT):
        if i in failed:
            assert results[i].finish_reason == failed[i]
            assert results[i].tokens == expected[i][: len(results[i].tokens)]
        else:
            assert (results[i].finish_reason, results[i].tokens) == ("length", expected[i])
    assert engine.num_running == 0


@pytest.mark.parametrize("part", ["embed", "logits", "write_keys", "run"])
@pytest.mark.parametrize("most", [0, 1, 2])
def test_a_part_that_has_no_memory_for_many_rows(model, monkeypatch, part, most) -> None:
    """Halves are tried; where one request alone is too much, that one ends, and nothing twice."""
    exits = ForcedExits({i: [0, 1, 0, 2, 0, 1, 0] for i in range(COUNT)})
    options = {"exit_rule": exits, "skipped": "copy", "max_rows": 4}
    engine = DepthwiseEngine(model, **options)
    add_all(engine)
    right = engine.run()
    engine = DepthwiseEngine(model, **options)
    runner = engine._scheduler._runner
    whole = getattr(runner, part)

    def short_of_memory(first, *rest):
        rows = first.count if part in ("run", "write_keys") else first.shape[0]
        if rows > most and (most or engine.metrics().tokens > 3):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(first, *rest)

    monkeypatch.setattr(runner, part, short_of_memory)
    add_all(engine)
    results = engine.run()
    for i in range(COUNT):
        assert results[i].finish_reason in ("length", "error")
        assert results[i].tokens == right[i].tokens[: len(results[i].tokens)]
        assert results[i].finish_reason == "error" or results[i].tokens == right[i].tokens
    assert engine.num_running == 0


def test_a_sampling_that_fails_ends_its_request_alone(model, expected, monkeypatch) -> None:
    def fails(self, logits):
        raise RuntimeError("probability tensor contains either `inf`, `nan` or element < 0")

    monkeypatch.setattr("lowrank_ext.methods.recursive.engine.requests.Sampler.choose", fails)
    engine = DepthwiseEngine(model, max_rows=COUNT + 1)
    engine.add([1, 2], sampling=Sampling(temperature=0.5), id="cold")
    add_all(engine)
    results = engine.run()
    assert results["cold"].finish_reason == "error" and results["cold"].tokens == []
    assert [results[i].tokens for i in range(COUNT)] == expected


@pytest.mark.parametrize("needs_logits", [False, True])
def test_a_rule_that_raises_ends_the_requests_it_was_asked_about(model, needs_logits) -> None:
    calls = []

    def exits(rows):
        calls.append(list(rows.requests))
        if "bad" in rows.requests:
            raise KeyError("no such request")
        return torch.ones(len(rows.requests), dtype=torch.bool)

    rule = SimpleNamespace(needs_logits=needs_logits, exits=exits)
    engine = DepthwiseEngine(model, max_rows=1, exit_rule=rule)
    engine.add([1, 2], max_new_tokens=4, id="bad")
    engine.add([3], max_new_tokens=4, id="good")
    results = engine.run()
    assert (results["bad"].finish_reason, len(results["bad"].tokens)) == ("error", 1)
    assert "no such request" in results["bad"].error
    assert (results["good"].finish_reason, results["good"].exit_loops) == ("length", [2, 0, 0, 0])


@pytest.mark.parametrize("policy", ["static", "continuous", "depth-wise"])
def test_a_cancelled_request_leaves_no_nan(expected, policy) -> None:
    """Masked entries of a cache are multiplied by zero, which NaN survives."""
    model = tiny_recursive()
    used = {token for each in (*prompts(COUNT), *expected) for token in each}
    poison = next(token for token in range(VOCABULARY) if token not in used)
    with torch.no_grad():
        head = model.lm_head.weight.clone()
        model.model.embed_tokens.weight[poison] = float("nan")
        model.lm_head.weight = torch.nn.Parameter(head)
    engine = DepthwiseEngine(model, max_rows=2, policy=policy)
    engine.add([1, poison, 2] * 5, max_new_tokens=4, id="bad")
    add_all(engine)
    for _ in range(2):
        engine.step()
    engine.cancel("bad")
    results = engine.run()
    assert [results[i].tokens for i in range(COUNT)] == expected


def test_layers_with_settings_of_their_own_are_refused() -> None:
    model = tiny_recursive()
    model.model.layers[2].self_attn.scaling *= 2
    with pytest.raises(ValueError, match=r"LlamaAttention\.scaling must be the same in all loops"):
        DepthwiseEngine(model)


def test_a_window_that_only_the_mask_knows_is_refused() -> None:
    model = tiny_recursive()
    model.config.sliding_window = 4  # Llama's layers do not look at it
    with pytest.raises(NotImplementedError, match="LlamaAttention must give its sliding_window=4"):
        DepthwiseEngine(model)


def test_a_model_that_calls_its_layers_otherwise_is_refused(monkeypatch) -> None:
    model = tiny_recursive()
    engine = DepthwiseEngine(model)  # the unharmed one
    assert engine.num_loops == 3
    monkeypatch.setattr(
        type(model.model.layers[0].self_attn), "forward", lambda self, *args, **kwargs: (1, 2, 3)
    )
    with pytest.raises(NotImplementedError, match="must call its layers as the engine can"):
        DepthwiseEngine(model)


@pytest.mark.parametrize("family", ["GPTNeoX", "GPT2"])
def test_a_model_in_training_mode_has_no_dropout(family) -> None:
    options = {"hidden_dropout": 0.5} if family == "GPTNeoX" else {"embd_pdrop": 0.5}
    config = lr.recursive.RecursiveConfig(num_loops=2)
    model = lr.recursive.convert(decoder(family, **options), config)
    prompt, found = tokens(1)[0].tolist(), []
    for mode in (False, True):
        engine = DepthwiseEngine(model.train(mode))
        engine.add(prompt, max_new_tokens=6)
        found.append(engine.run()[0].tokens)
        assert model.training == mode
    assert found[0] == found[1]


def test_layers_with_a_forward_of_their_own(model, expected) -> None:
    """As accelerate and module.compile() give them: bound to a module that serves one loop."""
    model = tiny_recursive()
    for layer in model.model.layers:
        layer.self_attn.forward = layer.self_attn.forward
        layer._compiled_call_impl = layer._call_impl
    engine = DepthwiseEngine(model)
    add_all(engine)
    results = engine.run()
    assert [results[i].tokens for i in range(COUNT)] == expected


class ByteTokenizer:
    """A token for each byte; as byte-level BPE has for characters that it does not know."""

    def __call__(self, text: str) -> SimpleNamespace:
        return SimpleNamespace(input_ids=list(text.encode()))

    def decode(self, ids: list[int]) -> str:
        return bytes(ids).decode("utf-8", errors="replace")


def test_a_stop_string_of_many_tokens(model) -> None:
    from lowrank_ext.methods.recursive.engine.intake import Intake

    intake = Intake(model, 200, ByteTokenizer())
    stop = "🙂" * 12
    request = intake.request([1], 100, Sampling(), [stop], None)
    for byte in ("so " + stop).encode():
        assert intake.reason_to_end(request) is None if request.tokens else True
        request.result.tokens.append(byte)
    assert intake.reason_to_end(request) == "stop"


def test_options_that_cannot_work(model) -> None:
    assert Sampling(temperature=2, seed=2**64 - 1)
    engine = DepthwiseEngine(model)
    engine.add([1], sampling=Sampling(temperature=2), max_new_tokens=2)
    assert len(engine.run()[0].tokens) == 2
    for temperature in (1e-40, 1e-7, 5e-324):
        with pytest.raises(ValueError, match="temperature must be 0 or at least 1e-06"):
            Sampling(temperature=temperature)
    for seed in (-1, 2**64):
        with pytest.raises(ValueError, match="seed must be from 0"):
            Sampling(seed=seed)
    with pytest.raises(ValueError, match="loop must be at least 0"):
        FixedDepth(-1)
    with pytest.raises(TypeError, match="loop must be an int"):
        FixedDepth("a")
    rule = Confidence("margin", [0.1] * 5)
    with pytest.raises(ValueError, match="thresholds must be one, or 2 for a model of 3 loops"):
        DepthwiseEngine(model, exit_rule=rule)
    with pytest.raises(ValueError, match="evaluate: thresholds must be one, or 2"):
        evaluate(model, [torch.ones(1, 4, dtype=torch.int64)], rule=rule)
    with pytest.raises(ValueError, match="loop must be at most 2, the last one, got 3"):
        DepthwiseEngine(model, exit_rule=FixedDepth(3))
    for no_rule in (5, "margin", object()):
        with pytest.raises(TypeError, match="the exit rule must have exits and needs_logits"):
            DepthwiseEngine(model, exit_rule=no_rule)
    with pytest.raises(TypeError, match="tokenizer must be a transformers tokenizer, got 5"):
        DepthwiseEngine(model, tokenizer=5)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"prompt": None}, TypeError, "prompt must be token ids or text, got None"),
        ({"prompt": 5}, TypeError, "prompt must be token ids or text, got 5"),
        ({"prompt": b"ab"}, TypeError, "prompt must be token ids or text, got b'ab'"),
        ({"prompt": torch.ones(1, 2).long()}, ValueError, r"prompt must be \[T\], got \[1, 2\]"),
        ({"stop": 5}, TypeError, "stop must be a sequence of ids and strings, got 5"),
        ({"stop": [VOCABULARY]}, ValueError, f"token ids must be from 0 to {VOCABULARY - 1}"),
        ({"stop": [-1]}, ValueError, "token ids must be from 0"),
        ({"on_token": 5}, TypeError, "on_token must be callable, got 5"),
    ],
)
def test_requests_that_cannot_work(model, options, error, message) -> None:
    engine = DepthwiseEngine(model)
    with pytest.raises(error, match=f"add: {message}"):
        engine.add(**{"prompt": [1], **options})
    assert not engine.has_work


@pytest.mark.parametrize("again", ["step", "run", "stream"])
@pytest.mark.parametrize("by", ["callback", "rule"])
def test_a_step_within_a_step_is_refused(model, expected, again, by) -> None:
    """It would move the rows of a pass that is not over."""

    def step_again() -> None:
        list(engine.stream()) if again == "stream" else getattr(engine, again)()

    def exits(rows):
        if "bad" in rows.requests:
            step_again()
        return torch.zeros(len(rows.requests), dtype=torch.bool)

    rule = SimpleNamespace(needs_logits=False, exits=exits) if by == "rule" else None
    engine = DepthwiseEngine(model, max_rows=2, exit_rule=rule)
    on_token = (lambda request, token: step_again()) if by == "callback" else None
    engine.add([1, 2], max_new_tokens=4, id="bad", on_token=on_token)
    engine.run()
    assert engine.result("bad").finish_reason == "error"
    assert "must not be called within a step" in engine.result("bad").error
    engine.forget("bad")
    add_all(engine)
    results = engine.run()
    assert [results[i].tokens for i in range(COUNT)] == expected


CHANGES = {
    "cast and back": lambda model: model.double().float(),
    "data": lambda model: setattr(
        model.model.norm.weight, "data", model.model.norm.weight.data * 1.5
    ),
    "assigned": lambda model: model.load_state_dict(
        {name: value.clone() for name, value in model.state_dict().items()}, assign=True
    ),
    "linear": lambda model: setattr(
        model.model.layers[3].mlp, "up_proj", torch.nn.Linear(32, 48, bias=False)
    ),
    "head": lambda model: setattr(model, "lm_head", torch.nn.Linear(32, VOCABULARY)),
    "adapted": lambda model: lr.adapt(model, lr.LoRAConfig(r=2)),
}


@pytest.mark.parametrize("when", ["before add", "before run"])
@pytest.mark.parametrize("change", CHANGES)
def test_parts_that_are_replaced_are_noticed(change, when) -> None:
    model = tiny_recursive()
    engine = DepthwiseEngine(model)
    if when == "before run":
        engine.add([1, 2])
    CHANGES[change](model)
    with pytest.raises(RuntimeError, match=r"must be what it was when the engine was made"):
        engine.add([1, 2]) if when == "before add" else engine.run()


def test_what_is_written_in_place_is_seen(expected) -> None:
    model = tiny_recursive()
    engine = DepthwiseEngine(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1).add_(0.05)
    model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()})
    answers = []
    for each in (engine, DepthwiseEngine(model)):
        add_all(each)
        results = each.run()
        answers.append([results[i].tokens for i in range(COUNT)])
    assert answers[0] == answers[1] != expected


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
@pytest.mark.parametrize("part", ["embed", "run", "logits", "on_token"])
def test_an_engine_whose_step_was_interrupted_goes_no_further(
    model, expected, monkeypatch, part, error
) -> None:
    """Some rows may have been done: to go on would repeat or skip a token."""
    if part == "on_token" and error is ValueError:
        pytest.skip("a callback's exceptions end its request alone")
    engine = DepthwiseEngine(model, max_rows=3)
    calls = []

    def interrupt(*_: object) -> None:
        calls.append(part)
        if len(calls) == 3:
            raise error("in the middle")

    add_all(engine, **({f"of_{i}": interrupt for i in range(3)} if part == "on_token" else {}))
    if part != "on_token":
        plain = getattr(engine._runner, part)

        def wrapped(*args: object) -> object:
            interrupt()
            return plain(*args)

        monkeypatch.setattr(engine._runner, part, wrapped)
    with pytest.raises(error, match="in the middle"):
        engine.run()
    for again in (engine.step, engine.run, lambda: list(engine.stream())):
        with pytest.raises(RuntimeError, match="a step before was interrupted"):
            again()
    for i in range(COUNT):
        tokens_so_far = engine.result(i).tokens
        assert tokens_so_far == expected[i][: len(tokens_so_far)]
        engine.cancel(i)


@pytest.mark.parametrize("kind", ["forward_hook", "forward_pre_hook", "full_backward_hook"])
@pytest.mark.parametrize("path", ["0.mlp", "2", "3.self_attn.q_proj"])
def test_hooks_inside_of_layers_are_refused(kind, path) -> None:
    """A module there runs the rows of all loops: a hook would act on those of others."""
    model = tiny_recursive()
    engine = DepthwiseEngine(model)
    module = model.get_submodule(f"model.layers.{path}")
    handle = getattr(module, f"register_{kind}")(lambda *_: None)
    with pytest.raises(ValueError, match="must have no hooks"):
        DepthwiseEngine(model)
    if path != "2" and not path.startswith("3"):
        with pytest.raises(RuntimeError, match="make a new engine"):
            engine.add([1, 2])
    handle.remove()
    engine.add([1, 2])
    model.model.embed_tokens.register_forward_hook(lambda *_: None)
    DepthwiseEngine(model).add([1, 2])


@pytest.mark.parametrize(
    ("path", "name", "value"), [("0.self_attn", "scaling", 3.0), ("1.input_layernorm", "eps", 0.5)]
)
def test_settings_that_change_are_noticed(path, name, value) -> None:
    model = tiny_recursive()
    engine = DepthwiseEngine(model)
    module = model.get_submodule(f"model.layers.{path}")
    name = name if hasattr(module, name) else "variance_epsilon"
    setattr(module, name, value)
    with pytest.raises(RuntimeError, match=rf"model\.layers\.{path}.*make a new engine"):
        engine.add([1, 2])


def test_attention_that_looks_ahead_is_refused() -> None:
    model = tiny_recursive()
    model.config.is_causal = False
    with pytest.raises(ValueError, match="attention must look back only, got is_causal=False"):
        DepthwiseEngine(model)
    model = tiny_recursive()
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
    with pytest.raises(ValueError, match="attention must look back only"):
        DepthwiseEngine(model)


def test_autocast_is_refused(model) -> None:
    engine = DepthwiseEngine(model)
    engine.add([1, 2], max_new_tokens=2)
    with torch.autocast("cpu", torch.bfloat16):
        for action in (engine.step, lambda: DepthwiseEngine(model)):
            with pytest.raises(RuntimeError, match="autocast must be off"):
                action()
    assert engine.run()[0].finish_reason == "length"


@pytest.mark.parametrize(
    "options", [{"repetition_penalty": 1.3}, {"no_repeat_ngram_size": 2}, {"bad_words_ids": [[3]]}]
)
def test_what_generate_would_apply_is_said(options, recwarn) -> None:
    model = tiny_recursive()
    DepthwiseEngine(model)
    assert not recwarn.list
    model.generation_config.update(**options)
    with pytest.warns(UserWarning, match=rf"{next(iter(options))}=.*the engine does not"):
        DepthwiseEngine(model)


class Answering:
    """A rule that gives whatever it is told to."""

    needs_logits = True

    def __init__(self, answer) -> None:
        self.answer = answer

    def exits(self, rows) -> object:
        return self.answer(len(rows.requests))


@pytest.mark.parametrize(
    "answer",
    [
        lambda n: torch.zeros(n, 1, dtype=torch.bool),
        lambda n: torch.zeros(n),
        lambda n: torch.zeros(n + 1, dtype=torch.bool),
        lambda n: [False] * n,
    ],
)
def test_a_rule_must_answer_with_a_bool_for_each_row(model, answer) -> None:
    engine = DepthwiseEngine(model, max_rows=2, exit_rule=Answering(answer))
    engine.add([1, 2, 3], max_new_tokens=4)
    result = engine.run()[0]
    assert result.finish_reason == "error"
    assert "must give a bool tensor [1]" in (result.error or "")
    with pytest.raises(TypeError, match="must give a bool tensor"):
        evaluate(model, [torch.tensor([[1, 2, 3, 4]])], rule=Answering(answer))


def test_tables_and_thresholds_that_cannot_be(model) -> None:
    for loops in ({0: []}, {0: "01"}):
        with pytest.raises(ValueError, match="must hold at least one loop for request 0"):
            ForcedExits(loops)
    with pytest.raises(ValueError, match="loops must be at most 2, the last one, got 7"):
        DepthwiseEngine(model, exit_rule=ForcedExits({0: [7]}))
    engine = DepthwiseEngine(model, exit_rule=ForcedExits({}))
    engine.add([1, 2], max_new_tokens=3)
    assert "must hold every request, got none for 0" in (engine.run()[0].error or "")
    with pytest.raises(ValueError, match="must hold every request, got none for 0"):
        evaluate(model, [torch.tensor([[1, 2, 3, 4]])], rule=ForcedExits({}))
    for measure, bad in (("top_probability", 1.5), ("margin", -0.1), ("entropy", -1.0)):
        with pytest.raises(ValueError, match=f"thresholds of {measure} must be"):
            Confidence(measure, [bad])
    with pytest.raises(TypeError, match=r"id must be hashable, got \[1\]"):
        DepthwiseEngine(model).add([1], id=[1])
