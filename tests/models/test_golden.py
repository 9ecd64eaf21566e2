"""The models against the numbers of the published implementations."""

import pytest
import timm
import torch

from models.build import retoken_models
from tests.helpers import golden

MODELS = {
    "groupmixformer_base": "groupmixformer_base",
    "groupmixformer_miny": "groupmixformer_mobile",
    "sgformer_s": "sgformer_small",
    "stvit_base": "stvit_base",
    "stvit_small": "stvit_small",
}
NAMES = [name for name in golden.names() if MODELS[name.rpartition("_")[0]] in retoken_models()]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_model_matches_the_published_numbers(name):
    variant, _, size = name.rpartition("_")
    golden.check_golden(timm.create_model(MODELS[variant], img_size=int(size)), name)


def test_filling_rule_equals_its_definition():
    import zlib

    name, wrap = "patch_embed.proj.0.weight", 2**64 - 1
    for i, u in enumerate(golden.units(name, 5)):
        z = ((zlib.crc32(name.encode()) << 32) + i + 1) * 0x9E3779B97F4A7C15 & wrap
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & wrap
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB & wrap
        z = z ^ (z >> 31)
        assert u == (z >> 11) / 2**53 * 2 - 1


def test_comparison_notices_a_relative_error_of_a_billionth():
    want = torch.tensor([1.0, -100.0], dtype=torch.float64)
    golden.assert_close("same", want * (1 + 0.9e-9), want)
    with pytest.raises(AssertionError, match="other"):
        golden.assert_close("other", want * (1 + 1.1e-9), want)
