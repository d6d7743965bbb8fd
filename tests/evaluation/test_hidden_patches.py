"""Masks by hand from files: evaluate.mask."""

import jax
import numpy as np
import pytest

from configs import digits
from mae_jax.data.augment import normalize
from mae_jax.data.sources import Digits
from mae_jax.evaluation import autoencoder
from mae_jax.evaluation.evaluator import Trained, read_masks
from mae_jax.models.mae import make_bind
from mae_jax.runtime.errors import UserError
from mae_jax.tasks import check_task
from tests.evaluation.test_suite import make_suite
from tests.reference import random_params

GRID = 2, 3
ONE = np.array([[1, 0, 1], [0, 1, 1]])
CODE = """
import numpy as np

def stripes(number, grid):
    return np.roll(np.arange(grid[0] * grid[1]) % 3 > 0, number).reshape(grid)

def turned(number, grid):
    return stripes(number, grid).T

def fails(number, grid):
    return 1 / number

def refuses(number, grid):
    raise ValueError("not today")

constant = np.array([1, 0, 1, 0, 1, 1])
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("masks: by hand")
    (folder / "masks.py").write_text(CODE)
    (folder / "broken.py").write_text("def f(:\n")
    (folder / "undefined.py").write_text("x = unknown\n")
    (folder / "empty.npy").write_bytes(b"")
    np.save(folder / "one.npy", ONE)
    np.save(folder / "each.npy", np.stack([ONE, ONE[::-1]]))
    np.save(folder / "pickled.npy", np.array([ONE, None], object), allow_pickle=True)
    np.save(folder / "unequal.npy", np.stack([ONE, 0 * ONE]))
    return folder


@pytest.mark.parametrize(
    "name, expected",
    [
        ("one.npy", np.stack([ONE, ONE])),
        ("each.npy", np.stack([ONE, ONE[::-1]])),
        ("masks.py:stripes", np.array([[[0, 1, 1]] * 2, [[1, 0, 1]] * 2])),
        ("masks.py:constant", np.array([[1, 0, 1, 0, 1, 1]] * 2)),
    ],
)
def test_masks_are_read_from_arrays_and_functions_in_files(folder, name, expected):
    found, visible = read_masks(f"{folder}/{name}", 2, GRID)
    assert visible == 2
    np.testing.assert_array_equal(found, expected.reshape(2, 6) > 0)


REFUSED = {
    "missing.npy": r"cannot be used \(.*No such file.*\); give FILE.npy,? or FILE.py:FUNCTION",
    "missing.py:stripes": "cannot be used .*No such file",
    "masks.py:spots": "cannot be used .*KeyError: 'spots'",
    "masks.py": "cannot be used .*give FILE.npy,? or FILE.py:FUNCTION",
    "broken.py:f": "cannot be used .*SyntaxError",
    "undefined.py:f": "cannot be used .*NameError: name 'unknown' is not defined",
    "pickled.npy": "cannot be used .*allow_pickle=False",  # to unpickle is to run what the file says
    "empty.npy": "cannot be used .*No data left in file",
    "masks.py:fails": "cannot be used .*ZeroDivisionError: division by zero",
    "masks.py:refuses": "cannot be used .*not today",
    "masks.py:turned": r"shape \(3, 2\) for image 0",
    "unequal.npy": "leave 2 to 6 of 6 patches visible",
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_that_is_no_mask_is_refused_in_one_line_that_names_it(folder, name):
    with pytest.raises(UserError, match=REFUSED[name]) as error:
        read_masks(f"{folder}/{name}", 2, GRID)
    assert str(error.value).startswith(f"evaluate.mask={folder}/{name}") and "\n" not in str(error.value)


def test_a_mask_and_a_mask_ratio_of_the_evaluation_are_refused_together():
    config = digits.get_config()
    config.evaluate.update(mask="masks.npy", mask_ratio=0.5)
    with pytest.raises(UserError, match="evaluate.mask_ratio=0.5 cannot be given with evaluate.mask=masks.npy"):
        check_task(config)


# --------------------------------------------------------------------------------------------- in the evaluation


@pytest.fixture(scope="module")
def pictures():
    """uint8 [360, 8, 8, 1]: the digits that are evaluated."""
    source = Digits("eval")
    return np.stack([source[i]["image"] for i in range(len(source))])


@pytest.fixture(scope="module")
def numbered(tmp_path_factory):
    """A file with a mask of its own for each of the 360 digits: 16 bits that are drawn from its number."""
    path = tmp_path_factory.mktemp("numbered") / "masks.npy"
    order = np.random.default_rng(0).random((360, 16)).argsort(1)
    np.save(path, (order < 12).reshape(360, 4, 4))
    return path


def test_the_loss_is_that_of_each_images_own_mask_for_any_batch_size_and_number_of_devices(numbered, pictures):
    data, masks = make_suite("loss", mask=str(numbered)).data, np.load(numbered)
    params = random_params(data.model)
    state, model = Trained(0, params, "step 0"), make_bind(data.model)(params)
    images = normalize(pictures, data.config.data)
    losses = np.asarray(jax.jit(lambda x: model(x, mask=masks).example_loss)(images), np.float64)
    for devices, batch_size in ((1, 360), (8, 104)):
        suite = make_suite("loss", devices=devices, mask=str(numbered), batch_size=batch_size)
        assert suite.run(state)[0]["loss"] == pytest.approx(losses.mean(), rel=1e-6)  # sums in another order
    # Of a subset, the masks of the file are its images', in their order.
    np.save(numbered.with_name("fifty.npy"), masks[:50])
    suite = make_suite("loss", mask=str(numbered.with_name("fifty.npy")), max_examples=50)
    expected = jax.jit(lambda x: model(x, mask=masks[:50]).loss)(images[suite.data.evaluation.indices])
    assert suite.run(state)[0]["loss"] == pytest.approx(float(expected), rel=1e-6)


def test_the_pictures_drawn_are_hidden_by_the_masks_of_those_images(numbered, pictures, monkeypatch):
    drawn = []
    monkeypatch.setattr(autoencoder, "draw_reconstructions", lambda *x: drawn.append(x) or np.zeros((2, 2, 3)))
    suite = make_suite("reconstructions", mask=str(numbered), pictures=5)
    suite.run(Trained(0, random_params(suite.data.model), "step 0"))
    ((images, found, caption, _),) = drawn
    assert caption.startswith("step 0; 75% of the patches hidden, as given")
    hidden = np.load(numbered).repeat(2, axis=1).repeat(2, axis=2)
    for image, visible in zip(images, found.visible[..., 0], strict=True):
        number = np.abs(pictures / 255 - image).max((1, 2, 3)).argmin()
        assert np.abs(pictures[number] / 255 - image).max() < 1e-6
        np.testing.assert_array_equal(visible, ~hidden[number])


def test_masks_of_another_number_of_images_are_refused_before_anything_runs(numbered):
    with pytest.raises(UserError, match=r"mask of shape \(360, 4, 4\): one of \(16,\), \(4, 4\), \(100, 16\)"):
        make_suite("loss", mask=str(numbered), max_examples=100)
