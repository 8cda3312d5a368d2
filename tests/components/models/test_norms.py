"""torchtune's RMS norm as one operation of torch, against the formula in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torchtune.models import llama3
from torchtune.modules import RMSNorm

from kasa_tune.components.models.loading import build_on_meta
from kasa_tune.components.models.norms import FusedRMSNorm, fuse_norms
from tests.tolerances import assert_rounding_only
from tests.toy_models import SIZES


class Norms(TorchFunctionMode):
    """Keeps the dtypes of the inputs and weights that torch's RMS norm is given."""

    def __init__(self):
        super().__init__()
        self.dtypes = set()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.rms_norm:
            self.dtypes.add((args[0].dtype, kwargs["weight"].dtype))
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_is_the_formula_and_torch_can_fuse_it(dtype):
    torch.manual_seed(0)
    norm = RMSNorm(16, eps=1e-3).to(dtype)
    torch.nn.init.normal_(norm.scale)
    x = torch.randn(2, 5, 16).to(dtype)
    assert type(fuse_norms(norm)) is FusedRMSNorm
    with Norms() as norms:
        y = norm(x)
    wide = x.double()
    expected = norm.scale.double() * wide / (wide.square().mean(-1, keepdim=True) + 1e-3).sqrt()
    assert_rounding_only(y, expected, expected.abs(), dtype)
    assert norms.dtypes == {(dtype, dtype)}  # or a GPU takes eight kernels for it


def test_a_model_that_is_built_has_such_norms_under_the_same_names():
    model = build_on_meta(lambda: llama3.llama3(**SIZES), dtype=torch.float32)
    assert {type(m) for m in model.modules() if isinstance(m, RMSNorm)} == {FusedRMSNorm}
    with torch.device("meta"):
        assert list(llama3.llama3(**SIZES).state_dict()) == list(model.state_dict())
