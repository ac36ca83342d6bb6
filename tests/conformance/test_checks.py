"""The two checks of numbers that the cookbook's source package holds."""

from __future__ import annotations

import re

import pytest

from .cookbook_for_tests import SMALL, TINY, Cookbook, Figures

WITHOUT_NETWORK = """
import runpy, sys, types, torch.autograd.forward_ad as document
import httpx
text = open(document.__file__).read()[:1500]  # the check fetches this very file of PyTorch; its installed copy is near
httpx.get = lambda url: types.SimpleNamespace(text=text, raise_for_status=lambda: None)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("model", [TINY, SMALL])
def test_logprobs_after_temperature(small: Cookbook, model: str, figures: Figures) -> None:
    """Differences of log-probs at every temperature are those at temperature 1, divided by it; and a token's do not depend on how it was drawn."""
    said = small.run(str(small.checks / "validate_temperature_logprobs.py"), f"base_model={model}", "num_trials=12")
    temperatures, steps = (
        [list(map(float, line.split())) for line in part.splitlines() if re.fullmatch(r"( +[\d.]+){5}", line)]  # N/A where all draws were one token
        for part in said.split("SEQUENCE-LEVEL")
    )
    figures("temperature, tokens, pairs, mean and greatest difference", temperatures)
    figures("length, matches, mean and greatest difference", [row[1:] for row in steps])
    assert [row[0] for row in temperatures][-5:] == [0.7, 1.0, 1.2, 1.5, 1.8]
    assert sum(row[2] for row in temperatures) > 20, "pairs of tokens"
    assert max(row[4] for row in temperatures) < 1e-3
    assert len(steps) == 1
    assert steps[0][2] > 0
    assert steps[0][4] < 1e-3


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("model", [TINY, SMALL])
def test_sampler_and_trainer_agree(small: Cookbook, model: str, figures: Figures) -> None:
    """Three steps on a document; then what the trainer says of each token is what the sampler says."""
    check = str(small.checks / "compare_sampling_training_logprobs.py")
    said = small.run("-c", WITHOUT_NETWORK, check, f'model_names=["{model}"]')
    found = re.search(r"'mse\[sample, train\]': ([\d.e-]+)", said)
    assert found is not None, said
    figures("mean square of the difference", float(found[1]))
    assert float(found[1]) < 1e-6
