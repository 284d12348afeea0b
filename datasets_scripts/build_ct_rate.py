"""CT-RATE (chest CTs with reports and 18 findings) to a dataset that the training programs read.

    python datasets_scripts/build_ct_rate.py --corpus /data/CT-RATE --release ct-rate-v2 --output data/ct_rate \
        --volumes reference                                     # rows point into the local copy
    python datasets_scripts/build_ct_rate.py --corpus hf://datasets/ibrahimhamamci/CT-RATE@COMMIT \
        --release ct-rate-v2 --output data/ct_rate --spacing 3 1.5 1.5 --workers 16
                                                                # scan by scan from the Hub, after `hf auth login`

Run it again after an interruption: it goes on. `--max-patients 20` for a trial. Needs `pip install -e ".[corpora]"`.

Layout read (the dataset repository as it is): `dataset/{train,valid}/` (first release: stored values, which
`RescaleSlope` and `RescaleIntercept` of `dataset/metadata/{train,validation}_metadata.csv` turn into HU) or
`dataset/{train_fixed,valid_fixed}/` (second release: HU), each as `train_1/train_1_a/train_1_a_1.nii.gz`; reports in
`dataset/radiology_text_reports/`, labels in `dataset/multi_abnormality_labels/`, scans of other body parts in
`dataset/metadata/no_chest_*.txt`. `--release` decides on both the folder and the source of HU, so that they fit.

Not verified, without the corpus at hand: that every file of the second release is in HU, how many headers are blank
(such scans are left out and listed: nothing else says which side is left), and that no file of the first release has
a scaling of its own (one that has is refused).
"""

import argparse

from hsenet.corpora import Corpus, Plan, add_build_arguments, add_split_arguments, run
from hsenet.corpora.ct_rate import RELEASES, ct_rate_facts, ct_rate_rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_build_arguments(parser)
    add_split_arguments(parser)
    parser.add_argument("--release", choices=RELEASES, required=True, help="which of CT-RATE's volumes, see above")
    arguments = parser.parse_args()
    corpus = Corpus(arguments.corpus)
    rows, excluded = ct_rate_rows(corpus, arguments.release, arguments.validation, arguments.seed)
    facts = ct_rate_facts("build_ct_rate.py", "CT-RATE for HSENet")
    splits = {"validation": arguments.validation, "seed": arguments.seed}
    run(Plan(rows, excluded), corpus, facts, arguments, release=arguments.release, **splits)


if __name__ == "__main__":
    main()
