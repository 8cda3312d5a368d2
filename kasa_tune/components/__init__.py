"""The parts recipes are made of. They take tensors, modules and plain values; they never read YAML and never print."""

import logging

# torchao 0.15 announces on import that its C++ extensions are skipped; nothing here uses them.
logging.getLogger("torchao").setLevel(logging.ERROR)
