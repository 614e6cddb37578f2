"""DepthwiseEngine: its tokens are those of generate, or of one request alone by the same rule."""

from collections.abc import Callable
from inspect import signature

import pytest
import torch
from decoders import FAMILIES, decoder, tokens
from recursive_models import VOCABULARY, prompts, tiny_llama, tiny_recursive
from torch import Tensor
from transformers import DynamicCache, LlamaForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import lowrank_ext as lr
from lowrank_ext.methods.recursive import (
    Agreement,
    Confidence,
    DepthwiseEngine,
    FixedDepth,
    ForcedExits,
    Sampling,
)

POLICIES = ["static", "continuous", "depth-wise"]
SKIPPED = ["backfill", "copy", "share-first"]
CACHE = "cache" if "cache" in signature(LlamaForCausalLM.forward).parameters else "past_key_values"
LENGTHS = [8, 3, 6, 1, 6, 9, 4]


def generated(model, prompt: list[int], count: int) -> list[int]:
    ids = torch.tensor([prompt])
    mask = torch.ones_like(ids)
    made = model.generate(ids, attention_mask=mask, max_new_tokens=count, do_sample=False)
    return made[0, len(prompt) :].tolist()


def run(engine: DepthwiseEngine, count: int = 7) -> list[list[int]]:
    for prompt, length in zip(prompts(count), LENGTHS, strict=False):
        engine.add(prompt, max_new_tokens=length)
    results = engine.run()
    assert all(result.finish_reason == "length" for result in results.values())
    return [results[i].tokens for i in range(count)]


@pytest.fixture(scope="module")
def model():
    return tiny_recursive()


@pytest.fixture(scope="module")
def full_depth(model) -> list[list[int]]:
    return [generated(model, p, n) for p, n in zip(prompts(), LENGTHS, strict=True)]


# ---- full depth


@pytest.mark.parametrize("max_rows", [1, 3, 16])
@pytest.mark.parametrize("policy", POLICIES)
def test_without_exits_the_tokens_are_those_of_generate(model, full_depth, policy, max_rows):
    engine = DepthwiseEngine(model, max_rows=max_rows, policy=policy, prompt_rows=4)
    assert run(engine) == full_depth
    assert engine.num_running == 0


@pytest.mark.parametrize("seed", range(3))
def test_any_order_of_arrival(model, full_depth, seed):
    generator = torch.Generator().manual_seed(seed)
    waiting = torch.randperm(7, generator=generator).tolist()
    engine = DepthwiseEngine(model, max_rows=3)
    while waiting or engine.has_work:
        while waiting and torch.rand((), generator=generator) < 0.3:
            i = waiting.pop()
            engine.add(prompts()[i], max_new_tokens=LENGTHS[i], id=i)
        engine.step()
    assert [engine.result(i).tokens for i in range(7)] == full_depth


@pytest.mark.parametrize("num_loops", [1, 2, 6])
def test_any_number_of_loops(num_loops):
    model = tiny_recursive(num_loops)
    expected = [generated(model, p, n) for p, n in zip(prompts(), LENGTHS, strict=True)]
    assert run(DepthwiseEngine(model, max_rows=3)) == expected


@pytest.mark.parametrize("skipped", SKIPPED)
@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"Gemma2", "GPT2"}))
def test_every_family(family, skipped):
    """Sliding windows, learned positions, fused projections, experts; a prompt in parts."""
    config = lr.recursive.RecursiveConfig(num_loops=2, rank=3)
    model = lr.recursive.convert(decoder(family), config)
    never = ForcedExits({i: [1] for i in range(3)})
    found = []
    for rule in (never, ForcedExits({i: [0, 1, 0, 0, 1] for i in range(3)})):
        engine = DepthwiseEngine(
            model, max_rows=2, prompt_rows=4, exit_rule=rule, skipped=skipped, max_length=24
        )
        for row in tokens(3, 7):
            engine.add(row, max_new_tokens=6, stop=[])
        found.append([result.tokens for result in engine.run().values()])
    ids = tokens(3, 7)
    options = dict(max_new_tokens=6, min_new_tokens=6, do_sample=False, eos_token_id=None)
    made = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    assert found[0] == made[:, 7:].tolist()
    if skipped == "backfill":
        for row, own in zip(ids.tolist(), found[1], strict=True):
            with torch.no_grad():
                alone = alone_with_backfill(model, rule, row, 6, 0)
            assert own == alone


def test_attention_that_the_engine_does_not_have_is_refused_at_once():
    model = lr.recursive.convert(decoder("Gemma2"), lr.recursive.RecursiveConfig(num_loops=2))
    with pytest.raises(NotImplementedError, match="must attend without softcap"):
        DepthwiseEngine(model)


def test_a_pure_recursion():
    model = tiny_recursive(2, rank=0)
    expected = [generated(model, p, n) for p, n in zip(prompts(), LENGTHS, strict=True)]
    assert run(DepthwiseEngine(model, max_rows=4)) == expected


def test_a_rule_that_lets_nothing_go_gives_full_depth_bit_for_bit(model):
    """The same passes, so the same logits, of which a sampled token is a function."""
    never = ForcedExits({i: [2] for i in range(7)})
    tokens = []
    for rule in (None, never):
        engine = DepthwiseEngine(model, max_rows=3, exit_rule=rule)
        for i, prompt in enumerate(prompts()):
            sampling = Sampling(temperature=2.0, seed=i)
            engine.add(prompt, max_new_tokens=8, sampling=sampling)
        tokens.append([result.tokens for result in engine.run().values()])
    assert tokens[0] == tokens[1]


# ---- exits, against one request alone


def loop_tokens(model, ids: list[int]) -> list[Tensor]:
    """Logits [V] of the last token after each loop, all loops of all tokens run."""
    return [
        logits[0, -1] for logits in lr.recursive.loop_logits(model, input_ids=torch.tensor([ids]))
    ]


def exit_of(rule, logits: list[Tensor], request: object, index: int) -> int:
    """The loop after which the rule lets the token go."""
    earlier = None
    for loop, own in enumerate(logits[:-1]):
        rows = lr.methods.recursive.exits.ExitRows(loop, [request], [index], own[None], earlier)
        if bool(rule.exits(rows)[0]):
            return loop
        earlier = own.argmax()[None]
    return len(logits) - 1


def alone_with_backfill(model, rule, prompt: list[int], count: int, request: object) -> list[int]:
    """Exact keys and values of all loops: the whole sequence again for each token."""
    ids = list(prompt)
    for index in range(count):
        logits = loop_tokens(model, ids)
        loop = exit_of(rule, logits, request, index) if index else len(logits) - 1
        ids.append(int(logits[loop].argmax()))
    return ids[len(prompt) :]


def alone_with_own_cache(
    model, rule, prompt: list[int], count: int, request: object, skipped: str
) -> list[int]:
    """transformers' cache, in which the entries of skipped loops are replaced."""
    loops = lr.methods.recursive.model.Loops(model, "test")
    cache = DynamicCache(config=model.config)
    ids = list(prompt)
    new = torch.tensor([ids])
    for index in range(count):
        with torch.no_grad(), lr.methods.recursive.loop_outputs.collected_loops(model) as states:
            model(new, **{CACHE: cache}, use_cache=True)
        logits = [lr.recursive.exit_logits(model, state)[0, -1] for state in states]
        loop = exit_of(rule, logits, request, index) if index else len(logits) - 1
        for deeper in range(loop + 1, loops.num_loops):
            for k in range(loops.length):
                entry = cache.layers[deeper * loops.length + k]
                if skipped == "share-first":
                    source = cache.layers[loop * loops.length + k]
                    keys, values = source.keys[:, :, -1], source.values[:, :, -1]
                else:
                    layer = loops.layers(deeper)[k]
                    keys, values = keys_of(model, layer, states[loop][:, -1:], len(ids) - 1)
                entry.keys[:, :, -1], entry.values[:, :, -1] = keys, values
        ids.append(int(logits[loop].argmax()))
        new = torch.tensor([ids[-1:]])
    return ids[len(prompt) :]


def keys_of(model, layer, states: Tensor, position: int) -> tuple[Tensor, Tensor]:
    """Keys and values [1, heads, d] of a Llama layer for ``states`` [1, 1, D]."""
    attention, x = layer.self_attn, layer.input_layernorm(states)
    shape = (1, 1, -1, attention.head_dim)
    keys = attention.k_proj(x).view(shape).transpose(1, 2)
    values = attention.v_proj(x).view(shape).transpose(1, 2)
    cos, sin = model.model.rotary_emb(x, torch.tensor([[position]]))
    keys, _ = apply_rotary_pos_emb(keys, keys, cos, sin)
    return keys[:, :, 0], values[:, :, 0]


RULES: dict[str, Callable] = {
    "top_probability": lambda: Confidence("top_probability", [0.3, 0.4]),
    "margin": lambda: Confidence("margin", [0.1]),
    "entropy": lambda: Confidence("entropy", [3.0, None]),
    "fixed": lambda: FixedDepth(1),
    "agreement": Agreement,
    "forced": lambda: ForcedExits({i: [i % 3, (i + 1) % 3, 0, 2, 0, 0, 1] for i in range(7)}),
}


@torch.no_grad()
def each_alone(model, rule: str, skipped: str, count: int) -> list[list[int]]:
    tokens = []
    for i, (prompt, length) in enumerate(zip(prompts(count), LENGTHS, strict=False)):
        arguments = (model, RULES[rule](), prompt, length, i)
        if skipped == "backfill":
            tokens.append(alone_with_backfill(*arguments))
        else:
            tokens.append(alone_with_own_cache(*arguments, skipped))
    return tokens


@pytest.mark.parametrize("skipped", SKIPPED)
@pytest.mark.parametrize("rule", RULES)
def test_exits_equal_one_request_alone(model, rule, skipped):
    expected = each_alone(model, rule, skipped, 5)
    for max_rows in (1, 4):
        engine = DepthwiseEngine(
            model, max_rows=max_rows, exit_rule=RULES[rule](), skipped=skipped, prompt_rows=4
        )
        assert run(engine, 5) == expected
        exits = engine.metrics().exits
        assert sum(exits.values()) == sum(LENGTHS[:5])
        assert len(exits) > 1, "the rule must let some tokens go, or the test says nothing"
        assert engine.metrics().rows["backfill"] > 0 or skipped != "backfill" or rule == "fixed"


def test_forced_exits_are_taken(model):
    loops = {i: [2, 0, 1, 0, 2, 1, 1, 0, 0, 0, 0, 0] for i in range(7)}
    engine = DepthwiseEngine(model, max_rows=4, exit_rule=ForcedExits(loops))
    run(engine)
    for i, length in enumerate(LENGTHS):
        assert engine.result(i).exit_loops == loops[i][:length]


@pytest.mark.parametrize("draft_tokens", [1, 3, 20])
@pytest.mark.parametrize("max_rows", [1, 3])
def test_lossless_mode_gives_the_tokens_of_full_depth(model, full_depth, draft_tokens, max_rows):
    engine = DepthwiseEngine(model, max_rows=max_rows, draft_tokens=draft_tokens)
    assert run(engine) == full_depth


# ---- rows of mixed depth


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("loops", [[0, 2, 1, 0, 2], [1], [2, 2], [0, 0, 1, 1, 2, 2, 0, 1, 2, 0]])
def test_a_row_of_a_mixed_linear_equals_the_row_alone(loops, dtype):
    """Small integers, whose sums are exact in any order: bit for bit."""
    generator = torch.Generator().manual_seed(0)

    def whole(*shape: int) -> Tensor:
        return torch.randint(-3, 4, shape, generator=generator).to(dtype)

    weight, bias, lora_a, lora_b = whole(24, 16), whole(24), whole(3, 5, 16), whole(3, 24, 5)
    mixed = lr.methods.recursive.relaxed_linear.MixedDepthLinear(weight, bias, lora_a, lora_b)
    x = whole(len(loops), 16)
    found = mixed(x, torch.tensor(loops))
    for m, loop in enumerate(loops):
        alone = lr.recursive.RelaxedLinear(
            torch.nn.Parameter(weight),
            torch.nn.Parameter(bias),
            lora_a[loop],
            lora_b[loop],
            loop,
        )
        assert torch.equal(found[m], alone(x[m : m + 1])[0])


# ---- requests


def test_streaming_gives_every_token_at_once(model, full_depth):
    engine = DepthwiseEngine(model, max_rows=2)
    for prompt, length in zip(prompts(), LENGTHS, strict=True):
        engine.add(prompt, max_new_tokens=length)
    seen: dict[object, list[int]] = {i: [] for i in range(7)}
    for request, token, reason in engine.stream():
        seen[request].append(token)
        assert engine.result(request).tokens == seen[request]
        assert (reason is not None) == (len(seen[request]) == LENGTHS[request])
    assert list(seen.values()) == full_depth


def test_seeds_are_the_requests_own(model):
    """The same tokens whatever runs beside."""
    sampling = Sampling(temperature=1.5, top_k=20, top_p=0.95, seed=7)
    alone = DepthwiseEngine(model, max_rows=1)
    alone.add(prompts()[0], max_new_tokens=12, sampling=sampling, id="a")
    beside = DepthwiseEngine(model, max_rows=4)
    for i, prompt in enumerate(prompts()[1:]):
        beside.add(prompt, max_new_tokens=9, sampling=Sampling(temperature=1.0, seed=i))
    beside.add(prompts()[0], max_new_tokens=12, sampling=sampling, id="a")
    assert alone.run()["a"].tokens == beside.run()["a"].tokens
    other = DepthwiseEngine(model, max_rows=1)
    other.add(prompts()[0], max_new_tokens=12, sampling=Sampling(temperature=1.5, seed=8), id="a")
    assert other.run()["a"].tokens != alone.result("a").tokens


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("when", [0, 1, 5, 9])
def test_cancel_at_any_time(model, full_depth, policy, when):
    engine = DepthwiseEngine(model, max_rows=2, policy=policy)
    for prompt, length in zip(prompts(), LENGTHS, strict=True):
        engine.add(prompt, max_new_tokens=length)
    for _ in range(when):
        engine.step()
    engine.cancel(0)
    engine.cancel(5)
    engine.cancel(0)
    results = engine.run()
    for i in (0, 5):
        ended_before = results[i].tokens == full_depth[i]
        assert results[i].finish_reason == "cancelled" or ended_before
        assert results[i].tokens == full_depth[i][: len(results[i].tokens)]
    for i in (1, 2, 3, 4, 6):
        assert results[i].tokens == full_depth[i]
    assert engine.num_running == 0


def test_zero_new_tokens(model):
    engine = DepthwiseEngine(model, max_rows=1)
    engine.add([1], max_new_tokens=0)
    assert list(engine.stream()) == [(0, None, "length")]
    assert engine.result(0).tokens == []


def test_a_prompt_at_the_limit_gets_one_token(model):
    engine = DepthwiseEngine(model, max_rows=1, max_length=9)
    engine.add(prompts()[1], max_new_tokens=5)
    result = engine.run()[0]
    assert result.tokens == generated(model, prompts()[1], 1)
    assert result.finish_reason == "length"


def test_a_sequence_ends_at_max_length(model, full_depth):
    engine = DepthwiseEngine(model, max_rows=2, max_length=7)
    engine.add(prompts()[0], max_new_tokens=10)
    result = engine.run()[0]
    assert (result.tokens, result.finish_reason) == (full_depth[0][:5], "length")


def test_stop_tokens(model, full_depth):
    stop = full_depth[0][4]
    first = full_depth[0].index(stop)
    engine = DepthwiseEngine(model, max_rows=2)
    engine.add(prompts()[0], max_new_tokens=10, stop=[stop])
    result = engine.run()[0]
    assert (result.tokens, result.finish_reason) == (full_depth[0][: first + 1], "stop")


def test_the_models_end_of_sequence_is_the_default_stop(model, full_depth):
    model.generation_config.eos_token_id = [full_depth[2][3], VOCABULARY - 1]
    try:
        engine = DepthwiseEngine(model, max_rows=2)
    finally:
        model.generation_config.eos_token_id = None
    engine.add(prompts()[2], max_new_tokens=8)
    assert engine.run()[0].finish_reason == "stop"


class Letters:
    """A tokenizer whose token i is the i-th letter pair."""

    def __call__(self, text: str):
        ids = [int(text[i : i + 2], 36) for i in range(0, len(text), 2)]
        return type("Encoding", (), {"input_ids": ids})

    def decode(self, tokens) -> str:
        return "".join(
            f"{token // 36}{'0123456789abcdefghijklmnopqrstuvwxyz'[token % 36]}" for token in tokens
        )


def test_text_and_stop_strings(model, full_depth):
    letters = Letters()
    engine = DepthwiseEngine(model, max_rows=2, tokenizer=letters)
    stop = letters.decode(full_depth[0][3:5])
    engine.add(letters.decode(prompts()[0]), max_new_tokens=10, stop=[stop])
    result = engine.run()[0]
    assert result.finish_reason == "stop"
    assert letters.decode(result.tokens).endswith(stop)
    assert result.tokens == full_depth[0][: len(result.tokens)]


def test_a_callback_that_raises_ends_its_request_alone(model, full_depth):
    def fail(request: object, token: int) -> None:
        raise KeyError("broken")

    engine = DepthwiseEngine(model, max_rows=3)
    for i, (prompt, length) in enumerate(zip(prompts(), LENGTHS, strict=True)):
        engine.add(prompt, max_new_tokens=length, on_token=fail if i == 1 else None)
    events = list(engine.stream())
    assert [e.finish_reason for e in events if e.request == 1] == ["error"]
    assert engine.result(1).error == "KeyError: 'broken'"
    for i in (0, 2, 3, 4, 5, 6):
        assert engine.result(i).tokens == full_depth[i]


def test_a_callback_may_cancel(model, full_depth):
    engine = DepthwiseEngine(model, max_rows=2)
    engine.add(
        prompts()[0], max_new_tokens=10, on_token=lambda request, token: engine.cancel(request)
    )
    engine.add(prompts()[1], max_new_tokens=3)
    events = list(engine.stream())
    assert events[-1].request == 1
    assert engine.result(0).tokens == full_depth[0][:1]
    assert engine.result(0).finish_reason == "cancelled"
    assert engine.result(1).tokens == full_depth[1]


@pytest.mark.parametrize("policy", POLICIES)
def test_numbers_that_are_not_finite_end_their_request_alone(full_depth, policy):
    """The slot's next sequence is right too, though the cache held NaN."""
    model = tiny_recursive()
    used = {token for tokens in (*prompts(), *full_depth) for token in tokens}
    poison = next(token for token in range(VOCABULARY) if token not in used)
    with torch.no_grad():
        model.model.embed_tokens.weight[poison] = float("nan")
        model.lm_head.weight = torch.nn.Parameter(tiny_recursive().lm_head.weight.clone())
    engine = DepthwiseEngine(model, max_rows=2, policy=policy)
    engine.add([1, poison, 2], max_new_tokens=4, id="bad")
    for prompt, length in zip(prompts(), LENGTHS, strict=True):
        engine.add(prompt, max_new_tokens=length)
    results = engine.run()
    assert results["bad"].finish_reason == "error"
    assert "finite" in results["bad"].error
    assert [results[i].tokens for i in range(7)] == full_depth


def test_a_pass_that_fails_ends_the_request_at_fault_alone(model, full_depth, monkeypatch):
    """As memory that does not suffice for a long prompt."""
    engine = DepthwiseEngine(model, max_rows=4)
    runner = engine._scheduler._runner
    whole = runner.run

    def limited(rows, states):
        if any(run.count > 12 for _, run in rows._alone):
            raise torch.OutOfMemoryError("out of memory")
        return whole(rows, states)

    monkeypatch.setattr(runner, "run", limited)
    for prompt, length in zip(prompts(), LENGTHS, strict=True):
        engine.add(prompt, max_new_tokens=length)
    results = engine.run()
    assert results[4].error == "OutOfMemoryError: out of memory"
    for i in (0, 1, 2, 3, 5, 6):
        assert results[i].tokens == full_depth[i]


def test_names_are_free_again_once_forgotten(model):
    engine = DepthwiseEngine(model, max_rows=1)
    engine.add([1], max_new_tokens=1, id="a")
    with pytest.raises(ValueError, match="forget: request 'a' must have ended"):
        engine.forget("a")
    with pytest.raises(ValueError, match="add: id must be new, got 'a' again"):
        engine.add([1], id="a")
    engine.run()
    engine.forget("a")
    engine.add([1], max_new_tokens=1, id="a")
    with pytest.raises(KeyError, match="there is no request 'b'"):
        engine.result("b")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": []}, "prompt must have from 1 to max_length=16 tokens, got 0"),
        ({"prompt": [1] * 17}, "prompt must have from 1 to max_length=16 tokens, got 17"),
        (
            {"prompt": [VOCABULARY]},
            f"token ids must be from 0 to {VOCABULARY - 1}, got {VOCABULARY}",
        ),
        ({"prompt": [-1]}, "token ids must be from 0"),
        ({"prompt": [1.5]}, "prompt must hold token ids, got 1.5"),
        ({"prompt": "ab"}, "prompt must be token ids in an engine without a tokenizer"),
        ({"max_new_tokens": -1}, "max_new_tokens must be at least 0, got -1"),
        ({"stop": ["x"]}, "stop strings need an engine with a tokenizer"),
        ({"stop": "x"}, "stop must be a sequence of ids and strings, got 'x'"),
        ({"stop": [1.0]}, "stop must hold ids and strings, got 1.0"),
        ({"sampling": 0.7}, "sampling must be a Sampling, got 0.7"),
    ],
)
def test_bad_requests_are_refused_and_leave_nothing(model, options, message):
    engine = DepthwiseEngine(model, max_rows=1, max_length=16)
    with pytest.raises((TypeError, ValueError), match=message):
        engine.add(**{"prompt": [1], **options})
    assert not engine.has_work
    assert engine.add([1]) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"policy": "deep"}, "policy must be one of"),
        ({"skipped": "none"}, "skipped must be one of"),
        ({"max_rows": 0}, "max_rows must be at least 1, got 0"),
        ({"max_length": 65}, "max_length must be at most 64, the model's context, got 65"),
        ({"policy": "static", "exit_rule": Agreement()}, "exit_rule and draft_tokens must be left"),
        ({"draft_tokens": 2, "exit_rule": Agreement()}, "give exit_rule or draft_tokens, got both"),
        ({"draft_tokens": 1.5}, "draft_tokens must be an int, got 1.5"),
    ],
)
def test_bad_engines_are_refused(model, options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        DepthwiseEngine(model, **options)


def test_a_plain_model_is_refused():
    with pytest.raises(TypeError, match="model must be recursive"):
        DepthwiseEngine(torch.nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature must be at least 0"),
        ({"top_k": 0}, "top_k must be at least 1, got 0"),
        ({"top_p": 1.5}, "top_p must be at most 1, got 1.5"),
        ({"seed": 1.0}, "seed must be an int or None"),
    ],
)
def test_bad_sampling(options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        Sampling(**options)


# ---- what an engine leaves behind


def test_the_model_is_as_before(model):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ids = torch.tensor([prompts()[1]])
    logits = model(ids).logits
    run(DepthwiseEngine(model, max_rows=2), 2)
    assert torch.equal(model(ids).logits, logits)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_training_goes_on_and_is_seen(model):
    model = tiny_recursive()
    engine = DepthwiseEngine(model, max_rows=2)
    before = run(engine, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    ids = torch.tensor([prompts()[4]])
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    again = DepthwiseEngine(model, max_rows=2)
    for prompt, length in zip(prompts(3), LENGTHS, strict=False):
        engine.add(prompt, max_new_tokens=length, id=("old engine", len(prompt)))
    expected = run(again, 3)
    assert expected != before
    found = engine.run()
    assert [found["old engine", len(p)].tokens for p in prompts(3)] == expected


@pytest.mark.parametrize("converted", ["before", "inside"])
def test_an_engine_made_in_inference_mode_leaves_a_model_that_trains(converted):
    model = tiny_llama()
    config = lr.recursive.RecursiveConfig(num_loops=3, rank=4)
    if converted == "before":
        lr.recursive.convert(model, config)
    with torch.inference_mode():
        if converted == "inside":
            lr.recursive.convert(model, config)
        expected = run(DepthwiseEngine(model, max_rows=2), 2)
    ids = torch.tensor([prompts()[4]])
    model(ids, labels=ids).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert run(DepthwiseEngine(model, max_rows=2), 2) == expected


def test_adapters_exist_once(model):
    """The engine's stacks are the model's own memory."""
    engine = DepthwiseEngine(model, max_rows=2)
    stack = engine._scheduler._runner._layers[0].mlp.up_proj.lora_a
    layers = model.model.layers
    for loop in range(3):
        assert layers[2 * loop].mlp.up_proj.lora_a.data_ptr() == stack[loop].data_ptr()
    second = DepthwiseEngine(model, max_rows=2)
    assert second._scheduler._runner._layers[0].mlp.up_proj.lora_a.data_ptr() == stack.data_ptr()


def test_metrics_add_up(model):
    engine = DepthwiseEngine(model, max_rows=3, exit_rule=FixedDepth(1), skipped="copy")
    run(engine)
    metrics = engine.metrics()
    assert metrics.tokens == sum(LENGTHS) == sum(metrics.exits.values())
    assert metrics.rows["prompt"] == 3 * sum(map(len, prompts()))
    assert metrics.rows["decode"] == 2 * (sum(LENGTHS) - 7)
    assert metrics.head_rows == sum(LENGTHS)
    assert len(metrics.first_token_seconds) == 7
    assert metrics.tokens_per_second > 0
    assert abs(sum(metrics.shares().values()) - 1) < 1e-6
    assert metrics.mean_loops == pytest.approx((3 * 7 + 2 * (sum(LENGTHS) - 7)) / sum(LENGTHS))
    engine.reset_metrics()
    assert engine.metrics().tokens == 0
