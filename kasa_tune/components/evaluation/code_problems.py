"""Programs that a model writes, run against tests: HumanEval and MBPP with pass@k."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from math import prod
from typing import Any, Literal

from kasa_tune.components.evaluation.bootstrap import mean
from kasa_tune.components.evaluation.language_model import LanguageModel, Progress, Prompt
from kasa_tune.components.evaluation.rows import Row, RowError, filled, text_of
from kasa_tune.components.evaluation.sandbox import (
    Limits,
    Outcome,
    has_network_namespaces,
    run_program,
)
from kasa_tune.components.evaluation.tasks import CompletionTask, Sample, Scores

_PROMPTS = {
    "humaneval": "{prompt}",
    "mbpp": '"""\n{text}\n{tests}\n"""\n',
}
# Where a completed function is over: the next thing at the margin.
_STOPS = {
    "humaneval": ["\nclass ", "\ndef ", "\n#", "\nif ", "\nprint(", "\n@", "\nassert ", "\n```"],
    "mbpp": ["\nclass ", "\nassert ", '\n"""', "\nprint(", "\nif ", "\n<|", "\n```"],
}
_FENCE = re.compile(r"```(?:python)?[ \t]*\n(.*?)(?:\n```|$)", re.DOTALL)


class CodeProblems(CompletionTask):
    """pass@k of programs: the chance that one of k samples passes all tests (Chen 2021, equation 1).

    Programs are run here, see :mod:`~kasa_tune.components.evaluation.sandbox`. So this is refused unless
    ``allow_code_execution`` says that it may be done.

    Args:
        name: of the task.
        data_file: rows of HumanEval (``prompt``, ``test``, ``entry_point``) or MBPP (``text``, ``test_list``).
        problems: which of the two they are.
        allow_code_execution: run what the model writes.
        ks: of pass@k; none above ``num_samples``.
        num_samples: programs for each problem; above 1 they must be sampled (``decoding.temperature``).
        seconds, memory_mib: limits of each program.
        num_processes: programs that run at a time.
        prompt, chat, max_new_tokens, stop, decoding, limit, measures: see :class:`CompletionTask`. None stands for the
            set's own prompt and stop texts; with ``chat`` the first block of code in the answer is taken.

    Raises:
        ValueError: execution is not allowed, or ``ks`` and ``num_samples`` do not go together.
    """

    def __init__(
        self,
        *,
        name: str,
        data_file: str,
        problems: Literal["humaneval", "mbpp"] = "humaneval",
        allow_code_execution: bool = False,
        ks: list[int] = [1],  # noqa: B006 (nobody changes it)
        num_samples: int = 1,
        seconds: float = 5.0,
        memory_mib: int = 1024,
        num_processes: int = 2,
        prompt: str | None = None,
        chat: bool = False,
        max_new_tokens: int = 512,
        stop: list[str] | None = None,
        decoding: Mapping[str, Any] | None = None,
        limit: int | None = None,
        measures: Literal["learned", "kept"] | None = None,
    ) -> None:
        if problems not in _PROMPTS:
            raise ValueError(f"Task {name}: problems must be humaneval or mbpp; got {problems!r}.")
        if allow_code_execution is not True:
            raise ValueError(
                f"Task {name} runs programs that the model writes. They could do harm: set "
                "allow_code_execution: True for this task if they may be run on this machine."
            )
        if not ks or min(ks) < 1 or max(ks) > num_samples:
            raise ValueError(
                f"Task {name}: ks {list(ks)} must lie between 1 and num_samples {num_samples}."
            )
        if min(seconds, memory_mib, num_processes) <= 0:
            raise ValueError(f"Task {name}: seconds, memory_mib and num_processes must be above 0.")
        self.problems, self.ks, self.num_samples = problems, list(ks), num_samples
        self.limits, self.num_processes = Limits(seconds, memory_mib), num_processes
        if stop is None:
            stop = [] if chat else _STOPS[problems]
        super().__init__(
            name,
            data_file,
            limit,
            measures,
            prompt=_PROMPTS[problems] if prompt is None else prompt,
            chat=chat,
            max_new_tokens=max_new_tokens,
            stop=stop,
            decoding=decoding,
        )
        if num_samples > 1 and not self.decoding.is_sampling:
            raise ValueError(
                f"Task {name}: {num_samples} samples of a problem would be equal: set decoding.temperature above 0."
            )

    def sample(self, row: Row) -> Sample:
        if self.problems == "humaneval":
            tests = f"{text_of(row, 'test')}\ncheck({text_of(row, 'entry_point')})\n"
            return Sample(self.prompt_of(row), {"before": text_of(row, "prompt"), "tests": tests})
        listed = row.get("test_list")
        if (
            not isinstance(listed, list)
            or not listed
            or not all(isinstance(t, str) for t in listed)
        ):
            raise RowError("'test_list' must hold a list of assert statements.")
        tests = "\n".join(listed)
        setup = str(row.get("test_setup_code") or "")
        shown = {**row, "tests": tests} | ({} if "text" in row else {"text": row.get("prompt")})
        prompt = Prompt(filled(self.template, shown), self.chat)
        return Sample(prompt, {"before": "", "tests": f"{setup}\n{tests}\n"})

    def run(self, model: LanguageModel, progress: Progress | None = None) -> Scores:
        prompts = [sample.prompt for sample in self.samples for _ in range(self.num_samples)]
        answers = model.complete(prompts, self.decoding, stop=self.stop, progress=progress)
        owners = [sample for sample in self.samples for _ in range(self.num_samples)]
        programs = [self._program(each, text) for each, text in zip(owners, answers, strict=True)]
        outcomes = self._run_all(programs)
        records, counts = [], []
        for i, sample in enumerate(self.samples):
            span = slice(i * self.num_samples, (i + 1) * self.num_samples)
            ended: Sequence[Outcome] = outcomes[span]
            counts.append(sum(outcome.passed for outcome in ended))
            records.append(
                {
                    "prompt": sample.prompt.text,
                    "answers": answers[span],
                    "results": [outcome.result for outcome in ended],
                    "errors": [outcome.error for outcome in ended],
                    "num_passed": counts[-1],
                }
            )
        metrics = {
            f"pass@{k}": mean([pass_at_k(self.num_samples, passed, k) for passed in counts])
            for k in self.ks
        }
        by = "namespace and audit hook" if has_network_namespaces() else "audit hook"
        return Scores(records, metrics, {"network_cut_off_by": by})

    @property
    def num_steps(self) -> int:
        """The number of programs."""
        return len(self.samples) * self.num_samples

    def _program(self, sample: Sample, answer: str) -> str:
        fenced = _FENCE.search(answer)
        code = fenced[1] if fenced else answer
        # A chat model writes the whole function, a completion goes on from the prompt.
        before = "" if self.chat and "def " in code else sample.references["before"]
        return f"{before}{code}\n{sample.references['tests']}"

    def _run_all(self, programs: Sequence[str]) -> list[Outcome]:
        with ThreadPoolExecutor(self.num_processes) as pool:
            return list(pool.map(lambda program: run_program(program, self.limits), programs))


def pass_at_k(num_samples: int, num_passed: int, k: int) -> float:
    """The unbiased estimate ``1 - C(n - c, k) / C(n, k)`` for n samples of which c passed."""
    if num_samples - num_passed < k:
        return 1.0
    failed = range(num_samples - num_passed + 1, num_samples + 1)
    return 1.0 - prod(1.0 - k / i for i in failed)
