"""Limits of the package that keep it easy to read; `python -m tests.support.counts` lists what is counted."""

import pytest

from tests.support import counts

COUNTS = counts.count(counts.ROOT / "dpo_jax")
LIMITS = {
    "root_modules": 18,
    "long_functions": 4,
    "many_parameters": 3,
}
USES_OF_ANY = 120
SHARE_OF_RIDDLES = 0.01


@pytest.mark.parametrize("name", LIMITS)
def test_package_stays_within_its_limits(name):
    places = getattr(COUNTS, name)
    assert len(places) <= LIMITS[name], places


def test_any_stays_rare():
    assert COUNTS.uses_of_any <= USES_OF_ANY


def test_docstrings_begin_plainly():
    assert len(COUNTS.riddles) < SHARE_OF_RIDDLES * COUNTS.docstrings, COUNTS.riddles


def test_counting_sees_what_it_counts(tmp_path):
    (tmp_path / "package").mkdir()
    for name in counts.PUBLIC:
        (tmp_path / "package" / f"{name}.py").write_text("")
    parameters = ", ".join(f"p{i}" for i in range(9))
    (tmp_path / "package" / "optim.py").write_text(f"def wide({parameters}): pass\n")
    (tmp_path / "package" / "long.py").write_text(
        '"""Of what?"""\nimport json as j\nimport numpy as np\n'
        f"class A:\n    def wide_too(self, {parameters}): pass\n    def narrow(self, {parameters[:-4]}): pass\n"
        'def long(x: Any):\n    """Takes\n\n    its time."""\n'
        + "    pass\n" * 61
        + "def short():\n"
        + "    pass\n" * 60
    )
    found = counts.count(tmp_path / "package")
    names = {field: [place.split()[1].rstrip(":") for place in getattr(found, field)] for field in found._fields[1:5]}
    assert names == {
        "long_functions": ["long"],
        "many_parameters": ["wide_too"],
        "many_parameters_public": ["wide"],
        "riddles": ["Of"],
    }
    assert len(found.root_modules) == 6 and found.docstrings == 2 and found.uses_of_any == 1
    assert [place.split(maxsplit=1)[1] for place in found.aliases] == ["json as j"]
