"""Each encoder of text that is served without ``modules.json`` gives the mean that transformers gives, also
beside longer texts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

from dumont import models
from tests.helpers.architectures import tiny_encoder
from tests.unit.model_host.test_sentence import load, said
from tests.unit.model_host.tiny_models import VOCABULARY, save

TEXTS = [[5], [9, 3, 4], [(37 * place) % (VOCABULARY - 2) + 2 for place in range(90)], [60, 9]]


@pytest.fixture(autouse=True, scope="module")
def quiet() -> None:
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()


@pytest.mark.parametrize("kind", sorted(models.ENCODERS))
@torch.inference_mode()
def test_an_encoder_gives_the_mean_that_transformers_gives(kind: str, tmp_path: Path) -> None:
    # given a tiny model
    model_class: Any = getattr(transformers, str(MODEL_MAPPING_NAMES[kind]))
    torch.manual_seed(3)
    save(model_class(tiny_encoder(kind)).eval(), tmp_path)
    model: Any = model_class.from_pretrained(tmp_path).eval()

    # when short and long texts are embedded together
    found = torch.tensor(said(load(tmp_path), TEXTS))

    # then each has the vector that it has alone
    for vector, text in zip(found, TEXTS, strict=True):
        right = model(torch.tensor([text])).last_hidden_state[0].float().mean(0)
        assert float((vector - right).norm()) < 1e-3 * float(right.norm())
