"""The metrics against closed forms, hand-computed values and a table of sentences."""

import math

import numpy as np
import pytest
import torch

from hsenet.metrics import (
    best_constant_report_floor,
    chance_recall,
    finding_scores,
    label_report,
    label_vector,
    majority_answer_floor,
    majority_answers,
    normalise_answer,
    report_metrics,
    retrieval_metrics,
    vqa_metrics,
)
from hsenet.phantom import CT_RATE_LABELS, sample_study


DIRECTIONS = ("image_to_text", "text_to_image")


# Retrieval


def test_matching_embeddings_rank_first():
    embeds = np.eye(12)
    scores = retrieval_metrics(embeds * 3, embeds * 0.5)
    assert scores["protocol"] == "retrieval-identity/1" and scores["num_candidates"] == 12
    for direction in DIRECTIONS:
        assert [scores[f"{direction}_{name}"] for name in ("R@1", "R@10", "mean_rank", "median_rank")] == [1, 1, 1, 1]


@pytest.mark.parametrize("num_items", [7, 40, 1500])
def test_a_constant_embedding_scores_chance(num_items):
    row = np.random.default_rng(0).normal(size=(1, 33)).astype(np.float32)
    constant = np.repeat(row, num_items, axis=0) * np.linspace(1, 5, num_items)[:, None].astype(np.float32)
    scores = retrieval_metrics(constant, constant, ks=(1, 5))
    for direction in DIRECTIONS:
        assert scores[f"{direction}_R@5"] == pytest.approx(5 / num_items) == pytest.approx(scores["chance_R@5"])
        assert scores[f"{direction}_mean_rank"] == scores[f"{direction}_median_rank"] == (num_items + 1) / 2


def test_one_constant_side_scores_chance_too():
    rng = np.random.default_rng(1)
    scores = retrieval_metrics(rng.normal(size=(20, 8)), np.ones((20, 8)))
    assert scores["image_to_text_R@5"] == pytest.approx(0.25)
    assert scores["image_to_text_mean_rank"] == pytest.approx(10.5)


def test_random_embeddings_score_near_chance():
    rng = np.random.default_rng(2)
    scores = retrieval_metrics(rng.normal(size=(1200, 64)), rng.normal(size=(1200, 64)), ks=(100,))
    deviation = math.sqrt(100 / 1200 * (1 - 100 / 1200) / 1200)
    for direction in DIRECTIONS:
        assert abs(scores[f"{direction}_R@100"] - scores["chance_R@100"]) < 4 * deviation


def test_ranks_agree_with_a_sort():
    rng = np.random.default_rng(3)
    images = rng.normal(size=(60, 16))
    texts = images + 1.5 * rng.normal(size=(60, 16))
    cosines = (images / np.linalg.norm(images, axis=1)[:, None]) @ (texts / np.linalg.norm(texts, axis=1)[:, None]).T
    ranks = np.array([1 + list(np.argsort(-row)).index(i) for i, row in enumerate(cosines)])
    scores = retrieval_metrics(images, texts)
    assert scores["image_to_text_mean_rank"] == pytest.approx(ranks.mean())
    assert scores["image_to_text_median_rank"] == pytest.approx(np.median(ranks))
    for k in (1, 5, 10):
        assert scores[f"image_to_text_R@{k}"] == pytest.approx((ranks <= k).mean())
    swapped = retrieval_metrics(texts, images)
    assert swapped["text_to_image_R@5"] == scores["image_to_text_R@5"]


def test_ties_count_as_their_expectation_over_random_orders():
    rng = np.random.default_rng(4)
    images = rng.integers(0, 2, (9, 3)) + np.array([0.0, 0.0, 1.0])  # few distinct rows: many ties
    texts = rng.integers(0, 2, (9, 3)) + np.array([0.0, 0.0, 1.0])
    study_ids = [0, 0, 1, 1, 1, 2, 3, 4, 4]
    cosines = (images / np.linalg.norm(images, axis=1)[:, None]) @ (texts / np.linalg.norm(texts, axis=1)[:, None]).T
    cosines = cosines.round(9)
    hits, ranks = [], []
    for _ in range(4000):
        noisy = cosines + rng.uniform(0, 1e-10, cosines.shape)
        order = np.array(study_ids)[np.argsort(-noisy, axis=1)]
        rank = 1 + (order == np.array(study_ids)[:, None]).argmax(axis=1)
        hits.append((rank <= 2).mean())
        ranks.append(rank.mean())
    scores = retrieval_metrics(images, texts, study_ids=study_ids, ks=(2,))
    assert scores["image_to_text_R@2"] == pytest.approx(np.mean(hits), abs=0.01)
    assert scores["image_to_text_mean_rank"] == pytest.approx(np.mean(ranks), abs=0.03)


def test_the_order_of_the_rows_does_not_matter():
    rng = np.random.default_rng(5)
    images, texts = rng.normal(size=(50, 8)).round(), rng.normal(size=(50, 8)).round()
    images[:, 0] = texts[:, 0] = 1
    study_ids = rng.integers(0, 20, 50)
    order = rng.permutation(50)
    first = retrieval_metrics(images, texts, study_ids=study_ids.tolist())
    second = retrieval_metrics(images[order], texts[order], study_ids=study_ids[order].tolist())
    assert first == pytest.approx(second)


def test_reconstructions_of_one_study_are_hits_only_under_the_study_protocol():
    images = np.repeat(np.eye(6), 2, axis=0)  # two volumes of each study, one report for both
    studies = [f"valid_{i // 2}_a" for i in range(12)]
    identity, study = retrieval_metrics(images, images), retrieval_metrics(images, images, study_ids=studies)
    assert identity["image_to_text_R@1"] == pytest.approx(0.5) and identity["image_to_text_mean_rank"] == 1.5
    assert study["image_to_text_R@1"] == 1.0 and study["image_to_text_mean_rank"] == 1.0
    assert study["protocol"] == "retrieval-study/1" and study["num_studies"] == 6
    assert study["chance_R@5"] == pytest.approx(chance_recall(12, 5, positives=2))


def test_chance_recall_is_the_hypergeometric():
    assert chance_recall(3039, 5) == pytest.approx(5 / 3039)
    assert chance_recall(20, 5, positives=3) == pytest.approx(1 - math.comb(17, 5) / math.comb(20, 5))
    assert chance_recall(20, 18, positives=3) == chance_recall(4, 10) == 1.0
    with pytest.raises(ValueError, match="positives"):
        chance_recall(4, 1, positives=5)


def test_torch_and_numpy_agree():
    images, texts = torch.randn(30, 8, requires_grad=True), torch.randn(30, 8)
    assert retrieval_metrics(images, texts) == retrieval_metrics(images.detach().numpy(), texts.numpy())
    assert retrieval_metrics(images.bfloat16(), texts.bfloat16())["num_candidates"] == 30


@pytest.mark.parametrize(
    ("images", "texts", "options", "message"),
    [
        (np.ones((3, 4)), np.ones((3, 5)), {}, r"\(3, 4\) and \(3, 5\)"),
        (np.ones((3, 4)), np.ones((2, 4)), {}, r"\(3, 4\) and \(2, 4\)"),
        (np.ones(4), np.ones(4), {}, r"got shape \(4,\)"),
        (np.ones((3, 4)), np.ones((3, 4)), {"study_ids": [1, 2]}, "expected 3, got 2"),
        (np.ones((3, 4)), np.ones((3, 4)), {"ks": (0,)}, "at least 1"),
        (np.eye(3) * [[1], [0], [1]], np.eye(3), {}, r"first: \[1\]"),
        (np.eye(3), np.eye(3) * np.nan, {}, "3 rows that are zero or not finite"),
    ],
)
def test_unusable_embeddings_are_refused(images, texts, options, message):
    with pytest.raises(ValueError, match=message):
        retrieval_metrics(images, texts, **options)


# Labeller: sentence -> the findings it asserts, by the short names below

SHORT = {
    "material": "Medical material",
    "aorta": "Arterial wall calcification",
    "heart": "Cardiomegaly",
    "pericardium": "Pericardial effusion",
    "coronary": "Coronary artery wall calcification",
    "hernia": "Hiatal hernia",
    "nodes": "Lymphadenopathy",
    "emphysema": "Emphysema",
    "atelectasis": "Atelectasis",
    "nodule": "Lung nodule",
    "opacity": "Lung opacity",
    "fibrosis": "Pulmonary fibrotic sequela",
    "pleura": "Pleural effusion",
    "mosaic": "Mosaic attenuation pattern",
    "peribronchial": "Peribronchial thickening",
    "consolidation": "Consolidation",
    "bronchiectasis": "Bronchiectasis",
    "septal": "Interlobular septal thickening",
}
SENTENCES = [
    # plain assertions, each label at least once
    ("A right subclavian port catheter ends in the superior vena cava.", "material"),
    ("Status post CABG with intact sternotomy wires; a dual-chamber pacemaker is in place.", "material"),
    ("Calcified plaques are seen along the aortic arch and the descending aorta.", "aorta"),
    ("Calcific atherosclerosis involves the thoracic aorta.", "aorta"),
    ("The heart is mildly enlarged.", "heart"),
    ("Heart size has increased since the last examination.", "heart"),
    ("Cardiothoracic ratio is increased.", "heart"),
    ("There is a small amount of pericardial fluid.", "pericardium"),
    ("Pericardium: minimal effusion.", "pericardium"),
    ("Pericardial fluid up to 9 mm thick (small effusion).", "pericardium"),
    ("Dense calcifications of the LAD and circumflex.", "coronary"),
    ("The coronary arteries are heavily calcified.", "coronary"),
    ("Calcific atheromatous changes in the aorta and coronary arteries.", "aorta coronary"),
    ("Sliding type hiatal hernia.", "hernia"),
    ("Enlarged mediastinal and right hilar lymph nodes, the largest 14 mm in short axis.", "nodes"),
    ("A subcarinal node measures 1.6 cm in short axis.", "nodes"),
    ("Centrilobular emphysematous changes predominate in the upper lobes.", "emphysema"),
    ("Platelike atelectasis at the left base.", "atelectasis"),
    ("Complete collapse of the right middle lobe.", "atelectasis"),
    ("A 5 mm subpleural nodule lies in the lingula.", "nodule"),
    ("Patchy ground-glass opacities in both lungs.", "opacity"),
    ("Apical pleuroparenchymal scarring.", "fibrosis"),
    ("Bilateral pleural effusions, larger on the left.", "pleura"),
    ("A mosaic attenuation pattern is noted.", "mosaic"),
    ("Bronchial walls are diffusely thickened.", "peribronchial"),
    ("Airspace consolidation with air bronchograms in the right lower lobe.", "consolidation"),
    ("Cylindrical bronchiectasis of the lingula.", "bronchiectasis"),
    ("Smooth thickening of the interlobular septa.", "septal"),
    ("Peribronchial and interlobular septal thickening.", "peribronchial septal"),
    # negations and their reach
    ("No pleural or pericardial effusion.", ""),
    ("Pericardial and bilateral pleural effusion.", "pericardium pleura"),
    ("Pleural effusion without pericardial effusion.", "pleura"),
    ("The lungs are clear without consolidation, nodule or effusion.", ""),
    ("The heart is not enlarged.", ""),
    ("Heart size is normal.", ""),
    ("Cardiothoracic index is within normal limits and there is no increase in heart size.", ""),
    ("Effusion was not detected.", ""),
    ("Pleural effusion, consolidation and nodules were not observed.", ""),
    ("Pleural effusion-thickening was not detected in either hemithorax.", ""),
    ("The lungs are free of nodules and infiltrates.", ""),
    ("The left pleural effusion has resolved.", ""),
    ("The left pleural effusion has not completely resolved.", "pleura"),
    ("Interval resolution of the right upper lobe consolidation.", ""),
    ("Partial resolution of the right upper lobe consolidation.", "consolidation"),
    ("The catheter has been removed.", ""),
    ("No focal consolidation, large effusion, or pneumothorax.", ""),
    ("No consolidation, mild dependent atelectasis in the right or left lower lobe.", "atelectasis"),
    ("No effusion on the right; left effusion is present.", "pleura"),
    ("No effusion on the right, left effusion is present.", "pleura"),
    ("No effusion but cardiomegaly.", "heart"),
    ("There is no consolidation; however, a 7 mm nodule is seen.", "nodule"),
    ("There is a nodule in the left lung and pleural effusion is not seen.", "nodule"),
    ("Trachea is patent, no occlusive lesion, peribronchial thickening is observed.", "peribronchial"),
    ("Neither consolidation nor ground glass opacity is identified.", ""),
    ("Mediastinal lymph nodes are not pathologically enlarged.", ""),
    ("No enlarged lymph nodes in the prevascular, paratracheal or hilar stations.", ""),
    ("Small lymph nodes, all less than 10 mm in short axis.", ""),
    ("Hiatal hernia: none. Pericardial effusion: absent.", ""),
    ("Evaluate for pulmonary nodule or effusion.", ""),
    ("Coronary calcification without aortic calcification.", "coronary"),
    ("No abnormality apart from a hiatal hernia.", "hernia"),
    ("The left lung could not be evaluated due to massive pleural effusion.", "pleura"),
    ("The previously described effusion, which was moderate, is no longer seen.", ""),
    ("A nodule not previously seen is present in the right lung.", "nodule"),
    ("Subsegmental atelectasis rather than consolidation.", "atelectasis"),
    # a "no" that leaves the finding standing
    ("No change in the nodule.", "nodule"),
    ("No significant interval change in size of the right pleural effusion.", "pleura"),
    ("A 6 mm nodule in the right upper lobe. No other nodule.", "nodule"),
    ("No calcification or cavitation in the nodule.", "nodule"),
    ("No emphysematous changes.", ""),
    ("No fibrotic changes of the lung parenchyma.", ""),
    # whole passages, other registers
    ("FINDINGS:\nHeart: Enlarged.\nLungs: Clear.\nPleura: No effusion.", "heart"),
    ("1. No acute findings.\n2. Stable emphysema.\n3. Coronary artery disease with stent.", "emphysema material"),
    ("Resolved pleural effusion.", ""),
    ("Small bilateral effusions have decreased but not resolved.", "pleura"),
    ("New consolidation in the right middle lobe, not present on the prior CT.", "consolidation"),
    ("Sequela fibrotic density increases are seen in the apical segments.", "fibrosis opacity"),
    ("Thoracic aorta diameter is normal, calcific plaques are observed on the aortic wall.", "aorta"),
    ("Mild calcific plaques in the coronary arteries and in the arch of the aorta.", "aorta coronary"),
    ("Aortic calcifications; the coronary arteries are free of calcifications.", "aorta"),
    ("Lymph nodes with short axes reaching 7 mm are present in the paratracheal region.", ""),
    ("Left lower lobe nodule, 6 x 5 mm, not calcified, without spiculation.", "nodule"),
    ("The lungs are emphysematous with no focal consolidation and no suspicious nodule.", "emphysema"),
    ("Right-sided chest drain in situ; the effusion has nearly resolved.", "material pleura"),
    ("Lymphadenopathy cannot be assessed without contrast.", ""),
    ("The heart is not only enlarged but shows coronary calcification.", "heart coronary"),
    ("If an effusion develops, drainage is advised.", ""),
    # things that share a word
    ("Calcified nodule in the right upper lobe.", "nodule"),
    ("Calcified granulomatous lymph nodes next to the aortic arch.", ""),
    ("Aortic valve calcification.", ""),
    ("Extensive subcutaneous emphysema of the chest wall.", ""),
    ("A hypodense nodule in the left lobe of the thyroid.", ""),
    ("Bilateral adrenal nodules and a thyroid nodule.", ""),
    ("Good contrast opacification of the pulmonary arteries.", ""),
    ("Interventricular septal thickening.", ""),
    ("Shoulder joint effusion.", ""),
    ("Sequelae of old rib fractures.", ""),
    # written afterwards, to trip the rules
    (
        "No pleural effusion, pneumothorax, or consolidation is present, but a 4 mm nodule is noted in the lingula.",
        "nodule",
    ),
    ("The lungs show no consolidation; emphysema predominates in the upper lobes.", "emphysema"),
    ("No pericardial effusion and mild cardiomegaly.", "heart"),
    (
        "There is no evidence of effusion in the right hemithorax, whereas the left contains an effusion.",
        "pleura",
    ),
    ("Neither lung shows nodules, and bronchiectasis is absent.", ""),
    ("No nodule larger than 3 mm.", ""),
    ("No new nodules; the known nodule in the right upper lobe measures 6 mm.", "nodule"),
    ("The consolidation seen previously is no longer visible.", ""),
    ("Previously noted ground-glass opacities have cleared completely.", ""),
    ("Pleural effusion has resolved, leaving a small band of atelectasis.", "atelectasis"),
    ("Emphysema is no longer the dominant finding.", "emphysema"),
    ("Resolving consolidation in the left lower lobe.", "consolidation"),
    ("Early interstitial fibrosis cannot be excluded.", "fibrosis"),
    ("We cannot exclude a small pericardial effusion.", "pericardium"),
    ("Lymphadenopathy is not excluded on this unenhanced study.", "nodes"),
    ("Calcified atheroma of the aorta without coronary calcification.", "aorta"),
    ("Without contrast, the nodule in the left lung cannot be characterised.", "nodule"),
    ("Cardiomegaly without pericardial effusion or pleural effusion.", "heart"),
    ("Consolidation without air bronchograms in the right middle lobe.", "consolidation"),
    ("It is not true that there is no effusion.", "pleura"),
    ("The absence of emphysema cannot be confirmed.", "emphysema"),
    ("There is no lung segment without emphysema.", "emphysema"),
    ("The effusion is not absent on the left.", "pleura"),
    ("Unchanged mosaic attenuation of both lungs.", "mosaic"),
    ("No interval change in the coronary calcifications.", "coronary"),
    ("The hiatal hernia is unchanged.", "hernia"),
    ("No pleural effusion, unchanged.", ""),
    ("Stable appearance without new consolidation; unchanged septal thickening.", "septal"),
    ("No emphysema, bronchiectasis, mosaic attenuation, or honeycombing.", ""),
    ("No lymphadenopathy, hiatal hernia, cardiomegaly or effusion.", ""),
    ("Negative for: nodules, consolidation, effusion.", ""),
    ("There are no: pleural effusion, consolidation, atelectasis.", ""),
    ("The following are not seen: nodules, effusion, consolidation.", ""),
    ("Absent: nodules, effusion. Present: emphysema.", "emphysema"),
    ("Nodules (-), effusion (-), emphysema (+).", "emphysema"),
    ("Small ascites and a thickened gallbladder wall; no free fluid in the pelvis.", ""),
    ("A 2 cm hypodense lesion in the liver and a nodule in the right adrenal gland.", ""),
    ("Calcified plaque in the abdominal aorta and splenic artery.", "aorta"),
    ("Knee effusion was reported elsewhere.", ""),
    ("Hepatic fibrosis with nodular contour.", ""),
    ("Emphysema of the mediastinum after intubation.", ""),
    ("Prostatic and breast implants were not present.", ""),
    ("Renal cortical scarring on the left.", ""),
    ("Opacification of the maxillary sinuses.", ""),
    ("Umbilical hernia containing fat.", ""),
    ("Aortic stent graft in place.", "material"),
    ("Prior sternotomy for coronary bypass, wires intact.", "material"),
    ("Family history of emphysema.", ""),
    ("Patient with known emphysema.", "emphysema"),
    ("Nothing to suggest consolidation or effusion.", ""),
    ("The scan fails to show any consolidation.", ""),
    ("The lungs are devoid of nodules.", ""),
    ("Non-enlarged mediastinal lymph nodes.", ""),
    ("Nonenlarged hilar nodes.", ""),
    ("Pleural effusion is seen neither on the right nor on the left.", ""),
    ("The effusions have not increased.", "pleura"),
    ("The nodule is not enlarged.", "nodule"),
    ("Rather than emphysema, thin-walled cysts are seen.", ""),
    ("No convincing pericardial effusion.", ""),
    ("No calcified nodules; a noncalcified nodule of 5 mm.", "nodule"),
    ("Hardly any emphysema remains.", "emphysema"),
    ("None of the nodules has grown.", "nodule"),
    ("None of the lobes shows consolidation.", ""),
    ("No lobe is free of emphysema.", "emphysema"),
    ("Consolidation has been replaced by fibrotic bands.", "fibrosis"),
    ("No cardiomegaly; pericardial effusion, 5 mm.", "pericardium"),
    ("Neither pleural nor pericardial effusion; small hiatal hernia.", "hernia"),
    ("No suspicious nodule, a benign calcified nodule is unchanged.", "nodule"),
    ("There is no pleural thickening or effusion.", ""),
    ("No lung mass, consolidation or ground-glass; bilateral bronchial wall thickening.", "peribronchial"),
    ("The aorta and coronary arteries are not calcified.", ""),
    ("Coronary calcification is not present, aortic wall calcification is.", "aorta"),
    ("Pleural effusion, not previously described.", "pleura"),
    ("Without evidence for interlobular septal thickening.", ""),
    ("No pneumothorax after removal of the chest tube.", ""),
    ("Endotracheal tube has been removed; central line remains.", "material"),
    ("Not only nodules but also consolidation.", "nodule consolidation"),
    ("Effusion is improbable.", ""),
    ("No further increase of the pleural effusion, no consolidation.", "pleura"),
    ("No pericardial effusion persists.", ""),
    ("Bronchiectasis has not been demonstrated.", ""),
    ("Bronchiectasis has not changed.", "bronchiectasis"),
    ("Bronchiectasis: unchanged. Nodules: unchanged. Effusion: none.", "bronchiectasis nodule"),
    ("Lungs: no nodules or consolidation Heart: enlarged Pleura: no effusion", "heart"),
    ("No effusion/consolidation/nodule.", ""),
    ("Gallbladder, liver nodule, kidney cyst; the lungs are clear.", ""),
    ("Thyroid nodule; no lung nodule.", ""),
    ("Nodular thickening of the left adrenal gland.", ""),
    ("Opacity of the left maxillary sinus.", ""),
    ("Pelvic and perihepatic fluid.", ""),
    ("Subglottic stenosis after tracheostomy, tube removed.", ""),
    ("Fracture consolidation of ribs 5 and 6.", ""),
    ("Diffuse calcification of the mitral annulus.", ""),
    ("Iliac lymph nodes up to 15 mm.", "nodes"),
    ("Bullous emphysema, absence of consolidation, presence of effusion.", "emphysema pleura"),
    ("", ""),
]
BEYOND_RULES = [  # as the labeller's docstring says
    ("The right effusion has resolved, while the left persists.", "pleura"),
    ("History of lung nodule; none is seen today.", ""),
    ("Left lower lobe atelectasis has re-expanded.", ""),
    ("No pleural effusion is seen on the left, but on the right there is one.", "pleura"),
    ("The question of lymphadenopathy can be answered in the negative.", ""),
]


@pytest.mark.parametrize(("sentence", "expected"), SENTENCES)
def test_labeller_reads_the_sentence(sentence, expected):
    found = {label for label, value in label_report(sentence).items() if value}
    assert found == {SHORT[name] for name in expected.split()}
    assert {label for label, value in label_report(sentence.upper()).items() if value} == found


@pytest.mark.xfail(strict=True, reason="a rule that could read it would be wrong elsewhere")
@pytest.mark.parametrize(("sentence", "expected"), BEYOND_RULES)
def test_labeller_does_not_read_everything(sentence, expected):
    test_labeller_reads_the_sentence(sentence, expected)


def test_every_label_is_asserted_somewhere_in_the_table():
    assert {name for _, expected in SENTENCES for name in expected.split()} == set(SHORT)
    assert tuple(SHORT.values()) == CT_RATE_LABELS


@pytest.mark.parametrize(
    ("sentence", "label"),
    [
        ("Possible consolidation in the left lower lobe.", "Consolidation"),
        ("A small pericardial effusion cannot be excluded.", "Pericardial effusion"),
        ("Findings suspicious for lymphadenopathy.", "Lymphadenopathy"),
        ("The heart is probably enlarged.", "Cardiomegaly"),
        ("Pleural effusion?", "Pleural effusion"),
    ],
)
def test_a_hedged_finding_follows_the_policy(sentence, label):
    assert label_report(sentence)[label] == 1
    assert label_report(sentence, uncertain="negative")[label] == 0
    assert label_report("Definite " + label + ". " + sentence, uncertain="negative")[label] == 1


def test_a_hedge_on_the_nature_of_a_finding_is_none_on_the_finding():
    assert label_report("A nodule, possibly metastatic.", uncertain="negative")["Lung nodule"] == 1
    assert label_report("No possible consolidation.")["Consolidation"] == 0


def test_label_vector_follows_the_labels_asked_for():
    text = "Cardiomegaly.\nNo pleural\neffusion. Hiatal hernia"
    assert label_vector(text, labels=("Hiatal hernia", "Pleural effusion", "Cardiomegaly")) == [1, 0, 1]
    assert sum(label_vector(None)) == 0 and len(label_vector("")) == 18
    with pytest.raises(ValueError, match="Fracture"):
        label_vector(text, labels=("Fracture",))
    with pytest.raises(ValueError, match="'positive' or 'negative'"):
        label_report(text, uncertain="maybe")


def test_labeller_agrees_with_the_phantoms():
    for index in range(300):
        study = sample_study(1, index)
        text = f"{study.findings_text} {study.impression_text}"
        assert label_vector(text) == list(study.labels), text


# Reports


def test_bleu_by_hand():
    # 5 tokens against 6: four of five words match, two of four bigrams, one of three trigrams, no 4-gram
    scores = report_metrics(["the heart looks normal ."], ["the heart appears normal . nodule"])
    assert scores["bleu_1"] == pytest.approx(math.exp(1 - 6 / 5) * 4 / 5)
    assert scores["bleu_2"] == pytest.approx(math.exp(1 - 6 / 5) * math.sqrt(4 / 5 * 2 / 4))
    assert scores["bleu_3"] == scores["bleu_4"] == 0.0
    assert scores["bleu_protocol"] == "bleu-13a/1"


def test_bleu_is_over_the_corpus_and_knows_case():
    references = ["The heart is normal in size.", "A nodule is seen in the left lung."]
    assert report_metrics(references, references)["bleu_4"] == pytest.approx(1.0)
    assert report_metrics([text.upper() for text in references], references)["bleu_1"] < 0.3
    half = report_metrics([references[0], ""], references)  # 7 tokens of 16: precision 1, brevity exp(1 - 16/7)
    assert half["bleu_4"] == pytest.approx(math.exp(1 - 16 / 7))


def test_missing_and_empty_predictions_count_as_empty_reports():
    references = ["Cardiomegaly.", "Cardiomegaly.", "Cardiomegaly.", "Hiatal hernia."]
    scores = report_metrics(["Cardiomegaly.", None, "  ", "Hiatal hernia."], references)
    assert scores["num_empty_predictions"] == 2 and scores["num_reports"] == 4
    assert scores["per_finding"]["Cardiomegaly"] == pytest.approx(
        {"precision": 1.0, "recall": 1 / 3, "f1": 0.5, "support": 3, "predicted": 1}
    )
    assert scores["findings_f1_macro"] == pytest.approx(0.75)
    assert scores["findings_f1_micro"] == pytest.approx(2 * 2 / (2 + 4))
    assert len(scores["labels_without_positives"]) == 16 and "Emphysema" in scores["labels_without_positives"]
    nothing = report_metrics([None] * 4, references)
    assert nothing["bleu_1"] == nothing["findings_f1_macro"] == nothing["findings_f1_micro"] == 0.0


def test_finding_scores_agree_with_a_count_by_hand():
    rng = np.random.default_rng(6)
    labels = CT_RATE_LABELS[:5]
    truth, predicted = rng.random((80, 5)) < 0.3, rng.random((80, 5)) < 0.4
    truth[:, 4] = False
    scores = finding_scores(predicted, truth, labels=labels)
    f1s = []
    for i, label in enumerate(labels[:4]):
        pairs = list(zip(predicted[:, i], truth[:, i], strict=True))
        hit, false, missed = pairs.count((True, True)), pairs.count((True, False)), pairs.count((False, True))
        precision, recall = hit / (hit + false), hit / (hit + missed)
        f1s.append(2 * precision * recall / (precision + recall))
        assert scores["per_finding"][label]["f1"] == pytest.approx(f1s[-1])
    assert scores["findings_f1_macro"] == pytest.approx(np.mean(f1s))
    assert scores["labels_without_positives"] == [labels[4]]
    hits = (predicted & truth).sum()
    assert scores["findings_f1_micro"] == pytest.approx(2 * hits / (predicted.sum() + truth.sum()))


def test_given_labels_are_the_truth():
    given = [{"Cardiomegaly": 1, "Emphysema": 0}]
    subset = ("Emphysema", "Cardiomegaly")
    scores = report_metrics(["Emphysema."], ["Emphysema."], reference_labels=given, labels=subset)
    assert scores["per_finding"]["Cardiomegaly"]["support"] == 1 and scores["findings_f1_micro"] == 0.0
    assert "reference labels given" in scores["findings_protocol"] and "2 labels" in scores["findings_protocol"]
    columns = report_metrics(["Emphysema."], ["Emphysema."], reference_labels=np.array([[0, 1]]), labels=subset)
    assert columns["per_finding"] == scores["per_finding"]
    inferred = report_metrics(["Emphysema."], ["Emphysema."], labels=subset)
    assert inferred["findings_f1_macro"] == 1.0 and "inferred" in inferred["findings_protocol"]


def test_a_truth_without_findings_has_no_f1():
    scores = report_metrics(["Clear lungs."], ["No nodule."])
    assert math.isnan(scores["findings_f1_macro"]) and math.isnan(scores["findings_f1_micro"])


def test_no_constant_prediction_beats_the_floor():
    rng = np.random.default_rng(7)
    labels = CT_RATE_LABELS[:6]
    truth = rng.random((50, 6)) < np.array([0.5, 0.3, 0.2, 0.1, 0.05, 0.0])
    floor = best_constant_report_floor(truth, labels=labels)
    reached = []
    for number in range(64):
        constant = np.tile([number >> i & 1 for i in range(6)], (50, 1))
        scores = finding_scores(constant, truth, labels=labels)
        reached.append((scores["findings_f1_macro"], scores["findings_f1_micro"]))
    assert floor["constant_labels_f1_macro"] == pytest.approx(max(macro for macro, _ in reached))
    assert floor["constant_labels_f1_micro"] == pytest.approx(max(micro for _, micro in reached))


def test_the_best_training_report_is_scored_as_a_constant_report():
    truth = [{"Cardiomegaly": 1, "Emphysema": 1}, {"Cardiomegaly": 1, "Emphysema": 0}]
    subset = ("Cardiomegaly", "Emphysema")
    reports = ["Emphysema.", "No finding.", "Cardiomegaly."]
    floor = best_constant_report_floor(truth, training_reports=reports, labels=subset)
    assert floor["constant_report"] == "Cardiomegaly." and floor["constant_report_index"] == 2
    as_predicted = report_metrics(["Cardiomegaly."] * 2, ["a", "b"], reference_labels=truth, labels=subset)
    assert floor["constant_report_f1_macro"] == as_predicted["findings_f1_macro"] == 0.5
    assert floor["constant_report_f1_micro"] == pytest.approx(as_predicted["findings_f1_micro"])
    assert floor["constant_labels_f1_macro"] == pytest.approx((1 + 2 / 3) / 2)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((["a"], ["a", "b"]), {}, "got 1 and 2"),
        (([], []), {}, "not empty"),
        ((["a"], [""]), {}, "1 empty ones"),
        ((["a"], ["a"]), {"reference_labels": np.zeros((2, 18))}, "expected 1, got 2"),
        ((["a"], ["a"]), {"reference_labels": np.zeros((1, 5))}, r"\(num_reports, 18\) matrix, got shape \(1, 5\)"),
        ((["a"], ["a"]), {"reference_labels": np.full((1, 18), -1)}, r"0 or 1, got \[-1\]"),
        ((["a"], ["a"]), {"reference_labels": [{"Emphysema": 1}]}, "missing"),
    ],
)
def test_unusable_reports_are_refused(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        report_metrics(*arguments, **options)


# Questions


def test_exact_match_after_normalisation():
    assert normalise_answer("  Right  lower\nlobe. ") == "right lower lobe"
    assert normalise_answer("1.5 cm") == "1.5 cm" and normalise_answer(None) == normalise_answer(" . ") == ""
    scores = vqa_metrics(["Yes.", "no", "right lower lobe of the lung", "", None], ["yes", "no", "right", "yes", "no"])
    assert scores["accuracy"] == 0.4 and scores["num_empty_predictions"] == 2 and scores["num_questions"] == 5
    assert "lower" in scores["normalisation"]


def test_accuracy_by_type_and_macro():
    scores = vqa_metrics(["yes", "yes", "left", ""], ["yes", "no", "left", "right"], ["presence"] * 2 + ["side"] * 2)
    assert scores["accuracy_by_type"] == {"presence": 0.5, "side": 0.5}
    scores = vqa_metrics(["yes", "no", "no", "left"], ["yes"] * 3 + ["left"], ["presence"] * 3 + ["side"])
    assert scores["accuracy"] == 0.5 and scores["accuracy_macro"] == pytest.approx((1 / 3 + 1) / 2)
    assert scores["num_by_type"] == {"presence": 3, "side": 1}


def test_majority_answers_need_no_image():
    train_answers, train_groups = ["yes", "No.", "no", "left", "right"], ["p", "p", "p", "s", "s"]
    assert majority_answers(train_answers, train_groups, ["p", "s", "unseen"]) == ["no", "left", "no"]
    floor = majority_answer_floor(train_answers, train_groups, ["no", "left", "two", "yes"], ["p", "s", "n", "p"])
    assert floor["group_majority_accuracy"] == 0.5 and floor["global_majority_accuracy"] == 0.25
    assert floor["global_majority_answer"] == "no" and floor["num_groups"] == 3 and floor["num_unseen_groups"] == 1


def test_unusable_questions_are_refused():
    with pytest.raises(ValueError, match="got 1 and 2"):
        vqa_metrics(["yes"], ["yes", "no"])
    with pytest.raises(ValueError, match="1 empty ones"):
        vqa_metrics(["", "yes"], ["", "yes"])
    with pytest.raises(ValueError, match="question_types"):
        vqa_metrics(["yes"], ["yes"], ["side", "side"])
    with pytest.raises(ValueError, match="not empty"):
        majority_answer_floor([], [], ["yes"], ["side"])
