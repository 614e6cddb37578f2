"""`lowrank-ext generate`: the texts of plain transformers, by base and adapters, streamed."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("transformers")

from finetune_runs import CONTEXT, check_error, invoke
from saved_adapters import LORA, load_plain, new_tokens, save_adapter
from transformers import AutoTokenizer

import lowrank_ext as lr
from lowrank_ext.cli import generate as command
from lowrank_ext.cli import variants

NEW = 8


def generate(*arguments: Any, **keywords: Any) -> Any:
    flags = ["--max-new-tokens", str(NEW), "--dtype", "fp32", *map(str, arguments)]
    return invoke("generate", *flags, **keywords)


def expected(base: Path, adapter: Path | None, prompt: str) -> list[int]:
    return new_tokens(base, adapter, prompt, NEW)


def records(result: Any) -> list[dict[str, Any]]:
    assert result.exit_code == 0, result.output
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_all_variants_answer_each_prompt_as_alone(tiny_model, adapters) -> None:
    names = ["a", "goat", "b", "dora"]
    paths = [adapters / name for name in names]
    prompts = ["first", "the second"]
    asked = [flag for prompt in prompts for flag in ("--prompt", prompt)]
    found = records(generate(*paths, *asked, "--compare-base", "--json"))
    assert [(r["prompt"], r["adapter"]) for r in found] == [
        (prompt, name) for prompt in prompts for name in (None, *names)
    ]
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    for record in found:
        path = adapters / record["adapter"] if record["adapter"] else None
        assert record["tokens"] == expected(tiny_model, path, record["prompt"])
        assert record["text"] == tokenizer.decode(record["tokens"], skip_special_tokens=True)
        assert record["finish_reason"] == "length"
    assert len({tuple(r["tokens"]) for r in found if r["prompt"] == "first"}) > 2


@pytest.mark.parametrize("name", ["a", "dora", "goat"])
def test_one_adapter_needs_no_copy_of_the_base(tiny_model, adapters, monkeypatch, name) -> None:
    monkeypatch.setattr(variants, "copy", None)
    (record,) = records(generate(adapters / name, "--prompt", "first", "--json"))
    assert record["adapter"] == name
    assert record["tokens"] == expected(tiny_model, adapters / name, "first")


@pytest.mark.parametrize(
    "config",
    [
        lr.LoRAConfig(**LORA, trainable_token_indices=[0, 30]),
        lr.LoRAConfig(r=2, target_modules=["embed_tokens"]),
        lr.LoRAConfig(**LORA, modules_to_save=["embed_tokens", "lm_head"]),
    ],
    ids=["rows", "embeddings", "saved embeddings"],
)
def test_adapters_of_embeddings_answer_alone_and_beside_the_base(
    tiny_model, tmp_path, config
) -> None:
    save_adapter(tiny_model, tmp_path / "it", config, move=0.5)
    answer = expected(tiny_model, tmp_path / "it", "first")
    ask = (tmp_path / "it", "--prompt", "first", "--json")
    (record,) = records(generate(*ask))
    assert record["tokens"] == answer
    base, record = records(generate(*ask, "--compare-base"))
    assert record["tokens"] == answer
    assert base["tokens"] == expected(tiny_model, None, "first")


def test_text_is_streamed_to_stdout_with_headings_where_there_are_several(
    tiny_model, adapters
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    texts = [tokenizer.decode(expected(tiny_model, p, "first")) for p in (None, adapters / "a")]
    plain = generate("--model", tiny_model, "--prompt", "first")
    assert plain.stdout == texts[0] + "\n"
    both = generate("--adapter", f"it={adapters / 'a'}", "--compare-base", "--prompt", "first")
    assert both.stdout == f"[base] {texts[0]}\n[it] {texts[1]}\n"


def test_prompts_come_from_files_and_stdin(tiny_model, tmp_path) -> None:
    (tmp_path / "prompts.txt").write_text("one\n\ntwo\x0cpages\n")
    found = records(generate("--model", tiny_model, "--file", tmp_path / "prompts.txt", "--json"))
    assert [record["prompt"] for record in found] == ["one", "two\x0cpages"]
    (record,) = records(generate("--model", tiny_model, "--json", input="two\nlines\n"))
    assert record["prompt"] == "two\nlines"
    assert record["tokens"] == expected(tiny_model, None, "two\nlines")
    check_error(generate("--model", tiny_model, input=" \n"), "stdin holds no prompt")


def test_the_chat_template_is_used_unless_raw(chat_model) -> None:
    ask = ("--model", chat_model, "--prompt", "hi", "--json")
    for flags, prompt in (
        ([], "user:hi;assistant:"),
        (["--system", "be"], "system:be;user:hi;assistant:"),
        (["--raw"], "hi"),
    ):
        (record,) = records(generate(*ask, *flags))
        assert record["tokens"] == expected(chat_model, None, prompt)


def test_sampling_depends_on_the_seed_and_narrow_choices_are_greedy(tiny_model) -> None:
    def tokens(*flags: str) -> list[int]:
        ask = ("--model", tiny_model, "--prompt", "first", "--json")
        return records(generate(*ask, *flags))[0]["tokens"]

    hot = ("--temperature", "1.5")
    assert tokens(*hot, "--seed", "1") == tokens(*hot, "--seed", "1") != tokens(*hot, "--seed", "2")
    greedy = expected(tiny_model, None, "first")
    assert tokens(*hot, "--top-k", "1") == greedy
    assert tokens(*hot, "--top-p", "0.00001") == greedy


def test_generate_and_chat_sample_where_the_model_says_so(tiny_model, tmp_path) -> None:
    base, tokenizer = load_plain(tiny_model), AutoTokenizer.from_pretrained(tiny_model)
    base.generation_config.update(do_sample=True, temperature=1.5, top_p=0.9, top_k=30)
    base.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)

    def text(name: str, *flags: str) -> str:
        sizes = ("--model", str(tmp_path), "--dtype", "fp32", "--max-new-tokens", str(NEW))
        result = invoke(name, *sizes, *flags, input="first\n")
        assert result.exit_code == 0, result.output
        return result.stdout.removesuffix("\n")

    def sampled(**options: Any) -> str:
        ids = tokenizer("first", return_tensors="pt").input_ids
        torch.manual_seed(0)
        found = load_plain(tmp_path).generate(ids, max_new_tokens=NEW, **options)
        return tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True)

    greedy = tokenizer.decode(expected(tiny_model, None, "first"), skip_special_tokens=True)
    assert len({sampled(), sampled(temperature=4.0), greedy}) == 3
    for name in ("generate", "chat"):
        assert text(name) == sampled()
        assert text(name, "--temperature", "4") == sampled(temperature=4.0)
        assert text(name, "--top-k", "2") == sampled(top_k=2)
        assert text(name, "--temperature", "0") == greedy


def test_chat_takes_the_most_likely_token_as_generate_does(tiny_model) -> None:
    sizes = ("--model", str(tiny_model), "--dtype", "fp32", "--max-new-tokens", str(NEW))
    texts = [invoke(name, *sizes, input="first\n").stdout for name in ("generate", "chat")]
    greedy = AutoTokenizer.from_pretrained(tiny_model).decode(expected(tiny_model, None, "first"))
    assert texts == [greedy + "\n"] * 2


def test_a_text_ends_at_the_end_token(tiny_model, tmp_path) -> None:
    base = load_plain(tiny_model)
    second = expected(tiny_model, None, "first")[1]
    base.generation_config.eos_token_id = [second]
    base.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path)
    (record,) = records(generate("--model", tmp_path, "--prompt", "first", "--json"))
    assert record["finish_reason"] == "end"
    assert len(record["tokens"]) <= 2 and record["tokens"][-1] == second


def test_ctrl_c_ends_a_text_and_says_so(tiny_model, monkeypatch) -> None:
    written: list[str] = []

    def interrupted(text: str) -> None:
        written.append(text)
        if len("".join(written)) == len(text) > 0:  # the first piece
            raise KeyboardInterrupt

    monkeypatch.setattr(command, "write_text", interrupted)
    result = generate("--model", tiny_model, "--prompt", "first")
    assert result.exit_code == 130
    assert result.stderr.splitlines() == ["stopped; the text above is not whole"]
    assert 0 < len("".join(written).strip()) < NEW


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--temperature", "-1"], "--temperature must be at least 0, got -1"),
        (["--temperature", "nan"], "--temperature must be at least 0, got nan"),
        (["--top-p", "0"], "--top-p must be above 0 and at most 1, got 0"),
        (["--top-k", "-1"], "--top-k must be at least 0"),
        (["--top-k", "5"], "--top-p and --top-k are of sampling"),
        (["--temperature", "0", "--top-p", "0.5"], "give --temperature above 0"),
        (["--max-new-tokens", "0"], "--max-new-tokens must be at least 1"),
        (["--max-new-tokens", str(CONTEXT)], f"the model's context has {CONTEXT}"),
        (["--seed", "-1"], "--seed must be at least 0"),
        (["--system", "x"], "--system needs a tokenizer with a chat template"),
        (["--system", "x", "--raw"], "--raw has none"),
        (["--file", "x"], "give --prompt, which may be repeated, or --file, not both"),
        (["--device", "tpu"], "--device must be auto, cpu, cuda or cuda:N, got 'tpu'"),
        (["--dtype", "fp8"], "--dtype must be one of"),
        (["--adapter", "a"], "--adapter must be NAME=DIR, got 'a'"),
        (["--adapter", "a=none"], "none: no such directory"),
        (["--prompt", ""], "prompt 2 has no tokens"),
    ],
)
def test_wrong_options(tiny_model, flags, words) -> None:
    check_error(generate("--model", tiny_model, "--prompt", "first", *flags), words)


def test_names_and_bases_must_be_clear(tiny_model, chat_model, adapters, tmp_path) -> None:
    check_error(generate(adapters / "a", "--adapter", f"a={adapters / 'b'}"), "'a'", "is taken")
    check_error(generate("--adapter", f"base={adapters / 'b'}"), "'base'", "is taken")
    save_adapter(chat_model, tmp_path / "c", lr.LoRAConfig(**LORA))
    result = generate(adapters / "a", tmp_path / "c", "--prompt", "x")
    check_error(result, "must have one base", "give it by --model")
    ask = ("--prompt", "x", "--model", tiny_model)
    assert generate(adapters / "a", tmp_path / "c", *ask).exit_code == 0


def test_a_damaged_adapter_is_said_before_any_text(tiny_model, adapters, tmp_path) -> None:
    save_adapter(tiny_model, tmp_path / "bad", lr.LoRAConfig(**LORA))
    weights = tmp_path / "bad" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    result = generate(adapters / "a", tmp_path / "bad", "--prompt", "x")
    check_error(result, f"cannot load {tmp_path / 'bad'}")
    assert result.stdout == ""


def test_models_and_prompts_are_on_the_device(tiny_model, adapters, monkeypatch) -> None:
    """A made-up GPU: what is moved there comes to the CPU, and every move is noted."""
    asked: list[str] = []
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr("lowrank_ext._build_info.CUDA_VERSION", "12.9")
    load = variants.load_model

    def on_cpu(source: Any, dtype: Any, device: torch.device, quantize: str | None) -> Any:
        asked.append(str(device))
        return load(source, dtype)

    monkeypatch.setattr(variants, "load_model", on_cpu)
    result = generate(adapters / "a", "--prompt", "x", "--device", "cuda:1", "--compare-base")
    assert result.exit_code == 0, result.output
    assert asked == ["cuda:1"]


def test_the_base_is_quantized_as_in_the_run(tiny_model, tmp_path, monkeypatch) -> None:
    save_adapter(tiny_model, tmp_path / "run" / "adapter", lr.LoRAConfig(**LORA))
    (tmp_path / "run" / "run.yaml").write_text(f"model: {tiny_model}\nquantize: nf4\n")
    asked: list[str | None] = []
    load = variants.load_model

    def dense(source: Any, dtype: Any, device: torch.device, quantize: str | None) -> Any:
        asked.append(quantize)
        return load(source, dtype, device)

    monkeypatch.setattr(variants, "load_model", dense)
    ask = (tmp_path / "run", "--prompt", "x")
    for flags in ([], ["--quantize", "int8"], ["--quantize", "none"]):
        assert generate(*ask, *flags).exit_code == 0
    assert asked == ["nf4", "int8", None]
    check_error(generate(*ask, "--quantize", "nf"), "--quantize must be one of none, nf4, int8")
