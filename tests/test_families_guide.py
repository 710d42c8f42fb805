"""The guide to adding a family shows the file as it is."""

from pathlib import Path

from dpo_jax.hf.families import FAMILIES

ROOT = Path(__file__).parents[1]
GUIDE = (ROOT / "docs" / "families.md").read_text()


def test_guide_walks_through_the_file_that_there_is():
    text = (ROOT / "dpo_jax" / "hf" / "families" / "qwen3.py").read_text()
    assert f"```python\n{text}```" in GUIDE
    assert f"all {len(text.splitlines())} lines of it" in GUIDE


def test_guide_lists_every_family():
    assert not {name for name in FAMILIES if f"`{name}`" not in GUIDE}
