"""Options from a TOML file and from flags."""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alphaext.commands.options import Options, add_flags, from_flags, option, read_config


@dataclass(frozen=True, kw_only=True)
class Shared(Options):
    section: ClassVar[str] = ""
    seed: int = option(0, help="of everything")
    features: Path = option(help="a folder")


@dataclass(frozen=True, kw_only=True)
class Cook(Shared):
    section: ClassVar[str] = "cook"
    heat: float = option(0.5, help="how hot, 0% to 100%")
    dishes: tuple[str, ...] = option(("soup",), help="what to cook")
    times: tuple[int, ...] | None = option(None, help="how long")
    style: str = option("slow", choices=("slow", "fast"), help="how")
    salt: bool = option(False, help="add salt")
    recipe: Path | None = option(None, help="a file")


@dataclass(frozen=True, kw_only=True)
class Serve(Shared):
    section: ClassVar[str] = "serve"
    guests: tuple[Path, ...] = option(positional=True, help="who comes")
    main: str | None = option(None, positional=True, help="who pays")


def parse(cls, *arguments):
    parser = argparse.ArgumentParser()
    add_flags(parser, cls)
    return vars(parser.parse_args(arguments))


def write(tmp_path, text):
    path = tmp_path / "kitchen.toml"
    path.write_text(text, encoding="utf-8")
    return path


FILE = """
features = "features"
[cook]
heat = 1
dishes = ["stew", "pie"]
times = 3
salt = true
recipe = "stew.txt"
[serve]
guests = ["ann", "/home/bob"]
"""


def test_flags_go_over_the_file_and_the_file_over_defaults(tmp_path):
    config = read_config(write(tmp_path, FILE), [Cook, Serve])
    options = from_flags(Cook, parse(Cook, "--heat", "0.25", "--no-salt", "--features", "there"), config)
    assert options.heat == 0.25 and options.salt is False and options.features == Path("there")
    assert options.dishes == ("stew", "pie") and options.times == (3,) and options.style == "slow" and options.seed == 0
    assert options.recipe == tmp_path / "stew.txt"


def test_one_file_serves_all_commands(tmp_path):
    config = read_config(write(tmp_path, FILE), [Cook, Serve])
    options = from_flags(Serve, parse(Serve), config)
    assert options.guests == (tmp_path / "ann", Path("/home/bob")) and options.features == tmp_path / "features"
    given = from_flags(Serve, parse(Serve, "eve", "--features", "f"), config)
    assert given.guests == (Path("eve"),) and given.main is None


def test_names_that_stand_where_data_sets_may_stand_are_no_paths(tmp_path):
    @dataclass(frozen=True, kw_only=True)
    class Data(Options):
        section: ClassVar[str] = "data"
        train: Path = option(help="a data set")

    text = '[data]\ntrain = "cifar100:train"\n[cook]\nrecipe = "run:1"'
    config = read_config(write(tmp_path, text), [Cook, Data])
    assert config["data"]["train"] == Path("cifar100:train") and config["cook"]["recipe"] == tmp_path / "run:1"


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("[cok]\nheat = 1", ValueError, "unknown section [cok]; did you mean 'cook'?"),
        ("[cook]\nheats = 1", ValueError, "unknown key 'heats' in section [cook]; did you mean 'heat'?"),
        ("sede = 1", ValueError, "unknown key 'sede' at its top; did you mean 'seed'?"),
        ("heat = 1", ValueError, "unknown key 'heat' at its top; known are features, seed"),
        ("[cook]\nheat = 'hot'", TypeError, "heat in [cook] must be a number, got 'hot'"),
        ("[cook]\nheat = true", TypeError, "heat in [cook] must be a number, got True"),
        ("[cook]\nsalt = 1", TypeError, "salt in [cook] must be true or false, got 1"),
        ("[cook]\nstyle = 'raw'", ValueError, "style in [cook] must be one of slow, fast, got 'raw'"),
        ("[cook]\ntimes = [1, 2.5]", TypeError, "times in [cook] must be an integer or nothing, got 2.5"),
        ("[cook\nheat = 1", ValueError, "is not TOML"),
    ],
)
def test_what_is_wrong_with_a_file_is_named(tmp_path, text, error, message):
    with pytest.raises(error) as caught:
        read_config(write(tmp_path, text), [Cook, Serve])
    assert message in str(caught.value) and "kitchen.toml" in str(caught.value)


def test_nesting_without_end_and_huge_numbers(tmp_path):
    for text, message in (
        ("[cook]\ntimes = " + "[" * 10**5, "is not TOML: maximum recursion depth exceeded"),
        ("x = " + "{a = " * 10**5, "is not TOML: maximum recursion depth exceeded"),
        ("a" + ".a" * 10**5 + " = 1", "a line has 1,000 dots"),
        ("seed = 1" + "\n" * 2**21, "it is longer than 1,048,576"),
        ("[cook]\ntimes = " + "9" * 10**5, "is not TOML: Exceeds the limit"),
        ("[cook]\ntimes = 0x" + "f" * 10**5, "times in [cook] must be a number of at most 64 bits, got one of 400000"),
        ("[cook]\nheat = 1" + "0" * 400, "heat in [cook] must be a number of at most 64 bits"),
    ):
        with pytest.raises(ValueError) as caught:
            read_config(write(tmp_path, text), [Cook, Serve])
        assert message in str(caught.value) and "kitchen.toml" in str(caught.value)


def test_a_file_that_is_no_text_or_none(tmp_path):
    (tmp_path / "a.toml").write_bytes("seed = 'ü'".encode("latin1"))
    with pytest.raises(ValueError, match="a.toml is not a configuration: line 1: not UTF-8"):
        read_config(tmp_path / "a.toml", [Cook])
    for content in (b"\xef\xbb\xbfseed = 1\r\n", "seed = 1\r\n".encode("utf-16")):
        (tmp_path / "a.toml").write_bytes(content)
        assert read_config(tmp_path / "a.toml", [Cook]) == {"": {"seed": 1}}
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="must be a file, got the pipe"):
        read_config(tmp_path / "pipe", [Cook])


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="config must be a TOML file"):
        read_config(tmp_path / "none.toml", [Cook])


def test_what_must_be_given_is_asked_for():
    with pytest.raises(ValueError, match="--features must be given, or features at the top of the configuration: a folder"):
        from_flags(Cook, {})
    with pytest.raises(ValueError, match=r"GUESTS must be given, or guests in \[serve\] of the configuration"):
        from_flags(Serve, parse(Serve, "--features", "f"))


def test_options_made_in_python_are_checked_alike():
    assert Cook(features="f", heat=1, dishes="pie").dishes == ("pie",)
    with pytest.raises(TypeError, match="heat must be a number, got 'hot'"):
        Cook(features="f", heat="hot")
    with pytest.raises(ValueError, match="style must be one of slow, fast, got 'raw'"):
        Cook(features="f", style="raw")
    with pytest.raises(TypeError, match="features must be a path, got 3"):
        Cook(features=3)


def test_to_dict_is_what_json_holds():
    options = Cook(features=Path("a"), times=(1, 2))
    assert options.to_dict() == {
        **{"seed": 0, "features": "a", "heat": 0.5, "dishes": ["soup"], "times": [1, 2]},
        **{"style": "slow", "salt": False, "recipe": None},
    }


@given(
    heat=st.floats(allow_nan=False, allow_infinity=False),
    dishes=st.lists(st.text(alphabet="abc é-", min_size=1).filter(lambda text: not text.startswith("-")), min_size=1),
    times=st.none() | st.lists(st.integers(-(10**9), 10**9), min_size=1),
    style=st.sampled_from(["slow", "fast"]),
    salt=st.booleans(),
)
def test_flags_say_all_that_options_hold(heat, dishes, times, style, salt):
    flags = [f"--heat={heat!r}", "--dishes", *dishes, "--style", style, "--salt" if salt else "--no-salt", "--features=f"]
    if times is not None:
        flags += ["--times", *map(str, times)]
    made = from_flags(Cook, parse(Cook, *flags))
    assert made == Cook(heat=heat, dishes=dishes, times=times, style=style, salt=salt, features="f")
