"""Reading: JSON and safetensors to their limits, patterns that end, messages that can be shown."""

import json
import os
import random
import re
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from snapshots import bits

import lowrank_ext as lr
from lowrank_ext.checks import matching_pattern
from lowrank_ext.files import (
    TensorFile,
    check_pattern,
    clean_errors,
    open_file,
    parse_json_object,
    printable,
    quoted,
    read_bytes,
    read_torch_file,
)

# ------------------------------------------------------------------------------------ messages


def test_printable_and_quoted() -> None:
    assert printable("a b\n\x1b]0;x\x07\ud800é\u2028") == "a b\\n\\x1b]0;x\\x07\\ud800é\\u2028"
    assert quoted("x" * 150_000_000) == "'" + "x" * 199 + " …"
    assert quoted({"a": [1, None]}) == "{'a': [1, None]}"
    assert quoted("\x1b[2J") == r"'\x1b[2J'"


@pytest.mark.parametrize("kind", [ValueError, FileNotFoundError, PermissionError])
def test_clean_errors(kind: type[Exception]) -> None:
    with pytest.raises(kind) as caught, clean_errors():
        raise kind("start \x1b]0;" + "x" * 10**6 + " end")
    text = str(caught.value)
    assert type(caught.value) is kind and len(text) < 1000
    assert text.startswith("start \\x1b]0;xx") and text.endswith("xx end")
    with pytest.raises(kind, match=r"^short$") as caught, clean_errors():
        raise kind("short")


# ---------------------------------------------------------------------------------------- JSON


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must be JSON: Expecting value"),
        ("{", "must be JSON"),
        ("[1]", r"must hold an object, got \[1\]"),
        ('{"a": NaN}', "here: a must be finite, .* got 'NaN'"),
        ('{"a": -Infinity}', "here: a must be finite, .* got '-Infinity'"),
        ('{"a": 1e999}', "here: a must be finite, .* got '1e999'"),
        ('{"a": 1' + "0" * 400 + "}", "here: a must be .* of at most 64 bits, got '1000"),
        ('{"a": 9223372036854775808}', "at most 64 bits"),
        ('{"b": [1, [NaN]]}', "here: b must be finite, .* got 'NaN'"),
        ('{"a": 1, "a": 2}', "key 'a' must appear once"),
        ('{"b": {"a": 1, "c": 3, "a": 1}}', "key 'a' must appear once"),
        ('{"a": ' + "[" * 32 + "]" * 32 + "}", "at most 32 levels"),
        ("[" * 10**6, "at most 32 levels"),
        ('{"a":' * 10**5, "at most 32 levels"),
        (b'{"a": "\xff"}', "utf-8"),
        (b"\xef\xbb\xbf{}", "BOM"),
    ],
    ids=lambda value: str(value[:12]),
)
def test_json_that_is_refused(text: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_json_object(text, "here")


@pytest.mark.parametrize(
    "value",
    [
        {},
        {"a": 2**63 - 1, "b": -(2**63), "c": 1e308, "d": 5e-324},
        {"brackets": '[[{"' * 1000, "escaped": '\\"[' * 1000},
        {"a": json.loads("[" * 31 + "]" * 31)},
    ],
    ids=["empty", "numbers", "strings", "deep"],
)
def test_json_that_is_read(value: dict[str, Any]) -> None:
    assert parse_json_object(json.dumps(value), "here") == value


def test_files_are_read_to_their_limit_only(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"12345")
    assert read_bytes(path, "test", 5) == b"12345"
    with pytest.raises(ValueError, match=f"^test: {path} must have at most 4 bytes, got more"):
        read_bytes(path, "test", 4)


# ----------------------------------------------------------------------------- what is no file


def test_what_is_no_regular_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fifo, loop, link = tmp_path / "fifo", tmp_path / "loop", tmp_path / "link"
    os.mkfifo(fifo)
    loop.symlink_to(loop)
    link.symlink_to(tmp_path / "gone")
    plain = tmp_path / "plain"
    plain.write_bytes(b"x")
    for path, error, message in (
        (tmp_path / "none", FileNotFoundError, "does not exist"),
        (link, FileNotFoundError, "is a link to a file that does not exist"),
        (tmp_path, IsADirectoryError, "must be a regular file, got a directory"),
        (fifo, OSError, "must be a regular file, got a FIFO"),
        (Path("/dev/null"), OSError, "must be a regular file, got a device"),
        (loop, OSError, "cannot be read: too many levels of symbolic links"),
        (plain / "in", NotADirectoryError, "cannot be read: not a directory"),
    ):
        with pytest.raises(error, match=f"^test: {path} {message}"):
            open_file(path, "test")

    def refused(*args: Any) -> int:  # also where the tests run as root, who may read all
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", refused)
    with pytest.raises(PermissionError, match=f"^test: {plain} cannot be read: permission denied"):
        open_file(plain, "test")


def test_torch_files(tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    torch.save({"a": torch.ones(2), "b": 1}, path)
    assert read_torch_file(path, "test")["b"] == 1
    torch.save([1], path)
    with pytest.raises(ValueError, match=r"must hold a dictionary, got \[1\]"):
        read_torch_file(path, "test")
    for data in (b"", b"PK\x03\x04", path.read_bytes()[:-50], b"\x80\x02cos\nsystem\n."):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=f"^test: {path} must be a whole file of torch.save"):
            read_torch_file(path, "test")


# --------------------------------------------------------------------------------- safetensors


def test_tensor_files_are_read_as_safetensors_reads_them(tmp_path: Path) -> None:
    values = torch.arange(24).reshape(2, 3, 4)
    floats = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn)
    integers = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
    tensors = {str(dtype): values.to(dtype) for dtype in (*floats, *integers, torch.complex64)}
    tensors |= {"scalar": torch.tensor(3.5), "empty": torch.ones(0, 3), "odd\n name": torch.ones(1)}
    path = tmp_path / "file"
    save_file(tensors, path, {"format": "pt"})
    file = TensorFile(path, "test")
    found, expected = file.read(), load_file(path)
    assert file.metadata == {"format": "pt"} and found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert file.specs[name].is_meta and file.specs[name].dtype == tensor.dtype
        assert found[name].dtype == tensor.dtype
        assert bits(found[name]) == bits(tensor)
    file.close()


def big_file(path: Path) -> int:
    save_file({f"t{i}": torch.ones(2**18) for i in range(8)}, path)
    return path.stat().st_size


def test_reading_takes_the_memory_of_the_tensors(tmp_path: Path) -> None:
    size = big_file(tmp_path / "file")
    tracemalloc.start()
    file = TensorFile(tmp_path / "file", "test")
    assert tracemalloc.get_traced_memory()[1] < 2**16, "the header alone"
    tensors = file.read()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    file.close()
    assert len(tensors) == 8 and size <= peak < size + 2**16


def test_a_file_that_is_truncated_while_it_is_open(tmp_path: Path) -> None:
    """A mapped file would end the process by SIGBUS."""
    path = tmp_path / "file"
    size = big_file(path)
    file = TensorFile(path, "test")
    os.truncate(path, size // 2)
    with pytest.raises(ValueError, match=f"^test: {path} .*truncated while being read"):
        file.read()
    file.close()


def test_a_file_that_is_replaced_while_it_is_open(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "file")
    save_file({"a": torch.zeros(2)}, tmp_path / "new")
    file = TensorFile(tmp_path / "file", "test")
    assert file.is_current()
    (tmp_path / "new").rename(tmp_path / "file")
    assert not file.is_current()
    assert file.read()["a"].tolist() == [1, 1]
    file.close()


def test_bools_of_other_bytes(tmp_path: Path) -> None:
    header = json.dumps({"a": {"dtype": "BOOL", "shape": [3], "data_offsets": [0, 3]}}).encode()
    (tmp_path / "file").write_bytes(struct.pack("<Q", len(header)) + header + b"\0\x02\xff")
    file = TensorFile(tmp_path / "file", "test")
    assert file.read()["a"].view(torch.uint8).tolist() == [0, 1, 1]
    file.close()


# ------------------------------------------------------------------------------------ patterns

ORDINARY = [
    "q_proj",
    "model.layers.0.self_attn.q_proj",
    r"^model\.layers\.0\.mlp\.down_proj",
    r".*layers\.\d+\..*(q|k|v)_proj",
    r".*\.layers\.[0-9]+\..*\.experts\.\d+\..*proj",
    r"model.*(self_attn|mlp).*(q|v)_proj",
    r"(?:.*\.)?layers\.(?:[0-9]|1[0-5])\.mlp",
    r"(?!.*lm_head).*proj",
    r"layers\.(1|2)\.(self_attn\.)?[qkv]_proj",
    # as another library writes target_modules of models that see
    r"(?:.*?(?:vision|image|language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense)"
    r".*?(?:q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj).*?)|(?:\bmodel\.layers\."
    r"[\d]{1,}\.(?:self_attn|attention|mlp)\.(?:(?:q_proj|k_proj|up_proj|down_proj)))",
    # as target_modules of a file of ours where shorter names would select more
    "|".join(rf"model\.layers\.{i}\.self_attn\.q_proj" for i in range(1500)),
]


@pytest.mark.parametrize("pattern", ORDINARY, ids=lambda pattern: pattern[:30])
def test_ordinary_patterns(pattern: str) -> None:
    check_pattern(pattern, "here")


def test_as_many_names_as_a_model_has() -> None:
    check_pattern([rf"^model\.layers\.{i}\.q_proj" for i in range(5000)], "here")


@pytest.mark.parametrize(
    "pattern",
    [
        *("(a+)+", "(a*)*", "(a|aa)+", "(.|x)*y", "((ab)?)*", "(a+){5}", "(?:a{2,9}){3,}x"),
        *(".*" * 6 + "x", ".+?" * 9, "(|)" * 40, "(l|l)(a|a)(y|y)(e|e)" * 6, ".?" * 30),
        *(r"[^.]*" * 8, r"\w*" * 8 + "!", "(?=.*.*.*.*.*.*x)", "(" * 400 + ")" * 400, "a|" * 10**5),
        *("(", "a{99999999999}", "(?P<a>", "[z-a]"),
    ],
)
def test_patterns_that_may_never_end_or_do_not_compile(pattern: str) -> None:
    with pytest.raises(ValueError, match=r"^here") as caught:
        check_pattern(pattern, "here")
    assert len(str(caught.value)) < 300


def test_many_slow_patterns_count_together() -> None:
    slow = [f".*.*.*.*{i}" for i in range(9)]
    check_pattern(slow[:1], "here")
    with pytest.raises(ValueError, match="here: patterns must allow fewer ways"):
        check_pattern(slow, "here")


def test_matching_is_as_in_peft() -> None:
    """Names are looked up, regular expressions tried; the first key that matches applies."""
    draw = random.Random(0)
    words = ["a", "b", "q_proj", "layers", "0", "1", "x-y", "é"]

    def path() -> str:
        return ".".join(draw.choice(words) for _ in range(draw.randint(1, 4)))

    def key() -> str:
        name = path()
        forms = [name, re.escape(name), f"^{name}", f"^{re.escape(name)}", f".*{name}", "^", ""]
        return draw.choice(
            [*forms, f"({name}|b)", name.replace("0", r"\d+"), name.replace("a", ".")]
        )

    for _ in range(5000):
        keys, name = [key() for _ in range(draw.randint(0, 5))], path()
        peft = next((k for k in keys if re.match(rf"(.*\.)?({k})$", name)), None)
        assert matching_pattern(keys, name) == peft, (keys, name)


@pytest.mark.parametrize("option", ["rank_pattern", "alpha_pattern"])
def test_patterns_never_meet_names_of_the_file(option: str, tmp_path: Path) -> None:
    """The file's modules are compared with the model's first: a path of 60 a's is none of them."""
    model = lr.adapt(torch.nn.Sequential(torch.nn.Linear(3, 3)), lr.LoRAConfig(r=2))
    lr.save_adapter(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    patterns = {"(aa|a)(aa|a)(aa|a)(aa|a)x": 2, **{f"b{i}.*c": 2 for i in range(900)}}
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, option: patterns}))
    weights = tmp_path / "adapter_model.safetensors"
    tensors = load_file(weights)
    for i in range(1000):
        tensors[f"base_model.model.{'a' * 60}{i}.lora_A.weight"] = torch.ones(2, 3)
    save_file(tensors, weights)
    plain = torch.nn.Sequential(torch.nn.Linear(3, 3))
    with pytest.raises(ValueError, match=r"must belong to a linear, .* module, .* no such"):
        lr.load_adapter(plain, tmp_path)
