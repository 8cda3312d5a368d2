"""Many questions at a time: each answered once, from the journal or by the server, until its answer can be used."""

from __future__ import annotations

import logging
import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from kasa_tune.components.services.budget import Budget, BudgetSpentError, estimated_tokens
from kasa_tune.components.services.endpoint import (
    CallRefusedError,
    Endpoint,
    EndpointError,
    PassingError,
    Reply,
)
from kasa_tune.components.services.journal import Journal, identity_of
from kasa_tune.components.services.pace import Pace, back_off

log = logging.getLogger(__name__)

_SILENT_IN_A_ROW = 5  # calls that stay without an answer, after which a run ends


class MalformedError(Exception):
    """An answer arrived and cannot be used."""


@dataclass(frozen=True)
class Question:
    """What is asked.

    Args:
        prompt: the user's message, with which a conversation of its own begins.
        sample: which of several equal questions it is; each is answered by itself.
    """

    prompt: str
    sample: int = 0


@dataclass
class Outcome:
    """What became of a question.

    Args:
        value: what was read from the answer; None where there is none that can be used.
        malformed: answers that could not be used.
        why: ``answered``, ``malformed`` (every attempt was), ``refused``, ``silent`` or ``not asked``.
    """

    value: Any = None
    malformed: int = 0
    why: str = "not asked"


@dataclass
class Tally:
    """What was done for all questions: answers that arrived now or were in the journal, and failures by kind."""

    arrived: int = 0
    from_journal: int = 0
    failures: Counter[str] = field(default_factory=Counter)


class Asker:
    """Asks a model, in several threads.

    Args:
        endpoint: the server.
        journal: of its answers.
        budget: what they may take. What the journal holds is counted as spent.
        settings: of every request: ``model``, ``max_tokens`` and what else the server takes.
        seed: for the draws of waits, and for those of the server.
        send_seed: send each call a seed of its own, so that a server that draws by seeds answers equal questions
            differently.
        num_workers: calls at a time.
        requests_per_minute: see :class:`Pace`.
        max_retries: repetitions of a call that failed in a way that may pass.
        max_attempts: answers to a question that are asked for until one can be used.

    Attributes:
        tally: counts of calls.
        is_spent: whether the budget ended the work.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        journal: Journal,
        budget: Budget,
        *,
        settings: Mapping[str, Any],
        seed: int = 0,
        send_seed: bool = True,
        num_workers: int = 4,
        requests_per_minute: float | None = None,
        max_retries: int = 6,
        max_attempts: int = 10,
    ) -> None:
        self._endpoint, self._journal, self.budget = endpoint, journal, budget
        self._settings, self._seed, self._send_seed = dict(settings), seed, send_seed
        self._num_workers, self._pace = num_workers, Pace(requests_per_minute)
        self._max_retries, self._max_attempts = max_retries, max_attempts
        self.tally, self.is_spent = Tally(), False
        self._silent = 0
        self._lock, self._stop = threading.Lock(), threading.Event()
        self._counted: set[str] = set()
        for reply in journal.replies.values():
            budget.count(reply.prompt_tokens or 0, reply.completion_tokens or 0)

    def ask(
        self, questions: Sequence[Question], read: Callable[[str], Any]
    ) -> Iterator[tuple[int, Outcome]]:
        """Answer all questions, and give their numbers and outcomes in the order of the questions.

        After an error or an interrupt no further call starts. Those under way are waited for and kept.

        Args:
            questions: to answer.
            read: makes a value of an answer's text.

        Raises:
            EndpointError: the server cannot be asked.
        """
        pool = ThreadPoolExecutor(self._num_workers)
        try:
            yield from enumerate(pool.map(lambda each: self._answer(each, read), questions))
        except BaseException:
            self._stop.set()
            raise
        finally:
            pool.shutdown(cancel_futures=True)

    def _answer(self, question: Question, read: Callable[[str], Any]) -> Outcome:
        outcome = Outcome()
        for attempt in range(self._max_attempts):
            try:
                reply = self._reply(question, attempt)
            except BudgetSpentError:
                self.is_spent = True
                reply = None
            except EndpointError:
                self._stop.set()
                raise
            except (CallRefusedError, PassingError) as error:
                outcome.why = "silent" if isinstance(error, PassingError) else "refused"
                log.warning(f"A question stays without an answer: {error}")
                return outcome
            if reply is None:
                outcome.why = "not asked"
                return outcome
            try:
                outcome.value, outcome.why = read(reply.text), "answered"
                return outcome
            except MalformedError:
                outcome.malformed, outcome.why = outcome.malformed + 1, "malformed"
        return outcome

    def _reply(self, question: Question, attempt: int) -> Reply | None:
        """The answer of one attempt, from the journal if it is there; None once the work has stopped."""
        body = self._body(question, attempt)
        identity = identity_of(body, question.sample, attempt)
        if (known := self._journal.replies.get(identity)) is not None:
            with self._lock:
                self.tally.from_journal += identity not in self._counted
                self._counted.add(identity)
            return known
        if self._stop.is_set() or self.is_spent:
            return None
        prompt_tokens = estimated_tokens(question.prompt)
        reserved = prompt_tokens + self._settings["max_tokens"]
        self.budget.reserve(reserved)
        taken = None
        try:
            reply = self._with_retries(body, identity)
            if reply is None:
                return None
            counted = (
                reply.prompt_tokens or prompt_tokens,
                reply.completion_tokens or estimated_tokens(reply.text),
            )
            reply = Reply(reply.text, reply.finish_reason, *counted)
            self._journal.add(identity, reply)
            taken = counted
        finally:
            self.budget.settle(reserved, taken)
        with self._lock:
            self.tally.arrived += 1
            self._counted.add(identity)
            self._silent = 0
        return reply

    def _body(self, question: Question, attempt: int) -> dict[str, Any]:
        body = self._settings | {"messages": [{"role": "user", "content": question.prompt}]}
        if self._send_seed:
            text = f"{self._seed} {question.prompt} {question.sample} {attempt}"
            body["seed"] = random.Random(text).randrange(2**31)
        return body

    def _with_retries(self, body: Mapping[str, Any], identity: str) -> Reply | None:
        """An answer of the server; None once the work has stopped.

        Raises:
            PassingError: every try failed.
            CallRefusedError: the server refuses this call.
            EndpointError: it refuses all, or has left several calls in a row without an answer.
        """
        rng = random.Random(f"{self._seed} {identity}")
        for failures in range(self._max_retries + 1):
            if self._stop.wait(self._pace.turn()):
                return None
            try:
                return self._endpoint.complete(body, identity)
            except PassingError as error:
                with self._lock:
                    self.tally.failures[error.reason] += 1
                last = error
            if failures < self._max_retries:
                wait = back_off(failures, rng)
                if last.wait is not None:
                    self._pace.hold(last.wait)
                    wait = last.wait
                if self._stop.wait(wait):
                    return None
        with self._lock:
            self._silent += 1
            if self._silent >= _SILENT_IN_A_ROW:
                raise EndpointError(
                    f"{self._endpoint.base_url} left {self._silent} calls in a row without an answer, the last for: "
                    f"{last.reason}. What was answered is kept; run the command again to go on."
                )
        raise last
