import pytest

from lorakit import errors
from lorakit.errors import ConfigError, LorakitError, bullet_list, nearest

CLASSES = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)]


@pytest.mark.parametrize("kind", CLASSES)
def test_every_error_is_caught_as_one_kind_and_says_what_it_is_for(kind):
    assert issubclass(kind, LorakitError)
    assert kind.__doc__
    assert str(kind("what, where")) == "what, where"


@pytest.mark.parametrize(
    ("kind", "standard"),
    [
        ("ConfigError", ValueError),
        ("DataError", ValueError),
        ("FileError", OSError),
        ("MissingDependencyError", ImportError),
    ],
)
def test_errors_are_also_what_python_calls_them(kind, standard):
    assert issubclass(getattr(errors, kind), standard)


@pytest.mark.parametrize(
    ("name", "known", "expected"),
    [
        ("lerning_rate", ["learning_rate", "seed"], ["learning_rate"]),
        ("Q_PROJ", ["q_proj", "k_proj", "gate"], ["q_proj", "k_proj"]),
        ("zzz", ["learning_rate"], []),
        ("a", [], []),
    ],
)
def test_nearest(name, known, expected):
    assert nearest(name, known) == expected


def test_nearest_gives_at_most_as_many_as_asked():
    assert len(nearest("layer1", [f"layer{i}" for i in range(9)], count=2)) == 2


def test_nearest_keeps_names_apart_that_differ_in_case_only():
    assert set(nearest("proj", ["Proj", "proj"])) == {"Proj", "proj"}


def test_bullet_list_says_how_many_it_leaves_out():
    assert bullet_list(["a", "b"]) == "  - a\n  - b"
    assert bullet_list([str(i) for i in range(25)]).endswith("  - 19\n  ... and 5 more")


def test_listing_keeps_each_problem():
    error = ConfigError.listing("run.yaml", ["a is bad", "b is worse"])
    assert str(error) == "run.yaml: 2 problems:\n  - a is bad\n  - b is worse"
    assert error.problems == ("a is bad", "b is worse")
    assert str(ConfigError.listing("x", ["a"])).startswith("x: 1 problem:")
