"""Faults of published scores on the honest protocols, intervals, paired tests, verdicts and tables."""

import re

import numpy as np
import pytest

from hsenet.metrics import (
    Result,
    chosen_option,
    compare_runs,
    confidence_intervals,
    ct_clip_volume_scores,
    findings_tally,
    image_verdict,
    load,
    major_class_hsenet_tally,
    mean_tally,
    options_m3d_tally,
    options_tally,
    overlap_tally,
    recall_curve,
    results_table,
    retrieval_metrics,
    retrieval_tally,
    volume_retrieval_tally,
    vqa_metrics,
    vqa_tally,
)
from hsenet.metrics.bootstrap import holm_adjusted
from hsenet.metrics.retrieval import retrieval_scores
from hsenet.metrics.verdict import DEPENDS, DOES_NOT_DEPEND
from hsenet.phantom import sample_study


# Retrieval: siblings, ties, MRR


def test_index_only_ground_truth_punishes_a_perfect_model():
    """Two reconstructions share one report: by index alone the perfect model finds the sibling half of the time."""
    studies = np.repeat(np.arange(30), 2)
    embeds = np.eye(30)[studies]
    identity, study = (retrieval_metrics(embeds, embeds, study_ids=ids, ks=(1, 5)) for ids in (None, studies))
    assert identity["image_to_text_R@1"] == identity["text_to_image_R@1"] == 0.5 and identity["image_to_text_R@5"] == 1
    assert study["image_to_text_R@1"] == study["text_to_image_R@1"] == study["image_to_text_mrr"] == 1
    assert identity["image_to_text_mrr"] == pytest.approx((1 + 1 / 2) / 2)
    assert identity["protocol"] == "retrieval-identity/1" and study["protocol"] == "retrieval-study/1"


def test_reciprocal_rank_agrees_with_shuffling():
    rng = np.random.default_rng(0)
    studies = np.array([0, 0, 0, 1, 1, 2, 3])
    images, texts = rng.integers(0, 2, (2, 7, 3)) + np.array([0.0, 0.0, 1.0])
    unit = [rows / np.linalg.norm(rows, axis=1)[:, None] for rows in (images, texts)]
    cosines = (unit[0] @ unit[1].T).round(9)
    drawn = []
    for _ in range(4000):
        order = np.argsort(-(cosines + rng.uniform(0, 1e-10, cosines.shape)), axis=1)
        drawn.append(np.mean(1 / (1 + (studies[order] == studies[:, None]).argmax(1))))
    scores = retrieval_metrics(images, texts, study_ids=studies)
    assert scores["image_to_text_mrr"] == pytest.approx(np.mean(drawn), abs=5 * np.std(drawn) / np.sqrt(4000))


def test_a_constant_embedding_has_the_mrr_of_chance():
    constant = np.ones((50, 4))
    scores = retrieval_metrics(constant, constant)
    assert scores["image_to_text_mrr"] == pytest.approx(scores["chance_mrr"])
    assert scores["chance_mrr"] == pytest.approx(np.mean(1 / np.arange(1, 51)))


def test_tally_and_curve_are_the_metrics():
    rng = np.random.default_rng(1)
    images = rng.normal(size=(40, 8))
    texts, ids = images + rng.normal(size=(40, 8)), [i // 2 for i in range(40)]
    scores, tally = retrieval_metrics(images, texts, study_ids=ids), retrieval_tally(images, texts, study_ids=ids)
    assert tally.protocol == "retrieval-study/1[40 candidates]"
    assert all(scores[name] == pytest.approx(value) for name, value in tally.scores().items())
    curve = recall_curve(images, texts, study_ids=ids)
    assert curve["k"][0] == 1 and curve["k"][-1] == 40 and curve["image_to_text"][-1] == 1
    assert curve["image_to_text"][0] == pytest.approx(scores["image_to_text_R@1"])
    together = retrieval_scores(images, texts, study_ids=ids)
    assert together[0] == scores and together[2] == curve and together[1].protocol == tally.protocol
    assert np.array_equal(together[1].counts, tally.counts)


# Volume to volume: as published, and as it should be


@pytest.fixture(scope="module")
def random_volumes():
    rng = np.random.default_rng(2)
    labels = rng.random((240, 18)) < 0.19
    labels[rng.random(240) < 0.12] = False
    return rng.normal(size=(240, 16)), np.repeat(labels[:120], 2, axis=0), np.repeat(np.arange(120), 2)


def test_published_map_by_hand_and_its_running_mean(random_volumes):
    embeds, labels, _ = random_volumes
    unit = embeds / np.linalg.norm(embeds, axis=1)[:, None]
    gallery = [i for i in range(len(labels)) if labels[i].any()]
    ratios, expected = [], {}
    for k in (1, 5, 10):
        for query in range(len(labels)):
            nearest = sorted(gallery, key=lambda i, q=query: -(unit[q] @ unit[i]))[:k]
            ratios.append(
                np.mean([(labels[query] & labels[i]).sum() / (labels[query] | labels[i]).sum() for i in nearest])
            )
        expected[f"ct_clip_map@{k}"] = np.mean(ratios)  # the list is never emptied between the ks
    scores = ct_clip_volume_scores(embeds, labels, ks=(1, 5, 10))
    assert {name: scores[name] for name in expected} == pytest.approx(expected)
    assert scores["protocol"] == "volume-map-ct-clip/1"


def test_equally_near_volumes_are_taken_in_their_order():
    labels = np.eye(6, 18, dtype=bool)
    labels[:, 0] = [1, 1, 0, 0, 1, 0]
    labels[:, 17] = True
    constant = np.ones((6, 4))
    scores = volume_retrieval_tally(constant, labels, range(6), ks=(2,)).scores()
    jaccard = lambda i, j: (labels[i] & labels[j]).sum() / (labels[i] | labels[j]).sum()  # noqa: E731
    others = {i: [j for j in range(6) if j != i][:2] for i in range(6)}
    by_hand = [np.mean([jaccard(i, j) for j in near]) for i, near in others.items()]
    assert scores["mean_jaccard@2"] == pytest.approx(np.mean(by_hand))


def test_a_random_embedding_looks_good_as_published_and_is_chance_on_the_honest_score(random_volumes):
    embeds, labels, studies = random_volumes
    published = ct_clip_volume_scores(embeds, labels)
    honest = volume_retrieval_tally(embeds, labels, studies).scores()
    assert published["ct_clip_map@1"] > 0.8  # the query finds itself
    assert published["ct_clip_map@5"] > 2 * honest["mean_jaccard@5"]
    assert honest["mean_jaccard@50"] == pytest.approx(honest["chance_jaccard"], abs=0.02)


def test_the_honest_score_by_hand():
    labels = np.array([[1, 1, 0], [1, 1, 0], [1, 0, 0], [0, 0, 1], [0, 0, 0]])
    embeds = np.array([[1, 0.0], [1, 0.0], [1, 0.1], [1, 0.3], [1, 0.5]])
    tally = volume_retrieval_tally(embeds, labels, [0, 0, 1, 2, 3], ks=(1, 50))
    # the siblings find volume 2 (1/2), it finds the first sibling (1/2), volume 3 finds volume 2 (0); volume 4 is out
    assert tally.scores()["mean_jaccard@1"] == pytest.approx((0.5 + 0.5 + 0.5 + 0) / 4)
    assert tally.scores()["mean_jaccard@50"] == pytest.approx((0.25 + 0.25 + (0.5 + 0.5 + 0) / 3 + 0) / 4)
    assert tally.scores()["chance_jaccard"] == pytest.approx(tally.scores()["mean_jaccard@50"])
    with pytest.raises(ValueError, match="two studies"):
        volume_retrieval_tally(embeds, labels, [0] * 5)


# Questions


def test_an_empty_answer_is_right_only_where_the_original_says_so():
    answers = ["Lung/left lung", "Heart", "Pleura"]
    for said in (["", "", ""], [None] * 3, ["/", "a", "/x"]):
        assert major_class_hsenet_tally(said, answers).scores()["major_class_hsenet"] >= 2 / 3
        assert vqa_tally(said, answers).scores()["major_class_accuracy"] == 0
    honest = vqa_metrics(["lung/right lung", "heart disease", "Pleura."], answers)
    assert honest["major_class_accuracy"] == pytest.approx(2 / 3) and honest["accuracy"] == pytest.approx(1 / 3)


def test_sets_and_groups():
    said, answers = ["Pleura and left lung", "left lung", ""], ["left lung, pleura", "left lung, pleura", "heart"]
    tally = vqa_tally(said, answers, {"type": ["location"] * 3, "anatomy": ["lung", "lung", None]})
    scores = tally.scores()
    assert scores["accuracy"] == 0 and scores["set_accuracy"] == pytest.approx(1 / 3)
    assert scores["set_f1"] == pytest.approx((1 + 2 / 3) / 3)
    assert scores["accuracy[type=location]"] == 0 and "accuracy[anatomy=None]" not in scores
    assert scores["set_accuracy[anatomy=lung]"] == 0.5 and scores["set_accuracy[type=location]"] == pytest.approx(
        1 / 3
    )


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("(b)", "B"),
        ("B. left lung", "B"),
        ("B: it is the left lung", "B"),
        ("Left lung.", "B"),
        ("A CTA shows it.", None),
        ("Axial", None),
        ("CTA.", None),
        ("E.", None),
        ("", None),
        (None, None),
        ("heart or left lung", None),
    ],
)
def test_options_are_read_strictly(text, letter):
    assert chosen_option(text, ["heart", "left lung", "right lung"]) == letter


def test_options_beside_m3ds_test():
    said, options = ["CTA.", "B.", "none"], [["x", "y"]] * 3
    assert options_m3d_tally(said, ["A", "B", "A"]).scores()["option_m3d"] == pytest.approx(2 / 3)
    scores = options_tally(said, ["A", "B", "A"], options).scores()
    assert scores == pytest.approx({"option_accuracy": 1 / 3, "unreadable": 2 / 3, "option_chance": 0.5})
    groups = {"type": ["plane", "organ", "organ"], "anatomy": ["lung", None, None]}
    scores = options_tally(
        ["B", "A", "heart"], ["A", "A", "heart"], [["x", "y"], ["x", "y", "z"], None], groups
    ).scores()
    assert scores["option_accuracy"] == 0.5 and scores["option_chance"] == pytest.approx((1 / 2 + 1 / 3) / 2)
    assert scores["option_accuracy[type=organ]"] == 1 and scores["option_accuracy[anatomy=lung]"] == 0
    with pytest.raises(ValueError, match="letter of one of its 2 options, got 'C'"):
        options_tally(["A"], ["C"], [["x", "y"]])


# Intervals and tests


def clustered(rng: np.random.Generator, num_clusters: int, per_cluster: int) -> tuple[np.ndarray, np.ndarray]:
    """Hits that depend on the patient, with probability 0.4 overall."""
    chances = rng.beta(0.8, 1.2, num_clusters)
    return (rng.random((num_clusters, per_cluster)) < chances[:, None]).ravel(), np.repeat(
        np.arange(num_clusters), per_cluster
    )


def test_intervals_by_patient_cover_at_the_nominal_rate_and_by_scan_they_do_not():
    rng, covered = np.random.default_rng(3), {"patients": 0, "scans": 0}
    trials = 500
    for trial in range(trials):
        hits, patients = clustered(rng, 80, 4)
        tally = mean_tally("test/1", {"hit": hits})
        for name, clusters in (("patients", patients), ("scans", np.arange(len(hits)))):
            low, high = confidence_intervals(tally, clusters.tolist(), num_resamples=300, seed=trial)["hit"]
            covered[name] += low <= 0.4 <= high
    assert 0.93 <= covered["patients"] / trials <= 0.97
    assert covered["scans"] / trials < 0.87


def test_corpus_scores_are_recomputed_in_each_resample():
    texts = [sample_study(5, i).findings_text for i in range(60)]
    tally = overlap_tally("bleu-13a", texts[:30], texts[30:])
    low, high = confidence_intervals(tally, list(range(30)), num_resamples=300)["bleu_4"]
    assert low < tally.scores()["bleu_4"] < high
    again = confidence_intervals(tally, list(range(30)), num_resamples=300)["bleu_4"]
    assert (low, high) == again


def test_paired_test_sees_what_two_intervals_hide():
    rng = np.random.default_rng(4)
    hits, patients = clustered(rng, 150, 2)
    better = hits | (rng.random(len(hits)) < 0.06)
    first, second = (mean_tally("test/1", {"hit": values}) for values in (better, hits))
    result = compare_runs(first, second, patients.tolist(), num_resamples=500)["hit"]
    assert result["low"] > 0 and result["p_value"] < 0.01
    intervals = [confidence_intervals(tally, patients.tolist())["hit"] for tally in (first, second)]
    assert intervals[0][0] < intervals[1][1]  # they overlap
    same = compare_runs(first, first, patients.tolist(), num_resamples=200)["hit"]
    assert same["difference"] == 0 and same["p_value"] == 1


def test_randomisation_has_its_level():
    rng, rejected = np.random.default_rng(5), 0
    for trial in range(200):
        first, second = (mean_tally("test/1", {"hit": rng.random(60) < 0.5}) for _ in range(2))
        rejected += (
            compare_runs(first, second, list(range(60)), num_resamples=200, seed=trial)["hit"]["p_value"] < 0.05
        )
    assert rejected <= 20


def test_holm_by_hand():
    adjusted = holm_adjusted({"a": 0.01, "b": 0.04, "c": 0.03, "d": float("nan")})
    assert [adjusted[name] for name in "abc"] == pytest.approx([0.03, 0.06, 0.06]) and np.isnan(adjusted["d"])


def test_runs_of_two_protocols_are_not_compared():
    first, second = (overlap_tally(name, ["a b"] * 2, ["a b"] * 2) for name in ("bleu-13a", "bleu-coco"))
    with pytest.raises(ValueError, match="bleu-13a/1 .*bleu-coco/1"):
        compare_runs(first, second, [0, 1])
    with pytest.raises(ValueError, match="at least two clusters"):
        confidence_intervals(first, [0, 0])
    with pytest.raises(ValueError, match="expected 2, got 1"):
        confidence_intervals(first, [0])


# Verdicts and tables


def verdict_of(own: list[str], other: list[str]) -> dict:
    from hsenet.metrics import RuleLabeller

    truth = np.array([sample_study(6, i).labels for i in range(80)])
    tallies = [findings_tally(RuleLabeller()(texts), truth) for texts in (own, other)]
    own_tally, blind_tally = ({"report": (tally, "findings_f1_macro")} for tally in tallies)
    patients = {"report": list(range(80))}
    return image_verdict(own_tally, blind_tally, patients, texts={"report": (own, other)}, num_resamples=300)


def test_a_constant_and_a_shuffled_generator_fail_loudly():
    texts = [sample_study(6, i).findings_text for i in range(80)]
    rng = np.random.default_rng(7)
    constant = verdict_of([texts[3]] * 80, [texts[3]] * 80)
    shuffled = verdict_of(*([texts[i] for i in rng.permutation(80)] for _ in range(2)))
    for verdict in (constant, shuffled):
        assert not verdict["depends"] and DOES_NOT_DEPEND in verdict["text"]
    assert constant["changed"]["report"] == 0 and shuffled["changed"]["report"] > 0.9
    reader = verdict_of(texts, [texts[i] for i in rng.permutation(80)])
    assert reader["depends"] and DEPENDS in reader["text"] and reader["tests"]["report"]["p_holm"] < 0.05


def test_table_refuses_to_mix_protocols():
    rows = [Result("model", "bleu_4", 0.2, "bleu-13a/1", 0.1, 0.3), Result("constant", "bleu_4", 0.15, "bleu-13a/1")]
    table = results_table([*rows, Result("model", "f1", 0.5, "findings/1")])
    assert "0.200 [0.100, 0.300]" in table and "| constant | 0.150 | – |" in table and "`findings/1`: f1" in table
    with pytest.raises(ValueError, match="bleu-13a/1 and bleu-coco/1"):
        results_table([*rows, Result("published", "bleu_4", 0.24, "bleu-coco/1")])
    with pytest.raises(ValueError, match="two values"):
        results_table([rows[0], rows[0].__class__("model", "bleu_4", 0.3, "bleu-13a/1")])


def test_names_from_a_dataset_stay_text_in_a_table():
    hostile = "acc[type=a|b](http://x) <img src=x>\n| 1 |"
    table = results_table([Result("=cmd|'/x'!A1\nmodel", hostile, 0.5, "p/1[`a`|b]")])
    lines = table.splitlines()
    assert len(lines) == 5 and lines[2].startswith("| \\=cmd\\|'/x'!A1 model | 0.500")
    assert all(len(re.findall(r"(?<!\\)\|", line)) == 3 for line in lines[:3])
    assert "<img" not in table and "](" not in table and "&lt;img" in table


def test_modules_of_evaluate(tmp_path, random_volumes):
    embeds, labels, studies = random_volumes
    embeds, labels, studies = embeds[:20].tolist(), labels[:20].astype(int), studies[:20].tolist()
    options = {"cache_dir": str(tmp_path)}
    found = load("ct_retrieval", **options).compute(predictions=embeds, references=embeds, study_ids=studies)
    assert found["image_to_text_R@1"] == 1 and found["protocol"] == "retrieval-study/1"
    volumes = {"predictions": embeds, "references": labels.tolist()}
    as_published = load("ct_volume_retrieval", "ct-clip", **options).compute(**volumes)
    assert as_published == ct_clip_volume_scores(np.array(embeds), labels)
    honest = load("ct_volume_retrieval", **options).compute(**volumes, study_ids=studies)
    assert (
        honest["mean_jaccard@5"]
        == volume_retrieval_tally(np.array(embeds), labels, studies).scores()["mean_jaccard@5"]
    )
    texts = {"predictions": ["", "B"], "references": ["heart", "B"]}
    assert load("ct_vqa", **options).compute(**texts)["accuracy"] == 0.5
    assert load("ct_vqa", "major-class-hsenet", **options).compute(**texts)["major_class_hsenet"] == 1
    assert (
        load("ct_vqa", "option", **options).compute(predictions=["B"], references=["B"], options=[["x", "y"]])[
            "option_accuracy"
        ]
        == 1
    )
