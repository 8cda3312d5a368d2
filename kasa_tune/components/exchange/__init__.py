"""What leaves for other programs (PEFT, transformers, vLLM) and what comes in from them."""
