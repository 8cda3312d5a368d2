"""The words of a model card. ``$names`` are filled in by :mod:`kasa_tune.components.exchange.model_card`."""

CARD = """---
$front
---

# $title

$what

| | |
|---|---|
| method | $method |
| base model | $base |
| base weights | $fingerprint (SHA-256 over names, shapes and samples of every tensor) |
| base digest | $digest (SHA-256 over every byte, see below) |
| trained | $step |
| error | $error |
| written by | kasa_tune $version |

$terms

## Load

$load

## Prompt

$prompt

## The base

$check

## Data

$data

## Hyper-parameters

$hyperparameters
"""

WHAT = {
    "peft": "A plain LoRA on the unchanged base model: the update that was trained and what the\n"
    "method took out of the weights, together. $rank",
    "dora": "A DoRA on the unchanged base model: a LoRA, and a trained length for every row of the\n"
    "weights. It is no plain LoRA; PEFT reads it, vLLM and llama.cpp do not. $rank",
    "merged": "The base model with the trained adapter merged in.",
    "native": "The adapter by itself, update and edit, as the recipes of kasa_tune use it.",
}

TRANSFORMERS_PEFT = """    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained($base_python, dtype=torch.$dtype)
    model = PeftModel.from_pretrained(model, "<this folder>")
"""

LOAD = {
    "peft": TRANSFORMERS_PEFT
    + """
With vLLM, which applies it beside other adapters:

    vllm serve $base_shell --dtype $dtype --enable-lora --max-lora-rank $served \\
        --lora-modules tuned=<this folder>

- `--dtype` is the precision of training. vLLM's default is that of the base's files, and half precision rounds what
  this adapter holds exactly.
- `--max-lora-rank` counts for all adapters of a server: give the largest that one of them needs. For two at a time add
  `--max-loras 2` and a second `name=<folder>`.
- To load it into a server that runs, start that with `VLLM_ALLOW_RUNTIME_LORA_UPDATING=True`, then:

      curl http://localhost:8000/v1/load_lora_adapter -H 'Content-Type: application/json' \\
          -d '{"lora_name": "tuned", "lora_path": "<this folder>"}'
$pattern
With llama.cpp, as an adapter on the base's GGUF:

    python convert_lora_to_gguf.py --base <folder of the base> --outtype f32 <this folder>
    llama-cli -m <base>.gguf --lora <adapter>.gguf

In lm-eval: `--model hf --model_args pretrained=$base_word,peft=<this folder>,dtype=$dtype`. With
`--apply_chat_template` add `add_bos_token=False` if two tokens begin each text: the template writes one already.

To combine it with others in PEFT, use `add_weighted_adapter(..., combination_type="cat")`. `linear` adds up A and B
by themselves, which is not the sum of the updates.
""",
    "large": TRANSFORMERS_PEFT
    + """
vLLM reads ranks up to $largest_served; this one has $largest. Export it merged for vLLM.
""",
    "dora": TRANSFORMERS_PEFT
    + """
For vLLM and llama.cpp, export the run merged.
""",
    "merged": """    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained("<this folder>", dtype=torch.$dtype)

With vLLM:

    vllm serve <this folder> --dtype $dtype

With llama.cpp:

    python convert_hf_to_gguf.py <this folder> --outfile model.gguf
    llama-cli -m model.gguf

In lm-eval: `--model hf --model_args pretrained=<this folder>,dtype=$dtype`. With `--apply_chat_template` add
`add_bos_token=False` if two tokens begin each text: the template writes one already.
""",
    "native": """    tune run generate_text --config <one with this model> adapter_checkpoint=<this folder>
""",
}

PATTERN = """- Its layers have ranks of their own (`rank_pattern`). vLLM reads that from 0.32 on. For earlier
  versions export it without.
"""

NO_BASE = """The base has no repository id here. To name it, export again with `base_model=<owner>/<name>`."""

TERMS = "The terms of the base model apply to this one too."

CHECK = """The adapter is right on these weights only, whatever files they are cut into:

    import hashlib
    from pathlib import Path

    import torch
    from safetensors import safe_open

    lines = []
    for path in Path("<folder of the base>").glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            for name in file.keys():
                tensor = file.get_tensor(name).contiguous()
                data = tensor.reshape(-1).view(torch.uint8).numpy()
                sha = hashlib.sha256(data).hexdigest()
                lines.append(f"{name} {tensor.dtype} {list(tensor.shape)} {sha}\\n")
    digest = hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()
    print(digest == "$digest_word")
"""

NO_PROMPT = "How to prompt could not be found out: $why. Prompt as in training."

PROMPT = """Training ended its prompts so, and an answer follows at once:

$form

A server puts the token that begins texts before it. This request gives exactly the tokens of training:

    curl http://localhost:8000/v1/completions -H 'Content-Type: application/json' \\
        -d $request
$chat"""

PROMPT_IDS = """No text gives exactly the tokens of training when a server encodes it. vLLM also takes tokens:

    curl http://localhost:8000/v1/completions -H 'Content-Type: application/json' \\
        -d $request
$chat"""

CHAT_OURS = """
Chat completions give the same tokens with `chat_template.jinja` of this folder$turns. Start vLLM with
`--chat-template <this folder>/chat_template.jinja`. The base's own chat template, if it has one, is not that of
training.
"""
CHAT_BASE = """
Chat completions with the base's own chat template give the same tokens.
"""
CHAT_NONE = """
Chat completions do not: no chat template gives these tokens.
"""
