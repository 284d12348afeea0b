"""Closed questions about a phantom: presence, location, size and count, each with one short answer.

Presence is asked so that "yes" and "no" are about equally frequent for every label: the words of a question alone
tell nothing about its answer.
"""

from dataclasses import dataclass

import numpy as np

from .phantom_findings import BASE_ODDS, Finding
from .phantom_text import ARTERY_NAMES
from .phantom_wording import NUMBERS, Wording, sentence


QUESTION_TYPES = ("presence", "location", "size", "count")
MAXIMUM_QUESTIONS = 12
TERMS = {  # nouns for "Is there ...?"
    "Medical material": ("medical material", "an implanted device, line or wire"),
    "Arterial wall calcification": ("arterial wall calcification", "calcified plaque in the wall of the aorta"),
    "Cardiomegaly": ("cardiomegaly", "enlargement of the heart"),
    "Pericardial effusion": ("pericardial effusion", "fluid in the pericardium"),
    "Coronary artery wall calcification": ("coronary artery calcification", "calcified plaque in a coronary artery"),
    "Hiatal hernia": ("hiatal hernia", "a hiatal hernia"),
    "Lymphadenopathy": ("lymphadenopathy", "an enlarged lymph node"),
    "Emphysema": ("emphysema", "emphysematous change of the lungs"),
    "Atelectasis": ("atelectasis", "an atelectatic area"),
    "Lung nodule": ("a lung nodule", "a pulmonary nodule"),
    "Lung opacity": ("a ground-glass opacity", "ground-glass opacity of the lungs"),
    "Pleural effusion": ("pleural effusion", "fluid in the pleural space"),
    "Consolidation": ("consolidation", "an area of consolidation"),
}
SIDED_TERMS = {
    "Pleural effusion": "pleural effusion",
    "Consolidation": "consolidation",
    "Lung nodule": "a nodule",
    "Lung opacity": "ground-glass opacity",
    "Atelectasis": "atelectasis",
}


@dataclass(frozen=True)
class Question:
    """A question about one label; `question_type` is one of QUESTION_TYPES."""

    question: str
    answer: str
    question_type: str
    label: str


def diameter_class(size_mm: float) -> str:
    """Nodules by the limits that follow-up depends on."""
    return "less than 10 mm" if size_mm < 10 else "10 to 20 mm" if size_mm <= 20 else "more than 20 mm"


def short_axis_class(size_mm: float) -> str:
    """Enlarged lymph nodes by their short axis."""
    return "10 to 15 mm" if size_mm <= 15 else "15 to 20 mm" if size_mm <= 20 else "more than 20 mm"


def write_questions(rng: np.random.Generator, findings: tuple[Finding, ...]) -> tuple[Question, ...]:
    """Up to twelve questions in random order."""
    say = Wording(rng)
    by_label = {finding.label: finding for finding in findings}
    questions = _presence(say, by_label)
    for finding in findings:
        questions += _location(say, finding) + _size(say, finding) + _count(say, finding)
    if "Lung nodule" not in by_label and say.chance(0.25):
        questions.append(Question(_how_many(say, "lung nodules"), "none", "count", "Lung nodule"))
    order = rng.permutation(len(questions))[:MAXIMUM_QUESTIONS]
    return tuple(questions[i] for i in order)


def _is_there(say: Wording, term: str) -> str:
    return say.one_of(
        f"Is there {term}?",
        f"Does this scan show {term}?",
        f"Is {term} present?",
        f"Can {term} be seen on this chest CT?",
        f"Do you see {term}?",
    )


def _presence(say: Wording, present: dict[str, Finding]) -> list[Question]:
    asked = list(present)
    absent = [label for label in BASE_ODDS if label not in present]
    # A rare label is seldom asked with "yes", so it must seldom be asked with "no".
    weight = np.array([BASE_ODDS[label] for label in absent])
    count = 2 if len(asked) < 3 else len(asked) - 1
    asked += [str(label) for label in say.rng.choice(absent, min(count, len(absent)), False, weight / weight.sum())]
    questions = [
        Question(_is_there(say, say.one_of(*TERMS[label])), "yes" if label in present else "no", "presence", label)
        for label in asked
    ]
    for label in SIDED_TERMS:
        if label in present:
            questions.append(_sided_presence(say, present[label]))
    return questions


def _sided_presence(say: Wording, finding: Finding) -> Question:
    """Presence on one side: an answer that a mirrored volume gets wrong."""
    side = say.one_of("right", "left")
    term = f"{SIDED_TERMS[finding.label]} on the {side} side"
    answer = "yes" if finding.side in (side, "bilateral") else "no"
    return Question(_is_there(say, term), answer, "presence", finding.label)


def _location(say: Wording, finding: Finding) -> list[Question]:
    label, kind = finding.label, str(finding.kind)
    if label == "Pleural effusion":
        text = say.one_of("On which side is the pleural effusion?", "Which side does the pleural effusion lie on?")
        return [Question(text, str(finding.side), "location", label)]
    if label == "Medical material" and finding.side:
        text = say.one_of(f"From which side does the {kind} enter?", f"On which side is the {kind}?")
        return [Question(text, finding.side, "location", label)]
    if finding.lobe and finding.count != 1 and label != "Atelectasis":
        text = {
            "Lung nodule": say.one_of("Which lobe holds the largest nodule?", "In which lobe is the largest nodule?"),
            "Consolidation": "Which lobe contains the largest consolidation?",
            "Lung opacity": "Which lobe contains the largest ground-glass opacity?",
        }[label]
        return [Question(text, finding.lobe, "location", label)]
    if finding.lobe:
        noun = {"Lung nodule": "nodule", "Lung opacity": "ground-glass opacity"}.get(label, label.lower())
        text = say.one_of(f"In which lobe is the {noun}?", f"Where is the {noun}?", f"Which lobe shows the {noun}?")
        return [Question(text, finding.lobe, "location", label)]
    if label == "Lymphadenopathy" and finding.count == 1:
        text = say.one_of("At which station is the enlarged lymph node?", "Where is the enlarged lymph node?")
        return [Question(text, kind, "location", label)]
    if label == "Coronary artery wall calcification" and kind in ARTERY_NAMES:
        return [Question("Which coronary artery is calcified?", ARTERY_NAMES[kind], "location", label)]
    if label == "Arterial wall calcification":
        text = say.one_of("Which part of the aorta is calcified?", "Where is the aortic calcification?")
        return [Question(text, kind, "location", label)]
    return []


def _size(say: Wording, finding: Finding) -> list[Question]:
    label = finding.label
    if label in ("Pleural effusion", "Pericardial effusion", "Hiatal hernia"):
        noun = label.lower()
        text = say.one_of(f"How large is the {noun}?", f"Is the {noun} small, moderate or large?")
        return [Question(text, str(finding.severity), "size", label)]
    if label == "Lung nodule":
        noun = "nodule" if finding.count == 1 else "largest nodule"
        text = say.one_of(f"How large is the {noun}?", f"What is the diameter of the {noun}?")
        return [Question(text, diameter_class(finding.size_mm), "size", label)]
    if label == "Lymphadenopathy":
        text = say.one_of("What is the short axis of the largest lymph node?", "How large is the largest lymph node?")
        return [Question(text, short_axis_class(finding.size_mm), "size", label)]
    return []


def _how_many(say: Wording, nouns: str) -> str:
    return say.one_of(
        f"How many {nouns} are there?", f"What is the number of {nouns}?", sentence(f"count the {nouns}")
    )


def _count(say: Wording, finding: Finding) -> list[Question]:
    nouns = {
        "Lung nodule": "lung nodules",
        "Lymphadenopathy": "enlarged lymph nodes",
        "Lung opacity": "ground-glass opacities",
    }.get(finding.label)
    if not nouns:
        return []
    return [Question(_how_many(say, nouns), NUMBERS[finding.count], "count", finding.label)]
