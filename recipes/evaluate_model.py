"""Measure what a base model and its fine-tuned versions can do, and what fine-tuning made them forget.

    tune run evaluate_model --config tiny_evaluate adapters.kasa=/tmp/run
    tune run evaluate_model --config tiny_evaluate adapters=null                        # the base model alone
    tune run evaluate_model --config tiny_evaluate checkpointer.checkpoint_dir=/tmp/merged adapters=null
    tune run evaluate_model --config my_tasks.yaml adapters.kasa=/tmp/run               # the run says which model
    tune run evaluate_model --config my_tasks.yaml checkpoint_dir=/models/Qwen3-8B      # a model alone

The base and every run in ``adapters`` do the same tasks on the same samples. The table that is
printed, and results.json in ``output_dir``, have each number with its bootstrap interval, and each
model's difference to the base with that of paired resamples. ``samples/`` has all answers.
"""

import sys
import time
from functools import partial
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from torchtune import training, utils
from tqdm import tqdm

from kasa_tune import config
from kasa_tune.components.data import build_tokenizer
from kasa_tune.components.evaluation import Bootstrap, LanguageModel, Results, build_tasks
from kasa_tune.components.exchange.evaluated import (
    evaluated_models,
    find_adapters,
    without_adapters,
)
from kasa_tune.components.exchange.run_config import complete_config
from kasa_tune.components.models.agreement import check_base
from kasa_tune.components.models.base_weights import read_base
from kasa_tune.components.models.loading import build_on_meta

log = utils.get_logger("INFO")


class EvaluateModelRecipe:
    """Lets models do tasks, and writes how they did.

    Args:
        cfg: the checked config.
    """

    def __init__(self, cfg: DictConfig) -> None:
        self._device = utils.get_device(cfg.device)
        self._dtype = training.get_dtype(cfg.dtype, device=self._device)
        training.set_seed(cfg.seed)

    def setup(self, cfg: DictConfig) -> None:
        """Check all that can be checked without a weight: tasks and their data, the adapters, the
        model's shapes and length.
        """
        self._tokenizer = build_tokenizer(cfg.tokenizer)
        self._tasks = build_tasks(cfg.tasks)
        self._adapters = find_adapters(cfg.adapters or {})
        build = partial(config.instantiate, cfg.model)
        self._model = without_adapters(build_on_meta(build, dtype=self._dtype))
        check_base(self._model, cfg)
        for task in self._tasks:
            task.check_length(self._model.max_seq_len)
            task.check_prompts(self._tokenizer, self._model.max_seq_len)
        bootstrap = Bootstrap(**cfg.bootstrap, seed=cfg.seed)
        self._results = Results(Path(cfg.output_dir), self._tasks, bootstrap)
        self._base = read_base(cfg.checkpointer)

    def evaluate(self, cfg: DictConfig) -> Results:
        """Let every model do every task. What is done is on the disk after each model."""
        started = time.monotonic()
        folder = str(cfg.checkpointer.get("checkpoint_dir"))
        options = {"device": self._device, "dtype": self._dtype, "folder": folder}
        models = evaluated_models(self._model, self._base, self._adapters, **options)
        self._model = None  # so that the base's memory is free when models of their own are loaded
        for name, model in models:
            asked = LanguageModel(model, self._tokenizer, cfg.batch_size, cfg.seed)
            for task in self._tasks:
                asked.num_cut = 0
                with tqdm(total=task.num_steps, desc=f"{task.name} ({name})") as bar:
                    scores = task.run(asked, bar.update)
                self._results.add(name, task, scores, asked.num_cut)
                if asked.num_cut:
                    log.warning(
                        f"{task.name}: {asked.num_cut} prompts are longer than the model takes, "
                        "and lost their beginning."
                    )
            del asked, model
            self._results.write(
                checkpoint_dir=folder,
                adapters=OmegaConf.to_container(cfg.adapters) if cfg.adapters else {},
                seconds=round(time.monotonic() - started, 1),
            )
        return self._results


@config.parse(config.EVALUATE)
def recipe_main(cfg: DictConfig) -> int:
    """Run the recipe from the command line: ``--config <name or path> [key=value ...]``."""
    cfg = complete_config(cfg)
    recipe = EvaluateModelRecipe(cfg)
    recipe.setup(cfg)
    results = recipe.evaluate(cfg)
    print(results.table())
    print(f"Numbers and answers: {results.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(recipe_main())
