"""What pre-training tells before it runs."""

import jax
import pytest
from PIL import Image

from configs import small_photos
from mae_jax.objectives.pretrain import Pretraining
from tests.meshes import device_mesh


@pytest.mark.parametrize(
    "folders, told",
    [(("leaf", "sky"), "2: leaf, sky"), (("",), "none, which leaves k-NN and the linear probe out")],
)
def test_the_summary_names_the_classes_or_says_that_there_are_none(folders, told, tmp_path):
    for name in folders:
        (tmp_path / name).mkdir(exist_ok=True)
        for number in range(4):
            Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / name / f"{number}.png")
    config = small_photos.get_config()
    config.data.update(path=str(tmp_path), eval_fraction=0.25, batch_size=2)
    objective = Pretraining(config, tmp_path / "run", device_mesh(1))
    assert objective.describe(jax.eval_shape(objective.init, jax.random.key(0)))["classes"] == told
