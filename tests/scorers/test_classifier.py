import logging
import math

import pytest
import torch
from transformers import AutoModelForSequenceClassification as Model
from transformers import AutoTokenizer, BertConfig, LlamaConfig

from dpo_lightning.errors import UsageError
from dpo_lightning.scorers import Classifier, ScoreBook, Unscored

PROMPTS = ["the film ", "a joy ", "", "we all loved "]
RESPONSES = ["was a joy", "was dull", "nobody laughed at this bad old story, and why would they", ""]


def save(folder, tokenizer, config):
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = Model.from_config(config)
        for name, weight in model.named_parameters():
            if "norm" not in name.lower():
                torch.nn.init.normal_(weight, std=0.2)
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def tokenizer(tiny_llama):
    return AutoTokenizer.from_pretrained(tiny_llama)


def bert(tokenizer, **more):
    return BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=64, pad_token_id=tokenizer.pad_token_id, **more,
    )  # fmt: skip


@pytest.fixture(scope="module")
def sentiment(tokenizer, tmp_path_factory):
    labels = {
        "id2label": {0: "NEGATIVE", 1: "POSITIVE", 2: "MIXED"},
        "label2id": {"NEGATIVE": 0, "POSITIVE": 1, "MIXED": 2},
    }
    return save(tmp_path_factory.mktemp("bert") / "sentiment", tokenizer, bert(tokenizer, **labels))


def logits(path, texts):
    """Of each text by itself, as transformers' own pipeline has them."""
    tokenizer, model = AutoTokenizer.from_pretrained(path), Model.from_pretrained(path).eval()
    with torch.no_grad():
        return torch.cat([model(**tokenizer(text, return_tensors="pt")).logits for text in texts])


@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_the_score_is_of_the_label_whatever_the_batch(sentiment, batch_size):
    texts = [prompt + response for prompt, response in zip(PROMPTS, RESPONSES, strict=True)]
    logps = logits(sentiment, texts).log_softmax(-1)[:, 1]
    expected = {"log_probability": logps, "probability": logps.exp(), "logit": logps - torch.log1p(-logps.exp())}
    for output, scores in expected.items():
        found = Classifier(path=sentiment, output=output, batch_size=batch_size).score(PROMPTS, RESPONSES)
        torch.testing.assert_close(torch.tensor(found), scores, atol=1e-5, rtol=1e-4)
    assert len(set(found)) == 4


def test_the_response_alone_may_be_read(sentiment):
    found = Classifier(path=sentiment, scores="response", label="NEGATIVE").score(PROMPTS[:3], RESPONSES[:3])
    logps = logits(sentiment, RESPONSES[:3]).log_softmax(-1)[:, 0]
    torch.testing.assert_close(torch.tensor(found), logps - torch.log1p(-logps.exp()), atol=1e-5, rtol=1e-4)


def test_labels_that_exclude_nothing_have_odds_of_their_own(tokenizer, tmp_path):
    labels = {"id2label": {0: "toxic", 1: "POSITIVE"}, "label2id": {"toxic": 0, "POSITIVE": 1}}
    path = save(tmp_path, tokenizer, bert(tokenizer, **labels, problem_type="multi_label_classification"))
    expected = logits(path, RESPONSES[:3])[:, 0]
    found = Classifier(path=path, label="toxic", scores="response").score(PROMPTS[:3], RESPONSES[:3])
    torch.testing.assert_close(torch.tensor(found), expected, atol=1e-5, rtol=1e-4)
    found = Classifier(path=path, label="toxic", scores="response", output="probability").score(
        PROMPTS[:1], RESPONSES[:1]
    )
    torch.testing.assert_close(torch.tensor(found), expected[:1].sigmoid(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("pad", [True, False], ids=["padded", "no padding token"])
def test_one_label_gives_its_output_as_it_is(tokenizer, tmp_path, pad):
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        pad_token_id=tokenizer.pad_token_id if pad else None, num_labels=1,
    )  # fmt: skip
    path = save(tmp_path, tokenizer, config)
    texts = [prompt + response for prompt, response in zip(PROMPTS, RESPONSES, strict=True)]
    found = Classifier(path=path).score(PROMPTS, RESPONSES)
    torch.testing.assert_close(torch.tensor(found), logits(path, texts)[:, 0], atol=1e-5, rtol=1e-4)
    with pytest.raises(UsageError, match="has one label, whose output is no probability"):
        Classifier(path=path, output="probability").score(PROMPTS, RESPONSES)


@pytest.mark.parametrize(("side", "kept"), [("left", slice(-7, None)), ("right", slice(0, 7))])
def test_long_texts_are_cut_at_a_side_and_that_is_said(sentiment, tokenizer, side, kept, caplog):
    text = RESPONSES[2]
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id  # stays where it is
    rest = [*ids[:1], *ids[1:][kept]]
    with torch.no_grad():
        expected = Model.from_pretrained(sentiment).eval()(torch.tensor([rest])).logits.log_softmax(-1)[0, 1]
    scorer = Classifier(path=sentiment, max_length=8, truncation_side=side, output="log_probability")
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert scorer.score([""], [text]) == [pytest.approx(expected.item(), abs=1e-5)]
    assert len(caplog.records) == 1
    assert f"1 of the first 1 texts were cut to 8 tokens at their {side}" in caplog.text


def test_texts_longer_than_the_model_are_cut(sentiment):
    assert math.isfinite(Classifier(path=sentiment).score([""], ["the film was a joy " * 30])[0])


def test_messages_are_written_by_the_chat_template(sentiment, tokenizer):
    messages = [{"role": "user", "content": "how was it"}]
    whole = tokenizer.apply_chat_template([*messages, {"role": "assistant", "content": "dull"}], return_dict=False)
    with torch.no_grad():
        expected = Model.from_pretrained(sentiment).eval()(torch.tensor([whole])).logits.softmax(-1)[0, 1]
    found = Classifier(path=sentiment, output="probability").score([messages], ["dull"])
    assert found == [pytest.approx(expected.item(), abs=1e-5)]


def test_messages_without_a_template_are_refused(tokenizer, tmp_path):
    bare = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    bare.chat_template = None
    path = save(tmp_path, bare, bert(bare))
    with pytest.raises(Unscored, match="has no chat template") as problem, ScoreBook(Classifier(path=path)) as book:
        book.score(["text", [{"role": "user", "content": "x"}]], ["a", "b"])
    assert problem.value.place == 1


def test_mistakes_are_explained(sentiment, tmp_path):
    with pytest.raises(UsageError, match="no label 'GOOD'; it has 'NEGATIVE', 'POSITIVE', 'MIXED'"):
        Classifier(path=sentiment, label="GOOD").score(["a"], ["b"])
    with pytest.raises(UsageError, match="could not be loaded as a text-classification model"):
        Classifier(path=str(tmp_path / "none")).score(["a"], ["b"])


def test_scores_of_a_folder_that_was_written_anew_are_not_taken(sentiment, tmp_path):
    import shutil

    folder = shutil.copytree(sentiment, tmp_path / "model")
    before = Classifier(path=str(folder)).fingerprint()
    assert Classifier(path=str(folder), batch_size=2).fingerprint() == before
    assert Classifier(path=str(folder), label="NEGATIVE").fingerprint() != before
    (folder / "config.json").write_text((folder / "config.json").read_text() + "\n")
    assert Classifier(path=str(folder)).fingerprint() != before
