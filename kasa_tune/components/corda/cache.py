"""Decompositions on disk: found once, read by every later run on the same weights and the same calibration.

A folder holds ``spectra`` (of every layer, from which any mode and budget can be allocated) and one file of components
for each mode, from which any smaller rank can be cut. Each file carries the key it was made under. While they are
searched for, what has been found waits in a folder ``<name>.unfinished-<key>``.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from kasa_tune.architectures.encoder import digest_of
from kasa_tune.components.checkpoints.files import write_synced
from kasa_tune.components.corda.allocation import LayerSpectrum
from kasa_tune.components.corda.cache_files import CacheError, KeyedFiles
from kasa_tune.components.linalg.decomposition import Component
from kasa_tune.methods import Method

log = logging.getLogger(__name__)

PARTS = ("vectors", "singular_values", "projection")


# Of the adapter and calibration sections, what a decomposition depends on; of the model section, what it does not.
ADAPTER_ALONE = ("rank", "alpha", "dropout", "edit_storage", "num_labels", "train_pooler")
OPTIONS = (
    "method", "dtype", "covariance_power", "damping", "damping_search", "normalization", "concatenate", "num_samples",
    "max_seq_len", "rounds", "seed", "accumulate", "max_selection_dim",
)  # fmt: skip


def decomposition_key(
    base: str, layers: Iterable[str], data: str | None, options: Mapping[str, Any]
) -> dict[str, Any]:
    """All that a decomposition depends on besides mode and ranks.

    Args:
        base: fingerprint of the base weights.
        layers: names of the adapted linears.
        data: digest of the calibration rows; None where there is no calibration.
        options: the adapter and calibration sections, of which OPTIONS count, the base's ``dtype`` and the ``model``
            section, whose constants decide what the layers' inputs are.
    """
    names = hashlib.sha256("\n".join(sorted(layers)).encode()).hexdigest()[:12]
    counting = OPTIONS if data is not None else ("method", "dtype")
    key = {"base weights": base, "calibration data": data, "adapted layers": names}
    key["model"] = {
        name: digest_of(value) if name == "checkpoint_dir" else value
        for name, value in options["model"].items()
        if name not in ADAPTER_ALONE
    }
    return key | {name: options[name] for name in counting}


def open_cache(
    cfg: DictConfig,
    method: Method,
    *,
    base: str,
    layers: Iterable[str],
    data: str | None,
    writes: bool = True,
) -> DecompositionCache:
    """The cache of a config's decomposition. Methods that decompose in the same way share it.

    Args:
        cfg: the checked config of a recipe with a section ``calibration``.
        method: its row of the table.
        base: fingerprint of the base weights.
        layers: names of the adapted linears.
        data: digest of the calibration rows; None where there is no calibration.
        writes: whether this process writes what is found; of several, one does.

    Raises:
        CacheError: a file in ``calibration.cache_dir`` is damaged or of another decomposition.
    """
    model = OmegaConf.to_container(cfg.model)
    options = {**cfg.adapter, **cfg.calibration, "dtype": cfg.dtype, "model": model}
    options["method"] = method.decomposition
    key = decomposition_key(base, layers, data, options)
    return DecompositionCache(Path(cfg.calibration.cache_dir), key, writes=writes)


class DecompositionCache:
    """Spectra and components of one model under one key.

    Args:
        folder: made when something is written.
        key: from :func:`decomposition_key`.
        writes: whether this process writes what is found; of several, one does.

    Raises:
        CacheError: a file in the folder is damaged or of another key; the message says what differs.
    """

    def __init__(self, folder: Path, key: Mapping[str, Any], *, writes: bool = True) -> None:
        self.files, self.writes = KeyedFiles(folder, key), writes
        self.files.check()  # now, and not after a pass over the calibration rows

    def content(self) -> str:
        """Names and sizes of the files there are, for processes to compare."""
        folder = self.files.folder
        paths = [self.files.path(name) for name in self.files.names()]
        paths += sorted(folder.glob("*.unfinished-*/[!.]*.safetensors"))
        return " ".join(f"{path.relative_to(folder)}:{path.stat().st_size}" for path in paths)

    def spectra(
        self, *, otherwise: Callable[[], dict[str, LayerSpectrum]]
    ) -> dict[str, LayerSpectrum]:
        """The stored spectra; where there are none, what ``otherwise`` finds, which is then stored.

        Raises:
            CacheError: the file is damaged or of another key; the message says what differs.
        """
        if read := self.files.read("spectra"):
            with self.files.well_formed("spectra"):
                return _spectra(*read)
        spectra = otherwise()
        self._write("spectra", *_of_spectra(spectra))
        return spectra

    def components(
        self, mode: str, ranks: Mapping[str, int], *, otherwise: Callable[[], dict[str, Component]]
    ) -> dict[str, Component]:
        """The stored components of a mode, cut to ``ranks``; where there are none or of smaller ranks, what
        ``otherwise`` finds, which is then stored. On the CPU, in the order of ``ranks``.

        Raises:
            CacheError: the file is damaged or of another key; the message says what differs.
        """
        stored: dict[str, Component] = {}
        if read := self.files.read(mode):
            with self.files.well_formed(mode):
                stored = _components(*read)
        if not all(name in stored and stored[name].rank >= rank for name, rank in ranks.items()):
            found = {name: component.to("cpu") for name, component in otherwise().items()}
            # Under one key a shorter component is the start of a longer one: of both the longer is worth keeping.
            stored = {
                name: max(found[name], stored.get(name, found[name]), key=lambda c: c.rank)
                for name in ranks
            }
            self._write(mode, *_of_components(stored))
            return {name: found[name] for name in ranks}
        return {name: stored[name].first(rank) for name, rank in ranks.items()}

    def unfinished(self, name: str) -> Unfinished:
        """What a search that was stopped has found so far.

        Args:
            name: ``spectra``, or a mode. What is found is dropped when that file is written.
        """
        key = json.dumps(self.files.key, sort_keys=True).encode()
        folder = f"{name}.unfinished-{hashlib.sha256(key).hexdigest()[:12]}"
        files = KeyedFiles(self.files.folder / folder, self.files.key)
        return Unfinished(files, writes=self.writes)

    def _write(self, name: str, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
        if not self.writes:
            return
        try:
            self.files.write(name, tensors, about)
        except (
            OSError
        ) as error:  # the run has what it needs; only later ones will have to find it again
            log.warning(
                f"The decomposition could not be kept in {self.files.folder} ({error}); the run goes on without."
            )
            return
        self.unfinished(name).drop()


class Unfinished:
    """Results of a search over all layers that has not ended, each in a file of its own. A search that is stopped, by
    whatever, goes on from them.

    Args:
        files: in a folder of their own.
        writes: whether this process writes what is found; of several, one does.
    """

    def __init__(self, files: KeyedFiles, *, writes: bool) -> None:
        self._files, self._writes = files, writes

    def spectra(self) -> list[dict[str, LayerSpectrum]]:
        """The spectra found so far, in the order of the rounds."""
        found = self._read(_spectra)
        return sorted(found, key=lambda spectra: min(s.round for s in spectra.values()))

    def components(self) -> dict[str, Component]:
        """The components found so far, by layer."""
        return {name: part for found in self._read(_components) for name, part in found.items()}

    def keep_spectra(self, found: Mapping[str, LayerSpectrum]) -> None:
        """Store the spectra of layers in one round."""
        name, spectrum = next(iter(found.items()))
        self._write(f"round_{spectrum.round}_{name}", *_of_spectra(found))

    def keep_component(self, name: str, component: Component) -> None:
        """Store the component of a layer."""
        self._write(name, *_of_components({name: component}))

    def drop(self) -> None:
        """Delete what was found."""
        shutil.rmtree(self._files.folder, ignore_errors=True)

    def _write(self, name: str, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
        if not self._writes:
            return
        try:
            self._files.write(name, tensors, about)
        except OSError as error:
            log.warning(
                f"What has been decomposed could not be kept in {self._files.folder} ({error}); if the run is "
                "stopped now, it starts over."
            )
            self._writes = False

    def _read(self, content: Callable[..., dict[str, Any]]) -> list[dict[str, Any]]:
        """The content of every file. A damaged one is as good as none: its layers are decomposed again."""
        found = []
        for name in self._files.names():
            try:
                if read := self._files.read(name):
                    with self._files.well_formed(name):
                        found.append(content(*read))
            except CacheError as error:
                log.warning(f"{error} Its layers are decomposed again.")
        return [each for each in found if each]


def _of_spectra(
    spectra: Mapping[str, LayerSpectrum],
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    about = {
        name: {"log_compactness": s.log_compactness, "round": s.round, "scores": s.scores}
        for name, s in spectra.items()
    }
    return {name: s.singular_values for name, s in spectra.items()}, about


def _of_components(
    components: Mapping[str, Component],
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    about = {name: {"rank": c.rank, "solver": c.solver} for name, c in components.items()}
    tensors = {
        f"{name}.{part}": getattr(c, part) for name, c in components.items() for part in PARTS
    }
    return tensors, about


def _spectra(tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> dict[str, LayerSpectrum]:
    spectra = {}
    for name, layer in about.items():
        values, scores = tensors[name], tuple(layer["scores"])
        numbers = (layer["log_compactness"], layer["round"], *scores)
        if values.ndim != 1 or not all(isinstance(number, int | float) for number in numbers):
            raise ValueError(f"{name} is no spectrum")
        spectra[name] = LayerSpectrum(values, layer["log_compactness"], layer["round"], scores)
    return spectra


def _components(tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> dict[str, Component]:
    components = {}
    for name, layer in about.items():
        vectors, values, projection = (tensors[f"{name}.{part}"] for part in PARTS)
        ranks = {vectors.shape[1:], values.shape, projection.shape[:1]}
        if len(ranks) > 1 or projection.ndim != 2:
            raise ValueError(f"the shapes of {name} do not fit each other")
        components[name] = Component(vectors, values, projection, layer["solver"])
    return components


def write_decomposition(
    path: Path,
    components: Mapping[str, Component],
    spectra: Mapping[str, LayerSpectrum] | None,
    *,
    mode: str,
) -> None:
    """What was chosen, as JSON for people and plots.

    Per layer ``rank``, ``solver``, ``singular_values`` (of the adapted components; where spectra were taken, of all)
    and, for CorDA++, ``round``, ``scores`` of all rounds and ``log_compactness``.
    """
    layers = {}
    for name, component in components.items():
        values = component.singular_values
        layers[name] = {"rank": len(values), "solver": component.solver}
        if spectra:
            found = spectra[name]
            values = found.singular_values
            layers[name] |= {
                "round": found.round,
                "scores": found.scores,
                "log_compactness": found.log_compactness,
            }
        layers[name]["singular_values"] = values.tolist()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    write_synced(temporary, json.dumps({"mode": mode, "layers": layers}, indent=1).encode())
    temporary.replace(path)
