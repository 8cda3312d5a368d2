"""Text generation with a trained model, and tasks that measure what it can do and what it forgot."""

from kasa_tune.components.evaluation.bootstrap import Bootstrap, Metric
from kasa_tune.components.evaluation.building import build_tasks
from kasa_tune.components.evaluation.cached import remove_caches
from kasa_tune.components.evaluation.choices import MultipleChoice
from kasa_tune.components.evaluation.code_problems import CodeProblems
from kasa_tune.components.evaluation.commonsense import CommonsenseAnswers, CommonsenseChoices
from kasa_tune.components.evaluation.data_to_text import DataToText
from kasa_tune.components.evaluation.decoding import Decoding
from kasa_tune.components.evaluation.generation import complete, generate
from kasa_tune.components.evaluation.language_model import LanguageModel, Prompt
from kasa_tune.components.evaluation.mathematics import MathProblems
from kasa_tune.components.evaluation.mt_bench import MTBenchAnswers
from kasa_tune.components.evaluation.perplexity import Perplexity
from kasa_tune.components.evaluation.question_answering import QuestionAnswering
from kasa_tune.components.evaluation.results import Results
from kasa_tune.components.evaluation.tasks import CompletionTask, Sample, Scores, Task
from kasa_tune.components.evaluation.visual_questions import VisualChoices, VisualQuestions

__all__ = [
    "Bootstrap",
    "CodeProblems",
    "CommonsenseAnswers",
    "CommonsenseChoices",
    "CompletionTask",
    "DataToText",
    "Decoding",
    "LanguageModel",
    "MTBenchAnswers",
    "MathProblems",
    "Metric",
    "MultipleChoice",
    "Perplexity",
    "Prompt",
    "QuestionAnswering",
    "Results",
    "Sample",
    "Scores",
    "Task",
    "VisualChoices",
    "VisualQuestions",
    "build_tasks",
    "complete",
    "generate",
    "remove_caches",
]
