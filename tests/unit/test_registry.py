"""Registries find every file of a package and hide nothing."""

from __future__ import annotations

import sys

import pytest

from megatron_prune.axes.axis import AXES
from megatron_prune.errors import InputError
from megatron_prune.families.family import FAMILIES
from megatron_prune.importance.metric import METRICS
from megatron_prune.registry import Registry


@pytest.fixture
def package(tmp_path, monkeypatch):
    """``package({"a": source, …})`` → a registry over a package of these modules."""
    made = []

    def make(modules: dict[str, str]) -> Registry:
        name = f"found_by_registry_{tmp_path.name}"
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(
            f"from megatron_prune.registry import Registry\nTHINGS = Registry('thing', {name!r})\n"
        )
        for module, source in modules.items():
            (tmp_path / name / f"{module}.py").write_text(f"from {name} import THINGS\n{source}\n")
        monkeypatch.syspath_prepend(str(tmp_path))
        made.append(name)
        return __import__(name).THINGS

    yield make
    for module in [m for m in sys.modules if m.split(".")[0] in made]:
        del sys.modules[module]


def test_one_file_is_one_entry_and_none_is_imported_before_it_is_needed(package):
    things = package({"b": "THINGS.register('bee')(2)", "a": "@THINGS.register('cee')\ndef f(): return 3"})
    assert not [m for m in sys.modules if m.startswith("found_by_registry_") and m.endswith((".a", ".b"))]
    assert things.names() == ["bee", "cee"]
    assert things.get("bee") == 2 and things.get("cee")() == 3


def test_an_unknown_name_is_answered_with_the_nearest_and_all_known_ones(package):
    things = package({"a": "THINGS.register('magnitude')(1)\nTHINGS.register('random')(2)"})
    with pytest.raises(InputError) as error:
        things.get("magnitud")
    assert "unknown thing 'magnitud'; did you mean 'magnitude'?" in str(error.value)
    assert "one of magnitude, random" in str(error.value)
    with pytest.raises(InputError) as error:
        things.get("zzz")
    assert "did you mean" not in str(error.value)


def test_an_import_error_in_a_scanned_file_is_raised_every_time(package):
    things = package({"a": "THINGS.register('fine')(1)", "b": "import no_such_module_anywhere"})
    for _ in range(2):
        with pytest.raises(ModuleNotFoundError, match="no_such_module_anywhere"):
            things.names()


def test_two_entries_of_one_name_are_refused(package):
    things = package({"a": "THINGS.register('same')(1)", "b": "THINGS.register('same')(2)"})
    with pytest.raises(RuntimeError, match="thing 'same' is registered twice"):
        things.names()


def test_the_decorator_gives_back_what_it_registers():
    marker = object()
    assert Registry("thing", "none").register("x")(marker) is marker


def test_the_projects_own_registries_hold_what_is_documented():
    assert AXES.names() == ["ffn", "head", "hidden", "kv_head", "layer"]
    assert {"llama", "mistral", "qwen2", "qwen3"} <= set(FAMILIES.names())
    assert {"magnitude", "random"} <= set(METRICS.names())


@pytest.mark.parametrize(
    "registry, name, near", [(METRICS, "magntude", "magnitude"), (FAMILIES, "qwen", "qwen[23]"), (AXES, "heads", "head")]
)
def test_a_misspelt_name_is_answered_with_the_meant_one(registry, name, near):
    with pytest.raises(InputError, match=f"did you mean '{near}'"):
        registry.get(name)
