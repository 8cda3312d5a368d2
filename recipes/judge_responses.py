"""Let a model judge the answers that evaluate_model wrote.

    export OPENAI_BASE_URL=http://127.0.0.1:8000/v1 OPENAI_API_KEY=none       # any OpenAI-compatible server
    tune run judge_responses --config judge 'evaluations=[/tmp/done]' 'tasks=[texts]' dry_run=true
    tune run judge_responses --config judge 'evaluations=[/tmp/done]' 'tasks=[texts]'
    tune run judge_responses --config judge 'evaluations=[/tmp/done]' 'tasks=[mt]' protocol=mt_bench questions=q.jsonl

The verdicts are kept in journal.jsonl in ``output_dir``, so that a run that ended early goes on with the same command
and pays for none twice. verdicts.jsonl has each of them, scores.json the numbers of the table that is printed.
"""

import json
import signal
import sys
from collections import Counter
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

from kasa_tune import config
from kasa_tune.components.judging import (
    Item,
    MTBench,
    Pairwise,
    Protocol,
    Scores,
    Single,
    Verdict,
    read_answers,
    read_turns,
)
from kasa_tune.components.services import (
    Budget,
    Journal,
    Prices,
    Question,
    connected,
    priced,
    summed_up,
)
from kasa_tune.components.synthesis import write_rows

BUDGET_SPENT = 3  # exit status


def build_protocol(cfg: DictConfig) -> Protocol:
    """Read the answers, and make what the judge is shown of them.

    Raises:
        FileNotFoundError: an evaluation, a task or a template is missing.
        ValueError: a row cannot be judged so.
    """
    templates = Path(cfg.templates)
    folders, models, limit = list(cfg.evaluations), cfg.models and list(cfg.models), cfg.limit
    if cfg.protocol == "mt_bench":
        if cfg.questions is None:
            raise ValueError(
                "protocol=mt_bench needs questions, the path of FastChat's question.jsonl."
            )
        files = (cfg.questions, cfg.references)
        answers = [
            answer
            for task in cfg.tasks
            for answer in read_turns(folders, task, *files, models, limit)
        ]
        return MTBench(answers, templates)
    answers = [
        answer for task in cfg.tasks for answer in read_answers(folders, task, models, limit)
    ]
    if cfg.protocol == "pairwise":
        return Pairwise(answers, templates)
    return Single(answers, templates, cfg.scale)


class JudgeResponsesRecipe:
    """Has answers judged.

    Args:
        cfg: the checked config.
    """

    def __init__(self, cfg: DictConfig) -> None:
        self._cfg = cfg
        self._folder = Path(cfg.output_dir)
        self._budget = Budget(cfg.budget.max_calls, cfg.budget.max_tokens)
        self._prices = Prices(cfg.budget.prompt_price, cfg.budget.completion_price)

    def setup(self) -> None:
        """Read the answers and the templates."""
        self._protocol = build_protocol(self._cfg)
        self._items: list[tuple[Item, int]] = [
            (item, repeat) for repeat in range(self._cfg.repeats) for item in self._protocol.items
        ]

    def price(self) -> str:
        """What a run would take, without verdicts that cannot be read."""
        prompts = (item.prompt for item, _ in self._items)
        return priced(prompts, self._cfg.endpoint.max_tokens, self._prices)

    def judge(self) -> int:
        """Ask, and write what was said. Returns the exit status."""
        times: Counter[str] = Counter()  # equal answers to a prompt are judged one by one
        questions = []
        for item, _ in self._items:
            questions.append(Question(item.prompt, times[item.prompt]))
            times[item.prompt] += 1
        server = OmegaConf.to_container(self._cfg.endpoint)
        verdicts = []
        with Journal(self._folder / "journal.jsonl") as journal:
            asker = connected(server, journal, self._budget, self._cfg.seed)
            outcomes = asker.ask(questions, self._protocol.read)
            for number, outcome in tqdm(outcomes, "verdicts", len(questions), dynamic_ncols=True):
                item, repeat = self._items[number]
                about = (outcome.value, outcome.why, outcome.malformed)
                verdicts.append(Verdict(item, repeat, *about))
        scores = Scores(verdicts)
        write_rows(self._folder / "verdicts.jsonl", (each.record() for each in verdicts))
        (self._folder / "scores.json").write_text(json.dumps(scores.summary(), indent=2) + "\n")
        print(scores.table())
        print(summed_up(asker, self._prices))
        print(f"Verdicts: {self._folder / 'verdicts.jsonl'}")
        if asker.is_spent:
            print("The budget is spent. Raise it and run the command again to go on.")
        return BUDGET_SPENT if asker.is_spent else 0


@config.parse(config.JUDGE)
def recipe_main(cfg: DictConfig) -> int:
    """Run the recipe from the command line: ``--config <name or path> [key=value ...]``."""
    recipe = JudgeResponsesRecipe(cfg)
    recipe.setup()
    if cfg.dry_run:
        print(recipe.price())
        return 0
    try:
        return recipe.judge()
    except KeyboardInterrupt:
        print(
            "Interrupted. The answers so far are kept: the same command goes on.", file=sys.stderr
        )
        return 128 + signal.SIGINT


if __name__ == "__main__":
    sys.exit(recipe_main())
