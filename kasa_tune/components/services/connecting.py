"""An asker from the plain values of a config's section ``endpoint``, and what it has done in a sentence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kasa_tune.components.services.asking import Asker
from kasa_tune.components.services.budget import Budget, Prices
from kasa_tune.components.services.endpoint import Endpoint
from kasa_tune.components.services.journal import Journal

_OF_THE_SERVER = ("base_url_env", "api_key_env", "timeout", "max_reply_bytes")
_OF_THE_REQUEST = ("model", "max_tokens", "temperature")


def connected(given: Mapping[str, Any], journal: Journal, budget: Budget, seed: int) -> Asker:
    """Make an asker.

    Args:
        given: the arguments of :class:`Endpoint` and :class:`Asker`; ``model``, ``max_tokens``, ``temperature`` (None:
            not sent) and ``extra``, further keys of each request.
        journal: of the answers.
        budget: what they may take.
        seed: see :class:`Asker`.

    Raises:
        EndpointError: the address or the key is not set.
    """
    server = {key: given[key] for key in _OF_THE_SERVER}
    request = {key: given[key] for key in _OF_THE_REQUEST if given[key] is not None}
    request |= given["extra"] or {}
    taken = {*_OF_THE_SERVER, *_OF_THE_REQUEST, "extra"}
    options = {key: value for key, value in given.items() if key not in taken}
    return Asker(Endpoint(**server), journal, budget, settings=request, seed=seed, **options)


def summed_up(asker: Asker, prices: Prices) -> str:
    """What was asked and what it took, in sentences."""
    tally, budget = asker.tally, asker.budget
    cost = prices.of(budget.prompt_tokens, budget.completion_tokens)
    failed = ", ".join(f"{count} {reason}" for reason, count in tally.failures.items())
    return (
        f"{tally.arrived:,} answers came now and {tally.from_journal:,} from the journal. Calls that failed and may "
        f"have been repeated: {failed or 'none'}. The journal holds {budget.calls:,} answers, "
        f"{budget.prompt_tokens:,} tokens of prompts and {budget.completion_tokens:,} of answers: {cost:.2f}."
    )
