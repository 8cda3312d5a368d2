"""The road from seeds to a set: draw a seed, ask for pairs like it, keep what is new, until there are enough."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from kasa_tune.components.services import Asker, Outcome, Question
from kasa_tune.components.services.templates import Template
from kasa_tune.components.synthesis.duplicates import Likeness, Similar
from kasa_tune.components.synthesis.pairs import Pair
from kasa_tune.components.synthesis.parsing import LONGEST_TEXT, ParsedReply, parse_reply
from kasa_tune.components.synthesis.rows import Counts

_BARREN = 200  # rows asked for since the last new one, after which the seeds are exhausted
_LARGEST_ROUND = 5_000  # questions


class Synthesizer:
    """Rows from seeds. They depend on seeds, settings and answers alone, not on the order in which answers arrive.

    Args:
        seeds: pairs to write similar ones to.
        tests: pairs that no row may be similar to.
        template: with the places ``$instruction``, ``$response``, and where wanted ``$count`` and ``$topic``.
        likeness: when two rows count as one.
        rows_per_prompt: pairs that a question asks for.
        topic: fills ``$topic``.
        category: what the rows say of themselves.
        generator: name of the model that is asked, for the rows.
        seed: of the draws.

    Attributes:
        rows: kept so far, each with its provenance.
        rejected: rows that were not kept, and why.
        counts: of both.
    """

    def __init__(
        self,
        seeds: Sequence[Pair],
        tests: Sequence[Pair],
        template: Template,
        likeness: Likeness,
        *,
        rows_per_prompt: int,
        topic: str,
        category: str,
        generator: str,
        seed: int,
    ) -> None:
        self._seeds, self._template, self._per_prompt = seeds, template, rows_per_prompt
        self._topic, self._category, self._generator = topic, category, generator
        self._rng = random.Random(f"seeds {seed}")
        self._asked_before: Counter[str] = Counter()
        self._kept, self._tests = Similar(likeness), Similar(likeness)
        for number, pair in enumerate(tests):
            self._tests.add(pair, f"test row {number}")
        self.rows: list[dict[str, Any]] = []
        self.rejected: list[dict[str, Any]] = []
        self.counts = Counts()
        self._asked_at_last_row = 0

    def draw(self, count: int) -> list[tuple[int, Question]]:
        """Draw seeds with replacement, and make a question of each.

        Equal questions are told apart by their sample numbers.
        """
        drawn = []
        for _ in range(count):
            number = self._rng.randrange(len(self._seeds))
            pair = self._seeds[number]
            places = {"count": self._per_prompt, "topic": self._topic, **pair._asdict()}
            prompt = self._template.filled(**places)
            drawn.append((number, Question(prompt, self._asked_before[prompt])))
            self._asked_before[prompt] += 1
        return drawn

    def run(
        self, asker: Asker, num_rows: int, progress: Callable[[int], object] = lambda _: None
    ) -> str:
        """Ask in rounds until there are enough rows.

        A round asks for as many rows as are missing, at the share that was kept so far.

        Args:
            asker: asks the model.
            num_rows: rows wanted.
            progress: called with the number of new rows.

        Returns:
            Why it ended: ``complete``, ``budget``, or ``exhausted``, when 200 rows in a row brought nothing new.

        Raises:
            EndpointError: the server cannot be asked.
        """
        while len(self.rows) < num_rows:
            drawn = self.draw(self._round(num_rows))
            answers = asker.ask([question for _, question in drawn], self._parse)
            for (number, question), (_, outcome) in zip(drawn, answers, strict=True):
                kept = len(self.rows)
                self._take(number, question, outcome, num_rows)
                progress(len(self.rows) - kept)
            if len(self.rows) >= num_rows:
                break
            if asker.is_spent:
                return "budget"
            if self.counts.asked - self._asked_at_last_row >= _BARREN:
                return "exhausted"
        return "complete"

    def _round(self, num_rows: int) -> int:
        share = max(len(self.rows) / self.counts.asked, 0.1) if self.counts.asked else 1.0
        questions = math.ceil((num_rows - len(self.rows)) / (self._per_prompt * share))
        return min(questions, _LARGEST_ROUND)

    def _parse(self, text: str) -> ParsedReply:
        return parse_reply(text, most=self._per_prompt, longest=LONGEST_TEXT)

    def _take(self, number: int, question: Question, outcome: Outcome, num_rows: int) -> None:
        counts = self.counts
        counts.prompts[outcome.why] += 1
        counts.malformed += outcome.malformed
        counts.asked += self._per_prompt
        if outcome.value is None:
            counts.unanswered += self._per_prompt
            return
        parsed: ParsedReply = outcome.value
        counts.bad += parsed.num_bad
        counts.missing += self._per_prompt - parsed.num_bad - len(parsed.pairs)
        for place, pair in enumerate(parsed.pairs):
            self._place(pair, f"{number}.{question.sample}.{place}", number, num_rows)

    def _place(self, pair: Pair, name: str, number: int, num_rows: int) -> None:
        """Keep a row, or say why not."""
        for reason, rows, counter in (
            ("contaminated", self._tests, self.counts.contaminated),
            ("duplicate", self._kept, self.counts.duplicates),
        ):
            if found := rows.find(pair):
                counter[found[0]] += 1
                told = {"id": name, "reason": reason, "by": found[0], "of": found[1]}
                self.rejected.append(told | pair._asdict())
                return
        if len(self.rows) >= num_rows:
            self.counts.over += 1
            return
        self._kept.add(pair, name)
        self.counts.kept += 1
        self._asked_at_last_row = self.counts.asked
        self.rows.append(self._row(pair, name, number))

    def _row(self, pair: Pair, name: str, number: int) -> dict[str, Any]:
        return {
            "messages": [
                {"role": "user", "content": pair.instruction},
                {"role": "assistant", "content": pair.response},
            ],
            "category": self._category,
            "generator": self._generator,
            "prompt_id": name,
            "seed_row": number,
            "template": self._template.digest,
        }

    def prompts(self, num_rows: int) -> Iterator[str]:
        """The prompts of the first round, for a price; it draws from the same seeds as a run would."""
        yield from (
            question.prompt for _, question in self.draw(math.ceil(num_rows / self._per_prompt))
        )
