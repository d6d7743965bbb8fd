"""What errors say: in one line, with names that a terminal only shows, and what to do where memory ran out."""

import jax.numpy as jnp
import numpy as np
import pytest

from mae_jax.runtime.errors import NotSaved, UserError, complain, escaped, out_of_memory


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("cat.png", "cat.png"),
        ("Käfer \u3000 猫 🐈‍⬛ نمی\u200cخواهم.png", "Käfer \u3000 猫 🐈‍⬛ نمی\u200cخواهم.png"),
        ("\x1b[2Jcat", r"\x1b[2Jcat"),
        ("a\nerror: b\rc\td\x00\x7f\x9b", r"a\nerror: b\rc\td\x00\x7f\x9b"),
        ("gpj\u202egnp.exe", r"gpj\u202egnp.exe"),
        ("a\u2028b\u200bc\ufeffd", r"a\u2028b\u200bc\ufeffd"),
        (b"caf\xe9".decode(errors="surrogateescape"), r"caf\xe9"),
        ("\ud800", r"\ud800"),
        (r"C:\new", r"C:\new"),
    ],
)
def test_what_controls_a_terminal_is_escaped_and_other_names_stay_as_they_are(name, shown):
    assert escaped(name) == shown and escaped(shown) == shown


@pytest.mark.parametrize("kind", [UserError, NotSaved])
def test_the_message_of_an_error_for_the_user_is_one_line_whatever_the_names_in_it(kind):
    assert str(kind("there is no class \x1b[31mcat\n")) == r"there is no class \x1b[31mcat\n"
    assert isinstance(UserError("a"), ValueError) and isinstance(NotSaved("a"), RuntimeError)


def test_a_complaint_is_one_line(capsys):
    complain("error: a\r\nb\udcff")
    assert capsys.readouterr().err == "error: a\\r\\nb\\xff\n"


@pytest.mark.parametrize("make", [lambda: np.empty(2**50), lambda: jnp.zeros(2**45).block_until_ready()])
def test_of_memory_that_runs_out_one_line_says_so_and_what_needs_less(make):
    with pytest.raises((MemoryError, RuntimeError)) as error:
        make()
    training, measuring = (out_of_memory(error.value, trains=trains) for trains in (True, False))
    for text in (training, measuring):
        assert text.startswith("out of memory (") and "evaluate.batch_size" in text and "\n" not in text
    for setting in ("data.batch_size", "train.accumulate_steps", "model.remat"):
        assert setting in training and setting not in measuring


def test_other_errors_are_not_taken_for_a_lack_of_memory():
    for error in (RuntimeError("INTERNAL"), ValueError("RESOURCE_EXHAUSTED"), KeyboardInterrupt()):
        assert out_of_memory(error, trains=True) is None
