"""Text metrics against the implementations that the field uses, and against what they are by hand."""

import json
import math
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
from nltk.translate.bleu_score import corpus_bleu as nltk_corpus_bleu
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import BLEU
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoModel, AutoTokenizer, RobertaConfig, RobertaModel, RobertaTokenizer

from hsenet.metrics import (
    ClassifierLabeller,
    bert_score_tally,
    diversity,
    findings_tally,
    overlap_tally,
    radeval_tally,
    report_metrics,
)
from hsenet.metrics.findings import CRG_FLOOR
from hsenet.phantom import CT_RATE_LABELS, sample_study


def reports(first: int, number: int = 25) -> list[str]:
    return [sample_study(11, index).findings_text for index in range(first, first + number)]


REFERENCES, PREDICTIONS = reports(0), reports(200)
PREDICTIONS[3] = REFERENCES[3]
PREDICTIONS[4] = ""


def by_name(predictions: list, references: list, *protocols: str) -> dict[str, float]:
    return {protocol: overlap_tally(protocol, predictions, references).scores() for protocol in protocols}


def test_bleu_13a_is_sacrebleu():
    ours = overlap_tally("bleu-13a", PREDICTIONS, REFERENCES).scores()
    for order in (1, 2, 3, 4):
        bleu = BLEU(max_ngram_order=order, smooth_method="none", tokenize="13a")
        assert ours[f"bleu_{order}"] == pytest.approx(
            bleu.corpus_score(PREDICTIONS, [REFERENCES]).score / 100, rel=1e-12
        )


def test_bleu_coco_is_pycocoevalcap():
    from pycocoevalcap.bleu.bleu import Bleu

    truth, said = ({i: [text] for i, text in enumerate(texts)} for texts in (REFERENCES, PREDICTIONS))
    theirs, _ = Bleu(4).compute_score(truth, said, verbose=0)
    ours = overlap_tally("bleu-coco", PREDICTIONS, REFERENCES).scores()
    assert [ours[f"bleu_{order}"] for order in (1, 2, 3, 4)] == pytest.approx(theirs, rel=1e-13)


def test_bleu_coco_is_nltk_up_to_two_conventions():
    """COCO adds 1e-15 and 1e-9 to the counts (the tenth digit); nltk gives a text without an n-gram a miss."""

    def both(rows: slice) -> tuple[float, float]:
        said, truth = PREDICTIONS[rows], REFERENCES[rows]
        theirs = nltk_corpus_bleu([[text.split()] for text in truth], [text.split() for text in said])
        return overlap_tally("bleu-coco", said, truth).scores()["bleu_4"], theirs

    ours, theirs = both(slice(5, None))
    assert ours == pytest.approx(theirs, rel=1e-8) and ours != theirs
    ours, theirs = both(slice(None))  # with the empty prediction
    assert theirs < ours < 1.002 * theirs


def test_tokenizers_and_case_change_the_number():
    upper = [text.upper() for text in REFERENCES]
    scores = by_name(upper, REFERENCES, "bleu-coco", "bleu-coco-lower")
    assert scores["bleu-coco"]["bleu_1"] < 0.3 and scores["bleu-coco-lower"]["bleu_4"] == pytest.approx(1)
    scores = by_name(PREDICTIONS, REFERENCES, "bleu-coco", "bleu-13a")
    assert scores["bleu-13a"]["bleu_1"] > scores["bleu-coco"]["bleu_1"]  # a final period is a word of its own


@pytest.mark.skipif(shutil.which("java") is None, reason="COCO's tokenizer is a Java program")
def test_bleu_after_the_tokenizer_of_coco():
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    said, truth = (
        PTBTokenizer().tokenize({i: [{"caption": text}] for i, text in enumerate(texts)})
        for texts in (PREDICTIONS, REFERENCES)
    )
    theirs, _ = Bleu(4).compute_score(truth, said, verbose=0)
    ours = overlap_tally("bleu-coco-ptb", PREDICTIONS, REFERENCES).scores()
    assert list(ours.values()) == pytest.approx(theirs, rel=1e-13)


def test_rouge_l_is_rouge_score_and_cocos_is_cocos():
    from pycocoevalcap.rouge.rouge import Rouge

    for protocol, stem in (("rouge-l", False), ("rouge-l-stem", True)):
        scorer = RougeScorer(["rougeL"], use_stemmer=stem)
        theirs = [scorer.score(*pair)["rougeL"].fmeasure for pair in zip(REFERENCES, PREDICTIONS, strict=True)]
        assert overlap_tally(protocol, PREDICTIONS, REFERENCES).scores()["rouge_l"] == pytest.approx(np.mean(theirs))
    truth, said = ({i: [text] for i, text in enumerate(texts)} for texts in (REFERENCES, PREDICTIONS))
    theirs, _ = Rouge().compute_score(truth, said)
    assert overlap_tally("rouge-l-coco", PREDICTIONS, REFERENCES).scores()["rouge_l"] == pytest.approx(
        theirs, rel=1e-13
    )


def test_meteor_without_synonyms_by_hand():
    # "nodules" meets "nodule" by its stem: 3 of 4 words match, in two chunks
    scores = overlap_tally("meteor-nltk-stem", ["small nodules here seen"], ["small nodule is seen"]).scores()
    mean = 0.75 * 0.75 / (0.9 * 0.75 + 0.1 * 0.75)
    assert scores["meteor"] == pytest.approx(mean * (1 - 0.5 * (2 / 3) ** 3))
    assert overlap_tally("meteor-nltk-stem", [None, REFERENCES[0]], REFERENCES[:2]).scores()["meteor"] < 0.6


def test_meteor_with_wordnet_says_how_to_get_it(monkeypatch, tmp_path):
    import nltk

    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    with pytest.raises(LookupError, match="nltk.download"):
        overlap_tally("meteor-nltk", ["a nodule"], ["a nodule"])


def test_the_original_precision_and_what_it_hides():
    """HSENet's "BLEU-4": a mean of single precisions without a brevity penalty, so one safe sentence goes far."""
    reference = "The heart is normal in size. There is no pleural effusion. A nodule is seen in the left upper lobe."
    sentence = "There is no pleural effusion."
    scores = by_name([sentence], [reference], "precision-hsenet", "bleu-13a")
    assert scores["precision-hsenet"]["precision_4"] == 1.0 and scores["bleu-13a"]["bleu_4"] < 0.1
    # three words have no 4-gram, and an empty prediction has none at all: the original stops there with an error
    scores = overlap_tally("precision-hsenet", ["There is no", ""], [reference] * 2).scores()
    assert scores["precision_1"] == scores["precision_3"] == 0.5 and scores["precision_4"] == 0.0


def test_precisions_by_hand():
    scores = overlap_tally("precision-hsenet", ["a b c d e", "a b x d"], ["a b c d e f", "a b c d"]).scores()
    assert scores["precision_1"] == pytest.approx((1 + 3 / 4) / 2)
    assert scores["precision_2"] == pytest.approx((1 + 1 / 3) / 2)
    assert scores["precision_4"] == pytest.approx((1 + 0) / 2)


def test_removed_punctuation_counts_on_the_honest_protocol():
    """The original deletes quotes and brackets from the reference alone: its perfect report isn't perfect."""
    report = "A nodule (6 mm) is seen in the patient's left upper lobe."
    scores = by_name([report], [report], "bleu-13a", "bleu-coco", "precision-hsenet")
    assert scores["bleu-13a"]["bleu_4"] == pytest.approx(1) and scores["bleu-coco"]["bleu_4"] == pytest.approx(1)
    assert scores["precision-hsenet"]["precision_4"] < 0.8


def test_m3d_is_a_mean_over_reports():
    scores = overlap_tally("bleu-m3d", ["a b", "a"], ["a b", "a b"]).scores()
    assert scores["mean_bleu_1"] == pytest.approx((1 + math.exp(1 - 2)) / 2)


def test_other_protocols_and_unusable_texts_are_refused():
    with pytest.raises(ValueError, match="bleu-13a, .*got 'BLEU-4'"):
        overlap_tally("BLEU-4", ["a"], ["a"])
    with pytest.raises(ValueError, match="got 1 and 2"):
        overlap_tally("bleu-coco", ["a"], ["a", "b"])
    with pytest.raises(ValueError, match="1 empty ones"):
        overlap_tally("rouge-l", ["a"], [" "])


# BERTScore and classifiers, on tiny models


@pytest.fixture(scope="module")
def tiny_bert(tmp_path_factory) -> str:
    return tiny.bert(tmp_path_factory.mktemp("bert"))


def test_bert_score_by_hand(tiny_bert):
    import torch

    said, truth = ["a nodule is seen .", "no effusion", None], ["no effusion is seen", "no effusion", "a nodule"]
    tally = bert_score_tally(said, truth, model=tiny_bert, layer=1, batch_size=2)
    tokenizer, model = AutoTokenizer.from_pretrained(tiny_bert), AutoModel.from_pretrained(tiny_bert).eval()
    with torch.no_grad():
        one, other = (
            torch.nn.functional.normalize(
                model(**tokenizer(text, return_tensors="pt"), output_hidden_states=True).hidden_states[1][0], dim=-1
            )
            for text in (said[0], truth[0])
        )
    similarity = one @ other.T
    precision, recall = similarity.max(1).values[1:-1].mean(), similarity.max(0).values[1:-1].mean()
    expected = (2 * precision * recall / (precision + recall)).item()
    scores = tally.scores()
    assert scores["bertscore_f1"] == pytest.approx((expected + 1 + 0) / 3, abs=1e-5)
    assert "layer 1" in tally.protocol
    with pytest.raises(ValueError, match=r"1\.\.2, got 17"):
        bert_score_tally(said, truth, model=tiny_bert, layer=17)


@pytest.fixture
def tiny_roberta(tmp_path) -> str:
    """Its pieces begin with the space before a word, so that a first word is another piece than the same one later."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words, alphabet = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"], pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=words, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(["a nodule is seen in the lung", "no effusion is seen"] * 3, trainer)
    backend.model.save(str(tmp_path))
    tokenizer = RobertaTokenizer(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"))
    tokenizer.model_max_length = 30
    tokenizer.save_pretrained(tmp_path)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    RobertaModel(RobertaConfig(vocab_size=320, max_position_embeddings=34, **sizes)).save_pretrained(tmp_path)
    return str(tmp_path)


def test_bert_score_is_bert_score(tiny_bert):
    from bert_score import score

    said = ["a nodule is seen .", " no effusion ", "seen"]
    truth = [" no effusion is seen", "no effusion", "a nodule is seen . is seen"]
    theirs = score(said, truth, model_type=tiny_bert, num_layers=2, idf=False)
    ours = bert_score_tally(said, truth, model=tiny_bert, layer=2).scores()
    assert list(ours.values()) == pytest.approx([column.mean().item() for column in theirs], abs=1e-6)


def test_the_first_word_is_the_word_it_is_elsewhere(tiny_roberta):
    """bert_score asks for the space before it; transformers 5 no longer listens, so theirs gets it in the text."""
    import bert_score.utils

    said, truth = ["nodule is seen", "no effusion"], ["a nodule is seen in the lung", "effusion"]
    ours = bert_score_tally(said, truth, model=tiny_roberta, layer=2).scores()
    assert bert_score_tally([f"  {text}" for text in said], truth, model=tiny_roberta, layer=2).scores() == ours
    tokenizer, model = AutoTokenizer.from_pretrained(tiny_roberta), AutoModel.from_pretrained(tiny_roberta).eval()
    weights = dict.fromkeys(range(320), 1.0) | {0: 0.0, 2: 0.0}
    spaced = lambda tokenizer, text: tokenizer.encode(f" {text.strip()}")  # noqa: E731
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bert_score.utils, "sent_encode", spaced)
        model.encoder.layer = model.encoder.layer[:2]
        theirs = bert_score.utils.bert_cos_score_idf(model, truth, said, tokenizer, weights, device="cpu")
    assert list(ours.values()) == pytest.approx(theirs.mean(0).tolist(), abs=1e-6)


def test_scores_of_local_models_tell_their_weights_and_not_where_they_lie(tiny_bert):
    protocol = bert_score_tally(["a"], ["a"], model=tiny_bert, layer=1).protocol
    name = Path(tiny_bert).name
    assert protocol.startswith(f"bertscore/2[{name} ") and "/" not in protocol.split("[")[1]


def test_a_classifier_reads_the_findings(tiny_bert, tmp_path):
    import torch
    from transformers import BertForSequenceClassification

    findings = ["Lung nodule", "Pleural effusion"]
    model = BertForSequenceClassification.from_pretrained(tiny_bert, num_labels=2)
    torch.nn.init.zeros_(model.classifier.weight)
    model.classifier.bias.data = torch.tensor([0.0, -1.0])  # probabilities 0.5, which counts, and 0.27
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_bert).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="give output_labels"):
        ClassifierLabeller(str(tmp_path))
    labeller = ClassifierLabeller(str(tmp_path), output_labels=findings)
    assert labeller(["a nodule", "", None], findings[::-1]).tolist() == [[False, True], [False, False], [False, False]]
    with pytest.raises(ValueError, match="Emphysema"):
        labeller(["a nodule"], ["Emphysema"])
    scores = report_metrics(["a nodule"], ["a nodule"], labels=findings, labeller=labeller)
    assert scores["findings_f1_macro"] == 1 and "threshold 0.5, 16 tokens" in scores["findings_protocol"]
    assert labeller(["a nodule is seen . " * 9], findings).tolist() == [[True, False]]  # longer than the model takes


def test_radeval_is_asked_for_or_an_error():
    with pytest.raises(ValueError, match="ratescore, radgraph, green, got 'bleu'"):
        radeval_tally("bleu", ["a"], ["a"])
    try:
        import radeval  # noqa: F401
    except ImportError:
        with pytest.raises(ImportError, match="pip install RadEval"):
            radeval_tally("ratescore", ["a"], ["a"])


class RadEvalOf22:
    """What RadEval 2.2.1 answers, by its sources: a list a score, of each report."""

    def __init__(self, metrics, per_sample):
        assert per_sample
        self.names = {"radgraph": ["radgraph_simple", "radgraph_partial", "radgraph_complete"]}.get(*metrics, metrics)

    def __call__(self, refs, hyps):
        return {name: [len(hyp) / len(ref) for ref, hyp in zip(refs, hyps, strict=True)] for name in self.names}


def test_radeval_never_sees_an_empty_report(monkeypatch):
    """Its models need weights from the Hub: here only what we ask it for and what we make of the answer."""
    from hsenet.metrics import radiology

    monkeypatch.setitem(sys.modules, "radeval", SimpleNamespace(RadEval=RadEvalOf22))
    monkeypatch.setattr(radiology, "version", lambda name: "2.2.1")
    radiology._scorer.cache_clear()
    try:
        tally = radeval_tally("radgraph", ["ab", "", None, "abcd"], ["abcd"] * 4)
        assert tally.scores() == dict.fromkeys(("radgraph_simple", "radgraph_partial", "radgraph_complete"), 1.5 / 4)
        assert tally.protocol == "radgraph/1[RadEval 2.2.1]"
        assert radeval_tally("green", [""], ["a"]).scores() == {"green": 0.0}
        assert radeval_tally("ratescore", ["a"], ["a"]).scores() == {"ratescore": 1.0}
    finally:
        radiology._scorer.cache_clear()


# Findings


def test_f1_is_that_of_scikit_learn():
    from sklearn.metrics import f1_score, precision_score, recall_score

    rng = np.random.default_rng(1)
    truth, predicted = rng.random((90, 18)) < 0.2, rng.random((90, 18)) < 0.3
    scores = findings_tally(predicted, truth).scores()
    for name, theirs in (("f1", f1_score), ("precision", precision_score), ("recall", recall_score)):
        for average in ("macro", "micro", "weighted"):
            expected = theirs(truth, predicted, average=average)
            assert scores[f"findings_{name}_{average}"] == pytest.approx(expected, rel=1e-12)
    truth[:, 5] = False  # scikit-learn counts a finding that never occurs as F1 0, we leave it out of the macro mean
    ours, theirs = (findings_tally(predicted, truth).scores(), f1_score(truth, predicted, average="macro"))
    assert ours["findings_f1_macro"] == pytest.approx(theirs * 18 / 17, rel=1e-12)
    assert ours["findings_f1_micro"] == pytest.approx(f1_score(truth, predicted, average="micro"), rel=1e-12)
    assert math.isnan(ours[f"f1[{CT_RATE_LABELS[5]}]"])


def test_weighted_f1_and_crg_by_hand():
    labels = CT_RATE_LABELS[:2]
    truth = np.array([[1, 0], [1, 0], [1, 1], [0, 0]])
    predicted = np.array([[1, 0], [1, 1], [0, 1], [0, 0]])
    scores = findings_tally(predicted, truth, labels=labels).scores()
    first, second = 2 * 2 / (2 + 3), 2 * 1 / (2 + 1)
    assert scores["findings_f1_macro"] == pytest.approx((first + second) / 2)
    assert scores["findings_f1_weighted"] == pytest.approx((3 * first + 1 * second) / 4)
    assert scores[f"f1[{labels[0]}]"] == pytest.approx(first)
    # X = 8 decisions, A = 4: a hit or a miss weighs (8 - 4) / 8, three hits, one miss, one false alarm
    assert scores["crg"] == pytest.approx(2 / (2 * 2 - (0.5 * 3 - 0.5 * 1 - 1)))


def test_crg_of_saying_nothing_or_everything_is_a_third():
    truth = np.random.default_rng(0).random((40, 18)) < 0.2
    crg = [
        findings_tally(predicted, truth).scores()["crg"]
        for predicted in (np.zeros_like(truth), np.ones_like(truth), truth, ~truth)
    ]
    assert crg == pytest.approx([CRG_FLOOR, CRG_FLOOR, 1.0, 0.2])
    for undefined in (np.zeros_like(truth), np.ones_like(truth)):
        assert math.isnan(findings_tally(truth, undefined).scores()["crg"])


def test_the_labeller_is_part_of_the_protocol():
    truth = np.ones((2, 18))
    assert "RadBERT" in findings_tally(truth, truth, labeller="RadBERT").protocol
    assert "[18 labels" in findings_tally(truth, truth).protocol


# Diversity


def test_self_bleu_is_bleu_with_all_others_as_references():
    texts = reports(40, 6) + ["one", ""]
    bleu = BLEU(tokenize="none", smooth_method="none", effective_order=False)
    theirs = [
        bleu.sentence_score(text, texts[:i] + texts[i + 1 :]).score / 100 if text else 0.0
        for i, text in enumerate(texts)
    ]
    scores = diversity(texts)
    assert scores["self_bleu_4"] == pytest.approx(np.mean(theirs), rel=1e-9) and scores["unique_texts"] == 1


def test_a_template_shows_in_its_diversity():
    assert diversity(["The chest is normal today."] * 5) == pytest.approx({"unique_texts": 0.2, "self_bleu_4": 1.0})
    assert diversity(reports(0, 10))["self_bleu_4"] < 0.95


# The modules of `evaluate`


def test_overlap_module_offline(monkeypatch, tmp_path):
    from hsenet.metrics import load

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    module = load("report_overlap", "bleu-13a", cache_dir=str(tmp_path))
    scores = module.compute(predictions=PREDICTIONS, references=REFERENCES)
    assert scores == {**overlap_tally("bleu-13a", PREDICTIONS, REFERENCES).scores(), "protocol": "bleu-13a/1"}
    module.add_batch(predictions=PREDICTIONS[:9], references=REFERENCES[:9])
    module.add_batch(predictions=PREDICTIONS[9:], references=REFERENCES[9:])
    assert module.compute() == scores
    assert (
        load("report_overlap", cache_dir=str(tmp_path)).compute(predictions=["a"], references=["a"])["bleu_1"] > 0.99
    )


def test_findings_module(tmp_path):
    from hsenet.metrics import load

    module = load("report_findings", cache_dir=str(tmp_path))
    said, truth = ["Cardiomegaly.", None], ["Cardiomegaly.", "Emphysema."]
    scores = module.compute(predictions=said, references=truth)
    assert scores["findings_f1_macro"] == 0.5 and scores["protocol"].endswith("reference labels inferred")
    given = module.compute(predictions=said, references=truth, reference_labels=[[1], [0]], labels=["Cardiomegaly"])
    assert given["findings_f1_macro"] == 1 and given["protocol"].endswith("given")


def test_space_of_a_module(tmp_path):
    from hsenet.metrics import load
    from hsenet.metrics.hub import MODULE_NAMES, push_module, write_space

    assert MODULE_NAMES == ("ct_retrieval", "ct_volume_retrieval", "ct_vqa", "report_findings", "report_overlap")
    for name in MODULE_NAMES:
        write_space(name, tmp_path / name)
        card = (tmp_path / name / "README.md").read_text()
        assert (
            card.startswith("---\n")
            and "- metric" in card
            and f'load("{name}")' in (tmp_path / name / "app.py").read_text()
        )
    with pytest.raises(ValueError, match="OWNER/ct_vqa"):
        push_module("ct_vqa", "owner/other", folder=tmp_path)
    with pytest.raises(ValueError, match="name must be one of"):
        load("bleu")
    assert json.dumps(MODULE_NAMES)
