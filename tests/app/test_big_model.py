"""A student of Stable Diffusion's build, made from configurations: stock diffusers draws what ours draws."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fewstep.app.bench.big_model import Shape, build
from fewstep.app.bench.contender import peer_contenders
from fewstep.app.bench.peer_worker import open_peer
from fewstep.app.bench.subjects import Subject, save_inputs
from fewstep.runtime.pipeline import Pipeline

TINY = Shape(latent=8, channels=(16, 32), decoder_channels=(16, 16), heads=2, width=64, layers=1, groups=8)


# The versions of diffusers that optimum takes know no other name.
@pytest.mark.filterwarnings("ignore:`torch_dtype` is deprecated:FutureWarning")
@pytest.mark.parametrize("decoder", ["kl", "tiny"])
def test_stock_diffusers_draws_what_ours_draws(decoder: str, tmp_path: Path) -> None:
    model, inputs, threads = tmp_path / "model", tmp_path / "inputs.npz", torch.get_num_threads()
    build(model, decoder, TINY)
    assert all(name.startswith("text_model.") for name in load_file(model / "text_encoder" / "model.safetensors"))
    subject = Subject("big", "big", "", (2,), build, together=False, holds_text=False)
    save_inputs(subject, model, inputs)
    stock = next(peer_contenders(subject, model, inputs, tmp_path, threads))
    wanted, prompts = open_peer(dict(stock.job)), subject.prompts(2, 1)
    pixels = Pipeline.from_pretrained(model, "torch").generate(prompts, seed=[0, 1]).arrays
    assert pixels.shape == (2, 16, 16, 3)
    difference = pixels.astype(int) - wanted(prompts)
    assert np.abs(difference).max() <= 1  # ours rounds halves up, diffusers to even
    assert pixels.std() > 20  # not grey, where anything would agree
