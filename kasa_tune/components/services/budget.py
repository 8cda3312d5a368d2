"""What calls may cost: bounds on their number and on tokens, and prices."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass

_BYTES_PER_TOKEN = 4  # of English text, roughly


def estimated_tokens(text: str) -> int:
    """About how many tokens a text has: a quarter of its bytes. It is within a third for English prose."""
    return -(-len(text.encode("utf-8", "replace")) // _BYTES_PER_TOKEN)


@dataclass(frozen=True)
class Prices:
    """Prices of a million tokens, in a currency of your choice.

    Args:
        prompt: of what is asked.
        completion: of what is answered.
    """

    prompt: float = 0.0
    completion: float = 0.0

    def of(self, prompt_tokens: int, completion_tokens: int) -> float:
        """The price of so many tokens."""
        return (self.prompt * prompt_tokens + self.completion * completion_tokens) / 1e6


def priced(prompts: Iterable[str], max_tokens: int, prices: Prices) -> str:
    """What calls would take, in a sentence, before any is made.

    Args:
        prompts: of all calls.
        max_tokens: the most tokens of an answer.
        prices: of tokens.
    """
    sizes = [estimated_tokens(prompt) for prompt in prompts]
    asked, answered = sum(sizes), max_tokens * len(sizes)
    return (
        f"{len(sizes):,} calls with about {asked:,} tokens of prompts (a quarter of their bytes) and at most "
        f"{answered:,} tokens of answers: {prices.of(asked, 0):.2f} to {prices.of(asked, answered):.2f} at "
        f"{prices.prompt:g} and {prices.completion:g} a million tokens. Answers that must be asked for "
        "again come on top."
    )


class BudgetSpentError(Exception):
    """No further call is allowed."""


class Budget:
    """Bounds on calls and tokens. A call reserves what it may take before it is made.

    Tokens are exceeded only where a server counts more tokens of a prompt than were estimated.

    Args:
        max_calls: the most answers, earlier runs with the same journal included; None: no bound.
        max_tokens: the most tokens of prompts and answers together.
    """

    def __init__(self, max_calls: int | None = None, max_tokens: int | None = None) -> None:
        self.max_calls, self.max_tokens = max_calls, max_tokens
        self.calls = self.prompt_tokens = self.completion_tokens = 0
        self._reserved_calls = self._reserved_tokens = 0
        self._changed = threading.Condition()

    def reserve(self, tokens: int) -> None:
        """Set a call of at most so many tokens aside, once it is clear that there is room for it.

        Raises:
            BudgetSpentError: there is not.
        """
        with self._changed:
            while not self._has_room(tokens):
                if (
                    not self._reserved_calls
                ):  # nothing is under way that could leave some of its share
                    raise BudgetSpentError
                self._changed.wait()
            self._reserved_calls += 1
            self._reserved_tokens += tokens

    def settle(self, reserved: int, taken: tuple[int, int] | None) -> None:
        """End a reservation.

        Args:
            reserved: its tokens.
            taken: tokens of prompt and answer; None for a call without an answer, which is not counted.
        """
        with self._changed:
            self._reserved_calls -= 1
            self._reserved_tokens -= reserved
            if taken is not None:
                self.count(*taken)
            self._changed.notify_all()

    def count(self, prompt_tokens: int, completion_tokens: int) -> None:
        """Count an answer."""
        self.calls += 1
        self.prompt_tokens += prompt_tokens
        self.completion_tokens += completion_tokens

    def _has_room(self, tokens: int) -> bool:
        used = self.prompt_tokens + self.completion_tokens + self._reserved_tokens
        calls = self.calls + self._reserved_calls
        return (self.max_calls is None or calls < self.max_calls) and (
            self.max_tokens is None or used + tokens <= self.max_tokens
        )
