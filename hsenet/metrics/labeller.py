"""A rule-based labeller of chest CT reports: which of CT-RATE's 18 findings a text asserts.

    label_report("Cardiomegaly. No pleural or pericardial effusion.")["Cardiomegaly"]   # 1

A report is cut into sentences and clauses; in each, the phrases of FINDINGS are looked for, and a phrase counts when
no negation reaches it. Phrases and cues are tables: to correct the labeller, change a row and add the sentence to
the tests. It reads English radiology prose, is not RadBERT, and was not validated against human labels.

No rule sees what a clause leaves to another: "the right effusion has resolved, the left persists", "on the right
there is one", "a history of nodules; none is seen today". Nor do the tables hold all that ends a finding ("the lobe
has re-expanded") or what a report says about itself ("the question of adenopathy can be answered in the negative").
"""

import re
from collections.abc import Iterator, Sequence
from typing import Literal

from ..phantom import CT_RATE_LABELS


Uncertainty = Literal["positive", "negative"]
Span = tuple[int, int]


def _gap(words: int, *barred: str) -> str:
    """Up to so many words between two parts of one phrase, none of them barred."""
    barred_words = "|".join((*barred, "no", "not", "without", "free", "normal"))
    return rf"(?:[\s,/()&-]+(?!(?:{barred_words})\b)[\w.%]+){{0,{words}}}?[\s,/()&-]+"


BE = r"(?:is|are|was|were|be|been|appears?|seems?|remains?)"
NOT_ARTERIAL = (r"nodul\w*", r"granulom\w*", r"lymph\w*", r"nodes?", r"pleura\w*", r"valv\w*", r"mass\w*", r"lesions?",
                r"thyroid", r"trache\w*", r"bronch\w*", r"stents?", r"grafts?")  # fmt: skip
CALCIUM = rf"\b(?:micro)?calci(?:f\w+|um)(?! (?:\w+ )?(?:{'|'.join(NOT_ARTERIAL)})\b)"
ON = r"(?:in|of|at|along|on|within|involv(?:es?|ing)|affect(?:s|ing)?|throughout|around)"
CORONARY = r"(?:\bcoronar\w+|\bleft anterior descending|\blad\b|\blcx\b|\brca\b|\bcircumflex|\bleft main)"
ARTERY = (
    r"(?:(?<!para)(?<!para-)\baort(?:a|ic)\b(?!(?: and| or| mitral)* (?:valv|annul|leaflet)\w*)"
    r"|\bcarotids?\b|\bsubclavian|\bbrachiocephalic|\biliac|\bgreat vessels|(?<!coronary )\bvascular"
    r"|(?<!coronary )(?<!descending )(?<!circumflex )(?<!lad )(?<!lad\) )(?<!rca )(?<!lcx )\barter(?:y|ies|ial)\b)"
)
THICK = r"thick(?:en\w*|nesse?s?\b(?: \w+)? (?:increas\w+|are increased|is increased))"
NODES = r"\b(?:lymph )?nodes?\b"
LARGE_NODE_SIZE = r"(?<![\d.])(?:[1-9]\d(?:\.\d+)? ?mm|[1-9]\d?(?:\.\d+)? ?cm)\b"
SMALLER = (r"less", r"below", r"under", r"smaller", r"subcentimet\w+", r"exceed\w*")
HEART = r"\b(?:heart|cardiac(?: silhouette)?|cardiothoracic (?:ratio|index))"

FINDINGS: dict[str, tuple[str, ...]] = {  # a finding is mentioned where one of its phrases matches
    "Medical material": (
        r"\bpace-?makers?|\bdefibrillators?|\bicd\b|\bcatheters?\b|\bport-?a-?cath|\bpicc\b|\bcentral lines?",
        r"\b(?:endotracheal|tracheostomy|nasogastric|orogastric|feeding|chest|thoracostomy) tubes?|\bcannulas?",
        r"\b(?:chest|pleural|pigtail|thoracic|surgical) drains?\b|\bstents?\b|\bprosthe(?:sis|ses|tic)|\bimplants?\b",
        r"\b(?:sternal|sternotomy|cerclage|metallic) (?:wires?|sutures?)|\b(?:surgical|metallic) (?:clips?|staples?)",
        r"\bsternotomy(?: [\w,-]+){0,5} wires?\b",
        r"\bsuture (?:lines?|materials?)|\b(?:pacing|pacemaker|cardiac|icd) (?:leads?|wires?)|\belectrodes?",
        r"\bmedical (?:materials?|devices?)|\bhardware\b|\b(?:vena cava|ivc) filter|\bembolization coils?",
        r"\bfixation (?:plates?|screws?|materials?)|\bvalve replacement",
    ),
    "Arterial wall calcification": (
        rf"{ARTERY}{_gap(6, *NOT_ARTERIAL)}{CALCIUM}",
        rf"{CALCIUM}{_gap(4, *NOT_ARTERIAL)}{ON}{_gap(10, *NOT_ARTERIAL)}{ARTERY}",
        rf"\batheroscler\w+ {CALCIUM}",
    ),
    "Cardiomegaly": (
        r"\bcardiomegaly|\bcardiac enlargement|\benlarge(?:d|ment of)(?: the)? (?:heart|cardiac)",
        rf"{HEART}(?: sizes?| dimensions?| contours?)*(?: (?:{BE}|has|have|not|no longer|\w+ly|_+|borderline))*"
        r":? (?:enlarged|increased|dilated|larger?|enlargement|above normal)\b",
        r"\bincreased? (?:in )?(?:the )?(?:heart|cardiac) size|\bincreased cardiothoracic",
    ),
    "Pericardial effusion": (
        r"\bpericardial(?: (?!thick|sac|fat|calcif)[\w-]+){0,4}? (?:effusions?|fluid)|\bh(?:ydro|a?emo)pericardium",
        r"\b(?:effusions?|fluid)(?: \w+){0,2} (?:in|of|around|within|at)(?: the)? pericard\w+",
        r"\bpericardium\b(?:(?!pleura| and )[^,])*?\b(?:effusion|fluid)",
    ),
    "Coronary artery wall calcification": (
        rf"{CORONARY}{_gap(6, *NOT_ARTERIAL)}{CALCIUM}",
        rf"{CALCIUM}{_gap(4, *NOT_ARTERIAL)}{ON}{_gap(10, *NOT_ARTERIAL)}{CORONARY}",
    ),
    "Hiatal hernia": (
        r"\b(?:hiatal|hiatus|(?:para)?-?(?:o?esophageal))(?: \w+)? hernia\w*|\bsliding(?: type)? hernia",
        r"\bherniat\w+(?: \w+){0,6} hiatus",
    ),
    "Lymphadenopathy": (
        r"\b(?:lymph)?adenopath(?:y|ies)",
        rf"\b(?<!non-)(?:enlarged?|enlargement of|pathological(?:ly)?)\b{_gap(6, 'heart', 'thyroid', 'small')}{NODES}",
        rf"{NODES}{_gap(6, 'heart', 'thyroid')}(?:enlarged|enlargement|pathological(?:ly)? (?:size|dimension|appear))",
        rf"{NODES}{_gap(9, *SMALLER)}{LARGE_NODE_SIZE}",
    ),
    "Emphysema": (r"\bemphysema\w*",),
    "Atelectasis": (
        r"\b\w*atelecta\w+|\b(?:lobar|lobe|lung) collapse",
        r"\bcollapse(?:d| of)(?: \w+){0,4} (?:lobe|lung)",
    ),
    "Lung nodule": (r"\b(?:micro)?nodul(?:es?|arity)\b", r"\bnodular (?:lesions?|densit|opacit|formation)\w*"),
    "Lung opacity": (
        r"\bopacit(?:y|ies)\b|\bopacifications?\b|\bground[ -]?glass\b|\bggos?\b|\binfiltrat(?:e|es|ion|ions)\b",
        r"\bdensity increases?|\bincreased (?:parenchymal |lung )?density",
    ),
    "Pulmonary fibrotic sequela": (
        r"\b(?:pleuroparenchymal )?sequel\w+|\bfibro(?:sis|tic|atelecta\w+)|\bscar(?:s|ring)?\b",
        r"\bhoneycomb\w*|\b(?:parenchymal|pleuroparenchymal) bands?",
    ),
    "Pleural effusion": (
        r"\bpleura\w*(?: (?!thick|calcif|plaque|nodul)[\w-]+){0,4}? (?:effusions?|fluid)|\bh(?:ydro|a?emo)thorax",
        r"\beffusions?\b|\bfluid(?: \w+){0,2} (?:in|of|within)(?: \w+){0,2} (?:pleura\w*|hemithora\w+|fissures?)\b",
    ),
    "Mosaic attenuation pattern": (r"\bmosaic\b(?: \w+){0,2} (?:attenuation|perfusion|pattern|density|appearance)",),
    "Peribronchial thickening": (
        rf"\bperibronch\w+{_gap(4)}(?:{THICK}|cuffing)",
        rf"\bbronch(?:us|i|ial|iolar|ioles?)\b{_gap(4, 'lumen')}{THICK}|\bbronchial cuffing",
        rf"\b{THICK}{_gap(4, 'pleura', 'septa')}(?:peribronch\w+|bronch(?:us|i|ial|iolar|ioles?)\b)",
    ),
    "Consolidation": (r"\bconsolidat\w+",),
    "Bronchiectasis": (
        r"\bbronchi(?:ol)?ecta\w+|\bbronchiolectas\w+|\bbronchial (?:dilat|ectas)\w+",
        r"\b(?:dilated|ectatic) (?:\w+ )?bronch(?:i|us)\b|\bbronchi(?: \w+){0,2} (?:dilated|ectatic)\b",
    ),
    "Interlobular septal thickening": (
        rf"(?<!interventricular )(?<!interatrial )(?<!nasal )\bsept(?:al?|ae|um)\b{_gap(4)}{THICK}",
        rf"\b{THICK}{_gap(5)}(?:inter|intra)lobular sept\w+|\bkerley b? ?lines?",
        rf"\bthickened{_gap(2)}septa\b",
    ),
}
NOT_THE_FINDING: dict[str, tuple[str, ...]] = {  # a phrase that lies wholly inside one of these is something else
    "Medical material": (r"\b(?:pleural|peritoneal|metastatic|tumou?r) implants?", r"\bcatheter angiograph\w+"),
    "Arterial wall calcification": (
        rf"{CORONARY}{_gap(6)}atheroscler\w+ {CALCIUM}",
        rf"atheroscler\w+ {CALCIUM}{_gap(6)}{CORONARY}",
    ),
    "Emphysema": (
        r"\b(?:subcutaneous|surgical|mediastinal|soft tissue)(?: (?:and|or|soft|tissue|mediastinal))* emphysema",
        r"\bemphysema (?:in|of|within)(?: the)?(?: \w+){0,2} (?:subcutaneous|soft|chest|mediastin|neck)\w*",
    ),
    "Atelectasis": (r"\b(?:trache\w+|vertebra\w+) collapse",),
    "Lung nodule": (
        r"\b(?:thyroid|adrenal|breast|hepatic|liver|splenic|spleen|renal|subcutaneous|soft tissue)"
        r"(?: (?!lung|pulmonary)\w+){0,3} nodul\w*(?: \w+)?",
        r"\bnodul\w*(?: (?!lung|pulmonary|and|with|is|are)[\w.]+){0,9}"
        r" (?:thyroid|adrenal|breast|liver|spleen|kidney|subcutaneous)",
        r"\bnodular (?:goit\w+|liver)",
    ),
    "Lung opacity": (
        r"\b(?:sinus|vessel|vascular|contrast|arterial|bowel)(?: \w+)? opacification",
        r"\bground[ -]?glass nodul\w+",
        r"\bopacification of(?: \w+){0,3} (?:arter\w+|vessels?|sinus\w*|veins?)",
        r"\bopacit(?:y|ies) (?:of|in)(?: \w+){0,3} sinus\w*",
        r"\b(?:fatty|hepatic|liver) infiltration",
    ),
    "Pulmonary fibrotic sequela": (
        r"\b(?:hepatic|liver|mediastinal|retroperitoneal|cystic|myocardial) (?:fibro|scar)\w+",
        r"\b(?:surgical|skin|sternotomy|incision\w*|renal|cortical) scar\w*|\bsequel\w+(?: \w+){0,3} fractur\w+",
    ),
    "Pleural effusion": (
        r"\bpericardial(?: (?!and|or|nor|pleural)[\w-]+){0,3} (?:effusions?|fluid)",
        r"\beffusions?(?: \w+){0,2} (?:in|of|around|within|at)(?: the)? pericard\w+",
        r"\bpericardi(?:um|al fluid)\b(?:(?!pleura| and )[^,])*?\beffusions?",
        r"\b(?:joint|knee|shoulder|hip)(?: \w+)? effusions?",
    ),
    "Consolidation": (r"\bconsolidat\w+(?: \w+)? fractur\w+|\bfractur\w+(?: \w+){0,2} consolidat\w+",),
}

SEEN = (
    "(?:seen|detected|observed|identified|noted|present|found|demonstrated|visuali[sz]ed|encountered|appreciated|"
    "evident|visible|apparent|shown|revealed|determined|recogni[sz]ed|distinguished|monitored|followed|reported)"
)
# Read in this order; what one table takes, the next no longer sees.
BEFORE_UNCERTAINTY = (
    r"\b(?:possibl[ey]|probabl[ey]|likely|suspected|suspicious (?:for|of)|suspicion of|concern(?:ing)? for|"
    r"questionable|suggest(?:s|ing|ive of)|(?:may|might|could) (?:be|represent|reflect|indicate)|"
    r"(?:cannot|can not|can't|could not) (?:\w+ )?(?:exclude|rule out))\b"
)
AFTER_UNCERTAINTY = (
    r"\b(?:(?:cannot|can not|can't|could not|may not) be|not)(?: \w+)? (?:excluded|ruled out)\b|\?|"
    rf"\b{BE} (?:possible|probable|suspected|likely|questionable)\b|\b(?:may|might|could) be present\b"
)
NOT_A_NEGATION = (  # a "no" or "not" that leaves the finding standing
    r"\b(?:no|not|without)(?: (?:any|significant|interval|relevant|appreciable|substantial|further|definite|obvious|"
    r"clear|marked|apparent|evidence of|signs? of))*"
    r" (?:changes?|differences?|increase|decrease|progress\w*|regression|growth|improvement|reduction|alteration)\b"
    r"(?! (?:suggest|consistent|compatible|indicat|typical|characteristic|of (?!the)))|"
    r"\b(?:not|no|without)(?: (?:yet|fully|completely|entirely|complete|full|any))* "
    r"(?:resolved|resolution(?: of)?|disappeared|cleared)\b|\bunresolved\b|"
    r"\b(?:partial\w*|incomplete\w*|near\w*|almost|mostly|largely)(?: completely)? (?:resolved|resolution(?: of)?|"
    r"disappeared|cleared)\b|\bnot only\b|\bno doubt\b|\b(?:no|without|not)(?: iv| intravenous)? contrast\w*|"
    r"\bnot (?:absent|unlikely|improbable)\b|"
    r"\babsence of(?=.* (?:cannot|can not|could not) be (?:confirmed|assured))|"
    r"\bnot (?:true|the case) that there (?:is|are) no\b|"
    rf"\bno (?:\w+ )?(?:lobes?|lungs?|segments?|regions?|zones?|parts?)(?: {BE})?"
    r" (?:free (?:of|from)|without|devoid of)\b|"
    rf"\bnot (?:previously|formerly)(?: {SEEN})?\b|"
    rf"\bnot (?:\w+ )?{SEEN}(?: \w+){{0,3}} (?:previous\w*|prior|earlier|before)\b"
)
AFTER_NEGATION = (  # reaches back to the start of its clause
    rf"\b(?:not|no longer)(?: \w+){{0,2}}? {SEEN}\b|n't (?:be )?{SEEN}\b|"
    r"\b(?:absent|unlikely|improbable|excluded|ruled out)\b|"
    rf"\b{SEEN} (?:neither|nowhere)\b|\breplaced by\b|"
    r"(?!^)\b(?:resolved|disappeared|cleared)\b|\bbeen removed\b|: ?(?:none|no|nil|negative)\b(?! \w)|\(-\)|"
    r"\b(?:cannot|can not|could not) be (?:\w+ )?(?:evaluated|assessed)\b"
)
BEFORE_NEGATION = (  # reaches on to the end of its clause, or to a cause or an affirmative opening
    r"\b(?:no|not|nor|neither|never|without|absence of|lack of|negative for|free (?:of|from)|clear of|resolution of|"
    r"disappearance of|removal of|rule out|to exclude|excludes?|(?:evaluat\w+|assess\w*|screen\w*|query) for|"
    r"rather than|instead of|as opposed to|if|in case of|nothing to|devoid of|fail(?:s|ed) to|family history of|"
    r"none of(?: \w+){1,3}? (?:shows?|contains?|has|have|demonstrates?|reveals?))\b|"
    r"^resolved\b|\bw/o\b|\br/o\b|n't\b"
)
HEADING_NEGATION = (  # of a list, all of which it denies
    rf"\W*(?:the following(?: \w+)? {BE} )?(?:not {SEEN}|no longer {SEEN}|absent|excluded)\s*:"
)
CAUSE = r"\b(?:due to|because of|secondary to|owing to|caused by|as a result of|in the setting of)\b"
AFFIRMATIVE_WORD = (
    r"(?:there (?:is|are|was|were)|an?|the|mild\w*|minimal\w*|small|moderate\w*|severe\w*|large|slight\w*|stable|"
    r"unchanged|residual|persistent|known|underlying|chronic|presence of)\b"
)
AFFIRMATIVE_OPENING = (
    rf"(?:,(?: and| with)? (?:(?:left|right|bilateral)\b|{AFFIRMATIVE_WORD})|\b(?:and|with) {AFFIRMATIVE_WORD})"
)
LIST_GOES_ON = r"\b(?:or|nor)\b(?! (?:the )?(?:left|right|upper|lower|middle|both)\b)"
PRESUPPOSED = (  # "no calcification in the nodule": there is a nodule
    r"\b(?:in|within|inside|around|near|surrounding|beside|adjacent to|next to|associated with|accompanying)"
    r" (?:the|this|these|those|that)(?: (?!lungs?\b|lobes?\b|or\b|and\b|as\b|like\b)\w+){0,2} $"
)
SENTENCE_BREAK = (
    r"(?<!e\.g\.)(?<!i\.e\.)(?<!approx\.)(?<!vs\.)(?<=[.!?])\s+|(?<=[a-z)][.])(?=[A-Z])|\n\s*(?=\n|[A-Z\d\u2022*-])"
)
CLAUSE_BREAK = (
    r";|\s-+\s|\s(?=(?:lungs?|heart|pleura|mediastinum|airways|bones|abdomen|findings|impression) ?:)|"
    r"\b(?:but|however|although|though|whereas|while|except(?: for)?|apart from|aside from|other than|"
    r"despite|nevertheless|otherwise)\b"
)
FINITE_VERB = (
    r"\b(?:is|are|was|were|has|have|had|shows?|showed|demonstrates?|reveals?|appears?|remains?|measures?|contains?|"
    r"extends?|continues?|persists?)\b"
)
NO_SUBJECT = rf"\W*(?:and )?(?:which|that|who|where|not|no longer|{FINITE_VERB}|{SEEN})\b"


def label_report(text: str | None, *, uncertain: Uncertainty = "positive") -> dict[str, int]:
    """
    Label -> 1 where the report asserts the finding at least once, else 0, for the 18 labels of CT-RATE.

    A finding that is denied, resolved, sought ("evaluate for") or not mentioned is 0, so an empty or missing report is
    all 0. One plain mention outweighs any number of denials elsewhere ("no effusion on the right; left effusion").

    Args:
        uncertain: What a finding counts as that is only ever hedged ("possible", "may represent", "cannot be
            excluded"). The default, "positive", follows the common reading that a hedge worth writing is a finding.
    """
    if uncertain not in ("positive", "negative"):
        raise ValueError(f"uncertain must be 'positive' or 'negative', got {uncertain!r}.")
    found = dict.fromkeys(CT_RATE_LABELS, 0)
    for clause in _clauses(text or ""):
        hedged, denied_before, denied_after = _cue_scopes(clause)
        for label, (start, end) in _mentions(_without_cues(clause)):
            presupposed = re.search(PRESUPPOSED, clause[:start])
            denied = denied_after if presupposed else denied_before + denied_after
            if uncertain == "negative":
                denied = denied + hedged
            if not any(start < scope_end and end > scope_start for scope_start, scope_end in denied):
                found[label] = 1
    return found


def label_vector(
    text: str | None, *, labels: Sequence[str] = CT_RATE_LABELS, uncertain: Uncertainty = "positive"
) -> list[int]:
    """`label_report` as a list in the order of `labels`."""
    unknown = [label for label in labels if label not in CT_RATE_LABELS]
    if unknown:
        raise ValueError(f"labels must be among CT-RATE's 18, got {unknown}.")
    found = label_report(text, uncertain=uncertain)
    return [found[label] for label in labels]


def _clauses(text: str) -> Iterator[str]:
    """Lower-case stretches in which a cue can reach a finding: a new one starts where a new verb has its subject."""
    text = text.replace("\u2014", "; ").replace("\u2013", "-").replace("\u2019", "'")
    for sentence in re.split(SENTENCE_BREAK, text):
        for stretch in re.split(CLAUSE_BREAK, " ".join(sentence.lower().split())):
            clause = ""
            for part in re.split(r"(?=,)|(?<!,)(?= and )", stretch):
                if clause and _starts_clause(clause, part):
                    yield clause
                    clause = ""
                clause += part
            yield clause


def _starts_clause(clause: str, part: str) -> bool:
    if re.match(NO_SUBJECT, part) or re.match(r"\W*(?:or|nor)\b", part):
        return False
    both_finite = re.search(FINITE_VERB, part) and re.search(rf"{FINITE_VERB}|\b{SEEN}\b", clause)
    both_participles = re.search(rf"\b{SEEN}\b", part) and re.search(rf"\b{SEEN}\b", clause)
    return bool(both_finite or both_participles)


def _without_cues(clause: str) -> str:
    """The clause with the hedges and the harmless negations crossed out, at the same length."""
    for cues in (AFTER_UNCERTAINTY, BEFORE_UNCERTAINTY, NOT_A_NEGATION):
        clause = re.sub(cues, lambda cue: "_" * len(cue[0]), clause)
    return clause


def _cue_scopes(clause: str) -> tuple[list[Span], list[Span], list[Span]]:
    """Spans of a clause that are hedged, denied by a cue before them, and denied by a cue after them."""
    hedged = [(0, cue.start()) for cue in re.finditer(AFTER_UNCERTAINTY, clause)]
    for cue in re.finditer(BEFORE_UNCERTAINTY, clause):
        end = re.search(r",| and | with |$", clause[cue.end() :])
        hedged.append((cue.start(), cue.end() + end.start()))
    clause = _without_cues(clause)
    if heading := re.match(HEADING_NEGATION, clause):
        return hedged, [(heading.end(), _reach(clause, heading.end()))], []
    after = [(0, cue.start()) for cue in re.finditer(AFTER_NEGATION, clause)]
    clause = re.sub(AFTER_NEGATION, lambda cue: "_" * len(cue[0]), clause)
    before = [(cue.end(), _reach(clause, cue.end())) for cue in re.finditer(BEFORE_NEGATION, clause)]
    return hedged, before, after


def _reach(clause: str, start: int) -> int:
    """Where a negation that ends at `start` stops reaching: a cause, a closing bracket, or an affirmative opening."""
    stops = [match.start() for match in re.finditer(CAUSE, clause) if match.start() >= start]
    closing = re.match(r"[^()]*\)", clause[start:])
    if closing:
        stops.append(start + closing.end())
    for opening in re.finditer(AFFIRMATIVE_OPENING, clause):
        if opening.start() >= start and not re.search(LIST_GOES_ON, clause[opening.end() :]):
            stops.append(opening.start())
    return min(stops, default=len(clause))


def _mentions(clause: str) -> Iterator[tuple[str, Span]]:
    for label, phrases in FINDINGS.items():
        others = [other.span() for phrase in NOT_THE_FINDING.get(label, ()) for other in re.finditer(phrase, clause)]
        for phrase in phrases:
            for mention in re.finditer(phrase, clause):
                start, end = mention.span()
                if not any(other_start <= start and end <= other_end for other_start, other_end in others):
                    yield label, (start, end)
