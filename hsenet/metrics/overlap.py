"""Word overlap of generated and reference reports, one named protocol for each thing that the field calls by one word.

    overlap_tally("bleu-coco", predictions, references).scores()

| protocol | what it is | who reports it |
|---|---|---|
| `bleu-13a` | corpus BLEU-1..4, tokenizer 13a, case kept, no smoothing | sacrebleu, `evaluate` |
| `bleu-coco` | corpus BLEU-1..4 of COCO captions on words between blanks, case kept | VLM3D, U-VLM, CT-CHAT |
| `bleu-coco-lower` | the same, lower-cased | AdaRAG-CT, CT-GRAPH |
| `bleu-coco-ptb` | the same after COCO's PTB tokenizer (lower case, no punctuation); needs Java | CT2Rep's tools |
| `precision-hsenet` | mean n-gram precision of single reports (see its function) | HSENet, as "BLEU-n" |
| `bleu-m3d` | mean BLEU-1 of single reports | M3D, Med3DVLM, Med-2E3 |
| `rouge-l` | mean ROUGE-L F1 of single reports, no stemming | HSENet, `evaluate` without its aggregator |
| `rouge-l-stem` | the same with Porter stems | RadEval |
| `rouge-l-coco` | mean of COCO's ROUGE-L (beta 1.2) on words between blanks | VLM3D, CT2Rep, CT-CHAT |
| `meteor-nltk` | mean METEOR of single reports with WordNet; needs nltk's data | HSENet, M3D, `evaluate` |
| `meteor-nltk-stem` | the same without synonyms, on 13a tokens; needs no data | nobody: it runs offline |

A missing (`None`) or empty prediction is an empty text and scores 0. Java's METEOR 1.5 is another number (about half).
"""

from collections.abc import Callable, Sequence

import numpy as np

from .tally import Tally, mean_tally, quotient


ORDERS = (1, 2, 3, 4)
REMOVED_BY_HSENET = str.maketrans("", "", "\"'()")
COCO_TINY, COCO_SMALL = 1e-15, 1e-9  # COCO's smoothing: one in the numerators, the other in the denominators
COCO_ROUGE_BETA = 1.2
Texts = Sequence[str]


def overlap_tally(protocol: str, predictions: Sequence[str | None], references: Sequence[str]) -> Tally:
    """
    Args:
        protocol: a name of the module's table.
        predictions, references: one reference a prediction; the references must have text.

    Raises:
        ValueError: another protocol, lists of different length, or a reference without text.
        LookupError: `meteor-nltk` without nltk's `wordnet` and `punkt_tab`; it says how to get them.
    """
    if protocol not in OVERLAP_PROTOCOLS:
        raise ValueError(f"protocol must be one of {', '.join(OVERLAP_PROTOCOLS)}, got {protocol!r}.")
    if len(predictions) != len(references) or not len(references):
        raise ValueError(
            "predictions and references must be of one length and not empty (a missing prediction is None), "
            f"got {len(predictions)} and {len(references)}."
        )
    empty = [index for index, reference in enumerate(references) if not (reference or "").strip()]
    if empty:
        raise ValueError(f"Every reference must have text, got {len(empty)} empty ones, first: {empty[:5]}.")
    texts = [(prediction or "").strip() for prediction in predictions]
    return OVERLAP_PROTOCOLS[protocol](f"{protocol}/1", texts, list(references))


def _ngram_counts(predictions: Texts, references: Texts, tokenizer: str = "none") -> np.ndarray:
    """(num_items, 10): n-grams that match, n-grams said (n = 1..4), words said, words of the reference."""
    from sacrebleu.metrics import BLEU

    # `force`: sacrebleu warns of text that looks tokenized, which here is meant.
    bleu = BLEU(tokenize=tokenizer, smooth_method="none", effective_order=True, force=True)
    rows = []
    for prediction, reference in zip(predictions, references, strict=True):
        score = bleu.sentence_score(prediction, [reference])
        rows.append([*score.counts, *score.totals, score.sys_len, score.ref_len])
    return np.array(rows, dtype=np.float64)


def _bleu_formula(total: np.ndarray) -> dict[str, np.ndarray]:
    matched, said, length, reference_length = _parts(total)
    with np.errstate(divide="ignore"):
        log_precision = np.log(quotient(matched, said))
    brevity = np.exp(np.minimum(0.0, 1 - quotient(reference_length, length, np.inf)))
    return {f"bleu_{n}": brevity * np.exp(log_precision[..., :n].mean(-1)) for n in ORDERS}


def _coco_formula(total: np.ndarray) -> dict[str, np.ndarray]:
    matched, said, length, reference_length = _parts(total)
    products = np.cumprod((matched + COCO_TINY) / (said + COCO_SMALL), axis=-1)
    ratio = (length + COCO_TINY) / (reference_length + COCO_SMALL)
    brevity = np.exp(np.minimum(0.0, 1 - 1 / ratio))
    return {f"bleu_{n}": products[..., n - 1] ** (1 / n) * brevity for n in ORDERS}


def _parts(total: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    return total[..., :4], total[..., 4:8], total[..., 8], total[..., 9]


def _bleu_13a(protocol: str, predictions: Texts, references: Texts) -> Tally:
    return Tally(protocol, _ngram_counts(predictions, references, "13a"), _bleu_formula)


def _bleu_coco(protocol: str, predictions: Texts, references: Texts) -> Tally:
    return Tally(protocol, _ngram_counts(predictions, references), _coco_formula)


def _bleu_coco_lower(protocol: str, predictions: Texts, references: Texts) -> Tally:
    return _bleu_coco(protocol, [text.lower() for text in predictions], [text.lower() for text in references])


def _bleu_coco_ptb(protocol: str, predictions: Texts, references: Texts) -> Tally:
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer  # of the extra `coco`; starts Java

    tokenizer = PTBTokenizer()
    predictions, references = (
        [words[0] for _, words in sorted(tokenizer.tokenize(_as_captions(texts)).items())]
        for texts in (predictions, references)
    )
    return _bleu_coco(protocol, predictions, references)


def _as_captions(texts: Texts) -> dict[int, list[dict[str, str]]]:
    return {index: [{"caption": text}] for index, text in enumerate(texts)}


def _precision_hsenet(protocol: str, predictions: Texts, references: Texts) -> Tally:
    """No brevity penalty, so one common sentence goes far; quotes and brackets are deleted from the reference only."""
    references = [reference.translate(REMOVED_BY_HSENET) for reference in references]
    counts = _ngram_counts(predictions, references, "13a")
    precisions = quotient(counts[:, :4], counts[:, 4:8])  # the original stops with an error at an empty prediction
    return mean_tally(protocol, {f"precision_{n}": precisions[:, n - 1] for n in ORDERS})


def _bleu_m3d(protocol: str, predictions: Texts, references: Texts) -> Tally:
    counts = _ngram_counts(predictions, references, "13a")
    return mean_tally(protocol, {"mean_bleu_1": _bleu_formula(counts)["bleu_1"]})


def _rouge(protocol: str, predictions: Texts, references: Texts, *, use_stemmer: bool) -> Tally:
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=use_stemmer)
    pairs = zip(predictions, references, strict=True)
    return mean_tally(protocol, {"rouge_l": [scorer.score(truth, text)["rougeL"].fmeasure for text, truth in pairs]})


def _rouge_l(protocol: str, predictions: Texts, references: Texts) -> Tally:
    return _rouge(protocol, predictions, references, use_stemmer=False)


def _rouge_l_stem(protocol: str, predictions: Texts, references: Texts) -> Tally:
    return _rouge(protocol, predictions, references, use_stemmer=True)


def _rouge_l_coco(protocol: str, predictions: Texts, references: Texts) -> Tally:
    pairs = zip(predictions, references, strict=True)
    return mean_tally(protocol, {"rouge_l": [_coco_rouge(text.split(), truth.split()) for text, truth in pairs]})


def _coco_rouge(prediction: list[str], reference: list[str]) -> float:
    if not prediction:
        return 0.0
    common = _longest_common_subsequence(prediction, reference)
    precision, recall = common / len(prediction), common / len(reference)
    if not common:
        return 0.0
    beta = COCO_ROUGE_BETA**2
    return (1 + beta) * precision * recall / (recall + beta * precision)


def _longest_common_subsequence(first: list[str], second: list[str]) -> int:
    numbers: dict[str, int] = {}
    row = np.array([numbers.setdefault(word, len(numbers)) for word in second])
    lengths = np.zeros(len(second) + 1, dtype=np.int64)
    for word in first:
        extended = np.where(row == numbers.get(word, -1), lengths[:-1] + 1, 0)
        lengths[1:] = np.maximum.accumulate(np.maximum(lengths[1:], extended))
    return int(lengths[-1])


def _meteor_nltk(protocol: str, predictions: Texts, references: Texts) -> Tally:
    from nltk.corpus import wordnet
    from nltk.tokenize import word_tokenize

    return _meteor(protocol, predictions, references, word_tokenize, wordnet)


def _meteor_nltk_stem(protocol: str, predictions: Texts, references: Texts) -> Tally:
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

    tokenizer = Tokenizer13a()
    return _meteor(protocol, predictions, references, lambda text: tokenizer(text).split(), _NoSynonyms())


def _meteor(
    protocol: str, predictions: Texts, references: Texts, tokenize: Callable[[str], list[str]], wordnet: object
) -> Tally:
    from nltk.translate.meteor_score import single_meteor_score

    pairs = [(tokenize(text), tokenize(truth)) for text, truth in zip(predictions, references, strict=True)]
    return mean_tally(
        protocol, {"meteor": [single_meteor_score(truth, text, wordnet=wordnet) for text, truth in pairs]}
    )


class _NoSynonyms:
    """Stands in for WordNet where there is none: words match as they are and by their stems."""

    def synsets(self, word: str) -> list:
        return []


OVERLAP_PROTOCOLS: dict[str, Callable[[str, Texts, Texts], Tally]] = {
    "bleu-13a": _bleu_13a,
    "bleu-coco": _bleu_coco,
    "bleu-coco-lower": _bleu_coco_lower,
    "bleu-coco-ptb": _bleu_coco_ptb,
    "precision-hsenet": _precision_hsenet,
    "bleu-m3d": _bleu_m3d,
    "rouge-l": _rouge_l,
    "rouge-l-stem": _rouge_l_stem,
    "rouge-l-coco": _rouge_l_coco,
    "meteor-nltk": _meteor_nltk,
    "meteor-nltk-stem": _meteor_nltk_stem,
}
