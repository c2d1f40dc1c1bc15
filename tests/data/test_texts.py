"""Tables of texts."""

from __future__ import annotations

import pytest

from alphaext.data import read_texts


def test_texts_are_read_and_what_is_wrong_is_named(tmp_path):
    table = tmp_path / "train.csv"
    table.write_text("text,intent\nwhere is it,lost\nhow much,rate\n")
    assert read_texts(table, label_column="intent").labels.tolist() == [0, 1]
    assert read_texts(table, label_column="intent", class_names=("rate", "lost")).labels.tolist() == [1, 0]
    with pytest.raises(ValueError, match=r"no column 'intend'; did you mean 'intent'\?"):
        read_texts(table, label_column="intend")
    with pytest.raises(ValueError, match=r"row 0: 'lost' is no class; did you mean 'Lost!'\?"):
        read_texts(table, label_column="intent", class_names=("Lost!", "rate"))
    (tmp_path / "numbers.json").write_text('[{"text": "a", "label": 2}, {"text": "b", "label": 0}]')
    numbers = read_texts(tmp_path / "numbers.json", num_classes=4)
    assert numbers.labels.tolist() == [2, 0] and numbers.class_names is None and numbers.subset([1])[0] == ("b", 0)
    (tmp_path / "broken.jsonl").write_text('{"text": "a", "label": 2}\n{"text": null, "label": 0}')
    with pytest.raises(ValueError, match=r"row 1: there must be a text and a label"):
        read_texts(tmp_path / "broken.jsonl")
    (tmp_path / "broken.jsonl").write_text("{")
    for content in ("{", "[" * 10**5, '{"text": "a", "label": ' + "9" * 10**4 + "}"):
        (tmp_path / "broken.jsonl").write_text(content)
        with pytest.raises(ValueError, match=r"broken.jsonl is not a jsonl table"):
            read_texts(tmp_path / "broken.jsonl")
    (tmp_path / "broken.jsonl").write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(ValueError, match=r"broken.jsonl is a pointer of Git LFS, .*, not a table of texts"):
        read_texts(tmp_path / "broken.jsonl")
