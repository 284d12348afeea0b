"""What a phantom's report says about the lungs."""

from collections.abc import Callable

from .phantom_findings import Finding
from .phantom_wording import NUMBERS, Wording, join_words


def describe_lungs(say: Wording, present: dict[str, Finding]) -> list[str]:
    writers: dict[str, Callable[[Wording, Finding], str]] = {
        "Emphysema": _emphysema,
        "Lung nodule": _nodules,
        "Consolidation": _consolidation,
        "Lung opacity": _opacity,
        "Atelectasis": _atelectasis,
    }
    order = [list(writers)[i] for i in say.rng.permutation(len(writers))]
    texts = [writers[label](say, present[label]) for label in order if label in present]
    clear = [label for label in writers if label not in present]
    # A lung beside an effusion is compressed: not "clear".
    if len(clear) == len(writers) and "Pleural effusion" not in present and say.chance(0.85):
        return [
            say.one_of(
                "both lungs are clear",
                "aeration of both lung parenchymas is normal",
                "lung parenchyma is unremarkable on both sides",
                "no nodule, mass or infiltration is seen in either lung",
                "both lungs are well aerated without focal lesion",
            )
        ]
    return texts + _clear_of(say, clear)


def _clear_of(say: Wording, absent: list[str]) -> list[str]:
    """Sometimes deny one or two lung findings that are absent."""
    terms = {
        "Lung nodule": ("pulmonary nodule", "nodule", "suspicious nodule"),
        "Consolidation": ("consolidation", "area of consolidation", "pneumonic consolidation"),
        "Lung opacity": ("ground-glass opacity", "ground glass density"),
        "Emphysema": ("emphysema",),
        "Atelectasis": ("atelectasis",),
    }
    if not absent or not say.chance(0.55):
        return []
    chosen = [str(label) for label in say.rng.permutation(absent)[: int(say.rng.integers(1, 3))]]
    things = " or ".join(say.one_of(*terms[label]) for label in chosen)
    return [say.one_of(f"no {things}", f"no {things} is observed in the lungs", f"there is no {things}")]


def _emphysema(say: Wording, finding: Finding) -> str:
    grade, kind = finding.severity, finding.kind
    return say.one_of(
        f"{grade} {kind} emphysema, predominantly in the upper lobes",
        f"{grade} emphysematous changes of {kind} type in both lungs",
        f"there is {grade} {kind} emphysema, more pronounced in the upper zones",
        f"both lungs show {grade} emphysema with {kind} low attenuation areas",
    )


def lobes_of(finding: Finding) -> str:
    """The lobes of a finding, the largest lesion's first, each once."""
    return join_words(list(dict.fromkeys(str(lesion.lobe) for lesion in finding.lesions)))


def lungs_of(finding: Finding) -> str:
    return "both lungs" if finding.side == "bilateral" else f"the {finding.side} lung"


NODULE_KINDS = {
    "smooth": ("", "well defined ", "solid "),
    "spiculated": ("spiculated ", "irregular "),
    "calcified": ("calcified ",),
}


def _nodules(say: Wording, finding: Finding) -> str:
    size, lobe, count, lungs = finding.size_mm, finding.lobe, NUMBERS[finding.count], lungs_of(finding)
    kind = say.one_of(*NODULE_KINDS[finding.kind])
    if finding.count == 1:
        return say.one_of(
            f"one {kind}nodule of {size} mm is seen in the {lobe}",
            f"{kind}nodule measuring {size} mm in the {lobe}",
            f"there is a {kind}pulmonary nodule of {size} mm in diameter in the {lobe}",
            f"the {lobe} contains a {kind}nodule with a diameter of {size} mm",
        )
    return say.one_of(
        f"{count} {kind}nodules in {lungs}, the largest {size} mm in the {lobe}",
        f"there are {count} {kind}pulmonary nodules ({lobes_of(finding)}), the largest measuring {size} mm",
        f"{lungs}: {count} {kind}nodules; the largest is in the {lobe} and measures {size} mm",
        f"{count} {kind}nodules are observed in {lungs}, up to {size} mm in the {lobe}",
    )


def _consolidation(say: Wording, finding: Finding) -> str:
    lobes, verb = lobes_of(finding), "shows" if finding.count == 1 else "show"
    areas = "an area" if finding.count == 1 else "areas"
    return say.one_of(
        f"{areas} of consolidation with air bronchograms in the {lobes}",
        f"consolidation is observed in the {lobes}, extending over {finding.size_mm} mm",
        f"dense consolidation in the {lobes}, compatible with pneumonia",
        f"the {lobes} {verb} airspace consolidation of up to {finding.size_mm} mm",
    )


def _opacity(say: Wording, finding: Finding) -> str:
    lobes = lobes_of(finding)
    count = NUMBERS[finding.count]
    many = "" if finding.count == 1 else "s"
    return say.one_of(
        f"{count} ground-glass {'opacities' if many else 'opacity'} in the {lobes}",
        f"patchy ground glass densit{'ies are' if many else 'y is'} seen in the {lobes}",
        f"{count} focal ground-glass area{many} in the {lobes}, the largest {finding.size_mm} mm",
        f"hazy ground-glass opacit{'ies' if many else 'y'} involving the {lobes}",
    )


def _atelectasis(say: Wording, finding: Finding) -> str:
    kind, lobe = finding.kind, finding.lobe
    return say.one_of(
        f"{kind} atelectasis in the {lobe}",
        f"{kind} atelectatic changes are observed in the {lobe}",
        f"there is an area of {kind} atelectasis in the {lobe}",
        f"the {lobe} shows {kind} atelectasis",
    )
