"""Every recorded reference file, run by its `case` in both numerics modes."""

import importlib
import pathlib
import pkgutil

import golden_cases
import goldens
import numpy as np
import pytest
from golden_cases import CASES

for module in pkgutil.iter_modules(golden_cases.__path__):
    importlib.import_module(f"golden_cases.{module.name}")


def test_the_folder_holds_goldens():
    assert goldens.files(), f"no *.safetensors in {goldens.FOLDER}"


@pytest.mark.parametrize("numerics", ["reference", "exact"])
@pytest.mark.parametrize("path", goldens.files(), ids=lambda p: p.stem)
def test_golden(path: pathlib.Path, numerics: str):
    golden = goldens.load(path)
    wanted = {
        name: goldens.bound(golden, name, numerics)
        for name in golden.outputs
        if not name.startswith("debug.")
    }
    assert golden.case in CASES, f"unknown case {golden.case!r} in {path.name}"
    got = CASES[golden.case](golden, numerics)
    failures = []
    for name, (metric, bound) in wanted.items():
        if bound is None:
            continue
        assert name in got, f"{golden.case} gives no output {name}"
        error = goldens.error(metric, np.asarray(got[name]), golden.outputs[name])
        if not error <= bound:
            failures.append(f"{name}: {metric} error {error:.3g}, bound {bound:g}")
    assert not failures, "\n".join(failures)
