"""Make a training set from a few seeds: a model writes pairs like them, and what is new among these is kept.

    export OPENAI_BASE_URL=http://127.0.0.1:8000/v1 OPENAI_API_KEY=none       # any OpenAI-compatible server
    tune run synthesize_data --config synthesize seeds=seeds.jsonl tests=tests.jsonl num_rows=1000 dry_run=true
    tune run synthesize_data --config synthesize seeds=seeds.jsonl tests=tests.jsonl num_rows=1000

The answers are kept in journal.jsonl in ``output_dir``, so that a run that ended early goes on with the same command
and asks nothing twice. rows.jsonl has the set, in the layout that fine-tuning reads, each row with its provenance.
rejected.jsonl has what was left out and why, counts.json the numbers of the table that is printed.
"""

import json
import signal
import sys
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

from kasa_tune import config
from kasa_tune.components.services import Budget, Journal, Prices, connected, priced, summed_up
from kasa_tune.components.services.templates import Template
from kasa_tune.components.synthesis import Likeness, Synthesizer, read_pairs, write_rows

BUDGET_SPENT = 3  # exit status
_ENDINGS = {
    "complete": "The set is complete.",
    "budget": "The budget is spent. Raise it and run the command again to go on.",
    "exhausted": "The model writes hardly anything new to these seeds: give more of them, raise "
    "endpoint.temperature, or lower num_rows.",
}


class SynthesizeDataRecipe:
    """Turns seeds into a set of rows.

    Args:
        cfg: the checked config.
    """

    def __init__(self, cfg: DictConfig) -> None:
        self._cfg = cfg
        self._folder = Path(cfg.output_dir)
        self._budget = Budget(cfg.budget.max_calls, cfg.budget.max_tokens)
        self._prices = Prices(cfg.budget.prompt_price, cfg.budget.completion_price)

    def setup(self) -> None:
        """Read seeds, tests and the template, and see that duplicates can be found."""
        cfg = self._cfg
        self._synthesizer = Synthesizer(
            read_pairs(cfg.seeds, cfg.num_seeds),
            read_pairs(cfg.tests) if cfg.tests else [],
            Template(cfg.template, ("instruction", "response"), ("count", "topic")),
            Likeness(**cfg.deduplication),
            rows_per_prompt=cfg.rows_per_prompt,
            topic=cfg.topic,
            category=cfg.category,
            generator=cfg.endpoint.model,
            seed=cfg.seed,
        )

    def price(self) -> str:
        """What a run would take, without an answer that cannot be used."""
        prompts = self._synthesizer.prompts(self._cfg.num_rows)
        return priced(prompts, self._cfg.endpoint.max_tokens, self._prices)

    def synthesize(self) -> int:
        """Ask, keep what is new, and write it. Returns the exit status."""
        server = OmegaConf.to_container(self._cfg.endpoint)
        with Journal(self._folder / "journal.jsonl") as journal:
            self._asker = connected(server, journal, self._budget, self._cfg.seed)
            wanted = self._cfg.num_rows
            try:
                with tqdm(total=wanted, desc="rows", dynamic_ncols=True) as bar:
                    ending = self._synthesizer.run(self._asker, wanted, bar.update)
            finally:
                self._write()
        print(self._synthesizer.counts.table())
        print(summed_up(self._asker, self._prices))
        print(f"{_ENDINGS[ending]} Rows: {self._folder / 'rows.jsonl'}")
        return BUDGET_SPENT if ending == "budget" else 0

    def _write(self) -> None:
        made = self._synthesizer
        made.counts.check()
        write_rows(self._folder / "rows.jsonl", made.rows)
        write_rows(self._folder / "rejected.jsonl", made.rejected)
        about = vars(made.counts) | {"parsed": made.counts.parsed, "calls": vars(self._asker.tally)}
        (self._folder / "counts.json").write_text(json.dumps(about, indent=2) + "\n")


@config.parse(config.SYNTHESIZE)
def recipe_main(cfg: DictConfig) -> int:
    """Run the recipe from the command line: ``--config <name or path> [key=value ...]``."""
    recipe = SynthesizeDataRecipe(cfg)
    recipe.setup()
    if cfg.dry_run:
        print(recipe.price())
        return 0
    try:
        return recipe.synthesize()
    except KeyboardInterrupt:
        print(
            "Interrupted. The answers so far are kept: the same command goes on.", file=sys.stderr
        )
        return 128 + signal.SIGINT


if __name__ == "__main__":
    sys.exit(recipe_main())
