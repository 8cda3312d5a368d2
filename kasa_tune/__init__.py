"""Knowledge-aware low-rank fine-tuning of large language models, as torchtune recipes."""

from kasa_tune import torchao_bridge

__version__ = "0.1.0"

torchao_bridge.install()
