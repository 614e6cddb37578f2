"""`lowrank-ext recursive generate`: texts by the engine, streamed."""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import lowrank_ext as lr
from lowrank_ext.cli.checks import check_at_least, check_choice
from lowrank_ext.cli.errors import Interrupted, UserError, as_user_error
from lowrank_ext.cli.interrupts import EXIT_INTERRUPTED
from lowrank_ext.cli.machine import check_machine
from lowrank_ext.cli.models import LoadedModel
from lowrank_ext.cli.recursive.models import load_recursive, num_loops, parse_rule
from lowrank_ext.cli.sampling import read_prompts
from lowrank_ext.methods.recursive.engine.engine import POLICIES
from lowrank_ext.methods.recursive.exits import SKIPPED


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options of the command."""

    directory: Path
    prompt: list[str] | None
    file: Path | None
    max_new_tokens: int
    policy: str
    exit: str | None
    skipped: str
    draft_tokens: int
    temperature: float
    top_p: float
    seed: int
    max_rows: int
    dtype: str
    threads: int | None
    json: bool

    def check(self) -> None:
        """Raises UserError naming the option, what it must be, and what it was."""
        if bool(self.prompt) == (self.file is not None):
            raise UserError("give --prompt, which may be repeated, or --file")
        check_at_least("--max-new-tokens", self.max_new_tokens, 1)
        check_at_least("--draft-tokens", self.draft_tokens, 0)
        check_at_least("--max-rows", self.max_rows, 1)
        check_at_least("--seed", self.seed, 0, most=2**40)
        check_choice("--policy", self.policy, POLICIES)
        check_choice("--skipped", self.skipped, SKIPPED)
        if self.exit is not None:
            parse_rule(self.exit)
            if self.policy != "depth-wise" or self.draft_tokens:
                raise UserError("--exit needs --policy depth-wise and no --draft-tokens")
        if self.draft_tokens and (self.policy != "depth-wise" or self.temperature != 0):
            raise UserError("--draft-tokens needs --policy depth-wise and --temperature 0")
        with as_user_error("--temperature or --top-p", ValueError, TypeError):
            self.sampling(0)
        check_machine(self.dtype, self.threads)

    def sampling(self, number: int) -> Any:
        """How the text of a prompt is chosen; each prompt has a seed of its own."""
        return lr.recursive.Sampling(
            temperature=self.temperature,
            top_p=self.top_p,
            seed=None if self.temperature == 0 else self.seed + number,
        )


def encoded(loaded: LoadedModel, prompts: list[str], new_tokens: int) -> tuple[list[Any], int]:
    """Token ids of each prompt, and the length of the longest sequence. Raises UserError for one
    that has no room in the model's context."""
    context = getattr(loaded.model.config, "max_position_embeddings", None) or sys.maxsize
    if new_tokens > context:
        raise UserError(
            f"--max-new-tokens must be at most the model's context of {context}, got {new_tokens}"
        )
    ids = [loaded.tokenizer(prompt, verbose=False)["input_ids"] for prompt in prompts]
    for number, own in enumerate(ids, start=1):
        if not own:
            raise UserError(f"prompt {number} has no tokens")
        if len(own) + new_tokens > context:
            raise UserError(
                f"prompt {number} must have at most {context - new_tokens} tokens, which leaves "
                f"room for {new_tokens} new ones in the model's context, got {len(own)}"
            )
    return ids, max(map(len, ids)) + new_tokens


def run(options: Options) -> None:
    """Prints each prompt with its text, in the order of the prompts, as soon as tokens are
    there."""
    options.check()
    prompts = options.prompt or read_prompts(options.file or Path())
    loaded = load_recursive(options.directory, options.dtype)
    rule = None if options.exit is None else parse_rule(options.exit, num_loops(loaded.model))
    ids, longest = encoded(loaded, prompts, options.max_new_tokens)
    with as_user_error("cannot generate", ValueError, TypeError):
        engine = lr.recursive.DepthwiseEngine(
            loaded.model,
            max_rows=min(options.max_rows, len(ids)),
            policy=options.policy,
            exit_rule=rule,
            skipped=options.skipped,
            draft_tokens=options.draft_tokens,
            max_length=longest,
        )
        for number, own in enumerate(ids):
            engine.add(
                own,
                id=number,
                max_new_tokens=options.max_new_tokens,
                sampling=options.sampling(number),
            )
    show: Any = _Records(prompts, loaded.tokenizer) if options.json else _Texts(prompts, loaded)
    try:
        for token in engine.stream():
            show.add(token, engine)
    except KeyboardInterrupt:
        raise Interrupted("stopped; texts that were finished are above", EXIT_INTERRUPTED) from None
    failed = [f"{i + 1}" for i in range(len(ids)) if engine.result(i).finish_reason == "error"]
    if failed:
        raise UserError(f"no whole text for prompt {', '.join(failed)}: see error in its record")


class _Texts:
    """Texts in the order of the prompts; the first that is not finished grows as it is made."""

    def __init__(self, prompts: list[str], loaded: LoadedModel) -> None:
        self._prompts = prompts
        self._waiting = [""] * len(prompts)
        self._ended: set[int] = set()
        self._first = 0
        self._streamers = [
            _streamer(loaded.tokenizer, self._adder(number)) for number in range(len(prompts))
        ]
        self._begin()

    def _adder(self, number: int) -> Callable[[str], None]:
        def add(text: str) -> None:
            self._waiting[number] += text

        return add

    def add(self, token: Any, engine: Any) -> None:
        """Show what the token makes known."""
        number, result = token.request, engine.result(token.request)
        if result.finish_reason == "error":
            raise UserError(f"prompt {number + 1}: {result.error}")
        if token.token is not None:
            self._streamers[number].put(torch.tensor([token.token]))
        if token.finish_reason is not None:
            self._streamers[number].end()
            self._ended.add(number)
        self._flush()

    def _begin(self) -> None:
        sys.stdout.write(self._prompts[self._first])

    def _flush(self) -> None:
        while self._first < len(self._prompts):
            sys.stdout.write(self._waiting[self._first])
            self._waiting[self._first] = ""
            if self._first not in self._ended:
                break
            sys.stdout.write("\n")
            self._first += 1
            if self._first < len(self._prompts):
                sys.stdout.write("\n")
                self._begin()
        sys.stdout.flush()


def _streamer(tokenizer: Any, add: Callable[[str], None]) -> Any:
    """transformers' own, which knows where a character or a word is complete."""
    from transformers import TextStreamer

    class Streamer(TextStreamer):  # type: ignore[misc]  # untyped base
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            add(text)

    return Streamer(tokenizer, skip_special_tokens=True)


class _Records:
    """A line of JSON for each text, in the order in which they end."""

    def __init__(self, prompts: list[str], tokenizer: Any) -> None:
        self._prompts, self._tokenizer = prompts, tokenizer

    def add(self, token: Any, engine: Any) -> None:
        """Print the text if it has ended."""
        if token.finish_reason is None:
            return
        result = engine.result(token.request)
        record = {
            "prompt": self._prompts[token.request],
            "text": self._tokenizer.decode(result.tokens, skip_special_tokens=True),
            "number": token.request,
            "tokens": result.tokens,
            "exit_loops": result.exit_loops,
            "finish_reason": result.finish_reason,
            "error": result.error,
            "seconds_to_first_token": result.seconds_to_first_token,
            "seconds": result.seconds,
        }
        print(json.dumps(record), flush=True)
