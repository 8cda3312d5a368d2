"""Calibration batches to covariances of the adapted linears' inputs, one block of the model at a time.

The hidden states of all batches wait before the current block, which is then run once over each of them; so no more
covariances are held than one block's, whatever the depth of the model.

Shapes: b batch, s sequence length, t tokens, d width.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchtune.modules import TransformerDecoder
from torchtune.modules.peft import disable_adapter

from kasa_tune.components.adapters import AdapterLinear
from kasa_tune.components.adapters.state import adapter_linears
from kasa_tune.components.corda.allocation import POOLED
from kasa_tune.components.corda.covariance import (
    Covariance,
    covariance_workspace,
    damped,
    shortage,
)
from kasa_tune.components.linalg.decomposition import co_svd_workspace
from kasa_tune.components.models.decoder import Decoder
from kasa_tune.components.models.experts import mixtures_of, only_valid
from kasa_tune.components.models.llava import Llava
from kasa_tune.components.models.rotary import build_rotary_caches
from kasa_tune.components.processes.world import World

log = logging.getLogger(__name__)

Batch = Mapping[
    str, Any
]  # tokens [b, s], valid [b, s], of packed rows mask and input_pos, of rows with images these
Wanted = Callable[[str, int], bool]


def add_up(total: Covariance, world: World) -> None:
    """Add up, in place, the sums that the processes have taken over their parts of a calibration round."""
    dist.all_reduce(total.matrix)
    total.num_tokens, total.num_samples = map(int, world.sum(total.num_tokens, total.num_samples))


def shared_inputs(model: TransformerDecoder) -> list[tuple[str, ...]]:
    """Which adapted linears read the same tensor, found by one forward of a model on the meta device.

    Returns:
        Names, grouped, in the order the model reaches them.

    Raises:
        ValueError: an adapted linear is not reached by the model's forward.
    """
    groups: dict[int, tuple[Tensor, list[str]]] = {}

    def note(name: str, x: Tensor) -> None:
        # Holding the tensors keeps their identities apart.
        groups.setdefault(id(x), (x, []))[1].append(name)

    build_rotary_caches(model)
    linears = dict(adapter_linears(model))
    notes: dict[nn.Module, Callable[[Tensor], None]] = {
        linear: partial(note, name) for name, linear in linears.items()
    }
    # A model that returns hidden states leaves out its output projection, which may be adapted.
    returns_hidden_states = model.__dict__.pop("unembed", None)
    try:
        with (
            torch.no_grad(),
            _inputs_to(notes),
            disable_adapter(model),
        ):  # who reads what is the same
            model(torch.zeros(1, 2, dtype=torch.long, device="meta"))
    finally:
        if returns_hidden_states:
            model.unembed = returns_hidden_states
    reached = [tuple(dict.fromkeys(names)) for _, names in groups.values()]
    if missed := sorted(linears.keys() - {name for names in reached for name in names}):
        raise ValueError(
            f"{missed[0]}{f' and {len(missed) - 1} others' if missed[1:] else ''}: never reached by the model's "
            "forward, so there is nothing to calibrate on. Take it out of model.attn_modules, apply_to_mlp or "
            "apply_to_output."
        )
    return reached


@torch.no_grad()
def covariances(
    model: TransformerDecoder,
    groups: Sequence[tuple[str, ...]],
    rounds: Sequence[Sequence[Batch]],
    *,
    wanted: Wanted,
    dtype: torch.dtype = torch.float32,
    per_sample: bool = False,
    offload: bool = False,
    advance: Callable[[], object] = lambda: None,
    loaded: Callable[[str], AbstractContextManager] = lambda prefix: contextlib.nullcontext(),
    combine: Callable[[Covariance], object] = lambda total: None,
) -> Iterator[Covariance]:
    """Run the model over calibration batches block by block; yield the covariances of each before the next is run.

    Args:
        model: with its base weights and adapters that have not started (they are switched off).
        groups: from :func:`shared_inputs`.
        rounds: the batches of each round, see :func:`~kasa_tune.components.corda.calibration_data.draw_rounds`.
        wanted: whether a layer needs the covariance of a round, or that of all rounds (POOLED is asked).
        dtype: of the sums, float32 or float64.
        per_sample: as published: a sample divided by its largest entry's absolute value, the sum by the samples.
        offload: hidden states wait in host memory.
        advance: called after every batch of every block.
        loaded: entered with a block's prefix (``layers.<i>.``) while it is needed, for models read block by block.
        combine: is given each sum (its lower triangle) before it is used, to add those of other processes.

    Yields:
        One for each group and wanted round; the matrix is the receiver's.

    Raises:
        ValueError: an input holds NaN or infinity; the message names the layer.
    """
    linears, training = dict(adapter_linears(model)), model.training
    waiting = torch.device("cpu") if offload else model.tok_embeddings.weight.device
    run = partial(_run_block, device=model.tok_embeddings.weight.device, waiting=waiting)
    hidden = [[_embed(model, batch).to(waiting) for batch in batches] for batches in rounds]
    model.eval()
    try:
        for prefix, module, block, inside in _blocks(model, groups):
            with loaded(prefix):
                of_all = [g for g in inside if _any(wanted, g, POOLED)]
                pooled = {g: _empty(g, POOLED, linears, dtype) for g in of_all}
                for round, batches in enumerate(rounds):
                    needed = [g for g in inside if g in pooled or _any(wanted, g, round)]
                    sums = [_empty(g, round, linears, dtype) for g in needed]
                    receivers: dict[nn.Module, Callable[..., None]] = {
                        linears[s.layers[0]]: partial(s.add, per_sample=per_sample) for s in sums
                    }
                    run(module, block, batches, hidden[round], receivers, advance=advance)
                    for total in sums:
                        combine(total)
                        total.finish(per_sample=per_sample)
                        if total.layers in pooled:
                            pooled[total.layers].add_sum(total, len(rounds) if per_sample else 1)
                    yield from (total for total in sums if _any(wanted, total.layers, round))
                    sums = receivers = total = None  # or they stand beside the next round's
                yield from pooled.values()
    finally:
        model.train(training)


def _embed(model: TransformerDecoder, batch: Batch) -> Tensor:
    """The first block's input for a batch, ``[b, s, d]``."""
    device = model.tok_embeddings.weight.device
    tokens, positions = batch["tokens"].to(device), batch.get("input_pos")
    if not isinstance(model, Decoder):
        return model.tok_embeddings(tokens)
    positions = None if positions is None else positions.to(device)
    if isinstance(model, Llava):
        return model.embed(tokens, positions, images=batch.get("images"))
    return model.embed(tokens, positions)


def _run_block(
    module: nn.Module,
    block: Callable[[Tensor, Batch], Tensor],
    batches: Sequence[Batch],
    hidden: list[Tensor],
    receivers: Mapping[nn.Module, Callable[..., None]],
    *,
    device: torch.device,
    waiting: torch.device,
    advance: Callable[[], object],
) -> None:
    """Run a block over the batches of a round: each ``hidden[i] [b, s, d]`` becomes the block's output for it.

    Args:
        module: holds the block's modules; its adapters are switched off meanwhile.
        block: from :func:`_blocks`.
        batches: of the round.
        hidden: the block's inputs, one a batch, replaced in place.
        receivers: called with a module's input and with ``valid [b, s]`` before the module runs.
        device: where the block runs.
        waiting: the device that hidden states are kept on.
        advance: called after each batch.
    """
    mixtures = mixtures_of(module)
    with disable_adapter(module):
        for position, batch in enumerate(batches):
            valid = batch["valid"].to(device)
            bound = {read: partial(add, valid=valid) for read, add in receivers.items()}
            with _inputs_to(bound), only_valid(mixtures, valid):
                hidden[position] = block(hidden[position].to(device), batch).to(waiting)
            advance()


def _blocks(
    model: TransformerDecoder, groups: Sequence[tuple[str, ...]]
) -> Iterator[tuple[str, nn.Module, Callable[[Tensor, Batch], Tensor], list[tuple[str, ...]]]]:
    """Each layer of the model: how the names of its modules begin, a module that holds them, the layer as a function of
    hidden states and batch, and the groups inside; none after the last group.
    """

    def layer(module: nn.Module, h: Tensor, batch: Batch) -> Tensor:
        return module(
            h, **{key: batch[key].to(h.device) for key in ("mask", "input_pos") if key in batch}
        )

    def output(h: Tensor, batch: Batch) -> Tensor:
        model.output(model.norm(h))
        return h

    waiting = list(groups)
    for index, module in enumerate(model.layers):
        prefix = f"layers.{index}."
        inside = [group for group in waiting if group[0].startswith(prefix)]
        waiting = [group for group in waiting if not group[0].startswith(prefix)]
        yield prefix, module, partial(layer, module), inside
        if not waiting:
            return
    yield "output", model, output, waiting


def _any(wanted: Wanted, group: Sequence[str], round: int) -> bool:
    return any(wanted(name, round) for name in group)


def _empty(
    group: tuple[str, ...], round: int, linears: Mapping[str, AdapterLinear], dtype: torch.dtype
) -> Covariance:
    linear = linears[group[0]]
    zeros = torch.zeros(linear.in_dim, linear.in_dim, dtype=dtype, device=linear.weight.device)
    return Covariance(group, round, zeros)


@contextlib.contextmanager
def _inputs_to(receivers: Mapping[nn.Module, Callable[[Tensor], None]]) -> Iterator[None]:
    """While active, hand each module's input to its receiver before the module runs."""
    handles = [
        module.register_forward_pre_hook(lambda _, inputs, receive=receive: receive(inputs[0]))
        for module, receive in receivers.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def damped_covariances(
    model: TransformerDecoder,
    groups: Sequence[tuple[str, ...]],
    rounds: Sequence[Sequence[Batch]],
    *,
    wanted: Wanted,
    damping: float,
    damping_search: bool,
    normalization: str,
    progress: Callable[[Iterable[int]], Iterable[int]],
    **options: Any,
) -> Iterator[tuple[list[str], int, Tensor]]:
    """:func:`covariances`, each scaled and damped (see :func:`~kasa_tune.components.corda.covariance.damped`).

    A warning in the log sums up the layers whose inputs the calibration data do not fill.

    Args:
        model: with its base weights and adapters that have not started.
        groups: from :func:`shared_inputs`.
        rounds: the batches of each round.
        wanted: whether a layer needs the covariance of a round, or that of all rounds (POOLED).
        damping: ``λ``, as a share of the mean diagonal.
        damping_search: double it until the inverse is accurate, as published.
        normalization: ``unit_mean_diag``, or ``published``.
        progress: wraps the range of batches to run, all blocks together; tqdm does.
        options: dtype, offload, loaded and combine of :func:`covariances`.

    Yields:
        The layers that want this covariance, the round, the covariance ``(d, d)``.
    """
    published, shortages = normalization == "published", {}
    names = [
        name for group in groups for name in group
    ]  # of a round that none of them wants, nothing is run
    rounds = [
        part if any(wanted(n, i) or wanted(n, POOLED) for n in names) else []
        for i, part in enumerate(rounds)
    ]
    num_runs = sum(1 for _ in _blocks(model, groups)) * sum(len(batches) for batches in rounds)
    runs = iter(progress(range(num_runs)))
    found = covariances(
        model,
        groups,
        rounds,
        wanted=wanted,
        per_sample=published,
        advance=lambda: next(runs),
        **options,
    )
    for each in found:
        if words := shortage(each):
            shortages[each.layers[0]] = words
        covariance = damped(each.matrix, damping, normalize=not published, search=damping_search)
        yield [name for name in each.layers if wanted(name, each.round)], each.round, covariance
    next(runs, None)  # ends the progress bar
    if shortages:
        log.warning(_shortage_warning(shortages))


def calibration_bytes(
    model: TransformerDecoder,
    groups: Sequence[tuple[str, ...]],
    rounds: Sequence[Sequence[Batch]],
    *,
    dtype: torch.dtype,
    offload: bool,
    covariance_power: float = 1.0,
    damping_search: bool = False,
    spectra: bool = False,
    pooled_above: int | None = None,
    of_inputs: bool = False,
) -> dict[str, int]:
    """Bytes that calibrating and decomposing take on the device besides the model.

    Args:
        model: on any device, meta included.
        groups: from :func:`shared_inputs`.
        rounds: the batches of each round.
        dtype: of the covariances.
        offload: hidden states wait on the host, but for those of one batch.
        covariance_power: of the decomposition.
        damping_search: of the damping.
        spectra: whether layers choose among rounds or are given ranks, by their singular values.
        pooled_above: width of an input beyond which a second sum, over all rounds, stands beside that of each round.
        of_inputs: the covariances themselves are decomposed (EVA), not the weights under them.
    """
    linears, embedding = dict(adapter_linears(model)), model.tok_embeddings.weight
    sizes = [batch["tokens"].numel() for batches in rounds for batch in batches]
    num_tokens = max(sizes) if offload else sum(sizes)

    def sums(group: Sequence[str]) -> int:
        width = linears[group[0]].in_dim
        pooled = spectra and pooled_above is not None and width > pooled_above
        return (2 if pooled else 1) * width**2

    def workspace(linear: AdapterLinear) -> int:
        d_out, d_in = linear.weight.shape
        options = {"search": damping_search, "spectra": spectra}
        damped_one = dtype.itemsize * d_in * d_in
        return damped_one + max(
            co_svd_workspace(d_in if of_inputs else d_out, d_in, covariance_power),
            covariance_workspace(d_in, dtype.itemsize, **options),
        )

    widest = max(sum(map(sums, inside)) for *_, inside in _blocks(model, groups))
    return {
        "calibration hidden states": num_tokens * embedding.shape[1] * embedding.element_size(),
        "covariances of one block": widest * dtype.itemsize,
        "CO-SVD workspace": max(map(workspace, linears.values())),
    }


def _shortage_warning(shortages: Mapping[str, str]) -> str:
    """One sentence on all layers of :func:`shortage`, with what to set. ``shortages`` maps layers to its words."""
    name, words = next(iter(shortages.items()))
    others = f" (and {len(shortages) - 1} other inputs)" if len(shortages) > 1 else ""
    return (
        f"Calibration is thin: {name}{others} saw {words}. The directions it never saw are ordered by damping alone. "
        "More tokens help where they are few: raise calibration.num_samples or max_seq_len, or set "
        "calibration.concatenate=True for short samples."
    )
