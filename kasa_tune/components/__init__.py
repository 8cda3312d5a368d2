"""The parts recipes are made of. They take tensors, modules and plain values; they never read YAML and never print."""

from kasa_tune import torchao_bridge

torchao_bridge.quiet()
