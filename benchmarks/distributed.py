"""The distributed recipes on 1 and 2 processes of this machine, and a model on paper of a large base on many GPUs.

    OMP_NUM_THREADS=1 python benchmarks/distributed.py
    OMP_NUM_THREADS=1 python benchmarks/distributed.py --methods kasa --processes 1 2 --model tiny
    OMP_NUM_THREADS=1 python benchmarks/distributed.py --paper llama3_70b --world 8 64

Measured: each method's distributed recipe as torchrun starts it (gloo on a CPU, NCCL with `--device cuda`), with the
same batch of all processes together and with the same batch of each, beside its single-device recipe on the same
weights and rows. `small` is a random Llama of 4 layers, width 512, with weights of a power-law spectrum and packed
rows; `tiny` the embedded model. Set-up is taken apart by wrapping what the recipe calls: its own jobs (decompositions,
quantization), reading (a process's rows of each weight, the others' from them), waiting for other processes and
exchanging results, adding up covariances, FSDP2. Clock and memory are those of the process with most; CPU seconds are
of all together.

Bytes sent are counted, not measured: every collective that reaches the dispatcher, its size as a whole (what all
processes hold after a gather, before a reduce-scatter) times (N - 1) / N for gather, reduce-scatter and broadcast,
twice that for all-reduce. That is what a process sends in a ring.

On paper (`--paper`): from shapes alone, every assumption printed. Jobs are given to processes by the function that the
recipes use. Their seconds are measured here at widths and rank divided by `--measured-at` and scaled by its cube.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import repeat
from pathlib import Path
from statistics import median
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from common import machine, print_table
from corda_initialization import Meter, make_weights, uneven_inputs
from kasa_initialization import make_weight
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchtune import modules, training
from torchtune.models.convert_weights import tune_to_hf

from kasa_tune import config
from kasa_tune.components.adapters.state import adapter_linears
from kasa_tune.components.corda.calibration import calibration_bytes, shared_inputs
from kasa_tune.components.corda.covariance import damped
from kasa_tune.components.linalg.decomposition import co_svd, smallest_triplets
from kasa_tune.components.linalg.nf4 import quantize, quantized_bytes
from kasa_tune.components.models.base_weights import SharedReading
from kasa_tune.components.models.loading import block_linears, build_on_meta
from kasa_tune.components.processes import World, distribute_jobs
from kasa_tune.components.quantized.base import base_bytes
from kasa_tune.components.training import Step
from kasa_tune.components.training.loss import return_hidden_states
from kasa_tune.components.training.memory import (
    SET_UP,
    WEIGHTS,
    memory_budget,
    per_process,
    state_bytes,
)

RECIPES = Path(__file__).resolve().parent.parent / "recipes"
METHODS = ("kasa", "corda", "qcorda")
SMALL = {"num_blocks": 4, "width": 512, "kv": 128, "hidden": 2048, "spectrum": "trained"}
VOCAB, HEAD_DIM, SEQ_LEN = 8192, 64, 256  # of the small model, as make_weights has them
RING = {
    "gather": 1,
    "reduce_scatter": 1,
    "reduce": 2,
    "broadcast": 1,
}  # times (N - 1) / N of the whole is sent


# --- one process of a measured run


class Ledger(TorchDispatchMode):
    """Number and whole bytes of the collectives of this process, by kind."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.calls, self.whole = size, Counter(), Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if DTensor in types:  # ask again below it, where the collectives are
            return NotImplemented
        name = func._schema.name
        if name.startswith(("c10d::", "_c10d_functional::")) and (kind := kind_of(name)):
            sizes = [
                sum(t.nbytes for t in tree_leaves(arg) if isinstance(arg, Tensor | list))
                for arg in args[:2]
            ]
            gathers = name.startswith("_c10d_functional::all_gather")  # is given its input alone
            self.calls[kind] += 1
            self.whole[kind] += max(sizes) * (self.size if gathers else 1)
        return func(*args, **kwargs or {})

    def sent(self) -> dict[str, float]:
        """MiB that a ring makes this process send, by kind."""
        return {
            kind: RING[kind] * whole * (self.size - 1) / self.size / 2**20
            for kind, whole in self.whole.items()
        }


def kind_of(name: str) -> str | None:
    """The kind in RING of an operator; None where no tensor travels, as in waiting."""
    short = name.partition("::")[2].replace("allgather", "gather").replace("allreduce", "reduce")
    return next(
        (kind for kind in ("reduce_scatter", "gather", "reduce", "broadcast") if kind in short),
        None,
    )


class Parts:
    """Seconds on the clock and of the CPU by what they went into."""

    def __init__(self, device: str) -> None:
        self.device, self.seconds = device, defaultdict(lambda: [0.0, 0.0])

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        before = self.now()
        yield
        self.seconds[name] = [
            a + n - b for a, n, b in zip(self.seconds[name], self.now(), before, strict=True)
        ]

    def now(self) -> tuple[float, float]:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter(), time.process_time()

    def timed(self, name: str, function: Callable) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            with self(name):
                return function(*args, **kwargs)

        return call

    def instrument(self, recipe: ModuleType) -> None:
        """Time what a distributed recipe's set-up is made of; none of these calls another."""
        shared = recipe.distribute_jobs

        def spread_timed(jobs: Any, world: World) -> Iterator[Any]:
            return shared(((cost, self.timed("jobs", work)) for cost, work in jobs), world)

        recipe.distribute_jobs, recipe.shard = spread_timed, self.timed("sharding", recipe.shard)
        SharedReading.__getitem__ = self.timed("reading", SharedReading.__getitem__)
        World.gather = self.timed("waiting", World.gather)
        if hasattr(recipe, "add_up"):
            recipe.add_up = self.timed("summing", recipe.add_up)


def load_recipe(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"recipe_{name}", RECIPES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def work(args: argparse.Namespace) -> dict[str, Any]:
    """Set-up and some steps of a recipe in this process; the last step is counted and not timed."""
    name = f"{args.worker}_finetune_{'single_device' if args.single else 'distributed'}"
    module, parts = load_recipe(name), Parts(args.device)
    cfg = config.load(f"tiny_{args.worker}", overrides(args.worker, args))
    recipe = next(
        each for key, each in vars(module).items() if key.endswith(("Device", "Distributed"))
    )(cfg)
    world = getattr(recipe, "_world", SimpleNamespace(size=1, rank=0))
    if not args.single:
        parts.instrument(module)
    recipe._setup_weights = parts.timed("set-up", recipe._setup_weights)
    ledger, meter = Ledger(world.size), Meter(args.device)
    with ledger:
        recipe.setup(cfg)
    result = {
        "rank": world.rank,
        "set-up": meter.read(),
        "parts": dict(parts.seconds),
        "set-up sent": ledger.sent(),
    }
    result["held"] = sum(
        state_bytes([local(t)]) for t in [*recipe._model.parameters(), *recipe._model.buffers()]
    )
    losses, seconds, meter, ledger = [], [], Meter(args.device), Ledger(world.size)
    begin, apply = Step.__init__, Step.apply

    def begun(step: Step, *inputs: Any) -> None:
        if len(losses) == args.steps + 1:  # the last one is counted
            ledger.__enter__()
        step.began = parts.now()
        begin(step, *inputs)

    def applied(step: Step, *inputs: Any, **options: Any) -> None:
        apply(step, *inputs, **options)
        seconds.append([now - then for now, then in zip(parts.now(), step.began, strict=True)])
        losses.append(step.metrics["loss"])
        if len(losses) == args.steps + 2:
            ledger.__exit__(None, None, None)

    Step.__init__, Step.apply = begun, applied
    recipe.train(cfg)
    result |= {"steps": seconds[1:-1], "losses": losses, "training": meter.read()}
    result |= {"step sent": ledger.sent(), "step calls": sum(ledger.calls.values())}
    recipe.cleanup()
    return result


def local(tensor: Tensor) -> Tensor:
    """What this process holds of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def overrides(method: str, args: argparse.Namespace) -> list[str]:
    """What a measured run changes in the method's tiny config."""
    rank = {"kasa": 8}.get(method, 32)
    changed = {
        "output_dir": args.folder,
        "device": args.device,
        "batch_size": args.batch_size,
        "lr_scheduler": "null",  # else the first steps hardly learn, and differences of losses say nothing
        "dataset_val": "null",
        "run_val_every_n_steps": "null",
        "max_steps": args.steps + 2,
        "model.rank": rank,
        "model.alpha": rank,
    }
    if method == "kasa":
        changed["model.truncation_rank"] = "null"
    else:
        changed |= {"calibration.num_samples": args.samples, "calibration.max_seq_len": SEQ_LEN}
        changed |= {"calibration.concatenate": True, "calibration.batch_size": 4}
        changed |= {"calibration.cache_dir": f"{args.folder}/cache"}
    if args.model == "small":
        sizes = {
            "num_layers": SMALL["num_blocks"],
            "embed_dim": SMALL["width"],
            "intermediate_dim": SMALL["hidden"],
        }
        sizes |= {
            "num_heads": SMALL["width"] // HEAD_DIM,
            "num_kv_heads": SMALL["kv"] // HEAD_DIM,
            "vocab_size": VOCAB,
        }
        changed |= {f"model.{key}": value for key, value in sizes.items()}
        changed |= {
            "checkpointer.checkpoint_dir": args.base,
            "dataset.packed": True,
            "tokenizer.max_seq_len": SEQ_LEN,
        }
    return [f"{key}={value}" for key, value in changed.items()]


# --- the measured runs


def write_base(folder: Path) -> None:
    """The small model's weights as a Hugging Face checkpoint."""
    shape = {
        "num_heads": SMALL["width"] // HEAD_DIM,
        "num_kv_heads": SMALL["kv"] // HEAD_DIM,
        "dim": SMALL["width"],
    }
    weights = tune_to_hf(make_weights(SimpleNamespace(**SMALL)), **shape)
    save_file(
        {name: tensor.contiguous() for name, tensor in weights.items()},
        folder / "model.safetensors",
    )
    facts = {
        "num_attention_heads": shape["num_heads"],
        "num_key_value_heads": shape["num_kv_heads"],
    }
    facts |= {
        "hidden_size": shape["dim"],
        "head_dim": HEAD_DIM,
        "vocab_size": VOCAB,
        "model_type": "llama",
    }
    (folder / "config.json").write_text(json.dumps(facts), encoding="utf-8")


def measure(
    method: str, processes: int | None, batch_size: int, base: str, args: argparse.Namespace
) -> list[dict]:
    """Results by rank of a recipe in fresh processes; ``None`` is the single-device recipe."""
    with tempfile.TemporaryDirectory() as folder:
        options = {
            "--worker": method,
            "--batch-size": batch_size,
            "--folder": folder,
            "--base": base,
        }
        options |= {
            "--model": args.model,
            "--steps": args.steps,
            "--samples": args.samples,
            "--device": args.device,
        }
        command = [sys.executable]
        if processes:
            command += [
                "-m",
                "torch.distributed.run",
                "--standalone",
                "--nproc_per_node",
                str(processes),
            ]
        command += [__file__, *(str(word) for pair in options.items() for word in pair)]
        command += [] if processes else ["--single"]
        quiet = {
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
            "TQDM_DISABLE": "1",
            "PYTHONWARNINGS": "ignore",
        }
        done = subprocess.run(command, env=os.environ | quiet, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(
                f"{method} on {processes} processes ended with {done.returncode}:\n{done.stderr[-4000:]}"
            )
        return [
            json.loads(path.read_text()) for path in sorted(Path(folder).glob("result.rank*.json"))
        ]


def print_measured(args: argparse.Namespace) -> None:
    """Tables of set-up, memory and steps of every method, each on all numbers of processes."""
    set_up, steps = [], []
    with tempfile.TemporaryDirectory() as base:
        if args.model == "small":
            write_base(Path(base))
        for method in args.methods:
            plan = [(None, args.batch_size)]
            for number in args.processes:
                plan += [(number, args.batch_size // number)] + [(number, args.batch_size)] * (
                    number > 1
                )
            reference, unplaced = (
                None,
                argparse.Namespace(**vars(args) | {"folder": "/tmp", "base": "/tmp"}),
            )
            on_paper = Plan("tiny", method, overrides(method, unplaced)).step_bytes
            for number, batch_size in plan:
                ranks = measure(method, number, batch_size, base, args)
                reference = reference or ranks[0]["losses"]
                if batch_size * (number or 1) == args.batch_size:
                    set_up.append([method, str(number or "one device"), *set_up_row(ranks)])
                    print(" | ".join(set_up[-1]), flush=True)
                steps.append([method, str(number or "one device"), str(batch_size)])
                steps[-1] += step_row(
                    ranks, reference if batch_size * (number or 1) == args.batch_size else None
                )
                steps[-1].append(f"{sum(on_paper(number or 1)) / 2**20:.2f}")
                print(" | ".join(steps[-1]), flush=True)
    print()
    names = ["all", "jobs", "reading", "summing", "waiting", "sharding", "other"]
    clock = [f"{name} [s]" for name in names]
    print_table(
        ["method", "processes", *clock, "CPU, all [s]", "peak [MiB]", "sent [MiB]", "of it"], set_up
    )
    header = [
        "method",
        "processes",
        "batch of each",
        "step [s]",
        "CPU of all [s]",
        "held [MiB]",
        "peak in steps [MiB]",
    ]
    print_table(
        [
            *header,
            "sent a step [MiB]",
            "collectives",
            "last loss",
            "losses differ by",
            "on paper [MiB]",
        ],
        steps,
    )


def set_up_row(ranks: Sequence[Mapping[str, Any]]) -> list[str]:
    names = ("jobs", "reading", "summing", "waiting", "sharding")
    slowest = max(ranks, key=lambda rank: rank["parts"]["set-up"][0])["parts"]
    parts = {name: slowest.get(name, (0.0, 0.0))[0] for name in names}
    total = slowest["set-up"][0]
    figures = [
        f"{total:.1f}",
        *(f"{seconds:.1f}" for seconds in (*parts.values(), total - sum(parts.values()))),
    ]
    cpu, peak = (
        sum(rank["parts"]["set-up"][1] for rank in ranks),
        max(rank["set-up"]["peak"] for rank in ranks),
    )
    sent = ranks[0]["set-up sent"]
    kinds = ", ".join(f"{kind} {size:.1f}" for kind, size in sent.items() if size >= 0.05)
    return [*figures, f"{cpu:.1f}", f"{peak:.0f}", f"{sum(sent.values()):.1f}", kinds or "-"]


def step_row(ranks: Sequence[Mapping[str, Any]], reference: Sequence[float] | None) -> list[str]:
    """``reference``: losses of one device on the same rows, if they are the same."""
    clock = median(
        max(rank["steps"][i][0] for rank in ranks) for i in range(len(ranks[0]["steps"]))
    )
    cpu = median(sum(rank["steps"][i][1] for rank in ranks) for i in range(len(ranks[0]["steps"])))
    held, peak = (
        max(rank["held"] for rank in ranks) / 2**20,
        max(rank["training"]["peak"] for rank in ranks),
    )
    sent = ranks[0]["step sent"]
    kinds = ", ".join(f"{kind} {size:.2f}" for kind, size in sent.items() if size >= 0.005)
    pairs = zip(ranks[0]["losses"], reference or [], strict=False)
    differs = f"{max(abs(a - b) / abs(b) for a, b in pairs):.0e}" if reference else ""
    figures = [f"{clock:.2f}", f"{cpu:.2f}", f"{held:.1f}", f"{peak:.0f}"]
    return [
        *figures,
        f"{sum(sent.values()):.2f} ({kinds or '-'})",
        str(ranks[0]["step calls"]),
        f"{ranks[0]['losses'][-1]:.6f}",
        differs,
    ]


# --- on paper


@dataclass
class Job:
    """A decomposition or quantization in a set-up: what it costs as the recipe says, seconds of one core, bytes that
    its process holds until it is done (by name, so that what jobs share counts once), and bytes of its result.
    """

    cost: float
    seconds: float
    holds: Mapping[str, int]
    result: int


@dataclass
class OneOfMany:
    """What `spread` needs of a World to tell which jobs a process would do; nothing is heard of the others."""

    rank: int
    size: int
    turn: int = 0

    def all_succeed(self, what: str) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()

    def gather(self, value: Any) -> list[Any]:
        self.turn += 1
        return [repeat(None)] * self.size


def deal(jobs: Sequence[Job], size: int) -> list[list[list[Job]]]:
    """Jobs by turn, after which all wait for each other, and by process."""
    turns: dict[int, list[list[Job]]] = {}
    for rank in range(size):
        me = OneOfMany(rank, size)

        def note(job: Job, me: OneOfMany = me) -> None:
            turns.setdefault(me.turn, [[] for _ in range(size)])[me.rank].append(job)

        list(distribute_jobs(((job.cost, partial(note, job)) for job in jobs), me))
    return list(turns.values())


class Plan:
    """A method's shipped config of a large base, as its recipe would build it, on the meta device."""

    def __init__(self, preset: str, method: str, overrides: Sequence[str] = ()) -> None:
        self.method, self.cfg = (
            method,
            config.load(f"{preset}_{method}", overrides, check_files=False),
        )
        self.build(training.get_dtype(self.cfg.dtype, device=torch.device("cpu")))

    def build(self, dtype: torch.dtype) -> None:
        self.model = model = build_on_meta(partial(config.instantiate, self.cfg.model), dtype=dtype)
        self.linears, self.groups, self.blocks = (
            dict(adapter_linears(model)),
            shared_inputs(model),
            block_linears(model),
        )
        return_hidden_states(model)
        if self.cfg.enable_activation_checkpointing:
            training.set_activation_checkpointing(model, {modules.TransformerSelfAttentionLayer})
        for linear in self.linears.values():
            linear.materialize("meta", torch.float32)
        self.trained = state_bytes(p for p in model.parameters() if p.requires_grad)
        self.itemsize = model.tok_embeddings.weight.element_size()

    def of_block(self, name: str) -> int:
        """Bytes of a frozen linear of a block."""
        numel = self.blocks[name].weight.numel()
        return (
            quantized_bytes(numel, itemsize=self.itemsize)
            if self.method == "qcorda"
            else numel * self.itemsize
        )

    def base(self) -> tuple[int, int]:
        """Bytes of the frozen weights, as they are read, in blocks' linears and elsewhere."""
        inside = sum(linear.weight.numel() for linear in self.blocks.values()) * self.itemsize
        return inside, state_bytes(
            p for p in self.model.parameters() if not p.requires_grad
        ) - inside

    def stages(self, seconds: Callable[[str, int, int, int], float]) -> list[list[Job]]:
        """The jobs that the recipe spreads, in its order; all have been done before those of the next stage begin."""
        shapes = {name: tuple(linear.weight.shape) for name, linear in self.linears.items()}
        costs = {name: d_out * d_in * min(d_out, d_in) for name, (d_out, d_in) in shapes.items()}
        if self.method == "kasa":
            names = sorted(costs, key=lambda name: -costs[name])
            ranks = {name: self.linears[name].edit.rank for name in names}
            return [
                [
                    Job(
                        costs[n],
                        seconds("kasa", *shapes[n], ranks[n]),
                        {},
                        4 * ranks[n] * sum(shapes[n]),
                    )
                    for n in names
                ]
            ]
        first, ranks = [], {name: linear.rank for name, linear in self.linears.items()}
        for group in self.groups:
            context = {group[0] + " C": 4 * self.linears[group[0]].in_dim ** 2}
            for n in group:
                holds = context | {n: self.blocks[n].weight.numel() * self.itemsize}
                first.append(
                    Job(
                        costs[n],
                        seconds("corda", *shapes[n], ranks[n]),
                        holds,
                        4 * ranks[n] * sum(shapes[n]),
                    )
                )
        if self.method == "corda":
            return [first]
        second = []
        for name, linear in self.blocks.items():
            shape = tuple(linear.weight.shape)
            factors = (
                2 * 4 * ranks[name] * sum(shape) if name in ranks else 0
            )  # the update and what it was split from
            cost = seconds("nf4", *shape, ranks.get(name, 0))
            second.append(Job(linear.weight.numel(), cost, {}, self.of_block(name) + factors))
        return [first, second]

    def step_bytes(self, shards: int, replicas: int = 1) -> tuple[float, float, float]:
        """What a process sends in a ring: for a micro-batch, once a step among its shards, and among replicas."""
        inside, outside = self.base()
        inside = sum(map(self.of_block, self.blocks)) + self.trained
        share = (shards - 1) / shards
        once = (
            self.trained * share * (2 if self.method == "kasa" else 1)
        )  # gradients; factors for the regularizers
        return (
            (2 * inside + outside) * share,
            once,
            2 * (replicas - 1) / replicas * self.trained / shards,
        )

    def step_calls(self, replicas: int = 1) -> tuple[int, int]:
        """Collectives of a micro-batch, and once a step."""
        blocks = len(self.model.layers)
        return 2 * blocks + 1, blocks * (1 + (replicas > 1)) + 3 * len(self.linears) * (
            self.method == "kasa"
        )

    def memory(self, world: int, shards: int, args: argparse.Namespace) -> tuple[int, int]:
        """Bytes at most in set-up and in a training step, as the recipe's dry run counts them."""
        cfg, model = self.cfg, self.model
        make = partial(config.instantiate, cfg.optimizer)
        shape = {
            "batch_size": cfg.batch_size,
            "seq_len": cfg.tokenizer.max_seq_len,
            "adapter_dtype": torch.float32,
        }
        loss_chunk = config.instantiate(cfg.loss).chunk_size
        budget = memory_budget(
            model,
            make,
            **shape,
            vocab_size=model.tok_embeddings.num_embeddings,
            loss_chunk=loss_chunk,
        )
        if self.method == "qcorda":
            base = base_bytes(model, self.blocks, **cfg.quantization)
            budget = base | budget | base
        if self.method != "kasa":
            row = {"tokens": torch.empty(1, args.calibration[1], device="meta")}
            rounds = [[row] * -(-args.calibration[0] // world)]
            budget |= calibration_bytes(
                model, self.groups, rounds, dtype=torch.float32, offload=cfg.calibration.offload
            )
        own = per_process(budget, model, shards)
        over = {purpose for phase in SET_UP for purpose in phase} - {"base weights in NF4"}
        preparing = max(sum(own.get(purpose, 0) for purpose in phase) for phase in SET_UP)
        step = sum(size for purpose, size in own.items() if purpose not in over)
        return sum(own.get(purpose, 0) for purpose in WEIGHTS) + preparing, step


class JobSeconds:
    """Seconds of one core by job: given, or measured at smaller widths and scaled up; the same shape once."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.scale, self.rows = args.measured_at, {}
        given = (word.partition("=") for word in args.seconds)
        self.known = {key: float(value) for key, _, value in given}

    def __call__(self, kind: str, d_out: int, d_in: int, rank: int) -> float:
        key = f"{kind}:{d_out}x{d_in}"
        if key not in self.known:
            small = d_out // self.scale, d_in // self.scale
            seconds = self.measure(kind, *small, max(2, rank // self.scale))
            self.known[key] = seconds * self.scale ** (2 if kind == "nf4" else 3)
            self.rows[key] = f"{seconds:.2f} at {small[0]} x {small[1]}"
        else:
            self.rows.setdefault(key, "given")
        return self.known[key]

    @torch.no_grad()
    def measure(self, kind: str, d_out: int, d_in: int, rank: int) -> float:
        weight = make_weight(d_out, d_in, "trained", 0)
        if kind == "corda":
            inputs = uneven_inputs(d_in)
            context = damped(inputs.T @ inputs, 0.01)
        act = {
            "kasa": lambda: smallest_triplets(weight, rank),
            "corda": lambda: co_svd(weight, context, rank, "ipm"),
            "nf4": lambda: quantize(weight),
        }[kind]
        started = time.process_time()
        act()
        return time.process_time() - started


def set_up_on_paper(
    plan: Plan, size: int, seconds: JobSeconds, args: argparse.Namespace
) -> dict[str, float]:
    """Seconds and bytes of a set-up on ``size`` processes."""
    found, (inside, outside) = Counter(), plan.base()
    for jobs in plan.stages(seconds):
        turns = deal(jobs, size)
        slowest = sum(max(sum(job.seconds for job in mine) for mine in turn) for turn in turns)
        found += Counter(
            {
                "turns": len(turns),
                "clock": slowest,
                "core seconds": sum(job.seconds for job in jobs),
            }
        )
        largest = (max(sum(job.result for job in mine) for mine in turn) for turn in turns)
        found["factors"] += sum(
            size * each for each in largest
        )  # objects are padded to the largest
        held = (
            sum({k: v for job in mine for k, v in job.holds.items()}.values())
            for turn in turns
            for mine in turn
        )
        found["held"] = max(found["held"], *held)
    calibrated = plan.method != "kasa"
    found["weights"] = outside + inside * {"kasa": 1, "corda": 2, "qcorda": 1}[plan.method]
    owned = (
        inside
        if plan.method == "qcorda"
        else state_bytes(linear.weight for linear in plan.linears.values())
    )
    disk = found["weights"] + (owned if plan.method != "corda" else 0)
    nodes = -(-size // args.gpus_per_node)
    found["reading"] = disk / nodes / (args.disk * 1e9)
    tokens, widths = (
        args.calibration[0] * args.calibration[1],
        [plan.linears[g[0]].in_dim for g in plan.groups],
    )
    found["covariances"] = calibrated * 4 * sum(width**2 for width in widths)
    share = (size - 1) / size
    found["sent"] = share * (found["weights"] + found["factors"] + 2 * found["covariances"])
    found["sending"] = found["sent"] / bandwidth(size, args)
    forward = 2 * tokens * inside / plan.itemsize / size / (args.tflops * 1e12)
    sums = 2 * tokens * sum(width**2 for width in widths) / size / (args.fp32_tflops * 1e12)
    found["calibrating"] = calibrated * (forward + sums)
    found["on GPUs"] = found["clock"] / args.speedup
    found["in all"] = found["on GPUs"] + found["reading"] + found["sending"] + found["calibrating"]
    return found


def bandwidth(size: int, args: argparse.Namespace) -> float:
    """Bytes a second that a process can send in a ring of so many."""
    return 1e9 * (args.nvlink if size <= args.gpus_per_node else args.infiniband)


def print_paper(args: argparse.Namespace) -> None:
    """A large base on many GPUs, from shapes, measured seconds of one core and stated rates."""
    rows, columns = args.calibration
    print(
        f"Assumed: {args.nvlink:g} GB/s sent by a GPU where a ring stays in a node of {args.gpus_per_node}, "
        f"{args.infiniband:g} GB/s where it does not, {args.latency:g} us a collective; {args.disk:g} GB/s read by a "
        f"node; {args.tflops:g} TFLOP/s in bf16, {args.fp32_tflops:g} in float32; a GPU decomposes and quantizes "
        f"{args.speedup:g} times as fast as the core measured; {rows} rows of {columns} tokens to calibrate on, one "
        "round; nothing overlaps anything, dispatch and pickling take no time. GB are 10^9 bytes, GiB 2^30.\n"
    )
    seconds, plans = JobSeconds(args), [Plan(args.paper, method) for method in args.methods]
    set_ups = {
        (plan.method, size): set_up_on_paper(plan, size, seconds, args)
        for plan in plans
        for size in args.world
    }
    table = [
        [*key.split(":"), how, f"{seconds.known[key]:.1f}"] for key, how in seconds.rows.items()
    ]
    print_table(["job", "shape", "measured [CPU s]", "taken as [s of one core]"], table)
    balance, messages, totals = [], [], []
    for (method, size), found in set_ups.items():
        ideal = found["core seconds"] / size
        row = [method, str(size), f"{found['turns']:.0f}", f"{found['core seconds'] / 3600:.2f}"]
        row += [
            f"{found['clock'] / 60:.1f}",
            f"{ideal / 60:.1f}",
            f"{100 * ideal / found['clock']:.0f} %",
        ]
        balance.append([*row, f"{found['held'] / 2**30:.1f}"])
        sizes = [
            f"{found[name] / 1e9:.1f}" for name in ("weights", "covariances", "factors", "sent")
        ]
        messages.append([method, str(size), *sizes, f"{found['sending']:.1f}"])
        parts = ("reading", "calibrating", "on GPUs", "sending", "in all")
        totals.append([method, str(size), *(f"{found[name]:.0f}" for name in parts)])
    head = ["method", "GPUs"]
    names = [
        "turns",
        "core hours",
        "clock, cores [min]",
        "ideal [min]",
        "balance",
        "waiting jobs hold [GiB]",
    ]
    print_table([*head, *names], balance)
    names = [
        "weights [GB]",
        "covariances [GB]",
        "factors [GB]",
        "a GPU sends [GB]",
        "that takes [s]",
    ]
    print_table([*head, *names], messages)
    names = ["reading [s]", "calibrating [s]", "jobs on GPUs [s]", "exchanging [s]", "set-up [s]"]
    print_table([*head, *names], totals)
    print_steps_on_paper(plans, args)


def print_steps_on_paper(plans: Sequence[Plan], args: argparse.Namespace) -> None:
    table = []
    for plan in plans:
        tokens = plan.cfg.batch_size * plan.cfg.tokenizer.max_seq_len
        passes = 2 + bool(
            plan.cfg.enable_activation_checkpointing
        )  # forward, backward to the inputs, forward again
        compute = passes * 2 * tokens * sum(plan.base()) / plan.itemsize / (args.tflops * 1e12)
        for size in args.world:
            for shards in sorted({size, min(size, args.gpus_per_node)}, reverse=True):
                replicas = size // shards
                micro, once, between = plan.step_bytes(shards, replicas)
                calls = [number * args.latency * 1e-6 for number in plan.step_calls(replicas)]
                fetching = micro / bandwidth(shards, args) + calls[0]
                ending = (
                    once / bandwidth(shards, args) + between / (args.infiniband * 1e9) + calls[1]
                )
                row = [
                    plan.method,
                    str(size),
                    f"{replicas} x {shards}" if replicas > 1 else str(shards),
                ]
                row += [
                    f"{micro / 1e9:.1f}",
                    f"{fetching:.2f}",
                    f"{compute:.2f}",
                    f"{(once + between) / 1e9:.2f}",
                ]
                memory = plan.memory(size, shards, args)
                table.append([*row, f"{ending:.2f}", *(f"{value / 2**30:.1f}" for value in memory)])
    names = [
        "a micro-batch sends [GB]",
        "that takes [s]",
        "it computes [s]",
        "the step's end sends [GB]",
        "takes [s]",
    ]
    memory = ["set-up, at most [GiB]", "training step [GiB]"]
    print_table(["method", "GPUs", "cut into", *names, *memory], table)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--model", choices=("small", "tiny"), default="small")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument(
        "--batch-size", type=int, default=4, help="rows of a step, of all processes or of each"
    )
    parser.add_argument("--samples", type=int, default=64, help="rows to calibrate on")
    parser.add_argument("--steps", type=int, default=5, help="timed, after one that is not")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--paper",
        metavar="PRESET",
        help="a base with shipped configs, as llama3_70b: nothing is trained",
    )
    parser.add_argument("--world", type=int, nargs="+", default=[8, 64], help="GPUs")
    parser.add_argument("--gpus-per-node", type=int, default=8)
    parser.add_argument(
        "--nvlink", type=float, default=400.0, help="GB/s that a GPU sends within a node"
    )
    parser.add_argument(
        "--infiniband", type=float, default=50.0, help="GB/s that a GPU sends to another node"
    )
    parser.add_argument("--latency", type=float, default=30.0, help="microseconds of a collective")
    parser.add_argument("--disk", type=float, default=2.0, help="GB/s that a node reads")
    parser.add_argument("--tflops", type=float, default=400.0, help="of a GPU in bfloat16")
    parser.add_argument(
        "--fp32-tflops", type=float, default=40.0, help="of a GPU in float32, for the covariances"
    )
    parser.add_argument(
        "--speedup",
        type=float,
        default=100.0,
        help="of a GPU over the measured core, in set-up's jobs",
    )
    parser.add_argument(
        "--calibration", type=int, nargs=2, default=[256, 2048], help="rows and tokens of a row"
    )
    parser.add_argument(
        "--measured-at",
        type=int,
        default=4,
        help="widths and rank are divided by this to measure jobs",
    )
    parser.add_argument("--seconds", nargs="+", default=[], metavar="JOB:SHAPE=SECONDS",
                        help="known seconds of one core, instead of measuring: corda:8192x8192=76")  # fmt: skip
    for name in ("--worker", "--folder", "--base"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    parser.add_argument("--single", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        result = work(args)
        Path(args.folder, f"result.rank{result['rank']}.json").write_text(
            json.dumps(result), encoding="utf-8"
        )
        return
    print(f"{machine(args.device)}\n", flush=True)
    print_paper(args) if args.paper else print_measured(args)


if __name__ == "__main__":
    main()
