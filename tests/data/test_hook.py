import numpy as np
import pytest

from idlora_jax.data import hook
from idlora_jax.data.rejection import Rejection

WAVE = np.full((2, 100), 0.5, np.float32)


def test_a_hook_is_found_in_the_working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_cleaner.py").write_text("def f(wave, rate):\n    return wave\n")
    np.testing.assert_array_equal(
        hook.cleaned(hook.load("my_cleaner:f"), WAVE, 16000, "a"), WAVE
    )


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("numpy", "expected module:function"),
        ("numpy:", "expected module:function"),
        ("no_such_module_here:f", "cannot be imported .*no_such_module_here"),
        ("numpy:no_such_function", "cannot be imported .*no_such_function"),
        ("numpy:pi", "numpy:pi is a float, expected a function"),
    ],
)
def test_what_is_no_hook_is_refused(name, message):
    with pytest.raises(ValueError, match=message):
        hook.load(name)


def test_a_hook_may_write_into_its_argument():
    def halved(wave, rate):
        wave /= 2
        return wave.astype(np.float64)

    made = hook.cleaned(halved, WAVE, 16000, "a")
    assert made.dtype == np.float32 and made.max() == 0.25 and WAVE.max() == 0.5


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda w, r: None, "it returned NoneType for a, expected an array of shape"),
        (lambda w, r: w[:, :50], r"it returned shape \[2, 50\] for a"),
        (lambda w, r: w.astype(np.int16), "it returned int16 for a, expected floats"),
        (lambda w, r: 1 / 0, "it failed on a .ZeroDivisionError"),
    ],
)
def test_a_wrong_result_stops_with_what_is_wrong(made, message):
    with pytest.raises(ValueError, match=message) as error:
        hook.cleaned(made, WAVE, 16000, "a")
    assert not isinstance(error.value, Rejection)


@pytest.mark.parametrize(("factor", "kind"), [(0, "silent"), (np.nan, "not finite")])
def test_what_leaves_nothing_of_a_voice_rejects_it(factor, kind):
    with pytest.raises(Rejection) as error:
        hook.cleaned(lambda w, r: w * np.float32(factor), WAVE, 16000, "a")
    assert error.value.kind == kind
