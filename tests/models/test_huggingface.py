"""Classifiers that transformers saved: through the commands and back into a folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

pytest.importorskip("torchvision", exc_type=ImportError)
pytest.importorskip("transformers")

import transformers
from digit_images import write_digits

from alphaext.commands import main as cli
from alphaext.features import read_features
from alphaext.models import find_preprocessing, make_model
from alphaext.models.huggingface import class_names_of

NAMES = {index: f"digit {index}" for index in range(10)}


def save_model(folder: Path, kind: str) -> None:
    torch.manual_seed(0)
    if kind == "vit":
        config = transformers.ViTConfig(
            hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, image_size=16, patch_size=8,
            id2label=NAMES,
        )  # fmt: skip
        model = transformers.ViTForImageClassification(config)
    else:  # its head is a Sequential
        config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], id2label=NAMES)
        model = transformers.ResNetForImageClassification(config)
    model.save_pretrained(folder)
    processor = {"do_resize": True, "size": {"height": 16, "width": 16}, "do_normalize": True, "image_mean": [0.5] * 3}
    processor |= {"image_std": [0.5] * 3, "image_processor_type": "ViTImageProcessor", "resample": 2}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_a_saved_model_is_repaired_into_a_folder(kind, tmp_path, capsys):
    write_digits(tmp_path)
    save_model(tmp_path / "saved", kind)
    (tmp_path / "mine.toml").write_text(
        'features = "features"\ndevice = "cpu"\nprogress = false\n'
        '[data]\ntrain = "train.txt"\nval = "val.txt"\nroot = "."\nfew_below = 12\nmany_above = 60\n'
        '[model]\nbackbone = "hf:saved"\nallow_chance = true\n'
    )
    config = ["--config", str(tmp_path / "mine.toml")]
    assert cli.main(["extract", *config]) == 0
    features = read_features(tmp_path / "features" / "train")
    assert features.class_names == tuple(NAMES.values())
    model = make_model(f"hf:{tmp_path / 'saved'}", 10)
    assert find_preprocessing(None, model).image_size == 16 and class_names_of(model) == features.class_names
    weights = tmp_path / "saved" / "model.safetensors"
    fit = [
        "baseline",
        "few-bias",
        "--offset",
        "0.5",
        *config,
        "--classifier",
        str(weights),
        "--output",
        str(tmp_path / "alpha"),
    ]
    assert cli.main([*fit, "--classifier-layer", "classifier.1"] if kind == "resnet" else fit) == 0
    capsys.readouterr()
    export = ["export", *config, "--repaired", str(tmp_path / "alpha"), "--output", str(tmp_path / "repaired")]
    assert cli.main(export) == 0
    assert "verified: from_pretrained loads it" in capsys.readouterr().out
    load = transformers.AutoModelForImageClassification.from_pretrained
    before, after = (load(tmp_path / name, local_files_only=True).state_dict() for name in ("saved", "repaired"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(name.startswith("classifier") for name in changed)
    assert (tmp_path / "repaired" / "preprocessor_config.json").is_file()
    assert cli.main(export) == 2 and "output exists already" in capsys.readouterr().err
    assert cli.main([*export, "--overwrite"]) == 0


def test_a_saved_model_is_trained_and_loaded_by_the_names_of_any_release(tmp_path):
    write_digits(tmp_path)
    save_model(tmp_path / "saved", "vit")
    (tmp_path / "mine.toml").write_text(
        'features = "features"\ndevice = "cpu"\nprogress = false\n'
        '[data]\ntrain = "train.txt"\nval = "val.txt"\nroot = "."\n'
        '[model]\nbackbone = "hf:saved"\nallow_chance = true\n'
        '[train]\noutput = "joint"\nepochs = 1\nbatch_size = 64\nlr = 0.01\nworkers = 0\n'
    )
    config = ["--config", str(tmp_path / "mine.toml")]
    assert cli.main(["train", *config]) == 0
    trained = torch.load(tmp_path / "joint" / "model.pth", weights_only=True)
    model = make_model(f"hf:{tmp_path / 'saved'}", 10)
    assert set(trained) == set(model.state_dict()) and not torch.equal(
        trained["model.classifier.weight"], model.state_dict()["model.classifier.weight"]
    )
    # The same weights as files have them: the module's names, transformers' own in files, and those of its first releases.
    in_files = model.names_in_files()
    named = {
        "module": trained,
        "files": {in_files.get(name, name).removeprefix("model."): tensor for name, tensor in trained.items()},
    }
    named["first"] = {
        name.replace("before.weight", "before.gamma").replace("before.bias", "before.beta"): tensor
        for name, tensor in named["files"].items()
    }
    rows = []
    for release, tensors in named.items():
        torch.save(tensors, tmp_path / f"{release}.bin")
        files = ["--checkpoint", str(tmp_path / f"{release}.bin"), "--features", str(tmp_path / release)]
        assert cli.main(["extract", *config, *files]) == 0
        rows.append(read_features(tmp_path / release / "train").features)
    assert all((rows[0] == other).all() for other in rows[1:]) and any(name.endswith("gamma") for name in named["first"])


QUESTIONS = {"lost card": 30, "exchange rate": 25, "top up": 24, "age limit": 3}  # not in the order of the alphabet


def save_text_model(folder: Path, kind: str = "Bert") -> list[tuple[str, str]]:
    """A model of texts that knows its classes, in an order of its own, and its tokenizer; returns texts and their classes."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        *sorted({word for name in QUESTIONS for word in name.split()}),
        "my",
        "a",
        "the",
    ]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    marks = [("[CLS]", 2), ("[SEP]", 3)]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=marks)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", model_max_length=12
    ).save_pretrained(folder)
    torch.manual_seed(0)
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24, "pad_token_id": 0}
    names = {
        "pad_token_id": "pad_token_id",
        "hidden_size": "n_embd",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
    }
    if kind == "GPT2":
        small = {names[name]: value for name, value in small.items() if name in names}
    config = getattr(transformers, f"{kind}Config")(
        **small, vocab_size=len(words), max_position_embeddings=20, id2label=dict(enumerate(QUESTIONS)),
        label2id={name: number for number, name in enumerate(QUESTIONS)},
    )  # fmt: skip
    model = getattr(transformers, f"{kind}ForSequenceClassification")(config)
    texts = [
        (f"{['a', 'my', 'the'][n % 3]} {name}" + " the" * (n % 4), name)
        for name, count in QUESTIONS.items()
        for n in range(count)
    ]
    loaded = transformers.AutoTokenizer.from_pretrained(folder)
    inputs = loaded([text for text, _ in texts], padding=True, return_tensors="pt", return_token_type_ids=False)
    labels = torch.tensor([list(QUESTIONS).index(name) for _, name in texts])
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(12):
        optimizer.zero_grad()
        model(**inputs, labels=labels).loss.backward()
        optimizer.step()
    model.save_pretrained(folder)
    return texts


@pytest.mark.parametrize("kind", ["Bert", "Roberta", "DistilBert"])
def test_a_model_of_texts_is_repaired_by_one_command(kind, tmp_path, capsys):
    texts = save_text_model(tmp_path / "saved", kind)
    for part, rows in {"train": texts, "val": texts[::2] + texts[-2:]}.items():
        lines = [json.dumps({"question": text, "label": name}) for text, name in rows]
        (tmp_path / f"{part}.jsonl").write_text("\n".join(lines))
    assert cli.main(["init", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (
        found["text_column"] == "question" and "label_column" not in found and found["backbone"] == f"hf:{tmp_path / 'saved'}"
    )
    repair = ["repair", "--config", str(tmp_path / "mine.toml"), "--method", "fit"]
    assert cli.main(repair) == 0
    said = capsys.readouterr()
    assert "Texts are cut at 12 tokens" in said.out and "Loading weights" not in said.err
    features = read_features(tmp_path / "features" / "train")
    assert features.class_names == tuple(QUESTIONS) and features.class_counts().tolist() == list(QUESTIONS.values())
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved", local_files_only=True).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    with torch.no_grad():
        inputs = tokenizer([text for text, _ in texts], padding=True, return_tensors="pt", return_token_type_ids=False)
        expected = model(**inputs).logits
    layer = [module for module in model.modules() if isinstance(module, torch.nn.Linear)][-1]
    with torch.no_grad():
        torch.testing.assert_close(layer(torch.from_numpy(features.features.astype("float32"))), expected, atol=0.02, rtol=0.02)


@pytest.mark.parametrize("kind", ["GPT2", "Llama"])
def test_a_model_that_reads_the_last_token_is_repaired_by_one_command(kind, tmp_path, capsys):
    texts = save_text_model(tmp_path / "saved", kind)
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    (tmp_path / "saved" / "config.json").write_text(json.dumps(config | {"pad_token_id": None}))  # as trained a text at a time
    for part, rows in {"train": texts, "val": texts[::2] + texts[-2:] * 6}.items():
        lines = [json.dumps({"text": text, "label": name}) for text, name in rows]
        (tmp_path / f"{part}.jsonl").write_text("\n".join(lines))
    assert cli.main(["init", str(tmp_path)]) == 0
    assert cli.main(["repair", "--config", str(tmp_path / "mine.toml"), "--json"]) == 0
    said = json.loads("{" + capsys.readouterr().out.partition("\n{")[2])
    features = read_features(tmp_path / "features" / "train")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved", local_files_only=True).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    with torch.no_grad():
        for row, (text, _) in list(zip(features.features, texts, strict=True))[::9]:
            expected = model(**tokenizer(text, return_tensors="pt", return_token_type_ids=False)).logits[0]
            torch.testing.assert_close(model.score(torch.from_numpy(row.astype("float32"))), expected, atol=0.02, rtol=0.02)
    if said["recommend"]["method"] != "original":
        written = [(tmp_path / "repaired" / name).exists() for name in ("classifier.pth", "model")]
        assert sum(written) == 1


def test_what_is_no_saved_image_classifier(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no config.json in"):
        make_model(f"hf:{tmp_path}", 3)
    save_model(tmp_path / "saved", "vit")
    with pytest.raises(ValueError, match="num_classes must be that of .*, 10, got 3"):
        make_model(f"hf:{tmp_path / 'saved'}", 3)
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    shutil.copytree(tmp_path / "saved", tmp_path / "text")
    (tmp_path / "text" / "config.json").write_text(json.dumps(config | {"architectures": ["BertForMaskedLM"]}))
    with pytest.raises(
        ValueError, match=r"must be a classifier of images or texts, got BertForMasked.*repair_model\(model, loader\)"
    ):
        make_model(f"hf:{tmp_path / 'text'}", 10)
    (tmp_path / "saved" / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="cannot be loaded"):
        make_model(f"hf:{tmp_path / 'saved'}", 10)


def test_a_function_gets_num_classes_if_it_takes_it(tmp_path, monkeypatch):
    (tmp_path / "makers_of_mine.py").write_text(
        "from torch import nn\n"
        "def by_name(width=4, num_classes=2):\n    return nn.Linear(width, num_classes)\n"
        "def by_place(n):\n    return nn.Linear(4, n)\n"
        "def neither():\n    return nn.Linear(4, 7)\n"
        "def two(a, b):\n    return nn.Linear(a, b)\n"
    )
    monkeypatch.chdir(tmp_path)
    made = [make_model(f"makers_of_mine:{name}", 5) for name in ("by_name", "by_place", "neither")]
    assert [model.out_features for model in made] == [5, 5, 7]
    assert make_model("makers_of_mine:by_name", 5, options={"width": 9}).in_features == 9
    with pytest.raises(TypeError, match=r"cannot be called as two\(5\): .*'b'; it gets num_classes if it takes it"):
        make_model("makers_of_mine:two", 5)
