"""bench/studies.py: the table of several draws, and what it says where features are missing."""

from __future__ import annotations

import studies


def row(classifier, method, problem, few, total):
    values = {"classifier": classifier, "method": method, "problem": problem, "test_few": few, "test_all": total}
    return {"experiment": "compare", **values}


def test_the_table_compares_draw_by_draw():
    rows = [
        row("joint", method, problem, few, total + problem / 100)
        for problem in (3, 4, 5)
        for method, few, total in (
            ("original", 0.1, 0.5),
            ("few-bias", 0.2, 0.52),
            ("between", 0.15, 0.52),
            ("Alpha Net", 0.3, 0.55),
        )
    ]
    rows[-1]["test_all"] += 0.01
    lines = studies.markdown(rows, [3, 4, 5]).splitlines()
    assert "draws 3, 4, 5" in lines[0] and "CC BY 4.0" in lines[2]
    table = {line.split(" | ")[1]: line.split(" | ")[2:] for line in lines[6:]}
    assert table["original"][0] == "10.0 ±0.0" and table["original"][-2] == "-2.00 (-2.00 to -2.00)"
    assert table["few-bias"][-2:] == ["+0.00", "+0.00 |"]
    # Differences 3, 3, 4 points: mean 3.33, and 4.303 (t of 2 degrees of freedom) times 0.577 / sqrt(3) to each side.
    assert table["Alpha Net"][-2:] == ["+3.33 (+1.90 to +4.77)", "-; 3 beyond |"]
    assert table["between"][-1] == "+1.00 (+1.00 to +1.00) |"


def test_the_second_table_compares_with_the_best_form():
    rows = []
    for problem, gain in ((3, 0.01), (4, 0.03)):
        rows += [row("joint", "original", problem, 0.1, 0.5), row("joint", "few-bias", problem, 0.2, 0.5)]
        rows.append({**row("joint", "Alpha Net, preset few", problem, 0.3, 0.5 + gain), "experiment": "beyond"})
        rows.append({**row("joint", "Alpha Net, preset few, without L2", problem, 0.2, 0.5), "experiment": "beyond"})
    text = studies.markdown(rows, [3, 4])
    line = next(line for line in text.splitlines() if "without L2" in line)
    assert line.endswith("| 20.0 ±0.0 | 50.0 ±0.0 | -10.00 (-10.00 to -10.00) | -2.00 (-14.71 to +10.71) |")


def test_missing_features_are_told(tmp_path, capsys):
    assert studies.main(["problems", "--results", "none", "--cache", str(tmp_path)]) == 2
    assert "bench/quickdraw.py --seeds 3" in capsys.readouterr().err
