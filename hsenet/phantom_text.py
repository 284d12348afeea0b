"""Writes a phantom's report in the register of a chest CT report: true of the volume, never twice in the same words.

A report walks through the regions as radiologists do: devices, airways, heart and vessels, mediastinum, lungs, pleura,
upper abdomen, bones. Every finding present is described; of what is absent only a random part is mentioned.
"""

import numpy as np

from .phantom_findings import Finding
from .phantom_text_lungs import describe_lungs, lobes_of, lungs_of
from .phantom_wording import NUMBERS, Wording, join_words, sentence


ARTERY_NAMES = {
    "LAD": "left anterior descending artery",
    "LCX": "circumflex artery",
    "RCA": "right coronary artery",
}
NO_ACUTE_FINDING = (
    "No acute cardiopulmonary abnormality.",
    "Thoracic CT within normal limits.",
    "No active disease in the chest.",
    "Normal chest CT.",
    "No significant abnormality of the thorax.",
    "Unremarkable examination of the chest.",
)


def write_report(rng: np.random.Generator, findings: tuple[Finding, ...]) -> tuple[str, str]:
    """The findings section and the impression of a study."""
    say = Wording(rng)
    by_label = {finding.label: finding for finding in findings}
    sections = (_devices, _airways, _heart, _vessels, _mediastinum, describe_lungs, _pleura, _abdomen, _bones, _neck)
    sentences = [sentence(text) for section in sections for text in section(say, by_label)]
    return " ".join(sentences), _impression(say, findings)


def _devices(say: Wording, present: dict[str, Finding]) -> list[str]:
    finding = present.get("Medical material")
    if not finding:
        return []
    side = finding.side
    return [
        {
            "central venous catheter": lambda: say.one_of(
                f"a {side} central venous catheter ends in the superior vena cava",
                f"central venous catheter inserted from the {side}, with its tip in the superior vena cava",
                f"a central line enters from the {side} side and terminates in the superior vena cava",
            ),
            "port catheter": lambda: say.one_of(
                f"a port catheter is present in the {side} anterior chest wall",
                f"{side} sided port with its catheter in the superior vena cava",
                f"a subcutaneous port lies in the {side} chest wall, its catheter tip in the superior vena cava",
            ),
            "pacemaker": lambda: say.one_of(
                "a pacemaker is seen in the left chest wall with its lead in the right heart",
                "cardiac pacemaker in the left anterior chest wall",
                "a left sided pacemaker generator with an intracardiac lead is observed",
            ),
            "sternotomy wires": lambda: say.one_of(
                "metallic suture materials of a previous sternotomy are seen in the sternum",
                "median sternotomy wires are present",
                "sternal wires secondary to previous cardiac surgery are observed",
            ),
        }[finding.kind]()
    ]


def _airways(say: Wording, present: dict[str, Finding]) -> list[str]:
    return [
        say.one_of(
            "trachea and both main bronchi are open",
            "the trachea and main bronchi are patent",
            "the central airways are clear",
            "trachea is in the midline and the main bronchi are patent",
            "no obstructive pathology is observed in the trachea and main bronchi",
        )
    ][: int(say.chance(0.85))]


def _heart(say: Wording, present: dict[str, Finding]) -> list[str]:
    texts = []
    if finding := present.get("Cardiomegaly"):
        grade = finding.severity
        adverb = {"mild": "mildly", "moderate": "moderately", "severe": "markedly"}[grade]
        texts.append(
            say.one_of(
                f"the heart is {adverb} enlarged",
                f"heart size is {adverb} increased",
                f"there is {grade} cardiomegaly",
                f"the cardiothoracic ratio is increased in favour of the heart, consistent with {grade} cardiomegaly",
            )
        )
    elif say.chance(0.6):
        texts.append(
            say.one_of(
                "heart size is normal",
                "the heart is normal in size",
                "heart contour and size are normal",
                "the cardiothoracic ratio is within normal limits",
                "no cardiomegaly",
            )
        )
    if finding := present.get("Pericardial effusion"):
        size, grade = finding.size_mm, finding.severity
        texts.append(
            say.one_of(
                f"{grade} pericardial effusion measuring {size} mm in thickness",
                f"there is a {grade} pericardial effusion, {size} mm at its deepest",
                f"pericardial fluid with a thickness of {size} mm is observed ({grade} effusion)",
                f"a {grade} amount of pericardial effusion reaching {size} mm is seen",
            )
        )
    elif "Pleural effusion" in present and say.chance(0.4):
        texts.append(say.one_of("no pericardial effusion", "pericardial effusion was not detected"))
    return texts


def _vessels(say: Wording, present: dict[str, Finding]) -> list[str]:
    texts = []
    if finding := present.get("Arterial wall calcification"):
        grade, place = finding.severity, finding.kind
        texts.append(
            say.one_of(
                f"{grade} calcified atheromatous plaques are observed in the wall of the {place}",
                f"there is {grade} atherosclerotic calcification of the {place}",
                f"{grade} calcification of the arterial wall is seen along the {place}",
                f"{grade} calcific atherosclerosis involves the {place}",
            )
        )
    elif say.chance(0.3):
        texts.append(
            say.one_of(
                "the calibre of the thoracic aorta is normal",
                "mediastinal vascular structures are of normal calibre",
                "thoracic aorta and pulmonary arteries have normal diameters",
                "no calcification is seen in the wall of the thoracic aorta",
            )
        )
    if finding := present.get("Coronary artery wall calcification"):
        arteries = join_words([ARTERY_NAMES[name] for name in finding.kind.split(", ")])
        grade = finding.severity
        texts.append(
            say.one_of(
                f"{grade} coronary artery calcification in the {arteries}",
                f"calcified plaques are observed in the coronary arteries, namely the {arteries} ({grade})",
                f"there are {grade} calcifications in the walls of the coronary arteries, involving the {arteries}",
                f"{grade} coronary calcification is noted along the {arteries}",
            )
        )
    elif say.chance(0.2):
        texts.append(say.one_of("no coronary artery calcification", "the coronary arteries are free of calcification"))
    return texts


def _mediastinum(say: Wording, present: dict[str, Finding]) -> list[str]:
    texts = []
    if finding := present.get("Lymphadenopathy"):
        places = join_words(finding.kind.split(", "))
        size = finding.size_mm
        if finding.count == 1:
            texts.append(
                say.one_of(
                    f"an enlarged {places} lymph node measures {size} mm in short axis",
                    f"{places} lymphadenopathy, {size} mm in short diameter",
                    f"a pathologically enlarged lymph node of {size} mm short axis lies in the {places} region",
                )
            )
        else:
            count = NUMBERS[finding.count]
            texts.append(
                say.one_of(
                    f"{count} enlarged lymph nodes in the {places} stations, the largest {size} mm in short axis",
                    f"lymphadenopathy in the {places} regions ({count} nodes), up to {size} mm in short diameter",
                    f"{count} pathologically enlarged lymph nodes are seen: {places}; the largest measures {size} mm",
                )
            )
    elif say.chance(0.6):
        texts.append(
            say.one_of(
                "no enlarged mediastinal or hilar lymph nodes",
                "no lymph node of pathological size is observed in the mediastinum and hila",
                "there is no lymphadenopathy",
                "no pathologically enlarged mediastinal lymph nodes were detected",
            )
        )
    if finding := present.get("Hiatal hernia"):
        grade, size = finding.severity, finding.size_mm
        texts.append(
            say.one_of(
                f"{grade} hiatal hernia, {size} mm in diameter, {finding.kind}",
                f"there is a {grade} sliding type hiatal hernia measuring {size} mm",
                f"a {grade} hiatal hernia {finding.kind} is observed behind the heart, {size} mm across",
            )
        )
    elif say.chance(0.25):
        texts.append(
            say.one_of(
                "the oesophagus is of normal calibre", "oesophageal wall thickness is normal", "no hiatal hernia"
            )
        )
    return texts


def _pleura(say: Wording, present: dict[str, Finding]) -> list[str]:
    finding = present.get("Pleural effusion")
    if finding:
        side, grade, size = finding.side, finding.severity, finding.size_mm
        if side == "bilateral":
            return [
                say.one_of(
                    f"bilateral {grade} pleural effusions, {size} mm in thickness",
                    f"there is {grade} pleural effusion on both sides, measuring up to {size} mm",
                    f"free fluid in both pleural spaces reaching {size} mm ({grade} effusion)",
                )
            ]
        return [
            say.one_of(
                f"{grade} {side} pleural effusion, {size} mm in thickness",
                f"there is a {grade} pleural effusion on the {side} measuring {size} mm",
                f"free pleural effusion with a depth of {size} mm on the {side} side ({grade})",
                f"a {grade} amount of fluid is observed in the {side} pleural space, pleural effusion of {size} mm",
            )
        ]
    if not say.chance(0.7):
        return []
    if "Pericardial effusion" in present:
        return [say.one_of("no pleural effusion", "pleural effusion was not detected", "the pleural spaces are clear")]
    return [
        say.one_of(
            "no pleural or pericardial effusion was seen",
            "no pleural effusion or thickening",
            "there is no pleural effusion or pneumothorax",
            "pleural and pericardial effusion was not detected",
            "the pleural spaces are clear",
        )
    ]


def _abdomen(say: Wording, present: dict[str, Finding]) -> list[str]:
    if not say.chance(0.75):
        return []
    return [
        say.one_of(
            "upper abdominal organs included in the sections are normal",
            "the visible part of the liver is unremarkable",
            "no space-occupying lesion in the imaged liver and spleen",
            "sections through the upper abdomen show no abnormality",
        )
    ]


def _bones(say: Wording, present: dict[str, Finding]) -> list[str]:
    if not say.chance(0.75):
        return []
    return [
        say.one_of(
            "no lytic or destructive lesion in the bones",
            "bone structures in the study area are natural",
            "vertebral body heights are preserved",
            "no fracture is seen in the ribs and vertebrae",
        )
    ]


def _neck(say: Wording, present: dict[str, Finding]) -> list[str]:
    if not say.chance(0.4):
        return []
    return [
        say.one_of(
            "the thyroid gland is homogeneous and of normal size",
            "soft tissues of the thoracic inlet are unremarkable",
            "no mass is seen at the thoracic inlet",
        )
    ]


def _conclusion(say: Wording, finding: Finding) -> str:
    """The impression's short words for one finding."""
    if finding.label in ("Lung nodule", "Lung opacity", "Consolidation", "Atelectasis"):
        return _conclude_in_lobes(say, finding)
    grade, side, kind = finding.severity, finding.side, str(finding.kind)
    device = f"{side} {kind}" if side else kind
    enlarged = kind if finding.count == 1 else "mediastinal and hilar"
    sided_effusion = f"{side} pleural effusion{'s' * (side == 'bilateral')}"
    wordings = {
        "Medical material": (device, f"{device} in place"),
        "Arterial wall calcification": ("aortic calcification", f"{grade} calcified atherosclerosis of the aorta"),
        "Cardiomegaly": (f"{grade} cardiomegaly", "cardiomegaly", "enlarged heart"),
        "Pericardial effusion": (f"{grade} pericardial effusion", "pericardial effusion"),
        "Coronary artery wall calcification": ("coronary artery calcification", f"{grade} coronary calcification"),
        "Hiatal hernia": ("hiatal hernia", f"{grade} hiatal hernia"),
        "Lymphadenopathy": (f"{enlarged} lymphadenopathy", f"enlarged {enlarged} lymph nodes"),
        "Emphysema": ("emphysema", f"{grade} emphysema", "emphysematous changes in both lungs"),
        "Pleural effusion": (sided_effusion, f"{grade} {sided_effusion}"),
    }
    return say.one_of(*wordings[finding.label])


def _conclude_in_lobes(say: Wording, finding: Finding) -> str:
    lobe, lobes = finding.lobe, lobes_of(finding)
    single = finding.count in (1, None)
    wordings = {
        ("Atelectasis", True): (f"atelectasis in the {lobe}", f"{finding.kind} atelectasis, {lobe}"),
        ("Lung nodule", True): (f"nodule in the {lobe}", f"{finding.size_mm} mm {lobe} nodule"),
        ("Lung nodule", False): (f"nodules in {lungs_of(finding)}", f"pulmonary nodules, the largest in the {lobe}"),
        ("Lung opacity", True): (f"ground-glass opacity in the {lobe}", f"{lobe} ground-glass opacity"),
        ("Lung opacity", False): (f"ground-glass opacities in the {lobes}", f"ground-glass areas in the {lobes}"),
        ("Consolidation", True): (f"consolidation in the {lobe}", f"pneumonic consolidation, {lobe}"),
        ("Consolidation", False): (f"consolidation in the {lobes}", f"consolidations, {lobes}"),
    }
    return say.one_of(*wordings[finding.label, single])


def _impression(say: Wording, findings: tuple[Finding, ...]) -> str:
    if not findings:
        return say.one_of(*NO_ACUTE_FINDING)
    order = say.rng.permutation(len(findings))
    return " ".join(sentence(_conclusion(say, findings[i])) for i in order)
