"""Knowledge-aware low-rank fine-tuning of large language models, as torchtune recipes."""

__version__ = "0.1.0"
