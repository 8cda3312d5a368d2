"""Decompositions on disk: found once, read by every later run on the same weights and the same calibration.

A folder holds ``spectra`` (of every layer, from which any mode and budget can be allocated) and one file of components
for each mode, from which any smaller rank can be cut. Each file carries the key it was made under.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from kasa_tune.architectures import read_architecture
from kasa_tune.components.checkpoints.files import sync_folder, write_synced
from kasa_tune.components.corda.allocation import LayerSpectrum
from kasa_tune.components.linalg.decomposition import Component
from kasa_tune.methods import Method

log = logging.getLogger(__name__)

FORMAT_VERSION = 1
PARTS = ("vectors", "singular_values", "projection")


# Of the adapter and calibration sections, what a decomposition depends on; of the model section, what it does not.
ADAPTER_ALONE = ("rank", "alpha", "dropout", "edit_storage")
OPTIONS = (
    "method", "dtype", "covariance_power", "damping", "damping_search", "normalization", "concatenate", "num_samples",
    "max_seq_len", "rounds", "seed", "accumulate", "max_selection_dim",
)  # fmt: skip


UNREADABLE = (
    OSError,
    SafetensorError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    RecursionError,
)


class CacheError(ValueError):
    """A cached decomposition is damaged or belongs to another run."""


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
        name: read_architecture(value).digest if name == "checkpoint_dir" else value
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
        self.folder, self.key, self.writes = folder, json.loads(json.dumps(key)), writes
        for path in sorted(
            folder.glob("[!.]*.safetensors")
        ):  # now, and not after a pass over the calibration rows
            self._metadata(path)

    def content(self) -> str:
        """Names and sizes of the files there are, for processes to compare."""
        return " ".join(
            f"{path.name}:{path.stat().st_size}"
            for path in sorted(self.folder.glob("[!.]*.safetensors"))
        )

    def spectra(
        self, *, otherwise: Callable[[], dict[str, LayerSpectrum]]
    ) -> dict[str, LayerSpectrum]:
        """The stored spectra; where there are none, what ``otherwise`` finds, which is then stored.

        Raises:
            CacheError: the file is damaged or of another key; the message says what differs.
        """
        if read := self._read("spectra"):
            with self._well_formed("spectra"):
                return _spectra(*read)
        spectra = otherwise()
        about = {
            name: {"log_compactness": s.log_compactness, "round": s.round, "scores": s.scores}
            for name, s in spectra.items()
        }
        self._write("spectra", {name: s.singular_values for name, s in spectra.items()}, about)
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
        if read := self._read(mode):
            with self._well_formed(mode):
                stored = _components(*read)
        if not all(name in stored and stored[name].rank >= rank for name, rank in ranks.items()):
            found = {name: component.to("cpu") for name, component in otherwise().items()}
            # Under one key a shorter component is the start of a longer one: of both the longer is worth keeping.
            stored = {
                name: max(found[name], stored.get(name, found[name]), key=lambda c: c.rank)
                for name in ranks
            }
            about = {name: {"rank": c.rank, "solver": c.solver} for name, c in stored.items()}
            tensors = {
                f"{name}.{part}": getattr(c, part) for name, c in stored.items() for part in PARTS
            }
            self._write(mode, tensors, about)
            return {name: found[name] for name in ranks}
        return {name: stored[name].first(rank) for name, rank in ranks.items()}

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"

    def _write(self, name: str, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
        """All or nothing: another run may read the folder, and this one may be killed."""
        if not self.writes:
            return
        content = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        metadata = {
            "version": FORMAT_VERSION,
            "key": self.key,
            "layers": about,
            "sha256": _digest(content, about),
        }
        temporary = self._path(f".{name}.{os.getpid()}")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_synced(temporary, save(content, metadata={"decomposition": json.dumps(metadata)}))
            temporary.replace(self._path(name))
            sync_folder(self.folder)
        except (
            OSError
        ) as error:  # the run has what it needs; only later ones will have to find it again
            log.warning(
                f"The decomposition could not be kept in {self.folder} ({error}); the run goes on without."
            )
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)

    def _read(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        path = self._path(name)
        if not path.exists():
            return None
        metadata = self._metadata(path)
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
            about, intact = (
                metadata["layers"],
                _digest(tensors, metadata["layers"]) == metadata["sha256"],
            )
        except UNREADABLE as error:
            raise self._unreadable(path, error) from error
        if not intact:
            raise CacheError(f"{path} is damaged: its content is not what was written. Delete it.")
        return tensors, about

    def _metadata(self, path: Path) -> dict[str, Any]:
        """What a file says of itself, which costs its header alone; of another key it is refused."""
        try:
            with safe_open(path, framework="pt") as file:
                metadata = json.loads(file.metadata()["decomposition"])
            (
                metadata["version"],
                metadata["key"].items(),
                metadata["layers"].items(),
                metadata["sha256"],
            )
        except UNREADABLE as error:
            raise self._unreadable(path, error) from error
        self._check_key(path, metadata)
        return metadata

    @contextlib.contextmanager
    def _well_formed(self, name: str) -> Iterator[None]:
        """Reading what a file holds, which may have the right digest and another form."""
        try:
            yield
        except KeyError as error:
            lacking = ValueError(f"it lacks {error}")
            raise self._unreadable(self._path(name), lacking) from error
        except UNREADABLE as error:
            raise self._unreadable(self._path(name), error) from error

    def _unreadable(self, path: Path, error: Exception) -> CacheError:
        return CacheError(
            f"{path} is no readable decomposition ({error}). Delete it, or set another calibration.cache_dir."
        )

    def _check_key(self, path: Path, metadata: Mapping[str, Any]) -> None:
        stored = metadata["key"] if metadata["version"] == FORMAT_VERSION else {}
        wrong = [
            f"{part}: stored {stored.get(part, 'none')}, now {self.key.get(part, 'none')}"
            for part in sorted(stored.keys() | self.key.keys())
            if stored.get(part) != self.key.get(part)
        ]
        if wrong:
            raise CacheError(
                f"{path} was found under other conditions and is not used. Different: {'; '.join(wrong)}. Set "
                "another calibration.cache_dir, or delete it."
            )


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


def _digest(tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(f"{name} {tuple(tensors[name].shape)} {tensors[name].dtype} ".encode())
        digest.update(tensors[name].numpy().tobytes())
    return digest.hexdigest()


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
