"""The command line and the demonstration behind it."""

from __future__ import annotations

import io
import subprocess
import sys

import pytest
import torch
from rich.console import Console

import alphaext
from alphaext.commands import demonstration as demo
from alphaext.commands import main as cli


def test_demo_writes_table_and_picture(tmp_path):
    text = io.StringIO()
    output = tmp_path / "picture.png"
    draws = demo.run_demo(draws=2, seed=3, output=output, console=Console(file=text, width=120))
    assert output.read_bytes().startswith(b"\x89PNG") and [p.name for p in tmp_path.iterdir()] == ["picture.png"]
    printed = text.getvalue()
    for part in (
        "trained classifier",
        "with Alpha Net",
        "gain",
        "few: better on",
        "Learned alphas",
        "gamma, chosen on",
    ):
        assert part in printed
    for draw in draws:
        assert draw.counts.sort(descending=True).values.tolist() == list(demo.TRAIN_COUNTS)
        assert draw.head.num_few == 3 and draw.gamma in demo.GAMMAS
        assert set(draw.head.few_classes.tolist()) == set((draw.counts < 20).nonzero().flatten().tolist())
    assert draws[0].after["few"] > draws[0].before["few"]


def test_demo_draws_do_not_share_images():
    _, labels = demo.load_digits()
    train, val, test = demo.long_tailed_indices(labels, torch.Generator().manual_seed(0))
    together = torch.cat([train, val, test])
    assert len(together.unique()) == len(together) == sum(demo.TRAIN_COUNTS) + 10 * (20 + 40)


def test_demo_is_deterministic_and_leaves_the_random_state():
    images, labels = demo.load_digits()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one = demo.run_draw(images, labels, 0)
    assert torch.get_rng_state().equal(before)
    two = demo.run_draw(images, labels, 0)
    assert one.after == two.after and one.head.w2.equal(two.head.w2)


def test_summary_names_draws_where_it_did_not_help():
    images, labels = demo.load_digits()
    good = demo.run_draw(images, labels, 0)
    bad = demo.Draw(**{**good.__dict__, "seed": 7, "before": good.after, "after": good.before})
    gain = 100 * (good.before["few"] - good.after["few"])
    assert f"few: better on 1 of 2 draws; worse on draw 7 ({gain:+.1f})" in demo.summary([good, bad])


def test_info(capsys):
    assert cli.main(["info"]) == 0
    printed = capsys.readouterr().out
    assert "simd:" in printed and "set it and install again from the checkout" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo", "--draws", "0"], "draws must be between 1 and 4294967295, got 0"),
        (["demo", "--seed", "-1"], "seed must be between 0 and 4294967295, got -1"),
        (["demo", "--draws", "many"], "must be an integer, got 'many'"),
        (["demo", "--output", "picture.jpg"], "must end in .png, got 'picture.jpg'"),
        (["demo", "--output", "no/such/directory/picture.png"], "must be a file in a directory that exists"),
        ([], "required"),
    ],
)
def test_wrong_arguments(arguments, message, capsys):
    try:
        code = cli.main(arguments)
    except SystemExit as exit:  # argparse's own way of saying so
        code = exit.code
    assert code == 2 and message in capsys.readouterr().err


def test_interruption_has_its_exit_code(monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "run_demo", interrupt)
    assert cli.main(["demo"]) == 130


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--help"], 0, "alphaext doctor data"),
        (["--version"], 0, f"alphaext {alphaext.__version__}"),
        (["fit", "--help"], 0, "--gamma"),
        (["fit", "--gama", "1"], 2, "unknown option --gama; did you mean '--gamma'?"),
        (["fit", "--no-progres"], 2, "unknown option --no-progres; did you mean '--no-progress'?"),
        (["evalute"], 2, "unknown command 'evalute'; did you mean 'evaluate'?"),
        (["info", "more"], 2, "unexpected argument 'more'"),
    ],
)
def test_what_is_no_work_needs_no_torch(arguments, code, said):
    program = (
        "import sys, alphaext\n"
        "from alphaext.commands.main import main\n"
        "try:\n    main(sys.argv[1:])\n"
        "except SystemExit as end:\n    print('code', end.code, 'torch' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=True)
    assert said in done.stdout + done.stderr and done.stdout.endswith(f"code {code} False\n")
